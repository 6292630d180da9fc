"""The command that finds texts for files, and files for texts.

Nothing heavy is imported before it runs.
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from xblip.errors import InputError, XBlipError


def retrieve(
    folder: Annotated[str, typer.Argument(help="Folder or hub id of a retriever, which the stage align trains.")],
    files: Annotated[list[str], typer.Argument(help="Files of the kind it reads.")],
    texts: Annotated[Path | None, typer.Option(help="File of texts, one a line: rank them for each file.")] = None,
    query: Annotated[list[str] | None, typer.Option(help="Rank the files for these words; may be repeated.")] = None,
    top_k: Annotated[int, typer.Option(help="Places that are shown.")] = 5,
    rerank: Annotated[
        int, typer.Option(help="Nearest ones that are judged pair by pair, more exactly; 0: none.")
    ] = 128,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False,
) -> None:
    """Find texts for files, or files for words. A file that cannot be read is told, and the exit status is then 1."""
    if bool(texts) == bool(query):
        raise InputError(
            "Say what to look for: either --texts FILE, to rank its lines for each file, or --query WORDS."
        )
    lines = _lines(texts) if texts else query
    from xblip.retrieval import Retriever

    retriever = Retriever.from_pretrained(folder)
    sources: dict[str, Any] = {}
    broken = 0
    for file in files:
        try:
            sources[file] = retriever.branch.read(file)
        except XBlipError as error:
            told = " ".join(str(error).split())
            print(f"error: {told if file in told else f'{file}: {told}'}", file=sys.stderr)
            broken += 1
    if not sources:
        raise InputError(f"None of {broken} files can be read.")
    rank = retriever.rank_texts if texts else retriever.rank_sources
    ranking = rank(list(sources.values()), lines, top_k=top_k, rerank=rerank)
    asked, others = (list(sources), lines) if texts else (lines, list(sources))
    _show_ranking(list(zip(asked, ranking, strict=True)), others, of_texts=bool(texts), as_json=as_json)
    if broken:
        raise typer.Exit(1)


def _lines(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as cause:
        raise InputError(f'Cannot read the texts in "{path}": {cause.strerror}.') from cause
    except UnicodeDecodeError as cause:
        raise InputError(
            f'Cannot read the texts in "{path}": it is no UTF-8. Save it as UTF-8, one text a line.'
        ) from cause
    if not any(lines):
        raise InputError(f'There are no texts in "{path}": expected one a line.')
    return [line for line in lines if line]


def _show_ranking(ranking: list[tuple[str, list]], others: list[str], *, of_texts: bool, as_json: bool) -> None:
    """Prints what was asked for, each with its places."""
    asked, found = ("file", "text") if of_texts else ("query", "file")
    if as_json:
        shown = [
            {asked: name, "found": [{found: others[place.index], **place._asdict()} for place in places]}
            for name, places in ranking
        ]
        print(json.dumps(shown, indent=2))
        return
    for name, places in ranking:
        print(name)
        for place in places:
            print(f"  {place.score:8.3f}  {others[place.index]}")
