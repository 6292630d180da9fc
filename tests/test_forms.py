"""Rows of training data: the forms they come in, and what is wrong with those that are none."""

import json
from pathlib import Path

import pytest
import yaml

from xblip.errors import ConfigError, InputError
from xblip.forms import Fields, count_parts, read_row
from xblip.sample import Media, Sample, Turn

KNOWN = ("image", "audio", "point_cloud")
TALK = {
    "id": "7",
    "image": "a.png",
    "conversations": [
        {"from": "human", "value": "What is this?\n<image>"},
        {"from": "gpt", "value": "A cup."},
        {"from": "human", "value": "Which colour?"},
        {"from": "gpt", "value": "Red."},
    ],
}


def read(row: dict, **options):
    return read_row(row, modalities=KNOWN, **options)


@pytest.mark.parametrize(
    ("row", "instruction", "answers", "task"),
    [
        ({"instruction": "say it", "answer": "red"}, "say it", {"red": 1}, ""),
        ({"instruction": "say it", "caption": "a cup"}, "say it", {"a cup": 1}, ""),
        ({"caption": "a cup", "image_id": 3}, None, {"a cup": 1}, "caption"),
        ({"captions": ["a cup", "a mug"]}, None, {"a cup": 0.5, "a mug": 0.5}, "caption"),
        ({"label": "cup"}, None, {"cup": 1}, "classification"),
        ({"question": "red?", "answer": "yes"}, "red?", {"yes": 1}, "question"),
        ({"question": "red?", "answer": ["yes", "no", "yes", "yes"]}, "red?", {"yes": 0.75, "no": 0.25}, "question"),
        ({"question": "?", "answers": ["a", "b"], "weights": [3, 1]}, "?", {"a": 0.75, "b": 0.25}, "question"),
        ({"question": "?", "answers": ["a", "b"], "weights": [0, 1]}, "?", {"b": 1}, "question"),
        ({"question": "?", "answers": [{"answer": "a"}, {"answer": "a"}]}, "?", {"a": 1}, "question"),
        (
            {"question": "?", "direct_answers": ["a"], "choices": ["a", "b"], "rationales": []},
            "?",
            {"a": 1},
            "question",
        ),
        ({"question": "?", "answers": ["", "a"], "instruction": None, "caption": ""}, "?", {"a": 1}, "question"),
        ({"instruction": "say it"}, "say it", {}, ""),
    ],
)
def test_forms_of_words(row, instruction, answers, task):
    got = read({"image": "a.png", **row}, origin="a.csv, line 2")
    assert (
        got.sample == Sample(instruction, [("image", "a.png")]) and got.sample.origin == got.origin == "a.csv, line 2"
    )
    assert (got.answers, got.task) == (answers, task)


def test_the_likeliest_answer_is_one_to_show():
    row = read({"image": "a", "question": "?", "answers": ["a", "b", "c", "b", "c"]})
    assert row.answered() == Sample("?", [("image", "a")], "b")
    assert read({"image": "a", "instruction": "?"}).answered().answer is None


def test_paths_start_at_the_root_and_inputs_keep_their_order(tmp_path):
    row = read({"audio": "b.wav", "caption": "c", "image": "/a.png", "media": ["so:"]}, root=tmp_path)
    assert row.sample.media == ["so:", Media("audio", str(tmp_path / "b.wav")), Media("image", "/a.png")]


def test_messages_end_in_the_answer():
    messages = [{"role": "user", "content": [{"type": "image", "path": "a"}, {"type": "text", "text": "?"}]}]
    row = read({"messages": [*messages, {"role": "assistant", "content": "red"}]})
    assert (row.sample, row.answers, row.task) == (Sample("?", [("image", "a")]), {"red": 1}, "")


