"""Two systems with equal weights: an InstructBLIP of transformers, and the bundle that `xblip convert` makes of it.

Also what both learn from: pictures on disk, instructions and answers. Weights, pictures and words are random, for what a
step takes does not depend on them; lengths are log-uniform, since most texts are short and a few are long.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import (
    BlipImageProcessor,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    LlamaConfig,
)

from xblip import Features, Sample, XBlip
from xblip.align import AlignModel
from xblip.branch import Branch, read_saved
from xblip.convert import convert
from xblip.testing import toy_tokenizer

QUERIES = 32
CAPTION_PROMPT = "w1 w2 w3"
"""Of three tokens, as the "a photo of" of BLIP-2."""
INSTRUCTION_TOKENS = (5, 60)
ANSWER_TOKENS = (3, 40)
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]


@dataclass(frozen=True)
class Shapes:
    """Sizes of a model and of its steps.

    Attributes:
      vision, qformer, llm: as the configs of transformers name them.
      vocabulary: of the LLM, without `<image>`.
      words: of the Q-Former's tokenizer.
      dtype: of what is frozen.
      rows: samples of a micro-batch.
      accumulation: micro-batches of a step.
    """

    vision: dict[str, Any]
    qformer: dict[str, Any]
    llm: dict[str, Any]
    vocabulary: int
    words: int
    dtype: torch.dtype
    rows: int
    accumulation: int


FULL_SIZE = Shapes(
    vision={},  # EVA-CLIP-g, which is transformers' default
    qformer={},  # BERT-base, likewise
    llm={},  # Llama-7B, likewise
    vocabulary=32000,
    words=30523,
    dtype=torch.bfloat16,
    rows=16,
    accumulation=4,
)
SMALL = Shapes(
    vision={"hidden_size": 192, "intermediate_size": 840, "num_hidden_layers": 6, "num_attention_heads": 3},
    qformer={"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4},
    llm={"hidden_size": 384, "intermediate_size": 1032, "num_hidden_layers": 12, "num_attention_heads": 6},
    vocabulary=1100,
    words=1100,
    dtype=torch.float32,
    rows=16,
    accumulation=4,
)
"""About 1/300 of the full size's work a sample, shared alike by encoder, Q-Former, LLM and vocabulary."""
TINY = replace(
    SMALL,
    vision=SMALL.vision | {"num_hidden_layers": 1},
    llm={"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4},
    rows=3,
    accumulation=2,
)
"""For the test of the benchmark itself."""


@dataclass(frozen=True)
class Row:
    """A sample: a picture's file, an instruction and the answer to learn."""

    picture: Path
    instruction: str
    answer: str


def save_pair(shapes: Shapes, folder: Path, device: str = "cpu") -> None:
    """Writes a random InstructBLIP into `folder`/theirs, and the bundle made of it into `folder`/ours."""
    tokenizer = make_tokenizer(shapes.vocabulary, ["<s>"], [])
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    reader = make_tokenizer(shapes.words, ["<s>"], ["</s>"])  # in the place of BERT's [CLS] and [SEP]
    config = make_config(shapes, vocabulary=len(tokenizer), image_token=tokenizer.convert_tokens_to_ids("<image>"))
    torch.manual_seed(0)
    with torch.device(device):
        model = InstructBlipForConditionalGeneration(config)
        nn.init.normal_(model.query_tokens, std=0.02)
    for part in (model.vision_model, model.language_model):
        part.to(shapes.dtype)
    model.save_pretrained(folder / "theirs")
    pictures = BlipImageProcessor(size={"height": 224, "width": 224})
    InstructBlipProcessor(pictures, tokenizer, reader, num_query_tokens=QUERIES).save_pretrained(folder / "theirs")
    del model
    convert(folder / "theirs", folder / "ours")


def make_config(shapes: Shapes, *, vocabulary: int, image_token: int) -> InstructBlipConfig:
    """Of theirs; `vocabulary` counts `image_token` too."""
    return InstructBlipConfig(image_token_index=image_token, **settings_of(shapes, vocabulary=vocabulary))


def settings_of(shapes: Shapes, *, vocabulary: int) -> dict[str, Any]:
    """What the configs of InstructBLIP and of InstructBlipVideo have in common."""
    llm = LlamaConfig(vocab_size=vocabulary, pad_token_id=0, bos_token_id=1, eos_token_id=2, **shapes.llm)
    own = {"vocab_size": shapes.words, "encoder_hidden_size": shapes.vision.get("hidden_size", 1408), **shapes.qformer}
    return {
        "vision_config": shapes.vision,
        "qformer_config": own,
        "text_config": llm.to_dict(),
        "num_query_tokens": QUERIES,
    }


def make_tokenizer(size: int, before: Sequence[str], after: Sequence[str]):
    """Of so many words, with special tokens around every text."""
    words = [f"w{number}" for number in range(size - len(SPECIAL))]
    tokenizer = toy_tokenizer([*SPECIAL, *words])
    around = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (*before, *after)]
    single = " ".join([*before, "$A", *after])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=around)
    return tokenizer


