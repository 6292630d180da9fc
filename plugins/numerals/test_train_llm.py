"""The small LLM's training against what it promises: its tokenizer, packed questions, guides, checkpoints."""

import json
import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from xblip_numerals import train_llm
from xblip_numerals.contexts import ALL_VALUES, FACTS, NO_VALUE, ROW_TOKENS, Branch, Context, Sampler, pack
from xblip_numerals.kinds import KINDS
from xblip_numerals.language import ask, example, random_things

CELLS = [(kind, count) for count in (1, 2, 3) for kind in KINDS if KINDS[kind].things <= count]


@pytest.fixture(scope="module")
def tokenizer():
    return train_llm.build_tokenizer()


@pytest.mark.slow
def test_segments_tokenise_without_unknown_words_and_without_their_neighbours(tokenizer):
    rng = random.Random(0)
    for _ in range(1500):
        things, _ = random_things(rng, rng.randint(1, 3))
        segments, answer = example(things, rng, ask(things, rng))
        segments.append(answer)
        apart = [tokenizer(segment, add_special_tokens=False).input_ids for segment in segments]
        together = [token for ids in apart for token in ids]
        assert tokenizer.unk_token_id not in together
        assert together == tokenizer(" ".join(segments), add_special_tokens=False).input_ids
        assert tokenizer.decode(apart[-1]) == answer


def test_the_tokenizer_adds_only_a_start_and_knows_strangers(tokenizer):
    start, stranger, mark = tokenizer("Zebra?").input_ids
    assert (start, stranger) == (tokenizer.bos_token_id, tokenizer.unk_token_id)
    assert [mark] == tokenizer("?", add_special_tokens=False).input_ids
    assert tokenizer.decode(tokenizer("A LOUD voice, says one .").input_ids, skip_special_tokens=True) == (
        "a loud voice, says one."
    )


def test_questions_packed_together_are_read_as_if_alone(tokenizer):
    torch.manual_seed(0)
    model = train_llm.build_model(tokenizer).eval()
    sampler = Sampler(tokenizer=tokenizer, seed=0, noisy=False)
    contexts = [sampler.context(count=count, questions=3) for count in (1, 2, 3)]
    packed = train_llm.read_answers(model, pack(contexts, tokenizer.pad_token_id))[0]
    alone = []
    for context in sorted(contexts, key=len, reverse=True):
        for branch in context.branches:
            ids = torch.tensor([context.prefix + branch.asked + branch.answer[:-1]])
            alone.append(model(input_ids=ids).logits[0, -len(branch.answer) :])
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_a_batch_tells_whose_tokens_are_and_what_an_answer_hangs_on(tokenizer):
    sampler = Sampler(tokenizer=tokenizer, seed=0, noisy=False)
    asked = ("which_shows", "number_of", "attribute_of", "sum", "larger", "which_pair")
    contexts = [sampler.context(count=3, kind=kind) for kind in asked]
    batch = pack(contexts, tokenizer.pad_token_id)
    assert batch.ids.shape[1] == ROW_TOKENS
    told = tokenizer.convert_ids_to_tokens(batch.ids.flatten()[batch.owned].tolist())
    cues = {"image": 0, "video": 1, "audio": 2, "3d": 3}
    starts = [i for i, word in enumerate(told[:-1]) if word in cues and told[i + 1] == ":"]
    assert len(starts) == 3 * len(asked)
    for start, end in zip(starts, [*starts[1:], len(told)], strict=True):
        (owner,) = set(map(tuple, batch.owners[start:end].tolist()))
        assert owner[1] == cues[told[start]]
    for i, kind in enumerate(batch.kinds):
        words = tokenizer.convert_ids_to_tokens(batch.targets[batch.question == i].tolist())
        assert words[-1] == "</s>"
        about, chosen = batch.about[i].nonzero().flatten().tolist(), batch.chosen[i].nonzero().flatten().tolist()
        assert len(about) == {"sum": 2, "larger": 2, "which_pair": 3}.get(kind, 1)
        assert len(chosen) == {"sum": 2, "which_pair": 2}.get(kind, 1)
        looks_for = kind in ("which_shows", "number_of", "attribute_of")
        assert (batch.value[i] != NO_VALUE) == looks_for
        assert (FACTS[batch.fact[i]] == "number") == (kind != "number_of")
        (context,) = [context for context in contexts if context.branches[0].kind == kind]
        for thing, value in enumerate(batch.held[i].tolist()):
            described = [t for t, owner in zip(context.prefix[1:], context.owners, strict=True) if owner == thing]
            if value != NO_VALUE:
                assert ALL_VALUES[value] in tokenizer.convert_ids_to_tokens(described)
        if looks_for:
            assert about == batch.having[i].nonzero().flatten().tolist()
            assert batch.held[i][about[0]] == batch.value[i]


