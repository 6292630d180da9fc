"""The cross-modal report: each way is asked as it says, files are encoded once, and figures say what they claim."""

import itertools
import json
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_docs import needs_numerals

from xblip import plugins
from xblip.branch import Branch
from xblip.crossmodal_rows import read_rows
from xblip.crossmodal_score import Report, figures_of, marks_of
from xblip.errors import ConfigError, InputError, XBlipError
from xblip.evaluate import EvalConfig, evaluate
from xblip.model import XBlip
from xblip.runs import read_lines
from xblip.sample import Media

pytestmark = pytest.mark.slow  # most of them ask a whole model, some in every way

MISREAD = 4
"""The number that the pretended model reads as 5."""


def single(number):
    return {
        "id": f"single-{number}", "kind": "number", "media": [["toy", source(number)]], "instruction": "what is this ?",
        "answer": str(number), "chance": 0.1, "descriptions": [f"shows {number}"], "captions": ["a number"],
        "part": "toy: number",
    }  # fmt: skip


def source(number):
    return [float(number), 0.0, 0.0, 0.0]


def pair(first, second, modality="toy"):
    """Which is larger: "first" or "second"; by place, so that answers follow an order."""
    sides = ["first", "second"]
    return {
        "id": f"pair-{first}-{second}", "kind": "larger", "media": [["toy", source(first)], [modality, source(second)]],
        "instruction": "which is larger ?", "answer": sides[second > first], "chance": 0.5,
        "descriptions": [f"shows {first}", f"shows {second}"], "captions": ["a number", f"shows {second}"],
        "parts": ["toy: number", f"single-{second}"], "swapped": {"answer": sides[first > second]},
        "replaced": {"media": [["toy", source(second)], [modality, source(first)]], "answer": sides[first > second]},
    }  # fmt: skip


ROWS = [*map(single, range(8)), pair(1, 2), pair(3, 0), pair(7, 4), pair(4, 5), pair(6, 2)]


@pytest.fixture
def written(tmp_path):
    """Writes rows; returns the file."""

    def write(rows, name="rows.jsonl") -> Path:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path / name

    return write


@pytest.fixture
def config(bundle, written, tmp_path, toys):
    task = {"kind": "crossmodal", "data": str(written(ROWS))}
    return EvalConfig(str(bundle), {"across": task}, str(tmp_path / "out"), batch_size=4, use_cpu=True)


@pytest.fixture
def pretended(monkeypatch):
    """A model that reads numbers, but 4 as 5, answers from what it sees or is told, and says "first" if it cannot know."""
    asked = SimpleNamespace(encoded=Counter(), samples=[])

    class Read(list):
        def split(self):
            return [SimpleNamespace(values=torch.zeros(1), mask=torch.zeros(1), number=int(own[0])) for own in self]

    def encode(self, sources):
        asked.encoded.update(map(str, sources))
        return Read(sources)

    def number_of(part):
        if isinstance(part, Media):
            return 5 if part.source.number == MISREAD else part.source.number
        return int(found[0]) if (found := re.findall(r"\d", part)) else None

    def generate(self, samples, **options):
        asked.samples += samples
        return [SimpleNamespace(text=answer(sample)) for sample in samples]

    def answer(sample):
        seen = [number_of(part) for part in sample.media]
        if sample.instruction.startswith("describe"):
            return f"it shows {seen[0]} ."
        if sample.instruction == "what is this ?":
            return str(seen[0]) if seen and seen[0] is not None else "zero"
        return "second" if len(seen) == 2 and None not in seen and seen[1] > seen[0] else "first"

    monkeypatch.setattr(Branch, "encode", encode)
    monkeypatch.setattr(XBlip, "generate", generate)
    return asked


def value(result, name):
    return result.figures[name].value


