"""What the page asks over HTTP, and what is answered. Only names are said, never places."""

import dataclasses
import io
import tempfile
from pathlib import Path
from typing import Annotated, BinaryIO

import numpy as np
import pydantic
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from rfmedsam2_jax.base.errors import UserError, printable
from rfmedsam2_jax.data.colours import colour
from rfmedsam2_jax.data.formats import FORMAT_ENDINGS
from rfmedsam2_jax.data.names import ending_of
from rfmedsam2_jax.data.plan import PLANES
from rfmedsam2_jax.data.segmentations import write_segmentation
from rfmedsam2_jax.data.volumes import Geometry
from rfmedsam2_jax.prompted.slice_frame import Plane, VoxelPrompt
from rfmedsam2_jax.prompted.tracked import TrackedVolume, parse_window
from rfmedsam2_jax.serve.folder import ENDINGS, find_below, is_volume_name, volumes_below
from rfmedsam2_jax.serve.guard import Guard
from rfmedsam2_jax.serve.studio import Job, Opened, Studio, Unknown

BODY = 1 << 18  # bytes of a request that is no upload
LABELS = 9  # that the page offers, one key each
SAVED = tuple(ending.removeprefix(".") for ending in FORMAT_ENDINGS.values())

_Corner = tuple[float, float, float]


class _Strict(pydantic.BaseModel, extra="forbid", allow_inf_nan=False):
  pass


class _Open(_Strict):
  file: str = pydantic.Field(max_length=1000)
  plane: Plane = "axial"
  window: str = pydantic.Field("percentiles", max_length=100)


class _Prompt(_Strict):
  """As `VoxelPrompt`: coordinates are canonical (z, y, x)."""

  label: Annotated[int, pydantic.Field(ge=1, le=255)]  # the page draws bytes
  round: Annotated[int, pydantic.Field(ge=0)] = 0
  box: tuple[_Corner, _Corner] | None = None
  points: tuple[tuple[float, float, float, bool], ...] = ()


class _Track(_Strict):
  prompts: Annotated[list[_Prompt], pydantic.Field(max_length=1000)]


@dataclasses.dataclass(frozen=True)
class Pages:
  """The requests of one server."""

  studio: Studio
  folder: Path | None  # whose volumes can be opened, resolved; None: uploads only
  limit: int  # bytes that an upload may have
  about: str  # said on the page of the checkpoint

  async def start(self, request: Request) -> Response:
    names = await run_in_threadpool(volumes_below, self.folder) if self.folder else []
    return JSONResponse({
      "checkpoint": self.about, "files": names, "upload_limit": self.limit,
      "colours": ["#{:02x}{:02x}{:02x}".format(*colour(at)) for at in range(LABELS)],
    })

  async def open(self, request: Request) -> Response:
    asked = _Open.model_validate_json(await _body(request))
    if self.folder is None:
      raise UserError("the server was started without a folder; upload a volume")
    return await self._opened(find_below(self.folder, asked.file), asked, self.folder)

  async def upload(self, request: Request) -> Response:
    query = dict(request.query_params)
    asked = _Open.model_validate({"file": query.pop("name", ""), **query})
    if not is_volume_name(asked.file) or Path(asked.file).name != asked.file:
      raise UserError(f"{asked.file}: is no name of a volume; upload a file that ends in "
                      f"{', '.join(ENDINGS)}")
    too_large = UserError(f"{asked.file}: is larger than {self.limit} bytes; put it into the "
                          "folder, or let the server take larger uploads")
    if int(request.headers.get("content-length", "0")) > self.limit:
      raise too_large
    with tempfile.TemporaryDirectory(prefix="rfmedsam2-") as place:
      # The name is the page's; the file has one of ours, and the ending that readers go by.
      path = Path(place).resolve() / f"upload{ending_of(asked.file)}"
      with path.open("wb") as file:
        await _receive(request, file, self.limit, too_large)
      return await self._opened(path, asked, path.parent)

  async def _opened(self, path: Path, asked: _Open, place: Path) -> Response:
    name, plane = asked.file, asked.plane
    try:
      window = parse_window(asked.window)
      key, opened = await run_in_threadpool(self.studio.open, path, name, plane, window)
    except (UserError, OSError) as error:
      raise UserError(str(error).replace(str(path), name).replace(f"{place}/", "")) from None
    depth, height, width = opened.slices
    sides = [mm for axis, mm in enumerate(opened.volume.spacing) if axis != PLANES[plane]]
    return JSONResponse({
      "volume": key, "name": name, "plane": plane, "slices": depth, "rows": height,
      "columns": width, "row_mm": sides[0], "column_mm": sides[1],
      "warnings": list(opened.volume.geometry.remarks),
    })

  async def image(self, request: Request) -> Response:
    opened, number = self._slice(request)
    shown = await run_in_threadpool(opened.prompted.shown, np.array([number]))
    return _bytes(np.rint(shown[0] * 255).astype(np.uint8))

  async def labels(self, request: Request) -> Response:
    opened, number = self._slice(request)
    return _bytes(opened.labels.take(number, PLANES[opened.plane]))

  def _slice(self, request: Request) -> tuple[Opened, int]:
    number = request.path_params["slice"]
    opened = self.studio.volume(request.path_params["volume"])
    if number >= opened.slices[0]:
      raise Unknown(f"slice {number}: {opened.name} has {opened.slices[0]}, counted from 0")
    return opened, number

  async def track(self, request: Request) -> Response:
    asked = _Track.model_validate_json(await _body(request))
    prompts = tuple(
      VoxelPrompt(p.label, p.box, p.points, round=p.round, source=f"label {p.label}")
      for p in asked.prompts
    )
    if not prompts:
      raise UserError("no prompt; draw a box or set a point first")
    name, job = self.studio.track(request.path_params["volume"], prompts)
    return JSONResponse({"job": name, **_of(job)}, 202)

  async def job(self, request: Request) -> Response:
    return JSONResponse(_of(self.studio.job(request.path_params["job"])))

  async def cancel(self, request: Request) -> Response:
    self.studio.job(request.path_params["job"]).cancel.set()
    return await self.job(request)

  async def save(self, request: Request) -> Response:
    kind = request.path_params["kind"]
    opened = self.studio.volume(request.path_params["volume"])
    if kind not in SAVED:
      raise Unknown(f"{kind}: save as {' or '.join(SAVED)}")
    if opened.found is None:
      raise UserError(f"{opened.name}: nothing was tracked yet; draw a box and track")
    try:
      content = await run_in_threadpool(_file, kind, opened.found, opened.volume.geometry)
    except UserError as error:  # places are none of the page's business
      path = opened.volume.geometry.path
      text = str(error).replace(str(path), opened.name).replace(f"{path.parent}/", "")
      raise UserError(text) from None
    return Response(content, media_type="application/octet-stream")


