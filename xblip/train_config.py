"""What a training config says, checked before anything is loaded."""

import contextlib
import dataclasses
import sys
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from transformers import TrainingArguments

from xblip import config as configs
from xblip.align import AlignConfig
from xblip.branch import BranchConfig
from xblip.bundle import BRANCHES
from xblip.data import Manifest
from xblip.errors import ConfigError, suggest
from xblip.examples import STAGES, ContextConfig
from xblip.initial import InitConfig
from xblip.layers import WISHES
from xblip.llm import LLMConfig
from xblip.modality import Modality
from xblip.router import RouterConfig
from xblip.streaming import Stream

METRICS = {
    "align": ("text_recall_at_1", "media_recall_at_1"),
    "generate": ("loss", "accuracy"),
    "instruct": ("loss", "accuracy"),
}
"""What an evaluation measures, by stage."""
MISPLACED = {
    "auto_find_batch_size": "batches are planned before the run; set per_device_train_batch_size.",
    "data_seed": "rows are drawn by training.seed too; remove it.",
    "dataloader_drop_last": "an epoch's last batch is filled; remove it.",
    "deepspeed": "the LLM is frozen: say shard_llm: true to spread it over processes.",
    "fsdp": "the LLM is frozen: say shard_llm: true to spread it over processes.",
    "fsdp_config": "the LLM is frozen: say shard_llm: true to spread it over processes.",
    "group_by_length": "say data.group_by_length, which is on unless you turn it off.",
    "ignore_data_skip": "a resumed run goes on with the rows that come next; remove it.",
    "label_smoothing_factor": "the loss is the LLM's own likelihood; remove it (the stage align has align.label_smoothing).",
    "neftune_noise_alpha": "it disturbs embeddings of a model that trains, and the LLM is frozen; remove it.",
    "push_to_hub": "upload the branch's folder when it is trained.",
    "resume_from_checkpoint": "say --resume, which takes the last checkpoint of output_dir.",
    "train_sampling_strategy": "say data.group_by_length for batches of rows of about one length, or remove it.",
}
"""Training arguments that are refused, and why."""
STRATEGIES = ("eval_strategy", "logging_strategy", "save_strategy")
"""Training arguments whose value "no" YAML reads as False."""

PERIODS = ("eval_steps", "logging_steps", "save_steps")
"""Training arguments that transformers takes 0 of, and then never does what they are for."""


@dataclass
class SourceConfig:
    """One manifest of a mixture.

    Attributes:
      path: JSONL, JSON, CSV, TSV, Parquet, or tars of a WebDataset.
      weight: how often it is visited, where `data.mix` does not say; of all sources or of none.
      fields: for each of our keys the column, or the format string over columns, that it is.
      root: folder that relative paths of media start from; the manifest's own unless given.
    """

    path: str
    weight: float | None = None
    fields: dict[str, str] | None = None
    root: str | None = None


@dataclass
class DataConfig:
    """Which samples.

    Attributes:
      train: manifest to learn from, or a list of them: paths, or `SourceConfig`s.
      eval: the same to evaluate on while training; none if None.
      eval_answers: of how many of its rows answers are generated and compared with the truth; 0 for none.
      mix: how often a source is visited: by "size", "sqrt", "equal", or {"temperature": t}.
      group_by_length: let batches hold rows of about one length; for an encoder-decoder, whose samples are padded (those
        before a decoder-only LLM share rows).
      streaming: read manifests from beginning to end instead of keeping them in a cache; then a run says `max_steps`, and
        rows are checked as they come.
      features: store of `xblip precompute`, or a list of them, one for each modality; then no encoder is loaded.
      templates: YAML of instructions for captions, questions and labels that have none, by modality.
      context: text of other inputs around the one that is learnt.
      augment: change the files of `train` at random, each time anew; how, stands in `augment` of the branch's `config`.
      max_skipped: share of all rows whose files may be broken.
    """

    train: Any
    eval: Any = None
    eval_answers: int = 200
    mix: Any = "size"
    group_by_length: bool = False
    streaming: bool = False
    features: Any = None
    templates: dict[str, str] = field(default_factory=dict)
    context: ContextConfig | None = None
    augment: bool = False
    max_skipped: float = 0.01


