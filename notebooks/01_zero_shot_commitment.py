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
# # Zero-shot commitment
#
# Ask a language model for its favourite colour, talk about something else, and ask again: it may
# name another colour. The lab log proposed a remedy that needs no text. Sample a latent
# *commitment* once per conversation and let it colour every later hidden state, so that whatever
# the model makes up, it makes up in the same light each time. The log tried it by hand on one
# prompt, with a random commitment and three strengths, and read the answers by eye.
#
# This chapter asks the same question with numbers: **does adding a fixed random direction to the
# residual stream make a model contradict itself less, and what does it cost in language?**
#
# Everything below runs on any model that llama.cpp can read. The default is a small Llama that
# the project trains in minutes on dialogues that it generates; `model` in the next cell takes a
# path, a Hub address or a package's name instead.

# %% tags=["parameters"]
model: str = "offline:smoke"  # offline:RECIPE, a path (.gguf, .bin, folder), hub:, pypi: or npm:
chat: str = "plain"  # how the model is spoken to: plain, llama2, or auto (its own template)
k: int = 64  # latent dimension of z*
seeds: list[int] = [1, 2]  # seeds of the commitments, one conversation's z* each
item_seed: int = 0  # seed of the probes and of the held-out texts
items: int = 12  # probes of each family
texts: int = 8  # held-out dialogues to read
continuations: int = 4  # of these, how many the model continues by itself
tokens: int = 24  # length of a continuation, tokens
sequences: int = 65  # sequences that are evaluated together
window: int = 256  # tokens that a sequence may hold
gpu_layers: int = 0  # layers on the GPU, for builds of llama.cpp that have one
steering: float = 1.0  # times a difference of means, in the middle layer; 0: no such row
parity: bool = False  # compare the engine's logits with PyTorch's; a Llama only, in f32

# %% [markdown]
# The run below collects every number that this chapter shows. It ends in one record, and the
# figures, the report and the claims ledger read nothing else.

# %%
from lablog import figures
from lablog.cluster.client import Cluster
from lablog.commitment import coherence, engine_comparison, log_experiments, plots
from lablog.commitment import probes, sampler, sweep
from lablog.commitment import sweep_metrics as metrics
from lablog.commitment.llama_cpp_speaker import Engine, EngineSettings
from lablog.commitment.log_experiments import AT_LOG_DOSE, NAMED_ROWS, RANGES
from lablog.commitment.steering import steering_vectors
from lablog.models import locate
from lablog.run import begin
from lablog.text.dialogues import settings_for

figures.use_style()
run = begin("01_zero_shot_commitment", globals())
cluster = Cluster.of(run)

# %% [markdown]
# ## The model
#
# The offline model is a Llama of a few layers. Its training dialogues state favourites and ask
# for them again, many times over, with other talk in between; they also play a guessing game in
# which the assistant chooses something in secret and answers "is it X?". That teaches copying
# inside the window and the form of the game, but nothing that could survive outside the window.
# Training shows a progress bar, keeps checkpoints, and resumes where a kill left it; a finished
# model is reused until its recipe, its data or its code changes.

# %%
with run.stage("model"):
    gguf = run.file(locate.gguf_file(model, run.artifacts))
print(f"{gguf.name}: {gguf.stat().st_size / 2**20:.1f} MiB")

# %% [markdown]
# A model that cannot copy a stated value inside its window cannot be said to contradict itself,
# so the training is checked first, on held-out dialogues and in PyTorch, without any of the code
# that is used below. The same question is then asked with the statement cut out of the window:
# a sound model can only guess there, one in twelve.

# %%
if model.startswith("offline:"):
    folder = locate.hugging_face_folder(model, run.artifacts)
    with run.stage("check"):
        run.metrics(metrics.model_check(folder, items), under="offline")
    shown = run.figure("training", *plots.training_curve(folder), "Training of the offline model.")
    display(shown)
run.metrics_table("offline")

# %% [markdown]
# ## The mechanism
#
# A latent $z^* \sim \mathcal N(0, I/k)$ is sampled once. A projection $W_c \in \mathbb R^{d
# \times k}$ with variance $2/(d+k)$ carries it to the model's width $d$. After every layer
# $\ell$ in the chosen range, behind the second residual connection, the patched llama.cpp adds
# the same vector to the residual stream at all positions:
#
# $$ h_\ell \leftarrow h_\ell + \lambda \, W_c z^*, \qquad
#    \mathbb E \lVert W_c z^* \rVert^2 = \frac{2d}{d+k}. $$
#
# Whether $\lambda$ is large depends on how long $h$ is. The *dose* therefore stands beside it
# in every table: $\lambda \cdot n_\text{layers} \cdot \lVert W_c z^* \rVert / \overline{\lVert h
# \rVert}$. One native sampler draws the numbers, the same bits on every platform, for the
# command line program, for this notebook and for the PyTorch reference.

