"""Likelihoods at labelled positions against the same from plain logits, in value and gradient, for many architectures."""

import copy
import functools
import threading

import pytest
import torch
import torch.nn.functional as F
import transformers

from xblip import likelihood
from xblip.errors import ConfigError
from xblip.likelihood import LabelReader, log_likelihoods
from xblip.llm import IGNORE, FrozenLLM, LLMConfig, PromptBatch
from xblip.testing import toy_tokenizer

VOCABULARY = 45
ENDS = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
WIDER = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
T5 |= {"decoder_start_token_id": 0, "initializer_factor": 2.0}
BART = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "dropout": 0.0}
BART |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "init_std": 0.2}

HEAD_IS_LAST = {
    "Llama": ("LlamaForCausalLM", {**WIDER, "num_key_value_heads": 4}),
    "Qwen3, tied": ("Qwen3ForCausalLM", {**WIDER, "tie_word_embeddings": True}),
    "OPT": ("OPTForCausalLM", {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 24, "init_std": 0.3}),
    "Gemma 3": ("Gemma3ForCausalLM", WIDER),
    "T5, tied and scaled": ("T5ForConditionalGeneration", {**T5, "tie_word_embeddings": True}),
    "T5": ("T5ForConditionalGeneration", {**T5, "tie_word_embeddings": False}),
    "BART": ("BartForConditionalGeneration", BART),
}
MODEL_DOES_MORE = {
    "Gemma 2, capped": ("Gemma2ForCausalLM", {**WIDER, "final_logit_softcapping": 3.0}),
    "Cohere, scaled": ("CohereForCausalLM", {**WIDER, "logit_scale": 0.25}),
    "BART with a bias": ("BartForConditionalGeneration", BART),
}


def build(name: str, settings: dict) -> FrozenLLM:
    model_class = getattr(transformers, name)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**ENDS, **settings))
    return FrozenLLM(model, toy_tokenizer(), config=LLMConfig(source="made here"))


def make_batch(llm: FrozenLLM) -> PromptBatch:
    """Three rows, right-padded; the second has a label that nothing stands before, the third none at all."""
    torch.manual_seed(1)
    embeds = torch.randn(3, 11, llm.width).requires_grad_()
    mask = torch.tensor([[1] * 11, [1] * 6 + [0] * 5, [1] * 9 + [0] * 2])
    labels = torch.full((3, 7 if llm.is_encoder_decoder else 11), IGNORE)
    labels[0, -5:] = torch.tensor([7, 9, 11, 3, 2])
    labels[1, 0], labels[1, 3:6] = 8, torch.tensor([6, 5, 2])
    return PromptBatch(embeds, mask, labels)


def plainly(llm: FrozenLLM, batch: PromptBatch) -> torch.Tensor:
    """Likelihoods from the logits of all positions."""
    logits, labels = llm.logits(batch), batch.labels
    if not llm.is_encoder_decoder:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return -F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORE, reduction="none")


def gradient(values: torch.Tensor, batch: PromptBatch) -> torch.Tensor:
    weights = torch.linspace(-1, 2, values.numel()).reshape(values.shape)  # no two tokens count the same
    return torch.autograd.grad((values * weights).sum(), batch.inputs_embeds)[0]


@pytest.mark.parametrize("family", [*HEAD_IS_LAST, *MODEL_DOES_MORE])
@pytest.mark.parametrize("rows", [256, 3], ids=["at once", "in chunks"])
def test_values_and_gradients_are_those_of_plain_logits(family, rows, monkeypatch):
    monkeypatch.setattr(likelihood, "ROWS", rows)
    llm = build(*(HEAD_IS_LAST | MODEL_DOES_MORE)[family])
    if family.endswith("bias"):
        torch.nn.init.normal_(llm.model.final_logits_bias, std=0.1)
    batch = make_batch(llm)
    values, mask = llm.token_log_likelihoods(batch)
    expected = plainly(llm, batch)
    assert mask.sum() == (batch.labels[:, 0 if llm.is_encoder_decoder else 1 :] != IGNORE).sum()
    assert values.dtype == torch.float32 and (values - expected).abs().max() <= 1e-5
    ours, theirs = gradient(values, batch), gradient(expected, batch)
    largest = theirs.abs().max()
    assert largest > 1e-3 and (ours - theirs).abs().max() <= 1e-5 * max(largest, 1)
    with torch.no_grad():
        assert torch.equal(llm.token_log_likelihoods(batch)[0], values)


@pytest.mark.parametrize("family", [*HEAD_IS_LAST, *MODEL_DOES_MORE])
def test_no_logits_are_made_where_no_label_is(family, monkeypatch):
    monkeypatch.setattr(likelihood, "ROWS", 3)
    llm = build(*(HEAD_IS_LAST | MODEL_DOES_MORE)[family])
    if family.endswith("bias"):
        torch.nn.init.normal_(llm.model.final_logits_bias, std=0.1)
    batch = make_batch(llm)
    llm.token_log_likelihoods(batch)  # finds out what the model does
    sizes: list[int] = []
    head = llm.model.get_output_embeddings()
    forward = head.forward
    monkeypatch.setattr(head, "forward", lambda hidden: sizes.append(hidden[..., 0].numel()) or forward(hidden))
    count = int(llm.token_log_likelihoods(batch)[1].sum())
    assert max(sizes) == (3 if family in HEAD_IS_LAST else count) and sum(sizes) <= count + 1


def test_nothing_to_predict_is_no_likelihood(llm):
    batch = make_batch(llm)
    batch.labels[:, 1:] = IGNORE
    values, mask = llm.token_log_likelihoods(batch)
    assert not mask.any() and not values.any() and not gradient(values, batch).any()


