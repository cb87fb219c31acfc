"""What a chapter of the book is given besides what its notebook holds.

One cell of parameters with the values of the run, the published answer at its head, links to the
glossary, folded code, and what can be downloaded at its end. Each function takes an executed
notebook and returns it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from typing import Any

import nbformat
from nbformat import NotebookNode

from lablog import glossary
from lablog.record import Record

OWN = "run"
"""Folder of the built book with the records and executed notebooks of this clone's run."""
GITHUB = re.compile(r"https://github\.com/([\w.-]+)/([\w.-]+?)(?:\.git|/)?")
PARAMETER = re.compile(r"(?P<head>(?P<name>\w+): [^=]+ = )(?P<value>.*?)(?P<tail>  # .*)?$")


class BookError(RuntimeError):
    """A book that was not built; the message says why and the remedy."""


def with_values(notebook: NotebookNode, parameters: Mapping[str, Any],
                profile: str) -> NotebookNode:
    """The chapter with one parameters cell: each line holds the value that the run had, and where
    that is not the notebook's own, the name of the profile and what it replaced."""
    def line(text: str) -> str:
        found = PARAMETER.match(text)
        if not found or found["name"] not in parameters:
            return text
        try:
            value, default = parameters[found["name"]], ast.literal_eval(found["value"])
        except SyntaxError as error:
            raise BookError(f"parameter {found['name']}: its default must stand on its line, "
                            f"and {found['value']!r} is no value") from error
        if value == default:
            return text
        return f"{found['head']}{value!r}{found['tail'] or '  #'} ({profile}; default: {default!r})"

    cells = []
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        if "parameters" in tags:
            cell.source = "\n".join(map(line, cell.source.splitlines()))
        if "injected-parameters" not in tags:
            cells.append(cell)
    notebook.cells = cells
    return notebook


def answered(notebook: NotebookNode, answer: str) -> NotebookNode:
    """The chapter with the published answer to its question behind its first cell."""
    text = f"```{{admonition}} What the published runs answer\n{answer.strip()}\n```"
    cell = nbformat.v4.new_markdown_cell(text, id=f"{notebook.cells[0].id}-answer")
    notebook.cells.insert(1, cell)
    return notebook


def folded(notebook: NotebookNode) -> NotebookNode:
    """The chapter with its code folded away, one click from being read."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            tags = cell.metadata.get("tags", [])
            cell.metadata["tags"] = [*tags, "hide-input"]
            if "parameters" in tags:
                cell.metadata["mystnb"] = {"code_prompt_show": "parameters of this run",
                                           "code_prompt_hide": "hide the parameters"}
    return notebook


def binder(config: Mapping[str, Any], name: str) -> str:
    """Where a chapter opens on Binder, if ``repository: url`` of the book's configuration says
    where the repository lies; else nothing. BookError for an address that Binder could not build.
    """
    url = (config.get("repository") or {}).get("url") or ""
    found = GITHUB.fullmatch(url)
    if url and not found:
        raise BookError(f"book/_config.yml: repository.url is {url!r}, expected "
                        "https://github.com/OWNER/NAME, or nothing")
    return (f"https://mybinder.org/v2/gh/{found[1]}/{found[2]}/HEAD"
            f"?labpath=notebooks%2F{name}.ipynb") if found else ""


def downloadable(notebook: NotebookNode, record: Record, elsewhere: str = "") -> NotebookNode:
    """The chapter with a line of what can be taken along, behind its last cell, and `elsewhere`,
    the address at which it can be run without an installation."""
    links = [f'<a href="../{OWN}/{record.notebook}.json" download>record (JSON)</a>']
    links += [f'<a href="../{figure.csv}" download>data of figure {figure.name} (CSV)</a>'
              for figure in record.figures]
    links.append(f'<a href="../{OWN}/{record.notebook}.ipynb" download>executed notebook</a>')
    run = f' · <a href="{elsewhere}">Open in Binder</a>' if elsewhere else ""
    text = f'<p class="lablog-downloads">Download: {", ".join(links)}{run}</p>'
    notebook.cells.append(
        nbformat.v4.new_markdown_cell(text, id=f"{notebook.cells[0].id}-downloads"))
    return notebook


def explained(notebook: NotebookNode, names: Sequence[str]) -> NotebookNode:
    """The chapter with links to the glossary where its terms first occur."""
    seen: set[str] = set()
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = glossary.linked(cell.source, names, seen)
    return notebook
