"""Scores of answers, in plain Python: VQA's normalisation and soft score, and names in an answer.

The normalisation follows VQA's own script; of contractions it knows those that are written without an apostrophe.
"""

import re
from collections.abc import Mapping, Sequence

ARTICLES = {"a", "an", "the"}
NUMBERS = {
    word: str(number) for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
}
NUMBERS["none"] = "0"
"""Those that VQA's evaluation writes as digits."""

PUNCTUATION = set(';/[]"{}()=+\\_-><@`,?!')
"""What VQA's evaluation takes out of answers, beside full stops."""
NEGATED = "ai are ca could did do does had has have is might must need ought sha should was were wo would".split()
CONTRACTIONS = {
    **{f"{verb}nt": f"{verb}n't" for verb in NEGATED},
    **{f"{verb}ve": f"{verb}'ve" for verb in "could i might must should they we would you".split()},
    **{
        f"{word}s": f"{word}'s" for word in "he how let she somebody someone that there what when where who why".split()
    },
    **{f"{word}d": f"{word}'d" for word in "how it that there they what where who why you".split()},
    **{f"{word}ll": f"{word}'ll" for word in "how it that they what who you".split()},
    **{f"{word}re": f"{word}'re" for word in "they what you".split()},
    "im": "i'm",
    "maam": "ma'am",
    "oclock": "o'clock",
    "yall": "y'all",
}
"""Words that stand for contractions when they are written without an apostrophe."""


def normalise_answer(text: str) -> str:
    """Returns an answer as VQA's evaluation compares it: no punctuation, articles or capitals, numbers as digits."""
    text = " ".join(text.split())
    thousands = re.search(r"\d,\d", text) is not None
    for mark in PUNCTUATION & set(text):
        beside_space = f"{mark} " in text or f" {mark}" in text
        text = text.replace(mark, "" if beside_space or thousands else " ")
    text = re.sub(r"\.(?!\d)", "", text)
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_score(answer: str, given: Mapping[str, int]) -> float:
    """Scores an answer by how many people gave it: min(n / 3, 1) among all but one of them, over all who may be left out.

    Args:
      answer: the model's.
      given: how many people gave each answer.

    Returns:
      From 0 to 1; where ten people answered, 0.3, 0.6, 0.9 and 1 for one, two, three and four who agree.
    """
    answer = normalise_answer(answer)
    people = sum(given.values())
    same = sum(count for text, count in given.items() if normalise_answer(text) == answer)
    one_less, all_there = min((same - 1) / 3, 1), min(same / 3, 1)
    return (same * one_less + (people - same) * all_there) / people if same else 0.0


def named_in(answer: str, names: Sequence[str]) -> list[str]:
    """Returns the names that stand in an answer as whole words, both normalised; of one inside another the longer."""
    text = f" {normalise_answer(answer)} "
    found = []
    for name in sorted(names, key=lambda name: -len(normalise_answer(name))):
        wanted = f" {normalise_answer(name)} "
        if wanted.strip() and wanted in text:
            found.append(name)
            text = text.replace(wanted, "  ")
    return [name for name in names if name in found]
