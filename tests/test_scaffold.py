"""`xblip new`: the plugin it writes is installed and used as its author would, far from this repository."""

import ast
import re
from pathlib import Path

import pytest
from fresh import fresh_shell

from xblip import config as configs
from xblip import plugins
from xblip.bridge import QFormerBridge
from xblip.cli import app
from xblip.errors import ConfigError
from xblip.scaffold import RESERVED, modality_name, write_plugin
from xblip.train_config import load_train_config, training_arguments


@pytest.mark.slow
def test_a_new_plugin_is_installed_found_checked_and_trained(tmp_path):
    shell = fresh_shell(tmp_path)
    shell.succeed("xblip new thermal")
    written = sorted(file.name for file in (shell.folder / "xblip-thermal").iterdir())
    assert written == ["README.md", "pyproject.toml", "test_thermal.py", "xblip_thermal.py"]
    shell.succeed("pip install xblip-thermal/")
    listed = shell.succeed("xblip plugins")
    assert re.search(r"thermal .* xblip-thermal 0\.1\.0 .* modality thermal .* ok", listed), listed
    assert "two instructions give two soft prompts" in shell.succeed("xblip check thermal")
    shell.succeed("cd xblip-thermal && pytest -q")


def test_names_of_several_words_are_spelt_as_each_place_wants_them(tmp_path):
    folder = write_plugin("heat-map", tmp_path / "plugin")
    text = {file.name: file.read_text() for file in folder.iterdir()}
    assert sorted(text) == ["README.md", "pyproject.toml", "test_heat_map.py", "xblip_heat_map.py"]
    assert "class HeatMap(xblip.Modality):" in text["xblip_heat_map.py"]
    assert 'name = "heat_map"' in text["xblip_heat_map.py"]
    assert 'name = "xblip-heat-map"' in text["pyproject.toml"]
    assert 'heat_map = "xblip_heat_map"' in text["pyproject.toml"]
    assert "from xblip_heat_map import HeatMap" in text["test_heat_map.py"]
    assert "xblip check heat_map" in text["README.md"]
    assert "--heat-map 0001.npy" in text["README.md"]
    assert not any("thermal" in content.lower() for content in text.values())


def test_it_is_written_beside_the_reader_by_default(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    app(["new", "heat-map"], standalone_mode=False)
    assert Path("xblip-heat-map", "xblip_heat_map.py").is_file()
    assert "pip install -e xblip-heat-map && xblip check heat_map" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["3d", "Thermal", "heat map", "", "class", "-map", "wärme", "../x"])
def test_a_name_that_is_no_identifier_is_refused(name, tmp_path):
    with pytest.raises(ConfigError, match="expected an identifier in lower case, such as thermal"):
        write_plugin(name, tmp_path / "plugin")
    assert not (tmp_path / "plugin").exists()


@pytest.mark.parametrize("name", RESERVED)
def test_a_name_that_means_something_else_is_refused(name):
    with pytest.raises(ConfigError, match="means something else"):
        modality_name(name)


def test_a_name_that_is_taken_is_refused(tmp_path, monkeypatch):
    taken = plugins.Plugin("thermal", "xblip-thermal 3.1")
    monkeypatch.setattr(plugins, "installed", lambda: {"thermal": [taken]})
    with pytest.raises(ConfigError, match=r"taken by the installed plugin xblip-thermal 3\.1"):
        write_plugin("thermal", tmp_path / "plugin")


def test_nothing_is_overwritten(tmp_path):
    mine = tmp_path / "notes.txt"
    mine.write_text("mine")
    for place in (tmp_path, mine):
        with pytest.raises(ConfigError, match="exists already, and nothing is overwritten"):
            write_plugin("thermal", place)
    assert mine.read_text() == "mine" and list(tmp_path.iterdir()) == [mine]
    with pytest.raises(ConfigError, match=r"Cannot make the folder .* Not a directory"):
        write_plugin("thermal", mine / "plugin")
    (tmp_path / "empty").mkdir()
    assert (write_plugin("thermal", tmp_path / "empty") / "pyproject.toml").is_file()


def test_the_training_config_in_the_readme_is_one(tmp_path):
    readme = (write_plugin("heat-map", tmp_path / "plugin") / "README.md").read_text()
    path = tmp_path / "train.yaml"
    path.write_text(re.search(r"```yaml\n(.*?)```", readme, re.DOTALL)[1])
    config = load_train_config(path)
    assert config.branch.modality == "heat_map"
    assert training_arguments(config).output_dir == "heat-map-branch"
    configs.build(QFormerBridge.Config, config.branch.bridge, where="bridge")


def test_the_module_is_short(tmp_path):
    """Sixty lines of code at most, not counting blank lines and docstrings, so that it is read to its end."""
    source = (write_plugin("thermal", tmp_path / "plugin") / "xblip_thermal.py").read_text()
    assert lines_of_code(source) <= 60


def lines_of_code(source: str) -> int:
    """Counts lines that hold code: no blank ones, no comments, no docstrings."""
    kept = {number for number, line in enumerate(source.splitlines(), 1) if line.strip() and line.strip()[0] != "#"}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            kept -= set(range(node.lineno, node.end_lineno + 1))
    return len(kept)
