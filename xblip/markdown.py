"""Tables as Markdown, one way for all reports."""

from collections.abc import Sequence

NUMBERS = "-+<–"
"""What a cell of a column of numbers may begin with, beside a digit."""


def table(rows: Sequence[Sequence[object]]) -> str:
    """Returns rows, the head first, as a table; columns of numbers stand to the right."""
    head, *body = [[str(cell).replace("|", r"\|") for cell in row] for row in rows]
    marks = ["---:" if all(map(_is_number, column)) else "---" for column in zip(*body, strict=True)]
    return "".join(f"| {' | '.join(row)} |\n" for row in [head, marks or ["---"] * len(head), *body])


def _is_number(cell: str) -> bool:
    return not cell or cell[0].isdigit() or cell[0] in NUMBERS
