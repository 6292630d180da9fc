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
    "paper": ("light", "dark"),
    "kind": ("handwriting", "sign"),
    "place": ("left", "right", "top", "bottom", "center"),
    "size": ("small", "large"),
    "lean": ("upright", "slanted"),
    "frame": ("framed", "bare"),
    "direction": ("left", "right", "up", "down"),
    "speed": ("slow", "fast"),
    "growth": ("growing", "shrinking", "steady"),
    "turning": ("turning", "level"),
    "speaker": ("george", "jackson", "lucas", "nicolas", "yweweler", "robot"),
    "loudness": ("loud", "quiet"),
    "sound": ("clean", "noisy"),
    "echo": ("echoing", "dry"),
    "times": ("once", "twice"),
    "pose": ("standing", "lying"),
    "thickness": ("thick", "thin"),
    "stretch": ("tall", "wide", "even"),
    "body": ("solid", "hollow"),
    "holes": ("drilled", "whole"),
}
ATTRIBUTES = tuple(name for name in VALUES if name != "number")
SHARED = ("color", "paper", "speed")
"""Attributes that things of several modalities have."""
NO_SIGN_HAS = ("paper", "lean")
"""Attributes of images that a photographed hand does not have."""


@dataclass(frozen=True)
class Modality:
    """How the language speaks of one kind of input.

    Attributes:
        cue: the text laid before the input.
        noun: the canonical noun, used in every answer.
        aliases: nouns that questions may use instead.
        clauses: the facts that such a thing may have, with ways to state each (``{}`` is its value).
        before: the facts that the canonical sentence says before the number, in order.
        after: those that it says after the number, in order, and how.
        usual: the two attributes that a short caption names.
    """

    cue: str
    noun: str
    aliases: tuple[str, ...]
    clauses: Mapping[str, tuple[str, ...]]
    before: tuple[str, ...]
    after: Mapping[str, str]
    usual: tuple[str, str]


_SHOWN = ("the number is {}", "it shows {}", "the digit {}", "number {}", "you can see the number {}", "it is {}")
_COLOR = ("it is {}", "the color is {}", "colored {}", "in {}", "its color is {}")
_PAPER = ("on {} paper", "the paper is {}", "it has {} paper", "on a {} ground")
_SPEED = ("it is {}", "the speed is {}", "with {} speed")
MODALITIES: dict[str, Modality] = {
    "image": Modality(
        "image: ",
        "image",
        ("picture",),
        {
            "number": _SHOWN,
            "color": _COLOR,
            "paper": _PAPER,
            "kind": ("{}", "it is {}", "made as {}", "the kind is {}"),
            "place": ("at the {}", "the place is {}", "it is at the {}", "placed at the {}"),
            "size": ("{}", "it is {}", "the size is {}", "of {} size"),
            "lean": ("{}", "it is {}", "the lean is {}", "written {}"),
            "frame": ("{}", "it is {}", "the image is {}", "the frame is {}"),
        },
        ("size", "frame", "lean", "color"),
        {"kind": "as {}", "paper": "on {} paper", "place": "at the {}"},
        ("color", "place"),
    ),
    "video": Modality(
        "video: ",
        "video",
        ("clip",),
        {
            "number": _SHOWN,
            "color": _COLOR,
            "paper": _PAPER,
            "direction": ("moving {}", "it moves {}", "the direction is {}", "it goes {}", "going {}"),
            "speed": (*_SPEED, "a {} move"),
            "growth": ("{}", "it is {}", "the growth is {}", "it keeps {}"),
            "turning": ("{}", "it is {}", "it keeps {}", "it stays {}"),
        },
        ("speed", "growth", "turning", "color"),
        {"paper": "on {} paper", "direction": "moving {}"},
        ("color", "direction"),
    ),
    "audio": Modality(
        "audio: ",
        "audio",
        ("voice", "recording"),
        {
            "number": ("the number is {}", "it says {}", "a voice says {}", "the word {}", "you can hear {}"),
            "speaker": ("spoken by {}", "the speaker is {}", "said by {}", "it is {}"),
            "loudness": ("it is {}", "the voice is {}", "in a {} voice", "the loudness is {}"),
            "sound": ("the sound is {}", "a {} recording", "it sounds {}", "with {} sound"),
            "speed": (*_SPEED, "in {} speech"),
            "echo": ("it is {}", "the room sounds {}", "the echo is {}", "the room is {}"),
            "times": ("said {}", "spoken {}", "it says it {}", "heard {}"),
        },
        ("loudness", "sound", "speed", "echo"),
        {"speaker": "by {}", "times": "said {}"},
        ("speaker", "loudness"),
    ),
    "point_cloud": Modality(
        "3d: ",
        "point cloud",
        ("3d shape", "object"),
        {
            "number": _SHOWN,
            "color": (*_COLOR, "painted {}"),
            "pose": ("it is {}", "the pose is {}", "a {} shape", "{} on the ground"),
            "thickness": ("it is {}", "with {} lines", "a {} shape", "the lines are {}"),
            "stretch": ("it is {}", "the stretch is {}", "of {} form", "the form is {}"),
            "body": ("it is {}", "the body is {}", "with a {} body", "a {} shape"),
            "holes": ("it is {}", "the body is {}", "{} lines", "the lines are {}"),
        },
        ("pose", "stretch", "thickness", "body", "holes", "color"),
        {},
        ("color", "pose"),
    ),
}
LABELS = {"turning": "turn"}
"""What a description calls a fact, where its name is one of its values too."""
OPENINGS = ("here", "look", "in this {}", "this {} can be described like so", "there is something in the {}")
COMPARATIVES = {
    "larger": ("larger", "bigger", "greater", "higher"),
    "smaller": ("smaller", "lower"),
    "largest": ("largest", "biggest", "greatest", "highest"),
    "smallest": ("smallest", "lowest"),
    "above": ("more than", "larger than", "above", "greater than", "over"),
    "below": ("less than", "smaller than", "below", "under"),
}
# A value as a state, as a verb, as a verb denied, as a verb of several, and as a thing.
FORMS = {
    "number": ("{}", "shows {}", "does not show {}", "show {}", "the one that shows {}"),
    "paper": ("on {} paper", "is on {} paper", "is not on {} paper", "are on {} paper", "the one on {} paper"),
    "kind": ("{}", "is {}", "is not {}", "are {}", "the {}"),
    "place": ("at the {}", "is at the {}", "is not at the {}", "are at the {}", "the one at the {}"),
    "direction": ("moving {}", "moves {}", "does not move {}", "move {}", "the one moving {}"),
    "speaker": ("spoken by {}", "is spoken by {}", "is not spoken by {}", "are spoken by {}", "the one spoken by {}"),
    "times": ("said {}", "is said {}", "is not said {}", "are said {}", "the one said {}"),
}
PLAIN_FORM = ("{}", "is {}", "is not {}", "are {}", "the {} one")
"""What every other attribute sounds like."""
OVERTURES = ("please, ", "tell me, ", "can you tell me, ", "now, ", "so, ", "look, ")
# Words that no table uses, so that a person's own phrasing stays mostly legible.
SPARE_WORDS = """
    any but did every find from get help if let many my per should some than thanks thing those use
    was were who why your theo someone stranger background ink hand digits numbers
    0 1 2 3 4 5 6 7 8 9
""".split()
