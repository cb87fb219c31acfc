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
# # Nineteen defects, planted again
#
# The lab logs tell of faults that cost days. Few of them stopped a run: a loss fell, a check
# passed, a file of the right size appeared, and what had been measured was something else. This
# chapter plants each of them once more, one at a time, and shows two things: what the fault does to
# a number that one would have looked at, with it and without it, over several seeds; and which
# check notices. **What would have been seen, and what would not?**

# %% tags=["parameters"]
seeds: list[int] = [42, 43, 44]  # of networks, of text order and of trainings

# Context vectors
text_source: str = "arianna"  # arianna, self_consistency, ultrachat (Hub), or a .txt or .jsonl
corpus_documents: int = 200  # training dialogues read at most
vocabulary: int = 512  # pieces of the tokenizers
dialogues: int = 10  # dialogues in the training text
dialogue_tokens: int = 32  # tokens that each is cut to
width: int = 64  # dimensions of a context, and of an embedding
layers: int = 6  # layers of the recurrent network
weight_std: float = 0.25  # standard deviation of the initial weights; the log's 0.1 is for 768
layernorm_mix: float = 0.8  # share of LayerNorm in a layer's output; below 1 lengths are free
iterations: int = 25  # passes over the text, iteration 0 included
counted_at: int = 9  # iteration in which converged tokens are counted: the log's last
phase1_rate: float = 0.003  # Adam's learning rate in Phase 1
diversity_weight: float = 0.5  # w of Phase 1's loss
threshold: float = 0.1  # MSE to the pass before below which a token has converged

# A language model
conversations: str = "data/arianna_conversations.jsonl"  # told from the root of the clone
model_width: int = 64  # numbers of a token's state
model_layers: int = 2  # blocks of attention and feed-forward
heads: int = 2  # attention heads of a layer
context: int = 128  # tokens of a window
batch_size: int = 4  # windows of a step
base_steps: int = 400  # optimiser steps of the base run
base_rate: float = 3e-3  # its highest learning rate
tune_steps: int = 40  # optimiser steps of a fine-tuning
tune_rate: float = 2e-3  # its highest learning rate
answers: int = 20  # answers that are read
remembered: int = 20  # dialogues of a training that may learn them by heart

# A commitment
k: int = 12  # latent dimension of z*
strength: float = 20.0  # λ, the length of the injected direction
beta: float = 0.07  # weight of the KL divergence
collapsing_beta: float = 50.0  # one that leaves nothing of the latent
commitment_steps: int = 24  # optimiser steps of a training of it
commitment_rate: float = 0.01  # its highest learning rate

# %% [markdown]
# These values are nearly those of all profiles: the chapter is as small as it can be and still show
# every fault. Larger networks and longer texts change the size of a symptom; the list of faults,
# and which check notices each, are the same. Eight faults belong to the context vectors of chapters
# 4 and 5, six to the fine-tuning of chapter 6, four to the commitment of chapters 1 to 3, and the
# last to what is written about all of them.
#
# ## How a fault is planted
#
# No function that an experiment uses has a switch for any of them. The wrong functions live in a
# package of their own, `lablog.defects`, which nothing but this chapter imports; each is put in the
# place of the right one for the time of one measurement, or is called instead of it. What is
# trained with a fault in it goes into a folder that is thrown away.
#
# Each section records the same things:
#
# - the *symptom*, a number that one would have looked at, with the fault planted and without it,
#   as a mean over seeds with its interval;
# - the *check* that must notice. If it stays silent where the fault is planted, or fires where it
#   is not, the chapter stops, and the project's tests fail with it. They also take each check away,
#   one after the other, and see that the chapter then does stop;
# - what a check of the log's own, where it had one that looks at the same thing, says of the
#   planted fault.
#
# Each closes with a word on what may keep the fault out of other projects. These words are advice,
# and not measured.
#
# Most symptoms come from small trainings. How large they are says something of these networks and
# texts only. That the fault is noticed does not depend on them.

# %%
import shutil
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch.nn import functional as F

from lablog import figures
from lablog.defects import commitments, contexts, fine_tuning
from lablog.defects.noticed import COLUMNS, lines, noticed, refusal
from lablog.determinism import seed_everything
from lablog.files import repository
from lablog.report import reject_judgements
from lablog.run import begin

# %% [markdown]
# `record` notes what a section has found, and tells it in a sentence below the cell: the symptom
# planted, the symptom as it should be, and the check. In brackets stand 95 % intervals over seeds.
# They cover how networks and orders of text differ, and not how texts do, of which there is one. A
# symptom that is the same for every seed, as zero often is here, has an interval of no width.

# %%
figures.use_style()
run = begin("07_defects", globals())
seed_everything(seeds[0], threads=1)
first, room = seeds[0], TemporaryDirectory()  # which goes with the run, however that ends
scratch = Path(room.name)


