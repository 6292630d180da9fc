"""What a bridge is made of and how it is trained, compared on questions across modalities.

A variant trains the bridges of all modalities anew: the shipped settings with half of the queries, but for what it is
about, and equal rows, batches and steps. All variants are then asked the questions of the report about test files, so
that differences are paired.

    python -m xblip_numerals.experiments --parts build/numerals --seeds 0 1 2

Two lanes run side by side with one thread each. What is there is not run again; delete its folder to redo it.
"""

import argparse
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from xblip.instruct_data import QUESTIONS, YES_NO
from xblip.tables import write_whole
from xblip_numerals.build import CONFIGS, Lanes, Step, check_built, config_of, places_of
from xblip_numerals.phrases import MODALITIES

STEPS, BATCH = 300, 32
ALIGN_STEPS = 300
DONE = "trained.json"
ASKED = "asked"
"""Name of the task, and of its files."""
NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Variant:
    """One way to make bridges.

    Attributes:
      title: for people.
      settings: of training, by the config's keys.
      bridge: the whole bridge, in the shipped one's place.
      rows: what to learn from, a key of `ROWS`.
      aligned: the stage align comes first.
      router: of the model that answers, beside how it was trained.
      weights: name of the variant whose bridges it asks; its own if "".
    """

    title: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    bridge: Mapping[str, Any] | None = None
    rows: str = "shipped"
    aligned: bool = False
    router: Mapping[str, Any] = field(default_factory=dict)
    weights: str = ""


def _queries(count: int, *, aware: bool) -> Variant:
    settings = {"branch.bridge.num_query_tokens": count, "branch.bridge.instruction_aware": str(aware).lower()}
    return Variant(
        f"{count} {'query' if count == 1 else 'queries'}, {'instruction-aware' if aware else 'static'}", settings
    )


QUERIES = 8
"""Of variants that are about something else."""
COUNTS = (8, 4, 2, 1)
BASE = f"aware-{QUERIES}"
VARIANTS = {
    **{f"aware-{count}": _queries(count, aware=True) for count in COUNTS},
    **{f"static-{count}": _queries(count, aware=False) for count in COUNTS},
    "linear": Variant("linear", bridge={"kind": "linear"}),
    "mlp": Variant("MLP", bridge={"kind": "mlp"}),
    "no-cues": Variant("without cues", {"router.cues": "false"}, router={"cues": False}),
    "cues-off": Variant("cues in training alone", router={"cues": False}, weights=BASE),
    "alone": Variant("one input, no text around it", rows="alone"),
    "augmented": Variant("questions of xblip augment", rows="augmented"),
    "aligned": Variant("stage align first", aligned=True),
}


def queries_of(variant: Variant) -> int | None:
    """How many queries its Q-Formers have; None if it has none of these."""
    return None if variant.bridge else int(variant.settings.get("branch.bridge.num_query_tokens", QUERIES))


def train_modality(
    parts: Path, out: Path, modality: str, name: str, *, seed: int, steps: int, align_steps: int = ALIGN_STEPS
) -> None:
    """Trains one bridge of a variant into its folder, from the start if that was interrupted.

    Args:
      parts: folder of the build.
      out: of the experiments.
      modality: whose bridge.
      name: of the variant.
      seed: of weights and batches.
      steps: of the stage instruct.
      align_steps: of the stage align, where it comes first.
    """
    variant, folder = VARIANTS[name], branch_of(out, name, modality, seed)
    if (folder / DONE).exists():
        return
    settings: dict[str, Any] = {}
    if variant.aligned:
        before = folder.with_name(f"{modality}-align")
        _train(parts, modality, "align", before, {}, seed=seed, steps=align_steps)
        settings["init.folder"] = before
    if variant.rows in ROWS:
        settings["data.train"] = ROWS[variant.rows](parts, modality)
    given = {**settings, **variant.settings}
    metrics = _train(parts, modality, "instruct", folder, given, seed=seed, steps=steps, bridge=variant.bridge)
    (folder / DONE).write_text(json.dumps({"steps": steps, "batch": BATCH, "seconds": metrics["train_runtime"]}) + "\n")


