"""Tasks: what a stage of training trains, how it is saved and measured.

A task is all that the trainer knows of a model. Sums of an evaluation are added up over processes before metrics are
made of them, so that each row counts the same, wherever it was seen.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file
from torch import Tensor, nn

from xblip import config as configs
from xblip.align import AlignModel
from xblip.branch import Branch, without_half_precision
from xblip.bridge import QFormerBridge, load_bridge
from xblip.costs import Costs, costs_of, step_flops, total
from xblip.layers import is_sharded
from xblip.modality import Features
from xblip.model import XBlip
from xblip.resume import reading
from xblip.retrieval import Retriever
from xblip.sample import Sample
from xblip.sharing import share
from xblip.stored import StoredEncoder

STATE = "task.safetensors"
"""A task's state, beside the branches in a checkpoint."""


class EvalBatch(NamedTuple):
    """One process's part of what all processes evaluate at once.

    Attributes:
      rows: their numbers; none where other processes have rows and this one has but a stand-in to keep step with.
      samples: of these rows, or the stand-in.
      first: number of the first row of any process.
    """

    rows: list[int]
    samples: list[Sample]
    first: int


class Task(ABC):
    """What the trainer trains.

    Attributes:
      model: takes `samples=[...]`, gives `loss` and numbers to log.
      branches: those whose bridges train, by modality.
      counts_tokens: the loss is a mean over tokens, whose number `count_tokens` tells, not over batches.
      example: a sample of the run, which the trainer notes.
      splits_answers: examples are to give the beginning of an answer as part of the prompt (prefix LM).
    """

    counts_tokens = False
    splits_answers = False

    def __init__(self, model: nn.Module, branches: Mapping[str, Branch]):
        self.model = model
        self.branches = dict(branches)
        self.example: Sample | None = None

    def count_tokens(self, samples: Sequence[Sample]) -> int:
        """Returns how many tokens the loss of these samples is a mean over."""
        raise TypeError(f"the loss of a {type(self).__name__} is no mean over tokens")

    def parts(self) -> list[tuple[str, nn.Module]]:
        """Returns what the model is made of, for people: what each part is called, and the part."""
        parts: list[tuple[str, nn.Module]] = []
        for name, branch in self.branches.items():
            parts += [(f"{name} encoder", branch.encoder.module), (f"{name} bridge", branch.bridge)]
        return parts

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Returns what a resumed run must share beside data and branches."""

    def folder_of(self, folder: Path, name: str) -> Path:
        """Where a branch is saved: in `folder` itself if it is the only one."""
        return folder if len(self.branches) == 1 else folder / name

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes the branches."""

    def state(self) -> dict[str, Tensor]:
        """Returns what only a resumed run needs, to lie in `STATE` beside the branches of a checkpoint."""
        return {}

    def load(self, folder: Path) -> None:
        """Takes up the branches of a checkpoint, and the state.

        Raises:
          BundleError: they are missing, damaged, or other bridges'.
        """
        for name, branch in self.branches.items():
            load_bridge(branch.bridge, self.folder_of(folder, name))

    @abstractmethod
    def evaluate(self, batches: Iterable[EvalBatch]) -> Counter[str]:
        """Sums up what is measured over the batches of this process."""

    @abstractmethod
    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Makes metrics of sums over all processes."""


class AnswerTask(Task):
    """Stages `generate` and `instruct`: the LLM's likelihood of answers.

    Attributes:
      eval_answers: of how many rows answers are generated and compared with the truth.
    """

    counts_tokens = True

    def __init__(self, model: XBlip, *, eval_answers: int, splits_answers: bool = False):
        super().__init__(model, model.branches)
        self.eval_answers = eval_answers
        self.splits_answers = splits_answers
        self._costs: tuple[Costs, Features] | None = None

    def parts(self) -> list[tuple[str, nn.Module]]:
        return [*super().parts(), ("LLM", self.model.llm.model)]

    def flops(self, samples: float, positions: float, labels: float) -> float:
        """FLOPs that no correct step can do without, of so many samples with media like those of the first one.

        Args:
          samples: their number.
          positions: that the LLM read, of all of them.
          labels: tokens that were learnt, of all of them.
        """
        branch = next(iter(self.branches.values()))
        if self._costs is None:
            media = self.example.all_media[0]
            self._costs = costs_of(lambda: branch.encode([media.source]), branch.bridge, self.model.llm)
        costs, features = self._costs
        reads = isinstance(branch.bridge, QFormerBridge) and branch.bridge.tokenizer is not None
        text = branch.bridge.tokenize([self.example.instruction or ""])["input_ids"].shape[1] if reads else 0
        return total(
            step_flops(
                costs,
                segments=round(samples * len(features.values)),
                tokens=features.values.shape[1],
                text=text,
                positions=[positions / samples] * round(samples),
                labels=round(labels),
                stored=isinstance(branch.encoder, StoredEncoder),
            ),
            again=False,
        )

    def facts(self) -> dict[str, Any]:
        return {"llm": self.model.llm.fingerprint, "router": configs.plain(self.model.router.config)}

    def count_tokens(self, samples: Sequence[Sample]) -> int:
        return sum(self.model.router.count_answer_tokens(sample.answer) for sample in samples)

    def save(self, folder: Path) -> None:
        for name, branch in self.branches.items():
            branch.save(self.folder_of(folder, name), llm=self.model.llm)

    def load(self, folder: Path) -> None:
        super().load(folder)
        share(branch.bridge for branch in self.branches.values())  # fresh ones may have differed in what is shared

    def evaluate(self, batches: Iterable[EvalBatch]) -> Counter[str]:
        sums: Counter[str] = Counter(likelihood=0.0, tokens=0, right=0, asked=0)
        options = {
            "do_sample": False,
            "num_return_sequences": 1,
            **({"synced_gpus": True} if is_sharded(self.model) else {}),
        }
        for rows, samples, first in batches:
            outputs = self.model(samples=samples)
            answers = self.model.generate(samples, **options) if first < self.eval_answers else []
            if rows:
                tokens = int(outputs["num_tokens"])
                sums.update(likelihood=float(outputs["loss"]) * tokens, tokens=tokens)
            for row, sample, answer in zip(rows, samples, answers, strict=False):
                if row < self.eval_answers:
                    truths = {truth.strip() for truth in (sample.answer, *sample.accepted)}
                    sums.update(asked=1, right=int(answer.text in truths))
        return sums

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        accuracy = {"accuracy": sums["right"] / sums["asked"]} if sums["asked"] else {}
        return {"loss": sums["likelihood"] / sums["tokens"], **accuracy}


class AlignTask(Task):
    """Stage `align`: the contrast, the match and the caption of media and texts; no LLM."""

    def __init__(self, model: AlignModel):
        super().__init__(model, {model.branch.modality.name: model.branch})

    def facts(self) -> dict[str, Any]:
        return {"align": configs.plain(self.model.settings)}

    def save(self, folder: Path) -> None:
        Retriever(self.model.branch).save_pretrained(folder, with_encoder=False)

    def state(self) -> dict[str, Tensor]:
        return {} if self.model.momentum is None else self.model.momentum.state_dict()

    def load(self, folder: Path) -> None:
        super().load(folder)
        if self.model.momentum is not None:
            with reading(folder):
                self.model.momentum.load_state_dict(load_file(folder / STATE))

    def evaluate(self, batches: Iterable[EvalBatch]) -> Counter[str]:
        """Looks, for each row, among the captions and the media of all rows of all processes for what is nearest."""
        bridge, branch = self.model.branch.bridge, self.model.branch
        media, texts, captions = [], [], []
        for rows, samples, _ in batches:
            features = branch.encode([sample.all_media[0].source for sample in samples])
            told = [sample.answer for sample in samples]
            if rows:
                with without_half_precision(features.values.device.type):
                    media += [part.float().cpu() for part in bridge.embed_media(features)]
                    texts += bridge.embed_texts(told).float().cpu()
                captions += told
        everyone = gather_object([(media, texts, captions)])
        all_media = [part for other in everyone for part in other[0]]
        all_texts = torch.stack([part for other in everyone for part in other[1]])
        all_captions = [caption for other in everyone for caption in other[2]]
        sums: Counter[str] = Counter(rows=len(captions), right_texts=0, right_media=0)
        for part, text, caption in zip(media, texts, captions, strict=True):
            text_found = int((part @ all_texts.T).amax(0).argmax())
            media_found = int(torch.stack([(other @ text).amax() for other in all_media]).argmax())
            sums.update(
                right_texts=int(all_captions[text_found] == caption),
                right_media=int(all_captions[media_found] == caption),
            )
        return sums

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        return {
            "text_recall_at_1": sums["right_texts"] / sums["rows"],
            "media_recall_at_1": sums["right_media"] / sums["rows"],
        }
