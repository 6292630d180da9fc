"""The Q-Former of BLIP-2's first stage: it ends in heads for media and texts, where other bridges make a soft prompt.

Media are read once: what cross-attention needs of them, and what the query tokens have read without a text, serve all of
its passes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xblip.bridge import QFormerBridge
from xblip.config import at_least
from xblip.errors import ConfigError
from xblip.media_read import KeysValues, MediaRead, row_table
from xblip.modality import Features

BEGIN = "[DEC]"
"""The token that begins texts which are written."""
TEMPERATURE = 0.07


class LanguageHead(nn.Module):
    """BERT's head of language modelling; its last weights are the embeddings of words."""

    def __init__(self, width: int, vocab_size: int):
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.layer_norm = nn.LayerNorm(width, eps=1e-12)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, hidden: Tensor, words: Tensor) -> Tensor:
        """Gives logits (..., V) of hidden states (..., D_q), with the embeddings of words (V, D_q)."""
        return F.linear(self.layer_norm(F.gelu(self.dense(hidden))), words, self.bias)


class RetrievalBridge(QFormerBridge):
    """A Q-Former bridge that ends in heads for retrieval, where others make a soft prompt for an LLM.

    All segments of a source count alike: their query tokens are laid side by side.
    """

    @dataclass
    class Config(QFormerBridge.Config):
        """Those of `qformer`; of texts longer than `max_instruction_tokens` the beginning is read.

        Attributes:
          embedding_width: of the space that media and texts share; BLIP-2's.
          language_head: with what only training needs: a head that writes texts, the token `[DEC]` that begins them, and
            the temperature that similarities are divided by.
        """

        embedding_width: int = 256
        language_head: bool = False

    def __init__(self, config: Config, *, encoder_width: int, llm_width: int = 0):
        at_least(config, embedding_width=1)
        if not config.instruction_aware:
            raise ConfigError("A retriever's Q-Former reads texts: leave out instruction_aware, or set it to true.")
        super().__init__(config, encoder_width=encoder_width, llm_width=llm_width)

    def load_tokenizer(self, source: str):
        tokenizer = super().load_tokenizer(source)
        tokenizer.truncation_side = "right"
        if self.config.language_head and BEGIN not in tokenizer.get_vocab():
            tokenizer.add_special_tokens({"bos_token": BEGIN})
        return tokenizer

    def build_heads(self, config: Config, llm_width: int) -> None:
        self.media_projection = nn.Linear(config.hidden_size, config.embedding_width)
        self.text_projection = nn.Linear(config.hidden_size, config.embedding_width)
        self.matching_head = nn.Linear(config.hidden_size, 2)
        if config.language_head:
            self.language_head = LanguageHead(config.hidden_size, len(self.tokenizer))
            self.temperature = nn.Parameter(torch.full((1,), TEMPERATURE))  # of one dimension: FSDP shards no scalars

    def embed_media(self, features: Features) -> list[Tensor]:
        """Gives B tensors (L, W), an embedding of length 1 for each query token of each segment."""
        media = self.read_media(features)
        return [part.flatten(0, 1) for part in self.embed_queries(self.read_queries(media)).split(media.rows)]

    def embed_queries(self, queries: Tensor) -> Tensor:
        """Gives embeddings (M, Q, W) of length 1 of queries (M, Q, D_q) that have read media without a text."""
        return F.normalize(self.media_projection(queries), dim=-1)

    def embed_texts(self, texts: Sequence[str] | Mapping[str, Tensor]) -> Tensor:
        """Gives embeddings (T, W) of length 1, of what the first token of each text has read; texts or `tokenize`'s."""
        read = self.qformer.read_text(**(texts if isinstance(texts, Mapping) else self.tokenize(texts)))
        return F.normalize(self.text_projection(read[:, 0]), dim=-1)

    def judge(self, media: MediaRead, text: Mapping[str, Tensor]) -> Tensor:
        """Gives logits (B, 2) of B pairs of read media and texts from `tokenize`, as `forward`."""
        logits = self.matching_head(self.read_queries(media, text)).mean(1)
        index, real = row_table(media.rows, logits.device)
        return (logits[index] * real[..., None]).sum(1) / real.sum(1, keepdim=True)

    def forward(self, features: Features, texts: Sequence[str]) -> Tensor:
        """Gives logits (B, 2) of B pairs, that the text does not and that it does describe: the mean over query tokens."""
        return self.judge(self.read_media(features), self.tokenize(texts))

    def write(self, kept: KeysValues, rows: list[int], text: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Writes B texts from `to_write`, on all query tokens of their media.

        Args:
          kept: what `read_queries` kept of media that were read without a text.
          rows: each item's number of rows there.
          text: B texts.

        Returns:
          Logits (n, V) of all tokens but `[DEC]`, and these tokens (n,).
        """
        index, real = row_table(rows, kept[0][0].device)
        kept = [tuple(part[index].transpose(1, 2).flatten(2, 3) for part in layer) for layer in kept]
        real = real.repeat_interleave(self.config.num_query_tokens, 1)
        hidden = self.qformer.write_text(kept=kept, kept_mask=real, **text)
        follows = text["attention_mask"][:, 1:].bool()
        words = self.qformer.embeddings.word_embeddings.weight
        return self.language_head(hidden[:, :-1][follows], words), text["input_ids"][:, 1:][follows]

    def to_write(self, text: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Texts from `tokenize` that begin with `[DEC]`, in the place of the tokenizer's own first token if it sets one."""
        ids, mask = text["input_ids"], text["attention_mask"]
        begins = self.tokenizer("a", return_special_tokens_mask=True).special_tokens_mask[0]
        start = torch.full_like(ids[:, :1], self.tokenizer.convert_tokens_to_ids(BEGIN))
        ids = torch.cat([start, ids[:, begins:]], 1)[:, : self.config.max_instruction_tokens]
        mask = torch.cat([torch.ones_like(start), mask[:, begins:]], 1)[:, : self.config.max_instruction_tokens]
        return {"input_ids": ids, "attention_mask": mask}
