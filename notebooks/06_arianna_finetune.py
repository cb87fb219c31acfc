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
# # Arianna: a small voice, trained from scratch
#
# A Llama of seven million parameters, trained on a CPU, then fine-tuned on 171 dialogues in one
# philosophical voice. The lab log needed three attempts at the fine-tuning and blames a batch size
# that differed from the base run's. This chapter trains the model again and asks: **does
# fine-tuning on so little text improve answers that it has not seen, by how much, and is the batch
# size to blame when it does not?**
#
# The log's validation text was a copy of its training text. Here every number about the voice
# comes from dialogues that were held out, and a run whose sides overlap is refused.
#
# The chapter trains a base model on technical English, fine-tunes it once for every fold of the
# dialogues, and reads each answer before and after. On one fold it then compares learning rates
# and batch sizes. The end is for the reader: files to speak with, samples, and what was learnt by
# heart or forgotten on the way.

# %% tags=["parameters"]
# Base corpus
corpus: str = "docstrings"  # docstrings of installed packages, none, or a data set's name or folder
packages: list[str] = ["pydantic"]  # whose docstrings, with all they require; none: all pinned ones
files: list[str] = []  # further text files in UTF-8, told from the root of the clone
corpus_megabytes: float = 100.0  # most that is streamed from a data set, MB
documents: int = 10  # held-out documents to read

# Tokenizer
vocabulary: int = 512  # token ids, with 256 bytes and 3 control tokens
tokenizer_megabytes: float = 2.0  # documents that it is trained on, MB

# Dialogues
conversations: str = "data/arianna_conversations.jsonl"  # told from the root of the clone
all_turns: bool = False  # all exchanges of a dialogue instead of the first
folds: int = 2  # parts of the dialogues, each held out once

# Model
base_model: str = ""  # from elsewhere (path, hub:, pypi: or npm:); none: the base run's
width: int = 64  # numbers of a token's state
layers: int = 2  # blocks of attention and feed-forward
heads: int = 2  # attention heads of a layer
context: int = 128  # tokens of a window

# Base run
batch_size: int = 4  # windows of a micro-batch
gradient_accumulation: int = 1  # micro-batches of an optimiser step
base_steps: int = 50  # optimiser steps
base_warmup_steps: int = 5  # of these, with a rising learning rate
base_rate: float = 3e-3  # highest learning rate
beta1: float = 0.9  # AdamW's decay of the mean gradient
beta2: float = 0.95  # AdamW's decay of the mean squared gradient
weight_decay: float = 0.1  # AdamW's, a unit of learning rate
precision: str = "f32"  # f32 or bf16 (autocast)
compiled: bool = False  # by torch.compile

# Fine-tunings
tune_steps: int = 8  # optimiser steps
tune_rate: float = 1e-3  # highest learning rate of the main one
log_rate: float = 1e-5  # the log's learning rate
other_rates: list[float] = [1e-4]  # further learning rates, on the first fold

# Samples
questions: int = 3  # the log's question, and held-out ones
answer_tokens: int = 40  # most of an answer

seed: int = 1  # of weights, windows, folds and samples

# %% [markdown]
# What can be reused lies in `lablog.arianna`; training itself is one function that all chapters
# share. It keeps checkpoints as safetensors, continues behind a kill to the same bits, writes
# TensorBoard events beside the weights, and stops with a message when the loss is not a number,
# when a schedule does not fit the run, or when no weight has changed. A training that is there
# already is not repeated: its folder is named by everything that decides it.
#
# The values above are those of profile `smoke`, which proves that the chapter runs and nothing
# else; the numbers of the book are those of `laptop`. Whoever changes a value, or a list in one of
# the cells below, waits for those trainings alone that this changes.

# %%
import numpy as np
import pandas as pd

from lablog import figures
from lablog.cluster.client import Cluster
from lablog.arianna import chat, dialogues, exports, finetuning, plots
from lablog.arianna.bits_per_byte import byte_sizes, estimate, evenly, gap, read_bits, text_items
from lablog.files import repository
from lablog.models import locate
from lablog.models.shape import ModelShape
from lablog.models.training import TrainingSettings
from lablog.text.corpora import base_documents
from lablog.text.packing import pack, refuse_overlap, split
from lablog.run import begin

figures.use_style()
run = begin("06_arianna_finetune", globals())
cluster = Cluster.of(run)
runs = run.artifacts / "arianna-runs"

