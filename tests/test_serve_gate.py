"""The gate before the page: a key, the routes that it needs and no others, and no more than may come at once."""

import asyncio
import base64
import contextlib
from types import SimpleNamespace

import httpx
import pytest
from served import KEY

from xblip.serve import Server
from xblip.serve_access import key_in
from xblip.serve_config import ServeConfig
from xblip.serve_gate import MAX_EVENT_BYTES, Gate


def server(**settings):
    """As much of a server as a gate asks."""
    config = ServeConfig(**settings)
    return SimpleNamespace(config=config, caller=lambda request: Server.caller(SimpleNamespace(config=config), request))


def answer(path, method="GET", *, to=None, folder=None, **headers):
    """What stands behind a gate that is mounted at /ui says, or the gate."""

    async def behind(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"the page"})

    async def ask():
        async def mounted(scope, receive, send):
            await Gate(behind, to or server(), folder)({**scope, "root_path": "/ui"}, receive, send)

        async with httpx.AsyncClient(transport=httpx.ASGITransport(mounted), base_url="http://here") as client:
            request = client.build_request(method, f"/ui{path}", headers=headers)
            with contextlib.suppress(KeyError):
                if headers.get("content-length") is None:
                    del request.headers["content-length"]
            return await client.send(request)

    return asyncio.run(ask())


def basic(key):
    return f"Basic {base64.b64encode(f'anyone:{key}'.encode()).decode()}"


def test_what_the_page_needs_is_there_and_loads_nothing_from_elsewhere():
    for path in ("/", "/config", "/assets/index.js", "/gradio_api/file=/a/b.png", "/gradio_api/heartbeat/abc"):
        response = answer(path)
        assert (response.status_code, response.text) == (200, "the page"), path
        assert "default-src 'self'" in response.headers["content-security-policy"]
        assert response.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/gradio_api/file=http://169.254.169.254/latest"),
        ("GET", "/gradio_api/proxy=http://here/"),
        ("POST", "/gradio_api/run/predict"),
        ("POST", "/gradio_api/vibe-edit"),
        ("POST", "/gradio_api/process_recording"),
        ("GET", "/gradio_api/run-history/buckets"),
        ("GET", "/monitoring"),
        ("GET", "/gradio_api/queue/join"),
        ("PUT", "/gradio_api/upload"),
        ("DELETE", "/"),
    ],
)
def test_what_it_does_not_need_is_not_there(method, path):
    response = answer(path, method, **{"content-length": "0"})
    assert response.status_code == 404 and "There is nothing here" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "path", ["/", "/config", "/assets/a.js", "/gradio_api/heartbeat/abc", "/gradio_api/file=/a.png"]
)
def test_without_a_key_there_is_nothing_at_all(path):
    locked = server(api_keys=["other", KEY])
    refused = answer(path, to=locked)
    assert refused.status_code == 401 and refused.headers["www-authenticate"].startswith("Basic ")
    assert "give the key as the password" in refused.text
    for wrong in (basic("wrong"), basic(""), "Basic !", "Basic", "Bearer", KEY[:-1], "Basic //8="):
        assert answer(path, to=locked, Authorization=wrong).status_code == 401, wrong
    for right in (basic(KEY), f"Bearer {KEY}"):
        assert answer(path, to=locked, Authorization=right).status_code == 200


def test_a_key_may_hold_a_colon():
    assert key_in(basic("a:b")) == "a:b" and key_in("Bearer a:b") == "a:b"


def test_another_site_s_page_may_not_post(tmp_path):
    join = ("/gradio_api/queue/join", "POST")
    for site in ("cross-site", "same-site"):
        response = answer(*join, **{"sec-fetch-site": site, "content-length": "2"})
        assert response.status_code == 403 and "A page of another site" in response.text
    assert answer(*join, **{"sec-fetch-site": "same-origin", "content-length": "2"}).status_code == 200


def test_no_more_may_come_than_is_allowed(tmp_path):
    upload, join = "/gradio_api/upload", "/gradio_api/queue/join"
    small = server(max_body_bytes=1000)
    most = {"to": small, "folder": tmp_path}
    assert "does not tell its length" in answer(upload, "POST", **most).text
    assert answer(join, "POST", **most, **{"content-length": str(MAX_EVENT_BYTES + 1)}).status_code == 413
    assert answer(upload, "POST", **most, **{"content-length": "1001"}).status_code == 413
    assert answer(upload, "POST", **most, **{"content-length": "1000"}).status_code == 200
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "file").write_bytes(b"x" * 15_500)
    full = answer(upload, "POST", **most, **{"content-length": "1000"})
    assert full.status_code == 507 and "as many files of visitors as it may" in full.text
    assert answer(upload, "POST", **most, **{"content-length": "400"}).status_code == 200
