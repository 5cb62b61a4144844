"""Products on the CPU against the bounds of the host and against peers, on cold weights.

    python -m bench.cpu [--quick] [--weights NAME...]

Kernels, peers and what the host can do at best (a plain read of 1 GiB, multiply-adds in registers,
a bf16 product in the cache) are timed in turn, in one process; figures are ratios of medians from
the same rounds. Between two visits of the same bytes at least 2 GiB of others are read. `F.linear`
is also timed before anything of ours is built, so that nothing of ours can slow it down.

Every kernel and peer gives a right product before it is timed. The claims that the project made for
its CPU executors are answered from these times, in a table of their own and in the JSON.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

import stoicc
from bench.cpu_bounds import READ_BYTES, Host
from bench.cpu_gates import gates
from bench.cpu_kernels import alone as executor_alone
from bench.cpu_kernels import copies_for, copies_of, inputs, measured, rotated
from bench.cpu_peers import Peer, peers
from bench.cpu_record import CODED, LINEAR, Facts, Group, Record, Skew
from bench.cpu_tables import claims_table, peers_table, weights_table
from bench.cpu_weights import FEW, KEPT, MAIN, mixes, random_weight, skewed_pair
from bench.machine import describe_machine
from stoicc.calibration_timing import torch_threads

RESULTS = Path(__file__).with_name("results")
ALONE_BYTES = 640 << 20
"""Copies of the dense weight are visited until they hold so many bytes, where nothing else is read between."""
BARE, BARE_BATCH = "executor: ", 16
"""Name of a call of an executor alone, and the largest batch at which it is timed."""
Calls = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        batches: by dtype, on all threads.
        single: by dtype, on one thread.
        budget: seconds that the rounds of one group may take, about.
        rounds: least and most.
        patience: seconds of one call beyond which a peer is not timed at larger batches.
        skew: shape of the skewed mosaic.
        mixes: by dtype.
    """

    shape: tuple[int, int]
    batches: dict[str, tuple[int, ...]]
    single: dict[str, tuple[int, ...]]
    budget: float
    rounds: tuple[int, int]
    patience: float
    skew: tuple[int, int]
    mixes: dict[str, tuple[str, ...]]


ALL = (1, 4, 8, 16, 32, 64, 256)
FULL = Plan(
    (11008, 8192),
    {"bf16": ALL, "f32": ALL},
    {"bf16": (1, 4, 8, 16), "f32": (1, 4, 8, 16)},
    6.0,
    (5, 25),
    1.0,
    (1024, 65536),
    {"bf16": tuple(KEPT), "f32": MAIN},
)
QUICK = Plan(
    (4096, 8192),
    {"bf16": (1, 4, 16, 64, 256), "f32": (1, 64)},
    {"bf16": (1, 16), "f32": ()},
    0.8,
    (4, 9),
    0.15,
    (512, 32768),
    {"bf16": (*CODED, "bitmap 50%"), "f32": ("dense", "nv24", "half empty")},
)


def timed(calls: Calls, plan: Plan) -> tuple[dict[str, float], int]:
    """Median seconds by name, and the rounds that the plan's budget had room for.

    Every call runs once in each round, so that drift of the machine meets all alike; the first round is not counted.
    """
    least, most = plan.rounds
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    end = 0.0
    for round_ in range(-1, most):
        if round_ >= least and time.perf_counter() > end:
            break
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
        end = end or time.perf_counter() + plan.budget
    counted = {name: found[1:] for name, found in seconds.items()}
    return {name: statistics.median(found) for name, found in counted.items()}, len(next(iter(counted.values())))


