"""Converting published models: into bundles, branches, retrievers, encoders and initial weights.

What a source is, its own content tells. Which modality a part belongs to is the modality's to say
(`transformers_models`, `checkpoint_prefix`, `convert_encoder`), so nothing here names one.
"""

import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path

from xblip import plugins
from xblip.branch import made_folder
from xblip.checkpoint import Checkpoint, read
from xblip.convert_qformer import Wanted, from_bert, from_lavis
from xblip.convert_retrieval import RETRIEVERS, from_retriever
from xblip.convert_transformers import from_transformers
from xblip.errors import BundleError, ConfigError
from xblip.export import to_transformers
from xblip.lavis import prefixes
from xblip.model import XBlip


@dataclass
class Report:
    """What a conversion wrote, and what became of the source's weights.

    Attributes:
      made: what it wrote: "bundle", "branch", "retriever", "encoder" or "initial weights", with the modality's name if
        it has one.
      loaded: number of tensors taken.
      fresh: names of what the source lacks, with what they are instead.
      left_out: names of what was left out, with the reason.
      notes: what differs there, and its user must know.
    """

    made: str
    loaded: int
    fresh: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """A line on each."""
        lines = [self.made, f"loaded: {self.loaded} weights"]
        lines += [*_told("fresh", self.fresh), *_told("left out", self.left_out)]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def _told(what: str, names: Mapping[str, str]) -> list[str]:
    """A line for all weights whose names begin alike and that share a reason."""
    counted = Counter((name.split(".")[0], why) for name, why in names.items())
    lines = [f"{what}: {count} weights of {family}, {why}" for (family, why), count in counted.items()]
    return lines or [f"{what}: nothing"]


def convert(source: str | Path, folder: str | Path, wanted: Wanted | None = None) -> Report:
    """Converts a folder or hub id of transformers, or a file of weights, into `folder`.

    Raises:
      BundleError: the source is damaged, of a kind that nobody knows, or does not fit what is wanted; or the folder
        holds something already.
      ConfigError: something is told that such a source has no use for.
    """
    wanted = wanted or Wanted()
    _check_empty(folder)
    checkpoint = read(source)
    with _staging(folder) as staging:
        made = _convert(checkpoint, staging, wanted)
        checkpoint.check_all_used()
    return Report(made, len(checkpoint.taken), dict(checkpoint.fresh), dict(checkpoint.left_out))


def export(bundle: str | Path, folder: str | Path, wanted: Wanted | None = None) -> Report:
    """Writes a branch of a bundle, with its LLM, as a model of transformers.

    Raises:
      BundleError: the bundle or its branch `wanted.only` is not there, or transformers has no such model; or the folder
        holds something already.
      ConfigError: something else is wanted.
    """
    wanted = wanted or Wanted()
    _check_told(bundle, wanted, "only")
    _check_empty(folder)
    model = XBlip.from_pretrained(bundle)
    with _staging(folder) as staging:
        made, notes = to_transformers(model, staging, only=wanted.only)
        loaded = len(read(staging).tensors)
    return Report(made, loaded, notes=notes)


def _check_empty(folder: str | Path) -> None:
    if Path(folder).exists() and (not Path(folder).is_dir() or any(Path(folder).iterdir())):
        raise BundleError(f"{folder} is there already: give a folder that is empty or new, so that nothing is lost.")


@contextmanager
def _staging(folder: str | Path) -> Iterator[Path]:
    """Gives a folder beside `folder`, so that relative paths hold; it gets that name when all went well."""
    folder = Path(folder)
    made_folder(folder.parent)
    with tempfile.TemporaryDirectory(
        dir=folder.parent, prefix=f".{folder.name}-", ignore_cleanup_errors=True
    ) as staging:
        yield Path(staging)
        Path(staging).chmod(0o755)
        os.replace(staging, folder)


def _convert(checkpoint: Checkpoint, folder: Path, wanted: Wanted) -> str:
    if checkpoint.architecture.startswith("Bert"):
        _check_told(checkpoint.path, wanted)
        return from_bert(checkpoint, folder)
    if checkpoint.architecture in RETRIEVERS:
        _check_told(checkpoint.path, wanted, "only")
        return from_retriever(checkpoint, folder, only=wanted.only)
    if checkpoint.architecture:
        _check_told(checkpoint.path, wanted, "only", "llm")
        return from_transformers(checkpoint, folder, only=wanted.only, llm=wanted.llm)
    if found := prefixes(checkpoint):
        return from_lavis(checkpoint, found, folder, wanted)
    return _encoder(checkpoint, folder, wanted)


def _check_told(source: str | Path, wanted: Wanted, *used: str) -> None:
    """Refuses what is told beside a source that needs only what is `used`."""
    told = {field.name for field in fields(wanted) if getattr(wanted, field.name) != field.default}
    if unused := [f"--{name}" for name in sorted(told - set(used))]:
        raise ConfigError(f"{source} is converted as it is, and has no use for {', '.join(unused)}: leave them out.")


def _encoder(checkpoint: Checkpoint, folder: Path, wanted: Wanted) -> str:
    """Lets the installed modalities look at a checkpoint that has no bridge."""
    names = [wanted.only] if wanted.only else plugins.names("modality")
    for name in names:
        if plugins.get("modality", name).convert_encoder(checkpoint, folder):
            _check_told(checkpoint.path, wanted, "only")
            return f"encoder: {name}"
    families = sorted({name.split(".")[0] for name in checkpoint.tensors})
    raise BundleError(
        f"{checkpoint.path} is no checkpoint that {', '.join(names)} can convert: its weights begin with "
        f"{', '.join(families[:6])}. It looks like {_looks_like(checkpoint)}."
    )


def _looks_like(checkpoint: Checkpoint) -> str:
    names = " ".join(checkpoint.tensors)
    for part, guess in (
        ("qformer.encoder.", "a model of transformers; give its whole folder, with config.json"),
        ("mm_projector.", "a projector of LLaVA; give the folder of the whole model from transformers"),
        ("embed_tokens", "an LLM; llm.source takes its folder as transformers saves it"),
        ("visual.", "a model of pictures and texts; give its folder as transformers saves it"),
        ("bert.", "a BERT; give its folder as transformers saves it"),
        ("projector.", "a bridge of xblip; compose takes the branch's folder"),
    ):
        if part in names:
            return guess
    return "nothing that is known"
