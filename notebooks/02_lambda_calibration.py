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
# # Calibrating λ
#
# The lab log turned one knob, $\lambda$, by factors of ten and found that the model went from
# incoherent to repetitive. It then moved the injection to the last layers and, with a quarter of
# the vectors, called the result incoherent again. A knob that behaves like that has not been
# calibrated.
#
# This chapter sweeps the strength over four decades and four layer ranges, with several sampled
# commitments each, and then inverts the question: **which $\lambda$ spends a given budget of
# divergence from the unmodified model?** That number transfers between models; $\lambda$ itself
# does not.

# %% tags=["parameters"]
model: str = "offline:smoke"  # offline:RECIPE, a path (.gguf, .bin, folder), hub:, pypi: or npm:
chat: str = "plain"  # how the model is spoken to: plain, llama2, or auto (its own template)
k: int = 64  # latent dimension of z*
strengths: list[float] = [0.0, 0.01, 0.1, 1.0]  # λ grid; the log's 0.01, 0.1 and 1 must be in it
seeds: list[int] = [1, 2]  # seeds of the commitments
ranges: list[str] = ["all", "last quarter", "first quarter", "layer 0"]  # also "last N"; all needed
kl_budget: float = 1.0  # nats: 95th percentile of KL per held-out token
item_seed: int = 0  # seed of the probes and of the held-out texts
items: int = 12  # probes of each family
texts: int = 8  # held-out dialogues to read
continuations: int = 4  # of these, how many the model continues by itself
tokens: int = 24  # length of a continuation, tokens
sequences: int = 65  # sequences that are evaluated together
window: int = 256  # tokens that a sequence may hold
gpu_layers: int = 0  # layers on the GPU, for builds of llama.cpp that have one

# %% [markdown]
# What is asked, read and continued is that of chapter 1. The model speaks in as many contexts as
# there are cores. All contexts share the weights; each holds a commitment of its own, which is
# what makes the sweep parallel.

# %%
from lablog import figures
from lablog.cluster.client import Cluster
from lablog.commitment import calibration, coherence, log_experiments, plots, probes, sweep
from lablog.commitment import sweep_metrics as metrics
from lablog.commitment.llama_cpp_speaker import Engine, EngineSettings
from lablog.commitment.sweep import Task
from lablog.models import locate
from lablog.run import begin
from lablog.text.dialogues import settings_for

import pandas as pd

figures.use_style()
run = begin("02_lambda_calibration", globals())
cluster = Cluster.of(run)
with run.stage("model"):
    gguf = run.file(locate.gguf_file(model, run.artifacts))

# %% [markdown]
# The unmodified model is read once: its mean $\lVert h \rVert$ gives the doses, its log
# probabilities are what every divergence below is taken from.

# %%
dialogues = settings_for(chat)
asked = probes.make_items(dialogues, item_seed, items)
material = coherence.make_material(dialogues, item_seed, texts, continuations, tokens)
with run.stage("baseline"):
    engine = Engine(EngineSettings(gguf, sequences=sequences, window=window, chat=chat,
                                   gpu_layers=gpu_layers, system=dialogues.chat.system))
    norms = engine.residual_norms(material.texts)
    conditions = sweep.Conditions(k=k, items=asked, material=material, residual_norms=norms,
                                  baseline=coherence.baseline(engine, material))

# %% [markdown]
# ## What counts as coherent
#
# Coherence has several sides. *Perplexity* on held-out dialogues says whether the model still
# predicts what was really said. The divergence
#
# $$ D_\mathrm{KL}\big(p_\lambda(\cdot \mid x_{<t}) \,\Vert\, p_0(\cdot \mid x_{<t})\big) $$
#
# from the model under commitment to the unmodified one says how far each prediction moved, on
# those dialogues and on the model's own continuations; its mean hides rare disasters, so the 95th
# percentile stands beside it. *Repeated 4-grams* and *distinct-n* describe the continuations. The
# log's words are cut from these numbers by thresholds that were fixed before the sweep:

# %%
limits = coherence.Thresholds()
print(f"incoherent: perplexity above {limits.perplexity_ratio} × that at λ = 0, or the same "
      f"likeliest token in less than {limits.same_top_token:.0%} of positions; repetitive: "
      f"repeated 4-grams more than {limits.repeated_4grams:.0%} above; coherent: neither")

# %% [markdown]
# ## The sweep
#
# Every $\lambda$ meets every layer range (all layers, the last quarter, the first quarter, layer
# 0 alone) and every seed. Layer 0 is a range of its own because llama.cpp's control vectors
# cannot reach it. Ranges that name the same layers of a small model are computed once, drawn once
# and counted once: in three layers, the first quarter *is* layer 0. Finished rows are kept as the
# sweep goes; after a kill it continues behind them, and what chapter 1 has measured in the same way
# is found rather than measured again. Every few settings are a task with a process
# and a context of its own, as many at a time as there are cores, or as workers of a `CLUSTER` have.
#
# Every cell has its own control, in which the direction is drawn anew for every turn and every
# forked question. Its language is measured in all layers only, where the figure shows it.
#
# The strengths are spaced by factors rather than steps, because nobody knows beforehand in which
# decade something happens. Each row is measured on the same items, texts and random numbers, so
# that two rows differ by the injection alone, and a difference between them is paired item by
# item. What remains is the luck of the direction, which is why every cell has several seeds.

# %%
metrics.check_named(ranges, strengths)
for name in ranges:
    print(f"{name}: layers {log_experiments.span(name, engine.model.layers)}")
