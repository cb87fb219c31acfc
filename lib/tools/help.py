"""Lists what can be made: ``help.py MAKEFILE``.

In the Makefile ``target: ... ## text`` describes a target, and a line ``## NAME=... text`` an
option. Needs the standard library only.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path


def described(makefile: str) -> str:
    """The list: targets in order, then options."""
    targets = re.findall(r"(?m)^([a-z-]+):.*?## (.*)", makefile)
    options = re.findall(r"(?m)^## ([A-Z]+=(?:\"[^\"]*\"|\S+)) +(.*)", makefile)
    lines = [f"  make {name:21} {text}" for name, text in targets]
    return "\n".join([*lines, "", *(f"  {option:33} {text}" for option, text in options)])


if __name__ == "__main__":
    print(described(Path(sys.argv[1]).read_text()))
