"""What sparsify() did, as data and as a table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerReport:
    """One replaced layer. size: the band of diagonals, or that of the pattern. num_final: units once the topology is settled.

    parameters: learned ones, with bias, and with what dynadiag keeps beyond `num_final`; dense_parameters: with bias.
    rank: of the low-rank path, 0 for none.
    """

    name: str
    in_features: int
    out_features: int
    pattern: str
    size: int
    num_final: int
    num_units: int
    target_sparsity: float
    parameters: int
    dense_parameters: int
    rank: int = 0

    @property
    def density(self) -> float:
        """Numbers that the product reads over those of the dense weight; both factors of the low-rank path count."""
        path = self.rank * (self.in_features + self.out_features) / (self.in_features * self.out_features)
        return self.num_final / self.num_units + path


@dataclass(frozen=True)
class SparsityReport:
    """The replaced layers in the order of the model, and the parameters of the whole model before and after."""

    layers: tuple[LayerReport, ...]
    parameters: int
    dense_parameters: int

    @property
    def density(self) -> float:
        """Numbers that the replaced layers read over the weights they had when dense (1.0 without such layers)."""
        present = sum(r.density * r.in_features * r.out_features for r in self.layers)
        total = sum(r.in_features * r.out_features for r in self.layers)
        return present / total if total else 1.0

    @property
    def sparsity_warning(self) -> str | None:
        """What to say of layers that have more than twice the weights that they were to have, as one unit of a group always stays."""
        layers = [r for r in self.layers if r.num_final / r.num_units > 2.0 * (1.0 - r.target_sparsity) + 1e-9]
        told = ", ".join(
            f"{r.name} ({r.num_final / r.num_units:.4g} instead of {1.0 - r.target_sparsity:.4g})" for r in layers
        )
        return (
            f"too few units for the sparsity that the rules ask for (a smaller band or size has more): {told}"
            if told
            else None
        )

    def __str__(self) -> str:
        width = max([len("layer"), *(len(r.name) for r in self.layers)])
        lines = [
            f"{'layer':<{width}}  {'out x in':>13}  {'pattern':>15}  {'units':>11}  {'density':>7}  {'parameters':>10}"
        ]
        for r in self.layers:
            shape, units = f"{r.out_features} x {r.in_features}", f"{r.num_final} / {r.num_units}"
            pattern = r.pattern if r.size == 1 else f"{r.pattern} {r.size}"
            lines.append(
                f"{r.name:<{width}}  {shape:>13}  {pattern:>15}  {units:>11}  {r.density:>7.4f}  {r.parameters:>10,}"
            )
        if self.sparsity_warning is not None:
            lines.append(self.sparsity_warning)
        lines.append(
            f"model: {self.parameters:,} parameters, {self.dense_parameters:,} when dense; "
            f"density of the sparse layers {self.density:.4f}"
        )
        return "\n".join(lines)
