"""Runs trainings in forked processes that may be killed, so that a test kills twenty of them and imports xblip once.

Each line of standard input is a job, {"config": PATH, "resume": BOOL, "processes": N, "kill_after_s": SECONDS or null};
each line of standard output tells how its processes ended: {"status": [...], "seconds": SECONDS, "error": TEXT}. Time
counts from the moment that the loop of the first process begins.
"""

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import torch
from kit import Beads
from transformers import TrainerCallback

from xblip import plugins, trainer
from xblip.errors import XBlipError
from xblip.testing import ToyModality
from xblip.train import load_train_config, train


class Began(TrainerCallback):
    """Leaves a mark when the loop begins."""

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        Path(os.environ["XBLIP_TEST_BEGAN"]).touch()


def run(job: dict, rank: int, port: int, log: Path) -> None:
    """What a forked process does; it does not return."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if job["processes"] > 1:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(job["processes"]),
            MASTER_ADDR="localhost", MASTER_PORT=str(port),
        )  # fmt: skip
    status = 0
    try:
        train(load_train_config(job["config"]), resume=job["resume"])
    except XBlipError as error:
        print(f"error: {error}")
        status = 2
    except BaseException as error:
        print(f"crash: {error!r}")
        status = 1
    sys.stdout.flush()
    os._exit(status)


def serve(job: dict) -> dict:
    """Runs one job to its end, or to the moment when it is to be killed."""
    began = Path(job["config"]).with_suffix(".began")
    log = Path(job["config"]).with_suffix(".log")
    for file in (began, log):
        file.unlink(missing_ok=True)
    os.environ["XBLIP_TEST_BEGAN"] = str(began)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(job["processes"]):
        child = os.fork()
        if not child:
            run(job, rank, port, log)
        children.append(child)
    status: dict[int, int] = {}
    started = None
    deadline = time.monotonic() + 120
    while len(status) < len(children):
        for child in set(children) - set(status):
            ended, code = os.waitpid(child, os.WNOHANG)
            if ended:
                status[child] = os.waitstatus_to_exitcode(code)
        started = time.monotonic() if started is None and began.exists() else started
        due = job["kill_after_s"] is not None and started and time.monotonic() - started > job["kill_after_s"]
        failed = any(status.values())  # a launcher ends the others when one has failed
        if due or failed or time.monotonic() > deadline:
            for child in set(children) - set(status):
                os.kill(child, signal.SIGKILL)
        time.sleep(0.002)
    seconds = time.monotonic() - started if started else 0.0
    text = log.read_text() if log.exists() else ""
    errors = [line for line in text.splitlines() if line.startswith(("error: ", "crash: "))]
    return {"status": [status[child] for child in children], "seconds": seconds, "errors": errors}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for modality in (ToyModality, Beads):
        plugins.register(modality)
    trainer.CALLBACKS = (*trainer.CALLBACKS, Began)
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line))), flush=True)
