"""The frozen LLM: embeds text, runs on embeddings, generates.

Any decoder-only or encoder-decoder model that `transformers` loads; of the latter (T5) the encoder reads soft prompts
and instruction, and the decoder says the answer. Its weights never get gradients; activations pass them on to
the soft prompts. Likelihoods are read where labels are (`xblip.likelihood`): a prompt is mostly unlabelled.
"""

import contextlib
import functools
import hashlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xblip import trials
from xblip.activations import checkpoint_layers, keep_less, layers_of
from xblip.errors import BundleError, ConfigError, suggest
from xblip.frozen import Frozen, fingerprint, fingerprint_of_files, weight_files
from xblip.generation import check_generation_options, counted_penalty, is_of_the_model, says_how_to_cache, shown, until
from xblip.kv_cache import begun, begun_together, is_roomy
from xblip.likelihood import LabelReader
from xblip.loading import LOADING_ERRORS, cached_snapshot, first_line, load_model, why_not_loaded
from xblip.media_read import KeysValues
from xblip.packing import Packing
from xblip.parts import Rows, positions_at_once, sum_in_parts
from xblip.shared_attention import AttendToShared

IGNORE = -100
TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
DTYPES = ("auto", "bfloat16", "float16", "float32")


@dataclass
class LLMConfig:
    """Which LLM, and how it is loaded.

    Attributes:
      source: folder or hub id.
      revision: of a hub id.
      dtype: "float32", "bfloat16", "float16", or "auto" for the one its weights are stored in.
      tokens: special tokens in the place of the tokenizer's own, such as {"bos_token": "</s>"}, which InstructBLIP gives
        Vicuna; a wrong one gives silent rubbish.
      options: passed on to `from_pretrained` (device_map, attn_implementation, quantization_config, ...).
    """

    source: str
    revision: str | None = None
    dtype: str = "auto"
    tokens: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class PromptBatch:
    """What the router lays before the LLM.

    Attributes:
      inputs_embeds: (B, T, D_llm).
      attention_mask: (B, T), 1 for real positions.
      labels: (B, T), token ids to learn or score, -100 elsewhere, on the CPU; None when generating. An encoder-decoder's
        are the answers alone, (B, T_answer).
      lengths: positions of each row that the mask holds 1 for, where it is right-padded; None if they are not known.
      past: keys and values (1, heads, P, D_head) of every layer for the first P positions, which all rows share; padding
        then stands after these. None if nothing is known of any.
    """

    inputs_embeds: Tensor
    attention_mask: Tensor
    labels: Tensor | None = None
    lengths: list[int] | None = None
    past: KeysValues | None = None


