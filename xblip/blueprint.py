"""Blueprints: the model of a config with all its shapes and no weights, before anything is downloaded.

A source (a folder or hub id) that is here is used as it is, without reading its weights. In the place of another stands a
temporary folder with what the config's `architectures` say of it, so that modalities and bridges read it as they read
any folder, and nobody need know.
"""

import glob
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from xblip import bundle
from xblip import config as configs
from xblip.branch import Branch, BranchConfig, bridge_settings, build_modality, read_saved
from xblip.bridge import TOKENIZER, WEIGHTS, load_bridge
from xblip.errors import BundleError, ConfigError, XBlipError
from xblip.frozen import Encoders
from xblip.llm import TOKENS, FrozenLLM, LLMConfig
from xblip.loading import cached_snapshot, skeletons
from xblip.model import XBlip
from xblip.router import RouterConfig

HERE, CACHED, WEIGHTLESS, MISSING = "here", "in the hub's cache", "without weights", "missing"


@dataclass
class Vocabulary:
    """A tokenizer, as far as shapes depend on it; its special tokens and chat template are named as in transformers.

    Attributes:
      size: number of tokens that it knows; 0 for no tokenizer.
      ends_texts: whether it ends every text with `eos_token`.
    """

    size: int = 0
    bos_token: str | None = None
    eos_token: str | None = None
    unk_token: str | None = None
    pad_token: str | None = None
    chat_template: str | None = None
    ends_texts: bool = False


@dataclass
class Architecture:
    """What a source holds, for when it is not here: a value of `architectures`, under the source's name in the config.

    Attributes:
      config: its config.json, `model_type` and the sizes that differ from that class's defaults.
      processor: its preprocessor_config.json.
      tokenizer: its tokenizer.
      get: a command or words that say how to get it.
    """

    config: dict[str, Any] = field(default_factory=dict)
    processor: dict[str, Any] = field(default_factory=dict)
    tokenizer: Vocabulary = field(default_factory=Vocabulary)
    get: str = ""


@dataclass
class Source:
    """A file, folder or hub id that a config names.

    Attributes:
      name: as the config has it.
      state: HERE, CACHED, WEIGHTLESS or MISSING.
      get: how to get it, where it is not here.
      used_for: the parts that are read from it.
    """

    name: str
    state: str
    get: str = ""
    used_for: list[str] = field(default_factory=list)

    @property
    def is_here(self) -> bool:
        """Whether it can be loaded as it is."""
        return self.state in (HERE, CACHED)


@dataclass
class Plan:
    """What a config asks for.

    Attributes:
      branches: each described, with the folder where it is saved, if it is.
      architectures: of sources that may not be here.
      files: what else must be there, with what it is used for.
      batch_size: of training.
    """

    llm: LLMConfig
    branches: dict[str, tuple[BranchConfig, Path | None]]
    router: RouterConfig
    generation: dict[str, Any]
    architectures: dict[str, Any]
    files: dict[str, str] = field(default_factory=dict)
    batch_size: int = 1


@dataclass
class Blueprint:
    """A model on the meta device, and what it is tried on.

    Attributes:
      model: has shapes alone.
      sources: where it would be loaded from.
      items: each modality's own example, as the model's settings and processors read it.
    """

    model: XBlip
    sources: list[Source]
    items: dict[str, dict[str, Tensor]]

    @property
    def has_its_tokenizer(self) -> bool:
        """Whether texts are counted by the LLM's own tokenizer, or by one that stands in for it."""
        return all(source.state != MISSING for source in self.sources if "LLM" in source.used_for)


def read_plan(source: str | Path, overrides: Sequence[str] = ()) -> Plan:
    """Reads a model config, a training config, or a bundle by its name or folder, with overrides.

    Raises:
      ConfigError, BundleError, PluginError: there is none, or something in it is wrong.
    """
    if os.path.isfile(source) or Path(source).suffix in (".yaml", ".yml"):
        values = configs.load_yaml(source, overrides, named=bundle.BRANCHES)
        if "branch" in values:
            return _training_plan(source, overrides)
        if "llm" not in values:
            raise ConfigError(
                f"{source} is no config of a model: it names no llm. Expected a model config (llm, branches), a training "
                "config (llm, branch, data), or a bundle's folder."
            )
    place = bundle.named(source)
    if not os.path.exists(place):
        raise BundleError(
            f'There is no "{source}" on this machine: give a config, a bundle\'s folder, or the name of an installed bundle.'
        )
    config, file = bundle.read_config(place, overrides)
    branches: dict[str, tuple[BranchConfig, Path | None]] = {}
    for name, branch in bundle.branches_of(config, file).items():
        branches[name] = (branch, None) if isinstance(branch, BranchConfig) else (read_saved(branch)[0], branch)
    return Plan(config.llm, branches, config.router, config.generation, config.architectures)


