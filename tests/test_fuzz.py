"""Broken files that were found to be worth keeping, files made to hurt, and a short run of what breaks thousands.

`fuzz_media.py` made the files of `corpus/`, out of files that `fuzz_seeds.py` writes: one for each kind of refusal, and some
that are read all the same.
"""

import io
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numbered_videos
import numpy as np
import PIL.Image
import point_shapes
import pytest
import sounds
from fuzz_media import MODALITIES, PLEASANT, Range, pattern, run, unclear
from fuzz_mutate import Case, Step, cases, drawn
from fuzz_seeds import seeds
from fuzz_server import Served, body_shots, file_shots
from fuzz_server import run as send

from xblip import config as configs
from xblip import plugins
from xblip.decode_pool import DecodePool

CORPUS = sorted(Path(__file__).with_name("corpus").glob("*/*"))
LIMITS = {"max_pixels": 25_000_000, "max_seconds": 600.0, "max_points": 2_000_000}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Each modality with a tiny encoder and the limits of a server, and a good file of it."""
    found = {}
    for name in MODALITIES:
        kind = plugins.get("modality", name)
        example = kind.example(tmp_path_factory.mktemp(name))
        config = configs.build(kind.Config, example.config, where=name)
        for key in LIMITS.keys() & vars(config).keys():
            setattr(config, key, LIMITS[key])
        found[name] = kind(config), next(source for source in example.sources if isinstance(source, Path))
    return found


def ranges_of(built, load, folder):
    """A range for each modality that knows how its tensors look."""
    found = {name: Range(name, load, folder) for name in built}
    for name, (_, path) in built.items():
        assert not found[name].learn({path.name: path.read_bytes()})
    return found


@pytest.fixture(scope="module")
def ranges(built, tmp_path_factory):
    """Read in this process, which takes seconds less to start."""
    return ranges_of(built, lambda name, path: built[name][0].load(path), tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def pooled(built, tmp_path_factory):
    """Read by a server's workers."""
    with DecodePool({name: modality for name, (modality, _) in built.items()}) as pool:
        yield ranges_of(built, pool.load, tmp_path_factory.mktemp("files"))


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_what_was_found_is_refused_by_a_sentence_or_read(ranges, path):
    outcome = ranges[path.parent.name].read(path.read_bytes(), path.suffix)
    assert outcome.kind in ("read", "refused") and outcome.seconds < 5, outcome
    assert (outcome.kind == "read") == path.name.startswith("read")


@pytest.mark.slow
def test_workers_read_what_was_found_alike(ranges, pooled):
    for path in CORPUS:
        first, second = (each[path.parent.name].read(path.read_bytes(), path.suffix) for each in (ranges, pooled))
        assert first.kind == second.kind, (path, first.said, second.said)


def test_the_corpus_is_small():
    assert {path.parent.name for path in CORPUS} == set(MODALITIES)
    assert sum(path.stat().st_size for path in CORPUS) < 300_000


def _saved(picture: PIL.Image.Image, kind: str, **options) -> bytes:
    with io.BytesIO() as file:
        picture.save(file, kind, **options)
        return file.getvalue()


def _png(*chunks: tuple[bytes, bytes], size: tuple[int, int] = (1, 1)) -> bytes:
    """A grey PNG with further chunks before its pixels."""
    header = (b"IHDR", struct.pack(">IIBBBBB", *size, 8, 0, 0, 0, 0))
    found = b"\x89PNG\r\n\x1a\n"
    for name, body in (header, *chunks, (b"IDAT", zlib.compress(b"\0\0")), (b"IEND", b"")):
        found += struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    return found


def _zeros(mib: int) -> bytes:
    """So many MiB of zeros, packed."""
    packer = zlib.compressobj(1)
    return b"".join([packer.compress(bytes(2**20)) for _ in range(mib)]) + packer.flush()


def _gif(frames: int) -> bytes:
    whole = _saved(PIL.Image.new("P", (1, 1)), "GIF")
    start = whole.index(b",")
    return whole[:start] + whole[start:-1] * frames + b";"


