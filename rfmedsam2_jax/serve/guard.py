"""Who may ask: the page that holds the token, under a name of this server; programs with the key.

The token, behind # in the address, which browsers send to nobody, keeps out other users and other
sites, which cannot send its header. The Host check keeps out sites that point their own name here
(DNS rebinding). Programs that bring the key may call the server by any name: a site does not know
the key, and what a proxy calls the server is for its owner to say.
"""

import hmac
import ipaddress
import re

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_API = "/api/"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
_HEADERS = (
  (b"content-security-policy", b"default-src 'none'; script-src 'self'; style-src 'self'; "
   b"img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
   b"frame-ancestors 'none'"),
  (b"x-content-type-options", b"nosniff"),
  (b"referrer-policy", b"no-referrer"),
  (b"cross-origin-resource-policy", b"same-origin"),
  (b"cache-control", b"no-store"),
)


class Bounded:
  """ASGI middleware: no more than `limit` bytes are read of a request.

  free: methods and paths of uploads, as a pattern; these count for themselves.
  """

  def __init__(self, app: ASGIApp, limit: int, free: str):
    self._app, self._limit, self._free = app, limit, re.compile(free)

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    left = self._limit

    async def counted() -> Message:
      nonlocal left
      message = await receive()
      left -= len(message.get("body", b""))
      if left < 0:
        raise HTTPException(
          413, f"the request has more than {self._limit} bytes; give fewer prompts")
      return message

    free = scope["type"] != "http" or self._free.fullmatch(f"{scope['method']} {scope['path']}")
    await self._app(scope, receive if free else counted, send)


class Guard:
  """ASGI middleware: Host, Origin and token or key are checked, headers for the browser are added.

  The server listens on `host`; loopback names are always right. Requests below /api must bring
  `Authorization: Bearer TOKEN`, or the key. Refusals there are JSON as all errors are.
  """

  def __init__(self, app: ASGIApp, host: str, token: str, key: str | None = None):
    self._app, self._host = app, host.lower()
    self._token, self._key = f"Bearer {token}".encode(), f"Bearer {key}".encode() if key else None

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] != "http":
      await self._app(scope, receive, send)
      return

    async def with_headers(message: Message) -> None:
      if message["type"] == "http.response.start":
        message["headers"] = [*message["headers"], *_HEADERS]
      await send(message)

    reason, status = self._refused(Headers(scope=scope), scope["path"])
    app: ASGIApp = self._app
    if reason and scope["path"].startswith(_API):
      more = {"WWW-Authenticate": "Bearer"} if status == 401 else None
      app = JSONResponse({"error": reason}, status, more)
    elif reason:
      app = PlainTextResponse(reason, status)
    await app(scope, receive, with_headers)

  def _refused(self, headers: Headers, path: str) -> tuple[str, int]:
    """Why a request is refused and the status, or empty."""
    host, given = headers.get("host", ""), headers.get("authorization", "").encode()
    # Both are compared whatever the first comparison says, and in constant time.
    as_page = hmac.compare_digest(given, self._token)
    as_program = self._key is not None and hmac.compare_digest(given, self._key)
    if not as_program and not self._known(host.lower()):
      return "this server is not known by that name", 421
    origin = headers.get("origin")
    if origin is not None and origin not in (f"http://{host}", f"https://{host}"):
      return "requests of other sites are refused", 403
    if path.startswith(_API) and not (as_page or as_program):
      return "the key is missing or wrong; open the address that the command printed, whole, or "\
             "send the key as Authorization: Bearer KEY", 401
    return "", 0

  def _known(self, host: str) -> bool:
    host = host[1:].split("]")[0] if host.startswith("[") else host.rsplit(":", 1)[0]
    if host in (*LOOPBACK, self._host):
      return True
    try:  # a rebound name is a name; an address in numbers is none
      ipaddress.ip_address(host)
    except ValueError:
      return False
    return self._host in ("0.0.0.0", "::")