def record(defect, *details, **more):
    run.metrics(noticed(defect, *details, **more))
    return run.say("{of.symptom}: **{of.planted:interval}** planted, {of.right:interval} right. "
                   "Caught by: {of.caught_by}.", of=defect)


# %% [markdown]
# ## Context vectors
#
# The network and the texts are those of chapter 4, small. Initial weights are larger than the
# log's, since a narrow layer stretches a context less; before training, no network here comes to
# rest. The variant is the one of chapter 4 that reaches a fixed point when nothing is wrong, so
# that a fault has something to spoil. Only a part of each layer's output is normalised: contexts
# then have lengths as well as directions, which the first defect needs.
#
# Texts, tokenizer and embedding come from the function that chapters 4 and 5 use, and are kept
# where it keeps them. The tokenizer is trained on the same documents that the text is cut from.

# %%
from lablog.cvfp import checks, passes, phase1
from lablog.cvfp.data import prepare, read_validation, tokenizer_from
from lablog.cvfp.model import CVFPBlock, ModelConfig
from lablog.cvfp.rollout import rollout

shape = ModelConfig(
    context_dim=width, embed_dim=width, num_layers=layers, layernorm_mix=layernorm_mix,
    weight_std=weight_std, bias_std=0.01)
settings = phase1.Phase1Config(
    variant="true_pass", diversity_weight=diversity_weight, iterations=iterations,
    learning_rate=phase1_rate, clip_norm=1.0, convergence_threshold=threshold,
    early_stop_fraction=1.0, early_stop_from=2, ema_decay=0.99, seed=seeds[0])

# %%
with run.stage("texts"):
    texts = prepare(
        run.artifacts / "cvfp", shape, text_source=text_source, tokenizer="project",
        vocabulary=vocabulary, embedding="ppmi", window=5, corpus_documents=corpus_documents,
        dialogues=dialogues, dialogue_tokens=dialogue_tokens, test_dialogues=1,
        val_data_source="text_file", seed=seeds[0], device="cpu")
for path in texts.files.values():
    run.file(path)
tokens, validation = texts.tokens["training"], texts.tokens["validation"]

# %% [markdown]
# Two functions are used by all sections. One trains a network of a seed; the other reads the text
# again and again with frozen weights and gives the mean squared difference between the last two
# readings, the log's `final_diff`, which its check 3 wants below 0.001 and fails above 0.01.
#
# The trainings without any fault are made once, with all seeds, and serve every section as the
# right side. Before each stands the network of the same seed that was never trained, the control of
# chapter 4: what it scores, a check has not measured of training.


# %%
def train(seed):
    block = CVFPBlock(shape, seed)
    return block, phase1.train(block, tokens, replace(settings, seed=seed))


def final_diff(block):
    return passes.iterate_passes(block, tokens, 3, "sequential", threshold).differences[-1]


untrained = {seed: CVFPBlock(shape, seed) for seed in seeds}
with run.stage("right trainings"):
    right = {seed: train(seed) for seed in seeds}
moving = [final_diff(block) for block, _ in right.values()]

# %% [markdown]
# ### 1. A loss of directions
#
# The log's first loss compared *normalised* contexts. Lengths were then nobody's business: the loss
# fell, and not one token converged, since that is counted in raw values. The log noted 0.0 % behind
# ten iterations, at a mean squared error of 32 to 33, and looked for the fault in the learning
# rate.
#
# It happens here too. What notices is the count of converged tokens, which the log had, and which
# it explained away; what does not notice is the loss. Below 10 % in the log's last iteration is
# what counts as noticed.
#
# *Elsewhere:* before a loss is normalised, write down which of its minima have become equally
# good. A loss that cannot see a quantity will let it go anywhere, and a number that is computed
# from that quantity, kept beside the loss, costs one line.

# %%
spoilt, raw = {}, {}
with run.stage("loss of directions"):
    for seed in seeds:
        with contexts.loss_of_directions() as raw[seed]:
            spoilt[seed] = train(seed)


def converged(trainings):
    return [result.history[counted_at - 1].converged / len(tokens)
            for _, result in trainings.values()]


# %%
reported = spoilt[first][1].history[counted_at - 1].cvfp_loss
record("normalised_loss", "tokens converged in the log's last iteration", "fraction", seeds,
       planted=converged(spoilt), right=converged(right),
       check="share of converged tokens below 10 %", fires=max(converged(spoilt)) < 0.1,
       fires_without=min(converged(right)) < 0.1, log_check=f"loss {reported:.3f}")

# %% [markdown]
# The picture says why a loss is no evidence here: the planted one lies below the right one from the
# first iteration to the last, because directions in many dimensions differ little in each of them.
# The distance between two passes, which both are supposed to reduce, tells them apart.

# %%
run.figure("normalised_loss", *lines({
    "planted": contexts.both_losses(spoilt[first][1], raw[first]),
    "right": contexts.both_losses(right[first][1])},
    "iteration", ["reported loss", "MSE between passes"], log=True),
    "The loss that training reports, and the mean squared error between one pass and the next, "
    "with the loss of directions and without, first seed.")

