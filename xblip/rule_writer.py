"""Questions by rules: a stand-in for captions that come from few words, where no LLM at hand can write.

Rules are data, a YAML that says which words answer which questions, so that the code knows no world; and they only write:
what they have written is checked by an LLM, since rules would always agree with themselves.
"""

import itertools
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from xblip import config as configs
from xblip.errors import ConfigError
from xblip.writer import Contrast, Told, Writer, check_holes


@dataclass
class Rule:
    """What captions of a small, known language tell in one respect.

    Attributes:
      answers: words, one of which a caption holds; a caption with two of them is passed over.
      questions: that are answered by one; they should name none.
      checks: with `{answer}`, answered by yes if it is the caption's.
      contrasts: with `{answer}`, which of two has it.
      modalities: whose captions it is about; all if empty.
    """

    answers: list[str]
    questions: list[str] = field(default_factory=list)
    checks: list[str] = field(default_factory=list)
    contrasts: list[str] = field(default_factory=list)
    modalities: list[str] = field(default_factory=list)


class RuleWriter(Writer):
    """Writes what rules say of the words that stand in a caption; the same whenever a caption comes."""

    def __init__(self, rules: Mapping[str, Rule], *, seed: int = 0):
        self.rules, self.seed = dict(rules), seed
        self._found = {
            name: re.compile(rf"\b({'|'.join(map(re.escape, rule.answers))})\b", re.IGNORECASE)
            for name, rule in self.rules.items()
        }

    @classmethod
    def read(cls, path: str | Path, *, seed: int = 0) -> "RuleWriter":
        """Reads a YAML of rules, by names of their own.

        Raises:
          ConfigError: no such file, or a rule says nothing, or a template lacks `{answer}`.
        """
        given = configs.load_yaml(path)
        if not given:
            raise ConfigError(f"{path} holds no rule: name at least one, with its `answers` and `questions`.")
        rules = {}
        for name, values in given.items():
            rules[name] = rule = configs.build(Rule, values, where=str(name))
            if len(rule.answers) < 2 or not (rule.questions or rule.checks or rule.contrasts):
                raise ConfigError(
                    f"{path}: the rule {name} must have two `answers` at least, and `questions`, `checks` or `contrasts`."
                )
            for form in rule.checks + rule.contrasts:
                check_holes(form, {"answer"}, where=f"{path}: {name}")
        return cls(rules, seed=seed)

    def answers(self, told: Sequence[Told]) -> list[str]:
        return [self._chance(one, "answer").choice(list(self._asked(one).values()) or [""]) for one in told]

    def questions(self, told: Sequence[Told], answers: Sequence[str]) -> list[str]:
        written = []
        for one, answer in zip(told, answers, strict=True):
            rules = [self.rules[name] for name, value in self._asked(one).items() if value == answer]
            written.append(self._chance(one, "question").choice(rules[0].questions) if rules else "")
        return written

    def checks(self, told: Sequence[Told], others: Sequence[Told]) -> list[tuple[str, str]]:
        return [self._check(one) for one in told]

    def _check(self, told: Told) -> tuple[str, str]:
        facts, chance = self._facts(told), self._chance(told, "check")
        names = [name for name in facts if self.rules[name].checks]
        if not names:
            return "", ""
        name = chance.choice(names)
        wrong = chance.choice([answer for answer in self.rules[name].answers if answer != facts[name]])
        form = chance.choice(self.rules[name].checks)
        return form.format(answer=facts[name]), form.format(answer=wrong)

    def contrasts(self, wanted: Sequence[Told], others: Sequence[Told]) -> list[Contrast]:
        return list(itertools.starmap(self._contrast, zip(wanted, others, strict=True)))

    def _contrast(self, wanted: Told, other: Told) -> Contrast:
        own, its = self._facts(wanted), self._facts(other)
        names = [name for name in own if self.rules[name].contrasts and its.get(name, own[name]) != own[name]]
        if not names:
            return Contrast("", "", "")
        chance = self._chance(wanted, "contrast")
        name = chance.choice(names)
        return Contrast(chance.choice(self.rules[name].contrasts).format(answer=own[name]), own[name], its[name])

    def _asked(self, told: Told) -> dict[str, str]:
        """Those facts that there is a question to."""
        return {name: value for name, value in self._facts(told).items() if self.rules[name].questions}

    def _facts(self, told: Told) -> dict[str, str]:
        """What a caption tells, by rule."""
        facts = {}
        for name, rule in self.rules.items():
            if rule.modalities and told.modality not in rule.modalities:
                continue
            found = {word.lower() for word in self._found[name].findall(told.caption)}
            if len(found) == 1:
                facts[name] = found.pop()
        return facts

    def _chance(self, told: Told, what: str) -> random.Random:
        """The same for a caption whenever it comes, and wherever it stands in a batch."""
        return random.Random(f"{self.seed} {what} {told}")
