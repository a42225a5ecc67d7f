"""A trained model as a file of its own, without optimiser and checkpoint: what `dst-train export` writes, and the way back."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pydantic
import safetensors
import safetensors.torch
from torch import nn

from dst_train import models
from dst_train.job.schema import Model, Seed, Sparsity, Strict, TimmModel, TransformersModel
from dst_train.sparse import DiagonalLinear, densify, sparse_layers, sparsify

KEY = "dst_train"  # of what the file says of itself


class About(Strict):
    """What of a job a model is built from again, and where the weights come from."""

    run: str
    step: int
    seed: Seed
    model: Model
    sparsity: Sparsity | None


def export(run: str | Path, target: str | Path, *, dense: bool = False) -> str:
    """Write the model of a run's newest checkpoint that verifies to `target`, fp32; returns a line that tells what was written.

    Sparse, it is a safetensors file for `load_exported`: units that are there, without free slots; gates are part of the values.
    `dense` writes what the model's library reads by itself, zeros included: a safetensors file (timm's `checkpoint_path`), or a folder for
    `from_pretrained` if the model is of transformers.

    Raises:
        CheckpointError: as `dst_train.engine.load_model`.
        FileExistsError: there is a `target`.
    """
    from dst_train.engine.load import load_run

    if Path(target).exists():
        raise FileExistsError(f"{target} exists; choose another name, or remove it first")
    loaded = load_run(run)
    job = loaded.job
    about = About(
        run=job.name, step=loaded.step, seed=job.seed, model=models.untrained(job.model), sparsity=job.sparsity
    )
    return save(loaded.model, about, Path(target), dense=dense)


def save(model: nn.Module, about: About, target: Path, *, dense: bool) -> str:
    """`export` of a model at hand, which is changed: its layers become dense, or what they need for training is gone."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")  # nothing under the name until it is whole
    _remove(partial)
    if dense and isinstance(about.model, TransformersModel):
        densify(model).save_pretrained(partial)  # type: ignore[operator]
        reader = f"from_pretrained({str(target)!r}) of transformers"
    else:
        if dense:
            model, about = densify(model), about.model_copy(update={"sparsity": None})
        for layer in _diagonal(model).values():
            layer.finalize()
        safetensors.torch.save_model(model, str(partial), {"format": "pt", KEY: about.model_dump_json()})
        reader = f"dst_train.load_exported({str(target)!r})"
        if dense and isinstance(about.model, TimmModel):
            reader += " or, of timm, create_model(..., checkpoint_path=...)"
    for path in [partial] if partial.is_file() else partial.glob("*.safetensors"):
        path.chmod(0o666 & ~_umask())  # safetensors makes files that only the owner reads
    partial.rename(target)
    size = sum(path.stat().st_size for path in ([target] if target.is_file() else target.iterdir()))
    weights = "dense" if dense else "sparse"
    return (
        f"{target}: {weights} weights of {about.run} at step {about.step}, {size / 1e6:.3g} MB; read them with {reader}"
    )


def load_exported(path: str | Path) -> nn.Module:
    """The model in a file that `dst-train export` wrote: on the CPU, in fp32, in evaluation mode. Neither run nor DeepSpeed is needed.

    Raises:
        FileNotFoundError: there is no file.
        ValueError: it is not such a file, or one of another version of dst-train.
    """
    about, slots = _read(path)
    model = models.build(about.model, seed=about.seed)
    if about.sparsity is not None:
        rank = about.sparsity.low_rank.rank if about.sparsity.low_rank is not None else 0
        sparsify(model, about.sparsity.rules, budget=about.sparsity.budget, seed=about.seed, rank=rank)
    for name, layer in _diagonal(model).items():
        layer.resize_slots(slots[name])
    safetensors.torch.load_model(model, path)
    return model.eval()


def _read(path: str | Path) -> tuple[About, dict[str, int]]:
    """What the file says of itself, and the number of units of each diagonal layer."""
    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder; dense weights of a transformers model are read by its from_pretrained")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(KEY)
            names = [name for name in file.keys() if name.endswith(".offsets")]  # noqa: SIM118  (no mapping)
            slots = {name.removesuffix(".offsets"): file.get_slice(name).get_shape()[0] for name in names}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from error
    if text is None:
        raise ValueError(f"{path} says nothing of dst-train; this reads files of `dst-train export` only")
    try:
        return About.model_validate_json(text), slots
    except pydantic.ValidationError as error:
        raise ValueError(f"{path} is of another version of dst-train: {error}") from error


def _diagonal(model: nn.Module) -> dict[str, DiagonalLinear]:
    return {name: layer for name, layer in sparse_layers(model).items() if isinstance(layer, DiagonalLinear)}


def _umask() -> int:
    mask = os.umask(0)  # it can only be read by setting it
    os.umask(mask)
    return mask


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
