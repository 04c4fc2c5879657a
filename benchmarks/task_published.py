"""The figures of SMART's tables 2, 3 and 4 (arXiv 2403.19969), as the paper prints them, for `task_tables.py`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """One column of a table of the paper.

    Attributes:
        title: Network, data and metric of the column.
        dense: The dense network.
        figures: Removed fraction of units, or None for 2:4 -> row -> figure.
        points: Value of the grid here -> the removed fraction that it stands beside.
    """

    title: str
    dense: float
    figures: dict[float | None, dict[str, float]]
    points: dict[float | None, float | None]

    def at(self, row: str, point: float | None) -> float | None:
        """Returns the figure of a row beside a value of the grid; None where the paper has none."""
        return self.dense if row == "dense" else self.figures[self.points[point]].get(row)


METHODS = ("smart", "pdp", "pas", "awg", "acdc")
BLOCKS = {0.7: 0.3, 0.5: 0.5, 0.3: 0.7}
"""Kept blocks -> removed ones."""
CHANNELS = {0.8: 0.2, 0.5: 0.5}
"""Kept multiply-accumulates here -> removed output channels in the paper, which are no equal operations."""


def _rows(*figures: float) -> dict[str, float]:
    return dict(zip(METHODS, figures, strict=True))


PUBLISHED = {
    "bccd/blocks": Published(
        "YOLOv5m on COCO, mAP",
        0.426,
        {
            0.3: _rows(0.423, 0.401, 0.416, 0.404, 0.403),
            0.5: _rows(0.416, 0.384, 0.407, 0.392, 0.379),
            0.7: _rows(0.400, 0.323, 0.377, 0.355, 0.318),
        },
        BLOCKS,
    ),
    "camvid/blocks": Published(
        "BiSeNet-v2 on Cityscapes, mIoU",
        0.725,
        {
            0.3: _rows(0.738, 0.734, 0.731, 0.734, 0.732),
            0.5: _rows(0.735, 0.731, 0.727, 0.733, 0.727),
            0.7: _rows(0.721, 0.702, 0.689, 0.699, 0.691),
        },
        BLOCKS,
    ),
    "bccd/channels": Published(
        "YOLOv5m on COCO, mAP",
        0.426,
        {0.2: _rows(0.414, 0.307, 0.384, 0.308, 0.303), 0.5: _rows(0.331, 0.115, 0.310, 0.124, 0.110)},
        CHANNELS,
    ),
    "camvid/channels": Published(
        "BiSeNet-v2 on Cityscapes, mIoU",
        0.725,
        {0.2: _rows(0.737, 0.736, 0.703, 0.734, 0.688), 0.5: _rows(0.720, 0.682, 0.311, 0.701, 0.685)},
        CHANNELS,
    ),
    "cifar10/vit": Published("ViT on ImageNet, top-1", 0.788, {None: _rows(0.768, 0.765, 0.765, 0.764, 0.761)}, {None: None}),
    "cifar10/swin": Published("Swin on ImageNet, top-1", 0.813, {None: _rows(0.805, 0.805, 0.794, 0.797, 0.798)}, {None: None}),
}
"""Study of recipes/tasks -> its column in the paper."""