# %% [markdown]
# ## What it reads first
#
# The base corpus needs no network: the documentation strings of the packages that this project
# pins, and of all that they require, as they are installed. Repeated paragraphs are dropped, the
# order is fixed, and nothing of it is committed. It is technical English, which is as far from the
# dialogues' voice as the log's corpus was. A Hub data set such as TinyStories takes its place by
# name, and further text files are added by path.
#
# The split goes by the hash of a document, one in two hundred is held out, so equal documents
# cannot be parted.

# %%
with run.stage("corpus"):
    paths = [run.file(repository() / file) for file in files]
    all_documents = base_documents(corpus, packages, paths, corpus_megabytes)
training, held_out = split(all_documents, 200)
refuse_overlap(training, held_out)

# %% [markdown]
# The tokenizer is SentencePiece's byte-pair encoding with byte fallback, numbers split into
# digits, and no normalisation; it is trained on a fixed sample of the documents. Encoded, they are
# one stream of tokens in memory-mapped shards.

# %%
with run.stage("tokenizer"):
    if base_model:
        adopted = locate.hugging_face_folder(base_model, run.artifacts)
        tokenizer = finetuning.adoptable(adopted)
    else:
        tokenizer = finetuning.base_tokenizer(training, vocabulary, runs, tokenizer_megabytes)
    run.file(tokenizer.path)
with run.stage("packing"):
    stream = pack(training, tokenizer, runs / "corpus")
    run.file(stream.folder / "manifest.json")

# %% [markdown]
# What was packed is counted by the stream itself, in its manifest: documents, the bytes of their
# text, and the tokens that these became. Bytes per token say how much text a window holds. They
# also tell why losses per token cannot be compared between vocabularies, as bits per byte can: a
# token of a larger vocabulary costs more bits and covers more bytes.

# %%
packed = stream.manifest
for name in ("documents", "bytes", "tokens"):
    run.metric(f"corpus.{name}", getattr(packed, name), "count")
run.metric("corpus.held_out_documents", len(held_out), "count")
run.metric("tokenizer.pieces", len(tokenizer), "count")
run.metric("tokenizer.bytes_per_token", packed.bytes / packed.tokens, "")
run.say("""
{corpus.documents} documents of {corpus.bytes} bytes, which are {corpus.tokens} tokens of
{tokenizer.bytes_per_token} bytes; {corpus.held_out_documents} documents held out.
""")

# %% [markdown]
# ## The dialogues
#
# One exchange each, `Q: {user}` and `A: {assistant}` on a line of its own, joined by blank lines.
# Loading is strict: a line that is broken, empty or lacks a role stops with its number. For
# training they are one stream, cut into windows at random offsets, so long answers lose nothing;
# for reading, an answer beyond the window is continued in windows that overlap by half.
#
# The measure is bits per byte of the answers alone,
#
# $$ -\frac{1}{\text{bytes}} \sum_{i \in \text{answer}} \log_2 p(t_i \mid t_{<i}), $$
#
# which does not depend on the tokenizer and does not reward learning the form of the questions.
# Each dialogue is encoded in two forms: *qa* as it is trained on, and *bare*, the same answer
# behind the bare question, without `Q:` and `A:`. In both, only the answer's tokens count.
#
# The dialogues are divided into folds at random, once. No dialogue may occur in two of them.

# %%
known = dialogues.load_dialogues(run.file(repository() / conversations), all_turns)
parts = dialogues.folds(len(known), folds, seed)
for part in parts:
    refuse_overlap(*dialogues.sides(known, part))
items = {form: [each.item(tokenizer, form) for each in known] for form in ("qa", "bare")}
sizes = np.array([each.answer_bytes for each in known], float)

# %% [markdown]
# How long a dialogue is, in tokens of its Q/A form, decides whether a window sees all of it. Where
# one is longer than the window, the end of its answer is read without the question in sight; the
# count says for how many dialogues that is so.

# %%
lengths = [len(item.ids) for item in items["qa"]]
longer = sum(length > context for length in lengths)
run.metric("dialogues.count", len(lengths), "count")
run.metric("dialogues.tokens", sum(lengths), "count")
run.metric("dialogues.folds", folds, "count")
run.metric("dialogues.longer_than_window", longer, "count", numerator=longer,
           denominator=len(lengths))
