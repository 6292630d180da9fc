"""Published vision encoders through the image modality: their features equal those of transformers itself."""

import numpy as np
import PIL.Image
import pytest
import torch
import transformers as hf
from test_image import ENCODERS, SHORT_SIDE, SQUARE, TEXT, VISION, noise
from xblip_image import Image

import xblip
from xblip.frozen import FrozenEncoder
from xblip.testing import save_random

DEEP = VISION | {"num_hidden_layers": 3, "intermediate_size": 48}
EVA = DEEP | {"initializer_range": 0.02, "layer_norm_eps": 1e-3}
NAFLEX = {name: size for name, size in DEEP.items() if name != "image_size"} | {"num_patches": 16}
CONVOLUTIONS = {"hidden_sizes": [8, 16], "depths": [1, 1]}
MODELS = {
    "clip": lambda: (
        hf.CLIPModel(hf.CLIPConfig(vision_config=DEEP, text_config=TEXT)),
        hf.CLIPImageProcessor(**SHORT_SIDE),
    ),
    "blip2": lambda: (hf.Blip2VisionModel(hf.Blip2VisionConfig(**EVA)), hf.BlipImageProcessor(**SQUARE)),
    "instructblip": lambda: (
        hf.InstructBlipVisionModel(hf.InstructBlipVisionConfig(**EVA)),
        hf.BlipImageProcessor(**SQUARE),
    ),
    "siglip": lambda: (
        hf.SiglipModel(hf.SiglipConfig(vision_config=DEEP, text_config=TEXT)),
        hf.SiglipImageProcessor(**SQUARE),
    ),
    "siglip2_naflex": lambda: (
        hf.Siglip2Model(hf.Siglip2Config(vision_config=NAFLEX, text_config=TEXT)),
        hf.Siglip2ImageProcessor(patch_size=8, max_num_patches=16),
    ),
    "dinov2": lambda: (hf.Dinov2Model(hf.Dinov2Config(**DEEP)), hf.BitImageProcessor(**SHORT_SIDE)),
    "dinov2_registers": lambda: (
        hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(num_register_tokens=3, **DEEP)),
        hf.BitImageProcessor(**SHORT_SIDE),
    ),
    "dinov3": lambda: (
        hf.DINOv3ViTModel(hf.DINOv3ViTConfig(num_register_tokens=4, **DEEP)),
        hf.DINOv3ViTImageProcessor(**SQUARE),
    ),
    "dinov3_convnext": lambda: (
        hf.DINOv3ConvNextModel(hf.DINOv3ConvNextConfig(**CONVOLUTIONS)),
        hf.DINOv3ViTImageProcessor(**SQUARE),
    ),
    "vit": lambda: (hf.ViTModel(hf.ViTConfig(**DEEP)), hf.ViTImageProcessor(**SQUARE)),
}
DROPPED = {"clip": 1, "blip2": 1, "instructblip": 1, "dinov2": 1, "dinov2_registers": 4, "dinov3": 5, "vit": 1}
DROPPED |= {"dinov3_convnext": 1}
PICTURES = [PIL.Image.fromarray(noise(45, 60)), PIL.Image.fromarray(noise(30, 70, seed=1))]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of tiny encoders with their processors, all weights random, also those of norms and biases."""
    root = tmp_path_factory.mktemp("published")
    torch.manual_seed(0)
    for name, build in MODELS.items():
        save_random(root / name, *build())
    return root


def expected(folder, layer):
    """What transformers' own model gives for its own processor's tensors of the two pictures."""
    config = hf.AutoConfig.from_pretrained(folder)
    model = getattr(hf, config.architectures[0]).from_pretrained(folder).eval()
    inputs = hf.AutoImageProcessor.from_pretrained(folder)(images=PICTURES, return_tensors="pt")
    with torch.no_grad():
        output = getattr(model, "vision_model", model)(**inputs, output_hidden_states=layer is not None)
    return output.last_hidden_state if layer is None else output.hidden_states[layer]


def features(folder, **settings):
    modality = Image(Image.Config(encoder=str(folder), **settings))
    tensors = [modality.load(picture) for picture in PICTURES]
    encoder = FrozenEncoder(modality.build_encoder(), name="image")
    assert encoder.takes(tensors[0]) or set(tensors[0]) != set(encoder.module.input_names)
    return encoder(**{name: torch.cat([each[name] for each in tensors]) for name in tensors[0]})


@pytest.mark.parametrize(
    ("name", "layer"),
    [(name, layer) for name in MODELS for layer in (None, -1, -2, 0, 3) if layer is None or name != "dinov3_convnext"],
)
def test_features_are_those_of_transformers(saved, name, layer):
    values, mask = features(saved / name, layer=layer)
    assert mask.all() == (name != "siglip2_naflex")
    torch.testing.assert_close(values, expected(saved / name, layer), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", list(DROPPED))
def test_drop_cls_leaves_the_patches(saved, name):
    layer = None if name == "dinov3_convnext" else -2
    values, mask = features(saved / name, layer=layer, drop_cls=True)
    assert values.shape[1] == 16
    torch.testing.assert_close(values, expected(saved / name, layer)[:, DROPPED[name] :], atol=1e-5, rtol=0)
    assert mask.all() and mask.shape == values.shape[:2]


@pytest.mark.parametrize("name", ["siglip", "siglip2_naflex"])
def test_where_there_is_no_cls_dropping_it_is_an_error(saved, name):
    with pytest.raises(xblip.ConfigError, match=r"drop_cls cannot be: a siglip\w* model has no \[CLS\] token"):
        features(saved / name, drop_cls=True)


def test_a_layer_that_is_not_there_is_an_error(saved):
    with pytest.raises(xblip.ConfigError, match=r"no layer 4 .* a vit model has 3: give -4 to 3"):
        features(saved / "vit", layer=4)
    with pytest.raises(xblip.ConfigError, match=r"no layer -1 .* a dinov3_convnext model has no layers of one width"):
        features(saved / "dinov3_convnext", layer=-1)


def test_patches_that_only_pad_are_masked(saved):
    values, mask = features(saved / "siglip2_naflex")
    real = [int(features_of.sum()) for features_of in mask]
    grids = hf.AutoImageProcessor.from_pretrained(saved / "siglip2_naflex")(images=PICTURES, return_tensors="pt")
    assert real == grids["spatial_shapes"].prod(1).tolist() and min(real) < values.shape[1] == 16


def test_norms_are_as_exact_as_the_config_says(saved):
    model = Image(Image.Config(encoder=str(saved / "blip2"))).build_encoder().model
    assert {part.eps for part in model.modules() if isinstance(part, torch.nn.LayerNorm)} == {1e-3}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda: hf.VideoMAEModel(hf.VideoMAEConfig(num_frames=4, **DEEP)),
            "is a videomae model, which does not read pictures but videos: it belongs to the modality video",
        ),
        (
            lambda: hf.ASTModel(hf.ASTConfig(max_length=64, num_mel_bins=32, hidden_size=24, num_hidden_layers=1)),
            "does not read pictures but input_values: it belongs to the modality audio",
        ),
    ],
)
def test_encoders_of_other_modalities_are_refused(tmp_path, model, message):
    model().save_pretrained(tmp_path)
    with pytest.raises(xblip.BundleError, match=message):
        Image(Image.Config(encoder=str(tmp_path))).build_encoder()


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (lambda: hf.ViTImageProcessor(size={"height": 40, "width": 40}), "cannot read what the processor .* gives"),
        (lambda: hf.Siglip2ImageProcessor(patch_size=8), "it takes pixel_values, not pixel_values, pixel_attention"),
    ],
)
def test_a_processor_of_another_encoder_is_one_clear_error(tmp_path, processor, message):
    ENCODERS["vit"]()[0].save_pretrained(tmp_path)
    processor().save_pretrained(tmp_path)
    with pytest.raises(xblip.BundleError, match=rf"{message}.*Save the processor that belongs to it"):
        features(tmp_path)


def test_parts_of_pictures_are_read_by_an_encoder_of_any_size(saved):
    modality = Image(Image.Config(encoder=str(saved / "siglip2_naflex")))
    tensors = modality.augmented(PICTURES[0], np.random.default_rng(0))
    plain = modality.load(PICTURES[0])
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        name: tensor.shape for name, tensor in plain.items()
    }
    values, mask = FrozenEncoder(modality.build_encoder(), name="image")(**tensors)
    assert values[mask].isfinite().all() and mask.any()
