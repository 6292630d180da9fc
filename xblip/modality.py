"""What a plugin author writes: a `Modality`, which reads media and builds a frozen encoder.

Segments stay flat. A modality turns one source into tensors whose first dimension is S, its segments (frames, clips; 1
for stills); the core concatenates the segments of a whole batch to M = sum(S) rows before the encoder. Encoders are
therefore plain modules from (M, ...) to (M, N, D_enc), nobody computes on padding, and items of different lengths share
a batch.

Shape letters of the code base: B batch, S segments of one item, M segments of a batch, N encoder tokens, Q query
tokens, T text tokens, D_enc / D_q / D_llm widths.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from xblip import heat, media, pictures
from xblip.errors import ConfigError, MediaError, PluginError

if TYPE_CHECKING:
    from xblip.checkpoint import Checkpoint


class Modality(ABC):
    """One kind of input. Subclass it, name it, and register the class by `register_modalities`.

    Helpers for `load`: `as_picture`, `check_picture_size` (both of `xblip.pictures`) and `as_array` (of `xblip.media`);
    for `augmented`: `RandomCrop` (of `xblip.pictures`); for `draw`: `heat` (the module `xblip.heat`).

    Class attributes:
      name: identifier used everywhere (Python, configs, command line); equals the entry point's name.
      cue: short text before the soft prompt; "<name>: " unless set.
      suffixes: file endings, lower case with dot, that people have.
      mime_types: of those files.
      checkpoint_prefix: what names it in checkpoints of X-InstructBLIP; the name, unless set.
      transformers_models: classes of transformers whose media part is this modality's.
      bridge: defaults of this modality's bridge that differ from the bridge's own, e.g. {"max_segments": 16}.
      Config: dataclass of the modality's settings. If the encoder comes from files, its folder or hub id stands in
        a field called `encoder`; the core then copies that folder into bundles. What `augmented` changes, and how
        strongly, stands in a field called `augment`: nothing that `load` gives may hang on it, since stored features
        stay true whatever it says.
    """

    name: ClassVar[str]
    cue: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]] = ()
    mime_types: ClassVar[tuple[str, ...]] = ()
    checkpoint_prefix: ClassVar[str]
    transformers_models: ClassVar[tuple[str, ...]] = ()
    bridge: ClassVar[Mapping[str, Any]] = {}

    @dataclass
    class Config:
        """No settings."""

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "name" in vars(cls) and "cue" not in vars(cls):
            cls.cue = f"{cls.name}: "
        if "name" in vars(cls) and "checkpoint_prefix" not in vars(cls):
            cls.checkpoint_prefix = cls.name

    def __init__(self, config: Any = None):
        """Keeps `config`, an instance of `Config` (defaults when None). Does nothing heavy."""
        self.config = self.Config() if config is None else config

    @abstractmethod
    def load(self, source: Any) -> dict[str, Tensor]:
        """Reads one source.

        Args:
          source: a path, bytes, an open binary file, or an object of the modality's own kind (array, PIL image, ...).
            `media_file` tells files from objects and reports missing or empty ones. What is open comes in memory, from where
            it stood.

        Returns:
          Keyword arguments of the encoder; each tensor's first dimension is S, equal for all of them and >= 1.

        Raises:
          MediaError: the source cannot be read, or is not what this modality accepts.
        """

    @abstractmethod
    def build_encoder(self) -> nn.Module:
        """Builds the encoder with its weights, in the dtype they are stored in.

        Returns:
          A module with an attribute `width` (D_enc) whose `forward(**tensors)` takes the tensors of `load` with M rows
          and returns features (M, N, D_enc), or features and a boolean mask (M, N) that is True for real tokens.
          Floats come in the dtype of its weights, or in that of its attribute `input_dtype` if it has one.
        """

    def augmented(self, source: Any, draw: np.random.Generator) -> dict[str, Tensor]:
        """Reads one source as `load` does, but changed at random, as it may be shown to a model that learns.

        Nothing a text says of the source may become false by it, unless `Config.augment` asks for that.

        Args:
          source: as for `load`.
          draw: all chance comes from it, so that a run can be repeated.

        Returns:
          As `load`.

        Raises:
          MediaError: as `load`.
          ConfigError: the modality has no augmentation; it has if it overrides this.
        """
        raise ConfigError(
            f'The modality "{self.name}" has no augmentation: its plugin would have to implement augmented(source, draw). '
            "Leave out data.augment, or --views of xblip precompute."
        )

    def check_augmentation(self) -> None:
        """Raises `ConfigError` if the modality has no augmentation."""
        if type(self).augmented is Modality.augmented:
            self.augmented(None, np.random.default_rng(0))

    def draw(self, tensors: dict[str, Tensor], weights: np.ndarray) -> heat.Drawing:
        """Shows where in a medium the encoder's tokens lie, for `xblip.explain`; by default bars, which tell of no places.

        Args:
          tensors: what `load` gave of one source with S segments.
          weights: (S, N) float, 0 or more, one for each token of the encoder; how they are scaled does not matter. All 0
            shows the medium alone.

        Returns:
          A picture of the medium with more heat where weights are larger, and what else may be kept of it; tokens that lie
          nowhere in it, such as [CLS], by name.
        """
        return heat.bars(weights)

    def preview(self, tensors: dict[str, Tensor]) -> tuple[str, bytes] | None:
        """Makes a file that browsers show, for the page of `xblip serve --ui`, where the modality's own files are none.

        Args:
          tensors: what `load` gave of one source.

        Returns:
          The file's ending, such as ".webp", which says by its MIME type how it is shown, and its content; None, unless
          overridden, where the page shows the file itself.
        """
        return None

    heat = heat
    RandomCrop = pictures.RandomCrop
    as_array = staticmethod(media.as_array)
    as_picture = staticmethod(pictures.as_picture)
    check_picture_size = staticmethod(pictures.check_size)

    @classmethod
    def convert_encoder(cls, checkpoint: "Checkpoint", folder: Path) -> bool:
        """Writes the encoder of a foreign checkpoint as a folder that `Config.encoder` can name.

        Args:
          checkpoint: its tensors; take or leave out every one.
          folder: an empty folder to write into, with the processor that belongs to the encoder.

        Returns:
          Whether it is a checkpoint that this modality knows; if not, nothing was taken or written.

        Raises:
          BundleError: it is one, but weights are missing or of other shapes.
        """
        return False

    @classmethod
    def diagnose(cls) -> dict[str, Callable[[], str]]:
        """Says what the modality needs beside Python code, for `xblip doctor`; nothing, unless overridden.

        Returns:
          By name, a call that loads it and gives its version, or raises why it does not load.
        """
        return {}

    @classmethod
    def example(cls, folder: Path) -> "Example":
        """Makes something small to try the modality on: what `xblip check` and the contract suite work with.

        Args:
          folder: an empty folder to write a tiny encoder and media files into.
        """
        raise PluginError(
            f'The modality "{cls.name}" offers no example to check it with: implement the class method '
            "example(folder), returning xblip.Example(config=..., sources=[one, another], broken=[...])."
        )


@dataclass
class Example:
    """Material for checking a modality.

    Attributes:
      config: settings of its `Config`, for a tiny encoder.
      sources: at least two good sources that differ, in their first segment already.
      broken: sources that must be refused: damaged files, wrong shapes.
    """

    config: dict[str, Any]
    sources: list[Any]
    broken: list[Any]


@dataclass
class Features:
    """Frozen features of the B items of one modality in a batch.

    Attributes:
      values: (M, N, D_enc), the segments of all items one after another.
      mask: (M, N) boolean, True for real tokens.
      segments: S of each item; sums to M.
      key: of one item, what source, settings and encoder it comes from, for caches; None if nobody said.
    """

    values: Tensor
    mask: Tensor
    segments: list[int]
    key: bytes | None = None

    def split(self) -> "list[Features]":
        """Returns one `Features` per item."""
        parts = zip(self.values.split(self.segments), self.mask.split(self.segments), self.segments, strict=True)
        return [Features(values, mask, [count]) for values, mask, count in parts]

    def to(self, weights: Tensor) -> "Features":
        """Returns them as a bridge with these weights takes them: in their dtype and on their device."""
        return replace(self, values=self.values.to(weights), mask=self.mask.to(weights.device))

    @staticmethod
    def join(parts: "Sequence[Features]") -> "Features":
        """Returns the items of all parts as one; the inverse of `split`. N and D_enc must agree."""
        return Features(
            torch.cat([part.values for part in parts]),
            torch.cat([part.mask for part in parts]),
            [count for part in parts for count in part.segments],
        )


def collate(items: Sequence[dict[str, Tensor]]) -> tuple[dict[str, Tensor], list[int]]:
    """Concatenates the segments of several loaded items.

    Args:
      items: results of `Modality.load`.

    Returns:
      The encoder's tensors with M rows, and S of each item.

    Raises:
      MediaError: items disagree about their tensors' names or shapes, or an item's tensors about S.
    """
    for item in items:
        shapes = {name: tuple(tensor.shape) for name, tensor in item.items()}
        counts = {shape[:1] for shape in shapes.values()}
        if len(counts) != 1 or counts <= {(), (0,)}:
            raise MediaError(f"A modality loaded tensors that disagree about the number of segments: {shapes}.")
        first = {name: tuple(tensor.shape)[1:] for name, tensor in items[0].items()}
        if {name: shape[1:] for name, shape in shapes.items()} != first:
            raise MediaError(
                f"A modality loaded items of different shapes, {shapes} beside {first}: it must bring every segment "
                "to one shape (resize, or pad and mask)."
            )
    segments = [next(iter(item.values())).shape[0] for item in items]
    return {name: torch.cat([item[name] for item in items]) for name in items[0]}, segments
