"""What is asked over HTTP below /api/v1, and what is answered. Only names are said, never places.

Shapes of requests and answers are those of `schema`; the OpenAPI document is made from both.
"""

import dataclasses
import gzip
import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import numpy as np
from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.params import Path as InPath
from fastapi.security import HTTPBearer
from starlette.concurrency import run_in_threadpool

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.data.colours import colour
from rfmedsam2_jax.data.derived import software_version
from rfmedsam2_jax.data.formats import FORMAT_ENDINGS
from rfmedsam2_jax.data.names import ending_of
from rfmedsam2_jax.data.plan import PLANES
from rfmedsam2_jax.data.segmentations import write_segmentation
from rfmedsam2_jax.prompted.slice_frame import Plane
from rfmedsam2_jax.prompted.tracked import parse_window
from rfmedsam2_jax.segmentation.chosen import Choice, value_names
from rfmedsam2_jax.serve import schema
from rfmedsam2_jax.serve.automatic import Models, wanted
from rfmedsam2_jax.serve.folder import ENDINGS, find_below, is_volume_name, volumes_below
from rfmedsam2_jax.serve.opened import Job, Opened
from rfmedsam2_jax.serve.studio import Studio, Unknown
from rfmedsam2_jax.serve.voxel_prompts import given_prompts

PREFIX = "/api/v1"
UPLOADED = rf"POST {PREFIX}/uploads|PUT {PREFIX}/volumes/[^/]+/labels"  # bodies of any length
LABELS = 9  # that the page offers, one key each
SAVED = tuple(ending.removeprefix(".") for ending in FORMAT_ENDINGS.values())
BYTES = "application/octet-stream"
_FAST = 1  # of gzip's levels; label maps shrink a hundredfold with any

Across = Annotated[Plane | None, Query(description="default: the volume's own plane")]
Slice = Annotated[int, InPath(ge=0, description="counted from 0 along the plane")]


