"""Steering vectors by difference of means: what a direction that was not drawn at random does.

For one value of every topic: the mean hidden state at the value in answers that name it, minus the
mean in answers that name another (Rimsky et al., Steering Llama 2 via Contrastive Activation
Addition, ACL 2024; the community's repeng does the same in every layer). Added behind the same
layer, it makes the value likely everywhere. It is no commitment, since it was chosen by whoever
made it; it says what a direction can do at all.

The state is read where the value has just been said. Behind the finished turn it hardly differs any
more between values, and a direction from there does not steer.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lablog.commitment.llama_cpp_speaker import Engine, LlamaCppSpeaker
from lablog.models.llama_cpp import Context
from lablog.text.dialogues import DialogueSettings, Draw, Turn

STATEMENTS = 4  # answers that name a value, each to another question in another phrasing


def statements(settings: DialogueSettings, topic: str, value: str) -> list[tuple[Turn, str]]:
    """Questions for a favourite `topic`, and answers up to and with the `value` that they name."""
    draw, found = Draw(settings, 0), []
    spelled = draw.spelled(topic, value)
    for number in range(STATEMENTS):
        answer = draw.turn("A", "answer", topic, value, phrasing=number).text
        found.append((draw.turn("U", "question", topic, phrasing=number),
                      answer[: answer.index(spelled) + len(spelled)]))
    return found


def steering_vectors(engine: Engine, settings: DialogueSettings, layer: int,
                     toward: int = 0) -> Mapping[tuple[str, ...], np.ndarray]:
    """For each topic, by its values, the direction toward value number `toward`, float32 [width],
    of the states behind `layer`, counted from 0.

    Read in f32 by a context of its own. ValueError for a layer that the model does not have.
    """
    if not 0 <= layer < engine.model.layers:
        raise ValueError(f"layer = {layer}: the model has layers 0 to {engine.model.layers - 1}")
    found = {}
    asked = engine.settings
    with Context(engine.model, 1, asked.window, asked.threads, keep_layer=layer) as context:
        speaker = LlamaCppSpeaker(context, asked.chat, asked.system)

        def state(question: Turn, answer: str) -> np.ndarray:
            context.clear()
            context.prefill({0: speaker.prompt([question], answer)})
            last: np.ndarray = context.states()[-1]
            return last

        for topic, values in settings.topics.items():
            means = np.stack([
                np.mean([state(*told) for told in statements(settings, topic, value)], axis=0)
                for value in values])
            others = np.delete(means, toward, axis=0).mean(axis=0)
            found[tuple(values)] = (means[toward] - others).astype(np.float32)
    return found
