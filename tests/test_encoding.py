"""Sources that are lists, as a run encodes them: of files, or of addresses that the modality fetches itself."""

import json
from pathlib import Path

import pytest
import torch
from kit import ONE, TWO, registered
from stores import run

from xblip.branch import BranchConfig
from xblip.errors import InputError
from xblip.store import FeatureStore
from xblip.testing import ToyModality

KNOWN = {"rows://one": ONE, "rows://two": TWO}


class Rows(ToyModality):
    """Rows of numbers, from files or known by an address."""

    name = "rows"
    cue = "input : "

    def load(self, source):
        rows = [KNOWN.get(part) or [float(word) for word in Path(part).read_text().split()] for part in source]
        return super().load([number for row in rows for number in row])


def stored(folder, *sources):
    """The store of a run over sources."""
    rows = [{"rows": source, "instruction": "what ?", "answer": "one"} for source in sources]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(folder, branch=BranchConfig("rows"))
    return FeatureStore.open(folder / "store")


@pytest.fixture(autouse=True)
def rows():
    with registered(Rows):
        yield


def test_addresses_are_stored_by_what_they_say(tmp_path):
    first, second = KNOWN
    store = stored(tmp_path, [first], [second], [first, second])
    one, two, both = (store.features(source).values for source in ([first], [second], [first, second]))
    assert not torch.equal(one, two) and torch.equal(both, torch.cat([one, two]))


def test_a_file_in_a_list_that_is_written_while_it_is_read_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "numbers.txt"
    path.write_text("1 2 3 4")
    load = Rows.load
    monkeypatch.setattr(Rows, "load", lambda self, source: (load(self, source), path.write_text("1 2 3 4 5"))[0])
    with pytest.raises(InputError, match="it is being written. Wait until that has ended"):
        stored(tmp_path, [str(path)])
