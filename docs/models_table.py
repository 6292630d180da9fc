"""Writes the tables of docs/models.md: what `xblip doctor` says of every config in configs/model, beside published counts.

python docs/models_table.py
"""

import re
from collections.abc import Mapping
from pathlib import Path

from xblip.doctor import examine
from xblip.dryrun import Part, Report
from xblip.errors import in_units

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "docs" / "models.md"
MARKS = "<!-- tables: python docs/models_table.py -->", "<!-- end of tables -->"

CODE, PAPER, HUB = "original code", "paper, rounded", "hub, rounded"
EVA = "transformers' class has a norm that is not read here (2,816) and zeros for the bias of keys (54,912)"
PUBLISHED = (
    ("blip2-opt-2.7b", "image bridge", "107M", PAPER, ""),
    ("blip2-opt-2.7b", "all", "3.74B", HUB, ""),
    ("blip2-flan-t5-xl", "image bridge", "107M", PAPER, ""),
    ("instructblip-vicuna-7b", "image bridge", "188M", PAPER, ""),
    ("xinstructblip-vicuna-7b", "image encoder", "985,894,528", CODE, EVA),
    ("xinstructblip-vicuna-7b", "image bridge", "188,837,376", CODE, ""),
    ("xinstructblip-vicuna-7b", "video bridge", "188,837,376", CODE, ""),
    ("xinstructblip-vicuna-7b", "audio bridge", "182,937,856", CODE, ""),
    ("xinstructblip-vicuna-7b", "point_cloud bridge", "180,578,048", CODE, ""),
    (
        "xinstructblip-vicuna-7b",
        "point_cloud encoder",
        "21,858,816",
        CODE,
        "ours counts ULIP's projection (393,216) too",
    ),
    ("xinstructblip-vicuna-13b", "image bridge", "189,624,832", CODE, ""),
    ("xinstructblip-vicuna-13b", "video bridge", "189,624,832", CODE, ""),
    ("xinstructblip-vicuna-13b", "audio bridge", "183,725,312", CODE, ""),
    ("xinstructblip-vicuna-13b", "point_cloud bridge", "181,365,504", CODE, ""),
)
"""Config, part, published count, where it is from, and why ours differs."""


def reports() -> dict[str, Report]:
    """Asks the doctor about every model config, by its name."""
    paths = sorted((ROOT / "configs" / "model").glob("*.yaml"))
    return {path.stem: examine(path) for path in paths}


def tables(found: Mapping[str, Report]) -> str:
    """The text between the marks."""
    overview = [
        _row("config", "encoders", "bridges", "LLM", "frozen", "trained", "prompt", "ask", "train"),
        _row(*["---"] * 4, *["---:"] * 5),
    ]
    overview += [_overview(name, report) for name, report in found.items()]
    counts = [
        _row("config", "part", "ours", "published", "source", "why they differ"),
        _row("---", "---", "---:", "---:", "---", "---"),
    ]
    for config, name, published, source, why in PUBLISHED:
        parts = [part for part in found[config].parts if name in ("all", part.name)]
        ours = sum(part.frozen + part.trained for part in parts)
        counts.append(_row(f"`{config}`", name, f"{ours:,}", published, source, why))
    return "\n".join([*overview, "", *counts])


def _overview(name: str, report: Report) -> str:
    *branches, llm = report.parts
    encoders = [part for part in branches if part.name.endswith(" encoder")]
    bridges = [part for part in branches if part.name.endswith(" bridge")]
    frozen, trained = (
        sum(counts) for counts in zip(*((part.frozen, part.trained) for part in report.parts), strict=True)
    )
    training = max(sum(way.training_bytes.values()) for way in report.ways.values())
    asking = sum(report.asking_bytes.values())
    return _row(
        f"`{name}`",
        *(_networks(parts) for parts in (encoders, bridges)),
        _network(llm),
        *(f"{count:,}" for count in (frozen, trained)),
        f"{'≈ ' if report.is_estimate else ''}{report.prompt_positions}",
        *map(in_units, (asking, training)),
    )


def _networks(parts: list[Part]) -> str:
    """Networks with the modalities that have them."""
    owners: dict[str, list[str]] = {}
    for part in parts:
        owners.setdefault(_network(part), []).append(part.name.split()[0])
    if len(owners) == 1:
        return next(iter(owners))
    return ", ".join(f"{label} ({', '.join(names)})" for label, names in owners.items())


def _network(part: Part) -> str:
    return re.sub(r"(Model|Transformer|For\w+)$", "", part.network)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Rewrites docs/models.md in place."""
    text = GUIDE.read_text(encoding="utf-8")
    before, rest = text.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    GUIDE.write_text(f"{before}{MARKS[0]}\n{tables(reports())}\n{MARKS[1]}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
