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
text_source: str = "arianna"  # arianna, self_consistency (offline) or ultrachat (Hub)
tokenizer: str = "project"  # project, or the path of a .model or of GPT-2's vocabulary .gguf
vocabulary: int = 1024  # pieces of the project's tokenizer
embedding: str = "ppmi"  # ppmi, gaussian, a .safetensors with GPT-2's matrix, or a Hub name
ppmi_span: int = 5  # tokens apart at which two tokens still co-occur
corpus_documents: int = 2000  # training dialogues read at most
dialogues: int = 10  # training dialogues; a fifth of them is validation
dialogue_tokens: int = 64  # tokens of each
val_data_source: str = "text_file"  # anything else is refused
context_dim: int = 128  # dimensions of the context
embed_dim: int = 128  # dimensions of the embedding
hidden_dim: int = 256  # must be the sum of the two
num_layers: int = 3  # layers of the block
layernorm_mix: float = 1.0  # 0 no LayerNorm, 1 full
weight_std: float = 0.1  # initial standard deviation of the weights
bias_std: float = 0.01  # and of the biases
diversity_weight: float = 0.9  # Phase 1: w of the parallel variant
seeds: list[int] = [42, 43]  # seeds of network and Phase 2
iterations: int = 5  # Phase 1: passes at most
learning_rate: float = 0.002  # Phase 1: Adam's
clip_norm: float = 1.0  # largest norm of the gradient, both phases
convergence_threshold: float = 0.1  # Phase 1: MSE below which a token has converged
early_stop_fraction: float = 0.95  # Phase 1: share of converged tokens that ends training
early_stop_from: int = 2  # Phase 1: first iteration that may end it
ema_decay: float = 0.99  # Phase 1: of the sequential variant's moving mean
epochs: int = 4  # Phase 2: at most
patience: int = 3  # Phase 2: epochs without a lower validation perplexity
batch_tokens: int = 256  # Phase 2: predictions per optimiser step
phase2_learning_rate: float = 0.001  # Phase 2: Adam's
context_weight: float = 1.0  # v1.0: weight of the MSE to C*
head_std: float = 0.02  # initial standard deviation of the head
window_tokens: int = 4  # tokens in the window that replaces C*
device: str = "cpu"  # cpu or cuda

# %% [markdown]
# ## Stage 1: contexts, once
#
# The networks are those of the chapter before (the same settings find the same checkpoints; without
# them they are trained here). $C^*$ is one sequential pass from the zero context over each text,
# without gradients, and constant from then on.

# %%
from IPython.display import Markdown
import pandas as pd
import torch
from lablog import figures, record
from lablog.cvfp import phase1, phase2, plots, results
from lablog.cvfp.data import prepare
from lablog.cvfp.model import CVFPBlock, ModelConfig
from lablog.cvfp.rollout import rollout
from lablog.determinism import seed_everything

# %%
figures.use_style()
run = record.begin("05_cvfp_phase2", globals())
seed_everything(seeds[0])
shape = ModelConfig(
    context_dim, embed_dim, hidden_dim, num_layers, layernorm_mix, weight_std, bias_std
)
with run.stage("data"):
    data = prepare(
        run.artifacts / "cvfp", shape, text_source=text_source, tokenizer=tokenizer,
        vocabulary=vocabulary, embedding=embedding, window=ppmi_span, seed=seeds[0],
        corpus_documents=corpus_documents, dialogues=dialogues, dialogue_tokens=dialogue_tokens,
        val_data_source=val_data_source, device=device,
    )  # fmt: skip
T, first = data.tokens["training"], seeds[0]

# %%
def phase1_network(seed: int) -> CVFPBlock:
    config = phase1.Phase1Config("parallel", diversity_weight, iterations, learning_rate, clip_norm,
                                 convergence_threshold, early_stop_fraction, early_stop_from,
                                 ema_decay, seed)  # fmt: skip
    block = CVFPBlock(shape, seed).to(device)
    path = phase1.checkpoint_path(run.artifacts / "cvfp", block, T, config)
    phase1.train(block, T, config, path, progress=True)
    return block


# %%
def contexts_of(block: CVFPBlock) -> dict[str, torch.Tensor]:
    return {name: rollout(block, tokens).contexts for name, tokens in data.tokens.items()}


with run.stage("networks"):
    blocks = {seed: phase1_network(seed) for seed in seeds}
with run.stage("contexts"):
    fixed = {seed: contexts_of(block) for seed, block in blocks.items()}
    bare = CVFPBlock(shape, first).to(device)
    bare_contexts = contexts_of(bare)

# %% [markdown]
# ## Stage 2: prediction
#
# The block reads $[C^*_{i-1}, e_i]$ and its context output is thrown away; logits come from
# $[C^*_i, \mathrm{token}_i]$ by a linear head. No gradient can reach $C^*$ or the context output,
# so the block learns through the token output alone (a test asserts zeros). In v1.0 the head reads
# the block's own context output instead, and an MSE pulls that towards $C^*_i$.
#
# Each **arm** below is trained in the same way, with early stopping on validation:
#
# - `v2.0`, `v1.0`: contexts of Phase 1, fixed or soft;
# - `zeros`: $C^* = 0$, nothing but the current token;
# - `shuffled`: $C^*$ of other positions of the same text, the same numbers without their place;
# - `untrained`: $C^*$ of the network before Phase 1, which also starts the block;
# - `window`: the last tokens' principal components, as many numbers as a context.
#
# Three texts are read. **Training**: what is fitted. **Validation**, as the log specifies it: the
# last fifth *of the training text*, so low numbers there are memory. **Test**: dialogues that
# occur in neither; only this one says something about new text.

