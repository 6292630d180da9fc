"""The pages of the cross-modal report: one of HTML with plots in it, one of Markdown, and the figures as JSON.

The HTML page is one file without scripts, so that it can be sent on as it is; all of it is made from the figures, and so
can be made again.
"""

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from xblip import charts, markdown
from xblip.crossmodal_score import BEFORE, BOTH_ORDERS, CHANCE, REPLACED, SHOWN, SOFT, SWAPPED, TRUE, Report, shown
from xblip.eval_task import Line
from xblip.runs import write_whole

Rows = list[list[str]]
Section = tuple[str, list[tuple[str, Rows, str]]]
"""A title, and tables: each with its heading, which a line break parts from a note, its rows, and a plot as SVG."""
"""A title, and tables under it: a caption, cells, and a plot beside them as SVG; the last two may be empty."""

MEANINGS = {
    TRUE: "all that is true of each input, as text in its place: what the LLM could reach at best",
    SOFT: "the files themselves, through their bridges, each read in the light of the question",
    "people's captions": "what a person would say of each input, as text in its place",
    "own captions": "what the model itself says of each input, as text in its place",
    "one input alone": "the question with one input, the others left out; the mean over which one",
    "question alone": "the question without any input",
    CHANCE: "the best answer that knows no input",
    "product of the parts": "how often what the answer hangs on is read right from each input by itself, multiplied, times "
    "the LLM's accuracy on true descriptions of the same questions",
    SWAPPED: "the inputs in another order, names in question and answer following: a fair model gives the same",
    BOTH_ORDERS: "right in both orders, or wrong in both",
    REPLACED: "other inputs of the same modalities, and what is right of these",
    BEFORE: "the answer that was right before inputs were replaced, where it is no more: an answer from the question",
}


def write(place: Path, lines: Sequence[Line], *, seed: int) -> None:
    """Writes the report of a run's lines to `place` with the endings .html, .md and .figures.json."""
    told = Report(lines, seed=seed).told()
    name = place.name.replace("_", " ")
    write_whole(place.with_suffix(".figures.json"), json.dumps(told, indent=1) + "\n")
    write_whole(place.with_suffix(".md"), as_markdown(told, name))
    write_whole(place.with_suffix(".html"), as_html(told, name))


def findings(told: Mapping[str, Any]) -> list[str]:
    """Says the figures that matter most in sentences, whichever way they fall."""
    said = []
    for size, found in told["sizes"].items():
        ways, text = found["ways"], ""
        text += f"**{size.capitalize()}**: soft prompts answer {shown(ways[SOFT])} % of {ways[SOFT]['n']} questions"
        if "ratio" in found:
            text += f", {shown(found['ratio'], scale=1, digits=2)} of the product of the parts"
        text += "."
        against = [way for way in ("people's captions", "own captions", "question alone") if way in ways]
        told_against = [
            f"{_signed(more)} points against {way}, {_p(more['p'])}"
            for way in against
            for more in [ways[way]["soft_prompts_more"]]
        ]
        text += f" That is {'; '.join(told_against)}." if told_against else ""
        if BOTH_ORDERS in ways:
            text += f" In both orders of inputs {shown(ways[BOTH_ORDERS])} % are answered alike."
        if REPLACED in ways:
            text += f" Where inputs are replaced, {shown(ways[REPLACED])} % of answers are right for the new ones."
        said.append(text)
    return said


def difference_cells(more: Mapping[str, Any]) -> list[str]:
    """Returns a difference in points, its interval and p for a table: "+1.2", "-0.3 to +2.6", "0.041"."""
    return [
        f"{100 * more['difference']:+.1f}",
        f"{100 * more['low']:+.1f} to {100 * more['high']:+.1f}",
        _shown_p(more["p"]),
    ]


def _signed(more: Mapping[str, Any]) -> str:
    difference, interval, _ = difference_cells(more)
    return f"{difference} ({interval})"


def _shown_p(p: float | None) -> str:
    return "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _p(p: float | None) -> str:
    text = _shown_p(p)
    return text if p is None else f"p {text}" if text.startswith("<") else f"p = {text}"


