"""Sends broken files, and broken requests, to `xblip serve numerals`, from several clients at once.

    python tests/fuzz_server.py --count 2000 --seed 0

Each reply must be 200, or 4xx in OpenAI's form that names the part; none may be later than the limits, the server may not
grow beyond a bound, and nothing of it may be left when it has been told to end.
"""

import argparse
import base64
import copy
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
from fuzz_media import MODALITIES, WEIGHTS, unclear
from fuzz_mutate import KINDS, Step, cases, drawn
from fuzz_seeds import seeds
from hypothesis import strategies as st

LIMIT_SECONDS = 20 + 10
"""For a file to be read, and for the rest."""
MOST_GROWTH_MIB = 128
"""Of the server beside its caches, from when a fifth of the requests were answered."""
QUESTION = {"type": "text", "text": "Which number is it?"}
DEEP, MANY = "@deep@", "@many@"
ODD = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *("", "a", "\ud800", "\x00", "a" * 300_000, "٣", "image_url", "data:,", "file:///etc/passwd", DEEP, MANY),
    *([], {}, [None], [[]], {"": None}, {"url": 1}, [1] * 3000, {"type": "text"}, {"role": "user"}),
)


class Served:
    """A server as users start it; a context manager that tells it to end.

    Attributes:
      url: where it listens.
      ended: its exit status, and how many of its processes were left, once it has been told to end.
    """

    def __init__(self, model: str = "numerals"):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url, self.ended = f"http://127.0.0.1:{port}", None
        code = "from xblip.cli import main; main()"
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the server
        command = [sys.executable, "-c", code, "serve", model, "--port", str(port)]
        self._process = subprocess.Popen(command, stdout=self._log, stderr=self._log)
        self._seen: set[psutil.Process] = set()

    def __enter__(self) -> "Served":
        while True:
            try:
                if httpx.get(f"{self.url}/ready").status_code == 200:
                    return self
            except httpx.TransportError:
                if self._process.poll() is not None:
                    raise RuntimeError(f"The server does not start.\n{self.log()[-3000:]}") from None
                time.sleep(0.2)

    def __exit__(self, *_: object) -> None:
        self.memory()
        self._process.send_signal(signal.SIGTERM)
        status = self._process.wait(90)
        _, left = psutil.wait_procs(self._seen, timeout=5)
        self.ended = (status, len(left))

    def log(self) -> str:
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def lives(self) -> bool:
        return self._process.poll() is None and httpx.get(f"{self.url}/ready", timeout=30).status_code == 200

    def cached(self) -> float:
        """MiB that its caches hold, which have budgets."""
        told = httpx.get(f"{self.url}/metrics", timeout=30).text
        sizes = re.findall(r'^xblip_cache_held{.*what="bytes"} (\S+)', told, re.MULTILINE)
        return sum(map(float, sizes)) / 2**20

    def memory(self) -> tuple[float, float]:
        """Resident MiB of the server, and of its largest worker."""
        own = psutil.Process(self._process.pid)
        workers = own.children(recursive=True)
        self._seen.update(workers)
        sizes = [0]
        for worker in workers:
            try:
                sizes.append(worker.memory_info().rss)
            except psutil.NoSuchProcess:
                continue
        return own.memory_info().rss / 2**20, max(sizes) / 2**20

    def post(self, body: bytes) -> httpx.Response:
        while True:
            headers = {"Content-Type": "application/json"}
            response = httpx.post(f"{self.url}/v1/chat/completions", content=body, headers=headers, timeout=120)
            if response.status_code != 429:
                return response
            time.sleep(0.2)


def file_body(modality: str, content: bytes, ending: str, as_url: bool) -> bytes:
    """A request about a file."""
    data = base64.b64encode(content).decode()
    kind = f"{modality}_url" if as_url else f"input_{modality}"
    value = {"url": f"data:{modality}/{ending[1:]};base64,{data}"} if as_url else {"data": data, "format": ending[1:]}
    return json.dumps(_asking([{"type": kind, kind: value}, QUESTION])).encode()


