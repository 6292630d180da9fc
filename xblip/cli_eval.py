"""The commands that measure: `xblip eval`, and `xblip compare` of two of its runs.

Nothing heavy is imported before a command runs.
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table


def evaluate(
    config: Annotated[Path, typer.Argument(help="A YAML such as configs/eval/numerals.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.sub=value, e.g. limit=100.")] = None,
) -> None:
    """Measure a model on tasks; started again, it goes on with what is missing."""
    from xblip.evaluate import as_table, load_eval_config
    from xblip.evaluate import evaluate as run

    settings = load_eval_config(config, overrides or [])
    try:
        results = run(settings)
    except KeyboardInterrupt:
        print(f"interrupted: run the same command again to go on in {settings.output_dir}.", file=sys.stderr)
        raise
    if int(os.environ.get("RANK", "0")) == 0:
        show(as_table(results))
        print(f"wrote {settings.output_dir}")


def show(table: Sequence[Sequence[str]]) -> None:
    """Prints a table, its head first, numbers to the right."""
    head, *body = table
    shown = Table(box=None, pad_edge=False)
    for column, title in enumerate(head):
        right = all(row[column][:1].isdigit() or row[column][:1] in "-+" for row in body)
        shown.add_column(title, justify="right" if right else "left", overflow="fold")
    for row in body:
        shown.add_row(*map(escape, row))
    Console(highlight=False).print(shown)


def compare(
    first: Annotated[Path, typer.Argument(help="Output folder of a run of xblip eval.")],
    second: Annotated[Path, typer.Argument(help="Of another one, with the same tasks.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False,
) -> None:
    """Compare two runs on the rows that both have: what the second has more, its interval, and an exact p."""
    from xblip.compare import as_table, told_apart
    from xblip.compare import compare as run

    compared = run(first, second)
    apart = told_apart(first, second)
    if as_json:
        tasks = {task: {name: got._asdict() for name, got in figures.items()} for task, figures in compared.items()}
        print(json.dumps({"tasks": tasks, "differ_in": apart}, indent=2))
    else:
        show(as_table(compared))
        print("the runs differ in:" if apart else "the runs differ in nothing", *apart, sep="\n  ")
