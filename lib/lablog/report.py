"""The mandated numeric report, rendered from a record in English and Japanese.

Its texts are Jinja templates beside the notebooks, ``notebooks/reports/<notebook>.<language>.j2``.
In them ``number("metric")`` stands for a number of the record with counts and interval, and
``value``, ``counts``, ``dimensions`` and ``fixed6`` for a part of it. A line (``- ...``) without a
number, a metric that the record lacks, and a word that judges instead of measuring are refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from jinja2 import Environment, StrictUndefined, TemplateError

from lablog.files import repository
from lablog.record import Metric, Record

_ENGLISH = r"\b(GOOD|EXCELLENT|MODERATE|POOR|SUCCESSFUL|IMPRESSIVE|PROMISING)\b"
_JAPANESE = r"改善した|良好|適切|優秀|十分な"
IN_REPORTS = re.compile(f"{_ENGLISH}|{_JAPANESE}", re.IGNORECASE)
IN_PROSE = re.compile(f"{_ENGLISH}|{_JAPANESE}")
"""Prose may say "the last good result"; a verdict in capitals is refused everywhere."""
_FIELD = re.compile(r"\{([A-Za-z0-9_.+\-]+)(?::(\w+))?\}")
Language = Literal["en", "ja"]
STYLES = ("value", "interval", "counts", "dimensions", "fixed6")
_MARK = "\x02"  # before each number, until it is known that every line has one


class ReportError(ValueError):
    """A report that lacks a mandatory number or judges without one."""


def reject_judgements(text: str, words: re.Pattern[str] = IN_REPORTS) -> str:
    """Return `text`, or raise ReportError naming the first judgement word and its line."""
    for line in text.splitlines():
        found = words.search(line)
        if found:
            raise ReportError(f"judgement {found.group()!r} in {line.strip()!r}: give the number")
    return text


def _number(value: float | int | bool | str | None, unit: str, undefined: str | None) -> str:
    if value is None:
        return f"undefined ({undefined})"
    if isinstance(value, bool | str):
        return str(value)
    if unit == "fraction":
        return f"{100 * value:.1f}%"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if 9999.5 <= abs(value) < 1e9 else f"{value:.4g}"


def format_metric(metric: Metric, style: str | None = None) -> str:
    """One metric as text: ``value``, ``counts``, ``dimensions``, ``fixed6`` or, by default, all;
    ``interval`` is all but the counts.

    The default gives value, counts and interval: ``97.5% (195/200) [94.3, 98.9]``.
    """
    if style == "fixed6":
        if not isinstance(metric.value, float | int):
            raise ReportError(f"{metric.name} = {metric.value!r} is not a number")
        return f"{metric.value:.6f}"
    if style == "counts":
        if metric.numerator is None or metric.denominator is None:
            raise ReportError(f"{metric.name} has no numerator and denominator")
        return f"{metric.numerator:.0f}/{metric.denominator:.0f}"
    if style == "dimensions":
        if metric.numerator is None or metric.denominator is None:
            raise ReportError(f"{metric.name} has no numerator and denominator")
        return f"{metric.numerator:.2f}/{metric.denominator:.0f}"
    text = _number(metric.value, metric.unit, metric.undefined)
    if style == "value":
        return text
    if style not in (None, "interval"):
        raise ReportError(f"unknown style {style!r} for {metric.name}")
    if metric.unit not in ("fraction", "count", "class", ""):
        text += f" {metric.unit}"
    if style is None and metric.numerator is not None and metric.denominator is not None:
        text += f" ({metric.numerator:g}/{metric.denominator:g})"
    if metric.interval is not None:
        low, high = (_number(x, metric.unit, None).rstrip("%") for x in metric.interval)
        text += f" [{low}, {high}]"
    return text


def fill(record: Record, text: str) -> str:
    """`text` with the record's numbers in its fields; ReportError for a metric that it lacks."""

    return _FIELD.sub(lambda field: _told(record, field[1], field[2]), text)


def _told(record: Record, name: str, style: str | None) -> str:
    try:
        return format_metric(record.metric(name), style)
    except KeyError as error:
        raise ReportError(f"the report lacks a mandatory number: {error.args[0]}") from None


def render(record: Record, template: str, **names: Any) -> str:
    """A report template filled from a record, as plain text (also valid Markdown).

    names: what else the template speaks of, such as the arms that were run.
    Raises ReportError when a metric or name is missing, a line has no number, a word judges, or
    the template is none.
    """
    def number(name: str, style: str | None = None) -> str:
        return _MARK + _told(record, name, style)

    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
                              autoescape=False)
    environment.globals |= {"number": number,
                            **{style: partial(number, style=style) for style in STYLES}}
    try:
        text = environment.from_string(template).render(**names).strip()
    except TemplateError as error:
        raise ReportError(f"the report of {record.notebook}: {error}") from error
    for line in text.splitlines():
        if line.startswith("- ") and _MARK not in line:
            raise ReportError(f"the line {line!r} holds no number of the record")
    return reject_judgements(text.replace(_MARK, ""))


@dataclass(frozen=True)
class Report:
    """Both languages, for the notebook's last cell."""

    english: str
    japanese: str

    def __str__(self) -> str:
        return f"{self.english}\n\n{self.japanese}"

    def _repr_markdown_(self) -> str:
        return f"```text\n{self.english}\n```\n\n```text\n{self.japanese}\n```"


def template(notebook: str, language: Language) -> str:
    """The text of a notebook's report; ReportError names the file if it is missing."""
    path = repository() / "notebooks" / "reports" / f"{notebook}.{language}.j2"
    if not path.is_file():
        raise ReportError(f"{path} is missing: a notebook needs a report in English and Japanese")
    return path.read_text(encoding="utf-8")


def mandated(record: Record, **names: Any) -> Report:
    """Both languages of the report of a record's notebook; `names` as in :func:`render`."""
    return Report(render(record, template(record.notebook, "en"), **names),
                  render(record, template(record.notebook, "ja"), **names))
