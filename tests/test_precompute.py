"""`xblip precompute`: what is encoded, what is skipped, resuming, and the errors of a run."""

import io
import json
import os
import shutil
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch
import yaml
from kit import written_by_another
from rich.console import Console
from stores import CountingEncoder, Numbers, manifests_of, run, some_files

from xblip import cli, encoding
from xblip.branch import BranchConfig
from xblip.encoding import Job
from xblip.errors import BundleError, ConfigError, InputError, MediaError, PluginError
from xblip.precompute import verify
from xblip.store import FeatureStore
from xblip.testing import ToyEncoder


@pytest.fixture
def data(tmp_path):
    with some_files(tmp_path):
        yield tmp_path


def test_each_source_is_encoded_once_and_stored(data):
    text = io.StringIO()
    done = run(data, console=Console(file=text))
    assert (done.num_sources, done.num_held, done.num_written, done.skipped) == (12, 0, 12, [])
    assert Numbers.encoded == sum(1 + number % 3 for number in range(12))
    assert "12 sources, 0 of them stored already" in text.getvalue() and "as float32" in text.getvalue()
    stored = FeatureStore.open(data / "store")
    encoder = ToyEncoder(16, 0)
    for number in range(12):
        path = data / f"{number}.txt"
        values = torch.tensor([float(word) for word in path.read_text().split()]).view(-1, 4)
        assert torch.equal(stored.features(path).values, encoder(values))
    again = run(data)
    assert (again.num_held, again.num_written, len(FeatureStore.open(data / "store"))) == (12, 0, 12)


@pytest.mark.parametrize(
    "options", [{"dataloader_num_workers": 2}, {"batch_segments": 5}, {"shard_bytes": 300}, {"flush_seconds": 0}]
)
def test_the_same_store_however_it_is_made(data, options):
    run(data, "one")
    run(data, "two", **options)
    one, two = FeatureStore.open(data / "one"), FeatureStore.open(data / "two")
    if "batch_segments" in options:  # which changes the last bits of real encoders; see xblip.encoding
        assert all(torch.allclose(*(s.features(data / f"{n}.txt").values for s in (one, two))) for n in range(12))
    else:
        assert one.content_digest() == two.content_digest()


def test_batches_are_filled_by_segments(data):
    sizes = []
    forward = CountingEncoder.forward

    def counted(self, values):
        sizes.append(len(values))
        return forward(self, values)

    CountingEncoder.forward = counted
    try:
        run(data, batch_segments=6)
    finally:
        CountingEncoder.forward = forward
    assert max(sizes) <= 6 and sum(sizes) == 24 and len(sizes) < 10


def test_items_of_other_shapes_come_in_other_batches():
    Item = namedtuple("Item", "tensors")
    items = [Item({"x": torch.zeros(2, width)}) for width in (3, 3, 4, 4, 4)] + [
        Item(None),
        Item({"x": torch.zeros(9, 4)}),
    ]
    batches = list(encoding._batches(items, 4))
    assert [[None if i.tensors is None else tuple(i.tensors["x"].shape) for i in batch] for batch in batches] == [
        [(2, 3), (2, 3)], [(2, 4), (2, 4)], [None], [(2, 4)], [(9, 4)],
    ]  # fmt: skip


def test_a_run_adds_what_is_missing_and_what_changed(data, monkeypatch):
    now = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: now() + 30 * 10**9)  # so that the files count as settled
    run(data)
    Numbers.encoded = 0
    (data / "0.txt").write_text("9 9 9 9")
    with pytest.raises(BundleError, match=r'0.txt" changed since its features were stored'):
        FeatureStore.open(data / "store").features(data / "0.txt")
    done = run(data)
    assert (done.num_held, done.num_written, Numbers.encoded) == (11, 1, 1)
    assert FeatureStore.open(data / "store").features(data / "0.txt").values.shape[0] == 1


def test_sources_that_are_no_files(tmp_path, toys):
    rows = [{"beads": [[1.0], [2.0, 3.0]]}, {"beads": [[1.0], [2.0, 3.0]]}, {"beads": [[4.0, 5.0, 6.0]]}]
    rows = [{**row, "instruction": "what ?", "answer": "one"} for row in rows]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run(tmp_path, branch=BranchConfig("beads"))
    assert done.num_sources == done.num_written == 2
    features = FeatureStore.open(tmp_path / "store").features([[1.0], [2.0, 3.0]])
    assert features.mask.sum(1).tolist() == [1, 2] and features.values.shape == (2, 5, 24)
    assert run(tmp_path, branch=BranchConfig("beads")).num_held == 2


