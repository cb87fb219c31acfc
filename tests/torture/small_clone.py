"""A small clone, what it makes when nothing happens, and whether it makes the same afterwards."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from clone import Clone

from lablog.record import Record
from lablog.runner import difference, figure_differences


class SmallClone:
    """A clone in miniature in `folder`, whose results, chapters to book, were made once."""

    def __init__(self, folder: Path) -> None:
        self.clone = Clone(folder / "clone")
        self.built = self.clone.root / "build" / "laptop"
        began = time.monotonic()
        whole = self.clone.make("reproduce")
        if whole.returncode:
            raise RuntimeError(f"the small clone makes no results: {whole.stderr}")
        self.seconds = time.monotonic() - began
        self.expected = folder / "expected"
        shutil.copytree(self.built, self.expected)

    def forget(self) -> None:
        """Remove all results, so that the next run makes them anew."""
        for made in (self.built, self.clone.root / "build" / "book"):
            shutil.rmtree(made, ignore_errors=True)

    def wrong_afterwards(self) -> str:
        """Make what is missing while nothing happens, and say how it differs, if it does."""
        again = self.clone.make("reproduce")
        if again.returncode:
            return f"the next run fails: {again.stderr.strip().splitlines()[-1:]}"
        names, expected = ({str(p.relative_to(folder)) for p in folder.rglob("*")}
                           for folder in (self.built, self.expected))
        if names != expected:
            return f"left behind or missing: {', '.join(sorted(names ^ expected)[:5])}"
        for path in sorted((self.expected / "records").glob("*.json")):
            name = path.relative_to(self.expected)
            if found := difference(Record.read(path), Record.read(self.built / name)):
                return f"{name} differs in {', '.join(found)}"
            figures = [folder / "figures" / path.stem for folder in (self.expected, self.built)]
            if figures[0].is_dir() and (found := figure_differences(*figures)):
                return f"figures differ: {', '.join(found)}"
        return ""
