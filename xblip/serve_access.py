"""Who may ask a server: by keys, by the name that it is asked by, and by the site whose page asks."""

import base64
import hmac
import re
from collections.abc import Sequence

from fastapi.requests import HTTPConnection

from xblip.serve_reply import Refused

OWN_SITE = ("same-origin", "none")
"""What browsers say of a request that no other site has a part in."""
OWN_NAME = re.compile(
    r"(\[[\da-f:.]*\]|\d+(\.\d+){3}|[^.:]*|[^:]*\.(localhost|local|internal))(:\d*)?", flags=re.IGNORECASE
)
"""Of a machine or its network: what nobody can register to let it lead here."""


def caller_of(request: HTTPConnection, api_keys: Sequence[str]) -> str:
    """Returns who asks, by the key or else the address. A key may also come as the password of a browser's dialog.

    Args:
      request: of which the headers are looked at.
      api_keys: of which one is needed, if there are any.

    Raises:
      Refused: a key is needed, and there is none or a wrong one; or a browser asks for another site's page.
    """
    if request.scope["method"] == "POST" and request.headers.get("sec-fetch-site", "none") not in OWN_SITE:
        raise Refused(403, "A page of another site sent this: ask at the server's own page, or by a client.")
    if not api_keys:
        host = request.headers.get("host", "")
        if not OWN_NAME.fullmatch(host):
            message = (
                f'The server is asked as "{host:.80}", a name of others: ask at 127.0.0.1, or start it with an API key.'
            )
            raise Refused(403, message)
        return request.client.host if request.client else ""
    given = request.headers.get("authorization", "")
    key = key_in(given).encode(errors="replace")
    if not any([hmac.compare_digest(key, known.encode()) for known in api_keys]):
        what = "is wrong" if given else "is missing"
        message = f"The API key {what}: send one as `Authorization: Bearer KEY`."
        raise Refused(401, message, "invalid_request_error", "invalid_api_key")
    return key.decode()


def key_in(header: str) -> str:
    """Returns the key in an Authorization header: `Bearer KEY`, or the password of `Basic`, whatever the name beside it."""
    scheme, _, rest = header.partition(" ")
    if scheme.lower() != "basic":
        return header.removeprefix("Bearer ").strip()
    try:
        return base64.b64decode(rest, validate=True).decode().partition(":")[2]
    except ValueError:
        return ""
