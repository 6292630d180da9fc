"""Parts that several tests build on: a second toy modality, a model over both, and plugins installed in a folder."""

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xblip import plugins
from xblip.branch import Branch, BranchConfig
from xblip.errors import MediaError
from xblip.llm import FrozenLLM
from xblip.modality import Example, Modality
from xblip.model import XBlip
from xblip.router import RouterConfig
from xblip.sample import Media, Sample, Turn
from xblip.testing import ToyModality, small_qformer, toy_tokenizer

ONE, TWO, THREE = [1.0, 2.0, 3.0, 4.0], [4.0, 3.0, -2.0, 1.0], [0.5, -1.0, 2.0, 0.0]
LONG = ONE + TWO + THREE
BEADS, MORE_BEADS = [[1.0, 2.0]], [[3.0], [1.0, -2.0, 0.5, 4.0, 2.0], [2.0, 2.0]]
HISTORY = [Turn((Media("beads", BEADS), "what is this ?"), "two")]

QFORMER = {key: value for key, value in small_qformer("").items() if key not in ("kind", "tokenizer")}
KINDS = {
    "qformer": QFORMER,
    "frozen_qformer": QFORMER,
    "shared_qformer": {**QFORMER, "shared_width": 12},
    "linear": {},
    "mlp": {},
    "pooled_linear": {"num_query_tokens": 3, "hidden_size": 10},
    "perceiver": {"num_latents": 3, "num_layers": 2, "num_attention_heads": 2, "head_width": 4, "max_segments": 4},
    "resampler_2d": {"num_query_tokens": 9, "head_width": 4},
}
"""Every kind that comes with xblip, small enough for tests."""


def eight() -> list[Sample]:
    """Different modalities, counts, segments, texts, instructions and answers, one with a conversation before it."""
    return [
        Sample("what is this ?", [("toy", ONE)], "red"),
        Sample("describe it", [("beads", MORE_BEADS)], "one two three"),
        Sample("which one is larger , the input or this ?", [("toy", LONG), "and", ("beads", BEADS)], "this"),
        Sample("is one larger ?", [], "yes"),
        Sample("same number ?", [("beads", BEADS), ("beads", MORE_BEADS), ("toy", TWO)], "no"),
        Sample("show the red", ["the", ("toy", TWO), "or the", ("toy", LONG), "?"], "zero zero zero zero"),
        Sample("describe", [("toy", ONE), ("toy", ONE), ("toy", TWO)], ""),
        Sample("and this ?", [("toy", THREE)], "three five", HISTORY),
    ]


PLUGIN = '''
import xblip
from xblip.testing import ToyModality


class Toy(ToyModality):
    """A toy under another name."""

    name = "{name}"


@xblip.hookimpl
def register_modalities(register):
    register(Toy)
'''

NUMBERS = '''
import xblip
from xblip.testing import ToyModality


class Numbers(ToyModality):
    """Rows of four numbers from a text file."""

    name = "{name}"
    cue = "input : "
    suffixes = (".txt",)

    def load(self, source):
        file = xblip.media_file(source, kind="{name}")
        if file is None:
            return super().load(source)
        with xblip.decoding(file.label, "rows of four numbers"), file.open() as opened:
            return super().load([float(word) for word in opened.read().split()])

    @classmethod
    def example(cls, folder):
        example = super().example(folder)
        (folder / "good.txt").write_text("1 2 3 4")
        example.sources.append(folder / "good.txt")
        return example


@xblip.hookimpl
def register_modalities(register):
    register(Numbers)
'''

MODEL = """
import xblip


@xblip.hookimpl
def register_models(register):
    register("tiny_model", "{folder}")
"""


