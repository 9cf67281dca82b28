"""What benchmarks of RL compile before it is called, in threads. Types: `Ahead`; `served`, an
engine's programs; `batch_of`, the shapes of a batch of RL.

A jitted function takes what was lowered and compiled of the same shapes in the same places: threads
compile while the weights are read and the first scores are taken.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from glm45_jax import params as params_lib
from glm45_jax.model import transformer
from glm45_jax.model.block import compute_dtype
from glm45_jax.model.config import ModelConfig
from glm45_jax.model.quantize import quantize
from glm45_jax.rl.batch import RlBatch
from glm45_jax.rl.config import Rl
from glm45_jax.rl.update import Updater
from glm45_jax.rollout import engine as engines
from glm45_jax.rollout.sampling import Sampling, knobs
from glm45_jax.rollout.types import Prefilled
from glm45_jax.rollout.weights import EXACT
from glm45_jax.train.ahead import batch_shapes, compiled

log = logging.getLogger(__name__)

Lower = Callable[[], jax.stages.Lowered]


class Ahead:
    """Programs that threads compile, in the order asked; one traces at a time (`train.ahead`)."""

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, "compile")
        self._asked: dict[str, Future[float]] = {}

    def ask(self, name: str, compile_: Callable[[], float]) -> None:
        """None; a name that was asked before is not asked again. compile_: gives its seconds."""
        if name not in self._asked:
            self._asked[name] = self._pool.submit(compile_)
            self._asked[name].add_done_callback(functools.partial(_say, name))

    def lower(self, name: str, lower: Lower) -> None:
        """`ask` of what a jitted function lowers."""
        self.ask(name, functools.partial(_compile, lower))

    def wait(self, begin: str) -> None:
        """None, once all that was asked under names that begin so is there, or is known to fail."""
        for name, made in list(self._asked.items()):
            if name.startswith(begin):
                made.exception()

    def close(self) -> None:
        """None; what was not begun is dropped."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def _compile(lower: Lower) -> float:
    began = time.monotonic()
    compiled(lower)
    return time.monotonic() - began


def _say(name: str, made: Future[float]) -> None:
    if made.cancelled():
        return
    if error := made.exception():
        log.error("%s does not compile ahead; its first call raises the same", name, exc_info=error)
    else:
        log.info("compiled ahead in %.1f s: %s", made.result(), name)


def served(cfg: ModelConfig, rl: Rl, device: jax.Device) -> Iterator[tuple[str, Lower]]:
    """Programs of the engine of a run, by name. Its first prefill sees a state that nobody has put
    anywhere yet, which is another program.
    """
    engine = rl.serving.engine(cfg, routes=rl.update.replay)
    params = jax.eval_shape(functools.partial(_weights, cfg=cfg, fp8=rl.push.fp8))
    put = functools.partial(jax.tree.map, functools.partial(_placed, device=device))
    params, idle = put(params), jax.eval_shape(engine.init)
    state = put(idle)
    table = _of((engine.slots, engine.row_pages), jnp.int32)
    active = _of((engine.slots,), jnp.bool_)
    yield (
        "decode",
        lambda: engines.decode.lower(
            params,
            state,
            table,
            active,
            cfg=cfg,
            routes=engine.routes,
            top=engine.top_logprobs,
            steps=engine.steps,
        ),
    )
    for name, held in (("first prefill", idle), ("prefill", state)):
        for rows in sorted({1, engine.together}):
            for width in engine.buckets:
                yield (
                    f"{name} of {rows} x {width}",
                    functools.partial(
                        engines.prefill.lower,
                        params,
                        held,
                        _of((rows, width), jnp.int32),
                        _of((rows,), jnp.int32),
                        _of((rows,), jnp.int32),
                        _of((rows, engine.row_pages), jnp.int32),
                        cfg=cfg,
                        routes=engine.routes,
                        fresh=True,
                    ),
                )
    last = put(Prefilled(_of((1, cfg.vocab), jnp.float32), None, None))
    row = jax.tree.map(lambda x: _of(x.shape, x.dtype), knobs([Sampling()] * engine.seats))
    numbers, top = _of((5, engine.seats), jnp.int32), engine.top_logprobs
    yield (
        "insert",
        lambda: engines.insert.lower(state, (last,) * engine.seats, row, numbers, top=top),
    )


def batch_of(rows: int, seq_len: int, cfg: ModelConfig, rl: Rl) -> RlBatch:
    """Shapes of a batch as the loop gives it to an update: where there is one update a batch, that
    one scores; else the trainer has scored it before.
    """
    numbers, alone = _of((rows, seq_len), jnp.float32), rl.recompute and rl.updates == 1
    routes = (rows, seq_len, cfg.n_moe, cfg.moe.top_k)
    return RlBatch(
        batch=batch_shapes(rows, seq_len),
        logp_BT=numbers,
        advantage_BT=numbers,
        weight_BT=numbers,
        version_B=_of((rows,), jnp.int32),
        routes_BTLA=_of(routes, jnp.int16) if rl.update.replay else None,
        old_logp_BT=numbers if rl.recompute and not alone else None,
        fresh_B=_of((rows,), jnp.bool_) if alone else None,
        temperature_BT=numbers,
    )


def without_mesh(made: Updater) -> Updater:
    """The same, its weights those of the first device, where they are whole: arrays of a mesh carry
    it in their type, and the engine would be traced anew for it.
    """
    return dataclasses.replace(made, params=lambda state: first_device(made.params(state)))


def first_device(tree: Any) -> Any:
    """What the first device of this host holds, not copied."""
    return jax.tree.map(lambda x: x.addressable_data(0), tree)


def ask_all(ahead: Ahead, begin: str, programs: Iterable[tuple[str, Lower]]) -> None:
    """None; programs are asked under names that begin so."""
    for name, lower in programs:
        ahead.lower(f"{begin}{name}", lower)


def _weights(*, cfg: ModelConfig, fp8: bool) -> Any:
    """Weights as `rollout.weights.prepare` makes them; for their shapes."""

    def made(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        exact = params_lib.path_name(path).split(".")[-1] in EXACT
        return jnp.zeros(leaf.shape, leaf.dtype if exact else compute_dtype(cfg))

    plan = params_lib.abstract(transformer.specs(cfg))
    tree = jax.tree_util.tree_map_with_path(made, plan)
    return quantize(tree, cfg) if fp8 else tree


def _of(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _placed(leaf: Any, *, device: jax.Device) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=SingleDeviceSharding(device))
