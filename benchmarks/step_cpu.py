"""A training step of ViT-B/16 and Mixer-S/16 on this CPU, fp32: dense, and with 90 % of the weights of some layers
absent.

    python benchmarks/step_cpu.py [--threads 2] [--repeats 7] [--quick]

A step is forward, cross-entropy, backward and AdamW on 8 random images of 3 x 224 x 224 and 1000 classes. The dense
model and the sparse ones (bands 1 and 16) take a step each in turn, in one process with the same threads. Printed are
medians and [quartiles] in milliseconds of the parts of a step and the share of Amdahl's bound that is reached:

- replaced layers: forward and backward of the layers that are sparse in the sparse model; ideally 1 / density faster.
- the rest of forward and backward: ideally as it was. Both together give Amdahl's bound 1 / (1 - f + f * density) with
  f, the share of the replaced layers in forward and backward of the dense model.
- optimiser: ideally faster by the ratio of the parameters. It is a part of its own, as it is not the op that makes it
  fast.
- step: all of it. Its bound follows from the ideals of its parts.

The same for what the op reaches alone: each pair of replaced layers in turn on inputs of the same shape, outside the
step. Then the operations of the sparse step that take most time, by torch.profiler.

Memory that is freed stays in the process, as in op_cpu.py. Writes results/step_cpu-<cpu>_<kernels>-torch<version>.csv;
`--quick` takes two steps of models with two blocks and two images, and only prints.
"""

from __future__ import annotations

import argparse
import copy
import os
import re
import time
from functools import partial

import timm
import torch
import torch.nn.functional as F
from measuring import Times, load, quartiles, start, take_turns, write_results
from torch import Tensor, nn

from dst_train import sparsify
from dst_train.sparse import sparse_layers

MODELS = {  # timm's name: globs of the layers that become sparse
    "vit_base_patch16_224": ("blocks.*.attn.proj", "blocks.*.mlp.fc1", "blocks.*.mlp.fc2"),
    "mixer_s16_224": ("blocks.*.mlp_tokens.fc*", "blocks.*.mlp_channels.fc*"),
}
BANDS = (1, 16)
SPARSITY = 0.9
WARM_UP = 3  # steps: the first makes the optimiser's state, the next ones still take fresh memory
LAYERS, REST, PASSES, OPTIMISER, STEP = "replaced layers", "the rest", "forward + backward", "optimiser", "step"
PARTS = (LAYERS, REST, PASSES, OPTIMISER, STEP)


class Trained:
    """A model in training that notes how long the parts of each step take, in milliseconds.

    The time of a layer is taken by hooks on the module: from its input to its output, and from its output's gradient to
    its input's. The hooks are there in all steps, dense and sparse, so that layers and step are measured in the same
    steps and what hooks cost, some 50 us a layer, is in both. Between the two hooks of the backward pass lie the
    gradients of weight and bias, too: the pass runs on one thread, and takes nodes of the graph in the order opposite
    to their creation. Adding up the profiler's spans gives the same within 2 %, but the profiler slows down the steps
    that it measures.
    """

    def __init__(self, model: nn.Module, replaced: list[str]) -> None:
        self.model = model.train()
        self.layers = {name: model.get_submodule(name) for name in replaced}
        self.inputs: dict[str, torch.Size] = {}
        self.optimiser = torch.optim.AdamW(model.parameters())
        for name in replaced:
            self._watch(name)
        self.forget()

    def forget(self) -> None:
        self.parts: dict[str, list[float]] = {part: [] for part in PARTS}
        self.by_layer = dict.fromkeys(self.layers, 0.0)

    def _watch(self, name: str) -> None:
        begin = 0.0

        def enter(_: nn.Module, tensors: tuple[Tensor, ...]) -> None:
            nonlocal begin
            self.inputs.setdefault(name, tensors[0].shape)  # the first time is in a forward pass
            begin = time.perf_counter()

        def leave(*_: object) -> None:
            self.by_layer[name] += (time.perf_counter() - begin) * 1e3

        module = self.layers[name]
        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)
        module.register_full_backward_pre_hook(enter)
        module.register_full_backward_hook(leave)

    def step(self, images: Tensor, labels: Tensor) -> None:
        layers = sum(self.by_layer.values())
        begin = time.perf_counter()
        F.cross_entropy(self.model(images), labels).backward()
        updating = time.perf_counter()
        self.optimiser.step()
        self.optimiser.zero_grad()
        end = time.perf_counter()
        layers, passes = sum(self.by_layer.values()) - layers, (updating - begin) * 1e3
        optimiser = (end - updating) * 1e3
        values = (layers, passes - layers, passes, optimiser, passes + optimiser)
        for part, milliseconds in zip(PARTS, values, strict=True):
            self.parts[part].append(milliseconds)

    def times(self) -> dict[str, Times]:
        return {part: quartiles(seen) for part, seen in self.parts.items()}

    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())


def build(name: str, quick: bool) -> tuple[Trained, dict[int, Trained]]:
    """The dense model, and by band the same model with sparse layers."""
    dense = timm.create_model(name, num_classes=1000)
    if quick:
        dense.blocks = nn.Sequential(*list(dense.get_submodule("blocks").children())[:2])
    models = {band: copy.deepcopy(dense) for band in BANDS}
    for band, model in models.items():
        sparsify(model, [{"match": match, "sparsity": SPARSITY, "band": band} for match in MODELS[name]])
    replaced = list(sparse_layers(models[BANDS[0]]))
    return Trained(dense, replaced), {band: Trained(model, replaced) for band, model in models.items()}


