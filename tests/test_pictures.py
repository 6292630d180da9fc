"""Pictures: what each kind of source becomes, and what is refused."""

import io
import warnings
import zlib

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import torch

import xblip
from xblip.pictures import Crop, RandomCrop, as_picture


def rgb(source, max_pixels=100_000_000):
    """The 8-bit RGB picture (H, W, 3) that a source becomes."""
    picture = as_picture(source, kind="image", max_pixels=max_pixels)
    assert picture.mode == "RGB"
    return np.asarray(picture)


def fails(source, *fragments, max_pixels=100_000_000):
    with pytest.raises(xblip.MediaError) as caught:
        rgb(source, max_pixels)
    message = str(caught.value)
    for fragment in fragments:
        assert fragment in message, message


def noise(height=45, width=60, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(picture, kind, **options):
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def test_where_both_orders_fit_arrays_have_channels_last_and_tensors_first():
    values = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
    assert np.array_equal(rgb(values), values)
    assert np.array_equal(rgb(torch.from_numpy(values)), np.moveaxis(values, 0, 2))


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (1, 5, 7)])
def test_grey_arrays_become_grey_pictures(shape):
    values = np.arange(35, dtype=np.uint8).reshape(shape)
    assert np.array_equal(rgb(values), np.repeat(values.reshape(5, 7, 1), 3, 2))


def test_bool_arrays_are_black_and_white():
    assert rgb(np.array([[True, False]]))[0, :, 0].tolist() == [255, 0]


GREY16 = np.array([[0, 128, 129, 25700, 32768, 65535]], np.uint16)
GREY8 = [0, 0, 1, 100, 128, 255]


@pytest.mark.parametrize("mode", ["I;16", "I"])
def test_sixteen_bit_grey_is_scaled_not_clipped(mode):
    picture = PIL.Image.fromarray(GREY16 if mode == "I;16" else GREY16.astype(np.int32))
    assert picture.mode == mode
    for source in (picture, encoded(picture, "TIFF")):
        assert rgb(source)[0, :, 0].tolist() == GREY8
    assert rgb(encoded(PIL.Image.fromarray(GREY16), "PNG"))[0, :, 0].tolist() == GREY8
    assert rgb(b"P5 6 1 65535\n" + GREY16.astype(">u2").tobytes())[0, :, 0].tolist() == GREY8


def test_float_pictures_are_read_like_float_arrays():
    picture = PIL.Image.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32))
    assert rgb(picture)[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparency_is_laid_on_white(mode):
    picture = PIL.Image.new("RGBA", (2, 1), (0, 0, 0, 255))
    picture.putpixel((1, 0), (0, 0, 0, 0))
    if mode == "PA":
        alpha = picture.getchannel("A")
        picture = PIL.Image.new("P", (2, 1))
        picture.putalpha(alpha)
    picture = picture.convert(mode)
    assert picture.mode == mode
    assert rgb(picture)[0].tolist() == [[0, 0, 0], [255, 255, 255]]


def test_a_transparent_shade_of_sixteen_bit_grey_is_laid_on_white():
    png = encoded(PIL.Image.fromarray(GREY16), "PNG", transparency=25700)
    assert rgb(png)[0, :, 0].tolist() == [0, 0, 1, 255, 128, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_each_orientation_is_turned_as_pillow_turns_it(orientation):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    png = encoded(PIL.Image.fromarray(noise(8, 16)), "PNG", exif=exif)
    upright = PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(png)))
    assert np.array_equal(rgb(png), np.asarray(upright))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
