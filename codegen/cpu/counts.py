"""A function for each number of batch entries that tiles are multiplied with at a time, and what calls them."""

from collections.abc import Iterable
from string import Template


def alone(names: dict[str, str], counts: Iterable[int]) -> str:
    """C of a function for each count, which multiplies a range of tiles: `function`_count calls `inner` for each.

    `entry` is how much of x an entry has in a tile column, as C.
    """
    pointers = names["pointers"].replace("if (w->streamed)", "if (w->streamed && n == 0)")
    functions = [_OF_COUNT.substitute(names, nb=nb, pointers=pointers) for nb in counts]
    return _ALONE.substitute(names) + "\n".join(functions) + "\n"


def walk(names: dict[str, str], counts: list[int], wide: int) -> str:
    """C that adds a range of tiles for any number of entries that `counts` add up to, `wide` of them at a time."""
    tails = "        else ".join(_TAIL.substitute(names, nb=nb) for nb in counts if nb < wide)
    whole = _WHOLE.substitute(names, wide=wide) if wide in counts else ""
    return _WALK.substitute(names, whole=whole, tails=tails)


_ALONE = Template("""\
/* Tiles begin .. end of format $format times entries n .. of x in $form, added to the sums of their tile row. A
 * function for each number of entries: inlined side by side they would take each other's registers. */
""")

_OF_COUNT = Template("""\
static NOINLINE void ${function}_$nb(
    const struct weight *w, int begin, int end, const $element *x, int width, int n, float *acc)
{
    for (int t = begin; t < end; t++) {
        const $element *panel = x + ((int64_t)w->${name}_tile_column[t] * width + n) * $entry;
$pointers
        $inner($arguments, panel, acc + n * SUMS, $nb);
    }
}
""")

_WALK = Template("""\
/* The same for any number of entries. */
static void add_${name}_$adds(const struct weight *w, int begin, int end, const $element *x, int width, float *acc)
{
    const int step = width <= WIDE ? end - begin : 1; /* more than those meet a tile while it is cached */
    for (int t = begin; t < end; t += step) {
        int n = 0;
$whole        $tails    }
}
""")

_WHOLE = Template("""\
        for (; n + WIDE <= width; n += WIDE)
            ${function}_$wide(w, t, t + step, x, width, n, acc);
""")

_TAIL = Template("""\
if (width - n == $nb)
            ${function}_$nb(w, t, t + step, x, width, n, acc);
""")
