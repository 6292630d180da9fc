"""The numerals model: small weights, and the world they were trained on."""

from pathlib import Path

import xblip

BUNDLE = Path(__file__).parent / "bundle"
EXAMPLES = Path(__file__).parent / "demo" / "questions.json"


@xblip.hookimpl
def register_models(register) -> None:
    """Offers the bundle `numerals`."""
    register("numerals", BUNDLE, examples=EXAMPLES)
