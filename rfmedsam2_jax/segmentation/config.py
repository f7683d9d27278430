"""How volumes are predicted."""

import dataclasses


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

  def __post_init__(self):
    for name in ("spacing_factor", "extent_factor", "intensity_factor"):
      if not getattr(self, name) >= 1.0:
        raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more")


@dataclasses.dataclass(frozen=True)
class InferenceConfig:
  overlap: float = 0.5  # of the generator's windows, as a share of the patch; more is slower
  batch_size: int = 1  # windows per call of the generator and device
  mirror_axes: tuple[int, ...] = ()
  # Axes (0 slices, 1 rows, 2 columns) along which the generator also sees mirrored windows and is
  # averaged; each doubles its time. Only axes that training mirrors too make sense.
  warnings: WarningConfig = WarningConfig()

  def __post_init__(self):
    if not 0.0 <= self.overlap < 1.0:
      raise ValueError(f"overlap is {self.overlap}; it must be at least 0 and below 1")