def test_a_context_that_is_too_long_for_a_row_asks_less(tokenizer):
    sampler = Sampler(tokenizer=tokenizer, seed=0, noisy=False)
    contexts = [sampler.context(count=3, kind="describe", questions=30) for _ in range(20)]
    assert all(ROW_TOKENS - 60 < len(context) <= ROW_TOKENS and len(context.branches) < 30 for context in contexts)


@pytest.mark.slow
def test_a_run_that_was_interrupted_ends_as_if_it_had_not_been(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(train_llm, "TOKENS_PER_STEP", 200)

    def trained(checkpoint, stop_after=None):
        torch.manual_seed(0)
        model = train_llm.build_model(tokenizer)
        if stop_after:
            contexts, calls = train_llm._contexts, iter(range(stop_after))
            with monkeypatch.context() as patch:
                patch.setattr(train_llm, "_contexts", lambda *args: next(calls) is not None and contexts(*args))
                with pytest.raises(StopIteration):
                    train_llm.train(
                        model=model, tokenizer=tokenizer, steps=4, seed=0, checkpoint=checkpoint, log_every=2
                    )
        else:
            train_llm.train(model=model, tokenizer=tokenizer, steps=4, seed=0, checkpoint=checkpoint, log_every=2)
        return model.state_dict()

    whole = trained(tmp_path / "whole.pt")
    trained(tmp_path / "part.pt", stop_after=3)
    again = trained(tmp_path / "part.pt")
    for name, weight in whole.items():
        torch.testing.assert_close(again[name], weight, rtol=0, atol=0)
    assert torch.load(tmp_path / "part.pt", weights_only=True)["step"] == 4
    other = torch.load(tmp_path / "part.pt", weights_only=True)
    other["settings"]["seed"] = 1
    torch.save(other, tmp_path / "other.pt")
    anew = trained(tmp_path / "other.pt")
    torch.testing.assert_close(anew["lm_head.weight"], whole["lm_head.weight"], rtol=0, atol=0)


@pytest.mark.slow
def test_a_short_run_saves_a_model_that_speaks(tmp_path):
    train_llm.main(["--out", str(tmp_path), "--steps", "8", "--threads", "1"])
    table = json.loads((tmp_path / "accuracy.json").read_text())
    assert {(row["kind"], row["things"]) for row in table} == set(CELLS)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert model.config.max_position_embeddings == 512
    assert 2e6 < model.num_parameters() < 3e6
    prompt = tokenizer("image: a red seven. What number is it? answer:", return_tensors="pt")
    told = model.generate(**prompt)[0, prompt.input_ids.shape[1] :]
    assert 1 <= len(told) <= 16
    # Teacher forcing calls an answer right exactly when greedy decoding would say it.
    *prefix, cue = prompt.input_ids[0].tolist()
    wrong = [*told[:-1].tolist(), (told[-1].item() + 1) % len(tokenizer)]
    branches = [Branch("number", [cue], answer, 1, NO_VALUE, (0,), (0,), (0,), ()) for answer in (told.tolist(), wrong)]
    batch = pack([Context(prefix, [0] * (len(prefix) - 1), [0], branches)], tokenizer.pad_token_id)
    assert train_llm.right_answers(train_llm.read_answers(model, batch)[0], batch) == [True, False]
