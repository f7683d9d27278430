"""How batches are made beside training; data.pipeline makes them."""

import dataclasses
from typing import Annotated, ClassVar

from pydantic import Field

from rfmedsam2_jax.base.ranges import STRICT


@dataclasses.dataclass(frozen=True)
class LoaderConfig:
  __pydantic_config__ = STRICT

  workers: Annotated[int, Field(ge=0, le=2**10)] = 0  # processes that make batches; 0: a thread
  threads: ClassVar[int] = 1  # that make batches while the device works

  @property
  def prefetch(self) -> int:
    """Batches kept ready; host memory grows with it."""
    return 4 if self.workers else 2
