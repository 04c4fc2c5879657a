"""Charts of pixels: images, bare axes, cells with fixed colors and no scale, bars with errors; on paper and on the screen."""

import numpy as np
import pytest

from microglia.report.chart import Axis, Bars, Chart, Field, Panel
from microglia.report.interactive import interactive
from microglia.report.printed import printed

BARE = Axis(bare=True)
GREY = np.arange(12, dtype=np.uint8).reshape(3, 4)
CELLS = Field(range(3), range(3), [[0.0, 1.0], [2.0, 3.0]], "cells", limits=(0, 8), scale=False)


@pytest.mark.parametrize("pixels", [GREY, np.stack([GREY, GREY, GREY], -1)], ids=["grey", "color"])
def test_an_image_has_no_ticks_and_keeps_its_pixels(pixels):
    chart = Chart("image", [Panel(BARE, BARE, image=pixels)], legend=-1)
    (axes,) = printed(chart).axes
    assert np.array_equal(axes.images[0].get_array(), pixels)
    assert list(axes.get_xticks()) == list(axes.get_yticks()) == []
    assert axes.yaxis.get_inverted()  # the first row is on top
    figure = interactive(chart)
    (trace,) = figure.data
    assert np.array_equal(np.array(trace.z)[:, :, 0], GREY)
    assert figure.layout.xaxis.visible is figure.layout.yaxis.visible is False


def test_cells_fall_with_their_axis_and_have_no_scale_of_colors():
    chart = Chart("cells", [Panel(BARE, Axis(bare=True, falling=True), field=CELLS)], legend=-1)
    (axes,) = printed(chart).axes  # a scale would be one more
    assert axes.collections[0].get_clim() == (0, 8)
    assert axes.yaxis.get_inverted()
    (trace,) = interactive(chart).data
    assert (trace.zmin, trace.zmax, trace.showscale) == (0, 8, False)


def test_bars_have_error_bars_on_both():
    bars = [Bars("with", [0, 1], [2.0, 3.0], errors=[0.5, 0.25]), Bars("without", [0, 1], [1.0, 1.0])]
    chart = Chart("bars", [Panel(Axis(), Axis(), bars=bars)])
    (axes,) = printed(chart).axes
    first, second = (container for container in axes.containers if hasattr(container, "patches"))
    segments = first.errorbar.lines[2][0].get_segments()
    assert [segment[:, 1].tolist() for segment in segments] == [[1.5, 2.5], [2.75, 3.25]]
    assert second.errorbar is None
    one, other = interactive(chart).data
    assert list(one.error_y.array) == [0.5, 0.25]
    assert other.error_y.array is None