def _training_plan(source: str | Path, overrides: Sequence[str]) -> Plan:
    from xblip.train_config import check_config, load_train_config, sources_of, training_arguments

    config = load_train_config(source, overrides)
    check_config(config)
    if config.llm is None:
        raise ConfigError(f"{source}: the stage align has no LLM to examine it before. Name one by llm.source=...")
    files = {
        part.path: use
        for use, given in (("training data", config.data.train), ("evaluation data", config.data.eval))
        for part in sources_of(given, use)
    }
    if config.init.folder:
        files[os.path.join(config.init.folder, WEIGHTS)] = "initial weights"
    return Plan(
        config.llm,
        {branch.modality: (branch, None) for branch in config.all_branches},
        config.router,
        config.generation,
        config.architectures,
        files,
        training_arguments(config).per_device_train_batch_size,
    )


@contextmanager
def draw(plan: Plan, *, dtype: str = "") -> Iterator[Blueprint]:
    """Builds a plan's model on the meta device; its stand-ins are there as long as the context.

    Args:
      plan: the model.
      dtype: of the frozen parts, in the place of what the plan says.

    Raises:
      ConfigError: a source is not here, and `architectures` does not say what it holds; or a setting is wrong.
      BundleError: parts do not fit each other.
    """
    with ExitStack() as stack:
        folder = stack.enter_context(TemporaryDirectory())
        places = stack.enter_context(_naming(_Places(plan.architectures, Path(folder))))
        place = places.of(plan.llm.source, "LLM", revision=plan.llm.revision)
        config = replace(plan.llm, source=place, dtype=dtype or plan.llm.dtype)
        described = {name: _placed(branch, saved, places) for name, (branch, saved) in plan.branches.items()}
        for file, use in plan.files.items():
            state = HERE if glob.glob(file) else MISSING
            places.sources[file] = Source(file, state, used_for=[use])
        # Before there is a meta device: what is imported to read media must not make its constants there.
        items = {name: _example(branch, plan.branches[name][1]) for name, branch in described.items()}
        with skeletons():
            llm = FrozenLLM.from_pretrained(config)
            encoders = Encoders()
            branches = {}
            for name, branch in described.items():
                branch = replace(branch, encoder_dtype=dtype or branch.encoder_dtype)
                saved = plan.branches[name][1]
                branches[name] = Branch.build(branch, llm_width=llm.width, folder=saved, encoders=encoders)
                if saved:
                    _check_saved(branches[name], saved, llm)
            model = XBlip(llm=llm, branches=branches, router=plan.router, generation=plan.generation).eval()
        yield Blueprint(model, list(places.sources.values()), items)


@contextmanager
def _naming(places: "_Places") -> Iterator["_Places"]:
    """Lets errors name sources as the config does, not the folders that stand in for them."""
    try:
        yield places
    except XBlipError as error:
        message = str(error)
        for name, place in places.places.items():
            message = message.replace(place, name)
        raise type(error)(message) from error


def _placed(branch: BranchConfig, saved: Path | None, places: "_Places") -> BranchConfig:
    """Lets a branch's description name places where its sources can be read."""
    name = branch.modality
    encoder = getattr(build_modality(branch, saved).config, "encoder", "")
    config, bridge = dict(branch.config), dict(branch.bridge)
    if encoder:
        config["encoder"] = places.of(encoder, f"{name} encoder")
    settings = bridge_settings(branch, saved)[1]
    if qformer := getattr(settings, "qformer", ""):
        bridge["qformer"] = places.of(qformer, f"{name} Q-Former")
    elif getattr(settings, "instruction_aware", False):
        bridge["tokenizer"] = places.of(settings.tokenizer, f"{name} tokenizer")
    return replace(branch, config=config, bridge=bridge)


def _example(branch: BranchConfig, saved: Path | None) -> dict[str, Tensor]:
    modality = build_modality(branch, saved)
    with TemporaryDirectory() as folder:
        return modality.load(type(modality).example(Path(folder)).sources[0])