def _train(
    parts: Path,
    modality: str,
    stage: str,
    folder: Path,
    given: Mapping[str, Any],
    *,
    seed: int,
    steps: int,
    bridge: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """Trains into a folder, which is emptied first; a `bridge` stands in the place of the config's."""
    from xblip.train import train
    from xblip.train_config import load_train_config

    config = load_train_config(
        config_of(modality, stage), _overrides(parts, modality, stage, folder, steps, seed, given)
    )
    if bridge:
        config.branch.bridge = dict(bridge)
    shutil.rmtree(folder, ignore_errors=True)
    return train(config)


def _overrides(
    parts: Path, modality: str, stage: str, folder: Path, steps: int, seed: int, given: Mapping[str, Any]
) -> list[str]:
    settings = {
        **places_of(parts, modality, stage),
        "branch.bridge.num_query_tokens": QUERIES,
        "training.output_dir": folder,
        "training.seed": seed,
        "training.max_steps": steps,
        "training.per_device_train_batch_size": BATCH,
        "training.eval_strategy": '"no"',
        "training.save_strategy": '"no"',
        **given,
    }
    return [f"{key}={value}" for key, value in settings.items()]


def rows_alone(parts: Path, modality: str) -> Path:
    """Writes, beside a bridge's manifest, those of its rows whose file stands alone; returns where."""
    manifest = parts / "questions" / f"{modality}-train.jsonl"
    return _chosen([manifest], manifest.with_name(f"{manifest.stem}-alone.jsonl"), lambda row: len(row["media"]) == 1)


def rows_augmented(parts: Path, modality: str) -> Path:
    """Writes, beside what `xblip augment` made, its questions about one modality; returns where."""
    return _chosen(augmented_in(parts), parts / "augment" / f"{modality}-train.jsonl", lambda row: modality in row)


def augmented_in(parts: Path) -> list[Path]:
    """Where `xblip augment` leaves its questions."""
    return [parts / "augment" / name for name in (QUESTIONS, YES_NO)]


def _chosen(manifests: Sequence[Path], out: Path, wanted: Callable[[Mapping[str, Any]], bool]) -> Path:
    if not out.exists():
        lines = [line for manifest in manifests for line in manifest.read_text().splitlines(True)]
        kept = "".join(line for line in lines if wanted(json.loads(line)))
        write_whole(out, lambda file: file.write(kept.encode()))
    return out


ROWS = {"alone": rows_alone, "augmented": rows_augmented}
"""Manifests other than the shipped bridges'."""


def branch_of(out: Path, name: str, modality: str, seed: int) -> Path:
    """Where a variant's bridge lies."""
    return out / (VARIANTS[name].weights or name) / str(seed) / modality


def ask(parts: Path, out: Path, name: str, rows: Path, *, seed: int) -> Path:
    """Asks a variant's model the rows; returns the run's folder.

    Args:
      parts: folder of the build.
      out: of the experiments.
      name: of the variant.
      rows: of the cross-modal evaluation.
      seed: of its bridges.
    """
    from xblip.config import load_yaml
    from xblip.evaluate import EvalConfig, evaluate

    shipped = load_yaml(CONFIGS.parent / "model" / "numerals.yaml")
    model = {
        "llm": {"source": str(parts / "llm"), "dtype": "float32"},
        "branches": [str(branch_of(out, name, modality, seed)) for modality in MODALITIES],
        "router": {**shipped["router"], **VARIANTS[name].router},
        "generation": shipped["generation"],
    }
    folder = out / ASKED / f"{name}-{seed}"
    evaluate(
        EvalConfig(
            model=model,
            tasks={ASKED: {"kind": "crossmodal", "data": str(rows), "ways": ["soft prompts"]}},
            output_dir=str(folder),
            batch_size=64,
            use_cpu=True,
        )
    )
    return folder


def run_all(parts: Path, out: Path, rows: Path, *, names: Sequence[str], seeds: Sequence[int], steps: int) -> None:
    """Trains and asks all variants in two lanes, seed by seed, so that an interrupted run has whole seeds."""

    def lane(own: Sequence[str]) -> Iterator[Step]:
        for seed in seeds:
            for name in own:
                command = ["-m", "xblip_numerals.experiments", "--parts", str(parts), "--out", str(out)]
                command += ["--rows", str(rows), "--variant", name, "--seeds", str(seed), "--steps", str(steps)]
                yield Step(f"{name}-{seed}", command, out / ASKED / f"{name}-{seed}" / "results.json")

    trained = [name for name in names if not VARIANTS[name].weights]
    Lanes([list(lane(trained[::2])), list(lane(trained[1::2]))], logs=out / "logs").run()
    Lanes([list(lane([name for name in names if VARIANTS[name].weights]))], logs=out / "logs").run()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--parts", type=Path, default=Path("build/numerals"), help="folder that xblip_numerals.build made"
    )
    parser.add_argument("--out", type=Path, help="where runs go; PARTS/experiments unless given")
    parser.add_argument("--rows", type=Path, help="questions to ask; PARTS/report/rows.jsonl unless given")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--variant", choices=list(VARIANTS), help="run this one alone, here")
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), help="these variants")
    arguments = parser.parse_args()
    parts, out = arguments.parts, arguments.out or arguments.parts / "experiments"
    rows = arguments.rows or parts / "report" / "rows.jsonl"
    check_built(rows, parts / "llm")
    wanted = [arguments.variant] if arguments.variant else arguments.only
    if any(VARIANTS[name].rows == "augmented" for name in wanted):
        check_built(*augmented_in(parts), by="xblip augment configs/augment/numerals.yaml")
    if not arguments.variant:
        run_all(parts, out, rows, names=arguments.only, seeds=arguments.seeds, steps=arguments.steps)
        return
    for seed in arguments.seeds:
        if not VARIANTS[arguments.variant].weights:
            for modality in MODALITIES:
                train_modality(parts, out, modality, arguments.variant, seed=seed, steps=arguments.steps)
        ask(parts, out, arguments.variant, rows, seed=seed)


if __name__ == "__main__":
    main()
