"""What is evaluated: a bundle, branches composed in a config, or a retriever; known before it is loaded.

Rows are read, and a run is told from another, by the files of a model alone: a mistake in a config is told at once, not
after minutes of loading.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from xblip import bundle, retrieval
from xblip import config as configs
from xblip.branch import BranchConfig, build_modality, read_parts, read_saved
from xblip.bundle import BundleConfig
from xblip.errors import BundleError, ConfigError, suggest
from xblip.llm import FrozenLLM
from xblip.loading import snapshot
from xblip.modality import Modality
from xblip.model import XBlip


@dataclass(frozen=True)
class System:
    """A model that is not loaded yet.

    Attributes:
      name: as the config calls it.
      facts: what tells it from another, as plain values; the same wherever its files lie.
      modalities: what it reads, by name.
      load: loads it to a device.
    """

    name: str
    facts: dict[str, Any]
    modalities: dict[str, Modality]
    load: Callable[[torch.device], Any]


def open_system(
    given: Any, options: Mapping[str, Any], media: Mapping[str, Mapping[str, Any]] = MappingProxyType({})
) -> System:
    """Finds out about a model.

    Args:
      given: a bundle's name, folder, hub id or config; a retriever's folder or hub id; or a mapping with the keys of a
        bundle's config, paths from the working directory on.
      options: loading options of the LLM, such as dtype.
      media: settings of modalities in the place of those that were saved.

    Raises:
      BundleError, ConfigError, PluginError: there is no such model, or it is wrong.
    """
    if isinstance(given, Mapping):
        if options:
            raise ConfigError("llm: the config composes its model; say these options in model.llm, and leave llm out.")
        config, file = configs.build(BundleConfig, given, where="model"), Path("model")
        name = " + ".join([Path(config.llm.source).name, *bundle.branches_of(config, file)])
        return _bundle(config, file, name, media)
    if not isinstance(given, (str, Path)) or not str(given):
        raise ConfigError(
            "model must be a bundle's name or folder, a retriever's folder, or keys as in a bundle's config, not "
            f"{given!r:.80}."
        )
    found = Path(bundle.named(str(given)))
    if not found.exists():
        found = snapshot(str(found), "bundle", advice="`xblip plugins` lists the installed ones.")
    if (found / retrieval.FILE).is_file():
        if options:
            raise ConfigError("llm: a retriever has no LLM: leave it out.")
        if media:
            raise ConfigError("media: a retriever reads media as it was trained to: leave it out.")
        return _retriever(found, str(given))
    config, file = bundle.read_config(found)
    options = dict(options)
    config.llm.dtype = str(options.pop("dtype", config.llm.dtype)).removeprefix("torch.")
    config.llm.options.update(options)
    return _bundle(config, file, str(given), media)


def _bundle(config: BundleConfig, file: Path, name: str, media: Mapping[str, Mapping[str, Any]]) -> System:
    branches, modalities = bundle.branches_of(config, file), {}
    facts: dict[str, Any] = {"llm": {"source": Path(config.llm.source).name, "dtype": config.llm.dtype}}
    facts |= {"router": configs.plain(config.router), "generation": config.generation, "branches": {}}
    facts |= {"media": dict(media)} if media else {}
    for modality in media:
        if modality not in branches:
            raise ConfigError(
                f'media has settings of "{modality}", which the model does not read.{suggest(modality, branches)}'
            )
    for modality, folder in branches.items():
        if isinstance(folder, BranchConfig):
            raise BundleError(
                f'{file} only describes its branch "{modality}": train it or convert published weights, and name its folder '
                "in the description's place."
            )
        saved, trained = read_saved(folder)
        saved.config.update(media.get(modality, {}))
        modalities[modality] = build_modality(saved, folder)
        facts["branches"][modality] = _digest(folder)
        facts["llm"]["fingerprint"] = trained["llm"]["fingerprint"]

    def load(device: torch.device) -> XBlip:
        if device.type != "cpu":
            config.llm.options.setdefault("device_map", str(device))
        llm = FrozenLLM.from_pretrained(config.llm)
        loaded = bundle.load_branches(branches, llm=llm, media=media)
        return XBlip(llm=llm, branches=loaded, router=config.router, generation=config.generation).eval()

    return System(name, facts, modalities, load)


def _retriever(folder: Path, name: str) -> System:
    saved, _ = read_parts(folder / retrieval.FILE)
    return System(
        name,
        {"retriever": _digest(folder)},
        {saved.modality: build_modality(saved, folder)},
        lambda device: retrieval.Retriever.from_pretrained(folder).to(device),
    )


def _digest(folder: Path) -> str:
    """Of the contents of a branch's own files, whose description names its encoder by fingerprint."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted([*folder.glob("*.yaml"), *folder.glob("*.safetensors")]):
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "blake2b").digest())
    return digest.hexdigest()
