"""How batches are made beside training; data.pipeline makes them."""

import dataclasses
from typing import Annotated, ClassVar

from pydantic import Field

from rfmedsam2_jax.base.ranges import STRICT, Whole


@dataclasses.dataclass(frozen=True)
class LoaderConfig:
  __pydantic_config__ = STRICT

  prefetch: Whole = 2  # batches kept ready; host memory grows with it
  workers: Annotated[int, Field(ge=0, le=2**10)] = 0  # processes that make batches; 0: a thread
  threads: ClassVar[int] = 1  # that make batches while the device works