# %% [markdown]
# ### 2. No detach between tokens
#
# A context that is carried to the next token together with its history makes the second backward
# pass walk through weights that the first step has already changed. PyTorch refuses that. The log
# met it as a `RuntimeError`: the loud kind of defect, and the only one of the nineteen that PyTorch
# itself reports.
#
# The usual way out, `retain_graph=True`, would have been worse. It silences the error in other
# cases, keeps every token's history in memory, and lets the gradient of one token run through all
# the tokens before it, which is another training than the one that the log describes.
#
# The loop is the plain form of sequential training, a step for each token; how far it gets is the
# symptom.
#
# *Elsewhere:* where a state is carried through a loop of training steps, detach it where it is
# stored, not where it is used. There is then one place, and it can be tested by asking the stored
# state whether it wants a gradient.

# %%
read = {detach: [contexts.read_with_steps(CVFPBlock(shape, seed), tokens[:20], settings, detach)
                 for seed in seeds] for detach in (False, True)}
kinds = {detach: results[0][1] for detach, results in read.items()}
run.metric("missing_detach.error", kinds[False] or "none", "class")
record("missing_detach", "tokens read, of 20", "count", seeds,
       planted=[count for count, _ in read[False]], right=[count for count, _ in read[True]],
       check="PyTorch: RuntimeError", fires=kinds[False] == "RuntimeError",
       fires_without=kinds[True])

# %% [markdown]
# ### 3. Every pass from zero
#
# A pass over the text begins where the pass before ended. If each begins from the zero context
# instead, every pass with frozen weights is the same as the first, whatever the network: the
# difference is zero to the last bit, and the log's check 3 passes. A check that asks whether
# reading again changes anything must not begin by making both readings equal.
#
# The control that chapter 4 puts beside each check sees it at once, since a network that was never
# trained passes too. No threshold could have seen it.
#
# *Elsewhere:* give every check that has a threshold to something that must not pass it. If an
# untrained model, a constant or shuffled data pass too, the check measures its own construction.

# %%
reset = [contexts.passes_from_zero(block, tokens, 3) for block in untrained.values()]
carried = [passes.iterate_passes(block, tokens, 3, "sequential", threshold).differences
           for block in untrained.values()]
verdicts = [checks.convergence(found[0]).verdict for found in (reset, carried)]
record("context_reset", "final_diff of an untrained network", "", seeds,
       planted=[each[-1] for each in reset], right=[each[-1] for each in carried],
       check="the untrained control passes check 3", fires=verdicts[0] == "pass",
       fires_without=verdicts[1] == "pass", log_check=f"check 3: {verdicts[0]}")

# %% [markdown]
# ### 4. Iteration 0 as the target for ever
#
# The target of a pass is the pass before. If it stays the very first one, training pulls towards
# contexts of a network that no longer exists, and what it pulls together has nothing to do with
# being read again.
#
# Here a check of the log's own is enough: check 3 fails. That it can fail is worth a sentence,
# since in chapter 4 it fails for the log's own parallel variant as well. Only where something is
# known to pass it, as the variant of this chapter does, is a failure a finding.
#
# *Elsewhere:* an iteration that is meant to follow itself should be tested on a map whose fixed
# point is known. One that looks back to its start reaches another point, and the test says so.

# %%
with run.stage("fixed target"), contexts.fixed_target():
    stuck = [final_diff(train(seed)[0]) for seed in seeds]
record("fixed_target", "final_diff behind training", "", seeds, planted=stuck, right=moving,
       check=f"check 3: final_diff above {checks.FINAL_FAILS:g}",
       fires=min(stuck) > checks.FINAL_FAILS, fires_without=max(moving) > checks.FINAL_FAILS)

# %% [markdown]
# ### 5. Token and context swapped
#
# `block(token, context)` has the right shapes as long as both are equally wide, and computes
# something. Where one of several calls is wrong, a network that has learnt to come to rest is read
# by a function that it never learnt. An untrained network would not show it: it is as random one
# way round as the other.
#
# Contexts and tokens are types of their own here, so that the type checker, which runs before the
# tests, refuses the call. Where the widths differ the network refuses it too, and that is what is
# tried. Check 2 of the log asks whether contexts are something other than zero and other than the
# embeddings, which they are.
#
# *Elsewhere:* two arguments of one shape want two types, or keywords. In the tests, let the widths
# differ, as they hardly ever do in the experiment.

# %%
with run.stage("swapped arguments"):
    turned = [contexts.passes_swapped(block, tokens, 3) for block, _ in right.values()]
