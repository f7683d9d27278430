"""Where synthetic organs lie: a body in air or tissue that fills the picture, among neighbours."""

import numpy as np

from rfmedsam2_jax.data.synthetic_framework import FAMILIES, Family, vertebra
from rfmedsam2_jax.data.synthetic_organs import heart, hollow, kidney, lung, solid
from rfmedsam2_jax.data.synthetic_scene import Scene
from rfmedsam2_jax.data.synthetic_shapes import Level, log_uniform, rotation

# What lies in a cavity beside the organs of `neighbours`.
_INNER = (solid, solid, kidney, hollow, hollow, lung, heart)


def body(scene: Scene, centre: np.ndarray, size: float) -> None:
  """Air, perhaps a table and arms; skin, fat, muscle and what is inside; ribs and a spine.

  `size` is half of the body's width, in widths of the picture; mostly it is cut across. Most bodies
  limit what is painted later.
  """
  rng, space, palette = scene.rng, scene.space, scene.palette
  scene.image[:] = palette.tissue("air").value
  upright = rng.random() < 0.75
  frame = np.linalg.qr(np.eye(3) + 0.1 * rng.standard_normal((3, 3)))[0]
  frame = np.sign(np.diag(frame))[:, None] * frame.T @ (np.eye(3) if upright else rotation(rng))
  deep, fat, flesh = size * rng.uniform(0.6, 0.95), palette.tissue("fat"), palette.tissue("muscle")
  if upright and palette.modality != "mr" and rng.random() < 0.6:
    for gap in rng.uniform(0.02, 0.12, 2).cumsum():
      table = space.ellipsoid(centre + frame[1] * (deep + (gap - 1.6) * size),
                              size * np.array([9, 1.6, 2.2]), frame)
      scene.paint(table and table.skin(size * rng.uniform(0.008, 0.024)), flesh)
  for side in (-1, 1) if rng.random() < 0.35 else ():
    at = frame[2] * size * side * rng.uniform(1.15, 1.35) + frame[1] * deep * rng.normal(0, 0.2)
    arm = space.ellipsoid(centre + at, size * np.array([9, 0.2, 0.22]), frame)
    if arm is not None:
      scene.paint(arm, fat)
      scene.paint(scene.rough(arm + 0.04 * size, 0.2 * size, 0.02 * size), flesh)
      scene.paint(arm + 0.14 * size, palette.tissue("cortex"))
      scene.paint(arm + 0.16 * size, palette.tissue("marrow"))
  torso = space.ellipsoid(centre, size * np.array([6, deep / size, 1]), frame, rng.random() < 0.3)
  if torso is None:
    return
  torso = scene.rough(torso, size, 0.03 * size)
  scene.paint(torso, palette.tissue("skin"))
  scene.paint(torso + 0.012 * size, fat)
  layer = log_uniform(rng, 0.02, 0.2) * size
  wall = torso + np.float32(layer) * (1 + np.float32(0.4) * scene.bump(torso, 0.5 * size))
  scene.paint(wall, flesh)
  inside = wall + rng.uniform(0.05, 0.14) * size
  filling = str(rng.choice(["fat", "organ", "muscle", "lung"], p=[0.55, 0.2, 0.15, 0.1]))
  scene.paint(inside, palette.tissue(filling))
  if rng.random() < 0.85:
    scene.limit = wall
  if rng.random() < 0.4:
    packed(scene)
  strands(scene, inside)
  ribs(scene, centre, frame, deep - layer - 0.06 * size, size - layer - 0.06 * size)
  vertebra(scene, centre + frame[1] * deep * rng.uniform(0.4, 0.6), size * rng.uniform(0.2, 0.3),
           frame, 9.0 if rng.random() < 0.6 else 0.6)
  for _ in range(int(rng.integers(0, 6))):
    at = (frame[0] * rng.normal(0, 0.3) * size + frame[1] * deep * rng.uniform(-0.6, 0.4)
          + frame[2] * size * rng.uniform(-0.65, 0.65))
    _INNER[int(rng.integers(len(_INNER)))](scene, centre + at, size * rng.uniform(0.08, 0.4))


def ribs(scene: Scene, centre: np.ndarray, frame: np.ndarray, deep: float, wide: float) -> None:
  """Short rods around a trunk, as its slices cut them."""
  rng = scene.rng
  cortex, inner = scene.palette.tissue("cortex"), scene.palette.tissue("marrow")
  count = int(rng.integers(0, 16))
  for angle in np.linspace(0, 2 * np.pi, count, endpoint=False) + rng.normal(0, 0.08, count):
    up, across = np.sin(angle) * deep * frame[1], np.cos(angle) * wide * frame[2]
    at = centre + up + across + frame[0] * rng.normal(0, 0.05) * wide
    way = np.cos(angle) * deep * frame[1] - np.sin(angle) * wide * frame[2] + frame[0] * 0.4 * wide
    half = way / np.linalg.norm(way) * wide * rng.uniform(0.05, 0.14)
    rib = scene.space.tube(np.array([[*(at - half), *(at + half), *[wide * 0.028] * 2]]))
    if rib is not None:
      scene.paint(rib, cortex)
      scene.paint(rib + 0.014 * wide, inner)


