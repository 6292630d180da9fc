"""Requests of the server as OpenAI's clients send them, and what they ask for in this house's terms.

Content parts are text, or an input of any modality that the model has: `<modality>_url` with a URL, `input_<modality>` with
base64. No modality is named here: the parts of a request are checked against the model's branches.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from xblip.errors import InputError, suggest

URL, INPUT = "_url", "input_"
"""What comes after, or before, a modality's name in the type of a part."""
MAX_STOPS = 4
Stop = Annotated[str, StringConstraints(max_length=1_000)]
MAX_CHOICES = 16
EMPTY = (None, [], {})
"""Values of settings that are not known here, and are let pass."""
SHOWN = 80
"""Characters of what a client named that a message repeats."""
MAX_VALUES = 100_000
"""Of a body, by its commas and opening brackets: a value takes far more memory than its bytes, and time for nothing else."""
LEAST = 1e-6
"""Of what scores are divided by: less makes no numbers of them, which ends an accelerator's work for all."""
MAX_ERRORS = 100
"""Of one request that are looked at."""
MAX_TEXT = 1_000_000
"""Characters of all texts of a request."""
Text = Annotated[str, StringConstraints(max_length=MAX_TEXT)]


class Strict(BaseModel):
    """Refuses what it does not know: a setting that is not heeded is worse than one that is refused.

    One that is empty asks for nothing: clients send all that they know of, and messages as they came.
    """

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _without_what_asks_for_nothing(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if name in cls.model_fields or value not in EMPTY}


class Message(Strict):
    """One message; content is a text or a list of parts."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[dict[str, Any]] | None = None
    name: str | None = None


class StreamOptions(Strict):
    """`include_usage`: a last piece with the counts of tokens."""

    include_usage: bool = False


class ResponseFormat(Strict):
    """Answers are text."""

    type: Literal["text"]


class ChatRequest(Strict):
    """A request for chat completions; what is beyond OpenAI's are generation options of transformers."""

    model: str
    messages: list[Message] = Field(min_length=1, max_length=1_000)
    max_completion_tokens: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    min_tokens: int | None = Field(None, ge=0)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=LEAST, le=10)
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    num_beams: int | None = Field(None, ge=1, le=16)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | list[Stop] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None

    def check(self) -> None:
        """Raises `InputError` for what this server does not do, and for settings that contradict each other."""
        for name in ("frequency_penalty", "presence_penalty"):
            if getattr(self, name):
                raise wrong(name, f"{name} is not done here: leave it out, or use repetition_penalty.")
        if self.temperature is not None and 0 < self.temperature < LEAST:
            raise wrong("temperature", f"temperature must be 0 or at least {LEAST:g}.")
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise wrong("max_tokens", "max_tokens and max_completion_tokens differ: give one of them.")
        if len(self.stops) > MAX_STOPS:
            raise wrong("stop", f"stop has {len(self.stops)} texts, and {MAX_STOPS} are allowed: give fewer.")
        if self.top_logprobs and not self.logprobs:
            raise wrong("top_logprobs", "top_logprobs needs logprobs to be true.")
        if self.stream_options and not self.stream:
            raise wrong("stream_options", "stream_options needs stream to be true.")
        if (self.num_beams or 1) > 1 and self.logprobs:
            raise wrong("logprobs", "logprobs are not told of beams: leave out num_beams or logprobs.")

    @property
    def options(self) -> dict[str, Any]:
        """The generation options that it asks for."""
        given = {
            "max_new_tokens": self.max_completion_tokens or self.max_tokens,
            "min_new_tokens": self.min_tokens,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "num_beams": self.num_beams or (1 if self.logprobs else None),
        }
        if self.temperature is not None:
            given["do_sample"] = self.temperature > 0
            given["temperature"] = self.temperature or None
        elif any(getattr(self, name) is not None for name in ("top_p", "top_k", "min_p")):
            given["do_sample"] = True
        if "do_sample" in given:
            given["num_beams"] = given["num_beams"] or 1
        return {name: value for name, value in given.items() if value is not None}

    @property
    def has_inputs(self) -> bool:
        """Whether anything but text may stand in it."""
        parts = (part for message in self.messages if isinstance(message.content, list) for part in message.content)
        return any(part.get("type") != "text" for part in parts)

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


