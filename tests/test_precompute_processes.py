"""`xblip precompute` in several processes, killed at any moment, and on Ray: always the same store."""

import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import PartialState
from kit import NUMBERS, registered
from stores import manifests_of

from xblip import decoding
from xblip.branch import BranchConfig
from xblip.encoding import Job
from xblip.precompute import precompute
from xblip.store import FeatureStore
from xblip.testing import ToyModality

NUM_FILES = 60
SECONDS = 0.01
"""What reading a file takes at least, so that there is time to be killed in."""
READ = "read"
"""A file beside the others, with a byte for each that was read."""


class SlowNumbers(ToyModality):
    """Rows of four numbers from text files, read slowly."""

    name = "slow_numbers"

    def load(self, source):
        time.sleep(SECONDS)
        with (Path(source).parent / READ).open("ab") as read:
            read.write(b".")
        with decoding(str(source), "rows of four numbers"):
            return super().load([float(word) for word in Path(source).read_text().split()])


def write_files(folder: Path, modality: str) -> Path:
    """Files of one to three rows, and a manifest that names them."""
    generator = torch.Generator().manual_seed(0)
    with (folder / "train.jsonl").open("w") as manifest:
        for number in range(NUM_FILES):
            values = torch.randn(4 * (1 + number % 3), generator=generator)
            (folder / f"{number}.txt").write_text(" ".join(map(str, values.tolist())))
            row = {modality: f"{number}.txt", "instruction": "what is this ?", "answer": "one"}
            manifest.write(json.dumps(row) + "\n")
    return folder


@pytest.fixture
def data(tmp_path):
    with registered(SlowNumbers):
        yield write_files(tmp_path, "slow_numbers")


def work(data: Path, to: str, rank: int, ranks: int, port: int) -> None:
    """One process of a run."""
    PartialState._reset_state()
    if ranks > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    job = Job(BranchConfig("slow_numbers"), str(data / to), dtype="float32", shard_bytes=2000, use_cpu=True)
    precompute(job, manifests_of(job.branch, [str(data / "train.jsonl")]))
    PartialState().destroy_process_group()


def start(data: Path, to: str, ranks: int) -> list[multiprocessing.Process]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=work, args=(data, to, rank, ranks, port)) for rank in range(ranks)]
    for process in processes:
        process.start()
    return processes


def finish(processes: list[multiprocessing.Process]) -> None:
    try:
        for process in processes:
            process.join(60)
            assert process.exitcode == 0
    finally:
        kill(processes)


def kill(processes: list[multiprocessing.Process]) -> None:
    for process in processes:
        process.kill()
        process.join()


def digest(data: Path, to: str) -> str:
    stored = FeatureStore.open(data / to)
    assert len(stored) == NUM_FILES and not stored.torn and not any(stored.damaged())
    assert not list((data / to).glob("*.partial"))
    return stored.content_digest()


@pytest.mark.slow
def test_two_processes_divide_the_work_and_make_the_same_store(data):
    finish(start(data, "one", 1))
    finish(start(data, "two", 2))
    shards = [path.name for path in (data / "two").glob("features-*")]
    assert {name.split("-")[1] for name in shards} == {"00000", "00001"}
    assert digest(data, "one") == digest(data, "two")


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_at_ten_random_moments(data, ranks):
    finish(start(data, "undisturbed", ranks))
    expected = digest(data, "undisturbed")
    chance = random.Random(ranks)
    found = []
    for number in range(10):
        (data / READ).write_bytes(b"")
        processes = start(data, f"store-{number}", ranks)
        moment = chance.uniform(0, NUM_FILES)
        while (data / READ).stat().st_size < moment and any(process.is_alive() for process in processes):
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.1))
        victim = chance.choice(processes)
        os.kill(victim.pid, signal.SIGKILL)
        time.sleep(chance.uniform(0, 0.1))
        kill(processes)  # as a launcher does
        folder = data / f"store-{number}"
        found.append(len(FeatureStore.open(folder)) if (folder / "store.yaml").exists() else 0)
        finish(start(data, folder.name, chance.choice([1, 2])))
        assert digest(data, folder.name) == expected
    assert len(set(found)) > 3, f"the moments were all alike: {found}"


@pytest.fixture
def installed(tmp_path, site, monkeypatch, llm_folder):
    """A config whose modality is installed, so that new processes find it; the config's path."""
    site.install("thermal", NUMBERS.format(name="thermal"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site.folder), *(path for path in sys.path if path)]))
    monkeypatch.setenv("RAY_worker_niceness", "0")  # 15 by default, which on a busy machine is next to nothing
    write_files(tmp_path, "thermal")
    config = {
        "llm": {"source": str(llm_folder)},
        "branch": {"modality": "thermal"},
        "data": {"train": str(tmp_path / "train.jsonl")},
        "training": {"output_dir": str(tmp_path / "run"), "use_cpu": True},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return tmp_path / "config.yaml"


def command(*arguments) -> str:
    run = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_command_under_torchrun_and_on_ray(installed, tmp_path):
    call = ["-m", "xblip.cli", "precompute", installed, "--dtype", "float32", "--to"]
    command(*call, tmp_path / "one")
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", 2]
    launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    assert command(*launcher, *call, tmp_path / "two").count("wrote") == 1
    assert digest(tmp_path, "one") == digest(tmp_path, "two")
    pytest.importorskip("ray", reason="Ray is not installed")
    shown = command(*call, tmp_path / "ray", "--engine", "ray")
    assert f"{NUM_FILES} items" in shown and digest(tmp_path, "ray") == digest(tmp_path, "one")
    assert "is right" in command(*call, tmp_path / "ray", "--verify")
