"""What an engine's LLM is saying: jobs that join, say a token in each step, and leave when they have ended."""

import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from xblip.answer import Answer
from xblip.errors import XBlipError
from xblip.packing import POSITIONS_PER_STEP, groups_of_like_length
from xblip.prefixes import Prompt, lay_out
from xblip.requests import Event, Finished, Said, Ticket
from xblip.sample import Sample
from xblip.sampling import Drawn, Sampler
from xblip.steps import Rows, Stepper
from xblip.text_stream import TextStream

if TYPE_CHECKING:
    from xblip.model import XBlip

log = logging.getLogger("xblip")


@dataclass(eq=False)
class Job:
    """A request on its way.

    Attributes:
      ticket: whose it is.
      sample: what is asked, until its prompt is made; what is open is held from the first attempt on.
      options: transformers' generation options, the model's own among them.
      text: said so far.
      sampler: draws its tokens; None if transformers generates the answer in one go.
      prompt: once its media are read.
      drawn: tokens so far.
      is_over: the last event was told.
    """

    ticket: Ticket
    sample: Sample | Mapping[str, Any] | None
    options: dict[str, Any]
    text: TextStream
    sampler: Sampler | None
    prompt: Prompt | None = None
    drawn: list[Drawn] = field(default_factory=list)
    is_over: bool = False
    _ending: threading.Lock = field(default_factory=threading.Lock)

    @property
    def positions(self) -> int:
        """Of prompt and answer, once for each beam."""
        return (len(self.prompt.units) + self.options["max_new_tokens"]) * self.options["num_beams"]

    def end(self) -> bool:
        """Nothing more is told; returns whether that is new."""
        with self._ending:
            was_over, self.is_over = self.is_over, True
        return not was_over

    def tell(self, event: Event) -> None:
        """Tells whoever asked; one who cannot be told is no longer waited for."""
        if self.is_over if isinstance(event, Said) else not self.end():
            return
        try:
            self.ticket.tell(event)
        except Exception:
            log.exception("a request's listener failed; the request is given up")
            self.ticket.cancel()

    def fail(self, error: Exception) -> None:
        """Tells of an error; one that is no user's goes to the log, and is told without its insides."""
        if not isinstance(error, XBlipError):
            log.error("a request failed", exc_info=error)
            error = XBlipError(
                "The model failed at this request; the server's log says why. Ask again, or something else."
            )
        self.tell(error)


class Decoder:
    """Says answers; for one thread.

    Attributes:
      model: that says them.
      jobs: whose answers are being said, in the order of `rows`.
      rows: what the LLM has read of them; None if there are no jobs.
    """

    def __init__(self, model: "XBlip"):
        self.model = model
        self.jobs: list[Job] = []
        self.rows: Rows | None = None
        self._stepper = Stepper(model.llm)

    def join(self, jobs: Sequence[Job]) -> int:
        """Reads the prompts of jobs, and says the first token of each, or all where transformers does; returns how many.

        What fails there fails alone: those whose answers are being said go on.
        """
        count = 0
        for group in [*self._groups([job for job in jobs if job.sampler]), *([job] for job in jobs if not job.sampler)]:
            try:
                count += self._begin(group) if group[0].sampler else self._say_whole(group[0])
            except Exception as error:
                for job in group:
                    job.fail(error)
        return count

    def _begin(self, group: Sequence[Job]) -> int:
        first = group[0].prompt
        past = self.model.prefixes.read(first, first.stable) if first.stable else None
        rows, logits = self._stepper.read([job.prompt for job in group], past)
        staying = self._say(group, logits)
        if staying:
            rows = rows if len(staying) == len(group) else self._stepper.keep(rows, staying)
            self.rows = rows if self.rows is None else self._stepper.join([self.rows, rows])
            self.jobs += [group[place] for place in staying]
        return len(group)

    def _groups(self, jobs: Sequence[Job]) -> list[list[Job]]:
        """Those whose prompts begin alike with what will be asked about again, then those of like length."""
        alike: dict[bytes, list[Job]] = {}
        for job in jobs:
            alike.setdefault(job.prompt.units[: job.prompt.stable].tobytes(), []).append(job)
        step = POSITIONS_PER_STEP.get(self.model.device.type, POSITIONS_PER_STEP["cuda"])
        return [
            [same[index] for index in group]
            for same in alike.values()
            for group in groups_of_like_length([len(job.prompt.units) for job in same], step)
        ]

    def step(self) -> int:
        """Says one token more of each answer; returns how many."""
        count = len(self.jobs)
        self.rows, logits = self._stepper.step(self.rows, [job.sampler.ids[-1] for job in self.jobs])
        self.keep(self._say(self.jobs, logits))
        return count

    def keep(self, places: Sequence[int]) -> None:
        """Lets all jobs but those at these places leave."""
        if len(places) < len(self.jobs):
            self.rows = self._stepper.keep(self.rows, places) if places else None
            self.jobs = [self.jobs[place] for place in places]

    def clear(self) -> list[Job]:
        """Lets all jobs leave, and returns them."""
        jobs, self.jobs, self.rows = self.jobs, [], None
        return jobs

    def _say(self, jobs: Sequence[Job], logits: Tensor) -> list[int]:
        """Draws and tells a token of each job; returns the places of those that go on."""
        for job, own in zip(jobs, logits, strict=True):
            try:
                self._draw(job, own)
            except Exception as error:
                job.fail(error)
        return [place for place, job in enumerate(jobs) if not job.is_over]

    def _draw(self, job: Job, logits: Tensor) -> None:
        drawn = job.sampler.draw(logits)
        ended = job.sampler.has_ended
        if not ended:
            job.drawn.append(drawn)
        ids = [said.token for said in job.drawn]
        is_full = len(ids) >= job.options["max_new_tokens"]
        text = job.text.add(ids, is_last=ended or is_full)
        if text or not ended:
            job.tell(Said(text, [] if ended else [drawn]))
        if ended or is_full or job.text.has_stopped:
            reason = "stop" if ended or job.text.has_stopped else "length"
            job.tell(Finished(Answer(job.text.text, len(job.prompt.units), len(ids), tuple(ids)), reason, job.drawn))

    def _say_whole(self, job: Job) -> int:
        """Lets transformers generate an answer in one go: beams, and options that no sampler here knows."""
        llm, seed = self.model.llm, job.ticket.request.seed
        leaves = [*job.options.get("stopping_criteria", []), lambda *_, **__: job.ticket.is_given_up]
        batch = lay_out([job.prompt], None, right=llm.is_encoder_decoder)
        with torch.random.fork_rng(enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            [ids] = llm.generate(batch, **{**job.options, "stopping_criteria": leaves})
        if job.ticket.is_given_up:
            return 0
        job.tell(Said(job.text.add(ids, is_last=True), []))
        is_full = len(ids) >= job.options["max_new_tokens"] and not job.text.has_stopped
        answer = Answer(job.text.text, len(job.prompt.units), len(ids), tuple(ids))
        job.tell(Finished(answer, "length" if is_full else "stop", []))
        return len(ids)
