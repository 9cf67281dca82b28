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
# # Muon: what does it do to a matrix?
#
# Question: what does an update look like beside Adam's, what do five Newton-Schulz steps do, why
# the factor 0.2 · sqrt(larger side), and what does it cost? Runtime: about a minute on a CPU, with
# `tiny()`. GLM-4.5 trains matrices with Muon, everything else with AdamW (spec 2.7).

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from glm45_jax import params as params_lib
from glm45_jax.data.types import Batch
from glm45_jax.model import config, cost, transformer
from glm45_jax.optim.mixed import adamw
from glm45_jax.optim.muon import QUINTIC, muon, newton_schulz
from glm45_jax.train.loss import Weights
from glm45_jax.train.step import gradients, update_rms

# %% [markdown]
# ## A gradient has few directions
#
# The gradient of one batch: a few directions carry almost all of it, and a step along it moves the
# weights in those alone. Adam rescales entries, which helps some; Muon rescales *directions*.

# %%
cfg = config.tiny()
plan = transformer.specs(cfg)
params = params_lib.init(plan, jax.random.key(0))
rows, T = 16, 64
ones = np.ones((rows, T), np.int32)
places = np.tile(np.arange(T, dtype=np.int32), (rows, 1))


def text_batch(seed):
    drawn = np.random.default_rng(seed).zipf(1.4, (rows, T + 1)).clip(0, cfg.vocab - 1)
    text = drawn.astype(np.int32)
    return Batch(text[:, :-1], text[:, 1:], ones, places, ones.astype(np.float32))


weights = Weights(jnp.float32(0.3), jnp.float32(1e-4))
grads, _ = jax.jit(lambda p, b: gradients(p, b, weights, cfg=cfg, packed=False))(
    params, text_batch(0)
)


def one_update(tx):
    return jax.jit(lambda g, p: tx.update(g, tx.init(p), p)[0])(grads, params)


by_muon = one_update(muon(1.0, specs=plan, weight_decay=0.0))
by_adam = one_update(adamw(1.0, specs=plan, weight_decay=0.0))

# %%
chosen = {
    "query projection": lambda p: p.dense.mixer.q_DNH[0].reshape(cfg.d_model, -1),
    "one expert's up": lambda p: p.moe.ffn.up_EDF[0, 3],
    "head": lambda p: p.head_DV,
}
figure, panels = plt.subplots(1, 3, figsize=(12, 3.2), layout="constrained")
for axes, (name, of) in zip(panels, chosen.items(), strict=True):
    for label, tree in (("gradient", grads), ("Adam", by_adam), ("Muon", by_muon)):
        values = np.linalg.svd(np.asarray(of(tree)), compute_uv=False)
        axes.plot(values / values[0], label=label)
    shape = of(grads).shape
    axes.set(title=f"{name} {shape[0]} × {shape[1]}", xlabel="direction", ylim=(1e-5, 2))
    axes.set_yscale("log")
panels[0].set_ylabel("singular value over the largest")
panels[0].legend(frameon=False)
plt.show()

# %% [markdown]
# ## Five steps of one polynomial
#
# X, divided by its Frobenius norm, goes through X ← aX + b(XXᵀ)X + c(XXᵀ)²X. Singular vectors stay,
# each singular value goes through a·s + b·s³ + c·s⁵. The numbers do not converge to 1: they are
# chosen to lift small values as fast as can be, and to leave the others between 0.7 and 1.2.

# %%
a, b, c = QUINTIC
s = np.geomspace(1e-4, 1, 400)
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.4), layout="constrained")
through = s.copy()
for step in range(6):
    left.plot(s, through, color=plt.get_cmap("viridis")(step / 5), label=f"{step} steps")
    through = a * through + b * through**3 + c * through**5
left.axhspan(0.7, 1.2, color="#e8e8e8", zorder=0)
left.set(xscale="log", title="What becomes of a singular value", xlabel="before", ylabel="after")
left.legend(frameon=False, fontsize=8)
matrix = jax.random.normal(jax.random.key(1), (64, 96))
for step in (1, 2, 3, 5, 8):
    done = newton_schulz(matrix, steps=step, dtype=jnp.float32)
    right.plot(np.linalg.svd(np.asarray(done), compute_uv=False), label=f"{step} steps")
right.axhline(1, color="#999999", linewidth=0.8)
right.set(title="A random 64 × 96 matrix", xlabel="direction", ylabel="singular value")
right.legend(frameon=False, fontsize=8)
plt.show()
values = np.linalg.svd(np.asarray(newton_schulz(matrix, dtype=jnp.float32)), compute_uv=False)
assert 0.5 < values.min() < values.max() < 1.3

# %% [markdown]
# It is a function of directions alone: the scale of the gradient does not matter, the transpose
# gives the transpose, and turning the space first or after is the same. In bfloat16 the steps are
# rough, and it does not matter, since 5 steps do not converge anyway.

# %%
turn, _ = jnp.linalg.qr(jax.random.normal(jax.random.key(2), (64, 64)))


def distance(x, y):
    return float(jnp.linalg.norm(x - y) / jnp.linalg.norm(y))


