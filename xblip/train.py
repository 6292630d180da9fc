"""Training of one branch: only its bridge learns, only its bridge is saved.

The loop, schedules, logging, precision and resuming are transformers' `Trainer`; what is ours is what trains (a bridge
between frozen parts) and what a checkpoint is (a branch folder, which `XBlip.compose` takes as it stands).
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from xblip import config as configs
from xblip.branch import Branch, BranchConfig, load_bridge
from xblip.data import Manifest, collate_samples
from xblip.errors import ConfigError, suggest
from xblip.llm import FrozenLLM, LLMConfig
from xblip.model import XBlip
from xblip.router import RouterConfig


@dataclass
class DataConfig:
    """Which samples.

    Attributes:
      train: manifest to learn from.
      eval: manifest to evaluate on while training; none if None.
      eval_answers: of how many of its rows answers are generated and compared with the truth; 0 for none.
    """

    train: str
    eval: str | None = None
    eval_answers: int = 200


@dataclass
class TrainConfig:
    """A training run.

    Attributes:
      llm: the frozen LLM.
      branch: the branch to train.
      data: what it learns from.
      router: how prompts are laid out.
      training: fields of transformers' `TrainingArguments`.
      generation: generation options for the answers of evaluation.
    """

    llm: LLMConfig
    branch: BranchConfig
    data: DataConfig
    router: RouterConfig = field(default_factory=RouterConfig)
    training: dict[str, Any] = field(default_factory=dict)
    generation: dict[str, Any] = field(default_factory=dict)


class BranchTrainer(Trainer):
    """transformers' Trainer, for an `XBlip` with one branch."""

    def __init__(self, *, model: XBlip, eval_answers: int = 0, **kwargs: Any):
        super().__init__(model=model, data_collator=collate_samples, **kwargs)
        self.branch: Branch = next(iter(model.branches.values()))
        self.eval_answers = eval_answers

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
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

    def _load_best_model(self) -> None:
        load_bridge(self.branch.bridge, self.state.best_model_checkpoint)


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
    set_seed(arguments.seed)
    checkpoint = get_last_checkpoint(arguments.output_dir) if resume and Path(arguments.output_dir).is_dir() else None
    if resume and checkpoint is None:
        raise ConfigError(f"There is no checkpoint in {arguments.output_dir} to resume from: train without --resume.")
    llm = FrozenLLM.from_pretrained(config.llm)
    branch = Branch.build(config.branch, llm_width=llm.width)
    model = XBlip(
        llm=llm, branches={config.branch.modality: branch}, router=config.router, generation=config.generation
    )
    modalities = {config.branch.modality: branch.modality}
    (console or Console()).print(parts_table(model))
    trainer = BranchTrainer(
        model=model,
        args=arguments,
        train_dataset=Manifest(config.data.train, modalities=modalities),
        eval_dataset=Manifest(config.data.eval, modalities=modalities) if config.data.eval else None,
        eval_answers=config.data.eval_answers,
    )
    result = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.save_state()
    metrics = dict(result.metrics)
    if config.data.eval:
        metrics |= trainer.evaluate()
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
            raise ConfigError(f'Unknown key "training.{name}".{suggest(name, known)}')
    if "output_dir" not in config.training:
        raise ConfigError("training.output_dir is missing: say where the branch is to be written.")
    defaults = {
        "report_to": ["tensorboard"],
        "remove_unused_columns": False,
        "label_names": [],
        "logging_steps": 10,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    try:
        return TrainingArguments(**{**defaults, **config.training})
    except (ValueError, TypeError, ImportError) as cause:
        raise ConfigError(f'"training": {cause}') from cause


def load_train_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Reads a training config; paths in it start at the working directory."""
    return configs.build(TrainConfig, configs.load_yaml(path, overrides), where="config")


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
