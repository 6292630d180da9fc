"""A branch: one modality's frozen encoder with its bridge, saved as a folder of a few megabytes.

A branch folder holds `branch.yaml`, `bridge.safetensors` and what the bridge needs beside them. It names its encoder
and the LLM it was trained for by fingerprint, and refuses others: a soft prompt read by another LLM is silent rubbish.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import xblip
from xblip import config as configs
from xblip import plugins
from xblip.bridge import WEIGHTS, Bridge, load_bridge
from xblip.errors import BundleError, ConfigError, InputError, MediaError, XBlipError, suggest
from xblip.frozen import Encoders, FrozenEncoder
from xblip.llm import DTYPES, FrozenLLM
from xblip.loading import save_tensors
from xblip.media import held
from xblip.modality import Features, Modality, collate

FILE = "branch.yaml"
DEFAULT_BRIDGE = "qformer"


@dataclass
class BranchConfig:
    """What a branch is made of.

    Attributes:
      modality: its name.
      config: the modality's settings, by the modality's `Config`.
      bridge: `kind` (a bridge's name; "qformer" unless given) and that bridge's settings.
      cue: text before the soft prompt; None for the modality's own.
      encoder_dtype: "float32", "bfloat16", "float16", or "auto" for the one its weights are stored in.
    """

    modality: str
    config: dict[str, Any] = field(default_factory=dict)
    bridge: dict[str, Any] = field(default_factory=dict)
    cue: str | None = None
    encoder_dtype: str = "float32"


class Branch(nn.Module):
    """One modality, ready to turn media and instructions into soft prompts.

    Attributes:
      config: what it was built from.
      modality: reads media.
      encoder: frozen.
      bridge: the part that trains.
      cue: text before the soft prompt.
    """

    def __init__(self, config: BranchConfig, *, modality: Modality, encoder: FrozenEncoder, bridge: Bridge):
        super().__init__()
        self.config = config
        self.modality = modality
        self.encoder = encoder
        self.bridge = bridge
        self.cue = modality.cue if config.cue is None else config.cue

    @classmethod
    def build(
        cls,
        config: BranchConfig,
        *,
        llm_width: int,
        folder: Path | None = None,
        encoders: Encoders | None = None,
        bridge_class: type[Bridge] | None = None,
        encoder: FrozenEncoder | None = None,
    ) -> "Branch":
        """Builds a branch with a fresh bridge.

        Args:
          config: what to build.
          llm_width: D_llm.
          folder: what relative paths in the configs start from; None for the working directory.
          encoders: those of the model's other branches, to share; None for an encoder of its own.
          bridge_class: in the place of the class that is registered for the bridge's kind.
          encoder: in the place of the modality's own, which is then not loaded; see `xblip.stored`.

        Raises:
          PluginError, ConfigError, BundleError: the modality, a setting, or the encoder's files are wrong.
        """
        modality = build_modality(config, folder)
        encoder = encoder or build_encoder(config, modality, encoders)
        bridge_class, settings = bridge_settings(config, folder, bridge_class)
        bridge = bridge_class(settings, encoder_width=encoder.width, llm_width=llm_width)
        return cls(config, modality=modality, encoder=encoder, bridge=bridge)

    @property
    def encoder_folder(self) -> Path | None:
        """Where the encoder was loaded from; None if it came from a hub or is the modality's own."""
        source = getattr(self.modality.config, "encoder", None)
        return Path(source) if source and Path(source).is_dir() else None

    def read(self, source: Any) -> dict[str, Tensor]:
        """Reads one source; what is read already (a dictionary of tensors, or `Features`) is taken as it is.

        Raises:
          MediaError: it cannot be read, or another modality read it.
        """
        if isinstance(source, Features):
            if len(source.segments) != 1:
                raise MediaError(f"Features of {len(source.segments)} inputs as one: give the parts of `split()`.")
            if source.values.shape[-1] != self.encoder.width:
                raise MediaError(
                    f"These are features of width {source.values.shape[-1]}, and the encoder of the modality "
                    f"{self.modality.name} gives {self.encoder.width}: were they another modality's?"
                )
            return source
        if isinstance(source, dict):
            if not self.encoder.takes(source):
                raise MediaError(
                    f"A dictionary with {', '.join(map(str, source)) or 'nothing'}: expected what `load` or `encode` of "
                    f"the modality {self.modality.name} gave, or a source."
                )
            return source
        return self.modality.load(held(source, kind=self.modality.name))

    def encode(self, sources: Sequence[Any]) -> Features:
        """Gives the frozen features of several sources, each a source, what `read` gave, or `Features`."""
        if isinstance(sources, (str, bytes)) or not isinstance(sources, Sequence) or not sources:
            raise InputError(f"Expected a list of at least one source to encode, not {sources!r:.80}.")
        items = [self.read(source) for source in sources]
        fresh = [item for item in items if not isinstance(item, Features)]
        encoded = iter(self._encode(fresh).split() if fresh else [])
        weights = next(self.bridge.parameters())
        features = (item if isinstance(item, Features) else next(encoded) for item in items)
        return Features.join([item.to(weights) for item in features])

    def _encode(self, items: Sequence[dict[str, Tensor]]) -> Features:
        tensors, segments = collate(items)
        weights = next(self.bridge.parameters())
        return Features(
            *self.encoder(**{name: tensor.to(weights.device) for name, tensor in tensors.items()}), segments
        )

    def forward(self, sources: Sequence[Any], instructions: Sequence[str]) -> list[Tensor]:
        """Makes the soft prompt (L, D_llm) of each source in the light of its own instruction."""
        features = self.encode(sources)
        with without_half_precision(features.values.device.type):
            return self.bridge(features, instructions)

    def save(self, folder: str | Path, *, llm: FrozenLLM, encoder: str | None = None) -> None:
        """Writes the branch.

        Args:
          folder: made if missing.
          llm: the LLM that it was trained for.
          encoder: where the encoder will be found from `folder`; None keeps the place it was loaded from.
        """
        folder = made_folder(folder)
        configs.save_yaml(
            folder / FILE,
            {
                **self.save_parts(folder, encoder=encoder),
                "cue": self.cue,
                "llm": {"source": Path(llm.config.source).name, "width": llm.width, "fingerprint": llm.fingerprint},
                "xblip": xblip.__version__,
            },
        )
        Path(folder, "README.md").write_text(_card(self, llm))

    def save_parts(self, folder: Path, *, encoder: str | None = None) -> dict[str, Any]:
        """Writes the bridge into a folder that is there.

        Args:
          folder: to write into.
          encoder: as for `save`.

        Returns:
          What `load_parts` needs beside it.
        """
        settings = configs.plain(self.modality.config)
        if self.encoder_folder is not None:
            # Resolved, since ".." after a link leads elsewhere than the path says.
            settings["encoder"] = encoder or os.path.relpath(self.encoder_folder.resolve(), folder.resolve())
        bridge = {"kind": self.bridge.name, **configs.plain(self.bridge.config), **self.bridge.save_assets(folder)}
        save_tensors(self.bridge.state_dict(), folder / WEIGHTS)
        return {
            "modality": self.modality.name,
            "config": settings,
            "bridge": bridge,
            "encoder_dtype": self.config.encoder_dtype,
            "encoder": {"width": self.encoder.width, "fingerprint": self.encoder.fingerprint},
        }

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        llm: FrozenLLM,
        encoders: Encoders | None = None,
        media: Mapping[str, Any] | None = None,
    ) -> "Branch":
        """Loads a branch for an LLM.

        Args:
          folder: that it was saved in.
          llm: that it was trained for.
          encoders: those of the model's other branches, to share.
          media: settings of the modality in the place of saved ones, such as how many frames are read.

        Raises:
          BundleError: no branch there, damaged weights, or a branch trained for another LLM or encoder.
        """
        folder = Path(folder)
        config, facts = read_saved(folder)
        config.config.update(media or {})
        trained = facts["llm"]
        if trained["fingerprint"] != llm.fingerprint:
            raise BundleError(
                f'The branch in {folder} was trained for the LLM "{trained["source"]}" with fingerprint '
                f'{trained["fingerprint"]} (width {trained["width"]}); this LLM, "{llm.config.source}", has '
                f"{llm.fingerprint} (width {llm.width}). Compose it with the LLM it was trained for, or train it for "
                "this one."
            )
        return cls.load_parts(folder / FILE, config, facts, llm_width=llm.width, encoders=encoders)

    @classmethod
    def load_parts(
        cls,
        file: Path,
        config: BranchConfig,
        facts: dict[str, dict[str, Any]],
        *,
        llm_width: int,
        encoders: Encoders | None = None,
        bridge_class: type[Bridge] | None = None,
    ) -> "Branch":
        """Builds what `save_parts` wrote beside `file`, of which `read_parts` gave config and facts; see also `build`.

        Raises:
          BundleError: damaged weights, or another encoder than it was trained on.
        """
        what, folder = file.stem, file.parent
        trained = facts["encoder"]
        try:
            branch = cls.build(config, llm_width=llm_width, folder=folder, encoders=encoders, bridge_class=bridge_class)
        except XBlipError as error:
            raise type(error)(f"The {what} in {folder} cannot be built. {error}") from error
        if branch.encoder.fingerprint != trained["fingerprint"]:
            raise BundleError(
                f"The {what} in {folder} was trained on an encoder with fingerprint {trained['fingerprint']} (width "
                f"{trained['width']}); the one found has {branch.encoder.fingerprint} (width {branch.encoder.width}). "
                f"Put the encoder it was trained on in its place, or train the {what} for this one."
            )
        load_bridge(branch.bridge, folder, what=what)
        return branch


