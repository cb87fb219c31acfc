"""The notebooks themselves, in this clone, in smoke size."""

import subprocess
import time
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from lablog.files import repository
from lablog.profiles import load, notebooks
from lablog.provenance import source_state
from lablog.record import Record

ROOT = repository()
STORIES = ROOT / ".." / "shared" / "data" / "stories260K.bin"


def make(*arguments: str) -> str:
    """What Make says; whoever makes the same results in this clone is waited for."""
    while True:
        done = subprocess.run(["make", *arguments], cwd=ROOT, capture_output=True, text=True,
                              check=False)
        if "another `make`" not in done.stderr:
            break
        time.sleep(1)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def check(folder: Path, names: list[str]) -> list[Record]:
    """Records are of this source, with everything that they name in place."""
    records = []
    for name in names:
        record = Record.read(folder / "records" / f"{name}.json")
        records.append(record)
        assert (record.status, record.notebook, record.profile) == ("ok", name, folder.name)
        assert record.failure is None
        assert record.metrics
        assert record.figures
        assert record.files
        assert record.report
        assert record.report.en != record.report.ja
        assert record.source.patch_sha256 == source_state().patch_sha256
        for figure in record.figures:
            assert (folder / figure.svg).read_text().startswith("<?xml")
            assert len(pd.read_csv(folder / figure.csv)) > 0
        executed = nbformat.read(folder / "notebooks" / f"{name}.ipynb", as_version=4)
        code = [cell for cell in executed.cells if cell.cell_type == "code"]
        assert all(cell.execution_count for cell in code)
        assert not [o for cell in code for o in cell.outputs if o.output_type == "error"]
    return records


@pytest.fixture(scope="module")
def smoke() -> str:
    """Output of the smoke profile's run."""
    return make("reproduce", "PROFILE=smoke")


def test_the_smoke_profile_runs_and_records(smoke: str):
    profile = load("smoke")
    for record in check(ROOT / "build" / "smoke", notebooks()):
        assert record.parameters == profile.parameters[record.notebook]
        assert f"\n{record.notebook}: {record.seconds:.0f} s, " in smoke
    assert "  as the log says, within its tolerance: A06\n" in smoke
    assert "  B10 parallel training convergence: " in smoke
    assert len(smoke[smoke.index("\n01_"):].splitlines()) < 50  # one screen


def test_every_figure_of_the_book_links_its_data(smoke: str):
    html = ROOT / "build" / "book" / "html"
    for name in notebooks():
        record = Record.read(ROOT / "build" / "smoke" / "records" / f"{name}.json")
        page = (html / "notebooks" / f"{name}.html").read_text()
        for figure in record.figures:
            assert f'href="../{figure.csv}"' in page
            assert (html / figure.csv).is_file()
        assert page.count("<figure") == len(record.figures)


def test_a_second_make_reproduce_runs_nothing(smoke: str):
    folder = ROOT / "build" / "smoke"
    paths = [folder / "records" / f"{name}.json" for name in notebooks()]
    before = [(path.stat().st_mtime_ns, path.read_bytes()) for path in paths]
    assert "running" not in make("reproduce", "PROFILE=smoke")
    assert [(path.stat().st_mtime_ns, path.read_bytes()) for path in paths] == before


def test_a_real_pretrained_model_replaces_the_offline_one_by_one_value():
    if not STORIES.is_file():
        pytest.skip("shared/data/stories260K.bin is not beside this clone")
    settings = ["model=../shared/data/stories260K.bin", "items=3", "texts=2", "continuations=1"]
    settings += ["tokens=8", "sequences=17", "seeds=[1,2]"]
    make("reproduce", "PROFILE=smoke", f"SET={' '.join(settings)}", "NOTEBOOKS=01 02")
    folder = ROOT / "build" / load("smoke", settings).name
    for record in check(folder, notebooks()[:2]):
        assert record.parameters["model"] == "../shared/data/stories260K.bin"
        assert any("stories260K" in file.path for file in record.files)
