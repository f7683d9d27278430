"""Masks of one slice as polygons, and polygons as masks: what structure sets of DICOM hold.

Coordinates are pixels, (column, row) from the first one's centre. Outlines run half way between the
centres of pixels, so that filling them gives the mask again, to the pixel.
"""

from collections.abc import Sequence

import numpy as np

_ON_EDGE = 1e-3  # pixels; decimals of files
# Pixels by which a channel leaves the straight line, which often runs through centres.
_ASIDE = np.array([[0.0, 0.25], [0.25, 0.0], [0.2, 0.1], [-0.1, 0.2], [0.15, -0.2], [0.3, 0.17]])


def outlines(mask: np.ndarray) -> list[np.ndarray]:
  """Polygons, float64 [n, 2] each, around the parts of a mask, bool [rows, columns].

  The first point is not repeated. A hole is tied to what is around it by a channel without width
  (the keyhole of PS3.3, C.8.8.6.3), so that every reader leaves it out.
  """
  from contourpy import FillType, contour_generator

  places = np.argwhere(mask)
  if not len(places):
    return []
  low, high = places.min(axis=0), places.max(axis=0) + 1
  padded = np.pad(mask[low[0]:high[0], low[1]:high[1]].astype(np.float64), 1)
  generator = contour_generator(z=padded, fill_type=FillType.OuterOffset)
  corner = low[::-1] - 1.0
  found = []
  for points, offsets in zip(*generator.filled(0.5, np.inf), strict=True):
    # Every ring repeats its first point at its end.
    rings = [points[a:b - 1] + corner for a, b in zip(offsets[:-1], offsets[1:], strict=True)]
    found.append(_tied(rings))
  return found


def _tied(rings: Sequence[np.ndarray]) -> np.ndarray:
  """An outer ring and its holes as one, by short channels between their points.

  Holes near the outer ring come first, and others may be tied to them.
  """
  whole = rings[0]
  for hole in sorted(rings[1:], key=lambda one: _nearest(rings[0], one)[0]):
    _, here, there = _nearest(whole, hole)
    hole = np.roll(hole, -there, axis=0)
    channel = _channel(whole[here], hole[0])
    whole = np.concatenate([whole[:here + 1], channel, hole, hole[:1], channel[::-1],
                            whole[here:]])
  return whole


def _channel(start: np.ndarray, end: np.ndarray) -> np.ndarray:
  """Two points on the way from one ring to another that keep it away from the centres of pixels.

  A centre on the channel would be inside or outside as the reader's arithmetic has it.
  """
  low, high = np.floor(np.minimum(start, end)) - 1, np.ceil(np.maximum(start, end)) + 1
  columns, rows = np.meshgrid(np.arange(low[0], high[0] + 1), np.arange(low[1], high[1] + 1))
  centres = np.column_stack([columns.ravel(), rows.ravel()])
  ways = [np.stack([start, start + aside, end + aside, end]) for aside in _ASIDE]
  clear = [min(_away(centres, a, b) for a, b in zip(way[:-1], way[1:], strict=True))
           for way in ways]
  return ways[int(np.argmax(clear))][1:3]


def _away(places: np.ndarray, start: np.ndarray, end: np.ndarray) -> float:
  """The smallest distance of places, [n, 2], from the line between two points."""
  along = end - start
  length = float(along @ along)
  share = np.clip((places - start) @ along / length, 0, 1) if length else np.zeros(len(places))
  return float(np.linalg.norm(places - start - share[:, None] * along, axis=1).min())


def _nearest(one: np.ndarray, other: np.ndarray) -> tuple[float, int, int]:
  """The smallest squared distance of points of two rings, and which they are."""
  from scipy.spatial import KDTree

  distances, nearest = KDTree(other).query(one)
  here = int(np.argmin(distances))
  return float(distances[here]), here, int(nearest[here])


def filled(polygons: Sequence[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
  """bool [rows, columns]: pixels whose centres lie in an odd number of polygons, or on an edge.

  What lies beyond `shape` is cut off. Some programs draw through the centres of the outermost
  pixels, which belong to the structure then; of edges that are passed twice, as those of a keyhole,
  nothing lies on them.
  """
  rows, columns = shape
  rings = [ring for ring in polygons if len(ring)]
  if not rings:
    return np.zeros(shape, bool)
  edges = np.concatenate([np.stack([ring, np.roll(ring, -1, axis=0)], axis=1) for ring in rings])
  low, high = edges[:, :, 1].min(axis=1), edges[:, :, 1].max(axis=1)
  # A row belongs to an edge from its lower end on to before its upper one.
  row, across = _crossings(edges, np.ceil(low), np.ceil(high), rows)
  toggles = np.zeros((rows, columns + 1), np.int32)
  np.add.at(toggles, (row, np.clip(np.ceil(across), 0, columns).astype(int)), 1)
  inside = (np.cumsum(toggles, axis=1)[:, :columns] % 2).astype(bool)
  return inside | _on_edges(_passed_once(edges), shape)


def _crossings(edges: np.ndarray, first: np.ndarray, end: np.ndarray, rows: int
               ) -> tuple[np.ndarray, np.ndarray]:
  """Rows that edges cross, from each one's `first` to before its `end`, and where, in columns."""
  first, end = (np.clip(x, 0, rows).astype(int) for x in (first, end))
  counts = np.maximum(end - first, 0)
  which = np.repeat(np.arange(len(edges)), counts)
  row = first[which] + np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)
  (x0, y0), (x1, y1) = edges[which, 0].T, edges[which, 1].T
  return row, x0 + (row - y0) * ((x1 - x0) / (y1 - y0))


def _passed_once(edges: np.ndarray) -> np.ndarray:
  """The edges, [n, 2, 2], without those that cancel out."""
  swap = (edges[:, 0, 0] > edges[:, 1, 0]) | (
    (edges[:, 0, 0] == edges[:, 1, 0]) & (edges[:, 0, 1] > edges[:, 1, 1]))
  ordered = np.where(swap[:, None, None], edges[:, ::-1], edges)
  distinct, counts = np.unique(ordered.reshape(-1, 4), axis=0, return_counts=True)
  return distinct[counts % 2 == 1].reshape(-1, 2, 2)


def _on_edges(edges: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
  """Pixels whose centres lie on an edge, as far as the decimals of files tell."""
  rows, columns = shape
  found = np.zeros(shape, bool)
  low, high = edges[:, :, 1].min(axis=1), edges[:, :, 1].max(axis=1)
  level = high - low < _ON_EDGE
  row, across = _crossings(edges[~level], np.ceil(low[~level] - _ON_EDGE),
                           np.floor(high[~level] + _ON_EDGE) + 1, rows)
  column = np.rint(across).astype(int)
  hit = (np.abs(across - column) < _ON_EDGE) & (column >= 0) & (column < columns)
  found[row[hit], column[hit]] = True
  for (x0, y), (x1, _) in edges[level & (np.abs(low - np.rint(low)) < _ON_EDGE)]:
    left, right = sorted((x0, x1))
    if 0 <= round(y) < rows:
      found[round(y), max(0, int(np.ceil(left - _ON_EDGE))):
            max(0, int(np.floor(right + _ON_EDGE)) + 1)] = True
  return found
