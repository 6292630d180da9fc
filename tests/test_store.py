"""The feature store: what is written is read, found by content, and never served for something else."""

import json
import os
import pickle
import subprocess
import time

import numpy as np
import pytest
import torch
from safetensors import safe_open

from xblip import shards, store
from xblip.contents import KnownFiles
from xblip.errors import BundleError, ConfigError, InputError, MediaError
from xblip.modality import Features
from xblip.provenance import EncoderFacts, Origin, StoreFacts
from xblip.store import FeatureStore, StoreWriter


def facts(dtype: str = "float32", **origin) -> StoreFacts:
    return StoreFacts(Origin("toy", **origin), EncoderFacts(6, "0123456789abcdef", "float32", 10), dtype)


def item(number: int, *, masked: bool = False) -> Features:
    """Features of 1 to 3 segments of 2 to 5 tokens, of very different sizes."""
    generator = torch.Generator().manual_seed(number)
    segments, tokens = 1 + number % 3, 2 + number % 4
    values = torch.randn(segments, tokens, 6, generator=generator) * 10.0 ** (number % 5 - 2)
    mask = torch.ones(segments, tokens, dtype=torch.bool)
    if masked:
        mask[:, 1:] = torch.rand(segments, tokens - 1, generator=generator) < 0.5
    return Features(values, mask, [segments])


def fill(folder, numbers, dtype="float32", **options) -> FeatureStore:
    folder.mkdir(exist_ok=True)
    made = FeatureStore.create(folder, facts(dtype))
    with StoreWriter(folder, made.facts, **options) as writer:
        for number in numbers:
            writer.add(KnownFiles().key([number]), item(number, masked=number >= 20))
    return FeatureStore.open(folder)


@pytest.fixture
def later(monkeypatch):
    """Half a minute later, so that files made in this test count as settled."""
    now = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: now() + 30 * 10**9)


@pytest.mark.parametrize("dtype", shards.DTYPES)
@pytest.mark.parametrize("masked", [False, True])
def test_what_is_written_is_read(tmp_path, dtype, masked):
    numbers = range(20, 40) if masked else range(20)
    stored = fill(tmp_path, numbers, dtype, shard_bytes=2000)
    assert len(stored) == 20 and len(stored.shards) > 1
    for number in numbers:
        expected, found = item(number, masked=masked), stored.features([number])
        assert torch.equal(found.mask, expected.mask) and found.segments == expected.segments
        error = (found.values.float() - expected.values).abs()
        largest = expected.values.abs().amax(2, keepdim=True)
        bound = {"float32": 0, "float16": 2**-11, "bfloat16": 2**-8, "int8": 1.001 / 254}[dtype]
        tiny = {"float16": 2**-25}.get(dtype, 0)  # half the distance of float16's smallest numbers
        assert (error <= (largest if dtype == "int8" else expected.values.abs()) * bound + tiny).all()


def test_tokens_of_zeros_are_stored_in_int8():
    zeros = Features(torch.zeros(1, 2, 6), torch.ones(1, 2, dtype=torch.bool), [1])
    assert torch.equal(shards.unpack(shards.pack(zeros, "int8"), "int8").values, zeros.values)


def test_a_shard_is_a_safetensors_file(tmp_path):
    stored = fill(tmp_path, range(3), "bfloat16")
    with safe_open(stored.shards[0].path, "pt") as file:
        values = file.get_tensor("values")
        assert values.dtype == torch.bfloat16 and values.shape[1] == 6
        assert file.metadata() == {"encoder": "0123456789abcdef", "dtype": "bfloat16"}
        assert "mask" not in file.keys()  # noqa: SIM118


def test_content_is_the_same_in_whatever_shards(tmp_path):
    one = fill(tmp_path / "one", range(30))
    fill(tmp_path / "two", reversed(range(15)), shard_bytes=500)
    two = fill(tmp_path / "two", range(10, 30), name="features-00001")  # five items are there twice
    assert len(two.shards) > len(one.shards) and len(two) == len(one) == 30
    assert two.content_digest() == one.content_digest()
    assert fill(tmp_path / "three", range(29)).content_digest() != one.content_digest()


