"""Can the probes be read on this model? Asked before anything is trained, from its files alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig

from lablog.commitment import probes
from lablog.commitment.qlora import Plan, layers_of
from lablog.commitment.rendering import Prompt, Rendering, check_distinct
from lablog.text.chat_tokenizer import tokenizer_of
from lablog.text.dialogues import DialogueSettings, Draw, Turn

ENDS = 8  # tokens that begin and end a turn, at most


def check_readable(base: Path, plan: Plan, settings: DialogueSettings, items: probes.Items,
                   texts: Sequence[Sequence[Turn]]) -> None:
    """Raise one ValueError that names everything in which `plan` or the probes do not fit `base`.

    Every value of a topic, and yes and no, must be tokens of their own behind the question; the
    longest probe must fit the model's window with its answer; k and layers must exist.
    """
    rendering = Rendering(tokenizer_of(base), plan.chat, settings.chat.system)
    config: PreTrainedConfig = AutoConfig.from_pretrained(base, trust_remote_code=False)
    problems = [*_misfits(plan, config, len(rendering.tokenizer)), *_alike(rendering, settings)]
    longest = longest_probe(rendering, items, texts)
    if longest > config.max_position_embeddings:
        problems.append(f"the longest probe has {longest} tokens with its answer, the model's "
                        f"window only {config.max_position_embeddings}: lower probe_gap in "
                        "data/dialogues.yaml (questions.yaml for chat=auto), or choose a model "
                        "with a longer window")
    if problems:
        raise ValueError(f"{base.name} (chat = {plan.chat}) cannot be probed:\n"
                         + "\n".join(problems))


def longest_probe(rendering: Rendering, items: probes.Items,
                  texts: Sequence[Sequence[Turn]]) -> int:
    """Tokens of the longest window that the probes make, answers of the model's own included."""
    recall = [len(rendering.prompt([i.question, *i.distractors, i.requestion], "").ids)
              + 2 * probes.ANSWER_TOKENS + ENDS for i in items.recall]
    fork = [_length(rendering, rendering.prompt([i.note, *i.opening, turn], stem), words)
            for i in items.fork for turn, stem, words in
            ((i.naming, i.stem, i.values), *((guess, "", ("Yes", "No")) for guess in i.guesses))]
    return max([*recall, *fork, *(len(rendering.prompt(turns).ids) for turns in texts)], default=0)


def _length(rendering: Rendering, prompt: Prompt, words: Sequence[str]) -> int:
    kept, tokens = rendering.continuations(prompt, words)
    return kept + max(map(len, tokens))


def _misfits(plan: Plan, config: PreTrainedConfig, vocabulary: int) -> Iterator[str]:
    if plan.k > config.hidden_size:
        yield (f"k = {plan.k} is larger than the model's width {config.hidden_size}: choose a "
               "smaller k")
    first, last = layers_of(plan, config.num_hidden_layers)
    if not 0 <= first <= last < config.num_hidden_layers:
        yield (f"first_layer = {first}, last_layer = {last}: the model has layers 0 to "
               f"{config.num_hidden_layers - 1}")
    if vocabulary > config.vocab_size:
        yield (f"the tokenizer has {vocabulary} tokens, the model only {config.vocab_size}: give "
               "the tokenizer that belongs to it")


def _alike(rendering: Rendering, settings: DialogueSettings) -> Iterator[str]:
    """Words that the tokenizer cannot tell apart."""
    draw = Draw(settings, 0, 0)
    stems = [phrase.split("{value}")[0] for phrase in settings.it_is]
    for topic, values in settings.topics.items():
        asked = draw.turn("U", "what_is_it", topic, phrasing=0)
        for stem in stems:
            prompt = rendering.prompt([asked], stem.format(topic=topic).strip())
            try:
                for said in zip(*map(settings.chat.said, values), strict=True):
                    check_distinct(said, rendering.continuations(prompt, said)[1])
            except ValueError as error:
                yield f"{topic}: {error}"
                break
    prompt = rendering.prompt([draw.turn("U", "is_it", "color", "red", 0)], "")
    for words in (("yes", "no"), ("Yes", "No")):
        try:
            check_distinct(words, rendering.continuations(prompt, words)[1])
        except ValueError as error:
            yield str(error)
