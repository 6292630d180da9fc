"""Frozen features kept: what a frozen encoder makes of a file does not change, so a run computes it once.

Kept in memory, by the path that a manifest's rows name; sources that are no files are encoded each time.
"""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from xblip.branch import Branch
from xblip.data import Manifest, collate_samples, file_of
from xblip.errors import XBlipError
from xblip.modality import Features
from xblip.sample import Sample


@torch.no_grad()
def keep_features(
    manifests: Sequence[Manifest], branch: Branch, *, batch_size: int, num_workers: int = 0, show_progress: bool = False
) -> int:
    """Encodes every file that the manifests name, once; from then on they give features in the place of media.

    Args:
      manifests: of one modality's samples.
      branch: that modality's, its encoder where it shall run.
      batch_size: samples read and encoded at once.
      num_workers: processes that read them.
      show_progress: show a bar.

    Returns:
      The bytes of memory that the features take.

    Raises:
      MediaError: a file cannot be read; the message names the manifest and the line.
    """
    kept: dict[str, Features] = {}
    for manifest in manifests:
        rows = _first_rows(manifest, set(kept))
        loader = DataLoader(
            Subset(manifest, rows), batch_size=batch_size, num_workers=num_workers, collate_fn=collate_samples
        )
        place = iter(rows)
        for batch in tqdm(loader, desc=f"encode {branch.modality.name}", disable=not show_progress):
            named = [manifest.sample(index) for _, index in zip(batch["samples"], place, strict=False)]
            kept.update(_encoded(named, batch["samples"], branch))
    for manifest in manifests:
        manifest.features = kept
    return sum(part.values.nbytes + part.mask.nbytes for part in kept.values())


def _first_rows(manifest: Manifest, known: set[str]) -> list[int]:
    """The rows that name a file which is not known from rows before them."""
    rows = []
    for index in range(len(manifest)):
        files = {file for media in manifest.sample(index).all_media if (file := file_of(media))}
        if not files <= known:
            rows.append(index)
            known |= files
    return rows


def _encoded(named: list[Sample], read: list[Sample | XBlipError], branch: Branch) -> Iterator[tuple[str, Features]]:
    """The features of samples' files: `named` are the samples with paths, `read` the same with what was read there."""
    found = {}
    for before, after in zip(named, read, strict=True):
        if isinstance(after, XBlipError):
            raise after
        for media, loaded in zip(before.all_media, after.all_media, strict=True):
            if file := file_of(media):
                found[file] = loaded.source
    features = branch.encode(list(found.values())).split() if found else []
    for file, part in zip(found, features, strict=True):
        yield file, Features(part.values.cpu().clone(), part.mask.cpu().clone(), part.segments)
