"""Instruction templates: those that come with xblip, and what is wrong with others."""

from pathlib import Path

import pytest

from xblip.errors import ConfigError
from xblip.templates import load_templates

SHIPPED = sorted((Path(__file__).parents[1] / "configs" / "templates").glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_those_that_come_with_xblip_are_many_and_different(path):
    templates = load_templates(path)
    for task, least in (("caption", 12), ("question", 10), ("classification", 8)):
        texts = templates.of(task)
        assert len(texts) >= least and len({text.lower().strip(" .?") for text in texts}) == len(texts)
        lengths = [len(text.replace("{question}", "").split()) for text in texts]
        assert max(lengths) >= 2 * min(lengths) + 3, "all are of one length"
    assert templates.of("") == []
    assert templates.question[1].format(question="red?") == "Question: red? Answer:"


def test_each_modality_has_its_own_words():
    assert len(SHIPPED) == 4
    captions = [set(load_templates(path).caption) for path in SHIPPED]
    assert len(set.union(*captions)) >= 0.9 * sum(map(len, captions))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("question: ['what ?']", r'the question template "what \?" must hold {question} once, and no other braces'),
        ("question: ['{question} {question}']", "must hold {question} once"),
        ("question: ['{question} {x}']", "must hold {question} once"),
        ("question: ['{question} {']", "must hold {question} once"),
        ("caption: ['what is {question}']", 'the caption template "what is {question}" must hold words without braces'),
        ("classification: [' ']", "must hold words without braces"),
        ("captoin: [what]", 'Unknown key "templates.captoin". Did you mean "caption"'),
        ("caption: what", "\"templates.caption\" must be a list, not 'what'"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_templates(tmp_path / "a.yaml")
