"""The video modality: which frames, from which sources, in which order, and what it refuses."""

import io
import math
import pickle
from fractions import Fraction

import numpy as np
import PIL.Image
import pytest
import torch
from numbered_videos import READERS, fails, numbered, numbers, rgb, write
from transformers import (
    AutoImageProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)
from xblip_video import Video, middles

import xblip
import xblip.testing

pytestmark = pytest.mark.filterwarnings("error")


def test_middles_of_equal_parts():
    assert middles(100, 4) == [12, 37, 62, 87]
    assert middles(9, 1) == [4]
    assert middles(3, 8) == [0, 1, 2]
    for total in range(1, 60):
        for asked in range(1, 20):
            count = min(total, asked)
            expected = [math.floor(Fraction(2 * part + 1, 2) * total / count) for part in range(count)]
            assert middles(total, asked) == expected and len(set(expected)) == count


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("count", [1, 3])
def test_short_videos_give_all_their_frames_once(plain, tmp_path, reader, count):
    path = write(tmp_path / "short.mp4", numbered(count))
    assert numbers(plain(num_frames=8, reader=reader), path) == list(range(count))


def test_pixel_values_are_those_of_the_encoders_own_processor(tmp_path):
    CLIPVisionConfig().save_pretrained(tmp_path)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    frames = numbered(2)
    frames = [PIL.Image.fromarray(frame) for frame in frames]
    expected = AutoImageProcessor.from_pretrained(tmp_path)(images=frames, return_tensors="pt")["pixel_values"]
    actual = Video(Video.Config(encoder=str(tmp_path))).load(frames)["pixel_values"]
    assert actual.shape == (2, 3, 32, 32) and torch.equal(actual, expected)


def test_reversing_the_frames_reverses_the_tensor(plain):
    frames = numbered(6)
    forward = plain().load(frames)["pixel_values"]
    backward = plain().load(np.ascontiguousarray(frames[::-1]))["pixel_values"]
    assert torch.equal(backward, forward.flip(0)) and not torch.equal(backward, forward)


def test_every_road_to_a_file_gives_the_same_tensor(plain, clip):
    modality = plain()
    expected = modality.load(clip)["pixel_values"]
    with clip.open("rb") as stream:
        for source in (str(clip), clip.read_bytes(), io.BytesIO(clip.read_bytes()), stream):
            assert torch.equal(modality.load(source)["pixel_values"], expected)


def test_pictures_instead_of_a_file(plain, tmp_path):
    frames = numbered(6)
    pictures = [PIL.Image.fromarray(frame) for frame in frames]
    paths = [tmp_path / f"{number}.png" for number in range(6)]
    for picture, path in zip(pictures, paths, strict=True):
        picture.save(path)
    roads = [frames, torch.from_numpy(frames), list(frames), list(torch.from_numpy(frames)), pictures, paths]
    roads += [
        tuple(map(str, paths)),
        [path.read_bytes() for path in paths],
        [pictures[0], *paths[1:5], frames[5]],
    ]
    for source in roads:
        assert np.array_equal(rgb(plain(num_frames=4), source), frames[[0, 2, 3, 5]])


def test_grey_arrays_are_grey_videos(plain):
    grey = np.arange(2 * 5 * 7, dtype=np.uint8).reshape(2, 5, 7)
    assert np.array_equal(rgb(plain(), grey), np.repeat(grey[..., None], 3, 3))
    assert np.array_equal(rgb(plain(), list(grey)), np.repeat(grey[..., None], 3, 3))


def test_arrays_may_hold_whatever_pictures_may_hold(plain):
    frames = numbered(2)
    deep = PIL.Image.fromarray(np.full((4, 4), 25700, np.uint16))
    for source in (frames / 255, torch.from_numpy(frames / 255), list(frames / 255), frames.astype(np.uint16) * 257):
        assert np.array_equal(rgb(plain(), source), frames)
    assert (rgb(plain(), torch.zeros(2, 8, 8, 3, dtype=torch.bfloat16)) == 0).all()
    assert (rgb(plain(), [deep]) == 100).all()


