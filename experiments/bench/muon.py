"""Muon's update beside optax's on one device: `python -m experiments.bench.muon`.

Two cases: every weight of the 100M `mini`, and the experts of one GLM-4.5-Air layer (128 experts,
three matrices of 4096 x 1408), ours with every implementation of Newton-Schulz; then that alone,
of one such stack and of one matrix of 4096 x 12288, beside its float32 form. An update takes
float32 gradients, and moves momentum and float32 weights where they lie. Rows: op, case, impl,
momentum, ms, tflops (Newton-Schulz alone, as if no product were symmetric and none saved), percent
of an 8192^3 product of the same run, gbs; for `mini` the share of its train step of 64K tokens,
timed in the same run, for Air the share of the layer's FLOPs at 64K tokens, counted. FLOPs, bytes
and the floor are printed before anything is timed. `--tiny` runs on a CPU and writes nothing.
"""

import argparse
import concurrent.futures
import dataclasses
import gc
import math
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers
from optax.contrib import muon as optax_muon

from experiments.bench.kernels import Contender, copy_gbs, matmul_ceiling, of_jax, race
from experiments.bench.results import device_name, merge_rows
from experiments.bench.rollout import keep_compiled
from experiments.bench.train_step import Case as Step
from experiments.bench.train_step import random_batch
from glm45_jax import params as params_lib
from glm45_jax.kernels import newton_schulz as newton_schulz_lib
from glm45_jax.kernels import newton_schulz_gpu
from glm45_jax.model import config, cost, transformer
from glm45_jax.optim.muon import Impl, Muon, newton_schulz, newton_schulz_flops
from glm45_jax.optim.schedules import Constant
from glm45_jax.params import ParamSpec
from glm45_jax.sharding import MeshShape
from glm45_jax.train.parallel import Recipe, make_trainer
from glm45_jax.train.state import Train

LR = 1e-4
OURS, OPTAX = "glm45_jax", "optax.contrib.muon"
Momentum = Literal["float32", "bfloat16"]
MOMENTA: tuple[Momentum, ...] = ("float32", "bfloat16")
STEP = {"full": Step(32, 2048, 10, "bfloat16"), "tiny": Step(2, 16, 2, "float32")}
IDENTITY = ("case", "shape", "impl", "momentum")  # what makes a row the same row


@dataclasses.dataclass(frozen=True)
class Case:
    """Weights that are updated. momenta: dtypes of the momentum. share: of the iterations in all
    FLOPs of the layer they belong to, at 64K tokens; None where the train step is timed.
    """

    name: str
    shape: str
    specs: Any
    dtype: Any = jnp.bfloat16
    samples: int = 10
    impls: tuple[Impl, ...] = ("xla", "gram", "mosaic")
    momenta: tuple[Momentum, ...] = ("float32",)
    share: float | None = None

    @property
    def flops(self) -> float:
        """Of Newton-Schulz."""
        return newton_schulz_flops(self.specs)

    def nbytes(self, momentum: Momentum) -> float:
        """Read or written at least: gradients once, weights and moments twice."""
        total = 0.0
        for _, spec in params_lib.leaves_with_path(self.specs):
            moments = jnp.dtype(momentum).itemsize if spec.kind == "matrix" else 8
            total += 0 if spec.kind == "state" else spec.size * (4 + 2 * 4 + 2 * moments)
        return total


def mini() -> Case:
    cfg = config.mini()
    return Case("mini", f"{cfg.n_layers} layers, D{cfg.d_model}", transformer.specs(cfg))


def air(tokens: int = 65_536) -> Case:
    """The experts of one layer."""
    cfg = config.glm45_air()
    experts = cfg.moe.specs(1, cfg.d_model, cfg.init_std)
    leaves = {k: x for k, x in params_lib.leaves_with_path(experts) if "experts" in x.axes}
    specs = {k: x for k, x in leaves.items() if x.kind == "matrix"}
    a_token = cost.flops_per_token(cfg, 4096)
    layer = (a_token.attention_proj + a_token.attention_scores) / cfg.n_layers
    layer += (a_token.experts + a_token.router) / cfg.n_moe
    share = newton_schulz_flops(specs) / (newton_schulz_flops(specs) + tokens * layer)
    shape = f"E{cfg.moe.experts} {cfg.d_model} x {cfg.moe.d_expert} x 3"
    impls: tuple[Impl, ...] = ("xla", "mosaic")
    return Case("air experts", shape, specs, jnp.bfloat16, 4, impls, MOMENTA, share)


