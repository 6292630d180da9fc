"""Bridges in LAVIS's layout: published names and shapes at full size, and the original's numbers at small ones."""

from pathlib import Path

import lavis
import pytest
import torch
from kit import LONG, ONE
from safetensors.torch import load_file
from transformers import AutoTokenizer, Blip2VisionConfig, Blip2VisionModel, BlipImageProcessor

from xblip import plugins
from xblip.branch import Branch
from xblip.checkpoint import Checkpoint
from xblip.convert import convert
from xblip.convert_qformer import Wanted
from xblip.errors import BundleError
from xblip.lavis import prefixes, published, skeleton
from xblip.retrieval import Retriever
from xblip.testing import WORDS, toy_tokenizer

WIDTHS = {"image": 1408, "video": 1408, "audio": 768, "pc": 512}
SMALL, TOY = lavis.SMALL, lavis.TOY
INSTRUCTION = "which one is the larger number ?"


@torch.no_grad()
def agrees(folder: Path, llm, weights: dict, *, instruction: str | None = INSTRUCTION, **of) -> Branch:
    """Loads a converted branch, and compares its soft prompt with the original's; it hears unless `instruction` is None."""
    branch = Branch.load(folder, llm=llm).eval()
    ids = None
    if instruction is not None:
        ids = AutoTokenizer.from_pretrained(folder / "tokenizer")(instruction, return_tensors="pt").input_ids
    expected = lavis.soft_prompt(weights, branch.encode([ONE]).values, ids, **of)
    torch.testing.assert_close(branch([ONE], [instruction or ""])[0], expected, atol=1e-4, rtol=1e-4)
    return branch


class TestFullSize:
    @pytest.fixture(scope="class")
    def tokenizer(self, tmp_path_factory):
        """As many words as bert-base-uncased with [DEC]."""
        folder = tmp_path_factory.mktemp("bert")
        few = dict.fromkeys(WORDS)
        toy_tokenizer([*few, *(f"word{number}" for number in range(30523 - len(few)))]).save_pretrained(folder)
        return str(folder)

    @pytest.mark.parametrize(
        ("modality", "llm_width", "trainable"),
        [
            ("image", 4096, 188_837_376),
            ("video", 4096, 188_837_376),
            ("audio", 4096, 182_937_856),
            ("pc", 4096, 180_578_048),
            ("image", 5120, 189_624_832),
            ("video", 5120, 189_624_832),
            ("audio", 5120, 183_725_312),
            ("pc", 5120, 181_365_504),
        ],
    )
    def test_of_x_instructblip(self, tokenizer, modality, llm_width, trainable):
        shapes = lavis.bridge(modality, width=WIDTHS[modality], llm_width=llm_width)
        assert sum(name.startswith(f"{modality}_Qformer.bert.") for name in shapes) == 329
        bridge, count = self.fitted(shapes, modality, tokenizer)
        assert bridge.name == "qformer" and count == trainable
        assert bridge.layer_norm.eps == 1e-5
        assert bridge.qformer.embeddings.layernorm.eps == bridge.qformer.encoder.layer[0].output.LayerNorm.eps == 1e-12

    @pytest.mark.parametrize(
        ("modality", "settings", "published", "layer_norm"),
        [
            ("image", {}, 37_777_408, 2816),
            ("audio", {}, 22_048_768, 1536),
            ("pc", {}, 15_757_312, 1024),
            ("image", {"hidden": 1}, 4_370_464, 2816),
            ("pc", {"hidden": 1}, 4_341_792, 1024),
            ("audio", {"hidden": 1, "tokens": 256}, 10_616_864, 1536),
        ],
    )
    def test_of_the_linear_baselines_whose_counts_leave_out_the_layer_norm(
        self, modality, settings, published, layer_norm
    ):
        shapes = lavis.linear(modality, width=WIDTHS[modality], llm_width=4096, **settings)
        bridge, count = self.fitted(shapes, modality)
        assert bridge.name == "pooled_linear" and count == published + layer_norm
        flattened = settings.get("tokens", 0)
        assert (bridge.config.hidden_size, bridge.config.flatten_tokens) == (settings.get("hidden", 768), flattened)

    def fitted(self, shapes: dict, modality: str, tokenizer: str = ""):
        """The bridge of a checkpoint without values, every weight of which it takes; and its trainable parameters."""
        tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        checkpoint = Checkpoint(Path("x.pth"), tensors)
        assert prefixes(checkpoint) == {modality}
        found = published(checkpoint, modality)
        if tokenizer:
            found.settings["tokenizer"] = tokenizer
        bridge = skeleton(found)
        assert {name: value.shape for name, value in bridge.state_dict().items()} == {
            name: value.shape for name, value in found.weights.items()
        }
        checkpoint.check_all_used()
        return bridge, sum(weight.numel() for weight in bridge.parameters() if weight.requires_grad)


