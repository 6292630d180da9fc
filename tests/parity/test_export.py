"""Bundles back to transformers: the same weights bit for bit, the same answers, and what cannot go back is refused."""

import pytest
import torch
from families import build
from safetensors.torch import load_file
from test_transformers_families import INSTRUCTIONS, inputs, samples

from xblip.branch import Branch, BranchConfig
from xblip.checkpoint import read
from xblip.convert import convert, export
from xblip.convert_qformer import Wanted
from xblip.errors import BundleError
from xblip.model import XBlip

pytestmark = pytest.mark.slow  # each saves models and reads them again

FAMILIES = ["instructblip-llama", "instructblip-t5", "blip2-opt", "blip2-t5"]


@pytest.fixture(scope="module", params=FAMILIES)
def trip(request, tmp_path_factory):
    """Folders: theirs, ours of it, theirs of that, and ours again."""
    root = tmp_path_factory.mktemp(request.param)
    build(request.param, root / "theirs")
    convert(root / "theirs", root / "ours")
    report = export(root / "ours", root / "back")
    assert not report.notes
    convert(root / "back", root / "again")
    return request.param, root


def test_a_round_trip_is_bit_equal(trip, measure):
    family, root = trip
    before, after = (load_file(root / name / "model.safetensors") for name in ("theirs", "back"))
    equal = before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert measure(family, "round trip", equal)
    files = sorted(path.relative_to(root / "ours") for path in (root / "ours").rglob("*.safetensors"))
    assert files == sorted(path.relative_to(root / "again") for path in (root / "again").rglob("*.safetensors"))
    assert all((root / "ours" / file).read_bytes() == (root / "again" / file).read_bytes() for file in files)


@torch.no_grad()
def test_transformers_loads_it_and_answers_the_same(trip):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    _, root = trip
    theirs, processor = (auto.from_pretrained(root / "back") for auto in (AutoModelForImageTextToText, AutoProcessor))
    ours = XBlip.from_pretrained(root / "ours")
    options = {"max_new_tokens": 8, "min_new_tokens": 3, "do_sample": False}
    given = inputs(processor, ours, "right" if ours.llm.is_encoder_decoder else "left")
    rows = theirs.generate(**given, **options)
    start = 1 if ours.llm.is_encoder_decoder else given["input_ids"].shape[1]
    expected = [text.strip() for text in processor.tokenizer.batch_decode(rows[:, start:], skip_special_tokens=True)]
    assert [answer.text for answer in ours.generate(samples(ours), **options)] == expected
    assert len(set(expected)) > 1 and len(expected) == len(INSTRUCTIONS)


def rebuilt(bundle, encoder: dict, bridge: dict) -> XBlip:
    """The bundle with other settings of its branch, and a fresh bridge."""
    model = XBlip.from_pretrained(bundle)
    old = model.branches["image"].config
    config = BranchConfig("image", config={**old.config, **encoder}, bridge={**old.bridge, **bridge}, cue="red : ")
    folder = bundle / "image"
    torch.manual_seed(0)
    branch = Branch.build(config, llm_width=model.llm.width, folder=folder).eval()
    for parameter in branch.bridge.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return XBlip(llm=model.llm, branches={"image": branch}, router={"postfix": " ?"}).eval()


@torch.no_grad()
def test_what_differs_there_is_told(bundle, tmp_path):
    from transformers import InstructBlipForConditionalGeneration

    ours = rebuilt(bundle, {"layer": -1}, {"features_layer_norm": True})
    ours.save_pretrained(tmp_path / "ours")
    report = export(tmp_path / "ours", tmp_path / "theirs")
    layout, epsilon = report.notes
    assert "lay out input_ids as this model's prompts are: '<s>red : <image>INSTRUCTION ?'" in layout
    assert "epsilon of 1e-6 there, and of 1e-5 here" in epsilon

    theirs = InstructBlipForConditionalGeneration.from_pretrained(tmp_path / "theirs")
    tokenize, branch = ours.llm.tokenizer, ours.branches["image"]
    [sample, *_] = samples(ours)
    media = [theirs.config.image_token_id] * theirs.config.num_query_tokens
    ids = [1, *tokenize("red : ").input_ids[1:], *media, *tokenize(f"{sample.instruction} ?").input_ids[1:]]
    logits = theirs(
        pixel_values=branch.read(sample.media[0].source)["pixel_values"],
        qformer_input_ids=branch.bridge.tokenizer(sample.instruction, return_tensors="pt").input_ids,
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
    ).logits
    batch = ours.router.assemble([ours.router.pieces(sample)], ours.soft_prompts([sample]))
    assert (ours.llm.logits(batch) - logits).abs().max() <= 1e-3


@pytest.mark.parametrize(
    ("encoder", "bridge", "why"),
    [
        ({}, {"features_layer_norm": True}, "stands not one layer norm"),
        ({"layer": -2}, {}, "stands not one layer norm"),
        ({"drop_cls": True}, {}, "stands not one layer norm"),
        ({}, {"max_segments": 4}, "its bridge has positions of segments"),
    ],
)
def test_a_branch_that_transformers_has_no_model_for_is_refused(bundle, tmp_path, encoder, bridge, why):
    rebuilt(bundle, encoder, bridge).save_pretrained(tmp_path / "ours")
    with pytest.raises(BundleError, match=f"The image branch cannot become a model of transformers, since .*{why}"):
        export(tmp_path / "ours", tmp_path / "theirs")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_bundles_that_cannot_go_back(toys, model, tmp_path):
    model.save_pretrained(tmp_path / "two")
    with pytest.raises(BundleError, match=r"this bundle has 2 branches \(toy, beads\): choose one of them by --only"):
        export(tmp_path / "two", tmp_path / "theirs")
    with pytest.raises(BundleError, match="choose one of them by --only"):
        export(tmp_path / "two", tmp_path / "theirs", Wanted(only="image"))
    with pytest.raises(BundleError, match="since InstructBlipForConditionalGeneration does not read its media"):
        export(tmp_path / "two", tmp_path / "theirs", Wanted(only="toy"))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_and_shards_come_across(tmp_path, dtype):
    model, processor = build("instructblip-llama", tmp_path / "float32")
    model.to(dtype).save_pretrained(tmp_path / "theirs", max_shard_size="60KB")
    processor.save_pretrained(tmp_path / "theirs")
    assert len(list((tmp_path / "theirs").glob("model-*.safetensors"))) > 2
    convert(tmp_path / "theirs", tmp_path / "ours")
    ours = XBlip.from_pretrained(tmp_path / "ours")
    assert ours.llm.dtype == next(ours.branches["image"].encoder.parameters()).dtype == dtype
    assert len({answer.text for answer in ours.generate(samples(ours), max_new_tokens=4, min_new_tokens=3)}) > 1
    export(tmp_path / "ours", tmp_path / "back")
    before, after = (read(tmp_path / name).tensors for name in ("theirs", "back"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
