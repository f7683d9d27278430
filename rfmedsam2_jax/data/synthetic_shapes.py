"""Shapes of synthetic anatomy as level functions on the voxels of a run, negative inside.

Space is measured in widths of the picture: x from -0.5 to 0.5, y and z to the same scale; axes are
z, y, x. Its points are displaced by a smooth random field, so that whatever is drawn in it is bent.
A level is only computed within the box of its shape, which is what makes a scene quick.
"""

import dataclasses

import numpy as np
import scipy.sparse

from rfmedsam2_jax.data.plan import Triple

Box = tuple[slice, slice, slice]
FAR = np.float32(9)  # a level that is surely outside
# Standard deviation that a cubic B-spline leaves of independent knots, per axis.
_SPLINE_DEVIATION = 0.692


@dataclasses.dataclass(frozen=True, eq=False)
class Level:
  """Distance to a surface within a box of the space, float32, in widths; outside of it: far."""

  box: Box
  values: np.ndarray

  def __add__(self, further: float | np.ndarray) -> "Level":
    """Smaller by so much on all sides."""
    return Level(self.box, self.values + np.asarray(further, np.float32))

  def within(self, other: "Level") -> "Level | None":
    """What both have; None if their boxes do not meet."""
    box = _meet(self.box, other.box)
    return None if box is None else Level(box, np.maximum(self.at(box), other.at(box)))

  def cut(self, values: np.ndarray) -> "Level":
    """What is below 0 in `values` too, which are of the same box."""
    return Level(self.box, np.maximum(self.values, np.asarray(values, np.float32)))

  def skin(self, thickness: float) -> "Level":
    """What lies within half a thickness of the surface."""
    return Level(self.box, np.abs(self.values) - np.float32(thickness / 2))

  def without(self, other: "Level | None") -> "Level":
    box = None if other is None else _meet(self.box, other.box)
    if other is None or box is None:
      return self
    values = self.values.copy()
    part = values[_relative(box, self.box)]
    np.maximum(part, -other.at(box), out=part)
    return Level(self.box, values)

  def at(self, box: Box) -> np.ndarray:
    """A view of the values of a box that lies in the level's own."""
    return self.values[_relative(box, self.box)]


def _meet(one: Box, other: Box) -> Box | None:
  z, y, x = (slice(max(a.start, b.start), min(a.stop, b.stop))
             for a, b in zip(one, other, strict=True))
  return None if any(s.stop <= s.start for s in (z, y, x)) else (z, y, x)


def _relative(box: Box, outer: Box) -> Box:
  z, y, x = (slice(a.start - b.start, a.stop - b.start) for a, b in zip(box, outer, strict=True))
  return z, y, x


