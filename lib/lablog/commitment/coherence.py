"""What a commitment does to the model's language: numbers, and the log's words for them.

All divergences are D_KL(p_λ ‖ p_0) in nats per token, from the next-token distribution under the
commitment to the unmodified model's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lablog.commitment.language import divergences, reading
from lablog.commitment.llama_cpp_speaker import Engine, Injection, LlamaCppSpeaker
from lablog.text.dialogues import DialogueSettings, Turn, generate


@dataclass(frozen=True)
class Thresholds:
    """When the lab log's words apply; fixed before any measurement, relative to λ = 0.

    Incoherent: the held-out perplexity is above `perplexity_ratio` times that at λ = 0, or the most
    probable token the same in less than the share `same_top_token` of positions. Repetitive: the
    rate of repeated 4-grams is more than `repeated_4grams` above that at λ = 0.
    """

    perplexity_ratio: float = 1.5
    same_top_token: float = 0.5
    repeated_4grams: float = 0.10


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

    @property
    def openings(self) -> list[tuple[Turn, ...]]:
        """The first exchange of as many texts as are to be continued."""
        return [turns[:2] for turns in self.texts[: len(self.uniforms)]]


@dataclass(frozen=True)
class Baseline:
    """The unmodified model: log probabilities behind the tokens of each text of the material,
    float32 [tokens, vocabulary], and its coherence."""

    log_probabilities: tuple[np.ndarray, ...]
    coherence: Coherence


def make_material(settings: DialogueSettings, seed: int, texts: int, continuations: int,
                  tokens: int) -> Material:
    """Held-out favourites and random numbers for `continuations` ≤ `texts` continuations."""
    if not 1 <= continuations <= texts:
        raise ValueError(f"continuations = {continuations}: expected 1 to texts = {texts}")
    dialogues = [
        generate(settings, seed, index, "held_out", "favourite", "probe").turns
        for index in range(texts)
    ]
    uniforms = np.random.default_rng([seed, 103]).random((continuations, tokens))
    return Material(tuple(dialogues), uniforms)


def divergence(speaker: LlamaCppSpeaker, material: Material, injection: Injection,
               baseline: Baseline) -> np.ndarray:
    """KL to the unmodified model at every token of the held-out texts, float64 [tokens]."""
    rows = speaker.read(material.texts, injection)
    return np.concatenate([divergences(mine, base) for mine, base
                           in zip(rows, baseline.log_probabilities, strict=True)])


def repeated_ngrams(tokens: Sequence[int], n: int = 4) -> float:
    """Share of a text's n-grams that repeat an earlier one (0 for texts shorter than n)."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def distinct(texts: Sequence[Sequence[int]], n: int) -> float:
    """Distinct n-grams over all n-grams of several texts (Li et al., NAACL 2016)."""
    grams = [tuple(t[i : i + n]) for t in texts for i in range(len(t) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def baseline(engine: Engine, material: Material) -> Baseline:
    """What the unmodified model makes of the material."""
    rows = tuple(engine.speaker.read(material.texts, Injection()))
    return Baseline(rows, _coherence(engine.speaker, material, Injection(), rows, rows))


def coherence(speaker: LlamaCppSpeaker, material: Material, injection: Injection,
              baseline: Baseline) -> Coherence:
    """All coherence metrics of one configuration."""
    return _coherence(speaker, material, injection, speaker.read(material.texts, injection),
                      baseline.log_probabilities)


def _coherence(speaker: LlamaCppSpeaker, material: Material, injection: Injection,
               rows: Sequence[np.ndarray], base: Sequence[np.ndarray]) -> Coherence:
    read = []
    for turns, mine, unmodified in zip(material.texts, rows, base, strict=True):
        targets = np.array(speaker.history(turns)[1:])
        read.append(reading(mine, unmodified, targets))
    texts = speaker.write(material.openings, injection, material.uniforms)
    own = [divergences(mine, unmodified) for mine, unmodified in zip(
        *(speaker.read_written(material.openings, texts, under)
          for under in (injection, Injection())), strict=True)]
    kl, own_kl = np.concatenate([text.divergence for text in read]), np.concatenate(own)
    return Coherence(
        perplexity=float(np.exp(np.concatenate(
            [text.loss for text in read]).mean(dtype=np.float64))),
        kl_mean=float(kl.mean()), kl_p95=float(np.percentile(kl, 95)),
        same_top=float(np.concatenate([text.same_top for text in read]).mean()),
        own_kl_mean=float(own_kl.mean()), own_kl_p95=float(np.percentile(own_kl, 95)),
        repeated_4grams=float(np.mean([repeated_ngrams(text) for text in texts])),
        distinct_1=distinct(texts, 1), distinct_2=distinct(texts, 2),
    )
