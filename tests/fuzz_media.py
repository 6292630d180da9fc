"""Breaks files of a modality in thousands of ways, and lets the server's workers read them.

    python tests/fuzz_media.py image --count 2000 --seed 0

Each file must be read into tensors of the right kind, or refused by one clear sentence, or end its worker by a limit of
time or memory; whatever else happens is a finding, which is made smaller and written to a folder. Each is read twice, so
that what depends on chance, or on memory that nobody has written to, is seen. The modalities are those of the numerals
model, within the limits of `xblip serve`.
"""

import argparse
import logging
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from fuzz_mutate import Case, cases, drawn
from fuzz_seeds import of_others, seeds
from torch import Tensor

from xblip.decode_pool import DecodePool
from xblip.errors import MediaError

MODALITIES = ("image", "video", "audio", "point_cloud")
WEIGHTS = {"point_cloud": dict.fromkeys((".obj", ".off", ".stl", ".glb", ".gltf"), 1)}
"""open3d, which these need, takes seconds to start, for each file anew."""
PLEASANT = ("read", "refused", "over the time", "over the memory")
PHRASES = {
    "was not read within the": "over the time",
    "of memory that there are for one": "over the memory",
    "the process that read it died": "worker died",
    "reading it failed, and the log says why": "unexpected exception",
}
REASON = re.compile(r"of another format \((.*)\)\. Expected")
INSIDES = re.compile(
    r"<_|<class|\w+Error\b|Traceback|Errno|0x[0-9a-f]{6}|object (has|is|of)|to unpack|unpack requires|index|out of range|"
    r"out of bounds|None|argument|invalid literal for|(list|tuple|str|int|buffer) (must|cannot|can't|has|is)|^b?'[^']*'$|"
    r"^\W*\w*\W*$"
)
"""What only who wrote a reader could make sense of."""
OF_THE_FILE = re.compile(r"^(its header has the line|could not convert string to float:) b?['\"].*")
"""What a message repeats of a file, in which anything may stand, such as "element vertex 0x10e999"."""
SLOW_SECONDS = 12.0
Load = Callable[[str, Path], Mapping[str, Tensor]]
Spec = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True)
class Outcome:
    """What became of a file.

    Attributes:
      kind: one of `PLEASANT`, or what is wrong.
      said: the sentence that refused it, or what is wrong with its tensors.
      seconds: that it took.
      tensors: if it was read.
    """

    kind: str
    said: str
    seconds: float
    tensors: Mapping[str, Tensor] | None = None


class Range:
    """Where files of one modality are shot at.

    Attributes:
      name: the modality's.
      load: reads a file of a modality, as `DecodePool.load` does.
      spec: how its tensors look: shapes without the first axis, and dtypes.
    """

    def __init__(self, name: str, load: Load, folder: Path):
        self.name, self.load, self._folder = name, load, folder
        self.spec: Spec = {}

    def learn(self, whole: Mapping[str, bytes]) -> list[str]:
        """Reads whole files, which tell how tensors look; returns what became of those that are refused."""
        refused = []
        for name, content in whole.items():
            outcome = self.read(content, name[name.rfind(".") :])
            if outcome.tensors is None:
                refused.append(f"{name}: {outcome.kind}: {outcome.said}")
                continue
            found = {key: (tuple(value.shape[1:]), value.dtype) for key, value in outcome.tensors.items()}
            assert self.spec in ({}, found), f"{name} gives {found} and not {self.spec}"
            self.spec = found
        return refused

    def shoot(self, content: bytes, ending: str) -> Outcome:
        """Reads a file twice; the outcome is the worse one."""
        first = self.read(content, ending)
        if first.kind not in ("read", "refused"):
            return first
        second = self.read(content, ending)
        if second.kind not in ("read", "refused"):
            return second
        same = first.kind == second.kind and (
            first.said == second.said
            if first.tensors is None
            else all(torch.equal(first.tensors[key], second.tensors[key]) for key in first.tensors)
        )
        if same:
            return first
        return Outcome("differs from one time to the other", f"{first.said} | {second.said}", second.seconds)

    def read(self, content: bytes, ending: str) -> Outcome:
        path = Path(self._folder, f"{time.monotonic_ns():x}{ending}")
        path.write_bytes(content)
        began = time.monotonic()
        try:
            tensors = self.load(self.name, path)
        except MediaError as error:
            took = time.monotonic() - began
            said = str(error).replace(str(path), f"broken{ending}")
            kind = next((kind for phrase, kind in PHRASES.items() if phrase in said), "refused")
            if kind == "refused":
                kind = unclear(said) or (kind if took < SLOW_SECONDS else "slow")
            return Outcome(kind, said, took)
        finally:
            path.unlink()
        took = time.monotonic() - began
        wrong = self.wrong(tensors)
        return Outcome("wrong tensors" if wrong else "read" if took < SLOW_SECONDS else "slow", wrong, took, tensors)

    def wrong(self, tensors: Mapping[str, Tensor]) -> str:
        """Says what is wrong with tensors, if anything is."""
        if not self.spec:
            return ""
        for name, tensor in tensors.items():
            shape, dtype = self.spec.get(name, ((), None))
            if tuple(tensor.shape[1:]) != shape or tensor.dtype != dtype or not 0 < len(tensor) <= 32:
                return f"{name} is {tuple(tensor.shape)} {tensor.dtype}"
            if not tensor.isfinite().all() or tensor.abs().max() > 1e4:
                return f"{name} goes from {tensor.min()} to {tensor.max()}"
        return "" if tensors.keys() == self.spec.keys() else f"tensors are {', '.join(tensors)}"


