"""What a run learns from: manifests opened and checked, stored features beside them, and the plan of its batches."""

import glob
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from xblip import plugins
from xblip.branch import build_modality
from xblip.data import Manifest
from xblip.errors import ConfigError, InputError, suggest
from xblip.examples import Examples
from xblip.mixture import BatchPlan, Source
from xblip.store import FeatureStore
from xblip.stored import check_views
from xblip.streaming import StreamedExamples
from xblip.templates import load_templates
from xblip.train_config import TrainConfig, open_manifests, sources_of


def open_stores(config: TrainConfig) -> dict[str, FeatureStore]:
    """Opens the stores that `data.features` names, by the modality that each of them is of.

    Raises:
      BundleError, ConfigError: one is missing or damaged, of a modality that no branch has or another store is of, or
        without the views that `data.augment` asks for.
      PluginError: a branch is of a modality that nobody knows.
    """
    for branch in config.all_branches:
        plugins.get("modality", branch.modality)  # a misspelt name is not the stores' fault
    given = config.data.features
    stores: dict[str, FeatureStore] = {}
    for folder in [] if given is None else given if isinstance(given, list) else [given]:
        if not isinstance(folder, (str, Path)):
            raise ConfigError(f"data.features must be a store's folder, or a list of folders, not {folder!r:.80}.")
        store = FeatureStore.open(Path(folder).expanduser())
        name = store.facts.origin.modality
        known = {branch.modality: branch for branch in config.all_branches}
        if name in stores or name not in known:
            also = f", as those in {stores[name].folder} are" if name in stores else ""
            raise ConfigError(
                f"data.features: the features in {folder} are of the modality {name}{also}. Expected one store for each "
                f"of {', '.join(known)} at most."
            )
        if config.data.augment:
            check_views(store, known[name])
        stores[name] = store
    return stores


def read_data(
    config: TrainConfig,
    given: Any,
    where: str,
    stores: Mapping[str, FeatureStore],
    *,
    streaming: bool = False,
    augment: bool = False,
) -> Examples:
    """Opens the manifests that `given` names, and checks all of their rows and stored features.

    Raises:
      ConfigError, InputError: a manifest is missing or empty, a row is wrong, or templates are of an unknown modality.
      BundleError, MediaError: a file has no features in the store, or changed since.
    """
    modalities = {branch.modality: build_modality(branch) for branch in config.all_branches}
    for name in config.data.templates:
        if name not in (known := {*modalities, *plugins.installed()}):
            raise ConfigError(f'Unknown modality "{name}" in data.templates.{suggest(str(name), known)}')
    manifests = open_manifests(given, where, modalities=modalities, streaming=streaming)
    examples = Examples(
        manifests,
        stage=config.stage,
        seed=config.training.get("seed", TrainingArguments.seed),
        templates={name: load_templates(path) for name, path in config.data.templates.items()},
        features=stores,
        context=config.data.context,
        augment=augment,
    )
    examples.check()
    for name, store in stores.items() if not streaming else ():
        store.check(
            one
            for manifest in manifests
            for source in manifest.sources(name)
            for one in (store.views(source) if augment else [source])
        )
    return examples


def make_plan(
    config: TrainConfig, arguments: TrainingArguments, examples: Examples, done: int
) -> BatchPlan | StreamedExamples:
    """Decides which rows are in which batch of this process; of streams after the steps that are `done`.

    Raises:
      ConfigError: the weights of sources are wrong, or there are fewer rows than processes.
      InputError: rows of one manifest are of different modalities, and several branches train.
    """
    given = sources_of(config.data.train, "data.train")
    weights: Any = [source.weight for source in given]
    if any(weight is not None for weight in weights) and config.data.mix != "size":
        raise ConfigError("data.mix and the `weight` of sources both say how often they are visited: keep one of them.")
    weights = config.data.mix if all(weight is None for weight in weights) else weights
    common = {
        "batch_size": arguments.per_device_train_batch_size,
        "seed": arguments.seed,
        "accumulation": arguments.gradient_accumulation_steps,
        "world_size": arguments.world_size,
        "rank": arguments.process_index,
    }
    if config.data.streaming:
        weights = "equal" if weights == "size" and len(given) == 1 else weights
        start = done * arguments.gradient_accumulation_steps
        return StreamedExamples(examples, weights=weights, start=start, **common)
    return BatchPlan(
        [
            Source(
                rows=len(manifest),
                group=_group(manifest) if config.also else "",
                lengths=manifest.lengths() if config.data.group_by_length else None,
                name=source.path,
            )
            for source, manifest in zip(given, examples.sources, strict=True)
        ],
        weights=weights,
        group_by_length=config.data.group_by_length,
        **common,
    )


def _group(manifest: Manifest) -> str:
    """The modalities of a manifest's rows, which all processes train at once."""
    groups: dict[str, str] = {}
    for row in manifest.rows():
        group = "+".join(sorted({media.modality for media in row.sample.all_media}))
        groups.setdefault(group, row.origin)
        if len(groups) > 1:
            (first, one), (second, other) = groups.items()
            raise InputError(
                f"{other} is of {second}, and {one} of {first}: where several branches train in one run, the rows of a "
                "manifest must be of the same modalities, since all processes train the same ones at once. Split it."
            )
    return next(iter(groups))


def digest(pattern: str) -> str:
    """Identifies what files hold; of tars, which are long, names and sizes stand for it."""
    digest = hashlib.blake2b(digest_size=16)
    pattern = os.path.expanduser(pattern)
    for path in sorted(glob.glob(pattern)) or [pattern]:
        if path.endswith(".tar"):
            digest.update(f"{Path(path).name} {Path(path).stat().st_size}".encode())
        else:
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "blake2b").digest())
    return digest.hexdigest()
