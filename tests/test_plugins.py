"""Plugins: found without importing them, loaded one by one, and clear about what is wrong with them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from kit import MODEL, Beads, registered

import xblip
from xblip import plugins
from xblip.bridge import Bridge
from xblip.errors import PluginError
from xblip.modality import Modality
from xblip.testing import ToyModality
from xblip.tokenwise import LinearBridge

IMPORTS = "import xblip\nfrom xblip.testing import ToyModality\n\n"
HOOK = "\n\n@xblip.hookimpl\ndef register_modalities(register):\n    register({})\n"


def modality_source(name: str, hook: str = HOOK.format("Toy")) -> str:
    return f'{IMPORTS}class Toy(ToyModality):\n    name = "{name}"\n{hook}'


@pytest.fixture(autouse=True)
def _clean():
    before = dict(plugins._registry.loaded)
    yield
    for name in set(plugins._registry.loaded) - set(before):
        plugins.unregister(name)


def test_listing_imports_nothing(site):
    module = site.install("thermal", "raise SystemExit('imported')")
    found = plugins.installed()["thermal"]
    assert [(plugin.name, plugin.distribution) for plugin in found] == [("thermal", "xblip-thermal 1.0")]
    assert module not in sys.modules


def test_only_the_named_plugin_is_imported(site):
    wanted, other = site.install("thermal"), site.install("depth")
    modality = plugins.get("modality", "thermal")
    assert issubclass(modality, Modality) and modality.name == "thermal"
    assert wanted in sys.modules and other not in sys.modules
    assert plugins.get("modality", "thermal") is modality


def test_a_plugin_is_loaded_once(site):
    site.install(
        "thermal", "import os\nos.environ['LOADS'] = os.environ.get('LOADS', '') + 'x'\n" + modality_source("thermal")
    )
    os.environ.pop("LOADS", None)
    assert plugins.load("thermal") is plugins.load("thermal")
    plugins.get("modality", "thermal")
    assert os.environ.pop("LOADS") == "x"
    assert plugins.load("thermal").offers == ["modality thermal"]


def test_a_misspelt_hook_is_an_error(site):
    site.install("thermal", modality_source("thermal", HOOK.format("Toy").replace("modalities", "modality")))
    with pytest.raises(
        PluginError, match=r'Plugin "thermal" \(xblip-thermal 1.0\): .*register_modality.*register_modalities'
    ):
        plugins.get("modality", "thermal")


def test_a_hook_with_another_argument_is_an_error(site):
    site.install("thermal", modality_source("thermal", HOOK.format("Toy").replace("(register)", "(registry)", 1)))
    with pytest.raises(PluginError, match=r'Plugin "thermal" .*registry'):
        plugins.get("modality", "thermal")


def test_a_clash_names_both_distributions(site):
    site.install("thermal", distribution="heat-cameras", version="2.1")
    site.install("thermal", distribution="warm-things", version="0.3")
    with pytest.raises(PluginError, match=r'Two plugins are called "thermal": .*Uninstall one') as caught:
        plugins.get("modality", "thermal")
    assert "heat-cameras 2.1" in str(caught.value) and "warm-things 0.3" in str(caught.value)
    assert {(plugin.distribution, bool(plugin.error)) for plugin in plugins.survey()} >= {
        ("heat-cameras 2.1", True),
        ("warm-things 0.3", True),
    }


def test_a_modality_must_be_called_like_its_entry_point(site):
    site.install("thermal", modality_source("warmth"))
    with pytest.raises(PluginError, match='registers the modality "warmth": it must be called "thermal"'):
        plugins.get("modality", "thermal")
    assert "warmth" not in plugins._registry.items["modality"]


def test_a_modality_without_a_name_is_an_error(site):
    site.install("thermal", f"{IMPORTS}class Toy(xblip.Modality):\n    pass\n" + HOOK.format("Toy"))
    with pytest.raises(PluginError, match="without a name: set `name`"):
        plugins.get("modality", "thermal")


def test_a_plugin_that_registers_nothing_is_an_error(site):
    site.install("thermal", "import xblip\n")
    with pytest.raises(PluginError, match=r'Plugin "thermal" .* registers nothing: implement a hook'):
        plugins.get("modality", "thermal")


def test_a_hook_that_raises_is_an_error_with_its_cause(site):
    site.install("thermal", modality_source("thermal", HOOK.format("1 / 0")))
    with pytest.raises(PluginError, match="failed while registering: ZeroDivisionError: division by zero"):
        plugins.get("modality", "thermal")


def test_a_plugin_that_raises_on_import_breaks_itself_alone(site):
    site.install("broken_one", "raise RuntimeError('no camera attached')")
    site.install("thermal")
    with pytest.raises(
        PluginError, match=r'"broken_one" \(xblip-broken-one 1.0\) failed on import: RuntimeError: no camera'
    ):
        plugins.get("modality", "broken_one")
    state = {plugin.name: plugin.error for plugin in plugins.survey()}
    assert "no camera attached" in state["broken_one"] and state["thermal"] == ""
    assert "thermal" in plugins.names("modality") and "broken_one" not in plugins.names("modality")
    assert plugins.get("modality", "thermal").name == "thermal"


def test_a_plugin_that_exits_on_import_breaks_itself_alone(site):
    site.install("broken_one", "raise SystemExit(3)")
    site.install("thermal")
    state = {plugin.name: plugin.error for plugin in plugins.survey()}
    assert "SystemExit: 3" in state["broken_one"] and state["thermal"] == ""


def test_what_may_load_can_be_restricted(site, monkeypatch):
    site.install("thermal")
    site.install("depth")
    monkeypatch.setenv("XBLIP_PLUGINS", " depth , nothing")
    assert list(plugins.installed()) == ["depth"]
    assert plugins.get("modality", "depth").name == "depth"
    with pytest.raises(PluginError, match=r'No modality is called "thermal".*XBLIP_PLUGINS restricts'):
        plugins.get("modality", "thermal")


def test_an_empty_restriction_disables_all(site, monkeypatch):
    site.install("thermal")
    monkeypatch.setenv("XBLIP_PLUGINS", "")
    assert plugins.installed() == {}
    with pytest.raises(PluginError, match="XBLIP_PLUGINS restricts"):
        plugins.get("modality", "thermal")
    assert plugins.get("bridge", "linear") is LinearBridge


def test_an_unknown_name_suggests_the_nearest_and_what_to_install(site):
    site.install("thermal")
    with pytest.raises(
        PluginError, match=r'No modality is called "termal". Did you mean "thermal"?.*pip install xblip-termal'
    ):
        plugins.get("modality", "termal")
    with pytest.raises(PluginError, match="pip install xblip-point-clouds"):
        plugins.get("modality", "point_clouds")
    with pytest.raises(PluginError, match=r'No bridge is called "qfomer". Did you mean "qformer"'):
        plugins.get("bridge", "qfomer")
    with pytest.raises(PluginError, match=r'No plugin is called "termal". Did you mean "thermal"'):
        plugins.load("termal")


def test_an_unknown_name_is_compared_with_its_own_kind_alone(site, tmp_path):
    site.install("tiny_model", MODEL.format(folder=tmp_path))
    site.install("thermal")
    with pytest.raises(PluginError, match=r'No modality is called "zzz"\. Known: thermal\.'):
        plugins.get("modality", "zzz")
    with pytest.raises(PluginError, match=r'No model is called "zzz"\. Known: tiny_model\.'):
        plugins.get("model", "zzz")
    with pytest.raises(
        PluginError, match=r'No bridge is called "zzz"\. Known: frozen_qformer, linear, .* shared_qformer\.'
    ):
        plugins.get("bridge", "zzz")


def test_asking_for_another_kind_says_what_the_plugin_offers(site, tmp_path):
    site.install("tiny_model", MODEL.format(folder=tmp_path))
    with pytest.raises(PluginError, match='Plugin "tiny_model" offers model tiny_model, but no modality'):
        plugins.get("modality", "tiny_model")
    assert plugins.get("model", "tiny_model") == tmp_path
    assert "tiny_model" in plugins.names("model")


def test_a_plugin_may_offer_a_bridge(site):
    source = (
        "import xblip, torch\n\nclass Curved(xblip.Bridge):\n    name = 'curved'\n"
        "    def forward(self, features, instructions):\n        return []\n\n"
        "@xblip.hookimpl\ndef register_bridges(register):\n    register(Curved)\n"
    )
    site.install("curved", source)
    assert issubclass(plugins.get("bridge", "curved"), Bridge)
    assert {"curved", "linear", "mlp", "qformer"} <= set(plugins.names("bridge"))


def test_a_plugin_may_not_take_the_name_of_a_bridge_that_comes_with_xblip(site, monkeypatch):
    monkeypatch.setenv("XBLIP_PLUGINS", "linear")
    source = (
        "import xblip\n\nclass Mine(xblip.Bridge):\n    name = 'linear'\n    forward = None\n\n"
        "@xblip.hookimpl\ndef register_bridges(register):\n    register(Mine)\n"
    )
    site.install("linear", source)
    assert plugins.get("bridge", "linear") is LinearBridge
    with pytest.raises(PluginError, match='registers the bridge "linear", which xblip already offers'):
        plugins.load("linear")


class TestByHand:
    def test_a_class_behaves_like_an_installed_one(self):
        with registered(Beads):
            assert plugins.get("modality", "beads") is Beads
            mine = next(plugin for plugin in plugins.survey() if plugin.name == "beads")
            assert mine.distribution == "registered by hand" and mine.offers == ["modality beads"]
        with pytest.raises(PluginError, match='No modality is called "beads"'):
            plugins.get("modality", "beads")

    def test_twice_is_the_same_as_once(self):
        with registered(Beads):
            plugins.register(Beads)
            assert plugins.get("modality", "beads") is Beads

    def test_a_cell_that_runs_again_replaces_its_class(self):
        cell = "import xblip\nclass Mine(xblip.testing.ToyModality):\n    name = 'mine'\nxblip.plugins.register(Mine)\n"
        import xblip.testing

        first, second = {"__name__": "__main__"}, {"__name__": "__main__", "xblip": xblip}
        exec(cell, first)
        exec(cell, second)
        assert plugins.get("modality", "mine") is second["Mine"] is not first["Mine"]

    def test_another_class_of_that_name_is_an_error(self):
        class Impostor(ToyModality):
            """Another class."""

            name = "beads"

        with registered(Beads):
            with pytest.raises(PluginError, match=r'"beads" is taken by .*Beads.*unregister'):
                plugins.register(Impostor)
            assert plugins.get("modality", "beads") is Beads

    def test_a_name_that_is_installed_is_an_error(self, site):
        site.install("thermal")

        class Thermal(ToyModality):
            """Another class."""

            name = "thermal"

        with pytest.raises(PluginError, match=r'"thermal" is taken by the installed plugin xblip-thermal 1.0'):
            plugins.register(Thermal)

    def test_a_modality_and_a_bridge_may_share_a_name(self):
        class Linear(ToyModality):
            """A modality called like a bridge."""

            name = "linear"

        with registered(Linear):
            assert plugins.get("modality", "linear") is Linear and plugins.get("bridge", "linear") is LinearBridge
        assert plugins.get("bridge", "linear") is LinearBridge

    def test_bridges_too_but_not_under_a_taken_name(self):
        class Mine(LinearBridge):
            """Another bridge."""

            name = "mine"

        class Taken(LinearBridge):
            """A bridge that takes another's name."""

            name = "mlp"

        with registered(Mine):
            assert plugins.get("bridge", "mine") is Mine
        with pytest.raises(PluginError, match='"mlp", which xblip already offers'):
            plugins.register(Taken)

    @pytest.mark.parametrize("thing", [int, "toy", ToyModality()])
    def test_only_modalities_and_bridges(self, thing):
        with pytest.raises(PluginError, match=r"neither an xblip.Modality nor an xblip.Bridge"):
            plugins.register(thing)

    def test_a_class_without_a_name_is_an_error(self):
        class Nameless(Modality):
            """It forgot its name."""

        with pytest.raises(PluginError, match="without a name: set `name`"):
            plugins.register(Nameless)


