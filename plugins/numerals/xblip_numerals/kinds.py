"""The kinds of questions of the numerals world, as a table: how many inputs each is about, and the ways to ask it.

Phrasings of a kind stand in one text, told apart by the mark that ends each: as tuples, the table would be five times
as long and no clearer.
"""

import re
from dataclasses import dataclass

from xblip_numerals.phrases import ATTRIBUTES, FORMS, VALUES


@dataclass(frozen=True)
class Kind:
    """A kind of question.

    Attributes:
        things: how many things it needs; with more, it names those it is about (all three for the triples).
        chance: accuracy of the best answer to the question alone, with all inputs unseen, when asked about that many things.
        plain: phrasings that name no thing; used only when nothing but the right things is there.
        named: phrasings with ``{a}`` and ``{b}`` for things. In both, ``{v}``, ``{does}``, ``{doesnt}``, ``{do}`` and
            ``{the}`` are a value ("moving left", "moves left", "does not move left", "move left", "the one moving left"),
            ``{fact}`` is an attribute and ``{more}`` is a comparative.
    """

    things: int
    chance: float
    plain: tuple[str, ...]
    named: tuple[str, ...]


def _kind(things: int, chance: float, plain: str, named: str = "") -> Kind:
    return Kind(things, chance, _phrases(plain), _phrases(named))


