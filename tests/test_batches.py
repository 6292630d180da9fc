"""Batches that are asked: one sample's failure is its own, and short prompts are not padded to long ones for nothing."""

import pytest
import torch
from kit import BEADS, ONE, TWO, eight, make_model

from xblip import batches
from xblip.errors import InputError, MediaError, PluginError
from xblip.packing import groups_of_like_length
from xblip.sample import Sample

NEW = {"max_new_tokens": 6}
BROKEN = [
    (Sample("what is this ?", [("toy", [])]), MediaError),
    (Sample("what is this ?", [("tpy", ONE)]), PluginError),
    ({"toy": ONE}, InputError),
    (Sample("what is this ? " * 100, [("beads", BEADS)]), InputError),
]


@pytest.fixture
def model(llm):
    return make_model(llm)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2, "num_return_sequences": 2}])
def test_what_fails_fails_alone(model, options):
    repeats = options.get("num_return_sequences", 1)
    good = [Sample("what is this ?", [("toy", ONE)]), Sample("which one ?", [("beads", BEADS), ("toy", TWO)])]
    expected = model.generate(good, **NEW, **options)
    samples = [good[0], *(sample for sample, _ in BROKEN), good[1]]
    found = model.generate(samples, return_exceptions=True, **NEW, **options)
    assert found[:repeats] == expected[:repeats] and found[-repeats:] == expected[-repeats:]
    for index, (_, error) in enumerate(BROKEN, 1):
        assert all(type(part) is error for part in found[index * repeats : (index + 1) * repeats])


@pytest.mark.parametrize("sample, error", BROKEN)
def test_a_failure_is_raised_unless_told_otherwise(model, sample, error):
    with pytest.raises(error):
        model.generate([Sample("what is this ?", [("toy", ONE)]), sample], **NEW)


def test_nothing_is_left_to_ask_when_all_fail(model):
    found = model.generate([sample for sample, _ in BROKEN], return_exceptions=True, **NEW)
    assert [type(part) for part in found] == [error for _, error in BROKEN]
    assert model.generate([], return_exceptions=True) == []


def test_a_failure_that_is_no_sample_s_own_is_raised(model, monkeypatch):
    monkeypatch.setattr(model.llm, "generate", lambda *args, **options: (_ for _ in ()).throw(torch.OutOfMemoryError()))
    with pytest.raises(torch.OutOfMemoryError):
        model.generate([Sample("what is this ?", [("toy", ONE)])], return_exceptions=True, **NEW)


def test_prompts_of_like_length_are_read_together(model, monkeypatch):
    sizes, real = [], model.llm.generate

    def counted(batch, **options):
        sizes.append(len(batch.inputs_embeds))
        return real(batch, **options)

    monkeypatch.setattr(model.llm, "generate", counted)
    monkeypatch.setattr(batches, "POSITIONS_PER_STEP", {"cpu": 0, "cuda": 0})
    apart = model.generate(eight(), **NEW)
    assert len(sizes) > 1 and sum(sizes) == 8
    monkeypatch.setattr(batches, "POSITIONS_PER_STEP", {"cpu": 1000, "cuda": 0})
    del sizes[:]
    assert model.generate(eight(), **NEW) == apart and sizes == [8]


@pytest.mark.parametrize(
    "lengths, step, groups",
    [
        ([40, 330, 41, 331], 100, [[0, 2], [1, 3]]),
        ([40, 330, 41, 331], 600, [[0, 2, 1, 3]]),
        ([7], 50, [[0]]),
        ([5, 5, 5], 0, [[0, 1, 2]]),
        ([3, 2, 1], 0, [[2], [1], [0]]),
    ],
)
def test_groups_cost_least(lengths, step, groups):
    found = groups_of_like_length(lengths, step)
    assert sorted(map(sorted, found)) == sorted(map(sorted, groups))


def test_a_thousand_prompts_are_grouped_at_once():
    lengths = [(index * 37) % 500 + 1 for index in range(1000)]
    groups = groups_of_like_length(lengths, 700)
    assert sorted(index for group in groups for index in group) == list(range(1000)) and 1 < len(groups) < 50
