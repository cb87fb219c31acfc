"""The book as a PDF: printed by a browser, whole or not at all."""

import shutil
from pathlib import Path

import pytest

from tools import pdf


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A book of two pages."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "_config.yml").write_text("title: A book\nexecute:\n  execute_notebooks: 'off'\n")
    (folder / "_toc.yml").write_text("format: jb-book\nroot: intro\nchapters:\n  - file: next\n")
    (folder / "intro.md").write_text("# First\n\n$x^2$\n")
    (folder / "next.md").write_text("# Second\n")
    return folder


def test_a_book_is_printed(source: Path, tmp_path: Path):
    if not any(map(shutil.which, pdf.BROWSERS)):
        pytest.skip("there is no browser of the Chromium family")
    made = pdf.pdf(source, tmp_path / "book.pdf")
    assert made.read_bytes().startswith(b"%PDF")
    assert made.read_bytes().rstrip().endswith(b"%%EOF")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["book.pdf", "source"]


def test_without_a_browser_the_error_names_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert pdf.main() == 2
    assert "on Debian `chromium`" in capsys.readouterr().err


def test_a_browser_that_prints_nothing_leaves_the_pdf_that_was_there(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pdf, "browser", lambda: shutil.which("true"))
    kept = tmp_path / "book.pdf"
    kept.write_text("the last one")
    with pytest.raises(RuntimeError, match=r"true made no book.part.pdf"):
        pdf.pdf(source, kept)
    assert kept.read_text() == "the last one"
