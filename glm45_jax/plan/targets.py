"""Machines that are not here: `v5p:8x8x8` is a torus of TPU chips, `2*v6e:16x16` two of them,
`h100:64x8` 64 hosts of 8 GPUs. The types to know are `Chip` (rates of one device) and `Target`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from typing import Any, Literal

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device. flops: dense bfloat16 FLOP/s. hbm_bytes: what XLA may fill, not what is sold.

    hbm_rate, link_rate, net_rate: bytes/s to its memory; out of the device over all of its links
    at once (a torus, NVLink); out of the device to other hosts, of TPUs to other slices.
    sides: dimensions of a topology. source: of the numbers.
    """

    name: str
    platform: Literal["tpu", "gpu"]
    flops: float
    hbm_bytes: float
    hbm_rate: float
    link_rate: float
    net_rate: float
    sides: int
    device_kind: str
    source: str


_BOOK = "jax-ml.github.io/scaling-book, one way over all links; HBM that XLA enforces"
CHIPS: tuple[Chip, ...] = (
    Chip("v5p", "tpu", 459e12, 95.73 * GIB, 2.765e12, 6 * 9e10, 6.25e9, 3, "TPU v5p", _BOOK),
    Chip("v6e", "tpu", 918e12, 31.24 * GIB, 1.64e12, 4 * 9e10, 12.5e9, 2, "TPU v6e", _BOOK),
    Chip("v5e", "tpu", 197e12, 15.75 * GIB, 8.2e11, 4 * 4.5e10, 3.125e9, 2, "TPU v5e", _BOOK),
    Chip(
        "h100",
        "gpu",
        989e12,
        # The compiler refuses nothing: 79.1 GiB times XLA_PYTHON_CLIENT_MEM_FRACTION=0.9.
        0.9 * 84_929_347_584,
        3.35e12,
        450e9,
        50e9,
        2,
        "H100 SXM",
        "NVIDIA's datasheet, NVLink one way, 400 Gb/s InfiniBand a GPU; 0.9 of the memory",
    ),
)

# One device of the machine as XLA's GPU compiler wants it told, so that none is needed.
# Source: NVIDIA's H100 whitepaper and `cudaGetDeviceProperties` of an H100 SXM.
H100_CONFIG = """
gpu_device_info { threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84929347584 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536
  registers_per_block_limit: 65536 }
platform_name: "CUDA"  dnn_version_info { major: 9 minor: 12 patch: 0 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@dataclasses.dataclass(frozen=True)
class Target:
    """A machine. sides: of a torus; or hosts and GPUs of a host. slices: such tori, joined by the
    hosts' network.
    """

    chip: Chip
    sides: tuple[int, ...]
    slices: int = 1

    def __str__(self) -> str:
        times = f"{self.slices}*" if self.slices > 1 else ""
        return f"{times}{self.chip.name}:{'x'.join(map(str, self.sides))}"

    @property
    def devices(self) -> int:
        """Devices in all."""
        return self.slices * math.prod(self.sides)

    @property
    def on_a_host(self) -> int:
        """Devices that the fast links join: all of a torus, those of a host."""
        return self.devices // self.slices if self.chip.platform == "tpu" else self.sides[1]


def parse(text: str) -> Target:
    """The target that a text names.

    Raises: ValueError for an unknown chip, with the nearest, and for sides that its machines do not
    have.
    """
    found = re.fullmatch(r"(?:(\d+)\*)?([a-z0-9]+):(\d+(?:x\d+)*)", text.strip().lower())
    known = {chip.name: chip for chip in CHIPS}
    if found is None:
        raise ValueError(
            f"target {text!r} is not chip:sides; say v5p:8x8x8 (a torus), 2*v6e:16x16 (two of "
            "them), or h100:64x8 (64 hosts of 8 GPUs)"
        )
    slices, name = int(found[1] or 1), found[2]
    sides = tuple(int(n) for n in found[3].split("x"))
    if name not in known:
        near = difflib.get_close_matches(name, known, 1, 0.3) or list(known)
        raise ValueError(f"no chip {name!r} is known; did you mean {near}? There are {list(known)}")
    chip = known[name]
    if len(sides) != chip.sides or 0 in sides:
        form = "hosts x GPUs of a host" if chip.platform == "gpu" else f"{chip.sides} sides"
        raise ValueError(f"target {text!r}: {name} takes {form}, not {sides}")
    if chip.platform == "gpu" and sides[1] > 8:
        raise ValueError(f"target {text!r}: a host has up to 8 GPUs, not {sides[1]}")
    if slices < 1 or (slices > 1 and chip.platform == "gpu"):
        raise ValueError(f"target {text!r}: {slices} slices; TPUs have 1 or more, GPUs have hosts")
    return Target(chip, sides, slices)


def topology(target: Target) -> Any:
    """Its devices, as `jax.sharding.Mesh` takes them; needs the compiler's wheel
    (`glm45_jax.plan.wheels`) and no device.

    Raises: jax.errors.JaxRuntimeError where libtpu does not know the topology.
    """
    from jax.experimental import topologies

    if target.chip.platform == "gpu":
        hosts, gpus = target.sides
        return topologies.get_topology_desc(
            platform="cuda", target_config=H100_CONFIG, topology=f"1x{hosts}x{gpus}"
        )
    one = str(dataclasses.replace(target, slices=1))
    return topologies.get_topology_desc(
        platform="tpu",
        topology_name=one,
        **({"num_slices": target.slices} if target.slices > 1 else {}),
    )
