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

# %% tags=["parameters"]
corpus: str = "docstrings"  # docstrings of installed packages, none, or a data set's name or folder
packages: list[str] = ["pydantic"]  # whose docstrings, with all they require; none: all pinned ones
files: list[str] = []  # further text files in UTF-8, told from the root of the clone
megabytes: list[float] = [100.0, 2.0]  # most that is streamed from a data set; for the tokenizer
conversations: str = "data/arianna_conversations.jsonl"  # dialogues, told from the root
all_turns: bool = False  # all exchanges of a dialogue instead of the first
vocabulary: int = 512  # token ids, with 256 bytes and 3 control tokens
shape: list[int] = [64, 2, 2, 172, 128]  # width, layers, heads, feed-forward width, context
batch: list[int] = [4, 1]  # windows of a micro-batch, micro-batches of an optimiser step
mode: str = "f32"  # f32 or bf16 (autocast), each with _compiled for torch.compile
base_steps: list[int] = [50, 5]  # optimiser steps of the base run, of these warm-up
base_rate: float = 3e-3  # highest learning rate of the base run
tune_steps: int = 8  # optimiser steps of a fine-tuning
tune_rate: float = 1e-3  # learning rate of the main fine-tuning
log_rate: float = 1e-5  # the log's learning rate
other_rates: list[float] = [1e-4]  # further learning rates, on the first fold
folds: int = 2  # parts of the dialogues, each held out once
documents: int = 10  # held-out base documents to read
answers: list[int] = [3, 40]  # sampled answers, tokens of each at most
seed: int = 1  # of weights, windows, folds and samples

# %% [markdown]
# The experiment lives in `lablog.arianna`; training itself is one function that all chapters share.
# It keeps checkpoints as safetensors, continues behind a kill to the same bits, writes TensorBoard
# events beside the weights, and stops with a message when the loss is not a number, when a
# schedule does not fit the run, or when no weight has changed.

# %%
from IPython.display import Markdown
from lablog import figures, record
from lablog.arianna import exports, plots, results
from lablog.arianna.study import Arm, Study
from lablog.files import repository
from lablog.models import convert
from lablog.models.training import ModelShape, TrainingSettings

figures.use_style()
run = record.begin("06_arianna_finetune", globals())

# %% [markdown]
# ## What it reads first
#
# The base corpus needs no network: the documentation strings of the packages that this project
# pins, and of all that they require, as they are installed. Repeated paragraphs are dropped, the
# order is fixed, and nothing of it is committed. It is technical English, which is as far from the
# dialogues' voice as the log's corpus was. A Hub data set such as TinyStories takes its place by
# name, and further text files are added by path.
#
# The tokenizer is SentencePiece's byte-pair encoding with byte fallback, numbers split into
# digits, and no normalisation; it is trained on a fixed sample of the documents. The split goes by
# the hash of a document, one in two hundred is held out, so equal documents cannot be parted.

# %%
width, layers, heads, feed_forward, context = shape
llama = ModelShape(width=width, layers=layers, heads=heads, kv_heads=heads,
                   feed_forward=feed_forward, context=context, tied_embeddings=True,
                   initializer_range=0.02)
study = Study(run, llama)
Markdown(study.corpus(corpus, packages, files, megabytes[0], vocabulary, megabytes[1]))

# %% [markdown]
# ## The dialogues
#
# One exchange each, `Q: {user}` and `A: {assistant}` on a line of its own, joined by blank lines.
# Loading is strict: a line that is broken, empty or lacks a role stops with its number. For
# training they are one stream, cut into windows at random offsets, so long answers lose nothing;
# for reading, an answer beyond the window is continued in windows that overlap by half.
#
# The measure is bits per byte of the answers alone,
# $$ -\frac{1}{\text{bytes}} \sum_{i \in \text{answer}} \log_2 p(t_i \mid t_{<i}), $$
# which does not depend on the tokenizer and does not reward learning the form of the questions.

# %%
Markdown(study.dialogues(repository() / conversations, all_turns, folds, seed))

# %% [markdown]
# ## The base run
#
# AdamW with $\beta = (0.9, 0.95)$ and weight decay 0.1, a linear warm-up and a cosine to zero, as
# in the log. One optimiser step sees `batch` windows of `context` tokens. The log's 4,000 steps of
# $8 \times 4$ windows in float32 are profile `full`. The profile `laptop` has minutes, not hours,
# and spends them on bfloat16 autocast, which its processor multiplies faster; compiling would gain
# little more than it costs before the first step. `make bench` measures all four modes.

