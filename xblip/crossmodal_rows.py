"""Rows of the cross-modal report: a question about files of which it is known what they show.

One line of JSON is one question. What a row lacks, it is not asked by: a row without captions is not asked by captions.

    {"id": "larger-17", "unit": "scene-5", "kind": "larger",
     "media": [["<modality>", "42.png"], ["<another>", "113.wav"]],
     "instruction": "which is larger, the first or the second?", "answer": "the second", "accepted": ["second"],
     "chance": 0.5,
     "descriptions": ["a red four on dark paper, small and slanted", "a loud nine by george, said twice"],
     "captions": ["a red four", "somebody says nine loudly"],
     "parts": ["<modality>, handwriting: number", "<another>: number"],
     "swapped": {"answer": "the first"},
     "replaced": {"media": [["<modality>", "7.png"], ["<another>", "90.wav"]], "answer": "the first"}}
    {"id": "number-42", "kind": "number", "media": [["<modality>", "42.png"]], "instruction": "which number is it?",
     "answer": "four", "chance": 0.1, "descriptions": ["a red four on dark paper, small and slanted"],
     "captions": ["a red four"], "part": "<modality>, handwriting: number"}

Rows about one input are questions too, and they give the parts: a row about several inputs names in `parts` what must be
read for its answer, each by the `part` that rows about one input share, or by the id of one of these.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xblip.errors import InputError, some_of, suggest
from xblip.forms import read_row
from xblip.records import find_files, raw_records, read_record
from xblip.sample import Media, check_text

NEEDED = ("media", "instruction", "answer", "kind")
KEYS = (*NEEDED, "id", "unit", "accepted", "chance", "descriptions", "captions", "part", "parts", "swapped", "replaced")
SWAPPED_KEYS = ("instruction", "answer", "accepted", "order")
REPLACED_KEYS = ("media", "instruction", "answer", "accepted")


@dataclass(frozen=True)
class Form:
    """A question in one form: as it stands, with its inputs in another order, or about other inputs.

    Attributes:
      media: inputs, unread, in their order.
      instruction: what is asked.
      truths: the answers that count as right, the usual one first.
    """

    media: list[Media]
    instruction: str
    truths: list[str]


@dataclass(frozen=True)
class CrossRow:
    """One row.

    Attributes:
      id: unlike any other's.
      unit: rows of one unit, such as all about the same files, are not independent.
      kind: of question.
      asked: the question as it stands.
      chance: how often the best answer that knows no input would be right; None if nobody said.
      descriptions: all that is true of each input; None if nobody said.
      captions: what people would say of each input; None if nobody said.
      part: what this row is a measure of, if it is about one input; "" if it is not.
      parts: what must be read for the answer, if it is about several.
      swapped: the question with its inputs in another order, and names in it and its answer following; None if not given.
      replaced: the question about other inputs of the same modalities; None if not given.
      origin: file and line.
    """

    id: str
    unit: str
    kind: str
    asked: Form
    chance: float | None
    descriptions: list[str] | None
    captions: list[str] | None
    part: str
    parts: list[str]
    swapped: Form | None
    replaced: Form | None
    origin: str


def read_rows(path: str | Path, modalities: Collection[str], root: str | Path | None = None) -> list[CrossRow]:
    """Reads rows.

    Args:
      path: JSONL or JSON, or a pattern of several such files.
      modalities: names of those that the model reads.
      root: folder that paths of media start from; that of the file if None.

    Raises:
      ConfigError: there is no such file.
      InputError: a row is wrong; the message says where and what.
    """
    rows: list[CrossRow] = []
    for file in find_files(Path(path)):
        folder = Path(file.parent if root is None else root).expanduser().absolute()
        for raw in raw_records(file):
            record = read_record(file, raw)
            try:
                rows.append(_row(record.values, record.origin, str(len(rows)), modalities, folder))
            except InputError as error:
                raise InputError(f"{record.origin}: {error}") from error
    _check_ids(rows)
    _check_parts(rows)
    return rows


def _row(values: Mapping[str, Any], origin: str, place: str, modalities: Collection[str], root: Path) -> CrossRow:
    _check_keys(values, KEYS, "a row")
    for key in NEEDED:
        if values.get(key) in (None, "", []):
            raise InputError(f"A row lacks its `{key}`; it has {', '.join(values) or 'nothing'}. Add it.")
    for key in ("id", "unit", "kind", "part"):
        if not isinstance(values.get(key, ""), str):
            raise InputError(f"`{key}` must be text, not {values[key]!r:.80}.")
    asked = _form(values, modalities, root)
    several = len(asked.media) > 1
    misplaced = [key for key in ("parts", "swapped") if key in values and not several]
    if misplaced or (several and "part" in values):
        raise InputError(
            f"`{(misplaced or ['part'])[0]}` is for rows about {'one input' if several else 'several inputs'}, and this "
            f"one has {len(asked.media)}. A row about one input says by `part` what it measures; one about several says by "
            "`parts` what it is made of."
        )
    parts = values.get("parts", [])
    if not isinstance(parts, list) or not all(isinstance(part, str) and part for part in parts):
        raise InputError(f"`parts` must be a list of names of parts, not {parts!r:.80}.")
    return CrossRow(
        id=values.get("id") or place,
        unit=values.get("unit") or " ".join(sorted(str(media.source) for media in asked.media)),
        kind=values["kind"],
        asked=asked,
        chance=_chance(values.get("chance")),
        descriptions=_texts(values, "descriptions", len(asked.media)),
        captions=_texts(values, "captions", len(asked.media)),
        part=values.get("part", ""),
        parts=parts,
        swapped=_swapped(values, asked) if "swapped" in values else None,
        replaced=_replaced(values, asked, modalities, root) if "replaced" in values else None,
        origin=origin,
    )


def _check_keys(values: Any, known: Sequence[str], what: str) -> None:
    if not isinstance(values, Mapping):
        raise InputError(f"{what[0].upper()}{what[1:]} must be an object with keys, not {values!r:.80}.")
    for key in values:
        if key not in known:
            raise InputError(f'Unknown key "{key}" in {what}.{suggest(str(key), known)}')


def _form(values: Mapping[str, Any], modalities: Collection[str], root: Path) -> Form:
    accepted = _accepted(values)
    row = read_row(
        {
            "media": values["media"],
            "instruction": values["instruction"],
            "answers": [values["answer"], *accepted],
        },
        modalities=modalities,
        root=root,
    )
    if not row.answers or len(row.sample.all_media) < len(row.sample.media):
        raise InputError(
            "`media` must be a list of [modality, path] and nothing else, and `answer` words: "
            f"{values['media']!r:.80}, {values['answer']!r:.80}."
        )
    return Form(row.sample.all_media, row.sample.instruction, list(row.answers))


def _accepted(values: Mapping[str, Any]) -> list[str]:
    accepted = values.get("accepted", [])
    if not isinstance(accepted, list):
        raise InputError(f"`accepted` must be a list of answers that are right too, not {accepted!r:.80}.")
    return accepted


def _swapped(values: Mapping[str, Any], asked: Form) -> Form:
    """The question with its inputs in the order that is given, or the other way round; words that do not change stay."""
    given, count = values["swapped"], len(asked.media)
    _check_keys(given, SWAPPED_KEYS, "`swapped`")
    order = given.get("order", list(reversed(range(count))))
    if not isinstance(order, list) or sorted(map(str, order)) != sorted(map(str, range(count))):
        raise InputError(
            f"`swapped`: `order` must have each of the {count} places from 0 on once, such as "
            f"{list(reversed(range(count)))}, not {order!r:.80}."
        )
    if order == list(range(count)):
        raise InputError("`swapped`: `order` leaves the inputs where they are: give another one.")
    instruction = given.get("instruction", asked.instruction)
    check_text(instruction, "`swapped`: `instruction`")
    return Form([asked.media[place] for place in order], instruction, _truths(given, asked))


def _replaced(values: Mapping[str, Any], asked: Form, modalities: Collection[str], root: Path) -> Form:
    given = values["replaced"]
    _check_keys(given, REPLACED_KEYS, "`replaced`")
    for key in ("media", "answer"):
        if key not in given:
            raise InputError(f"`replaced` lacks its `{key}`: say what is put in, and what is right then.")
    try:
        form = _form({"instruction": asked.instruction, **given}, modalities, root)
    except InputError as error:
        raise InputError(f"`replaced`: {error}") from error
    before, now = ([media.modality for media in one.media] for one in (asked, form))
    if before != now:
        raise InputError(
            f"`replaced` must put in inputs of the same modalities: {', '.join(before)}, not {', '.join(now)}."
        )
    return form


def _truths(given: Mapping[str, Any], asked: Form) -> list[str]:
    if "answer" not in given:
        return asked.truths
    truths = [given["answer"], *_accepted(given)]
    for truth in truths:
        check_text(truth, "`swapped`: an answer")
    return truths


def _chance(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise InputError(f"`chance` must be a share from 0 to 1, not {value!r:.80}.")
    return float(value)


def _texts(values: Mapping[str, Any], key: str, count: int) -> list[str] | None:
    texts = values.get(key)
    if texts is None:
        return None
    if not isinstance(texts, list) or len(texts) != count or not all(isinstance(text, str) and text for text in texts):
        raise InputError(f"`{key}` must be a list of {count} texts, one for each input, not {texts!r:.80}.")
    return texts


def _check_ids(rows: Sequence[CrossRow]) -> None:
    first: dict[str, CrossRow] = {}
    for row in rows:
        if row.id in first:
            raise InputError(f'{row.origin}: the id "{row.id}" is that of {first[row.id].origin} too: give it another.')
        first[row.id] = row


def _check_parts(rows: Sequence[CrossRow]) -> None:
    """Raises `InputError` for a part that nothing measures."""
    known = {name for row in rows if len(row.asked.media) == 1 for name in (row.part, row.id) if name}
    named = sorted({row.part for row in rows if row.part})
    for row in rows:
        for part in row.parts:
            if part not in known:
                raise InputError(
                    f'{row.origin}: no row about one input has the part "{part}" or that id. Add such rows, or leave it '
                    f"out of `parts`. Parts that are measured: {some_of(named, 8) or 'none'}."
                )
