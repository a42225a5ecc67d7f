"""--backend: which kernels the tests of the op run, cpu, cuda, or the CUDA kernels emulated on the host."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from dst_ops import cuda, routes

MARKERS = (
    "cpu_only: about the CPU's kernels alone, or a matter of the host that is tested once",
    "cuda_only: about the CUDA kernels alone, on a GPU or emulated",
    "every_chip: emulated, also with the kernels of chips before the H100",
    "not_emulated: starts processes, in which there is no emulator",
)

OLDER = "band before 9.0"  # the band kernels of chips that have no engine to copy boxes: emulated only


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--backend", choices=("cpu", "emulated", "cuda"), default="cpu", help=__doc__)


def pytest_configure(config: pytest.Config) -> None:
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)
    backend = config.getoption("--backend")
    if backend == "emulated":
        from tests.gpu import emulated

        config.emulator = emulated.Emulator(emulated.library())  # type: ignore[attr-defined]
    if backend == "cuda":
        os.environ["DST_OPS_REQUIRE_FUSED"] = "1"
        torch.set_default_device("cuda")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = {"cpu": ("cuda_only",), "emulated": ("cpu_only", "not_emulated"), "cuda": ("cpu_only",)}[
        config.getoption("--backend")
    ]
    for item in items:
        for marker in left_out:
            if marker in item.keywords:
                item.add_marker(pytest.mark.skip(reason=marker))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    own = any("kernel" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize"))
    if "kernel" in metafunc.fixturenames and not own:
        backend = metafunc.config.getoption("--backend")
        kernels: tuple[str, ...] = ("natural",) if backend == "cpu" else routes.KERNELS
        if backend == "emulated" and metafunc.definition.get_closest_marker("every_chip"):
            kernels = (*kernels, OLDER)
        metafunc.parametrize("kernel", kernels, indirect=True)


@pytest.fixture
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each of the CUDA kernels in turn, where it can take the call; there is no choice on the CPU."""
    if request.param == OLDER and request.config.getoption("--backend") != "emulated":
        pytest.skip("needs --backend emulated")
    choose = routes.choose
    name = "band" if request.param == OLDER else request.param

    def prefer(call: routes.Call, gpu: str, shared_memory: int, *tf32: bool) -> routes.Choice:
        if name in routes.possible(call, shared_memory):
            return routes.Choice(name, "the test's")
        return choose(call, gpu, shared_memory)

    if name != "natural":
        monkeypatch.setattr(cuda, "choose", prefer)
    if request.param == OLDER:
        request.config.emulator.set(major=8)  # type: ignore[attr-defined]
    cuda._choice.cache_clear()
    yield name
    cuda._choice.cache_clear()
    if request.param == OLDER:
        request.config.emulator.set(major=9)  # type: ignore[attr-defined]


@pytest.fixture
def emulator(pytestconfig: pytest.Config) -> object:
    if not hasattr(pytestconfig, "emulator"):
        pytest.skip("needs --backend emulated")
    return pytestconfig.emulator
