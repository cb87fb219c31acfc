"""QLoRA training of the commitment (lab log A5): a base in 4 bits, LoRA, head and W_c.

Loss = LM + β · max(KL(q ‖ N(0, I/k)), free bits), both per conversation, where LM is the weighted
sum of the cross-entropies of the model's own words: with weights of 1 and β = 1 the negative ELBO.
The posterior reads a prefix that the decoder never sees. Against posterior collapse: warm-up at
β = 0, annealing, free bits (Bowman et al. 2016; Kingma et al. 2016); that it happened nevertheless
is seen in the KL and in the active units (Burda et al. 2016).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.helpers import disable_input_dtype_casting
from pydantic import Field, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils.logging import disable_progress_bar

from lablog.commitment.conversations import Conversation, collate
from lablog.commitment.posterior import (
    SETTINGS,
    Code,
    CommitmentSettings,
    Positions,
    Posterior,
    Reader,
    VariationalCommitment,
    decisive_states,
)
from lablog.commitment.rendering import Chat
from lablog.commitment.torch_injection import injected
from lablog.files import parsing, sha256_of
from lablog.keys import key
from lablog.models.trainer import GuardedTrainer
from lablog.models.training import TrainingSettings, model_hash, train_to_folder
from lablog.strict import Strict

Quantisation = Literal["nf4", "none"]
READ = 960  # conversations, the first ones, whose prefixes a discriminant is fitted to
ACTIVE = 0.01  # variance of a unit's posterior mean from which it counts as active (Burda et al.)


class LoraSettings(Strict):
    """Low-rank adaptation: rank, alpha (the update is scaled by alpha/r), dropout, modules."""

    r: int = Field(ge=1)
    alpha: float = Field(gt=0)
    dropout: float = Field(ge=0, lt=1)
    targets: list[str] | Literal["all-linear"]


class Schedule(Strict):
    """β is 0 for `warmup` steps, then rises linearly to `beta` over `annealing` steps;
    `free_bits` nats of KL (summed over the latent, mean over the batch) cost nothing. Along with β
    the share of conversations rises whose z* is drawn from the prior's `cells`, which needs data
    that number their commitments."""

    beta: float = Field(ge=0)
    warmup: int = Field(ge=0)
    annealing: int = Field(ge=0)
    free_bits: float = Field(ge=0)
    cells: float = Field(0.0, ge=0, le=1)

    def at(self, step: int) -> float:
        """β at a 0-based optimiser step."""
        return self.beta * self.risen(step)

    def risen(self, step: int) -> float:
        """How far the schedule has risen at a 0-based optimiser step, 0 to 1."""
        return min(1.0, max(0.0, (step - self.warmup + 1) / (self.annealing + 1)))


class Plan(Strict):
    """Everything that decides a trained commitment beside the base and the data.

    k 0 trains LoRA alone on the same data (the control without z*). layers: first and last
    that receive z*, −1 being the model's last; None means all.
    positions: z* is added behind ``all`` tokens, or at the ``first`` alone: one virtual token of
    prefix tuning, whose keys and values carry it to the others. code: z* is ``gaussian`` with a
    posterior that reads the prefix, or the ``label`` of the commitment as a one-hot vector: a
    table of learned steering vectors, of which the data say which one to use. projection: W_c is
    ``trained``, or keeps its random start (``frozen``).
    reader: what the head reads of a prefix: the hidden state of the ``adapted`` model, or the
    ``discriminant`` of that of the base without its adapter, fitted before the training begins.
    chat: how the model is spoken to, in training and by the probes.
    compiled: the layers by torch.compile, which fuses what lies between products.
    """

    k: int = Field(ge=0)
    strength: float
    layers: tuple[int, int] | None = None
    lora: LoraSettings
    schedule: Schedule
    training: TrainingSettings
    quantisation: Quantisation
    positions: Positions = "all"
    code: Code = "gaussian"
    projection: Literal["trained", "frozen"] = "trained"
    reader: Reader = "adapted"
    chat: Chat = "plain"
    window: int = Field(1024, ge=2)  # tokens that a prefix or a chat may have
    gradient_checkpointing: bool = False
    compiled: bool = False

    @model_validator(mode="after")
    def _check(self) -> Plan:
        if self.k and self.schedule.warmup >= self.training.steps:
            raise ValueError(f"schedule.warmup = {self.schedule.warmup} is no shorter than the "
                             f"run of {self.training.steps} steps: β would never rise above 0")
        return self


def load_base(folder: Path, quantisation: Quantisation, precision: Literal["f32", "bf16"],
              cpu: bool = True) -> PreTrainedModel:
    """A base model with frozen weights; with ``nf4`` its linear layers lie in 4 bits.

    Double quantisation, and products in `precision`. Raises RuntimeError naming the option that
    runs unquantised where the platform has no bitsandbytes.

    In bf16 on a CPU attention is computed step by step: the gradient of PyTorch's fused attention
    takes a quarter of a training step there.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    options: dict[str, Any] = {}
    if quantisation == "nf4":
        if find_spec("bitsandbytes") is None:
            raise RuntimeError("bitsandbytes is not available on this platform, so no model can "
                               "be loaded in 4 bits: set quantisation=none to train unquantised")
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    disable_progress_bar()
    with parsing(folder, "a model that can be loaded", SafetensorError, RuntimeError, KeyError,
                 TypeError, ArithmeticError, StrictDataclassError):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, device_map=None if cpu else "auto", use_safetensors=True,
            trust_remote_code=False,
            attn_implementation="eager" if cpu and precision == "bf16" else "sdpa",
            output_loading_info=True, **options
        )
        model, found = loaded
        # Transformers would give weights that are not there random values, and say so in a log.
        if wrong := sorted(found["missing_keys"] | found["unexpected_keys"]):
            raise ValueError(f"{folder} has other weights than its config.json says: "
                             f"{', '.join(wrong[:3])}")
    network: PreTrainedModel = model.requires_grad_(False)
    return network


