"""Notes for a release, from the ledger: ``python -m tools.release_notes [SINCE]``.

Markdown on standard output: how many claims have which verdict, what each published chapter was run
with, and, with a commit to compare with, which verdicts and values have changed since.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence

from lablog.claims import BENCH, PROFILES, counts, judged_otherwise, ledger, read_records
from lablog.files import repository
from lablog.record import Record
from tools.compare import published_by

Records = Mapping[str, Mapping[str, Record]]


def since_then(commit: str) -> Records:
    """What a commit had published, by profile and notebook; ValueError if that was nothing."""
    folders = {BENCH: "book/records"} | {name: f"book/records/{name}" for name in PROFILES}
    read = {name: published_by(commit, folder) for name, folder in folders.items()}
    found = {name: records for name, records in read.items() if records}
    if not found:
        raise ValueError(f"commit {commit} has published nothing")
    return found


def notes(now: Records, before: Records | None = None, commit: str = "") -> str:
    """The notes; `before` is what `commit` had published."""
    rows = ledger(now)
    parts = ["## Claims of the logs\n", "| verdict | claims |\n|---|---|"]
    parts += [f"| {verdict} | {number} |" for verdict, number in counts(rows).items()]
    if before is not None:
        told = [f"- {b.claim.id}, {b.claim.quantity}: {a.verdict} {a.side} → **{b.verdict}** "
                f"{b.side}" for a, b in judged_otherwise(ledger(before), rows)]
        parts += [f"\n### Since {commit}\n", *(told or ["No claim is judged otherwise."])]
    parts += ["\n## Records\n",
              "| profile | chapter | commit | machine | minutes |\n|---|---|---|---|---|"]
    for profile in (name for name in PROFILES if name in now):
        parts += [f"| {profile} | {name} | `{record.source.commit[:10]}` | "
                  f"{record.machine.processor} | {record.seconds / 60:.0f} |"
                  for name, record in sorted(now[profile].items())]
    return "\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns 0, or 2 with the error."""
    parser = argparse.ArgumentParser(prog="python -m tools.release_notes", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("since", nargs="?", default="", help="commit or tag to compare with")
    options = parser.parse_args(arguments)
    try:
        now = read_records(repository() / "book" / "records")
        before = since_then(options.since) if options.since else None
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(notes(now, before, options.since))
    return 0


if __name__ == "__main__":
    sys.exit(main())