def _jpeg(mib: int) -> bytes:
    whole = _saved(PIL.Image.new("RGB", (8, 8), "red"), "JPEG")
    segment = b"\xff\xe1\xff\xff" + b"Exif\0\0".ljust(65_533, b"\0")
    return whole[:2] + segment * (16 * mib) + whole[2:]


def _film(ending: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return numbered_videos.write(Path(folder, f"film{ending}"), numbered_videos.numbered(6, 32, 48)).read_bytes()


def _long_film() -> bytes:
    """A Matroska whose header says that it lasts 136 years, in milliseconds as a float of 8 bytes."""
    whole = _film(".mkv")
    place = whole.index(b"\x44\x89\x88") + 3
    return whole[:place] + struct.pack(">d", 2.0**32 * 1000) + whole[place + 8 :]


def _deep(levels: int) -> bytes:
    found = b""
    for _ in range(levels):
        found = struct.pack(">I4s", 8 + len(found), b"moov") + found
    return struct.pack(">I4s4sI", 16, b"ftyp", b"isom", 0) + found


def _wav(declared: int) -> bytes:
    data = (sounds.tone(440, 0.1) * 32_767).astype("<i2").tobytes()
    head = struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 0xFFFFFFFF, b"WAVE", b"fmt ", 16, 1, 1, 16_000, 32_000, 2, 16,
                       b"data", declared)  # fmt: skip
    return head + data


def _npz(**arrays: np.ndarray) -> bytes:
    with io.BytesIO() as file:
        np.savez_compressed(file, **arrays)
        return file.getvalue()


def _npz_header(mib: int) -> bytes:
    """An archive whose array has a header of so many MiB."""
    with io.BytesIO() as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("points.npy", b"\x93NUMPY\2\0" + struct.pack("<I", mib * 2**20) + bytes(mib * 2**20))
        return file.getvalue()


def _polygon(corners: int) -> bytes:
    head = (
        "ply\nformat binary_little_endian 1.0\nelement vertex 3\nproperty float x\nproperty float y\nproperty float z\n"
    )
    head += "element face 1\nproperty list uint int vertex_indices\nend_header\n"
    return head.encode() + point_shapes.CORNERS[:3].tobytes() + struct.pack("<I", corners) + bytes(4 * corners)


