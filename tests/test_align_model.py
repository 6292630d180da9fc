"""The first stage in use: what is drawn, what resumes, what is saved and started from, what it learns and refuses."""

import copy

import pytest
import torch
import torch.distributed as dist
from align_run import RUNS, make, take_steps
from kit import BEADS, LONG, MORE_BEADS, ONE, THREE, TWO, make_branch
from tokenizers.processors import TemplateProcessing

from xblip.align import AlignConfig, AlignModel
from xblip.branch import Branch, BranchConfig
from xblip.config import build
from xblip.contrast import MomentumConfig, key_of_media, key_of_text
from xblip.errors import ConfigError, InputError, MediaError
from xblip.initial import initialise
from xblip.modality import Features
from xblip.retrieval import Retriever
from xblip.sample import Sample
from xblip.testing import ToyModality, small_qformer, toy_tokenizer

pytestmark = pytest.mark.usefixtures("toys")
PAIRS = [(ONE, "red"), (LONG, "what is this ?"), (TWO, "one two three"), (THREE, "describe it")]


def samples(pairs, name: str = "toy") -> list[Sample]:
    return [Sample("look", [(name, source)], caption) for source, caption in pairs]


class TestNegatives:
    def draws(self, llm_folder, similarities, equal, count: int = 2000) -> torch.Tensor:
        model = make(llm_folder)
        torch.manual_seed(0)
        drawn = torch.stack([model.draw_negatives(similarities, equal) for _ in range(count)])
        return torch.stack([(drawn == column).float().mean(0) for column in range(similarities.shape[1])], 1)

    def test_the_nearer_is_drawn_more_often_and_what_is_equal_never(self, llm_folder):
        similarities = torch.tensor([[9.0, 1.0, 2.0, 0.0], [0.0, 9.0, 1.0, 9.0]])
        equal = torch.tensor([[True, False, False, False], [False, True, False, True]])
        found = self.draws(llm_folder, similarities, equal)
        assert torch.equal(found == 0, equal)
        wanted = similarities.masked_fill(equal, -torch.inf).softmax(-1)
        assert (found - wanted).abs().max() < 0.03

    def test_none_is_drawn_where_all_are_equal(self, llm_folder):
        model = make(llm_folder)
        equal = torch.tensor([[True, True], [False, True]])
        assert model.draw_negatives(torch.zeros(2, 2), equal).tolist() == [-1, 0]
        assert model.draw_negatives(torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool)).tolist() == [-1]

    def test_similarities_far_apart_or_not_finite_end_no_run(self, llm_folder):
        model, equal = make(llm_folder), torch.eye(3, dtype=torch.bool)
        for similarities in (torch.eye(3) * 2000, torch.full((3, 3), torch.nan), torch.full((3, 3), -torch.inf)):
            drawn = model.draw_negatives(similarities, equal)
            assert ((drawn >= 0) & (drawn != torch.arange(3))).all()

    def test_the_global_generator_draws(self, llm_folder):
        model, near = make(llm_folder), torch.zeros(5, 9)
        states = []
        for _ in range(2):
            torch.manual_seed(3)
            states.append((model.draw_negatives(near, near > 0).tolist(), torch.get_rng_state()))
        assert states[0][0] == states[1][0] and torch.equal(states[0][1], states[1][1])

    def test_each_pair_draws_for_its_medium_and_for_its_text(self, llm_folder):
        model, asked = make(llm_folder), []

        def draw(similarities, equal):
            asked.append((similarities, equal))
            return AlignModel.draw_negatives(model, similarities, equal)

        model.draw_negatives = draw
        model(samples([*PAIRS, (ONE, "blue"), (BEADS[0] * 2, "RED")]))
        (of_texts, equal), (of_media, same) = asked
        scores = Retriever(model.branch).similarity([source for source, _ in PAIRS], [text for _, text in PAIRS])
        assert torch.allclose(of_media[:4, :4], scores / 0.07, atol=1e-4)
        assert torch.allclose(of_texts[:4, :4], scores.T / 0.07, atol=1e-4)
        wanted = torch.eye(6, dtype=torch.bool)
        for left, right in ((0, 4), (0, 5)):  # of one medium; of one caption
            wanted[left, right] = wanted[right, left] = True
        assert torch.equal(equal, wanted) and torch.equal(same, wanted)


