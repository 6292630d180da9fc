"""What stands in Ray's proxies says Ray's own errors in OpenAI's form; the command, what Ray cannot do."""

import asyncio
import json
import sys

import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from xblip import cli
from xblip.errors import ConfigError
from xblip.serve_config import RayConfig, ServeConfig
from xblip.serve_metrics import Merged

imports_ray = pytest.mark.slow
"""It takes seconds to import Ray Serve."""


def start(status: int, kind: str, *headers: tuple[bytes, bytes]) -> dict:
    return {"type": "http.response.start", "status": status, "headers": [(b"content-type", kind.encode()), *headers]}


def body(content: bytes, more: bool = False) -> dict:
    return {"type": "http.response.body", "body": content, "more_body": more}


@pytest.fixture
def passed():
    """What a client gets of these messages of Ray's, and the headers that Ray saw."""
    from xblip.serve_ray_proxy import middlewares

    def passed(*messages: dict, headers: tuple = ()) -> tuple[list[dict], list]:
        sent, seen = [], []

        async def ray(scope, receive, send):
            seen.extend(scope["headers"])
            for message in messages:
                await send(message)

        async def send(message):
            sent.append(message)

        (middleware,) = middlewares()
        scope = {"type": "http", "method": "POST", "headers": [*headers]}
        asyncio.run(middleware.cls(ray)(scope, None, send))
        return sent, seen

    return passed


@imports_ray
def test_what_a_replica_says_passes_with_one_id(passed):
    ids = (b"x-request-id", b"ours"), (b"x-request-id", b"Ray's")
    for status, kind in ((200, "application/json"), (404, "application/json"), (200, "text/event-stream")):
        sent, _ = passed(start(status, kind, *ids), body(b"{}", more=True), body(b"}"))
        assert [one.get("body") for one in sent] == [None, b"{}", b"}"]
        assert sent[0]["headers"][1:] == [(b"x-request-id", b"ours")]


@imports_ray
@pytest.mark.parametrize(
    "said, status, message",
    [
        ([start(404, "text/plain"), body(b"Path not found.")], 503, "The server is starting or shutting down"),
        ([start(408, "text/plain"), body(b"Timed out.")], 504, "No replica had answered in time"),
        ([start(429, "text/plain"), body(b"Full.")], 429, "Too many requests wait for a replica already"),
        ([start(503, "text/plain"), body(b"None.")], 503, "No replica takes requests now"),
        ([start(500, "text/plain"), body(b"Traceback")], 500, "The replica that had this request died"),
        ([], 500, "The replica that had this request died"),
    ],
)
def test_what_ray_says_is_said_in_openai_s_form(passed, said, status, message):
    (head, content), _ = passed(*said)
    error = json.loads(content["body"])["error"]
    assert (
        head["status"] == status and message in error["message"] and set(error) == {"message", "type", "param", "code"}
    )
    assert (b"retry-after" in dict(head["headers"])) == (status in (429, 503))


@imports_ray
def test_a_stream_that_breaks_ends_with_an_error(passed):
    *_, last = passed(start(200, "text/event-stream"), body(b"data: {}", more=True))[0]
    assert b"The replica that had this request died" in last["body"] and not last.get("more_body")


@imports_ray
def test_clients_give_ray_no_orders(passed):
    kept = [(b"authorization", b"\xff"), (b"x-session-id", b"mine")]
    orders = [
        (b"x-request-disconnect-disabled", b"1"),
        (b"x-request-timeout-seconds", b"0"),
        (b"x-session-id", b"\xff"),
    ]
    assert passed(headers=(*orders, *kept))[1] == kept


def test_metrics_of_all_replicas_are_one_text():
    told = {}
    for name in ("one", "two"):
        registry = CollectorRegistry()
        Counter("requests", "So many.", ["status"], registry=registry).labels("200").inc(len(told) + 1)
        Histogram("seconds", "So long.", buckets=(1,), registry=registry).observe(0.5)
        told[name] = registry.collect()
    text = generate_latest(Merged(told)).decode()
    assert 'requests_total{replica="one",status="200"} 1.0' in text
    assert 'requests_total{replica="two",status="200"} 2.0' in text
    assert 'seconds_bucket{le="1.0",replica="two"} 1.0' in text and text.count("# TYPE requests_total counter") == 1


@pytest.mark.parametrize("setting", [{"replicas": 0}, {"cpus": -1.0}, {"gpus": -1.0}])
def test_replicas_that_cannot_be(setting):
    with pytest.raises(ConfigError, match="must be at least"):
        ServeConfig(ray=RayConfig(**setting)).check()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--engine", "slurm"], '--engine must be "own" or "ray", not "slurm".'),
        (["--replicas", "2"], "--replicas are of Ray: add --engine ray, or leave it out."),
        (["--engine", "ray", "--replicas", "0"], "replicas must be at least 1, not 0."),
        (["--engine", "ray", "--ui"], "A page is of one process"),
        (["--engine", "ray"], "xblip serve needs what an extra brings: pip install 'xblip[serve,ray]'."),
    ],
)
def test_what_the_command_refuses(monkeypatch, capsys, options, message):
    if "extra" in message:
        monkeypatch.setitem(sys.modules, "xblip.serve_ray", None)
    monkeypatch.setattr(sys, "argv", ["xblip", "serve", "numerals", *options])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2 and message in capsys.readouterr().err
