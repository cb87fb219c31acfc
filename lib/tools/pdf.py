"""The built book as one PDF: ``python -m tools.pdf``, after ``make book``.

Sphinx puts all pages into one; a browser without a window prints it. LaTeX, the other way, would
need gigabytes of packages, and would not know the HTML of figures and of the table of claims.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from lablog import layout

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome",
            "microsoft-edge")


def browser() -> str:
    """A browser of the Chromium family; FileNotFoundError names what may be installed."""
    for name in BROWSERS:
        if found := shutil.which(name):
            return found
    raise FileNotFoundError("a PDF is printed by a browser of the Chromium family, and none is "
                            f"here ({', '.join(BROWSERS)}): install one, on Debian `chromium`")


def pdf(source: Path, target: Path) -> Path:
    """Print the book whose sources are in `source`; RuntimeError with the output of what failed."""
    program, work = browser(), target.parent / "single"
    shutil.rmtree(work, ignore_errors=True)
    single = str(Path(sys.executable).with_name("jupyter-book"))
    page = work / "_build" / "singlehtml" / "intro.html"
    partial = target.with_suffix(".part.pdf")
    for made, command in (
        (page, [single, "build", str(source), "--path-output", str(work), "--builder",
                "singlehtml"]),
        # The time budget lets formulas be set before the page is printed.
        (partial, [program, "--headless=new", "--no-sandbox", "--no-pdf-header-footer",
                   "--virtual-time-budget=20000", f"--print-to-pdf={partial}", page.as_uri()]),
    ):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                              check=False)
        if done.returncode or not made.is_file():
            raise RuntimeError(f"{Path(command[0]).name} made no {made.name}:\n"
                               f"{done.stdout[-4000:]}")
    partial.replace(target)
    shutil.rmtree(work)
    return target


def main() -> int:
    """Command line; returns 0, or 2 with the error."""
    folder = layout.book().parent
    try:
        print(f"book: {pdf(folder / 'source', folder / 'book.pdf')}")
    except (OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