class TestKeys:
    def test_of_texts(self):
        assert key_of_text("A red  cup ") == key_of_text("a red cup") != key_of_text("a redcup")

    def test_of_media(self):
        big = torch.arange(100_000.0)
        items = [{"values": big}, {"values": big.half()}, {"values": big[1:]}, {"other": big}, {"values": big + 1}]
        items += [Features(big.view(1, -1, 4), torch.ones(1, 25_000, dtype=torch.bool), [1])]
        assert len({key_of_media(item) for item in items}) == len(items)
        assert all(key_of_media(item) == key_of_media(copy.deepcopy(item)) for item in items)


class TestKeptTokens:
    @pytest.mark.parametrize(("share", "counts"), [(0.5, [1, 2, 1]), (0.1, [1, 1, 1]), (0.8, [2, 4, 2])])
    def test_a_share_of_each_segment_is_read(self, llm_folder, share, counts):
        model = make(llm_folder, "beads", AlignConfig(keep_tokens=share))
        features = model.branch.encode([BEADS, MORE_BEADS[1:]])
        seen = set()
        for _ in range(30):
            thin = model._thinned(features)
            assert thin.mask.sum(1).tolist() == counts and thin.segments == [1, 2]
            assert thin.values.shape[1] == max(counts)
            for row, (values, mask) in enumerate(zip(thin.values, thin.mask, strict=True)):
                places = [(features.values[row] == value).all(1).nonzero().item() for value in values[mask]]
                assert len(set(places)) == counts[row] and features.mask[row, places].all()
                seen |= {(row, place) for place in places}
        assert len(seen) == features.mask.sum(), "each real token is drawn at some time"
        assert model.eval()._thinned(features) is features

    def test_draws_come_again_with_the_state_of_the_generator(self, llm_folder):
        model = make(llm_folder, config=AlignConfig(keep_tokens=0.5))
        state = torch.get_rng_state()
        first, other = model(samples(PAIRS))["loss"], model(samples(PAIRS))["loss"]
        torch.set_rng_state(state)
        assert torch.equal(model(samples(PAIRS))["loss"], first) and not torch.equal(first, other)


