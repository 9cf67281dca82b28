"""Tokens a second and MFU of the train step of `mini`, on whatever device is here, beside its peers
in the same run.

Peers: a dense matmul (the ceiling), the same step with AdamW, and, where torch sees a GPU,
transformers' `Glm4Moe` of the same shape with fused AdamW (it has no MTP layer and no balance loss:
it does less work a token, which is stated). Needs neither grain nor tokenizers: tokens are random,
routing is that of random weights with the bias rule on.
"""

import argparse
import dataclasses
import statistics
import time
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench.results import device_name, merge_result
from glm45_jax.data.types import Batch
from glm45_jax.kernels.grouped_matmul import grouped_matmul
from glm45_jax.model import config, cost
from glm45_jax.optim.mixed import AdamW
from glm45_jax.optim.muon import Muon
from glm45_jax.optim.schedules import Constant
from glm45_jax.sharding import MeshShape
from glm45_jax.train.parallel import Recipe, make_trainer
from glm45_jax.train.state import Train


@dataclasses.dataclass(frozen=True)
class Case:
    """One timed step: rows of seq_len tokens of `mini`."""

    rows: int
    seq_len: int
    steps: int
    dtype: Literal["bfloat16", "float32"]


CASES = {
    "gpu": Case(32, 2048, 20, "bfloat16"),
    "tpu": Case(32, 2048, 20, "bfloat16"),
    "cpu": Case(1, 512, 3, "float32"),
}


def random_batch(case: Case, vocab: int) -> Batch:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocab, (case.rows, case.seq_len + 1)).astype(np.int32)
    ones = np.ones((case.rows, case.seq_len), np.int32)
    places = np.tile(np.arange(case.seq_len, dtype=np.int32), (case.rows, 1))
    return Batch(tokens[:, :-1], tokens[:, 1:], ones, places, ones.astype(np.float32))


def time_steps(case: Case, optim: Muon | AdamW, cfg: config.ModelConfig) -> dict[str, Any]:
    """Median seconds of a step, after two that warm up, and what follows from it."""
    recipe = Recipe(
        cfg, optim, Train(steps=100, rows=case.rows, bias_rate=Constant(1e-3)), packed=False
    )
    trainer = make_trainer(MeshShape(data=-1, fsdp=1), recipe)
    state, batch = trainer.init(jax.random.key(0)), random_batch(case, cfg.vocab)
    began = time.perf_counter()
    times = []
    for i in range(case.steps + 2):
        start = time.perf_counter()
        state, out = trainer.step(state, batch)
        loss = float(out.scalars["loss"])
        times.append(time.perf_counter() - start)
        if i == 0:
            compile_s = time.perf_counter() - began
    seconds = statistics.median(times[2:])
    rate = case.rows * case.seq_len / seconds
    peak, source = cost.peak_flops(jax.devices()[0])
    return {
        "step_ms": round(seconds * 1e3, 2),
        "spread_ms": round((max(times[2:]) - min(times[2:])) * 1e3, 2),
        "tokens_per_s": round(rate),
        "mfu": round(cost.mfu(rate, cfg, case.seq_len, jax.device_count(), peak), 4),
        "peak": source,
        "first_step_s": round(compile_s, 1),
        "last_loss": round(loss, 3),
        "load_max_over_mean": round(float(out.scalars["load_max_over_mean"]), 2),
    }


def matmul_ceiling(dtype: str) -> float:
    """TFLOP/s of a large square product in this run."""
    n = 8192 if jax.default_backend() != "cpu" else 2048
    a = jax.random.normal(jax.random.key(0), (n, n), jnp.dtype(dtype))
    f = jax.jit(lambda a: a @ a)
    f(a).block_until_ready()
    times = []
    for _ in range(10):
        start = time.perf_counter()
        f(a).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * n**3 / statistics.median(times) / 1e12


