"""The whole server as an ASGI application: the API, the page, the guard before both."""

from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.staticfiles import StaticFiles

from rfmedsam2_jax.base.errors import UserError, printable
from rfmedsam2_jax.data.derived import software_version
from rfmedsam2_jax.serve.api import PREFIX, UPLOADED, Pages, make_router
from rfmedsam2_jax.serve.guard import Bounded, Guard
from rfmedsam2_jax.serve.studio import Unknown

BODY = 1 << 18  # bytes of a request that is no upload
_STATIC = Path(__file__).parent / "static"


class _Server(FastAPI):
  def openapi(self) -> dict[str, Any]:
    """The document, without the status that the framework has for bad requests: theirs are 400."""
    if self.openapi_schema is None:
      self.openapi_schema = document = super().openapi()
      for path in document["paths"].values():
        for operation in path.values():
          operation["responses"].pop("422", None)
      for unused in ("HTTPValidationError", "ValidationError"):
        document["components"]["schemas"].pop(unused, None)
    return self.openapi_schema


def make_app(pages: Pages, host: str, token: str, key: str | None = None) -> FastAPI:
  """The whole server; see `Guard` for host, token and key."""
  handlers: dict[int | type[Exception], Any] = {
    UserError: lambda request, error: _error(str(error), 400),
    Unknown: lambda request, error: _error(str(error), 404),
    RequestValidationError: _invalid,
    HTTPException: _refused,
    ClientDisconnect: lambda request, error: Response(status_code=400),  # nobody hears it
    Exception: lambda request, error: _error("failed; the terminal of the command says why", 500)}
  app = _Server(
    title="rfmedsam2 serve", version=software_version(), openapi_url=f"{PREFIX}/openapi.json",
    description="Segmentation of CT and MRI volumes by prompts and by models. For research.",
    docs_url=None, redoc_url=None,  # their pages load scripts from elsewhere
    middleware=[Middleware(Guard, host=host, token=token, key=key),
                Middleware(Bounded, limit=BODY, free=UPLOADED)],
    exception_handlers=handlers)
  app.include_router(make_router(pages))
  app.mount("/", StaticFiles(directory=_STATIC, html=True))
  return app


def _error(message: str, status: int) -> Response:
  return JSONResponse({"error": printable(" ".join(message.split()))}, status)


def _refused(request: Request, error: Exception) -> Response:
  assert isinstance(error, HTTPException)
  said = {
    400: "the request: cannot be read as JSON; correct it",  # what the framework finds by itself
    404: "there is nothing at this address; see the API's document",
    405: "is not asked in this way; see the API's document"}
  return _error(said.get(error.status_code, error.detail), error.status_code)


def _invalid(request: Request, error: Exception) -> Response:
  assert isinstance(error, RequestValidationError)
  first = error.errors()[0]
  part, *where = first["loc"]
  if part == "path":  # as if there were no such route
    return _error(f"{'.'.join(map(str, where))}: {first['msg']}", 404)
  kind = request.headers.get("content-type", "").partition(";")[0]
  if part == "body" and not kind.endswith("json"):
    return _error("the request: is no JSON; send it with Content-Type: application/json", 400)
  place = ".".join(map(str, where)) or "the request"
  return _error(f"{place}: {first['msg']}; correct the request", 400)
