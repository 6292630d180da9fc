"""Samples: three ways of writing one, and what is wrong with those that are none."""

import numpy as np
import pytest

from xblip.errors import InputError
from xblip.sample import Media, Sample, Turn, from_messages, from_row

KNOWN = ("image", "audio")


def image(**source) -> dict:
    return {"type": "image", **source}


def user(*parts) -> dict:
    return {"role": "user", "content": list(parts)}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


class TestSample:
    def test_pairs_and_text_become_parts_in_order(self):
        sample = Sample("what is this ?", [("image", "a.png"), "and", ["audio", b"x"], Media("image", 3)])
        assert sample.media == [Media("image", "a.png"), "and", Media("audio", b"x"), Media("image", 3)]
        assert sample.all_media == [Media("image", "a.png"), Media("audio", b"x"), Media("image", 3)]

    def test_media_of_earlier_turns_come_first(self):
        history = [Turn((Media("image", 1), "what ?"), "red"), Turn(("and now ?", Media("audio", 2)), "blue")]
        sample = Sample("which ?", [("image", 3)], history=history)
        assert [item.source for item in sample.all_media] == [1, 2, 3]

    @pytest.mark.parametrize("instruction", ["", "  \n", 3])
    def test_an_empty_instruction_is_an_error(self, instruction):
        with pytest.raises(InputError, match="The instruction is empty: say what to do or ask"):
            Sample(instruction)

    def test_there_may_be_no_instruction_at_all(self):
        assert Sample(None, [("image", "a.png")], "red").instruction is None

    def test_where_it_comes_from_makes_no_difference(self):
        assert Sample("what ?", origin="a.jsonl, line 1") == Sample("what ?")

    @pytest.mark.parametrize("media", ["a.png", b"x", Media("image", 1), {"image": "a.png"}, np.zeros((2, 3)), 3])
    def test_media_must_be_a_list(self, media):
        with pytest.raises(InputError, match=r"media must be a list such as \[\(modality, source\), ...\], not"):
            Sample("what ?", media)

    @pytest.mark.parametrize("part", [3, ("image",), ("image", 1, 2), (3, "image"), {"image": 1}, None])
    def test_a_malformed_entry_is_an_error(self, part):
        with pytest.raises(InputError, match="An entry of media must be"):
            Sample("what ?", [part])

    @pytest.mark.parametrize("history", [None, 3, [("what ?", "red")], [Turn((3,), "red")], [Turn(("what ?",), 3)]])
    def test_a_history_that_holds_no_turns_is_an_error(self, history):
        with pytest.raises(InputError, match="history must be a list of Turn|An entry of media must|An answer must"):
            Sample("what ?", history=history)

    @pytest.mark.parametrize("answer", [7, True, ["red"]])
    def test_an_answer_that_is_no_text_is_an_error(self, answer):
        with pytest.raises(InputError, match="An answer must be text, not"):
            Sample("what ?", answer=answer)


class TestRow:
    def test_inputs_by_name_keep_the_row_s_order(self):
        sample = from_row(
            {"audio": "b.wav", "instruction": "which ?", "image": "a.png", "answer": "red"}, modalities=KNOWN
        )
        assert sample == Sample("which ?", [("audio", "b.wav"), ("image", "a.png")], "red")

    def test_media_may_repeat_and_hold_text(self):
        row = {"media": [["image", "a.png"], "beside", ["image", "b.png"]], "instruction": "which ?"}
        assert from_row(row, modalities=KNOWN).media == [Media("image", "a.png"), "beside", Media("image", "b.png")]

    def test_relative_paths_start_at_the_root(self, tmp_path):
        row = {"media": [["image", "a.png"], ["image", "/b.png"], ["image", 7], "text.png"], "instruction": "which ?"}
        media = from_row(row, modalities=KNOWN, root=tmp_path).media
        assert [part.source for part in media[:3]] == [str(tmp_path / "a.png"), "/b.png", 7] and media[3] == "text.png"

    def test_messages_are_one_form(self):
        row = {"messages": [user(image(path="a.png"), text("what ?")), {"role": "assistant", "content": "red"}]}
        assert from_row(row, modalities=KNOWN) == Sample("what ?", [("image", "a.png")], "red")

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"instruction": "what ?", "imge": "a.png"}, 'Unknown key "imge" in a sample. Did you mean "image"?'),
            ({"image": "a.png"}, "A sample lacks its `instruction`; it has image"),
            ({}, "A sample lacks its `instruction`; it has nothing"),
            ({"instruction": None}, "A sample lacks its `instruction`"),
            (
                {"instruction": "what ?", "media": [["imge", "a"]]},
                'Unknown modality "imge" in a sample. Did you mean "image"?',
            ),
            ({"instruction": "what ?", "media": "a.png"}, "media must be a list"),
            ({"instruction": "what ?", "media": None}, "media must be a list"),
            ({"instruction": "what ?", "answer": 7}, "An answer must be text, not 7"),
            ({"instruction": "what ?", 3: "a.png"}, 'Unknown key "3" in a sample'),
            ({"messages": [user(text("what ?"))], 3: "red"}, "has `messages`, .* and 3 beside them"),
            ({"messages": [user(text("what ?"))], "answer": "red"}, "has `messages`, .* and answer beside them"),
        ],
    )
    def test_what_is_wrong_is_named(self, row, message):
        with pytest.raises(InputError, match=message):
            from_row(row, modalities=KNOWN)


