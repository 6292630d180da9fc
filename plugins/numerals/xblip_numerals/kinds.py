"""The kinds of questions of the numerals world, as a table: how many inputs each is about, and the ways to ask it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """A kind of question.

    Attributes:
        things: how many things it needs; with more, it names those it is about (all three for the triples).
        chance: accuracy of always giving the most frequent answer, when asked about that many things.
        plain: phrasings that name no thing; used only when nothing but the right things is there.
        named: phrasings with ``{a}`` and ``{b}`` for things. In both, ``{v}``, ``{does}`` and ``{the}`` are a
            value ("moving left", "moves left", "the one moving left") and ``{more}`` is a comparative.
    """

    things: int
    chance: float
    plain: tuple[str, ...]
    named: tuple[str, ...]


_MORE = Kind(
    2,
    1 / 2,
    (
        "which number is {more}?",
        "which one is {more}?",
        "which is the {more} number?",
        "which input shows the {more} number?",
        "which one has the {more} number?",
    ),
    (
        "which number is {more}, {a} or {b}?",
        "which is {more}, {a} or {b}?",
        "is {a} or {b} {more}?",
        "which of {a} and {b} shows the {more} number?",
        "which has the {more} number, {a} or {b}?",
    ),
)
_MOST = Kind(
    3,
    1 / 3,
    (
        "which number is the {more}?",
        "which number is {more}?",
        "which one is the {more}?",
        "which of them is {more}?",
        "which input shows the {more} number?",
        "which one has the {more} number?",
        "which is the {more} of the three?",
    ),
    (),
)
KINDS: dict[str, Kind] = {
    "number": Kind(
        1,
        0.1,
        (
            "what number is it?",
            "which number is it?",
            "what number is this?",
            "what digit is it?",
            "name the number.",
            "what is the number?",
            "which number do you see?",
            "read the number.",
        ),
        (
            "which number is in {a}?",
            "which number does {a} show?",
            "what number does {a} show?",
            "what number is {a}?",
            "what is the number in {a}?",
            "which digit is in {a}?",
            "read the number in {a}.",
            "which number does {a} say?",
            "what number do you hear in {a}?",
            "which number is said in {a}?",
        ),
    ),
    "color": Kind(
        1,
        1 / 6,
        ("what color is it?", "which color is it?", "what is the color?", "name the color.", "which color do you see?"),
        (
            "what color is {a}?",
            "which color is {a}?",
            "what is the color of {a}?",
            "what color does {a} have?",
            "which color do you see in {a}?",
            "what color is the number in {a}?",
        ),
    ),
    "place": Kind(
        1,
        1 / 5,
        (
            "where is it?",
            "where is the number?",
            "where is the digit placed?",
            "in which place is it?",
            "what is the place?",
        ),
        (
            "where is the number in {a}?",
            "where in {a} is the number?",
            "at which place is the digit in {a}?",
            "what is the place of the number in {a}?",
            "in which part of {a} is the number?",
        ),
    ),
    "kind": Kind(
        1,
        1 / 2,
        ("is it handwriting or a sign?", "what kind is it?", "is this a sign or handwriting?", "what is the kind?"),
        (
            "is {a} handwriting or a sign?",
            "is {a} a sign or handwriting?",
            "what kind is {a}?",
            "which kind of image is {a}?",
            "what is the kind of {a}?",
        ),
    ),
    "direction": Kind(
        1,
        1 / 4,
        (
            "which way does it move?",
            "in which direction does it move?",
            "where does it go?",
            "what is the direction?",
            "where is it moving?",
        ),
        (
            "which way does {a} move?",
            "in which direction does {a} move?",
            "where does the number in {a} move?",
            "what is the direction of {a}?",
            "which way does the digit in {a} go?",
            "where is {a} moving?",
        ),
    ),
    "loudness": Kind(
        1,
        1 / 2,
        ("is it loud or quiet?", "is it quiet or loud?", "how loud is it?", "what is the loudness?"),
        (
            "is {a} loud or quiet?",
            "is {a} quiet or loud?",
            "how loud is {a}?",
            "what is the loudness of {a}?",
            "does {a} sound loud or quiet?",
        ),
    ),
    "sound": Kind(
        1,
        1 / 2,
        ("is it clean or noisy?", "is it noisy or clean?", "how clean is it?", "is the sound clean or noisy?"),
        (
            "is {a} clean or noisy?",
            "is {a} noisy or clean?",
            "how clean is {a}?",
            "how noisy is {a}?",
            "is the sound of {a} clean or noisy?",
            "does {a} sound noisy or clean?",
        ),
    ),
    "pose": Kind(
        1,
        1 / 2,
        ("is it standing or lying?", "is it lying or standing?", "what is the pose?", "what is its pose?"),
        (
            "is {a} standing or lying?",
            "is {a} lying or standing?",
            "what is the pose of {a}?",
            "which pose does {a} have?",
            "what pose is {a} in?",
        ),
    ),
    "thickness": Kind(
        1,
        1 / 2,
        ("is it thick or thin?", "is it thin or thick?", "how thick is it?", "are the lines thick or thin?"),
        (
            "is {a} thick or thin?",
            "is {a} thin or thick?",
            "how thick is {a}?",
            "how thin is {a}?",
            "are the lines of {a} thick or thin?",
            "what is the thickness of {a}?",
        ),
    ),
    "check_number": Kind(
        1,
        1 / 2,
        ("is it {v}?", "is this {v}?", "is the number {v}?", "does it show {v}?", "do you see the number {v}?"),
        (
            "is {a} {v}?",
            "does {a} show {v}?",
            "is the number in {a} {v}?",
            "is {v} the number in {a}?",
            "does {a} have the number {v}?",
            "does {a} say {v}?",
            "can you see {v} in {a}?",
        ),
    ),
    "check_attribute": Kind(
        1,
        1 / 2,
        (
            "is it {v}?",
            "is this {v}?",
            "is it true that it {does}?",
            "would you say it {does}?",
            "can you say it {does}?",
        ),
        (
            "is {a} {v}?",
            "is it true that {a} {does}?",
            "would you say {a} {does}?",
            "is the number in {a} {v}?",
            "can you say that {a} {does}?",
        ),
    ),
    "describe": Kind(
        1,
        0.0,
        ("describe it.", "describe this.", "what is this?", "what do you see?", "tell me about it.", "give a caption."),
        (
            "describe {a}.",
            "what is in {a}?",
            "tell me about {a}.",
            "give a caption of {a}.",
            "what do you see in {a}?",
            "what is {a} like?",
            "how would you describe {a}?",
        ),
    ),
    "larger": _MORE,
    "smaller": _MORE,
    "same": Kind(
        2,
        1 / 2,
        (
            "do they show the same number?",
            "are they the same number?",
            "are the numbers equal?",
            "are both numbers the same?",
            "is it the same number in both?",
        ),
        (
            "do {a} and {b} show the same number?",
            "are the numbers in {a} and {b} the same?",
            "are {a} and {b} equal?",
            "is the number in {a} the same as in {b}?",
            "does {a} show the same number as {b}?",
            "do {a} and {b} have the same number?",
        ),
    ),
    "sum": Kind(
        2,
        0.1,
        (
            "what is the sum?",
            "what is the sum of the two numbers?",
            "what is the total?",
            "add the numbers.",
            "what do they add up to?",
            "what is the sum of both?",
        ),
        (
            "what is the sum of {a} and {b}?",
            "what is {a} plus {b}?",
            "how much is {a} plus {b}?",
            "add {a} and {b}.",
            "what do {a} and {b} add up to?",
            "what is the total of {a} and {b}?",
        ),
    ),
    "difference": Kind(
        2,
        0.18,
        (
            "what is the difference?",
            "what is the difference of the numbers?",
            "how far apart are they?",
            "how far apart are the numbers?",
            "by how much do they differ?",
        ),
        (
            "what is the difference between {a} and {b}?",
            "what is the difference of {a} and {b}?",
            "how far apart are {a} and {b}?",
            "by how much do {a} and {b} differ?",
            "how different are {a} and {b}?",
        ),
    ),
    "same_color": Kind(
        2,
        1 / 2,
        (
            "do they have the same color?",
            "are they the same color?",
            "is the color the same?",
            "is the color the same in both?",
            "are the colors the same?",
        ),
        (
            "do {a} and {b} have the same color?",
            "are {a} and {b} the same color?",
            "is the color of {a} the same as of {b}?",
            "does {a} have the same color as {b}?",
            "are the colors of {a} and {b} equal?",
        ),
    ),
    "which_shows": Kind(
        2,
        1 / 2,
        (
            "which one shows {v}?",
            "which one has the number {v}?",
            "which of them is {v}?",
            "where is the number {v}?",
            "which input shows {v}?",
            "which is {v}?",
            "what shows the number {v}?",
        ),
        (
            "which one shows {v}, {a} or {b}?",
            "which of {a} and {b} shows {v}?",
            "is {a} or {b} {v}?",
            "which is {v}, {a} or {b}?",
            "where is the number {v}, in {a} or in {b}?",
        ),
    ),
    "which_is": Kind(
        2,
        1 / 2,
        (
            "which one {does}?",
            "which input {does}?",
            "which of them {does}?",
            "which {does}?",
            "what {does}?",
            "tell me which one {does}.",
        ),
        (
            "which one {does}, {a} or {b}?",
            "which of {a} and {b} {does}?",
            "is {a} or {b} {v}?",
            "what {does}, {a} or {b}?",
            "which {does}, {a} or {b}?",
        ),
    ),
    "number_of": Kind(
        2,
        0.1,
        (
            "which number has {the}?",
            "what number has {the}?",
            "which number does {the} show?",
            "what number is {the}?",
            "what is the number of {the}?",
            "which number is {the}?",
            "what is the digit of {the}?",
        ),
        (),
    ),
    "largest": _MOST,
    "smallest": _MOST,
    "same_all": Kind(
        3,
        1 / 2,
        (
            "do all three show the same number?",
            "do they all show the same number?",
            "are all three numbers the same?",
            "are all the numbers equal?",
            "is it the same number in all of them?",
            "do they show the same number?",
        ),
        (),
    ),
    "sum_all": Kind(
        3,
        0.075,
        (
            "what is the sum?",
            "what is the sum of all three?",
            "what is the sum of the three numbers?",
            "what do they all add up to?",
            "what is the total?",
            "add all the numbers.",
        ),
        (),
    ),
}
