"""Tiny random models of the families, saved by transformers as the published ones are."""

from pathlib import Path

import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2Processor,
    BlipImageProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    InstructBlipVideoConfig,
    InstructBlipVideoForConditionalGeneration,
    InstructBlipVideoProcessor,
    InstructBlipVideoVideoProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    OPTConfig,
    T5Config,
)

from xblip.testing import toy_tokenizer

QUERIES = 4
VISION = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=28)
VISION |= dict(patch_size=7, initializer_range=0.1)
QFORMER = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64)
QFORMER |= dict(encoder_hidden_size=32, initializer_range=0.2, vocab_size=len(toy_tokenizer()))
SQUARE = {"height": 28, "width": 28}
TOKENS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)


def tokenizer(media_token: str, *, bos: bool):
    """Begins texts with <s>, as Llama's and OPT's; or ends them with </s>, as T5's."""
    made = toy_tokenizer()
    made.add_tokens([media_token], special_tokens=True)
    form, token = ("<s> $A", ("<s>", 1)) if bos else ("$A </s>", ("</s>", 2))
    made.backend_tokenizer.post_processor = TemplateProcessing(single=form, special_tokens=[token])
    return made


def text_config(kind: str, vocabulary: int):
    """A tiny Llama, OPT or T5."""
    if kind == "llama":
        return LlamaConfig(
            vocab_size=vocabulary, hidden_size=40, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            initializer_range=0.2, **TOKENS,
        )  # fmt: skip
    if kind == "opt":
        return OPTConfig(
            vocab_size=vocabulary, hidden_size=40, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
            word_embed_proj_dim=40, init_std=0.2, max_position_embeddings=128, **TOKENS,
        )  # fmt: skip
    return T5Config(
        vocab_size=vocabulary, d_model=40, d_kv=10, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=0, feed_forward_proj="gated-gelu", tie_word_embeddings=False, initializer_factor=1.0,
        pad_token_id=0, eos_token_id=2,
    )  # fmt: skip


def build(family: str, folder: Path):
    """Saves a random model of a family such as "instructblip-llama" with its processor; returns both."""
    name, _, llm = family.partition("-")
    torch.manual_seed(0)
    model, processor = {"instructblip": _instructblip, "instructblipvideo": _video, "blip2": _blip2, "llava": _llava}[
        name
    ](llm)
    model = model.eval()
    if hasattr(model, "query_tokens"):
        torch.nn.init.normal_(model.query_tokens)
    if llm == "t5":  # else it repeats the padding token that its decoder starts with, which no text shows
        torch.nn.init.zeros_(model.language_model.shared.weight.data[:3])
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


def _instructblip(llm: str):
    text = tokenizer("<image>", bos=llm != "t5")
    config = InstructBlipConfig(
        vision_config=VISION, qformer_config=QFORMER, text_config=text_config(llm, len(text)).to_dict(),
        num_query_tokens=QUERIES, image_token_index=text.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    processor = InstructBlipProcessor(BlipImageProcessor(size=SQUARE), text, toy_tokenizer(), num_query_tokens=QUERIES)
    return InstructBlipForConditionalGeneration(config), processor


def _video(llm: str):
    text = tokenizer("<video>", bos=llm != "t5")
    config = InstructBlipVideoConfig(
        vision_config=VISION, qformer_config=QFORMER, text_config=text_config(llm, len(text)).to_dict(),
        num_query_tokens=QUERIES, video_token_index=text.convert_tokens_to_ids("<video>"),
    )  # fmt: skip
    frames = InstructBlipVideoVideoProcessor(size=SQUARE)
    processor = InstructBlipVideoProcessor(frames, text, toy_tokenizer(), num_query_tokens=QUERIES)
    return InstructBlipVideoForConditionalGeneration(config), processor


def _blip2(llm: str):
    text = tokenizer("<image>", bos=llm != "t5")
    config = Blip2Config(
        vision_config=VISION, qformer_config=QFORMER, text_config=text_config(llm, len(text)).to_dict(),
        num_query_tokens=QUERIES, image_token_index=text.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    return Blip2ForConditionalGeneration(config), Blip2Processor(
        BlipImageProcessor(size=SQUARE), text, num_query_tokens=QUERIES
    )


def _llava(llm: str):
    text = tokenizer("<image>", bos=True)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION), text_config=text_config(llm, len(text)),
        image_token_index=text.convert_tokens_to_ids("<image>"), vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )  # fmt: skip
    pictures = CLIPImageProcessor(size=SQUARE, do_center_crop=False)
    return LlavaForConditionalGeneration(config), LlavaProcessor(
        pictures, text, patch_size=7, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def build_retrieval(folder: Path, *, prefixed: bool, **qformer):
    """Saves a random retrieval model of BLIP-2 with its processor; returns both.

    Args:
      folder: to save into.
      prefixed: the processor puts a token for each query before the text, which the model cuts off again.
      qformer: other settings of its Q-Former.
    """
    torch.manual_seed(0)
    text = tokenizer("<image>", bos=True)
    config = Blip2Config(
        vision_config=VISION, qformer_config=QFORMER | {"use_qformer_text_input": True} | qformer,
        num_query_tokens=QUERIES, image_text_hidden_size=24,
        image_token_index=text.convert_tokens_to_ids("<image>") if prefixed else None,
    )  # fmt: skip
    model = Blip2ForImageTextRetrieval(config).eval()
    torch.nn.init.normal_(model.query_tokens)
    for part in (model.embeddings.word_embeddings, model.vision_projection, model.text_projection, model.itm_head):
        torch.nn.init.normal_(part.weight, std=0.3)
    processor = Blip2Processor(BlipImageProcessor(size=SQUARE), text, num_query_tokens=QUERIES if prefixed else None)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor
