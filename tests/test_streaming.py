"""Streams: every row in its turn whoever reads it, resuming exactly, and what cannot be."""

import itertools
import json

import pytest
from kit import ONE
from test_data import MODALITIES, Numbers, write, write_tar
from torch.utils.data import DataLoader

from xblip.data import Manifest
from xblip.errors import ConfigError, InputError, XBlipError
from xblip.examples import Examples, Skipped, collate_examples
from xblip.sample import Sample
from xblip.streaming import Stream, StreamedExamples
from xblip.testing import ToyModality


@pytest.fixture
def make(tmp_path):
    """Makes a stream of files with so many rows each."""

    def made(*counts: int, name="a", **options) -> Stream:
        for file, count in enumerate(counts):
            rows = [{"toy": ONE, "instruction": "what ?", "answer": f"{name}{file}.{row}"} for row in range(count)]
            write(tmp_path / f"{name}{file}.jsonl", rows)
        return Stream(tmp_path / f"{name}*.jsonl", modalities=MODALITIES, **{"buffer": 5, **options})

    return made


def batches(*streams: Stream, count: int, workers: int = 0, **options) -> list[list]:
    """The first batches of answers."""
    streamed = StreamedExamples(Examples(streams, stage="instruct", seed=2), **{"batch_size": 2, "seed": 2, **options})
    loader = DataLoader(streamed, batch_size=None, num_workers=workers, collate_fn=collate_examples)
    return [[sample.answer for sample in batch["samples"]] for batch in itertools.islice(loader, count)]


@pytest.mark.parametrize("counts", [(12,), (4, 8), (3, 3, 3, 3)])
@pytest.mark.parametrize("world", [1, 2])
def test_each_pass_visits_each_row_once_whoever_reads_it(make, counts, world):
    stream = make(*counts)
    shares = [stream.take(0, 7, number, world) for number in range(world)]
    passes = [list(itertools.takewhile(lambda taken: taken.visit.epoch < 3, share)) for share in shares]
    for epoch in range(3):
        taken = [item for share in passes for item in share if item.visit.epoch == epoch]
        assert len({(item.file, item.raw) for item in taken}) == len({item.visit for item in taken}) == 12 == len(taken)
    assert [item.raw for item in passes[0] if item.visit.epoch == 0] != [
        item.raw for item in passes[0] if item.visit.epoch == 1
    ]


def test_rows_are_shuffled_within_the_buffer_and_by_the_seed_alone(make):
    orders = [[item.raw[0] for item in itertools.islice(make(40).take(0, seed, 0, 1), 40)] for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    plain = [item.raw[0] for item in itertools.islice(make(40, buffer=1).take(0, 1, 0, 1), 40)]
    assert plain == [f"line {number}" for number in range(1, 41)] != orders[0]
    assert len({item for item in orders[0][:10]} & set(plain[:15])) == 10


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [1, 2, 7])
def test_resuming_goes_on_exactly(make, workers, start):
    streams = make(9, 11), make(6, name="b")
    options = {"workers": workers, "weights": [2, 1]}
    whole = batches(*streams, count=14, **options)
    assert batches(*streams, count=14 - start, start=start, **options) == whole[start:]
    assert {len(batch) for batch in whole} == {2}
    assert {answer[0] for batch in whole for answer in batch} == {"a", "b"}


def test_every_process_has_the_same_source_at_a_time_and_rows_of_its_own(make):
    streams = make(20, 20), make(20, name="b")
    ranks = [batches(*streams, count=100, world_size=2, rank=rank, weights=[3, 1]) for rank in (0, 1)]
    for first, second in zip(*ranks, strict=True):
        assert {answer[0] for answer in first} == {answer[0] for answer in second} and len({*first, *second}) == 4
    assert sum(batch[0][0] == "a" for batch in ranks[0]) in range(60, 90)


def test_parts_of_tars_and_tables_stream_too(tmp_path):
    write_tar(tmp_path / "a.tar", {"0.num": b"1 2 3 4", "0.txt": b"a cup"})
    write(tmp_path / "a.parquet", [{"numbers": {"bytes": b"1 2 3 4", "path": None}, "caption": "a cup"}])
    for name in ("a.tar", "a.parquet"):
        stream = Stream(tmp_path / name, modalities=MODALITIES)
        assert stream.check() == {("numbers", "caption")}
        made = Examples([stream], stage="generate", seed=0)
        sample = next(iter(StreamedExamples(made, batch_size=1, seed=0)))[0]
        assert sample.answer == "a cup" and sample.media[0].source["values"].tolist() == [[1.0, 2.0, 3.0, 4.0]]
    rows = list(Manifest(tmp_path / "a.tar", modalities=MODALITIES).rows())
    assert rows == [stream_row(Stream(tmp_path / "a.tar", modalities=MODALITIES))]


