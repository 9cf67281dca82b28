"""The benchmark of RL's overhead: what it subtracts from what, and that it runs where the data
rooms' packages are not.
"""

import subprocess
import sys

import numpy as np
import pytest

from experiments.bench import rl as bench
from glm45_jax.metrics import Row

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
