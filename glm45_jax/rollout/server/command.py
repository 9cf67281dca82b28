"""Serves a model: `python -m glm45_jax.rollout.server --checkpoint DIR --port N [--grpc-port M]`.

OpenAI-compatible HTTP, and JetStream's gRPC beside it, on one driver in one event loop. On SIGTERM
or SIGINT no more requests are taken, those that run have time to end, and the exit code is 0.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import logging
import os
import pathlib
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

import jax
import uvicorn

from glm45_jax import metrics
from glm45_jax import params as params_lib
from glm45_jax.chat import FAMILIES
from glm45_jax.checkpoint import DamagedError
from glm45_jax.model.block import compute_dtype
from glm45_jax.model.config import ModelConfig
from glm45_jax.rollout import weights
from glm45_jax.rollout.driver import Driver
from glm45_jax.rollout.engine import GlmEngine
from glm45_jax.rollout.server.app import ADMIN_TOKEN, Service
from glm45_jax.rollout.server.model import Model, open_model, open_weights
from glm45_jax.rollout.server.requests import Served
from glm45_jax.rollout.types import Policy

BAD_INPUT = 2  # exit code
GRACE_SECONDS = 10.0  # for requests that run when the server is told to end
PAGE = 16  # tokens
BUCKETS = (16, 64, 256, 1024)

log = logging.getLogger("glm45_jax")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m glm45_jax.rollout.server", description=__doc__)
    add = p.add_argument
    add("--checkpoint", type=pathlib.Path, required=True, help="a workdir or a released folder")
    add("--step", type=int, help="of a workdir; default the newest")
    add("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in")
    add("--port", type=int, default=8000, help="of HTTP; 0 takes a free one")
    add("--grpc-port", type=int, help="serve JetStream's gRPC too")
    add("--name", help="what clients call the model; default the folder's name")
    add("--family", choices=tuple(FAMILIES), help="chat format; default that of the folder")
    add(
        "--admin-token",
        type=pathlib.Path,
        metavar="FILE",
        help=f"holds what admin calls must bring; default {ADMIN_TOKEN} of the environment",
    )
    add("--slots", type=int, default=16, help="outputs that are drawn together")
    add("--max-tokens", type=int, default=4096, help="of a prompt and its output")
    add("--pages", type=int, help=f"of {PAGE} tokens; default enough for all slots")
    add("--draft", type=int, default=0, help="tokens that MTP drafts a step, 0 to 3")
    add("--steps", type=int, default=1, help="decode steps of a call; more tokens a second, later")
    add("--fp8", action="store_true", help="quantise linear weights to FP8")
    add("--kv-dtype", choices=("float8_e4m3fn",), help="of the cache; default the model's")
    add("--top-logprobs", type=int, default=0, help="likeliest tokens that can be asked for")
    add("--routes", action="store_true", help="let /generate return experts")
    add("--rope-theta", type=float, help="of a run whose stages had several")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 after a signal, 2 for bad input."""
    args = parser().parse_args(argv)
    metrics.setup_logging()
    try:
        token = _admin_token(args.admin_token)
        with _bound(args.host, args.port) as sock:
            served, driver, push = _open(args)
            service = Service(driver, served, admin_token=token, push=push)
            asyncio.run(_serve(service, sock, _grpc(args, driver, served)))
    except (ValueError, OSError, DamagedError) as error:
        sys.stderr.write(f"error: {error}\n")
        return BAD_INPUT
    return 0


async def run_http(
    service: Service, sock: socket.socket, stop: asyncio.Event, ready: Callable[[], None]
) -> None:
    """None, once `stop` is set and what ran has ended. sock: bound. ready: called when clients are
    answered.
    """
    config = uvicorn.Config(
        service.app(),
        http="h11",
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=1,  # nothing runs by then but for clients that do not read
    )
    server = _Uvicorn(config)
    task = asyncio.create_task(server.serve([sock]))
    while not server.started and not task.done():
        await asyncio.sleep(0.01)
    if not task.done():
        ready()
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        await service.drain(GRACE_SECONDS)
        server.should_exit = True
    await task
    for connection in list(server.server_state.connections):  # of clients that read nothing
        connection.transport.abort()


