"""Models of transformers, converted: the same features, soft prompts, logits and texts as their originals."""

import numpy as np
import pytest
import torch
from families import QUERIES, build
from safetensors.torch import load_file
from transformers import set_seed

from xblip.convert import convert
from xblip.model import XBlip
from xblip.sample import Media, Sample

INSTRUCTIONS = ["what is this ?", "describe it", "which one is the larger number , the input or this ?"]
ANSWERS = ["the red one", "no", "seven"]
FAMILIES = [
    "instructblip-llama", "instructblip-t5", "instructblipvideo-llama", "instructblipvideo-t5", "blip2-opt", "blip2-t5",
    "llava-llama",
]  # fmt: skip
TURN = "USER: <image>\n{} ASSISTANT:"
"""LLaVA-1.5's, as its model card has it."""
OPTIONS = {
    "greedy": {"do_sample": False},
    "beam 5": {"do_sample": False, "num_beams": 5},
    "sampled": {"do_sample": True, "temperature": 0.7, "top_k": 0},
}


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    """The family's name, their model and processor, and ours, converted from the folder that theirs was saved in."""
    root = tmp_path_factory.mktemp(request.param)
    model, processor = build(request.param, root / "theirs")
    report = convert(root / "theirs", root / "ours")
    assert report.made.startswith("bundle: ") and not report.left_out
    assert report.loaded == len(load_file(root / "theirs" / "model.safetensors"))
    return request.param, model, processor, XBlip.from_pretrained(root / "ours")


def sources(ours) -> list[np.ndarray]:
    """Three media of what the model reads: pictures, or videos of four frames."""
    frames = [np.random.default_rng(seed).integers(0, 256, (4, 40, 50, 3), dtype=np.uint8) for seed in range(3)]
    return frames if "video" in ours.branches else [video[0] for video in frames]


def samples(ours) -> list[Sample]:
    (modality,) = ours.branches
    media = [[Media(modality, source)] for source in sources(ours)]
    return [Sample(*parts) for parts in zip(INSTRUCTIONS, media, ANSWERS, strict=True)]


def inputs(processor, ours, side: str) -> dict:
    processor.tokenizer.padding_side = side
    texts = [TURN.format(text) for text in INSTRUCTIONS] if ours.router.config.chat_template else INSTRUCTIONS
    return processor(images=sources(ours), text=texts, padding=True, return_tensors="pt")


@torch.no_grad()
def test_features_soft_prompts_and_logits(pair, measure):
    family, theirs, processor, ours = pair
    given = inputs(processor, ours, "right")
    features = theirs.get_video_features if "video" in ours.branches else theirs.get_image_features
    media = {name: value for name, value in given.items() if name.startswith(("pixel", "qformer"))}
    expected = features(**media, return_dict=True)
    (branch,) = ours.branches.values()
    ask = samples(ours)
    encoded = branch.encode([sample.media[0].source for sample in ask])
    queries = []
    branch.bridge.projector.register_forward_pre_hook(lambda _, taken: queries.append(taken[0]))
    soft = torch.stack([prompts[0] for prompts in ours.soft_prompts(ask)])

    read, projected = expected.last_hidden_state, expected.pooler_output
    if hasattr(theirs, "qformer"):
        by_queries = expected.qformer_outputs.last_hidden_state[:, :QUERIES]
        assert measure(family, "q-former", far(queries[0], by_queries)) <= 1e-5
    else:
        read, projected = expected.hidden_states[-2][:, 1:], torch.stack(projected)
    assert measure(family, "features", far(encoded.values, read)) <= 1e-5
    assert measure(family, "soft prompt", far(soft, projected.reshape(soft.shape))) <= 1e-4

    batch = ours.router.assemble(
        [ours.router.pieces(sample) for sample in ask], [[prompt] for prompt in soft], answers=ANSWERS
    )
    actual = ours.llm.logits(batch)
    if ours.llm.is_encoder_decoder:
        logits, real = theirs(**given, labels=batch.labels).logits, batch.labels != -100
    else:
        logits, real = theirs(**given).logits, given["attention_mask"].bool()
        actual = actual[:, : real.shape[1]]
    assert measure(family, "logits", far(actual[real], logits[real])) <= 1e-4


@pytest.mark.parametrize("way", OPTIONS)
@torch.no_grad()
def test_texts(pair, measure, way):
    family, theirs, processor, ours = pair
    options = {"max_new_tokens": 8, "min_new_tokens": 3, **OPTIONS[way]}
    given = inputs(processor, ours, "right" if ours.llm.is_encoder_decoder else "left")
    set_seed(3)
    rows = theirs.generate(**given, **options)
    start = 1 if ours.llm.is_encoder_decoder else given["input_ids"].shape[1]
    expected = processor.tokenizer.batch_decode(rows[:, start:], skip_special_tokens=True)
    set_seed(3)
    actual = [answer.text for answer in ours.generate(samples(ours), **options)]
    assert measure(family, way, actual == [text.strip() for text in expected]), (actual, expected)
    assert len(set(actual)) > 1


def far(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.shape == expected.shape
    return (actual - expected).abs().max().item()
