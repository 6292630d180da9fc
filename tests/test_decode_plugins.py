"""The plugins' own files, read by workers."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from xblip import config as configs
from xblip import plugins
from xblip.decode_pool import DecodePool
from xblip.errors import MediaError


@pytest.mark.slow
def test_workers_read_what_the_plugins_read_and_another_is_soon_ready(tmp_path):
    modalities, examples = {}, {}
    for name in ("image", "video", "audio", "point_cloud"):
        kind = plugins.get("modality", name)
        (tmp_path / name).mkdir()
        examples[name] = kind.example(tmp_path / name)
        modalities[name] = kind(configs.build(kind.Config, examples[name].config, where=name))
    with DecodePool(modalities, workers=1, seconds=120) as pool:
        forker = pool._server._process.pid
        assert os.listdir(f"/proc/{forker}/task") == [str(forker)]  # other threads would be missing from its forks
        for name, example in examples.items():
            for source in filter(lambda source: isinstance(source, Path), example.sources):
                own, given = modalities[name].load(source), pool.load(name, source)
                assert own.keys() == given.keys() and all(torch.equal(own[key], given[key]) for key in own)
            for number, source in enumerate(example.broken):
                if isinstance(source, bytes):
                    (tmp_path / f"{number}").write_bytes(source)
                    source = tmp_path / f"{number}"
                if isinstance(source, Path):
                    with pytest.raises(MediaError, match="Cannot read"):
                        pool.load(name, source)
        os.kill(pool.pids[0], signal.SIGKILL)
        while pool.counters.alive:
            time.sleep(0.01)
        began = time.monotonic()
        pool.load("image", examples["image"].sources[0])
        assert time.monotonic() - began < 2  # a process that imports transformers takes longer on any machine
        assert pool.counters.replaced == 1 and not pool.counters.failed
