"""What every modality keeps, what is true of this one alone, and a short training."""

import json

import numpy as np
import pytest
import xblip
from xblip.testing import WORDS, ModalityContract, save_toy_llm
from xblip.train import train
from xblip.train_config import load_train_config
from xblip_thermal import Thermal


class TestContract(ModalityContract):
    name = "thermal"


def test_a_picture_has_the_size_of_the_config():
    modality = Thermal(Thermal.Config(size=16))
    assert modality.load(np.full((40, 30), 21.5))["celsius"].shape == (1, 16, 16)


def test_a_wrong_shape_is_named():
    with pytest.raises(xblip.MediaError, match=r"its shape is \(4, 4, 3\)"):
        Thermal().load(np.zeros((4, 4, 3)))


def test_it_trains(tmp_path):
    """Two hundred random pictures, half of them warm: the bridge learns to say which, and the loss falls."""
    generator = np.random.default_rng(0)
    rows = []
    for index in range(200):
        warm = index % 2 == 0
        np.save(tmp_path / f"{index}.npy", generator.normal(30 if warm else 10, 8, (24, 32)))
        rows.append({"thermal": f"{index}.npy", "instruction": "is it warm ?", "answer": "yes" if warm else "no"})
    for name, part in {"train": rows[:160], "eval": rows[160:]}.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
    llm = save_toy_llm(tmp_path / "llm", words=[*WORDS, "warm"])
    (tmp_path / "train.yaml").write_text(
        f"""
        llm: {{source: {llm}}}
        branch:
          modality: thermal
          bridge: {{tokenizer: {llm}, num_query_tokens: 4, hidden_size: 32, num_hidden_layers: 2,
                   num_attention_heads: 4, intermediate_size: 64, dropout: 0.0}}
        data: {{train: {tmp_path}/train.jsonl, eval: {tmp_path}/eval.jsonl}}
        training: {{output_dir: {tmp_path}/branch, max_steps: 60, per_device_train_batch_size: 16, learning_rate: 2.0e-3,
                   eval_on_start: true, use_cpu: true}}
        """
    )
    metrics = train(load_train_config(tmp_path / "train.yaml"))
    history = json.loads((tmp_path / "branch" / "trainer_state.json").read_text())["log_history"]
    before = next(entry["eval_loss"] for entry in history if "eval_loss" in entry)
    assert metrics["eval_loss"] < before / 2
    assert metrics["eval_accuracy"] > 0.9
