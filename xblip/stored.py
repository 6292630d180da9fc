"""Training without an encoder: what stands in for it where its features are stored.

The stand-in has the encoder's width, fingerprint and size, so the branch that training saves is the same to the byte.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from xblip import config as configs
from xblip.branch import BranchConfig, build_modality
from xblip.contents import KnownFiles
from xblip.errors import BundleError, ConfigError
from xblip.frozen import Frozen, FrozenEncoder
from xblip.loading import cached_snapshot
from xblip.modality import Modality
from xblip.provenance import EncoderFacts, Origin, Views, differences
from xblip.store import FeatureStore

DOCUMENTS = (".md",)
"""Endings of files in an encoder's folder that say nothing of what it computes."""


class StoredEncoder(Frozen):
    """Stands in for a `FrozenEncoder` whose features are stored.

    Attributes:
      name: the modality's.
      folder: of the store.
      width: D_enc.
      fingerprint: the encoder's.
      num_parameters: the encoder's.
      module: itself, which has no weights.
    """

    def __init__(self, store: FeatureStore):
        super().__init__()
        facts = store.facts.encoder
        self.name = store.facts.origin.modality
        self.folder = store.folder
        self.width = facts.width
        self.fingerprint = facts.fingerprint
        self.num_parameters = facts.num_parameters
        self.freeze()

    @property
    def module(self) -> "StoredEncoder":
        """What shows as the encoder in tables."""
        return self

    def takes(self, tensors: Mapping[str, Any]) -> NoReturn:
        """Raises `BundleError`: this run cannot encode."""
        self.forward(**tensors)

    def forward(self, **tensors: Any) -> NoReturn:
        """Raises `BundleError`: this run cannot encode."""
        raise BundleError(
            f"This run reads the features of {self.name} from {self.folder} and has no encoder: it was given "
            f"{', '.join(tensors) or 'nothing'} to encode. Give features of the store, or leave out `features` to load the "
            "encoder."
        )


def stored_encoder(store: FeatureStore, config: BranchConfig) -> StoredEncoder:
    """Returns what `Branch.build` takes as the encoder of a branch that learns from stored features.

    Compared are the modality's settings and `encoder_dtype`; where the encoder comes from a folder, the contents of its
    files; where it comes from a hub and is downloaded, its revision. Of an encoder built by code there is no more to
    compare than its settings.

    Raises:
      BundleError: the features are of another encoder, or of other settings.
      PluginError, ConfigError: the modality is unknown, or its settings are wrong.
    """
    here = origin_of(config, build_modality(config), store.files)
    there = store.facts.origin
    if here.revision is None:
        here.revision = there.revision
    if differ := differences(here, there):
        raise BundleError(
            f"The features in {store.folder} are not those of this config's encoder: {'; '.join(differ)}. Correct the "
            "config, or run xblip precompute with it into another folder."
        )
    return StoredEncoder(store)


def check_views(store: FeatureStore, config: BranchConfig) -> None:
    """Checks that a branch may learn from the views in a store.

    Raises:
      ConfigError: there are none.
      BundleError: they were drawn by other settings.
    """
    views = store.facts.views
    if not views.count:
        raise ConfigError(
            f"data.augment and data.features: the features in {store.folder} are of sources as they are, so nothing can be "
            "changed at random. Leave out one of the two, or store views in another folder: xblip precompute --views."
        )
    here = configs.plain(build_modality(config).config).get("augment")
    if differ := differences(Views(views.count, views.seed, here), views):
        raise BundleError(
            f"The views in {store.folder} were drawn by other settings: {'; '.join(differ)}. Correct the config, or run "
            "xblip precompute with it into another folder."
        )


def origin_of(config: BranchConfig, modality: Modality, files: KnownFiles) -> Origin:
    """Returns what a branch's features are made by, as far as it is known without loading the encoder.

    Args:
      config: of the branch.
      modality: built from it.
      files: what is known of files, so that large ones are read once.

    Raises:
      BundleError: the encoder's folder is not there.
    """
    settings = configs.plain(modality.config)
    settings.pop("augment", None)
    source = settings.get("encoder")
    origin = Origin(modality.name, settings, config.encoder_dtype)
    if not isinstance(source, str):
        return origin
    if Path(source).is_dir():
        settings.pop("encoder")
        paths = [
            path for path in sorted(Path(source).rglob("*")) if _matters(path.relative_to(source)) and path.is_file()
        ]
        origin.files = {path.relative_to(source).as_posix(): files.key(path).hex() for path in paths}
    elif snapshot := cached_snapshot(source):
        origin.revision = snapshot.name
    return origin


def encoder_facts(encoder: FrozenEncoder) -> EncoderFacts:
    """Returns what a loaded encoder is."""
    dtypes = {str(weight.dtype).removeprefix("torch.") for weight in encoder.parameters() if weight.is_floating_point()}
    return EncoderFacts(encoder.width, encoder.fingerprint, ", ".join(sorted(dtypes)), encoder.num_parameters)


def _matters(path: Path) -> bool:
    return not path.name.endswith(DOCUMENTS) and not any(part.startswith(".") for part in path.parts)