@dataclasses.dataclass(frozen=True)
class Pages:
  """The requests of one server; a method each, whose docstring its users read."""

  studio: Studio
  folder: Path | None  # whose volumes can be opened, resolved; None: uploads only
  limit: int  # bytes that an upload may have
  about: str  # said on the page of the checkpoint
  models: Models = dataclasses.field(default_factory=dict)

  def server(self) -> schema.Server:
    """What this server has: weights, models, volumes that can be opened."""
    names = volumes_below(self.folder) if self.folder else []
    return schema.Server(
      version=software_version(), checkpoint=self.about, files=names, upload_limit=self.limit,
      colours=["#{:02x}{:02x}{:02x}".format(*colour(at)) for at in range(LABELS)],
      models=[schema.Model(name=name, structures=_structures(value_names(model.plan.labels,
                                                                         Choice())))
              for name, model in self.models.items()],
      formats=list(SAVED))

  def open(self, asked: schema.Open) -> schema.Volume:
    """Opens a volume of the server's folder."""
    if self.folder is None:
      raise UserError("the server was started without a folder; upload a volume")
    return self._opened(find_below(self.folder, asked.file), asked.file, asked, self.folder)

  async def upload(
    self, request: Request, asked: Annotated[schema.Upload, Query()]
  ) -> schema.Volume:
    """Opens a volume that is sent: the file's bytes as they are."""
    with tempfile.TemporaryDirectory(prefix="rfmedsam2-") as place:
      path = await self._sent(request, asked.name, place)
      return await run_in_threadpool(self._opened, path, asked.name, asked, path.parent)

  async def _sent(self, request: Request, name: str, place: str) -> Path:
    """The file that a request sends, in the folder `place`; UserError for its name or size."""
    if not is_volume_name(name) or Path(name).name != name:
      raise UserError(f"{name}: is no name of a volume; upload a file that ends in "
                      f"{', '.join(ENDINGS)}")
    too_large = UserError(f"{name}: is larger than {self.limit} bytes; put it into the "
                          "folder, or let the server take larger uploads")
    if int(request.headers.get("content-length", "0")) > self.limit:
      raise too_large
    # The name is the client's; the file has one of ours, and the ending that readers go by.
    path = Path(place).resolve() / f"upload{ending_of(name)}"
    with path.open("wb") as file:
      await _receive(request, file, self.limit, too_large)
    return path

  def _opened(
    self, path: Path, name: str, asked: schema.Open | schema.Upload, place: Path
  ) -> schema.Volume:
    try:
      window = parse_window(asked.window)
      key, opened = self.studio.open(path, name, asked.plane, window, asked.series)
    except (UserError, OSError) as error:
      raise UserError(str(error).replace(str(path), name).replace(f"{place}/", "")) from None
    return _volume(key, opened)

  def volume(self, volume: str) -> schema.Volume:
    """An open volume, and the structures of its label map."""
    return _volume(volume, self.studio.volume(volume))

  def close(self, volume: str) -> None:
    """Forgets a volume; what was not saved is lost."""
    self.studio.close(volume)

  def image(self, volume: str, number: Slice, plane: Across = None) -> Response:
    """A slice as SAM 2 sees it: a byte for each voxel, row after row, canonical (LPS+)."""
    opened, plane = self._with(volume, number, plane)
    shown = opened.prompted.shown(np.array([number]), plane)
    return _bytes(np.rint(shown[0] * 255).astype(np.uint8))

  def labels(self, volume: str, number: Slice, plane: Across = None) -> Response:
    """The labels of a slice, in the order of `image`; also while a tracking runs."""
    opened, plane = self._with(volume, number, plane)
    return _bytes(opened.labels.take(number, PLANES[plane]))

  def values(self, volume: str, number: Slice, plane: Across = None) -> Response:
    """The intensities of a slice, in the order of `image`: float32, the lowest byte first."""
    opened, plane = self._with(volume, number, plane)
    return _bytes(opened.volume.array[0].take(number, PLANES[plane]).astype("<f4"))

  def label_map(
    self, volume: str, accept_encoding: Annotated[str, Header()] = ""
  ) -> Response:
    """The label map as an array file of NumPy (.npy): uint8 [i, j, k], as `shape` of the volume."""
    opened = self.studio.volume(volume)
    native, file = opened.volume.geometry.to_native(opened.labels), io.BytesIO()
    np.save(file, native, allow_pickle=False)
    packed = "gzip" in accept_encoding.lower()
    content = gzip.compress(file.getvalue(), _FAST) if packed else file.getvalue()
    return Response(content, media_type=BYTES,
                    headers={"Content-Encoding": "gzip"} if packed else None)

  def _with(self, volume: str, number: int, plane: Plane | None) -> tuple[Opened, Plane]:
    """An open volume that has a slice of that number, and the plane; by default its own."""
    opened = self.studio.volume(volume)
    plane = plane or opened.plane
    if number >= (count := opened.labels.shape[PLANES[plane]]):
      raise Unknown(f"slice {number}: {opened.name} has {count}, counted from 0")
    return opened, plane

  def open_labels(self, volume: str, asked: schema.LabelFile) -> schema.Volume:
    """Takes a label map of the server's folder as the volume's, to be corrected by prompts.

    It has to be on the volume's grid. Structures that are tracked later replace those of their
    labels.
    """
    if self.folder is None:
      raise UserError("the server was started without a folder; send the label map")
    return self._labelled(volume, find_below(self.folder, asked.file), asked.file, self.folder)

  async def upload_labels(
    self, volume: str, request: Request,
    name: Annotated[str, Query(max_length=1000, description="of the file, for its ending")] = "",
  ) -> schema.Volume:
    """As `open_labels`, of a label map that is sent: the file's bytes as they are."""
    with tempfile.TemporaryDirectory(prefix="rfmedsam2-") as place:
      path = await self._sent(request, name, place)
      return await run_in_threadpool(self._labelled, volume, path, name, path.parent)

  def _labelled(self, volume: str, path: Path, name: str, place: Path) -> schema.Volume:
    try:
      return _volume(volume, self.studio.read_labels(volume, path))
    except (UserError, OSError) as error:
      said = str(error).replace(str(path), name).replace(f"{place}/", "")
      raise UserError(self.studio.volume(volume).told(UserError(said))) from None

  def track(self, volume: str, asked: schema.Track) -> schema.Job:
    """Follows structures from prompts; the answer is a job that is asked for until it has ended."""
    opened = self.studio.volume(volume)
    return _job(self.studio.track(volume, given_prompts(asked, opened.volume.geometry)))

  def segment(self, volume: str, asked: schema.Segment) -> schema.Job:
    """Lets a model segment the volume, without prompts; it replaces the label map that is there.

    What is tracked afterwards replaces the structures of its labels.
    """
    task = wanted(self.models, asked.model, asked.structures, asked.min_volume, asked.fast)
    return _job(self.studio.segment(volume, task))

  def details(self, volume: str) -> schema.Details:
    """How sure the model was that segmented the volume, and what it measured."""
    ground = self.studio.volume(volume).ground
    if ground is None or ground.details is None:
      raise Unknown("no model has segmented this volume; ask it to")
    return schema.Details(**ground.details)

  def job(self, job: str) -> schema.Job:
    """How far a job is."""
    return _job(self.studio.job(job))

  def cancel(self, job: str) -> schema.Job:
    """Ends a job; the label map is then the one before."""
    self.studio.job(job).cancel.set()
    return self.job(job)

  def export(self, volume: str, kind: str) -> Response:
    """The label map as a file on the grid of the input, in one of the server's formats."""
    opened = self.studio.volume(volume)
    if kind not in SAVED:
      raise Unknown(f"{kind}: save as {' or '.join(SAVED)}")
    if opened.names is None:
      raise UserError(f"{opened.name}: nothing was tracked yet; draw a box and track")
    try:
      return Response(_file(kind, opened), media_type=BYTES)
    except UserError as error:  # places are none of the client's business
      raise UserError(opened.told(error)) from None


