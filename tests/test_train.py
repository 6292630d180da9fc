"""Training of one branch: what learns, what is saved, resuming, and the errors of a config."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from kit import registered
from safetensors.torch import load_file

from xblip import config as configs
from xblip.branch import BranchConfig
from xblip.bridge import QFormerBridge
from xblip.data import Manifest
from xblip.encoding import Job
from xblip.errors import BundleError, ConfigError, InputError, MediaError, UnknownWordsWarning, XBlipError
from xblip.initial import InitConfig
from xblip.llm import LLMConfig
from xblip.model import XBlip
from xblip.precompute import precompute as stored
from xblip.testing import ToyModality, small_qformer
from xblip.train import train
from xblip.train_config import DataConfig, TrainConfig, load_train_config, training_arguments
from xblip.trainer import BridgeTrainer


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


@pytest.mark.parametrize(("eval_steps", "times"), [(10, 2), (15, 2), (40, 1)])
def test_the_last_weights_are_evaluated_once(config, monkeypatch, eval_steps, times):
    evaluated = []
    evaluate = BridgeTrainer.evaluate

    def counted(self, *args, **kwargs):
        evaluated.append(1)
        return evaluate(self, *args, **kwargs)

    monkeypatch.setattr(BridgeTrainer, "evaluate", counted)
    config.training |= {"max_steps": 20, "save_steps": 20, "eval_strategy": "steps", "eval_steps": eval_steps}
    metrics = train(config)
    assert len(evaluated) == times and {"eval_loss", "eval_accuracy", "train_loss"} <= set(metrics)
    assert json.loads(Path(config.training["output_dir"], "metrics.json").read_text()) == metrics


def test_a_checkpoint_is_a_branch_and_holds_only_the_bridge(config, tmp_path):
    config.training["max_steps"] = 30
    train(config)
    checkpoint = tmp_path / "run" / "checkpoint-30"
    weights = load_file(checkpoint / "bridge.safetensors")
    assert "query_tokens" in weights and not any("encoder.embed" in name or "llm" in name for name in weights)
    assert (checkpoint / "branch.yaml").is_file() and (checkpoint / "optimizer.pt").is_file()
    assert not list(checkpoint.glob("model*"))
    assert list((tmp_path / "run").rglob("events.out.tfevents.*"))


class FileToy(ToyModality):
    """Toys from text files; counts what its encoder reads."""

    name = "file_toy"
    cue = "input : "
    encoded = 0

    def load(self, source):
        return super().load([float(word) for word in Path(source).read_text().split()])

    def build_encoder(self):
        encoder = super().build_encoder()
        encoder.register_forward_pre_hook(lambda _, args, taken: self.count(taken["values"]), with_kwargs=True)
        return encoder

    @classmethod
    def count(cls, values):
        cls.encoded += len(values)


@pytest.fixture
def files(config, manifest):
    """The manifest's rows as files, four rows a file; and a config that trains on them."""
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    for number in range(0, len(rows), 4):
        values = rows[number].pop("toy")
        (manifest.parent / f"{number}.txt").write_text(" ".join(map(str, values)))
        for row in rows[number : number + 4]:
            row.pop("toy", None)
            row["file_toy"], row["answer"] = f"{number}.txt", rows[number]["answer"]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config.branch.modality = "file_toy"
    config.training["max_steps"] = 12
    with registered(FileToy):
        yield config


@pytest.fixture
def store(files, tmp_path):
    """The features of these files."""
    stored(Job(files.branch, str(tmp_path / "store"), dtype="float32", use_cpu=True), [manifest_of(files)])
    return tmp_path / "store"


def manifest_of(config):
    return Manifest(config.data.train, modalities={"file_toy": FileToy()})


