"""The mark of tests that need reasoning-gym; `make setup` leaves it out where no C compiler is."""

import importlib.util

import pytest

needs_gym = pytest.mark.skipif(
    importlib.util.find_spec("reasoning_gym") is None, reason="reasoning-gym is not installed"
)
