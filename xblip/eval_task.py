"""Evaluation tasks: what is asked, and how answers are scored; plugins register kinds of them.

A task predicts row by row and scores what was written of all rows, so that runs can be divided, killed and gone on with,
and scored again without a model.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from xblip.intervals import Figure, Measured
from xblip.sample import Sample

Line = dict[str, Any]
"""A row in a file of predictions: its id, unit, origin, inputs, instruction and truth, and what the model predicted."""


@dataclass(frozen=True)
class EvalRow:
    """One row that is asked.

    Attributes:
      id: unlike any other's in its task, and the same each time.
      sample: what is asked about what.
      truth: what is right, as plain values that JSON has.
      unit: what it belongs to, of which other rows are not independent; itself if "".
      extra: what else scoring needs, as plain values, such as the kind of question; kept beside the prediction.
    """

    id: str
    sample: Sample
    truth: Any
    unit: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)


class EvalTask(ABC):
    """A kind of task; an instance is one of them with its data and settings.

    Attributes:
      name: of the kind, in configs.
      config: its settings.
      seed: what chance it takes is drawn from.
    """

    name: ClassVar[str]

    @dataclass
    class Config:
        """Settings of a kind."""

    def __init__(self, config: Any, *, seed: int = 0):
        self.config, self.seed = config, seed

    @abstractmethod
    def rows(self, modalities: Mapping[str, Any]) -> Sequence[EvalRow]:
        """Returns all rows, in the same order each time; media unread.

        Args:
          modalities: the model's `Modality`s, by name.

        Raises:
          ConfigError, InputError: the data or a setting is wrong.
        """

    @abstractmethod
    def predict(self, model: Any, rows: Sequence[EvalRow]) -> list[Line]:
        """Returns for each row of a batch what the model says of it, as plain values; `score` reads them.

        Args:
          model: an `XBlip`, or what else the run's `model` names.
          rows: some of those that `rows` returned.

        Raises:
          MediaError: a file cannot be read; the rows are then tried one by one, and the broken ones counted.
        """

    @abstractmethod
    def score(self, lines: Sequence[Line]) -> dict[str, Figure]:
        """Makes figures of predictions, of nothing but what stands in their lines.

        Args:
          lines: those of all rows that were predicted, at least one.

        Returns:
          Figures by name, the most telling first, each as a share; they are shown times 100.
        """

    def facts(self) -> Mapping[str, Any]:
        """Returns what a resumed run must share beside the config, such as hashes of files; called after `rows`."""
        return {}

    def report(self, place: Path, lines: Sequence[Line], measured: Mapping[str, Measured]) -> None:  # noqa: B027
        """Writes pages of its own, called as `place`, the run's folder and the task's name, with endings.

        Called once all is scored, by the first process.
        """
