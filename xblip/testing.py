"""For plugin authors: a toy LLM, a toy modality, and the contract that every modality keeps.

Subclass `ModalityContract` in a test file, or run `xblip check NAME`: both go through the same list. The contract needs
no pytest and no network; it works on what the modality's own `example` makes.
"""

import functools
import os
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from xblip import config as configs
from xblip import plugins
from xblip.branch import Branch, BranchConfig
from xblip.errors import MediaError, UnknownWordsWarning, XBlipError
from xblip.llm import FrozenLLM, LLMConfig
from xblip.modality import Example, Modality, collate
from xblip.model import XBlip
from xblip.sample import Media, Sample

WORDS = (
    "<pad> <s> </s> <unk> what is this describe it which one larger the a an and or question answer : . , ? "
    "red green blue zero one two three four five six seven eight nine yes no input inputs show same number"
).split()
HEAVY = ("transformers", "datasets", "open3d", "decord", "av", "torchaudio", "soundfile", "scipy")


def toy_tokenizer(words: Sequence[str] = WORDS) -> Any:
    """A word-level tokenizer over `words`; `<pad> <s> </s> <unk>` must be among them."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def save_toy_llm(folder: str | Path, *, words: Sequence[str] = WORDS, width: int = 32, seed: int = 0) -> Path:
    """Writes a tiny random Llama with its tokenizer as transformers saves them; returns the folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = toy_tokenizer(words)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        initializer_range=0.2,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def save_random(folder: str | Path, model: nn.Module, *processors: Any) -> None:
    """Saves a model of transformers with its processors, all weights random, those of norms and biases too."""
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.2)
    for part in (model, *processors):
        part.save_pretrained(folder)


def small_qformer(tokenizer: str | Path, **settings: Any) -> dict[str, Any]:
    """Settings of a Q-Former bridge small enough for tests, with the tokenizer in that folder."""
    return {
        "kind": "qformer",
        "tokenizer": str(tokenizer),
        "num_query_tokens": 4,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "dropout": 0.0,
        **settings,
    }


class ToyModality(Modality):
    """Reads lists of numbers; one segment a row of four."""

    name = "toy"
    suffixes = (".txt",)
    bridge = {"max_segments": 16}

    @dataclass
    class Config:
        """`width`: D_enc; `seed`: of the encoder's weights."""

        width: int = 16
        seed: int = 0

    def load(self, source: Any) -> dict[str, Tensor]:
        try:
            values = torch.as_tensor(source, dtype=torch.float32).reshape(-1, 4)
        except (TypeError, ValueError, RuntimeError) as cause:
            raise MediaError(f"A toy input must be rows of four numbers, not {source!r:.60}.") from cause
        if values.shape[0] == 0 or not values.isfinite().all():
            raise MediaError("A toy input must hold at least one row of four finite numbers.")
        return {"values": values}

    def build_encoder(self) -> nn.Module:
        return ToyEncoder(self.config.width, self.config.seed)

    @classmethod
    def example(cls, folder: Path) -> Example:
        return Example(
            config={"width": 8},
            sources=[[1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0] * 3],
            broken=[[1.0], [], "words", [float("nan")] * 4],
        )


class ToyEncoder(nn.Module):
    """Four tokens a segment, one for each number."""

    def __init__(self, width: int, seed: int = 0):
        super().__init__()
        self.width = width
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embed = nn.Linear(1, width)
            self.positions = nn.Parameter(torch.randn(4, width))

    def forward(self, values: Tensor) -> Tensor:
        return self.embed(values[..., None]) + self.positions