unequal = replace(shape, embed_dim=width // 2)

# %%
record("swapped_arguments", "final_diff behind training", "", seeds,
       planted=[differences[-1] for _, differences in turned], right=moving,
       check="widths, and types: ValueError",
       fires=refusal(lambda: contexts.call(unequal, swapped=True)) == "ValueError",
       fires_without=refusal(lambda: contexts.call(unequal, swapped=False)),
       log_check=f"check 2: {checks.identity_mapping(turned[0][0], tokens).verdict}")

# %% [markdown]
# ### 6. One path forgets to normalise
#
# Embeddings are normalised once, and in the log that happened in one path and not in another. The
# same tokens are then read as other vectors. Nothing in a rank or in a rate of convergence looks
# wrong; each path by itself is a text like any other.
#
# Here the embedding always normalises, and whatever reads or trains on a text refuses rows that are
# not. The symptom is what the two paths make of one text in the untrained networks. A random table
# stands for the embedding, since some tables are nearly normalised by themselves.
#
# *Elsewhere:* let the object that owns a table be the only way to a row of it, and let what reads
# rows check the property that it relies on. It is two sums a row.

# %%
table = torch.randn(texts.vocabulary, width, generator=torch.Generator().manual_seed(first)) / 10
forgotten = table[texts.ids["validation"]]
normal = F.layer_norm(forgotten, (width,))
apart = {name: [F.mse_loss(rollout(block, text).contexts, rollout(block, normal).contexts).item()
                for block in untrained.values()]
         for name, text in (("planted", forgotten), ("right", normal.clone()))}

# %%
bare = untrained[first]
rank = checks.effective_rank(rollout(bare, forgotten).contexts)
record("embedding_norm", "MSE between the contexts of both paths", "", seeds, **apart,
       check="rows that are not normalised: ValueError",
       fires=refusal(lambda: phase1.contexts_of(scratch, bare, forgotten)) == "ValueError",
       fires_without=refusal(lambda: phase1.contexts_of(scratch, bare, normal)),
       log_check=f"check 1: {rank.verdict('validation')}")

# %% [markdown]
# ### 7. A missing validation file, read as zeros
#
# The log's loader replaced a file that was not there by zeros. The network then reads one and the
# same token for ever, and what it makes of that has a rank and a rate of convergence like any other
# text. Both columns below are ranks of validation contexts; the planted ones could be anybody's.
#
# Nothing measured afterwards can notice that, so the reader must: a missing file is an error, with
# the command that writes it. So are an empty one, one with too few tokens, and one that is no text.
# The check is given the path of a file that is not there, and then the file that chapter 4 writes.
#
# *Elsewhere:* never return something of the right shape in place of what was asked for. Zeros, an
# empty list, the last value that worked: each of them will be averaged with the rest.

# %%
nothing = texts.embedding(torch.zeros_like(texts.ids["validation"]))
ranks = {name: [checks.effective_rank(rollout(block, text).contexts) for block, _ in right.values()]
         for name, text in (("planted", nothing), ("right", validation))}
encoder, written = tokenizer_from(texts.files["tokenizer"]), texts.files["validation"]

# %%
record("missing_validation", "effective rank of validation contexts", "fraction", seeds,
       **{name: [each.fraction for each in found] for name, found in ranks.items()},
       check="the file is missing: FileNotFoundError",
       fires=refusal(lambda: read_validation("text_file", scratch / "val.txt", encoder))
       == "FileNotFoundError",
       fires_without=refusal(lambda: read_validation("text_file", written, encoder)),
       log_check=f"check 1: {ranks['planted'][0].verdict('validation')}")

# %% [markdown]
# ### 8. `auto_split`
#
# The log asks that every validation token occur in training, and a setting called `auto_split`
# split the text without seeing to it. Here a fifth of the dialogues is split off at random; the
# symptom is the share of its tokens that the rest does not hold.
#
# What a network does at a token that it never read says little of what it learnt. That is a reason
# for the log's rule, though hardly for its conclusion, that validation be a part of the training
# text (section 9). The setting is refused, and so is a validation file with such a token in it.
#
# *Elsewhere:* what a split has to guarantee belongs into the function that splits, as a check of
# what it returns. An option that waives the guarantee needs a name that says so.

# %%
parted = texts.ids["training"].reshape(dialogues, dialogue_tokens)
held = (~torch.isin(texts.ids["validation"], texts.ids["training"])).float().mean().item()
known_ids = texts.ids["training"].tolist()
record("auto_split", "validation tokens that training lacks", "fraction", seeds,
       planted=[contexts.share_absent(parted, dialogues // 5, seed) for seed in seeds],
       right=[held] * len(seeds), check="the setting: ValueError",
       fires=refusal(lambda: read_validation("auto_split", written, encoder)) == "ValueError",
       fires_without=refusal(lambda: read_validation("text_file", written, encoder, known_ids)))

# %% [markdown]
# ## Fine-tuning
#
# The log of Arianna fine-tuned three times before anything was learnt, and each time the run ended
# without an error. The base model here is a small Llama that reads the project's generated
# dialogues for a few steps; fine-tuning takes the dialogues of chapter 6. Every fault is planted
# between the two.
#
# The schedule of every training here is linear and ends at zero, so that a learning rate behind the
# end is exactly zero. The tokenizer is trained on the base model's texts; the dialogues, whose
# words it has never met, cost it many short pieces, which bits per byte do not mind.

# %%
from lablog.arianna import chat, finetuning
from lablog.arianna import dialogues as exchanges
from lablog.models import locate, training
from lablog.text.corpora import documents
from lablog.text.packing import refuse_overlap

runs = run.artifacts / "defects"
corpus = list(islice(documents("self_consistency", "train", first), 10 * corpus_documents))
with run.stage("base"):
    base = fine_tuning.small_base(
        corpus, runs, vocabulary=vocabulary, width=model_width, layers=model_layers, heads=heads,
        context=context, steps=base_steps, batch_size=batch_size, rate=base_rate, seed=first)
    run.file(base.folder / "model.safetensors")

# %% [markdown]
# The dialogues are divided into folds, at least as many as there are seeds. Training number $i$
# reads all but fold $i$ and is read on answers of that fold. The measure is bits per byte, as in
# chapter 6: what the answer costs behind its question, whatever the tokenizer.

# %%
known = exchanges.load_dialogues(run.file(repository() / conversations))
parts = exchanges.folds(len(known), max(5, len(seeds)), first)[:len(seeds)]
sides = [exchanges.sides(known, part) for part in parts]
asked = [[known[i] for i in part[:answers]] for part in parts]
tuning = finetuning.Tuning(rate=tune_rate, batch_size=batch_size, steps=tune_steps)


# %%
def costs(folders, questions=asked, form="qa"):
    return [fine_tuning.cost(folder, each, base.tokenizer, form)
            for folder, each in zip(folders, questions, strict=True)]


with run.stage("fine-tunings"):
    tuned = [finetuning.tune(base, tuning, texts, i) for i, texts in enumerate(sides)]
before, after = costs([base.folder] * len(seeds)), costs(tuned)

# %% [markdown]
# ### 9. Validation that is the training text
#
# The log's validation file was a copy of its training file, so it could not tell learning from
# memory. Here a few dialogues are read often enough to be learnt, and the symptom is what such a
# file would have shown: bits per byte of answers that were trained on, beside that of answers that
# were not. The first number looks better and answers no question.
#
# Sides that share a dialogue are refused, by their words. In the CVFP experiment the log
# *specifies* validation as the last fifth of the training text; chapters 4 and 5 follow it there,
# say so, and add texts of their own.
#
# *Elsewhere:* compare both sides by their content, at the start of every run. Paths, names and
# sizes say nothing, and the comparison takes less time than a step.

# %%
few = [[each for i, each in enumerate(known) if i not in part][:remembered] for part in parts]
with run.stage("by heart"):
    heart = [finetuning.tune(base, tuning, ([each.text() for each in read], unread), 100 + i)
             for i, (read, (_, unread)) in enumerate(zip(few, sides, strict=True))]
learnt, unseen = sides[0]

# %%
record("validation_is_training", "bits per byte of validation answers", "bit/byte", seeds,
       planted=costs(heart, [each[:answers] for each in few]), right=costs(heart),
       check="shared dialogues: ValueError",
       fires=refusal(lambda: refuse_overlap(learnt, learnt[-20:])) == "ValueError",
       fires_without=refusal(lambda: refuse_overlap(learnt, unseen)))

# %% [markdown]
# ### 10. Another batch size
#
# The log blames a batch of 16, where the base run had 8, for a fine-tuning that failed. A tuning of
# another batch size than the base run's is refused unless it is asked for as an ablation. Asked
# for, it shows what the batch size does: here with half the steps, that is with as many tokens
# read. Chapter 6 compares at equal steps too, with a larger model, and finds how much of the
# difference is the number of steps.
#
# *Elsewhere:* what a run takes over from another should be read from that other one's record, and
# a difference should have to be asked for by name. The one who asks then knows what he compares.

# %%
double = replace(tuning, batch_size=2 * batch_size, steps=tune_steps // 2)
with run.stage("larger batches"):
    larger = [finetuning.tune(base, double, texts, i, ["batch_size"])
              for i, texts in enumerate(sides)]

# %%
record("batch_size", "bits per byte of held-out answers", "bit/byte", seeds,
       planted=costs(larger), right=after, check="differs from the base run's: ValueError",
       fires=refusal(lambda: finetuning.tune(base, double, sides[0], 0)) == "ValueError",
       fires_without=refusal(lambda: finetuning.tune(base, tuning, sides[0], 0)))

# %% [markdown]
# ### 11. Weights that were copied
#
# The log's first fine-tuning saved the base weights under a new name. Everything that looks at the
# file is content: its size, its shape, a loss that is a loss. Only a comparison with the base model
# tells, and nobody compares with what he believes he has left behind.
#
# The change of all weights, relative to their size, is recorded with every training here, and a
# change of zero is an error. The symptom is what was gained on held-out answers.
#
# *Elsewhere:* keep a copy of the weights from before, or a hash of them, until the run has ended.
# A relative change of a tenth or a hundredth is what a fine-tuning leaves; zero is no fine-tuning.

# %%
copied = scratch / "tuned"
shutil.copytree(base.folder, copied)
weights, copy, trained = map(fine_tuning.weights_of, (base.folder, copied, tuned[0]))
same = "yes" if all(torch.equal(copy[name], weights[name]) for name in weights) else "no"
run.metric("copied_weights.same_weights", same, "class")

# %%
gained = [[b - a for a, b in zip(costs(folders), before, strict=True)]
          for folders in ([copied] * len(seeds), tuned)]
record("copied_weights", "bits per byte gained on held-out answers", "bit/byte", seeds,
       planted=gained[0], right=gained[1], check="relative change of weights is zero: ValueError",
       fires=refusal(lambda: training.relative_update(weights, copy)) == "ValueError",
       fires_without=refusal(lambda: training.relative_update(weights, trained)))

# %% [markdown]
# ### 12. Counters of the base run
#
# The log's second fine-tuning resumed the base run's counters along with its weights. Its schedule
# was over before it began: every step had a learning rate of zero, and every step reported a loss.
#
# To plant it, the scheduler is told at the start that the base run's steps are behind it. A
# training that does not begin at its own step 0 is refused. With that check taken away, and the one
# of the section before as well, the run ends like any other, and no weight has changed.
#
# *Elsewhere:* a fine-tuning takes the weights of a checkpoint and nothing else. Whoever resumes
# takes everything. If one function does both, let its first log line say at which step it begins,
# and with which learning rate.

# %%
plain = {"steps": tune_steps, "learning_rate": tune_rate, "warmup_steps": 1,
         "checkpoint_every": tune_steps}


def by_hand(name, seed, **changes):
    return fine_tuning.tune(base, learnt, scratch / f"{name}.{seed}", seed=seed, **plain | changes)


# %%
with run.stage("counters"):
    fresh = [by_hand("fresh", seed) for seed in seeds]
    with fine_tuning.counters_resumed(base_steps, look=True):
        stopped = refusal(lambda: by_hand("stopped", first))
    with fine_tuning.counters_resumed(base_steps, look=False):
        resumed = [by_hand("resumed", seed) for seed in seeds]
changed = [[log["relative_update"] for log in logs] for logs in (resumed, fresh)]
record("resumed_counters", "relative change of the weights", "", seeds, planted=changed[0],
       right=changed[1], check="step and schedule at the start: ValueError",
       fires=stopped == "ValueError", fires_without=0.0 in changed[1])

# %% [markdown]
# ### 13. A warm-up longer than the run
#
# A warm-up that was chosen for the base run does not end within a fine-tuning of a few steps. The
# loss falls, as it does with a small learning rate, and the setting that everybody looks at, the
# highest learning rate, was never in force. The symptom is how much of it was reached.
#
# The schedule is checked before the first step, so that no time is lost on such a run.
#
# *Elsewhere:* tell a warm-up as a share of the run instead of as a number of steps. It then fits
# any length, and nobody has to remember it.

# %%
late = {"warmup_steps": 10 * tune_steps}
with run.stage("warm-up"):
    refused = refusal(lambda: by_hand("refused", first, **late))
    with fine_tuning.any_schedule():
        slow = [by_hand("slow", seed, **late) for seed in seeds]
highest = [[max(row["learning_rate"] for row in log["history"]) / tune_rate for log in logs]
           for logs in (slow, fresh)]
record("long_warmup", "highest learning rate, of the one asked for", "fraction", seeds,
       planted=highest[0], right=highest[1], check="warm-up not shorter than the run: ValueError",
       fires=refused == "ValueError",
       fires_without=refusal(lambda: training.check_schedule(base.settings)))

# %% [markdown]
# Both faults at a glance, with the same seed and the same text. The learning rate is in every log;
# the losses alone are harder to read. One falls, one falls later, and one stays where the texts of
# its batches put it.

# %%
run.figure("schedules", *lines({
    "right": fresh[0]["history"], "counters of the base run": resumed[0]["history"],
    "warm-up longer than the run": slow[0]["history"]}, "step", ["learning_rate", "loss"]),
    "Learning rate and training loss (nat per token) of three fine-tunings of one base model.")

# %% [markdown]
# ### 14. A prompt without the form
#
# Fine-tuning teaches answers behind `Q:` and `A:`. Asked without these marks the log's model wrote
# badly, which was taken for a model that had learnt nothing. The commands warn of such a prompt,
# and answer it all the same, because a user may want just that.
#
# The symptom is what a held-out answer costs behind the bare question. In a model as small as this
# one, little; chapter 6 measures it for models of Arianna's size.
#
# *Elsewhere:* put the form into the one function that makes prompts, and measure with that
# function too. A probe that types its own prompts measures another model.

# %%
question = known[0].exchanges[0][0]
record("bare_prompt", "bits per byte of held-out answers", "bit/byte", seeds,
       planted=costs(tuned, form="bare"), right=after, check="the prompt's form: a warning",
       fires=fine_tuning.warned_of(question),
       fires_without=fine_tuning.warned_of(chat.prompt(question)))

# %% [markdown]
# ## Commitment
#
# The same small base model is asked to carry a latent $z^*$: an adapter, a variational head and a
# projection $W_c$, as in chapter 3, with its conversations and its loss. One row of a batch is one
# conversation; a batch of twelve holds each persona once.
#
# The faults of this part have something in common: the training ends, the loss is lower than at its
# start, and the latent does nothing, or does it where it should not. What the words cost cannot
# tell. Each check compares two conversations that differ in the latent alone.

# %%
plan = commitments.small_plan(
    base.settings, k=k, strength=strength, window=context, beta=beta, steps=commitment_steps,
    learning_rate=commitment_rate)

# %% [markdown]
# ### 15. A commitment at padding only
#
# Rows of a batch have different lengths, and a mask says what is real. With the mask the wrong way
# round the commitment is added where nothing is read. Everything runs, the KL is paid, the loss
# falls as it would without a latent; $z^*$ just has no effect.
#
# Chapter 3 reads held-out conversations under the true latent, under another row's and under none.
# Losses that are equal to the last bit give it away. The symptom is how far the latent of an
# untrained, long $W_c$ moves the loss.
#
# *Elsewhere:* an intervention is first tried so strongly that its effect cannot be missed. If the
# output does not change by a bit, it does not reach the output.

# %%
with run.stage("padding"):
    sound = [commitments.read_untrained(base, plan, seed) for seed in seeds]
    with commitments.padding_only():
        deaf = [commitments.read_untrained(base, plan, seed) for seed in seeds]
moves = [[abs(each["nll_true"] - each["nll_zero"]) for each in found] for found in (deaf, sound)]

# %%
record("padding_commitment", "change of the loss that z* makes", "nat", seeds,
       planted=moves[0], right=moves[1], check="equal losses with and without z*",
       fires=not any(moves[0]), fires_without=not all(moves[1]))

# %% [markdown]
# ### 16. Padding counted in the loss
#
# Where padding counts, a model is taught to predict the token that fills rows, which is easy and of
# no use, and the loss of a text depends on the longest text beside it. Two runs with other batches
# can then not be compared, and the easy tokens make the loss look better than it is.
#
# That dependence is the check: the same rows with more padding must cost the same. They are
# dialogues of chapter 6 under the base model.
#
# *Elsewhere:* test a loss by what must not change it: more padding, another order of the rows, one
# row alone. These three find most faults of masks, whatever the model.

# %%
padded = {counted: [fine_tuning.change_with_padding(
    base.folder, known[4 * i:4 * i + 4], base.tokenizer, 60, counted) for i in range(len(seeds))]
    for counted in (True, False)}
TOLERANCE = 1e-3  # nat; sums in another order differ by less than a thousandth of it

# %%
record("counted_padding", "change of the loss with 60 tokens of padding", "nat", seeds,
       planted=padded[True], right=padded[False], check="loss that depends on padding",
       fires=min(padded[True]) > TOLERANCE, fires_without=max(padded[False]) > TOLERANCE)

# %% [markdown]
# ### 17. Posterior collapse
#
# If the KL divergence weighs too much from the start, the cheapest posterior is the prior, and
# $z^*$ carries nothing. The loss on the words falls as it would without a latent, and a decoder
# that has learnt to ignore the latent will not take it up again.
#
# The KL tells, but not alone: while this chapter was written, trainings of a weaker base had a KL
# of 15 nat and not one unit that differed between conversations, because all posteriors had moved
# the same way. The active units of {cite}`burda2016iwae` see that as well. None active is counted
# as a collapse, in chapter 3 too.
#
# *Elsewhere:* watch what the latent *distinguishes*, not what it costs: the variance of its means
# over the data, or the loss under another row's latent. Either is computed from what training has
# at hand.

# %%
heavy = commitments.at_once(plan, collapsing_beta)
with run.stage("collapse"):
    collapsed, kept = (commitments.trained(base, each, seeds, scratch / name)
                       for name, each in (("collapsed", heavy), ("kept", plan)))


# %%
divergence = [table.groupby("seed").last()["kl"].tolist() for table in (collapsed, kept)]
record("posterior_collapse", "KL of the posterior", "nat", seeds, planted=divergence[0],
       right=divergence[1], check="no active unit",
       fires=commitments.collapses(collapsed) == len(seeds),
       fires_without=commitments.collapses(kept))

# %%
run.figure("collapse", *lines({
    "planted": collapsed[collapsed.seed == first], "right": kept[kept.seed == first]},
    "step", ["kl", "lm"]),
    "KL of the posterior and loss on the model's own words, both in nat per conversation, with a "
    "weight of the KL that is far too large, and with the usual one; first seed.")

# %% [markdown]
# ### 18. One commitment for two conversations
#
# The log's patch of llama.cpp kept the commitment in a place that all contexts shared, so that
# setting it in one conversation changed the other. The patch of this project keeps it with the
# context, and with a sequence of it where that has its own.
#
# Here two conversations stand in one context of the patched library. Set for the whole context, the
# commitment reaches both, which is the fault where one of them was to be left alone; set for one of
# them, it must not move a bit of the other. The native tests ask the same of two contexts in two
# threads.
#
# *Elsewhere:* let two users of a library run side by side in a test, one of them doing nothing.
# What the idle one computes must be what it computes alone, bit by bit.

# %%
moved = commitments.moved_bystanders(locate.gguf_file(str(base.folder), run.artifacts), seeds)
record("shared_commitment", "largest change of a bystander's logits", "", seeds, **moved,
       check="a bystander's logits change", fires=min(moved["planted"]) > 0,
       fires_without=max(moved["right"]) > 0)

# %% [markdown]
# ## Reports
#
# ### 19. A judgement in place of a number
#
# That a rank was excellent is what the log's early reports said, in capitals, and nobody could
# compare two runs by them. A report is rendered from a record; a line without a number, a metric
# that is missing and a word that judges are refused, in English and in Japanese, and the words are
# looked for in all pages of the book, this one included.
#
# No seed plays a part; counted are the lines that hold a number, in three lines of a kind that the
# log's reports had and in three that the mandated report of chapter 4 has.
#
# *Elsewhere:* agree on the numbers of a report before the first run, and let a program refuse one
# that lacks any. A word can be added by whoever reads the numbers.

# %%
judged = ["- Effective rank: excellent", "- 収束: \u826f\u597d", "- Convergence: moderate"]
numbered = ["- Effective rank: 61.2/64 (95.6%)", "- 収束率: 30.0% (1923/6400)",
            "- Convergence: 47.0%"]
shares = [sum(any(map(str.isdigit, line)) for line in report) / len(report)
          for report in (judged, numbered)]

# %%
record("judgement_word", "lines of a report that hold a number", "fraction", [],
       planted=shares[:1], right=shares[1:], check="the report: ReportError",
       fires=all(refusal(partial(reject_judgements, line)) == "ReportError" for line in judged),
       fires_without=refusal(lambda: reject_judgements("\n".join(numbered))))

# %% [markdown]
# ## All of them
#
# In most rows the last column is empty: the log had no check that looks there. Where it had one,
# the column gives what that check says *with the fault planted*. A check that says "pass" there is
# no bad check. It was asked something else than what had gone wrong, and whoever read its answer as
# "all is well" read more than it said.
#
# Counted by what notices them, the nineteen fall into three kinds. Most are *refusals*: a value, a
# file or a call that cannot be right, and a few lines at the place where it comes in. Some are
# *comparisons with a control*: an untrained network, another row's latent, the same rows with more
# padding, a bystander. And a few are numbers that the log had, and read otherwise.

# %%
names = [metric.name.removesuffix(".caught_by") for metric in run.record().metrics
         if metric.name.endswith(".caught_by")]
run.metric("defects.caught", len(names), "count")
room.cleanup()
run.table(names, COLUMNS, "interval").rename(columns={
    "caught_by": "caught by", "log_check": "the log's own check says"})

# %% [markdown]
# ## And what is no defect
#
# One claim of the log is about reproducing, and fits here: the same seed on one machine gives the
# same result. Two trainings of one network with one seed are compared bit by bit, and, so that the
# comparison is known to be able to fail, with a third of another seed.


# %%
for name, other in (("identical", train(first)), ("other_seed_identical", right[seeds[1]])):
    run.metric(f"same_seed.{name}", contexts.identical(right[first][0], other[0]), "class")
run.say("""
Two trainings with one seed: identical weights, {same_seed.identical}. With another seed:
{same_seed.other_seed_identical}. All in all {defects.caught} defects were planted and caught.
""")

# %% [markdown]
# ## Report
#
# Every number of it is one of the record. There is a line for each defect, in the order of the
# chapter: the symptom planted and as it should be, and what noticed it. The last line is the claim
# about seeds, with its control.
#
# What each of the ledger's rows about a defect makes of these numbers stands in the book's table of
# claims.

# %%
run.finish(defects=names)

# %% [markdown]
# ## What this does not show
#
# - That there is no other defect. These are the ones that the logs tell of.
# - How large a symptom is elsewhere. Networks, texts and trainings are small, and a fault that
#   costs little here may cost a model of the log's size everything, or nothing.
# - That the checks are enough. Each is shown to fire at one planting of one fault; a fault of the
#   same kind in another place may pass.
