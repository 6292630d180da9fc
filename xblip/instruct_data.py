"""`xblip augment`: instructions and answers made of captions, as X-InstructBLIP did, each checked before it is kept.

Of a caption an answer is taken and a question asked to it; who reads the caption must answer alike (round trip). Beside
these, questions that are answered by yes and by no equally often, and questions which of two inputs has something (DisCRn's
form), answered right in both orders. Every step is logged with what fell out of it, so that a share has its reasons.
"""

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

import xblip
from xblip import config as configs
from xblip import markdown, plugins
from xblip.caption_rows import PutAside, placed, read_captions
from xblip.errors import ConfigError
from xblip.frozen import fingerprint_of_files, weight_files
from xblip.instruct_pairs import Pair, called_in, check_pairs, draw_pairs
from xblip.instruct_steps import NO_QUESTION, NOT_HELD, NOT_REWRITTEN, TELLING, AugmentConfig, Work
from xblip.rule_writer import RuleWriter
from xblip.runs import Lines, Run, open_run, read_lines
from xblip.train_config import sources_of
from xblip.train_data import digest
from xblip.writer import check_prompts

QUESTIONS, YES_NO, PAIRS, DISCRN = "questions.jsonl", "yes_no.jsonl", "pairs.jsonl", "discrn.json"
KEPT, TABLE = "kept.json", "AUGMENT.md"
ASIDE = "put_aside.jsonl"
CAPTIONS, COMPARISONS = "captions", "comparisons"
"""Logs, with all that was written and replied."""


def load_augment_config(path: str | Path, overrides: Sequence[str] = ()) -> AugmentConfig:
    """Reads a config; paths in it start at the working directory."""
    return configs.build(AugmentConfig, configs.load_yaml(path, overrides), where="config")


def augment(config: AugmentConfig) -> dict[str, Any]:
    """Makes what is missing, and writes manifests, logs and the table into the output folder.

    Started by torchrun or accelerate launch, its processes divide the captions. Started again, it goes on.

    Returns:
      What `kept.json` holds: the steps with how much each kept, and why captions fell out.

    Raises:
      ConfigError, InputError: a setting, a prompt, a rule or the data are wrong, or the folder holds another run.
      BundleError: an LLM cannot be loaded, or nothing can be written.
    """
    rules = _check(config)
    modalities = {name: plugins.get("modality", name) for name in plugins.names("modality")}
    items, aside = read_captions(
        config.data, modalities, max_characters=config.max_characters, min_words=config.min_words
    )
    folder = Path(config.output_dir).expanduser()
    for item in items:
        placed(item.media.source, folder)
    cues = {name: modality.cue for name, modality in modalities.items()}
    pairs = draw_pairs(items, config.pairs, seed=config.seed) if config.pairs else []
    with open_run(folder, facts=_facts(config), command="xblip augment", use_cpu=config.use_cpu) as run:
        work = Work(config, items, cues, rules, run.device)
        lines = run.lines(CAPTIONS)
        _fill(lines, items, work.ask, config.batch_size)
        lines.finish(lambda written: [written[item.id] for item in items])
        asked = read_lines(lines.path)
        for line in asked:
            if "rewritten" in line:
                work.told[line["id"]] = work.told[line["id"]]._replace(caption=line["rewritten"])
        compared: list[dict[str, Any]] = []
        if pairs:
            lines = run.lines(COMPARISONS)
            _fill(lines, pairs, work.compare, config.batch_size)
            lines.finish(lambda written: [written[pair.id] for pair in pairs])
            compared = read_lines(lines.path)
        return run.together(lambda: _write(run, work, asked, aside, pairs, compared))


def _check(config: AugmentConfig) -> RuleWriter | None:
    configs.at_least(config, batch_size=1, max_characters=1, min_words=1, seed=0)
    if (config.writer.llm is None) == (config.writer.rules is None):
        raise ConfigError("writer must be one of both: `llm`, asked by prompts, or `rules`, a YAML of them.")
    if config.writer.llm is None and config.reader is None:
        raise ConfigError(
            "Rules would agree with themselves: name the LLM that checks what they have written as `reader`."
        )
    for llm in (config.writer.llm, config.reader):
        if llm:
            check_prompts(llm.prompts)
    if config.pairs:
        check_pairs(config.pairs)
    return RuleWriter.read(config.writer.rules, seed=config.seed) if config.writer.rules else None


def _facts(config: AugmentConfig) -> dict[str, Any]:
    """What a run that goes on must share."""
    facts = configs.plain(config)
    for name in ("output_dir", "batch_size", "use_cpu"):
        facts.pop(name)
    files = [*(source.path for source in sources_of(config.data, "data")), *filter(None, [config.writer.rules])]
    facts["contents"] = {path: digest(path) for path in files}
    llms = {"writer": config.writer.llm, "reader": config.reader}
    facts["weights"] = {
        name: fingerprint_of_files(weight_files(Path(llm.source)))
        for name, llm in llms.items()
        if llm and Path(llm.source).is_dir()
    }
    return facts


def _fill(lines: Lines, items: Sequence[Any], work: Callable[[Sequence[Any]], Iterable[dict]], batch_size: int) -> None:
    """Does this process' part of what no run before has done."""
    mine = lines.run.mine([item for item in items if item.id not in lines.held])
    show = lines.run.is_main and sys.stderr.isatty()
    with tqdm(total=len(mine), desc=lines.path.stem, disable=not show) as bar:
        for start in range(0, len(mine), batch_size):
            batch = mine[start : start + batch_size]
            with torch.inference_mode():
                lines.add(work(batch))
            bar.update(len(batch))


