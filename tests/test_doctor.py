"""The doctor: what it says of a model without weights is true of the model with them, and faults are told."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
import yaml
from kit import PLUGIN, make_model
from rich.console import Console
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaForCausalLM

import xblip
from xblip import cli, doctor
from xblip.blueprint import HERE, MISSING, WEIGHTLESS
from xblip.doctor import environment, environment_table, examine, report_tables
from xblip.dryrun import _loss, _on_meta, _saved_bytes
from xblip.errors import XBlipError
from xblip.testing import small_qformer

TOY = [1.0, 2.0, 3.0, 4.0]  # the toy modality's own example
VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "image_size": 32}
ARCHITECTURES = {
    "far/vit": {
        "config": {"model_type": "clip_vision_model", "patch_size": 16, **VIT},
        "processor": {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": 32},
            "crop_size": {"height": 32, "width": 32},
        },
        "get": "hf download far/vit",
    },
    "far/llama": {
        "config": {
            "model_type": "llama",
            "vocab_size": 40,
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "dtype": "bfloat16",
        },
        "tokenizer": {"size": 40, "bos_token": "<s>", "eos_token": "</s>"},
    },
    "far/qformer": {"tokenizer": {"size": 30, "pad_token": "[PAD]"}},
    "far/tokenizer": {"tokenizer": {"size": 30, "pad_token": "[PAD]"}},
}
TOKENIZER = {"size": 9, "eos_token": "</s>"}
ARCHITECTURES["far/other-vit"] = ARCHITECTURES["far/vit"]
pytestmark = pytest.mark.filterwarnings("ignore::xblip.errors.UnknownWordsWarning")


@pytest.fixture
def write(tmp_path):
    """Writes a config of these keys and returns its path."""

    def written(**values) -> Path:
        path = tmp_path / "model.yaml"
        path.write_text(yaml.safe_dump({"architectures": ARCHITECTURES, **values}))
        return path

    return written


def far(encoder="far/vit", **bridge) -> dict:
    return {"config": {"encoder": encoder}, "bridge": bridge or {"kind": "mlp"}}


def pictures(llm="far/llama", **branches) -> dict:
    return {"llm": {"source": llm}, "branches": branches or {"image": far()}}


def count(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


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
        assert way.training_bytes["activations"] > 0

    def test_activations_are_what_the_model_itself_would_save(self, report, model, llm):
        for name, way in report.ways.items():
            branch = model.branches[name]
            item = branch.read(type(branch.modality).example(Path()).sources[0])
            weights = [*branch.parameters(), *llm.parameters()]
            with _on_meta():  # with fused attention too
                saved = _saved_bytes(lambda name=name, item=item: _loss(model, name, item, 1, 3), weights)
            assert way.training_bytes["activations"] == saved > 0

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
        assert (
            examine(run, batch_size=8).ways["toy"].training_bytes["activations"]
            > (report.ways["toy"].training_bytes["activations"])
        )


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
        assert report.ways["image"].training_bytes["activations"] > 0

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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (pictures(image=far(kind="qfromer")), 'No bridge is called "qfromer". Did you mean "qformer"?'),
        (
            pictures(image={**far(), "encodr_dtype": "float16"}),
            'Unknown key "branches.image.encodr_dtype". Did you mean',
        ),
        (pictures(image=far(kind="mlp", hidden=3)), 'Unknown key "image.bridge.hidden". Did you mean "hidden_size"?'),
        (pictures(imagee=far()), 'No modality is called "imagee". Did you mean "image"?'),
        (pictures(image={**far(), "modality": "video"}), 'branches.image describes a branch of "video"'),
        (pictures(image=3), '"branches.image" must hold keys with values, not 3'),
        ({**pictures(), "branches": 3}, "branches must be a list of folders, or name each modality's folder"),
        (
            pictures(image=far("far/unknown")),
            'There is nothing of "far/unknown", the image encoder, on this machine, and the config does not say what it '
            'holds: get it, or describe it in the config under architectures."far/unknown"',
        ),
        (pictures("far/unknown"), 'There is nothing of "far/unknown", the LLM, on this machine'),
        (
            pictures(image=far(**small_qformer("nowhere"))),
            'There is nothing of "nowhere", the image tokenizer, on this machine',
        ),
        (
            {**pictures(), "architectures": {"far/llama": {"confg": {}}}},
            'Unknown key "architectures."far/llama".confg". Did you mean "config"?',
        ),
        (
            {**pictures(), "architectures": {"far/llama": {"tokenizer": {"eos_token": "</s>"}}}},
            'architectures."far/llama".tokenizer.size must be the number of tokens it knows, at least 2, not 0',
        ),
        (
            {**pictures(), "architectures": {"far/llama": {"tokenizer": {"size": 9, "ends_texts": True}}}},
            'architectures."far/llama".tokenizer.ends_texts needs an eos_token',
        ),
        (
            {**pictures(), "architectures": {"far/llama": {"tokenizer": {"size": 9, "eos_tokn": "</s>"}}}},
            'Unknown key "architectures."far/llama".tokenizer.eos_tokn". Did you mean "eos_token"?',
        ),
        (
            {**pictures(), "architectures": {**ARCHITECTURES, "far/llama": {"tokenizer": TOKENIZER}}},
            'Cannot load the LLM "far/llama": ',
        ),
        (
            {
                **pictures(),
                "architectures": {**ARCHITECTURES, "far/vit": {"config": ARCHITECTURES["far/vit"]["config"]}},
            },
            'Cannot load the image processor of "far/vit"',
        ),
        ({"router": {"cues": False}}, "is no config of a model: it names no llm. Expected a model config"),
        ({**pictures(), "routr": {}}, 'Unknown key "model.yaml.routr". Did you mean "router"?'),
        (pictures(image="nowhere"), "There is no branch in"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_what_is_wrong_with_a_config_is_told(write, changes, message):
    with pytest.raises(XBlipError) as caught:
        examine(write(**changes))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"dtype": "fp16"}, 'Unknown dtype "fp16". Known'), ({"batch_size": 0}, "batch_size must be at least 1, not 0")],
)
def test_wrong_options_are_told(write, options, message):
    with pytest.raises(XBlipError, match=message):
        examine(write(**pictures()), **options)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.yaml", 'No config file at "nowhere.yaml"'),
        ("nowhere", 'No model is called "nowhere"'),
        ("nobody/nothing", 'There is no "nobody/nothing" on this machine'),
    ],
)
def test_what_is_not_here_is_not_downloaded(name, message):
    with pytest.raises(XBlipError, match=message):
        examine(name)


def test_a_qformer_for_an_encoder_of_another_width_is_refused(write, tmp_path):
    folder = tmp_path / "qformer"
    folder.mkdir()
    save_file({"layer_norm.weight": torch.zeros(99)}, folder / "bridge.safetensors")
    bridge = {"kind": "frozen_qformer", "qformer": str(folder), "num_hidden_layers": 1}
    with pytest.raises(XBlipError, match="does not fit the settings of this bridge"):
        examine(write(**pictures(image=far(**bridge))))


@pytest.mark.usefixtures("toys")
@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("encoder", "trained for an encoder of width 99; the one named has 16"),
        ("llm", "for an LLM of width 99"),
    ],
)
def test_a_saved_branch_for_other_widths_is_refused(llm, tmp_path, part, message):
    make_model(llm).save_pretrained(tmp_path / "bundle")
    file = tmp_path / "bundle" / "toy" / "branch.yaml"
    saved = yaml.safe_load(file.read_text())
    saved[part]["width"] = 99
    file.write_text(yaml.safe_dump(saved))
    with pytest.raises(XBlipError, match=message):
        examine(tmp_path / "bundle")
    shutil.rmtree(tmp_path / "bundle")


@pytest.mark.usefixtures("toys")
def test_weights_of_another_shape_are_refused_unread(llm, tmp_path):
    make_model(llm).save_pretrained(tmp_path / "bundle")
    save_file({"query_tokens": torch.zeros(1)}, tmp_path / "bundle" / "toy" / "bridge.safetensors")
    with pytest.raises(XBlipError, match=r"does not fit its branch\.yaml"):
        examine(tmp_path / "bundle")


def test_a_described_branch_is_not_loaded(write):
    with pytest.raises(
        XBlipError, match='only describes its branch "image".*xblip train.*branches.image.*xblip convert'
    ):
        xblip.load(write(**pictures()))


class TestEnvironment:
    def test_versions_and_what_modalities_need(self):
        checks = {(check.group, check.name): check for check in environment()}
        assert checks["xblip", "torch"].version.startswith(torch.__version__.split("+")[0])
        for needed in (("image", "Pillow"), ("video", "FFmpeg, by PyAV"), ("audio", "torchaudio")):
            assert checks[needed].version and not checks[needed].error
        assert checks["point_cloud", "open3d, with libusb"].version

    def test_what_does_not_load_is_told_with_its_reason(self, site):
        site.install("thermal", PLUGIN.format(name="thermal") + NEEDS)
        site.install("broken_one", "import nowhere_to_be_found\n")
        found = {(check.group, check.name): check for check in environment()}
        assert found["thermal", "camera"].error == "libcamera.so.1: cannot open shared object file"
        assert found["thermal", "lens"].version == "3.2"
        (broken,) = [check for check in found.values() if check.group == "broken_one"]
        assert "No module named 'nowhere_to_be_found'" in broken.error

    def test_a_diagnosis_that_fails_is_told(self, site):
        site.install("thermal", PLUGIN.format(name="thermal") + NEEDS.replace("return", "raise OSError('gone') or"))
        (check,) = [check for check in environment() if check.group == "thermal" and check.error]
        assert (check.name, check.error) == ("diagnose", "OSError: gone")

    def test_a_torch_for_cuda_without_a_device_is_a_fault(self, monkeypatch):
        def no_driver():
            raise RuntimeError("Found no NVIDIA driver on your system. Please install one from http://...")

        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.cuda, "init", no_driver)
        (check,) = [check for check in environment() if check.name == "accelerator"]
        assert check.error == (
            "torch is built for CUDA 13.0, but finds no device: Found no NVIDIA driver on your system."
        )

    def test_it_starts_where_torch_does_not(self, tmp_path):
        (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')")
        path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
        run = subprocess.run(
            [sys.executable, "-m", "xblip.cli", "doctor", "--json"],
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stderr
        checks = {check["name"]: check for check in json.loads(run.stdout)["environment"]}
        assert checks["torch"]["error"] == "libcudart.so.13: cannot open shared object file"
        assert checks["numpy"]["version"] and checks["xblip-image 0.1.0"]["error"]

    def test_a_torch_for_the_cpu_is_none(self, monkeypatch):
        monkeypatch.setattr(torch.version, "cuda", None)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        assert doctor.accelerators() == "none: this torch is built for the CPU alone"


NEEDS = """

