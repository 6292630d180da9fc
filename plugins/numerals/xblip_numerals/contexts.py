"""Training text for the small LLM: described things with several questions about each, packed into rows.

Every question reads its context and itself, never its neighbours, so a context is computed once and each question
sees what it would see alone. This is what makes an hour on one core enough: answers teach, and contexts are most of
the tokens.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerFast

from xblip_numerals.kinds import KINDS
from xblip_numerals.language import DRAWN_FOR, ask, possible_kinds, random_things
from xblip_numerals.phrases import ANSWER_CUE, ATTRIBUTES, MAX_THINGS, MODALITIES, VALUES
from xblip_numerals.things import Thing, describe

ROW_TOKENS = 256
# How often each kind is asked, where it can be: what is learned last is asked for most.
KIND_WEIGHTS = {
    **dict.fromkeys(ATTRIBUTES, 0.4),
    "number": 1.0,
    "check_number": 1.0,
    "check_attribute": 2.0,
    "check_not": 2.5,
    "above": 1.0,
    "below": 1.0,
    "describe": 1.0,
    "caption": 0.7,
    "larger": 2.0,
    "smaller": 2.0,
    "same": 4.0,
    "different": 4.0,
    "sum": 3.0,
    "difference": 3.0,
    "same_attribute": 6.0,
    "different_attribute": 6.0,
    "which_shows": 2.5,
    "which_is": 3.5,
    "which_is_not": 10.0,
    "number_of": 5.0,
    "attribute_of": 5.0,
    "count": 10.0,
    "largest": 3.0,
    "smallest": 3.0,
    "middle": 5.0,
    "same_all": 5.0,
    "which_pair": 6.0,
    "sum_all": 6.0,
}
_OPPOSITES = {
    "same": "different",
    "different": "same",
    "same_attribute": "different_attribute",
    "different_attribute": "same_attribute",
}
FACTS = ("", *VALUES)  # what may decide a question; descriptions are decided by none
ALL_VALUES = sorted({value for values in VALUES.values() for value in values})
NO_VALUE = -100  # what cross_entropy ignores
_VALUE_INDEX = {value: i for i, value in enumerate(ALL_VALUES)}


@dataclass(frozen=True)
class Branch:
    """One question on a context.

    Attributes:
        kind: the kind of question.
        asked: token ids of the question and of the answer cue.
        answer: token ids of the answer and `</s>`.
        fact: index, in `FACTS`, of the one that decides it.
        value: index, among all values, of the one that the question speaks of; `NO_VALUE` if of none.
        about: indices of the things to look at; where the question is what goes with a value, those that have it.
        chosen: indices of the things that the answer is about.
        held: for each thing, the index of its value of the fact that decides the question, if it is asked about.
        having: indices of all things that have the value that the question speaks of, asked about or not.
    """

    kind: str
    asked: list[int]
    answer: list[int]
    fact: int
    value: int
    about: tuple[int, ...]
    chosen: tuple[int, ...]
    held: tuple[int, ...]
    having: tuple[int, ...]


@dataclass(frozen=True)
class Context:
    """Described things and the questions on them.

    Attributes:
        prefix: token ids of `<s>`, then of the cue and the description of each thing.
        owners: for each token of `prefix` after `<s>`, the index of its thing.
        modalities: for each thing, the index of its modality.
        branches: the questions.
    """

    prefix: list[int]
    owners: list[int]
    modalities: list[int]
    branches: list[Branch]

    def __len__(self) -> int:
        return len(self.prefix) + sum(len(branch.asked) + len(branch.answer) - 1 for branch in self.branches)


class Sampler:
    """Endless random contexts.

    Args:
        tokenizer: turns each segment into ids by itself.
        seed: of everything drawn here.
        noisy: now and then drop the final mark of a question or put a stray word in it, as people do.
    """

    def __init__(self, *, tokenizer: PreTrainedTokenizerFast, seed: int, noisy: bool) -> None:
        self.rng = random.Random(seed)
        self._noisy = noisy
        self._encode = tokenizer.backend_tokenizer.encode
        self._bos, self._eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self._words = range(tokenizer.unk_token_id, len(tokenizer))
        self._known: dict[str, list[int]] = {}

    def context(self, *, count: int, kind: str | None = None, questions: int = 1) -> Context:
        """`count` things drawn for one kind of question (any if None), and `questions` questions on them."""
        rng = self.rng
        if kind is None:
            kind = self._pick([kind for kind in KINDS if KINDS[kind].things <= count], 1)[0]
        things, fact = random_things(rng, count, kind)
        kinds = [kind]
        if questions > 1:
            others = [other for other in possible_kinds(things) if other not in DRAWN_FOR]
            if kind in DRAWN_FOR:
                others = [other for other in others if other not in ("larger", "smaller")]
                kinds += [rng.choice((kind, _OPPOSITES.get(kind, kind))) for _ in range(questions // 3)]
            kinds += self._pick(others, questions - len(kinds))
        prefix, owners = [self._bos], []
        for i, thing in enumerate(things):
            ids = self._ids(MODALITIES[thing.modality].cue) + self._ids(describe(thing, rng))
            prefix += ids
            owners += [i] * len(ids)
        modalities = [list(MODALITIES).index(thing.modality) for thing in things]
        branches = []
        for asked in kinds:
            branches.append(self._branch(things, asked, fact if asked in DRAWN_FOR else None))
            context = Context(prefix, owners, modalities, branches)
            if len(context) > ROW_TOKENS:
                branches.pop()
                break
        return Context(prefix, owners, modalities, branches)

    def _pick(self, kinds: list[str], k: int) -> list[str]:
        return self.rng.choices(kinds, [KIND_WEIGHTS[kind] for kind in kinds], k=k)

    def _branch(self, things: Sequence[Thing], kind: str, fact: str | None) -> Branch:
        question = ask(things, self.rng, kind, fact)
        asked = self._ids(question.text)
        if self._noisy:
            asked = self._disturbed(asked)
        held = [things[i].facts.get(question.fact) if i in question.about else None for i in range(len(things))]
        about = question.about
        if question.value and not kind.startswith("check") and kind not in ("above", "below"):
            about = tuple(i for i, value in enumerate(held) if value == question.value)
        return Branch(
            kind,
            asked + self._ids(ANSWER_CUE),
            [*self._ids(question.answer), self._eos],
            FACTS.index(question.fact),
            _VALUE_INDEX.get(question.value, NO_VALUE),
            about,
            question.chosen,
            tuple(_VALUE_INDEX.get(value, NO_VALUE) for value in held),
            tuple(
                i
                for i, thing in enumerate(things)
                if question.value and thing.facts.get(question.fact) == question.value
            ),
        )

    def _ids(self, text: str) -> list[int]:
        if text not in self._known:
            if len(self._known) > 200_000:
                self._known.clear()
            self._known[text] = self._encode(text, add_special_tokens=False).ids
        return self._known[text]

    def _disturbed(self, ids: list[int]) -> list[int]:
        chance = self.rng.random()
        if chance < 0.15:
            return ids[:-1]
        if chance < 0.2:
            at = self.rng.randrange(len(ids))
            return [*ids[:at], self.rng.choice(self._words), *ids[at:]]
        return ids


@dataclass(frozen=True)
class Batch:
    """Contexts packed into rows of `ROW_TOKENS`; tokens are addressed by their index in the flattened rows.

    Attributes:
        ids, positions: (rows, tokens).
        mask: (rows, 1, tokens, tokens), added to attention scores: 0 where a token may look, else -1e9.
        at, targets: which tokens predict a token of an answer, and its id.
        question: for each of them, the index of its question.
        kinds: the kind of each question.
        fact, value: what each question speaks of, as in `Branch`. held: (questions, MAX_THINGS), likewise.
        about, chosen, having: (questions, MAX_THINGS), 1.0 for the things that `Branch` lists; modality: likewise
            (questions, modalities) for the modalities of `about`.
        owned: tokens that describe a thing. owners: (tokens, 3), its index, its modality, and its index among the
            things of that modality.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    at: torch.Tensor
    targets: torch.Tensor
    question: torch.Tensor
    kinds: list[str]
    fact: torch.Tensor
    value: torch.Tensor
    held: torch.Tensor
    about: torch.Tensor
    chosen: torch.Tensor
    having: torch.Tensor
    modality: torch.Tensor
    owned: torch.Tensor
    owners: torch.Tensor


