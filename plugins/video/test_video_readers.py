"""Both readers: exact frames of many kinds of file, and what they refuse."""

import gc
import struct
import sys

import av
import numpy as np
import PIL.Image
import pytest
import torch
import xblip_video_readers
from numbered_videos import (
    FASTSTART,
    READERS,
    fails,
    has_decord,
    needs_decord,
    number_of,
    numbered,
    numbers,
    rgb,
    write,
    write_audio,
)
from xblip_video import Video, middles
from xblip_video_readers import DecordReader, PyavReader

import xblip

pytestmark = pytest.mark.filterwarnings("error")


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("b_frames.mp4", "libx264", {"g": "12", "bf": "2"}),
        ("open_gop.mp4", "libx264", {"x264-params": "open-gop=1:keyint=8:bframes=3"}),
        ("hevc_open_gop.mp4", "libx265", {"x265-params": "log-level=none:keyint=8"}),
        ("b_frames.mkv", "libx264", {"g": "12", "bf": "2"}),
        ("b_frames.mov", "libx264", {"g": "12", "bf": "2"}),
        ("b_frames.avi", "libx264", {"g": "12", "bf": "2"}),
        ("mpeg4.avi", "mpeg4", {"bf": "2", "g": "8"}),
        ("stills.avi", "mjpeg", {}),
        ("vp9.webm", "libvpx-vp9", {"g": "8", "deadline": "realtime"}),
    ],
)
def test_both_readers_give_exactly_the_frames_asked_for(plain, tmp_path, reader, name, codec, options):
    path = write(tmp_path / name, numbered(40), codec=codec, options=options)
    for asked in (1, 7, 40):
        assert numbers(plain(num_frames=asked, reader=reader), path) == middles(40, asked)


@pytest.mark.parametrize("reader", READERS)
def test_fragmented_mp4(plain, tmp_path, reader):
    options = {"movflags": "frag_keyframe+empty_moov"}
    path = write(tmp_path / "fragments.mp4", numbered(40), options={"g": "8"}, container_options=options)
    assert numbers(plain(num_frames=40, reader=reader), path) == list(range(40))
    assert xblip_video_readers.READERS[reader](path, "it").times_s[:2] == pytest.approx([0, 0.1])


@pytest.mark.parametrize("reader", READERS)
def test_a_title_that_is_no_utf_8_keeps_no_video_from_being_read(plain, clip, reader):
    data = clip.read_bytes()
    assert data.count(b"Lavf") == 1
    assert numbers(plain(num_frames=4, reader=reader), data.replace(b"Lavf", b"L\xe4vf")) == middles(41, 4)


def test_pyav_gives_no_neighbour_of_a_frame_that_is_missing(clip):
    reader = PyavReader(clip, "it")
    ticks = reader._index.presentation
    ticks.insert(20, ticks[20] - 1)
    assert [number_of(frame) for frame in reader.frames([19, 21])] == [19, 20]
    with pytest.raises(ValueError, match="frame 20 of 41 cannot be decoded"):
        list(reader.frames([20]))


@needs_decord
def test_both_readers_give_the_same_pixels(plain, clip):
    first, second = (rgb(plain(reader=reader), clip).astype(int) for reader in ("pyav", "decord"))
    assert np.abs(first - second).max() <= 2


@pytest.mark.parametrize("reader", READERS)
def test_varying_frame_rate(plain, tmp_path, reader):
    ticks = [0, 40, 90, 500, 540, 2000, 2010, 2050, 3000, 3900]
    path = write(tmp_path / "varying.mp4", numbered(10), ticks=ticks)
    assert numbers(plain(num_frames=5, reader=reader), path) == [1, 3, 5, 7, 9]
    times = xblip_video_readers.READERS[reader](path, "it").times_s
    assert np.allclose(times, [tick / 1000 for tick in ticks], atol=2e-3)


