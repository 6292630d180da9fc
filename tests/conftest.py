"""Fixtures shared by the tests."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from xblip import plugins
from xblip.testing import ToyModality, save_toy_llm

torch.set_num_threads(2)


@pytest.fixture(scope="session")
def llm_folder(tmp_path_factory):
    """A tiny random Llama with its tokenizer."""
    return save_toy_llm(tmp_path_factory.mktemp("llm"))


@pytest.fixture
def toy():
    """The toy modality, registered by hand for one test."""
    plugins.register(ToyModality)
    yield ToyModality
    plugins.unregister("toy")
