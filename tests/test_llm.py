"""The frozen LLM: its fingerprint, its log-likelihoods, its errors and what it generates."""

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from xblip.errors import BundleError, ConfigError
from xblip.generation import check_generation_options
from xblip.llm import IGNORE, FrozenLLM, LLMConfig, PromptBatch
from xblip.testing import WORDS, save_toy_llm


def load(folder, **options) -> FrozenLLM:
    return FrozenLLM.from_pretrained(LLMConfig(source=str(folder), **options))


def copied(folder, to):
    return shutil.copytree(folder, to)


def right_padded(llm: FrozenLLM, rows: list[list[int]], answers: list[int]) -> PromptBatch:
    """Rows of token ids whose last `answers[i]` tokens are labelled."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    labels = torch.full_like(ids, IGNORE)
    for index, (row, count) in enumerate(zip(rows, answers, strict=True)):
        labels[index, len(row) - count : len(row)] = ids[index, len(row) - count : len(row)]
    return PromptBatch(llm.embed(ids.flatten().tolist()).unflatten(0, ids.shape), mask, labels)


class TestFrozen:
    def test_it_never_trains_and_is_in_no_checkpoint(self, llm):
        llm.train()
        assert not any(module.training for module in llm.modules())
        assert not any(parameter.requires_grad for parameter in llm.parameters())
        assert llm.state_dict() == {}

    def test_gradients_pass_through_it(self, llm):
        embeds = llm.embed([4, 5, 6])[None].requires_grad_()
        llm.logits(PromptBatch(embeds, torch.ones(1, 3, dtype=torch.long))).sum().backward()
        assert embeds.grad.abs().sum() > 0
        assert all(parameter.grad is None for parameter in llm.parameters())


class TestFingerprint:
    def test_dtype_and_place_do_not_matter(self, llm, llm_folder, tmp_path):
        elsewhere = load(copied(llm_folder, tmp_path / "copy"), dtype="bfloat16")
        assert elsewhere.dtype == torch.bfloat16 and elsewhere.fingerprint == llm.fingerprint

    def test_how_the_weights_are_split_over_files_does_not_matter(self, llm, tmp_path):
        llm.model.save_pretrained(tmp_path, max_shard_size="20KB")
        llm.tokenizer.save_pretrained(tmp_path)
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
        assert load(tmp_path).fingerprint == llm.fingerprint

    def test_other_weights_have_another(self, llm, tmp_path):
        assert load(save_toy_llm(tmp_path, seed=1)).fingerprint != llm.fingerprint

    def test_one_changed_layer_gives_another(self, llm, llm_folder, tmp_path):
        file = copied(llm_folder, tmp_path / "copy") / "model.safetensors"
        weights = load_file(file)
        weights["model.layers.1.mlp.up_proj.weight"] *= 1.01
        save_file(weights, file, metadata={"format": "pt"})
        assert load(tmp_path / "copy").fingerprint != llm.fingerprint

    def test_another_vocabulary_has_another(self, llm, llm_folder, tmp_path):
        folder = copied(llm_folder, tmp_path / "copy")
        file = folder / "tokenizer.json"
        tokenizer = json.loads(file.read_text())
        vocabulary = tokenizer["model"]["vocab"]
        vocabulary["red"], vocabulary["green"] = vocabulary["green"], vocabulary["red"]
        file.write_text(json.dumps(tokenizer))
        assert load(folder).fingerprint != llm.fingerprint

    def test_files_beside_the_weights_do_not_matter(self, llm, llm_folder, tmp_path):
        folder = copied(llm_folder, tmp_path / "copy")
        save_file({"x": torch.zeros(2)}, folder / "consolidated.safetensors")
        assert load(folder).fingerprint == llm.fingerprint

    def test_files_in_the_working_directory_do_not_matter(self, llm, tmp_path, monkeypatch):
        from transformers import LlamaForCausalLM

        monkeypatch.chdir(tmp_path)
        fresh = LlamaForCausalLM(llm.model.config)
        config = LLMConfig(source="made here")
        before = FrozenLLM(fresh, llm.tokenizer, config=config).fingerprint
        save_file({"x": torch.zeros(2)}, tmp_path / "model.safetensors")
        assert FrozenLLM(fresh, llm.tokenizer, config=config).fingerprint == before

    def test_weights_that_were_never_saved_have_one_whatever_their_dtype(self, llm):
        from transformers import LlamaForCausalLM

        fresh, config = LlamaForCausalLM(llm.model.config), LLMConfig(source="made here")
        before = FrozenLLM(fresh, llm.tokenizer, config=config).fingerprint
        with torch.no_grad():
            fresh.model.norm.weight.add_(1)
        assert FrozenLLM(fresh, llm.tokenizer, config=config).fingerprint != before


class TestLoading:
    def test_special_tokens_may_be_others_than_the_tokenizer_s(self, llm_folder, tmp_path):
        llm = load(llm_folder, tokens={"bos_token": "</s>", "unk_token": "</s>"})
        assert (llm.tokenizer.bos_token_id, llm.tokenizer.unk_token_id, llm.tokenizer.pad_token_id) == (2, 2, 0)
        with pytest.raises(ConfigError, match=r'Unknown special token "llm\.tokens\.bos"\. Known: bos_token'):
            load(llm_folder, tokens={"bos": "</s>"})

    @pytest.mark.parametrize("source", ["none", "empty", "no-such/model"])
    def test_nothing_there_is_one_clear_error(self, tmp_path, monkeypatch, source):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "empty").mkdir()
        with pytest.raises(
            BundleError, match=f'Cannot load the LLM "{source}": .* Expected the folder of a decoder-only'
        ):
            load(source)

    @pytest.mark.parametrize("source", ["build/numerals/llm", "./llm", "../llm", "/none/llm"])
    def test_a_missing_folder_is_called_one(self, tmp_path, monkeypatch, source):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(
            BundleError, match=rf'Cannot load the LLM "{source}": no such folder; relative ones start at {tmp_path}\.'
        ):
            load(source)

    @pytest.mark.parametrize(
        "options", [{"bogus": 3}, {"attn_implementation": "bogus"}, {"device_map": 3.5}, {"quantization_config": "x"}]
    )
    def test_a_refused_option_is_named(self, llm_folder, options):
        with pytest.raises(BundleError, match=f"Cannot load the LLM .* with {min(options)}=") as caught:
            FrozenLLM.from_pretrained(LLMConfig(source=str(llm_folder), options=options))
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("text", ["[]", "null", "3"])
    @pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json"])
    def test_a_json_file_that_holds_something_else_is_one_clear_error(self, llm_folder, tmp_path, file, text):
        (copied(llm_folder, tmp_path / "copy") / file).write_text(text)
        with pytest.raises(BundleError, match='Cannot load the LLM ".*copy"'):
            load(tmp_path / "copy")

    def test_a_damaged_file_is_one_clear_error(self, llm_folder, tmp_path):
        file = copied(llm_folder, tmp_path / "copy") / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(BundleError, match=r'Cannot load the LLM ".*copy"'):
            load(tmp_path / "copy")

    def test_missing_weights_are_named_not_made_up(self, llm_folder, tmp_path):
        file = copied(llm_folder, tmp_path / "copy") / "model.safetensors"
        weights = {name: value for name, value in load_file(file).items() if name != "model.norm.weight"}
        save_file(weights, file, metadata={"format": "pt"})
        with pytest.raises(BundleError, match=r"lacks 1 weights, among them model\.norm\.weight"):
            load(tmp_path / "copy")

    def test_an_unknown_dtype_is_one_clear_error(self, llm_folder):
        with pytest.raises(ConfigError, match=r'Unknown dtype "float31" .*Did you mean "float32"'):
            load(llm_folder, dtype="float31")

    def test_a_tokenizer_without_padding_pads_with_its_end(self, llm, llm_folder):
        tokenizer = copy.deepcopy(llm.tokenizer)
        tokenizer.pad_token = None
        assert FrozenLLM(llm.model, tokenizer, config=llm.config).tokenizer.pad_token == "</s>"

    def test_a_tokenizer_without_an_end_is_one_clear_error(self, llm):
        tokenizer = copy.deepcopy(llm.tokenizer)
        tokenizer.eos_token = None
        with pytest.raises(BundleError, match="has no end-of-sequence token"):
            FrozenLLM(llm.model, tokenizer, config=llm.config)

    def test_it_knows_its_sizes(self, llm):
        assert (llm.width, llm.context_length, llm.dtype) == (32, 256, torch.float32)


class TestLikelihoods:
    @torch.no_grad()
    def test_they_are_the_labels_log_softmax(self, llm):
        rows, answers = [[1, 4, 5, 6, 7, 2], [1, 4, 8, 2]], [3, 1]
        batch = right_padded(llm, rows, answers)
        values, mask = llm.token_log_likelihoods(batch)
        logits = llm.model(inputs_embeds=batch.inputs_embeds, attention_mask=batch.attention_mask).logits
        for index, (row, count) in enumerate(zip(rows, answers, strict=True)):
            logs = logits[index].log_softmax(-1)
            expected = [logs[place - 1, row[place]] for place in range(len(row) - count, len(row))]
            assert torch.allclose(values[index][mask[index]], torch.stack(expected), atol=1e-5)
            assert values[index][~mask[index]].abs().sum() == 0

    @torch.no_grad()
    def test_padding_changes_nothing(self, llm):
        short, long = [1, 4, 8, 2], [1, 4, 5, 6, 7, 9, 10, 2]
        alone, alone_mask = llm.token_log_likelihoods(right_padded(llm, [short], [2]))
        beside, beside_mask = llm.token_log_likelihoods(right_padded(llm, [short, long], [2, 1]))
        assert torch.allclose(alone[alone_mask], beside[0][beside_mask[0]], atol=1e-5)


def left_padded(llm: FrozenLLM, *rows: list[int]) -> PromptBatch:
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return PromptBatch(llm.embed(ids.flatten().tolist()).unflatten(0, ids.shape), mask)


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
WIDER = {**SIZES, "intermediate_size": 48}


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
        ("OPT", {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.3}),
        ("Bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
        ("GPTNeoX", WIDER),
        ("Qwen2", {**WIDER, "num_key_value_heads": 2, "tie_word_embeddings": True}),
        ("Qwen3", {**WIDER, "num_key_value_heads": 2, "head_dim": 8}),
        ("Mistral", {**WIDER, "num_key_value_heads": 2, "sliding_window": 4}),
        ("Gemma", {**WIDER, "num_key_value_heads": 1, "head_dim": 8}),
        ("Gemma2", {**WIDER, "num_key_value_heads": 1, "head_dim": 8}),
        ("Mamba", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_any_family_gives_in_a_padded_batch_what_it_gives_alone(llm, tmp_path, family, settings):
    """Positions learnt, rotary, or by distance; weights tied or not; embeddings scaled; windows; a state space."""
    import transformers

    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = getattr(transformers, f"{family}Config")(**{"initializer_range": 0.3, **settings}, vocab_size=45, **ends)
    torch.manual_seed(0)
    getattr(transformers, f"{family}ForCausalLM" if family != "GPT2" else "GPT2LMHeadModel")(config).save_pretrained(
        tmp_path
    )
    llm.tokenizer.save_pretrained(tmp_path)
    other = load(tmp_path, dtype="float32")
    rows = [[1, 4, 5, 6], [1, 9], [1, 4, 8, 20, 21, 22, 7]]
    together = other.generate(left_padded(other, *rows), max_new_tokens=5)
    assert together == [other.generate(left_padded(other, row), max_new_tokens=5)[0] for row in rows]
    with torch.no_grad():
        scores, _ = other.token_log_likelihoods(right_padded(other, rows, [2, 1, 3]))
        alone = [
            other.token_log_likelihoods(right_padded(other, [row], [n]))[0]
            for row, n in zip(rows, [2, 1, 3], strict=True)
        ]
    assert torch.allclose(scores.sum(1), torch.cat([score.sum(1) for score in alone]), atol=1e-4)


class TestGenerate:
    def batch(self, llm, *rows) -> PromptBatch:
        return left_padded(llm, *rows)

    def test_it_is_greedy_decoding_by_hand(self, llm):
        ids = [1, 4, 5, 6]
        got = llm.generate(self.batch(llm, ids), max_new_tokens=5, do_sample=False)[0]
        for _ in range(5):
            with torch.no_grad():
                ids.append(int(llm.model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert got == ids[4:] and 2 not in got

    def test_left_padding_changes_nothing(self, llm):
        rows = [[1, 4, 5, 6], [1, 9], [1, 4, 8, 20, 21, 22, 7]]
        together = llm.generate(self.batch(llm, *rows), max_new_tokens=6)
        assert together == [llm.generate(self.batch(llm, row), max_new_tokens=6)[0] for row in rows]

    def test_left_padding_does_not_hide_what_was_said_from_the_repetition_penalty(self, llm):
        """That of transformers forgets as many new tokens as a row has padding."""
        rows = [[1, 4, 5, 6], [1, 9], [1, 4, 8, 20, 21, 22, 7, 9, 10, 11, 12, 13]]
        options = {"max_new_tokens": 8, "repetition_penalty": 1.7}
        alone = [llm.generate(self.batch(llm, row), **options)[0] for row in rows]
        assert alone != [llm.generate(self.batch(llm, row), max_new_tokens=8)[0] for row in rows]
        assert llm.generate(self.batch(llm, *rows), **options) == alone
        with pytest.raises(ConfigError, match="strictly positive float"):
            llm.generate(self.batch(llm, [1, 4]), max_new_tokens=3, repetition_penalty=-1.0)

    def test_an_answer_ends_before_the_end_token(self, llm):
        free = llm.generate(self.batch(llm, [1, 4, 5, 6]), max_new_tokens=6)[0]
        cut = llm.generate(self.batch(llm, [1, 4, 5, 6], [1, 9]), max_new_tokens=6, eos_token_id=free[2])[0]
        assert cut == free[: free.index(free[2])]

    def test_options_are_transformers_own(self, llm):
        from transformers import LogitsProcessorList, TextStreamer

        batch = self.batch(llm, [1, 4, 5, 6])
        assert len(llm.generate(batch, max_new_tokens=3, num_beams=3, num_return_sequences=2)) == 2
        forced = LogitsProcessorList(
            [lambda ids, scores: torch.full_like(scores, -9.0).index_fill(1, torch.tensor([7]), 0)]
        )
        assert llm.generate(batch, max_new_tokens=3, logits_processor=forced) == [[7, 7, 7]]
        shown = []

        class Streamer(TextStreamer):
            def on_finalized_text(self, text, stream_end=False):
                shown.append(text)

        ids = llm.generate(batch, max_new_tokens=3, streamer=Streamer(llm.tokenizer))[0]
        assert "".join(shown).split() == llm.tokenizer.decode(ids).split()

    def test_strings_may_end_it(self, llm):
        tokenizer = copy.deepcopy(llm.tokenizer)
        tokenizer.add_tokens(["abcdef"])  # transformers learns from this word how the tokenizer joins tokens
        llm = FrozenLLM(llm.model, tokenizer, config=llm.config)
        free = llm.generate(self.batch(llm, [1, 4, 5, 6]), max_new_tokens=6)[0]
        cut = llm.generate(self.batch(llm, [1, 4, 5, 6]), max_new_tokens=6, stop_strings=[WORDS[free[1]]])[0]
        assert cut == free[:2]

    def test_strings_cannot_end_it_when_tokens_are_whole_words(self, llm):
        with pytest.raises(ConfigError, match="stop_strings does not work with this LLM's tokenizer, .* whole words"):
            llm.generate(self.batch(llm, [1, 4]), max_new_tokens=3, stop_strings=["red"])

    @pytest.mark.parametrize("end", [torch.tensor(7), torch.tensor([7]), [7], 7])
    def test_the_end_token_may_be_a_tensor(self, llm, end):
        assert 7 not in llm.generate(self.batch(llm, [1, 4]), max_new_tokens=3, eos_token_id=end)[0]

    def test_a_misspelt_option_suggests_the_right_one(self, llm):
        with pytest.raises(
            ConfigError, match=r'Unknown generation option "max_new_token". Did you mean "max_new_tokens"'
        ):
            llm.generate(self.batch(llm, [1, 4]), max_new_token=3)

    @pytest.mark.parametrize(
        "options",
        [
            {"max_new_tokens": "many"},
            {"num_return_sequences": 3},
            {"temperature": "hot", "do_sample": True},
            {"max_new_tokens": -1},
            {"streamer": "x"},
            {"assistant_model": "x"},
            {"custom_generate": "x"},
            {"watermarking_config": 3},
            {"prefill_chunk_size": 2},
        ],
    )
    def test_a_refused_value_is_one_clear_error(self, llm, options):
        with pytest.raises(ConfigError, match=r"generation options|max_new_tokens must"):
            llm.generate(self.batch(llm, [1, 4]), **{"max_new_tokens": 3, **options})

    @pytest.mark.parametrize(
        ("options", "advice"),
        [
            ({"return_dict_in_generate": True}, "return_dict_in_generate has no place here: answers are text"),
            ({"max_length": 20}, "max_length has no place here: .* use max_new_tokens"),
            ({"generation_config": object()}, "generation_config has no place here: give its options one by one"),
        ],
    )
    def test_what_has_no_place_here_is_refused(self, options, advice):
        with pytest.raises(ConfigError, match=advice):
            check_generation_options(options)

    def test_an_unknown_option_does_not_list_them_all(self):
        with pytest.raises(ConfigError, match=r'option "zzz"\. .*GenerationConfig') as caught:
            check_generation_options({"zzz": 3})
        assert len(str(caught.value)) < 200
