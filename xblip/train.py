"""Training of one branch: only its bridge learns, only its bridge is saved.

The loop, schedules, logging, precision and resuming are transformers' `Trainer`; what is ours is what trains (a bridge
between frozen parts) and what a checkpoint is (a branch folder, which `XBlip.compose` takes as it stands).
"""

import contextlib
import dataclasses
import json
import sys
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import Trainer, TrainingArguments, set_seed
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import get_last_checkpoint

from xblip import config as configs
from xblip.branch import Branch, BranchConfig, build_modality, load_bridge, made_folder
from xblip.bundle import BRANCHES
from xblip.data import Manifest, collate_samples
from xblip.errors import BundleError, ConfigError, XBlipError, suggest
from xblip.features import keep_features
from xblip.initial import InitConfig, initialise
from xblip.llm import FrozenLLM, LLMConfig
from xblip.loading import first_line
from xblip.model import XBlip
from xblip.router import RouterConfig

MISPLACED = {
    "gradient_checkpointing": "only the bridge, which is small, keeps activations worth saving; remove it.",
    "label_smoothing_factor": "the loss is the LLM's own likelihood; remove it.",
    "neftune_noise_alpha": "it disturbs embeddings of a model that trains, and the LLM is frozen; remove it.",
    "resume_from_checkpoint": "say --resume, which takes the last checkpoint of output_dir.",
}
"""Training arguments that are refused, and why."""


STRATEGIES = ("eval_strategy", "logging_strategy", "save_strategy")
"""Training arguments whose value "no" YAML reads as False."""


@dataclass
class DataConfig:
    """Which samples.

    Attributes:
      train: manifest to learn from.
      eval: manifest to evaluate on while training; none if None.
      eval_answers: of how many of its rows answers are generated and compared with the truth; 0 for none.
      keep_features: encode every file once, before training, and keep its features in memory.
    """

    train: str
    eval: str | None = None
    eval_answers: int = 200
    keep_features: bool = False


