"""Telemetry of topology updates on cases worked by hand."""

from __future__ import annotations

import pytest
import torch

from dst_ops import to_dense
from dst_train.topology import telemetry


def _units(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def test_ages_and_explored_units() -> None:
    history = telemetry.History(_units(1, 4), num_units=8)
    assert (history.mean_age(0), history.explored) == (0.0, 2 / 8)
    history.change(dropped=_units(4), grown=_units(6), step=10)
    assert (history.mean_age(10), history.explored) == (5.0, 3 / 8)  # unit 1 is 10 steps old, unit 6 is new
    history.change(dropped=_units(1), grown=_units(4), step=30)
    assert (history.mean_age(30), history.explored) == (10.0, 3 / 8)  # unit 6 is 20; unit 4 was tried before
    again = telemetry.History(_units(0, 1), num_units=8)
    again.load_state_dict(history.state_dict())
    history.change(dropped=_units(6), grown=_units(7), step=40)  # which the other must not see
    assert (again.mean_age(30), again.explored) == (10.0, 3 / 8)


@pytest.mark.parametrize(
    ("m", "n", "band", "units"),
    [(8, 8, 1, (3,)), (12, 4, 1, (0,)), (12, 4, 1, (10,)), (12, 4, 2, (5, 1)), (4, 12, 4, (2,)), (12, 8, 4, (0, 1, 2))],
)
def test_uncovered_rows_and_columns(m: int, n: int, band: int, units: tuple[int, ...]) -> None:
    ones = torch.ones(len(units) * band, min(m, n))
    weight = to_dense(ones, _units(*units), out_features=m, in_features=n, band=band)
    empty = (weight == 0).all(1 if m >= n else 0).sum()
    assert telemetry.uncovered(_units(*units), band, min(m, n), max(m, n)) == empty
