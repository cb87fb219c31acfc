"""From what was measured of CVFP to metrics, which a notebook records under its own names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from lablog.cvfp import checks
from lablog.cvfp.contraction import Contraction
from lablog.cvfp.convergence import Trials
from lablog.cvfp.lyapunov import batch_means
from lablog.cvfp.memory import memory_length
from lablog.cvfp.passes import Passes
from lablog.cvfp.phase1 import Phase1Result
from lablog.cvfp.phase2 import Phase2History, Predictions
from lablog.cvfp.rollout import Rollout, relative_errors
from lablog.intervals import Interval, percentiles, perplexity, ratio_replicas
from lablog.record import Metric


@dataclass(frozen=True)
class Spread:
    """Checks 1 and 2 of the contexts of one text: how far they spread, and away from what."""

    split: str
    rank: checks.EffectiveRank
    mean_cosine: float
    identity: checks.Identity

    @classmethod
    def of(cls, contexts: Tensor, tokens: Tensor, split: str) -> Spread:
        """Of contexts [n, d] of embeddings [n, d]; `split` (training or validation) has a threshold
        of its own."""
        return cls(split, checks.effective_rank(contexts), checks.mean_cosine(contexts),
                   checks.identity_mapping(contexts, tokens))

    @property
    def metrics(self) -> list[Metric]:
        """All ranks as shares of the dimensions, the cosines, and the verdicts."""
        rank, n = self.rank, self.rank.tokens
        ranks = {"": rank.value, "_centred": rank.centred, "_energy": rank.energy,
                 "_centred_energy": rank.centred_energy}
        return [
            *(Metric(name=f"effective_rank{kind}", value=value / rank.dimensions, unit="fraction",
                     numerator=value, denominator=rank.dimensions, n=n)
              for kind, value in ranks.items()),
            Metric(name="mean_cosine", value=self.mean_cosine, unit="", n=n),
            Metric(name="from_zero", value=self.identity.from_zero, unit="", n=n),
            Metric(name="to_embedding", value=self.identity.to_embedding, unit="", n=n),
            Metric(name="check1", value=rank.verdict(self.split), unit="class", n=n),
            Metric(name="check2", value=self.identity.verdict, unit="class", n=n),
        ]

    @property
    def row(self) -> dict[str, Any]:
        """The same for a table, with ranks in dimensions."""
        rank, identity = self.rank, self.identity
        return {
            "tokens": rank.tokens, "effective rank": rank.value, "centred": rank.centred,
            "energy": rank.energy, "centred_energy": rank.centred_energy, "share": rank.fraction,
            "mean cosine": self.mean_cosine, "from zero": identity.from_zero,
            "to embedding": identity.to_embedding, "check 1": rank.verdict(self.split),
            "check 2": identity.verdict,
        }


def phase1_training(result: Phase1Result) -> list[Metric]:
    """Convergence, CVFP loss and iterations of a training."""
    history, last = result.history, result.history[-1]
    return [
        Metric(name="training.convergence", value=last.converged / last.tokens, unit="fraction",
               numerator=last.converged, denominator=last.tokens),
        Metric(name="cvfp_loss", value=last.cvfp_loss, unit="", n=last.tokens),
        Metric(name="cvfp_loss.first", value=history[0].cvfp_loss, unit="", n=last.tokens),
        Metric(name="cvfp_loss.largest", value=max(h.cvfp_loss for h in history), unit="",
               n=last.tokens),
        Metric(name="iterations", value=result.iterations_done, unit="count",
               numerator=result.iterations_done, denominator=result.planned),
    ]


def iterations(result: Phase1Result, network: str) -> pd.DataFrame:
    """A row for each iteration of a training, with the share of tokens that converged."""
    frame = pd.DataFrame([asdict(iteration) for iteration in result.history])
    return frame.assign(network=network, share=frame["converged"] / frame["tokens"])


def observed(result: Phase1Result, network: str, before: Contraction) -> pd.DataFrame:
    """A row for each iteration of a watched training, and one for the network `before` it."""
    frame = pd.DataFrame([asdict(before), *result.observed])
    numbers = [0, *(row.iteration for row in result.history)]
    return frame.assign(network=network, iteration=numbers)


def learnt_contraction(rows: pd.DataFrame) -> list[Metric]:
    """Exponent and spectral norm of the last row of `observed`, and their change in all."""
    first, last = rows.iloc[0], rows.iloc[-1]
    return [Metric.of(f"{name}{end}", value, unit) for name, unit in
            (("exponent", "per token"), ("spectral_norm", ""))
            for end, value in (("", float(last[name])),
                               (".change", float(last[name] - first[name])))]


def check_3(passes: Passes) -> list[Metric]:
    """Check 3 on repeated passes with frozen weights."""
    found = checks.convergence(passes.differences)
    converged, n = passes.converged[-1], len(passes.contexts)
    return [
        Metric(name="convergence", value=converged / n, unit="fraction", numerator=converged,
               denominator=n),
        Metric(name="final_diff", value=found.final_diff, unit="", n=n),
        Metric(name="check3", value=found.verdict, unit="class", n=n),
    ]


def trials(found: Trials) -> list[Metric]:
    """Slope, spread and class that the convergence tool reads in the changes of each pass."""
    n = len(found.losses)
    return [
        Metric(name="trials.slope", value=found.slope, unit="per trial", n=n),
        Metric(name="trials.spread", value=found.spread, unit="", n=n),
        Metric(name="trials.class", value=found.verdict, unit="class", n=n),
    ]


def exponent(growth: Tensor) -> list[Metric]:
    """Lyapunov exponent per token: the mean of `growth` [n], with its interval."""
    return [Metric.of("lyapunov", float(growth.mean()), "per token", n=len(growth),
                      interval=batch_means(growth))]


def memory(curve: Tensor, threshold: float) -> list[Metric]:
    """Effective memory length, and the median difference at the end of `curve` [distance, p]."""
    length, (distances, positions) = memory_length(curve, threshold), curve.shape
    why = None if length is not None else f"above {threshold} to the end, {distances - 1} tokens"
    return [
        Metric(name="memory_length", value=length, unit="tokens", n=positions, undefined=why),
        Metric(name="memory_at_end", value=float(curve[-1].median()), unit="", n=positions),
    ]


def memory_over_seeds(variant: str, curves: Sequence[Tensor], threshold: float,
                      seeds: Sequence[int]) -> Metric:
    """Mean effective memory length of a variant's networks, a curve [distance, p] of each of the
    `seeds`; undefined where one does not forget within the distances."""
    name, lengths = f"{variant}.memory_length", [memory_length(one, threshold) for one in curves]
    forgot = [float(length) for length in lengths if length is not None]
    if len(forgot) == len(lengths):
        return Metric.over_seeds(name, forgot, "tokens", seeds)
    return Metric.of(name, None, "tokens", seeds=tuple(seeds), undefined=(
        f"above {threshold} to the end, {len(curves[0]) - 1} tokens, in "
        f"{len(lengths) - len(forgot)} of {len(lengths)} seeds"))


def accuracy_of(found: Rollout, exact: Tensor) -> list[Metric]:
    """Largest and median error against contexts `exact` [n, d], contexts computed per token, and
    tokens that the loop did."""
    n, errors = len(found.contexts), relative_errors(found.contexts.to(exact), exact)
    return [
        Metric(name="error", value=float(errors.max()), unit="", n=n),
        Metric(name="error_median", value=float(errors.median()), unit="", n=n),
        Metric(name="passes", value=found.passes, unit="per token", n=n),
        Metric(name="loop_tokens", value=found.sequential_tokens, unit="count",
               numerator=found.sequential_tokens, denominator=n),
    ]


def bootstrap_perplexity(
    predictions: Predictions, block: int, draws: int = 2000, seed: int = 0
) -> Interval:
    """Bootstrap of the perplexity over consecutive dialogues of `block` tokens, at least two, with
    percentiles expanded for their number."""
    dialogues = predictions.nll.split(block)
    totals = np.array([float(dialogue.double().sum()) for dialogue in dialogues])
    sizes = np.array([len(dialogue) for dialogue in dialogues])
    replicas = np.exp(ratio_replicas(totals, sizes, draws, seed))
    return percentiles(replicas, f"bootstrap over {len(dialogues)} dialogues", len(dialogues))


def predictions(found: Predictions, block: int) -> list[Metric]:
    """Perplexity of a text, bootstrapped over its dialogues of `block` tokens, and accuracy."""
    n = len(found.nll)
    return [
        Metric.of("perplexity", found.perplexity, "", n=n,
                  interval=bootstrap_perplexity(found, block)),
        Metric(name="accuracy", value=found.accuracy, unit="fraction", n=n,
               numerator=float(found.correct.sum()), denominator=n),
    ]


def phase2_training(result: Phase2History) -> list[Metric]:
    """The best epoch of a training, and how the training text was predicted during it."""
    best = result.best
    return [
        Metric(name="best_epoch", value=best.epoch, unit="count", numerator=best.epoch,
               denominator=len(result.history)),
        Metric(name="learning_rate", value=result.config.learning_rate, unit=""),
        Metric(name="training.perplexity", value=best.train_perplexity, unit=""),
        Metric(name="training.accuracy", value=best.train_accuracy, unit="fraction"),
    ]


def perplexity_ratio(name: str, other: Predictions, ours: Predictions, block: int) -> Metric:
    """Perplexity of `other` over that of `ours` on the same tokens, resampled over dialogues."""
    nll = other.nll.double() - ours.nll.double()
    difference = Predictions(nll, nll > 0)
    return Metric.of(name, difference.perplexity, "ratio", n=len(nll),
                     interval=bootstrap_perplexity(difference, block))


def perplexity_ratio_over_seeds(
    name: str, others: Sequence[Predictions], ours: Sequence[Predictions], block: int,
    seeds: Sequence[int],
) -> Metric:
    """Perplexity of `others` over that of `ours`, one of each for a seed: the geometric mean over
    `seeds`. They and dialogues of `block` tokens are resampled together."""
    nll = [other.nll.double() - mine.nll.double() for other, mine in zip(others, ours, strict=True)]
    parts = [of_seed.split(block) for of_seed in nll]
    value, found = perplexity([[float(one.sum()) for one in part] for part in parts],
                              [[len(one) for one in part] for part in parts])
    return Metric.of(name, value, "ratio", n=len(nll[0]), seeds=tuple(seeds), interval=replace(
        found, method=found.method.replace(" items", " dialogues")))