@dataclass(frozen=True)
class Part:
    """An input of a request.

    Attributes:
      modality: its name.
      place: where it stands, for messages, such as "messages[0].content[1]".
      url: where it is; None if it came as base64, or was sent before.
      data: its base64.
      format: its format, as its sender calls it.
      uuid: what it may be asked about by, later; None for no such name.
    """

    modality: str
    place: str
    url: str | None = None
    data: str | None = None
    format: str = ""
    uuid: str | None = None


def wrong(place: str, message: str) -> InputError:
    """Returns an error about a place in the request."""
    error = InputError(message)
    error.place = place
    return error


def parse(body: bytes | bytearray) -> ChatRequest:
    """Reads a request's body.

    Raises:
      InputError: it is no JSON, or not such a request; `place` says what of it.
    """
    if sum(body.count(mark) for mark in (b",", b"[", b"{")) > MAX_VALUES:
        raise wrong(
            "",
            f"The body has more than {MAX_VALUES} commas and opening brackets, and so too many values or too long a text: "
            "send less.",
        )
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as cause:
        raise _told(cause) from None
    request.check()
    return request


def _told(cause: ValidationError) -> InputError:
    """Returns the error about the first place that is wrong."""
    errors = cause.errors(include_url=False, include_input=False)[:MAX_ERRORS]
    first = errors[0]
    if first["type"] == "json_invalid":
        return wrong("", f"The body is no JSON: {first['ctx']['error']}. Send a JSON object in UTF-8.")
    place, known = _place(first["loc"])
    if first["type"] == "extra_forbidden":
        place = ".".join(filter(None, (place, str(first["loc"][-1]))))
        place = place if len(place) <= SHOWN else f"{place[:SHOWN]}..."
        did_you_mean = suggest(str(first["loc"][-1])[:SHOWN], known)
        return wrong(place, f'Unknown setting "{place}".{did_you_mean} Leave it out: nothing here would heed it.')
    places = [_place(error["loc"])[0] for error in errors]
    inner = (other for other in places if other.startswith(place))  # where a value may be one thing or another
    place = max(inner, key=lambda other: other.count("[") + other.count("."))
    here = [error["msg"][:200] for error, own in zip(errors, places, strict=True) if own == place]
    expected = ", or ".join(dict.fromkeys([here[0], *(text.removeprefix("Input should be ") for text in here[1:])]))
    others = {other for other in places if not place.startswith(other)}
    more = f" ({len(others)} more of the kind.)" if others else ""
    return wrong(place, f"{place or 'The request'}: {expected}.{more}")


def _place(location: Sequence[str | int]) -> tuple[str, Collection[str]]:
    """Returns where in a request that is, and the names of the settings there; pydantic goes on to the kinds of a value."""
    place, known = "", ChatRequest.model_fields
    inner = {"messages": Message, "stream_options": StreamOptions, "response_format": ResponseFormat}
    for part in location:
        if isinstance(part, int):
            place += f"[{part}]"
        elif part in known:
            place = f"{place}.{part}".lstrip(".")
            known = inner[part].model_fields if part in inner else ()
    return place, known


def parts_of(message: Message, index: int, modalities: Collection[str], *, most: int) -> list[str | Part]:
    """Returns the texts and inputs of a message.

    Args:
      message: of a request.
      index: its place among the messages.
      modalities: that the model has.
      most: inputs and texts that a message may have.

    Raises:
      InputError: a part is malformed or of an unknown type, or there are too many.
    """
    place = f"messages[{index}].content"
    if message.content is None:
        raise wrong(place, f"{place} is missing: give a text, or a list of parts.")
    if isinstance(message.content, str):
        return [message.content]
    if len(message.content) > most:
        raise wrong(place, f"{place} has {len(message.content)} parts, and {most} are allowed: send fewer.")
    return [_part(part, f"{place}[{number}]", modalities) for number, part in enumerate(message.content)]


