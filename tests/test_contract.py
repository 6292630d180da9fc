"""The contract itself: it passes for good modalities, and each broken one fails it at the promise it breaks."""

import re
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from kit import KINDS, Beads, registered
from torch import Tensor, nn

from xblip import plugins
from xblip.branch import Branch, BranchConfig
from xblip.errors import PluginError, XBlipError
from xblip.modality import Example, Modality
from xblip.testing import ModalityContract, ToyEncoder, ToyModality, run_contract

PROMISES = [name for name in vars(ModalityContract) if name.startswith("test_")]
LIGHT = "test_importing_the_plugin_stays_light"
AUGMENTING = "augmenting changes what loading gives by the given chance alone"


@pytest.fixture(scope="class", autouse=True)
def _registered():
    with registered(ToyModality, Beads):
        yield


class TestToy(ModalityContract):
    name = "toy"


class TestBeads(ModalityContract):
    name = "beads"


class Changed(ToyModality):
    """Lets a subclass say what its encoder gives, from what the toy's gives."""

    name = "broken"

    def encode(self, features: Tensor) -> Any:
        return features

    def build_encoder(self) -> nn.Module:
        return ChangedEncoder(self.config.width, self.encode)


class ChangedEncoder(ToyEncoder):
    """A toy encoder with a last word by somebody else."""

    def __init__(self, width: int, encode):
        super().__init__(width)
        self.encode = encode

    def forward(self, values: Tensor) -> Any:
        return self.encode(super().forward(values))


class NoisyLoad(Changed):
    """Augments when it should read."""

    def load(self, source):
        values = super().load(source)["values"]
        return {"values": values + 0.01 * torch.randn_like(values)}


class UnequalSegments(Changed):
    """Its tensors disagree about S."""

    def load(self, source):
        return super().load(source) | {"times": torch.zeros(7)}


class NotFinite(Changed):
    """Loads what no encoder can read."""

    def load(self, source):
        return {"values": super().load(source)["values"] / 0}


class Pooled(Changed):
    """Forgets the dimension of tokens."""

    def encode(self, features):
        return features.mean(1)


class WrongWidth(Changed):
    """Says one width and gives another."""

    def build_encoder(self):
        encoder = super().build_encoder()
        encoder.width += 1
        return encoder


class WrongMask(Changed):
    """Masks segments, not tokens."""

    def encode(self, features):
        return features, torch.ones(features.shape[0])


class AllMasked(Changed):
    """Marks every token as padding."""

    def encode(self, features):
        return features, torch.zeros(features.shape[:2])


class GivesNaN(Changed):
    """Divides by a spread that is zero."""

    def encode(self, features):
        return features / (features[..., :1] - features[..., :1])


class Neighbourly(Changed):
    """Normalises over the batch, so that a row depends on what stands beside it."""

    def encode(self, features):
        return features - features.mean(0, keepdim=True)


class Constant(Changed):
    """Tells nothing of its source."""

    def encode(self, features):
        return torch.ones_like(features)


class Sleepless(Changed):
    """Wakes its own dropout whenever it runs."""

    def build_encoder(self):
        class Awake(ToyEncoder):
            def forward(self, values):
                self.train()
                return super().forward(values)

        return Awake(self.config.width)


class Drifting(Changed):
    """Keeps running statistics though it is frozen."""

    def build_encoder(self):
        class Running(ToyEncoder):
            def forward(self, values):
                self.embed.bias += 0.1
                return super().forward(values)

        return Running(self.config.width)


class Unseeded(Changed):
    """Has other weights each time it is built."""

    def build_encoder(self):
        return ToyEncoder(self.config.width, int(torch.randint(1 << 30, ())))


class Deaf(Changed):
    """Chose a bridge that does not hear the instruction."""

    bridge = {"instruction_aware": False}


class Forgiving(Changed):
    """Gives zeros for what it cannot read."""

    def load(self, source):
        try:
            return super().load(source)
        except XBlipError:
            return {"values": torch.zeros(1, 4)}


