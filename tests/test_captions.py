"""CIDEr-D, BLEU and ROUGE-L give what the COCO toolkit gives.

`golden/captions.json` holds captions of our own, and what pycocoevalcap 1.2 made of them with its PTB tokeniser, which
takes Java; its CIDEr-D, BLEU and ROUGE-L, which take none, are run beside ours in lmms-eval's environment, which has it.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from xblip.captions import bleu, bleu_counts, caption_words, cider_d, rouge_l

GOLDEN = json.loads((Path(__file__).parent / "golden" / "captions.json").read_text())
ROWS = GOLDEN["rows"]
ANSWERS, REFERENCES = [row["answer"] for row in ROWS], [row["references"] for row in ROWS]


def bleus(answers, references):
    means = np.mean([bleu_counts(answer, texts) for answer, texts in zip(answers, references, strict=True)], axis=0)
    return [float(bleu(means, size)) for size in (1, 2, 3, 4)]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["answer"][:20] or "empty")
def test_words_are_those_of_the_ptb_tokeniser(row):
    assert " ".join(caption_words(row["answer"])) == row["words"]
    assert [" ".join(caption_words(text)) for text in row["references"]] == row["reference_words"]


def test_every_row_s_cider_d_and_rouge_l_are_the_toolkit_s():
    assert cider_d(ANSWERS, REFERENCES) == pytest.approx([row["cider_d"] for row in ROWS], abs=1e-9)
    ours = [rouge_l(row["answer"], row["references"]) for row in ROWS]
    assert ours == pytest.approx([row["rouge_l"] for row in ROWS], abs=1e-9)


def test_bleu_is_the_toolkit_s():
    assert bleus(ANSWERS, REFERENCES) == pytest.approx(GOLDEN["bleu"], abs=1e-7)


@pytest.mark.lmms
def test_beside_the_toolkit():
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    chance = np.random.default_rng(0)
    words = "a the dog cat runs sleeps on grass sofa red blue two".split()
    draw = lambda: " ".join(chance.choice(words, chance.integers(1, 12)))  # noqa: E731
    answers = [draw() for _ in range(60)]
    references = [[draw() for _ in range(chance.integers(1, 6))] for _ in range(60)]
    given, made = dict(enumerate(references)), {index: [text] for index, text in enumerate(answers)}
    assert cider_d(answers, references) == pytest.approx(Cider().compute_score(given, made)[1], abs=1e-9)
    assert bleus(answers, references) == pytest.approx(Bleu(4).compute_score(given, made, verbose=0)[0], abs=1e-5)
    ours = [rouge_l(answer, texts) for answer, texts in zip(answers, references, strict=True)]
    assert ours == pytest.approx(Rouge().compute_score(given, made)[1], abs=1e-9)


def test_a_caption_that_is_a_reference_is_best():
    texts = [["a red dog runs home", "the dog"], ["two cats sleep here now"], ["a boat on a lake"]]
    best = cider_d([refs[0] for refs in texts], texts)
    worse = cider_d(["a red dog", "two cats sleep there now", "a boat on the lake"], texts)
    assert (best > worse).all() and best[1] == pytest.approx(10)
    assert rouge_l("two cats sleep here now", texts[1]) == 1.0


def test_a_caption_without_words_scores_nothing():
    assert cider_d(["", "..."], [["a dog runs"], ["a cat sleeps"]]).tolist() == [0.0, 0.0]
    assert rouge_l("", ["a dog"]) == rouge_l("a dog", ["?"]) == 0.0
    assert bleus([""], [["a dog"]]) == pytest.approx([0.0] * 4, abs=1e-6)
