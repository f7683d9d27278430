"""Networks are compared with the original as users compile them."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def full_compilation():
  jax.config.update("jax_disable_most_optimizations", False)
  yield
  jax.config.update("jax_disable_most_optimizations", True)
