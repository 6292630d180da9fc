"""The report of `xblip_numerals.stages`: a table, and a plot for each modality."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from xblip_numerals.language import MODALITIES

RUN = "run.json"
RECALL = "recall.json"
WAYS = ("instruct alone", "instruct")
SHARE = 0.9
"""Of the accuracy that instruct alone ends with."""


def folders(folder: Path, seed: int) -> dict[str, Path]:
    """Where a modality's runs are, by stage; all seeds share the stages before instruct."""
    return {
        "align": folder / "align",
        "generate": folder / "generate",
        "instruct": folder / f"instruct-{seed}",
        "instruct alone": folder / f"alone-{seed}",
    }
