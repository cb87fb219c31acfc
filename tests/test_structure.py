"""The house rules: rooms, imports, environment variables, the form of the notebooks."""

import ast
import io
import os
import re
import subprocess
import tokenize
from graphlib import TopologicalSorter
from pathlib import Path

import jupytext
import jupytext.cli
import nbformat
import pytest

from lablog.files import repository
from lablog.profiles import declared_parameters, notebooks

ROOT = repository()
LIBRARY = sorted((ROOT / "lib" / "lablog").rglob("*.py"))
TOOLS = sorted((ROOT / "lib" / "tools").rglob("*.py"))
ROOMS = ("commitment", "cvfp", "arianna")
FAULTS = "defects"  # plants faults in all rooms; none knows of it
SHARED = ("text", "models")
CLUSTER = "cluster"  # chapters hand it tasks; the library knows only `lablog.tasks`
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))
VARIABLES = {
    ("run.py", "LABLOG_RUN"): "where the runner wants the results",
    ("runner.py", "LABLOG_RUN"): "tells the notebook's process the same",
    ("cluster/child.py", "OMP_NUM_THREADS"): "libraries that a task loads later read it",
    ("determinism.py", "CUBLAS_WORKSPACE_CONFIG"): "CUDA's own switch for repeatable products",
    ("models/llama_cpp.py", "LLAMA_CPP_LIB_PATH"): "the bindings' own way to name the library",
}
"""Every environment variable that the library touches, and why; none decides science."""


def relative(path: Path) -> str:
    lib = ROOT / "lib"
    library = path.is_relative_to(lib / "lablog")
    return str(path.relative_to(lib / "lablog" if library else lib))


def imported(path: Path) -> set[str]:
    """Dotted names of everything that a file imports, at any depth."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def tracked() -> list[Path]:
    shown = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if shown.returncode:
        pytest.skip("this is no git checkout")
    return [ROOT / name for name in shown.stdout.decode().split("\0") if name]


# --- the library ----------------------------------------------------------------------------------


def modules_imported() -> dict[str, set[str]]:
    """For each module of the library, the modules of it that it imports, packages left out."""
    files = {"lablog." + relative(path).removesuffix(".py").replace("/", "."): path
             for path in LIBRARY if path.stem != "__init__"}
    return {name: imported(path) & set(files) for name, path in files.items()}


def test_no_module_imports_one_that_imports_it():
    """Neither at run time nor for the type checker alone."""
    list(TopologicalSorter(modules_imported()).static_order())  # else it raises, with the circle


def test_no_import_runs_upward():
    """A room imports no other, what rooms share imports no room, and the modules beside the rooms
    import none of what is inside a folder; the tools stand above all rooms."""
    below = {room: {room, *SHARED, ""} for room in ROOMS} | {
        shared: {*SHARED, ""} for shared in SHARED} | {
        "": {""}, CLUSTER: {CLUSTER, ""}, FAULTS: {*ROOMS, *SHARED, "", FAULTS}}

    def folder(module: str) -> str:
        return module.split(".")[1] if module.count(".") > 1 else ""

    for module, found in modules_imported().items():
        upward = {name for name in found if folder(name) not in below[folder(module)]}
        assert not upward, f"{module} imports {upward}"


def test_the_library_imports_no_tool():
    for path in LIBRARY:
        found = [name for name in imported(path) if name.split(".")[0] == "tools"]
        assert not found, f"{relative(path)} imports {found}"


@pytest.mark.parametrize("path", LIBRARY + TOOLS, ids=relative)
def test_no_import_is_relative(path: Path):
    """Staleness is read from absolute imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"line {node.lineno}"


def test_the_library_touches_no_environment_variable_but_the_listed_ones():
    found = set()
    for path in LIBRARY:
        tree = ast.parse(path.read_text())
        values = {
            target.id: node.value.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
            for target in node.targets if isinstance(target, ast.Name)
        }
        uses = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute)
                and n.attr in ("environ", "environb", "getenv", "putenv", "unsetenv")]
        assert not any(n.endswith(("os.environ", "os.getenv")) for n in imported(path))
        parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        for use in uses:
            above = parents[use]
            if isinstance(above, ast.Attribute):  # os.environ.get(...)
                above = parents[above]
            argument = above.slice if isinstance(above, ast.Subscript) else above.args[0]
            if isinstance(argument, ast.Name):
                name = values.get(argument.id, {"RUN_VARIABLE": "LABLOG_RUN"}.get(argument.id))
            else:
                name = argument.value
            found.add((relative(path), name))
    assert found == set(VARIABLES)


def test_the_library_names_no_folder_of_readers():
    """The library does not read notebooks or the book to compute; those who do are listed."""
    for path in LIBRARY:
        if relative(path) in ("profiles.py", "book.py", "claims.py"):
            continue
        strings = {n.value for n in ast.walk(ast.parse(path.read_text()))
                   if isinstance(n, ast.Constant) and isinstance(n.value, str)}
        parts = {part for s in strings if re.fullmatch(r"[\w./-]+", s) for part in s.split("/")[:1]}
        allowed = relative(path) in ("runner.py", "layout.py")  # a command, and where it is built
        assert "book" not in parts or allowed, relative(path)


def test_one_module_knows_where_generated_things_lie():
    """Examples of commands stand in texts. What runs before there is an environment cannot ask."""
    alone = [path for path in TOOLS
             if not any(name.startswith("lablog") for name in imported(path))]
    for path in {*LIBRARY, *TOOLS} - {*alone, ROOT / "lib" / "lablog" / "layout.py"}:
        strings = {n.value for n in ast.walk(ast.parse(path.read_text()))
                   if isinstance(n, ast.Constant) and isinstance(n.value, str)}
        folders = {s for s in strings if re.fullmatch(r"build/[\w./-]+|build", s)}
        command = {"build"} if path.name in ("book.py", "pdf.py") else set()  # of jupyter-book
        assert folders <= command, path