class Alone:
    """`F.linear` in a process that has built no kernel of ours."""

    def __init__(self, weight: Tensor, plan: Plan, console: Console) -> None:
        self._seconds: dict[tuple[str, int, int], float] = {}
        for dtype, dense in (("bf16", weight.bfloat16()), ("f32", weight)):
            copies = [dense.clone() for _ in range(max(2, -(-ALONE_BYTES // dense.nbytes)))]
            for threads, batches in _threads(plan, dtype):
                with torch_threads(threads), console.status(f"F.linear alone, {dtype}, {threads} threads"):
                    for batch in batches:
                        x = inputs(batch, weight.shape[1], dense.dtype)
                        call = rotated([partial(F.linear, x, each) for each in copies])
                        brief = replace(plan, budget=plan.budget / 6)
                        self._seconds[dtype, threads, batch] = timed({LINEAR: call}, brief)[0][LINEAR]

    def __getitem__(self, at: tuple[str, int, int]) -> float:
        return self._seconds[at]


class PeerTimer:
    """Peers that are timed in the rounds of the kernels while they are fast enough for it."""

    def __init__(self, found: Sequence[Peer], patience: float) -> None:
        self._products = {peer.name: peer.product for peer in found if peer.product is not None}
        self.absent = {peer.name: peer.absent for peer in found if peer.product is None}
        self._patience = patience

    def calls(self, x: Tensor) -> Calls:
        """For one batch; a peer that takes longer than the patience allows is left out from here on."""
        for name, product in list(self._products.items()):
            start = time.perf_counter()
            product(x)
            seconds = time.perf_counter() - start
            if seconds > self._patience:
                self.absent[name] = f"from batch {len(x)} on: a call takes {seconds:.1f} s"
                del self._products[name]
        return {name: partial(product, x) for name, product in self._products.items()}


def _bare(copies: Mapping[str, list[stoicc.Kernel]], x: Tensor) -> Calls:
    """Executors alone; each finds another copy than the kernel called before it in the round."""
    return {
        BARE + name: rotated([executor_alone(each, x) for each in (*same[1:], same[0])])
        for name, same in copies.items()
    }


def measure_dtype(weight: Tensor, dtype: str, plan: Plan, record: Record, host: Host, alone: Alone) -> None:
    """Times of one dtype's kernels and peers, added to the record."""
    compressed = mixes(weight, plan.mixes[dtype])
    batches = plan.batches[dtype]
    kernels: dict[str, stoicc.Kernel] = {}
    facts: dict[str, Facts] = {}
    for name, each in compressed.items():
        kernels[name], facts[name] = measured(each, weight.shape[1], dtype, _sizes(name, batches), record.threads)
    record.facts[dtype] = facts
    found = list(peers(weight, compressed, dtype))
    record.peer_of.update({peer.name: peer.weight for peer in found})
    timer = PeerTimer(found, plan.patience)
    del compressed, found
    count = copies_for(READ_BYTES + weight.nbytes + sum(fact.payload for fact in facts.values()))
    every = {name: copies_of(kernel, count, _sizes(name, batches)) for name, kernel in kernels.items()}
    dense = [weight, *(weight.clone() for _ in range(count - 1))]
    for threads, sizes in _threads(plan, dtype):
        with torch_threads(threads):
            for batch in sizes:
                x = inputs(batch, weight.shape[1], weight.dtype)
                copies = {name: same for name, same in every.items() if batch in _sizes(name, batches)}
                ours: Calls = {LINEAR: rotated([partial(F.linear, x, each) for each in dense])}
                ours |= {name: rotated([partial(each, x) for each in same]) for name, same in copies.items()}
                bare = _bare(copies, x) if batch <= BARE_BATCH else {}
                theirs = timer.calls(x) if threads == record.threads[-1] else {}
                bounds = host.calls(both_reads=batch == 1)
                times, rounds = timed(ours | theirs | bare | bounds, plan)
                record.groups.append(
                    Group(
                        dtype,
                        threads,
                        batch,
                        host.bounds({name: times[name] for name in bounds}, threads),
                        {name: times[name] for name in ours},
                        {name.removeprefix(BARE): times[name] for name in bare},
                        {name: times[name] for name in theirs},
                        alone[dtype, threads, batch],
                        rounds,
                    )
                )
    record.absent[dtype] = timer.absent


def measure_skew(plan: Plan, record: Record) -> None:
    """Speedup from one thread to all, of dense tiles in one tile row and of as many in every row."""
    most = record.threads[-1]
    pair = {name: stoicc.compile(weight) for name, weight in skewed_pair(plan.skew).items()}
    payload = pair["skewed"].stats().payload_bytes
    copies = {name: copies_of(kernel, copies_for(8 * payload), (1, 16)) for name, kernel in pair.items()}
    for batch in (1, 16):
        x = inputs(batch, plan.skew[1], torch.bfloat16)
        calls: Calls = {
            f"{name} {threads}": partial(_on_threads, rotated([partial(each, x) for each in same]), threads)
            for name, same in copies.items()
            for threads in (1, most)
        }
        times, _ = timed(calls, replace(plan, rounds=(plan.rounds[0], 4 * plan.rounds[1])))
        skewed, uniform = (times[f"{name} 1"] / times[f"{name} {most}"] for name in ("skewed", "uniform"))
        record.skew.append(Skew(list(plan.skew), batch, most, payload, skewed, uniform))


def run(plan: Plan, quick: bool, console: Console) -> Record:
    """Everything, in the order that keeps `F.linear` alone free of us."""
    start = time.perf_counter()
    gc.freeze()  # what is imported needs no second look each time that memory is measured
    most = torch.get_num_threads()
    threads = [1, most] if most > 1 else [1]
    sizes = sorted(
        {batch for by_dtype in (plan.batches, plan.single) for sizes in by_dtype.values() for batch in sizes}
    )
    record = Record(describe_machine(), quick, list(plan.shape), threads, sizes)
    weight = random_weight(plan.shape)
    with torch.no_grad():
        alone = Alone(weight, plan, console)
        host = Host()
        stoicc.compile(torch.eye(64))(torch.ones(1, 64))  # what is loaded once is not counted as a kernel's
        for dtype, each in (("bf16", weight.bfloat16()), ("f32", weight)):
            with console.status(f"kernels and peers, {dtype}"):
                measure_dtype(each, dtype, plan, record, host, alone)
            del each
        with console.status("skewed work"):
            measure_skew(plan, record)
    gc.unfreeze()
    return replace(record, elapsed=time.perf_counter() - start)


def write(record: Record, path: Path) -> None:
    """JSON of the record and its gates."""
    found = record.to_json() | {"gates": [gate.to_json() for gate in gates(record)]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")


def _sizes(name: str, batches: tuple[int, ...]) -> tuple[int, ...]:
    """The batches at which a mix is timed."""
    return batches if name in MAIN else tuple(batch for batch in batches if batch in FEW)


def _threads(plan: Plan, dtype: str) -> list[tuple[int, tuple[int, ...]]]:
    """(threads, batches) to measure; one thread alone where the host has one."""
    most = torch.get_num_threads()
    return [(most, plan.batches[dtype])] + ([(1, plan.single[dtype])] if most > 1 else [])


def _on_threads(call: Callable[[], object], threads: int) -> object:
    torch.set_num_threads(threads)
    return call()


def main() -> None:
    """Measure, print the tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller weight, fewer batches and rounds; under 50 s")
    parser.add_argument("--json", type=Path, help="default: bench/results/cpu.json, with --quick cpu-quick.json")
    parser.add_argument("--weights", nargs="+", choices=KEPT, help="only these, in both dtypes; nothing is written")
    arguments = parser.parse_args()
    console = Console(width=160)
    plan = QUICK if arguments.quick else FULL
    if arguments.weights:
        plan = replace(plan, mixes=dict.fromkeys(plan.mixes, tuple(arguments.weights)))
    record = run(plan, arguments.quick, console)
    for table in (weights_table(record), peers_table(record), claims_table(record)):
        console.print(table)
    if arguments.weights and not arguments.json:
        return
    path = arguments.json or RESULTS / ("cpu-quick.json" if arguments.quick else "cpu.json")
    write(record, path)
    console.print(f"{record.elapsed:.0f} s; written to {path}")


if __name__ == "__main__":
    main()
