"""What a run leaves to be resumed from: whole checkpoints or none, and the facts that must be equal."""

import errno
import json

import pytest
import torch

from xblip.errors import BundleError, ConfigError
from xblip.resume import check_facts, clear_unfinished, last_checkpoint, replacing, write_facts, writing
from xblip.runs import FACTS

FACTS_OF_A_RUN = {"seed": 0, "data": {"train.jsonl": "ab"}, "bridge": {"num_query_tokens": 4}}


def test_a_checkpoint_bears_its_name_only_when_it_is_whole(tmp_path):
    with pytest.raises(KeyboardInterrupt), writing(tmp_path / "checkpoint-1", is_main=True) as folder:
        (folder / "half").write_text("x")
        raise KeyboardInterrupt
    assert not (tmp_path / "checkpoint-1").exists()
    with pytest.raises(ConfigError, match=r"There is no checkpoint in .* to resume from"):
        last_checkpoint(tmp_path)
    clear_unfinished(tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "branch"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir())
    clear_unfinished(tmp_path / "branch")
    assert not list(tmp_path.iterdir())
    with writing(tmp_path / "checkpoint-1", is_main=True) as folder:
        (folder / "whole").write_text("x")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-1"


def test_a_checkpoint_takes_the_place_of_an_older_one_of_its_step(tmp_path):
    for text in "ab":
        with writing(tmp_path / "checkpoint-1", is_main=True) as folder:
            (folder / text).write_text(text)
    assert [path.name for path in (tmp_path / "checkpoint-1").iterdir()] == ["b"]


@pytest.mark.parametrize(
    "raised",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
    ],
)
@pytest.mark.parametrize("how", ["writing", "replacing"])
def test_a_full_disk_is_one_clear_error_and_leaves_what_was_there(tmp_path, raised, how):
    place = tmp_path / "run"
    place.mkdir()
    (place / "bridge").write_text("old")
    before = writing(place / "checkpoint-2", is_main=True) if how == "writing" else replacing(place)
    with (
        pytest.raises(BundleError, match=r"Cannot write .*: .* make room or mend it, and go on with --resume"),
        before as folder,
    ):
        (folder / "bridge").write_text("new")
        raise raised
    assert [path.name for path in place.iterdir()] == ["bridge"] and (place / "bridge").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_errors_that_are_not_of_the_disk_pass_as_they_are(tmp_path):
    with pytest.raises(RuntimeError, match="shapes"), writing(tmp_path / "checkpoint-1", is_main=True):
        raise RuntimeError("shapes do not fit")


def test_files_are_replaced_at_once_and_others_stay(tmp_path):
    place = tmp_path / "run"
    (place / "tokenizer").mkdir(parents=True)
    (place / "tokenizer" / "old").write_text("old")
    (place / "checkpoint-1").mkdir()
    with replacing(place) as folder:
        (folder / "tokenizer").mkdir()
        (folder / "tokenizer" / "new").write_text("new")
        (folder / "branch.yaml").write_text("new")
        assert (place / "tokenizer" / "old").exists()
    assert sorted(path.name for path in place.rglob("*")) == ["branch.yaml", "checkpoint-1", "new", "tokenizer"]


def test_a_real_disk_that_is_full(small_disk):
    place = small_disk / "run"
    place.mkdir()
    with pytest.raises(BundleError, match="make room"), writing(place / "checkpoint-1", is_main=True) as folder:
        torch.save(torch.zeros(1_000_000), folder / "optimizer.pt")
    assert not list(place.iterdir())


def test_equal_facts_pass(tmp_path):
    write_facts(tmp_path, FACTS_OF_A_RUN)
    check_facts(tmp_path, FACTS_OF_A_RUN)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({**FACTS_OF_A_RUN, "data": {"train.jsonl": "cd"}}, "data.train.jsonl was 'ab', is 'cd'"),
        ({**FACTS_OF_A_RUN, "bridge": {"num_query_tokens": 8}}, "bridge.num_query_tokens was 4, is 8"),
        ({"seed": 0, "bridge": {"num_query_tokens": 4}}, "data.train.jsonl was 'ab', is 'absent'"),
    ],
)
def test_facts_that_differ_are_named(tmp_path, facts, message):
    write_facts(tmp_path, FACTS_OF_A_RUN)
    with pytest.raises(ConfigError, match=f"This is not the run that wrote .*: {message}. Restore that"):
        check_facts(tmp_path, facts)


def test_damaged_facts_are_a_damaged_checkpoint(tmp_path):
    (tmp_path / FACTS).write_text(json.dumps(FACTS_OF_A_RUN)[:10])
    with pytest.raises(BundleError, match=r"The checkpoint in .* is damaged"):
        check_facts(tmp_path, FACTS_OF_A_RUN)
