"""Fixtures of the tests of the audio modality."""

import pytest
from transformers import ASTConfig, ASTFeatureExtractor, ASTModel
from xblip_audio import Audio

SPECTROGRAM = {"num_mel_bins": 64, "max_length": 128}


@pytest.fixture(scope="session")
def ast(tmp_path_factory):
    """The folder of a tiny AST with clips of 128 frames."""
    folder = tmp_path_factory.mktemp("ast")
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    config = ASTConfig(patch_size=16, frequency_stride=16, time_stride=8, **sizes, **SPECTROGRAM)
    ASTModel(config).save_pretrained(folder)
    ASTFeatureExtractor(mean=-3.0, std=4.0, **SPECTROGRAM).save_pretrained(folder)
    return folder


@pytest.fixture
def modality(ast):
    """Makes modalities with that encoder."""
    return lambda **config: Audio(Audio.Config(encoder=str(ast), **config))
