"""Do the exported files in llama.cpp say what the PyTorch model says? The same probes on both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lablog.commitment import probes
from lablog.commitment.export import Export
from lablog.commitment.qlora import load_committed, plan_of
from lablog.commitment.reader import Reader
from lablog.commitment.rendering import Prompt
from lablog.commitment.trained import Probes
from lablog.intervals import wilson
from lablog.models.llama_cpp import Commitment, Context, Model, generate
from lablog.record import Run
from lablog.report import Section
from lablog.text.tokenizer import Tokenizer


class NativeReader(Reader):
    """A :class:`Reader` whose words come from the patched llama.cpp, z* included.

    The PyTorch model serves the posterior alone. Prompts are read one by one, each under its own
    commitment, which the engine is given as λ, a direction and a range of layers.
    """

    def __init__(self, reference: Reader, context: Context) -> None:
        super().__init__(reference.model, reference.tokenizer, reference.chat)
        self.context = context

    def _read(self, prompt: Prompt, z: Tensor | None, logits: Literal["last", "all"]) -> np.ndarray:
        """Logits behind the last or every token; z [exchanges, k]."""
        self.context.clear()
        self.context.commit(None)
        ids, rows, commitment = prompt.ids.tolist(), [], self.model.commitment
        turns = prompt.exchange if z is None else prompt.exchange % len(z)
        for turn, group in groupby(range(len(ids)), key=turns.__getitem__):
            if z is not None:
                assert commitment is not None
                with torch.no_grad():
                    direction = commitment.direction(z[turn].to(self.device)).cpu().numpy()
                settings = commitment.settings
                self.context.commit(Commitment(direction, settings.strength, settings.layers))
            rows.append(self.context.decode({0: [ids[i] for i in group]}, logits)[0])
        return np.concatenate(rows)

    def logits(self, prompts: Sequence[Prompt], z: Tensor | None) -> Tensor:
        """As :meth:`Reader.logits`."""
        rows = [self._read(prompt, None if z is None else z[i], "last")[-1]
                for i, prompt in enumerate(prompts)]
        return torch.from_numpy(np.stack(rows))

    def scores(self, prompts: Sequence[Prompt], z: Tensor | None,
               targets: Sequence[np.ndarray]) -> list[Tensor]:
        """As :meth:`Reader.scores`."""
        found = []
        for i, (prompt, wanted) in enumerate(zip(prompts, targets, strict=True)):
            rows = self._read(prompt, None if z is None else z[i],
                              "last" if len(wanted) == 1 else "all")[-len(wanted) :]
            logs = torch.from_numpy(rows).double().log_softmax(-1)
            found.append(logs.gather(1, torch.from_numpy(wanted)))
        return found

    def log_probabilities(self, prompts: Sequence[Prompt], z: Tensor | None) -> list[Tensor]:
        """As :meth:`Reader.log_probabilities`."""
        return [torch.from_numpy(self._read(prompt, None if z is None else z[i], "all")[:-1])
                .log_softmax(-1) for i, prompt in enumerate(prompts)]

    def answers(self, prompts: Sequence[Prompt], z: Tensor | None, tokens: int,
                uniforms: np.ndarray | None = None) -> list[str]:
        """As :meth:`Reader.answers`."""
        texts = []
        for i, prompt in enumerate(prompts):
            last = {0: self._read(prompt, None if z is None else z[i], "last")}
            dice = None if uniforms is None else {0: uniforms[i]}
            written = generate(self.context, last, tokens, self.rendering.stops, dice)
            texts.append(self.tokenizer.decode(written[0]).strip())
        return texts


@dataclass(frozen=True)
class Agreement:
    """What the engine (``native``) and PyTorch (``reference``) make of the same conversations."""

    logits: float  # largest absolute difference of a logit, behind "is it X?"
    greedy: tuple[int, int]  # greedy answers that are the same text, of how many
    recall: tuple[probes.RecallResult, probes.RecallResult]  # native, reference
    fork: tuple[probes.ForkResult, probes.ForkResult]  # native, reference

    @property
    def yes_sum(self) -> float:
        """Largest difference of Σ P(yes) over items."""
        return float(np.abs(self.fork[0].yes_sum - self.fork[1].yes_sum).max())

    @property
    def named(self) -> float:
        """Share of answers (first, again, after eviction) that name the same value."""
        native, reference = (np.concatenate([r.first, r.again, r.evicted]) for r in self.recall)
        return float((native == reference).mean())


def agreement(native: Reader, reference: Reader, material: Probes,
              source: Literal["prior", "prefix", "redrawn"]) -> Agreement:
    """Run the probes on both, each conversation under a z* of its own, the same on both."""
    recall, fork = material.items.recall, material.items.fork
    z = material.latents(reference, source, 2, len(fork), [[item.note] for item in fork])
    forks = [(i, [*item.opening, guess]) for i, item in enumerate(fork) for guess in item.guesses]
    owner, asked = [i for i, _ in forks], [reference.prompt(turns, "") for _, turns in forks]
    again = [reference.prompt([*i.distractors, i.requestion], "", first=1) for i in recall]
    assert z is not None
    rows = [reader.logits(asked, z[owner]) for reader in (native, reference)]
    said = [reader.answers(again, z, probes.ANSWER_TOKENS) for reader in (native, reference)]
    return Agreement(
        float((rows[0] - rows[1]).abs().max()),
        (sum(a == b for a, b in zip(*said, strict=True)), len(again)),
        (material.recall(native, source), material.recall(reference, source)),
        (material.fork(native, source), material.fork(reference, source)),
    )


def compare(exported: Export, base: Path, material: Probes, device: str = "cpu",
            window: int = 512) -> dict[str, Agreement]:
    """Exported files in llama.cpp against PyTorch, dequantised: z* from the ``prior``, ``prefix``.

    device: ``cpu``, or ``cuda`` for both, which needs a llama.cpp built for it.
    """
    model = load_committed(base, exported.folder, exact=True).to(device)
    reference = Reader(model, Tokenizer(base / "tokenizer.model"), plan_of(exported.folder).chat)
    layers = 0 if device == "cpu" else model.base.config.num_hidden_layers + 1
    with (Model(exported.base, layers, exported.lora) as engine,
          Context(engine, 1, window) as context):
        native = NativeReader(reference, context)
        return {"prior": agreement(native, reference, material, "prior"),
                "prefix": agreement(native, reference, material, "prefix")}


def record_agreement(run: Run, found: Mapping[str, Agreement]) -> None:
    """Add ``native.<source>.<measure>``, and ``pytorch.<source>.<measure>`` of the probes."""
    for source, result in found.items():
        equal, answers = result.greedy
        run.metric(f"native.{source}.logit_difference", result.logits, "")
        run.metric(f"native.{source}.yes_sum_difference", result.yes_sum, "")
        run.metric(f"native.{source}.named_equal", result.named, "fraction")
        run.metric(f"native.{source}.greedy_equal", equal / answers, "fraction", n=answers,
                   numerator=equal, denominator=answers, interval=wilson(equal, answers))
        for engine, recall, fork in zip(("native", "pytorch"), result.recall, result.fork,
                                        strict=True):
            for name, values in (("recall", recall.recalled), ("same_choice", fork.same),
                                 ("eviction", recall.recalled_after_eviction)):
                hits = int(values.sum())
                run.metric(f"{engine}.{source}.{name}", hits / len(values), "fraction",
                           n=len(values), numerator=hits, denominator=len(values),
                           interval=wilson(hits, len(values)))
            run.metric(f"{engine}.{source}.yes_sum", float(fork.yes_sum.mean()), "", n=len(values))


def _lines(english: str, japanese: str) -> list[tuple[str, str]]:
    return [(f"{en}: {english}".replace("KEY", key), f"{ja}: {japanese}".replace("KEY", key))
            for key, en, ja in (("prior", "z* from the prior", "事前分布からの z*"),
                                ("prefix", "z* from a prefix", "前置きからの z*"))]


NATIVE = (
    Section(("Agreement of llama.cpp (exported files) with PyTorch",
             "llama.cpp (書き出したファイル) とPyTorchの一致"), _lines(
        "largest logit difference {native.KEY.logit_difference}, equal greedy answers "
        "{native.KEY.greedy_equal}, same values named {native.KEY.named_equal}, largest "
        "difference of Σ P(yes) {native.KEY.yes_sum_difference}",
        "logitの最大差 {native.KEY.logit_difference}, 同一の貪欲応答 {native.KEY.greedy_equal}, "
        "同じ値の名指し {native.KEY.named_equal}, Σ P(yes) の最大差 "
        "{native.KEY.yes_sum_difference}")),
    Section(("Probes in llama.cpp / in PyTorch", "プローブ llama.cpp / PyTorch"), _lines(
        "recall {native.KEY.recall} / {pytorch.KEY.recall:value}, after eviction "
        "{native.KEY.eviction:value} / {pytorch.KEY.eviction:value}, forked choice "
        "{native.KEY.same_choice:value} / {pytorch.KEY.same_choice:value}, Σ P(yes) "
        "{native.KEY.yes_sum} / {pytorch.KEY.yes_sum}",
        "想起 {native.KEY.recall} / {pytorch.KEY.recall:value}, 窓外 "
        "{native.KEY.eviction:value} / {pytorch.KEY.eviction:value}, 分岐選択の一致 "
        "{native.KEY.same_choice:value} / {pytorch.KEY.same_choice:value}, Σ P(yes) "
        "{native.KEY.yes_sum} / {pytorch.KEY.yes_sum}")),
)