def ways_table(found: Mapping[str, Any]) -> Rows:
    """One row a way: its figure, its n, and what soft prompts have more."""
    table = [["asked with", "right, %", "95 %", "n", "soft prompts more", "95 %", "p"]]
    rows = {**found["ways"]}
    if "product" in found:
        rows = {name: got for way in SHOWN if way in rows for name, got in _with_product(way, found)} | rows
    for way, got in rows.items():
        interval = f"{100 * got['low']:.1f} to {100 * got['high']:.1f}"
        row = [way, f"{100 * got['value']:.1f}", interval, str(got["n"])]
        more = got.get("soft_prompts_more")
        if more and way != BEFORE:
            difference, interval, p = difference_cells(more)
            row += [difference, interval, p if way != CHANCE else ""]
        else:
            row += ["", "", ""]
        table.append(row)
    return table


def _with_product(way: str, found: Mapping[str, Any]) -> list[tuple[str, Any]]:
    own = [(way, found["ways"][way])]
    return [*own, ("product of the parts", found["product"])] if way == SOFT else own


def cuts_table(cuts: Mapping[str, Any], first: str) -> Rows:
    """One row a cut: every way's figure, and soft prompts' share of the product of the parts."""
    ways = [way for way in SHOWN if any(way in found["ways"] for found in cuts.values())]
    has_parts = any("product" in found for found in cuts.values())
    table = [[first, *ways, *(["product of the parts", "share of it"] if has_parts else []), "n"]]
    for name, found in cuts.items():
        row = [name.replace("_", " ")]
        for way in ways:
            got = found["ways"].get(way)
            row.append("–" if got is None else shown(got) if way == SOFT else f"{100 * got['value']:.1f}")
        if has_parts:
            row.append(shown(found["product"]) if "product" in found else "–")
            row.append(shown(found["ratio"], scale=1, digits=2) if "ratio" in found else "–")
        table.append([*row, str(found["rows"])])
    return table


def alone_table(alone: Mapping[str, Any]) -> Rows:
    modalities = list(dict.fromkeys(name for found in alone.values() for name in found))
    table = [["inputs", *(f"{name.replace('_', ' ')} alone" for name in modalities)]]
    for group, found in alone.items():
        table.append([group, *(shown(found[name]) if name in found else "–" for name in modalities)])
    return table


def parts_table(parts: Mapping[str, Any]) -> Rows:
    return [["part", "right, %", "n"], *([name, shown(got), str(got["n"])] for name, got in parts.items())]


def sections(told: Mapping[str, Any]) -> list[Section]:
    """The report's body."""
    body = []
    for size, found in told["sizes"].items():
        tables = [("", ways_table(found), charts.dots(_dots(found), chance=_chance(found)))]
        for key, first in (("groups", "inputs"), ("kinds", "question")):
            if len(found[key]) > 1 or key == "groups":
                cuts = {name.replace("_", " "): _dots(own, few=True) for name, own in found[key].items()}
                tables.append((f"By {first}", cuts_table(found[key], first), charts.grouped(cuts)))
        if size != "one input":
            cells = {group: {k.replace("_", " "): v for k, v in own.items()} for group, own in found["cells"].items()}
            if len(cells) > 1:
                tables.append(("Soft prompts by inputs and question", [], charts.heat(cells, SOFT)))
            if any(found["alone"].values()):
                tables.append(("Each input alone", alone_table(found["alone"]), ""))
        elif told["parts"]:
            tables.append(("The parts", parts_table(told["parts"]), ""))
        body.append((size.capitalize(), tables))
    return body


def _dots(found: Mapping[str, Any], *, few: bool = False) -> dict[str, Any]:
    rows = {name: got for way in SHOWN if way in found["ways"] for name, got in _with_product_if(way, found)}
    rows.pop(CHANCE, None)
    if few:
        kept = (TRUE, SOFT, "product of the parts", "people's captions", "question alone")
        rows = {name: rows[name] for name in kept if name in rows}
        if CHANCE in found["ways"]:
            rows[CHANCE] = found["ways"][CHANCE]
    return rows