# --- the notebooks --------------------------------------------------------------------------------


def by_name(path: Path) -> str:
    return path.stem


def cells(path: Path, kind: str) -> list[str]:
    return [cell.source for cell in jupytext.read(path).cells if cell.cell_type == kind]


def lines(text: str) -> int:
    return sum(bool(line.strip()) for line in text.splitlines())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=by_name)
def test_a_displayed_formula_is_a_paragraph_of_its_own(path: Path):
    """Inside another it is shown with its dollar signs."""
    for text in cells(path, "markdown"):
        for paragraph in text.split("\n\n"):
            if "$$" in paragraph:
                assert paragraph.strip()[:2] == paragraph.strip()[-2:] == "$$", paragraph


def test_there_are_notebooks():
    assert [path.stem for path in NOTEBOOKS] == notebooks()
    assert len(NOTEBOOKS) >= 2


@pytest.mark.parametrize("path", NOTEBOOKS, ids=by_name)
def test_every_parameter_has_a_type_a_value_and_a_comment(path: Path):
    declared = declared_parameters(path)
    (cell,) = (c.source for c in jupytext.read(path).cells
               if "parameters" in c.metadata.get("tags", ()))
    comments = {t.start[0]: t.string for t in tokenize.generate_tokens(io.StringIO(cell).readline)
                if t.type == tokenize.COMMENT}
    for statement in ast.parse(cell).body:
        assert isinstance(statement, ast.AnnAssign)
        comment = comments.get(statement.end_lineno, "")
        assert len(comment.strip("# ")) > 5, f"{ast.unparse(statement)} has no comment"
    assert len(declared) == len(ast.parse(cell).body)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=by_name)
def test_cells_are_short_and_prose_is_at_least_as_long_as_code(path: Path):
    code, prose = cells(path, "code"), cells(path, "markdown")
    # What `run.say` says is prose that takes its numbers from the record.
    said = re.compile(r'(?<=run\.say\(""").*?(?=""")', re.DOTALL)
    prose += said.findall("\n".join(code))
    code = [said.sub("", cell) for cell in code]
    # Of parameters, one scalar a line, there may be as many as there are.
    parameters = set(declared_parameters(path))
    code = [cell for cell in code if parameters != set(re.findall(r"(?m)^(\w+): ", cell))]
    for cell in code:
        assert lines(cell) <= 20, cell
    assert sum(map(lines, prose)) >= sum(map(lines, code))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=by_name)
def test_a_notebook_opens_its_own_record_and_closes_it_last(path: Path):
    code = cells(path, "code")
    begins = re.findall(r'begin\("(\w+)", globals\(\)\)', "\n".join(code))
    assert begins == [path.stem]
    assert "run.finish(" in code[-1]
    assert "run.finish(" not in "\n".join(code[:-1])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=by_name)
def test_a_notebook_says_what_it_does_not_show(path: Path):
    assert cells(path, "markdown")[0].startswith("# ")
    assert "## What this does not show" in cells(path, "markdown")[-1]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=by_name)
def test_every_parameter_of_a_notebook_is_used(path: Path):
    used = {node.id for cell in cells(path, "code") for node in ast.walk(ast.parse(cell))
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    assert set(declared_parameters(path)) <= used


def test_no_executed_notebook_and_nothing_generated_is_tracked():
    for path in tracked():
        name = path.relative_to(ROOT)
        assert path.suffix not in (".ipynb", ".gguf", ".safetensors", ".bin", ".pyc"), name
        assert name.parts[0] != "build", name


@pytest.fixture
def paired(path: Path, tmp_path: Path) -> Path:
    """A copy of a source with its pair, as `make lab` makes it."""
    (tmp_path / "jupytext.toml").write_text((ROOT / "jupytext.toml").read_text())
    (tmp_path / "notebooks").mkdir()
    copy = tmp_path / "notebooks" / path.name
    copy.write_text(path.read_text())
    assert sync(copy) == 0
    assert copy.with_suffix(".ipynb").is_file()
    return copy


def sync(path: Path) -> int:
    return jupytext.cli.jupytext(["--quiet", "--sync", str(path)])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=by_name)
def test_pairing_changes_nothing_and_adds_no_version(path: Path, paired: Path):
    assert sync(paired) == 0
    assert paired.read_text() == path.read_text()
    assert "jupytext_version" not in path.read_text()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=by_name)
def test_an_edit_in_jupyterlab_changes_nothing_but_the_edited_cell(path: Path, paired: Path):
    pair = paired.with_suffix(".ipynb")
    notebook = nbformat.read(pair, as_version=4)
    notebook.metadata["kernelspec"] = {
        "display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3",
    }
    notebook.metadata["language_info"] = {"name": "python", "version": "3.11.9"}
    ids = [cell.id for cell in notebook.cells]
    notebook.cells[-1].source += "\nOne line more."
    nbformat.write(notebook, pair)
    later = paired.stat().st_mtime + 10
    os.utime(pair, (later, later))
    assert sync(pair) == 0
    assert paired.read_text() == path.read_text() + "# One line more.\n"
    paired.write_text(path.read_text() + "# Another line.\n")
    os.utime(paired, (later + 10, later + 10))
    assert sync(paired) == 0
    notebook = nbformat.read(pair, as_version=4)
    assert notebook.cells[-1].source.endswith("Another line.")
    assert [cell.id for cell in notebook.cells] == ids
