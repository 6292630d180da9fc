"""The page of `xblip_numerals.capfilt`: how well wrong captions are found, and what a cleaner set is worth."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from xblip import markdown
from xblip.crossmodal_page import Section
from xblip_numerals.stages_report import RUN

TRAINED = {"noisy": "noisy", "filtered": "given captions kept", "capfilt": "given and written kept", "clean": "clean"}
MADE = {"noisy": "noisy.jsonl", "filtered": "cleaned/filtered.jsonl", "capfilt": "cleaned/kept.jsonl"}
"""Manifests that a run makes, of what bridges learn from."""
INTRO = """# CapFilt on numerals

Made by `python -m xblip_numerals.capfilt`. A known share of the training captions is another file's. A retriever (stage
align, {align} steps) and a captioner (stage generate, {generate} steps) learn from these alone; `xblip capfilt` lets
the captioner write a caption of each file, and keeps those, of both, that the retriever's match says describe it. The
threshold tells held-out pairs of the validation split apart best. A caption is right if it equals the canonical one.

## What is kept
*right*: share that is right before; *precision*: of the kept; *recall*: share of the right that is kept; *area*: under
precision over recall; *held out*: shares of pairs there.

"""
GAIN = """
## What training gains
A bridge from nothing learns captions (stage generate, {generate} steps) and tells files of the test split: mean over
{seeds} seeds (± standard deviation). *Right* is the share whose greedy caption is the canonical one, *loss* that of the
right caption, a token.

"""


def write_report(
    out: Path, report: Path, modalities: Sequence[str], shares: Sequence[float], *, steps: Mapping[str, int], seeds: int
) -> None:
    """Writes the page, its figures as JSON, and beside it the curves of each cleaning."""
    found = {
        modality: {f"{share:g}": read_share(out / modality, f"{share:g}", seeds) for share in shares}
        for modality in modalities
    }
    report.parent.mkdir(parents=True, exist_ok=True)
    pictures = report.parent / "capfilt"
    pictures.mkdir(exist_ok=True)
    curves = ""
    for modality, by_share in found.items():
        for share in by_share:
            drawn = out / modality / share / "cleaned" / "curves.png"
            if drawn.exists():
                shutil.copyfile(drawn, pictures / f"{modality}-{share}.png")
                curves += f"![{modality}, {float(share):.0%} wrong](capfilt/{modality}-{share}.png) "
    page = INTRO.format(**steps) + markdown.table(kept_table(found)) + f"\n{curves}\n"
    report.write_text(page + GAIN.format(seeds=seeds, **steps) + markdown.table(gain_table(found)))
    report.with_suffix(".json").write_text(
        json.dumps({"steps": dict(steps), "seeds": seeds, "found": found}, indent=1) + "\n"
    )


def kept_table(found: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """A row for the given and the written captions of each cleaning."""
    columns = (
        "captions",
        "judged",
        "right",
        "kept",
        "precision",
        "recall",
        "area",
        "held out: right kept, wrong dropped",
    )
    table = [["modality", "wrong", *columns]]
    for modality, by_share in found.items():
        for share, own in by_share.items():
            held = own["cleaned"]["held_out"]
            for whose, counts in own["cleaned"]["captions"].items():
                figures = [_shown(counts[key]) for key in ("precision", "recall", "average_precision")]
                right, kept = f"{counts['right'] / counts['scored']:.3f}", str(counts["kept"])
                told = f"{held['right_kept']:.3f}, {held['wrong_dropped']:.3f}"
                table.append(
                    [modality, f"{float(share):.0%}", whose, str(counts["scored"]), right, kept, *figures, told]
                )
    return table


def gain_table(found: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """A row for each set of captions that bridges learnt from."""
    table = [["modality", "wrong", "learnt from", "files", "right", "loss"]]
    for modality, by_share in found.items():
        for share, own in by_share.items():
            for learnt, label in TRAINED.items():
                part = own["trained"][learnt]
                told = [_with_spread(part[key]) for key in ("accuracy", "loss")]
                table.append([modality, f"{float(share):.0%}", label, str(part["files"]), *told])
    return table


def capfilt_sections(figures: Path) -> list[Section]:
    """The tables as a section of another report, from the page's figures."""
    told = json.loads(figures.read_text())
    steps = told["steps"]
    kept = (
        f"What is kept\nA retriever ({steps['align']} steps) judges captions of which a known share is another "
        "file's. Right: the share that is, before; precision: of the kept; recall: the share of the right that "
        "is kept; area: under precision over recall; held out: shares of pairs there."
    )
    gain = (
        f"What training gains\n{steps['generate']} steps of generate on each, asked on test files; the mean over "
        f"{told['seeds']} seeds. Right: greedy captions that are the canonical one."
    )
    return [
        ("CapFilt", [(kept, kept_table(told["found"]), ""), (gain, gain_table(told["found"]), "")]),
    ]


def read_share(folder: Path, share: str, seeds: int) -> dict[str, Any]:
    """Reads what came of one modality with one share of wrong captions."""
    cleaned = json.loads((folder / share / "cleaned" / "results.json").read_text())
    trained = {}
    for name in TRAINED:
        runs = folder / name if name == "clean" else folder / share / name
        metrics = [json.loads((runs / str(seed) / RUN).read_text())["metrics"] for seed in range(1, seeds + 1)]
        manifest = folder / share / MADE.get(name, MADE["noisy"])
        trained[name] = {
            "files": len(manifest.read_text().splitlines()),
            "accuracy": [found["eval_accuracy"] for found in metrics],
            "loss": [found["eval_loss"] for found in metrics],
        }
    return {"cleaned": cleaned, "trained": trained}


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _with_spread(values: Sequence[float]) -> str:
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")
