"""Sizes that plan, emitted C and workspace agree on: blocks of batch entries, and bytes of x in each form."""

BLOCKED_ENTRIES = 512
"""Batch entries that the blocked loop nest multiplies at a time."""
MOST_FETCH = 1024
"""Bytes of a plane's entry up to which it is asked for tile by tile; of a larger one the format's code asks."""
VECTOR_COLUMNS = 32
"""Columns of a strip whose pairs stay in registers while they are multiplied."""
LEAST_OCTETS = 2
"""Batch entries from which integer matrix units are faster than vectors."""


def whole_blocks(batch: int) -> int:
    """Batch entries in x as pairs: one, two or four blocks of 16 in the last 64."""
    tail = batch % 64
    return batch - tail + next(width for width in (0, 16, 32, 64) if width >= tail)


def digit_bytes(columns: int) -> int:
    """Bytes of one batch entry of a tile column as digits: three a column, sums of each 16, the unit."""
    return 3 * columns + 12 * columns // 16 + 4


def octet_bytes(batch: int, columns: int, chunk: int) -> int:
    """Bytes of one tile column of x as octets: rows of digits in whole tiles of 16, then the units."""
    full, last = divmod(batch, chunk)

    def panel(entries: int) -> int:
        rows = entries // 16 * 48 + -(-(entries % 16 * 3) // 16) * 16
        return rows * columns + -(-entries * 4 // 64) * 64

    return full * panel(chunk) + panel(last)
