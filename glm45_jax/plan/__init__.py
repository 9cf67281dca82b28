"""What a run would cost before it is started. `table` is the table of `--dry-run`, without any
device; `python -m glm45_jax.plan` compiles the real step for a machine that is not here.

Files in reading order: `targets` (chips and their rates), `compile` (the step, in a process of its
own), `hlo` (collectives of what came out), `roofline`, `nearest` (settings that fit), `report`,
`wheels` (compilers that are fetched when asked), `inference` (hardware needs), `command`.
"""

from glm45_jax.plan.dry_run import check_rows, table

__all__ = ["check_rows", "table"]