def _spline(rng: np.random.Generator, size: int, wavelength: float) -> scipy.sparse.csr_array:
  """Cubic B-splines, float32 [size, knots], `wavelength` samples apart, from a random start."""
  at = rng.random() + np.arange(size) / wavelength
  low = at.astype(np.int32)
  t = at - low
  weights = np.stack(
    [(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3], axis=1)
  values = (weights / (6 * _SPLINE_DEVIATION)).astype(np.float32).ravel()
  columns = (low[:, None] + np.arange(4, dtype=np.int32)).ravel()
  starts = 4 * np.arange(size + 1, dtype=np.int32)
  return scipy.sparse.csr_array((values, columns, starts), shape=(size, int(low[-1]) + 4))


def smooth_field(rng: np.random.Generator, shape: Triple, wavelengths: tuple[float, ...]
                 ) -> np.ndarray:
  """A smooth random field, float32 [D, H, W], of mean 0 and standard deviation 1.

  `wavelengths` are the distances of its knots along every axis, in samples, 1 at least.
  """
  z, y, x = (_spline(rng, n, max(w, 1.0)) for n, w in zip(shape, wavelengths, strict=True))
  field = rng.standard_normal((x.shape[1], y.shape[1] * z.shape[1]), dtype=np.float32)
  # The axis that comes last is done first, while there is little to turn.
  field = (x @ field).reshape(shape[2], y.shape[1], z.shape[1]).transpose(1, 2, 0)
  field = (y @ field.reshape(y.shape[1], -1)).reshape(shape[1], z.shape[1], -1).transpose(1, 0, 2)
  return (z @ field.reshape(z.shape[1], -1)).reshape(shape)


def log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
  return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def rotation(rng: np.random.Generator) -> np.ndarray:
  """A rotation [3, 3], uniform over all."""
  q, r = np.linalg.qr(rng.standard_normal((3, 3)))
  return q * np.sign(np.diag(r))


class Space:
  """The voxels of a run: `shape` of them, `parts` of its first axis to a slice.

  Args:
    spacing: widths between voxels along z, y, x.
    bend: standard deviation of the displacement, in widths.
    shifts: [D, 2], y and x of every plane besides, as a patient who breathes has them.
  """

  # Distances of the knots of `bumps`, in widths.
  WAVELENGTHS = (0.4, 0.18, 0.08, 0.035)

  def __init__(self, rng: np.random.Generator, shape: Triple, parts: int,
               spacing: tuple[float, float, float], bend: float, shifts: np.ndarray):
    self.shape, self.parts, self.spacing = shape, parts, spacing
    self.pixel = (spacing[1] + spacing[2]) / 2
    self.axes = [((np.arange(n) - (n - 1) / 2) * s).astype(np.float32)
                 for n, s in zip(shape, spacing, strict=True)]
    # What surfaces are roughened with; unit deviation.
    self.bumps = [self.field(rng, w) for w in self.WAVELENGTHS]
    self.margin = 3.2 * bend + float(np.abs(shifts).max())
    self.points = []
    for axis, positions in enumerate(self.axes):
      outward = [1, 1, 1]
      outward[axis] = -1
      moved = self.field(rng, 0.45)
      moved *= np.float32(bend)
      np.clip(moved, -3 * bend, 3 * bend, out=moved)
      moved += positions.reshape(outward)
      if axis:
        moved += shifts[:, axis - 1].astype(np.float32)[:, None, None]
      self.points.append(moved)

  def field(self, rng: np.random.Generator, wavelength: float) -> np.ndarray:
    """A smooth field on all voxels; knots `wavelength` widths apart."""
    return smooth_field(rng, self.shape, tuple(wavelength / s for s in self.spacing))

  def box(self, low: np.ndarray, high: np.ndarray) -> Box | None:
    """The voxels between two corners [3], whole slices of them, with what may be moved there."""
    margin = self.margin + 2 * self.pixel
    found = []
    for axis, positions in enumerate(self.axes):
      start = int(np.searchsorted(positions, low[axis] - margin))
      stop = int(np.searchsorted(positions, high[axis] + margin))
      if axis == 0:
        start, stop = start - start % self.parts, stop + -stop % self.parts
      if stop <= start:
        return None
      found.append(slice(start, stop))
    z, y, x = found
    return z, y, x

  def whole(self) -> Box:
    z, y, x = (slice(0, n) for n in self.shape)
    return z, y, x

  def bump(self, box: Box, wavelength: float, flips: tuple[int, ...] = (1, 1, 1)) -> np.ndarray:
    """The field of `bumps` with knots nearest to `wavelength`, seen from one of eight sides."""
    nearest = int(np.argmin(np.abs(np.log(np.array(self.WAVELENGTHS) / wavelength))))
    field = self.bumps[nearest][tuple(slice(None, None, f) for f in flips)]
    return field[box]

  def ellipsoid(self, centre: np.ndarray, radii: np.ndarray, frame: np.ndarray, boxy: bool = False,
                spare: float = 0.0) -> Level | None:
    """An ellipsoid, or a box with round edges; None where it is out of sight.

    `frame` [3, 3] has its axes as rows; `spare` is how far from its surface the level is needed.
    """
    reach = np.sqrt(((frame * radii[:, None]) ** 2).sum(0)) if not boxy else np.abs(
      frame * radii[:, None]).sum(0)
    box = self.box(centre - reach - spare, centre + reach + spare)
    if box is None:
      return None
    ways = [p[box] - np.float32(c) for p, c in zip(self.points, centre, strict=True)]
    # First order distance: the norm's excess over one, divided by its gradient.
    squares, slope = np.zeros_like(ways[0]), np.full_like(ways[0], 1e-6)
    for row, radius in zip((frame / radii[:, None]).astype(np.float32), radii, strict=True):
      q = row[0] * ways[0]
      q += row[1] * ways[1]
      q += row[2] * ways[2]
      q *= q
      steep = q * q * q if boxy else q.copy()
      steep *= np.float32(1 / radius**2)
      slope += steep
      squares += q * q if boxy else q
    norm, slope = np.sqrt(squares), np.sqrt(slope)
    root = np.sqrt(norm) if boxy else norm
    return Level(box, (root - 1) * (norm * root if boxy else norm) / slope)

  def tube(self, segments: np.ndarray, spare: float = 0.0) -> Level | None:
    """Cones with round ends, [n, 8]: from z y x to z y x, a radius at either end."""
    wide = np.maximum(segments[:, 6], segments[:, 7])[:, None] + spare
    low = np.minimum(segments[:, :3], segments[:, 3:6]) - wide
    high = np.maximum(segments[:, :3], segments[:, 3:6]) + wide
    box = self.box(low.min(0), high.max(0))
    if box is None:
      return None
    values = np.full([s.stop - s.start for s in box], FAR)
    for segment, a, b in zip(segments.astype(np.float32), low, high, strict=True):
      inner = self.box(a, b)
      if inner is None:
        continue
      start, along = segment[:3], segment[3:6] - segment[:3]
      ways = [p[inner] - c for p, c in zip(self.points, start, strict=True)]
      part = ways[0] * along[0]
      part += ways[1] * along[1]
      part += ways[2] * along[2]
      part /= along @ along + np.float32(1e-12)
      np.clip(part, 0, 1, out=part)
      squares = np.zeros_like(part)
      for way, v in zip(ways, along, strict=True):
        way -= part * v
        way *= way
        squares += way
      distance = np.sqrt(squares) - (segment[6] + part * (segment[7] - segment[6]))
      view = values[_relative(inner, box)]
      np.minimum(view, distance, out=view)
    return Level(box, values)


def joined(one: Level | None, other: Level | None) -> Level | None:
  """What any of two has."""
  if one is None or other is None:
    return one or other
  z, y, x = (slice(min(a.start, b.start), max(a.stop, b.stop))
             for a, b in zip(one.box, other.box, strict=True))
  box = (z, y, x)
  values = np.full([s.stop - s.start for s in box], FAR)
  for level in (one, other):
    part = values[_relative(level.box, box)]
    np.minimum(part, level.values, out=part)
  return Level(box, values)


def curve(rng: np.random.Generator, start: np.ndarray, direction: np.ndarray, length: float,
          radius: float, steps: int, winding: float) -> np.ndarray:
  """Segments [steps, 8] of a tube that winds; `winding` is the turn per step, in radians or so."""
  found, at, radius_here = [], np.array(start), radius
  for _ in range(steps):
    direction = direction + rng.standard_normal(3) * winding
    direction = direction / np.linalg.norm(direction)
    after, radius_after = at + direction * (length / steps), radius * rng.uniform(0.85, 1.15)
    found.append([*at, *after, radius_here, radius_after])
    at, radius_here = after, radius_after
  return np.array(found)


def tree(rng: np.random.Generator, start: np.ndarray, direction: np.ndarray, length: float,
         radius: float, generations: int) -> np.ndarray:
  """Segments [n, 8] of a vessel that divides in two `generations` times, thinner every time."""
  own = curve(rng, start, direction, length, radius, 2, 0.25)
  own[:, 7] *= 0.9
  if not generations:
    return own
  end, ahead = own[-1, 3:6], own[-1, 3:6] - own[-1, :3]
  ahead = ahead / np.linalg.norm(ahead)
  aside = np.cross(ahead, rng.standard_normal(3))
  aside /= np.linalg.norm(aside) + 1e-9
  parts = [own]
  for side in (-1, 1):
    turned = ahead + side * aside * rng.uniform(0.25, 1.0)
    parts.append(tree(rng, end, turned / np.linalg.norm(turned), length * rng.uniform(0.6, 0.95),
                      radius * rng.uniform(0.6, 0.85), generations - 1))
  return np.concatenate(parts)
