"""What MTP's drafts are worth: `mini`, trained here for a few hundred steps on real text, decodes
with 0 to 3 drafts a step, on whatever device is here.

In one run: tokens a second and milliseconds a step of each number of drafts and of slots; how often
a draft was right, by its position and the temperature, beside what rejection sampling would accept
of the first one (the overlap of the two distributions) and what the coupling is sure of (ADR 0013);
KL a token between rollout and trainer. Needs neither grain nor tokenizers but for `--make-tokens`,
which writes the token file where they are.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench.results import device_name, merge_result
from experiments.bench.rollout import compile_all, keep_compiled
from glm45_jax import params as params_lib
from glm45_jax.data.types import Batch
from glm45_jax.model import config, mtp, transformer
from glm45_jax.optim.muon import Muon
from glm45_jax.optim.schedules import Constant, Cosine
from glm45_jax.rollout import weights
from glm45_jax.rollout.driver import Driver
from glm45_jax.rollout.engine import GlmEngine
from glm45_jax.rollout.request import Request
from glm45_jax.rollout.sampling import Sampling
from glm45_jax.sharding import MeshShape
from glm45_jax.train.parallel import Recipe, make_trainer
from glm45_jax.train.state import Train

HELD_OUT = 0.02  # of the tokens, the last ones: prompts come from there
MAX_FILE_BYTES = 40 * 2**20
WARM_STEPS = 6
ROWS_AT_ONCE = 8  # of the trainer's view: all logits of these are in memory


@dataclasses.dataclass(frozen=True)
class Case:
    """What is trained and what is asked. out: tokens of the outputs that the trainer looks at."""

    cfg: config.ModelConfig
    steps: int
    rows: int
    seq_len: int
    lr: float
    batches: tuple[int, ...]
    drafts: tuple[int, ...] = (0, 1, 2, 3)
    temperatures: tuple[float, ...] = (0.0, 0.6, 1.0)
    prompt: int = 128
    timed_steps: int = 96
    out: int = 96
    page: int = 64

    @property
    def room(self) -> int:
        """Tokens of a row, the same for any number of drafts."""
        most = self.prompt + (max(self.drafts) + 1) * (WARM_STEPS + self.timed_steps + 2)
        return -(-most // self.page) * self.page


def mini(vocab: int) -> Case:
    return Case(
        config.mini(vocab=vocab), steps=300, rows=32, seq_len=2048, lr=2e-3, batches=(1, 16, 64)
    )


def tiny() -> Case:
    """For a CPU, in float32."""
    case = Case(config.tiny(), steps=60, rows=16, seq_len=32, lr=1e-2, batches=(4,), drafts=(0, 2))
    return dataclasses.replace(
        case, temperatures=(0.0, 1.0), prompt=16, timed_steps=8, out=12, page=16
    )


def train(case: Case, tokens_N: np.ndarray) -> tuple[transformer.Params, dict[str, Any]]:
    """Weights after the steps, as the trainer has them, and how it went."""
    total = float(case.steps * case.rows * case.seq_len)
    dtype = case.cfg.dtype
    recipe = Recipe(
        case.cfg,
        Muon(lr=case.lr, schedule=Cosine(warmup=0.05 * total, total=total, end=0.1), dtype=dtype),
        Train(case.steps, case.rows, mtp_weight=Constant(0.3), bias_rate=Constant(1e-3)),
        packed=False,
    )
    trainer, rng = make_trainer(MeshShape(data=-1, fsdp=1), recipe), np.random.default_rng(0)
    state, began = trainer.init(jax.random.key(0)), time.perf_counter()
    ones = np.ones((case.rows, case.seq_len), np.int32)
    places_BT = np.tile(np.arange(case.seq_len, dtype=np.int32), (case.rows, 1))
    for step in range(case.steps):
        start_B1 = rng.integers(0, len(tokens_N) - case.seq_len - 1, (case.rows, 1))
        row_BT = tokens_N[start_B1 + np.arange(case.seq_len + 1)].astype(np.int32)
        batch = Batch(row_BT[:, :-1], row_BT[:, 1:], ones, places_BT, ones.astype(np.float32))
        state, out = trainer.step(state, batch)
        if step % 20 == 0 or step == case.steps - 1:
            loss = float(out.scalars["loss"])
            print(f"step {step:4} loss {loss:.3f} {time.perf_counter() - began:.0f} s", flush=True)
    return state.params, {"steps": case.steps, "tokens": total, "last_loss": round(loss, 3)}


def engine_of(case: Case, slots: int, draft: int) -> GlmEngine:
    """An engine with a page for every token that may be asked of it."""
    return GlmEngine(
        case.cfg,
        slots=slots,
        page=case.page,
        pages=slots * case.room // case.page,
        max_tokens=case.room,
        buckets=(case.prompt,),
        draft=draft,
    )


def prompts(case: Case, held_out_N: np.ndarray, count: int) -> list[list[int]]:
    starts = np.random.default_rng(1).integers(0, len(held_out_N) - case.prompt, count)
    return [held_out_N[at : at + case.prompt].tolist() for at in starts]


def timed(
    case: Case, engine: GlmEngine, params: Any, asked: list[list[int]], heat: float
) -> dict[str, Any]:
    """Speed and accepted drafts of the steps in which every slot decoded and nothing else
    happened.
    """
    driver = Driver(engine, params, prefill_tokens=2**30)
    most = case.room - case.prompt
    for seed, prompt in enumerate(asked):
        driver.submit(prompt, Sampling(temperature=heat, max_tokens=most, seed=seed))
    while driver.stats.decode_steps < WARM_STEPS:
        driver.tick()
    before, start = driver.stats, time.perf_counter()
    for _ in range(case.timed_steps):
        driver.tick()
    seconds, after = time.perf_counter() - start, driver.stats
    assert before.running == after.running == engine.slots, "a row ended while it was timed"
    drafted = after.drafted - before.drafted
    right = [getattr(after, f"accepted_{i}") - getattr(before, f"accepted_{i}") for i in (1, 2, 3)]
    tokens = after.output_tokens - before.output_tokens
    return {
        "slots": engine.slots,
        "draft": engine.draft,
        "temperature": heat,
        "step_ms": round(seconds / case.timed_steps * 1e3, 3),
        "tokens_per_s": round(tokens / seconds, 1),
        "tokens_a_step": round(tokens / case.timed_steps / engine.slots, 3),
        "accepted_by_position": [round(n / max(drafted, 1), 3) for n in right[: engine.draft]],
    }


@functools.partial(jax.jit, static_argnames="cfg")
def trainer_view(
    params: transformer.Params,
    tokens_BT: jax.Array,
    heat: jax.Array,
    routes_BTLA: jax.Array | None = None,
    *,
    cfg: config.ModelConfig,
) -> tuple[jax.Array, jax.Array]:
    """Log-probs of tokens 1 .. T - 1 at temperature 1, and at `heat` the overlap, sum of min(p, q),
    of the model's distribution of tokens 2 .. T with MTP's. [B, T - 1] each. routes: the engine's.
    """
    hidden = transformer.forward(params, tokens_BT, cfg=cfg, routes_BTLA=routes_BTLA)
    ahead_BTD = mtp.forward(params, hidden.hidden_BTD, tokens_BT, cfg=cfg)
    logits_BTV = transformer.logits(params, hidden, cfg=cfg)
    logp_BTV = jax.nn.log_softmax(logits_BTV[:, :-1], axis=-1)
    logp_BT = jnp.take_along_axis(logp_BTV, tokens_BT[:, 1:, None], axis=-1)[:, :, 0]
    p_BTV = jax.nn.softmax(logits_BTV[:, 1:] / heat, axis=-1)
    q_BTV = jax.nn.softmax(transformer.logits(params, ahead_BTD, cfg=cfg) / heat, axis=-1)
    return logp_BT, jnp.minimum(p_BTV, q_BTV).sum(axis=-1)


def compare(
    case: Case, engine: GlmEngine, served: Any, trained: Any, asked: list[list[int]], heat: float
) -> dict[str, Any]:
    """The engine's outputs as the trainer sees them: KL(rollout, trainer) a token, where they are
    drawn at temperature 1, and the overlap of MTP's distribution with the model's.
    """
    driver = Driver(engine, served)
    requests = [
        driver.submit(tokens, Sampling(temperature=heat, max_tokens=case.out, seed=seed))
        for seed, tokens in enumerate(asked)
    ]
    driver.run()
    ours, theirs, replayed, overlap = [], [], [], []
    for i in range(0, len(requests), ROWS_AT_ONCE):
        some = requests[i : i + ROWS_AT_ONCE]
        row_BT = jnp.asarray([request.tokens() for request in some], jnp.int32)
        views = [trainer_view(trained, row_BT, jnp.float32(heat), cfg=case.cfg)]
        if engine.routes:
            routes_BTLA = jnp.asarray([_routes(request) for request in some])
            views.append(
                trainer_view(trained, row_BT, jnp.float32(heat), routes_BTLA, cfg=case.cfg)
            )
        (logp_BT, overlap_BT), *rest = (
            [np.asarray(x, np.float64)[:, case.prompt - 1 :] for x in view] for view in views
        )
        ours.append(np.asarray([request.logp_raw for request in some], np.float64))
        theirs.append(logp_BT)
        replayed += [logp for logp, _ in rest]
        overlap.append(overlap_BT[:, :-1])  # the last is of a token that nobody drew
    same = np.concatenate(overlap)
    row: dict[str, Any] = {
        "draft": engine.draft,
        "temperature": heat,
        "tokens": len(requests) * case.out,
        "rejection_sampling_would_accept": round(float(same.mean()), 4),
        "coupling_accepts_at_least": round(float((same / (2 - same)).mean()), 4),
    }
    if heat == 1.0:
        row |= mismatch(np.concatenate(theirs) - np.concatenate(ours))
        if replayed:
            row["replayed"] = mismatch(np.concatenate(replayed) - np.concatenate(ours))
    return row


def mismatch(ratio: np.ndarray) -> dict[str, float]:
    """KL(rollout, trainer) a token of log-ratios of tokens that the rollout drew."""
    return {  # r - 1 - log r has the mean of -log r, and none of its spread
        "kl_a_token": float(f"{np.mean(np.expm1(ratio) - ratio):.3g}"),
        "kl_plain_mean": float(f"{-ratio.mean():.3g}"),
        "largest_log_ratio": round(float(np.abs(ratio).max()), 4),
    }


def _routes(request: Request) -> np.ndarray:
    """[T, L, A], -1 for tokens that the engine did not read."""
    routes_TLA = np.concatenate(request.routes).astype(np.int32)
    missing = len(request.tokens()) - len(routes_TLA)
    return np.pad(routes_TLA, ((0, missing), (0, 0), (0, 0)), constant_values=-1)


def served_shapes(cfg: config.ModelConfig) -> transformer.Params:
    """What `weights.prepare` gives, without arrays."""

    def one(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        exact = params_lib.path_name(path).split(".")[-1] in weights.EXACT
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype if exact else jnp.dtype(cfg.dtype))

    specs = params_lib.abstract(transformer.specs(cfg))
    return jax.tree_util.tree_map_with_path(one, specs)


def measure(case: Case, tokens_N: np.ndarray, save: Callable[[dict[str, Any]], None]) -> None:
    """None; `save` gets all that is known so far, again and again. Engines compile beside the
    training.
    """
    cut = int(len(tokens_N) * (1 - HELD_OUT))
    engines = {(n, d): engine_of(case, n, d) for n in case.batches for d in case.drafts}
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        began = time.perf_counter()
        jobs = compile_all(list(engines.values()), served_shapes(case.cfg), pool)
        print(f"{len(jobs)} programs traced in {time.perf_counter() - began:.0f} s", flush=True)
        trained, report = train(case, tokens_N[:cut])
        for job in jobs:
            job.result()
        print(f"all compiled after {time.perf_counter() - began:.0f} s", flush=True)
    served = weights.prepare(trained, 0, cfg=case.cfg).params
    speed: list[dict[str, Any]] = []
    views: list[dict[str, Any]] = []
    for slots in case.batches:
        asked = prompts(case, tokens_N[cut:], slots)
        for draft in case.drafts:
            engine = engines[slots, draft]
            for heat in case.temperatures:
                if heat == case.temperatures[0]:
                    timed(case, engine, served, asked, heat)  # compiles
                speed.append(timed(case, engine, served, asked, heat))
                print(speed[-1], flush=True)
                if slots == max(case.batches) and draft in (0, max(case.drafts)) and heat:
                    teller = dataclasses.replace(engine, routes=heat == 1.0)
                    views.append(compare(case, teller, served, trained, asked, heat))
                    print(views[-1], flush=True)
                save({"training": report, "speed": speed, "trainer": views})


def made_up(vocab: int) -> np.ndarray:
    """Tokens of a chain in which each has four likely followers."""
    rng = np.random.default_rng(0)
    after_V4 = rng.integers(0, vocab, (vocab, 4))
    tokens, picks = [0], rng.integers(0, 4, 50_000)
    for pick in picks:
        tokens.append(int(after_V4[tokens[-1], pick]))
    return np.asarray(tokens, np.int32)


def make_tokens(file: Path, vocab: int) -> None:
    """None; writes the token file: Python sources, their documentation and the language reference
    of this machine, documents in random order.
    """
    from experiments import pretrain
    from glm45_jax.data.sft import prepare_any
    from glm45_jax.data.sources import PackageDocs, PydocTopics, PythonSources

    sources = (PythonSources(include=("stdlib", "site")), PydocTopics(), PackageDocs())
    shares = tuple((source, 1.0) for source in sources)
    data = dataclasses.replace(pretrain.mini().data, sources=shares, vocab=vocab)
    with tempfile.TemporaryDirectory() as folder:
        stores = prepare_any(data, Path(folder)).train.values()
        docs = [doc for store in stores for doc in _documents(store)]
    order = np.random.default_rng(0).permutation(len(docs))
    tokens_N = np.concatenate([docs[i] for i in order]).astype(np.int32)
    tokens_N = tokens_N[: MAX_FILE_BYTES // 4 - 64]  # room for the header
    np.save(file, tokens_N)
    print(f"wrote {file}: {len(tokens_N):,} tokens below {vocab}, {file.stat().st_size:,} bytes")


def _documents(store: Any) -> list[np.ndarray]:
    ends = store.offsets_N1[1:-1].tolist()
    return np.split(store.read(0, store.manifest.n_tokens), ends)


def main() -> None:
    """Measures, prints, writes; of the tiny case nothing is written."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=Path, help=".npy of int32 ids below --vocab")
    parser.add_argument("--make-tokens", type=Path, help="write that file here, and end")
    parser.add_argument("--vocab", type=int, default=16_384, help="of the model and the file")
    parser.add_argument("--steps", type=int, help="of training; default 300")
    parser.add_argument("--batches", type=int, nargs="+", help="slots; default 1 16 64")
    parser.add_argument("--drafts", type=int, nargs="+", help="default 0 1 2 3")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on made-up tokens")
    args = parser.parse_args()
    if args.make_tokens:
        make_tokens(args.make_tokens, args.vocab)
        return
    if not args.tiny and args.tokens is None:
        parser.error("give --tokens FILE.npy (write one with --make-tokens), or --tiny")
    case = tiny() if args.tiny else mini(args.vocab)
    changes: dict[str, Any] = {"steps": args.steps} if args.steps else {}
    changes |= {"batches": tuple(args.batches)} if args.batches else {}
    changes |= {"drafts": tuple(args.drafts)} if args.drafts else {}
    case = dataclasses.replace(case, **changes)
    tokens_N = made_up(case.cfg.vocab) if args.tokens is None else np.load(args.tokens)
    if tokens_N.min() < 0 or tokens_N.max() >= case.cfg.vocab:
        parser.error(f"ids {tokens_N.min()}..{tokens_N.max()} are not below {case.cfg.vocab}")
    value = {
        "command": f"python -m experiments.bench.speculation --tokens FILE --vocab {args.vocab} "
        f"--steps {case.steps} --batches {' '.join(map(str, case.batches))} "
        f"--drafts {' '.join(map(str, case.drafts))}",
        "jax": jax.__version__,
        "case": {k: v for k, v in dataclasses.asdict(case).items() if k != "cfg"},
    }

    key = "speculation_drafts_" + "_".join(map(str, sorted(case.drafts)))

    def save(found: dict[str, Any]) -> None:
        if not args.tiny:
            merge_result(device_name(), key, value | found)

    keep_compiled()
    measure(case, tokens_N, save)


if __name__ == "__main__":
    main()