@contextlib.contextmanager
def without_half_precision(device_type: str) -> Iterator[None]:
    """Lets a bridge run in float32 under float16 autocast, in which a Q-Former's loss overflows (LAVIS, issue 267)."""
    knows_autocast = device_type != "meta"
    if (
        knows_autocast
        and torch.is_autocast_enabled(device_type)
        and torch.get_autocast_dtype(device_type) is torch.float16
    ):
        with torch.autocast(device_type, enabled=False):
            yield
    else:
        yield


def build_modality(config: BranchConfig, folder: Path | None = None) -> Modality:
    """Builds what reads a branch's media; `folder` is where relative paths of a saved branch start.

    Raises:
      PluginError, ConfigError: the modality is unknown, or its settings are wrong.
    """
    modality_class = plugins.get("modality", config.modality)
    settings = configs.build(modality_class.Config, config.config, where=f"{config.modality}.config")
    if folder is not None and getattr(settings, "encoder", None):
        settings.encoder = _resolved(settings.encoder, folder)
    return modality_class(settings)


def build_encoder(config: BranchConfig, modality: Modality, encoders: Encoders | None = None) -> FrozenEncoder:
    """Builds a branch's encoder, frozen; `encoders` are those of the model's other branches, to share.

    Raises:
      ConfigError, BundleError: unknown `encoder_dtype`, or the encoder's files are wrong.
    """
    if config.encoder_dtype not in DTYPES:
        raise ConfigError(f'Unknown encoder_dtype "{config.encoder_dtype}".{suggest(config.encoder_dtype, DTYPES)}')
    dtype = None if config.encoder_dtype == "auto" else getattr(torch, config.encoder_dtype)
    return (encoders or Encoders()).build(modality.build_encoder, name=config.modality, dtype=dtype)


