"""Checks on the Arianna dialogues: schema, count, lengths, and that no two are alike.

Standard library only; reads the files relative to the repository root.
"""

import itertools
import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "data" / "arianna_conversations.jsonl"
CARD = ROOT / "data" / "arianna_card.md"

COUNT = 171
MIN_WORDS, MAX_WORDS = 60, 180
RUN = 8
MAX_JACCARD = 0.2
MAX_SAME_OPENING = 4

WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")


def words(text):
    """Casefolded words without punctuation; an apostrophe inside a word stays."""
    return WORD.findall(text.casefold())


def ngrams(tokens, n):
    return {tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)}


def shared_runs(dialogues, n=RUN):
    """n-word runs that occur in more than one dialogue, with the dialogues' indices.

    A run never crosses the border between a question and its answer.
    """
    seen = defaultdict(set)
    for index, (question, answer) in enumerate(dialogues):
        for text in (question, answer):
            for run in ngrams(words(text), n):
                seen[run].add(index)
    return {" ".join(run): sorted(where) for run, where in seen.items() if len(where) > 1}


def near_duplicates(dialogues, limit=MAX_JACCARD):
    """Pairs whose sets of word 3-grams have a Jaccard index of `limit` or more."""
    sets = [ngrams(words(f"{q} {a}"), 3) for q, a in dialogues]
    found = []
    for i, j in itertools.combinations(range(len(sets)), 2):
        union = len(sets[i] | sets[j])
        if union and len(sets[i] & sets[j]) / union >= limit:
            found.append((i, j))
    return found


def repeated_openings(answers, limit=MAX_SAME_OPENING):
    """First-four-word openings used by more than `limit` answers."""
    counts = Counter(tuple(words(answer)[:4]) for answer in answers)
    return {" ".join(key): n for key, n in counts.items() if n > limit}


@pytest.fixture(scope="module")
def lines():
    text = DATA.read_bytes().decode("utf-8", errors="strict")
    assert text.endswith("\n")
    assert "\r" not in text
    assert not text.startswith("\ufeff")
    return text[:-1].split("\n")


@pytest.fixture(scope="module")
def dialogues(lines):
    pairs = []
    for number, line in enumerate(lines, 1):
        messages = json.loads(line)
        assert isinstance(messages, list), f"line {number}"
        assert len(messages) == 2, f"line {number}"
        for message, role in zip(messages, ("user", "assistant"), strict=True):
            assert isinstance(message, dict), f"line {number}"
            assert set(message) == {"role", "content"}, f"line {number}"
            assert message["role"] == role, f"line {number}"
            assert isinstance(message["content"], str), f"line {number}"
            assert message["content"].strip(), f"line {number}: empty {role} message"
        pairs.append((messages[0]["content"], messages[1]["content"]))
    return pairs


def test_exactly_171_lines(lines):
    assert len(lines) == COUNT


def test_schema(dialogues):
    assert len(dialogues) == COUNT


def test_texts_are_single_paragraphs_of_plain_ascii(dialogues):
    for number, pair in enumerate(dialogues, 1):
        for text in pair:
            assert text == text.strip(), f"line {number}: space at an end"
            assert "  " not in text, f"line {number}: double space"
            odd = sorted({c for c in text if not " " <= c <= "~"})
            assert not odd, f"line {number}: {odd}"


def test_texts_do_not_contain_the_training_markers(dialogues):
    # Dialogues are joined as "Q: ...\nA: ..."; a marker inside a text would split it.
    for number, pair in enumerate(dialogues, 1):
        for text in pair:
            assert not re.search(r"\b[QA]:", text), f"line {number}"


def test_answer_lengths(dialogues):
    lengths = [len(answer.split()) for _, answer in dialogues]
    outside = [(i + 1, n) for i, n in enumerate(lengths) if not MIN_WORDS <= n <= MAX_WORDS]
    assert not outside
    # The whole range is used: short and long answers both occur in number.
    assert sum(n < 90 for n in lengths) >= 10
    assert sum(n > 150 for n in lengths) >= 10


def test_questions_are_unique(dialogues):
    assert len({tuple(words(question)) for question, _ in dialogues}) == COUNT


def test_no_eight_word_run_is_shared(dialogues):
    assert shared_runs(dialogues) == {}


def test_no_near_duplicates(dialogues):
    assert near_duplicates(dialogues) == []


def test_no_template_openings(dialogues):
    assert repeated_openings([answer for _, answer in dialogues]) == {}
    assert repeated_openings([question for question, _ in dialogues]) == {}


def test_answers_do_not_begin_by_repeating_the_question(dialogues):
    for number, (question, answer) in enumerate(dialogues, 1):
        first = re.split(r"(?<=[.?!])\s", answer)[0]
        common = ngrams(words(question), 4) & ngrams(words(first), 4)
        assert not common, f"line {number}: {common}"


def test_checks_find_planted_faults(dialogues):
    question, answer = dialogues[0]
    copied = " ".join(answer.split()[:RUN])
    planted = [*dialogues, ("Something else entirely?", f"Well now. {copied.upper()}, and so on.")]
    assert list(shared_runs(planted).values()) == [[0, len(dialogues)]]
    assert near_duplicates([*dialogues, (question, answer + " Indeed.")]) == [(0, len(dialogues))]
    opening = "The thing about that"
    assert repeated_openings([f"{opening} is {i}" for i in range(5)]) == {opening.casefold(): 5}
    assert repeated_openings([f"{opening} is {i}" for i in range(4)]) == {}


def test_card_statistics_are_those_of_the_file(dialogues):
    lengths = [len(answer.split()) for _, answer in dialogues]
    asked = [len(question.split()) for question, _ in dialogues]
    bands = Counter(min((n - MIN_WORDS) // 30, 3) for n in lengths)
    expected = {
        "dialogues": len(dialogues),
        "answer words, total": sum(lengths),
        "answer words, shortest": min(lengths),
        "answer words, median": sorted(lengths)[len(lengths) // 2],
        "answer words, longest": max(lengths),
        "answers of 60 to 89 words": bands[0],
        "answers of 90 to 119 words": bands[1],
        "answers of 120 to 149 words": bands[2],
        "answers of 150 to 180 words": bands[3],
        "question words, total": sum(asked),
        "question words, shortest": min(asked),
        "question words, longest": max(asked),
        "distinct words (casefolded)": len(
            {w for pair in dialogues for t in pair for w in words(t)}
        ),
        "bytes of the file": DATA.stat().st_size,
    }
    rows = dict(re.findall(r"^\| ([^|]+?) \| ([\d,]+) \|$", CARD.read_text("utf-8"), re.MULTILINE))
    stated = {key: int(value.replace(",", "")) for key, value in rows.items()}
    assert stated == expected