HOSTILE: dict[str, tuple[str, str, Callable[[], bytes], str | None]] = {
    "ten gigapixels": ("image", ".png", lambda: _png(size=(100_000, 100_000)), "100000 x 100000 is more than max_pixels"),
    "a text that unpacks to 256 MiB": ("image", ".png", lambda: _png((b"zTXt", b"a\0\0" + _zeros(256))), "too large"),
    "a profile that unpacks to 256 MiB": ("image", ".png", lambda: _png((b"iCCP", b"a\0\0" + _zeros(256))), "too large"),
    "100,000 frames": ("image", ".gif", lambda: _gif(100_000), None),
    "8 MiB of EXIF": ("image", ".jpg", lambda: _jpeg(8), None),
    "a moving WebP": (
        "image",
        ".webp",
        lambda: _saved(
            PIL.Image.new("RGB", (9, 9)), "WEBP", save_all=True, append_images=[PIL.Image.new("RGB", (9, 9), "red")] * 99
        ),
        None,
    ),
    "a length that means none": ("audio", ".wav", lambda: _wav(0xFFFF_F000), None),
    "a header of 3 GiB": ("audio", ".wav", lambda: _wav(3 * 2**30), "it is cut short"),
    "a hundred thousand boxes": ("video", ".mp4", lambda: _film(".mp4") + struct.pack(">I4s", 8, b"free") * 100_000, None),
    "a box longer than the file": (
        "video", ".mp4", lambda: _film(".mp4") + struct.pack(">I4s", 2**31, b"mdat"), "cut short"
    ),
    "a box of no length": ("video", ".mp4", lambda: _film(".mp4") + struct.pack(">I4s", 0, b"mdat") * 1000, None),
    "136 years by its header": ("video", ".mkv", _long_film, "it lasts 4294967296 s"),
    "a box in a box, 50,000 deep": ("video", ".mp4", lambda: _deep(50_000), "Cannot read"),
    "two million zeros": ("point_cloud", ".npz", lambda: _npz(points=np.zeros((2_000_001, 3))), "2000001 or more"),
    "an array's header of 64 MiB": ("point_cloud", ".npz", lambda: _npz_header(64), "claims 67108864 bytes"),
    "a polygon of a million corners": ("point_cloud", ".ply", lambda: _polygon(1_000_000), None),
    "a polygon of three million corners": ("point_cloud", ".ply", lambda: _polygon(3_000_000), "at most 2000000 are read"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
def test_files_made_to_hurt(pooled, name):
    modality, ending, content, refusal = HOSTILE[name]
    outcome = pooled[modality].read(content(), ending)
    if refusal is None:
        assert outcome.kind == "read", outcome
    else:
        assert outcome.kind == "refused" and refusal in outcome.said, outcome
    assert outcome.seconds < 10


class TestTheHarness:
    """What it would find, it finds."""

    def test_equal_seeds_give_equal_cases_that_are_all_different(self):
        whole = {"a.png": bytes(range(256)), "b.ply": b"ply 1 2 3"}
        first, again, other = (drawn(cases(whole), 60, seed) for seed in (1, 1, 2))
        assert first == again != other and len(set(first)) == 60
        assert len({case.content(whole) for case in first}) > 40

    def test_a_case_is_made_smaller_as_long_as_it_finds_the_same(self):
        flip, cut = Step("flip", 0.5, 0, 0), Step("cut", 0.5, 0, 1)
        case = Case("a", (flip, cut, flip), ".png").smaller(lambda other: len(other.content({"a": b"1234"})) == 2)
        assert case.steps == (cut,)

    @pytest.mark.parametrize(
        "said",
        [
            "reading failed.",
            "Cannot read it",
            "Cannot read it: it is damaged or of another format ('z'). Expected a cloud.",
            "Cannot read it: it is damaged or of another format (EOFError). Expected a cloud.",
            "Cannot read it: it is damaged or of another format (list index out of range). Expected a cloud.",
            "Cannot read it: it is damaged or of another format (identify <_io.Reader>). Expected a cloud.",
            "Cannot read it: it is damaged or of another format (a\x00b). Expected a cloud.",
        ],
    )
    def test_sentences_that_are_not_clear(self, said):
        assert unclear(said)

    def test_what_a_file_says_itself_is_none_of_the_reader_s_insides(self):
        said = "Cannot read it: it is damaged or of another format ({} 'element vertex 0x10e999'). Expected a cloud."
        for beginning in ("its header has the line", "could not convert string to float:"):
            assert not unclear(said.format(beginning))
        assert unclear(said.format("the line 0x10e999 of"))

    def test_a_sentence_that_is_clear(self):
        said = (
            "Cannot read image 'a.png': it is damaged or of another format (image file is truncated). Expected a PNG."
        )
        assert not unclear(said)
        assert pattern(said) == pattern(said.replace("a.png", "b.png"))

    def test_tensors_that_are_wrong_are_seen(self, ranges):
        found = ranges["image"]
        tensors = found.read(_png(size=(1, 1)), ".png").tensors
        assert not found.wrong(tensors)
        values = tensors["pixel_values"]
        for wrong in (values * np.nan, values.double(), values[..., :-1], values[:0], values + 1e5):
            assert found.wrong({"pixel_values": wrong})
        assert found.wrong({}) and found.wrong({"other": values})


@pytest.mark.slow
@pytest.mark.parametrize("modality", MODALITIES)
def test_forty_more_of_each(pooled, modality, tmp_path, capsys):
    whole = {
        name: data for name, data in seeds(modality, tmp_path).items() if name[-4:] not in (".obj", ".off", ".stl")
    }
    counts = run(pooled[modality], whole, drawn(cases(whole), 40, 0), None)
    assert set(counts) <= set(PLEASANT), capsys.readouterr().out


@pytest.mark.slow
def test_a_server_that_is_sent_them(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with Served() as served:
        for shots in (*(file_shots(modality, 10, 3) for modality in MODALITIES), body_shots(40, 3)):
            counts, wrong = send(served, shots, clients=4)
            assert not wrong and sum(counts.values()) == len(shots)
    assert served.ended[1] == 0 and "Traceback" not in served.log()
