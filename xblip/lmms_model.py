"""The model of lmms-eval: any model of xblip, asked what a benchmark asks. Needs `pip install xblip[lmms]`.

Answers are given one by one, as they come, and not as a list: lmms-eval's cache (`--use_cache`) stores each that it has
taken, so a run that dies has lost nothing but its last batch. Requests therefore keep their order; a batch is requests
in a row with equal settings.
"""

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from torch import Tensor
from tqdm import tqdm

from xblip.errors import ConfigError, XBlipError, some_of
from xblip.llm import IGNORE
from xblip.lmms import Wanted, media_of, wanted
from xblip.model import load
from xblip.sample import Sample, check_text


class Ranked(tuple):
    """What lmms-eval takes for a choice: (value, whether it is the greedy answer).

    lmms-eval 0.7.3 turns a plain pair into text, as which it can rank nothing, so it goes in a `GenerationResult`, of whose
    text the cache asks `strip()`. It gives nothing, so nothing is stored: a stored pair would come back as that text.
    """

    def strip(self) -> str:
        return ""


class XBlipLmms(lmms):
    """A model of xblip for lmms-eval.

    Attributes:
      model: the model.
      batch_size: requests that are answered together.
      device: of the LLM.
    """

    def __init__(self, model: str = "", batch_size: int | str = 1, device: str | None = None, **llm_options: Any):
        """Loads the model.

        Args:
          model: as for `xblip.load`: an installed bundle's name, a folder, or a hub id.
          batch_size: requests that are answered together.
          device: where the LLM goes; unless given, this process's GPU if there is one.
          llm_options: as for `xblip.load`, such as dtype.

        Raises:
          ConfigError: no model is named, or the batch size is no whole number.
          PluginError, BundleError: there is no such model, or it is damaged.
        """
        super().__init__()
        if not model:
            raise ConfigError(
                "Which model? Name it by --model_args model=NAME: an installed one, a folder or a hub id."
            )
        if not str(batch_size).isdecimal() or not int(batch_size):
            raise ConfigError(
                f"batch_size must be a whole number of at least 1, not {batch_size!r}: it is not found out."
            )
        if device is None and torch.cuda.is_available():
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        if device is not None:
            llm_options.setdefault("device_map", {"": device})
        self.batch_size = int(batch_size)
        self.model = load(model, **llm_options)
        self.device = self.model.device  # lmms-eval asks for it after it has dropped the model

    def generate_until(self, requests: Sequence[Instance]) -> Sequence[GenerationResult] | Iterator[GenerationResult]:
        """Answers requests of (question, settings, doc_to_visual, document, task, split)."""
        return _in_turn(self._answers(requests, [wanted(request.args[1]) for request in requests]), requests)

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> Sequence[list[str]] | Iterator[list[str]]:
        """Answers requests whose next question the task makes of the answers so far: one list of answers each."""
        return _in_turn(self._rounds(requests, [wanted(request.args[1]) for request in requests]), requests)

    def loglikelihood(self, requests: Sequence[Instance]) -> Sequence[GenerationResult] | Iterator[GenerationResult]:
        """Says how likely answers are, end of sequence included, and whether each is the greedy one.

        Of choices, which come as text, it gives the loss (the negated log-likelihood), since lmms-eval takes the choice
        with the lowest value; of an answer that comes as a function of the document, the log-likelihood.

        Raises:
          ConfigError: a task wants choices' likelihoods without their question.
        """
        if any(len(request.args) < 6 for request in requests):
            raise ConfigError(
                "The metric acc_mutual_info takes values as log-likelihoods where acc takes them as losses, so lmms-eval "
                "gives a wrong figure for one of them: leave it out of the task's metric_list."
            )
        return _in_turn(self._likelihoods(requests), requests)

    def _answers(self, requests: Sequence[Instance], wishes: Sequence[Wanted]) -> Iterator[GenerationResult]:
        with self._progress(len(requests)) as bar:
            for wish, pairs in itertools.groupby(zip(requests, wishes, strict=True), key=lambda pair: pair[1]):
                questions = [(request.args[0], *request.args[2:]) for request, _ in pairs]
                for batch in _batches(questions, self.batch_size):
                    samples = [self._sample(*question) for question in batch]
                    with _telling(batch):
                        answers = self.model.generate(samples, **wish.options)
                    for answer in answers:
                        counts = TokenCounts(input_tokens=answer.num_prompt_tokens, output_tokens=answer.num_new_tokens)
                        yield GenerationResult(wish.cut(answer.text), counts)
                        bar.update()

    def _rounds(self, requests: Sequence[Instance], wishes: Sequence[Wanted]) -> Iterator[list[str]]:
        with self._progress(len(requests)) as bar:
            for request, wish in zip(requests, wishes, strict=True):
                question, _, doc_to_visual, doc_to_text, *place = request.args
                said: list[str] = []
                about, ends = None, False
                for number in itertools.count(1):
                    sample = self._sample(question, doc_to_visual, *place)
                    with _telling([place]):
                        (answer,) = self.model.generate([sample], **wish.options)
                    visuals, question, ends, said, about = doc_to_text(
                        self._document(*place),
                        previous_output=[*said, wish.cut(answer.text)],
                        round_idx=number,
                        previous_round_info=about,
                    )
                    if ends:
                        break
                    doc_to_visual = _giving(visuals)
                yield list(said)
                bar.update()

    def _likelihoods(self, requests: Sequence[Instance]) -> Iterator[GenerationResult]:
        by_question = itertools.groupby(requests, key=lambda request: (request.args[0], *request.args[2:]))
        questions = [(question, [request.args[1] for request in group]) for question, group in by_question]
        with self._progress(len(requests)) as bar:
            for batch in _batches(questions, self.batch_size):
                samples = [self._sample(*question) for question, _ in batch]
                with torch.no_grad():
                    prompts = self.model.soft_prompts(samples)
                for sample, soft, (question, targets) in zip(samples, prompts, batch, strict=True):
                    document = self._document(*question[2:])
                    answers = [target if isinstance(target, str) else target(document) for target in targets]
                    with _telling([question]):
                        values = self._score(sample, soft, answers)
                    for target, (value, is_greedy) in zip(targets, values, strict=True):
                        yield GenerationResult(Ranked((-value if isinstance(target, str) else value, is_greedy)))
                        bar.update()

    def _document(self, number: int, task: str, split: str) -> Any:
        return self.task_dict[task][split][number]

    def _sample(self, question: str, doc_to_visual: Callable | None, *place: Any) -> Sample:
        """Reads a request: every visual laid before the question, in their order."""
        visuals = doc_to_visual(self._document(*place)) if doc_to_visual else None
        with _telling([place]):
            return Sample(question, [media_of(visual, self.model.branches) for visual in visuals or []])

    @torch.no_grad()
    def _score(self, sample: Sample, soft: Sequence[Tensor], answers: Sequence[str]) -> list[tuple[float, bool]]:
        """As `XBlip.score`, and whether each answer is what the model would say."""
        for answer in answers:
            check_text(answer, "A choice")
        answers = [answer.strip() for answer in answers]
        llm, router = self.model.llm, self.model.router
        batch = router.assemble([router.pieces(sample)] * len(answers), [soft] * len(answers), answers=answers)
        logits, labels = llm.logits(batch), batch.labels.to(llm.device)
        if not llm.is_encoder_decoder:
            logits, labels = logits[:, :-1], labels[:, 1:]
        mask = labels != IGNORE
        likelihoods, targets = logits[mask].float().log_softmax(-1), labels[mask]
        values = likelihoods.gather(1, targets[:, None])[:, 0]
        is_greedy = likelihoods.argmax(1) == targets
        counts = mask.sum(1).tolist()
        return [
            (value.sum().item(), bool(greedy.all()))
            for value, greedy in zip(values.split(counts), is_greedy.split(counts), strict=True)
        ]

    def _progress(self, total: int) -> tqdm:
        return tqdm(total=total, disable=self.rank != 0, desc="xblip")


def _in_turn(results: Iterator[Any], requests: Sequence[Instance]) -> Any:
    """Lets lmms-eval take many results one by one; of one it takes the first of a list."""
    return list(results) if len(requests) == 1 else results


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _giving(visuals: Any) -> Callable:
    return lambda document: visuals


@contextlib.contextmanager
def _telling(questions: Sequence[Sequence[Any]]) -> Iterator[None]:
    """Says of an error which document it is about; questions end with its number, task and split."""
    try:
        yield
    except XBlipError as error:
        row = getattr(error, "row", None)
        about = questions if row is None else [questions[row]]
        places = some_of([f"{task}, document {number}" for *_, number, task, _ in about], between="; ")
        raise type(error)(f"{places}: {error}") from error
