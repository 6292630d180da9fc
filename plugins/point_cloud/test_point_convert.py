"""ULIP's published checkpoints become encoders: which weights are taken, what is read off them, what is refused."""

import argparse
from collections import Counter

import pytest
import torch
from test_point_bert import clouds, reference
from transformers import AutoModel
from xblip_point_cloud import PointCloud

import xblip
from xblip.checkpoint import read
from xblip.frozen import fingerprint

LINEAR = ("weight", "bias")
BATCH_NORM = ("weight", "bias", "running_mean", "running_var")


def point_encoder(*, width=128, layers=2, channels=3, pointnet=(8, 16, 32), embedding=24, position=20):
    """Random weights of a PointBERT, by the names and shapes of ULIP's source (models/pointbert/point_encoder.py)."""
    first, second, third = pointnet
    shapes = {"cls_token": (1, 1, width), "cls_pos": (1, 1, width), "norm.weight": (width,), "norm.bias": (width,)}
    for name, out, into in (
        ("encoder.first_conv.0", first, channels),
        ("encoder.first_conv.3", second, first),
        ("encoder.second_conv.0", third, 2 * second),
        ("encoder.second_conv.3", embedding, third),
    ):
        shapes |= {f"{name}.weight": (out, into, 1), f"{name}.bias": (out,)}
    shapes |= {f"encoder.first_conv.1.{part}": (first,) for part in BATCH_NORM}
    shapes |= {f"encoder.second_conv.1.{part}": (third,) for part in BATCH_NORM}
    linears = {"reduce_dim": (width, embedding), "pos_embed.0": (position, 3), "pos_embed.2": (width, position)}
    for layer in range(layers):
        block = f"blocks.blocks.{layer}"
        shapes[f"{block}.attn.qkv.weight"] = (3 * width, width)
        shapes |= {f"{block}.{norm}.{part}": (width,) for norm in ("norm1", "norm2") for part in LINEAR}
        linears |= {
            f"{block}.attn.proj": (width, width),
            f"{block}.mlp.fc1": (4 * width, width),
            f"{block}.mlp.fc2": (width, 4 * width),
        }
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}
    for norm in ("first_conv", "second_conv"):
        weights[f"encoder.{norm}.1.running_var"] = weights[f"encoder.{norm}.1.running_var"].abs() + 0.5
        weights[f"encoder.{norm}.1.num_batches_tracked"] = torch.tensor(7)
    return weights


def ulip(encoder, *, root="module.", projection=10):
    """The tensors of a whole ULIP around a point encoder."""
    width = encoder.get("norm.weight", torch.empty(128)).numel()
    generator = torch.Generator().manual_seed(1)
    parts = {f"point_encoder.{name}": tensor for name, tensor in encoder.items()}
    parts |= {
        "pc_projection": torch.randn(2 * width, projection, generator=generator) * 0.1,
        "visual.cls_token": torch.zeros(1, 1, 8),
        "visual.blocks.0.norm1.weight": torch.zeros(8),
        "transformer.resblocks.0.ln_1.weight": torch.zeros(8),
        "token_embedding.weight": torch.zeros(5, 8),
        "logit_scale": torch.zeros(()),
    }
    return {root + name: tensor for name, tensor in parts.items()}


@pytest.fixture
def saved(tmp_path):
    """Saves tensors as ULIP's training loop does, and reads them."""

    def save(tensors):
        path = tmp_path / "checkpoint_pointbert.pt"
        torch.save({"epoch": 3, "state_dict": tensors, "best_acc1": 60.4, "args": argparse.Namespace(lr=1e-3)}, path)
        return read(path)

    return save


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "encoder").mkdir()
    return tmp_path / "encoder"


@pytest.mark.parametrize("root", ["module.", ""])
def test_ulip_becomes_an_encoder_of_the_published_network(saved, folder, root):
    weights = point_encoder()
    checkpoint = saved(ulip(weights, root=root))
    assert PointCloud.convert_encoder(checkpoint, folder)
    checkpoint.check_all_used()
    fewer = {"num_groups": 16, "group_size": 8, "num_points": 128}
    groups, pooled = (
        AutoModel.from_pretrained(folder, **fewer, **options).eval() for options in ({}, {"output": "pooled"})
    )
    named = {name.replace("blocks.blocks.", "blocks."): tensor for name, tensor in weights.items()}
    tokens = torch.stack([reference(named, cloud, groups.config) for cloud in clouds()])
    vector = torch.cat([tokens[:, 0], tokens[:, 1:].amax(1)], 1) @ ulip(weights)["module.pc_projection"]
    with torch.no_grad():
        assert (groups(clouds()).last_hidden_state - tokens).abs().max() < 1e-4
        assert (pooled(clouds()).last_hidden_state[:, 0] - vector).abs().max() < 1e-4
    assert {name: tensor.tolist() for name, tensor in groups.state_dict().items()} == {
        name: tensor.tolist() for name, tensor in named.items()
    }


