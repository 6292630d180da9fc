"""The first stage: losses and gradients against a plain reference, in one process and in two, and what it refuses."""

import os
import subprocess
import sys
from pathlib import Path

import align_reference as reference
import pytest
import torch
from align_run import FOR_TWO, RATE, RUNS, Run, make, take_steps
from kit import Beads, registered

from xblip.testing import ToyModality

pytestmark = pytest.mark.slow  # trained twice, once by hand

HEADS = 4


def expected_steps(run: Run, llm_folder: Path) -> list[tuple[dict, dict]]:
    """What the reference finds in the run."""
    model = make(llm_folder, run.modality, run.config, **run.bridge)
    bridge = model.branch.bridge
    pairs = []
    for source, text in zip(run.media, run.texts, strict=True):
        with registered(ToyModality, Beads):
            features = model.branch.encode([source])
        segments = [values[mask] for values, mask in zip(features.values, features.mask, strict=True)]
        ids = bridge.tokenizer(text).input_ids
        written = [bridge.tokenizer.convert_tokens_to_ids("[DEC]"), *ids]
        joined = bridge.config.join_segments
        pairs.append(reference.Pair(segments, ids, written, str(source), text.strip().lower(), joined))
    weights = reference.trainable(bridge.state_dict())
    config, momentum = run.config, None
    if config.momentum:
        own = config.momentum
        momentum = reference.Momentum(weights, decay=own.decay, size=own.queue_size, alpha=own.alpha, warmup=own.warmup)
    found = []
    for _ in range(run.steps):
        losses = {
            "itc": momentum.itc(weights, pairs, HEADS)
            if momentum
            else reference.itc(weights, pairs, HEADS, config.label_smoothing),
            "itm": reference.itm(weights, pairs, HEADS, run.wrong_media, run.wrong_texts),
            "itg": reference.itg(weights, pairs, HEADS, config.label_smoothing),
        }
        total = sum(getattr(config, name) * loss for name, loss in losses.items())
        gradients = dict(zip(weights, torch.autograd.grad(total, list(weights.values())), strict=True))
        found.append((losses, gradients))
        weights = {name: (value - RATE * gradients[name]).detach().requires_grad_() for name, value in weights.items()}
    return found


def assert_agrees(found: list[tuple[dict, dict]], expected: list[tuple[dict, dict]], run: Run) -> None:
    for (losses, gradients), (true_losses, true_gradients) in zip(found, expected, strict=True):
        for name, loss in true_losses.items():
            assert name in losses or not getattr(run.config, name)
            if name in losses:
                assert abs(losses[name].item() - loss.item()) <= 1e-5, name
        left_out = {"itm": "matching_head", "itg": "language_head"}
        frozen = [head for name, head in left_out.items() if not getattr(run.config, name)]
        assert set(gradients) == {name for name in true_gradients if name.split(".")[0] not in frozen}
        for name, gradient in gradients.items():
            assert (gradient - true_gradients[name]).abs().max() <= 1e-5 * max(1, true_gradients[name].abs().max()), (
                name
            )


class TestAgainstThePlainReference:
    @pytest.fixture(scope="class")
    def expected(self, llm_folder):
        """A function that gives what the reference finds in a run, computed once."""
        known: dict[str, list] = {}

        def steps(name: str) -> list[tuple[dict, dict]]:
            if name not in known:
                known[name] = expected_steps(RUNS[name], llm_folder)
            return known[name]

        return steps

    @pytest.fixture(scope="class")
    def of_two(self, llm_folder, tmp_path_factory):
        """What each of two processes found."""
        folder = tmp_path_factory.mktemp("two")
        (folder / "llm").symlink_to(llm_folder)
        script = Path(__file__).with_name("align_run.py")
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        processes = [
            subprocess.Popen(
                [sys.executable, str(script), str(rank), "2", str(folder)], env=environment,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
            for rank in range(2)
        ]  # fmt: skip
        try:
            for process in processes:
                told, _ = process.communicate(timeout=120)
                assert process.returncode == 0, told
        finally:
            for process in processes:
                process.kill()
        return [torch.load(folder / f"found-{rank}.pt") for rank in range(2)]

    @pytest.mark.parametrize("name", [name for name in RUNS if name != "widths"])
    def test_one_process(self, llm_folder, expected, name):
        assert_agrees(take_steps(RUNS[name], llm_folder), expected(name), RUNS[name])

    @pytest.mark.parametrize("name", FOR_TWO)
    def test_two_processes(self, of_two, expected, name):
        for found in of_two:
            assert_agrees(found[name], expected(name), RUNS[name])
