"""Bundles: a saved model as a folder that holds, or names, all its parts.

config.yaml          the LLM, the router, generation defaults, and the branches' names
llm/                 the LLM, unless config.yaml names a hub id
encoders/<print>/    each encoder once, by fingerprint, unless its branch names a hub id; one beside another processor
                     as <print>-<modality>/
<modality>/          one branch each
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xblip import config as configs
from xblip import plugins
from xblip.branch import FILE as BRANCH_FILE
from xblip.branch import Branch, BranchConfig, made_folder, read_saved
from xblip.errors import BundleError, ConfigError
from xblip.frozen import Encoders
from xblip.llm import FrozenLLM, LLMConfig
from xblip.loading import snapshot
from xblip.router import RouterConfig

if TYPE_CHECKING:
    from xblip.model import XBlip

FILE = "config.yaml"
BRANCHES = {"branches": "modality"}
"""Where configs describe branches, whose keys name their modality."""
LLM = "llm"
KEPT_OPTIONS = ("attn_implementation", "subfolder", "variant")
"""Loading options of the LLM that are saved; others are of a machine (device_map) or a person (token)."""


@dataclass
class BundleConfig:
    """A bundle's `config.yaml`, or a model config.

    Attributes:
      llm: its source may be a folder beside the file.
      branches: folders of branches, from the file's folder on; or each modality's by its name, where a description (the
        fields of `BranchConfig`) may stand in the place of a folder. Paths in a description start at the working
        directory, as in a training config.
      router: how prompts are laid out.
      generation: default generation options.
      architectures: what a source holds that may not be here, see `xblip.blueprint`.
    """

    llm: LLMConfig
    branches: Any = None
    router: RouterConfig = field(default_factory=RouterConfig)
    generation: dict[str, Any] = field(default_factory=dict)
    architectures: dict[str, Any] = field(default_factory=dict)


def read_config(source: str | Path, overrides: Sequence[str] = ()) -> tuple[BundleConfig, Path]:
    """Reads the config of a bundle's folder or hub id, or a model config (YAML of the same form), with overrides.

    Returns:
      The config, and the file it comes from.

    Raises:
      BundleError: there is no bundle.
      ConfigError: the file is wrong.
    """
    path = Path(source)
    if not os.path.exists(path):
        path = snapshot(str(source), "bundle", advice="`xblip plugins` lists the installed ones.")
    file = path / FILE if path.is_dir() else path
    if not file.is_file() and (path / BRANCH_FILE).is_file():
        raise BundleError(
            f"{path} is a branch, and a model is one or more of them before an LLM: name it under `branches` of a config, "
            "or put them together by XBlip.compose."
        )
    if not file.is_file():
        raise BundleError(f"There is no bundle in {path}: it lacks {FILE}. Give a folder written by save_pretrained.")
    config = configs.build(BundleConfig, configs.load_yaml(file, overrides, named=BRANCHES), where=file.name)
    inside = file.parent / config.llm.source
    if inside.is_dir():
        config.llm.source = str(inside)
    elif config.llm.source == LLM:
        raise BundleError(f'The bundle in {file.parent} lacks its folder "{LLM}": copy it again, whole.')
    return config, file


def named(name: str | Path) -> str | Path:
    """Returns the folder of an installed bundle of that name, or the name itself where it is a path or a hub id.

    Raises:
      PluginError: it is a plain name, and no bundle is called so.
    """
    plain = "/" not in str(name) and not os.path.isfile(Path(name, FILE))
    if plain and (str(name) in plugins.installed() or not os.path.exists(name)):
        return plugins.get("model", str(name))
    return name


def branches_of(config: BundleConfig, file: Path) -> dict[str, Path | BranchConfig]:
    """Returns each modality's branch: the folder that holds it, or its description.

    Raises:
      BundleError: there is no branch in a folder, or two are of one modality.
      ConfigError: a description is wrong.
    """
    listed, branches = config.branches or [], {}
    if isinstance(listed, Mapping):
        for name, branch in listed.items():
            if isinstance(branch, str):
                branches[name] = file.parent / branch
                continue
            branches[name] = configs.build(BranchConfig, branch, where=f"branches.{name}")
            if branches[name].modality != name:
                raise ConfigError(
                    f'branches.{name} describes a branch of "{branches[name].modality}": let its key name its modality.'
                )
        return branches
    if not isinstance(listed, list) or not all(isinstance(folder, str) for folder in listed):
        raise ConfigError(
            f"{file}: branches must be a list of folders, or name each modality's folder or description, not {listed!r:.80}."
        )
    for branch in (file.parent / name for name in listed):
        name = read_saved(branch)[0].modality
        if name in branches:
            raise BundleError(f'{file} lists two branches of "{name}": {branches[name]} and {branch}. Remove one.')
        branches[name] = branch
    return branches


def read(source: str | Path, llm_options: Mapping[str, Any]) -> dict[str, Any]:
    """Reads a bundle's folder or hub id, or a model config.

    Returns:
      The arguments of `XBlip.compose`.

    Raises:
      BundleError: there is no bundle, or a branch that is only described.
    """
    config, file = read_config(source)
    options = dict(llm_options)
    dtype = options.pop("dtype", options.pop("torch_dtype", config.llm.dtype))
    config.llm.dtype = str(dtype).removeprefix("torch.")
    config.llm.revision = options.pop("revision", config.llm.revision)
    config.llm.options.update(options)
    branches = branches_of(config, file)
    for name, branch in branches.items():
        if isinstance(branch, BranchConfig):
            raise BundleError(
                f'{file} only describes its branch "{name}". Train it (`xblip train` on a config with `base: {file.name}` '
                f"and `branch: ${{branches.{name}}}`) or convert published weights (`xblip convert`), then name its folder "
                "in the description's place."
            )
    return {
        "llm": config.llm,
        "branches": branches,
        "router": config.router,
        "generation": config.generation,
    }


def load_branches(
    folders: Mapping[str, str | Path], *, llm: FrozenLLM, media: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, Branch]:
    """Loads branches for one LLM; encoders with equal weights and settings are held once.

    Args:
      folders: by modality.
      llm: that they were trained for.
      media: settings of modalities in the place of saved ones, by modality.

    Raises:
      BundleError: see `Branch.load`; or a branch of another modality than its key says.
    """
    branches: dict[str, Branch] = {}
    encoders = Encoders()
    for name, folder in folders.items():
        branch = Branch.load(folder, llm=llm, encoders=encoders, media=(media or {}).get(name))
        if branch.modality.name != name:
            raise BundleError(f'{folder} holds a branch of "{branch.modality.name}", not of "{name}".')
        branches[name] = branch.to(llm.device)
    return branches


def write(model: "XBlip", folder: Path) -> None:
    """Writes a bundle; see the module's description for what goes where."""
    made_folder(folder)
    llm = model.llm.config
    source = Path(llm.source)
    if source.is_dir():
        copy_folder(source, folder / LLM)
    encoders: dict[str, Path] = {}
    for name, branch in model.branches.items():
        place, own = None, branch.encoder_folder
        if own is not None:
            inside = branch.encoder.fingerprint
            if _processors(encoders.setdefault(inside, own)) != _processors(own):
                inside = f"{inside}-{name}"
            place = f"../encoders/{inside}"
            copy_folder(own, folder / "encoders" / inside)
        branch.save(folder / name, llm=model.llm, encoder=place)
    configs.save_yaml(
        folder / FILE,
        {
            "llm": {
                "source": LLM if source.is_dir() else llm.source,
                "revision": llm.revision,
                "dtype": llm.dtype,
                "tokens": llm.tokens,
                "options": {name: value for name, value in llm.options.items() if name in KEPT_OPTIONS},
            },
            "branches": list(model.branches),
            "router": configs.plain(model.router.config),
            "generation": model.generation,
        },
    )
    Path(folder, "README.md").write_text(
        f"---\nlibrary_name: xblip\ntags: [{', '.join(['xblip', *model.branches])}]\n---\n\n# xblip bundle\n\n"
        f"Modalities: {', '.join(model.branches) or 'none'}.\n\n"
        '```python\nimport xblip\n\nmodel = xblip.load("this folder")\n```\n'
    )


def _processors(folder: Path) -> dict[str, bytes]:
    """What lies beside an encoder's weights and says how media are brought to it."""
    return {file.name: file.read_bytes() for file in folder.glob("*processor_config.json")}


def copy_folder(source: Path, target: Path) -> None:
    """Copies a folder's content into another one, unless that is the same."""
    if source.resolve() != target.resolve():
        shutil.copytree(source, target, dirs_exist_ok=True)
