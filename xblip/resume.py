"""What a run leaves behind to be resumed from: whole checkpoints, and the facts that a resumed run must share.

A checkpoint is written under another name and takes its own when all of it is on the disk, so that whatever bears the
name is whole, however the run died.
"""

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import get_last_checkpoint

from xblip.contents import flush
from xblip.errors import BundleError, ConfigError, some_of
from xblip.loading import first_line
from xblip.runs import FACTS, differences, unwritable

STATE = "trainer_state.json"
UNFINISHED = "unfinished-"

LEFT = ("runs", "skipped.jsonl", "curves.png", "lost+found")
"""What a run that ended before its first checkpoint leaves, and the next one may write over; and a new disk."""


def check_output(folder: Path) -> None:
    """Checks that a fresh run writes over nothing.

    Raises:
      ConfigError: the folder holds checkpoints, or something else.
    """
    if any(folder.glob("checkpoint-*")):
        raise ConfigError(
            f"{folder} holds checkpoints of an earlier run: go on from the last by --resume, delete them, or choose another "
            "training.output_dir."
        )
    held = sorted(path.name for path in folder.iterdir() if not path.name.startswith((".", UNFINISHED)))
    held = [name for name in held if name not in LEFT]
    if held:
        raise ConfigError(
            f"{folder} is not empty, and a run would write over what it holds, such as {some_of(held)}: choose another "
            "training.output_dir, or delete that."
        )


def last_checkpoint(folder: str | Path) -> Path:
    """Returns the last whole checkpoint of an output folder.

    Raises:
      ConfigError: there is none.
    """
    found = found_checkpoint(folder)
    if found is None:
        raise ConfigError(f"There is no checkpoint in {folder} to resume from: train without --resume.")
    return found


def found_checkpoint(folder: str | Path) -> Path | None:
    """Returns the last whole checkpoint of an output folder, if there is one."""
    found = get_last_checkpoint(str(folder)) if Path(folder).is_dir() else None
    return found and Path(found)


def read_state(checkpoint: Path) -> TrainerState:
    """Reads how far a checkpoint's run had come.

    Raises:
      BundleError: the file is damaged.
    """
    with reading(checkpoint):
        return TrainerState.load_from_json(str(checkpoint / STATE))


@contextlib.contextmanager
def reading(checkpoint: str | Path | None) -> Iterator[None]:
    """Turns whatever a damaged file of a checkpoint raises into one clear error."""
    try:
        yield
    except Exception as cause:
        raise BundleError(
            f"The checkpoint in {checkpoint} is damaged: {first_line(cause)} Delete that folder to go on from the one "
            "before it, or train without --resume."
        ) from cause


@contextlib.contextmanager
def writing(checkpoint: Path, *, is_main: bool) -> Iterator[Path]:
    """Gives a folder to write a checkpoint into, which bears its name only once it is whole.

    All processes write; the one that `is_main` must leave last, after the others have written.

    Raises:
      BundleError: the disk is full, or refuses for another reason; what was written of this one is gone.
    """
    with _staging(checkpoint) as staging:
        yield staging
        if is_main:
            _to_disk(staging)
            shutil.rmtree(checkpoint, ignore_errors=True)
            staging.replace(checkpoint)
            flush(checkpoint.parent)


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Gives a folder beside another; what is written there takes the place of what bears its name in the other.

    Raises:
      BundleError: as `writing`; the other folder is then as it was.
    """
    folder = folder.resolve()
    with _staging(folder) as staging:
        yield staging
        _to_disk(staging)
        for part in sorted(staging.iterdir()):
            if part.is_dir():
                shutil.rmtree(folder / part.name, ignore_errors=True)
            shutil.move(part, folder / part.name)  # which copies where the folder is a disk of its own
        staging.rmdir()
        flush(folder)


@contextlib.contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """A folder beside the target, so that relative paths written in it hold; gone if it cannot be filled."""
    staging = _staging_of(target)
    try:
        staging.mkdir(parents=True, exist_ok=True)
        yield staging
    except (OSError, RuntimeError, SafetensorError) as cause:
        if not _is_of_the_disk(cause):
            raise
        shutil.rmtree(staging, ignore_errors=True)
        raise unwritable(target, cause) from cause


def _staging_of(target: Path) -> Path:
    return target.with_name(f"{UNFINISHED}{target.name}")


def _is_of_the_disk(cause: Exception) -> bool:
    """Whether writing failed; torch and safetensors tell of a full disk by a RuntimeError or an error of their own."""
    words = ("No space left", "File too large", "Disk quota", "unexpected pos", "write failed", "I/O error")
    return isinstance(cause, OSError) or any(word.lower() in str(cause).lower() for word in words)


def clear_unfinished(folder: Path) -> None:
    """Removes what a run that died was writing, in a folder and in the place of it."""
    for staging in [*folder.glob(f"{UNFINISHED}*"), _staging_of(folder.resolve())]:
        shutil.rmtree(staging, ignore_errors=True)


def _to_disk(folder: Path) -> None:
    """Makes sure that a crash of the machine loses nothing of a folder."""
    for path in [*folder.rglob("*"), folder]:
        flush(path)


def write_facts(folder: Path, facts: Mapping[str, Any]) -> None:
    """Writes what a resumed run must share."""
    Path(folder, FACTS).write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")


def check_facts(checkpoint: Path, facts: Mapping[str, Any]) -> None:
    """Compares a run with the one that wrote a checkpoint.

    Raises:
      ConfigError: they differ; the message says in what.
      BundleError: the checkpoint is damaged.
    """
    with reading(checkpoint):
        before = json.loads((checkpoint / FACTS).read_text())
        differing = differences(before, facts)
    if differing:
        shown = some_of(differing, 5, between="; ")
        raise ConfigError(
            f"This is not the run that wrote {checkpoint}: {shown}. Restore that, or train anew in another output_dir; "
            "init.folder takes over what was learnt."
        )
