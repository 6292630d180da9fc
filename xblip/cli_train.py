"""The commands that train, and those that serve or use what was trained, which `xblip.cli` puts beside its own.

Nothing heavy is imported before a command runs.
"""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer


def train(
    config: Annotated[Path, typer.Argument(help="A YAML such as configs/train/numerals-image.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.sub=value, e.g. training.max_steps=10.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
) -> None:
    """Train bridges; encoders and LLM stay frozen."""
    from xblip.resume import found_checkpoint
    from xblip.train import train as run
    from xblip.train_config import load_train_config

    settings = load_train_config(config, overrides or [])
    try:
        metrics = run(settings, resume=resume)
    except KeyboardInterrupt:
        output = settings.training["output_dir"]
        last = found_checkpoint(output)
        found = f"go on from {last} with --resume" if last else f"{output} holds no checkpoint yet"
        print(f"interrupted: {found}.", file=sys.stderr)
        raise
    shown = {name: value for name, value in metrics.items() if name.endswith(("loss", "accuracy", "recall_at_1"))}
    if int(os.environ.get("RANK", "0")) > 0:
        return
    print(f"wrote {settings.training['output_dir']}", *(f"{name} {value:.4f}" for name, value in shown.items()))


def precompute(
    config: Annotated[Path, typer.Argument(help="A training config: its branch, and the manifests of its data.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.sub=value, e.g. training.use_cpu=true.")] = None,
    to: Annotated[str, typer.Option(help="The store's folder; one that is there is completed.")] = ...,
    dtype: Annotated[
        str, typer.Option(help="float32, float16, bfloat16, or int8 with a scale for each token.")
    ] = "float16",
    engine: Annotated[
        str, typer.Option(help='"ray" for the actors of a Ray cluster; else the processes of this run.')
    ] = ("accelerate"),
    batch_segments: Annotated[
        int | None, typer.Option(help="Segments encoded at once; 64, or on a CPU one item.")
    ] = None,
    views: Annotated[
        int, typer.Option(help="Augmented views of each training file to store too, for data.augment.", min=0)
    ] = 0,
    max_skipped: Annotated[float, typer.Option(help="Share of the sources that may be broken.")] = 0.01,
    only: Annotated[
        str | None, typer.Option(help="The modality, where `also` names further ones; else that of `branch`.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare a store with its checksums and its encoder.")
    ] = False,
) -> None:
    """Store what a frozen encoder makes of a training config's files, so that training need not encode."""
    from xblip import config as configs
    from xblip import precompute as run
    from xblip.branch import build_modality
    from xblip.errors import ConfigError, in_units, suggest
    from xblip.train_config import load_train_config, open_manifests

    settings = load_train_config(config, overrides or [])
    branches = {branch.modality: branch for branch in settings.all_branches}
    if only and only not in branches:
        raise ConfigError(f'--only "{only}" is no modality of {config}.{suggest(only, branches)}')
    job = configs.build(
        run.Job,
        {
            "branch": branches[only] if only else settings.branch,
            "folder": to,
            "dtype": dtype,
            "views": views,
            "seed": settings.training.get("seed", 42),
            "batch_segments": batch_segments,
            "dataloader_num_workers": settings.training.get("dataloader_num_workers", 0),
            "use_cpu": settings.training.get("use_cpu", False),
        },
        where="training",
    )
    modalities = {name: build_modality(branch) for name, branch in branches.items()}
    learnt = open_manifests(settings.data.train, "data.train", modalities=modalities)
    manifests = learnt + open_manifests(settings.data.eval, "data.eval", modalities=modalities)
    if verify:
        print(f"{job.folder} is right: {run.verify(job, manifests, learnt=learnt, show=sys.stderr.isatty())}")
        return
    done = run.precompute(job, manifests, learnt=learnt, engine=engine, max_skipped=max_skipped)
    skipped = f", skipped {len(done.skipped)} (see {Path(job.folder, 'skipped.jsonl')})" if done.skipped else ""
    if int(os.environ.get("RANK", "0")) == 0:
        same = f"{done.num_held} were there or are the same"
        print(f"wrote {job.folder}: {done.num_written} items, {same}{skipped}; {in_units(done.nbytes)}")
