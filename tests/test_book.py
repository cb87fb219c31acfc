"""The book, from a tiny result folder: strict, whole without a network, never half replaced."""

import html as escaping
import re
import shutil
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import pytest
from clone import contents
from filelock import FileLock, Timeout

from lablog import book, chapter_page, claims, figures, layout, speed_page
from lablog.book import BookError, models_page
from lablog.model_list import listed
from lablog.profiles import notebooks
from lablog.provenance import CloneState, Machine
from lablog.record import FigureFile, Metric, Record, ReportText
from lablog.report import ReportError

REPOSITORY = Path(__file__).parents[1]
NAME = "01_alpha"
REPORT = ReportText(en="Result:\n- value 50.0%", ja="結果:\n- 値 50.0%")


def write_results(folder: Path, text: str = "Some prose with $x^2$.") -> Path:
    """One executed notebook with a figure, and one without, as the runner leaves them."""
    figures.use_style()
    axes = plt.figure().subplots()
    axes.plot([0, 1])
    svg, csv = figures.save(
        axes.figure, pd.DataFrame({"x": [0, 1]}), folder / "figures" / NAME, "line"
    )
    shown = figures.ShownFigure(
        svg.read_text(), "A line of \"two\" <points>.", f"notebook {NAME} · profile tiny",
        f"../figures/{NAME}/{csv.name}",
    )
    output = nbformat.v4.new_output(
        "execute_result", {"text/html": shown._repr_html_(), "text/plain": repr(shown)},
        execution_count=1,
    )
    cells = [
        nbformat.v4.new_markdown_cell(f"# Alpha\n\n{text}"),
        nbformat.v4.new_code_cell("show()", execution_count=1, outputs=[output]),
    ]
    entry = FigureFile(name="line", svg=f"figures/{NAME}/line.svg",
                       csv=f"figures/{NAME}/line.csv", caption="A line.")
    write_notebook(folder, NAME, cells, (entry,))
    write_notebook(folder, "02_beta", [nbformat.v4.new_markdown_cell("# Beta\n\nNo figure.")], ())
    return folder


def write_notebook(folder: Path, name: str, cells: list, entries: tuple[FigureFile, ...]) -> None:
    notebook = nbformat.v4.new_notebook(cells=cells)
    notebook.metadata["kernelspec"] = {
        "name": "python3", "language": "python", "display_name": "Python 3",
    }
    for index, cell in enumerate(notebook.cells):
        cell["id"] = f"{name[:2]}-{index:03d}"
    (folder / "notebooks").mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, folder / "notebooks" / f"{name}.ipynb")
    Record(
        notebook=name, profile="tiny", status="ok", parameters={}, seeds=(1, 2), report=REPORT,
        started=datetime(2026, 1, 1, tzinfo=UTC), seconds=12.0, peak_memory_bytes=300 << 20,
        source=CloneState(
            commit="abcdef0123456789", dirty=True, library_sha256="", patch_sha256=""),
        machine=Machine(python="3.11.7", platform="Linux", cpu="Some CPU", threads=2, device="cpu",
                        packages={"torch": "2.13.0"}),
        figures=entries, metrics=(Metric(name="value", value=0.5, unit="fraction"),),
    ).write(folder / "records" / f"{name}.json")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folder of results and the book that was built from it, with the project's own pages."""
    root = tmp_path_factory.mktemp("book")
    folder = write_results(root / "tiny")
    target = book.build(folder, root / "book" / "html")
    return folder, target


