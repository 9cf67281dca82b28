"""JetStream, all there is of it: our engine as a true `jetstream.engine.engine_api.Engine`, under
JetStream's own driver (`jetstream_engine`, `orchestrator`), and our driver behind JetStream's gRPC
service (`serve_grpc`), which its load client speaks (`write_client_tokenizer`).

Written for google-jetstream 0.2.2, the last one published. What it imports is imported late: its
protocol costs nothing, its engine API brings TensorFlow.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import functools
import itertools
import logging
import threading
from concurrent.futures import Future
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from glm45_jax.model.transformer import Params
from glm45_jax.rollout.driver import Driver
from glm45_jax.rollout.engine import GlmEngine
from glm45_jax.rollout.fixed_rows import LENGTH, TOLD, VALID, FixedRows, Prefix, Slots
from glm45_jax.rollout.request import Request
from glm45_jax.rollout.sampling import SEEDS, Sampling
from glm45_jax.rollout.text_stream import TextStream, TokenBytes
from glm45_jax.rollout.types import Completion
from glm45_jax.tokenizer import END_OF_TEXT, Tokenizer

log = logging.getLogger(__name__)

BUCKETS = tuple(2**n for n in range(4, 16))  # lengths that JetStream pads a prompt to
NO_BOS = -1  # JetStream puts a "BOS" before every prompt; GLM has none, so this one is taken off


@functools.cache
def orchestrator() -> ModuleType:
    """`jetstream.core.orchestrator`, whose Driver and LLMOrchestrator run on `jetstream_engine`.

    Two things are mended, both inside that module: importing it sets the root logger to DEBUG with
    a handler of its own, which is undone; and its `delete_pytree` calls `jax.tree_map`, which jax
    no longer has, so the module gets one that does the same.

    What stays as it is: any exception in its threads kills the process; a cancelled call keeps its
    slot; a request with `session_cache` and token ids is such an exception. Use 8 slots or more:
    with few, an assertion about free slots races and fails.
    """
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    from jetstream.core import orchestrator

    root.setLevel(level)
    for handler in set(root.handlers) - set(handlers):
        root.removeHandler(handler)
    orchestrator.delete_pytree = delete_pytree
    return orchestrator


def delete_pytree(tree: Any) -> None:
    """None; every array of the tree is gone from its device."""
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array):
            leaf.delete()


@dataclasses.dataclass
class Held:
    """Weights as JetStream's threads keep them from their start to their end: set `params`, and the
    next prefill and the next step are by the new ones.
    """

    params: Params


def jetstream_engine(
    engine: GlmEngine,
    params: Params,
    tokenizer: Tokenizer,
    *,
    sampling: Sampling | None = None,
    mesh: Mesh | None = None,
) -> Any:
    """A `jetstream.engine.engine_api.Engine` over an engine, one sampling for all requests.

    Each slot owns `engine.row_pages` pages; the engine's own `pages` do not matter. sampling:
    temperature and the like, `seed` of the first row (each later one has the next), and what ends a
    row; `max_tokens` comes with each request. None is greedy to the tokenizer's stop ids. mesh:
    where the weights are; None is the first device. Weights change by `load_params().params = new`.

    Prompts: the BOS that JetStream puts first is taken off, so the model reads the ids that were
    sent. One that cannot be served (cut to the largest bucket by JetStream, no room for an answer,
    bad ids, empty) gets an empty answer and an error in the log, since JetStream has no way to say
    no. The stop id is not in what JetStream returns. A slot is given back only when JetStream sees
    the end; what a row draws after `max_tokens` is thrown away there.

    Raises: ValueError for an engine whose rows are shorter than JetStream's smallest bucket.
    """
    from jetstream.engine import engine_api, tokenizer_api

    if engine.max_tokens < BUCKETS[0]:
        raise ValueError(
            f"rows of {engine.max_tokens} tokens are shorter than JetStream's smallest bucket "
            f"{BUCKETS[0]}; raise max_tokens"
        )
    if sampling is None:
        sampling = _greedy(tokenizer)
    if mesh is None:
        mesh = jax.make_mesh((1,), ("data",), (AxisType.Auto,), devices=jax.devices()[:1])
    speaker = _subclass(_Speaker, tokenizer_api.Tokenizer)(tokenizer, sampling)
    rows = FixedRows(engine, sampling)
    return _subclass(_Adapter, engine_api.Engine)(rows, Held(params), speaker, mesh)


@functools.cache
def _subclass(ours: type, theirs: type) -> type:
    """Ours as a subclass of a class that is too dear to import with this file."""
    return type(ours.__name__, (ours, theirs), {"__doc__": ours.__doc__})


class _Adapter:
    """See `jetstream_engine`; the methods are those of JetStream's `Engine`."""

    def __init__(self, rows: FixedRows, held: Held, speaker: Any, mesh: Mesh) -> None:
        self._rows, self._held, self._speaker, self._mesh = rows, held, speaker, mesh

    def load_params(self, *args: Any, **kwargs: Any) -> Held:
        """The holder of the weights, the same one each time."""
        return self._held

    def init_decode_state(self, *args: Any, **kwargs: Any) -> Slots:
        """Every slot idle."""
        return self._rows.init()

    def prefill(
        self, *, params: Held, existing_prefix: Any = None, padded_tokens: Any, true_length: int
    ) -> Prefix:
        """The keys and values of a prompt."""
        if existing_prefix is not None:
            raise ValueError("existing_prefix is not supported; prefill the whole prompt")
        tokens = np.asarray(padded_tokens).astype(np.int64).tolist()
        cut = int(true_length) - len(tokens)
        tokens = tokens[1 if tokens[0] == NO_BOS else 0 : int(true_length)]
        why = self._rows.refusal(tokens)
        if cut > 0:
            why = f"of {true_length} ids JetStream took the first {cut} away"
        if why:
            log.error("a prompt that cannot be served gets an empty answer: %s", why)
            return Prefix(np.int32(0))
        return self._rows.prefill(params.params, tokens)

    def insert(self, prefix: Prefix, decode_state: Slots, slot: int) -> Slots:
        """A prompt takes a slot."""
        return self._rows.insert(prefix, decode_state, slot)

    def generate(self, params: Held, decode_state: Slots) -> tuple[Slots, Any]:
        """The next token of every slot. One only, also where drafts gave more: to JetStream a
        second token that is not valid is the end of the request.
        """
        from jetstream.engine import engine_api

        slots, told = self._rows.generate(params.params, decode_state)
        columns = [(column, column + 1) for column in (TOLD, VALID, LENGTH)]
        return slots, engine_api.ResultTokens(told, *columns, samples_per_slot=1)

    def get_prefix_destination_sharding(self) -> NamedSharding:
        """A copy on every device of the mesh."""
        return NamedSharding(self._mesh, PartitionSpec())

    def get_tokenizer(self) -> Any:
        """Says nothing: `build_tokenizer` needs no file."""
        from jetstream.engine import tokenizer_pb2

        return tokenizer_pb2.TokenizerParameters()

    def build_tokenizer(self, metadata: Any) -> Any:
        """The tokenizer as JetStream asks it."""
        return self._speaker

    @property
    def max_concurrent_decodes(self) -> int:
        """Slots."""
        return self._rows.engine.slots

    @property
    def samples_per_slot(self) -> int:
        """One."""
        return 1

    @property
    def max_prefill_length(self) -> int:
        """The largest bucket of JetStream that a row holds."""
        return max(n for n in BUCKETS if n <= self._rows.engine.max_tokens)

    @property
    def mesh(self) -> Mesh:
        """Where the weights are."""
        return self._mesh

    @property
    def colocated_cpus(self) -> None:
        """None that matter."""
        return None


