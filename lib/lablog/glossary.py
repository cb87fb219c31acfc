"""Links from the prose of the book's chapters to its glossary: a term where it first occurs."""

from __future__ import annotations

import re
from collections.abc import Collection

BLOCK = re.compile(r"```\{glossary\}\n(.*?)```", re.DOTALL)
APART = re.compile(
    r"(\$\$.*?\$\$|\$[^$]*\$|(?:\{\w+\})?`[^`]*`|!?\[[^\]]*\]\([^)]*\)|<[^>]*>|^#[^\n]*|^\|[^\n]*)",
    re.DOTALL | re.MULTILINE)
"""What is no prose: formulas, code, roles, links, tags, headings, tables."""
WORDS = re.compile(r"[A-Za-z][A-Za-z0-9-]+( [A-Za-z0-9-]+)*")


def terms(page: str) -> list[str]:
    """The terms of a glossary page, as they stand there."""
    return [line for block in BLOCK.findall(page) for line in block.splitlines()
            if line and not line[0].isspace()]


def linked(text: str, names: Collection[str], seen: set[str]) -> str:
    """Markdown prose in which the first occurrence of every name that is not in `seen` yet is a
    link to the glossary; `seen` then has it.

    Names that are no words are symbols, which stand in formulas, and are left alone.
    """
    for name in sorted(set(names) - seen, key=len, reverse=True):  # "prior" after "prior cells"
        if not WORDS.fullmatch(name):
            continue
        words = r"\s+".join(name.split())
        found = re.compile(rf"(?<![\w-]){words}s?(?![\w-])", re.IGNORECASE)
        parts = APART.split(text)
        for i in range(0, len(parts), 2):  # between them stands what is no prose
            match = found.search(parts[i])
            if match:
                link = f"{{term}}`{' '.join(match[0].split())} <{name}>`"
                parts[i] = parts[i][:match.start()] + link + parts[i][match.end():]
                text = "".join(parts)
                seen.add(name)
                break
    return text