exact = newton_schulz(matrix, dtype=jnp.float32)
print("1000 times the gradient:", distance(newton_schulz(1000 * matrix, dtype=jnp.float32), exact))
print("the transpose:          ", distance(newton_schulz(matrix.T, dtype=jnp.float32).T, exact))
print(
    "turned before, after:   ",
    distance(newton_schulz(turn @ matrix, dtype=jnp.float32), turn @ exact),
)
print("in bfloat16:            ", distance(newton_schulz(matrix).astype(jnp.float32), exact))
assert distance(newton_schulz(turn @ matrix, dtype=jnp.float32), turn @ exact) < 1e-3

# %% [markdown]
# ## Why 0.2 · sqrt(larger side)
#
# An orthogonal m × n matrix has entries of root mean square 1/sqrt(larger side): without a factor,
# a wide matrix would move less than a narrow one. With it every matrix moves by about 0.2 a step at
# a rate of one. That is what AdamW's updates come to, as the last plot shows, so that both share
# one schedule.

# %%
sides = [(16, 16), (64, 64), (64, 256), (256, 64), (32, 1024), (512, 512)]
raw, scaled = [], []
for m, n in sides:
    done = newton_schulz(jax.random.normal(jax.random.key(3), (m, n)), dtype=jnp.float32)
    raw.append(float(jnp.sqrt(jnp.mean(jnp.square(done)))))
    scaled.append(0.2 * np.sqrt(max(m, n)) * raw[-1])
figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
x = np.arange(len(sides))
axes.bar(x - 0.2, raw, 0.4, label="orthogonal")
axes.bar(x + 0.2, scaled, 0.4, label="times 0.2 · sqrt(larger side)")
axes.axhline(0.2, color="#999999", linewidth=0.8)
axes.set_xticks(x, [f"{m} × {n}" for m, n in sides])
axes.set(ylabel="root mean square of entries", title="Size of an update")
axes.legend(frameon=False)
plt.show()
print(
    "whole model, by kind:", {k: round(float(v), 3) for k, v in update_rms(by_muon, plan).items()}
)

# %% [markdown]
# ## Every expert is a matrix of its own
#
# The plan says how a weight reads as matrices: a stack [layers, experts, D, F] is layers × experts
# problems, a query projection [layers, D, heads, width] is one a layer. Splitting heads into
# problems of their own, or joining experts into one, would be other optimizers.

# %%
for path, spec in params_lib.leaves_with_path(plan):
    if spec.kind == "matrix" and path.startswith(("moe.", "head")):
        count, m, n = spec.matrix_shape
        print(f"{path:26} {spec.shape!s:20} {count:3} problems of {m} × {n}")

# %% [markdown]
# ## What it costs
#
# Five steps of three products over the shorter side: 5 · (4·m²·n + 2·m³) FLOPs for m ≤ n, once a
# step however many tokens the batch has. At the paper's batch of 64M tokens it is nothing; at small
# batches it is not, which is where the sharded version matters.


# %%
def newton_schulz_flops(spec):
    count, m, n = spec.matrix_shape
    m, n = min(m, n), max(m, n)
    return count * 5 * (4 * m * m * n + 2 * m**3)


batches = np.geomspace(2**14, 2**26, 13)
figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
for name in ("glm45", "glm45_air", "mini"):
    big = getattr(config, name)()
    specs = [
        s for _, s in params_lib.leaves_with_path(transformer.specs(big)) if s.kind == "matrix"
    ]
    optimizer = sum(map(newton_schulz_flops, specs))
    token = cost.flops_per_token(big, 4096).total
    axes.plot(batches, 100 * optimizer / (token * batches), label=name)
    print(
        f"{name:10} {optimizer / 1e15:9.3f} PFLOPs a step, "
        f"{100 * optimizer / (token * 2**26):.3f}% of a step of 64M tokens"
    )
axes.set(xscale="log", yscale="log", xlabel="tokens of a batch", ylabel="percent of the step")
axes.set_title("FLOPs of Newton-Schulz")
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# ## One rate for both
#
# The root mean square of the matrices' updates at a rate of one, over 60 steps of new text each.
# Adam's first update has entries of ±1, since it divides a gradient by itself; for gradients that
# are all noise it comes to sqrt((1 - b1) / (1 + b1)) = 0.23, and below while gradients shrink.
# Muon's has one size from the first step on.


# %%
def sizes_of(tx, steps=60):
    @jax.jit
    def step(params, state, batch):
        grads, _ = gradients(params, batch, weights, cfg=cfg, packed=False)
        updates, state = tx.update(grads, state, params)
        moved = jax.tree.map(lambda w, u: w + 2e-3 * u, params, updates)
        return moved, state, update_rms(updates, plan)["matrix"]

    now, state, sizes = params, tx.init(params), []
    for seed in range(steps):
        now, state, size = step(now, state, text_batch(seed))
        sizes.append(float(size))
    return sizes


sizes = {
    "Muon": sizes_of(muon(1.0, specs=plan, weight_decay=0.0)),
    "AdamW": sizes_of(adamw(1.0, specs=plan, weight_decay=0.0)),
}
figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
for name, values in sizes.items():
    axes.plot(values, label=name)
axes.axhline(0.2, color="#999999", linewidth=0.8)
axes.set(xlabel="step", ylabel="root mean square", title="Updates of matrices", ylim=(0, None))
axes.legend(frameon=False)
plt.show()
assert max(sizes["Muon"]) < 1.2 * min(sizes["Muon"]) and sizes["AdamW"][-1] < 0.5

# %% [markdown]
# Whether Muon learns more from the same tokens is another question: `notebooks/ablation.py`.
