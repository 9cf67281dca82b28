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
# # RL: from rewards of a group to a step of the policy, and what stale samples do to it
#
# Question: which tokens move, in which direction and by how much; and what do corrections put right
# where the engine's weights are not those that are trained? Runtime: about a minute on a CPU, with
# a model of 0.1M random parameters. It learns to write digits, whatever it is asked: a reward that
# every sample has some of, so that a few batches show everything. Nothing here is reasoning;
# `experiments/quickstart.py` has a cold start and sums.

# %%
import dataclasses

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from glm45_jax import params as params_lib
from glm45_jax.envs.types import Env, Part, Task
from glm45_jax.model import config, transformer
from glm45_jax.optim.mixed import AdamW
from glm45_jax.optim.schedules import Constant
from glm45_jax.rl.advantage import Centred, LeaveOneOut, Normalised, group_advantage
from glm45_jax.rl.batch import choose, pack
from glm45_jax.rl.correction import IcePop, SequenceBand, Tis
from glm45_jax.rl.lease import Prompt
from glm45_jax.rl.objective import Cispo, Clip, Tokens
from glm45_jax.rl.update import make_updater
from glm45_jax.rl.workers import Job, seed_of, trajectory_of
from glm45_jax.rollout import weights
from glm45_jax.rollout.driver import Driver
from glm45_jax.rollout.engine import GlmEngine
from glm45_jax.rollout.episode import Episodes, Format
from glm45_jax.rollout.sampling import Sampling
from glm45_jax.tokenizer import END_OF_TEXT, train_bpe
from glm45_jax.train.parallel import Pmap

# %% [markdown]
# ## Advantages
#
# Within a group, reward minus the group's mean. Division by the deviation makes the one right
# answer of a hard prompt, or the one wrong answer of an easy one, weigh more than those of a prompt
# that is half solved. A group that agrees teaches nothing, by any rule.

# %%
passes = np.arange(9)
reward_CJ = (np.arange(8)[None] < passes[:, None]).astype(float)
fig, axes = plt.subplots(1, 2, figsize=(10, 3), sharey=True)
for rule in (Centred(), LeaveOneOut(), Normalised()):
    advantage_CJ = group_advantage(reward_CJ, rule)
    assert not advantage_CJ[[0, 8]].any()
    name = type(rule).__name__
    axes[0].plot(passes[1:], advantage_CJ[1:, 0], "o-", label=name)
    axes[1].plot(passes[:-1], advantage_CJ[:-1, -1], "o-", label=name)
axes[0].set(title="of a right sample", xlabel="right samples of 8", ylabel="advantage")
axes[1].set(title="of a wrong sample", xlabel="right samples of 8")
axes[1].legend()
fig.tight_layout()
plt.show()

# %% [markdown]
# ## The clip
#
# What a token pulls with (minus the derivative of its cost by its log-prob), by the ratio of policy
# to old policy. PPO's clip lets go of a token that has gone far enough the right way; clip-higher
# (1.28 against 0.8) lets rare tokens go further up than down. CISPO clips the weight and never lets
# go.

# %%
ratio_1T = jnp.linspace(0.4, 2.0, 321)[None]
ones_1T = jnp.ones_like(ratio_1T)


def pull(objective, advantage):
    def cost(logp_1T):
        t = Tokens(
            logp_BT=logp_1T,
            old_logp_BT=0 * ones_1T,
            engine_logp_BT=0 * ones_1T,
            advantage_BT=advantage * ones_1T,
            weight_BT=ones_1T,
            segments_BT=jnp.ones(ratio_1T.shape, jnp.int32),
        )
        return objective.token_loss(t)[0].sum()

    return -jax.grad(cost)(jnp.log(ratio_1T))[0]


