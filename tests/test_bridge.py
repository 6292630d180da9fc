"""Bridges: rows stay aligned with their instructions, masks hold, and what is read once serves many instructions."""

import dataclasses
from pathlib import Path

import pytest
import torch
from kit import KINDS
from torch import nn

from xblip import plugins
from xblip.branch import Branch, BranchConfig
from xblip.bridge import Bridge, QFormerBridge
from xblip.config import build
from xblip.errors import BundleError, ConfigError, InputError
from xblip.modality import Features
from xblip.testing import small_qformer
from xblip.tokenwise import LinearBridge, MLPBridge

WIDTH, LLM_WIDTH = 8, 12
every_kind = pytest.mark.parametrize("kind", KINDS)
INSTRUCTIONS = ["what is this ?", "describe it", "is the input red or blue or green ? answer yes or no"]


@pytest.fixture
def make(llm_folder):
    """Makes a small Q-Former bridge, loud enough for differences to show."""

    def make(**settings) -> QFormerBridge:
        torch.manual_seed(0)
        settings = {key: value for key, value in (small_qformer(llm_folder) | settings).items() if key != "kind"}
        bridge = QFormerBridge(
            build(QFormerBridge.Config, settings, where="bridge"), encoder_width=WIDTH, llm_width=LLM_WIDTH
        )
        for parameter in bridge.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.3)
        return bridge.eval()

    return make


def make_kind(kind: str, llm_folder, **settings) -> Bridge:
    """A small bridge of any kind, loud enough for differences to show."""
    torch.manual_seed(0)
    bridge_class = plugins.get("bridge", kind)
    settings = KINDS[kind] | settings
    if "tokenizer" in {field.name for field in dataclasses.fields(bridge_class.Config)}:
        settings.setdefault("tokenizer", str(llm_folder))
    config = build(bridge_class.Config, settings, where="bridge")
    bridge = bridge_class(config, encoder_width=WIDTH, llm_width=LLM_WIDTH)
    for parameter in bridge.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    return bridge.eval()


def features(*segments: int, tokens: int = 5, seed: int = 0) -> Features:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(sum(segments), tokens, WIDTH, generator=generator)
    return Features(values, torch.ones(sum(segments), tokens, dtype=torch.bool), list(segments))


def far(left: torch.Tensor, right: torch.Tensor) -> bool:
    return (left - right).abs().max() > 1e-3


