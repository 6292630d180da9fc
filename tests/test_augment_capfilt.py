"""`xblip capfilt`: captions are judged and written, a threshold is found, killed runs go on, mistakes are told."""

import json
from pathlib import Path

import pytest
import torch

from xblip.branch import BranchConfig
from xblip.capfilt import CapfiltConfig, CaptionerConfig, File, _truth, capfilt
from xblip.data import Manifest
from xblip.errors import ConfigError, InputError, MediaError
from xblip.model import XBlip
from xblip.retrieval import Retriever
from xblip.runs import read_lines
from xblip.sample import Media
from xblip.testing import ToyModality, small_qformer
from xblip.threshold import best_cut, found, precision_recall

pytestmark = pytest.mark.slow  # each captions and ranks with a model

RIGHT = ["red", "green", "blue", "one", "two", "three"]
NOISY = ["red", "yes", "blue", "yes", "two", "yes"]


@pytest.fixture
def retriever(llm_folder, tmp_path, toy):
    bridge = {key: value for key, value in small_qformer(llm_folder).items() if key != "kind"}
    Retriever.build(BranchConfig("toy", bridge=bridge)).save_pretrained(tmp_path / "retriever")
    return str(tmp_path / "retriever")


@pytest.fixture
def write(tmp_path):
    def written(name, captions) -> str:
        rows = [{"toy": [float(place)] * 4, "caption": text} for place, text in enumerate(captions)]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    return written


@pytest.fixture
def config(retriever, model, tmp_path, toys, write, monkeypatch):
    """Every second caption is wrong, which is "yes", and the filter knows; the captioner always says "red"."""
    model.save_pretrained(tmp_path / "bundle")
    monkeypatch.setattr(
        Retriever, "match", lambda self, _, texts: torch.tensor([0.1 if text == "yes" else 0.9 for text in texts])
    )
    answer = type("Answer", (), {"text": "red"})
    monkeypatch.setattr(XBlip, "generate", lambda self, samples, **_: [answer for _ in samples])
    return CapfiltConfig(
        data=write("noisy.jsonl", NOISY),
        filter=retriever,
        output_dir=str(tmp_path / "out"),
        captioner=CaptionerConfig(str(tmp_path / "bundle")),
        threshold=0.5,
        truth=write("truth.jsonl", RIGHT),
        batch_size=4,
        use_cpu=True,
    )


def rows_of(config, name):
    return [json.loads(line) for line in Path(config.output_dir, name).read_text().splitlines()]


def test_captions_are_kept_by_their_match_and_written_ones_stand_beside_them(config):
    told = capfilt(config)
    assert rows_of(config, "kept.jsonl")[:3] == [
        {"toy": [0.0] * 4, "caption": "red"},  # given and written are the same
        {"toy": [1.0] * 4, "caption": "red"},
        {"toy": [2.0] * 4, "captions": ["blue", "red"]},
    ]
    assert rows_of(config, "dropped.jsonl")[0] == {"toy": [1.0] * 4, "caption": "yes", "whose": "given", "score": 0.1}
    given, written = told["captions"]["given"], told["captions"]["written"]
    assert (given["scored"], given["kept"], given["precision"], given["recall"]) == (6, 3, 1.0, 1.0)
    assert (written["right"], written["kept"]) == (1, 6)
    assert Path(config.output_dir, "curves.png").exists()
    page = Path(config.output_dir, "CAPFILT.md").read_text()
    assert "| given | 6 | 3 | 50.0% | 50.0% | 1.000 | 1.000 |" in page and "The config says so." in page


def test_what_is_kept_is_a_manifest_that_training_reads(config):
    capfilt(config)
    manifest = Manifest(Path(config.output_dir, "kept.jsonl"), modalities={"toy": ToyModality()})
    assert manifest.check() == {("toy", "caption")} and len(manifest) == 6


def test_without_a_captioner_the_given_ones_are_judged_alone(config):
    config.captioner = None
    assert set(capfilt(config)["captions"]) == {"given"}
    assert len(rows_of(config, "kept.jsonl")) == 3


def test_a_killed_run_goes_on(config, monkeypatch):
    match, batches = Retriever.match, []

    class Killed(Exception):
        pass

    def killed(self, sources, texts):
        batches.append(len(texts))
        if len(batches) == 2:
            raise Killed
        return match(self, sources, texts)

    monkeypatch.setattr(Retriever, "match", killed)
    with pytest.raises(Killed):
        capfilt(config)
    capfilt(config)
    assert batches == [8, 4, 4]
    capfilt(config)
    assert len(batches) == 3 and len(rows_of(config, "captions.jsonl")) == 6
    config.threshold = 0.4
    with pytest.raises(ConfigError, match="other settings: threshold was 0.5"):
        capfilt(config)


