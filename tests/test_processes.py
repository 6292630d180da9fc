"""Training in several processes, and training that is killed: forked runs on the toys, see `forks.py`."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from xblip.mixture import BatchPlan, Source
from xblip.model import XBlip
from xblip.sample import Sample
from xblip.testing import small_qformer

WORDS = "what is this the red green blue number which one larger".split()


class Forks:
    """The process that forks runs; see `forks.py`."""

    def __init__(self):
        self._server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("forks.py"))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, config: Path, *, processes: int = 1, resume: bool = False, kill_after_s: float | None = None) -> dict:
        job = {"config": str(config), "processes": processes, "resume": resume, "kill_after_s": kill_after_s}
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def close(self) -> None:
        self._server.stdin.close()
        self._server.wait(10)


@pytest.fixture(scope="module")
def forks():
    forks = Forks()
    yield forks
    forks.close()


@pytest.fixture
def write_rows(tmp_path):
    """Writes a manifest of a modality's rows and returns its path."""

    def written(name: str, count: int = 64) -> str:
        draw = random.Random(name)
        with (tmp_path / f"{name}.jsonl").open("w") as file:
            for _ in range(count):
                values = [[draw.uniform(-2, 2) for _ in range(4)] for _ in range(draw.choice([1, 1, 2]))]
                row = {
                    name: values,
                    "instruction": " ".join(draw.choices(WORDS, k=draw.randint(2, 9))),
                    "answer": " ".join(draw.choices(WORDS, k=draw.randint(1, 7))),
                }
                file.write(json.dumps(row) + "\n")
        return str(tmp_path / f"{name}.jsonl")

    return written


@pytest.fixture
def write_config(tmp_path, llm_folder, write_rows):
    """Writes a training config and returns its path; `training` is added to the settings of training."""

    def written(name: str, *, modalities=("toy",), training=(), **values) -> Path:
        branches = [{"modality": one, "bridge": small_qformer(llm_folder, max_segments=0)} for one in modalities]
        config = {
            "llm": {"source": str(llm_folder), "dtype": "float32"},
            "branch": branches[0],
            "also": branches[1:],
            "data": {"train": [write_rows(one) for one in modalities], "eval_answers": 8},
            "training": {
                "output_dir": str(tmp_path / name),
                "max_steps": 8,
                "per_device_train_batch_size": 8,
                "learning_rate": 5e-3,
                "logging_steps": 1,
                "save_strategy": "no",
                "report_to": "none",
                "use_cpu": True,
                "disable_tqdm": True,
                **dict(training),
            },
            "generation": {"max_new_tokens": 2},
            **values,
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config))
        return path

    return written


def losses(config: Path) -> list[float]:
    return [entry["loss"] for entry in log_of(config) if "loss" in entry]


def log_of(config: Path) -> list[dict]:
    return json.loads((config.with_suffix("") / "trainer_state.json").read_text())["log_history"]


def weights(config: Path) -> dict[str, torch.Tensor]:
    folder = config.with_suffix("")
    return {
        f"{file.parent.relative_to(folder)}/{name}": value
        for file in sorted(folder.glob("**/bridge.safetensors"))
        for name, value in load_file(file).items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("shard", [False, True])
def test_two_processes_train_as_one(forks, write_config, shard, accumulation):
    eval_rows = {"eval_strategy": "steps", "eval_steps": 4, "per_device_eval_batch_size": 5}
    settings = {**eval_rows, "gradient_accumulation_steps": accumulation}
    one = write_config("one", training=settings)
    two = write_config("two", training={**settings, "per_device_train_batch_size": 4}, shard_llm=shard)
    for config, processes in ((one, 1), (two, 2)):
        values = yaml.safe_load(config.read_text())
        values["data"]["eval"] = values["data"]["train"]
        config.write_text(yaml.safe_dump(values))
        ended = forks.run(config, processes=processes)
        assert ended["status"] == [0] * processes, ended
    assert losses(two) == pytest.approx(losses(one), abs=1e-4) and len(losses(one)) == 8
    for name in ("eval_loss", "eval_accuracy"):
        measured = [[entry[name] for entry in log_of(config) if name in entry] for config in (one, two)]
        assert measured[0] == pytest.approx(measured[1], abs=1e-4) and len(measured[0]) == 2
    ours, theirs = weights(one), weights(two)
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-3) for name in ours)