class Rough(Changed):
    """Lets its library's errors through."""

    def load(self, source):
        values = torch.as_tensor(source, dtype=torch.float32).reshape(-1, 4)
        assert len(values) and values.isfinite().all()
        return {"values": values}


class Unlimited(Changed):
    """Offers nothing that it would refuse."""

    @classmethod
    def example(cls, folder):
        example = super().example(folder)
        return Example(config=example.config, sources=example.sources, broken=[])


class Augmented(Changed):
    """Can be changed at random, as it should be; a subclass does it otherwise."""

    def augmented(self, source: Any, draw: np.random.Generator) -> dict[str, Tensor]:
        values = self.load(source)["values"]
        return {"values": self.change(values, draw)}

    def change(self, values: Tensor, draw: np.random.Generator) -> Tensor:
        return values * draw.uniform(0.5, 2.0)


class Lifeless(Augmented):
    """Changes nothing."""

    def change(self, values, draw):
        return values


class Careless(Augmented):
    """Draws from elsewhere."""

    def change(self, values, draw):
        return values + torch.rand(())


class Widening(Augmented):
    """Gives another dtype."""

    def change(self, values, draw):
        return values.double()


class Cropping(Augmented):
    """Gives another shape."""

    def change(self, values, draw):
        return values[:, :3]


class Lasting(Augmented):
    """Changes what `load` gives afterwards."""

    shift = 0.0

    def load(self, source):
        return {"values": super().load(source)["values"] + self.shift}

    def augmented(self, source, draw):
        tensors = super(Augmented, self).load(source)
        self.shift = 1.0
        return tensors


class Mute(Changed):
    __doc__ = None


class OddSuffix(Changed):
    """Forgets the dot."""

    suffixes = ("TXT",)


class NoCue(Changed):
    """Has nothing to say before its soft prompt."""

    cue = " "


class WrongSettings(Changed):
    """Its example names a setting that it does not have."""

    @classmethod
    def example(cls, folder):
        example = super().example(folder)
        return Example(config={"widht": 8}, sources=example.sources, broken=example.broken)


