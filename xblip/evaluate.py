"""`xblip eval`: asks a model the rows of some tasks, and makes figures with intervals of what it says.

What a model says is written row by row and scored at the end from what was written, so that a killed run goes on, many
processes give what one gives, and two runs can be compared without asking again.
"""

import json
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm

import xblip
from xblip import config as configs
from xblip import markdown, plugins
from xblip.contents import describe
from xblip.errors import ConfigError, MediaError, XBlipError
from xblip.eval_data import ManifestTask, read_rows
from xblip.eval_model import System, open_system
from xblip.eval_task import EvalRow, EvalTask, Line
from xblip.intervals import RESAMPLES, Figure, Measured, measure
from xblip.runs import Lines, Run, open_run
from xblip.sample import Media

__all__ = ["EvalConfig", "EvalRow", "EvalTask", "Figure", "Line", "ManifestTask", "Measured", "evaluate", "read_rows"]

RESULTS = "results.json"
TABLE = "RESULTS.md"


@dataclass
class EvalConfig:
    """An evaluation.

    Attributes:
      model: a bundle's name, folder or hub id; a retriever's folder; or the keys of a bundle's config, so that branches
        are composed here.
      tasks: by names of their own, each with its `kind` and that kind's settings.
      output_dir: where predictions and results go.
      batch_size: rows that are asked at once.
      limit: ask so many rows of each task, drawn by the seed; all if None.
      seed: of that sample, of bootstrap intervals, and of what chance tasks take.
      max_skipped: share of a task's rows whose files may be broken.
      media: by modality, settings in the place of those it was saved with, such as {"num_frames": 2}.
      llm: loading options of the LLM, such as {"dtype": "bfloat16"}.
      use_cpu: leave accelerators alone.
    """

    model: Any
    tasks: dict[str, Any]
    output_dir: str
    batch_size: int = 8
    limit: int | None = None
    seed: int = 42
    max_skipped: float = 0.01
    media: dict[str, dict[str, Any]] = field(default_factory=dict)
    llm: dict[str, Any] = field(default_factory=dict)
    use_cpu: bool = False


class Result(NamedTuple):
    """What came out of a task.

    Attributes:
      kind: of task.
      rows: how many there are; `asked` of them were, and `skipped` of these could not be read.
      figures: by name.
    """

    kind: str
    rows: int
    asked: int
    skipped: int
    figures: dict[str, Measured]


def load_eval_config(path: str | Path, overrides: Sequence[str] = ()) -> EvalConfig:
    """Reads an evaluation's config; paths in it start at the working directory."""
    return configs.build(EvalConfig, configs.load_yaml(path, overrides), where="config")


def build_tasks(config: EvalConfig) -> dict[str, EvalTask]:
    """Builds the tasks of a config.

    Raises:
      ConfigError, PluginError: a kind or a setting is wrong, or there is no task.
    """
    if not config.tasks:
        raise ConfigError("tasks is empty: name at least one, with its kind and its data.")
    return {name: build_task(name, settings, seed=config.seed) for name, settings in config.tasks.items()}


def build_task(name: str, settings: Any, *, seed: int = 0) -> EvalTask:
    """Builds one task of its settings, which say its `kind`."""
    if not str(name).replace("-", "_").isidentifier():
        raise ConfigError(f'tasks: "{name}" names files too: use letters, digits, "-" and "_" alone.')
    if not isinstance(settings, Mapping) or not isinstance(settings.get("kind"), str):
        known = ", ".join(plugins.names("task"))
        raise ConfigError(f'tasks.{name} lacks its "kind": add one of {known}.')
    kind = plugins.get("task", settings["kind"])
    own = {key: value for key, value in settings.items() if key != "kind"}
    return kind(configs.build(kind.Config, own, where=f"tasks.{name}"), seed=seed)


