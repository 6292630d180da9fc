"""Variants of bridges: each is trained as it says and asked the same questions, and the report pairs what they answered."""

import json
import random
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from typer.testing import CliRunner
from xblip_numerals.build import config_of, places_of
from xblip_numerals.experiments import (
    ASKED,
    BASE,
    VARIANTS,
    ask,
    branch_of,
    main,
    rows_alone,
    rows_augmented,
    train_modality,
)
from xblip_numerals.experiments_report import (
    compared,
    experiment_sections,
    matched,
    read_variant,
    shares_table,
    title_of,
)
from xblip_numerals.phrases import MODALITIES
from xblip_numerals.report_rows import deal, several_rows, single_rows

from xblip.cli import app

pytestmark = pytest.mark.slow  # tables made of many runs

ROOT = Path(__file__).parents[2]
STEPS = 2


@pytest.fixture
def stored(parts):
    """Features of all modalities, as the build stores them."""
    for modality in MODALITIES:
        overrides = [f"{key}={value}" for key, value in places_of(parts, modality, "align").items()]
        command = ["precompute", str(config_of(modality, "align")), *overrides]
        told = CliRunner().invoke(app, [*command, "--to", str(parts / "features" / modality)])
        assert told.exit_code == 0, told.output
    return parts


@pytest.fixture
def trainings(monkeypatch, tmp_path):
    """Settings of trainings that would be run."""
    monkeypatch.chdir(ROOT)
    found = []

    def train(config):
        found.append(config)
        Path(config.training["output_dir"]).mkdir(parents=True)
        return {"train_runtime": 1.0}

    monkeypatch.setattr("xblip.train.train", train)
    for name in ("questions/audio-train", "augment/questions", "augment/yes_no"):
        manifest = tmp_path / f"{name}.jsonl"
        manifest.parent.mkdir(exist_ok=True)
        manifest.write_text("")
    return found


@pytest.mark.parametrize("name", [BASE, "aligned"])
def test_an_interrupted_training_starts_anew(trainings, tmp_path, name):
    folder = branch_of(tmp_path / "experiments", name, "audio", 1)
    for left in (folder, folder.with_name("audio-align")):
        left.mkdir(parents=True)
        (left / "bridge.safetensors").write_bytes(b"half")
    train_modality(tmp_path, tmp_path / "experiments", "audio", name, seed=1, steps=5)
    assert trainings and not (folder / "bridge.safetensors").exists()


@pytest.mark.parametrize("name", [name for name, variant in VARIANTS.items() if not variant.weights])
def test_a_variant_differs_from_the_shipped_kind_in_what_it_is_about_alone(trainings, tmp_path, name):
    out = tmp_path / "experiments"
    for variant in (BASE, name):
        train_modality(tmp_path, out, "audio", variant, seed=1, steps=5)
    base, last = OmegaConf.structured(trainings[0]), OmegaConf.structured(trainings[-1])
    assert len(trainings) == (1 if name == BASE else 3 if name == "aligned" else 2), "what is there is not run again"
    assert last.training.seed == 1 and last.training.max_steps == 5
    expected = {
        "linear": {"branch.bridge": {"kind": "linear"}},
        "mlp": {"branch.bridge": {"kind": "mlp"}},
        "no-cues": {"router.cues": False},
        "alone": {"data.train": str(tmp_path / "questions" / "audio-train-alone.jsonl")},
        "augmented": {"data.train": str(tmp_path / "augment" / "audio-train.jsonl")},
        "aligned": {"init.folder": str(branch_of(out, name, "audio", 1).with_name("audio-align"))},
    }
    if name not in expected:
        kind, count = name.split("-")
        settings = {"num_query_tokens": int(count), "instruction_aware": kind == "aware"}
        expected[name] = {"branch.bridge": {**base.branch.bridge, **settings}}
    for key, value in expected[name].items():
        assert OmegaConf.select(last, key) == value
    base.branch.bridge.pop("instruction_aware")  # stands there as its default
    for key in ("branch.bridge", "router.cues", "data.train", "init.folder"):
        if key not in expected[name]:
            assert OmegaConf.select(last, key) == OmegaConf.select(base, key), key
    same = OmegaConf.masked_copy(base, ["llm", "generation"])
    assert OmegaConf.masked_copy(last, ["llm", "generation"]) == same


