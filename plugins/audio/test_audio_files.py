"""Files of sound: what is read by which decoder, and everything that is refused."""

import io
import itertools
import sys

import numpy as np
import pytest
import soundfile
import torch
from sounds import flac_without_length, noise, pitch, tone, write, write_mp3_without_length
from xblip_audio import Audio
from xblip_audio_files import read_file

import xblip

RATE = 44100
BY_SOUNDFILE = {
    "pcm.wav": {},
    "pcm24.wav": {"subtype": "PCM_24"},
    "float.wav": {"subtype": "FLOAT"},
    "law.wav": {"subtype": "ULAW"},
    "gsm.wav": {"subtype": "GSM610"},
    "g721.wav": {"subtype": "G721_32"},
    "nms.wav": {"subtype": "NMS_ADPCM_32"},
    "sound.flac": {},
    "sound.ogg": {},
    "sound.mp3": {},
    "sound.aiff": {},
    "sound.au": {},
    "sound.caf": {},
    "sound.w64": {},
}
BY_PYAV = {
    "mp3_inside.wav": {"codec": "libmp3lame"},
    "sound.aac": {"container": "adts"},
    "sound.m4a": {"container": "ipod"},
    "sound.mp4": {},
    "index_first.mp4": {"options": {"movflags": "faststart"}},
    "pieces.mp4": {"options": {"movflags": "frag_keyframe+empty_moov"}},
    "with_video.mp4": {"video": True},
    "sound.mov": {},
    "sound.mkv": {},
    "sound.wma": {"codec": "wmav2", "bit_rate": 64000},
    "sound.avi": {"codec": "libmp3lame"},
    "pcm.avi": {"codec": "pcm_s16le"},
}


