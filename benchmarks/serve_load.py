"""Sixty-four clients at once: `xblip serve numerals` beside the same model behind one-at-a-time `generate`.

    python benchmarks/serve_load.py                          # 64 clients, five minutes for each of four runs
    python benchmarks/serve_load.py --clients 8 --seconds 10 --out build/load

Every client asks, waits for its whole answer, and asks again: the demo's fourteen questions about files of four modalities,
singly and mixed. Files are the same fourteen each time, as when many ask about what is shared; or new each time, told apart
by a few bytes that change no picture or sound, so that each must be read and encoded. Both systems read files in
the same worker processes behind the same checks; one of them then asks the model for one sample after the other, under a
lock, by `generate`, which keeps nothing: it reads and encodes the same files again each time, and the server does so once.
The first fifth of a run warms up and is counted for errors alone.
"""

import argparse
import asyncio
import base64
import json
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

SYSTEMS = {"engine": "xblip serve", "one": "one at a time"}
FILES = {"same": "the same 14 files", "new": "new files each time"}
WARM_UP = 0.2
SHOWN_SECONDS = (0.2, 0.5, 1, 2, 5, 10)
CACHE_MIB = 64
"""Small, so that caches are full before the warm-up ends, and what grows later is something else."""


@dataclass
class Load:
    """What a run gave.

    Attributes:
      statuses: of all replies, 200 or what a refusal had; "error" where there was no reply.
      times: seconds of each answer after the warm-up.
      wrong: answers that are not what `generate` says to the question alone.
      seconds: that were measured, without the warm-up.
      memory: (seconds since the start, MiB resident of the server and its workers), once a second.
    """

    statuses: Counter = field(default_factory=Counter)
    times: list[float] = field(default_factory=list)
    wrong: int = 0
    seconds: float = 0.0
    memory: list[tuple[float, float]] = field(default_factory=list)

    @property
    def held(self) -> tuple[float, float]:
        """MiB after the warm-up and at the end, medians of a tenth of the run each."""
        values = [mib for _, mib in self.memory]
        tenth = max(1, len(values) // 10)
        start = int(len(values) * WARM_UP)
        return float(np.median(values[start : start + tenth])), float(np.median(values[-tenth:]))


def stamped(data: bytes, name: str, number: int) -> bytes:
    """The file with a number in it that no reader heeds; an array of float32 has it in the last bits of eight values."""
    mark = number.to_bytes(8, "little")
    match Path(name).suffix:
        case ".mp4":
            return data + (16).to_bytes(4, "big") + b"free" + mark
        case ".xyz" | ".obj":
            return data + f"# {number}\n".encode()
        case ".npy":
            values = bytearray(data)
            values[-4 * len(mark) :: 4] = mark
            return bytes(values)
        case ".ply":
            return data.replace(b"end_header", f"comment {number}\nend_header".encode(), 1)
    return data + mark


def make_bodies() -> list[tuple[dict[str, Any], list[tuple[str, str, bytes]], str]]:
    """Questions as requests without files, their files (modality, name, content), and what the model says to each."""
    from xblip_numerals.demo import FOLDER

    import xblip

    rows = json.loads((FOLDER / "questions.json").read_text())
    media = [[(name, FOLDER / file) for name, file in row["media"]] for row in rows]
    answers = xblip.load("numerals").generate(
        [xblip.Sample(row["question"], own) for row, own in zip(rows, media, strict=True)], do_sample=False
    )
    return [
        (
            {"type": "text", "text": row["question"]},
            [(name, path.name, path.read_bytes()) for name, path in own],
            answer.text,
        )
        for row, own, answer in zip(rows, media, answers, strict=True)
    ]


def body_of(text: dict[str, Any], files: Sequence[tuple[str, str, bytes]], number: int | None) -> dict[str, Any]:
    """A request; with a number its files are new ones."""
    parts = [
        {
            "type": f"input_{name}",
            f"input_{name}": {
                "data": base64.b64encode(data if number is None else stamped(data, file, number)).decode(),
                "format": Path(file).suffix[1:],
            },
        }
        for name, file, data in files
    ]
    return {"model": "numerals", "temperature": 0, "messages": [{"role": "user", "content": [*parts, text]}]}


async def put_under_load(url: str, pid: int, *, clients: int, seconds: float, files: str) -> Load:
    """Runs clients against a server."""
    load, bodies, started = Load(), make_bodies(), time.perf_counter()
    end, numbers = started + seconds, iter(range(10**9))

    async def client(number: int, http: httpx.AsyncClient) -> None:
        turn = number
        while time.perf_counter() < end:
            text, own, expected = bodies[turn % len(bodies)]
            turn += 1
            body = body_of(text, own, next(numbers) if files == "new" else None)
            asked = time.perf_counter()
            try:
                reply = await http.post(url, json=body)
            except httpx.HTTPError:
                load.statuses["error"] += 1
                continue
            ended = time.perf_counter()
            load.statuses[reply.status_code] += 1
            if reply.status_code == 429:
                await asyncio.sleep(float(reply.headers["retry-after"]))
            elif reply.status_code == 200:
                load.wrong += reply.json()["choices"][0]["message"]["content"] != expected
                if started + WARM_UP * seconds < ended <= end:
                    load.times.append(ended - asked)

    async def watch() -> None:
        server = psutil.Process(pid)
        while time.perf_counter() < end:
            total = 0
            for process in (server, *server.children(recursive=True)):
                try:
                    total += process.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            load.memory.append((time.perf_counter() - started, total / 2**20))
            await asyncio.sleep(1)

    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(timeout=600, limits=limits) as http:
        await asyncio.gather(watch(), *(client(number, http) for number in range(clients)))
    load.seconds = (1 - WARM_UP) * seconds
    return load


def serve(system: str, port: int) -> None:
    """Serves the model by one of the systems; what the processes of this benchmark run."""
    import uvicorn

    import xblip
    from xblip.serve import Server
    from xblip.serve_config import ServeConfig

    model = xblip.load("numerals")
    server = Server(model, ServeConfig(cache_mib=CACHE_MIB), name="numerals")
    app = server.app if system == "engine" else one_at_a_time(server)
    uvicorn.run(app, port=port, log_level="error", access_log=False)


def one_at_a_time(server: Any) -> Any:
    """An application that reads requests and gives memory back as the server does, and asks the model under a lock."""
    from fastapi import FastAPI, Request
    from fastapi.concurrency import run_in_threadpool

    from xblip.serve_intake import Visit
    from xblip.serve_sample import sample_of
    from xblip.serve_schema import parse

    app, lock = FastAPI(lifespan=server.app.router.lifespan_context), threading.Lock()

    @app.get("/ready")
    def ready() -> dict[str, bool]:
        return {"ready": True}

    def answer(body: bytes) -> str:
        asked, visit = parse(body), Visit(server.intake, time.monotonic())
        try:
            sample = sample_of(asked, server.door, visit, caller="", most=64)
            with lock:
                [answer] = server.model.generate([sample], **asked.options)
            return answer.text
        finally:
            visit.end()

    @app.post("/v1/chat/completions")
    async def complete(request: Request) -> dict[str, Any]:
        text = await run_in_threadpool(answer, await request.body())
        return {"choices": [{"message": {"content": text}}]}

    return app


def run(system: str, port: int, **settings: Any) -> Load:
    """Starts a system in a process of its own, puts it under load, and ends it."""
    process = subprocess.Popen([sys.executable, __file__, "--serve", system, "--port", str(port)])
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            try:
                if httpx.get(url + "/ready").status_code == 200:
                    break
            except httpx.HTTPError:
                if process.poll() is not None:
                    raise SystemExit(f"The server ended with status {process.returncode}.") from None
                time.sleep(0.2)
        return asyncio.run(put_under_load(url + "/v1/chat/completions", process.pid, **settings))
    finally:
        process.terminate()
        process.wait(60)


def table(loads: dict[tuple[str, str], Load]) -> str:
    """Markdown."""
    lines = [
        "| files | system | answers/s | speed | p50 | p90 | p99 | replies | wrong | memory after the warm-up |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (system, _), load in loads.items():
        if not load.times:
            raise SystemExit(f"{SYSTEMS[system]} answered nothing: {dict(load.statuses)}. Its log says why.")
    for (system, files), load in loads.items():
        rates = {name: len(loads[name, files].times) / loads[name, files].seconds for name in SYSTEMS}
        p50, p90, p99 = np.quantile(load.times, [0.5, 0.9, 0.99])
        warm, end = load.held
        replies = ", ".join(f"{count} of {status}" for status, count in sorted(load.statuses.items(), key=str))
        lines.append(
            f"| {FILES[files]} | {SYSTEMS[system]} | {rates[system]:.1f} | {rates[system] / rates['one']:.2f}x | "
            f"{p50:.2f} s | {p90:.2f} s | {p99:.2f} s | {replies} | {load.wrong} | "
            f"{end:.0f} MiB, {end / warm - 1:+.1%} |"
        )
    return "\n".join(lines)


def draw(loads: dict[tuple[str, str], Load], file: Path, *, clients: int) -> None:
    """Draws how long answers take, and memory over time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for (system, files), load in loads.items():
        style = {
            "color": {"engine": "#1f6fb5", "one": "#e08a1e"}[system],
            "linestyle": {"same": "--", "new": "-"}[files],
            "label": f"{SYSTEMS[system]}, {FILES[files]}",
        }
        left.plot(np.sort(load.times), np.linspace(0, 1, len(load.times)), **style)
        right.plot(*zip(*load.memory, strict=True), **style)
    left.set(
        xscale="log",
        xticks=SHOWN_SECONDS,
        xticklabels=SHOWN_SECONDS,
        xlabel="seconds to a whole answer",
        ylabel="share of answers",
        ylim=(0, 1),
    )
    left.minorticks_off()
    left.set_title(f"{clients} clients, each asking again when it is answered", fontsize=11, loc="left")
    right.set(xlabel="seconds", ylabel="MiB resident, workers among them", ylim=(0, None))
    right.set_title("Memory", fontsize=11, loc="left")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    right.legend(fontsize=8, frameon=False, loc="lower right")
    figure.savefig(file, dpi=110)


def main(arguments: Sequence[str] | None = None, say: Callable[[str], None] = print) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=300, help="of each run")
    parser.add_argument("--files", nargs="+", choices=[*FILES], default=[*FILES])
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--out", type=Path, help="a folder for the figure, serve_load.png")
    parser.add_argument("--serve", choices=[*SYSTEMS], help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.serve:
        return serve(given.serve, given.port)
    loads = {
        (system, files): run(system, given.port, clients=given.clients, seconds=given.seconds, files=files)
        for files in given.files
        for system in SYSTEMS
    }
    say(f"{given.clients} clients, {given.seconds:g} s for each run\n")
    say(table(loads))
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
        draw(loads, given.out / "serve_load.png", clients=given.clients)


if __name__ == "__main__":
    main(sys.argv[1:])
