"""The processes of a `DecodePool`: a fork server, which has read nothing hostile, and the workers that it forks.

The fork server imports what the modalities need, builds them and tries each on its own example; a worker is a copy of it,
ready in a moment, however long the imports took. It has one thread, so that forking it is safe, which in a server is not.
Linux only.
"""

import contextlib
import ctypes
import faulthandler
import gc
import json
import os
import resource
import shutil
import signal
import socket
import struct
import tempfile
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from xblip.errors import MediaError

REPLY = struct.Struct("!IQ")
"""Before every reply: how long its facts are, which are JSON, and how long the tensors are, which are safetensors."""
ORDER_BYTES = 2**20
OUT_OF_MEMORY = 77
"""The exit status of a worker that got no more memory."""
PR_SET_PDEATHSIG = 1
M_PERTURB = -6
"""Of glibc's `mallopt`: 255 fills what is given with zeros, and what is given back with ones."""
LONGEST = 10_000
"""Characters of a message or traceback that are kept."""


def main(descriptor: int) -> None:
    """Runs the fork server.

    Args:
      descriptor: of a socket that keeps messages apart. First comes the order; the answer is {}, or the error. Then, as
        often as is wished, "fork FOLDER" with a worker's socket and where it may write errors, answered by its process id;
        and "end PID", answered by its wait status. It ends when the other side is closed, and its workers with it.
    """
    # A server that is told to end finishes what it has, and needs these processes for it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    control = socket.socket(fileno=descriptor)
    order = json.loads(control.recv(ORDER_BYTES))
    try:
        modalities = {name: _built(*parts) for name, parts in order["modalities"].items()}
    except Exception as error:
        control.send(json.dumps({"message": str(error), "traceback": traceback.format_exc()[-LONGEST:]}).encode())
        return
    gc.freeze()  # or collecting garbage would copy every page into every worker
    control.send(b"{}")
    alive: set[int] = set()
    server = os.getpid()
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, ORDER_BYTES, 2, socket.MSG_CMSG_CLOEXEC)
        command, _, rest = message.decode().partition(" ")
        if command == "fork":
            answer = os.fork()
            if answer == 0:
                control.close()
                _work(server, *descriptors, rest, modalities, order["memory_bytes"], order["result_bytes"])
            os.setpgid(answer, answer)  # of which the programs that it starts will be
            alive.add(answer)
            for descriptor in descriptors:
                os.close(descriptor)
        elif command == "end":
            answer = _end(int(rest)) if int(rest) in alive else int(signal.SIGKILL)
            alive.discard(int(rest))
        else:
            break
        control.send(str(answer).encode())
    for worker in alive:
        _end(worker)
    shutil.rmtree(order["folder"], ignore_errors=True)


def _built(name: str, settings: Mapping[str, Any]) -> Any:
    """Builds a modality and lets it read its own example, so that what it loads on first use is there already."""
    import torch
    from tqdm import tqdm

    from xblip import config as configs
    from xblip import plugins

    torch.set_num_threads(1)
    tqdm.monitor_interval = 0  # of the thread that it would start
    kind = plugins.get("modality", name)
    modality = kind(configs.build(kind.Config, settings, where=f"{name}.config"))
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(Exception):  # what is wrong, a file will show
        modality.load(modality.example(Path(folder)).sources[0])
    return modality


def _end(worker: int) -> int:
    """Kills a worker, if it lives, with all that it has started; returns its wait status."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(worker, signal.SIGKILL)
    return os.waitpid(worker, 0)[1]


def _work(
    server: int,
    channel: int,
    errors: int,
    folder: str,
    modalities: Mapping[str, Any],
    memory_bytes: int,
    result_bytes: int,
) -> NoReturn:
    """Is a worker: reads the files that it is told of until it is killed, or the fork server is."""
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != server:  # killed before this process could say that it wants to know
            os._exit(1)
        for output in (1, 2):
            os.dup2(errors, output)
        faulthandler.enable()
        # A library that fills less of a picture than it declares would show what was read before, for somebody else.
        if perturb := getattr(ctypes.CDLL(None), "mallopt", None):
            perturb(M_PERTURB, 255)
        tempfile.tempdir = folder
        with contextlib.suppress(OSError):  # where memory ends, this process is to go, and not the server
            Path("/proc/self/oom_score_adj").write_text("1000")
        before = _address_space()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (before + memory_bytes,) * 2)
        pool = socket.socket(fileno=channel)  # left open until the end: the other side takes its closing for a death
        for line in pool.makefile("rb"):
            name, path = json.loads(line)
            facts, tensors = _read(modalities[name], Path(path), result_bytes)
            facts["used_up"] = _address_space() - before > memory_bytes // 4
            text = json.dumps(facts).encode()
            pool.sendall(REPLY.pack(len(text), len(tensors)) + text)
            pool.sendall(tensors)
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def _read(modality: Any, path: Path, result_bytes: int) -> tuple[dict[str, Any], bytes]:
    """Reads one file; returns what became of it, and the tensors as safetensors."""
    from safetensors.torch import save

    try:
        tensors = modality.load(path)
        if sum(tensor.nbytes for tensor in tensors.values()) > result_bytes:
            return {"outcome": "too_large"}, b""
        copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        return {"outcome": "read"}, save(copies)
    except MediaError as error:
        return {"outcome": "refused", "message": str(error)[:LONGEST]}, b""
    except BaseException as error:
        if isinstance(error, MemoryError) or "allocate memory" in str(error):  # so say torch and the system
            raise MemoryError from error
        return {"outcome": "failed", "traceback": traceback.format_exc()[-LONGEST:]}, b""


def _address_space() -> int:
    """How much address space this process has, in bytes; what RLIMIT_AS limits."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
