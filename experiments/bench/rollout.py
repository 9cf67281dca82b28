"""Output tokens a second of the rollout engine, on whatever device is here, beside its peers.

A case is (model, weights, slots, prompt, output): all slots are asked at once, through the driver.
The floor of a decode step is bytes over the copy bandwidth of the same run: every weight that is
not an expert's, the experts that random tokens touch, the keys and values that the rows hold.
Peers: transformers' `generate` with the same weights, and our engine without continuous batching.
Weights and prompts are random. Needs neither grain nor tokenizers.
"""

import argparse
import concurrent.futures
import dataclasses
import gc
import statistics
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench.kernels import copy_gbs
from experiments.bench.results import device_name, merge_rows
from glm45_jax import params as params_lib
from glm45_jax.kernels.fp8 import is_fp8
from glm45_jax.model import config, transformer
from glm45_jax.model.quantize import quantize
from glm45_jax.rollout import engine as engine_module
from glm45_jax.rollout.driver import Driver
from glm45_jax.rollout.engine import GlmEngine, chosen
from glm45_jax.rollout.sampling import Sampling

PAGE = 64
CASE = (
    "model",
    "layers",
    "impl",
    "slots",
    "prompt",
    "out",
)  # two rows of one case: the later counts
SERVED = ("bf16", "fp8", "fp8+kv8")  # weights, and keys and values


@dataclasses.dataclass(frozen=True)
class Load:
    """What is asked of an engine: `slots` prompts of `prompt` tokens, `out` new ones each."""

    slots: int
    prompt: int
    out: int


def air(layers: int) -> config.ModelConfig:
    """The first layers of GLM-4.5-Air at their true width, without MTP."""
    return dataclasses.replace(config.glm45_air(), n_moe=layers - 1, n_mtp=0)


def weights(cfg: config.ModelConfig) -> transformer.Params:
    """Random weights in the compute dtype, but for what stays float32."""
    dtype = jnp.dtype(cfg.dtype)

    def cast(spec: params_lib.ParamSpec) -> params_lib.ParamSpec:
        small = spec.kind == "state" or len(spec.shape) < 2
        return spec if small else dataclasses.replace(spec, dtype=dtype)

    specs = params_lib.tree_map(cast, transformer.specs(cfg))
    return jax.jit(lambda: params_lib.init(specs, jax.random.key(0)))()


def copy_bandwidth() -> float:
    """Bytes a second of a copy, read and written."""
    return 1e9 * (copy_gbs() if jax.default_backend() != "cpu" else copy_gbs(2**26))


def touched(params: transformer.Params, cfg: config.ModelConfig, rows: int) -> float:
    """Experts of a layer that `rows` random tokens reach, the mean over layers and draws."""
    rng = np.random.default_rng(1)
    shape = (8, 64) if cfg.d_model > 64 else (8, 32)
    tokens_BT = rng.integers(0, cfg.vocab, shape).astype(np.int32)

    @jax.jit
    def routes(params, tokens_BT):
        return chosen(params, transformer.forward(params, tokens_BT, cfg=cfg), cfg)

    routes_NLA = np.asarray(routes(params, tokens_BT)).reshape(-1, cfg.n_moe, cfg.moe.top_k)
    draws = [rng.choice(len(routes_NLA), rows, replace=rows > len(routes_NLA)) for _ in range(8)]
    found = [len(np.unique(routes_NLA[d, i])) for d in draws for i in range(cfg.n_moe)]
    return statistics.mean(found)


def step_bytes(
    params: transformer.Params, cfg: config.ModelConfig, load: Load, experts: float, kv: int
) -> float:
    """Bytes a decode step has to read at the middle of the output; kv: of a number in the cache."""
    size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))  # noqa: E731
    total = size(params) - size(params.embed_VD) - size(params.mtp)
    if params.moe is not None:
        ffn = params.moe.ffn
        routed = size((ffn.gate_EDF, ffn.up_EDF, ffn.down_EFD))
        total -= routed * (1 - experts / cfg.moe.experts)
    numbers = sum(heads * width for heads, width in cfg.mixer.kv_shapes)
    tokens = load.slots * (load.prompt + load.out / 2)
    return total + tokens * numbers * cfg.n_layers * kv