def test_listed_pictures_are_turned_upright_and_laid_on_white(plain, tmp_path):
    stored = numbered(1, 8, 16)[0]
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    PIL.Image.fromarray(stored).save(tmp_path / "turned.png", exif=exif)
    clear = PIL.Image.new("RGBA", (4, 4), (9, 9, 9, 0))
    assert np.array_equal(rgb(plain(), [tmp_path / "turned.png"])[0], stored.swapaxes(0, 1)[:, ::-1])
    assert (rgb(plain(), [clear]) == 255).all()


def test_listed_pictures_with_unreadable_exif_are_read(plain):
    stream = io.BytesIO()
    PIL.Image.fromarray(numbered(1)[0]).save(stream, "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert np.array_equal(rgb(plain(), [stream.getvalue()])[0], numbered(1)[0])


def test_max_pixels_is_the_only_limit_of_listed_pictures(plain, tmp_path, monkeypatch):
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 9)
    PIL.Image.fromarray(numbered(1)[0]).save(tmp_path / "large.png")
    assert np.array_equal(rgb(plain(), [tmp_path / "large.png"]), numbered(1))
    assert PIL.Image.MAX_IMAGE_PIXELS == 9


def test_the_encoder_takes_all_frames_as_rows(tmp_path, clip):
    config = ViTConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8)
    ViTModel(config).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    modality = Video(Video.Config(encoder=str(tmp_path), num_frames=5))
    encoder = modality.build_encoder().eval()
    with torch.no_grad():
        assert encoder(**modality.load(clip)).shape == (5, 17, encoder.width)


def test_pickles_for_workers_after_use(plain, clip):
    modality = plain()
    expected = modality.load(clip)["pixel_values"]
    assert torch.equal(pickle.loads(pickle.dumps(modality)).load(clip)["pixel_values"], expected)


def test_settings_that_cannot_be_are_refused(plain):
    with pytest.raises(xblip.ConfigError, match="num_frames of a video must be at least 1, not 0"):
        plain(num_frames=0)
    with pytest.raises(xblip.ConfigError, match=r"called \"opencv\"\. Known: auto, pyav, decord"):
        plain(reader="opencv")


def test_missing_empty_and_folder_are_refused(plain, tmp_path):
    (tmp_path / "empty.mp4").touch()
    fails(plain(), tmp_path / "none.mp4", "no such file")
    fails(plain(), tmp_path / "empty.mp4", "empty")
    fails(plain(), tmp_path, "folder")


@pytest.mark.parametrize("reader", READERS)
def test_limits(plain, clip, tmp_path, reader):
    fails(plain(reader=reader, max_pixels=6143), clip, "96 x 64", "max_pixels = 6143", "raise max_pixels")
    fails(plain(reader=reader, max_seconds=3.5), clip, "lasts 4 s", "max_seconds = 3.5", "raise max_seconds")
    assert plain(reader=reader, max_pixels=6144, max_seconds=4).load(clip)
    strip = write(tmp_path / "strip.mp4", np.zeros((2, 2, 402, 3), np.uint8))
    fails(plain(reader=reader), strip, "402 x 2", "too thin", "at most 200 times")


def test_wrong_arrays_are_refused(plain):
    fails(plain(), numbered(2).astype(float), "frame 0 of the video", "must lie in [0, 1]", "convert to uint8")
    fails(plain(), numbered(2).astype(int), "frame 0 of the video", "dtype is int64", "expected uint8", "Convert it")
    fails(plain(), numbered(2).transpose(0, 3, 1, 2), "shape is (2, 3, 64, 96)", "Bring channels last")
    fails(plain(), numbered(1)[0], "shape is (64, 96, 3)", "put a single picture into a list")
    fails(plain(), np.zeros((0, 8, 8, 3), np.uint8), "at least one frame")
    fails(plain(), torch.zeros(3, dtype=torch.uint8), "shape is (3,)")


