"""A folder that a command fills, alone or in several processes, killed and started again: its lock, facts and lines.

What is done is kept as lines of JSON that are only ever added, each process in a file of its own, so that a kill or a
full disk can cut the last line alone, which is then written anew.
"""

import contextlib
import errno
import fcntl
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from xblip import config as configs
from xblip.contents import flush
from xblip.errors import BundleError, ConfigError, XBlipError, some_of
from xblip.loading import first_line

T = TypeVar("T")

FACTS = "run.json"
LOCK = ".lock"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
"""What the system says of a disk that takes no more."""
AGAIN = "run the same command again"


class Run:
    """A folder that is being filled.

    Attributes:
      folder: the folder.
      rank, count: number of this process, and how many there are.
      is_main: whether this is the first process, which alone writes what is not lines.
      device: this process' accelerator, or the CPU.
    """

    def __init__(self, folder: Path, state: PartialState):
        self.folder, self.state = folder, state
        self.rank, self.count = state.process_index, state.num_processes
        self.is_main, self.device = state.is_main_process, state.device

    def together(self, work: Callable[[], T]) -> T:
        """Lets the first process work while the others wait; all return what it returns, or raise what it raises."""
        return together(self.state, work)

    def mine(self, items: Sequence[T]) -> Sequence[T]:
        """Returns this process' part of what all processes have in the same order."""
        return items[self.rank :: self.count]

    def lines(self, name: str) -> "Lines":
        """Opens the lines of that name; all processes do so at the same point."""
        return Lines(self, name)

    def write(self, name: str, text: str) -> None:
        """Writes a file so that there is never half of it."""
        write_whole(self.folder / name, text)


