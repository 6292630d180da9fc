"""The server, spoken to by the official `openai` client and by those who mean it ill."""

import json
import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from kit import Site, make_branch
from served import data_url, running, user

from xblip import plugins
from xblip.engine import EngineConfig
from xblip.errors import ConfigError
from xblip.model import XBlip
from xblip.serve import COMPLETIONS
from xblip.serve_config import ServeConfig
from xblip.serve_media import limited

SOURCE = '''
import os
import signal
import time
from dataclasses import dataclass

import xblip
from xblip.testing import ToyModality


class Rows(ToyModality):
    """Rows of four numbers from a text file, which may also ask for trouble."""

    name = "rows"
    cue = "input : "
    suffixes = (".txt",)
    mime_types = ("text/plain",)

    @dataclass
    class Config(ToyModality.Config):
        max_numbers: int = 100

    def load(self, source):
        file = xblip.media_file(source, kind="rows")
        if file is None:
            return super().load(source)
        with xblip.decoding(file.label, "rows of four numbers"), file.open() as opened:
            words = opened.read().decode().split()
            if words[0] == "sleep":
                time.sleep(float(words[1]))
            if words[0] == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            numbers = [float(word) for word in words if word not in ("sleep", "die")]
        if len(numbers) > self.config.max_numbers:
            raise xblip.MediaError(f"Cannot read {file.label}: more than max_numbers = {self.config.max_numbers}.")
        return super().load(numbers)


class Lines(Rows):
    name = "lines"
    cue = "red input : "


@xblip.hookimpl
def register_modalities(register):
    register(Rows)
'''
LINES = {"type": "input_lines", "input_lines": {"data": "NCAzIC0yIDE=", "format": "txt"}}  # 4 3 -2 1
QUESTION = "what is this ?"
KEY = "secret-1"


def rows(content):
    """A part that holds this file, or has this URL."""
    return {"type": "rows_url", "rows_url": {"url": data_url(content) if isinstance(content, bytes) else content}}


ROWS = rows(b"1 2 3 4 4 3 2 1")


@pytest.fixture(scope="module")
def model(llm, tmp_path_factory):
    """With two modalities that are installed, so that workers find them."""
    site = Site(tmp_path_factory.mktemp("site"))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(site.folder)
        patch.setenv("XBLIP_PLUGINS", "rows,lines")
        site.install("rows", SOURCE)
        site.install("lines", SOURCE.replace("register(Rows)", "register(Lines)"))
        branches = {}
        for seed, name in enumerate(("rows", "lines")):
            branches[name] = make_branch(plugins.get("modality", name), llm, seed=seed)
        yield XBlip(llm=llm, branches=branches, generation={"max_new_tokens": 8}).eval()
    site.close()


@pytest.fixture(scope="module")
def served(model):
    with running(model, decode_seconds=1.0, max_parts=8, max_part_bytes=2_000, max_body_bytes=100_000) as found:
        yield found


@pytest.fixture(scope="module")
def client(served):
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


def ask(client, *content, **settings):
    return client.chat.completions.create(model="toys", messages=user(*content), **settings)


def post(served, body, **headers):
    content = body if isinstance(body, (bytes, str)) else json.dumps(body)
    return httpx.post(served.url + COMPLETIONS, content=content, headers=headers, timeout=30)


