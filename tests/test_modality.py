"""Media sources, collating, and what a modality says of itself."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from kit import Beads

from xblip.errors import MediaError, PluginError
from xblip.media import decoding, media_file
from xblip.modality import Features, Modality, collate
from xblip.testing import ToyModality


class Reads:
    """An open file that gives, or raises, what it was made with."""

    def __init__(self, content):
        self.content = content

    def read(self):
        if isinstance(self.content, Exception):
            raise self.content
        return self.content


class TestMediaFile:
    def test_a_path_is_opened_where_it_lies(self, tmp_path):
        path = tmp_path / "Note.TXT"
        path.write_bytes(b"words")
        for source in (path, str(path)):
            file = media_file(source, kind="note")
            assert (file.path, file.data, file.suffix) == (path, None, ".txt")
            assert file.label == f"note {str(path)!r}"
            with file.open() as opened, file.on_disk(".other") as place:
                assert opened.read() == b"words" and place == path

    @pytest.mark.parametrize(
        "source",
        [b"words", bytearray(b"words"), memoryview(b"words"), io.BytesIO(b"words")],
        ids=lambda s: type(s).__name__,
    )
    def test_bytes_are_a_file_without_a_place(self, source):
        file = media_file(source, kind="note")
        assert (file.path, file.data, file.suffix) == (None, b"words", "")
        with file.open() as opened, file.on_disk(".txt") as place:
            assert opened.read() == place.read_bytes() == b"words" and place.suffix == ".txt"
        assert not place.exists()

    def test_an_open_binary_file_is_read(self, tmp_path):
        (tmp_path / "a.txt").write_bytes(b"words")
        with (tmp_path / "a.txt").open("rb") as opened:
            assert media_file(opened, kind="note").data == b"words"

    def test_what_an_open_file_gives_may_be_any_kind_of_bytes(self):
        assert media_file(Reads(bytearray(b"words")), kind="note").data == b"words"

    def test_a_pipe_is_refused_and_not_waited_for(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(MediaError, match="pipe': it is a pipe, socket or device. Give the path of a regular file"):
            media_file(tmp_path / "pipe", kind="note")

    def test_a_file_that_cannot_be_read_from_is_one_clear_error(self, tmp_path):
        closed = (tmp_path / "b").open("wb+")
        closed.close()
        with (tmp_path / "a").open("wb") as written:
            for source, message in [
                (written, r"given as an open file: .*\. Open it for reading in binary mode \('rb'\)"),
                (closed, "closed file. Open it"),
                (Reads(KeyError("lost")), "'lost'. Open it"),
                (Reads(None), r"its read\(\) gives NoneType. Expected bytes"),
            ]:
                with pytest.raises(MediaError, match=message):
                    media_file(source, kind="note")

    @pytest.mark.parametrize("source", [np.zeros(3), torch.zeros(3), [1, 2], 7, None])
    def test_objects_are_no_files(self, source):
        assert media_file(source, kind="note") is None

    def test_home_is_expanded(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        (tmp_path / "a.txt").write_bytes(b"words")
        assert media_file("~/a.txt", kind="note").path == tmp_path / "a.txt"

    @pytest.mark.parametrize(
        ("source", "message"),
        [
            ("none.txt", r"Cannot read note 'none.txt': no such file. Check the path; relative ones start at"),
            (".", "Cannot read note '.': it is a folder. Give the path of one file"),
            ("empty.txt", "Cannot read note 'empty.txt': the file is empty"),
            ("", "Cannot read note ''"),
            ("https://example.org/a.txt", "URLs are not fetched. Download it"),
            ("a\0b", "Cannot read note 'a.x00b'"),
            ("x" * 5000, "Cannot read note"),
            ("~no-such-user-here/a.txt", "Cannot read note '~no-such-user-here"),
            (b"", "Cannot read the note given as bytes: it is empty"),
            (io.BytesIO(), "Cannot read the note given as an open file: it is empty"),
            (io.StringIO("words"), "it is open as text. Open it in binary mode"),
        ],
        ids=lambda value: repr(value)[:20],
    )
    def test_a_bad_file_is_one_clear_error(self, tmp_path, monkeypatch, source, message):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "empty.txt").touch()
        with pytest.raises(MediaError, match=message):
            media_file(source, kind="note")


class TestDecoding:
    def test_a_library_s_error_becomes_a_clear_one(self):
        with (
            pytest.raises(
                MediaError, match=r"Cannot read note 'x': it is damaged or of another format \(line one\). Expected"
            ),
            decoding("note 'x'", "text"),
        ):
            raise RuntimeError("line one\nline two")

    @pytest.mark.parametrize(
        ("cause", "reason"),
        [
            (OSError(5, "Input/output error", "/somewhere/file"), "Input/output error"),
            (OSError(22, "Invalid argument"), "it says something that cannot be"),
            (OSError(50531338, "Error number -50531338 occurred"), "its decoder gives no reason"),
            (
                UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
                "it has bytes that are no text where text",
            ),
            (ValueError("a\x00b\x1b[31m"), r"a\?b\?\[31m"),
            (ValueError("9" * 5000), "9{200}[.]{3}"),
            (ValueError("invalid literal for int() with base 10: b'one'"), "it has no whole number but 'one'"),
            (IndexError("list index out of range"), "a part of it is missing or makes no sense"),
            (EOFError(), "it ends before it should"),
            (ValueError(b"Token too long: 99"), "Token too long: 99"),
            (ValueError("  "), "ValueError"),
        ],
        ids=repr,
    )
    def test_what_a_library_says_becomes_one_short_line_about_the_file(self, cause, reason):
        with pytest.raises(MediaError, match=rf"another format \({reason}") as caught, decoding("note", "text"):
            raise cause
        assert "somewhere" not in str(caught.value) and "Errno" not in str(caught.value)

    @pytest.mark.parametrize("error", [MediaError("too many words"), PluginError("no reader")], ids=repr)
    def test_what_is_clear_already_passes(self, error):
        with pytest.raises(type(error)) as caught, decoding("note", "text"):
            raise error
        assert caught.value is error

    def test_memory_that_runs_out_is_the_file_s_fault(self):
        with (
            pytest.raises(MediaError, match="note 'x': it asks for more memory than there is.* Expected text"),
            decoding("note 'x'", "text"),
        ):
            raise MemoryError


class TestArrays:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn])
    def test_floats_are_those_that_numpy_knows(self, dtype):
        values = Modality.as_array(torch.ones(2, dtype=dtype).requires_grad_(dtype == torch.float32), "it")
        assert values.dtype == np.float32 and values.tolist() == [1, 1]

    @pytest.mark.parametrize("values", [np.arange(3.0), np.arange(3), torch.arange(3), torch.arange(3).double()])
    def test_other_numbers_stay_as_they_are(self, values):
        assert Modality.as_array(values, "it").tolist() == values.tolist()
        assert Modality.as_array(values, "it").dtype == np.asarray(values).dtype

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            (np.ma.array([1.0, 2.0], mask=[0, 1]), "it is a masked array. Fill in"),
            (torch.zeros(3, device="meta"), r"numpy cannot take it \(strided, torch.float32, on meta\)"),
            (torch.eye(3).to_sparse(), "sparse_coo, torch.float32, on cpu.*Expected a dense tensor"),
            (torch.zeros(3, dtype=torch.complex32), "torch.complex32"),
            (torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.quint8), "torch.quint8"),
        ],
        ids=["masked", "meta", "sparse", "complex32", "quantised"],
    )
    def test_what_has_no_plain_numbers_is_refused(self, values, message):
        with pytest.raises(MediaError, match=f"Cannot read it: .*{message}"):
            Modality.as_array(values, "it")


class TestCollate:
    def test_segments_are_concatenated(self):
        tensors, segments = collate([Beads().load([[1.0], [2.0, 3.0]]), Beads().load([[4.0]])])
        assert segments == [2, 1]
        assert tensors["values"].shape == (3, 5) and tensors["counts"].tolist() == [1, 2, 1]

    @pytest.mark.parametrize(
        ("items", "message"),
        [
            ([{"a": torch.zeros(2, 3), "b": torch.zeros(1)}], "disagree about the number of segments"),
            ([{"a": torch.zeros(0, 3)}], "disagree about the number of segments"),
            ([{"a": torch.zeros(1, 3)}, {"a": torch.zeros(1, 4)}], "items of different shapes"),
            ([{"a": torch.zeros(1, 3)}, {"b": torch.zeros(1, 3)}], "items of different shapes"),
            ([{"a": torch.tensor(1.0)}], "disagree about the number of segments"),
            ([{}], "disagree about the number of segments"),
        ],
    )
    def test_what_does_not_fit_together_is_refused(self, items, message):
        with pytest.raises(MediaError, match=message):
            collate(items)


def test_features_are_split_and_joined():
    features = Features(torch.randn(3, 4, 2), torch.rand(3, 4) > 0.5, [1, 2])
    first, second = features.split()
    assert (first.segments, second.segments) == ([1], [2]) and second.values.shape == (2, 4, 2)
    joined = Features.join([first, second])
    assert torch.equal(joined.values, features.values) and torch.equal(joined.mask, features.mask)
    assert joined.segments == [1, 2]


def test_the_cue_is_the_name_unless_set():
    class Named(ToyModality):
        """Takes its own name, not its parent's cue."""

        name = "depth_map"

    assert (ToyModality.cue, Named.cue, Beads.cue) == ("toy: ", "depth_map: ", "red beads : ")


