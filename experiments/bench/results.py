"""Where measured numbers go: experiments/bench/results/<device>.json, one key a benchmark, never
edited by hand.
"""

import json
import os
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
    file = RESULTS / f"{device}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(known | {key: value}, indent=1, sort_keys=True) + "\n")
    return file
