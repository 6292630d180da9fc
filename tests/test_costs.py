"""Formulas of costs are what torch counts of small networks with weights, forward and backward."""

import pytest
import torch
from far import ARCHITECTURES, TOKENIZER, far, pictures
from rich.console import Console
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from xblip import costs as costing
from xblip.bridge import QFormerBridge
from xblip.costs import Costs, CountedCost, Flops, LLMCost, QFormerCost, bridge_cost, count_flops, step_flops, total
from xblip.doctor import examine, in_flops, report_tables
from xblip.dryrun import _on_meta
from xblip.llm import IGNORE, FrozenLLM, LLMConfig, PromptBatch
from xblip.modality import Features
from xblip.testing import small_qformer, toy_tokenizer
from xblip.tokenwise import MLPBridge

TOLERANCE = 0.02
SIZES = {"vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}


def frozen(model) -> FrozenLLM:
    return FrozenLLM(model, toy_tokenizer(), config=LLMConfig(source="tiny"))


def llama(**sizes) -> FrozenLLM:
    return frozen(LlamaForCausalLM(LlamaConfig(**{**SIZES, "intermediate_size": 80, **sizes})))


def counted(run) -> tuple[int, int]:
    """Forward and backward FLOPs that torch counts."""
    found = []
    forward = count_flops(lambda: found.append(run()))
    return forward, count_flops(lambda: found[0].sum().backward())


def experts() -> FrozenLLM:
    config = Qwen3MoeConfig(**SIZES, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2, head_dim=16)
    config._experts_implementation = "eager"  # whose products are those that the counter knows
    return frozen(Qwen3MoeForCausalLM(config))


DECODERS = {
    "llama": llama,
    "groups of heads": lambda: llama(num_key_value_heads=2),
    "heads wider than the model": lambda: llama(head_dim=16),
    "opt": lambda: frozen(OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=80, word_embed_proj_dim=24))),
    "experts": experts,
    "gpt2": lambda: frozen(GPT2LMHeadModel(GPT2Config(vocab_size=48, n_embd=32, n_layer=3, n_head=4))),
}


