"""CapFilt on numerals: captions of which a known share is another file's, cleaned, and what training on them gains.

Filter and captioner learn from the noisy captions alone, as BLIP's do before a small clean set tunes them; what is held
out to find the threshold by is the validation split. Bridges then learn captions by the stage generate, with equal
settings and steps, and tell files of the test split.

    python -m xblip_numerals.capfilt --parts build/numerals

What is there is not run again; delete its folder to redo it.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xblip_numerals.build import FEATURES, check_built, config_of, places_of
from xblip_numerals.capfilt_report import MADE, write_report
from xblip_numerals.language import MODALITIES
from xblip_numerals.stages import run_stage

SHARES = (0.2, 0.4)
"""Of captions that are another file's."""
STEPS = {"align": 1500, "generate": 150}
"""The match (ITM) is learnt late: after 500 steps its AUC is .86, the contrast's .98."""
EVAL_ROWS = 400
BATCH = 64
MINUTES = {"align": 8.5, "generate": 0.7, "judge": 0.9}
"""What so many steps, and 1,000 files, take on one idle core."""


def write_noisy(clean: Path, out: Path, modality: str, *, share: float, seed: int) -> None:
    """Writes a manifest in which a share of the rows has the caption of another file, and a different one."""
    rows = [json.loads(line) for line in clean.read_text().splitlines()]
    rng = random.Random(f"{seed} noise {modality} {share}")
    captions = [row["caption"] for row in rows]
    for index in rng.sample(range(len(rows)), round(share * len(rows))):
        rows[index]["caption"] = rng.choice([caption for caption in captions if caption != captions[index]])
    out.parent.mkdir(parents=True, exist_ok=True)
    for row in rows:
        row[modality] = os.path.relpath(clean.parent / row[modality], out.parent)
    part = out.with_suffix(".partial")
    part.write_text("".join(json.dumps(row) + "\n" for row in rows))
    part.replace(out)


def without_written(folder: Path, out: Path, modality: str) -> None:
    """Writes the manifest of given captions that were kept, those that the captioner wrote left out."""
    results = json.loads((folder / "results.json").read_text())
    manifest = [json.loads(line) for line in (folder / "kept.jsonl").read_text().splitlines()]
    lines = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    passed = [[said for said in line["captions"] if said["score"] >= results["threshold"]] for line in lines]
    rows = []
    for row, kept in zip(manifest, [said for said in passed if said], strict=True):
        given = [said["caption"] for said in kept if said["whose"] == "given"]
        if given:
            rows.append({modality: row[modality], "caption": given[0]})
    part = out.with_suffix(".partial")
    part.write_text("".join(json.dumps(row) + "\n" for row in rows))
    part.replace(out)


def clean_captions(parts: Path, out: Path, modality: str, *, share: float, steps: Mapping[str, int], seed: int) -> None:
    """Trains filter and captioner on noisy captions, and cleans these; leaves manifests in `out`."""
    from xblip.capfilt import CapfiltConfig, CaptionerConfig, capfilt

    captions, noisy = parts / "captions", out / "noisy.jsonl"
    truth = captions / f"{modality}-train.jsonl"
    if not noisy.exists():
        write_noisy(truth, noisy, modality, share=share, seed=seed)
    for stage in ("align", "generate"):
        run_stage(parts, modality, stage, out / stage, dict(steps), seed=seed, given={"data.train": noisy})
    captioner = {
        "llm": {"source": str(parts / "llm"), "dtype": "float32"},
        "branches": [str(out / "generate")],
        "router": {"postfix": " answer:", "earlier_turns": False},
    }
    capfilt(
        CapfiltConfig(
            data=str(noisy),
            filter=str(out / "align"),
            output_dir=str(out / "cleaned"),
            captioner=CaptionerConfig(captioner, generation={"max_new_tokens": 48, "do_sample": False}),
            held_out=str(captions / f"{modality}-val.jsonl"),
            truth=str(truth),
            batch_size=BATCH,
            use_cpu=True,
        )
    )
    without_written(out / "cleaned", out / "cleaned" / "filtered.jsonl", modality)


