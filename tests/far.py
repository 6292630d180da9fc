"""Model configs whose sources are not here, for tests of dry runs."""

TOY = [1.0, 2.0, 3.0, 4.0]  # the toy modality's own example
VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "image_size": 32}
ARCHITECTURES = {
    "far/vit": {
        "config": {"model_type": "clip_vision_model", "patch_size": 16, **VIT},
        "processor": {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": 32},
            "crop_size": {"height": 32, "width": 32},
        },
        "get": "hf download far/vit",
    },
    "far/llama": {
        "config": {
            "model_type": "llama",
            "vocab_size": 40,
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "dtype": "bfloat16",
        },
        "tokenizer": {"size": 40, "bos_token": "<s>", "eos_token": "</s>"},
    },
    "far/qformer": {"tokenizer": {"size": 30, "pad_token": "[PAD]"}},
    "far/tokenizer": {"tokenizer": {"size": 30, "pad_token": "[PAD]"}},
}
TOKENIZER = {"size": 9, "eos_token": "</s>"}
ARCHITECTURES["far/other-vit"] = ARCHITECTURES["far/vit"]


def far(encoder="far/vit", **bridge) -> dict:
    return {"config": {"encoder": encoder}, "bridge": bridge or {"kind": "mlp"}}


def pictures(llm="far/llama", **branches) -> dict:
    return {"llm": {"source": llm}, "branches": branches or {"image": far()}}


def count(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
