"""`python -m glm45_jax.rollout.server`."""

import sys

from glm45_jax.rollout.server.command import main

if __name__ == "__main__":
    sys.exit(main())
