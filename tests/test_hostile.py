"""Records and notebooks of strangers: what stands in them is shown, and nothing of it runs."""

import json
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest
from browser import page

from lablog import book
from lablog.markdown import fenced, plain
from lablog.provenance import CloneState, FileHash, Machine
from lablog.record import FigureFile, Metric, Record, ReportText, Stage, TaskPlace
from tools import pdf

PAYLOAD = ("</code></pre></td></script>``` ` | {raw} $x$ *a* <script>window.pwned=1</script>"
           "<img src=x onerror=\"window.pwned=2\"><svg onload=window.pwned=3>"
           "[a](javascript:window.pwned=4) ![b](x\" onerror=\"window.pwned=5) "
           "<a href='javascript:window.pwned=6'>c</a>")
NAME = "04_cvfp_phase1"  # a chapter that is published too, so that every page speaks of it


def record(text: str, name: str = "a name") -> Record:
    """A record with `text` wherever a text may stand, and `name` wherever a name may."""
    return Record(
        notebook=NAME, profile="laptop", status="ok", parameters={name: text, "w": [text]},
        seeds=(1,), started=datetime(2026, 1, 1, tzinfo=UTC), seconds=1.0,
        stages=(Stage(name=name, seconds=1.0),), files=(FileHash(path=text, sha256="", bytes=1),),
        tasks=(TaskPlace(kind=name, name=text, worker=name, seconds=1.0),),
        source=CloneState(commit="1" * 40, dirty=True, library_sha256="", patch_sha256=""),
        machine=Machine(python="3", platform=name, cpu=name, threads=1, device="cpu",
                        packages={"torch": name}),
        figures=(FigureFile(name="line", svg="figures/a.svg", csv="figures/a.csv", caption=text),),
        metrics=(Metric(name="parallel.validation.check1", value=text, unit=name),
                 Metric(name="empty", value=None, unit="", undefined=text),
                 Metric(name="mine", value=1.0, unit="", interval=(0, 2), interval_method=text)),
        report=ReportText(en=text, ja=text))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A book of results with the payload in everything."""
    root = tmp_path_factory.mktemp("hostile")
    folder = root / "laptop"
    record(PAYLOAD, "name’s [a](javascript:window.pwned=7) *b* {raw} $x$").write(
        folder / "records" / f"{NAME}.json")
    output = nbformat.v4.new_output
    notebook = nbformat.v4.new_notebook(
        metadata={"kernelspec": {"name": "python3", "language": "python", "display_name": PAYLOAD},
                  "title": PAYLOAD, "authors": [{"name": PAYLOAD}]},
        cells=[
            nbformat.v4.new_markdown_cell("# A chapter"),
            nbformat.v4.new_code_cell(f"w: str = '''{PAYLOAD}'''  # a value", execution_count=1,
                                      metadata={"name": PAYLOAD}, outputs=[
                output("stream", name="stdout", text=PAYLOAD),
                output("execute_result", {"text/plain": PAYLOAD}, execution_count=1)])])
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
    (folder / "notebooks").mkdir()
    nbformat.write(notebook, folder / "notebooks" / f"{NAME}.ipynb")
    return book.build(folder, root / "book" / "html")


class Live(HTMLParser):
    """What of a page would run the payload."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.inside = tag
        for name, value in attrs:
            acts = name.startswith("on") or (value or "").strip().startswith("javascript:")
            if acts and "pwned" in (value or ""):
                self.found.append(f"<{tag} {name}={value}>")

    def handle_data(self, data: str) -> None:
        if self.inside == "script" and "pwned" in data:
            self.found.append(data)

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""


def test_no_page_would_run_what_stands_in_a_record_or_a_notebook(made: Path):
    pages = sorted(made.rglob("*.html"))
    assert {path.name: found for path in pages if (found := Live(path.read_text()).found)} == {}
    shown = [path.name for path in pages if "window.pwned" in path.read_text()]
    assert {"results.html", "yours.html", f"{NAME}.html"} <= set(shown)


def test_a_browser_runs_nothing_of_it(made: Path, tmp_path: Path):
    try:
        program = pdf.browser()
    except FileNotFoundError:
        pytest.skip("there is no browser of the Chromium family")
    with page(program, tmp_path) as opened:
        for path in sorted(made.rglob("*.html")):
            if "_static" in path.parts or path.name == "index.html":
                continue
            opened.visit(path.as_uri())
            assert opened.see("window.pwned === undefined"), path.name


@pytest.mark.parametrize("where", [
    ("notebook",), ("profile",), ("stages", 0, "name"), ("tasks", 0, "worker"),
    ("source", "commit"), ("machine", "cpu"), ("machine", "packages", "torch"),
    ("figures", 0, "csv"), ("metrics", 0, "unit")])
def test_markup_in_a_name_is_refused_with_the_place(tmp_path: Path, where: tuple[str | int, ...]):
    path = tmp_path / "record.json"
    record("text").write(path)
    data = inner = json.loads(path.read_text())
    for step in where[:-1]:
        inner = inner[step]
    inner[where[-1]] = "<b>"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=f"(?s)record.json.*{where[-1]}.*<b>"):
        Record.read(path)


def test_text_is_shown_as_it_is():
    assert plain("a *b* [c] | <d>\n`e`") == r"a \*b\* \[c\] \| &lt;d&gt; \`e\`"
    assert fenced("a ``` b").splitlines() == ["````text", "a ``` b", "````"]