class TestConversations:
    def test_each_answer_is_a_row_with_what_was_said_before(self, tmp_path):
        image = Media("image", str(tmp_path / "a.png"))
        assert count_parts(TALK) == 2
        first, second = (read(TALK, root=tmp_path, part=part) for part in range(2))
        assert (first.sample, first.answers) == (Sample("What is this?", [image]), {"A cup.": 1})
        history = [Turn(("What is this?", image), "A cup.")]
        assert (second.sample, second.answers) == (Sample("Which colour?", history=history), {"Red.": 1})

    def test_marks_of_any_modality_say_where_its_files_stand(self):
        turns = [{"from": "human", "value": "<image> or <point_cloud> or <image> ?"}, {"from": "gpt", "value": "that"}]
        row = read({"image": ["a.png", "b.png"], "point_cloud": "c.ply", "conversations": turns})
        a, b, c = Media("image", "a.png"), Media("image", "b.png"), Media("point_cloud", "c.ply")
        assert row.sample == Sample("?", [a, "or", c, "or", b])

    def test_without_a_mark_a_file_stands_first(self):
        turns = [{"from": "human", "value": "what ?"}, {"from": "gpt", "value": "a cup"}]
        assert read({"conversations": turns, "image": "a"}).sample == Sample("what ?", [("image", "a")])

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"conversations": "what"}, "`conversations` must be a list such as"),
            ({"conversations": [{"from": "cat", "value": "?"}]}, 'from \'cat\', not from "human" or "gpt"'),
            ({"conversations": [{"from": "human", "value": 3}]}, "The `value` of a turn must be text"),
            ({"conversations": TALK["conversations"][1:]}, "role 'assistant' where \"user\" was expected"),
            ({"image": None, "video": "a.mp4"}, '"video" is no input of this run. Known: .* Rename it with `fields`'),
            (
                {"conversations": [{"from": "human", "value": "<video>\nWhat?"}, TALK["conversations"][1]]},
                "<video> in `conversations` marks no input of this run. Known: audio, image, point_cloud. Rename it",
            ),
            ({"image": ["a", "b"]}, "No <image> in `conversations` says where b stands"),
            ({"image": None}, "<image> stands in `conversations` more often than the row names a file"),
            ({"caption": "a cup"}, "`conversations`, which say everything, and caption beside them"),
        ],
    )
    def test_what_is_wrong_is_named(self, change, message):
        with pytest.raises(InputError, match=message):
            read({**TALK, **change})


def test_several_questions_of_one_record_keep_their_own_answers():
    record = {"image": "a", "questions": ["one ?", "two ?", "three ?"], "answers": [["1", "i"], "2", ["3"]]}
    rows = [read(record, part=part) for part in range(count_parts(record))]
    assert [(row.sample.instruction, list(row.answers)) for row in rows] == [
        ("one ?", ["1", "i"]),
        ("two ?", ["2"]),
        ("three ?", ["3"]),
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"captoin": "a cup"}, 'Unknown key "captoin" in a sample. Did you mean "caption"'),
        ({"imgae": "a", "caption": "a cup"}, 'Unknown key "imgae" in a sample. Did you mean "image"'),
        ({"answer": "red"}, "lacks its `instruction`; it has answer. Add an `instruction` or a `question`, or call"),
        ({"caption": "a", "answer": "b"}, "has `answer` and `caption`: keep one"),
        ({"instruction": "a", "question": "b", "answer": "c"}, "has `instruction` and `question`: keep one"),
        ({"caption": 7}, "An answer must be text, not 7: make it a string"),
        ({"image": "a", "caption": ""}, "A sample's `caption` is empty: fill in, or remove the row"),
        ({"image": "a", "caption": None, "label": ""}, "A sample's `caption` and `label` are empty"),
        ({"question": "?", "answer": {"a": 1}}, "An answer must be text, not {'a': 1}: make it a string"),
        ({"question": 7, "answer": "a"}, "The instruction is empty"),
        ({"question": "?", "answers": ["a", None]}, "An answer must be text, not None"),
        (
            {"question": "?", "answers": ["a", "b"], "weights": [1]},
            r"`weights` must be a list with a number for each of the 2 answers, not \[1\]",
        ),
        ({"question": "?", "answers": ["a"], "weights": 1}, "for each of the 1 answers, not 1"),
        ({"question": "?", "answers": ["a"], "weights": [-1]}, r"must be numbers of at least 0, not \[-1\]"),
        ({"question": "?", "answers": ["a"], "weights": [0]}, "weights of a sample's answers are all 0"),
        ({"questions": ["?"], "answers": ["a", "b"]}, "`questions` must be a list, with `answers` a list of the same"),
        ({"questions": [], "answers": []}, "`questions` is empty"),
    ],
)
def test_what_is_wrong_is_named(row, message):
    with pytest.raises(InputError, match=message):
        read(row)


