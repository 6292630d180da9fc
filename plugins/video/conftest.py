"""Fixtures of the tests of the video modality."""

import pytest
from numbered_videos import numbered, write
from transformers import ViTConfig, ViTImageProcessor
from xblip_video import Video


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    """Makes modalities whose processor neither resizes nor normalises: pixel_values are frames over 255."""
    folder = tmp_path_factory.mktemp("plain")
    ViTConfig().save_pretrained(folder)
    ViTImageProcessor(do_resize=False, do_normalize=False).save_pretrained(folder)
    return lambda **config: Video(Video.Config(encoder=str(folder), **config))


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """The mp4 that most tests read: 40 numbered frames with B-frames, a keyframe every 12."""
    return write(tmp_path_factory.mktemp("clip") / "clip.mp4", numbered(40), options={"g": "12", "bf": "2"})
