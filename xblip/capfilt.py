"""`xblip capfilt`: captions of files are written anew, and those kept that describe them (BLIP's CapFilt, any modality).

A captioner, a model with an LLM, writes a caption of each file; a filter, the retriever that the stage `align` trains,
judges it and those that the file came with by its match (ITM). The threshold comes from held-out pairs that are known
to be right, beside the same files with each other's captions, unless the config says one.
"""

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm

import xblip
from xblip import config as configs
from xblip.capfilt_report import GIVEN, WRITTEN, as_table, dropped_rows, kept_rows, page, summarised
from xblip.caption_rows import Captioned, on_one_line, placed, read_captions
from xblip.errors import ConfigError, InputError, MediaError
from xblip.eval_model import System, open_system
from xblip.modality import Features
from xblip.model import XBlip
from xblip.retrieval import Retriever
from xblip.runs import Lines, Run, open_run, read_lines
from xblip.sample import Media, Sample
from xblip.threshold import best_cut, draw_precision_recall
from xblip.train_config import sources_of
from xblip.train_data import digest

__all__ = ["CapfiltConfig", "CaptionerConfig", "as_table", "capfilt", "load_capfilt_config"]

KEPT, DROPPED, RESULTS, TABLE, CURVES = "kept.jsonl", "dropped.jsonl", "results.json", "CAPFILT.md", "curves.png"
DRAWS = 100
"""How often another caption is drawn for a wrong pair, when captions are alike."""


@dataclass
class CaptionerConfig:
    """Who writes captions.

    Attributes:
      model: a bundle's name, folder or hub id, or the keys of a bundle's config, as `model` of an evaluation.
      instruction: what it is asked; null for a branch of the stage generate, which was never asked anything.
      generation: generation options; BLIP draws its captions (do_sample: true, top_p: 0.9).
      llm: loading options of the LLM.
    """

    model: Any
    instruction: str | None = None
    generation: dict[str, Any] = field(default_factory=dict)
    llm: dict[str, Any] = field(default_factory=dict)


@dataclass
class CapfiltConfig:
    """A cleaning.

    Attributes:
      data: manifests of captions, as `data.train` of a training config names them.
      filter: folder or hub id of a retriever that the stage align trained.
      output_dir: where manifests, scores and the table go.
      captioner: who writes; null to judge the given captions alone.
      threshold: matches from it on are kept; null for the one that tells `held_out` pairs apart best.
      held_out: manifests of captions that are known to be right, and were not trained on.
      truth: manifests like `data`, row by row, with captions that are right, where they are known; for measuring alone.
      batch_size: files that are worked on at once.
      max_characters: longer captions are put aside.
      max_skipped: share of the files that may be broken.
      seed: of the wrong pairs, and of captions that are drawn.
      use_cpu: leave accelerators alone.
    """

    data: Any
    filter: str
    output_dir: str
    captioner: CaptionerConfig | None = None
    threshold: float | None = None
    held_out: Any = None
    truth: Any = None
    batch_size: int = 16
    max_characters: int = 1000
    max_skipped: float = 0.01
    seed: int = 42
    use_cpu: bool = False


class File(NamedTuple):
    """One file with the captions it came with.

    Attributes:
      id: of its row.
      media: the file, unread.
      captions: at least one.
      origin: file and line.
    """

    id: str
    media: Media
    captions: tuple[str, ...]
    origin: str


def load_capfilt_config(path: str | Path, overrides: Sequence[str] = ()) -> CapfiltConfig:
    """Reads a config; paths in it start at the working directory."""
    return configs.build(CapfiltConfig, configs.load_yaml(path, overrides), where="config")


def capfilt(config: CapfiltConfig) -> dict[str, Any]:
    """Judges what has not been judged yet, and writes manifests, scores and the table into the output folder.

    Started by torchrun or accelerate launch, its processes divide the files. Started again, it goes on.

    Returns:
      What `results.json` holds.

    Raises:
      ConfigError, InputError, PluginError: a setting or the data are wrong, or the folder holds another run.
      BundleError: a model is wrong, or nothing can be written.
      MediaError: more than `max_skipped` of the files cannot be read.
    """
    _check(config)
    judge = open_system(config.filter, {})
    if "retriever" not in judge.facts:
        raise ConfigError(f'filter: "{config.filter}" is a bundle: name the folder of a retriever (stage align).')
    [(name, modality)] = judge.modalities.items()
    writer = open_system(config.captioner.model, config.captioner.llm) if config.captioner else None
    if writer and name not in writer.modalities:
        raise ConfigError(f"captioner.model reads {', '.join(writer.modalities)}, but the filter judges {name}.")
    files, aside = _files(config.data, {name: modality}, "data", config)
    folder = Path(config.output_dir).expanduser()
    for file in files:
        placed(file.media.source, folder)
    truth = _truth(config, {name: modality}, files)
    pairs = _pairs(config, {name: modality}) if config.threshold is None else []
    facts = _facts(config, judge, writer)
    with open_run(folder, facts=facts, command="xblip capfilt", use_cpu=config.use_cpu) as run:
        work = _Work(config, judge, writer, run.device)
        known = _fill(run.lines("held_out"), pairs, work.match, config) if pairs else []
        lines = _fill(run.lines("captions"), files, work.caption_and_match, config)
        return run.together(lambda: _write(run, config, files, len(aside), truth, known, lines))


