"""Training: from a config to branches on the disk.

Rows are read and checked before anything heavy is loaded, so that a wrong one costs seconds. Only bridges learn, and only
they are saved; what a run was made of goes into its checkpoints, and a resumed run must be made of the same.
"""

import glob
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import TrainingArguments, set_seed

from xblip import config as configs
from xblip.align import AlignModel
from xblip.branch import Branch, build_modality, made_folder
from xblip.data import Manifest
from xblip.errors import ConfigError, InputError
from xblip.examples import Examples, SkipLog, collate_examples
from xblip.frozen import Encoders
from xblip.initial import begin_alike, initialise
from xblip.layers import WISHES, apply_wishes, shard_llm
from xblip.llm import FrozenLLM
from xblip.mixture import BatchPlan, Source
from xblip.model import XBlip
from xblip.resume import clear_unfinished, last_checkpoint, naming_full_disks, read_state, replacing
from xblip.store import FeatureStore
from xblip.stored import check_views, stored_encoder
from xblip.streaming import StreamedExamples
from xblip.tasks import AlignTask, AnswerTask, Task
from xblip.templates import load_templates
from xblip.train_config import TrainConfig, check_config, open_manifests, refusing, sources_of, training_arguments
from xblip.trainer import BridgeTrainer, naming_lost_processes

ROWS_OF_A_STREAM = 10_000
"""Rows that broken ones of a stream, whose length is unknown, are a share of."""


def train(config: TrainConfig, *, resume: bool = False, console: Console | None = None) -> dict[str, float]:
    """Trains a stage, in as many processes as a launcher started, and writes branches to `training.output_dir`.

    One branch is written into that folder itself, several into folders of their modalities' names.

    Args:
      config: the run.
      resume: go on from the last checkpoint in the output folder.
      console: where the table of what trains is printed.

    Returns:
      The last metrics.

    Raises:
      ConfigError: a setting is wrong, a manifest is missing, there is nothing to resume from, or it is of another run.
      InputError, BundleError, PluginError: a row, a part of the model or a plugin is wrong.
      XBlipError: the loss is no number, or too many files are broken.
    """
    check_config(config)
    arguments = training_arguments(config)
    is_main = arguments.process_index == 0
    console = console or Console(quiet=not is_main)
    output = Path(made_folder(arguments.output_dir))
    checkpoint = last_checkpoint(output) if resume else None
    if not resume and any(output.glob("checkpoint-*")):
        raise ConfigError(
            f"{output} holds checkpoints of an earlier run: go on from the last by --resume, delete them, or choose another "
            "training.output_dir."
        )
    if is_main:
        clear_unfinished(output)
    set_seed(arguments.seed)
    stores = open_stores(config)
    with arguments.main_process_first(local=False):  # which leaves what it read in a cache for the others
        train_data = read_data(
            config,
            config.data.train,
            "data.train",
            stores,
            streaming=config.data.streaming,
            augment=config.data.augment,
        )
        eval_data = read_data(config, config.data.eval, "data.eval", stores)
    done = read_state(checkpoint).global_step if checkpoint else 0
    plan = make_plan(config, arguments, train_data, done)
    task = build_task(config, arguments, stores, None if checkpoint else console)
    console.print(parts_table(task))
    if checkpoint:
        console.print(f"Goes on from {checkpoint}, step {done}.")
    for data in (train_data, eval_data):
        data.splits_answers = task.splits_answers
    with arguments.main_process_first(local=False):  # which empties the file before others read it
        skipped = SkipLog(
            output / "skipped.jsonl",
            rows=ROWS_OF_A_STREAM if config.data.streaming else len(train_data) + len(eval_data),
            max_skipped=config.data.max_skipped,
            resume=resume or not is_main,
        )
    arguments.ignore_data_skip = config.data.streaming  # a stream itself goes on where it was
    with refusing():
        trainer = BridgeTrainer(
            task=task,
            plan=None if config.data.streaming else plan,
            skipped=skipped,
            rates=config.learning_rates,
            facts=facts_of(config, arguments, task, stores),
            args=arguments,
            data_collator=collate_examples,
            train_dataset=plan if config.data.streaming else train_data,
            eval_dataset=eval_data if len(eval_data) else None,
        )
    with naming_lost_processes(), naming_full_disks(output):
        result = trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        metrics = dict(result.metrics)
        if is_main:
            with replacing(output) as folder:
                task.save(folder)
        trainer.save_state()
        if is_main:
            _write_metrics(output, metrics)
        if len(eval_data):
            metrics |= trainer.evaluated()
            if is_main:
                _write_metrics(output, metrics)
    return metrics