@pytest.mark.parametrize(
    "exif", [b"rubbish", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\0\x09\x01\x12"]
)
def test_a_whole_picture_with_unreadable_exif_is_read(kind, exif):
    lossless = {"lossless": True} if kind == "WEBP" else {}
    picture = PIL.Image.fromarray(noise())
    assert np.array_equal(rgb(encoded(picture, kind, exif=exif, **lossless)), rgb(encoded(picture, kind, **lossless)))


def test_half_transparent_red_is_pink():
    picture = PIL.Image.new("RGBA", (1, 1), (255, 0, 0, 128))
    assert rgb(encoded(picture, "PNG"))[0, 0].tolist() == [255, 127, 127]
    assert rgb(np.array([[[255, 0, 0, 128]]], np.uint8))[0, 0].tolist() == [255, 127, 127]


@pytest.mark.parametrize(("kind", "transparency"), [("PNG", 1), ("PNG", b"\xff\x00"), ("GIF", 1)])
def test_transparent_palette_colours_are_white(kind, transparency):
    picture = PIL.Image.new("P", (2, 1))
    picture.putpalette([10, 20, 30, 200, 0, 0])
    picture.putpixel((1, 0), 1)
    data = encoded(picture, kind, transparency=transparency)
    assert rgb(data)[0].tolist() == [[10, 20, 30], [255, 255, 255]]


def test_one_bit_palette_grey_and_cmyk_pictures():
    one_bit = PIL.Image.new("1", (1, 1), 1)
    palette = PIL.Image.new("RGB", (1, 1), (10, 200, 30)).quantize(2)
    assert rgb(encoded(one_bit, "PNG"))[0, 0].tolist() == [255, 255, 255]
    assert rgb(encoded(palette, "PNG"))[0, 0].tolist() == [10, 200, 30]
    assert rgb(encoded(PIL.Image.new("L", (1, 1), 77), "PNG"))[0, 0].tolist() == [77, 77, 77]
    assert rgb(PIL.Image.new("CMYK", (1, 1), (0, 255, 255, 0)))[0, 0].tolist() == [255, 0, 0]
    cmyk = rgb(encoded(PIL.Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))[4, 4].astype(int)
    assert np.abs(cmyk - [255, 0, 0]).max() <= 6


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_to_files_and_pil_images(orientation, tmp_path):
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
    assert np.array_equal(rgb(path), upright)
    assert np.array_equal(rgb(PIL.Image.open(path)), upright)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "BMP", "TIFF", "PPM", "AVIF"])
