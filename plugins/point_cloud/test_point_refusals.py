"""What the point_cloud modality refuses, and how it says so."""

import io
import os
import struct
import zipfile

import numpy as np
import pytest
import torch
from point_shapes import CORNERS, FACES, glb, noise, obj, off, pcd, ply, stl
from transformers import ViTConfig, ViTModel
from xblip_point_cloud import TETRAHEDRON, PointCloud
from xblip_point_process import OPEN3D

import xblip


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros((0, 3)), "it holds no points"),
        (np.zeros((3, 50)), r"it has shape \(3, 50\).*transpose it"),
        (np.zeros((50, 4)), r"it has shape \(50, 4\). Expected one cloud of shape \(points, 3\)"),
        (torch.zeros(1, 50, 3), r"it has shape \(1, 50, 3\)"),
        (np.zeros((5, 3), complex), "it holds complex128 values. Expected real numbers"),
        (np.zeros((5, 3), bool), "it holds bool values"),
        (np.array([[0, 0, 0], [np.nan, 0, 0], [0, np.inf, 0]]), "2 of its 3 points are NaN or infinite"),
        (np.array([[0, 0, 0, 1, np.nan, 1]]), "1 of its 1 points are NaN"),
        (np.array([[0, 0, 0, 0, 128, 255]]), "colours range from 0 to 255.*divide 0..255 by 255"),
        (np.array([[0, 0, 0, -1, 0, 0]]), "colours range from -1 to 0"),
        (np.ma.array(np.zeros((5, 3)), mask=np.eye(5, 3)), "it is a masked array"),
        (torch.zeros(5, 3, device="meta"), "numpy cannot take it"),
        ([[0, 0, 0]], "given as list: expected a file .* or a numpy array or tensor"),
        (7, "given as int: expected a file"),
        (b"1 2 3\n4 5 6\n", "no ending that names its format.*Give the path of a file that ends in .ply"),
        (io.StringIO("1 2 3"), "it is open as text. Open it in binary mode"),
        (b"", "it is empty"),
    ],
)
def test_objects(modality, source, message):
    with pytest.raises(xblip.MediaError, match=message):
        modality().load(source)


SLOW = {
    "text.off",
    "zeros.off",
    "text.stl",
    "points_only.obj",
    "cut_face.obj",
    "cut.off",
    "cut.stl",
    "absurd.off",
}


def npy(header="{}", version=1, length=None):
    """The beginning of a .npy file, of which two numbers follow."""
    size = struct.pack("<H" if version == 1 else "<I", len(header) if length is None else length)
    return b"\x93NUMPY" + bytes([version, 0]) + size + header.encode() + bytes(16)