class TestNumbers:
    def test_of_x_instructblip(self, wanted, llm, tmp_path):
        weights = lavis.values(lavis.bridge(**TOY, **SMALL))
        report = convert(lavis.saved(tmp_path / "toy.pth", weights), tmp_path / "out", wanted)
        assert report.made == "branch: toy" and report.loaded == len(weights) - 1 and not report.fresh
        assert report.left_out == {"toy_Qformer.bert.embeddings.position_ids": "a constant that is computed"}
        branch = agrees(tmp_path / "out", llm, weights, prefix="toy")
        tokenizer = branch.bridge.tokenizer
        assert (tokenizer.bos_token, tokenizer.bos_token_id) == ("[DEC]", SMALL["vocabulary"] - 1)
        assert tokenizer.truncation_side == "left" and branch.bridge.config.max_instruction_tokens == 128

    @pytest.mark.parametrize("projector", ["llm_proj", "t5_proj"])
    def test_of_instructblip(self, wanted, llm, tmp_path, projector):
        weights = lavis.values(lavis.bridge(**TOY | {"prefix": ""}, **SMALL, projector=projector))
        wanted.only = "toy"
        convert(lavis.saved(tmp_path / "x.pth", weights), tmp_path / "out", wanted)
        assert agrees(tmp_path / "out", llm, weights, projector=projector).cue == ""

    def test_of_blip2_whose_q_former_hears_nothing(self, wanted, llm, tmp_path):
        weights = lavis.values(lavis.bridge(**TOY | {"prefix": ""}, **SMALL, text=False, projector="opt_proj"))
        wanted.only, wanted.tokenizer = "toy", "nowhere"
        convert(lavis.saved(tmp_path / "x.pth", weights), tmp_path / "out", wanted)
        branch = agrees(tmp_path / "out", llm, weights, instruction=None, projector="opt_proj")
        assert not branch.bridge.config.instruction_aware and not (tmp_path / "out" / "tokenizer").exists()

    @pytest.mark.parametrize("every", [1, 2, 3])
    def test_of_a_q_former_whose_layers_read_features_more_or_less_often(self, wanted, llm, tmp_path, every):
        weights = lavis.values(lavis.bridge(**TOY, **SMALL | {"layers": 4}, every=every))
        convert(lavis.saved(tmp_path / "toy.pth", weights), tmp_path / "out", wanted)
        agrees(tmp_path / "out", llm, weights, prefix="toy")

    def test_of_half_precision(self, wanted, llm, tmp_path):
        weights = {
            name: value.half() if value.is_floating_point() else value
            for name, value in lavis.values(lavis.bridge(**TOY, **SMALL)).items()
        }
        convert(lavis.saved(tmp_path / "toy.pth", weights), tmp_path / "out", wanted)
        agrees(tmp_path / "out", llm, {name: value.float() for name, value in weights.items()}, prefix="toy")

    @torch.no_grad()
    @pytest.mark.parametrize("settings", [{"hidden": 10}, {"hidden": 1}, {"hidden": 1, "tokens": 4}], ids=str)
    def test_of_the_linear_baselines(self, wanted, llm, tmp_path, settings):
        weights = lavis.values(lavis.linear(**TOY, queries=3, **settings))
        report = convert(lavis.saved(tmp_path / "toy.pth", weights), tmp_path / "out", wanted)
        assert report.made == "branch: toy" and report.loaded == 6
        branch = Branch.load(tmp_path / "out", llm=llm).eval()
        values = branch.encode([ONE]).values
        normed = torch.nn.functional.layer_norm(values, (16,), weights["toy_ln.weight"], weights["toy_ln.bias"], 1e-5)
        pooled = normed.flatten(1) if "tokens" in settings else normed.mean(1)
        hidden = pooled @ weights["toy_projection.weight"].T + weights["toy_projection.bias"]
        hidden = hidden.reshape(3, 10) if settings["hidden"] == 10 else hidden
        soft = hidden @ weights["toy_llm_proj.weight"].T + weights["toy_llm_proj.bias"]
        torch.testing.assert_close(branch([ONE], [""])[0], soft.reshape(3, 32), atol=1e-5, rtol=1e-5)
        assert branch([LONG], [""])[0].shape == (9, 32)

    @torch.no_grad()
    @pytest.mark.parametrize(
        ("prefix", "modality"), [("image", "image"), ("video", "video"), ("audio", "audio"), ("pc", "point_cloud")]
    )
    def test_of_each_modality_segment_by_segment(self, wanted, llm, tmp_path, prefix, modality):
        pytest.importorskip(f"xblip_{modality}")
        plugin = plugins.get("modality", modality)
        (tmp_path / "example").mkdir()
        example = plugin.example(tmp_path / "example")
        width = plugin(plugin.Config(**example.config)).build_encoder().width
        weights = lavis.values(lavis.bridge(prefix, width=width, llm_width=32, **SMALL))
        wanted.encoder = example.config["encoder"]
        report = convert(lavis.saved(tmp_path / "x.pth", weights), tmp_path / "out", wanted)
        assert report.made == f"branch: {modality}"
        branch = Branch.load(tmp_path / "out", llm=llm).eval()
        ids = branch.bridge.tokenizer(INSTRUCTION, return_tensors="pt").input_ids
        for source in example.sources[:2]:
            features = branch.encode([source])
            expected = [
                lavis.soft_prompt(weights, values[mask][None], ids, prefix=prefix)
                for values, mask in zip(features.values, features.mask, strict=True)
            ]
            torch.testing.assert_close(branch([source], [INSTRUCTION])[0], torch.cat(expected), atol=1e-4, rtol=1e-4)

    @torch.no_grad()
    def test_an_encoder_of_pictures_is_read_before_its_own_last_norm(self, wanted, llm, tmp_path):
        """LAVIS's encoders end without one; the checkpoint's layer norm stands in its place."""
        pytest.importorskip("xblip_image")
        torch.manual_seed(0)
        sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
        vision = Blip2VisionModel(Blip2VisionConfig(image_size=8, patch_size=4, **sizes)).eval()
        torch.nn.init.normal_(vision.post_layernorm.weight)
        vision.save_pretrained(tmp_path / "eva")
        BlipImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "eva")
        weights = lavis.values(lavis.bridge(**TOY | {"prefix": "image"}, **SMALL))
        wanted.encoder = str(tmp_path / "eva")
        convert(lavis.saved(tmp_path / "image.pth", weights), tmp_path / "out", wanted)
        branch = Branch.load(tmp_path / "out", llm=llm).eval()
        picture = torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8)
        features = vision(**branch.read(picture), output_hidden_states=True).hidden_states[-1]
        ids = branch.bridge.tokenizer(INSTRUCTION, return_tensors="pt").input_ids
        expected = lavis.soft_prompt(weights, features, ids, prefix="image")
        torch.testing.assert_close(branch([picture], [INSTRUCTION])[0], expected, atol=1e-4, rtol=1e-4)


