"""Do the exported files in llama.cpp say what the PyTorch model says? The same probes on both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lablog.commitment import latent_sources, probes
from lablog.commitment.export import Export
from lablog.commitment.novelty import ProbeSet
from lablog.commitment.qlora import load_committed, plan_of
from lablog.commitment.rendering import Prompt
from lablog.commitment.torch_injection import injected
from lablog.commitment.torch_speaker import TorchSpeaker
from lablog.files import scratch_folder
from lablog.intervals import hierarchical
from lablog.models import convert, locate
from lablog.models.llama_cpp import Commitment, Context, Model, generate_tokens
from lablog.provenance import available_memory_bytes, usable_threads
from lablog.record import Metric
from lablog.text.chat_tokenizer import tokenizer_of

LOADED = 4  # memory over stored weights in bf16, when PyTorch and llama.cpp both hold them in f32


class ExportedSpeaker(TorchSpeaker):
    """A `TorchSpeaker` whose words come from the patched llama.cpp, z* included.

    The PyTorch model serves the posterior alone. As many prompts as the context has sequences are
    read together, each sequence under a commitment of its own, which the engine is given as λ, a
    direction and a range of layers.
    """

    def __init__(self, reference: TorchSpeaker, context: Context) -> None:
        super().__init__(reference.model, reference.tokenizer, reference.chat)
        self.context = context

    def _groups(self, prompts: Sequence[Prompt]) -> Iterator[list[int]]:
        """Numbers of prompts to be read together, of like length."""
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))
        for begin in range(0, len(order), self.context.sequences):
            yield order[begin : begin + self.context.sequences]

    def _read(self, prompts: Sequence[Prompt], z: Tensor | None,
              logits: Literal["last", "all"], held: bool = False) -> list[np.ndarray]:
        """Logits behind the last or every token of each prompt, in sequences 0, 1, …; z [prompts,
        exchanges, k]. Exchanges under different z* are decoded one after the other.

        held: the sequences hold what comes before the prompts.
        """
        if not held:
            self.context.clear()
            self.context.commit(None)
        pieces = []
        for prompt in prompts:
            turns = 0 * prompt.exchange if z is None else prompt.exchange % z.shape[1]
            pieces.append([(turn, [int(prompt.ids[i]) for i in group])
                           for turn, group in groupby(range(len(turns)), key=turns.__getitem__)])
        rows: list[list[np.ndarray]] = [[] for _ in prompts]
        for number in range(max(map(len, pieces))):
            told = {s: parts[number] for s, parts in enumerate(pieces) if number < len(parts)}
            for sequence, (turn, _) in told.items():
                self._commit(sequence, None if z is None else z[sequence, turn])
            found = self.context.decode({s: ids for s, (_, ids) in told.items()}, logits)
            for sequence, part in found.items():
                rows[sequence].append(part)
        return [np.concatenate(parts) if logits == "all" else parts[-1] for parts in rows]

    def _commit(self, sequence: int, z: Tensor | None) -> None:
        if z is None:
            self.context.commit(None, sequence)
            return
        commitment = self.model.commitment
        assert commitment is not None
        with torch.no_grad():
            direction = commitment.direction(z.to(self.device)).cpu().numpy()
        settings = commitment.settings
        self.context.commit(Commitment(direction, settings.strength, settings.layers), sequence)

    def _ends(self, prompts: Sequence[Prompt], z: Tensor | None,
              targets: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Logits behind as many last tokens of each prompt as it has `targets`.

        What prompts that follow each other begin with, under the same z*, is read once and copied.
        """
        rows: dict[int, np.ndarray] = {}
        for group in (group for batch in self._forked(prompts, z, targets) for group in batch):
            for begin in range(0, len(group.members), self.context.sequences):
                members = group.members[begin : begin + self.context.sequences]
                under = None if z is None else z[members]
                if group.stem:
                    self._read([prompts[members[0]].to(group.stem)],
                               None if under is None else under[:1], "last")
                    self.context.fork(0, range(1, len(members)))
                found = self._read([prompts[i].behind(group.stem) for i in members], under, "all",
                                   held=bool(group.stem))
                rows.update((i, part[-len(targets[i]) :])
                            for i, part in zip(members, found, strict=True))
        return [rows[i] for i in range(len(prompts))]

    def logits(self, prompts: Sequence[Prompt], z: Tensor | None) -> Tensor:
        """As :meth:`TorchSpeaker.logits`."""
        one = [np.zeros((1, 1))] * len(prompts)
        return torch.from_numpy(np.concatenate(self._ends(prompts, z, one)))

    def scores(self, prompts: Sequence[Prompt], z: Tensor | None,
               targets: Sequence[np.ndarray]) -> list[Tensor]:
        """As :meth:`TorchSpeaker.scores`."""
        return [torch.from_numpy(rows).double().log_softmax(-1).gather(1, torch.from_numpy(wanted))
                for rows, wanted in zip(self._ends(prompts, z, targets), targets, strict=True)]

    def log_probabilities(self, prompts: Sequence[Prompt], z: Tensor | None) -> list[Tensor]:
        """As :meth:`TorchSpeaker.log_probabilities`."""
        rows: dict[int, Tensor] = {}
        for group in self._groups(prompts):
            found = self._read([prompts[i] for i in group], None if z is None else z[group], "all")
            rows.update((i, torch.from_numpy(part[:-1]).log_softmax(-1))
                        for i, part in zip(group, found, strict=True))
        return [rows[i] for i in range(len(prompts))]

    def answers(self, prompts: Sequence[Prompt], z: Tensor | None, tokens: int,
                uniforms: np.ndarray | None = None) -> list[str]:
        """As :meth:`TorchSpeaker.answers`."""
        texts = [""] * len(prompts)
        for group in self._groups(prompts):
            last = self._read([prompts[i] for i in group], None if z is None else z[group], "last")
            dice = None if uniforms is None else {s: uniforms[i] for s, i in enumerate(group)}
            written = generate_tokens(self.context, dict(enumerate(last)), tokens,
                                      self.rendering.stops, dice)
            for sequence, i in enumerate(group):
                texts[i] = self.tokenizer.decode(written[sequence]).strip()
        return texts


