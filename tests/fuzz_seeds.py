"""Small whole files of every container and encoding that the modalities read, to be broken by `fuzz_media`.

They are made when they are needed, by the writers of the plugins' own tests: what is committed of them are the mutations
that found something.
"""

import base64
import io
import json
import os
import warnings
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path

import numbered_videos
import numpy as np
import PIL.Image
import point_shapes
import soundfile
import sounds

Seeds = dict[str, bytes]
RATE_HZ = 16_000


def seeds(modality: str, folder: Path) -> Seeds:
    """Returns whole files by their names, of some hundred bytes to some thousand each.

    Args:
      modality: which reads them.
      folder: an empty one, to write in.
    """
    makers: dict[str, Callable[[Path], Iterator[tuple[str, bytes]]]] = {
        "image": _pictures,
        "audio": _sounds,
        "video": _videos,
        "point_cloud": _clouds,
    }
    found = dict(makers[modality](folder))
    demo = files("xblip_numerals") / "demo" / modality
    found |= {f"demo-{file.name}": file.read_bytes() for file in demo.iterdir() if len(file.read_bytes()) < 100_000}
    return dict(sorted(found.items()))


def of_others(modality: str, data: Path, count: int) -> Seeds:
    """Returns some of the public files that the numerals model was trained on, where they are; they are not ours to keep."""
    found: Seeds = {}
    suffixes = {
        "image": (".png", ".jpg"),
        "audio": (".wav", ".flac"),
        "video": (".mp4",),
        "point_cloud": (".ply", ".off"),
    }
    for folder, _, names in sorted(os.walk(data)):
        ours = sorted(name for name in names if name.endswith(suffixes[modality]))[:count]
        found |= {f"{Path(folder).name}-{name}": Path(folder, name).read_bytes() for name in ours}
    return {name: content for name, content in found.items() if len(content) < 50_000}


def _pictures(folder: Path) -> Iterator[tuple[str, bytes]]:
    ramp = np.linspace(0, 255, 24 * 20 * 3).reshape(24, 20, 3).astype(np.uint8)
    rgb = PIL.Image.fromarray(ramp)
    noisy = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8))
    alpha = rgb.copy()
    alpha.putalpha(128)
    grey16 = PIL.Image.fromarray(ramp[..., 0].astype(np.uint16) * 257)
    real = PIL.Image.fromarray(ramp[..., 0].astype(np.float32) / 255)
    exif = PIL.Image.Exif()
    exif[274] = 6

    def saved(picture: PIL.Image.Image, form: str, **options) -> bytes:
        with io.BytesIO() as file:
            picture.copy().save(file, form, **options)  # what one format leaves at a picture irks the next
            return file.getvalue()

    for mode in ("1", "L", "LA", "P", "RGB"):
        yield f"{mode.lower()}.png", saved(alpha.convert(mode), "PNG")
    yield "grey16.png", saved(grey16, "PNG")
    yield "transparent.png", saved(rgb.convert("P"), "PNG", transparency=0)
    yield "rich.png", saved(alpha, "PNG", exif=exif, icc_profile=b"profile" * 40, dpi=(72, 72))
    yield "moving.png", saved(rgb, "PNG", save_all=True, append_images=[noisy])
    for mode in ("L", "RGB", "CMYK"):
        yield f"{mode.lower()}.jpg", saved(rgb.convert(mode), "JPEG")
    yield "progressive.jpg", saved(noisy, "JPEG", progressive=True, exif=exif)
    yield "restart.jpg", saved(noisy, "JPEG", restart_marker_blocks=1, icc_profile=b"profile" * 40)
    yield "lossy.webp", saved(rgb, "WEBP")
    yield "lossless.webp", saved(alpha, "WEBP", lossless=True, exif=exif)
    yield "moving.webp", saved(alpha, "WEBP", save_all=True, append_images=[noisy])
    yield "still.gif", saved(rgb, "GIF")
    yield "moving.gif", saved(rgb, "GIF", save_all=True, append_images=[noisy], transparency=0)
    for mode in ("1", "P", "RGB"):
        yield f"{mode.lower()}.bmp", saved(rgb.convert(mode), "BMP")
    for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits", "lzma", "zstd"):
        yield f"{compression}.tiff", saved(rgb, "TIFF", compression=compression)
    for compression in ("group3", "group4"):
        yield f"{compression}.tif", saved(rgb.convert("1"), "TIFF", compression=compression)
    yield "real.tiff", saved(real, "TIFF")
    yield "grey16.tiff", saved(grey16, "TIFF")
    yield "big.tiff", saved(rgb, "TIFF", big_tiff=True, exif=exif)
    yield "pages.tiff", saved(rgb, "TIFF", save_all=True, append_images=[noisy])
    for mode in ("1", "L", "RGB"):
        yield f"{mode.lower()}.ppm", saved(rgb.convert(mode), "PPM")
    yield "text.ppm", b"P3 # a comment\n2 2\n255\n" + b" ".join(b"%d" % value for value in range(12))
    yield "grey16.pgm", saved(grey16, "PPM")
    yield "real.pgm", saved(real, "PPM")
    yield "still.avif", saved(alpha, "AVIF", exif=exif)
    yield "moving.avif", saved(rgb, "AVIF", save_all=True, append_images=[noisy])


