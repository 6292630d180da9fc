"""Training that goes wrong: what is told, what is kept, and what a resumed run must share."""

import json
import os
import re
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from kit import FileToy, registered, train_whole_and_broken, written_by_another
from safetensors.torch import load_file

from xblip import cli_train
from xblip.bridge import QFormerBridge
from xblip.errors import BundleError, ConfigError, InputError, MediaError, XBlipError
from xblip.model import XBlip
from xblip.testing import ToyModality
from xblip.train import train

pytestmark = pytest.mark.slow  # most of them train, some twice


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


def test_resuming_ends_where_an_unbroken_run_ends(config):
    config.data.eval = None
    folders = train_whole_and_broken(config, steps=12)
    state = json.loads((folders[1] / "trainer_state.json").read_text())
    assert state["global_step"] == 12
    whole, resumed = (load_file(folder / "bridge.safetensors") for folder in folders)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


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


def test_resuming_from_nothing_is_an_error(config):
    with pytest.raises(ConfigError, match=r"no checkpoint in .* to resume from"):
        train(config, resume=True)


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_media_are_one_clear_error_wherever_they_are_read(config, manifest, workers):
    bad = {"toy": [1], "instruction": "what", "answer": "yes"}
    manifest.write_text("".join(json.dumps(row) + "\n" for row in [bad] * 16))
    config.training |= {"dataloader_num_workers": workers, "max_steps": 1}
    with pytest.raises(InputError) as caught:
        train(config)
    assert str(caught.value).startswith(str(manifest)) and "Traceback" not in str(caught.value)


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth"])
def test_a_damaged_checkpoint_is_named(config, tmp_path, file):
    config.training |= {"max_steps": 2, "save_steps": 2}
    config.data.eval = None
    train(config)
    (tmp_path / "run" / "checkpoint-2" / file).write_text("")
    config.training["max_steps"] = 4
    with pytest.raises(BundleError, match="The checkpoint in .*checkpoint-2 is damaged: .* train without --resume"):
        train(config, resume=True)


def test_a_checkpoint_of_a_branch_alone_is_not_gone_on_from(config):
    config.training |= {"max_steps": 2, "save_steps": 2, "save_only_model": True}
    config.data.eval = None
    train(config)
    config.training["max_steps"] = 4
    with pytest.raises(ConfigError, match=r"checkpoint-2 lacks optimizer\.pt and scheduler\.pt.*: .* init\.folder"):
        train(config, resume=True)


