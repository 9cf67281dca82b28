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
# # A tour: what is a GLM-4.5, and what does one step do to it?
#
# Question: which parts does the model have, what do they cost, and what moves in a training step?
# Runtime: about a minute on a CPU, with `tiny()`.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from glm45_jax import params as params_lib
from glm45_jax.data.types import Batch
from glm45_jax.model import config, cost, mtp, transformer
from glm45_jax.optim.muon import Muon
from glm45_jax.optim.schedules import Constant
from glm45_jax.sharding import MeshShape
from glm45_jax.train.parallel import Recipe, make_trainer
from glm45_jax.train.state import Train

# %% [markdown]
# ## One plan of every weight
#
# A model is a tree of `ParamSpec`. Its leaves say shape, logical axes and *kind*: "matrix" goes to
# Muon, "embed", "norm" and "bias" to AdamW, "state" (the router's selection bias) moves by rule.

# %%
cfg = config.tiny()
plan = transformer.specs(cfg)
for path, spec in params_lib.leaves_with_path(plan):
    print(f"{path:34} {spec.shape!s:22} {spec.kind}")

# %% [markdown]
# The same plan, at full size, gives the paper's numbers without allocating anything.

# %%
for name in ("glm45", "glm45_air"):
    big = getattr(config, name)()
    counts, flops = cost.param_counts(big), cost.flops_per_token(big, 4096)
    print(
        f"{name:10} body + MTP {counts.body_and_mtp / 1e9:.2f}B, "
        f"active {counts.active_body / 1e9:.2f}B, "
        f"{flops.total / 1e9:.0f} GFLOPs a token in training"
    )

# %% [markdown]
# ## Forward: hidden states, router load, and a second guess
#
# `forward` returns hidden states after the final norm and what the router did; the MTP layer reads
# them and guesses the token after the next.

# %%
params = params_lib.init(plan, jax.random.key(0))
tokens = jax.random.randint(jax.random.key(1), (2, 24), 0, cfg.vocab)
hidden = transformer.forward(params, tokens, cfg=cfg)
ahead = mtp.forward(params, hidden.hidden_BTD, tokens, cfg=cfg)
print("logits", transformer.logits(params, hidden, cfg=cfg).shape, "MTP", ahead.shape)
print("tokens each expert took, by layer:\n", np.asarray(hidden.load_LE))

# %% [markdown]
# ## What a step does
#
# The batch below repeats one pattern, so the model can learn it. Watch the loss fall, and the bias
# push tokens from busy experts to idle ones: after each step it moves by a fixed rate toward the
# mean load, without any gradient.

# %%
rows, T = 16, 32
text = np.tile(np.arange(rows * (T + 1)) % 7, 1).reshape(rows, T + 1).astype(np.int32)
ones = np.ones((rows, T), np.int32)
places = np.tile(np.arange(T, dtype=np.int32), (rows, 1))
batch = Batch(text[:, :-1], text[:, 1:], ones, places, ones.astype(np.float32))

recipe = Recipe(
    cfg,
    Muon(lr=5e-3, schedule=Constant(1.0), dtype="float32"),
    Train(steps=30, rows=rows, mtp_weight=Constant(0.3), bias_rate=Constant(2e-2)),
    packed=False,
)
trainer = make_trainer(MeshShape(), recipe)
state = trainer.init(jax.random.key(0))
history = []
for _ in range(30):
    state, out = trainer.step(state, batch)
    history.append(jax.device_get(out))

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
for name in ("loss/ce", "loss/mtp"):
    left.plot([out.scalars[name] for out in history], label=name)
left.set(title="Loss", xlabel="step", ylabel="nats a token")
left.legend(frameon=False)
right.plot([out.scalars["load_max_over_mean"] for out in history])
right.set(title="Busiest expert over the mean", xlabel="step")
plt.show()
assert history[-1].scalars["loss/ce"] < 0.5 * history[0].scalars["loss/ce"]

# %% [markdown]
# Next: change `cfg` or `recipe` above and run again, or copy an experiment from
# `experiments/pretrain.py`.

# %%
print(float(jnp.abs(state.params.moe.ffn.bias_E).mean()))