def bodies(part: dict[str, Any]) -> st.SearchStrategy[bytes]:
    """Requests of which much is right; `part` is a good input."""
    rich = {"temperature": 0.5, "top_p": 0.9, "n": 2, "seed": 3, "stop": ["x"], "logprobs": True, "top_logprobs": 2}
    rich |= {"stream": True, "stream_options": {"include_usage": True}, "response_format": {"type": "text"}}
    rich |= {"metadata": {"a": "b"}, "user": "me", "num_beams": 1, "top_k": 5, "min_p": 0.1, "min_tokens": 1}
    turns = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [part, QUESTION]},
        {"role": "assistant", "content": "seven"},
        {"role": "user", "content": "And twice that?"},
    ]
    plain = _asking([{**part, "uuid": "mine"}, QUESTION])
    whole = [plain, {**plain, **rich}, {**plain, "messages": turns}, {**plain, **rich, "messages": turns}]
    change = st.tuples(
        st.integers(0, 10**6), st.integers(0, len(ODD) - 1), st.sampled_from(["put", "put", "drop", "add"])
    )

    def body(asked: dict, changes: Sequence[tuple[int, int, str]], steps: Sequence[Step], twice: bool) -> bytes:
        asked = json.loads(json.dumps(asked))
        for place, odd, how in changes:
            _change(asked, place, copy.deepcopy(ODD[odd]), how)
        text = json.dumps(asked, ensure_ascii=steps == [])
        text = text.replace('"model":', '"model": 1, "model":') if twice else text
        data = text.encode(errors="surrogatepass")
        data = data.replace(b'"@deep@"', b"[" * 60_000 + b"]" * 60_000)
        data = data.replace(b'"@many@"', b"[" + b",".join([json.dumps(QUESTION).encode()] * 10_000) + b"]")
        for step in steps:
            data = KINDS[step.kind](data, step, {"other": data})
        return data

    chance = st.integers(0, 2**32).map(random.Random)
    step = st.builds(
        Step,
        kind=st.sampled_from([kind for kind in KINDS if kind not in ("mend_png", "inside_zip")]),
        at=chance.map(lambda source: source.random()),
        head=st.sampled_from([0, 60]),
        number=chance.map(lambda source: source.getrandbits(32)),
        other=st.just("other"),
    )
    broken = st.one_of(st.just([]), st.just([]), st.lists(step, min_size=1, max_size=2))
    return st.builds(
        body,
        st.sampled_from(whole),
        st.lists(change, max_size=3),
        broken,
        st.integers(0, 9).map(lambda number: number == 7),
    )


def _asking(content: Any) -> dict[str, Any]:
    return {"model": "numerals", "messages": [{"role": "user", "content": content}], "max_tokens": 3}


def _change(asked: Any, place: int, odd: Any, how: str) -> None:
    """Puts something odd at a place of what JSON holds, or takes away what is there."""
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            places.append((node, key))
            walk(node[key])

    walk(asked)
    if not places:
        return
    node, key = places[place % len(places)]
    if how == "put":
        node[key] = odd
    elif how == "drop":
        del node[key]
    elif isinstance(node, dict):
        node[str(odd)[:20]] = odd
    else:
        node.append(odd)


def fault(response: httpx.Response, body: bytes, modality: str = "") -> str:
    """Says what is wrong with a reply, if anything is."""
    status, text = response.status_code, response.text
    if status == 200:
        return "" if "Traceback" not in text else "a traceback"
    if not 400 <= status < 500:
        return f"status {status}"
    try:
        error = response.json()["error"]
        message = error["message"]
    except (ValueError, KeyError, TypeError):
        return "not in OpenAI's form"
    if set(error) != {"message", "type", "param", "code"} or not isinstance(message, str) or len(message) > 1000:
        return "not in OpenAI's form"
    if "Traceback" in text or tempfile.gettempdir() + "/" in message:
        return "tells of its insides"
    if modality and message.startswith("Cannot read"):
        return unclear(message) or ("" if str(error["param"]).startswith("messages[0].content[0]") else "names no part")
    return ""


