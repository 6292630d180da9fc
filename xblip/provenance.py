"""Where stored features come from: what must be the same for them to stand in for an encoder.

An encoder's fingerprint is known once it is loaded, and a run that reads features loads none. So the settings and the
contents of the encoder's files are kept too: they can be compared with a config before anything is loaded.
"""

from dataclasses import dataclass, field
from typing import Any

from xblip import config as configs
from xblip.errors import some_of

FORMAT = 1
FILES = ("files.", "origin.files.")


@dataclass
class Origin:
    """What features are made by, as far as it is known without loading the encoder.

    Attributes:
      modality: its name.
      settings: the modality's, without `augment`, which changes views alone; a field `encoder` that names a folder is
        left out too, and `files` stand for it.
      encoder_dtype: as the branch's config asks for it.
      files: of the encoder's folder, hashes of the contents by name; none if it is built by code or from a hub.
      revision: commit of an encoder from a hub; None for any other.
    """

    modality: str
    settings: dict[str, Any] = field(default_factory=dict)
    encoder_dtype: str = "float32"
    files: dict[str, str] = field(default_factory=dict)
    revision: str | None = None


@dataclass
class EncoderFacts:
    """What an encoder is, once it is loaded: D_enc, fingerprint, dtype of its weights, how many there are."""

    width: int
    fingerprint: str
    dtype: str
    num_parameters: int


@dataclass
class Views:
    """What is drawn of each source that is learnt from.

    Attributes:
      count: of views beside the source as it is; 0 for none.
      seed: that they are drawn from.
      augment: the modality's settings of that name.
    """

    count: int = 0
    seed: int = 0
    augment: Any = None


@dataclass
class StoreFacts:
    """What a store says of itself.

    Attributes:
      origin: what its features are made by.
      encoder: what made them.
      dtype: of `xblip.shards.DTYPES`.
      views: that it holds.
      format: version of the files.
    """

    origin: Origin
    encoder: EncoderFacts
    dtype: str = "float16"
    views: Views = field(default_factory=Views)
    format: int = FORMAT


def differences(here: Any, there: Any) -> list[str]:
    """Says in what two dataclass instances differ, e.g. "origin.settings.width is 8 here and 16 there".

    Of an encoder's files the names are told, of three at most.
    """
    ours, theirs = configs.flat(configs.plain(here)), configs.flat(configs.plain(there))
    names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    files = sorted(name.partition("files.")[2] for name in names if name.startswith(FILES))
    told = [
        f"{name} is {ours.get(name)!r:.120} here and {theirs.get(name)!r:.120} there"
        for name in names
        if not name.startswith(FILES)
    ]
    if len(files) == 1:
        told.append(f"its file {files[0]} differs")
    elif files:
        told.append(f"its files {some_of(files)} differ")
    return told
