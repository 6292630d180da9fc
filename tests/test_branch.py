"""Branches: how they are built, and how they find, share and copy the encoders they were trained on."""

import copy
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from kit import assert_alike, make_branch, registered
from torch import Tensor, nn

import xblip
from xblip import encoder as encoders
from xblip import plugins
from xblip.branch import Branch, BranchConfig
from xblip.errors import BundleError, ConfigError, InputError, MediaError, PluginError
from xblip.llm import FrozenLLM
from xblip.modality import Features, Modality
from xblip.model import XBlip
from xblip.sample import Sample
from xblip.testing import ToyEncoder, ToyModality, small_qformer

TOY = [1.0, 2.0, 3.0, 4.0] * 2


class Touch(Modality):
    """Grids of 8 x 8 numbers in three layers, through an encoder that lies in a folder."""

    name = "touch"

    @dataclass
    class Config:
        """`encoder`: folder of a transformers vision model."""

        encoder: str

    def load(self, source: Any) -> dict[str, Tensor]:
        if not isinstance(source, Tensor) or source.shape != (3, 8, 8):
            raise MediaError("A touch must be a tensor of shape (3, 8, 8).")
        return {"pixel_values": source[None]}

    def build_encoder(self) -> nn.Module:
        return xblip.TransformersEncoder.from_pretrained(self.config.encoder, input_name="pixel_values")


class Feel(Touch):
    """The same under another name."""

    name = "feel"


class Graze(Touch):
    """The same, before the last layer."""

    name = "graze"

    def build_encoder(self) -> nn.Module:
        return xblip.TransformersEncoder.from_pretrained(self.config.encoder, input_name="pixel_values", layer=0)


class Grip(Touch):
    """The same inside a network of its own."""

    name = "grip"

    def build_encoder(self) -> nn.Module:
        inner = super().build_encoder()
        outer = nn.Sequential(inner)
        outer.width, outer.forward = inner.width, inner.forward
        return outer


class Own(ToyModality):
    """A toy whose encoder may come from a folder, or be its own."""

    name = "own"

    @dataclass
    class Config(ToyModality.Config):
        """`encoder`: a folder, or nothing for the toy's own."""

        encoder: str | None = None


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """Saves tiny vision transformers, by seed."""
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    root = tmp_path_factory.mktemp("vit")

    def vit(seed: int) -> Path:
        torch.manual_seed(seed)
        ViTModel(ViTConfig(image_size=8, patch_size=4, **sizes)).save_pretrained(root / str(seed))
        return root / str(seed)

    return vit


@pytest.fixture(autouse=True)
def _registered(toys):
    with registered(Touch, Feel, Graze, Grip, Own):
        yield


def load_branch(folder: Path, llm: FrozenLLM) -> Branch:
    return Branch.load(folder, llm=llm)


