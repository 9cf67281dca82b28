"""Saves and restores of a whole training state: asynchronous, atomic, checked, onto any mesh.

The one type to know is `Checkpoints`. A step is one folder, `<directory>/<step>/state`: the arrays
as orbax writes them (plain orbax reads them too, by `leaf_names`), `sidecars.json` (loader state,
experiment) and `integrity.json` (shape and dtype of every leaf, size and CRC-32 of every file;
orbax alone loads an array with a flipped bit and says nothing). All of it appears at once, by the
rename (in object stores the commit file) that ends a save. Nothing is ever unpickled.
"""

import dataclasses
import difflib
import json
import logging
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from glm45_jax import integrity, streamed

_logger = logging.getLogger(__name__)

_ITEM = "state"
_SIDECARS = "sidecars.json"
_INTEGRITY = "integrity.json"
_CHUNK_BYTES = 64 * 2**20
_READ_THREADS = 8
_SAVE_TIMEOUT_SECONDS = 3600
_KEY_IMPLS = ("threefry2x32", "rbg", "unsafe_rbg")


class DamagedError(ValueError):
    """A checkpoint on disk is not what was written: a file is missing, cut short or changed."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """A state in the tree and shardings that were asked for, and what was saved beside it."""

    state: Any
    sidecars: dict[str, Any]
    step: int


@dataclasses.dataclass(frozen=True)
class Verified:
    """A step whose files are as they were written. leaves: 'dtype[shape]' by leaf name."""

    item: epath.Path
    leaves: dict[str, str]
    sidecars: dict[str, Any]
    step: int


class Checkpoints:
    """The saved steps of one directory: the newest `keep`, and each multiple of `keep_every`.

    Call every method on all processes of a run, in the same order. `directory` may be a bucket
    (`gs://...`). Nothing is created, renamed or deleted before the first `save`: any number of
    readers may look on while one run writes.
    """

    def __init__(
        self, directory: str | os.PathLike, *, keep: int = 3, keep_every: int | None = None
    ):
        if keep < 1 or (keep_every is not None and keep_every < 1):
            raise ValueError(f"keep={keep}, keep_every={keep_every}: both must be at least 1")
        path = os.fspath(directory)
        self._directory = epath.Path(path if "://" in path else os.path.abspath(path))
        self._keep = keep
        self._keep_every = keep_every
        self._manager: ocp.CheckpointManager | None = None
        self._damaged: set[int] = set()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def save(self, step: int, state: Any, *, sidecars: Mapping[str, Any]) -> None:
        """None, once the arrays are copied off the devices; files and commit follow in a thread.

        state: a pytree of `jax.Array` (typed keys included), any sharding; may be donated right
        after. sidecars: name -> JSON value, committed with the arrays or not at all. Waits for the
        save before, if that still runs, and raises what made it fail. Steps that `restore` found
        damaged are renamed to `<step>.damaged`, out of the way.

        Raises:
            ValueError: `step` is not after the newest good step, a leaf is not a `jax.Array`, or a
                sidecar is not JSON.
        """
        self.wait()
        newest = max(set(self.steps()) - self._damaged, default=-1)
        if step <= newest:
            raise ValueError(
                f"step {step} is not after step {newest}, which {self._directory} already has; "
                "save only what is newer than latest(), or into another directory"
            )
        arrays, leaves = _to_save(state)
        text = json.dumps(dict(sidecars), allow_nan=False, sort_keys=True)
        self._set_damaged_aside()
        if self._manager is None:
            self._manager = _manager(self._directory, self._keep, self._keep_every)
        args = ocp.args.Composite(**{_ITEM: _StepSave(arrays, leaves, text)})
        if not self._manager.save(step, args=args, force=True):
            raise ValueError(f"orbax refused to save step {step} in {self._directory}")

    def restore(self, abstract: Any, *, step: int | None = None, partial: bool = False) -> Restored:
        """State, sidecars and number of the newest undamaged step, or of `step`.

        abstract: a pytree of `jax.ShapeDtypeStruct` (or arrays): shape, dtype and sharding of each
        leaf; one without a sharding goes to the first device. Leaves are matched by `leaf_names`
        and keep their bits. partial: the checkpoint may have leaves that `abstract` has not.
        Reads every file once to check it, spread over the processes, before it loads.

        Raises:
            FileNotFoundError: there is no step, or not this one.
            DamagedError: `step` is damaged or, without `step`, all are; if only newer ones are
                damaged, it warns and takes the newest good one.
            ValueError: a leaf differs in name, shape or dtype: another experiment's checkpoint.
        """
        self.wait()
        wanted = _abstract_leaves(abstract)

        def load(step: int) -> Restored:
            item = self._item(step)
            _check_match(_verified(item), wanted, item, partial)
            arrays = _read_arrays(item, wanted)
            typed = [_typed(arrays.get(name), leaf) for name, leaf in wanted.items()]
            state = jax.tree.unflatten(jax.tree.structure(abstract), typed)
            return Restored(state, json.loads((item / _SIDECARS).read_text()), step)

        return self._newest_good(load) if step is None else load(step)

    def sidecars(self, step: int | None = None) -> dict[str, Any]:
        """The JSON values saved with `step`, or the newest undamaged ones; reads no arrays.

        Raises: FileNotFoundError and DamagedError as `restore`.
        """
        self.wait()

        def load(step: int) -> dict[str, Any]:
            item = self._item(step)
            _verified(item, only=_SIDECARS)
            return json.loads((item / _SIDECARS).read_text())

        return self._newest_good(load) if step is None else load(step)

    def verified(self, step: int | None = None) -> "Verified":
        """Where the arrays of `step`, or of the newest undamaged step, lie; all files checked.

        Raises: FileNotFoundError and DamagedError as `restore`.
        """
        self.wait()

        def load(step: int) -> Verified:
            item = self._item(step)
            leaves = _verified(item)
            return Verified(item, leaves, json.loads((item / _SIDECARS).read_text()), step)

        return self._newest_good(load) if step is None else load(step)

    def steps(self) -> list[int]:
        """Committed steps, oldest first, damaged or not; none that is half written or set aside."""
        if not self._directory.exists():
            return []
        return sorted(
            int(path.name)
            for path in self._directory.iterdir()
            if path.name.isdigit() and _is_committed(path)
        )

    def latest(self) -> int | None:
        """The newest committed step, damaged or not."""
        return max(self.steps(), default=None)

    def wait(self) -> None:
        """None, once no save is running; raises what made one fail."""
        manager, self._manager = self._manager, None
        if manager is not None:
            manager.wait_until_finished()
            self._manager = manager  # not after an error: orbax would raise it for ever

    def close(self) -> None:
        """None, once the last save is committed and the threads are gone; may be called twice."""
        if self._manager is not None:
            manager, self._manager = self._manager, None
            manager.close()

    def _item(self, step: int) -> epath.Path:
        path = self._directory / str(step)
        if step not in self.steps():
            raise FileNotFoundError(f"no step {step} in {self._directory}; it has {self.steps()}")
        return path / _ITEM

    def _newest_good[T](self, load: Callable[[int], T]) -> T:
        """`load` of the newest step that is not damaged; loud about those that are."""
        reasons = []
        step = _of_first_process(max(self.steps(), default=-1))
        while step >= 0:
            try:
                return load(step)
            except DamagedError as error:
                _logger.warning("step %d is damaged, falling back: %s", step, error)
                self._damaged.add(step)
                reasons.append(str(error))
            step = _of_first_process(max((s for s in self.steps() if s < step), default=-1))
        if reasons:
            raise DamagedError("every checkpoint is damaged: " + "; ".join(reasons))
        raise FileNotFoundError(f"no checkpoint in {self._directory}; save one first")

    def _set_damaged_aside(self) -> None:
        if not self._damaged:
            return
        self.close()
        if jax.process_index() == 0:
            for step in sorted(self._damaged):
                aside = self._directory / f"{step}.damaged"
                number = 1
                while aside.exists():
                    number += 1
                    aside = self._directory / f"{step}.damaged-{number}"
                (self._directory / str(step)).rename(aside)
                _logger.warning("moved the damaged step %d to %s", step, aside)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("checkpoint: damaged steps set aside")
        self._damaged.clear()


def leaf_names(tree: Any) -> dict[str, Any]:
    """Leaf by name: its path joined by '/', the same for a dict key, a field and an index.

    Raises:
        ValueError: two leaves share a name, or the tree is one bare leaf.
    """
    named: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not name or name in named:
            raise ValueError(
                f"leaf name {name!r} is empty or taken twice; rename a key of the state"
            )
        named[name] = leaf
    return named


def _to_save(state: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """Plain arrays with at least one element by name, and 'dtype[shape]' of every leaf by name."""
    arrays: dict[str, Any] = {}
    leaves: dict[str, str] = {}
    for name, leaf in leaf_names(state).items():
        if not isinstance(leaf, jax.Array | streamed.Streamed):
            raise ValueError(
                f"leaf {name} is a {type(leaf).__name__}; make it a jax.Array to save it"
            )
        leaves[name] = _describe(leaf)
        if leaf.size:
            arrays[name] = leaf
            if isinstance(leaf, jax.Array) and _is_key(leaf):
                arrays[name] = jax.random.key_data(leaf)
    return arrays, leaves


def _abstract_leaves(abstract: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """What each leaf shall become, by name, always with a sharding that fits its shape."""
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    wanted = {}
    for name, leaf in leaf_names(abstract).items():
        sharding = getattr(leaf, "sharding", None) or first
        try:
            sharding.shard_shape(leaf.shape)
        except ValueError as error:
            raise ValueError(f"leaf {name} of {_describe(leaf)} does not fit {sharding}") from error
        wanted[name] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return wanted


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _describe(leaf: Any) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}"


def _key_impl(dtype: Any) -> str:
    for name in _KEY_IMPLS:
        if jax.eval_shape(lambda name=name: jax.random.key(0, impl=name)).dtype == dtype:
            return name
    raise ValueError(f"key dtype {dtype} is none of {_KEY_IMPLS}")


def _check_match(
    saved: dict[str, str], wanted: dict[str, Any], item: epath.Path, partial: bool
) -> None:
    hint = "restore with the experiment of the 'experiment' sidecar, or start in a new directory"
    for name, leaf in wanted.items():
        if name not in saved:
            near = difflib.get_close_matches(name, saved, n=3)
            raise ValueError(f"{item} has no leaf {name} (nearest: {near or 'none'}); {hint}")
        if saved[name] != _describe(leaf):
            raise ValueError(
                f"leaf {name} is {saved[name]} in {item}, "
                f"but {_describe(leaf)} is asked for; {hint}"
            )
    extra = sorted(saved.keys() - wanted.keys())
    if extra and not partial:
        raise ValueError(
            f"{item} has {len(extra)} leaves that are not asked for, as {extra[:3]}; "
            f"pass partial=True to leave them out, or {hint}"
        )


def _read_arrays(item: epath.Path, wanted: dict[str, Any]) -> dict[str, jax.Array]:
    """The stored arrays by name, placed as asked; those of no elements are not stored."""
    plain = {name: _plain(leaf) for name, leaf in wanted.items() if leaf.size}
    if not plain:
        return {}
    args = ocp.args.PyTreeRestore(
        item=plain,
        restore_args=ocp.checkpoint_utils.construct_restore_args(plain),
        partial_restore=True,
    )
    return ocp.PyTreeCheckpointHandler().restore(item, args=args)


def _plain(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """The uint32 array below a typed key, split the same way; anything else as it is."""
    if not _is_key(leaf):
        return leaf
    data = jax.eval_shape(jax.random.key_data, leaf)
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=leaf.sharding)


def _typed(data: jax.Array | None, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    if data is None:
        plain = _plain(leaf)
        data = jax.device_put(np.zeros(plain.shape, plain.dtype), plain.sharding)
    return jax.random.wrap_key_data(data, impl=_key_impl(leaf.dtype)) if _is_key(leaf) else data


@dataclasses.dataclass
class _StepSave(ocp.args.CheckpointArgs):
    arrays: dict[str, jax.Array]
    leaves: dict[str, str]
    sidecars: str


class _StepHandler(ocp.AsyncCheckpointHandler):
    """Orbax's array handler, plus the sidecars and the integrity file before the commit."""

    def __init__(self):
        self._arrays = ocp.PyTreeCheckpointHandler(type_handler_registry=streamed.registry())
        self._args: _StepSave | None = None

    async def async_save(self, directory: epath.Path, args: _StepSave) -> list[ocp.future.Future]:
        self._args = args
        futures: list[ocp.future.Future] = []
        if args.arrays:
            # Small chunks: another mesh, or a reader of one expert, reads only what it wants.
            chunked = ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES)
            save = ocp.args.PyTreeSave(args.arrays, dict.fromkeys(args.arrays, chunked))
            futures.extend(await self._arrays.async_save(directory, args=save) or [])
            self._args = dataclasses.replace(args, arrays={})
        return [ocp.future.ChainedFuture(futures, lambda: _write_own_checksums(directory))]

    def finalize(self, directory: epath.Path) -> None:
        """None; runs on the first process alone, after all have written and before the commit."""
        args, self._args = self._args, None
        if args is None:
            raise ValueError(f"{directory} is finalized without a save before it")
        self._arrays.finalize(directory)
        (directory / _SIDECARS).write_text(args.sidecars)
        _write_integrity(directory, args.leaves)

    def save(self, directory: epath.Path, args: _StepSave) -> None:
        raise NotImplementedError("steps are saved asynchronously only")

    def restore(self, directory: epath.Path, args: Any = None) -> None:
        raise NotImplementedError("Checkpoints.restore reads without a manager")

    def close(self) -> None:
        self._arrays.close()


