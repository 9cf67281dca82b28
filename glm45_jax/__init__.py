"""GLM-4.5 in JAX: pure functions over pytrees, from raw documents to reinforcement learning.

Importing this imports nothing else, not even jax: data workers start without it. Begin at
`glm45_jax.main` (run an experiment) or docs/architecture.md (which room knows what).
"""

__version__ = "0.1.0"
