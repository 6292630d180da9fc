"""Foreign checkpoints: every form is read, nothing is run, and what is damaged is said so."""

import argparse
import json
import pickle
from pathlib import Path

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


END = ". Copy or download it again, whole."


class Runs:
    def __reduce__(self):
        return (print, ("this must never be printed",))


def message(path) -> str:
    """What is said of a file or folder that cannot be read; one line."""
    with pytest.raises(BundleError) as raised:
        checkpoint.read(path)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, capsys):
    for name, content in (("new", {"model": TENSORS, "x": Runs()}), ("bare", Runs())):
        path = tmp_path / f"{name}.pth"
        torch.save(content, path)
        assert message(path) == (
            f"{path} is not read: it holds print beside tensors and plain values, and reading that would run its code. Have "
            "its state_dict saved alone by someone who trusts it."
        )
    path = tmp_path / "plain.pth"
    path.write_bytes(pickle.dumps(Runs()))
    assert message(path).startswith(f"{path} is damaged, or not saved by torch: ")
    assert "must never" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "change",
    [
        lambda held: held[:10],
        lambda held: held[:-20],
        lambda held: b"\0" * 64 + held[64:],
        lambda held: held[:300] + b"\xff" * 200 + held[500:],
    ],
)
@pytest.mark.parametrize("name", ["x.pth", "x.pt", "x.bin", "old.pth", "x.safetensors"])
def test_a_file_that_is_cut_or_overwritten_is_damaged(tmp_path, name, change):
    path = tmp_path / name
    if name == "x.safetensors":
        save_file(TENSORS, path)
    else:
        torch.save(TENSORS, path, _use_new_zipfile_serialization=name != "old.pth")
    path.write_bytes(change(path.read_bytes()))
    what = "damaged" if name == "x.safetensors" else "damaged, or not saved by torch"
    said = message(path)
    assert said.startswith(f"{path} is {what}: ") and said.endswith(END) and len(said) < len(str(path)) + 240
    path.write_bytes(b"")
    assert message(path) == f"{path} is empty{END}"


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_a_page_or_a_pointer_in_the_place_of_weights_is_shown(tmp_path, name):
    path = tmp_path / name
    for text in ("<?xml version='1.0'?><Error>\n<Code>AccessDenied", "version https://git-lfs.github.com/spec/v1\noid"):
        path.write_text(text)
        assert message(path) == (
            f'{path} is text, not weights: it begins with "{" ".join(text[:40].split())}". A page of an error or a pointer '
            "of git-lfs may stand in its place: download it again."
        )


def test_a_file_without_weights(tmp_path):
    for content in ([1, 2], {"model": {}}, {"x": 1}, 7):
        torch.save(content, tmp_path / "x.pth")
        with pytest.raises(BundleError, match=r"x\.pth holds no weights: expected tensors by name, or under model"):
            checkpoint.read(tmp_path / "x.pth")


def test_a_folder_that_lacks_something(folder):
    (folder / "b.safetensors").unlink()
    assert message(folder) == (
        f"{folder} lacks 1 of its 2 files of weights, among them b.safetensors. Download it again, whole; weights in other "
        "formats than safetensors are to be converted by transformers first."
    )
    (folder / checkpoint.INDEX).write_text('{"weight_map": []}')
    assert message(folder) == f"{folder / checkpoint.INDEX} is damaged: it places no weights. Copy it again."
    (folder / "config.json").write_text("{")
    assert message(folder) == (
        f"{folder}/config.json is damaged: Expecting property name enclosed in double quotes: line 1 column 2 (char 1). "
        "Copy it again."
    )
    (folder / "config.json").unlink()
    assert message(folder) == (
        f"{folder} holds no transformers model: it lacks config.json. Give the model's own folder."
    )


@pytest.mark.parametrize("source", ["none.pth", "a/b/c", "./none", "~/none.safetensors"])
def test_a_path_that_leads_nowhere(source):
    here = Path.cwd()
    assert (
        message(source) == f'There is no checkpoint "{source}": no such file or folder; relative ones start at {here}.'
    )


def test_a_hub_id_that_cannot_be_reached_says_what_to_place_where():
    before, after = message("Salesforce/no-such-model").split(" (", 1)  # between them, what the hub's library says
    assert (
        before
        == 'There is no checkpoint "Salesforce/no-such-model": no such file or folder, and the hub cannot give it'
    )
    assert after.endswith(
        "). Offline: download it elsewhere (config.json, *.safetensors and the tokenizer's and processor's files), and "
        "give its folder."
    )
