"""Manifests: the kinds of files they are, and which rows these hold."""

import csv
import io
import json
import multiprocessing
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from kit import ONE, TWO

from xblip import decoding, media_file
from xblip.data import Manifest
from xblip.errors import ConfigError, InputError, MediaError
from xblip.media import FilePart
from xblip.sample import Media, Sample
from xblip.testing import ToyModality
from xblip.train_data import digest


class Numbers(ToyModality):
    """Four numbers in a file."""

    name = "numbers"
    suffixes = (".num", ".four")

    def load(self, source):
        file = media_file(source, kind="numbers")
        with decoding(file.label, "four numbers"), file.open() as opened:
            return super().load([float(word) for word in opened.read().split()])


class Others(Numbers):
    """The same under another name, with one ending in common."""

    name = "others"
    suffixes = (".four", ".five")


MODALITIES = {"toy": ToyModality(), "numbers": Numbers()}
ROWS = [{"id": "1", "question": "what, then ?", "answer": "red"}, {"id": "22", "question": 'so "?"', "answer": "a\nb"}]
FIELDS = {"numbers": "files/{id}.num", "question": "question", "answer": "answer"}


def opened(path, **options) -> Manifest:
    return Manifest(path, modalities=MODALITIES, **options)


def write(path: Path, rows: list[dict]) -> Path:
    """Rows of text as a file of the kind that its ending says."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            table.writeheader()
            table.writerows(rows)
    return path


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def together(*calls: Callable[[], None]) -> list[int]:
    """Runs each in a process of its own, at the same time; returns their exit codes."""
    processes = [multiprocessing.get_context("fork").Process(target=call) for call in calls]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


class TestKinds:
    @pytest.mark.parametrize(
        ("name", "places"),
        [
            ("a.jsonl", ["line 1", "line 2"]),
            ("a.json", ["entry 1", "entry 2"]),
            ("a.csv", ["line 2", "line 3"]),
            ("a.tsv", ["line 2", "line 3"]),
            ("a.parquet", ["row 1", "row 2"]),
        ],
    )
    def test_every_kind_gives_the_same_rows(self, tmp_path, name, places):
        manifest = opened(write(tmp_path / name, ROWS), fields=FIELDS)
        manifest.check()
        rows = [manifest.row(index) for index in range(len(manifest))]
        assert rows == list(manifest.rows())
        assert [row.origin for row in rows] == [f"{tmp_path / name}, {place}" for place in places]
        for row, given in zip(rows, ROWS, strict=True):
            assert row.sample == Sample(
                given["question"], [("numbers", str(tmp_path / "files" / f"{given['id']}.num"))]
            )
            assert row.answers == {given["answer"]: 1.0}
        assert manifest.lengths().tolist() == [15, 9]
        assert opened(tmp_path / name, fields=FIELDS).lengths().tolist() == [15, 9]

    def test_an_object_of_records_by_their_ids(self, tmp_path):
        (tmp_path / "a.json").write_text(json.dumps({"x": ["a cup", "a mug"], "y": ["a dog"]}))
        (tmp_path / "b.json").write_text(json.dumps({"x": {"q": "what ?", "a": "red"}}))
        fields = {"numbers": "{sample_id}/{sample_id}.num", "captions": "data"}
        rows = list(opened(tmp_path / "a.json", fields=fields, root="/r").rows())
        assert [row.sample.media for row in rows] == [
            [Media("numbers", "/r/x/x.num")],
            [Media("numbers", "/r/y/y.num")],
        ]
        assert [list(row.answers) for row in rows] == [["a cup", "a mug"], ["a dog"]]
        fields = {"numbers": "{sample_id}.num", "question": "q", "answer": "a"}
        assert opened(tmp_path / "b.json", fields=fields).row(0).answers == {"red": 1}

    def test_several_files_are_one_manifest_in_order_of_name(self, tmp_path):
        for name in ("b", "a"):
            write(tmp_path / f"{name}.jsonl", [{"toy": ONE, "caption": name}])
        rows = list(opened(tmp_path / "?.jsonl").rows())
        assert [(row.origin, list(row.answers)) for row in rows] == [
            (f"{tmp_path}/a.jsonl, line 1", ["a"]),
            (f"{tmp_path}/b.jsonl, line 1", ["b"]),
        ]

    def test_types_of_parquet_stay_and_its_gaps_are_absent(self, tmp_path):
        rows = [
            {"toy": ONE, "instruction": "what ?", "answers": ["a", "b"], "weights": [1.0, 3.0], "caption": None},
            {"toy": TWO, "instruction": None, "answers": None, "weights": None, "caption": "so"},
        ]
        first, second = opened(write(tmp_path / "a.parquet", rows)).rows()
        assert (first.sample, first.answers) == (Sample("what ?", [("toy", ONE)]), {"a": 0.25, "b": 0.75})
        assert (second.sample, second.answers, second.task) == (Sample(None, [("toy", TWO)]), {"so": 1}, "caption")

    def test_files_inside_parquet_are_read_from_it(self, tmp_path):
        rows = [{"numbers": {"bytes": b"1 2 3 4", "path": None}, "caption": "x"}]
        manifest = opened(write(tmp_path / "a.parquet", rows))
        assert manifest[0].media[0].source["values"].tolist() == [ONE]

    def test_messages_of_parquet_lack_what_other_parts_have(self, tmp_path):
        content = [{"type": "toy", "toy": ONE}, {"type": "text", "text": "what ?"}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": [content[1]]}]
        manifest = opened(write(tmp_path / "a.parquet", [{"messages": messages}]))
        assert manifest.sample(0) == Sample("what ?", [("toy", ONE)], "what ?")

    @pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
    def test_a_record_of_several_answers_makes_several_rows(self, tmp_path, name):
        turns = [{"from": who, "value": what} for who, what in (("human", "?"), ("gpt", "a")) for _ in range(1)]
        rows = [
            {"toy": "x", "said": turns, "n": 1},
            {"toy": "x", "said": [*turns, *turns, *turns], "n": 2},
            {"toy": "x", "said": turns, "n": 3},
        ]
        manifest = opened(write(tmp_path / name, rows), fields={"toy": "{n}.num", "conversations": "said"})
        assert len(manifest) == 5 and [len(row.sample.history) for row in manifest.rows()] == [0, 0, 1, 2, 0]
        assert list(manifest.rows()) == [manifest.row(index) for index in range(5)]
        assert [row.sample.all_media[0].source for row in manifest.rows()] == [
            f"{tmp_path}/{n}.num" for n in (1, 2, 2, 2, 3)
        ]
        manifest.check()
        assert len(manifest.lengths()) == 5

    def test_a_manifest_goes_to_workers_without_its_rows(self, tmp_path):
        manifest = opened(write(tmp_path / "a.jsonl", [{"toy": ONE, "caption": "a"}] * 2000))
        pickled = pickle.dumps(manifest)
        assert len(pickled) < 10_000 and pickle.loads(pickled).row(1999) == manifest.row(1999)


class TestTars:
    @pytest.fixture
    def tars(self, tmp_path):
        write_tar(
            tmp_path / "s-000.tar",
            {
                "./000.num": b"1 2 3 4",
                "./000.txt": b"a cup\n",
                ".hidden": b"x",
                "d.1/001.txt": "ein Hut äöü".encode(),
                "d.1/001.num": b"4 3 -2 1",
                "d.1/001.seg.png": b"...",
            },
        )
        write_tar(tmp_path / "s-001.tar", {"002.json": b'{"question": "what ?", "answer": "red"}', "002.num": b"1 2"})
        write_tar(tmp_path / "s-002.tar", {"003.num": b"1 2 3 4", "003.cls": b"5"})
        return tmp_path / "s-*.tar"

    def test_neighbours_of_one_name_are_a_row_and_media_stay_inside(self, tars, monkeypatch):
        manifest = opened(tars)
        first, second, third, fourth = manifest.rows()
        assert (first.sample.instruction, first.answers, first.task) == (None, {"a cup": 1}, "caption")
        assert first.origin == f"{tars.parent}/s-000.tar, sample 000"
        assert (second.answers, len(second.sample.media)) == ({"ein Hut äöü": 1}, 1)
        assert second.origin.endswith("sample d.1/001")
        assert (third.sample.instruction, third.answers) == ("what ?", {"red": 1})
        assert (fourth.answers, fourth.task) == ({"5": 1}, "classification")
        source = second.sample.media[0].source
        assert isinstance(source, FilePart) and len(pickle.dumps(source)) < 300
        assert manifest[1].media[0].source["values"].tolist() == [TWO]
        manifest.check()

    def test_a_broken_member_is_named(self, tars):
        with pytest.raises(MediaError, match=r"s-001.tar, sample 002: A toy input must be rows of four"):
            opened(tars)[2]

    def test_fields_choose(self, tars):
        manifest = opened(tars.parent / "s-000.tar", fields={"question": "txt", "answer": "__no"})
        assert manifest.row(0).sample.instruction == "a cup" and len(manifest.row(0).sample.media) == 1
        manifest = opened(tars.parent / "s-000.tar", fields={"numbers": "seg.png", "caption": "txt"})
        assert manifest.row(1).sample.media[0].source.name == "d.1/001.seg.png"
        with pytest.raises(InputError, match='sample 000: it has no answer.*"__no", which is not there'):
            opened(tars.parent / "s-000.tar", fields={"question": "txt", "answer": "__no"}).check()

    @pytest.mark.parametrize(
        ("members", "message"),
        [
            ({"0.num": b"1", "0.four": b"1"}, 'sample 0: It may have ".four" or another member as numbers'),
            ({"0.num": b"1", "0.txt": b"a", "0.json": b'{"url": "b"}'}, 'sample 0: Unknown key "url" in a sample'),
            ({"0.num": b"1", "0.json": b"{"}, "sample 0, its .json: not JSON"),
            ({"0.num": b"1", "0.json": b"[]"}, "sample 0, its .json: expected an object"),
            ({"0.num": b"1", "0.num2": b"1", "0.txt": b""}, "sample 0: A sample's `caption` is empty"),
        ],
    )
    def test_a_bad_sample_is_named(self, tmp_path, members, message):
        with pytest.raises(InputError, match=message):
            opened(write_tar(tmp_path / "a.tar", members)).row(0)

    def test_an_ending_of_two_modalities_is_for_fields_to_say(self, tmp_path):
        path = write_tar(tmp_path / "a.tar", {"0.four": b"1 2 3 4", "0.txt": b"a"})
        both = {"numbers": Numbers(), "others": Others()}
        with pytest.raises(
            InputError, match='may have ".four" or another member as numbers or others: say in `fields`'
        ):
            Manifest(path, modalities=both).row(0)
        row = Manifest(path, modalities=both, fields={"others": "four", "caption": "txt"}).row(0)
        assert [media.modality for media in row.sample.media] == ["others"]

    def test_a_changed_tar_is_told_where_it_is_read(self, tars):
        manifest = opened(tars)
        os.truncate(tars.parent / "s-000.tar", 1000)
        with pytest.raises(MediaError, match="in .*s-000.tar: the file ends before it does. Has it changed, or been"):
            manifest[1]
        (tars.parent / "s-000.tar").unlink()
        with pytest.raises(MediaError, match=r"Cannot read '.*001.num' in .*s-000.tar: .*No such file"):
            manifest[1]

    def test_an_empty_member_is_named(self, tmp_path):
        path = write_tar(tmp_path / "a.tar", {"0.num": b"", "0.txt": b"a"})
        with pytest.raises(MediaError, match=r"sample 0: Cannot read numbers '0.num' in .*a.tar: it is empty"):
            opened(path)[0]


@pytest.mark.parametrize("name", ["a.csv", "a.parquet"])
def test_a_column_that_a_table_has_not_is_named_at_once(tmp_path, name):
    with pytest.raises(ConfigError, match='a.* fields.question takes the column "queston".*Did you mean "question"'):
        opened(write(tmp_path / name, ROWS), fields={**FIELDS, "question": "queston"})
    assert len(opened(tmp_path / name, fields=FIELDS)) == 2


def test_a_column_that_a_row_has_not_is_named_with_its_line(tmp_path):
    path = write(tmp_path / "a.jsonl", [*ROWS, {"id": "3", "queston": "?", "answer": "b"}])
    manifest = opened(path, fields=FIELDS)
    with pytest.raises(InputError, match='line 3: A sample lacks its.*fields.question takes.*Did you mean "queston"'):
        manifest.check()


def test_mixed_types_in_one_file_are_fine_until_a_row_is_wrong(tmp_path):
    rows = [{"toy": ONE, "caption": "a"}, {"numbers": "a.num", "captions": ["a"]}, {"toy": [[1.0] * 4], "label": "b"}]
    manifest = opened(write(tmp_path / "a.jsonl", [*rows, {"toy": ONE, "caption": 7}]))
    assert [manifest.row(index).task for index in range(3)] == ["caption", "caption", "classification"]
    with pytest.raises(InputError, match=r"a.jsonl, line 4: An answer must be text, not 7: make it a string"):
        manifest.check()


def test_a_wrong_column_is_named(tmp_path):
    with pytest.raises(InputError, match='a.csv, line 2: Unknown key "captoin" in a sample. Did you mean "caption"'):
        opened(write(tmp_path / "a.csv", [{"numbers": "a", "captoin": "b"}])).check()


def test_media_of_history_are_read_too(tmp_path):
    (tmp_path / "a.num").write_text("1 2 3 4")
    turns = [{"from": "human", "value": "<numbers> ?"}, {"from": "gpt", "value": "a"}] * 1
    turns += [{"from": "human", "value": "and ?"}, {"from": "gpt", "value": "b"}]
    manifest = opened(write(tmp_path / "a.jsonl", [{"numbers": "a.num", "conversations": turns}]))
    assert torch.equal(manifest[1].all_media[0].source["values"], torch.tensor([ONE]))


def test_paths_of_a_manifest_may_start_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "below").mkdir()
    write(tmp_path / "a.jsonl", [{"numbers": "a.num", "caption": "a"}])
    assert opened("~/*.jsonl").row(0).sample.media == [Media("numbers", f"{tmp_path}/a.num")]
    assert opened("~/a.jsonl", root="~/below").row(0).sample.media == [Media("numbers", f"{tmp_path}/below/a.num")]
    assert digest("~/a.jsonl") == digest(tmp_path / "a.jsonl")


def test_a_missing_file_is_named_by_its_whole_path(tmp_path, monkeypatch):
    write(tmp_path / "a.jsonl", [{"numbers": "a.num", "caption": "a"}])
    monkeypatch.chdir(tmp_path.parent)
    with pytest.raises(MediaError, match=rf"'{tmp_path}/a.num': no such file. Check the path\.$"):
        opened(f"{tmp_path.name}/a.jsonl")[0]


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("a.jsonl", InputError, 'a.jsonl, line 1: not JSON that can be read .an object has the key "caption" twice'),
        ("a.json", ConfigError, 'a.json" is not JSON that can be read .an object has the key "caption" twice'),
    ],
)
def test_a_key_that_stands_twice_is_named(tmp_path, name, error, message):
    row = '{"toy": [1, 2, 3, 4], "caption": "a", "caption": "b"}'
    (tmp_path / name).write_text(f"[{row}]" if name == "a.json" else row)
    with pytest.raises(error, match=message):
        opened(tmp_path / name).check()