def make_app(pages: Pages, host: str, token: str) -> Starlette:
  """The whole server; see `Guard` for host and token."""
  volume = "/api/volumes/{volume}"
  routes = [
    Route("/api/start", pages.start),
    Route("/api/volumes", pages.open, methods=["POST"]),
    Route("/api/uploads", pages.upload, methods=["POST"]),
    Route(f"{volume}/image/{{slice:int}}", pages.image),
    Route(f"{volume}/labels/{{slice:int}}", pages.labels),
    Route(f"{volume}/track", pages.track, methods=["POST"]),
    Route(f"{volume}/{{kind}}", pages.save),
    Route("/api/jobs/{job}", pages.job),
    Route("/api/jobs/{job}", pages.cancel, methods=["DELETE"]),
    Mount("/", StaticFiles(directory=Path(__file__).parent / "static", html=True)),
  ]
  return Starlette(
    routes=routes, middleware=[Middleware(Guard, host=host, token=token)],
    exception_handlers={
      UserError: lambda request, error: _error(str(error), 400),
      Unknown: lambda request, error: _error(str(error), 404),
      pydantic.ValidationError: _invalid,
      ClientDisconnect: lambda request, error: Response(status_code=400),  # nobody hears it
      Exception: lambda request, error: _error("failed; the terminal of the command says why", 500),
    },
  )


async def _receive(request: Request, file: BinaryIO, limit: int, error: UserError) -> None:
  """Writes what the request sends; the error as soon as that is more than `limit` bytes."""
  async for chunk in request.stream():
    if file.tell() + len(chunk) > limit:
      raise error
    file.write(chunk)


async def _body(request: Request) -> bytes:
  error = UserError(f"the request has more than {BODY} bytes; give fewer prompts")
  content = io.BytesIO()
  await _receive(request, content, BODY, error)
  return content.getvalue()


def _of(job: Job) -> dict[str, str | int | float]:
  return {"state": job.state, "done": job.done, "total": job.total, "fresh": job.fresh,
          "error": job.error, "seconds": round(job.seconds, 3)}


def _bytes(content: np.ndarray) -> Response:
  return Response(content.tobytes(), media_type="application/octet-stream")


def _file(kind: str, found: TrackedVolume, geometry: Geometry) -> bytes:
  # Labels that nobody used keep the places, so that every other has the page's colour.
  names = {value: f"label {value}" for value in range(1, max(found.structures) + 1)}
  with tempfile.TemporaryDirectory(prefix="rfmedsam2-") as place:
    path = Path(place, f"labels.{kind}")
    write_segmentation(path, found.labels, geometry, names)
    return path.read_bytes()


def _error(message: str, status: int) -> Response:
  return JSONResponse({"error": printable(" ".join(message.split()))}, status)


def _invalid(request: Request, error: Exception) -> Response:
  assert isinstance(error, pydantic.ValidationError)
  first = error.errors()[0]
  where = ".".join(str(part) for part in first["loc"]) or "the request"
  return _error(f"{where}: {first['msg']}; correct the request", 400)
