"""Our Q-Former against transformers' InstructBlipQFormerModel: same weights, same output."""

import pytest
import torch
from transformers import Blip2QFormerConfig, Blip2QFormerModel, InstructBlipQFormerConfig, InstructBlipQFormerModel
from transformers.models.blip_2.modeling_blip_2 import Blip2TextEmbeddings

from xblip.qformer import QFormer, QFormerConfig

SHAPES = [  # rows, queries, text, features, hidden, heads, layers, cross-attention every, encoder width
    (1, 1, 1, 1, 32, 4, 2, 2, 16),
    (3, 8, 7, 5, 32, 4, 3, 2, 48),
    (2, 32, 20, 257, 64, 4, 4, 2, 40),
    (5, 4, 11, 9, 48, 6, 5, 1, 24),
    (2, 16, 3, 64, 96, 12, 6, 3, 128),
]


def pair(hidden, heads, layers, frequency, width, *, seed=0):
    torch.manual_seed(seed)
    theirs = InstructBlipQFormerModel(
        InstructBlipQFormerConfig(
            vocab_size=101, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
            intermediate_size=2 * hidden, cross_attention_frequency=frequency, encoder_hidden_size=width,
            max_position_embeddings=64, initializer_range=0.2,
        )
    ).eval()  # fmt: skip
    ours = QFormer(
        QFormerConfig(
            encoder_width=width, vocab_size=101, hidden_size=hidden, num_hidden_layers=layers,
            num_attention_heads=heads, intermediate_size=2 * hidden, cross_attention_frequency=frequency,
            max_position_embeddings=64,
        )
    ).eval()  # fmt: skip
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_transformers_with_padded_instructions_and_features(shape):
    rows, queries, text, tokens, hidden, heads, layers, frequency, width = shape
    theirs, ours = pair(hidden, heads, layers, frequency, width)
    query_tokens = torch.randn(rows, queries, hidden)
    features = torch.randn(rows, tokens, width)
    input_ids = torch.randint(1, 101, (rows, text))
    lengths = torch.randint(1, text + 1, (rows, 1))
    text_mask = (torch.arange(text) < lengths).long()
    media_mask = torch.arange(tokens) < torch.randint(1, tokens + 1, (rows, 1))
    with torch.no_grad():
        expected = theirs(
            input_ids=input_ids,
            attention_mask=torch.cat([torch.ones(rows, queries, dtype=torch.long), text_mask], 1),
            query_embeds=query_tokens,
            encoder_hidden_states=features,
            encoder_attention_mask=media_mask.long(),
        ).last_hidden_state
        actual = ours(
            query_tokens, ours.read_media(features), media_mask=media_mask, input_ids=input_ids,
            attention_mask=text_mask,
        )  # fmt: skip
    real = torch.cat([torch.ones(rows, queries, dtype=torch.bool), text_mask.bool()], 1)
    assert (actual - expected)[real].abs().max() <= 1e-5


def test_media_read_once_serves_many_instructions():
    _, ours = pair(32, 4, 3, 2, 48)
    query_tokens, features = torch.randn(1, 8, 32), torch.randn(1, 5, 48)
    instructions = torch.randint(1, 101, (4, 7))
    with torch.no_grad():
        together = ours(query_tokens, ours.read_media(features), input_ids=instructions)
        apart = [ours(query_tokens, ours.read_media(features), input_ids=row[None]) for row in instructions]
    assert (together - torch.cat(apart)).abs().max() <= 1e-5
    assert (together[0, :8] - together[1, :8]).abs().max() > 1e-3, "another instruction reads the media otherwise"


def test_the_same_keys_as_transformers_from_fresh():
    theirs, ours = pair(32, 4, 3, 2, 48)
    assert set(ours.state_dict()) == set(theirs.state_dict())


def test_static_q_former_has_no_text_part():
    static = QFormer(QFormerConfig(encoder_width=8, vocab_size=0, hidden_size=16, num_hidden_layers=2,
                                   num_attention_heads=2, intermediate_size=32))  # fmt: skip
    names = set(static.state_dict())
    assert not any(".intermediate." in name or "word_embeddings" in name for name in names)
    assert static(torch.randn(1, 3, 16), static.read_media(torch.randn(2, 5, 8))).shape == (2, 3, 16)


def test_texts_alone_equal_those_of_blip_2():
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64)
    config = Blip2QFormerConfig(**sizes, vocab_size=101, initializer_range=0.2, use_qformer_text_input=True)
    theirs, embeddings = Blip2QFormerModel(config).eval(), Blip2TextEmbeddings(config).eval()
    ours = QFormer(QFormerConfig(encoder_width=config.encoder_hidden_size, vocab_size=101, **sizes)).eval()
    weights = theirs.state_dict() | embeddings.state_dict()
    loose = ("layernorm.", "word_embeddings.", "position_embeddings.")
    ours.load_state_dict(
        {"embeddings." * name.startswith(loose) + name: value for name, value in weights.items()}, strict=True
    )
    input_ids = torch.randint(1, 101, (3, 7))
    mask = (torch.arange(7) < torch.tensor([[7], [1], [4]])).long()
    with torch.no_grad():
        expected = theirs(embeddings(input_ids), query_length=0, attention_mask=mask).last_hidden_state
        actual = ours.read_text(input_ids, mask)
        alone = ours.read_text(input_ids[2:, :4])
    assert (actual - expected)[mask.bool()].abs().max() <= 1e-5
    assert (actual[2, :4] - alone).abs().max() <= 1e-5


def test_texts_written_from_left_to_right_equal_one_attention_with_that_mask():
    theirs, ours = pair(32, 4, 3, 2, 48)
    rows, queries, length = 3, 8, 7
    query_tokens, features = torch.randn(rows, queries, 32), torch.randn(rows, 5, 48)
    input_ids = torch.randint(1, 101, (rows, length))
    real = torch.arange(length) < torch.tensor([[7], [1], [4]])
    sees = torch.ones(queries + length, queries + length, dtype=torch.bool).tril()
    sees[:queries, :queries] = True
    sees = sees.expand(rows, 1, -1, -1).clone()
    sees[:, :, queries:, queries:] &= real[:, None, None]
    kept = []
    with torch.no_grad():
        expected = theirs(
            input_ids=input_ids, attention_mask=sees, query_embeds=query_tokens, encoder_hidden_states=features
        ).last_hidden_state
        read = ours(query_tokens, ours.read_media(features), kept=kept)
        written = ours.write_text(input_ids, kept, attention_mask=real.long())
        alone = ours.write_text(input_ids[2:, :4], [(keys[2:], values[2:]) for keys, values in kept])
    assert (read - expected[:, :queries]).abs().max() <= 1e-5
    assert (written - expected[:, queries:])[real].abs().max() <= 1e-5
    assert (written[2, :4] - alone).abs().max() <= 1e-5
