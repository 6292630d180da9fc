"""The image modality: what each kind of source becomes, which encoders it drives, and what it refuses."""

import io
import pickle

import numpy as np
import PIL.Image
import pytest
import torch
from transformers import (
    AutoImageProcessor,
    BitImageProcessor,
    BlipImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    ConvNextConfig,
    ConvNextImageProcessor,
    ConvNextModel,
    Dinov2Config,
    Dinov2Model,
    InstructBlipVisionConfig,
    InstructBlipVisionModel,
    ResNetConfig,
    ResNetModel,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)
from xblip_image import Image

import xblip
import xblip.testing

VISION = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8)
TEXT = dict(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
TEXT |= dict(vocab_size=50, bos_token_id=1, eos_token_id=2)
SQUARE = {"size": {"height": 32, "width": 32}}
SHORT_SIDE = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
ENCODERS = {
    "vit": lambda: (ViTModel(ViTConfig(**VISION)), ViTImageProcessor(**SQUARE)),
    "clip": lambda: (
        CLIPModel(CLIPConfig(vision_config=VISION, text_config=TEXT)),
        CLIPImageProcessor(**SHORT_SIDE),
    ),
    "clip_vision": lambda: (CLIPVisionModel(CLIPVisionConfig(**VISION)), CLIPImageProcessor(**SHORT_SIDE)),
    "siglip": lambda: (
        SiglipModel(SiglipConfig(vision_config=VISION, text_config=TEXT)),
        SiglipImageProcessor(**SQUARE),
    ),
    "instructblip_vision": lambda: (
        InstructBlipVisionModel(InstructBlipVisionConfig(initializer_range=0.02, intermediate_size=48, **VISION)),
        BlipImageProcessor(**SQUARE),
    ),
    "dinov2": lambda: (Dinov2Model(Dinov2Config(**VISION)), BitImageProcessor(**SHORT_SIDE)),
    "resnet": lambda: (
        ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")),
        ConvNextImageProcessor(size={"shortest_edge": 32}),
    ),
    "convnext": lambda: (
        ConvNextModel(ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2)),
        ConvNextImageProcessor(size={"shortest_edge": 32}),
    ),
}


@pytest.fixture(scope="session")
def encoders(tmp_path_factory):
    """Folders of tiny random encoders with their processors, by name."""
    root = tmp_path_factory.mktemp("encoders")
    for name, build in ENCODERS.items():
        for part in build():
            part.save_pretrained(root / name)
    return root


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    """A modality whose processor neither resizes nor normalises: pixel_values are the picture over 255."""
    folder = tmp_path_factory.mktemp("plain")
    ViTImageProcessor(do_resize=False, do_normalize=False).save_pretrained(folder)
    return Image(Image.Config(encoder=str(folder)))


