"""open3d's own process: ready after the first file, and no more than one file is ever lost with it."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from xblip_point_process import CAN_FORK, Ended, Open3DProcess

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CAN_FORK, reason="needs Linux, where processes fork"),
]
OBJ = "v 0 0 0\nv 1 0 0\nv 0 1 {z}\nf 1 2 3\n"
CRASHES = "hello " * 100
"""open3d 0.20 ends by a signal on it."""


@pytest.fixture
def reader():
    found = Open3DProcess()
    yield found
    found.close()


def saved(folder, text, name="a.obj"):
    path = folder / name
    path.write_text(text)
    return path


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_it_reads_many_files_in_one_process(reader, tmp_path):
    pids = set()
    for z in range(3):
        path, result = saved(tmp_path, OBJ.format(z=z)), tmp_path / "result.npz"
        assert reader.read(path, result, timeout_seconds=60) == Ended(0, "")
        assert np.load(result)["points"][2, 2] == z
        pids.add(reader._process.pid)
    assert len(pids) == 1


def test_a_file_that_crashes_it_is_lost_alone(reader, tmp_path):
    good = saved(tmp_path, OBJ.format(z=1))
    assert reader.read(good, tmp_path / "a.npz", timeout_seconds=60).status == 0
    process = reader._process
    assert reader.read(saved(tmp_path, CRASHES, "b.obj"), tmp_path / "b.npz", timeout_seconds=60).status != 0
    assert reader.read(saved(tmp_path, "v 0 0\n", "c.stl"), tmp_path / "c.npz", timeout_seconds=60).status == 1
    assert reader.read(good, tmp_path / "d.npz", timeout_seconds=60).status == 0 and reader._process is process


def test_a_file_that_takes_too_long_ends_with_the_process_and_the_next_has_another(reader, tmp_path):
    good = saved(tmp_path, OBJ.format(z=1))
    assert reader.read(good, tmp_path / "a.npz", timeout_seconds=60).status == 0
    pid = reader._process.pid
    with pytest.raises(TimeoutError):
        reader.read(good, tmp_path / "b.npz", timeout_seconds=0)
    assert not is_alive(pid)
    assert reader.read(good, tmp_path / "c.npz", timeout_seconds=60).status == 0


def test_one_that_was_killed_is_replaced(reader, tmp_path):
    good = saved(tmp_path, OBJ.format(z=1))
    for _ in range(2):
        assert reader.read(good, tmp_path / "a.npz", timeout_seconds=60).status == 0
        os.kill(reader._process.pid, 9)


def test_threads_take_turns(reader, tmp_path):
    files = [saved(tmp_path, OBJ.format(z=z), f"{z}.obj") for z in range(8)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda path: reader.read(path, path.with_suffix(".npz"), timeout_seconds=60), files))
    assert [np.load(path.with_suffix(".npz"))["points"][2, 2] for path in files] == [*range(8)]


def test_a_fork_has_a_process_of_its_own(reader, tmp_path):
    good = saved(tmp_path, OBJ.format(z=1))
    reader.read(good, tmp_path / "a.npz", timeout_seconds=60)
    parents = reader._process.pid
    child = os.fork()
    if not child:
        status = reader.read(good, tmp_path / "b.npz", timeout_seconds=60).status
        os._exit(0 if status == 0 and reader._process.pid != parents else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert reader.read(good, tmp_path / "c.npz", timeout_seconds=60).status == 0 and reader._process.pid == parents


def test_nothing_is_left_of_it_when_its_owner_is_killed(tmp_path):
    program = (
        "import sys, pathlib; from xblip_point_process import OPEN3D; "
        "OPEN3D.read(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), timeout_seconds=60); "
        "print(OPEN3D._process.pid, flush=True); input()"
    )
    command = [sys.executable, "-c", program, str(saved(tmp_path, OBJ.format(z=1))), str(tmp_path / "a.npz")]
    folder = Path(__file__).parent
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder) as owner:
        pid = int(owner.stdout.readline())
        assert is_alive(pid)
        owner.kill()
    deadline = time.monotonic() + 20
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(pid)


def test_a_machine_without_open3d_says_so(tmp_path, monkeypatch):
    (tmp_path / "open3d.py").write_text("raise ImportError('none here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    reader = Open3DProcess()
    ended = reader.read(saved(tmp_path, OBJ.format(z=1)), tmp_path / "a.npz", timeout_seconds=60)
    assert ended == Ended(3, "ImportError: none here")
    reader.close()