class TestLLM:
    @pytest.mark.parametrize("make", DECODERS.values(), ids=DECODERS)
    @pytest.mark.parametrize("positions", [5, 60])
    def test_a_decoder(self, make, positions):
        llm, rows = make(), 2
        embeds = torch.randn(rows, positions, llm.width, requires_grad=True)
        batch = PromptBatch(embeds, torch.ones(rows, positions, dtype=torch.long))
        forward, backward = counted(lambda: llm.logits(batch))
        cost = LLMCost.of(llm)
        inner = cost.flops([positions] * rows, 0)
        head = 2 * rows * positions * cost.vocabulary
        assert forward == pytest.approx(inner.forward + head, rel=TOLERANCE)
        assert backward == pytest.approx(inner.backward + head, rel=TOLERANCE)

    def test_an_encoder_decoder(self):
        sizes = {"vocab_size": 48, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_heads": 4}
        llm = frozen(
            T5ForConditionalGeneration(
                T5Config(**sizes, num_layers=3, num_decoder_layers=4, decoder_start_token_id=0, pad_token_id=0)
            )
        )
        rows, positions, labels = 2, 60, 6
        embeds = torch.randn(rows, positions, llm.width, requires_grad=True)
        mask = torch.ones(rows, positions, dtype=torch.long)
        batch = PromptBatch(embeds, mask, torch.ones(rows, labels, dtype=torch.long))
        forward, backward = counted(lambda: llm.logits(batch))
        cost = LLMCost.of(llm)
        inner = cost.flops([positions] * rows, labels * rows)
        head = 2 * rows * labels * cost.vocabulary
        assert forward == pytest.approx(inner.forward + head, rel=TOLERANCE)
        # Gradients end in the decoder's first layer, where cross-attention's queries begin.
        assert backward == pytest.approx(inner.backward + head, rel=2 * TOLERANCE)

    def test_a_mixture_of_experts_counts_active_ones(self):
        def weights(active):
            config = Qwen3MoeConfig(
                **SIZES, moe_intermediate_size=24, num_experts=8, num_experts_per_tok=active, head_dim=16
            )
            return LLMCost.of(frozen(Qwen3MoeForCausalLM(config))).weights

        layers, each = SIZES["num_hidden_layers"], 3 * 32 * 24
        assert weights(4) - weights(2) == layers * 2 * each

    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_a_step_as_training_does_it(self, checkpointing):
        llm, positions, labels = llama(), 20, 3
        if checkpointing:
            llm.checkpoint_layers()
        ids = torch.full((2, positions), IGNORE)
        ids[:, -labels:] = 5
        embeds = torch.randn(2, positions, llm.width, requires_grad=True)
        batch = PromptBatch(embeds, torch.ones(2, positions, dtype=torch.long), ids)
        llm.token_log_likelihoods(batch)  # the first finds out how the model makes logits
        done = counted(lambda: llm.token_log_likelihoods(batch)[0])
        costs = Costs(0.0, CountedCost(Flops(0.0)), LLMCost.of(llm))
        lengths = {"segments": 2, "tokens": 1, "text": 0, "positions": [positions] * 2, "labels": 2 * labels}
        expected = total(step_flops(costs, **lengths, checkpointing=checkpointing))
        assert sum(done) == pytest.approx(expected, rel=TOLERANCE)


class TestBridges:
    @pytest.fixture
    def features(self):
        return Features(torch.randn(6, 40, 24), torch.ones(6, 40, dtype=torch.bool), [3, 3])

    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"instruction_aware": False},
            {"features_layer_norm": False},
            {"num_hidden_layers": 3, "join_segments": True},
            {"num_hidden_layers": 4, "cross_attention_frequency": 3, "max_segments": 4},
        ],
        ids=str,
    )
    def test_a_qformer(self, llm_folder, features, settings):
        config = small_qformer(llm_folder, **settings)
        config.pop("kind")
        bridge = QFormerBridge(QFormerBridge.Config(**config), encoder_width=24, llm_width=48)
        words = "what is this " * 3
        forward, backward = counted(lambda: torch.cat(bridge(features, [words, words])))
        cost = bridge_cost(bridge, features)
        flops = cost.flops(segments=6, tokens=40, text=9, samples=2)
        assert isinstance(cost, QFormerCost)
        assert forward == pytest.approx(flops.forward, rel=TOLERANCE)
        assert backward == pytest.approx(flops.backward, rel=TOLERANCE)

    def test_any_other_is_counted_where_it_is(self, features):
        bridge = MLPBridge(MLPBridge.Config(hidden_size=10), encoder_width=24, llm_width=48)
        one = Features(features.values[:3], features.mask[:3], [3])
        cost = bridge_cost(bridge, one)
        tokens = 40 * 2
        forward = tokens * (24 * 10 + 10 * 48)
        assert cost == CountedCost(Flops(forward, forward + tokens * 10 * 48))
        assert cost.flops(segments=4, tokens=40, text=3, samples=2) == Flops(4 * forward, 4 * cost.segment.backward)
        assert all(weight.grad is None for weight in bridge.parameters())