def test_a_checkpoint_without_random_state_is_not_gone_on_from(config, tmp_path):
    config.training |= {"max_steps": 2, "save_steps": 2}
    config.data.eval = None
    train(config)
    (tmp_path / "run" / "checkpoint-2" / "rng_state.pth").unlink()
    config.training["max_steps"] = 4
    with pytest.raises(ConfigError, match=r"checkpoint-2 lacks rng_state\.pth"):
        train(config, resume=True)


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
            lambda config, file: setattr(config.data, "group_by_length", True),
            "data.group_by_length was False, is True",
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
    assert "train_loss" not in train(config, resume=True)
    after = load_file(Path(config.training["output_dir"], "bridge.safetensors"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads(Path(config.training["output_dir"], "trainer_state.json").read_text())["global_step"] == 4


def test_a_folder_with_checkpoints_is_not_trained_over(config):
    config.training |= {"max_steps": 2, "save_steps": 2}
    config.data.eval = None
    train(config)
    with pytest.raises(ConfigError, match="holds checkpoints of an earlier run: go on from the last by --resume"):
        train(config)


@pytest.mark.parametrize("name", ["README.md", "store.yaml", "tokenizer/vocab.txt", "model.safetensors"])
def test_an_output_folder_that_holds_something_else_is_refused(config, tmp_path, name):
    file = tmp_path / "run" / name
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    with pytest.raises(ConfigError, match=rf"run is not empty, .* such as {name.split('/')[0]}: choose another"):
        train(config)
    assert file.read_text() == "mine"


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [("checkpoint-7", r"go on from .*run/checkpoint-7 with --resume"), ("", "run holds no checkpoint yet")],
)
def test_a_run_that_is_interrupted_says_how_to_go_on(monkeypatch, tmp_path, capsys, checkpoint, message):
    (tmp_path / "run" / checkpoint).mkdir(parents=True)
    (tmp_path / "run.yaml").write_text("{}")

    def interrupted(settings, resume):
        raise KeyboardInterrupt

    monkeypatch.setattr("xblip.train.train", interrupted)
    settings = SimpleNamespace(training={"output_dir": str(tmp_path / "run")})
    monkeypatch.setattr("xblip.train_config.load_train_config", lambda *given: settings)
    with pytest.raises(KeyboardInterrupt):
        cli_train.train(tmp_path / "run.yaml")
    assert re.search(message, capsys.readouterr().err)


def test_a_trained_branch_is_not_trained_over(config, tmp_path):
    config.training |= {"max_steps": 1, "save_strategy": "no"}
    config.data.eval = None
    train(config)
    before = (tmp_path / "run" / "bridge.safetensors").read_bytes()
    config.training |= {"max_steps": 2}
    with pytest.raises(
        ConfigError, match=r"run is not empty, .* such as README.md, branch.yaml, bridge.safetensors and"
    ):
        train(config)
    assert (tmp_path / "run" / "bridge.safetensors").read_bytes() == before


def test_what_a_run_leaves_that_died_before_its_first_checkpoint_is_in_no_ones_way(config, tmp_path):
    config.training |= {"max_steps": 1, "save_strategy": "no"}
    config.data.eval = None
    (tmp_path / "run" / "runs").mkdir(parents=True)
    (tmp_path / "run" / "unfinished-checkpoint-5").mkdir()
    (tmp_path / "run" / "skipped.jsonl").write_text("")
    train(config)
    assert (tmp_path / "run" / "bridge.safetensors").is_file()


@pytest.mark.slow
def test_two_runs_do_not_write_into_one_folder(config, tmp_path):
    (tmp_path / "run").mkdir()
    with (
        written_by_another(tmp_path / "run", "xblip train"),
        pytest.raises(BundleError, match=r"Another xblip train is writing into .*run: wait for it, or give another"),
    ):
        train(config)


class TestResumedWithOtherSettings:
    """What decides how a run goes on is what it is told when it goes on."""

    @pytest.fixture
    def first(self, config):
        config.training |= {"max_steps": 4, "save_steps": 2, "logging_steps": 1, "lr_scheduler_type": "constant"}
        config.data.eval = None
        config.branch.bridge["dropout"] = 0.0
        train(config)
        config.training["max_steps"] = 6
        return config

    def logged(self, config, name):
        state = json.loads(Path(config.training["output_dir"], "trainer_state.json").read_text())
        return {entry["step"]: entry[name] for entry in state["log_history"] if name in entry}

    def test_learning_rate_and_decay(self, first):
        before = first.training["learning_rate"]
        first.training |= {"learning_rate": before / 8, "weight_decay": 0.25}
        train(first, resume=True)
        rates = self.logged(first, "learning_rate")
        assert rates[4] == pytest.approx(before) and rates[5] == rates[6] == pytest.approx(before / 8)
        saved = torch.load(Path(first.training["output_dir"], "checkpoint-6", "optimizer.pt"), weights_only=True)
        assert max(group["weight_decay"] for group in saved["param_groups"]) == 0.25

    def test_how_often_it_saves_and_tells(self, first):
        first.training |= {"save_steps": 1, "logging_steps": 2}
        train(first, resume=True)
        saved = {path.name for path in Path(first.training["output_dir"]).glob("checkpoint-*")}
        assert saved == {f"checkpoint-{step}" for step in (2, 4, 5, 6)}
        assert sorted(self.logged(first, "learning_rate")) == [1, 2, 3, 4, 6]


def test_a_worker_that_is_killed_is_one_clear_error(files):
    files.training |= {"dataloader_num_workers": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileToy, "load", lambda self, source: os.kill(os.getpid(), signal.SIGKILL))
        with pytest.raises(XBlipError, match=r"A process that reads data died: .*dataloader_num_workers"):
            train(files)


def test_a_worker_that_is_killed_in_an_evaluation_is_one_clear_error(files):
    files.training |= {"dataloader_num_workers": 1, "eval_on_start": True, "eval_strategy": "steps", "eval_steps": 4}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileToy, "load", lambda self, source: os.kill(os.getpid(), signal.SIGKILL))
        with pytest.raises(XBlipError, match=r"A process that reads data died: .*dataloader_num_workers"):
            train(files)


@pytest.mark.parametrize("full", ["metrics.json", "curves.png", "trainer_state.json"])
def test_a_disk_that_fills_is_one_clear_error_whatever_was_being_written(config, full, monkeypatch):
    config.training |= {"max_steps": 2, "save_strategy": "no", "report_to": "none"}
    output = Path(config.training["output_dir"])
    output.mkdir()
    (output / full).symlink_to("/dev/full")
    monkeypatch.setattr("xblip.train.check_output", lambda folder: None)  # it was not there when the run began
    with pytest.raises(BundleError, match=r"Cannot write .*run: .*No space left on device.*--resume"):
        train(config)


def test_the_output_folder_may_be_a_disk_of_its_own(config, small_disk):
    config.training |= {"max_steps": 1, "save_strategy": "no", "report_to": "none", "output_dir": str(small_disk)}
    config.data.eval = None
    train(config)
    assert (small_disk / "bridge.safetensors").is_file() and (small_disk / "tokenizer").is_dir()
    assert not list(small_disk.parent.glob("unfinished-*"))


@pytest.mark.parametrize("name", ["train", "eval"])
def test_a_prompt_that_is_too_long_is_told_with_its_row(config, manifest, tmp_path, name):
    row = json.loads(manifest.read_text().splitlines()[0])
    rows = [row, {**row, "instruction": "what " * 300}]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    setattr(config.data, name, str(tmp_path / "long.jsonl"))
    config.training |= {"max_steps": 1, "save_strategy": "no"}
    with pytest.raises(InputError, match=r"prompt is too long .* It is [^;]*long\.jsonl, line 2\.$"):
        train(config)
