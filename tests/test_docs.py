"""The guide's page for plugin authors and the examples do what they say: their code is run as written."""

import contextlib
import dataclasses
import json
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
import urllib.request
from pathlib import Path
from typing import NamedTuple

import pytest
import typer
import yaml
from fresh import fresh_shell
from test_scaffold import lines_of_code

from xblip import cli, plugins
from xblip import config as configs
from xblip.serve_config import ServeConfig

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^(?:`([^`\n]+)`\n)?```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
LONGEST_EXAMPLE = 40


class Block(NamedTuple):
    """A block of code: the file whose content it is ("" if it is to be run), its language, its text."""

    file: str
    language: str
    text: str


def blocks(document: str) -> list[Block]:
    """The blocks of code of a document, in order."""
    return [Block(*found) for found in BLOCK.findall((ROOT / document).read_text(encoding="utf-8"))]


def numerals_is_there() -> bool:
    return "numerals" in plugins.installed() and Path(plugins.get("model", "numerals"), "config.yaml").is_file()


needs_numerals = pytest.mark.skipif(not numerals_is_there(), reason="the bundle `numerals` is not installed")


@pytest.mark.slow
@needs_numerals
def test_the_readme_runs_as_written(tmp_path):
    shell = fresh_shell(tmp_path)
    for folder in ("configs", "examples", "plugins"):
        (shell.folder / folder).symlink_to(ROOT / folder)
    first, *others = blocks("README.md")
    assert set(re.findall(r"^make \w+", first.text, re.MULTILINE)) == {"make demo", "make test"}, "what CI runs"
    script = "".join(block.text for block in others if block.language == "sh")
    for block in others:
        if block.language == "python":
            script += f"python - <<'END_OF_BLOCK'\n{block.text}END_OF_BLOCK\n"
    printed = shell.succeed(script).splitlines()
    print("\n".join(printed))
    assert printed[0] == "the image" and printed[-1] == "thirteen"


def run_as_written(document: str, folder: Path) -> list[str]:
    """Writes the files of a document and runs its other blocks; returns what each of these printed."""
    shell = fresh_shell(folder)
    printed = []
    for block in blocks(document):
        if not block.file and block.language == "yaml":
            continue  # shown, not run
        if block.file:
            (shell.folder / block.file).write_text(block.text)
            continue
        command = (
            "python - <<'END_OF_BLOCK'\n" + block.text + "END_OF_BLOCK" if block.language == "python" else block.text
        )
        printed.append(shell.succeed(command))
        print(printed[-1])
    return printed


@pytest.mark.slow
@needs_numerals
def test_train_runs_as_written(tmp_path):
    *_, asked, by_command, _, found, _ = run_as_written("docs/train.md", tmp_path)
    folder = tmp_path / "work"
    truth = dict(line.split(",") for line in (folder / "held-out.csv").read_text().splitlines())
    assert (asked.strip(), by_command.strip()) == (truth["held-out-000.png"], truth["held-out-001.png"])
    accuracy = json.loads((folder / "runs/pictures/metrics.json").read_text())["eval_accuracy"]
    assert accuracy > 0.8, f"the page's branch describes {accuracy} of the held-out pictures"
    nearest = re.search(r"pictures/(held-out-\d+\.png)", found)[1]
    assert truth[nearest] == "a red seven", found


@pytest.mark.slow
@needs_numerals
def test_explain_runs_as_written(tmp_path):
    _, asked, explained = run_as_written("docs/explain.md", tmp_path)
    answer, *table, wrote = asked.splitlines()
    shown = [
        line.strip() for line in (ROOT / "docs" / "explain.md").read_text().splitlines() if line.startswith("    ")
    ]
    start = shown.index(answer)
    assert [line.strip() for line in table] == shown[
        start + 1 : start + 1 + len(table)
    ] and wrote == "wrote page/index.html"
    assert "owes most to" in explained and "attention: 3 4 16 6 25" in explained
    for page in ("page", "larger"):
        assert (tmp_path / "work" / page / "index.html").is_file()


@pytest.mark.slow
@needs_numerals
def test_write_a_modality_runs_as_written(tmp_path):
    printed = run_as_written("docs/write-a-modality.md", tmp_path)
    right = int(re.search(r"(\d+) of 100 sums are right", "".join(printed))[1])
    assert right >= 50, f"a fifth modality trained apart gets {right} of 100 sums with the image"
    assert printed[-1].strip() in ("the image", "the point cloud"), printed[-1]


@pytest.mark.slow
@needs_numerals
def test_evaluate_runs_as_written(tmp_path):
    *_, first, two, compared, _, across, steady = run_as_written("docs/evaluate.md", tmp_path)
    assert re.search(r"questions +normalised +100\.0 +76\.8 to 100\.0", first) and "| pictures | top-1 |" in first
    assert two.rstrip().endswith("the same")
    assert (
        re.search(r"questions +exact +100\.0 +57\.1 .* 14$", compared, re.MULTILINE)
        and "model.router.cues was True" in compared
    )
    assert "two inputs: soft prompts" in across and "two inputs: alike in both orders" in across
    assert re.search(r"right in both: [01]\.\d+ \(.*\), 14 questions", steady)


