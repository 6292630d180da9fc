"""Plugins: listed from metadata without importing them, loaded one at a time by name.

A plugin is an installed distribution with an entry point in the group `xblip`. Only the plugin that a config or a call
names is imported, so a broken plugin breaks itself alone. `XBLIP_PLUGINS=image,audio` restricts what may load (empty:
nothing). Notebooks and tests may `register` a class by hand; it then behaves like an installed one.
"""

import functools
import os
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pluggy

from xblip import hookspecs
from xblip.errors import PluginError, suggest

GROUP = "xblip"
RESTRICT = "XBLIP_PLUGINS"
KINDS = ("modality", "bridge", "model", "task")
CORE = "xblip"
BUILT_IN = ("xblip.bridge", "xblip.tokenwise", "xblip.qformer_bridges", "xblip.pooled", "xblip.resamplers")
BUILT_IN_TASKS = ("xblip.eval_kinds", "xblip.discrn", "xblip.crossmodal", "xblip.eval_retrieval")
"""Apart, since they import what evaluation needs."""
BY_HAND = "registered by hand"


@dataclass
class Plugin:
    """One plugin as its metadata describes it, and what became of loading it.

    Attributes:
      name: entry-point name, equal to the name of what it registers.
      distribution: distribution and version, or "registered by hand".
      offers: what it registered, as "kind name"; empty until loaded.
      error: why it could not be loaded, or "".
    """

    name: str
    distribution: str
    entry_point: metadata.EntryPoint | None = None
    offers: list[str] = field(default_factory=list)
    error: str = ""


@dataclass
class _Registry:
    items: dict[str, dict[str, object]] = field(default_factory=lambda: {kind: {} for kind in KINDS})
    owners: dict[tuple[str, str], str] = field(default_factory=dict)
    loaded: dict[str, Plugin] = field(default_factory=dict)
    examples: dict[str, Path] = field(default_factory=dict)


_registry = _Registry()


def _allowed() -> set[str] | None:
    names = os.environ.get(RESTRICT)
    return None if names is None else {name.strip() for name in names.split(",") if name.strip()}


def installed() -> dict[str, list[Plugin]]:
    """Returns the installed plugins by entry-point name, read from metadata alone, `XBLIP_PLUGINS` obeyed.

    A name with more than one plugin is a clash, which `load` reports.
    """
    allowed = _allowed()
    found: dict[str, list[Plugin]] = {}
    for point in metadata.entry_points(group=GROUP):
        if allowed is None or point.name in allowed:
            dist = f"{point.dist.name} {point.dist.version}" if point.dist else "unknown distribution"
            same = [plugin.distribution for plugin in found.get(point.name, [])]
            if dist not in same:
                found.setdefault(point.name, []).append(Plugin(point.name, dist, point))
    return dict(sorted(found.items()))


def load(name: str) -> Plugin:
    """Imports the plugin of that name and runs its hooks, once.

    Raises:
      PluginError: unknown or restricted name, two plugins of one name, an import that fails, a misspelt hook, or a
        registration under another name.
    """
    if name in _registry.loaded:
        return _registry.loaded[name]
    candidates = installed().get(name, [])
    if not candidates:
        raise PluginError(_unknown("plugin", name))
    if len(candidates) > 1:
        both = " and ".join(plugin.distribution for plugin in candidates)
        raise PluginError(f'Two plugins are called "{name}": {both}. Uninstall one of them.')
    plugin = candidates[0]
    try:
        module = plugin.entry_point.load()
    except (Exception, SystemExit) as cause:
        raise PluginError(
            f'Plugin "{name}" ({plugin.distribution}) failed on import: {type(cause).__name__}: {cause}'
        ) from cause
    _run_hooks(module, plugin, only=name)
    _registry.loaded[name] = plugin
    return plugin


def survey() -> list[Plugin]:
    """Loads every installed plugin; a broken one carries its `error`, and the others are there all the same."""
    plugins = []
    for name, candidates in installed().items():
        try:
            plugins.append(load(name))
        except PluginError as error:
            plugins += [Plugin(name, plugin.distribution, error=str(error)) for plugin in candidates]
    return plugins + [plugin for plugin in _registry.loaded.values() if plugin.entry_point is None]


def register(*things: type) -> None:
    """Registers modality, bridge or task classes by hand, for notebooks and tests.

    A class of the same module and qualified name replaces the earlier one, as when a notebook's cell runs again.

    Raises:
      PluginError: the name is taken by another class, or a thing is none of these.
    """
    from xblip.bridge import Bridge
    from xblip.eval_task import EvalTask
    from xblip.modality import Modality

    bases = {
        Modality: ("modality", "register_modalities"),
        Bridge: ("bridge", "register_bridges"),
        EvalTask: ("task", "register_tasks"),
    }
    for thing in things:
        base = next((base for base in bases if isinstance(thing, type) and issubclass(thing, base)), None)
        if base is None:
            raise PluginError(
                f"{thing!r} is neither an xblip.Modality nor an xblip.Bridge nor an xblip.evaluate.EvalTask: register "
                "such a class."
            )
        kind, hook_name = bases[base]
        _load_built_in(kind)
        name = getattr(thing, "name", "")
        clash = installed().get(name)
        if clash:
            raise PluginError(
                f'"{name}" is taken by the installed plugin {clash[0].distribution}: choose another name.'
            )
        known = _registry.items[kind].get(name)
        if _registry.owners.get((kind, name)) == BY_HAND and _origin(known) != _origin(thing):
            raise PluginError(
                f'"{name}" is taken by {_origin(known)}, registered by hand: choose another name, or '
                f'xblip.plugins.unregister("{name}") first.'
            )
        plugin = Plugin(name, BY_HAND)
        hook = hookspecs.hookimpl(_calls_register(thing), specname=hook_name)
        _run_hooks(SimpleNamespace(hook=hook), plugin, only=name or None)
        _registry.loaded[name] = plugin