def decode(source, max_seconds=3600):
    return read_file(xblip.media_file(source, kind="audio"), max_seconds=max_seconds)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two seconds of a tone in every format, by name."""
    folder = tmp_path_factory.mktemp("sounds")
    sound = tone(440, 2, RATE)
    for name, options in BY_SOUNDFILE.items():
        soundfile.write(folder / name, sound, RATE, **options)
    for name, options in BY_PYAV.items():
        write(folder / name, sound, RATE, **options)
    write(folder / "sound.webm", tone(440, 2, 48000), 48000, codec="libopus")
    soundfile.write(folder / "sound.opus", tone(440, 2, 48000), 48000, format="OGG", subtype="OPUS")
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.parametrize("name", [*BY_SOUNDFILE, *BY_PYAV, "sound.webm", "sound.opus"])
def test_every_format_gives_the_sound(files, name):
    for source in (files[name], files[name].read_bytes()):
        samples, rate_hz = decode(source)
        assert samples.dtype == np.float32 and samples.ndim == 1
        assert rate_hz == (48000 if name in ("sound.webm", "sound.opus") else RATE)
        assert len(samples) / rate_hz == pytest.approx(2, abs=0.06)
        assert pitch(samples, rate_hz) == pytest.approx(440, abs=1)
        assert 0.3 < np.sqrt(np.mean(samples[2000:-4000] ** 2)) < 0.4, "the loudness of a sine of 0.5 is 0.35"


@pytest.mark.parametrize("name", ["pcm.wav", "float.wav", "sound.flac", "pcm.avi"])
def test_formats_without_loss_give_every_sample(files, name):
    samples, _ = decode(files[name])
    assert len(samples) == 2 * RATE and np.abs(samples - tone(440, 2, RATE)).max() < 1e-4


def test_an_open_file_is_read(files):
    with files["sound.mp3"].open("rb") as stream:
        assert len(decode(stream)[0]) == len(decode(files["sound.mp3"])[0])


def test_the_whole_of_an_mp3_without_a_length_is_read(tmp_path):
    """libsndfile would guess the length by the bit rate of the quiet beginning, and stop after a third."""
    sound = np.concatenate([noise(RATE * 2) * 0.002, noise(RATE * 6)])
    path = write_mp3_without_length(tmp_path / "sound.mp3", sound, RATE)
    assert len(decode(path)[0]) / RATE == pytest.approx(8, abs=0.1)


def test_a_flac_without_a_length_is_read(files):
    samples, _ = decode(flac_without_length(files["sound.flac"]))
    assert np.abs(samples - tone(440, 2, RATE)).max() < 1e-4


def test_a_wav_without_a_length_is_read(files):
    data = bytearray(files["pcm.wav"].read_bytes())
    data[4:8] = data[40:44] = b"\xff\xff\xff\xff"
    assert len(decode(bytes(data))[0]) == 2 * RATE


CUT = {*BY_SOUNDFILE, *BY_PYAV, "sound.webm", "sound.opus"} - {"sound.mp3", "sound.wma"}


@pytest.mark.parametrize("name", sorted(CUT))
@pytest.mark.parametrize("kept", [0.6, -50])
def test_files_cut_short_are_refused(modality, files, tmp_path, name, kept):
    data = files[name].read_bytes()
    path = tmp_path / name
    path.write_bytes(data[: int(kept * len(data)) if kept > 0 else kept])
    with pytest.raises(xblip.MediaError, match=f"{name}.*damaged or of another format.*Expected a WAV"):
        modality().load(path)


def test_an_mp3_that_counts_its_frames_is_refused_when_cut(modality, files):
    data = files["sound.mp3"].read_bytes()
    with pytest.raises(xblip.MediaError, match=r"it is cut short: [0-9]+ of at least 85896 samples are there"):
        modality().load(data[: len(data) // 2])
    tagged = b"ID3\x04\x00\x00\x00\x00\x01\x00" + bytes(128) + data
    assert len(decode(tagged)[0]) == len(decode(data)[0])
    with pytest.raises(xblip.MediaError, match="it is cut short"):
        modality().load(tagged[: len(tagged) // 2])


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg", ".mp3", ".m4a", ".mp4", ".webm"])
def test_text_is_refused_whatever_its_ending(modality, tmp_path, suffix):
    path = tmp_path / f"text{suffix}"
    path.write_text("this is a text and no sound\n" * 200)
    with pytest.raises(xblip.MediaError, match=f"text{suffix}.*damaged or of another format"):
        modality().load(path)


def test_damage_inside_is_refused(modality, files):
    for name in ("sound.flac", "sound.m4a"):
        data = bytearray(files[name].read_bytes())
        middle = len(data) // 2
        data[middle : middle + 400] = np.random.default_rng(0).bytes(400)
        with pytest.raises(xblip.MediaError, match="damaged or of another format"):
            modality().load(bytes(data))


def test_a_title_that_is_no_utf_8_keeps_no_sound_from_being_heard(files):
    data = files["sound.m4a"].read_bytes()
    assert data.count(b"Lavf") == 1
    assert np.array_equal(decode(data.replace(b"Lavf", b"L\xe4vf"))[0], decode(data)[0])


def test_what_libsndfile_says_is_its_own(files):
    with pytest.raises(xblip.MediaError, match=r"another format \(libsndfile says: Error in WAV file. No 'data' chunk"):
        decode(files["pcm.wav"].read_bytes().replace(b"data", b"atad", 1))


def ogg_pages(data):
    starts = [place for place in range(len(data)) if data[place : place + 4] == b"OggS"]
    return [data[start:end] for start, end in itertools.pairwise([*starts, len(data)])]


@pytest.mark.parametrize("name", ["sound.ogg", "sound.opus"])
def test_an_ogg_file_without_a_page_of_its_middle_is_refused(files, name):
    pages = ogg_pages(files[name].read_bytes())
    middle = len(pages) // 2
    with pytest.raises(xblip.MediaError, match=f"pages are missing before its page {middle + 1}"):
        decode(b"".join(pages[:middle] + pages[middle + 1 :]))


def test_sound_of_which_less_is_there_than_promised_is_refused(tmp_path, monkeypatch):
    """Where a decoder gives less than its header promises, memory must not be taken for sound."""
    soundfile.write(tmp_path / "long.ogg", tone(440, 60), 16000)
    pages = ogg_pages((tmp_path / "long.ogg").read_bytes())
    middle = len(pages) // 2
    monkeypatch.setattr("xblip_audio_files._check_ogg", lambda stream: None)
    with pytest.raises(xblip.MediaError, match="it is cut short: [0-9]+ of at least 960000 samples are there"):
        decode(b"".join(pages[:middle] + pages[middle + 2 :]))


@pytest.mark.parametrize("name", ["sound.ogg", "sound.opus"])
def test_ogg_files_in_a_row_are_refused(files, name):
    with pytest.raises(xblip.MediaError, match="it is several Ogg files in a row"):
        decode(files[name].read_bytes() * 2)


@pytest.mark.parametrize("name", ["sound.raw", "-", "12:30.wav", "clip:1.mp3"])
def test_a_file_may_have_any_name(files, tmp_path, monkeypatch, name):
    original = files["sound.mp3" if name.endswith("mp3") else "pcm.wav"]
    (tmp_path / name).write_bytes(original.read_bytes())
    monkeypatch.chdir(tmp_path)
    assert np.array_equal(decode(name)[0], decode(original)[0])


@pytest.mark.filterwarnings("error")
def test_infinities_that_cancel_out_are_one_error_and_no_warning(modality, tmp_path):
    sound = np.stack([noise(1000), noise(1000)], 1)
    sound[5] = np.inf, -np.inf
    soundfile.write(tmp_path / "broken.wav", sound, 16000, subtype="FLOAT")
    for source in (tmp_path / "broken.wav", (sound.T, 16000)):
        with pytest.raises(xblip.MediaError, match="1 of its 1000 samples are NaN or infinite"):
            modality().load(source)


def test_a_file_with_huge_samples_is_refused(modality, tmp_path):
    sound = noise(1000)
    sound[5] = 1e30
    soundfile.write(tmp_path / "huge.wav", sound, 16000, subtype="FLOAT")
    with pytest.raises(xblip.MediaError, match=r"huge.wav.*its samples reach 1e\+30. Expected floats in"):
        modality().load(tmp_path / "huge.wav")


def test_a_video_without_sound_is_refused(modality, tmp_path):
    path = write(tmp_path / "silent.mp4", None, RATE, video=True, sound=False)
    with pytest.raises(xblip.MediaError, match=r"silent.mp4.*it has no audio track. Expected a WAV"):
        modality().load(path)


def test_a_playlist_opens_no_other_file(modality, files, tmp_path):
    path = tmp_path / "list.m3u8"
    path.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{files['sound.aac']}\n#EXT-X-ENDLIST\n")
    with pytest.raises(xblip.MediaError, match="damaged or of another format"):
        modality().load(path)


def test_a_file_without_samples_is_refused(modality, tmp_path):
    soundfile.write(tmp_path / "nothing.wav", np.zeros(0), 16000)
    with pytest.raises(xblip.MediaError, match=r"nothing.wav.*it holds no samples. Expected at least one"):
        modality().load(tmp_path / "nothing.wav")


def test_a_file_with_nan_is_refused(modality, tmp_path):
    sound = noise(1000)
    sound[5:8] = np.nan, np.inf, -np.inf
    soundfile.write(tmp_path / "broken.wav", sound, 16000, subtype="FLOAT")
    with pytest.raises(xblip.MediaError, match="3 of its 1000 samples are NaN or infinite"):
        modality().load(tmp_path / "broken.wav")


@pytest.mark.parametrize("name", ["pcm.wav", "sound.mp3", "sound.mp4"])
def test_long_files_are_refused(modality, files, name):
    with pytest.raises(xblip.MediaError, match=r"or more; at most 1.5 are read. Cut it, or raise max_seconds"):
        modality(max_seconds=1.5).load(files[name])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (noise(100), r"given as ndarray: expected a file .* or a tuple \(samples, sample_rate_hz\)"),
        (torch.zeros(100), r"given as Tensor: expected a file .* e.g. \(samples, 16000\)"),
        ([0.0, 1.0], "given as list: expected a file"),
        (([0.0, 1.0], 16000), "given as tuple: expected a file"),
        (7, "given as int: expected a file"),
        ((noise(100), 16000.0), "its sampling rate is 16000.0. Expected a whole number of hertz"),
        ((noise(100), 0), "its sampling rate is 0. Expected"),
        ((noise(100), True), "its sampling rate is True. Expected"),
        ((noise(100), 15991), "sampling rate of 15991 Hz cannot be brought to 16000 Hz. Convert it"),
        ((noise(0), 16000), "it holds no samples"),
        ((noise(100) * np.nan, 16000), "100 of its 100 samples are NaN or infinite. Give finite ones"),
        ((noise(200).reshape(100, 2), 16000), r"have shape \(100, 2\). Expected \(samples,\).*transpose"),
        ((noise(8).reshape(2, 2, 2), 16000), r"have shape \(2, 2, 2\)"),
        ((np.zeros((0, 100), np.float32), 16000), r"have shape \(0, 100\)"),
        ((np.zeros(100, np.uint8), 16000), "its samples are uint8. Expected floats in .* or int16"),
        ((np.zeros(100, complex), 16000), "its samples are complex128"),
        (
            (noise(100) * 30000, 16000),
            "its samples reach 14.*divide 16-bit values by 32768",
        ),
        ((np.zeros(100, np.float32), 1 / 50), "its sampling rate is 0.02"),
        ((noise(200), 1), "it lasts 200 seconds or more; at most 60 are read"),
        (np.ma.array([0.5, 0.5], mask=[0, 1]), "given as MaskedArray: expected a file"),
        ((np.ma.array([0.5, 0.5], mask=[0, 1]), 16000), "it is a masked array"),
        ((torch.zeros(9).to_sparse(), 16000), "numpy cannot take it"),
        ((np.full(100, 1e300), 16000), r"its samples reach 1e\+300"),
        (b"", "it is empty"),
        (io.StringIO("text"), "it is open as text. Open it in binary mode"),
        ("https://example.org/sound.wav", "URLs are not fetched"),
    ],
)
def test_wrong_objects_are_refused(modality, source, message):
    with pytest.raises(xblip.MediaError, match=message):
        modality(max_seconds=60).load(source)


def test_no_clips_at_all_cannot_be_asked_for(modality):
    with pytest.raises(xblip.ConfigError, match="max_clips of a sound must be at least 1, not 0"):
        modality(max_clips=0).load((noise(100), 16000))


@pytest.mark.parametrize(
    ("cuda", "message"),
    [(None, r"\(the CPU, beside which no build for CUDA loads\)"), ("13.0", r"\(CUDA 13\.0\); other modalities work")],
)
def test_a_torchaudio_for_another_torch_is_explained(monkeypatch, cuda, message):
    monkeypatch.setitem(sys.modules, "torchaudio", None)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    with pytest.raises(xblip.PluginError, match=message):
        Audio.diagnose()["torchaudio"]()


def test_what_it_needs_can_be_asked_for():
    found = {name: needed() for name, needed in Audio.diagnose().items()}
    assert list(found) == ["torchaudio", "libsndfile, by soundfile", "FFmpeg, by PyAV"] and all(found.values())


@pytest.mark.parametrize(
    ("package", "name", "message"),
    [
        ("torchaudio", "pcm.wav", r"audio needs torchaudio.*Install the torchaudio that was built for torch \d"),
        ("soundfile", "pcm.wav", "its format needs soundfile.*pip install soundfile"),
        ("av", "sound.mp4", "its format needs av.*pip install av"),
    ],
)
def test_a_missing_package_is_named(modality, files, monkeypatch, package, name, message):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(xblip.PluginError, match=message):
        modality().load(files[name])
