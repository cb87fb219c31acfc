"""llama.cpp's speaker: conversations in the sequences of a context, all under one injection."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lablog.commitment import rendering
from lablog.commitment.probes import ForkItem, Turns
from lablog.models.llama_cpp import Commitment, Context, Model, generate_tokens
from lablog.models.sampling import log_softmax
from lablog.provenance import usable_threads
from lablog.text.dialogues import Turn

SMALL = 50_000_000
"""Parameters up to which one thread a context is faster than many threads in one."""


@dataclass(frozen=True)
class Injection:
    """What is injected at each turn of a conversation: turn t gets ``commitments[t % n]``.

    One commitment is the experiment (sampled once); several are the control that draws a
    direction of the same norm anew for every turn and every forked question; none (or strength
    0) is the unmodified model.
    """

    commitments: tuple[Commitment, ...] = ()

    @property
    def changes(self) -> bool:
        """Whether turns differ."""
        return len(self.commitments) > 1

    def turn(self, context: Context, number: int) -> None:
        """Set what turn `number` gets."""
        context.commit(self.commitments[number % len(self.commitments)]
                       if self.commitments else None)

    def questions(self, context: Context, numbers: Mapping[int, int]) -> None:
        """Give questions that are asked together, one a sequence, what their numbers get.

        Only an injection that changes does anything: each question is then a turn of its own.
        """
        if self.changes:
            for sequence, number in numbers.items():
                chosen = self.commitments[number % len(self.commitments)]
                context.commit(chosen, sequence=sequence)

    def asked(self, context: Context, sequences: Iterable[int]) -> None:
        """Take back what :meth:`questions` gave to `sequences`."""
        if self.changes:
            for sequence in sequences:
                context.commit(None, sequence=sequence)


class LlamaCppSpeaker:
    """A `Speaker` (``probes``) whose latents are an `Injection`, the same for all conversations.

    As many conversations are read together as the context has sequences. What they have in common
    with what the sequences hold already, be it the stem of a fork or the exchange before, is not
    read again.

    chat: ``plain`` (one turn a line, ``U:`` and ``A:``, for any model), ``llama2`` (the
    instruction format of Llama-2-Chat) or ``auto`` (the model's own template). system: what the
    system says before all else, if `chat` has a system.
    """

    def __init__(self, context: Context, chat: str = "plain", system: str = "") -> None:
        rendering.check_chat(chat)
        self.context, self.model, self.chat = context, context.model, chat
        self.system = system
        self._encode = lru_cache(maxsize=65536)(self._encode_uncached)
        self._said: tuple[Injection, list[str]] | None = None  # conversations that the caches hold

    # --- turns and tokens ---------------------------------------------------------------------

    def _encode_uncached(self, text: str) -> tuple[int, ...]:
        return tuple(self.model.tokenize(text, bos=True, special=self.chat != "plain"))

    def render(self, turns: Sequence[Turn]) -> str:
        """Turns as the text that the model reads."""
        if self.chat == "auto":
            return self.model.chat(rendering.messages(turns, self.system))
        return rendering.render(turns, self.chat)

    def history(self, turns: Sequence[Turn]) -> list[int]:
        """Tokens of finished turns."""
        return list(self._encode(self.render(turns)))

    def prompt(self, turns: Sequence[Turn], stem: str = "") -> list[int]:
        """Tokens up to where the assistant speaks (having begun with `stem`)."""
        if self.chat == "auto":
            text = self.model.chat(rendering.messages(turns, self.system), answer=True)
            return list(self._encode(text + stem))
        return list(self._encode(rendering.asked(turns, self.chat, stem)))

    # --- as a `Speaker` -----------------------------------------------------------------------

    def say(self, conversations: Sequence[Turns], under: Injection, tokens: int, first: int = 0,
            uniforms: np.ndarray | None = None, stems: Sequence[str] = ()) -> list[str]:
        """As `Speaker.say`. Conversations that continue those of the call before, under the same
        injection, are read on from there."""
        texts: list[str] = []
        for begin in range(0, len(conversations), self.context.sequences):
            group = conversations[begin : begin + self.context.sequences]
            begun = stems[begin:][: len(group)] or [""] * len(group)
            logits = self._ask(group, under, first, begun)
            drawn = None if uniforms is None else dict(enumerate(uniforms[begin:][: len(group)]))
            written = generate_tokens(self.context, logits, tokens, self.model.stops(), drawn)
            said = [f"{stem} {self.model.detokenize(written[s]).strip()}".strip()
                    for s, stem in enumerate(begun)]
            self._said = under, [self.render([*turns, Turn("A", text, "answer")])
                                 for turns, text in zip(group, said, strict=True)]
            texts += said
        return texts

    def _ask(self, group: Sequence[Turns], under: Injection, first: int,
             stems: Sequence[str] | None = None) -> dict[int, np.ndarray]:
        """Logits behind the prompt of each conversation; turn by turn if the injection changes.

        The exchange that opens a conversation gets number 0, those that follow numbers from 2 on
        (what ends an exchange that the caches hold already, number 2); all last questions have the
        same.
        """
        holds = self._hold(group, under)
        if not holds:
            self._clear()
        longest = max(len(turns) - 1 for turns in group)
        number = longest // 2 + 2 if longest or first else 0
        if under.changes:
            for end in range(2, longest + 1, 2):
                under.turn(self.context, 1 + end // 2 if end > 2 or holds or first else 0)
                self.context.prefill({s: self.history(turns[:end]) for s, turns in enumerate(group)
                                      if end < len(turns)})
        under.turn(self.context, number)
        return self.context.prefill({s: self.prompt(turns, stems[s] if stems else "")
                                     for s, turns in enumerate(group)})

    def _hold(self, group: Sequence[Turns], under: Injection) -> bool:
        if self._said is None or self._said[0] is not under or len(self._said[1]) != len(group):
            return False
        return all(self.render(turns).startswith(text)
                   for turns, text in zip(group, self._said[1], strict=True))

    def _clear(self) -> None:
        self.context.clear()
        self._said = None

    def agree(self, conversations: Sequence[Turns], under: Injection) -> np.ndarray:
        """As `Speaker.agree`."""
        found = np.zeros((len(conversations), 2))
        for begin in range(0, len(conversations), self.context.sequences):
            logits = self._ask(conversations[begin : begin + self.context.sequences], under, 0)
            answers = self.word_probabilities({s: rows[0] for s, rows in logits.items()},
                                              ("yes", "no"))
            self._said = None
            for sequence, pair in answers.items():
                found[begin + sequence] = pair
        return found

    def forks(self, histories: Sequence[Turns], items: Sequence[ForkItem],
              under: Injection) -> list[tuple[np.ndarray, np.ndarray, float]]:
        """As `Speaker.forks`.

        An injection that changes gives every question of every fork a direction of its own, and
        what is decoded to score an answer has that of its question.
        """
        context = self.context
        widest = max(len(item.values) for item in items) + 1
        room = context.sequences // widest
        if not room:
            raise ValueError(f"forking {widest - 1} ways needs {widest} sequences, the context has "
                             f"{context.sequences}")
        found: list[tuple[np.ndarray, np.ndarray, float]] = []
        for begin in range(0, len(items), room):
            group = list(zip(range(0, room * widest, widest), histories[begin : begin + room],
                             items[begin : begin + room], strict=False))
            self._clear()
            under.turn(context, 0)
            context.prefill({base: self.history(history) for base, history, _ in group})
            asked: dict[int, list[int]] = {}
            for base, history, item in group:
                context.fork(base, range(base + 1, base + 1 + len(item.values)))
                asked[base] = self.prompt([*history, item.naming], item.stem)
                for offset, guess in enumerate(item.guesses):
                    asked[base + 1 + offset] = self.prompt([*history, guess])
            # Question q of item i is turn 1 + i · widest + q of what is injected: none twice.
            under.questions(context, {s: 1 + begin * widest + s for s in asked})
            last = {s: rows[0] for s, rows in context.prefill(asked).items()}
            bases = [base for base, _, _ in group]
            answers = self.word_probabilities({s: last[s] for s in asked if s not in bases},
                                              ("yes", "no"))
            scores = self._named({base: last[base] for base in bases}, group)
            under.asked(context, range(len(group) * widest))
            for base, _, item in group:
                pairs = np.array([answers[base + 1 + x] for x in range(len(item.values))])
                logs = scores[base]
                total = np.logaddexp.reduce(logs)
                found.append((pairs, np.exp(logs - total), float(np.exp(total))))
        return found

    def _named(self, last: Mapping[int, np.ndarray],
               group: Sequence[tuple[int, Turns, ForkItem]]) -> dict[int, np.ndarray]:
        """log P(value | what is it?) behind each base, said in any of the item's ways."""
        scores: dict[int, np.ndarray] = {}
        for way in range(len(group[0][2].ways)):
            said = self.scores(last, {
                base: self.continuations([*history, item.naming], item.stem, item.ways[way])
                for base, history, item in group})
            scores = said if not way else {base: np.logaddexp(scores[base], logs)
                                           for base, logs in said.items()}
        return scores

    def read(self, texts: Sequence[Turns], under: Injection) -> list[np.ndarray]:
        """As `Speaker.read`, the last token included."""
        context, rows = self.context, [np.empty(0)] * len(texts)
        for begin in range(0, len(texts), context.sequences):
            group = dict(enumerate(texts[begin : begin + context.sequences]))
            self._clear()
            longest = max(map(len, group.values()))
            ends = range(2, longest + 2, 2) if under.changes else [longest]
            pieces: dict[int, list[np.ndarray]] = {i: [] for i in group}
            for number, end in enumerate(ends):
                under.turn(context, number)
                told = {i: self.history(turns[:end]) for i, turns in group.items()
                        if number == 0 or len(turns) > end - 2}
                for i, logits in context.prefill(told, "all").items():
                    pieces[i].append(log_softmax(logits))
            for i, parts in pieces.items():
                rows[begin + i] = np.concatenate(parts)
        return rows

    # --- texts that go on by themselves -------------------------------------------------------

    def opening(self, turns: Sequence[Turn]) -> list[int]:
        """Tokens that a text goes on from: those of the turns, or of the first question alone if
        turns are marked, for behind a marked turn nothing but the mark of the next can follow."""
        return self.prompt(turns[:1]) if self.chat == "auto" else self.history(turns)

    def write(self, openings: Sequence[Turns], under: Injection,
              uniforms: np.ndarray) -> list[list[int]]:
        """Tokens that continue each opening at temperature 1, by `uniforms` [openings, tokens]."""
        texts: list[list[int]] = []
        for begin in range(0, len(openings), self.context.sequences):
            group = openings[begin : begin + self.context.sequences]
            logits = self._reopened({s: self.opening(turns) for s, turns in enumerate(group)},
                                    under, [[]] * len(group), "last")
            drawn = dict(enumerate(uniforms[begin:][: len(group)]))
            written = generate_tokens(self.context, logits, uniforms.shape[1], frozenset(), drawn)
            texts += [written[s] for s in range(len(group))]
        return texts

    def read_written(self, openings: Sequence[Turns], written: Sequence[list[int]],
                     under: Injection) -> list[np.ndarray]:
        """Log probabilities behind each token `written` after its opening, float32 [tokens,
        vocabulary]."""
        found: list[np.ndarray] = []
        for begin in range(0, len(openings), self.context.sequences):
            group = openings[begin : begin + self.context.sequences]
            rows = self._reopened({s: self.opening(turns) for s, turns in enumerate(group)},
                                  under, written[begin:][: len(group)], "all")
            found += [log_softmax(rows[s]) for s in range(len(group))]
        return found

    def _reopened(self, openings: dict[int, list[int]], under: Injection,
                  tails: Sequence[list[int]], logits: Literal["last", "all"],
                  ) -> dict[int, np.ndarray]:
        """Logits behind openings and tails, which are the injection's turns 0 and 1."""
        self._clear()
        under.turn(self.context, 0)
        self.context.prefill(openings)
        under.turn(self.context, 1)
        return self.context.prefill({s: [*ids, *tails[s]] for s, ids in openings.items()}, logits)

    # --- words --------------------------------------------------------------------------------

    def word_probabilities(
        self, last: Mapping[int, np.ndarray], words: Sequence[str]
    ) -> dict[int, np.ndarray]:
        """P(word | content), lower-case or capitalised, for each sequence, float64 [words].

        `last` holds the logits [vocabulary] behind each sequence's content, a prompt. Words of
        several tokens are decoded behind all sequences together and forgotten again.
        """
        probe = [Turn("U", "is it?", "is_it")]
        first = dict(zip(last, _exact_log_softmax(np.stack(list(last.values()))), strict=True))
        result = {s: np.zeros(len(words)) for s in last}
        for index, word in enumerate(words):
            for tokens in self.continuations(probe, "", (word, word.capitalize())):
                scores = {s: row[tokens[0]] for s, row in first.items()}
                if len(tokens) > 1:
                    lengths = {s: len(self.context.tokens[s]) for s in last}
                    rows = self.context.decode(dict.fromkeys(last, tokens[:-1]), "all")
                    for s in last:
                        steps = _exact_log_softmax(rows[s])
                        scores[s] += steps[np.arange(len(steps)), tokens[1:]].sum()
                        self.context.rewind(s, lengths[s])
                for s, score in scores.items():
                    result[s][index] += np.exp(score)
        return result

    def continuations(self, turns: Sequence[Turn], stem: str,
                      values: Sequence[str]) -> list[list[int]]:
        """Tokens of each value behind the prompt with `stem`.

        Raises ValueError where the tokenizer joins the prompt's end with a value.
        """
        prompt = self.prompt(turns, stem)
        longer = [self.prompt(turns, f"{stem} {value}".strip()) for value in values]
        kept, tokens = rendering.continuations(prompt, longer)
        if kept < len(prompt):
            raise ValueError(f"this tokenizer joins {stem or 'the prompt'!r} with the word behind "
                             f"it ({', '.join(values)}): the window cannot be continued")
        return tokens

    def scores(
        self,
        last: Mapping[int, np.ndarray],
        continuations: Mapping[int, Sequence[Sequence[int]]],
    ) -> dict[int, np.ndarray]:
        """log P(continuation | content) for each sequence's continuations, float64 [n].

        `last` holds the logits [vocabulary] behind each sequence's content. Continuations of
        several tokens are decoded together, in the n sequences behind each, which then have its
        commitment for their own.
        """
        first = dict(zip(last, _exact_log_softmax(np.stack(list(last.values()))), strict=True))
        result = {s: np.array([first[s][tokens[0]] for tokens in several])
                  for s, several in continuations.items()}
        longer = {}
        for sequence, several in continuations.items():
            for offset, tokens in enumerate(several):
                if len(tokens) > 1:
                    copy = sequence + 1 + offset
                    self.context.fork(sequence, [copy])
                    own = self.context.committed(sequence)
                    if own is not self.context.committed(copy):
                        self.context.commit(own, sequence=copy)
                    longer[copy] = (sequence, offset, tokens)
        rows = self.context.decode({s: tokens[:-1] for s, (_, _, tokens) in longer.items()}, "all")
        for copy, (sequence, offset, tokens) in longer.items():
            steps = _exact_log_softmax(rows[copy])
            result[sequence][offset] += steps[np.arange(len(steps)), tokens[1:]].sum()
        return result


def _exact_log_softmax(logits: np.ndarray) -> np.ndarray:
    return log_softmax(logits.astype(np.float64))


@dataclass(frozen=True)
class EngineSettings:
    """Which model is spoken to, and how: the same settings speak alike in every process.

    sequences, window: of the context; gpu_layers: layers on the GPU, of a llama.cpp built for it;
    threads: how many it computes with, 0 for one of a small model and all there are of a large one.
    """

    gguf: Path
    sequences: int
    window: int
    chat: str = "plain"
    gpu_layers: int = 0
    system: str = ""
    threads: int = 0


class Engine:
    """A model in memory and a speaker of it, used by one at a time. A context manager, or `close`
    it; what is used after that is opened again. `settings` have their threads decided, so that
    other processes can open the same."""

    def __init__(self, settings: EngineSettings) -> None:
        self._stack, self._opened = ExitStack(), dict[str, Any]()
        self.settings = settings
        if settings.chat == "plain" and self.model.chat_template is not None:
            warnings.warn(f"{settings.gguf.name} was taught to chat in a template of its own and "
                          "is spoken to in plain lines; chat=auto uses its template", stacklevel=2)
        self.small = self.model.parameters <= SMALL
        self.settings = replace(
            settings, threads=settings.threads or (1 if self.small else usable_threads()))

    @property
    def model(self) -> Model:
        """The weights."""
        if "model" not in self._opened:
            self._opened["model"] = self._stack.enter_context(
                Model(self.settings.gguf, self.settings.gpu_layers))
        model: Model = self._opened["model"]
        return model

    @property
    def speaker(self) -> LlamaCppSpeaker:
        """The one who speaks, in a context of the settings' size."""
        if "speaker" not in self._opened:
            asked = self.settings
            context = Context(self.model, asked.sequences, asked.window, threads=asked.threads,
                              cache_type="f16")
            self._opened["speaker"] = LlamaCppSpeaker(
                self._stack.enter_context(context), asked.chat, asked.system)
        speaker: LlamaCppSpeaker = self._opened["speaker"]
        return speaker

    def make_room(self) -> None:
        """Free the GPU's memory, if the model is there, for other processes that open the same."""
        if self.settings.gpu_layers:
            self.close()

    def residual_norms(self, texts: Sequence[Turns]) -> np.ndarray:
        """Mean ‖h‖ after each layer of the unmodified model, over all tokens of `texts`, [layers].

        In a context of its own, in f32.
        """
        asked = self.settings
        with Context(self.model, min(16, asked.sequences), asked.window, usable_threads(),
                     watch_residual=True) as context:
            LlamaCppSpeaker(context, asked.chat, asked.system).read(texts, Injection())
            return context.residual_norms()

    def close(self) -> None:
        """Free the context and the model."""
        self._stack.close()
        self._opened.clear()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