def make_rows(shapes: Shapes, folder: Path, *, stage: str, seed: int = 0) -> list[Row]:
    """The rows of one step, each with a picture of its own, in the order in which they are drawn."""
    draw = np.random.default_rng(seed)

    def words(lengths: tuple[int, int]) -> str:
        low, high = math.log(lengths[0]), math.log(lengths[1] + 1)
        count = int(math.exp(draw.uniform(low, high)))
        return " ".join(f"w{number}" for number in draw.integers(0, shapes.words - len(SPECIAL), count))

    return [
        Row(picture, CAPTION_PROMPT if stage == "generate" else words(INSTRUCTION_TOKENS), words(ANSWER_TOKENS))
        for picture in _pictures(folder, shapes.rows * shapes.accumulation)
    ]


def _pictures(folder: Path, count: int) -> list[Path]:
    """PNG and JPEG files of 224 to 480 pixels a side, made once."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    files = [folder / f"{index}.{'png' if index % 4 == 0 else 'jpg'}" for index in range(count)]
    for file in files:
        if not file.exists():
            coarse = PIL.Image.fromarray(draw.integers(0, 256, (24, 24, 3), dtype=np.uint8))
            width, height = draw.integers(224, 480, 2).tolist()
            coarse.resize((width, height), PIL.Image.Resampling.BICUBIC).save(file)
    return files


@dataclass
class System:
    """What a Trainer is given.

    Attributes:
      model: what trains and what is frozen in it.
      rows: of one step.
      dataset: the rows, read when they are fetched.
      collate: rows to the model's inputs.
    """

    model: nn.Module
    rows: list[Row]
    dataset: Sequence[Any]
    collate: Callable[[list[Any]], dict[str, Any]]


def theirs(folder: Path, rows: Sequence[Row], device: str) -> System:
    """transformers' model with its processor, rows as they were drawn; frozen is what ours has frozen."""
    model = InstructBlipForConditionalGeneration.from_pretrained(folder / "theirs", dtype="auto").to(device)
    for part in (model.vision_model, model.language_model):
        part.requires_grad_(False)
    for part in (model.qformer, model.language_projection):
        part.float()
    model.query_tokens.data = model.query_tokens.data.float()
    model.language_model.config.use_cache = False
    processor = InstructBlipProcessor.from_pretrained(folder / "theirs")
    return System(model, list(rows), list(rows), _Collator(processor))


