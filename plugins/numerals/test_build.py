"""The build in one command: all of its steps, with next to nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

import xblip

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_rehearsal_goes_through_every_step_and_a_second_one_finds_all_there(data, tmp_path):
    command = [sys.executable, "-m", "xblip_numerals.build", "--data", str(data), "--out", str(tmp_path), "--rehearsal"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    assert "report: done" in run.stdout
    for suffix in (".md", ".html", ".json"):
        assert (tmp_path / f"REPORT{suffix}").stat().st_size > 10_000
    assert set(xblip.load(tmp_path / "bundle").branches) == {"image", "video", "audio", "point_cloud"}
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    ran = [line for line in again.stdout.splitlines() if ": done" in line]
    assert {line.split("-")[0] for line in ran} == {"features"}, "stores do themselves what is missing"
