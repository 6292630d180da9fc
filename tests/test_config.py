"""Configs: bases and overrides of YAML files, and dataclasses that name what is wrong."""

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from xblip.config import build, load_yaml, plain, save_yaml
from xblip.errors import ConfigError


class Colour(Enum):
    red = "red"
    blue = "blue"


@dataclass
class Lens:
    width_mm: int = 35
    coated: bool = False


@dataclass
class Camera:
    name: str
    lens: Lens = field(default_factory=Lens)
    spare: Lens | None = None
    colour: Colour = Colour.red
    folder: Path = Path("shots")
    speeds: list[float] = field(default_factory=list)
    sizes: tuple[int, ...] = (1, 2)
    extra: dict[str, int] = field(default_factory=dict)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


class TestYaml:
    def test_a_base_is_extended_and_overridden(self, tmp_path):
        write(tmp_path / "bases" / "first.yaml", "a: 1\nsub: {x: 1, y: 1}\n")
        write(tmp_path / "bases" / "second.yaml", "base: first.yaml\nsub: {y: 2}\nlist: [1, 2]\n")
        run = write(tmp_path / "run.yaml", "base: bases/second.yaml\nsub: {z: 3}\nlist: [3]\n")
        assert load_yaml(run) == {"a": 1, "sub": {"x": 1, "y": 2, "z": 3}, "list": [3]}

    def test_entries_of_a_mapping_may_be_told_their_own_key(self, tmp_path):
        text = "parts: {left: {size: 1}, right: {size: 2, side: west}, none: folder, same: '${parts.left}'}\n"
        write(tmp_path / "base.yaml", text)
        run = write(tmp_path / "run.yaml", "base: base.yaml\none: ${parts.left}\nparts: {left: {deep: true}}\n")
        loaded = load_yaml(run, ["one.size=3"], named={"parts": "side"})
        assert loaded["one"] == {"size": 3, "side": "left", "deep": True}
        assert loaded["parts"]["left"] == loaded["parts"]["same"] == {"size": 1, "side": "left", "deep": True}
        assert loaded["parts"]["right"]["side"] == "west" and loaded["parts"]["none"] == "folder"
        assert "side" not in load_yaml(run)["one"]

    def test_overrides_come_last_and_are_yaml(self, tmp_path):
        run = write(tmp_path / "run.yaml", "a: 1\nsub: {x: 1}\n")
        overrides = ["sub.x=[1, two]", "new.deep=true", "rate=1e-4", "a=null", "text='a=b'"]
        assert load_yaml(run, overrides) == {
            "a": None,
            "sub": {"x": [1, "two"]},
            "new": {"deep": True},
            "rate": 1e-4,
            "text": "a=b",
        }

    def test_interpolations_are_resolved_after_overrides(self, tmp_path):
        run = write(tmp_path / "run.yaml", "root: here\nfile: ${root}/x\n")
        assert load_yaml(run, ["root=there"])["file"] == "there/x"

    def test_what_omegaconf_reads_is_read(self, tmp_path):
        assert load_yaml(write(tmp_path / "run.yaml", "a: [so, what is this ?]\n")) == {"a": ["so", "what is this ?"]}

    def test_an_empty_file_holds_nothing(self, tmp_path):
        assert load_yaml(write(tmp_path / "run.yaml", "# nothing\n")) == {}

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("a: [1,\n", "is not a valid YAML file"),
            ("a: 1\n a: 2\n", "is not a valid YAML file"),
            ("\t- x", "is not a valid YAML file"),
            ("- 1\n- 2\n", "holds a list or a single value; expected keys"),
            ("base: [a.yaml, b.yaml]\n", "`base` must be the path of one config"),
            ("base: none.yaml\n", 'No config file at ".*none.yaml"'),
            ("base: run.yaml\n", "is its own base"),
            ("toy,caption\na.num,what\n" * 500, "is not a config: it holds a list or a single value"),
            ("a: ${nowhere}\n", r"Cannot use .*run.yaml: a is '\${nowhere}', and there is no such value"),
            ("a: [1, '${oc.env:NO_SUCH}']\n", r"a\[1\] is '\${oc.env:NO_SUCH}', and there is no such value"),
            (
                "a: here\nb: ${a.c}\n",
                r"b is '\${a.c}', and there is no such value. Check the name, and that no override",
            ),
        ],
    )
    def test_a_bad_file_is_named(self, tmp_path, text, message):
        with pytest.raises(ConfigError, match=message) as caught:
            load_yaml(write(tmp_path / "run.yaml", text))
        assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value) and len(str(caught.value)) < 400

    def test_a_file_that_is_not_text_is_named(self, tmp_path):
        (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\x00\x01")
        with pytest.raises(ConfigError, match="is not a valid YAML file"):
            load_yaml(tmp_path / "run.yaml")

    def test_a_circle_of_bases_is_named(self, tmp_path):
        first = write(tmp_path / "a.yaml", "base: b.yaml\n")
        write(tmp_path / "b.yaml", "base: a.yaml\n")
        with pytest.raises(ConfigError, match=r"a.yaml is its own base, by way of .*a.yaml -> .*b.yaml"):
            load_yaml(first)

    @pytest.mark.parametrize("path", ["none.yaml", "."])
    def test_a_missing_file_is_named(self, tmp_path, path):
        with pytest.raises(ConfigError, match="No config file at"):
            load_yaml(tmp_path / path)

    @pytest.mark.parametrize("override", ["max_steps", "=3"])
    def test_a_malformed_override_shows_the_form(self, tmp_path, override):
        with pytest.raises(ConfigError, match=r"Cannot use the override .* expected key.sub=value"):
            load_yaml(write(tmp_path / "run.yaml", "a: 1\n"), [override])

    def test_an_override_that_is_no_yaml_is_refused(self, tmp_path):
        with pytest.raises(ConfigError, match="Cannot use"):
            load_yaml(write(tmp_path / "run.yaml", "a: 1\n"), ["a=[1,"])

    @pytest.mark.parametrize(
        ("below", "override", "value"),
        [
            ("{b: 1}", "a=[1]", [1]),
            ("{b: 1}", "a=[]", []),
            ("{b: 1}", "a=c", "c"),
            ("[1]", "a={b: 1}", {"b": 1}),
            ("[1]", "a.b=1", {"b": 1}),
            ("c", "a=[{b: 1}]", [{"b": 1}]),
            ("'${other}'", "a=[1]", [1]),
        ],
    )
    def test_a_value_of_another_kind_takes_the_place(self, tmp_path, below, override, value):
        base = write(tmp_path / "base.yaml", f"deep: {{a: {below}, z: 2}}\nother: {{x: 1}}\n")
        assert load_yaml(base, [f"deep.{override}"])["deep"] == {"a": value, "z": 2}
        key, _, given = override.partition("=")
        nested = f"{{{key.replace('.', ': {')}: {given}{'}' * key.count('.')}}}"
        run = write(tmp_path / "run.yaml", f"base: base.yaml\ndeep: {nested}\n")
        assert load_yaml(run)["deep"] == {"a": value, "z": 2}


class TestBuild:
    def test_values_become_an_instance_with_defaults(self):
        camera = build(Camera, {"name": "x", "lens": {"width_mm": 50}, "colour": "blue", "sizes": [3]}, where="camera")
        assert isinstance(camera, Camera) and isinstance(camera.lens, Lens)
        assert (camera.lens.width_mm, camera.lens.coated, camera.colour) == (50, False, Colour.blue)
        assert (camera.folder, tuple(camera.sizes)) == (Path("shots"), (3,))

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"name": "x", "lense": {}}, 'Unknown key "camera.lense". Did you mean "lens"?'),
            ({"name": "x", "lens": {"widht_mm": 3}}, 'Unknown key "camera.lens.widht_mm". Did you mean "width_mm"?'),
            ({"name": "x", "spare": {"widht_mm": 3}}, 'Unknown key "camera.spare.widht_mm". Did you mean "width_mm"?'),
            ({"name": "x", 3: 4}, 'Unknown key "camera.3"'),
            ({"name": "x", "lens": {"width_mm": "wide"}}, '"camera": .*wide.*lens.width_mm'),
            ({"name": "x", "lens": {"coated": "perhaps"}}, '"camera": .*perhaps.*lens.coated'),
            ({"name": "x", "lens": [1]}, r'"camera.lens" must hold keys with values, not \[1\]'),
            ({"name": "x", "lens": None}, '"camera.lens" is null: give it a value, or leave it out'),
            ({"name": "x", "spare": "wide"}, "\"camera.spare\" must hold keys with values, not 'wide'"),
            ({"name": ["x"]}, r'"camera.name" must be a single value, not'),
            ({"name": "x", "speeds": "fast"}, "\"camera.speeds\" must be a list, not 'fast'"),
            ({"name": "x", "speeds": [[1.0]]}, r'"camera.speeds\[0\]" must be a single value'),
            ({"name": "x", "y" * 9000: 1}, f'Unknown key "camera.{"y" * 80}"'),
            ({"name": "x", "speeds": ["fast"]}, '"camera": .*fast.*speeds'),
            ({"name": "x", "extra": {"a": "b"}}, '"camera": .*b.*extra.a'),
            ({"name": "x", "colour": "green"}, '"camera": .*green.*expected one of .*red, blue'),
            ({"name": None}, '"camera.name" is null'),
            ({}, '"camera" lacks its "name": add it'),
            ({"name": "x", "extra": [1]}, r'"camera.extra" must hold keys with values, not \[1\]'),
            ({"name": "x", "sizes": {"a": 1}}, r'"camera.sizes" must be a list, not {'),
            ([1, 2], r'"camera" must hold keys with values, not \[1, 2\]'),
            ("words", "\"camera\" must hold keys with values, not 'words'"),
        ],
    )
    def test_what_is_wrong_is_named(self, values, message):
        with pytest.raises(ConfigError, match=message) as caught:
            build(Camera, values, where="camera")
        assert "\n" not in str(caught.value) and "object_type" not in str(caught.value)

    def test_nothing_given_means_defaults(self):
        assert build(Lens, None, where="lens") == Lens()


def test_a_config_comes_back_from_a_file(tmp_path):
    camera = Camera("x", Lens(50), None, Colour.blue, Path("a/b"), [1.5], (4, 5), {"k": 1})
    save_yaml(tmp_path / "camera.yaml", plain(camera))
    assert build(Camera, load_yaml(tmp_path / "camera.yaml"), where="camera") == camera
    assert OmegaConf.load(tmp_path / "camera.yaml").folder == "a/b"
    assert "!!" not in (tmp_path / "camera.yaml").read_text()