def test_every_way_is_asked_as_it_says(config, pretended):
    result = evaluate(config)["across"]
    assert value(result, "one input: soft prompts") == 7 / 8
    assert value(result, "one input: true descriptions") == 1.0
    assert value(result, "one input: own captions") == 7 / 8
    assert value(result, "one input: people's captions") == 1 / 8  # "zero", which is right once
    assert value(result, "two inputs: soft prompts") == 4 / 5  # of 4 and 5, read as 5 and 5, it says the first
    assert value(result, "two inputs: true descriptions") == 1.0
    assert value(result, "two inputs: people's captions") == 3 / 5
    assert value(result, "two inputs: one input alone") == value(result, "two inputs: question alone") == 3 / 5
    assert value(result, "two inputs: chance") == 0.5
    assert value(result, "two inputs: order swapped") == 1.0  # 5 and 5 the other way round: the first, and right
    assert value(result, "two inputs: alike in both orders") == 4 / 5
    assert value(result, "two inputs: inputs replaced") == 1.0
    assert value(result, "two inputs: replaced, but as before") == 0.0
    assert {measured.n for name, measured in result.figures.items() if name.startswith("two")} == {5}


def test_a_file_is_encoded_once_and_words_stand_after_their_cue(config, pretended):
    evaluate(config)
    assert set(pretended.encoded.values()) == {1} and len(pretended.encoded) == 8
    texts = {part for sample in pretended.samples for part in sample.media if isinstance(part, str)}
    assert any(re.fullmatch(r"\w.*shows 7", text) for text in texts) and any("it shows 5 ." in text for text in texts)
    line = next(line for line in read_lines(Path(config.output_dir, "across.jsonl")) if line["id"] == "pair-4-5")
    assert line["own_captions"] == ["it shows 5 .", "it shows 5 ."]
    assert (
        line["answers"]["one input alone"] == ["first", "first"] and line["scores"]["two inputs: soft prompts"] == 0.0
    )


def test_the_product_of_the_parts(config, pretended):
    evaluate(config)
    told = json.loads(Path(config.output_dir, "across.figures.json").read_text())
    two = told["sizes"]["two inputs"]
    # One part is all rows of that name, 7 of 8; the other is the very file: 4 alone is misread, in one row of five.
    assert two["product"]["value"] == pytest.approx(7 / 8 * 4 / 5)
    assert two["ratio"]["value"] == pytest.approx(8 / 7)
    assert two["ratio"]["low"] < 8 / 7 < two["ratio"]["high"]
    assert two["ways"]["question alone"]["soft_prompts_more"]["p"] is not None
    assert told["parts"]["toy: number"]["n"] == 8 and told["files"] == 8


def test_a_resumed_run_asks_what_is_missing_and_writes_the_same_pages(config, pretended):
    evaluate(config)
    pages = [Path(config.output_dir, f"across{end}") for end in (".html", ".md", ".figures.json")]
    before = [page.read_text() for page in pages]
    lines = Path(config.output_dir, "across.jsonl")
    kept = lines.read_text().splitlines(keepends=True)[:6]
    lines.write_text("".join(kept))
    del pretended.samples[:]
    evaluate(config)
    assert [page.read_text() for page in pages] == before
    assert not any(sample.origin.endswith("line 1") for sample in pretended.samples)


def test_pages_stand_alone_and_say_what_they_show(config, pretended):
    evaluate(config)
    page, text = (Path(config.output_dir, f"across{end}").read_text() for end in (".html", ".md"))
    assert "<script" not in page and "src=" not in page and page.count("<svg") >= 3
    assert not re.search(r"nan|None", page + text)
    for name in ("true descriptions", "product of the parts", "alike in both orders", "one input alone"):
        assert name in page and f"| {name} |" in text.replace("*", "")
    assert "**Two inputs**: soft prompts answer 80.0" in text and "of the product of the parts" in text


def test_only_the_ways_that_are_wanted(config, pretended):
    config.tasks["across"]["ways"] = ["question alone"]
    figures = evaluate(config)["across"].figures
    assert {name.split(": ")[1] for name in figures} == {"soft prompts", "question alone", "chance"}
    assert not any(sample.instruction.startswith("describe") for sample in pretended.samples)