class Lines:
    """Mappings of JSON values, each with an "id" of its own, that a run's processes add to a file.

    Attributes:
      path: the file, which is there once `finish` has put together what processes wrote.
      held: what runs before this one have written, by id; the same in all processes.
    """

    def __init__(self, run: Run, name: str):
        self.run = run
        self.path = run.folder / f"{name}.jsonl"
        self.held = self._read()
        run.state.wait_for_everyone()  # nobody adds lines before all have read
        self._own = self.path.with_name(f"{name}.part-{run.rank:05d}.jsonl")
        _cut_unfinished(self._own)

    def _parts(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"{self.path.stem}.part-*.jsonl"))

    def _read(self) -> dict[str, dict[str, Any]]:
        return {line["id"]: line for path in [self.path, *self._parts()] for line in read_lines(path)}

    def add(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Adds lines.

        Raises:
          BundleError: the disk takes no more; what was added before is kept.
        """
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        with naming_full_disks(self._own, AGAIN), self._own.open("ab") as file:
            file.write(text.encode(errors="backslashreplace"))

    def finish(self, make: Callable[[dict[str, dict[str, Any]]], Iterable[Mapping[str, Any]]]) -> None:
        """Puts what all processes wrote into one file, once all have come here.

        Args:
          make: gives the lines of the file, of those that were written, by id; the first process calls it.
        """
        self.run.state.wait_for_everyone()
        self.run.together(lambda: self._finish(make))

    def _finish(self, make: Callable[[dict[str, dict[str, Any]]], Iterable[Mapping[str, Any]]]) -> None:
        lines = make(self._read())
        self.run.write(self.path.name, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        for part in self._parts():
            part.unlink()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Reads lines that a run wrote, without a last one that was cut; none if there is no file.

    Raises:
      BundleError: a line is no JSON, or has no "id".
    """
    if not path.exists():
        return []
    lines = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            values = json.loads(line)
            values["id"]
        except (ValueError, KeyError, TypeError) as cause:
            raise BundleError(
                f"{path}, line {number}, is damaged: it is no JSON object with an id. Delete that line, and {AGAIN}; what "
                "it told is then made anew."
            ) from cause
        lines.append(values)
    return lines


def _cut_unfinished(path: Path) -> None:
    """Takes away what a killed process wrote of its last line."""
    if not path.exists():
        return
    whole = path.read_bytes().rfind(b"\n") + 1
    if whole < path.stat().st_size:
        with path.open("ab") as file:
            file.truncate(whole)


@contextlib.contextmanager
def open_run(
    folder: str | Path,
    *,
    facts: Mapping[str, Any],
    command: str,
    use_cpu: bool = False,
) -> Iterator[Run]:
    """Opens a folder to fill, or to go on with; every process of a run started by torchrun or accelerate does.

    Args:
      folder: made if missing; a folder that holds something else is refused.
      facts: what a run that goes on must share with those before it, as plain values; kept as run.json.
      command: for messages, such as "xblip eval".
      use_cpu: leave accelerators alone.

    Raises:
      BundleError: another run is writing there, or nothing can be written.
      ConfigError: the folder is another run's, which the message tells by what differs, or holds something else.
    """
    import torch

    folder = Path(folder).expanduser()
    cpu = use_cpu or not torch.accelerator.is_available()
    run = Run(folder, PartialState(cpu=cpu, timeout=timedelta(days=7)))
    with contextlib.ExitStack() as until_the_end:
        run.together(lambda: _open(run, facts, command, until_the_end))
        yield run


def _open(run: Run, facts: Mapping[str, Any], command: str, until_the_end: contextlib.ExitStack) -> None:
    folder = run.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
        if held and FACTS not in held:
            raise ConfigError(
                f"{folder} was not written by {command}, and holds {some_of(held)}: choose another output_dir."
            )
        until_the_end.enter_context(the_only_run(folder, command))
    except OSError as cause:
        raise BundleError(f"Cannot write into {folder}: {first_line(cause)} Choose another output_dir.") from cause
    if (folder / FACTS).exists():
        before = read_facts(folder)
        if differing := differences(before, facts):
            raise ConfigError(
                f"{folder} holds a run of {command} with other settings: {some_of(differing, 5, between='; ')}. Restore "
                "that, or choose another output_dir."
            )
    else:
        run.write(FACTS, json.dumps(facts, indent=2, sort_keys=True) + "\n")


def read_facts(folder: Path) -> dict[str, Any]:
    """Reads the facts of a run.

    Raises:
      BundleError: there is no run, or its file is damaged.
    """
    try:
        return json.loads((folder / FACTS).read_text())
    except FileNotFoundError as cause:
        raise BundleError(f"There is no run in {folder}: it lacks {FACTS}. Give a run's output_dir.") from cause
    except (OSError, ValueError) as cause:
        raise BundleError(f"{folder / FACTS} is damaged: {first_line(cause)} Choose another output_dir.") from cause


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Says in what two runs' facts differ, by full names, e.g. "data.path was 'a.jsonl', is 'b.jsonl'"."""
    before, now = configs.flat(before), configs.flat(json.loads(json.dumps(now)))
    return [
        f"{name} was {before.get(name, 'absent')!r:.60}, is {now.get(name, 'absent')!r:.60}"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that there is never half of it, and flushes it to the disk.

    Raises:
      BundleError: the disk takes no more; what the file held is kept.
    """
    part = path.with_name(f".{path.name}.partial")
    with naming_full_disks(path, AGAIN):
        try:
            part.write_text(text, encoding="utf-8", errors="backslashreplace")
            flush(part)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        flush(path.parent)


def together(state: PartialState, work: Callable[[], T]) -> T:
    """Lets the main process work while the others wait; all return what it returns, or raise what it raises."""
    outcome: list[Any] = [None, None]
    if state.is_main_process:
        try:
            outcome[0] = work()
        except XBlipError as error:
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1]:
        raise outcome[1]
    return outcome[0]


@contextlib.contextmanager
def the_only_run(folder: Path, command: str) -> Iterator[None]:
    """Keeps other runs of a command out of a folder; a lock of this process alone, which ends with it however it ends.

    Raises:
      BundleError: another run is writing there.
    """
    with (folder / LOCK).open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as cause:
            raise BundleError(
                f"Another {command} is writing into {folder}: wait for it, or give another folder. To use more "
                "processes, start one run with torchrun or accelerate launch."
            ) from cause
        yield


@contextlib.contextmanager
def naming_full_disks(target: Path, advice: str = "go on with --resume") -> Iterator[None]:
    """Turns what a full disk raises, whatever a run was writing, into one clear error."""
    try:
        yield
    except OSError as cause:
        if cause.errno not in FULL:
            raise
        raise unwritable(target, cause, advice) from cause


def unwritable(target: Path, cause: Exception, advice: str = "go on with --resume") -> BundleError:
    """The error for a disk that takes no more."""
    return BundleError(
        f"Cannot write {target}: {first_line(cause)} What was written before is whole: make room or mend it, and {advice}."
    )
