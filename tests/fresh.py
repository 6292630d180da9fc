"""A fresh place for tests that do what a reader would do in a shell: a virtual environment of its own.

It sees what is installed here, so nothing is downloaded; what `pip install` puts into it, it keeps to itself.
"""

import os
import shlex
import subprocess
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

COMMANDS = {"pip": "pip", "pytest": "pytest", "torchrun": "torch.distributed.run", "xblip": "xblip.cli"}


@dataclass
class Shell:
    """Runs commands in `folder` with `environment`."""

    folder: Path
    environment: dict[str, str]

    def run(self, script: str, *, timeout_s: float = 300) -> subprocess.CompletedProcess:
        """Runs lines of shell, which end at the first that fails."""
        command = ["bash", "-euo", "pipefail", "-c", script]
        return subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def succeed(self, script: str, **options) -> str:
        """Runs lines of shell that must succeed; returns what they print."""
        result = self.run(script, **options)
        assert result.returncode == 0, f"{script}\nended with {result.returncode}\n{result.stdout}\n{result.stderr}"
        return result.stdout


def fresh_shell(root: Path) -> Shell:
    """Makes an empty working folder with a virtual environment beside it, both under `root`."""
    home, work = root / "venv", root / "work"
    work.mkdir()
    venv.create(home, symlinks=True)
    here = sysconfig.get_paths()["purelib"]
    site = next(home.glob("lib/python*/site-packages"))
    # `addsitedir` rather than the bare path: it follows the .pth files of editable installs too.
    (site / "here.pth").write_text(f"import site; site.addsitedir({here!r})\n")
    for command, module in COMMANDS.items():
        script = home / "bin" / command
        script.write_text(f'#!/bin/sh\nexec {shlex.quote(str(home / "bin" / "python"))} -m {module} "$@"\n')
        script.chmod(0o755)
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("XBLIP_", "PIP_", "PYTEST_"))
    }
    return Shell(
        work,
        {
            **inherited,
            "PATH": f"{home / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "PIP_NO_BUILD_ISOLATION": "0",  # pip reads its negated options the other way round: 0 means no isolation
            "PIP_NO_DEPS": "1",
            "PIP_NO_INDEX": "1",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "200",
        },
    )
