"""Configs: dataclasses as the schema, OmegaConf for YAML, overrides and types.

A YAML may name another one as its `base:`, whose keys it extends and overrides; `key.sub=value` overrides come last. A
plugin's settings are a dataclass of that plugin, so the core checks them without knowing them. A key that nobody knows
is an error that suggests the nearest, never silently ignored.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from xblip.errors import ConfigError, suggest

T = TypeVar("T")
HOLDERS = (list, tuple, dict)
YAML = getattr(yaml, "CBaseLoader", yaml.BaseLoader)  # LibYAML where it is, as OmegaConf: it takes more than the other


def load_yaml(
    path: str | Path, overrides: Sequence[str] = (), *, named: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Reads a YAML with its bases and overrides.

    Args:
      path: the YAML; `base:` in it is a path relative to it.
      overrides: "key.sub=value" each, the value in YAML.
      named: keys that hold mappings of mappings, and the field in which each of these is told its own key, unless it
        says it itself; so `${branches.NAME}` knows what it is wherever it is put by {"branches": "modality"}.

    Returns:
      Plain dictionaries and lists, interpolations resolved.

    Raises:
      ConfigError: a file is missing, does not parse or names itself as its base, or an override is malformed.
    """
    merged = _read(Path(path).expanduser(), named or {}, seen=())
    for override in overrides:
        if "=" not in override or override.startswith("="):
            raise ConfigError(
                f'Cannot use the override "{override}": expected key.sub=value, e.g. training.max_steps=10.'
            )
    try:
        merged = _merge(merged, OmegaConf.from_dotlist(list(overrides)))
        return OmegaConf.to_container(merged, resolve=True)
    except InterpolationResolutionError as cause:
        given = OmegaConf.to_container(cause.parent_node, resolve=False)[cause.key]
        raise ConfigError(
            f"Cannot use {path}: {cause.full_key} is {given!r:.80}, and there is no such value. Check the name, and that no "
            "override has replaced what holds it."
        ) from cause
    except (OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError) as cause:
        raise ConfigError(f"Cannot use {path}: {_flat(cause)}") from cause


def _read(path: Path, named: Mapping[str, str], seen: tuple[Path, ...]) -> DictConfig:
    if not path.is_file():
        raise ConfigError(f'No config file at "{path}". Check the path; relative ones start at {Path.cwd()}.')
    if path.resolve() in seen:
        raise ConfigError(f"{path} is its own base, by way of {' -> '.join(map(str, seen))}. Remove one `base:`.")
    try:
        config = OmegaConf.load(path)
        single = isinstance(yaml.load(path.read_text("utf-8"), YAML), str)  # of which OmegaConf makes a key
    except (OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError) as cause:
        raise ConfigError(f"{path} is not a valid YAML file: {_flat(cause)}") from cause
    if single or not isinstance(config, DictConfig):
        raise ConfigError(f"{path} is not a config: it holds a list or a single value; expected keys with values.")
    for key, parts in config.items_ex(resolve=False):
        for name, part in parts.items_ex(resolve=False) if key in named and isinstance(parts, DictConfig) else ():
            if isinstance(part, DictConfig):
                part.setdefault(named[key], name)
    base = config.pop("base", None)
    if base is None:
        return config
    if not isinstance(base, str):
        raise ConfigError(f"{path}: `base` must be the path of one config, not {base!r}.")
    below = _read(path.parent / Path(base).expanduser(), named, (*seen, path.resolve()))
    try:
        return _merge(below, config)
    except (OmegaConfBaseException, TypeError) as cause:
        raise ConfigError(f"Cannot use {path} on top of its base: {_flat(cause)}") from cause


def _merge(below: DictConfig, above: DictConfig) -> DictConfig:
    """As OmegaConf does; but a list takes the place of a mapping, and a mapping that of a list."""
    _make_room(below, above)
    return OmegaConf.merge(below, above)


def _make_room(below: DictConfig, above: DictConfig) -> None:
    given = dict(below.items_ex(resolve=False))
    for key, new in above.items_ex(resolve=False):
        old = given.get(key)
        if key in given and (isinstance(new, ListConfig) or isinstance(old, ListConfig)):
            below[key] = None
        elif isinstance(old, DictConfig) and isinstance(new, DictConfig):
            _make_room(old, new)


