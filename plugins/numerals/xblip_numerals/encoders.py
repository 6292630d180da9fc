"""The small encoders of the numerals world as they begin, the readout that they learn through, and how they are trained.

The readout attends to tokens without adding positions, as a Q-Former does: what it can tell, the tokens say by themselves,
place in the picture included. Pictures and videos share an encoder, which learns from both.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from xblip_numerals.augment import AUDIO_MEAN, AUDIO_STD, MEL_BINS, vary_images, vary_points, vary_spectrograms
from xblip_numerals.media import FACTS, ROBOT
from xblip_numerals.pictures import PLACES
from xblip_numerals.solids import WIDEST_TURN
from xblip_numerals.sounds import LONGEST_SECONDS

Batch = dict[str, Tensor]
UNKNOWN = -100
"""The label of a fact that a file does not have."""
_OPPOSITE = {"left": "right", "right": "left"}


class Readout(nn.Module):
    """Tells every fact from an encoder's tokens: one learned query a fact, attention without positions.

    Args:
      width: D_enc.
      facts: fact to the values it may take.
      segments: S; what is read of several segments is laid side by side, in their order.
    """

    def __init__(self, width: int, facts: Mapping[str, tuple[str, ...]], segments: int = 1):
        super().__init__()
        self.segments = segments
        self.norm = nn.LayerNorm(width)
        self.queries = nn.Parameter(0.1 * torch.randn(len(facts), width))
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.dropout = nn.Dropout(0.1)
        self.classifiers = nn.ModuleDict()
        for fact, values in facts.items():
            # Of several segments, how they differ matters: a product of what is read, which one layer cannot tell.
            hidden = [nn.Linear(segments * width, width), nn.GELU()] if segments > 1 else []
            self.classifiers[fact] = nn.Sequential(*hidden, nn.Linear(width, len(values)))

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """Takes tokens (M * S, N, D_enc) and their mask (M * S, N), True for real ones.

        Returns:
          Fact to logits (M, values).
        """
        tokens = self.norm(tokens)
        queries = self.queries.expand(len(tokens), -1, -1)
        hidden = None if mask is None else ~mask
        read, _ = self.attention(queries, tokens, tokens, key_padding_mask=hidden, need_weights=False)
        read = self.dropout(read).unflatten(0, (-1, self.segments)).transpose(1, 2).flatten(2)
        return {fact: classify(read[:, place]) for place, (fact, classify) in enumerate(self.classifiers.items())}


@dataclass(frozen=True)
class Recipe:
    """How one encoder is made.

    Attributes:
      save_fresh: writes an untrained encoder and its processor to a folder, as `save_pretrained` does.
      vary: changes a batch of tensors (M, S, ...) at random, and what its labels no longer say truly; told how much of the
        training is done (0 to 1).
      epochs: passes over the training examples.
      batch_size: examples of a step, of the modality that the encoder is named after.
      peak_rate: highest learning rate, reached after 15 % of the steps.
      modalities: whose files it learns from.
      convolves: computes in bfloat16 with channels last, which makes convolutions twice as fast, and small transformers not.
    """

    save_fresh: Callable[[Path], None]
    vary: Callable[[Batch, Batch, float], tuple[Batch, Batch]]
    epochs: int
    batch_size: int
    peak_rate: float
    modalities: tuple[str, ...]
    convolves: bool = False


def _fresh_image_encoder(folder: Path) -> None:
    from transformers import ResNetConfig, ResNetModel, ViTImageProcessor

    config = ResNetConfig(embedding_size=24, hidden_sizes=[32, 64, 112], depths=[1, 2, 2], layer_type="basic")
    ResNetModel(config).save_pretrained(folder)
    half = [0.5, 0.5, 0.5]
    ViTImageProcessor(size={"height": 80, "width": 80}, image_mean=half, image_std=half).save_pretrained(folder)


def _fresh_audio_encoder(folder: Path) -> None:
    """A convolutional network over the spectrogram, which learns from five speakers what an AST of its size does not."""
    from transformers import ASTFeatureExtractor, ResNetConfig, ResNetModel

    config = ResNetConfig(
        num_channels=1, embedding_size=32, hidden_sizes=[48, 80, 112], depths=[1, 1, 2], layer_type="basic"
    )
    ResNetModel(config).save_pretrained(folder)
    spectrogram = {"num_mel_bins": MEL_BINS, "max_length": round(100 * LONGEST_SECONDS)}
    ASTFeatureExtractor(mean=AUDIO_MEAN, std=AUDIO_STD, **spectrogram).save_pretrained(folder)


def _fresh_point_cloud_encoder(folder: Path) -> None:
    """Centres enter through random ridges, steep enough to tell places apart from the first step on."""
    from xblip_point_bert import PointBertConfig, PointBertModel

    config = PointBertConfig(
        in_channels=6,
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=256,
        num_groups=56,
        group_size=20,
        num_points=640,
        pointnet_sizes=[16, 32, 64],
        group_embedding_size=96,
        position_size=64,
        initializer_range=0.08,
    )
    model = PointBertModel(config)
    nn.init.normal_(model.pos_embed[0].weight, std=3.0)
    nn.init.uniform_(model.pos_embed[0].bias, -3.0, 3.0)
    model.save_pretrained(folder)


def _vary_images(tensors: Batch, labels: Batch, progress: float) -> tuple[Batch, Batch]:
    """Mirrors half of the hands, and with them their places; writing cannot be mirrored."""
    pixel_values = tensors["pixel_values"]
    is_sign = torch.zeros(len(pixel_values), dtype=torch.bool)
    if "kind" in labels:
        is_sign = labels["kind"] == FACTS["image"]["kind"].index("sign")
    is_mirrored = is_sign & (torch.rand(len(is_sign)) < 0.5)
    if "place" in labels:
        opposite = torch.tensor([PLACES.index(_OPPOSITE.get(place, place)) for place in PLACES])
        labels = {**labels, "place": torch.where(is_mirrored, opposite[labels["place"]], labels["place"])}
    return {"pixel_values": vary_images(pixel_values, is_sign, is_mirrored)}, labels


def _vary_spectrograms(tensors: Batch, labels: Batch, progress: float) -> tuple[Batch, Batch]:
    """Lets a third of the recordings sound like somebody whom no fact names, so that strangers are understood too."""
    is_other = torch.rand(len(labels["speaker"])) < 0.33
    varied = vary_spectrograms(tensors["input_values"][:, 0], tensors["num_frames"][:, 0], is_other)
    is_robot = labels["speaker"] == FACTS["audio"]["speaker"].index(ROBOT)
    speaker = torch.where(is_other & ~is_robot, UNKNOWN, labels["speaker"])
    tensors = {name: part[:, None] for name, part in zip(("input_values", "num_frames"), varied, strict=True)}
    return tensors, {**labels, "speaker": speaker}


def _vary_points(tensors: Batch, labels: Batch, progress: float) -> tuple[Batch, Batch]:
    """Turns clouds ever farther, from a tenth of what they may be turned to a little more than that."""
    widest = 1.1 * WIDEST_TURN * min(1.0, 0.1 + 2 * progress)
    return {"points": vary_points(tensors["points"][:, 0], widest)[:, None]}, labels


RECIPES = {
    "image": Recipe(_fresh_image_encoder, _vary_images, 24, 64, 2e-3, ("image", "video"), convolves=True),
    "audio": Recipe(_fresh_audio_encoder, _vary_spectrograms, 40, 64, 1.5e-3, ("audio",), convolves=True),
    "point_cloud": Recipe(_fresh_point_cloud_encoder, _vary_points, 14, 64, 2e-3, ("point_cloud",)),
}
