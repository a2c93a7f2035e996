"""Alignment of frames of a camera that shakes, pans or turns, so that a stream can keep what it computed.

A stream can keep tokens only while the same content stays on the same patches, and half a pixel of shake changes all of
them. The aligner tracks corners (the optical flow of Lucas and Kanade, as in OpenCV) and fits the motion of the whole
view to them by RANSAC, so that moving things do not count. It then reads each frame where its content was before: by
fractions of a pixel, a small rotation and a small change of scale. When the view has moved by most of a patch, it goes
on by whole patches, and the stream moves what it keeps (`Stream.infer`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sparsifiner_edge.arrays import Array, Pixels
from sparsifiner_edge.errors import MissingExtraError

Affine = npt.NDArray[np.float64]
"""Map of points (x, y), [2,3]: the last column is the offset."""
MOTIONS = ("still", "shaking", "moving", "too fast")
"""Motion of the camera, as far as the aligner can tell.

"too fast" means that the motion of the last frames was not found: the view jumped, or the picture is blurred.
"""
_LONGEST = 640
"""Length of the longer side, in pixels, on which motion is estimated."""
_BLOCKS = 8
"""Blocks of the picture per side. Corners are spread over them, so that they do not all lie on one thing."""
_CORNERS = 3
"""Most corners of a block."""
_FEWEST = 14
"""Fewest blocks, of all 64, whose corners must agree on the motion."""
_AGREE = 0.7
"""Distance in pixels up to which a corner agrees with a motion."""
_SAME = 0.3
"""Distance in pixels up to which a corner agrees that the view did not move since the last frame."""
_STAYS = 0.6
"""Fraction of the agreeing blocks that must stay for the view to count as unmoved, so that noise does not move it."""
_SIMPLER = 0.9
"""Fraction of the agreeing corners that a pure shift must explain to be preferred to a similarity."""
_RENEW = 0.5
"""Fraction of the blocks of the key frame below which another frame becomes the key frame."""
_FAR = 0.7
"""Distance in patches from which a view moves on by whole patches. It is above one half, so that shake does not."""
_TURN = 0.05
"""Rotation in radians, and relative change of scale, beyond which the view starts anew."""
_LOST = 3
"""Frames in a row without a motion after which the view starts anew."""
_RECENT = 25
"""Frames over which the kind of motion is judged."""


class Aligned(NamedTuple):
    """A frame as the model reads it.

    Attributes:
        image: Aligned frame, uint8 [H,W,3]; parts outside the frame repeat its border.
        affine: Map from pixels of `image` to pixels of the frame, both from their upper left corner; None if they are
            the same.
        moved: Patches by which the view moved down and to the right, for `Stream.infer`. None if the view starts anew.
        motion: One of `MOTIONS`; None if it was not looked at.
    """

    image: Pixels
    affine: Affine | None
    moved: tuple[int, int] | None
    motion: str | None


class Aligner:
    """Aligns consecutive frames of one camera.

    Args:
        size: Height and width of the frames in pixels.
        grid: Rows and columns of patches.

    Raises:
        MissingExtraError: OpenCV is not installed.
    """

    def __init__(self, size: tuple[int, int], grid: tuple[int, int]) -> None:
        self._cv2 = _opencv()
        self._size = size
        self._patch = np.array([size[1] / grid[1], size[0] / grid[0]])  # Width and height.
        self._scale = min(1.0, _LONGEST / max(size))
        self.reset()

    def reset(self) -> None:
        """Forget all frames."""
        self._key: Array | None = None
        # Maps from the scene, which has the coordinates of the first frame, to the last frame and to the key frame.
        self._view, self._key_view = _IDENTITY, _IDENTITY
        # Patches by which what is read has moved in the scene, to the right and down.
        self._offset = np.zeros(2, np.int64)
        self._lost, self._still, self._unrolled, self._changes = 0, _RECENT, _RECENT, 0

    def align(self, image: Pixels) -> Aligned:
        """Align the next frame.

        Args:
            image: Frame, uint8 RGB [H,W,3].
        """
        grey = self._cv2.cvtColor(image, self._cv2.COLOR_RGB2GRAY)
        if self._scale < 1:
            grey = self._cv2.resize(grey, None, None, self._scale, self._scale, self._cv2.INTER_AREA)
        if self._key is None:
            self._renew(grey)
            return Aligned(image, None, (0, 0), "still")
        before, found = self._view, self._estimate(grey)
        self._still, self._unrolled = self._still + 1, self._unrolled + 1
        if found is None:
            self._lost += len(self._points) > 0
            if self._lost == _LOST or not len(self._points):
                return self._start(image, grey)
        else:
            self._lost, self._view = 0, found
        if not _is_plain(self._view):
            return self._start(image, grey)
        if self._view is not before:
            self._changes = 0 if self._still > _RECENT else self._changes + 1
            self._still = 0
        moved = self._follow()
        affine = self._reads()
        if np.array_equal(affine, _IDENTITY):
            return Aligned(image, None, moved, self._motion())
        flags = self._cv2.INTER_CUBIC | self._cv2.WARP_INVERSE_MAP
        read = self._cv2.warpAffine(image, affine, self._size[::-1], flags=flags, borderMode=self._cv2.BORDER_REPLICATE)
        corner = affine.copy()  # OpenCV counts from the centre of the first pixel.
        corner[:, 2] += 0.5 - affine[:, :2] @ (0.5, 0.5)
        return Aligned(read, corner, moved, self._motion())

    def _start(self, image: Pixels, grey: Array) -> Aligned:
        """Start a new view at this frame."""
        moves = bool(len(self._points)) or not np.array_equal(self._reads(), _IDENTITY)
        lost = self._lost == _LOST
        self.reset()
        self._renew(grey)
        return Aligned(image, None, None if moves else (0, 0), "too fast" if lost else "still")

    def _motion(self) -> str:
        """Return the kind of motion of the last frames."""
        if self._lost:
            return "too fast"
        if self._unrolled < _RECENT:
            return "moving"
        return "shaking" if self._still < _RECENT and self._changes > 1 else "still"

    def _reads(self) -> Affine:
        """Return the map from what the model reads to the frame, in pixels from the centre of the first one."""
        affine: Affine = self._view.copy()
        affine[:, 2] += self._view[:, :2] @ (self._offset * self._patch)
        return affine

    def _follow(self) -> tuple[int, int]:
        """Move what is read by whole patches if it is too far from the frame; return rows and columns."""
        centre = np.array(self._size[::-1]) / 2
        affine = self._reads()
        off = (affine[:, :2] @ centre + affine[:, 2] - centre) / self._patch
        step = np.where(abs(off) > _FAR, -np.round(off), 0).astype(np.int64)
        if step.any():
            self._offset += step
            self._unrolled = 0
        return int(step[1]), int(step[0])

    def _renew(self, grey: Array) -> None:
        """Make this frame the key frame, in which corners are looked for."""
        self._key, self._key_view = grey, self._view
        rows, columns = grey.shape
        score = self._cv2.cornerMinEigenVal(grey, 3)
        height, width = rows // _BLOCKS, columns // _BLOCKS
        found = []
        least = max(1e-4, 0.01 * float(score.max()))
        blocks = score[: height * _BLOCKS, : width * _BLOCKS].reshape(_BLOCKS, height, _BLOCKS, width)
        for row in range(_BLOCKS):
            for column in range(_BLOCKS):
                block = blocks[row, :, column].copy()
                for _ in range(_CORNERS):
                    y, x = divmod(int(block.argmax()), width)
                    if block[y, x] < least:
                        break
                    found.append((column * width + x, row * height + y))
                    block[max(0, y - 6) : y + 7, max(0, x - 6) : x + 7] = 0
        self._points = np.array(found, np.float32).reshape(-1, 2)
        self._key_blocks = self._blocks(self._points)

    def _blocks(self, points: Array) -> int:
        """Return how many blocks have one of these points of the key frame."""
        assert self._key is not None
        rows, columns = self._key.shape
        x, y = (points / (columns, rows) * _BLOCKS).astype(int).clip(0, _BLOCKS - 1).T
        return len(np.unique(y * _BLOCKS + x))

    def _estimate(self, grey: Array) -> Affine | None:
        """Return the map from the scene to this frame; the last one itself if it still holds; None if none is found."""
        cv2, points = self._cv2, self._points
        if self._key_blocks < _FEWEST:
            self._points = points[:0]
            return None
        last = _compose(self._view, _inverse(self._key_view))
        guess = _apply(_scaled(last, self._scale), points).astype(np.float32)
        criteria = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 12, 0.02)
        seen, status, _ = cv2.calcOpticalFlowPyrLK(
            self._key,
            grey,
            points[:, None],
            guess[:, None].copy(),
            winSize=(15, 15),
            maxLevel=3,
            criteria=criteria,
            flags=cv2.OPTFLOW_USE_INITIAL_FLOW,
        )
        seen = seen[:, 0]
        inside = ((seen >= 0) & (seen < grey.shape[::-1])).all(1) & (status[:, 0] == 1)
        origin, there = points[inside], seen[inside]
        if len(origin) < _FEWEST:
            return None
        similarity, agree = cv2.estimateAffinePartial2D(
            origin, there, method=cv2.RANSAC, ransacReprojThreshold=_AGREE, maxIters=200, refineIters=5
        )
        if similarity is None:
            return None
        agreeing = agree[:, 0].astype(bool)
        blocks = self._blocks(origin[agreeing])
        stays = np.hypot(*(there - guess[inside]).T) <= _SAME
        if blocks < _FEWEST and self._blocks(origin[stays]) < _FEWEST:
            return None
        if self._blocks(origin[stays]) >= _STAYS * blocks:
            return self._view
        # A shift of the last view, from the corners that agree on it.
        away = there - guess[inside]
        shift = np.median(away[agreeing], 0)
        shifted = np.hypot(*(away - shift).T) <= _AGREE
        if shifted.sum() >= _SIMPLER * agreeing.sum():
            relative = last.copy()
            relative[:, 2] += away[shifted].mean(0) / self._scale
        else:
            relative = _scaled(similarity, 1 / self._scale)
        view = _compose(relative, self._key_view)
        if blocks < _RENEW * self._key_blocks:
            self._view = view
            self._renew(grey)
        return view


_IDENTITY: Affine = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])


def _compose(second: Affine, first: Affine) -> Affine:
    """Return the map that applies `first`, then `second`."""
    return np.hstack([second[:, :2] @ first[:, :2], (second[:, :2] @ first[:, 2] + second[:, 2])[:, None]])


def _inverse(affine: Affine) -> Affine:
    """Return the inverse map."""
    linear = np.linalg.inv(affine[:, :2])
    return np.hstack([linear, (-linear @ affine[:, 2])[:, None]])


def _apply(affine: Affine, points: Array) -> Array:
    """Return mapped points, [N,2]."""
    return np.asarray(points @ affine[:, :2].T + affine[:, 2])


def _scaled(affine: Affine, scale: float) -> Affine:
    """Return the map between pictures that are enlarged by a factor."""
    return np.hstack([affine[:, :2], affine[:, 2:] * scale])


def _is_plain(view: Affine) -> bool:
    """Return whether a view is turned and scaled little enough."""
    turn, scale = np.arctan2(view[1, 0], view[0, 0]), np.hypot(view[0, 0], view[1, 0])
    return bool(abs(turn) <= _TURN and abs(scale - 1) <= _TURN)


def _opencv() -> Any:
    try:
        import cv2
    except ImportError as error:
        raise MissingExtraError("opencv-python-headless", "camera") from error
    return cv2
