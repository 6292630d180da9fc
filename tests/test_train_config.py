"""What a training config and its manifests may say, and the errors of what they may not."""

import json
import math

import pytest

from xblip import config as configs
from xblip.data import Manifest
from xblip.errors import ConfigError, InputError, PluginError, XBlipError
from xblip.testing import ToyModality
from xblip.train import train
from xblip.train_config import load_train_config, training_arguments


def test_a_misspelt_training_argument_suggests_the_right_one(config):
    config.training["learning_rte"] = 1e-3
    with pytest.raises(ConfigError, match='Unknown key "training.learning_rte". Did you mean "learning_rate"'):
        training_arguments(config)


def test_a_misspelt_bridge_setting_suggests_the_right_one(config):
    config.branch.bridge["num_query_token"] = 8
    with pytest.raises(ConfigError, match='"toy.bridge.num_query_token". Did you mean "num_query_tokens"'):
        train(config)


def test_templates_of_a_misspelt_modality_suggest_the_right_one(config):
    config.data.templates = {"tyo": "words.yaml"}
    with pytest.raises(ConfigError, match='Unknown modality "tyo" in data.templates. Did you mean "toy"'):
        train(config)


@pytest.mark.parametrize("features", [{"a": "b"}, [3]])
def test_features_are_folders(config, features):
    config.data.features = features
    with pytest.raises(ConfigError, match="data.features must be a store's folder, or a list of folders, not"):
        train(config)


def test_a_misspelt_modality_is_told_before_its_stores(config):
    config.branch.modality, config.data.features = "tyo", "nowhere"
    with pytest.raises(PluginError, match='No modality is called "tyo". Did you mean "toy"'):
        train(config)


def test_output_dir_is_asked_for(config):
    del config.training["output_dir"]
    with pytest.raises(ConfigError, match="output_dir is missing"):
        training_arguments(config)


def test_a_refused_training_value_is_one_clear_error(config):
    config.training["lr_scheduler_type"] = "sideways"
    with pytest.raises(ConfigError, match="sideways"):
        training_arguments(config)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", r"train.jsonl, line 2: not JSON"),
        ('{"toy": [1, 2, 3, 4], "answer": "yes"}', r"line 2: A sample lacks its `instruction`"),
        (
            '{"tou": [1, 2, 3, 4], "instruction": "what", "answer": "yes"}',
            r'line 2: Unknown key "tou".*Did you mean "toy"',
        ),
        ('{"toy": [1], "instruction": "what", "answer": "yes"}', r"line 2: A toy input must be rows of four numbers"),
        ('["toy"]', r"line 2: expected an object"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(config, manifest, line, message):
    first = manifest.read_text().splitlines()[0]
    manifest.write_text(f"{first}\n{line}\n")
    with pytest.raises(XBlipError, match=message):
        Manifest(manifest, modalities={"toy": ToyModality()})[1]


@pytest.mark.parametrize("name", ["train", "eval"])
@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"toy": [1, 2, 3, 4], "instruction": "what"}, "line 65: it has no answer"),
        ({"instruction": "what", "answer": "yes"}, "line 65: it has no input"),
        ({"beads": [[1]], "instruction": "what", "answer": "yes"}, 'line 65: Unknown key "beads" in a sample'),
    ],
)
def test_a_row_that_cannot_be_learnt_from_is_named_before_anything_is_loaded(
    config, manifest, tmp_path, name, row, message
):
    (tmp_path / "bad.jsonl").write_text(manifest.read_text() + json.dumps(row) + "\n")
    setattr(config.data, name, str(tmp_path / "bad.jsonl"))
    config.llm.source = "nowhere"
    with pytest.raises(InputError, match=f"bad.jsonl, {message}"):
        train(config)


@pytest.mark.parametrize("words", ["what\u2028is", "what\u2029is", "what\u0085is", "what\x0cis"])
def test_only_a_line_feed_ends_a_row(tmp_path, words):
    rows = [{"toy": [1, 2, 3, 4], "instruction": words, "answer": "yes"}] * 2
    text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "a.jsonl").write_text(text.replace("\x0c", "\\f"), encoding="utf-8-sig", newline="")
    manifest = Manifest(tmp_path / "a.jsonl", modalities={"toy": ToyModality()})
    assert [sample.instruction for sample in manifest] == [words] * 2


def test_a_manifest_that_is_no_text_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ConfigError, match=r'The manifest ".*a.jsonl" is not UTF-8 text'):
        Manifest(tmp_path / "a.jsonl", modalities={})


