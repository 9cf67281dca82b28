"""The GLM-4.5 model as pure functions over `flax.struct` pytrees."""
