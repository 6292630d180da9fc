"""The rules of the house, held by tests: layers, public names, no modality named in the core, configs, light imports."""

import ast
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import xblip
from xblip import hookspecs, plugins
from xblip.testing import ToyModality

ROOT = Path(__file__).parents[1]
CORE = sorted((ROOT / "xblip").glob("*.py"))
LAYERS = [
    {"errors", "hookspecs", "gather", "devices", "markdown"},
    {
        "config",
        "caches",
        "fetch_http",
        "generation",
        "loading",
        "media",
        "packing",
        "heat",
        "heap",
        "shared_attention",
        "weights",
    },
    {
        "pictures",
        "checkpoint",
        "frozen",
        "encoder",
        "activations",
        "contents",
        "media_read",
        "likelihood",
        "parts",
        "provenance",
    },
    {"runs", "kv_cache", "intervals", "metrics", "captions", "answers", "charts", "threshold"},
    {"trials"},
    {"modality", "qformer", "llm", "sample", "agreement"},
    {"bridge", "router", "prefixes", "sampling", "text_stream", "forms", "shards", "eval_task", "lmms"},
    {
        "qformer_bridges",
        "tokenwise",
        "retrieval_bridge",
        "sharing",
        "explain_page",
        "pooled",
        "resamplers",
        "initial",
        "records",
        "templates",
        "store",
        "costs",
    },
    {"plugins", "tables", "crossmodal_rows", "crossmodal_score"},
    {"branch", "lavis", "data", "crossmodal_page", "decode_worker", "fetch"},
    {"bundle", "stored", "mixture", "examples", "explain", "reading", "steps", "decode_process"},
    {"answer"},
    {"context", "batches", "requests"},
    {"decoder", "prompt_embeds"},
    {"engine"},
    {"model", "retrieval", "contrast", "encoding", "streaming", "decode_pool"},
    {"serve_config", "serve_schema", "serve_reply", "serve_metrics"},
    {"serve_access", "serve_intake", "serve_stream"},
    {"serve_media"},
    {"serve_sample"},
    {"serve", "serve_ray_proxy"},
    {"serve_talk", "serve_gate", "serve_ray"},
    {"serve_page"},
    {"serve_run"},
    {"export", "lmms_model", "align", "layers", "resume", "meters", "precompute_ray", "writer"},
    {"tasks", "train_config", "precompute", "rule_writer"},
    {"trainer", "train_data", "eval_model", "caption_rows"},
    {"eval_data", "instruct_pairs"},
    {"eval_kinds", "eval_retrieval", "discrn", "crossmodal", "evaluate", "instruct_steps"},
    {"instruct_data", "capfilt_report"},
    {"capfilt"},
    {"train", "compare", "convert_qformer", "convert_transformers"},
    {"convert_retrieval"},
    {"convert", "testing", "scaffold", "blueprint"},
    {"dryrun"},
    {"doctor"},
    {"cli_train", "cli_retrieve", "cli_eval", "cli_serve"},
    {"cli_clean"},
    {"cli"},
]
MODALITIES = {"image", "video", "audio", "point_cloud"}
PUBLIC = [
    "Answer", "Bridge", "BundleError", "ConfigError", "Example", "Features", "InputError", "MediaError", "MediaFile",
    "Modality", "PluginError", "Sample", "TransformersEncoder", "XBlip", "XBlipError", "decoding", "hookimpl", "load",
    "media_file", "plugins",
]  # fmt: skip


def level_of(module: str) -> int:
    return next(index for index, layer in enumerate(LAYERS) if module in layer)


def imported_modules(path: Path) -> set[str]:
    """Modules of the core that a file imports at run time, inside functions too."""
    names: set[str] = set()
    tree = ast.parse(path.read_text())
    for node in tree.body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "xblip":
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("xblip."):
            names.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("xblip.")}
    return {name for name in names if any(name in layer for layer in LAYERS)}


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.stem)
def test_imports_run_strictly_downward(path):
    if path.stem == "__init__":
        return
    own = level_of(path.stem)
    lazily_upward = {"plugins": {"bridge", "modality"}}.get(path.stem, set())
    for name in imported_modules(path) - lazily_upward:
        assert level_of(name) < own, f"{path.stem} imports {name}, which is not below it"


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.stem)
def test_the_core_names_no_modality(path):
    named = [
        node.value for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value in MODALITIES
    ]  # fmt: skip
    assert not named


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.stem)
def test_a_module_says_what_it_is(path):
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_no_file_is_longer_than_400_lines():
    files = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    lengths = {name: len((ROOT / name).read_text().splitlines()) for name in files.split() if (ROOT / name).exists()}
    assert lengths and max(lengths.values()) <= 400, max(lengths, key=lengths.get)


@pytest.mark.slow
def test_each_module_imports_alone():
    """Each in a process of its own, forked from one that has imported what they all need."""
    modules = ["xblip" if path.stem == "__init__" else f"xblip.{path.stem}" for path in CORE]
    if not importlib.util.find_spec("lmms_eval"):
        modules.remove("xblip.lmms_model")
    code = (
        "import importlib, os, sys, torch, transformers\n"
        "for module in sys.argv[1:]:\n"
        "    if os.fork() == 0:\n"
        "        importlib.import_module(module)\n"
        "        os._exit(0)\n"
        "    if os.wait()[1]:\n"
        "        sys.exit(f'{module} does not import alone')\n"
    )
    run = subprocess.run([sys.executable, "-c", code, *modules], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "plugins").glob("*/xblip_*.py")), ids=lambda path: path.stem)
