"""The image modality: what each kind of source becomes, which encoders it drives, and what it refuses."""

import io
import pickle
import warnings

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


def rgb(plain, source):
    """The 8-bit RGB picture (H, W, 3) that a source becomes."""
    return (plain.load(source)["pixel_values"][0] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


def noise(height=45, width=60, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(picture, kind, **options):
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


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


def test_where_both_orders_fit_arrays_have_channels_last_and_tensors_first(plain):
    values = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
    assert np.array_equal(rgb(plain, values), values)
    assert np.array_equal(rgb(plain, torch.from_numpy(values)), np.moveaxis(values, 0, 2))


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (1, 5, 7)])
def test_grey_arrays_become_grey_pictures(plain, shape):
    values = np.arange(35, dtype=np.uint8).reshape(shape)
    assert np.array_equal(rgb(plain, values), np.repeat(values.reshape(5, 7, 1), 3, 2))


def test_bool_arrays_are_black_and_white(plain):
    assert rgb(plain, np.array([[True, False]]))[0, :, 0].tolist() == [255, 0]


GREY16 = np.array([[0, 128, 129, 25700, 32768, 65535]], np.uint16)
GREY8 = [0, 0, 1, 100, 128, 255]


@pytest.mark.parametrize("mode", ["I;16", "I"])
def test_sixteen_bit_grey_is_scaled_not_clipped(plain, mode):
    picture = PIL.Image.fromarray(GREY16 if mode == "I;16" else GREY16.astype(np.int32))
    assert picture.mode == mode
    for source in (picture, encoded(picture, "TIFF")):
        assert rgb(plain, source)[0, :, 0].tolist() == GREY8
    assert rgb(plain, encoded(PIL.Image.fromarray(GREY16), "PNG"))[0, :, 0].tolist() == GREY8
    assert rgb(plain, b"P5 6 1 65535\n" + GREY16.astype(">u2").tobytes())[0, :, 0].tolist() == GREY8


def test_float_pictures_are_read_like_float_arrays(plain):
    picture = PIL.Image.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32))
    assert rgb(plain, picture)[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparency_is_laid_on_white(plain, mode):
    picture = PIL.Image.new("RGBA", (2, 1), (0, 0, 0, 255))
    picture.putpixel((1, 0), (0, 0, 0, 0))
    if mode == "PA":
        alpha = picture.getchannel("A")
        picture = PIL.Image.new("P", (2, 1))
        picture.putalpha(alpha)
    picture = picture.convert(mode)
    assert picture.mode == mode
    assert rgb(plain, picture)[0].tolist() == [[0, 0, 0], [255, 255, 255]]


def test_a_transparent_shade_of_sixteen_bit_grey_is_laid_on_white(plain):
    png = encoded(PIL.Image.fromarray(GREY16), "PNG", transparency=25700)
    assert rgb(plain, png)[0, :, 0].tolist() == [0, 0, 1, 255, 128, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_each_orientation_is_turned_as_pillow_turns_it(plain, orientation):
    import PIL.ImageOps

    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    png = encoded(PIL.Image.fromarray(noise(8, 16)), "PNG", exif=exif)
    upright = PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(png)))
    assert np.array_equal(rgb(plain, png), np.asarray(upright))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
