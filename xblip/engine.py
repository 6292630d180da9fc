"""The engine: requests of many callers become batches, whose rows come and go between steps.

Three threads: one reads media and makes prompts, so that a film does not hold up answers that are being said; one runs the
LLM; and one tells those who wait too long, whatever the others do. What one request gets does not depend on who else is
asking.
"""

import asyncio
import itertools
import queue
import threading
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from xblip.config import at_least
from xblip.context import make_prompts
from xblip.decoder import Decoder, Job
from xblip.errors import BusyError, ClosedError, InputError, LateError, XBlipError
from xblip.requests import Event, Finished, Request, Said, Ticket, late
from xblip.sampling import Sampler
from xblip.text_stream import TextStream

if TYPE_CHECKING:
    from xblip.model import XBlip


LOOK_SECONDS = 0.25
"""How often it is looked for who waits too long."""


@dataclass
class EngineConfig:
    """What an engine may hold.

    Attributes:
      max_rows: answers that are said at once.
      max_positions: of all rows together, prompts and answers to come, padding and all: they say how much memory the LLM's
        keys and values take.
      max_waiting: requests in the queue; one more is refused at once.
      wait_ms: how long an idle engine waits for further requests after a first one.
    """

    max_rows: int = 32
    max_positions: int = 65_536
    max_waiting: int = 256
    wait_ms: float = 5.0

    def check(self) -> None:
        """Raises `ConfigError` for settings with which nothing would be answered."""
        at_least(self, max_rows=1, max_positions=1, max_waiting=1, wait_ms=0)


class Turns:
    """Waiting jobs, callers taking turns."""

    def __init__(self):
        self._callers: OrderedDict[str, deque[Job]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._callers.values()))

    def add(self, job: Job) -> None:
        self._callers.setdefault(job.ticket.request.caller, deque()).append(job)

    def drop(self, jobs: Collection[Job]) -> None:
        """Lets some leave."""
        for caller, waiting in list(self._callers.items()):
            self._callers[caller] = deque(job for job in waiting if job not in jobs)
            if not self._callers[caller]:
                del self._callers[caller]

    def __iter__(self) -> Iterator[Job]:
        return itertools.chain.from_iterable(self._callers.values())

    def take(self) -> Job:
        """Takes the next caller's oldest job; that caller comes last now."""
        caller, waiting = self._callers.popitem(last=False)
        job = waiting.popleft()
        if waiting:
            self._callers[caller] = waiting
        return job