class CommittedModel(nn.Module):
    """A model (with LoRA or as it is) and, unless None, a commitment that is injected into it."""

    def __init__(self, model: PeftModel | PreTrainedModel,
                 commitment: VariationalCommitment | None = None) -> None:
        super().__init__()
        self.model, self.commitment = model, commitment

    @property
    def base(self) -> PreTrainedModel:
        """The model inside the adapter; its layers contain what the adapter adds."""
        inside: Any = self.model
        if isinstance(inside, PeftModel):
            inside = inside.get_base_model()
        return inside

    def posterior(self, ids: Tensor, mask: Tensor) -> Posterior:
        """q(z* | prefix) of prefixes [n, tokens], padded on either side.

        Raises ValueError for a prefix that is empty, or longer than the model's window.
        """
        assert self.commitment is not None
        with self._bare() if self.commitment.discriminant else nullcontext():
            hidden = self._read(ids, mask)
        return self.commitment.posterior(hidden, mask)

    def decisive(self, ids: Tensor, mask: Tensor) -> Tensor:
        """What a discriminant reads of prefixes [n, tokens]: float32 [n, d], of the base."""
        with self._bare():
            return decisive_states(self._read(ids, mask), mask).float()

    @contextmanager
    def _bare(self) -> Iterator[None]:
        """The base as it is, and no gradients, since nothing in it is trained."""
        model = self.model
        with torch.no_grad(), (
                model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()):
            yield

    def _read(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Hidden states [n, tokens, d] of prefixes."""
        window = self.base.config.max_position_embeddings
        if ids.shape[1] > window:
            raise ValueError(f"a prefix of {ids.shape[1]} tokens does not fit the model's window "
                             f"of {window}: shorten it")
        states: Tensor = self.base.get_decoder()(
            input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            use_cache=False,
        ).last_hidden_state
        return states

    def hidden(self, ids: Tensor, addition: Tensor | None, **options: Any) -> Any:
        """The decoder's output with `addition` behind every chosen layer (None: nothing)."""
        decoder = self.base.get_decoder()
        if addition is None or self.commitment is None:
            return decoder(input_ids=ids, **options)
        with injected(self.base, addition, self.commitment.settings.layers):
            return decoder(input_ids=ids, **options)

    def forward(self, commitment: Tensor, prefix_ids: Tensor, prefix_mask: Tensor,
                input_ids: Tensor, mask: Tensor, weights: Tensor, position_ids: Tensor,
                attention: Tensor, beta: float = 0.0, free_bits: float = 0.0, cells: float = 0.0,
                z: Tensor | None = None) -> dict[str, Tensor]:
        """Loss, its parts ``lm`` and ``kl`` (nats per conversation), and the posterior's means.

        With `z` [n, k] that is injected, the prefix is not read, and the loss is ``lm``. `cells`
        is the share of rows whose z* comes from the prior's `Cells`, which follow in training.
        """
        addition, parts = None, {}
        if self.commitment is not None and z is None and self.commitment.settings.code == "label":
            z = self.commitment.label(commitment)
        if self.commitment is not None and z is not None:
            addition = self.commitment.addition(z, mask)
        elif self.commitment is not None:
            posterior = self.posterior(prefix_ids, prefix_mask)
            regions = self.commitment.cells
            if regions is not None and self.training:
                regions.follow(posterior, commitment)
            drawn = (regions.sample(posterior, commitment, cells) if regions and cells
                     else posterior.sample())
            addition = self.commitment.addition(drawn, mask)
            parts = {"kl": posterior.kl().sum(dim=1).mean(), "means": posterior.mean.detach()}
        # What is added to the scores; made once, where each layer would make it of a mask.
        scores = torch.zeros(attention.shape, dtype=self.base.dtype, device=attention.device)
        scores.masked_fill_(~attention, float("-inf"))
        hidden = self.hidden(input_ids, addition, attention_mask=scores,
                             position_ids=position_ids, use_cache=False).last_hidden_state
        # Each token predicts the next; where nothing is to be learnt no logits are made.
        ahead = weights.roll(-1, dims=1)
        ahead[:, -1] = 0
        chosen = ahead != 0
        logits = self.base.get_output_embeddings()(hidden[chosen]).float()
        loss = cross_entropy(logits, input_ids.roll(-1, dims=1)[chosen], reduction="none")
        lm = (loss * ahead[chosen]).sum() / len(weights)
        total = lm + beta * parts["kl"].clamp(min=free_bits) if "kl" in parts else lm
        return {"loss": total, "lm": lm.detach(), **parts}

    def collated(self, conversations: Sequence[Conversation]) -> dict[str, Tensor]:
        """What `forward` takes, on the model's device."""
        return {n: part.to(self.base.device) for n, part in collate(conversations).items()}

    def trainable(self) -> dict[str, Tensor]:
        """Everything that training changes, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold: `trainable`, and what the cells have seen."""
        regions = self.commitment.cells if self.commitment is not None else None
        seen = {} if regions is None else dict(regions.named_buffers())
        return self.trainable() | {f"cells.{name}": buffer for name, buffer in seen.items()}


class LogLastStep(TrainerCallback):
    """Logs behind the last step too, which need not be a multiple of the interval."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True


class CommitmentTrainer(GuardedTrainer):
    """The Trainer for `CommittedModel`: schedules β, logs KL and active units, and checkpoints
    what is trained, not the base."""

    def __init__(self, *, schedule: Schedule, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.schedule = schedule
        self.add_callback(LogLastStep())
        self.seen: list[Mapping[str, Tensor]] = []

    def training_step(self, model: Any, *args: Any, **kwargs: Any) -> Tensor:
        # Adapters are f32, and peft casts what goes into them; autocast casts it back, so that
        # nothing but a copy of every input is lost.
        with disable_input_dtype_casting(model, active=self.args.bf16):
            return super().training_step(model, *args, **kwargs)

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False,
                     num_items_in_batch: Any = None) -> Any:
        schedule, step = self.schedule, self.state.global_step
        parts = model(**inputs, beta=schedule.at(step), free_bits=schedule.free_bits,
                      cells=schedule.cells * schedule.risen(step))
        tokens = inputs["mask"].sum() + inputs["prefix_mask"].sum()
        self.seen.append(
            {"tokens": tokens} | {n: part.detach() for n, part in parts.items() if n != "loss"}
        )
        return (parts["loss"], parts) if return_outputs else parts["loss"]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self.seen and "loss" in logs:
            mine = torch.stack([parts["tokens"] for parts in self.seen]).sum()
            logs["tokens"] = int(self.accelerator.reduce(mine))  # of all processes
            for name in ("lm", "kl") if "kl" in self.seen[0] else ("lm",):
                logs[name] = torch.stack([parts[name] for parts in self.seen]).mean().item()
            if "means" in self.seen[0]:
                means = torch.cat([parts["means"] for parts in self.seen])
                logs["active_units"] = int((means.var(dim=0) > ACTIVE).sum())
                logs["beta"] = self.schedule.at(self.state.global_step - 1)
            self.seen.clear()
        super().log(logs, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir or ".")
        folder.mkdir(parents=True, exist_ok=True)
        tensors = self.accelerator.unwrap_model(self.model).state()
        save_file({n: t.detach().contiguous() for n, t in tensors.items()},
                  folder / "model.safetensors")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        tensors = load_file(Path(resume_from_checkpoint) / "model.safetensors")
        state = self.accelerator.unwrap_model(model or self.model).state()
        if tensors.keys() != state.keys():
            raise ValueError(f"{resume_from_checkpoint} holds other parameters than the model")
        with torch.no_grad():
            for name, tensor in state.items():
                tensor.copy_(tensors[name])


@contextmanager
def renamed() -> Iterator[None]:
    """Quiet where peft 0.21 uses names that transformers 5.23 still has but warns about."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`\w*gradient_checkpointing\w*` is deprecated")
        yield


