"""The server, spoken to by the official `openai` client and by those who mean it ill."""

import json
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx
import openai
import pytest
from served import BAD, KEY, LINES, QUESTION, ROWS, ask, asking, post, rows, running, user
from waiting import until

from xblip.engine import EngineConfig
from xblip.errors import ConfigError
from xblip.requests import Said
from xblip.sampling import Drawn
from xblip.serve import COMPLETIONS
from xblip.serve_config import ServeConfig
from xblip.serve_media import LIMITS, limited
from xblip.serve_reply import Replies

pytestmark = pytest.mark.slow
"""A server takes seconds to start; what it refuses is tried in the quick suite, by `test_serve_refusals`."""


class TestAnswers:
    def test_an_answer_is_the_model_s(self, rows_model, client):
        completion = ask(client, ROWS, "and", LINES, QUESTION)
        media = [("rows", [1.0, 2, 3, 4, 4, 3, 2, 1]), "and", ("lines", [4.0, 3, -2, 1])]
        expected = rows_model.ask(QUESTION, media=media)
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
        assert told == [one.token for one in whole.choices[0].logprobs.content] and "".join(told) == text
        assert all(len(one.top_logprobs) == 1 for one in whole.choices[0].logprobs.content)

    def test_conversations_and_system_messages(self, rows_model, client):
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
        assert found == rows_model.chat(own).text

    def test_an_answer_goes_back_as_it_came(self, client):
        messages = user(ROWS, QUESTION)
        message = client.chat.completions.create(model="toys", messages=messages).choices[0].message
        told = [message, message.model_dump(), {"role": message.role, "content": message.content}]
        answers = [
            client.chat.completions.create(model="toys", messages=[*messages, one, *user(QUESTION)], temperature=0)
            for one in told
        ]
        assert len({answer.choices[0].message.content for answer in answers}) == 1

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

    def test_what_asks_for_steps_goes_by_steps_whatever_the_model_s_own_settings(self, rows_model):
        """Beams are many published models' own, and neither likelihoods nor temperatures are of beams."""
        rows_model.generation["num_beams"] = 3
        try:
            with running(rows_model, decode_workers=1) as served:
                for settings in ({"logprobs": True, "top_logprobs": 2}, {"temperature": 0, "logprobs": True}):
                    [choice] = post(served, {**BAD, **settings}).json()["choices"]
                    assert len(choice["logprobs"]["content"]) >= 1
                assert post(served, BAD).json()["choices"][0]["logprobs"] is None
                assert served.server.engine.counts["steps"] > 0
        finally:
            del rows_model.generation["num_beams"]

    def test_a_part_of_a_character_has_no_bytes_that_could_be_put_together(self):
        tokenizer = SimpleNamespace(decode=lambda ids: "\ufffd" if ids == [1] else "é")
        replies = Replies(id="", model="", tokenizer=tokenizer, tells_log_probabilities=True)
        told = replies.said(0, Said("", [Drawn(1, -1.0, []), Drawn(2, -1.0, [])]))["choices"][0]["logprobs"]["content"]
        assert [one["bytes"] for one in told] == [None, [0xC3, 0xA9]]

    def test_likelihoods_that_an_llm_cannot_tell_are_refused(self, rows_model):
        with running(rows_model, decode_workers=1) as served:
            served.server.engine._can_step = False
            response = post(served, {**BAD, "logprobs": True})
            assert response.status_code == 400 and "Log-probabilities are told" in response.json()["error"]["message"]

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


class TestKeys:
    @pytest.fixture(scope="class")
    def locked(self, rows_model):
        with running(rows_model, api_keys=[KEY, "secret-2"], decode_workers=1) as found:
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
        by_name = post(locked, BAD, Authorization=f"Bearer {KEY}", Host="models.example.org")
        assert by_name.status_code == 200, "who has a key may ask by any name"
        with pytest.raises(openai.AuthenticationError):
            ask(client.with_options(api_key="other"), QUESTION)

    def test_names_are_their_sender_s_own(self, locked):
        one, two = (openai.OpenAI(base_url=f"{locked.url}/v1", api_key=key, max_retries=0) for key in (KEY, "secret-2"))
        ask(one, {**ROWS, "uuid": "mine"}, QUESTION)
        assert ask(one, {"type": "rows_url", "uuid": "mine"}, QUESTION).choices
        with pytest.raises(openai.BadRequestError, match="nothing is known by the uuid"):
            ask(two, {"type": "rows_url", "uuid": "mine"}, QUESTION)


