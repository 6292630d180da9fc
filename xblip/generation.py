"""Generation options: those of transformers, checked by name before anything heavy begins."""

import inspect
import traceback
from collections.abc import Mapping
from numbers import Integral
from typing import Any

from xblip.errors import ConfigError, suggest

COUNTS = ("max_new_tokens", "num_beams", "num_return_sequences")
MISPLACED = {
    "generation_config": "give its options one by one, e.g. max_new_tokens=20.",
    "max_length": "prompts differ in length by their inputs; use max_new_tokens.",
    "return_dict_in_generate": "answers are text. For likelihoods use `score`.",
}
"""Generation options of transformers that are refused, and what to do instead."""

OWN_CACHE = {
    "past_key_values",
    "cache_implementation",
    "cache_config",
    "use_cache",
    "assistant_model",
    "prompt_lookup_num_tokens",
}
"""Options that say how keys and values are kept, so that they are not kept in our way."""
SAYS_NOTHING = {"use_cache": True, "cache_implementation": "hybrid"}
"""What these may be in a model's generation config beside None, and say nothing; transformers unsets "hybrid" there."""


OF_LOGITS = {
    *("max_new_tokens", "min_new_tokens", "eos_token_id", "stop_strings", "stopping_criteria", "num_return_sequences"),
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "no_repeat_ngram_size"),
    *("num_beams", "length_penalty", "early_stopping"),
}
"""Options that say what is made of the model's logits; others may have it run in a way that it cannot."""


def check_generation_options(options: Mapping[str, Any]) -> None:
    """Raises `ConfigError` for an option that transformers' generation does not know, or that has no place here."""
    if not isinstance(options, Mapping):
        raise ConfigError(
            f'Generation options must be names with values, such as {{"max_new_tokens": 20}}, not {options!r:.80}.'
        )
    known = generation_option_names()
    for name, value in options.items():
        if name not in known:
            raise ConfigError(
                f'Unknown generation option "{name}".{suggest(str(name), known)} '
                "They are those of transformers' GenerationConfig."
            )
        if name in MISPLACED:
            raise ConfigError(f"{name} has no place here: {MISPLACED[name]}")
        if name in COUNTS and (not isinstance(value, Integral) or isinstance(value, bool) or value < 1):
            raise ConfigError(f"{name} must be a whole number of at least 1, not {value!r}.")


def generation_option_names(*, objects: bool = True) -> set[str]:
    """Returns the names of transformers' generation options: settings, and `objects` such as `streamer`."""
    from transformers import GenerationConfig, GenerationMixin

    settings = {name for name in vars(GenerationConfig()) if not name.startswith("_")} - {"transformers_version"}
    parameters = set(inspect.signature(GenerationMixin.generate).parameters) - {"self", "inputs", "kwargs"}
    return settings | parameters if objects else settings


def shown(options: Mapping[str, Any]) -> str:
    """Returns options as a message lists them: settings, since objects say nothing to whoever reads it."""
    settings = generation_option_names(objects=False)
    return ", ".join(f"{name}={value!r:.80}" for name, value in options.items() if name in settings)


def says_how_to_cache(options: Mapping[str, Any], defaults: Any) -> bool:
    """Whether options, or the model's generation config, say how keys and values are kept."""
    own = any(getattr(defaults, name, None) not in (None, SAYS_NOTHING.get(name)) for name in OWN_CACHE)
    return own or not OWN_CACHE.isdisjoint(options)


def counted_penalty(options: Mapping[str, Any], defaults: Any) -> dict[str, Any]:
    """Puts a processor of our own in the place of `repetition_penalty`; `defaults` are the model's generation config.

    That of transformers (5.23) leaves out as many ids as a row has padding, but of embeddings only the answer has ids: the
    more padding, the fewer of an answer's tokens would count as said.
    """
    from transformers import RepetitionPenaltyLogitsProcessor

    penalty = options.get("repetition_penalty", defaults.repetition_penalty)
    if penalty in (None, 1):
        return {}
    own = RepetitionPenaltyLogitsProcessor(penalty)
    return {"repetition_penalty": 1.0, "logits_processor": [own, *(options.get("logits_processor") or ())]}


def until(ids: list[int], ends: set[int]) -> list[int]:
    """Returns ids before the first that ends an answer."""
    return next((ids[:index] for index, token in enumerate(ids) if token in ends), ids)


def is_of_the_model(error: Exception, options: Mapping[str, Any]) -> bool:
    """Whether it is the model that failed while it generated with these options, and none of them that was refused."""
    steps = traceback.walk_tb(error.__traceback__)
    failed_inside = isinstance(error, RuntimeError) and any(frame.f_code.co_name == "forward" for frame, _ in steps)
    return failed_inside and options.keys() <= OF_LOGITS
