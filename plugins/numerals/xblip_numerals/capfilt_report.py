"""The page of `xblip_numerals.capfilt`: how well wrong captions are found, and what a cleaner set is worth."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from xblip_numerals.stages_report import RUN

TRAINED = {"noisy": "noisy", "filtered": "given captions kept", "capfilt": "given and written kept", "clean": "clean"}
INTRO = """# CapFilt on numerals

Made by `python -m xblip_numerals.capfilt`. A known share of the training captions is another file's. A retriever (stage
align, {align} steps) and a captioner (stage generate, {generate} steps) learn from these alone; `xblip capfilt` lets
the captioner write a caption of each file, and keeps those, of both, that the retriever's match says describe it. The
threshold tells held-out pairs of the validation split apart best. A caption is right if it equals the canonical one.

## What is kept
*right*: share that is right before; *precision*: of the kept; *recall*: share of the right that is kept; *area*: under
precision over recall; *held out*: shares of right pairs kept and of wrong ones dropped there.

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
    kept = "| modality | wrong | captions | judged | right | kept | precision | recall | area | held out |\n"
    kept += "| --- " * 3 + "| ---: " * 7 + "|\n"
    gain = "| modality | wrong | learnt from | files | right | loss |\n" + "| --- " * 3 + "| ---: " * 3 + "|\n"
    curves = ""
    for modality, by_share in found.items():
        for share, own in by_share.items():
            name = f"{modality} | {float(share):.0%}"
            held = own["cleaned"]["held_out"]
            for whose, counts in own["cleaned"]["captions"].items():
                right = counts["right"] / counts["scored"]
                figures = [_shown(counts[key]) for key in ("precision", "recall", "average_precision")]
                kept += (
                    f"| {name} | {whose} | {counts['scored']} | {right:.3f} | {counts['kept']} | "
                    f"{' | '.join(figures)} | {held['right_kept']:.3f}, {held['wrong_dropped']:.3f} |\n"
                )
            for learnt, label in TRAINED.items():
                part = own["trained"][learnt]
                right, loss = (_with_spread(part[key]) for key in ("accuracy", "loss"))
                gain += f"| {name} | {label} | {part['files']} | {right} | {loss} |\n"
            drawn = out / modality / share / "cleaned" / "curves.png"
            if drawn.exists():
                shutil.copyfile(drawn, pictures / f"{modality}-{share}.png")
                curves += f"![{modality}, {float(share):.0%} wrong](capfilt/{modality}-{share}.png) "
    page = INTRO.format(**steps) + kept + f"\n{curves}\n" + GAIN.format(seeds=seeds, **steps) + gain
    report.write_text(page)
    report.with_suffix(".json").write_text(
        json.dumps({"steps": dict(steps), "seeds": seeds, "found": found}, indent=1) + "\n"
    )


def read_share(folder: Path, share: str, seeds: int) -> dict[str, Any]:
    """Reads what came of one modality with one share of wrong captions."""
    cleaned = json.loads((folder / share / "cleaned" / "results.json").read_text())
    manifests = {
        "noisy": folder / share / "noisy.jsonl",
        "filtered": folder / share / "cleaned" / "filtered.jsonl",
        "capfilt": folder / share / "cleaned" / "kept.jsonl",
    }
    trained = {}
    for name in TRAINED:
        runs = folder / name if name == "clean" else folder / share / name
        metrics = [json.loads((runs / str(seed) / RUN).read_text())["metrics"] for seed in range(1, seeds + 1)]
        manifest = manifests.get(name, manifests["noisy"])
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
