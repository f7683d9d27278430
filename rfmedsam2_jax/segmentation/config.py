"""How volumes are predicted."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import AfterValidator, Field

from rfmedsam2_jax.base.ranges import STRICT, Axis
from rfmedsam2_jax.data.terms import read_code


def _code(text: str) -> str:
  read_code(text)
  return text


@dataclasses.dataclass(frozen=True)
class WarningConfig:
  """When a prediction is called unusual; docs/trust.md has the figures behind these values."""

  stage_dice: float = 0.85  # of a structure after a stage and after the last one; less is unusual
  spacing_factor: float = 1.5  # beyond the smallest and largest voxel size of the training cases
  extent_factor: float = 1.3  # beyond their smallest and largest field of view, along each axis

  intensity_factor: float = 2.0
  # Of the distance between an image's intensities and those of the nearest training case, to the
  # largest such distance within the training cases; both in standard deviations, normalised.
  intensity_distance: float = 0.1  # what is nearer is never called unusual


@dataclasses.dataclass(frozen=True)
class InferenceConfig:
  __pydantic_config__ = STRICT

  overlap: Annotated[float, Field(ge=0, lt=1)] = 0.5
  # Of the generator's windows, as a share of the patch; more is slower.
  mirror_axes: tuple[Axis, ...] = ()
  # Axes (0 slices, 1 rows, 2 columns) along which the generator also sees mirrored windows and is
  # averaged; each doubles its time. Only axes that training mirrors too make sense.
  codes: Mapping[str, Annotated[str, AfterValidator(_code)]] = dataclasses.field(
    default_factory=dict, hash=False)
  # Terms for DICOM beside those of data.terms: {optic chiasm: SCT 244453006 Optic chiasm}.
  batch_size: ClassVar[int] = 1  # windows per call of the generator and device
  warnings: ClassVar[WarningConfig] = WarningConfig()
