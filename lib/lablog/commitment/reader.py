"""A committed PyTorch model that reads and writes turns, each conversation with a z* of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from lablog.commitment.conversations import padded
from lablog.commitment.qlora import CommittedModel
from lablog.commitment.variational import Posterior
from lablog.text.dialogues import Turn
from lablog.text.tokenizer import Tokenizer

TOKENS = 16384  # in one batch, about; keeps logits and caches small


@dataclass(frozen=True)
class Prompt:
    """Token ids, the number of the exchange that each belongs to, and whether the model said it."""

    ids: np.ndarray
    exchange: np.ndarray
    own: np.ndarray


class Reader:
    """z below is None, or float32 [prompts, exchanges, k]: exchange t is read under
    ``z[:, t % exchanges]``, so one column is a commitment and several are redrawn every turn."""

    def __init__(self, model: CommittedModel, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        self.device = model.base.device
        self.newline = tokenizer.encode("\n")[0]

    def prompt(self, turns: Sequence[Turn], stem: str | None = None, first: int = 0) -> Prompt:
        """`turns` behind BOS; with `stem` also "A:" and how the answer begins.

        `first` numbers the first exchange; every user's turn but the first begins the next.
        """
        ids, exchange, own = [self.tokenizer.bos], [first], [False]
        lines = [(turn.speaker, f"{turn.speaker}: {turn.text}\n") for turn in turns]
        if stem is not None:
            lines.append(("A", f"A: {stem}" if stem else "A:"))
        for index, (speaker, text) in enumerate(lines):
            tokens = self.tokenizer.encode(text)
            first += speaker == "U" and index > 0
            head = len(self.tokenizer.encode(f"{speaker}:"))
            ids += tokens
            exchange += [first] * len(tokens)
            own += [speaker == "A" and i >= head for i in range(len(tokens))]
        return Prompt(np.array(ids), np.array(exchange), np.array(own))

    def posterior(self, prefixes: Sequence[Sequence[Turn]]) -> Posterior:
        """q(z* | prefix) of each prefix."""
        rows = [self.prompt(turns).ids for turns in prefixes]
        ids, mask = padded(rows, "left"), padded([np.ones(len(r), np.int64) for r in rows], "left")
        with torch.inference_mode():
            return self.model.posterior(ids.to(self.device), mask.to(self.device))

    def _batches(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Indices in batches of similar length."""
        batches: list[list[int]] = [[]]
        for index in sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids)):
            if batches[-1] and (len(batches[-1]) + 1) * len(prompts[index].ids) > TOKENS:
                batches.append([])
            batches[-1].append(index)
        return batches

    def _begin(self, prompts: Sequence[Prompt], z: Tensor | None) -> tuple[Tensor, Tensor, Tensor,
                                                                           Tensor | None]:
        """Ids, mask, positions [n, tokens] and what is injected [n, tokens, d], left-padded."""
        ids = padded([p.ids for p in prompts], "left").to(self.device)
        mask = padded([np.ones(len(p.ids), np.int64) for p in prompts], "left").to(self.device)
        addition = None
        if z is not None:
            assert self.model.commitment is not None
            exchange = padded([p.exchange for p in prompts], "left").to(self.device) % z.shape[1]
            addition = self.model.commitment.addition(
                torch.take_along_dim(z.to(self.device), exchange[:, :, None], dim=1), mask
            )
        return ids, mask, (mask.cumsum(1) - 1).clamp(min=0), addition

    @torch.inference_mode()
    def logits(self, prompts: Sequence[Prompt], z: Tensor | None) -> Tensor:
        """Logits behind the last token of each prompt, float32 [prompts, vocabulary]."""
        found: dict[int, Tensor] = {}
        for batch in self._batches(prompts):
            ids, mask, positions, addition = self._begin(
                [prompts[i] for i in batch], None if z is None else z[batch])
            out = self.model.hidden(ids, addition, attention_mask=mask, position_ids=positions,
                                    use_cache=False).last_hidden_state[:, -1]
            found.update(zip(batch, self.model.base.get_output_embeddings()(out).float().cpu(),
                             strict=True))
        return torch.stack([found[i] for i in range(len(prompts))])

    @torch.inference_mode()
    def log_probabilities(self, prompts: Sequence[Prompt], z: Tensor | None) -> list[Tensor]:
        """Log probabilities of the next token behind each token but the last, per prompt
        [tokens - 1, vocabulary]."""
        found: dict[int, Tensor] = {}
        for batch in self._batches(prompts):
            ids, mask, positions, addition = self._begin(
                [prompts[i] for i in batch], None if z is None else z[batch])
            out = self.model.hidden(ids, addition, attention_mask=mask, position_ids=positions,
                                    use_cache=False).last_hidden_state
            for i, row in zip(batch, out, strict=True):
                own = row[len(row) - len(prompts[i].ids) : -1]
                logits = self.model.base.get_output_embeddings()(own).float()
                found[i] = logits.log_softmax(-1).cpu()
        return [found[i] for i in range(len(prompts))]

    @torch.inference_mode()
    def answers(self, prompts: Sequence[Prompt], z: Tensor | None, tokens: int,
                uniforms: np.ndarray | None = None) -> list[str]:
        """Continuation of each prompt up to the end of its line or `tokens` tokens.

        Greedy, or at temperature 1 from `uniforms` [prompts, tokens] by inverting the cumulative
        distribution, as ``llama_cpp.generate`` does.
        """
        texts = [""] * len(prompts)
        for batch in self._batches(prompts):
            ids, mask, positions, addition = self._begin(
                [prompts[i] for i in batch], None if z is None else z[batch])
            cache, positions = DynamicCache(), positions
            written = np.zeros((len(batch), 0), np.int64)
            for step in range(tokens):
                out = self.model.hidden(
                    ids, addition, attention_mask=mask, position_ids=positions,
                    past_key_values=cache, use_cache=True,
                ).last_hidden_state[:, -1]
                logits = self.model.base.get_output_embeddings()(out).double().cpu().numpy()
                if uniforms is None:
                    chosen = logits.argmax(axis=1)
                else:
                    weights = np.exp(logits - logits.max(axis=1, keepdims=True)).cumsum(axis=1)
                    targets = uniforms[batch, step] * weights[:, -1]
                    chosen = (weights <= targets[:, None]).sum(axis=1)
                written = np.concatenate([written, chosen[:, None]], axis=1)
                if bool((written == self.newline).any(axis=1).all()):
                    break
                ids = torch.from_numpy(chosen)[:, None].to(self.device)
                mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
                positions = positions[:, -1:] + 1
                addition = None if addition is None else addition[:, -1:]
            for i, row in zip(batch, written, strict=True):
                end = np.flatnonzero(row == self.newline)
                texts[i] = self.tokenizer.decode(row[: end[0] if len(end) else None].tolist())
        return [text.strip() for text in texts]
