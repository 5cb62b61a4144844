"""Statistics of a layer's inputs as its tiles see them, checked where operators read them."""

from dataclasses import replace

from stoicc.ir.errors import InputError
from stoicc.ops.lowering import Lowered
from stoicc.ops.statistics import Statistics


def seen_by_tiles(who: str, state: Lowered, statistics: object, gram: bool = False) -> Statistics:
    """Statistics of the inputs that reach the tiles: scaled and permuted as the executor does.

    Args and errors are those of `checked_statistics`.
    """
    seen = checked_statistics(who, statistics, state.values.shape[1], gram)
    if state.input_scale is not None:
        seen = seen.scaled(state.input_scale)
    return seen if state.column_permutation is None else seen.select(state.column_permutation)


def checked_statistics(who: str, statistics: object, columns: int, gram: bool = False) -> Statistics:
    """Statistics of a layer with so many input channels.

    Args:
        who: the operator, for messages.
        gram: keep (and require) X^T X; without it the result has none.

    Raises:
        InputError: no statistics, those of another layer, sums that are not finite, or no gram
            matrix where one is needed.
    """
    if not isinstance(statistics, Statistics):
        raise InputError(f"{who}: expected Statistics, found {type(statistics).__name__}; Statistics.of(x) makes them")
    if statistics.columns != columns:
        raise InputError(
            f"{who}: expected statistics of the weight's {columns} input channels, found {statistics.columns}; "
            "collect them on this layer"
        )
    if gram and statistics.gram is None:
        raise InputError(f"{who}: expected statistics with a gram matrix, found none; collect with gram=True")
    bad = (~(statistics.absolute.isfinite() & statistics.square.isfinite())).nonzero()
    if len(bad):
        raise InputError(
            f"{who}: expected finite statistics, found sums of {statistics.square[bad[0]].item()} at input channel "
            f"{int(bad[0])}; leave out the batches with NaN or infinity"
        )
    return statistics if gram else replace(statistics, gram=None)