def build(schema: type[T], values: Mapping[str, Any] | None, *, where: str) -> T:
    """Makes a dataclass instance from plain values, checking names and types.

    Args:
      schema: a dataclass; nested dataclasses are checked likewise.
      values: what the user wrote; missing fields keep their defaults.
      where: what the values configure, for messages, e.g. "branch.bridge".

    Raises:
      ConfigError: an unknown key (the nearest is suggested), a value of the wrong kind, or a missing value.
    """
    values = {} if values is None else values
    _check(schema, values, where)
    try:
        instance = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), dict(values)))
    except (OmegaConfBaseException, TypeError) as cause:
        raise ConfigError(f'"{where}": {_flat(cause)}') from cause
    return instance


def plain(config: Any) -> dict[str, Any]:
    """Returns a dataclass instance as plain values, fit for YAML; paths become strings."""
    return _for_yaml(OmegaConf.to_container(OmegaConf.structured(config), resolve=True, enum_to_str=True))


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns plain values by their full names, e.g. {"lens.width_mm": 3}."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def save_yaml(path: Path, values: Mapping[str, Any]) -> None:
    """Writes plain values as YAML, in the order given."""
    OmegaConf.save(OmegaConf.create(dict(values)), path)


def at_least(settings: Any, **limits: float) -> None:
    """Raises `ConfigError` for a setting that is below its limit, e.g. `at_least(config, hidden_size=1)`."""
    for name, limit in limits.items():
        if not getattr(settings, name) >= limit:
            raise ConfigError(f"{name} must be at least {limit}, not {getattr(settings, name)!r}.")


def check_share(name: str, value: float, *, whole: str) -> None:
    """Raises `ConfigError` for a share of `whole`, such as "all rows", that is not from 0 to 1."""
    if not 0 <= value <= 1:
        raise ConfigError(f"{name} is a share of {whole}, from 0 to 1, not {value:g}.")


def _for_yaml(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _for_yaml(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_for_yaml(part) for part in value]
    return str(value) if isinstance(value, Path) else value


def _check(kind: Any, value: Any, where: str) -> None:
    """Checks keys, and where there are keys, lists and single values; what these values are, OmegaConf checks."""
    kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    if Any in kinds or (value is None and NoneType in kinds):
        return
    holder = next((part for part in kinds if is_dataclass(part) or (get_origin(part) or part) in HOLDERS), None)
    origin, parts = get_origin(holder) or holder, get_args(holder) or (Any, Any)
    if value is None:
        raise ConfigError(f'"{where}" is null: give it a value, or leave it out.')
    if holder is None:
        if isinstance(value, (Mapping, list, tuple)):
            raise ConfigError(f'"{where}" must be a single value, not {value!r:.80}.')
    elif origin in (list, tuple):
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f'"{where}" must be a list, not {value!r:.80}.')
        for index, part in enumerate(value):
            _check(parts[0], part, f"{where}[{index}]")
    elif not isinstance(value, (Mapping, holder if is_dataclass(holder) else Mapping)):
        raise ConfigError(f'"{where}" must hold keys with values, not {value!r:.80}.')
    elif origin is dict:
        for key, part in value.items():
            _check(parts[1], part, f"{where}.{key}")
    elif isinstance(value, Mapping):
        _check_keys(holder, value, where)


def _check_keys(schema: type, values: Mapping[str, Any], where: str) -> None:
    fields, kinds = {field.name: field for field in dataclasses.fields(schema)}, get_type_hints(schema)
    for key, value in values.items():
        if key not in fields:
            raise ConfigError(f'Unknown key "{where}.{key!s:.80}".{suggest(str(key), fields)}')
        _check(kinds[key], value, f"{where}.{key}")
    for key, field in fields.items():
        if key not in values and field.default is MISSING and field.default_factory is MISSING:
            raise ConfigError(f'"{where}" lacks its "{key}": add it.')


def _flat(error: BaseException) -> str:
    """An OmegaConf or YAML error in one line, without its technical tail."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kept = [line for line in lines if not line.startswith(("object_type=", "reference_type="))]
    return " ".join(kept).replace("full_key: ", "at ") + "."
