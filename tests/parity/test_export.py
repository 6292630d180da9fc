"""Bundles back to transformers: the same weights bit for bit, the same answers, and what cannot go back is refused."""

import pytest
import torch
from families import build
from safetensors.torch import load_file
from test_transformers_families import INSTRUCTIONS, inputs, samples

from xblip.convert import convert, export
from xblip.model import XBlip

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