def test_a_scorer_that_reads_names_is_the_same_in_both_orders():
    line = {"truth": ["the image"], "swapped_truth": ["the image"], "answers": {}}
    for soft, swapped, alike in (("image", "the image", 1.0), ("The image.", "audio", 0.0), ("audio", "audio", 1.0)):
        line["answers"] = {"soft prompts": [soft], "order swapped": [swapped]}
        assert marks_of(line)["alike in both orders"] == alike


def lines_about(count, seed=0):
    """Lines of two inputs whose parts are read right in nine of ten cases, independently."""
    chance = np.random.default_rng(seed)
    lines = [
        {"id": f"s{i}", "inputs": [["toy", f"s{i}"]], "group": "toy", "kind": "number", "truth": ["yes"], "part": "toy",
         "answers": {"soft prompts": ["yes" if chance.random() < 0.9 else "no"]}}
        for i in range(count)
    ]  # fmt: skip
    for i in range(count):
        right = (chance.random(2) < 0.9).all()
        answers = {"soft prompts": ["yes" if right else "no"], "true descriptions": ["yes"]}
        lines.append(
            {"id": f"p{i}", "inputs": [["toy", f"a{i}"], ["toy", f"b{i}"]], "group": "toy + toy", "kind": "same",
             "truth": ["yes"], "parts": ["toy", "toy"], "answers": answers}
        )  # fmt: skip
    return lines


def test_intervals_of_the_share_hold_the_truth_where_parts_are_independent():
    found = [Report(lines_about(150, seed), resamples=200).told()["sizes"]["two inputs"]["ratio"] for seed in range(30)]
    held = sum(ratio["low"] <= 1 <= ratio["high"] for ratio in found)
    assert held >= 26, f"{held} of 30 intervals of 95 % hold the truth"


def test_figures_are_those_of_the_report():
    lines = lines_about(50)
    told = Report(lines, resamples=100).told()
    for name, figure in figures_of(lines).items():
        size, way = name.split(": ")
        assert told["sizes"][size]["ways"][way]["value"] == figure.value


def test_units_that_share_files_are_counted(written, toys):
    rows = read_rows(written([pair(1, 2), {**pair(1, 2), "id": "again"}, *map(single, (1, 2))]), ["toy"])
    assert rows[0].unit == rows[1].unit != rows[2].unit
    lines = lines_about(3)
    lines[0]["inputs"] = lines[3]["inputs"][:1]
    assert Report(lines, resamples=10).told()["files_in_several_units"] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": None}, r"line 9: A row lacks its `answer`; it has id, kind"),
        ({"captoins": []}, r'Unknown key "captoins" in a row. Did you mean "captions"\?'),
        ({"media": []}, "lacks its `media`"),
        ({"media": [["toy", [1.0] * 4], "and"]}, r"`media` must be a list of \[modality, path\] and nothing else"),
        ({"media": [["toi", [1.0] * 4]]}, 'Unknown modality "toi"'),
        ({"answer": " "}, "and `answer` words"),
        ({"accepted": "one"}, "`accepted` must be a list"),
        ({"chance": 50}, "`chance` must be a share from 0 to 1, not 50"),
        ({"descriptions": ["one"]}, "`descriptions` must be a list of 2 texts, one for each input"),
        ({"parts": "toy"}, "`parts` must be a list of names"),
        ({"parts": ["toy: size"]}, r'no row about one input has the part "toy: size".*measured: toy: number'),
        ({"part": "toy"}, "`part` is for rows about one input, and this one has 2"),
        ({"media": [["toy", [1.0] * 4]], "descriptions": None, "captions": None}, "`parts` is for rows about several"),
        ({"swapped": []}, "`swapped` must be an object with keys"),
        ({"swapped": {"order": [0, 1]}}, "leaves the inputs where they are"),
        ({"swapped": {"order": [0, 2]}}, "`order` must have each of the 2 places"),
        ({"swapped": {"answer": "one", "accepted": "one"}}, "`accepted` must be a list"),
        ({"replaced": {"answer": "one"}}, "`replaced` lacks its `media`"),
        ({"replaced": {"media": [["toy", [1.0] * 4]], "answer": "x"}}, "of the same modalities: toy, toy, not toy"),
        ({"id": "single-3"}, r'the id "single-3" is that of .*line 4 too'),
        ({"kind": 3}, "`kind` must be text, not 3"),
    ],
)
def test_a_wrong_row_is_told(written, toys, changes, message):
    rows = [*map(single, range(8)), {**pair(1, 2), **changes}]
    with pytest.raises(InputError, match=message):
        read_rows(written(rows), ["toy", "beads"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ways": ["soft prompt"]}, 'Unknown way "soft prompt" to ask. Did you mean "soft prompts"'),
        ({"describe": ""}, "describe must be a text, or one for each modality"),
        ({"describe": {"toy": "describe it"}}, 'describe lacks the modality "beads"'),
        ({"describe": {"tou": "describe it"}}, 'describe has the unknown modality "tou"'),
        ({"data": "nowhere.jsonl"}, 'No manifest at "nowhere.jsonl"'),
    ],
)
def test_wrong_settings_are_told(config, settings, message):
    config.tasks["across"] |= settings
    with pytest.raises(ConfigError, match=message):
        evaluate(config)