def ours(folder: Path, rows: Sequence[Row], device: str, *, stored: Path | None = None) -> System:
    """The bundle, rows as they were drawn.

    Args:
      folder: of `save_pair`.
      rows: of one step.
      device: of the model.
      stored: a file of `store_features`; then no picture is read, and the encoder's weights are let go.
    """
    model = XBlip.from_pretrained(folder / "ours").to(device)
    features = None
    if stored:
        model.branches["image"].encoder.module = nn.Identity()
        features = _stored(stored, len(rows), model.branches["image"].encoder.width)
    return System(
        model, list(rows), _Samples(rows, model.branches["image"], features), lambda samples: {"samples": samples}
    )


def aligned(folder: Path, rows: Sequence[Row], device: str, *, stored: Path | None = None) -> System:
    """The stage `align` on the bundle's encoder, with a fresh Q-Former of the same sizes; arguments as for `ours`."""
    config, _ = read_saved(folder / "ours" / "image")
    config.config["encoder"] = str(folder / "ours" / "image" / config.config["encoder"])
    config.bridge |= {"tokenizer": str(folder / "ours" / "image" / "tokenizer"), "dropout": 0.0}
    torch.manual_seed(0)
    model = AlignModel.build(config).to(device)
    features = None
    if stored:
        model.branch.encoder.module = nn.Identity()
        features = _stored(stored, len(rows), model.branch.encoder.width)
    return System(model, list(rows), _Samples(rows, model.branch, features), lambda samples: {"samples": samples})


class _Samples:
    """Rows as samples, their pictures read, or their features fetched."""

    def __init__(self, rows: Sequence[Row], branch: Branch, features: Tensor | None):
        self.rows = rows
        self.modality = branch.modality
        self.features = features

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        row = self.rows[index]
        if self.features is None:
            source = self.modality.load(row.picture)
        else:
            values = self.features[int(row.picture.stem)][None]
            source = Features(values, torch.ones(values.shape[:2], dtype=torch.bool), [1])
        return Sample(row.instruction, [("image", source)], row.answer)


@torch.no_grad()
def store_features(folder: Path, rows: Sequence[Row], device: str, file: Path) -> None:
    """Writes the frozen features (rows, N, D_enc) of the pictures, float32, in the order of their names."""
    branch = XBlip.from_pretrained(folder / "ours").to(device).branches["image"]
    with file.open("wb") as out:
        for row in sorted(rows, key=lambda row: int(row.picture.stem)):
            out.write(branch.encode([row.picture]).values.cpu().numpy().tobytes())


def _stored(file: Path, count: int, width: int) -> Tensor:
    """Reads them by memory map."""
    size = file.stat().st_size // 4
    return torch.from_file(str(file), shared=True, size=size).reshape(count, -1, width)


class _Collator:
    """The usual one: pictures and instructions through the processor, answers appended, padded to the longest."""

    def __init__(self, processor: InstructBlipProcessor):
        self.processor = processor

    def __call__(self, rows: list[Row]) -> dict[str, Tensor]:
        tokenizer = self.processor.tokenizer
        encoded = self.processor(
            images=[PIL.Image.open(row.picture).convert("RGB") for row in rows],
            text=[row.instruction for row in rows],
            padding=False,
        )
        answers = [[*tokenizer(row.answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id] for row in rows]
        ids = [[*prompt, *answer] for prompt, answer in zip(encoded["input_ids"], answers, strict=True)]
        batch = tokenizer.pad({"input_ids": ids}, padding=True, padding_side="right", return_tensors="pt")
        labels = torch.full_like(batch["input_ids"], -100)
        for label, row, answer in zip(labels, ids, answers, strict=True):
            label[len(row) - len(answer) : len(row)] = torch.tensor(answer)
        asked = self.processor.qformer_tokenizer.pad(
            {"input_ids": encoded["qformer_input_ids"]}, padding=True, return_tensors="pt"
        )
        return {
            "pixel_values": torch.stack([torch.as_tensor(picture) for picture in encoded["pixel_values"]]),
            "qformer_input_ids": asked["input_ids"],
            "qformer_attention_mask": asked["attention_mask"],
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
            "labels": labels,
        }
