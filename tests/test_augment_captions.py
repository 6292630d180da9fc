"""`xblip augment`: questions made of captions are checked before they are kept; hostile captions, kills and mistakes."""

import json
from pathlib import Path

import pytest
import yaml

from xblip.agreement import agree, stands_in, which_of, yes_or_no
from xblip.caption_rows import on_one_line, placed, read_captions
from xblip.data import Manifest
from xblip.discrn import DiscrnTask
from xblip.errors import ConfigError, InputError
from xblip.instruct_data import augment, load_augment_config
from xblip.instruct_pairs import PairsConfig, draw_pairs
from xblip.instruct_steps import AugmentConfig, WriterConfig
from xblip.media import FilePart
from xblip.model import XBlip
from xblip.rule_writer import RuleWriter
from xblip.testing import ToyModality
from xblip.writer import LLMWriterConfig, Prompts, Told, check_prompts

RULES = {
    "color": {
        "answers": ["red", "green", "blue"],
        "questions": ["what color is it ?"],
        "checks": ["is it {answer} ?"],
        "contrasts": ["which one is {answer} ?"],
    },
}
CAPTIONS = ["a red one", "a green two", "a blue three", "a red four"]


def write(path: Path, captions) -> str:
    rows = [{"toy": [float(place)] * 4, "caption": text} for place, text in enumerate(captions)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


class Said:
    """What stands in for an LLM: it reads captions right, but for one."""

    def __init__(self, wrong: str = ""):
        self.wrong, self.batches = wrong, []

    def __call__(self, model, samples, **_):
        self.batches.append(len(samples))
        return [type("Answer", (), {"text": self.answer(sample.instruction)}) for sample in samples]

    def answer(self, prompt: str) -> str:
        *captions, question = prompt.split(" | ")
        if self.wrong and self.wrong in captions:
            return "green" if question.startswith("what") else "yes"
        asked = question.split()[-2]
        if question.startswith("which"):
            return "the second" if asked in captions[1] else "the first"
        if question.startswith("is"):
            return "yes" if asked in captions[0] else "no"
        return next(color for color in RULES["color"]["answers"] if color in captions[0])


@pytest.fixture
def said(monkeypatch):
    said = Said()
    monkeypatch.setattr(XBlip, "generate", lambda *args, **options: said(*args, **options))
    return said


@pytest.fixture
def config(tmp_path, llm_folder, toys, said):
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(RULES))
    prompts = Prompts(reply="{caption} | {question}", choice="{first} | {second} | {question}")
    return AugmentConfig(
        data=write(tmp_path / "captions.jsonl", CAPTIONS),
        output_dir=str(tmp_path / "out"),
        writer=WriterConfig(rules=str(tmp_path / "rules.yaml")),
        reader=LLMWriterConfig(str(llm_folder), dtype="float32", prompts=prompts),
        pairs=PairsConfig(5),
        batch_size=3,
        use_cpu=True,
    )


def rows_of(config, name):
    return [json.loads(line) for line in Path(config.output_dir, name).read_text().splitlines()]


def test_questions_yes_and_no_and_pairs_are_manifests_that_training_reads(config):
    augment(config)
    assert rows_of(config, "questions.jsonl")[0] == {
        "toy": [0.0] * 4,
        "question": "what color is it ?",
        "answer": "red",
    }
    yes, no = rows_of(config, "yes_no.jsonl")[:2]
    assert (yes["question"], yes["answer"], no["answer"]) == ("is it red ?", "yes", "no") and yes["toy"] == no["toy"]
    found = sum("fault" not in line for line in rows_of(config, "comparisons.jsonl"))
    assert found
    for name, count in (("questions", 4), ("yes_no", 8), ("pairs", 2 * found)):
        manifest = Manifest(Path(config.output_dir, f"{name}.jsonl"), modalities={"toy": ToyModality()})
        manifest.check()
        assert len(manifest) == count


def test_pairs_stand_in_both_orders_and_are_discrn_items_whose_labels_take_turns(config):
    augment(config)
    rows = rows_of(config, "pairs.jsonl")
    items = json.loads(Path(config.output_dir, "discrn.json").read_text())
    assert [row["answer"] for row in rows] == ["the first one", "the second one"] * len(items)
    assert [item["label"] for item in items] == [place % 2 for place in range(len(items))]
    for item, first, second in zip(items, rows[::2], rows[1::2], strict=True):
        assert first["media"] == second["media"][::-1]
        shown = (first, second)[item["label"]]["media"]
        assert [list(one) for one in zip(item["modalities"], item["sources"], strict=True)] == shown
        asked, captions = item["question"].split()[-2], item["captions"]
        assert asked in captions[item["label"]] and asked not in captions[1 - item["label"]]
        assert item["properties"][item["label"]] == asked and captions == [
            CAPTIONS[int(name)] for name in item["sample_ids"]
        ]