class TestMomentum:
    CONFIG = AlignConfig(keep_tokens=0.6, momentum=MomentumConfig(queue_size=5, warmup=3))
    STEPS = [
        [(BEADS, "red"), ([[5.0]], "blue")],
        [(BEADS, "what is this ?"), ([[2.0, 1.0]], "one")],
        [(MORE_BEADS, "describe it"), (BEADS, "one two three")],
        [([[4.0, 4.0], [1.0]], "red"), ([[5.0]], "blue")],
    ]

    def run(self, model, optimizer, steps) -> list[float]:
        losses = []
        for pairs in steps:
            loss = model(samples(pairs, "beads"))["loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    def start(self, llm_folder):
        model = make(llm_folder, "beads", self.CONFIG, dropout=0.1)
        return model, torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)

    @pytest.mark.parametrize("done", [1, 3], ids=["before long media", "after long media"])
    def test_a_resumed_run_goes_on_bit_for_bit(self, llm_folder, tmp_path, done):
        torch.manual_seed(0)
        model, optimizer = self.start(llm_folder)
        self.run(model, optimizer, self.STEPS[:done])
        torch.save([model.state_dict(), optimizer.state_dict(), torch.get_rng_state()], tmp_path / "state.pt")
        expected = self.run(model, optimizer, self.STEPS[done:])

        resumed, optimizer = self.start(llm_folder)
        weights, moments, generator = torch.load(tmp_path / "state.pt")
        resumed.load_state_dict(weights)
        optimizer.load_state_dict(moments)
        torch.set_rng_state(generator)
        assert self.run(resumed, optimizer, self.STEPS[done:]) == expected
        ours, theirs = resumed.state_dict(), model.state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert {name.split(".")[0] for name in ours} == {"branch", "momentum"}

    def test_only_training_moves_it(self, llm_folder):
        torch.manual_seed(0)
        model, optimizer = self.start(llm_folder)
        self.run(model, optimizer, self.STEPS[:2])
        assert int(model.momentum.pairs) == 4 and int(model.momentum.steps) == 2
        before = copy.deepcopy(model.state_dict())
        model.eval()
        plain = AlignModel(model.branch).eval()
        pairs = samples(self.STEPS[2], "beads")
        assert torch.equal(model(pairs)["itc"], plain(pairs)["itc"])
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert not model.train().momentum.bridge.training
        assert not any(weight.requires_grad for weight in model.momentum.parameters())

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"decay": 1.5}, "momentum.decay must be between 0 and 1, not 1.5"),
            ({"alpha": -0.1}, "momentum.alpha must be between 0 and 1, not -0.1"),
            ({"queue_size": -1}, "momentum.queue_size must be at least 0, not -1"),
            ({"warmup": -1}, "momentum.warmup must be at least 0, not -1"),
        ],
    )
    def test_settings(self, llm_folder, settings, message):
        with pytest.raises(ConfigError, match=message):
            make(llm_folder, config=AlignConfig(momentum=MomentumConfig(**settings)))

    def test_it_starts_from_the_weights_of_the_first_step(self, llm_folder):
        model = make(llm_folder, config=AlignConfig(momentum=MomentumConfig(decay=0.9)))
        weight = model.branch.bridge.query_tokens
        with torch.no_grad():
            weight.fill_(2.0)
            model(samples(PAIRS))
            weight.fill_(3.0)
            model(samples(PAIRS))
        assert torch.allclose(model.momentum.bridge.query_tokens, torch.tensor(2.1))

    def test_no_queue_is_a_queue_too(self, llm_folder):
        model = make(llm_folder, config=AlignConfig(momentum=MomentumConfig(queue_size=0)))
        for _ in range(2):
            model(samples(PAIRS))["loss"].backward()


