"""xblip: modalities as plugins, each a frozen encoder with its own instruction-aware Q-Former, one shared frozen LLM.

The public names. They are resolved when first used, so that importing xblip costs nothing: neither torch nor
transformers nor any plugin is loaded.
"""

import importlib

from xblip.errors import BundleError, ConfigError, InputError, MediaError, PluginError, XBlipError
from xblip.hookspecs import hookimpl

_HOMES = {
    "Answer": "xblip.answer",
    "Bridge": "xblip.bridge",
    "Example": "xblip.modality",
    "Features": "xblip.modality",
    "MediaFile": "xblip.media",
    "Modality": "xblip.modality",
    "Sample": "xblip.sample",
    "TransformersEncoder": "xblip.encoder",
    "XBlip": "xblip.model",
    "decoding": "xblip.media",
    "load": "xblip.model",
    "media_file": "xblip.media",
    "plugins": None,
}

__version__ = "0.1.0"
__all__ = [
    "Answer",
    "Bridge",
    "BundleError",
    "ConfigError",
    "Example",
    "Features",
    "InputError",
    "MediaError",
    "MediaFile",
    "Modality",
    "PluginError",
    "Sample",
    "TransformersEncoder",
    "XBlip",
    "XBlipError",
    "decoding",
    "hookimpl",
    "load",
    "media_file",
    "plugins",
]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'xblip' has no attribute {name!r}")
    home = _HOMES[name]
    return getattr(importlib.import_module(home), name) if home else importlib.import_module(f"xblip.{name}")


def __dir__() -> list[str]:
    return __all__