class TestLoad:
    def test_many_at_once_are_answered_or_told_to_come_back(self, rows_model):
        settings = {"engine": EngineConfig(max_rows=4, max_waiting=8), "max_requests": 24}
        with running(rows_model, **settings) as served, ThreadPoolExecutor(60) as threads:
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
            until(lambda: served.server.engine.state == {"waiting": 0, "rows": 0, "positions": 0})

    def test_time_is_counted_from_the_request_on_files_and_all(self, rows_model):
        with running(rows_model, decode_workers=1, decode_seconds=20, request_seconds=0.5) as served:
            response = post(
                served, asking(*(rows(f"sleep 0.4 {number} 2 3".encode()) for number in range(4)), QUESTION)
            )
            assert response.status_code == 504 and "was not whole after 0.5 s" in response.json()["error"]["message"]

    def test_those_without_files_do_not_wait_for_those_who_read(self, rows_model, monkeypatch):
        monkeypatch.setattr("xblip.serve_intake.READERS", 1)
        with running(rows_model, decode_workers=1, decode_seconds=20) as served, ThreadPoolExecutor(2) as threads:
            reading = [
                threads.submit(post, served, asking(rows(f"sleep 2 1 2 {n}".encode()), QUESTION)) for n in (1, 2)
            ]
            until(lambda: served.server.intake.count == 2)
            started = time.monotonic()
            assert post(served, BAD).status_code == 200 and time.monotonic() - started < 1.5
            assert not any(future.done() for future in reading)

    def test_bodies_have_a_limit_together(self, rows_model):
        with running(
            rows_model, decode_workers=1, decode_seconds=20, max_held_bytes=3_000, max_body_bytes=3_000
        ) as served:
            with ThreadPoolExecutor(1) as threads:
                large = asking(rows(b"sleep 1 1 2 3"), QUESTION + " " * 2_000)
                first = threads.submit(post, served, large)
                until(lambda: served.server.intake.held_bytes > 2_000)
                refused = post(served, large)
                assert refused.status_code == 429 and "too large together" in refused.json()["error"]["message"]
                assert post(served, BAD).status_code == 200 and first.result().status_code == 200
            assert served.server.intake.held_bytes == 0

    def test_what_is_read_of_files_counts_until_the_answer_begins(self, rows_model, monkeypatch):
        rows_model.caches.clear()
        large = asking(*(rows(("1 " * 99 + str(number)).encode()) for number in range(16)), QUESTION)
        most = len(json.dumps(large)) + 1_000
        with running(rows_model, decode_workers=1, max_held_bytes=most, max_body_bytes=most) as served:
            refused = post(served, large)
            assert refused.status_code == 413 and "What is read of these files takes more" in refused.text
            until(lambda: not served.server.intake.held_bytes)
            at_work, may_go, real = threading.Event(), threading.Event(), served.server.engine._made
            monkeypatch.setattr(
                served.server.engine, "_made", lambda jobs: at_work.set() or (may_go.wait(20) and real(jobs))
            )
            with ThreadPoolExecutor(1) as threads:
                small = threads.submit(post, served, asking(rows(b"7 7 7 7"), QUESTION))
                assert at_work.wait(20) and served.server.intake.held_bytes == 16
                may_go.set()
                assert small.result().status_code == 200 and not served.server.intake.held_bytes

    def test_idle_workers_that_were_killed_are_put_back(self, rows_model, monkeypatch):
        monkeypatch.setattr("xblip.serve.TIDY_SECONDS", 0.2)
        with running(rows_model, decode_workers=1) as served:
            os.kill(served.server.pool.pids[0], signal.SIGKILL)
            until(lambda: served.server.pool.counters.replaced == 1)
            until(lambda: httpx.get(f"{served.url}/ready").status_code == 200)

    def test_a_killed_worker_loses_only_the_file_it_held(self, rows_model):
        with running(rows_model, decode_workers=2, decode_seconds=20) as served, ThreadPoolExecutor(8) as threads:
            slow = asking(rows(b"sleep 2 1 2 3 4"), QUESTION)
            held = threads.submit(post, served, slow)
            others = []
            time.sleep(0.5)
            for number in range(20):
                part = rows(f"1 2 3 {number}".encode())
                others.append(threads.submit(post, served, asking(part, QUESTION)))
            busy = max(served.server.pool.pids, key=lambda pid: held.running() and _is_asleep(pid))
            os.kill(busy, signal.SIGKILL)
            statuses = [future.result().status_code for future in others]
            assert statuses.count(200) >= 19 and set(statuses) <= {200, 400}
            assert statuses.count(400) + (held.result().status_code == 400) <= 1
            assert served.server.pool.counters.alive == 2


