"""Training: what learns, what is told and saved, stored features, initial weights."""

import json
from pathlib import Path

import pytest
import torch
from kit import FileToy
from safetensors.torch import load_file

from xblip.branch import BranchConfig
from xblip.data import Manifest
from xblip.encoding import Job
from xblip.errors import BundleError, ConfigError, UnknownWordsWarning
from xblip.initial import InitConfig
from xblip.meters import Meter
from xblip.model import Answer, XBlip
from xblip.precompute import precompute as stored
from xblip.train import train
from xblip.trainer import BridgeTrainer


def test_a_branch_learns_and_is_composed(config, llm_folder, tmp_path, capsys):
    metrics = train(config)
    assert metrics["eval_accuracy"] >= 0.9
    shown = capsys.readouterr().out
    assert "frozen" in shown and "trains" in shown and "LlamaForCausalLM" in shown
    model = XBlip.compose(llm=llm_folder, branches={"toy": tmp_path / "run"})
    answers = [model.ask("what is this ?", toy=[sign * 2.0, 0, 0, 0], max_new_tokens=2).text for sign in (1, -1)]
    assert answers == ["yes", "no"]


@pytest.mark.slow
@pytest.mark.parametrize(("eval_steps", "times"), [(2, 2), (3, 2), (9, 1)])
def test_the_last_weights_are_evaluated_once(config, monkeypatch, eval_steps, times):
    evaluated = []
    evaluate = BridgeTrainer.evaluate

    def counted(self, *args, **kwargs):
        evaluated.append(1)
        return evaluate(self, *args, **kwargs)

    monkeypatch.setattr(BridgeTrainer, "evaluate", counted)
    config.training |= {"max_steps": 4, "save_steps": 4, "eval_strategy": "steps", "eval_steps": eval_steps}
    config.data.eval_answers = 4
    metrics = train(config)
    assert len(evaluated) == times and {"eval_loss", "eval_accuracy", "train_loss"} <= set(metrics)
    assert json.loads(Path(config.training["output_dir"], "metrics.json").read_text()) == metrics


def test_a_checkpoint_is_a_branch_and_holds_only_the_bridge(config, tmp_path):
    config.training |= {"max_steps": 2, "save_steps": 2}
    config.data.eval = None
    train(config)
    checkpoint = tmp_path / "run" / "checkpoint-2"
    weights = load_file(checkpoint / "bridge.safetensors")
    assert "query_tokens" in weights and not any("encoder.embed" in name or "llm" in name for name in weights)
    assert (checkpoint / "branch.yaml").is_file() and (checkpoint / "optimizer.pt").is_file()
    assert not list(checkpoint.glob("model*"))


@pytest.fixture
def store(files, tmp_path):
    """The features of these files."""
    stored(Job(files.branch, str(tmp_path / "store"), dtype="float32", use_cpu=True), [manifest_of(files)])
    return tmp_path / "store"


def manifest_of(config):
    return Manifest(config.data.train, modalities={"file_toy": FileToy()})


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.slow
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


@pytest.mark.slow
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


def test_words_the_llm_does_not_know_are_told_at_the_start(config):
    config.training["max_steps"] = 1
    config.data.eval = None
    config.branch.cue, config.router.postfix = "red :", "glorp :"
    with pytest.warns(UnknownWordsWarning, match='does not know "glorp" in "glorp :"'):
        train(config)


def test_words_of_answers_that_the_llm_does_not_know_are_told_once_each(config, manifest, tmp_path):
    row = json.loads(manifest.read_text().splitlines()[0])
    rows = [{**row, "answer": answer} for answer in ("a glorp", "a glorp", "a zibble glorp", "red")]
    config.data.train = str(tmp_path / "odd.jsonl")
    Path(config.data.train).write_text("".join(json.dumps(row) + "\n" for row in rows))
    config.training |= {"max_steps": 3, "save_strategy": "no"}
    config.data.eval = None
    with pytest.warns(UnknownWordsWarning) as caught:
        train(config)
    told = sorted(
        str(warning.message).split(" in ")[0] for warning in caught if "does not know" in str(warning.message)
    )
    words = {word for line in told for word in line.replace(",", " ").split() if word.startswith('"')}
    assert {'"glorp"', '"zibble"'} <= words and sum('"glorp"' in line for line in told) == 1


