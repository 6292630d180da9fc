"""One process' part in storing features: it reads sources in workers, encodes them in batches, and writes.

On a CPU items are encoded one by one: there a batch brings no speed, and its size changes the last bits of what comes
out. On an accelerator batches are filled up, and features agree within the dtype's noise.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from xblip import config as configs
from xblip.branch import BranchConfig, build_encoder, build_modality
from xblip.contents import KnownFiles, View, describe, files_in, stamp
from xblip.errors import BundleError, ConfigError, InputError, MediaError, XBlipError
from xblip.frozen import FrozenEncoder
from xblip.loading import is_killed_worker
from xblip.media import FilePart
from xblip.modality import Features, Modality, collate
from xblip.provenance import StoreFacts, Views, differences
from xblip.store import FILE, FeatureStore, Skip, StoreWriter
from xblip.stored import encoder_facts, origin_of

VIEW = 8  # stream of chance; those below are of `xblip.mixture`, `xblip.examples` and `xblip.streaming`
BATCH_SEGMENTS = 64
"""Segments that an accelerator encodes at once, unless told."""


@dataclass
class Job:
    """What every process of a run is told.

    Attributes:
      branch: of it, the modality, its settings and `encoder_dtype` matter.
      folder: of the store; `~` is the user's.
      dtype: that features are stored in.
      views: augmented views to store of each source that is learnt from, beside the source as it is.
      seed: that these are drawn from.
      batch_segments: encoded at once; None for one item on a CPU and `BATCH_SEGMENTS` elsewhere.
      dataloader_num_workers: processes that read files, for each that encodes.
      shard_bytes: of features in a shard.
      flush_seconds: what a killed run loses at most.
      use_cpu: leave accelerators alone.
    """

    branch: BranchConfig
    folder: str
    dtype: str = "float16"
    views: int = 0
    seed: int = 0
    batch_segments: int | None = None
    dataloader_num_workers: int = 0
    shard_bytes: int = 2**28
    flush_seconds: float = 300
    use_cpu: bool = False

    def __post_init__(self) -> None:
        """Checks what it is told.

        Raises:
          ConfigError: a number is too small, or the folder has no name.
        """
        if not self.folder:
            raise ConfigError("--to is empty: name the folder that the features are to lie in.")
        self.folder = os.path.expanduser(self.folder)
        configs.at_least(self, views=0, seed=0, dataloader_num_workers=0)
        if self.batch_segments is not None:
            configs.at_least(self, batch_segments=1)


class Loaded(NamedTuple):
    """A source as a data loader's worker gives it; `tensors` are None if it is in the store, or there is an `error`."""

    source: Any
    key: bytes
    tensors: dict[str, Tensor] | None
    error: XBlipError | None
    files: np.ndarray


class _Sources(Dataset):
    """Reads sources, and tells which need not be read."""

    def __init__(self, sources: Sequence[Any], modality: Modality, store: FeatureStore, *, again: bool):
        self.sources = sources
        self.modality = modality
        self.store = store
        self.again = again

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> Loaded:
        source, key, tensors, failed = self.sources[index], b"", None, None
        plain = source.source if isinstance(source, View) else source
        try:
            before = [stamp(path) for path in files_in(plain)]
            key = self.store.key(source)
            if self.again or key not in self.store:
                tensors = self._tensors(source)
                if [stamp(path) for path in files_in(plain)] != before:
                    raise MediaError(
                        f'Cannot read "{describe(plain)}": it is being written. Wait until that has ended.'
                    )
        except XBlipError as error:  # as a value, since torch makes a text of what a worker raises
            tensors, failed = None, error
            if isinstance(error, MediaError) and not isinstance(plain, (str, Path, bytes, FilePart)):
                failed = InputError(f"{error} It stands in a row itself, not in a file: correct the row, or remove it.")
        return Loaded(source, key, tensors, failed, self.store.files.take())

    def _tensors(self, source: Any) -> dict[str, Tensor]:
        if not isinstance(source, View):
            return self.modality.load(source)
        content = np.frombuffer(self.store.key(source.source), np.uint32)
        draw = np.random.default_rng([self.store.facts.views.seed, VIEW, *content.tolist(), source.number])
        return self.modality.augmented(source.source, draw)


