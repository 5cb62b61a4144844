"""Markdown of a CPU record: the table of README.md, and those of docs/performance.md."""

from collections.abc import Callable, Iterable, Sequence

from bench.cpu_gates import gates
from bench.cpu_record import CODED, LINEAR, Group, Record

BOUNDED = (1, 4, 8, 16)
"""Batches at which the bounds are what counts."""


def readme(record: Record) -> str:
    """Bytes, fraction of the byte bound and speed over F.linear of the bf16 mixes; the rest in a sentence each."""
    most, machine = record.threads[-1], record.machine
    batches = [batch for batch in record.batches if record.at("bf16", most, batch) is not None]
    shape = " x ".join(map(str, record.shape))
    reads = " and ".join(f"{record.read_bandwidth(threads) / 1e9:.1f}" for threads in record.threads)
    head = (
        f"Times faster than `F.linear` on the dense bf16 weight, {shape}, bf16 in and out, cold weights, "
        f"{_threads(most)} of an {machine['cpu']} ({machine['last_level_cache']} of shared cache; plain read "
        f"{reads} GB/s on {' and '.join(map(str, record.threads))} threads); `python -m bench.cpu`, more in "
        "[docs/performance.md](docs/performance.md):"
    )
    bound = f"executor, of the byte bound, batch 1, {' / '.join(map(str, record.threads))} threads"
    columns = ("weight", "bytes/weight", bound, *(f"batch {batch}" for batch in batches))
    rows = []
    for name in _names(record, "bf16"):
        fractions = [_byte_fraction(record, record.at("bf16", threads, 1), name) for threads in record.threads]
        speeds = [_speed(record.at("bf16", most, batch), name) for batch in batches]
        rows.append([name, f"{record.facts['bf16'][name].bytes_per_weight:.2f}", " / ".join(fractions), *speeds])
    said = [sentence for dtype in record.facts if (sentence := _peer_sentence(record, dtype))]
    over = f"Over peers in the same run, at batch 1 / 16: {'; '.join(said)}."
    return "\n\n".join([head, _table(columns, rows), *([over] if said else [])])


def machine(record: Record) -> str:
    """What the host can do at best, medians over the groups of the run."""
    rows = []
    for threads in record.threads:
        groups = list(record.where(threads=threads))
        bounds = [
            _middle(group.bounds.read for group in groups),
            _middle(group.bounds.read_large for group in groups),
            _middle(group.bounds.multiply_add for group in groups),
            _middle(group.bounds.product for group in groups),
        ]
        rows.append([str(threads), *(f"{bound / 1e9:.1f}" for bound in bounds[:2])])
        rows[-1] += [f"{bound / 1e9:.0f}" for bound in bounds[2:]]
    found = record.machine
    text = (
        f"{found['cpu']}, {found['cores']} cores, {found['last_level_cache']} of last-level cache, "
        f"torch {found['torch']}, commit {found['commit']}; weight {' x '.join(map(str, record.shape))}; "
        f"{record.elapsed:.0f} s in all."
    )
    arithmetic = ("fp32 multiply-adds in registers, GFLOP/s", "bf16 product, GFLOP/s")
    columns = ("threads", "plain read, GB/s", "on large pages, GB/s", *arithmetic)
    return f"{text}\n\n{_table(columns, rows)}"


def decode(record: Record) -> str:
    """Batch 1: bytes, the time that they allow, the time reached, and the fraction by number of threads.

    The fraction is the executor's; in parentheses that of a call `kernel(x)`. The last but one column is the
    executor's fraction of what the same loop reads from large pages.
    """
    parts = []
    most = record.threads[-1]
    for dtype in record.facts:
        group = record.at(dtype, most, 1)
        if group is None:
            continue
        rows = [
            [LINEAR, "", "", f"{group.seconds[LINEAR] * 1e3:.2f}", *("" for _ in (*record.threads, "large")), "1.00"]
        ]
        for name, fact in record.facts[dtype].items():
            bound = fact.payload / group.bounds.read
            fractions = [_both_fractions(record, record.at(dtype, threads, 1), name) for threads in record.threads]
            spent = [f"{bound * 1e3:.2f}", f"{group.executors[name] * 1e3:.2f}"]
            large = f"{record.byte_fraction(group, name, group.bounds.read_large):.0%}"
            rows.append([name, f"{fact.bytes_per_weight:.3f}", *spent, *fractions, large, _speed(group, name)])
        reached = [f"of the bound, {_threads(threads)}" for threads in record.threads]
        columns = (
            f"{dtype} weight",
            "bytes/weight",
            f"bound, ms on {most}",
            "reached, ms",
            *reached,
            "of large pages",
            "x F.linear",
        )
        parts.append(_table(columns, rows))
    return "\n\n".join(parts)


def middle(record: Record) -> str:
    """Batch 1 to 16: fraction of the smaller bound, with the host's peak and with that of vector units."""

    def cell(group: Group | None, name: str) -> str:
        if group is None or not group.has(name):
            return ""
        strict = f"{record.roof_fraction(group, name):.0%}"
        vector = f"{record.roof_fraction(group, name, group.bounds.multiply_add):.0%}"
        return strict if group.dtype != "bf16" else f"{strict} ({vector})"

    return _by_batch(record, [batch for batch in record.batches if batch in BOUNDED], cell, record.threads)