def _is_asleep(pid: int) -> float:
    with open(f"/proc/{pid}/wchan") as file:
        return "nanosleep" in file.read()


class TestSettings:
    def test_others_are_let_in_by_keys_alone(self):
        with pytest.raises(ConfigError, match="The host 0.0.0.0 can be reached by others, and there are no API keys"):
            ServeConfig(host="0.0.0.0").check()
        ServeConfig(host="0.0.0.0", api_keys=[KEY]).check()

    @pytest.mark.parametrize(
        "settings",
        [
            {"max_held_bytes": 5, "max_body_bytes": 6},
            {"port": 70_000},
            {"port": -1},
            {"api_keys": [""]},
            {"api_keys": ["a b"]},
            {"max_requests": 0},
            {"request_seconds": 0},
            {"request_seconds": float("nan")},
            {"drain_seconds": -1},
            {"drain_seconds": float("inf")},
            {"fetch_seconds": 1e12},
            {"engine": EngineConfig(max_rows=0)},
            {"engine": EngineConfig(max_waiting=0)},
            {"engine": EngineConfig(wait_ms=-1)},
        ],
    )
    def test_settings_that_cannot_be(self, settings):
        with pytest.raises(ConfigError):
            ServeConfig(**settings).check()

    def test_limits_are_the_lower_ones(self, rows_model):
        assert limited(rows_model, {})["rows"].config.max_numbers == 100
        made = limited(rows_model, {"max_numbers": 50, "lines.max_numbers": 20})
        assert (made["rows"].config.max_numbers, made["lines"].config.max_numbers) == (50, 20)
        assert rows_model.branches["rows"].modality.config.max_numbers == 100, "the model's own stays"
        with pytest.raises(ConfigError, match='Unknown limit "max_number"'):
            limited(rows_model, {"max_number": 3})
        with pytest.raises(ConfigError, match="must be a number above 0"):
            limited(rows_model, {"max_numbers": 0})

    def test_a_server_s_own_limits_are_lowered_to_the_modalities(self, rows_model, monkeypatch):
        monkeypatch.setitem(LIMITS, "max_numbers", 1000)
        assert limited(rows_model, {})["rows"].config.max_numbers == 100
        assert limited(rows_model, {"max_points": 5})["rows"].config.max_numbers == 100, "of no modality here"

    @pytest.mark.parametrize("name", ["rows.max_numbers", "max_numbers"])
    def test_a_limit_above_the_model_s_own_is_refused(self, rows_model, name):
        message = (
            f"The limit {name}=1000 is above the model's own, 100: lower it, or raise max_numbers in the config of"
        )
        with pytest.raises(ConfigError, match=message):
            limited(rows_model, {name: 1000.0})

    def test_a_modality_may_have_no_limit_of_its_own(self, rows_model, monkeypatch):
        monkeypatch.setattr(rows_model.branches["rows"].modality.config, "max_numbers", None)
        assert limited(rows_model, {})["rows"].config.max_numbers is None
        assert limited(rows_model, {"rows.max_numbers": 5})["rows"].config.max_numbers == 5
        monkeypatch.setitem(LIMITS, "max_numbers", 1000)
        assert limited(rows_model, {})["rows"].config.max_numbers == 1000
        assert limited(rows_model, {})["lines"].config.max_numbers == 100

    def test_a_limit_that_leaves_nothing_is_refused(self, rows_model):
        with pytest.raises(ConfigError, match="max_numbers=0.5 is below 1, and rows counts in whole numbers"):
            limited(rows_model, {"max_numbers": 0.5})

    def test_a_limit_for_all_may_be_above_that_of_some(self, rows_model, monkeypatch):
        monkeypatch.setattr(rows_model.branches["rows"].modality.config, "max_numbers", 500)
        made = limited(rows_model, {"max_numbers": 300})
        assert (made["rows"].config.max_numbers, made["lines"].config.max_numbers) == (300, 100)
        with pytest.raises(ConfigError, match="is above the model's own, 500"):
            limited(rows_model, {"max_numbers": 501})

    def test_a_limit_refuses(self, rows_model):
        rows_model.caches.clear()
        with running(rows_model, limits={"max_numbers": 4}, decode_workers=1) as served:
            message = post(served, asking(ROWS, QUESTION)).json()["error"]["message"]
            assert "more than max_numbers = 4" in message
