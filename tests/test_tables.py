"""Tables: what the cache must never do, and files that hold none."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from kit import ONE
from test_data import FIELDS, ROWS, opened, together, write, write_tar

from xblip.data import Manifest
from xblip.errors import ConfigError, InputError
from xblip.forms import Fields
from xblip.streaming import Stream
from xblip.tables import Table


class TestCache:
    def test_nothing_is_written_beside_the_files(self, tmp_path):
        for name in ("a.jsonl", "b.csv", "c.parquet"):
            write(tmp_path / name, ROWS)
        before = sorted(tmp_path.iterdir())
        tmp_path.chmod(0o555)
        for path in before:
            opened(path, fields=FIELDS).check()
        tmp_path.chmod(0o755)
        assert sorted(tmp_path.iterdir()) == before

    @pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
    def test_a_changed_file_is_read_anew_though_its_time_and_size_are_as_before(self, tmp_path, name):
        path = write(tmp_path / name, [{"id": "1", "caption": "red"}])
        fields = {"numbers": "{id}.num", "caption": "caption"}
        assert opened(path, fields=fields).row(0).answers == {"red": 1}
        times = path.stat().st_atime_ns, path.stat().st_mtime_ns
        write(path, [{"id": "1", "caption": "sad"}])
        os.utime(path, ns=times)
        assert opened(path, fields=fields).row(0).answers == {"sad": 1}

    def test_an_unchanged_file_is_read_once(self, tmp_path, monkeypatch):
        path = write(tmp_path / "a.jsonl", ROWS)
        opened(path, fields=FIELDS)
        monkeypatch.setattr("xblip.records.KINDS", {".jsonl": None})
        opened(path, fields=FIELDS).check()

    @pytest.mark.slow
    def test_another_process_finds_what_is_kept(self, tmp_path):
        path = write(tmp_path / "a.jsonl", ROWS)
        code = (
            "import sys; from xblip.forms import Fields; from xblip.tables import Table\n"
            "table = Table(sys.argv[1], Fields({}, modalities=[])); print(table.cache, len(table))\n"
        )
        environment = {**os.environ, "PYTHONHASHSEED": "7"}
        run = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, env=environment)
        assert run.returncode == 0, run.stderr
        folder = Path(run.stdout.split()[0])
        before = sorted(folder.rglob("*.arrow"))
        table = Table(path, Fields({}, modalities=[]))
        assert table.cache == folder and sorted(folder.rglob("*.arrow")) == before and len(before) == 1

    def test_rows_are_checked_once_until_something_changes(self, tmp_path, monkeypatch):
        path = write(tmp_path / "a.jsonl", ROWS)
        tasks = opened(path, fields=FIELDS).check()
        assert tasks == {("numbers", "question")}
        with monkeypatch.context() as patch:
            patch.setattr(Manifest, "_find", None)
            again = opened(path, fields=FIELDS)
            assert again.check() == tasks and again.lengths().tolist() == [15, 9]
        with pytest.raises(InputError, match="line 1: it has no answer"):
            opened(path, fields={**FIELDS, "answer": "no"}).check()
        with pytest.raises(InputError, match="line 1: it has no input"):
            opened(write(path, [{"question": "?", "answer": "a"}])).check()

    def test_processes_that_open_a_file_at_once_all_get_it(self, tmp_path):
        path = write(tmp_path / "a.jsonl", [{"toy": ONE, "caption": "a"}] * 3000)

        def read() -> None:
            manifest = opened(path)
            manifest.check()
            assert len(manifest.lengths()) == 3000 and manifest.row(2999).answers

        assert together(read, read) == [0, 0]

    def test_a_cache_that_cannot_be_written_is_named(self, tmp_path, monkeypatch):
        (tmp_path / "file").write_text("")
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "file" / "below")
        with pytest.raises(
            ConfigError, match=r"Cannot read the manifest \".*a.jsonl\" into the cache .*HF_DATASETS_CACHE"
        ):
            opened(write(tmp_path / "a.jsonl", ROWS), fields=FIELDS)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b"\n \n", 'The manifest ".*a.jsonl" has no rows'),
        ("a.json", b"[]", 'The manifest ".*a.json" has no rows'),
        ("a.json", b"{}{}", 'a.json" is not JSON .*If each of its lines is a record, end its name in ".jsonl"'),
        ("a.json", b"[" * 100_000, 'a.json" is not JSON that can be read'),
        ("a.json", b'["\xff"]', 'The manifest ".*a.json" is not UTF-8 text'),
        ("a.json", b"3", "must hold a list of records, or an object of them by their ids"),
        ("a.csv", b"toy,caption\n", 'The manifest ".*a.csv" has no rows'),
        ("a.csv", b"", 'The manifest ".*a.csv" has no rows'),
        ("a.csv", b"toy,caption\n1,a\n\n1,a cup, red\n", "a.csv, line 4: it has 3 columns where line 1 names 2"),
        ("a.csv", b'toy,caption\n1,"a\n', "a.csv, line 2: unexpected end of data"),
        ("a.csv", b"toy,toy\n1,a\n", "a.csv, line 1: two columns have the same name: toy, toy"),
        ("a.csv", b"toy,caption\n\xff,a\n", 'The manifest ".*a.csv" is not UTF-8 text'),
        ("a.parquet", b"PAR1", r'Cannot read the manifest ".*a.parquet" into the cache'),
        ("a.tar", b"x" * 2000, "is no tar that can be read in place: .* Is it cut, or compressed"),
        ("a.xlsx", b"PK", r'has the ending ".xlsx"\. Known: \.csv'),
        ("a.jsnl", b"{}", r'has the ending ".jsnl"\. Did you mean ".jsonl"'),
    ],
)
def test_a_file_that_is_no_manifest_is_named(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError, match=message):
        opened(tmp_path / name)


@pytest.mark.parametrize("text", ['{"toy": ' + "[" * 100_000, '{"toy": ' + "1" * 5000 + "}"])
def test_json_that_is_too_much_is_named_with_its_line(tmp_path, text):
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(InputError, match="a.jsonl, line 1: not JSON that can be read"):
        opened(tmp_path / "a.jsonl").check()


def test_an_empty_parquet_is_named(tmp_path):
    pq.write_table(pa.table({"toy": pa.array([], pa.string())}), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match='The manifest ".*a.parquet" has no rows'):
        opened(tmp_path / "a.parquet")


def test_files_that_are_not_there_or_of_several_kinds_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r'No manifest at ".*/\*.tar". Expected a file \(.jsonl'):
        opened(tmp_path / "*.tar")
    write(tmp_path / "a.csv", ROWS), write(tmp_path / "a.json", ROWS)
    with pytest.raises(ConfigError, match="names files of several kinds, .csv, .json: name those of one"):
        opened(tmp_path / "a.*")


def _overwritten(at: int, data: bytes):
    return lambda whole: whole[:at] + data + whole[at + len(data) :]


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (_overwritten(20 * 1024 + 3, b"\xff"), r"damaged at byte 20480, in or after its sample 10"),
        (_overwritten(20 * 1024, b"x" * 512), r"damaged at byte 20480, in or after its sample 10"),
        (_overwritten(20 * 1024, bytes(4096)), r"damaged at byte 20480, in or after its sample 10"),
        (_overwritten(21 * 1024, bytes(512)), r"damaged at byte 21504, in or after its sample 11"),
        (lambda whole: whole[: 20 * 1024 + 100], r"cut at byte 20580, in or after its sample 10"),
        (lambda whole: whole[: 20 * 1024], r"cut at byte 20480, in or after its sample 10"),
        (lambda whole: whole[: 21 * 1024 - 1], r"cut at byte 21503, in or after its sample 11"),
        (lambda whole: whole[: 40 * 1024 + 512], r"cut at byte 41472, in or after its sample 20"),
        (lambda whole: whole + whole, r"damaged at byte 40960, in or after its sample 20"),
    ],
)
@pytest.mark.parametrize("kind", [opened, lambda path: list(Stream(path, modalities={})._in_order([path], 0, 0, 0, 1))])
def test_a_damaged_or_cut_tar_is_named(tmp_path, damage, fault, kind):
    path = write_tar(tmp_path / "a.tar", {f"{n:02}.{end}": b"1 2 3 4" for n in range(20) for end in ("num", "txt")})
    assert len(opened(path)) == 20
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=f"a.tar is {fault}.*make it anew"):
        kind(path)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_a_link_in_a_tar_is_named(tmp_path, kind):
    path = write_tar(tmp_path / "a.tar", {"0.num": b"1 2 3 4", "0.txt": b"a"})
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("1.num")
        link.type, link.linkname = kind, "0.num"
        tar.addfile(link)
    with pytest.raises(InputError, match=r'a.tar: the member "1.num" is a link.*--dereference --hard-dereference'):
        opened(path)


def test_a_tar_of_texts_alone_lacks_an_input(tmp_path):
    with pytest.raises(InputError, match="sample 0: it has no input"):
        opened(write_tar(tmp_path / "a.tar", {"0.txt": b"a"})).check()