@pytest.mark.parametrize("place", ["", None, "file", "file/below", "/proc/none"])
def test_an_output_folder_that_cannot_be_is_named_before_anything_is_loaded(config, tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    config.training["output_dir"] = place
    config.llm.source = "nowhere"
    with pytest.raises(XBlipError, match=f"Cannot write {place}" if place else "output_dir is missing"):
        train(config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_steps": "many"}, "training.max_steps must be int, not 'many'"),
        ({"learning_rate": "fast"}, "training.learning_rate must be float, not 'fast'"),
        ({"per_device_train_batch_size": 2.5}, "training.per_device_train_batch_size must be int, not 2.5"),
        ({"use_cpu": "maybe"}, "training.use_cpu must be bool, not 'maybe'"),
        ({"bf16": 3}, "training.bf16 must be bool, not 3"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1, not 0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be at least 1, not 0"),
        ({"dataloader_num_workers": -1}, "dataloader_num_workers must be at least 0, not -1"),
        ({"seed": -1}, "seed must be at least 0, not -1"),
        ({"report_to": "bogus"}, '"training": bogus is not supported'),
        ({"eval_strategy": "steps"}, "training.eval_strategy is steps, but data.eval names no manifest"),
        ({"fsdp": "full_shard"}, "training.fsdp has no place here: .* shard_llm"),
        ({"use_liger_kernel": True}, "training.use_liger_kernel needs the package liger-kernel"),
        ({"label_smoothing_factor": 0.1}, "training.label_smoothing_factor has no place here"),
        ({"neftune_noise_alpha": 5.0}, "training.neftune_noise_alpha has no place here"),
        ({"fp16": True}, "training.fp16 needs an accelerator"),
        ({"torch_compile_backend": "egaer"}, 'Unknown training.torch_compile_backend "egaer". Did you mean "eager"'),
        ({"data_seed": 3}, "training.data_seed has no place here: .* training.seed"),
        ({"auto_find_batch_size": True}, "training.auto_find_batch_size has no place here"),
        ({"push_to_hub": True}, "training.push_to_hub has no place here"),
        ({"max_steps": 0}, "Nothing would be learnt: let training.max_steps or training.num_train_epochs be above 0"),
        ({"max_steps": -1, "num_train_epochs": 0}, "Nothing would be learnt"),
        ({"learning_rate": -1e-3}, "learning_rate must be at least 0, not -0.001"),
        ({"learning_rate": math.nan}, "learning_rate must be at least 0, not nan"),
        ({"max_steps": -5}, "Nothing would be learnt: let training.max_steps"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0, not -0.1"),
        ({"save_steps": 0}, "training.save_steps is 0: say after how many steps, .* set save_strategy to no"),
        ({"logging_steps": -5}, "training.logging_steps is -5: .* set logging_strategy to no"),
        ({"eval_steps": 0}, "training.eval_steps is 0: .* set eval_strategy to no"),
        ({"resume_from_checkpoint": "zz"}, "training.resume_from_checkpoint has no place here: .* --resume"),
    ],
)
def test_a_training_setting_that_cannot_work_is_one_clear_error(config, settings, message):
    config.training |= settings
    config.data.eval = None
    with pytest.raises(ConfigError, match=message):
        train(config)


def test_a_learning_rate_of_a_part_is_not_below_zero(config):
    config.learning_rates = {"projector": -1e-4}
    with pytest.raises(ConfigError, match=r"learning_rates.projector must be at least 0, not -0.0001"):
        train(config)


@pytest.mark.parametrize("name", ["eval_strategy", "save_strategy", "logging_strategy"])
def test_no_is_a_strategy_though_yaml_takes_it_for_false(config, name, tmp_path):
    (tmp_path / "run.yaml").write_text(f"training: {{{name}: no}}\n")
    config.training |= configs.load_yaml(tmp_path / "run.yaml")["training"]
    assert getattr(training_arguments(config), name) == "no"
    config.training[name] = "no"
    assert getattr(training_arguments(config), name) == "no"


def test_a_negative_number_of_answers_is_refused(config):
    config.data.eval_answers = -1
    with pytest.raises(ConfigError, match="eval_answers must be at least 0, not -1"):
        train(config)


def test_a_missing_or_empty_manifest_is_named(config, tmp_path):
    config.data.train = str(tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match="No manifest at"):
        train(config)
    (tmp_path / "none.jsonl").write_text("\n")
    with pytest.raises(ConfigError, match="has no rows"):
        train(config)


def test_a_config_file_with_overrides(tmp_path, llm_folder):
    (tmp_path / "base.yaml").write_text(
        f"llm: {{source: {llm_folder}}}\nbranch: {{modality: toy}}\ndata: {{train: a.jsonl}}\ntraining: {{output_dir: x}}\n"
    )
    (tmp_path / "run.yaml").write_text("base: base.yaml\ntraining: {max_steps: 5}\n")
    config = load_train_config(tmp_path / "run.yaml", ["training.max_steps=7", "branch.cue='thing: '"])
    assert config.training == {"output_dir": "x", "max_steps": 7}
    assert config.branch.cue == "thing: "
    with pytest.raises(ConfigError, match='Unknown key "config.brnch". Did you mean "branch"'):
        load_train_config(tmp_path / "run.yaml", ["brnch.modality=toy"])


@pytest.mark.parametrize(
    ("stage", "answers", "metric", "message"),
    [
        ("instruct", 8, "acuracy", '"acuracy", which no evaluation .* Did you mean "accuracy"'),
        ("instruct", 0, "accuracy", '"accuracy", which no evaluation of this run measures. Known: loss.'),
        ("align", 8, None, '"loss", which no evaluation .* Known: media_recall_at_1, text_recall_at_1'),
    ],
)
def test_the_best_checkpoint_is_chosen_by_what_is_measured(config, stage, answers, metric, message):
    config.stage, config.data.eval_answers = stage, answers
    config.training |= {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 30}
    config.training |= {"metric_for_best_model": metric} if metric else {}
    with pytest.raises(ConfigError, match=message):
        training_arguments(config)
