"""Measured differences, shown as one table at the end of a run of `pytest -m parity`."""

import pytest
from families import build
from rich.console import Console
from rich.table import Table

from xblip.convert import convert

COLUMNS = ("features", "q-former", "soft prompt", "logits", "greedy", "beam 5", "sampled", "round trip", "ITC", "ITM")
MEASURED: dict[str, dict[str, object]] = {}


@pytest.fixture
def measure():
    """A function that notes what was measured of a family under a column's name, and gives it back."""

    def note(family: str, column: str, value):
        assert column in COLUMNS
        MEASURED.setdefault(family, {})[column] = value
        return value

    return note


@pytest.fixture(scope="session")
def bundle(tmp_path_factory):
    """A bundle of an InstructBLIP, which lies beside it in `theirs`; tests must not change them."""
    root = tmp_path_factory.mktemp("bundle")
    build("instructblip-llama", root / "theirs")
    convert(root / "theirs", root / "ours")
    return root / "ours"


def pytest_collection_modifyitems(items):
    for item in items:
        if "parity" in item.path.parts:
            item.add_marker(pytest.mark.parity)


def pytest_terminal_summary(terminalreporter):
    if not MEASURED:
        return
    table = Table(title="Largest difference from transformers, float32; equal texts")
    for column in ("family", *COLUMNS):
        table.add_column(column)
    for family, row in sorted(MEASURED.items()):
        table.add_row(family, *(_shown(row.get(column)) for column in COLUMNS))
    console = Console(width=140)
    with console.capture() as capture:
        console.print(table)
    terminalreporter.write_line(capture.get())


def _shown(value) -> str:
    if value is None:
        return "–"
    return ("equal" if value else "DIFFERENT") if isinstance(value, bool) else f"{value:.1e}"