TEXT = b"this is a text and no shape at all\n" * 20
FILES = {
    "text.ply": (TEXT, "it has no PLY header"),
    "text.xyz": (TEXT, "could not convert string"),
    "text.npy": (TEXT, "its first bytes are of no array"),
    "text.npz": (TEXT, "not a zip archive"),
    "text.pcd": (TEXT, "its header has the line 'this is a text"),
    "no_data.pcd": (pcd(noise(5), DATA=None), "its header has the line '-?[0-9]"),
    "cut_header.pcd": (pcd(noise(5))[:80], "its header has no DATA line"),
    "no_size.pcd": (pcd(noise(5), SIZE=None), "its header has no SIZE"),
    "data.pcd": (pcd(noise(5)).replace(b"DATA ascii", b"DATA foo"), "its DATA is 'foo', not ascii"),
    "count.pcd": (pcd(noise(5), COUNT="1 1 9"), "it has 5 rows of 3 numbers; declared are 5 of 11"),
    "counts.pcd": (pcd(noise(5), COUNT="1 1"), "its COUNT is '1 1'; expected 3 whole numbers"),
    "type.pcd": (pcd(noise(5), TYPE="F F X"), "its field 'z' has TYPE X, SIZE 4, COUNT 1"),
    "types.pcd": (pcd(noise(5), TYPE="F F"), "its TYPE has 2 entries for 3 fields"),
    "size.pcd": (pcd(noise(5), SIZE="4 4 3"), "its field 'z' has TYPE F, SIZE 3, COUNT 1"),
    "width.pcd": (pcd(noise(5), WIDTH=9), "its WIDTH x HEIGHT is 9 x 1, but its POINTS are 5"),
    "points.pcd": (pcd(noise(5), POINTS="5.5"), "its POINTS is '5.5'; expected 1 whole numbers"),
    "more.pcd": (pcd(noise(5)) + b"1 2 3\n", "it has 6 rows of 3 numbers; declared are 5 of 3"),
    "short_row.pcd": (pcd(noise(5)) + b"1 2\n", "number of columns changed"),
    "word.pcd": (pcd(noise(5)) + b"1 two 3\n", "could not convert string 'two'"),
    "no_z.pcd": (pcd(noise(5), FIELDS="x y q"), "its points have no single field 'z'"),
    "empty.pcd": (pcd(np.empty((0, 3))), "it holds no points"),
    "more_binary.pcd": (pcd(noise(5), "binary") + b"1", "its body has 61 bytes where 60 are declared"),
    "cut_compressed.pcd": (pcd(noise(5), "binary_compressed")[:-1], "bytes where [0-9]+ are declared"),
    "text.obj": (TEXT, "crashed|finds no mesh"),
    "text.off": (TEXT, "Read OFF failed"),
    "zeros.off": (bytes(6_000), "Read OFF failed"),
    "text.stl": (TEXT, "finds no mesh"),
    "text.glb": (TEXT, "its JSON is damaged: Expecting value"),
    "unknown.abc": (TEXT, '".abc" is not a known ending'),
    "cut.ply": (ply(noise(50))[:-30], "ends before all of the 50 rows of its element 'vertex'"),
    "cut_binary.ply": (
        ply(noise(50), encoding="binary_big_endian")[:-1],
        "ends before all of the 50 rows of its element 'vertex'",
    ),
    "cut_faces.ply": (TETRAHEDRON.encode()[:-4], "ends before all of the 4 rows of its element 'face'"),
    "cut_binary_faces.ply": (
        ply(CORNERS, encoding="binary_little_endian", faces=FACES.tolist())[:-12],
        "ends before all of the 4 rows of its element 'face'",
    ),
    "cut_header.ply": (TETRAHEDRON.encode()[:60], "it has no PLY header"),
    "cut.pcd": (pcd(noise(50))[:-100], "number of columns changed|it has 4[0-9] rows"),
    "cut_binary.pcd": (pcd(noise(50), "binary")[:-1], "its body has 599 bytes where 600 are declared"),
    "cut.off": (off()[:-4], "Read OFF failed"),
    "cut.stl": (stl()[:-10], "finds no mesh"),
    "cut.glb": (glb([{}])[:-10], "it is cut short: [0-9]+ of [0-9]+ bytes are there"),
    "cut.xyz": (b"1 2 3\n4 5 6\n7 8\n", "number of columns changed"),
    "cut_face.obj": (obj([0, 1, 2], [1, 2, 77]), "finds no mesh"),
    "points_only.obj": (obj(), "finds no mesh"),
    "empty.ply": (ply([]), "it holds no points"),
    "no_z.ply": (ply(noise(5)[:, :2], columns="x y"), "its vertices have no property 'z'"),
    "bad_line.ply": (TETRAHEDRON.replace("property float z", "propertz").encode(), "the line 'propertz'"),
    "negative.ply": (TETRAHEDRON.replace("vertex 4", "vertex -1").encode(), "the line 'element vertex -1'"),
    "no_format.ply": (TETRAHEDRON.replace("format ascii 1.0\n", "").encode(), "its header has no format line"),
    "type.ply": (TETRAHEDRON.replace("float z", "real z").encode(), "the line 'property real z'"),
    "list_type.ply": (TETRAHEDRON.replace("uchar int", "uchar real").encode(), "the line 'property list uchar real"),
    "early.ply": (b"ply\nformat ascii 1.0\nproperty float x\nend_header\n", "the line 'property float x'"),
    "word.ply": (TETRAHEDRON.replace("0 1 0", "0 one 0").encode(), "could not convert"),
    "fraction.ply": (TETRAHEDRON.replace("3 1 2 3", "3 1 2 2.5").encode(), "its vertex indices are not all whole"),
    "length.ply": (TETRAHEDRON.replace("3 1 2 3", "2.5 1 2 3").encode(), "its lengths of lists are not all whole"),
    "length_negative.ply": (TETRAHEDRON.replace("3 1 2 3", "-3 1 2 3").encode(), "'face' has length -3"),
    "bad_index.ply": (TETRAHEDRON.replace("3 1 2 3", "3 1 2 4").encode(), "vertices that do not exist"),
    "nan.xyz": (b"0 0 0\nnan 0 0\n", "1 of its 2 points are NaN"),
    "normals.xyz": (
        b"0 0 0 0 -1 0\n",
        "colours range from -1 to 0.*leave out columns that are no colour",
    ),
    "many.ply": (ply(noise(2001)), "it has 2001 or more points.*at most 2000"),
    "many.xyz": (b"0 0 0\n" * 2001, "it has 2001 or more points.*at most 2000"),
    "many.pcd": (pcd(noise(2001), "binary"), "it has 2001 or more points.*at most 2000"),
    "absurd.ply": (
        TETRAHEDRON.replace("vertex 4", "vertex 999999999999").encode(),
        "at most 2000 are read",
    ),
    "digits.ply": (TETRAHEDRON.replace("vertex 4", "vertex " + "9" * 5000).encode(), "the line 'element vertex 9{65}'"),
    "long_line.ply": (TETRAHEDRON.replace("float z", "float z " + "z" * 500).encode(), "'property float z z{63}'"),
    "version3.npy": (npy(version=3), "its array is of version 3.0, which plain numbers do not need"),
    "long_header.npy": (npy(version=2, length=2**31), "the header of its array claims 2147483648 bytes"),
    "word.npy": (npy("{'descr': '<f8', 'shape': (2, 3"), "the header of its array is damaged"),
    "negative.npy": (npy("{'descr': '<f8', 'fortran_order': False, 'shape': (-2, 3)}"), "the shape .-2, 3."),
    "promise.npy": (
        npy("{'descr': '<f8', 'fortran_order': False, 'shape': (99, 3)}"),
        "its array declares 2376 bytes, but",
    ),
    "huge.npy": (
        npy("{'descr': '<f8', 'fortran_order': False, 'shape': (3, 99999999)}"),
        "it has 49999999 or more points",
    ),
    "bomb.pcd": (pcd(noise(99), "binary_compressed", POINTS=10**8, WIDTH=10**8), "it has 100000000 or more points"),
    "packed.pcd": (
        pcd(noise(5), "binary_compressed", COUNT="1 1 60000").partition(b"compressed\n")[0]
        + b"compressed\n"
        + struct.pack("<II", 4, 5 * 240_008)
        + bytes(4),
        "its body of 4 bytes cannot unpack to the 1200040 that are declared",
    ),
    "other.gltf": (
        b'{"buffers": [{"byteLength": 4, "uri": "../a.bin"}]}',
        "names another file, '../a.bin': pack all into",
    ),
    "escaped.gltf": (b'{"images": [{"\\u0075ri": "a.png"}]}', "names another file, 'a.png'"),
    "twice.gltf": (b'{"uri": "a", "uri": "data:"}', "its JSON says something twice"),
    "number.gltf": (b'{"uri": 3}', "names another file, '3'"),
    "deep.gltf": (b"[" * 100_000, "its JSON is damaged: it is nested too deep"),
    "list.gltf": (b"[]", "its JSON is no object"),
    "text.gltf": (TEXT, "its JSON is damaged: Expecting value"),
    "latin.gltf": (b'{"a": "\xff"}', "bytes that are no text where text must be"),
    "short.glb": (b"glTF\2\0\0\0", "it ends within its header"),
    "old.glb": (glb([{}]).replace(b"glTF\2", b"glTF\1"), "its header is of no glTF 2.0"),
    "other.glb": (glb([{}]).replace(b'"byteLength": 136}', b'"uri": "/etc/host"}'), "names another file, '/etc/host'"),
    "absurd.off": (b"OFF\n900000000 1 0\n0 0 0\n", "more than 8 GiB of memory"),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in FILES])