class TestAnswers:
    def test_an_answer_is_the_model_s(self, model, client):
        completion = ask(client, ROWS, "and", LINES, QUESTION)
        media = [("rows", [1.0, 2, 3, 4, 4, 3, 2, 1]), "and", ("lines", [4.0, 3, -2, 1])]
        expected = model.ask(QUESTION, media=media)
        assert completion.choices[0].message.content == expected.text
        assert completion.choices[0].finish_reason in ("stop", "length") and completion.model == "toys"
        assert completion.usage.prompt_tokens == expected.num_prompt_tokens
        assert completion.usage.completion_tokens == expected.num_new_tokens

    def test_streamed_it_is_the_same(self, client):
        whole = ask(client, ROWS, QUESTION, logprobs=True, top_logprobs=1)
        *pieces, counts = ask(
            client, ROWS, QUESTION, stream=True, logprobs=True, top_logprobs=1, stream_options={"include_usage": True}
        )
        text = "".join(piece.choices[0].delta.content or "" for piece in pieces)
        assert text == whole.choices[0].message.content and pieces[0].choices[0].delta.role == "assistant"
        assert [piece.choices[0].finish_reason for piece in pieces][-1] == "length"
        assert counts.usage == whole.usage and counts.choices == []
        told = [one.token for piece in pieces if piece.choices[0].logprobs for one in piece.choices[0].logprobs.content]
        assert told == [one.token for one in whole.choices[0].logprobs.content]
        assert all(len(one.top_logprobs) == 1 for one in whole.choices[0].logprobs.content)

    def test_conversations_and_system_messages(self, model, client):
        messages = [
            {"role": "system", "content": "show the red"},
            *user(ROWS, QUESTION),
            {"role": "assistant", "content": "two"},
            {"role": "user", "content": "and this ?"},
        ]
        found = client.chat.completions.create(model="toys", messages=messages).choices[0].message.content
        content = [
            {"type": "text", "text": "show the red"},
            {"type": "rows", "source": [1.0, 2, 3, 4, 4, 3, 2, 1]},
            {"type": "text", "text": QUESTION},
        ]
        own = [
            {"role": "user", "content": content},
            {"role": "assistant", "content": "two"},
            {"role": "user", "content": "and this ?"},
        ]
        assert found == model.chat(own).text

    def test_seeds_choices_and_stops(self, client):
        settings = {"temperature": 1.5, "seed": 7, "n": 3}
        first, again = (ask(client, ROWS, QUESTION, **settings) for _ in range(2))
        texts = [choice.message.content for choice in first.choices]
        assert texts == [choice.message.content for choice in again.choices] and len(set(texts)) > 1
        assert [choice.index for choice in first.choices] == [0, 1, 2]
        assert texts[1] == ask(client, ROWS, QUESTION, temperature=1.5, seed=8).choices[0].message.content
        greedy = ask(client, ROWS, QUESTION).choices[0].message.content
        stopped = ask(client, ROWS, QUESTION, stop=[greedy.split()[2]]).choices[0]
        assert stopped.message.content == " ".join(greedy.split()[:2]) and stopped.finish_reason == "stop"
        assert len(ask(client, QUESTION, max_completion_tokens=2).choices[0].message.content.split()) <= 2
        extra = {"num_beams": 3, "min_tokens": 4}
        assert ask(client, ROWS, QUESTION, extra_body=extra).choices[0].message.content

    def test_streams_of_several_choices(self, client):
        texts = {0: "", 1: ""}
        for piece in ask(client, ROWS, QUESTION, stream=True, n=2, temperature=1.5, seed=7):
            texts[piece.choices[0].index] += piece.choices[0].delta.content or ""
        whole = ask(client, ROWS, QUESTION, n=2, temperature=1.5, seed=7)
        assert list(texts.values()) == [choice.message.content for choice in whole.choices]

    def test_what_was_sent_is_known_by_its_uuid_and_by_its_content(self, served, client):
        named = {**ROWS, "uuid": "my-rows"}
        first = ask(client, named, QUESTION).choices[0].message.content
        loads = served.server.pool.counters.loads
        for part in (
            {"type": "rows_url", "uuid": "my-rows"},
            {"type": "rows_url", "rows_url": None, "uuid": "my-rows"},
            ROWS,
        ):
            assert ask(client, part, QUESTION).choices[0].message.content == first
        assert served.server.pool.counters.loads == loads, "nothing was read again"
        with pytest.raises(openai.BadRequestError, match='nothing is known by the uuid "other"'):
            ask(client, {"type": "rows_url", "uuid": "other"}, QUESTION)

    def test_the_model_is_listed(self, client):
        assert [one.id for one in client.models.list()] == ["toys"]
        assert client.models.retrieve("toys").modalities == ["rows", "lines"]

    def test_parts_of_all_modalities_stand_in_the_schema(self, served):
        schema = httpx.get(f"{served.url}/openapi.json").json()
        body = schema["paths"][COMPLETIONS]["post"]["requestBody"]["content"]["application/json"]["schema"]
        parts = body["properties"]["messages"]["items"]["properties"]["content"]["oneOf"][1]["items"]["oneOf"]
        assert [part["title"] for part in parts] == ["text", "rows_url", "input_rows", "lines_url", "input_lines"]
        assert "#/" not in json.dumps(body)

    def test_metrics_tell_what_happened(self, served, client):
        ask(client, ROWS, QUESTION)
        told = httpx.get(f"{served.url}/metrics").text
        for name in ("xblip_queue_length", "xblip_batch_size", 'xblip_cache_total{cache="features",what="hits"}'):
            assert name in told
        for name in ("xblip_time_to_first_token_seconds_count", "xblip_time_per_token_seconds_count"):
            assert name in told
        assert f'xblip_requests_total{{path="{COMPLETIONS}",status="200"}}' in told

    def test_health_and_readiness(self, served):
        assert httpx.get(f"{served.url}/health").json() == {"status": "ok"}
        assert httpx.get(f"{served.url}/ready").json() == {"ready": True, "workers": 2}


