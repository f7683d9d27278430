"""What commands that write into a folder say of it."""

import contextlib
from collections.abc import Iterator

from rfmedsam2_jax.base.errors import UserError


@contextlib.contextmanager
def named_options() -> Iterator[None]:
  """Names the options that help where a result exists already."""
  from rfmedsam2_jax.data.files import ResultExists

  try:
    yield
  except ResultExists as error:
    raise UserError(f"{error.path}: exists already; choose another --out or replace it: "
                    "--overwrite") from None