# %%
settings = TrainingSettings(
    steps=base_steps[0], batch_size=batch[0], gradient_accumulation=batch[1],
    learning_rate=base_rate, warmup_steps=base_steps[1], schedule="cosine", betas=(0.9, 0.95),
    weight_decay=0.1, precision=mode.removesuffix("_compiled"), compiled="_compiled" in mode,
    seed=seed, checkpoint_every=200, log_every=max(1, base_steps[0] // 100),
)
base = study.base(settings)
study.read_documents(base, "base", documents)
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
# The dialogues are divided into folds; each fold's answers are read by the model that did not see
# them. *Bare* puts the same answer behind the bare question, without `Q:` and `A:`.

# %%
main = Arm(tune_rate, batch[0], tune_steps)
study.before_and_after(main)

# %%
run.figure(
    "conditions",
    *plots.conditions(study.table),
    "Bits per byte of held-out answers, with 95 % bootstrap intervals over dialogues.",
)

# %% [markdown]
# The intervals above are as wide as dialogues differ from one another. The question is about the
# same dialogues before and after, so the differences are what is judged: bits of both conditions
# are subtracted dialogue by dialogue, and dialogues are resampled.

# %%
Markdown(f"""Fine-tuning changes held-out answers by {study.said("after_minus_before.qa")}.
Against the Q/A form, a bare question costs {study.said("bare_minus_qa.before")}, before
fine-tuning, and {study.said("bare_minus_qa.after")}, after it.""")

# %% [markdown]
# ## Learning rate and batch size
#
# The log fine-tuned with a learning rate of 1e-5 and says that a batch of 16, where the base run
# had 8, made it fail. Each setting is trained on the first fold and read on the same dialogues.
# A batch of twice the size is compared at equal tokens (half the steps) and at equal
# steps (twice the tokens), at the log's rate and at the main one; it has to be asked for as an
# ablation, because the guard refuses it otherwise.

# %%
study.compare(study.arms([log_rate, *other_rates], [log_rate, tune_rate]))

# %%
run.figure(
    "comparisons",
    *plots.comparisons(study.compared),
    "Change of held-out bits per byte against the base model, first fold, by learning rate and "
    "batch size, with 95 % paired bootstrap intervals over dialogues.",
)

# %%
Markdown(f"""In as many steps, the log's rate of {log_rate:g} changes held-out answers by
{study.said(f"{Arm(log_rate, batch[0], tune_steps).name}.minus_before")}; the main rate of
{tune_rate:g} by {study.said(f"{main.name}.minus_before")}.""")

# %% [markdown]
# The log's explanation asks for more: not whether the larger batch improves on the base model, but
# whether it does worse than the smaller one at the same rate. At equal tokens the larger batch has
# half as many steps, which alone is a handicap at a small learning rate; at equal steps it has read
# twice as much. If the batch size were the cause of failure, both differences would be positive,
# and large against what fine-tuning gains.

# %%
Markdown(study.batch_claim([log_rate, tune_rate]))

# %% [markdown]
# Training losses, with the learning rates that produced them. The axis counts tokens, so that
# settings of different batch size can be compared.

# %%
run.figure("losses", *study.curves(), "Training loss and learning rate of the base run and of the "
           "fine-tunings on the first fold.")

# %% [markdown]
# ## In all formats
#
# The first fold's model leaves as a Hugging Face folder, as GGUF in three precisions and as
# llama2.c's two files. The commands `arianna-sample` and `arianna-chat` speak with it. The log's
# "27 MB" is the `llama2c` file of the real shape, four bytes a parameter and a header.

# %%
tuned = study.models[f"{main.name}.fold0"]
with run.stage("export"):
    paths = exports.export(tuned, run.artifacts)
    before = convert.to_gguf(base, run.artifacts / "arianna-base.gguf")
results.record_sizes(run, paths)
run.metrics_table("export")

# %% [markdown]
# ## Before and after, verbatim
#
# The same questions and the same seeds: first the base model, then the fine-tuned one, with the
# temperature and top-p that `arianna-sample` has by default. The first question is the log's; the
# others are held out from fine-tuning. What the models say is printed as it came, up to the next
# `Q:`.

# %%
questions = ["What is resonance?", *study.questions(answers[0] - 1)]
with run.stage("samples"):
    words = {name: study.samples(path, questions, answers[1], seed)
             for name, path in (("before", before), ("after", paths["f32"]))}
for number, question in enumerate(questions):
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
# What the new voice costs is read from the base corpus: its held-out documents, before and after.

# %%
study.read_documents(tuned, "after", documents)
study.memory(words["after"])

# %% [markdown]
# ## Report

# %%
run.finish(arms=list(study.compared["arm"]))

# %% [markdown]
# ## What this does not show
#
# - The intervals resample dialogues of one author. They say nothing about other voices, and little
#   about other seeds of training: each setting of a comparison was trained once.
# - The learning rate of the main fine-tuning was chosen on short runs with these dialogues.
# - Bits per byte measure prediction. Whether an answer is worth reading is for the reader of the
#   samples to say.
# - Outside the full profile the base model has seen a small part of the log's tokens; what
#   fine-tuning does to a better base model may differ, and so may the effect of the batch size.
