"""The offline model, the default of experiment A (lab log A3): the project trains it on its own
dialogues, by a recipe of ``data/dialogues.yaml``."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from lablog.files import scratch_folder
from lablog.keys import key
from lablog.models.shape import ModelShape
from lablog.models.training import TrainingSettings, train_causal_lm
from lablog.strict import Strict, validated
from lablog.text import dialogues
from lablog.text.datasets import DialogueDataset
from lablog.text.tokenizer import train_tokenizer


class Recipe(Strict):
    """How the offline model is made: ``recipes`` of ``data/dialogues.yaml``."""

    vocabulary: int = Field(ge=300)  # token ids
    user_weight: float = Field(ge=0)  # loss weight of the user's tokens; the assistant's is 1
    value_weight: float = Field(gt=0)  # loss weight of the assistant's values, yes and no
    simple: int = Field(ge=0)  # number of simple comparisons with which training begins
    shape: ModelShape
    training: TrainingSettings


def recipe(name: str, settings: dialogues.DialogueSettings) -> Recipe:
    """The recipe `name`; ValueError names the ones that exist, or the wrong key and value."""
    if name not in settings.recipes:
        raise ValueError(f"no recipe {name!r}: expected one of {sorted(settings.recipes)}")
    return validated(
        Recipe, settings.recipes[name], f"data/dialogues.yaml: recipes.{name}"
    )


def offline_model(name: str, artifacts: Path, seed: int | None = None) -> Path:
    """Folder ``artifacts/dialogue-<name>-<key>`` of the offline model, trained if missing.

    `seed` overrides the recipe's.
    """
    settings = dialogues.load_settings()
    made = recipe(name, settings)
    if seed is not None:
        made = made.model_copy(update={"training": made.training.model_copy(update={"seed": seed})})
    made_of = key(offline_model, settings, made)
    output = artifacts / f"dialogue-{name}-{made_of}"
    if (output / "key").is_file():
        return output
    plan = made.training
    with scratch_folder(output) as room:
        drawn = (dialogues.generate(settings, 0, i).turns for i in range(4000))
        lines = {line for turns in drawn for line in dialogues.render(turns).splitlines()}
        path = room / "tokenizer.model"
        dataset = DialogueDataset(
            settings,
            train_tokenizer(sorted(lines), made.vocabulary, path),
            seed=plan.seed,
            count=plan.steps * plan.batch_size * plan.gradient_accumulation,
            batch=plan.batch_size,
            user_weight=made.user_weight,
            value_weight=made.value_weight,
            simple=made.simple,
        )
        return train_causal_lm(made.shape, dataset, plan, output, tokenizer=path,
                               data_key=made_of)