def test_settings_are_defaults_unless_given():
    assert ToyModality().config == ToyModality.Config()
    assert ToyModality(ToyModality.Config(width=3)).config.width == 3


def test_a_modality_without_an_example_says_what_to_write(tmp_path):
    class Bare(Modality):
        """Has no example."""

        name = "bare"
        load = build_encoder = None

    with pytest.raises(PluginError, match=r'"bare" offers no example .* implement the class method example'):
        Bare.example(Path(tmp_path))


class TestDeclaredBytes:
    MP4 = b"\0\0\0\x0cftypisom" + b"\0\0\0\1mdat" + (1000).to_bytes(8)
    SEGMENT = b"\x1a\x45\xdf\xa3\x80\x18\x53\x80\x67"

    @pytest.mark.parametrize(
        ("data", "expected"),
        [
            (MP4, 1012),
            (MP4[:12] + b"\0\0\0\0mdat", 12),
            (MP4[:12] + b"\xff\xff\xff\xffmdat", 12 + 2**32 - 1),
            (b"RIFF\x10\0\0\0AVI LIST", 24),
            (b"RIFF\x10\0\0\0WAVEfmt ", 24),
            (b"RIFF\x10\0\0\0WEBPVP8 ", None),
            (SEGMENT + b"\x90", 26),
            (SEGMENT + b"\x40\x90", 155),
            (SEGMENT + b"\xff", 0),
            (SEGMENT + b"\x01" + b"\xff" * 7, 0),
            (b"\x1a\x45\xdf\xa3\x80rest", 0),
            (b"neither of them", None),
            (b"x", None),
        ],
    )
    def test_containers(self, data, expected, tmp_path):
        path = tmp_path / "file.mp4"
        path.write_bytes(data)
        for source in (data, path):
            file = media_file(source, kind="film")
            assert (file.declared_bytes(), file.size) == (expected, len(data))

    def test_a_damaged_header(self):
        with pytest.raises(ValueError, match="its header is damaged"):
            media_file(self.SEGMENT + b"\0", kind="film").declared_bytes()
