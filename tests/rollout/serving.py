"""A server in a thread of the test process, and an engine that says what it is told to."""

import argparse
import asyncio
import contextlib
import dataclasses
import functools
import inspect
import socket
import threading
import time
import typing

import numpy as np

from glm45_jax.rollout.driver import Driver
from glm45_jax.rollout.sampling import Draw
from glm45_jax.rollout.server.app import Service
from glm45_jax.rollout.server.command import run_http
from glm45_jax.rollout.server.requests import Served
from glm45_jax.rollout.types import Prefilled, Step
from glm45_jax.tokenizer import train_bpe

TOKEN = "let-me-in"
VOCAB = 600
USER = [{"role": "user", "content": "hi"}]
CHAT, COMPLETION, GENERATE = "/v1/chat/completions", "/v1/completions", "/generate"


@functools.cache
def tokenizer():
    return train_bpe([inspect.getsource(module) for module in (argparse, typing)], VOCAB)


def ids_of(text):
    """Ids of a text in which tags are tags."""
    return tokenizer().encode(text, allow_special=True)


@dataclasses.dataclass
class Scripted:
    """A `SlotEngine` of scripts: a request of seed s gets the ids of script s modulo their number,
    and `<|endoftext|>` after that. Token t has the log-prob -t / 100, and -t / 50 raw.
    """

    scripts: list[list[int]] = dataclasses.field(default_factory=lambda: [[]])
    step_seconds: float = 0.0
    fails: BaseException | None = None  # raised by the next decode
    slots: int = 4
    pages: int = 128
    page: int = 16
    max_tokens: int = 512
    chunk: int = 256
    draft: int = 0
    seats: int = 2
    together: int = 1
    beyond: int = 0
    vocab: int = VOCAB + 8  # a model's table is padded
    top_logprobs: int = 3
    routes: bool = False

    def init(self):
        return np.zeros((self.slots, 2), np.int64)  # seed and index of each slot

    def prefill(self, params, state, tokens, start, row):
        return state, Prefilled(None)

    def insert(self, state, seats):
        for seat in seats:
            state[seat.slot] = seat.sampling.seed, seat.index + 1
        return state, Step(self._draw([self._said(s.sampling.seed, s.index) for s in seats]))

    def decode(self, params, state, table_BP, active_B):
        time.sleep(self.step_seconds)
        if self.fails is not None:
            fails, self.fails = self.fails, None
            raise fails
        tokens = [self._said(seed, index) for seed, index in state]
        state[:, 1] += active_B
        return state, Step(self._draw(tokens))

    def _said(self, seed, index):
        script = self.scripts[seed % len(self.scripts)]
        return script[index] if index < len(script) else tokenizer().stop_ids[0]

    def _draw(self, tokens):
        token_B = np.asarray(tokens, np.int32)
        logp_B = -token_B.astype(np.float32)
        top_BK = (token_B[:, None] + np.arange(self.top_logprobs)) % VOCAB
        return Draw(token_B, logp_B / 100, logp_B / 50, top_BK, -top_BK.astype(np.float32) / 50)


@dataclasses.dataclass
class Running:
    """A server that runs. url: of its root."""

    url: str
    driver: Driver
    engine: typing.Any
    served: Served
    service: Service

    def idle(self):
        """Whether no request holds or waits for anything, at most seconds from now."""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            s = self.driver.stats
            free = (s.free_slots, s.free_pages) == (self.engine.slots, self.engine.pages)
            if free and not self.driver.busy and not self.service.open_outputs:
                return True
            time.sleep(0.01)
        return False


@contextlib.contextmanager
def serving(engine, params=0, *, family="glm-4.5", push=None, token=TOKEN):
    """A `Running`, and its end after the block: everything has ended by then."""
    driver = Driver(engine, params)
    served = Served.of("tiny", family, tokenizer(), engine)
    service = Service(driver, served, admin_token=token, push=push and push(driver))
    sock = socket.create_server(("127.0.0.1", 0))
    started, ended = threading.Event(), threading.Event()
    loops = []

    async def run():
        stop = asyncio.Event()
        loops.append((asyncio.get_running_loop(), stop))
        await run_http(service, sock, stop, started.set)

    def main():
        try:
            asyncio.run(run())
        finally:
            started.set()
            ended.set()

    thread = threading.Thread(target=main, name="server")
    url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    thread.start()
    try:
        assert started.wait(30) and not ended.is_set()
        yield Running(url, driver, engine, served, service)
    finally:
        (loop, stop), *_ = loops
        if not ended.is_set():
            loop.call_soon_threadsafe(stop.set)
        thread.join(60)
        assert not thread.is_alive()


def refused(response, status, *, param=None, code=None, says=""):
    """Whether a response is an error in the form of the API that says this."""
    assert response.status_code == status, response.text
    assert response.json().keys() == {"error"}
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["param"], error["code"]) == (param, code), error
    assert says in error["message"]
    return error
