"""Training of one branch: what learns, what is saved, resuming, and the errors of a config."""

import json

import pytest
import torch
from safetensors.torch import load_file

from xblip.branch import BranchConfig
from xblip.errors import ConfigError, InputError
from xblip.llm import LLMConfig
from xblip.model import XBlip
from xblip.testing import small_qformer
from xblip.train import DataConfig, TrainConfig, load_train_config, train, training_arguments


@pytest.fixture
def manifest(tmp_path):
    """Rows of four numbers; the answer tells whether the first is positive."""
    generator = torch.Generator().manual_seed(0)
    with (tmp_path / "train.jsonl").open("w") as file:
        for _ in range(64):
            values = torch.randn(4, generator=generator)
            row = {"toy": values.tolist(), "instruction": "what is this ?", "answer": "yes" if values[0] > 0 else "no"}
            file.write(json.dumps(row) + "\n")
    return tmp_path / "train.jsonl"


@pytest.fixture
def config(tmp_path, manifest, llm_folder, toy):
    return TrainConfig(
        llm=LLMConfig(source=str(llm_folder), dtype="float32"),
        branch=BranchConfig("toy", bridge=small_qformer(llm_folder)),
        data=DataConfig(train=str(manifest), eval=str(manifest), eval_answers=64),
        training={
            "output_dir": str(tmp_path / "run"),
            "max_steps": 60,
            "per_device_train_batch_size": 16,
            "learning_rate": 5e-3,
            "save_steps": 30,
            "report_to": ["tensorboard"],
            "use_cpu": True,
            "disable_tqdm": True,
        },
        generation={"max_new_tokens": 2},
    )


def test_a_branch_learns_and_is_composed(config, llm_folder, tmp_path, capsys):
    metrics = train(config)
    assert metrics["eval_accuracy"] >= 0.9
    shown = capsys.readouterr().out
    assert "frozen" in shown and "trains" in shown and "LlamaForCausalLM" in shown
    model = XBlip.compose(llm=llm_folder, branches={"toy": tmp_path / "run"})
    answers = [model.ask("what is this ?", toy=[sign * 2.0, 0, 0, 0], max_new_tokens=2).text for sign in (1, -1)]
    assert answers == ["yes", "no"]


def test_a_checkpoint_is_a_branch_and_holds_only_the_bridge(config, tmp_path):
    config.training["max_steps"] = 30
    train(config)
    checkpoint = tmp_path / "run" / "checkpoint-30"
    weights = load_file(checkpoint / "bridge.safetensors")
    assert "query_tokens" in weights and not any("encoder.embed" in name or "llm" in name for name in weights)
    assert (checkpoint / "branch.yaml").is_file() and (checkpoint / "optimizer.pt").is_file()
    assert not list(checkpoint.glob("model*"))
    assert list((tmp_path / "run").rglob("events.out.tfevents.*"))


def test_resuming_ends_where_an_unbroken_run_ends(config, tmp_path):
    train(config)
    whole = load_file(tmp_path / "run" / "bridge.safetensors")
    config.training["output_dir"] = str(tmp_path / "broken")
    config.training["max_steps"] = 30
    config.training["lr_scheduler_type"] = "constant"
    train(config)
    config.training["max_steps"] = 60
    train(config, resume=True)
    state = json.loads((tmp_path / "broken" / "trainer_state.json").read_text())
    assert state["global_step"] == 60
    config.training["output_dir"] = str(tmp_path / "whole")
    train(config)
    whole = load_file(tmp_path / "whole" / "bridge.safetensors")
    resumed = load_file(tmp_path / "broken" / "bridge.safetensors")
    assert all(torch.allclose(whole[name], resumed[name], atol=1e-5) for name in whole)


def test_resuming_from_nothing_is_an_error(config):
    with pytest.raises(ConfigError, match=r"no checkpoint in .* to resume from"):
        train(config, resume=True)


def test_a_misspelt_training_argument_suggests_the_right_one(config):
    config.training["learning_rte"] = 1e-3
    with pytest.raises(ConfigError, match='Unknown key "training.learning_rte". Did you mean "learning_rate"'):
        training_arguments(config)


def test_a_misspelt_bridge_setting_suggests_the_right_one(config):
    config.branch.bridge["num_query_token"] = 8
    with pytest.raises(ConfigError, match='"toy.bridge.num_query_token". Did you mean "num_query_tokens"'):
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
    from xblip.data import Manifest
    from xblip.errors import XBlipError
    from xblip.testing import ToyModality

    first = manifest.read_text().splitlines()[0]
    manifest.write_text(f"{first}\n{line}\n")
    with pytest.raises(XBlipError, match=message):
        Manifest(manifest, modalities={"toy": ToyModality()})[1]


def test_a_row_without_an_answer_stops_training(config, manifest):
    manifest.write_text('{"toy": [1, 2, 3, 4], "instruction": "what"}\n')
    config.training["max_steps"] = 1
    with pytest.raises(InputError, match="each with an answer"):
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