@pytest.mark.slow
@needs_numerals
def test_ask_runs_as_written(tmp_path):
    _, context, chat, batch, engine, embeds = run_as_written("docs/ask.md", tmp_path)
    assert context.startswith("thirteen\nsix\nthe video\n") and "misses=2" in context
    assert chat == "six\nthe image\n"
    first, second, third = batch.splitlines()
    assert (first, third) == ("Answer: six", "Answer: four") and second.startswith("MediaError: Cannot read")
    assert engine.splitlines()[:3] == ["six stop", "four stop", "seven stop"] and "Finished(answer=" in engine
    assert embeds.startswith("torch.Size([") and embeds.endswith(" torch.float32\n")


@pytest.mark.slow
@needs_numerals
def test_serve_runs_as_written(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    install, code, page = blocks("docs/serve.md")
    *_, command = install.text.strip().splitlines()
    assert page.text.strip().endswith(f"{command} --ui") and command == "xblip serve numerals"
    log = (tmp_path / "log").open("w")
    with subprocess.Popen(
        [sys.executable, "-m", "xblip.cli", *command.split()[1:], "--ui", "--port", port], stdout=log, stderr=log
    ) as server:
        try:
            wait_until_up(f"http://127.0.0.1:{port}/ready", server)
            told = subprocess.run(
                [sys.executable, "-c", code.text.replace(":8000", f":{port}")],
                capture_output=True,
                text=True,
                timeout=120,
            )
            assert told.stdout == "the video\nthe video\n", told.stderr
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/") as found:
                assert found.url.endswith("/ui/") and found.status == 200
            server.terminate()
            assert server.wait(60) in (0, -signal.SIGTERM), "it drains and ends"
        finally:
            server.kill()
    said = (tmp_path / "log").read_text().splitlines()
    lines = [json.loads(line) for line in said if line.startswith("{")]
    assert f"The page: http://127.0.0.1:{port}/" in said
    assert [line["status"] for line in lines] == [200, 200]


def section(document: str, heading: str) -> str:
    """The text below a heading of a document, up to the next one of its level."""
    return (ROOT / document).read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def test_the_reference_has_every_command():
    rows = re.findall(r"^\| `xblip (\w+)", section("docs/reference.md", "Command line"), re.MULTILINE)
    assert sorted(rows) == sorted(typer.main.get_command(cli.app).commands)


def test_the_reference_has_every_setting_of_a_server_with_its_default():
    told = {}
    for names, defaults in re.findall(
        r"^\| (`.+?`) \| (`.+?`) \|", section("docs/reference.md", "Serving"), re.MULTILINE
    ):
        told |= dict(zip(re.findall("`(.+?)`", names), re.findall("`(.+?)`", defaults), strict=True))
    defaults = dataclasses.asdict(ServeConfig())
    for group in ("engine", "ray"):
        defaults |= {f"{group}.{name}": value for name, value in defaults.pop(group).items()}
    assert {name: yaml.safe_load(value) for name, value in told.items()} == defaults


def test_the_server_s_settings_on_its_page_are_some(tmp_path):
    [shown] = re.findall(r"^Such a `serve.yaml` is\n\n(.+?)\n\n", (ROOT / "docs/serve.md").read_text(), re.M | re.S)
    (tmp_path / "serve.yaml").write_text(textwrap.dedent(shown))
    settings = configs.build(ServeConfig, configs.load_yaml(tmp_path / "serve.yaml"), where="serve")
    settings.check()
    assert settings.limits == {"video.max_seconds": 60, "max_pixels": 10_000_000} and settings.engine.max_rows == 64


def wait_until_up(url, server):
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        assert server.poll() is None, "the server ended"
        time.sleep(0.2)
    raise AssertionError("the server did not come up in five minutes")


@needs_numerals
@pytest.mark.slow
def test_augment_runs_as_written(tmp_path):
    *_, table = run_as_written("docs/augment.md", tmp_path)
    assert "| answered alike in the round trip | 3 | 3 | 100.0% |" in table and "- row that cannot be read: 1" in table


def test_the_page_s_cleaning_has_the_schema(tmp_path):
    from xblip.capfilt import load_capfilt_config

    [*_, block] = [block for block in blocks("docs/augment.md") if block.language == "yaml"]
    (tmp_path / "capfilt.yaml").write_text(block.text)
    assert load_capfilt_config(tmp_path / "capfilt.yaml").filter == "runs/align"


def test_the_page_has_blocks_of_every_kind():
    found = blocks("docs/write-a-modality.md")
    text = (ROOT / "docs" / "write-a-modality.md").read_text(encoding="utf-8")
    assert text.count("```") == 2 * len(found), "a block is written so that the test does not see it"
    assert {block.language for block in found} == {"sh", "python", "yaml"}
    assert all(block.file for block in found if block.language == "yaml")


def test_the_modality_takes_sixty_lines_at_most():
    [module] = [block for block in blocks("docs/write-a-modality.md") if block.file.endswith("xblip_depth.py")]
    assert lines_of_code(module.text) <= 60


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_as_written(example, tmp_path):
    if "numerals" in example.read_text() and not numerals_is_there():
        pytest.skip("the bundle `numerals` is not installed")
    run = subprocess.run(
        [sys.executable, example], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip()


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_and_says_how_it_is_run(example):
    assert lines_of_code(example.read_text()) < LONGEST_EXAMPLE
    assert f"Run: python examples/{example.name}" in example.read_text()