class Beads(Modality):
    """Strings of one to five numbers, one segment a string, so that tokens differ in number and need their mask."""

    name = "beads"
    cue = "red beads : "

    @dataclass
    class Config:
        """`span`: width of the encoder; `seed`: of its weights."""

        span: int = 24
        seed: int = 1

    def load(self, source: Any) -> dict[str, Tensor]:
        try:
            rows = [torch.as_tensor(row, dtype=torch.float32) for row in source]
        except (TypeError, ValueError) as cause:
            raise MediaError(f"Beads are lists of one to five numbers each, not {source!r:.60}.") from cause
        if not rows or any(row.dim() != 1 or not 1 <= len(row) <= 5 or not row.isfinite().all() for row in rows):
            raise MediaError("Beads are at least one list of one to five finite numbers.")
        pad = [nn.functional.pad(row, (0, 5 - len(row))) for row in rows]
        return {"values": torch.stack(pad), "counts": torch.tensor([len(row) for row in rows])}

    def build_encoder(self) -> nn.Module:
        return BeadsEncoder(self.config.span, self.config.seed)

    @classmethod
    def example(cls, folder: Path) -> Example:
        return Example(config={"span": 8}, sources=[[[1.0]], [[3.0, 2.0], [1.0]]], broken=[[[]], "words", 7])


class BeadsEncoder(nn.Module):
    """One token a number; padding gives large values, which show wherever the mask is forgotten."""

    def __init__(self, width: int, seed: int):
        super().__init__()
        self.width = width
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embed = nn.Linear(1, width)
            self.positions = nn.Parameter(torch.randn(5, width))

    def forward(self, values: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        mask = torch.arange(5, device=values.device) < counts[:, None]
        features = self.embed(values[..., None]) + self.positions
        return torch.where(mask[..., None], features, 50.0), mask


@contextlib.contextmanager
def registered(*classes: type):
    """Registers classes by hand for a while; what was registered before stays so."""
    fresh = [cls for cls in classes if cls.name not in plugins._registry.loaded]
    plugins.register(*fresh)
    try:
        yield
    finally:
        for cls in fresh:
            plugins.unregister(cls.name)


def make_branch(modality: type[Modality], llm: FrozenLLM, *, seed: int = 0, **settings: Any) -> Branch:
    """A branch with a random bridge, loud enough for words and media to be heard; `settings` of BranchConfig."""
    bridge = small_qformer(llm.config.source) | settings.pop("bridge", {})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        branch = Branch.build(BranchConfig(modality.name, bridge=bridge, **settings), llm_width=llm.width)
        for parameter in branch.bridge.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.2)
    return branch.eval()


def make_model(llm: FrozenLLM, *, generation: dict | None = None, **router: Any) -> XBlip:
    """A model with a branch for toys and one for beads, which need not be registered any more."""
    with registered(ToyModality, Beads):
        branches = {"toy": make_branch(ToyModality, llm), "beads": make_branch(Beads, llm, seed=1)}
    return XBlip(llm=llm, branches=branches, router=RouterConfig(**router), generation=generation).eval()


def static(model: XBlip) -> XBlip:
    """The same model, whose bridges read no instruction."""
    for branch in model.branches.values():
        branch.bridge.tokenizer = None
    return model


def save_llm(kind: str, folder: Path) -> Path:
    """Writes a tiny random LLM of another kind than the toy one: "opt", "bloom" or "mistral"."""
    from transformers import BloomConfig, BloomForCausalLM, MistralConfig, MistralForCausalLM, OPTConfig, OPTForCausalLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"vocab_size": len(toy_tokenizer()), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    if kind == "opt":
        model = OPTForCausalLM(OPTConfig(ffn_dim=48, word_embed_proj_dim=32, init_std=0.2, **sizes))
    elif kind == "bloom":
        model = BloomForCausalLM(BloomConfig(initializer_range=0.2, n_layer=2, n_head=4, **sizes))
    else:
        model = MistralForCausalLM(
            MistralConfig(intermediate_size=48, num_key_value_heads=2, initializer_range=0.2, sliding_window=6, **sizes)
        )
    model.save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    return folder


