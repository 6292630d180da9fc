"""Fills a feature store: the frozen encoder runs once over what some manifests name.

A process decides by a source itself whether the source is its own, so that processes agree without talking, whatever
the store holds already.
"""

import contextlib
import itertools
import json
import shutil
import sys
import zlib
from collections.abc import Hashable, Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from rich.console import Console
from tqdm.auto import tqdm

from xblip import config as configs
from xblip.branch import made_folder
from xblip.contents import View, describe, is_file
from xblip.data import Manifest
from xblip.encoding import Encoding, Job, best_device
from xblip.errors import BundleError, ConfigError, InputError, MediaError, in_units, some_of, suggest
from xblip.modality import Features
from xblip.runs import LOCK, the_only_run, together
from xblip.shards import NAMED, PARTIAL, replacing, shards_in
from xblip.store import FILE, SKIPPED, Skip, StoreWriter, read_skipped
from xblip.stored import check_views, stored_encoder

ENGINES = ("accelerate", "ray")
NUM_PROBES = 8
"""Sources that are encoded before the run, to tell how many bytes all will take."""
NUM_COMPARED = 32
"""Sources that `verify` encodes again."""
ALLOWED = {"exact": 1e-4, "rounded": 0.05}
"""What features that are encoded again may differ by, relative to their size: other batches, devices and roundings."""
MARGIN = 1.05
"""Of the disk, beyond what the features are expected to take."""


class Summary(NamedTuple):
    """What a run did: sources named, of these stored before, written now, and skipped; bytes of the store's shards."""

    num_sources: int
    num_held: int
    num_written: int
    skipped: list[Skip]
    nbytes: int


def distinct_sources(manifests: Iterable[Manifest], modality: str) -> list[Any]:
    """Returns the sources of one modality that manifests name, each once, in their order."""
    found: dict[Any, Any] = {}
    for manifest in manifests:
        for source in manifest.sources(modality):
            source = str(source) if is_file(source) else source
            found.setdefault(source if isinstance(source, Hashable) else repr(source), source)
    if not found:
        raise InputError(f'No row names a source of "{modality}": there is nothing to encode.')
    return list(found.values())


def sources_and_views(
    modality: str, manifests: Sequence[Manifest], learnt: Sequence[Manifest], views: int
) -> list[Any]:
    """Returns what a store is to hold: the sources of `manifests`, then views of those that `learnt` ones name."""
    sources = distinct_sources(manifests, modality)
    viewed = distinct_sources(learnt, modality) if views else []
    return sources + [View(source, number) for source in viewed for number in range(views)]


