"""The mandated numeric report, rendered from a record in English and Japanese.

A report is a list of sections of lines. A line is a pair of templates (English, Japanese) in which
``{metric}`` or ``{metric:style}`` stands for a number of the record; a line without a number, a
metric that the record lacks, and a word that judges instead of measuring are refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from lablog.record import Metric, Record

_ENGLISH = r"\b(GOOD|EXCELLENT|MODERATE|POOR|SUCCESSFUL|IMPRESSIVE|PROMISING)\b"
_JAPANESE = r"改善した|良好|適切|優秀|十分な"
IN_REPORTS = re.compile(f"{_ENGLISH}|{_JAPANESE}", re.IGNORECASE)
IN_PROSE = re.compile(f"{_ENGLISH}|{_JAPANESE}")
"""Prose may say "the last good result"; a verdict in capitals is refused everywhere."""
_FIELD = re.compile(r"\{([A-Za-z0-9_.+\-]+)(?::(\w+))?\}")
Language = Literal["en", "ja"]


class ReportError(ValueError):
    """A report that lacks a mandatory number or judges without one."""


@dataclass(frozen=True)
class Section:
    """A titled group of lines; every text is an (English, Japanese) pair."""

    title: tuple[str, str]
    lines: Sequence[tuple[str, str]]


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
    return f"{value:.4g}"


def format_metric(metric: Metric, style: str | None = None) -> str:
    """One metric as text: ``value``, ``counts``, ``dimensions``, ``fixed6`` or, by default, all.

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
    if style is not None:
        raise ReportError(f"unknown style {style!r} for {metric.name}")
    if metric.unit not in ("fraction", "count", "class", ""):
        text += f" {metric.unit}"
    if metric.numerator is not None and metric.denominator is not None:
        text += f" ({metric.numerator:g}/{metric.denominator:g})"
    if metric.interval is not None:
        low, high = (_number(x, metric.unit, None).rstrip("%") for x in metric.interval)
        text += f" [{low}, {high}]"
    return text


def fill(record: Record, text: str) -> str:
    """`text` with the record's numbers in its fields; ReportError for a metric that it lacks."""

    def number(match: re.Match[str]) -> str:
        try:
            return format_metric(record.metric(match[1]), match[2])
        except KeyError as error:
            raise ReportError(f"the report lacks a mandatory number: {error.args[0]}") from None

    return _FIELD.sub(number, text)


def render(record: Record, sections: Sequence[Section], language: Language) -> str:
    """The report of one record as plain text (also valid Markdown).

    Raises ReportError when a metric is missing, a line has no number, or a word judges.
    """
    index = 0 if language == "en" else 1
    blocks = []
    for section in sections:
        lines = [f"{section.title[index]}:"]
        for line in section.lines:
            if not _FIELD.search(line[index]):
                raise ReportError(f"the line {line[index]!r} holds no number of the record")
            lines.append(f"- {fill(record, line[index])}")
        blocks.append("\n".join(lines))
    return reject_judgements("\n\n".join(blocks))


@dataclass(frozen=True)
class Report:
    """Both languages, for the notebook's last cell."""

    english: str
    japanese: str

    def __str__(self) -> str:
        return f"{self.english}\n\n{self.japanese}"

    def _repr_markdown_(self) -> str:
        return f"```text\n{self.english}\n```\n\n```text\n{self.japanese}\n```"


def mandated(record: Record, sections: Sequence[Section]) -> Report:
    """Render both languages of a record's report."""
    return Report(render(record, sections, "en"), render(record, sections, "ja"))