def _check(config: CapfiltConfig) -> None:
    configs.at_least(config, batch_size=1, max_characters=1, seed=0)
    configs.check_share("max_skipped", config.max_skipped, whole="the files")
    if config.threshold is None and config.held_out is None:
        raise ConfigError(
            "Nothing says from which match on a caption is kept: name `held_out` captions that are known to be right, or "
            "say a `threshold` from 0 to 1."
        )
    if config.threshold is not None:
        configs.check_share("threshold", config.threshold, whole="certainty")
        if config.held_out is not None:
            raise ConfigError("A threshold is given, so held_out would decide nothing: remove one of both.")


def _files(data: Any, modalities: dict[str, Any], where: str, config: CapfiltConfig) -> tuple[list[File], list[Any]]:
    items, aside = read_captions(data, modalities, where=where, max_characters=config.max_characters)
    rows: dict[str, list[Captioned]] = {}
    for item in items:
        rows.setdefault(item.row, []).append(item)
    files = [File(row, own[0].media, tuple(one.caption for one in own), own[0].origin) for row, own in rows.items()]
    return files, aside


def _truth(config: CapfiltConfig, modalities: dict[str, Any], files: Sequence[File]) -> dict[str, set[str]]:
    """Right captions by the file's id."""
    if config.truth is None:
        return {}
    known, _ = _files(config.truth, modalities, "truth", config)
    by_id, here = {file.id: file for file in known}, Path(config.output_dir)
    for file in files:
        if file.id not in by_id or placed(by_id[file.id].media.source, here) != placed(file.media.source, here):
            raise InputError(
                f"{file.origin}: the row of `truth` beside it is of another file: give the same rows in order."
            )
    return {file.id: set(by_id[file.id].captions) for file in files}


class Pair(NamedTuple):
    """A held-out file with a text that is right for it, or with one that is another file's."""

    id: str
    media: Media
    caption: str
    right: bool


def _pairs(config: CapfiltConfig, modalities: dict[str, Any]) -> list[Pair]:
    files, _ = _files(config.held_out, modalities, "held_out", config)
    rng = random.Random(f"{config.seed} held out")
    pairs = []
    for file in files:
        caption = rng.choice(file.captions)
        pairs.append(Pair(f"{file.id} right", file.media, caption, True))
        for _ in range(DRAWS):
            other = rng.choice(rng.choice(files).captions)
            if other not in file.captions:
                pairs.append(Pair(f"{file.id} wrong", file.media, other, False))
                break
    if all(pair.right for pair in pairs):
        raise InputError("held_out: all captions are the same, and none is wrong for a file: give files that differ.")
    return pairs


def _facts(config: CapfiltConfig, judge: System, writer: System | None) -> dict[str, Any]:
    """What a run that goes on must share: all that scores hang on."""
    facts = configs.plain(config)
    for name in ("output_dir", "batch_size", "use_cpu", "max_skipped", "filter"):
        facts.pop(name)
    facts["filter"] = judge.facts
    if writer:
        facts["captioner"]["model"] = writer.facts
    given = [config.data, config.held_out, config.truth]
    files = [source.path for part in given for source in sources_of(part, "data")]
    return facts | {"contents": {path: digest(path) for path in files}}


class _Work:
    """What models do with a batch; each is loaded when it is first asked."""

    def __init__(self, config: CapfiltConfig, judge: System, writer: System | None, device: torch.device):
        self.config, self.device = config, device
        self._systems = {"judge": judge, "writer": writer}
        self._loaded: dict[str, Any] = {}

    def _model(self, name: str) -> Any:
        if name not in self._loaded:
            self._loaded[name] = self._systems[name].load(self.device)
        return self._loaded[name]

    @property
    def judge(self) -> Retriever:
        return self._model("judge")

    @property
    def writer(self) -> XBlip:
        return self._model("writer")

    def match(self, pairs: Sequence[Pair]) -> list[dict[str, Any]]:
        """Judges held-out pairs."""
        scores = self.judge.match([pair.media.source for pair in pairs], [pair.caption for pair in pairs]).tolist()
        return [
            {"id": pair.id, "caption": pair.caption, "right": pair.right, "score": round(score, 6)}
            for pair, score in zip(pairs, scores, strict=True)
        ]

    def caption_and_match(self, files: Sequence[File]) -> list[dict[str, Any]]:
        """Writes a caption of each file, and judges it beside those that the file came with."""
        own = self.judge.branch.encode([file.media.source for file in files]).split()
        written = self._written(files, own) if self.config.captioner else [""] * len(files)
        lines: list[dict[str, Any]] = []
        for file, text in zip(files, written, strict=True):
            said = [{"caption": caption, "whose": GIVEN} for caption in file.captions]
            said += [{"caption": text, "whose": WRITTEN}] if text else []
            lines.append({"id": file.id, "origin": file.origin, "captions": said})
        judged = [(features, said) for features, line in zip(own, lines, strict=True) for said in line["captions"]]
        scores = self.judge.match([features for features, _ in judged], [said["caption"] for _, said in judged])
        for (_, said), score in zip(judged, scores.tolist(), strict=True):
            said["score"] = round(score, 6)
        return lines

    def _written(self, files: Sequence[File], own: Sequence[Features]) -> list[str]:
        """The captioner's captions; it takes the filter's features where both read alike, as BLIP's two do."""
        ask, name = self.config.captioner, files[0].media.modality
        branches = self.writer.branches[name], self.judge.branch
        kinds = [(branch.encoder.fingerprint, _reading(branch.modality.config)) for branch in branches]
        sources = own if kinds[0] == kinds[1] else [file.media.source for file in files]
        samples = [Sample(ask.instruction, [Media(name, source)]) for source in sources]
        torch.manual_seed(int.from_bytes(f"{self.config.seed} {files[0].id}".encode()) % 2**63)
        return [on_one_line(answer.text) for answer in self.writer.generate(samples, **ask.generation)]


