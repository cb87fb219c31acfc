"""How figures look and how they are saved."""

from __future__ import annotations

import html
import io
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
from cycler import cycler
from matplotlib.figure import Figure

from lablog.files import atomic_write

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's palette for colour-blind readers, darkest first (jfly.uni-koeln.de, 2008)."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#7f7f7f"  # contrast above 3:1 on white and on the book's dark background
Drawn = tuple[Figure, pd.DataFrame]
"""A figure and the data drawn in it."""


def use_style() -> None:
    """Set matplotlib's defaults: readable in light and dark mode, identical bytes every time."""
    plt.close("all")
    mpl.rcParams.update({
        "figure.constrained_layout.use": True, "figure.dpi": 100, "font.size": 10,
        "savefig.transparent": True, "axes.grid": True, "grid.alpha": 0.3, "grid.color": GREY,
        "axes.prop_cycle": cycler(color=COLOURS), "axes.spines.top": False,
        "axes.spines.right": False, "axes.edgecolor": GREY, "axes.labelcolor": GREY,
        "axes.titlecolor": GREY, "axes.titlesize": 10, "text.color": GREY, "xtick.color": GREY,
        "ytick.color": GREY, "legend.frameon": False, "legend.fontsize": 9, "lines.markersize": 4,
        # Text as text keeps figures small and searchable; a fixed salt keeps their ids stable.
        "svg.fonttype": "none", "svg.hashsalt": "lablog",
    })


def save(figure: Figure, data: pd.DataFrame, folder: Path, name: str) -> tuple[Path, Path]:
    """Write ``name.svg`` and ``name.csv`` (the data drawn) into `folder`; returns both paths."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": "lablog"})
    plt.close(figure)
    svg = atomic_write(folder / f"{name}.svg", buffer.getvalue())
    csv = atomic_write(folder / f"{name}.csv", data.to_csv(index=False, lineterminator="\n"))
    return svg, csv


@dataclass(frozen=True)
class ShownFigure:
    """What a notebook displays for a figure: the picture, its caption, its origin, its data."""

    svg: str
    caption: str
    origin: str
    csv: str

    def _repr_html_(self) -> str:
        picture = self.svg[self.svg.index("<svg") :]
        caption = html.escape(self.caption)
        return (
            f'<figure class="lablog-figure">\n<div role="img" aria-label="{caption}">\n{picture}\n'
            f"</div>\n<figcaption>{caption}<br><small>{html.escape(self.origin)} · "
            f'<a href="{html.escape(self.csv)}" download>data (CSV)</a></small>'
            "</figcaption></figure>"
        )

    def __repr__(self) -> str:
        return f"{self.caption} [{self.origin}; data: {self.csv}]"
