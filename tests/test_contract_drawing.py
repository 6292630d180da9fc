"""The contract's promise about drawing: a token shows where it is; what shows nothing, or all tokens alike, breaks it."""

import pytest
from test_contract import Changed, faults

PROMISE = "tokens are drawn where they are"


class Placed(Changed):
    """Draws its four tokens as the patches of a picture."""

    def draw(self, tensors, weights):
        import PIL.Image

        pictures = [PIL.Image.new("RGB", (8, 8), "white")] * len(weights)
        return self.heat.over_pictures(pictures, weights)


class Blank(Placed):
    """Draws no heat."""

    def draw(self, tensors, weights):
        return super().draw(tensors, 0 * weights)


class Smeared(Placed):
    """Draws all tokens alike."""

    def draw(self, tensors, weights):
        return super().draw(tensors, 0 * weights + weights.sum())


class Unillustrated(Placed):
    """Draws no picture."""

    def draw(self, tensors, weights):
        return self.heat.Drawing({".ply": b"points"})


class Misnumbered(Placed):
    """Names a token that is not there."""

    def draw(self, tensors, weights):
        drawing = super().draw(tensors, weights)
        drawing.placeless = {4: "[CLS]"}
        return drawing


class Surprised(Placed):
    """Expects another number of tokens."""

    def draw(self, tensors, weights):
        return super().draw(tensors, weights[:, 1:].reshape(-1, 2))


def test_a_modality_may_draw():
    assert not any(faults(Placed).values())


@pytest.mark.parametrize(
    ("modality", "fault"),
    [
        (Blank, "a token with all the weight does not show"),
        (Smeared, "two tokens with all the weight show at the same place"),
        (Unillustrated, "no picture in"),
        (Misnumbered, "there are no tokens {4: '[CLS]'}"),
        (Surprised, "ValueError"),
    ],
)
def test_what_does_not_show_its_tokens_breaks_the_promise(modality, fault):
    found = faults(modality)
    assert fault in found[PROMISE] and sum(map(bool, found.values())) == 1, found