def _sounds(folder: Path) -> Iterator[tuple[str, bytes]]:
    samples = sounds.tone(440, 0.15) + sounds.noise(2400) / 8
    stereo = np.stack([samples, -samples], 1)

    def written(name: str, values: np.ndarray = samples, rate_hz: int = RATE_HZ, **options) -> tuple[str, bytes]:
        soundfile.write(folder / name, values, rate_hz, **options)
        return name, (folder / name).read_bytes()

    for subtype in (
        "PCM_U8",
        "PCM_16",
        "PCM_24",
        "PCM_32",
        "FLOAT",
        "DOUBLE",
        "ULAW",
        "IMA_ADPCM",
        "MS_ADPCM",
        "GSM610",
    ):
        yield written(f"{subtype.lower()}.wav", subtype=subtype)
    yield written("stereo.wav", stereo, 44_100)
    yield written("extensible.wav", stereo, format="WAVEX")
    yield written("long.wav", format="RF64")
    yield written("mono.flac", rate_hz=8_000)
    yield written("stereo.flac", stereo, 44_100, subtype="PCM_24")
    yield "endless.flac", sounds.flac_without_length(folder / "mono.flac")
    yield written("vorbis.ogg", subtype="VORBIS")
    yield written("opus.ogg", subtype="OPUS", rate_hz=48_000)
    yield written("constant.mp3")
    yield written("variable.mp3", stereo, 44_100, bitrate_mode="VARIABLE")
    yield "plain.mp3", sounds.write_mp3_without_length(folder / "plain.mp3", samples, RATE_HZ).read_bytes()
    for ending, subtype in (
        ("aiff", "PCM_16"),
        ("aiff", "FLOAT"),
        ("au", "ULAW"),
        ("caf", "ALAC_16"),
        ("caf", "PCM_16"),
    ):
        name, data = written(f"{subtype.lower()}.{ending}", subtype=subtype)
        yield f"{name}.wav" if ending in ("au", "caf") else name, data
    packed = {
        "mpeg4.m4a": {},
        "alac.m4a": {"codec": "alac"},
        "fragments.m4a": {"options": {"movflags": "frag_keyframe+empty_moov"}},
        "adts.aac": {"container": "adts"},
        "opus.webm": {"codec": "libopus", "container": "webm"},
        "flac.mkv": {"codec": "flac", "container": "matroska"},
        "windows.wma": {"codec": "wmav2", "container": "asf"},
        "mp3.wav": {"codec": "libmp3lame", "container": "wav"},
        "film.mp4": {"video": True},
    }
    for name, options in packed.items():
        rate_hz = 48_000 if "opus" in name else RATE_HZ
        yield name, sounds.write(folder / name, samples, rate_hz, **options).read_bytes()


