# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
# ---

# %% [markdown]
# # A trained commitment
#
# A random direction means nothing to a model, so it cannot hold a choice: that was the outcome of
# the last two chapters. The lab log planned to *train* the commitment instead, with QLoRA, and
# stopped there, believing that this needs an NVIDIA GPU. It does not. This chapter carries the
# plan out on whatever machine it runs on and asks: **does a latent that was trained, sampled once
# per conversation and never written into the window, make a model keep to what it said?**
#
# The base model lies in memory in 4 bits (NF4 with double quantisation); low-rank adapters, a
# variational head and the projection $W_c$ are trained on top of it.

# %% tags=["parameters"]
model: str = "offline:smoke"  # offline:RECIPE, a path to a Hugging Face folder, or hub:OWNER/NAME
chat: str = "plain"  # how the model is spoken to: plain or llama2
data: str = "dialogues"  # what to train on: the project's dialogues, or hub:OWNER/NAME of chats
quantisation: str = "nf4"  # how the base lies in memory: nf4 (4 bits) or none
compute: list[str] = ["cpu", "f32"]  # device (cpu or cuda), and precision of products (f32 or bf16)
k: int = 12  # latent dimension of z*
layers: list[int] = []  # first and last layer that receive z*, from 0; empty: all
strength: float = 20.0  # λ, the length of the injected direction before training
lora: list[float] = [8, 16, 0.0]  # rank, alpha and dropout of the low-rank adapters
targets: list[str] = []  # modules that get an adapter; empty: all linear layers
schedule: list[float] = [0.1, 4, 8, 0.0, 0.5]  # β; steps at 0; steps of its rise; free nats; cells
steps: int = 24  # optimiser steps of each run
batch: list[int] = [12, 1]  # conversations in a micro-batch, and micro-batches in a step
checkpointing: bool = False  # recompute activations in the backward pass to save memory
learning_rate: float = 3e-3  # peak, then cosine to zero
seeds: list[int] = [1, 2]  # one training of z* and one of its control each
items: int = 12  # probes of each family
texts: int = 8  # held-out dialogues to read
personas: str = ""  # CSV of dialogues with personas to train on too; empty: not run
personas_leave_out: list[int] = []  # rows of that file to ignore, the header being row 1
workers: int = 2  # processes that train and measure at a time, one thread each

# %%
from lablog import figures, record
from lablog.commitment import agreement, export, trained
from lablog.commitment import training_results as results
from lablog.commitment.personas import PERSONAS, record_personas
from lablog.commitment.qlora import LoraSettings, Plan, Schedule, load_committed
from lablog.commitment.reader import Reader
from lablog.models import source, training
from lablog.text.tokenizer import Tokenizer

figures.use_style()
run = record.begin("03_qlora_commitment", globals())

# %% [markdown]
# ## The base in 4 bits
#
# `bitsandbytes` quantises the linear layers as they are loaded, on a CPU as well as on a GPU. What
# that saves is measured, not assumed: embeddings and norms stay as they are, so a small model
# with a large vocabulary gains less than the factor of eight that "4 bits against 32" suggests.

# %%
with run.stage("model"):
    base = source.hugging_face_folder(model, run.artifacts)
for weights in sorted(base.glob("*.safetensors")):
    run.file(weights)
results.record_memory(run, base, quantisation)
run.metrics_table("memory")

# %% [markdown]
# ## The mechanism
#
# A *prefix* fixes the commitment: the private line "it is teal", or the exchange in which a
# favourite was stated. The model reads it once. A linear head on the hidden state $h$ of its last
# real token, the decisive one, gives the posterior, and $z^*$ is drawn from it by
# reparameterisation:
#
# $$ q(z^* \mid \text{prefix}) = \mathcal N\bigl(\mu(h), \operatorname{diag} \sigma^2(h)\bigr),
#    \qquad z^* = \mu + \sigma \odot \varepsilon, \quad \varepsilon \sim \mathcal N(0, I/k). $$
#
# The conversation then goes on in a window that does **not** hold the prefix. After every layer,
# at every real position, $\lambda W_c z^*$ is added, as in chapter 1. The loss is on the model's
# own turns:
#
# $$ \mathcal L = -\sum_t w_t \log p(x_t \mid x_{<t}, z^*) +
#    \beta \max\bigl(\mathrm{KL}(q \,\|\, \mathcal N(0, I/k)),\ \text{free bits}\bigr). $$
#
# Two other ways to pose the training were tried and fail in instructive ways. With a loss on
# every token the posterior spends its nats on the *other* speaker's questions. With a posterior
# that reads the whole dialogue it encodes the answers themselves, for instance how many of them
# are "yes". Only a prefix that the decoder never sees forces $z^*$ to carry the choice.

