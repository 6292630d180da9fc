"""Media sources, collating, and what a modality says of itself."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from kit import Beads

from xblip.errors import MediaError, PluginError
from xblip.modality import Features, Modality, collate, decoding, media_file
from xblip.testing import ToyModality


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

    def test_an_error_without_words_is_named_by_its_kind(self):
        with pytest.raises(MediaError, match=r"another format \(KeyError\)"), decoding("note", "text"):
            raise KeyError

    @pytest.mark.parametrize("error", [MediaError("too many words"), PluginError("no reader"), MemoryError()], ids=repr)
    def test_what_is_clear_already_passes(self, error):
        with pytest.raises(type(error)) as caught, decoding("note", "text"):
            raise error
        assert caught.value is error


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