def test_formats(kind):
    red = PIL.Image.new("RGB", (16, 16), (250, 10, 10))
    assert np.abs(rgb(encoded(red, kind))[8, 8].astype(int) - [250, 10, 10]).max() <= 6


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF"])
def test_the_first_frame_of_a_moving_picture_is_read(kind):
    frames = [PIL.Image.new("RGB", (4, 4), colour) for colour in ("red", "blue", "lime")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert rgb(data)[2, 2].tolist() == [255, 0, 0]


@pytest.mark.parametrize("kind", ["TIFF", "PNG", "WEBP"])
def test_pillows_own_limit_neither_warns_nor_stays_lifted(kind, monkeypatch):
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 100)
    data = encoded(PIL.Image.fromarray(noise()), kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rgb(data).shape == (45, 60, 3)
    assert PIL.Image.MAX_IMAGE_PIXELS == 100


def test_max_pixels_is_checked_in_the_header_before_decoding():
    claim = (60_000).to_bytes(4, "big") * 2
    png = bytearray(encoded(PIL.Image.new("L", (1, 1)), "PNG"))
    png[16:24] = claim
    png[29:33] = zlib.crc32(png[12:29]).to_bytes(4, "big")
    fails(bytes(png), "given as bytes", "60000 x 60000", "max_pixels = 100000000", "Shrink it")
    fails(np.zeros((10, 10), np.uint8), "10 x 10", "max_pixels = 99", max_pixels=99)
    fails(PIL.Image.new("L", (10, 10)), "10 x 10", "max_pixels = 99", max_pixels=99)
    assert rgb(np.zeros((9, 11), np.uint8), max_pixels=99).shape == (9, 11, 3)


def test_thin_strips_are_refused():
    assert rgb(np.zeros((1, 200), np.uint8)).shape == (1, 200, 3)
    fails(np.zeros((1, 201), np.uint8), "201 x 1 is too thin", "at most 200 times", "Crop it")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF"])
@pytest.mark.parametrize("part", [0.01, 0.5, 0.95])
def test_truncated_files_are_refused(kind, part, tmp_path):
    data = encoded(PIL.Image.fromarray(noise(64, 64)), kind)
    path = tmp_path / f"cut.{kind.lower()}"
    path.write_bytes(data[: int(len(data) * part)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fails(path, f"image '{path}'", "damaged or of another format", "Expected a PNG, JPEG, WebP")


@pytest.mark.parametrize("data", [b"\x89PNG\r\n\x1a\nrubbish", b"BM and no more", b"<svg/>"])
def test_what_no_format_owns_is_refused_by_a_sentence(data):
    fails(data, "damaged or of another format (its beginning is of no such picture). Expected a PNG")


def test_a_progressive_jpeg_cut_after_its_first_scans_is_refused():
    data = encoded(PIL.Image.fromarray(noise(64, 64)), "JPEG", progressive=True)
    fails(data[: len(data) * 3 // 4], "damaged")


@pytest.mark.parametrize("shape", [(5, 7, 2), (5,), (1, 3, 5, 7), (0, 5), (5, 0, 3)])
def test_wrong_shapes_are_refused(shape):
    fails(np.zeros(shape, np.uint8), f"shape is {shape}", "expected (H, W), (H, W, C) or (C, H, W)")
    fails(torch.zeros(shape), f"shape is {shape}")


@pytest.mark.parametrize("dtype", ["int64", "int8", "uint32", "complex64", "object"])
def test_wrong_dtypes_are_refused(dtype):
    fails(
        np.zeros((4, 4), dtype),
        f"dtype is {dtype}",
        "expected uint8, uint16, bool, or floats in [0, 1]",
    )


def test_floats_must_be_finite_and_between_zero_and_one():
    fails(np.array([[0.0, np.nan, np.inf]]), "2 of its 3 values are NaN or infinite")
    fails(np.array([[0.0, 255.0]]), "[0, 1]", "from 0 to 255", "Divide 0..255 by 255")
    fails(torch.tensor([[-1.0, 1.0]]), "from -1 to 1")


def test_integers_beyond_sixteen_bit_are_refused():
    fails(PIL.Image.fromarray(np.array([[0, 70_000]], np.int32)), 'mode "I"', "0 to 70000", "Scale them")


class TestRandomCrop:
    def test_parts_are_of_the_shapes_asked_for_and_from_everywhere(self):
        crop, draw = RandomCrop(scale=[0.25, 0.5], ratio=[0.8, 1.25]), np.random.default_rng(0)
        drawn = [crop.drawn(300, 200, draw) for _ in range(500)]
        sizes = [crop.of(PIL.Image.new("RGB", (300, 200))).size for crop in drawn]
        areas = [width * height / 60_000 for width, height in sizes]
        ratios = [width / height for width, height in sizes]
        assert 0.24 < min(areas) < 0.26 and 0.48 < max(areas) < 0.51
        assert 0.79 < min(ratios) < 0.82 and 1.22 < max(ratios) < 1.27
        assert not any(crop.flip for crop in drawn)
        assert min(crop.left for crop in drawn) < 0.02 and max(crop.right for crop in drawn) > 0.98
        assert min(crop.top for crop in drawn) < 0.02 and max(crop.bottom for crop in drawn) > 0.98

    def test_it_is_drawn_as_torchvision_draws_it(self):
        """Areas and ratios of what is kept are spread alike, also where few draws fit; so is what is kept if none does."""
        from torchvision.transforms import RandomResizedCrop

        for width, height in ((300, 200), (100, 131), (600, 60)):
            ours, theirs, draw = [], [], np.random.default_rng(0)
            with torch.random.fork_rng():
                torch.manual_seed(0)
                blank = torch.zeros(1, height, width)
                for _ in range(1500):
                    crop = RandomCrop().drawn(width, height, draw)
                    ours.append([crop.left, crop.top, crop.right - crop.left, crop.bottom - crop.top])
                    top, left, high, wide = RandomResizedCrop.get_params(blank, [0.5, 1.0], [0.75, 1.3333])
                    theirs.append([left / width, top / height, wide / width, high / height])
            for share in (0.1, 0.5, 0.9):
                assert np.allclose(np.quantile(ours, share, 0), np.quantile(theirs, share, 0), atol=0.02)

    def test_pixels_are_those_of_the_part(self):
        pixels = noise(40, 60)
        part = np.asarray(Crop(0.1, 0.25, 0.6, 0.75, flip=False).of(PIL.Image.fromarray(pixels)))
        assert np.array_equal(part, pixels[10:30, 6:36])
        mirrored = np.asarray(Crop(0.1, 0.25, 0.6, 0.75, flip=True).of(PIL.Image.fromarray(pixels)))
        assert np.array_equal(mirrored, part[:, ::-1])

    def test_mirrored_as_often_as_asked_for(self):
        draw = np.random.default_rng(0)
        flipped = sum(RandomCrop(flip=0.3).drawn(9, 9, draw).flip for _ in range(1000))
        assert 250 < flipped < 350

    @pytest.mark.parametrize("size", [(1, 1), (1, 150), (2, 3), (200, 1)])
    def test_the_smallest_and_thinnest_pictures_keep_a_pixel(self, size):
        draw = np.random.default_rng(0)
        for _ in range(50):
            part = RandomCrop(scale=[0.01, 1.0]).drawn(*size, draw).of(PIL.Image.new("RGB", size))
            assert min(part.size) >= 1 and part.size[0] <= size[0] and part.size[1] <= size[1]

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"scale": [0.5, 1.5]}, r"augment.scale must be .* above 0 and at most 1, such as .* not \[0.5, 1.5\]"),
            ({"scale": [0.5]}, r"augment.scale must be"),
            ({"scale": [0.0, 1.0]}, r"augment.scale must be"),
            ({"ratio": [2.0, 1.0]}, r"augment.ratio must be the least and the most, above 0, such"),
            ({"flip": 2.0}, r"augment.flip must be a share of pictures from 0 to 1, not 2"),
        ],
    )
    def test_what_cannot_be_is_refused(self, settings, message):
        with pytest.raises(xblip.ConfigError, match=message):
            RandomCrop(**settings)
