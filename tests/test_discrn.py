"""DisCRn: what belongs together is swapped together, so a model that reads what is there scores alike in every order."""

import json
from pathlib import Path

import pytest
from kit import make_branch, registered

from xblip import plugins
from xblip.discrn import DiscrnTask
from xblip.errors import ConfigError, InputError, MediaError
from xblip.evaluate import EvalConfig, evaluate
from xblip.model import XBlip
from xblip.runs import read_lines
from xblip.sample import Media
from xblip.testing import ToyModality

ITEMS = 12


class Loud(ToyModality):
    """Files with the loudness of what they hold."""

    name, cue = "loud", "a sound: "

    def load(self, source):
        try:
            return super().load([float(Path(source).read_text())] * 4)
        except OSError as cause:
            raise MediaError(f"Cannot read {source}.") from cause


class Bright(Loud):
    """The same, of what is seen."""

    name, cue = "bright", "a picture: "


@pytest.fixture
def modalities():
    with registered(Loud, Bright):
        yield {name: plugins.get("modality", name)() for name in ("bright", "loud")}


@pytest.fixture
def data(tmp_path):
    """Items whose answer is the sample of the larger number; labels are not balanced."""
    items = []
    for index in range(ITEMS):
        label = int(index % 3 == 0)
        large, small = 10.0 + index, float(index) / ITEMS
        for place in (0, 1):
            for kind in ("b", "l"):
                (tmp_path / f"{kind}-{index}-{place}_7.txt").write_text(str(large if place == label else small))
        captions = ["something strong", "something weak"]
        items.append(
            {
                "sample_ids": [f"{index}-0", f"{index}-1"],
                "start_seconds": [7.0, "7"],
                "label": label,
                "question": "Which audio is  stronger ?",
                "properties": ["", ""],
                "captions": captions[::-1] if label else captions,
                "captions_pred_l": ["a hum"] * 2,
                "captions_pred_b": ["a lamp"] * 2,
            }
        )
    (tmp_path / "items.json").write_text(json.dumps(items))
    return str(tmp_path / "items.json")


INPUTS = [["bright", "b-{id}_{start}.txt"], ["loud", "l-{id}_{start}.txt"]]


def task_of(data, **settings):
    return DiscrnTask(DiscrnTask.Config(data, INPUTS, replace={"audio": "object"}, **settings))


def strength(part) -> float:
    """What a part of a sample tells by itself, wherever it stands."""
    if isinstance(part, Media):
        return float(Path(part.source).read_text())
    return 1.0 if "strong" in part else 0.0


def by_content(sample) -> str:
    """The answer of somebody who knows nothing but what the inputs hold."""
    first, second = map(strength, sample.media[-2:])
    return "the first one" if first > second else "the second one"


def figures(task, modalities, answer):
    lines = [
        {"id": row.id, "unit": row.unit, "truth": row.truth, **row.extra, "answer": answer(row.sample)}
        for row in task.rows(modalities)
    ]
    return {name: figure.value for name, figure in task.score(lines).items()}


@pytest.mark.parametrize("order", ["both", "balanced", "given"])
@pytest.mark.parametrize("mode", ["soft_prompts", "descriptions"])
def test_who_reads_what_is_there_is_right_in_every_order(order, mode, data, modalities):
    got = figures(task_of(data, order=order, modes=[mode]), modalities, by_content)
    assert got[f"{mode}: accuracy"] == 1.0 and got[f"{mode}: says neither"] == 0.0
    if order != "given":
        assert got[f"{mode}: says the first"] == 0.5


@pytest.mark.parametrize(("says", "right"), [("first", 0.5), ("the second one", 0.5), ("both", 0.0)])
def test_who_always_says_the_same_is_at_chance(says, right, data, modalities):
    got = figures(task_of(data), modalities, lambda sample: says)
    assert got["soft_prompts: accuracy"] == right and got["soft_prompts: right in both orders"] == 0.0
    assert got["soft_prompts: says the first"] == float(says == "first")
    given = figures(task_of(data, order="given"), modalities, lambda sample: "first")
    assert given["soft_prompts: accuracy"] == pytest.approx(8 / 12), "as the labels stand"


def test_an_answer_that_names_its_input_is_scored_alike_in_both_orders(data, modalities):
    rows = task_of(data, names={"loud": ["sound"], "bright": ["picture"]}).rows(modalities)
    assert rows[0].extra["names"] == [["bright", "picture"], ["loud", "sound"]]
    assert rows[1].extra["names"] == [["loud", "sound"], ["bright", "picture"]]

    def by_name(sample):
        louder = max(sample.media[-2:], key=strength)
        return {"loud": "the sound", "bright": "the picture"}[louder.modality]

    task = task_of(data, names={"loud": ["sound"], "bright": ["picture"]})
    assert figures(task, modalities, by_name)["soft_prompts: right in both orders"] == 1.0


def test_a_half_stays_whole(data, modalities):
    rows = task_of(
        data, modes=["soft_prompts", "captions"], captions={"loud": "captions_pred_l", "bright": "captions_pred_b"}
    )
    given, _, swapped, captions = rows.rows(modalities)[:4]
    assert [media.modality for media in given.sample.media] == ["bright", "loud"]
    assert swapped.sample.media == given.sample.media[::-1] and swapped.truth == 1 - given.truth == 0
    assert Path(given.sample.media[1].source).name == "l-0-1_7.txt"
    assert captions.sample.media == ["a sound: a hum ", "a picture: a lamp "]
    assert {row.unit for row in (given, swapped, captions)} == {"0"}


