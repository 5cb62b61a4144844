"""Lowering an operator graph: from an expression to what tiles and epilogue will hold.

The result is still a matrix (values, and code sheets for what is quantized) with what stands
beside it. The inspector cuts it in tiles and gives each the cheapest format that holds it.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from stoicc.ir.errors import InputError
from stoicc.ops.graph import (
    CompressedWeight,
    LowRank,
    Node,
    Permute,
    Prune,
    Quantize,
    QuantizeLowRank,
    Scale,
    Source,
    Stack,
    Update,
)
from stoicc.tiling import row_blocks
from stoicc.weights import version_of


@dataclass(frozen=True, eq=False)
class CodeSheet:
    """Codes of the quantized part of a matrix; see `stoicc.ops.graph.Quantize`."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    group_size: int
    where: Tensor

    @staticmethod
    def of(node: Quantize) -> "CodeSheet":
        """The codes of a node."""
        return CodeSheet(node.codes, node.scales, node.zeros, node.bits, node.group_size, node.where)

    def zero_codes(self, rows: slice = slice(None)) -> Tensor:
        """The code that means 0.0, as a tensor that broadcasts to `codes[rows]`."""
        if self.zeros is None:
            return torch.tensor(1 << (self.bits - 1), dtype=torch.uint8)
        return self.spread(self.zeros[rows])

    def spread(self, groups: Tensor) -> Tensor:
        """Per group `[m, G]` -> per weight `[m, K]`."""
        columns = self.codes.shape[1]
        return groups.repeat_interleave(self.group_size or columns, 1)[:, :columns]

    def values_into(self, values: Tensor) -> Tensor:
        """A copy of `values [M, K]` with the quantized weights as (code - zero) * scale.

        The product is taken in fp32 and rounded once to the dtype of `values`.
        """
        merged = torch.empty_like(values)
        for rows in row_blocks((values.shape[0], values.shape[1])):
            steps = self.codes[rows].float() - self.zero_codes(rows).float()
            product = (steps * self.spread(self.scales[rows]).float()).to(values.dtype)
            merged[rows] = torch.where(self.where[rows], product, values[rows])
        return merged


@dataclass(frozen=True, eq=False)
class Lowered:
    """A matrix in tile order and what stands beside it; `steps` says what each node became.

    `kept` is False where an operator pruned a weight; None where none did. A weight that happens
    to be 0.0 is kept. `low_rank_codes` are the codes that the factors of `low_rank` are the values of, or None.
    """

    values: Tensor
    sheets: tuple[CodeSheet, ...] = ()
    low_rank: tuple[Tensor, Tensor] | None = None
    low_rank_codes: tuple[CodeSheet, CodeSheet] | None = None
    row_permutation: Tensor | None = None
    column_permutation: Tensor | None = None
    input_scale: Tensor | None = None
    output_scale: Tensor | None = None
    kept: Tensor | None = None
    steps: tuple[str, ...] = field(default=())

    def dense(self) -> Tensor:
        """The effective `[M, K]`; see `CompressedWeight.dense`."""
        matrix = _unpermute(self.values, self.row_permutation, self.column_permutation)
        if self.input_scale is not None:
            matrix = matrix.float() * self.input_scale.float()
        if self.output_scale is not None:
            matrix = matrix.float() * self.output_scale.float()[:, None]
        if self.low_rank is not None:
            matrix = matrix.float() + self.low_rank[0].float() @ self.low_rank[1].float()
        return matrix


def lower(weight: CompressedWeight) -> Lowered:
    """Walk the operator graph in topological order."""
    done: dict[int, Lowered] = {}
    for index, node, inputs in weight.nodes():
        done[index] = _apply(node, [done[i] for i in inputs])
    return done[weight.output]


def _apply(node: Node, inputs: list[Lowered]) -> Lowered:
    match node:
        case Source(values, version):
            if version_of(values) != version:
                raise InputError(
                    "operator: expected the weight as it was, found it changed in place since; pass weight.clone()"
                )
            return Lowered(values)
        case Prune():
            return _prune(inputs[0], node)
        case Update():
            return _update(inputs[0], node)
        case Quantize():
            return _quantize(inputs[0], node)
        case LowRank():
            return _low_rank(inputs[0], node)
        case QuantizeLowRank():
            return _quantize_low_rank(inputs[0], node)
        case Permute():
            return _permute(inputs[0], node)
        case Scale():
            return _scale(inputs[0], node)
        case Stack():
            return _stack(inputs)


