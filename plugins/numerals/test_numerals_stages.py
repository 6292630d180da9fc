"""The stages of training by their shipped configs on next to nothing, the captions they learn from, and their report."""

import json
import re

import pytest
from typer.testing import CliRunner
from xblip_numerals.build import config_of, places_of
from xblip_numerals.captions import write_captions
from xblip_numerals.language import words_of
from xblip_numerals.phrases import MODALITIES
from xblip_numerals.stages import run_modality
from xblip_numerals.stages_report import ALIGNED, ALONE, BOTH, RECALL, RUN, WAYS, folder_of, reached, write_report
from xblip_numerals.things import caption

from xblip.cli import app


@pytest.mark.slow
@pytest.mark.parametrize("modality", list(MODALITIES))
def test_captions_tell_each_file_in_its_own_words_and_ever_the_same_for_a_seed(shelf, modality, tmp_path):
    texts = []
    for name, wordings, seed in (("a", 3, 0), ("b", 3, 0), ("c", 3, 1), ("plain", 0, 0)):
        write_captions(shelf, modality, tmp_path / f"{name}.jsonl", wordings=wordings, seed=seed)
        texts.append((tmp_path / f"{name}.jsonl").read_text())
    assert texts[0] == texts[1] != texts[2]
    worded, plain = ([json.loads(line) for line in text.splitlines()] for text in (texts[0], texts[3]))
    for item, row, short in zip(shelf.items[modality], worded, plain, strict=True):
        assert (tmp_path / row[modality]).resolve() == item.path.resolve()
        assert short == {modality: row[modality], "caption": caption(item.thing)}
        assert row["captions"][0] == caption(item.thing) and len(row["captions"]) == 4
        for told in row["captions"]:
            assert all(value in told for value in item.thing.facts.values()), "every description tells all there is"
    assert len({told for row in worded for told in row["captions"]}) > 3 * len(worded)


@pytest.mark.slow
@pytest.mark.parametrize("modality", list(MODALITIES))
def test_ordinary_captions_name_the_number_and_leave_most_unsaid(shelf, modality, tmp_path):
    write_captions(shelf, modality, tmp_path / "said.jsonl", wordings=2, seed=0, ordinary=True)
    for item, line in zip(shelf.items[modality], (tmp_path / "said.jsonl").read_text().splitlines(), strict=True):
        captions = json.loads(line)["captions"]
        assert len(captions) == 3
        for told in captions:
            words = words_of(told)
            assert item.thing.facts["number"] in words
            assert 1 <= sum(value in words for fact, value in item.thing.facts.items() if fact != "number") <= 2


@pytest.mark.slow
@pytest.mark.parametrize("modality", ["audio", "video"])
def test_the_shipped_configs_lead_from_align_to_instruct(parts, modality, capfd):
    overrides = [f"{key}={value}" for key, value in places_of(parts, modality, "align").items()]
    command = ["precompute", str(config_of(modality, "align")), *overrides, "--to", str(parts / "features" / modality)]
    assert CliRunner().invoke(app, command).exit_code == 0
    run_modality(parts, parts, modality, steps={"align": 2, "generate": 2, "instruct": 2}, seed=0)
    told = "".join(capfd.readouterr().out.split())  # the console breaks lines, and long paths
    folder = parts / modality
    assert f"from{folder / 'align'}:" in told and "fresh:projector(2);leftout:language_head(1)" in told
    assert "word_embeddings" not in told, "those of all words but [DEC] are taken"
    assert re.search(f"from{folder / 'align-generate'}:[0-9]+weightstaken[.]", told), (
        "nothing is fresh, nothing left out"
    )
    assert told.count("fromnothing") == 4, "align of both kinds, generate without it, and instruct alone"
    for stages in WAYS.values():
        run = json.loads((folder_of(folder, stages, 0) / RUN).read_text())
        assert run["steps"] == 2 and run["seconds"] > 0
        assert [step for step, _ in run["accuracy"]] == [0, 2]
    assert not json.loads((folder / "align" / RUN).read_text())["accuracy"]
    for name in ALIGNED:
        recall = json.loads((folder / name / RECALL).read_text())
        assert recall["files"] == 20 and 0 <= recall["itm"]["files"] <= 1


def test_when_an_accuracy_is_reached():
    curve = [(0, 0.1), (40, 0.5), (80, 0.4), (120, 0.9)]
    assert reached(curve, 0.3) == pytest.approx(20)
    assert reached(curve, 0.7) == pytest.approx(104)
    assert reached(curve, 0.05) == 0 and reached(curve, 0.95) is None


def test_the_report_tells_steps_and_seconds_of_all_ways(tmp_path):
    """Instruct alone ends at 0.8, of which 0.9 is 0.72; after both stages that is there at once, for what they took."""
    curves = {ALONE: [(0, 0.2), (40, 0.6), (80, 0.8)], BOTH: [(0, 0.725), (40, 0.725), (80, 0.76)]}
    for modality in MODALITIES:
        for way, stages in WAYS.items():
            for seed in (0, 1):
                for number in range(1, len(stages) + 1):
                    folder = folder_of(tmp_path / modality, stages[:number], seed)
                    folder.mkdir(parents=True, exist_ok=True)
                    curve = curves.get(way, curves[ALONE]) if number == len(stages) else [(80, 0.9)]
                    run = {"steps": 80, "batch": 32, "seconds": 160.0, "accuracy": curve}
                    (folder / RUN).write_text(json.dumps(run))
        found = {"files": 20, "texts": 10, "itc": {"texts": 0.5, "files": 0.6}, "itm": {"texts": 0.7, "files": 0.8}}
        for name in ALIGNED:
            (tmp_path / modality / name).mkdir(exist_ok=True)
            (tmp_path / modality / name / RECALL).write_text(json.dumps(found))
    write_report(tmp_path, tmp_path / "STAGES.md", seeds=[0, 1], rows=300, rerank=16)
    lines = (tmp_path / "STAGES.md").read_text().splitlines()
    assert "| image | nothing | 0.200 (0.200, 0.200) | 0.800 (0.800, 0.800) | 64 | 80 | 128 | 160 |" in lines
    assert "| image | align and generate | 0.725 (0.725, 0.725) | 0.760 (0.760, 0.760) | 0 | – | 320 | – |" in lines
    assert "| image | generate | 0.200 (0.200, 0.200) | 0.800 (0.800, 0.800) | 64 | 80 | 288 | 320 |" in lines
    assert "| nothing | 0.200 | 0.800 | 64 | 128 |" in lines
    assert "| audio | 80 steps, 160 s | 80 steps, 160 s | 80 steps, 160 s | 0.900 | 0.900 |" in lines
    assert "| video | one | 20 | 10 | 0.100 | 0.500 | 0.700 | 0.600 | 0.800 |" in lines
    for modality in MODALITIES:
        assert f"stages/{modality}.png" in (tmp_path / "STAGES.md").read_text()
        assert 2_000 < (tmp_path / "stages" / f"{modality}.png").stat().st_size < 50_000
