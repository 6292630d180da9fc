"""The doctor: the environment, its tables, and the command."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy
import pytest
import torch
from far import far, pictures
from kit import PLUGIN
from rich.console import Console

from xblip import cli, doctor
from xblip.doctor import environment, environment_table, examine, report_tables

pytestmark = pytest.mark.filterwarnings("ignore::xblip.errors.UnknownWordsWarning")


class TestEnvironment:
    @pytest.mark.slow
    def test_versions_and_what_modalities_need(self):
        checks = {(check.group, check.name): check for check in environment()}
        assert checks["xblip", "torch"].version.startswith(torch.__version__.split("+")[0])
        for needed in (("image", "Pillow"), ("video", "FFmpeg, by PyAV"), ("audio", "torchaudio")):
            assert checks[needed].version and not checks[needed].error
        assert checks["point_cloud", "open3d, with libusb"].version

    def test_what_does_not_load_is_told_with_its_reason(self, site):
        site.install("thermal", PLUGIN.format(name="thermal") + NEEDS)
        site.install("broken_one", "import nowhere_to_be_found\n")
        found = {(check.group, check.name): check for check in environment()}
        assert found["thermal", "camera"].error == "libcamera.so.1: cannot open shared object file"
        assert found["thermal", "lens"].version == "3.2"
        (broken,) = [check for check in found.values() if check.group == "broken_one"]
        assert "No module named 'nowhere_to_be_found'" in broken.error

    def test_a_diagnosis_that_fails_is_told(self, site):
        site.install("thermal", PLUGIN.format(name="thermal") + NEEDS.replace("return", "raise OSError('gone') or"))
        (check,) = [check for check in environment() if check.group == "thermal" and check.error]
        assert (check.name, check.error) == ("diagnose", "OSError: gone")

    @pytest.mark.slow
    def test_a_torch_for_cuda_without_a_device_is_a_fault(self, monkeypatch):
        def no_driver():
            raise RuntimeError("Found no NVIDIA driver on your system. Please install one from http://...")

        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.cuda, "init", no_driver)
        (check,) = [check for check in environment() if check.name == "accelerator"]
        assert check.error == (
            "torch is built for CUDA 13.0, but finds no device: Found no NVIDIA driver on your system."
        )

    @pytest.mark.slow
    def test_it_starts_where_torch_does_not(self, tmp_path):
        (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')")
        path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
        run = subprocess.run(
            [sys.executable, "-m", "xblip.cli", "doctor", "--json"],
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stderr
        checks = {check["name"]: check for check in json.loads(run.stdout)["environment"]}
        assert checks["torch"]["error"] == "libcudart.so.13: cannot open shared object file"
        assert checks["numpy"]["version"] and checks["xblip-image 0.1.0"]["error"]

    def test_a_torch_for_the_cpu_is_none(self, monkeypatch):
        monkeypatch.setattr(torch.version, "cuda", None)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        assert doctor.accelerators() == "none: this torch is built for the CPU alone"


NEEDS = """

def camera():
    raise OSError("libcamera.so.1: cannot open shared object file")


def diagnose(cls):
    return {"camera": camera, "lens": lambda: "3.2"}


Toy.diagnose = classmethod(diagnose)
"""


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.slow
def test_tables_keep_to_the_width_of_the_terminal(write, width, capsys):
    report = examine(write(**pictures(image=far(), video=far())))
    console = Console(width=width, highlight=False)
    for shown in (environment_table(environment()), *report_tables(report)):
        console.print(shown)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    for part in ("that of image", "pixel_values 1×3×32×32", "missing: far/vit (image encoder, video encoder)"):
        assert part in text
    assert "    hf download far/vit" in lines


class TestCommand:
    @pytest.fixture
    def run(self, monkeypatch, capsys):
        def run(*arguments: str) -> tuple[int, str, str]:
            monkeypatch.setattr("sys.argv", ["xblip", "doctor", *arguments])
            with pytest.raises(SystemExit) as ended:
                cli.main()
            return ended.value.code or 0, *capsys.readouterr()

        return run

    @pytest.mark.slow
    def test_without_a_config_it_tells_of_the_environment(self, run):
        status, out, _ = run()
        assert status == 0 and "Environment" in out and "torchaudio" in out and "Parts" not in out

    @pytest.mark.slow
    def test_json_is_for_scripts(self, run, write):
        status, out, _ = run(str(write(**pictures())), "--json", "--batch-size", "2", "--dtype", "float16")
        found = json.loads(out)
        assert (
            status == 0
            and {"group": "xblip", "name": "numpy", "version": numpy.__version__, "error": ""} in (found["environment"])
        )
        assert found["config"]["batch_size"] == 2 and found["config"]["parts"][0]["dtype"] == "float16"

    @pytest.mark.slow
    def test_tables(self, run, write):
        status, out, _ = run(str(write(**pictures())), "branches.image.bridge.kind=linear")
        assert status == 0 and "linear" in out and "Memory at batch size 1" in out and "0 of 2 sources are here." in out

    @pytest.mark.slow
    def test_a_fault_is_one_line(self, run, write):
        status, out, err = run(str(write(**pictures("far/unknown"))))
        assert status == 2 and "Parts" not in out and len(err.splitlines()) == 1


def test_a_report_is_json(write):
    report = examine(write(**pictures()))
    assert json.loads(json.dumps(dataclasses.asdict(report)))["ways"]["image"]["features"] == [1, 5, 16]