class _Speaker:
    """A tokenizer as JetStream's `Tokenizer`."""

    def __init__(self, tokenizer: Tokenizer, sampling: Sampling) -> None:
        self._tokenizer, self._table = tokenizer, TokenBytes(tokenizer)
        self._stop = set(sampling.stop)

    def encode(self, s: str, **kwargs: Any) -> tuple[Any, int]:
        """Ids after `NO_BOS`, padded to a bucket, and how many there are."""
        from jetstream.engine import token_utils

        ids = np.asarray(self._tokenizer.encode(s), np.int32)
        return token_utils.pad_tokens(ids, self.bos_id, self.pad_id, **kwargs)

    def decode(self, token_ids: list[int], **kwargs: Any) -> str:
        """Text of one id. Of a cut character, JetStream's name of the byte, which it joins with the
        next; two bytes of it have no such name and are U+FFFD.
        """
        (token,) = token_ids
        found = self._table.of(token)
        with contextlib.suppress(UnicodeDecodeError):
            return found.decode()
        return f"<0x{found[0]:02X}>" if len(found) == 1 else found.decode(errors="replace")

    @property
    def stop_tokens(self) -> set[int]:
        """Ids that end a request; unlike JetStream's own, not the padding's, which is a word."""
        return self._stop

    @property
    def pad_id(self) -> int:
        """JetStream wants 0; nothing past the true length is read."""
        return 0

    @property
    def eos_id(self) -> int:
        """Of `<|endoftext|>`."""
        return self._tokenizer.id_of(END_OF_TEXT)

    @property
    def bos_id(self) -> int:
        """No id of the model's, so that it is seen and taken off."""
        return NO_BOS


