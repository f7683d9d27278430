"""Cloud TPU slices by Google's names: what a chip can do and hold, how many make a slice.

Names of v2, v3, v4, v5p and tpu7x count TensorCores, of which their chips have two; those of v5e
and v6e count chips: v5e-16 has 16, v5p-16 has 8.
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Iterator

from rfmedsam2_jax.base.errors import UserError

GIB = 2**30
_SQUARE = ("2x2", "4x4", "4x8", "8x8", "8x16", "16x16", "16x32", "32x32")
_CUBE = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16",
         "8x16x16")


@dataclasses.dataclass(frozen=True)
class Chip:
  """One generation.

  kind: JAX's device_kind. library: libtpu's name. cores: TensorCores of a chip. devices: that JAX
  makes of a chip. flops: products in bfloat16, FLOP/s. memory: bytes. rate: of that memory,
  bytes/s. All of a chip, as published. usable: bytes of one device that libtpu 0.0.42 gives to
  programs. shapes: of the slices that are offered by name.
  """

  kind: str
  library: str
  cores: int
  devices: int
  flops: float
  memory: int
  rate: float
  usable: float
  shapes: tuple[str, ...]
  counts_cores: bool = True


# cloud.google.com/tpu/docs/ v2, v3, v4, v5e, v5p, v6e, tpu7x. XLA counts in 2**30 bytes there too.
CHIPS = {
  "v2": Chip("TPU v2", "v2", 2, 2, 45e12, 16 * GIB, 700e9, 7.48 * GIB,
             ("2x2", "4x4", "8x8", "8x16", "16x16")),
  "v3": Chip("TPU v3", "v3", 2, 2, 123e12, 32 * GIB, 900e9, 15.48 * GIB, _SQUARE),
  "v4": Chip("TPU v4", "v4", 2, 1, 275e12, 32 * GIB, 1200e9, 30.75 * GIB, _CUBE),
  "v5e": Chip("TPU v5 lite", "v5e", 1, 1, 197e12, 16 * GIB, 819e9, 15.75 * GIB,
              ("1x1", "2x2", "2x4", *_SQUARE[1:6]), False),
  "v5p": Chip("TPU v5", "v5p", 2, 1, 459e12, 95 * GIB, 2765e9, 95.74 * GIB,
              (*_CUBE, "16x16x16", "16x16x24")),
  "v6e": Chip("TPU v6 lite", "v6e", 1, 1, 918e12, 32 * GIB, 1638e9, 31.25 * GIB,
              ("1x1", "2x2", "2x4", *_SQUARE[1:6]), False),
  "tpu7x": Chip("TPU7x", "tpu7x", 2, 2, 2307e12, 192 * GIB, 7380e9, 94.75 * GIB, _CUBE),
}
# gcloud's name of v5e.
_ALIASES = {"v5litepod": "v5e", "v5lite": "v5e"}


@dataclasses.dataclass(frozen=True)
class Slice:
  """Chips that are wired together: `generation` of CHIPS, `shape` as in "4x4"."""

  generation: str
  shape: str

  @property
  def chip(self) -> Chip:
    return CHIPS[self.generation]

  @property
  def sides(self) -> tuple[int, ...]:
    return tuple(map(int, self.shape.split("x")))

  @property
  def chips(self) -> int:
    return math.prod(self.sides)

  @property
  def devices(self) -> int:
    return self.chips * self.chip.devices

  @property
  def name(self) -> str:
    """Google's."""
    return f"{self.generation}-{self.chips * (self.chip.cores if self.chip.counts_cores else 1)}"

  def options(self, slices: int) -> dict[str, object]:
    """What libtpu is told besides its name of the chip and the shape, for several such slices."""
    sides = (*self.sides, 1)[:3]
    # Rings close where a whole pod is taken (v5e, v6e) or whole cubes are.
    cubes = len(self.sides) == 3 and all(side % 4 == 0 for side in sides)
    options: dict[str, object] = {
      "num_slices": slices, "chips_per_host_bounds": (1, 1, 1) if self.chips == 1 else (2, 2, 1),
      "wrap": tuple(cubes or len(self.sides) == 2 and side == 16 for side in sides)}
    if self.chip.cores > self.chip.devices:
      options["chip_config_name"] = "megacore"  # two cores are one device
    return options


def named_slices() -> Iterator[Slice]:
  """All that are offered by name."""
  for generation, chip in CHIPS.items():
    for shape in chip.shapes:
      yield Slice(generation, shape)


def slice_of(name: str) -> Slice:
  """A slice by its name ("v5e-16", "v5litepod-16") or its shape ("v5e:4x4").

  UserError, with the nearest names, if there is none.
  """
  known = {found.name: found for found in named_slices()}
  generation, mark, size = re.split(r"([-:]|$)", name.strip().lower(), maxsplit=1)
  generation = _ALIASES.get(generation, generation)
  if mark == "-" and (found := known.get(f"{generation}-{size}")):
    return found
  if mark == ":" and generation in CHIPS:
    count = CHIPS[generation].shapes[0].count("x")
    if re.fullmatch(r"[1-9]\d{0,2}" + r"x[1-9]\d{0,2}" * count, size):
      found = Slice(generation, size)
      # A host has two by two of them.
      if found.chips == 1 or not any(side % 2 for side in found.sides[:2]):
        return found
  raise UserError(f"--topology {name}: {_nearest(name, generation, size, list(known))}")


def _nearest(name: str, generation: str, size: str, known: list[str]) -> str:
  listed = "all are listed by shard --topologies"
  if generation in CHIPS:
    names = [x for x in known if x.startswith(f"{generation}-")]
    if size.isdigit():
      names.sort(key=lambda x: abs(int(x.rpartition("-")[2]) - int(size)))
      names = sorted(names[:2], key=known.index)
    return (f"no such slice of {generation}; nearest: {', '.join(names)}; or give a shape, "
            f"{generation}:{CHIPS[generation].shapes[1]}; {listed}")
  near = difflib.get_close_matches(name.lower(), known, 3, 0.4)
  return f"no TPU slice of that name; nearest: {', '.join(near) or known[0]}; {listed}"


def table() -> list[str]:
  """One line for every slice that is offered by name, below a head."""
  lines = [f"{'name':12s} {'chips':>6s} {'devices':>8s}  {'shape':9s} "
           f"{'GiB':>4s} {'TFLOP/s':>8s} {'GB/s':>6s}   of a chip"]
  return lines + [
    f"{x.name:12s} {x.chips:6d} {x.devices:8d}  {x.shape:9s} {x.chip.memory // GIB:4d} "
    f"{x.chip.flops / 1e12:8.0f} {x.chip.rate / 1e9:6.0f}" for x in named_slices()]