def test_all_bridges_of_a_variant_answer_and_the_report_tells_it(stored, shelf, tmp_path, capfd):
    out, rows = tmp_path / "experiments", tmp_path / "rows.jsonl"
    rng = random.Random(0)
    blocks = deal(shelf, rng, 2)
    asked = [row for block in blocks for row in single_rows(block, rng, tmp_path)]
    read_alone = {row["part"] for row in asked}
    several = [row for size in (2, 3) for _, row in several_rows(blocks, rng, tmp_path, size=size, count=1)]
    asked += [row for row in several if read_alone.issuperset(row["parts"])]
    rows.write_text("".join(json.dumps(row) + "\n" for row in asked))
    for name in (BASE, "aligned"):
        for modality in MODALITIES:
            train_modality(stored, out, modality, name, seed=0, steps=STEPS, align_steps=STEPS)
    for name in (BASE, "aligned", "cues-off"):
        ask(stored, out, name, rows, seed=0)
        assert len(read_variant(out, name)[0]) == len(asked)
    printed = "".join(capfd.readouterr().out.split())  # the console breaks lines, and long paths
    assert f"from{branch_of(out, 'aligned', 'audio', 0).with_name('audio-align')}:" in printed
    [(title, [(_, shares, plot), (_, tests, _)])] = experiment_sections(out)
    assert title == "Bridges compared"
    assert [row[0] for row in shares[1:]] == [VARIANTS[name].title for name in (BASE, "cues-off", "aligned")]
    assert len(tests) == 1 + 2 * 4 and plot.count("<circle") == 3


def line(number: int, kind: str, inputs: int, answer: str) -> dict:
    return {
        "id": f"row-{number}", "unit": str(number % 5), "kind": kind, "inputs": ["audio"] * inputs, "truth": ["four"],
        "answers": {"soft prompts": [answer]},
    }  # fmt: skip


def write_run(folder, name: str, seed: int, rights: list[bool]) -> None:
    run = folder / ASKED / f"{name}-{seed}"
    run.mkdir(parents=True)
    kinds = (("number", 1), ("echo", 1), ("sum", 2), ("middle", 3))
    lines = [line(i, *kinds[i % 4], "four" if right else "five") for i, right in enumerate(rights)]
    (run / f"{ASKED}.jsonl").write_text("".join(json.dumps(told) + "\n" for told in lines))
    (run / "results.json").write_text("{}")


def test_variants_are_paired_over_the_seeds_that_both_have(tmp_path):
    all_right, none_right = [True] * 40, [False] * 40
    for seed in (0, 1):
        write_run(tmp_path, BASE, seed, all_right)
    write_run(tmp_path, "linear", 0, [i % 4 != 0 for i in range(40)])
    write_run(tmp_path, "linear", 2, none_right)
    (tmp_path / ASKED / "mlp-0").mkdir()  # still running: no results
    runs = {name: read_variant(tmp_path, name) for name in (BASE, "linear")}
    table = shares_table({title_of(name): run for name, run in runs.items()})
    assert table[1][1:] == ["8, 48, 8, 8"] + ["100.0 (100.0, 100.0)"] * 4 + ["2"]
    assert table[2][1:] == ["25, 150, 28, 57"] + ["0.0 (0.0, 0.0)"] + ["50.0 (100.0, 0.0)"] * 3 + ["2"]
    [pair] = matched(runs[BASE], runs["linear"])
    got = compared([pair], lambda row: row["kind"] == "number")
    assert (got.difference, got.n) == (-1.0, 10), "of seed 0 alone"
    same = compared([pair], lambda row: row["kind"] == "sum")
    assert (same.difference, same.p) == (0.0, 1.0)