def _manager(directory: epath.Path, keep: int, keep_every: int | None) -> ocp.CheckpointManager:
    policies = ocp.checkpoint_managers
    preserve = [policies.LatestN(n=keep)]
    if keep_every is not None:
        preserve.append(policies.EveryNSteps(interval_steps=keep_every))
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    registry.add(_ITEM, _StepSave, _StepHandler())
    return ocp.CheckpointManager(
        directory,
        handler_registry=registry,
        options=ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(preserve),
            cleanup_tmp_directories=True,
            lightweight_initialize=True,
            async_options=ocp.AsyncOptions(timeout_secs=_SAVE_TIMEOUT_SECONDS),
        ),
    )


def _is_committed(path: epath.Path) -> bool:
    """Whether the step was finished: object stores have no rename, so orbax leaves a file there."""
    if "://" in os.fspath(path):
        return (path / "commit_success.txt").exists()
    return path.is_dir()


def _own_name(process: int) -> str:
    return f"integrity.process_{process}.json"


def _write_own_checksums(directory: epath.Path) -> None:
    """None; each process sums the files it wrote, so that none reads the whole checkpoint."""
    process = jax.process_index()
    own = integrity.of_files(
        directory, integrity.files_below(directory, f"ocdbt.process_{process}")
    )
    (directory / _own_name(process)).write_text(json.dumps(own))


