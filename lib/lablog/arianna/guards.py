"""What must not go wrong silently between base run and fine-tuning (lab log C3).

Warm-up, fresh counters, changed weights and a finite loss are guarded in the training loop itself
(`lablog.models.training`: check_schedule, relative_update; `lablog.models.trainer`), overlap of
training and held-out text by `lablog.text.packing.refuse_overlap`, prompts without the form by
`lablog.arianna.chat.warn_of_form`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from lablog.files import parsing

SHAPE = {
    "hidden_size": "width", "intermediate_size": "feed_forward", "num_hidden_layers": "layers",
    "num_attention_heads": "heads", "num_key_value_heads": "kv_heads",
    "max_position_embeddings": "context", "tie_word_embeddings": "tied_embeddings",
    "vocab_size": "vocabulary",
}
SETTINGS = ("batch_size", "gradient_accumulation", "precision")


def base_parameters(base: Path) -> dict[str, Any]:
    """What a fine-tuning run must share with the run that made the folder `base`.

    Shape and vocabulary, the tokenizer's hash, batch size, accumulation and number format.
    FileNotFoundError if the folder is not one of `train_causal_lm`, ValueError naming the file
    that is none of it.
    """
    for name in ("config.json", "training.json", "model.safetensors"):
        if not (base / name).is_file():
            raise FileNotFoundError(f"{base} is no base checkpoint: it has no {name}")
    with parsing(base / "config.json", "a configuration of Llama", KeyError, TypeError):
        config = json.loads((base / "config.json").read_text())
        shape = {ours: config[theirs] for theirs, ours in SHAPE.items()}
    with parsing(base / "training.json", "the log of a training", KeyError, TypeError):
        log = json.loads((base / "training.json").read_text())
        return {**shape, "tokenizer": log["tokenizer_sha256"],
                **{name: log["settings"][name] for name in SETTINGS}}


def check_base(base: Path, wanted: Mapping[str, Any], ablation: Collection[str] = ()) -> None:
    """Raise ValueError naming both values where `wanted` differs from the base run.

    Names in `ablation` may differ: that has to be asked for. Unknown names are errors.
    """
    found = base_parameters(base)
    if unknown := (set(wanted) | set(ablation)) - set(found):
        raise ValueError(f"{sorted(unknown)} are no parameters of a base run: {sorted(found)}")
    wrong = [
        f"{name} is {value!r}, but {found[name]!r} in the base run"
        for name, value in wanted.items() if value != found[name] and name not in ablation
    ]
    if wrong:
        raise ValueError(
            f"fine-tuning of {base.name} does not match its base run: {'; '.join(wrong)}. Take "
            "the base run's values, or name the parameter as an ablation"
        )
