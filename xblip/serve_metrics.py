"""What the server counts, for Prometheus; and what it writes to its log, a line of JSON for each request."""

import json
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

if TYPE_CHECKING:
    from xblip.decode_pool import DecodePool
    from xblip.engine import Engine
    from xblip.requests import Finished

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
log = logging.getLogger("xblip.serve")


class Metrics:
    """Counters and times of one server."""

    def __init__(self, engine: "Engine", pool: "DecodePool"):
        self.registry = CollectorRegistry()
        common = {"registry": self.registry, "namespace": "xblip"}
        self.requests = Counter("requests", "Requests by path and status.", ["path", "status"], **common)
        self.seconds = Histogram("request_seconds", "From a request to its whole answer.", buckets=SECONDS, **common)
        self.first_token = Histogram("time_to_first_token_seconds", "To the first token.", buckets=SECONDS, **common)
        self.per_token = Histogram("time_per_token_seconds", "Between later tokens.", buckets=SECONDS, **common)
        self.tokens = Counter("tokens", "Tokens of prompts and of answers.", ["of"], **common)
        self.registry.register(_State(engine, pool))

    def told(self, path: str, status: int, *, started: float, id: str, **facts: object) -> None:
        """Counts a request that has ended, and logs it; `started` is by `time.monotonic`."""
        seconds = time.monotonic() - started
        self.requests.labels(path, str(status)).inc()
        self.seconds.observe(seconds)
        line = {"id": id, "path": path, "status": status, "seconds": round(seconds, 4), **facts}
        log.info(json.dumps(line, ensure_ascii=False, default=str))

    def answered(self, path: str, finished: "Sequence[Finished]", *, started: float, id: str) -> None:
        """Counts a request whose answers are whole, and their tokens; a prompt once however many they are."""
        read, said = finished[0].answer.num_prompt_tokens, sum(one.answer.num_new_tokens for one in finished)
        self.tokens.labels("prompts").inc(read)
        self.tokens.labels("answers").inc(said)
        self.told(path, 200, started=started, id=id, prompt_tokens=read, completion_tokens=said)


class Pace:
    """Notes when the answers to one request grow; called by the engine with what it says."""

    def __init__(self, metrics: Metrics, *, started: float):
        """Begins at `started`, by `time.monotonic`."""
        self._metrics, self._started = metrics, started
        self._last: dict[int, float] = {}

    def note(self, choice: int) -> None:
        """A choice has a token more."""
        now = time.monotonic()
        if not self._last:
            self._metrics.first_token.observe(now - self._started)
        elif choice in self._last:
            self._metrics.per_token.observe(now - self._last[choice])
        self._last[choice] = now


class _State:
    """What engine, caches and workers hold at the moment somebody asks."""

    def __init__(self, engine: "Engine", pool: "DecodePool"):
        self.engine, self.pool = engine, pool

    def collect(self) -> Iterator[Metric]:
        state = self.engine.state
        yield GaugeMetricFamily("xblip_queue_length", "Requests that wait.", state["waiting"])
        yield GaugeMetricFamily("xblip_batch_size", "Answers being said.", state["rows"])
        yield GaugeMetricFamily("xblip_batch_positions", "Positions these hold, with padding.", state["positions"])
        engine = CounterMetricFamily("xblip_engine", "What the engine did.", labels=["what"])
        for name, value in self.engine.counts.items():
            engine.add_metric([name], value)
        yield engine
        caches = CounterMetricFamily("xblip_cache", "What caches did.", labels=["cache", "what"])
        held = GaugeMetricFamily("xblip_cache_held", "What caches hold.", labels=["cache", "what"])
        for name, counters in self.engine.model.caches.counters.items():
            for what in ("hits", "misses", "evictions"):
                caches.add_metric([name, what], getattr(counters, what))
            for what in ("entries", "bytes", "budget_bytes"):
                held.add_metric([name, what], getattr(counters, what))
        yield from (caches, held)
        counters = vars(self.pool.counters)
        yield GaugeMetricFamily("xblip_decode_workers", "Workers that live.", counters.pop("alive"))
        decode = CounterMetricFamily("xblip_decode", "What workers did; seconds are of reading.", labels=["what"])
        for name, value in counters.items():
            decode.add_metric([name], value)
        yield decode


class Merged:
    """The metrics of several servers as those of one registry, each labelled with its server's name."""

    def __init__(self, servers: Mapping[str, Iterable[Metric]]):
        """Takes what the registry of each server collected, by the server's name."""
        self.servers = servers

    def collect(self) -> Iterator[Metric]:
        found: dict[str, Metric] = {}
        for name, metrics in self.servers.items():
            for metric in metrics:
                whole = found.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
                whole.samples += [one._replace(labels={**one.labels, "replica": name}) for one in metric.samples]
        yield from found.values()
