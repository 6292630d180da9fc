"""The server: OpenAI's chat completions over one engine, for files of every modality that the model has.

Bodies are read in pieces and counted, media are fetched and read in threads that wait for workers, and answers come from the
engine's own thread; the event loop itself never waits for any of them.
"""

import asyncio
import contextlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.requests import HTTPConnection
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from xblip import heap, requests
from xblip.decode_pool import DecodePool
from xblip.engine import Engine
from xblip.errors import LateError, XBlipError
from xblip.fetch import FetchConfig, Fetcher
from xblip.requests import Event, Finished, Ticket
from xblip.sample import Sample
from xblip.serve_config import MIB, ServeConfig
from xblip.serve_media import MediaDoor, limited
from xblip.serve_metrics import Metrics
from xblip.serve_reply import Refused, Replies, key_in, refusal
from xblip.serve_sample import sample_of
from xblip.serve_schema import ChatRequest, parse, schema_of
from xblip.serve_stream import EventStream

if TYPE_CHECKING:
    from xblip.model import XBlip

COMPLETIONS = "/v1/chat/completions"
TIDY_SECONDS = 2.0
"""How often freed memory is given back."""
OWN_SITE = ("same-origin", "none")
"""What browsers say of a request that no other site has a part in."""
OWN_NAME = re.compile(
    r"(\[[\da-f:.]*\]|\d+(\.\d+){3}|[^.:]*|[^:]*\.(localhost|local|internal))(:\d*)?", flags=re.IGNORECASE
)
"""Of a machine or its network: what nobody can register to let it lead here."""
log = logging.getLogger("xblip.serve")