def test_the_threshold_comes_from_held_out_pairs(config, retriever, write, monkeypatch):
    monkeypatch.undo()
    config.captioner, config.threshold, config.held_out = None, None, write("held.jsonl", RIGHT)
    told = capfilt(config)
    assert told["held_out"]["right"] == told["held_out"]["wrong"] == 6
    known = read_lines(Path(config.output_dir, "held_out.jsonl"))
    assert all((line["caption"] == RIGHT[int(line["id"].split()[0])]) == line["right"] for line in known)
    assert (
        f"from a match of {told['threshold']:.4f} on. It tells 6 held-out"
        in Path(config.output_dir, "CAPFILT.md").read_text()
    )


def test_a_broken_file_is_counted_and_too_many_end_the_run(config, tmp_path):
    rows = [json.loads(line) for line in Path(config.data).read_text().splitlines()]
    rows[3]["toy"] = [1.0]
    Path(config.data).write_text("".join(json.dumps(row) + "\n" for row in rows))
    config.truth = None
    with pytest.raises(MediaError, match=r"1 of 6 files cannot be read, more than max_skipped = 0.01 .* rows of four"):
        capfilt(config)
    config.max_skipped = 0.5
    assert capfilt(config)["broken"] == 1 and len(rows_of(config, "kept.jsonl")) == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threshold": None}, "name `held_out` captions that are known to be right, or say a `threshold`"),
        ({"threshold": 1.5}, "threshold is a share of certainty, from 0 to 1, not 1.5"),
        ({"held_out": "x.jsonl"}, "held_out would decide nothing"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"data": "absent.jsonl"}, 'No manifest at "absent.jsonl"'),
    ],
)
def test_a_wrong_setting_is_told(config, changes, message):
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(ConfigError, match=message):
        capfilt(config)


def test_models_of_the_wrong_kind_are_told(config, retriever):
    config.filter = config.captioner.model
    with pytest.raises(ConfigError, match="is a bundle: name the folder of a retriever"):
        capfilt(config)


def test_truth_of_other_files_is_told(config, write, tmp_path):
    config.truth = write("short.jsonl", RIGHT[:3])
    with pytest.raises(InputError, match=r"noisy.jsonl, line 4: the row of `truth` beside it is of another file"):
        capfilt(config)


def test_held_out_captions_that_are_all_the_same_are_told(config, write):
    config.threshold, config.held_out = None, write("held.jsonl", ["red"] * 3)
    with pytest.raises(InputError, match="held_out: all captions are the same"):
        capfilt(config)


def test_the_best_cut_lies_between_what_is_right_and_what_is_wrong():
    cut = best_cut([0.9, 0.8, 0.7], [0.1, 0.2, 0.3, 0.75])
    assert 0.3 < cut.threshold < 0.7 and (cut.right_kept, cut.wrong_dropped) == (1.0, 0.75)
    assert best_cut([0.5], [0.5]).right_kept == 1.0  # nothing is told apart: nothing is dropped


def test_precision_and_recall():
    scores, right = [0.9, 0.8, 0.8, 0.1], [True, True, False, True]
    told = found(scores, right, 0.5)
    assert (told.kept, told.precision, told.recall) == (3, pytest.approx(2 / 3), pytest.approx(2 / 3))
    precision, recall = precision_recall(scores, right)
    assert precision.tolist() == pytest.approx([1, 2 / 3, 3 / 4]) and recall.tolist() == pytest.approx(
        [1 / 3, 2 / 3, 1]
    )
    assert told.average_precision == pytest.approx(1 / 3 + 2 / 9 + 1 / 4)
    assert found([0.1], [True], 0.5).precision is None and precision_recall([0.1], [True]) is None


def test_a_file_may_be_named_in_two_ways_by_data_and_truth(config, tmp_path):
    (tmp_path / "more").mkdir()
    for name, place in (("noisy.jsonl", "a.txt"), ("more/truth.jsonl", "../a.txt")):
        (tmp_path / name).write_text(json.dumps({"toy": place, "caption": "red"}) + "\n")
    config.truth = str(tmp_path / "more" / "truth.jsonl")
    file = File("0", Media("toy", str(tmp_path / "a.txt")), ("red",), "line 1")
    assert _truth(config, {"toy": ToyModality()}, [file]) == {"0": {"red"}}