def _prune(state: Lowered, node: Prune) -> Lowered:
    sheets = tuple(
        replace(sheet, codes=torch.where(node.kept, sheet.codes, sheet.zero_codes())) for sheet in state.sheets
    )
    values = torch.where(node.kept, state.values, torch.zeros((), dtype=state.values.dtype))
    kept = node.kept if state.kept is None else state.kept & node.kept
    step = f"prune ({node.what}): zeros in the tiles"
    return replace(state, values=values, sheets=sheets, kept=kept, steps=(*state.steps, step))


def _update(state: Lowered, node: Update) -> Lowered:
    assert not state.sheets, "CompressedWeight.then refuses quantized weights"
    values = node.values
    if state.kept is not None:
        values = torch.where(state.kept, values, torch.zeros((), dtype=values.dtype))
    return replace(state, values=values, steps=(*state.steps, f"update ({node.what}): new values in the tiles"))


def _quantize(state: Lowered, node: Quantize) -> Lowered:
    older = tuple(replace(sheet, where=sheet.where & ~node.where) for sheet in state.sheets)
    sheet = CodeSheet.of(node)
    step = f"quantize ({node.what}): codes and scales of the tiles, as they are"
    return replace(state, values=sheet.values_into(state.values), sheets=(*older, sheet), steps=(*state.steps, step))


def permuted_rows(state: Lowered, rows: Tensor) -> Lowered:
    """The same matrix with row `rows[i]` of the tiles at i: values, codes and their scales.

    What stands beside the tiles is in the order of y, and stays.
    """
    sheets = tuple(
        replace(
            sheet,
            codes=sheet.codes[rows],
            scales=sheet.scales[rows],
            zeros=None if sheet.zeros is None else sheet.zeros[rows],
            where=sheet.where[rows],
        )
        for sheet in state.sheets
    )
    order = _compose(state.row_permutation, rows)
    kept = None if state.kept is None else state.kept[rows]
    return replace(state, values=state.values[rows], sheets=sheets, kept=kept, row_permutation=order)


def _low_rank(state: Lowered, node: LowRank) -> Lowered:
    left, right = node.left, node.right
    if state.low_rank is not None:
        left, right = torch.cat((state.low_rank[0], left), 1), torch.cat((state.low_rank[1], right), 0)
    step = f"low rank ({node.what}): the executor's epilogue"
    return replace(state, low_rank=(left, right), low_rank_codes=None, steps=(*state.steps, step))


def _quantize_low_rank(state: Lowered, node: QuantizeLowRank) -> Lowered:
    assert state.low_rank is not None, "ops.quantize_adapter refuses weights without factors"
    left, right = CodeSheet.of(node.left), CodeSheet.of(node.right)
    factors = left.values_into(state.low_rank[0]), right.values_into(state.low_rank[1])
    step = f"quantize the factors ({node.what}): codes and scales beside the tiles, as they are"
    return replace(state, low_rank=factors, low_rank_codes=(left, right), steps=(*state.steps, step))


def _permute(state: Lowered, node: Permute) -> Lowered:
    assert not state.sheets, "ops.permute refuses quantized weights"
    if node.rows is not None:
        state = permuted_rows(state, node.rows)
    return replace(
        state,
        values=state.values if node.columns is None else state.values[:, node.columns],
        kept=state.kept if node.columns is None or state.kept is None else state.kept[:, node.columns],
        column_permutation=_compose(state.column_permutation, node.columns),
        steps=(*state.steps, "permute: gathers x (prologue) and scatters y (epilogue)"),
    )