def test_plugins_import_public_names_only(path):
    text = path.read_text()
    assert not re.search(r"^\s*(from|import) xblip\.(?!testing)", text, re.MULTILINE)
    own = path.parent.name
    others = [name for name in re.findall(r"^\s*(?:from|import) xblip_(\w+)", text, re.MULTILINE)]
    allowed = {file.stem.removeprefix("xblip_") for file in path.parent.glob("xblip_*")}
    assert set(others) <= allowed, f"{own} imports another plugin"


def test_public_names():
    assert sorted(xblip.__all__, key=str.lower) == sorted(PUBLIC, key=str.lower)
    assert len(xblip.__all__) <= 20
    for name in xblip.__all__:
        assert getattr(xblip, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Modalty'"):
        _ = xblip.Modalty


def test_hooks_are_documented_with_their_exact_signatures():
    guide = (ROOT / "docs" / "reference.md").read_text()
    for name, hook in inspect.getmembers(hookspecs, inspect.isfunction):
        if name.startswith("register_"):
            signature = f"{name}({', '.join(inspect.signature(hook).parameters)})"
            assert signature in guide, f"docs/reference.md lacks {signature}"
            assert hook.__doc__


def test_importing_xblip_loads_neither_torch_nor_transformers_nor_a_plugin():
    code = (
        "import sys, xblip; "
        "print([m for m in sys.modules if m.split('.')[0] in ('torch', 'transformers') or m.startswith('xblip_')])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


CAPTIONS = {f"captions{kind}": ["a", "b"] for kind in ("", "_pred_image", "_pred_pc", "_pred_audio", "_pred_video")}
"""What DisCRn's published files have of captions."""
YAMLS = sorted((ROOT / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_a_config_introduces_itself(path):
    head = "\n".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    for word in ("# Purpose:", "# Command:", "# Hardware:", "# Override:"):
        assert word in head, f"{path.name} lacks {word}"


@pytest.mark.parametrize("path", sorted((ROOT / "configs/train").glob("*-*.yaml")), ids=lambda path: path.stem)
def test_a_training_config_builds_with_toy_parts(path, llm_folder, tmp_path):
    from xblip.branch import Branch
    from xblip.train_config import load_train_config, training_arguments

    config = load_train_config(path, [f"llm.source={llm_folder}", f"training.output_dir={tmp_path}"])
    modality = plugins.get("modality", config.branch.modality)
    training_arguments(config)
    settings = {**config.branch.config, **modality.example(tmp_path).config}
    config.branch.config = settings
    branch = Branch.build(config.branch, llm_width=32)
    assert branch.bridge.name == config.branch.bridge["kind"]


@pytest.mark.parametrize("path", sorted((ROOT / "configs/eval").glob("*.yaml")), ids=lambda path: path.stem)
def test_an_evaluation_config_builds_with_toy_parts(path, tmp_path):
    from xblip import config as configs
    from xblip.bundle import BundleConfig
    from xblip.evaluate import build_tasks, load_eval_config

    config = load_eval_config(path)
    if not isinstance(config.model, str):
        configs.build(BundleConfig, config.model, where="model")
    item = {"sample_ids": ["a", "b"], "start_seconds": [1, 2], "label": 0, "question": "which ?", **CAPTIONS}
    item |= {"modalities": ["image", "audio"], "sources": ["a.png", "b.wav"]}
    rows = {
        "caption": [{"toy": [1, 2, 3, 4], "captions": ["a toy"]}],
        "qa": [{"toy": [1, 2, 3, 4], "question": "what ?", "answer": "a toy"}],
        "classification": [{"toy": [number] * 4, "label": name} for number, name in enumerate(("one", "two"))],
        "discrn": [item],
    }
    (tmp_path / "names.txt").write_text("one\ntwo\n")
    for name, settings in config.tasks.items():
        settings["data"] = str(tmp_path / f"{name}.jsonl")
        settings |= {"names": str(tmp_path / "names.txt")} if isinstance(settings.get("names"), str) else {}
        Path(settings["data"]).write_text("".join(json.dumps(row) + "\n" for row in rows[settings["kind"]]))
    toys = dict.fromkeys([*MODALITIES, "toy"], ToyModality())
    for task in build_tasks(config).values() if config.tasks else ():
        assert task.rows(toys)
    for name, settings in config.media.items():
        kind = plugins.get("modality", name)
        configs.build(kind.Config, {**kind.example(tmp_path).config, **settings}, where=name)


@pytest.mark.parametrize("path", sorted((ROOT / "configs/model").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_model_config_has_the_schema(path):
    from xblip.bundle import branches_of, read_config

    config, file = read_config(path)
    assert branches_of(config, file) and config.llm.source


def test_no_file_names_a_machine_or_a_registry():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in files:
        file = ROOT / name
        if file.suffix in {".py", ".md", ".toml", ".yaml", ".txt", ".json", ".jsonl"} or file.name in {
            "Makefile",
            "run",
        }:
            text = file.read_text(errors="replace")
            if file != Path(__file__):
                assert not re.search(r"/work/|/tmp/[a-z]|pypi\.org|/root/", text), (
                    f"{name} names a machine or a registry"
                )


def test_tests_do_not_reach_a_hub():
    assert os.environ["HF_HUB_OFFLINE"] == "1"