@pytest.mark.parametrize(("layers", "channels", "num_points", "projection"), [(2, 3, 8192, 10), (3, 6, 10_000, 12)])
def test_sizes_are_read_off_the_weights(saved, folder, layers, channels, num_points, projection):
    tensors = ulip(point_encoder(layers=layers, channels=channels), projection=projection)
    assert PointCloud.convert_encoder(saved(tensors), folder)
    modality = PointCloud(PointCloud.Config(encoder=str(folder)))
    config = modality._encoder_config
    assert (config.num_hidden_layers, config.in_channels, config.num_points) == (layers, channels, num_points)
    assert (config.hidden_size, config.num_attention_heads, config.intermediate_size) == (128, 2, 512)
    assert (config.group_embedding_size, config.position_size) == (24, 20)
    assert tuple(config.pointnet_sizes) == (8, 16, 32)
    assert (config.num_groups, config.group_size) == (512, 32)
    assert (config.output, config.projection_size, config.width) == ("groups", projection, 128)
    assert modality.build_encoder().width == 128


def test_what_is_not_the_point_encoder_is_left_out_by_family(saved, folder):
    checkpoint = saved(ulip(point_encoder()))
    assert PointCloud.convert_encoder(checkpoint, folder)
    reasons = Counter(checkpoint.left_out.values())
    assert reasons["visual is a part of ULIP beside its point encoder"] == 2
    assert {reason.split()[0] for reason in reasons} == {"visual", "transformer", "token_embedding", "logit_scale"}
    assert not checkpoint.taken & set(checkpoint.left_out)


def test_weights_keep_their_precision_and_converting_again_gives_the_same(saved, folder, tmp_path):
    half = {name: tensor.half() if tensor.dim() else tensor for name, tensor in point_encoder().items()}
    prints = set()
    for place in (folder, tmp_path / "again"):
        assert PointCloud.convert_encoder(
            saved({**ulip(half), "module.pc_projection": torch.ones(256, 4).half()}), place
        )
        encoder = PointCloud(PointCloud.Config(encoder=str(place))).build_encoder()
        assert encoder.model.dtype == torch.float16
        prints.add(fingerprint(encoder))
    assert len(prints) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda weights: weights.pop("cls_pos"),
            "ersion's: cls_pos is missing. Choose one of .*; or download it again",
        ),
        (lambda weights: weights.pop("norm.weight"), "norm.weight is missing"),
        (
            lambda weights: [weights.pop(name) for name in list(weights) if ".blocks.0." in name],
            r"blocks\.blocks\.0\.norm1\.weight is missing; .* and \d+ more",
        ),
        (
            lambda weights: weights.update({"cls_head_finetune.0.weight": torch.zeros(4, 256)}),
            r"cls_head_finetune\.0\.weight has no place",
        ),
        (
            lambda weights: weights.update({"reduce_dim.weight": torch.zeros(128, 23)}),
            r"reduce_dim\.weight has shape \(128, 23\) instead of \(128, 24\)",
        ),
        (
            lambda weights: weights.update({"encoder.first_conv.0.weight": torch.zeros(8, 4, 1)}),
            "is not ULIP's: in_channels is 4; expected 3 .*colour\\). Choose one of",
        ),
    ],
)
def test_a_damaged_point_encoder_is_refused(saved, folder, change, message):
    weights = point_encoder()
    change(weights)
    with pytest.raises(xblip.BundleError, match=f"checkpoint_pointbert.pt .*{message}"):
        PointCloud.convert_encoder(saved(ulip(weights)), folder)
    assert not list(folder.iterdir())


def test_a_projection_of_another_shape_is_refused(saved, folder):
    tensors = {**ulip(point_encoder()), "module.pc_projection": torch.zeros(10, 256)}
    with pytest.raises(xblip.BundleError, match=r"pc_projection has shape \(10, 256\) instead of \(256, 10\)"):
        PointCloud.convert_encoder(saved(tensors), folder)


@pytest.mark.parametrize(
    ("name", "looks"),
    [
        ("sa1.mlp_convs.0.weight", "PointNet\\+\\+"),
        ("local_grouper_list.0.affine_alpha", "PointMLP"),
        ("encoder.encoder.0.0.convs.0.0.weight", "PointNeXt"),
    ],
)
def test_other_point_encoders_of_ulip_are_called_by_their_names(saved, folder, name, looks):
    with pytest.raises(
        xblip.BundleError, match=f"looks like {looks}, which cannot be converted. Choose one of .* PointBERT"
    ):
        PointCloud.convert_encoder(saved(ulip({name: torch.zeros(4)})), folder)


def test_another_model_is_left_to_others(saved, folder):
    checkpoint = saved({"visual.proj": torch.zeros(2), "module.text.point_encoder.x": torch.zeros(2)})
    assert not PointCloud.convert_encoder(checkpoint, folder)
    assert not checkpoint.taken and not checkpoint.left_out and not list(folder.iterdir())


class Runs:
    def __reduce__(self):
        return (print, ("this must never be printed",))


def test_a_cut_file_and_one_with_code_are_not_read(tmp_path, capsys):
    path = tmp_path / "checkpoint.pt"
    torch.save({"state_dict": ulip(point_encoder()), "args": Runs()}, path)
    with pytest.raises(xblip.BundleError, match=r"checkpoint\.pt is not read: .*run its code"):
        read(path)
    torch.save({"state_dict": ulip(point_encoder())}, path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(xblip.BundleError, match=r"checkpoint\.pt is damaged"):
        read(path)
    assert "must never" not in capsys.readouterr().out


def test_x_instructblip_calls_it_pc():
    assert PointCloud.checkpoint_prefix == "pc"
