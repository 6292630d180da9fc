"""The benchmarks of asking run as their documentation says, compare equal answers, and count what must be done."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from xblip import plugins

pytest.importorskip("xblip_video")
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
MODULES = ("floor", "pair", "train_step", "ask_many", "ask_batch", "serve_load")
needs_numerals = pytest.mark.skipif(
    "numerals" not in plugins.installed(), reason="the bundle `numerals` is not installed"
)


@pytest.fixture
def bench(monkeypatch):
    """Imports one of the modules, which stand beside each other in a folder of their own."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield __import__
    for name in MODULES:
        sys.modules.pop(name, None)


def speeds(lines):
    """The numbers of a table's cells that end in x, row by row."""
    return [float(cell) for line in lines for cell in re.findall(r"([\d.]+)x \|", line)]


@pytest.mark.slow
def test_many_questions_about_a_video(bench):
    lines = []
    bench("ask_many").main(["--tiny", "--repeats", "1", "--new-tokens", "3"], say=lines.append)
    found = [speeds([row]) for row in lines[1].splitlines()[2:]]
    assert [len(row) for row in found] == [1, 2, 1, 1, 2, 2, 1, 2, 2], "batches stand beside transformers' batch too"
    assert found[0] == [1] and found[1][1] == 1 and all(speed > 0 for row in found for speed in row)


@pytest.mark.slow
def test_answers_may_part_where_rounding_decides_and_nowhere_else(bench, tmp_path):
    ask_many, pair = bench("ask_many"), bench("pair")
    ask_many.save_models(pair.TINY, tmp_path)
    system = ask_many.Ours(tmp_path, ask_many.make_video(), way="ask")
    [question] = ask_many.make_questions(pair.TINY, 1)
    [said] = ask_many.expected_of(system, [question], {"max_new_tokens": 4, "min_new_tokens": 4})
    words = said.split()
    other, twin = [word for word in ("w1", "w2", "w3", "w4") if word not in words][:2]
    tokenizer, head = system.model.llm.tokenizer, system.model.llm.model.get_output_embeddings().weight
    ids = tokenizer.convert_tokens_to_ids([words[2], twin])
    with torch.no_grad():
        head[ids[1]] = head[ids[0]]
    sample = ask_many.sample_of(system, question, question)
    parted = [" ".join([*words[:2], word, words[3]]) for word in (other, twin, words[2])]
    assert [ask_many.part_at_tie(system.model, sample, (said, text)) for text in parted] == [False, True, False]


@pytest.mark.slow
def test_the_floor_of_a_question_is_what_a_counter_counts_without_waste(bench, tmp_path):
    ask_many, pair, floor = bench("ask_many"), bench("pair"), bench("floor")
    ask_many.save_models(pair.TINY, tmp_path)
    system = ask_many.Theirs(tmp_path, ask_many.make_video(), together=False)
    system.model.set_attn_implementation("eager")
    [question] = ask_many.make_questions(pair.TINY, 1)
    with FlopCounterMode(display=False) as counter:
        system.answer([question], {"max_new_tokens": 1, "min_new_tokens": 1})
    config = system.model.config
    asked = len(question.split())
    parts = floor.ask_flops(config, frames=ask_many.FRAMES, asked=asked, said=1)
    positions = ask_many.FRAMES * pair.QUERIES + 1 + asked
    masked = 2 * config.text_config.num_hidden_layers * positions**2 * config.text_config.hidden_size
    assert counter.get_total_flops() == pytest.approx(sum(parts.values()) + masked, rel=0.02)


@pytest.mark.slow
@needs_numerals
def test_a_batch_of_mixed_samples(bench):
    lines = []
    bench("ask_batch").main(["--repeats", "1", "--new-tokens", "4"], say=lines.append)
    assert len(speeds(lines)) == 2


@pytest.mark.slow
@needs_numerals
def test_a_server_under_load(bench, tmp_path):
    lines = []
    given = ["--clients", "6", "--seconds", "6", "--files", "new", "--port", "8766", "--out", str(tmp_path)]
    bench("serve_load").main(given, say=lines.append)
    rows = lines[-1].splitlines()[2:]
    assert len(rows) == 2 and (tmp_path / "serve_load.png").stat().st_size > 10_000
    for row in rows:
        *_, replies, wrong, _ = row.strip("| ").split(" | ")
        assert re.fullmatch(r"\d+ of 200", replies) and int(wrong) == 0


@needs_numerals
def test_stamped_files_are_other_files_that_hold_the_same(bench, tmp_path):
    import numpy as np
    from xblip_numerals.demo import FOLDER

    import xblip

    load, model = bench("serve_load"), xblip.load("numerals")
    files = [path for name in model.branches for path in sorted((FOLDER / name).iterdir()) if path.suffix != ".obj"]
    for path in files:
        modality = model.branches[path.parent.name].modality
        contents = [load.stamped(path.read_bytes(), path.name, number) for number in (1, 2)]
        assert len({path.read_bytes(), *contents}) == 3, path
        (tmp_path / path.name).write_bytes(contents[1])
        for name, value in modality.load(tmp_path / path.name).items():
            assert np.allclose(value, modality.load(path)[name], atol=1e-4), path


@needs_numerals
@pytest.mark.parametrize("suffix", ["mp4", "xyz", "npy", "ply", "png"])
def test_no_two_numbers_give_the_same_file(bench, suffix):
    from xblip_numerals.demo import FOLDER

    [path, *_] = sorted(FOLDER.rglob(f"*.{suffix}"))
    numbers = (0, 1, 127, 128, 255, 256, 2**16, 2**20 + 1, 2**21 - 1)
    files = {bench("serve_load").stamped(path.read_bytes(), path.name, number) for number in numbers}
    assert len(files) == len(numbers)


@needs_numerals
def test_the_benchmark_says_how_many_files_there_are(bench):
    from xblip_numerals.demo import FOLDER

    named = {file for row in json.loads((FOLDER / "questions.json").read_text()) for _, file in row["media"]}
    load = bench("serve_load")
    assert load.FILES["same"] == f"the same {len(named)} files" and len(named) == 14 and "same fourteen" in load.__doc__