def stream_row(stream: Stream):
    return stream.row(next(stream.take(0, 0, 0, 1)))


def test_each_turn_of_a_conversation_is_a_row(tmp_path):
    turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "a"}] * 3
    path = write(tmp_path / "a.jsonl", [{"toy": ONE, "conversations": turns}])
    stream = Stream(path, modalities=MODALITIES)
    rows = [stream.row(taken) for taken in itertools.islice(stream.take(0, 0, 0, 1), 3)]
    assert sorted(len(row.sample.history) for row in rows) == [0, 1, 2]
    assert {row.origin for row in rows} == {f"{path}, line 1, part {part}" for part in (1, 2, 3)}


def test_a_broken_file_is_replaced_from_its_batch_and_told(tmp_path):
    for index in range(6):
        (tmp_path / f"{index}.num").write_text("1 2 x" if index == 2 else f"{index} 0 0 0")
    rows = [{"numbers": f"{index}.num", "instruction": "?", "answer": str(index)} for index in range(6)]
    stream = Stream(write(tmp_path / "a.jsonl", rows), modalities={"numbers": Numbers()})
    streamed = StreamedExamples(Examples([stream], stage="instruct", seed=0), batch_size=3, seed=0)
    found = list(itertools.chain(*itertools.islice(iter(streamed), 2)))
    skipped = [item for item in found if isinstance(item, Skipped)]
    samples = [item for item in found if isinstance(item, Sample)]
    assert len(samples) == 6 and len(skipped) == 1 and skipped[0].origin.endswith("line 3")
    assert all(sample.media[0].source["values"][0, 0] == int(sample.answer) != 2 for sample in samples)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_row_is_an_error_with_its_line(tmp_path, workers):
    path = write(tmp_path / "a.jsonl", [{"toy": ONE, "captoin": "a"}])
    streamed = StreamedExamples(
        Examples([Stream(path, modalities=MODALITIES)], stage="align", seed=0), batch_size=2, seed=0
    )
    loader = DataLoader(streamed, batch_size=None, num_workers=workers, collate_fn=collate_examples)
    error = next(iter(loader))["samples"][0]
    assert isinstance(error, InputError) and "line 1: Unknown key" in str(error)
    with pytest.raises(InputError, match="line 1: Unknown key"):
        Stream(path, modalities=MODALITIES).check()


def test_too_many_workers_for_the_rows_are_an_error(make):
    streamed = StreamedExamples(Examples([make(2)], stage="align", seed=0), batch_size=1, seed=0, world_size=3, rank=2)
    error = next(iter(streamed))[0]
    assert isinstance(error, XBlipError) and "has no row for one of its 3 workers: use fewer processes" in str(error)


def test_what_cannot_be_is_named(make, tmp_path):
    with pytest.raises(ConfigError, match="The buffer of a stream must hold at least 1 row, not 0"):
        make(1, buffer=0)
    with pytest.raises(ConfigError, match="Nobody knows the size of a stream: instead of weights 'sqrt', say"):
        batches(make(1), count=1, weights="sqrt")
    with pytest.raises(ConfigError, match="must be a number above 0 for each of its 1 sources"):
        batches(make(1), count=1, weights=[1, 2])
    (tmp_path / "e.jsonl").write_text("\n")
    with pytest.raises(ConfigError, match='e.jsonl" has no rows'):
        Stream(tmp_path / "e.jsonl", modalities={"toy": ToyModality()}).check()
    with pytest.raises(ConfigError, match="No manifest at"):
        Stream(tmp_path / "none.jsonl", modalities={})


def test_a_stream_reads_what_a_manifest_reads(tmp_path):
    rows = [{"toy": ONE, "question": f"{n} ?", "answer": "a"} for n in range(5)]
    path = write(tmp_path / "a.jsonl", rows)
    path.write_text(path.read_text() + json.dumps({"toy": ONE, "caption": "b\u2028c"}, ensure_ascii=False))
    stream = Stream(path, modalities=MODALITIES, buffer=1)
    assert [stream.row(taken) for taken in itertools.islice(stream.take(0, 0, 0, 1), 6)] == list(
        Manifest(path, modalities=MODALITIES).rows()
    )
