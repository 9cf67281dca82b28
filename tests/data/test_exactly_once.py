"""The law of the loader: kills, resumes and other numbers of hosts leave no trace in the rows."""

import json
import signal
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import jax
import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm45_jax.data.loader import Loader
from glm45_jax.data.pack import BestFit, Cut
from glm45_jax.data.store import write_store
from tests.data.test_pack import PAD, make_store

ROOT = str(Path(__file__).parents[2])
T, STEPS, SWITCH = 12, 14, 6  # the second stage begins at step SWITCH


def first_span(step):
    """Four rows a step, from step 3 on eight."""
    return (step * 4, 4) if step < 3 else (12 + (step - 3) * 8, 8)


def second_span(step):
    """Rows of the second stage are counted from its own first step."""
    return (step - SWITCH) * 8, 8


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Cut, cut elsewhere every epoch, packed at once, packed a window at a time."""
    stores = [
        make_store(tmp_path_factory.mktemp("once"), lengths)
        for lengths in ([40, 9, 30, 100], [17, 80, 3], [5, 11, 7, 3, 12, 30], [4, 8, 6, 2, 11, 9])
    ]
    packings = (Cut(document_mask=True), Cut(moving=True), BestFit(), BestFit(window=4))
    return [packing.rows(store, T, PAD) for packing, store in zip(packings, stores, strict=True)]


def stages(sources, host):
    """The loaders of both stages: other weights, without the third source, at step SWITCH."""
    first = Loader(
        list(zip(sources, (4.0, 1.0, 2.0, 3.0), strict=True)),
        seed=5,
        span=first_span,
        host=host,
        fingerprint="data",
    )
    used = (0, 1, 3)
    drawn = first.rows_drawn(SWITCH)
    second = Loader(
        [(sources[s], weight) for s, weight in zip(used, (1.0, 1.0, 5.0), strict=True)],
        seed=5,
        span=second_span,
        host=host,
        fingerprint="data",
        numbers=used,
        drawn=[drawn[s] for s in used],
    )
    return first, second


def at(loaders, step):
    return loaders[0] if step < SWITCH else loaders[1]


def run(sources, hosts, start, stop, state=None):
    """What the hosts read from step start to stop, {step: global batch}; the state is checked."""
    found = {}
    for index in range(hosts):
        loaders = stages(sources, (index, hosts))
        if state is not None:
            at(loaders, start).check_state(json.loads(json.dumps(state)))
        step = start
        while step < stop:
            end = min(stop, SWITCH) if step < SWITCH else stop
            for batch in islice(at(loaders, step).iterate(step), end - step):
                found.setdefault(step, []).append(batch)
                step += 1
    join = jax.tree.map
    return {s: join(lambda *x: np.concatenate(x), *parts) for s, parts in found.items()}


@pytest.fixture(scope="module")
def unbroken(sources):
    return run(sources, 1, 0, STEPS)


@settings(max_examples=25, deadline=None)
@given(
    lives=st.lists(
        st.tuples(st.integers(1, 6), st.integers(0, 3), st.sampled_from([1, 2, 4])), max_size=5
    ),
    last_hosts=st.sampled_from([1, 2, 4]),
)
def test_kills_at_any_step_and_other_hosts_leave_the_rows_of_every_step(
    sources, unbroken, lives, last_hosts
):
    """lives: steps until the kill, steps lost since the last checkpoint, hosts."""
    read, saved, state = {}, 0, None
    for steps, lost, hosts in [*lives, (STEPS, 0, last_hosts)]:
        killed = min(saved + steps, STEPS)
        read |= run(sources, hosts, saved, killed, state)  # what was lost is read again
        saved = max(saved, killed - lost)
        if saved == STEPS:
            break
        state = at(stages(sources, (0, hosts)), saved).state(saved)
    assert sorted(read) == list(range(STEPS))
    for step, batch in read.items():
        jax.tree.map(np.testing.assert_array_equal, batch, unbroken[step])


def test_no_row_comes_twice_before_its_source_is_through(sources, unbroken):
    first, second = stages(sources, (0, 1))
    counts = Counter()
    for step in range(STEPS):
        loader = at((first, second), step)
        begin, n = loader._span(step)
        drawn = loader._order.at(begin, n)
        number = np.array(loader._numbers)[drawn.source_N]
        counts.update(
            zip(number.tolist(), drawn.epoch_N.tolist(), drawn.row_N.tolist(), strict=True)
        )
    assert set(counts.values()) == {1}
    for s, source in enumerate(sources):
        epochs = [epoch for number, epoch, _ in counts if number == s]
        assert all(epochs.count(e) == len(source) for e in range(max(epochs)))


def test_the_weights_change_at_the_step_and_not_before(sources):
    first, second = stages(sources, (0, 1))
    with_third = [2 in first._order.at(*first_span(step)).source_N for step in range(SWITCH)]
    assert any(with_third) and first.rows_drawn(SWITCH)[2] > 0
    share = np.bincount(second._order.at(0, 700).source_N) / 700
    np.testing.assert_allclose(share, [1 / 7, 1 / 7, 5 / 7], atol=0.01)
    assert second.rows_drawn(SWITCH) == [first.rows_drawn(SWITCH)[s] for s in (0, 1, 3)]


_READER = """
import sys, json, hashlib, time
from pathlib import Path
sys.path.insert(0, {root!r})
from glm45_jax.data.loader import Loader
from glm45_jax.data.pack import BestFit, Cut
from glm45_jax.data.store import open_store
folder = Path(sys.argv[1])
state_file = folder / "state.json"
rows = [(Cut(moving=True).rows(open_store(folder / "store"), 12, 1), 1.0),
        (BestFit(window=4).rows(open_store(folder / "store"), 12, 1), 1.0)]