# %%
def arm(seed: int, name: str, contexts: dict, block: CVFPBlock, version: str = "v2.0"):
    config = phase2.Phase2Config(version, epochs, patience, batch_tokens, phase2_learning_rate,
                                 clip_norm, context_weight, head_std, seed)  # fmt: skip
    texts = {k: phase2.FixedText(data.ids[k], data.tokens[k], contexts[k]) for k in contexts}
    with run.stage(f"phase 2 {name} seed {seed}"):
        found = phase2.train_phase2(block, data.vocabulary, texts["training"],
                                    texts["validation"], config, name, True)  # fmt: skip
    return found, {k: phase2.predict(found.model, texts[k]) for k in ("validation", "test")}


# %%
def permuted(x: torch.Tensor) -> torch.Tensor:
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(first))
    return x[order.to(x.device)]


table = data.embedding.table
replaced = {
    "zeros": {k: torch.zeros_like(c) for k, c in fixed[first].items()},
    "shuffled": {k: permuted(c) for k, c in fixed[first].items()},
    "window": {k: phase2.window_contexts(table, i, context_dim, window_tokens)
               for k, i in data.ids.items()},
}  # fmt: skip

# %%
arms = {}
for seed in seeds:
    arms["v2.0", seed] = arm(seed, "v2.0", fixed[seed], blocks[seed])
    arms["zeros", seed] = arm(seed, "zeros", replaced["zeros"], blocks[seed])
arms["v1.0", first] = arm(first, "v1.0", fixed[first], blocks[first], "v1.0")
arms["untrained", first] = arm(first, "untrained", bare_contexts, bare)
for name in ("shuffled", "window"):
    arms[name, first] = arm(first, name, replaced[name], blocks[first])

# %% [markdown]
# Two baselines need no network: the frequency of each token, and bigrams with Witten-Bell
# smoothing, which has no parameter to tune. Intervals are bootstrapped over dialogues; they say
# how the perplexity would vary with other dialogues of the same kind, not with another seed.

# %%
ids = {k: i.tolist() for k, i in data.ids.items()}
rows = []
for (name, seed), (found, seen) in arms.items():
    key = name if seed == first else f"{name}.seed{seed}"
    rows.append(results.record_predictions(run, key, seen, dialogue_tokens, found))
for name, model in (("unigram", phase2.unigram), ("bigram", phase2.bigram)):
    seen = {k: model(ids["training"], ids[k], data.vocabulary) for k in ("validation", "test")}
    arms[name, first] = (None, seen)
    rows.append(results.record_predictions(run, name, seen, dialogue_tokens))
pd.DataFrame(rows).set_index("arm").round(3)

# %%
curves = pd.DataFrame([
    {"arm": name, "epoch": e.epoch, "training": e.train_perplexity,
     "validation": e.validation_perplexity}
    for (name, seed), (found, _) in arms.items() if found and seed == first for e in found.history
])  # fmt: skip
levels = {n: arms[n, first][1]["validation"].perplexity for n in ("unigram", "bigram")}
run.figure("perplexity", *plots.perplexity(curves, levels),
           "Perplexity per epoch, first seed. Training as met during the epoch; validation, which "
           "lies inside the training text, after it. Dotted: n-grams on validation.")  # fmt: skip

# %% [markdown]
# ## On new text
#
# The question of the chapter is a comparison on the same tokens, so the interval that matters is
# that of the *difference* of log-likelihoods, arm by arm against v2.0, resampled over dialogues.
# A ratio above 1 means that the arm is worse than v2.0.

# %%
names = [name for name, seed in arms if seed == first]
found = {name: run.record().metric(f"{name}.test.perplexity") for name in names}
points = pd.DataFrame([
    {"arm": name, "value": m.value, "low": m.interval[0], "high": m.interval[1]}
    for name, m in found.items()
])  # fmt: skip
run.figure("test", *plots.intervals(points),
           "Perplexity on disjoint test dialogues, first seed, bootstrap intervals.")  # fmt: skip

# %%
ours, ratios = arms["v2.0", first][1], []
for name in names[1:]:
    for split in ("validation", "test"):
        other = arms[name, first][1][split]
        row = results.record_ratio(run, f"{name}.over_v2.0.{split}", other, ours[split],
                                   dialogue_tokens)  # fmt: skip
        ratios.append({"arm": name, "text": split} | row)
pd.DataFrame(ratios).set_index(["arm", "text"]).round(3)

# %%
for name in ("v2.0", "zeros"):
    for split in ("validation", "test"):
        values = [arms[name, s][1][split].perplexity for s in seeds]
        results.record_mean(run, f"{name}.seeds.{split}.perplexity", values, "", seeds, log=True)
test = {r["arm"]: r for r in ratios if r["text"] == "test"}
better = [n for n, r in test.items() if r["low"] > 1]
worse = [n for n, r in test.items() if r["high"] < 1]
Markdown("On disjoint text, v2.0 has the lower perplexity, with the whole interval, than: "
         f"{', '.join(better) or 'no arm'} ({len(better)} of {len(test)}); the higher one than: "
         f"{', '.join(worse) or 'no arm'} ({len(worse)} of {len(test)}).")  # fmt: skip

# %% [markdown]
# ## Report

# %%
run.finish(results.phase2_report(names))

# %% [markdown]
# ## What this does not show
#
# - The head sees a vocabulary of a few thousand pieces, not GPT-2's 50,257; perplexities cannot be
#   compared with the log's across vocabularies.
# - Early stopping looks at validation, which lies inside the training text. It therefore stops
#   late with respect to new text, in all arms alike.
# - Six thousand tokens are little. On so short a text every network here memorises; the arms differ
#   in what they memorise with.
# - v1.0 is given $C^*_{i-1}$ as input on every text, as in training. Left to its own contexts it
#   could drift.
