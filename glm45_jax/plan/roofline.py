"""How long a step takes at least: arithmetic, memory and links of one device at their full rates.
The type to know is `Roofline`.

No overlap is better than perfect and none worse than none: the step lies between the longest of the
three and their sum, if every rate is met. Kernels meet 60 to 80% of theirs.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from glm45_jax.model import cost
from glm45_jax.model.transformer import specs
from glm45_jax.optim import muon
from glm45_jax.plan.hlo import Collective, Counted
from glm45_jax.plan.targets import Target

# Times a layer's gathered weights pass through memory in a micro-batch: written by the gather, read
# by the forward pass, both again for the recomputation, read for the gradient of its input; and its
# gradient is written.
WEIGHT_PASSES = 6.0
# Times each byte of parameters, gradients and optimizer moves at the end of a step: there and back.
STATE_PASSES = 2.0


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of a step of one device. model_flops: per device and step, nothing recomputed.

    compute: with what is recomputed and Newton-Schulz, whose seconds are `muon`. links: None where
    nothing was compiled.
    """

    model_flops: float
    compute: float
    muon: float
    memory: float
    links: float | None
    peak: float

    @property
    def at_least(self) -> float:
        """Everything overlaps."""
        return max(self.compute, self.memory, self.links or 0.0)

    @property
    def at_most(self) -> float:
        """Nothing overlaps, every rate is met."""
        return self.compute + self.memory + (self.links or 0.0)

    def mfu(self, seconds: float) -> float:
        """Model FLOP/s over the peak, for a step of so many seconds."""
        return self.model_flops / (seconds * self.peak)


def of(exp: Any, rows: int, target: Target, terms: dict[str, float], sends: Any) -> Roofline:
    """The roofline of a step of `rows` rows. terms: `cost.memory_per_device` of it. sends: of
    `sends` below, or None.
    """
    chip, n = target.chip, target.devices
    tokens = rows * exp.data.seq_len / n
    flops = cost.flops_per_token(exp.model, exp.data.seq_len)
    again = recomputed(exp.model, flops)
    iterations = newton_schulz_flops(exp.model, exp.optim) / n
    micro = exp.train.accum(rows)
    act = jnp.dtype(exp.model.dtype).itemsize
    state = terms["parameters"] + terms["gradients"] + terms["optimizer"]
    layers = exp.model.n_layers + exp.model.n_mtp
    once = 2 * (terms["E saved activations"] + layers * terms["E one block, recomputed"])
    once += 2 * layers * terms["E rows of experts"]
    once += WEIGHT_PASSES * layers * terms["E weights of one layer"]
    words = exp.model.vocab * exp.model.d_model * act * 2.0
    moved = micro * (once + words) + STATE_PASSES * state
    return Roofline(
        model_flops=tokens * flops.total,
        compute=(tokens * (flops.total + again) + iterations) / chip.flops,
        muon=iterations / chip.flops,
        memory=moved / chip.hbm_rate,
        links=None if sends is None else sum(seconds for _, _, seconds in sends.values()),
        peak=chip.flops,
    )


def recomputed(cfg: Any, flops: cost.Flops) -> float:
    """FLOPs a token that the remat policy does twice: a forward pass of the blocks, or of the
    scores and the routed experts alone. flops: of training.
    """
    match cfg.remat:
        case "none":
            return 0.0
        case "dots":
            return (flops.attention_scores + flops.experts) / 3
    return (flops.total - flops.head) / 3


def newton_schulz_flops(cfg: Any, optim: Any) -> float:
    """FLOPs of Muon's iterations for all matrices of a model; 0 for other optimizers."""
    return muon.newton_schulz_flops(specs(cfg), getattr(optim, "steps", 0))


def sends(counted: Counted, target: Target) -> dict[str, tuple[float, float, float]]:
    """{kind: (runs, bytes, seconds)} that a device sends in one step."""
    found: dict[str, tuple[float, float, float]] = {}
    for c in counted.collectives:
        runs, sent, seconds = found.get(c.kind, (0.0, 0.0, 0.0))
        found[c.kind] = (
            runs + c.runs,
            sent + c.runs * c.sent,
            seconds + c.runs * seconds_of(c, target),
        )
    return found


def seconds_of(c: Collective, target: Target) -> float:
    """One run at full rate. A torus sends over all links of a chip.

    Over hosts, what all members need passes the network once for each host, over the network cards
    of all members there; what one device has for one other passes by its own card.
    """
    chip, on_a_host = target.chip, target.on_a_host
    hosts = {device // on_a_host for device in c.group}
    if len(hosts) < 2 or not chip.net_rate:
        return c.sent / chip.link_rate
    local = len(c.group) / len(hosts)
    if c.kind in ("all-to-all", "ragged-all-to-all", "collective-permute"):
        far = 1.0 if c.kind == "collective-permute" else 1 - (local - 1) / (len(c.group) - 1)
        return max(c.sent * far / chip.net_rate, c.sent * (1 - far) / chip.link_rate)
    rate = min(chip.link_rate, chip.net_rate * math.floor(local))
    return c.sent / rate
