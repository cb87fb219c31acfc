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
# A random direction means nothing to a model. In the last two chapters it disturbed what the model
# says; where it seemed to help, one has to ask whether a direction drawn anew for every question
# helps as much. The lab log planned to *train* the commitment instead, with QLoRA, and stopped
# there, believing that this needs an NVIDIA GPU. It does not. This chapter carries the plan out on
# whatever machine it runs on and asks: **does a latent that was trained, sampled once per
# conversation and never written into the window, make a model keep to what it said, also when it
# is asked in ways that the training never saw?**
#
# The base model lies in memory in 4 bits (NF4 with double quantisation); low-rank adapters, a
# variational head and the projection $W_c$ are trained on top of it.

# %% tags=["parameters"]
model: str = "offline:smoke"  # offline:RECIPE, a path (folder, .gguf), hub:, pypi: or npm:
base_seeds: list[int] = [1]  # of the offline model: each is a base of its own
chat: str = "plain"  # how the model is spoken to: plain, llama2, or auto (its own template)
data: str = "dialogues"  # what to train on: the project's dialogues, or hub:OWNER/NAME of chats
quantisation: str = "nf4"  # how the base lies in memory: nf4 (4 bits) or none
device: str = "cpu"  # cpu or cuda
precision: str = "f32"  # of products: f32 or bf16

# The commitment
k: int = 12  # latent dimension of z*
first_layer: int = 0  # first layer that receives z*, counted from 0
last_layer: int = -1  # last layer that receives z*; -1: the model's last
strength: float = 20.0  # λ, the length of the injected direction before training
reader: str = "adapted"  # what the head reads a prefix by: adapted, or discriminant (below)

# The low-rank adapters
lora_rank: int = 8  # rank of an update
lora_alpha: float = 16.0  # an update is scaled by alpha / rank
lora_dropout: float = 0.0  # share of an adapter's inputs
targets: list[str] = []  # modules that get an adapter; empty: all linear layers

# The loss
beta: float = 0.1  # weight of the KL divergence once it has risen
beta_zero_steps: int = 4  # steps during which it is zero
beta_rise_steps: int = 8  # steps of its rise after these
free_bits: float = 0.0  # nats of KL that cost nothing
cells: float = 0.5  # share of conversations, at the end, whose z* comes from the prior's cells

# Training
gap_least: int = 0  # exchanges of other talk inside a guessing game, at least
gap_most: int = 2  # and at most
steps: int = 24  # optimiser steps of each run
batch_size: int = 12  # conversations in a micro-batch
gradient_accumulation: int = 1  # micro-batches in a step
checkpointing: bool = False  # recompute activations in the backward pass to save memory
compiled: bool = False  # layers by torch.compile
learning_rate: float = 3e-3  # peak, then cosine to zero
adam_beta1: float = 0.9  # Adam's decay of the mean gradient
adam_beta2: float = 0.98  # Adam's decay of the mean squared gradient
weight_decay: float = 0.0  # Adam's, a unit of learning rate
seeds: list[int] = [1, 2]  # one training of z* each, on every base
control_seeds: list[int] = [1]  # of these, with which the controls are trained too
ablations: list[str] = []  # trainings besides, on the first base with the first seed (`TRAININGS`)
workers: int = 2  # trainings and measurements at a time on this machine, one thread each
trainings: str = ""  # folder of trainings from another machine to take over; empty: train here

# The probes
item_seed: int = 11  # seed of the probes and of the held-out texts
items: int = 12  # probes of each family
fewer: int = 12  # of these, for every other kind of new and for every gap
texts: int = 8  # held-out dialogues to read
gaps: list[int] = [0, 6]  # exchanges of other talk between opening and question, to be probed
guesses: int = 2  # guesses in a whole game before it is forked
draws: int = 240  # of z* from the prior, each asked for its choice in every topic
exported: int = 2  # seeds, the first ones, whose runs on every base are exported to llama.cpp
compared: int = 12  # probes of each family that it repeats of each

