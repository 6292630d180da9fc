"""Fixtures shared by the tests."""

import atexit
import gc
import json
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
from kit import Beads, FileToy, Site, make_branch, make_model, registered

from xblip import plugins
from xblip.branch import BranchConfig
from xblip.convert_qformer import Wanted
from xblip.engine import Engine
from xblip.llm import FrozenLLM, LLMConfig
from xblip.model import XBlip
from xblip.testing import ToyModality, save_toy_llm, small_qformer, toy_tokenizer

torch.set_num_threads(1)  # tiny models: a second thread costs more than it brings


@pytest.fixture(scope="session")
def llm_folder(tmp_path_factory):
    """A tiny random Llama with its tokenizer."""
    return save_toy_llm(tmp_path_factory.mktemp("llm"))


@pytest.fixture(scope="session")
def t5_folder(tmp_path_factory):
    """A tiny random T5 with its tokenizer."""
    from transformers import T5Config, T5ForConditionalGeneration

    tokenizer = toy_tokenizer()
    config = T5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0,
        pad_token_id=0, eos_token_id=2, decoder_start_token_id=0,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("t5")
    for part in (T5ForConditionalGeneration(config), tokenizer):
        part.save_pretrained(folder)
    return folder


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
def engine(model):
    """An engine over the model, or over a test's own one of that name."""
    with Engine(model) as engine:
        yield engine


@pytest.fixture(scope="session")
def bundle(model, tmp_path_factory):
    """That model, saved; tests must not change it."""
    folder = tmp_path_factory.mktemp("bundle")
    model.save_pretrained(folder)
    return folder


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
def no_file_left(tmp_path, monkeypatch):
    """A folder for temporary files, which has to be empty when the test ends."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    yield
    assert not list(folder.iterdir())


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of one mebibyte, which `mount -o remount,size=...` makes another size."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk takes root")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.fixture
def manifest(tmp_path):
    """Rows of four numbers; the answer tells whether the first is positive."""
    generator = torch.Generator().manual_seed(0)
    with (tmp_path / "train.jsonl").open("w") as file:
        for _ in range(64):
            values = torch.randn(4, generator=generator)
            row = {"toy": values.tolist(), "instruction": "what is this ?", "answer": "yes" if values[0] > 0 else "no"}
            file.write(json.dumps(row) + "\n")
    return tmp_path / "train.jsonl"


@pytest.fixture(scope="session")
def quick_garbage():
    """Lets each run's collection of garbage pass over what stays for ever, which takes longer than a tiny run."""
    import xblip.train  # noqa: F401 - with all that it imports

    gc.collect()
    gc.freeze()


@pytest.fixture
def config(tmp_path, manifest, llm_folder, toy, quick_garbage):
    """Trains a branch for toys on them, a second or two."""
    from xblip.train_config import DataConfig, TrainConfig

    return TrainConfig(
        llm=LLMConfig(source=str(llm_folder), dtype="float32"),
        branch=BranchConfig("toy", bridge=small_qformer(llm_folder)),
        data=DataConfig(train=str(manifest), eval=str(manifest), eval_answers=64),
        training={
            "output_dir": str(tmp_path / "run"),
            "max_steps": 60,
            "per_device_train_batch_size": 16,
            "learning_rate": 5e-3,
            "save_steps": 30,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
        },
        generation={"max_new_tokens": 2},
    )


@pytest.fixture
def files(config, manifest):
    """The manifest's rows as files, four rows a file; and a config that trains on them."""
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    for number in range(0, len(rows), 4):
        values = rows[number].pop("toy")
        (manifest.parent / f"{number}.txt").write_text(" ".join(map(str, values)))
        for row in rows[number : number + 4]:
            row.pop("toy", None)
            row["file_toy"], row["answer"] = f"{number}.txt", rows[number]["answer"]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config.branch.modality = "file_toy"
    config.training["max_steps"] = 12
    with registered(FileToy):
        yield config


@pytest.fixture(scope="module")
def rows_model(llm, tmp_path_factory):
    """A model with two modalities that are installed, so that workers find them; see `served.SOURCE`."""
    from served import SOURCE

    site = Site(tmp_path_factory.mktemp("site"))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(site.folder)
        patch.setenv("XBLIP_PLUGINS", "rows,lines")
        site.install("rows", SOURCE)
        site.install("lines", SOURCE.replace("register(Rows)", "register(Lines)"))
        branches = {}
        for seed, name in enumerate(("rows", "lines")):
            branches[name] = make_branch(plugins.get("modality", name), llm, seed=seed)
        yield XBlip(llm=llm, branches=branches, generation={"max_new_tokens": 8}).eval()
    site.close()


@pytest.fixture(scope="module")
def served(rows_model):
    """A server of `rows_model` with small limits."""
    from served import running

    with running(rows_model, decode_seconds=1.0, max_parts=8, max_part_bytes=2_000, max_body_bytes=100_000) as found:
        yield found


@pytest.fixture(scope="module")
def client(served):
    """The official client of that server."""
    import openai

    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
