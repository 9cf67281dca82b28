"""Where the numbers of a run go: jsonl file, TensorBoard, console; and their means over hosts.

The one type to know is `Writer`: `write(step, scalars, arrays)` and `close()`. Only the first
process should hold writers. The jsonl file is the record that reports and resumed runs read: strict
JSON, one line a step, and after a resume equal to that of a run that was never stopped.
Legend: L MoE layers, E experts.
"""

import dataclasses
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

import jax
import numpy as np

from glm45_jax.integrity import write_whole

_logger = logging.getLogger(__name__)

_NON_FINITE = ("nan", "inf", "-inf")
_IMAGE_PIXELS = 1024
_CELL_PIXELS = 16
_GREY = np.array([160, 160, 160], np.uint8)
_DARK_TO_LIGHT = np.array(
    [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]]
)


class Writer(Protocol):
    """Something that takes the metrics of a step, in any order of steps."""

    def write(
        self, step: int, scalars: Mapping[str, float], arrays: Mapping[str, np.ndarray]
    ) -> None:
        """None, once the numbers of `step` are handed over; nothing keeps the arrays."""
        ...

    def close(self) -> None:
        """None, once everything written is where it belongs; may be called twice."""
        ...


@dataclasses.dataclass(frozen=True)
class Row:
    """The metrics of one step, as `read_jsonl` gives them back."""

    step: int
    scalars: dict[str, float]
    arrays: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Window:
    """Tokens and the seconds they took, since the last time somebody looked."""

    tokens: int = 0
    seconds: float = 0.0

    def add(self, tokens: int, seconds: float) -> "Window":
        """The window with more in it."""
        return Window(self.tokens + tokens, self.seconds + seconds)

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second; NaN before any time has passed."""
        return self.tokens / self.seconds if self.seconds > 0 else float("nan")


def setup_logging(*, level: int = logging.INFO, process: int = 0) -> None:
    """None; log records go to stderr, of processes other than the first only warnings.

    Calling it again takes the present stderr and the new level, and adds nothing. Checkpointing
    logs a page a save through `absl`, JAX every backend it does not find: of both, warnings remain.
    """
    root = logging.getLogger()
    for other in [h for h in root.handlers if type(h) is logging.StreamHandler]:
        root.removeHandler(other)  # ours, whose stderr may be closed; a library's basicConfig
    handler = logging.StreamHandler()
    root.addHandler(handler)
    where = f" [{process}]" if process else ""
    form = f"%(asctime)s{where} %(levelname).1s %(name)s: %(message)s"
    handler.setFormatter(logging.Formatter(form, "%H:%M:%S"))
    root.setLevel(level if process == 0 else max(level, logging.WARNING))
    for chatty in ("absl", "jax", "matplotlib"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def host_mean(tree: Any) -> Any:
    """Every number of the tree, averaged over the processes in float64; as it is, if there is one.

    All processes must call it with the same structure and shapes.
    """
    if jax.process_count() == 1:
        return tree
    from jax.experimental import multihost_utils

    leaves, structure = jax.tree.flatten(tree)
    arrays = [np.asarray(leaf, np.float64) for leaf in leaves]
    flat = np.concatenate([array.ravel() for array in arrays])
    # As pairs of words: JAX would round float64 to float32 on the way.
    words = np.asarray(multihost_utils.process_allgather(flat.view(np.uint32)))
    mean = words.view(np.float64).mean(axis=0)
    parts = np.split(mean, np.cumsum([array.size for array in arrays])[:-1])
    shaped = [part.reshape(array.shape)[()] for part, array in zip(parts, arrays, strict=True)]
    return jax.tree.unflatten(structure, shaped)


class Jsonl:
    """Writer of one JSON line a step, flushed as it is written; numbers come back exactly.

    Arrays take some 10 bytes an element: write [L, E] ones on some steps only.
    """

    def __init__(self, path: str | os.PathLike):
        self._path = Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("a", encoding="utf-8")

    @classmethod
    def open_resumed(cls, path: str | os.PathLike, step: int) -> "Jsonl":
        """The writer of a run that goes on at `step`: what was written from there on is dropped.

        The file is replaced in one move. A line that a crash cut short is dropped too.

        Raises: ValueError for a line, not the last, that is no metrics line.
        """
        path = Path(path)
        if path.exists():
            kept = "".join(line for line, row in _lines(path) if row.step < step)
            write_whole(path, kept.encode())
        return cls(path)

    def write(
        self, step: int, scalars: Mapping[str, float], arrays: Mapping[str, np.ndarray]
    ) -> None:
        """None; the line is in the file when this returns."""
        line = {
            "step": int(step),
            "scalars": {name: _number(float(value)) for name, value in scalars.items()},
            "arrays": {name: _array(np.asarray(value)) for name, value in arrays.items()},
        }
        self._file.write(json.dumps(line, allow_nan=False, separators=(",", ":")) + "\n")
        self._file.flush()

    def close(self) -> None:
        """None; the file is on disk."""
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()


def read_jsonl(path: str | os.PathLike) -> list[Row]:
    """All rows that `Jsonl` wrote, in file order; a last line cut short is left out with a warning.

    Raises: ValueError names a line that is no metrics line; FileNotFoundError.
    """
    return [row for _, row in _lines(Path(path))]


def _lines(path: Path) -> list[tuple[str, Row]]:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.endswith("\n"):
            _logger.warning("%s line %d was cut short by a crash; leaving it out", path, number)
            break
        try:
            raw = json.loads(line)
            scalars = {name: float(value) for name, value in raw["scalars"].items()}
            arrays = {name: _array_back(value) for name, value in raw["arrays"].items()}
            found.append((line, Row(raw["step"], scalars, arrays)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} line {number} is no metrics line: {error!r}") from error
    return found


def _number(value: float) -> float | str:
    """`value`, or its name where strict JSON has no number for it."""
    return value if np.isfinite(value) else repr(value)


def _array(array: np.ndarray) -> dict[str, Any]:
    if array.dtype.kind not in "fiub":
        array = array.astype(np.float32)  # bfloat16 and its like, which numpy alone cannot name
    values: list[Any] = array.ravel().tolist()
    if array.dtype.kind == "f":
        # The shortest digits at this width: 0.1, not the 0.10000000149011612 of a float32.
        values = [_number(float(str(value))) for value in array.ravel()]
    return {"dtype": array.dtype.name, "shape": list(array.shape), "values": values}


def _array_back(raw: Mapping[str, Any]) -> np.ndarray:
    values = [float(value) if value in _NON_FINITE else value for value in raw["values"]]
    return np.array(values, np.dtype(raw["dtype"])).reshape(raw["shape"])


class TensorBoard:
    """Writer of TensorBoard events; a 2-d array is a heat map and a histogram, others only that.

    purge_step: a run that goes on at this step hides what an earlier process wrote from there on.
    """

    def __init__(self, directory: str | os.PathLike, *, purge_step: int | None = None):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(logdir=os.fspath(directory), purge_step=purge_step)

    def write(
        self, step: int, scalars: Mapping[str, float], arrays: Mapping[str, np.ndarray]
    ) -> None:
        """None; events are queued, a thread writes them."""
        for name, value in scalars.items():
            self._writer.add_scalar(name, float(value), step)
        for name, given in arrays.items():
            array = np.asarray(given, np.float32)
            finite = array[np.isfinite(array)]
            if finite.size:
                self._writer.add_histogram(name, finite, step)
            if array.ndim == 2 and array.size:
                self._writer.add_image(name, heat_map(array), step, dataformats="HWC")

    def close(self) -> None:
        """None; the event file is complete."""
        self._writer.close()


def heat_map(array: np.ndarray) -> np.ndarray:
    """uint8 [rows, columns, 3] picture of a 2-d array: dark is its least, light its greatest.

    Every element is a square of 1 to 16 pixels; what is not finite is grey.
    """
    finite = np.isfinite(array)
    known = np.where(finite, array, np.nan).astype(np.float64)
    low, high = (float(np.nanmin(known)), float(np.nanmax(known))) if finite.any() else (0.0, 1.0)
    place = (np.where(finite, known, low) - low) / ((high - low) or 1.0)
    stops = np.linspace(0, 1, len(_DARK_TO_LIGHT))
    channels = [np.interp(place, stops, _DARK_TO_LIGHT[:, channel]) for channel in range(3)]
    picture = np.stack(channels, axis=-1).round().astype(np.uint8)
    picture[~finite] = _GREY
    pixels = max(1, min(_CELL_PIXELS, _IMAGE_PIXELS // max(array.shape)))
    return picture.repeat(pixels, axis=0).repeat(pixels, axis=1)


class Progress:
    """Writer on the console: a bar with the loss and its parts, tokens a second and MFU.

    Where `stream` (stderr) is no terminal: a line for the first step, one every `seconds`, and one
    for the last.
    """

    def __init__(
        self,
        total: int,
        initial: int = 0,
        *,
        stream: TextIO | None = None,
        seconds: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._total, self._initial, self._seconds, self._clock = total, initial, seconds, clock
        self._stream = sys.stderr if stream is None else stream
        self._started, self._printed = clock(), -float("inf")
        self._pending: tuple[int, Mapping[str, float]] | None = None
        self._bar: Any = None
        if self._stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total, initial=initial, file=self._stream, unit="step", dynamic_ncols=True
            )

    def update(self, step: int, scalars: Mapping[str, float]) -> None:
        """None; shows `step` steps as done."""
        if self._bar is not None:
            self._bar.set_postfix_str("  ".join(_shown(scalars)), refresh=False)
            self._bar.update(step - self._bar.n)
            return
        self._pending = (step, dict(scalars))
        if self._clock() - self._printed >= self._seconds:
            self._print()

    def write(
        self, step: int, scalars: Mapping[str, float], arrays: Mapping[str, np.ndarray]
    ) -> None:
        """None; as `update`, arrays are not shown."""
        self.update(step, scalars)

    def close(self) -> None:
        """None; the last step has been shown."""
        if self._bar is not None:
            self._bar.close()
        self._print()

    def _print(self) -> None:
        if self._pending is None:
            return
        (step, scalars), self._pending = self._pending, None
        self._printed = self._clock()
        parts = [f"step {step}/{self._total} ({step / max(self._total, 1):.0%})", *_shown(scalars)]
        done, seconds = step - self._initial, self._printed - self._started
        if done > 0 and step < self._total:
            left = int(seconds / done * (self._total - step))
            parts.append(f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left")
        self._stream.write("  ".join(parts) + "\n")
        self._stream.flush()


class ByteProgress:
    """Bytes done of a long read or write, and bytes a second: a bar, or a log line now and then."""

    def __init__(self, total: int, what: str, *, seconds: float = 10.0):
        self._total, self._what, self._seconds = total, what, seconds
        self._done, self._began = 0, time.monotonic()
        self._logged = self._began
        self._bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=what, unit="B", unit_scale=True, dynamic_ncols=True)

    def add(self, n: int) -> None:
        """None; `n` more bytes are done."""
        self._done += n
        if self._bar is not None:
            self._bar.update(n)
        elif time.monotonic() - self._logged >= self._seconds:
            self._log()

    def close(self) -> None:
        """None; says how many bytes there were and how fast."""
        if self._bar is not None:
            self._bar.close()
        self._log()

    def _log(self) -> None:
        self._logged = time.monotonic()
        rate = self._done / max(self._logged - self._began, 1e-9)
        _logger.info(
            "%s: %sB of %sB, %sB/s", self._what, short(self._done), short(self._total), short(rate)
        )


def _shown(scalars: Mapping[str, float]) -> Sequence[str]:
    """The few numbers worth a look, of those that are there."""
    parts = []
    if "loss" in scalars:
        parts.append(f"loss {scalars['loss']:.4f}")
    named = [name for name in ("ce", "mtp", "balance") if f"loss/{name}" in scalars]
    if named:
        parts.append(f"({', '.join(f'{name} {scalars[f"loss/{name}"]:.3f}' for name in named)})")
    if "reward" in scalars:
        parts.append(f"reward {scalars['reward']:.3f}")
    if "val/loss" in scalars:
        parts.append(f"val {scalars['val/loss']:.4f}")
    if "tokens_per_s" in scalars:
        parts.append(f"{short(scalars['tokens_per_s'])} tokens/s")
    if "mfu" in scalars:
        parts.append(f"MFU {scalars['mfu']:.1%}")
    return parts


def short(value: float) -> str:
    """Three significant digits and a unit: 1234567 -> '1.23M'."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"
