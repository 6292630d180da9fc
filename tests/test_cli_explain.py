"""`xblip ask --explain`: the answer, a table, a page; and a folder that will not do is told before anything is asked."""

import json

import pytest
from test_cli import model, run, world  # noqa: F401 - fixtures

from xblip.model import XBlip

ASKED = ["ask", "what is this ?", "--touch", "b.txt", "--depth-map", "a.txt", "max_new_tokens=3", "min_new_tokens=3"]


def test_it_answers_and_says_what_it_came_from(run, model, world, tmp_path):  # noqa: F811
    status, out, err = run(*ASKED, "--explain", str(tmp_path / "page"))
    answer = model.ask(
        "what is this ?", touch=world / "b.txt", depth_map=world / "a.txt", max_new_tokens=3, min_new_tokens=3
    )
    explanation = answer.explain()
    first, *table, last = out.splitlines()
    assert (status, err, first) == (0, "", answer.text)
    assert last == f"wrote {tmp_path / 'page' / 'index.html'}" and (tmp_path / "page" / "touch.png").is_file()
    for part in explanation.inputs:
        [row] = [line for line in table if f" {part.name} " in line]
        assert f"{part.effect:+z.2f}" in row and f"{round(100 * part.share)} %" in row


def test_json_holds_the_figures_and_leaves_attention_to_the_file(run, tmp_path):  # noqa: F811
    status, out, err = run(*ASKED, "--json", f"--explain={tmp_path / 'page'}")
    told = json.loads(out)
    saved = json.loads((tmp_path / "page" / "explanation.json").read_text())
    assert (status, err) == (0, "") and told["answer"] == told["explanation"]["answer"]
    assert told["explanation"] == {name: value for name, value in saved.items() if name != "attention"}


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("full", "full exists already, and an explanation writes over nothing"),
        ("file/in", "Cannot make the folder file/in"),
    ],
)
def test_a_folder_that_will_not_do_is_told_first(run, monkeypatch, tmp_path, folder, message):  # noqa: F811
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(XBlip, "from_pretrained", lambda *_: pytest.fail("a model was loaded"))
    status, out, err = run("ask", "what ?", "--explain", folder)
    assert (status, out, err.count("\n")) == (2, "", 1) and message in err


def test_an_answer_that_cannot_be_explained_is_still_told(run, tmp_path):  # noqa: F811
    status, out, err = run("ask", "is this one ?", "max_new_tokens=3", "min_new_tokens=3", "--explain", str(tmp_path))
    assert status == 2 and out.strip() and err.startswith("error: The question came without inputs")