@dataclass(frozen=True)
class Agreement:
    """What the engine (``native``) and PyTorch (``reference``) make of the same conversations."""

    logits: float  # largest absolute difference of a logit, behind "is it X?"
    greedy: np.ndarray  # whether a greedy answer is the same text, bool [items]
    recall: tuple[probes.RecallResult, probes.RecallResult]  # native, reference
    fork: tuple[probes.ForkResult, probes.ForkResult]  # native, reference

    @property
    def yes_sum(self) -> float:
        """Largest difference of Σ P(yes) over items."""
        return float(np.abs(self.fork[0].yes_sum - self.fork[1].yes_sum).max())

    @property
    def named(self) -> np.ndarray:
        """Whether an answer (first, again, after eviction) names the same value, bool [answers]."""
        native, reference = (np.concatenate([r.first, r.again, r.evicted]) for r in self.recall)
        return native == reference


def agreement(native: TorchSpeaker, reference: TorchSpeaker, asked: ProbeSet,
              source: Literal["prior", "prefix", "redrawn"]) -> Agreement:
    """Run the probes on both, each conversation under a z* of its own, the same on both."""
    items = asked.items
    z = latent_sources.fork_latents(reference, source, asked)
    assert z is not None
    forks = [(i, reference.prompt([*item.opening, guess], ""))
             for i, item in enumerate(items.fork) for guess in item.guesses]
    owner, prompts = [i for i, _ in forks], [prompt for _, prompt in forks]
    again = [[*item.distractors, item.requestion] for item in items.recall]
    both = (native, reference)
    rows = [speaker.logits(prompts, z[owner]) for speaker in both]
    said = [speaker.say(again, z, probes.ANSWER_TOKENS, first=1) for speaker in both]
    recall = [latent_sources.recall(speaker, source, asked) for speaker in both]
    fork = [latent_sources.fork(speaker, source, asked) for speaker in both]
    return Agreement(
        float((rows[0] - rows[1]).abs().max()),
        np.array([a == b for a, b in zip(*said, strict=True)]),
        (recall[0], recall[1]), (fork[0], fork[1]))


COMPARED: dict[str, tuple[Literal["f32", "q8_0"], Literal["prior", "prefix"]]] = {
    "prior": ("f32", "prior"), "prefix": ("f32", "prefix"), "q8_0": ("q8_0", "prior")}
"""What is compared: the weights of the base in llama.cpp, and where z* comes from."""


def compare(exported: Export, base: Path, asked: ProbeSet, device: str = "cpu",
            window: int = 512, sequences: int = 32) -> dict[str, Agreement]:
    """Exported files in llama.cpp against PyTorch, dequantised, for each of `COMPARED`.

    device: ``cpu``, or ``cuda`` for both, which needs a llama.cpp built for it. sequences: prompts
    that the engine reads together, of at most `window` tokens each.
    """
    model = load_committed(base, exported.folder, exact=True).to(device)
    reference = TorchSpeaker(model, tokenizer_of(base),
                             plan_of(exported.folder).chat)
    layers = 0 if device == "cpu" else model.base.config.num_hidden_layers + 1
    found = {}
    with scratch_folder(exported.folder) as scratch:
        for weights, compared in groupby(COMPARED.items(), key=lambda each: each[1][0]):
            file = exported.base
            if weights != "f32":
                file = convert.quantize(file, scratch / "base.gguf", weights)
            with (Model(file, layers, exported.lora) as engine,
                  Context(engine, sequences, window, usable_threads()) as context):
                native = ExportedSpeaker(reference, context)
                for name, (_, source) in compared:
                    found[name] = agreement(native, reference, asked, source)
    return found


