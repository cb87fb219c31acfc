"""What a commitment does to the model's language: numbers, and the log's words for them.

All divergences are D_KL(p_λ ‖ p_0) in nats per token, from the next-token distribution under the
commitment to the unmodified model's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from lablog.commitment.window import Injection, Speech
from lablog.models.llama_cpp import Context, generate_tokens
from lablog.text.dialogues import DialogueSettings, Turn
from lablog.text.dialogues import generate as generate_dialogue


@dataclass(frozen=True)
class Thresholds:
    """When the lab log's words apply; fixed before any measurement, relative to λ = 0."""

    perplexity_ratio: float = 1.5
    same_top_token: float = 0.5
    repeated_4grams: float = 0.10

    def __str__(self) -> str:
        return (
            f"incoherent: held-out perplexity above {self.perplexity_ratio} × that at λ = 0, or "
            f"the most probable token the same as at λ = 0 in less than "
            f"{100 * self.same_top_token:.0f}% of positions; repetitive: rate of repeated 4-grams "
            f"more than {100 * self.repeated_4grams:.0f} points above λ = 0; coherent: neither"
        )


@dataclass(frozen=True)
class Coherence:
    """Coherence of one configuration; KL in nats per token, rates in [0, 1]."""

    perplexity: float
    kl_mean: float
    kl_p95: float
    same_top: float
    own_kl_mean: float
    own_kl_p95: float
    repeated_4grams: float
    distinct_1: float
    distinct_2: float

    def word(self, baseline: Coherence, thresholds: Thresholds) -> str:
        """The lab log's word for this configuration against the baseline at λ = 0."""
        if (self.perplexity > thresholds.perplexity_ratio * baseline.perplexity
                or self.same_top < thresholds.same_top_token):
            return "incoherent"
        if self.repeated_4grams > baseline.repeated_4grams + thresholds.repeated_4grams:
            return "coherent but repetitive"
        return "coherent"


@dataclass(frozen=True)
class Material:
    """Held-out dialogues to read and openings to continue; the same for all configurations."""

    texts: tuple[tuple[Turn, ...], ...]
    uniforms: np.ndarray  # [continuations, tokens], picks the continuations at temperature 1
    base: dict[int, np.ndarray] = field(default_factory=dict, compare=False)

    @property
    def openings(self) -> dict[int, tuple[Turn, ...]]:
        """The first exchange of as many texts as are to be continued."""
        return {index: self.texts[index][:2] for index in range(len(self.uniforms))}


