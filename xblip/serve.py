"""The server: OpenAI's chat completions over one engine, for files of every modality that the model has.

Bodies are read in pieces and counted, media are fetched and read in threads that wait for workers, and answers come from the
engine's own thread; the event loop itself never waits for any of them.
"""

import asyncio
import contextlib
import logging
import threading
import time
import uuid
from collections.abc import AsyncIterator
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.requests import HTTPConnection
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from xblip import heap, requests
from xblip.decode_pool import DecodePool
from xblip.engine import Engine
from xblip.errors import XBlipError
from xblip.fetch import FetchConfig, Fetcher
from xblip.requests import Event, Finished, Said, Ticket
from xblip.sample import Sample
from xblip.serve_access import caller_of
from xblip.serve_config import MIB, ServeConfig
from xblip.serve_intake import Intake, Visit, shutting_down
from xblip.serve_media import MediaDoor, limited
from xblip.serve_metrics import Metrics, Pace
from xblip.serve_reply import LeftError, Refused, Replies, refusal
from xblip.serve_sample import sample_of
from xblip.serve_schema import ChatRequest, parse, schema_of
from xblip.serve_stream import EventStream

if TYPE_CHECKING:
    from xblip.model import XBlip

COMPLETIONS = "/v1/chat/completions"
TIDY_SECONDS = 2.0
"""How often freed memory is given back, and workers that died of nothing are replaced."""
log = logging.getLogger("xblip.serve")


class Server:
    """One model behind HTTP; `app` is what an ASGI server runs, and its lifespan closes what this opened.

    Attributes:
      model: that answers.
      config: settings.
      name: what clients call the model.
      intake: that takes requests in.
      leaving, exits: what else is to be done when this is told to stop, and when it closes.
    """

    def __init__(self, model: "XBlip", config: ServeConfig, *, name: str):
        """Starts workers and engine.

        Args:
          model: that answers.
          config: settings.
          name: what clients call the model, if `config.model_name` does not say.

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
        fetcher = Fetcher(
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
        self.intake = Intake(config)
        self._last_call: threading.Timer | None = None
        self.app = self._app()

    def leave(self) -> None:
        """Takes nothing more; what was taken goes on for `drain_seconds`, and is told then that it was given up."""
        self.intake.is_leaving = True
        if self._last_call is None:
            self._last_call = threading.Timer(self.config.drain_seconds, self._give_up)
            self._last_call.daemon = True
            self._last_call.start()
        self.leaving.close()

    def _give_up(self) -> None:
        self.intake.has_given_up = True
        self.engine.close(seconds=0)
        self.pool.close()

    def close(self) -> None:
        """Ends the engine, after what it was asked, and the workers."""
        self.leave()
        while not self.is_idle and self._last_call.is_alive():
            time.sleep(0.01)
        self._last_call.cancel()
        self._give_up()
        self.intake.close()
        self.exits.close()

    @property
    def is_idle(self) -> bool:
        """Whether nobody waits for an answer."""
        return not self.intake.count and not any(self.engine.state.values())

    def _app(self) -> FastAPI:
        @contextlib.asynccontextmanager
        async def lifespan(_: FastAPI) -> AsyncIterator[None]:
            tidying = asyncio.create_task(self._tidy())
            yield
            tidying.cancel()
            await asyncio.to_thread(self.close)

        app = FastAPI(
            title="xblip",
            summary=f"Asks {self.name} about files of any kind.",
            lifespan=lifespan,
            docs_url=None,  # pages that load programs from elsewhere
            redoc_url=None,
        )
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
        is_ready = not self.intake.is_leaving and self.is_alive
        return JSONResponse({"ready": is_ready, "workers": self.pool.counters.alive}, 200 if is_ready else 503)

    @property
    def is_alive(self) -> bool:
        """Whether it can answer: the engine and a worker live."""
        return self.engine.is_alive and self.pool.counters.alive > 0

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
        """Returns who asks; raises `Refused` for those who may not."""
        return caller_of(request, self.config.api_keys)

    async def complete(self, request: Request) -> Response:
        """Answers a conversation, plain or streamed as server-sent events."""
        id, started = f"chatcmpl-{uuid.uuid4().hex}", time.monotonic()
        tickets: list[Ticket] = []
        leaving: asyncio.Task | None = None
        told: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        try:
            caller = self.caller(request)
            with self.intake.place(started) as visit:
                body = await self.intake.body(request, visit)
                visit.leaving = leaving = asyncio.create_task(_leaves(request, told))
                asked, size = await asyncio.to_thread(parse, body), len(body)
                body.clear()
                self._check_model(asked.model)
                self._submit(asked, await self._sample(asked, caller, visit), caller, told, tickets, visit)
                asked.messages.clear()
                visit.let_go(size)
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
        except asyncio.CancelledError:  # the client left, as Ray says it, or there is no more time, as uvicorn does
            for ticket in tickets:
                ticket.cancel()
            self.metrics.told(COMPLETIONS, 503 if self.intake.has_given_up else 499, started=started, id=id)
            if self.intake.has_given_up:
                return _refuse(request, shutting_down())
            raise
        finally:
            if leaving:
                leaving.cancel()

    async def _sample(self, asked: ChatRequest, caller: str, visit: Visit) -> Sample:
        """Lets the files of a request in; texts wait for nobody."""
        make = partial(sample_of, asked, self.door, visit, caller=caller, most=self.config.max_parts)
        return await self.intake.read(visit, make) if asked.has_inputs else make()

    def _submit(
        self,
        asked: ChatRequest,
        sample: Sample,
        caller: str,
        told: asyncio.Queue,
        tickets: list[Ticket],
        visit: Visit,
    ) -> None:
        """Asks the engine, `n` times; what it tells goes into a queue, each with its choice."""
        loop, pace = asyncio.get_running_loop(), Pace(self.metrics, started=visit.started)

        def listen(index: int, event: Event) -> None:
            if isinstance(event, Said):
                pace.note(index)
            loop.call_soon_threadsafe(told.put_nowait, (index, event))

        for index in range(asked.n or 1):
            request = requests.Request(
                sample,
                asked.options,
                seed=None if asked.seed is None else (asked.seed + index) % 2**63,
                stop=asked.stops,
                top_log_probabilities=(asked.top_logprobs or 0) if asked.logprobs else None,
                seconds=visit.seconds_left,
                caller=caller,
            )
            tickets.append(self.engine.submit(request, partial(listen, index)))

    async def _tidy(self) -> None:
        while True:
            await asyncio.sleep(TIDY_SECONDS)
            await asyncio.to_thread(heap.give_back)
            try:
                await asyncio.to_thread(self.pool.revive)
            except (XBlipError, OSError) as error:
                log.error("Workers cannot be replaced: %s", error)

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


async def _events(first: tuple[int, Event], told: asyncio.Queue) -> AsyncIterator[tuple[int, Event]]:
    yield first
    while True:
        yield await told.get()


async def _leaves(request: Request, told: asyncio.Queue) -> None:
    """Says so when the client leaves, as the engine says nothing more to one who has."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    told.put_nowait((0, LeftError()))


def _refuse(request: Request, error: Exception) -> Response:
    """Tells a client what is wrong, and never the insides of it."""
    status, body, headers = refusal(error, method=request.method)
    return JSONResponse(body, status, headers=headers)
