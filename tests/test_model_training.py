"""The model in training: bridges alone learn, what is frozen stays so, and precisions may differ."""

import pytest
import torch
from kit import LONG, ONE, TWO, Beads, eight, make_branch, make_model, registered

from xblip.errors import ConfigError, InputError
from xblip.sample import Sample
from xblip.testing import ToyModality


class TestTraining:
    @pytest.fixture
    def fresh(self, llm):
        return make_model(llm)

    def test_gradients_reach_every_bridge_and_nothing_else(self, fresh):
        fresh.train()
        fresh(eight())["loss"].backward()
        for name, branch in fresh.branches.items():
            assert any(
                weight.grad is not None and weight.grad.abs().sum() > 0 for weight in branch.bridge.parameters()
            ), name
            assert branch.bridge.query_tokens.grad.abs().sum() > 0
            assert not any(weight.requires_grad or weight.grad is not None for weight in branch.encoder.parameters())
        assert not any(weight.requires_grad or weight.grad is not None for weight in fresh.llm.parameters())

    def test_train_cannot_wake_what_is_frozen(self, fresh):
        fresh.train()
        assert all(branch.bridge.training and fresh.training for branch in fresh.branches.values())
        frozen = [fresh.llm, *(branch.encoder for branch in fresh.branches.values())]
        assert not any(module.training for part in frozen for module in part.modules())
        fresh.eval()
        assert not any(module.training for module in fresh.modules())

    def test_a_checkpoint_holds_bridges_only_and_loads(self, fresh, llm):
        weights = fresh.state_dict()
        assert weights and all(name.split(".")[:1] + name.split(".")[2:3] == ["branches", "bridge"] for name in weights)
        other = make_model(llm)
        with torch.no_grad():
            for branch in other.branches.values():
                branch.bridge.projector.weight.zero_()
        other.load_state_dict(weights)
        sample = [Sample("what ?", [("toy", ONE)], "red")]
        assert torch.equal(other(sample)["loss"], fresh(sample)["loss"])

    def test_learning_lowers_the_loss_of_what_is_learnt(self, fresh):
        samples = [Sample("what ?", [("toy", ONE)], "red"), Sample("what ?", [("toy", TWO)], "blue")]
        optimizer = torch.optim.Adam([weight for weight in fresh.parameters() if weight.requires_grad], lr=1e-2)
        first = fresh(samples)["loss"].item()
        for _ in range(15):
            optimizer.zero_grad()
            fresh(samples)["loss"].backward()
            optimizer.step()
        assert fresh(samples)["loss"].item() < first / 3

    @pytest.mark.parametrize("samples", [[], [Sample("what ?")], [Sample("what ?", answer="red"), Sample("what ?")]])
    def test_samples_without_answers_are_an_error(self, model, samples):
        with pytest.raises(InputError, match="Training needs samples, each with an answer"):
            model(samples)


def test_encoders_may_run_in_another_precision(llm):
    with registered(ToyModality):
        full, half = (make_branch(ToyModality, llm, encoder_dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert next(half.encoder.parameters()).dtype == torch.bfloat16
    assert half.encoder.fingerprint == full.encoder.fingerprint
    with torch.no_grad():
        left, right = (branch([LONG], ["what ?"])[0] for branch in (full, half))
    assert left.dtype == right.dtype == torch.float32 and torch.allclose(left, right, atol=0.5)


def test_an_llm_in_another_precision_takes_and_gives(llm_folder):
    from xblip.llm import FrozenLLM, LLMConfig

    half = make_model(FrozenLLM.from_pretrained(LLMConfig(source=str(llm_folder), dtype="bfloat16")))
    assert half.ask("what ?", toy=ONE, max_new_tokens=2).num_prompt_tokens == 9
    half(eight())["loss"].backward()
    assert half.branches["toy"].bridge.query_tokens.grad.abs().sum() > 0


def test_an_unknown_precision_is_an_error(llm):
    with registered(Beads), pytest.raises(ConfigError, match='Unknown encoder_dtype "float31"'):
        make_branch(Beads, llm, encoder_dtype="float31")
