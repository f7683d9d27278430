"""Families of synthetic organs, of sizes, shapes and tissues at random, and what may be asked.

Nothing here is an atlas. A family paints itself into a scene around a centre [3], in widths of the
picture, with a radius of about the given one, and says which of its parts are objects.
"""

import numpy as np

from rfmedsam2_jax.data.synthetic_scene import Scene, direction
from rfmedsam2_jax.data.synthetic_shapes import Level, curve, joined, rotation, tree


def coat(scene: Scene, level: Level, radius: float) -> None:
  """Fat around an organ, thick here and missing there, so that some neighbours touch it."""
  rng = scene.rng
  if rng.random() < 0.55:
    thickness = min(radius * 0.25, scene.space.pixel * rng.uniform(0.5, 5.0))
    varied = np.clip(-scene.bump(level, radius) - np.float32(rng.uniform(-1.2, 0.8)), -1.5, 0.5)
    scene.paint(level + np.float32(thickness) * varied, scene.palette.tissue("fat"))


def vessels_within(scene: Scene, level: Level, centre: np.ndarray, radius: float, part: int,
                   thickness: float) -> None:
  """Up to three trees of vessels in an organ, of which they are parts."""
  rng, tissue = scene.rng, scene.palette.tissue("blood")
  for _ in range(int(rng.integers(1, 4))):
    way = direction(rng)
    vessels = scene.space.tube(tree(
      rng, centre - way * radius * rng.uniform(0.2, 0.9), way, radius * rng.uniform(0.4, 0.8),
      thickness * rng.uniform(0.4, 1.2), int(rng.integers(1, 4))))
    if vessels is not None:
      scene.paint(vessels.within(level), tissue, part)


def solid(scene: Scene, centre: np.ndarray, radius: float) -> None:
  """An organ of one tissue: with a coat of fat, vessels, lesions, or none of these."""
  rng = scene.rng
  level = scene.blob(centre, radius)
  if level is None:
    return
  coat(scene, level, radius)
  part, lesions = scene.new_part(), []
  scene.paint(level, scene.tissue("organ", level), part)
  if rng.random() < 0.5:
    vessels_within(scene, level, centre, radius, part, radius * 0.08)
  for _ in range(int(rng.integers(1, 4)) if rng.random() < 0.35 else 0):
    lesion = scene.blob(centre + direction(rng) * radius * rng.uniform(0, 0.8),
                        radius * rng.uniform(0.08, 0.4))
    if lesion is not None and (lesion := lesion.within(level)) is not None:
      lesions.append(scene.new_part())
      tissue = str(rng.choice(["organ", "organ", "fluid"]))
      scene.paint(lesion, scene.tissue(tissue, lesion), lesions[-1])
      scene.ask("lesion", lesions[-1:])
  scene.ask("organ", [part, *lesions])


def kidney(scene: Scene, centre: np.ndarray, radius: float) -> None:
  """A bean with cortex and pyramids; its hilum is left out, or belongs to it or not."""
  rng, frame = scene.rng, rotation(scene.rng)
  wide, spare = radius * rng.uniform(0.45, 0.65), 0.2 * radius + 4 * scene.space.pixel
  level = scene.space.ellipsoid(
    centre, np.array([radius, wide, wide * rng.uniform(0.8, 1.1)]), frame, spare=spare)
  if level is None:
    return
  level = scene.rough(level, radius, radius * rng.uniform(0, 0.06))
  hilum = scene.space.ellipsoid(
    centre + frame[1] * wide * rng.uniform(0.6, 1.0),
    wide * rng.uniform(0.3, 0.9) * np.array([1.3, 1.0, 0.6]), frame, spare=spare)
  coat(scene, level, radius)
  part, inner, left_out = scene.new_part(), scene.new_part(), rng.random() < 0.6
  flesh = level.without(hilum) if left_out else level
  scene.paint(flesh, scene.tissue("organ", flesh), part)
  if rng.random() < 0.6:
    depth = np.float32(0.18 * radius) * (1 + np.float32(0.5) * scene.bump(flesh, radius * 0.35))
    scene.paint(flesh + depth, scene.palette.tissue("organ"), part)
  if hilum is not None and not left_out:
    pelvis = str(rng.choice(["fat", "fluid", "blood"]))
    scene.paint(hilum.within(level + 0.12 * radius), scene.palette.tissue(pelvis), inner)
  scene.ask("kidney", [part] if rng.random() < 0.5 else [part, inner])


