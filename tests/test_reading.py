"""What a model reads of its sources, and how it knows them again: by what they hold, wherever that comes from."""

import copy
import io
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from kit import ONE, THREE, TWO, make_branch, registered, static

from xblip.engine import Engine, EngineConfig
from xblip.errors import MediaError
from xblip.media import media_file
from xblip.model import XBlip
from xblip.requests import Request
from xblip.testing import ToyModality

QUESTION = "what is this ?"
NEW = {"max_new_tokens": 8}


class Rolls(ToyModality):
    """Rows of four numbers, from a file or a list of files; what is open is read by `media_file`."""

    name = "rolls"
    cue = "input : "

    def load(self, source):
        if isinstance(source, (list, tuple)) and not isinstance(source[0], (int, float)):
            return {"values": torch.cat([self.load(part)["values"] for part in source])}
        file = media_file(source, kind=self.name)
        if file is None:
            return super().load(source)
        with file.open() as stream:
            return super().load([float(word) for word in stream.read().split()])


class Streams(ToyModality):
    """The same from what is open alone, and read without help."""

    name = "streams"
    cue = "input : "

    def load(self, source):
        return super().load([float(word) for word in source.read().split()])


@pytest.fixture
def model(llm):
    with registered(Rolls, Streams):
        branches = {"rolls": make_branch(Rolls, llm), "streams": make_branch(Streams, llm)}
    return XBlip(llm=llm, branches=branches).eval()


def text_of(*rows):
    return " ".join(str(number) for row in rows for number in row)


def write(path, *rows):
    path.write_text(text_of(*rows))
    return path


def piped(text):
    """What can be read once, such as an answer from the network."""
    out, into = os.pipe()
    with os.fdopen(into, "w") as file:
        file.write(text)
    return os.fdopen(out, "rb")


def values_of(model, source, name="rolls"):
    return model.encode(**{name: source}).media[0].source.values


def expected_of(model, *rows):
    return model.branches["rolls"].encode([[number for row in rows for number in row]]).values


@pytest.mark.parametrize("name", ["rolls", "streams"])
class TestWhatIsOpen:
    def test_is_read_from_where_it_stands_and_left_there(self, model, tmp_path, name):
        with write(tmp_path / "one.txt", ONE, TWO).open("rb") as file:
            for start, rows in ((0, (ONE, TWO)), (len(text_of(ONE)), (TWO,))):
                file.seek(start)
                expected = model.ask(QUESTION, **{name: io.BytesIO(text_of(*rows).encode())}, **NEW)
                for _ in range(2):
                    assert torch.equal(values_of(model, file, name), expected_of(model, *rows))
                    assert model.ask(QUESTION, **{name: file}, **NEW) == expected
                    assert file.tell() == start

    def test_at_its_end_it_holds_nothing(self, model, tmp_path, name):
        for path, row in ((tmp_path / "one.txt", ONE), (tmp_path / "two.txt", TWO)):
            with write(path, row).open("rb") as file:
                file.read()
                for read in (
                    lambda file=file: model.encode(**{name: file}),
                    lambda file=file: model.ask(QUESTION, **{name: file}),
                ):
                    with pytest.raises(MediaError, match=r"it is empty, or read to its end: seek\(0\) goes back"):
                        read()

    def test_what_can_be_read_once_is(self, model, name):
        with piped(text_of(ONE, TWO)) as first, piped(text_of(ONE, TWO)) as second:
            context = model.encode(**{name: first})
            assert torch.equal(context.media[0].source.values, expected_of(model, ONE, TWO))
            answer = context.ask(QUESTION, **NEW)
            assert model.ask(QUESTION, **{name: second}, **NEW) == answer
        assert answer.explain().inputs[0].effect, "it is held for that, though closed"

    def test_as_text_it_is_refused(self, model, tmp_path, name):
        for read in (model.encode, lambda **given: model.ask(QUESTION, **given)):
            with (
                write(tmp_path / "one.txt", ONE).open() as file,
                pytest.raises(MediaError, match="it is open as text. Open it in binary mode"),
            ):
                read(**{name: file})
            with pytest.raises(MediaError, match="I/O operation on closed file. Open it"):
                read(**{name: file})

    def test_it_may_be_read_again_after_a_failure_beside_it(self, model, tmp_path, name):
        with write(tmp_path / "one.txt", ONE).open("rb") as file:
            samples = [{name: file, "instruction": QUESTION}, {name: io.BytesIO(b"words"), "instruction": QUESTION}]
            expected = model.generate(samples[:1], **NEW)
            with Engine(model, EngineConfig(max_rows=2, wait_ms=10_000)) as engine, ThreadPoolExecutor(2) as threads:
                good, bad = [threads.submit(engine.ask, Request(sample, NEW)) for sample in samples]
                assert good.result(20).answer == expected[0] and bad.exception(20)

    def test_what_can_be_read_once_may_stand_beside_a_failure(self, model, name):
        sample = {"instruction": QUESTION}
        expected = model.generate([{**sample, name: io.BytesIO(text_of(ONE).encode())}], **NEW)
        with piped(text_of(ONE)) as pipe:
            samples = [{**sample, name: pipe}, {**sample, name: io.BytesIO(b"words")}]
            with Engine(model, EngineConfig(max_rows=2, wait_ms=10_000)) as engine, ThreadPoolExecutor(2) as threads:
                good, bad = [threads.submit(engine.ask, Request(sample, NEW)) for sample in samples]
                assert good.result(20).answer == expected[0] and bad.exception(20)