def test_what_has_no_seed_is_compared_with_the_mean_over_all_of_them(tmp_path):
    for seed, right in enumerate((True, True, False)):
        write_run(tmp_path, BASE, seed, [right] * 40)
    lines = [json.loads(text) for text in (tmp_path / ASKED / f"{BASE}-0" / f"{ASKED}.jsonl").read_text().splitlines()]
    for told in lines:
        told["answers"]["people's captions"] = ["four" if told["kind"] == "number" else "five"]
    (tmp_path / "across.jsonl").write_text("".join(json.dumps(told) + "\n" for told in lines))
    [(_, [(_, shares, plot), (_, tests, _)])] = experiment_sections(tmp_path, tmp_path / "across.jsonl")
    assert [row[0] for row in shares[1:]] == [VARIANTS[BASE].title, "the shipped model", "people's captions"]
    assert shares[3][1:] == ["–", "100.0", "0.0", "0.0", "0.0", "1"] and plot.count("<circle") == 3
    assert tests[2] == ["number", "people's captions", "+33.3", "+33.3 to +33.3", "0.062", "+0.0, +0.0, +100.0"]
    assert tests[4][:3] == ["other facts", "people's captions", "-66.7"]


def test_instruction_aware_queries_are_compared_with_as_many_static_ones(tmp_path):
    for name in (BASE, "aware-2", "aware-1", "static-2"):
        write_run(tmp_path, name, 0, [i % 4 != 0 or not name.startswith("static") for i in range(40)])
    [(_, [_, _, (told, table, _)])] = experiment_sections(tmp_path)
    assert "more than as many static ones" in told and {row[1] for row in table} == {"queries", "2"}
    assert table[1] == ["number", "2", "+100.0", "+100.0 to +100.0", "0.062", "+100.0"]
    assert table[2] == ["other facts", "2", "+0.0", "+0.0 to +0.0", "1.000", "+0.0"]


def test_without_the_shipped_kind_of_bridge_there_is_nothing_to_compare_with(tmp_path):
    write_run(tmp_path, "linear", 0, [True] * 8)
    assert experiment_sections(tmp_path) == []


def write_rows(manifest: Path, rows: list[dict]) -> None:
    manifest.parent.mkdir(exist_ok=True)
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_rows_alone_are_those_with_one_input(tmp_path):
    rows = [{"media": [["audio", "a.wav"]]}, {"media": [["audio", "a.wav"], "audio: a loud four"]}]
    write_rows(tmp_path / "questions" / "audio-train.jsonl", rows)
    assert rows_alone(tmp_path, "audio").read_text() == json.dumps(rows[0]) + "\n"


def test_augmented_rows_are_both_kinds_of_questions_about_one_modality(tmp_path):
    heard, seen = {"audio": "a.wav", "question": "loud?"}, {"image": "a.png", "question": "red?"}
    write_rows(tmp_path / "augment" / "questions.jsonl", [heard, seen])
    write_rows(tmp_path / "augment" / "yes_no.jsonl", [seen, heard])
    assert rows_augmented(tmp_path, "audio").read_text() == 2 * (json.dumps(heard) + "\n")


def test_without_a_build_one_line_says_what_to_run(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["experiments", "--parts", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"rows.jsonl is missing. Run xblip_numerals.build first"):
        main()


def test_without_questions_of_augment_one_line_says_what_makes_them(tmp_path, monkeypatch):
    for place in ("report/rows.jsonl", "llm/config.json"):
        (tmp_path / place).parent.mkdir()
        (tmp_path / place).write_text("")
    monkeypatch.setattr("sys.argv", ["experiments", "--parts", str(tmp_path), "--only", "augmented"])
    with pytest.raises(
        SystemExit, match=r"questions.jsonl is missing. Run xblip augment configs/augment/numerals.yaml"
    ):
        main()
