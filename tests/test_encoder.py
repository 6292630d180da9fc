"""Frozen parts, fingerprints, and encoders that come from transformers."""

import copy
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from xblip.encoder import TransformersEncoder
from xblip.errors import BundleError
from xblip.frozen import FrozenEncoder, fingerprint
from xblip.loading import load_weights, skeletons
from xblip.testing import ToyEncoder


class Returning(nn.Module):
    """Gives whatever it was made with."""

    width = 4

    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, values):
        return self.output


class TestSkeletons:
    def test_they_have_the_shapes_of_what_is_stored_and_no_values(self, tmp_path):
        save_file({"weight": torch.ones(2, 3), "bias": torch.ones(())}, tmp_path / "weights.safetensors")
        with skeletons():
            loaded = load_weights(tmp_path / "weights.safetensors")
        assert {name: (tuple(part.shape), part.is_meta) for name, part in loaded.items()} == {
            "weight": ((2, 3), True),
            "bias": ((), True),
        }
        assert not load_weights(tmp_path / "weights.safetensors")["weight"].is_meta

    def test_each_has_a_fingerprint_of_its_own(self):
        with skeletons():
            one, other = ToyEncoder(4), ToyEncoder(4)
        assert fingerprint(one) == fingerprint(one) != fingerprint(other)


class TestFrozen:
    def test_training_mode_cannot_be_set(self):
        module = ToyEncoder(4)
        module.dropout = nn.Dropout()
        encoder = FrozenEncoder(module, name="toy")
        holder = nn.Sequential(encoder, nn.Linear(1, 1))
        assert holder.train() is holder and encoder.train(True) is encoder
        assert holder[1].training
        assert not any(part.training for part in encoder.modules())

    def test_no_gradient_is_kept(self):
        encoder = FrozenEncoder(ToyEncoder(4), name="toy")
        values, mask = encoder(values=torch.ones(2, 4, requires_grad=True))
        assert not any(parameter.requires_grad for parameter in encoder.parameters())
        assert not values.requires_grad and not mask.requires_grad

    def test_weights_are_absent_from_checkpoints(self):
        holder = nn.ModuleDict({"frozen": FrozenEncoder(ToyEncoder(4), name="toy"), "free": nn.Linear(2, 2)})
        assert set(holder.state_dict()) == {"free.weight", "free.bias"}
        assert holder["frozen"].state_dict() == {}

    def test_a_checkpoint_without_them_loads_strictly(self):
        holder = nn.ModuleDict({"frozen": FrozenEncoder(ToyEncoder(4), name="toy"), "free": nn.Linear(2, 2)})
        saved = copy.deepcopy(holder.state_dict())
        nn.init.zeros_(holder["free"].weight)
        holder.load_state_dict(saved, strict=True)
        assert torch.equal(holder["free"].weight, saved["free.weight"])
        with pytest.raises(RuntimeError, match=r"free\.bias"):
            holder.load_state_dict({"free.weight": saved["free.weight"]})


class TestOutput:
    def test_a_mask_is_made_when_none_is_given(self):
        values, mask = FrozenEncoder(ToyEncoder(4), name="toy")(values=torch.ones(2, 4))
        assert values.shape == (2, 4, 4) and mask.shape == (2, 4) and mask.dtype == torch.bool and mask.all()

    def test_a_mask_of_numbers_becomes_boolean(self):
        module = Returning((torch.zeros(2, 3, 4), torch.tensor([[1, 1, 0], [1, 0, 0]])))
        _, mask = FrozenEncoder(module, name="toy")(values=torch.ones(2, 4))
        assert mask.tolist() == [[True, True, False], [True, False, False]]

    @pytest.mark.parametrize("shape", [(2, 4), (1, 3, 4), (2, 3, 5), (2, 3, 4, 1)])
    def test_another_shape_is_an_error(self, shape):
        with pytest.raises(BundleError, match=r'encoder of "toy" returned features of shape .*expected \(2, N, 4\)'):
            FrozenEncoder(Returning(torch.zeros(shape)), name="toy")(values=torch.ones(2, 4))

    @pytest.mark.parametrize("shape", [(2, 4), (3,), (1, 3), (2, 3, 1)])
    def test_a_mask_of_another_shape_is_an_error(self, shape):
        module = Returning((torch.zeros(2, 3, 4), torch.ones(shape)))
        with pytest.raises(BundleError, match=r'encoder of "toy" returned a mask of shape .*expected \(2, 3\)'):
            FrozenEncoder(module, name="toy")(values=torch.ones(2, 4))

    def test_inputs_come_in_the_encoder_s_own_dtype(self):
        encoder = FrozenEncoder(ToyEncoder(4), name="toy").to(torch.bfloat16)
        values, _ = encoder(values=torch.ones(2, 4))
        assert values.dtype == torch.bfloat16

    def test_an_encoder_may_ask_for_another_dtype(self):
        module = Returning(torch.zeros(2, 3, 4))
        module.weight = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
        module.input_dtype = torch.float32
        seen = {}
        module.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
        FrozenEncoder(module, name="toy")(values=torch.ones(2, 4, dtype=torch.float64))
        assert seen["values"].dtype == torch.float32