class TestCue:
    @pytest.mark.parametrize(
        ("modality", "cue"), [("image", " image: "), ("video", " video: "), ("audio", " audio: "), ("point_cloud", " 3d: ")]
    )  # fmt: skip
    def test_the_first_four_modalities_have_the_words_they_were_trained_with(self, modality, cue):
        plugin = pytest.importorskip(f"xblip_{modality}")
        held: list = []
        plugin.register_modalities(held.append)
        assert f" {held[0].cue}" == cue

    @pytest.mark.parametrize(("told", "cue"), [(None, " toy: "), ("", ""), ("toy: ", "toy: ")])
    def test_is_x_instructblip_s_unless_told(self, wanted, llm, tmp_path, told, cue):
        wanted.cue = told
        weights = lavis.values(lavis.linear(**TOY))
        convert(lavis.saved(tmp_path / "toy.pth", weights), tmp_path / "out", wanted)
        assert Branch.load(tmp_path / "out", llm=llm).cue == cue


class TestSharedQFormer:
    def test_each_modality_is_a_branch_that_shares_it(self, wanted, llm, tmp_path):
        shapes = lavis.qformer("shared", width=12, **SMALL)
        shapes |= lavis.around("toy", width=16, llm_width=32, hidden=64)
        shapes |= {"toy_encoder_projection.weight": (12, 16), "toy_encoder_projection.bias": (12,)}
        weights = lavis.values(shapes)
        aliases = {name.replace("shared_", "toy_"): value for name, value in weights.items() if "shared_" in name}
        report = convert(lavis.saved(tmp_path / "x.pth", weights | aliases), tmp_path / "out", wanted)
        assert report.made == "branch: toy" and not report.fresh
        assert {report.left_out[name] for name in aliases} == {"is the shared one, stored once more"}
        branch = Branch.load(tmp_path / "out", llm=llm).eval()
        assert branch.bridge.name == "shared_qformer" and branch.bridge.config.shared_width == 12
        ours = {name.replace(".self.", ".attention."): value for name, value in weights.items()}
        ours = {name.replace("embeddings.LayerNorm", "embeddings.layernorm"): value for name, value in ours.items()}
        for name, value in branch.bridge.state_dict().items():
            for old, new in (
                ("qformer.", "shared_Qformer.bert."), ("query_tokens", "shared_query_tokens"), ("layer_norm.", "toy_ln."),
                ("projector.", "toy_llm_proj."), ("encoder_projection.", "toy_encoder_projection."),
            ):  # fmt: skip
                name = new + name.removeprefix(old) if name.startswith(old) else name
            assert torch.equal(value, ours[name])


