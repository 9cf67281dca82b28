"""tokamax as a peer of the kernels, where its wheels are on the path; nothing of it is installed by
requirements.txt.

    pip download --no-deps -d wheels tokamax==0.0.17 qwix einshape immutabledict jaxtyping \
        pydantic pydantic_core annotated-types typing-inspection          # 6 MB
    pip install --no-deps --target site wheels/*.whl && export PYTHONPATH=site
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable
from typing import Any

import jax

NAME = "tokamax mosaic, untuned"


def tokamax_or_none() -> Any:
    """The package, or None where it is not. Its benchmarking imports xprof, 31 MB, which nothing
    here calls: an empty module stands for it.
    """
    if importlib.util.find_spec("tokamax") is None:
        return None
    if "xprof" not in sys.modules and importlib.util.find_spec("xprof") is None:
        for name in ("xprof", "xprof.cli", "xprof.cli.tools"):
            sys.modules.setdefault(name, types.ModuleType(name))
        sys.modules["xprof.cli.tools"].__dict__["get_kernel_stats_tool"] = None
    import tokamax

    return tokamax


def grouped(what: str, implementation: str = "mosaic") -> Callable[..., jax.Array] | None:
    """f(x, w, sizes, g) of one of the three products of a grouped matmul."""
    if (tokamax := tokamax_or_none()) is None:
        return None

    def product(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
        return tokamax.ragged_dot(x, w, sizes, implementation=implementation)

    made: dict[str, Callable[..., jax.Array]] = {
        "fwd": lambda x, w, sizes, g: product(x, w, sizes),
        "dlhs": lambda x, w, sizes, g: jax.vjp(lambda x: product(x, w, sizes), x)[1](g)[0],
        "drhs": lambda x, w, sizes, g: jax.vjp(lambda w: product(x, w, sizes), w)[1](g)[0],
    }
    return made[what]


def attention(implementation: str = "mosaic") -> Callable[..., jax.Array] | None:
    """f(q, k, v), causal."""
    if (tokamax := tokamax_or_none()) is None:
        return None
    return lambda q, k, v: tokamax.dot_product_attention(
        q, k, v, is_causal=True, implementation=implementation
    )