@pytest.mark.parametrize(
    "exif", [b"rubbish", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\0\x09\x01\x12"]
)
def test_a_whole_picture_with_unreadable_exif_is_read(plain, kind, exif):
    lossless = {"lossless": True} if kind == "WEBP" else {}
    picture = PIL.Image.fromarray(noise())
    assert np.array_equal(
        rgb(plain, encoded(picture, kind, exif=exif, **lossless)), rgb(plain, encoded(picture, kind, **lossless))
    )


def test_half_transparent_red_is_pink(plain):
    picture = PIL.Image.new("RGBA", (1, 1), (255, 0, 0, 128))
    assert rgb(plain, encoded(picture, "PNG"))[0, 0].tolist() == [255, 127, 127]
    assert rgb(plain, np.array([[[255, 0, 0, 128]]], np.uint8))[0, 0].tolist() == [255, 127, 127]


@pytest.mark.parametrize(("kind", "transparency"), [("PNG", 1), ("PNG", b"\xff\x00"), ("GIF", 1)])
def test_transparent_palette_colours_are_white(plain, kind, transparency):
    picture = PIL.Image.new("P", (2, 1))
    picture.putpalette([10, 20, 30, 200, 0, 0])
    picture.putpixel((1, 0), 1)
    data = encoded(picture, kind, transparency=transparency)
    assert rgb(plain, data)[0].tolist() == [[10, 20, 30], [255, 255, 255]]


def test_one_bit_palette_grey_and_cmyk_pictures(plain):
    one_bit = PIL.Image.new("1", (1, 1), 1)
    palette = PIL.Image.new("RGB", (1, 1), (10, 200, 30)).quantize(2)
    assert rgb(plain, encoded(one_bit, "PNG"))[0, 0].tolist() == [255, 255, 255]
    assert rgb(plain, encoded(palette, "PNG"))[0, 0].tolist() == [10, 200, 30]
    assert rgb(plain, encoded(PIL.Image.new("L", (1, 1), 77), "PNG"))[0, 0].tolist() == [77, 77, 77]
    assert rgb(plain, PIL.Image.new("CMYK", (1, 1), (0, 255, 255, 0)))[0, 0].tolist() == [255, 0, 0]
    cmyk = rgb(plain, encoded(PIL.Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))[4, 4].astype(int)
    assert np.abs(cmyk - [255, 0, 0]).max() <= 6


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_to_files_and_pil_images(plain, orientation, tmp_path):
    stored = noise(6, 4)
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.png"
    PIL.Image.fromarray(stored).save(path, exif=exif)
    upright = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.swapaxes(0, 1),
        6: stored.swapaxes(0, 1)[:, ::-1],
        7: stored.swapaxes(0, 1)[::-1, ::-1],
        8: stored.swapaxes(0, 1)[::-1],
    }[orientation]
    assert np.array_equal(rgb(plain, path), upright)
    assert np.array_equal(rgb(plain, PIL.Image.open(path)), upright)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "BMP", "TIFF", "PPM", "AVIF"])