@pytest.mark.parametrize("source", [5, 1.5, True, None, {"path": "a.png"}])
@pytest.mark.parametrize(
    "row",
    [
        lambda source: {"image": source, "caption": "a cup"},
        lambda source: {"media": [["image", source]], "caption": "a cup"},
        lambda source: {"image": source, "conversations": TALK["conversations"]},
        lambda source: {
            "messages": [
                {"role": "user", "content": [{"type": "image", "path": source}, {"type": "text", "text": "?"}]},
                {"role": "assistant", "content": "a cup"},
            ]
        },
    ],
)
def test_what_can_be_no_source_is_named(row, source):
    if source is None and "media" not in row(source) and "messages" not in row(source):
        return  # an absent column
    with pytest.raises(InputError, match="The source of an input of image must be a path, .*not "):
        read(row(source))


@pytest.mark.parametrize("address", ["http://example.com/a.png", "https://x/a", "s3://bucket/a.png"])
def test_a_url_is_no_path(address, tmp_path):
    with pytest.raises(InputError, match=f'"{address}" is a URL, which is not read. Download it'):
        read({"image": address, "caption": "a cup"}, root=tmp_path)


def test_a_path_may_start_at_home_and_frames_start_at_the_root(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    row = read({"media": [["image", "~/a.png"], ["image", ["b.png", "~/c.png"]]], "caption": "a cup"}, root=tmp_path)
    home = f"{tmp_path}/home"
    assert [media.source for media in row.sample.all_media] == [
        f"{home}/a.png",
        [f"{tmp_path}/b.png", f"{home}/c.png"],
    ]


DOCUMENT = (Path(__file__).parents[1] / "docs" / "data.md").read_text()


def test_the_guide_s_rows_are_rows():
    rows = DOCUMENT.partition("```json\n")[2].partition("```")[0].splitlines()
    assert len(rows) == 10
    for line in rows:
        record = json.loads(line)
        for part in range(count_parts(record)):
            row = read(record, part=part)
            assert row.answers and row.sample.all_media


RECORDS = {
    "webvid": {"videoid": 31, "name": "a dog", "page_dir": "0001", "duration": "PT1S"},
    "audiocaps": {"audiocap_id": "1", "youtube_id": "-_a", "start_time": "30", "caption": "a dog"},
    "audiocaps_qa": {"youtube_id": "-_a", "start_time": 30, "caption": "c", "question": "what ?", "answer": "a dog"},
    "audioset": {"YTID": "--4", "start": "0.000", "end": "10.000", "positive_labels": "speech"},
    "wavcaps": {"audio_path": "a.wav", "caption": "a dog", "id": "1", "duration": 3.5},
    "objaverse": {"sample_id": "f00", "data": ["a dog", "a toy"]},
    "objaverse_qa": {"sample_id": "f00", "caption": "c", "question": "what ?", "answer": "a dog"},
    "clotho_aqa": {"file_name": "a b.wav", "QuestionText": "a dog ?", "answer": "yes"},
    "ocr_vqa": {"sample_id": "0b1", "questions": ["who ?", "what ?"], "answers": ["X", "Y"], "imageURL": "http"},
    "laion": {"image": "x.jpg", "txt": "a dog", "url": "http"},
}


@pytest.mark.parametrize("name", RECORDS)
def test_the_guide_s_fields_read_what_others_annotated(name):
    fields = yaml.safe_load(DOCUMENT.partition("```yaml\n")[2].partition("```")[0])
    assert set(fields) == set(RECORDS)
    if name == "laion":  # its image is a member of a tar, which no field names
        fields[name]["image"] = "image"
    values = Fields(fields[name], modalities=(*KNOWN, "video")).of(RECORDS[name])
    for part in range(count_parts(values)):
        row = read_row(values, modalities=(*KNOWN, "video"), part=part)
        assert row.answers and len(row.sample.all_media) == 1 and "{" not in row.sample.all_media[0].source
    assert name != "audioset" or row.sample.all_media[0].source == "--4_0.0-10.0.wav"


@pytest.mark.parametrize(
    ("record", "answers"),
    [
        ({"image": "a.jpg", "caption": "a dog", "image_id": "coco_1"}, ["a dog"]),
        ({"video": "a.mp4", "caption": "a dog", "image_id": 3}, ["a dog"]),
        ({"video": "a.mp4", "question": "what ?", "answer": "dog", "question_id": 3}, ["dog"]),
        ({"image": "a.jpg", "question": "what ?", "answer": ["dog", "dog", "cat"], "dataset": "vqa"}, ["dog", "cat"]),
        (
            {"image": "a.jpg", "question": "what ?", "direct_answers": ["dog"], "choices": ["a", "b"], "split": "v"},
            ["dog"],
        ),
    ],
)
def test_annotations_that_need_no_fields(record, answers):
    assert list(read_row(record, modalities=(*KNOWN, "video")).answers) == answers


class TestFields:
    @pytest.mark.parametrize(
        ("fields", "record", "values"),
        [
            (
                {"image": "images/{videoid}.mp4", "caption": "name"},
                {"videoid": 31, "name": "a cup", "page_dir": "x"},
                {"image": "images/31.mp4", "caption": "a cup"},
            ),
            (
                {"audio": "{youtube_id}_{start_time}.flac", "caption": "caption"},
                {"youtube_id": "-_a", "start_time": 30, "caption": "a dog"},
                {"audio": "-_a_30.flac", "caption": "a dog"},
            ),
            (
                {"audio": "{YTID}_{start:.1f}-{end:.1f}.wav"},
                {"YTID": "x", "start": "30", "end": 40.0},
                {"audio": "x_30.0-40.0.wav"},
            ),
            ({"audio": "{file name}.wav", "image": "i"}, {"file name": "a"}, {"audio": "a.wav"}),
            ({"image": "{{a}}/{b}", "audio": "{c}"}, {"b": "x", "c": ""}, {"image": "{a}/x"}),
            (None, {"image": "a", "any": 1}, {"image": "a", "any": 1}),
        ],
    )
    def test_columns_become_ours(self, fields, record, values):
        assert Fields(fields, modalities=KNOWN).of(record) == values

    def test_a_column_that_is_not_there_suggests_the_nearest(self):
        fields = Fields({"image": "{videoid}.mp4", "caption": "nam"}, modalities=KNOWN)
        assert 'fields.caption takes the column "nam", which is not there. Did you mean "name"?' in fields.missing(
            ["videoid", "name"]
        )

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"imgae": "a"}, 'Unknown key "imgae" in fields. Did you mean "image"'),
            ({"image": 3}, "fields.image must be a column's name, or a text such as"),
            ({"image": "{id"}, 'fields.image: "{id" is no format string over columns'),
            ({"image": "{id.__class__}"}, "is no format string over columns: name a column in each pair of braces"),
            ({"image": "{}.png"}, "is no format string over columns: name a column in each pair of braces"),
        ],
    )
    def test_what_is_wrong_is_named(self, fields, message):
        with pytest.raises(ConfigError, match=message):
            Fields(fields, modalities=KNOWN)

    def test_a_value_that_cannot_be_formatted_is_named(self):
        with pytest.raises(InputError, match=r"fields.audio cannot format \"start\", 'soon', as '.1f'"):
            Fields({"audio": "{start:.1f}.wav"}, modalities=KNOWN).of({"start": "soon"})
