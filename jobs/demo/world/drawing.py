"""Draw one scene of the demo world: an outlined shape on a textured ground.

Legend: H, W pixels of the image; P points of a polygon.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from jobs.demo.world.scenes import Scene

RGB_BY_COLOUR: dict[str, tuple[int, int, int]] = {
    "red": (212, 34, 40),
    "orange": (245, 128, 22),
    "yellow": (250, 216, 45),
    "green": (40, 160, 70),
    "blue": (38, 80, 212),
    "purple": (126, 48, 164),
    "pink": (250, 140, 188),
    "brown": (112, 68, 34),
    "black": (26, 26, 30),
    "white": (248, 248, 248),
}
# Half the height of a shape, as a share of the image's shorter side. The gaps
# between the ranges keep "small", "medium" and "large" matters of fact.
RADIUS_BY_SIZE: dict[str, tuple[float, float]] = {
    "small": (0.18, 0.21),
    "medium": (0.27, 0.30),
    "large": (0.39, 0.43),
}
SUPERSAMPLING = 2


def _arc(radius: float, start: float, stop: float, centre_x: float = 0.0) -> np.ndarray:
    angles_P = np.radians(np.linspace(start, stop, 40))
    return np.stack([centre_x + radius * np.cos(angles_P), radius * np.sin(angles_P)], axis=1)


def _star() -> np.ndarray:
    angles_P = np.radians(-90 + 36 * np.arange(10))
    radii_P = np.where(np.arange(10) % 2, 0.42, 1.0)
    return np.stack([radii_P * np.cos(angles_P), radii_P * np.sin(angles_P)], axis=1)


def _heart() -> np.ndarray:
    t_P = np.linspace(0, 2 * np.pi, 60)
    x_P = np.sin(t_P) ** 3
    y_P = -(13 * np.cos(t_P) - 5 * np.cos(2 * t_P) - 2 * np.cos(3 * t_P) - np.cos(4 * t_P)) / 16
    return np.stack([x_P, y_P], axis=1)


def _polygon(*points: tuple[float, float]) -> np.ndarray:
    return np.array(points, dtype=float)


# Each shape is a list of closed outlines; a second outline cuts a hole.
OUTLINES_BY_SHAPE: dict[str, list[np.ndarray]] = {
    "circle": [_arc(0.95, 0, 360)],
    "square": [_polygon((-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82))],
    "triangle": [_polygon((0, -0.95), (0.98, 0.8), (-0.98, 0.8))],
    "star": [_star()],
    "heart": [_heart()],
    "cross": [
        _polygon(
            (-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3),
            (0.3, 1), (-0.3, 1), (-0.3, 0.3), (-1, 0.3), (-1, -0.3), (-0.3, -0.3),
        )
    ],
    "crescent": [np.concatenate([_arc(1.0, 50, 310), _arc(0.82, 291, 69, centre_x=0.35)])],
    "ring": [_arc(1.0, 0, 360), _arc(0.52, 0, 360)],
    "diamond": [_polygon((0, -1.05), (0.68, 0), (0, 1.05), (-0.68, 0))],
    "arrow": [
        _polygon((0, -1), (0.85, -0.1), (0.32, -0.1), (0.32, 1), (-0.32, 1), (-0.32, -0.1), (-0.85, -0.1))
    ],
}  # fmt: skip


def _ground(name: str, width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    """Paint a background as float RGB_HW3; lengths scale with the shorter side."""
    unit = min(width, height)
    y_HW, x_HW = np.mgrid[0:height, 0:width].astype(np.float32) / unit
    x_HW, y_HW = x_HW + np.float32(rng.random()), y_HW + np.float32(rng.random())
    grain_HW = rng.random((height, width), dtype=np.float32) - 0.5
    match name:
        case "grass":
            blades_W = rng.random((1, width), dtype=np.float32) - 0.5
            shade_HW = 0.35 * blades_W + 0.3 * grain_HW
            base, depth = (84, 142, 58), (60, 75, 40)
        case "sand":
            shade_HW = 0.25 * grain_HW + 0.12 * np.sin(2 * np.pi * (3 * y_HW + 0.6 * np.sin(5 * x_HW)))
            base, depth = (218, 192, 140), (60, 60, 60)
        case "snow":
            shade_HW = 0.08 * grain_HW + 0.1 * np.sin(5 * x_HW) * np.sin(4 * y_HW)
            base, depth = (232, 238, 246), (90, 70, 45)
        case "water":
            shade_HW = 0.3 * np.sin(2 * np.pi * (7 * y_HW + 0.35 * np.sin(9 * x_HW))) + 0.1 * grain_HW
            base, depth = (70, 146, 190), (90, 80, 60)
        case "brick":
            row_HW = np.floor(y_HW * 8)
            mortar_HW = ((y_HW * 8) % 1 < 0.18) | ((x_HW * 4 + 0.5 * (row_HW % 2)) % 1 < 0.09)
            shade_HW = np.where(mortar_HW, 0.75, 0.15 * grain_HW)
            base, depth = (162, 82, 64), (80, 140, 150)
        case "wood":
            joint_HW = (x_HW * 4) % 1 < 0.06
            fibre_HW = 0.14 * np.sin(60 * x_HW + 5 * np.sin(4 * y_HW)) + 0.1 * grain_HW
            shade_HW = np.where(joint_HW, -0.8, fibre_HW)
            base, depth = (168, 122, 74), (90, 80, 60)
        case "night":
            block = max(1, round(unit / 56))
            cells = (height // block + 1, width // block + 1)
            stars_HW = np.kron(rng.random(cells) > 0.98, np.ones((block, block)))
            shade_HW = stars_HW[:height, :width]
            base, depth = (20, 22, 56), (215, 215, 180)
        case "tiles":
            dark_HW = (np.floor(x_HW * 5) + np.floor(y_HW * 5)) % 2
            shade_HW = dark_HW - 0.5 + 0.06 * grain_HW
            base, depth = (150, 150, 152), (105, 105, 105)
        case _:
            raise AssertionError(name)
    shade_HW1 = shade_HW[..., None].astype(np.float32)
    return np.array(base, dtype=np.float32) + shade_HW1 * np.array(depth, dtype=np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where an object is, in pixels and radians."""

    centre: tuple[float, float]
    radius: float
    angle: float

    @classmethod
    def random(cls, size: str, size_px: tuple[int, int], rng: np.random.Generator) -> "_Place":
        width, height = size_px
        unit = min(width, height)
        radius = unit * rng.uniform(*RADIUS_BY_SIZE[size])
        slack = 0.05 * unit
        centre = (width / 2 + rng.uniform(-slack, slack), height / 2 + rng.uniform(-slack, slack))
        return cls(centre=centre, radius=radius, angle=rng.uniform(-0.12, 0.12))