def test_what_another_thread_runs_meanwhile_is_left_alone(llm):
    """Its hidden states are its own, though it runs the same model."""
    batch = make_batch(llm)
    expected = [llm.logits(batch), llm.token_log_likelihoods(batch)[0]]
    seen: list[torch.Tensor] = []

    def run():
        thread = threading.Thread(target=lambda: seen.append(llm.logits(batch)))
        thread.start()
        thread.join()
        return llm._run(batch.inputs_embeds, llm._others(batch))

    labels = batch.labels[:, 1:]
    mask = labels != IGNORE
    values = LabelReader(llm.model).read(run, mask.nonzero(as_tuple=True), labels[mask])
    assert seen and all(torch.equal(logits, expected[0]) for logits in seen)
    assert torch.equal(values, expected[1][mask])


def test_half_precision_loses_no_more_than_its_own_rounding():
    torch.manual_seed(0)
    states, weights, targets = torch.randn(20, 16), torch.randn(5000, 16) * 0.3, torch.randint(0, 5000, (20,))
    found = []
    for dtype in (torch.float32, torch.float16):
        hidden = states.to(dtype, copy=True).requires_grad_()
        values = log_likelihoods(hidden, targets, functools.partial(F.linear, weight=weights.to(dtype)))
        (values.mean() * 65536).backward()  # as fp16 training scales its loss
        found.append(hidden.grad.float() / 65536)
    assert (found[0] - found[1]).norm() <= 3e-3 * found[0].norm()


def saved_bytes(llm: FrozenLLM, batch: PromptBatch) -> int:
    """Of what a forward pass keeps for the backward pass, weights left out."""
    weights = {weight.data_ptr() for weight in llm.model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor):
        if tensor.data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        values, _ = llm.token_log_likelihoods(batch)
    total = sum(kept.values())
    del values  # until now, so that no memory was used twice
    return total


def _leaned(llm: FrozenLLM) -> set[type]:
    return {type(module) for module in llm.model.modules() if type(module).__module__ == "xblip.activations"}


class TestGatedFeedForwards:
    @pytest.mark.parametrize(
        ("family", "settings"),
        [("Llama", {}), ("Gemma2", {}), ("Qwen3", {})],
        ids=["Llama", "Gemma 2", "Qwen 3"],
    )
    def test_they_keep_less_for_the_same_gradients(self, family, settings, monkeypatch):
        made = f"{family}ForCausalLM", {**WIDER, "intermediate_size": 200, **settings}
        lean = build(*made)
        monkeypatch.setattr("xblip.llm.keep_less", lambda model: None)
        plain = build(*made)
        found = []
        for llm in (lean, plain):
            batch = make_batch(llm)
            values, _ = llm.token_log_likelihoods(batch)
            found.append((values, gradient(values, batch), saved_bytes(llm, make_batch(llm))))
        assert torch.equal(found[0][0], found[1][0])
        assert (found[0][1] - found[1][1]).abs().max() <= 1e-5 * found[1][1].abs().max()
        assert found[0][2] <= found[1][2] - 2 * 3 * 11 * 200 * 4  # layers, rows, positions, width, bytes

    def test_others_are_left_as_they_are(self):
        llm = build("Phi3ForCausalLM", {**WIDER})
        assert not _leaned(llm)

    def test_layers_share_one_forward_so_that_torch_compiles_it_once(self):
        llm = build(*HEAD_IS_LAST["Llama"])
        [kind] = _leaned(llm)
        found = [module for module in llm.model.modules() if type(module) is kind]
        assert len(found) == 2 and not any("forward" in vars(module) for module in found)
        assert kind.__name__ == "LlamaMLP" and issubclass(kind, transformers.models.llama.modeling_llama.LlamaMLP)

    def test_a_copy_has_weights_of_its_own(self):
        model = build(*HEAD_IS_LAST["Llama"]).model
        other = copy.deepcopy(model)
        before = model(torch.tensor([[4, 5]])).logits
        for weight in other.parameters():
            weight.data.zero_()
        assert torch.equal(model(torch.tensor([[4, 5]])).logits, before)
        assert not other(torch.tensor([[4, 5]])).logits.any()


class TestCheckpointing:
    @pytest.mark.parametrize("family", ["Llama", "OPT", "Gemma 2, capped", "T5", "BART"])
    def test_gradients_stay_and_activations_go(self, family):
        llm = build(*(HEAD_IS_LAST | MODEL_DOES_MORE)[family])
        batch = make_batch(llm)
        values = llm.token_log_likelihoods(batch)[0]
        expected, before = gradient(values, batch), saved_bytes(llm, batch)
        llm.checkpoint_layers()
        llm.checkpoint_layers()  # once more changes nothing
        again = llm.token_log_likelihoods(batch)[0]
        assert torch.equal(again, values) and torch.equal(gradient(again, batch), expected)
        assert saved_bytes(llm, batch) < before / 2
        assert not any(module.training for module in llm.modules())

    def test_generation_is_what_it_was(self):
        llm = build(*HEAD_IS_LAST["Llama"])
        batch = make_batch(llm)
        batch.labels = None
        before = llm.generate(batch, max_new_tokens=4)
        llm.checkpoint_layers()
        assert llm.generate(batch, max_new_tokens=4) == before

    def test_a_model_without_such_layers_is_an_error(self):
        llm = build(*HEAD_IS_LAST["Llama"])
        llm.model = torch.nn.Linear(2, 2)
        with pytest.raises(ConfigError, match="A Linear has no layers whose activations can be computed again: leave"):
            llm.checkpoint_layers()
