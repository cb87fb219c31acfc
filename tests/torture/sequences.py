"""A state machine: what people do to a clone, in any order, against a model of what must be stale.

``python -m torture.sequences COUNT SEED`` runs in a small clone, with that clone's library. What a
notebook computes is replaced by a record that tells its inputs, so that a sequence takes no time;
planning, Make's decision, execution, moving into place, locks and remains are the real ones.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import papermill
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    rule,
    run_state_machine_as_test,
)

from lablog import layout, profiles, runner
from lablog.files import repository
from lablog.record import Record
from lablog.run import RUN_VARIABLE, Run

NOTEBOOKS = ("01_alpha", "02_beta")
TOUCHED = {
    "lib/lablog/alpha/work.py": {"01_alpha"}, "lib/lablog/beta/work.py": {"02_beta"},
    "notebooks/01_alpha.py": {"01_alpha"}, "notebooks/reports/02_beta.en.j2": {"02_beta"},
    "data/alpha.csv": {"01_alpha"}, "data/unused.csv": set(), "lib/lablog/runner.py": set(),
    "lib/lablog/record.py": {"01_alpha", "02_beta"}, "notebooks/profiles/laptop.yaml": set(),
}
"""Files, and whose results are stale when they are newer."""
STEPS = 12  # of a sequence


def nothing() -> None:
    """What happens in the middle of an undisturbed run."""


def executed(notebook: Any, output: Path, *, parameters: dict[str, Any],
             during: Callable[[], None] = nothing, **_: Any) -> None:
    """In papermill's place: the record says what it was made with."""
    context = json.loads(Path(os.environ[RUN_VARIABLE]).read_text())
    name = Path(output).stem
    Path(output).write_text("{}")
    run = Run(name, context["profile"], Path(context["folder"]), Path(context["artifacts"]),
              parameters)
    during()
    run.metric("size", float(parameters.get("size", parameters.get("value", 0))), "count")
    run.record().write(Path(context["folder"]) / "records" / f"{name}.json")


