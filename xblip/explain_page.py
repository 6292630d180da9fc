"""An explanation for people: a page with its pictures in a folder, and a table for the terminal.

The page needs nothing but the files beside it, no script and no network, so that it can be sent on as it is.
"""

import json
import math
import os
import re
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.table import Table
from rich.text import Text
from torch import Tensor

from xblip import heat
from xblip.errors import ConfigError
from xblip.modality import Modality

if TYPE_CHECKING:
    import PIL.Image

    from xblip.explain import Explanation, InputEffect

PAGE, FIGURES = "index.html", "explanation.json"
MOST_QUERIES = 32
"""Queries that a page shows one by one."""
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #28282e; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin-top: 2.2rem; border-top: 1px solid #e2e2e6;
padding-top: 1rem; } h3 { font-size: 1rem; }
.answer { font-size: 1.4rem; margin-top: 0; } .quiet { color: #6a6a74; }
table { border-collapse: collapse; } td, th { padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
.bar { display: inline-block; height: .8em; background: #e1465a; vertical-align: baseline; }
.against { background: #5a78b4; }
figure { display: inline-block; margin: 0 1rem .6rem 0; max-width: 100%; } figure img { max-width: 100%; display: block; }
figcaption { font-size: .85rem; color: #6a6a74; }
.tokens td { padding: .2rem .6rem; } .tokens th.number { padding: .2rem .6rem; }
.queries figure { width: 14rem; } .queries img { border: 1px solid #e2e2e6; }
"""
HOW = (
    "An <b>effect</b> is what the log-likelihood of this very answer loses when an input is left out of the prompt with "
    "its cue: so many nats, of which 0.7 halve a probability. Below 0, the answer gets likelier without it. Effects need "
    "not add up: inputs can say the same, or only mean something together. <b>Attention</b> is where the bridge's queries "
    "looked, the mean of its heads and layers. It does not say whether what they saw mattered, and each picture has a "
    "scale of its own."
)


def check_folder(folder: str | Path) -> Path:
    """Raises `ConfigError` unless a folder is new or empty, and can be made."""
    folder = Path(folder).expanduser()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConfigError(
            f"{folder} exists already, and an explanation writes over nothing: give an empty or a new folder."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as cause:
        raise ConfigError(f"Cannot make the folder {folder}: {cause.strerror}. Give another one.") from cause
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"Cannot write into {folder}: it is read-only. Give another folder.")
    return folder


def write(explanation: "Explanation", folder: str | Path) -> Path:
    """Writes a page, its pictures and the figures; returns the page's path.

    Raises:
      ConfigError: the folder is not empty, or cannot be written.
    """
    folder = check_folder(folder)
    contents: dict[str, bytes | PIL.Image.Image] = {}
    page = _page(explanation, contents)
    contents[FIGURES] = json.dumps(explanation.to_dict(), indent=1).encode()
    contents[PAGE] = page.encode(errors="backslashreplace")  # paths may be no Unicode
    try:
        for name, content in contents.items():
            if isinstance(content, bytes):
                (folder / name).write_bytes(content)
            else:
                content.save(folder / name)
    except OSError as cause:
        for name in contents:
            (folder / name).unlink(missing_ok=True)
        raise ConfigError(
            f"Cannot write into {folder}: {cause.strerror}. Make room, or give another folder."
        ) from cause
    return folder / PAGE


def table(explanation: "Explanation") -> Table:
    """Returns what each input did, for the terminal."""
    shown = Table()
    for column, justify in (("input", "left"), ("from", "left"), ("effect in nats", "right"), ("share", "right")):
        shown.add_column(column, justify=justify, overflow="fold")
    for part in explanation.inputs:
        style = "bold" if part is explanation.strongest() else None
        shown.add_row(
            Text(part.name), Text(_short(part.source)), f"{part.effect:+z.2f}", _share(part.share), style=style
        )
    if len(explanation.inputs) > 1:
        shown.add_section()
        shown.add_row("all of them", "", f"{explanation.log_likelihood - explanation.without_inputs:+z.2f}", "")
    return shown


def _short(source: str) -> str:
    return os.path.basename(source) or source


def _page(explanation: "Explanation", contents: dict[str, "bytes | PIL.Image.Image"]) -> str:
    """Returns the page's HTML; adds the files it shows to `contents`."""
    sections = [_section(explanation, index, contents) for index in range(len(explanation.inputs))]
    return "\n".join(
        [
            f"<!doctype html>\n<html lang=en>\n<meta charset=utf-8>\n<title>{escape(explanation.answer)}</title>",
            f"<meta name=viewport content='width=device-width'>\n<style>{STYLE}</style>",
            f"<h1>{escape(explanation.question)}</h1>\n<p class=answer>{escape(explanation.answer)}</p>",
            f"<p>{_summary(explanation)}</p>",
            _inputs(explanation),
            _tokens(explanation),
            *sections,
            f"<h2>How to read this</h2>\n<p>{HOW}</p>\n<p>All figures: <a href={FIGURES}>{FIGURES}</a>.</p>\n</html>\n",
        ]
    )


def _summary(explanation: "Explanation") -> str:
    strongest = explanation.strongest()
    if strongest.effect <= 0:
        return "No input made this answer likelier: it loses nothing when any one of them is left out."
    likelihoods = explanation.log_likelihood, explanation.log_likelihood - strongest.effect
    whole, without = map(_percent, likelihoods)
    return (
        f"It owes most to <b>{escape(strongest.name)}</b>: with everything there, the model gives this answer a probability "
        f"of {whole}; without that input, of {without}."
    )


def _percent(log_likelihood: float) -> str:
    """The probability with this logarithm, as exactly as it matters."""
    percent = 100 * math.exp(min(log_likelihood, 0.0))
    if percent > 99.9:
        return "more than 99.9 %"
    return f"{percent:.1f} %" if percent >= 10 else f"{percent:.2g} %" if percent >= 0.001 else "less than 0.001 %"


def _share(share: float) -> str:
    return f"{round(100 * share)} %"


def _bar(effect: float, largest: float) -> str:
    width = abs(effect) / largest * 9 if largest else 0
    return f"<span class='bar{' against' if effect < 0 else ''}' style='width:{width:.2f}rem'></span>"


def _inputs(explanation: "Explanation") -> str:
    largest = max(abs(part.effect) for part in explanation.inputs)
    rows = [
        f"<tr><td>{escape(part.name)}<td class=quiet>{escape(_short(part.source))}<td class=quiet>{escape(part.cue)}"
        f"<td class=number>{part.effect:+z.2f}<td class=number>{part.per_token:+z.2f}<td class=number>{_share(part.share)}"
        f"<td class=number>{_percent(explanation.log_likelihood - part.effect)}<td>{_bar(part.effect, largest)}"
        for part in explanation.inputs
    ]
    if len(rows) > 1:
        effect = explanation.log_likelihood - explanation.without_inputs
        rows.append(
            f"<tr><td>all of them<td><td><td class=number>{effect:+z.2f}"
            f"<td class=number>{effect / len(explanation.tokens):+z.2f}"
            f"<td><td class=number>{_percent(explanation.without_inputs)}<td>"
        )
    heads = ["left out", "from", "cue"]
    numbers = ["effect, nats", "per token", "share", "answer's probability then"]
    head = "".join(f"<th>{name}" for name in heads) + "".join(f"<th class=number>{name}" for name in numbers)
    return f"<table><tr>{head}<th></tr>\n" + "\n".join(rows) + "\n</table>"


def _tokens(explanation: "Explanation") -> str:
    """The effects on each of the answer's tokens; nothing for an answer of one."""
    if len(explanation.tokens) == 1:
        return ""
    largest = max(abs(value) for part in explanation.inputs for value in part.token_effects) or 1.0
    rows = [
        f"<tr><td>{escape(part.name)}" + "".join(_cell(value, largest) for value in part.token_effects)
        for part in explanation.inputs
    ]
    head = "".join(f"<th class=number>{escape(token.strip() or repr(token))}" for token in explanation.tokens)
    return f"<h3>Token by token</h3>\n<table class=tokens><tr><th>{head}</tr>\n" + "\n".join(rows) + "\n</table>"


def _cell(value: float, largest: float) -> str:
    tint = f"rgba({'225,70,90' if value > 0 else '90,120,180'},{0.6 * abs(value) / largest:.2f})"
    return f"<td class=number style='background:{tint}'>{value:+z.2f}"


def _section(explanation: "Explanation", index: int, contents: dict) -> str:
    """What is known of one input beside its effect."""
    part, (modality, tensors) = explanation.inputs[index], explanation.media[index]
    weights = explanation.attention[part.name]
    html = [f"<h2>{escape(part.name)}</h2>\n<p class=quiet>{escape(part.source)}</p>"]
    segments = [segment for segment in explanation.segments if segment.name == part.name]
    if weights is None:
        html.append(
            f"<p>Its bridge, of the kind {escape(part.bridge)}, has no queries, and so no attention to show.</p>"
        )
    else:
        html += _attention(modality, tensors, weights.mean((0, 1)).double().numpy(), part, contents)
    if segments:
        largest = max(abs(segment.effect) for segment in segments)
        rows = [
            f"<tr><td>{segment.segment + 1}<td class=number>{segment.effect:+z.2f}<td class=number>{segment.per_token:+z.2f}"
            f"<td>{_bar(segment.effect, largest)}"
            for segment in segments
        ]
        html.append(
            "<h3>Without one of its segments</h3>\n<table><tr><th>segment<th class=number>effect, nats"
            "<th class=number>per token<th></tr>\n" + "\n".join(rows) + "\n</table>"
        )
    return "\n".join(html)


def _attention(
    modality: Modality, tensors: dict[str, Tensor] | None, queries: np.ndarray, part: "InputEffect", contents: dict
) -> list[str]:
    """Draws what the queries looked at, (Q, S, N), together and one by one."""
    slug = re.sub(r"\W+", "-", part.name)
    mean = queries.mean(0)
    drawing = heat.bars(mean) if tensors is None else modality.draw(tensors, mean)
    contents.update({f"{slug}{ending}": content for ending, content in drawing.files.items()})
    figures = [_figure(f"{slug}.png", "where its queries looked, all together")]
    if tensors is not None and type(modality).draw is not Modality.draw:
        contents[f"{slug}-plain.png"] = modality.draw(tensors, np.zeros_like(mean)).files[".png"]
        figures.insert(0, _figure(f"{slug}-plain.png", "what the encoder saw"))
    others = [f"<a href='{slug}{ending}'>{slug}{ending}</a>" for ending in drawing.files if ending != ".png"]
    notes = [
        drawing.caption,
        *_notes(mean, drawing.placeless),
        f"To turn by hand: {', '.join(others)}." if others else "",
    ]
    if tensors is None:
        notes.insert(0, "It was given as features, without the medium that they were made of.")
    html = ["".join(figures), f"<p class=quiet>{' '.join(note for note in notes if note)}</p>"]
    if len(queries) == 1:
        return html
    each = []
    for number, weights in enumerate(queries[:MOST_QUERIES], 1):
        name = f"{slug}-query-{number:02d}.png"
        contents[name] = (heat.bars(weights) if tensors is None else modality.draw(tensors, weights)).files[".png"]
        each.append(_figure(name, f"query {number}"))
    title = f"Query by query{f', {MOST_QUERIES} of {len(queries)}' if len(queries) > MOST_QUERIES else ''}"
    return [*html, f"<details><summary>{title}</summary>\n<div class=queries>{''.join(each)}</div></details>"]


def _figure(file: str, caption: str) -> str:
    return f"<figure><img src='{file}' alt='{caption}'><figcaption>{caption}</figcaption></figure>\n"


def _notes(mean: np.ndarray, placeless: Mapping[int, str]) -> list[str]:
    """What a picture of weights (S, N) does not show: the part that lies nowhere, and how uneven the rest is."""
    notes = []
    total = mean.sum()
    for name in dict.fromkeys(placeless.values()):
        share = mean[:, [index for index, other in placeless.items() if other == name]].sum() / total
        notes.append(f"{_share(share)} of the attention went to {escape(name)}, which belongs to no place.")
    placed = np.delete(mean, list(placeless), axis=1)
    real = int((placed > 0).sum())
    if real > 1:
        share = placed.max() / placed.sum()
        notes.append(
            f"The hottest place got {100 * share:.1f} % of what {'else ' if notes else ''}was looked at, "
            f"{share * real:.1f} times an equal share among {real}."
        )
    return notes
