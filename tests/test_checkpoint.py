"""Foreign checkpoints: every form is read, nothing is run, and what is damaged is said so."""

import argparse
import json
import pickle

import pytest
import torch
from safetensors.torch import save_file

from xblip import checkpoint
from xblip.errors import BundleError

TENSORS = {
    "vision.weight": torch.arange(6.0).reshape(2, 3),
    "vision.bias": torch.ones(2),
    "head.weight": torch.zeros(1),
}


@pytest.fixture
def folder(tmp_path):
    """A transformers folder in two shards."""
    (tmp_path / "config.json").write_text('{"architectures": ["SomeModel"], "width": 3}')
    names = {"a.safetensors": ["vision.weight"], "b.safetensors": ["vision.bias", "head.weight"]}
    for file, held in names.items():
        save_file({name: TENSORS[name] for name in held}, tmp_path / file)
    places = {name: file for file, held in names.items() for name in held}
    (tmp_path / checkpoint.INDEX).write_text(json.dumps({"weight_map": places}))
    return tmp_path


def same(read: checkpoint.Checkpoint) -> bool:
    return set(read.tensors) == set(TENSORS) and all(torch.equal(read.tensors[name], TENSORS[name]) for name in TENSORS)


def test_a_folder_in_shards(folder):
    read = checkpoint.read(folder)
    assert same(read) and read.architecture == "SomeModel" and read.config["width"] == 3


@pytest.mark.parametrize("old_format", [False, True])
def test_a_file_of_torch_with_its_weights_at_any_depth(tmp_path, old_format):
    for content, config in [
        (TENSORS, {}),
        ({"model": TENSORS, "iters": 7, "cfg": {"width": 3}}, {"iters": 7, "cfg": {"width": 3}}),
        ({"state_dict": TENSORS, "args": argparse.Namespace(lr=1)}, {"args": argparse.Namespace(lr=1)}),
        ({"model": {"state_dict": TENSORS}, "epoch": 1}, {"epoch": 1}),
    ]:
        torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=not old_format)
        read = checkpoint.read(tmp_path / "x.pth")
        assert same(read) and read.config == config


def test_a_file_of_safetensors(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors")
    assert same(checkpoint.read(tmp_path / "x.safetensors"))


def test_what_was_neither_taken_nor_left_out_is_an_error(folder):
    read = checkpoint.read(folder)
    assert set(read.take("vision.")) == {"weight", "bias"}
    with pytest.raises(BundleError, match="holds 1 weights that have no place here, among them head.weight"):
        read.check_all_used()
    read.leave_out("head.", "no use")
    read.check_all_used()
    assert read.left_out == {"head.weight": "no use"}


class Runs:
    def __reduce__(self):
        return (print, ("this must never be printed",))


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, capsys):
    for name, content in (("new", {"model": TENSORS, "x": Runs()}), ("bare", Runs())):
        path = tmp_path / f"{name}.pth"
        torch.save(content, path)
        with pytest.raises(BundleError, match=rf"{name}\.pth is not read: .*run its code .*print"):
            checkpoint.read(path)
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Runs()))
    with pytest.raises(BundleError, match=r"plain\.pth is (not read|damaged)"):
        checkpoint.read(tmp_path / "plain.pth")
    assert "must never" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["x.pth", "x.pt", "x.bin", "x.safetensors"])
@pytest.mark.parametrize("keep", [0, 10, -20])
def test_a_cut_file_is_damaged(tmp_path, name, keep):
    path = tmp_path / name
    save_file(TENSORS, path) if name.endswith("safetensors") else torch.save(TENSORS, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(BundleError, match=rf"{name} is (damaged|not read: it is damaged)"):
        checkpoint.read(path)


def test_a_file_without_weights(tmp_path):
    for content in ([1, 2], {"model": {}}, {"x": 1}, 7):
        torch.save(content, tmp_path / "x.pth")
        with pytest.raises(BundleError, match=r"x\.pth holds no weights: expected tensors by name, or under model"):
            checkpoint.read(tmp_path / "x.pth")


def test_a_folder_that_lacks_something(folder):
    (folder / "b.safetensors").unlink()
    with pytest.raises(BundleError, match=r"lacks 1 of its 2 files of weights, among them b\.safetensors"):
        checkpoint.read(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(BundleError, match=r"config\.json is damaged"):
        checkpoint.read(folder)
    (folder / "config.json").unlink()
    with pytest.raises(BundleError, match=r"holds no transformers model: it lacks config\.json"):
        checkpoint.read(folder)


@pytest.mark.parametrize("source", ["Salesforce/no-such-model", "none.pth", "a/b/c"])
def test_what_is_not_there_says_what_to_place_where(source):
    with pytest.raises(BundleError, match=f'There is no checkpoint "{source}": .* Offline: download it elsewhere'):
        checkpoint.read(source)
