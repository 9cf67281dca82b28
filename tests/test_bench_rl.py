"""The benchmark of RL's overhead: what it subtracts from what, and that it runs where the data
rooms' packages are not.
"""

import dataclasses
import logging
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments.bench import rl as bench
from experiments.bench.rl_ahead import Ahead, ask_all, batch_of, first_device, served
from glm45_jax import sharding
from glm45_jax.metrics import Row
from glm45_jax.model import transformer
from glm45_jax.params import init
from glm45_jax.rl.batch import pack
from glm45_jax.rl.trajectory import Trajectory
from glm45_jax.rollout import weights
from glm45_jax.rollout.driver import Driver
from glm45_jax.rollout.sampling import Sampling
from glm45_jax.tokenizer import train_bpe
from glm45_jax.train.ahead import shapes_of

BLOCKED = "grain seqio jetstream ray tensorflow"
IMPORT_WITHOUT = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {BLOCKED.split()!r}:
            raise ImportError(name + ' is not here')
sys.meta_path.insert(0, Refuse())
import experiments.bench.rl
"""


def row(step, seconds, **parts):
    scalars = {"seconds": seconds, "rollout/tokens": 1000.0, "tokens/trained": 4000.0}
    return Row(step, scalars | {f"seconds/{name}": x for name, x in parts.items()}, {})


def test_overhead_is_what_is_over_the_tokens_at_their_rates():
    rows = [row(step, 100.0) for step in range(bench.WARM + 1)]  # these compile
    parts = {"rollout": 2.25, "score": 0.5, "train": 2.25}
    rows += [row(bench.WARM + n, 5.0, **parts) for n in (1, 2, 3)]
    drawn, trained = np.array([500.0, 1000.0]), np.array([2000.0, 4000.0])
    found = bench.against_floor(rows, drawn, trained, cpu=3.0)
    assert found["floor"] == {"rollout": 2.0, "train": 2.0, "sum": 4.0}
    assert found["batches"] == 3 and found["seconds"] == 5.0
    assert found["overhead_percent"] == 25.0
    assert found["overhead_percent_beside_scoring"] == 12.5
    assert found["cpu"] == {"seconds": 3.0, "floor": 2.0, "overhead_percent": 50.0}
    said = bench.text(found)
    assert "over the floor: 25.0% (target 15%), 12.5% beside scoring" in said
    assert "score         0.500\n" in said and "train         2.250    2.000" in said


def test_cases_are_valid_and_only_random_answers_decide():
    for backend in ("cpu", "gpu", "tpu"):
        case = bench.case_of(backend, 9)
        case.rl.check_row(case.data.seq_len)
        assert case.train.steps == 9
    task = bench.counting(5)
    assert [bench.even(task, [{"content": c}]) for c in ("ab", "abc", None)] == [1.0, 0.0, 1.0]


@pytest.mark.slow
def test_it_imports_without_the_packages_of_the_data_rooms():
    subprocess.run([sys.executable, "-c", IMPORT_WITHOUT], check=True, timeout=300)


@pytest.mark.slow
def test_a_short_run_gives_every_number():
    found = bench.measure(bench.case_of("cpu", bench.WARM + bench.REPLAYED + 1))
    assert found["rates"]["engine"] > 0 and found["rates"]["train_step"] > 0
    assert found["tokens"]["drawn"] > 0 and found["tokens"]["trained"] > 0
    assert found["floor"]["sum"] > 0 and found["phases"]["rollout"] > 0


def test_rows_of_a_batch_are_known_before_it_is_drawn():
    tokenizer = train_bpe(["a few words"], bench.TOKENIZER_IDS)
    case = bench.case_of("cpu", 9)
    prompt = len("0 1 2 3")  # and what the format adds; 32 tokens follow
    rows = bench.rows_of(case, tokenizer)
    assert rows % case.train.rows == 0
    assert rows >= 64 * (prompt + 32) / case.data.seq_len


@pytest.mark.slow
def test_an_engine_compiles_nothing_that_was_compiled_ahead(caplog):
    case = bench.case_of("cpu", 9)
    ahead = Ahead(2)
    ask_all(ahead, "engine ", served(case.model, case.rl, jax.local_devices()[0]))
    ahead.wait("engine ")
    ahead.close()
    mesh = sharding.make_mesh(sharding.MeshShape(data=-1, fsdp=1))
    whole = jax.sharding.NamedSharding(mesh, jax.P())
    params = init(transformer.specs(case.model), jax.random.key(0))
    params = first_device(jax.device_put(params, whole))
    parcel = weights.stage(weights.prepare(params, 0, cfg=case.model), jax.local_devices()[0])
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        driver = Driver(
            case.rl.serving.engine(case.model, routes=False), parcel.params, reuse=False
        )
        for seed in range(3):
            driver.submit([5 + seed] * 20, Sampling(max_tokens=4, seed=seed))
        driver.run()
    compiled = [r.getMessage() for r in caplog.records if "Finished XLA" in r.getMessage()]
    assert not [
        line for line in compiled if any(n in line for n in ("prefill", "insert", "decode"))
    ]


@pytest.mark.parametrize("updates", [1, 2])
def test_shapes_of_a_batch_are_those_that_the_loop_packs(updates):
    case = bench.case_of("cpu", 9)
    rl = dataclasses.replace(case.rl, updates=updates)
    one = Trajectory(
        task_id="a",
        group="a",
        tokens_T=np.arange(6, dtype=np.int32),
        sampled_T=np.arange(6) > 2,
        logp_T=np.zeros(6, np.float32),
        versions_T=np.zeros(6, np.int32),
        reward=1.0,
    )
    packed = pack(
        [one],
        np.ones(1, np.float32),
        seq_len=case.data.seq_len,
        pad_id=0,
        multiple=2,
        temperature_N=np.ones(1, np.float32),
    )
    if updates == 1:  # as `rl.loop` does: the update scores by itself, or the trainer before it
        packed = packed.replace(fresh_B=packed.version_B == 0)
    else:
        packed = packed.replace(old_logp_BT=packed.logp_BT)
    assert shapes_of(batch_of(2, case.data.seq_len, case.model, rl)) == shapes_of(packed)
