"""The end of a message about an unknown name."""

import pytest

import xblip
from xblip.errors import nearest, suggest


def test_the_nearest_name_and_all_known_ones():
    assert suggest("imag", ["video", "image"]) == ' Did you mean "image"? Known: image, video.'


def test_very_many_names_are_left_out():
    known = [f"option_{index}" for index in range(40)]
    assert suggest("optoin_7", known) == ' Did you mean "option_7"?'
    assert suggest("zebra", known) == ""


def test_nothing_near_nothing_suggested():
    assert nearest("zebra", ["video", "image"]) is None
    assert suggest("zebra", ["video", "image"]) == " Known: image, video."
    assert suggest("zebra", []) == " Known: none."


@pytest.mark.parametrize("name", ["ConfigError", "MediaError", "PluginError", "BundleError", "InputError"])
def test_one_family(name):
    assert issubclass(getattr(xblip, name), xblip.XBlipError)


def test_a_message_is_one_line():
    assert str(xblip.ConfigError("wrong:\n  this\n  and  that")) == "wrong: this and  that"