def _videos(folder: Path) -> Iterator[tuple[str, bytes]]:
    os.environ.setdefault("SVT_LOG", "1")  # errors alone, of the encoder of AV1
    fragments = {"container_options": {"movflags": "frag_keyframe+empty_moov"}, "options": {"g": "2"}}
    packed = {
        "h264.mp4": {"options": {"g": "3", "bf": "2"}},
        "intra.mp4": {"options": {"g": "1"}},
        "fast.mp4": numbered_videos.FASTSTART,
        "fragments.mp4": fragments,
        "turned.mp4": {"rotation": {"degrees": 90}},
        "uneven.mp4": {"ticks": [0, 10, 400, 410, 420, 2_000]},
        "hevc.mp4": {"codec": "libx265", "options": {"x265-params": "log-level=none:pools=none"}},
        "mpeg4.mp4": {"codec": "mpeg4"},
        "h264.mov": {},
        "mjpeg.mov": {"codec": "mjpeg"},
        "av1.mkv": {"codec": "libsvtav1", "options": {"preset": "13"}},
        "ffv1.mkv": {"codec": "ffv1"},
        "h264.mkv": {},
        "vp8.webm": {"codec": "libvpx"},
        "vp9.webm": {"codec": "libvpx-vp9"},
        "live.webm": {"codec": "libvpx", "container_options": {"live": "1"}},
        "mpeg4.avi": {"codec": "mpeg4", "options": {"bf": "2"}},
        "mjpeg.avi": {"codec": "mjpeg"},
        "h264.avi": {},
        "mpeg2.mkv": {"codec": "mpeg2video"},
    }
    for name, options in packed.items():
        large = "av1" in name or "hevc" in name  # their encoders cannot do with less: x265 writes where it must not
        frames = numbered_videos.numbered(6, 64, 64) if large else numbered_videos.numbered(6, 32, 48)
        yield name, numbered_videos.write(folder / name, frames, **options).read_bytes()
    yield "sound.mp4", sounds.write(folder / "sound.mp4", sounds.tone(440, 0.15), RATE_HZ, video=True).read_bytes()
    yield "cover.mp4", numbered_videos.write_audio(folder / "cover.mp4", frames[0]).read_bytes()


def _clouds(folder: Path) -> Iterator[tuple[str, bytes]]:
    points, colored = point_shapes.noise(40), np.concatenate([point_shapes.noise(40), np.full((40, 3), 99)], 1)
    corners, faces = point_shapes.CORNERS, point_shapes.FACES.tolist()
    columns = "x y z red green blue"
    for encoding in ("ascii", "binary_little_endian", "binary_big_endian"):
        short = encoding.rpartition("_")[0] or encoding
        yield f"points_{short}.ply", point_shapes.ply(points, encoding=encoding, kind="double")
        yield f"colors_{short}.ply", point_shapes.ply(colored, encoding=encoding, columns=columns)
        yield f"mesh_{short}.ply", point_shapes.ply(corners, encoding=encoding, faces=faces)
        mixed = [*faces, [0, 1, 2, 3], [0, 1]]
        extra = {"face_extra": ""}
        yield f"mixed_{short}.ply", point_shapes.ply(corners, encoding=encoding, faces=mixed, **extra)
    for data in ("ascii", "binary", "binary_compressed"):
        yield f"{data}.pcd", point_shapes.pcd(points, data)
        yield f"colors_{data}.pcd", point_shapes.pcd(points, data, rgb=np.arange(40), kind="U")
    yield "rows.xyz", "".join(f"{x:.4f} {y:.4f} {z:.4f}\n" for x, y, z in points).encode()
    arrays = {"f8": points, "f4": colored.clip(0, 1).astype(np.float32), "i2": (points * 99).astype(">i2")}
    arrays |= {"turned": np.asfortranarray(points)}
    for name, array in arrays.items():
        with io.BytesIO() as file:
            np.save(file, array)
            yield f"{name}.npy", file.getvalue()
    for name, save in (("stored", np.savez), ("deflated", np.savez_compressed)):
        with io.BytesIO() as file:
            save(file, points=points)
            yield f"{name}.npz", file.getvalue()
    with io.BytesIO() as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        np.lib.format.write_array(file, points, version=(2, 0))
        yield "version2.npy", file.getvalue()
    yield "mesh.obj", b"mtllib none.mtl\no it\n" + point_shapes.obj(*faces, [0, 1, 2, 3])
    yield "mesh.off", point_shapes.off()
    yield "mesh.stl", point_shapes.stl()
    facet = "facet normal 0 0 1\nouter loop\nvertex 0 0 0\nvertex 1 0 0\nvertex 0 1 0\nendloop\nendfacet\n"
    yield "text.stl", f"solid it\n{facet}endsolid it\n".encode()
    binary = point_shapes.glb([{"translation": [1, 2, 3]}, {"scale": [2, 2, 2]}])
    yield "mesh.glb", binary
    yield "mesh.gltf", _gltf(binary)


def _gltf(binary: bytes) -> bytes:
    """A glTF of the same content as a binary one, its buffer in base64."""
    size = int.from_bytes(binary[12:16], "little")
    document, data = json.loads(binary[20 : 20 + size]), binary[28 + size :]
    document["buffers"][0]["uri"] = "data:application/octet-stream;base64," + base64.b64encode(data).decode()
    return json.dumps(document).encode()
