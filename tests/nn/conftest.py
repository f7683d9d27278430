"""Networks are compared with the original as users compile them."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def full_compilation():
  jax.config.update("jax_disable_most_optimizations", False)
  yield
  jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def quickly(full_compilation):
  """For what is compared with nothing: compiled as in other tests."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)