class TestEncoderFolders:
    def branch(self, modality, llm, folder: Path, **settings) -> Branch:
        return make_branch(modality, llm, config={"encoder": str(folder)}, **settings)

    def sample(self, *names: str) -> list[Sample]:
        torch.manual_seed(3)
        return [Sample("what ?", [(name, torch.rand(3, 8, 8)) for name in names], "red")]

    def test_an_encoder_is_copied_into_the_bundle(self, llm, vit, tmp_path):
        encoder = shutil.copytree(vit(0), tmp_path / "encoder")
        model = XBlip(llm=llm, branches={"touch": self.branch(Touch, llm, encoder)}).eval()
        model.save_pretrained(tmp_path / "bundle")
        shutil.rmtree(encoder)
        shutil.move(tmp_path / "bundle", tmp_path / "moved")
        assert_alike(model, XBlip.from_pretrained(tmp_path / "moved"), self.sample("touch"))

    def test_equal_encoders_are_stored_and_held_once(self, llm, vit, tmp_path):
        folder = vit(0)
        copied = shutil.copytree(folder, tmp_path / "copied")
        branches = {"touch": self.branch(Touch, llm, folder), "feel": self.branch(Feel, llm, copied, seed=1)}
        model = XBlip(llm=llm, branches=branches).eval()
        model.save_pretrained(tmp_path / "bundle")
        assert len(list((tmp_path / "bundle" / "encoders").iterdir())) == 1
        loaded = XBlip.from_pretrained(tmp_path / "bundle")
        assert loaded.branches["touch"].encoder is loaded.branches["feel"].encoder
        assert_alike(model, loaded, self.sample("touch", "feel"))

    def loaded(self, monkeypatch, folder: Path) -> tuple[XBlip, list[str]]:
        """A bundle, and which encoders were loaded for it."""
        sources, load = [], encoders._load
        monkeypatch.setattr(encoders, "_load", lambda source: sources.append(source) or load(source))
        return XBlip.from_pretrained(folder), sources

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "auto"])
    def test_a_folder_named_twice_is_loaded_once(self, llm, vit, tmp_path, monkeypatch, dtype):
        touch, feel = (self.branch(modality, llm, vit(0), encoder_dtype=dtype) for modality in (Touch, Feel))
        model = XBlip(llm=llm, branches={"touch": touch, "feel": feel}).eval()
        model.save_pretrained(tmp_path)
        loaded, sources = self.loaded(monkeypatch, tmp_path)
        assert len(sources) == 1
        assert loaded.branches["touch"].encoder.module is loaded.branches["feel"].encoder.module
        counts = [sum(weight.numel() for weight in each.parameters()) for each in (model, loaded, touch.encoder)]
        assert counts[0] - counts[1] == counts[2] > 0
        assert_alike(model, loaded, self.sample("touch", "feel"))
        loaded.to(torch.float64)
        assert {weight.dtype for weight in loaded.branches["feel"].encoder.parameters()} == {torch.float64}

    def test_an_encoder_in_its_own_dtype_is_the_one_that_is_told_that_dtype(self, llm, vit, tmp_path):
        from transformers import ViTModel

        ViTModel.from_pretrained(vit(0), dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
        touch = self.branch(Touch, llm, tmp_path / "half", encoder_dtype="auto")
        feel = self.branch(Feel, llm, tmp_path / "half", encoder_dtype="bfloat16")
        XBlip(llm=llm, branches={"touch": touch, "feel": feel}).save_pretrained(tmp_path / "bundle")
        loaded = XBlip.from_pretrained(tmp_path / "bundle")
        encoders = [loaded.branches[name].encoder for name in ("touch", "feel")]
        assert encoders[0] is encoders[1] and next(encoders[0].parameters()).dtype == torch.bfloat16

    def test_encoders_of_other_dtypes_are_held_apart(self, llm, vit, tmp_path, monkeypatch):
        branches = {"touch": self.branch(Touch, llm, vit(0))}
        branches["feel"] = self.branch(Feel, llm, vit(0), encoder_dtype="bfloat16")
        XBlip(llm=llm, branches=branches).save_pretrained(tmp_path)
        loaded, sources = self.loaded(monkeypatch, tmp_path)
        dtypes = [next(loaded.branches[name].encoder.parameters()).dtype for name in ("touch", "feel")]
        assert len(sources) == 2 and dtypes == [torch.float32, torch.bfloat16]

    def test_other_layers_of_one_encoder_share_its_weights(self, llm, vit, tmp_path, monkeypatch):
        branches = {"touch": self.branch(Touch, llm, vit(0), encoder_dtype="bfloat16")}
        branches["graze"] = self.branch(Graze, llm, vit(0), encoder_dtype="bfloat16")
        model = XBlip(llm=llm, branches=branches).eval()
        model.save_pretrained(tmp_path)
        loaded, sources = self.loaded(monkeypatch, tmp_path)
        touch, graze = (loaded.branches[name].encoder for name in ("touch", "graze"))
        assert len(sources) == 1 and touch.module.model is graze.module.model and touch is not graze
        assert_alike(model, loaded, self.sample("touch", "graze"))

    def test_what_wraps_an_encoder_keeps_its_fingerprint(self, llm, vit, tmp_path, monkeypatch):
        branches = {"touch": self.branch(Touch, llm, vit(0), encoder_dtype="bfloat16")}
        branches["grip"] = self.branch(Grip, llm, vit(0), encoder_dtype="bfloat16")
        model = XBlip(llm=llm, branches=branches).eval()
        model.save_pretrained(tmp_path)
        assert_alike(model, self.loaded(monkeypatch, tmp_path)[0], self.sample("touch", "grip"))

    def test_equal_encoders_keep_their_own_processors(self, llm, vit, tmp_path):
        folders = {modality: shutil.copytree(vit(0), tmp_path / modality.name) for modality in (Touch, Feel)}
        for modality, folder in folders.items():
            (folder / "preprocessor_config.json").write_text(modality.name)
        branches = {modality.name: self.branch(modality, llm, folder) for modality, folder in folders.items()}
        XBlip(llm=llm, branches=branches).save_pretrained(tmp_path / "bundle")
        loaded = XBlip.from_pretrained(tmp_path / "bundle").branches
        assert loaded["touch"].encoder is loaded["feel"].encoder
        for name, branch in loaded.items():
            assert (branch.encoder_folder / "preprocessor_config.json").read_text() == name

    def test_other_encoders_are_not(self, llm, vit, tmp_path):
        branches = {"touch": self.branch(Touch, llm, vit(0)), "feel": self.branch(Feel, llm, vit(1))}
        XBlip(llm=llm, branches=branches).save_pretrained(tmp_path)
        loaded = XBlip.from_pretrained(tmp_path)
        assert loaded.branches["touch"].encoder is not loaded.branches["feel"].encoder
        assert len(list((tmp_path / "encoders").iterdir())) == 2

    def test_equal_weights_with_other_settings_are_held_apart(self, llm, tmp_path):
        class Scaled(ToyEncoder):
            """Has no weight that tells one scale from another."""

            def forward(self, values: Tensor) -> Tensor:
                return super().forward(values * self.scale)

        def scaled(called: str, by: float) -> type[Modality]:
            class Scale(ToyModality):
                """A toy seen through a lens."""

                name = called

                def build_encoder(self) -> nn.Module:
                    encoder = Scaled(self.config.width)
                    encoder.scale = by
                    return encoder

            return Scale

        with registered(scaled("near", 10.0), scaled("far", 0.1), scaled("distant", 0.1)):
            classes = [plugins.get("modality", name) for name in ("near", "far", "distant")]
            model = XBlip(llm=llm, branches={modality.name: make_branch(modality, llm) for modality in classes}).eval()
            model.save_pretrained(tmp_path)
            loaded = XBlip.from_pretrained(tmp_path)
        near, far, distant = (loaded.branches[name].encoder for name in ("near", "far", "distant"))
        assert near is not far and far is distant
        assert_alike(model, loaded, [Sample("what ?", [("near", TOY), ("far", TOY)], "red")])

    def test_a_branch_finds_its_encoder_from_its_own_folder(self, llm, vit, tmp_path, monkeypatch):
        (tmp_path / "work" / "deep").mkdir(parents=True)
        shutil.copytree(vit(0), tmp_path / "work" / "encoder")
        monkeypatch.chdir(tmp_path / "work")
        branch = self.branch(Touch, llm, Path("encoder"))
        branch.save("deep/branch", llm=llm)
        assert yaml.safe_load(Path("deep/branch/branch.yaml").read_text())["config"]["encoder"] == "../../encoder"
        shutil.move(tmp_path / "work", tmp_path / "moved")
        monkeypatch.chdir(tmp_path)
        loaded = load_branch(tmp_path / "moved" / "deep" / "branch", llm)
        assert loaded.encoder.fingerprint == branch.encoder.fingerprint

    def test_links_on_the_way_do_not_mislead(self, llm, vit, tmp_path):
        (tmp_path / "a" / "b" / "c").mkdir(parents=True)
        os.symlink(tmp_path / "a" / "b" / "c", tmp_path / "link")
        encoder = shutil.copytree(vit(0), tmp_path / "encoder")
        self.branch(Touch, llm, encoder).save(tmp_path / "link" / "branch", llm=llm)
        assert load_branch(tmp_path / "link" / "branch", llm) and load_branch(tmp_path / "a/b/c/branch", llm)

    def test_a_changed_encoder_is_refused(self, llm, vit, tmp_path):
        encoder = shutil.copytree(vit(0), tmp_path / "encoder")
        self.branch(Touch, llm, encoder).save(tmp_path / "branch", llm=llm)
        shutil.rmtree(encoder)
        shutil.copytree(vit(1), encoder)
        with pytest.raises(BundleError, match="was trained on an encoder with fingerprint"):
            load_branch(tmp_path / "branch", llm)

    def test_a_missing_encoder_is_named(self, llm, vit, tmp_path):
        encoder = shutil.copytree(vit(0), tmp_path / "encoder")
        self.branch(Touch, llm, encoder).save(tmp_path / "branch", llm=llm)
        shutil.rmtree(encoder)
        with pytest.raises(
            BundleError,
            match=r'The branch in .* cannot be built. Cannot load an encoder from "/.*encoder": no such folder',
        ):
            load_branch(tmp_path / "branch", llm)

    @pytest.mark.parametrize("nothing", [None, ""])
    def test_no_encoder_folder_is_not_the_working_directory(self, llm, tmp_path, monkeypatch, nothing):
        (tmp_path / "work").mkdir()
        monkeypatch.chdir(tmp_path / "work")
        Path("precious.txt").write_text("mine")
        model = XBlip(llm=llm, branches={"own": make_branch(Own, llm, config={"encoder": nothing})}).eval()
        model.save_pretrained(tmp_path / "bundle")
        assert not list((tmp_path / "bundle").rglob("precious.txt"))
        loaded = XBlip.from_pretrained(tmp_path / "bundle")
        assert loaded.branches["own"].modality.config.encoder == nothing
        assert_alike(model, loaded, [Sample("what ?", [("own", TOY)], "red")])


class TestBuilding:
    def test_a_modality_s_bridge_settings_are_defaults(self, llm):
        small = small_qformer(llm.config.source)
        assert Branch.build(BranchConfig("toy", bridge=small), llm_width=32).bridge.config.max_segments == 16
        chosen = Branch.build(
            BranchConfig("toy", bridge=small_qformer(llm.config.source, max_segments=3)), llm_width=32
        )
        assert chosen.bridge.config.max_segments == 3

    def test_they_do_not_reach_another_kind_of_bridge(self, llm):
        assert Branch.build(BranchConfig("toy", bridge={"kind": "linear"}), llm_width=32).bridge.name == "linear"

    @pytest.mark.parametrize(
        ("settings", "error", "message"),
        [
            ({"modality": "tyo"}, PluginError, 'No modality is called "tyo". Did you mean "toy"'),
            ({"config": {"widht": 3}}, ConfigError, 'Unknown key "toy.config.widht". Did you mean "width"'),
            ({"bridge": {"kind": "lienar"}}, PluginError, 'No bridge is called "lienar". Did you mean "linear"'),
            (
                {"bridge": {"num_query_token": 3}},
                ConfigError,
                '"toy.bridge.num_query_token". Did you mean "num_query_tokens"',
            ),
            ({"bridge": {"kind": None}}, ConfigError, "toy.bridge.kind must be the name of a bridge, not None"),
            ({"bridge": {"kind": 5}}, ConfigError, "toy.bridge.kind must be the name of a bridge, not 5"),
            ({"config": {"width": "wide"}}, ConfigError, '"toy.config": .*wide'),
        ],
    )
    def test_what_is_wrong_is_named(self, settings, error, message):
        with pytest.raises(error, match=message):
            Branch.build(BranchConfig(**{"modality": "toy", **settings}), llm_width=32)

    def test_the_caller_s_config_is_left_as_it_was(self, llm):
        config = BranchConfig("toy", bridge=small_qformer(llm.config.source))
        before = copy.deepcopy(config)
        Branch.build(config, llm_width=32)
        assert config == before


class TestReading:
    @pytest.mark.parametrize(
        ("source", "message"),
        [
            ({"path": "a.png"}, "expected what `load` or `encode` of the modality toy gave, or a source"),
            ({}, "expected what `load` or `encode` of the modality toy gave, or a source"),
            ({"pixel_values": torch.zeros(1, 4)}, "expected what `load` or `encode` of the modality toy gave"),
            (Features(torch.zeros(1, 2, 7), torch.ones(1, 2).bool(), [1]), r"features of width 7, .* 16"),
            (Features(torch.zeros(2, 2, 16), torch.ones(2, 2).bool(), [1, 1]), "Features of 2 inputs as one"),
        ],
    )
    def test_what_another_modality_read_is_refused(self, llm, source, message):
        with pytest.raises(MediaError, match=message):
            make_branch(ToyModality, llm).encode([source])

    @pytest.mark.parametrize("sources", [[], "a.png", 5])
    def test_what_is_no_list_of_sources_is_refused(self, llm, sources):
        with pytest.raises(InputError, match="Expected a list of at least one source"):
            make_branch(ToyModality, llm).encode(sources)
