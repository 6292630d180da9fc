"""What a training run tells of itself: its pace since the last line of the log, and curves at a glance."""

import contextlib
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import TrainerCallback

SHOWN = ("loss", "accuracy", "recall_at_1", "learning_rate")
"""Ends of names of what is drawn, a panel each."""
SHARES = ("accuracy", "recall_at_1")
"""Of these, what goes from 0 to 1."""


class Meter:
    """Counts what passes between two lines of the log.

    Attributes:
      flops: FLOPs that so many samples, positions before the LLM and labels cannot do without; None if nobody knows.
      peak: FLOP/s of this process' device; None if it is not known.
    """

    def __init__(self, *, flops: Callable[[float, float, float], float] | None = None, peak: float | None = None):
        self.flops = flops
        self.peak = peak
        self._begin()

    def _begin(self) -> None:
        self._started = time.perf_counter()
        self._waited = self._paused = 0.0
        self._samples = self._tokens = self._labels = self._batches = 0
        self._sums: dict[str, Tensor] = {}

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts what goes by inside as waiting for data."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out what goes by inside, such as an evaluation."""
        began = time.perf_counter()
        yield
        self._paused += time.perf_counter() - began

    def add(self, samples: int, outputs: Mapping[str, Tensor]) -> None:
        """Counts a batch; of `outputs` the counts are summed, and what is no count is averaged."""
        self._samples += samples
        self._batches += 1
        for name, value in outputs.items():
            if name == "num_positions":
                self._tokens = self._tokens + value.detach()
            elif name == "num_tokens":
                self._labels = self._labels + value.detach()
            elif name != "loss":
                self._sums[name] = self._sums.get(name, 0) + value.detach().float()

    def take(self, summed: Callable[[Sequence[float]], list[float]]) -> dict[str, float]:
        """Returns the pace since the last call, and begins anew.

        Args:
          summed: adds up numbers over all processes.
        """
        seconds = max(time.perf_counter() - self._started - self._paused, 1e-9)
        names = sorted(self._sums)
        totals = summed(
            [self._samples, float(self._tokens), self._batches, *(float(self._sums[name]) for name in names)]
        )
        samples, tokens, batches, *sums = totals
        shown = {
            "samples_per_second": round(samples / seconds, 2),
            **({"tokens_per_second": round(tokens / seconds, 1)} if tokens else {}),
            "waiting_for_data": round(self._waited / seconds, 4),
            "peak_memory_gib": round(peak_memory_bytes() / 2**30, 3),
        }
        if self.flops and self.peak and self._samples:
            done = self.flops(self._samples, float(self._tokens), float(self._labels))
            shown["mfu"] = round(done / seconds / self.peak, 4)
        shown |= {name: value / max(batches, 1) for name, value in zip(names, sums, strict=True)}
        self._begin()
        return shown


def peak_memory_bytes() -> int:
    """The most memory that this process has held so far: of the accelerator where there is one, else of the machine."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Curves(TrainerCallback):
    """Draws `curves.png` in the output folder whenever there is something new to see."""

    def on_evaluate(self, args, state, control, **kwargs) -> None:
        self._draw(args, state)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self._draw(args, state)

    def _draw(self, args, state) -> None:
        if state.is_world_process_zero:
            draw_curves(state.log_history, Path(args.output_dir, "curves.png"))


def draw_curves(history: Sequence[Mapping[str, float]], path: Path) -> None:
    """Draws losses, accuracies and the learning rate over the steps of a log into a PNG; nothing if there are none."""
    from matplotlib.figure import Figure

    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for entry in history:
        for name, value in entry.items():
            kind = next((kind for kind in SHOWN if name == kind or name.endswith(f"_{kind}")), None)
            if kind and name != "train_loss":
                label = "train" if name == kind else name.removesuffix(f"_{kind}")
                panels.setdefault(kind, {}).setdefault(label, []).append((entry["step"], value))
    if not panels:
        return
    figure = Figure(figsize=(5 * len(panels), 3.6), layout="constrained")
    kinds = [kind for kind in SHOWN if kind in panels]
    for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        for label, points in panels[kind].items():
            axes.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 30 else None)
        axes.set(xlabel="step", title=kind.replace("_", " "))
        axes.grid(alpha=0.3)
        if kind in SHARES:
            axes.set_ylim(0, 1)
        if len(panels[kind]) > 1:
            axes.legend(frameon=False)
    figure.savefig(path, dpi=110)