# %%
device, precision = compute
optimisation = training.TrainingSettings(
    steps=steps, batch_size=batch[0], gradient_accumulation=batch[1], learning_rate=learning_rate,
    warmup_steps=steps // 16, schedule="cosine", betas=(0.9, 0.98), weight_decay=0.0, threads=1,
    precision=precision, cpu=device == "cpu", checkpoint_every=max(steps // 4, 1),
    log_every=max(steps // 48, 1),
)
plan = Plan(
    k=k, strength=strength, layers=layers or None, quantisation=quantisation, chat=chat,
    training=optimisation, gradient_checkpointing=checkpointing,
    schedule=dict(zip(Schedule.model_fields, schedule, strict=True)),
    lora=LoraSettings(r=lora[0], alpha=lora[1], dropout=lora[2], targets=targets or "all-linear"),
)

# %% [markdown]
# ## What it is trained on
#
# Two kinds of conversation alternate. In the guessing game the decoder says that it has chosen
# something; the conversation forks into "what is it?" and several "is it Y?", all under one
# $z^*$. In the other, a favourite is asked for, or asked for again with the first answer evicted.
# Right and wrong guesses are weighed as if every value had been guessed once. A decoder that is
# calibrated then has $\sum_Y P(\text{yes} \mid Y) = 1$: not because it was told to, but because
# exactly one of the guesses is right.
#
# What a prefix fixes is a *persona*: persona number $i$ holds value number $i$ of every topic, so
# the prefix may speak of colours and the game be about cities. In a first version each prefix told
# only about its own topic. The posterior then spread over all pairs of topic and value, and a
# draw from the prior, which mostly fell to some other topic, decided nothing in this one.
#
# The prior must decide everywhere, also where no posterior has its mass. So, as $\beta$ rises, a
# growing share of conversations gets a $z^*$ from the prior: it is cut into one cell for each
# persona, where that persona's posterior is the densest, and each conversation gets a draw from its
# own cell. The posteriors that cut are running means over batches. Cut along the posteriors of one
# batch alone, one draw in seven belonged to another persona in the next batch, and a decoder cannot
# learn a border that moves.

# %%
example = trained.training_data(base, seeds[0], plan, data, count=2 * batch[0])
tokenizer = Tokenizer(base / "tokenizer.model")
for index in (0, len(example) - 1):
    print("prefix, for the posterior alone:", tokenizer.decode(example[index].prefix.ids.tolist()))
    print(tokenizer.decode(example[index].forks.ids.tolist()))

# %% [markdown]
# ## Training
#
# For each seed the commitment is trained, and beside it a control: the same adapter on the same
# conversations with no $z^*$ at all. The weight $\beta$ of the KL is zero at first and then
# rises; without that a posterior tends to collapse onto the prior before the decoder has learnt
# to listen to it. Runs keep checkpoints and resume to the same bits.

# %%
with run.stage("study"):
    rows, runs = trained.study(base, plan, data, seeds, run.artifacts,
                               (trained.PROBES, items, texts), workers)
folders = {seed: runs[seed, "commitment"] for seed in seeds}
history = results.record_training(run, folders)
run.figure("training", *results.training_curves(history),
           "Loss on the model's own words, KL of the posterior and its weight, for each seed.")

# %% [markdown]
# What each run cost, with as many at a time as `workers` says. A token counts once, whether it is
# in the prefix or in a fork.

# %%
run.figure("budget", *results.budget(runs), "Tokens and time of each training.")

# %% [markdown]
# ## Does it commit?
#
# The probes are those of chapter 1, now with a $z^*$ of its own for every conversation. Rows: the
# base; the control without $z^*$; the base under an untrained $W_c$ of the same dose; the
# trained commitment with $z^*$ from the prefix (which the window does not hold), from the prior
# (nothing was said before; the latent alone decides), and redrawn from the prior every turn; and
# as the upper bound the base with everything written in the window. The perplexity is that of the
# model's own words in held-out dialogues, which alone are trained.
#
# On a CPU all rows are read with the dequantised weights in f32, because that is the function which
# was trained: evaluated in 4 bits, `bitsandbytes` multiplies in bf16 on some CPUs, whatever was
# asked for.

# %%
table = results.record_table(run, rows)
table

# %%
run.figure("arms", *results.arms(rows),
           "The probes for every row of the table: each seed (grey) and the mean. The band marks "
           "0.8 to 1.25.")

# %% [markdown]
# ## What the latent carries
#
# If $z^*$ matters, the loss must rise when it is exchanged for that of another conversation or
# removed. The KL says how many nats it carries; knowing one of twelve values takes $\log 12
# \approx 2.5$. An active unit is a dimension whose posterior mean varies between prefixes (Burda et
# al., 2016); none would be a collapse.

# %%
with run.stage("diagnostics"):
    models = {seed: load_committed(base, folder) for seed, folder in folders.items()}
    unseen = trained.training_data(base, trained.PROBES, plan, data, "held_out", 8 * batch[0])
    found = {seed: trained.diagnose(one, unseen, batch[0]) for seed, one in models.items()}
results.record_diagnostics(run, found)
run.metrics_table("latent")

# %%
z, named = trained.choices(Reader(models[seeds[0]], tokenizer, chat), 4 * items, trained.PROBES)
run.figure("latent_use", *results.latent_use(found[seeds[0]]["kl_per_dimension"], named),
           "Left: nats that each dimension of z* carries. Right: which choice a draw from the "
           "prior commits to, in every topic (first seed).")

# %% [markdown]
# Each point below is one draw from the prior, coloured by the value that the model then names in
# the first topic. A latent that commits shows one region for each choice.

# %%
run.figure("latent_space", *results.latent_space(z.numpy(), named[0], "color"),
           "Draws of z* from the prior in the plane of the choices' two leading components, by "
           "the value that each leads the model to name.")

# %% [markdown]
# ## The same in llama.cpp
#
# What was trained is exported, read back with the hash of every file and of the base compared,
# and put to use in the patched llama.cpp:
#
# | file | holds | read by |
# |---|---|---|
# | `adapter/` | the low-rank adapter, safetensors | peft |
# | `commitment.safetensors`, `.json` | head, $W_c$; $k$, $\lambda$, layers, base | `lablog` |
# | `base.gguf` | the base as training saw it: NF4, dequantised to f32 | any llama.cpp |
# | `lora.gguf` | the adapter | any llama.cpp (`--lora`) |
# | a control vector | one sampled $\lambda W_c z^*$ | any llama.cpp (`--control-vector`) |
# | `export.json` | SHA-256 of all of them | the check on the way back |
#
# The patched llama.cpp repeats the probes under the same $z^*$: it is given $\lambda$,
# $W_c z^*$ and the layers, and adds the vector by itself. At most 24 probes of each family are
# repeated.
#
# Two things are compared. *Numbers*: the largest difference of any logit behind "is it X?", and
# of $\sum_X P(\text{yes})$. *Behaviour*: the share of greedy answers that are the same text, the
# share of answers that name the same value, and the probes themselves, with the dequantised
# weights in f32 on both sides.

# %%
exports = run.artifacts / f"{folders[seeds[0]].name}-export"
with run.stage("export"):
    export.export(folders[seeds[0]], base, exports)
    exported = export.reimport(exports, base)
with run.stage("llama.cpp"):
    asked = trained.Probes(trained.PROBES, min(items, 24), 0)  # one conversation at a time: slow
    agreement.record_agreement(run, agreement.compare(exported, base, asked, device))
run.metrics_table("native")

# %% [markdown]
# An unpatched llama.cpp can hold a sampled commitment too, as a control vector, if the layers that
# receive it begin at 1: the format has no place for layer 0. Given such a file it computes the
# same logits as the patched one, to the last bit. By default all layers receive $z^*$, layer 0
# among them, and the refusal below says what to do about it: `layers=[1,2]` trains a commitment
# that any llama.cpp can carry. The adapter must be given beside it either way.

# %%
try:
    print(exported.control_vector(z[0], exports.with_suffix(".control.gguf")).name)
except ValueError as refusal:
    print(refusal)

# %% [markdown]
# ## Personas from a file
#
# The same training takes real dialogues between people who were given personas: `personas` names a
# CSV file in the layout of Synthetic-Persona-Chat, with the columns `user 1 personas`, `user 2
# personas` and `Best Generated Conversation`, whose lines begin `User 1:` or `User 2:`. The second
# speaker's persona is the prefix; the dialogue follows, cut to `window` tokens, with the loss on
# the second speaker's turns. A row that cannot be used stops the run with its number: correct it,
# or name it in `personas_leave_out`. Nothing is dropped in silence.
#
# One persona in five is held out. If $z^*$ carries something of a persona that training never saw,
# the held-out dialogues are likelier under it than under the adapter trained without $z^*$, and
# less likely under the $z^*$ of somebody else. The second comparison is the stricter one: the first
# also changes when $z^*$ only disturbs.

# %%
record_personas(run, personas, personas_leave_out, base, plan)
run.metrics_table("personas")

# %% [markdown]
# ## Findings
#
# In words, from the record:

# %%
print(results.findings(run.record()))

# %% [markdown]
# ## Report

# %%
run.finish((*results.TRAINED, *agreement.NATIVE, PERSONAS))

# %% [markdown]
# ## What this does not show
#
# - The latent was trained on the kind of conversation on which it is probed. Nothing here says
#   that it would carry a choice that its training never held.
# - A soft choice can agree with itself: both question forms may favour the same value although
#   neither is certain of it. Σ P(yes) and the picture above tell how decided a draw is.
# - A draw from the prior may contradict a text that already states another value; the held-out
#   perplexity under the prior shows what that costs.
# - Agreement of llama.cpp with PyTorch says that the exported files hold what was trained, not that
#   a quantised GGUF of them, which most people would run, behaves the same.
# - The default model is small and knows one kind of talk. On personas it starts from near nothing:
#   its tokenizer spells most words of real dialogues in pieces. The profile `full` trains the log's
#   configuration on Llama-2-7B-Chat, which needs a GPU of 24 GB for its size, not for its method.