def _write_integrity(directory: epath.Path, leaves: dict[str, str]) -> None:
    files: dict[str, tuple[int, int]] = {}
    for process in range(jax.process_count()):
        path = directory / _own_name(process)
        files.update(json.loads(path.read_text()))
        path.unlink()
    rest = [name for name in integrity.files_below(directory) if name not in files]
    files.update(integrity.of_files(directory, rest))
    body = {"leaves": leaves, "files": files}
    text = json.dumps({"crc32": integrity.of_json(body), "body": body}, sort_keys=True)
    (directory / _INTEGRITY).write_text(text)


def _read_integrity(item: epath.Path) -> tuple[dict[str, str], dict[str, tuple[int, int]]]:
    """'dtype[shape]' of every leaf by name, (bytes, CRC-32) of every file by relative path."""
    try:
        whole = json.loads((item / _INTEGRITY).read_text())
        crc, body = whole["crc32"], whole["body"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{_INTEGRITY} cannot be read: {error!r}") from error
    if crc != integrity.of_json(body):
        raise DamagedError(f"{_INTEGRITY} has CRC-32 {integrity.of_json(body)}, {crc} was written")
    return body["leaves"], {name: (size, crc) for name, (size, crc) in body["files"].items()}


def _file_problem(item: epath.Path, name: str, size: int, crc: int) -> str | None:
    try:
        found_size, found_crc = integrity.of_file(item / name)
    except OSError as error:
        return f"{name} cannot be read: {error!r}"
    if found_size != size:
        return f"{name} has {found_size} bytes, {size} were written"
    if found_crc != crc:
        return f"{name} has CRC-32 {found_crc}, {crc} was written"
    return None


def _first_damage(item: epath.Path, files: dict[str, tuple[int, int]]) -> str | None:
    """What is wrong with the first wrong file of this process's share; None if nothing is."""
    share = sorted(files.items())[jax.process_index() :: jax.process_count()]
    with ThreadPoolExecutor(_READ_THREADS) as pool:
        problems = pool.map(lambda entry: _file_problem(item, entry[0], *entry[1]), share)
        return next(filter(None, problems), None)


def _verified(item: epath.Path, only: str | None = None) -> dict[str, str]:
    """'dtype[shape]' by leaf name of a step whose files (or file `only`) are as they were written.

    Raises: DamagedError on all processes where one finds damage, so that all fall back together.
    """
    leaves: dict[str, str] = {}
    try:
        leaves, files = _read_integrity(item)
        problem = _first_damage(item, {only: files[only]} if only else files)
    except DamagedError as error:
        problem = str(error)
    found = int(problem is not None)
    if jax.process_count() > 1:
        found = int(multihost_utils.process_allgather(np.int32(found)).sum())
    if found:
        raise DamagedError(f"{item}: {problem or f'{found} other processes found damage'}")
    return leaves


def _of_first_process(step: int) -> int:
    if jax.process_count() == 1:
        return step
    return int(multihost_utils.broadcast_one_to_all(np.int64(step)))