def _write_metrics(output: Path, metrics: Mapping[str, float]) -> None:
    (output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")


def open_stores(config: TrainConfig) -> dict[str, FeatureStore]:
    """Opens the stores that `data.features` names, by the modality that each of them is of.

    Raises:
      BundleError, ConfigError: one is missing or damaged, of a modality that no branch has or another store is of, or
        without the views that `data.augment` asks for.
    """
    given = config.data.features
    stores: dict[str, FeatureStore] = {}
    for folder in [] if given is None else given if isinstance(given, list) else [given]:
        store = FeatureStore.open(folder)
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
      ConfigError, InputError: a manifest is missing or empty, or a row is wrong.
      BundleError, MediaError: a file has no features in the store, or changed since.
    """
    modalities = {branch.modality: build_modality(branch) for branch in config.all_branches}
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
            source
            for manifest in manifests
            for row in manifest.rows()
            for media in row.sample.all_media
            if media.modality == name
            for source in (store.views(media.source) if augment else [media.source])
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


def build_task(
    config: TrainConfig, arguments: TrainingArguments, stores: Mapping[str, FeatureStore], console: Console | None
) -> Task:
    """Builds what trains, with its initial weights; tells the console what they were taken from, if there is one.

    Raises:
      BundleError, ConfigError, PluginError: a part is missing, damaged or wrong, or nothing would train.
    """
    encoders = {
        branch.modality: stored_encoder(stores[branch.modality], branch)
        for branch in config.all_branches
        if branch.modality in stores
    }
    if config.stage == "align":
        branch = AlignModel.build_branch(config.branch, encoder=encoders.get(config.branch.modality))
        _initialise(config, {config.branch.modality: branch}, console)
        task: Task = AlignTask(AlignModel(branch, config.align), config.align)
    else:
        llm = FrozenLLM.from_pretrained(config.llm)
        shared = Encoders()
        branches = {
            part.modality: Branch.build(part, llm_width=llm.width, encoders=shared, encoder=encoders.get(part.modality))
            for part in config.all_branches
        }
        begin_alike(branch.bridge for branch in branches.values())
        _initialise(config, branches, console)
        model = XBlip(llm=llm, branches=branches, router=config.router, generation=config.generation)
        apply_wishes(llm, {name: config.training[name] for name in WISHES if name in config.training})
        if config.shard_llm:
            shard_llm(model, arguments.device)
        prefixes = config.stage == "generate" and llm.is_encoder_decoder
        task = AnswerTask(model, eval_answers=config.data.eval_answers, splits_answers=prefixes)
    if not any(weight.requires_grad for weight in task.model.parameters()):
        raise ConfigError(
            "Nothing would train: all weights of this config are frozen. Let a bridge have some that are not."
        )
    return task


def _initialise(config: TrainConfig, branches: Mapping[str, Branch], console: Console | None) -> None:
    """Gives bridges their initial weights, and tells what they took; a resumed run, which has no console, needs none."""
    for name, branch in branches.items() if console else ():
        if config.init.folder:
            folder = Path(config.init.folder) if len(branches) == 1 else Path(config.init.folder, name)
            taken = initialise(branch.bridge, folder, without=config.init.without)
            console.print(f"{name} from {folder}: {taken}.")
        else:
            console.print(f"{name} from nothing: all weights of its bridge are fresh.")


def facts_of(
    config: TrainConfig, arguments: TrainingArguments, task: Task, stores: Mapping[str, FeatureStore]
) -> dict[str, Any]:
    """Returns what a resumed run must share: what it learns, from what, in which batches."""
    branches = {
        name: {
            "modality": configs.plain(branch.modality.config) | {"encoder": branch.encoder.fingerprint},
            "bridge": {"kind": branch.bridge.name, **configs.plain(branch.bridge.config)},
            "features": stores[name].facts.dtype if name in stores else "encoded",
            "views": configs.plain(stores[name].facts.views) if name in stores and config.data.augment else None,
        }
        for name, branch in task.branches.items()
    }
    data = configs.plain(config.data)
    for name in ("eval", "eval_answers", "features", "max_skipped"):
        data.pop(name)
    sources = sources_of(config.data.train, "data.train")
    texts = [*config.data.templates.values(), *([config.data.context.texts] if config.data.context else [])]
    return {
        "stage": config.stage,
        "seed": arguments.seed,
        "rows_in_a_step": arguments.train_batch_size * arguments.world_size * arguments.gradient_accumulation_steps,
        "data": data | {"contents": {path: _digest(path) for path in [*(source.path for source in sources), *texts]}},
        "branches": branches,
        **task.facts(),
    }


def _digest(pattern: str) -> str:
    """Identifies what files hold; of tars, which are long, names and sizes stand for it."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(glob.glob(str(pattern))) or [str(pattern)]:
        if path.endswith(".tar"):
            digest.update(f"{Path(path).name} {Path(path).stat().st_size}".encode())
        else:
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "blake2b").digest())
    return digest.hexdigest()


def parts_table(task: Task) -> Table:
    """What is frozen and what trains, with parameter counts."""
    table = Table(title="Parts")
    for column, justify in (("part", "left"), ("class", "left"), ("parameters", "right"), ("", "left")):
        table.add_column(column, justify=justify)
    for label, shown in task.parts():
        total = sum(parameter.numel() for parameter in shown.parameters())
        trained = sum(parameter.numel() for parameter in shown.parameters() if parameter.requires_grad)
        state = "frozen" if not trained else "trains" if trained == total else f"{trained:,} train"
        table.add_row(label, type(shown).__name__, f"{total:,}", state)
    return table
