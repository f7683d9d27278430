"""What tests leave out of compilation is in the programs that are compared with the original."""

import jax
import jax.numpy as jnp
from compilation import EMITTERS


def size(**options) -> int:
  """Bytes of a compiled program; some of them are its options."""
  function = jax.jit(lambda x: jnp.sin(x) * jnp.exp(x) + x)
  compiled = function.lower(jnp.ones((7, 9))).compile(options)
  return len(compiled.runtime_executable().serialize())


def test_networks_are_compiled_with_the_emitters_that_users_have():
  assert abs(size() - size(**{EMITTERS: False})) > 200


def test_what_is_compared_with_nothing_is_compiled_without_them(quickly):
  assert abs(size() - size(**{EMITTERS: False})) < 100 < abs(size() - size(**{EMITTERS: True}))
