"""What the command prints: memory by term and by the compiler, collectives, roofline, verdict."""

from __future__ import annotations

import dataclasses
from typing import Any

from glm45_jax.plan import nearest, roofline
from glm45_jax.plan.compile import Compiled, Job
from glm45_jax.plan.targets import GIB, Target

FITS, DOES_NOT_FIT, BAD_INPUT, NOT_COMPILED, STOPPED = 0, 1, 2, 3, 4


def report(
    exp: Any, rows: int, job: Job, target: Target, compiled: Compiled | None, missing: str
) -> tuple[str, int]:
    """(text, exit code). exp: what is trained, of `compile.part`. compiled: None where nothing was,
    because of `missing`.
    """
    terms = nearest.terms(exp, rows, target)
    chip, sizes = target.chip, nearest.sizes_of(exp, target)
    mesh = " x ".join(f"{axis} {n}" for axis, n in sizes.items() if n > 1) or "one device"
    micro = rows // exp.train.accum(rows)
    stage = f", stage {job.stage}" if job.stage else ""
    lines = [
        f"experiment   {exp.name}{stage}",
        f"target       {target}: {target.devices:,} x {chip.device_kind}, "
        f"{chip.hbm_bytes / GIB:.2f} GiB to fill each",
        f"mesh         {mesh}",
        f"step         {rows:,} rows of {exp.data.seq_len:,} tokens in {rows // micro} "
        f"micro-batches, {micro / target.devices:g} rows a device each",
        f"kept         remat {exp.model.remat}, parameters {exp.optim.master_dtype}, activations "
        f"{exp.model.dtype}",
        "memory a device, GiB (E: estimate)",
        *(f"  {term:<26}{size / GIB:10.2f}" for term, size in terms.items()),
    ]
    sends = compiled.sends if compiled is not None and not compiled.error else None
    if compiled is not None:
        lines += _compiled(compiled, target)
    lines += _roofline(roofline.of(exp, rows, target, terms, sends), target)
    lines += _remat(exp, rows, target, compiled, terms["total"])
    text, code = _verdict(exp, rows, target, terms["total"], compiled, missing)
    return "\n".join([*lines, *text]), code


def _compiled(compiled: Compiled, target: Target) -> list[str]:
    """What the compiler said."""
    picked = [f"  {line}" for line in compiled.picked]
    lines = ["kernels compiled", *picked] if picked else []
    if any(f"attention on {target.chip.platform}: reference" in line for line in picked):
        lines.append(
            "  attention is the XLA reference, not a kernel: its scores are what a kernel would "
            "not hold"
        )
    if compiled.error:
        return lines
    lines += [
        "compiler, GiB a device",
        f"  {'peak':<26}{compiled.peak / GIB:10.2f}   of {target.chip.hbm_bytes / GIB:.2f}",
        f"  {'arguments':<26}{compiled.arguments / GIB:10.2f}   parameters, optimizer, batch",
        f"  {'temporary':<26}{compiled.temporary / GIB:10.2f}   all of it; not all at once",
        f"compile      lowered in {compiled.lower_s:.0f} s, compiled in {compiled.compile_s:.0f} s "
        f"({compiled.cpu_s:.0f} s of CPU in all), {compiled.rss / GIB:.1f} GiB of this machine",
        "collectives a step of one device (from the compiled program)",
        f"  {'kind':<22}{'runs':>12}{'GiB sent':>12}{'seconds':>10}",
    ]
    for kind, (runs, sent, seconds) in sorted(compiled.sends.items(), key=lambda row: -row[1][1]):
        lines.append(f"  {kind:<22}{runs:>12,.0f}{sent / GIB:>12.2f}{seconds:>10.3f}")
    if compiled.unknown_loops:
        lines.append(
            f"  not counted: {compiled.unknown_loops} loops that end by data (further passes of "
            "the experts' exchange, none when routing is even)"
        )
    return lines


def _roofline(r: roofline.Roofline, target: Target) -> list[str]:
    """Seconds, and the rates they assume."""
    chip = target.chip
    net = f", {chip.net_rate / 1e9:g} GB/s to other hosts" if chip.net_rate else ""
    links = "not known: nothing compiled" if r.links is None else f"{r.links:.3f} s"
    return [
        f"roofline     arithmetic {r.compute:.3f} s (Muon {r.muon:.3f}), memory {r.memory:.3f} s "
        f"(E), links {links}",
        f"  rates      {chip.flops / 1e12:g} TFLOP/s bfloat16, {chip.hbm_rate / 1e12:g} TB/s HBM, "
        f"{chip.link_rate / 1e9:g} GB/s links{net} ({chip.source})",
        f"  step       {r.at_least:.3f} s if all overlap, {r.at_most:.3f} s if nothing does; MFU "
        f"at most {r.mfu(r.at_least):.1%}, {r.mfu(r.at_most):.1%}",
    ]


def _held(compiled: Compiled | None) -> float:
    """Bytes that the compiler asked for, 0 where it did not say."""
    return 0.0 if compiled is None else compiled.used or compiled.peak


def _remat(
    exp: Any, rows: int, target: Target, compiled: Compiled | None, estimate: float
) -> list[str]:
    """What each remat policy would hold and repeat, and the cheapest that fits: the compiled one by
    what the compiler said, the others by estimate.
    """
    held = _held(compiled)
    scale = max(1.0, held / estimate)
    times = f" times {scale:.2f}" if scale > 1 else ""
    found = nearest.policies(exp, rows, target, scale=scale)
    if held:
        fits, now = held <= target.chip.hbm_bytes, exp.model.remat
        found = [
            dataclasses.replace(p, bytes=held, fits=fits) if p.name == now else p for p in found
        ]
    cheapest = next((policy for policy in found if policy.fits), None)
    lines = [f"remat        GiB a device by estimate{times}; s of arithmetic made twice in a step"]
    for p in found:
        word = "" if p.fits else "does not fit"
        if p == cheapest:
            word = "the cheapest that fits"
            word += "" if p.name == exp.model.remat else f": --set model.remat={p.name}"
        lines.append(f"  {p.name:<26}{p.bytes / GIB:10.2f}{p.again_s:10.3f}   {word}".rstrip())
    return lines


def _verdict(
    exp: Any, rows: int, target: Target, estimate: float, compiled: Compiled | None, missing: str
) -> tuple[list[str], int]:
    """The last lines, and the exit code."""
    room = target.chip.hbm_bytes
    if compiled is None:
        guess = "would fit" if estimate <= nearest.MARGIN * room else "would not fit"
        return [f"NOT COMPILED by estimate it {guess}; {missing}"], NOT_COMPILED
    if compiled.error and not compiled.used:
        return [f"NOT COMPILED {compiled.error}"], STOPPED
    held = _held(compiled)
    if held <= room:
        return [f"fits         {held / GIB:.2f} of {room / GIB:.2f} GiB"], FITS
    lines = [f"does not fit {held / GIB:.2f} of {room / GIB:.2f} GiB"]
    scale = max(1.0, held / estimate)
    found = nearest.search(exp, rows, target, scale=scale)
    if not found:
        return [
            *lines,
            "  no other remat, micro-batch, optimizer's dtypes or mesh fits: more devices",
        ], DOES_NOT_FIT
    lines.append(
        f"  the {len(found)} nearest settings that do, by estimate (times {scale:.2f}, what the "
        "compiler said of this one over its estimate):"
    )
    lines += [f"    {s.text()}   {s.bytes / GIB:.1f} GiB" for s in found]
    return lines, DOES_NOT_FIT
