"""A function for each number of batch entries that a tile is multiplied with at a time, and calls of them."""

from collections.abc import Iterable
from string import Template


def alone(names: dict[str, str], counts: Iterable[int]) -> str:
    """C of a function for each count, which calls an inlined one: `function`_count calls `inner`."""
    return _ALONE.substitute(names) + "\n".join(_OF_COUNT.substitute(names, nb=nb) for nb in counts) + "\n"


def tails(names: dict[str, str], wide: int) -> str:
    """C that takes what is left of a batch below `wide` entries: 4, 2 or 1."""
    return "        " + "        else ".join(_TAIL.substitute(names, nb=nb) for nb in (4, 2, 1) if nb < wide)


_ALONE = Template("""\
/* `$inner` for each number of entries by itself: inlined side by side they would take each other's registers. */
""")

_OF_COUNT = Template("""\
static NOINLINE void ${function}_$nb($parameters, const $element *x, float *acc)
{
    $inner($planes, x, acc, $nb);
}
""")

_TAIL = Template("""\
if (width - n == $nb)
            ${function}_$nb($arguments, panel + n * COLUMNS, acc + n * SUMS);
""")