def test_formats(plain, kind):
    red = PIL.Image.new("RGB", (16, 16), (250, 10, 10))
    assert np.abs(rgb(plain, encoded(red, kind))[8, 8].astype(int) - [250, 10, 10]).max() <= 6


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF"])
def test_the_first_frame_of_a_moving_picture_is_read(plain, kind):
    frames = [PIL.Image.new("RGB", (4, 4), colour) for colour in ("red", "blue", "lime")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert rgb(plain, data)[2, 2].tolist() == [255, 0, 0]


def test_one_pixel_works_with_every_processor(encoders):
    for name in ENCODERS:
        modality = Image(Image.Config(encoder=str(encoders / name)))
        values = modality.load(encoded(PIL.Image.new("RGB", (1, 1), "red"), "PNG"))["pixel_values"]
        assert values.shape == (1, 3, 32, 32) and values.isfinite().all()
        assert values[0, 0].mean() > values[0, 1].mean()


def test_pickles_for_workers_after_use(encoders):
    modality = Image(Image.Config(encoder=str(encoders / "vit")))
    expected = modality.load(noise())["pixel_values"]
    assert torch.equal(pickle.loads(pickle.dumps(modality)).load(noise())["pixel_values"], expected)


@pytest.mark.parametrize("kind", ["TIFF", "PNG", "WEBP"])
def test_pillows_own_limit_neither_warns_nor_stays_lifted(plain, kind, monkeypatch):
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 100)
    data = encoded(PIL.Image.fromarray(noise()), kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rgb(plain, data).shape == (45, 60, 3)
    assert PIL.Image.MAX_IMAGE_PIXELS == 100


def fails(modality, source, *fragments):
    with pytest.raises(xblip.MediaError) as caught:
        modality.load(source)
    message = str(caught.value)
    for fragment in fragments:
        assert fragment in message, message


def test_max_pixels_is_checked_in_the_header_before_decoding(plain):
    claim = (60_000).to_bytes(4, "big") * 2
    png = bytearray(encoded(PIL.Image.new("L", (1, 1)), "PNG"))
    png[16:24] = claim
    import zlib

    png[29:33] = zlib.crc32(png[12:29]).to_bytes(4, "big")
    fails(plain, bytes(png), "given as bytes", "60000 x 60000", "max_pixels = 100000000", "Shrink it")
    small = Image(Image.Config(encoder=plain.config.encoder, max_pixels=99))
    fails(small, np.zeros((10, 10), np.uint8), "10 x 10", "max_pixels = 99")
    fails(small, PIL.Image.new("L", (10, 10)), "10 x 10", "max_pixels = 99")
    assert small.load(np.zeros((9, 11), np.uint8))


def test_thin_strips_are_refused(plain):
    assert plain.load(np.zeros((1, 200), np.uint8))
    fails(plain, np.zeros((1, 201), np.uint8), "201 x 1 is too thin", "at most 200 times", "Crop it")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF"])
@pytest.mark.parametrize("part", [0.01, 0.5, 0.95])
def test_truncated_files_are_refused(plain, kind, part, tmp_path):
    data = encoded(PIL.Image.fromarray(noise(64, 64)), kind)
    path = tmp_path / f"cut.{kind.lower()}"
    path.write_bytes(data[: int(len(data) * part)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fails(plain, path, f"image '{path}'", "damaged or of another format", "Expected a PNG, JPEG, WebP")


def test_a_progressive_jpeg_cut_after_its_first_scans_is_refused(plain):
    data = encoded(PIL.Image.fromarray(noise(64, 64)), "JPEG", progressive=True)
    fails(plain, data[: len(data) * 3 // 4], "damaged")


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


@pytest.mark.parametrize("shape", [(5, 7, 2), (5,), (1, 3, 5, 7), (0, 5), (5, 0, 3)])
def test_wrong_shapes_are_refused(plain, shape):
    fails(plain, np.zeros(shape, np.uint8), f"shape is {shape}", "expected (H, W), (H, W, C) or (C, H, W)")
    fails(plain, torch.zeros(shape), f"shape is {shape}")


@pytest.mark.parametrize("dtype", ["int64", "int8", "uint32", "complex64", "object"])
def test_wrong_dtypes_are_refused(plain, dtype):
    fails(
        plain,
        np.zeros((4, 4), dtype),
        f"dtype is {dtype}",
        "expected uint8, uint16, bool, or floats in [0, 1]",
    )


def test_floats_must_be_finite_and_between_zero_and_one(plain):
    fails(plain, np.array([[0.0, np.nan, np.inf]]), "2 of its 3 values are NaN or infinite")
    fails(plain, np.array([[0.0, 255.0]]), "[0, 1]", "from 0 to 255", "Divide 0..255 by 255")
    fails(plain, torch.tensor([[-1.0, 1.0]]), "from -1 to 1")


def test_integers_beyond_sixteen_bit_are_refused(plain):
    fails(plain, PIL.Image.fromarray(np.array([[0, 70_000]], np.int32)), 'mode "I"', "0 to 70000", "Scale them")


def test_other_objects_are_refused(plain):
    fails(plain, 7, "given as int", "expected a path, bytes, an open binary file, a PIL image, a numpy array")
    fails(plain, [noise()], "given as list")


def test_an_encoder_without_image_processor_is_one_clear_error(tmp_path):
    with pytest.raises(xblip.BundleError, match=r"Cannot load the image processor of .*Expected preprocessor_config"):
        Image(Image.Config(encoder=str(tmp_path))).load(noise())


def test_a_processor_that_gives_no_picture_is_one_clear_error(tmp_path):
    from transformers import Siglip2ImageProcessor

    Siglip2ImageProcessor().save_pretrained(tmp_path)
    with pytest.raises(xblip.BundleError, match=r"gives pixel_values of shape .*; expected \(1, 3, H, W\)"):
        Image(Image.Config(encoder=str(tmp_path))).load(noise())


class TestImageContract(xblip.testing.ModalityContract):
    name = "image"
