"""The training loop: transformers' `Trainer`, with what is ours about training bridges.

A task (`xblip.tasks`) says what is trained and how it is measured, a plan which rows make which batch. Ours are the loss
over a whole global batch, checkpoints that are whole or absent, the stop at a loss that is no number, and evaluation.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import rotate_checkpoints

from xblip.devices import device_peak
from xblip.errors import ConfigError, InputError, XBlipError, suggest
from xblip.examples import SkipLog
from xblip.layers import is_sharded
from xblip.loading import first_line, is_killed_worker, save_tensors
from xblip.meters import Curves, Meter
from xblip.mixture import BatchPlan
from xblip.resume import STATE, check_facts, reading, write_facts, writing
from xblip.tasks import STATE as TASK_STATE
from xblip.tasks import AnswerTask, EvalBatch, Task

CALLBACKS = (Curves,)
"""Of every run."""
LOST = ("Connection closed", "onnection reset", "Broken pipe", "Timed out", "timeout", "NCCL", "gloo")
"""Words of what torch raises in one process when another one has ended."""
KEPT = ("optimizer.pt", "scheduler.pt")
"""Files of a checkpoint that a resumed run cannot do without, beside those of the task."""


class BridgeTrainer(Trainer):
    """transformers' Trainer for the bridges of a task.

    Attributes:
      task: what trains.
      plan: which rows make which batch, of this process; None for a stream.
      skipped: rows whose files are broken.
      rates: learning rates of their own, by part of a weight's name.
      facts: what a resumed run must share with the one that it goes on from.
    """

    def __init__(
        self,
        *,
        task: Task,
        plan: BatchPlan | None,
        skipped: SkipLog,
        rates: Mapping[str, float],
        facts: Mapping[str, Any],
        **kwargs: Any,
    ):
        super().__init__(model=task.model, callbacks=[callback() for callback in CALLBACKS], **kwargs)
        self.task = task
        self.plan = plan
        self.skipped = skipped
        self.rates = rates
        self.facts = facts
        self.loss_is_scaled_for_ga = task.counts_tokens
        self._meter = self._make_meter()
        self._samples: list[Any] = []
        frozen = [name for name, weight in self.model.named_parameters() if not weight.requires_grad]
        frozen += [name for name, _ in self.model.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self.model, frozen)

    def _make_meter(self) -> Meter:
        """A meter that tells utilisation where the device's peak is known, of a run that trains one branch."""
        if self.args.device.type != "cuda" or not isinstance(self.task, AnswerTask) or len(self.task.branches) > 1:
            return Meter()
        device = device_peak(torch.cuda.get_device_name(self.args.device))
        return Meter(flops=self.task.flops, peak=device and device.flops)

    def _move_model_to_device(self, model, device) -> None:
        if not is_sharded(model):  # what is sharded lies where it belongs
            super()._move_model_to_device(model, device)

    def _wrap_model(self, model, training: bool = True, dataloader: DataLoader | None = None) -> nn.Module:
        if training and is_sharded(self.model) and model is self.model:
            devices = [self.args.device] if self.args.device.type == "cuda" else None
            return DistributedDataParallel(model, device_ids=devices, find_unused_parameters=True)
        return super()._wrap_model(model, training, dataloader)

    def compute_loss_context_manager(self) -> contextlib.AbstractContextManager:
        return self.accelerator.autocast()  # which Accelerate builds into models that it wraps itself alone

    def get_train_dataloader(self) -> DataLoader:
        return self._loader(self.train_dataset, self.plan)

    def _loader(self, dataset: Dataset, batches: Iterable | None) -> DataLoader:
        """Loads batches of visits; a stream, for which there are none, gives batches itself."""
        workers = self.args.dataloader_num_workers
        return _EpochLoader(
            dataset,
            **({"batch_size": None} if batches is None else {"batch_sampler": batches}),
            collate_fn=self.data_collator,
            num_workers=workers,
            persistent_workers=self.args.dataloader_persistent_workers and workers > 0,
            prefetch_factor=self.args.dataloader_prefetch_factor if workers else None,
            generator=torch.Generator(),  # its own, so that the loader takes nothing from dropout's
        )

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        with self._meter.waiting(), _naming_killed_workers():
            batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        return batches, items

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | None:
        for batch in batch_samples:
            self._check_rows(batch)
        if not self.task.counts_tokens or not batch_samples:
            return None
        tokens = sum(self.task.count_tokens(batch["samples"]) for batch in batch_samples)
        return self.accelerator.reduce(torch.tensor(tokens, device=device), "sum")

    def _prepare_inputs(self, inputs):
        return inputs  # samples, which a branch puts where its weights are

    def _check_rows(self, batch: Mapping[str, Any]) -> None:
        """Raises what workers could not, and notes rows whose files are broken."""
        for sample in batch["samples"]:
            if isinstance(sample, XBlipError):
                raise sample
        self.skipped.add(batch["skipped"])

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self._samples = inputs["samples"]
        self.task.example = self.task.example or self._samples[0]
        with self._naming_rows():
            outputs = model(samples=self._samples)
        self._meter.add(len(self._samples), outputs)
        loss = outputs["loss"]
        self._check_finite(loss.detach(), "loss")
        if num_items_in_batch is not None:
            # Processes average their gradients, so that each counts for its share of the global batch's tokens.
            loss = loss * outputs["num_tokens"] * self.accelerator.num_processes / num_items_in_batch
        return (loss, outputs) if return_outputs else loss

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        if norm is not None and getattr(self.accelerator, "scaler", None) is None:
            self._check_finite(torch.as_tensor(norm), "gradient")
        return norm

    @contextlib.contextmanager
    def _naming_rows(self) -> Iterator[None]:
        """Adds to what the model says of its input, such as a prompt that is too long, which rows it may be."""
        try:
            yield
        except InputError as error:
            rows = [sample.origin for sample in self._samples]
            if any(row and row in str(error) for row in rows):
                raise
            told = f"one of these rows: {'; '.join(rows)}" if error.row is None else rows[error.row]
            raise InputError(f"{error} It is {told}.") from error

    def _check_finite(self, value: Tensor, what: str) -> None:
        if not value.isfinite().all():
            rows = "; ".join(sample.origin for sample in self._samples)
            raise XBlipError(
                f"The {what} at step {self.state.global_step + 1} is {value.item()}, of these rows: {rows}. Nothing was "
                "learnt from it, and checkpoints before it are whole. Look at the rows, lower training.learning_rate or "
                "set training.max_grad_norm, and go on with --resume."
            )

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        if self.optimizer is None and self.rates:
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer_cls_and_kwargs = optimizer_class, {**options, "params": self._parameter_groups()}
        return super().create_optimizer(model)

    def _parameter_groups(self) -> list[dict[str, Any]]:
        decaying = self.get_decay_parameter_names(self.model)
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        names = [name for name, weight in self.model.named_parameters() if weight.requires_grad]
        for part in self.rates:
            if not any(part in name for name in names):
                raise ConfigError(
                    f'learning_rates.{part}: no weight that trains has "{part}" in its name.'
                    f"{suggest(part, {word for name in names for word in name.split('.') if not word.isdigit()})}"
                )
        for name in names:
            rate = next((rate for part, rate in self.rates.items() if part in name), self.args.learning_rate)
            decay = self.args.weight_decay if name in decaying else 0.0
            groups.setdefault((rate, decay), []).append(self.model.get_parameter(name))
        return [{"params": weights, "lr": rate, "weight_decay": decay} for (rate, decay), weights in groups.items()]

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:  # resumed at its end
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            self.skipped.refresh()
            logs |= self._meter.take(self._summed) | ({"skipped": len(self.skipped)} if self.skipped else {})
        super().log(logs, start_time)

    def _summed(self, numbers: Sequence[float]) -> list[float]:
        """Adds numbers up over all processes."""
        return self.accelerator.reduce(
            torch.tensor(numbers, dtype=torch.float64, device=self.args.device), "sum"
        ).tolist()

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Measures the weights as they are on the evaluation rows, which all processes share."""
        with self._meter.paused(), self.accelerator.autocast(), self._naming_rows():
            self.model.eval()
            totals = self.task.evaluate(self._eval_batches(self.eval_dataset if eval_dataset is None else eval_dataset))
            summed = self._summed(list(totals.values()))
            metrics = self.task.metrics(dict(zip(totals, summed, strict=True)))
            metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
            self.log(metrics)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _eval_batches(self, dataset: Dataset) -> Iterator[EvalBatch]:
        """Divides the rows of an evaluation; every process gets as many batches as any other."""
        size, processes = self.args.per_device_eval_batch_size, self.accelerator.num_processes
        firsts = range(0, len(dataset), size * processes)
        mine = [first + self.accelerator.process_index * size for first in firsts]
        rows = [list(range(start, min(start + size, len(dataset)))) for start in mine]
        loader = self._loader(dataset, [list(map(dataset.visit, part or [0])) for part in rows])
        batches = iter(loader)
        for first, part in zip(firsts, rows, strict=True):
            with _naming_killed_workers():
                batch = next(batches)
            self._check_rows(batch)
            samples = batch["samples"]
            if part:  # a row that another one has taken the place of is not measured
                kept = [place for place in range(len(part)) if place not in batch["replaced"]]
                part = [part[place] for place in kept]
                samples = [samples[place] for place in kept] or samples[:1]
            self._samples = samples
            yield EvalBatch(part, samples, first)

    def evaluated(self) -> dict[str, float]:
        """Returns the metrics of the weights as they are, measuring them only if the last step did not."""
        entries = [entry for entry in self.state.log_history if entry["step"] == self.state.global_step]
        found = {name: value for entry in entries for name, value in entry.items() if name.startswith("eval_")}
        return found if found and not self.args.load_best_model_at_end else self.evaluate()

    def _save_checkpoint(self, model, trial) -> None:
        """Writes a checkpoint; see `xblip.resume.writing`."""
        folder = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        is_main = self.args.should_save
        with self._meter.paused(), writing(folder, is_main=is_main) as staging:
            self.accelerator.wait_for_everyone()
            self.store_flos()
            self.save_model(str(staging), _internal_call=True)
            if self.state.best_global_step:
                self.state.best_model_checkpoint = str(folder.with_name(f"checkpoint-{self.state.best_global_step}"))
            if not self.args.save_only_model:
                self._save_optimizer_and_scheduler(str(staging))
                self._save_scaler(str(staging))
                self._save_rng_state(str(staging))
            if is_main:
                if state := self.task.state():
                    save_tensors(state, staging / TASK_STATE)
                self._note_callbacks()
                self.state.save_to_json(str(staging / STATE))
                write_facts(staging, self.facts)
            self.accelerator.wait_for_everyone()
        if is_main:
            rotate_checkpoints(
                output_dir=self.args.output_dir,
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
            )

    def _note_callbacks(self) -> None:
        """Puts the state of callbacks that have one (early stopping) into the state that is saved."""
        parts = [part for part in (*self.callback_handler.callbacks, self.control) if isinstance(part, ExportableState)]
        for part in parts:
            name = type(part).__name__
            if isinstance(self.state.stateful_callbacks[name], list):
                self.state.stateful_callbacks[name].append(part.state())
            else:
                self.state.stateful_callbacks[name] = part.state()

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        self.task.save(Path(output_dir or self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        check_facts(Path(resume_from_checkpoint), self.facts)
        self.task.load(Path(resume_from_checkpoint))

    def _init_training_state(self, max_steps: int, *args: Any) -> tuple[int, int]:
        trained = super()._init_training_state(max_steps, *args)
        self.state.compute_steps(self.args, max_steps)  # which a checkpoint has too, of its own run
        return trained

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not checkpoint:
            return
        random = [f"rng_state_{self.args.process_index}.pth" if self.args.world_size > 1 else "rng_state.pth"]
        lacking = [name for name in (*KEPT, *random) if not Path(checkpoint, name).is_file()]
        if lacking:  # transformers would go on with fresh ones
            raise ConfigError(
                f"{checkpoint} lacks {' and '.join(lacking)}: a run cannot go on from a branch alone, as "
                "training.save_only_model leaves one. Train anew in another output_dir, with init.folder naming it."
            )
        asked = [(group["initial_lr"], group["weight_decay"]) for group in self.optimizer.param_groups]
        with reading(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
        self._ask_for(asked)

    def _ask_for(self, asked: Sequence[tuple[float, float]]) -> None:
        """Sets what a checkpoint has of its own run: each group's learning rate before the schedule, and weight decay."""
        schedule = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)
        for number, (group, (rate, decay)) in enumerate(zip(self.optimizer.param_groups, asked, strict=True)):
            group["weight_decay"] = decay
            if rate != group["initial_lr"] and isinstance(schedule, LambdaLR):
                group["initial_lr"] = schedule.base_lrs[number] = rate
                group["lr"] = schedule._last_lr[number] = rate * schedule.lr_lambdas[number](schedule.last_epoch)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with reading(checkpoint):
            super()._load_rng_state(checkpoint)

    def _load_best_model(self) -> None:
        self.task.load(Path(self.state.best_model_checkpoint))


class _EpochLoader(DataLoader):
    """A data loader that tells its plan the epoch, as transformers' Trainer asks a loader to; a stream has no plan."""

    def set_epoch(self, epoch: int) -> None:
        if self.batch_sampler is not None:
            self.batch_sampler.set_epoch(epoch)


@contextlib.contextmanager
def naming_lost_processes() -> Iterator[None]:
    """Turns what torch raises when another process of the run has ended into one clear error."""
    try:
        yield
    except RuntimeError as cause:
        if not dist.is_initialized() or not any(word in str(cause) for word in LOST):
            raise
        raise XBlipError(
            f"Another process of this run has ended, or cannot be reached: {first_line(cause)} What it says itself is the "
            "reason. Go on with --resume when that is mended."
        ) from cause


@contextlib.contextmanager
def _naming_killed_workers() -> Iterator[None]:
    """Turns what torch raises when a worker of the data loader is killed into one clear error."""
    try:
        yield
    except RuntimeError as cause:
        if not is_killed_worker(cause):
            raise
        raise XBlipError(
            f"A process that reads data died: {first_line(cause)} Mostly it was memory that ran out: set a smaller "
            "training.dataloader_num_workers, and go on with --resume."
        ) from cause