class TestTraining:
    @pytest.mark.slow
    def test_a_few_steps_teach_it_to_find_the_pairs(self, llm_folder):
        torch.manual_seed(0)
        model = make(llm_folder)
        optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=3e-3)
        for _ in range(60):
            losses = model(samples(PAIRS))
            losses["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
        assert losses["itm"] < 0.1 and losses["loss"] < 2.5
        assert losses["temperature"] != pytest.approx(0.07)
        retriever = Retriever(model.branch.eval())
        media, texts = zip(*PAIRS, strict=True)
        assert [places[0].index for places in retriever.rank_texts(media, texts)] == [0, 1, 2, 3]
        assert [places[0].index for places in retriever.rank_sources(media, texts)] == [0, 1, 2, 3]

    def test_features_serve_as_media(self, llm_folder):
        model = make(llm_folder).eval()
        model.draw_negatives = lambda similarities, equal: torch.tensor([1, 0, 3, 2])
        parts = model.branch.encode([source for source, _ in PAIRS]).split()
        kept = model(samples(list(zip(parts, [text for _, text in PAIRS], strict=True))))
        for name, value in model(samples(PAIRS)).items():
            assert torch.allclose(kept[name], value)

    @pytest.mark.parametrize("temperature", [-1.0, 3.0])
    def test_the_temperature_stays_where_it_makes_sense(self, llm_folder, temperature):
        model = make(llm_folder)
        with torch.no_grad():
            model.branch.bridge.temperature.fill_(temperature)
        found = model(samples(PAIRS))["temperature"]
        assert found == pytest.approx(min(max(temperature, 0.001), 0.5))

    @pytest.mark.parametrize("momentum", [None, MomentumConfig()], ids=["plain", "momentum"])
    def test_autocast_keeps_the_losses_in_float32(self, llm_folder, momentum):
        found = []
        for enabled in (False, True):
            model = make(llm_folder, config=AlignConfig(momentum=momentum))
            model.draw_negatives = lambda similarities, equal: torch.tensor([1, 0, 3, 2])
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                found.append(model(samples(PAIRS)))
            found[-1]["loss"].backward()
        expected, found = found
        for name, value in found.items():
            assert value.dtype == torch.float32 and torch.allclose(value, expected[name], rtol=0.1, atol=0.1), name

    @pytest.mark.parametrize("momentum", [None, MomentumConfig()], ids=["plain", "momentum"])
    def test_no_q_former_runs_in_float16(self, llm_folder, momentum):
        found = []
        for enabled in (False, True):
            model = make(llm_folder, config=AlignConfig(momentum=momentum))
            model.draw_negatives = lambda similarities, equal: torch.tensor([1, 0, 3, 2])
            media = model.branch.encode([source for source, _ in PAIRS]).split()
            pairs = samples(list(zip(media, [text for _, text in PAIRS], strict=True)))
            with torch.autocast("cpu", dtype=torch.float16, enabled=enabled):
                found.append(model(pairs)["loss"])
        assert found[0] == found[1]

    def test_a_process_group_of_one_changes_nothing(self, llm_folder, tmp_path):
        expected = take_steps(RUNS["segments"], llm_folder)[0]
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        try:
            found = take_steps(RUNS["segments"], llm_folder)[0]
        finally:
            dist.destroy_process_group()
        for one, other in zip(found, expected, strict=True):
            assert all(torch.equal(one[name], other[name]) for name in other)

    @pytest.mark.parametrize(
        ("form", "first"), [("$A", "red"), ("$A </s>", "red"), ("<s> $A </s>", "<s>")], ids=["bare", "end", "both"]
    )
    def test_dec_begins_what_is_written(self, tmp_path, form, first):
        made = toy_tokenizer()
        tokens = [("<s>", 1), ("</s>", 2)]
        made.backend_tokenizer.post_processor = TemplateProcessing(single=form, special_tokens=tokens)
        made.save_pretrained(tmp_path)
        bridge = make(tmp_path).branch.bridge
        read = bridge.tokenize(["red one", "red one two"])
        written = bridge.to_write(read)
        words = bridge.tokenizer.convert_ids_to_tokens(written["input_ids"][0])
        assert bridge.tokenizer.convert_ids_to_tokens(read["input_ids"][0])[0] == first
        assert words[:3] == ["[DEC]", "red", "one"] and words[3:4] == (["</s>"] if "</s>" in form else ["<pad>"])
        assert written["attention_mask"].sum(1).tolist() == [3 + ("</s>" in form), 4 + ("</s>" in form)]


class TestFolders:
    @pytest.fixture
    def folder(self, llm_folder, tmp_path):
        Retriever(make(llm_folder).branch).save_pretrained(tmp_path / "aligned")
        return tmp_path / "aligned"

    def test_a_trained_retriever_comes_back_with_all_that_training_needs(self, folder, llm_folder):
        loaded = Retriever.from_pretrained(folder)
        bridge = loaded.branch.bridge
        assert bridge.config.language_head and bridge.tokenizer.bos_token == "[DEC]"
        assert len(bridge.tokenizer) == len(toy_tokenizer()) + 1
        own = make(llm_folder).branch.bridge.state_dict()
        assert all(torch.equal(value, own[name]) for name, value in bridge.state_dict().items())
        loaded.save_pretrained(folder)
        assert len(Retriever.from_pretrained(folder).branch.bridge.tokenizer) == len(bridge.tokenizer)
        AlignModel(loaded.branch).train()(samples(PAIRS))["loss"].backward()

    def test_a_branch_for_an_llm_starts_from_it(self, folder, llm):
        settings = small_qformer(folder / "tokenizer")
        branch = Branch.build(BranchConfig("toy", bridge=settings), llm_width=llm.width)
        taken = initialise(branch.bridge, folder)
        assert taken.fresh == ["projector.weight", "projector.bias"]
        heads = {"media_projection", "text_projection", "matching_head", "language_head", "temperature"}
        assert {name.split(".")[0] for name in taken.left_out} == heads
        assert "left out: language_head" in str(taken) and "temperature (1)" in str(taken)

    def test_dec_may_be_in_one_vocabulary_alone(self, folder, llm, llm_folder):
        own = make(llm_folder).branch.bridge.state_dict()["qformer.embeddings.word_embeddings.weight"]
        plain = make_branch(ToyModality, llm).bridge
        assert "qformer.embeddings.word_embeddings.weight" in initialise(plain, folder).loaded
        assert torch.equal(plain.qformer.embeddings.word_embeddings.weight, own[:-1])
        with torch.no_grad():
            plain.qformer.embeddings.word_embeddings.weight.zero_()
        retriever = Retriever.build(BranchConfig("toy", bridge=small_qformer(llm_folder)))
        retriever.branch.bridge.qformer.embeddings.load_state_dict(plain.qformer.embeddings.state_dict())
        retriever.save_pretrained(folder)
        aligned = make(llm_folder).branch.bridge
        last = aligned.qformer.embeddings.word_embeddings.weight[-1].clone()
        assert {"language_head.bias", "temperature"} <= set(initialise(aligned, folder).fresh)
        words = aligned.qformer.embeddings.word_embeddings.weight
        assert torch.equal(words[-1], last) and not words[:-1].any()


class TestRefusals:
    @pytest.mark.parametrize(
        ("config", "message"),
        [
            (
                {"itc": -1.0},
                "weights of the losses must be at least 0, and one of them above it, not itc -1, itm 1, itg 1",
            ),
            ({"itc": 0.0, "itm": 0.0, "itg": 0.0}, "one of them above it, not itc 0, itm 0, itg 0"),
            ({"label_smoothing": 1.0}, "label_smoothing must be at least 0 and below 1, not 1"),
            ({"keep_tokens": 0.0}, "keep_tokens must be above 0 and at most 1, not 0"),
            ({"keep_tokens": 1.2}, "keep_tokens must be above 0 and at most 1, not 1.2"),
            ({"momentum": {"decai": 0.9}}, "decai"),
            ({"keep_token": 0.9}, 'Did you mean "keep_tokens"'),
        ],
    )
    def test_settings(self, llm_folder, config, message):
        with pytest.raises(ConfigError, match=message):
            make(llm_folder, config=build(AlignConfig, config, where="align"))

    def test_momentum_comes_from_a_config(self):
        assert build(AlignConfig, {"momentum": {"alpha": 0.2}}, where="align").momentum == MomentumConfig(alpha=0.2)

    def test_a_branch_without_a_language_head(self, llm, llm_folder):
        for branch in (
            make_branch(ToyModality, llm),
            Retriever.build(BranchConfig("toy", bridge=small_qformer(llm_folder))).branch,
        ):
            with pytest.raises(ConfigError, match="trains a retriever with a language head: set bridge.language_head"):
                AlignModel(branch)

    @pytest.mark.parametrize(
        ("media", "caption", "message"),
        [
            (
                [],
                "red",
                r"Sample 2 of the batch: the stage align takes one input of the modality toy .* not no input and",
            ),
            ([("toy", ONE), ("toy", TWO)], "red", "not toy, toy and 'red'"),
            ([("beads", BEADS)], "red", "not beads and 'red'"),
            ([("toy", ONE)], None, "not toy and None"),
            ([("toy", ONE)], " ", "not toy and ' '"),
        ],
    )
    def test_samples(self, llm_folder, media, caption, message):
        with pytest.raises(InputError, match=message):
            make(llm_folder)([*samples(PAIRS[:1]), Sample("look", media, caption)])

    def test_media_that_cannot_be_read(self, llm_folder):
        with pytest.raises(MediaError, match="rows of four numbers"):
            make(llm_folder)(samples([([1.0], "red")]))