def evaluate(config: EvalConfig) -> dict[str, Result]:
    """Asks what has not been asked yet, and writes predictions, results.json and RESULTS.md into the output folder.

    Started by torchrun or accelerate launch, its processes divide the rows.

    Returns:
      The results by task; in each process the same.

    Raises:
      ConfigError, InputError, PluginError: a setting, data or a task is wrong, or the folder holds another run.
      BundleError: the model is wrong, or nothing can be written.
      MediaError: more than `max_skipped` of a task's rows name files that cannot be read.
    """
    configs.at_least(config, batch_size=1, seed=0)
    if config.limit is not None:
        configs.at_least(config, limit=1)
    configs.check_share("max_skipped", config.max_skipped, whole="a task's rows")
    tasks = build_tasks(config)
    system = open_system(config.model, config.llm, config.media)
    rows = {name: _rows_of(name, task, system) for name, task in tasks.items()}
    chosen = {name: _sample(name, all_rows, config) for name, all_rows in rows.items()}
    facts = {
        "model": system.facts,
        "tasks": config.tasks,
        "data": {name: dict(task.facts()) for name, task in tasks.items()},
        "limit": config.limit,
        "seed": config.seed,
    }
    results: dict[str, Result] = {}
    with open_run(config.output_dir, facts=facts, command="xblip eval", use_cpu=config.use_cpu) as run:
        loaded = _Loaded(system, run.device)
        for name, task in tasks.items():
            lines = run.lines(name)
            _predict(task, chosen[name], lines, loaded, config, name)
            counts = (config.tasks[name]["kind"], len(rows[name]), len(chosen[name]))
            results[name] = _finish(task, chosen[name], lines, config, name, counts)
        run.together(lambda: _write_results(run, results, system, config))
    return results


class _Loaded:
    """A model that is loaded when it is first asked for: a run that has all answers needs none."""

    def __init__(self, system: System, device: torch.device):
        self.system, self.device, self._model = system, device, None

    @property
    def model(self) -> Any:
        if self._model is None:
            self._model = self.system.load(self.device)
        return self._model


def _rows_of(name: str, task: EvalTask, system: System) -> Sequence[EvalRow]:
    try:
        rows = task.rows(system.modalities)
    except XBlipError as error:
        raise type(error)(f"tasks.{name}: {error}") from error
    ids = [row.id for row in rows]
    assert len(set(ids)) == len(ids), f"the task {name} gives two rows one id"
    if not rows:
        raise ConfigError(f"tasks.{name} has no rows: check its data.")
    return rows


def _sample(name: str, rows: Sequence[EvalRow], config: EvalConfig) -> list[EvalRow]:
    """All rows, or so many units' rows that they are as many as the limit, drawn by the seed, in their order."""
    units = list(dict.fromkeys(row.unit or row.id for row in rows))
    if config.limit is None or config.limit >= len(units):
        return list(rows)
    kept = set(random.Random(f"{config.seed} {name}").sample(units, config.limit))
    return [row for row in rows if (row.unit or row.id) in kept]


def _predict(
    task: EvalTask, rows: Sequence[EvalRow], lines: Lines, loaded: _Loaded, config: EvalConfig, name: str
) -> None:
    """Asks this process' part of the rows that no run before has an answer to."""
    mine = lines.run.mine([row for row in rows if "error" in lines.held.get(row.id, {"error": ""})])
    allowed, broken = config.max_skipped * len(rows), 0
    show = lines.run.is_main and sys.stderr.isatty()
    with tqdm(total=len(mine), desc=name, disable=not show) as bar:
        for start in range(0, len(mine), config.batch_size):
            batch = mine[start : start + config.batch_size]
            made = _predict_batch(task, loaded.model, batch)
            lines.add(made)
            bar.update(len(batch))
            broken += sum("error" in line for line in made)
            if broken > allowed:
                _check_broken([line for line in made if "error" in line], broken, len(rows), config, name)


def _predict_batch(task: EvalTask, model: Any, batch: Sequence[EvalRow]) -> list[Line]:
    try:
        with torch.inference_mode():
            predicted = task.predict(model, batch)
    except MediaError as error:
        if len(batch) == 1:
            return [{**_line(batch[0]), "error": str(error)}]
        return [line for row in batch for line in _predict_batch(task, model, [row])]
    except XBlipError as error:
        if len(batch) > 1:
            return [line for row in batch for line in _predict_batch(task, model, [row])]
        raise type(error)(f"{batch[0].sample.origin or f'row {batch[0].id}'}: {error}") from error
    assert len(predicted) == len(batch), f"{type(task).__name__}.predict gives {len(predicted)} for {len(batch)} rows"
    return [{**_line(row), **prediction} for row, prediction in zip(batch, predicted, strict=True)]