def _object_masks(shape: str, place: _Place, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Draw the shape's fill and its outline as masks_HW in 0..1, antialiased."""
    scale = SUPERSAMPLING
    canvas_size = (size[0] * scale, size[1] * scale)
    fill, outline = Image.new("L", canvas_size), Image.new("L", canvas_size)
    fill_pen, outline_pen = ImageDraw.Draw(fill), ImageDraw.Draw(outline)
    cos, sin = np.cos(place.angle), np.sin(place.angle)
    rotation = np.array([[cos, sin], [-sin, cos]])
    line_width = max(2, round(0.05 * min(size) * scale))
    for hole, points_P2 in enumerate(OUTLINES_BY_SHAPE[shape]):
        placed_P2 = ((points_P2 @ rotation) * place.radius + np.array(place.centre)) * scale
        corners = [tuple(point) for point in placed_P2.tolist()]
        fill_pen.polygon(corners, fill=0 if hole else 255)
        outline_pen.line([*corners, corners[0], corners[1]], fill=255, width=line_width, joint="curve")
    fill_HW, outline_HW = (np.asarray(mask.reduce(scale), np.float32) / 255 for mask in (fill, outline))
    return fill_HW, outline_HW


def render(scene: Scene, size_px: int | tuple[int, int], seed: int = 0) -> Image.Image:
    """Draw a picture of `scene`, `size_px` = side or (width, height); equal arguments give equal pixels.

    Position, tilt, exact radius and hue, light and sensor noise vary with the `seed`; nothing
    that a caption may claim does. The object stays inside the central square,
    so that a centre crop (CLIP's preprocessing) keeps it whole.
    """
    width, height = (size_px, size_px) if isinstance(size_px, int) else size_px
    rng = np.random.default_rng(seed)
    place = _Place.random(scene.size, (width, height), rng)
    image_HW3 = _ground(scene.background, width, height, rng)
    fill_HW, outline_HW = _object_masks(scene.shape, place, (width, height))
    paint_3 = np.array(RGB_BY_COLOUR[scene.colour], dtype=float)
    # A contrasting outline keeps white on snow and black at night visible.
    outline_3 = np.full(3, 30.0) if paint_3 @ (0.3, 0.59, 0.11) > 90 else np.full(3, 225.0)
    shade_3 = (paint_3 + rng.uniform(-14, 14, 3)).astype(np.float32)
    image_HW3 += outline_HW[..., None] * (outline_3.astype(np.float32) - image_HW3)
    image_HW3 += fill_HW[..., None] * (shade_3 - image_HW3)

    light_3 = (rng.uniform(0.82, 1.08) * (1 + rng.uniform(-0.08, 0.08, 3))).astype(np.float32)
    noise_HW3 = rng.standard_normal((height, width, 3), dtype=np.float32) * np.float32(rng.uniform(2, 9))
    image_HW3 = np.clip(image_HW3 * light_3 + noise_HW3, 0, 255)
    return Image.fromarray(image_HW3.astype(np.uint8), "RGB")


def render_mask(scene: Scene, size_px: tuple[int, int], seed: int) -> Image.Image:
    """Draw where the object is, in white, of the picture that ``render`` makes of equal arguments."""
    place = _Place.random(scene.size, size_px, np.random.default_rng(seed))
    fill_HW, _ = _object_masks(scene.shape, place, size_px)
    return Image.fromarray((255 * fill_HW).astype(np.uint8))
