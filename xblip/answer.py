"""What the LLM said, with how it was asked for as long as somebody may want it explained."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from xblip.errors import InputError
from xblip.explain import Asked, Explanation, explain
from xblip.llm import FrozenLLM


@dataclass(frozen=True)
class Answer:
    """What the LLM said.

    Attributes:
      text: the answer.
      num_prompt_tokens: positions of the prompt, soft ones included.
      num_new_tokens: tokens generated, the end of sequence not counted.
      token_ids: these tokens.
    """

    text: str
    num_prompt_tokens: int
    num_new_tokens: int
    token_ids: tuple[int, ...] = field(default=(), repr=False)

    # How it was asked for; no field, since comparing, printing and copying an answer is about what it says.
    _asked = None

    def __str__(self) -> str:
        return self.text

    def __getstate__(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def of(cls, llm: FrozenLLM, rows: Sequence[Sequence[int]], lengths: Sequence[int]) -> "list[Answer]":
        """Makes answers of what was generated, as many a prompt as there are more rows than prompts' lengths."""
        repeats = len(rows) // len(lengths)
        texts = [llm.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in rows]
        return [
            cls(text, lengths[index // repeats], len(ids), tuple(ids))
            for index, (text, ids) in enumerate(zip(texts, rows, strict=True))
        ]

    def asked_as(self, asked: Callable[[], Asked]) -> "Answer":
        """Lets an answer know how it was asked for, told when it is to be explained; returns it."""
        object.__setattr__(self, "_asked", asked)
        return self

    def explain(self) -> Explanation:
        """Measures what the answer came from: its inputs, their segments, and where in them queries looked.

        Raises:
          InputError: it is not what `ask` or `chat` returned, is empty, or came without inputs.
        """
        if self._asked is None:
            raise InputError(
                "This answer does not hold what it came from, so that it can be small: ask again by `ask` or `chat`, and "
                "explain what that returns, not a copy of it nor an answer of `generate`."
            )
        return explain(self._asked(), self.text, self.token_ids)
