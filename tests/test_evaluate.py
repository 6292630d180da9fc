"""`xblip eval`: rows are asked once, killed runs go on, broken files are counted, and figures come from what was written."""

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from kit import registered

from xblip import cli, eval_model, plugins
from xblip.errors import BundleError, ConfigError, InputError, MediaError, PluginError
from xblip.eval_model import open_system
from xblip.evaluate import EvalConfig, EvalRow, EvalTask, Figure, build_task, evaluate, load_eval_config
from xblip.model import XBlip
from xblip.runs import read_lines
from xblip.sample import Media, Sample

ROWS = 10


@pytest.fixture
def questions(tmp_path):
    """A manifest of questions, all answered "one"."""
    rows = [{"toy": [float(number)] * 4, "question": "what is this ?", "answer": "one"} for number in range(ROWS)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "questions.jsonl"


@pytest.fixture
def config(bundle, questions, tmp_path, toys):
    task = {"kind": "qa", "data": str(questions), "generation": {"max_new_tokens": 2}}
    return EvalConfig(str(bundle), {"questions": task}, str(tmp_path / "out"), batch_size=3, use_cpu=True)


@pytest.fixture
def asked(monkeypatch):
    """Lets every question be answered "One." without an LLM; lists what was asked, a batch each."""
    batches = []

    def generate(self, samples, **options):
        batches.append(list(samples))
        for sample in samples:
            for media in sample.all_media:
                self.branches[media.modality].read(media.source)
        return [type("Answer", (), {"text": "One."}) for _ in samples]

    monkeypatch.setattr(XBlip, "generate", generate)
    return batches


def lines_of(config, name="questions"):
    return read_lines(Path(config.output_dir, f"{name}.jsonl"))


def test_a_model_is_asked_all_rows_and_scored(config, tmp_path):
    result = evaluate(config)["questions"]
    assert (result.kind, result.rows, result.asked, result.skipped) == ("qa", ROWS, ROWS, 0)
    assert set(result.figures) == {"normalised", "exact"}
    line = lines_of(config)[3]
    assert line["id"] == "3" and line["origin"].endswith("questions.jsonl, line 4")
    assert line["instruction"] == "what is this ?" and line["truth"] == {"one": 1}
    assert line["inputs"] == [["toy", "[3.0, 3.0, 3.0, 3.0]"]] and isinstance(line["answer"], str)
    told = json.loads((tmp_path / "out" / "results.json").read_text())
    assert told["tasks"]["questions"]["figures"]["exact"]["n"] == ROWS
    assert "| questions | exact |" in (tmp_path / "out" / "RESULTS.md").read_text()


def test_figures_and_each_row_s_score(config, asked):
    figures = evaluate(config)["questions"].figures
    assert (figures["normalised"].value, figures["exact"].value) == (1.0, 0.0)
    assert lines_of(config)[0]["scores"] == {"normalised": 1.0, "exact": 0.0}
    assert [len(batch) for batch in asked] == [3, 3, 3, 1]


def test_what_was_answered_is_not_asked_again(config, asked, monkeypatch):
    class Killed(Exception):
        pass

    whole = evaluate(config)
    everything = lines_of(config)
    config.output_dir += "-killed"
    del asked[:]
    generate = XBlip.generate

    def killed(self, samples, **options):
        if len(asked) == 2:
            raise Killed
        return generate(self, samples, **options)

    with monkeypatch.context() as patch:
        patch.setattr(XBlip, "generate", killed)
        with pytest.raises(Killed):
            evaluate(config)
    config.batch_size = 1
    assert evaluate(config) == whole
    assert [len(batch) for batch in asked] == [3, 3, 1, 1, 1, 1]
    assert lines_of(config) == everything
    evaluate(config)
    assert len(asked) == 6


def test_a_run_that_has_all_answers_loads_no_model(config, asked, monkeypatch):
    first = evaluate(config)
    monkeypatch.setattr(eval_model, "FrozenLLM", None)
    assert evaluate(config) == first


def test_another_run_is_refused(config, asked, questions):
    evaluate(config)
    config.limit = 3
    with pytest.raises(ConfigError, match="other settings: limit was None, is 3"):
        evaluate(config)
    config.limit = None
    with questions.open("a") as file:
        file.write(json.dumps({"toy": [0.0] * 4, "question": "what is this ?", "answer": "two"}) + "\n")
    with pytest.raises(ConfigError, match=r"other settings: data\.questions\..*questions\.jsonl was"):
        evaluate(config)


def test_another_model_is_refused(config, asked, bundle, tmp_path):
    evaluate(config)
    shutil.copytree(bundle, tmp_path / "moved")
    config.model = str(tmp_path / "moved")
    evaluate(config)  # the same model in another place
    card = tmp_path / "moved" / "toy" / "branch.yaml"
    card.write_text(card.read_text() + "\n# another\n")
    with pytest.raises(ConfigError, match=r"other settings: model\.branches\.toy was"):
        evaluate(config)


def test_a_sample_is_drawn_by_the_seed_and_told(config, asked, tmp_path):
    config.limit = 4
    result = evaluate(config)["questions"]
    assert (result.rows, result.asked, result.figures["exact"].n) == (ROWS, 4, 4)
    chosen = [line["id"] for line in lines_of(config)]
    assert chosen == sorted(chosen) and "sample of 10" in (tmp_path / "out" / "RESULTS.md").read_text()
    again = {}
    for seed in (config.seed, 7):
        config.seed, config.output_dir = seed, str(tmp_path / f"seed-{seed}")
        evaluate(config)
        again[seed] = [line["id"] for line in lines_of(config)]
    assert again[42] == chosen != again[7]


class TestBrokenFiles:
    @pytest.fixture
    def config(self, config, questions):
        rows = [json.loads(line) for line in questions.read_text().splitlines()]
        rows[4]["toy"] = [1.0]
        questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return config

    def test_more_than_the_allowed_share_ends_the_run(self, config, asked):
        with pytest.raises(MediaError, match=r"1 of 10 rows .* max_skipped = 0.01 allows.*line 5: A toy input must"):
            evaluate(config)

    def test_a_broken_row_is_named_and_left_out(self, config, asked):
        config.max_skipped = 0.1
        result = evaluate(config)["questions"]
        assert (result.skipped, result.figures["exact"].n) == (1, ROWS - 1)
        line = lines_of(config)[4]
        assert "A toy input must" in line["error"] and "answer" not in line
        assert [len(batch) for batch in asked] == [3, 3, 1, 1, 1, 3, 1]
        del asked[:]
        evaluate(config)
        assert [len(batch) for batch in asked] == [1], "a broken file may have been mended"

    def test_nothing_but_broken_rows(self, config, asked, questions):
        config.max_skipped = 1.0
        row = {"toy": [1.0], "question": "what is this ?", "answer": "one"}
        questions.write_text(json.dumps(row) + "\n")
        with pytest.raises(MediaError, match=r"tasks\.questions: no row could be read"):
            evaluate(config)


def test_what_is_wrong_with_a_row_names_the_row(config):
    config.tasks["questions"]["generation"] = {"max_new_tokens": 1000}
    with pytest.raises(InputError, match=r"questions\.jsonl, line 1: The prompt is too long"):
        evaluate(config)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"tasks": {}}, ConfigError, "tasks is empty"),
        ({"tasks": {"a/b": {"kind": "qa"}}}, ConfigError, '"a/b" names files too'),
        ({"tasks": {"a": {"data": "x"}}}, ConfigError, r'tasks\.a lacks its "kind": add one of .*qa'),
        ({"tasks": {"a": {"kind": "q"}}}, PluginError, 'No task is called "q".*qa'),
        ({"tasks": {"a": {"kind": "qa"}}}, ConfigError, r'"tasks\.a" lacks its "data"'),
        ({"tasks": {"a": {"kind": "qa", "data": "x", "promt": ""}}}, ConfigError, 'Unknown key "tasks.a.promt"'),
        ({"tasks": {"a": {"kind": "qa", "data": "none.jsonl"}}}, ConfigError, r"tasks\.a: No manifest at"),
        ({"tasks": {"a": {"kind": "qa", "data": []}}}, ConfigError, "names no manifest"),
        ({"tasks": {"a": {"kind": "qa", "data": "x", "prompt": "what ?"}}}, ConfigError, "must hold {question} once"),
        ({"batch_size": 0}, ConfigError, "batch_size must be at least 1"),
        ({"limit": 0}, ConfigError, "limit must be at least 1"),
        ({"max_skipped": 2.0}, ConfigError, "max_skipped is a share"),
        ({"media": {"toys": {}}}, ConfigError, 'media has settings of "toys".*toy'),
        ({"media": {"toy": {"wide": 1}}}, ConfigError, 'Unknown key "toy.config.wide"'),
        ({"model": 3}, ConfigError, "model must be a bundle's name"),
        ({"model": "no/such"}, BundleError, 'There is no bundle "no/such"'),
    ],
)
def test_mistakes_are_told_before_anything_is_loaded(config, changes, error, message, monkeypatch):
    monkeypatch.setattr(eval_model, "FrozenLLM", None)
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(error, match=message):
        evaluate(config)


