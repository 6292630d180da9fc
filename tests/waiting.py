"""Waiting for what comes about by itself, and engines that wait for a test."""

import threading
import time

from kit import LONG

from xblip.decoder import Decoder
from xblip.engine import Engine, EngineConfig
from xblip.requests import Request
from xblip.sample import Sample

NEW = {"max_new_tokens": 12}
ASK = Sample("what is this ?", [("toy", LONG)])


def until(holds, seconds: float = 10.0) -> None:
    """Waits until something holds."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"it did not come about in {seconds:g} s"
        time.sleep(0.005)


class Held:
    """An engine whose steps wait until they may go on, so that a test knows who is waiting."""

    def __init__(self, model, monkeypatch, **settings):
        self.may_go = threading.Event()
        self.stepping = threading.Event()
        real = Decoder.step

        def step(decoder):
            self.stepping.set()
            assert self.may_go.wait(20)
            return real(decoder)

        monkeypatch.setattr(Decoder, "step", step)
        self.engine = Engine(model, EngineConfig(**settings))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.may_go.set()
        self.engine.close()

    def submit(self, request):
        events = []
        ticket = self.engine.submit(request, events.append)
        return ticket, events

    def begin(self, **options):
        """Submits a request, and returns when its answer is being said."""
        found = self.submit(Request(ASK, {**NEW, "min_new_tokens": 12, **options}, caller="first"))
        assert self.stepping.wait(20)
        return found
