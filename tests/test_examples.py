"""Examples: what visits become, wherever they are made; rows whose files are broken; the account of these."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from test_data import Numbers, together
from torch.utils.data import DataLoader

from xblip.data import Manifest, Visit
from xblip.errors import ConfigError, InputError, MediaError, XBlipError
from xblip.examples import ContextConfig, Examples, SkipLog, Skipped, collate_examples
from xblip.mixture import BatchPlan, Source
from xblip.modality import Features
from xblip.sample import Sample
from xblip.templates import Templates
from xblip.testing import ToyModality

TEMPLATES = {
    "numbers": Templates(
        caption=["say it", "describe it", "what is this ?"],
        question=["{question}", "look : {question} answer :"],
        classification=["which ?"],
    )
}


@pytest.fixture
def make(tmp_path):
    """Makes a manifest of rows, each of which gets a file of its own; those in `broken` hold no numbers."""

    def made(rows: list[dict], *, broken=(), name="a") -> Manifest:
        lines = []
        for index, row in enumerate(rows):
            file = tmp_path / f"{name}{index}.num"
            file.write_text("1 2 x" if index in broken else f"{index} 0 0 0")
            lines.append(json.dumps({"numbers": file.name, **row} if "toy" not in row else row))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        return Manifest(tmp_path / f"{name}.jsonl", modalities={"numbers": Numbers(), "toy": ToyModality()})

    return made


def examples(*manifests, stage="instruct", **options) -> Examples:
    return Examples(manifests, **{"stage": stage, "seed": 5, "templates": TEMPLATES, **options})


def value_of(sample: Sample) -> float:
    return sample.all_media[0].source["values"][0, 0].item()


def test_a_visit_is_the_same_sample_in_any_process_and_another_the_next_time(make):
    rows = [{"captions": [f"a {index}", f"b {index}", f"c {index}"]} for index in range(12)]
    made = examples(make(rows))
    plan = BatchPlan([Source(12)], batch_size=4, seed=1)
    seen = []
    for workers in (0, 2, 0):
        loader = DataLoader(made, batch_sampler=plan, num_workers=workers, collate_fn=collate_examples)
        seen.append([sample for batch in loader for sample in batch["samples"]])
    shown = [[(s.origin, s.instruction, s.answer, value_of(s)) for s in samples] for samples in seen]
    assert shown[0] == shown[1] == shown[2] and len(shown[0]) == 12
    alone = made[Visit(0, 3, 0)]
    assert (alone.origin, alone.instruction, alone.answer, value_of(alone)) in shown[0]
    drawn = Counter((made[Visit(0, 3, epoch)].instruction, made[Visit(0, 3, epoch)].answer) for epoch in range(60))
    assert len(drawn) == 9


def test_answers_are_drawn_by_weight(make):
    made = examples(make([{"question": "red ?", "answers": ["yes", "no", "yes", "maybe"], "weights": [2, 1, 1, 0]}]))
    drawn = Counter(made[Visit(0, 0, epoch)].answer for epoch in range(400))
    assert set(drawn) == {"yes", "no"} and 260 < drawn["yes"] < 340


def test_5_answers_of_a_batch_are_laid_to_other_rows(make):
    """The original flattens all answers of a batch: of rows with 2, 1 and 1 answers it teaches the first one's second
    answer to the second row."""
    rows = [
        {"question": "q0", "answers": ["a0", "a0'"]},
        {"question": "q1", "answers": ["a1"]},
        {"question": "q2", "answer": "a2"},
    ]
    made = examples(make(rows), templates=None)
    for epoch in range(8):
        batch = collate_examples(made.__getitems__([Visit(0, index, epoch) for index in range(3)]))["samples"]
        assert [sample.answer.rstrip("'") for sample in batch] == ["a0", "a1", "a2"]
        assert [sample.instruction for sample in batch] == ["q0", "q1", "q2"]
        assert [value_of(sample) for sample in batch] == [0.0, 1.0, 2.0]


class TestTemplates:
    def test_each_task_gets_its_own(self, make):
        manifest = make([{"caption": "c"}, {"question": "red {x} ?", "answer": "a"}, {"label": "l"}])
        manifest.path.write_text(
            manifest.path.read_text() + '\n{"toy": [1,2,3,4], "instruction": "own", "answer": "a"}'
        )
        manifest = Manifest(manifest.path, modalities=manifest.modalities)
        made = examples(manifest)
        got = [{made[Visit(0, index, epoch)].instruction for epoch in range(30)} for index in range(4)]
        assert got == [
            set(TEMPLATES["numbers"].caption),
            {"red {x} ?", "look : red {x} ? answer :"},
            {"which ?"},
            {"own"},
        ]
        made.check()

    def test_a_stage_without_instructions_needs_none(self, make):
        made = examples(make([{"caption": "c"}, {"question": "red ?", "answer": "a"}]), stage="generate")
        assert [made[Visit(0, index, 0)].instruction for index in range(2)] == [None, "red ?"]
        made.check()

    @pytest.mark.parametrize("asked", ["question", "instruction"])
    def test_answers_are_no_captions_to_align_by(self, make, asked):
        made = examples(make([{"caption": "c"}, {"label": "c"}, {asked: "red ?", "answer": "no"}]), stage="align")
        assert [made[Visit(0, index, 0)].instruction for index in range(2)] == [None, None]
        with pytest.raises(InputError, match="a.jsonl: a row has an instruction or a question.* Give the rows a `cap"):
            made.check()
        with pytest.raises(InputError, match="a.jsonl, line 3: a row has an instruction or a question"):
            made[Visit(0, 2, 0)]

    def test_questions_are_bare_without_templates(self, make):
        made = examples(make([{"question": "red ?", "answer": "a"}]), templates={})
        made.check()
        assert made[Visit(0, 0, 0)].instruction == "red ?"

    @pytest.mark.parametrize(("key", "task"), [("caption", "caption"), ("label", "classification")])
    def test_a_task_that_lacks_them_is_an_error_that_says_what_to_do(self, make, key, task):
        made = examples(make([{key: "c"}]), templates={"numbers": Templates(question=["{question}"])})
        message = f"stage instruct needs one. Name a file with {task} templates for numbers, or give the rows an `instr"
        with pytest.raises(ConfigError, match=message):
            made.check()
        with pytest.raises(ConfigError, match=rf"a.jsonl, line 1: .*{message}"):
            made[Visit(0, 0, 0)]


class TestBrokenFiles:
    ROWS = [{"instruction": "what ?", "answer": f"{index}"} for index in range(40)]

    def test_another_row_of_the_source_takes_the_place_and_it_is_told(self, make):
        made = examples(make(self.ROWS, name="b"), make(self.ROWS, broken=range(0, 40, 2)))
        visits = [Visit(1, index, 2) for index in range(8)]
        found = made.__getitems__(visits)
        batch = collate_examples(found)
        assert [item for item in found if isinstance(item, (Sample, Skipped))] == found
        assert len(batch["samples"]) == 8 and all(int(sample.answer) % 2 for sample in batch["samples"])
        assert [value_of(sample) for sample in batch["samples"]] == [float(s.answer) for s in batch["samples"]]
        assert {item.origin.rpartition(" ")[2] for item in batch["skipped"]} >= {"1", "3", "5", "7"}
        assert all(".num" not in item.origin and "could not convert" in item.reason for item in batch["skipped"])
        assert all("a.jsonl" in sample.origin for sample in batch["samples"])
        again = made.__getitems__(visits)
        assert [item for item in again if isinstance(item, Skipped)] == batch["skipped"]
        assert collate_examples(again)["samples"][0].answer == batch["samples"][0].answer

    def test_a_bad_row_is_an_error_and_not_skipped(self, make):
        rows = [{"toy": [1, 2], "caption": "c"}, {"toy": [1, 2, 3, 4], "captoin": "c"}, {"instruction": "what ?"}]
        errors = examples(make(rows), templates={"toy": TEMPLATES["numbers"]}).__getitems__(
            [Visit(0, index, 0) for index in range(3)]
        )
        assert [type(error) for error in errors] == [InputError] * 3
        for error, message in zip(
            errors, ("line 1: A toy input", 'line 2: Unknown key "cap', "line 3: it has no answer"), strict=True
        ):
            assert message in str(error)

    def test_files_that_are_all_broken_stop_it(self, make):
        made = examples(make(self.ROWS, broken=range(40)))
        *skipped, error = made.__getitems__([Visit(0, 0, 0)])
        assert len(skipped) == 100 and isinstance(error, MediaError)
        different = len({item.origin for item in skipped})
        assert different <= 40 and str(error).startswith(f"{different} rows of ")
        assert "Check the files; relative paths start at the manifest, or at its `root`" in str(error)
        with pytest.raises(XBlipError, match=f"{different} rows of"):
            made[Visit(0, 0, 0)]


def test_features_stand_in_for_files(make):
    class Store:
        def features(self, source):
            if source.endswith("a1.num"):
                raise MediaError("This file has changed.")
            return Features(torch.ones(1, 2, 3), torch.ones(1, 2, dtype=torch.bool), [1])

    made = examples(make(TestBrokenFiles.ROWS), features={"numbers": Store()})
    assert made[Visit(0, 0, 0)].media[0].source.values.shape == (1, 2, 3)
    skipped, sample = made.__getitems__([Visit(0, 1, 0)])
    assert skipped.reason == "This file has changed." and sample.answer != "1"


class TestContext:
    @pytest.fixture
    def texts(self, tmp_path):
        (tmp_path / "texts.txt").write_text("audio: a dog\n\nvideo: a cat\n3d: a cup\n")
        return str(tmp_path / "texts.txt")

    def test_texts_stand_before_and_after_in_every_number(self, make, texts):
        context = ContextConfig(texts, share=0.75, most=2)
        made = examples(make([{"instruction": "what ?", "answer": "a"}]), context=context)
        places = Counter()
        for epoch in range(600):
            media = made[Visit(0, 0, epoch)].media
            place = next(index for index, part in enumerate(media) if not isinstance(part, str))
            places[place, len(media) - 1 - place] += 1
            assert all(part in ("audio: a dog", "video: a cat", "3d: a cup") for part in media if isinstance(part, str))
        expected = {(0, 0): 0.25, (0, 1): 3 / 16, (1, 0): 3 / 16, (0, 2): 1 / 8, (1, 1): 1 / 8, (2, 0): 1 / 8}
        assert set(places) == set(expected)
        assert all(abs(places[key] / 600 - share) < 0.06 for key, share in expected.items())

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"share": 0.0}, "context.share must be above 0 and at most 1, not 0.0"),
            ({"most": 0}, "most must be at least 1, not 0"),
            ({"texts": "none.txt"}, "Cannot read context.texts, none.txt"),
        ],
    )
    def test_what_cannot_be_is_named(self, make, texts, change, message):
        with pytest.raises(ConfigError, match=message):
            examples(make([{"caption": "a"}]), context=ContextConfig(**{"texts": texts, **change}))

    def test_a_file_without_text_is_named(self, make, tmp_path):
        (tmp_path / "empty.txt").write_text("\n")
        with pytest.raises(ConfigError, match="empty.txt, holds no text: put one on each line"):
            examples(make([{"caption": "a"}]), context=ContextConfig(str(tmp_path / "empty.txt")))

    def test_alignment_has_none(self, make, texts):
        with pytest.raises(ConfigError, match="Stage align has no LLM that would read a context"):
            examples(make([{"caption": "a"}]), stage="align", context=ContextConfig(texts))


def test_an_unknown_stage_suggests_the_right_one(make):
    with pytest.raises(ConfigError, match='Unknown stage "instrct". Did you mean "instruct"'):
        examples(make([{"caption": "a"}]), stage="instrct")


class TestSkipLog:
    @staticmethod
    def row(number: int) -> Skipped:
        return Skipped(f"a.jsonl, line {number}", 'Cannot read "ä": it is empty.')

    def test_it_counts_rows_once_and_outlives_the_run(self, tmp_path):
        log = SkipLog(tmp_path / "skipped.jsonl", rows=1000)
        log.add([self.row(1), self.row(1)])
        log.add([self.row(2), self.row(1)])
        lines = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
        assert lines == [{"origin": f"a.jsonl, line {number}", "reason": self.row(1).reason} for number in (1, 2)]
        assert len(log) == 2
        resumed = SkipLog(tmp_path / "skipped.jsonl", rows=1000, resume=True)
        resumed.add([self.row(2), self.row(3)])
        assert len(resumed) == 3 and len((tmp_path / "skipped.jsonl").read_text().splitlines()) == 3
        assert len(SkipLog(tmp_path / "skipped.jsonl", rows=1000)) == 0

    def test_nothing_skipped_writes_nothing(self, tmp_path):
        SkipLog(tmp_path / "skipped.jsonl", rows=10).add([])
        assert not list(tmp_path.iterdir())

    def test_too_many_stop_the_run(self, tmp_path):
        log = SkipLog(tmp_path / "skipped.jsonl", rows=200)
        log.add([self.row(1), self.row(2)])
        message = (
            r"3 of 200 rows are skipped .* max_skipped = 0.01 allows. .*skipped.jsonl names them; the last one: a.jsonl"
        )
        with pytest.raises(MediaError, match=message):
            log.add([self.row(3)])

    def test_a_line_that_a_killed_process_left_is_mended(self, tmp_path):
        log = SkipLog(tmp_path / "skipped.jsonl", rows=1000)
        log.add([self.row(1)])
        with log.path.open("a") as file:
            file.write('{"origin": "a.jso')
        resumed = SkipLog(log.path, rows=1000, resume=True)
        resumed.add([self.row(2)])
        assert len(resumed) == 2 and len(SkipLog(log.path, rows=1000, resume=True)) == 2

    def test_processes_that_share_the_file_count_together(self, tmp_path):
        path = tmp_path / "skipped.jsonl"

        def skip(name: str) -> None:
            log = SkipLog(path, rows=10_000, resume=True)
            for number in range(20):
                log.add([Skipped(f"{name}{number}", "x" * 500)])

        assert together(lambda: skip("a"), lambda: skip("b")) == [0, 0]
        log = SkipLog(path, rows=10_000, resume=True)
        assert len(log) == len(path.read_text().splitlines()) == 40

    @pytest.mark.parametrize("share", [-0.1, 1.5])
    def test_a_share_that_is_none_is_named(self, tmp_path, share):
        with pytest.raises(ConfigError, match="max_skipped is a share of all rows, from 0 to 1, not"):
            SkipLog(tmp_path / "a", rows=1, max_skipped=share)


def test_plan_loader_and_log_work_together(make, tmp_path):
    """As a trainer has them: two sources, broken files, workers, and the account kept beside."""
    sources = [
        make([{"caption": f"{index}"} for index in range(28)], broken=[3]),
        make([{"toy": [1, 2, 3, 4], "instruction": "what ?", "answer": "a"}] * 12, name="t"),
    ]
    made = examples(*sources)
    made.check()
    plan = BatchPlan(
        [Source(len(m), group, m.lengths(), str(m.path)) for m, group in zip(sources, ("numbers", "toy"), strict=True)],
        batch_size=4,
        seed=0,
        group_by_length=True,
    )
    log = SkipLog(tmp_path / "skipped.jsonl", rows=len(made), max_skipped=0.1)
    loader = DataLoader(made, batch_sampler=plan, num_workers=1, collate_fn=collate_examples)
    counts = Counter()
    for batch in loader:
        assert len(batch["samples"]) == 4 and not any(isinstance(item, XBlipError) for item in batch["samples"])
        assert len({sample.all_media[0].modality for sample in batch["samples"]}) == 1
        log.add(batch["skipped"])
        counts.update(sample.origin for sample in batch["samples"])
    assert len(log) == 1 and "line 4" in log.path.read_text()
    assert len(counts) == 39 and np.all([count <= 3 for count in counts.values()])


def test_what_another_process_skips_is_counted_here_and_not_written_again(tmp_path):
    first, second = (SkipLog(tmp_path / "skipped.jsonl", rows=1000, resume=resume) for resume in (False, True))
    first.add([Skipped("a.jsonl, line 1", "broken")])
    second.refresh()
    assert len(second) == 1
    first.add([Skipped("a.jsonl, line 2", "broken")])
    second.add([Skipped("a.jsonl, line 2", "broken")])
    assert len((tmp_path / "skipped.jsonl").read_text().splitlines()) == 2 == len(second)