@dataclasses.dataclass
class GrpcServer:
    """A server that runs, in the loop that ticks the driver. port: the one it has."""

    port: int
    _server: Any
    _loop: asyncio.AbstractEventLoop
    _starts: asyncio.Task[None] | None = None
    _ended: asyncio.Event | None = None
    _thread: threading.Thread | None = None

    async def aclose(self) -> None:
        """None; open calls are cancelled, their slots free. In the loop that was given."""
        await self._server.stop(None)

    def stop(self) -> None:
        """`aclose`, and the end of the thread where there is one. From any other thread."""
        asyncio.run_coroutine_threadsafe(self.aclose(), self._loop).result()
        if self._ended is not None and self._thread is not None:
            self._loop.call_soon_threadsafe(self._ended.set)
            self._thread.join()


def serve_grpc(
    driver: Driver,
    tokenizer: Tokenizer,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    loop: asyncio.AbstractEventLoop | None = None,
    sampling: Sampling | None = None,
) -> GrpcServer:
    """JetStream's `Orchestrator` service over a driver, running: `Decode` and `HealthCheck`.

    port: 0 finds a free one. loop: that of another server of the same driver, since one loop ticks
    a driver; None runs one in a thread. sampling: of all requests, as the protocol has none (each
    has the next seed, `max_tokens` comes with it); None is greedy to the tokenizer's stop ids.

    A response tells what was drawn since the last: ids, and with a text prompt their text, whole
    characters only. The stop id is among the ids and not in the text. A text prompt is plain text;
    markup like `<|user|>` goes as ids. `priority` changes nothing; `session_cache` is refused. The
    trailing metadata say `finish` ("stop" or "length") and the `version` of the last weights.
    A call that is cancelled gives its slot back before the next step.

    Raises: OSError where the port is taken; ValueError where JetStream is not installed.
    """
    service = _Orchestrator(driver, tokenizer, sampling or _greedy(tokenizer))
    if loop is not None and loop is _running_loop():
        server, port = _bind(service, host, port)
        return GrpcServer(port, server, loop, _starts=loop.create_task(server.start()))
    if loop is not None:
        started = asyncio.run_coroutine_threadsafe(_started(service, host, port), loop).result()
        return GrpcServer(started[1], started[0], loop)
    ready: Future[GrpcServer] = Future()
    thread = threading.Thread(
        target=lambda: asyncio.run(_until_stopped(service, host, port, ready)),
        name="jetstream-grpc",
        daemon=True,
    )
    thread.start()
    return dataclasses.replace(ready.result(), _thread=thread)


def write_client_tokenizer(tokenizer: Tokenizer, path: str | Path) -> None:
    """Writes the base vocabulary as JetStream's load client reads it, with the ids of our own:

    python SITE/benchmarks/benchmark_serving.py --model llama-3 --tokenizer PATH --dataset ...

    Llama 3 cuts text as GLM does, and 256 special ids follow its base vocabulary. (The client's own
    default, `--tokenizer test`, does not run.) It keeps a copy of the file under its path; set
    TIKTOKEN_CACHE_DIR to nothing where the path gets another file.
    """
    table = TokenBytes(tokenizer)
    words = (table.of(i) for i in range(tokenizer.id_of(END_OF_TEXT)))
    lines = [f"{base64.b64encode(word).decode()} {i}\n" for i, word in enumerate(words)]
    Path(path).write_text("".join(lines), encoding="ascii")