loader = Loader(rows, seed=1, span=lambda step: (step * 4, 4), fingerprint="d")
start = 0
if state_file.exists():
    state = json.loads(state_file.read_text())
    loader.check_state(state)
    start = state["step"]
log = open(folder / "log", "a")
for step, batch in enumerate(loader.iterate(start), start):
    print(step, hashlib.sha256(batch.tokens_BT.tobytes()).hexdigest(), file=log, flush=True)
    if step % 7 == 6:
        new = folder / "new.json"
        new.write_text(json.dumps(loader.state(step + 1)))
        new.rename(state_file)
        print("saved", flush=True)
    time.sleep(0.002)
    if step == 300:
        break
print("done", flush=True)
"""


def test_a_process_killed_in_the_middle_goes_on_with_the_rows_of_an_unbroken_one(tmp_path):
    lines = {}
    for name, kills in (("whole", 0), ("killed", 3)):
        folder = tmp_path / name
        folder.mkdir()
        make_store(folder, [40, 9, 30, 100, 5, 5])
        for life in range(kills + 1):
            script = [sys.executable, "-c", _READER.format(root=ROOT), str(folder)]
            reader = subprocess.Popen(script, stdout=subprocess.PIPE, text=True)
            if life < kills:
                for _ in range(life + 2):
                    assert reader.stdout.readline() == "saved\n"
                reader.send_signal(signal.SIGKILL)
                reader.communicate()
                assert reader.returncode == -signal.SIGKILL
            else:
                assert reader.communicate()[0].endswith("done\n")
        found = {}
        for line in (folder / "log").read_text().splitlines():
            if len(line.split()) == 2 and len(line.split()[1]) == 64:  # a kill may tear a line
                step, digest = line.split()
                assert found.setdefault(int(step), digest) == digest
        lines[name] = found
    assert lines["killed"] == lines["whole"] and len(lines["whole"]) == 301


_WORKERS = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from glm45_jax.data.loader import Loader
from glm45_jax.data.pack import Cut
from glm45_jax.data.store import open_store
if __name__ == "__main__":
    rows = [(Cut().rows(open_store(Path(sys.argv[1]) / "store"), 12, 1), 1.0)]
    loader = Loader(rows, seed=1, span=lambda step: (step * 4, 4), fingerprint="d")
    batches = loader.iterate(0, processes=2)
    next(batches)
    print("reading", flush=True)
    time.sleep(600)
"""


@pytest.mark.slow  # worker processes import jax and grain
def test_worker_processes_do_not_outlive_a_killed_run(tmp_path):
    make_store(tmp_path, [40, 9, 30, 100])
    script = tmp_path / "read.py"
    script.write_text(_WORKERS.format(root=ROOT))
    reader = subprocess.Popen([sys.executable, script, tmp_path], stdout=subprocess.PIPE, text=True)
    assert reader.stdout.readline() == "reading\n"
    started = psutil.Process(reader.pid).children(recursive=True)
    workers = [child for child in started if "spawn_main" in " ".join(child.cmdline())]
    assert len(workers) == 2
    reader.send_signal(signal.SIGKILL)
    reader.wait()
    reader.stdout.close()
    _, alive = psutil.wait_procs(workers, timeout=20)
    for worker in alive:
        worker.kill()
    assert not alive


_MEMORY = """
import sys, resource
from pathlib import Path
sys.path.insert(0, {root!r})
import psutil
from glm45_jax.data.loader import Loader
from glm45_jax.data.pack import BestFit, Cut
from glm45_jax.data.store import open_store
packings = (Cut(), Cut(document_mask=True, moving=True), BestFit(), BestFit(window=64))
rows = [(packings[s % 4].rows(open_store(Path(sys.argv[1]) / str(s)), 1024, 1), 1.0 + s)
        for s in range(40)]
loader = Loader(rows, seed=0, span=lambda step: (step * 64, 64), fingerprint="")
batches, rss = loader.iterate(), []
for step in range(600):
    next(batches)
    if step % 10 == 9:
        rss.append(psutil.Process().memory_info().rss)
batches.close()
print(max(rss[:6]), max(rss), loader.rows_drawn(600))
"""


def test_forty_sources_are_read_through_in_the_memory_of_the_first_batches(tmp_path):
    random = np.random.default_rng(0)
    for s in range(40):
        docs = (random.integers(0, 999, n) for n in random.integers(100, 4000, 200))
        write_store(
            tmp_path / str(s), docs, end=999, vocab=1000, tokenizer_fingerprint="t", meta={}
        )
    out = subprocess.run(
        [sys.executable, "-c", _MEMORY.format(root=ROOT), str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    print(out.stdout)
    early, most, drawn = out.stdout.split(" ", 2)
    assert sum(json.loads(drawn)) == 600 * 64  # 39M tokens of 16M: all sources, more than twice
    assert int(most) - int(early) < 16 * 2**20, out.stdout