def camera():
    raise OSError("libcamera.so.1: cannot open shared object file")


def diagnose(cls):
    return {"camera": camera, "lens": lambda: "3.2"}


Toy.diagnose = classmethod(diagnose)
"""


@pytest.mark.parametrize("width", [80, 120])
def test_tables_keep_to_the_width_of_the_terminal(write, width, capsys):
    report = examine(write(**pictures(image=far(), video=far())))
    console = Console(width=width, highlight=False)
    for shown in (environment_table(environment()), *report_tables(report)):
        console.print(shown)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    for part in ("that of image", "pixel_values 1×3×32×32", "missing: far/vit (image encoder, video encoder)"):
        assert part in text
    assert "    hf download far/vit" in lines


class TestCommand:
    @pytest.fixture
    def run(self, monkeypatch, capsys):
        def run(*arguments: str) -> tuple[int, str, str]:
            monkeypatch.setattr("sys.argv", ["xblip", "doctor", *arguments])
            with pytest.raises(SystemExit) as ended:
                cli.main()
            return ended.value.code or 0, *capsys.readouterr()

        return run

    def test_without_a_config_it_tells_of_the_environment(self, run):
        status, out, _ = run()
        assert status == 0 and "Environment" in out and "torchaudio" in out and "Parts" not in out

    def test_json_is_for_scripts(self, run, write):
        status, out, _ = run(str(write(**pictures())), "--json", "--batch-size", "2", "--dtype", "float16")
        found = json.loads(out)
        assert (
            status == 0
            and {"group": "xblip", "name": "numpy", "version": numpy.__version__, "error": ""} in (found["environment"])
        )
        assert found["config"]["batch_size"] == 2 and found["config"]["parts"][0]["dtype"] == "float16"

    def test_tables(self, run, write):
        status, out, _ = run(str(write(**pictures())), "branches.image.bridge.kind=linear")
        assert status == 0 and "linear" in out and "Memory at batch size 1" in out and "0 of 2 sources are here." in out

    def test_a_fault_is_one_line(self, run, write):
        status, out, err = run(str(write(**pictures("far/unknown"))))
        assert status == 2 and "Parts" not in out and len(err.splitlines()) == 1


def test_a_report_is_json(write):
    report = examine(write(**pictures()))
    assert json.loads(json.dumps(dataclasses.asdict(report)))["ways"]["image"]["features"] == [1, 5, 16]
