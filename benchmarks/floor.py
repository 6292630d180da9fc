"""The work that any correct step must do: multiplications and additions in matrix products, by formula.

No padding, logits at labelled positions alone, no encoder where its features are stored, and no gradient that nobody
needs: of what is frozen no weight's, of the encoder none at all. Norms, activations, softmax and the optimizer are no
matrix products and not counted.
"""

from collections.abc import Sequence

from pair import QUERIES, Row
from transformers import InstructBlipConfig


def step_flops(config: InstructBlipConfig, rows: Sequence[Row], *, stored: bool) -> dict[str, float]:
    """Returns the floating-point operations of a step by part: encoder, Q-Former, LLM, vocabulary."""
    parts = {"encoder": 0.0, "Q-Former": 0.0, "LLM": 0.0, "vocabulary": 0.0}
    for row in rows:
        asked, answered = len(row.instruction.split()), len(row.answer.split()) + 1  # with the end of sequence
        parts["encoder"] += 0 if stored else encoder(config.vision_config)
        parts["Q-Former"] += qformer(config, asked + 2)
        parts["LLM"] += llm(config.text_config, QUERIES + 1 + asked + answered)
        parts["vocabulary"] += 2 * 2 * config.text_config.hidden_size * config.text_config.vocab_size * answered
    return parts


def ask_flops(config: InstructBlipConfig, *, frames: int, asked: int, said: int) -> dict[str, float]:
    """Returns the floating-point operations of one question about a video, forward alone, by what another question changes.

    Args:
      config: of the model; that of InstructBlipVideo has the same parts.
      frames: of the video.
      asked, said: tokens of the question and of the answer.

    Returns:
      "video": encoder, and what cross-attention needs of it; "queries": the Q-Former's reading of these in the light of
      the question, and the projector; "soft prompt": the LLM's reading of it; "text": question, answer and its logits.
    """
    own, llm, features = config.qformer_config, config.text_config, num_tokens(config.vision_config)
    width, tokens = own.hidden_size, QUERIES + asked + 2
    readers = -(-own.num_hidden_layers // own.cross_attention_frequency)
    layer = tokens * (4 * width**2 + 2 * width * own.intermediate_size) + 2 * tokens**2 * width
    reading = QUERIES * 2 * width**2 + 2 * QUERIES * features * width
    projector = QUERIES * width * llm.hidden_size
    keys_values = readers * 2 * features * own.encoder_hidden_size * width
    position = 4 * llm.hidden_size**2 + 3 * llm.hidden_size * llm.intermediate_size
    soft, text = frames * QUERIES, 1 + asked + said - 1
    before = {"soft prompt": soft**2 / 2, "text": text * soft + text**2 / 2}
    read = {"soft prompt": soft, "text": text}
    return {
        "video": frames * (encoder(config.vision_config) + 2.0 * keys_values),
        "queries": frames * 2.0 * (own.num_hidden_layers * layer + readers * reading + projector),
        **{
            part: 2.0 * llm.num_hidden_layers * (read[part] * position + 2 * before[part] * llm.hidden_size)
            + (2.0 * said * llm.hidden_size * llm.vocab_size if part == "text" else 0)
            for part in read
        },
    }


def num_tokens(config) -> int:
    """N of a picture."""
    return (config.image_size // config.patch_size) ** 2 + 1


def encoder(config) -> float:
    """A forward pass of one picture."""
    tokens, width = num_tokens(config), config.hidden_size
    layer = tokens * (4 * width**2 + 2 * width * config.intermediate_size) + 2 * tokens**2 * width
    patches = (tokens - 1) * 3 * config.patch_size**2 * width
    return 2.0 * (config.num_hidden_layers * layer + patches)


def qformer(config: InstructBlipConfig, text: int) -> float:
    """A forward pass of one row, and its backward pass: two products for each, but one where the input is frozen."""
    own, features = config.qformer_config, num_tokens(config.vision_config)
    width, inner = own.hidden_size, own.intermediate_size
    tokens = QUERIES + text
    layer = tokens * (4 * width**2 + 2 * width * inner) + 2 * tokens**2 * width
    reading = QUERIES * 2 * width**2 + 2 * QUERIES * features * width
    keys_values = 2 * features * own.encoder_hidden_size * width
    readers = -(-own.num_hidden_layers // own.cross_attention_frequency)
    projector = QUERIES * width * config.text_config.hidden_size
    return 2.0 * (3 * (own.num_hidden_layers * layer + readers * reading + projector) + 2 * readers * keys_values)


def llm(config, tokens: int) -> float:
    """A forward pass of one row, and the gradient to its inputs; attention's own products need two gradients each."""
    width, inner = config.hidden_size, config.intermediate_size
    heads = config.num_key_value_heads / config.num_attention_heads
    linear = tokens * ((2 + 2 * heads) * width**2 + 3 * width * inner)
    attention = tokens**2 * width  # two products, half of each masked
    return 2.0 * config.num_hidden_layers * (2 * linear + 3 * attention)
