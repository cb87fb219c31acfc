"""Copies what the project publishes into book/records/: ``python -m tools.publish --help``.

A profile's records, the figures below, and the record of speed. Results that were made with single
values set are published under the profile's own name; their record holds the values.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence

from lablog import layout, profiles
from lablog.files import repository

SHOWN = {
    "01_zero_shot_commitment": ("named_rows",),
    "02_lambda_calibration": ("heat",),
    "03_qlora_commitment": ("training", "arms", "kinds", "persistence", "ablations", "capacity"),
    "04_cvfp_phase1": ("contraction",),
    "05_cvfp_phase2": ("test",),
    "06_arianna_finetune": ("conditions", "comparisons"),
    "07_defects": ("normalised_loss",),
}
"""Figures that README, front page and the page of published results show, by notebook; published as
``<notebook>.<figure>.svg``, since two chapters may have figures of one name."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Copy; exits with the remedy when the profile has no record."""
    parser = argparse.ArgumentParser(prog="publish", description=__doc__)
    parser.add_argument("--profile", default="laptop", help="name, or path of a YAML file")
    parser.add_argument("--set", nargs="*", default=[], metavar="[NN.]NAME=VALUE",
                        help="the values that the results were made with")
    parser.add_argument("notebooks", nargs="*", help="names or numbers; all if left out")
    options = parser.parse_args(arguments)
    name = profiles.load(options.profile, options.set).name
    source = layout.results(name)
    chosen = tuple(options.notebooks) or ("",)
    records = [path for path in sorted((source / "records").glob("*.json"))
               if path.name.startswith(chosen)]
    if not records:
        sys.exit(f"error: {source}/records holds no such record: run `make reproduce` with the "
                 "same PROFILE, SET and NOTEBOOKS first")
    for path in records:
        if (status := json.loads(path.read_text())["status"]) != "ok":
            sys.exit(f"error: {path} has the status {status}: only what ended well is published")
    target = repository() / "book" / "records" / name.split("+")[0]
    target.mkdir(parents=True, exist_ok=True)
    for record in records:
        shutil.copy(record, target)
        for figure in SHOWN.get(record.stem, ()):
            drawn = source / "figures" / record.stem / f"{figure}.svg"
            if drawn.exists():
                shutil.copy(drawn, target / f"{record.stem}.{figure}.svg")
    for path in layout.measured():
        shutil.copy(path, target.parent)


if __name__ == "__main__":
    main()