def committed_model(base: PreTrainedModel, plan: Plan, commitments: int = 0) -> CommittedModel:
    """`base` with a fresh adapter and a fresh commitment, from PyTorch's generator; the latter
    with cells for as many `commitments` as the data number, if the schedule uses cells."""
    settings = LoraConfig(
        r=plan.lora.r, lora_alpha=plan.lora.alpha,  # type: ignore[arg-type]  # any number does
        lora_dropout=plan.lora.dropout, target_modules=plan.lora.targets, task_type="CAUSAL_LM",
    )
    with renamed():
        if plan.gradient_checkpointing:
            base = prepare_model_for_kbit_training(
                base, gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        adapted: Any = get_peft_model(base, settings)
    commitment = None
    if plan.k:
        layers = layers_of(plan, base.config.num_hidden_layers)
        commitment = VariationalCommitment(CommitmentSettings(
            k=plan.k, width=base.config.hidden_size, layers=layers, strength=plan.strength,
            positions=plan.positions, code=plan.code, reader=plan.reader,
        ), commitments if plan.schedule.cells else 0).to(base.device)
        commitment.projection.requires_grad_(plan.projection == "trained")
        if plan.code == "label":
            commitment.head.requires_grad_(False)
    return CommittedModel(adapted, commitment)


def fit_discriminant(model: CommittedModel, dataset: Dataset[Conversation], batch: int) -> None:
    """Fit what `model` reads prefixes by to those of the first `READ` conversations, or of all.

    `model` is left in training mode: in evaluation bitsandbytes packs the weights of some CPUs in
    another layout, which compiled layers do not expect.
    """
    assert model.commitment is not None
    assert model.commitment.discriminant is not None
    model.train()
    count = min(READ, len(dataset))  # type: ignore[arg-type]  # it does not say that it is sized
    states, commitments = [], []
    dtype = model.base.dtype
    with torch.autocast(model.base.device.type, dtype, enabled=dtype == torch.bfloat16):
        for begin in range(0, count, batch):
            part = model.collated([dataset[i] for i in range(begin, min(begin + batch, count))])
            states.append(model.decisive(part["prefix_ids"], part["prefix_mask"]))
            commitments.append(part["commitment"])
    model.commitment.discriminant.fit(torch.cat(states), torch.cat(commitments))


def compile_layers(model: CommittedModel) -> None:
    """Compile what each layer computes, for any shape; what is injected behind it stays outside."""
    for layer in model.base.get_decoder().layers:
        layer.forward = torch.compile(layer.forward, dynamic=True)


def layers_of(plan: Plan, layers: int) -> tuple[int, int]:
    """First and last layer that receive z* in a model of so many `layers`, from 0."""
    first, last = plan.layers or (0, -1)
    return first, layers - 1 if last == -1 else last


def base_hash(folder: Path) -> str:
    """SHA-256 over the base's weights and configuration: what a commitment belongs to."""
    return sha256_of([*folder.glob("*.safetensors"), folder / "config.json"], folder)


def training_key(base: Path, plan: Plan, data: str) -> str:
    """Key of what `plan` trains on `base` with the conversations of the key `data`."""
    return key(train_commitment, plan, model_hash(base), data)


def train_commitment(base: Path, dataset: Dataset[Conversation], plan: Plan, output: Path,
                     data_key: str) -> Path:
    """Train adapter, head and W_c on the base model in folder `base`; returns `output`.

    `output` holds ``adapter/`` (peft), ``commitment.safetensors`` and ``commitment.json`` (unless
    k is 0), ``training.json`` and ``plan.json``. It appears whole or not at all; a call with the
    same arguments resumes to the same bits. Raises FloatingPointError at a loss of NaN, ValueError
    for a k beyond the width or layers that the model does not have.
    """
    digest = base_hash(base)
    made_of = training_key(base, plan, data_key)
    commitments = getattr(dataset, "commitments", 0)
    if not commitments and plan.k and (plan.schedule.cells or plan.code == "label"
                                       or plan.reader == "discriminant"):
        raise ValueError(f"cells = {plan.schedule.cells:g}, code = {plan.code}, reader = "
                         f"{plan.reader}: cells, labels and a discriminant need data that number "
                         "their commitments, and these do not; set cells to 0, code to gaussian "
                         "and reader to adapted")

    def build(arguments: TrainingArguments) -> Trainer:
        model = load_base(base, plan.quantisation, plan.training.precision, plan.training.cpu)
        committed = committed_model(model, plan, commitments)
        if plan.compiled:
            compile_layers(committed)
        if committed.commitment is not None and plan.reader == "discriminant":
            fit_discriminant(committed, dataset, plan.training.batch_size)
        return CommitmentTrainer(model=committed, args=arguments, train_dataset=dataset,
                                 data_collator=collate, schedule=plan.schedule)

    def save(trainer: Trainer, folder: Path) -> None:
        model = trainer.accelerator.unwrap_model(trainer.model)
        model.model.save_pretrained(folder / "adapter")
        if model.commitment is not None:
            model.commitment.save(folder, digest)
        (folder / "plan.json").write_text(plan.model_dump_json(indent=1) + "\n")

    return train_to_folder(output, made_of, plan.training, build, save)


def plan_of(trained: Path) -> Plan:
    """How the training result or export in folder `trained` was trained."""
    return Plan.model_validate_json((trained / "plan.json").read_text())


def dequantised(base: Path, plan: Plan) -> PreTrainedModel:
    """`base` with its weights as training by `plan` saw them (rounded by NF4), in f32 on the CPU.

    This is the function that QLoRA trains on. The 4-bit model itself computes another one in
    evaluation: on CPUs with AVX-512 BF16 bitsandbytes then multiplies in bf16, whatever its
    compute dtype.
    """
    network = load_base(base, plan.quantisation, plan.training.precision)
    return (network.dequantize() if plan.quantisation == "nf4" else network).float().eval()


def load_to_read(base: Path, plan: Plan) -> PreTrainedModel:
    """`base` as probes read it: `dequantised` on the CPU, in the precision that it was trained in;
    as training had it where that was on a GPU and there is one."""
    if plan.training.cpu or not torch.cuda.is_available():
        dtype = torch.bfloat16 if plan.training.precision == "bf16" else torch.float32
        network: Any = dequantised(base, plan)
        return network.to(dtype)
    return load_base(base, plan.quantisation, plan.training.precision, cpu=False).eval()


def load_committed(base: Path, trained: Path, exact: bool = False) -> CommittedModel:
    """A training result or an export on its base, ready to be read.

    The base is `load_to_read`'s; with `exact` it is `dequantised` on any machine. Raises
    ValueError when the commitment was trained on another base.
    """
    plan, commitment = plan_of(trained), None
    model = (dequantised if exact else load_to_read)(base, plan)
    if (trained / SETTINGS).is_file():
        commitment = VariationalCommitment.load(trained).to(model.device)
        if commitment.settings.base_sha256 != base_hash(base):
            raise ValueError(f"{trained} was trained on another base than {base}: give that one")
    with renamed():
        adapted = PeftModel.from_pretrained(model, trained / "adapter")
    return CommittedModel(adapted, commitment).eval()
