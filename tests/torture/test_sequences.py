"""The state machine: a short part of ``make torture``, and that it sees what is wrong."""

from pathlib import Path

import pytest
from clone import Clone

from torture.results import tried_sequences


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Clone:
    return Clone(tmp_path_factory.mktemp("sequences") / "clone")


def test_what_is_stale_is_made_whatever_happened_before(clone: Clone):
    assert tried_sequences(clone, 8, seed=1) == ""


@pytest.mark.parametrize(("right", "wrong", "seen"), [
    ("sorted(sources | data)", "sorted(sources)", "data/alpha.csv"),
    ("shutil.rmtree(stale)", "stale.exists()", "killed"),
    ("lock.acquire()", "contextlib.suppress()", "two_at_once"),
])
def test_a_fault_is_seen(clone: Clone, right: str, wrong: str, seen: str):
    for name in ("runner.py", "provenance.py", "files.py"):
        path = Path(clone.root / "lib/lablog" / name)
        source = path.read_text()
        if right in source:
            break
    assert right in source
    try:
        path.write_text(source.replace(right, wrong).replace(
            "import argparse\n", "import argparse\nimport contextlib\n"))
        found = tried_sequences(clone, 40, seed=2)
    finally:
        path.write_text(source)
    assert seen in found