run.say("""
{dialogues.count} dialogues, {dialogues.tokens} tokens; longer than the window are
{dialogues.longer_than_window:counts}.
""")

# %% [markdown]
# ## The base run
#
# AdamW with a linear warm-up and a cosine to zero, as in the log. One optimiser step sees
# `batch_size` times `gradient_accumulation` windows of `context` tokens. The log's 4,000 steps of
# $8 \times 4$ windows in float32 are profile `full`. The profile `laptop` has minutes, not hours,
# and spends them on compiled bfloat16 autocast, which its processor multiplies faster. `make bench`
# measures all four modes.
#
# The shape is Llama's: every head has keys of its own, the output matrix is the embedding, and the
# feed-forward width follows from the width by Llama's rule. A run logs its loss a hundred times,
# and keeps a checkpoint every 200 steps.
#
# A `base_model` from elsewhere takes the place of all that: its shape and its tokenizer count, and
# what it was trained on is its maker's to say. Fine-tunings then start from it in the same way. It
# must be a Llama with a SentencePiece tokenizer, whose window holds `context` tokens. Profile
# `pretrained` takes a storyteller of fifteen million parameters, to ask what the same dialogues do
# to a model that knows its English. Its bits per byte may be set beside those of the base run,
# because bytes are the same to every tokenizer; its held-out documents are the same texts, though
# it was never trained on their like.