def run(
    served: Served, shots: Iterable[tuple[str, bytes]], say: Callable[[str], None] = print, *, clients: int = 6
) -> tuple[Counter, list[tuple[str, str, bytes]]]:
    """Sends all bodies, each with the modality that it is about or ""; returns counts, and what was wrong with which."""
    shots = list(shots)
    counts, wrong, slowest, lock = Counter(), [], [0.0], threading.Lock()
    sizes: list[tuple[float, float, float]] = []

    def send(shot: tuple[str, bytes]) -> None:
        modality, body = shot
        began = time.monotonic()
        try:
            response = served.post(body)
            found = fault(response, body, modality)
            status = str(response.status_code)
        except httpx.HTTPError as error:
            found, status, response = f"{type(error).__name__}: {error}", "none", None
        took = time.monotonic() - began
        found = found or ("late" if took > LIMIT_SECONDS else "")
        with lock:
            counts[status] += 1
            slowest[0] = max(slowest[0], took)
            if found:
                wrong.append((found, response.text[:300] if response is not None else "", body))
            if sum(counts.values()) % max(1, len(shots) // 5) == 0:
                sizes.append((*served.memory(), served.cached()))
                server, worker, cached = map(round, sizes[-1])
                done = f"{sum(counts.values())} of {len(shots)}"
                say(f"  {done}: server {server} MiB, of which caches {cached}; largest worker {worker} MiB")

    began = time.monotonic()
    with ThreadPoolExecutor(clients) as threads:
        list(threads.map(send, shots))
    grown = (sizes[-1][0] - sizes[-1][2]) - (sizes[0][0] - sizes[0][2]) if sizes else 0.0
    if grown > MOST_GROWTH_MIB:
        wrong.append((f"the server grew by {grown:.0f} MiB", "", b""))
    if not served.lives():
        wrong.append(("the server is not ready", "", b""))
    told = ", ".join(f"{count} of status {status}" for status, count in sorted(counts.items()))
    took = f"{time.monotonic() - began:.0f} s, slowest {slowest[0]:.1f} s"
    say(f"{len(shots)} requests in {took}, {grown:+.0f} MiB beside caches: {told}")
    return counts, wrong


def file_shots(modality: str, count: int, seed: int) -> list[tuple[str, bytes]]:
    """Requests about broken files of a modality, half of them by URL and half as base64."""
    with tempfile.TemporaryDirectory() as folder:
        whole = seeds(modality, Path(folder))
    found = drawn(cases(whole, WEIGHTS.get(modality)), count, seed)
    return [
        (modality, file_body(modality, case.content(whole), case.ending, number % 2 == 0))
        for number, case in enumerate(found)
    ]


def body_shots(count: int, seed: int) -> list[tuple[str, bytes]]:
    """Broken requests about a small good picture."""
    with tempfile.TemporaryDirectory() as folder:
        content = seeds("image", Path(folder))["l.png"]
    url = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    part = {"type": "image_url", "image_url": {"url": url}}
    return [("", body) for body in drawn(bodies(part), count, seed)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000, help="files of each modality, and requests")
    parser.add_argument("--seed", type=int, default=0, help="of chance; the same for the same seed")
    parser.add_argument("--only", choices=(*MODALITIES, "requests"), help="one kind of them")
    parser.add_argument("--keep", type=Path, help="a folder for what is found")
    options = parser.parse_args()
    kinds = [options.only] if options.only else [*MODALITIES, "requests"]
    bad = 0
    with Served() as served:
        for kind in kinds:
            shots = (
                body_shots(options.count, options.seed)
                if kind == "requests"
                else file_shots(kind, options.count, options.seed)
            )
            print(f"{kind}:", flush=True)
            _, wrong = run(served, shots, lambda line: print(line, flush=True))
            bad += len(wrong)
            for found, told in Counter((found, told) for found, told, _ in wrong).most_common(12):
                print(f"    {told} {found}", flush=True)
            for number, (found, _, body) in enumerate(wrong if options.keep else []):
                options.keep.mkdir(parents=True, exist_ok=True)
                (options.keep / f"{kind}-{number:03d}-{found[:20].replace(' ', '_')}.json").write_bytes(body)
    print(f"Told to end: exit status {served.ended[0]}, {served.ended[1]} processes left.")
    if "Traceback" in served.log():
        print(served.log()[served.log().index("Traceback") :][:3000])
        bad += 1
    sys.exit(bool(bad or served.ended[1]))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