def test_wrong_lists_are_refused(plain, tmp_path):
    (tmp_path / "text.png").write_text("hello")
    deep = PIL.Image.fromarray(np.full((4, 4), 70_000, np.int32))
    fails(plain(), [PIL.Image.new("L", (0, 0))], "frame 0 of the video", "it has no pixels (0 x 0)")
    fails(plain(), [torch.zeros(8, 8, dtype=torch.uint8).to_sparse()], "numpy cannot take it")
    fails(plain(), [], "list of pictures is empty")
    fails(plain(), [numbered(1)[0], tmp_path / "text.png"], "frame 1 of the video", "text.png", "Expected a PNG, JPEG")
    fails(plain(), [tmp_path / "none.png"], "frame 0 of the video", "no such file")
    fails(plain(), [numbered(1)[0] / 1], "frame 0 of the video", "must lie in [0, 1]", "convert to uint8")
    fails(plain(), [7], "frame 0 of the video given as int", "a PIL image")
    fails(plain(), [np.zeros((5, 5, 2), np.uint8)], "shape is (5, 5, 2)", "expected (H, W), (H, W, C) or (C, H, W)")
    fails(plain(), [deep], 'mode "I" is read as 16-bit grey', "Scale them")
    fails(plain(max_pixels=9), [PIL.Image.new("L", (5, 2))], "frame 0", "5 x 2", "max_pixels = 9")


def test_other_objects_are_refused(plain):
    fails(plain(), 7, "given as int", "expected a path, bytes, an open binary file, a list of pictures")
    fails(plain(), PIL.Image.new("L", (4, 4)), "a list of pictures")


def test_an_encoder_without_image_processor_is_one_clear_error(tmp_path):
    with pytest.raises(xblip.BundleError, match=r"Cannot read what the video encoder .* is: .*Expected the folder"):
        Video(Video.Config(encoder=str(tmp_path))).load(numbered(1))
    ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(xblip.BundleError, match=r"Cannot load the image processor of .*Expected preprocessor_config"):
        Video(Video.Config(encoder=str(tmp_path))).load(numbered(1))


def test_a_processor_that_gives_no_picture_is_one_clear_error(tmp_path):
    from transformers import LlavaNextImageProcessor

    ViTConfig().save_pretrained(tmp_path)
    LlavaNextImageProcessor().save_pretrained(tmp_path)
    with pytest.raises(xblip.BundleError, match=r"gives pixel_values of shape .*; expected \(1, 3, H, W\)"):
        Video(Video.Config(encoder=str(tmp_path))).load(numbered(1))


class TestVideoContract(xblip.testing.ModalityContract):
    name = "video"

    def test_the_order_of_the_frames_reaches_the_soft_prompt(self):
        subject = type(self)._subject()
        frames = numbered(4)
        first, second = subject.soft_prompts([frames, np.ascontiguousarray(frames[::-1])], ["what is this ?"] * 2)
        segments = first.reshape(4, -1, first.shape[-1])
        assert (segments.flip(0) - second.reshape(segments.shape)).abs().max() > 1e-5


class TestAugmentation:
    def test_all_frames_of_a_clip_keep_the_same_part(self, plain, clip):
        modality = plain(num_frames=5)
        whole = modality.load(clip)["pixel_values"]
        kept = []
        for seed in range(6):
            crop = modality.config.augment.drawn(96, 64, np.random.default_rng(seed))
            left, top, right, bottom = (
                round(edge * size) for edge, size in zip(crop[:4], (96, 64, 96, 64), strict=True)
            )
            part = modality.augmented(clip, np.random.default_rng(seed))["pixel_values"]
            assert torch.equal(part, whole[:, :, top:bottom, left:right])
            kept.append((left, top, right, bottom))
        assert len(set(kept)) > 3

    def test_a_part_goes_through_the_encoders_own_processor_and_flips_if_asked_to(self, tmp_path):
        CLIPVisionConfig().save_pretrained(tmp_path)
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(tmp_path)
        settings = {"scale": [1.0, 1.0], "ratio": [1.5, 1.5], "flip": 1.0}
        modality = Video(Video.Config(encoder=str(tmp_path), augment=Video.RandomCrop(**settings)))
        frames = numbered(3)
        mirrored = modality.load(np.ascontiguousarray(frames[:, :, ::-1]))["pixel_values"]
        assert torch.equal(modality.augmented(frames, np.random.default_rng(0))["pixel_values"], mirrored)

    def test_listed_pictures_of_several_sizes_keep_the_same_share(self, tmp_path):
        ViTConfig().save_pretrained(tmp_path)
        ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
        ramp = PIL.Image.fromarray(np.tile(np.linspace(0, 255, 90).astype(np.uint8), (60, 1)))
        modality = Video(Video.Config(encoder=str(tmp_path)))
        for seed in range(4):
            parts = modality.augmented([ramp, ramp.resize((180, 120))], np.random.default_rng(seed))["pixel_values"]
            assert (parts[0] - parts[1]).abs().max() < 0.05
