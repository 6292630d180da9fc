"""Files of numbers, and how tests store their features."""

import contextlib
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from kit import registered

from xblip import decoding, precompute
from xblip.branch import BranchConfig, build_modality
from xblip.data import Manifest
from xblip.encoding import Job
from xblip.testing import ToyEncoder, ToyModality


class Numbers(ToyModality):
    """Rows of four numbers from text files; counts those that are encoded."""

    name = "numbers"
    cue = "input : "
    encoded = 0

    def load(self, source):
        with decoding(str(source), "rows of four numbers"):
            return super().load([float(word) for word in Path(source).read_text().split()])

    def build_encoder(self):
        return CountingEncoder(self.config.width, self.config.seed)


class CountingEncoder(ToyEncoder):
    """Counts segments."""

    def forward(self, values):
        Numbers.encoded += len(values)
        return super().forward(values)


@contextlib.contextmanager
def some_files(folder):
    """Twelve files of one to three rows, named by a manifest twice each; the modality is registered for a while."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number in range(12):
        values = torch.randn(4 * (1 + number % 3), generator=generator)
        (folder / f"{number}.txt").write_text(" ".join(map(str, values.tolist())))
        rows += [{"numbers": f"{number}.txt", "instruction": "what is this ?", "answer": "one"}] * 2
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Numbers.encoded = 0
    with registered(Numbers):
        yield


def run(data, to="store", *, console=None, **options):
    settings = {key: options.pop(key) for key in ("engine", "max_skipped") if key in options}
    job = Job(
        options.pop("branch", BranchConfig("numbers")),
        str(data / to),
        dtype=options.pop("dtype", "float32"),
        use_cpu=True,
        **options,
    )
    manifests = manifests_of(job.branch, [str(data / "train.jsonl")])
    return precompute.precompute(job, manifests, **settings, console=console)


def manifests_of(branch: BranchConfig, paths: Iterable[str]) -> list[Manifest]:
    """Manifests of these paths, read by a branch's modality."""
    modalities = {branch.modality: build_modality(branch)}
    return [Manifest(path, modalities=modalities) for path in paths]