def manifests(parts: Path, out: Path, modality: str) -> dict[str, Path]:
    """What bridges learn from, by the names of `capfilt_report.TRAINED`."""
    made = {name: out / manifest for name, manifest in MADE.items()}
    return {**made, "clean": parts / "captions" / f"{modality}-train.jsonl"}


def store_features(parts: Path, modality: str) -> None:
    """Completes the build's store by the files of the test split."""
    captions = parts / "captions"
    settings = places_of(parts, modality, "align") | {
        "data.train": captions / f"{modality}-train.jsonl",
        "data.eval": captions / f"{modality}-test.jsonl",
    }
    overrides = [f"{key}={value}" for key, value in settings.items()]
    command = [sys.executable, "-m", "xblip.cli", "precompute", str(config_of(modality, "align")), *overrides]
    subprocess.run([*command, "--to", str(settings["data.features"]), "--dtype", FEATURES], check=True)


def run(
    parts: Path, out: Path, modality: str, *, shares: Sequence[float], steps: Mapping[str, int], seeds: int
) -> None:
    """Runs one modality with all shares of wrong captions."""
    store_features(parts, modality)
    for share in shares:
        folder = out / modality / f"{share:g}"
        clean_captions(parts, folder, modality, share=share, steps=steps, seed=0)
        for name, manifest in manifests(parts, folder, modality).items():
            own = folder / name if name != "clean" else out / modality / name
            for seed in range(1, seeds + 1):  # the captioner has seed 0
                given: dict[str, Any] = {
                    "data.train": manifest,
                    "data.eval": parts / "captions" / f"{modality}-test.jsonl",
                    "data.eval_answers": EVAL_ROWS,
                }
                run_stage(parts, modality, "generate", own / str(seed), dict(steps), seed=seed, given=given)


def estimate(parts: Path, modalities: Sequence[str], shares: int, steps: Mapping[str, int], seeds: int) -> float:
    """Returns about how many minutes a whole run takes on one idle core."""
    align, generate = (MINUTES[stage] * steps[stage] / STEPS[stage] for stage in ("align", "generate"))
    total = 0.0
    for modality in modalities:
        files = len((parts / "captions" / f"{modality}-train.jsonl").read_text().splitlines())
        cleaning = align + generate + MINUTES["judge"] * files / 1000
        total += shares * (cleaning + 3 * seeds * generate) + seeds * generate
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", type=Path, default=Path("build/numerals"), help="what xblip_numerals.build made")
    parser.add_argument("--out", type=Path, help="where runs go; PARTS/capfilt unless given")
    parser.add_argument("--report", type=Path, help="Markdown to write; OUT/CAPFILT.md unless given")
    parser.add_argument("--modalities", nargs="+", choices=list(MODALITIES), default=["image"])
    parser.add_argument("--shares", type=float, nargs="+", default=list(SHARES), help="of wrong captions")
    parser.add_argument("--seeds", type=int, default=3, help="bridges of each kind")
    parser.add_argument("--steps", nargs="+", default=[], metavar="STAGE=COUNT", help=f"instead of {STEPS}")
    arguments = parser.parse_args()
    steps = STEPS | {stage: int(count) for stage, count in (entry.split("=") for entry in arguments.steps)}
    out = arguments.out or arguments.parts / "capfilt"
    for modality in arguments.modalities:
        check_built(places_of(arguments.parts, modality, "generate")["data.features"], arguments.parts / "llm")
    minutes = estimate(arguments.parts, arguments.modalities, len(arguments.shares), steps, arguments.seeds)
    print(f"about {minutes:.0f} minutes on one idle core, less what is there", flush=True)
    began = time.monotonic()
    for modality in arguments.modalities:
        run(arguments.parts, out, modality, shares=arguments.shares, steps=steps, seeds=arguments.seeds)
    report = arguments.report or out / "CAPFILT.md"
    write_report(out, report, arguments.modalities, arguments.shares, steps=steps, seeds=arguments.seeds)
    print(f"wrote {report} after {(time.monotonic() - began) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