def _greedy(tokenizer: Tokenizer) -> Sampling:
    return Sampling(temperature=0.0, stop=tokenizer.stop_ids)


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _bind(service: _Orchestrator, host: str, port: int) -> tuple[Any, int]:
    """A server with a port, and that. Raises: OSError where it is taken."""
    try:
        import grpc
        from jetstream.core.proto import jetstream_pb2_grpc
    except ModuleNotFoundError as error:
        raise ValueError(
            f"gRPC is JetStream's, and that is not installed ({error}): on Python 3.12, "
            "pip install 'glm45_jax[jetstream]'"
        ) from error

    # By default a second server may have the same port, and half of the calls.
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    jetstream_pb2_grpc.add_OrchestratorServicer_to_server(service, server)
    try:
        at = f"[{host}]" if ":" in host else host
        return server, server.add_insecure_port(f"{at}:{port}")
    except RuntimeError as error:
        raise OSError(f"no gRPC server on {host}:{port} ({error}); use another port") from error


async def _started(service: _Orchestrator, host: str, port: int) -> tuple[Any, int]:
    server, port = _bind(service, host, port)
    await server.start()
    return server, port


async def _until_stopped(
    service: _Orchestrator, host: str, port: int, ready: Future[GrpcServer]
) -> None:
    try:
        server, port = await _started(service, host, port)
    except (OSError, ValueError) as error:
        ready.set_exception(error)
        return
    ended = asyncio.Event()
    ready.set_result(GrpcServer(port, server, asyncio.get_running_loop(), _ended=ended))
    await ended.wait()


class _Orchestrator:
    """The service. See `serve_grpc`; the methods have JetStream's names."""

    def __init__(self, driver: Driver, tokenizer: Tokenizer, sampling: Sampling) -> None:
        self._driver, self._tokenizer, self._sampling = driver, tokenizer, sampling
        self._engine = driver.engine
        self._table = TokenBytes(tokenizer)
        self._served = itertools.count()

    async def HealthCheck(self, request: Any, context: Any) -> Any:
        """Whether requests can be served."""
        from jetstream.core.proto import jetstream_pb2

        return jetstream_pb2.HealthCheckResponse(is_live=not self._driver.broken)

    async def Decode(self, request: Any, context: Any) -> None:
        """Writes responses to the context."""
        import grpc

        code = grpc.StatusCode
        if request.session_cache:
            why = "session_cache is not supported; send the whole prompt and leave it empty"
            await context.abort(code.UNIMPLEMENTED, why)
        try:
            tokens, text, sampling = self._read(request)
        except ValueError as error:
            await context.abort(code.INVALID_ARGUMENT, str(error))
        stream = self._driver.stream(tokens, sampling)
        async with contextlib.aclosing(stream):
            async for item in stream:
                if isinstance(item, Completion):
                    break
                drawn = item.tokens_T.tolist()
                told = "" if text is None else "".join(map(text.feed, drawn))
                await context.write(_response(told, drawn))
        assert isinstance(item, Completion)
        if item.finish not in ("stop", "length"):
            await context.abort(*_failure(item))
        if text is not None and (rest := text.close()):
            await context.write(_response(rest, []))
        context.set_trailing_metadata(
            (("finish", item.finish), ("version", str(item.versions[-1])))
        )

    def _read(self, request: Any) -> tuple[list[int], TextStream | None, Sampling]:
        """Prompt, the stream of the text to send (None for ids alone), and sampling.

        Raises: ValueError for what cannot be served.
        """
        text = None
        match request.WhichOneof("content"):
            case "text_content":
                tokens = self._tokenizer.encode(request.text_content.text)
                text = TextStream(self._table)
            case "token_content":
                tokens = list(request.token_content.token_ids)
            case _:
                raise ValueError("the request has no content; set text_content or token_content")
        sampling = dataclasses.replace(self._sampling, max_tokens=request.max_tokens)
        if why := Request(0, tokens, sampling).refusal(self._engine):
            raise ValueError(why)
        seed = (self._sampling.seed + next(self._served)) % SEEDS
        return tokens, text, dataclasses.replace(sampling, seed=seed)


def _response(text: str, ids: list[int]) -> Any:
    from jetstream.core.proto import jetstream_pb2

    content = jetstream_pb2.DecodeResponse.StreamContent
    sample = content.Sample(text=text, token_ids=ids)
    return jetstream_pb2.DecodeResponse(stream_content=content(samples=[sample]))


def _failure(completion: Completion) -> tuple[Any, str]:
    """Status and message of a completion that did not end by itself."""
    import grpc

    if completion.finish != "error":
        return grpc.StatusCode.CANCELLED, f"the server ended the request: {completion.finish}"
    if completion.error.endswith("try later"):  # the driver's queue is full
        return grpc.StatusCode.RESOURCE_EXHAUSTED, completion.error
    return grpc.StatusCode.INTERNAL, completion.error