def test_features_that_do_not_fit_are_made_again(config, pretended, monkeypatch):
    whole = evaluate(config)
    monkeypatch.setattr("xblip.crossmodal.KEPT_BYTES", 12)
    pretended.encoded.clear()
    config.output_dir += "-small"
    assert evaluate(config) == whole and max(pretended.encoded.values()) > 1


def test_a_broken_file_is_named_and_the_others_are_asked(bundle, written, tmp_path, toys):
    rows = [single(1), single(2), {**single(3), "media": [["toy", [1.0]]]}]
    task = {"kind": "crossmodal", "data": str(written(rows)), "generation": {"max_new_tokens": 2}}
    config = EvalConfig(str(bundle), {"across": task}, str(tmp_path / "out"), max_skipped=0.5, use_cpu=True)
    result = evaluate(config)["across"]
    assert (result.asked, result.skipped) == (3, 1)
    config.max_skipped, config.output_dir = 0.0, str(tmp_path / "none")
    with pytest.raises(XBlipError, match="1 of 3 rows name files that cannot be read"):
        evaluate(config)


@needs_numerals
def test_the_numerals_answer_from_their_inputs(tmp_path):
    demo = Path(plugins.get("model", "numerals")).parent / "demo"
    files = [json.loads(line) for line in (demo / "manifest.jsonl").read_text().splitlines()]
    by_modality = {file["modality"]: file for file in files}
    rows = []
    for file in by_modality.values():
        name = file["modality"].replace("_", " ")
        rows.append(
            {"id": name, "kind": "number", "media": [[file["modality"], file["path"]]], "part": name, "chance": 0.1,
             "instruction": "which number is it?", "answer": file["facts"]["number"]}
        )  # fmt: skip
    names = list(by_modality)
    for first, second in itertools.pairwise(names):
        media = [[name, by_modality[name]["path"]] for name in (first, second)]
        a, b = (name.replace("_", " ") for name in (first, second))
        numbers = [by_modality[name]["facts"]["number"] for name in (first, second)]
        same = "yes" if len(set(numbers)) == 1 else "no"
        rows.append(
            {"media": media, "kind": "same", "instruction": f"do the {a} and the {b} show the same number?",
             "answer": same, "parts": [a, b], "swapped": {}}
        )  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"kind": "crossmodal", "data": str(tmp_path / "rows.jsonl"), "root": str(demo), "ways": []}
    task["ways"] = ["question alone", "one input alone", "order swapped"]
    config = EvalConfig("numerals", {"across": task}, str(tmp_path / "out"), use_cpu=True)
    figures = evaluate(config)["across"].figures
    assert figures["one input: soft prompts"].value >= 0.5 > figures["one input: question alone"].value
    assert {"two inputs: alike in both orders", "two inputs: one input alone"} <= set(figures)
    assert (tmp_path / "out" / "across.html").stat().st_size > 5000