# A file of the user's
personas: str = ""  # CSV of dialogues with personas to train on too; empty: not run
personas_leave_out: list[int] = []  # rows of that file to ignore, the header being row 1

# %%
from pathlib import Path

from lablog import figures
from lablog.cluster.client import Cluster
from lablog.commitment import (arms, diagnostics, engine_comparison, export,
                               training_metrics as metrics, training_plots as plots)
from lablog.commitment.arms import ARMS, Asked
from lablog.commitment.conversations import ConversationSettings
from lablog.commitment.novelty import HEADLINE, KINDS, probe_set, whole_topics
from lablog.commitment.personas import measure_personas, of_personas
from lablog.commitment.qlora import LoraSettings, Plan, Schedule, load_committed
from lablog.commitment.readable import check_readable
from lablog.commitment.torch_speaker import TorchSpeaker
from lablog.files import repository
from lablog.models import locate, training
from lablog.run import begin
from lablog.text.chat_tokenizer import tokenizer_of
from lablog.text.dialogues import settings_for, trained_part

figures.use_style()
run = begin("03_qlora_commitment", globals())
cluster, gpus = Cluster.of(run, workers), 1 / workers if device == "cuda" else 0

# %% [markdown]
# ## The bases in 4 bits
#
# A result on one small model may be that model's whim, so the profile `study` trains on two bases,
# the same recipe from other seeds, and takes five seeds of the commitment on each. No base and no
# seed was chosen by its result. Bases differ in what chapter 1 checks: all recall what stands in
# the window, but not all have learnt to compare a guess with a choice ("is it X?") when the recipe
# ends. The numbers below say how well these do.
#
# `bitsandbytes` quantises the linear layers as they are loaded, on a CPU as well as on a GPU. What
# that saves is measured, not assumed: embeddings and norms stay as they are, so a small model with
# a large vocabulary gains less than the factor of eight that "4 bits against 32" suggests.

# %%
wanted = base_seeds if model.startswith("offline:") else base_seeds[:1]
with run.stage("model"):
    bases = dict(zip(wanted, cluster.map("bases", locate.hugging_face_folder, [
        (model, run.artifacts, seed) for seed in wanted]), strict=True))
for folder in bases.values():
    for weights in sorted(folder.glob("*.safetensors")):
        run.file(weights)
run.metrics(metrics.of_memory(bases[wanted[0]], quantisation), under="memory")
run.metric("bases", len(bases), "count")
if model.startswith("offline:"):
    for seed, folder in bases.items():
        run.metrics(metrics.base_check(folder, items), under=f"bases.seed{seed}")
run.metrics_table("bases")

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
# In a model that has read much, hidden states are long and mostly not about the choice: the first
# step on SmolLM2 moved the KL of the posteriors from 13 to 132 nats. `reader="discriminant"` begins
# with what is about it: before the training a linear discriminant {cite}`fisher1936taxonomic` is
# fitted to the hidden states of 960 prefixes, in the base as it is, and the head reads its $k$
# coordinates. The prefix then costs no gradient; but what the fit has not met, a new phrasing of
# the prefix, may lie anywhere.
#
# The conversation then goes on in a window that does **not** hold the prefix. After every layer,
# at every real position, $\lambda W_c z^*$ is added, as in chapter 1. The loss is on the model's
# own turns. The prior must decide everywhere, also where no posterior has its mass. So a share
# $s_t$ of the conversations gets its $z^*$ not from $q$ but from the prior: it is cut into one
# cell for each commitment $c$, where that commitment's posterior is the densest, and a
# conversation gets a draw from its own cell. What is minimised in step $t$, and shown below, is
#
# $$ \begin{aligned} \mathcal L_t ={}&
#    \mathbb E_{z^* \sim (1 - s_t)\, q + s_t\, p(\cdot \mid \text{cell } c)}
#    \Bigl[-\sum_i w_i \log p(x_i \mid x_{<i}, z^*)\Bigr] \\
#    &+ \beta_t \max\bigl(\mathrm{KL}(q \,\|\, \mathcal N(0, I/k)),\ \text{free bits}\bigr).
#    \end{aligned} $$
#
# Both $\beta_t$ and $s_t$ are zero at first and then rise. The posteriors that cut are running
# means over batches: cut along those of one batch alone, a draw near a border belongs to another
# commitment in the next batch, and a decoder cannot learn a border that moves. Whether two
# questions agree is decided near the borders, where few draws lie; so every other draw is the one
# of eight that is nearest to its cell's border (hard examples {cite}`shrivastava2016hard`).

