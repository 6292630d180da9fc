"""Workers that read hostile files: each is refused by a sentence, and costs nobody else anything."""

import os
import platform
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from kit import Site
from waiting import until

from xblip import plugins
from xblip.decode_pool import DecodePool
from xblip.decode_worker import _work
from xblip.errors import BusyError, ConfigError, InputError, MediaError, PluginError
from xblip.testing import ToyModality

MIB = 2**20


@pytest.fixture(scope="module")
def obedient(tmp_path_factory):
    """The class of a modality that is installed, so that workers find it, and does what files say."""
    site = Site(tmp_path_factory.mktemp("site"))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(site.folder)
        patch.setenv("XBLIP_PLUGINS", "obedient")
        site.install("obedient", Path(__file__).with_name("obedient.py").read_text())
        yield plugins.get("modality", "obedient")
    site.close()


@pytest.fixture(scope="module")
def pool(obedient):
    modality = obedient(obedient.Config(factor=2.0))
    with DecodePool({"toy": modality}, workers=2, seconds=20, memory_bytes=256 * MIB, result_bytes=8 * MIB) as pool:
        yield pool


@pytest.fixture
def order(tmp_path):
    """Writes a file that says what to do; returns its path."""

    def written(*words: object) -> Path:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.txt"
        path.write_text(" ".join(map(str, words)))
        return path

    return written


def value(tensors: dict[str, torch.Tensor]) -> float:
    return tensors["values"][0, 0].item()


def is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_it_gives_what_the_modality_gives_with_its_settings(pool, order):
    before = pool.counters
    assert pool.load("toy", order("say", 21))["values"].tolist() == [[42.0, 42.0]]
    assert pool.counters.loads == before.loads + 1
    assert pool.counters.alive == len(pool.pids) == 2
    assert pool.counters.seconds > before.seconds
    assert os.getpid() not in pool.pids


def test_every_dtype_and_layout_crosses(pool, obedient, order):
    given = pool.load("toy", order("kinds"))
    for name, tensor in obedient().kinds().items():
        assert given[name].dtype == tensor.dtype and torch.equal(given[name], tensor)
    given["long"] += 1  # they are the caller's own


MEMORY = (
    "Cannot read the toy: reading it takes more than the 256 MiB of memory that there are for one, so it is too large or "
    "damaged. Give a smaller one."
)
CLOSED = "No more media are read here, as this is being shut down: ask again in a while."
DEATH = "Cannot read the toy: the process that read it died ({}), so it is probably damaged. Give another file."
FAILURE = "Cannot read the toy: reading it failed, and the log says why. Give another file."


@pytest.mark.parametrize(
    ("words", "message", "counter", "is_replaced"),
    [
        ("refuse", "Cannot read it: it is no order.", "refused", False),
        ("tensor 9", None, "loads", False),
        ("zeros 9", "Cannot read the toy: its tensors take more than the 8 MiB that there are for one. Give a smaller one.",
         "refused", False),
        ("fail", FAILURE, "failed", False),
        ("nothing", FAILURE, "failed", False),
        ("allocate 300", MEMORY, "out_of_memory", True),
        ("tensor 300", MEMORY, "out_of_memory", True),
        ("abort what(): std::bad_alloc", MEMORY, "out_of_memory", True),
        ("touch_nothing", DEATH.format("Segmentation fault"), "died", True),
        ("abort", DEATH.format("Aborted"), "died", True),
        ("kill", DEATH.format("Killed"), "died", True),
        ("exit", DEATH.format("exit status 5"), "died", True),
        ("lie {} 99999999", DEATH.format("Killed"), "died", True),
        ("lie [] 0", DEATH.format("Killed"), "died", True),
        ("lie { 0", DEATH.format("Killed"), "died", True),
        ('lie {"outcome":"read"} 0', FAILURE, "failed", True),
        ('lie {"outcome":"refused","message":"\\ud800"} 0', "?", "refused", True),
    ],
)  # fmt: skip
def test_whatever_a_file_does_is_one_sentence(pool, order, words, message, counter, is_replaced):
    before = pool.counters
    if message is None:
        pool.load("toy", order(words))
    else:
        with pytest.raises(MediaError) as caught:
            pool.load("toy", order(words))
        assert str(caught.value) == message
    assert [value(pool.load("toy", order("say", number))) for number in range(3)] == [0, 2, 4]
    after = pool.counters
    assert getattr(after, counter) == getattr(before, counter) + 1 + 3 * (counter == "loads")
    assert after.replaced == before.replaced + is_replaced
    assert after.alive == 2 and all(map(is_there, pool.pids))