def test_what_augment_makes_is_asked_as_discrn_is(config):
    augment(config)
    path = str(Path(config.output_dir, "discrn.json"))
    items = json.loads(Path(path).read_text())
    rows = DiscrnTask(DiscrnTask.Config(path, modes=["soft_prompts", "descriptions"])).rows({"toy": ToyModality()})
    assert len(rows) == 4 * len(items)
    given, told, swapped, _ = rows[:4]
    assert given.truth == items[0]["label"] == 1 - swapped.truth
    assert [media.source for media in given.sample.media] == items[0]["sources"]
    assert [text.split(": ")[1].strip() for text in told.sample.media] == items[0]["captions"]
    assert given.extra["names"] == [[], []]  # one modality: its name means neither


def test_two_inputs_that_are_called_alike_are_refused_unless_their_modalities_tell(config):
    config.pairs = PairsConfig(5, answers=["the {modality}", "the {modality}"])
    with pytest.raises(ConfigError, match='calls both inputs of a pair "the {modality}".*give two names'):
        augment(config)


def test_what_is_answered_otherwise_falls_out_and_is_counted(config, said):
    said.wrong = "a red one"
    told = augment(config)
    assert len(rows_of(config, "questions.jsonl")) == 3 and len(rows_of(config, "yes_no.jsonl")) == 6
    assert told["fell out"]["answered otherwise"] == 1
    line = rows_of(config, "captions.jsonl")[0]
    assert (line["reply"], line["fault"], line["check"]["replies"]) == ("green", "answered otherwise", ["yes", "yes"])
    shares = {step["step"]: (step["kept"], step["of"]) for step in told["steps"]}
    assert shares["answered alike in the round trip"] == (3, 4) and shares["both answered so"] == (3, 4)
    assert "| answered alike in the round trip | 3 | 4 | 75.0% |" in Path(config.output_dir, "AUGMENT.md").read_text()


def test_hostile_captions_are_put_aside_with_a_reason(config, tmp_path):
    captions = ["a red one", "", "...", "red " * 5000, "a\x00 green\x1b[31m\ntwo", "a {red} {} %s three"]
    config.data, config.pairs = write(tmp_path / "hostile.jsonl", captions), None
    rows = Path(config.data).read_text().splitlines()
    Path(config.data).write_text("\n".join([*rows, rows[0], '{"toy": [1, 2, 3, 4]}', "{", '{"toys": [1]}']))
    told = augment(config)
    aside = rows_of(config, "put_aside.jsonl")
    reasons = {row["reason"] for row in aside}
    assert reasons == {"empty", "too long", "said twice of one file", "row that cannot be read"} and len(aside) == 7
    assert [line["caption"] for line in rows_of(config, "captions.jsonl")] == [
        "a red one",
        "a green [31m two",
        "a {red} {} %s three",
    ]
    assert told["steps"][1]["kept"] == 3 and told["steps"][0]["kept"] == 10
    write(tmp_path / "none.jsonl", ["", "!"])
    config.data = str(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match=r"data holds no caption to work with: .*empty"):
        augment(config)


def test_a_killed_run_goes_on_and_another_is_refused(config, said, monkeypatch):
    class Killed(Exception):
        pass

    config.pairs = None

    def killed(*_, **__):
        if len(said.batches) == 3:
            raise Killed
        return said(*_, **__)

    with monkeypatch.context() as patch:
        patch.setattr(XBlip, "generate", killed)
        with pytest.raises(Killed):
            augment(config)
    assert said.batches == [3, 3, 3]  # question, yes and no of the first three captions
    augment(config)
    assert said.batches[3:] == [1, 1, 1]
    augment(config)
    assert len(said.batches) == 6
    config.seed = 1
    with pytest.raises(ConfigError, match="other settings: seed was 42, is 1"):
        augment(config)


def test_an_llm_writes_by_prompts(config, monkeypatch, llm_folder):
    heard = []

    def generate(self, samples, **_):
        heard.extend(sample.instruction for sample in samples)
        said = {"Gen": "red.", "Ans": "It is red", "Lis": "red, small", "Ask": "Which is red?", "Fir": "First"}
        texts = [said[sample.instruction[:3]] for sample in samples]
        texts = ["Which colour?\nmore" if "Question:" in prompt.instruction and text == "red." else text
                 for prompt, text in zip(samples, texts, strict=True)]  # fmt: skip
        return [type("Answer", (), {"text": text}) for text in texts]

    monkeypatch.setattr(XBlip, "generate", generate)
    config.writer, config.reader = WriterConfig(llm=LLMWriterConfig(str(llm_folder), dtype="float32")), None
    augment(config)
    assert heard[0] == "Generate a potential answer word from the following text: a red one"
    lines = rows_of(config, "captions.jsonl")
    assert (lines[0]["answer"], lines[0]["question"]) == ("red", "Which colour?") and "fault" not in lines[0]
    assert lines[1]["fault"] == "answer is not in the caption"
    assert lines[0]["check"]["yes"] in ("Is this a red one?", "Can it be described as a red one?")
    compared = rows_of(config, "comparisons.jsonl")
    assert all(line["fault"] == "answered otherwise in one order" for line in compared), "it always says the first"