@dataclass
class TrainConfig:
    """A training run.

    Attributes:
      llm: the frozen LLM.
      branch: the branch to train.
      init: where its bridge starts from.
      data: what it learns from.
      router: how prompts are laid out.
      training: fields of transformers' `TrainingArguments`.
      generation: generation options for the answers of evaluation.
      branches: descriptions that `branch` may name, such as `${branches.NAME}`, where a model config is the base.
      architectures: of that model config too; training needs neither.
    """

    llm: LLMConfig
    branch: BranchConfig
    data: DataConfig
    init: InitConfig = field(default_factory=InitConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    training: dict[str, Any] = field(default_factory=dict)
    generation: dict[str, Any] = field(default_factory=dict)
    branches: Any = None
    architectures: dict[str, Any] = field(default_factory=dict)


class BranchTrainer(Trainer):
    """transformers' Trainer, for an `XBlip` with one branch."""

    def __init__(self, *, model: XBlip, eval_answers: int = 0, **kwargs: Any):
        super().__init__(model=model, data_collator=collate_samples, **kwargs)
        self.branch: Branch = next(iter(model.branches.values()))
        self.eval_answers = eval_answers

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        for sample in inputs["samples"]:
            if isinstance(sample, XBlipError):
                raise sample
        outputs = model(**inputs)
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach().mean(), None, None

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Loss on the evaluation manifest, and the share of generated answers that equal the truth."""
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        count = min(self.eval_answers, len(dataset))
        if count:
            right = sum(self._right_answers([dataset[index] for index in part]) for part in self._batches(count))
            accuracy = {f"{metric_key_prefix}_accuracy": right / count}
            self.log(accuracy)
            metrics |= accuracy
        return metrics

    def evaluated(self) -> dict[str, float]:
        """Returns the metrics of the weights as they are, measuring them only if the last step did not."""
        entries = [entry for entry in self.state.log_history if entry["step"] == self.state.global_step]
        found = {name: value for entry in entries for name, value in entry.items() if name.startswith("eval_")}
        return found if found and not self.args.load_best_model_at_end else self.evaluate()

    def _batches(self, count: int) -> list[range]:
        size = self.args.per_device_eval_batch_size
        return [range(start, min(start + size, count)) for start in range(0, count, size)]

    def _right_answers(self, samples: Sequence) -> int:
        answers = self.model.generate(samples, do_sample=False)
        return sum(answer.text == sample.answer.strip() for answer, sample in zip(answers, samples, strict=True))

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        self.branch.save(output_dir or self.args.output_dir, llm=self.model.llm)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_bridge(self.branch.bridge, resume_from_checkpoint)
        with _reading(resume_from_checkpoint):
            TrainerState.load_from_json(str(Path(resume_from_checkpoint, "trainer_state.json")))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _reading(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _reading(checkpoint):
            super()._load_rng_state(checkpoint)

    def _load_best_model(self) -> None:
        load_bridge(self.branch.bridge, self.state.best_model_checkpoint)


@contextlib.contextmanager
def _reading(checkpoint: str | None) -> Iterator[None]:
    """Turns whatever a damaged file of a checkpoint raises into one clear error."""
    try:
        yield
    except Exception as cause:
        raise BundleError(
            f"The checkpoint in {checkpoint} is damaged: {first_line(cause)} Delete that folder to go on from the one "
            "before it, or train without --resume."
        ) from cause


def train(config: TrainConfig, *, resume: bool = False, console: Console | None = None) -> dict[str, float]:
    """Trains a branch and writes it to `training.output_dir`.

    Args:
      config: the run.
      resume: go on from the last checkpoint in the output folder.
      console: where the table of what trains is printed.

    Returns:
      The last metrics.

    Raises:
      ConfigError: a setting is wrong, a manifest is missing, or there is nothing to resume from.
    """
    arguments = training_arguments(config)
    configs.at_least(config.data, eval_answers=0)
    set_seed(arguments.seed)
    checkpoint = get_last_checkpoint(arguments.output_dir) if resume and Path(arguments.output_dir).is_dir() else None
    if resume and checkpoint is None:
        raise ConfigError(f"There is no checkpoint in {arguments.output_dir} to resume from: train without --resume.")
    made_folder(arguments.output_dir)
    modalities = {config.branch.modality: build_modality(config.branch)}
    manifests = [Manifest(path, modalities=modalities) for path in (config.data.train, config.data.eval) if path]
    for manifest in manifests:
        manifest.check()
    llm = FrozenLLM.from_pretrained(config.llm)
    branch = Branch.build(config.branch, llm_width=llm.width)
    model = XBlip(
        llm=llm, branches={config.branch.modality: branch}, router=config.router, generation=config.generation
    )
    console = console or Console()
    console.print(parts_table(model))
    if config.init.folder:
        taken = initialise(branch.bridge, config.init.folder, without=config.init.without)
        console.print(f"From {config.init.folder}: {taken}.")
    with _refusing():
        trainer = BranchTrainer(
            model=model,
            args=arguments,
            train_dataset=manifests[0],
            eval_dataset=manifests[1] if config.data.eval else None,
            eval_answers=config.data.eval_answers,
        )
    if config.data.keep_features:
        size = keep_features(
            manifests,
            trainer.branch,
            batch_size=arguments.per_device_eval_batch_size,
            num_workers=arguments.dataloader_num_workers,
            show_progress=not arguments.disable_tqdm,
        )
        console.print(f"The features of all files take {size / 2**20:.0f} MiB of memory.")
    result = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.save_state()
    metrics = dict(result.metrics)
    if config.data.eval:
        metrics |= trainer.evaluated()
    Path(arguments.output_dir, "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    return metrics


def training_arguments(config: TrainConfig) -> TrainingArguments:
    """Makes transformers' arguments of `config.training`, with our defaults where it is silent.

    Raises:
      ConfigError: an argument that transformers does not know, or a value it refuses.
    """
    known = {entry.name for entry in dataclasses.fields(TrainingArguments)}
    for name in config.training:
        if name not in known:
            raise ConfigError(
                f'Unknown key "training.{name}".{suggest(str(name), known)} They are those of TrainingArguments.'
            )
        if name in MISPLACED:
            raise ConfigError(f"training.{name} has no place here: {MISPLACED[name]}")
        _check_type(name, config.training[name])
    if not config.training.get("output_dir"):
        raise ConfigError("training.output_dir is missing: say where the branch is to be written.")
    defaults = {
        "report_to": ["tensorboard"],
        "remove_unused_columns": False,
        "label_names": [],
        "logging_steps": 10,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "disable_tqdm": not sys.stderr.isatty(),
    }
    words = {name: "no" for name in STRATEGIES if config.training.get(name) is False}
    with _refusing():
        arguments = TrainingArguments(**{**defaults, **config.training, **words})
    configs.at_least(
        arguments,
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=1,
        dataloader_num_workers=0,
        seed=0,
    )
    if arguments.eval_strategy != "no" and not config.data.eval:
        raise ConfigError(
            f"training.eval_strategy is {arguments.eval_strategy.value}, but data.eval names no manifest: give one, or "
            "remove eval_strategy."
        )
    return arguments


def _check_type(name: str, value: Any) -> None:
    """Checks a value whose argument is declared as plain; transformers itself fails much later, or not at all."""
    declared = typing.get_type_hints(TrainingArguments)[name]
    types = set(typing.get_args(declared) or [declared])
    if types <= {bool, int, float, str, NoneType}:
        accepted = types | ({int} if float in types else set())
        if type(value) not in accepted and not (str in types and isinstance(value, Path)):
            names = " or ".join(sorted("null" if kind is NoneType else kind.__name__ for kind in types))
            raise ConfigError(f"training.{name} must be {names}, not {value!r:.80}.")


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """Turns what transformers raises for a setting into one clear error."""
    try:
        yield
    except (ValueError, TypeError, AttributeError, ImportError, OSError) as cause:
        raise ConfigError(f'"training": {cause}') from cause


def load_train_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Reads a training config; paths in it start at the working directory."""
    return configs.build(TrainConfig, configs.load_yaml(path, overrides, named=BRANCHES), where="config")


def parts_table(model: XBlip) -> Table:
    """What is frozen and what trains, with parameter counts."""
    table = Table(title="Parts")
    for column, justify in (("part", "left"), ("class", "left"), ("parameters", "right"), ("", "left")):
        table.add_column(column, justify=justify)
    parts: list[tuple[str, nn.Module, nn.Module]] = []
    for name, branch in model.branches.items():
        parts.append((f"{name} encoder", branch.encoder, branch.encoder.module))
        parts.append((f"{name} bridge", branch.bridge, branch.bridge))
    parts.append(("LLM", model.llm, model.llm.model))
    for label, part, shown in parts:
        total = sum(parameter.numel() for parameter in part.parameters())
        trained = sum(parameter.numel() for parameter in part.parameters() if parameter.requires_grad)
        state = "frozen" if not trained else "trains" if trained == total else f"{trained:,} train"
        table.add_row(label, type(shown).__name__, f"{total:,}", state)
    return table
