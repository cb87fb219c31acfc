"""Copies what the project publishes into book/records/: ``publish.py PROFILE``.

A profile's records, the figures below, and the record of speed. Needs the standard library only.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

SHOWN = {
    "02_lambda_calibration": ("heat",),
    "03_qlora_commitment": ("training", "arms", "kinds", "persistence", "ablations", "capacity"),
}
"""Figures that the README and the page of published results show, by notebook."""


def main() -> None:
    """Copy; exits with the remedy when the profile has no record."""
    profile = sys.argv[1]
    source, target = Path("build", profile), Path("book", "records", profile)
    records = sorted((source / "records").glob("*.json"))
    if not records:
        sys.exit(f"error: {source}/records holds no record: "
                 f"run `make reproduce PROFILE={profile}` first")
    target.mkdir(parents=True, exist_ok=True)
    for record in records:
        shutil.copy(record, target)
    figures = [source / "figures" / notebook / f"{name}.svg"
               for notebook, names in SHOWN.items() for name in names]
    for figure in filter(Path.exists, figures):
        shutil.copy(figure, target)
    speed = Path("build", "bench.json")
    if speed.exists():
        shutil.copy(speed, target.parent)


if __name__ == "__main__":
    main()