def assert_alike(left: XBlip, right: XBlip, samples: list[Sample]) -> None:
    """Two models have the same losses, soft prompts and answers."""
    with torch.no_grad():
        assert torch.allclose(left(samples)["loss"], right(samples)["loss"], atol=1e-5)
        for one, other in zip(left.soft_prompts(samples), right.soft_prompts(samples), strict=True):
            assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(one, other, strict=True))
    assert left.generate(samples, max_new_tokens=6) == right.generate(samples, max_new_tokens=6)


class Site:
    """A folder on the import path that distributions are installed into, as pip lays them out.

    Until `close`, installed plugins that other tests have loaded are out of sight.
    """

    def __init__(self, folder: Path):
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.modules: list[str] = []
        plugins._load_built_in()
        self._others = plugins._registry
        plugins._registry = _without_installed(plugins._registry)

    def install(self, name: str, source: str | None = None, *, distribution: str = "", version: str = "1.0") -> str:
        """Installs a plugin with that entry point; returns its module's name. Without `source`, a toy modality."""
        distribution = distribution or f"xblip-{name.replace('_', '-')}"
        module = distribution.replace("-", "_")
        (self.folder / f"{module}.py").write_text(PLUGIN.format(name=name) if source is None else source)
        info = self.folder / f"{module}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[xblip]\n{name} = {module}\n")
        self.modules.append(module)
        return module

    def remove(self, module: str) -> None:
        """Uninstalls a plugin by its module's name."""
        for path in self.folder.glob(f"{module}*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def close(self) -> None:
        """Forgets what was installed."""
        plugins._registry = self._others
        for module in self.modules:
            sys.modules.pop(module, None)


def _without_installed(registry: plugins._Registry) -> plugins._Registry:
    owners = {key: owner for key, owner in registry.owners.items() if owner in (plugins.CORE, plugins.BY_HAND)}
    items = {
        kind: {name: thing for name, thing in things.items() if (kind, name) in owners}
        for kind, things in registry.items.items()
    }
    loaded = {name: plugin for name, plugin in registry.loaded.items() if plugin.distribution == plugins.BY_HAND}
    return plugins._Registry(items, owners, loaded)


def train_whole_and_broken(config, *, steps: int) -> tuple[Path, Path]:
    """Trains in one go, and in two halves; returns the folders of both runs."""
    from xblip.train import train

    whole = Path(config.training["output_dir"])
    settings = {"save_strategy": "steps", "save_steps": steps // 2, "lr_scheduler_type": "constant"}
    config.training |= {**settings, "max_steps": steps}
    train(config)
    config.training |= {"output_dir": str(whole.with_name("broken")), "max_steps": steps // 2}
    train(config)
    config.training["max_steps"] = steps
    train(config, resume=True)
    return whole, whole.with_name("broken")


class FileToy(ToyModality):
    """Toys from text files; counts what its encoder reads."""

    name = "file_toy"
    cue = "input : "
    encoded = 0

    def load(self, source):
        return super().load([float(word) for word in Path(source).read_text().split()])

    def build_encoder(self):
        encoder = super().build_encoder()
        encoder.register_forward_pre_hook(lambda _, args, taken: self.count(taken["values"]), with_kwargs=True)
        return encoder

    @classmethod
    def count(cls, values):
        cls.encoded += len(values)


@contextlib.contextmanager
def written_by_another(folder: Path, command: str) -> Iterator[None]:
    """Lets another process hold the lock of a folder: a lock is a process' own."""
    script = "import pathlib, sys; from xblip.runs import the_only_run\n"
    script += "with the_only_run(pathlib.Path(sys.argv[1]), sys.argv[2]): print('held', flush=True); sys.stdin.read()"
    call = [sys.executable, "-c", script, str(folder), command]
    with subprocess.Popen(call, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        try:
            yield
        finally:
            other.communicate("")
