"""Where answers across inputs come from: the same questions asked with the inputs, without, and with words in their place.

A row is asked in all ways at once, so that a killed run has each row whole or not at all; every way is scored from what
was written. `xblip.crossmodal_rows` says what a row is, `xblip.crossmodal_page` makes the report.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xblip import crossmodal_page, hookspecs
from xblip.crossmodal_rows import CrossRow, Form, read_rows
from xblip.crossmodal_score import SOFT, figures_of
from xblip.errors import ConfigError, suggest
from xblip.eval_task import EvalRow, EvalTask, Line
from xblip.intervals import Figure, Measured
from xblip.modality import Features
from xblip.model import XBlip
from xblip.sample import Media, Sample
from xblip.train_data import digest

KEPT_BYTES = 2**30
"""Frozen features that are kept for further questions about the same files."""

Parts = list[str | Media]


class CrossmodalTask(EvalTask):
    """Questions about files of which it is known what they show, each asked in many ways."""

    name = "crossmodal"

    @dataclass
    class Config(EvalTask.Config):
        """Settings.

        Attributes:
          data: JSONL or JSON of rows, see `xblip.crossmodal_rows`.
          ways: those to ask in, of WAYS; all that rows allow unless given. Soft prompts are always asked.
          describe: what the model is asked for captions of its own: a text with or without `{modality}` in it, or one for
            each modality by name.
          caption: generation options of its own captions, beside `generation`.
          generation: generation options.
          root: folder that paths of media start from; that of `data` unless given.
        """

        data: str
        ways: list[str] = field(default_factory=lambda: list(WAYS))
        describe: Any = "describe the {modality}."
        caption: dict[str, Any] = field(default_factory=dict)
        generation: dict[str, Any] = field(default_factory=lambda: {"do_sample": False})
        root: str | None = None

    def rows(self, modalities: Mapping[str, Any]) -> Sequence[EvalRow]:
        for way in self.config.ways:
            if way not in WAYS:
                raise ConfigError(f'Unknown way "{way}" to ask.{suggest(str(way), WAYS)}')
        self._orders = self._describing(modalities)
        rows = read_rows(self.config.data, modalities, self.config.root)
        self._rows = {row.id: row for row in rows}
        self._seen = _Seen(KEPT_BYTES)
        places = {name: place for place, name in enumerate(modalities)}
        return [
            EvalRow(
                row.id,
                Sample(row.asked.instruction, list(row.asked.media), origin=row.origin),
                row.asked.truths,
                unit=row.unit,
                extra=_extra(row, places),
            )
            for row in rows
        ]

    def _describing(self, modalities: Mapping[str, Any]) -> dict[str, str]:
        """What asks for a caption, by modality."""
        given = self.config.describe
        if isinstance(given, str) and given.strip():
            return {name: given.replace("{modality}", name.replace("_", " ")) for name in modalities}
        if not isinstance(given, Mapping) or not all(isinstance(text, str) and text.strip() for text in given.values()):
            raise ConfigError(f"describe must be a text, or one for each modality, not {given!r:.80}.")
        for name in given:
            if name not in modalities:
                raise ConfigError(f'describe has the unknown modality "{name}".{suggest(str(name), modalities)}')
        if "own captions" in self.config.ways and (lacking := [name for name in modalities if name not in given]):
            raise ConfigError(f'describe lacks the modality "{lacking[0]}": say what asks for a caption of it.')
        return dict(given)

    def facts(self) -> Mapping[str, Any]:
        return {self.config.data: digest(self.config.data)}

    def predict(self, model: XBlip, rows: Sequence[EvalRow]) -> list[Line]:
        own = [self._rows[row.id] for row in rows]
        forms = [form for row in own for form in (row.asked, row.replaced) if form]
        seen = self._seen.look(model, [media for form in forms for media in form.media])
        said = self._captions(model, own, seen) if "own captions" in self.config.ways else {}
        asking = _Asking(model, seen, said)
        answers: list[dict[str, Any]] = [{} for _ in rows]
        for way in dict.fromkeys([SOFT, *self.config.ways]):
            samples, places = [], []
            for place, row in enumerate(own):
                for sample in WAYS[way](asking, row):
                    samples.append(sample)
                    places.append(place)
            for start in range(0, len(samples), len(rows)):
                part = samples[start : start + len(rows)]
                for place, answer in zip(places[start:], model.generate(part, **self.config.generation), strict=False):
                    answers[place].setdefault(way, []).append(answer.text)
        lines: list[Line] = [{"answers": given} for given in answers]
        for line, row in zip(lines, own, strict=True):
            if said:
                line["own_captions"] = [said[key_of(media)] for media in row.asked.media]
        return lines

    def _captions(
        self, model: XBlip, rows: Sequence[CrossRow], seen: Mapping[tuple, Features]
    ) -> dict[tuple[str, str], str]:
        """The model's own caption of each input; each file is captioned once."""
        wanted = list({key_of(media): media for row in rows for media in row.asked.media}.values())
        new = [media for media in wanted if key_of(media) not in self._seen.captions]
        options = {**self.config.generation, **self.config.caption}
        for start in range(0, len(new), len(rows)):
            part = new[start : start + len(rows)]
            samples = [Sample(self._orders[media.modality], [media.with_source(seen[key_of(media)])]) for media in part]
            for media, answer in zip(part, model.generate(samples, **options), strict=True):
                self._seen.captions[key_of(media)] = answer.text
        return {key_of(media): self._seen.captions[key_of(media)] for media in wanted}

    def score(self, lines: Sequence[Line]) -> dict[str, Figure]:
        return figures_of(lines)

    def report(self, place: Path, lines: Sequence[Line], measured: Mapping[str, Measured]) -> None:
        crossmodal_page.write(place, lines, seed=self.seed)


