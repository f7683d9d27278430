"""Who may ask: the page that holds the token, under a name of this server, and nobody else.

The token, behind # in the address, which browsers send to nobody, keeps out other users and other
sites, which cannot send its header. The Host check keeps out sites that point their own name here
(DNS rebinding).
"""

import hmac
import ipaddress

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

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


class Guard:
  """ASGI middleware: Host, Origin and token are checked, headers for the browser are added.

  The server listens on `host`; loopback names are always right. Requests below /api must bring
  `Authorization: Bearer TOKEN`.
  """

  def __init__(self, app: ASGIApp, host: str, token: str):
    self._app, self._token, self._host = app, token, host.lower()

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] != "http":
      await self._app(scope, receive, send)
      return

    async def with_headers(message: Message) -> None:
      if message["type"] == "http.response.start":
        message["headers"] = [*message["headers"], *_HEADERS]
      await send(message)

    reason, status = self._refused(Headers(scope=scope), scope["path"])
    app: ASGIApp = PlainTextResponse(reason, status) if reason else self._app
    await app(scope, receive, with_headers)

  def _refused(self, headers: Headers, path: str) -> tuple[str, int]:
    """Why a request is refused and the status, or empty."""
    host = headers.get("host", "")
    if not self._known(host.lower()):
      return "this server is not known by that name", 421
    origin = headers.get("origin")
    if origin is not None and origin != f"http://{host}":
      return "requests of other sites are refused", 403
    if path.startswith("/api/"):
      given = headers.get("authorization", "").encode()
      if not hmac.compare_digest(given, f"Bearer {self._token}".encode()):
        return "open the address that the command printed, whole", 401
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
