"""PyTorch's speaker: a committed model, each conversation with a z* of its own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from lablog.commitment.conversations import padded, visible
from lablog.commitment.posterior import Posterior
from lablog.commitment.probes import ForkItem, Turns
from lablog.commitment.qlora import CommittedModel
from lablog.commitment.rendering import Prompt, Rendering, check_distinct
from lablog.models.sampling import chosen_tokens
from lablog.text.chat_tokenizer import AnyTokenizer
from lablog.text.dialogues import Turn, settings_for

TOKENS = 16384  # in one batch, about; keeps logits and caches small
STEM = 8  # tokens from which a common beginning is worth a row of forks
NEGLIGIBLE = 1e-6
ROWS = 512  # of logits at a time


@dataclass
class Group:
    """Prompts, by number, that share their first `stem` tokens."""

    members: list[int]
    stem: int

    def length(self, prompts: Sequence[Prompt]) -> int:
        """Tokens of the stem and of what follows it in each prompt."""
        return self.stem + sum(len(prompts[i].ids) - self.stem for i in self.members)


class TorchSpeaker:
    """A `Speaker` (``probes``) whose latents are z: None, or float32 [prompts, exchanges, k].

    Exchange t is read under ``z[:, t % exchanges]``, so one column is a commitment and several are
    redrawn every turn. What is asked in turns becomes prompts, which are read in batches.

    chat: how the model is spoken to (`rendering`), as it was trained.
    """

    def __init__(self, model: CommittedModel, tokenizer: AnyTokenizer,
                 chat: str = "plain") -> None:
        self.model, self.tokenizer, self.chat = model.eval(), tokenizer, chat
        self.rendering = Rendering(tokenizer, chat, settings_for(chat).chat.system)
        self.device = model.base.device

    def prompt(self, turns: Sequence[Turn], stem: str | None = None, first: int = 0) -> Prompt:
        """`turns` behind BOS; with `stem` up to where the model speaks, having begun with it.

        `first` numbers the first exchange; every user's turn but the first begins the next.
        """
        return self.rendering.prompt(turns, stem, first)

    def posterior(self, prefixes: Sequence[Sequence[Turn]]) -> Posterior:
        """q(z* | prefix) of each prefix."""
        rows = [self.prompt(turns).ids for turns in prefixes]
        ids, mask = padded(rows, "left"), padded([np.ones(len(r), np.int64) for r in rows], "left")
        with torch.inference_mode():
            return self.model.posterior(ids.to(self.device), mask.to(self.device))

    def say(self, conversations: Sequence[Turns], under: Tensor | None, tokens: int,
            first: int = 0, uniforms: np.ndarray | None = None,
            stems: Sequence[str] = ()) -> list[str]:
        """As `Speaker.say`."""
        begun = stems or [""] * len(conversations)
        prompts = [self.prompt(turns, stem, first)
                   for turns, stem in zip(conversations, begun, strict=True)]
        return [f"{stem} {text}".strip() for stem, text in
                zip(begun, self.answers(prompts, under, tokens, uniforms), strict=True)]

    def agree(self, conversations: Sequence[Turns], under: Tensor | None) -> np.ndarray:
        """As `Speaker.agree`."""
        found: np.ndarray = self.yes_no([self.prompt(turns, "") for turns in conversations],
                                        under).numpy()
        return found

    def forks(self, histories: Sequence[Turns], items: Sequence[ForkItem],
              under: Tensor | None) -> list[tuple[np.ndarray, np.ndarray, float]]:
        """As `Speaker.forks`; each question is an exchange of its own. All items must have equally
        many values."""
        rows = [(i, x, [*history, guess]) for i, (item, history) in
                enumerate(zip(items, histories, strict=True))
                for x, guess in enumerate(item.guesses)]
        owner = [i for i, _, _ in rows]
        pairs = self.yes_no([asked_as(self.prompt(turns, ""), 1 + x) for _, x, turns in rows],
                            None if under is None else under[owner]).view(len(items), -1, 2)
        named = [(self.prompt([*history, item.naming], item.stem), item.ways)
                 for item, history in zip(items, histories, strict=True)]
        logs = torch.stack([
            value_scores(self, [(prompt, ways[way]) for prompt, ways in named], under)
            for way in range(len(items[0].ways))]).logsumexp(0)
        return [(pair, chances, float(mass)) for pair, chances, mass in
                zip(pairs.numpy(), logs.softmax(-1).numpy(), logs.exp().sum(-1), strict=True)]

    def read(self, texts: Sequence[Turns], under: Tensor | None) -> list[np.ndarray]:
        """As `Speaker.read`, without the last token of each text."""
        return [rows.numpy() for rows in
                self.log_probabilities([self.prompt(turns) for turns in texts], under)]

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
    def scores(self, prompts: Sequence[Prompt], z: Tensor | None,
               targets: Sequence[np.ndarray]) -> list[Tensor]:
        """Log probabilities behind the last tokens of each prompt: of the tokens `targets`, int
        [last, n] for each prompt; float64 of the same shapes.

        Prompts that follow each other, begin alike and have the same z* are read as the forks of
        one row, so that their beginning is read once.
        """
        found: dict[int, Tensor] = {}
        for batch in self._forked(prompts, z, targets):
            ends = torch.cat([row for rows in self._read_forks(batch, prompts, z, targets)
                              for row in rows])
            wanted = [row for group in batch for i in group.members for row in targets[i]]
            logs: list[Tensor] = []
            for begin in range(0, len(ends), ROWS):
                part = wanted[begin : begin + ROWS]
                logits = self.model.base.get_output_embeddings()(ends[begin : begin + len(part)])
                totals = logits.double().logsumexp(-1).cpu()
                logs += (row[torch.from_numpy(ids)].double() - total for row, total, ids in
                         zip(logits.cpu(), totals, part, strict=True))
            for i in (i for group in batch for i in group.members):
                found[i] = torch.stack(logs[: len(targets[i])])
                logs = logs[len(targets[i]) :]
        return [found[i] for i in range(len(prompts))]

    def _forked(self, prompts: Sequence[Prompt], z: Tensor | None,
                targets: Sequence[np.ndarray]) -> list[list[Group]]:
        """Batches of rows of like length; a row holds prompts with a common stem."""
        groups: list[Group] = []
        for i, prompt in enumerate(prompts):
            longest = len(prompt.ids) - len(targets[i])  # what is read off must not be in the stem
            if groups:
                last = groups[-1]
                stem = min(last.stem, longest, prompt.shared(prompts[last.members[0]]))
                same = z is None or bool(torch.equal(z[last.members[0]], z[i]))
                if same and stem >= STEM and 2 * stem >= last.stem:
                    last.members.append(i)
                    last.stem = stem
                    continue
            groups.append(Group([i], longest))
        batches: list[list[Group]] = [[]]
        for group in sorted(groups, key=lambda g: g.length(prompts)):
            if batches[-1] and (len(batches[-1]) + 1) * group.length(prompts) > TOKENS:
                batches.append([])
            batches[-1].append(group)
        return [batch for batch in batches if batch]

    def _read_forks(self, batch: Sequence[Group], prompts: Sequence[Prompt], z: Tensor | None,
                    targets: Sequence[np.ndarray]) -> Iterator[list[Tensor]]:
        """Hidden states behind the last tokens of each member of each row."""
        rows = [[prompts[g.members[0]].to(g.stem), *(prompts[i].behind(g.stem) for i in g.members)]
                for g in batch]

        def joined(name: str, fill: int = 0) -> Tensor:
            parts = [np.concatenate([getattr(p, name) for p in row]) for row in rows]
            return padded(parts, "right", fill).to(self.device)

        fork = padded([np.repeat(np.arange(len(row)), [len(p.ids) for p in row]) for row in rows],
                      "right", -1).to(self.device)
        positions, seen = visible(fork)
        addition = None
        if z is not None:
            assert self.model.commitment is not None
            mine = z[[g.members[0] for g in batch]].to(self.device)
            turns = joined("exchange") % z.shape[1]
            addition = self.model.commitment.addition(
                torch.take_along_dim(mine, turns[:, :, None], dim=1), (fork >= 0).long())
        scores = torch.zeros(seen.shape, dtype=self.model.base.dtype, device=self.device)
        scores.masked_fill_(~seen, float("-inf"))
        out = self.model.hidden(joined("ids"), addition, attention_mask=scores[:, None],
                                position_ids=positions, use_cache=False).last_hidden_state
        for group, row, states in zip(batch, rows, out, strict=True):
            ends = np.cumsum([len(p.ids) for p in row])[1:]
            yield [states[end - len(targets[i]) : end]
                   for i, end in zip(group.members, ends, strict=True)]

    def log_likelihoods(self, asked: Sequence[tuple[Prompt, Sequence[str]]],
                        z: Tensor | None) -> tuple[Tensor, list[list[list[int]]]]:
        """log P(word | prompt) of equally many words for each prompt, float64 [prompts, words], by
        all tokens of the word; and these tokens.

        A word whose first token has less than `NEGLIGIBLE` of the probability of the likeliest
        word keeps that token's, which bounds its own: the rest would change nothing reported.
        """
        continued = [self.rendering.continuations(prompt, words) for prompt, words in asked]
        tokens = [found for _, found in continued]
        firsts = [np.array([[ids[0] for ids in found]]) for found in tokens]
        heads = [prompt.to(kept) for (prompt, _), (kept, _) in zip(asked, continued, strict=True)]
        result = torch.cat(self.scores(heads, z, firsts))
        bound = torch.tensor([[len(ids) > 1 for ids in found] for found in tokens])
        least = result.max(dim=1, keepdim=True).values + math.log(NEGLIGIBLE)
        while (rest := (bound & (result > least)).nonzero().tolist()):
            rows = [asked[n][0].to(continued[n][0], tokens[n][at][:-1]) for n, at in rest]
            later = [np.array(tokens[n][at][1:])[:, None] for n, at in rest]
            owned = None if z is None else z[[n for n, _ in rest]]
            for (n, at), logs in zip(rest, self.scores(rows, owned, later), strict=True):
                result[n, at] += logs.sum()
                bound[n, at] = False
            known = result.masked_fill(bound, -math.inf)  # no longer what a first token promised
            least = known.max(dim=1, keepdim=True).values + math.log(NEGLIGIBLE)
        return result, tokens

    def yes_no(self, prompts: Sequence[Prompt], z: Tensor | None) -> Tensor:
        """P(yes) and P(no), lower-case or capitalised, behind each prompt, float64 [prompts, 2].

        Raises ValueError where the tokenizer cannot tell them apart.
        """
        words = ("yes", "Yes", "no", "No")
        logs, tokens = self.log_likelihoods([(prompt, words) for prompt in prompts], z)
        for found in tokens:
            check_distinct((words[0], words[2]), (found[0], found[2]))
        same = torch.tensor([[False, t[1] == t[0], False, t[3] == t[2]] for t in tokens])
        return logs.exp().masked_fill(same, 0).view(-1, 2, 2).sum(dim=2)

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
        """Continuation of each prompt up to a token that ends an answer, or `tokens` tokens.

        Greedy, or at temperature 1 from `uniforms` [prompts, tokens].
        """
        texts, stops = [""] * len(prompts), sorted(self.rendering.stops)
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
                chosen = chosen_tokens(
                    logits, None if uniforms is None else uniforms[batch, step])
                written = np.concatenate([written, chosen[:, None]], axis=1)
                if bool(np.isin(written, stops).any(axis=1).all()):
                    break
                ids = torch.from_numpy(chosen)[:, None].to(self.device)
                mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
                positions = positions[:, -1:] + 1
                addition = None if addition is None else addition[:, -1:]
            for i, row in zip(batch, written, strict=True):
                end = np.flatnonzero(np.isin(row, stops))
                texts[i] = self.tokenizer.decode(row[: end[0] if len(end) else None].tolist())
        return [text.strip() for text in texts]


def asked_as(prompt: Prompt, number: int) -> Prompt:
    """`prompt` with its last exchange numbered `number` further on: questions that a conversation
    is forked into are exchanges of their own."""
    last = prompt.exchange.max()
    return replace(prompt, exchange=np.where(prompt.exchange == last, last + number,
                                             prompt.exchange))


def name_values(speaker: TorchSpeaker, asked: Sequence[tuple[Prompt, Sequence[str]]],
                z: Tensor | None) -> Tensor:
    """P(value | what is it?) among the values, float64 [prompts, values]; ValueError as in
    :func:`value_scores`."""
    return value_scores(speaker, asked, z).softmax(-1)


def value_scores(speaker: TorchSpeaker, asked: Sequence[tuple[Prompt, Sequence[str]]],
                 z: Tensor | None) -> Tensor:
    """log P(value | what is it?), float64 [prompts, values].

    Raises ValueError naming two values that the tokenizer cannot tell apart.
    """
    logs, tokens = speaker.log_likelihoods(asked, z)
    for (_, values), found in zip(asked, tokens, strict=True):
        check_distinct(values, found)
    return logs