def make_router(pages: Pages) -> APIRouter:
  """The routes. What they have in common is written once: the key, and how errors look."""
  errors: dict[int | str, dict[str, Any]] = {
    400: {"model": schema.Error, "description": "something is wrong with the request"},
    401: {"model": schema.Error, "description": "the key is missing or wrong"},
    404: {"model": schema.Error, "description": "not open, not known or not there (any more)"},
    413: {"model": schema.Error, "description": "the request is too large"}}
  # The guard looks at the key before; this says so in the document.
  key = HTTPBearer(auto_error=False, description="the server's key, or the token of its address")
  router = APIRouter(prefix=PREFIX, responses=errors, dependencies=[Depends(key)])
  volume, job = "/volumes/{volume}", "/jobs/{job}"

  def add(method: str, path: str, answer: Callable, status: int = 200, **more: Any) -> None:
    router.add_api_route(path, answer, methods=[method], status_code=status,
                         operation_id=answer.__name__, **more)

  binary = {"type": "string", "format": "binary"}
  content: dict[str, Any] = {
    "response_class": Response, "responses": {200: {"content": {BYTES: {"schema": binary}}}}}
  add("GET", "/server", pages.server)
  add("POST", "/volumes", pages.open)
  sent = {"requestBody": {"required": True, "content": {BYTES: {"schema": binary}}}}
  add("POST", "/uploads", pages.upload, openapi_extra=sent)
  add("GET", volume, pages.volume)
  add("DELETE", volume, pages.close, 204)
  add("GET", volume + "/image/{number}", pages.image, **content)
  add("GET", volume + "/labels/{number}", pages.labels, **content)
  add("GET", volume + "/values/{number}", pages.values, **content)
  add("POST", volume + "/labels", pages.open_labels)
  add("PUT", volume + "/labels", pages.upload_labels, openapi_extra=sent)
  add("GET", volume + "/labels", pages.label_map, **content)
  add("POST", volume + "/track", pages.track, 202)
  add("POST", volume + "/segment", pages.segment, 202)
  add("GET", volume + "/details", pages.details)
  add("GET", volume + "/export/{kind}", pages.export, **content)
  add("GET", job, pages.job)
  add("DELETE", job, pages.cancel)
  return router


async def _receive(request: Request, file: BinaryIO, limit: int, error: UserError) -> None:
  """Writes what the request sends; the error as soon as that is more than `limit` bytes."""
  async for chunk in request.stream():
    if file.tell() + len(chunk) > limit:
      raise error
    file.write(chunk)


def _volume(key: str, opened: Opened) -> schema.Volume:
  geometry, spacing = opened.volume.geometry, opened.volume.spacing
  depth, height, width = opened.slices
  row, column = (mm for axis, mm in enumerate(spacing) if axis != PLANES[opened.plane])
  own = dict(zip(geometry.axes, spacing, strict=True))
  return schema.Volume(
    volume=key, name=opened.name, shape=geometry.shape, spacing=(own[0], own[1], own[2]),
    affine=geometry.affine_mm.tolist(), zyx_shape=geometry.canonical_shape, zyx_spacing=spacing,
    plane=opened.plane, slices=depth, rows=height,
    columns=width, row_mm=row, column_mm=column, structures=_structures(opened.names or {}),
    warnings=list(geometry.remarks))


def _structures(names: dict[int, str]) -> list[schema.Structure]:
  return [schema.Structure(label=label, name=name) for label, name in names.items()]


def _job(job: Job) -> schema.Job:
  return schema.Job(
    job=job.name, state=job.state, done=job.done, total=job.total, message=job.message,
    fresh=job.fresh, error=job.error, seconds=round(job.seconds, 3))


def _bytes(content: np.ndarray) -> Response:
  return Response(content.tobytes(), media_type=BYTES)


def _file(kind: str, opened: Opened) -> bytes:
  # Labels that nobody used keep the places, so that every other has the page's colour.
  names = {value: f"label {value}" for value in range(1, max(opened.names or {}, default=0) + 1)}
  names |= opened.names or {}
  with tempfile.TemporaryDirectory(prefix="rfmedsam2-") as place:
    path = Path(place, f"labels.{kind}")
    write_segmentation(path, opened.labels, opened.volume.geometry, names, opened.how)
    return path.read_bytes()
