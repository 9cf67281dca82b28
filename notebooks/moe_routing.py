# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # MoE routing: who goes where, and what keeps the experts even?
#
# Question: how does a router score, choose and weigh experts, what does the selection bias do and
# not do, and what do experts end up with? Runtime: about two minutes on a CPU: three runs of a tiny
# model on real text, with and without balancing. Source: spec 2.3, 2.6.

# %%
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from experiments import ablations
from glm45_jax.data.loader import Loader
from glm45_jax.data.prepare import prepare, rows
from glm45_jax.kernels.grouped_matmul import grouped_matmul
from glm45_jax.kernels.routing import combine, permute, route
from glm45_jax.model import transformer
from glm45_jax.train.loss import Weights
from glm45_jax.train.state import init_state
from glm45_jax.train.step import bias_step, descend, gradients

# %% [markdown]
# ## One token
#
# Each expert has a score of its own, sigmoid(logit): scores do not share a total, as a softmax's
# do. The bias is added to *choose* the top k; the *weights* are the scores without it, made to sum
# to one and multiplied by `scale`.

# %%
E, A, scale = 8, 3, 2.5
logits_ME = jax.random.normal(jax.random.key(4), (1, E))
plain_E = jnp.zeros(E)
pushed_E = plain_E.at[jnp.argmin(logits_ME[0])].set(0.6)  # an idle expert is pushed up
figure, panels = plt.subplots(1, 2, figsize=(11, 3), layout="constrained", sharey=True)
for axes, bias_E, name in zip(panels, (plain_E, pushed_E), ("no bias", "a bias"), strict=True):
    sent = route(logits_ME, bias_E, top_k=A, scale=scale)
    score_E = np.asarray(jax.nn.sigmoid(logits_ME[0]))
    chosen = np.asarray(sent.expert_MA[0])
    colours = ["C0" if e in chosen else "#bbbbbb" for e in range(E)]
    axes.bar(range(E), score_E, color=colours, label="score")
    axes.bar(range(E), np.asarray(bias_E), bottom=score_E, color="C1", alpha=0.5, label="bias")
    for expert, gate in zip(chosen, np.asarray(sent.gate_MA[0]), strict=True):
        axes.text(expert, 0.03, f"{gate:.2f}", ha="center", color="white")
    axes.set(title=f"{name}: chosen are blue, with their weights", xlabel="expert")
    np.testing.assert_allclose(sent.gate_MA.sum(), scale, rtol=1e-5)
panels[0].set_ylabel("sigmoid(logit)")
panels[1].legend(frameon=False)
plt.show()

# %% [markdown]
# ## From tokens to rows of experts and back
#
# M tokens with A experts each are R = M · A rows. `order_R` sorts them by expert, one grouped
# product multiplies every row with its own expert's matrix, `combine` weighs and sums. Nothing is
# dropped and nothing is padded to a capacity. It equals the sum one would write down:

# %%
M, D, F = 64, 16, 24
keys = jax.random.split(jax.random.key(1), 3)
x_MD, w_EDF = jax.random.normal(keys[0], (M, D)), jax.random.normal(keys[1], (E, D, F))
sent = route(jax.random.normal(keys[2], (M, E)), plain_E, top_k=A, scale=scale)
y_RF = grouped_matmul(permute(x_MD, sent.order_R), w_EDF, sent.rows_E)
y_MF = combine(y_RF, sent.gate_MA, sent.order_R)
by_hand_MF = jnp.einsum("ma,md,madf->mf", sent.gate_MA, x_MD, w_EDF[sent.expert_MA])
np.testing.assert_allclose(y_MF, by_hand_MF, atol=1e-3)

