"""Converting published models: into bundles, branches, encoders and initial weights.

What a source is, its own content tells. Which modality a part belongs to is the modality's to say
(`transformers_models`, `checkpoint_prefix`, `convert_encoder`), so nothing here names one.
"""

import os
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from xblip import plugins
from xblip.branch import made_folder
from xblip.checkpoint import Checkpoint, read
from xblip.convert_qformer import Wanted, from_bert, from_lavis
from xblip.convert_transformers import from_transformers
from xblip.errors import BundleError, ConfigError
from xblip.lavis import prefixes


@dataclass
class Report:
    """What a conversion wrote, and what became of the source's weights.

    Attributes:
      made: what it wrote: "bundle", "branch", "encoder" or "initial weights", with the modality's name if it has one.
      loaded: number of tensors taken.
      fresh: names of what the source lacks, with what they are instead.
      left_out: names of what was left out, with the reason.
    """

    made: str
    loaded: int
    fresh: dict[str, str]
    left_out: dict[str, str]

    def __str__(self) -> str:
        """A line on each."""
        lines = [self.made, f"loaded: {self.loaded} weights"]
        return "\n".join([*lines, *_told("fresh", self.fresh), *_told("left out", self.left_out)])


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
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BundleError(f"{folder} is there already: give a folder that is empty or new, so that nothing is lost.")
    checkpoint = read(source)
    made_folder(folder.parent)
    # Beside its place, so that relative paths hold; moved there when all is well.
    with tempfile.TemporaryDirectory(
        dir=folder.parent, prefix=f".{folder.name}-", ignore_cleanup_errors=True
    ) as staging:
        made = _convert(checkpoint, Path(staging), wanted)
        checkpoint.check_all_used()
        Path(staging).chmod(0o755)
        os.replace(staging, folder)
    return Report(made, len(checkpoint.taken), dict(checkpoint.fresh), dict(checkpoint.left_out))


def _convert(checkpoint: Checkpoint, folder: Path, wanted: Wanted) -> str:
    if checkpoint.architecture:
        _check_told(checkpoint, wanted)
        is_bert = checkpoint.architecture.startswith("Bert")
        return from_bert(checkpoint, folder) if is_bert else from_transformers(checkpoint, folder)
    if found := prefixes(checkpoint):
        return from_lavis(checkpoint, found, folder, wanted)
    return _encoder(checkpoint, folder, wanted)


def _check_told(checkpoint: Checkpoint, wanted: Wanted, *used: str) -> None:
    """Refuses what is told beside a source that needs only what is `used`."""
    told = {field.name for field in fields(wanted) if getattr(wanted, field.name) != field.default}
    if unused := [f"--{name}" for name in sorted(told - set(used))]:
        raise ConfigError(
            f"{checkpoint.path} is converted as it is, and has no use for {', '.join(unused)}: leave them out."
        )


def _encoder(checkpoint: Checkpoint, folder: Path, wanted: Wanted) -> str:
    """Lets the installed modalities look at a checkpoint that has no bridge."""
    names = [wanted.only] if wanted.only else plugins.names("modality")
    for name in names:
        if plugins.get("modality", name).convert_encoder(checkpoint, folder):
            _check_told(checkpoint, wanted, "only")
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
