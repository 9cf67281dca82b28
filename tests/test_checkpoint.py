"""Laws of saving: the bits come back, on any mesh; what is damaged is never loaded."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from glm45_jax.checkpoint import Checkpoints, DamagedError, leaf_names

ROOT = Path(__file__).parents[1]
ODD_FLOATS = np.array([0x7FC01234, 0xFFC00001, 0x80000000, 0x7F800000, 1], np.uint32)


@flax.struct.dataclass
class State:
    step: jax.Array
    params: dict
    opt: tuple
    key: jax.Array
    nothing: None = None


def state_of(seed: int, *, width: int = 6) -> State:
    bits = np.random.default_rng(seed).integers(0, 256, (8, width), np.uint8)
    params = {
        "f32": jnp.asarray(ODD_FLOATS.view(np.float32)),
        "minus_zero": jnp.full((4, 4), -0.0, jnp.float32),
        "bf16": jax.lax.bitcast_convert_type(jnp.asarray(bits.astype(np.uint16)), jnp.bfloat16),
        "fp8": jax.lax.bitcast_convert_type(jnp.asarray(bits), jnp.float8_e4m3fn),
        "int4": jnp.arange(-8, 8, dtype=jnp.int4),
        "bool": jnp.asarray(bits[0] > 100),
        "none_of_it": jnp.zeros((0, 3), jnp.bfloat16),
    }
    opt = (jnp.asarray(bits.astype(np.uint32)), {"count": jnp.int32(seed)})
    keys = jax.random.split(jax.random.key(seed, impl="rbg"), 3)
    return State(jnp.uint32(seed), params, (*opt, keys), jax.random.key(seed))


def bits_of(tree) -> dict:
    """Bytes, shape and dtype by leaf name: equal only if every bit is."""
    named = leaf_names(tree).items()
    plain = {
        k: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        for k, x in named
    }
    return {k: (str(x.dtype), x.shape, np.asarray(plain[k]).tobytes()) for k, x in named}


def abstract_of(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def mesh_of(*shape: int):
    return jax.make_mesh(shape, ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)


def put(tree, mesh, *spec):
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec(*spec)))


def write(directory, *states, sidecars=None):
    with Checkpoints(directory, keep=len(states)) as checkpoints:
        for step, state in enumerate(states, start=1):
            checkpoints.save(step, state, sidecars={"loader": {"step": step}} | (sidecars or {}))


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    directory = tmp_path_factory.mktemp("two") / "steps"
    write(directory, state_of(1), state_of(2))
    return directory


def files_of(directory) -> list[str]:
    found = (p for p in sorted(directory.rglob("*")) if p.is_file())
    return [str(p.relative_to(directory)) for p in found]


def test_a_restored_state_has_every_bit_that_was_saved(tmp_path):
    state = state_of(7)
    write(tmp_path / "run", state, sidecars={"experiment": {"lr": 2e-4, "stages": [1, None]}})
    restored = Checkpoints(tmp_path / "run").restore(jax.eval_shape(lambda: state))
    assert bits_of(restored.state) == bits_of(state)
    assert jax.tree.structure(restored.state) == jax.tree.structure(state)
    assert restored.step == 1
    assert restored.sidecars == {
        "loader": {"step": 1},
        "experiment": {"lr": 2e-4, "stages": [1, None]},
    }


@pytest.mark.parametrize("shape, spec", [((4, 2), (None, "fsdp")), ((1, 3), ("tensor", None))])
def test_a_state_restores_onto_another_mesh_with_the_same_bits(tmp_path, shape, spec):
    weights = np.random.default_rng(0).normal(size=(24, 48)).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 8)
    old = mesh_of(8, 1)
    saved = {"w": put(weights, old, "fsdp", "tensor"), "key": put(keys, old, "fsdp")}
    write(tmp_path / "run", saved)
    new = (
        mesh_of(*shape)
        if shape[0] > 1
        else jax.sharding.Mesh(np.array(jax.devices()[:3]).reshape(shape), ("fsdp", "tensor"))
    )
    sharding = {
        "w": NamedSharding(new, PartitionSpec(*spec)),
        "key": NamedSharding(new, PartitionSpec()),
    }
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), saved, sharding
    )
    restored = Checkpoints(tmp_path / "run").restore(abstract).state
    assert bits_of(restored) == bits_of(saved)
    assert restored["w"].sharding.is_equivalent_to(sharding["w"], 2)
    assert restored["key"].sharding.is_equivalent_to(sharding["key"], 1)


def test_what_happens_to_a_state_after_save_does_not_reach_the_checkpoint(tmp_path):
    state = {"w": jnp.arange(1_000_000, dtype=jnp.float32)}
    expected = np.asarray(state["w"]).copy()
    with Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(1, state, sidecars={})
        jax.jit(lambda s: jax.tree.map(jnp.zeros_like, s), donate_argnums=0)(state)
        restored = checkpoints.restore({"w": jax.ShapeDtypeStruct((1_000_000,), jnp.float32)})
    np.testing.assert_array_equal(restored.state["w"], expected)


def damage(path: Path, kind: str) -> None:
    data = path.read_bytes()
    if kind == "missing":
        path.unlink()
    elif kind == "cut short":
        path.write_bytes(data[: len(data) // 2])
    else:
        flipped = bytearray(data)
        flipped[len(data) * 2 // 3] ^= 0x10
        path.write_bytes(bytes(flipped))


@pytest.mark.parametrize("kind", ["missing", "cut short", "a flipped bit"])
def test_damage_to_any_file_falls_back_to_the_step_before_and_says_so(
    two_steps, tmp_path, caplog, kind
):
    abstract, first = abstract_of(state_of(1)), bits_of(state_of(1))
    # Markers of the commit itself hold no data: without them a local step is still whole.
    held = [name for name in files_of(two_steps / "2/state") if name != "commit_success.txt"]
    assert len(held) >= 8
    for name in held:
        copy = tmp_path / "copy"
        shutil.copytree(two_steps, copy)
        damage(copy / "2/state" / name, kind)
        caplog.clear()
        restored = Checkpoints(copy).restore(abstract)
        assert (restored.step, bits_of(restored.state)) == (1, first), name
        (record,) = caplog.records
        assert record.levelname == "WARNING"
        assert "step 2 is damaged" in record.getMessage()
        assert name in record.getMessage()
        shutil.rmtree(copy)


def test_a_step_without_its_metadata_or_its_item_is_damaged(two_steps, tmp_path):
    for lost in ("2/state", "2/state/d", "2/state/ocdbt.process_0"):
        copy = tmp_path / lost.replace("/", "-")
        shutil.copytree(two_steps, copy)
        shutil.rmtree(copy / lost)
        assert Checkpoints(copy).restore(abstract_of(state_of(1))).step == 1


def test_an_integrity_file_of_another_step_does_not_vouch_for_this_one(two_steps, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(two_steps, copy)
    shutil.copy(copy / "1/state/integrity.json", copy / "2/state/integrity.json")
    assert Checkpoints(copy).restore(abstract_of(state_of(1))).step == 1


def test_when_all_steps_are_damaged_the_error_names_every_one(two_steps, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(two_steps, copy)
    for step in (1, 2):
        damage(copy / f"{step}/state/sidecars.json", "missing")
    with pytest.raises(DamagedError, match=r"every checkpoint is damaged: .*/2/.*/1/"):
        Checkpoints(copy).restore(abstract_of(state_of(1)))


def test_a_step_asked_for_by_number_is_never_replaced_by_another(two_steps, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(two_steps, copy)
    damage(copy / "2/state/_METADATA", "a flipped bit")
    with pytest.raises(DamagedError, match="_METADATA has CRC-32"):
        Checkpoints(copy).restore(abstract_of(state_of(1)), step=2)
    with pytest.raises(FileNotFoundError, match=r"no step 3 .* it has \[1, 2\]"):
        Checkpoints(copy).restore(abstract_of(state_of(1)), step=3)


def test_an_empty_directory_has_no_checkpoint_and_stays_empty(tmp_path):
    with Checkpoints(tmp_path / "none") as checkpoints:
        assert (checkpoints.steps(), checkpoints.latest()) == ([], None)
        with pytest.raises(FileNotFoundError, match="save one first"):
            checkpoints.restore(abstract_of(state_of(1)))
        with pytest.raises(FileNotFoundError, match="save one first"):
            checkpoints.sidecars()
    assert not (tmp_path / "none").exists()


def other(**change):
    state = state_of(1)
    return state.replace(params=state.params | change)


@pytest.mark.parametrize(
    "asked, message",
    [
        (other(fp8=jnp.zeros((8, 7), jnp.float8_e4m3fn)), r"params/fp8 is float8_e4m3fn\[8, 6\]"),
        (other(bf16=jnp.zeros((8, 6), jnp.float32)), r"bf16 is bfloat16.*but float32\[8, 6\] is"),
        (other(b0ol=jnp.zeros(3)), r"has no leaf params/b0ol \(nearest: \['params/bool'"),
        (state_of(1).replace(key=jax.random.key(0, impl="rbg")), r"key<fry>.*key<rbg>"),
        (state_of(1).replace(params={}), r"has 7 leaves that are not asked for.*partial=True"),
    ],
)
def test_another_experiments_state_is_an_error_and_not_damage(two_steps, caplog, asked, message):
    with pytest.raises(ValueError, match=message) as error:
        Checkpoints(two_steps).restore(abstract_of(asked))
    assert not isinstance(error.value, DamagedError)
    assert not caplog.records


def test_a_part_of_the_state_can_be_restored_alone(two_steps):
    abstract = {"params": abstract_of(state_of(2).params)}
    restored = Checkpoints(two_steps).restore(abstract, partial=True)
    assert bits_of(restored.state) == bits_of({"params": state_of(2).params})


def test_a_shape_that_the_mesh_does_not_divide_is_named(two_steps):
    sharding = NamedSharding(mesh_of(4, 2), PartitionSpec("fsdp"))
    abstract = state_of(1).replace(
        step=jax.ShapeDtypeStruct((), jnp.uint32),
        key=jax.ShapeDtypeStruct((6,), jnp.uint32, sharding=sharding),
    )
    with pytest.raises(ValueError, match=r"leaf key of uint32\[6\] does not fit"):
        Checkpoints(two_steps).restore(abstract)


def test_the_newest_steps_and_every_kth_are_kept(tmp_path):
    with Checkpoints(tmp_path / "run", keep=2, keep_every=4) as checkpoints:
        for step in range(1, 11):
            checkpoints.save(step, {"w": jnp.full(3, step)}, sidecars={})
        checkpoints.wait()
        assert checkpoints.steps() == [4, 8, 9, 10]
        assert checkpoints.latest() == 10
        abstract = {"w": jax.ShapeDtypeStruct((3,), jnp.int32)}
        np.testing.assert_array_equal(checkpoints.restore(abstract, step=4).state["w"], [4, 4, 4])


def test_a_half_written_step_is_no_step_and_does_not_hinder_the_next_save(two_steps, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(two_steps, copy)
    half = copy / "3.orbax-checkpoint-tmp"
    shutil.copytree(copy / "2/state", half / "state.orbax-checkpoint-tmp")
    (half / "state.orbax-checkpoint-tmp/integrity.json").unlink()
    with Checkpoints(copy) as checkpoints:
        assert checkpoints.restore(abstract_of(state_of(1))).step == 2
        assert half.exists(), "reading must not clean up: another process may be writing"
        checkpoints.save(3, state_of(3), sidecars={})
        assert bits_of(checkpoints.restore(abstract_of(state_of(1))).state) == bits_of(state_of(3))
    assert not half.exists()


def test_a_run_goes_on_past_a_damaged_step_and_keeps_it_aside(two_steps, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(two_steps, copy)
    damage(copy / "2/state/_METADATA", "cut short")
    with Checkpoints(copy) as checkpoints:
        assert checkpoints.restore(abstract_of(state_of(1))).step == 1
        assert checkpoints.steps() == [1, 2]
        checkpoints.save(2, state_of(5), sidecars={"again": True})
        checkpoints.wait()
        assert checkpoints.steps() == [1, 2]
    restored = Checkpoints(copy).restore(abstract_of(state_of(1)))
    assert (restored.step, restored.sidecars) == (2, {"again": True})
    assert bits_of(restored.state) == bits_of(state_of(5))
    assert (copy / "2.damaged/state/_METADATA").exists()


def test_a_step_is_never_written_over(two_steps, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(two_steps, copy)
    before = {name: (copy / name).read_bytes() for name in files_of(copy)}
    with Checkpoints(copy) as checkpoints:
        for step in (1, 2):
            with pytest.raises(ValueError, match=f"step {step} is not after step 2"):
                checkpoints.save(step, state_of(9), sidecars={})
    assert {name: (copy / name).read_bytes() for name in files_of(copy)} == before


def test_what_cannot_be_restored_exactly_is_not_saved(tmp_path):
    with Checkpoints(tmp_path / "run") as checkpoints:
        with pytest.raises(ValueError, match="leaf lr is a float"):
            checkpoints.save(1, {"lr": 0.1}, sidecars={})
        with pytest.raises(ValueError, match="leaf name 'a/b' is empty or taken twice"):
            checkpoints.save(1, {"a/b": jnp.ones(1), "a": {"b": jnp.ones(1)}}, sidecars={})
        with pytest.raises(ValueError, match="JSON compliant"):
            checkpoints.save(1, {"w": jnp.ones(1)}, sidecars={"loss": float("nan")})
        assert checkpoints.steps() == []


def test_a_save_that_fails_in_its_thread_is_raised_once_and_the_next_one_works(tmp_path, caplog):
    with Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(1, {"w": jnp.ones(3)}, sidecars={})
        checkpoints.wait()
        checkpoints.save(2, {"w": jnp.ones(3_000_000)}, sidecars={})
        (tmp_path / "run/2").write_text("in the way")  # the commit cannot rename onto a file
        with pytest.raises(OSError, match=r"Not a directory|exists"):
            checkpoints.wait()
        assert checkpoints.steps() == [1]
        checkpoints.save(3, {"w": jnp.ones(3)}, sidecars={})
        checkpoints.wait()
        assert checkpoints.steps() == [1, 3]


def test_sidecars_are_read_without_arrays_and_only_if_they_are_whole(two_steps, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(two_steps, copy)
    shutil.rmtree(copy / "2/state/ocdbt.process_0")
    assert Checkpoints(copy).sidecars() == {"loader": {"step": 2}}
    assert Checkpoints(copy).sidecars(1) == {"loader": {"step": 1}}
    damage(copy / "2/state/sidecars.json", "a flipped bit")
    assert Checkpoints(copy).sidecars() == {"loader": {"step": 1}}
    with pytest.raises(DamagedError, match=r"sidecars\.json has CRC-32"):
        Checkpoints(copy).sidecars(2)


def test_nonsense_retention_is_refused(tmp_path):
    for kwargs in ({"keep": 0}, {"keep_every": 0}):
        with pytest.raises(ValueError, match="must be at least 1"):
            Checkpoints(tmp_path, **kwargs)


KILLED = """
import os, sys, jax, jax.numpy as jnp
from glm45_jax.checkpoint import Checkpoints
checkpoints = Checkpoints(sys.argv[1])
checkpoints.save(1, {"w": jnp.arange(8_000_000)}, sidecars={"step": 1})
checkpoints.wait()
checkpoints.save(2, {"w": jnp.arange(8_000_000) + 1}, sidecars={"step": 2})
os._exit(9)
"""


def test_a_process_that_dies_in_the_middle_of_a_save_leaves_only_whole_steps(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path / "run")]
    assert (
        subprocess.run(command, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}).returncode == 9
    )
    assert [p for p in os.listdir(tmp_path / "run") if "tmp" in p], "the save was over too early"
    abstract = {"w": jax.ShapeDtypeStruct((8_000_000,), jnp.int32)}
    restored = Checkpoints(tmp_path / "run").restore(abstract)
    assert (restored.step, restored.sidecars) == (1, {"step": 1})
    np.testing.assert_array_equal(restored.state["w"], np.arange(8_000_000))


TWO_PROCESSES = """
import sys, jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from glm45_jax.checkpoint import Checkpoints
directory, port, process, until = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", 2, process)
mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(AxisType.Auto,))
def state(step):
    make = lambda: {"w": jnp.arange(4096.0) + step, "key": jax.random.key(step)}
    shardings = {"w": PartitionSpec("fsdp"), "key": PartitionSpec()}
    return jax.jit(make, out_shardings={k: NamedSharding(mesh, s) for k, s in shardings.items()})()
