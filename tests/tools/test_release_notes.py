"""Notes for a release say what the ledger says, and what has changed since another commit."""

import shutil
import subprocess
from pathlib import Path

import pytest

from lablog.claims import as_table, counts, ledger, read_records
from lablog.files import repository
from lablog.record import Record
from tools import compare, release_notes

PUBLISHED = repository() / "book" / "records"
CHAPTER = "07_defects"


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small repository with the published records in one commit."""
    shutil.copytree(PUBLISHED, tmp_path / "book" / "records")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "published"]):
        subprocess.run([*git, *arguments], check=True)
    for module in (compare, release_notes):
        monkeypatch.setattr(module, "repository", lambda: tmp_path)
    return tmp_path


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert release_notes.main(arguments) == 0
    return capsys.readouterr().out


def test_notes_count_the_verdicts_and_name_every_record(
    clone: Path, capsys: pytest.CaptureFixture[str]
):
    text, records = told(capsys), read_records(PUBLISHED)
    for verdict, number in counts(ledger(records)).items():
        assert f"| {verdict} | {number} |" in text
    for profile, found in records.items():
        for name in found if profile != "bench" else ():
            assert f"| {profile} | {name} | `" in text
    assert "Since" not in text


def test_a_commit_with_the_same_records_changes_no_claim(
    clone: Path, capsys: pytest.CaptureFixture[str]
):
    assert "### Since HEAD\n\nNo claim is judged otherwise." in told(capsys, "HEAD")


def test_a_changed_verdict_is_told(clone: Path, capsys: pytest.CaptureFixture[str]):
    path = clone / "book" / "records" / "laptop" / f"{CHAPTER}.json"
    record = Record.read(path)
    other = [metric.model_copy(update={"value": "no"}) if metric.name == "same_seed.identical"
             else metric for metric in record.metrics]
    record.model_copy(update={"metrics": tuple(other)}).write(path)
    lines = [line for line in told(capsys, "HEAD").splitlines() if line.startswith("- ")]
    assert len(lines) == 1
    assert lines[0].startswith("- B25, identical results for identical seed: reproduced within →")
    assert "**not reproduced** outside" in lines[0]
    assert len(as_table(ledger(read_records(clone / "book" / "records")))) == 45


def test_a_commit_that_is_none_is_one_error(clone: Path, capsys: pytest.CaptureFixture[str]):
    assert release_notes.main(["nowhere"]) == 2
    assert "git has no commit 'nowhere'" in capsys.readouterr().err