class TestDryRuns:
    """What is counted without weights is what runs with them."""

    @pytest.mark.parametrize("groups", [4, 2])
    def test_attention_without_weights_is_counted_as_with_them(self, groups):
        found = []
        for device in ("cpu", "meta"):
            with torch.device(device):
                llm = LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=80, num_key_value_heads=groups))
                embeds = torch.randn(2, 30, 32, requires_grad=True)
            llm.requires_grad_(False)
            with _on_meta() if device == "meta" else torch.enable_grad():
                found.append(counted(lambda llm=llm, embeds=embeds: llm(inputs_embeds=embeds).logits))
        assert found[0] == found[1]

    def test_an_encoder(self, write):
        report = examine(write(**pictures()))
        settings = ARCHITECTURES["far/vit"]["config"]
        sizes = {name: value for name, value in settings.items() if name != "model_type"}
        vit = CLIPVisionModel(CLIPVisionConfig(**sizes))
        with torch.no_grad():
            real = count_flops(lambda: vit(torch.zeros(1, 3, 32, 32)))
        tokens, width, inner = 5, 16, 24
        layer = tokens * (4 * width**2 + 2 * width * inner) + 2 * tokens**2 * width
        by_hand = 2 * (4 * 16 * 16 * 3 * width + 2 * layer)
        assert report.ways["image"].costs.encoder == real == by_hand

    @pytest.mark.slow
    def test_segments_and_an_encoder_decoder(self, write):
        config = {"model_type": "t5", "d_model": 24, "d_kv": 4, "num_heads": 4, "num_layers": 2, "vocab_size": 40}
        config["decoder_start_token_id"] = 0
        known = {"far/t5": {"config": config, "tokenizer": {**TOKENIZER, "size": 40}}}
        report = examine(write(**pictures("far/t5", image=far(), video=far()), architectures=ARCHITECTURES | known))
        image, video = report.ways["image"], report.ways["video"]
        assert video.flops["encoder"].forward == video.features[0] * image.flops["encoder"].forward
        assert video.flops["bridge"] == Flops(*(video.features[0] * part for part in image.flops["bridge"]))

    @pytest.mark.usefixtures("toys")
    def test_the_doctor_shows_them(self, write, llm_folder, capsys):
        branches = {"toy": {"bridge": small_qformer(llm_folder)}}
        report = examine(write(llm={"source": str(llm_folder)}, branches=branches, generation={"max_new_tokens": 3}))
        way = report.ways["toy"]
        lengths = {"segments": 1, "tokens": 4, "text": 4, "labels": 3}
        assert way.flops == step_flops(way.costs, positions=[report.prompt_positions + 3], **lengths)
        for shown in report_tables(report):
            Console(width=80).print(shown)
        row = next(line for line in capsys.readouterr().out.splitlines() if "FLOP" in line)
        assert row.strip().startswith("train toy") and in_flops(total(way.flops)) in row


class TestRealModels:
    """The same code counts a model with weights, as a trainer has one."""

    def test_costs_of_a_branch_are_those_of_its_dry_run(self, model, write, llm_folder, toys):
        branches = {"toy": {"bridge": small_qformer(llm_folder), "config": {"width": 16}}}
        dry = examine(write(llm={"source": str(llm_folder)}, branches=branches)).ways["toy"].costs
        branch = model.branches["toy"]
        costs, features = costing.costs_of(lambda: branch.encode([[1.0, 2.0, 3.0, 4.0]]), branch.bridge, model.llm)
        assert costs.llm == dry.llm and costs.encoder == dry.encoder > 0
        assert features.segments == [1] and all(weight.grad is None for weight in branch.parameters())

    def test_stored_features_cost_nothing_to_encode(self, model):
        branch = model.branches["toy"]
        stored = branch.encode([[1.0, 2.0, 3.0, 4.0]])
        costs, features = costing.costs_of(lambda: branch.encode([stored]), branch.bridge, model.llm)
        assert costs.encoder == 0 and features.values.equal(stored.values)