def _with_product_if(way: str, found: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return _with_product(way, found) if "product" in found else [(way, found["ways"][way])]


def _chance(found: Mapping[str, Any]) -> float | None:
    return found["ways"][CHANCE]["value"] if CHANCE in found["ways"] else None


def method(told: Mapping[str, Any]) -> str:
    shared = ""
    if told["files_in_several_units"]:
        shared = (
            f" {told['files_in_several_units']} of {told['files']} files are in more than one unit, which intervals take "
            "for independent all the same: give rows that share files one `unit`, and they are drawn together."
        )
    return (
        f"{told['rows']} questions in {told['units']} units about {told['files']} files. An answer is right if it equals "
        "one of the row's answers, both normalised as VQA does (capitals, articles, punctuation, number words). Intervals "
        f"are percentiles of {told['resamples']} bootstrap resamples of the units (seed {told['seed']}), 95 %; those of the "
        "product of the parts have the parts' own uncertainty in them. p is exact and two-sided, over units that change for "
        f"the better and the worse (McNemar's where a unit is one question). Where all rows are right, or none, a bootstrap "
        f"cannot tell an interval: it is the exact one of as many trials as there are units.{shared}"
    )


def as_markdown(
    told: Mapping[str, Any], name: str, before: Sequence[Section] = (), after: Sequence[Section] = ()
) -> str:
    """Returns the report as Markdown, with other sections before and after its own."""
    text = f"# Where answers across inputs come from: {name}\n\n{method(told)}\n\n"
    text += "".join(f"- {said}\n" for said in findings(told))
    for title, tables in [*before, *sections(told), *after]:
        text += f"\n## {title}\n"
        for caption, rows, _ in tables:
            heading, _, note = caption.partition("\n")
            if rows:
                text += f"\n### {heading}\n" if heading else ""
                text += f"\n{note}\n\n" if note else "\n"
                text += markdown.table(rows)
    text += "\n## What the words mean\n\n" + "".join(f"- *{word}*: {meaning}.\n" for word, meaning in MEANINGS.items())
    return text


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #23262d; max-width: 80rem; margin: 2.5rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.3rem; margin-top: 3rem; border-top: 1px solid #dfe2e8;
padding-top: 1.2rem; } h3 { font-size: 1.05rem; margin: 2rem 0 .5rem; } .quiet { color: #667; max-width: 62rem; }
li { margin: .35rem 0; max-width: 66rem; } table { border-collapse: collapse; margin: .6rem 0; font-size: 13.5px; }
th { text-align: right; font-weight: 600; border-bottom: 1.5px solid #23262d; vertical-align: bottom; }
td, th { padding: .22rem .5rem; } td { text-align: right; font-variant-numeric: tabular-nums;
border-bottom: 1px solid #eceef2; white-space: nowrap; }
td:first-child, th:first-child { text-align: left; padding-left: 0; }
tr.own td { font-weight: 600; background: #eef4fb; } svg { display: block; margin: .4rem 0; max-width: 100%; height: auto; }
.wide { overflow-x: auto; } dt { font-weight: 600; margin-top: .5rem; } dd { margin-left: 0; color: #556; }
"""


def as_html(told: Mapping[str, Any], name: str, before: Sequence[Section] = (), after: Sequence[Section] = ()) -> str:
    """Returns the report as one page of HTML, with other sections before and after its own."""
    said = "".join(f"<li>{_bold(text)}</li>" for text in findings(told))
    body = ""
    for title, tables in [*before, *sections(told), *after]:
        body += f"<h2>{escape(title)}</h2>\n"
        for caption, rows, plot in tables:
            heading, _, note = caption.partition("\n")
            body += f"<h3>{escape(heading)}</h3>\n" if heading else ""
            body += f'<p class="quiet">{escape(note)}</p>\n' if note else ""
            body += plot + (f'<div class="wide">{_table(rows)}</div>\n' if rows else "")
    words = "".join(f"<dt>{escape(word)}</dt><dd>{escape(meaning)}.</dd>" for word, meaning in MEANINGS.items())
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(name)}</title>'
        f"<style>{STYLE}</style></head><body>\n<h1>Where answers across inputs come from</h1>\n"
        f'<p class="quiet">{escape(name)}. {escape(method(told)).replace("`unit`", "<code>unit</code>")}</p>\n'
        f"<ul>{said}</ul>\n{body}<h2>What the words mean</h2>\n<dl>{words}</dl>\n</body></html>\n"
    )


def _bold(text: str) -> str:
    first, bold, rest = text.split("**", 2)
    return f"{escape(first)}<b>{escape(bold)}</b>{escape(rest)}"


def _table(rows: Rows) -> str:
    head, *body = rows
    cells = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = "".join(
        f"<tr{' class=own' if row[0] == SOFT else ''}>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>\n"
        for row in body
    )
    return f"<table><thead><tr>{cells}</tr></thead><tbody>\n{lines}</tbody></table>"
