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
# # A rollout: what does the engine hand to the trainer, and what may change under way?
#
# Question: are the engine's log-probs those that the policy gradient recomputes, what do groups
# share, what does the MTP layer save, and which weights drew which token? Runtime: about a minute
# on a CPU, with `tiny()` and random weights, of which MTP shares embedding and head.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from glm45_jax import params as params_lib
from glm45_jax.model import config, transformer
from glm45_jax.rollout import weights
from glm45_jax.rollout.driver import Driver
from glm45_jax.rollout.engine import GlmEngine
from glm45_jax.rollout.sampling import Sampling

cfg = config.tiny()


def random_weights(seed):
    drawn = params_lib.init(transformer.specs(cfg), jax.random.key(seed))
    return jax.tree.map(lambda w: w * 4 if w.ndim > 2 else w, drawn)  # logits that differ


params = random_weights(0)
engine = GlmEngine(cfg, slots=8, pages=256, page=8, max_tokens=128, buckets=(16, 64))
prompt = np.random.default_rng(0).integers(0, cfg.vocab, 40).tolist()

# %% [markdown]
# ## A group of samples
#
# Eight samples of one prompt: one prefill, full pages shared, seeds of their own.

# %%
driver = Driver(engine, params)
group = [
    driver.submit(prompt, Sampling(temperature=0.8, max_tokens=48, seed=seed)) for seed in range(8)
]
driver.run()
stats = driver.stats
print(f"prompt tokens read {stats.prefill_tokens}, taken over from another {stats.shared_tokens}")

# %% [markdown]
# ## The engine's log-probs are the trainer's
#
# One forward pass over prompt and output, softmax at the sampling temperature: the difference is
# that of float32 sums in another order.


# %%
@jax.jit
def logp_of(params, tokens_1T):
    hidden = transformer.forward(params, tokens_1T, cfg=cfg)
    logits_TV = transformer.logits(params, hidden, cfg=cfg)[0, :-1] / 0.8
    of_next_TV = jax.nn.log_softmax(logits_TV)
    return jnp.take_along_axis(of_next_TV, tokens_1T[0, 1:, None], axis=1)[:, 0]


far = []
for request in group:
    row = np.asarray([prompt + request.completion.tokens_T.tolist()], np.int32)
    far.append(np.abs(logp_of(params, row)[len(prompt) - 1 :] - request.completion.logp_T).max())
print(f"largest difference of a log-prob: {max(far):.1e}")

# %% [markdown]
# ## Drafts change the steps, not the tokens
#
# A draft is believed where it is the token that the model draws by its own noise, so the output is
# the same with 0 to 3 drafts. How many steps that saves is up to the MTP layer; this one is random.

# %%
ask = Sampling(temperature=0.3, max_tokens=64, seed=3)
taken, outputs = [], []
for draft in range(4):
    drafting = GlmEngine(cfg, slots=1, pages=32, page=8, max_tokens=128, buckets=(64,), draft=draft)
    one = Driver(drafting, params)
    request = one.submit(prompt, ask)
    one.run()
    outputs.append(request.completion.tokens_T.tolist())
    taken.append(one.stats.decode_steps)
assert all(out == outputs[0] for out in outputs)
print("decode steps for 64 tokens with 0, 1, 2, 3 drafts:", taken)

# %% [markdown]
# ## Weights that change under way
#
# A push is prepared, carried and checked while the rows go on, and published between two steps.
# Each token says which version drew it. `in_flight` keeps the keys of the old weights,
# `abort_and_resume` makes them anew, `drain` waits.

# %%
policies = ("in_flight", "abort_and_resume", "drain")
fig, axes = plt.subplots(1, 3, figsize=(11, 3), sharey=True)
for policy, ax in zip(policies, axes, strict=True):
    driver = Driver(engine, weights.stage(weights.prepare(params, 0, cfg=cfg)).params)
    rows = [
        driver.submit(prompt, Sampling(max_tokens=16 + 8 * seed, seed=seed)) for seed in range(6)
    ]
    for version in (1, 2):
        for _ in range(14):
            driver.tick()
        weights.push(driver, random_weights(version), version, cfg=cfg, how=weights.Push(policy))
    driver.run()
    for at, row in enumerate(rows):
        versions = np.asarray(row.completion.versions)
        assert (np.diff(versions) >= 0).all()
        ax.scatter(np.arange(len(versions)), np.full(len(versions), at), c=versions, vmin=0, vmax=2)
    ax.set(title=policy, xlabel="token of the output")
axes[0].set_ylabel("request")
fig.suptitle("version of the weights that drew each token (dark: 0, bright: 2)")
fig.tight_layout()
plt.show()