def test_a_broken_file_is_skipped_and_named(data):
    (data / "3.txt").write_text("1 2 three")
    (data / "4.txt").unlink()
    with pytest.raises(
        MediaError, match=r"[12] of 12 sources cannot be encoded, more than 1.00%; .*skipped.jsonl names them"
    ):
        run(data)
    done = run(data, max_skipped=0.2)
    assert [Path(skip.source).name for skip in sorted(done.skipped)] == ["3.txt", "4.txt"]
    rows = [json.loads(line) for line in (data / "store" / "skipped.jsonl").read_text().splitlines()]
    assert sorted(Path(row["source"]).name for row in rows) == ["3.txt", "4.txt"]
    stored = FeatureStore.open(data / "store")
    assert len(stored) == 10
    stored.check(data / f"{number}.txt" for number in range(12))
    with pytest.raises(MediaError, match=r"is damaged or of another format .*as xblip precompute found"):
        stored.features(data / "3.txt")
    (data / "3.txt").write_text("1 2 3 4")
    (data / "4.txt").write_text("4 3 2 1")
    assert run(data).num_written == 2 and (data / "store" / "skipped.jsonl").read_text() == ""


@pytest.mark.parametrize("workers", [0, 1])
def test_what_stands_wrong_in_a_row_itself_is_refused_as_training_does(data, workers):
    row = {"numbers": ["3.txt", "4.txt"], "instruction": "what ?", "answer": "one"}
    with (data / "train.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    with pytest.raises(
        InputError, match=r"Cannot read \[.*3\.txt.* It stands in a row itself, not in a file: correct the row"
    ):
        run(data, max_skipped=1, dataloader_num_workers=workers)


def test_a_list_of_the_skipped_that_was_cut_or_is_something_else(data):
    (data / "3.txt").write_text("1 2 three")
    run(data, max_skipped=0.2)
    path = data / "store" / "skipped.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + whole[: len(whole) // 2])
    assert len(FeatureStore.open(data / "store").skipped) == 1
    run(data, max_skipped=0.2)
    assert path.read_bytes() == whole
    for rubbish in (b"rubbish\n", b"[1]\n", b'{"origin": "a.jsonl:1", "reason": "x"}\n', b"\xff\n", b'5\n{"source"'):
        path.write_bytes(rubbish)
        for read in (lambda: FeatureStore.open(data / "store"), lambda: run(data, max_skipped=0.2)):
            with pytest.raises(BundleError, match=r"skipped.jsonl, line 1, is not what .* Delete the file"):
                read()


def test_what_other_runs_skipped_stays_named(data):
    (data / "3.txt").write_text("1 2 three")
    run(data, max_skipped=0.2)
    manifest = (data / "train.jsonl").read_text().splitlines()
    (data / "train.jsonl").write_text("\n".join(line for line in manifest if "3.txt" not in line))
    run(data)
    assert "3.txt" in (data / "store" / "skipped.jsonl").read_text()


def test_features_that_are_not_finite_are_skipped(data):
    (data / "3.txt").write_text("1e38 1e39 1 1")
    with pytest.raises(MediaError, match="finite"):
        run(data)


def test_a_disk_that_is_too_small_is_refused_before_the_run(data, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6, 6000))
    with pytest.raises(
        BundleError,
        match=r"features of 12 sources need about [0-9.]+ [KM]?i?B, and .* has [0-9.]+ [KMG]?i?B left. Make room",
    ):
        run(data)
    assert len(FeatureStore.open(data / "store")) == 0
    assert run(data, dtype="int8", to="small").num_written == 12


def test_a_disk_that_fills_up_during_a_run(data, monkeypatch):
    run(data, "undisturbed")
    fsync, calls = os.fsync, []

    def full(handle):
        calls.append(handle)
        if len(calls) > 4:
            raise OSError(28, "No space left on device")
        fsync(handle)

    with (
        monkeypatch.context() as patched,
        pytest.raises(BundleError, match="No space left on device.*What was complete"),
    ):
        patched.setattr(os, "fsync", full)
        run(data, shard_bytes=300)
    assert 0 < len(FeatureStore.open(data / "store")) < 12
    run(data)
    digests = {FeatureStore.open(data / name).content_digest() for name in ("store", "undisturbed")}
    assert len(digests) == 1