def test_the_question_goes_to_the_q_formers_and_a_modality_may_have_its_own(data, modalities):
    row = task_of(data, media_prompts={"loud": "what is heard ? {question}"}, preface="Two inputs. ").rows(modalities)[
        0
    ]
    preface, bright, loud = row.sample.media
    assert preface == "Two inputs. " and bright.instruction == "which object is stronger?"
    assert loud.instruction == "what is heard ? which object is stronger?"
    assert row.sample.instruction == "question: which object is stronger? answer:"


def test_the_question_alone(data, modalities):
    row = task_of(data, modes=["question"]).rows(modalities)[0]
    assert row.sample.media == []


def test_balanced_orders_end_in_as_many_firsts_as_seconds(data, modalities):
    truths = [row.truth for row in task_of(data, order="balanced").rows(modalities)]
    assert truths == [1, 0] * (ITEMS // 2)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"modes": ["soft"]}, ConfigError, 'Unknown mode "soft".*soft_prompts'),
        ({"modes": []}, ConfigError, "modes is empty"),
        ({"order": "swapped"}, ConfigError, 'Unknown order "swapped"'),
        ({"modes": ["captions"]}, ConfigError, 'captions lacks the column of "bright"'),
        ({"prompt": "which?"}, ConfigError, "must hold {question} once"),
        ({"names": {"loudness": []}}, ConfigError, 'names has the unknown modality "loudness".*loud'),
        ({"media_prompts": {"x": ""}}, ConfigError, 'media_prompts has the unknown modality "x"'),
    ],
)
def test_wrong_settings(settings, error, message, data, modalities):
    with pytest.raises(error, match=message):
        task_of(data, **settings).rows(modalities)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([INPUTS[0]], "inputs must be two"),
        ([INPUTS[0], ["dark", "{id}"]], 'does not read "dark"'),
        ([INPUTS[0], ["loud", "x.txt"]], "must hold {id}"),
        ([INPUTS[0], ["loud", "{id}{x}"]], "must hold {id}"),
        ([INPUTS[0], ["loud", "{id"]], "must hold {id}"),
    ],
)
def test_wrong_inputs(inputs, message, data, modalities):
    with pytest.raises(ConfigError, match=message):
        DiscrnTask(DiscrnTask.Config(data, inputs)).rows(modalities)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample_ids": ["a"]}, "entry 2: `sample_ids` must be a list of two"),
        ({"label": 2}, "entry 2: `label` must be 0 or 1"),
        ({"question": ""}, "entry 2: `question` must be words"),
        ({"start_seconds": [1]}, "entry 2: `start_seconds` must be a list of two"),
        ({"captions": None}, "entry 2: `captions` must be a list of two"),
    ],
)
def test_wrong_items(changes, message, data, modalities):
    items = json.loads(Path(data).read_text())
    items[1] |= changes
    Path(data).write_text(json.dumps(items))
    with pytest.raises(InputError, match=message):
        task_of(data, modes=["descriptions"]).rows(modalities)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({}, InputError, "entry 1: `modalities` must be a list of two"),
        ({"modalities": ["loud", "bright"]}, InputError, "entry 1: `sources` must be a list of two"),
        ({"modalities": ["dark", "loud"], "sources": ["a", "b"]}, ConfigError, 'does not read "dark"'),
        ({"modalities": [["loud"], "loud"], "sources": ["a", "b"]}, ConfigError, r"does not read \"\['loud'\]\""),
    ],
)
def test_items_that_name_their_own_inputs_must_do_so(changes, error, message, data, modalities):
    items = [{**item, **changes} for item in json.loads(Path(data).read_text())]
    Path(data).write_text(json.dumps(items))
    with pytest.raises(error, match=message):
        DiscrnTask(DiscrnTask.Config(data)).rows(modalities)


def test_a_run_of_a_sample_keeps_both_orders_of_an_item(data, modalities, llm, tmp_path, monkeypatch):
    branches = {name: make_branch(type(modality), llm) for name, modality in modalities.items()}
    XBlip(llm=llm, branches=branches).eval().save_pretrained(tmp_path / "bundle")
    task = {"kind": "discrn", "data": data, "inputs": INPUTS, "generation": {"max_new_tokens": 2}}
    config = EvalConfig(str(tmp_path / "bundle"), {"pairs": task}, str(tmp_path / "out"), limit=5, use_cpu=True)
    evaluate(config)
    assert len(read_lines(tmp_path / "out" / "pairs.jsonl")) == 10

    def generate(self, samples, **options):
        return [type("Answer", (), {"text": by_content(sample)}) for sample in samples]

    monkeypatch.setattr(XBlip, "generate", generate)
    config.output_dir = str(tmp_path / "by-content")
    accuracy = evaluate(config)["pairs"].figures["soft_prompts: accuracy"]
    assert (accuracy.value, accuracy.n, accuracy.units) == (1.0, 10, 5)
