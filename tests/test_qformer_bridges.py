"""Q-Formers that come from another branch: frozen ones stay as they were, shared ones are held once."""

import re
import shutil

import pytest
import torch
from kit import Beads
from torch import nn

from xblip.branch import Branch, BranchConfig
from xblip.bundle import load_branches
from xblip.errors import BundleError, ConfigError
from xblip.model import XBlip
from xblip.qformer_bridges import is_text_part
from xblip.sample import Sample
from xblip.sharing import share
from xblip.tasks import AnswerTask
from xblip.testing import ToyModality, small_qformer
from xblip.train import parts_table

TOY, BEADS = [1.0, 2.0, 3.0, 4.0], [[1.0, 2.0]]
SAMPLES = [Sample("what is this ?", [("toy", TOY)], "one"), Sample("describe it", [("beads", BEADS)], "two")]


@pytest.fixture
def build(llm, toys):
    """Builds a branch for toys (or beads) with a small Q-Former."""

    def build(kind: str, modality=ToyModality, seed: int = 0, **settings) -> Branch:
        torch.manual_seed(seed)
        bridge = small_qformer(llm.config.source, dropout=0.5, max_segments=0) | settings | {"kind": kind}
        branch = Branch.build(BranchConfig(modality.name, cue="show :", bridge=bridge), llm_width=llm.width)
        own = ("projector", "encoder_projection", "layer_norm") if settings.get("qformer") else ""
        for name, parameter in branch.bridge.named_parameters():
            if name.startswith(own) and parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.2)
        return branch

    return build


@pytest.fixture
def saved(build, llm, tmp_path):
    """Saves a branch that is built so, and gives its folder."""

    def saved(kind: str, name: str = "given", **settings):
        build(kind, **settings).save(tmp_path / name, llm=llm)
        return tmp_path / name

    return saved


def step(model: XBlip, samples) -> None:
    """One step of a loud training."""
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1.0)
    model(samples)["loss"].backward()
    optimizer.step()
    optimizer.zero_grad()
    model.eval()


def changed(before: dict, bridge: nn.Module) -> set[str]:
    """Parts with a weight that is not what it was."""
    return {name.split(".")[0] for name, value in bridge.state_dict().items() if not torch.equal(value, before[name])}


def weights_of(bridge: nn.Module) -> dict:
    return {name: value.clone() for name, value in bridge.state_dict().items()}


class TestFrozen:
    @pytest.fixture
    def branch(self, build, saved):
        return build("frozen_qformer", seed=1, qformer=str(saved("qformer", instruction_aware=False)))

    def test_it_has_the_names_of_any_q_former_and_the_weights_of_the_given_one(self, branch, tmp_path, llm):
        given = Branch.load(tmp_path / "given", llm=llm).bridge.state_dict()
        assert set(branch.bridge.state_dict()) == set(given)
        assert changed(given, branch.bridge) == {"projector"}

    def test_of_one_that_hears_it_takes_all_but_the_text_part(self, build, saved, llm, tmp_path):
        """So that BLIP-2's first stage, converted, serves MiniGPT-4's."""
        branch = build("frozen_qformer", seed=1, qformer=str(saved("qformer")))
        given, own = Branch.load(tmp_path / "given", llm=llm).bridge.state_dict(), branch.bridge.state_dict()
        assert changed({name: given[name] for name in own}, branch.bridge) == {"projector"}
        assert set(given) - set(own) == {name for name in given if is_text_part(name)} != set()

    def test_only_the_projector_trains(self, branch, llm):
        before = weights_of(branch.bridge)
        step(XBlip(llm=llm, branches={"toy": branch}), SAMPLES[:1])
        assert changed(before, branch.bridge) == {"projector"}
        assert len(list(branch.bridge.projector.parameters())) == 2

    def test_training_drops_nothing_out(self, branch):
        branch.train()
        first, second = (branch([TOY], ["describe it"])[0] for _ in range(2))
        assert torch.equal(first, second) and branch.bridge.projector.training
        assert not any(module.training for module in branch.bridge.qformer.modules())

    def test_its_weights_are_saved_whole_and_stay_frozen(self, branch, llm, tmp_path):
        branch.save(tmp_path / "mine", llm=llm)
        shutil.rmtree(tmp_path / "given")
        loaded = Branch.load(tmp_path / "mine", llm=llm)
        assert not changed(branch.bridge.state_dict(), loaded.bridge)
        before = weights_of(loaded.bridge)
        step(XBlip(llm=llm, branches={"toy": loaded}), SAMPLES[:1])
        assert changed(before, loaded.bridge) == {"projector"}

    def test_what_trains_is_shown_and_written(self, branch, llm, tmp_path):
        total = sum(weight.numel() for weight in branch.bridge.parameters())
        trained = 32 * llm.width + llm.width
        table = parts_table(AnswerTask(XBlip(llm=llm, branches={"toy": branch}), eval_answers=0))
        assert list(table.columns[2].cells)[1] == f"{total:,}"
        assert list(table.columns[3].cells) == ["frozen", f"{trained:,} train", "frozen"]
        branch.save(tmp_path / "mine", llm=llm)
        card = (tmp_path / "mine" / "README.md").read_text()
        assert f"bridge of {total:,} parameters ({trained:,} of them trained)" in card

    def test_random_weights_are_not_trained_upon(self, build):
        branch = build("frozen_qformer")
        assert branch.eval()([TOY], ["describe it"])
        with pytest.raises(ConfigError, match=r"frozen Q-Former with random weights .* let bridge.qformer name"):
            branch.train()([TOY], ["describe it"])

    def test_it_may_be_one_that_hears_with_the_tokenizer_it_was_trained_with(self, build, saved, tmp_path):
        folder = saved("qformer")
        branch = build("frozen_qformer", instruction_aware=True, qformer=str(folder), tokenizer="elsewhere").eval()
        first, second = branch([TOY] * 2, ["describe it", "what is this ?"])
        assert not torch.allclose(first, second)