# %%
dialogues = settings_for(chat)
asked = probes.make_items(dialogues, item_seed, items)
material = coherence.make_material(dialogues, item_seed, texts, continuations, tokens)
with run.stage("baseline"):
    engine = Engine(EngineSettings(gguf, sequences=sequences, window=window, chat=chat,
                                   gpu_layers=gpu_layers, system=dialogues.chat.system))
    norms = engine.residual_norms(material.texts)
    baseline = coherence.baseline(engine, material)
sample = sampler.sample(seeds[0], k, engine.model.width)
for _ in range(3):  # as a process would that asks for its commitment again
    _, initialisations = sampler.sample_once(seeds[0], k, engine.model.width)
run.metric("direction_norm", sample.norm, "", seeds=(seeds[0],))
run.metric("residual_norm", float(norms.mean()), "")
run.metric("initialisations", initialisations, "count")

# %% [markdown]
# Is it the same mechanism in another engine? PyTorch adds the vector by a hook behind each layer,
# on the same weights in single precision; a model that is quantised is dequantised for both. Shown
# is the largest difference of a logit, over the tokens of one text and the whole vocabulary,
# without a commitment and with $\lambda = 1$ in each range. What quantised arithmetic changes is no
# part of it. A model that PyTorch cannot read exactly, or that does not fit twice, has none.

# %%
if parity:
    spans = {name: log_experiments.layer_range(name, engine.model.layers) for name in RANGES}
    ids = engine.speaker.history(material.texts[0])
    with run.stage("parity"):
        found = engine_comparison.parity(model, run.artifacts, ids, sample.direction, spans)
    run.metrics(found, under="parity")
run.metrics_table("parity")

# %% [markdown]
# The figure compares the two lengths. Each layer adds the vector anew, so by layer $\ell$ the
# stream has received it $\ell + 1$ times. Where a dashed line reaches the solid one, more than
# the model's own signal has been added.

# %%
run.figure(
    "residual",
    *plots.residual(norms, sample.norm, (0.01, 0.1, 1.0)),
    "Mean norm of the residual stream after each layer of the unmodified model, and the length of "
    "what the commitment has added by then.",
)

# %% [markdown]
# ## What is measured
#
# **Recall in the window.** A favourite is asked for and answered by the model itself, distractor
# turns follow, and it is asked for again. Both answers must name the same value. This mostly
# tests copying.
#
# **Recall after eviction.** The same, but the turns with the first answer are no longer in the
# window, which is encoded anew from its text. Only something outside the text could carry the
# answer over: a commitment, or a prior so sharp that both answers coincide without one.
#
# **Forked hidden choice.** The model says that it has chosen one of twelve things. The
# conversation is forked: "is it X?" for each X, and "what is it?". A model that holds a choice
# gives yes a total probability near one, $\sum_X P(\text{yes} \mid \text{is it } X) \approx 1$,
# and favours the same X in both forms. By chance the two forms agree in one item of twelve.
#
# The first answers are drawn at temperature 1 from random numbers that belong to the item, so
# all configurations face the same dice.

# %%
example = asked.recall[0]
print(f"U: {example.question.text}\nA: (the model answers)")
for turn in (*example.distractors, example.requestion):
    print(f"{turn.speaker}: {turn.text}")

# %% [markdown]
# The log described its outputs as "incoherent" or "repetitive". Those words are given meanings
# here, before anything is measured:

# %%
limits = coherence.Thresholds()
print(f"incoherent: perplexity above {limits.perplexity_ratio} × that at λ = 0, or the same "
      f"likeliest token in less than {limits.same_top_token:.0%} of positions; repetitive: "
      f"repeated 4-grams more than {limits.repeated_4grams:.0%} above; coherent: neither")

# %% [markdown]
# ## The log's four experiments, twice
#
# The log ran $\lambda = 1$, $0.1$ and $0.01$ in all layers and $0.01$ in the last 8 of 32, that
# is the last quarter. Each is repeated here over several seeds of $z^*$. But the same $\lambda$ is
# not the same experiment in another model: where $h$ is longer, it is a smaller push. So each row
# is run a second time with the $\lambda$ that has the *dose* of the log's experiment here.
#
# That dose needs the mean norm of the residual stream of Llama-2-7B, which the log did not record.
# Sun et al. {cite}`sun2024massive` give quantiles of its magnitudes $|h_i|$: median 0.2, upper
# tenth 0.6, upper hundredth 1.1 (quoted from memory, not compared with the paper). For normal
# coordinates these mean $\lVert h \rVert = \sqrt{4096}\,\sigma$ of 19, 23 or 27, of which the
# middle one is taken. With $d = 4096$ and $k = 64$, $\lVert W_c z^* \rVert \approx 1.40$, and
# $\lambda = 1$ in 32 layers was a dose near 2. The quantiles are those of a single hidden state,
# and norms grow along the layers, so the factor may be two or three off. It decides where these
# rows lie, not what is measured there.

# %%
named = (*NAMED_ROWS, *log_experiments.rows_at_the_logs_dose(
    engine.model.width, engine.model.layers, k, float(norms.mean())))
run.metric("log_residual_norm", log_experiments.LOG_RESIDUAL_NORM, "")
for row in named:
    span = log_experiments.span(row.layers, engine.model.layers)
    print(f"{row.key}: λ = {row.strength:.4g}, {row.layers} (layers {span})")