@dataclass
class TrainConfig:
    """A training run.

    Attributes:
      branch: the branch to train.
      data: what it learns from.
      stage: "align" (ITC, ITM, ITG; no LLM), "generate" (captions) or "instruct" (instructions and answers).
      llm: the frozen LLM; `align` has none.
      also: further branches that train in the same run, each step one of them.
      init: where bridges start from.
      align: of the stage align.
      router: how prompts are laid out.
      training: fields of transformers' `TrainingArguments`.
      learning_rates: others than `training.learning_rate`, by part of a weight's name, e.g. {"projector": 1e-3}.
      shard_llm: spread the LLM's layers over the processes (FSDP2).
      generation: generation options for the answers of evaluation.
      branches: descriptions that `branch` may name, such as `${branches.NAME}`, where a model config is the base.
      architectures: of that model config too; training needs neither.
    """

    branch: BranchConfig
    data: DataConfig
    stage: str = "instruct"
    llm: LLMConfig | None = None
    also: list[BranchConfig] = field(default_factory=list)
    init: InitConfig = field(default_factory=InitConfig)
    align: AlignConfig = field(default_factory=AlignConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    training: dict[str, Any] = field(default_factory=dict)
    learning_rates: dict[str, float] = field(default_factory=dict)
    shard_llm: bool = False
    generation: dict[str, Any] = field(default_factory=dict)
    branches: Any = None
    architectures: dict[str, Any] = field(default_factory=dict)

    @property
    def all_branches(self) -> list[BranchConfig]:
        """Those that train."""
        return [self.branch, *self.also]


def load_train_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Reads a training config; paths in it start at the working directory."""
    return configs.build(TrainConfig, configs.load_yaml(path, overrides, named=BRANCHES), where="config")


def sources_of(given: Any, where: str) -> list[SourceConfig]:
    """Returns the manifests that a config names in any of its ways, none for None.

    Raises:
      ConfigError: they are given in no such way.
    """
    parts = [] if given is None else given if isinstance(given, (list, tuple)) else [given]
    sources = []
    for number, part in enumerate(parts):
        if isinstance(part, SourceConfig):
            sources.append(part)
        elif isinstance(part, (str, Path)):
            sources.append(SourceConfig(str(part)))
        else:
            sources.append(configs.build(SourceConfig, part, where=f"{where}[{number}]"))
    return sources


def open_manifests(
    given: Any, where: str, *, modalities: Mapping[str, Modality], streaming: bool = False
) -> list[Manifest] | list[Stream]:
    """Opens the manifests that `data.train` or `data.eval` names.

    Raises:
      ConfigError: there is none at a path, or it is empty.
    """
    opened = Stream if streaming else Manifest
    return [
        opened(source.path, modalities=modalities, fields=source.fields, root=source.root)
        for source in sources_of(given, where)
    ]


def check_config(config: TrainConfig) -> None:
    """Checks what contradicts itself.

    Raises:
      ConfigError: something does.
    """
    if config.stage not in STAGES:
        raise ConfigError(f'Unknown stage "{config.stage}".{suggest(str(config.stage), STAGES)}')
    names = [branch.modality for branch in config.all_branches]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"Two branches of one run are of the modality {name}: train them in runs of their own.")
    if config.stage == "align":
        if config.also:
            raise ConfigError("The stage align trains one branch: leave `also` out, and run it once for each.")
        if config.shard_llm:
            raise ConfigError("The stage align has no LLM that shard_llm could spread: leave it out.")
        for name in WISHES:
            if config.training.get(name):
                raise ConfigError(f"training.{name} is for the LLM, and the stage align has none: leave it out.")
    elif config.llm is None:
        raise ConfigError(f"The stage {config.stage} learns through an LLM: name its folder or hub id by llm.source.")
    if config.data.streaming and not config.training.get("max_steps", 0) > 0:
        raise ConfigError("data.streaming: a stream has no end that is known: say training.max_steps.")
    if config.data.streaming and config.also:
        raise ConfigError("data.streaming: streams train one branch. Leave `also` out, or streaming.")
    if config.data.streaming and config.data.group_by_length:
        raise ConfigError(
            "data.group_by_length: nobody knows the lengths of a stream's rows. Leave one of the two out."
        )
    configs.at_least(config.data, eval_answers=0)
    for part, rate in config.learning_rates.items():
        if not rate >= 0:
            raise ConfigError(f"learning_rates.{part} must be at least 0, not {rate:g}.")
    configs.check_share("data.max_skipped", config.data.max_skipped, whole="all rows")


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
    own = {name: value for name, value in config.training.items() if name not in WISHES}
    with refusing():
        arguments = TrainingArguments(**{**defaults, **own, **words})
    configs.at_least(
        arguments,
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=1,
        dataloader_num_workers=0,
        seed=0,
        learning_rate=0,
        weight_decay=0,
        max_grad_norm=0,
    )
    for name in PERIODS:
        period = config.training.get(name)
        if period is not None and period <= 0:
            raise ConfigError(
                f"training.{name} is {period:g}: say after how many steps, or after which share of all, or "
                f"set {name.replace('steps', 'strategy')} to no."
            )
    by_epochs = arguments.max_steps == -1  # which is how transformers says that no number of steps is given
    if not (arguments.num_train_epochs if by_epochs else arguments.max_steps) > 0:
        raise ConfigError("Nothing would be learnt: let training.max_steps or training.num_train_epochs be above 0.")
    if arguments.eval_strategy != "no" and not config.data.eval:
        raise ConfigError(
            f"training.eval_strategy is {arguments.eval_strategy.value}, but data.eval names no manifest: give one, or "
            "remove eval_strategy."
        )
    if arguments.fp16 and arguments.device.type == "cpu":  # which transformers passes over
        raise ConfigError(
            "training.fp16 needs an accelerator: training.bf16 is what a CPU computes in, or leave it out."
        )
    _check_best(config, arguments)
    return arguments


def _check_best(config: TrainConfig, arguments: TrainingArguments) -> None:
    """Checks that what the best checkpoint is chosen by is measured; transformers finds out at the first evaluation."""
    measured = [name for name in METRICS[config.stage] if name != "accuracy" or config.data.eval_answers]
    wanted = (arguments.metric_for_best_model or measured[0]).removeprefix("eval_")
    if wanted not in measured:
        raise ConfigError(
            f'training.metric_for_best_model is "{wanted}", which no evaluation of this run measures.'
            f"{suggest(wanted, measured)}"
        )


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
def refusing() -> Iterator[None]:
    """Turns what transformers raises for a setting into one clear error."""
    try:
        yield
    except (ValueError, TypeError, AttributeError, ImportError, OSError) as cause:
        raise ConfigError(f'"training": {cause}') from cause