def hollow(scene: Scene, centre: np.ndarray, radius: float) -> None:
  """Stomach, bowel or bladder: a wall with folds around fluid, food, and gas on top."""
  rng, palette, pixel = scene.rng, scene.palette, scene.space.pixel
  if rng.random() < 0.55:
    level = scene.blob(centre, radius)
  else:
    way, thick = direction(rng), radius * rng.uniform(0.3, 0.6)
    level = scene.space.tube(
      curve(rng, centre - way * radius, way, radius * rng.uniform(2, 5), thick, 7, 0.55),
      0.25 * thick + 4 * pixel)
    radius = thick
    level = level and scene.rough(level, thick, thick * rng.uniform(0, 0.2))
  if level is None:
    return
  coat(scene, level, radius)
  wall, content = scene.new_part(), scene.new_part()
  thickness = max(radius * rng.uniform(0.03, 0.25), 0.7 * pixel)
  folds = np.abs(scene.bump(level, radius * rng.uniform(0.15, 0.4)))
  lumen = level + np.float32(thickness) * (1 + np.float32(rng.uniform(0, 1.2)) * folds)
  scene.paint(level, scene.tissue("wall", level), wall)
  filling = str(rng.choice(["fluid", "food", "blood", "gas"], p=[0.4, 0.35, 0.05, 0.2]))
  scene.paint(lumen, palette.tissue(filling), content)
  # Of space that is not bent: the surface of a fluid is flat.
  middle = scene.gravity[0] * centre[1] + scene.gravity[1] * centre[2]
  below = scene.lower[:, level.box[1], level.box[2]] - np.float32(middle)
  if rng.random() < 0.45:
    scene.paint(lumen.cut(below - np.float32(radius * rng.uniform(-0.7, 0.4))),
                palette.tissue("gas"), content)
  if rng.random() < 0.2:
    scene.paint(lumen.cut(np.float32(radius * rng.uniform(0, 0.6)) - below),
                palette.tissue("food"), content)
  scene.ask("hollow", [wall, content])
  scene.ask("content", [content])
  if thickness > 1.5 * pixel:
    scene.ask("wall", [wall])


def heart(scene: Scene, centre: np.ndarray, radius: float) -> None:
  """A thick ring of muscle around blood, and a thin-walled crescent of blood beside it."""
  rng, space = scene.rng, scene.space
  frame = rotation(rng)
  if rng.random() < 0.6:  # along its long axis, so that slices cut rings
    frame = np.linalg.qr(np.eye(3) + 0.25 * rng.standard_normal((3, 3)))[0].T
  spare = 0.25 * radius + 4 * space.pixel
  radii = radius * np.array([rng.uniform(1.0, 1.8), *rng.uniform(0.5, 0.7, 2)])
  outer = space.ellipsoid(centre, radii, frame, spare=spare)
  if outer is None:
    return
  outer = scene.rough(outer, radius, radius * rng.uniform(0, 0.05))
  wall = float(radii[1] * rng.uniform(0.15, 0.5))
  angle = rng.uniform(0, 2 * np.pi)
  aside = centre + (np.cos(angle) * frame[1] + np.sin(angle) * frame[2]) * radii[1] * rng.uniform(
    0.6, 1.1)
  crescent = space.ellipsoid(aside, radii * rng.uniform(0.75, 1.2, 3), frame, spare=spare)
  coat(scene, joined(outer, crescent) or outer, radius)
  flesh = scene.tissue("muscle", outer)
  blood = scene.palette.tissue("blood", flesh.value)
  muscle, cavity, right, thin = (scene.new_part() for _ in range(4))
  if crescent is not None:
    crescent = scene.rough(crescent, radius * 0.6, radius * rng.uniform(0, 0.08))
    scene.paint(crescent, flesh, thin)
    inside = crescent + max(radius * rng.uniform(0.02, 0.1), 0.5 * space.pixel)
    scene.paint(inside.without(outer), blood, right)
  scene.paint(outer, flesh, muscle)
  uneven = np.float32(rng.uniform(0, 0.25)) * scene.bump(outer, radius * 0.5)
  inner = outer + np.float32(wall) * (1 + uneven)
  scene.paint(inner, blood, cavity)
  # Papillary muscles: flesh that counts as the cavity.
  for angle in rng.uniform(0, 2 * np.pi, int(rng.integers(0, 4))):
    across = np.cos(angle) * frame[1] + np.sin(angle) * frame[2]
    knob = space.ellipsoid(centre + across * (radii[1] - wall) * rng.uniform(0.4, 0.9),
                           radius * np.array([0.5, *rng.uniform(0.05, 0.14, 2)]), frame)
    scene.paint(knob and knob.within(inner), flesh, cavity)
  scene.ask("cavity", [cavity])
  scene.ask("ring", [muscle])
  scene.ask("crescent", [right])
  scene.ask("heart", [muscle, cavity, right, thin])