def engine_of(cfg: config.ModelConfig, slots: int, args: argparse.Namespace, kv8: bool):
    """An engine with a page for every token of the longest load, and two a row for those that
    enter. A prompt is one chunk.
    """
    room = -(-(max(args.prompts) + args.out) // PAGE) * PAGE
    return GlmEngine(
        cfg,
        slots=slots,
        page=PAGE,
        pages=slots * (room // PAGE + 2),
        max_tokens=room,
        buckets=tuple(sorted(args.prompts)),
        kv_dtype="float8_e4m3fn" if kv8 else None,
    )


def keep_compiled() -> None:
    """None; what compiles from now on is in JAX's cache on disk, in a new folder if it has none."""
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", tempfile.mkdtemp())


def compile_all(
    engines: list[GlmEngine], params: transformer.Params, pool: concurrent.futures.Executor
) -> list[concurrent.futures.Future[Any]]:
    """What puts every prefill and decode of these engines into the compile cache: they are traced
    here, one after another (Python does one thing at a time), and compiled side by side, which on a
    GPU takes a fraction of the time. params: or their shapes.
    """
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    i32, found = jax.ShapeDtypeStruct, []
    for engine in engines:
        state = jax.eval_shape(engine.init)
        table = i32((engine.slots, engine.row_pages), jnp.int32)
        active = i32((engine.slots,), jnp.bool_)
        lowered = [
            engine_module.decode.lower(
                shapes, state, table, active, cfg=engine.cfg, routes=False, top=0
            )
        ]
        pages, number = i32((1, engine.row_pages), jnp.int32), i32((), jnp.int32)
        for width in engine.buckets:
            args = (i32((1, width), jnp.int32), number, number, pages)
            lowered.append(
                engine_module.prefill.lower(
                    shapes, state, *args, cfg=engine.cfg, routes=False, fresh=True
                )
            )
        found += [pool.submit(one.compile) for one in lowered]
    return found


def prompts(cfg: config.ModelConfig, count: int, length: int) -> list[list[int]]:
    return np.random.default_rng(0).integers(0, cfg.vocab, (count, length)).tolist()


def serve(engine: GlmEngine, params: transformer.Params, load: Load) -> dict[str, float]:
    """Times of one load: the whole, and of the steps in which every slot decoded and nothing else
    happened.
    """
    driver = Driver(engine, params)
    other = prompts(engine.cfg, load.slots + 1, load.prompt)[-1]  # nothing that is read again
    warm = driver.submit(other, Sampling(max_tokens=3))
    driver.run()
    assert warm.completion is not None and warm.completion.finish == "length", warm.completion
    began, before = time.perf_counter(), driver.stats
    for seed, tokens in enumerate(prompts(engine.cfg, load.slots, load.prompt)):
        driver.submit(tokens, Sampling(max_tokens=load.out, seed=seed))
    steps, prefill_s, busy, read = [], 0.0, True, 0
    while busy:
        chunks, start = driver.stats.prefill_chunks, time.perf_counter()
        busy = driver.tick()
        seconds, stats = time.perf_counter() - start, driver.stats
        if stats.prefill_chunks > chunks:
            prefill_s, read = prefill_s + seconds, stats.prefill_tokens
        elif stats.running == load.slots:
            steps.append(seconds)
    total = time.perf_counter() - began
    stats = driver.stats
    assert stats.error == 0 and stats.output_tokens - before.output_tokens == load.slots * load.out
    step = statistics.median(steps)
    return {
        "step_ms": round(step * 1e3, 3),
        "decode_tokens_per_s": round(load.slots / step),
        "tokens_per_s": round(load.slots * load.out / total),
        "seconds": round(total, 2),
        "prefill_tokens_per_s": round((read - before.prefill_tokens) / max(prefill_s, 1e-9)),
    }


def uneven(engine: GlmEngine, params: transformer.Params, load: Load) -> dict[str, float]:
    """Tokens a second when outputs end at different lengths: four requests a slot asked at once,
    and a slot's worth at a time, the next when all of the last have ended.
    """
    rng = np.random.default_rng(2)
    count = 4 * load.slots
    asks = [
        (tokens, Sampling(max_tokens=int(n), seed=seed))
        for seed, (tokens, n) in enumerate(
            zip(
                prompts(engine.cfg, count, load.prompt),
                rng.integers(load.out // 16, load.out + 1, count),
                strict=True,
            )
        )
    ]
    tokens = sum(s.max_tokens for _, s in asks)
    found: dict[str, float] = {}
    for name, at_once in (("continuous", count), ("waves", load.slots)):
        driver, began = Driver(engine, params), time.perf_counter()
        for i in range(0, count, at_once):
            for ask in asks[i : i + at_once]:
                driver.submit(*ask)
            driver.run()
        found[f"{name}_tokens_per_s"] = round(tokens / (time.perf_counter() - began))
    return found


def torch_peer(params: transformer.Params, cfg: config.ModelConfig, load: Load) -> dict[str, Any]:
    """Transformers' `generate`, same weights, greedy, static cache off: milliseconds a new token
    from runs of two lengths, so that the prompt's pass is not in it.
    """
    try:
        import torch

        from experiments.bench.torch_model import glm4_moe
    except ModuleNotFoundError as error:
        return {"not measured": f"{error.name} is not installed"}
    if not torch.cuda.is_available():
        return {"not measured": "torch sees no GPU"}
    try:
        model = glm4_moe(params, cfg)
        ids = torch.tensor(prompts(cfg, load.slots, load.prompt), device="cuda")
        times = {}
        for new in (2, 2, 34):
            torch.cuda.synchronize()
            start = time.perf_counter()
            with torch.no_grad():
                model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False)
            torch.cuda.synchronize()
            times[new] = time.perf_counter() - start
        step = (times[34] - times[2]) / 32
        return {
            "step_ms": round(step * 1e3, 2),
            "decode_tokens_per_s": round(load.slots / step),
        }
    except Exception as error:  # a peer that fails is a row with its error
        return {"not measured": f"{type(error).__name__}: {str(error)[:300]}"}
    finally:
        model = ids = None
        gc.collect()
        torch.cuda.empty_cache()


def save(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """None; what was measured so far is in the result file, in the place of older rows of the same
    cases and beside those of others.
    """
    said = {k: " ".join(map(str, v)) if isinstance(v, list) else v for k, v in vars(args).items()}
    command = " ".join(f"--{k}" if v is True else f"--{k} {v}" for k, v in said.items() if v)
    key = "_".join(["rollout", args.model, *args.served])
    told = {"command": f"python -m experiments.bench.rollout {command}", "jax": jax.__version__}
    merge_rows(device_name(), key, [row | told for row in rows], CASE)


def measure(args: argparse.Namespace) -> None:
    """None; measures every load, prints and saves a row each."""
    cfg = {"mini": config.mini, "tiny": config.tiny}.get(args.model, lambda: air(args.layers))()
    params, rows = weights(cfg), []
    bandwidth = copy_bandwidth()
    experts = {n: touched(params, cfg, n) for n in args.batches}
    base = {"model": args.model, "layers": cfg.n_layers, "copy_gbs": round(bandwidth / 1e9)}
    loads = [Load(b, p, args.out) for p in args.prompts for b in args.batches]
    if args.peer:
        load = Load(max(b for b in args.batches if b <= 64), min(args.prompts), 0)
        rows.append(base | {"impl": "transformers generate"} | dataclasses.asdict(load))
        rows[-1] |= torch_peer(params, cfg, load)
        print(rows[-1], flush=True)
        gc.collect()
    for served in args.served:
        if served != "bf16" and not any(map(is_fp8, jax.tree.leaves(params, is_leaf=is_fp8))):
            params = jax.block_until_ready(quantize(params, cfg))
        engines = {n: engine_of(cfg, n, args, served == "fp8+kv8") for n in args.batches}
        began = time.perf_counter()
        with concurrent.futures.ThreadPoolExecutor(12) as pool:
            for job in compile_all(list(engines.values()), params, pool):
                job.result()
        print(f"{served}: compiled in {time.perf_counter() - began:.1f} s", flush=True)
        for load in loads:
            row = base | {"impl": served} | dataclasses.asdict(load)
            try:
                row |= serve(engines[load.slots], params, load)
                kv = 1 if served == "fp8+kv8" else jnp.dtype(cfg.dtype).itemsize
                need = step_bytes(params, cfg, load, experts[load.slots], kv)
                floor = need / bandwidth
                row |= {
                    "experts_touched": round(experts[load.slots], 1),
                    "gb_a_step": round(need / 1e9, 2),
                    "floor_ms": round(floor * 1e3, 3),
                    "pct_of_roofline": round(100 * floor * 1e3 / row["step_ms"], 1),
                }
                if load.slots == args.uneven and load.prompt == min(args.prompts):
                    row |= uneven(engines[load.slots], params, load)
            except Exception as error:  # what does not fit is a row too
                row["failed"] = f"{type(error).__name__}: {str(error)[:300]}"
            rows.append(row)
            print(row, flush=True)
            save(args, rows)
            gc.collect()


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=("air", "mini", "tiny"), default="mini")
    parser.add_argument("--layers", type=int, default=7, help="of Air, the dense one counted")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--prompts", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--out", type=int, default=1024)
    parser.add_argument("--served", nargs="+", choices=SERVED, default=["bf16"])
    parser.add_argument("--uneven", type=int, default=0, help="slots of the uneven load; 0: none")
    parser.add_argument("--peer", action="store_true")
    args = parser.parse_args()
    keep_compiled()
    measure(args)


if __name__ == "__main__":
    main()
