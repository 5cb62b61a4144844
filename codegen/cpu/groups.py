"""How threads share work items where several tile rows are multiplied at a time (`blocked.py`).

A thread takes the next group of neighbours when it is free. A group has as many tile rows as keep a block of x busy,
but no more than a quarter of a thread's share of all tiles: dense tile rows that stand together go to all threads.
"""

from string import Template

from stoicc.codegen.cpu import blocked
from stoicc.codegen.cpu.plan import KernelClass

_FUNCTIONS = Template("""\
/* Tiles of work item i. */
static inline int64_t tiles_of(const struct weight *w, int i)
{
    const struct item *item = w->items + i;
    return $tiles;
}

/* The end of the group of work items that begins at `begin`: at most `tall`, and `most` tiles unless one has more. */
static int group_end(const struct weight *w, int begin, int items, int tall, int64_t most)
{
    int end = begin;
    int64_t tiles = 0;
    do
        tiles += tiles_of(w, end++);
    while (end < items && end - begin < tall && tiles + tiles_of(w, end) <= most);
    return end;
}
""")

_LOOP = Template("""\
        if (batch >= LEAST_BLOCKED) {
            float *sums = (float *)(area + omp_get_thread_num() * BLOCKED_BYTES);
            $element *panel = ($element *)(sums + TALL * MANY * SUMS);
            int begin = __atomic_load_n(&next_item, __ATOMIC_RELAXED);
            while (begin < items) {
                const int end = group_end(w, begin, items, tall, most);
                if (__atomic_compare_exchange_n(&next_item, &begin, end, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
                    run_blocked(w, &call, begin, end, sums, panel, y);
                    begin = __atomic_load_n(&next_item, __ATOMIC_RELAXED);
                }
            }
            #pragma omp barrier
        } else
""")

PREPARE = (
    "const int items = w->bin_ptr[w->bins];",
    "int next_item = 0, tall = items / (2 * threads);",
    "tall = tall < 1 ? 1 : tall < TALL ? tall : TALL;",
    "int64_t most = 0;",
    "for (int i = 0; i < items && batch >= LEAST_BLOCKED; i++)",
    "    most += tiles_of(w, i);",
    "most /= 4 * threads;",
)
"""C at the begin of a call: how long groups are."""


def functions(kernel: KernelClass) -> str:
    """C that says where a group ends."""
    tiles = (f"item->{part.name}_end - item->{part.name}_begin" for part in kernel.parts)
    return _FUNCTIONS.substitute(tiles=" + ".join(tiles))


def loop(kernel: KernelClass) -> str:
    """What a call of a large batch does instead of walking the bins."""
    return _LOOP.substitute(element=blocked.element(kernel))
