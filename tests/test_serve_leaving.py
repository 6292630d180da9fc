"""Who leaves before an answer is whole, and what a server does that is told to stop."""

import asyncio
import json
import socket
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from fetching import Site
from served import BAD, QUESTION, asking, post, rows, running
from waiting import until

from xblip.decoder import Decoder
from xblip.serve import COMPLETIONS
from xblip.serve_talk import Exchange, Given, answers

pytestmark = pytest.mark.slow

SCOPE = {"type": "http", "method": "POST", "path": COMPLETIONS, "query_string": b"", "headers": []}


def slow_steps(monkeypatch):
    """Lets each token take its time, so that an answer does not end by itself."""
    real = Decoder.step

    def step(decoder):
        time.sleep(0.2)
        return real(decoder)

    monkeypatch.setattr(Decoder, "step", step)


def test_a_client_that_leaves_frees_its_row(rows_model, monkeypatch):
    slow_steps(monkeypatch)
    with running(rows_model, decode_workers=1) as served:
        counts, body = served.server.engine.counts, {**BAD, "max_tokens": 90, "min_tokens": 90}
        with httpx.stream("POST", served.url + COMPLETIONS, json={**body, "stream": True}) as response:
            next(response.iter_lines())
        until(lambda: counts["cancelled"] == 1)
        with pytest.raises(httpx.TimeoutException):
            httpx.post(served.url + COMPLETIONS, json={**body, "n": 16}, timeout=1)
        until(lambda: counts["cancelled"] == 17 and not served.server.engine.state["rows"])
        assert counts["finished"] == 0


def test_files_of_those_who_left_while_they_waited_for_a_worker_are_not_read(rows_model):
    with running(rows_model, decode_workers=1, decode_seconds=20) as served, ThreadPoolExecutor(8) as threads:

        def leave(number):
            with pytest.raises(httpx.TimeoutException):
                slow = asking(rows(f"sleep 1 5 5 {number}".encode()), QUESTION)
                httpx.post(served.url + COMPLETIONS, json=slow, timeout=0.5)

        list(threads.map(leave, range(8)))
        until(lambda: not served.server.intake.held_bytes)
        assert served.server.pool.counters.loads <= 2
        assert post(served, asking(rows(b"1 2 3 7"), QUESTION)).status_code == 200


@pytest.fixture
def silent():
    """A host that takes requests, and answers none."""
    site = Site()
    site.answers["/x"] = lambda connection: connection.recv(1)
    yield site
    site.close()


class TestAHostThatDoesNotAnswer:
    def test_it_is_not_waited_for_when_the_client_has_left(self, rows_model, silent, monkeypatch):
        with running(rows_model, decode_workers=1) as served:
            monkeypatch.setattr(served.server.door, "fetcher", silent.fetcher(seconds=60))
            with pytest.raises(httpx.TimeoutException):
                httpx.post(served.url + COMPLETIONS, json=asking(rows(silent.url()), QUESTION), timeout=2)
            until(lambda: not served.server.intake.held_bytes, seconds=5)
            assert silent.asked

    def test_it_is_not_waited_for_when_the_server_ends(self, rows_model, silent, monkeypatch):
        with running(rows_model, decode_workers=1, drain_seconds=0.5) as served, ThreadPoolExecutor(1) as threads:
            monkeypatch.setattr(served.server.door, "fetcher", silent.fetcher(seconds=60))
            asked = threads.submit(post, served, asking(rows(silent.url()), QUESTION))
            until(lambda: silent.asked)
            served.server.leave()
            assert asked.result(10).status_code == 503
            readers = [thread for thread in threading.enumerate() if thread.name.startswith("xblip server reads")]
        until(lambda: readers and not any(thread.is_alive() for thread in readers), seconds=5)


class TestThePage:
    """It asks by the way that requests over HTTP go, and gives up as they do."""

    async def asked(self, server, tmp_path, *, leaves=False):
        files = [tmp_path / f"{number}.txt" for number in range(8)]
        for number, file in enumerate(files):
            file.write_text(f"sleep 0.5 6 6 {number}")
        exchange = Exchange(QUESTION, tuple(Given("rows", file) for file in files))
        told = answers(server, exchange, [], caller="", path="/page")
        if leaves:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.7):
                    await anext(told)
        else:
            assert [None async for _ in told] == [None]
        return exchange

    def test_has_the_time_that_a_request_has(self, rows_model, tmp_path):
        rows_model.caches.clear()
        with running(rows_model, decode_workers=1, request_seconds=1) as served:
            exchange = asyncio.run(self.asked(served.server, tmp_path))
            assert "was not whole after 1 s" in exchange.error
            until(lambda: not served.server.intake.held_bytes and served.server.is_idle)
            assert served.server.pool.counters.loads <= 3

    def test_reads_no_more_for_a_visitor_who_stopped(self, rows_model, tmp_path):
        rows_model.caches.clear()
        with running(rows_model, decode_workers=1) as served:
            asyncio.run(self.asked(served.server, tmp_path, leaves=True))
            until(lambda: not served.server.intake.held_bytes and served.server.is_idle)
            assert served.server.pool.counters.loads <= 3


def test_a_request_that_is_cancelled_frees_its_rows(rows_model):
    """Ray cancels the task of a client that leaves."""
    body = json.dumps({**BAD, "max_tokens": 90, "min_tokens": 90, "n": 16, "temperature": 1}).encode()

    async def cancelled(server):
        told = [{"type": "http.request", "body": body}]

        async def receive():
            return told.pop() if told else await asyncio.Event().wait()

        task = asyncio.create_task(server.app({**SCOPE}, receive, None))
        while not server.engine.state["rows"]:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with running(rows_model, decode_workers=1) as served:
        asyncio.run(asyncio.wait_for(cancelled(served.server), 30))
        engine = served.server.engine
        until(lambda: engine.counts["cancelled"] == 16 and not engine.state["rows"])
        assert 'status="499"' in httpx.get(f"{served.url}/metrics").text


