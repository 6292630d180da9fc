"""A batch that is asked: what can be done together is, and what fails fails alone."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from xblip.answer import Answer
from xblip.errors import XBlipError
from xblip.packing import POSITIONS_PER_STEP, groups_of_like_length
from xblip.sample import Sample

if TYPE_CHECKING:
    from xblip.model import XBlip

T = TypeVar("T")


def generate(
    model: "XBlip",
    samples: Sequence[Sample | Mapping[str, Any]],
    options: Mapping[str, Any],
    *,
    return_exceptions: bool,
) -> list[Answer | XBlipError]:
    """Answers samples; see `XBlip.generate`. Inputs are grouped by modality, prompts by length."""
    failed: dict[int, XBlipError] = {}

    def attempt(indices: Sequence[int], make: Callable[[int], T]) -> dict[int, T]:
        made = {}
        for index in indices:
            try:
                made[index] = make(index)
            except XBlipError as error:
                if not return_exceptions:
                    raise
                failed[index] = error
        return made

    room = options["max_new_tokens"]
    read = attempt(range(len(samples)), lambda index: _read(model, model.sample(samples[index])))
    softs = dict(zip(read, model.soft_prompts(list(read.values())), strict=True))
    pieces = attempt(list(read), lambda index: model.router.pieces(read[index]))
    lengths = attempt(
        list(pieces), lambda index: model.router.measure(pieces[index], softs[index], room=room, index=index)
    )
    answers: dict[int, list[Answer]] = {}
    places = list(lengths)
    step = room * POSITIONS_PER_STEP.get(model.device.type, POSITIONS_PER_STEP["cuda"])
    for group in groups_of_like_length(list(lengths.values()), step):
        own = [places[index] for index in sorted(group)]
        batch = model.router.assemble([pieces[index] for index in own], [softs[index] for index in own], room=room)
        made = Answer.of(model.llm, model.llm.generate(batch, **options), [lengths[index] for index in own])
        repeats = len(made) // len(own)
        answers.update((index, made[start * repeats : (start + 1) * repeats]) for start, index in enumerate(own))
    repeats = options.get("num_return_sequences") or 1
    return [answer for index in range(len(samples)) for answer in answers.get(index) or [failed[index]] * repeats]


def _read(model: "XBlip", sample: Sample) -> Sample:
    """Reads a sample's inputs, so that one that cannot be read is found before anything is encoded."""
    return sample.changed(lambda _, part: part.with_source(model.branches[part.modality].read(part.source)))