class Clone(RuleBasedStateMachine):
    """One profile of the small clone; `fresh` are the notebooks whose results are up to date."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = layout.results("laptop")
        shutil.rmtree(self.folder, ignore_errors=True)
        self.size = 5
        self._write_profile()
        self.fresh: dict[str, bool] = dict.fromkeys(NOTEBOOKS, False)
        self.values: dict[str, float] = {}  # what the records at hand hold

    def _write_profile(self) -> None:
        (repository() / "notebooks/profiles/laptop.yaml").write_text(
            f"all:\n  value: 0.25\n02_beta:\n  size: {self.size}\n")

    def _record(self, notebook: str) -> Path:
        return self.folder / "records" / f"{notebook}.json"

    def _spec(self, notebook: str) -> runner.RunSpec:
        profile = profiles.load("laptop")
        runner.plan(profile, [])
        return runner.RunSpec(notebook, "laptop", profile.parameters[notebook], self.folder)

    def _run(self, notebook: str) -> None:
        outcome = runner.execute(self._spec(notebook))
        assert outcome.status == "ok", outcome
        self.fresh[notebook] = True
        self.values[notebook] = 0.25 if notebook == "01_alpha" else float(self.size)

    def _meanwhile(self, notebook: str, what: Callable[[], None]) -> int:
        """Run a notebook in a process of its own with `what` in the middle; its exit code."""
        spec, process = self._spec(notebook), os.fork()
        if not process:
            papermill.execute_notebook = partial(executed, during=what)
            os._exit({"ok": 0}.get(runner.execute(spec).status, 3))
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])

    @rule()
    def make_all(self) -> None:
        """What Make runs is what is stale, and then nothing is."""
        for notebook in self._stale():
            self._run(notebook)

    @rule(notebook=st.sampled_from(NOTEBOOKS))
    def make_one(self, notebook: str) -> None:
        self._run(notebook)

    @rule(file=st.sampled_from(sorted(TOUCHED)))
    def touch(self, file: str) -> None:
        os.utime(repository() / file, ns=(time.time_ns(),) * 2)
        self.fresh |= dict.fromkeys(TOUCHED[file], False)

    @rule(size=st.integers(1, 3))
    def change_a_parameter(self, size: int) -> None:
        if size != self.size:
            self.fresh["02_beta"] = False
        self.size = size
        self._write_profile()
        runner.plan(profiles.load("laptop"), [])

    @rule(notebook=st.sampled_from(NOTEBOOKS))
    def killed(self, notebook: str) -> None:
        """A run is killed in the middle: what was there stays."""
        assert self._meanwhile(notebook, lambda: os.kill(os.getpid(), 9)) == -9

    @rule(notebook=st.sampled_from(NOTEBOOKS))
    def fails(self, notebook: str) -> None:
        """A run fails: what was there stays, and the failure is kept beside it."""
        def fault() -> None:
            raise ValueError("planted")

        assert self._meanwhile(notebook, fault) == 3
        failed = Record.read(self.folder / "failed" / f"{notebook}.json")
        assert failed.failure
        assert failed.failure.message == "ValueError: planted"

    @rule(notebook=st.sampled_from(NOTEBOOKS))
    def two_at_once(self, notebook: str) -> None:
        """A second run of a notebook is refused while the first one works."""
        spec = self._spec(notebook)

        def second() -> None:
            papermill.execute_notebook = executed
            with pytest.raises(OSError, match="another run"):
                runner.execute(spec)

        assert self._meanwhile(notebook, second) == 0
        self.fresh[notebook] = True
        self.values[notebook] = 0.25 if notebook == "01_alpha" else float(self.size)

    @rule(notebook=st.sampled_from(NOTEBOOKS))
    def remove_a_record(self, notebook: str) -> None:
        self._record(notebook).unlink(missing_ok=True)
        self.fresh[notebook] = False
        self.values.pop(notebook, None)

    @rule(notebook=st.sampled_from(NOTEBOOKS))
    def damage_a_record(self, notebook: str) -> None:
        """A damaged record is named, and gone with the next run."""
        if self._record(notebook).is_file():
            self._record(notebook).write_text("{")
            with pytest.raises(ValueError, match=rf"{notebook}\.json is not a record"):
                runner.summary(profiles.load("laptop"), [])
            self._run(notebook)

    @rule(notebook=st.sampled_from(NOTEBOOKS))
    def set_the_clock_back(self, notebook: str) -> None:
        """A record is dated in the future then, which is no excuse for it."""
        if self._record(notebook).is_file():
            os.utime(self._record(notebook), (time.time() + 3600,) * 2)
            self.fresh[notebook] = False

    @rule()
    def clean(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.fresh = dict.fromkeys(NOTEBOOKS, False)
        self.values = {}

    def _stale(self) -> list[str]:
        plan = repository() / "plan.mk"
        plan.write_text(runner.plan(profiles.load("laptop"), []))
        shown = subprocess.run(["make", "-n", f"PLAN={plan}", "_results"], text=True, check=True,
                               capture_output=True).stdout
        return re.findall(r"lablog.runner run \S+ (\S+)", shown)

    @invariant()
    def make_runs_what_is_stale(self) -> None:
        expected = [notebook for notebook in NOTEBOOKS if not self.fresh[notebook]]
        assert self._stale() == expected
        told = runner.why(profiles.load("laptop"), []).splitlines()
        assert [line.split(":")[0] for line in told if ": runs: " in line] == expected, told

    @invariant()
    def records_are_whole_and_nothing_is_half_there(self) -> None:
        found = {path.stem: Record.read(path).metric("size").value
                 for path in (self.folder / "records").glob("*")}
        assert found == self.values

    def teardown(self) -> None:
        """What killed runs have left is gone with the next run."""
        for notebook in NOTEBOOKS:
            self._run(notebook)
        assert not list(self.folder.glob(".run-*"))


def main() -> None:
    """Try sequences; the exit code is 1, with the one that failed, if any did."""
    count, seed = map(int, sys.argv[1:])
    papermill.execute_notebook = executed
    machine = seeded(seed)(Clone)
    run_state_machine_as_test(machine, settings=settings(
        max_examples=count, stateful_step_count=STEPS, deadline=None, database=None,
        phases=(Phase.generate,), suppress_health_check=list(HealthCheck)))


if __name__ == "__main__":
    main()
