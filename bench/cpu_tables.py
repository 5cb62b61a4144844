"""The tables that `bench.cpu` prints."""

from rich.table import Table

from bench.cpu_gates import gates
from bench.cpu_record import LINEAR, Record


def weights_table(record: Record) -> Table:
    """Fractions of the bounds and speed over `F.linear`, a row per dtype, threads and mix."""
    table = Table(
        title=f"{' x '.join(map(str, record.shape))}: of the bounds, and times faster than F.linear of the dtype"
    )
    bounded = [batch for batch in record.batches if batch <= 16]
    for column in ("dtype", "threads", "weight", "bytes/weight"):
        table.add_column(column, justify="left" if column == "weight" else "right", no_wrap=True)
    for batch in bounded:
        table.add_column(f"bound @{batch}", justify="right")
    for batch in record.batches:
        table.add_column(f"x @{batch}", justify="right")
    for dtype, facts in record.facts.items():
        for threads in reversed(record.threads):
            if not any(record.where(dtype, threads)):
                continue
            for name in (LINEAR, *facts):
                row = [dtype, str(threads), name, "" if name == LINEAR else f"{facts[name].bytes_per_weight:.2f}"]
                groups = [record.at(dtype, threads, batch) for batch in record.batches]
                row += [
                    ""
                    if group is None or name == LINEAR or not group.has(name)
                    else f"{record.roof_fraction(group, name):.0%}"
                    for group, batch in zip(groups, record.batches, strict=True)
                    if batch <= 16
                ]
                row += [
                    "" if group is None or not group.has(name) else f"{group.speedup(name):.2f}" for group in groups
                ]
                table.add_row(*row)
            table.add_section()
    reads = ", ".join(f"{record.read_bandwidth(threads) / 1e9:.1f} GB/s on {threads}" for threads in record.threads)
    table.caption = f"plain read {reads} threads; bound: the smaller of the byte bound and the host's multiply-add peak"
    return table


def peers_table(record: Record) -> Table:
    """How many times faster a kernel is than each peer that holds its matrix."""
    table = Table(title=f"times faster than peers, {record.threads[-1]} threads")
    for column in ("dtype", "peer", "our weight"):
        table.add_column(column, no_wrap=True)
    for batch in record.batches:
        table.add_column(f"@{batch}", justify="right")
    table.add_column("absent")
    for dtype in record.facts:
        groups = [record.at(dtype, record.threads[-1], batch) for batch in record.batches]
        for peer, mix in record.peer_of.items():
            if mix not in record.facts[dtype]:
                continue
            figures = [
                f"{group.speedup(mix, peer):.2f}" if group is not None and peer in group.peers else ""
                for group in groups
            ]
            table.add_row(dtype, peer, mix, *figures, record.absent[dtype].get(peer, ""))
        table.add_section()
    return table


def claims_table(record: Record) -> Table:
    """Each claim with its figure, the worst that was measured, and whether it holds."""
    table = Table(title="claims")
    for column in ("claim", "figure", "target", "held", "worst"):
        number = column in ("figure", "target")
        table.add_column(column, justify="right" if number else "left", no_wrap=number or column == "held")
    for gate in gates(record):
        figure = "" if gate.figure is None else f"{gate.figure:.2f}"
        held = {True: "held", False: "NOT HELD", None: "not measured"}[gate.held]
        table.add_row(gate.claim, figure, f"{'<=' if gate.at_most else '>='} {gate.target:g}", held, gate.worst)
    return table
