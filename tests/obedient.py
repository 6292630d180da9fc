"""A plugin that tests install: a modality that does what a file says, good or bad."""

import contextlib
import ctypes
import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import xblip
from xblip.decode_worker import REPLY

KEPT = []
SOME = 2_000


class Obedient(xblip.Modality):
    """Does what a file says."""

    name = "obedient"

    @dataclass
    class Config:
        factor: float = 1.0

    def load(self, source):
        verb, *words = Path(source).read_text().split()
        return getattr(self, verb)(*words)

    def say(self, number):
        return {"values": torch.full((1, 2), float(number) * self.config.factor)}

    def kinds(self):
        row = torch.arange(6).reshape(1, 6)
        return {"long": row, "part": row[:, ::2], "half": row.bfloat16(), "mask": row > 2, "empty": row[:, :0]}

    def begin(self, mark, seconds):
        Path(mark + ".new").write_text(str(os.getpid()))
        os.rename(mark + ".new", mark)
        time.sleep(float(seconds))
        return self.say(0)

    def wait(self, mark, file, number):
        while not os.path.exists(mark):
            time.sleep(0.005)
        with open(file, "a") as opened:
            opened.write(number)
        return self.say(number)

    def allocate(self, mib):
        return self.say(len(bytearray(int(mib) << 20)))

    def tensor(self, mib):
        return self.say(torch.ones(int(mib) << 20, dtype=torch.uint8).sum())

    def zeros(self, mib):
        return {"values": torch.zeros(1, int(mib) << 20, dtype=torch.uint8)}

    def nothing(self):
        return None

    def keep(self, mib):
        KEPT.append(bytearray(int(mib) << 20))
        return self.say(mib)

    def show_what_is_left(self, number):
        """Leaves a number in memory that it gives back, and shows what there is in memory that it has not filled."""
        left = np.full(SOME, float(number))
        del left
        return {"values": torch.from_numpy(np.empty(SOME))[None]}

    def touch_nothing(self):
        ctypes.string_at(0)

    def abort(self, *words):
        os.write(2, " ".join(words).encode())
        os.abort()

    def kill(self):
        os.kill(os.getpid(), signal.SIGKILL)

    def exit(self):
        os._exit(5)

    def refuse(self):
        raise xblip.MediaError("Cannot read it: it is no order.")

    def fail(self):
        raise ValueError("a secret\nERROR forged")

    def shout(self, mib):
        for _ in range(int(mib)):
            for output in (1, 2):
                os.write(output, b"noise " * (2**20 // 12))
        print("noise", file=sys.stderr)
        return self.say(mib)

    def leave(self, mark):
        program = subprocess.Popen(["sleep", "60"])
        _, file = tempfile.mkstemp()
        Path(mark).write_text(f"{program.pid} {file}")
        time.sleep(60)

    def lie(self, facts, tensors):
        for descriptor in range(3, 64):
            with contextlib.suppress(OSError):
                if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                    os.write(descriptor, REPLY.pack(len(facts), int(tensors)) + facts.encode())
        return self.say(666)

    def build_encoder(self):
        raise NotImplementedError


@xblip.hookimpl
def register_modalities(register):
    register(Obedient)