def make_material(settings: DialogueSettings, seed: int, texts: int, continuations: int,
                  tokens: int) -> Material:
    """Held-out favourites and random numbers for `continuations` ≤ `texts` continuations."""
    if not 1 <= continuations <= texts:
        raise ValueError(f"continuations = {continuations}: expected 1 to texts = {texts}")
    dialogues = [
        generate_dialogue(settings, seed, index, "held_out", "favourite", "probe").turns
        for index in range(texts)
    ]
    uniforms = np.random.default_rng([seed, 103]).random((continuations, tokens))
    return Material(tuple(dialogues), uniforms)


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """Logarithm of the softmax over the last axis, float32 like its input."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def _divergence(committed: np.ndarray, base: np.ndarray) -> np.ndarray:
    """D_KL of each row of log probabilities, float64 [rows]."""
    return np.einsum("ij,ij->i", np.exp(committed), committed - base).astype(np.float64)


def read(speech: Speech, texts: Sequence[Sequence[Turn]], injection: Injection) -> list[np.ndarray]:
    """Log probabilities behind every token of each text, float32 [tokens, vocabulary]."""
    context, rows = speech.context, [np.empty(0)] * len(texts)
    for begin in range(0, len(texts), context.sequences):
        group = dict(enumerate(texts[begin : begin + context.sequences]))
        context.clear()
        longest = max(map(len, group.values()))
        ends = range(2, longest + 2, 2) if injection.changes else [longest]
        pieces: dict[int, list[np.ndarray]] = {i: [] for i in group}
        for number, end in enumerate(ends):
            injection.turn(context, number)
            told = {i: speech.history(turns[:end]) for i, turns in group.items()
                    if number == 0 or len(turns) > end - 2}
            for i, logits in context.prefill(told, "all").items():
                pieces[i].append(log_probabilities(logits))
        for i, parts in pieces.items():
            rows[begin + i] = np.concatenate(parts)
    return rows


def read_divergence(speech: Speech, material: Material,
                    injection: Injection) -> tuple[float, np.ndarray, float]:
    """Perplexity, KL per token [tokens] and same-top-token rate on the held-out texts.

    `material.base` is filled by the first call (which must inject nothing).
    """
    rows = read(speech, material.texts, injection)
    if not material.base:
        if injection.commitments:
            raise ValueError("the first reading of the material must be of the unmodified model")
        material.base.update(enumerate(rows))
    loss, divergence, same = [], [], []
    for index, committed in enumerate(rows):
        base = material.base[index]
        targets = np.array(speech.history(material.texts[index])[1:])
        loss.append(-committed[np.arange(len(targets)), targets])
        divergence.append(_divergence(committed, base))
        same.append(committed.argmax(axis=1) == base.argmax(axis=1))
    return (float(np.exp(np.concatenate(loss).mean(dtype=np.float64))), np.concatenate(divergence),
            float(np.concatenate(same).mean()))


def continuations(speech: Speech, material: Material,
                  injection: Injection) -> tuple[list[list[int]], list[np.ndarray]]:
    """The model's own continuations and KL to the unmodified model at each of their tokens."""
    context: Context = speech.context
    texts: list[list[int]] = []
    divergence: list[np.ndarray] = []
    openings = {i: speech.history(turns) for i, turns in material.openings.items()}
    count = material.uniforms.shape[1]
    for begin in range(0, len(openings), context.sequences):
        chosen = range(begin, min(begin + context.sequences, len(openings)))
        group = {i - begin: openings[i] for i in chosen}

        def under(applied: Injection, tails: dict[int, list[int]],
                  group: dict[int, list[int]] = group) -> dict[int, np.ndarray]:
            context.clear()
            applied.turn(context, 0)
            context.prefill(group)
            applied.turn(context, 1)
            told = {s: [*opening, *tails[s]] for s, opening in group.items()}
            return {s: log_probabilities(r) for s, r in context.prefill(told, "all").items()}

        context.clear()
        injection.turn(context, 0)
        context.prefill(group)
        injection.turn(context, 1)
        uniforms = {s: material.uniforms[begin + s] for s in group}
        written = generate_tokens(context, context.prefill(group), count, frozenset(), uniforms)
        texts += [written[s] for s in group]
        mine, base = under(injection, written), under(Injection(), written)
        divergence += [_divergence(mine[s], base[s]) for s in group]
    return texts, divergence


def repeated_ngrams(tokens: Sequence[int], n: int = 4) -> float:
    """Share of a text's n-grams that repeat an earlier one (0 for texts shorter than n)."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def distinct(texts: Sequence[Sequence[int]], n: int) -> float:
    """Distinct n-grams over all n-grams of several texts (Li et al., NAACL 2016)."""
    grams = [tuple(t[i : i + n]) for t in texts for i in range(len(t) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def measure(speech: Speech, material: Material, injection: Injection) -> Coherence:
    """All coherence metrics of one configuration."""
    perplexity, divergence, same = read_divergence(speech, material, injection)
    texts, own = continuations(speech, material, injection)
    own_divergence = np.concatenate(own)
    return Coherence(
        perplexity=perplexity, kl_mean=float(divergence.mean()),
        kl_p95=float(np.percentile(divergence, 95)), same_top=same,
        own_kl_mean=float(own_divergence.mean()),
        own_kl_p95=float(np.percentile(own_divergence, 95)),
        repeated_4grams=float(np.mean([repeated_ngrams(text) for text in texts])),
        distinct_1=distinct(texts, 1), distinct_2=distinct(texts, 2),
    )