def test_a_trimmed_mp4_starts_and_ends_where_its_edit_list_says(plain, tmp_path):
    path = write(tmp_path / "trimmed.mp4", numbered(40), options={"bf": "0"})
    data = bytearray(path.read_bytes())
    place = data.index(b"elst") + 12
    data[place : place + 4] = (2000).to_bytes(4)  # milliseconds shown
    data[place + 4 : place + 8] = (13 * 1024).to_bytes(4)  # first tick shown, 1024 a frame
    path.write_bytes(data)
    assert numbers(plain(num_frames=99, reader="pyav"), path) == list(range(13, 33))
    if has_decord():  # it counts the frames that are cut off, and may not fill up with others
        fails(plain(num_frames=99, reader="decord"), path, "decoding fails at or after frame")


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("colours", [av.video.reformatter.Colorspace.ITU601, av.video.reformatter.Colorspace.ITU709])
def test_colours_are_rgb(plain, tmp_path, reader, colours):
    shades = [(250, 10, 10), (10, 250, 10), (10, 10, 250)]
    frames = np.stack([np.full((64, 64, 3), shade, np.uint8) for shade in shades])
    path = write(tmp_path / "colours.mp4", frames, options={"crf": "4"}, colours=colours)
    seen = rgb(plain(reader=reader), path)[:, 32, 32].astype(int)
    assert np.abs(seen - shades).max() <= 6


TURNS = [(f"turned.{kind}", {"degrees": degrees}) for kind in ("mp4", "mov") for degrees in (90, 180, 270)]
MORE_TURNS = [("turned.mkv", {"degrees": 90}), ("mirrored.mp4", {"degrees": 0, "hflip": True})]
MORE_TURNS += [("both.mov", {"degrees": 270, "hflip": True})]  # decord knows none of these three