class TestMessages:
    def test_the_last_text_is_the_instruction(self):
        sample = from_messages(
            [user(text("first"), image(path="a.png"), text("what ?"), image(image=3))], modalities=KNOWN
        )
        assert sample == Sample("what ?", ["first", ("image", "a.png"), ("image", 3)])

    def test_plain_text_is_enough(self):
        assert from_messages([{"role": "user", "content": "what ?"}], modalities=KNOWN) == Sample("what ?")

    def test_earlier_turns_become_history(self):
        messages = [
            user(image(source="a.png"), text("what ?")),
            {"role": "assistant", "content": [text("red")]},
            user(text("and this ?"), {"type": "audio", "path": "b.wav"}),
        ]
        sample = from_messages(messages, modalities=KNOWN)
        assert sample.history == [Turn((Media("image", "a.png"), "what ?"), "red")]
        assert (sample.instruction, sample.media, sample.answer) == ("and this ?", [Media("audio", "b.wav")], None)

    def test_a_last_answer_is_the_one_to_learn(self):
        messages = [
            {"role": "user", "content": "one ?"},
            {"role": "assistant", "content": "yes"},
            {"role": "user", "content": "two ?"},
            {"role": "assistant", "content": "no"},
        ]
        sample = from_messages(messages, modalities=KNOWN)
        assert sample == Sample("two ?", [], "no", [Turn(("one ?",), "yes")])

    def test_relative_paths_start_at_the_root(self, tmp_path):
        messages = [
            user(image(path="a.png"), text("what ?")),
            {"role": "assistant", "content": "red"},
            user(text("and ?")),
        ]
        assert from_messages(messages, modalities=KNOWN, root=tmp_path).all_media[0].source == str(tmp_path / "a.png")

    @pytest.mark.parametrize(
        ("messages", "message"),
        [
            ([], "There are no messages"),
            ({"role": "user", "content": "a"}, "Messages must be a list"),
            ("what ?", "Messages must be a list"),
            (["what ?"], "Messages must be a list"),
            ([{"role": "assistant", "content": "a"}], "role 'assistant' where \"user\" was expected"),
            ([{"role": "user", "content": "a"}] * 2, "role 'user' where \"assistant\" was expected"),
            ([{"role": "system", "content": "a"}], "role 'system' where \"user\" was expected"),
            ([{"content": "a"}], "role None"),
            ([{"role": "user"}], "content must be text or a list of parts, not NoneType"),
            ([user(image())], 'A part of type "image" names no source'),
            ([user({"type": "imge", "path": "a"})], 'Unknown part of type "imge" in a message. Did you mean "image"?'),
            ([user({"type": ["image"], "path": "a"})], "Unknown part of type .* in a message"),
            (iter([user("what ?")]), "Messages must be a list"),
            ([user({"type": "text"})], 'A part of type "text" lacks its "text"'),
            ([user("words")], "A part of a message must be such as"),
            ([user(image(path="a.png"))], "The instruction is empty"),
            ([user(text(" "))], "The instruction is empty"),
            ([user(text("a")), {"role": "assistant", "content": [image(path="a")]}], "assistant must hold text alone"),
            ([user(text("a")), {"role": "assistant", "content": None}], "assistant must hold text alone"),
        ],
    )
    def test_what_is_wrong_is_named(self, messages, message):
        with pytest.raises(InputError, match=message):
            from_messages(messages, modalities=KNOWN)

    def test_the_caller_s_messages_are_left_as_they_were(self):
        messages = [user(image(path="a.png"), text("what ?"))]
        from_messages(messages, modalities=KNOWN)
        assert messages == [user(image(path="a.png"), text("what ?"))]