def test_what_killed_runs_left_is_removed(data):
    run(data, shard_bytes=300)
    whole = FeatureStore.open(data / "store")
    (data / "store" / "features-00000-aaaaaa-00000.safetensors.partial").write_bytes(b"half")
    shard = next(shard.path for shard in whole.shards if shard.path.name.startswith("features"))
    shard.write_bytes(shard.read_bytes()[:-7])
    run(data)
    assert not list((data / "store").glob("*.partial")) and not shard.exists()
    assert FeatureStore.open(data / "store").content_digest() == whole.content_digest()


@pytest.mark.parametrize(
    "name", ["bridge.safetensors", "model.safetensors.partial", "notes.txt", "features-x.safetensors", "images"]
)
def test_a_folder_of_something_else_is_refused_before_anything_is_loaded(data, monkeypatch, name):
    monkeypatch.setattr(Numbers, "build_encoder", lambda self: pytest.fail("loaded"))
    other = data / "branch"
    other.mkdir()
    (other / name).mkdir() if name == "images" else (other / name).write_text("precious")
    with pytest.raises(BundleError, match=rf"branch is no feature store, and holds {name}. Give an empty or a new"):
        run(data, to="branch")
    assert [path.name for path in other.iterdir()] == [name]


def test_a_folder_of_many_files_is_told_by_some_of_them(data):
    for number in range(5):
        (data / f"{number}.pt").touch()
    with pytest.raises(BundleError, match=r"holds 0.pt, 0.txt, 1.pt and \d+ more. Give"):
        run(data, to=".")


def test_what_else_lies_in_a_store_is_left_alone(data):
    """Also by `verify`, and by a run that a crash has left with nothing but its lock."""
    store = data / "store"
    store.mkdir()
    (store / ".lock").touch()
    (store / "store.yaml.partial").touch()
    run(data)
    others = [store / name for name in ("bridge.safetensors", "model.partial", "x-features-00000-aaaaaa-00000.partial")]
    for path in others:
        path.write_text("precious")
    size = sum(path.stat().st_size for path in store.glob("f*.safetensors"))
    assert run(data).nbytes == size and [path.read_text() for path in others] == ["precious"] * 3
    job = Job(BranchConfig("numbers"), str(store))
    assert "12 items in" in verify(job, manifests_of(job.branch, [str(data / "train.jsonl")]))


@pytest.mark.slow
def test_another_run_into_the_same_store_is_refused(data):
    made = data / "store"
    made.mkdir()
    with (
        written_by_another(made, "xblip precompute"),
        pytest.raises(BundleError, match=r"Another xblip precompute is writing into .*store"),
    ):
        run(data)
    assert run(data).num_written == 12


@pytest.mark.parametrize(
    ("branch", "message"),
    [
        (
            BranchConfig("numbers", config={"seed": 1}),
            r"origin.settings.seed is 1 here and 0 there; encoder.fingerprint",
        ),
        (BranchConfig("numbers", encoder_dtype="bfloat16"), r"origin.encoder_dtype is 'bfloat16' here"),
    ],
)
def test_another_encoder_needs_another_store(data, branch, message):
    run(data)
    with pytest.raises(BundleError, match=message):
        run(data, branch=branch)


def test_wrong_settings(data):
    with pytest.raises(BundleError, match=r"Cannot write .*train.jsonl.*Give another folder"):
        run(data, to="train.jsonl")
    with pytest.raises(ConfigError, match=r'Unknown engine "rays". Did you mean "ray"'):
        run(data, engine="rays")
    with pytest.raises(ConfigError, match=r'Features cannot be stored as "half"'):
        run(data, dtype="half")
    (data / "train.jsonl").write_text('{"instruction": "what ?", "answer": "one"}\n')
    with pytest.raises(InputError, match=r'No row names a source of "numbers"'):
        run(data)


