"""Dialogues of two people with a persona each, from a file of the user's.

Format: CSV (UTF-8) as of google-research-datasets/Synthetic-Persona-Chat, with the columns
``user 1 personas``, ``user 2 personas`` and ``Best Generated Conversation``; a line of the latter
begins ``User 1:`` or ``User 2:``, lines without go on with the turn before.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from lablog.text.dialogues import Speaker, Split, Turn
from lablog.text.tokenizer import SPACE

PERSONA, CONVERSATION = "user 2 personas", "Best Generated Conversation"
SPEAKERS: dict[str, Speaker] = {"User 1": "U", "User 2": "A"}


@dataclass(frozen=True)
class PersonaDialogue:
    """The persona of the second speaker, which the turns ``A`` belong to, and all turns."""

    persona: str
    turns: tuple[Turn, ...]

    @property
    def prefix(self) -> Turn:
        """The persona as one line that speaker ``A`` says to nobody; fixes the commitment."""
        return Turn("A", self.persona, "persona")

    @property
    def split(self) -> Split:
        """Every fifth persona is held out, by its hash: no persona is in both splits."""
        digest = hashlib.sha256(self.persona.encode()).digest()
        return "held_out" if digest[0] % 5 == 0 else "train"


def read_personas(path: Path, leave_out: Collection[int] = ()) -> list[PersonaDialogue]:
    """All dialogues of a file but those in the rows `leave_out` (the header is row 1).

    Raises FileNotFoundError, or ValueError naming the file, the rows and the remedy: not UTF-8 or
    not CSV, a missing column, an empty persona, a dialogue in which the second speaker, whose
    turns are the continuation to learn, says nothing.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no dialogue file {path}: check the `personas` parameter")
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{path}, line {line}: byte {data[error.start]:#04x} is not UTF-8; save the file as "
            "UTF-8 (iconv -t UTF-8)"
        ) from error
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    found, problems = [], []
    try:
        for column in (PERSONA, CONVERSATION):
            if column not in (reader.fieldnames or ()):
                raise ValueError(f"{path}, row 1: no column {column!r} in {reader.fieldnames}")
        for row, fields in enumerate(reader, 2):
            persona = " ".join((fields[PERSONA] or "").split())
            turns = _turns(fields[CONVERSATION] or "")
            if row in leave_out:
                continue
            if not persona:
                problems.append(f"row {row}: {PERSONA!r} is empty")
            elif not any(turn.speaker == "A" for turn in turns):
                problems.append(f"row {row}: no line begins with 'User 2:'")
            elif SPACE in persona or any(SPACE in turn.text for turn in turns):
                problems.append(f"row {row}: holds U+2581, which no tokenizer tells from a space")
            else:
                found.append(PersonaDialogue(persona, turns))
    except csv.Error as error:
        raise ValueError(f"{path}, after line {reader.line_num}: not CSV ({error})") from error
    if problems:
        raise ValueError(
            f"{path}, {'; '.join(problems[:9])}{' …' * (len(problems) > 9)}: correct these rows or "
            "name them in `personas_leave_out`"
        )
    return found


def _turns(conversation: str) -> tuple[Turn, ...]:
    turns: list[Turn] = []
    for line in filter(None, map(str.strip, conversation.splitlines())):
        name, colon, rest = line.partition(":")
        if colon and name in SPEAKERS:
            turns.append(Turn(SPEAKERS[name], rest.strip(), "persona"))
        elif turns:
            turns[-1] = Turn(turns[-1].speaker, f"{turns[-1].text} {line}", "persona")
    return tuple(turn for turn in turns if turn.text)
