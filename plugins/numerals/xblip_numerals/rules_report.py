"""What `xblip augment` keeps of numerals' captions by these rules, and what the model answers to the pairs it made."""

import json
from pathlib import Path

from xblip.crossmodal_page import Section
from xblip.evaluate import RESULTS, Result, as_table
from xblip.instruct_data import KEPT
from xblip.instruct_data import as_table as steps_table
from xblip.intervals import Measured

STEPS = (
    "What each step keeps\nOf the training files' captions. Rules write, the numerals' LLM answers in the round "
    "trip. The rules ask for what captions hold, and the LLM knows every word of them: an LLM that writes loses more."
)
ASKED = (
    "Pairs of test files, in DisCRn's form\nWhich of two inputs of different kinds has something; each item in "
    "both orders, times 100. With the question alone the LLM has nothing to name."
)


def augment_sections(made: Path, asked: Path | None = None) -> list[Section]:
    """The tables as a section of another report.

    Args:
      made: output folder of `xblip augment`.
      asked: output folder of `xblip eval` with the pairs of test files; None if they were not asked.
    """
    tables = [(STEPS, steps_table(json.loads((made / KEPT).read_text())), "")]
    if asked:
        found = json.loads((asked / RESULTS).read_text())["tasks"]
        results = {
            name: Result(**{**own, "figures": {figure: Measured(**got) for figure, got in own["figures"].items()}})
            for name, own in found.items()
        }
        tables.append((ASKED, as_table(results), ""))
    return [("Questions made of captions", tables)]