def test_a_client_that_leaves_before_the_first_piece_frees_its_row(rows_model):
    body = json.dumps({**BAD, "max_tokens": 90, "min_tokens": 90, "stream": True}).encode()

    async def left(server):
        told, begun = [{"type": "http.request", "body": body}], asyncio.Event()

        async def receive():
            return told.pop() if told or not await begun.wait() else {"type": "http.disconnect"}

        async def send(_):
            begun.set()
            await asyncio.Event().wait()

        await server.app({**SCOPE}, receive, send)

    with running(rows_model, decode_workers=1) as served:
        asyncio.run(asyncio.wait_for(left(served.server), 30))
        engine = served.server.engine
        until(lambda: engine.counts["cancelled"] == 1 and not engine.state["rows"])
        assert 'status="499"' in httpx.get(f"{served.url}/metrics").text


def test_who_leaves_while_files_are_read_is_waited_for_no_more(rows_model, caplog):
    with running(rows_model, decode_workers=1, decode_seconds=20) as served:
        slow = [rows(f"sleep 0.4 1 2 {number}".encode()) for number in range(8)]
        before = served.server.pool.counters.loads
        with pytest.raises(httpx.TimeoutException):
            httpx.post(served.url + COMPLETIONS, json=asking(*slow, QUESTION), timeout=0.6)
        until(lambda: 'status="499"' in httpx.get(f"{served.url}/metrics").text)
        assert served.server.pool.counters.loads - before <= 3 and served.server.is_idle
    assert not [record for record in caplog.records if record.exc_info]


def test_who_waits_for_a_reader_hears_in_time_and_gives_its_place_back(rows_model, monkeypatch):
    monkeypatch.setattr("xblip.serve_intake.READERS", 1)
    settings = {"decode_workers": 1, "decode_seconds": 20, "request_seconds": 1.5}
    with running(rows_model, **settings) as served, ThreadPoolExecutor(3) as threads:
        first = threads.submit(post, served, asking(rows(b"sleep 3 1 2 3"), QUESTION))
        until(lambda: served.server.pool._free == deque())
        with pytest.raises(httpx.TimeoutException):
            httpx.post(served.url + COMPLETIONS, json=asking(rows(b"1 2 3 5"), QUESTION), timeout=0.2)
        until(lambda: served.server.intake.count == 1)
        waiting = threads.submit(post, served, asking(rows(b"1 2 3 6"), QUESTION))
        assert first.result().status_code == waiting.result().status_code == 504
        assert served.server.pool._free == deque() and served.server.intake.held_bytes > 0, "it is still being read"
        until(lambda: served.server.intake.held_bytes == 0)


def test_who_is_sending_when_there_is_no_more_time_is_told_so(rows_model):
    with (
        running(rows_model, decode_workers=1, drain_seconds=0.2) as served,
        socket.create_connection(("127.0.0.1", httpx.URL(served.url).port), timeout=20) as own,
    ):
        own.sendall(f"POST {COMPLETIONS} HTTP/1.1\r\nHost: a\r\nContent-Length: 999\r\n\r\n{{".encode())
        until(lambda: served.server.intake.count)
        served.server.leave()
        until(lambda: served.server.intake.has_given_up)
        served.stop()
        assert b"503" in own.recv(1000)


def test_who_breaks_off_sending_is_no_failure(rows_model, caplog):
    with running(rows_model, decode_workers=1) as served:
        with socket.create_connection(("127.0.0.1", httpx.URL(served.url).port)) as own:
            own.sendall(f"POST {COMPLETIONS} HTTP/1.1\r\nHost: a\r\nContent-Length: 999\r\n\r\n{{".encode())
            until(lambda: served.server.intake.count)
        until(lambda: 'status="499"' in httpx.get(f"{served.url}/metrics").text)
        assert served.server.intake.held_bytes == 0
    assert not [record for record in caplog.records if record.exc_info]


def test_stopping_finishes_what_runs(rows_model):
    with running(rows_model, decode_workers=1) as served:
        found = []
        body = {**BAD, "max_tokens": 90, "min_tokens": 90, "n": 8, "temperature": 1}
        running_one = threading.Thread(target=lambda: found.append(post(served, body)))
        running_one.start()
        until(lambda: served.server.engine.state["rows"])
        served.stop()
        running_one.join(20)
    assert found[0].status_code == 200 and len(found[0].json()["choices"]) == 8


def test_what_is_not_finished_in_time_is_told_so(rows_model, monkeypatch):
    slow_steps(monkeypatch)
    body = {**BAD, "max_tokens": 90, "min_tokens": 90}
    slow = asking(rows(b"sleep 9 1 2 3"), QUESTION)
    settings = {"decode_workers": 1, "decode_seconds": 20, "drain_seconds": 0.5}
    with running(rows_model, **settings) as served, ThreadPoolExecutor(3) as threads:
        found = [threads.submit(post, served, one) for one in (body, {**body, "stream": True}, slow)]
        until(lambda: served.server.engine.state["rows"] == 2 and served.server.pool._free == deque())
        started = time.monotonic()
        served.server.leave()
        whole, streamed, reading = (future.result() for future in found)
        assert time.monotonic() - started < 5
        assert post(served, BAD).status_code == 503
    for response in (whole, reading):
        assert response.status_code == 503 and "shut down" in response.json()["error"]["message"]
    *_, last = filter(None, streamed.text.split("\n"))
    error = json.loads(last.removeprefix("data: "))["error"]
    assert "was shut down before this was answered" in error["message"] and error["type"] == "server_error"