def bridge_settings(
    config: BranchConfig, folder: Path | None = None, bridge_class: type[Bridge] | None = None
) -> tuple[type[Bridge], Any]:
    """Returns the class of a branch's bridge, `bridge_class` if given, and its settings; `folder` is a saved branch's.

    Raises:
      PluginError, ConfigError: the bridge is unknown, or its settings are wrong.
    """
    name, own = config.modality, plugins.get("modality", config.modality).bridge
    own_kind = own.get("kind", DEFAULT_BRIDGE)
    kind = config.bridge.get("kind", own_kind)
    if not isinstance(kind, str):
        raise ConfigError(f"{name}.bridge.kind must be the name of a bridge, not {kind!r}.")
    wanted = {**(own if kind == own_kind else {}), **config.bridge}
    wanted.pop("kind", None)
    bridge_class = bridge_class or plugins.get("bridge", kind)
    settings = configs.build(bridge_class.Config, wanted, where=f"{name}.bridge")
    return bridge_class, settings if folder is None else bridge_class.resolve(settings, folder)


def made_folder(folder: str | Path) -> Path:
    """Makes a folder to write into, if it is not there.

    Raises:
      BundleError: it cannot be made, or nothing can be written into it.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as cause:
        raise BundleError(f"Cannot write {folder}: {cause.strerror}. Give another folder.") from cause
    if not os.access(folder, os.W_OK):
        raise BundleError(f"Cannot write {folder}: it is read-only. Give another folder.")
    return Path(folder)


def read_saved(folder: Path) -> tuple[BranchConfig, dict[str, dict[str, Any]]]:
    """Reads a saved branch's config, and the facts of the "encoder" and of the "llm" that it was trained for.

    Raises:
      BundleError, ConfigError: there is no branch, or its file is damaged.
    """
    if not (folder / FILE).is_file():
        raise BundleError(
            f"There is no branch in {folder.resolve()}: it lacks {FILE}. Give the folder that training wrote."
        )
    return read_parts(folder / FILE, llm={"fingerprint", "width", "source"})


def read_parts(file: Path, **needed: set[str]) -> tuple[BranchConfig, dict[str, dict[str, Any]]]:
    """Reads what describes a branch or the like.

    Args:
      file: a YAML that holds what `Branch.save_parts` gave.
      needed: facts that must be there beside the "encoder"'s, each with the keys that must be in it.

    Returns:
      The config, and the facts.

    Raises:
      BundleError, ConfigError: the file is damaged.
    """
    saved = configs.load_yaml(file)
    needed = {"encoder": {"fingerprint", "width"}, **needed}
    missing = {"modality", "bridge", *needed} - set(saved)
    for part, keys in needed.items():
        found = saved.get(part)
        missing |= {f"{part}.{key}" for key in keys - set(found if isinstance(found, dict) else ()) if part in saved}
    if missing:
        raise BundleError(f"{file} is damaged: it lacks {', '.join(sorted(missing))}.")
    if not isinstance(saved["modality"], str):
        raise BundleError(f"{file} is damaged: its modality must be a name, not {saved['modality']!r:.80}.")
    saved.pop("xblip", None)
    facts = {part: saved.pop(part) for part in needed}
    return configs.build(BranchConfig, saved, where=str(file)), facts


def _resolved(source: str, folder: Path) -> str:
    """A path that stands relative to the branch's folder, where it is one; else as it is (a hub id)."""
    inside = folder / source
    return str(inside.resolve()) if inside.is_dir() or source.startswith(".") else source


def _card(branch: Branch, llm: FrozenLLM) -> str:
    weights = list(branch.bridge.parameters())
    total = sum(parameter.numel() for parameter in weights)
    trained = sum(parameter.numel() for parameter in weights if parameter.requires_grad)
    frozen = branch.encoder.num_parameters
    share = "" if trained == total else f" ({trained:,} of them trained)"
    return (
        f"---\nlibrary_name: xblip\ntags: [xblip, {branch.modality.name}]\n---\n\n"
        f"# xblip branch: {branch.modality.name}\n\n"
        f"A `{branch.bridge.name}` bridge of {total:,} parameters{share} between a frozen encoder of "
        f"{frozen:,} (fingerprint `{branch.encoder.fingerprint}`) and the frozen LLM `{Path(llm.config.source).name}` "
        f"(fingerprint `{llm.fingerprint}`).\n\n"
        "```python\nimport xblip\n\n"
        f'model = xblip.XBlip.compose(llm="...", branches={{"{branch.modality.name}": "this folder"}})\n```\n'
    )