def grouped_matmul_tflops(case: Case, cfg: config.ModelConfig) -> dict[str, float]:
    """TFLOP/s, forward and backward, of each way to multiply the experts of one layer (even
    groups).
    """
    rows, moe, D = case.rows * case.seq_len * cfg.moe.top_k, cfg.moe, cfg.d_model
    dtype = jnp.dtype(case.dtype)
    x = jax.random.normal(jax.random.key(0), (rows, D), dtype)
    w = jax.random.normal(jax.random.key(1), (moe.experts, D, moe.d_expert), jnp.float32)
    sizes = jnp.full(moe.experts, rows // moe.experts, jnp.int32)
    found = {}
    for impl in ("blocked", "reference"):
        f = jax.jit(
            jax.grad(
                lambda x, w, impl=impl: (
                    grouped_matmul(x, w, sizes, impl=impl).sum().astype(jnp.float32)
                ),
                (0, 1),
            )
        )
        jax.block_until_ready(f(x, w))
        times = []
        for _ in range(5):
            start = time.perf_counter()
            jax.block_until_ready(f(x, w))
            times.append(time.perf_counter() - start)
        found[impl] = round(6 * rows * D * moe.d_expert / statistics.median(times) / 1e12, 3)
    return found


def torch_peer(case: Case, cfg: config.ModelConfig) -> dict[str, Any]:
    """Transformers' Glm4Moe of this shape: forward, backward, fused AdamW, bf16 autocast off
    (weights bf16).
    """
    try:
        import torch
        import transformers

        from experiments.bench.torch_model import glm4_config
    except ModuleNotFoundError as error:
        return {"not measured": f"{error.name} is not installed"}
    if not torch.cuda.is_available():
        return {"not measured": "torch sees no GPU"}
    if not isinstance(cfg.mixer, config.Gqa):
        return {"not measured": f"the peer has no {type(cfg.mixer).__name__}"}
    shape = glm4_config(cfg, use_cache=False)
    results: dict[str, Any] = {
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}"
    }
    for experts in ("grouped_mm", "eager"):
        results[experts] = _time_torch(case, shape, experts)
    return results


def _time_torch(case: Case, shape: Any, experts: str) -> dict[str, Any]:
    import torch
    import transformers

    try:
        model = transformers.AutoModelForCausalLM.from_config(
            shape, dtype=torch.bfloat16, attn_implementation="sdpa", experts_implementation=experts
        ).cuda()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        rows = (
            case.rows // 4
        )  # the logits of all rows at once do not fit; gradients are summed over four parts
        ids = torch.randint(0, shape.vocab_size, (4, rows, case.seq_len), device="cuda")
        times = []
        for _ in range(6):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for part in ids:
                (model(input_ids=part, labels=part).loss / 4).backward()
            optimizer.step()
            optimizer.zero_grad()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    except (TypeError, ValueError, RuntimeError) as error:
        return {"not measured": f"{type(error).__name__}: {str(error)[:200]}"}
    seconds = statistics.median(times[2:])
    return {
        "step_ms": round(seconds * 1e3, 1),
        "tokens_per_s": round(case.rows * case.seq_len / seconds),
    }


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--peer", action="store_true", help="also time transformers' Glm4Moe (needs a GPU)"
    )
    peer = parser.parse_args().peer
    case = CASES[jax.default_backend()]
    cfg = dataclasses.replace(config.mini(), dtype=case.dtype)
    value: dict[str, Any] = {
        "command": "python -m experiments.bench.train_step" + (" --peer" if peer else ""),
        "jax": jax.__version__,
        "case": dataclasses.asdict(case),
        "flops_per_token": cost.flops_per_token(cfg, case.seq_len).total,
        "matmul_tflops": round(matmul_ceiling(case.dtype), 1),
        "grouped_matmul_tflops": grouped_matmul_tflops(case, cfg),
    }
    for name, optim in (("muon", Muon(dtype=case.dtype)), ("adamw", AdamW())):
        value[name] = time_steps(case, optim, cfg)
        print(f"{name:8} {value[name]}", flush=True)
    value["transformers"] = (
        torch_peer(case, cfg) if peer else {"not measured": "--peer was not given"}
    )
    print(
        f"peer     {value['transformers']}\nmatmul   {value['matmul_tflops']} TFLOP/s, "
        f"grouped {value['grouped_matmul_tflops']}"
    )
    print(f"wrote {merge_result(device_name(), 'train_step', value)}")


if __name__ == "__main__":
    main()
