"""Does a driver leak? `python -m experiments.bench.soak --minutes 30`, on any device, the CPU too.

Serves the tiny model (float32, GQA, experts, two drafts a step, random weights) to clients that
never rest: groups, turns of episodes, streams that are left, cancels, deadlines, bad prompts; a
trainer pushes weights by every policy, in float32 and FP8, some aborted. Once all is compiled it
notes memory, live arrays, objects and free pages every few seconds. At the end every request must
have ended once, every slot and page be free, and memory flat: the slope of resident memory over the
last two thirds below `MIB_PER_HOUR`, arrays and objects as at the start of them. Writes the key
"rollout_soak" of the device's results; exit status 1 where one fails. Under ten minutes the slope
says little.
"""

import argparse
import asyncio
import ctypes
import dataclasses
import functools
import gc
import os
import random
import sys
import time
import typing
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.bench.results import device_name, merge_result
from glm45_jax import params as params_lib
from glm45_jax.model import config, transformer
from glm45_jax.rollout import weights
from glm45_jax.rollout.driver import Driver
from glm45_jax.rollout.engine import GlmEngine
from glm45_jax.rollout.sampling import Sampling
from glm45_jax.rollout.types import Completion, Finish, Policy

MIB_PER_HOUR = 40.0  # the bound; at 100 requests a second 1 KiB a request would be 350
CLIENTS = 12
ROW = 128  # tokens
POLICIES = typing.get_args(Policy)


def engine_of() -> GlmEngine:
    """Less pages than its slots could fill, so that rows are preempted and kept pages given up."""
    return GlmEngine(
        config.tiny(),
        slots=6,
        pages=40,
        page=8,
        max_tokens=ROW,
        buckets=(16, 64),
        spans=(4,),
        routes=True,
        draft=2,
    )


@functools.partial(jax.jit, static_argnames="cfg")
def weights_of(key: jax.Array, cfg: config.ModelConfig) -> transformer.Params:
    """What a trainer has."""
    return params_lib.init(transformer.specs(cfg), key)


@dataclasses.dataclass
class Tally:
    """What became of the requests. wrong: of a completion that is not one, the first few."""

    asked: int = 0
    ended: int = 0
    left: int = 0
    pushed: int = 0
    aborted: int = 0
    wrong: list[str] = dataclasses.field(default_factory=list)

    def end(self, done: Completion, sampling: Sampling) -> None:
        """None; one more request has ended, as it should."""
        self.ended += 1
        n = len(done.tokens_T)
        finite = bool(np.isfinite(done.logp_T).all() and (done.logp_T <= 1e-6).all())
        rising = list(done.versions) == sorted(done.versions)
        whole = done.finish != "length" or n == sampling.max_tokens
        if not (finite and rising and whole and len(done.versions) == n):
            self.wrong.append(f"{done.finish} {n} {done.versions} {done.error}"[:200])


async def client(driver: Driver, tally: Tally, seed: int, until: float) -> None:
    """None; episodes and groups, one after another, until the time is over."""
    rng, said = random.Random(seed), list[int]()
    while time.monotonic() < until:
        if len(said) > ROW // 2 or rng.random() < 0.3:
            said = []
        said = said + [rng.randrange(256) for _ in range(rng.randint(1, 30))]
        group = [draw(rng, len(said)) for _ in range(rng.choice((1, 1, 2, 4)))]
        asks = [ask(driver, tally, rng.random(), said, sampling) for sampling in group]
        outs = await asyncio.gather(*asks)
        said = said + outs[0]


def draw(rng: random.Random, prompt: int) -> Sampling:
    """Knobs at random that fit a row."""
    return Sampling(
        temperature=rng.choice((0.0, 0.7, 1.0)),
        top_p=rng.choice((1.0, 0.9)),
        top_k=rng.choice((0, 20)),
        max_tokens=rng.randint(1, min(40, ROW - prompt)),
        stop=tuple(rng.sample(range(256), rng.choice((0, 4)))),
        seed=rng.randrange(2**32),
    )


async def ask(
    driver: Driver, tally: Tally, kind: float, prompt: list[int], sampling: Sampling
) -> list[int]:
    """The output of one request: waited for, streamed, left half-way, late or impossible."""
    tally.asked += 1
    if kind < 0.02:
        prompt = [*prompt, 256]  # no such token
    if kind < 0.1:
        task = asyncio.ensure_future(driver.generate(prompt, sampling))
        await asyncio.sleep(kind / 2)
        task.cancel()
        try:
            done = await task
        except asyncio.CancelledError:
            tally.left += 1
            return []
    elif kind < 0.2:
        done = await driver.generate(prompt, sampling, deadline=kind / 4)
    elif kind < 0.4:
        stream = driver.stream(prompt, sampling)
        async for item in stream:
            if isinstance(item, Completion):
                tally.end(item, sampling)
                return item.tokens_T.tolist()
            if kind < 0.25:
                await stream.aclose()
                tally.left += 1
        return []
    else:
        done = await driver.generate(prompt, sampling)
    tally.end(done, sampling)
    return done.tokens_T.tolist()


