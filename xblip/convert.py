"""Converting published models: into bundles, branches, retrievers, encoders and initial weights.

What a source is, its own content tells. Which modality a part belongs to is the modality's to say
(`transformers_models`, `checkpoint_prefix`, `convert_encoder`), so nothing here names one.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from xblip import plugins
from xblip.branch import made_folder
from xblip.checkpoint import Checkpoint, read
from xblip.convert_qformer import Wanted, bert_weights, from_lavis, prefixes, save_initial
from xblip.convert_retrieval import RETRIEVERS, from_retriever
from xblip.convert_transformers import from_transformers
from xblip.errors import BundleError
from xblip.export import to_transformers
from xblip.model import XBlip


@dataclass
class Report:
    """What a conversion wrote, and what became of the source's weights.

    Attributes:
      made: what it wrote: "bundle", "branch", "retriever", "encoder" or "initial weights", with the modality's name if
        it has one.
      loaded: number of tensors taken.
      left_out: names of what was left out, with the reason.
      notes: what differs there, and its user must know.
    """

    made: str
    loaded: int
    left_out: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def families(self) -> dict[str, tuple[int, str]]:
        """What was left out by the beginning of its names: how many weights, and why."""
        counted: dict[str, tuple[int, str]] = {}
        for name, why in self.left_out.items():
            family = name.split(".")[0]
            counted[family] = (counted.get(family, (0, ""))[0] + 1, why)
        return counted


def convert(source: str | Path, folder: str | Path, wanted: Wanted | None = None) -> Report:
    """Converts a folder or hub id of transformers, or a file of weights, into `folder`.

    Raises:
      BundleError: the source is damaged, of a kind that nobody knows, or does not fit what is wanted; or the folder
        holds something already.
    """
    wanted = wanted or Wanted()
    _check_empty(folder)
    checkpoint = read(source)
    with _staging(folder) as staging:
        made = _convert(checkpoint, staging, wanted)
        checkpoint.check_all_used()
    return Report(made, len(checkpoint.taken), dict(checkpoint.left_out))


def export(bundle: str | Path, folder: str | Path, *, only: str = "") -> Report:
    """Writes a branch of a bundle, with its LLM, as a model of transformers.

    Raises:
      BundleError: the bundle or its branch `only` is not there, or transformers has no such model; or the folder holds
        something already.
    """
    _check_empty(folder)
    model = XBlip.from_pretrained(bundle)
    with _staging(folder) as staging:
        made, notes = to_transformers(model, staging, only=only)
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
        return save_initial(checkpoint, bert_weights(checkpoint), folder)
    if checkpoint.architecture in RETRIEVERS:
        return from_retriever(checkpoint, folder, wanted)
    if checkpoint.architecture:
        return from_transformers(checkpoint, folder, only=wanted.only, llm=wanted.llm)
    if found := prefixes(checkpoint):
        return from_lavis(checkpoint, found, folder, wanted)
    return _encoder(checkpoint, folder, wanted)


def _encoder(checkpoint: Checkpoint, folder: Path, wanted: Wanted) -> str:
    """Lets the installed modalities look at a checkpoint that has no bridge."""
    names = [wanted.only] if wanted.only else plugins.names("modality")
    for name in names:
        if plugins.get("modality", name).convert_encoder(checkpoint, folder):
            return f"encoder: {name}"
    families = sorted({name.split(".")[0] for name in checkpoint.tensors})
    raise BundleError(
        f"{checkpoint.path} is no checkpoint that {', '.join(names)} can convert: its weights begin with "
        f"{', '.join(families[:6])}. It looks like {_looks_like(checkpoint)}."
    )


def _looks_like(checkpoint: Checkpoint) -> str:
    names = " ".join(checkpoint.tensors)
    for part, guess in (
        ("embed_tokens", "an LLM; llm.source takes the folder of one as transformers saves it"),
        ("visual.", "a model of pictures and texts; give its folder as transformers saves it"),
        ("bert.", "a BERT; give its folder as transformers saves it"),
        ("projector.", "a bridge of xblip; compose takes the branch's folder"),
    ):
        if part in names:
            return guess
    return "nothing that is known"