BAD = {"model": "toys", "messages": user(QUESTION)}


def asking(*content):
    return {**BAD, "messages": user(*content)}


@pytest.mark.parametrize(
    "body, status, message",
    [
        (b"\xff\xfe{", 400, "The body is no JSON"),
        (b'{"model": "toys", "messages": [{"role": "user", "content": "\xff"}]}', 400, "The body is no JSON"),
        (b"[]", 400, "The request"),
        ({}, 400, "model: Field required"),
        ({**BAD, "model": "gpt-9"}, 404, 'The model "gpt-9" is not served here, but "toys" is'),
        ({**BAD, "messages": []}, 400, "messages: "),
        ({**BAD, "max_tokens": -1}, 400, "max_tokens: "),
        ({**BAD, "max_tokens": 2, "max_completion_tokens": 3}, 400, "differ: give one of them"),
        ({**BAD, "temperature": "hot"}, 400, "temperature: "),
        ({**BAD, "temprature": 1}, 400, 'Unknown setting "temprature". Did you mean "temperature"?'),
        ({**BAD, "tools": []}, 400, 'Unknown setting "tools".'),
        ({**BAD, "frequency_penalty": 0.5}, 400, "frequency_penalty is not done here"),
        ({**BAD, "top_logprobs": 2}, 400, "top_logprobs needs logprobs"),
        ({**BAD, "stream_options": {}}, 400, "stream_options needs stream"),
        ({**BAD, "response_format": {"type": "json_object"}}, 400, "response_format.type"),
        ({**BAD, "n": 1000}, 400, "n: "),
        ({**BAD, "stop": ["a"] * 9}, 400, "stop"),
        ({**BAD, "max_tokens": 10**9}, 400, "The prompt is too long for the LLM"),
        (asking(*"aaaaaaaaa"), 400, "messages[0].content has 9 parts, and 8 are allowed"),
        ({**BAD, "messages": [{"role": "tool", "content": "x"}]}, 400, "messages[0].role"),
        ({**BAD, "messages": [{"role": "assistant", "content": "x"}]}, 400, "user and assistant take turns"),
        ({**BAD, "messages": [{"role": "user", "content": None}]}, 400, "messages[0].content is missing"),
        (asking(ROWS), 400, "the last has no text, which would be the question"),
        (asking("  "), 400, "instruction"),
        ({**BAD, "messages": [*user("a"), {**user(ROWS)[0], "role": "assistant"}]}, 400, "only messages of role"),
        (asking({"type": "rows_ulr", "rows_ulr": {}}, QUESTION), 400, 'Did you mean "rows_url"?'),
        (asking({"type": "pictures_url"}, QUESTION), 400, 'the unknown type "pictures_url"'),
        (asking({"type": "rows_url", "rows_url": {}}, QUESTION), 400, 'must be {"url": "data:'),
        (asking(rows("data:,1"), QUESTION), 400, "base64"),
        (asking({"type": "input_rows", "input_rows": {"data": "@@@"}}, QUESTION), 400, "base64"),
        (asking(rows(b"1 " * 1500), QUESTION), 400, "larger than"),
        (asking(rows(b"red"), QUESTION), 400, "Cannot read"),
        (asking(rows("file:///etc/passwd"), QUESTION), 400, "reads no files of its own"),
        (asking(rows("http://10.0.0.1/a.txt"), QUESTION), 400, "Cannot fetch"),
        (asking(rows(b"die"), QUESTION), 400, "the process that read it died"),
        (asking(rows(b"sleep 9"), QUESTION), 400, "within the 1 s"),
        (asking("a" * 200_000), 413, "The body is larger than the 100000 bytes"),
    ],
)  # fmt: skip
def test_bad_input_has_one_clear_error_in_openai_s_form(served, client, body, status, message):
    response = post(served, body)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert message in error["message"] and set(error) == {"message", "type", "param", "code"}
    assert "Traceback" not in response.text and "/tmp" not in response.text
    assert ask(client, QUESTION).choices[0].message.content, "it goes on"