# %%
optimisation = training.TrainingSettings(
    steps=steps, batch_size=batch_size, gradient_accumulation=gradient_accumulation,
    learning_rate=learning_rate, warmup_steps=steps // 16, schedule="cosine",
    betas=(adam_beta1, adam_beta2), weight_decay=weight_decay, threads=1, precision=precision,
    cpu=device == "cpu",
    checkpoint_every=max(steps // 4, 1), log_every=max(steps // 48, 1),
)
plan = Plan(
    k=k, strength=strength, layers=(first_layer, last_layer), quantisation=quantisation, chat=chat,
    reader=reader, training=optimisation, gradient_checkpointing=checkpointing, compiled=compiled,
    schedule=Schedule(beta=beta, warmup=beta_zero_steps, annealing=beta_rise_steps,
                      free_bits=free_bits, cells=cells),
    lora=LoraSettings(r=lora_rank, alpha=lora_alpha, dropout=lora_dropout,
                      targets=targets or "all-linear"),
)

# %% [markdown]
# ## What it is trained on, and what it never meets
#
# Two kinds of conversation alternate. In the guessing game the decoder says that it has chosen
# something; after some other talk the conversation forks into "what is it?" and several "is it Y?",
# all under one $z^*$. In the other, a favourite is asked for, or asked for again with the first
# answer evicted. So that $z^*$ does not drown what can be read, half of these windows hold a
# dialogue of *another* persona, whose statement is then what counts. Right and wrong guesses are
# weighed as if every value had been guessed once. A decoder that is calibrated then has $\sum_Y
# P(\text{yes} \mid Y) = 1$ whether it holds a choice or not; that sum is a check of calibration and
# no evidence of a commitment.
#
# What a prefix fixes is a *persona*: persona number $i$ holds value number $i$ of every topic, so
# that $z^*$ has one of twelve things to carry, about $\log 12 \approx 2.5$ nats.
#
# Training meets only a part of `data/dialogues.yaml` (with `chat=auto`, of `data/questions.yaml`).
# Held out are the last phrasings of every question and private line, four values of one topic, and
# one topic whole. So a probe can be new in one of five ways. The project's own base has read all of
# it, as a pretrained model has read English; what is new, is new to everything that was trained
# here.

# %%
settings = settings_for(chat)
experiment = arms.Experiment(
    bases=bases, plan=plan, data=data, artifacts=run.artifacts,
    settings=ConversationSettings(trained_part(settings), gap=(gap_least, gap_most)),
    elsewhere=repository() / trainings if trainings else None)
tokenizer = tokenizer_of(bases[wanted[0]])
for kind in KINDS:
    item = probe_set(item_seed, 1, 0, kind, chat=chat).items.fork[0]
    print(f"{kind}: {item.opening[0].text} … {item.guesses[0].text} / {item.naming.text}")

# %%
example = experiment.dataset(wanted[0], seeds[0], "commitment", count=4 * batch_size)
for index in (0, len(example) - 1):
    print("prefix, for the posterior alone:", tokenizer.decode(example[index].prefix.ids.tolist()))
    print(tokenizer.decode(example[index].forks.ids.tolist()), "\n")

# %% [markdown]
# ## Training
#
# On every base three things are trained on the same conversations: for each seed the commitment;
# for some of them two controls, LoRA with no $z^*$ at all, and LoRA with the choice as a line of
# text in its window, the bound that a commitment would have to reach. Whatever else `ablations`
# names is trained once, on the first base with the first seed. Before anything is trained it is
# checked that this tokenizer and window let the probes be read. Runs keep checkpoints and resume
# to the same bits. A large model is best trained on a GPU and can then be read anywhere:
# `trainings` names the folder that was copied from there, and its settings must be those above.

# %%
widest = probe_set(item_seed, items, texts, "longer gap", max(gaps), chat=chat)
for folder in bases.values():
    check_readable(folder, plan, settings, widest.items, widest.texts)
calls = [(base, seed, name) for base in bases for name in ("commitment", "lora", "note")
         for seed in (seeds if name == "commitment" else control_seeds)]
calls += [(wanted[0], seeds[0], name) for name in ablations]
with run.stage("training"):
    folders = cluster.map("training", arms.Experiment.train, calls, common=(experiment,),
                        reads=[*bases.values()], gpus=gpus)
runs = dict(zip(calls, folders, strict=True))
history = metrics.history({(base, seed): folder for (base, seed, name), folder in runs.items()
                           if name == "commitment"})
run.metrics(metrics.of_training(history), under="training")
run.metric("training.device", metrics.trained_on(runs), "")
run.figure("training", *plots.training_curves(history),
           "Loss on the model's own words under the z* of the step, KL of the posterior and its "
           "weight, for every run with z*.")

# %% [markdown]
# The history has one line for every interval of the log. A KL that falls to zero, or no active unit
# at the end, would be a collapse, and the number of runs that collapsed is recorded.
#
# What each kind of training cost, with as many at a time as `workers` says. A token counts once,
# whether it is in the prefix or in a fork.

# %%
run.figure("budget", *plots.budget(runs), "Tokens and time of each training.")

# %% [markdown]
# ## Does it commit?
#
# The probes are those of chapter 1, now with a $z^*$ of its own for every conversation, and in
# *phrasings that the training never met*. Their seed is not that of any probe on which settings
# were compared. Rows: the base; LoRA without $z^*$; the base under an untrained $W_c$ of the same
# length; the trained commitment with $z^*$ from the prefix (which the window does not hold), from
# the prior (nothing was said before; the latent alone decides), and redrawn from the prior for
# every turn and every question; and the choice as a line of text, for the base and for a LoRA that
# was trained to read it. One column is a game of several turns, after {cite}`baldelli2026hangman`:
# the model answers guesses, then the conversation is forked into every question; it counts if all
# answers, before and in the forks, are true of one value.
#
# How to read the rows. The base says what the words of the probes do without any commitment. LoRA
# without $z^*$ has met the same conversations and can have learnt only their form, so what it
# lacks is what $z^*$ adds. The redrawn row is the control of constancy: the same adapter, the same
# $W_c$, the same length, but a latent of its own for every question, so that two answers can agree
# by chance alone, once in twelve. The rows with text say what is possible at all, with the choice
# in plain sight.
#
# And the columns. *Same X in both forms* compares the value that the model names with the one that
# it would most readily confirm; two soft preferences can agree without any decision, therefore
# *P(yes) of X named* stands beside it, the probability with which the model confirms what it
# names. *Recall in the window* must not suffer: there the statement can be read, and a latent that
# says otherwise contradicts it. *Recall after eviction* is asked where nothing can be read.
#
# On a CPU all rows are read with the dequantised weights, in the precision of the training, because
# that is the function which was trained: evaluated in 4 bits, `bitsandbytes` multiplies in bf16 on
# some CPUs, whatever was asked for.

# %%
def measured(stage, calls):
    with run.stage(stage):
        found = experiment.measured(cluster, stage, calls, gpus)
    return [metrics.Measured(*call, values) for call, values in zip(calls, found, strict=True)]


whole = Asked(seed=item_seed, items=items, texts=texts, guesses=guesses,
              families=("fork", "recall", "language", "hangman", "reached"))
main = [name for name, arm in ARMS.items() if name in metrics.MAIN]
trained_with = {"base": seeds[:1], "lora": control_seeds, "note": control_seeds}
rows = measured("probes", [(base, seed, arm, whole) for base in bases for arm in main
                           for seed in trained_with.get(ARMS[arm].training, seeds)])
run.metrics(metrics.of_arms(rows))
run.metrics(metrics.of_contrasts(rows))
metrics.table(run.record(), main)

# %% [markdown]
# Targets were set before anything was measured here: from the prior the same X in both forms in at
# least 90 %, recall after eviction at least 90 % from the prefix and 80 % for a latent sampled
# once, perplexity at most 1.05 times that of LoRA without $z^*$, both of what is said behind the
# first exchange: a $z^*$ from the prefix has read that one. The findings at the end say of
# each whether it was met.
#
# The intervals resample what varied, all at once: bases, seeds of the training and items (a
# hierarchical bootstrap, items crossed with the rest). Of two bases or two seeds they say little:
# resampling two units cannot leave the span of the two.

# %%
run.figure("arms", *plots.arms_figure(rows, main),
           "The probes, in phrasings that training never met, for every row: mean with 95 % "
           "interval over bases, seeds and items, and each run (grey).")

# %% [markdown]
# ## How new may the question be?
#
# *Seen form* recombines what training had; *new phrasing* is the table above; *new combination*
# asks about values that training never met, in a topic of which it met the others; *new topic*
# about a topic of which it met nothing; *longer gap* puts more talk in between than it ever had.
# In a new topic nothing says which value a persona should hold: there one can only ask whether a
# draw holds *some* value, the same in both forms.

# %%
shown = ("lora", "note", "prefix", "prior", "redrawn")
others = [Asked(seed=item_seed, items=fewer, kind=kind, families=("fork", "recall"))
          for kind in KINDS if kind != HEADLINE]
rows += measured("kinds", [
    (base, seed, arm, each) for each in others for base in bases for arm in shown
    for seed in trained_with.get(ARMS[arm].training, seeds)])
for kind in KINDS:
    run.metrics(metrics.of_arms(rows, kind), under=metrics.slug(kind))
metrics.table(run.record(), shown, "new_topic.")

# %%
run.figure("kinds", *plots.kinds_figure(rows, shown, KINDS),
           "Agreement of the two question forms by how new the probe is; mean with 95 % interval, "
           "and each run (grey).")

# %% [markdown]
# ## How long does it last?
#
# The same choice and the same favourite after more and more exchanges of other talk. Training had
# at most as many as `gap_most` says in a guessing game, and two to four between a favourite and the
# question for it. A line of text must be found again over the same distance; the latent is added
# at every position and need not be found, but the model must still read a window longer than it
# knows.

# %%
lasting = ["note", "prefix", "prior"]
lasting += [name for name in ("no_gaps.prefix", "no_gaps.prior") if "no_gaps" in ablations]
alone = [arm for arm in lasting if ARMS[arm].training in ablations]
rows += measured("persistence", [
    (base, seed, arm, Asked(seed=item_seed, items=fewer, kind="seen form", gap=length))
    for length in gaps for arm in lasting
    for base in (wanted[:1] if arm in alone else bases)
    for seed in (seeds[:1] if arm in alone else trained_with.get(ARMS[arm].training, seeds))])
for length in gaps:
    run.metrics(metrics.of_arms(rows, "seen form", length), under=f"gap{length}")
run.figure("persistence", *plots.persistence(rows, lasting, gaps),
           "Same X in both forms, and recall after eviction, against exchanges of other talk "
           "(phrasings seen in training); mean with 95 % interval.")

# %% [markdown]
# ## What does the work?
#
# Baselines at equal bits, and the parts of the method left out one at a time, each trained with
# the first seed on the first base: $z^*$ at the first position alone, where it is one virtual
# token of prefix tuning; a table of twelve steering vectors, of which the data say which one to
# use; a $W_c$ that stays random; no cells; $z^*$ in the middle layer, the first or the last half.
# Profile `laptop` skips this; `study` runs it.
#
# Another training is the lab log's own configuration: adapters of rank 8 and $\alpha = 16$ on
# queries and values alone, $k = 64$, $\beta = 0.1$, and no cells, which the log did not know. On a
# model that has read much, `pretrained` and `pretrained-gpu` lay it beside the method above.

# %%
parts = [name for name in ablations if not name.startswith(("values", "independent"))]
tried = [f"{name}.{origin}" for name in parts for origin in ("prefix", "prior")]
each = Asked(seed=item_seed, items=items, texts=texts,
             families=("fork", "recall", "language", "reached"))
ablated = measured("ablations", [(wanted[0], seeds[0], arm, each) for arm in tried])
run.metrics(metrics.of_arms(ablated))
metrics.table(run.record(), tried)

# %%
if tried:
    alike = [row for row in rows if (row.base, row.seed) == (wanted[0], seeds[0])] + ablated
    display(run.figure("ablations", *plots.arms_figure(alike, ["prefix", "prior", *tried]),
                       "Parts of the method left out and baselines at equal bits: one training "
                       "each, same base and seed; mean with 95 % interval over items alone."))

# %% [markdown]
# ## How much fits into a commitment?
#
# Here the commitment is one of 4 to 96 things, or the values of several topics at once, each drawn
# by itself. The first needs $\log N$ nats, the second $\log 12$ for every topic. A KL below what is
# needed means that some commitments share a place in the latent, and the choice of the prefix is
# then named less often than always; what `ablations` does not name is not trained and not drawn.

# %%
sizes = [name for name in ablations if name.startswith(("values", "independent"))]
each = Asked(seed=item_seed, items=items, kind="seen form", families=("fork",))
held = measured("capacity", [(wanted[0], seeds[0], f"{name}.prefix", each) for name in sizes])
cluster.close()
run.metrics(metrics.of_arms(held, "seen form"), under="capacity")
if sizes:
    display(run.figure("capacity", *plots.capacity(held, sizes),
                       "Left: KL of the posterior against what is needed to tell the commitments "
                       "apart. Right: how often the choice of the prefix is named."))

# %% [markdown]
# ## What the latent carries
#
# If $z^*$ matters, the loss must rise when it is exchanged for that of another conversation or
# removed. An active unit is a dimension whose posterior mean varies between prefixes (Burda et
# al., 2016); none would be a collapse. The conversations are in phrasings that training never met.

# %%
mine = [(base, seed) for base in bases for seed in seeds]
with run.stage("diagnostics"):
    latents = {(base, seed): diagnostics.diagnose(
        load_committed(bases[base], runs[base, seed, "commitment"]),
        experiment.dataset(base, seed, "commitment", True, 8 * batch_size), batch_size)
        for base, seed in mine}
run.metrics(metrics.of_diagnostics(latents), under="latent")
run.metrics_table("latent")

# %%
with run.stage("choices"):
    draws = {(base, seed): diagnostics.choices(
        TorchSpeaker(load_committed(bases[base], runs[base, seed, "commitment"]),
               tokenizer_of(bases[base]), chat), draws, item_seed)
        for base, seed in mine}
run.figure("latent_use", *plots.latent_use(
    [found["kl_per_dimension"] for found in latents.values()],
    [named for _, named in draws.values()]),
    "Left: nats that each dimension of z* carries, every run (grey) and the mean. Right: which "
    "choice a draw from the prior commits to, in every topic, over all runs.")

# %% [markdown]
# Each point below is one draw from the prior, coloured by the value that the model then names in
# the first topic. A latent that commits shows one region for each choice, with borders that are
# sharp: near one, two questions may be answered from two sides of it.

# %%
run.figure("latent_space", *plots.latent_space(
    {key: (z.numpy(), named[0]) for key, (z, named) in draws.items()}, whole_topics(settings)[0]),
    "Draws of z* from the prior in the plane of the choices' two leading components, by the value "
    "that each leads the model to name; every run.")

# %% [markdown]
# ## The same in llama.cpp
#
# What was trained is exported, read back with the hash of every file and of the base compared, and
# put to use in the patched llama.cpp:
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
# The patched llama.cpp repeats the probes of these runs under the same $z^*$, many conversations
# together, each with a commitment of its own: it is given $\lambda$, $W_c z^*$ and the layers of
# every sequence, and adds the vectors by itself.
#
# Two things are compared. *Numbers*: the largest difference of any logit behind "is it X?", and of
# $\sum_X P(\text{yes})$. *Behaviour*: the share of greedy answers that are the same text, the
# share of answers that name the same value, and the probes themselves, with the dequantised
# weights in f32 on both sides. Every conversation has the same $z^*$ on both, once from the prior
# and once read off its prefix; the posterior is PyTorch's, since an engine that is given $W_c z^*$
# has no part in it. A third row has the base in Q8_0 in llama.cpp, as most people would run it,
# against the same f32 in PyTorch.

# %%
exports = {}
with run.stage("export"):
    for base, seed in ((base, seed) for base in bases for seed in seeds[:exported]):
        folder = runs[base, seed, "commitment"]
        files = run.artifacts / f"{folder.name}-export"
        export.export(folder, bases[base], files)
        exports[base, seed] = export.reimport(files, bases[base])
with run.stage("llama.cpp"):
    asked = probe_set(item_seed, compared, 0, chat=chat)
    compared_runs = {key: engine_comparison.compare(files, bases[key[0]], asked, device)
                     for key, files in exports.items()}
run.metrics(engine_comparison.of_agreement(compared_runs))
run.metrics_table("native")

# %% [markdown]
# An unpatched llama.cpp can hold a sampled commitment too, as a control vector, if the layers that
# receive it begin at 1: the format has no place for layer 0. Given such a file it computes the
# same logits as the patched one, to the last bit. By default all layers receive $z^*$, layer 0
# among them, and the refusal below says what to do about it: `first_layer=1` trains a commitment
# that any llama.cpp can carry. The adapter must be given beside it either way.

# %%
first = exports[mine[0]]
try:
    print(first.control_vector(draws[mine[0]][0][0], first.folder.with_suffix(".gguf")).name)
except ValueError as refusal:
    print(refusal)

# %% [markdown]
# ## Personas from a file
#
# The same training takes real dialogues between people who were given personas: `personas` names a
# CSV file in the layout of Synthetic-Persona-Chat, with the columns `user 1 personas`, `user 2
# personas` and `Best Generated Conversation`, whose lines begin `User 1:` or `User 2:`. The second
# speaker's persona is the prefix; the dialogue follows, cut to its first `plan.window` tokens,
# with the loss on the second speaker's turns. A row that cannot be used stops the run with its
# number: correct it, or name it in `personas_leave_out`. Nothing is dropped in silence.
#
# One persona in five is held out. If $z^*$ carries something of a persona that training never saw,
# the held-out dialogues are likelier under it than under the adapter trained without $z^*$, and
# less likely under the $z^*$ of somebody else. The second comparison is the stricter one: the
# first also changes when $z^*$ only disturbs. Without a file all of these are recorded as
# undefined, so that the report says that nothing ran.

# %%
result = None
if personas:
    path = repository() / Path(personas).expanduser()
    with run.stage("personas"):
        result = measure_personas(path, personas_leave_out, bases[wanted[0]], plan, run.artifacts)
    run.file(path)
run.metrics(of_personas(result), under="personas")
run.metrics_table("personas")

# %% [markdown]
# ## Findings
#
# The targets, met and missed alike. They were set before anything was measured: the first number of
# each pair is the least that was asked for, the second the most.

# %%
targets = {
    "prior.same_choice": ("same X in both forms, z* sampled once from the prior", 0.9, 1),
    "prior.reached": ("share of the choices that the prior reaches", 0.8, 1),
    "prior.yes_sum": ("Σ P(yes), z* from the prior", 0.8, 1.25),
    "prefix.eviction": ("recall after eviction, z* read off the turns evicted", 0.9, 1),
    "prior.eviction": ("recall after eviction, z* sampled once and never told", 0.8, 1),
    "lora.eviction_over_chance": ("the same without z*, times chance", 0, 2),
    "prefix.perplexity_over_lora": ("perplexity over LoRA, z* from the prefix", 0, 1.05),
    "prior.perplexity_over_lora": ("perplexity over LoRA, z* from the prior", 0, 1.05),
}
text = ""
for name, (what, low, high) in targets.items():
    told = metrics.against_target(run.record().metric(name), low, high)
    text += f"- {what}: {{{name}:interval}} ({told})\n"
run.say(text + """
A direction that was drawn and never trained reaches {random.reached:interval} of the choices.
""")

# %% [markdown]
# A target that is met says little without what stands beside it. A choice that agrees in both forms
# counts against the same question without $z^*$ and against a $z^*$ redrawn for every question; a
# recall counts against the line of text that could have been kept instead; and either is worth
# what it costs where the statement can still be read:

# %%
machine = run.record().machine
print(f"measured on {machine.device} ({machine.processor})")
run.say("""
- The log believed that this training needs an NVIDIA GPU. It ran on {training.device},
  {training.steps} steps a run.
- Forked choice in phrasings that the training never met, same X in both forms: with z* sampled
  once from the prior {prior.same_choice:interval}, without z* {lora.same_choice:interval}, with z*
  redrawn for every question {redrawn.same_choice:interval}, with the choice as a line of text
  {note.same_choice:interval}.
- The X that it names is confirmed with probability {prior.yes_named:interval}, without z*
  {lora.yes_named:interval}. Σ P(yes) without z* is {lora.yes_sum:interval}. The weights of the
  loss aim it at 1 in both, so it is no evidence of a commitment.
- Recall after eviction, where the statement is kept as a line of text: {note.eviction:interval}.
- What it costs: recall in the window is {prefix.recall:interval} (prefix) and
  {prior.recall:interval} (prior), without z* {lora.recall:interval}.
- A whole game of guesses has one answer in {prior.hangman:interval} of draws from the prior, in
  {note.hangman:interval} with the choice as text, in {lora.hangman:interval} without z*.
""")

# %% [markdown]
# ## Report

# %%
run.finish(arms=[(name, ARMS[name].label) for name in (*main, *tried)], kinds=KINDS)

# %% [markdown]
# ## What this does not show
#
# - *Holding* and *deciding* are two things. From the prefix, $z^*$ is read off the turns that the
#   window will lose: it carries over what was said. Sampled once from the prior, it decides what
#   was never said; there the first answer of a favourite is itself sampled, and a draw near a
#   border between two choices is not one choice.
# - $z^*$ is one label of twelve here, however many topics share it. The figure of capacity says
#   how far that goes; nothing here says that a free text fits into a vector.
# - Items are resampled as if they were independent. They come from six topics, and from two
#   phrasings of each question that training never met; a new topic, and a new combination, are one
#   topic each.
# - Differences to LoRA and to the line of text, and perplexity over LoRA's, take the training
#   seeds that these controls have (`control_seeds`), not all seeds of the commitment.
# - A new topic has no right answer for a persona: agreement there is agreement with itself alone.
# - A draw from the prior may contradict a text that already states another value; the held-out
#   perplexity under the prior, and recall in the window, show what that costs.
# - The protocol of the whole games follows the cited study; models, words and prompts do not, so
#   the numbers can be laid beside theirs, not compared with them.
# - The default model is small and knows one kind of talk. On personas it starts from near nothing:
#   its tokenizer spells most words of real dialogues in pieces. Profile `pretrained-gpu` trains
#   SmolLM2-135M-Instruct, which has read two trillion tokens of everything, for a few minutes on a
#   GPU. Profile `full` trains the log's configuration on Llama-2-7B-Chat, which needs a GPU of 24
#   GB for its size, not for its method.