def tiny() -> tuple[Case, Case]:
    """Both cases in small, in float32."""
    whole = Case("tiny", "D64", transformer.specs(config.tiny()), jnp.float32, 2)
    experts = {"up": ParamSpec((1, 4, 24, 16), ("layers", "experts", "embed", "mlp"))}
    impls: tuple[Impl, ...] = ("xla", "gram")
    few = Case("tiny experts", "E4 24 x 16", experts, jnp.float32, 2, impls, MOMENTA, 0.5)
    return dataclasses.replace(whole, impls=impls), few


def sides(spec: ParamSpec) -> MuonDimensionNumbers | None:
    """Which axes of a weight optax shall take for rows and columns; None: not a matrix."""
    if spec.kind != "matrix":
        return None
    first, fan_in = spec.batch_dims, spec.matrix_shape[1]
    cut = next(
        i for i in range(first + 1, len(spec.shape)) if math.prod(spec.shape[first:i]) == fan_in
    )
    return MuonDimensionNumbers(tuple(range(first, cut)), tuple(range(cut, len(spec.shape))))


def ours(
    case: Case, momentum: Momentum, impl: Impl = "auto"
) -> tuple[optax.GradientTransformation, Any]:
    """(our optimizer, dtype it is given)."""
    dtype = case.dtype.dtype.name
    optim = Muon(dtype=dtype, momentum_dtype=momentum, clip_norm=None, impl=impl)
    tx = optax.chain(optim.build(case.specs), optax.scale(LR))
    return tx, jnp.float32


def peer(case: Case, momentum: Momentum) -> tuple[optax.GradientTransformation, Any]:
    """(optax's, dtype it is given). Its products have the dtype of its momentum and gradients, so
    for bfloat16 it gets weights and gradients in bfloat16; in float32 XLA picks, on an H100 TF32.
    """
    trained = params_lib.tree_map(lambda s: s.kind in ("matrix", "embed"), case.specs)
    tx = optax_muon(
        LR,
        weight_decay=0.1,
        weight_decay_mask=trained,
        consistent_rms=0.2,
        adam_b2=0.95,
        eps=1e-7,
        muon_weight_dimension_numbers=params_lib.tree_map(sides, case.specs),
    )
    return tx, jnp.dtype(momentum)


