"""Fixtures shared by the tests."""

import atexit
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "HF_DATASETS_CACHE" not in os.environ:  # manifests of tests are read into a cache of their own
    os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="xblip-tests-")
    atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)

import pytest
import torch
import yaml
from far import ARCHITECTURES
from kit import Beads, Site, make_model

from xblip import plugins
from xblip.convert_qformer import Wanted
from xblip.llm import FrozenLLM, LLMConfig
from xblip.testing import ToyModality, save_toy_llm

torch.set_num_threads(1)  # tiny models: a second thread costs more than it brings


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


@pytest.fixture
def toys(toy):
    """Both toy modalities, registered by hand for one test."""
    plugins.register(Beads)
    yield
    plugins.unregister("beads")


@pytest.fixture(scope="session")
def llm(llm_folder):
    """The tiny LLM, loaded; tests must not change it."""
    return FrozenLLM.from_pretrained(LLMConfig(source=str(llm_folder), dtype="float32"))


@pytest.fixture
def wanted(llm_folder, toy):
    """What a conversion into a branch of the toy modality is told; the LLM's tokenizer serves as BERT's."""
    return Wanted(llm=str(llm_folder), tokenizer=str(llm_folder))


@pytest.fixture(scope="session")
def model(llm):
    """A model with branches for toys and beads; tests must not change it."""
    return make_model(llm)


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder to install fake distributions into; nothing else that is installed may load."""
    site = Site(tmp_path / "site")
    monkeypatch.syspath_prepend(site.folder)
    monkeypatch.setenv("XBLIP_PLUGINS", "thermal,depth,touch,tiny_model,broken_one,curved")
    yield site
    site.close()


@pytest.fixture
def write(tmp_path):
    """Writes a config of these keys and returns its path."""

    def written(**values) -> Path:
        path = tmp_path / "model.yaml"
        path.write_text(yaml.safe_dump({"architectures": ARCHITECTURES, **values}))
        return path

    return written


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of one mebibyte."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk takes root")
    yield folder
    subprocess.run(["umount", folder], check=True)