chosen_ME = np.zeros((M, E))
np.put_along_axis(chosen_ME, np.asarray(sent.expert_MA), np.asarray(sent.gate_MA), axis=1)
figure, (left, right) = plt.subplots(
    1, 2, figsize=(11, 3), layout="constrained", width_ratios=[1, 2]
)
left.imshow(chosen_ME.T, aspect="auto", cmap="Blues", interpolation="nearest")
left.set(title="weight of each expert", xlabel="token", ylabel="expert")
expert_R = np.asarray(sent.expert_MA).reshape(-1)[np.asarray(sent.order_R)]
right.scatter(range(M * A), np.asarray(sent.order_R) // A, c=expert_R, cmap="tab10", s=10)
for edge in np.cumsum(sent.rows_E)[:-1]:
    right.axvline(edge - 0.5, color="#bbbbbb", linewidth=0.8)
right.set(title="rows in the order of experts", xlabel="row r", ylabel="token of the row")
plt.show()

# %% [markdown]
# ## Does the bias even out the experts?
#
# Three runs of the same model on the same text: nothing that balances, the bias rule of GLM-4.5
# (each step, each bias moves by a fixed rate towards the mean load), and a heavy balance loss
# instead. The rate is ten times the paper's, because the run is short.

# %%
base = ablations.tiny()
plan = transformer.specs(base.model)
tx = base.optim.build(plan)
cache = pathlib.Path(tempfile.mkdtemp())
prepared = prepare(base.data, cache)
loader = Loader(
    rows(base.data, prepared),
    seed=0,
    span=lambda step: (step * base.train.rows, base.train.rows),
    fingerprint=prepared.fingerprint,
)
batches = [loader.batch(step) for step in range(120)]


@jax.jit
def train(state, batch, bias_rate, balance_weight):
    weights = Weights(mtp=jnp.float32(0.3), balance=balance_weight)
    grads, out = gradients(state.params, batch, weights, cfg=base.model, packed=False)
    state, stepped = descend(
        state,
        grads,
        out,
        optim=base.optim,
        tx=tx,
        specs=plan,
        tokens=batch.tokens_BT.size,
        bias_rate=bias_rate,
    )
    return state, stepped.replace(scalars=stepped.scalars | {"loss/ce": out.parts["ce"]})


def run(bias_rate, balance_weight):
    state, found = init_state(plan, tx, jax.random.key(0)), []
    for batch in batches:
        state, out = train(state, batch, jnp.float32(bias_rate), jnp.float32(balance_weight))
        found.append(jax.device_get(out))
    return state.params, found


runs = {
    "no balancing": run(0.0, 0.0),
    "bias, rate 0.01": run(1e-2, 0.0),
    "balance loss, weight 0.1": run(0.0, 0.1),
}

# %%
figure, panels = plt.subplots(2, 3, figsize=(12, 4.6), layout="constrained", sharex=True)
for column, (name, (_, found)) in zip(panels.T, runs.items(), strict=True):
    load_SLE = np.stack([out.load_LE for out in found]).astype(float)
    share_SLE = load_SLE / load_SLE.mean(axis=2, keepdims=True)
    for layer, axes in enumerate(column):
        drawn = axes.imshow(
            np.log2(share_SLE[:, layer].T.clip(0.05)), aspect="auto", cmap="RdBu_r", vmin=-2, vmax=2
        )
        axes.set_ylabel(f"MoE layer {layer}: expert")
    column[0].set_title(name)
    column[-1].set_xlabel("step")
figure.colorbar(drawn, ax=panels, label="log2 of load over the mean")
plt.show()

# %% [markdown]
# What it costs is small in so short a run. Loss-free means: the bias has no gradient, so it does
# not pull at the router; a balance loss does.

# %%
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.2), layout="constrained")
for name, (_, found) in runs.items():
    smooth = np.convolve([o.scalars["load_max_over_mean"] for o in found], np.ones(8) / 8, "valid")
    left.plot(smooth, label=name)
    ce = np.convolve([out.scalars["loss/ce"] for out in found], np.ones(8) / 8, "valid")
    middle.plot(ce, label=name)
left.set(title="Busiest expert over the mean, worst layer", xlabel="step", ylim=(1, None))
middle.set(title="Cross-entropy", xlabel="step", ylabel="nats a token")
left.legend(frameon=False)
right.plot([out.bias_LE[0] for out in runs["bias, rate 0.01"][1]], linewidth=1)
right.set(title="Biases of the first MoE layer", xlabel="step")
plt.show()


def worst_at_the_end(name):
    return np.mean([out.scalars["load_max_over_mean"] for out in runs[name][1][-20:]])


for name in runs:
    last = np.mean([out.scalars["loss/ce"] for out in runs[name][1][-20:]])
    print(f"{name:26} busiest over mean {worst_at_the_end(name):.2f}, cross-entropy {last:.3f}")
assert worst_at_the_end("bias, rate 0.01") < worst_at_the_end("no balancing")

# %% [markdown]
# The rule itself is one line: the sign of (mean load - load), times the rate. It does not ask how
# far off an expert is, so at a high rate biases swing around the even point.

# %%
load_LE = jnp.asarray([[30, 10, 10, 14]], jnp.int32)
print("load", load_LE[0], "-> step", bias_step(load_LE, jnp.float32(1e-3))[0])

# %% [markdown]
# ## What an expert gets
#
# The model after its 120 steps reads held-out text. Each column is an expert of the last MoE layer,
# each line one of the most frequent tokens: is it always sent to the same experts? Even (all lines
# alike) would be A/E; a line with A bright places is a token whose experts are fixed.

# %%
params, _ = runs["bias, rate 0.01"]
held_out = rows(base.data, prepared, "val")[1][0]  # Python files
tokens_BT = held_out.take(range(min(64, len(held_out))))["tokens"]
hidden = transformer.forward(params, tokens_BT, cfg=base.model)
layer = base.model.n_moe - 1
logits_ME = hidden.router_logits_LBTE[layer].reshape(-1, base.model.moe.experts)
bias_E = params.moe.ffn.bias_E[layer]
sent = route(logits_ME, bias_E, top_k=base.model.moe.top_k, scale=base.model.moe.scale)
flat_M, expert_MA = tokens_BT.reshape(-1), np.asarray(sent.expert_MA)
common = np.argsort(-np.bincount(flat_M, minlength=base.model.vocab))[:28]
share = np.stack(
    [
        np.bincount(expert_MA[flat_M == t].reshape(-1), minlength=E) / (flat_M == t).sum()
        for t in common
    ]
)
label = [repr(prepared.tokenizer.decode([int(t)])) for t in common]
figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5.2), layout="constrained")
drawn = left.imshow(share, aspect="auto", cmap="viridis", vmin=0, vmax=1)
left.set_yticks(range(len(common)), label, fontsize=8)
left.set(title="Share of a token's visits that go to an expert", xlabel="expert")
figure.colorbar(drawn, ax=left)
both = np.zeros((E, E))
for a in range(A):
    for b in range(A):
        np.add.at(both, (expert_MA[:, a], expert_MA[:, b]), 1)
np.fill_diagonal(both, np.nan)
drawn = right.imshow(both / len(expert_MA), cmap="viridis")
right.set(title="Share of tokens that two experts have in common", xlabel="expert", ylabel="expert")
figure.colorbar(drawn, ax=right)
plt.show()
assert share.sum(axis=1).max() <= A + 1e-6

# %% [markdown]
# Next: rates side by side, `python -m experiments.ablations bias --workdir runs/bias`.