class Links(HTMLParser):
    """What a page loads by itself, and what it links."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.linked: list[str] = []
        self.ids: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.ids |= {values["id"]} if "id" in values else set()
        for name in ("src", "data", "poster"):
            if name in values and tag in ("script", "img", "iframe", "source", "object", "video"):
                self.loaded.append(values[name])
        if tag == "link" and "icon stylesheet preload preconnect".find(values.get("rel", "")) >= 0:
            self.loaded.append(values.get("href", ""))
        if tag == "a" and "href" in values:
            self.linked.append(values["href"])


def pages(html: Path) -> list[Path]:
    """All pages (the theme leaves templates in _static)."""
    return sorted(p for p in html.rglob("*.html") if "_static" not in p.relative_to(html).parts)


def test_the_book_has_chapters_results_and_instructions(made: tuple[Path, Path]):
    html = made[1]
    for name in ("index.html", "intro.html", "results.html", "claims.html", "speed.html",
                 "reproduce.html", f"notebooks/{NAME}.html", "notebooks/02_beta.html"):
        assert (html / name).is_file(), name
    chapter = (html / "notebooks" / f"{NAME}.html").read_text()
    assert "Alpha" in chapter
    assert "notebook 01_alpha · profile tiny" in chapter  # the figure's origin
    results = (html / "results.html").read_text()
    for piece in ("value 50.0%", "値 50.0%", "abcdef0123", "with uncommitted changes", "12 s",
                  "300 MiB", "Some CPU", "2 threads", "3.11.7", "seeds 1, 2"):
        assert piece in results, piece


def test_what_the_project_published_is_told_apart_from_the_clones_own(made: tuple[Path, Path]):
    """Each published record's report with its commit and the pictures beside it; not this run's."""
    page = (made[1] / "published.html").read_text().replace("\u2019", "'")  # typeset apostrophes
    published = sorted((REPOSITORY / "book" / "records").glob("*/*.json"))
    assert published
    for path in published:
        record = Record.read(path)
        assert f"{record.notebook}, profile {record.profile}" in page
        assert record.source.commit[:10] in page
        beside = [figure for figure in record.figures
                  if (path.parent / f"{path.stem}.{figure.name}.svg").is_file()]
        assert all(escaping.escape(figure.caption[:30], quote=False) in page for figure in beside)
    assert "abcdef0123" not in page


def test_the_page_of_speed_shows_every_measure_its_target_and_the_picture(
    made: tuple[Path, Path]
):
    html = made[1]
    text = (html / "speed.html").read_text()
    record = book.latest(layout.benchmark())
    for metric in record.metrics:
        assert metric.name in text
    assert record.source.commit[:10] in text
    assert "at least 0.70" in text
    assert any("tokens_per_s" in source for source in Links(text).loaded)


def test_the_picture_of_speed_has_a_bar_for_each_mode():
    record = book.latest(layout.benchmark())
    modes = {f"arianna.{work}.{mode}.tokens_per_s": value for work, mode, value in (
        ("train", "f32", 2000.0), ("train", "bf16_compiled", 4000.0), ("generate", "pytorch", 100.0)
    )}
    metrics = [Metric(name=name, value=value, unit="tokens/s") for name, value in modes.items()]
    figures.use_style()
    drawn, data = speed_page.rates(record.model_copy(update={"metrics": tuple(metrics)}))
    assert [len(axes.patches) for axes in drawn.axes] == [2, 1]
    assert [bar.get_width() for axes in drawn.axes for bar in axes.patches] == [*modes.values()]
    assert data["mode"].tolist() == ["f32", "bf16 compiled", "pytorch"]
    plt.close(drawn)


PARAMETERS = """# Training
steps: int = 24  # optimiser steps
seeds: list[int] = [1, 2]  # one training each
rate: float = 3e-3  # peak; a "quoted" word
data: str = \"\"  # a file; empty: none
"""


def test_a_chapter_has_one_cell_of_parameters_with_the_values_of_the_run():
    tagged = [nbformat.v4.new_code_cell(text, metadata={"tags": [tag]}) for text, tag in (
        (PARAMETERS, "parameters"), ("steps = 900", "injected-parameters"))]
    notebook = nbformat.v4.new_notebook(cells=[*tagged, nbformat.v4.new_code_cell("x = 1")])
    values = {"steps": 900, "seeds": [1, 2], "rate": 3e-3, "data": "a.csv"}
    told = chapter_page.with_values(notebook, values, "laptop")
    assert [cell.source for cell in told.cells[1:]] == ["x = 1"]
    assert told.cells[0].source.splitlines() == [
        "# Training", "steps: int = 900  # optimiser steps (laptop; default: 24)",
        "seeds: list[int] = [1, 2]  # one training each",
        'rate: float = 3e-3  # peak; a "quoted" word',
        "data: str = 'a.csv'  # a file; empty: none (laptop; default: '')"]


def test_a_chapter_begins_with_what_was_published():
    cells = [nbformat.v4.new_markdown_cell(text, id=f"01-{n}") for n, text in enumerate("ab")]
    told = chapter_page.answered(nbformat.v4.new_notebook(cells=cells), "Yes: 79%.\n")
    assert [cell.source for cell in told.cells] == [
        "a", "```{admonition} What the published runs answer\nYes: 79%.\n```", "b"]
    nbformat.validate(told)


def test_every_chapter_has_an_opening_whose_numbers_are_published():
    records = claims.read_records(REPOSITORY / "book" / "records")
    for name in notebooks():
        text = (REPOSITORY / "book" / "openings" / f"{name}.md").read_text()
        assert len(book.CITED.findall(text)) >= 3
        assert "{" not in book.cite(text, records)


def published(*metrics: Metric) -> dict[str, dict[str, Record]]:
    record = Record.read(next((REPOSITORY / "book" / "records" / "laptop").glob("04*.json")))
    return {"laptop": {"04_x": record.model_copy(update={"metrics": metrics})}}


def test_pages_cite_numbers_of_published_records():
    records = published(Metric.of("a.b-c", 0.5, "fraction", n=4), Metric.of("r", 1.25, "ratio"))
    text = book.cite("x {laptop/04_x:a.b-c:value} y {laptop/04_x:r:interval} {claims:all} "
                     "{cite}`key` {download}`a <b>`", records)
    assert text == "x 50.0% y 1.25 45 {cite}`key` {download}`a <b>`"


@pytest.mark.parametrize("field", [
    "{full/04_x:r:value}", "{laptop/05_x:r:value}", "{laptop/04_x:s:value}", "{claims:settled}"])
def test_a_page_that_cites_what_is_not_there_is_refused_by_name(field: str):
    with pytest.raises(BookError, match="a page cites " + re.escape(field)):
        book.cite(f"x {field}", published(Metric.of("r", 1.0, "")))


@pytest.mark.parametrize("field", ["{laptop/04_x:r}", "{claims:Reproduced}", "{claims}"])
def test_a_citation_that_is_not_well_formed_is_refused(field: str):
    with pytest.raises(BookError, match="a page cites " + re.escape(field) + ": expected"):
        book.cite(f"x {field}", published(Metric.of("r", 1.0, "")))


def test_every_number_of_the_front_page_is_cited(made: tuple[Path, Path]):
    """None is typed: what is left of digits are years, sizes and settings of the logs."""
    for name in ("intro", "advice"):
        source = (REPOSITORY / "book" / f"{name}.md").read_text()
        assert len(book.CITED.findall(source)) >= 15
        page = (made[1] / f"{name}.html").read_text()
        assert not book.CITED.search(page)
        typed = re.findall(r"\d+\.\d+ ?%|\[\d", book.CITED.sub("", source))
        assert not typed


def test_every_claim_is_in_the_book_and_leads_to_its_record(made: tuple[Path, Path]):
    html = made[1]
    page = (html / "claims.html").read_text()
    assert all(f'<tr id="{row.id}"' in page for row in claims.load_claims())
    linked = set(re.findall(r'href="(records/[^"]+)"', page))
    assert len(linked) > 4
    pictures = {link for link in linked if link.endswith(".svg")}
    assert pictures
    assert all((html / link).is_file() for link in pictures)
    assert all(Record.read(html / link).metrics for link in linked - pictures)
    assert "_static/claims.js" in page
    assert list((html / "_downloads").rglob("claims.csv"))


def test_every_measure_of_speed_is_said_in_words():
    published = book.latest(layout.benchmark())
    said = [speed_page.meaning(metric.name) for metric in published.metrics]
    assert len(set(said)) == len(said), "two measures are told apart"
    assert all(words not in (metric.name for metric in published.metrics) for words in said)
    assert speed_page.meaning("cvfp.rollout.shooting_over_sequential.true_pass.25000").endswith(
        "the loop's, 25,000 tokens")
    assert speed_page.meaning("new.measure") == "new.measure"


def test_a_clones_own_speed_is_shown_before_the_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    published = book.latest(layout.benchmark())
    for module in (book, layout):
        monkeypatch.setattr(module, "repository", lambda: tmp_path)
    assert book.latest(layout.benchmark()) is None
    assert "Nothing has been measured" in speed_page.page(None, tmp_path)
    for place, seconds in (("book/records", 1.0), ("build", 2.0)):
        record = published.model_copy(update={"seconds": seconds})
        (tmp_path / place).mkdir(parents=True)
        record.write(tmp_path / place / "bench.json")
        assert book.latest(layout.benchmark()).seconds == seconds


def test_a_chapter_links_its_record_its_notebook_and_the_data_of_its_figures(
    made: tuple[Path, Path],
):
    folder, html = made
    page = html / "notebooks" / f"{NAME}.html"
    linked = Links(page.read_text()).linked
    assert linked.count(f"../figures/{NAME}/line.csv") == 2  # under the figure, and at the end
    for link, made_from in ((f"../figures/{NAME}/line.csv", folder / "figures" / NAME / "line.csv"),
                            (f"../run/{NAME}.json", folder / "records" / f"{NAME}.json"),
                            (f"../run/{NAME}.ipynb", folder / "notebooks" / f"{NAME}.ipynb")):
        assert link in linked
        target = (page.parent / unquote(link)).resolve()
        assert target.read_bytes() == made_from.read_bytes()
        assert html.resolve() in target.parents


def test_every_local_link_leads_somewhere(made: tuple[Path, Path]):
    for page in pages(made[1]):
        links = Links(page.read_text())
        for link in links.linked + links.loaded:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or not parts.path:
                continue
            target = page.parent / unquote(parts.path)
            assert target.exists(), f"{page.name}: {link}"


def test_no_page_loads_anything_from_another_host(made: tuple[Path, Path]):
    html = made[1]
    for page in pages(html):
        for source in Links(page.read_text()).loaded:
            assert not urlsplit(source).netloc, f"{page.name} loads {source}"
        for found in re.findall(r"(?:@import\s+|url\()['\"]?((?:https?:)?//[^'\")]+)",
                                page.read_text()):
            pytest.fail(f"{page.name} loads {found}")
    for sheet in html.rglob("*.css"):
        foreign = re.findall(r"(?:@import\s+|url\()\s*['\"]?((?:https?:)?//[^'\")\s]+)",
                             sheet.read_text())
        assert not foreign, f"{sheet.name} loads {foreign}"


def test_formulas_and_search_are_local(made: tuple[Path, Path]):
    html = made[1]
    chapter = html / "notebooks" / f"{NAME}.html"
    scripts = [s for s in Links(chapter.read_text()).loaded if "mathjax" in s.lower()]
    assert scripts
    for script in scripts:
        assert (chapter.parent / urlsplit(script).path).is_file()
    index = (html / "searchindex.js").read_text()
    for page in ("intro", "results", "reproduce", f"notebooks/{NAME}"):
        assert f'"{page}"' in index


def test_an_unchanged_book_is_not_built_again(
    made: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
):
    folder, html = made
    monkeypatch.setattr(book.subprocess, "run", lambda *_, **__: pytest.fail("built again"))
    assert book.build(folder, html) == html


def test_one_book_is_built_at_a_time(copy: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch):
    """Runs of two profiles at once share the place of the book."""
    folder, html = copy
    (html / book.INPUTS).unlink()
    before = contents(html)
    lock = FileLock(html.parent / ".lock", timeout=0)

    def program(*_: object, **__: object) -> None:
        with pytest.raises(Timeout):
            lock.acquire()
        raise KeyboardInterrupt

    monkeypatch.setattr(book.subprocess, "run", program)
    with pytest.raises(KeyboardInterrupt):
        book.build(folder, html)
    with lock:  # it was given back
        assert contents(html) == before


def test_a_record_that_changed_while_another_book_was_built_is_shown(
    copy: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
):
    """Else pages of old numbers would be kept under the hash of the new ones."""
    folder, html = copy
    (html / book.INPUTS).unlink()
    path = next((folder / "records").glob("*.json"))

    class Waiting(FileLock):
        def __enter__(self):
            found = super().__enter__()
            path.write_text(path.read_text().replace('"status": "ok"', '"status": "failed"'))
            return found

    shown = []

    def results_page(records):
        shown.extend(record.status for record in records)
        raise KeyboardInterrupt

    monkeypatch.setattr(book, "FileLock", Waiting)
    monkeypatch.setattr(book, "results_page", results_page)
    with pytest.raises(KeyboardInterrupt):
        book.build(folder, html)
    assert "failed" in shown


def test_results_without_any_record_are_refused(tmp_path: Path):
    with pytest.raises(BookError, match="tiny holds no results: run `make reproduce` first"):
        book.build(tmp_path / "tiny", tmp_path / "book" / "html")


@pytest.fixture
def copy(made: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """A copy of results and book, for tests that break something."""
    shutil.copytree(made[0], tmp_path / "tiny")
    shutil.copytree(made[1], tmp_path / "book" / "html")
    return tmp_path / "tiny", tmp_path / "book" / "html"


def test_a_warning_is_an_error_and_the_former_book_stays(copy: tuple[Path, Path]):
    folder, html = copy
    before = contents(html)
    path = folder / "notebooks" / f"{NAME}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[0].source += "\n\nA [broken link](nowhere.md)."
    nbformat.write(notebook, path)
    with pytest.raises(BookError, match=r"the book was not built:(?s:.*)nowhere"):
        book.build(folder, html)
    assert contents(html) == before


def test_a_report_that_judges_makes_the_book_fail(copy: tuple[Path, Path]):
    folder, html = copy
    before = contents(html)
    path = folder / "records" / "02_beta.json"
    record = Record.read(path)
    judging = ReportText(en="Result: EXCELLENT", ja="結果は良好")
    record.model_copy(update={"report": judging}).write(path)
    with pytest.raises(ReportError, match="EXCELLENT"):
        book.build(folder, html)
    assert contents(html) == before


def test_a_chapter_that_judges_makes_the_book_fail(copy: tuple[Path, Path]):
    folder, html = copy
    before = contents(html)
    path = folder / "notebooks" / f"{NAME}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[0].source += "\n\nConvergence was EXCELLENT."
    nbformat.write(notebook, path)
    with pytest.raises(ReportError, match="EXCELLENT"):
        book.build(folder, html)
    assert contents(html) == before


def test_the_models_of_others_are_told_with_maker_licence_and_hash():
    page = models_page()
    for package in listed().values():
        for told in (package.name, package.by, package.licence, package.package):
            assert told in page
        for name, part in package.files.items():
            assert f"`{package.package}:{name}`" in page
            assert part.sha256 in page


def test_no_page_has_scripts_for_running_cells_elsewhere(made: tuple[Path, Path]):
    """Twice in one page, their constants are an error in the browser's console."""
    for page in pages(made[1]):
        text = page.read_text()
        assert "THEBE_JS_URL" not in text
        assert "sphinx-thebe.js" not in text