def test_an_open_file_is_known_as_the_file_it_is(model, tmp_path):
    path = write(tmp_path / "one.txt", ONE)
    with path.open("rb") as file:
        assert (
            model.reader.key("rolls", file) == model.reader.key("rolls", path) == model.reader.key("rolls", str(path))
        )


class TestLists:
    def test_of_files_are_known_by_what_is_in_these(self, model, tmp_path, monkeypatch):
        paths = [write(tmp_path / "one.txt", ONE), write(tmp_path / "two.txt", TWO)]
        for given in (paths, [str(path) for path in paths], tuple(paths), [path.read_bytes() for path in paths]):
            assert torch.equal(values_of(model, given), expected_of(model, ONE, TWO))
        assert model.reader.key("rolls", paths) != model.reader.key("rolls", paths[::-1])
        assert model.reader.key("rolls", [paths]) != model.reader.key("rolls", paths)
        write(paths[1], THREE)
        assert torch.equal(values_of(model, paths), expected_of(model, ONE, THREE))
        for name, row in (("here", ONE), ("there", THREE)):
            (tmp_path / name).mkdir()
            write(tmp_path / name / "a.txt", row)
            monkeypatch.chdir(tmp_path / name)
            assert torch.equal(values_of(model, ["a.txt"]), expected_of(model, row))

    def test_of_open_files(self, model, tmp_path):
        with write(tmp_path / "one.txt", ONE).open("rb") as file, piped(text_of(TWO)) as pipe:
            context = model.encode(rolls=[file, pipe])
            assert torch.equal(context.media[0].source.values, expected_of(model, ONE, TWO))
            assert torch.equal(values_of(model, [file]), expected_of(model, ONE))

    def test_that_change_while_they_are_read_are_refused(self, model, tmp_path, monkeypatch):
        paths = [write(tmp_path / "one.txt", ONE), write(tmp_path / "two.txt", TWO)]
        modality = model.branches["rolls"].modality
        load = modality.load
        monkeypatch.setattr(modality, "load", lambda source: (load(source), write(paths[1], THREE))[0])
        with pytest.raises(MediaError, match='": it changed while it was read. Ask again'):
            model.encode(rolls=paths)
        assert model.caches.counters["features"].entries == 0

    def test_with_a_part_that_does_not_say_what_it_holds_have_no_key(self, model, tmp_path):
        path = write(tmp_path / "one.txt", ONE)
        for part in (object(), [path, object()]):
            assert model.reader.key("rolls", [path, part]) is None
        with pytest.raises(MediaError, match="Cannot read rolls 'gone.txt': no such file. Check the path"):
            model.encode(rolls=[path, "gone.txt"])

    def test_of_texts_are_known_by_these(self, model, tmp_path):
        path = write(tmp_path / "one.txt", ONE)
        key = model.reader.key
        assert len({key("rolls", given) for given in (["a"], ["b"], ["a", "b"], ["a", path], ["a", str(path)])}) == 4
        assert None not in (key("rolls", ["a"]), key("rolls", ["a" * 100_000, "\0"]))

    def test_of_texts_that_some_file_or_folder_is_called_by(self, model, tmp_path, monkeypatch):
        key = model.reader.key
        monkeypatch.chdir(tmp_path)
        write(tmp_path / "a", ONE)
        write(tmp_path / "b", ONE)
        (tmp_path / "folder").mkdir()
        assert len({key("rolls", [text]) for text in ("a", "b", "c", "folder")}) == 4
        assert key("rolls", [tmp_path / "a"]) == key("rolls", ["a"]), "a file that was moved is known by its name"

    def test_of_arrays_are_known_by_these(self, model):
        key = model.reader.key
        assert key("rolls", [np.ones(4), 16]) == key("rolls", (np.ones(4), 16)) is not None
        assert key("rolls", [np.ones(4), 16]) != key("rolls", [np.ones(4), 8])