@pytest.mark.parametrize("workers", [0, 1])
def test_stored_features_train_the_same_and_nothing_is_encoded(files, store, workers):
    runs = []
    for features in (None, str(store)):
        files.data.features = features
        files.training |= {
            "output_dir": f"{files.training['output_dir']}-{bool(features)}",
            "dataloader_num_workers": workers,
            "logging_steps": 1,
        }
        FileToy.encoded = 0
        train(files)
        assert FileToy.encoded == 0 if features else FileToy.encoded > 12 * 16
        output = Path(files.training["output_dir"])
        log = json.loads((output / "trainer_state.json").read_text())["log_history"]
        runs.append(([entry["loss"] for entry in log if "loss" in entry], output))
    assert len(runs[0][0]) == 12 and runs[0][0] == runs[1][0]
    for file in ("bridge.safetensors", "branch.yaml", "README.md"):
        assert (runs[0][1] / file).read_bytes() == (runs[1][1] / file).read_bytes()


def test_a_file_that_changed_since_its_features_were_stored_is_named(files, store, manifest):
    (manifest.parent / "32.txt").write_text("9 9 9 9")
    files.data.features = str(store)
    with pytest.raises(BundleError, match=r"32\.txt.*xblip precompute"):
        train(files)


def test_features_of_another_encoder_are_refused_with_what_differs(files, store):
    files.data.features = str(store)
    files.branch.config = {"seed": 5}
    with pytest.raises(
        BundleError, match=r"not those of this config's encoder: .*settings\.seed is 5 here and 0 there"
    ):
        train(files)


def test_features_of_a_modality_without_a_branch_are_refused(config, files, store, tmp_path):
    files.data.features = [str(store), str(store)]
    with pytest.raises(ConfigError, match="of the modality file_toy, as those in .* are"):
        train(files)


@pytest.fixture
def broken(files, manifest):
    """Such files, of which one is broken."""
    (manifest.parent / "32.txt").write_text("1 2 3")
    return files


def test_a_broken_file_costs_its_rows_and_is_named(broken):
    broken.data.max_skipped = 0.1
    metrics = train(broken)
    output = Path(broken.training["output_dir"])
    rows = [json.loads(line) for line in (output / "skipped.jsonl").read_text().splitlines()]
    assert sorted(int(row["origin"].rsplit(" ", 1)[1]) for row in rows) == [33, 34, 35, 36]
    assert all("A toy input must be rows of four numbers" in row["reason"] for row in rows)
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    assert [entry["skipped"] for entry in log if "loss" in entry] == [4]
    assert metrics["eval_accuracy"] > 0


def test_too_many_broken_files_stop_the_run(broken):
    with pytest.raises(MediaError, match=r"of 128 rows are skipped .* more than max_skipped = 0\.01 allows"):
        train(broken)


def test_a_bridge_starts_from_another_branch_and_tells_what_it_took(config, tmp_path, capsys):
    config.training |= {"max_steps": 2, "learning_rate": 0.0}
    train(config)
    first = load_file(tmp_path / "run" / "bridge.safetensors")
    config.training["output_dir"] = str(tmp_path / "second")
    config.training["seed"] = 9
    config.init = InitConfig(str(tmp_path / "run"), without=["projector"])
    config.branch.bridge["num_query_tokens"] += 1
    train(config)
    second = load_file(tmp_path / "second" / "bridge.safetensors")
    same = {
        name for name in first if first[name].shape == second[name].shape and torch.equal(first[name], second[name])
    }
    assert set(first) - same == {"query_tokens", "projector.weight", "projector.bias"}
    shown = " ".join(capsys.readouterr().out.split())
    assert f"{len(first) - 3} weights taken; fresh: query_tokens (1), projector (2)" in shown


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


def test_a_frozen_q_former_trains_its_projector_alone_and_resumes(config, tmp_path):
    config.training |= {"max_steps": 1, "save_steps": 1}
    config.data.eval = None
    config.branch.bridge["max_segments"] = 0
    train(config)
    given = load_file(tmp_path / "run" / "bridge.safetensors")
    config.branch.bridge |= {"kind": "frozen_qformer", "instruction_aware": True, "qformer": str(tmp_path / "run")}
    config.training |= {"output_dir": str(tmp_path / "frozen"), "max_steps": 2}
    train(config)
    config.training["max_steps"] = 3
    train(config, resume=True)
    trained = load_file(tmp_path / "frozen" / "bridge.safetensors")
    assert {name for name in given if not given[name].equal(trained[name])} == {"projector.weight", "projector.bias"}


