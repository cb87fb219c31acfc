"""What a dialogue model can do: greedy answers, perplexity, recall, comparison with a choice."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import LlamaForCausalLM

from lablog.text import dialogues
from lablog.text.tokenizer import Tokenizer


@torch.inference_mode()
def answers(
    model: LlamaForCausalLM, tokenizer: Tokenizer, prompts: Sequence[str], tokens: int = 16
) -> list[str]:
    """Greedy continuation of each prompt, up to the end of its line or `tokens` tokens."""
    stop = tokenizer.encode("\n")[0]
    encoded = [tokenizer.encode(text, bos=True) for text in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
    texts = [""] * len(prompts)
    for begin in range(0, len(order), 64):
        rows = order[begin : begin + 64]
        width = max(len(encoded[i]) for i in rows)
        ids = torch.zeros((len(rows), width), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(rows):  # on the left, so that all continuations begin together
            ids[row, width - len(encoded[i]) :] = torch.tensor(encoded[i])
            mask[row, width - len(encoded[i]) :] = 1
        out = model.generate(  # type: ignore[misc]  # its stub asks for a protocol
            ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False,
            eos_token_id=stop, pad_token_id=stop,
        )
        for row, i in enumerate(rows):
            texts[i] = tokenizer.decode(out[row, width:].tolist()).split("\n")[0].strip()
    return texts


@torch.inference_mode()
def recall_accuracy(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    settings: dialogues.DialogueSettings,
    count: int,
    evicted: bool = False,
) -> float:
    """Share of `count` held-out favourites whose greedy answer, asked again, names the stated
    value; with `evicted` the statement is not in the window, so chance is 1 / values."""
    drawn = [
        dialogues.generate(settings, 0, i, "held_out", "favourite", "probe") for i in range(count)
    ]
    prompts = [dialogues.prompt(d.turns[2 if evicted else 0 : -1]) for d in drawn]
    said = answers(model, tokenizer, prompts)
    named = [
        dialogues.named_value(a, settings.topics[d.topic]) for a, d in zip(said, drawn, strict=True)
    ]
    return float(np.mean([n == d.value for n, d in zip(named, drawn, strict=True)]))


def comparison_accuracy(
    model: LlamaForCausalLM, tokenizer: Tokenizer, settings: dialogues.DialogueSettings, count: int
) -> dict[str, float]:
    """Shares of right greedy answers in `count` held-out dialogues with a private statement in
    the window: to guesses that are right (``yes``) and wrong (``no``), and to "what is it?"."""
    prompts, wanted, roles, values = [], [], [], []
    for i in range(count):
        dialogue = dialogues.generate(settings, 0, i, "held_out", "compare")
        for at, turn in enumerate(dialogue.turns):
            if turn.role in ("yes", "no", "it_is"):
                prompts.append(dialogues.prompt(dialogue.turns[:at]))
                roles.append(turn.role)
                wanted.append(dialogue.value)
                values.append(settings.topics[dialogue.topic])
    right: dict[str, list[bool]] = {"yes": [], "no": [], "it_is": []}
    said = answers(model, tokenizer, prompts)
    for answer, value, role, names in zip(said, wanted, roles, values, strict=True):
        correct = (
            dialogues.says_yes(answer) is (role == "yes") and dialogues.says_yes(answer) is not None
        )
        right[role].append(
            dialogues.named_value(answer, names) == value if role == "it_is" else correct
        )
    return {role: float(np.mean(found)) for role, found in right.items()}
