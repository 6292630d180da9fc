"""lmms-eval itself, on tasks made of the demo's files; `make test-lmms` sets up the environment that it takes.

What it says is compared with what asking directly gives.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.lmms, pytest.mark.timeout(600)]

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
HEAD = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
doc_to_visual: !function media.visuals
doc_to_target: answer
metadata: [{{version: 0}}]
"""
TASKS = {
    "demo_ask": """
output_type: generate_until
doc_to_text: "{{question}}"
generation_kwargs: {max_new_tokens: 16, temperature: 0, top_p: 1.0, num_beams: 1, until: ["."]}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
    "demo_choose": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "demo_rounds": """
output_type: generate_until_multi_round
doc_to_text: !function media.next_round
process_results: !function media.in_a_row
generation_kwargs: {max_new_tokens: 16}
metric_list: [{metric: rounds, aggregation: mean, higher_is_better: true}]
""",
}
CODE = '''
"""What a task's author writes: each kind of file in another form."""

import numpy as np
import PIL.Image
import soundfile


def visuals(doc):
    return [FORMS.get(path.rpartition(".")[2], str)(path) for path in doc["paths"]]


def sound(path):
    samples, rate = soundfile.read(path)
    return {"array": samples, "sampling_rate": rate}


FORMS = {"png": PIL.Image.open, "jpg": PIL.Image.open, "wav": sound, "npy": np.load}


def next_round(doc, lmms_eval_specific_kwargs=None, previous_output=None, round_idx=None, previous_round_info=None):
    if round_idx is None:
        return doc["question"]
    if round_idx == 2:
        return None, None, True, previous_output, None
    return visuals(doc), "Are they the same number?", False, previous_output, None


def in_a_row(doc, results):
    return {"rounds": len(results[0])}
'''


@pytest.fixture(scope="module")
def model():
    import xblip

    return xblip.load("numerals")


@pytest.fixture(scope="module")
def docs():
    from xblip_numerals.demo import FOLDER

    asked = [
        {
            "question": row["question"],
            "answer": row["answer"],
            "media": row["media"],
            "paths": [str(FOLDER / file) for _, file in row["media"]],
        }
        for row in json.loads((FOLDER / "questions.json").read_text())
    ]
    files = [json.loads(line) for line in (FOLDER / "manifest.jsonl").read_text().splitlines()]
    chosen = [
        {
            "question": f"Which number is in the {row['modality'].replace('_', ' ')}?",
            "answer": NUMBERS.index(row["facts"]["number"]),
            "choices": NUMBERS,
            "media": [[row["modality"], row["path"]]],
            "paths": [str(FOLDER / row["path"])],
        }
        for row in files
    ]
    return {"demo_ask": asked, "demo_choose": chosen, "demo_rounds": chosen[:3]}


@pytest.fixture
def tasks(tmp_path, docs):
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "media.py").write_text(CODE)
    for name, text in TASKS.items():
        file = folder / f"{name}.jsonl"
        rows = [{key: value for key, value in doc.items() if key != "media"} for doc in docs[name]]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / f"{name}.yaml").write_text(f"task: {name}{HEAD.format(file=file)}{text.strip()}\n")
    return folder


@pytest.fixture
def evaluate(tasks, tmp_path):
    """Runs lmms-eval; gives what it printed, its results and its samples, by task."""

    def run(names, *options, launcher=("-m", "lmms_eval"), **environment):
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        command = [sys.executable, *launcher, "--model", "xblip", "--model_args", "model=numerals", "--log_samples"]
        command += ["--tasks", names, "--include_path", str(tasks), "--output_path", str(out), *options]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        printed = done.stdout + done.stderr
        results = [json.loads(file.read_text())["results"] for file in out.rglob("*_results.json")]
        samples = {}
        for name in names.split(","):
            for file in out.rglob(f"*_samples_{name}.jsonl"):
                rows = [json.loads(line) for line in file.read_text().splitlines()]
                samples[name] = sorted(rows, key=lambda row: row["doc_id"])
        return printed, results[0] if results else {}, samples

    return run


def answers_of(model, docs):
    """What asking directly gives, each document alone and as files."""
    return [
        model.ask(doc["question"], media=[(kind, path) for (kind, _), path in zip(doc["media"], doc["paths"], strict=True)],
                  max_new_tokens=16, do_sample=False).text
        for doc in docs
    ]  # fmt: skip


def without_ends(answers):
    return [answer.partition(".")[0] for answer in answers]


def test_figures_are_those_of_asking_directly(evaluate, model, docs):
    printed, results, samples = evaluate(",".join(TASKS), "--batch_size", "4")
    assert set(samples) == set(TASKS), printed[-3000:]

    direct = without_ends(answers_of(model, docs["demo_ask"]))
    assert [row["filtered_resps"] for row in samples["demo_ask"]] == direct
    right = [answer == doc["answer"] for answer, doc in zip(direct, docs["demo_ask"], strict=True)]
    assert 0 < sum(right) < len(right)
    assert results["demo_ask"]["exact_match,none"] == pytest.approx(sum(right) / len(right))

    chosen = docs["demo_choose"]
    media = [[(doc["media"][0][0], doc["paths"][0])] for doc in chosen]
    asked = [{"instruction": doc["question"], "media": files} for doc, files in zip(chosen, media, strict=True)]
    scores = model.score(asked, NUMBERS)
    values = [[float(value) for value, _ in row["filtered_resps"]] for row in samples["demo_choose"]]
    assert all(
        [-value for value in given] == pytest.approx(score, abs=1e-3)
        for given, score in zip(values, scores, strict=True)
    )
    for metric, lengths in (("acc", [1] * 10), ("acc_norm", [len(name) for name in NUMBERS])):
        best = [max(range(10), key=lambda index, row=row: row[index] / lengths[index]) for row in scores]
        accuracy = sum(index == doc["answer"] for index, doc in zip(best, chosen, strict=True)) / len(chosen)
        assert results["demo_choose"][f"{metric},none"] == pytest.approx(accuracy) and accuracy > 0.5

    again = answers_of(model, [{**doc, "question": "Are they the same number?"} for doc in docs["demo_rounds"]])
    rounds = [list(pair) for pair in zip(answers_of(model, docs["demo_rounds"]), again, strict=True)]
    assert [row["filtered_resps"] for row in samples["demo_rounds"]] == rounds


def test_a_run_that_died_goes_on_with_what_it_had(evaluate, tasks, docs, tmp_path, model):
    file, missing = Path(docs["demo_ask"][9]["paths"][0]), tmp_path / "moved.mp4"
    text = (tasks / "demo_ask.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    rows[9]["paths"][0] = str(missing)
    (tasks / "demo_ask.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    again = {"LMMS_CACHE_RUN_ID": "demo"}
    printed, results, _ = evaluate("demo_ask", "--use_cache", str(tmp_path / "cache"), **again)
    assert not results and f"demo_ask, document 9: Cannot read video '{missing}': no such file" in printed
    missing.symlink_to(file)
    printed, _, samples = evaluate("demo_ask", "--use_cache", str(tmp_path / "cache"), **again)
    assert "ResponseCache: 9/14 cache hits" in printed
    direct = without_ends(answers_of(model, docs["demo_ask"]))
    assert [row["filtered_resps"] for row in samples["demo_ask"]] == direct


def test_choices_are_ranked_with_the_cache_too(evaluate, tmp_path):
    for _ in range(2):
        printed, results, _ = evaluate("demo_choose", "--use_cache", str(tmp_path / "cache"), "--batch_size", "8")
        assert results["demo_choose"]["acc,none"] > 0.5, printed[-3000:]


def test_two_processes_give_the_same_answers(evaluate, docs, model):
    launcher = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--main_process_port", "0")
    printed, results, samples = evaluate("demo_ask,demo_choose", launcher=(*launcher, "-m", "lmms_eval"))
    direct = without_ends(answers_of(model, docs["demo_ask"]))
    assert [row["filtered_resps"] for row in samples["demo_ask"]] == direct, printed[-3000:]
    assert results["demo_choose"]["acc,none"] > 0.5


def test_a_setting_that_cannot_be_met_is_told_in_one_line(evaluate):
    printed, results, _ = evaluate("demo_ask", "--gen_kwargs", "beams=3")
    assert not results
    assert re.search(r'Error during evaluation: Unknown generation setting "beams" of a task of lmms-eval\.', printed)


def test_why_choices_are_wrapped():
    """When lmms-eval leaves a pair as it is, `Ranked` may go."""
    from lmms_eval.api.instance import GenerationResult, unwrap_generation_output

    from xblip.lmms_model import Ranked

    assert unwrap_generation_output((1.5, True)) == ("(1.5, True)", None)
    assert unwrap_generation_output(GenerationResult(Ranked((1.5, True)))) == ((1.5, True), None)
