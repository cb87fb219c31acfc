"""Text of others on a page that is written in Markdown: shown as it is, whatever it holds."""

from __future__ import annotations

import re
from html import escape

SPECIAL = re.compile(r"([\\`*_{}\[\]|~$!#])")


def plain(text: str) -> str:
    """Markdown that shows `text` on one line: neither its HTML nor its markup has an effect."""
    return SPECIAL.sub(r"\\\1", escape(" ".join(text.split()), quote=False))


def fenced(text: str) -> str:
    """Markdown that shows `text` in lines as they are; no run of backticks in it ends that."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}\n"
