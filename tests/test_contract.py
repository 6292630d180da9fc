"""The contract itself: it passes for the toy modality."""

import pytest

from xblip import plugins
from xblip.testing import ModalityContract, ToyModality


@pytest.fixture(scope="class", autouse=True)
def _registered():
    plugins.register(ToyModality)
    yield
    plugins.unregister("toy")


class TestToy(ModalityContract):
    name = "toy"