def _scale(state: Lowered, node: Scale) -> Lowered:
    assert not state.sheets, "ops.scale refuses quantized weights"
    scaled = state.values.float()
    if node.input_scale is not None:
        order = state.column_permutation
        scaled = scaled / (node.input_scale if order is None else node.input_scale[order])
    if node.output_scale is not None:
        order = state.row_permutation
        scaled = scaled / (node.output_scale if order is None else node.output_scale[order])[:, None]
    return replace(
        state,
        values=scaled.to(state.values.dtype),
        input_scale=_product(state.input_scale, node.input_scale),
        output_scale=_product(state.output_scale, node.output_scale),
        steps=(*state.steps, "scale: multiplied into x (prologue) and y (epilogue)"),
    )


def _stack(inputs: list[Lowered]) -> Lowered:
    first = inputs[0]
    for part in inputs[1:]:
        if part.values.shape[1] != first.values.shape[1] or part.values.dtype != first.values.dtype:
            raise InputError(
                f"ops.stack: expected weights of K = {first.values.shape[1]} in {first.values.dtype}, found "
                f"K = {part.values.shape[1]} in {part.values.dtype}"
            )
        for name in ("column_permutation", "input_scale"):
            if not _same(getattr(part, name), getattr(first, name)):
                raise InputError(f"ops.stack: expected one {name} for all weights, found different ones")
    rows = [part.values.shape[0] for part in inputs]
    starts = [sum(rows[:index]) for index in range(len(rows))]
    return replace(
        first,
        values=torch.cat([part.values for part in inputs]),
        sheets=tuple(
            _lift(sheet, start, sum(rows)) for part, start in zip(inputs, starts, strict=True) for sheet in part.sheets
        ),
        low_rank=_stack_low_rank(inputs, rows),
        low_rank_codes=None,
        kept=_stack_kept(inputs),
        row_permutation=_stack_rows(inputs, rows, starts),
        output_scale=_stack_scales(inputs, rows),
        steps=(*(step for part in inputs for step in part.steps), f"stack: {len(inputs)} weights in one launch"),
    )


def _lift(sheet: CodeSheet, start: int, total: int) -> CodeSheet:
    """A sheet of one part, as a sheet of the whole stack (nothing quantized elsewhere)."""

    def place(part: Tensor | None) -> Tensor | None:
        if part is None:
            return None
        whole = part.new_zeros(total, part.shape[1])
        whole[start : start + part.shape[0]] = part
        return whole

    codes, scales, where = place(sheet.codes), place(sheet.scales), place(sheet.where)
    assert codes is not None and scales is not None and where is not None
    return CodeSheet(codes, scales, place(sheet.zeros), sheet.bits, sheet.group_size, where)


def _stack_kept(inputs: list[Lowered]) -> Tensor | None:
    if all(part.kept is None for part in inputs):
        return None
    return torch.cat(
        [part.kept if part.kept is not None else torch.ones_like(part.values, dtype=torch.bool) for part in inputs]
    )


def _stack_low_rank(inputs: list[Lowered], rows: list[int]) -> tuple[Tensor, Tensor] | None:
    factors = [part.low_rank for part in inputs]
    present = [factor for factor in factors if factor is not None]
    if not present:
        return None
    blocks = [
        factor[0] if factor is not None else present[0][0].new_zeros(height, 0)
        for factor, height in zip(factors, rows, strict=True)
    ]
    return torch.block_diag(*blocks), torch.cat([factor[1] for factor in present])


def _stack_rows(inputs: list[Lowered], rows: list[int], starts: list[int]) -> Tensor | None:
    if all(part.row_permutation is None for part in inputs):
        return None
    parts = zip(inputs, rows, starts, strict=True)
    return torch.cat(
        [
            start + (part.row_permutation if part.row_permutation is not None else torch.arange(height))
            for part, height, start in parts
        ]
    )


def _stack_scales(inputs: list[Lowered], rows: list[int]) -> Tensor | None:
    if all(part.output_scale is None for part in inputs):
        return None
    return torch.cat(
        [
            part.output_scale if part.output_scale is not None else torch.ones(height)
            for part, height in zip(inputs, rows, strict=True)
        ]
    )


def _compose(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return first if second is None else second
    return first[second]


def _product(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return first if second is None else second
    return first * second


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


def _unpermute(matrix: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    if rows is not None:
        matrix = torch.empty_like(matrix).index_copy_(0, rows, matrix)
    if columns is not None:
        matrix = torch.empty_like(matrix).index_copy_(1, columns, matrix)
    return matrix
