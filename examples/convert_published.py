"""Convert a model of transformers into a bundle, ask it, and convert it back.

The InstructBLIP here is tiny and random, since a real one has 16 GB; with `Salesforce/instructblip-vicuna-7b` in the
place of `theirs` the same lines give the real one. In a shell: `xblip convert SOURCE FOLDER`.

Run: python examples/convert_published.py
"""

import tempfile
from pathlib import Path

import numpy as np
from transformers import (
    BlipImageProcessor,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    LlamaConfig,
)

import xblip
from xblip.convert import convert, export
from xblip.testing import toy_tokenizer

folder = Path(tempfile.mkdtemp())
tokenizer = toy_tokenizer()
tokenizer.add_tokens(["<image>"])
vocabulary, sizes = len(tokenizer), {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
config = InstructBlipConfig(
    vision_config={**sizes, "num_hidden_layers": 2, "image_size": 28, "patch_size": 7},
    qformer_config={**sizes, "num_hidden_layers": 2, "encoder_hidden_size": 32, "vocab_size": vocabulary},
    text_config=LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=vocabulary, pad_token_id=0).to_dict(),
    num_query_tokens=4,
    image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
)
InstructBlipForConditionalGeneration(config).save_pretrained(folder / "theirs")
pictures = BlipImageProcessor(size={"height": 28, "width": 28})
InstructBlipProcessor(pictures, tokenizer, tokenizer, num_query_tokens=4).save_pretrained(folder / "theirs")

report = convert(folder / "theirs", folder / "ours")
print(f"{report.made}, {report.loaded} weights")
model = xblip.load(folder / "ours")
print(model.ask("what is this ?", image=np.zeros((40, 50, 3), np.uint8), max_new_tokens=4, min_new_tokens=2))
print("and back:", export(folder / "ours", folder / "back").made)
