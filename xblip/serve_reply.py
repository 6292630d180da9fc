"""What the server says, in OpenAI's form: completions, pieces of them, errors."""

import json
import logging
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from xblip.errors import BusyError, ClosedError, LateError, PluginError, XBlipError

if TYPE_CHECKING:  # a proxy that says errors need not import torch
    from xblip.requests import Finished, Said
    from xblip.sampling import Drawn

Json = dict[str, Any]
BEFORE = 8
"""Tokens before one that its text may depend on: space, and bytes of one character."""
log = logging.getLogger("xblip.serve")


class Refused(Exception):
    """A request that is refused for what it is, and not for what it asks: a status, a message and a code of OpenAI's."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error", code: str | None = None):
        super().__init__(message)
        self.status, self.kind, self.code = status, kind, code


class LeftError(XBlipError):
    """The client left before its answer was whole."""

    def __init__(self):
        super().__init__("The client left before its answer was whole.")


class Replies:
    """Replies to one request.

    Attributes:
      id: of the request.
      model: what the client calls the model.
    """

    def __init__(self, *, id: str, model: str, tokenizer: Any, tells_log_probabilities: bool):
        self.id, self.model = id, model
        self._tokenizer, self._tells, self._created = tokenizer, tells_log_probabilities, int(time.time())
        self._before: dict[int, list[int]] = defaultdict(list)

    def completion(self, finished: Sequence["Finished"]) -> Json:
        """All choices with their counts."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": one.answer.text, "refusal": None},
                "logprobs": self._log_probabilities(index, one.drawn),
                "finish_reason": one.reason,
            }
            for index, one in enumerate(finished)
        ]
        return {**self._head("chat.completion"), "choices": choices, "usage": usage(finished)}

    def first(self, index: int) -> Json:
        """The piece that begins a choice."""
        return self._piece(index, {"role": "assistant", "content": ""})

    def said(self, index: int, said: "Said") -> Json:
        return self._piece(index, {"content": said.text}, self._log_probabilities(index, said.drawn))

    def last(self, index: int, finished: "Finished") -> Json:
        return self._piece(index, {}, reason=finished.reason)

    def usage(self, finished: Sequence["Finished"]) -> Json:
        """The piece after all choices that has the counts."""
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": usage(finished)}

    def _head(self, kind: str) -> Json:
        return {"id": self.id, "object": kind, "created": self._created, "model": self.model}

    def _piece(self, index: int, delta: Json, logprobs: Json | None = None, reason: str | None = None) -> Json:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def _log_probabilities(self, index: int, drawn: Sequence["Drawn"]) -> Json | None:
        """Of the tokens that a choice goes on with."""
        if not self._tells:
            return None
        told, before = [], self._before[index]
        for one in drawn:
            known = self._tokenizer.decode(before)
            chosen, *top = [
                self._token(before, known, token, value)
                for token, value in [(one.token, one.log_probability), *one.top]
            ]
            told.append({**chosen, "top_logprobs": top})
            before[:] = [*before, one.token][-BEFORE:]
        return {"content": told, "refusal": None}

    def _token(self, before: list[int], known: str, token: int, log_probability: float) -> Json:
        """A token as what it adds to the text `known` of those before it, so that tokens put together are the text."""
        text = self._tokenizer.decode([*before, token])
        text = text[len(known) :] if text.startswith(known) else self._tokenizer.decode([token])
        is_whole = "\ufffd" not in text  # a token may be a part of a character
        return {
            "token": text,
            "logprob": max(log_probability, -9999.0),
            "bytes": list(text.encode()) if is_whole else None,
        }


def usage(finished: Sequence["Finished"]) -> Json:
    """Counts of tokens: soft prompts count as what the LLM reads of them, and a prompt once however many choices it has."""
    prompt = finished[0].answer.num_prompt_tokens
    said = sum(one.answer.num_new_tokens for one in finished)
    return {"prompt_tokens": prompt, "completion_tokens": said, "total_tokens": prompt + said}


STATUS = {
    ClosedError: (503, "server_error"),
    BusyError: (429, "rate_limit_error"),
    LateError: (504, "timeout_error"),
    PluginError: (500, "server_error"),
    LeftError: (499, "invalid_request_error"),
}


def status_of(error: Exception) -> tuple[int, str]:
    """Returns the HTTP status of an error, and its type in OpenAI's words."""
    if type(error) is XBlipError or not isinstance(error, XBlipError):
        return 500, "server_error"
    return STATUS.get(type(error), (400, "invalid_request_error"))


def refusal(error: Exception, *, method: str = "This") -> tuple[int, Json, dict[str, str]]:
    """Returns status, body and headers that tell a client what is wrong, and never the insides of it, which are logged."""
    headers = {}
    if isinstance(error, Refused):
        status, body = error.status, error_body(str(error), error.kind, code=error.code)
    elif isinstance(error, XBlipError):
        status, kind = status_of(error)
        body = error_body(str(error), kind, place=error.place)
    elif getattr(error, "status_code", None) in (404, 405):
        status = error.status_code
        what = "There is nothing here" if status == 404 else f"{method} is not done here"
        body = error_body(f"{what}: see /openapi.json for what there is.", "invalid_request_error")
    elif isinstance(error, TimeoutError):
        status, body = 408, error_body("The request took too long to come in: send it again, faster.", "timeout_error")
    else:
        log.error("a request failed", exc_info=error)
        status, body = 500, error_body("The server failed at this request, and its log says why.", "server_error")
    if status in (429, 503):
        headers["Retry-After"] = "1"
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return status, body, headers


def error_body(message: str, kind: str, *, place: str | None = None, code: str | None = None) -> Json:
    return {"error": {"message": message, "type": kind, "param": place, "code": code}}


def event(data: Mapping[str, Any] | str) -> bytes:
    """A server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode(errors="replace")