def _write(
    run: Run,
    work: Work,
    asked: Sequence[dict[str, Any]],
    aside: Sequence[PutAside],
    pairs: Sequence[Pair],
    compared: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """Writes manifests of what is kept, what was put aside, and the table."""
    items = {item.id: item for item in work.items}
    sources = {name: placed(item.media.source, run.folder) for name, item in items.items()}

    def row(line: Mapping[str, Any], question: str, answer: str) -> dict[str, Any]:
        return {line["modality"]: sources[line["id"]], "question": question, "answer": answer}

    kept = [line for line in asked if "fault" not in line]
    checks = [line for line in asked if line.get("check", {}).get("kept")]
    written = {
        QUESTIONS: [row(line, line["question"], line["answer"]) for line in kept],
        YES_NO: [row(line, line["check"][answer], answer) for line in checks for answer in ("yes", "no")],
    }
    right = [(pair, line) for pair, line in zip(pairs, compared, strict=True) if "fault" not in line]
    if pairs:
        items_of = [_in_both_orders(pair, line, work, sources) for pair, line in right]
        written[PAIRS] = [manifest for orders in items_of for manifest, _ in orders]
        by_turns = [orders[place % 2][1] for place, orders in enumerate(items_of)]
        run.write(DISCRN, json.dumps(by_turns, indent=1, ensure_ascii=False) + "\n")
    written[ASIDE] = [one._asdict() for one in aside]
    for name, rows in written.items():
        run.write(name, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in rows))
    told = _told(asked, aside, checks, compared, right)
    run.write(KEPT, json.dumps({"xblip": xblip.__version__, **told}, indent=2) + "\n")
    logs = [f"{name}.jsonl" for name in ([CAPTIONS, COMPARISONS] if pairs else [CAPTIONS])]
    run.write(TABLE, _page(told, work.config, [*written, *([DISCRN] if pairs else []), *logs]))
    return told


def _in_both_orders(
    pair: Pair, line: Mapping[str, Any], work: Work, sources: Mapping[str, Any]
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """A pair's rows for training and in DisCRn's form, in either order, media and labels in the same."""
    found = []
    for label, order in enumerate(((pair.wanted, pair.other), (pair.other, pair.wanted))):
        told = [work.told[one.id] for one in order]
        media = [[one.media.modality, sources[one.id]] for one in order]
        answer = called_in(told, work.config.pairs)[label]
        properties = line["properties"] if label == 0 else line["properties"][::-1]
        row = {"media": media, "question": line["question"], "answer": answer}
        item = {
            "sample_ids": [one.id for one in order],
            "label": label,
            "question": line["question"],
            "properties": properties,
            "captions": [one.caption for one in told],
            "modalities": [name for name, _ in media],
            "sources": [source for _, source in media],
        }
        found.append((row, item))
    return found


def _told(
    asked: Sequence[dict[str, Any]],
    aside: Sequence[PutAside],
    checks: Sequence[dict[str, Any]],
    compared: Sequence[dict[str, Any]],
    right: Sequence[Any],
) -> dict[str, Any]:
    """How much each step kept, and why the rest fell out."""
    faults = Counter(line.get("fault") for line in asked)
    answered = len(asked) - faults[NOT_REWRITTEN] - faults[NOT_HELD]
    asking = answered - faults[NO_QUESTION] - faults[TELLING]
    steps = [
        ("captions in the data", len(asked) + len(aside), len(asked) + len(aside)),
        ("fit to work with", len(asked), len(asked) + len(aside)),
        ("with an answer that the caption holds", answered, len(asked)),
        ("with a question that does not tell it", asking, answered),
        ("answered alike in the round trip", faults[None], asking),
    ]
    tried = sum("check" in line for line in asked)
    steps += [("yes and no asked of one caption", tried, len(asked)), ("both answered so", len(checks), tried)]
    if compared:
        found = sum(bool(line["question"]) for line in compared)
        steps += [
            ("pairs that a question tells apart", found, len(compared)),
            ("answered right in both orders", len(right), found),
        ]
    lost = Counter(one.reason for one in aside) + Counter(
        line["fault"] for line in [*asked, *compared] if "fault" in line
    )
    return {
        "steps": [
            {"step": name, "kept": kept, "of": of, "share": kept / of if of else None} for name, kept, of in steps
        ],
        "fell out": dict(lost.most_common()),
    }


def as_table(told: Mapping[str, Any]) -> list[list[str]]:
    """Returns the steps as a table, its head first."""
    rows = [
        [step["step"], str(step["kept"]), str(step["of"]), f"{step['share']:.1%}" if step["of"] else "–"]
        for step in told["steps"]
    ]
    return [["step", "kept", "of", "share"], *rows]


def _page(told: Mapping[str, Any], config: AugmentConfig, files: Sequence[str]) -> str:
    writer = config.writer.llm.source if config.writer.llm else f"rules of {config.writer.rules}"
    reader = config.reader.source if config.reader else "the same"
    fell = "".join(f"- {reason}: {count}\n" for reason, count in told["fell out"].items()) or "- nothing\n"
    return (
        f"# Instructions made of captions\n\nWritten by {writer}, answered in the round trip by {reader}.\n\n"
        f"{markdown.table(as_table(told))}\n## What fell out\n\n{fell}\n"
        f"Manifests and logs: {', '.join(f'[{name}]({name})' for name in files)}. xblip {xblip.__version__}.\n"
    )