def test_a_store_travels_to_other_processes_and_maps_few_shards_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "MAX_MAPPED", 3)
    stored = fill(tmp_path, range(20), shard_bytes=100)
    for _ in range(2):
        assert all(torch.equal(stored.features([number]).values, item(number).values) for number in range(20))
        assert len(stored._mapped) == 3
        stored = pickle.loads(pickle.dumps(stored))
        assert not stored._mapped


def test_a_torn_shard_is_as_if_it_were_not_there(tmp_path):
    stored = fill(tmp_path, range(10), shard_bytes=700)
    first = stored.shards[0].path
    whole = first.read_bytes()
    held = len(stored)
    for length in (0, 5, 100, 300, len(whole) // 2, len(whole) - 1):
        first.write_bytes(whole[:length])
        torn = FeatureStore.open(tmp_path)
        assert torn.torn == [first] and 0 < len(torn) < held
        with pytest.raises(BundleError, match=r"is not in the feature store .* run xblip precompute"):
            torn.features([0])


def test_a_flipped_bit_is_found(tmp_path):
    stored = fill(tmp_path, range(10), shard_bytes=700)
    assert not any(stored.damaged())
    path = stored.shards[1].path
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    assert {found for found in FeatureStore.open(tmp_path).damaged() if found} == {path}


@pytest.mark.parametrize("part", ["values", "items"])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_damaged_features_are_not_served(tmp_path, part, dtype):
    """Whether the features are others, or the table says that they lie elsewhere."""
    fill(tmp_path, [3], dtype)
    (path,) = tmp_path.glob("features*")
    data = bytearray(path.read_bytes())
    length = 8 + int.from_bytes(data[:8], "little")
    first, last = json.loads(data[8:length])[part]["data_offsets"]
    for place in range(length + first, length + last):
        path.write_bytes(data[:place] + bytes([data[place] ^ 64]) + data[place + 1 :])
        stored = FeatureStore.open(tmp_path)
        assert list(stored.damaged()) == [path]
        with pytest.raises(BundleError, match=rf"features of \"\[3\]\" in .*{path.name} are damaged.* --verify"):
            stored.features([3])


def test_an_item_is_compared_with_its_checksum_when_it_is_first_read(tmp_path, monkeypatch):
    counted = []
    checksum = shards.Packed.checksum
    monkeypatch.setattr(shards.Packed, "checksum", lambda item: counted.append(item) or checksum(item))
    stored = FeatureStore.open(fill(tmp_path, range(4)).folder)
    counted.clear()
    for _ in range(3):
        for number in (1, 3):
            stored.features([number])
    assert len(counted) == 2


def test_a_full_disk_is_one_error_and_what_was_complete_stays(tmp_path, monkeypatch):
    stored = fill(tmp_path, range(5))

    def full(handle):
        raise OSError(28, "No space left on device")

    with (
        monkeypatch.context() as patched,
        pytest.raises(BundleError, match=r"No space left on device. What was complete"),
    ):
        patched.setattr(os, "fsync", full)
        fill(tmp_path, range(5, 10), shard_bytes=100)
    assert len(FeatureStore.open(tmp_path)) == 5 and not list(tmp_path.glob("*.partial"))
    assert fill(tmp_path, range(5, 10)).content_digest() == fill(tmp_path / "other", range(10)).content_digest()
    assert stored.features([0])


def test_a_small_file_system_that_fills_up(small_disk):
    subprocess.run(["mount", "-o", "remount,size=64k", small_disk], check=True)
    with pytest.raises(BundleError, match="No space left on device"):
        fill(small_disk, range(1000), shard_bytes=10_000)
    kept = len(FeatureStore.open(small_disk))
    assert 0 < kept < 1000 and not list(small_disk.glob("*.partial"))
    subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
    assert len(fill(small_disk, range(kept, 1000))) == 1000


def test_files_are_found_by_content(tmp_path, later, monkeypatch):
    stored = fill(tmp_path / "store", [])
    (tmp_path / "a.txt").write_text("1 2 3 4")
    with StoreWriter(stored.folder, stored.facts) as writer:
        writer.add(stored.key(tmp_path / "a.txt"), item(1))
        writer.files.append(stored.files.take())
    stored = FeatureStore.open(stored.folder)
    (tmp_path / "b.txt").write_text("1 2 3 4")
    (tmp_path / "c.xyz").write_text("1 2 3 4")
    monkeypatch.chdir(tmp_path)
    for path in ("a.txt", tmp_path / "a.txt", "./a.txt", str(tmp_path / "b.txt")):
        assert torch.equal(stored.features(path).values, item(1).values)
    assert stored.holds("a.txt") and not stored.holds("c.xyz") and not stored.holds("no.txt")
    with pytest.raises(BundleError, match=r'"c.xyz" is not in the feature store'):  # another ending is read otherwise
        stored.features("c.xyz")


def test_a_changed_file_is_not_served_what_it_was(tmp_path, later):
    stored = fill(tmp_path / "store", [])
    path = tmp_path / "a.txt"
    path.write_text("1 2 3 4")
    with StoreWriter(stored.folder, stored.facts) as writer:
        writer.add(stored.key(path), item(1))
        writer.files.append(stored.files.take())
    stored = FeatureStore.open(stored.folder)
    before = path.stat()
    path.write_text("1 2 3 5")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as long, as old, and another
    for opened in (stored, FeatureStore.open(stored.folder)):
        with pytest.raises(BundleError, match=r"a.txt\" changed since its features were stored.*xblip precompute"):
            opened.features(path)
    path.write_text("1 2 3 4")
    assert stored.features(path)


def test_a_file_is_read_once(tmp_path, monkeypatch, later):
    from xblip import contents

    reads = []
    read = contents._file_key
    monkeypatch.setattr(contents, "_file_key", lambda path: reads.append(path) or read(path))
    stored = fill(tmp_path / "store", [])
    path = tmp_path / "a.txt"
    path.write_text("1 2 3 4")
    with StoreWriter(stored.folder, stored.facts) as writer:
        writer.add(stored.key(path), item(1))
    FeatureStore.open(stored.folder).check([path])
    assert len(reads) == 2
    for _ in range(2):
        opened = FeatureStore.open(stored.folder)
        opened.check([path, path])
        assert opened.features(path) and len(reads) == 2
    path.touch()
    assert opened.features(path) and len(reads) == 3


def test_what_changed_a_moment_ago_is_not_trusted(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("1 2 3 4")
    files = KnownFiles()
    key = files.key(path)
    assert files.known(path) is None and not len(files.take())
    path.write_text("1 2 3 5")
    assert files.key(path) != key


def test_keys_of_what_is_no_file(tmp_path):
    class Member:
        """A member of an archive."""

        def __init__(self, name, data):
            self.name, self.data = name, data

        def read(self):
            return self.data

    (tmp_path / "a.txt").write_bytes(b"1 2")
    key = KnownFiles().key
    assert key(Member("in/b.TXT", b"1 2")) == key(tmp_path / "a.txt")
    assert key(Member("b.txt", b"1 3")) != key(Member("b.txt", b"1 2"))
    with open(tmp_path / "a.txt", "rb") as file:
        assert key(file) == key(file) == key(tmp_path / "a.txt")
    assert key({"b": [1, 2.5], "a": "ü"}) == key({"a": "ü", "b": [1, 2.5]}) != key([1, 2.5])
    assert key([[1, 2.5], [3]]).hex() == "43a9748e30e578f5f59fe73e5aa6ba17", "stores that are there hold it by this"
    with pytest.raises(InputError, match="a object has no bytes to tell"):
        key(object())


def test_a_list_of_files_is_stored_by_what_is_in_them(tmp_path, later):
    path, stored = tmp_path / "a.txt", FeatureStore.create(tmp_path, facts())
    path.write_text("1 2")
    with StoreWriter(tmp_path, stored.facts) as writer:
        writer.add(stored.key([str(path)]), item(1))
    stored = FeatureStore.open(tmp_path)
    assert not stored.holds([path]), "it would have to be read"
    stored.check([[path]])
    assert stored.holds([path]) and stored.features([str(path)])
    path.write_text("1 3")
    assert not stored.holds([path])
    with pytest.raises(BundleError, match="is not in the feature store"):
        stored.features([path])


def test_many_files_and_items_are_told_apart(tmp_path, later):
    """Also where the first halves of keys, or the hashes of paths, are the same."""
    stored = FeatureStore.create(tmp_path, facts())
    keys = [np.array([number // 3, number], np.uint64).tobytes() for number in range(30)]
    with StoreWriter(tmp_path, stored.facts) as writer:
        for number, key in enumerate(keys):
            writer.add(key, item(number))
    stored = FeatureStore.open(tmp_path)
    for number, key in enumerate(keys):
        assert torch.equal(shards.unpack(stored._read(stored._find(key)), "float32").values, item(number).values)
    assert np.array([3, 7], np.uint64).tobytes() not in stored


def test_check_names_what_is_missing(tmp_path):
    stored = fill(tmp_path, range(3))
    stored.check([[0], [1], [2]])
    with pytest.raises(BundleError, match=r'2 of this run\'s sources have no stored features. "\[7\]" is not in'):
        stored.check([[0], [7], [8]])


def test_a_missing_file_is_an_error_of_that_file(tmp_path):
    stored = fill(tmp_path, range(3))
    with pytest.raises(MediaError, match=r'Cannot read ".*gone.txt": No such file or directory.'):
        stored.features(tmp_path / "gone.txt")
    with pytest.raises(MediaError, match=r"Is a directory"):
        stored.features(tmp_path)


def test_stores_that_cannot_be_opened(tmp_path):
    with pytest.raises(BundleError, match=r"There is no feature store in .*xblip precompute CONFIG --to"):
        FeatureStore.open(tmp_path)
    with pytest.raises(ConfigError, match=r'cannot be stored as "float17". Did you mean "float1?6?'):
        FeatureStore.create(tmp_path, facts("float17"))
    fill(tmp_path / "store", range(3))
    with pytest.raises(BundleError, match=r"other features: dtype is 'float16' here and 'float32' there. Give another"):
        FeatureStore.create(tmp_path / "store", facts("float16"))
    with pytest.raises(BundleError, match=r"origin.settings.width is 3 here and None there"):
        FeatureStore.create(tmp_path / "store", facts(settings={"width": 3}))
    other = fill(tmp_path / "other", range(3), "float16")
    moved = tmp_path / "store" / "features-00000-ffffff-00000.safetensors"
    other.shards[0].path.rename(moved)
    with pytest.raises(BundleError, match=rf"{moved.name} is not of the store it lies in"):
        FeatureStore.open(tmp_path / "store")
    path = tmp_path / "other" / "store.yaml"
    path.write_text(path.read_text().replace("format: 1", "format: 9"))
    with pytest.raises(BundleError, match=r"is of format 9, and this version of xblip reads 1"):
        FeatureStore.open(tmp_path / "other")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_refused(value):
    features = item(0)
    features.values[0, 0, 0] = value
    for dtype in shards.DTYPES:
        with pytest.raises(MediaError, match="not finite"):
            shards.pack(features, dtype)


def test_features_that_do_not_fit_into_float16():
    features = item(0)
    features.values[0, 0, 0] = 1e5
    with pytest.raises(ConfigError, match=r"up to 1e\+05 do not fit into float16: store them as bfloat16"):
        shards.pack(features, "float16")
