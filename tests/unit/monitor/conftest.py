"""Updates of a model with one layer of 8 units, 3 of them active."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tensorboard.summary.writer import event_file_writer

from dst_train.monitor import RunDirectory
from dst_train.sparse.report import LayerReport, SparsityReport
from dst_train.topology import LayerUpdate, TopologyUpdate

MakeUpdate = Callable[..., TopologyUpdate]


@pytest.fixture(autouse=True)
def _event_files_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard reads them by name, in which a number follows the second: those of one process and second come in order up to 9."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "runs" / "name")


@pytest.fixture
def make_update() -> MakeUpdate:
    """make_update(step, layers=("fc",)): after update number n the units n, n + 1, n + 2 (mod 8) are active."""

    def make(step: int, layers: tuple[str, ...] = ("fc",)) -> TopologyUpdate:
        number = step // 4
        active = tuple(sorted((number + i) % 8 for i in range(3)))
        change = {"dropped": ((number - 1) % 8,), "grown": ((number + 2) % 8,), "active": active}
        telemetry = {"mean_age": 2.5, "explored": 0.5, "uncovered": 1, "drop_margin": 0.25, "grow_margin": None}
        return TopologyUpdate(
            step=step,
            number=number,
            drop_fraction=0.3,
            seconds=0.25,
            digest=f"digest{number}",
            layers=tuple(LayerUpdate(name=name, num_units=8, **change, **telemetry) for name in layers),
        )

    return make


@pytest.fixture
def report() -> SparsityReport:
    """16 x 8 diagonal layer in bands of 2: 3 of 8 units make 0.625 of the 0.6 that was asked for."""
    layer = LayerReport(
        name="fc",
        in_features=8,
        out_features=16,
        pattern="diagonal",
        size=2,
        num_final=3,
        num_units=8,
        target_sparsity=0.6,
        parameters=48,
        dense_parameters=128,
    )
    return SparsityReport(layers=(layer,), parameters=48, dense_parameters=128)