class Encoding:
    """One process' part in a run: its encoder, and the store as it was when the run began."""

    def __init__(self, job: Job, device: torch.device):
        """Builds the encoder.

        Raises:
          ConfigError: views are asked for, and the modality has no augmentation.
        """
        self.job = job
        self.device = device
        self.modality = build_modality(job.branch)
        if job.views:
            self.modality.check_augmentation()
        self.encoder: FrozenEncoder = build_encoder(job.branch, self.modality).to(device)
        self.limit = job.batch_segments or (1 if device.type == "cpu" else BATCH_SEGMENTS)
        self.store: FeatureStore

    def open(self, *, create: bool) -> FeatureStore:
        """Opens the store, made first if `create`.

        Raises:
          BundleError: it holds the features of another encoder.
        """
        if create:
            folder = Path(self.job.folder)
            files = FeatureStore.open(folder).files if (folder / FILE).is_file() else KnownFiles()
            origin = origin_of(self.job.branch, self.modality, files)
            augment = configs.plain(self.modality.config).get("augment")
            views = Views(self.job.views, self.job.seed, augment) if self.job.views else Views()
            facts = StoreFacts(origin, encoder_facts(self.encoder), self.job.dtype, views)
            FeatureStore.create(folder, facts).remember(files.take())
        self.store = FeatureStore.open(self.job.folder)
        if differ := differences(encoder_facts(self.encoder), self.store.facts.encoder):
            raise BundleError(f"{self.job.folder} holds features of another encoder: {'; '.join(differ)}.")
        return self.store

    def writer(self, rank: int) -> StoreWriter:
        """Makes what a process writes with."""
        return StoreWriter(
            self.job.folder,
            self.store.facts,
            name=f"features-{rank:05d}",
            shard_bytes=self.job.shard_bytes,
            flush_seconds=self.job.flush_seconds,
        )

    def batches(self, sources: Sequence[Any], *, again: bool = False) -> Iterator[list[tuple[Loaded, Features | None]]]:
        """Reads and encodes sources; gives batches of them as they were read, with the features of those that are new.

        Args:
          sources: to encode.
          again: encode also what the store holds.

        Raises:
          InputError: a process that reads was killed, or a batch does not fit into memory.
        """
        loader = DataLoader(
            _Sources(sources, self.modality, self.store, again=again),
            batch_size=None,
            num_workers=self.job.dataloader_num_workers,
            collate_fn=_as_it_is,
        )
        try:
            for batch in _batches(loader, self.limit):
                features = [None] if batch[0].tensors is None else self._encode(batch)
                yield list(zip(batch, features, strict=True))
        except torch.OutOfMemoryError as cause:
            raise InputError(f"{self.limit} segments at once do not fit into memory: give --batch-segments.") from cause
        except RuntimeError as cause:
            if not is_killed_worker(cause):
                raise
            raise InputError(
                "A process that reads files was killed, most likely for want of memory. What was complete is kept: run "
                "again with a lower training.dataloader_num_workers."
            ) from cause

    def write(
        self, sources: Sequence[Any], writer: StoreWriter, *, max_skipped: float = float("inf"), show: bool = False
    ) -> list[Skip]:
        """Encodes sources into a store; returns those that cannot be read, as soon as they are more than `max_skipped`.

        Raises:
          BundleError: the store cannot be written.
        """
        skipped: list[Skip] = []
        bar = tqdm(desc=f"encode {self.modality.name}", total=len(sources), disable=not show)
        with bar, ThreadPoolExecutor(1) as beside:  # a batch is written while the next one is encoded
            writing = beside.submit(list)
            for batch in self.batches(sources):
                skipped += writing.result()
                writing = beside.submit(_add, writer, batch)
                bar.update(len(batch))
                if len(skipped) > max_skipped:
                    break
            return skipped + writing.result()

    def _encode(self, batch: Sequence[Loaded]) -> list[Features]:
        tensors, segments = collate([loaded.tensors for loaded in batch])
        values, mask = self.encoder(**{name: tensor.to(self.device) for name, tensor in tensors.items()})
        return Features(values.cpu(), mask.cpu(), segments).split()


def _add(writer: StoreWriter, batch: Sequence[tuple[Loaded, Features | None]]) -> list[Skip]:
    """Adds what was encoded to a store; returns what could not be."""
    skipped = []
    for loaded, features in batch:
        if len(loaded.files):
            writer.files.append(loaded.files)
        try:
            if loaded.error:
                raise loaded.error
            if features is not None:
                writer.add(loaded.key, features)
        except MediaError as error:
            skipped.append(Skip(describe(loaded.source), loaded.key.hex(), str(error)))
    return skipped


def best_device(job: Job) -> torch.device:
    """Returns the accelerator of this machine if there is one and the job may use it."""
    there = torch.accelerator.is_available() and not job.use_cpu
    return torch.accelerator.current_accelerator() if there else torch.device("cpu")


def _as_it_is(item: Loaded) -> Loaded:
    return item


def _batches(items: Iterable[Loaded], limit: int) -> Iterator[list[Loaded]]:
    """Groups items of equal shapes up to `limit` segments; one that needs no encoding comes alone."""
    batch: list[Loaded] = []
    segments, shapes = 0, None
    for item in items:
        if item.tensors is None:
            yield [item]
            continue
        count = len(next(iter(item.tensors.values()), ()))
        own = {name: tensor.shape[1:] for name, tensor in item.tensors.items()}
        if batch and (segments + count > limit or own != shapes):
            yield batch
            batch, segments = [], 0
        batch.append(item)
        segments, shapes = segments + count, own
    if batch:
        yield batch
