"""A phantom abdomen in CT-like intensities, made from a seed, as an nnU-Net v2 raw folder.

Every organ moves, turns, grows and is bent by a smooth random field; neighbours touch at contrasts
of few noise levels; bowel has an organ's intensity and no label; a smooth bias multiplies
everything; each file has an axis order, flips and a spacing of its own.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.data.files import replacing


@dataclasses.dataclass(frozen=True)
class PhantomConfig:
  cases: int = 16  # labelled volumes for training (imagesTr, labelsTr)
  test_cases: int = 4  # further volumes that training never sees (imagesTs, labelsTs)
  seed: int = 0  # case i depends on (seed, i) only: more cases leave the first ones as they are
  slice_spacing: tuple[float, float] = (5.4, 6.6)  # mm between axial slices, drawn per case
  pixel_spacing: tuple[float, float] = (1.9, 2.3)  # mm within a slice, drawn per case
  field_of_view: tuple[float, float, float] = (208.0, 208.0, 208.0)  # mm, z y x; less is faster
  noise: float = 16.0  # HU, standard deviation before a slight smoothing
  bias: float = 0.06  # greatest relative change of intensity by the smooth bias field
  deformation: float = 6.0  # mm, standard deviation of the smooth displacement
  missing: float = 0.25  # probability that a case has no gallbladder
  reorient: bool = True  # write each file with its own axis order and flips


@dataclasses.dataclass(frozen=True)
class _Organ:
  """An ellipsoid or a tube along z; lengths in mm along z, y (to the back), x (to the left)."""

  centre: tuple[float, ...]
  radii: tuple[float, ...]
  tilt: float  # degrees in the axial plane
  hu: float
  tube: bool = False


# What is labelled, in the order of the label values 1, 2, ... z runs to the head.
_ORGANS = {
  "liver": _Organ((14, -8, -38), (50, 46, 40), 25, 108),
  "spleen": _Organ((24, 20, 55), (40, 31, 21), -25, 122),
  "left_kidney": _Organ((-24, 36, 40), (38, 20, 21), 20, 165),
  "aorta": _Organ((0, 26, 6), (0, 13, 13), 0, 145, tube=True),
  "gallbladder": _Organ((-26, -26, -14), (29, 23, 21), -20, 12),
}
# Seen, but not asked for: drawn below the organs, later ones on top of earlier ones.
_BODY = _Organ((0, 2, 0), (0, 78, 96), 0, -95, tube=True)
_MUSCLE = _Organ((0, 2, 0), (0, 68, 86), 0, 48, tube=True)
_SPINE = _Organ((0, 56, 0), (0, 16, 17), 0, 340, tube=True)
_BOWEL = (_Organ((-40, -32, 32), (26, 17, 20), 0, 100), _Organ((-58, -6, -42), (24, 20, 22), 0, 88))


def _smooth_field(rng: np.random.Generator, shape: tuple[int, ...], knots: int) -> np.ndarray:
  """A smooth random field of unit standard deviation, float32 [D, H, W], from knots^3 values."""
  field = rng.standard_normal((knots,) * 3)
  for axis, size in enumerate(shape):
    # One axis after the other: cubic interpolation of a product grid.
    at = np.linspace(0, knots - 1, size)[None]
    spline = np.stack([ndimage.map_coordinates(unit, at, order=3, mode="nearest")
                       for unit in np.eye(knots)])
    field = np.moveaxis(np.tensordot(field, spline, axes=(axis, 0)), -1, axis)
  return (field / field.std()).astype(np.float32)


def _level(organ: _Organ, z: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
  """Level function of an organ, [D, H, W]: below 1 inside; z, y, x are in mm."""
  angle = np.deg2rad(organ.tilt)
  dy, dx = y - organ.centre[1], x - organ.centre[2]
  along = np.cos(angle) * dy + np.sin(angle) * dx
  across = -np.sin(angle) * dy + np.cos(angle) * dx
  level = (along / organ.radii[1]) ** 2 + (across / organ.radii[2]) ** 2
  if not organ.tube:
    level = level + ((z - organ.centre[0]) / organ.radii[0]) ** 2
  return level


def _vary(organ: _Organ, rng: np.random.Generator) -> _Organ:
  """The organ of one person: moved, grown, turned."""
  return _Organ(
    tuple(c + rng.normal(0, 4) for c in organ.centre),
    tuple(r * rng.uniform(0.82, 1.15) for r in organ.radii),
    organ.tilt + rng.normal(0, 8), organ.hu + rng.normal(0, 5), organ.tube)


def phantom_case(config: PhantomConfig, index: int
                 ) -> tuple[np.ndarray, np.ndarray, tuple[float, ...]]:
  """One volume, its label map and its spacing; they depend on (config.seed, index) only.

  int16 [D, H, W] in HU, axes to head, back and left (z, y, x of LPS); uint8 [D, H, W], 0
  background, then the organs in the order of `organ_names`; mm along z, y, x.
  """
  rng = np.random.default_rng([config.seed, index])
  spacing = (rng.uniform(*config.slice_spacing), *(rng.uniform(*config.pixel_spacing),) * 2)
  shape = tuple(round(fov / s) for fov, s in zip(config.field_of_view, spacing, strict=True))
  # A person is larger or smaller than another as a whole, too.
  size = rng.uniform(0.92, 1.06)
  axes = [(np.arange(n, dtype=np.float32) - (n - 1) / 2) * s / size
          for n, s in zip(shape, spacing, strict=True)]
  grid = np.meshgrid(*axes, indexing="ij")
  z, y, x = (g + config.deformation * _smooth_field(rng, shape, 5) for g in grid)

  image = np.full(shape, -1000, np.float32)  # air
  for organ in (_BODY, _MUSCLE, *_BOWEL, _SPINE):
    organ = _vary(organ, rng)
    image[_level(organ, z, y, x) < 1] = organ.hu
  organs = [_vary(organ, rng) for organ in _ORGANS.values()]
  levels = np.stack([_level(organ, z, y, x) for organ in organs])
  if rng.random() < config.missing:
    levels[organ_names().index("gallbladder")] = np.inf
  # Where two organs claim a voxel the deeper one has it, so that they touch along a smooth face.
  owner = np.argmin(levels, axis=0)
  labels = np.where(levels.min(axis=0) < 1, owner + 1, 0).astype(np.uint8)
  for value, organ in enumerate(organs, start=1):
    image[labels == value] = organ.hu

  # Partial volume, bias, texture and noise, in the order in which a scanner adds them.
  image = ndimage.gaussian_filter(image, 0.45)
  tissue = image > -500
  image[tissue] += 4 * _smooth_field(rng, shape, 12)[tissue]
  bias = _smooth_field(rng, shape, 4)
  image = (image + 1000) * (1 + config.bias * bias / np.abs(bias).max()) - 1000
  noise = ndimage.gaussian_filter(rng.standard_normal(shape).astype(np.float32), 0.5)
  image += config.noise * noise / noise.std()
  return np.clip(np.round(image), -1024, 3071).astype(np.int16), labels, spacing


def organ_names() -> tuple[str, ...]:
  """Names of the labelled organs; label values count from 1 in this order."""
  return tuple(_ORGANS)


def _save(path: Path, array_DHW: np.ndarray, spacing: tuple[float, ...], order: tuple[int, ...],
          flips: tuple[int, ...]) -> None:
  """Writes z, y, x of LPS as NIfTI, its RAS axes in another order and flipped."""
  ras = array_DHW.transpose(2, 1, 0)[::-1, ::-1]  # left to right, back to front
  affine = np.diag([*spacing[::-1], 1.0])
  affine[:3, 3] = -np.array(ras.shape) * spacing[::-1] / 2
  orientation = np.stack([np.argsort(order), flips], axis=1)
  stored = nib.orientations.apply_orientation(ras, orientation)
  affine = affine @ nib.orientations.inv_ornt_aff(orientation, ras.shape)
  image = nib.Nifti1Image(np.ascontiguousarray(stored), affine)
  image.header.set_xyzt_units("mm")
  image.set_qform(affine, code=1)
  image.set_sform(affine, code=1)
  with replacing(path) as temporary:
    nib.save(image, temporary)


def write_phantom(folder: str | Path, config: PhantomConfig | None = None,
                  progress: Callable[[int, int], None] = lambda done, total: None) -> Path:
  """Writes a phantom dataset in nnU-Net's raw layout and returns its folder.

  Training cases are phantom_000, ...; the unseen ones go on counting and lie in imagesTs and
  labelsTs. `dataset.json` is written last: a folder that has one is complete; UserError
  if `folder` has one before. `progress` is called with (cases done, cases).
  """
  config = config or PhantomConfig()
  folder = Path(folder)
  if (folder / "dataset.json").exists():
    raise UserError(f"{folder}: holds a dataset already; give another folder or remove it")
  for index in range(config.cases + config.test_cases):
    progress(index, config.cases + config.test_cases)
    part = "Tr" if index < config.cases else "Ts"
    image, labels, spacing = phantom_case(config, index)
    order, flips = (0, 1, 2), (1, 1, 1)
    if config.reorient:
      # A stream of its own, so that the same anatomy can be had with and without reorientation.
      rng = np.random.default_rng([config.seed, index, 1])
      order, flips = tuple(rng.permutation(3)), tuple(rng.choice([-1, 1], 3))
    name = f"phantom_{index:03d}"
    _save(folder / f"images{part}" / f"{name}_0000.nii.gz", image, spacing, order, flips)
    _save(folder / f"labels{part}" / f"{name}.nii.gz", labels, spacing, order, flips)
  description = {
    "name": "Phantom", "channel_names": {"0": "CT"},
    "labels": {"background": 0, **{n: i for i, n in enumerate(organ_names(), start=1)}},
    "numTraining": config.cases, "file_ending": ".nii.gz"}
  with replacing(folder / "dataset.json") as temporary:
    temporary.write_text(json.dumps(description, indent=2) + "\n")
  return folder
