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
# # An ablation: does Muon learn more from the same tokens than AdamW?
#
# Question: how is one choice of the recipe tested, and how sure can one be? Runtime: about two
# minutes on a CPU: two optimizers, two seeds, a model of 0.2M parameters on Python's own documents.

# %%
import dataclasses
import pathlib
import tempfile

import jax
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Image

from experiments import ablations, pretrain, sweep
from glm45_jax import values
from glm45_jax.metrics import read_jsonl

# %% [markdown]
# ## An ablation is a value
#
# Each is a function of a base experiment, which may have any size: a CPU's or a cluster's. What its
# arms change is a difference of values, so one can look before anything runs.

# %%
base = ablations.tiny()
for name, of in ablations.ABLATIONS.items():
    ablation = of(base)
    print(f"{name}: {ablation.question}")
    for arm, experiment in ablation.arms:
        changes = [f"{path}={new}" for path, _, new in values.diff(base, experiment)]
        short = [text if len(text) < 70 else text.split("=")[0] for text in changes]
        print(f"    {arm:28} {'; '.join(short) or 'the base itself'}")

# %% [markdown]
# The same at the size of one accelerator: only the base is another.

# %%
for name in ("heads", "depth_width"):
    found = ablations.ABLATIONS[name](pretrain.mini())
    print(name, [arm for arm, _ in found.arms])

# %% [markdown]
# ## Running it
#
# Arms of a seed begin with the same weights and see the same tokens in the same order. Every arm is
# an ordinary run in a folder of its own; its final weights are scored on validation rows that all
# arms share. Two seeds say how much of a difference is luck.

# %%
workdir = pathlib.Path(tempfile.mkdtemp())
jax.config.update("jax_compilation_cache_dir", str(workdir / "compiled"))  # seeds share programs
steps = 90
tokens = float(steps * base.train.rows * base.data.seq_len)
base = values.override(
    base,
    [
        f"train.steps={steps}",
        f"optim.schedule.total={tokens}",
        f"optim.schedule.warmup={0.1 * tokens}",
        "train.validate_every=20",
    ],
)
ablation = sweep.only(ablations.optimizer(base), ["muon_lr_x1", "adamw_lr_x1"])
results = sweep.run(ablation, workdir, seeds=(0, 1))
print(sweep.table(ablation, results))

# %%
sweep.figure(ablation, workdir).savefig(workdir / "curves.png", dpi=110)
Image(workdir / "curves.png")

# %% [markdown]
# ## Is it more than luck?
#
# The difference within a seed is what counts: both arms of it had the same start and the same text,
# so what they have in common cancels.

# %%
loss = {(one.arm, one.seed): one.losses["validation"] for one in results}
gaps = [loss["adamw_lr_x1", seed] - loss["muon_lr_x1", seed] for seed in (0, 1)]
luck = [abs(loss[arm, 0] - loss[arm, 1]) for arm, _ in ablation.arms]
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.2), layout="constrained")
for number, (arm, _) in enumerate(ablation.arms):
    for seed in (0, 1):
        logged = read_jsonl(workdir / arm / str(seed) / "metrics.jsonl")
        shown = [
            (row.scalars["tokens"], row.scalars["val/loss"])
            for row in logged
            if "val/loss" in row.scalars
        ]
        left.plot(
            *zip(*shown, strict=True), marker="o", color=f"C{number}", label=None if seed else arm
        )
left.set(title="Validation loss", xlabel="tokens", ylabel="nats a token")
left.legend(frameon=False)
right.bar([f"AdamW - Muon\nseed {seed}" for seed in (0, 1)], gaps, color="C2")
right.bar([f"two seeds of\n{arm}" for arm, _ in ablation.arms], luck, color="#bbbbbb")
right.axhline(0, color="#999999", linewidth=0.8)
right.set(title="Differences of the final loss", ylabel="nats a token")
plt.show()
print(f"Muon is ahead by {np.mean(gaps):.3f} nats a token; seeds differ by {np.mean(luck):.3f}")
assert all(one.ended == "done" for one in results)

# %% [markdown]
# ## What it does not say
#
# - One rate was compared. The best of AdamW may lie at another; `optimizer(base)` has three rates
#   of each, and an honest comparison takes the best of both.
# - Some minutes of a tiny model say little about a large one. `--base experiments.pretrain:mini`
#   asks the same of 100M parameters on one accelerator:
#
#       python -m experiments.ablations optimizer --base experiments.pretrain:mini \
#           --workdir runs/optimizer --seeds 2
#
# - A result worth keeping goes to `docs/log.md`, with date, command and number, also when it is
#   negative.

# %%
slower = dict(ablations.optimizer(base).arms)["adamw_lr_x0.3"]
assert dataclasses.replace(slower, optim=base.optim) == base