fig, axes = plt.subplots(1, 2, figsize=(10, 3), sharex=True)
for ax, advantage in zip(axes, (1.0, -1.0), strict=True):
    for objective in (Clip(), Clip(dual=1.5), Cispo()):
        label = f"{type(objective).__name__}, dual" if objective == Clip(dual=1.5) else None
        ax.plot(
            ratio_1T[0],
            pull(objective, advantage),
            label=label or type(objective).__name__,
            alpha=0.7,
        )
    ax.set(title=f"advantage {advantage:+g}", xlabel="ratio", ylabel="pull")
axes[0].legend()
fig.tight_layout()
plt.show()

# %% [markdown]
# ## Samples, and rows of them
#
# The engine draws groups of 8; each token comes with its log-prob and the version of the weights.
# Trajectories are packed whole into rows. A place is about the token that it predicts: what the
# policy did not write has weight 0, and its gradient is exactly 0.

# %%
tokenizer = train_bpe(["a few words"], 292)
cfg = dataclasses.replace(config.tiny(vocab=292), d_model=48, n_moe=1, n_mtp=0)
first = params_lib.init(transformer.specs(cfg), jax.random.key(0))
OUT, GROUPS, SAMPLES = 8, 8, 8


def digits(task, messages):
    """The share of digits in the longest answer."""
    del task
    return sum(c in "0123456789" for c in messages[-1].get("content") or "") / OUT


env = Env("digits", lambda n: Task(f"digits/{n}", f"{n}?", None), (Part("digits", digits),))
engine = GlmEngine(cfg, slots=32, pages=256, page=8, max_tokens=32, buckets=(16,))


def rollouts(driver, batch):
    """Trajectories of one batch of prompts."""
    episodes, jobs, found = Episodes(driver, Format(tokenizer, thinking=False)), {}, []
    for number in range(batch * GROUPS, (batch + 1) * GROUPS):
        for sample in range(SAMPLES):
            key = f"digits/{number}"
            sampling = Sampling(max_tokens=OUT, seed=seed_of(0, key, sample))
            job = Job(key, Prompt("digits", number, SAMPLES, key), sample, sampling)
            jobs[job.name] = job
            episodes.start(job.name, env, env.tasks(number), sampling)
    while episodes.running:
        found += [trajectory_of(episode, jobs[name]) for name, episode in episodes.tick()]
    return sorted(found, key=lambda one: one.group)


def packed(trajectories):
    """Rows of the groups that differ; 24 rows hold every batch."""
    chosen = choose(trajectories)
    return pack(
        chosen.trajectories,
        chosen.advantage_N,
        seq_len=64,
        pad_id=tokenizer.id_of(END_OF_TEXT),
        multiple=24,
    )


drawn = rollouts(Driver(engine, first), 0)
rows = packed(drawn)
fig, axes = plt.subplots(1, 3, figsize=(12, 3), sharey=True)
shown = (
    ("segment (0: padding)", rows.batch.segments_BT, "viridis"),
    ("counts", rows.weight_BT, "Greys"),
    ("advantage", rows.advantage_BT, "RdBu_r"),
)
for ax, (title, array_BT, cmap) in zip(axes, shown, strict=True):
    most = np.abs(array_BT).max()
    low = -most if title == "advantage" else 0
    image = ax.imshow(array_BT, aspect="auto", cmap=cmap, vmin=low, vmax=most)
    ax.set(title=title, xlabel="place")
    fig.colorbar(image, ax=ax)
axes[0].set_ylabel("row")
fig.tight_layout()
plt.show()

# %% [markdown]
# ## GRPO
#
# A batch: draw, choose, pack, score by the trainer, step, push. On the same weights engine and
# trainer agree; the loop in `glm45_jax/rl/loop.py` ends a run where they do not.

# %%
optim = AdamW(lr=3e-3, schedule=Constant(), weight_decay=0.0)
updater = make_updater(cfg, optim, where=Pmap(1))
state, driver = updater.init(first), Driver(engine, first)
rewards, gaps, entropies, policies = [], [], [], [jax.tree.map(np.asarray, first)]
for batch in range(24):
    samples = rollouts(driver, batch)
    rows = packed(samples)
    old_BT = np.asarray(updater.logp(state.params, rows))
    counts_BT = rows.weight_BT > 0
    gaps.append(np.abs(old_BT - rows.logp_BT)[counts_BT].max())
    state, out = updater.step(state, rows.replace(old_logp_BT=old_BT))
    policies.append(jax.tree.map(np.asarray, updater.params(state)))
    weights.push(driver, policies[-1], batch + 1, cfg=cfg)
    rewards.append([one.reward for one in samples])
    entropies.append(float(out.scalars["policy/entropy"]))
