"""What a run would cost before it is started: the table of `--dry-run`, without any device.

`table(exp)` takes an `Experiment` (or anything with its fields: this floor does not know the type).
"""

from __future__ import annotations

from typing import Any

from glm45_jax.model import cost
from glm45_jax.model.expert_parallel import default_exchange
from glm45_jax.plan.plot import plot
from glm45_jax.sharding import AXES, MeshShape, check_batch, check_divides, check_experts, ways


def table(exp: Any) -> str:
    """What the run would be, as a table: parameters, FLOPs, memory a device by term, schedule or
    stages, and a plot of them. Allocates nothing.
    """
    check_rows(exp)
    counts = cost.param_counts(exp.model)
    parts = [(span, exp.of(span)) for span in exp.spans if span.first_step < exp.train.steps]
    ends = [min(span.end_step, exp.train.steps) for span, _ in parts]
    tokens = parts[-1][0].tokens_at(ends[-1])
    flops = sum(
        cost.flops_per_token(sub.model, sub.data.seq_len).total
        * (span.tokens_at(end) - span.first_tokens)
        for (span, sub), end in zip(parts, ends, strict=True)
    )
    sizes = [rows for _, rows in exp.batch_sizes()]
    lengths = list(dict.fromkeys(f"{sub.data.seq_len:,}" for _, sub in parts))
    stored, active = _short(counts.total_stored), _short(counts.active_body)
    memory = [_memory(sub, max(rows for _, rows in span.sizes())) for span, sub in parts]
    worst = max(memory, key=lambda terms: terms["total"])
    lines = [
        f"experiment   {exp.name}",
        f"parameters   {_short(counts.body_and_mtp)} body + MTP, {stored} stored, "
        f"active {active} body, {_short(counts.active_body_and_head)} with the head",
        f"run          {exp.train.steps:,} steps, {_short(tokens)} tokens in rows of "
        f"{', '.join(lengths)}, batch {sizes[0]:,} to {sizes[-1]:,} rows",
        f"FLOPs        {_short(flops / tokens)} FLOPs a token (forward + backward), "
        f"{flops:.3g} in all",
        f"devices      {exp.devices():,} as {exp.mesh}",
        *_experts(exp),
        *_rl(exp),
        "memory a device, GiB (E: estimate)" + (", of the largest stage" if exp.stages else ""),
        *(f"  {term:<24}{size / 2**30:10.3f}" for term, size in worst.items()),
    ]
    schedule = _stages(exp, parts, memory) if exp.stages else _schedule(exp, tokens)
    return "\n".join([*lines, *schedule, *plot(parts, exp.train.steps)])


def _schedule(exp: Any, tokens: float) -> list[str]:
    """Learning rate, MTP weight and bias rate at some shares of the run."""
    lines = [f"  {'tokens seen':<14}{'lr':<12}{'MTP weight':<12}{'bias rate':<12}"]
    for share in (0.0, 0.01, 0.1, 0.25, 0.5, 0.75, 1.0):
        at = share * tokens
        row = (exp.optim.lr_at(at), exp.train.mtp_weight(at), exp.train.bias_rate(at))
        lines.append(f"  {_short(at):<14}" + "".join(f"{float(x):<12.4g}" for x in row))
    return lines


def _stages(exp: Any, parts: list[tuple[Any, Any]], memory: list[dict[str, float]]) -> list[str]:
    """A line for each stage, with the learning rate at its first and after its last step."""
    names = ("stage", "first step", "tokens seen", "seq_len", "rows", "RoPE base", "bias", "MTP")
    widths = (18, 12, 13, 10, 16, 11, 8, 6)
    head = "".join(f"{name:<{width}}" for name, width in zip(names, widths, strict=True))
    lines = [f"  {head}{'lr':<22}GiB"]
    for (span, _), terms in zip(parts, memory, strict=True):
        stage, end = span.stage, min(span.end_step, exp.train.steps)
        rows = [rows for _, rows in span.sizes()]
        cells = (
            stage.name,
            f"{span.first_step:,}",
            _short(span.first_tokens),
            f"{stage.seq_len:,}",
            f"{rows[0]:,}" + (f" to {rows[-1]:,}" if len(rows) > 1 else ""),
            f"{stage.rope_theta:,.0f}",
            f"{stage.bias_rate:g}",
            f"{stage.mtp_weight:g}",
        )
        lr = [float(exp.optim.lr_at(float(at))) for at in (span.first_tokens, span.tokens_at(end))]
        line = "".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True))
        lines.append(f"  {line}{f'{lr[0]:.3g} to {lr[1]:.3g}':<22}{terms['total'] / 2**30:.1f}")
    return lines


def _experts(exp: Any) -> list[str]:
    """The line that says how tokens meet experts, where those are split over devices."""
    if not isinstance(exp.mesh, MeshShape):
        return []
    sizes = dict(zip(AXES, exp.mesh.resolve(exp.devices()), strict=True))
    size = ways(exp.rules.experts, sizes)
    if size == 1 or not exp.model.n_moe + exp.model.n_mtp:
        return []
    asked, top_k = exp.rules.exchange, exp.model.moe.top_k
    tpu, gpu = (asked or default_exchange(size, top_k, on)[0] for on in ("tpu", "gpu"))
    how = f"{gpu}" if tpu == gpu else f"{gpu}, on TPU {tpu}"
    return [f"experts      {exp.model.moe.experts // size} on each of {size} devices, by {how}"]


def _rl(exp: Any) -> list[str]:
    """What an RL run samples, and how."""
    rl = exp.rl
    if rl is None:
        return []
    name = getattr(rl.world, "__qualname__", repr(rl.world))
    return [
        f"batch        {rl.groups:,} prompts x {rl.samples} samples of up to "
        f"{rl.sampling.max_tokens:,} tokens at temperature {rl.sampling.temperature:g}, "
        f"{rl.updates} updates",
        f"world        {name}",
        f"mode         {rl.mode}; {rl.serving.slots} slots, {rl.serving.pages:,} pages of "
        f"{rl.serving.page} tokens an engine",
    ]


def _short(n: float) -> str:
    """Two decimals and a unit: 355.23B."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(n) >= size:
            return f"{n / size:.2f}{unit}"
    return f"{n:.0f}"


def check_rows(exp: Any) -> None:
    """Raises ValueError where batch or experts do not divide over the mesh; needs no device."""
    n = exp.devices()
    if isinstance(exp.mesh, MeshShape) and exp.model.n_moe + exp.model.n_mtp:
        sizes = dict(zip(AXES, exp.mesh.resolve(n), strict=True))
        check_experts(exp.model.moe.experts, sizes, exp.rules)
    for _, rows in exp.batch_sizes():
        if isinstance(exp.mesh, MeshShape):
            sizes = dict(zip(AXES, exp.mesh.resolve(n), strict=True))
            check_batch(rows, sizes, exp.rules)
        else:
            check_divides(rows, n, "pmap devices", "mesh=Pmap(devices=...)")


def _memory(exp: Any, rows: int) -> dict[str, float]:
    """Bytes of a device by term, for the largest batch of the run."""
    micro, n = rows // exp.train.accum(rows), exp.devices()
    return cost.memory_per_device(
        exp.model,
        optim=exp.optim,
        mesh_sizes=exp.mesh.resolve(n) if isinstance(exp.mesh, MeshShape) else (n, 1, 1, 1, 1),
        rules=exp.rules,
        rows=micro,
        seq_len=exp.data.seq_len,
        accumulate=micro < rows,
    )
