"""The next token of one request: transformers' own processors, with chance of the request's own.

What is drawn for one request hangs on its seed alone, not on who else is asking, so that an answer can be had again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xblip.errors import ConfigError, InputError
from xblip.generation import shown
from xblip.loading import first_line

DEFAULTS: dict[str, Any] = {
    "max_new_tokens": 64,
    "min_new_tokens": 0,
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "min_p": None,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
}
"""What a sampler does, with transformers' defaults."""
NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True, "length_penalty": 1.0}
"""Other options that change nothing at these values, as any that is false or 0."""
ELSEWHERE = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"),
    *("max_length", "transformers_version"),
}
"""Options that are known by other ways or give way to others, and facts that lie among them."""


@dataclass(frozen=True)
class Drawn:
    """A token, its log-probability before anything changed the logits, and the likeliest tokens with theirs."""

    token: int
    log_probability: float
    top: list[tuple[int, float]]


class Sampler:
    """Draws the tokens of one answer.

    Attributes:
      ids: drawn so far.
    """

    def __init__(
        self,
        options: Mapping[str, Any],
        *,
        ends: Sequence[int],
        device: torch.device,
        seed: int | None = None,
        top_log_probabilities: int = 0,
    ):
        """Prepares for one answer.

        Args:
          options: of those in `DEFAULTS`; others are left alone, see `knows`.
          ends: ids that end an answer.
          device: of the logits.
          seed: of what is drawn; None for one of chance.
          top_log_probabilities: how many of the likeliest tokens are told with each.

        Raises:
          ConfigError: a value that transformers refuses.
        """
        self.ids: list[int] = []
        self._ends = list(ends)
        self._top = top_log_probabilities
        given = {**DEFAULTS, **options}
        self._draws = given["do_sample"]
        self._generator = torch.Generator(device)
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)
        try:
            self._processors = _processors(given, ends, device)
        except (ValueError, TypeError) as cause:
            raise ConfigError(f"These generation options are refused, {shown(options)}: {first_line(cause)}") from cause

    @staticmethod
    def knows(options: Mapping[str, Any]) -> bool:
        """Whether generation options ask for nothing that only transformers' `generate` does."""
        others = {name: value for name, value in options.items() if name not in DEFAULTS and name not in ELSEWHERE}
        return all(not value or name.startswith("_") or value == NEUTRAL.get(name) for name, value in others.items())

    def draw(self, logits: Tensor) -> Drawn:
        """Draws the next token from its logits (vocabulary,), and remembers it.

        Raises:
          InputError: what the options make of the logits is nothing that can be drawn from.
        """
        scores = logits[None]
        said = torch.tensor([self.ids], dtype=torch.long, device=logits.device)
        for processor in self._processors:
            scores = processor(said, scores)
        if not scores.amax().isfinite():  # on an accelerator drawing from these ends the whole process's work
            raise InputError(
                "The scores for the next token are no numbers that can be compared: use a higher temperature, a "
                "repetition_penalty nearer to 1, or other inputs."
            )
        if self._draws:
            token = int(torch.multinomial(scores.softmax(-1), 1, generator=self._generator))
        else:
            token = int(scores.argmax(-1))
        self.ids.append(token)
        likelihoods = logits.log_softmax(-1)
        values, indices = likelihoods.topk(min(self._top, len(likelihoods)))
        return Drawn(token, float(likelihoods[token]), list(zip(indices.tolist(), values.tolist(), strict=True)))

    @property
    def has_ended(self) -> bool:
        return bool(self.ids) and self.ids[-1] in self._ends


def _processors(given: Mapping[str, Any], ends: Sequence[int], device: torch.device) -> list[Any]:
    """In transformers' order."""
    from transformers import generation as own

    found: list[Any] = []
    if given["repetition_penalty"] not in (None, 1):
        found.append(own.RepetitionPenaltyLogitsProcessor(given["repetition_penalty"]))
    if given["no_repeat_ngram_size"]:
        found.append(own.NoRepeatNGramLogitsProcessor(given["no_repeat_ngram_size"]))
    if given["min_new_tokens"]:
        found.append(own.MinNewTokensLengthLogitsProcessor(0, given["min_new_tokens"], list(ends), device=str(device)))
    if not given["do_sample"]:
        return found
    if given["temperature"] not in (None, 1):
        found.append(own.TemperatureLogitsWarper(given["temperature"]))
    if given["top_k"]:
        found.append(own.TopKLogitsWarper(given["top_k"]))
    if given["top_p"] is not None and given["top_p"] < 1:
        found.append(own.TopPLogitsWarper(given["top_p"]))
    if given["min_p"] is not None:
        found.append(own.MinPLogitsWarper(given["min_p"]))
    if given["typical_p"] is not None and given["typical_p"] < 1:
        found.append(own.TypicalLogitsWarper(given["typical_p"]))
    return found