def _part(part: Mapping[str, Any], place: str, modalities: Collection[str]) -> str | Part:
    kind = part.get("type")
    if kind == "text":
        _check_keys(part, {"type", "text"}, place)
        if not isinstance(part.get("text"), str):
            raise wrong(place, f'{place} is of type "text" and has no "text": give it a string.')
        return part["text"]
    kinds = {f"{name}{URL}": name for name in modalities} | {f"{INPUT}{name}": name for name in modalities}
    if not isinstance(kind, str) or kind not in kinds:
        known = suggest(str(kind)[:SHOWN], {"text", *kinds})
        raise wrong(place, f'{place} is of the unknown type "{kind!s:.80}".{known}')
    _check_keys(part, {"type", kind, "uuid"}, place)
    uuid = part.get("uuid")
    if uuid is not None and (not isinstance(uuid, str) or not 0 < len(uuid) <= 128):
        raise wrong(place, f"{place}.uuid must be a text of 1 to 128 characters.")
    given = part.get(kind)
    if given is None and uuid is not None:
        return Part(kinds[kind], place, uuid=uuid)
    return (_by_url if kind.endswith(URL) else _by_data)(given, kinds[kind], f"{place}.{kind}", uuid)


def _by_url(given: Any, modality: str, place: str, uuid: str | None) -> Part:
    url = given.get("url") if isinstance(given, Mapping) else given
    if not isinstance(url, str) or not url:
        raise wrong(place, f'{place} must be {{"url": "data:TYPE/SUBTYPE;base64,..."}}.')
    if isinstance(given, Mapping):
        _check_keys(given, {"url", "detail"}, place)
    return Part(modality, place, url=url, uuid=uuid)


def _by_data(given: Any, modality: str, place: str, uuid: str | None) -> Part:
    if not isinstance(given, Mapping) or not isinstance(given.get("data"), str) or not given["data"]:
        raise wrong(place, f'{place} must be {{"data": "...", "format": "..."}} with the file in base64.')
    _check_keys(given, {"data", "format"}, place)
    form = given.get("format", "")
    if not isinstance(form, str) or len(form) > 64:
        raise wrong(place, f"{place}.format must be a short text, such as the file's ending.")
    return Part(modality, place, data=given["data"], format=form, uuid=uuid)


def _check_keys(given: Mapping[str, Any], known: set[str], place: str) -> None:
    for key, value in given.items():
        if key not in known and value not in EMPTY:
            raise wrong(place, f'{place} has the unknown key "{key!s:.80}".{suggest(str(key)[:SHOWN], known)}')


def schema_of(modalities: Mapping[str, Collection[str]]) -> dict[str, Any]:
    """Returns the JSON schema of a request, with the parts of these modalities.

    Args:
      modalities: the media types of each, by its name.
    """
    schema = ChatRequest.model_json_schema(ref_template="#/x-unused/{model}")
    definitions = schema.pop("$defs")
    parts: list[dict[str, Any]] = [_part_schema("text", {"type": "string"})]
    for name, mime_types in modalities.items():
        url = {
            "type": "object",
            "properties": {"url": {"type": "string", "description": ", ".join(mime_types) or "a file"}},
            "required": ["url"],
        }
        data = {"type": "object", "properties": {"data": {"type": "string"}, "format": {"type": "string"}}}
        parts += [_part_schema(f"{name}{URL}", url), _part_schema(f"{INPUT}{name}", {**data, "required": ["data"]})]
    message = definitions["Message"]
    message["properties"]["content"] = {"oneOf": [{"type": "string"}, {"type": "array", "items": {"oneOf": parts}}]}
    schema["properties"]["messages"]["items"] = message
    for key, name in (("stream_options", "StreamOptions"), ("response_format", "ResponseFormat")):
        schema["properties"][key] = {"anyOf": [definitions[name], {"type": "null"}]}
    return schema


def _part_schema(kind: str, value: dict[str, Any]) -> dict[str, Any]:
    properties = {"type": {"const": kind}, kind: value}
    return {"type": "object", "title": kind, "properties": properties, "required": ["type", kind]}
