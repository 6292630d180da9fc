"""The commands that train and what serves them, which `xblip.cli` puts beside its own.

Nothing heavy is imported before a command runs.
"""

from pathlib import Path
from typing import Annotated

import typer


def train(
    config: Annotated[Path, typer.Argument(help="A YAML such as configs/train/numerals-image.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.sub=value, e.g. training.max_steps=10.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
) -> None:
    """Train the bridge of one branch; encoder and LLM stay frozen."""
    from xblip.train import load_train_config
    from xblip.train import train as run

    settings = load_train_config(config, overrides or [])
    metrics = run(settings, resume=resume)
    shown = {name: value for name, value in metrics.items() if name.endswith(("loss", "accuracy"))}
    print(f"wrote {settings.training['output_dir']}", *(f"{name} {value:.4f}" for name, value in shown.items()))


COMMANDS = (train,)
