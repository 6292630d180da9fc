"""The whole image path against a tiny random InstructBlipForConditionalGeneration of transformers."""

import pytest
import torch
from transformers import (
    CLIPImageProcessor,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipQFormerConfig,
    InstructBlipVisionConfig,
    LlamaConfig,
)

from xblip.branch import Branch, BranchConfig
from xblip.llm import FrozenLLM, LLMConfig
from xblip.model import XBlip
from xblip.router import Bos, RouterConfig
from xblip.sample import Media, Sample
from xblip.testing import small_qformer, toy_tokenizer

pytest.importorskip("xblip_image")

QUERIES = 4
INSTRUCTIONS = ["what is this ?", "describe it", "which one is the larger number , the input or this ?"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Theirs, and ours with their weights, through the folders that each saves."""
    root = tmp_path_factory.mktemp("instructblip")
    tokenizer = toy_tokenizer()
    tokenizer.add_tokens(["<image>"])
    config = InstructBlipConfig(
        vision_config=InstructBlipVisionConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=28,
            patch_size=7, initializer_range=0.1,
        ).to_dict(),
        qformer_config=InstructBlipQFormerConfig(
            vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
            intermediate_size=64, encoder_hidden_size=32, initializer_range=0.2,
        ).to_dict(),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=40, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        ).to_dict(),
        num_query_tokens=QUERIES,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = InstructBlipForConditionalGeneration(config).eval()
    torch.nn.init.normal_(theirs.query_tokens)
    theirs.vision_model.save_pretrained(root / "encoder")
    CLIPImageProcessor(size={"height": 28, "width": 28}, do_center_crop=False).save_pretrained(root / "encoder")
    theirs.language_model.save_pretrained(root / "llm")
    tokenizer.save_pretrained(root / "llm")

    llm = FrozenLLM.from_pretrained(LLMConfig(source=str(root / "llm"), dtype="float32"))
    settings = small_qformer(root / "llm", num_hidden_layers=3, num_query_tokens=QUERIES, features_layer_norm=False)
    branch = Branch.build(
        BranchConfig("image", config={"encoder": str(root / "encoder")}, bridge=settings), llm_width=llm.width
    )
    branch.bridge.qformer.load_state_dict(theirs.qformer.state_dict(), strict=True)
    branch.bridge.query_tokens.data.copy_(theirs.query_tokens)
    branch.bridge.projector.load_state_dict(theirs.language_projection.state_dict(), strict=True)
    router = RouterConfig(cues=False, bos=Bos.instruction)
    return theirs, XBlip(llm=llm, branches={"image": branch}, router=router).eval()


def their_inputs(model: XBlip, pixels, instruction: str) -> dict:
    tokenizer = model.llm.tokenizer
    text = tokenizer(instruction).input_ids
    image = [tokenizer.convert_tokens_to_ids("<image>")] * QUERIES
    ids = torch.tensor([[*image, tokenizer.bos_token_id, *text]])
    return {
        "pixel_values": pixels,
        "qformer_input_ids": torch.tensor([text]),
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
    }


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 256, (40, 50, 3), generator=generator, dtype=torch.uint8).numpy() for _ in INSTRUCTIONS]


def test_logits_equal(pair, images):
    theirs, ours = pair
    samples = [Sample(text, [Media("image", image)], "one") for text, image in zip(INSTRUCTIONS, images, strict=True)]
    with torch.no_grad():
        batch = ours.router.assemble(
            [ours.router.pieces(sample) for sample in samples],
            ours.soft_prompts(samples),
            answers=[sample.answer for sample in samples],
        )
        logits = ours.llm.logits(batch)
        for row, sample in enumerate(samples):
            pixels = ours.branches["image"].read(sample.media[0].source)["pixel_values"]
            inputs = their_inputs(ours, pixels, sample.instruction)
            expected = theirs(**inputs).logits[0]
            assert (logits[row, : len(expected)] - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=str)
def test_generated_tokens_equal(pair, images, options):
    theirs, ours = pair
    samples = [Sample(text, [Media("image", image)]) for text, image in zip(INSTRUCTIONS, images, strict=True)]
    answers = ours.generate(samples, max_new_tokens=8, do_sample=False, **options)
    for sample, answer in zip(samples, answers, strict=True):
        pixels = ours.branches["image"].read(sample.media[0].source)["pixel_values"]
        inputs = their_inputs(ours, pixels, sample.instruction)
        ids = theirs.generate(**inputs, max_new_tokens=8, do_sample=False, **options)[0, inputs["input_ids"].shape[1] :]
        assert answer.text == ours.llm.tokenizer.decode(ids, skip_special_tokens=True).strip()