def _phrases(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\S[^?.]*[?.]", text))


_MORE = _kind(
    2,
    1 / 2,
    "which number is {more}? which one is {more}? which is the {more} number? which input shows the {more} number? "
    "which one has the {more} number?",
    "which number is {more}, {a} or {b}? which is {more}, {a} or {b}? is {a} or {b} {more}? "
    "which of {a} and {b} shows the {more} number? which has the {more} number, {a} or {b}?",
)
_MOST = _kind(
    3,
    1 / 3,
    "which number is the {more}? which number is {more}? which one is the {more}? which of them is {more}? "
    "which input shows the {more} number? which one has the {more} number? which is the {more} of the three?",
)
_THAN = _kind(
    1,
    0.6,
    "is it {more} {v}? is the number {more} {v}? is this {more} {v}? does it show {more} {v}? "
    "would you say it is {more} {v}?",
    "is {a} {more} {v}? is the number in {a} {more} {v}? does {a} show {more} {v}? is it true that {a} is {more} {v}? "
    "does {a} say {more} {v}?",
)
# What can be asked of each attribute beside "is it one or the other?".
_WORDED = {
    "color": (
        "what color is it? which color is it? what is the color? name the color. which color do you see?",
        "what color is {a}? which color is {a}? what is the color of {a}? what color does {a} have? "
        "which color do you see in {a}? what color is the number in {a}?",
    ),
    "paper": (
        "what is the paper like? how dark is the paper? what paper is it on? is the paper light or dark?",
        "what is the paper of {a} like? how dark is the paper of {a}? what paper is {a} on? "
        "is the paper of {a} dark or light?",
    ),
    "kind": (
        "what kind is it? what is the kind?",
        "what kind is {a}? which kind of image is {a}? what is the kind of {a}?",
    ),
    "place": (
        "where is it? where is the number? where is the digit placed? in which place is it? what is the place?",
        "where is the number in {a}? where in {a} is the number? at which place is the digit in {a}? "
        "what is the place of the number in {a}? in which part of {a} is the number?",
    ),
    "size": (
        "what size is it? how large is it? how small is it?",
        "what size is {a}? how large is {a}? what is the size of {a}?",
    ),
    "lean": ("how does it lean? what is the lean?", "how does {a} lean? what is the lean of {a}?"),
    "frame": ("what is the frame like? how is it framed?", "what is the frame of {a} like? how is {a} framed?"),
    "direction": (
        "which way does it move? in which direction does it move? where does it go? what is the direction? "
        "where is it moving?",
        "which way does {a} move? in which direction does {a} move? where does the number in {a} move? "
        "what is the direction of {a}? which way does the digit in {a} go? where is {a} moving?",
    ),
    "speed": (
        "how fast is it? how slow is it? what is the speed?",
        "how fast is {a}? how slow is {a}? what is the speed of {a}?",
    ),
    "growth": (
        "how does it grow? is it growing, shrinking or steady? what is the growth? does it grow or shrink?",
        "how does {a} grow? is {a} growing, shrinking or steady? what is the growth of {a}? does {a} grow or shrink?",
    ),
    "turning": (
        "does it turn or stay level? how does it turn?",
        "does {a} turn or stay level? how does the number in {a} turn?",
    ),
    "speaker": (
        "who speaks? who says it? whose voice is it? who is the speaker? who do you hear?",
        "who speaks in {a}? who says the number in {a}? whose voice is in {a}? who is the speaker of {a}? "
        "who do you hear in {a}?",
    ),
    "loudness": (
        "how loud is it? what is the loudness?",
        "how loud is {a}? how quiet is {a}? what is the loudness of {a}?",
    ),
    "sound": (
        "how clean is it? what is the sound like?",
        "how clean is {a}? how noisy is {a}? what is the sound of {a} like?",
    ),
    "echo": ("how is the echo? what is the room like?", "how is the echo in {a}? what is the room of {a} like?"),
    "times": (
        "how often is it said? how many times is it said? is it said once or twice?",
        "how often is the number in {a} said? how many times does {a} say it? is {a} said once or twice?",
    ),
    "pose": (
        "what is the pose? what is its pose?",
        "what is the pose of {a}? which pose does {a} have? what pose is {a} in?",
    ),
    "thickness": (
        "how thick is it? are the lines thick or thin?",
        "how thick is {a}? how thin is {a}? are the lines of {a} thick or thin? what is the thickness of {a}?",
    ),
    "stretch": (
        "is it tall, wide or even? what is the stretch? what form is it? how is it stretched?",
        "is {a} tall, wide or even? what is the stretch of {a}? what form is {a}? how is {a} stretched?",
    ),
    "body": ("what is the body like? what body is it?", "what is the body of {a} like? what body does {a} have?"),
    "holes": ("what are the holes like? how is it drilled?", "what are the holes in {a} like? how is {a} drilled?"),
}


def _attribute(name: str) -> Kind:
    """Asks for an attribute; of two values, also in the form "is it one or the other?"."""
    plain, named = _WORDED[name]
    if len(VALUES[name]) == 2 and name not in FORMS:
        one, other = VALUES[name]
        plain += f" is it {one} or {other}? is it {other} or {one}?"
        named += f" is {{a}} {one} or {other}? is {{a}} {other} or {one}?"
    if name == "kind":
        plain += " is it handwriting or a sign? is this a sign or handwriting?"
        named += " is {a} handwriting or a sign? is {a} a sign or handwriting?"
    return _kind(1, 1 / len(VALUES[name]), plain, named)


KINDS: dict[str, Kind] = {
    "number": _kind(
        1,
        0.1,
        "what number is it? which number is it? what number is this? what digit is it? name the number. "
        "what is the number? which number do you see? read the number.",
        "which number is in {a}? which number does {a} show? what number does {a} show? what number is {a}? "
        "what is the number in {a}? which digit is in {a}? read the number in {a}. which number does {a} say? "
        "what number do you hear in {a}? which number is said in {a}?",
    ),
    **{name: _attribute(name) for name in ATTRIBUTES},
    "check_number": _kind(
        1,
        1 / 2,
        "is it {v}? is this {v}? is the number {v}? does it show {v}? do you see the number {v}?",
        "is {a} {v}? does {a} show {v}? is the number in {a} {v}? is {v} the number in {a}? "
        "does {a} have the number {v}? does {a} say {v}? can you see {v} in {a}?",
    ),
    "check_attribute": _kind(
        1,
        1 / 2,
        "is it {v}? is this {v}? is it true that it {does}? would you say it {does}? can you say it {does}?",
        "is {a} {v}? is it true that {a} {does}? would you say {a} {does}? is the number in {a} {v}? "
        "can you say that {a} {does}?",
    ),
    "check_not": _kind(  # "yes" says that the denial is true
        1,
        1 / 2,
        "is it not {v}? is this not {v}? is it true that it {doesnt}? would you say it {doesnt}? can you say it {doesnt}?",
        "is {a} not {v}? is it true that {a} {doesnt}? would you say {a} {doesnt}? is the number in {a} not {v}? "
        "can you say that {a} {doesnt}?",
    ),
    "above": _THAN,
    "below": _THAN,
    "describe": _kind(
        1,
        0.0,
        "describe it. describe this. what do you see? tell me all about it. give a full description. what is it like?",
        "describe {a}. what is in {a}? tell me all about {a}. give a full description of {a}. what do you see in {a}? "
        "what is {a} like? how would you describe {a}?",
    ),
    "caption": _kind(
        1,
        0.0,
        "give a caption. give a short caption. what is this, in short? describe it in short. what is this?",
        "give a caption of {a}. give a short caption of {a}. what is {a}, in short? describe {a} in short. "
        "what does {a} show, in short?",
    ),
    "larger": _MORE,
    "smaller": _MORE,
    "same": _kind(
        2,
        1 / 2,
        "do they show the same number? are they the same number? are the numbers equal? are both numbers the same? "
        "is it the same number in both?",
        "do {a} and {b} show the same number? are the numbers in {a} and {b} the same? are {a} and {b} equal? "
        "is the number in {a} the same as in {b}? does {a} show the same number as {b}? "
        "do {a} and {b} have the same number?",
    ),
    "different": _kind(
        2,
        1 / 2,
        "do they show different numbers? are they different numbers? are the numbers different? are both numbers different? "
        "is it a different number in each?",
        "do {a} and {b} show different numbers? are the numbers in {a} and {b} different? "
        "is the number in {a} different from that in {b}? does {a} show a different number than {b}? "
        "do {a} and {b} have different numbers?",
    ),
    "sum": _kind(
        2,
        0.1,
        "what is the sum? what is the sum of the two numbers? what is the total? add the numbers. what do they add up to? "
        "what is the sum of both?",
        "what is the sum of {a} and {b}? what is {a} plus {b}? how much is {a} plus {b}? add {a} and {b}. "
        "what do {a} and {b} add up to? what is the total of {a} and {b}?",
    ),
    "difference": _kind(
        2,
        0.18,
        "what is the difference? what is the difference of the numbers? how far apart are they? "
        "how far apart are the numbers? by how much do they differ?",
        "what is the difference between {a} and {b}? what is the difference of {a} and {b}? how far apart are {a} and {b}? "
        "by how much do {a} and {b} differ?",
    ),
    "same_attribute": _kind(
        2,
        1 / 2,
        "do they have the same {fact}? are they the same in {fact}? is the {fact} the same? is the {fact} the same in both? "
        "are both of the same {fact}?",
        "do {a} and {b} have the same {fact}? are {a} and {b} the same in {fact}? is the {fact} of {a} the same as of {b}? "
        "does {a} have the same {fact} as {b}? are {a} and {b} of the same {fact}?",
    ),
    "different_attribute": _kind(
        2,
        1 / 2,
        "do they have a different {fact}? are they different in {fact}? is the {fact} different? do they differ in {fact}? "
        "are both of a different {fact}?",
        "do {a} and {b} have a different {fact}? are {a} and {b} different in {fact}? "
        "is the {fact} of {a} different from that of {b}? does {a} have a different {fact} than {b}? "
        "do {a} and {b} differ in {fact}?",
    ),
    "which_shows": _kind(
        2,
        1 / 2,
        "which one shows {v}? which one has the number {v}? which of them is {v}? which input shows {v}? which is {v}? "
        "what shows the number {v}?",
        "which one shows {v}, {a} or {b}? which of {a} and {b} shows {v}? is {a} or {b} {v}? which is {v}, {a} or {b}? "
        "in which is the number {v}, {a} or {b}?",
    ),
    "which_is": _kind(
        2,
        1 / 2,
        "which one {does}? which input {does}? which of them {does}? which {does}? what {does}? tell me which one {does}.",
        "which one {does}, {a} or {b}? which of {a} and {b} {does}? is {a} or {b} {v}? what {does}, {a} or {b}? "
        "which {does}, {a} or {b}?",
    ),
    "which_is_not": _kind(
        2,
        1 / 2,
        "which one {doesnt}? which input {doesnt}? which of them {doesnt}? which {doesnt}? what {doesnt}? "
        "tell me which one {doesnt}.",
        "which one {doesnt}, {a} or {b}? which of {a} and {b} {doesnt}? is {a} or {b} not {v}? what {doesnt}, {a} or {b}? "
        "which {doesnt}, {a} or {b}?",
    ),
    "number_of": _kind(
        2,
        0.1,
        "which number has {the}? what number has {the}? which number does {the} show? what number is {the}? "
        "what is the number of {the}? which number is {the}? what is the digit of {the}?",
    ),
    "attribute_of": _kind(2, 0.45, ""),  # phrased as each attribute is, with "the one that shows three" for a name
    "count": _kind(
        2,
        1 / 3,
        "how many of them {do}? how many {do}? how many inputs {do}? count those that {do}. "
        "what is the count of those that {do}?",
    ),
    "largest": _MOST,
    "smallest": _MOST,
    "middle": _kind(
        3,
        1 / 3,
        "which number is in the middle? which one is in the middle? which one shows the middle number? "
        "which input has the middle number? which is the middle number of the three?",
    ),
    "same_all": _kind(
        3,
        1 / 2,
        "do all three show the same number? do they all show the same number? are all three numbers the same? "
        "are all the numbers equal? is it the same number in all of them? do all of them have the same number?",
    ),
    "which_pair": _kind(
        3,
        1 / 3,
        "which two show the same number? which two have the same number? which two are the same number? "
        "which of them show the same number? which two numbers are equal?",
    ),
    "sum_all": _kind(
        3,
        0.075,
        "what is the sum? what is the sum of all three? what is the sum of the three numbers? what do they all add up to? "
        "what is the total? add all the numbers.",
    ),
}
THE_ONE = ("the one that shows {}", "the one with the number {}", "the one that is {}", "the input that shows {}")
"""Ways to name a thing by its number."""
