"""Training without an encoder: what stands in for it, and what is compared before it may."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from kit import Beads, registered
from stores import Numbers, run, some_files

from xblip.branch import Branch, BranchConfig
from xblip.encoding import Job
from xblip.errors import BundleError
from xblip.llm import FrozenLLM, LLMConfig
from xblip.model import XBlip
from xblip.sample import Sample
from xblip.store import FeatureStore
from xblip.stored import stored_encoder
from xblip.testing import ToyEncoder, ToyModality, small_qformer


@pytest.fixture
def data(tmp_path):
    with some_files(tmp_path):
        yield tmp_path


@dataclass
class FolderConfig:
    """`encoder`: folder of the weights; `scale`: of the numbers."""

    encoder: str = ""
    scale: float = 1.0


class FolderToy(ToyModality):
    """Toys whose encoder's seed lies in a folder."""

    name = "folder_toy"
    Config = FolderConfig

    def build_encoder(self):
        return ToyEncoder(16, int(Path(self.config.encoder, "weights.bin").read_text()))


def test_an_encoder_is_known_by_what_is_in_its_files(tmp_path):
    folder = tmp_path / "encoder"
    folder.mkdir()
    (folder / "weights.bin").write_text("1")
    (folder / "config.json").write_text("{}")
    (tmp_path / "train.jsonl").write_text('{"folder_toy": [1, 2, 3, 4], "instruction": "what ?", "answer": "one"}\n')
    config = BranchConfig("folder_toy", config={"encoder": str(folder)})
    with registered(FolderToy):
        run(tmp_path, branch=config)
        stored = FeatureStore.open(tmp_path / "store")
        moved = BranchConfig("folder_toy", config={"encoder": str(shutil.copytree(folder, tmp_path / "moved"))})
        (tmp_path / "moved" / "README.md").write_text("a copy")
        assert stored_encoder(stored, config).fingerprint == stored_encoder(stored, moved).fingerprint
        (folder / "config.json").write_text('{"eps": 2}')
        with pytest.raises(
            BundleError, match=r"this config's encoder: its file config.json differs. Correct the config"
        ):
            stored_encoder(stored, config)
        for number in range(4):
            (folder / f"{number}.json").write_text("{}")
        with pytest.raises(BundleError, match=r"its files 0.json, 1.json, 2.json and 2 more differ. Correct"):
            stored_encoder(stored, config)
        (folder / "0.json").unlink()
        run(tmp_path, branch=moved)
        with pytest.raises(
            BundleError, match=r"other features: its files 1.json, 2.json, 3.json and 1 more differ. Give"
        ):
            run(tmp_path, branch=config)
        shutil.rmtree(folder)
        with pytest.raises(BundleError, match=r"settings.encoder is '.*encoder' here and None there"):
            stored_encoder(stored, config)


def test_a_store_in_the_home_folder(data, monkeypatch):
    monkeypatch.setenv("HOME", str(data))
    assert Job(BranchConfig("numbers"), "~/store").folder == str(data / "store")
    run(data)
    assert len(FeatureStore.open("~/store")) == 12


def test_a_branch_saved_without_its_encoder_is_the_same_to_the_byte(data, llm_folder):
    run(data)
    llm = FrozenLLM.from_pretrained(LLMConfig(source=str(llm_folder), dtype="float32"))
    config = BranchConfig("numbers", bridge=small_qformer(llm_folder))
    stored = FeatureStore.open(data / "store")
    for name, encoder in (("with", None), ("without", stored_encoder(stored, config))):
        torch.manual_seed(0)
        branch = Branch.build(config, llm_width=llm.width, encoder=encoder)
        branch.save(data / name, llm=llm)
    files = sorted(path.relative_to(data / "with") for path in (data / "with").rglob("*") if path.is_file())
    assert files and all(
        (data / "with" / file).read_bytes() == (data / "without" / file).read_bytes() for file in files
    )
    features = stored.features(data / "0.txt")
    with torch.no_grad():
        whole = Branch.load(data / "with", llm=llm).eval()
        assert torch.equal(whole([data / "0.txt"], ["what ?"])[0], branch.eval()([features], ["what ?"])[0])
    with pytest.raises(BundleError, match=r"reads the features of numbers from .* and has no encoder.*values"):
        branch.encode([data / "0.txt"])
    with pytest.raises(BundleError, match=r"has no encoder"):
        branch.read({"values": torch.zeros(1, 4)})


def test_losses_and_gradients_are_those_of_the_encoder(data, llm):
    run(data)
    stored = FeatureStore.open(data / "store")
    config = BranchConfig("numbers", bridge=small_qformer(llm.config.source))
    losses, gradients = [], []
    for encoder in (None, stored_encoder(stored, config)):
        torch.manual_seed(0)
        branch = Branch.build(config, llm_width=llm.width, encoder=encoder)
        model = XBlip(llm=llm, branches={"numbers": branch})
        sources = [data / f"{number}.txt" for number in range(12)]
        media = [stored.features(source) for source in sources] if encoder else sources
        loss = model([Sample("what is this ?", [("numbers", source)], "one") for source in media])["loss"]
        loss.backward()
        losses.append(loss.item())
        gradients.append(
            torch.cat([weight.grad.flatten() for weight in branch.parameters() if weight.grad is not None])
        )
    assert losses[0] == losses[1] and torch.equal(*gradients) and gradients[0].abs().max() > 0


def test_features_of_another_encoder_are_refused_before_it_is_loaded(data):
    run(data)
    stored = FeatureStore.open(data / "store")
    with pytest.raises(BundleError, match=r"not those of this config's encoder: settings.seed is 1 here and 0 there"):
        stored_encoder(stored, BranchConfig("numbers", config={"seed": 1}))
    with registered(Beads), pytest.raises(BundleError, match=r"modality is 'beads' here and 'numbers' there"):
        stored_encoder(stored, BranchConfig("beads"))
    assert Numbers.encoded == 24