def key_of(media: Media) -> tuple[str, str]:
    """What tells a file from others."""
    return media.modality, str(media.source)


def _extra(row: CrossRow, places: Mapping[str, int]) -> dict[str, Any]:
    names = sorted((media.modality for media in row.asked.media), key=places.get)
    told = {
        "kind": row.kind,
        "group": " + ".join(name.replace("_", " ") for name in names),
        "chance": row.chance,
        "part": row.part,
        "parts": row.parts,
        "swapped_truth": row.swapped.truths if row.swapped else None,
        "replaced_truth": row.replaced.truths if row.replaced else None,
    }
    return {key: value for key, value in told.items() if value not in (None, "", [])}


class _Seen:
    """Features of files, so that each is encoded once as long as there is room; and what the model says they show."""

    def __init__(self, most_bytes: int):
        self.most_bytes, self.captions = most_bytes, {}
        self._kept: OrderedDict[tuple, Features] = OrderedDict()

    def look(self, model: XBlip, media: Sequence[Media]) -> dict[tuple, Features]:
        """Returns the features of these files, by `key_of`.

        Raises:
          MediaError: a file cannot be read.
        """
        found = {key_of(item): self._kept.get(key_of(item)) for item in media}
        new: dict[str, dict[tuple, Any]] = {}
        for item in media:
            if found[key_of(item)] is None:
                new.setdefault(item.modality, {})[key_of(item)] = item.source
        for modality, sources in new.items():
            features = model.branches[modality].encode(list(sources.values())).split()
            found.update(zip(sources, features, strict=True))
        self._kept.update(found)
        for key in found:
            self._kept.move_to_end(key)
        held = sum(map(_bytes, self._kept.values()))
        while held > self.most_bytes and self._kept:
            held -= _bytes(self._kept.popitem(last=False)[1])
        return found


def _bytes(features: Features) -> int:
    return features.values.nbytes + features.mask.nbytes


@dataclass(frozen=True)
class _Asking:
    """What a batch is asked with.

    Attributes:
      model: that answers.
      seen: features of files.
      said: the model's own captions of them.
    """

    model: XBlip
    seen: Mapping[tuple, Features]
    said: Mapping[tuple, str]

    def files(self, media: Sequence[Media]) -> Parts:
        return [item.with_source(self.seen[key_of(item)]) for item in media]

    def words(self, media: Sequence[Media], texts: Sequence[str] | None) -> Parts | None:
        """Texts in the places of inputs, after the cues that these have; None without texts."""
        if texts is None:
            return None
        router = self.model.router
        cues = router.cues if router.config.cues else {}
        return [
            f"{cues.get(item.modality, '')}{text}{router.config.separator}"
            for item, text in zip(media, texts, strict=True)
        ]


def _once(form: Form | None, parts: Parts | None) -> list[Sample]:
    return [] if form is None or parts is None else [Sample(form.instruction, parts)]


Way = Callable[[_Asking, CrossRow], list[Sample]]

WAYS: dict[str, Way] = {
    SOFT: lambda asking, row: _once(row.asked, asking.files(row.asked.media)),
    "true descriptions": lambda asking, row: _once(row.asked, asking.words(row.asked.media, row.descriptions)),
    "people's captions": lambda asking, row: _once(row.asked, asking.words(row.asked.media, row.captions)),
    "own captions": lambda asking, row: _once(
        row.asked, asking.words(row.asked.media, [asking.said[key_of(media)] for media in row.asked.media])
    ),
    "one input alone": lambda asking, row: (
        [Sample(row.asked.instruction, asking.files([media])) for media in row.asked.media]
        if len(row.asked.media) > 1
        else []
    ),
    "question alone": lambda asking, row: _once(row.asked, []),
    "order swapped": lambda asking, row: _once(row.swapped, row.swapped and asking.files(row.swapped.media)),
    "inputs replaced": lambda asking, row: _once(row.replaced, row.replaced and asking.files(row.replaced.media)),
}
"""The ways that a question is asked in, each with the samples that ask a row so: none if the row lacks what it takes."""


@hookspecs.hookimpl
def register_tasks(register) -> None:
    register(CrossmodalTask)