def unregister(name: str) -> None:
    """Forgets what was registered by hand or loaded under that name; a later call loads it anew."""
    _registry.loaded.pop(name, None)
    _registry.examples.pop(name, None)
    for kind in KINDS:
        if _registry.owners.get((kind, name)) != CORE:
            _registry.items[kind].pop(name, None)
            _registry.owners.pop((kind, name), None)


def get(kind: str, name: str):
    """Returns the modality, bridge or task class, or the bundle's folder, of that name, loading its plugin if need be.

    Raises:
      PluginError: nothing of that kind has that name (the nearest is suggested), or its plugin is broken.
    """
    _load_built_in(kind)
    if name not in _registry.items[kind]:
        if name not in installed():
            raise PluginError(_unknown(kind, name))
        load(name)
    if name not in _registry.items[kind]:
        raise PluginError(f'Plugin "{name}" offers {", ".join(_registry.loaded[name].offers)}, but no {kind}.')
    return _registry.items[kind][name]


def examples(model: str) -> Path | None:
    """Returns the manifest of questions that an installed model offers to be tried on; None if there is none.

    Raises:
      PluginError: its plugin is broken.
    """
    if model in installed():
        load(model)
    return _registry.examples.get(model)


def names(kind: str) -> list[str]:
    """Returns the names of all that can be had of a kind, which loads every plugin; broken ones are left out."""
    _load_built_in(kind)
    survey()
    return sorted(_registry.items[kind])


def _origin(thing: object) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"


def _calls_register(thing):
    def hook(register):
        register(thing)

    return hook


def _load_built_in(kind: str = "bridge") -> None:
    _load_modules(BUILT_IN_TASKS if kind == "task" else BUILT_IN)


@functools.cache
def _load_modules(modules: tuple[str, ...]) -> None:
    for module in modules:
        plugin = Plugin(module, CORE)
        _run_hooks(__import__(module, fromlist=["_"]), plugin, only=None)


def _unknown(kind: str, name: str) -> str:
    broken_ones = {plugin.name for plugin in survey() if plugin.error}
    known = set(installed()) if kind == "plugin" else broken_ones | set(_registry.items[kind])
    restricted = f" ({RESTRICT} restricts what may load.)" if _allowed() is not None else ""
    advice = (
        ""
        if kind in ("bridge", "task")
        else f" If it is a plugin of its own: pip install xblip-{name.replace('_', '-')}."
    )
    return f'No {kind} is called "{name}".{suggest(name, known)}{advice}{restricted}'


def _run_hooks(module: object, plugin: Plugin, *, only: str | None) -> None:
    """Runs one plugin's hooks in a manager of its own; takes over what it registered only if all of it is right."""
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(hookspecs)
    offered: dict[tuple[str, str], object] = {}
    shown: dict[str, Path] = {}

    def register_class(kind: str):
        def register(cls: type) -> None:
            _offer(kind, getattr(cls, "name", None), cls)

        return register

    def register_model(name: str, folder: Path, examples: Path | None = None) -> None:
        _offer("model", name, Path(folder))
        if examples is not None:
            shown[name] = Path(examples)

    def _offer(kind: str, name: str | None, thing: object) -> None:
        where = f'Plugin "{plugin.name}" ({plugin.distribution})'
        if not isinstance(name, str) or not name.isidentifier():
            raise PluginError(f"{where} registers {thing!r} without a name: set `name` to a Python identifier.")
        if only is not None and name != only:
            raise PluginError(
                f'{where} registers the {kind} "{name}": it must be called "{only}" like the entry point, '
                "so that it is found without importing the plugin."
            )
        owner = _registry.owners.get((kind, name))
        if (owner is not None and owner != plugin.distribution) or (kind, name) in offered:
            raise PluginError(f'{where} registers the {kind} "{name}", which {owner or "it"} already offers.')
        offered[kind, name] = thing

    try:
        manager.register(module, name=plugin.name)
        manager.check_pending()
        manager.hook.register_modalities(register=register_class("modality"))
        manager.hook.register_bridges(register=register_class("bridge"))
        manager.hook.register_models(register=register_model)
        manager.hook.register_tasks(register=register_class("task"))
    except PluginError:
        raise
    except pluggy.PluginValidationError as cause:
        hooks = [name for name in vars(hookspecs) if name.startswith("register_")]
        raise PluginError(
            f'Plugin "{plugin.name}" ({plugin.distribution}): {" ".join(str(cause).split())}. '
            f"The hooks are {', '.join(hooks)}."
        ) from cause
    except Exception as cause:
        raise PluginError(
            f'Plugin "{plugin.name}" ({plugin.distribution}) failed while registering: {type(cause).__name__}: {cause}'
        ) from cause
    if not offered:
        raise PluginError(f'Plugin "{plugin.name}" ({plugin.distribution}) registers nothing: implement a hook.')
    for (kind, name), thing in offered.items():
        _registry.items[kind][name] = thing
        _registry.owners[kind, name] = plugin.distribution
        plugin.offers.append(f"{kind} {name}")
    _registry.examples |= shown
