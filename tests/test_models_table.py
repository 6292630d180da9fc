"""docs/models.md: its tables are what the doctor says, of every config, in little time."""

import importlib.util
import time
from pathlib import Path

import pytest

from xblip.doctor import examine

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs" / "model").glob("*.yaml"))


@pytest.fixture(scope="module")
def table():
    spec = importlib.util.spec_from_file_location("models_table", ROOT / "docs" / "models_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lines() -> list[str]:
    return (ROOT / "docs" / "models.md").read_text(encoding="utf-8").splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_override_that_a_config_names_can_be_tried(path):
    (line,) = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("# Override:")]
    overrides = [word.strip(",;") for word in line.split() if "=" in word]
    assert overrides and examine(path, overrides).ways


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_model_config_says_what_it_needs_and_how_it_differs(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    for word in ("# Needs:", "# Differs:"):
        assert any(line.startswith(word) for line in lines), f"{path.name} lacks {word}"


def test_every_config_is_told_of(table):
    text = "\n".join(lines())
    assert not [path.stem for path in CONFIGS if f"`{path.stem}`" not in text]


@pytest.mark.slow
def test_the_row_of_a_small_config_is_what_the_doctor_says(table):
    path = ROOT / "configs" / "model" / "numerals.yaml"
    assert table._overview("numerals", examine(path)) in lines()


@pytest.mark.slow
def test_every_config_passes_quickly_and_the_tables_are_up_to_date(table):
    found = {}
    for path in CONFIGS:
        started = time.monotonic()
        found[path.stem] = examine(path)
        assert time.monotonic() - started < 30, path.stem
        assert found[path.stem].ways and found[path.stem].logits
    for line in table.tables(found).splitlines():
        assert line in lines(), "run python docs/models_table.py"
    for config, name, published, source, why in table.PUBLISHED:
        if source == table.CODE and not why:
            (part,) = [part for part in found[config].parts if part.name == name]
            assert f"{part.frozen + part.trained:,}" == published