def pack(contexts: Sequence[Context], pad: int) -> Batch:
    """Lay contexts into as few rows as first-fit finds; the mask keeps contexts and questions apart."""
    rows: list[list[Context]] = []
    for context in sorted(contexts, key=len, reverse=True):
        for row in rows:
            if sum(map(len, row)) + len(context) <= ROW_TOKENS:
                row.append(context)
                break
        else:
            rows.append([context])
    shape = (len(rows), ROW_TOKENS)
    ids, positions = torch.full(shape, pad), torch.zeros(shape, dtype=torch.long)
    block, branch_of = torch.full(shape, -1), torch.zeros(shape, dtype=torch.long)
    at, targets, question, kinds, owned, owners = [], [], [], [], [], []
    fact, value, held, about, chosen, having, modality = [], [], [], [], [], [], []
    for r, row in enumerate(rows):
        cursor = 0

        def lay(piece: list[int], first: int, context: int, branch: int, r: int = r) -> int:
            nonlocal cursor
            here = slice(cursor, cursor + len(piece))
            ids[r, here] = torch.tensor(piece)
            positions[r, here] = torch.arange(first, first + len(piece))
            block[r, here], branch_of[r, here] = context, branch
            cursor += len(piece)
            return r * ROW_TOKENS + cursor

        for c, context in enumerate(row):
            end = lay(context.prefix, 0, c, 0)
            owned += range(end - len(context.owners), end)
            nth = [context.modalities[:i].count(m) for i, m in enumerate(context.modalities)]
            owners += [(i, context.modalities[i], nth[i]) for i in context.owners]
            for b, branch in enumerate(context.branches, start=1):
                end = lay(branch.asked + branch.answer[:-1], len(context.prefix), c, b)
                at += range(end - len(branch.answer), end)
                targets += branch.answer
                question += [len(kinds)] * len(branch.answer)
                kinds.append(branch.kind)
                fact.append(branch.fact)
                value.append(branch.value)
                held.append([*branch.held, *[NO_VALUE] * (MAX_THINGS - len(branch.held))])
                about.append(_one_hot(branch.about, MAX_THINGS))
                chosen.append(_one_hot(branch.chosen, MAX_THINGS))
                having.append(_one_hot(branch.having, MAX_THINGS))
                modality.append(_one_hot([context.modalities[i] for i in branch.about], len(MODALITIES)))
    causal = torch.ones(ROW_TOKENS, ROW_TOKENS, dtype=torch.bool).tril()
    seen = (block[:, :, None] == block[:, None, :]) & causal
    seen &= (branch_of[:, None, :] == 0) | (branch_of[:, None, :] == branch_of[:, :, None])
    return Batch(
        ids=ids,
        positions=positions,
        mask=torch.zeros(seen.shape).masked_fill(~seen, -1e9)[:, None],
        at=torch.tensor(at),
        targets=torch.tensor(targets),
        question=torch.tensor(question),
        kinds=kinds,
        fact=torch.tensor(fact),
        value=torch.tensor(value),
        held=torch.tensor(held),
        about=torch.tensor(about),
        chosen=torch.tensor(chosen),
        having=torch.tensor(having),
        modality=torch.tensor(modality),
        owned=torch.tensor(owned),
        owners=torch.tensor(owners),
    )


def _one_hot(indices: Sequence[int], size: int) -> list[float]:
    return [float(i in indices) for i in range(size)]
