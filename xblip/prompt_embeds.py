"""Prompts as embeddings, for servers that run the LLM elsewhere: what vLLM takes as `prompt_embeds`.

A file of them is safetensors, which runs nothing when it is read, and says which LLM its embeddings are for.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save
from torch import Tensor

from xblip.context import make_prompts
from xblip.errors import BundleError, InputError
from xblip.sample import Sample
from xblip.tables import write_whole

if TYPE_CHECKING:
    from xblip.model import XBlip


def to_prompt_embeds(
    model: "XBlip", samples: Sequence[Sample | Mapping[str, Any]], file: str | Path | None
) -> list[Tensor]:
    """Lays out samples without asking them; see `XBlip.to_prompt_embeds`."""
    if model.llm.is_encoder_decoder:
        raise InputError(
            "Prompt embeddings are for decoder-only LLMs, and this one is an encoder-decoder: ask it by `generate`."
        )
    checked = model.reader.encoded([model.sample(sample) for sample in samples])
    prompts = make_prompts(model, checked, [model.generation["max_new_tokens"]] * len(checked))
    embeds = [prompt.embeds.detach().cpu() for prompt in prompts]
    if file is not None:
        _write(model, embeds, Path(file))
    return embeds


def _write(model: "XBlip", embeds: Sequence[Tensor], file: Path) -> None:
    about = {"llm": str(model.llm.config.source), "llm_fingerprint": model.llm.fingerprint}
    tensors = {f"prompt_embeds.{index}": value.contiguous() for index, value in enumerate(embeds)}
    try:
        write_whole(file, lambda out: out.write(save(tensors, metadata=about)))
    except OSError as cause:
        raise BundleError(f"Cannot write {file}: {cause.strerror}. Make room, or give another file.") from cause
