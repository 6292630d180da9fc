"""What a dry run says of a model without weights is true of the model with them."""

import json
from pathlib import Path

import pytest
import yaml
from far import ARCHITECTURES, TOKENIZER, TOY, VIT, count, far, pictures
from rich.console import Console
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaForCausalLM

import xblip
from xblip.blueprint import HERE, MISSING, WEIGHTLESS
from xblip.doctor import examine, report_tables
from xblip.dryrun import _activations, _on_meta
from xblip.testing import small_qformer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::xblip.errors.UnknownWordsWarning"),
]


@pytest.mark.usefixtures("toys")
class TestTruth:
    """What a dry run says of toy parts that are here is what the model itself does."""

    @pytest.fixture
    def report(self, write, llm_folder):
        described = {name: {"bridge": small_qformer(llm_folder)} for name in ("toy", "beads")}
        described["toy"]["config"] = {"width": 16}
        return examine(write(llm={"source": str(llm_folder)}, branches=described, generation={"max_new_tokens": 3}))

    def test_parameters(self, report, model, llm):
        parts = {part.name: part for part in report.parts}
        for name, branch in model.branches.items():
            assert parts[f"{name} encoder"].frozen == count(branch.encoder)
            assert parts[f"{name} bridge"].trained == count(branch.bridge)
        assert (parts["LLM"].frozen, parts["LLM"].trained) == (count(llm), 0)

    def test_shapes(self, report, model):
        features = model.branches["toy"].encode([TOY])
        (soft,) = model.branches["toy"]([TOY], ["what ?"])
        way = report.ways["toy"]
        assert way.loaded == {"values": [1, 4]} and way.features == list(features.values.shape)
        assert way.soft_prompt == list(soft.shape)
        assert report.logits == [1, 1, model.llm.model.config.vocab_size]

    def test_the_prompt_is_as_long_as_the_real_one(self, report, model):
        beads = type(model.branches["beads"].modality).example(Path()).sources[0]
        answer = model.ask("What is this?", toy=TOY, beads=beads, max_new_tokens=1)
        assert report.prompt_positions == answer.num_prompt_tokens and not report.is_estimate

    def test_bytes(self, report, llm):
        way, width = report.ways["toy"], 16
        assert way.features_bytes == 1000 * 4 * width * 4
        positions = report.prompt_positions + 3
        config = llm.model.config
        head = config.hidden_size // config.num_attention_heads
        keys = positions * config.num_hidden_layers * config.num_key_value_heads * head * 2 * 4
        assert report.asking_bytes["keys and values"] == keys
        assert way.training_bytes["gradients and AdamW"] == 12 * next(
            part.trained for part in report.parts if part.name == "toy bridge"
        )
        assert way.training_bytes["bridge's activations"] > 0 < way.training_bytes["LLM's activations"]

    def test_activations_are_what_the_model_itself_would_save(self, report, model, llm):
        for name, way in report.ways.items():
            branch = model.branches[name]
            item = branch.read(type(branch.modality).example(Path()).sources[0])
            weights = [*branch.parameters(), *llm.parameters()]
            with _on_meta():  # with fused attention too
                saved = _activations(model, name, item, weights, rows=1, num_new_tokens=3)
            assert tuple(way.training_bytes.values())[-2:] == saved and min(saved) > 0

    def test_everything_is_here(self, report):
        assert {source.state for source in report.sources} == {HERE}

    def test_a_training_config_says_its_batch_size_and_its_data(self, tmp_path, llm_folder, write):
        base = write(llm={"source": str(llm_folder)}, branches={"toy": {"bridge": small_qformer(llm_folder)}})
        run = tmp_path / "run.yaml"
        training = {"output_dir": str(tmp_path / "out"), "per_device_train_batch_size": 4, "use_cpu": True}
        run.write_text(
            yaml.safe_dump(
                {
                    "base": base.name,
                    "branch": "${branches.toy}",
                    "data": {"train": "nowhere.jsonl"},
                    "training": training,
                }
            )
        )
        report = examine(run)
        assert report.batch_size == 4 and report.ways.keys() == {"toy"}
        assert [source.used_for for source in report.sources if source.state == MISSING] == [["training data"]]
        larger = examine(run, batch_size=8).ways["toy"].training_bytes
        for part, taken in report.ways["toy"].training_bytes.items():
            assert larger[part] == pytest.approx(taken * (2 if part.endswith("activations") else 1), rel=0.01)

    def test_a_llm_keeps_no_more_than_of_the_rows_that_it_reads_at_once(self, write, llm_folder, monkeypatch):
        monkeypatch.setattr("xblip.parts.POSITIONS", 64)
        monkeypatch.setattr("xblip.parts.BYTES", 0)
        base = write(llm={"source": str(llm_folder)}, branches={"toy": {"bridge": small_qformer(llm_folder)}})
        fifty, hundred = (examine(base, batch_size=size) for size in (50, 100))
        ours, theirs = (report.ways["toy"].training_bytes for report in (fifty, hundred))
        assert theirs["bridge's activations"] == pytest.approx(2 * ours["bridge's activations"], rel=0.01)
        positions = fifty.prompt_positions + fifty.num_new_tokens
        embeddings = 50 * positions * fifty.ways["toy"].soft_prompt[1] * 4
        assert theirs["LLM's activations"] - ours["LLM's activations"] == embeddings


