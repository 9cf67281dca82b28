"""What a run would cost before it is started: the table of `--dry-run`, without any device.

`table(exp)` takes an `Experiment` (or anything with its fields: this floor does not know the type).
"""

from __future__ import annotations

from typing import Any

from glm45_jax.model import cost
from glm45_jax.sharding import AXES, MeshShape, check_batch, check_divides


def table(exp: Any) -> str:
    """What the run would be, as a table: parameters, FLOPs, memory a device by term, schedule.
    Allocates nothing.
    """
    check_rows(exp)
    counts = cost.param_counts(exp.model)
    flops = cost.flops_per_token(exp.model, exp.data.seq_len)
    ramp = exp.train.ramp(exp.data.seq_len)
    tokens = ramp.tokens_at(exp.train.steps)
    stored, active = _short(counts.total_stored), _short(counts.active_body)
    first, last = ramp.rows_at(0), ramp.rows_at(exp.train.steps - 1)
    lines = [
        f"experiment   {exp.name}",
        f"parameters   {_short(counts.body_and_mtp)} body + MTP, {stored} stored, "
        f"active {active} body, {_short(counts.active_body_and_head)} with the head",
        f"run          {exp.train.steps:,} steps, {_short(tokens)} tokens in rows of "
        f"{exp.data.seq_len:,}, batch {first:,} to {last:,} rows",
        f"FLOPs        {_short(flops.total)} FLOPs a token (forward + backward), "
        f"{flops.total * tokens:.3g} in all",
        f"devices      {exp.devices():,} as {exp.mesh}",
        "memory a device, GiB (E: estimate)",
    ]
    rows = max(rows for _, rows in exp.batch_sizes())
    lines += [f"  {term:<24}{size / 2**30:10.3f}" for term, size in _memory(exp, rows).items()]
    lines.append(f"  {'tokens seen':<14}{'lr':<12}{'MTP weight':<12}{'bias rate':<12}")
    for share in (0.0, 0.01, 0.1, 0.25, 0.5, 0.75, 1.0):
        at = share * tokens
        row = (exp.optim.lr_at(at), exp.train.mtp_weight(at), exp.train.bias_rate(at))
        lines.append(f"  {_short(at):<14}" + "".join(f"{float(x):<12.4g}" for x in row))
    return "\n".join(lines)


def _short(n: float) -> str:
    """Two decimals and a unit: 355.23B."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(n) >= size:
            return f"{n / size:.2f}{unit}"
    return f"{n:.0f}"


def check_rows(exp: Any) -> None:
    """Raises ValueError where a batch does not divide over the mesh; needs no device."""
    n = exp.devices()
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
