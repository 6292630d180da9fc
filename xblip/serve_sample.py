"""A request's conversation as a sample: whose turn it is, what is asked last, and the files in it let in."""

from xblip.sample import Media, Sample, Turn
from xblip.serve_media import MediaDoor
from xblip.serve_schema import ChatRequest, Part, parts_of, wrong


def sample_of(asked: ChatRequest, door: MediaDoor, *, caller: str, most: int) -> Sample:
    """Makes a sample of messages, their media fetched and read. A system message is the first text of the first turn.

    Args:
      asked: the request.
      door: that lets media in.
      caller: whose they are.
      most: texts and inputs that a message may have.

    Raises:
      InputError, MediaError: a message or a part is wrong; `place` says which.
    """
    contents = [
        parts_of(message, index, door.model.branches, most=most) for index, message in enumerate(asked.messages)
    ]
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
            current, before = [*before, *(_let_in(part, door, caller) for part in content)], []
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


def _let_in(part: str | Part, door: MediaDoor, caller: str) -> str | Media:
    return Media(part.modality, door.source(part, caller=caller)) if isinstance(part, Part) else part


def _text(part: str | Part) -> str:
    if isinstance(part, Part):
        raise wrong(part.place, f"{part.place}: only messages of role user may hold files.")
    return part
