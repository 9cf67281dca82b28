"""Where measured numbers go: experiments/bench/results/<device>.json, one key a benchmark, never
edited by hand.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def cpu_name() -> str:
    """Name of a machine without an accelerator."""
    return f"cpu-{os.cpu_count()}core"


def device_name() -> str:
    """Name of the first device and their number, as a file name: nvidia-h100-80gb-hbm3-x1,
    cpu-2core.
    """
    import jax

    device = jax.devices()[0]
    if device.platform == "cpu":
        return cpu_name()
    return f"{device.device_kind.lower().replace(' ', '-')}-x{jax.device_count()}"


def merge_result(device: str, key: str, value: dict[str, Any]) -> Path:
    """Puts the value under its key in the device's result file, keeping the other keys."""
    file = _file(device)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(_all(device) | {key: value}, indent=1, sort_keys=True) + "\n")
    return file


def merge_rows(device: str, key: str, rows: Sequence[dict[str, Any]], case: Sequence[str]) -> Path:
    """Puts rows under `key` -> "rows", in the place of those known that are equal in all fields of
    `case`; the other rows stay.
    """
    before = known(device, key).get("rows", [])
    same = lambda row: tuple(row.get(name) for name in case)  # noqa: E731
    new = {same(row) for row in rows}
    kept = [row for row in before if same(row) not in new]
    return merge_result(device, key, {"rows": [*kept, *rows]})


def known(device: str, key: str) -> dict[str, Any]:
    """What the device's result file has under a key; empty where there is nothing."""
    return _all(device).get(key, {})


def _all(device: str) -> dict[str, Any]:
    file = _file(device)
    return json.loads(file.read_text()) if file.exists() else {}


def _file(device: str) -> Path:
    return RESULTS / f"{device}.json"
