"""What requests and answers of the HTTP API hold; the OpenAPI document is made from these classes.

Texts of fields are read by people who write programs against the server.
"""

from typing import Annotated, Any, Literal

import pydantic

from rfmedsam2_jax.prompted.slice_frame import Plane

MOST_PROMPTS = 1000  # of a request
MOST_MASKS = 32  # of a request; each is as large as the volume
MOST_PIECES = 10_000  # of a mask
MOST_VERTICES = 10_000  # of a line

Space = Literal["ijk", "ras", "zyx"]
State = Literal["queued", "running", "done", "failed", "cancelled"]
Place = tuple[float, float, float]
# The page draws bytes.
Label = Annotated[int, pydantic.Field(ge=1, le=255, description="value in the label map")]


class _Asked(pydantic.BaseModel, extra="forbid", allow_inf_nan=False):
  pass


class _Settings(_Asked):
  plane: Plane = pydantic.Field("axial", description="whose slices are prompted and followed")
  window: str = pydantic.Field(
    "percentiles", max_length=100,
    description="intensities that SAM 2 sees: a name (soft-tissue, liver, lung, bone, brain), "
    "CENTRE,WIDTH, or percentiles of the volume")
  series: str | None = pydantic.Field(
    None, max_length=200, description="which series of a DICOM study: its number, UID, "
    "description or modality; a refusal lists them")


class Open(_Settings):
  file: str = pydantic.Field(max_length=1000, description="a name of the server's list")


class Upload(_Settings):
  name: str = pydantic.Field("", max_length=1000, description="of the file; its ending says what "
                             "it is: .nii, .nii.gz, .nrrd, .mha, or .zip with a DICOM series")


class Line(_Asked):
  """A scribble: a line through voxels of one slice, which becomes a few points along it."""

  path: Annotated[list[Place], pydantic.Field(
    min_length=1, max_length=MOST_VERTICES, description="its vertices, in their order")]
  inside: bool = pydantic.Field(True, description="whether it runs inside the structure")


class Prompt(_Asked):
  """What is said of one structure on one slice: a box, points, lines, several of them, or a mask.
  """

  label: Label
  round: int = pydantic.Field(
    0, ge=0, le=MOST_PROMPTS,
    description="prompts of a later round correct what was found before them")
  box: tuple[Place, Place] | None = pydantic.Field(
    None, description="two corners, whose voxels belong to it")
  points: list[tuple[float, float, float, bool]] = pydantic.Field(
    default_factory=list, max_length=MOST_PROMPTS,
    description="a place each, and whether it lies inside the structure")
  lines: list[Line] = pydantic.Field(default_factory=list, max_length=100)
  mask: list[tuple[Place, Place]] = pydantic.Field(
    default_factory=list, max_length=MOST_PIECES,
    description="boxes of voxels by two corners each, rows for example; their union on every slice "
    "is a mask that counts as it is. Excludes the other kinds")


class Track(_Asked):
  """All prompts of a volume, also those that were tracked before: the result is that of them all.
  """

  prompts: Annotated[list[Prompt], pydantic.Field(max_length=MOST_PROMPTS)]
  space: Space = pydantic.Field(
    "ijk", description="of coordinates: ijk are voxels of the file from 0, ras millimetres of its "
    "affine (right, anterior, superior), zyx voxels of the volume in LPS+ order")


  @pydantic.field_validator("prompts")
  @classmethod
  def _few_masks(cls, prompts: list[Prompt]) -> list[Prompt]:
    if sum(bool(prompt.mask) for prompt in prompts) > MOST_MASKS:
      raise ValueError(f"more than {MOST_MASKS} masks; give several slices in one")
    return prompts


class Segment(_Asked):
  """What automatic segmentation shall do; fields as the options of `rfmedsam2 predict`."""

  model: str | None = pydantic.Field(None, max_length=200, description="default: the first one")
  structures: list[Annotated[str, pydantic.Field(max_length=200)]] | None = pydantic.Field(
    None, max_length=MOST_PROMPTS, description="names of those that are wanted; default: all")
  min_volume: float = pydantic.Field(0.0, description="ml; pieces that are smaller go")
  fast: bool = pydantic.Field(False, description="at half the resolution across slices")


class LabelFile(_Asked):
  file: str = pydantic.Field(max_length=1000, description="a name of the server's list")


class Structure(pydantic.BaseModel):
  label: int
  name: str


class Model(pydantic.BaseModel):
  """A model for automatic segmentation."""

  name: str
  structures: list[Structure]


class Server(pydantic.BaseModel):
  version: str
  checkpoint: str = pydantic.Field(description="SAM 2's weights, which follow prompts")
  files: list[str] = pydantic.Field(description="volumes of the folder that can be opened")
  upload_limit: int = pydantic.Field(description="bytes of an upload")
  colours: list[str] = pydantic.Field(description="of the labels 1, 2 ..., again from the start")
  models: list[Model]
  formats: list[str] = pydantic.Field(description="endings of `export`; those of DICOM for volumes "
                                      "that were opened from DICOM")


class Volume(pydantic.BaseModel):
  """An open volume. Arrays of the API have the axes of the file, (i, j, k)."""

  volume: str = pydantic.Field(description="what it is called in addresses")
  name: str
  shape: tuple[int, int, int] = pydantic.Field(description="voxels along i, j, k")
  spacing: Place = pydantic.Field(description="mm along i, j, k")
  affine: list[list[float]] = pydantic.Field(description="4 x 4, from (i, j, k, 1) to millimetres, "
                                             "RAS+")
  zyx_shape: tuple[int, int, int] = pydantic.Field(description="in LPS+ order, as `image` has it")
  zyx_spacing: Place
  plane: Plane
  slices: int = pydantic.Field(description="of the plane, as `image` and `labels` count them")
  rows: int
  columns: int
  row_mm: float
  column_mm: float
  structures: list[Structure] = pydantic.Field(description="of the label map that is there now")
  warnings: list[str]


class Job(pydantic.BaseModel):
  """A tracking or segmentation. It has ended where its state is done, failed or cancelled."""

  job: str
  state: State
  done: int = pydantic.Field(description="slices that were followed, as `total`")
  total: int = pydantic.Field(description="0 where it is not known")
  message: str = pydantic.Field(description="what is done now; empty where `done` says it")
  fresh: int = pydantic.Field(description="counts slices whose labels changed")
  error: str = pydantic.Field(description="why it failed")
  seconds: float = pydantic.Field(description="for how long it has been computed")


class Details(pydantic.BaseModel, extra="allow"):
  """What `rfmedsam2 predict` writes into CASE.json; see docs/trust.md."""

  structures: dict[str, Any]
  warnings: list[Any]


class Error(pydantic.BaseModel):
  error: str = pydantic.Field(description="one line: what is wrong, and what to do")
