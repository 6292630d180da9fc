"""Replicas of a server on Ray: the same answers, whichever gives them, and nothing but its requests lost with one."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import grpc
import httpx
import openai
import psutil
import pytest
import yaml
from served import BAD, KEY, LINES, QUESTION, ROWS, ask, user
from waiting import until

from xblip.errors import ConfigError, XBlipError
from xblip.llm import LLMConfig
from xblip.serve import COMPLETIONS
from xblip.serve_config import RayConfig, ServeConfig

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
REPLICA = "ray::ServeRepli"
LONG = {**BAD, "max_tokens": 90, "min_tokens": 90}


class Replicated:
    """`xblip serve --engine ray` as a process of its own.

    Attributes:
      process: it.
      url: where, without a path.
      log: what it wrote.
      temporary: the folder of its temporary files, Ray's among them.
    """

    def __init__(self, bundle: Path, folder: Path, *options: str, **settings):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder / "log"
        self.temporary = Path(tempfile.mkdtemp(prefix="x", dir="/tmp"))  # Ray's sockets have short names
        config = folder / "serve.yaml"
        settings = {"model_name": "toys", "decode_workers": 1, "ray": {"replicas": 2, "cpus": 0.1}, **settings}
        config.write_text(yaml.safe_dump(settings))
        sites = [path for path in sys.path if (Path(path) / "xblip_rows.py").exists()]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([*sites, os.environ.get("PYTHONPATH", "")]),
            "TMPDIR": str(self.temporary),
            "XBLIP_API_KEYS": KEY,
        }
        environment.pop("RAY_ADDRESS", None)
        call = ["serve", bundle, "--engine", "ray", "--port", str(port), "--config", config, *options]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "xblip.cli", *map(str, call)], stdout=log, stderr=log, env=environment
            )

    def wait(self) -> None:
        """Waits until it answers."""
        until(lambda: self.process.poll() is not None or "replicas answer at" in self.log.read_text(), 300)
        assert self.process.poll() is None, self.log.read_text()

    @property
    def tree(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    @property
    def replicas(self) -> list[psutil.Process]:
        found = []
        for process in self.tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                found += [process] if process.name().startswith(REPLICA) else []
        return found

    def counted(self, *parts: str) -> dict[str, float]:
        """What each replica that answers counts, in all lines of its metrics that hold these parts."""
        told = httpx.get(f"{self.url}/metrics", headers={"Authorization": f"Bearer {KEY}"}, timeout=30).text
        found: dict[str, float] = {}
        for line in told.splitlines():
            replica = re.search(r'replica="(\w+)"', line)
            if replica and all(part in line for part in parts):
                found[replica[1]] = found.get(replica[1], 0) + float(line.split()[-1])
        return found

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(120)
            self.process.kill()
        shutil.rmtree(self.temporary, ignore_errors=True)


@pytest.fixture(scope="module")
def serve_ray():
    """The module, which takes seconds to import."""
    from xblip import serve_ray

    return serve_ray


@pytest.fixture(scope="module")
def rows_bundle(rows_model, tmp_path_factory):
    """`rows_model`, saved."""
    folder = tmp_path_factory.mktemp("bundle")
    rows_model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def replicated(rows_bundle, tmp_path_factory):
    found = Replicated(rows_bundle, tmp_path_factory.mktemp("replicated"))
    try:
        found.wait()
        yield found
    finally:
        found.close()


@pytest.fixture(scope="module")
def client(replicated):
    return openai.OpenAI(base_url=f"{replicated.url}/v1", api_key=KEY, max_retries=0)


def streamed(replicated, found: dict, number: int) -> None:
    """Streams a long answer; notes when it has begun, and how it ends."""
    headers = {"Authorization": f"Bearer {KEY}"}
    body = {**LONG, "stream": True, "n": 4, "temperature": 1}
    with httpx.stream("POST", replicated.url + COMPLETIONS, json=body, headers=headers, timeout=60) as response:
        lines = []
        for line in response.iter_lines():
            lines += [line] if line else []
            found[number] = lines


def test_answers_are_the_model_s_whichever_replica_gives_them(rows_model, replicated, client):
    media = [("rows", [1.0, 2, 3, 4, 4, 3, 2, 1]), "and", ("lines", [4.0, 3, -2, 1])]
    expected = rows_model.ask(QUESTION, media=media)
    for _ in range(12):
        completion = ask(client, ROWS, "and", LINES, QUESTION)
        assert completion.choices[0].message.content == expected.text
        assert completion.usage.prompt_tokens == expected.num_prompt_tokens
    assert len(replicated.counted("xblip_requests_total{", COMPLETIONS)) == 2


def test_a_stream_comes_piece_by_piece(client):
    whole = ask(client, ROWS, QUESTION, max_tokens=90, extra_body={"min_tokens": 90})
    times, text = [], ""
    for piece in ask(client, ROWS, QUESTION, max_tokens=90, extra_body={"min_tokens": 90}, stream=True):
        times.append(time.monotonic())
        text += piece.choices[0].delta.content or ""
    assert text == whole.choices[0].message.content
    assert len(set(times)) > 10 and times[0] < times[-1] - 0.02, "the first is here before the last is said"


def test_errors_have_openai_s_form_and_a_request_one_id(replicated, client):
    with pytest.raises(openai.NotFoundError, match='The model "other" is not served here'):
        client.chat.completions.create(model="other", messages=user(QUESTION))
    with pytest.raises(openai.AuthenticationError, match="The API key is wrong"):
        ask(client.with_options(api_key="other"), QUESTION)
    with pytest.raises(openai.BadRequestError, match=r"messages\[0\].content\[0\]: nothing is known by the uuid"):
        ask(client, {"type": "rows_url", "uuid": "other"}, QUESTION)
    response = client.chat.completions.with_raw_response.create(model="toys", messages=user(QUESTION))
    assert response.headers["x-request-id"] == response.parse().id
    odd = {"x-session-id": b"\xff", "x-request-timeout-seconds": "0.0001", "Authorization": f"Bearer {KEY}"}
    assert httpx.post(replicated.url + COMPLETIONS, json=BAD, headers=odd, timeout=30).status_code == 200


def test_a_session_s_requests_come_to_the_replica_that_knows_its_files(replicated, client):
    for number in range(4):
        session = client.with_options(default_headers={"X-Session-Id": f"session-{number}"})
        named = ask(session, {**ROWS, "uuid": "mine"}, QUESTION).choices[0].message.content
        for _ in range(4):
            assert ask(session, {"type": "rows_url", "uuid": "mine"}, QUESTION).choices[0].message.content == named


def test_who_leaves_frees_its_rows(replicated):
    headers, many = {"Authorization": f"Bearer {KEY}"}, {**LONG, "n": 16, "temperature": 1}
    url = replicated.url + COMPLETIONS
    with httpx.stream("POST", url, json={**many, "stream": True}, headers=headers, timeout=30) as response:
        next(response.iter_lines())
    with pytest.raises(httpx.TimeoutException):
        httpx.post(url, json=many, headers=headers, timeout=0.1)
    until(lambda: sum(replicated.counted("xblip_engine_total{", 'what="cancelled"').values()) > 16, 60)
    assert not any(replicated.counted("xblip_batch_size{").values())


def test_nobody_else_is_listened_to(replicated):
    """Ray's replicas have a port of their own that all can reach, and a token that not all have."""
    guarded = 0
    for process in replicated.tree:
        with contextlib.suppress(psutil.NoSuchProcess):
            for one in process.net_connections("tcp"):
                if one.status != psutil.CONN_LISTEN or one.laddr.ip in ("127.0.0.1", "::ffff:127.0.0.1"):
                    continue
                assert process.name().startswith(REPLICA), (process.name(), one.laddr)
                with grpc.insecure_channel(f"127.0.0.1:{one.laddr.port}") as channel:
                    call = channel.unary_unary("/ray.serve.ASGIService/HandleRequest")
                    with pytest.raises(grpc.RpcError) as refused:
                        call(b"", timeout=10)
                assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
                guarded += 1
    assert guarded == 2