class TestStageOne:
    HEADS = {
        "temp": (), "itm_head.weight": (2, 64), "itm_head.bias": (2,), "vision_proj.weight": (8, 64),
        "vision_proj.bias": (8,), "text_proj.weight": (8, 64), "text_proj.bias": (8,),
        "Qformer.cls.predictions.bias": (SMALL["vocabulary"],), "Qformer.cls.predictions.transform.dense.weight": (64, 64),
        "Qformer.cls.predictions.transform.dense.bias": (64,), "Qformer.cls.predictions.transform.LayerNorm.weight": (64,),
        "Qformer.cls.predictions.transform.LayerNorm.bias": (64,),
    }  # fmt: skip
    OURS = {
        "temp": "temperature", "itm_head.": "matching_head.", "vision_proj.": "media_projection.",
        "text_proj.": "text_projection.", "Qformer.cls.predictions.transform.LayerNorm.": "language_head.layer_norm.",
        "Qformer.cls.predictions.transform.": "language_head.", "Qformer.cls.predictions.": "language_head.",
    }  # fmt: skip
    TWICE = ("Qformer.cls.predictions.decoder.weight", "Qformer.cls.predictions.decoder.bias")

    @pytest.fixture
    def weights(self):
        shapes = lavis.bridge(width=16, llm_width=32, **SMALL) | self.HEADS | {"visual_encoder.cls_token": (1, 1, 16)}
        weights = {name: value for name, value in lavis.values(shapes).items() if "llm_proj" not in name}
        weights[self.TWICE[0]] = weights["Qformer.bert.embeddings.word_embeddings.weight"].clone()
        weights[self.TWICE[1]] = weights["Qformer.cls.predictions.bias"].clone()
        return weights

    def ours(self, name: str) -> str:
        start = next(start for start in self.OURS if name.startswith(start))
        return self.OURS[start] + name.removeprefix(start)

    def test_gives_initial_weights_with_their_heads_and_tokenizer(self, wanted, weights, tmp_path):
        wanted.llm = ""
        report = convert(lavis.saved(tmp_path / "blip2.pth", weights), tmp_path / "out", wanted)
        assert report.made == "initial weights" and set(report.fresh) == {"projector.weight", "projector.bias"}
        assert set(report.left_out) == {*self.TWICE, "visual_encoder.cls_token", "Qformer.bert.embeddings.position_ids"}
        written = load_file(tmp_path / "out" / "bridge.safetensors")
        assert len(written) == report.loaded == len(weights) - len(report.left_out)
        for name, shape in self.HEADS.items():
            assert torch.equal(written[self.ours(name)], weights[name].reshape(shape or 1))
        assert len(AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")) == SMALL["vocabulary"]
        assert "by `branch.bridge.tokenizer`" in (tmp_path / "out" / "README.md").read_text()
        for line in (
            "initial weights\n", f"loaded: {len(written)} weights\n",
            "fresh: 2 weights of projector, random until trained\n",
            "left out: 1 weights of visual_encoder, of the encoder, which is given as its own folder",
            "left out: 2 weights of Qformer, the embeddings of words and their bias, stored once more",
        ):  # fmt: skip
            assert line in str(report)

    def test_a_head_that_ends_in_other_embeddings_is_left_out(self, wanted, weights, tmp_path):
        wanted.llm = ""
        weights[self.TWICE[0]][0, 0] += 1
        report = convert(lavis.saved(tmp_path / "blip2.pth", weights), tmp_path / "out", wanted)
        head = {name for name in self.HEADS if name.startswith("Qformer.cls.")}
        assert {report.left_out[name] for name in head} == {"the head that writes texts, which only retrievers have"}
        assert not any("language_head" in name for name in load_file(tmp_path / "out" / "bridge.safetensors"))

    @pytest.fixture
    def eva(self, tmp_path):
        """A tiny encoder of pictures."""
        pytest.importorskip("xblip_image")
        sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
        Blip2VisionModel(Blip2VisionConfig(image_size=8, patch_size=4, **sizes)).save_pretrained(tmp_path / "eva")
        BlipImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "eva")
        return str(tmp_path / "eva")

    @pytest.mark.parametrize("writes", [True, False])
    def test_gives_a_retriever_where_its_encoder_is_told(self, wanted, weights, eva, tmp_path, writes):
        wanted.llm, wanted.only, wanted.encoder = "", "image", eva
        if not writes:
            del weights["Qformer.cls.predictions.bias"]
        report = convert(lavis.saved(tmp_path / "blip2.pth", weights), tmp_path / "out", wanted)
        assert report.made == "retriever: image" and not report.fresh
        bridge = Retriever.from_pretrained(tmp_path / "out").branch.bridge
        assert bridge.config.language_head == writes and bridge.config.embedding_width == 8
        held = bridge.state_dict()
        assert torch.equal(held["text_projection.weight"], weights["text_proj.weight"])
        assert ("temperature" in held) == writes == ("language_head.bias" in held)

    def test_a_retriever_of_what_is_not_told_or_does_not_fit(self, wanted, weights, eva, tmp_path):
        wanted.llm, wanted.encoder = "", eva
        path = lavis.saved(tmp_path / "blip2.pth", weights)
        with pytest.raises(
            BundleError, match="becomes a retriever of one modality: say which it is for by --only NAME"
        ):
            convert(path, tmp_path / "out", wanted)
        wanted.only = "image"
        other = lavis.values(lavis.bridge(width=9, llm_width=32, **SMALL))
        path = lavis.saved(tmp_path / "other.pth", {n: other.get(n, value) for n, value in weights.items()})
        with pytest.raises(BundleError, match="was made for an encoder of width 9, and the one of image has 16"):
            convert(path, tmp_path / "out", wanted)

    def test_gives_a_branch_whose_projector_is_told_to_be_fresh(self, wanted, weights, llm, tmp_path):
        wanted.only = "toy"
        report = convert(lavis.saved(tmp_path / "blip2.pth", weights), tmp_path / "out", wanted)
        assert report.made == "branch: toy" and set(report.fresh) == {"projector.weight", "projector.bias"}
        branch = Branch.load(tmp_path / "out", llm=llm)
        assert torch.equal(branch.bridge.query_tokens, weights["query_tokens"]) and branch.cue == ""