def test_what_a_screen_reader_takes_for_one_picture_holds_no_link():
    shown = figures.ShownFigure("<?xml?><svg><a/></svg>", "Nine < ten", "here", "a.csv")
    picture, rest = shown._repr_html_().split("</div>")
    assert 'role="img" aria-label="Nine &lt; ten"' in picture
    assert "<svg>" in picture
    assert "<figcaption>" in rest
    assert 'href="a.csv"' in rest


def test_code_is_folded_and_can_be_unfolded_without_a_script(made: tuple[Path, Path]):
    text = (made[1] / "notebooks" / f"{NAME}.html").read_text()
    cells = text.count('class="cell_input')
    folded = re.findall(r'<details class="[^"]*hide above-input">\s*<summary[^>]*>(.*?)</summary>',
                        text, re.DOTALL)
    assert len(folded) == cells == 1
    assert "code" in folded[0]
    assert "_static/code.js" in text


def test_the_parameters_say_what_they_are_when_folded():
    cells = [nbformat.v4.new_code_cell("k = 1", metadata={"tags": ["parameters"]}),
             nbformat.v4.new_code_cell("print(k)")]
    first, second = chapter_page.folded(nbformat.v4.new_notebook(cells=cells)).cells
    assert first.metadata["tags"] == ["parameters", "hide-input"]
    assert first.metadata["mystnb"]["code_prompt_show"] == "parameters of this run"
    assert second.metadata["tags"] == ["hide-input"]
    assert "mystnb" not in second.metadata


@pytest.mark.parametrize("url", ["https://github.com/a-b/c.d", "https://github.com/a-b/c.d.git",
                                 "https://github.com/a-b/c.d/"])
def test_a_repository_url_given_once_makes_chapters_open_on_binder(url: str):
    config = {"repository": {"url": url}}
    address = chapter_page.binder(config, NAME)
    assert address == ("https://mybinder.org/v2/gh/a-b/c.d/HEAD?labpath=notebooks%2F"
                       f"{NAME}.ipynb")
    record = Record.read(REPOSITORY / "book" / "records" / "laptop" / "07_defects.json")
    cells = [nbformat.v4.new_markdown_cell("# A", id="a")]
    chapter = nbformat.v4.new_notebook(cells=cells)
    last = chapter_page.downloadable(chapter, record, address).cells[-1]
    assert f'<a href="{address}">Open in Binder</a>' in last.source


def test_without_a_url_or_with_a_wrong_one():
    for config in ({}, {"repository": None}, {"repository": {"url": ""}}):
        assert chapter_page.binder(config, NAME) == ""
    with pytest.raises(BookError, match=r"expected https://github\.com/OWNER/NAME"):
        chapter_page.binder({"repository": {"url": "https://example.org/x"}}, NAME)
