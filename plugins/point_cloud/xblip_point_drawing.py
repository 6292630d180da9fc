"""Point clouds drawn with heat where an encoder's groups lie: a picture from three sides, and a .ply to turn by hand.

A token of Point-BERT stands for the points nearest to its centre. Groups overlap, so a point takes the mean of its groups;
points of no group stay grey.
"""

import io

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from xblip_point_bert import PointBertConfig, farthest_point_sampling, nearest_neighbours

import xblip

heat = xblip.Modality.heat
SIDE, MARGIN = 280, 1.08
FRAMES, FRAME_MS, TILT = 48, 80, 20.0
"""Of a cloud that turns once about its height: pictures, how long each is seen, and degrees towards the eye."""
VIEWS = {"from the front": (0.0, 0.0), "from above": (0.0, 90.0), "turned and tilted": (35.0, 25.0)}
"""Degrees that the cloud is turned about y, and then towards the eye."""


def draw(config: PointBertConfig, tensors: dict[str, Tensor], weights: np.ndarray) -> "heat.Drawing":
    """Draws the cloud of `PointCloud.load` with the weights (1, N) of its tokens."""
    points = tensors["points"][0, :, :3].float().cpu()
    placeless = {0: heat.POOLED if weights.shape[1] == 1 else heat.CLS}
    shares = np.zeros(len(points))
    if weights.shape[1] > 1:
        xyz = points[None]
        centres = xyz[0, farthest_point_sampling(xyz, config.num_groups)[0]][None]
        members = nearest_neighbours(xyz, centres, config.group_size)[0]
        shares = heat.scaled(_of_points(members, torch.from_numpy(weights[0, 1:]).double(), len(points)))
    views = [_view(points.numpy(), _point_colors(shares), *angles) for angles in VIEWS.values()]
    caption = "Coloured points belong to groups that were looked at; a point of several takes their mean."
    picture = heat.sheet([view.crop((0, *_lines(views))) for view in views], list(VIEWS))
    return heat.Drawing({".png": picture, ".ply": _ply(points.numpy(), shares)}, caption, placeless)


def turning(tensors: dict[str, Tensor]) -> bytes:
    """Draws the cloud of `PointCloud.load`, in its own colours or in grey, as a WebP in which it turns for ever."""
    points = tensors["points"][0].float().cpu().numpy()
    tones = (points[:, 3:].clip(0, 1) * 255).round().astype(np.uint8)
    if not tones.size:
        tones = _point_colors(np.zeros(len(points)))
    first, *others = [_view(points[:, :3], tones, turn, TILT) for turn in np.linspace(0, 360, FRAMES, endpoint=False)]
    out = io.BytesIO()
    first.save(out, "WEBP", save_all=True, append_images=others, duration=FRAME_MS, loop=0, quality=60, method=2)
    return out.getvalue()


def _lines(views: list[PIL.Image.Image]) -> tuple[int, int, int]:
    """Where the lines that any view has points on begin, and the corner where they and the columns end."""
    drawn = np.nonzero(np.min([np.asarray(view.convert("L")) for view in views], 0).min(1) < 255)[0]
    return max(0, int(drawn[0]) - 4), SIDE, min(SIDE, int(drawn[-1]) + 5)


def _of_points(members: Tensor, weights: Tensor, count: int) -> np.ndarray:
    """Means of the weights (G,) of the groups, whose points are `members` (G, K), that each of `count` points is in."""
    flat = members.flatten()
    sums = torch.zeros(count, dtype=torch.double).index_add_(0, flat, weights.repeat_interleave(members.shape[1]))
    groups = torch.bincount(flat, minlength=count)
    return (sums / groups.clamp(min=1)).numpy()


def _point_colors(shares: np.ndarray) -> np.ndarray:
    """Grey where there is no heat, and from there on the colours of heat."""
    strength = (shares[:, None].clip(0, 1) ** 0.8).astype(np.float32)
    return (heat.colors(shares) * strength + np.array([190, 190, 198]) * (1 - strength)).round().astype(np.uint8)


def _view(points: np.ndarray, tones: np.ndarray, turn: float, tilt: float) -> PIL.Image.Image:
    """Draws points (P, 3) in colours (P, 3) as discs, the near over the far ones, which are paler; x right, y up."""
    turn, tilt = np.radians(turn), np.radians(tilt)
    about_y = np.array([[np.cos(turn), 0, np.sin(turn)], [0, 1, 0], [-np.sin(turn), 0, np.cos(turn)]])
    about_x = np.array([[1, 0, 0], [0, np.cos(tilt), -np.sin(tilt)], [0, np.sin(tilt), np.cos(tilt)]])
    seen = points @ (about_x @ about_y).T
    depth = (seen[:, 2] / MARGIN + 1) / 2
    mist = 0.55 * (1 - depth[:, None])
    tones = (tones * (1 - mist) + 255 * mist).round().astype(np.uint8)
    radius = 2 if len(points) > 2000 else 3
    places = np.stack([(seen[:, 0] / MARGIN + 1) / 2, (1 - seen[:, 1] / MARGIN) / 2], 1) * SIDE
    reach = np.arange(-radius, radius + 1)
    disc = np.array([(x, y) for x in reach for y in reach if x * x + y * y <= radius * radius + 1])
    order = np.argsort(seen[:, 2], kind="stable")
    columns, rows = (places[order].astype(int)[:, None] + disc).reshape(-1, 2).T
    inside = (columns >= 0) & (columns < SIDE) & (rows >= 0) & (rows < SIDE)
    pixels = np.full((SIDE, SIDE, 3), 255, np.uint8)
    pixels[rows[inside], columns[inside]] = np.repeat(tones[order], len(disc), 0)[
        inside
    ]  # the last one, the nearest, stays
    return PIL.Image.fromarray(pixels)


def _ply(points: np.ndarray, shares: np.ndarray) -> bytes:
    """A binary .ply with the points, their colours as drawn, and their shares of the largest heat as `heat`."""
    kinds = [(name, "<f4") for name in "xyz"] + [(name, "u1") for name in ("red", "green", "blue")] + [("heat", "<f4")]
    rows = np.empty(len(points), kinds)
    for axis, name in enumerate("xyz"):
        rows[name] = points[:, axis]
    for channel, name in enumerate(("red", "green", "blue")):
        rows[name] = _point_colors(shares)[:, channel]
    rows["heat"] = shares
    types = {"<f4": "float", "u1": "uchar"}
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(points)}"]
    header += [f"property {types[kind]} {name}" for name, kind in kinds]
    out = io.BytesIO()
    out.write("\n".join([*header, "end_header", ""]).encode())
    out.write(rows.tobytes())
    return out.getvalue()