def _check_saved(branch: Branch, folder: Path, llm: FrozenLLM) -> None:
    """Checks that a saved branch fits the encoder and the LLM as far as shapes tell."""
    _, facts = read_saved(folder)
    widths = {
        "an encoder": (facts["encoder"]["width"], branch.encoder.width),
        "an LLM": (facts["llm"]["width"], llm.width),
    }
    for what, (expected, found) in widths.items():
        if expected != found:
            raise BundleError(
                f"The branch in {folder} was trained for {what} of width {expected}; the one named has {found}. Name "
                "the one it was trained for, or train the branch again."
            )
    load_bridge(branch.bridge, folder)


class _Places:
    """Where sources can be read: where they are, or in folders that stand in for them.

    Attributes:
      sources: by name, all that were asked for.
      places: of these, by name.
    """

    def __init__(self, architectures: dict[str, Any], folder: Path):
        self.sources: dict[str, Source] = {}
        self._architectures = architectures
        self._folder = folder
        self.places: dict[str, str] = {}

    def of(self, name: str, use: str, *, revision: str | None = None) -> str:
        """Returns the place of a source that is used for a part.

        Raises:
          ConfigError: it is not here, and nothing is known of it.
        """
        if name not in self.sources:
            where = f'architectures."{name}"'
            known = name in self._architectures
            architecture = configs.build(Architecture, self._architectures.get(name), where=where)
            place = name if os.path.exists(name) else _cached(name, revision)
            if place is None and not known:
                raise ConfigError(
                    f'There is nothing of "{name}", the {use}, on this machine, and the config does not say what it '
                    f"holds: get it, or describe it in the config under {where} with config, processor or tokenizer."
                )
            state = MISSING if place is None else HERE if place == name else CACHED
            if state != MISSING and "tokenizer" not in use and os.path.isdir(place) and not _has_weights(Path(place)):
                state = WEIGHTLESS
            get = architecture.get if state in (MISSING, WEIGHTLESS) else ""
            self.sources[name] = Source(name, state, get)
            own = self._folder / str(len(self.places)) / Path(name).name
            self.places[name] = place or str(_stand_in(architecture, own, where))
        self.sources[name].used_for.append(use)
        return self.places[name]


def _cached(name: str, revision: str | None) -> str | None:
    """Where a hub id lies in the local cache, if it is there."""
    folder = cached_snapshot(name, revision)
    known = ("config.json", "tokenizer_config.json", "tokenizer.json")
    return str(folder) if folder and any((folder / file).is_file() for file in known) else None


def _has_weights(folder: Path) -> bool:
    return any(file.suffix in (".safetensors", ".bin", ".pt", ".pth", ".ckpt") for file in folder.iterdir())


def _stand_in(architecture: Architecture, folder: Path, where: str) -> Path:
    """Writes what is known of a source, as far as it can be read without weights."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    for file, content in (("config.json", architecture.config), ("preprocessor_config.json", architecture.processor)):
        if content:
            (folder / file).write_text(json.dumps(content))
    if architecture.tokenizer != Vocabulary():
        tokenizer = _stand_in_tokenizer(architecture.tokenizer, where)
        tokenizer.save_pretrained(folder)
        tokenizer.save_pretrained(folder / TOKENIZER)
    save_file({}, folder / WEIGHTS)
    return folder


def _stand_in_tokenizer(vocabulary: Vocabulary, where: str) -> Any:
    """A tokenizer of so many words, of which it knows the special ones alone; it counts words, not their parts."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = {name: token for name in TOKENS if (token := getattr(vocabulary, name))}
    words = list(dict.fromkeys(["word", *special.values()]))
    if vocabulary.size < len(words):
        raise ConfigError(
            f"{where}.tokenizer.size must be the number of tokens it knows, at least {len(words)}, not {vocabulary.size}."
        )
    if vocabulary.ends_texts and not vocabulary.eos_token:
        raise ConfigError(f"{where}.tokenizer.ends_texts needs an eos_token to end them with.")
    words += [f"word{number}" for number in range(vocabulary.size - len(words))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="word"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if vocabulary.ends_texts:
        end = vocabulary.eos_token
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A {end}", special_tokens=[(end, words.index(end))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=vocabulary.chat_template, **special)
