"""Do the exported files in llama.cpp say what the PyTorch model says? The same probes on both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.nn.functional import pad

from lablog.commitment import probes
from lablog.commitment.export import Export, exact
from lablog.commitment.hooks import injected
from lablog.commitment.probes import ANSWER_TOKENS, Items
from lablog.commitment.window import Injection, Speech
from lablog.intervals import wilson
from lablog.models.llama_cpp import Commitment, Context, Model, Tokens, generate
from lablog.record import Run
from lablog.report import Section
from lablog.text.dialogues import Turn


class TorchContext(Context):
    """A :class:`Context` whose logits come from a PyTorch model, by forward hooks.

    Every token keeps the commitment under which it was decoded. There are no caches: each decode
    evaluates sequences from their beginning. `network` is a transformers or peft model; `model`
    is the engine's, for its vocabulary.
    """

    def __init__(self, network: Any, model: Model, sequences: int, window: int) -> None:
        self.network, self.model, self.sequences, self.window = network, model, sequences, window
        self._handle = None
        self._commitment: Commitment | None = None
        self.clear()

    def commit(self, commitment: Commitment | None) -> None:
        """Set the commitment for all tokens decoded from now on; None clears it."""
        self._commitment = commitment

    def clear(self) -> None:
        """Empty all sequences; the commitment stays."""
        self.tokens = [[] for _ in range(self.sequences)]
        self._under: list[list[Commitment | None]] = [[] for _ in range(self.sequences)]

    def fork(self, source: int, targets: Sequence[int]) -> None:
        """Make `targets` copies of sequence `source`."""
        for target in targets:
            self.tokens[target] = list(self.tokens[source])
            self._under[target] = list(self._under[source])

    def rewind(self, sequence: int, length: int) -> None:
        """Forget all tokens of a sequence from position `length` on."""
        del self.tokens[sequence][length:]
        del self._under[sequence][length:]

    @torch.inference_mode()
    def decode(self, additions: Mapping[int, Tokens],
               logits: Literal["last", "all"] = "last") -> dict[int, np.ndarray]:
        """As :meth:`Context.decode`."""
        additions = {sequence: list(new) for sequence, new in additions.items() if len(new)}
        if not additions:
            return {}
        longest = max(len(self.tokens[s]) + len(new) for s, new in additions.items())
        if longest > self.window:
            raise ValueError(f"a sequence would hold {longest} tokens; the window holds "
                             f"{self.window}")
        for sequence, new in additions.items():
            self.tokens[sequence] += new
            self._under[sequence] += [self._commitment] * len(new)
        ids = torch.stack([
            pad(torch.tensor(self.tokens[s]), (0, longest - len(self.tokens[s]))) for s in additions
        ]).to(self.network.device)
        with ExitStack() as stack:
            for commitment in {id(c): c for s in additions for c in self._under[s]}.values():
                if commitment is not None:
                    held = [[c is commitment for c in self._under[s]] for s in additions]
                    mask = torch.tensor([row + [False] * (longest - len(row)) for row in held])
                    vector = commitment.strength * torch.from_numpy(commitment.direction)
                    stack.enter_context(
                        injected(self.network, mask[..., None] * vector, commitment.layers))
            rows = self.network(input_ids=ids, use_cache=False).logits.float().cpu().numpy()
        kept = {s: len(new) if logits == "all" else 1 for s, new in additions.items()}
        return {s: row[len(self.tokens[s]) - kept[s] : len(self.tokens[s])]
                for (s, row) in zip(additions, rows, strict=True)}


@dataclass(frozen=True)
class Agreement:
    """What the engine (``native``) and PyTorch (``reference``) make of the same conversations."""

    logits: float  # largest absolute difference of a logit
    greedy: tuple[int, int]  # greedy answers that are equal token for token, of how many
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


def agreement(native: Speech, reference: Speech, items: Items, texts: Sequence[Sequence[Turn]],
              commitments: Sequence[Commitment]) -> Agreement:
    """Run the probes and read `texts` on both; item i is under ``commitments[i % n]``."""
    count = len(commitments)
    groups = [slice(start, None, count) for start in range(min(count, len(items.recall)))]
    sides = []
    for speech in (native, reference):
        recall, fork, rows, answers = [], [], [], []
        for commitment, group in zip(commitments, groups, strict=False):
            injection = Injection((commitment,))
            recall.append(probes.run_recall(speech, items.recall[group], injection))
            fork.append(probes.run_fork(speech, items.fork[group], injection))
            answers += _greedy(speech, items.recall[group], injection)
            rows += _logits(speech, texts[group], injection)
        sides.append((recall, fork, answers, rows))
    (recall, fork, answers, rows), (recall_, fork_, answers_, rows_) = sides
    return Agreement(
        max(float(np.abs(a - b).max()) for a, b in zip(rows, rows_, strict=True)),
        (sum(a == b for a, b in zip(answers, answers_, strict=True)), len(answers)),
        (_joined(recall), _joined(recall_)), (_joined(fork), _joined(fork_)),
    )


def _greedy(speech: Speech, items: Sequence[probes.RecallItem],
            injection: Injection) -> list[list[int]]:
    """Tokens of the greedy answer to each item's question, asked behind its distractors."""
    answers: list[list[int]] = []
    for begin in range(0, len(items), speech.context.sequences):
        group = items[begin : begin + speech.context.sequences]
        speech.context.clear()
        injection.turn(speech.context, 0)
        told = {i: speech.prompt([*item.distractors, item.question])
                for i, item in enumerate(group)}
        written = generate(speech.context, speech.context.prefill(told), ANSWER_TOKENS,
                           speech.model.stops())
        answers += written.values()
    return answers


def _logits(speech: Speech, texts: Sequence[Sequence[Turn]],
            injection: Injection) -> list[np.ndarray]:
    """Logits behind every token of each text, one text at a time."""
    rows: list[np.ndarray] = []
    for text in texts:
        speech.context.clear()
        injection.turn(speech.context, 0)
        rows += speech.context.prefill({0: speech.history(text)}, "all").values()
    return rows


def _joined(parts: Sequence[Any]) -> Any:
    """Results of one kind as one, item behind item."""
    return type(parts[0])(*(np.concatenate([getattr(part, f.name) for part in parts])
                            for f in fields(parts[0])))


def compare(exported: Export, base: Path, items: Items, texts: Sequence[Sequence[Turn]],
            draws: int, seed: int, window: int = 256) -> dict[str, Agreement]:
    """Both engines under `draws` commitments from the ``prior``, and from as many ``prefix``es.

    The prefixes are the private lines of the first forked choices, read by the posterior, whose
    mean is injected. PyTorch evaluates what is exported (dequantised, f32), one thread each.
    """
    reference, sequences = exact(exported.folder, base), 1 + max(len(i.values) for i in items.fork)
    commitment = reference.commitment
    assert commitment is not None
    with (Model(exported.base, lora=exported.lora) as model,
          Context(model, 4 * sequences, window) as context):
        native = Speech(context)
        theirs = Speech(TorchContext(reference.lora, model, 4 * sequences, window))
        latents = {"prior": commitment.prior(draws, torch.Generator().manual_seed(seed))}
        with torch.no_grad():
            read = [torch.tensor([native.history([item.note])]) for item in items.fork[:draws]]
            posteriors = [reference.posterior(ids, torch.ones_like(ids)) for ids in read]
        latents["prefix"] = torch.cat([p.sample(torch.zeros_like(p.mean)) for p in posteriors])
        return {name: agreement(native, theirs, items, texts, exported.injected(z))
                for name, z in latents.items()}


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