class Server:
    """One model behind HTTP; `app` is what an ASGI server runs, and its lifespan closes what this opened.

    Attributes:
      model: that answers.
      config: settings.
      name: what clients call the model.
      leaving, exits: what else is to be done when this is told to stop, and when it closes.
    """

    def __init__(self, model: "XBlip", config: ServeConfig, *, name: str, fetcher: Fetcher | None = None):
        """Starts workers and engine.

        Args:
          model: that answers.
          config: settings.
          name: what clients call the model, if `config.model_name` does not say.
          fetcher: in the place of one by the settings.

        Raises:
          ConfigError: a setting is wrong.
        """
        config.check()
        self.model, self.config, self.name = model, config, config.model_name or name
        for cache in vars(model.caches).values():
            cache.budget_bytes = config.cache_mib * MIB
        self.pool = DecodePool(
            limited(model, config.limits),
            workers=config.decode_workers,
            seconds=config.decode_seconds,
            memory_bytes=config.decode_memory_mib * MIB,
        )
        fetcher = fetcher or Fetcher(
            FetchConfig(
                config.allowed_media_domains,
                config.allowed_local_media_path,
                max_part_bytes=config.max_part_bytes,
                seconds=config.fetch_seconds,
            )
        )
        self.door = MediaDoor(model, fetcher=fetcher, pool=self.pool)
        self.engine = Engine(model, config.engine)
        self.metrics = Metrics(self.engine, self.pool)
        self.leaving, self.exits = contextlib.ExitStack(), contextlib.ExitStack()
        self._inside = 0
        self._is_draining = False
        self.app = self._app()

    def leave(self) -> None:
        """Takes nothing more; what was taken goes on."""
        self._is_draining = True
        self.leaving.close()

    def close(self) -> None:
        """Ends the engine, after what it was asked, and the workers."""
        self.leave()
        self.engine.close(seconds=self.config.drain_seconds)
        self.pool.close()
        self.exits.close()

    @property
    def is_idle(self) -> bool:
        """Whether nobody waits for an answer."""
        return not self._inside and not any(self.engine.state.values())

    def _app(self) -> FastAPI:
        @contextlib.asynccontextmanager
        async def lifespan(_: FastAPI) -> AsyncIterator[None]:
            tidying = asyncio.create_task(_tidy())
            yield
            tidying.cancel()
            await asyncio.to_thread(self.close)

        app = FastAPI(title="xblip", summary=f"Asks {self.name} about files of any kind.", lifespan=lifespan)
        schema = schema_of({name: branch.modality.mime_types for name, branch in self.model.branches.items()})
        schema = {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
        app.post(COMPLETIONS, openapi_extra=schema)(self.complete)
        app.get("/v1/models")(self.models)
        app.get("/v1/models/{name:path}")(self.one_model)
        app.get("/health")(self.health)
        app.get("/ready")(self.ready)
        app.get("/metrics")(self.show_metrics)
        for kind in (Refused, XBlipError, 404, 405, Exception):  # Starlette raises the last again, for its log
            app.add_exception_handler(kind, _refuse)
        return app

    async def health(self) -> dict[str, str]:
        """Whether the process lives."""
        return {"status": "ok"}

    async def ready(self) -> Response:
        """Whether it takes requests: workers live, and it is not shutting down."""
        alive = self.pool.counters.alive
        is_ready = not self._is_draining and alive > 0
        return JSONResponse({"ready": is_ready, "workers": alive}, 200 if is_ready else 503)

    async def show_metrics(self, request: Request) -> Response:
        """Counters and times, for Prometheus."""
        self.caller(request)
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def models(self, request: Request) -> dict[str, Any]:
        """The one model that is served."""
        self.caller(request)
        return {"object": "list", "data": [self._model()]}

    async def one_model(self, request: Request, name: str) -> dict[str, Any]:
        """The model, by its name."""
        self.caller(request)
        self._check_model(name)
        return self._model()

    def _model(self) -> dict[str, Any]:
        return {
            "id": self.name,
            "object": "model",
            "created": 0,
            "owned_by": "xblip",
            "modalities": [*self.model.branches],
        }

    def _check_model(self, name: str) -> None:
        if name != self.name:
            message = f'The model "{name:.100}" is not served here, but "{self.name}" is: ask that.'
            raise Refused(404, message, "invalid_request_error", "model_not_found")

    def caller(self, request: HTTPConnection) -> str:
        """Returns who asks, by the key or else the address. A key may also come as the password of a browser's dialog.

        Raises:
          Refused: a key is needed, and there is none or a wrong one; or a browser asks for another site's page.
        """
        if request.scope["method"] == "POST" and request.headers.get("sec-fetch-site", "none") not in OWN_SITE:
            raise Refused(403, "A page of another site sent this: ask at the server's own page, or by a client.")
        host = request.headers.get("host", "")
        if not self.config.api_keys and not OWN_NAME.fullmatch(host):
            message = (
                f'The server is asked as "{host:.80}", a name of others: ask at 127.0.0.1, or start it with an API key.'
            )
            raise Refused(403, message)
        if not self.config.api_keys:
            return request.client.host if request.client else ""
        given = request.headers.get("authorization", "")
        key = key_in(given).encode(errors="replace")
        if not any([hmac.compare_digest(key, known.encode()) for known in self.config.api_keys]):
            what = "is wrong" if given else "is missing"
            message = f"The API key {what}: send one as `Authorization: Bearer KEY`."
            raise Refused(401, message, "invalid_request_error", "invalid_api_key")
        return key.decode()

    async def complete(self, request: Request) -> Response:
        """Answers a conversation, plain or streamed as server-sent events."""
        id, started = f"chatcmpl-{uuid.uuid4().hex}", time.monotonic()
        tickets: list[Ticket] = []
        leaving: asyncio.Task | None = None
        try:
            caller = self.caller(request)
            with self.place():
                asked = parse(await self._body(request))
                self._check_model(asked.model)
                sample = await asyncio.to_thread(sample_of, asked, self.door, caller=caller, most=self.config.max_parts)
                told: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
                leaving = asyncio.create_task(_leaves(request, told))
                self._submit(asked, sample, caller, told, tickets)
                first = await told.get()
            if isinstance(first[1], XBlipError):
                raise first[1]
            replies = Replies(
                id=id,
                model=self.name,
                tokenizer=self.model.llm.tokenizer,
                tells_log_probabilities=bool(asked.logprobs),
            )
            if asked.stream:  # whoever sends it watches for those who leave
                leaving.cancel()
                return EventStream(
                    asked,
                    replies,
                    _events(first, told),
                    tickets,
                    metrics=self.metrics,
                    path=COMPLETIONS,
                    started=started,
                )
            finished = await self._whole(_events(first, told), len(tickets))
            self.metrics.answered(COMPLETIONS, finished, started=started, id=id)
            return JSONResponse(replies.completion(finished), headers={"X-Request-Id": id})
        except Exception as error:
            for ticket in tickets:
                ticket.cancel()
            response = _refuse(request, error)
            response.headers["X-Request-Id"] = id
            status = response.status_code
            self.metrics.told(COMPLETIONS, status, started=started, id=id, error=str(error))
            return response
        except asyncio.CancelledError:  # Ray's way to say that the client left
            for ticket in tickets:
                ticket.cancel()
            self.metrics.told(COMPLETIONS, 499, started=started, id=id)
            raise
        finally:
            if leaving:
                leaving.cancel()

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """One of the places for requests that come in, which a thousand clients would else fill memory by."""
        if self._is_draining:
            raise Refused(503, "The server is shutting down: ask again in a while.", "server_error", "shutting_down")
        if self._inside >= self.config.max_requests:
            message = f"{self.config.max_requests} requests are being taken in already: ask again in a while."
            raise Refused(429, message, "rate_limit_error", "too_many_requests")
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1

    async def _body(self, request: Request) -> bytes:
        most, body = self.config.max_body_bytes, bytearray()
        length = request.headers.get("content-length", "")
        too_large = Refused(
            413, f"The body is larger than the {most} bytes that are allowed: send less.", "invalid_request_error"
        )
        if length.isdecimal() and int(length) > most:
            raise too_large
        async with asyncio.timeout(self.config.request_seconds):
            async for piece in request.stream():
                body += piece
                if len(body) > most:
                    raise too_large
        return bytes(body)

    def _submit(
        self, asked: ChatRequest, sample: Sample, caller: str, told: asyncio.Queue, tickets: list[Ticket]
    ) -> None:
        """Asks the engine, `n` times; what it tells goes into a queue, each with its choice."""
        loop = asyncio.get_running_loop()
        for index in range(asked.n or 1):
            request = requests.Request(
                sample,
                asked.options,
                seed=None if asked.seed is None else (asked.seed + index) % 2**63,
                stop=asked.stops,
                top_log_probabilities=asked.top_logprobs or 0,
                seconds=self.config.request_seconds,
                caller=caller,
            )
            listen = partial(lambda index, event: loop.call_soon_threadsafe(told.put_nowait, (index, event)), index)
            tickets.append(self.engine.submit(request, listen))

    async def _whole(self, events: AsyncIterator[tuple[int, Event]], count: int) -> list[Finished]:
        """Waits for all choices."""
        finished: dict[int, Finished] = {}
        async for index, one in events:
            if isinstance(one, XBlipError):
                raise one
            if isinstance(one, Finished):
                finished[index] = one
            if len(finished) == count:
                break
        return [finished[index] for index in range(count)]


async def _tidy() -> None:
    while True:
        await asyncio.sleep(TIDY_SECONDS)
        await asyncio.to_thread(heap.give_back)


async def _events(first: tuple[int, Event], told: asyncio.Queue) -> AsyncIterator[tuple[int, Event]]:
    yield first
    while True:
        yield await told.get()


async def _leaves(request: Request, told: asyncio.Queue) -> None:
    """Says so when the client leaves, as the engine says nothing more to one who has."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    told.put_nowait((0, LateError("The client left before its answer was whole.")))


def _refuse(request: Request, error: Exception) -> Response:
    """Tells a client what is wrong, and never the insides of it."""
    status, body, headers = refusal(error, method=request.method)
    return JSONResponse(body, status, headers=headers)
