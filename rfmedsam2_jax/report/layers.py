"""Volumes for the page's viewer: small, compressed, and all on one grid.

As gzipped NIfTI in base64: a page that was opened from a folder may load scripts but no files.
"""

import base64
import gzip
from collections.abc import Mapping
from typing import Any

import nibabel as nib
import numpy as np

from rfmedsam2_jax.data.colours import colour
from rfmedsam2_jax.data.volumes import Geometry
from rfmedsam2_jax.report.contact_sheet import window_of
from rfmedsam2_jax.report.predictions import CaseFile

_LONGEST = 2048  # voxels along a side that graphics hardware takes
# Predicted IoU and presence of a structure by thinned slice.
_Slices = dict[int, tuple[float | None, float | None]]


def thinning(
  shape: tuple[int, int, int], spacing: tuple[float, float, float], voxels: int
) -> tuple[int, int, int]:
  """Every how many-th voxel of each axis to keep, the finest first, for at most `voxels` in all."""
  factors = [1, 1, 1]

  def sides() -> list[int]:
    return [-(-n // f) for n, f in zip(shape, factors, strict=True)]

  while int(np.prod(sides(), dtype=np.int64)) > voxels or max(sides()) > _LONGEST:
    long = [a for a in range(3) if sides()[a] > _LONGEST] or [a for a in range(3) if sides()[a] > 1]
    factors[min(long, key=lambda a: spacing[a] * factors[a])] *= 2
  return factors[0], factors[1], factors[2]


def viewer_layers(
  geometry: Geometry, names: Mapping[int, str], image: np.ndarray | None,
  maps: Mapping[str, np.ndarray], details: CaseFile | None, voxels: int,
) -> dict[str, Any]:
  """Everything that the viewer of one case shows, for JSON.

  Args:
    geometry: of the prediction; all arrays are on its canonical grid.
    names: of label values, in the order of their colours.
    image: float32 [D, H, W] or None.
    maps: label maps by title; the first is the prediction.
    details: for boxes and predicted IoU.
    voxels: that the viewer shows at most.
  """
  factors = thinning(geometry.canonical_shape, geometry.spacing, voxels)
  thin = tuple(slice(None, None, factor) for factor in factors)
  affine = geometry.canonical_affine_mm @ np.diag([*factors, 1.0])
  known = _all_names(names, maps, details)
  rank = {value: position for position, value in enumerate(known, 1)}
  ranked = {title: _ranked(found[thin], rank) for title, found in maps.items()}
  prediction = next(iter(ranked.values()))
  window, exact, below = _image_layer(None if image is None else image[thin], prediction, affine)
  layers = [below, *(_layer(title, "labels", found, affine) for title, found in ranked.items())]
  slices: dict[str, _Slices] = {}
  axis = 0
  if details is not None and details.shape == geometry.shape:
    axis = geometry.axes.index(details.slice_axis)
    boxes, certainty, slices = _prompted(details, geometry, axis, factors, rank, prediction)
    if boxes.any():
      layers.append(_layer("boxes", "boxes", boxes, affine))
    if certainty.any():
      layers.append(_layer("predicted IoU", "iou", certainty, affine))
  return {
    "axis": 2 - axis,  # of x, y, z
    # So that a slice has the number that it has in the file and in CASE.json.
    "slices": {"count": geometry.canonical_shape[axis], "flipped": geometry.flipped[axis]},
    "factors": factors[::-1], "start": _start(prediction, axis, affine),
    "window": window, "exact": exact,
    "labels": [{"name": name, "colour": colour(position), "slices": slices.get(name, {})}
               for position, name in enumerate(known.values())],
    "layers": layers,
  }


def _all_names(
  names: Mapping[int, str], maps: Mapping[str, np.ndarray], details: CaseFile | None
) -> dict[int, str]:
  """Names of all values that occur: as given, else as CASE.json has them, else their number."""
  known = dict(names)
  for name, structure in (details.structures if details else {}).items():
    known.setdefault(structure.label, name)
  for value in (int(v) for found in maps.values() for v in np.unique(found) if v):
    known.setdefault(value, f"value {value}")
  return known


def _image_layer(
  image: np.ndarray | None, prediction: np.ndarray, affine: np.ndarray
) -> tuple[tuple[float, float], bool, dict[str, str]]:
  """What becomes black and white, whether 8 or 16 bits keep every intensity, and the layer."""
  if image is None:  # something for the others to lie on
    nothing = np.zeros(prediction.shape, np.uint8)
    return (0.0, 1.0), True, _layer("no image", "image", nothing, affine)
  inside = prediction > 0 if prediction.any() else np.ones(prediction.shape, bool)
  low, high = float(image.min()), float(image.max())
  exact = low >= -(2**15) and high < 2**15 and np.array_equal(np.rint(image), image)
  if exact:
    stored, scale = image.astype(np.uint8 if low >= 0 and high < 256 else np.int16), (1.0, 0.0)
  else:
    slope = (high - low) / (2**16 - 2) or 1.0
    steps = np.rint((image.astype(np.float64) - low) / slope) - (2**15 - 1)
    stored, scale = steps.astype(np.int16), (slope, low + (2**15 - 1) * slope)
  layer = _layer("image", "image", stored, affine, scale)
  return window_of(image.astype(np.float64), inside), exact, layer


def _start(prediction: np.ndarray, axis: int, affine: np.ndarray) -> list[float]:
  """Where the viewer begins, mm: amid what was found on the slice with most structures on it."""
  planes = np.moveaxis(prediction, axis, 0)
  many = [len(np.unique(plane)) * planes[0].size + np.count_nonzero(plane) for plane in planes]
  best = int(np.argmax(many))
  at = np.argwhere(planes[best])
  centre = at.mean(axis=0) if len(at) else np.array(planes[0].shape) / 2
  return (affine @ [*np.insert(centre, axis, best), 1.0])[:3].tolist()


def _ranked(labels: np.ndarray, rank: Mapping[int, int]) -> np.ndarray:
  """Label values as their place among the names: small numbers, whatever the file has."""
  kind = np.uint8 if len(rank) < 256 else np.uint16
  values, at = np.unique(labels, return_inverse=True)
  return np.array([rank.get(int(v), 0) for v in values], kind)[at].reshape(labels.shape)


def _layer(
  title: str, kind: str, array: np.ndarray, affine: np.ndarray, scale: tuple = (1.0, 0.0)
) -> dict[str, str]:
  """One volume [z, y, x] as NIfTI [x, y, z]; `scale`: slope and intercept."""
  image = nib.Nifti1Image(np.ascontiguousarray(array.T), affine[:, [2, 1, 0, 3]])
  image.header.set_xyzt_units("mm")
  image.header.set_slope_inter(*scale)
  packed = gzip.compress(image.to_bytes(), 6, mtime=0)
  return {"title": title, "kind": kind, "data": base64.b64encode(packed).decode()}


def _prompted(
  details: CaseFile, geometry: Geometry, axis: int, factors: tuple[int, int, int],
  rank: Mapping[int, int], prediction: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, dict[str, _Slices]]:
  """On the thinned grid: edges of the boxes as labels, certainty, and what slices say by structure.

  Certainty: uint8, 1 + per cent of predicted IoU in the masks; 0 outside.
  """
  boxes, certainty = np.zeros_like(prediction), np.zeros(prediction.shape, np.uint8)
  slices: dict[str, _Slices] = {}
  last = np.array(geometry.shape) - 1
  for name, structure in details.structures.items():
    label = rank[structure.label]
    for found in structure.boxes:
      # Corners along the file's axes, then along the canonical ones, then thinned.
      corners = (np.insert(np.array(c, object), details.slice_axis, found.slice)
                 for c in (found.box[:2], found.box[2:]))
      ends = np.stack([np.clip(corner, 0, last).astype(int) for corner in corners])
      ends = np.where(geometry.flipped, (last - ends)[:, geometry.axes], ends[:, geometry.axes])
      if ends[0, axis] % factors[axis]:
        continue
      low, high = np.sort(ends, axis=0) // factors
      at = int(low[axis])
      plane = np.moveaxis(boxes, axis, 0)[at]
      (top, left), (bottom, right) = (np.delete(corner, axis) for corner in (low, high))
      plane[[top, bottom], left : right + 1] = label
      plane[top : bottom + 1, [left, right]] = label
      slices.setdefault(name, {})[at] = found.predicted_iou, found.presence
      if found.predicted_iou is not None:
        mask = np.moveaxis(prediction, axis, 0)[at] == label
        percent = np.clip(np.rint(100 * found.predicted_iou), 0, 100)
        np.moveaxis(certainty, axis, 0)[at][mask] = 1 + percent
  return boxes, certainty, slices