def faults(modality: type) -> dict[str, str]:
    """What each promise says about a modality; the one about imports, which starts a process, has a test of its own."""
    with registered(modality), pytest.MonkeyPatch.context() as patch:
        patch.delattr(ModalityContract, LIGHT)
        return run_contract(modality.name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("modality", "promise", "fault"),
    [
        (NoisyLoad, "loading gives segments and always the same", "loading twice gives two values of values"),
        (UnequalSegments, "loading gives segments and always the same", "disagree about segments"),
        (NotFinite, "loading gives segments and always the same", "values is not finite"),
        (Pooled, "features have the promised shape", r"features of shape \(4, 8\); expected \(4, N, 8\)"),
        (WrongWidth, "features have the promised shape", r"features of shape \(4, 4, 8\); expected \(4, N, 9\)"),
        (WrongMask, "features have the promised shape", r"mask of shape \(4,\); expected \(4, 4\)"),
        (AllMasked, "features have the promised shape", "a segment has no real token"),
        (GivesNaN, "features have the promised shape", "features are not finite"),
        (Neighbourly, "a source has the same features in a batch and alone", "features differ by"),
        (Constant, "two sources give two soft prompts", "two sources look the same"),
        (Lifeless, AUGMENTING, "augmented changes nothing"),
        (Careless, AUGMENTING, "equal draws give two values of values"),
        (Widening, AUGMENTING, r"values is torch.float64, and torch.float32 by load"),
        (Cropping, AUGMENTING, r"loaded items of different shapes, {'values': \(1, 3\)} beside {'values': \(4,\)}"),
        (Lasting, AUGMENTING, "augmented changes load"),
        (Sleepless, "encoder is frozen", r"train\(\) reached the encoder"),
        (Drifting, "only the bridge trains", "training changed the encoder"),
        (Unseeded, "save and load give the same soft prompts", "trained on an encoder with fingerprint"),
        (Deaf, "two instructions give two soft prompts", "the instruction does not reach the bridge"),
        (Forgiving, "broken media gives one clear error", "was accepted"),
        (Rough, "broken media gives one clear error", "raised RuntimeError, not an XBlipError"),
        (Unlimited, "broken media gives one clear error", "names no broken sources"),
        (Mute, "it describes itself", "has no docstring"),
        (OddSuffix, "it describes itself", "TXT"),
        (NoCue, "it describes itself", "the cue is empty"),
        (WrongSettings, "it describes itself", 'Did you mean "width"'),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_a_broken_modality_fails_at_the_promise_it_breaks(modality, promise, fault):
    found = faults(modality)
    assert re.search(fault, found[promise]), found


def test_a_modality_may_be_augmented():
    assert not any(faults(Augmented).values())


@pytest.mark.parametrize("modality", [Neighbourly, Lifeless, Constant, Deaf, Forgiving, Mute], ids=lambda m: m.__name__)
def test_a_single_fault_breaks_a_single_promise(modality):
    assert sum(bool(fault) for fault in faults(modality).values()) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_contract_holds_over_every_kind_of_bridge(kind, llm, tmp_path, monkeypatch):
    """Kinds that do not hear the instruction break the one promise that is about it."""
    monkeypatch.delattr(ModalityContract, LIGHT)
    settings = {**KINDS[kind], "kind": kind}
    if kind in ("qformer", "shared_qformer"):
        settings["tokenizer"] = llm.config.source
    if kind == "frozen_qformer":
        given = {**settings, "kind": "qformer", "instruction_aware": False, "max_segments": 0}
        Branch.build(BranchConfig("toy", {"width": 8}, given), llm_width=llm.width).save(tmp_path, llm=llm)
        settings["qformer"] = str(tmp_path)
    faults = {promise: fault for promise, fault in run_contract("toy", settings).items() if fault}
    assert faults.keys() == ({"two instructions give two soft prompts"} if "tokenizer" not in settings else set()), (
        faults
    )


def test_a_promise_broken_without_words_counts_as_broken(monkeypatch):
    def silent(self):
        raise AssertionError

    monkeypatch.setattr(ModalityContract, "test_two_sources_give_two_soft_prompts", silent)
    assert faults(ToyModality)["two sources give two soft prompts"] == "raise AssertionError"


def test_one_source_is_too_few():
    class Single(Changed):
        """Has one source, with which nothing can be compared."""

        @classmethod
        def example(cls, folder):
            example = super().example(folder)
            return Example(config=example.config, sources=example.sources[:1], broken=example.broken)

    assert set(faults(Single).values()) == {"example() must name at least two sources"}


def test_a_modality_without_an_example_says_so():
    class Bare(ToyModality):
        """Has no example."""

        name = "bare"
        example: ClassVar = classmethod(Modality.example.__func__)

    assert all("offers no example" in fault for fault in faults(Bare).values())


def test_an_unknown_modality_is_an_error(site):
    with pytest.raises(PluginError, match='No modality is called "thermal"'):
        plugins.get("modality", "thermal")
    assert all('No modality is called "thermal"' in fault for fault in run_contract("thermal").values())


@pytest.mark.slow
def test_a_plugin_that_imports_heavy_things_fails_at_that_promise(site):
    (site.folder / "open3d.py").write_text("")
    source = (
        "import open3d, xblip\nfrom xblip.testing import ToyModality\n"
        "class Toy(ToyModality):\n    'A toy.'\n    name = 'thermal'\n"
        "@xblip.hookimpl\ndef register_modalities(register):\n    register(Toy)\n"
    )
    site.install("thermal", source)
    promise = LIGHT.removeprefix("test_").replace("_", " ")
    with pytest.MonkeyPatch.context() as patch:
        for name in set(PROMISES) - {LIGHT}:
            patch.delattr(ModalityContract, name)
        assert "loads ['open3d']: import them where they are used" in run_contract("thermal")[promise]
