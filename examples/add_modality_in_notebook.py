"""A modality written in a notebook: registered by hand, checked at once, nothing installed.

Run: python examples/add_modality_in_notebook.py
"""

import torch

import xblip
from xblip.testing import run_contract


class Series(xblip.Modality):
    """Measurements over time, any number of them; every 16 are one segment."""

    name = "series"

    def load(self, source):
        with xblip.decoding("the series", "a list of numbers"):
            values = torch.as_tensor(source, dtype=torch.float32).flatten()
        if len(values) == 0 or not values.isfinite().all():
            raise xblip.MediaError("A series needs at least one number, and no NaN or infinite ones.")
        missing = -len(values) % 16
        return {"values": torch.cat([values, values[-1:].expand(missing)]).reshape(-1, 16)}

    def build_encoder(self):
        return RandomFeatures()

    @classmethod
    def example(cls, folder):
        return xblip.Example(config={}, sources=[[1.0, 2.0, 4.0], range(40)], broken=[[], "words", [float("nan")]])


class RandomFeatures(torch.nn.Module):
    """Four tokens a segment. The seed matters: an encoder must be the same one whenever it is built."""

    width = 32

    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.randn(4, self.width, generator=torch.Generator().manual_seed(0)))

    def forward(self, values):
        return (values.unflatten(1, (4, 4)) @ self.weight).tanh()


xblip.plugins.register(Series)
for promise, fault in run_contract("series").items():
    print(f"{promise}: {fault or 'kept'}")
