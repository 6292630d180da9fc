"""What stands before the page: who may open it, and which of Gradio's many routes there are.

Gradio serves more than a page needs: it fetches URLs that a visitor names, and has routes that no key would guard. So what
is not known to be needed is not there, as a setting of a request that is not known is refused.
"""

import asyncio
import contextlib
import re
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi.requests import HTTPConnection
from fastapi.responses import HTMLResponse, JSONResponse, Response

from xblip.errors import in_units
from xblip.serve_reply import Refused, refusal

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from xblip.serve import Server

ROUTES = {
    "GET": re.compile(
        r"/?|/config/?|/theme\.css|/manifest\.json|/favicon\.ico|/(assets|static|svelte)/.+"
        r"|/gradio_api/(info/?|app_id/?|startup-events|heartbeat/\w+|queue/data|upload_progress|file=/.+)"
    ),
    "POST": re.compile(r"/gradio_api/(queue/join/?|upload/?|cancel|reset/?)"),
}
"""What the page asks for."""
UPLOAD = "/gradio_api/upload"
MAX_EVENT_BYTES = 2**21
"""Of what is asked without a file: a question, and where files are."""
POLICY = (
    "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; frame-ancestors 'self'; form-action 'self'; "
    "base-uri 'self'; object-src 'none'"
)
"""The browser loads nothing from elsewhere, whatever an answer says."""
HELD = 16
"""Bodies of the largest size that uploads may take on the disk, all together."""


class Gate:
    """An ASGI application that lets through to another what it may."""

    def __init__(self, app: "ASGIApp", server: "Server", folder: Path):
        """Keeps the page `app`, its `server`, and the `folder` that files are uploaded to."""
        self.app, self.server, self.folder = app, server, folder

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        connection = HTTPConnection(scope)
        try:
            await self._check(connection, scope["path"].removeprefix(scope.get("root_path", "")))
        except Refused as error:
            await _told(connection, error)(scope, receive, send)
            return

        async def send_with_policy(message: "Message") -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"content-security-policy", POLICY.encode()),
                    (b"x-content-type-options", b"nosniff"),
                    (b"referrer-policy", b"same-origin"),
                ]
            await send(message)

        await self.app(scope, receive, send_with_policy)

    async def _check(self, connection: HTTPConnection, path: str) -> None:
        scope = connection.scope
        method = scope.get("method", "")
        known = ROUTES.get("GET" if method == "HEAD" else method)
        if scope["type"] != "http" or known is None or not known.fullmatch(path):
            raise Refused(404, "There is nothing here: see /openapi.json for what there is.")
        self.server.caller(connection)
        if method != "POST":
            return
        length = connection.headers.get("content-length", "")
        if not length.isdecimal():
            raise Refused(411, "The request does not tell its length: send Content-Length.")
        is_upload = path.startswith(UPLOAD)
        most = self.server.config.max_body_bytes if is_upload else MAX_EVENT_BYTES
        if int(length) > most:
            raise Refused(413, f"These are more than the {in_units(most)} that may come at once: give less.")
        if is_upload and await asyncio.to_thread(_size, self.folder) + int(length) > HELD * most:
            raise Refused(507, "The server holds as many files of visitors as it may: give them again in a while.")


def _size(folder: Path) -> int:
    """Bytes of the files in a folder, of which any may go meanwhile."""
    size = 0
    for file in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            found = file.stat()
            size += found.st_size if stat.S_ISREG(found.st_mode) else 0
    return size


def _told(connection: HTTPConnection, error: Refused) -> Response:
    """A refusal: as over HTTP, and to who opens the page in a browser as words."""
    status, body, headers = refusal(error)
    if status != 401:
        return JSONResponse(body, status, headers=headers)
    headers = {"WWW-Authenticate": 'Basic realm="xblip", charset="UTF-8"'}
    words = "This page asks for an API key: reload it, and give the key as the password, with any name."
    return HTMLResponse(f"<!doctype html><title>xblip</title><p>{words}", status, headers=headers)