class _Uvicorn(uvicorn.Server):
    """Uvicorn without signal handlers: it would raise the signal again at the end."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """None."""
        yield


async def _serve(service: Service, sock: socket.socket, grpc: Callable[[], Any] | None) -> None:
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    other = grpc() if grpc is not None else None
    host, port = sock.getsockname()[:2]
    at = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"

    def ready() -> None:
        log.info("serving %s%s", at, f" and gRPC on port {other.port}" if other else "")

    try:
        await run_http(service, sock, stop, ready)
    finally:
        if other is not None:
            await other.aclose()


def _grpc(args: argparse.Namespace, driver: Driver, served: Served) -> Callable[[], Any] | None:
    if args.grpc_port is None:
        return None

    def start() -> Any:
        from glm45_jax.rollout import jetstream  # grpc is not on every machine that serves HTTP

        return jetstream.serve_grpc(
            driver,
            served.tokenizer,
            host=args.host,
            port=args.grpc_port,
            loop=asyncio.get_running_loop(),
        )

    return start


def _open(args: argparse.Namespace) -> tuple[Served, Driver, Callable[..., Awaitable[None]]]:
    """The model behind the doors, the driver, and how other weights get there."""
    device = jax.local_devices()[0]
    host = jax.local_devices(backend="cpu")[0]
    model = open_model(
        args.checkpoint,
        # FP8 weights are made on the host: the device need not hold what they are made of.
        device=host if args.fp8 else device,
        step=args.step,
        mtp=args.draft > 0,
        rope_theta=args.rope_theta,
        family=args.family,
    )
    cfg = model.cfg
    engine = _engine(args, cfg)
    driver = Driver(engine, _first(model, device, fp8=args.fp8))
    name = args.name or args.checkpoint.resolve().name
    served = Served.of(name, model.family, model.tokenizer, engine)
    log.info(
        "%s: %s, %d slots, %d pages of %d tokens, rows of %d",
        *(name, served.family, engine.slots, engine.pages, engine.page, engine.max_tokens),
    )

    async def push(path: str, step: int | None, version: int, policy: Policy) -> None:
        driver.check_newer(version)
        # By way of the host: the device holds the old weights and the new ones, and nothing else.
        read = functools.partial(open_weights, pathlib.Path(path), cfg, device=host, step=step)
        params = await asyncio.to_thread(read)
        how = weights.Push(policy, args.fp8)
        await weights.update(driver, params, version, cfg=cfg, to=device, how=how)

    return served, driver, push


def _first(model: Model, device: jax.Device, *, fp8: bool) -> Any:
    """The weights that a driver begins with, on its device and as those of a push are."""
    dtype = compute_dtype(model.cfg)
    exact = all(
        leaf.dtype == dtype or params_lib.path_name(path).split(".")[-1] in weights.EXACT
        for path, leaf in jax.tree_util.tree_leaves_with_path(model.params)
    )
    if exact and not fp8:
        return model.params  # a copy would need as much room again
    return weights.stage(weights.prepare(model.params, 0, cfg=model.cfg, fp8=fp8), device).params


def _engine(args: argparse.Namespace, cfg: ModelConfig) -> GlmEngine:
    rows = -(-args.max_tokens // PAGE)
    return GlmEngine(
        cfg,
        slots=args.slots,
        pages=args.pages or args.slots * rows,
        page=PAGE,
        max_tokens=args.max_tokens,
        buckets=BUCKETS,
        spans=tuple(sorted({n for n in (rows // 16, rows // 4) if n})),
        routes=args.routes,
        top_logprobs=args.top_logprobs,
        draft=args.draft,
        steps=args.steps,
        kv_dtype=args.kv_dtype,
    )


def _admin_token(file: pathlib.Path | None) -> str | None:
    """Raises: ValueError for a token that is empty or no header can carry."""
    token = os.environ.get(ADMIN_TOKEN) if file is None else file.read_text(encoding="utf-8")
    if token is None:
        return None
    token = token.strip()
    if not token or not token.isascii() or not token.isprintable():
        where = ADMIN_TOKEN if file is None else file
        raise ValueError(f"the admin token in {where} is empty or not printable ASCII; write one")
    return token


def _bound(host: str, port: int) -> socket.socket:
    """A socket of that address, before anything is loaded: a port that is taken is told at once."""
    sock = None
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, proto)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except (OSError, OverflowError) as error:
        if sock is not None:
            sock.close()
        raise ValueError(f"cannot serve on {host}:{port}: {error}; use another --port") from error
    return sock