class ModalityContract:
    """What every modality keeps. Subclass it as `class TestMine(ModalityContract): name = "mine"`.

    Attributes:
      name: the modality's.
      bridge: settings of the bridge that is tried, beside a small Q-Former's; all of them when they name another kind.
    """

    name: ClassVar[str]
    bridge: ClassVar[Mapping[str, Any]] = {}

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        cls._subject = functools.cache(cls._make_subject)

    @classmethod
    def _make_subject(cls) -> "_Subject":
        return _Subject(plugins.get("modality", cls.name), cls.bridge)

    def test_entry_point_is_called_like_the_modality(self):
        modality = type(self)._subject().modality_class
        assert modality.name == self.name
        assert self.name.isidentifier(), f"{self.name!r} is not an identifier"
        for plugin in plugins.installed().get(self.name, []):
            assert plugin.entry_point.name == modality.name

    def test_importing_the_plugin_stays_light(self):
        modality = type(self)._subject().modality_class
        code = f"import sys, {modality.__module__}; print([m for m in {HEAVY!r} if m in sys.modules])"
        if modality.__module__.startswith(("xblip.", "__main__")):
            code = "print([])"
        run = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=_environment(), check=False
        )
        assert run.returncode == 0, run.stderr
        loaded = run.stdout.strip().splitlines()[-1]
        assert loaded == "[]", f"importing {modality.__module__} loads {loaded}: import them where they are used"

    def test_it_describes_itself(self):
        modality = type(self)._subject().modality_class
        assert modality.cue.strip(), "the cue is empty"
        assert all(suffix.startswith(".") and suffix == suffix.lower() for suffix in modality.suffixes), (
            modality.suffixes
        )
        assert modality.__doc__, f"{modality.__name__} has no docstring"
        configs.build(modality.Config, type(self)._subject().example.config, where=f"{self.name}.config")

    def test_loading_gives_segments_and_always_the_same(self):
        subject = type(self)._subject()
        for source in subject.example.sources:
            first, second = subject.branch.modality.load(source), subject.branch.modality.load(source)
            assert first and all(isinstance(tensor, Tensor) for tensor in first.values()), "load must return tensors"
            counts = {tensor.shape[0] for tensor in first.values()}
            assert len(counts) == 1 and min(counts) >= 1, f"tensors disagree about segments: {counts}"
            for key, tensor in first.items():
                assert not tensor.is_floating_point() or tensor.isfinite().all(), f"{key} is not finite"
                assert torch.equal(tensor, second[key]), f"loading twice gives two values of {key}"

    def test_augmenting_changes_what_loading_gives_by_the_given_chance_alone(self):
        subject = type(self)._subject()
        modality = subject.branch.modality
        if type(modality).augmented is Modality.augmented:
            return
        changed = False
        for source in subject.example.sources:
            plain = modality.load(source)
            for seed in range(8):
                first, second = (modality.augmented(source, np.random.default_rng(seed)) for _ in range(2))
                collate([plain, first])  # raises where names or shapes differ
                for key, tensor in first.items():
                    assert tensor.dtype == plain[key].dtype, f"{key} is {tensor.dtype}, and {plain[key].dtype} by load"
                    assert not tensor.is_floating_point() or tensor.isfinite().all(), f"{key} is not finite"
                    assert torch.equal(tensor, second[key]), f"equal draws give two values of {key}"
                    changed = changed or not torch.equal(tensor, plain[key])
            again = modality.load(source)
            assert all(torch.equal(tensor, again[key]) for key, tensor in plain.items()), "augmented changes load"
        assert changed, "augmented changes nothing, whatever is drawn"

    def test_encoder_is_frozen(self):
        branch = type(self)._subject().branch
        branch.train()
        features = branch.encode(type(self)._subject().example.sources[:1])
        assert not any(module.training for module in branch.encoder.modules()), "train() reached the encoder"
        assert not any(parameter.requires_grad for parameter in branch.encoder.parameters())
        assert not features.values.requires_grad, "features keep gradients"
        assert not any(name.startswith("encoder") for name in branch.state_dict()), "the encoder is in the checkpoint"

    def test_features_have_the_promised_shape(self):
        branch = type(self)._subject().branch
        features = branch.encode(type(self)._subject().example.sources)
        rows = sum(features.segments)
        assert features.values.dim() == 3 and features.values.shape[0] == rows, tuple(features.values.shape)
        assert features.values.shape[2] == branch.encoder.width
        assert features.values.isfinite().all(), "features are not finite"
        assert features.mask.shape == features.values.shape[:2] and features.mask.dtype == torch.bool
        assert features.mask.any(1).all(), "a segment has no real token"

    def test_a_source_has_the_same_features_in_a_batch_and_alone(self):
        subject = type(self)._subject()
        together = subject.branch.encode(subject.example.sources).split()
        for source, part in zip(subject.example.sources, together, strict=True):
            alone = subject.branch.encode([source])
            assert torch.equal(alone.mask, part.mask)
            difference = (alone.values - part.values)[alone.mask].abs().max()
            assert difference <= 1e-4, f"features differ by {difference:.2g} between a batch and alone"

    def test_two_sources_give_two_soft_prompts(self):
        subject = type(self)._subject()
        first, second = subject.soft_prompts(subject.example.sources[:2], ["what is this ?"] * 2)
        shared = min(len(first), len(second))  # another number of segments alone says nothing of what is in them
        assert (first[:shared] - second[:shared]).abs().max() > 1e-6, "two sources look the same"

    def test_two_instructions_give_two_soft_prompts(self):
        subject = type(self)._subject()
        first, second = subject.soft_prompts(subject.example.sources[:1] * 2, ["what is this ?", "describe it"])
        assert (first - second).abs().max() > 1e-6, "the instruction does not reach the bridge"

    def test_tokens_are_drawn_where_they_are(self):
        subject = type(self)._subject()
        modality = subject.branch.modality
        for source in subject.example.sources:
            tensors = modality.load(source)
            mask = subject.branch.encode([tensors]).mask.numpy()

            def drawn(weights: np.ndarray, tensors: dict[str, Tensor] = tensors) -> tuple[Any, np.ndarray]:
                drawing = modality.draw(tensors, weights)
                assert all(drawing.files.values()) and ".png" in drawing.files, f"no picture in {list(drawing.files)}"
                return drawing, np.asarray(drawing.files[".png"].convert("RGB")).astype(int)

            drawing, _ = drawn(mask / mask.sum())
            assert set(drawing.placeless) <= set(range(mask.shape[1])), f"there are no tokens {drawing.placeless}"
            plain = drawn(np.zeros(mask.shape))[1]
            places = [place for place in np.argwhere(mask) if place[1] not in drawing.placeless]
            alone = [(mask * 0.0, place) for place in places[:: max(1, len(places) // 3)]]
            for weights, place in alone:
                weights[tuple(place)] = 0.5
            changed = [drawn(weights)[1] != plain for weights, _ in alone]
            assert all(where.any() for where in changed), "a token with all the weight does not show"
            same = [i for i in range(1, len(changed)) if (changed[i] == changed[i - 1]).all()]
            assert not same, "two tokens with all the weight show at the same place"

    def test_only_the_bridge_trains(self):
        subject = type(self)._subject()
        model, branch = subject.model, subject.branch
        frozen = {name: tensor.clone() for name, tensor in branch.encoder.module.state_dict().items()}
        model.train()
        samples = [Sample("what is this ?", [Media(self.name, source)], "one") for source in subject.example.sources]
        optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)
        model(samples)["loss"].backward()
        owned = {id(parameter) for parameter in branch.bridge.parameters()}
        trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
        assert trained and all(id(parameter) in owned for parameter in trained)
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        after = branch.encoder.module.state_dict()
        assert all(torch.equal(tensor, after[name]) for name, tensor in frozen.items()), "training changed the encoder"

    def test_save_and_load_give_the_same_soft_prompts(self):
        subject = type(self)._subject()
        with tempfile.TemporaryDirectory() as folder:
            subject.branch.save(folder, llm=subject.llm)
            loaded = Branch.load(folder, llm=subject.llm).eval()
        instructions = ["what is this ?"] * len(subject.example.sources)
        expected = subject.soft_prompts(subject.example.sources, instructions)
        with torch.no_grad():
            actual = loaded(subject.example.sources, instructions)
        for left, right in zip(expected, actual, strict=True):
            assert torch.allclose(left, right, atol=1e-5), "a saved branch answers differently"

    def test_broken_media_gives_one_clear_error(self):
        subject = type(self)._subject()
        assert subject.example.broken, "example() names no broken sources"
        missing = f"no-such-file{(subject.modality_class.suffixes or ('',))[0]}"
        for source in [*subject.example.broken, *([missing] if subject.modality_class.suffixes else [])]:
            try:
                subject.branch.modality.load(source)
            except XBlipError as error:
                assert len(str(error)) > 20, f"the error says too little: {error}"
                continue
            except Exception as error:
                raise AssertionError(
                    f"{source!r:.60} raised {type(error).__name__}, not an XBlipError: {error}"
                ) from error
            raise AssertionError(f"{source!r:.60} was accepted")

    def test_it_can_be_asked(self):
        subject = type(self)._subject()
        answer = subject.model.ask("what is this ?", media=[(self.name, subject.example.sources[0])], max_new_tokens=3)
        assert isinstance(answer.text, str) and answer.num_new_tokens <= 3


class _Subject:
    """A modality with a tiny random bridge and LLM around it."""

    def __init__(self, modality_class: type[Modality], bridge: Mapping[str, Any]):
        self.modality_class = modality_class
        self.folder = tempfile.TemporaryDirectory()
        root = Path(self.folder.name)
        llm_folder = save_toy_llm(root / "llm")
        (root / "example").mkdir()
        self.example = modality_class.example(root / "example")
        if len(self.example.sources) < 2:
            raise AssertionError("example() must name at least two sources")
        self.llm = FrozenLLM.from_pretrained(LLMConfig(source=str(llm_folder), dtype="float32"))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            config = BranchConfig(
                modality=modality_class.name,
                config=self.example.config,
                bridge=bridge if "kind" in bridge else small_qformer(llm_folder, **bridge),
            )
            self.branch = Branch.build(config, llm_width=self.llm.width).eval()
            for parameter in self.branch.bridge.parameters():
                if parameter.dim() > 1:
                    nn.init.normal_(parameter, std=0.2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnknownWordsWarning)  # the toy LLM need not know this modality's cue
            self.model = XBlip(llm=self.llm, branches={modality_class.name: self.branch}).eval()

    def soft_prompts(self, sources: Sequence[Any], instructions: Sequence[str]) -> list[Tensor]:
        self.branch.eval()
        with torch.no_grad():
            return self.branch(sources, instructions)


def run_contract(name: str, bridge: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Runs the contract for an installed or registered modality.

    Args:
      name: the modality's.
      bridge: as in `ModalityContract`.

    Returns:
      Every promise in words, with what is wrong about it, or "" if it is kept.
    """
    suite = type("Contract", (ModalityContract,), {"name": name, "bridge": bridge or {}})()
    results = {}
    for test in [test for test in vars(ModalityContract) if test.startswith("test_")]:
        try:
            getattr(suite, test)()
            fault = ""
        except Exception as error:
            line = traceback.extract_tb(error.__traceback__)[-1].line
            fault = f"{type(error).__name__}: {error}" if not isinstance(error, AssertionError) else str(error) or line
        results[test.removeprefix("test_").replace("_", " ")] = fault
    return results


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
