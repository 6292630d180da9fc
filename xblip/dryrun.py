"""Dry runs: one sample of each modality through a model without weights, for its shapes and what it takes of memory.

Media are read in earnest, by the modality's settings and the encoder's own processor; from there on tensors lie on the
meta device and have shapes alone. What training keeps for its backward pass is counted tensor by tensor.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from xblip.blueprint import Blueprint, Source
from xblip.costs import BYTES_OF_TRAINING, Costs, Flops, costs_of, step_flops, stored_bytes
from xblip.llm import IGNORE, PromptBatch
from xblip.loading import first_line
from xblip.model import XBlip
from xblip.sample import Media, Sample

INSTRUCTION = "What is this?"
UNKNOWN = (RuntimeError, ValueError)
"""What networks raise that look at values, or want a precision, which tensors on the meta device have not."""


@dataclass
class Part:
    """One network of a model.

    Attributes:
      name: such as "LLM".
      network: its class.
      frozen, trained: parameters, those of parts above it left out.
      dtype: of its parameters.
      weight_bytes: of its parameters, those of parts above it left out.
      shares: the part above that holds all of it; "" if none does.
    """

    name: str
    network: str
    frozen: int
    trained: int
    dtype: str
    weight_bytes: int
    shares: str = ""


@dataclass
class Way:
    """A modality's way from one example to the LLM.

    Attributes:
      loaded: shapes of the tensors that its media become, by name.
      features: (S, N, D_enc).
      soft_prompt: (L, D_llm).
      features_bytes: of a thousand files, each like the example.
      training_bytes: what training takes, with this modality alone: weights, gradients and optimizer, activations of
        bridge and LLM.
      costs: of this modality before the LLM, for steps of any lengths.
      flops: by part, of training on one such sample.
      error: why all but `loaded` is unknown, or "".
    """

    loaded: dict[str, list[int]]
    features: list[int] = field(default_factory=list)
    soft_prompt: list[int] = field(default_factory=list)
    features_bytes: int = 0
    training_bytes: dict[str, int] = field(default_factory=dict)
    costs: Costs | None = None
    flops: dict[str, Flops] = field(default_factory=dict)
    error: str = ""


@dataclass
class Report:
    """What a dry run found.

    Attributes:
      batch_size: samples at once.
      num_beams: rows of each while asking.
      num_new_tokens: of an answer.
      positions_at_once: that the LLM reads in training; None for all of a batch.
      parts, ways, sources: see there; ways by modality.
      prompt_positions: of a prompt with one input of each modality.
      soft_positions: of these, those of soft prompts.
      is_estimate: the LLM's tokenizer is not here, and words were counted in the place of tokens.
      logits: shape of the LLM's answer to that prompt, of the last position alone.
      asking_bytes: what asking takes: weights, cache of keys and values, logits.
      error: why the last five are unknown, or "".
    """

    batch_size: int
    num_beams: int
    num_new_tokens: int
    positions_at_once: int | None
    parts: list[Part] = field(default_factory=list)
    ways: dict[str, Way] = field(default_factory=dict)
    sources: list[Source] = field(default_factory=list)
    prompt_positions: int = 0
    soft_positions: int = 0
    is_estimate: bool = False
    logits: list[int] = field(default_factory=list)
    asking_bytes: dict[str, int] = field(default_factory=dict)
    error: str = ""


def dry_run(blueprint: Blueprint, *, batch_size: int) -> Report:
    """Runs a model on the meta device.

    Raises:
      XBlipError: a modality has no example, or cannot read it here; or the parts do not fit each other.
    """
    model = blueprint.model
    new, beams = model.generation["max_new_tokens"], model.generation.get("num_beams", 1)
    report = Report(
        batch_size,
        beams,
        new,
        model.llm.positions_at_once,
        sources=blueprint.sources,
        is_estimate=not blueprint.has_its_tokenizer,
    )
    report.parts = _parts(model)
    with _on_meta():
        for name, item in blueprint.items.items():
            way = report.ways[name] = Way({key: list(tensor.shape) for key, tensor in item.items()})
            try:
                _go(way, model, name, item, batch_size=batch_size, num_new_tokens=new)
            except UNKNOWN as error:
                way.error = f"it cannot be tried without weights: {first_line(error)}"
        try:
            _ask(model, {name: item for name, item in blueprint.items.items() if not report.ways[name].error}, report)
        except UNKNOWN as error:
            report.error = f"asking cannot be tried without weights: {first_line(error)}"
    return report


def _parts(model: XBlip) -> list[Part]:
    modules: dict[str, tuple[nn.Module, str]] = {}
    for name, branch in model.branches.items():
        inner = getattr(branch.encoder.module, "model", branch.encoder.module)
        modules[f"{name} encoder"] = (branch.encoder, type(inner).__name__)
        modules[f"{name} bridge"] = (branch.bridge, branch.bridge.name)
    modules["LLM"] = (model.llm, type(model.llm.model).__name__)
    parts, owners = [], {}
    for name, (module, network) in modules.items():
        held = {id(parameter): parameter for parameter in module.parameters()}
        own = [parameter for key, parameter in held.items() if key not in owners]
        trained = sum(parameter.numel() for parameter in own if parameter.requires_grad)
        total = sum(parameter.numel() for parameter in own)
        dtypes = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in held.values()})
        shares = owners[next(iter(held))] if held and not own else ""
        size = sum(parameter.nbytes for parameter in own)
        parts.append(Part(name, network, total - trained, trained, ", ".join(dtypes), size, shares))
        owners |= {key: owners.get(key, name) for key in held}
    return parts


def _go(way: Way, model: XBlip, name: str, item: dict[str, Tensor], *, batch_size: int, num_new_tokens: int) -> None:
    """Fills in a modality's way.

    Raises:
      UNKNOWN: it cannot be tried.
    """
    branch = model.branches[name]
    costs, features = costs_of(lambda: branch.encode([item]), branch.bridge, model.llm, instruction=INSTRUCTION)
    (soft,) = branch.bridge(features, [INSTRUCTION])
    encoder = next((weight.dtype for weight in branch.encoder.parameters()), features.values.dtype)
    own = {id(weight): weight for part in (branch, model.llm) for weight in part.parameters()}.values()
    trained = sum(weight.numel() for weight in own if weight.requires_grad)
    branch.train()
    of_bridge, of_llm = _activations(model, name, item, own, rows=batch_size, num_new_tokens=num_new_tokens)
    branch.eval()
    way.features, way.soft_prompt = list(features.values.shape), list(soft.shape)
    way.features_bytes = 1000 * stored_bytes(*way.features, str(encoder).removeprefix("torch."))
    way.training_bytes = {
        "weights": sum(weight.nbytes for weight in own),
        "gradients and AdamW": trained * BYTES_OF_TRAINING,
        "bridge's activations": of_bridge,
        "LLM's activations": of_llm,
    }
    segments, tokens, _ = way.features
    tokenizer = getattr(branch.bridge, "tokenizer", None)
    prompt = _prompts(model, [Media(name, item)], 1).attention_mask.shape[1]
    way.costs = costs
    way.flops = step_flops(
        costs,
        segments=segments,
        tokens=tokens,
        text=len(tokenizer(INSTRUCTION).input_ids) if tokenizer else 0,
        positions=[prompt if model.llm.is_encoder_decoder else prompt + num_new_tokens],
        labels=num_new_tokens,
    )


def _activations(
    model: XBlip, name: str, item: dict[str, Tensor], weights: Any, *, rows: int, num_new_tokens: int
) -> tuple[int, int]:
    """Bytes that training on answers of so many tokens holds at once, for so many questions about one input each.

    Returns:
      What the bridge keeps of all rows, and the LLM of those that it reads at once.
    """
    llm = model.llm
    prompts: list[PromptBatch] = []
    of_bridge = _saved_bytes(lambda: prompts.append(_prompts(model, [Media(name, item)], rows)), weights)
    [batch] = prompts
    batch.labels = torch.zeros(rows, num_new_tokens, dtype=torch.long)
    if not llm.is_encoder_decoder:
        answers = llm.embed([0] * num_new_tokens).expand(rows, -1, -1)
        prompt = batch.attention_mask.shape[1]
        mask = batch.attention_mask.new_ones(rows, prompt + num_new_tokens)
        labels = F.pad(batch.labels, (prompt, 0), value=IGNORE)
        batch = PromptBatch(torch.cat([batch.inputs_embeds, answers], 1), mask, labels)
    length = batch.inputs_embeds.shape[1]
    once = slice(max(1, (llm.positions_at_once or rows * length) // length))
    embeds = batch.inputs_embeds[once].detach().requires_grad_()
    part = PromptBatch(embeds, batch.attention_mask[once], batch.labels[once])
    return of_bridge, _saved_bytes(lambda: llm.token_log_likelihoods(part), weights)


def _prompts(model: XBlip, media: list[Media], rows: int) -> PromptBatch:
    sample = model.sample(Sample(INSTRUCTION, media))
    return model.router.assemble([model.router.pieces(sample)] * rows, model.soft_prompts([sample] * rows))


@torch.no_grad()
def _ask(model: XBlip, items: dict[str, dict[str, Tensor]], report: Report) -> None:
    """Fills in what asking with one input of each modality says.

    Raises:
      UNKNOWN: it cannot be tried.
    """
    llm, rows, new = model.llm, report.batch_size * report.num_beams, report.num_new_tokens
    batch = _prompts(model, [Media(name, item) for name, item in items.items()], rows)
    report.prompt_positions = batch.attention_mask.shape[1]
    report.soft_positions = sum(report.ways[name].soft_prompt[0] for name in items)
    options: dict[str, Any] = {"inputs_embeds": batch.inputs_embeds, "use_cache": True}
    if llm.is_encoder_decoder:
        options["decoder_input_ids"] = torch.zeros(rows, new, dtype=torch.long, device=llm.device)
    else:
        answers = llm.embed([0] * new).expand(rows, -1, -1)
        options["inputs_embeds"] = torch.cat([batch.inputs_embeds, answers], 1)
    output = llm.model(**options)
    report.logits = [rows, 1, output.logits.shape[-1]]
    report.asking_bytes = {
        "weights": sum(part.weight_bytes for part in report.parts),
        "keys and values": sum(tensor.nbytes for tensor in _tensors(output.get("past_key_values"))),
        "logits": rows * output.logits.shape[-1] * 4,
    }


def _tensors(cache: Any) -> Iterator[Tensor]:
    """What a cache of transformers holds, of an encoder-decoder its two; nothing if there is none."""
    parts = [getattr(cache, name) for name in ("self_attention_cache", "cross_attention_cache") if hasattr(cache, name)]
    for part in parts or [cache]:
        for layer in getattr(part, "layers", ()):
            yield from (value for value in vars(layer).values() if isinstance(value, Tensor))


def _saved_bytes(run: Callable[[], Any], weights: Any) -> int:
    """Bytes of the distinct tensors that a forward pass saves for its backward pass, `weights` left out."""
    known = {weight.untyped_storage()._cdata for weight in weights}
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            saved[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(storage.nbytes() for storage in saved.values())


@contextmanager
def _on_meta() -> Iterator[None]:
    """Lets pass what asks for values that tensors on the meta device have not: masks hold for all that they cover."""
    from torch.fx.experimental import _config

    with _config.patch(meta_nonzero_assume_all_nonzero=True), _MasksHold():
        yield


class _MasksHold(TorchFunctionMode):
    """Takes conditions as true, and attention as the fused kernels that accelerators run."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.__bool__ and args[0].is_meta:
            return True
        if func is F.scaled_dot_product_attention:
            return _FusedAttention.apply(*args[:3])
        return func(*args, **(kwargs or {}))


class _FusedAttention(torch.autograd.Function):
    """Attention's shapes; it keeps what fused kernels do: its inputs, its output, and one number per query.

    Its products are done for who counts operations.
    """

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = (query @ _per_head(key, query).mT) @ _per_head(value, query)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, *_ = ctx.saved_tensors
        keys, values = _per_head(key, query), _per_head(value, query)
        scores = gradient @ values.mT
        for product in (scores.mT @ gradient, scores @ keys, scores.mT @ query):
            assert product.is_meta
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _per_head(states: Tensor, query: Tensor) -> Tensor:
    """Keys or values of groups of heads, once for each head."""
    return states.repeat_interleave(query.shape[-3] // states.shape[-3], -3)
