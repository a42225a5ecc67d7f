"""A checkpoint restored on other numbers of ranks and under other ZeRO stages: the same masters, moments, buffers and copies."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dst_train.engine.manifest import CheckpointError
from tests.distributed import test_params as params
from tests.distributed.ranks import run_ranks

# (stage, precision, optimiser) that writes on two ranks after STEP steps, and the stage that reads.
CASES = [
    ((0, "fp32", "adamw"), 0),
    *(((stage, "fp32", "adamw"), other) for stage in (1, 2, 3) for other in (1, 2, 3)),
    *(((stage, "bf16_params", "adamw"), stage) for stage in (1, 2, 3)),
    ((1, "bf16", "adamw"), 1),
    ((3, "bf16", "sgd"), 3),
    ((2, "fp32", "sgd"), 2),
]
Case = tuple[tuple[int, str, str], int]
STEP, KIND = 3, "dynadiag"


def _sgd(model: nn.Module) -> torch.optim.SGD:
    groups = [{"params": group["params"]} for group in params._optimizer(model).param_groups]
    return torch.optim.SGD(groups, lr=1e-2, momentum=0.9)


class Run:
    """A model with its engine and topology on this rank, as test_params has them."""

    def __init__(self, stage: int, precision: str, optimizer: str) -> None:
        self.precision = precision
        make = params._optimizer if optimizer == "adamw" else _sgd
        self.engine, self.topology = params._engine(stage, precision, KIND, make)

    def train(self, batches: list[Tensor]) -> None:
        for x in batches:
            params._step(self.engine, self.precision, x)
            self.topology.step()

    def held(self) -> dict[str, Any]:
        """What this rank has: pieces of every parameter, what its forward reads, buffers, and counts."""
        import deepspeed

        module, editor, stage = self.engine.module, self.topology._editor, self.engine.zero_optimization_stage()
        pieces, forward = {}, {}
        for name, parameter in module.named_parameters():
            piece = editor.piece(parameter)  # type: ignore[union-attr]
            owned = {} if piece is None else {"master": piece.master, **piece.state}
            pieces[name] = {key: (piece.start, tensor.detach().clone()) for key, tensor in owned.items() if piece}
            with deepspeed.zero.GatheredParameters([parameter], enabled=stage == 3):
                forward[name] = parameter.detach().clone()
        steps = {float(state["step"]) for state in self._states() if "step" in state}
        counts = (self.engine.global_steps, self.engine.global_samples, self.engine.skipped_steps)
        buffers = {name: buffer.clone() for name, buffer in module.state_dict().items() if name not in forward}
        return {"pieces": pieces, "forward": forward, "buffers": buffers, "steps": steps, "counts": counts}

    def _states(self) -> list[dict[str, Any]]:
        optimizer = self.engine.optimizer
        return list(getattr(optimizer, "optimizer", optimizer).state.values())

    def checkpoints(self, root: Path) -> Any:
        from dst_train.engine.checkpoint import Checkpoints

        return Checkpoints(root, keep=2)


def _folder(root: Path, case: Case) -> Path:
    return root / "-".join(map(str, case[0]))


def _write(root: Path, cases: list[Case]) -> dict[tuple[int, str, str], Any]:
    from dst_train.engine.session import init_distributed

    init_distributed()
    results = {}
    for case in cases:
        if case[0] in results:
            continue
        run = Run(*case[0])
        run.train(params._batches()[:STEP])
        facts = {
            "job": {"deepspeed": {"zero_optimization": {"stage": case[0][0]}}},
            "topology_digest": run.topology.digest(),
        }
        run.checkpoints(_folder(root, case)).save(run.engine, STEP, run.topology.state_dict(), facts)
        saved = run.held()
        run.train(params._batches()[STEP:])
        results[case[0]] = {"saved": saved, "end": run.held()}
    return results


def _read(root: Path, cases: list[Case]) -> dict[Case, Any]:
    from dst_train.engine.session import init_distributed

    init_distributed()
    results = {}
    for case in cases:
        (_, precision, optimizer), stage = case
        run = Run(stage, precision, optimizer)
        checkpoints = run.checkpoints(_folder(root, case))
        found, _ = checkpoints.newest()
        run.topology.load_state_dict(checkpoints.load(run.engine, found))
        saved = run.held()
        run.train(params._batches()[STEP:])
        results[case] = {"saved": saved, "end": run.held()}
    return results


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    root = tmp_path_factory.mktemp("written")
    return root, run_ranks(2, _write, root, CASES)


# On as many ranks as wrote, another stage only: the rest is DeepSpeed's.
READ = {ranks: [case for case in CASES if ranks != 2 or case[0][0] != case[1]] for ranks in (1, 2, 3)}


@functools.cache
def _read_on(ranks: int, root: Path) -> list[Any]:
    return run_ranks(ranks, _read, root, READ[ranks])


def _wholes(ranks: list[Any], moment: str) -> dict[tuple[str, str], Tensor]:
    held = [rank[moment] for rank in ranks]
    keys = {(name, key) for rank in held for name, pieces in rank["pieces"].items() for key in pieces}
    return {
        (name, key): params._whole(
            [{"pieces": rank["pieces"][name]} for rank in held], key, held[0]["forward"][name].numel()
        )
        for name, key in keys
    }


@pytest.mark.parametrize(
    ("ranks", "case"),
    [(ranks, case) for ranks, cases in READ.items() for case in cases],
    ids=lambda value: f"{'-'.join(map(str, value[0]))}-to-{value[1]}" if isinstance(value, tuple) else f"{value} ranks",
)
def test_every_element_and_buffer_is_restored_and_training_goes_on(
    written: tuple[Path, list[Any]], ranks: int, case: Case
) -> None:
    before, after = [rank[case[0]] for rank in written[1]], [rank[case] for rank in _read_on(ranks, written[0])]
    expected, found = _wholes(before, "saved"), _wholes(after, "saved")
    assert expected.keys() == found.keys()
    assert {key for _, key in found} >= {"master", "exp_avg" if case[0][2] == "adamw" else "momentum_buffer"}
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
    for rank in after:
        saved = rank["saved"]
        for what in ("forward", "buffers"):
            assert saved[what].keys() == before[0]["saved"][what].keys()
            for name, value in before[0]["saved"][what].items():
                assert saved[what][name].dtype == value.dtype
                assert torch.equal(saved[what][name], value), name
        for what in ("steps", "counts"):
            assert saved[what] == before[0]["saved"][what]
            assert rank["end"][what] == before[0]["end"][what]
    if case[0][1] == "fp32":  # what bf16 rounds may decide for another diagonal
        for rank in after:
            assert torch.equal(rank["end"]["buffers"]["0.offsets"], before[0]["end"]["buffers"]["0.offsets"])
        end = _wholes(before, "end")
        for key, value in _wholes(after, "end").items():
            # As test_params: the order of sums changes the last bits of a gradient, and AdamW divides by sqrt(v).
            torch.testing.assert_close(value, end[key], rtol=1e-4, atol=2e-6 if key[1] == "master" else 1e-7)


def _damaged(root: Path, case: Case) -> list[str]:
    from dst_train.engine import reshard
    from dst_train.engine.session import init_distributed

    init_distributed()
    run = Run(case[1], *case[0][1:])
    checkpoints = run.checkpoints(_folder(root, case))
    found, _ = checkpoints.newest()
    assert found is not None
    rank_0, shard, messages = reshard.rank_0, reshard._shard, []

    def gap(folder: Path) -> dict[str, Any]:
        saved = rank_0(folder)
        places = saved["dst_train"]["layouts"][1]
        name = max(places)
        group, offset, start, numel = places[name]
        places[name] = (group, offset, start + 1, numel - 1)
        return saved

    def another_step(folder: Path, rank: int) -> list[dict[str, Any]]:
        groups = shard(folder, rank)
        groups[-1]["step"] = groups[-1]["step"] + rank
        return groups

    def no_offsets(folder: Path) -> dict[str, Any]:
        saved = rank_0(folder)
        saved["buffer_names"].remove("0.offsets")
        return saved

    for name, damage in (("rank_0", gap), ("_shard", another_step), ("rank_0", no_offsets)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reshard, name, damage)
            with pytest.raises(CheckpointError) as caught:
                checkpoints.load(run.engine, found)
        messages.append(str(caught.value))
    return messages


def test_what_does_not_fit_is_refused_on_every_rank(written: tuple[Path, list[Any]]) -> None:
    for gap, another_step, no_offsets in run_ranks(3, _damaged, written[0], ((1, "fp32", "adamw"), 1)):
        assert "step-00000003 does not fit the model: " in gap
        assert "elements, the shards not each of them once" in gap
        assert "'step' of the optimiser is 3.0 on rank 0 and 4.0 on rank 1" in another_step
        assert "buffers that only one of both has: 0.offsets" in no_offsets