def _reading(config: Any) -> dict[str, Any]:
    """A modality's settings but for where its encoder lies."""
    return {name: value for name, value in configs.plain(config).items() if name != "encoder"}


def _fill(lines: Lines, items: Sequence[Any], work: Any, config: CapfiltConfig) -> list[dict[str, Any]]:
    """Does this process' part of what no run before has done, and returns what all did, in order."""
    ids = [item.id for item in items]
    mine = lines.run.mine([item for item in items if "error" in lines.held.get(item.id, {"error": ""})])
    show = lines.run.is_main and sys.stderr.isatty()
    with tqdm(total=len(mine), desc=lines.path.stem, disable=not show) as bar:
        for start in range(0, len(mine), config.batch_size):
            batch = mine[start : start + config.batch_size]
            with torch.inference_mode():
                lines.add(_tried(work, batch))
            bar.update(len(batch))
    lines.finish(lambda written: [written[name] for name in ids])
    done = read_lines(lines.path)
    broken = [line for line in done if "error" in line]
    if len(broken) > config.max_skipped * len(items):
        raise MediaError(
            f"{len(broken)} of {len(items)} files cannot be read, more than max_skipped = {config.max_skipped:g} allows. "
            f"{lines.path} names them; the last one: {broken[-1]['error']} Mend them or remove the rows, or allow more."
        )
    return done


def _tried(work: Any, batch: Sequence[Any]) -> list[dict[str, Any]]:
    """A batch's lines; one with a broken file is tried file by file."""
    try:
        return work(batch)
    except MediaError as error:
        if len(batch) == 1:
            return [{"id": batch[0].id, "error": str(error)}]
        return [line for item in batch for line in _tried(work, [item])]


def _write(
    run: Run,
    config: CapfiltConfig,
    files: Sequence[File],
    aside: int,
    truth: dict[str, set[str]],
    known: Sequence[dict[str, Any]],
    lines: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """Cuts by the threshold, and writes what is kept, what is dropped, and how much."""
    cut = None
    if known:
        scores = {right: [line["score"] for line in known if line.get("right") is right] for right in (True, False)}
        if not all(scores.values()):
            raise InputError(
                "held_out: no pair could be read, right or wrong: there is nothing to find a threshold by."
            )
        cut = best_cut(scores[True], scores[False])
    threshold = cut.threshold if cut else config.threshold
    by_id = {line["id"]: line for line in lines if "error" not in line}
    read = [file for file in files if file.id in by_id]
    sources = [(file.media.modality, placed(file.media.source, run.folder)) for file in read]
    said = [by_id[file.id]["captions"] for file in read]
    right = [truth[file.id] for file in read] if truth else None
    written = {KEPT: kept_rows(sources, said, threshold), DROPPED: dropped_rows(sources, said, threshold)}
    for name, rows in written.items():
        run.write(name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    told = {
        "xblip": xblip.__version__,
        "threshold": threshold,
        "held_out": cut._asdict() if cut else None,
        "files": len(files),
        "put_aside": aside,
        "broken": len(files) - len(read),
        "files_kept": len(written[KEPT]),
        "captions": summarised(said, threshold, right),
    }
    curves = draw_precision_recall(
        {
            whose: [
                (one["score"], one["caption"] in own)
                for some, own in zip(said, right or (), strict=True)
                for one in some
                if one["whose"] == whose
            ]
            for whose in (GIVEN, WRITTEN)
        }
        if right
        else {},
        threshold,
        run.folder / CURVES,
    )
    run.write(RESULTS, json.dumps(told, indent=2) + "\n")
    run.write(TABLE, page(told, curves=CURVES if curves else ""))
    return told
