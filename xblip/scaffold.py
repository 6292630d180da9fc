"""A new plugin: the distribution that `xblip new NAME` writes.

The template is itself a working plugin, called `thermal`, so that it can be read, linted and run as it stands;
writing a plugin is copying it with another name.
"""

import keyword
import re
from importlib import resources
from pathlib import Path

from xblip import plugins
from xblip.errors import ConfigError

TEMPLATE = "thermal"
RESERVED = ("answer", "chat", "help", "instruction", "json", "media", "messages", "model", "source", "text")
"""Words that samples, chat messages or the command line use for something else than a modality."""


def write_plugin(name: str, folder: str | Path | None = None) -> Path:
    """Writes a complete plugin distribution: one module, one test, pyproject.toml, README.md.

    Args:
      name: the modality's name, e.g. "thermal" or "heat_map"; hyphens count as underscores.
      folder: where to write; ./xblip-NAME unless given. It may exist if it is empty.

    Returns:
      The folder.

    Raises:
      ConfigError: a name that cannot be a modality's or is taken, or a folder that is not empty.
    """
    name = modality_name(name)
    taken = plugins.installed().get(name)
    if taken:
        raise ConfigError(
            f'"{name}" is taken by the installed plugin {taken[0].distribution}: choose another name, or uninstall it.'
        )
    hyphenated = name.replace("_", "-")
    folder = Path(f"xblip-{hyphenated}" if folder is None else folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConfigError(f"{folder} exists already, and nothing is overwritten: give an empty or a new folder.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as cause:
        raise ConfigError(f"Cannot make the folder {folder}: {cause.strerror}. Give another one.") from cause
    camel = "".join(part.capitalize() for part in name.split("_"))
    for file in _template_files():
        text = file.read_text(encoding="utf-8")
        # Distributions and command-line options are spelt with hyphens: xblip-heat-map, --heat-map.
        text = text.replace(f"-{TEMPLATE}", f"-{hyphenated}").replace(f"{TEMPLATE}-", f"{hyphenated}-")
        text = text.replace(TEMPLATE, name).replace(TEMPLATE.capitalize(), camel)
        (folder / file.name.replace(TEMPLATE, name)).write_text(text, encoding="utf-8")
    return folder


def modality_name(name: str) -> str:
    """Returns `name` as a modality may be called, hyphens made underscores.

    Raises:
      ConfigError: it is not an identifier in lower case, or means something else already.
    """
    wanted = name.replace("-", "_")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", wanted) or keyword.iskeyword(wanted):
        raise ConfigError(
            f'A modality cannot be called "{name}": expected an identifier in lower case, such as thermal or heat_map.'
        )
    if wanted in RESERVED:
        raise ConfigError(
            f'A modality cannot be called "{name}", which means something else in samples or on the command line '
            f"(so do {', '.join(word for word in RESERVED if word != wanted)}): choose another name."
        )
    return wanted


def _template_files() -> list:
    folder = resources.files("xblip") / "template"
    return sorted((file for file in folder.iterdir() if file.is_file()), key=lambda file: file.name)