# %%
shape = ModelShape(
    width=width, layers=layers, heads=heads, kv_heads=heads, context=context, tied_embeddings=True,
    feed_forward=finetuning.feed_forward_width(width), initializer_range=0.02,
)
settings = TrainingSettings(
    steps=base_steps, batch_size=batch_size, gradient_accumulation=gradient_accumulation,
    learning_rate=base_rate, warmup_steps=base_warmup_steps, schedule="cosine",
    betas=(beta1, beta2), weight_decay=weight_decay, precision=precision, compiled=compiled,
    seed=seed, checkpoint_every=200, log_every=max(1, base_steps // 100),
)

# %% [markdown]
# The folder that training leaves holds the weights and a log of what was done. From there come the
# number of parameters and the tokens that were read, counted as they passed; of a model from
# elsewhere neither tokens nor steps are known here, and the record says so. A checkpoint is three
# numbers a parameter: the weight, and the optimiser's two moments, which are needed for going on
# after a kill alone. The weights are a file that this run reads, and are recorded by their hash.

# %%
with run.stage("base training"):
    base = (finetuning.adopt_base(adopted, context, settings, runs) if base_model else
            finetuning.train_base(shape, settings, stream, tokenizer, runs))
    run.file(base.folder / "model.safetensors")
log = finetuning.training_log(base.folder)
run.metric("base.parameters", log["parameters"], "count")
elsewhere = "trained elsewhere" if base_model else None
for name, value in (("tokens", log.get("tokens")), ("steps", base_steps),
                    ("checkpoint.bytes", log.get("checkpoint_bytes"))):
    run.metric(f"base.{name}", None if base_model else value, "count", undefined=elsewhere)

# %% [markdown]
# What it has learnt is read from base documents that were held out, from the first to the last at
# equal distances; of a document every token counts. They are read again at the end, after
# fine-tuning.

# %%
chosen = held_out[evenly(len(held_out), documents)]
pages, page_sizes = text_items(chosen, tokenizer), byte_sizes(chosen)
found = estimate(read_bits(base.folder, pages), page_sizes)
run.metrics([found.metric("base.documents.bits_per_byte")])
run.metrics_table("base")

# %% [markdown]
# ## Fine-tuning that is really fine-tuning
#
# The log's first attempt saved a copy of the base weights. Its second resumed the base run's
# counters, so that the schedule was over before it began and the learning rate was zero. Its third
# had another batch size. None of them stopped with an error. Here each of these does:
#
# - shape, vocabulary, tokenizer, batch size and number format are read from the base checkpoint,
#   and a difference stops the run with both values unless it is asked for as an ablation;
# - a run begins at step 0 of its own schedule, with an empty optimiser, and a warm-up must be
#   shorter than the run;
# - the relative change of all weights is recorded, and a change of zero is an error;
# - a loss that is not a number stops, names the step, and leaves the last good checkpoint;
# - held-out dialogues that occur in the training text stop the run.
#
# An *arm* is a learning rate, a batch size and a number of steps; all else is the base run's. The
# main arm is trained once for each fold, on all dialogues outside it.
#
# The relative change of the weights is the Euclidean norm of their difference, before and after,
# over that before; its mean over folds is recorded. Far below a thousandth, a model has hardly been
# trained; near one, little of the base model is left.
#
# A fold is a task with a process of its own. Here they take turns, since each uses all threads of
# the base run; on the workers of a `CLUSTER` they run side by side, with the same result. What was
# trained before a kill is found again by its name, and a worker that dies is replaced by another.

# %%
main = finetuning.Tuning(rate=tune_rate, batch_size=batch_size, steps=tune_steps)
with run.stage("cross-validation"):
    tuned = cluster.map("fold", finetuning.tune, [
        (main, dialogues.sides(known, part), fold) for fold, part in enumerate(parts)
    ], common=(base,), reads=[base.folder], threads=base.settings.threads)
logs = [finetuning.training_log(folder) for folder in tuned]
updates = [log["relative_update"] for log in logs]
run.metric("after.relative_update", float(np.mean(updates)), "", n=len(updates))
run.metric("after.tokens", logs[-1]["tokens"], "count")

# %% [markdown]
# Then all answers are read, in both forms: before fine-tuning by the base model, and after it each
# fold's by the model that did not see them. What is kept are bits, one number for each dialogue.

# %%
bits = {}
with run.stage("reading answers"):
    for form, answers in items.items():
        bits[f"before.{form}"] = read_bits(base.folder, answers)
        bits[f"after.{form}"] = np.empty(len(answers))
        for folder, part in zip(tuned, parts, strict=True):
            bits[f"after.{form}"][part] = read_bits(folder, [answers[i] for i in part])

# %% [markdown]
# A condition's bits per byte are all its bits over all its bytes. Its interval comes from drawing
# as many dialogues again, with replacement, 2,000 times. Before and after, in one form, belong
# together in the figure, and both forms, `qa` and `bare`, of one model: the first pair says what
# fine-tuning does, the second what the marks are worth to the model. The names of the metrics are
# those of the conditions, as they stand in the table.

# %%
conditions = {name: estimate(values, sizes) for name, values in bits.items()}
run.metrics(each.metric(name) for name, each in conditions.items())
table = pd.DataFrame([{"condition": name, **each.row} for name, each in conditions.items()])
table.set_index("condition").round(4)

# %%
run.figure("conditions", *plots.conditions(table), "Bits per byte of held-out answers, with 95 % "
           "bootstrap intervals over dialogues.")

# %% [markdown]
# The intervals above are as wide as dialogues differ from one another. The question is about the
# same dialogues before and after, so the differences are what is judged: bits of both conditions
# are subtracted dialogue by dialogue, and dialogues are resampled.

# %%
differences = {
    "after_minus_before.qa": bits["after.qa"] - bits["before.qa"],
    "after_minus_before.bare": bits["after.bare"] - bits["before.bare"],
    "bare_minus_qa.before": bits["before.bare"] - bits["before.qa"],
    "bare_minus_qa.after": bits["after.bare"] - bits["after.qa"],
}
run.metrics(estimate(each, sizes).metric(name) for name, each in differences.items())
run.say("""
Fine-tuning changes held-out answers by {after_minus_before.qa}. Against the Q/A form, a bare
question costs {bare_minus_qa.before} before fine-tuning, and {bare_minus_qa.after} after it. In
brackets stand intervals; one that includes zero leaves open whether there is a difference.
""")

# %% [markdown]
# ## Learning rate and batch size
#
# The log fine-tuned with a learning rate of 1e-5 and says that a batch of 16, where the base run
# had 8, made it fail. Each setting is trained on the first fold and read on the same dialogues.
# A batch of twice the size is compared at equal tokens (half the steps) and at equal
# steps (twice the tokens), at the log's rate and at the main one.
#
# This list is all that the section compares. Another setting is another line, a label and an arm;
# training, table and figure take it in. A batch of another size needs an arm of the main size at
# the same rate, to be compared with.

# %%
arms = [(f"{batch_size}", finetuning.Tuning(rate=rate, batch_size=batch_size, steps=tune_steps))
        for rate in (log_rate, *other_rates, tune_rate)]
for rate in (log_rate, tune_rate):
    for equal, steps in (("tokens", tune_steps // 2), ("steps", tune_steps)):
        arm = finetuning.Tuning(rate=rate, batch_size=2 * batch_size, steps=steps)
        arms.append((f"{arm.batch_size}, equal {equal}", arm))

# %% [markdown]
# The larger batch has to be asked for as an ablation, because the guard refuses it otherwise. The
# main arm is in the list too; its model of the first fold is there already and is taken as it is.
# The seed is the same for all, so all read the same windows in the same order, as far as they go.

# %%
first, tunings = parts[0], [arm for _, arm in arms]
sides = dialogues.sides(known, first)
with run.stage("comparisons"):
    models = dict(zip(tunings, cluster.map("comparison", finetuning.tune, [
        (arm, sides, 0, ["batch_size"] if arm.batch_size != batch_size else [])
        for arm in tunings
    ], common=(base,), reads=[base.folder], threads=base.settings.threads), strict=True))
    read = {arm: read_bits(models[arm], [items["qa"][i] for i in first]) for arm in tunings}
cluster.close()

# %% [markdown]
# Every arm is compared with the base model, and the larger batches with the smaller one at the
# same rate too: on the same dialogues, so again by paired differences. A difference is recorded
# under the arm's name, which tells rate, batch size and steps. These intervals cover which
# dialogues are asked, not how another seed would have trained.

# %%
changes = {}
for _, arm in arms:
    change = read[arm] - bits["before.qa"][first]
    changes[f"{arm.name}.minus_before"] = estimate(change, sizes[first])
    if arm.batch_size != batch_size:
        small = finetuning.Tuning(rate=arm.rate, batch_size=batch_size, steps=tune_steps)
        changes[f"{arm.name}.minus_small"] = estimate(read[arm] - read[small], sizes[first])
run.metrics(each.metric(name) for name, each in changes.items())

# %%
compared = pd.DataFrame([
    {"batch": label, "learning rate": arm.rate, "steps": arm.steps,
     **changes[f"{arm.name}.minus_before"].row, "arm": arm.name} for label, arm in arms
])
compared.set_index("arm")

# %% [markdown]
# Below the dotted line an arm has improved on the base model. Points of one rate are shifted a
# little so that their intervals can be told apart; a line joins the arms of one batch size.

# %%
run.figure("comparisons", *plots.comparisons(compared), "Change of held-out bits per byte against "
           "the base model, first fold, by learning rate and batch size, with 95 % paired "
           "bootstrap intervals over dialogues.")

# %% [markdown]
# The log's learning rate first, against the main one: how far each of them gets in as many steps,
# with the base run's batch size, on the same dialogues.

# %%
run.say("""
The log's rate changes held-out answers by {log.minus_before}; the main rate by
{main.minus_before}.
""", log=arms[0][1].name, main=main.name)

# %% [markdown]
# The log's explanation asks for more: not whether the larger batch improves on the base model, but
# whether it does worse than the smaller one at the same rate. At equal tokens the larger batch has
# half as many steps, which alone is a handicap at a small learning rate; at equal steps it has read
# twice as much. If the batch size were the cause of failure, both differences would be positive,
# and large against what fine-tuning gains. Above zero the larger batch does worse; an interval that
# includes zero leaves that open.

# %%
run.say("\n".join(
    f"- Learning rate {arm.rate:g}, batch of {label}, against a batch of {batch_size}: "
    f"{{{arm.name}.minus_small}}." for label, arm in arms if arm.batch_size != batch_size))

# %% [markdown]
# Training losses, with the learning rates that produced them. The axis counts tokens, so that
# settings of different batch size can be compared. They are losses per token of the windows that
# were just trained on, questions and marks included, in nats; none of them says anything about
# dialogues that were held out.

# %%
folders = {} if base_model else {"base": base.folder}
folders[main.name] = tuned[0]
folders |= {arm.name: folder for arm, folder in models.items()}
run.figure("losses", *plots.loss_curves(folders), "Training loss and learning rate of the base "
           "run, if it was made here, and of the fine-tunings on the first fold.")

# %% [markdown]
# ## In all formats
#
# The first fold's model leaves as a Hugging Face folder, as GGUF in three precisions and as
# llama2.c's two files. The commands `arianna-sample` and `arianna-chat` speak with it. The log's
# "27 MB" is the `llama2c` file of the real shape, four bytes a parameter and a header. In full
# precision they write the same words: the tests compare PyTorch, llama.cpp and a program in C token
# by token. Recorded are the bytes of each file; of the Hugging Face folder, those of the weights.
# The GGUF file in 16 bits should have half of those in 32, and `q8_0`, which adds a scale to every
# 32 numbers of eight bits, a little more than a quarter.

# %%
with run.stage("export"):
    paths = exports.export(tuned[0], run.artifacts)
    base_gguf = locate.gguf_file(str(base.folder), run.artifacts)
for kind, size in exports.sizes(paths).items():
    run.metric(f"export.{kind}.bytes", size, "count")
run.metrics_table("export")

# %% [markdown]
# ## Before and after, verbatim
#
# The same questions and the same seeds: first the base model, then the fine-tuned one, with the
# temperature and top-p that `arianna-sample` has by default. The first question is the log's; the
# others are held out from fine-tuning. What the models say is printed as it came, up to the next
# `Q:`.

# %%
asked = ["What is resonance?", *dialogues.last_questions(known, first, questions - 1)]
with run.stage("samples"):
    words = {name: chat.answers(path, asked, answer_tokens, seed)
             for name, path in (("before", base_gguf), ("after", paths["f32"]))}
for number, question in enumerate(asked):
    print(f"Q: {question}")
    for name, texts in words.items():
        print(f"[{name}] A: {texts[number]}")
    print()

# %% [markdown]
# ## What it knows by heart, and what it forgot
#
# So few dialogues can be learnt by heart. Two numbers say how far that went: the cost of
# answers that were trained on against answers that were not (less the same gap before training,
# because dialogues differ), and the share of five-word runs in the samples that occur in a training
# dialogue. The same share for held-out dialogues tells what one author's habits alone would give.
# Both are recorded under `memory`.
# What the new voice costs is read from the base corpus: its held-out documents, before and after.

# %%
found = estimate(read_bits(tuned[0], pages), page_sizes)
run.metrics([found.metric("after.documents.bits_per_byte")])

# %% [markdown]
# As many dialogues that were trained on are read as were held out, at equal distances. The two
# sets share no dialogue, so for the interval of their gap both are resampled, each by itself. A gap
# below zero says that fine-tuning has lowered the cost of what it saw by more than that of the
# rest, which is what learning by heart means; at zero it has learnt the voice and no single text.

# %%
seen = np.setdiff1d(np.arange(len(known)), first)
memory, change = {}, {}
for side, which in (("trained", seen[evenly(len(seen), len(first))]), ("held_out", first)):
    before, after = bits["before.qa"][which], read_bits(tuned[0], [items["qa"][i] for i in which])
    memory[f"memory.before.{side}"] = estimate(before, sizes[which])
    memory[f"memory.after.{side}"] = estimate(after, sizes[which])
    change[side] = after - before, sizes[which]
memory["memory.gap"] = gap(change["trained"], change["held_out"])
run.metrics(each.metric(name) for name, each in memory.items())

# %% [markdown]
# Runs of words are compared without regard to case, within single samples and dialogues. Both
# shares are of all runs that the texts have, not of the distinct ones, so that a phrase that a
# sample repeats counts as often as it is said. A text of fewer than five words has no run, and so
# no part in the share.

# %%
learnt, unseen = dialogues.sides(known, first)
for name, texts in (("memory.runs", words["after"]),
                    ("memory.runs.held_out_dialogues", unseen)):
    shared, total = dialogues.ngram_overlap(texts, learnt, 5)
    run.metric(name, shared / max(total, 1), "fraction", numerator=shared, denominator=total)
run.metrics_table("memory")

# %% [markdown]
# ## Report
#
# Every number of it is one of the record, with the interval that was computed above; nothing is
# rounded or chosen by hand.

# %%
run.finish(arms=[arm.name for _, arm in arms])

# %% [markdown]
# ## What this does not show
#
# - The intervals resample dialogues of one author. They say nothing about other voices, and little
#   about other seeds of training: each setting of a comparison was trained once.
# - The comparisons are many and not corrected together, and they are read on one fold.
# - The learning rate of the main fine-tuning was chosen on short runs with these dialogues.
# - Bits per byte measure prediction. Whether an answer is worth reading is for the reader of the
#   samples to say.
# - A base model that is trained here has, outside the profiles `study` and `full`, seen a small
#   part of the log's tokens; what fine-tuning does to a better one may differ, and so may the
#   effect of the batch size. Profile `pretrained` asks that of a model that others have trained.
