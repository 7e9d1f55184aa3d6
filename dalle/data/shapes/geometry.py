"""The six shapes of `shapes`, each of radius 1 around the origin with y pointing down.

``inside`` is written as half-planes and radii; the same shapes as outlines give areas, boxes and masks.
"""

import math

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
SQUARE_HALF_SIDE = 0.85
RING_HOLE = 0.55
CROSS_HALF_WIDTH = 0.33
STAR_WAIST = 0.5  # distance of the inner corners from the middle

Points = list[tuple[float, float]]


def _around(count: int, turn: float, radius: float = 1.0) -> Points:
    """``count`` points on a circle, the first at ``turn`` degrees; -90 is up."""
    angles = [math.radians(turn + 360 * number / count) for number in range(count)]
    return [(radius * math.cos(angle), radius * math.sin(angle)) for angle in angles]


def _cross() -> Points:
    quarter = [(-CROSS_HALF_WIDTH, -1.0), (CROSS_HALF_WIDTH, -1.0), (CROSS_HALF_WIDTH, -CROSS_HALF_WIDTH)]
    points = []
    for _ in range(4):
        points += quarter
        quarter = [(-y, x) for x, y in quarter]  # a quarter turn
    return points


POLYGONS: dict[str, Points] = {
    "square": [(x * SQUARE_HALF_SIDE, y * SQUARE_HALF_SIDE) for x, y in ((-1, -1), (1, -1), (1, 1), (-1, 1))],
    "triangle": _around(3, -90),
    "star": [point for pair in zip(_around(5, -90), _around(5, -54, STAR_WAIST), strict=True) for point in pair],
    "cross": _cross(),
}
_STAR_TIPS = np.array(_around(5, -90), dtype=np.float32)
_TRIANGLE_NORMALS = np.array(_around(3, 90), dtype=np.float32)


def inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Which points of the grid with columns ``x`` [w] and rows ``y`` [h] the shape covers: bool [h, w]."""
    y = y[:, None]
    if shape == "circle":
        return x * x + y * y <= 1
    if shape == "ring":
        squared = x * x + y * y
        return (squared <= 1) & (squared >= RING_HOLE**2)
    if shape == "square":
        return (np.abs(x) <= SQUARE_HALF_SIDE) & (np.abs(y) <= SQUARE_HALF_SIDE)
    if shape == "cross":
        across, along = np.abs(x), np.abs(y)
        return (((across <= CROSS_HALF_WIDTH) & (along <= 1)) | ((across <= 1) & (along <= CROSS_HALF_WIDTH)))
    if shape == "triangle":
        return _farthest(_TRIANGLE_NORMALS, x, y) <= 0.5
    if shape == "star":
        return _inside_star(x, y)
    raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")


def _farthest(directions: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """How far each point lies along the direction in which it lies farthest, float [h, w]."""
    farthest = directions[0, 0] * x + directions[0, 1] * y
    for direction_x, direction_y in directions[1:]:
        np.maximum(farthest, direction_x * x + direction_y * y, out=farthest)
    return farthest


def _inside_star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Folded onto its nearest tip, a point is inside when it is within the edge from the tip to an inner corner."""
    along = _farthest(_STAR_TIPS, x, y)
    across = np.sqrt(np.maximum(x * x + y * y - along * along, 0))
    corner_along, corner_across = STAR_WAIST * math.cos(math.radians(36)), STAR_WAIST * math.sin(math.radians(36))
    return corner_across * along + (1 - corner_along) * across <= corner_across


def area(shape: str) -> float:
    """The area of the shape of radius 1."""
    if shape == "circle":
        return math.pi
    if shape == "ring":
        return math.pi * (1 - RING_HOLE**2)
    points = POLYGONS[shape]
    following = points[1:] + points[:1]
    return 0.5 * sum(x * next_y - next_x * y for (x, y), (next_x, next_y) in zip(points, following, strict=True))


def box(shape: str, center: tuple[float, float], radius: float) -> list[float]:
    """The tight box [left, top, right, bottom] in the units of ``center``."""
    points = POLYGONS.get(shape, [(-1.0, -1.0), (1.0, 1.0)])
    columns, rows = zip(*points, strict=True)
    (x, y) = center
    return [round(value, 2) for value in (x + radius * min(columns), y + radius * min(rows),
                                          x + radius * max(columns), y + radius * max(rows))]


def outline(shape: str, center: tuple[float, float], radius: float) -> dict[str, list[float]]:
    """The exact mask as parameters: ``polygon`` [x, y, x, y, ...], ``circle`` [x, y, r], ``ring`` [x, y, r, hole]."""
    x, y = center
    if shape == "circle":
        return {"circle": [round(value, 2) for value in (x, y, radius)]}
    if shape == "ring":
        return {"ring": [round(value, 2) for value in (x, y, radius, RING_HOLE * radius)]}
    points = [(x + radius * dx, y + radius * dy) for dx, dy in POLYGONS[shape]]
    return {"polygon": [round(value, 2) for point in points for value in point]}
