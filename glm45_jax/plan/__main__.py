"""`python -m glm45_jax.plan`; see `command`."""

import sys

from glm45_jax.plan.command import main

if __name__ == "__main__":
    sys.exit(main())
