"""How volumes are predicted."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class InferenceConfig:
  overlap: float = 0.5  # of the generator's windows, as a share of the patch; more is slower
  batch_size: int = 1  # windows per call of the generator and device
  mirror_axes: tuple[int, ...] = ()
  # Axes (0 slices, 1 rows, 2 columns) along which the generator also sees mirrored windows and is
  # averaged; each doubles its time. Only axes that training mirrors too make sense.

  def __post_init__(self):
    if not 0.0 <= self.overlap < 1.0:
      raise ValueError(f"overlap is {self.overlap}; it must be at least 0 and below 1")