class TestStandIns:
    """What is not here is built from `architectures`."""

    def test_parameters_are_those_of_the_real_classes(self, write):
        report = examine(write(**pictures()))
        vit = CLIPVisionModel(CLIPVisionConfig(patch_size=16, **VIT))
        llama = LlamaForCausalLM(LlamaForCausalLM.config_class(**ARCHITECTURES["far/llama"]["config"]))
        assert [part.frozen for part in report.parts] == [count(vit), 0, count(llama)]
        assert report.parts[1].trained == 16 * 24 + 24 + 24 * 24 + 24
        assert report.ways["image"].features == [1, 5, 16] and report.ways["image"].soft_prompt == [5, 24]
        assert report.parts[2].dtype == "bfloat16" and report.is_estimate
        assert {source.name: (source.state, source.get) for source in report.sources} == {
            "far/llama": (MISSING, ""),
            "far/vit": (MISSING, "hf download far/vit"),
        }

    @pytest.mark.parametrize("dtype", ["float32", "float16"])
    def test_the_dtype_of_frozen_parts_may_be_chosen(self, write, dtype):
        report = examine(write(**pictures()), dtype=dtype)
        assert [part.dtype for part in report.parts] == [dtype, "float32", dtype]

    @pytest.mark.parametrize(
        ("bridge", "soft"),
        [
            ({"kind": "linear"}, 5),
            ({**small_qformer("far/tokenizer")}, 4),
            ({**small_qformer("", kind="frozen_qformer"), "qformer": "far/qformer"}, 4),
            ({**small_qformer("", kind="shared_qformer"), "qformer": "far/qformer"}, 4),
            ({"kind": "perceiver", "num_latents": 3, "num_layers": 1}, 3),
            ({"kind": "resampler_2d", "num_query_tokens": 9, "head_width": 4, "drop_cls": True}, 9),
            ({"kind": "pooled_linear", "num_query_tokens": 2, "hidden_size": 8}, 2),
        ],
        ids=lambda value: value.get("kind") if isinstance(value, dict) else None,
    )
    def test_every_bridge(self, write, bridge, soft):
        bridge.pop("instruction_aware", None)
        report = examine(write(**pictures(image=far(**bridge))))
        assert report.ways["image"].soft_prompt == [soft, 24]
        assert report.ways["image"].training_bytes["bridge's activations"] > 0

    def test_one_source_of_two_branches_is_one_encoder_and_two_alike_are_two(self, write):
        one = examine(write(**pictures(image=far(), video=far())))
        two = examine(write(**pictures(image=far(), video=far("far/other-vit"))))
        assert [part.shares for part in one.parts if "encoder" in part.name] == ["", "image encoder"]
        assert [part.shares for part in two.parts if "encoder" in part.name] == ["", ""]
        encoder = one.parts[0].weight_bytes
        assert two.asking_bytes["weights"] - one.asking_bytes["weights"] == encoder > 0

    def test_a_folder_without_weights_is_told(self, write, tmp_path):
        CLIPVisionConfig(patch_size=16, **VIT).save_pretrained(tmp_path / "vit")
        settings = ARCHITECTURES["far/vit"]["processor"]
        (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(settings))
        report = examine(write(**pictures(image=far(str(tmp_path / "vit")))))
        assert [source.state for source in report.sources] == [MISSING, WEIGHTLESS]

    def test_an_encoder_whose_shapes_depend_on_values_is_told_and_the_rest_goes_on(self, write, capsys):
        config = {"model_type": "siglip2", "vision_config": {key: VIT[key] for key in VIT if key != "image_size"}}
        known = {"far/naflex": {"config": config, "processor": {"image_processor_type": "Siglip2ImageProcessor"}}}
        described = pictures(image=far("far/naflex"), video=far())
        report = examine(write(**{**described, "architectures": {**ARCHITECTURES, **known}}))
        assert report.ways["image"].loaded["spatial_shapes"] == [1, 2] and report.ways["video"].soft_prompt == [40, 24]
        assert (
            report.ways["image"].error.startswith("it cannot be tried without weights: ")
            and report.soft_positions == 40
        )
        for shown in report_tables(report):
            Console(width=80).print(shown)
        assert "image: it cannot be tried without weights" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("dtype", "error"), [("bfloat16", ""), ("float32", "asking cannot be tried without weights: ")]
    )
    def test_a_mixture_of_experts(self, write, capsys, dtype, error):
        sizes = {name: value for name, value in ARCHITECTURES["far/llama"]["config"].items() if name != "dtype"}
        config = {
            **sizes,
            "model_type": "qwen3_moe",
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 8,
            "dtype": dtype,
        }
        known = {"far/moe": {"config": config, "tokenizer": TOKENIZER | {"size": 40}}}
        report = examine(write(**{**pictures("far/moe"), "architectures": {**ARCHITECTURES, **known}}))
        assert report.error.startswith(error) and bool(report.error) == bool(error) == (not report.asking_bytes)
        assert report.parts[-1].frozen > 0 and bool(report.ways["image"].error) == bool(error)
        for shown in report_tables(report):
            Console(width=80).print(shown)
        assert error in " ".join(capsys.readouterr().out.split())

    def test_a_model_without_branches(self, write):
        report = examine(write(llm={"source": "far/llama"}))
        assert [part.name for part in report.parts] == ["LLM"] and not report.ways and report.soft_positions == 0

    def test_an_encoder_decoder(self, write):
        config = {"model_type": "t5", "d_model": 24, "d_kv": 4, "num_heads": 4, "num_layers": 2, "vocab_size": 40}
        config["decoder_start_token_id"] = 0
        tokenizer = {"size": 40, "eos_token": "</s>", "ends_texts": True}
        known = {**ARCHITECTURES, "far/t5": {"config": config, "tokenizer": tokenizer}}
        report = examine(write(**{**pictures("far/t5"), "architectures": known}))
        assert report.logits == [1, 1, 40] and report.asking_bytes["keys and values"] > 0


def test_image_and_video_of_a_bundle_hold_one_encoder():
    model = xblip.load("numerals")
    image, video = (model.branches[name].encoder for name in ("image", "video"))
    assert image.module.model is video.module.model
    report = examine("numerals")
    parts = {part.name: part for part in report.parts}
    assert parts["video encoder"].shares == "image encoder" and parts["video encoder"].frozen == 0
    distinct = {id(parameter): parameter for parameter in model.parameters()}.values()
    assert sum(part.frozen + part.trained for part in report.parts) == sum(weight.numel() for weight in distinct)
    assert report.asking_bytes["weights"] == sum(weight.nbytes for weight in distinct)