@pytest.mark.slow
def test_a_file_that_takes_too_long_ends_with_all_that_was_started_for_it(pool, order, tmp_path):
    before, mark = pool.counters, tmp_path / "mark"
    with pytest.raises(MediaError) as caught:
        pool.load("toy", order("leave", mark), seconds=1.0)
    assert str(caught.value) == (
        "Cannot read the toy: it was not read within the 1 s that there are for one. Give a smaller or shorter one."
    )
    program, file = mark.read_text().split()
    until(lambda: not is_there(int(program)))
    assert not Path(file).exists() and "xblip-decode-" in file
    assert pool.counters.timed_out == before.timed_out + 1


def test_a_worker_that_keeps_much_memory_is_replaced_before_the_next_file(pool, order):
    before = pool.counters
    for _ in range(4):
        assert value(pool.load("toy", order("keep", 100))) == 200
    assert pool.counters.replaced == before.replaced + 4


def test_a_process_that_the_system_kills_for_memory(pool, order, monkeypatch):
    kills = pool._kills + 1
    monkeypatch.setattr("xblip.decode_pool._kills_for_memory", lambda: kills)
    with pytest.raises(MediaError, match="takes more than the 256 MiB of memory"):
        pool.load("toy", order("kill"))


def test_the_log_has_what_the_caller_is_not_told(pool, order, caplog):
    for words, expected in {
        "fail": ["ValueError: a secret", "\n    ERROR forged"],
        "touch_nothing": ["(Segmentation fault)", "Fatal Python error: Segmentation fault", "in touch_nothing"],
        "abort some words": ["(Aborted)", "some words"],
    }.items():
        path = order(words)
        with pytest.raises(MediaError):
            pool.load("toy", path)
        for text in [str(path), *expected]:
            assert text in caplog.records[-1].getMessage()
    assert {record.name for record in caplog.records} == {"xblip"}


def test_what_libraries_print_goes_nowhere(pool, order, capfd, caplog):
    assert value(pool.load("toy", order("shout", 10))) == 20
    assert capfd.readouterr() == ("", "") and not caplog.records


def test_many_threads_each_get_their_own(pool, order):
    files = [order("say", number) for number in range(40)]
    with ThreadPoolExecutor(8) as threads:
        assert [value(tensors) for tensors in threads.map(lambda file: pool.load("toy", file), files)] == [
            2 * number for number in range(40)
        ]


def test_kill_9_under_load_loses_the_one_file_that_was_being_read(pool, order, tmp_path):
    before, mark = pool.counters, tmp_path / "mark"
    files = [order("say", number) for number in range(40)]
    files[3] = order("begin", mark, 60)
    with ThreadPoolExecutor(8) as threads:
        turns = [threads.submit(pool.load, "toy", file) for file in files]
        until(mark.exists)
        os.kill(int(mark.read_text()), signal.SIGKILL)
        errors = {number: turn.exception() for number, turn in enumerate(turns) if turn.exception()}
    assert list(errors) == [3] and str(errors[3]) == DEATH.format("Killed")
    assert [value(turn.result()) for number, turn in enumerate(turns) if number != 3] == [
        2 * number for number in range(40) if number != 3
    ]
    assert pool.counters.replaced == before.replaced + 1 and pool.counters.alive == 2


def test_workers_killed_while_idle_cost_no_file(pool, order):
    before = pool.counters
    for pid in pool.pids:
        os.kill(pid, signal.SIGKILL)
    until(lambda: pool.counters.alive == 0)
    assert [value(pool.load("toy", order("say", number))) for number in range(2)] == [0, 2]
    assert pool.counters.replaced == before.replaced + 2 and pool.counters.died == before.died


def test_workers_killed_while_idle_are_put_back_when_somebody_looks(pool):
    before = pool.counters
    os.kill(pool.pids[0], signal.SIGKILL)
    until(lambda: pool.counters.alive == 1)
    pool.revive()
    assert pool.counters.alive == 2 and pool.counters.replaced == before.replaced + 1
    pool.revive()
    assert pool.counters.replaced == before.replaced + 1


def test_workers_that_cannot_be_put_back_are_tried_again(pool, monkeypatch):
    for pid in pool.pids:
        os.kill(pid, signal.SIGKILL)
    until(lambda: pool.counters.alive == 0)
    with monkeypatch.context() as broken:
        broken.setattr(type(pool._server), "fork", lambda _: (_ for _ in ()).throw(OSError("no room")))
        with pytest.raises(OSError, match="no room"):
            pool.revive()
    pool.revive()
    assert pool.counters.alive == 2 and len(pool._free) == 2


def test_a_fork_server_that_could_not_be_started_is_tried_again(pool, monkeypatch):
    pool._server._process.kill()
    until(lambda: pool.counters.alive == 0)
    with monkeypatch.context() as broken:
        broken.setattr(subprocess, "Popen", lambda *_, **__: (_ for _ in ()).throw(OSError("no memory")))
        with pytest.raises(OSError, match="no memory"):
            pool.revive()
        open_files = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            with pytest.raises(OSError, match="no memory"):
                pool.revive()
        assert len(os.listdir("/proc/self/fd")) <= open_files
    pool.revive()
    assert pool.counters.alive == 2 and len(pool._free) == 2