assert max(gaps) < 1e-3, max(gaps)
print(f"largest difference of a log-prob between engine and trainer: {max(gaps):.1e}")
print("before:", [one.messages[-1].get("content") for one in drawn[:3]])
print("after: ", [one.messages[-1].get("content") for one in samples[:3]])

# %%
reward_SN = np.array(rewards)
fig, axes = plt.subplots(1, 2, figsize=(10, 3))
axes[0].plot(reward_SN.mean(axis=1))
axes[0].fill_between(range(len(rewards)), *np.quantile(reward_SN, (0.1, 0.9), axis=1), alpha=0.2)
axes[0].set(title="share of digits: mean, and 8 of 10 samples", xlabel="batch", ylabel="reward")
axes[1].plot(entropies)
axes[1].set(title="entropy, from the drawn tokens", xlabel="batch", ylabel="nats a token")
fig.tight_layout()
plt.show()
assert reward_SN[-3:].mean() > reward_SN[:3].mean() + 0.2

# %% [markdown]
# ## Stale samples
#
# The first weights have drawn a batch; what if later weights train on it? The importance weights
# old / engine spread, and the effective number of tokens, (sum w)^2 / sum w^2, falls. TIS truncates
# the weights, IcePop drops tokens outside of a band, the sequence band drops whole samples by their
# geometric mean.

# %%
rows = packed(drawn)
counts_BT = rows.weight_BT > 0
corrections = {
    "TIS, 0 to 2": Tis(),
    "IcePop, 0.5 to 2": IcePop(0.5, 2.0),
    "sequence band, 0.9 to 1.1": SequenceBand(0.9, 1.1),
}
lags = (0, 1, 2, 4, 8, 16, 24)
effective, kept = [], {name: [] for name in corrections}
fig, axes = plt.subplots(1, 3, figsize=(13, 3.2))
for lag in lags:
    old_BT = np.asarray(updater.logp(updater.place(policies[lag]), rows))
    t = Tokens(
        logp_BT=old_BT,
        old_logp_BT=old_BT,
        engine_logp_BT=rows.logp_BT,
        advantage_BT=rows.advantage_BT,
        weight_BT=rows.weight_BT,
        segments_BT=rows.batch.segments_BT,
    )
    w_M = np.exp((old_BT - rows.logp_BT)[counts_BT].astype(np.float64))
    effective.append(w_M.sum() ** 2 / (w_M**2).sum() / w_M.size)
    for name, correction in corrections.items():
        kept[name].append(float((np.asarray(correction.weight(t))[counts_BT] > 0).mean()))
    if lag in (1, 4, 16):
        axes[0].hist(np.log(w_M), bins=60, range=(-3, 3), histtype="step", label=f"{lag} behind")
assert effective[0] > 0.999 and effective[-1] < effective[0]
axes[0].set(title="log(old / engine) of each token", xlabel="nats", yscale="log")
axes[0].legend()
axes[1].plot(lags, effective, "o-")
axes[1].set(title="effective share of the tokens", xlabel="batches behind", ylim=(0, 1.05))
for name, shares in kept.items():
    axes[2].plot(lags, shares, "o-", label=name)
axes[2].set(title="tokens that keep a weight", xlabel="batches behind", ylim=(0, 1.05))
axes[2].legend(fontsize=8)
fig.tight_layout()
plt.show()

# %% [markdown]
# A weight corrects what the policy would have drawn otherwise; it cannot bring what the old policy
# never drew. `experiments/bench/rl_learning.py` trains with an engine 8 versions behind, with and
# without TIS, beside other controls.
