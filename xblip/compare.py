"""`xblip compare`: two runs of `xblip eval`, row by row on the rows that both have.

Both are scored anew from what they wrote, by the same code and over the same rows, so that even a figure that depends on
all rows (CIDEr-D's rarity of words) is made alike.
"""

import json
from pathlib import Path
from typing import Any

from xblip.errors import BundleError, ConfigError, some_of
from xblip.eval_task import Line
from xblip.evaluate import RESULTS, build_task
from xblip.intervals import Difference, difference
from xblip.runs import differences, read_facts, read_lines


def compare(first: str | Path, second: str | Path) -> dict[str, dict[str, Difference]]:
    """Compares what two runs wrote of the tasks that they have in common.

    Args:
      first, second: their output folders.

    Returns:
      For each task and each figure that both have, what the second has more.

    Raises:
      BundleError: a folder holds no run, or one that has not ended.
      ConfigError: they have no task in common, or one of other data or of another kind.
    """
    folders = [Path(first).expanduser(), Path(second).expanduser()]
    facts = [read_facts(folder) for folder in folders]
    for folder, told in zip(folders, facts, strict=True):
        if "tasks" not in told or not (folder / RESULTS).is_file():
            raise BundleError(f"{folder} holds no run of xblip eval that has ended: run xblip eval there first.")
    in_order = json.loads((folders[0] / RESULTS).read_text())["tasks"]
    common = [name for name in in_order if name in facts[1]["tasks"]]
    if not common:
        raise ConfigError(
            f"The runs have no task in common: {some_of(list(facts[0]['tasks']))} in {folders[0]}, "
            f"{some_of(list(facts[1]['tasks']))} in {folders[1]}. Name tasks that are the same alike."
        )
    return {name: _compare(name, folders, facts) for name in common}


def told_apart(first: str | Path, second: str | Path) -> list[str]:
    """Says in what two runs differ, such as "model.branches.audio was 'ab', is 'cd'"; where data lie does not matter."""
    told = [read_facts(Path(folder).expanduser()) for folder in (first, second)]
    for facts in told:
        facts.pop("data", None)
        for settings in facts["tasks"].values():
            settings.pop("data", None)
    return differences(*told)


def _compare(name: str, folders: list[Path], facts: list[dict[str, Any]]) -> dict[str, Difference]:
    settings = [told["tasks"][name] for told in facts]
    data = [
        {"kind": own["kind"], "data": sorted(json.dumps(value) for value in told["data"].get(name, {}).values())}
        for own, told in zip(settings, facts, strict=True)
    ]
    if differing := differences(*data):
        raise ConfigError(
            f"The runs' tasks {name} are not the same: {some_of(differing, between='; ')}. Compare runs over the same data."
        )
    tasks = [build_task(name, own) for own in settings]
    lines = [_answered(folder / f"{name}.jsonl") for folder in folders]
    ids = [row for row in lines[0] if row in lines[1]]
    if not ids:
        raise ConfigError(
            f"The runs' tasks {name} have no row in common: ask the same rows, by the same limit and seed."
        )
    figures = [task.score([own[row] for row in ids]) for task, own in zip(tasks, lines, strict=True)]
    seed = facts[0]["seed"]
    return {
        figure: difference(figures[0][figure], figures[1][figure], seed=seed)
        for figure in figures[0]
        if figure in figures[1]
    }


def _answered(path: Path) -> dict[str, Line]:
    return {line["id"]: line for line in read_lines(path) if "error" not in line}


def as_table(compared: dict[str, dict[str, Difference]]) -> list[list[str]]:
    """Returns a table of differences, its head first; figures are shown times 100."""
    table = [["task", "figure", "first", "second", "difference", "95 %", "p", "n"]]
    for name, figures in compared.items():
        for figure, got in figures.items():
            interval = f"{100 * got.low:+.1f} to {100 * got.high:+.1f}"
            p = "–" if got.p is None else f"{got.p:.3f}" if got.p >= 0.001 else "< 0.001"
            row = [name, figure, f"{100 * got.first:.1f}", f"{100 * got.second:.1f}", f"{100 * got.difference:+.1f}"]
            table.append([*row, interval, p, str(got.n)])
    return table