class Engine:
    """Answers requests of many callers; use it as a context manager, or close it.

    Attributes:
      model: that is asked.
      config: what it may hold.
      counts: since it began: requests submitted, refused, finished, failed, late, cancelled; tokens said; steps taken.
    """

    def __init__(self, model: "XBlip", config: EngineConfig | None = None):
        self.model = model
        self.config = config or EngineConfig()
        self.config.check()
        names = ("submitted", "refused", "finished", "failed", "late", "cancelled", "tokens", "steps")
        self.counts = dict.fromkeys(names, 0)
        self._changed = threading.Condition()
        self._waiting = Turns()
        self._reading: list[Job] = []
        self._ready: deque[Job] = deque()
        self._joining: list[Job] = []
        self._is_closing = self._has_read_all = False
        self._decoder = Decoder(model)
        self._own_options = model.llm.model.generation_config.to_diff_dict()
        self._can_step = model.prefixes.work
        self._threads = [
            threading.Thread(target=_over_and_over, args=[work], name=f"xblip engine {name}", daemon=True)
            for name, work in (("reads", self._read), ("answers", self._answer), ("looks", self._look))
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, request: Request, tell: Callable[[Event], None]) -> Ticket:
        """Puts a request into the queue.

        Args:
          request: what is asked.
          tell: called with every event, in the engine's threads or another who submits: it must not wait. The last is
            `Finished` or an error.

        Raises:
          BusyError: the queue is full, or, as a `ClosedError`, the engine is closing.
          ConfigError: an option is wrong.
          InputError: log-probabilities are asked for where there are none.
        """
        job = self._job(request, lambda event: self._tell(tell, event))
        self._dismiss()
        with self._changed:
            if self._is_closing:
                raise ClosedError("The engine is shutting down: ask again in a while.")
            if self._num_waiting >= self.config.max_waiting:
                self.counts["refused"] += 1
                raise BusyError(f"The queue is full, with {self._num_waiting} requests waiting: ask again in a while.")
            self.counts["submitted"] += 1
            self._waiting.add(job)
            self._changed.notify_all()
        return job.ticket

    def _job(self, request: Request, tell: Callable[[Event], None]) -> Job:
        llm = self.model.llm
        self.model.check_for_one(request.options)
        given = {**self.model.generation, **request.options}
        stop = given.pop("stop_strings", None) or []
        stop = [stop, *request.stop] if isinstance(stop, str) else [*stop, *request.stop]
        options = {name: value for name, value in given.items() if value is not None}
        options.setdefault("num_beams", self._own_options.get("num_beams") or 1)
        every, sampler = {**self._own_options, **options}, None
        if self._can_step and Sampler.knows(every):
            sampler = Sampler(
                every,
                ends=sorted(llm.ends(options)),
                device=llm.device,
                seed=request.seed,
                top_log_probabilities=request.top_log_probabilities or 0,
            )
        elif request.top_log_probabilities is not None:
            raise InputError(
                "Log-probabilities are told of tokens where this engine can say them one by one, which beams and some LLMs "
                "do not let it: leave them out."
            )
        ticket = Ticket(replace(request, sample=None), tell)
        return Job(ticket, request.sample, options, TextStream(llm.tokenizer, stop), sampler)

    def _tell(self, tell: Callable[[Event], None], event: Event) -> None:
        if isinstance(event, Finished):
            self.counts["finished"] += 1
        elif isinstance(event, LateError):
            self.counts["late"] += 1
        elif isinstance(event, XBlipError):
            self.counts["failed"] += 1
        tell(event)

    def stream(self, request: Request) -> Iterator[Said | Finished]:
        """Asks, and gives what is said as it is said; leaving the loop cancels.

        Raises:
          XBlipError: the request failed.
        """
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        ticket = self.submit(request, events.put)
        try:
            while True:
                event = events.get()
                if isinstance(event, XBlipError):
                    raise event
                yield event
                if isinstance(event, Finished):
                    return
        finally:
            ticket.cancel()

    async def astream(self, request: Request) -> AsyncIterator[Said | Finished]:
        """As `stream`, for an event loop, which it does not hold up."""
        events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        ticket = self.submit(request, lambda event: loop.call_soon_threadsafe(events.put_nowait, event))
        try:
            while True:
                event = await events.get()
                if isinstance(event, XBlipError):
                    raise event
                yield event
                if isinstance(event, Finished):
                    return
        finally:
            ticket.cancel()

    def ask(self, request: Request) -> Finished:
        """Asks, and waits for the whole answer; raises as `stream`."""
        *_, last = self.stream(request)
        return last

    @property
    def state(self) -> dict[str, int]:
        """How many requests wait, how many are being answered, and how many positions these hold."""
        with self._changed:
            rows = self._decoder.rows
            held = 0 if rows is None else rows.num_positions
            return {"waiting": self._num_waiting, "rows": len(self._answered), "positions": held}

    @property
    def is_alive(self) -> bool:
        """Whether it goes on answering."""
        return all(thread.is_alive() for thread in self._threads)

    @property
    def _answered(self) -> list[Job]:
        return [*dict.fromkeys([*self._decoder.jobs, *self._joining])]

    @property
    def _unanswered(self) -> list[Job]:
        return [*self._waiting, *self._reading, *self._ready, *self._joining]

    @property
    def _num_waiting(self) -> int:
        return len(self._waiting) + len(self._reading) + len(self._ready)

    def close(self, *, seconds: float = 30.0) -> None:
        """Takes nothing more, and answers what was taken; what is not answered after so many seconds is given up."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        end = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        with self._changed:
            waiting = [self._waiting.take() for _ in range(len(self._waiting))]
            left = [*waiting, *self._reading, *self._ready, *self._answered]
        for job in left:
            job.fail(ClosedError("The engine was shut down before this was answered: ask again in a while."))
            job.ticket.cancel()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _is_wanted(self, job: Job) -> bool:
        """Whether somebody waits for an answer; who waits too long is told so. Not to be called under the lock."""
        if job.is_over:
            return False
        if not job.ticket.is_given_up:
            return True
        if not job.ticket.is_cancelled:
            job.fail(late(job.ticket.request.seconds))
        elif job.end():
            self.counts["cancelled"] += 1
        return False

    def _dismiss(self) -> None:
        """Lets those leave who wait and have left, or wait too long."""
        with self._changed:
            given_up = {job for job in self._unanswered if job.ticket.is_given_up}
            if given_up:
                self._waiting.drop(given_up)
                self._ready = deque(job for job in self._ready if job not in given_up)
                self._changed.notify_all()
        for job in given_up:
            self._is_wanted(job)

    def _look(self) -> bool:
        """Waits for a moment while anybody waits, and lets those leave who wait too long; returns whether to go on."""
        with self._changed:
            self._changed.wait_for(lambda: self._unanswered or self._has_read_all)
            if not self._unanswered:
                return False
            self._changed.wait_for(lambda: not self._unanswered, LOOK_SECONDS)
        self._dismiss()
        return True

    def _read(self) -> bool:
        """Makes prompts of what waits, as a batch; returns whether to go on."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._is_closing or (self._waiting and len(self._ready) < self.config.max_rows)
            )
            if not self._waiting:
                self._has_read_all = True
                self._changed.notify_all()
                return False
            if not self._decoder.jobs and not self._ready and not self._is_closing:
                self._changed.wait_for(lambda: len(self._waiting) >= self.config.max_rows, self.config.wait_ms / 1000)
            count = min(len(self._waiting), self.config.max_rows)
            batch = self._reading = [self._waiting.take() for _ in range(count)]
        wanted = [job for job in batch if self._is_wanted(job)]
        ready = self._made(wanted) if wanted else []
        with self._changed:
            self._reading = []
            self._ready.extend(ready)
            self._changed.notify_all()
        return True

    def _made(self, batch: Sequence[Job]) -> list[Job]:
        """Gives jobs their prompts, together or, where one fails, each alone; returns those that have one."""
        try:
            for job in batch:
                job.sample = self.model.reader.hold(self.model.sample(job.sample))
            samples = self.model.reader.encoded([job.sample for job in batch])
            rooms = [job.options["max_new_tokens"] for job in batch]
            for job, prompt in zip(batch, make_prompts(self.model, samples, rooms), strict=True):
                job.prompt, job.sample = prompt, None
        except Exception as error:
            if len(batch) > 1:
                return [made for job in batch for made in self._made([job])]
            batch[0].fail(error)
            return []
        fits = [job for job in batch if job.positions <= self.config.max_positions]
        for job in batch:
            if job not in fits:
                job.fail(self._too_long(job))
        return fits

    def _too_long(self, job: Job) -> InputError:
        return InputError(
            f"The prompt and its answer take {job.positions} positions, and this engine holds {self.config.max_positions}: "
            "give fewer or shorter inputs, or a smaller max_new_tokens."
        )

    def _answer(self) -> bool:
        """Lets jobs join, and says one token more of each; returns whether to go on."""
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._decoder.jobs or self._has_read_all)
            if not self._ready and not self._decoder.jobs:
                return False
            joining = self._joining = self._admitted()
            self._changed.notify_all()
        try:
            self._decoder.keep([place for place, job in enumerate(self._decoder.jobs) if self._is_wanted(job)])
            self.counts["tokens"] += self._decoder.join([job for job in joining if self._is_wanted(job)])
            if self._decoder.jobs:
                self.counts["tokens"] += self._decoder.step()
                self.counts["steps"] += 1
        except Exception as error:
            for job in [*self._decoder.clear(), *joining]:
                job.fail(error)
        for job in joining:
            if not job.sampler:  # it may have been given up while transformers generated it
                self._is_wanted(job)
        self._joining = []
        return True

    def _admitted(self) -> list[Job]:
        """Takes what is ready and fits, in its order; runs under the lock."""
        joining: list[Job] = []
        held = list(self._decoder.jobs)
        while self._ready and len(held) < self.config.max_rows:
            longest = max(job.positions for job in (*held, self._ready[0]))
            if longest * (len(held) + 1) > self.config.max_positions:
                break
            joining.append(self._ready.popleft())
            held.append(joining[-1])
        return joining


def _over_and_over(work: Callable[[], bool]) -> None:
    while work():
        pass