def test_the_bridge_may_be_read_by_whoever_may_read_new_files(config, tmp_path):
    config.training |= {"max_steps": 1, "save_strategy": "no"}
    config.data.eval = None
    train(config)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "run").iterdir() if path.is_file()}
    assert modes["bridge.safetensors"] == modes["branch.yaml"]


@pytest.mark.slow
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


@pytest.mark.slow
def test_curves_and_pace_are_told(config, tmp_path):
    config.training |= {"report_to": ["tensorboard"], "max_steps": 20, "eval_strategy": "steps", "eval_steps": 10}
    train(config)
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "run").glob("**/events.out.tfevents.*"))
    log = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    line = next(entry for entry in log if "loss" in entry)
    assert line["samples_per_second"] > 0 and line["tokens_per_second"] > line["samples_per_second"]
    assert 0 <= line["waiting_for_data"] <= 1 and 0.05 < line["peak_memory_gib"] < 100


@pytest.mark.slow
def test_utilisation_is_told_where_the_peak_of_the_device_is_known(config, monkeypatch):
    config.training |= {"max_steps": 20, "save_strategy": "no"}
    config.data.eval = None
    monkeypatch.setattr(BridgeTrainer, "_make_meter", lambda self: Meter(flops=self.task.flops, peak=1e9))
    train(config)
    log = json.loads(Path(config.training["output_dir"], "trainer_state.json").read_text())["log_history"]
    told = [entry for entry in log if "mfu" in entry]
    assert len(told) == 2
    for entry in told:  # 16 FLOPs of two products, forward and back, are the least of what a position takes
        weights = 2 * (4 * 32 * 32 + 3 * 32 * 64)
        assert (
            4 * weights * entry["tokens_per_second"] / 1e9
            < entry["mfu"]
            < 40 * weights * entry["tokens_per_second"] / 1e9
        )


@pytest.mark.slow
def test_branches_of_one_run_share_a_q_former_from_the_start_and_when_resumed(config, toys, tmp_path):
    (tmp_path / "beads.jsonl").write_text('{"beads": [[1.0], [2.0, 3.0]], "instruction": "what", "answer": "no"}\n' * 8)
    bridge = config.branch.bridge | {"kind": "shared_qformer", "shared_width": 12}
    config.branch.bridge, config.also = bridge, [BranchConfig("beads", bridge=dict(bridge))]
    config.data.train, config.data.eval, config.data.mix = (
        [config.data.train, str(tmp_path / "beads.jsonl")],
        None,
        "equal",
    )
    config.training |= {"max_steps": 8, "save_steps": 4, "lr_scheduler_type": "constant"}
    runs = {}
    for run, steps in (("whole", [8]), ("broken", [4, 8])):
        config.training["output_dir"] = str(tmp_path / run)
        for max_steps in steps:
            config.training["max_steps"] = max_steps
            train(config, resume=max_steps > steps[0])
        runs[run] = [load_file(tmp_path / run / name / "bridge.safetensors") for name in ("toy", "beads")]
    toy, beads = runs["whole"]
    alike = {name for name in toy if toy[name].shape == beads[name].shape and toy[name].equal(beads[name])}
    assert {name for name in toy if name.split(".")[0] in ("qformer", "query_tokens")} <= alike
    assert "projector.weight" not in alike
    for whole, broken in zip(*runs.values(), strict=True):
        assert all(whole[name].equal(broken[name]) for name in whole)


def test_any_of_a_rows_answers_is_right(config, manifest, monkeypatch):
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    for row in rows:
        row["answers"] = [row.pop("answer"), "green"]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config.training |= {"max_steps": 1, "save_strategy": "no"}
    monkeypatch.setattr(XBlip, "generate", lambda self, samples, **options: [Answer("green", 1, 1)] * len(samples))
    assert train(config)["eval_accuracy"] == 1


def test_each_row_of_an_evaluation_is_asked_for_one_answer(config, monkeypatch):
    def right(self, samples, **options):
        count = {**self.generation, **options}.get("num_return_sequences", 1)
        return [Answer(sample.answer, 1, 1) for sample in samples for _ in range(count)]

    monkeypatch.setattr(XBlip, "generate", right)
    config.training |= {"max_steps": 1, "save_strategy": "no"}
    config.generation = {"num_beams": 2, "num_return_sequences": 2}
    assert train(config)["eval_accuracy"] == 1
