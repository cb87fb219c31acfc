"""Progress bars that can be read on a terminal and in a log."""

from __future__ import annotations

import sys

from tqdm import tqdm


def progress(total: int, description: str, unit: str, done: int = 0, show: bool = True) -> tqdm:
    """A bar with rate and remaining time: redrawn on a terminal, else a line every few seconds."""
    if sys.stderr.isatty() or not show:
        return tqdm(total=total, initial=done, desc=description, unit=unit, disable=not show)
    # A carriage return redraws the line on a terminal and is unreadable in a log.
    layout = "{l_bar}{n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]\n"
    return tqdm(total=total, initial=done, desc=description, unit=unit, mininterval=10,
                maxinterval=30, bar_format=layout)