def precompute(
    job: Job,
    manifests: Sequence[Manifest],
    *,
    learnt: Sequence[Manifest] = (),
    engine: str = "accelerate",
    max_skipped: float = 0.01,
    console: Console | None = None,
) -> Summary:
    """Stores the features of all sources that manifests name, those left out that are stored already.

    Started by `torchrun` or `accelerate launch`, its processes divide the work. Killed at any moment and started again,
    in as many processes or others, it goes on with what is missing.

    Args:
      job: what to encode by, and where to.
      manifests: of the data.
      learnt: those of them whose sources' views are stored too, as many as the job says.
      engine: "accelerate" for this process and those started with it, "ray" for the actors of a Ray cluster.
      max_skipped: share of the sources that may be broken.
      console: where is said what the run will take.

    Returns:
      What was done; in each process the same.

    Raises:
      BundleError: the folder holds something else or other features, another run writes into it, or the disk is full or
        too small.
      MediaError: more sources than `max_skipped` are broken.
      ConfigError, InputError: a setting or a manifest is wrong.
    """
    if engine not in ENGINES:
        raise ConfigError(f'Unknown engine "{engine}".{suggest(engine, ENGINES)}')
    configs.check_share("max_skipped", max_skipped, whole="all sources")
    _check_folder(Path(job.folder))
    console = console or Console(highlight=False)
    sources = sources_and_views(job.branch.modality, manifests, learnt, job.views)
    limit = max_skipped * len(sources)
    state = PartialState(cpu=best_device(job).type == "cpu", timeout=timedelta(days=7))
    rank, count = state.process_index, state.num_processes
    show = state.is_main_process and sys.stderr.isatty()
    encoding = Encoding(job, state.device)
    with contextlib.ExitStack() as until_the_end:
        together(state, lambda: _prepare(encoding, until_the_end))
        store = encoding.open(create=False)
        missing = [source for source in sources if not store.holds(source)]
        mine = [source for source in missing if zlib.crc32(describe(source).encode()) % count == rank]
        with encoding.writer(rank) as writer:
            step = max(1, len(mine) // NUM_PROBES) if state.is_main_process else len(mine) + 1
            skipped = encoding.write(mine[step - 1 :: step], writer, max_skipped=limit)
            together(
                state, lambda: _check_space(writer, len(sources), len(missing), len(mine[step - 1 :: step]), console)
            )
            del mine[step - 1 :: step]
            if engine == "ray":
                from xblip.precompute_ray import encode

                each = writer.bytes_added / max(1, writer.num_added)
                written, more = encode(job, mine, bytes_each=each, max_skipped=limit - len(skipped), show=show)
            else:
                written, more = 0, encoding.write(mine, writer, max_skipped=limit - len(skipped), show=show)
            skipped += more
            if len(skipped) > limit:
                _check_skipped(skipped, job.folder, sources, max_skipped)
    skipped = gather_object(skipped)
    written = sum(gather_object([written + writer.num_written]))
    together(state, lambda: _check_skipped(skipped, job.folder, sources, max_skipped))
    size = sum(path.stat().st_size for path in shards_in(Path(job.folder)))
    return Summary(len(sources), len(sources) - written - len(skipped), written, skipped, size)


def verify(job: Job, manifests: Sequence[Manifest], *, learnt: Sequence[Manifest] = (), show: bool = False) -> str:
    """Reads a whole store and compares it with its checksums, and encodes some of the sources again.

    Returns:
      What was found right.

    Raises:
      BundleError: shards are damaged or torn, features differ, or sources are not stored.
    """
    encoding = Encoding(job, best_device(job))
    store = encoding.open(create=False)
    stored_encoder(store, job.branch)
    checked = tqdm(store.damaged(), desc="read", total=len(store), disable=not show)
    bad = sorted({path.name for path in [*checked, *store.torn] if path})
    if bad:
        raise BundleError(
            f"{len(bad)} shards in {store.folder} are damaged: {', '.join(bad)}. Delete them, and run xblip precompute "
            "again."
        )
    views = store.facts.views.count
    if views:
        check_views(store, job.branch)
    sources = sources_and_views(job.branch.modality, manifests, learnt, views)
    store.check(sources)
    allowed = ALLOWED["exact" if {store.facts.dtype, store.facts.encoder.dtype} == {"float32"} else "rounded"]
    largest, compared = 0.0, 0
    sample = sources[:: max(1, len(sources) // NUM_COMPARED)][:NUM_COMPARED]
    for loaded, fresh in itertools.chain.from_iterable(encoding.batches(sample, again=True)):
        if fresh is None:
            continue
        stored = store.features(loaded.source)
        difference = _difference(stored, fresh)
        if not difference <= allowed:
            raise BundleError(
                f"{describe(loaded.source)}: its stored features are off by {difference:.2g} of their size, more than "
                f"{allowed}: they are not this encoder's. Run xblip precompute into another folder."
            )
        largest, compared = max(largest, difference), compared + 1
    return (
        f"{len(store)} items in {len(store.shards)} shards are as they were written; {compared} sources encoded again give "
        f"the same to within {largest:.2g} of their size"
    )


def _difference(stored: Features, fresh: Features) -> float:
    """Size of the difference of two items over the size of one, over real tokens; infinity for other shapes or masks."""
    if stored.values.shape != fresh.values.shape or not torch.equal(stored.mask, fresh.mask):
        return float("inf")
    left, right = stored.values[stored.mask].float(), fresh.values[fresh.mask].float()
    return ((left - right).norm() / right.norm().clamp_min(1e-30)).item()


def _prepare(encoding: Encoding, until_the_end: contextlib.ExitStack) -> None:
    """Makes the store, and removes what killed runs have left incomplete in it."""
    folder = made_folder(encoding.job.folder)
    until_the_end.enter_context(the_only_run(folder, "xblip precompute"))
    for path in folder.glob(f"*{PARTIAL}"):
        if _is_own(path.name):
            path.unlink()
    for path in encoding.open(create=True).torn:
        path.unlink()


def _check_folder(folder: Path) -> None:
    """Raises `BundleError` for a folder that holds something else than a store."""
    if not folder.is_dir() or (folder / FILE).is_file():
        return
    others = sorted(path.name for path in folder.iterdir() if not _is_own(path.name))
    if others:
        raise BundleError(f"{folder} is no feature store, and holds {some_of(others)}. Give an empty or a new folder.")


def _is_own(name: str) -> bool:
    """Whether a store may have written a file of this name; what else lies in its folder is none of its business."""
    name = name.removesuffix(PARTIAL)
    return name in {FILE, SKIPPED, LOCK} or NAMED.fullmatch(name) is not None


def _check_space(writer: StoreWriter, num_sources: int, num_missing: int, num_probes: int, console: Console) -> None:
    """Says what the features will take, by the first ones; refuses if the disk has less."""
    needed = writer.bytes_added / max(1, num_probes) * num_missing
    free = shutil.disk_usage(writer.folder).free
    what = "sources and views" if writer.facts.views.count else "sources"
    console.print(
        f"{num_sources} {what}, {num_sources - num_missing} of them stored already; the others' features will take about "
        f"{in_units(needed)} as {writer.facts.dtype}, and {in_units(free)} are free.",
        soft_wrap=True,
    )
    if needed * MARGIN > free:
        raise BundleError(
            f"The features of {num_missing} sources need about {in_units(needed)}, and {writer.folder} has "
            f"{in_units(free)} left. Make room, give another folder, or a smaller --dtype (int8 is the smallest)."
        )


def _check_skipped(skipped: Sequence[Skip], folder: str, sources: Sequence[Any], max_skipped: float) -> None:
    """Names what was skipped in the store's folder, beside what runs over other sources left out; stops at too much."""
    path = Path(folder, SKIPPED)
    tried = {describe(source) for source in sources}
    kept = [skip for skip in read_skipped(Path(folder)) if skip.source not in tried]
    with replacing(path) as file:
        file.write("".join(json.dumps(skip._asdict()) + "\n" for skip in [*kept, *skipped]).encode())
    if len(skipped) > max_skipped * len(sources):
        raise MediaError(
            f"{len(skipped)} of {len(sources)} sources cannot be encoded, more than {max_skipped:.2%}; {path} names them. "
            f"The first: {skipped[0].reason} Mend them, take them out of the manifest, or allow more with --max-skipped."
        )
