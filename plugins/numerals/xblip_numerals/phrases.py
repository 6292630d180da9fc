"""The wording of the numerals world, as tables: what may be true of an input, and the ways to say it.

Wording is data so that one walk over these tables and those of `kinds` gives the vocabulary: the tokenizer cannot miss
a word that a description or a question uses. `language` turns the tables into sentences.
"""

from collections.abc import Mapping
from dataclasses import dataclass

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEENS = (
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
)
ORDINALS = ("first", "second", "third")
MAX_THINGS = len(ORDINALS)
ANSWER_CUE = "answer:"

VALUES: dict[str, tuple[str, ...]] = {
    "number": NUMBERS,
    "color": ("red", "green", "blue", "yellow", "purple", "white"),
    "place": ("left", "right", "top", "bottom", "center"),
    "kind": ("handwriting", "sign"),
    "direction": ("left", "right", "up", "down"),
    "loudness": ("loud", "quiet"),
    "sound": ("clean", "noisy"),
    "pose": ("standing", "lying"),
    "thickness": ("thick", "thin"),
}
ATTRIBUTES = tuple(name for name in VALUES if name != "number")


@dataclass(frozen=True)
class Modality:
    """How the language speaks of one kind of input.

    Attributes:
        cue: the text laid before the input.
        noun: the canonical noun, used in every answer.
        aliases: nouns that questions may use instead.
        clauses: the facts that such a thing may have, with ways to state each (``{}`` is its value).
    """

    cue: str
    noun: str
    aliases: tuple[str, ...]
    clauses: Mapping[str, tuple[str, ...]]


_SHOWN = ("the number is {}", "it shows {}", "the digit {}", "number {}", "you can see the number {}", "it is {}")
_COLOR = ("it is {}", "the color is {}", "colored {}", "in {}", "its color is {}")
MODALITIES: dict[str, Modality] = {
    "image": Modality(
        "image: ",
        "image",
        ("picture",),
        {
            "number": _SHOWN,
            "color": _COLOR,
            "place": ("at the {}", "the place is {}", "it is at the {} of the image", "placed at the {}"),
            "kind": ("{}", "it is {}", "made as {}", "the kind is {}"),
        },
    ),
    "video": Modality(
        "video: ",
        "video",
        ("clip",),
        {
            "number": _SHOWN,
            "color": _COLOR,
            "direction": ("moving {}", "it moves {}", "the direction is {}", "it goes {}", "going {}"),
        },
    ),
    "audio": Modality(
        "audio: ",
        "audio",
        ("voice", "recording"),
        {
            "number": ("the number is {}", "it says {}", "a voice says {}", "the word {}", "you can hear {}"),
            "loudness": ("it is {}", "the voice is {}", "in a {} voice", "the loudness is {}"),
            "sound": ("the sound is {}", "a {} recording", "it sounds {}", "with {} sound"),
        },
    ),
    "point_cloud": Modality(
        "3d: ",
        "point cloud",
        ("3d shape", "solid"),
        {
            "number": _SHOWN,
            "pose": ("it is {}", "the pose is {}", "a {} shape", "{} on the ground"),
            "thickness": ("it is {}", "with {} lines", "a {} solid", "the lines are {}"),
        },
    ),
}
OPENINGS = ("here", "look", "in this {}", "this {} can be described like so", "there is something in the {}")
COMPARATIVES = {
    "larger": ("larger", "bigger", "greater", "higher"),
    "smaller": ("smaller", "lower"),
    "largest": ("largest", "biggest", "greatest", "highest"),
    "smallest": ("smallest", "lowest"),
}
# A value as a state, as a verb, and as a thing; attributes not listed speak like a color.
FORMS = {
    "color": ("{}", "is {}", "the {} one"),
    "place": ("at the {}", "is at the {}", "the one at the {}"),
    "kind": ("{}", "is {}", "the {}"),
    "direction": ("moving {}", "moves {}", "the one moving {}"),
}
OVERTURES = ("please, ", "tell me, ", "can you tell me, ", "now, ", "so, ", "look, ")
# Words that no table uses, so that a person's own phrasing stays mostly legible.
SPARE_WORDS = """
    any but did every find from get help if let many my not other per should some than thanks thing those use
    was were who why your 0 1 2 3 4 5 6 7 8 9
""".split()
