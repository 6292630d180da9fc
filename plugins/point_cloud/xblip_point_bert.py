"""Point-BERT: the transformer over groups of neighbouring points that encodes point clouds, as a transformers
model.

Grouping is exact and deterministic: farthest point sampling starts at the point farthest from the centroid
instead of a random one, so two passes over a cloud agree and its features can be cached. All group tokens are
returned unless the config says "pooled": ULIP and X-InstructBLIP pool them to one vector, over which a
Q-Former's cross-attention is a constant.

Layers and parameter names follow Point-BERT (arXiv 2111.14819) as published with ULIP (arXiv 2212.05171).

Shape letters: M clouds, P points of a cloud, G groups, K points of a group, C channels of a point.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel, initialization
from transformers.modeling_outputs import BaseModelOutput

MAX_DISTANCES = 2**26  # computed at once while looking for neighbours: 256 MiB of float32


class PointBertConfig(PreTrainedConfig):
    """Sizes of a `PointBertModel` and the preparation it expects; defaults are those of ULIP's Point-BERT.

    Attributes:
      hidden_size: width of the tokens, D.
      num_hidden_layers: transformer blocks.
      num_attention_heads: heads of each block.
      intermediate_size: width inside the blocks' MLP.
      num_groups: G; their centres are chosen by farthest point sampling.
      group_size: K nearest neighbours of each centre.
      in_channels: 3 for coordinates, 6 for coordinates and colour in [0, 1].
      num_points: P that a cloud is sampled to before it comes here.
      output: "groups" for [CLS] and a token for each group; "pooled" for one token, which is ULIP's vector:
        [CLS] beside the maximum over the groups, projected if there is a projection.
      projection_size: width that `pc_projection` gives the pooled token, 512 in ULIP; None for no projection.
      pointnet_sizes: widths inside the mini-PointNet that embeds one group.
      group_embedding_size: width of a group's embedding before it is projected to `hidden_size`.
      position_size: width inside the MLP that embeds the groups' centres.
      layer_norm_eps: of all layer norms.
      initializer_range: standard deviation of fresh weights.
    """

    model_type = "point_bert"

    hidden_size: int = 384
    num_hidden_layers: int = 12
    num_attention_heads: int = 6
    intermediate_size: int = 1536
    num_groups: int = 512
    group_size: int = 32
    in_channels: int = 3
    num_points: int = 8192
    output: str = "groups"
    projection_size: int | None = None
    pointnet_sizes: tuple[int, int, int] | list[int] = (128, 256, 512)
    group_embedding_size: int = 256
    position_size: int = 128
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.in_channels not in (3, 6):
            raise ValueError(f"in_channels is {self.in_channels}; expected 3 (xyz) or 6 (xyz and colour).")
        if self.num_points < max(self.num_groups, self.group_size):
            raise ValueError(
                f"num_points is {self.num_points}; expected at least num_groups ({self.num_groups}) and "
                f"group_size ({self.group_size})."
            )
        if self.output not in ("groups", "pooled"):
            raise ValueError(f'output is "{self.output}"; expected "groups" (a token each) or "pooled" (one token).')
        if self.projection_size is not None and self.projection_size < 1:
            raise ValueError(f"projection_size is {self.projection_size}; expected 1 or more, or none.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}."
            )

    @property
    def width(self) -> int:
        """Width of the tokens that come out."""
        return self.hidden_size if self.output == "groups" else self.projection_size or 2 * self.hidden_size


@torch.no_grad()
def farthest_point_sampling(points: Tensor, count: int) -> Tensor:
    """Chooses points that cover each cloud evenly, exactly and without chance.

    The first is the point farthest from the cloud's centroid; each next one is farthest from all chosen so
    far. Ties go to the lowest index. Once all distinct points are taken, indices repeat.

    Args:
      points: (M, P, C) with P >= 1; the first three channels are coordinates.
      count: how many to choose.

    Returns:
      Indices (M, count), in the order they were chosen.
    """
    xyz = points[..., :3].float().transpose(1, 2).contiguous()
    offsets = xyz - xyz.double().mean(2, keepdim=True).float()
    distances = offsets.square_().sum(1)
    current = distances.argmax(1)
    nearest = torch.full_like(distances, torch.inf)
    rows = torch.arange(len(xyz), device=xyz.device)
    chosen = torch.empty(len(xyz), count, dtype=torch.long, device=xyz.device)
    for step in range(count):
        chosen[:, step] = current
        torch.sub(xyz, xyz[rows, :, current, None], out=offsets)
        torch.sum(offsets.square_(), 1, out=distances)
        torch.minimum(nearest, distances, out=nearest)
        current = nearest.argmax(1)
    return chosen


@torch.no_grad()
def nearest_neighbours(points: Tensor, centres: Tensor, count: int) -> Tensor:
    """Finds the `count` points (M, P, 3) nearest to each centre (M, G, 3): indices (M, G, count), in no
    special order.

    Distances are computed from differences, not from a matrix product, whose rounding can swap near
    neighbours.
    """
    clouds = max(1, MAX_DISTANCES // (points.shape[1] * centres.shape[1]))
    found = [
        torch.cdist(to, of, compute_mode="donot_use_mm_for_euclid_dist")
        .topk(count, largest=False, sorted=False)
        .indices
        for to, of in zip(centres.split(clouds), points.split(clouds), strict=True)
    ]
    return torch.cat(found)


class GroupEmbedding(nn.Module):
    """Mini-PointNet: embeds each group of points, whatever their order."""

    def __init__(self, config: PointBertConfig):
        super().__init__()
        first, second, third = config.pointnet_sizes
        self.first_conv = nn.Sequential(
            nn.Conv1d(config.in_channels, first, 1),
            nn.BatchNorm1d(first),
            nn.ReLU(),
            nn.Conv1d(first, second, 1),
        )
        self.second_conv = nn.Sequential(
            nn.Conv1d(2 * second, third, 1),
            nn.BatchNorm1d(third),
            nn.ReLU(),
            nn.Conv1d(third, config.group_embedding_size, 1),
        )

    def forward(self, groups: Tensor) -> Tensor:
        """Takes (M, G, K, C), returns (M, G, group_embedding_size).

        Convolutions of one point are matrix products, which are quicker; and what a group's maximum adds to each of its
        points is computed once a group.
        """
        enter, norm, activation, leave = self.first_conv
        local = _each_point(leave, activation(norm(_each_point(enter, groups.flatten(0, 2)))))
        whole = local.unflatten(0, (-1, groups.shape[2])).amax(1)
        enter, norm, activation, leave = self.second_conv
        of_whole, of_local = enter.weight[..., 0].split([whole.shape[1], local.shape[1]], 1)
        added = F.linear(whole, of_whole, enter.bias)[:, None]
        joined = (F.linear(local, of_local).unflatten(0, (-1, groups.shape[2])) + added).flatten(0, 1)
        embedded = _each_point(leave, activation(norm(joined)))
        return embedded.unflatten(0, (-1, groups.shape[2])).amax(1).unflatten(0, groups.shape[:2])


def _each_point(convolution: nn.Conv1d, points: Tensor) -> Tensor:
    """Applies a convolution of one point to points (N, C)."""
    return F.linear(points, convolution.weight[..., 0], convolution.bias)


class Attention(nn.Module):
    """Self-attention over the tokens of a cloud; queries, keys and values have no bias."""

    def __init__(self, config: PointBertConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = self.qkv(tokens).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """The two linear layers of a block."""

    def __init__(self, config: PointBertConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(tokens)))


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, config: PointBertConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attn(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))


class PointBertModel(PreTrainedModel):
    """Encodes point clouds into one [CLS] token and one token per group, or all of them pooled to one.

    A fresh encoder's folder is made by `PointBertModel(PointBertConfig(...)).save_pretrained(folder)`.
    """

    config_class = PointBertConfig
    base_model_prefix = "point_bert"
    main_input_name = "points"
    _no_split_modules = ["Block", "GroupEmbedding"]
    _keys_to_ignore_on_load_unexpected = ["pc_projection"]

    def __init__(self, config: PointBertConfig):
        super().__init__(config)
        self.encoder = GroupEmbedding(config)
        self.reduce_dim = nn.Linear(config.group_embedding_size, config.hidden_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.cls_pos = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.pos_embed = nn.Sequential(
            nn.Linear(3, config.position_size), nn.GELU(), nn.Linear(config.position_size, config.hidden_size)
        )
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        if config.output == "pooled" and config.projection_size:
            self.pc_projection = nn.Parameter(torch.zeros(2 * config.hidden_size, config.projection_size))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PointBertModel):
            initialization.normal_(module.cls_token, std=self.config.initializer_range)
            initialization.normal_(module.cls_pos, std=self.config.initializer_range)
            if hasattr(module, "pc_projection"):
                initialization.normal_(module.pc_projection, std=self.config.projection_size**-0.5)

    def group(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Cuts clouds (M, P, C) into groups (M, G, K, C), coordinates relative to their centres (M, G, 3)."""
        clouds = torch.arange(len(points), device=points.device)
        xyz = points[..., :3].contiguous()
        centres = xyz[clouds[:, None], farthest_point_sampling(xyz, self.config.num_groups)]
        groups = points[clouds[:, None, None], nearest_neighbours(xyz, centres, self.config.group_size)]
        relative = groups[..., :3] - centres[:, :, None]
        return torch.cat([relative, groups[..., 3:]], 3), centres

    def forward(self, points: Tensor, **_) -> BaseModelOutput:
        """Encodes a batch of clouds.

        Args:
          points: (M, P, C) float32, centred and inside the unit sphere; C is the config's `in_channels`, P at
            least its `num_groups` and `group_size`. Coordinates stay float32 whatever dtype the weights have.

        Returns:
          `last_hidden_state` (M, 1 + G, D), [CLS] first, then groups in the order of their sampling; or pooled,
          (M, 1, `config.width`).

        Raises:
          ValueError: `points` has another shape.
        """
        fewest = max(self.config.num_groups, self.config.group_size)
        if points.dim() != 3 or points.shape[1] < fewest or points.shape[2] != self.config.in_channels:
            raise ValueError(
                f"points has shape {tuple(points.shape)}; expected (clouds, {fewest} or more points, "
                f"{self.config.in_channels} channels)."
            )
        groups, centres = self.group(points)
        dtype = self.cls_token.dtype
        tokens = self.reduce_dim(self.encoder(groups.to(dtype)))
        tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], 1)
        positions = torch.cat([self.cls_pos.expand(len(tokens), -1, -1), self.pos_embed(centres.to(dtype))], 1)
        for block in self.blocks:
            tokens = block(tokens + positions)
        tokens = self.norm(tokens)
        return BaseModelOutput(last_hidden_state=tokens if self.config.output == "groups" else self.pool(tokens))

    def pool(self, tokens: Tensor) -> Tensor:
        """Makes ULIP's vector of the tokens (M, 1 + G, D) of each cloud: one token (M, 1, `config.width`)."""
        pooled = torch.cat([tokens[:, :1], tokens[:, 1:].amax(1, keepdim=True)], 2)
        if not self.config.projection_size:
            return pooled
        # One product a cloud: the rounding of a single one depends on how many clouds share the batch.
        return torch.stack([token @ self.pc_projection for token in pooled])


AutoConfig.register(PointBertConfig.model_type, PointBertConfig, exist_ok=True)
AutoModel.register(PointBertConfig, PointBertModel, exist_ok=True)
