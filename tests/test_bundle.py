"""Bundles: what is saved comes back, goes elsewhere, and is refused where it does not fit."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from kit import MODEL, Beads, assert_alike, make_branch, make_model
from safetensors.torch import load_file, save_file

import xblip
from xblip.branch import Branch, BranchConfig
from xblip.errors import BundleError, ConfigError, PluginError
from xblip.llm import FrozenLLM, LLMConfig
from xblip.model import XBlip
from xblip.sample import Sample
from xblip.testing import ToyModality, save_toy_llm, small_qformer

TOY, BEADS = [1.0, 2.0, 3.0, 4.0] * 2, [[1.0, 2.0], [3.0]]
SAMPLES = [
    Sample("what is this ?", [("toy", TOY)], "red"),
    Sample("which one ?", [("beads", BEADS), "and", ("toy", TOY)], "one two"),
    Sample("is one larger ?", [], "yes"),
]
pytestmark = pytest.mark.usefixtures("toys")


@pytest.fixture
def bundle(model, tmp_path) -> Path:
    model.save_pretrained(tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.fixture
def branch_folder(llm, tmp_path) -> Path:
    make_branch(ToyModality, llm).save(tmp_path / "branch", llm=llm)
    return tmp_path / "branch"


def edited(file: Path, **changes: Any) -> None:
    values = yaml.safe_load(file.read_text())
    for key, value in changes.items():
        if value is None:
            del values[key]
        else:
            values[key] = value
    file.write_text(yaml.safe_dump(values, sort_keys=False))


def load_branch(folder: Path, llm: FrozenLLM) -> Branch:
    return Branch.load(folder, llm=llm)


class TestRoundTrip:
    def test_answers_and_losses_are_equal(self, model, bundle):
        loaded = XBlip.from_pretrained(bundle)
        assert_alike(model, loaded, SAMPLES)
        assert not loaded.training and list(loaded.branches) == ["toy", "beads"]
        assert_alike(model, xblip.load(bundle), SAMPLES)
        assert_alike(model, xblip.load(str(bundle)), SAMPLES)

    def test_router_cues_and_generation_travel(self, llm, tmp_path):
        settings = {"prefix": "question : ", "separator": " , ", "cues": True, "earlier_turns": False}
        model = make_model(llm, generation={"max_new_tokens": 3, "num_beams": 2}, **settings)
        model.branches["toy"].cue = model.router.cues["toy"] = "green : "
        model.save_pretrained(tmp_path)
        loaded = XBlip.from_pretrained(tmp_path)
        assert loaded.router.config == model.router.config and loaded.router.cues == model.router.cues
        assert loaded.generation == model.generation
        assert_alike(model, loaded, SAMPLES)

    def test_a_bundle_that_moves_still_loads(self, model, bundle, tmp_path, monkeypatch):
        (tmp_path / "far").mkdir()
        shutil.move(bundle, tmp_path / "far" / "away")
        monkeypatch.chdir(tmp_path / "far")
        assert_alike(model, XBlip.from_pretrained("away"), SAMPLES)

    def test_a_bundle_names_no_place_of_this_machine(self, bundle, tmp_path, llm_folder):
        for file in bundle.rglob("*"):
            if file.suffix in (".yaml", ".json", ".md"):
                text = file.read_text()
                assert str(tmp_path) not in text and str(llm_folder.parent) not in text, file

    def test_a_loaded_bundle_can_be_saved_again(self, model, bundle, tmp_path):
        XBlip.from_pretrained(bundle).save_pretrained(tmp_path / "again")
        shutil.rmtree(bundle)
        assert_alike(model, XBlip.from_pretrained(tmp_path / "again"), SAMPLES)

    def test_saving_where_it_was_loaded_from_changes_nothing(self, model, bundle):
        XBlip.from_pretrained(bundle).save_pretrained(bundle)
        files = [file for suffix in ("safetensors", "yaml", "md") for file in bundle.rglob(f"*.{suffix}")]
        before = {file: file.read_bytes() for file in files}
        XBlip.from_pretrained(bundle).save_pretrained(bundle)
        assert {file: file.read_bytes() for file in files} == before and len(files) == 9

    @pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
    def test_the_llm_s_precision_can_be_chosen_and_is_kept(self, bundle, tmp_path, dtype):
        half = XBlip.from_pretrained(bundle, dtype=dtype)
        assert half.llm.dtype == torch.bfloat16 and half.ask("what ?", toy=TOY, max_new_tokens=2)
        half.save_pretrained(tmp_path / "half")
        assert XBlip.from_pretrained(tmp_path / "half").llm.dtype == torch.bfloat16

    def test_a_model_config_elsewhere_may_name_the_parts(self, model, bundle, tmp_path):
        config = {"llm": {"source": str(bundle / "llm")}, "branches": ["bundle/toy", str(bundle / "beads")]}
        (tmp_path / "model.yaml").write_text(yaml.safe_dump(config))
        assert_alike(model, XBlip.from_pretrained(tmp_path / "model.yaml"), SAMPLES)

    def test_an_installed_bundle_is_loaded_by_name(self, model, bundle, site):
        site.install("tiny_model", MODEL.format(folder=bundle))
        assert_alike(model, xblip.load("tiny_model"), SAMPLES)

    @pytest.mark.parametrize("beside", [[], ["notes.txt"]])
    def test_a_folder_of_its_name_does_not_hide_it(self, model, bundle, site, tmp_path, monkeypatch, beside):
        site.install("tiny_model", MODEL.format(folder=bundle))
        (tmp_path / "work" / "tiny_model").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / "work")
        for file in beside:
            Path("tiny_model", file).write_text("")
        assert_alike(model, xblip.load("tiny_model"), SAMPLES)
        Path("tiny_model", "config.yaml").write_text("llm: [")
        with pytest.raises(ConfigError, match="not a valid YAML file"):
            xblip.load("tiny_model")

    def test_torch_dtype_and_revision_are_the_llm_s(self, bundle):
        llm = xblip.load(bundle, torch_dtype=torch.bfloat16, revision="main").llm
        assert (llm.dtype, llm.config.revision, llm.config.options) == (torch.bfloat16, "main", {})

    def test_options_that_say_how_the_llm_computes_travel(self, bundle, tmp_path):
        options = {"attn_implementation": "eager", "token": "secret"}
        xblip.load(bundle, **options).save_pretrained(tmp_path / "again")
        loaded = xblip.load(tmp_path / "again")
        assert loaded.llm.config.options == {"attn_implementation": "eager"}
        assert loaded.llm.model.config._attn_implementation == "eager"
        assert "secret" not in (tmp_path / "again" / "config.yaml").read_text()

    @pytest.mark.parametrize("place", ["file", "file/below", "/proc/none"])
    def test_where_nothing_can_be_written_is_named(self, model, tmp_path, place):
        (tmp_path / "file").write_text("mine")
        for save in (
            model.save_pretrained,
            lambda folder: model.branches["toy"].save(folder, llm=model.llm),
        ):
            with pytest.raises(BundleError, match=f"Cannot write {tmp_path / place}"):
                save(tmp_path / place)
        assert (tmp_path / "file").read_text() == "mine" and list(tmp_path.iterdir()) == [tmp_path / "file"]

    def test_cards_are_written(self, bundle):
        assert "Modalities: toy, beads" in (bundle / "README.md").read_text()
        card = (bundle / "toy" / "README.md").read_text()
        fingerprint = yaml.safe_load((bundle / "toy" / "branch.yaml").read_text())["llm"]["fingerprint"]
        assert "`qformer` bridge of" in card and fingerprint in card

    def test_weights_are_safetensors_of_the_bridge_alone(self, model, bundle):
        weights = load_file(bundle / "toy" / "bridge.safetensors")
        assert set(weights) == set(model.branches["toy"].bridge.state_dict())
        assert not list(bundle.rglob("*.bin")) and not list(bundle.rglob("*.pt"))

    @pytest.mark.parametrize("kind", ["linear", "mlp"])
    def test_other_bridges_travel_too(self, llm, tmp_path, kind):
        branch = Branch.build(BranchConfig("toy", bridge={"kind": kind}), llm_width=llm.width).eval()
        branch.save(tmp_path, llm=llm)
        loaded = load_branch(tmp_path, llm)
        assert loaded.bridge.name == kind
        assert torch.equal(loaded([TOY], ["what ?"])[0], branch([TOY], ["what ?"])[0])


class TestCompose:
    def test_branches_trained_apart_come_together(self, llm_folder, tmp_path):
        """Each is built and saved beside an LLM of its own loading, as two runs on two machines would do."""
        for seed, modality in enumerate((ToyModality, Beads)):
            own = FrozenLLM.from_pretrained(LLMConfig(source=str(shutil.copytree(llm_folder, tmp_path / f"llm{seed}"))))
            make_branch(modality, own, seed=seed).save(tmp_path / modality.name, llm=own)
            shutil.rmtree(tmp_path / f"llm{seed}")
        folders = {"toy": tmp_path / "toy", "beads": str(tmp_path / "beads")}
        composed = XBlip.compose(llm=llm_folder, branches=folders)
        assert_alike(composed, make_model(composed.llm), SAMPLES)
        assert_alike(composed, XBlip.compose(llm=composed.llm, branches=folders), SAMPLES)

    def test_another_llm_is_refused_naming_both(self, llm, branch_folder, tmp_path):
        other = save_toy_llm(tmp_path / "other", seed=1)
        mine = FrozenLLM.from_pretrained(LLMConfig(source=str(other))).fingerprint
        with pytest.raises(
            BundleError, match=r"was trained for the LLM .* Compose it with the LLM it was trained for"
        ) as caught:
            XBlip.compose(llm=other, branches={"toy": branch_folder})
        assert mine in str(caught.value) and llm.fingerprint in str(caught.value) and mine != llm.fingerprint

    def test_another_encoder_is_refused_naming_both(self, llm, branch_folder):
        edited(branch_folder / "branch.yaml", config={"width": 16, "seed": 7})
        trained = make_branch(ToyModality, llm).encoder.fingerprint
        found = make_branch(ToyModality, llm, config={"seed": 7}).encoder.fingerprint
        with pytest.raises(
            BundleError, match=r"was trained on an encoder with fingerprint .* Put the encoder it was trained"
        ) as caught:
            load_branch(branch_folder, llm)
        assert trained in str(caught.value) and found in str(caught.value) and trained != found

    def test_a_branch_under_another_name_is_refused(self, llm, branch_folder):
        with pytest.raises(BundleError, match='holds a branch of "toy", not of "beads"'):
            XBlip.compose(llm=llm, branches={"beads": branch_folder})

    def test_no_branches_is_a_text_model(self, llm):
        assert XBlip.compose(llm=llm, branches={}).ask("what ?", max_new_tokens=1).num_prompt_tokens == 3


class TestDamage:
    def test_a_branch_is_no_model(self, branch_folder):
        with pytest.raises(BundleError, match=r"is a branch, and a model is .*: name it under `branches` of a config"):
            XBlip.from_pretrained(branch_folder)

    def test_there_is_no_bundle(self, tmp_path):
        with pytest.raises(BundleError, match=r"There is no bundle in .*: it lacks config.yaml"):
            XBlip.from_pretrained(tmp_path)
        with pytest.raises(BundleError, match=r'There is no bundle ".*none": no such file or folder; relative ones'):
            xblip.load(tmp_path / "none")
        hub = r'There is no bundle "someone/something": no such .*, and the hub cannot give it \(.*\)\. `xblip plugins`'
        with pytest.raises(BundleError, match=hub):
            xblip.load("someone/something")

    def test_an_unknown_name_says_what_is_known(self, site):
        site.install("tiny_model", "raise RuntimeError")
        with pytest.raises(PluginError, match=r'No model is called "tiny_modle". Did you mean "tiny_model"'):
            xblip.load("tiny_modle")

    @pytest.mark.parametrize(
        ("file", "message"),
        [
            ("toy/branch.yaml", "There is no branch in .*toy: it lacks branch.yaml"),
            ("toy/bridge.safetensors", "The branch in .*toy lacks its weights, bridge.safetensors"),
            ("toy/tokenizer", "The branch in .*toy cannot be built. It lacks its folder tokenizer"),
            ("llm", 'lacks its folder "llm"'),
            ("llm/model.safetensors", "Cannot load the LLM"),
            ("llm/config.json", "Cannot load the LLM"),
            ("llm/tokenizer.json", "Cannot load the LLM"),
        ],
    )
    def test_a_missing_file_is_named(self, bundle, file, message, tmp_path, monkeypatch):
        """Also where the working directory has something of that name."""
        (tmp_path / "work").mkdir()
        monkeypatch.chdir(tmp_path / "work")
        shutil.move(bundle / file, Path(file).name)
        with pytest.raises(BundleError, match=message):
            XBlip.from_pretrained(bundle)

    @pytest.mark.parametrize("length", [0, 5, 400, -8])
    @pytest.mark.parametrize("file", ["toy/bridge.safetensors", "llm/model.safetensors"])
    def test_a_truncated_file_is_named(self, bundle, file, length):
        data = (bundle / file).read_bytes()
        (bundle / file).write_bytes(data[:length])
        with pytest.raises(BundleError, match=r"bridge.safetensors is damaged|Cannot load the LLM"):
            XBlip.from_pretrained(bundle)

    def test_missing_keys_extra_keys_and_other_shapes_are_named(self, llm, branch_folder):
        file = branch_folder / "bridge.safetensors"
        weights = load_file(file)
        for changed, message in (
            (
                {name: value for name, value in weights.items() if name != "query_tokens"},
                'Missing key.* "query_tokens"',
            ),
            (weights | {"surplus": torch.zeros(1)}, 'Unexpected key.* "surplus"'),
            (weights | {"query_tokens": torch.zeros(1, 9, 32)}, "query_tokens"),
        ):
            save_file(changed, file)
            with pytest.raises(BundleError, match=f"does not fit its branch.yaml: .*{message}"):
                load_branch(branch_folder, llm)

    @pytest.mark.parametrize("key", ["modality", "bridge", "encoder", "llm"])
    def test_a_branch_file_that_lacks_a_part_is_named(self, llm, branch_folder, key):
        edited(branch_folder / "branch.yaml", **{key: None})
        with pytest.raises(BundleError, match=f"branch.yaml is damaged: it lacks {key}"):
            load_branch(branch_folder, llm)

    @pytest.mark.parametrize("part", ["encoder", "llm"])
    @pytest.mark.parametrize("value", ["words", {"width": 3}])
    def test_a_branch_file_without_a_fingerprint_is_named(self, llm, branch_folder, part, value):
        edited(branch_folder / "branch.yaml", **{part: value})
        with pytest.raises(BundleError, match=rf"branch.yaml is damaged: it lacks {part}\.fingerprint"):
            load_branch(branch_folder, llm)

    def test_misspelt_keys_are_named(self, llm, bundle):
        edited(bundle / "config.yaml", routr={"cues": False})
        with pytest.raises(ConfigError, match=r'Unknown key "config.yaml.routr". Did you mean "router"'):
            XBlip.from_pretrained(bundle)
        edited(bundle / "toy" / "branch.yaml", config={"witdh": 3})
        with pytest.raises(ConfigError, match=r'The branch in .* Unknown key "toy.config.witdh". Did you mean "width"'):
            load_branch(bundle / "toy", llm)

    def test_a_branch_of_a_modality_that_is_not_installed_says_what_to_install(self, llm, branch_folder):
        edited(branch_folder / "branch.yaml", modality="thermal")
        with pytest.raises(
            PluginError, match=r'The branch in .* No modality is called "thermal".*pip install xblip-thermal'
        ):
            load_branch(branch_folder, llm)

    def test_a_bundle_may_list_a_modality_once(self, bundle):
        shutil.copytree(bundle / "toy", bundle / "again")
        edited(bundle / "config.yaml", branches=["toy", "again"])
        with pytest.raises(BundleError, match=r'two branches of "toy": .*toy and .*again'):
            XBlip.from_pretrained(bundle)

    def test_a_modality_that_is_no_name_is_named(self, bundle):
        edited(bundle / "toy" / "branch.yaml", modality=["toy"])
        with pytest.raises(BundleError, match="branch.yaml is damaged: its modality must be a name, not"):
            XBlip.from_pretrained(bundle)

    def test_a_missing_branch_is_named_by_its_whole_path(self, llm, tmp_path, monkeypatch):
        (tmp_path / "work").mkdir()
        monkeypatch.chdir(tmp_path / "work")
        with pytest.raises(BundleError, match=f"There is no branch in {tmp_path}/none: it lacks"):
            load_branch(Path("../none"), llm)

    @pytest.mark.parametrize("name", ["x" * 300, "some/" + "x" * 300])
    def test_a_name_too_long_for_a_file_is_an_unknown_one(self, name):
        with pytest.raises((PluginError, BundleError), match=r"No model is called|There is no bundle"):
            xblip.load(name)

    def test_a_bad_yaml_is_named(self, bundle):
        (bundle / "config.yaml").write_text("llm: [")
        with pytest.raises(ConfigError, match=r"config.yaml is not a valid YAML file"):
            XBlip.from_pretrained(bundle)


def test_a_hub_bundle_is_found_in_the_local_cache(model, bundle, tmp_path, monkeypatch):
    """Laid out as huggingface_hub lays out its cache, read without a network."""
    repository = tmp_path / "hub" / "models--someone--tiny"
    shutil.copytree(bundle, repository / "snapshots" / "abc123")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert_alike(model, xblip.load("someone/tiny"), SAMPLES)


def test_json_of_tokenizers_travels(bundle):
    assert json.loads((bundle / "toy" / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]["red"]


class TestDescribedBranches:
    """A model config may name each branch by its modality: its folder, or a description that training takes."""

    def test_folders_by_name(self, model, bundle):
        edited(bundle / "config.yaml", branches={"toy": "toy", "beads": str(bundle / "beads")})
        assert_alike(model, xblip.load(bundle), SAMPLES)

    def test_a_folder_under_another_name_is_refused(self, bundle):
        edited(bundle / "config.yaml", branches={"toy": "beads"})
        with pytest.raises(BundleError, match='holds a branch of "beads", not of "toy"'):
            xblip.load(bundle)

    def test_a_description_is_trained_and_its_folder_takes_its_place(self, llm_folder, tmp_path):
        from xblip.train import train
        from xblip.train_config import load_train_config

        described = {"llm": {"source": str(llm_folder), "dtype": "float32"}, "architectures": {"far/away": {}}}
        described["branches"] = {"toy": {"bridge": small_qformer(llm_folder, num_query_tokens=2), "cue": "red : "}}
        (tmp_path / "model.yaml").write_text(yaml.safe_dump(described))
        with pytest.raises(BundleError, match=r"only describes its branch \"toy\".*`base: model.yaml`.*branches\.toy"):
            xblip.load(tmp_path / "model.yaml")
        (tmp_path / "rows.jsonl").write_text(json.dumps({"toy": TOY, "instruction": "what ?", "answer": "red"}) + "\n")
        run = {"base": "model.yaml", "branch": "${branches.toy}", "data": {"train": str(tmp_path / "rows.jsonl")}}
        run["training"] = {"output_dir": str(tmp_path / "toy"), "max_steps": 1, "use_cpu": True, "report_to": []}
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
        config = load_train_config(tmp_path / "run.yaml", ["branch.bridge.num_query_tokens=3"])
        assert config.branch.modality == "toy" and config.branch.cue == "red : "
        train(config)
        edited(tmp_path / "model.yaml", branches={"toy": "toy"})
        loaded = xblip.load(tmp_path / "model.yaml")
        assert loaded.branches["toy"].bridge.config.num_query_tokens == 3 and loaded.branches["toy"].cue == "red : "
        assert loaded.ask("what ?", toy=TOY, max_new_tokens=1)