def test_a_home_is_where_it_is_read(model, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = write(tmp_path / "one.txt", ONE)
    assert torch.equal(values_of(model, "~/one.txt"), expected_of(model, ONE))
    assert model.reader.key("rolls", "~/one.txt") == model.reader.key("rolls", path)
    with pytest.raises(MediaError, match='Cannot read "~/none.txt": No such file'):
        model.encode(rolls="~/none.txt")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
class TestAModelOfAnotherDtype:
    """What was encoded before is taken for what it is now; nothing that its bridges made before is."""

    @pytest.fixture
    def model(self, model):
        """One whose LLM no other test has."""
        return copy.deepcopy(model)

    def test_makes_soft_prompts_of_features_anew(self, model, dtype):
        context = model.encode(rolls=ONE + TWO)
        features, before = context.media[0].source, context.ask(QUESTION, **NEW)
        model.to(dtype)
        made = model.caches.counters["prompts"].misses
        assert context.ask(QUESTION, **NEW).token_ids and model.caches.counters["prompts"].misses == made + 2
        [(found, _)] = model.reader.soft_prompts("rolls", [features], [QUESTION])
        [expected] = model.branches["rolls"]([features], [QUESTION])
        assert found.dtype == expected.dtype == dtype and torch.allclose(found, expected, atol=1e-6)
        model.float()
        if dtype is torch.float64:
            assert context.ask(QUESTION, **NEW) == before

    def test_encodes_anew(self, model, dtype):
        """Neither features of its encoder as it was nor such as were rounded are what it reads now."""
        values_of(model, ONE)
        for now in (dtype, torch.float32):
            model.to(now)
            found = values_of(model, ONE)
            assert found.dtype == now and torch.equal(found, model.branches["rolls"].encode([ONE]).values)

    @pytest.mark.parametrize("is_static", [False, True])
    def test_brings_features_to_where_its_bridges_are(self, model, dtype, is_static, monkeypatch):
        model = static(model) if is_static else model
        before, bridge, given = model.encode(rolls=ONE), model.branches["rolls"].bridge, []
        read_media = bridge.read_media
        monkeypatch.setattr(bridge, "read_media", lambda features: given.append(features) or read_media(features))
        model.to(dtype)
        context = model.encode(media=[*before.media, ("rolls", TWO)])
        assert [part.source.values.dtype for part in context.media] == [torch.float32, dtype]
        context.ask(QUESTION, **NEW)
        model.generate([{"media": context.media, "instruction": QUESTION}], **NEW)
        assert {features.values.dtype for features in given} == {dtype}


def test_weights_that_were_loaded_in_inference_mode_are_asked_like_others(model):
    with torch.inference_mode():
        other = copy.deepcopy(model)
    assert other.encode(rolls=ONE).ask("what ?").text == model.encode(rolls=ONE).ask("what ?").text


def test_features_of_before_stand_beside_those_of_another_device(model):
    branch = copy.deepcopy(model.branches["rolls"])
    before = branch.encode([ONE])
    for sources in ([before, TWO], [TWO, before]):
        joined = branch.to("meta").encode(sources)
        assert joined.values.device == joined.mask.device == torch.device("meta") and joined.segments == [1, 1]


class TestTensors:
    def test_of_dtypes_that_numpy_lacks_are_sources_like_others(self, model):
        half = torch.tensor(ONE, dtype=torch.bfloat16)
        assert torch.equal(values_of(model, half), expected_of(model, ONE))
        keys = {model.reader.key("rolls", half.view(dtype)) for dtype in (torch.bfloat16, torch.float16, torch.int16)}
        assert len(keys) == 3 and None not in keys
        assert (
            model.reader.key("rolls", half)
            == model.reader.key("rolls", half.clone())
            != model.reader.key("rolls", half + 1)
        )

    def test_are_told_from_arrays(self, model):
        """A picture's channels are looked for elsewhere in the one than in the other."""
        square = torch.rand(3, 3, 3)
        assert model.reader.key("rolls", square) != model.reader.key("rolls", square.numpy())
        assert model.reader.key("rolls", square[0]) == model.reader.key("rolls", square[0].clone().requires_grad_())

    @pytest.mark.parametrize(
        "source",
        [
            torch.ones(4).to_sparse(),
            torch.ones(4, device="meta"),
            np.ma.masked_less(np.ones(4), 2),
            np.array([{}], dtype=object),
        ],
        ids=["sparse", "meta", "masked", "object"],
    )
    def test_that_do_not_hold_their_numbers_have_no_key(self, model, source):
        assert model.reader.key("rolls", source) is None
