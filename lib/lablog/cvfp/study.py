"""The measurements of notebooks 04 and 05 on a set of networks, recorded as they are made."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import pandas as pd
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from lablog.cvfp import checks, phase2, plots, results
from lablog.cvfp.convergence import Trials
from lablog.cvfp.data import prepare
from lablog.cvfp.model import CVFPBlock, ModelConfig, shifted
from lablog.cvfp.phase1 import (
    DiversityTracker,
    Passes,
    Phase1Config,
    Phase1Result,
    checkpoint_path,
    fingerprint,
    iterate_passes,
    named,
    train,
)
from lablog.cvfp.rollout import Method, lyapunov_exponent, memory_curve, memory_length, rollout
from lablog.determinism import seed_everything
from lablog.files import atomic_write
from lablog.record import Run

TOLERANCE = 1e-4


class Study:
    """Texts, and networks by name; `settings` is Phase 1's with the first seed and adopted w."""

    def __init__(
        self, run: Run, shape: ModelConfig, settings: Phase1Config, seeds: Sequence[int],
        device: str, **text: Any,
    ) -> None:
        """`text` are the keyword arguments of :func:`lablog.cvfp.data.prepare`."""
        seed_everything(seeds[0])
        self.run, self.shape, self.settings, self.seeds = run, shape, settings, list(seeds)
        self.device, self.folder = device, run.artifacts / "cvfp"
        with run.stage("data"):
            self.data = prepare(self.folder, shape, seed=seeds[0], device=device, **text)
        for path in self.data.files.values():
            run.file(path)
        self.training, self.validation = (self.data.tokens[k] for k in ("training", "validation"))
        self.blocks: dict[str, CVFPBlock] = {}
        self.contexts: dict[str, dict[str, Tensor]] = {}
        self.history: list[pd.DataFrame] = []
        self.weights: dict[str, float] = {}
        self.frozen: dict[str, Passes] = {}
        self.again: dict[str, Passes] = {}
        self.table = self.methods = pd.DataFrame()
        self.main = self.name(settings.seed, settings.diversity_weight)
        self.bare = f"untrained.seed{settings.seed}"

    @staticmethod
    def name(seed: int, weight: float) -> str:
        """Name of a trained network."""
        return f"w{weight:g}.seed{seed}"

    @property
    def compared(self) -> list[str]:
        """The adopted w, the smallest w, and the untrained network of the first seed."""
        low = min((w, name) for name, w in self.weights.items())[1]
        return list(dict.fromkeys([self.main, low, self.bare]))

    def read(self, network: str, text: str) -> Tensor:
        """Contexts of one pass over `text` from zero, kept for the chapter that asks again."""
        block, tokens = self.blocks[network], self.data.tokens[text]
        path = named(self.folder, "contexts", fingerprint(block, tokens), ".safetensors")
        if not path.is_file():
            atomic_write(path, save({"contexts": rollout(block, tokens).contexts}))
        return load_file(path, self.device)["contexts"]

    def sizes(self) -> str:
        """Numbers of tokens, as a sentence."""
        kinds = len(self.data.ids["training"].unique())
        counts = {name: len(ids) for name, ids in self.data.ids.items()} | {"distinct": kinds}
        for name, count in counts.items():
            self.run.metric(f"data.{name}_tokens", count, "count")
        return (
            f"{counts['training']:,} training tokens of {kinds:,} kinds, "
            f"{counts['validation']:,} validation tokens, {counts['test']:,} test tokens."
        )

    def iteration_0(self) -> str:
        """Untrained networks of all seeds on training text; facts (a) and (b) as a sentence."""
        with self.run.stage("iteration 0"):
            for seed in self.seeds:
                name = f"untrained.seed{seed}"
                self.blocks[name] = CVFPBlock(self.shape, seed).to(self.device)
                self.contexts[name] = {"training": self.read(name, "training")}
        ranks = [checks.effective_rank(c["training"]).fraction for c in self.contexts.values()]
        results.record_mean(self.run, "untrained.training.effective_rank", ranks, "fraction",
                            self.seeds)
        once = iterate_passes(self.blocks[self.bare], self.training, 2, "parallel",
                              self.settings.convergence_threshold,
                              self.contexts[self.bare]["training"])
        results.record_passes(self.run, "untrained.training.parallel", once)
        mean = 100 * sum(ranks) / len(ranks)
        return (
            f"Untrained: effective rank {mean:.1f} % of the dimensions; {once.converged[0]} of "
            f"{len(self.training)} tokens within the threshold after one more parallel pass."
        )

    def _train(self, config: Phase1Config, tokens: Tensor) -> tuple[CVFPBlock, Phase1Result]:
        block = CVFPBlock(self.shape, config.seed).to(self.device)
        path = checkpoint_path(self.folder, block, tokens, config)
        known = self.contexts.get(f"untrained.seed{config.seed}", {}).get("training")
        initial = None if known is None else known[: len(tokens)]
        return block, train(block, tokens, config, path, initial, progress=True)

    def train(self, other_weights: Sequence[float] = ()) -> None:
        """Every seed at the adopted w, the first one also at `other_weights`."""
        cases = [(seed, self.settings.diversity_weight) for seed in self.seeds]
        for seed, w in cases + [(self.seeds[0], w) for w in other_weights]:
            name = self.name(seed, w)
            with self.run.stage(f"train {name}"):
                config = replace(self.settings, seed=seed, diversity_weight=w)
                self.blocks[name], result = self._train(config, self.training)
            self.weights[name] = w
            self.contexts[name] = {"training": result.contexts}
            self.history.append(results.record_history(self.run, name, result))

    def read_validation(self) -> None:
        """A rollout of the validation text by all, then parallel passes by the compared."""
        with self.run.stage("validation"):
            for name in self.blocks:
                self.contexts[name]["validation"] = self.read(name, "validation")
            for name in self.compared:
                self.frozen[name] = iterate_passes(
                    self.blocks[name], self.validation, self.settings.iterations - 1, "parallel",
                    self.settings.convergence_threshold, self.contexts[name]["validation"],
                )
                results.record_passes(self.run, f"{name}.validation.parallel", self.frozen[name])

    def convergence(self) -> plots.Drawn:
        """Training histories, and frozen passes over validation text: trained and untrained."""
        extra = [
            pd.DataFrame({"network": f"{name}, validation, frozen",
                          "iteration": range(1, 1 + len(self.frozen[name].differences)),
                          "cvfp_loss": self.frozen[name].differences,
                          "share": [c / len(self.validation) for c in self.frozen[name].converged]})
            for name in (self.main, self.bare)
        ]
        return plots.convergence(pd.concat([*self.history, *extra]))

    def check_table(self) -> pd.DataFrame:
        """Checks 1 and 2 on all networks and controls."""
        splits = {"training": self.training, "validation": self.validation}
        one = self.contexts[self.bare]["training"][:1]
        self.contexts["control.constant"] = {k: one.expand(len(t), -1) for k, t in splits.items()}
        self.contexts["control.embeddings"] = dict(splits)
        with self.run.stage("shuffled"):
            self.shuffled = {k: t[self._order(len(t))] for k, t in splits.items()}
            self.contexts["control.shuffled"] = {
                k: rollout(self.blocks[self.main], t).contexts for k, t in self.shuffled.items()}
        rows = [
            row for name, c in self.contexts.items()
            for row in results.record_contexts(
                self.run, name, c, self.shuffled if name == "control.shuffled" else splits)
        ]
        self.table = pd.DataFrame(rows)
        adopted = [self.name(seed, self.settings.diversity_weight) for seed in self.seeds]
        for split in splits:
            part = self.table[(self.table.split == split) & self.table.network.isin(adopted)]
            results.record_mean(self.run, f"parallel.{split}.effective_rank", part.share.tolist(),
                                "fraction", self.seeds)
        return self.table.set_index(["network", "split"]).round(3)

    def _order(self, n: int) -> Tensor:
        """A permutation of n positions, the same in every call."""
        generator = torch.Generator().manual_seed(self.seeds[0])
        return torch.randperm(n, generator=generator).to(self.device)

    def ranks(self) -> str:
        """Effective ranks of trained, untrained and controls, as a sentence."""
        percent = (100 * self.table.set_index(["network", "split"])["share"]).round(1)
        parts = [f"{name}: {percent[name, 'validation']} %" for name in
                 (self.main, self.bare, "control.embeddings", "control.shuffled",
                  "control.constant")]
        return (f"Effective rank on training text: {percent[self.main, 'training']} % of the "
                f"dimensions after training, {percent[self.bare, 'training']} % before. On "
                f"validation text, {'; '.join(parts)}.")

    def spectra(self) -> plots.Drawn:
        """Spectra of the training contexts of the compared networks and of the embeddings."""
        names = [*self.compared, "control.embeddings"]
        return plots.spectra({name: self.contexts[name]["training"] for name in names})

    def rank_growth(self) -> plots.Drawn:
        """Effective rank against tokens read and against w (first seed)."""
        first = {n: w for n, w in self.weights.items() if n.endswith(f"seed{self.seeds[0]}")}
        chosen = self.table[self.table.network.isin(first)]
        chosen = chosen.assign(w=chosen.network.map(first)).sort_values("w")
        counts = sorted({2**k for k in range(6, 20)} | {len(self.training)})
        names = [*self.compared, "control.embeddings"]
        return plots.rank_growth({n: self.contexts[n]["training"] for n in names}, counts, chosen)

    def check3(self, passes: int) -> pd.DataFrame:
        """Repeated sequential passes over the validation text: compared networks and controls."""
        threshold, found = self.settings.convergence_threshold, {}
        with self.run.stage("passes"):
            for name in [*self.compared, "control.shuffled"]:
                shuffled = name == "control.shuffled"
                found[name] = iterate_passes(
                    self.blocks[self.main if shuffled else name],
                    self.shuffled["validation"] if shuffled else self.validation,
                    passes - 1, "sequential", threshold, self.contexts[name]["validation"],
                )
        self.again = {name: found[name] for name in self.compared}
        for name in ("control.constant", "control.embeddings"):
            # What depends on no context is the same in every pass.
            found[name] = Passes.unchanged(self.contexts[name]["validation"], passes - 1)
        return pd.DataFrame([
            results.record_passes(self.run, f"{name}.validation.sequential", passed)
            for name, passed in found.items()
        ]).round(6)

    def change_map(self, tokens: int) -> plots.Drawn:
        """Heat maps of change: trained and untrained read sequentially, untrained in parallel."""
        maps = {self.main: self.again[self.main], self.bare: self.again[self.bare],
                f"{self.bare}, parallel": self.frozen[self.bare]}
        return plots.change_map({name: p.changes for name, p in maps.items()}, tokens)

    def trials(self) -> str:
        """The convergence tool's output for the compared networks."""
        lines = []
        for name, found in self.again.items():
            trials, n = Trials(tuple(found.differences)), len(found.differences)
            self.run.metric(f"{name}.trials.slope", trials.slope, "per trial", n=n)
            self.run.metric(f"{name}.trials.spread", trials.spread, "", n=n)
            self.run.metric(f"{name}.trials.class", trials.verdict, "class", n=n)
            lines += [name, str(trials)]
        return "\n".join(lines)

    def lyapunov(self, tokens: int) -> pd.DataFrame:
        """Largest Lyapunov exponent along the training text, with an interval."""
        rows, zero = [], self.training.new_zeros(self.shape.context_dim)
        for name in self.compared:
            growth = lyapunov_exponent(self.blocks[name], self.training[:tokens], zero,
                                       self.seeds[0], tokens // 5)
            spread = results.batch_means(growth)
            mean = float(growth.mean())
            self.run.metric(f"{name}.lyapunov", mean, "per token", n=len(growth), interval=spread)
            rows.append({"network": name, "exponent": mean, "low": spread and spread.low,
                         "high": spread and spread.high})
        return pd.DataFrame(rows)

    def rollouts(self, segment: int) -> plots.Drawn:
        """Every method on the validation text, for the trained and the untrained network."""
        methods: list[tuple[Method, int]] = [
            ("sequential", 1), ("jacobi", 1), ("jacobi", segment), ("quasi-newton", 1)
        ]
        frames: list[pd.DataFrame] = []
        rows: list[dict[str, Any]] = []
        for name in (self.main, self.bare):
            for method, length in methods:
                label = f"{name} {method}" + (f" x{length}" if length > 1 else "")
                start = time.perf_counter()
                with self.run.stage(f"rollout {label}"):
                    found = rollout(self.blocks[name], self.validation, None, method,
                                    TOLERANCE, length)
                seconds = time.perf_counter() - start
                exact = self.contexts[name]["validation"]
                error = float(results.relative_errors(found.contexts, exact).max())
                results.record_rollout(self.run, f"{name}.rollout.{method}{length}", found, error)
                rows.append({"network": name, "method": label.removeprefix(f"{name} "),
                             "passes": found.passes, "fell back": found.fell_back,
                             "largest error": error})
                last = found.residuals[-1] if found.residuals else [float("nan")]
                frames.append(pd.DataFrame({"run": label, "pass": range(1, len(last) + 1),
                                            "residual": last, "seconds": seconds}))
        self.methods = pd.DataFrame(rows)
        return plots.residuals(pd.concat(frames))

    @torch.no_grad()
    def exactness(self, tokens: int, passes: int) -> plots.Drawn:
        """Share of `tokens` within the tolerance after each Jacobi pass, without fallback."""
        shares: dict[str, list[float]] = {}
        text = self.validation[:tokens]
        for name in self.compared:
            exact, shares[name] = self.contexts[name]["validation"][: len(text)], []
            guess = torch.zeros_like(exact)
            for _ in range(passes):
                guess = self.blocks[name].chunked(shifted(guess, torch.zeros_like(guess[0])), text)
                within = results.relative_errors(guess, exact) < TOLERANCE
                shares[name].append(float(within.float().mean()))
            self.run.metric(f"{name}.jacobi.exact_after_{passes}", shares[name][-1], "fraction",
                            n=len(text))
        return plots.exactness(shares, len(text))

    def memory(self, distance: int, threshold: float) -> plots.Drawn:
        """Memory curves on the validation text, and the effective memory length."""
        last = len(self.validation) - distance - 1
        spots = torch.linspace(1, last, 40).long().to(self.device).unique()
        curves = {}
        for name in self.compared:
            exact = self.contexts[name]["validation"]
            curve = memory_curve(self.blocks[name], self.validation, exact, spots, distance,
                                 self.seeds[0])
            length = memory_length(curve, threshold)
            why = None if length is not None else f"above {threshold} to the end, {distance} tokens"
            self.run.metric(f"{name}.memory_length", length, "tokens", n=len(spots), undefined=why)
            self.run.metric(f"{name}.memory_at_end", float(curve[-1].median()), "", n=len(spots))
            curves[name] = curve
        return plots.memory(curves)

    def sequential(self, weight: float, tokens: int, iterations: int) -> pd.DataFrame:
        """The sequential variant on the first `tokens`; a row per iteration."""
        config = replace(self.settings, variant="sequential", diversity_weight=weight,
                         iterations=iterations)
        part = self.training[:tokens]
        with self.run.stage("train sequential"):
            _, result = self._train(config, part)
        frame = results.record_history(self.run, "sequential", result)
        results.record_contexts(self.run, "sequential", {"training": result.contexts},
                                {"training": part})
        zeros = torch.zeros(2, self.shape.context_dim)
        tracker = DiversityTracker(zeros[0].clone(), zeros[1].clone(), config.ema_decay)
        self.run.metric("sequential.tokens", len(part), "count")
        self.run.metric("sequential.tracker_memory", tracker.nbytes, "bytes")
        return frame[["iteration", "loss", "cvfp_loss", "diversity_loss", "share"]].round(4)


class Arms:
    """Phase 2 with different contexts in the place of C*."""

    def __init__(self, study: Study, config: phase2.Phase2Config, dialogue: int) -> None:
        """`dialogue`: tokens in a dialogue, the block that bootstraps resample."""
        self.study, self.config, self.dialogue = study, config, dialogue
        self.first = study.seeds[0]
        self.found: dict[tuple[str, int], phase2.Phase2Result] = {}
        self.seen: dict[str, Mapping[str, phase2.Predictions]] = {}
        with study.run.stage("contexts"):
            self.fixed = {seed: self.contexts(study.name(seed, study.settings.diversity_weight))
                          for seed in study.seeds}
            study.blocks[study.bare] = CVFPBlock(study.shape, self.first).to(study.device)

    def contexts(self, network: str) -> dict[str, Tensor]:
        """C*: one sequential pass from the zero context over each text."""
        return {name: self.study.read(network, name) for name in self.study.data.tokens}

    def replaced(self, kind: str, window: int) -> dict[str, Tensor]:
        """What stands in for the first seed's C*: zeros, shuffled, window or untrained."""
        study, fixed = self.study, self.fixed[self.first]
        if kind == "zeros":
            return {k: torch.zeros_like(c) for k, c in fixed.items()}
        if kind == "shuffled":
            generator = torch.Generator().manual_seed(self.first)
            orders = {k: torch.randperm(len(c), generator=generator) for k, c in fixed.items()}
            return {k: c[orders[k].to(c.device)] for k, c in fixed.items()}
        if kind == "window":
            table, width = study.data.embedding.table, study.shape.context_dim
            return {k: phase2.window_contexts(table, i, width, window)
                    for k, i in study.data.ids.items()}
        return self.contexts(study.bare)

    def train(
        self, name: str, seed: int, contexts: Mapping[str, Tensor], network: str,
        version: Literal["v2.0", "v1.0"] = "v2.0",
    ) -> dict[str, Any]:
        """Train one arm from the block of `network`; returns its row of the table."""
        data = self.study.data
        texts = {k: phase2.FixedText(data.ids[k], data.tokens[k], c) for k, c in contexts.items()}
        config = replace(self.config, version=version, seed=seed)
        key = name if seed == self.first else f"{name}.seed{seed}"
        with self.study.run.stage(f"phase 2 {key}"):
            found = phase2.train_phase2(
                self.study.blocks[network], data.vocabulary, texts["training"],
                texts["validation"], config, key, progress=True,
            )
        self.found[name, seed] = found
        self.seen[key] = {k: phase2.predict(found.model, texts[k]) for k in ("validation", "test")}
        return results.record_predictions(self.study.run, key, self.seen[key], self.dialogue, found)

    def run_all(self, window: int) -> pd.DataFrame:
        """v2.0 and zeros for every seed, the other arms for the first, and the n-grams."""
        study, rows = self.study, []
        stand_ins = {k: self.replaced(k, window) for k in
                     ("zeros", "untrained", "shuffled", "window")}
        trained = {s: study.name(s, study.settings.diversity_weight) for s in study.seeds}
        for seed, network in trained.items():
            rows.append(self.train("v2.0", seed, self.fixed[seed], network))
            rows.append(self.train("zeros", seed, stand_ins["zeros"], network))
        first = trained[self.first]
        rows.append(self.train("v1.0", self.first, self.fixed[self.first], first, "v1.0"))
        for kind in ("untrained", "shuffled", "window"):
            network = study.bare if kind == "untrained" else first
            rows.append(self.train(kind, self.first, stand_ins[kind], network))
        ids = {k: i.tolist() for k, i in study.data.ids.items()}
        for name, model in (("unigram", phase2.unigram), ("bigram", phase2.bigram)):
            self.seen[name] = {k: model(ids["training"], ids[k], study.data.vocabulary)
                               for k in ("validation", "test")}
            rows.append(results.record_predictions(study.run, name, self.seen[name], self.dialogue))
        for name in ("v2.0", "zeros"):
            for split in ("validation", "test"):
                keys = [name] + [f"{name}.seed{s}" for s in study.seeds[1:]]
                values = [self.seen[key][split].perplexity for key in keys]
                results.record_mean(study.run, f"{name}.seeds.{split}.perplexity", values, "",
                                    study.seeds, log=True)
        return pd.DataFrame(rows).set_index("arm").round(3)

    @property
    def names(self) -> list[str]:
        """The arms of the first seed and the n-grams."""
        return [key for key in self.seen if ".seed" not in key]

    def curves(self) -> plots.Drawn:
        """Perplexity per epoch of the first seed's arms."""
        frame = pd.DataFrame([
            {"arm": name, "epoch": e.epoch, "training": e.train_perplexity,
             "validation": e.validation_perplexity}
            for (name, seed), found in self.found.items() if seed == self.first
            for e in found.history
        ])
        levels = {n: self.seen[n]["validation"].perplexity for n in ("unigram", "bigram")}
        return plots.perplexity(frame, levels)

    def on_test(self) -> plots.Drawn:
        """Test perplexity of every arm with its bootstrap interval."""
        rows = []
        for name in self.names:
            found = self.seen[name]["test"]
            spread = results.bootstrap_perplexity(found, self.dialogue, 2000, 0)
            rows.append({"arm": name, "value": found.perplexity, "low": spread.low,
                         "high": spread.high})
        return plots.intervals(pd.DataFrame(rows))

    def against(self, ours: str) -> tuple[pd.DataFrame, str]:
        """Perplexity of each arm over that of `ours`, on the same tokens; and as a sentence."""
        rows = []
        for name in (n for n in self.names if n != ours):
            for split in ("validation", "test"):
                row = results.record_ratio(self.study.run, f"{name}.over_{ours}.{split}",
                                           self.seen[name][split], self.seen[ours][split],
                                           self.dialogue)
                rows.append({"arm": name, "text": split} | row)
        frame = pd.DataFrame(rows)
        test = frame[frame.text == "test"]
        above, below = (test[test.low > 1].arm.tolist(), test[test.high < 1].arm.tolist())
        text = (f"On disjoint text, the whole interval of the ratio to {ours} lies above 1 for "
                f"{len(above)} of {len(test)} arms ({', '.join(above) or 'none'}), below 1 for "
                f"{len(below)} ({', '.join(below) or 'none'}).")
        return frame.set_index(["arm", "text"]).round(3), text