def test_a_tiny_random_llm_goes_through_all_steps(config, monkeypatch, llm_folder):
    monkeypatch.undo()
    config.data = write(Path(config.data), [*CAPTIONS, "red " * 248])  # the last is longer than its context
    small = LLMWriterConfig(str(llm_folder), dtype="float32", generation={"max_new_tokens": 3, "do_sample": False})
    config.writer, config.reader = WriterConfig(llm=small), None
    with pytest.warns(UserWarning, match="does not know"):
        told = augment(config)
    assert told["steps"][1]["kept"] == 5
    assert rows_of(config, "captions.jsonl")[4]["answer"] == ""


@pytest.mark.parametrize(
    ("writer", "reader", "message"),
    [
        ({}, None, "writer must be one of both"),
        ({"rules": "rules.yaml"}, None, "Rules would agree with themselves: name the LLM"),
        ({"rules": "absent.yaml"}, {"source": "x"}, 'No config file at "absent.yaml"'),
        (
            {"llm": {"source": "x", "prompts": {"answer": "Say a word."}}},
            None,
            r"prompts.answer: .* must hold {caption}",
        ),
        ({"llm": {"source": "x", "prompts": {"reply": "{caption} {question} {colour}"}}}, None, "no other braces"),
        ({"llm": {"source": "x", "prompts": {"checks": []}}}, None, "prompts.checks is empty"),
        ({"llm": {"source": "x", "promts": {}}}, None, 'Did you mean "prompts"'),
    ],
)
def test_a_wrong_writer_is_told(config, tmp_path, writer, reader, message):
    path = tmp_path / "augment.yaml"
    values = {"data": config.data, "output_dir": config.output_dir, "writer": writer, "reader": reader}
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match=message):
        augment(load_augment_config(path))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"color": {"answers": ["red"], "questions": ["?"]}}, "must have two `answers`"),
        ({"color": {"answers": ["red", "blue"]}}, "must have two `answers` at least, and `questions`"),
        ({"color": {"answers": ["red", "blue"], "checks": ["is it ?"]}}, r'color: "is it \?" must hold {answer}'),
        ({}, "holds no rule"),
    ],
)
def test_wrong_rules_are_told(tmp_path, rules, message):
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules))
    with pytest.raises(ConfigError, match=message):
        RuleWriter.read(tmp_path / "rules.yaml")


def test_pairs_are_near_and_of_two_modalities_where_there_are(config):
    items, _ = read_captions(config.data, {"toy": ToyModality()})
    pairs = draw_pairs(items, PairsConfig(20, nearest=1), seed=0)
    assert all(pair.wanted.caption != pair.other.caption for pair in pairs) and len(pairs) == 20
    assert {pair.other.caption for pair in pairs if pair.wanted.caption == "a red one"} == {"a red four"}
    with pytest.raises(InputError, match="No two captions differ"):
        draw_pairs(items[:1], PairsConfig(2), seed=0)


def test_a_file_inside_another_cannot_be_named(tmp_path):
    with pytest.raises(InputError, match="lies inside another .*shard.tar.*: unpack"):
        placed(FilePart("shard.tar", "a.txt", 0, 1), tmp_path)
    assert placed(tmp_path / "files" / "a.txt", tmp_path / "out") == "../files/a.txt"


def test_texts_are_compared_by_words():
    assert stands_in("Red", "a red cup.") and not stands_in("red", "scarred") and stands_in("dog", "two dogs")
    assert agree("It is seven", "seven") and not agree("seventeen", "seven") and not agree("not red", "red")
    assert not stands_in("", "anything")
    assert (yes_or_no("Yes, it is."), yes_or_no("no"), yes_or_no("It is not"), yes_or_no("")) == ("yes", "no", "", "")
    names = ["the image", "the sound"]
    assert (which_of("The sound.", names), which_of("the second one", names), which_of("1st", names)) == (1, 1, 0)
    assert which_of("first or second", names) is None and which_of("both", names) is None
    assert on_one_line(" a\tb\u2028c\x07 ") == "a b c"


def test_prompts_that_ship_are_right():
    check_prompts(Prompts())


def test_rules_pass_over_what_is_not_clear(tmp_path):
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(RULES))
    writer = RuleWriter.read(tmp_path / "rules.yaml")
    assert writer.answers([Told("a red one"), Told("red or blue"), Told("a scarred one")]) == ["red", "", ""]
    assert writer.checks([Told("nothing")], [Told("red")]) == [("", "")]
    assert writer.contrasts([Told("a red one")], [Told("a red two")])[0].question == ""
