"""What holds synthetic bodies together: vessels, trees, bones, muscles, sheets, islands, clusters.

Painted as the organs of synthetic_organs are; `FAMILIES` has them all.
"""

from collections.abc import Callable

import numpy as np

from rfmedsam2_jax.data.synthetic_organs import (
  brain,
  coat,
  divided,
  heart,
  hollow,
  kidney,
  lung,
  solid,
)
from rfmedsam2_jax.data.synthetic_scene import Scene, direction
from rfmedsam2_jax.data.synthetic_shapes import Level, curve, joined, rotation, tree


def vessel(scene: Scene, centre: np.ndarray, radius: float) -> None:
  """A large vessel: straight or winding, with or without branches, wall and calcium."""
  rng, way = scene.rng, direction(scene.rng)
  if rng.random() < 0.5:  # along the body, so that slices cut across
    way = way * 0.35 + np.array([1.0, 0.0, 0.0])
    way /= np.linalg.norm(way)
  length = max(radius * rng.uniform(6, 16), 0.4)
  segments = curve(rng, centre - way * length / 2, way, length, radius, 6, rng.uniform(0.02, 0.3))
  if rng.random() < 0.4:
    fork = segments[int(rng.integers(1, 5)), :3]
    segments = np.concatenate([segments, tree(
      rng, fork, direction(rng), radius * rng.uniform(4, 8), radius * rng.uniform(0.3, 0.7), 1)])
  level = scene.space.tube(segments, 4 * scene.space.pixel)
  if level is None:
    return
  level = scene.rough(level, radius * 2, radius * rng.uniform(0, 0.12))
  coat(scene, level, radius)
  part, lumen = scene.new_part(), level
  if rng.random() < 0.4:
    scene.paint(level, scene.palette.tissue("wall"), part)
    lumen = level + radius * rng.uniform(0.08, 0.25)
  scene.paint(lumen, scene.tissue("blood", level), part)
  if rng.random() < 0.2:
    rim = (level + 0.1 * radius).skin(0.2 * radius)
    spots = (np.float32(1.5) - scene.bump(level, radius * 0.5)) * np.float32(radius)
    scene.paint(rim.cut(spots), scene.palette.tissue("cortex"), part)
  scene.ask("vessel", [part])


def branching(scene: Scene, centre: np.ndarray, radius: float) -> None:
  """A tree of vessels or airways."""
  rng, way = scene.rng, direction(scene.rng)
  length, thick = radius * rng.uniform(0.7, 1.1), radius * rng.uniform(0.06, 0.25)
  level = scene.space.tube(
    tree(rng, centre - way * radius, way, length, thick, int(rng.integers(2, 5))),
    3 * scene.space.pixel)
  if level is None:
    return
  part, tissue = scene.new_part(), str(rng.choice(["blood", "blood", "blood", "gas", "fluid"]))
  scene.paint(level, scene.tissue(tissue, level), part)
  scene.ask("tree", [part])


def bone(scene: Scene, centre: np.ndarray, radius: float) -> None:
  """A bright shell around marrow, of a blob, a rod or a vertebra."""
  rng, space = scene.rng, scene.space
  kind, spare = rng.random(), 4 * space.pixel
  if kind < 0.3:
    level = scene.blob(centre, radius, 0.8)
  elif kind < 0.65:
    way = direction(rng)
    level = space.tube(curve(rng, centre - way * radius, way, radius * rng.uniform(2, 6),
                             radius * rng.uniform(0.2, 0.5), 4, 0.25), spare)
  else:
    frame = rotation(rng) if rng.random() < 0.4 else np.eye(3)
    return vertebra(scene, centre, radius, frame, 0.6)
  marrow(scene, level, radius)


def marrow(scene: Scene, level: Level | None, radius: float) -> None:
  """Fills a bone's shape."""
  if level is None:
    return
  rng, part = scene.rng, scene.new_part()
  level = scene.rough(level, radius * 0.4, radius * rng.uniform(0, 0.06))
  scene.paint(level, scene.palette.tissue("cortex"), part)
  shell = max(radius * rng.uniform(0.03, 0.14), 0.6 * scene.space.pixel)
  uneven = 1 + np.float32(0.4) * scene.bump(level, radius * 0.5)
  scene.paint(level + np.float32(shell) * uneven, scene.palette.tissue("marrow"), part)
  scene.ask("bone", [part])


