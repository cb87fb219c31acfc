"""What the latent of a trained commitment carries: choices of the prior, KL, active units."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lablog.commitment import novelty
from lablog.commitment.conversations import Conversation
from lablog.commitment.qlora import ACTIVE, CommittedModel
from lablog.commitment.torch_speaker import TorchSpeaker, name_values
from lablog.text.dialogues import Draw, settings_for, trained_part

CHOICES = 106  # a spawn key, apart from those of dialogues, probes, conversations


def choices(speaker: TorchSpeaker, draws: int, seed: int) -> tuple[Tensor, np.ndarray]:
    """z* from the prior [draws, k] and, for each topic of which nothing is held out, the value
    that each draw names (int [topics, draws]); the same draws in every topic."""
    settings = settings_for(speaker.chat)
    assert speaker.model.commitment is not None
    z = speaker.model.commitment.prior(draws, torch.Generator().manual_seed(seed))
    named = []
    for number, topic in enumerate(novelty.whole_topics(settings)):
        draw = Draw(trained_part(settings), seed, CHOICES, number)
        turns = [*draw.exchange("opening", "chosen", topic), draw.turn("U", "what_is_it", topic)]
        prompt = speaker.prompt(turns, settings.it_is[0].split(" {value}")[0])
        values = [draw.spelled(topic, value) for value in settings.topics[topic]]
        asked = [(prompt, values)] * draws
        named.append(name_values(speaker, asked, z[:, None]).argmax(dim=1))
    return z, torch.stack(named).numpy()


@torch.inference_mode()
def diagnose(model: CommittedModel, dataset: Dataset[Conversation], batch: int) -> dict[str, Any]:
    """KL per dimension, active units, and the LM loss (nats per conversation) under the true z*,
    z* of another conversation of the batch, and none; on `dataset`."""
    losses: dict[str, list[float]] = {"true": [], "shuffled": [], "zero": []}
    kls, means = [], []
    size: int = len(dataset)  # type: ignore[arg-type]  # Dataset does not say that it is sized
    for begin in range(0, size, batch):
        inputs = model.collated([dataset[i] for i in range(begin, min(begin + batch, size))])
        posterior = model.posterior(inputs["prefix_ids"], inputs["prefix_mask"])
        noise = torch.randn(
            posterior.mean.shape, generator=torch.Generator().manual_seed(begin))
        z = posterior.sample(noise.to(posterior.mean))
        for name, used in (("true", z), ("shuffled", z.roll(1, dims=0)), ("zero", 0 * z)):
            losses[name].append(model(**inputs, z=used)["lm"].item())
        kls.append(posterior.kl())
        means.append(posterior.mean)
    mean = torch.cat(means)
    return {"kl_per_dimension": torch.cat(kls).mean(dim=0).tolist(),
            "active_units": int((mean.var(dim=0) > ACTIVE).sum()),
            **{f"nll_{name}": float(np.mean(values)) for name, values in losses.items()}}