@torch.no_grad()
def test_each_segment_gives_q_tokens(make):
    softs = make(max_segments=8)(features(1, 3, 2), INSTRUCTIONS)
    assert [tuple(soft.shape) for soft in softs] == [(4, LLM_WIDTH), (12, LLM_WIDTH), (8, LLM_WIDTH)]


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"max_segments": 4}, {"join_segments": True, "max_segments": 4}])
def test_items_with_segments_keep_their_own_instruction(make, settings):
    """The reference repeats instructions as a block, so that with segments an item reads another one's instruction."""
    bridge, media = make(**settings), features(2, 1, 3)
    softs = bridge(media, INSTRUCTIONS)
    for index, part in enumerate(media.split()):
        alone = bridge(part, [INSTRUCTIONS[index]])[0]
        assert torch.allclose(softs[index], alone, atol=1e-5)
        for other in range(3):
            changed = [text if place != other else "show the number" for place, text in enumerate(INSTRUCTIONS)]
            soft = bridge(media, changed)[index]
            assert far(soft, softs[index]) if other == index else torch.allclose(soft, softs[index], atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("join", [False, True])
def test_masked_tokens_do_not_count(make, join):
    bridge, media = make(join_segments=join), features(2, 1)
    media.mask[:, 3:] = False
    before = bridge(media, INSTRUCTIONS[:2])
    media.values[:, 3:] = 1e4
    for left, right in zip(before, bridge(media, INSTRUCTIONS[:2]), strict=True):
        assert torch.allclose(left, right, atol=1e-5)
    media.values[:, 2] *= torch.linspace(-3, 3, WIDTH)
    assert all(far(left, right) for left, right in zip(before, bridge(media, INSTRUCTIONS[:2]), strict=True))


@torch.no_grad()
def test_media_read_once_serve_many_instructions(make):
    bridge, media = make(max_segments=4), features(2, 1)
    read = bridge.read_media(media)
    for pair in (INSTRUCTIONS[:2], INSTRUCTIONS[1:]):
        for left, right in zip(bridge.read_instructions(read, pair), bridge(media, pair), strict=True):
            assert torch.allclose(left, right, atol=1e-6)


@torch.no_grad()
def test_a_static_bridge_has_no_ear_for_instructions(make):
    bridge, media = make(instruction_aware=False), features(1, 2)
    first, second = bridge(media, INSTRUCTIONS[:2]), bridge(media, INSTRUCTIONS[1:])
    assert all(torch.equal(left, right) for left, right in zip(first, second, strict=True))
    assert bridge.tokenizer is None and not any("word_embeddings" in name for name in bridge.state_dict())


@torch.no_grad()
def test_the_order_of_segments_is_knowable_only_with_positions(make):
    media = features(3)
    turned = Features(media.values.flip(0), media.mask, [3])
    for settings, knows in (({}, False), ({"max_segments": 3}, True)):
        bridge = make(**settings)
        there = bridge(media, INSTRUCTIONS[:1])[0]
        back = bridge(turned, INSTRUCTIONS[:1])[0].unflatten(0, (3, 4)).flip(0).flatten(0, 1)
        assert far(there, back) == knows
    joined = make(join_segments=True, max_segments=3)
    assert far(joined(media, INSTRUCTIONS[:1])[0], joined(turned, INSTRUCTIONS[:1])[0])


@torch.no_grad()
def test_joined_segments_give_q_tokens_that_depend_on_all(make):
    bridge, media = make(join_segments=True), features(3)
    soft = bridge(media, INSTRUCTIONS[:1])[0]
    assert soft.shape == (4, LLM_WIDTH)
    for segment in range(3):
        changed = media.values.clone()
        changed[segment] *= torch.linspace(-3, 3, WIDTH)
        assert far(bridge(Features(changed, media.mask, [3]), INSTRUCTIONS[:1])[0], soft)


def test_more_segments_than_positions_is_an_error_with_numbers(make):
    with pytest.raises(InputError, match=r"An input has 5 segments; this bridge has positions for 4 \(max_segments\)"):
        make(max_segments=4)(features(1, 5), INSTRUCTIONS[:2])


@torch.no_grad()
def test_a_long_instruction_loses_its_beginning(make):
    bridge = make(max_instruction_tokens=4)
    media = features(1)
    long = bridge(media, ["red green blue what is this ?"])[0]
    assert torch.allclose(long, bridge(media, ["what is this ?"])[0], atol=1e-6)
    assert far(long, bridge(media, ["red green blue what"])[0])


def test_an_instruction_limit_beyond_the_positions_is_refused(make):
    with pytest.raises(ConfigError, match=r"max_instruction_tokens \(600\) .* at most 512"):
        make(max_instruction_tokens=600)


def test_a_width_that_heads_do_not_divide_is_refused(make):
    with pytest.raises(ConfigError, match=r"hidden_size \(30\) must be a multiple of num_attention_heads \(4\)"):
        make(hidden_size=30)


@pytest.mark.parametrize(
    ("setting", "value", "limit"),
    [
        ("num_query_tokens", 0, "at least 1"),
        ("num_query_tokens", -1, "at least 1"),
        ("hidden_size", 0, "at least 1"),
        ("num_hidden_layers", 0, "at least 1"),
        ("num_attention_heads", 0, "at least 1"),
        ("intermediate_size", 0, "at least 1"),
        ("cross_attention_frequency", 0, "at least 1"),
        ("max_instruction_tokens", 0, "at least 1"),
        ("max_segments", -1, "at least 0"),
        ("dropout", -0.1, "at least 0 and below 1"),
        ("dropout", 2, "at least 0 and below 1"),
    ],
)
def test_a_setting_out_of_range_is_refused(make, setting, value, limit):
    with pytest.raises(ConfigError, match=f"{setting} must be {limit}, not {value}"):
        make(**{setting: value})


def test_an_mlp_of_negative_width_is_refused():
    with pytest.raises(ConfigError, match="hidden_size must be at least 0, not -4"):
        MLPBridge(MLPBridge.Config(hidden_size=-4), encoder_width=WIDTH, llm_width=LLM_WIDTH)


def test_a_missing_tokenizer_is_one_clear_error(make):
    with pytest.raises(
        BundleError, match=r"Cannot load the Q-Former's tokenizer from \"/nowhere\".* Expected a folder"
    ):
        make(tokenizer="/nowhere")


def test_the_tokenizer_travels_with_the_bridge(make, tmp_path):
    bridge = make()
    assert bridge.save_assets(tmp_path) == {"tokenizer": "tokenizer"}
    loaded = make(tokenizer=QFormerBridge.resolve(QFormerBridge.Config(tokenizer="tokenizer"), tmp_path).tokenizer)
    assert loaded.tokenizer(INSTRUCTIONS).input_ids == bridge.tokenizer(INSTRUCTIONS).input_ids


def test_every_weight_learns(make):
    bridge = make(max_segments=4).train()
    sum(soft.square().sum() for soft in bridge(features(2, 1), INSTRUCTIONS[:2])).backward()
    still = [name for name, weight in bridge.named_parameters() if weight.grad is None]
    # The last layer's text positions are read by nobody.
    assert all(name.startswith("qformer.encoder.layer.1.") for name in still), still


@torch.no_grad()
@pytest.mark.parametrize("kind", [LinearBridge, MLPBridge])
def test_tokenwise_bridges_project_real_tokens_alone(kind):
    bridge = kind(kind.Config(), encoder_width=WIDTH, llm_width=LLM_WIDTH)
    media = features(2, 1)
    media.mask[0, 1] = media.mask[2, 2:] = False
    softs = bridge(media, INSTRUCTIONS[:2])
    assert [tuple(soft.shape) for soft in softs] == [(9, LLM_WIDTH), (2, LLM_WIDTH)]
    assert torch.allclose(softs[1], bridge.projector(media.values[2, :2]))
    assert torch.allclose(softs[0], bridge.projector(media.values[:2][media.mask[:2]]))


def test_the_mlp_s_hidden_width_can_be_chosen():
    bridge = MLPBridge(MLPBridge.Config(hidden_size=5), encoder_width=WIDTH, llm_width=LLM_WIDTH)
    assert [part.out_features for part in bridge.projector if isinstance(part, nn.Linear)] == [5, LLM_WIDTH]


def test_every_kind_that_comes_with_xblip_is_tried_and_documented():
    plugins._load_built_in()
    ours = {name for name in plugins.names("bridge") if plugins.get("bridge", name).__module__.startswith("xblip.")}
    assert ours == {*KINDS}
    reference = Path(__file__, "../../docs/reference.md").resolve().read_text()
    assert all(f"\n| `{kind}` |" in reference for kind in KINDS)


@every_kind
@torch.no_grad()
def test_an_item_has_the_same_soft_prompt_in_a_batch_and_alone(kind, llm_folder):
    bridge, media = make_kind(kind, llm_folder), features(2, 1, 3, tokens=4)
    media.mask[0, 3] = media.mask[4, 2:] = False
    softs = bridge(media, INSTRUCTIONS)
    for part, instruction, soft in zip(media.split(), INSTRUCTIONS, softs, strict=True):
        alone = bridge(part, [instruction])[0]
        assert soft.shape == alone.shape and soft.shape[1] == LLM_WIDTH
        assert torch.allclose(soft, alone, atol=1e-5)


@every_kind
@torch.no_grad()
def test_what_is_masked_does_not_count_whatever_the_kind(kind, llm_folder):
    bridge, media = make_kind(kind, llm_folder), features(2, 1, tokens=4)
    media.mask[1, 2:] = media.mask[2, 0] = False
    before = bridge(media, INSTRUCTIONS[:2])
    media.values[~media.mask] = 1e4 * torch.randn(3, WIDTH)
    for left, right in zip(before, bridge(media, INSTRUCTIONS[:2]), strict=True):
        assert torch.allclose(left, right, atol=1e-5)
    media.values[:, 1] *= torch.linspace(-3, 3, WIDTH)
    assert all(far(left, right) for left, right in zip(before, bridge(media, INSTRUCTIONS[:2]), strict=True))


@every_kind
@torch.no_grad()
def test_an_instruction_reaches_its_own_item_or_none(kind, llm_folder):
    bridge, media = make_kind(kind, llm_folder), features(2, 1, 3, tokens=4)
    hears = getattr(bridge.config, "instruction_aware", False)
    assert hears == (kind in ("qformer", "shared_qformer"))
    softs = bridge(media, INSTRUCTIONS)
    changed = bridge(media, [INSTRUCTIONS[0], "show the number", INSTRUCTIONS[2]])
    assert [far(left, right) for left, right in zip(softs, changed, strict=True)] == [False, hears, False]


@every_kind
@torch.no_grad()
def test_half_precision_says_about_the_same(kind, llm_folder):
    bridge, media = make_kind(kind, llm_folder), features(2, 1, tokens=4)
    expected = torch.cat(bridge(media, INSTRUCTIONS[:2]))
    with torch.autocast("cpu", torch.bfloat16):
        autocast = torch.cat(bridge(media, INSTRUCTIONS[:2]))
    cast = torch.cat(bridge.to(torch.bfloat16)(media, INSTRUCTIONS[:2]))
    assert cast.dtype == torch.bfloat16
    for soft in (autocast, cast):
        assert (soft.float() - expected).norm() < 0.05 * expected.norm()


@every_kind
def test_what_trains_gets_gradients_and_nothing_else_does(kind, llm_folder):
    bridge = make_kind(kind, llm_folder)
    bridge.load_state_dict(bridge.state_dict())  # a frozen Q-Former is not to be random
    bridge.train()
    sum(soft.square().sum() for soft in bridge(features(2, 1, tokens=4), INSTRUCTIONS[:2])).backward()
    # The last layer's text positions are read by nobody.
    still = {
        name
        for name, weight in bridge.named_parameters()
        if weight.grad is None and not name.startswith("qformer.encoder.layer.1.")
    }
    own = {name for name, weight in bridge.named_parameters() if not weight.requires_grad}
    assert still == {name for name in own if not name.startswith("qformer.encoder.layer.1.")}
    assert {name.split(".")[0] for name in own} == (
        {"query_tokens", "layer_norm", "qformer"} if kind == "frozen_qformer" else set()
    )


@every_kind
def test_a_branch_with_it_is_saved_and_comes_back(kind, llm, toy, tmp_path):
    settings = {**KINDS[kind], "kind": kind}
    if "hidden_size" in settings and kind.endswith("qformer"):
        settings["tokenizer"] = llm.config.source
    branch = Branch.build(BranchConfig("toy", config={"width": 8}, bridge=settings), llm_width=llm.width).eval()
    sources, instructions = [[1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0] * 3], INSTRUCTIONS[:2]
    branch.save(tmp_path / "branch", llm=llm)
    loaded = Branch.load(tmp_path / "branch", llm=llm).eval()
    assert type(loaded.bridge) is type(branch.bridge)
    with torch.no_grad():
        for left, right in zip(branch(sources, instructions), loaded(sources, instructions), strict=True):
            assert torch.allclose(left, right, atol=1e-5)


@every_kind
def test_a_number_below_its_limit_is_refused_whatever_the_kind(kind, llm_folder):
    config = plugins.get("bridge", kind).Config
    for field in dataclasses.fields(config):
        if field.type in (int, "int"):
            with pytest.raises(ConfigError, match=rf"^{field.name} must be at least [01], not -1\.$"):
                make_kind(kind, llm_folder, **{field.name: -1})
