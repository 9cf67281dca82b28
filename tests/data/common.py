"""What the tests of sources share."""

from glm45_jax.data.sources import counted


def run(source):
    """The documents of a source, and the counts it returns."""
    counts = {}
    docs = list(counted(source, counts))
    return docs, counts
