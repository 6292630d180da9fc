"""Which of several inputs an answer means: "the second one", "(b)", "not the first", "the left option".

An answer counts only if it means one input and no other. A word counts only where it can mean an input: "one" is no
number in "the second one", "a" no letter in "a dog", "right" no side in "the right answer".
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

ORDINALS = (("first", "1st"), ("second", "2nd"), ("third", "3rd"), ("fourth", "4th"))
SIDES = ("left", "right")
PAIRED = ("former", "latter")
NUMBERS = ("one", "two", "three", "four")
LETTERS = "abcd"

THING = r"(?:input|option|object|entity|item|scene|choice|clip|recording|sample|side|hand|one)s?"
"""What an input is called whatever it is."""
SAYS = r"(?:is|was|are|has|does|sounds|seems|appears|and|or|than|over|on|because|rather|not)"
"""What goes on after an input's letter or number, where another word makes it an article or a count: "option a dog"."""
LABELLED = r"(?:input|option|object|entity|item|scene|choice|number|answer)"
"""What a letter or number stands behind: "option b", "answer: 2"."""
BEFORE = re.compile(
    r"\b(?:not(?! only)|never|nor|neither|\w+n't|cannot|without|except|unlike|than|over|rather than|instead of|opposed to|"
    r"compared (?:to|with)|versus|vs)\b(?P<between>[^,;:.!?]*)$"
)
"""What, before a mention in its clause, takes it out."""
AFTER = re.compile(
    rf"^(?:\s+{THING})?\s+(?:is|are|was|were|does|do|did|has|have|can|could|will|would|should)(?:\s+not\b|n't\b)|^\s*cannot"
)
"""What, right after a mention, takes it out: "the first is not"."""
CLAUSE = re.compile(r"[,;:.!?\n]|\bbut\b|\bhowever\b|\bwhile\b|\bwhereas\b|\bbecause\b|\bsince\b")
CONCLUDES = re.compile(
    r"\b(?:answer|choice|i (?:would )?(?:choose|pick|select|say))\b\s*(?:is|would be|was|:)?\s*(?:the\s+)?$"
)
"""What, right before a mention, makes it the answer whatever else is mentioned."""
REASONS = re.compile(rf"^(?:\s+{THING})?\s*(?:$|[.;:!\n]|,?\s*(?:because|since|as|for|due to|given)\b)")
"""What follows a mention that is the whole answer, or the answer before its reasons."""


class Mention(NamedTuple):
    """Where an answer mentions an input: from, to, which, and whether it is taken out."""

    start: int
    end: int
    which: int
    out: bool


def choice(answer: str, *, count: int = 2, names: Sequence[Sequence[str]] = (), question: str = "") -> int | None:
    """Finds which of some inputs an answer means.

    Args:
      answer: what the model said.
      count: of inputs, two to four.
      names: for each input, what it alone is called, such as ["picture", "photo"].
      question: what was asked; where the answer repeats it, the repetition is passed over.

    Returns:
      The input's place, from 0 on; None if the answer means none, several, or nothing that can be told.
    """
    text = _plain(answer)
    asked = _plain(question)
    if asked:
        text = text.replace(asked, " . ").replace(asked.rstrip(" ?.!"), " . ")
    text = " ".join(text.split()).strip(" .,;:!?-*\"'")
    whole = re.sub(r"[^\w ]", "", text).strip()
    for place in range(count):
        if whole in {LETTERS[place], str(place + 1), NUMBERS[place]}:
            return place
    mentions = sorted({mention for place in range(count) for mention in _mentions(text, place, count, names)})
    mentions = [_unless_out(text, mention, mentions) for mention in _without_inner(mentions)]
    if (
        mentions
        and not mentions[0].out
        and not text[: mentions[0].start].strip(" (the")
        and _is_answer(text, mentions[0])
    ):
        return mentions[0].which
    concluded = [mention for mention in mentions if not mention.out and CONCLUDES.search(text[: mention.start])]
    if concluded:
        return concluded[-1].which if len({mention.which for mention in concluded[-1:]}) == 1 else None
    mentions = [mention for mention in mentions if not _is_adverb(text, mention, mentions)]
    meant = {mention.which for mention in mentions if not mention.out}
    out = {mention.which for mention in mentions if mention.out}
    if not meant and len(out) == count - 1:
        meant = set(range(count)) - out
    return meant.pop() if len(meant) == 1 else None


def _plain(text: str) -> str:
    return " ".join(text.lower().replace("’", "'").replace("‘", "'").split())


def _mentions(text: str, place: int, count: int, names: Sequence[Sequence[str]]) -> list[Mention]:
    """Every place where a text may mean the input of that number."""
    patterns = [rf"\b{word}\b" for word in ORDINALS[place]]
    patterns += [
        rf"\b{LABELLED}\s*(?:is|:|#)?\s*[(\"']?(?:{NUMBERS[place]}|{place + 1}|{LETTERS[place]})\b(?!\s+(?!{SAYS}\b)\w)"
    ]
    patterns += [rf"\b{LETTERS[place]}(?=\s+(?:is|was|has|sounds|seems)\b)", rf"(?<=\bthan ){LETTERS[place]}$"]
    patterns += [rf"(?:(?<=\bis )|(?<=\bit's )){LETTERS[place]}$"]
    patterns += [rf"(?<!\w)\(?(?:{place + 1}|{LETTERS[place]})\)", rf"^(?:{place + 1}|{LETTERS[place]})[.:]\s"]
    if count == 2:
        side = SIDES[place]
        patterns += [rf"^{side}$", rf"\b(?:the|on the|to the)\s+{side}\b(?!\s+(?:answer|choice|thing|way))"]
        patterns += [rf"\b{side}\s+{THING}\b", rf"\b{PAIRED[place]}\b"]
    if place < len(names):
        others = {name.lower() for other, own in enumerate(names) if other != place for name in own}
        patterns += [rf"\b{re.escape(name.lower())}\b" for name in names[place] if name.lower() not in others]
    return [Mention(*found.span(), place, False) for pattern in patterns for found in re.finditer(pattern, text)]


def _without_inner(mentions: Sequence[Mention]) -> list[Mention]:
    """Leaves out mentions that lie inside longer ones."""
    return [
        mention
        for mention in mentions
        if not any(
            other is not mention
            and other.start <= mention.start
            and mention.end <= other.end
            and (other.end - other.start) > (mention.end - mention.start)
            for other in mentions
        )
    ]


def _unless_out(text: str, mention: Mention, mentions: Sequence[Mention]) -> Mention:
    """Says whether a mention is taken out: negated, or what another is compared with."""
    before = text[: mention.start]
    clauses = [found.end() for found in CLAUSE.finditer(before)]
    clause = before[clauses[-1] if clauses else 0 :]
    negated = BEFORE.search(clause) is not None
    return mention._replace(out=negated or AFTER.match(text[mention.end :]) is not None)


def _is_answer(text: str, mention: Mention) -> bool:
    """Whether what follows a mention at the beginning ends it or gives reasons."""
    after = text[mention.end :]
    return not after.strip() or REASONS.match(after) is not None


def _is_adverb(text: str, mention: Mention, mentions: Sequence[Mention]) -> bool:
    """Whether "first" begins a list of thoughts: "First, ... the second is louder"."""
    bare = text[mention.start : mention.end] in {words[0] for words in ORDINALS}
    alone = not re.search(r"\bthe\s+$", text[: mention.start]) and re.match(r"\s*,", text[mention.end :])
    return bool(bare and alone and any(other.which != mention.which for other in mentions))
