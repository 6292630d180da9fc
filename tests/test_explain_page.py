"""The page of an explanation: it shows what the figures say, links what it wrote, and writes over nothing."""

import io
import json
import re
import subprocess

import numpy as np
import pytest
from kit import BEADS, LONG, ONE, make_branch
from rich.console import Console

from xblip.errors import ConfigError
from xblip.model import XBlip
from xblip.sample import Media
from xblip.testing import ToyModality

pytestmark = pytest.mark.slow  # each makes a page of drawings

EXACT = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}


@pytest.fixture
def explanation(model):
    return model.ask("which one ?", toy=LONG, beads=BEADS, **EXACT).explain()


def text_of(page: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<style>.*?</style>|<[^>]+>", " ", page, flags=re.DOTALL))


class TestPage:
    def test_it_says_what_the_figures_say(self, explanation, tmp_path):
        page = explanation.save(tmp_path / "page")
        text = text_of(page.read_text())
        assert page == tmp_path / "page" / "index.html"
        assert "which one ?" in text and explanation.answer in text
        for part in explanation.inputs:
            assert (
                f"{part.effect:+z.2f}" in text and f"{round(100 * part.share)} %" in text and part.cue.strip() in text
            )
        for part in explanation.segments:
            assert f"{part.effect:+z.2f}" in text
        assert f"{explanation.log_likelihood - explanation.without_inputs:+z.2f}" in text

    def test_every_file_it_shows_is_beside_it_and_no_other(self, explanation, tmp_path):
        page = explanation.save(tmp_path / "page")
        shown = set(re.findall(r"(?:src|href)='?([^'> ]+)", page.read_text()))
        assert shown | {"index.html"} == {path.name for path in (tmp_path / "page").iterdir()}
        assert {"toy.png", "toy-query-04.png", "beads.png", "explanation.json"} <= shown
        assert "http" not in page.read_text() and "<script" not in page.read_text()

    def test_the_figures_lie_beside_it(self, explanation, tmp_path):
        explanation.save(tmp_path)
        figures = json.loads((tmp_path / "explanation.json").read_text())
        assert figures == json.loads(json.dumps(explanation.to_dict()))
        assert np.array(figures["attention"]["toy"]).shape == (4, 3, 4)

    def test_what_is_written_is_text_and_not_markup(self, model, tmp_path):
        answer = model.ask("what <b>is</b> ?", media=[("toy", ONE)], **EXACT)
        page = answer.explain().save(tmp_path).read_text()
        assert "what &lt;b&gt;is&lt;/b&gt; ?" in page and "<b>is</b>" not in page

    def test_a_bridge_without_queries_is_told_in_a_line(self, llm, toy, tmp_path):
        branch = make_branch(ToyModality, llm)
        config = type(branch.config)("toy", bridge={"kind": "linear"})
        plain = type(branch).build(config, llm_width=llm.width).eval()
        answer = XBlip(llm=llm, branches={"toy": plain}).eval().ask("what ?", toy=LONG, **EXACT)
        explanation = answer.explain()
        text = text_of(explanation.save(tmp_path).read_text())
        assert explanation.attention == {"toy": None} and len(explanation.segments) == 3
        assert "Its bridge, of the kind linear, has no queries, and so no attention to show." in text
        assert {path.name for path in tmp_path.iterdir()} == {"index.html", "explanation.json"}

    def test_features_given_by_hand_are_bars_and_told_so(self, model, tmp_path):
        features = model.branches["toy"].encode([ONE])
        text = text_of(model.ask("what ?", toy=features, **EXACT).explain().save(tmp_path).read_text())
        assert "It was given as features, without the medium that they were made of." in text
        assert (tmp_path / "toy.png").is_file()

    def test_a_modality_without_drawing_is_bars_and_shows_no_medium(self, explanation, tmp_path):
        explanation.save(tmp_path)
        assert (
            not (tmp_path / "toy-plain.png").exists()
            and "A bar for each token" in (tmp_path / "index.html").read_text()
        )

    def test_tokens_that_lie_nowhere_are_named_with_their_share(self, model, monkeypatch, tmp_path):
        def draw(self, tensors, weights):
            drawing = self.heat.bars(weights)
            drawing.placeless = {0: "[CLS]"}
            drawing.files[".txt"] = b"more"
            return drawing

        monkeypatch.setattr(ToyModality, "draw", draw)
        explanation = model.ask("what ?", toy=ONE, **EXACT).explain()
        text = text_of(explanation.save(tmp_path).read_text())
        share = explanation.attention["toy"].mean((0, 1, 2))[0, 0]
        assert f"{round(100 * float(share))} % of the attention went to [CLS], which belongs to no place." in text
        assert (tmp_path / "toy.txt").read_bytes() == b"more" and (tmp_path / "toy-plain.png").is_file()
        assert "times an equal share among 3" in text

    def test_an_answer_that_no_input_helped_is_told_so(self, explanation, tmp_path):
        explanation.inputs[:] = [
            type(part)(**{**vars(part), "effect": -abs(part.effect)}) for part in explanation.inputs
        ]
        assert "No input made this answer likelier" in explanation.save(tmp_path).read_text()

    def test_inputs_of_one_kind_have_files_of_their_own(self, model, tmp_path):
        model.ask("what ?", media=[("toy", ONE), ("toy", LONG)], **EXACT).explain().save(tmp_path)
        assert (tmp_path / "toy-1.png").is_file() and (tmp_path / "toy-2.png").is_file()


class TestFolder:
    def test_a_folder_that_holds_something_is_left_alone(self, explanation, tmp_path):
        (tmp_path / "mine.txt").write_text("mine")
        with pytest.raises(ConfigError, match="exists already, and an explanation writes over nothing: give an empty"):
            explanation.save(tmp_path)
        with pytest.raises(ConfigError, match="exists already"):
            explanation.save(tmp_path / "mine.txt")
        assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]

    def test_a_folder_that_cannot_be_made_is_told(self, explanation, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(ConfigError, match="Cannot make the folder .*file/page: Not a directory. Give another one"):
            explanation.save(tmp_path / "file" / "page")

    def test_a_full_disk_is_told_and_leaves_nothing_half(self, explanation, small_disk):
        filling = small_disk / "filling"
        filling.write_bytes(b"0" * (2**20 - 3 * 4096))
        folder = small_disk / "page"
        with pytest.raises(ConfigError, match="Cannot write into .*page: No space left on device. Make room"):
            explanation.save(folder)
        assert not any(folder.iterdir())
        filling.unlink()
        subprocess.run(["mount", "-o", "remount,size=20m", small_disk], check=True)
        assert explanation.save(folder).is_file()


def test_the_table_names_each_input_s_share(model):
    explanation = model.ask("which one ?", media=[Media("toy", LONG), Media("beads", BEADS)], **EXACT).explain()
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(explanation.table())
    printed = console.export_text()
    for part in explanation.inputs:
        assert re.search(rf"{part.name} .*{part.effect:+z.2f}".replace("+", r"\+"), printed)
        assert f"{round(100 * part.share)} %" in printed
    assert "all of them" in printed