@pytest.mark.slow
def test_a_mixture_of_two_modalities_runs_in_two_processes(forks, write_config):
    config = write_config(
        "mixture",
        modalities=("toy", "beads"),
        training={"max_steps": 200, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    )
    ended = forks.run(config, processes=2)
    assert ended["status"] == [0, 0], ended
    assert len(losses(config)) == 200
    assert {name.split("/")[0] for name in weights(config)} == {"toy", "beads"}


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_killed_at_ten_moments_ends_with_the_same_weights(forks, write_config, llm_folder, processes):
    bridge = small_qformer(llm_folder, max_segments=0, dropout=0.2)
    settings = {"max_steps": 40, "save_strategy": "steps", "save_steps": 3, "save_total_limit": 2, "logging_steps": 5}
    branch = {"modality": "toy", "bridge": bridge}
    whole, broken = (write_config(name, training=settings, branch=branch) for name in ("whole", "broken"))
    unbroken = forks.run(whole, processes=processes)
    assert unbroken["status"] == [0] * processes, unbroken
    moments = random.Random(processes)
    folder = broken.with_suffix("")
    steps = []
    for _ in range(10):
        resume = any(folder.glob("checkpoint-*"))
        ended = forks.run(
            broken, processes=processes, resume=resume, kill_after_s=moments.uniform(0, unbroken["seconds"] / 3)
        )
        assert set(ended["status"]) <= {0, -9} and not ended["errors"], ended
        steps.append(max((int(path.name.rsplit("-")[-1]) for path in folder.glob("checkpoint-*")), default=0))
    assert steps == sorted(steps) and steps[0] < steps[-1]
    ended = forks.run(broken, processes=processes, resume=any(folder.glob("checkpoint-*")))
    assert ended["status"] == [0] * processes, ended
    ours, theirs = weights(whole), weights(broken)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not list(folder.parent.glob("**/unfinished-*"))


@pytest.mark.slow
def test_the_log_tells_the_mean_over_all_tokens_of_a_step(forks, write_config, llm, toys):
    """Of two processes and two micro-batches, recomputed row by row with weights that stay as they were."""
    names, settings = ("toy", "beads"), {"max_steps": 6, "per_device_train_batch_size": 3, "learning_rate": 0.0}
    config = write_config("told", modalities=names, training={**settings, "gradient_accumulation_steps": 2})
    ended = forks.run(config, processes=2)
    assert ended["status"] == [0, 0], ended
    folder = config.with_suffix("")
    model = XBlip.compose(llm=llm, branches={name: folder / name for name in names})
    rows = [list(map(json.loads, (folder.parent / f"{name}.jsonl").read_text().splitlines())) for name in names]
    plans = [
        iter(
            BatchPlan(
                [Source(len(rows[0]), "toy"), Source(len(rows[1]), "beads")],
                batch_size=3, seed=42, accumulation=2, world_size=2, rank=rank,
            )
        )
        for rank in range(2)
    ]  # fmt: skip
    seen = set()
    for told in losses(config):
        visits = [visit for plan in plans for _ in range(2) for visit in next(plan)]
        assert len(visits) == 12 and len({visit.source for visit in visits}) == 1
        seen.add(visits[0].source)
        likelihood = tokens = 0
        for visit in visits:
            row = rows[visit.source][visit.index]
            sample = Sample(row["instruction"], [(names[visit.source], row[names[visit.source]])])
            likelihood += model.score([sample], [row["answer"]])[0][0]
            tokens += len(llm.tokenize(row["answer"])) + 1
        assert told == pytest.approx(-likelihood / tokens, abs=1e-4)
    assert seen == {0, 1}


@pytest.mark.slow
def test_rows_that_one_process_skips_are_told_by_the_first_and_named_once(forks, write_config, tmp_path):
    config = write_config("skipping", training={"max_steps": 16, "per_device_train_batch_size": 4})
    rows = (tmp_path / "toy.jsonl").read_text().splitlines()
    for place in (3, 20, 41):
        rows[place] = json.dumps({**json.loads(rows[place]), "toy": f"missing-{place}.txt"})
    (tmp_path / "toy.jsonl").write_text("\n".join(rows) + "\n")
    values = yaml.safe_load(config.read_text())
    values["data"]["max_skipped"] = 0.1
    config.write_text(yaml.safe_dump(values))
    log = config.with_suffix("") / "skipped.jsonl"
    log.parent.mkdir()
    log.write_text("".join(json.dumps({"origin": f"before, line {row}", "reason": ""}) + "\n" for row in range(40)))
    ended = forks.run(config, processes=2)
    assert ended["status"] == [0, 0], ended
    named = [json.loads(line)["origin"].rsplit(" ", 1)[1] for line in log.read_text().splitlines()]
    assert sorted(named) == ["21", "4", "42"]
    assert [entry["skipped"] for entry in log_of(config) if "skipped" in entry][-1] == 3


@pytest.mark.slow
def test_what_ends_one_process_ends_the_run_with_one_clear_message(forks, write_config, tmp_path):
    config = write_config("ends", training={"max_steps": 16, "per_device_train_batch_size": 4})
    rows = (tmp_path / "toy.jsonl").read_text().splitlines()
    rows[3] = json.dumps({**json.loads(rows[3]), "toy": [1]})
    (tmp_path / "toy.jsonl").write_text("\n".join(rows) + "\n")
    ended = forks.run(config, processes=2)
    assert set(ended["status"]) <= {2, -9} and ended["seconds"] < 60, ended
    reason, *others = sorted(ended["errors"], key=lambda line: "Another process of this run has ended" in line)
    assert "toy.jsonl, line 4: A toy input must be rows of four numbers" in reason
    assert all("Another process of this run has ended" in line for line in others)