def lung(scene: Scene, centre: np.ndarray, radius: float) -> None:
  """A dark organ with bright vessels that divide."""
  level = scene.blob(centre, radius)
  if level is None:
    return
  part = scene.new_part()
  scene.paint(level, scene.palette.tissue("lung"), part)
  vessels_within(scene, level, centre, radius, part, radius * 0.05)
  scene.ask("lung", [part])


def brain(scene: Scene, centre: np.ndarray, radius: float) -> None:
  """A cortex of even thickness that dips into furrows, white matter, chambers, nuclei."""
  rng, space, palette = scene.rng, scene.space, scene.palette
  level = space.ellipsoid(centre, radius * rng.uniform(0.75, 1.2, 3), rotation(rng),
                          spare=0.1 * radius + 4 * space.pixel)
  if level is None:
    return
  fluid, grey = scene.tissue("fluid", level), palette.tissue("organ")
  scene.paint(level + -0.03 * radius, fluid)
  # Furrows follow the zeros of a field, which are thin winding sheets.
  zeros = np.abs(scene.bump(level, radius * rng.uniform(0.2, 0.4)))
  furrow = np.maximum(1 - zeros / np.float32(rng.uniform(0.15, 0.5)), 0)
  surface = level + np.float32(radius * rng.uniform(0.1, 0.35)) * furrow
  cortex, white = scene.new_part(), scene.new_part()
  scene.paint(surface, grey, cortex)
  thickness = radius * rng.uniform(0.05, 0.14)
  scene.paint(surface + thickness, palette.tissue("organ", grey.value), white)
  whole = [cortex, white]
  for _ in range(int(rng.integers(1, 6))):
    inner = scene.blob(centre + direction(rng) * radius * rng.uniform(0.05, 0.5),
                       radius * rng.uniform(0.08, 0.25), 0.9)
    if inner is not None:
      whole.append(scene.new_part())
      tissue = fluid if rng.random() < 0.3 else scene.tissue("organ", inner)
      scene.paint(inner, tissue, whole[-1])
      scene.ask("nucleus", whole[-1:])
  scene.ask("cortex", [cortex])
  scene.ask("white", [white])
  scene.ask("brain", whole)


def divided(scene: Scene, centre: np.ndarray, radius: float) -> None:
  """One shape cut into pieces by bent planes: neighbours that touch, alike or even the same."""
  rng = scene.rng
  level = scene.blob(centre, radius, 0.8)
  if level is None:
    return
  coat(scene, level, radius)
  along = np.float32(0.15 * radius) * scene.bump(level, radius)
  for n, p, c in zip(direction(rng), scene.space.points, centre, strict=True):
    along += np.float32(n) * (p[level.box] - np.float32(c))
  tissue, same, parts = scene.tissue("organ", level), rng.random() < 0.3, []
  for cut in (-9.0, *np.sort(rng.uniform(-0.6, 0.6, int(rng.integers(1, 3)))) * radius):
    parts.append(scene.new_part())
    scene.paint(level.cut(np.float32(cut) - along), tissue, parts[-1])
    scene.ask("piece", parts[-1:])
    if not same:
      tissue = scene.palette.tissue("organ", tissue.value)
  scene.ask("organ", parts)