def test_a_killed_replica_loses_its_requests_alone_and_is_replaced(replicated, client):
    found, over = {}, threading.Event()

    def again_and_again(number: int) -> None:
        while not over.is_set():
            streamed(replicated, found, number)

    threads = [threading.Thread(target=again_and_again, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    until(lambda: len(found) == 8, 60)
    killed = replicated.replicas[0]
    killed.kill()
    over.set()
    for _ in range(5):
        assert ask(client, QUESTION).choices, "others are answered"
    for thread in threads:
        thread.join(60)
    ends = [lines[-1] for lines in found.values()]
    lost = [end for end in ends if end != "data: [DONE]"]
    assert all('"message":"The replica that had this request died' in end for end in lost), lost
    assert 0 < len(lost) < 8
    until(lambda: len(replicated.counted("xblip_batch_size{")) == 2, 120)
    assert killed.pid not in [replica.pid for replica in replicated.replicas]


def test_sigterm_finishes_what_runs_and_leaves_nothing(replicated):
    tree, found = replicated.tree, {}
    thread = threading.Thread(target=streamed, args=(replicated, found, 0))
    thread.start()
    until(lambda: found, 60)
    replicated.process.send_signal(signal.SIGTERM)
    assert replicated.process.wait(120) == 0
    thread.join(10)
    assert found[0][-1] == "data: [DONE]"
    _, alive = psutil.wait_procs(tree, 20)
    assert not alive
    left = [path.name for path in replicated.temporary.iterdir() if path.name != "ray"]
    assert len(left) <= 1, "Ray's log, and the folder of the replica that was killed"
    assert "Traceback" not in replicated.log.read_text()


def test_a_replica_that_does_not_start_says_why(rows_bundle, tmp_path):
    broken = shutil.copytree(rows_bundle, tmp_path / "broken")
    (broken / "rows" / "bridge.safetensors").write_bytes(b"none")
    server = Replicated(broken, tmp_path)
    try:
        assert server.process.wait(300) == 2
        *_, said = server.log.read_text().splitlines()
        assert said.startswith("error: The replicas do not start: ") and "bridge.safetensors is damaged" in said
    finally:
        server.close()


class TestBeforeAnythingStarts:
    @pytest.fixture
    def refused(self, rows_bundle, serve_ray, monkeypatch):
        """What is wrong with these options."""
        monkeypatch.delenv("RAY_ADDRESS", raising=False)

        def refused(**settings) -> str:
            with pytest.raises(XBlipError) as error:
                serve_ray.run_replicas(settings.pop("model", str(rows_bundle)), ServeConfig(**settings))
            assert not serve_ray.ray.is_initialized()
            return str(error.value)

        return refused

    def test_models_and_ports_and_clusters_that_are_not_there(self, refused, monkeypatch):
        assert "No model is called" in refused(model="numerels")
        assert "Ray listens at a port that is known: set --port." in refused(port=0)
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            assert f"Cannot listen at 127.0.0.1:{port}: Address already in use. Set another --port" in refused(
                port=port
            )
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
        assert f"RAY_ADDRESS is 127.0.0.1:{port}, and no cluster answers there" in refused()

    def test_more_replicas_than_there_is_room_for(self, serve_ray, monkeypatch):
        monkeypatch.setattr(serve_ray.ray, "cluster_resources", lambda: {"CPU": 4.0, "GPU": 1.0})
        serve_ray._check_room(RayConfig(4), 0)
        with pytest.raises(ConfigError, match="5 replicas with 1 processors each need 5, and this machine has 4"):
            serve_ray._check_room(RayConfig(5), 0)
        with pytest.raises(ConfigError, match="2 replicas with 1 accelerators each need 2, and this machine has 1"):
            serve_ray._check_room(RayConfig(2), 1)

    def test_a_model_that_loads_onto_an_accelerator_takes_one(self, serve_ray, monkeypatch):
        monkeypatch.setattr(serve_ray.ray, "cluster_resources", lambda: {"GPU": 1.0})
        maps = {None: 0, "cpu": 0, "cuda": 1, "auto": 1}
        assert maps == {
            one: serve_ray._gpus(RayConfig(), LLMConfig("x", options={"device_map": one} if one else {}))
            for one in maps
        }
        assert serve_ray._gpus(RayConfig(gpus=0.5), LLMConfig("x")) == 0.5
        monkeypatch.setattr(serve_ray.ray, "cluster_resources", dict)
        assert serve_ray._gpus(RayConfig(), LLMConfig("x", options={"device_map": "auto"})) == 0
