"""The compressed weight: an expression of operators over a weight, kept as a small graph.

Every operator of `stoicc.ops` takes a weight or another operator's result and returns a
`CompressedWeight` with one more node. A node carries what the operator decided (masks, codes,
scales, factors, permutations), never a float to guess from. Lowering walks the graph in
topological order; `stoicc.ops.lowering` has the meaning of each node.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import networkx as nx
import torch
from torch import Tensor

from stoicc.ir.dtypes import DTYPE_NAMES
from stoicc.ir.errors import InputError
from stoicc.tiling import check_tile
from stoicc.weights import as_matrix, non_finite, version_of


@dataclass(frozen=True, eq=False)
class Source:
    """The weight `[M, K]` that the expression starts from; not copied, so it must not change.

    Attributes:
        version: how often the weight had been changed in place when the expression was made.
    """

    weight: Tensor
    version: int


@dataclass(frozen=True, eq=False)
class Prune:
    """Keep the weights where `kept` `[M, K]` is True; the others become +0.0."""

    kept: Tensor
    what: str


@dataclass(frozen=True, eq=False)
class Update:
    """Weights that moved: `values` `[M, K]` in the weight's dtype; pruned ones stay +0.0."""

    values: Tensor
    what: str


@dataclass(frozen=True, eq=False)
class Quantize:
    """Weights as `(code - zero) * scale`, rounded once to the weight's dtype.

    Attributes:
        codes: uint8 `[M, K]`.
        scales: `[M, groups]` in the weight's dtype, groups = ceil(K / group_size) (1 if 0).
        zeros: uint8 `[M, groups]`, or None for the symmetric zero 2**(bits - 1).
        where: bool per weight `[M, K]`, constant on tiles: the weights that are quantized.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    group_size: int
    where: Tensor
    what: str


@dataclass(frozen=True, eq=False)
class LowRank:
    """Add `left [M, r] @ right [r, K]`, in the row and column order of the source."""

    left: Tensor
    right: Tensor
    what: str


@dataclass(frozen=True, eq=False)
class QuantizeLowRank:
    """The low-rank factors so far as codes: `left [M, r]` and `right [r, K]`, groups along r and along K."""

    left: Quantize
    right: Quantize
    what: str


@dataclass(frozen=True, eq=False)
class Permute:
    """Reorder rows and columns before tiling; the executor undoes it on x and y.

    `rows[i]` and `columns[j]` are the row and column of the input that come to stand at i and j.
    """

    rows: Tensor | None
    columns: Tensor | None


@dataclass(frozen=True, eq=False)
class Scale:
    """The tiles hold diag(1/output) W diag(1/input): the executor scales x and y back.

    `input_scale [K]` and `output_scale [M]` are float32, in the order of the source.
    """

    input_scale: Tensor | None
    output_scale: Tensor | None


@dataclass(frozen=True, eq=False)
class Stack:
    """The inputs below each other: `[M1 + M2 + ..., K]`, one launch for several layers."""


Node: TypeAlias = Source | Prune | Update | Quantize | LowRank | QuantizeLowRank | Permute | Scale | Stack


@dataclass(frozen=True, eq=False, repr=False)
class CompressedWeight:
    """An operator graph with one output; immutable, and cheap to extend.

    Attributes:
        graph: networkx DiGraph; nodes are ints with a `node` attribute, edges carry `position`.
        output: the node whose value this is.
        tile: the tile shape that tile-wise operators used, or None.
    """

    graph: nx.DiGraph
    output: int
    tile: tuple[int, int] | None = None

    @staticmethod
    def source(weight: object) -> "CompressedWeight":
        """The expression that is just a weight: whatever `stoicc.compile` takes as a matrix."""
        matrix = as_matrix(weight)
        bad = non_finite(matrix)
        if bad is not None:
            raise InputError(f"weight: expected finite values, found {bad[2]} at row {bad[0]}, column {bad[1]}")
        graph = nx.DiGraph()
        graph.add_node(0, node=Source(matrix, version_of(matrix)))
        return CompressedWeight(graph, 0)

    @staticmethod
    def of(weight: object) -> "CompressedWeight":
        """A weight or an operator's result, as an expression."""
        return weight if isinstance(weight, CompressedWeight) else CompressedWeight.source(weight)

    def then(self, node: Node, tile: tuple[int, int] | None = None) -> "CompressedWeight":
        """This expression with one more operator applied to it."""
        tile = None if tile is None else check_tile(tile)
        if tile is not None and self.tile is not None and tile != self.tile:
            raise InputError(f"operator: expected tile {self.tile} as the operators before, found {tile}")
        if isinstance(node, Prune) and (node.kept.shape != self.shape or node.kept.dtype != torch.bool):
            raise InputError(
                f"operator: expected a bool mask {list(self.shape)} to prune with, found {node.kept.dtype} "
                f"{list(node.kept.shape)}"
            )
        if isinstance(node, Update):
            self._check_update(node)
        graph = self.graph.copy()
        graph.add_node(len(graph), node=node)
        graph.add_edge(self.output, len(graph) - 1, position=0)
        return CompressedWeight(graph, len(graph) - 1, tile or self.tile)

    def _check_update(self, node: Update) -> None:
        """New values fit the old ones, are finite, and take no codes' place."""
        from stoicc.ops.lowering import lower

        state = lower(self)
        if state.sheets:
            raise InputError("operator: expected a weight that is not quantized yet, found codes; quantize afterwards")
        old, new = state.values, node.values
        if new.shape != old.shape or new.dtype != old.dtype or not bool(new.isfinite().all()):
            raise InputError(
                f"operator: expected finite values {list(old.shape)} in {old.dtype} to go on with, found "
                f"{list(new.shape)} in {new.dtype}{'' if new.shape != old.shape else ' or infinities'}"
            )

    @staticmethod
    def stack(parts: "list[CompressedWeight]") -> "CompressedWeight":
        """Expressions of equal K below each other."""
        if not parts:
            raise InputError("ops.stack: expected at least one weight, found none")
        tiles = {part.tile for part in parts if part.tile is not None}
        if len(tiles) > 1:
            raise InputError(f"ops.stack: expected one tile shape, found {sorted(tiles)}")
        graph = nx.disjoint_union_all([part.graph for part in parts])
        offsets = [sum(len(part.graph) for part in parts[:index]) for index in range(len(parts))]
        output = len(graph)
        graph.add_node(output, node=Stack())
        for position, (offset, part) in enumerate(zip(offsets, parts, strict=True)):
            graph.add_edge(offset + part.output, output, position=position)
        return CompressedWeight(graph, output, next(iter(tiles), None))

    def nodes(self) -> Iterator[tuple[int, Node, list[int]]]:
        """(id, node, inputs in order) in topological order."""
        bare = nx.DiGraph()  # networkx's views make a graph a cycle, which would keep the tensors until it is collected
        bare.add_nodes_from(self.graph)
        bare.add_edges_from((start, end) for start, ends in self.graph.adjacency() for end in ends)
        for index in nx.lexicographical_topological_sort(bare):
            inputs = {start: self.graph.get_edge_data(start, index)["position"] for start in bare.predecessors(index)}
            yield index, self.graph.nodes[index]["node"], sorted(inputs, key=inputs.__getitem__)

    @property
    def shape(self) -> torch.Size:
        """`[M, K]`."""
        return self.values().shape

    def values(self) -> Tensor:
        """The tile part `[M, K]` in tile order (permuted, unscaled, without low rank)."""
        from stoicc.ops.lowering import lower

        return lower(self).values

    def dense(self) -> Tensor:
        """The whole matrix that the expression stands for, `[M, K]`.

        In the weight's dtype where it is tiles and permutations alone; float32 where scales or
        low-rank factors stand beside them.
        """
        from stoicc.ops.lowering import lower

        return lower(self).dense()

    def __str__(self) -> str:
        lines = []
        for index, node, inputs in self.nodes():
            arguments = ", ".join(f"%{i}" for i in inputs)
            lines.append(f"%{index} = {type(node).__name__.lower()}({arguments}){_details(node)}")
        return "\n".join(lines)

    __repr__ = __str__


def _details(node: Node) -> str:
    match node:
        case Source(weight=weight):
            return f" {DTYPE_NAMES[weight.dtype]}{list(weight.shape)}"
        case Prune(kept, what):
            return f" {what}, keeps {kept.float().mean().item():.1%}"
        case Update(what=what):
            return f" {what}"
        case Quantize(what=what, where=where):
            return f" {what}, on {where.float().mean().item():.1%}"
        case LowRank(what=what) | QuantizeLowRank(what=what):
            return f" {what}"
        case _:
            return ""