def test_a_model_may_be_composed_in_the_config(config, bundle, asked):
    parts = yaml.safe_load((bundle / "config.yaml").read_text())
    parts["llm"]["source"] = str(bundle / "llm")
    parts["branches"] = {name: str(bundle / name) for name in parts["branches"]}
    named = open_system(config.model, {}, {})
    composed = open_system(parts, {}, {})
    assert composed.facts == named.facts and composed.name == "llm + toy + beads"
    config.model = parts
    assert evaluate(config)["questions"].figures["normalised"].value == 1.0
    with pytest.raises(ConfigError, match=r"say these options in model\.llm"):
        open_system(parts, {"dtype": "float32"}, {})
    parts["branches"] = {"toy": {"config": {}}}
    with pytest.raises(ConfigError, match=r"branches\.toy"):
        open_system(parts, {}, {})


def test_media_may_be_read_otherwise_than_was_saved(config, asked, toys):
    system = open_system(config.model, {}, {"beads": {"span": 24}})
    assert system.facts["media"] == {"beads": {"span": 24}} and system.modalities["beads"].config.span == 24
    other = open_system(config.model, {}, {"beads": {"seed": 5}})
    with pytest.raises(BundleError, match="was trained on an encoder with fingerprint"):
        other.load(torch.device("cpu"))