class TestSteps:
    COSTS = Costs(100.0, CountedCost(Flops(10.0, 20.0)), LLMCost.of(llama()))
    STEP = {"segments": 6, "tokens": 5, "text": 3, "positions": [7, 9], "labels": 4}

    def test_stored_features_spare_the_encoder_alone(self):
        fresh, stored = (step_flops(self.COSTS, **self.STEP, stored=stored) for stored in (False, True))
        assert fresh["encoder"] == Flops(600.0) and stored["encoder"] == Flops(0.0)
        assert total(fresh) - total(stored) == 600

    def test_a_step_is_its_samples(self):
        whole = step_flops(self.COSTS, **self.STEP)
        half = {"segments": 3, "tokens": 5, "text": 3, "labels": 2}
        parts = [step_flops(self.COSTS, positions=[count], **half) for count in self.STEP["positions"]]
        assert total(whole) == pytest.approx(sum(map(total, parts)))

    def test_what_checkpointing_repeats_is_no_part_of_utilisation(self):
        plain, again = (step_flops(self.COSTS, **self.STEP, checkpointing=on) for on in (False, True))
        assert total(again) > total(again, again=False) == total(plain)

    def test_the_first_stage_is_its_passes(self, llm_folder):
        config = small_qformer(llm_folder)
        config.pop("kind")
        bridge = QFormerBridge(QFormerBridge.Config(**config), encoder_width=24, llm_width=48).eval()
        ids, words = torch.ones(2, 5, dtype=torch.long), len(bridge.tokenizer)
        features = torch.randn(2, 40, 24)

        def passes():
            media, queries = bridge.qformer.read_media(features), bridge.query_tokens
            bridge.qformer(queries, media)
            bridge.qformer.read_text(ids)
            pairs = [(keys[[0, 1, 1, 0, 0, 1]], values[[0, 1, 1, 0, 0, 1]]) for keys, values in media]
            bridge.qformer(queries, pairs, input_ids=ids.repeat(3, 1))
            bridge.qformer.read_text(ids)  # over the queries' keys too, which are 4 more for each of 5 words

        cost = QFormerCost.of(bridge)
        flops = cost.align_flops(segments=2, tokens=40, text=5, samples=2)
        seen = 2 * 2 * 2 * 5 * 4 * 2 * 32
        with torch.no_grad():
            forward = count_flops(passes) + seen + 2 * 2 * 5 * 32 * words
        assert flops.forward == pytest.approx(forward, rel=TOLERANCE)
        assert 1.9 * flops.forward < flops.backward < 2 * flops.forward + 1

    def test_joined_segments_are_one_row(self):
        sizes = {"queries": 4, "width": 32, "inner": 64, "layers": 2, "readers": 1, "encoder_width": 24, "llm_width": 8}
        apart, joined = (QFormerCost(**sizes, vocabulary=0, joins_segments=on, features_train=True) for on in (0, 1))
        one = {"tokens": 40, "text": 0, "samples": 2}
        assert joined.flops(segments=6, **one).forward < apart.flops(segments=6, **one).forward
        assert joined.flops(segments=2, **one) == apart.flops(segments=2, **one)


class TestBytes:
    @pytest.mark.parametrize(
        ("dtype", "expected"), [("float32", 96), ("float16", 48), ("bfloat16", 48), ("int8", 24 + 3 * 4)]
    )
    def test_of_stored_features(self, dtype, expected):
        assert costing.stored_bytes(1, 3, 8, dtype) == expected

    def test_over_the_network(self):
        assert costing.all_reduce_bytes(100, 1) == costing.all_gather_bytes(100, 1) == 0
        assert costing.all_reduce_bytes(100, 4) == 2 * 3 / 4 * 400
        assert costing.all_gather_bytes(100, 4) == 2 * 3 / 4 * 100

    def test_of_a_checkpoint(self):
        bridge = torch.nn.Linear(10, 10)
        optimizer = torch.optim.AdamW(bridge.parameters())
        bridge(torch.randn(2, 10)).sum().backward()
        optimizer.step()
        states = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
        saved = sum(tensor.nbytes for tensor in (*bridge.parameters(), *states))
        assert costing.checkpoint_bytes(110) == saved

    def test_of_what_checkpointing_keeps(self):
        cost = LLMCost.of(llama())
        assert cost.activation_bytes(10, 9000) == 3 * 10 * 32 * 2 + 3000


@pytest.mark.parametrize(
    ("count", "shown"), [(12, "12 FLOP"), (1.5e6, "1.5 MFLOP"), (520.7e9, "521 GFLOP"), (7.8e12, "7.80 TFLOP")]
)
def test_operations_in_units(count, shown):
    assert in_flops(count) == shown