class FrozenLLM(Frozen):
    """A language model that never trains, with its tokenizer.

    Attributes:
      width: D_llm.
      num_layers: of its transformer.
      is_encoder_decoder: the prompt goes to an encoder, the answer to a decoder.
      context_length: positions it knows, or None if its config does not say.
      fingerprint: identifies weights and vocabulary.
      runs_in_parts: training may run it any number of times in a step, which layers that processes share do not bear.
    """

    def __init__(self, model: Any, tokenizer: Any, *, config: LLMConfig):
        """Freezes a model that is loaded already.

        Args:
          model: the transformers model.
          tokenizer: its tokenizer.
          config: where both come from.

        Raises:
          BundleError: the tokenizer has no end-of-sequence token, without which no answer could end.
        """
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.config = config
        if tokenizer.eos_token_id is None:
            raise BundleError(
                f'The tokenizer of the LLM "{config.source}" has no end-of-sequence token, which ends every answer: '
                "set its eos_token."
            )
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.width = model.get_input_embeddings().embedding_dim
        self.is_encoder_decoder = bool(model.config.is_encoder_decoder)
        reader = (
            model.config.get_text_config(encoder=True) if self.is_encoder_decoder else model.config.get_text_config()
        )
        self.context_length = getattr(reader, "max_position_embeddings", None)
        self.fingerprint = _fingerprint(model, tokenizer, config)
        self.num_layers = len(layers_of(model))
        self.runs_in_parts = True
        self._layers_run_again = False
        self._labels = LabelReader(model)
        keep_less(model)
        self.freeze()

    @classmethod
    def from_pretrained(cls, config: LLMConfig) -> "FrozenLLM":
        """Loads model and tokenizer.

        Raises:
          BundleError: nothing can be loaded from the source, or weights are missing in it.
          ConfigError: an unknown dtype.
        """
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

        if config.dtype not in DTYPES:
            raise ConfigError(f'Unknown dtype "{config.dtype}" of the LLM.{suggest(str(config.dtype), DTYPES)}')
        for name in set(config.tokens) - set(TOKENS):
            raise ConfigError(f'Unknown special token "llm.tokens.{name}".{suggest(name, TOKENS)}')
        try:
            tokenizer = AutoTokenizer.from_pretrained(config.source, revision=config.revision, **config.tokens)
            architecture = AutoConfig.from_pretrained(config.source, revision=config.revision)
            auto_class = AutoModelForSeq2SeqLM if architecture.is_encoder_decoder else AutoModelForCausalLM
            model, missing, _ = load_model(
                auto_class,
                config.source,
                architecture,
                revision=config.revision,
                dtype=config.dtype,
                **config.options,
            )
        except LOADING_ERRORS as cause:
            given = ", ".join(f"{name}={value!r:.80}" for name, value in config.options.items())
            options = f" with {given}" if given else ""
            raise BundleError(
                f'Cannot load the LLM "{config.source}"{options}: {why_not_loaded(config.source, cause)} '
                "Expected the folder of a decoder-only or encoder-decoder "
                "transformers model with its tokenizer, or a hub id that is reachable or already downloaded."
            ) from cause
        if missing:
            raise BundleError(
                f'The LLM "{config.source}" lacks {len(missing)} weights, among them {min(missing)}: '
                f"they are not a {type(model).__name__}'s. Save it again, whole."
            )
        return cls(model, tokenizer, config=config)

    @property
    def device(self) -> torch.device:
        """Where embeddings go in."""
        return self.model.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the embeddings."""
        return self.model.get_input_embeddings().weight.dtype

    @property
    def positions_at_once(self) -> int | None:
        """How many positions' activations training holds at once; None for all of a batch."""
        if not self.runs_in_parts:
            return None
        return positions_at_once(self.device, self.dtype, layers=self.num_layers, width=self.width)

    def tokenize(self, text: str) -> list[int]:
        """Returns the ids of a piece of text, without any special token that is not spelt out in it."""
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def begins_with_bos(self) -> bool:
        """Whether the tokenizer begins every text with its beginning-of-sequence token."""
        bos = self.tokenizer.bos_token_id
        return bos is not None and self.tokenizer("a").input_ids[:1] == [bos]

    def prompt_end(self) -> list[int]:
        """Returns the ids that an encoder's tokenizer ends every text with (T5: its end of sequence)."""
        if not self.is_encoder_decoder:
            return []
        eos = self.tokenizer.eos_token_id
        return [eos] if self.tokenizer("a").input_ids[-1:] == [eos] else []

    def embed(self, ids: Sequence[int]) -> Tensor:
        """Returns the embeddings (T, D_llm) of token ids."""
        return self.model.get_input_embeddings()(torch.tensor(list(ids), dtype=torch.long, device=self.device))

    def logits(self, batch: PromptBatch) -> Tensor:
        """Returns the logits (B, T, vocabulary) of a right-padded batch; an encoder-decoder's (B, T_answer, vocabulary)."""
        return self._run(batch.inputs_embeds, self._others(batch)).logits

    def log_likelihood(self, batch: PromptBatch) -> tuple[Tensor, Tensor]:
        """Log-likelihood of all labelled tokens together, whose gradient takes the memory of one part of the batch.

        Args:
          batch: as for `token_log_likelihoods`.

        Returns:
          Two scalars: the sum over labelled tokens, float32, and their number.
        """
        positions = self.positions_at_once
        if not (positions and torch.is_grad_enabled() and batch.inputs_embeds.requires_grad):
            rows, mask = self._lay_out(batch)
            return self._read(rows).sum(), mask.sum()
        rows, mask = self._lay_out(batch, positions)
        return sum_in_parts(rows, positions, self._read), mask.sum()

    def token_log_likelihoods(self, batch: PromptBatch) -> tuple[Tensor, Tensor]:
        """Log-likelihood of each labelled token.

        Args:
          batch: right-padded, so that positions count from the start of each row.

        Returns:
          Two (B, T') tensors: log-likelihoods in float32, 0 where there is no label, and the mask of labels.
        """
        rows, mask = self._lay_out(batch)
        values = self._read(rows).to(self.device)
        return values.new_zeros(mask.shape).masked_scatter(mask, values), mask

    def checkpoint_layers(self) -> None:
        """Lets training keep what goes into each layer alone, and run the layer again for its backward pass.

        Raises:
          ConfigError: the model has no layers that can be run again.
        """
        checkpoint_layers(self.model)
        self._layers_run_again = True

    def _attends_one_by_one(self) -> bool:
        """Whether attention may run over one sample at a time (`EachAlone`), which layers that run again would not do."""
        is_sdpa = getattr(self.model.config, "_attn_implementation", None) == "sdpa"
        return self.device.type == "cpu" and is_sdpa and not self._layers_run_again

    def _lay_out(self, batch: PromptBatch, positions: int | None = None) -> tuple[Rows, Tensor]:
        """Returns a batch as the model reads it, and the mask (B, T') of its labels, in whose order they are read.

        Args:
          batch: right-padded.
          positions: of the parts that it will be read in, if it will be.
        """
        labels = batch.labels if self.is_encoder_decoder else batch.labels[:, 1:]
        mask = labels != IGNORE
        places, targets, mask = mask.nonzero(as_tuple=True), labels[mask], mask.to(self.device)
        one_by_one = positions is not None and self._attends_one_by_one()
        packing = self._packing(batch, positions if one_by_one else None)
        if not packing:
            return Rows(batch.inputs_embeds, self._others(batch), places, targets), mask
        embeds, numbers = packing.pack(batch.inputs_embeds)
        lengths = [[packing.lengths[sample] for sample in row] for row in packing.rows] if one_by_one else None
        return Rows(embeds, {"position_ids": numbers}, packing.find(*places), targets, lengths), mask

    def _read(self, rows: Rows) -> Tensor:
        return self._labels.read(lambda: self._run(rows.embeds, rows.others), rows.places, rows.targets)

    def _others(self, batch: PromptBatch) -> dict[str, Tensor]:
        """What the model is given of a batch that is not packed, beside embeddings."""
        others = {"attention_mask": batch.attention_mask}
        if self.is_encoder_decoder:
            labels = batch.labels.to(self.device)
            others["decoder_input_ids"] = self.model.prepare_decoder_input_ids_from_labels(labels=labels)
        return others

    def _run(self, embeds: Tensor, others: Mapping[str, Tensor]) -> Any:
        return self.model(inputs_embeds=embeds, use_cache=False, **others)

    _packs = functools.cached_property(trials.packs)
    _shares_beginnings = functools.cached_property(trials.shares_beginnings)

    def _packing(self, batch: PromptBatch, positions: int | None) -> Packing | None:
        """How to lay a batch out in fewer positions, where that helps and the model can tell samples in a row apart.

        In rows of so many positions, if attention runs over one sample at a time.
        """
        if (
            self.is_encoder_decoder or batch.lengths is None or not self._packs
        ):  # tried in the first step of all processes
            return None
        plan = Packing.fill(batch.lengths, positions) if positions else Packing.plan(batch.lengths, self.width)
        return plan if plan.is_worth_it else None

    @functools.cached_property
    def _takes_a_cache(self) -> bool:
        """Whether keys and values may be kept in our way."""
        known = "past_key_values" in inspect.signature(self.model.forward).parameters
        return known and not self.is_encoder_decoder and is_roomy(begun(self.model))

    def ends(self, options: Mapping[str, Any]) -> set[int]:
        """Returns the ids that end an answer, those of generation options among them."""
        stops = (self.tokenizer.eos_token_id, self.model.generation_config.eos_token_id, options.get("eos_token_id"))
        return {int(end) for stop in stops if stop is not None for end in (stop if np.iterable(stop) else [stop])}

    @functools.cached_property
    def last_logits_alone(self) -> dict[str, int]:
        """What lets the model compute logits at the last position alone, where it can."""
        return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(self.model.forward).parameters else {}

    def generate(self, batch: PromptBatch, *, kept: KeysValues | None = None, **options: Any) -> list[list[int]]:
        """Generates by transformers' `generate`.

        Args:
          batch: left-padded; for an encoder-decoder right-padded.
          kept: an empty list, to which keys and values of every layer are added, of the prompt and all of its answer that
            the model read; for one row.
          options: transformers' generation options.

        Returns:
          Each row's new token ids, ended before the first end-of-sequence token.

        Raises:
          ConfigError: an unknown option, or a value that transformers refuses.
        """
        check_generation_options(options)
        defaults = {"pad_token_id": self.tokenizer.pad_token_id, "tokenizer": self.tokenizer}
        cache, attention = None, contextlib.nullcontext()
        if self._takes_a_cache and not says_how_to_cache(options, self.model.generation_config):
            copies = max(options.get("num_beams") or 1, options.get("num_return_sequences") or 1)
            rows = len(batch.inputs_embeds) * copies
            if batch.past and rows > 1 and self._shares_beginnings:
                cache, attention = self._begin_together(batch, copies)
            else:
                cache = begun(self.model, batch.past, rows=rows)
            defaults["past_key_values"] = cache
        try:
            with torch.no_grad(), attention:
                rows = self.model.generate(
                    inputs_embeds=batch.inputs_embeds,
                    attention_mask=batch.attention_mask,
                    **{**defaults, **options, **counted_penalty(options, self.model.generation_config)},
                )
        except torch.OutOfMemoryError:
            raise
        except (ValueError, TypeError, AttributeError, OSError, RuntimeError) as cause:
            if is_of_the_model(cause, options):
                raise
            if options.get("stop_strings") and self._knows_whole_words_only():
                raise ConfigError(
                    "stop_strings does not work with this LLM's tokenizer, whose tokens are whole words: leave it out, "
                    "or cut the answer yourself."
                ) from cause
            raise ConfigError(f"These generation options are refused, {shown(options)}: {first_line(cause)}") from cause
        ends = self.ends(options)
        if kept is not None:
            kept += [(layer.keys, layer.values) for layer in cache.layers]
        start = 1 if self.is_encoder_decoder else 0  # the decoder's start token
        return [until(row[start:].tolist(), ends) for row in rows]

    @torch.no_grad()
    def _begin_together(self, batch: PromptBatch, copies: int) -> tuple[Any, AttendToShared]:
        """Makes a cache of rows that share their past, and the context to run in; reads all but their ends, unpadded."""
        cache, attention = begun_together(self.model, batch.past)
        new = slice(batch.past[0][0].shape[2], -1)
        places = batch.attention_mask[:, new].bool()
        if not places.all() and places.any():
            positions = (batch.attention_mask.cumsum(1) - 1)[:, new][places]
            with attention, attention.packed(places):
                self.model(
                    inputs_embeds=batch.inputs_embeds[:, new][places][None],
                    position_ids=positions[None],
                    past_key_values=cache,
                    use_cache=True,
                    **self.last_logits_alone,
                )
            cache.batch_repeat_interleave(copies)
        return cache, attention

    def _knows_whole_words_only(self) -> bool:
        """Whether a made-up word is unknown to the tokenizer, which transformers' stop strings must spell."""
        return self.tokenize("abcdef") == [self.tokenizer.unk_token_id]


def _fingerprint(model: Any, tokenizer: Any, config: LLMConfig) -> str:
    """Of the stored weights when there are files, so that dtype and quantisation do not matter; not of a skeleton."""
    digest = hashlib.sha256()
    folder = Path(config.source) if Path(config.source).is_dir() else None
    if folder is None and (revision := getattr(model.config, "_commit_hash", None)):
        folder = cached_snapshot(config.source, revision)
    files = weight_files(folder) if folder and not model.get_input_embeddings().weight.is_meta else []
    digest.update((fingerprint_of_files(files) if files else fingerprint(model)).encode())
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    digest.update(repr(vocabulary).encode())
    return digest.hexdigest()[:16]