def strands(scene: Scene, level: Level) -> None:
  """Fine vessels and strands: where two fields are zero at once, which are thin winding lines."""
  rng = scene.rng
  if rng.random() < 0.6:
    size = log_uniform(rng, 0.03, 0.3)
    lines = np.maximum(np.abs(scene.bump(level, size)), np.abs(scene.bump(level, size)))
    lines -= np.float32(rng.uniform(0.08, 0.3))
    tissue = str(rng.choice(["blood", "blood", "organ", "muscle"]))
    scene.paint(level.cut(lines * np.float32(size * 0.5)), scene.palette.tissue(tissue), None)


def tissues(scene: Scene) -> None:
  """The inside of a body: one tissue, islands of others in it, or organs that fill all space."""
  rng, palette, space = scene.rng, scene.palette, scene.space
  names = ["fat", "organ", "muscle", "organ", "fluid", "blood"]
  level = Level(space.whole(), np.full(space.shape, -9, np.float32))
  scene.paint(level, palette.tissue(str(rng.choice(names[:3]))))
  if rng.random() < 0.5:
    packed(scene)
  else:
    for _ in range(int(rng.integers(0, 4))):
      size, part, tissue = log_uniform(rng, 0.1, 0.6), scene.new_part(), str(rng.choice(names))
      islands = np.float32(rng.uniform(-0.2, 0.8)) - scene.bump(level, size)
      scene.paint(level.cut(islands * np.float32(size * 0.4)), palette.tissue(tissue), part)
      scene.ask("region", [part])
  strands(scene, level)


def packed(scene: Scene) -> None:
  """Organs that press against each other: bent cells of a power diagram, perhaps fat between."""
  rng, space, palette = scene.rng, scene.space, scene.palette
  count, reach = int(rng.integers(3, 9)), space.shape[0] * space.spacing[0] / 2 + 0.2
  size = 1 / np.sqrt(count)
  best, second = np.full((2, *space.shape), np.float32(9))
  owner = np.zeros(space.shape, np.uint8)
  level = Level(space.whole(), best)
  for cell in range(count):
    at = np.array([rng.uniform(-reach, reach), *rng.uniform(-0.6, 0.6, 2)])
    # Squared distance to the seed, less that to the origin, which all cells have.
    power = scene.bump(level, size) * np.float32(size**2 * rng.uniform(0, 0.9))
    for c, p in zip(at, space.points, strict=True):
      power -= np.float32(2 * c) * p
    power += np.float32(at @ at + rng.normal(0, 0.3) * size**2)
    nearer = power < best
    second = np.where(nearer, best, np.minimum(second, power))
    owner[nearer] = cell
    best = np.minimum(best, power)
  border = (best - second) / np.float32(2 * size)
  for cell in range(count):
    part, tissue = scene.new_part(), "organ" if rng.random() < 0.7 else "muscle"
    own = np.where(owner == cell, border, -border)
    scene.paint(Level(level.box, own), palette.tissue(tissue), part)
    scene.ask("region", [part])
  if rng.random() < 0.6:
    gap = space.pixel * rng.uniform(0.3, 2.5)
    uneven = np.clip(scene.bump(level, size) + np.float32(rng.uniform(-0.5, 1.5)), -1, 2)
    scene.paint(Level(level.box, -border - np.float32(gap) * uneven), palette.tissue("fat"))


def neighbours(scene: Scene, centre: np.ndarray, radius: float) -> None:
  """The organ that a picture is made around, others beside it and elsewhere, some over it."""
  rng = scene.rng
  families, weights = list(FAMILIES), np.array(list(FAMILIES.values()))
  plan: list[tuple[np.ndarray, float]] = []
  for _ in range(int(rng.integers(1, 7))):
    other, way = radius * np.exp(rng.normal(-0.2, 0.5)), rng.standard_normal(3) * (0.5, 1, 1)
    way /= np.linalg.norm(way)
    plan.append((centre + way * (radius + other) * rng.uniform(0.7, 1.1), min(other, 0.5)))
  for _ in range(int(rng.integers(0, 4))):
    plan.append((np.array([rng.normal(0, 0.1), *rng.uniform(-0.45, 0.45, 2)]),
                 log_uniform(rng, 0.03, 0.2)))
  over = min(int(rng.exponential(1.0)), len(plan))
  plan.insert(len(plan) - over, (centre, radius))
  drawn: list[Family] = [
    families[i] for i in rng.choice(len(families), len(plan), p=weights / weights.sum())]
  for number, (family, (at, size)) in enumerate(zip(drawn, plan, strict=True)):
    scene.focus = number == len(plan) - 1 - over
    family(scene, at, size)
