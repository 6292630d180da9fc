"""What a server may do, and how much of it: its settings, safe as they are."""

from dataclasses import dataclass, field
from pathlib import Path

from xblip.config import at_least
from xblip.engine import EngineConfig
from xblip.errors import ConfigError

MIB = 2**20
DAY = 86_400


@dataclass
class RayConfig:
    """What replicas on Ray have.

    Attributes:
      replicas: how many; each holds the whole model.
      cpus: of each, which its threads and its workers share.
      gpus: of each; None for one where the model's own config loads it onto an accelerator, else none.
    """

    replicas: int = 1
    cpus: float = 1.0
    gpus: float | None = None


@dataclass
class ServeConfig:
    """Settings of `xblip serve`.

    Attributes:
      host, port: to listen at; a host that others can reach needs `api_keys`.
      model_name: what clients call the model; None for the name it was loaded by.
      api_keys: of which a client must send one; none lets everyone in.
      allowed_media_domains, allowed_local_media_path, max_part_bytes, fetch_seconds: see `xblip.fetch.FetchConfig`.
      max_body_bytes: of a request.
      max_held_bytes: of all requests that are being taken in, their bodies and what is read of their files.
      max_parts: texts and inputs of one message, and inputs of all messages of a request.
      max_requests: that are taken in at once, waiting ones among them; more are refused before their bodies are read.
      request_seconds: that a request may take in all, from its first byte to its whole answer.
      limits: of media, see `xblip.serve_media.limited`.
      decode_workers, decode_seconds, decode_memory_mib: see `xblip.decode_pool.DecodePool`.
      cache_mib: that each of the model's three caches may hold.
      drain_seconds: that running requests have to end when the server is told to stop.
      engine: what the engine may hold.
      ray: what replicas have, with `--engine ray`; all other settings are each replica's.
      ui: also show a page, see `xblip.serve_page`.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    model_name: str | None = None
    api_keys: list[str] = field(default_factory=list)
    allowed_media_domains: list[str] = field(default_factory=list)
    allowed_local_media_path: Path | None = None
    max_part_bytes: int = 64 * MIB
    fetch_seconds: float = 20.0
    max_body_bytes: int = 128 * MIB
    max_held_bytes: int = 1024 * MIB
    max_parts: int = 64
    max_requests: int = 512
    request_seconds: float = 300.0
    limits: dict[str, float] = field(default_factory=dict)
    decode_workers: int = 2
    decode_seconds: float = 20.0
    decode_memory_mib: int = 2048
    cache_mib: int = 1024
    drain_seconds: float = 30.0
    engine: EngineConfig = field(default_factory=EngineConfig)
    ray: RayConfig = field(default_factory=RayConfig)
    ui: bool = False

    def check(self) -> None:
        """Raises `ConfigError` for settings that cannot be, or that would let everyone in unasked."""
        at_least(
            self, port=0, max_part_bytes=1, max_body_bytes=1, max_parts=1, max_requests=1, decode_workers=1, cache_mib=0
        )
        at_least(self, fetch_seconds=0.1, request_seconds=0.1, drain_seconds=0)
        for name in ("fetch_seconds", "request_seconds", "drain_seconds"):
            if getattr(self, name) > DAY:
                raise ConfigError(f"{name} must be at most {DAY}, a day, not {getattr(self, name):g}.")
        self.engine.check()
        at_least(self, max_held_bytes=self.max_body_bytes)
        at_least(self.ray, replicas=1, cpus=0, **({} if self.ray.gpus is None else {"gpus": 0}))
        if self.port > 65_535:
            raise ConfigError(f"port must be at most 65535, not {self.port}.")
        if any(not key or not key.isascii() or not key.isprintable() or " " in key for key in self.api_keys):
            raise ConfigError("An API key must be printable ASCII without spaces, and not empty.")
        if not self.api_keys and self.host not in ("127.0.0.1", "localhost", "::1"):
            raise ConfigError(
                f"The host {self.host} can be reached by others, and there are no API keys: set --api-key (or "
                "XBLIP_API_KEYS), or listen at 127.0.0.1."
            )
