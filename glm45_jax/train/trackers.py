"""Where people watch a run, one value of an experiment: `TensorBoard`, `Wandb` or `ClearML`. Each
has `check` (is its package here?) and `open`, which gives a `metrics.Writer`.

The record of a run stays `metrics.jsonl`; a tracker gets the same numbers. Packages are imported
where they are needed: wandb and ClearML are extras. Legend: as in `metrics`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import pathlib
import secrets
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from glm45_jax import metrics, values
from glm45_jax.integrity import write_whole


@dataclasses.dataclass(frozen=True)
class TensorBoard:
    """Event files in `tensorboard`, under the workdir."""

    def check(self) -> None:
        """None; its writer is installed with this package."""

    def open(self, exp: Any, workdir: pathlib.Path, step: int) -> metrics.Writer:
        """The writer; what an earlier process wrote from `step` on is hidden."""
        return metrics.TensorBoard(workdir / "tensorboard", purge_step=step)


@dataclasses.dataclass(frozen=True)
class Untracked:
    """Nowhere: `metrics.jsonl` alone has the numbers."""

    def check(self) -> None:
        """None; it needs nothing."""

    def open(self, exp: Any, workdir: pathlib.Path, step: int) -> metrics.Writer:
        """A writer that writes nothing."""
        return _NoWriter()


class _NoWriter:
    def write(
        self, step: int, scalars: Mapping[str, float], arrays: Mapping[str, np.ndarray]
    ) -> None:
        pass

    def close(self) -> None:
        pass


@dataclasses.dataclass(frozen=True)
class Wandb:
    """A run of Weights & Biases, named as the experiment; a resumed run goes on in it.

    offline: nothing is sent; `wandb sync` does that later. Otherwise WANDB_MODE and `wandb login`
    say where to, as everywhere.
    """

    project: str = "glm45_jax"
    entity: str | None = None
    tags: tuple[str, ...] = ()
    offline: bool = False

    def check(self) -> None:
        """None. Raises: ValueError where wandb is not installed."""
        _check_installed(self, "wandb")

    def open(self, exp: Any, workdir: pathlib.Path, step: int) -> metrics.Writer:
        """The writer. Steps that a resumed run takes again keep their first numbers."""
        self.check()
        import wandb

        id_file = workdir / "wandb" / "id.txt"
        run = wandb.init(
            project=self.project,
            entity=self.entity,
            name=exp.name,
            tags=list(self.tags),
            config=_settings(exp),
            dir=str(workdir),
            id=_kept(id_file, lambda: secrets.token_hex(6)),
            resume="allow",
            mode="offline" if self.offline else None,
            reinit="create_new",
            # Standard error and output stay the terminal's.
            settings=wandb.Settings(console="off"),
        )
        return _WandbWriter(wandb, run)


@dataclasses.dataclass(frozen=True)
class ClearML:
    """A task of ClearML, named as the experiment; a resumed run goes on in it.

    offline: nothing is sent; every process leaves a session, which `Task.import_offline_session`
    sends later. Otherwise `clearml-init` says where to.
    """

    project: str = "glm45_jax"
    tags: tuple[str, ...] = ()
    offline: bool = False

    def check(self) -> None:
        """None. Raises: ValueError where clearml is not installed."""
        _check_installed(self, "clearml")

    def open(self, exp: Any, workdir: pathlib.Path, step: int) -> metrics.Writer:
        """The writer. Steps that a resumed run takes again are overwritten."""
        self.check()
        from clearml import Task

        # Its reporter would be a fork of this process, whose other threads (JAX's) it has not: it
        # hangs. Reporting from a thread is the setting development.report_use_subprocess=false.
        Task._report_subprocess_enabled = False
        if self.offline:
            Task.set_offline(True)
        id_file = workdir / "clearml" / "id.txt"
        known = id_file.exists() and not self.offline
        task = Task.init(
            project_name=self.project,
            task_name=exp.name,
            tags=list(self.tags),
            reuse_last_task_id=id_file.read_text() if known else False,
            continue_last_task=0 if known else False,  # 0: steps are those of the run
            auto_connect_arg_parser=False,
            auto_connect_frameworks=False,  # it would take what other writers write as well
            auto_connect_streams=False,
        )
        if not known:
            _kept(id_file, lambda: task.id)
        task.connect_configuration(_settings(exp), name="experiment")
        return _ClearMLWriter(task)


Tracker = TensorBoard | Wandb | ClearML


class _WandbWriter:
    """Scalars as they are, arrays as histograms, matrices also as pictures."""

    def __init__(self, wandb: Any, run: Any):
        self._wandb, self._run = wandb, run

    def write(
        self, step: int, scalars: Mapping[str, float], arrays: Mapping[str, np.ndarray]
    ) -> None:
        row: dict[str, Any] = {name: float(value) for name, value in scalars.items()}
        for name, given in arrays.items():
            array = np.asarray(given, np.float32)
            finite = array[np.isfinite(array)]
            if finite.size:
                row[f"{name}/histogram"] = self._wandb.Histogram(finite)
            if array.ndim == 2 and array.size:
                row[name] = self._wandb.Image(metrics.heat_map(array))
        self._run.log(row, step=step)

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
        self._run = None


class _ClearMLWriter:
    """Scalars by the part of their name before a slash, matrices as pictures, others as bars."""

    def __init__(self, task: Any):
        self._task = task

    def write(
        self, step: int, scalars: Mapping[str, float], arrays: Mapping[str, np.ndarray]
    ) -> None:
        logger = self._task.get_logger()
        for name, value in scalars.items():
            logger.report_scalar(name.partition("/")[0], name, float(value), iteration=step)
        for name, given in arrays.items():
            array = np.asarray(given, np.float32)
            if array.ndim == 2 and array.size:
                logger.report_image(name, name, iteration=step, image=metrics.heat_map(array))
            elif array.size:
                logger.report_histogram(name, name, values=array.ravel().tolist(), iteration=step)

    def close(self) -> None:
        if self._task is not None:
            self._task.close()
        self._task = None


def _check_installed(tracker: Tracker, package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ValueError(
            f"tracker={tracker} needs {package}, which is not installed: "
            f"pip install -e '.[{package}]', or use tracker=TensorBoard()"
        )


def _kept(file: pathlib.Path, make: Callable[[], str]) -> str:
    """The text of the file, which is made where it is not there."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, make().encode())
    return file.read_text()


def _settings(exp: Any) -> dict[str, Any]:
    """Every number and name of the experiment by its path, as `--set` takes it."""
    plain = (bool, int, float, str, type(None))
    return {
        path: leaf if isinstance(leaf, plain) else getattr(leaf, "__qualname__", repr(leaf))
        for path, leaf in values.flatten(exp).items()
    }