class TestFingerprint:
    def test_equal_weights_have_equal_fingerprints(self):
        assert fingerprint(ToyEncoder(4, seed=1)) == fingerprint(ToyEncoder(4, seed=1))

    def test_other_weights_names_or_shapes_have_others(self):
        prints = [fingerprint(ToyEncoder(4, seed=seed)) for seed in (0, 1)]
        prints += [
            fingerprint(ToyEncoder(5)),
            fingerprint(nn.Linear(2, 3)),
            fingerprint(nn.Sequential(nn.Linear(2, 3))),
        ]
        assert len(set(prints)) == len(prints)

    def test_training_changes_that_of_a_large_network(self):
        network = nn.Linear(300, 200)
        before = fingerprint(network)
        network(torch.randn(4, 300)).sum().backward()
        torch.optim.SGD(network.parameters(), lr=1e-3).step()
        assert fingerprint(network) != before

    def test_casting_a_wrapped_encoder_leaves_it_as_it_was(self):
        encoder = FrozenEncoder(ToyEncoder(4), name="toy")
        assert encoder.to(torch.bfloat16).fingerprint == fingerprint(ToyEncoder(4))

    def test_scalars_and_odd_dtypes_count(self):
        module = nn.Module()
        module.register_buffer("scale", torch.tensor(3.0, dtype=torch.bfloat16))
        module.register_buffer("flags", torch.tensor([True, False]))
        before = fingerprint(module)
        module.flags[1] = True
        assert fingerprint(module) != before


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    """A tiny ViT, a tiny ResNet and a tiny CLIP, saved as transformers saves them."""
    from transformers import (
        CLIPConfig,
        CLIPModel,
        CLIPTextConfig,
        CLIPVisionConfig,
        ResNetConfig,
        ResNetModel,
        ViTConfig,
        ViTModel,
    )

    root = tmp_path_factory.mktemp("vision")
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    ViTModel(ViTConfig(image_size=8, patch_size=4, **sizes)).save_pretrained(root / "vit")
    ResNetModel(ResNetConfig(embedding_size=4, hidden_sizes=[4, 6], depths=[1, 1])).save_pretrained(root / "resnet")
    text = CLIPTextConfig(vocab_size=10, **sizes)
    seen = CLIPVisionConfig(image_size=8, patch_size=4, **sizes)
    CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=seen.to_dict())).save_pretrained(root / "clip")
    return root


class TestTransformersEncoder:
    @pytest.mark.parametrize(
        ("name", "size", "shape"), [("vit", 8, (2, 5, 8)), ("clip", 8, (2, 5, 8)), ("resnet", 32, (2, 16, 6))]
    )
    def test_hidden_states_become_tokens(self, vision, name, size, shape):
        encoder = TransformersEncoder.from_pretrained(str(vision / name), input_name="pixel_values")
        frozen = FrozenEncoder(encoder, name="picture")
        values, mask = frozen(pixel_values=torch.rand(2, 3, size, size))
        assert tuple(values.shape) == shape and encoder.width == shape[2] and mask.all()

    def test_missing_weights_are_named_not_made_up(self, vision, tmp_path):
        folder = shutil.copytree(vision / "vit", tmp_path / "vit")
        weights = load_file(folder / "model.safetensors")
        del weights["layernorm.weight"]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(BundleError, match=r"lacks 1 weights, among them layernorm\.weight"):
            TransformersEncoder.from_pretrained(str(folder), input_name="pixel_values")

    def test_a_weight_of_another_shape_is_named(self, vision, tmp_path):
        folder = shutil.copytree(vision / "vit", tmp_path / "vit")
        text = (folder / "config.json").read_text()
        (folder / "config.json").write_text(text.replace('"intermediate_size": 16', '"intermediate_size": 12'))
        with pytest.raises(BundleError, match=r"has the shape \(16,\), and config\.json says \(12,\)"):
            TransformersEncoder.from_pretrained(str(folder), input_name="pixel_values")

    def test_a_missing_pooler_is_not_made_up_either(self, vision, tmp_path):
        folder = shutil.copytree(vision / "vit", tmp_path / "vit")
        weights = load_file(folder / "model.safetensors")
        kept = {name: value for name, value in weights.items() if not name.startswith("pooler")}
        assert len(kept) < len(weights)
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
        first, second = (TransformersEncoder.from_pretrained(str(folder), input_name="pixel_values") for _ in range(2))
        assert fingerprint(first) == fingerprint(second)

    def test_an_image_processor_is_asked_for(self, vision):
        with pytest.raises(BundleError, match=r'Cannot load the image processor of ".*vit".*preprocessor_config.json'):
            TransformersEncoder.image_processor(str(vision / "vit"))

    def test_nothing_there_is_one_clear_error(self, tmp_path):
        with pytest.raises(
            BundleError, match=r'Cannot load an encoder from ".*none".* Expected the folder of a transformers model'
        ):
            TransformersEncoder.from_pretrained(str(tmp_path / "none"), input_name="pixel_values")

    def test_a_damaged_file_is_one_clear_error(self, vision, tmp_path):
        folder = shutil.copytree(vision / "vit", tmp_path / "vit")
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:200])
        with pytest.raises(BundleError, match=r'Cannot load an encoder from ".*vit"'):
            TransformersEncoder.from_pretrained(str(folder), input_name="pixel_values")
