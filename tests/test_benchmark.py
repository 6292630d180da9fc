"""The benchmark beside transformers, on tiny shapes: equal losses, a floor that is what a counter counts, and its table."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("xblip_image")

pytestmark = pytest.mark.slow  # most of them time or train
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def bench():
    """Its modules, which stand beside each other in a folder of their own."""
    sys.path.insert(0, str(BENCHMARKS))
    import floor
    import pair
    import train_step

    yield train_step, pair, floor
    sys.path.remove(str(BENCHMARKS))
    for name in ("floor", "pair", "train_step"):
        del sys.modules[name]


@pytest.fixture(scope="module")
def folder(bench, tmp_path_factory):
    train_step, pair, _ = bench
    folder = tmp_path_factory.mktemp("pair")
    train_step.prepare(folder, pair.TINY, "cpu")
    return folder


@pytest.mark.parametrize("stage", ["generate", "instruct", "align"])
def test_losses_are_equal_and_so_are_those_of_stored_features(bench, folder, stage):
    train_step, pair, _ = bench
    losses = [
        train_step.loss(train_step.build(kind, folder, pair.TINY, stage, "cpu"), pair.TINY, "cpu")
        for kind in train_step.STAGES[stage]
    ]
    assert max(losses) - min(losses) < 1e-5 and min(losses) > 1


def test_a_step_trains_what_the_other_system_trains(bench, folder):
    train_step, pair, _ = bench
    counts = set()
    for kind in train_step.KINDS:
        system = train_step.build(kind, folder, pair.TINY, "instruct", "cpu")
        trained = [weight for weight in system.model.parameters() if weight.requires_grad]
        before = [weight.detach().clone() for weight in trained]
        assert train_step.train_step(system, pair.TINY, folder, device="cpu").seconds > 0
        changed = [not torch.equal(*weights) for weights in zip(before, trained, strict=True)]
        assert sum(changed) > 0.9 * len(changed)
        counts.add(sum(weight.numel() for weight in trained))
    assert len(counts) == 1


def test_the_floor_is_what_a_counter_counts_without_waste(bench, folder):
    """Of a row alone, which has no padding; what the peer does beside the floor is known too."""
    train_step, pair, floor = bench
    system = train_step.build("theirs", folder, pair.TINY, "instruct", "cpu")
    system.model.set_attn_implementation("eager")
    row = system.rows[0]
    with FlopCounterMode(display=False) as counter:
        system.model(**system.collate([row])).loss.backward()
    config, text = system.model.config, system.model.config.text_config
    parts = floor.step_flops(config, [row], stored=False)
    answered = len(row.answer.split()) + 1
    positions = pair.QUERIES + 1 + len(row.instruction.split()) + answered
    masked = 2 * text.num_hidden_layers * 3 * positions**2 * text.hidden_size
    unlabelled = 2 * 2 * text.hidden_size * text.vocab_size * (positions - answered)
    assert counter.get_total_flops() == pytest.approx(sum(parts.values()) + masked + unlabelled, rel=1e-3)
    assert floor.step_flops(config, [row], stored=True) == {**parts, "encoder": 0}


def test_small_shapes_share_the_work_as_the_full_size_does(bench):
    """The shares of encoder, Q-Former, LLM and vocabulary differ by few hundredths of all work."""
    _, pair, floor = bench
    row = pair.Row(Path("x"), " ".join(["w"] * 22), " ".join(["w"] * 14))
    shares = []
    for shapes in (pair.SMALL, pair.FULL_SIZE):
        parts = floor.step_flops(
            pair.make_config(shapes, vocabulary=shapes.vocabulary, image_token=5), [row], stored=False
        )
        shares.append({name: flops / sum(parts.values()) for name, flops in parts.items()})
    assert all(abs(shares[0][name] - shares[1][name]) < 0.03 for name in shares[0]), shares


def test_it_prints_a_table_and_writes_its_measurements(bench, folder, tmp_path, capsys):
    train_step, _, _ = bench
    file = tmp_path / "measured.json"
    command = ["--size", "tiny", "--repeats", "1", "--stages", "generate", "--folder", str(folder), "--json", str(file)]
    train_step.main(command)
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[0].startswith("| stage | system | samples/s") and len(lines) == 2 + 3
    (measured,) = json.loads(file.read_text())["results"]
    assert measured["memory"]["ours"]["total"] > measured["memory"]["ours"]["above"] > 0