def noise(height=45, width=60, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", ["vit", "clip", "siglip", "dinov2", "convnext"])
def test_pixel_values_are_those_of_the_encoders_own_processor(encoders, name, tmp_path):
    picture = PIL.Image.fromarray(noise())
    expected = AutoImageProcessor.from_pretrained(encoders / name)(images=picture, return_tensors="pt")["pixel_values"]
    picture.save(tmp_path / "picture.png")
    modality = Image(Image.Config(encoder=str(encoders / name)))
    actual = modality.load(tmp_path / "picture.png")["pixel_values"]
    assert actual.shape == (1, 3, 32, 32)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", list(ENCODERS))
def test_any_vision_encoder_gives_its_hidden_states_as_tokens(encoders, name):
    modality = Image(Image.Config(encoder=str(encoders / name)))
    values = torch.cat([modality.load(noise(seed=seed))["pixel_values"] for seed in (0, 1)])
    encoder = modality.build_encoder().eval()
    with torch.no_grad():
        features = encoder(pixel_values=values)
    tokens, width = {"siglip": (16, 24), "resnet": (16, 16), "convnext": (16, 16)}.get(name, (17, 24))
    assert features.shape == (2, tokens, width) and encoder.width == width
    assert (features[0] - features[1]).abs().max() > 1e-5


def test_every_road_to_a_picture_gives_the_same_tensor(encoders, tmp_path):
    pixels = noise()
    path = tmp_path / "picture.png"
    PIL.Image.fromarray(pixels).save(path)
    modality = Image(Image.Config(encoder=str(encoders / "clip")))
    expected = modality.load(pixels)["pixel_values"]
    tensor = torch.from_numpy(pixels)
    with path.open("rb") as stream:
        sources = [
            path,
            str(path),
            path.read_bytes(),
            stream,
            PIL.Image.open(path),
            tensor,
            tensor.permute(2, 0, 1),
        ]
        sources += [np.moveaxis(pixels, 2, 0), pixels / 255, tensor.permute(2, 0, 1).to(torch.float64) / 255]
        sources += [pixels.astype(np.uint16) * 257]
        for source in sources:
            assert torch.equal(modality.load(source)["pixel_values"], expected), type(source)


def test_one_pixel_works_with_every_processor(encoders):
    pixel = io.BytesIO()
    PIL.Image.new("RGB", (1, 1), "red").save(pixel, "PNG")
    for name in ENCODERS:
        modality = Image(Image.Config(encoder=str(encoders / name)))
        values = modality.load(pixel.getvalue())["pixel_values"]
        assert values.shape == (1, 3, 32, 32) and values.isfinite().all()
        assert values[0, 0].mean() > values[0, 1].mean()


def test_pickles_for_workers_after_use(encoders):
    modality = Image(Image.Config(encoder=str(encoders / "vit")))
    expected = modality.load(noise())["pixel_values"]
    assert torch.equal(pickle.loads(pickle.dumps(modality)).load(noise())["pixel_values"], expected)


def fails(modality, source, *fragments):
    with pytest.raises(xblip.MediaError) as caught:
        modality.load(source)
    message = str(caught.value)
    for fragment in fragments:
        assert fragment in message, message


def test_max_pixels_is_a_setting(plain):
    small = Image(Image.Config(encoder=plain.config.encoder, max_pixels=99))
    assert small.load(np.zeros((9, 11), np.uint8))
    fails(small, np.zeros((10, 10), np.uint8), "10 x 10", "max_pixels = 99", "raise max_pixels")


def test_text_called_png_is_refused(plain, tmp_path):
    path = tmp_path / "text.png"
    path.write_text("hello")
    fails(plain, path, "text.png", "another format", "Expected a PNG")


def test_missing_empty_folder_and_text_mode_are_refused(plain, tmp_path):
    (tmp_path / "empty.png").touch()
    fails(plain, tmp_path / "none.png", "no such file")
    fails(plain, tmp_path / "empty.png", "empty")
    fails(plain, tmp_path, "folder")
    fails(plain, b"", "empty")
    fails(plain, io.StringIO("x"), "binary mode")


def test_other_objects_are_refused(plain):
    fails(plain, 7, "given as int", "expected a path, bytes, an open binary file, a PIL image, a numpy array")
    fails(plain, [noise()], "given as list")


def test_an_encoder_without_image_processor_is_one_clear_error(tmp_path):
    with pytest.raises(xblip.BundleError, match=r"Cannot load the image processor of .*Expected preprocessor_config"):
        Image(Image.Config(encoder=str(tmp_path))).load(noise())


def test_a_processor_that_gives_no_picture_is_one_clear_error(tmp_path):
    from transformers import LlavaNextImageProcessor

    LlavaNextImageProcessor().save_pretrained(tmp_path)
    with pytest.raises(xblip.BundleError, match=r"gives pixel_values of shape .*; expected \(1, 3, H, W\)"):
        Image(Image.Config(encoder=str(tmp_path))).load(noise())


class TestImageContract(xblip.testing.ModalityContract):
    name = "image"


def test_what_it_needs_can_be_asked_for():
    assert Image.diagnose()["Pillow"]() == PIL.__version__


class TestAugmentation:
    @pytest.mark.parametrize("name", ["vit", "clip", "siglip", "dinov2", "convnext"])
    def test_a_part_goes_through_the_encoders_own_processor(self, encoders, name, tmp_path):
        picture = PIL.Image.fromarray(noise())
        picture.save(tmp_path / "picture.png")
        modality = Image(Image.Config(encoder=str(encoders / name)))
        crop = modality.config.augment.drawn(60, 45, np.random.default_rng(7))
        processor = AutoImageProcessor.from_pretrained(encoders / name)
        expected = processor(images=crop.of(picture), return_tensors="pt")["pixel_values"]
        actual = modality.augmented(tmp_path / "picture.png", np.random.default_rng(7))["pixel_values"]
        assert actual.shape == (1, 3, 32, 32) and torch.equal(actual, expected)
        assert not torch.equal(actual, modality.load(picture)["pixel_values"])

    def test_what_is_kept_stands_upright_where_the_picture_has_it(self, plain, tmp_path):
        ramps = np.zeros((90, 120, 3), np.uint8)
        ramps[..., 0], ramps[..., 1] = np.arange(90)[:, None], np.arange(120)
        exif = PIL.Image.Exif()
        exif[0x0112] = 3
        PIL.Image.fromarray(ramps[::-1, ::-1]).save(tmp_path / "turned.png", exif=exif)
        for seed in range(10):
            part = plain.augmented(tmp_path / "turned.png", np.random.default_rng(seed))["pixel_values"][0] * 255
            down, across = part[0].round(), part[1].round()
            assert (down.diff(dim=0) == 1).all() and (across.diff(dim=1) == 1).all(), "neither mirrored nor resized"
            assert 0.45 < part[0].numel() / (90 * 120) <= 1

    def test_settings_come_from_the_config(self, encoders):
        settings = {"encoder": str(encoders / "vit"), "augment": {"scale": [1.0, 1.0], "ratio": [1.0, 1.0], "flip": 1}}
        branch = xblip.testing.BranchConfig("image", settings, {"kind": "linear"})
        modality = xblip.testing.Branch.build(branch, llm_width=8).modality
        square = noise(40, 40)
        mirrored = modality.augmented(square, np.random.default_rng(0))["pixel_values"]
        assert torch.equal(mirrored, modality.load(square[:, ::-1])["pixel_values"])
        settings["augment"]["scail"] = [1, 1]
        with pytest.raises(xblip.ConfigError, match=r"augment.scail\"\. Did you mean \"scale\""):
            xblip.testing.Branch.build(branch, llm_width=8)

    def test_broken_files_are_refused_as_by_load(self, plain, tmp_path):
        (tmp_path / "text.png").write_text("not a picture")
        with pytest.raises(xblip.MediaError, match=r"text.png.*Expected a PNG"):
            plain.augmented(tmp_path / "text.png", np.random.default_rng(0))