def vertebra(scene: Scene, centre: np.ndarray, radius: float, frame: np.ndarray, height: float
             ) -> None:
  """A body, an arch with its processes, and the canal between; `height` is the body's, in radii."""
  rng, space = scene.rng, scene.space
  spare = 4 * space.pixel
  level = space.ellipsoid(centre, radius * np.array([height, 0.6, 0.75]), frame, True, spare)
  # Ends of the bars of the arch, along the frame, in radii.
  left, right = np.array([0, 0.5, 0.5]), np.array([0, 0.5, -0.5])
  back, spine = np.array([0, 1.35, 0]), np.array([0.3, 2.0, 0])
  bars = [(left, back), (right, back), (back, spine), (left, left * 2.2), (right, right * 2.2)]
  arch = space.tube(np.array([
    [*(centre + radius * a @ frame), *(centre + radius * b @ frame), 0.17 * radius, 0.13 * radius]
    for a, b in bars]), spare)
  marrow(scene, joined(level, arch), radius)
  canal = space.ellipsoid(centre + radius * np.array([0, 0.9, 0]) @ frame,
                          radius * np.array([9.0, *rng.uniform(0.2, 0.3, 2)]), frame)
  if canal is not None:
    part = scene.new_part()
    scene.paint(canal, scene.palette.tissue("fluid"), part)
    scene.paint(canal + 0.1 * radius, scene.palette.tissue("organ"), part)
    scene.ask("canal", [part])


def muscles(scene: Scene, centre: np.ndarray, radius: float) -> None:
  """A bundle of long muscles that touch, or nearly."""
  rng, frame = scene.rng, rotation(scene.rng)
  fat, flesh = scene.palette.tissue("fat"), None
  for _ in range(int(rng.integers(2, 6))):
    aside = (frame[1] * rng.normal(0, 0.6) + frame[2] * rng.normal(0, 0.6)) * radius
    level = scene.space.ellipsoid(
      centre + aside, radius * np.array([2.5, *rng.uniform(0.25, 0.7, 2)]), frame,
      rng.random() < 0.4, 0.1 * radius + 4 * scene.space.pixel)
    if level is not None:
      level = scene.rough(level, radius * 0.7, radius * rng.uniform(0, 0.08))
      part, own = scene.new_part(), scene.tissue("muscle", level)
      flesh = flesh or own
      scene.paint(level + -scene.space.pixel * rng.uniform(0, 1.5), fat)
      scene.paint(level, flesh if rng.random() < 0.7 else own, part)
      scene.ask("muscle", [part])


def islands(scene: Scene, centre: np.ndarray, radius: float) -> None:
  """Pieces of any shape: where a smooth field is high, near the centre."""
  rng = scene.rng
  level = scene.space.ellipsoid(centre, radius * rng.uniform(0.6, 1.2, 3), rotation(rng))
  if level is None:
    return
  size = radius * rng.uniform(0.3, 1.0)
  level = level.cut(
    (np.float32(rng.uniform(-0.2, 0.9)) - scene.bump(level, size)) * np.float32(0.5 * size))
  part, tissue = scene.new_part(), str(rng.choice(["organ", "fluid", "fat", "muscle"]))
  scene.paint(level, scene.tissue(tissue, level), part)
  scene.ask("islands", [part])


def sheet(scene: Scene, centre: np.ndarray, radius: float) -> None:
  """Something thin and curved: a diaphragm, a flat muscle, a membrane."""
  rng, space = scene.rng, scene.space
  level = space.ellipsoid(centre, np.full(3, radius), np.eye(3))
  way, far = direction(rng), radius * rng.uniform(0.8, 2.0)
  curved = space.ellipsoid(centre + way * far, far * rng.uniform(0.8, 1.2, 3), rotation(rng),
                           spare=radius)
  if level is None or curved is None:
    return
  thickness = max(radius * rng.uniform(0.03, 0.2), 0.8 * space.pixel)
  level = scene.rough(curved, radius, radius * 0.1).skin(thickness).within(level)
  if level is not None:
    part, tissue = scene.new_part(), str(rng.choice(["muscle", "fluid", "organ"]))
    scene.paint(level, scene.tissue(tissue, level), part)
    scene.ask("sheet", [part])


def cluster(scene: Scene, centre: np.ndarray, radius: float) -> None:
  """Several small pieces of one thing."""
  rng, part, tissue = scene.rng, scene.new_part(), None
  kind = str(rng.choice(["organ", "blood", "cortex", "fluid"]))
  for _ in range(int(rng.integers(3, 9))):
    level = scene.blob(centre + direction(rng) * radius * rng.uniform(0.2, 1.2),
                       radius * rng.uniform(0.1, 0.35))
    if level is not None:
      tissue = tissue or scene.tissue(kind, level)
      scene.paint(level, tissue, part)
  scene.ask("cluster", [part])


Family = Callable[[Scene, np.ndarray, float], None]
# How often each is drawn.
FAMILIES: dict[Family, float] = {
  solid: 5, kidney: 1.5, hollow: 3, vessel: 2, branching: 0.7, heart: 2, bone: 1.2, lung: 0.8,
  muscles: 0.8, brain: 0.8, divided: 1.5, islands: 1, sheet: 0.5, cluster: 0.5,
}