def _line(row: EvalRow) -> Line:
    """What a prediction is beside."""
    return {
        "id": row.id,
        **({"unit": row.unit} if row.unit else {}),
        "origin": row.sample.origin,
        "inputs": [
            [part.modality, describe(part.source)] if isinstance(part, Media) else part for part in row.sample.media
        ],
        "instruction": row.sample.instruction,
        "truth": row.truth,
        **row.extra,
    }


def _check_broken(broken: Sequence[Line], count: int, rows: int, config: EvalConfig, name: str) -> None:
    if count > config.max_skipped * rows:
        last = broken[-1]
        raise MediaError(
            f"tasks.{name}: {count} of {rows} rows name files that cannot be read, more than max_skipped = "
            f"{config.max_skipped:g} allows. The predictions in {config.output_dir} name them; the last one: "
            f"{last['origin'] or last['id']}: {last['error']} Mend the files or remove the rows, or allow more."
        )


def _finish(
    task: EvalTask, rows: Sequence[EvalRow], lines: Lines, config: EvalConfig, name: str, counts: tuple[str, int, int]
) -> Result:
    """Scores what all processes have written."""
    found: list[Result] = []

    def make(written: Mapping[str, Line]) -> list[Line]:
        ordered = [written[row.id] for row in rows]
        answered = [line for line in ordered if "error" not in line]
        broken = [line for line in ordered if "error" in line]
        if broken:
            _check_broken(broken, len(broken), len(rows), config, name)
        if not answered:
            raise MediaError(f"tasks.{name}: no row could be read. The first: {broken[0]['error']}")
        figures = task.score(answered)
        measured = {figure: measure(value, seed=config.seed) for figure, value in figures.items()}
        found.append(Result(*counts, len(broken), measured))
        scores = {figure: value.scores for figure, value in figures.items()}
        for line in answered:
            line["scores"] = {figure: own[line["id"]] for figure, own in scores.items() if line["id"] in own}
        if type(task).report is not EvalTask.report:
            task.report(lines.run.folder / name, answered, measured)
        return ordered

    lines.finish(make)
    return lines.run.together(lambda: found[0])


def as_table(results: Mapping[str, Result]) -> list[list[str]]:
    """Returns a table of results, its head first: figures and their intervals are shown times 100."""
    table = [["task", "figure", "value", "95 %", "n", "skipped"]]
    for name, result in results.items():
        for figure, got in result.figures.items():
            asked = f"{got.n}" if result.asked == result.rows else f"{got.n} (sample of {result.rows})"
            interval = f"{100 * got.low:.1f} to {100 * got.high:.1f}"
            table.append([name, figure, f"{100 * got.value:.1f}", interval, asked, str(result.skipped)])
    return table


def _write_results(run: Run, results: Mapping[str, Result], system: System, config: EvalConfig) -> None:
    told: dict[str, Any] = {
        "model": system.name,
        "xblip": xblip.__version__,
        "seed": config.seed,
        "limit": config.limit,
        "resamples": RESAMPLES,
    }
    told["tasks"] = {
        name: {
            **result._asdict(),
            "figures": {figure: measured._asdict() for figure, measured in result.figures.items()},
        }
        for name, result in results.items()
    }
    run.write(RESULTS, json.dumps(told, indent=2) + "\n")
    sample = f" A sample of {config.limit} of each, drawn by seed {config.seed}." if config.limit else ""
    run.write(
        TABLE,
        f"# {system.name}\n\n{markdown.table(as_table(results))}\nFigures times 100, with 95 % intervals of "
        f"{RESAMPLES} bootstrap resamples of the rows (seed {config.seed}).{sample} Predictions, row by row: "
        f"{', '.join(f'[{name}]({name}.jsonl)' for name in results)}. xblip {xblip.__version__}.\n",
    )
