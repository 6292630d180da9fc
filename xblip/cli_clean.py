"""The commands that make training data of captions: `xblip augment` and `xblip capfilt`.

Nothing heavy is imported before a command runs.
"""

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer

from xblip.cli_eval import show

Overrides = Annotated[list[str] | None, typer.Argument(help="key.sub=value, e.g. output_dir=runs/mine.")]


def augment(
    config: Annotated[Path, typer.Argument(help="A YAML such as configs/augment/numerals.yaml.")],
    overrides: Overrides = None,
) -> None:
    """Make questions and answers of captions, each checked; started again, it goes on with what is missing."""
    from xblip.instruct_data import as_table, load_augment_config
    from xblip.instruct_data import augment as run

    settings = load_augment_config(config, overrides or [])
    with _told_how_to_go_on(settings.output_dir):
        told = run(settings)
    _show(as_table(told), settings.output_dir)


def capfilt(
    config: Annotated[Path, typer.Argument(help="A YAML such as configs/capfilt/numerals-image.yaml.")],
    overrides: Overrides = None,
) -> None:
    """Write captions of files, and keep those that describe them (CapFilt); goes on with what is missing."""
    from xblip.capfilt import as_table, load_capfilt_config
    from xblip.capfilt import capfilt as run

    settings = load_capfilt_config(config, overrides or [])
    with _told_how_to_go_on(settings.output_dir):
        told = run(settings)
    _show(as_table(told), settings.output_dir)


@contextlib.contextmanager
def _told_how_to_go_on(folder: str) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        print(f"interrupted: run the same command again to go on in {folder}.", file=sys.stderr)
        raise


def _show(table: Sequence[Sequence[str]], folder: str) -> None:
    if int(os.environ.get("RANK", "0")) == 0:
        show(table)
        print(f"wrote {folder}")
