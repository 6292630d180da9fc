"""Training: from a config to branches on the disk.

Rows are read and checked before anything heavy is loaded, so that a wrong one costs seconds. Only bridges learn, and only
they are saved; what a run was made of goes into its checkpoints, and a resumed run must be made of the same.
"""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import TrainingArguments, set_seed

from xblip import config as configs
from xblip.align import AlignModel
from xblip.branch import Branch, made_folder
from xblip.errors import ConfigError
from xblip.examples import SkipLog, collate_examples
from xblip.frozen import Encoders
from xblip.initial import begin_alike, initialise
from xblip.layers import WISHES, apply_wishes, shard_llm
from xblip.llm import FrozenLLM
from xblip.model import XBlip
from xblip.resume import check_output, clear_unfinished, last_checkpoint, read_state, replacing
from xblip.runs import naming_full_disks, the_only_run
from xblip.store import FeatureStore
from xblip.stored import stored_encoder
from xblip.tasks import AlignTask, AnswerTask, Task
from xblip.train_config import TrainConfig, check_config, refusing, sources_of, training_arguments
from xblip.train_data import digest, make_plan, open_stores, read_data
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
    with the_only_run(output, "xblip train") if is_main else contextlib.nullcontext():
        return _run(config, arguments, output, console, resume=resume)


def _run(
    config: TrainConfig, arguments: TrainingArguments, output: Path, console: Console, *, resume: bool
) -> dict[str, float]:
    is_main = arguments.process_index == 0
    checkpoint = last_checkpoint(output) if resume else None
    if not resume:
        check_output(output)
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
        learnt = trainer.state.global_step > done  # else it had ended, and there is no loss to tell
        metrics = dict(result.metrics) if learnt else {}
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
        task: Task = AlignTask(AlignModel(branch, config.align))
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
    readers = {"processes": arguments.world_size, "dataloader_num_workers": arguments.dataloader_num_workers}
    texts = [*config.data.templates.values(), *([config.data.context.texts] if config.data.context else [])]
    return {
        "stage": config.stage,
        "seed": arguments.seed,
        "rows_in_a_step": arguments.train_batch_size * arguments.world_size * arguments.gradient_accumulation_steps,
        "data": data | {"contents": {path: digest(path) for path in [*(source.path for source in sources), *texts]}},
        "branches": branches,
        **(readers if config.data.streaming else {}),  # which a stream's rows are divided among
        **task.facts(),
    }


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
