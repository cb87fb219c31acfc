"""From contexts and histories to metrics and table rows, and the mandated CVFP reports."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from lablog.cvfp import checks
from lablog.cvfp.convergence import Trials
from lablog.cvfp.memory import memory_length
from lablog.cvfp.passes import Passes
from lablog.cvfp.phase1 import Phase1Result
from lablog.cvfp.phase2 import Phase2Result, Predictions
from lablog.cvfp.rollout import Rollout, relative_errors
from lablog.intervals import Interval, geometric_over_seeds, over_seeds
from lablog.run import Run


def record_contexts(
    run: Run, key: str, contexts: Mapping[str, Tensor], tokens: Mapping[str, Tensor]
) -> list[dict[str, Any]]:
    """Checks 1 and 2 of one network or control on each split; returns the table's rows."""
    rows = []
    for split, c in contexts.items():
        rank, same = checks.effective_rank(c), checks.identity_mapping(c, tokens[split])
        row: dict[str, Any] = {"network": key, "split": split, "tokens": len(c)}
        for name in ("value", "centred", "energy", "centred_energy"):
            value = getattr(rank, name)
            row[name if name != "value" else "effective rank"] = value
            suffix = "" if name == "value" else f"_{name}"
            run.metric(f"{key}.{split}.effective_rank{suffix}", value / rank.dimensions, "fraction",
                       numerator=value, denominator=rank.dimensions, n=len(c))
        row |= {"share": rank.fraction, "mean cosine": checks.mean_cosine(c),
                "from zero": same.from_zero, "to embedding": same.to_embedding,
                "check 1": rank.verdict(split), "check 2": same.verdict}
        run.metric(f"{key}.{split}.mean_cosine", row["mean cosine"], "", n=len(c))
        run.metric(f"{key}.{split}.from_zero", same.from_zero, "", n=len(c))
        run.metric(f"{key}.{split}.to_embedding", same.to_embedding, "", n=len(c))
        run.metric(f"{key}.{split}.check1", rank.verdict(split), "class", n=len(c))
        run.metric(f"{key}.{split}.check2", same.verdict, "class", n=len(c))
        rows.append(row)
    return rows


def record_history(run: Run, key: str, result: Phase1Result) -> pd.DataFrame:
    """Convergence, CVFP loss and iterations of a training; returns one row per iteration."""
    history, last = result.history, result.history[-1]
    run.metric(f"{key}.training.convergence", last.converged / last.tokens, "fraction",
               numerator=last.converged, denominator=last.tokens)
    run.metric(f"{key}.cvfp_loss", last.cvfp_loss, "", n=last.tokens)
    run.metric(f"{key}.cvfp_loss.first", history[0].cvfp_loss, "", n=last.tokens)
    run.metric(f"{key}.cvfp_loss.largest", max(h.cvfp_loss for h in history), "", n=last.tokens)
    run.metric(f"{key}.iterations", result.iterations_done, "count",
               numerator=result.iterations_done, denominator=result.planned)
    frame = pd.DataFrame([vars(h) for h in history])
    return frame.assign(network=key, share=frame["converged"] / frame["tokens"])


def record_passes(run: Run, key: str, passes: Passes) -> dict[str, Any]:
    """Check 3 on repeated passes with frozen weights; returns the table's row."""
    differences, tokens = passes.differences, len(passes.contexts)
    found, converged = checks.convergence(differences), passes.converged[-1]
    run.metric(f"{key}.convergence", converged / tokens, "fraction", numerator=converged,
               denominator=tokens)
    run.metric(f"{key}.final_diff", found.final_diff, "", n=tokens)
    run.metric(f"{key}.check3", found.verdict, "class", n=tokens)
    return {"passes": key, "first": differences[0], "final_diff": found.final_diff,
            "shrinking": found.shrinking, "converged": converged / tokens,
            "check 3": found.verdict}


def record_mean(run: Run, name: str, values: Sequence[float], unit: str, seeds: Sequence[int],
                log: bool = False) -> None:
    """A mean over seeds (of logarithms if `log`) with its t interval (none for one seed)."""
    mean = math.exp(float(np.mean(np.log(values)))) if log else float(np.mean(values))
    method = geometric_over_seeds if log else over_seeds
    run.metric(name, mean, unit, seeds=tuple(seeds), n=len(values),
               interval=method(values) if len(values) > 1 else None)


def batch_means(values: Tensor, batches: int = 10) -> Interval | None:
    """Interval of the mean of a correlated series from the means of consecutive batches."""
    size = len(values) // batches
    if size < 2:
        return None
    found = over_seeds(values[: size * batches].view(batches, size).mean(1).tolist())
    return Interval(found.low, found.high, f"t over {batches} batch means")


