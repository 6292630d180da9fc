"""EVA-CLIP-g from its own file: names, positions, blocks, and the same features as the original's code gives."""

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoImageProcessor, Blip2VisionConfig, Blip2VisionModel
from xblip_image import Image
from xblip_image_convert import fitted

import xblip
from xblip.checkpoint import Checkpoint, read

WIDTH, HEADS, HIDDEN, PATCH = 176, 2, 64, 56


def tensors(depth=3, side=4, prefix="", head=True):
    """A small EVA-CLIP under the original's names, its values random."""
    shapes = {"cls_token": (1, 1, WIDTH), "pos_embed": (1, 1 + side * side, WIDTH)}
    shapes |= {"patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH), "patch_embed.proj.bias": (WIDTH,)}
    for number in range(depth):
        block = {f"norm{norm}.{part}": (WIDTH,) for norm in (1, 2) for part in ("weight", "bias")}
        block |= {"attn.q_bias": (WIDTH,), "attn.v_bias": (WIDTH,), "attn.qkv.weight": (3 * WIDTH, WIDTH)}
        block |= {"attn.proj.weight": (WIDTH, WIDTH), "attn.proj.bias": (WIDTH,)}
        block |= {"mlp.fc1.weight": (HIDDEN, WIDTH), "mlp.fc1.bias": (HIDDEN,)}
        block |= {"mlp.fc2.weight": (WIDTH, HIDDEN), "mlp.fc2.bias": (WIDTH,)}
        shapes |= {f"blocks.{number}.{name}": shape for name, shape in block.items()}
    if head:
        shapes |= {"norm.weight": (WIDTH,), "fc_norm.bias": (WIDTH,), "head.weight": (5, WIDTH)}
    generator = torch.Generator().manual_seed(0)
    return {prefix + name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def original(weights, pixel_values, depth):
    """The original's forward pass, written out: pre-norm blocks, q and v with a bias, no final norm."""
    tokens = F.conv2d(pixel_values, weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"], PATCH)
    tokens = tokens.flatten(2).transpose(1, 2)
    tokens = torch.cat([weights["cls_token"].expand(len(tokens), -1, -1), tokens], 1) + weights["pos_embed"]
    for number in range(depth):
        block = {name.removeprefix(f"blocks.{number}."): value for name, value in weights.items()}

        def norm(values, name, block=block):
            return F.layer_norm(values, (WIDTH,), block[f"{name}.weight"], block[f"{name}.bias"], 1e-6)

        bias = torch.cat([block["attn.q_bias"], torch.zeros(WIDTH), block["attn.v_bias"]])
        mixed = F.linear(norm(tokens, "norm1"), block["attn.qkv.weight"], bias)
        query, key, value = mixed.reshape(*tokens.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        attention = (query * (WIDTH // HEADS) ** -0.5 @ key.transpose(-2, -1)).softmax(-1)
        heard = (attention @ value).transpose(1, 2).reshape(tokens.shape)
        tokens = tokens + F.linear(heard, block["attn.proj.weight"], block["attn.proj.bias"])
        inner = F.gelu(F.linear(norm(tokens, "norm2"), block["mlp.fc1.weight"], block["mlp.fc1.bias"]))
        tokens = tokens + F.linear(inner, block["mlp.fc2.weight"], block["mlp.fc2.bias"])
    return tokens


@pytest.mark.parametrize(("depth", "used"), [(3, 3), (40, 39)])
def test_an_own_file_gives_the_original_s_features(tmp_path, depth, used):
    weights = tensors(depth)
    torch.save(weights, tmp_path / "eva_vit_g.pth")
    checkpoint = read(tmp_path / "eva_vit_g.pth")
    assert Image.convert_encoder(checkpoint, tmp_path / "encoder")
    checkpoint.check_all_used()
    assert {"norm.weight", "fc_norm.bias", "head.weight"} <= set(checkpoint.left_out)
    assert set(checkpoint.fresh) == {"post_layernorm.weight", "post_layernorm.bias"}
    encoder = Image(Image.Config(encoder=str(tmp_path / "encoder"), layer=-1)).build_encoder().eval()
    pixel_values = torch.rand(2, 3, 224, 224)
    with torch.no_grad():
        actual = encoder(pixel_values=pixel_values)
    torch.testing.assert_close(actual, original(weights, pixel_values, used), atol=1e-4, rtol=1e-5)
    assert len(encoder.model.encoder.layers) == used


def test_of_a_lavis_checkpoint_only_the_encoder_is_taken(tmp_path):
    others = {"ln_vision.weight": torch.ones(WIDTH), "query_tokens": torch.zeros(1, 32, 8)}
    checkpoint = Checkpoint(tmp_path, tensors(prefix="visual_encoder.", head=False) | others)
    assert Image.convert_encoder(checkpoint, tmp_path / "encoder")
    assert not checkpoint.taken & set(others) and not checkpoint.left_out


def test_half_precision_stays(tmp_path):
    weights = {name: value.half() for name, value in tensors().items()}
    weights["pos_embed"] = weights["pos_embed"].float()
    assert Image.convert_encoder(Checkpoint(tmp_path, weights), tmp_path / "encoder")
    model = Image(Image.Config(encoder=str(tmp_path / "encoder"))).build_encoder().model
    assert {weight.dtype for weight in model.parameters()} == {torch.float16}


def test_positions_of_another_resolution_are_interpolated(tmp_path):
    weights = tensors(side=7)
    assert Image.convert_encoder(Checkpoint(tmp_path, weights), tmp_path / "encoder")
    held = Image(Image.Config(encoder=str(tmp_path / "encoder"))).build_encoder().model.embeddings.position_embedding
    grid = weights["pos_embed"][0, 1:].reshape(7, 7, WIDTH).permute(2, 0, 1)[None]
    wanted = (
        F.interpolate(grid, size=(4, 4), mode="bicubic", align_corners=False)[0].permute(1, 2, 0).reshape(16, WIDTH)
    )
    assert torch.equal(held[0, 0], weights["pos_embed"][0, 0])
    torch.testing.assert_close(held[0, 1:], wanted)
    assert fitted(weights["pos_embed"], 7) is weights["pos_embed"]


def test_its_processor_is_blip_s(tmp_path):
    assert Image.convert_encoder(Checkpoint(tmp_path, tensors()), tmp_path / "encoder")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "encoder")
    assert dict(processor.size) == {"height": 224, "width": 224} and processor.resample == 3
    assert list(processor.image_mean) == [0.48145466, 0.4578275, 0.40821073]
    assert list(processor.image_std) == [0.26862954, 0.26130258, 0.27577711]


def test_it_has_the_published_number_of_parameters():
    """The original lacks the final norm of transformers' model, and a bias of keys, which is zero there."""
    with torch.device("meta"):
        model = Blip2VisionModel(Blip2VisionConfig())
    count = sum(weight.numel() for weight in model.parameters())
    assert count - 2 * 1408 - 39 * 1408 == 985_894_528


def test_other_checkpoints_are_left_alone(tmp_path):
    checkpoint = Checkpoint(tmp_path, {"embeddings.cls_token": torch.zeros(1, 1, 4), "pos_embed": torch.zeros(1, 5, 4)})
    assert not Image.convert_encoder(checkpoint, tmp_path / "encoder")
    assert not checkpoint.taken and not checkpoint.left_out and not (tmp_path / "encoder").exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            {"blocks.1.attn.v_bias": None},
            r"layers\.1\.self_attn\.qkv\.bias is missing; blocks\.1\.attn\.q_bias has no place",
        ),
        ({"blocks.2.norm1.weight": None}, r"layers\.2\.layer_norm1\.weight"),
        ({"blocks.1.gamma_1": torch.ones(WIDTH)}, r"blocks\.1\.gamma_1"),
        ({"blocks.1.norm1.bias": torch.ones(3)}, r"layers\.1\.layer_norm1\.bias"),
    ],
)
def test_missing_surplus_and_misshapen_weights_are_named(tmp_path, change, named):
    weights = {name: value for name, value in (tensors() | change).items() if value is not None}
    with pytest.raises(xblip.BundleError, match=rf"The EVA-CLIP-g in .* is not whole, or another version.*{named}"):
        Image.convert_encoder(Checkpoint(tmp_path, weights), tmp_path / "encoder")