@pytest.mark.parametrize("kind", ["frozen_qformer", "shared_qformer"])
class TestGiven:
    def test_a_folder_without_a_branch_is_an_error(self, kind, build, tmp_path):
        with pytest.raises(BundleError, match=r'no branch in "/nowhere" to take a Q-Former from: it lacks bridge'):
            build(kind, qformer="/nowhere")

    def test_another_size_is_an_error_that_names_a_weight(self, kind, build, saved):
        folder = saved("shared_qformer" if kind == "shared_qformer" else "qformer", num_query_tokens=6)
        text = f"^{re.escape(str(folder))}/bridge.safetensors does not fit the settings of this bridge: .*query_tokens"
        with pytest.raises(BundleError, match=text):
            build(kind, qformer=str(folder), instruction_aware=True)

    def test_damaged_weights_are_an_error(self, kind, build, saved):
        folder = saved("qformer")
        (folder / "bridge.safetensors").write_bytes(b"nothing of the kind")
        with pytest.raises(BundleError, match="bridge.safetensors is damaged"):
            build(kind, qformer=str(folder))


class TestShared:
    @pytest.fixture
    def folders(self, build, saved, llm, tmp_path):
        """A branch that trained its Q-Former, and one of another modality and width that took it over."""
        first = saved("shared_qformer", name="toy", shared_width=12)
        given = {"qformer": str(first), "shared_width": 12}
        second = saved("shared_qformer", name="beads", modality=Beads, seed=1, **given)
        return {"toy": first, "beads": second}

    def test_each_modality_has_a_layer_before_the_one_q_former(self, build):
        bridge = build("shared_qformer").bridge
        assert bridge.encoder_projection.weight.shape == (512, bridge.encoder_width)
        assert bridge.qformer.config.encoder_width == 512
        assert bridge.layer_norm.weight.shape == (bridge.encoder_width,)

    def test_a_modality_that_comes_later_leaves_the_q_former_as_it_is(self, build, folders, llm):
        branch = build("shared_qformer", modality=Beads, qformer=str(folders["toy"]), shared_width=12)
        before = weights_of(branch.bridge)
        branch.train()
        assert not any(module.training for module in branch.bridge.qformer.modules())
        step(XBlip(llm=llm, branches={"beads": branch}), SAMPLES[1:])
        parts = changed(before, branch.bridge)
        assert {"layer_norm", "encoder_projection", "projector"} <= parts <= set(branch.bridge.own)

    def test_branches_trained_apart_hold_it_once(self, folders, llm):
        alone = {name: Branch.load(folder, llm=llm).eval() for name, folder in folders.items()}
        model = XBlip.compose(llm=llm, branches=folders)
        toy, beads = (model.branches[name].bridge for name in ("toy", "beads"))
        assert toy.qformer is beads.qformer and toy.query_tokens is beads.query_tokens
        assert toy.encoder_projection is not beads.encoder_projection and toy.projector is not beads.projector
        counted = sum(weight.numel() for weight in model.branches.parameters())
        apart = sum(weight.numel() for branch in alone.values() for weight in branch.parameters())
        once = sum(weight.numel() for weight in [*toy.qformer.parameters(), toy.query_tokens])
        assert counted == apart - once
        with torch.no_grad():
            for name, source in (("toy", TOY), ("beads", BEADS)):
                left, right = (branch([source], ["describe it"])[0] for branch in (alone[name], model.branches[name]))
                assert torch.allclose(left, right, atol=1e-6)

    def test_trained_together_it_learns_from_all_and_is_one_after_saving(self, folders, llm, tmp_path):
        model = XBlip.compose(llm=llm, branches=folders)
        before = weights_of(model.branches["toy"].bridge)
        step(model, SAMPLES[1:])
        assert {"query_tokens", "qformer"} == changed(before, model.branches["toy"].bridge)
        step(model, SAMPLES)
        model.save_pretrained(tmp_path / "bundle")
        loaded = XBlip.from_pretrained(tmp_path / "bundle")
        assert loaded.branches["toy"].bridge.qformer is loaded.branches["beads"].bridge.qformer
        for name in folders:
            assert not changed(weights_of(model.branches[name].bridge), loaded.branches[name].bridge)

    def test_q_formers_that_differ_stay_apart(self, folders, saved, llm):
        other = saved("shared_qformer", name="other", modality=Beads, seed=5, shared_width=12)
        model = XBlip.compose(llm=llm, branches={"toy": folders["toy"], "beads": other})
        assert model.branches["toy"].bridge.qformer is not model.branches["beads"].bridge.qformer

    def test_one_that_is_frozen_and_one_that_trains_stay_apart(self, build, folders, llm):
        """Else one of the two would not do as it was told."""
        loaded = load_branches({"toy": folders["toy"]}, llm=llm)["toy"]
        frozen = build("shared_qformer", modality=Beads, qformer=str(folders["toy"]), shared_width=12)
        model = XBlip(llm=llm, branches={"toy": loaded, "beads": frozen})
        assert model.branches["toy"].bridge.qformer is not model.branches["beads"].bridge.qformer

    @pytest.mark.parametrize(
        ("kind", "settings", "once"),
        [("shared_qformer", {}, True), ("shared_qformer", {"num_attention_heads": 2}, False), ("qformer", {}, False)],
    )
    def test_only_this_kind_is_shared_and_only_where_settings_agree(self, build, kind, settings, once):
        left, right = build(kind).bridge, build(kind, **settings).bridge
        share([left, right])
        assert (left.qformer is right.qformer) == once and left.projector is not right.projector
