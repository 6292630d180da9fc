"""The modality "point_cloud": 3D files, meshes and arrays of points, encoded by Point-BERT.

Every source becomes one cloud of exactly the number of points that the encoder was made for, by rules without
chance: a mesh is sampled on its surface by a generator of fixed seed, a large cloud is thinned by farthest
point sampling. Equal files therefore give equal features, which is what allows them to be cached.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from xblip_point_files import SUFFIXES, Shape, check, from_array, open3d_version, read_file

import xblip

SEED = 0
SURFACE_POINTS = 4  # drawn on a mesh for each one that farthest point sampling keeps
MAX_SAMPLING_STEPS = 2**30  # points times chosen points: a few seconds of farthest point sampling
ROTATIONS = ("none", "x", "y", "z", "all")
MISSING_COLOR = 0.4  # what OpenShape and Uni3D give clouds without colour
TETRAHEDRON = """ply
format ascii 1.0
element vertex 4
property float x
property float y
property float z
element face 4
property list uchar int vertex_indices
end_header
0 0 0
1 0 0
0 1 0
0 0 1
3 0 2 1
3 0 1 3
3 0 3 2
3 1 2 3
"""


@dataclass
class Changes:
    """What `PointCloud.augmented` does to the points that the encoder would get; colours stay.

    Attributes:
      jitter: standard deviation of noise on each coordinate, in radii of the unit sphere; cut off at five times it.
      scale: least and most that the whole is scaled by.
      rotate: "x", "y" or "z" to turn by any angle about that axis, "all" for any rotation, "none". Files do not say which
        axis is up, so it is turned about none unless told; texts that say "lying" or "on its left" may become wrong by it.
    """

    jitter: float = 0.01
    scale: list[float] = field(default_factory=lambda: [0.8, 1.25])
    rotate: str = "none"

    def __post_init__(self):
        """Raises `ConfigError` for what cannot be."""
        if not 0 <= self.jitter < np.inf:
            raise xblip.ConfigError(f"augment.jitter of a point cloud must be 0 or more, not {self.jitter:g}.")
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1] < np.inf:
            raise xblip.ConfigError(
                "augment.scale of a point cloud must be the least and the most, above 0, such as [0.8, 1.25], not "
                f"{list(self.scale)}."
            )
        if self.rotate not in ROTATIONS:
            raise xblip.ConfigError(
                f'augment.rotate of a point cloud must be one of {", ".join(ROTATIONS)}, not "{self.rotate}".'
            )

    def of(self, points: Tensor, draw: np.random.Generator) -> Tensor:
        """Changes points (..., 3)."""
        turn = rotation(self.rotate, draw) * draw.uniform(*self.scale)
        noise = np.clip(draw.normal(size=points.shape), -5, 5) * self.jitter
        return (points.double() @ torch.from_numpy(turn).T + torch.from_numpy(noise)).to(points.dtype)


class PointCloud(xblip.Modality):
    """Point clouds and meshes. One source is one segment."""

    name = "point_cloud"
    cue = "3d: "
    suffixes = SUFFIXES
    mime_types = ("model/obj", "model/stl", "model/gltf-binary", "model/gltf+json")
    checkpoint_prefix = "pc"

    @dataclass
    class Config:
        """Settings; the number of points, the use of colour and the output stand in the encoder's own config.

        Attributes:
          encoder: folder or hub id of a Point-BERT encoder (`xblip_point_bert.PointBertModel`).
          max_points: sources with more points, vertices or triangles are refused.
          timeout_seconds: when to give up on a file that open3d reads.
          augment: what `augmented` changes.
        """

        encoder: str
        max_points: int = 10_000_000
        timeout_seconds: float = 120.0
        augment: Changes = field(default_factory=Changes)

    def load(self, source: Any) -> dict[str, Tensor]:
        """Reads one cloud or mesh.

        Args:
          source: a file (path, bytes, open file), or an array or tensor (N, 3) of coordinates or (N, 6) of
            coordinates and colour in [0, 1].

        Returns:
          "points": (1, num_points, 3 or 6) float32, centred on the centroid and scaled to the unit sphere.
          Fewer points are repeated in turn; more are thinned by farthest point sampling (of a seeded random
          choice, if there are so many that sampling would take more than seconds). Encoders of 6 channels get
          grey where there is no colour; encoders of 3 get none.

        Raises:
          MediaError: the source is damaged, empty, too large, holds NaN or infinity, or is not of these
            kinds.
          PluginError: the file's format needs open3d, which cannot be imported.
          BundleError: the encoder's folder cannot be read.
        """
        shape, label = self._read(source)
        check(shape, label, self.config.max_points)
        shape.points = normalise(shape.points)
        if shape.triangles is not None:
            shape = sample_surface(shape, SURFACE_POINTS * self._encoder_config.num_points)
            shape.points = normalise(shape.points)
        points = shape.points.astype(np.float32)
        if self._encoder_config.in_channels == 6:
            colors = np.full_like(points, MISSING_COLOR) if shape.colors is None else shape.colors.clip(0, 1)
            points = np.concatenate([points, colors.astype(np.float32)], 1)
        chosen = choose(points, self._encoder_config.num_points)
        return {"points": torch.from_numpy(points[chosen])[None]}

    def augmented(self, source: Any, draw: np.random.Generator) -> dict[str, Tensor]:
        """Reads a cloud or mesh, its points turned, scaled and moved a little at random."""
        points = self.load(source)["points"]
        return {"points": torch.cat([self.config.augment.of(points[..., :3], draw), points[..., 3:]], -1)}

    def build_encoder(self) -> nn.Module:
        """Loads the encoder: `points` (M, P, 3 or 6) to [CLS] and group tokens (M, 1 + G, D), or one pooled token.

        Points stay float32 in an encoder of half precision, which would move them by up to a hundredth.
        """
        width = self._encoder_config.width  # asked first: registers Point-BERT, and refuses other encoders by name
        encoder = xblip.TransformersEncoder.from_pretrained(
            self.config.encoder, input_name="points", input_dtype=torch.float32
        )
        encoder.width = width
        return encoder

    def draw(self, tensors: dict[str, Tensor], weights: np.ndarray) -> Any:
        """Colours the points of each group, seen from three sides and as a .ply."""
        from xblip_point_drawing import draw

        return draw(self._encoder_config, tensors, weights)

    def preview(self, tensors: dict[str, Tensor]) -> tuple[str, bytes]:
        """Shows the points turning, since browsers show no clouds."""
        from xblip_point_drawing import turning

        return ".webp", turning(tensors)

    @classmethod
    def convert_encoder(cls, checkpoint, folder: Path) -> bool:
        """Writes the PointBERT of a checkpoint of ULIP or ULIP-2."""
        from xblip_point_convert import convert

        return convert(checkpoint, folder)

    @classmethod
    def diagnose(cls) -> dict[str, Callable[[], str]]:
        """Needs open3d with the libusb that it links to, for formats other than .ply, .pcd, .xyz, .npy and .npz."""
        return {"open3d, with libusb": open3d_version}

    @classmethod
    def example(cls, folder: Path) -> xblip.Example:
        """Makes a tiny Point-BERT, a cloud, a mesh, and broken ones."""
        from xblip_point_bert import PointBertConfig, PointBertModel

        encoder, cloud, tetrahedron, text = (folder / name for name in ("encoder", "cloud.npy", "mesh.ply", "text.ply"))
        config = PointBertConfig(
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=48,
            num_groups=8,
            group_size=4,
            num_points=64,
            pointnet_sizes=(8, 16, 32),
            group_embedding_size=16,
        )
        PointBertModel(config).save_pretrained(encoder)
        np.save(cloud, np.random.default_rng(0).normal(size=(200, 3)))
        tetrahedron.write_text(TETRAHEDRON)
        text.write_text("not a shape")
        return xblip.Example(
            config={"encoder": str(encoder)},
            sources=[cloud, tetrahedron],
            broken=[
                text,
                tetrahedron.read_bytes()[:-8],
                cloud.read_bytes()[:-8],
                np.zeros((5, 4)),
                np.zeros((0, 3)),
                np.full((5, 3), np.nan),
                7,
            ],
        )

    @cached_property
    def _encoder_config(self):
        from transformers import AutoConfig
        from xblip_point_bert import PointBertConfig

        config = xblip.TransformersEncoder.read_beside(
            AutoConfig,
            self.config.encoder,
            failure=f'Cannot read the config of the point_cloud encoder "{self.config.encoder}"',
            expected="the folder or hub id of a Point-BERT encoder.",
        )
        if not isinstance(config, PointBertConfig):
            raise xblip.BundleError(
                f'The point_cloud encoder "{self.config.encoder}" is a {config.model_type} model. Expected a '
                f"{PointBertConfig.model_type} one, as xblip_point_bert.PointBertModel saves it."
            )
        return config

    def _read(self, source: Any) -> tuple[Shape, str]:
        file = xblip.media_file(source, kind=self.name)
        if file:
            limits = {"max_points": self.config.max_points, "timeout_seconds": self.config.timeout_seconds}
            return read_file(file, **limits), file.label
        label = f"the {self.name} given as {type(source).__name__}"
        if not isinstance(source, (np.ndarray, Tensor)):
            raise xblip.MediaError(
                f"Cannot read {label}: expected a file (path, bytes, open file), or a numpy array or tensor "
                "of shape (points, 3) or (points, 6)."
            )
        return from_array(self.as_array(source, label), label), label


def sample_surface(mesh: Shape, count: int) -> Shape:
    """Draws `count` points evenly over a mesh, always the same ones, with its vertices' colours blended.

    A mesh whose triangles have no area gives its vertices.
    """
    first, second, third = (mesh.points[mesh.triangles[:, corner]] for corner in range(3))
    areas = np.linalg.norm(np.cross(second - first, third - first), axis=1).cumsum()
    if not areas[-1] > 0:
        return Shape(mesh.points, mesh.colors)
    draws = np.random.default_rng(SEED).random((3, count))
    hit = np.searchsorted(areas, draws[0] * areas[-1], side="right").clip(max=len(areas) - 1)
    triangles = mesh.triangles[hit]
    root = np.sqrt(draws[1])
    weights = np.stack([1 - root, root * (1 - draws[2]), root * draws[2]], 1)[:, :, None]

    def blend(values: np.ndarray) -> np.ndarray:
        return (values[triangles] * weights).sum(1)

    return Shape(blend(mesh.points), None if mesh.colors is None else blend(mesh.colors))


def rotation(about: str, draw: np.random.Generator) -> np.ndarray:
    """Draws a rotation matrix (3, 3) about an axis, or of all alike ("all"); for "none" it is that of no turn."""
    if about == "none":
        return np.eye(3)
    if about == "all":
        matrix, upper = np.linalg.qr(draw.normal(size=(3, 3)))
        matrix = matrix * np.sign(np.diag(upper))  # which makes all orthogonal matrices alike likely
        return matrix * np.linalg.det(matrix)  # mirrored ones become rotations
    axis, angle = "xyz".index(about), draw.uniform(0, 2 * np.pi)
    first, second = (axis + 1) % 3, (axis + 2) % 3
    matrix = np.eye(3)
    matrix[[first, second], [first, second]] = np.cos(angle)
    matrix[second, first], matrix[first, second] = np.sin(angle), -np.sin(angle)
    return matrix


def normalise(points: np.ndarray) -> np.ndarray:
    """Centres points (N, 3) on their centroid and scales them to the unit sphere; equal points give zeros."""
    extent = np.abs(points).max()
    points = points / extent if extent else points
    points = points - points.mean(0)
    radius = np.linalg.norm(points, axis=1).max()
    if radius < 1e-12:  # what rounding leaves of equal points
        return np.zeros_like(points)
    return points / radius


def choose(points: np.ndarray, count: int) -> np.ndarray:
    """Which points (N, C) stand for a cloud, (count,) indices: all in turn, or by farthest point sampling."""
    from xblip_point_bert import farthest_point_sampling

    if len(points) <= count:
        return np.arange(count) % len(points)
    candidates = np.arange(len(points))
    most = max(count, MAX_SAMPLING_STEPS // count)
    if len(points) > most:
        candidates = np.sort(np.random.default_rng(SEED).choice(len(points), most, replace=False))
    return candidates[farthest_point_sampling(torch.from_numpy(points[candidates])[None], count)[0].numpy()]


@xblip.hookimpl
def register_modalities(register):
    """Offers the modality."""
    register(PointCloud)