def test_files(modality, tmp_path, name, capfd):
    content, message = FILES[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(xblip.MediaError, match=message) as caught:
        modality(max_points=2000).load(path)
    assert name in str(caught.value)
    assert "open3d" not in capfd.readouterr().out.lower(), "open3d's warnings are not for our user's terminal"


@pytest.mark.slow
def test_a_mesh_opens_no_other_file(modality, tmp_path):
    """Whoever opened this pipe would wait for its other end until the time is over."""
    os.mkfifo(tmp_path / "materials.mtl")
    (tmp_path / "models").mkdir()
    path = tmp_path / "models" / "mesh.obj"
    path.write_bytes(b"mtllib ../materials.mtl\n" + obj(*FACES.tolist()))
    assert modality(timeout_seconds=60).load(path)["points"].shape == (1, 64, 3)


@pytest.mark.parametrize(
    ("shape", "message"),
    [((10**12, 3), "it has 1000000000000 or more points"), ((1000, 3), "declares 24000 bytes, but 48 are there")],
)
def test_an_array_larger_than_its_file_is_refused(modality, tmp_path, shape, message):
    member = io.BytesIO()
    np.lib.format.write_array_header_1_0(member, {"descr": "<f8", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(tmp_path / "claim.npz", "w") as archive:
        archive.writestr("points.npy", member.getvalue() + bytes(48))
    with pytest.raises(xblip.MediaError, match=message):
        modality(max_points=2000).load(tmp_path / "claim.npz")


def test_arrays_in_files(modality, tmp_path):
    np.save(tmp_path / "objects.npy", np.array([{}], object), allow_pickle=True)
    np.savez(tmp_path / "objects.npz", points=np.array([{}], object), allow_pickle=True)
    np.save(tmp_path / "many.npy", np.zeros((2001, 3)))
    np.savez_compressed(tmp_path / "many.npz", np.zeros((10_000, 3)))
    np.savez(tmp_path / "which.npz", left=noise(5), right=noise(5))
    np.save(tmp_path / "whole.npy", noise(50))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "whole.npy").read_bytes()[:-1])
    for name, message in {
        "objects.npy": "Python objects",
        "objects.npz": "Object arrays cannot be loaded",
        "many.npy": "it has 2001 or more points",
        "many.npz": "it has 10000 or more points",
        "which.npz": 'it holds the arrays left, right. Expected one called "points" or "arr_0"',
        "cut.npy": "its array declares 1200 bytes, but 1199 are there",
    }.items():
        with pytest.raises(xblip.MediaError, match=message):
            modality(max_points=2000).load(tmp_path / name)


def test_a_reader_that_does_not_finish_is_given_up(modality, tmp_path):
    OPEN3D.close()  # importing it takes longer
    path = tmp_path / "mesh.off"
    path.write_bytes(off())
    with pytest.raises(xblip.MediaError, match=r"did not finish within 0.01 seconds.*timeout_seconds"):
        modality(timeout_seconds=0.01).load(path)


def test_without_open3d_the_other_formats_go_on_working(modality, tmp_path, monkeypatch):
    OPEN3D.close()  # which another test may have started
    (tmp_path / "open3d.py").write_text("raise ImportError('libGL.so.1: cannot open shared object file')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    path = tmp_path / "mesh.off"
    path.write_bytes(off())
    with pytest.raises(xblip.PluginError, match=r"needs open3d.*libGL.so.1.*convert the file to .ply"):
        modality().load(path)
    for source in (TETRAHEDRON.encode(), noise(9)):
        assert modality().load(source)["points"].shape == (1, 64, 3)


@pytest.mark.slow
def test_what_open3d_lacks_can_be_asked_for(tmp_path, monkeypatch):
    (needed,) = PointCloud.diagnose().values()
    assert needed()[0].isdigit()
    (tmp_path / "libusb_package.py").write_text("raise OSError('libusb-1.0.so.0: cannot open shared object file')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(xblip.PluginError, match=r"libusb-1\.0\.so\.0: cannot open.*Install open3d-cpu"):
        needed()


def test_missing_and_foreign_encoders_are_named(tmp_path):
    vit = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    ViTModel(vit).save_pretrained(tmp_path / "vit")
    for encoder, message in {
        str(tmp_path / "nowhere"): "Cannot read the config of the point_cloud encoder .*nowhere",
        str(tmp_path / "vit"): "is a vit model. Expected a point_bert one",
    }.items():
        broken = PointCloud(PointCloud.Config(encoder=encoder))
        for attempt in (broken.build_encoder, lambda broken=broken: broken.load(noise(9))):
            with pytest.raises(xblip.BundleError, match=message):
                attempt()