def test_a_part_that_is_wrong_is_named(served):
    bad = rows(b"red")
    error = post(served, asking(ROWS, bad, QUESTION)).json()["error"]
    assert error["param"] == "messages[0].content[1].rows_url" and error["param"] in error["message"]


def test_a_declared_length_is_believed_before_anything_is_read(served):
    lines = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: a\r\nContent-Length: 999999999\r\n\r\n"
    with socket.create_connection(("127.0.0.1", httpx.URL(served.url).port)) as own:
        own.sendall(lines.encode())
        assert b"413" in own.recv(1000)


def test_errors_are_the_client_s_exceptions(served, client):
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=user(QUESTION))
    with pytest.raises(openai.BadRequestError, match="Cannot read"):
        ask(client, rows(b"red"), QUESTION)
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    assert post(served, BAD).status_code == 200
    for path, status in (("/nope", 404), (COMPLETIONS, 405)):
        response = httpx.get(served.url + path)
        assert response.status_code == status and response.json()["error"]["type"] == "invalid_request_error"


class TestKeys:
    @pytest.fixture(scope="class")
    def locked(self, model):
        with running(model, api_keys=[KEY, "secret-2"], decode_workers=1) as found:
            yield found

    def test_a_key_is_needed(self, locked):
        for key in ("wrong", "secret-", "secret-11", "ünlike"):
            response = post(locked, BAD, Authorization=f"Bearer {key}".encode())
            assert response.status_code == 401 and "The API key is wrong" in response.json()["error"]["message"]
        assert "The API key is missing" in post(locked, BAD).json()["error"]["message"]
        for path in ("/v1/models", "/metrics"):
            assert httpx.get(locked.url + path).status_code == 401
        assert httpx.get(f"{locked.url}/health").status_code == 200
        client = openai.OpenAI(base_url=f"{locked.url}/v1", api_key=KEY, max_retries=0)
        assert ask(client, QUESTION).choices
        with pytest.raises(openai.AuthenticationError):
            ask(client.with_options(api_key="other"), QUESTION)

    def test_names_are_their_sender_s_own(self, locked):
        one, two = (openai.OpenAI(base_url=f"{locked.url}/v1", api_key=key, max_retries=0) for key in (KEY, "secret-2"))
        ask(one, {**ROWS, "uuid": "mine"}, QUESTION)
        assert ask(one, {"type": "rows_url", "uuid": "mine"}, QUESTION).choices
        with pytest.raises(openai.BadRequestError, match="nothing is known by the uuid"):
            ask(two, {"type": "rows_url", "uuid": "mine"}, QUESTION)


