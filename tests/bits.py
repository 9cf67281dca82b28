"""For laws that say "bit for bit" of two programs: XLA fuses each in its own way, and rounds by it.

UNFUSED goes to `jax.jit(..., compiler_options=UNFUSED)`: every operation is done by itself.
"""

UNFUSED = {"xla_disable_hlo_passes": "fusion"}
