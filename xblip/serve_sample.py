"""A request's conversation as a sample: whose turn it is, what is asked last, and the files in it let in."""

from xblip.sample import Media, Sample, Turn
from xblip.serve_intake import Visit
from xblip.serve_media import MediaDoor
from xblip.serve_schema import MAX_TEXT, ChatRequest, Part, parts_of, wrong

CHARACTERS = 64
"""Of a position of the LLM's context: far more than pieces of tokenizers have, but for runs of one character."""


def sample_of(asked: ChatRequest, door: MediaDoor, visit: Visit, *, caller: str, most: int) -> Sample:
    """Makes a sample of messages, their media fetched and read. A system message is the first text of the first turn.

    Args:
      asked: the request.
      door: that lets media in.
      visit: that they are read for, as long as somebody waits.
      caller: whose they are.
      most: texts and inputs that a message may have, and inputs of all messages.

    Raises:
      InputError, MediaError: a message or a part is wrong; `place` says which.
    """
    contents = [
        parts_of(message, index, door.model.branches, most=most) for index, message in enumerate(asked.messages)
    ]
    _check_amount([part for content in contents for part in content], most, door.model.llm.context_length)

    def let_in(part: str | Part) -> str | Media:
        return part if isinstance(part, str) else Media(part.modality, door.source(part, visit, caller=caller))

    turns: list[Turn] = []
    before: list[str] = []
    current: list[str | Media] | None = None
    for index, (message, content) in enumerate(zip(asked.messages, contents, strict=True)):
        place = f"messages[{index}]"
        if message.role in ("system", "developer"):
            if turns or current is not None:
                raise wrong(place, f"{place}: a message of role {message.role} must come first.")
            before += [_text(part) for part in content]
        elif message.role == "user" and current is None:
            current, before = [*before, *map(let_in, content)], []
        elif message.role == "assistant" and current is not None:
            turns.append(Turn(tuple(current), " ".join(_text(part) for part in content)))
            current = None
        else:
            raise wrong(place, f"{place}: user and assistant take turns, the user first and last.")
    if current is None:
        raise wrong("messages", "messages: the last must be the user's, which is answered.")
    texts = [place for place, part in enumerate(current) if isinstance(part, str)]
    if not texts:
        raise wrong("messages", "messages: the last has no text, which would be the question.")
    instruction = current.pop(texts[-1])
    return Sample(instruction, current, None, turns)


def _check_amount(parts: list[str | Part], most: int, context_length: int | None) -> None:
    """Refuses what could not be answered before anything of it is read."""
    inputs = sum(isinstance(part, Part) for part in parts)
    if inputs > most:
        raise wrong("messages", f"messages: there are {inputs} inputs in all, and {most} are allowed: send fewer.")
    characters = sum(len(part) for part in parts if isinstance(part, str))
    allowed = min(MAX_TEXT, CHARACTERS * (context_length or MAX_TEXT))
    if characters > allowed:
        raise wrong(
            "messages", f"messages: the texts have {characters} characters, and {allowed} are allowed: send less."
        )


def _text(part: str | Part) -> str:
    if isinstance(part, Part):
        raise wrong(part.place, f"{part.place}: only messages of role user may hold files.")
    return part