with Checkpoints(directory) as checkpoints:
    first = 1
    if until > 2:
        restored = checkpoints.restore(state(0))
        first = restored.step + 1
        shards = [x["w"].addressable_shards for x in (restored.state, state(restored.step))]
        for found, expected in zip(*shards, strict=True):
            np.testing.assert_array_equal(found.data, expected.data)
    for step in range(first, until + 1):
        checkpoints.save(step, state(step), sidecars={"first": first})
"""


@pytest.mark.slow
def test_two_processes_fall_back_together_when_only_one_sees_the_damage(tmp_path):
    directory = tmp_path / "run"

    def run(until: int) -> None:
        with socket.create_server(("localhost", 0)) as free:
            port = free.getsockname()[1]
        env = os.environ | {"JAX_PLATFORMS": "cpu"}
        args = [sys.executable, "-c", TWO_PROCESSES, str(directory), str(port)]
        started = [subprocess.Popen([*args, str(n), str(until)], cwd=ROOT, env=env) for n in (0, 1)]
        assert [process.wait(timeout=120) for process in started] == [0, 0]

    run(2)
    files = (directory / "2/state/ocdbt.process_1/d").iterdir()
    damage(max(files, key=lambda file: file.stat().st_size), "a flipped bit")
    run(3)
    checkpoints = Checkpoints(directory)
    assert checkpoints.steps() == [1, 2, 3]
    assert checkpoints.sidecars(2) == {"first": 2}
    assert (directory / "2.damaged").exists()
