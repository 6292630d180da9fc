"""The retrieval task: how often a retriever's first texts for a medium, and first media for a text, are right ones.

Everything is compared with everything by ITC in each process, which is quick; the rows that ITM puts in order one by one
are what processes divide and what a resumed run does not ask again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xblip import config as configs
from xblip import hookspecs
from xblip.errors import ConfigError, InputError, MediaError
from xblip.eval_data import ManifestTask, read_rows
from xblip.eval_task import EvalRow, Line
from xblip.intervals import Figure
from xblip.retrieval import Gallery, Retriever
from xblip.sample import Media, Sample

PLACES = (1, 5, 10)
JUDGES = {"itc": "ITC", "itm": "ITM"}
WANTED = {"texts": "texts for media", "media": "media for texts"}


class RetrievalTask(ManifestTask):
    """Rows of one medium and its captions: all media stand against all captions; a medium's own are right."""

    name = "retrieval"

    @dataclass
    class Config(ManifestTask.Config):
        """Settings.

        Attributes:
          rerank: of how many of the nearest by ITC does ITM decide; 0 for ITC alone. Published figures are of 128.
        """

        rerank: int = 128

    def rows(self, modalities: Mapping[str, Any]) -> Sequence[EvalRow]:
        configs.at_least(self.config, rerank=0)
        media: dict[str, Media] = {}
        captions: dict[str, dict[str, None]] = {}
        origins: dict[str, str] = {}
        for _, row in read_rows(self.config.data, modalities):
            given = row.sample.all_media
            if len(given) != 1 or len(row.sample.media) > 1:
                raise InputError(f"{row.origin}: it has {len(given)} inputs: retrieval is of one, and its captions.")
            key = repr(given[0])
            media[key] = given[0]
            origins.setdefault(key, row.origin)
            captions.setdefault(key, {}).update(dict.fromkeys(row.answers))
        self._media = list(media.values())
        self._texts = list(dict.fromkeys(text for told in captions.values() for text in told))
        if len(self._media) < 2 or len(self._texts) < 2:
            raise ConfigError("Retrieval chooses among several: the data have one medium or one caption alone.")
        self._gallery: Gallery | None = None
        places = {text: place for place, text in enumerate(self._texts)}
        own = [[places[text] for text in captions[key]] for key in media]
        rows = [
            EvalRow(
                f"medium {place}", Sample(None, [medium], origin=origins[key]), own[place], extra={"wants": "texts"}
            )
            for place, (key, medium) in enumerate(media.items())
        ]
        of_text: list[list[int]] = [[] for _ in self._texts]
        for place, told in enumerate(own):
            for text in told:
                of_text[text].append(place)
        rows += [
            EvalRow(f"text {place}", Sample(text), of_text[place], extra={"wants": "media"})
            for place, text in enumerate(self._texts)
        ]
        return rows

    def predict(self, model: Retriever, rows: Sequence[EvalRow]) -> list[Line]:
        if not isinstance(model, Retriever):
            raise ConfigError(
                "Retrieval is a retriever's task: let model name the folder of a branch of the stage align."
            )
        gallery = self._compared(model)
        return [self._line(gallery, row) for row in rows]

    def _compared(self, model: Retriever) -> Gallery:
        if self._gallery is None:
            try:
                self._gallery = Gallery(model, [medium.source for medium in self._media], self._texts)
            except MediaError as error:
                raise ConfigError(f"All media are compared with all texts, so none may be broken: {error}") from error
        return self._gallery

    def _line(self, gallery: Gallery, row: EvalRow) -> Line:
        """The first `PLACES` by each judge."""
        of_texts, place = row.extra["wants"] == "texts", int(row.id.split()[1])
        rank = gallery.texts_for if of_texts else gallery.sources_for
        judges = {"itc": 0, **({"itm": self.config.rerank} if self.config.rerank else {})}
        return {
            judge: [found.index for found in rank([place], top_k=max(PLACES), rerank=rerank)[0]]
            for judge, rerank in judges.items()
        }

    def score(self, lines: Sequence[Line]) -> dict[str, Figure]:
        figures = {}
        for judge in reversed([judge for judge in JUDGES if judge in lines[0]]):
            for wants, called in WANTED.items():
                own = [line for line in lines if line["wants"] == wants]
                for places in PLACES:
                    right = [bool(set(line[judge][:places]) & set(line["truth"])) for line in own]
                    if own:
                        figures[f"{called}: recall@{places}, {JUDGES[judge]}"] = Figure.of(own, right)
        return figures


@hookspecs.hookimpl
def register_tasks(register) -> None:
    register(RetrievalTask)
