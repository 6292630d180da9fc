"""Measures on this machine what docs/scale.md needs of one: writes docs/scale_measured.json.

python docs/scale_measure.py

All of it on one core, the best of several tries, since a machine has other work too. Media are made, not photographs.
"""

import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from xblip.blueprint import draw, read_plan
from xblip.bridge import QFormerBridge
from xblip.costs import Costs, LLMCost, bridge_cost, step_flops, total
from xblip.llm import IGNORE, FrozenLLM, LLMConfig, PromptBatch
from xblip.modality import Features
from xblip.testing import toy_tokenizer

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "scale_measured.json"
CONFIG = ROOT / "configs" / "model" / "xinstructblip-vicuna-7b.yaml"
ITEM_BYTES = 257 * 1408 * 2
"""Features of one picture in float16."""
NUM_ITEMS = 1500


def best(run: Callable[[], Any], *, tries: int) -> float:
    """Seconds of the quickest try, after one that does not count."""
    run()
    seconds = []
    for _ in range(tries):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def matrix_peak(size: int = 2048) -> float:
    """FLOP/s of the largest product that one core does well, float32."""
    left, right = torch.randn(size, size), torch.randn(size, size)
    return 2 * size**3 / best(lambda: left @ right, tries=10)


def training_step(rows: int = 8, tokens: int = 64, text: int = 12, labels: int = 10) -> tuple[float, float]:
    """FLOPs and seconds of forward and backward of a small frozen LLM behind a small Q-Former, features stored."""
    sizes = {"vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 6}
    llm = FrozenLLM(
        LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=8)), toy_tokenizer(), config=LLMConfig(source="small")
    )
    config = QFormerBridge.Config(instruction_aware=False, hidden_size=256, num_hidden_layers=4, intermediate_size=1024)
    config.num_attention_heads, config.num_query_tokens = 4, 32
    bridge = QFormerBridge(config, encoder_width=512, llm_width=512).train()
    features = Features(torch.randn(rows, tokens, 512), torch.ones(rows, tokens, dtype=torch.bool), [1] * rows)
    words = llm.embed([5] * (text + labels)).expand(rows, -1, -1)
    positions = 32 + text + labels
    ids = torch.full((rows, positions), IGNORE)
    ids[:, -labels:] = 5

    def run() -> None:
        soft = torch.stack(bridge(features, [""] * rows))
        batch = PromptBatch(torch.cat([soft, words], 1), torch.ones(rows, positions, dtype=torch.long), ids)
        bridge.zero_grad()
        llm.token_log_likelihoods(batch)[0].sum().neg().backward()

    costs = Costs(0.0, bridge_cost(bridge, features), LLMCost.of(llm))
    lengths = {"segments": rows, "tokens": tokens, "text": 0, "labels": rows * labels}
    return total(step_flops(costs, positions=[positions] * rows, **lengths)), best(run, tries=8)


def reading(folder: Path) -> dict[str, float]:
    """Bytes per second of items read in random order by memory map, from the disk and from the page cache."""
    path = folder / "features"
    with path.open("wb") as file:
        for _ in range(NUM_ITEMS):
            file.write(os.urandom(ITEM_BYTES))
        file.flush()
        os.fsync(file.fileno())
    order = np.random.default_rng(0).permutation(NUM_ITEMS)

    def read() -> float:
        items = np.memmap(path, dtype=np.uint8, mode="r", shape=(NUM_ITEMS, ITEM_BYTES))
        started = time.perf_counter()
        for index in order:
            np.array(items[index])
        return NUM_ITEMS * ITEM_BYTES / (time.perf_counter() - started)

    cold = []
    for _ in range(3):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        cold.append(read())
    read()
    return {"disk_read_bytes_per_s": max(cold), "cached_read_bytes_per_s": max(read() for _ in range(3))}


def media(folder: Path) -> dict[str, Path]:
    """A file of each modality, of a usual size: a picture, ten seconds of video and of sound, 8192 points."""
    import av
    import soundfile
    from PIL import Image

    rng = np.random.default_rng(0)

    def picture(width: int, height: int) -> Image.Image:
        """Smooth shapes with grain, which compress about as photographs do."""
        coarse = Image.fromarray(rng.integers(0, 255, (height // 40, width // 40, 3), dtype=np.uint8))
        grain = rng.normal(0, 9, (height, width, 1))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
        return Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8))

    files = {"image": folder / "a.jpg", "video": folder / "a.mp4", "audio": folder / "a.wav"}
    picture(640, 480).save(files["image"], quality=85)
    with av.open(str(files["video"]), "w") as container:
        stream = container.add_stream("h264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 480, 360, "yuv420p"
        scene = np.asarray(picture(480, 360))
        for number in range(250):
            frame = av.VideoFrame.from_ndarray(np.roll(scene, 2 * number, 1), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    soundfile.write(files["audio"], rng.normal(0, 0.1, 160000).astype(np.float32), 16000, subtype="PCM_16")
    files["point_cloud"] = folder / "a.npy"
    np.save(files["point_cloud"], rng.normal(0, 1, (8192, 3)).astype(np.float32))
    return files


def main() -> None:
    """Measures everything and writes the file."""
    torch.set_num_threads(1)
    peak = matrix_peak()
    flops, seconds = training_step()
    found = {
        "command": "python docs/scale_measure.py",
        "processor": f"{platform.machine()}, {os.cpu_count()} cores, one of them used",
        "torch": torch.__version__,
        "matrix_product_flop_per_s": peak,
        "training_step_share_of_it": flops / seconds / peak,
    }
    with TemporaryDirectory(dir=ROOT) as name, draw(read_plan(CONFIG)) as blueprint:
        found |= reading(Path(name))
        for modality, path in media(Path(name)).items():
            branch = blueprint.model.branches[modality]
            found[f"{modality}_file_bytes"] = path.stat().st_size
            found[f"{modality}_load_s"] = best(lambda branch=branch, path=path: branch.read(path), tries=10)
    rounded = {name: float(f"{value:.3g}") if isinstance(value, float) else value for name, value in found.items()}
    RESULTS.write_text(json.dumps(rounded, indent=2) + "\n", encoding="utf-8")
    print(RESULTS.read_text())


if __name__ == "__main__":
    main()
