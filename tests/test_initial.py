"""Initial weights: what a bridge takes of a folder's, what it tells, and what is refused."""

import pytest
import torch
from kit import make_branch
from safetensors.torch import save_file

from xblip.errors import BundleError
from xblip.initial import initialise
from xblip.testing import ToyModality


@pytest.fixture
def bridge(llm, toy):
    return make_branch(ToyModality, llm).bridge


def test_weights_of_one_name_and_shape_are_taken_and_the_rest_is_told(bridge, tmp_path):
    before = {name: value.clone() for name, value in bridge.state_dict().items()}
    given = {"projector.bias": torch.ones(32), "query_tokens": torch.ones(1, 99, 32), "heads.one": torch.ones(1)}
    save_file(given, tmp_path / "bridge.safetensors")
    taken = initialise(bridge, tmp_path)
    assert taken.loaded == ["projector.bias"] and taken.left_out == ["heads.one"]
    assert set(taken.fresh) == set(before) - {"projector.bias"}
    assert str(taken).startswith("1 weights taken; fresh: query_tokens (1), ")
    assert str(taken).endswith("left out: heads (1)")
    after = bridge.state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"projector.bias"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"no initial weights in .*: it lacks bridge\.safetensors"),
        (b"rubbish", r"bridge\.safetensors is damaged"),
        ({"x": torch.ones(2)}, "Not one weight of .* fits this bridge"),
    ],
)
def test_initial_weights_that_cannot_be_taken(bridge, tmp_path, content, message):
    if isinstance(content, bytes):
        (tmp_path / "bridge.safetensors").write_bytes(content)
    elif content:
        save_file(content, tmp_path / "bridge.safetensors")
    with pytest.raises(BundleError, match=message):
        initialise(bridge, tmp_path)
