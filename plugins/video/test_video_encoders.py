"""Encoders of whole videos: one segment of as many frames as they take, and features as transformers gives them."""

import pickle

import numpy as np
import PIL.Image
import pytest
import torch
import transformers as hf
from numbered_videos import fails, numbered, write
from xblip_video import Video, spread

import xblip
from xblip.branch import Branch, BranchConfig
from xblip.frozen import FrozenEncoder
from xblip.llm import FrozenLLM, LLMConfig
from xblip.testing import save_random, save_toy_llm

SIZES = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=32)
SIZES |= dict(patch_size=8, num_frames=4)
SQUARE = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
MODELS = {
    "videomae": lambda: (hf.VideoMAEModel(hf.VideoMAEConfig(**SIZES)), hf.VideoMAEImageProcessor(**SQUARE)),
    "vivit": lambda: (hf.VivitModel(hf.VivitConfig(tubelet_size=(2, 8, 8), **SIZES)), hf.VivitVideoProcessor(**SQUARE)),
    "timesformer": lambda: (
        hf.TimesformerModel(hf.TimesformerConfig(**SIZES)),
        hf.TimesformerVideoProcessor(**SQUARE),
    ),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of tiny encoders with their processors, the weights random."""
    root = tmp_path_factory.mktemp("videos")
    torch.manual_seed(0)
    for name, build in MODELS.items():
        save_random(root / name, *build())
    return root


def expected(folder, frames):
    """What transformers gives for these frames as one video."""
    model = hf.AutoModel.from_pretrained(folder).eval()
    frames = [PIL.Image.fromarray(frame) for frame in frames]
    with torch.no_grad():
        inputs = hf.AutoVideoProcessor.from_pretrained(folder)(frames, return_tensors="pt")
        return model(**inputs).last_hidden_state


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize(("count", "seen"), [(40, [5, 15, 25, 35]), (4, [0, 1, 2, 3]), (3, [0, 1, 1, 2]), (1, [0] * 4)])
def test_features_are_those_of_transformers(saved, name, count, seen):
    frames = numbered(count)
    modality = Video(Video.Config(encoder=str(saved / name)))
    tensors = modality.load(frames)
    assert tensors["pixel_values"].shape == (1, 4, 3, 32, 32)
    encoder = FrozenEncoder(modality.build_encoder(), name="video")
    values, mask = encoder(**tensors)
    torch.testing.assert_close(values, expected(saved / name, frames[seen]), atol=1e-5, rtol=0)
    assert mask.all() and encoder.takes(tensors) and values.shape[2] == encoder.width == 24


def test_frames_are_repeated_as_evenly_as_can_be():
    for total in range(1, 12):
        for wanted in range(1, 20):
            places = spread(total, wanted)
            counts = [places.count(place) for place in range(total)]
            assert len(places) == wanted and places == sorted(places) and max(counts) - min(counts) <= 1


def test_a_file_gives_the_frames_of_its_places(saved, tmp_path):
    modality = Video(Video.Config(encoder=str(saved / "videomae")))
    for count in (1, 3, 40):
        path = write(tmp_path / f"{count}.mp4", numbered(count))
        from_file, from_frames = (modality.load(source)["pixel_values"] for source in (path, numbered(count)))
        assert (from_file - from_frames).abs().mean() < 0.2 and from_file.shape == from_frames.shape


def test_cls_can_be_left_out(saved):
    encoder = Video(Video.Config(encoder=str(saved / "timesformer"), drop_cls=True)).build_encoder()
    assert encoder(pixel_values=torch.rand(1, 4, 3, 32, 32)).shape == (1, 64, 24)
    with pytest.raises(xblip.ConfigError, match=r"a videomae model has no \[CLS\] token"):
        Video(Video.Config(encoder=str(saved / "videomae"), drop_cls=True)).build_encoder()


def test_old_names_of_processors_are_read(saved, tmp_path):
    hf.VideoMAEConfig(**SIZES).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        '{"feature_extractor_type": "VideoMAEFeatureExtractor", "size": 32}'
    )
    values = Video(Video.Config(encoder=str(tmp_path))).load(numbered(4))["pixel_values"]
    assert values.shape[:3] == (1, 4, 3)


def test_pickles_for_workers_after_use(saved):
    modality = Video(Video.Config(encoder=str(saved / "videomae")))
    expected = modality.load(numbered(5))["pixel_values"]
    assert torch.equal(pickle.loads(pickle.dumps(modality)).load(numbered(5))["pixel_values"], expected)


def test_pictures_of_several_sizes_are_refused(saved):
    sizes = [np.zeros((9, 9, 3), np.uint8), np.zeros((9, 8, 3), np.uint8)]
    fails(Video(Video.Config(encoder=str(saved / "videomae"))), sizes, "2 sizes", "(8, 9) and (9, 9)", "Resize them")


def test_a_missing_processor_is_one_clear_error(tmp_path):
    MODELS["videomae"]()[0].save_pretrained(tmp_path)
    with pytest.raises(xblip.BundleError, match=r"Cannot load the processor of the video encoder .* save_pretrained"):
        Video(Video.Config(encoder=str(tmp_path))).load(numbered(4))


def test_a_processor_of_another_encoder_is_one_clear_error(tmp_path):
    model, processor = MODELS["videomae"]()
    model.save_pretrained(tmp_path)
    type(processor)(size={"shortest_edge": 40}, crop_size={"height": 40, "width": 40}).save_pretrained(tmp_path)
    modality = Video(Video.Config(encoder=str(tmp_path)))
    with pytest.raises(xblip.BundleError, match="cannot read what the processor beside it gives"):
        modality.build_encoder()(**modality.load(numbered(4)))


def test_an_encoder_of_sounds_is_refused(tmp_path):
    sizes = dict(max_length=64, num_mel_bins=32, hidden_size=24, num_hidden_layers=1, num_attention_heads=2)
    hf.ASTModel(hf.ASTConfig(**sizes)).save_pretrained(tmp_path)
    with pytest.raises(xblip.BundleError, match=r"an? audio-.* model, which reads input_values \(it belongs to the"):
        Video(Video.Config(encoder=str(tmp_path))).build_encoder()


def test_pictures_and_videos_share_one_encoder(tmp_path):
    pytest.importorskip("xblip_image")
    encoder, bundle = tmp_path / "encoder", tmp_path / "bundle"
    sizes = {name: size for name, size in SIZES.items() if name != "num_frames"}
    hf.CLIPVisionModel(hf.CLIPVisionConfig(**sizes)).save_pretrained(encoder)
    hf.CLIPImageProcessor(**SQUARE).save_pretrained(encoder)
    llm = FrozenLLM.from_pretrained(LLMConfig(source=str(save_toy_llm(tmp_path / "llm"))))
    settings = {"config": {"encoder": str(encoder), "layer": -2, "drop_cls": True}, "bridge": {"kind": "linear"}}
    branches = {name: Branch.build(BranchConfig(name, **settings), llm_width=llm.width) for name in ("image", "video")}
    xblip.XBlip(llm=llm, branches=branches).save_pretrained(bundle)
    model = xblip.load(bundle)
    image, video = (model.branches[name].encoder.module for name in ("image", "video"))
    assert image is video and len(list((bundle / "encoders").iterdir())) == 1
    assert {branch.modality.config.layer for branch in model.branches.values()} == {-2}
    assert model.branches["video"].encode([numbered(3)]).values.shape == (3, 16, 24)


@pytest.mark.parametrize("name", list(MODELS))
def test_an_encoder_of_whole_videos_gets_parts_too(saved, name):
    modality = Video(Video.Config(encoder=str(saved / name)))
    frames = numbered(8)
    crop = modality.config.augment.drawn(96, 64, np.random.default_rng(2))
    parts = [crop.of(PIL.Image.fromarray(frame)) for frame in frames]
    actual = modality.augmented(frames, np.random.default_rng(2))["pixel_values"]
    assert actual.shape == (1, 4, 3, 32, 32)
    assert torch.equal(actual, modality.load(parts)["pixel_values"])
    assert not torch.equal(actual, modality.load(frames)["pixel_values"])