def test_words_the_llm_does_not_know_are_told_at_the_start(config):
    config.training["max_steps"] = 1
    config.data.eval = None
    config.branch.cue, config.router.postfix = "red :", "glorp :"
    with pytest.warns(UnknownWordsWarning, match='does not know "glorp" in "glorp :"'):
        train(config)


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


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_media_are_one_clear_error_wherever_they_are_read(config, manifest, workers):
    bad = {"toy": [1], "instruction": "what", "answer": "yes"}
    manifest.write_text("".join(json.dumps(row) + "\n" for row in [bad] * 16))
    config.training |= {"dataloader_num_workers": workers, "max_steps": 1}
    with pytest.raises(InputError) as caught:
        train(config)
    assert str(caught.value).startswith(str(manifest)) and "Traceback" not in str(caught.value)


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
        ({"resume_from_checkpoint": "zz"}, "training.resume_from_checkpoint has no place here: .* --resume"),
    ],
)
def test_a_training_setting_that_cannot_work_is_one_clear_error(config, settings, message):
    config.training |= settings
    config.data.eval = None
    with pytest.raises(ConfigError, match=message):
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


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth"])
def test_a_damaged_checkpoint_is_named(config, tmp_path, file):
    config.training |= {"max_steps": 2, "save_steps": 2}
    config.data.eval = None
    train(config)
    (tmp_path / "run" / "checkpoint-2" / file).write_text("")
    config.training["max_steps"] = 4
    with pytest.raises(BundleError, match="The checkpoint in .*checkpoint-2 is damaged: .* train without --resume"):
        train(config, resume=True)


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


def test_a_loss_that_is_no_number_stops_the_run_and_names_its_rows(config, manifest):
    config.training |= {"max_steps": 6, "save_steps": 2, "logging_steps": 1}
    config.data.eval = None
    lines = manifest.read_text().splitlines()[:16]
    with registered(Poisoned):
        config.branch.modality = "poisoned"
        rows = [{**json.loads(line), "poisoned": json.loads(line)["toy"]} for line in lines]
        manifest.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "toy"}) + "\n" for row in rows))
        Poisoned.after = 4
        with pytest.raises(XBlipError, match=r"The loss at step 5 is nan, of these rows: .*train\.jsonl, line \d+"):
            train(config)
        folders = sorted(path.name for path in Path(config.training["output_dir"]).glob("checkpoint-*"))
        assert folders == ["checkpoint-2", "checkpoint-4"]
        Poisoned.after = 100
        train(config, resume=True)
    assert json.loads(Path(config.training["output_dir"], "trainer_state.json").read_text())["global_step"] == 6


class Poisoned(ToyModality):
    """Toys whose features are no numbers after some batches."""

    name = "poisoned"
    cue = "input : "
    after = 0

    def build_encoder(self):
        encoder = super().build_encoder()
        batches = []

        def poison(module, taken, given):
            batches.append(1)
            return given * float("nan") if len(batches) > Poisoned.after else given

        encoder.register_forward_hook(poison)
        return encoder


def test_a_gradient_that_is_no_number_is_not_learnt(config):
    config.training |= {"max_steps": 3, "save_steps": 1, "max_grad_norm": 1.0}
    config.data.eval = None

    class Exploding(ToyModality):
        name = "toy"

    def explode(self, *args, **kwargs):
        outputs = forward(self, *args, **kwargs)
        outputs["loss"].register_hook(lambda gradient: gradient * float("inf"))
        return outputs

    forward = XBlip.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(XBlip, "forward", explode)
        with pytest.raises(XBlipError, match=r"The gradient at step 1 is (nan|inf), of these rows"):
            train(config)
    assert not list(Path(config.training["output_dir"]).glob("checkpoint-*"))