def alone(dense: Trained, sparse: dict[int, Trained], repeats: int) -> dict[int, float]:
    """By band: how many times faster forward and backward of all replaced layers are outside the step."""
    kinds: dict[tuple[torch.Size, torch.Size], list[str]] = {}
    for name, layer in dense.layers.items():
        kinds.setdefault((dense.inputs[name], layer.get_parameter("weight").shape), []).append(name)
    milliseconds = dict.fromkeys((0, *sparse), 0.0)
    for (shape, (out_features, _)), names in kinds.items():
        x, dy = torch.randn(shape, requires_grad=True), torch.randn(*shape[:-1], out_features)
        layers = [trained.layers[names[0]] for trained in (dense, *sparse.values())]
        calls = [partial(forward_backward, layer, x, dy) for layer in layers]
        for band, times in zip(milliseconds, take_turns(calls, repeats), strict=True):
            milliseconds[band] += len(names) * times.median
    return {band: milliseconds[0] / milliseconds[band] for band in sparse}


def forward_backward(layer: nn.Module, x: Tensor, dy: Tensor) -> None:
    torch.autograd.grad(layer.forward(x), (x, *layer.parameters()), dy)  # not layer(x): that would call the hooks


def speed_ups(dense: dict[str, Times], layers: float, optimiser: float) -> dict[str, float]:
    """What each part gains if replaced layers and optimiser take these shares of their time in the dense step."""
    ms = {part: times.median for part, times in dense.items()}
    ideal = {LAYERS: layers * ms[LAYERS], REST: ms[PASSES] - ms[LAYERS], OPTIMISER: optimiser * ms[OPTIMISER]}
    ideal[PASSES] = ideal[LAYERS] + ideal[REST]
    ideal[STEP] = ideal[PASSES] + ideal[OPTIMISER]
    return {part: ms[part] / ideal[part] for part in PARTS}


def compare(name: str, band: int, dense: Trained, sparse: Trained, factor: float) -> list[dict[str, object]]:
    """Prints the table of a sparse model against the dense one; returns it as rows of the csv file."""
    densities = {layer: module.final_density for layer, module in sparse_layers(sparse.model).items()}
    density = sum(densities[layer] * ms for layer, ms in dense.by_layer.items()) / sum(dense.by_layer.values())
    before, after = dense.times(), sparse.times()
    parameters = sparse.parameters() / dense.parameters()
    bounds, bounds_alone = speed_ups(before, density, parameters), speed_ups(before, 1 / factor, parameters)
    f = before[LAYERS].median / before[PASSES].median
    print(
        f"\n{name}, band {band}: {len(densities)} replaced layers, {100 * f:.0f} % of forward + backward, of density "
        f"{density:.3f}; {parameters:.2f} of the parameters; the op alone is x{factor:.2f}"
    )
    print(f"{'':<20}{'dense, ms':<32}{'sparse, ms':<30}speed-up    bound reached    with the op alone reached")
    rows: list[dict[str, object]] = []
    for part in PARTS:
        speed_up = before[part].median / after[part].median
        reached, reached_alone = speed_up / bounds[part], speed_up / bounds_alone[part]
        print(
            f"{part:<20}{before[part]!s:<32}{after[part]!s:<30}{f'x{speed_up:.2f}':>8}{f'x{bounds[part]:.2f}':>9}"
            f"{100 * reached:>6.0f} %{f'x{bounds_alone[part]:.2f}':>21}{100 * reached_alone:>6.0f} %"
        )
        row = {
            "model": name,
            "threads": torch.get_num_threads(),
            "band": band,
            "density": f"{density:.4f}",
            "part": part,
        }
        for who, times in (("dense", before[part]), ("sparse", after[part])):
            row |= {f"{who}_{key}_ms": f"{ms:.3f}" for key, ms in times._asdict().items()}
        bound = {"speed_up": speed_up, "bound": bounds[part], "share_of_bound": reached}
        bound |= {"bound_alone": bounds_alone[part], "share_of_bound_alone": reached_alone}
        rows.append(row | {key: f"{value:.3f}" for key, value in bound.items()})
    return rows


def show_profile(trained: Trained, images: Tensor, labels: Tensor) -> None:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # no notices of the profiler's own
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        trained.step(images, labels)
    events = sorted(profiler.key_averages(), key=lambda e: e.self_cpu_time_total, reverse=True)
    total = sum(e.self_cpu_time_total for e in events)
    print(f"where the sparse step's {total / 1e3:.0f} ms go:")
    for e in events[:12]:
        share = 100 * e.self_cpu_time_total / total
        # An op whose backward is defined in Python runs its kernel inside a function with this name.
        key = re.sub(r"^GeneratedBackwardFor_dst_ops_(\w+)_default$", r"dst_ops::\1 (its kernel)", e.key)
        print(f"  {key[:60]:<62}{e.self_cpu_time_total / 1e3:>9.1f} ms{share:>6.1f} %{e.count:>6} calls")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    print(start(args.threads, fresh_pages=False))
    repeats, batch = (2, 2) if args.quick else (args.repeats, 8)
    images, labels = torch.randn(batch, 3, 224, 224), torch.randint(1000, (batch,))
    rows = []
    for name in MODELS:
        dense, sparse = build(name, args.quick)
        everyone = [dense, *sparse.values()]
        for trained in everyone:
            for _ in range(WARM_UP):
                trained.step(images, labels)
            trained.forget()
        for _ in range(repeats):
            for trained in everyone:
                trained.step(images, labels)
        factors = alone(dense, sparse, repeats)
        for band, trained in sparse.items():
            rows += compare(name, band, dense, trained, factors[band])
            show_profile(trained, images, labels)
    print(f"\nload {load()} at the end")
    if not args.quick:
        write_results("step_cpu", rows)


if __name__ == "__main__":
    main()
