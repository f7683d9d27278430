"""Surfaces of masks: elements of known area, and the distances from one surface to another.

An element lies amid 2 x 2 x 2 voxels of which some belong to the mask. It is what marching cubes
would put there, and its distances are those of its place. Areas and distances are those of
DeepMind's surface-distance (Nikolov et al., "Clinically applicable segmentation of head and neck
anatomy", JMIR 2021), whose table of areas is derived here instead of copied; grids may be sheared.
"""

import collections
import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import ndimage
from scipy.spatial import cKDTree

# Headers are float32 and spacings have six digits: lengths and right angles are equal up to this.
ROUNDING = 1e-5
_FULL = 255  # the code of eight voxels that all belong to the mask
_CORNERS = np.array(list(itertools.product((0, 1), repeat=3)))  # corner n is bit n of a code


class Distances(NamedTuple):
  """The elements of a surface: how far each is from another surface, and how large."""

  mm: np.ndarray  # float64 [n]
  areas: np.ndarray  # float64 [n], mm^2

  def quantile(self, share: float) -> float:
    """The least distance within which a share of the area lies, mm."""
    order = np.argsort(self.mm)
    reached = np.cumsum(self.areas[order])
    # Sums of areas are rounded: what misses the share by less has it.
    return float(self.mm[order][np.searchsorted(reached, share * (1 - 1e-9) * reached[-1])])

  def area_within(self, tolerance: float) -> float:
    """mm^2 of what lies within a tolerance in mm; a distance that equals it is within."""
    return float(self.areas[self.mm <= tolerance * (1 + ROUNDING)].sum())


def voxel_steps(voxel: ArrayLike) -> np.ndarray:
  """float64 [3, 3], columns are the steps in mm from a voxel to the next, of them or of [3] mm."""
  steps = np.asarray(voxel, np.float64)
  return np.diag(steps) if steps.ndim == 1 else steps


def surface_distances(
  prediction: np.ndarray, reference: np.ndarray, voxel: ArrayLike
) -> tuple[Distances, Distances]:
  """Distances from the elements of the prediction's surface to the reference's, and back.

  Args:
    prediction, reference: bool [D, H, W], neither empty. voxel: see `voxel_steps`.
  """
  steps = voxel_steps(voxel)
  # Both surfaces lie in the box of the union, and so does every distance between them.
  box = ndimage.find_objects((prediction | reference).astype(np.uint8))[0]
  codes = [_codes(mask[box]) for mask in (prediction, reference)]
  ours, theirs = ((code > 0) & (code < _FULL) for code in codes)
  nearest = _nearest_by_transform if _is_orthogonal(steps) else _nearest_by_tree
  areas = element_areas(steps)
  return (Distances(nearest(ours, theirs, steps), areas[codes[0][ours]]),
          Distances(nearest(theirs, ours, steps), areas[codes[1][theirs]]))


def diagonal(shape: tuple[int, ...], voxel: ArrayLike) -> float:
  """mm between the corners of a volume that are farthest from each other; voxel: `voxel_steps`."""
  across = (2 * _CORNERS - 1) * shape
  return float(np.linalg.norm(across @ voxel_steps(voxel).T, axis=1).max())


def element_areas(steps: np.ndarray) -> np.ndarray:
  """mm^2, float64 [256], of the element of each code; steps: as `voxel_steps` gives them."""
  code, weight, vectors = _triangles()
  cofactors = np.linalg.det(steps) * np.linalg.inv(steps).T  # how vectors of areas are transformed
  sizes = np.linalg.norm(vectors @ cofactors.T, axis=1)
  return np.bincount(code, weight * sizes, minlength=_FULL + 1)


def _codes(mask: np.ndarray) -> np.ndarray:
  """uint8 [D + 1, H + 1, W + 1]: which of the eight voxels around each corner are in the mask."""
  padded = np.pad(mask, 1).view(np.uint8)
  shape = [size + 1 for size in mask.shape]
  codes = np.zeros(shape, np.uint8)
  for bit, corner in enumerate(_CORNERS):
    around = tuple(slice(first, first + size) for first, size in zip(corner, shape, strict=True))
    codes |= padded[around] << np.uint8(bit)
  return codes


