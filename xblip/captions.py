"""Metrics of captions: CIDEr-D, BLEU and ROUGE-L, as the COCO toolkit computes them, in plain Python without Java.

Words are told apart as by the PTB tokeniser that the toolkit calls, as far as English captions show a difference:
lower-case, punctuation dropped, "n't" and "'s" words of their own. METEOR and SPICE need Java, and are not offered.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

LONGEST = 4
"""Words of the longest n-grams, for CIDEr-D and BLEU."""
CIDER_SIGMA = 6.0
ROUGE_BETA = 1.2
TINY, SMALL = 1e-15, 1e-9
"""What the toolkit adds to BLEU's counts above and below, so that none is 0 / 0."""

QUOTES = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": " ", "—": " ", "…": " "})
SPLIT = [
    (re.compile(r"(?<=\w)(?=n't\b)"), " "),
    (re.compile(r"(?<=\w)(?='(?:s|m|d|re|ve|ll)\b)"), " "),
    (re.compile(r"\b(can)(not)\b|\b(gon|wan)(na)\b|\b(got)(ta)\b|\b(gim|lem)(me)\b"), r"\1\3\5\7 \2\4\6\8"),
]
"""Where the tokeniser makes two words of one."""
WORD = re.compile(
    r"(?:[a-z]\.){2,}|\d+(?:[.,:/]\d+)*\w*(?:-\w+)*|'(?:s|m|d|re|ve|ll)\b|n't\b|\w+(?:[-&'/.]\w+)*|[$%&#@*+=/°£€]|[()\[\]{}]"
)
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
"""What the toolkit has in their place, and means to drop, but looks for in capitals: it counts as words there, so here."""


def caption_words(text: str) -> list[str]:
    """Returns the words of a caption, as metrics compare them."""
    text = text.translate(QUOTES).lower()
    for where, parts in SPLIT:
        text = where.sub(parts, text)
    return [BRACKETS.get(word, word) for word in WORD.findall(text)]


def _ngrams(words: Sequence[str]) -> list[Counter[tuple[str, ...]]]:
    """Counts n-grams, a counter for each of 1 to `LONGEST`."""
    return [Counter(zip(*(words[start:] for start in range(size)), strict=False)) for size in range(1, LONGEST + 1)]


def cider_d(answers: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """Scores captions by CIDEr-D; how rare n-grams are is told by the references of all rows.

    Args:
      answers: n captions.
      references: for each, at least one.

    Returns:
      (n,), from 0 to 10; the figure is their mean.
    """
    counted = [[_ngrams(caption_words(text)) for text in texts] for texts in references]
    rarity: Counter[tuple[str, ...]] = Counter()
    for texts in counted:
        rarity.update({ngram for sizes in texts for size in sizes for ngram in size})
    log_rows = math.log(len(counted))

    def weighed(sizes: list[Counter]) -> tuple[list[dict[tuple[str, ...], float]], list[float], int]:
        """Weights of n-grams, their norms, and the length that is compared: the number of word pairs."""
        vectors = [
            {ngram: count * (log_rows - math.log(max(1, rarity[ngram]))) for ngram, count in size.items()}
            for size in sizes
        ]
        norms = [math.sqrt(sum(weight**2 for weight in vector.values())) for vector in vectors]
        return vectors, norms, sizes[1].total()

    scores = []
    for answer, texts in zip(answers, counted, strict=True):
        vectors, norms, length = weighed(_ngrams(caption_words(answer)))
        total = 0.0
        for sizes in texts:
            others, other_norms, other_length = weighed(sizes)
            penalty = math.exp(-((length - other_length) ** 2) / (2 * CIDER_SIGMA**2))
            for own, norm, other, other_norm in zip(vectors, norms, others, other_norms, strict=True):
                common = sum(
                    min(weight, other[ngram]) * other[ngram] for ngram, weight in own.items() if ngram in other
                )
                if norm and other_norm:
                    common /= norm * other_norm
                total += common * penalty
        scores.append(10 * total / (LONGEST * len(texts)))
    return np.array(scores)


def bleu_counts(answer: str, references: Sequence[str]) -> list[float]:
    """Counts what BLEU is made of: n-grams found in a reference for 1 to 4, n-grams there are, words, and those of the
    reference that is nearest in length.
    """
    words, others = caption_words(answer), [caption_words(text) for text in references]
    found = []
    allowed = [_ngrams(other) for other in others]
    for size, counts in enumerate(_ngrams(words)):
        found.append(sum(min(count, max(sizes[size][ngram] for sizes in allowed)) for ngram, count in counts.items()))
    there = [max(0, len(words) - size) for size in range(LONGEST)]
    nearest = min((abs(len(other) - len(words)), len(other)) for other in others)[1]
    return [*found, *there, len(words), nearest]


def bleu(means: np.ndarray, size: int) -> np.ndarray:
    """Makes BLEU of n-grams up to that size of means (..., 10) of `bleu_counts` over rows."""
    precisions = (means[..., :size] + TINY) / (means[..., LONGEST : LONGEST + size] + SMALL)
    ratio = (means[..., -2] + TINY) / (means[..., -1] + SMALL)
    brevity = np.where(ratio < 1, np.exp(1 - 1 / np.maximum(ratio, TINY)), 1.0)
    return np.exp(np.log(precisions).mean(-1)) * brevity


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """Scores a caption by the longest sequence of words that it shares with a reference, from 0 to 1."""
    words, others = caption_words(answer), [caption_words(text) for text in references]
    shared = [_longest_common(words, other) for other in others]
    precision = max(shared) / max(1, len(words))
    recall = max(common / max(1, len(other)) for common, other in zip(shared, others, strict=True))
    if not precision or not recall:
        return 0.0
    return (1 + ROUGE_BETA**2) * precision * recall / (recall + ROUGE_BETA**2 * precision)


def _longest_common(left: Sequence[str], right: Sequence[str]) -> int:
    row = [0] * (len(right) + 1)
    for word in left:
        above = row
        row = [0]
        for place, other in enumerate(right):
            row.append(above[place] + 1 if word == other else max(row[place], above[place + 1]))
    return row[-1]
