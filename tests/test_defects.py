"""Every defect of chapter 7 is noticed by the check that is named, and by nothing else: without the
check, the chapter stops."""

import os
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import jupytext
import pytest

from lablog.arianna import chat, guards
from lablog.commitment import training_metrics
from lablog.cvfp import checks, model, phase1
from lablog.defects import commitments, contexts
from lablog.defects.noticed import UnnoticedError, noticed, refusal
from lablog.files import repository
from lablog.models import training
from lablog.models.trainer import Fresh
from lablog.record import Metric

NOTEBOOK = repository() / "notebooks" / "07_defects.py"
QUICK = {"seeds": [42, 43], "tune_steps": 12, "answers": 4}
"""Parameters that change how large symptoms are, not what notices them."""
Names = dict[str, Any]
Without = Callable[[Names], AbstractContextManager[Any]]


def nothing(*_: Any, **__: Any) -> None:
    """Does what a check does where there is none."""


def named(name: str, value: Callable[[Names], Any]) -> Without:
    return lambda chapter: patch.dict(chapter, {name: value(chapter)})


def gone(where: Any, name: str, instead: Any = nothing) -> Without:
    return lambda chapter: patch.object(where, name, instead)


CHECKS: dict[str, Without] = {
    "normalised_loss": named("spoilt", lambda chapter: chapter["right"]),
    "missing_detach": gone(contexts, "read_with_steps", lambda *_: (20, "")),
    "context_reset": gone(checks.Convergence, "verdict", "between"),
    "fixed_target": gone(checks, "FINAL_FAILS", 1e9),
    "swapped_arguments": gone(model, "check_widths"),
    "embedding_norm": gone(phase1, "check_normalised"),
    "missing_validation": named("read_validation", lambda _: nothing),
    "auto_split": named("read_validation", lambda _: nothing),
    "validation_is_training": named("refuse_overlap", lambda _: nothing),
    "batch_size": gone(guards, "check_base"),
    "copied_weights": gone(training, "relative_update", lambda *_: 1.0),
    "resumed_counters": lambda chapter: patch.multiple(Fresh, on_train_begin=nothing,
                                                       on_step_end=nothing),
    "long_warmup": gone(training, "check_schedule"),
    "bare_prompt": gone(chat, "warn_of_form"),
    "padding_commitment": named("moves", lambda _: [[1.0], [1.0]]),
    "counted_padding": named("padded", lambda _: {True: [0.0], False: [0.0]}),
    "posterior_collapse": gone(training_metrics, "of_training",
                               lambda _: [Metric.of("collapsed", 0, "count")]),
    "shared_commitment": gone(commitments, "moved_bystanders",
                              lambda *_: {"planted": [0.0], "right": [0.0]}),
    "judgement_word": named("reject_judgements", lambda _: nothing),
}
"""For every defect, how its check is taken away: a function that does nothing in its place, or,
where the check is a comparison of the chapter itself, values that no longer differ."""
AGAIN = ("resumed_counters", "long_warmup")
"""Sections whose check looks at a training: all of their cells are run again."""


def recorded_in(cell: str) -> list[str]:
    return re.findall(r'record\(\s*"(\w+)"', cell)


@pytest.fixture(scope="module")
def chapter(tmp_path_factory: pytest.TempPathFactory) -> tuple[Names, dict[str, list[str]]]:
    """The chapter's names behind its end, and the cells of each section by the defect's name."""
    before, folder = Path.cwd(), tmp_path_factory.mktemp("defects")
    context: Names = {"__name__": "chapter"}
    sections: list[list[str]] = []
    os.chdir(folder)
    try:
        with patch("lablog.layout.interactive", lambda: folder):
            for cell in jupytext.read(NOTEBOOK).cells:
                if re.match(r"##+ ", cell.source) and cell.cell_type == "markdown":
                    sections.append([])
                if cell.cell_type == "code" and "run.finish(" not in cell.source:
                    source = cell.source.replace("room.cleanup()", "")
                    exec(compile(source, "<chapter 7>", "exec"), context)
                    if "parameters" in cell.metadata.get("tags", ()):
                        context |= QUICK
                    elif sections:
                        sections[-1].append(source)
    finally:
        os.chdir(before)
    found = {}
    for cells in sections:
        found |= {defect: cells for cell in cells for defect in recorded_in(cell)}
    return context, found


def test_nineteen_defects_have_a_check(chapter: tuple[Names, dict[str, list[str]]]):
    context, sections = chapter
    assert len(CHECKS) == 19
    assert list(sections) == list(CHECKS)
    recorded = {m.name: m for m in context["run"].record().metrics}
    for defect in CHECKS:
        assert recorded[f"{defect}.planted"].value != recorded[f"{defect}.right"].value, defect
        assert recorded[f"{defect}.caught_by"].value


@pytest.mark.parametrize("defect", CHECKS)
def test_without_its_check_a_defect_stops_the_chapter(
    chapter: tuple[Names, dict[str, list[str]]], defect: str, tmp_path: Path,
):
    context, sections = chapter
    cells = [cell for cell in sections[defect] if defect in AGAIN or recorded_in(cell)]
    with (patch.dict(context, scratch=tmp_path), CHECKS[defect](context),
          pytest.raises(UnnoticedError, match=f"{defect}: .* does not fire")):
        exec(compile("\n\n".join(cells), "<chapter 7>", "exec"), context)


def test_a_check_that_fires_without_a_fault_stops_the_chapter():
    values = {"planted": [1.0], "right": [0.0], "check": "a check"}
    with pytest.raises(UnnoticedError, match="fires without the fault"):
        noticed("d", "share", "fraction", [], **values, fires=True, fires_without="ValueError")
    found = noticed("d", "share", "fraction", [], **values, fires=1, fires_without="")
    assert {metric.name: metric.value for metric in found} == {
        "d.symptom": "share", "d.caught_by": "a check", "d.planted": 1.0, "d.right": 0.0}
    assert not any(metric.interval or metric.seeds for metric in found)


def test_symptoms_keep_to_the_range_of_their_quantity():
    found = {metric.name: metric for metric in noticed(
        "d", "share", "fraction", [1, 2, 3], planted=[0.9, 1.0, 0.8], right=[0.0, 0.1, 0.0],
        check="a check", fires=True, fires_without=False)}
    planted, right = found["d.planted"].interval, found["d.right"].interval
    assert planted is not None
    assert planted[0] < 0.9 < planted[1] == 1
    assert right is not None
    assert right[0] == 0 < right[1]


def test_a_refusal_names_its_kind():
    assert refusal(lambda: int("x")) == "ValueError"
    assert refusal(lambda: int("1")) == ""
    with pytest.raises(KeyboardInterrupt):
        refusal(lambda: (_ for _ in ()).throw(KeyboardInterrupt()))