def _is_orthogonal(steps: np.ndarray) -> bool:
  directions = steps / np.linalg.norm(steps, axis=0)
  return bool(np.abs(directions.T @ directions - np.eye(3)).max() < ROUNDING)


def _nearest_by_transform(ours: np.ndarray, theirs: np.ndarray, steps: np.ndarray) -> np.ndarray:
  """mm, float64 [n], from each of our places (bool [D, H, W]) to the nearest of theirs.

  Its time is that of the box, however far the places are apart; steps have right angles.
  """
  spacing = np.linalg.norm(steps, axis=0)
  return ndimage.distance_transform_edt(~theirs, sampling=spacing)[ours]


def _nearest_by_tree(ours: np.ndarray, theirs: np.ndarray, steps: np.ndarray) -> np.ndarray:
  """The same for steps of any angles."""
  found = np.zeros(ours.shape)
  away = ours & ~theirs
  tree = cKDTree(np.argwhere(theirs) @ steps.T)
  found[away] = tree.query(np.argwhere(away) @ steps.T)[0]
  return found[ours]


@functools.cache
def _triangles() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """The triangles of all elements on the unit cube, T of them.

  A polygon is cut into triangles so that their area is largest. Where several ways are, which is
  of no consequence unless a grid is sheared, each counts its part: no direction is preferred.

  Returns:
    code: int [T]. weight: float64 [T]. vectors: float64 [T, 3], as long as the area is large.
  """
  codes, weights, vectors = [], [], []
  for code in range(1, _FULL):
    for polygon in _polygons(code):
      ways = polygon[np.array(list(_triangulations(0, len(polygon) - 1)))]  # [ways, T, 3, 3]
      a, b, c = np.moveaxis(ways, 2, 0)
      found = np.cross(b - a, c - a) / 2
      areas = np.linalg.norm(found, axis=-1).sum(axis=1)
      largest = found[areas > areas.max() - 1e-6]
      vectors.append(largest.reshape(-1, 3))
      codes.append(np.full(len(vectors[-1]), code))
      weights.append(np.full(len(vectors[-1]), 1 / len(largest)))
  return np.concatenate(codes), np.concatenate(weights), np.concatenate(vectors)


def _polygons(code: int) -> list[np.ndarray]:
  """What parts the voxels of a code: closed polygons of midpoints of the cube's edges, [n, 3] each.

  On a face of which two corners across are inside, the corners of the kind that fewer of the eight
  are of (inside, if as many) are cut off one by one.
  """
  inside = [bool(code >> corner & 1) for corner in range(8)]
  fewer = sum(inside) <= 4
  links: dict[tuple[int, int], list[tuple[int, int]]] = collections.defaultdict(list)
  for axis, side in itertools.product((1, 2, 4), (False, True)):
    face = [corner for corner in range(8) if bool(corner & axis) == side]
    cut = [(a, b) for a, b in itertools.combinations(face, 2)
           if a ^ b in (1, 2, 4) and inside[a] != inside[b]]
    single = [corner for corner in face if cut and inside[corner] == fewer]
    pairs = [cut] if len(cut) == 2 else [[e for e in cut if corner in e] for corner in single]
    for first, second in pairs:
      links[first].append(second)
      links[second].append(first)
  polygons = []
  while links:
    edge, (following, _) = links.popitem()
    edges = [edge]
    while following in links:
      edges.append(following)
      one, other = links.pop(following)
      following = one if one in links else other
    polygons.append(_CORNERS[np.array(edges)].mean(axis=1))
  return polygons


def _triangulations(first: int, last: int) -> Iterator[tuple[tuple[int, int, int], ...]]:
  """All ways to cut the polygon of the vertices from `first` to `last` into triangles."""
  if last - first < 2:
    yield ()
  for third in range(first + 1, last):
    for parts in itertools.product(_triangulations(first, third), _triangulations(third, last)):
      yield (*parts[0], (first, third, last), *parts[1])
