"""Retrieval models of `transformers` (BLIP-2's first stage) as retrievers.

There the embeddings of texts lie outside of the Q-Former, and may be fewer than the tokenizer's words, since its
processor adds one that stands for media; ours have a row for each word, so that any text can be read.
"""

import tempfile
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from xblip.branch import BranchConfig
from xblip.checkpoint import Checkpoint
from xblip.convert_transformers import load_whole, qformer_parts
from xblip.errors import BundleError
from xblip.retrieval import Retriever

RETRIEVERS = ("Blip2ForImageTextRetrieval",)
"""Classes of transformers that retrieve."""
HEADS = {"media_projection": "vision_projection", "text_projection": "text_projection", "matching_head": "itm_head"}
"""Our names of the heads, and theirs."""


def from_retriever(checkpoint: Checkpoint, folder: Path, *, only: str = "") -> str:
    """Makes a retriever in `folder`, of the modality `only` if one is named; returns what it made.

    Raises:
      BundleError: it lacks weights, or reads no texts or another modality than is wanted.
    """
    modality, model, processor = load_whole(checkpoint, only=only)
    reads = model.config.qformer_config
    if not reads.use_qformer_text_input:
        raise BundleError(f"The Q-Former of {checkpoint.path} reads no texts: use_qformer_text_input is false.")
    if len(processor.tokenizer) - 1 > reads.vocab_size:
        raise BundleError(
            f"Its Q-Former knows {reads.vocab_size} tokens, and the tokenizer beside it {len(processor.tokenizer)}, one of "
            "them for media: save the processor that belongs to it."
        )
    with tempfile.TemporaryDirectory(dir=folder) as staging:
        parts = qformer_parts(model, processor.tokenizer, Path(staging))
        encoder = Path(staging, "encoder")
        parts.vision.save_pretrained(encoder)
        processor.image_processor.save_pretrained(encoder)
        bridge = {**parts.bridge, "embedding_width": model.config.image_text_hidden_size}
        retriever = Retriever.build(BranchConfig(modality, config={"encoder": str(encoder)}, bridge=bridge))
        own = retriever.branch.bridge
        weights = parts.weights | _embeddings(model, own.qformer.embeddings)
        for ours, theirs in HEADS.items():
            weights |= {f"{ours}.{name}": value for name, value in getattr(model, theirs).state_dict().items()}
        own.load_state_dict({name: value.float() for name, value in weights.items()}, strict=True)
        retriever.save_pretrained(folder)
    checkpoint.taken.update(checkpoint.tensors)
    return f"retriever: {modality}"


def _embeddings(model: nn.Module, own: nn.Module) -> dict[str, Tensor]:
    """Their embeddings of words and positions by our names, with as many rows as ours have."""
    weights = {}
    for name, value in model.embeddings.state_dict().items():
        rows = own.get_parameter(name).shape[0]
        weights[f"qformer.embeddings.{name}"] = F.pad(value, (0, 0, 0, rows - value.shape[0]))
    return weights
