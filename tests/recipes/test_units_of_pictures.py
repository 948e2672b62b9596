"""What is no place in the picture is not drawn on it, nor called pixels."""

import numpy as np
import pytest

from worldloom.workflow.report_data import in_pixels


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        ((2, 3), (61, 60), True),  # a pixel world
        ((-0.2, -0.2), (0.2, 0.2), False),  # metres about the middle
        ((0.05, 0.1), (0.9, 0.95), False),  # shares of a side
        ((80, 90), (420, 410), False),  # a simulator's own units
    ],
)
def test_only_places_in_the_picture_are_drawn_on_it(low, high, expected) -> None:
    positions = np.random.default_rng(0).uniform(low, high, (500, 2)).astype(np.float32)
    assert in_pixels(positions, (64, 64, 3)) is expected