def test_a_config_that_freezes_everything_is_refused(config, tmp_path, monkeypatch):
    config.training |= {"max_steps": 1}
    monkeypatch.setattr(QFormerBridge, "build_heads", frozen_heads)
    with pytest.raises(ConfigError, match="Nothing would train: all weights of this config are frozen"):
        train(config)


def frozen_heads(self, config, llm_width):
    self.projector = torch.nn.Linear(config.hidden_size, llm_width)
    self.requires_grad_(False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config, file: config.branch.bridge.update(num_query_tokens=7), "num_query_tokens was 4, is 7"),
        (lambda config, file: config.training.update(seed=3), "seed was 42, is 3"),
        (lambda config, file: config.training.update(per_device_train_batch_size=8), "rows_in_a_step was 16, is 8"),
        (
            lambda config, file: file.write_text(file.read_text().replace("yes", "no")),
            r"data\.contents\..*train\.jsonl was",
        ),
        (lambda config, file: setattr(config.branch, "config", {"seed": 4}), r"branches\.toy\.modality\.encoder was"),
        (lambda config, file: setattr(config.router, "postfix", " answer :"), "router.postfix was '', is ' answer :'"),
        (
            lambda config, file: setattr(config.data, "group_by_length", False),
            "data.group_by_length was True, is False",
        ),
    ],
)
def test_a_resumed_run_of_other_data_or_model_is_refused(config, manifest, change, message):
    config.training |= {"max_steps": 2, "save_steps": 2}
    config.data.eval = None
    train(config)
    change(config, manifest)
    config.training["max_steps"] = 4
    with pytest.raises(ConfigError, match=f"This is not the run that wrote .*{message}"):
        train(config, resume=True)


def test_a_run_that_has_ended_is_resumed_to_no_effect(config):
    config.training |= {"max_steps": 4, "save_steps": 3}
    config.data.eval = None
    train(config)
    before = load_file(Path(config.training["output_dir"], "bridge.safetensors"))
    train(config, resume=True)
    after = load_file(Path(config.training["output_dir"], "bridge.safetensors"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads(Path(config.training["output_dir"], "trainer_state.json").read_text())["global_step"] == 4


def test_a_folder_with_checkpoints_is_not_trained_over(config):
    config.training |= {"max_steps": 2, "save_steps": 2}
    config.data.eval = None
    train(config)
    with pytest.raises(ConfigError, match="holds checkpoints of an earlier run: go on from the last by --resume"):
        train(config)


def test_a_worker_that_is_killed_is_one_clear_error(files):
    files.training |= {"dataloader_num_workers": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileToy, "load", lambda self, source: os.kill(os.getpid(), signal.SIGKILL))
        with pytest.raises(XBlipError, match=r"A process that reads data died: .*dataloader_num_workers"):
            train(files)


def test_parts_of_a_bridge_learn_at_rates_of_their_own(config, tmp_path):
    config.training |= {"max_steps": 2, "learning_rate": 0.0}
    config.data.eval = None
    config.learning_rates = {"projector": 1e-2}
    train(config)
    trained = load_file(tmp_path / "run" / "bridge.safetensors")
    config.learning_rates = {}
    config.training["output_dir"] = str(tmp_path / "still")
    train(config)
    still = load_file(tmp_path / "still" / "bridge.safetensors")
    assert {name for name in still if not still[name].equal(trained[name])} == {"projector.weight", "projector.bias"}
    config.learning_rates = {"projecter": 1e-2}
    config.training["output_dir"] = str(tmp_path / "wrong")
    with pytest.raises(ConfigError, match='learning_rates.projecter: no weight .* Did you mean "projector"'):
        train(config)


def test_curves_and_pace_are_told(config, tmp_path):
    config.training |= {"max_steps": 20, "eval_strategy": "steps", "eval_steps": 10}
    train(config)
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")
    log = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    line = next(entry for entry in log if "loss" in entry)
    assert line["samples_per_second"] > 0 and line["tokens_per_second"] > line["samples_per_second"]
    assert 0 <= line["waiting_for_data"] <= 1 and 0.05 < line["peak_memory_gib"] < 100