tasks = [Task(control="none"), Task(control="text")]
for control in ("commitment", "redrawn"):
    for name in ranges:
        language = control == "commitment" or name == "all"
        tasks += [
            Task(control=control, strength=strength, layers=name, seed=seed, language=language)
            for strength in strengths if strength != 0 for seed in seeds]
with run.stage("sweep"):
    rows = sweep.sweep(cluster, engine, tasks, conditions, run.artifacts)
run.metrics(metrics.of_named_rows(rows))
table = metrics.summarise(rows)

# %% [markdown]
# ### Language
#
# The horizontal axis is the dose, the added length relative to the residual stream. If the dose
# were all that mattered, the curves of the four ranges would fall on one another. Where they do
# not, the place of the injection matters as well: a vector that enters early is normalised and
# transformed by every later layer, one that enters late acts on the logits almost as a bias.
#
# Read the left end of each curve first. It must meet the grey line of the unmodified model,
# since a vanishing $\lambda$ changes nothing; then look for the dose at which it leaves.

# %%
run.figure(
    "dose",
    *plots.dose(table),
    "Coherence against dose; means over seeds with 95 % intervals (t over seeds). Dotted: "
    "directions of the same norm drawn anew every turn. Grey: the unmodified model.",
)

# %% [markdown]
# ### Consistency
#
# The same sweep, seen through the probes. Recall in the window can hardly rise, since the model
# copies well without help. What a commitment could add shows after eviction and in the forks.
# A sum of yes-probabilities that leaves its unmodified value without approaching one means that
# the answers were disturbed rather than decided.
#
# The curves and the heat map show the same numbers: the curves with their intervals, over seeds
# and items together; the map without them, for an overview of strengths against ranges. Solid
# against dotted is the comparison that matters. Where a solid curve rises and its dotted one
# rises with it, any direction of that length does the same, and constancy has no part in it.

# %%
run.figure(
    "ranges",
    *plots.by_range(table),
    "The probes against dose for each distinct layer range, commitment (solid) and redrawn control "
    "(dotted); means with 95 % intervals over seeds and items.",
)

# %%
run.figure(
    "heat",
    *plots.heat(table),
    "Recall and agreement of the two question forms over λ and distinct layer range, means over "
    "seeds; right: what the commitment has above directions that are redrawn.",
)

# %% [markdown]
# ### Does any setting do what the log hoped for?
#
# The log concluded that no scaling and no choice of layers makes a fixed random commitment work
# (claim A08). As a rule: a cell *works* on a probe if most of its seeds are coherent and it is
# better both than the unmodified model and than its redrawn control. The first comparison alone
# would also credit what any push of that length does.
#
# Both comparisons are paired, item by item and seed by seed. Their p-value is that of a mean over
# crossed seeds and items, with Satterthwaite's degrees of freedom, so that it holds for new seeds
# as well as for new items. Both must be below 5 %; the larger of the two counts, corrected by
# Holm's method {cite}`holm1979simple` for all distinct cells and all three probes.

# %%
comparisons = metrics.improvements(rows)
run.metrics(metrics.of_improvements(rows, comparisons))
shown = comparisons.sort_values("p").head(8).drop(columns=["span", "p_unmodified", "p_redrawn"])
shown.round(4)

# %% [markdown]
# The table holds the eight smallest p-values, whatever they are. Columns with *holm* are
# corrected; *over* are differences of shares.

# %% [markdown]
# ## The λ that spends a budget
#
# For a user, calibration means: how far may I turn the knob? The answer is solved for, not read
# off a grid. For each range and seed, the smallest $\lambda$ is bracketed at which the 95th
# percentile of the divergence on held-out text reaches the budget, and then found by Brent's
# method on logarithmic axes. The interval covers the seeds, that is, the luck of the direction.
#
# The budget is stated for the 95th percentile rather than the mean: a reader stumbles over the
# rare token that was ruined, not over the average one. The smallest crossing is taken because
# the divergence need not grow for ever; behind the first crossing the model may settle on
# another, equally foreign distribution. A range in which too few directions reach the budget
# between $\lambda = 10^{-3}$ and $10^3$ is reported as undefined, with the number that did.

# %%
with run.stage("calibration"):
    solved = calibration.calibrate(cluster, engine, ranges, seeds, kl_budget, conditions)
budgets = []
for name, found in solved.items():
    doses = [sweep.dose(Task(control="commitment", strength=1.0, layers=name, seed=seed),
                        engine.model, k, norms)
             for seed in seeds]
    budgets.append(metrics.budget_table(name, found, seeds, doses))
    run.metrics(metrics.of_budget(budgets[-1]), under=f"budget.{name.replace(' ', '_')}")
engine.close()
cluster.close()

# %%
run.figure(
    "budget",
    *plots.budget(pd.concat(budgets), kl_budget),
    "The strength that spends the KL budget in each layer range: geometric mean over seeds with "
    "95 % interval; ticks are single seeds.",
)

# %% [markdown]
# ## Report

# %%
run.finish(ranges=ranges)

# %% [markdown]
# ## What this does not show
#
# - The budget is spent on held-out dialogues of the project. Another domain spends it elsewhere.
# - All intervals are over sampled directions and items for one trained model (those of perplexity
#   and KL over directions alone); they do not cover the luck of training it.
# - Recall can be beaten only where it is missed. Where few conversations lack it, no setting could
#   pass the correction, and that none does says nothing of it.
# - A cell that is not counted as working is not shown to be without effect. With few seeds the
#   test sees large differences only, and the correction for many cells costs power too.
# - A cell that is counted keeps an answer that a redrawn direction does not keep. It may do so by
#   favouring one value whatever is asked, which a constant direction can and a changing one cannot.
# - Nothing here was trained to use the direction. A budget says what it costs, not what it buys.