async def trainer(driver: Driver, tally: Tally, cfg: config.ModelConfig, until: float) -> None:
    """None; new weights every other second, by every policy."""
    rng, version = random.Random(0), driver.stats.version
    while time.monotonic() < until:
        await asyncio.sleep(rng.random() * 4)
        made = weights_of(jax.random.key(version), cfg)
        if rng.random() < 0.2:
            weights.abort(await asyncio.to_thread(weights.prepare, made, version + 1, cfg=cfg))
            tally.aborted += 1
            continue
        version += 1
        how = weights.Push(rng.choice(POLICIES), fp8=rng.random() < 0.3)
        await weights.update(driver, made, version, cfg=cfg, how=how)
        tally.pushed += 1


def warm(driver: Driver, cfg: config.ModelConfig) -> None:
    """None; all that will be called is compiled, for weights of both kinds."""
    for version in (1, 2):
        made = weights_of(jax.random.key(version), cfg)
        weights.push(driver, made, version, cfg=cfg, how=weights.Push(fp8=version == 2))
        for turns in ((5, 3, 20, 30), (5, 17), (20,), (60,), (70,)):  # of every bucket and span
            said = list[int]()
            for new in turns:
                said = said + [random.randrange(256) for _ in range(new)]
                request = driver.submit(said, Sampling(max_tokens=9))
                driver.run()
                said = said + request.out


async def watch(driver: Driver, every: float, until: float) -> list[dict[str, float]]:
    """Memory and pages every few seconds."""
    began, seen = time.monotonic(), list[dict[str, float]]()
    while time.monotonic() < until:
        await asyncio.sleep(every)
        gc.collect()
        seen.append(
            {
                "seconds": time.monotonic() - began,
                "rss_mib": resident_bytes() / 2**20,
                "objects": len(gc.get_objects()),
                # In one expression: a list that lived on would keep alive what it counts.
                "array_mib": sum(a.nbytes for a in jax.live_arrays()) / 2**20,
                "free_pages": driver.stats.free_pages,
            }
        )
    return seen


def resident_bytes() -> int:
    """Of this process, now, without what the allocator keeps of memory that was freed."""
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def verdict(seen: list[dict[str, float]], driver: Driver, tally: Tally) -> dict[str, Any]:
    """The row of results; `bad` says what failed."""
    late = seen[len(seen) // 3 :]
    at = {name: np.asarray([s[name] for s in late]) for name in late[0]}
    slope = float(np.polyfit(at["seconds"] / 3600, at["rss_mib"], 1)[0])
    halves = {name: [float(half.mean()) for half in np.array_split(at[name], 2)] for name in at}
    stats = driver.stats
    free = (stats.free_slots, stats.free_pages)
    engine = engine_of()
    bad = [f"a completion is wrong: {line}" for line in tally.wrong[:3]]
    if slope > MIB_PER_HOUR:
        bad.append(f"resident memory grows by {slope:.1f} MiB an hour, bound {MIB_PER_HOUR}")
    for name, share, what in (("array_mib", 0.3, "MiB of arrays"), ("objects", 0.01, "objects")):
        first, second = halves[name]
        if second > first * (1 + share):
            bad.append(f"live {what} grew from {first:.2f} to {second:.2f}")
    if free != (engine.slots, engine.pages) or driver.busy:
        bad.append(f"free slots and pages {free} at the end, of {(engine.slots, engine.pages)}")
    ended = sum(getattr(stats, finish) for finish in typing.get_args(Finish))
    if not tally.asked == stats.submitted == ended == tally.ended + tally.left:
        bad.append(f"{stats.submitted} requests, {ended} ends, {tally.ended} completions")
    return {
        "minutes": round(seen[-1]["seconds"] / 60, 1),
        "rss_slope_mib_per_hour": round(slope, 2),
        "rss_slope_bound": MIB_PER_HOUR,
        **{f"{k}_halves": [round(x, 2) for x in halves[k]] for k in ("rss_mib", "array_mib")},
        "objects_halves": [round(x) for x in halves["objects"]],
        "aborted_pushes": tally.aborted,
        "stats": dataclasses.asdict(stats),
        "bad": bad,
    }


async def soak(minutes: float, every: float) -> dict[str, Any]:
    """The row of results of a soak so long."""
    engine, tally = engine_of(), Tally()
    first = weights.prepare(weights_of(jax.random.key(0), engine.cfg), 0, cfg=engine.cfg)
    driver = Driver(engine, weights.stage(first).params, prefill_tokens=64)
    warm(driver, engine.cfg)
    tally.asked = tally.ended = driver.stats.submitted
    until = time.monotonic() + 60 * minutes
    watched = asyncio.create_task(watch(driver, every, until))
    clients = [client(driver, tally, seed, until) for seed in range(CLIENTS)]
    await asyncio.gather(watched, trainer(driver, tally, engine.cfg, until), *clients)
    while driver.busy:
        await asyncio.sleep(0.01)
    return verdict(watched.result(), driver, tally)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--every", type=float, default=5.0, help="seconds between two looks")
    parser.add_argument("--dry", action="store_true", help="write no results")
    args = parser.parse_args()
    row = asyncio.run(soak(args.minutes, args.every))
    for name, value in row.items():
        print(f"{name}: {value}")
    if not args.dry:
        print(merge_result(device_name(), "rollout_soak", row))
    return 1 if row["bad"] else 0


if __name__ == "__main__":
    sys.exit(main())
