"""A training step, side by side with `InstructBlipForConditionalGeneration` of transformers.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --device cuda --full-size

Both systems have equal weights, learn from the same rows in the same step, and are trained by transformers' Trainer with
AdamW. Theirs has its usual processor and collator. Prints a table and writes it beside all measurements as JSON.
"""

import argparse
import gc
import itertools
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from floor import step_flops
from pair import FULL_SIZE, SMALL, TINY, Shapes, System, aligned, make_rows, ours, save_pair, store_features, theirs
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import InstructBlipConfig, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

KINDS = {"theirs": "transformers", "ours": "xblip", "stored": "xblip, stored features"}
STAGES = {"generate": tuple(KINDS), "instruct": tuple(KINDS), "align": ("ours", "stored")}
"""The systems that know a stage; others are compared with the first."""
SIZES = {"small": SMALL, "full": FULL_SIZE, "tiny": TINY}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Of the difference between losses, by the dtype of what is frozen."""


class _Clock(TrainerCallback):
    """Takes the time from the first row that is fetched to the last step, and an accelerator's memory before."""

    bytes_before = 0

    def on_train_begin(self, *args, **kwargs):
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self.bytes_before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # sets the highest resident size back
        _wait()
        self.started = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        _wait()
        self.seconds = time.perf_counter() - self.started


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def train_step(system: System, shapes: Shapes, folder: Path, *, device: str, workers: int = 0) -> _Clock:
    """Runs one step of a Trainer."""
    clock = _Clock()
    arguments = TrainingArguments(
        output_dir=str(folder / "run"),
        max_steps=1,
        per_device_train_batch_size=shapes.rows,
        gradient_accumulation_steps=shapes.accumulation,
        train_sampling_strategy="sequential",
        learning_rate=1e-4,
        weight_decay=0.05,
        bf16=shapes.dtype is torch.bfloat16,
        use_cpu=device == "cpu",
        dataloader_num_workers=workers,
        dataloader_pin_memory=device != "cpu",
        remove_unused_columns=False,
        label_names=["labels"],
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=system.model,
        args=arguments,
        train_dataset=system.dataset,
        data_collator=system.collate,
        callbacks=[clock],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return clock


@torch.no_grad()
def loss(system: System, shapes: Shapes, device: str) -> float:
    """The mean over all labelled tokens of a step's rows."""
    total, tokens = 0.0, 0
    torch.manual_seed(0)  # of the negatives that the stage align draws
    for start in range(0, len(system.rows), shapes.rows):
        part = range(start, min(start + shapes.rows, len(system.rows)))
        inputs = system.collate([system.dataset[index] for index in part])
        inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
        count = sum(len(system.rows[index].answer.split()) + 1 for index in part)
        system.model.eval()
        with torch.autocast(device, torch.bfloat16, enabled=shapes.dtype is torch.bfloat16):
            total += float(system.model(**inputs)["loss"]) * count
        tokens += count
    return total / tokens


def build(kind: str, folder: Path, shapes: Shapes, stage: str, device: str) -> System:
    """Loads a system for a stage; `kind` is of KINDS."""
    rows = make_rows(shapes, folder / "pictures", stage=stage)
    if stage == "align":
        return aligned(folder, rows, device, stored=folder / "features" if kind == "stored" else None)
    if kind == "theirs":
        return theirs(folder, rows, device)
    return ours(folder, rows, device, stored=folder / "features" if kind == "stored" else None)


def prepare(folder: Path, shapes: Shapes, device: str) -> None:
    """Writes what `build` loads: both systems' weights, pictures, and their features."""
    save_pair(shapes, folder, device)
    rows = make_rows(shapes, folder / "pictures", stage="generate")
    store_features(folder, rows, device, folder / "features")


def peak_bytes(kind: str, folder: Path, size: str, stage: str, device: str) -> dict[str, int]:
    """Peak memory of a step in a process of its own: tensors in all, those beside weights, and on a CPU what is resident."""
    command = [sys.executable, __file__, "--peak", kind, "--folder", folder, "--stage", stage, "--size", size]
    # What is freed goes back at once, so that the resident size is what is in use, and not the allocator's history.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    run = subprocess.run([*map(str, command), "--device", device], capture_output=True, text=True, env=environment)
    if run.returncode:
        raise RuntimeError(run.stderr)
    return json.loads(run.stdout.splitlines()[-1])


def print_peak(kind: str, folder: Path, shapes: Shapes, stage: str, device: str) -> None:
    """Measures what `peak_bytes` gives, in this process."""
    system = build(kind, folder, shapes, stage, device)
    held = [weight for weight in system.model.parameters() if not weight.is_meta]
    sum(float(weight.detach().sum()) for weight in held)  # reads weights that lie in mapped files
    before = train_step(system, shapes, folder, device=device).bytes_before
    if device != "cpu":
        total = torch.cuda.max_memory_allocated()
        print(json.dumps({"total": total, "above": total - before}))
        return
    lines = Path("/proc/self/status").read_text().splitlines()
    resident = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    above = _tensor_bytes(lambda: train_step(system, shapes, folder, device=device))
    weights = sum(weight.nbytes for weight in held)
    print(json.dumps({"total": weights + above, "above": above, "resident": resident}))


def _tensor_bytes(run: Callable[[], Any]) -> int:
    """The most that torch's allocator had given out at once, of what `run` asked it for."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(changes))


def peak_flops(dtype: torch.dtype, device: str) -> float:
    """The best speed of a matrix product, of several of them."""
    size, repeats = (1536, 3) if device == "cpu" else (8192, 20)
    left, right = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(repeats):
        _wait()
        started = time.perf_counter()
        left @ right
        _wait()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def measure(stage: str, folder: Path, shapes: Shapes, size: str, *, device: str, repeats: int, workers: int) -> dict:
    """Measures one stage: losses, times of interleaved steps, peaks, and the floor."""
    systems = {kind: build(kind, folder, shapes, stage, device) for kind in STAGES[stage]}
    losses = {kind: loss(system, shapes, device) for kind, system in systems.items()}
    apart = max(losses.values()) - min(losses.values())
    if apart > TOLERANCE[shapes.dtype]:
        raise RuntimeError(f"{stage}: the systems' losses differ by {apart:g}: {losses}")
    seconds: dict[str, list[float]] = {kind: [] for kind in systems}
    peaks = []
    for repeat in range(repeats + 1):
        peaks.append(peak_flops(shapes.dtype, device))
        for kind, system in systems.items():
            taken = train_step(system, shapes, folder, device=device, workers=workers).seconds
            if repeat:  # the first warms up
                seconds[kind].append(taken)
            say(f"{stage}, {KINDS[kind]}: {taken:.2f} s")
    rows = systems["ours"].rows
    config = InstructBlipConfig.from_pretrained(folder / "theirs")
    del systems
    gc.collect()
    kinds = STAGES[stage]
    memory = {kind: peak_bytes(kind, folder, size, stage, device) for kind in kinds}
    floors = {} if stage == "align" else {kind: step_flops(config, rows, stored=kind == "stored") for kind in kinds}
    return {
        "stage": stage,
        "rows": len(rows),
        "losses": losses,
        "seconds": seconds,
        "memory": memory,
        "floor": floors,
        "peak_flops": max(peaks),
    }


def summary(measured: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Each system's figures beside the first one's: medians, and medians of ratios within a repeat."""
    seconds, memory = measured["seconds"], measured["memory"]
    first, *_ = seconds
    figures = {}
    for kind in seconds:
        floor = sum(measured["floor"].get(kind, {}).values()) / measured["peak_flops"]
        pairs = zip(seconds[first], seconds[kind], strict=True)
        figures[kind] = {
            "samples_per_second": measured["rows"] / statistics.median(seconds[kind]),
            "speed": statistics.median(their / own for their, own in pairs),
            "gigabytes": memory[kind]["total"] / 1e9,
            "memory": memory[kind]["total"] / memory[first]["total"],
            "memory_above": memory[kind]["above"] / memory[first]["above"],
            "resident": memory[kind].get("resident", 0) / memory[first].get("resident", 1),
            "over_floor": statistics.median(seconds[kind]) / floor if floor else None,
        }
    return figures


def table(results: Sequence[dict[str, Any]]) -> str:
    """Results as Markdown."""
    lines = [
        "| stage | system | samples/s | speed | tensors | | beside weights | resident | time over the floor |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for measured in results:
        for kind, figures in summary(measured).items():
            cells = [measured["stage"], KINDS[kind], f"{figures['samples_per_second']:.2f}", f"{figures['speed']:.2f}x"]
            cells += [f"{figures['gigabytes']:.2f} GB", f"{figures['memory']:.2f}x", f"{figures['memory_above']:.2f}x"]
            cells.append(f"{figures['resident']:.2f}x" if figures["resident"] else "")
            cells.append(f"{figures['over_floor']:.2f}x" if figures["over_floor"] else "")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--size", choices=SIZES, default="small", help=argparse.SUPPRESS)
    parser.add_argument("--full-size", action="store_const", const="full", dest="size", help="EVA-CLIP-g and Llama-7B")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--workers", type=int, default=0, help="processes that read pictures")
    parser.add_argument("--folder", type=Path, help="for weights and pictures; a temporary one unless given")
    parser.add_argument("--json", type=Path, default=Path("train_step.json"), help="file of all measurements")
    parser.add_argument("--peak", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    set_verbosity_error()
    disable_progress_bar()
    logging.disable(logging.WARNING)
    torch.set_num_threads(options.threads)
    shapes = SIZES[options.size]
    if options.peak:
        print_peak(options.peak, options.folder, shapes, options.stage, options.device)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        if not (folder / "features").exists():
            prepare(folder, shapes, options.device)
        common = {"device": options.device, "repeats": options.repeats, "workers": options.workers}
        results = [measure(stage, folder, shapes, options.size, **common) for stage in options.stages]
    options.json.write_text(json.dumps({"size": options.size, **common, "results": results}, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