class TestLoad:
    def test_many_at_once_are_answered_or_told_to_come_back(self, model):
        settings = {"engine": EngineConfig(max_rows=4, max_waiting=8), "max_requests": 24}
        with running(model, **settings) as served, ThreadPoolExecutor(60) as threads:
            body = asking(ROWS, QUESTION)
            responses = list(threads.map(lambda _: post(served, body), range(200)))
            statuses = {response.status_code for response in responses}
            assert statuses <= {200, 429} and 200 in statuses
            for response in responses:
                if response.status_code == 429:
                    assert response.headers["Retry-After"] == "1" and "ask again in a while" in response.text
            texts = {
                response.json()["choices"][0]["message"]["content"] for response in responses if response.is_success
            }
            assert len(texts) == 1
            assert served.server.engine.state == {"waiting": 0, "rows": 0, "positions": 0}

    def test_a_client_that_leaves_frees_its_row(self, model):
        with running(model, decode_workers=1) as served:
            body = {**BAD, "max_tokens": 90, "min_tokens": 90}
            with httpx.stream("POST", served.url + COMPLETIONS, json={**body, "stream": True}) as response:
                next(response.iter_lines())
            with pytest.raises(httpx.TimeoutException):
                httpx.post(served.url + COMPLETIONS, json={**body, "n": 16}, timeout=0.05)
            deadline = time.monotonic() + 10
            while served.server.engine.state["rows"] and time.monotonic() < deadline:
                time.sleep(0.01)
            assert served.server.engine.state["rows"] == 0

    def test_a_killed_worker_loses_only_the_file_it_held(self, model):
        with running(model, decode_workers=2, decode_seconds=20) as served, ThreadPoolExecutor(8) as threads:
            slow = {
                **BAD,
                "messages": user(rows(b"sleep 2 1 2 3 4"), QUESTION),
            }
            held = threads.submit(post, served, slow)
            others = []
            time.sleep(0.5)
            for number in range(20):
                part = {"type": "rows_url", "rows_url": {"url": data_url(f"1 2 3 {number}".encode())}}
                others.append(threads.submit(post, served, asking(part, QUESTION)))
            busy = max(served.server.pool.pids, key=lambda pid: held.running() and _is_asleep(pid))
            os.kill(busy, signal.SIGKILL)
            statuses = [future.result().status_code for future in others]
            assert statuses.count(200) >= 19 and set(statuses) <= {200, 400}
            assert statuses.count(400) + (held.result().status_code == 400) <= 1
            assert served.server.pool.counters.alive == 2

    def test_stopping_finishes_what_runs(self, model):
        with running(model, decode_workers=1) as served:
            found = []
            body = {**BAD, "max_tokens": 90, "min_tokens": 90, "n": 8, "temperature": 1}
            asking = threading.Thread(target=lambda: found.append(post(served, body)))
            asking.start()
            deadline = time.monotonic() + 10
            while not served.server.engine.state["rows"] and time.monotonic() < deadline:
                time.sleep(0.001)
            served.stop()
            asking.join(20)
        assert found[0].status_code == 200 and len(found[0].json()["choices"]) == 8


def _is_asleep(pid: int) -> float:
    with open(f"/proc/{pid}/wchan") as file:
        return "nanosleep" in file.read()


class TestSettings:
    def test_others_are_let_in_by_keys_alone(self):
        with pytest.raises(ConfigError, match="The host 0.0.0.0 can be reached by others, and there are no API keys"):
            ServeConfig(host="0.0.0.0").check()
        ServeConfig(host="0.0.0.0", api_keys=[KEY]).check()

    @pytest.mark.parametrize(
        "settings", [{"port": 70_000}, {"port": -1}, {"api_keys": [""]}, {"api_keys": ["a b"]}, {"max_requests": 0}]
    )
    def test_settings_that_cannot_be(self, settings):
        with pytest.raises(ConfigError):
            ServeConfig(**settings).check()

    def test_limits_are_the_lower_ones(self, model):
        assert limited(model, {})["rows"].config.max_numbers == 100
        made = limited(model, {"max_numbers": 50, "lines.max_numbers": 20})
        assert (made["rows"].config.max_numbers, made["lines"].config.max_numbers) == (50, 20)
        assert limited(model, {"max_numbers": 1000})["rows"].config.max_numbers == 100
        assert model.branches["rows"].modality.config.max_numbers == 100, "the model's own stays"
        with pytest.raises(ConfigError, match='Unknown limit "max_number"'):
            limited(model, {"max_number": 3})
        with pytest.raises(ConfigError, match="must be a number above 0"):
            limited(model, {"max_numbers": 0})

    def test_a_limit_refuses(self, model):
        model.caches.clear()
        with running(model, limits={"max_numbers": 4}, decode_workers=1) as served:
            message = post(served, asking(ROWS, QUESTION)).json()["error"]["message"]
            assert "more than max_numbers = 4" in message
