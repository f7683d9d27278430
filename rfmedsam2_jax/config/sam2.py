"""Which SAM 2: the sizes of its network, which a file takes from a preset, and what is open."""

import dataclasses
from typing import Any

from rfmedsam2_jax.base.ranges import Precision
from rfmedsam2_jax.nn.adapters import AdapterConfig
from rfmedsam2_jax.nn.remat import Remat
from rfmedsam2_jax.nn.sam2 import SAM2Config

_OPEN = ("image_size", "adapters", "dtype", "remat")  # no sizes of the network


@dataclasses.dataclass(frozen=True)
class SAM2Options:
  """SAM 2 and its adapters; `network` is what nn builds of them.

  In files `preset: NAME` (nn.presets) gives all values but those that stand beside it.
  """

  sizes: dict[str, Any]  # embed_dim and all other values of nn.sam2.SAM2Config that are not below
  image_size: int  # side S of the square image, divisible by 32; cost grows with its square
  adapters: AdapterConfig = AdapterConfig()
  dtype: Precision = "float32"  # of the computation; parameters stay float32
  remat: Remat = "none"  # what of every block is kept for the backward pass, see SAM2Config

  @classmethod
  def of(cls, network: SAM2Config) -> "SAM2Options":
    values = {field.name: getattr(network, field.name) for field in dataclasses.fields(network)}
    return cls(**{name: values.pop(name) for name in _OPEN}, sizes=values)

  @property
  def network(self) -> SAM2Config:
    return SAM2Config(**self.sizes, **{name: getattr(self, name) for name in _OPEN})
