"""The Q-Former: learned query tokens that read frozen features in the light of an instruction.

State-dict keys equal those of `transformers.InstructBlipQFormerModel`, so its weights load with `strict=True`. It is
written anew because of one property that class hides: cross-attention keys and values depend on the media alone, so
`read_media` computes them once and `forward` reuses them for any number of instructions.

Its masks are those of BLIP-2's first stage: `forward` lets query tokens and text see each other (or has no text at all),
`read_text` reads texts alone, and `write_text` lets every word see the query tokens and the words before it.

Shapes (legend in `xblip.modality`): query tokens (M, Q, D_q), text (M, T), features (M, N, D_enc).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xblip.media_read import KeysValues


@dataclass
class QFormerConfig:
    """Sizes of a Q-Former; the defaults are those of BLIP-2 and InstructBLIP (BERT-base).

    Attributes:
      encoder_width: D_enc.
      vocab_size: size of the instruction tokenizer; 0 builds a static Q-Former without any text part (BLIP-2).
      cross_attention_frequency: every n-th layer reads the features, starting with the first.
      dropout: of hidden states and attention weights, while training.
    """

    encoder_width: int
    vocab_size: int = 30523
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    cross_attention_frequency: int = 2
    max_position_embeddings: int = 512
    layer_norm_eps: float = 1e-12
    dropout: float = 0.1
    initializer_range: float = 0.02


class QFormer(nn.Module):
    """Query tokens attend to each other and to the instruction in every layer, to the features in every n-th."""

    def __init__(self, config: QFormerConfig):
        super().__init__()
        self.config = config
        self.embeddings = _Embeddings(config)
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList(
            _Layer(config, reads_media=index % config.cross_attention_frequency == 0)
            for index in range(config.num_hidden_layers)
        )
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        """BERT's: normal weights, zero biases, and zero for the padding word."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            with torch.no_grad():
                module.weight[module.padding_idx].zero_()

    def read_media(self, features: Tensor) -> KeysValues:
        """Computes what cross-attention needs of the media, which no instruction changes.

        Args:
          features: (M, N, D_enc).

        Returns:
          Keys and values (M, heads, N, D_head) of every layer that reads the features.
        """
        return [
            layer.crossattention.attention.keys_values(features)
            for layer in self.encoder.layer
            if layer.crossattention is not None
        ]

    def forward(
        self,
        query_tokens: Tensor,
        media: KeysValues,
        *,
        media_mask: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        kept: KeysValues | None = None,
        attention: list[Tensor] | None = None,
    ) -> Tensor:
        """Reads the media.

        Args:
          query_tokens: (M, Q, D_q) or (1, Q, D_q).
          media: from `read_media`, M rows, or R of which M is a multiple: then rows r, R + r, 2 R + r, ... read the r-th,
            each in the light of its own instruction, and nothing of the media is copied.
          media_mask: (M or R, N) boolean, True for real features; None when all are.
          input_ids: (M, T) the instruction's tokens; None for none.
          attention_mask: (M, T), 1 for real tokens; None when all are.
          kept: an empty list, to which the query tokens' own keys and values (M, heads, Q, D_head) of every layer are
            added, for `write_text`.
          attention: an empty list, to which what the query tokens look at, (M, heads, Q, N), is added by every layer that
            reads the features.

        Returns:
          (M, Q + T, D_q), the query positions first.
        """
        rows = max(query_tokens.shape[0], media[0][0].shape[0], 1 if input_ids is None else input_ids.shape[0])
        query_tokens = query_tokens.expand(rows, -1, -1)
        hidden = self.embeddings(query_tokens, input_ids)
        num_queries = query_tokens.shape[1]
        self_mask = None
        if input_ids is not None and attention_mask is not None:
            self_mask = torch.cat([attention_mask.new_ones(rows, num_queries), attention_mask], dim=1)
        self_mask = _to_attention_mask(self_mask)
        media_mask = _to_attention_mask(media_mask)
        reads = iter(media)
        for layer in self.encoder.layer:
            own = layer.attention.attention.keys_values(hidden)
            if kept is not None:
                kept.append((own[0][:, :, :num_queries], own[1][:, :, :num_queries]))
            hidden = layer(
                hidden,
                own,
                num_queries=num_queries,
                self_mask=self_mask,
                media=next(reads) if layer.crossattention is not None else None,
                media_mask=media_mask,
                attention=attention,
            )
        return hidden

    def read_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Reads texts alone: no query tokens, no media (BLIP-2's uni-modal pass).

        Args:
          input_ids: (M, T).
          attention_mask: (M, T), 1 for real tokens; None when all are.

        Returns:
          (M, T, D_q).
        """
        hidden = self.embeddings(None, input_ids)
        mask = _to_attention_mask(attention_mask)
        for layer in self.encoder.layer:
            hidden = layer.read_text(hidden, layer.attention.attention.keys_values(hidden), mask)
        return hidden

    def write_text(
        self,
        input_ids: Tensor,
        kept: KeysValues,
        *,
        attention_mask: Tensor | None = None,
        kept_mask: Tensor | None = None,
    ) -> Tensor:
        """Writes texts from left to right on what query tokens have read (BLIP-2's multimodal causal pass).

        Each position sees all query tokens, itself and what stands before it; the media are seen through the query
        tokens alone, which see no text.

        Args:
          input_ids: (M, T).
          kept: keys and values (M, heads, K, D_head) of every layer, from a `forward` without text.
          attention_mask: (M, T), 1 for real tokens; None when all are.
          kept_mask: (M, K), True for real ones; None when all are.

        Returns:
          (M, T, D_q).
        """
        rows, length = input_ids.shape
        sees = torch.ones(length, length, dtype=torch.bool, device=input_ids.device).tril().expand(rows, 1, -1, -1)
        if attention_mask is not None:
            sees = sees & _to_attention_mask(attention_mask)
        before = sees.new_ones(rows, 1, 1, kept[0][0].shape[2]) if kept_mask is None else _to_attention_mask(kept_mask)
        mask = torch.cat([before.expand(-1, -1, length, -1), sees], dim=-1)
        hidden = self.embeddings(None, input_ids)
        for layer, (keys, values) in zip(self.encoder.layer, kept, strict=True):
            own_keys, own_values = layer.attention.attention.keys_values(hidden)
            keys_values = torch.cat([keys, own_keys], dim=2), torch.cat([values, own_values], dim=2)
            hidden = layer.read_text(hidden, keys_values, mask)
        return hidden


def attention_weights(queries: Tensor, keys: Tensor, mask: Tensor | None) -> Tensor:
    """What `scaled_dot_product_attention` multiplies values with, (..., Q, K), float32."""
    scores = queries.float() @ keys.float().transpose(-1, -2) / queries.shape[-1] ** 0.5
    return (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(-1)


def _to_attention_mask(mask: Tensor | None) -> Tensor | None:
    """(M, K) with 1 or True for what may be attended to, as the boolean (M, 1, 1, K) that SDPA takes."""
    return None if mask is None else mask.bool()[:, None, None, :]


class _Embeddings(nn.Module):
    def __init__(self, config: QFormerConfig):
        super().__init__()
        if config.vocab_size:
            self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=0)
            self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, query_tokens: Tensor | None, input_ids: Tensor | None) -> Tensor:
        parts = [] if query_tokens is None else [query_tokens]
        if input_ids is not None:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device)
            parts.append(self.word_embeddings(input_ids) + self.position_embeddings(positions))
        hidden = torch.cat(parts, dim=1)
        return self.dropout(self.layernorm(hidden.to(self.layernorm.weight.dtype)))


class _Attention(nn.Module):
    def __init__(self, config: QFormerConfig, source_width: int):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.dropout = config.dropout
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(source_width, config.hidden_size)
        self.value = nn.Linear(source_width, config.hidden_size)

    def _heads(self, states: Tensor) -> Tensor:
        return states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def keys_values(self, source: Tensor) -> tuple[Tensor, Tensor]:
        return self._heads(self.key(source)), self._heads(self.value(source))

    def forward(self, hidden: Tensor, keys_values: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        keys, values = keys_values
        dropout = self.dropout if self.training else 0.0
        read = F.scaled_dot_product_attention(
            self._heads(self.query(hidden)), keys, values, attn_mask=mask, dropout_p=dropout
        )
        return read.transpose(1, 2).flatten(2)

    def weights(self, hidden: Tensor, keys: Tensor, mask: Tensor | None) -> Tensor:
        """The attention (M, heads, Q, K) that `forward` pays, float32, which SDPA keeps to itself."""
        return attention_weights(self._heads(self.query(hidden)), keys, mask)


class _Output(nn.Module):
    """Projection, dropout, residual and layer norm, in BERT's order (norm last)."""

    def __init__(self, config: QFormerConfig, source_width: int):
        super().__init__()
        self.dense = nn.Linear(source_width, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, states: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(states)) + residual)


class _AttentionBlock(nn.Module):
    def __init__(self, config: QFormerConfig, source_width: int):
        super().__init__()
        self.attention = _Attention(config, source_width)
        self.output = _Output(config, config.hidden_size)

    def forward(self, hidden: Tensor, keys_values: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        return self.output(self.attention(hidden, keys_values, mask), hidden)


class _Intermediate(nn.Module):
    def __init__(self, config: QFormerConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)

    def forward(self, hidden: Tensor) -> Tensor:
        return F.gelu(self.dense(hidden))


class _Layer(nn.Module):
    """One layer; query positions and text positions share self-attention and have feed-forwards of their own."""

    def __init__(self, config: QFormerConfig, *, reads_media: bool):
        super().__init__()
        self.attention = _AttentionBlock(config, config.hidden_size)
        self.crossattention = _AttentionBlock(config, config.encoder_width) if reads_media else None
        if config.vocab_size:
            self.intermediate = _Intermediate(config)
            self.output = _Output(config, config.intermediate_size)
        self.intermediate_query = _Intermediate(config)
        self.output_query = _Output(config, config.intermediate_size)

    def forward(
        self,
        hidden: Tensor,
        own: tuple[Tensor, Tensor],
        *,
        num_queries: int,
        self_mask: Tensor | None,
        media: tuple[Tensor, Tensor] | None,
        media_mask: Tensor | None,
        attention: list[Tensor] | None,
    ) -> Tensor:
        hidden = self.attention(hidden, own, self_mask)
        queries, text = hidden[:, :num_queries], hidden[:, num_queries:]
        if self.crossattention is not None:
            turns = len(queries) // len(media[0])
            queries = queries.unflatten(0, (turns, -1)).transpose(0, 1).flatten(1, 2)
            if attention is not None:
                weights = self.crossattention.attention.weights(queries, media[0], media_mask)
                attention.append(weights.unflatten(2, (turns, -1)).permute(2, 0, 1, 3, 4).flatten(0, 1))
            queries = self.crossattention(queries, media, media_mask)
            queries = queries.unflatten(1, (turns, -1)).transpose(0, 1).flatten(0, 1)
        queries = self.output_query(self.intermediate_query(queries), queries)
        if text.shape[1] == 0:
            return queries
        return torch.cat([queries, self.output(self.intermediate(text), text)], dim=1)

    def read_text(self, text: Tensor, keys_values: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        text = self.attention(text, keys_values, mask)
        return self.output(self.intermediate(text), text)