class TestMiniGPT4:
    @pytest.fixture
    def given(self, wanted, tmp_path):
        """BLIP-2's first stage, converted to initial weights; and all its weights, and MiniGPT-4's projector."""
        shapes = lavis.bridge(width=16, llm_width=32, **SMALL, projector="llama_proj") | {"itm_head.bias": (2,)}
        weights = lavis.values(shapes)
        first = {name: value for name, value in weights.items() if "llama_proj" not in name}
        settings = Wanted(tokenizer=wanted.tokenizer)
        convert(lavis.saved(tmp_path / "blip2.pth", first), tmp_path / "blip2", settings)
        projector = {name: weights[name] for name in ("llama_proj.weight", "llama_proj.bias")}
        wanted.only, wanted.qformer = "toy", str(tmp_path / "blip2")
        return weights, lavis.saved(tmp_path / "minigpt4.pth", projector)

    def test_is_a_branch_with_a_frozen_q_former(self, given, wanted, llm, tmp_path):
        weights, path = given
        report = convert(path, tmp_path / "out", wanted)
        assert report.made == f"branch: toy, its Q-Former that of {wanted.qformer}"
        assert report.loaded == 2 and not report.fresh and not report.left_out
        branch = agrees(tmp_path / "out", llm, weights, instruction=None, projector="llama_proj")
        assert branch.bridge.name == "frozen_qformer" and branch.cue == ""
        trained = {name for name, weight in branch.bridge.named_parameters() if weight.requires_grad}
        assert trained == {"projector.weight", "projector.bias"}

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                {"qformer": ""},
                "A projector alone, as MiniGPT-4's, needs the Q-Former that stands before it, and none is given: convert "
                "BLIP-2's checkpoint first, and give its folder by --qformer.",
            ),
            (
                {"qformer": "nowhere"},
                "A projector alone, as MiniGPT-4's, needs the Q-Former that stands before it, and nowhere lacks "
                "bridge.safetensors: convert BLIP-2's checkpoint first, and give its folder by --qformer.",
            ),
            ({"llm": ""}, "minigpt4.pth holds a projector alone: give the LLM that it is for by --llm."),
            (
                {"only": ""},
                "minigpt4.pth holds one bridge that names no modality: say which it is for by --only NAME.",
            ),
        ],
    )
    def test_says_what_it_lacks(self, given, wanted, tmp_path, change, message):
        for name, value in change.items():
            setattr(wanted, name, value)
        with pytest.raises(BundleError) as raised:
            convert(given[1], tmp_path / "out", wanted)
        assert str(raised.value).removeprefix(f"{tmp_path}/") == message