def test_signals_that_mean_the_server_end_no_worker(pool, order):
    """A service manager sends them to all processes at once, while the server finishes what it has."""
    before = pool.pids
    for pid in (pool._server._process.pid, *before):
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGINT)
    assert [value(pool.load("toy", order("say", number))) for number in range(2)] == [0, 2]
    assert pool.pids == before


def test_those_who_wait_are_served_in_turn(pool, order, tmp_path):
    marks, served = [tmp_path / "first", tmp_path / "second"], tmp_path / "served"
    with ThreadPoolExecutor(8) as threads:
        for mark in marks:  # the first is released; the second holds its worker until the end
            threads.submit(pool.load, "toy", order("wait", mark, served, 9))
        until(lambda: not pool._free)
        for number in range(5):
            threads.submit(pool.load, "toy", order("wait", tmp_path, served, number))
            until(lambda number=number: len(pool._waiting) == number + 1)
        marks[0].touch()
        until(lambda: served.exists() and served.read_text() == "901234")
        marks[1].touch()


@pytest.mark.slow
def test_a_fork_server_that_is_killed_is_started_again(pool, order):
    os.kill(pool._server._process.pid, signal.SIGKILL)
    until(lambda: pool.counters.alive == 0)
    assert [value(pool.load("toy", order("say", number))) for number in range(2)] == [0, 2]


@pytest.mark.slow
def test_a_worker_whose_fork_server_died_before_it_began_ends():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        worker = os.fork()
        if not worker:
            _work(os.getpid(), theirs.fileno(), 2, "", {}, MIB, MIB)
        until(lambda: os.waitpid(worker, os.WNOHANG) == (worker, 1 << 8))


@pytest.mark.slow
def test_nothing_is_left_of_a_server_that_is_killed(obedient, order, tmp_path):
    """The server is a fork of this process, which spares it the imports."""
    mark, left, told = tmp_path / "mark", tmp_path / "left", tmp_path / "told"
    server = os.fork()
    if not server:
        try:
            pool = DecodePool({"toy": obedient()}, seconds=60)
            with ThreadPoolExecutor(2) as threads:
                threads.submit(pool.load, "toy", order("begin", mark, 60))
                threads.submit(pool.load, "toy", order("leave", left))
                until(lambda: mark.exists() and left.exists() and left.read_text())
                told.write_text(" ".join(map(str, [pool._server._process.pid, *pool.pids])))
                time.sleep(60)
        finally:
            os._exit(1)
    until(lambda: told.exists() and told.read_text(), 60)
    program, file = left.read_text().split()
    pids = [int(program), *map(int, told.read_text().split())]
    assert all(map(is_there, pids)) and Path(file).exists()
    os.kill(server, signal.SIGKILL)
    os.waitpid(server, 0)
    until(lambda: not any(map(is_there, pids)) and not Path(file).parents[1].exists())


@pytest.mark.slow
def test_closing_ends_everything_and_refuses_those_who_wait(obedient, order, tmp_path):
    mark = tmp_path / "mark"
    with DecodePool({"toy": obedient()}, workers=1) as pool, ThreadPoolExecutor(2) as threads:
        pids = [pool._server._process.pid, *pool.pids]
        reading = threads.submit(pool.load, "toy", order("begin", mark, 60))
        until(mark.exists)
        waiting = threads.submit(pool.load, "toy", order("say", 1))
        until(lambda: pool._waiting)
        pool.close()
        for turn in (reading, waiting):
            assert str(turn.exception()) == CLOSED
    with pytest.raises(BusyError, match="being shut down: ask again"):
        pool.load("toy", order("say", 1))
    assert not any(map(is_there, pids)) and pool.counters.alive == 0


@pytest.mark.slow
def test_a_modality_that_only_this_process_knows_is_refused(toy, obedient):
    with pytest.raises(PluginError, match='The workers that decode media do not start: No modality is called "toy"'):
        DecodePool({"toy": ToyModality()})


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library gives memory as it is")
def test_what_a_library_leaves_unfilled_shows_nothing_of_other_files(pool, order):
    for number in (1, 2):
        assert pool.load("toy", order("show_what_is_left", number))["values"].unique().tolist() == [0.0]


def test_what_cannot_be_is_refused(pool, obedient):
    with pytest.raises(InputError) as caught:
        pool.load("tooy", "x.txt")
    assert str(caught.value) == 'No modality of this pool is called "tooy". Did you mean "toy"? Known: toy.'
    for settings, message in {
        "workers": "workers must be at least 1, not 0.",
        "seconds": "seconds must be at least 0.1, not 0.",
        "memory_bytes": "memory_bytes must be at least 1, not 0.",
        "result_bytes": "result_bytes must be at least 1, not 0.",
    }.items():
        with pytest.raises(ConfigError) as caught:
            DecodePool({"toy": obedient()}, **{settings: 0})
        assert str(caught.value) == message
