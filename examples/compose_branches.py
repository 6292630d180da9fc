"""Branches that were trained apart, put before one LLM: here two of four, saved as a bundle of their own.

Run: python examples/compose_branches.py
"""

import tempfile
from importlib.resources import files
from pathlib import Path

import xblip

demo = files("xblip_numerals") / "demo"
inputs = {"image": demo / "image" / "six.png", "audio": demo / "audio" / "four.wav"}
numerals = xblip.load("numerals")
folder = xblip.plugins.get("model", "numerals")

# Each branch knows the LLM it was trained for by its fingerprint, and refuses any other.
model = xblip.XBlip.compose(
    llm=numerals.llm,
    branches={name: folder / name for name in inputs},
    router=numerals.router.config,
)
print(model.ask("Which number is larger, the image or the audio?", **inputs))

with tempfile.TemporaryDirectory() as place:
    model.save_pretrained(place)
    size_mb = sum(file.stat().st_size for file in Path(place).rglob("*") if file.is_file()) / 1e6
    again = xblip.load(place)
    print(again.ask("Which number is larger, the image or the audio?", **inputs), f"({size_mb:.1f} MB)")