def run(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_xblip_loads_no_torch_no_transformers_and_no_plugin(site):
    module = site.install("thermal")
    heavy = ["torch", "transformers", "numpy", module]
    code = f"import sys, xblip; xblip.hookimpl, xblip.MediaError; print([m for m in {heavy!r} if m in sys.modules])"
    assert run(code, PYTHONPATH=str(site.folder)) == "[]\n"


@pytest.mark.slow
def test_public_names_are_found_when_first_used():
    code = (
        "import sys, json, xblip\n"
        "assert 'torch' not in sys.modules\n"
        "names = set(xblip.__all__) - {'plugins', 'hookimpl'}\n"
        "print(json.dumps({name: getattr(xblip, name).__module__ for name in names}))"
    )
    homes = json.loads(run(code))
    assert set(homes) | {"plugins", "hookimpl"} == set(xblip.__all__)
    assert all(home.startswith("xblip.") for home in homes.values())
    assert set(dir(xblip)) == set(xblip.__all__)
    with pytest.raises(AttributeError, match="no attribute 'modallity'"):
        _ = xblip.modallity


def test_a_model_may_have_examples(site, tmp_path):
    site.install("tiny_model", MODEL.format(folder=tmp_path).replace('")\n', '", examples="questions.json")\n'))
    assert plugins.examples("tiny_model") == Path("questions.json")
    assert plugins.get("model", "tiny_model") == tmp_path
    assert plugins.examples(str(tmp_path)) is None, "a folder is no plugin's"