# %% [markdown]
# Two controls stand beside every row. The *redrawn* control injects directions of the same norm
# but draws a new one for every turn, and in a fork for every question: what the two question
# forms agree on cannot come from a direction that they share. If it does as well, then constancy
# is not what helps. The *text* control puts one line into the window, the first answer or the
# choice: what a commitment would have to equal. A model that was taught to chat has two more, in
# its system's message: the same words told by the system, and the mere wish that it keeps to
# whatever it says or chooses.
#
# The last row has a direction that means something: a *steering vector*, the mean state in the
# middle layer where an answer has just named the first value of a topic, less the mean where it has
# named another {cite}`rimsky2024steering`. It is to make one value likely in whatever is asked, so
# that two answers can agree by it; but somebody chose that value, and it is the same in every
# conversation. *P(first value)* says how far it gets.

# %%
vectors = {}
if steering:
    with run.stage("steering"):
        vectors = steering_vectors(engine, dialogues, engine.model.layers // 2)
conditions = sweep.Conditions(k=k, items=asked, material=material, residual_norms=norms,
                              baseline=baseline, steering=vectors)
aids = ["system", "instruction"] if chat == "auto" else []
tasks = [sweep.Task(control="none"), sweep.Task(control="text")]
tasks += [sweep.Task(control=aid, language=False) for aid in aids]
if steering:
    tasks.append(sweep.Task(control="steering", strength=steering, layers="middle layer"))
for row in named:
    for control in ("commitment", "redrawn"):
        tasks += [sweep.Task(control=control, strength=row.strength, layers=row.layers, seed=seed)
                  for seed in seeds]
with run.stage("sweep"):
    rows = sweep.sweep(cluster, engine, tasks, conditions, run.artifacts)
run.metrics(metrics.of_named_rows(rows, named))
table = metrics.summarise(rows)

# %% [markdown]
# The intervals come from one bootstrap for all probes: seeds are drawn anew with replacement, and
# independently of them items, because every seed faced the same items
# {cite}`owen2007pigeonhole`. Five seeds vary too little among themselves, so the percentiles are
# expanded as Hesterberg proposes {cite}`hesterberg2015bootstrap`. Where every answer was the same,
# nothing can be drawn anew, and the interval is Wilson's over the items. Perplexity and KL have
# no items; their intervals are Student's t over seeds.

# %%
run.figure(
    "named_rows",
    *plots.named_rows(table, named),
    "The probes for the log's four experiments, at the log's λ and at the log's dose, their "
    "redrawn controls and the two baselines; means with 95 % intervals over seeds and items. A "
    "model that holds a choice has Σ P(yes) at the dotted line.",
)

# %% [markdown]
# Numbers hide what a reader would see, so here is the beginning of one continuation per row,
# from the same opening and the same dice.

# %%
for task in (tasks[0], *(task for task in tasks if task.seed == seeds[0])):
    if task.control != "redrawn":
        dose = sweep.dose(task, engine.model, k, norms)
        shown = f"λ = {task.strength:.3g}, {task.layers}, dose {dose:.2g}"
        print(f"{shown}: {sweep.continuation(engine, task, conditions)!r}")

# %% [markdown]
# The log had one probe, read by eye: a favourite language, asked for and a little later asked for
# again. Here are the answers to its own words, greedily, so that they are the same whenever this
# runs: the first, the second, and the second when the first exchange has left the window. One
# prompt decides nothing, which is why it is not counted above.

# %%
for task in (tasks[0], *(task for task in tasks if task.seed == seeds[0])):
    if task.control == "commitment" or task == tasks[0]:
        answers = " / ".join(sweep.log_prompt(engine, task, conditions))
        print(f"λ = {task.strength:.3g}, {task.layers}: {answers}")

# %% [markdown]
# ## Report

# %%
engine.close()
cluster.close()
run.finish(rows=[*NAMED_ROWS, *AT_LOG_DOSE], aids=aids, steered=bool(steering))

# %% [markdown]
# ## What this does not show
#
# - A random direction means nothing to the model. That it fails, or succeeds by making one value
#   likely everywhere, says little about a direction that was trained; that is chapter 3.
# - Recall after eviction and agreement between the question forms can rise for a dull reason: the
#   direction may favour one value whatever is asked. The redrawn control excludes what any
#   direction of that length does; it does not exclude a preference of one constant direction.
# - A row that differs from λ = 0 here is one of many looked at. Chapter 2 tests all settings
#   against both λ = 0 and the redrawn control, and corrects for their number.
# - At the log's λ the doses are small in this model. That nothing happens there says nothing about
#   the log; the rows at the log's dose come closer, as far as that derived norm carries.
# - In a model of few layers the named ranges are coarse: a quarter of three layers is one.
# - The offline model is trained where this runs, and on another kind of processor it is another
#   model: the intervals are over items and directions, not over bases.
# - The offline model knows one kind of conversation. The log's claims were about
#   Llama-2-7B-Chat; the profile `full` runs this notebook on it.
