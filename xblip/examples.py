"""Examples: what a plan's visits become in the workers of a data loader, and the account of those that cannot be read.

All chance in an example is drawn by a generator seeded with its visit, so a visit gives the same sample in whichever
process it is made, whatever was made before it, and after a resume.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from torch.utils.data import Dataset

from xblip import config as configs
from xblip.data import Manifest, Visit, with_media
from xblip.errors import ConfigError, InputError, MediaError, XBlipError, suggest
from xblip.forms import Row
from xblip.media import FilePart
from xblip.modality import Features
from xblip.sample import Media, Sample
from xblip.templates import Templates

STAGES = ("align", "generate", "instruct")
ATTEMPTS = 100  # rows that are tried in the place of one whose file is broken
DRAW, REPLACE, AUGMENT = 3, 4, 7  # streams of chance; `xblip.mixture` and `xblip.streaming` have others


class Skipped(NamedTuple):
    """A row that another one has taken the place of.

    Attributes:
      origin: its file and line.
      reason: why it cannot be read.
    """

    origin: str
    reason: str


class FeatureSource(Protocol):
    """Where frozen features are found by the file they were made of; `xblip.store` has one."""

    def features(self, source: str | Path) -> Features: ...

    def view(self, source: str | Path, draw: np.random.Generator) -> Features: ...


@dataclass
class ContextConfig:
    """Text in the place of other inputs, so that a soft prompt is learnt in every position.

    Attributes:
      texts: file with such a text on each line, cue and description: "audio: a dog barks."
      share: of examples that get some.
      most: how many an example gets at most; all counts from 1 are alike likely, and how many stand before the input.
    """

    texts: str
    share: float = 0.5
    most: int = 2


class Examples(Dataset):
    """The samples of several manifests, by visit.

    Attributes:
      splits_answers: the beginning of an answer, as much as is drawn, goes before the LLM as part of the prompt (prefix
        LM: how BLIP-2 trains through an encoder-decoder); the Q-Former does not read it.
    """

    def __init__(
        self,
        sources: Sequence[Manifest],
        *,
        stage: str,
        seed: int,
        templates: Mapping[str, Templates] | None = None,
        features: Mapping[str, FeatureSource] | None = None,
        context: ContextConfig | None = None,
        augment: bool = False,
    ):
        """Keeps them; reads only the texts of `context`.

        Args:
          sources: manifests, in the order of the plan.
          stage: "align", "generate" or "instruct"; the last asks for an instruction with every row.
          seed: of everything drawn here.
          templates: instructions for rows that have none, by modality.
          features: where features are that stand in for files, by modality.
          context: text beside the input; none if None.
          augment: change media at random, or take one of the views that a store holds.

        Raises:
          ConfigError: an unknown stage, a context that cannot be, or a modality without augmentation.
        """
        if stage == "align" and context:
            raise ConfigError("Stage align has no LLM that would read a context: remove it, or choose another stage.")
        if stage not in STAGES:
            raise ConfigError(f'Unknown stage "{stage}".{suggest(stage, STAGES)}')
        self.sources, self.stage, self.seed = list(sources), stage, seed
        self.templates, self.features, self.context = dict(templates or {}), dict(features or {}), context
        self._texts = _context_texts(context) if context else []
        self.augment = augment
        for modality in [modality for manifest in sources if augment for modality in manifest.modalities.values()]:
            modality.check_augmentation()
        self.splits_answers = False

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    def visit(self, row: int) -> Visit:
        """Returns the first visit of a row, counted over all manifests."""
        for source, manifest in enumerate(self.sources):
            if row < len(manifest):
                return Visit(source, row, 0)
            row -= len(manifest)
        raise IndexError(row)

    def check(self) -> None:
        """Reads every row, media unread, so that a bad one is told before anything is loaded.

        Raises:
          InputError: a row has no form, answer or input, or is no caption in stage align.
          ConfigError: rows need templates that are not there.
        """
        for manifest in self.sources:
            for modality, task in sorted(manifest.check()):
                self._templates(modality, task, str(manifest.path))

    def __getitem__(self, visit: Visit) -> Sample:
        *_, found = self._visited(Visit(*visit))
        if isinstance(found, XBlipError):
            raise found
        return found

    def __getitems__(self, visits: Sequence[Visit]) -> list[Sample | Skipped | XBlipError]:
        """A batch for a data loader.

        Returns:
          A sample for each visit, after those that were skipped for it; a user's error comes as a value in its place,
          since torch makes a text of what a worker raises.
        """
        return [found for visit in visits for found in self._visited(visit)]

    def _visited(self, visit: Visit) -> list[Sample | Skipped | XBlipError]:
        manifest = self.sources[visit.source]

        def others() -> Iterator[tuple[Visit, Callable[[], Row]]]:
            for attempt in range(ATTEMPTS):
                draw = np.random.default_rng([self.seed, REPLACE, *visit, attempt])
                index = visit.index if not attempt else int(draw.integers(len(manifest)))
                yield visit._replace(index=index), functools.partial(manifest.row, index)

        return self.first_readable(manifest, others())

    def first_readable(
        self, manifest: Manifest, rows: Iterable[tuple[Visit, Callable[[], Row]]]
    ) -> list[Sample | Skipped | XBlipError]:
        """Makes a sample of the first of some rows whose files can be read.

        Args:
          manifest: theirs.
          rows: visits, and what gives the row of each.

        Returns:
          The sample, or a user's error in its place, after the rows that were skipped.
        """
        skipped: list[Skipped] = []
        for visit, row_of in rows:
            try:
                row = row_of()
                sample = self._drawn(row, visit)
            except XBlipError as error:
                return [*skipped, error]
            try:
                draw = np.random.default_rng([self.seed, AUGMENT, *visit]) if self.augment else None
                return [*skipped, with_media(sample, functools.partial(self._read, manifest, draw))]
            except MediaError as error:
                skipped.append(Skipped(row.origin, str(error)))
            except XBlipError as error:
                return [*skipped, type(error)(f"{row.origin}: {error}")]
        fault = (
            f"{len({item.origin for item in skipped})} rows of {manifest.path} in turn name files that cannot be read, the "
            f"last one in {skipped[-1].origin}: {skipped[-1].reason} Check the files; relative paths start at the manifest, "
            "or at its `root`."
        )
        return [*skipped, MediaError(fault)]

    def _drawn(self, row: Row, visit: Visit) -> Sample:
        """A row with an answer, an instruction and a context, its media unread."""
        draw = np.random.default_rng([self.seed, DRAW, *visit])
        if not row.answers:
            raise InputError(f"{row.origin}: it has no answer. Add it, or remove the row.")
        answer = list(row.answers)[draw.choice(len(row.answers), p=list(row.answers.values()))]
        sample = row.sample
        modality = next((media.modality for media in sample.all_media), "")
        templates, instruction = self._templates(modality, row.task, row.origin), sample.instruction
        if templates:
            instruction = templates[draw.integers(len(templates))].format(question=instruction)
        media = self._in_context(sample.media, draw) if self.context else sample.media
        words = answer.split()
        if self.splits_answers and len(words) > 1:
            cut = int(draw.integers(1, len(words)))
            media, answer = [*media, " ".join(words[:cut])], " ".join(words[cut:])
        accepted = () if self.splits_answers else tuple(row.answers)
        return dataclasses.replace(sample, instruction=instruction, media=media, answer=answer, accepted=accepted)

    def _templates(self, modality: str, task: str, where: str) -> list[str]:
        """The templates that a row of a task needs; none where it says all itself."""
        found = self.templates[modality].of(task) if modality in self.templates else []
        if self.stage == "align" and task not in ("caption", "classification"):
            raise InputError(
                f"{where}: a row has an instruction or a question, and stage align learns captions: an answer to a question "
                "is none. Give the rows a `caption`, or choose with `fields`."
            )
        if self.stage != "instruct":
            return []
        if task in ("caption", "classification") and not found:
            raise ConfigError(
                f"{where}: rows of task {task} have no instruction of their own, and stage instruct needs one. Name a file "
                f"with {task} templates for {modality}, or give the rows an `instruction` and an `answer`."
            )
        return found

    def _in_context(self, media: Sequence[str | Media], draw: np.random.Generator) -> list[str | Media]:
        """Inputs among texts that stand for others."""
        if draw.random() >= self.context.share:
            return list(media)
        count = int(draw.integers(1, self.context.most + 1))
        texts = [self._texts[index] for index in draw.integers(len(self._texts), size=count)]
        before = int(draw.integers(count + 1))
        return [*texts[:before], *media, *texts[before:]]

    def _read(self, manifest: Manifest, draw: np.random.Generator | None, media: Media) -> Media:
        """An input as tensors, or as the features kept of it; changed at random if there is something to draw by."""
        store, modality = self.features.get(media.modality), manifest.modalities[media.modality]
        if store is not None:
            return media.with_source(store.view(media.source, draw) if draw else store.features(media.source))
        try:
            tensors = modality.augmented(media.source, draw) if draw else modality.load(media.source)
            return media.with_source(tensors)
        except MediaError as error:
            if isinstance(media.source, (str, Path, bytes, FilePart)):
                raise
            raise InputError(str(error)) from error  # it stands in the row itself


def collate_examples(found: Sequence[Sample | Skipped | XBlipError]) -> dict[str, Any]:
    """Returns a batch.

    Returns:
      `samples`, errors in the place of those that cannot be made; `skipped` rows; and `replaced`, the places of samples
      that stand for skipped ones.
    """
    samples, skipped, replaced = [], [], set()
    for item in found:
        if isinstance(item, Skipped):
            skipped.append(item)
            replaced.add(len(samples))
        else:
            samples.append(item)
    return {"samples": samples, "skipped": skipped, "replaced": replaced}


class SkipLog:
    """The rows that were skipped, in a file that outlives the run.

    Several processes may share the file: each adds a line with one write, and counts what all have written.
    """

    def __init__(self, path: str | Path, *, rows: int, max_skipped: float = 0.01, resume: bool = False):
        """Opens the file.

        Args:
          path: such as "run/skipped.jsonl".
          rows: of all manifests.
          max_skipped: share of them above which `add` raises.
          resume: keep what it holds; if not, it begins empty.

        Raises:
          ConfigError: `max_skipped` is no share.
        """
        configs.check_share("max_skipped", max_skipped, whole="all rows")
        self.path, self.rows, self.max_skipped = Path(path), rows, max_skipped
        if not resume:
            self.path.unlink(missing_ok=True)
        elif self.path.exists() and not self.path.read_bytes().endswith(b"\n"):
            self._append("\n")  # ends what a killed process left unfinished
        self._origins, self._read = set[str](), 0
        self.refresh()

    def __len__(self) -> int:
        """Returns how many different rows were skipped."""
        return len(self._origins)

    def add(self, skipped: Iterable[Skipped]) -> None:
        """Adds rows that are not in it yet.

        Raises:
          MediaError: more than `max_skipped` of all rows are skipped.
        """
        skipped = list(skipped)
        if not skipped:
            return
        self.refresh()
        fresh = {item.origin: item for item in skipped if item.origin not in self._origins}
        if not fresh:
            return
        lines = "".join(json.dumps(item._asdict(), ensure_ascii=False) + "\n" for item in fresh.values())
        self._append(lines)
        self.refresh()
        if len(self) > self.max_skipped * self.rows:
            last = next(reversed(fresh.values()))
            raise MediaError(
                f"{len(self)} of {self.rows} rows are skipped since their files cannot be read, more than max_skipped = "
                f"{self.max_skipped} allows. {self.path} names them; the last one: {last.origin}: {last.reason} Mend the "
                "files or remove the rows, or allow more."
            )

    def _append(self, lines: str) -> None:
        with self.path.open("ab", buffering=0) as file:
            file.write(lines.encode(errors="backslashreplace"))

    def refresh(self) -> None:
        """Reads what was written since the last time, by whichever process."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._read += len(line)
                try:
                    self._origins.add(json.loads(line)["origin"])
                except (ValueError, KeyError, TypeError):
                    continue  # half a line of a process that was killed


def _context_texts(context: ContextConfig) -> list[str]:
    configs.at_least(context, most=1)
    if not 0 < context.share <= 1:
        raise ConfigError(f"context.share must be above 0 and at most 1, not {context.share}.")
    try:
        lines = Path(context.texts).expanduser().read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as cause:
        raise ConfigError(f"Cannot read context.texts, {context.texts}: {cause}.") from cause
    texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise ConfigError(f"context.texts, {context.texts}, holds no text: put one on each line.")
    return texts