@pytest.mark.parametrize(
    ("reader", "name", "rotation"),
    [("pyav", *turn) for turn in TURNS + MORE_TURNS]
    + [pytest.param("decord", *turn, marks=needs_decord) for turn in TURNS],
)
def test_the_rotation_flag_is_applied(plain, tmp_path, reader, name, rotation):
    stored = np.zeros((3, 96, 128, 3), np.uint8)
    stored[:, :48, :64], stored[:, :48, 64:], stored[:, 48:, :64] = (
        (240, 20, 20),
        (20, 240, 20),
        (20, 20, 240),
    )
    path = write(tmp_path / name, stored, options={"crf": "4"}, rotation=rotation)
    upright = np.rot90(stored, rotation["degrees"] // 90, axes=(1, 2))
    upright = upright[:, :, ::-1] if rotation.get("hflip") else upright
    seen = rgb(plain(reader=reader), path).astype(int)
    assert seen.shape == upright.shape
    inside = (slice(None), slice(6, None, 12), slice(6, None, 12))
    assert np.abs(seen[inside] - upright[inside]).max() <= 12


class Copies(torch.utils.data.Dataset):
    """One video, twelve times."""

    def __init__(self, modality, path):
        self.modality, self.path = modality, path

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return self.modality.load(self.path)["pixel_values"]


@pytest.mark.parametrize("reader", READERS)
def test_forked_workers_read_after_their_parent_has_read(plain, clip, reader):
    """FFmpeg's own threads do not survive a fork: a reader that used them would hang here."""
    modality = plain(reader=reader)
    expected = modality.load(clip)["pixel_values"]
    workers = {"num_workers": 2, "multiprocessing_context": "fork", "timeout": 60}
    gc.collect()  # readers that failed in other tests: freed in a worker, decord's would wait for threads it has not
    loaded = list(torch.utils.data.DataLoader(Copies(modality, clip), batch_size=None, **workers))
    assert len(loaded) == 12 and all(torch.equal(values, expected) for values in loaded)


def without(monkeypatch, *packages):
    for package in packages:
        monkeypatch.setitem(sys.modules, package, None)


def test_auto_is_pyav_or_else_decord(monkeypatch):
    assert xblip_video_readers.choose("auto") is PyavReader
    without(monkeypatch, "av")
    if has_decord():
        assert xblip_video_readers.choose("auto") is DecordReader
    without(monkeypatch, "decord")
    with pytest.raises(xblip.PluginError, match=r"reader: auto can be imported \(av: .*decord: .*pip install av or"):
        xblip_video_readers.choose("auto")


def test_a_named_reader_that_is_missing_is_one_clear_error(monkeypatch, plain, clip):
    without(monkeypatch, "decord")
    assert numbers(plain(num_frames=1), clip) == [20]
    with pytest.raises(xblip.PluginError, match=r"reader: decord can be imported .*pip install decord\."):
        plain(reader="decord").load(clip)


@needs_decord
def test_decord_alone_is_enough(monkeypatch, plain, clip):
    without(monkeypatch, "av")
    assert numbers(plain(num_frames=4), clip) == [5, 15, 25, 35]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.avi", "mpeg4")])
@pytest.mark.parametrize("part", [0.4, 0.7, 0.98])
def test_a_file_cut_short_is_refused(plain, tmp_path, reader, name, codec, part):
    options = FASTSTART if name == "a.mp4" else {}
    path = write(tmp_path / name, numbered(40), codec=codec, options={"g": "8"}, **options)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    fails(plain(reader=reader), path, f"video '{path}'", "cut short", f"{int(len(data) * part)} of at least")


@pytest.mark.parametrize("reader", READERS)
def test_an_mp4_cut_before_its_index_is_refused(plain, clip, reader):
    data = clip.read_bytes()
    fails(plain(reader=reader), data[: len(data) // 2], "the video given as bytes", "cut short")


@pytest.mark.parametrize("reader", READERS)
def test_an_index_that_promises_more_frames_than_there_are_is_refused(plain, tmp_path, reader):
    path = write(tmp_path / "promises.mp4", numbered(80), options={"g": "8"}, **FASTSTART)
    data = bytearray(path.read_bytes())
    place = data.index(b"mdat") - 4
    size = int.from_bytes(data[place : place + 4]) // 2
    data[place : place + 4] = size.to_bytes(4)
    path.write_bytes(data[: place + size])
    reason = "of 80 frames are there" if reader == "pyav" else "decord cannot open it"
    fails(plain(reader=reader), path, f"with {reader}", reason)


@pytest.mark.parametrize("reader", READERS)
def test_frames_overwritten_with_zeros_are_refused(plain, tmp_path, reader):
    path = write(tmp_path / "zeros.mp4", numbered(80), options={"g": "8"}, **FASTSTART)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3] + bytes(len(data) - len(data) * 2 // 3))
    fails(plain(reader=reader), path, f"with {reader}", "damaged", "Expected an MP4")


def test_pyav_decodes_no_more_than_it_needs(plain, tmp_path):
    """Frames 24 .. 47 are overwritten: it would stumble over them on the way from frame 20 to frame 60."""
    path = write(tmp_path / "hole.mp4", numbered(80), options={"g": "8", "bf": "0"})
    with av.open(str(path)) as container:
        places = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    data = bytearray(path.read_bytes())
    for place, size in places[24:48]:
        data[place : place + size] = bytes(size)
    path.write_bytes(data)
    assert numbers(plain(num_frames=2, reader="pyav"), path) == [20, 60]
    fails(plain(num_frames=3, reader="pyav"), path, "with pyav", "damaged")


@pytest.mark.parametrize("reader", READERS)
def test_audio_alone_is_refused(plain, tmp_path, reader):
    fails(plain(reader=reader), write_audio(tmp_path / "audio.mp4"), "audio.mp4", "has no video stream")


def test_the_cover_of_a_recording_is_no_video(plain, tmp_path):
    path = write_audio(tmp_path / "song.mp4", cover=numbered(1)[0])
    fails(plain(reader="pyav"), path, "song.mp4", "has no video stream")


def test_a_codec_that_nobody_knows_is_refused_with_advice(plain, tmp_path):
    path = write(tmp_path / "odd.mp4", numbered(4))
    path.write_bytes(path.read_bytes().replace(b"avc1\0\0", b"xyzq\0\0").replace(b"avcC", b"xyzC"))
    fails(plain(reader="pyav"), path, "odd.mp4", "its codec is unknown", "Convert it to H.264")


@needs_decord
def test_a_codec_that_decord_does_not_know_is_refused_with_advice(plain, tmp_path):
    path = write(tmp_path / "new.mp4", numbered(4), codec="libsvtav1", options={"preset": "12"})
    assert numbers(plain(reader="pyav"), path) == [0, 1, 2, 3]
    fails(plain(reader="decord"), path, "codec that decord does not know", "reader: pyav knows more")


@needs_decord
def test_a_width_that_decord_misreads_is_refused_with_advice(plain, tmp_path):
    path = write(tmp_path / "narrow.mp4", numbered(4, 64, 48))
    assert numbers(plain(reader="pyav"), path) == [0, 1, 2, 3]
    fails(plain(reader="decord"), path, "decord misreads frames 48 pixels wide", "Choose reader: pyav")


@pytest.mark.parametrize("reader", READERS)
def test_text_pictures_and_noise_called_mp4_are_refused(plain, tmp_path, reader):
    text, picture, noise = (tmp_path / f"{name}.mp4" for name in ("text", "picture", "noise"))
    text.write_text("this is no video at all")
    PIL.Image.new("RGB", (64, 64)).save(picture, format="PNG")
    noise.write_bytes((24).to_bytes(4) + b"ftypisom" + np.random.default_rng(0).bytes(2000))
    fails(plain(reader=reader), text, "text.mp4", "of another format", "Expected an MP4, MOV, WebM, MKV or AVI")
    fails(plain(reader=reader), picture, "picture.mp4", "of another format")
    fails(plain(reader=reader), noise, "noise.mp4", f"with {reader}", "damaged or of another format")


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(("name", "codec"), [("long.avi", "mpeg4"), ("long.mkv", "libx264")])
def test_an_absurd_length_in_the_header_ends_neither_the_process_nor_in_a_video(plain, tmp_path, reader, name, codec):
    path = write(tmp_path / name, numbered(20), codec=codec)
    data = bytearray(path.read_bytes())
    if codec == "mpeg4":
        struct.pack_into("<I", data, data.index(b"strh") + 40, 2**31 - 1)
    else:
        struct.pack_into(">d", data, data.index(b"\x44\x89\x88") + 3, 1e12)
    path.write_bytes(data)
    fails(plain(reader=reader), path, f"with {reader}", "promises" if reader == "decord" else "more than max_seconds")


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    "header",
    [
        b"\x1a\x45\xdf\xa3",
        b"\x1a\x45\xdf\xa3\x80\x18\x53\x80\x67",
        b"\x1a\x45\xdf\xa3\xff" + bytes(50),
        b"\x1a\x45\xdf\xa3" + bytes(51),
        b"\0\0\0\1ftyp" + b"\xff" * 8 + bytes(40),
        b"\0\0\0\1ftyp\x7f" + b"\xff" * 7 + bytes(40),
    ],
)
def test_broken_headers_are_refused(plain, reader, header):
    fails(plain(reader=reader), header, "Cannot read the video given as bytes")


def test_an_index_of_absurd_size_is_refused(plain, clip):
    data = bytearray(clip.read_bytes())
    place = data.index(b"stts") + 8
    data[place : place + 4] = (0x0FFFFFFF).to_bytes(4)
    fails(plain(reader="pyav"), bytes(data), "with pyav", "damaged")


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", ["12:30.mp4", "clip:1.mp4", "file:1.mp4"])
def test_a_name_may_have_a_colon(plain, clip, tmp_path, monkeypatch, reader, name):
    (tmp_path / name).write_bytes(clip.read_bytes())
    monkeypatch.chdir(tmp_path)
    assert numbers(plain(num_frames=2, reader=reader), name) == [10, 30]


def test_what_it_needs_can_be_asked_for():
    needed = Video.diagnose()
    assert "by" in needed["FFmpeg, by PyAV"]() and list(needed) == ["FFmpeg, by PyAV", "decord"]
    if has_decord():
        assert needed["decord"]()[0].isdigit()