def unclear(said: str) -> str:
    """Says what keeps a refusal from being clear, if anything does."""
    reason = said.removeprefix("Cannot read ")
    if reason == said or not said.endswith(".") or not said.isprintable() or not 30 < len(said) < 700:
        return "no clear sentence"
    given = REASON.search(said)
    return "tells of its insides" if given and INSIDES.search(OF_THE_FILE.sub(r"\1 it", given[1])) else ""


def pattern(said: str) -> str:
    """A refusal without what differs from file to file."""
    return re.sub(r"[0-9a-f]{8,}|-?[0-9]+(\.[0-9]+)?(e[+-]?[0-9]+)?", "N", re.sub(r"'[^']*'", "'..'", said))


def model_modalities(names: Sequence[str]) -> dict[str, object]:
    """The numerals model's modalities, as a server limits them."""
    import xblip
    from xblip.serve_media import limited

    made = limited(xblip.load("numerals"), {})
    return {name: made[name] for name in names}


def run(found: Range, whole: Mapping[str, bytes], shots: Sequence[Case], keep: Path | None) -> Counter:
    """Shoots at a modality; prints what was found, and counts outcomes."""
    began, counts, reasons, times = time.monotonic(), Counter(), Counter(), []
    findings: dict[tuple[str, str], Case] = {}

    def shot(case: Case) -> tuple[Case, Outcome]:
        content = case.content(whole)
        outcome = found.shoot(content, case.ending)
        if outcome.kind in ("slow", "over the time"):  # which may be the fault of whatever else this machine does
            outcome = found.shoot(content, case.ending)
        return case, outcome

    with ThreadPoolExecutor(2) as threads:
        for number, (case, outcome) in enumerate(threads.map(shot, shots), 1):
            counts[outcome.kind] += 1
            times.append(outcome.seconds)
            if outcome.kind == "refused":
                reasons[pattern(outcome.said)] += 1
            else:
                key = (outcome.kind, pattern(outcome.said))
                if outcome.kind != "read" and key not in findings:
                    findings[key] = case
            if number % 200 == 0:
                print(f"  {number} of {len(shots)} after {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    for number, ((kind, said), case) in enumerate(findings.items()):
        small = case.smaller(lambda other, kind=kind: shot(other)[1].kind == kind)
        print(f"\n{kind}: {said}\n  {small}")
        if keep:
            keep.mkdir(parents=True, exist_ok=True)
            name = f"{found.name}-{number:02d}-{kind.replace(' ', '_')}{small.ending}"
            (keep / name).write_bytes(small.content(whole))
    print("\nRefusals:")
    for said, count in reasons.most_common():
        print(f"  {count:5d} {said}")
    times.sort()
    print(f"\n{found.name}: {len(shots)} files in {time.monotonic() - began:.0f} s; ", end="")
    print(f"half within {times[len(times) // 2] * 1000:.0f} ms, slowest {times[-1]:.1f} s")
    print(", ".join(f"{count} {kind}" for kind, count in counts.most_common()), flush=True)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modality", choices=MODALITIES)
    parser.add_argument("--count", type=int, default=2000, help="how many files")
    parser.add_argument("--seed", type=int, default=0, help="of chance; the same files for the same seed")
    parser.add_argument(
        "--data", type=Path, help="a folder of further whole files, such as the public sets of numerals"
    )
    parser.add_argument("--keep", type=Path, help="a folder for what is found")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    with tempfile.TemporaryDirectory() as folder:
        whole = seeds(options.modality, Path(folder))
    if options.data:
        whole |= of_others(options.modality, options.data, 3)
    with tempfile.TemporaryDirectory() as folder, DecodePool(model_modalities([options.modality])) as pool:
        found = Range(options.modality, pool.load, Path(folder))
        for line in found.learn(whole):
            print(f"Refused whole: {line}")
        shots = drawn(cases(whole, WEIGHTS.get(options.modality)), options.count, options.seed)
        counts = run(found, whole, shots, options.keep)
    sys.exit(0 if set(counts) <= set(PLEASANT) else 1)


if __name__ == "__main__":
    main()
