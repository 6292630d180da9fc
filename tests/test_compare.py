"""`xblip compare`: two runs on the rows that both have, and only runs that can be compared."""

import json
import sys

import pytest

from xblip import cli
from xblip.compare import as_table, compare, told_apart
from xblip.errors import BundleError, ConfigError
from xblip.evaluate import EvalConfig, evaluate
from xblip.intervals import sign_test
from xblip.model import XBlip

pytestmark = pytest.mark.slow  # each runs evaluations first

ROWS = 20


@pytest.fixture
def run(toys, bundle, tmp_path, monkeypatch):
    """Runs an evaluation in which the first rows are answered rightly, into a folder of that name."""
    rows = [{"toy": [float(number)] * 4, "question": "what is this ?", "answer": "one"} for number in range(ROWS)]
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(name, right, *, kind="qa", task="questions", **settings):
        def generate(self, samples, **options):
            [number] = {sample.media[0].source[0] for sample in samples}
            return [type("Answer", (), {"text": "one" if number < right else "two"})]

        monkeypatch.setattr(XBlip, "generate", generate)
        tasks = {task: {"kind": kind, "data": str(data), **settings}}
        evaluate(EvalConfig(str(bundle), tasks, str(tmp_path / name), batch_size=1, use_cpu=True))
        return tmp_path / name

    return run


def test_a_difference_its_interval_and_p(run):
    got = compare(run("worse", 8), run("better", 16))["questions"]
    assert list(got) == ["normalised", "exact"]
    exact = got["exact"]
    assert (exact.first, exact.second, exact.n) == (0.4, 0.8, ROWS)
    assert exact.difference == pytest.approx(0.4) and 0 < exact.low < 0.4 < exact.high
    assert exact.p == sign_test(8, 0)
    assert as_table({"questions": got})[2][:5] == ["questions", "exact", "40.0", "80.0", "+40.0"]


def test_a_run_with_itself_differs_in_nothing(run):
    folder = run("one", 8)
    got = compare(folder, folder)["questions"]["exact"]
    assert (got.difference, got.low, got.high, got.p) == (0.0, 0.0, 0.0, 1.0) and told_apart(folder, folder) == []


def test_corpus_figures_are_compared_too(run):
    got = compare(run("worse", 8, kind="caption"), run("better", 16, kind="caption"))["questions"]
    assert got["BLEU-1"].p is None and got["BLEU-1"].low > 0 and got["ROUGE-L"].p == sign_test(8, 0)
    assert as_table({"captions": got})[5][6] == "–"


def test_prompts_may_differ_and_are_told(run):
    first, second = run("plain", 8), run("other", 8, prompt="question: {question}")
    assert compare(first, second)["questions"]["exact"].difference == 0
    assert told_apart(first, second) == ["tasks.questions.prompt was 'absent', is 'question: {question}'"]


def test_only_rows_that_both_have_count(run):
    first, second = run("first", 8), run("second", 8)
    lines = (second / "questions.jsonl").read_text().splitlines(keepends=True)
    broken = json.dumps({"id": "1", "error": "broken"}) + "\n"
    (second / "questions.jsonl").write_text("".join([lines[0], broken, *lines[2:]]))
    assert compare(first, second)["questions"]["exact"].n == ROWS - 1


class TestRefusals:
    def test_other_data(self, run, tmp_path):
        first = run("first", 8)
        data = tmp_path / "questions.jsonl"
        data.write_text(data.read_text().replace('"one"', '"two"'))
        with pytest.raises(ConfigError, match="tasks questions are not the same: data was .* over the same data"):
            compare(first, run("second", 8))

    def test_another_kind(self, run):
        with pytest.raises(ConfigError, match="kind was 'qa', is 'caption'"):
            compare(run("first", 8), run("second", 8, kind="caption"))

    def test_no_task_in_common(self, run):
        with pytest.raises(ConfigError, match="no task in common: questions in .*first, others in .*second"):
            compare(run("first", 8), run("second", 8, task="others"))

    def test_no_row_in_common(self, run):
        first, second = run("first", 8), run("second", 8)
        (second / "questions.jsonl").write_text("")
        with pytest.raises(ConfigError, match="have no row in common"):
            compare(first, second)

    def test_no_run_or_one_that_has_not_ended(self, run, tmp_path):
        first = run("first", 8)
        with pytest.raises(BundleError, match="There is no run in"):
            compare(first, tmp_path)
        (first / "results.json").unlink()
        with pytest.raises(BundleError, match="holds no run of xblip eval that has ended"):
            compare(first, first)


def test_the_command(run, monkeypatch, capsys):
    first, second = run("first", 8), run("second", 16)
    for option in ((), ("--json",)):
        monkeypatch.setattr(sys, "argv", ["xblip", "compare", str(first), str(second), *option])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code
        shown = capsys.readouterr().out
        if option:
            assert json.loads(shown)["tasks"]["questions"]["exact"]["p"] == sign_test(8, 0)
        else:
            assert "+40.0" in shown and "0.008" in shown and "the runs differ in nothing" in shown