def test_ray_that_is_not_installed(data, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(PluginError, match=r"--engine ray needs Ray Data.*pip install \"xblip\[ray\]\""):
        run(data, engine="ray")


def test_a_reader_that_is_killed_is_told(data, monkeypatch):
    monkeypatch.setattr(Numbers, "load", lambda self, source: os._exit(9))
    with pytest.raises(InputError, match=r"A process that reads files was killed.*training.dataloader_num_workers"):
        run(data, dataloader_num_workers=1)


def test_verify_reads_all_and_encodes_some_again(data):
    run(data, shard_bytes=300)
    job = Job(BranchConfig("numbers"), str(data / "store"))
    manifests = manifests_of(job.branch, [str(data / "train.jsonl")])
    assert "12 items in" in verify(job, manifests)
    path = next((data / "store").glob("features*"))
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 64]))
    with pytest.raises(BundleError, match=rf"1 shards in .* are damaged: {path.name}. Delete them"):
        verify(job, manifests)
    path.write_bytes(good)
    with pytest.raises(BundleError, match=r"settings.seed is 3 here|another encoder"):
        verify(Job(BranchConfig("numbers", config={"seed": 3}), job.folder), manifests)
    (data / "5.txt").write_text("5 5 5 5")
    with pytest.raises(BundleError, match=r"1 of this run's sources have no stored features"):
        verify(job, manifests)


def test_verify_finds_features_of_something_else(data, monkeypatch):
    run(data)
    load = Numbers.load
    monkeypatch.setattr(Numbers, "load", lambda self, source: {"values": 2 * load(self, source)["values"]})
    job = Job(BranchConfig("numbers"), str(data / "store"))
    with pytest.raises(BundleError, match=r"its stored features are off by .* they are not this encoder's"):
        verify(job, manifests_of(job.branch, [str(data / "train.jsonl")]))


def test_the_command(data, llm_folder, monkeypatch, capsys):
    config = {
        "llm": {"source": str(llm_folder)},
        "branch": {"modality": "numbers"},
        "data": {"train": str(data / "train.jsonl"), "eval": str(data / "train.jsonl")},
        "training": {"output_dir": str(data / "run"), "use_cpu": True},
    }
    (data / "config.yaml").write_text(yaml.safe_dump(config))

    def xblip(*arguments):
        monkeypatch.setattr(sys, "argv", ["xblip", "precompute", str(data / "config.yaml"), *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, capsys.readouterr()

    status, shown = xblip("--to", str(data / "store"), "--dtype", "int8")
    assert not status and "wrote" in shown.out and "12 items, 0 were there or are the same" in shown.out
    status, shown = xblip("--to", str(data / "store"), "--verify")
    assert not status and "is right: 12 items in" in shown.out
    status, shown = xblip("--to", str(data / "store"), "branch.config.seed=2", "--dtype", "int8")
    assert status == 2 and shown.err.startswith("error: ") and "settings.seed is 2 here" in shown.err
    assert xblip()[0] == 2
    monkeypatch.setattr(Numbers, "build_encoder", lambda self: pytest.fail("loaded"))
    for wrong, message in (
        (["--to", ""], "--to is empty: name the folder"),
        (["--to", "new", "--max-skipped", "-1"], "max_skipped is a share of all sources, from 0 to 1, not -1."),
        (["--to", "new", "--max-skipped", "5"], "max_skipped is a share of all sources, from 0 to 1, not 5."),
        (["--to", "new", "--batch-segments", "0"], "batch_segments must be at least 1, not 0."),
        (["--to", "new", "training.dataloader_num_workers=-2"], "dataloader_num_workers must be at least 0, not -2."),
        (["--to", "new", "training.dataloader_num_workers=two"], "\"training\": Value 'two'"),
        (["--to", "new", "training.seed=-1"], "seed must be at least 0, not -1."),
    ):
        status, shown = xblip(*wrong)
        assert status == 2 and shown.err.startswith(f"error: {message}") and shown.err.count("\n") == 1, wrong


def test_the_command_of_a_run_that_trains_several_modalities(data, toy, llm_folder, monkeypatch, capsys):
    row = {"toy": [1.0, 2.0, 3.0, 4.0], "instruction": "what is this ?", "answer": "one"}
    (data / "toy.jsonl").write_text(json.dumps(row) + "\n")
    config = {
        "llm": {"source": str(llm_folder)},
        "branch": {"modality": "numbers"},
        "also": [{"modality": "toy"}],
        "data": {"train": [str(data / "train.jsonl"), str(data / "toy.jsonl")]},
        "training": {"output_dir": str(data / "run"), "use_cpu": True},
    }
    (data / "config.yaml").write_text(yaml.safe_dump(config))
    for only, count in (([], 12), (["--only", "toy"], 1), (["--only", "toi"], 0)):
        arguments = ["xblip", "precompute", str(data / "config.yaml"), "--to", str(data / f"store-{count}"), *only]
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        shown = capsys.readouterr()
        assert f"{count} items" in shown.out if count else 'Did you mean "toy"' in shown.err and ended.value.code == 2