def updating(tx: optax.GradientTransformation, dtype: Any) -> Callable[..., Any]:
    """f(weights, state, gradients) -> (weights, state), weights float32; `tx` sees `dtype`."""

    def update(weights: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
            updates, state = tx.update(_as(grads, dtype), state, _as(weights, dtype))
        return jax.tree.map(lambda w, u: w + u.astype(jnp.float32), weights, updates), state

    return update


def jitted(case: Case, chosen: tuple[Any, Any]) -> tuple[Any, Any]:
    """(its start, its update), compiled when called; an update takes weights and state away."""
    tx, dtype = chosen
    return jax.jit(lambda w: tx.init(_as(w, dtype))), jax.jit(
        updating(tx, dtype), donate_argnums=(0, 1)
    )


def compile_ahead(case: Case) -> None:
    """None; its programs are in the compile cache."""
    weights = params_lib.abstract(case.specs)
    for momentum in case.momenta:
        for chosen in (*(ours(case, momentum, i) for i in case.impls), peer(case, momentum)):
            start, update = jitted(case, chosen)
            start.lower(weights).compile()
            update.lower(weights, jax.eval_shape(start, weights), weights).compile()


def contender(case: Case, chosen: tuple[Any, Any], grads: Any, held: list[Any]) -> Contender:
    """An update that goes on from where the last one ended; nothing is kept twice. held: weights
    and state, or nothing yet; contenders of one kind of state may share it.
    """
    start, update = jitted(case, chosen)
    if not held:
        weights = draw(case.specs, 0)
        held.append((weights, start(weights)))

    def call() -> Any:
        held[0] = update(*held[0], grads)
        return held[0]

    return Contender(call, jax.block_until_ready)


def draw(specs: Any, seed: int) -> Any:
    """Random weights or gradients, float32; the generator that is quick on a GPU."""
    key = jax.random.key(seed, impl="rbg")
    leaves, tree = jax.tree.flatten(specs, is_leaf=params_lib.is_spec)
    keys = jax.random.split(key, len(leaves))
    normal = jax.jit(lambda key, shape: 0.02 * jax.random.normal(key, shape), static_argnums=1)
    return jax.tree.unflatten(tree, [normal(k, s.shape) for k, s in zip(keys, leaves, strict=True)])


def begin_step(step: Step, tiny: bool) -> Callable[[], float]:
    """Compiles the train step and runs it twice; what it returns gives milliseconds a step."""
    cfg = config.tiny() if tiny else config.mini()
    optim = Muon(dtype=step.dtype)
    train = Train(steps=100, rows=step.rows, bias_rate=Constant(1e-3))
    recipe = Recipe(dataclasses.replace(cfg, dtype=step.dtype), optim, train, packed=False)
    trainer = make_trainer(MeshShape(data=1, fsdp=1), recipe, devices=jax.devices()[:1])
    held, batch = [trainer.init(jax.random.key(0))], random_batch(step, cfg.vocab)

    def once() -> float:
        start = time.perf_counter()
        held[0], out = trainer.step(held[0], batch)
        float(out.scalars["loss"])
        return (time.perf_counter() - start) * 1e3

    once(), once()
    return lambda: statistics.median(once() for _ in range(step.steps))


def floor(case: Case, ceiling: float, copy: float) -> None:
    """None; prints what an update costs at least, before it is timed. TFLOP/s, GB/s."""
    for momentum in case.momenta:
        sums, moved = case.flops / ceiling / 1e9, case.nbytes(momentum) / copy / 1e6
        print(
            f"{case.name} {case.shape}, momentum {momentum}: {case.flops / 1e12:.4g} TFLOPs "
            f"{sums:.3f} ms, {case.nbytes(momentum) / 1e9:.3g} GB {moved:.3f} ms; at least "
            f"{max(sums, moved):.3f} ms, {sums + moved:.3f} if they do not overlap",
            flush=True,
        )


def measure(case: Case, ceiling: float, step_ms: float | None) -> list[dict[str, Any]]:
    """Rows of one case. One momentum after the other: both at once do not fit beside Air's."""
    table = []
    grads = draw(case.specs, 1)
    for momentum in case.momenta:
        held: list[Any] = []
        contenders: dict[str, Callable[[], Contender]] = {
            f"{OURS} {impl}": partial(contender, case, ours(case, momentum, impl), grads, held)
            for impl in case.impls
        }
        contenders[OPTAX] = partial(contender, case, peer(case, momentum), grads, [])
        found = race(contenders, samples=case.samples)
        del contenders
        for impl, result in found.items():
            row: dict[str, Any] = {
                "op": "muon_update",
                "case": case.name,
                "shape": case.shape,
                "impl": impl,
            }
            row |= {"momentum": momentum, "flops": case.flops, "ceiling_tflops": round(ceiling, 1)}
            row |= of_time(case, momentum, result, ceiling, step_ms)
            table.append(row)
            print({k: v for k, v in row.items() if k not in ("op", "flops")}, flush=True)
        held.clear()
        gc.collect()
    return table


@dataclasses.dataclass(frozen=True)
class Stack:
    """Matrices for Newton-Schulz alone. checked: how many are compared with the float32 form."""

    count: int
    m: int
    n: int
    checked: int = 1
    impls: tuple[Impl, ...] = ("xla", "gram", "mosaic")

    @property
    def flops(self) -> float:
        """As `newton_schulz_flops`."""
        spec = ParamSpec((self.count, self.m, self.n), ("experts", "embed", "mlp"))
        return newton_schulz_flops(spec)

    def draw(self) -> jax.Array:
        """bfloat16, with singular values over four decades."""
        scale_11n = jnp.logspace(0.0, -4.0, self.n)[None, None]
        key = jax.random.key(0, impl="rbg")
        shape = (self.count, self.m, self.n)
        make = jax.jit(lambda: (jax.random.normal(key, shape) * scale_11n).astype(jnp.bfloat16))
        return make()


STACKS = (Stack(128, 4096, 1408), Stack(1, 4096, 12_288))
TINY_STACKS = (Stack(2, 24, 16, impls=("xla", "gram")),)


def measure_alone(stack: Stack, ceiling: float) -> list[dict[str, Any]]:
    """Rows of Newton-Schulz alone. err: distance from its float32 form of the same bfloat16
    matrices, as a share of its norm; largest: of an entry, as a share of the root mean square.
    """
    x = stack.draw()
    exact = jax.jit(lambda x: newton_schulz(x, dtype=jnp.float32, impl="xla"))
    wanted = exact(x[: stack.checked])
    largest: list[float] = []

    def error(out: jax.Array) -> float:
        apart = jnp.abs(out[: stack.checked].astype(jnp.float32) - wanted)
        largest.append(float(jnp.max(apart) / jnp.sqrt(jnp.mean(jnp.square(wanted)))))
        return float(jnp.linalg.norm(apart) / jnp.linalg.norm(wanted))

    found = race(
        {
            impl: partial(of_jax, partial(newton_schulz, dtype=jnp.bfloat16, impl=impl), x)
            for impl in stack.impls
        },
        samples=6,
        error=error,
    )
    shape, table, seen = f"{stack.count} x {stack.m} x {stack.n}", [], iter(largest)
    for impl, result in found.items():
        row: dict[str, Any] = {"op": "newton_schulz", "case": "alone", "shape": shape, "impl": impl}
        row |= {"momentum": None, "flops": stack.flops, "ceiling_tflops": round(ceiling, 1)}
        row |= result
        if "ms" in result:
            rate = stack.flops / result["ms"] / 1e9
            row |= {"tflops": round(rate, 1), "pct_of_ceiling": round(100 * rate / ceiling, 1)}
            row["largest"] = round(next(seen), 4)
        table.append(row)
        print({k: v for k, v in row.items() if k not in ("op", "flops", "momentum")}, flush=True)
    return table


def measure_products(stack: Stack, ceiling: float) -> list[dict[str, Any]]:
    """Rows of the kernel's products that make up an iteration, with both widths of tiles, and of
    XLA's for the same numbers; flops are those of the whole result, also where half is computed.
    """
    x = stack.draw()
    side, scale = min(stack.m, stack.n), jnp.full((stack.count,), 1e-2)
    square = x[:, :side, :side].astype(jnp.float16)
    tall = stack.m > stack.n
    inner = {"symmetric": True, "lhs_t": tall, "rhs_t": not tall, "dtype": jnp.float16}
    poly = {"symmetric": True, "shifted": True, "diagonal": 3.4445, "dtype": jnp.float16}
    q = square.astype(jnp.bfloat16)
    longer = 2.0 * stack.count * side * stack.m * stack.n
    cases: dict[str, tuple[tuple[Any, ...], dict[str, Any], float]] = {
        "inner products": ((x, x), inner, longer),
        "polynomial": ((square, square), poly, 2.0 * stack.count * side**3),
        "into the matrix": ((x, q) if tall else (q, x), {}, longer),
    }
    table = []
    for what, (args, kwargs, flops) in cases.items():
        forms = {"xla": newton_schulz_lib.product} | {
            f"mosaic, {plan.columns} columns": partial(newton_schulz_gpu.product, plan=plan)
            for plan in (newton_schulz_gpu.Plan(256, 4), newton_schulz_gpu.Plan(128, 6))
        }
        contenders: dict[str, Callable[[], Contender]] = {
            name: partial(of_jax, partial(form, **kwargs), *args, scale, scale)
            for name, form in forms.items()
        }
        for impl, result in race(contenders, samples=6).items():
            row: dict[str, Any] = {"op": "newton_schulz_product", "case": what, "impl": impl}
            row |= {"shape": f"{stack.count} x {stack.m} x {stack.n}", "momentum": None} | result
            if "ms" in result:
                rate = flops / result["ms"] / 1e9
                row |= {"tflops": round(rate, 1), "pct_of_ceiling": round(100 * rate / ceiling, 1)}
            table.append(row)
            print({k: v for k, v in row.items() if k not in ("op", "momentum")}, flush=True)
    return table


def of_time(
    case: Case, momentum: Momentum, result: dict[str, Any], ceiling: float, step_ms: float | None
) -> dict[str, Any]:
    """What follows from the milliseconds of an update; of a failure, its error."""
    if "ms" not in result:
        return result
    ms = result["ms"]
    row = {k: round(v, 4) for k, v in result.items()}
    row["tflops"] = round(case.flops / ms / 1e9, 1)
    row["pct_of_ceiling"] = round(100 * case.flops / ms / 1e9 / ceiling, 1)
    row["gbs"] = round(case.nbytes(momentum) / ms / 1e6)
    if case.share is not None:
        row["share_of_layer_flops_64k"] = round(case.share, 4)
    elif step_ms is not None:
        row |= {"step_ms": round(step_ms, 3), "share_of_step": round(ms / step_ms, 4)}
    return row


def _as(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(dtype), tree)


def run(
    cases: tuple[Case, ...],
    stacks: tuple[Stack, ...],
    step: Step | None,
    save: Callable[[list], None],
    *,
    small: bool = False,
) -> None:
    """None; rows of a case are printed and saved when they are there. All updates are compiled
    first, the train step in a thread: it takes longest. step: None: not timed. small: cases for a
    CPU, beside a product and a copy that it can do.
    """
    began = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        job = None if step is None else pool.submit(begin_step, step, small)
        for case in cases:
            compile_ahead(case)
        timed = None if job is None else job.result()
    print(f"compiled in {time.perf_counter() - began:.0f} s", flush=True)
    ceiling = matmul_ceiling(256) if small else matmul_ceiling()
    copy = copy_gbs(2**24) if small else copy_gbs()
    for case in cases:
        floor(case, ceiling, copy)
    step_ms = None if timed is None else timed()
    if step is not None:
        print(f"train step of {step.rows * step.seq_len:,} tokens: {step_ms:.2f} ms", flush=True)
    for stack in stacks:
        save(measure_alone(stack, ceiling))
        if not small:
            save(measure_products(stack, ceiling))
        gc.collect()
    for case in cases:
        save(measure(case, ceiling, step_ms))


def main() -> None:
    """Measures, prints, writes; of the tiny cases nothing is written."""
    # Two contenders of Air's experts take 64 GiB.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument(
        "--only", choices=("mini", "air", "alone"), help="one case; only mini times a train step"
    )
    args = parser.parse_args()
    keep_compiled()
    began = time.perf_counter()
    command = "python -m experiments.bench.muon" + (f" --only {args.only}" if args.only else "")
    told = {"command": command, "jax": jax.__version__, "optax": optax.__version__}

    def save(table: list[dict[str, Any]]) -> None:
        if not args.tiny:
            file = merge_rows(device_name(), "muon", [row | told for row in table], IDENTITY)
            print(f"wrote {file}", flush=True)

    cases = tiny() if args.tiny else (mini(), air())
    chosen = {None: cases, "mini": cases[:1], "air": cases[1:], "alone": ()}[args.only]
    alone = TINY_STACKS if args.tiny else STACKS
    step = None if args.only in ("air", "alone") else STEP["tiny" if args.tiny else "full"]
    run(chosen, alone if args.only in (None, "alone") else (), step, save, small=args.tiny)
    print(f"{time.perf_counter() - began:.0f} s in all", flush=True)


if __name__ == "__main__":
    main()