def large(record: Record) -> str:
    """Every batch: times faster than F.linear of the dtype, with the executor where it is not tile by tile."""

    def cell(group: Group | None, name: str) -> str:
        if group is None or not group.has(name):
            return ""
        once = record.facts[group.dtype][name].executors.get(str(group.batch)) == "dense-once"
        return _speed(group, name) + "*" * once

    return _by_batch(record, record.batches, cell, record.threads[-1:])


def peers(record: Record) -> str:
    """How many times faster a kernel is than the peer that holds its matrix; why a peer is absent."""
    most = record.threads[-1]
    parts = []
    for dtype in record.facts:
        groups = [record.at(dtype, most, batch) for batch in record.batches]
        rows = []
        for peer, name in record.peer_of.items():
            if name not in record.facts[dtype]:
                continue
            cells = [
                f"{group.speedup(name, peer):.2f}" if group is not None and peer in group.peers else ""
                for group in groups
            ]
            rows.append([peer, name, *cells, record.absent[dtype].get(peer, "").replace("|", "\\|")])
        columns = (f"{dtype} peer", "our weight", *(f"batch {batch}" for batch in record.batches), "absent")
        parts.append(_table(columns, rows))
    return "\n\n".join(parts)


def threads(record: Record) -> str:
    """Speedup of skewed and uniform work, and F.linear alone beside F.linear in company."""
    rows = [
        [" x ".join(map(str, skew.shape)), str(skew.batch), f"{skew.payload / 1e6:.1f}"]
        + [f"{speedup:.2f}" for speedup in (skew.skewed, skew.uniform)]
        for skew in record.skew
    ]
    work = _table(
        ("mosaic", "batch", "payload, MB", f"skewed, 1 to {record.threads[-1]} threads", "uniform, the same"), rows
    )
    rows = []
    for group in record.groups:
        alone, company = group.alone * 1e3, group.seconds[LINEAR] * 1e3
        rows.append([group.dtype, str(group.threads), str(group.batch), f"{alone:.2f}", f"{company:.2f}"])
        rows[-1].append(f"{company / alone:.2f}")
    columns = ("F.linear", "threads", "batch", "alone, ms", "between our kernels, ms", "ratio")
    return f"{work}\n\n{_table(columns, rows)}"


def memory(record: Record) -> str:
    """What a compiled weight keeps, in MB, after calls at every batch."""
    rows = [
        [f"{name}, {dtype}"]
        + [f"{nbytes / 1e6:.1f}" for nbytes in (fact.payload, fact.packed, fact.scratch, fact.grown, fact.creep)]
        for dtype, facts in record.facts.items()
        for name, fact in facts.items()
    ]
    columns = ("MB", "payload", "held beyond it", "scratch of a call", "the process grew by", "and over later calls")
    return _table(columns, rows)


def claims(record: Record) -> str:
    """Every claim with the worst figure, the target, and whether it holds."""
    rows = []
    for gate in gates(record):
        figure = "" if gate.figure is None else f"{gate.figure:.2f}"
        held = {True: "held", False: "**not held**", None: "not measured"}[gate.held]
        rows.append(
            [gate.claim, figure, f"{'at most' if gate.at_most else 'at least'} {gate.target:g}", held, gate.worst]
        )
    return _table(("claim", "figure", "target", "", "where"), rows)


PAGE: dict[str, Callable[[Record], str]] = {
    each.__name__: each for each in (machine, decode, middle, large, peers, threads, memory, claims)
}
"""What stands between the markers of docs/performance.md, by the marker's name."""


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table, the first column to the left, the others to the right."""
    lines = [f"| {' | '.join(columns)} |", f"| --- | {' | '.join('---:' for _ in columns[1:])} |"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _by_batch(
    record: Record, batches: Sequence[int], cell: Callable[[Group | None, str], str], counts: Sequence[int]
) -> str:
    """A row per dtype, threads and mix; a column per batch."""
    rows = [
        [name, dtype, str(count), *(cell(record.at(dtype, count, batch), name) for batch in batches)]
        for dtype, facts in record.facts.items()
        for count in reversed(counts)
        if any(record.where(dtype, count))
        for name in facts
    ]
    return _table(("weight", "dtype", "threads", *(f"batch {batch}" for batch in batches)), rows)


def _peer_sentence(record: Record, dtype: str) -> str:
    """Over each peer of a dtype at batch 1 / 16, or nothing where none was timed."""
    groups = [record.at(dtype, record.threads[-1], batch) for batch in (1, 16)]
    said = []
    for peer, name in record.peer_of.items():
        speeds = [_speed(group, name, peer) for group in groups]
        said += [f"{name} over {peer} {' / '.join(filter(None, speeds))}"] if any(speeds) else []
    return f"{dtype}: {', '.join(said)}" if said else ""


def _names(record: Record, dtype: str) -> list[str]:
    return [name for name in CODED if name in record.facts[dtype]]


def _byte_fraction(record: Record, group: Group | None, name: str) -> str:
    return "" if group is None else f"{record.byte_fraction(group, name):.0%}"


def _both_fractions(record: Record, group: Group | None, name: str) -> str:
    if group is None:
        return ""
    return f"{_byte_fraction(record, group, name)} ({record.byte_fraction(group, name, called=True):.0%})"


def _speed(group: Group | None, name: str, over: str = LINEAR) -> str:
    timed = group is not None and group.has(name) and (over in group.peers or over in group.seconds)
    return f"{group.speedup(name, over):.2f}" if group is not None and timed else ""


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count > 1)}"


def _middle(values: Iterable[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2]
