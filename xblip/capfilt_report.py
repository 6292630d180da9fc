"""What `xblip capfilt` leaves: rows of what is kept and dropped, and how much that is, in a table and a page."""

from collections.abc import Mapping, Sequence
from typing import Any

from xblip import markdown
from xblip.threshold import found

GIVEN, WRITTEN = "given", "written"
"""Whose a caption is: the data's, or the captioner's."""

Said = Sequence[Mapping[str, Any]]
"""The captions of one file, each with "caption", "whose" and "score"."""
Source = tuple[str, Any]
"""A file: its modality, and its place as a manifest names it."""


def kept_rows(sources: Sequence[Source], said: Sequence[Said], threshold: float) -> list[dict[str, Any]]:
    """Returns a manifest's row for each file with a caption that is kept; equal captions stand once."""
    rows = []
    for (modality, source), captions in zip(sources, said, strict=True):
        kept = list(dict.fromkeys(one["caption"] for one in captions if one["score"] >= threshold))
        if kept:
            rows.append({modality: source, **({"captions": kept} if len(kept) > 1 else {"caption": kept[0]})})
    return rows


def dropped_rows(sources: Sequence[Source], said: Sequence[Said], threshold: float) -> list[dict[str, Any]]:
    """Returns a row for each caption that is dropped, with its score."""
    return [
        {modality: source, **one}
        for (modality, source), captions in zip(sources, said, strict=True)
        for one in captions
        if one["score"] < threshold
    ]


def summarised(
    said: Sequence[Said], threshold: float, right: Sequence[set[str]] | None = None
) -> dict[str, dict[str, Any]]:
    """Returns counts of captions by whose they are, and where right ones are known, precision and recall."""
    told = {}
    for whose in (GIVEN, WRITTEN):
        scored = [
            (one["score"], right is not None and one["caption"] in right[place])
            for place, captions in enumerate(said)
            for one in captions
            if one["whose"] == whose
        ]
        if not scored:
            continue
        figures = found([score for score, _ in scored], [is_right for _, is_right in scored], threshold)._asdict()
        told[whose] = figures if right is not None else {name: figures[name] for name in ("scored", "kept")}
    return told


def as_table(told: Mapping[str, Any]) -> list[list[str]]:
    """Returns what became of captions as a table, its head first."""
    known = any("right" in counts for counts in told["captions"].values())
    table = [["captions", "judged", "kept", "share", *(["right", "precision", "recall", "area"] if known else [])]]
    for whose, counts in told["captions"].items():
        row = [whose, str(counts["scored"]), str(counts["kept"]), f"{counts['kept'] / counts['scored']:.1%}"]
        if known:
            row += [f"{counts['right'] / counts['scored']:.1%}"]
            row += [_share(counts[name]) for name in ("precision", "recall", "average_precision")]
        table.append(row)
    return table


def page(told: Mapping[str, Any], *, curves: str = "") -> str:
    """Returns the page of a cleaning; `curves` names its picture."""
    cut = told["held_out"]
    how = (
        f"It tells {cut['right']} held-out pairs that are right and {cut['wrong']} that are wrong (another file's caption) "
        f"apart best: {cut['right_kept']:.1%} of the right are kept, {cut['wrong_dropped']:.1%} of the wrong dropped."
        if cut
        else "The config says so."
    )
    known = any("right" in counts for counts in told["captions"].values())
    words = (
        "*right*: share of the captions that are known to be right; *precision*: of those kept; *recall*: share of the "
        "right ones that is kept; *area*: under precision over recall for all thresholds.\n\n"
        if known
        else ""
    )
    drawn = f"![precision over recall]({curves})\n\n" if curves else ""
    return (
        f"# Captions, judged\n\nA caption is kept from a match of {told['threshold']:.4f} on. {how}\n\n"
        f"{markdown.table(as_table(told))}\n{words}{drawn}"
        f"{told['files_kept']} of {told['files']} files have a caption left ([kept.jsonl](kept.jsonl); what fell out: "
        f"[dropped.jsonl](dropped.jsonl)); {told['broken']} files could not be read, {told['put_aside']} captions were "
        f"unfit to judge. All scores: [captions.jsonl](captions.jsonl). xblip {told['xblip']}.\n"
    )


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