def of_agreement(found: Mapping[tuple[int, int], Mapping[str, Agreement]]) -> list[Metric]:
    """``native.<compared>.<measure>``, and ``pytorch.<compared>.<measure>`` of the probes, over all
    runs (by base and seed): the largest difference, and shares of all answers."""
    seeds = sorted({seed for _, seed in found})
    bases = len({base for base, _ in found})

    def share(name: str, values: Sequence[np.ndarray]) -> Metric:
        stacked = np.stack(values).astype(float).reshape(bases, len(seeds), -1)
        return Metric.of(name, float(stacked.mean()), "fraction", n=stacked.shape[-1],
                         numerator=float(stacked.sum()), denominator=float(stacked.size),
                         seeds=tuple(seeds), interval=hierarchical(stacked, share=True))

    metrics = [Metric.of("native.runs", len(found), "count")]
    for source in COMPARED:
        results, native = [each[source] for each in found.values()], f"native.{source}"
        metrics += [
            Metric.of(f"{native}.logit_difference", max(r.logits for r in results), ""),
            Metric.of(f"{native}.yes_sum_difference", max(r.yes_sum for r in results), ""),
            share(f"{native}.named_equal", [r.named for r in results]),
            share(f"{native}.greedy_equal", [r.greedy for r in results])]
        for number, engine in enumerate(("native", "pytorch")):
            name, recall = f"{engine}.{source}", [r.recall[number] for r in results]
            fork = [r.fork[number] for r in results]
            metrics += [
                share(f"{name}.recall", [r.recalled for r in recall]),
                share(f"{name}.eviction", [r.recalled_after_eviction for r in recall]),
                share(f"{name}.same_choice", [f.same for f in fork]),
                Metric.of(f"{name}.yes_sum", float(np.mean([f.yes_sum.mean() for f in fork])), "",
                          n=len(results[0].fork[number].yes_sum), seeds=tuple(seeds))]
    return metrics


def parity(model: str, artifacts: Path, ids: Sequence[int], direction: np.ndarray,
           ranges: Mapping[str, tuple[int, int]]) -> list[Metric]:
    """:func:`logit_differences` at λ = 1 of a model as the notebooks name it, or why there are
    none: a model that PyTorch cannot read exactly, or one that does not fit into memory twice."""
    try:
        folder = locate.hugging_face_folder(model, artifacts)
        stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        if LOADED * stored > available_memory_bytes():
            raise MemoryError(f"{folder.name} has {stored / 2**30:.1f} GiB of weights, too many "
                              "for two engines at a time")
        exact = locate.gguf_file(str(folder), artifacts)
    except (ValueError, MemoryError) as error:
        return [Metric.of("none", None, "", undefined=str(error))]
    found = logit_differences(folder, exact, ids, direction, 1.0, ranges)
    return [Metric.of(name.replace(" ", "_"), value, "", n=len(ids))
            for name, value in found.items()]


def logit_differences(folder: Path, gguf: Path, ids: Sequence[int], direction: np.ndarray,
                      strength: float, ranges: Mapping[str, tuple[int, int]]) -> dict[str, float]:
    """Largest difference of a logit behind any of `ids` between PyTorch, with hooks, on the model
    in `folder` and the patched llama.cpp on `gguf`, both in f32: without a commitment (``none``),
    and with λ = `strength` times `direction` in each of the ranges."""
    network = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False).eval()
    tokens, found = torch.tensor([list(ids)]), {}
    with Model(gguf) as model, Context(model, 1, len(ids), usable_threads()) as context:
        for name, layers in {"none": (0, 0), **ranges}.items():
            scale = 0.0 if name == "none" else strength
            addition = scale * torch.from_numpy(direction).expand(1, len(ids), len(direction))
            with torch.inference_mode(), injected(network, addition, layers):
                theirs = network(tokens).logits[0].numpy()
            context.clear()
            context.commit(Commitment(direction, scale, layers))
            ours = context.prefill({0: list(ids)}, "all")[0]
            found[name] = float(np.abs(ours - theirs).max())
    return found