def bootstrap_perplexity(
    predictions: Predictions, block: int, draws: int = 2000, seed: int = 0
) -> Interval:
    """Percentile bootstrap of the perplexity over consecutive dialogues of `block` tokens."""
    blocks = [float(part.double().sum()) for part in predictions.nll.split(block)]
    sizes = np.array([len(part) for part in predictions.nll.split(block)])
    picks = np.random.default_rng(seed).integers(0, len(blocks), (draws, len(blocks)))
    replicas = np.exp(np.array(blocks)[picks].sum(1) / sizes[picks].sum(1))
    low, high = np.percentile(replicas, [2.5, 97.5])
    return Interval(float(low), float(high), f"bootstrap over {len(blocks)} dialogues")


def record_predictions(run: Run, key: str, predictions: Mapping[str, Predictions], block: int,
                       best: Phase2Result | None = None) -> dict[str, Any]:
    """Perplexity (with a bootstrap interval) and accuracy on each text; the table's row."""
    row: dict[str, Any] = {"arm": key}
    for split, found in predictions.items():
        n = len(found.nll)
        row[f"{split} perplexity"], row[f"{split} accuracy"] = found.perplexity, found.accuracy
        run.metric(f"{key}.{split}.perplexity", found.perplexity, "", n=n,
                   interval=bootstrap_perplexity(found, block))
        run.metric(f"{key}.{split}.accuracy", found.accuracy, "fraction", n=n,
                   numerator=float(found.correct.sum()), denominator=n)
    if best is not None:
        epoch = best.best
        run.metric(f"{key}.best_epoch", epoch.epoch, "count", numerator=epoch.epoch,
                   denominator=len(best.history))
        run.metric(f"{key}.training.perplexity", epoch.train_perplexity, "")
        run.metric(f"{key}.training.accuracy", epoch.train_accuracy, "fraction")
        row |= {"best epoch": epoch.epoch, "training perplexity": epoch.train_perplexity}
    return row


def record_ratio(run: Run, name: str, other: Predictions, ours: Predictions,
                 block: int) -> dict[str, float]:
    """Perplexity of `other` over that of `ours` on the same tokens, resampled over dialogues."""
    nll = other.nll.double() - ours.nll.double()
    difference = Predictions(nll, nll > 0)
    spread = bootstrap_perplexity(difference, block)
    run.metric(name, difference.perplexity, "ratio", n=len(nll), interval=spread)
    return {"ratio": difference.perplexity, "low": spread.low, "high": spread.high}


def record_trials(run: Run, key: str, differences: Sequence[float]) -> Trials:
    """Slope, spread and class that the convergence tool reads in the changes of each pass."""
    trials, n = Trials(tuple(differences)), len(differences)
    run.metric(f"{key}.trials.slope", trials.slope, "per trial", n=n)
    run.metric(f"{key}.trials.spread", trials.spread, "", n=n)
    run.metric(f"{key}.trials.class", trials.verdict, "class", n=n)
    return trials


def record_exponent(run: Run, key: str, growth: Tensor) -> dict[str, Any]:
    """Lyapunov exponent per token, the mean of `growth` [n], with its interval; the table's row."""
    spread, mean = batch_means(growth), float(growth.mean())
    run.metric(f"{key}.lyapunov", mean, "per token", n=len(growth), interval=spread)
    return {"network": key, "exponent": mean, "low": spread and spread.low,
            "high": spread and spread.high}


def record_memory(run: Run, key: str, curve: Tensor, threshold: float) -> None:
    """Effective memory length, and the median difference at the end of `curve` [distance, p]."""
    length, (distances, positions) = memory_length(curve, threshold), curve.shape
    why = None if length is not None else f"above {threshold} to the end, {distances - 1} tokens"
    run.metric(f"{key}.memory_length", length, "tokens", n=positions, undefined=why)
    run.metric(f"{key}.memory_at_end", float(curve[-1].median()), "", n=positions)


def record_rollout(run: Run, key: str, found: Rollout, exact: Tensor) -> dict[str, Any]:
    """Largest error against the loop's contexts `exact`, passes per token, and tokens that the
    loop did; the table's row."""
    n, error = len(found.contexts), float(relative_errors(found.contexts, exact).max())
    run.metric(f"{key}.error", error, "", n=n)
    run.metric(f"{key}.passes", found.passes, "per token", n=n)
    run.metric(f"{key}.loop_tokens", found.sequential_tokens, "count",
               numerator=found.sequential_tokens, denominator=n)
    return {"passes": found.passes, "fell back": found.fell_back, "largest error": error}