class Loudness(EvalTask):
    """Which of several numbers is the first one; a plugin's own task, with a page of its own."""

    name = "loudness"

    @dataclass
    class Config(EvalTask.Config):
        """`data`: lists of four numbers."""

        data: list[list[float]]

    def rows(self, modalities):
        return [
            EvalRow(
                str(index), Sample("what ?", [Media("toy", values, "describe it")]), values[0], unit=str(index // 2)
            )
            for index, values in enumerate(self.config.data)
        ]

    def predict(self, model, rows):
        return [{"answer": row.sample.media[0].source[0]} for row in rows]

    def score(self, lines):
        return {"right": Figure.of(lines, [line["answer"] == line["truth"] for line in lines])}

    def report(self, place, lines, measured):
        place.with_suffix(".md").write_text(f"{measured['right'].value} of {len(lines)}")


def test_a_task_of_one_s_own(config, tmp_path):
    with registered(Loudness):
        config.tasks = {"loud": {"kind": "loudness", "data": [[1.0, 0.0, 0.0, 0.0]] * 6}}
        right = evaluate(config)["loud"].figures["right"]
        assert (right.value, right.n, right.units) == (1.0, 6, 3)
        assert (tmp_path / "out" / "loud.md").read_text() == "1.0 of 6"
        config.limit, config.output_dir = 2, str(tmp_path / "few")
        assert evaluate(config)["loud"].asked == 4, "rows of one unit stay together"
    with pytest.raises(PluginError, match='No task is called "loudness"'):
        build_task("loud", {"kind": "loudness", "data": []})


def test_only_tasks_modalities_and_bridges_can_be_registered():
    with pytest.raises(PluginError, match="nor an xblip.evaluate.EvalTask"):
        plugins.register(dict)


def test_an_input_may_have_an_instruction_of_its_own(model):
    own = [Sample("what is this ?", [Media("toy", [1.0] * 4, "describe it"), Media("toy", [1.0] * 4)])]
    common = [Sample(text, [("toy", [1.0] * 4)]) for text in ("describe it", "what is this ?")]
    [[first, second]], [[one], [other]] = model.soft_prompts(own), model.soft_prompts(common)
    assert first.allclose(one, atol=1e-5) and second.allclose(other, atol=1e-5)
    assert not first.allclose(second, atol=1e-3)


def test_the_command(config, tmp_path, monkeypatch, capsys, asked):
    path = tmp_path / "eval.yaml"
    values = {name: getattr(config, name) for name in ("model", "tasks", "output_dir", "use_cpu")}
    path.write_text(yaml.safe_dump(values))
    assert load_eval_config(path, ["batch_size=5"]).batch_size == 5
    monkeypatch.setattr(sys, "argv", ["xblip", "eval", str(path), "limit=4"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    shown = capsys.readouterr().out.splitlines()
    assert not ended.value.code and shown[-1] == f"wrote {config.output_dir}"
    assert shown[1].split() == "questions normalised 100.0 39.8 to 100.0 4 (sample of 10) 0".split()
