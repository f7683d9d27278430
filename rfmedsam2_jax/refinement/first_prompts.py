"""Where the first prompts come from: the generator, the truth (the paper's upper limit), a person.

All on the host, on the prepared grid. In: the generator's log-odds, in the cut of each structure.
Out: `VolumePrompts`.
"""

import collections
import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from rfmedsam2_jax.base.constants import LOGIT_LIMIT
from rfmedsam2_jax.data.cuts import Cut
from rfmedsam2_jax.data.datasets import Labels
from rfmedsam2_jax.nn.boxes import boxes_from_square, boxes_to_square
from rfmedsam2_jax.refinement.prompts import VolumePrompts, scaled_boxes, stage0_prompts


def generated(logits: np.ndarray, side: int, margin: float) -> VolumePrompts:
  """Stage-0 prompts of the generator, from its mask logits float16 [K, D, 4G, 4G]."""
  cells = stage0_prompts(logits, side, margin)
  nowhere = np.zeros(cells.has_box.shape, bool)
  return VolumePrompts(
    cells.logits, cells.presence, cells.boxes, cells.has_box, cells.has_mask, cells.points,
    cells.point_labels, given=nowhere, fixed_boxes=nowhere,
  )


def _masks(atoms: np.ndarray, labels: Labels) -> Iterator[np.ndarray]:
  """Every structure's mask, bool [D, H, W]."""
  return (np.isin(atoms, np.flatnonzero(members)) for members in labels.membership.T)


def shadows(atoms: np.ndarray, labels: Labels) -> np.ndarray:
  """Where structures lie, all slices in one: bool [K, H, W] of atoms [D, H, W]."""
  return np.stack([mask.any(axis=0) for mask in _masks(atoms, labels)])


def truth_boxes(
  atoms: np.ndarray, labels: Labels, cuts: Sequence[Cut], side: int
) -> tuple[np.ndarray, np.ndarray]:
  """Boxes float32 [K, D, 4] in pixels of the S x S image and presence bool [K, D] of the truth."""
  seen = (cut.of(mask) for mask, cut in zip(_masks(atoms, labels), cuts, strict=True))
  boxes, present = zip(*(scaled_boxes(mask, side, 0.0) for mask in seen), strict=True)
  return np.stack(boxes), np.stack(present)


def with_oracle(
  prompts: VolumePrompts, truth_boxes: np.ndarray, truth_present: np.ndarray, side: int
) -> VolumePrompts:
  """Presence and boxes from the truth in every stage; masks stay the generator's, inside the box.

  No mask of the truth is shown to the network. Where the generator found nothing inside a true
  box, the first prompt is the box alone. Boxes are float32 [K, D, 4] in pixels of the S x S image,
  presence is bool [K, D].
  """
  logits = _inside_boxes(prompts.logits, truth_boxes, side)
  return prompts._replace(
    logits=logits, presence=truth_present.astype(np.float32), boxes=truth_boxes.astype(np.float32),
    has_box=truth_present.copy(), has_mask=truth_present & (logits > 0).any(axis=(2, 3)),
    fixed_boxes=np.ones_like(truth_present),
  )


@dataclasses.dataclass(frozen=True, eq=False)
class GivenPrompt:
  """One prompt of a person for structure `organ` on slice `slice` of the prepared grid.

  box: x0 y0 x1 y1, inclusive, points: ((x, y, is_inside), ...), both real voxels of the slice.
  mask: real [H, W], which share of each voxel is the structure's; `box` is around it, or None for
  that of the voxels above one half.
  """

  organ: int
  slice: int
  box: Sequence[float] | np.ndarray | None = None
  points: tuple[tuple[float, float, bool], ...] = ()
  mask: np.ndarray | None = None


def shown_by(
  given: Sequence[GivenPrompt], organs: int, shape: tuple[int, int]
) -> np.ndarray:
  """Where prompts lie on slices of `shape`, all slices in one: bool [K, H, W]."""
  shown = np.zeros((organs, *shape), bool)
  for prompt in given:
    places = [(x, y, x, y) for x, y, _ in prompt.points]
    if prompt.box is not None:
      places.append(tuple(prompt.box))
    for x0, y0, x1, y1 in np.clip(np.rint(places).astype(int), 0, None).tolist():
      shown[prompt.organ, y0 : y1 + 1, x0 : x1 + 1] = True
    if prompt.mask is not None:
      shown[prompt.organ] |= prompt.mask > 0
  return shown


def with_given(
  prompts: VolumePrompts, given: Sequence[GivenPrompt], cuts: Sequence[Cut], side: int,
  mask_side: int, resize,
) -> VolumePrompts:
  """The generator's prompts, corrected on some cells by a person; these also become anchors.

  Args:
    cuts: of each structure. side: S. mask_side: 4G.
    resize: antialiased linear resize of [n, H, W] to [n, 4G, 4G].
  """
  clicks = collections.Counter((p.organ, p.slice) for p in given for _ in p.points)
  cells, most = prompts.presence.shape, max(clicks.values(), default=0)
  new = VolumePrompts(*(x.copy() for x in prompts))._replace(
    points=np.zeros((*cells, most, 2), np.float32),
    point_labels=np.full((*cells, most), -2, np.int32),
  )
  for prompt in given:
    cell, cut = (prompt.organ, prompt.slice), cuts[prompt.organ]
    corner = np.array([cut.left, cut.top])
    new.given[cell], new.presence[cell] = True, 1.0
    box = None
    if prompt.box is not None:
      inner = np.asarray(prompt.box, np.float32) - np.tile(corner, 2)
      box = boxes_to_square(inner, *cut.shape, side)
    if prompt.mask is not None:
      seen = cut.of(prompt.mask[None])
      share = resize(seen.astype(np.float32), mask_side)[0]
      # A person's mask is certain; a soft edge keeps what lies between pixels.
      new.logits[cell] = np.clip((share - 0.5) * 2 * LOGIT_LIMIT, -LOGIT_LIMIT, LOGIT_LIMIT)
      if box is None:
        boxes, found = scaled_boxes(seen > 0.5, side, 0.0)
        box = boxes[0] if found[0] else None
    if box is not None:
      new.boxes[cell] = box
      new.has_box[cell] = new.fixed_boxes[cell] = True
      if prompt.mask is None:
        new.logits[cell] = _inside_boxes(new.logits[cell], np.asarray(box, np.float32), side)
    first = int((new.point_labels[cell] >= 0).sum())
    for number, (x, y, inside) in enumerate(prompt.points, first):
      # Points are scaled alone, as in SAM 2.
      new.points[cell][number] = (np.array([x, y]) - corner) * side / np.array(cut.shape[::-1])
      new.point_labels[cell][number] = int(inside)
    new.has_mask[cell] = bool((new.logits[cell] > 0).any())
  return new


def _inside_boxes(logits: np.ndarray, boxes: np.ndarray, side: int) -> np.ndarray:
  """float16 [..., 4G, 4G], -32 outside of each cell's box [..., 4]."""
  count = logits.shape[-1]
  inner, at = boxes_from_square(boxes, count, count, side), np.arange(count)
  # Pixels that the box touches stay; less than this is a rounding error of float32.
  x0, y0 = np.moveaxis(np.floor(inner[..., :2] + 1e-3), -1, 0)[..., None]
  x1, y1 = np.moveaxis(np.ceil(inner[..., 2:] - 1e-3), -1, 0)[..., None]
  columns, rows = (at >= x0) & (at <= x1), (at >= y0) & (at <= y1)
  return np.where(rows[..., :, None] & columns[..., None, :], logits, np.float16(-LOGIT_LIMIT))
