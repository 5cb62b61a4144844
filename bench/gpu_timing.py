"""Times on a GPU with cold caches: CUDA graphs over copies of a weight that exceed the L2 cache."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

REPLAYS = 7
CALLS = 8
"""A graph holds at least this many calls, so that its launch is not charged to one of them."""
COLD = 3
"""Copies are made until they exceed the L2 cache this many times."""


@dataclass(frozen=True)
class Clock:
    """Times calls on a device; on the CPU (a dry run) with the host's clock, once."""

    device: torch.device

    def copies(self, size: int, most: int = 64) -> int:
        """How many copies of `size` bytes a cold measurement rotates through."""
        if self.device.type != "cuda":
            return 1
        properties = torch.cuda.get_device_properties(self.device)
        cold = COLD * int(getattr(properties, "L2_cache_size", 50 << 20)) // max(size, 1) + 1
        free = torch.cuda.mem_get_info(self.device)[0]
        return max(1, min(cold, most, free // 2 // max(size, 1)))

    def seconds(self, calls: Sequence[Callable[[], object]]) -> float:
        """Median seconds of one call; the calls run in turn, so that each finds cold caches."""
        if self.device.type != "cuda":
            begin = time.perf_counter()
            for call in calls:
                call()
            return (time.perf_counter() - begin) / len(calls)
        for call in calls:  # compile, and let libraries choose, outside of the graph
            call()
        torch.cuda.synchronize()
        calls = calls_of_graph(calls)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        graph.replay()
        return statistics.median(self._replay(graph) for _ in range(REPLAYS)) / len(calls)

    def _replay(self, graph: torch.cuda.CUDAGraph) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3

    def copy_bandwidth(self, size: int = 1 << 30) -> float:
        """Bytes a second, read and written, of a copy that exceeds every cache."""
        size = size if self.device.type == "cuda" else 1 << 20
        source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * size / self.seconds([lambda: target.copy_(source)])


def calls_of_graph(calls: Sequence[Callable[[], object]]) -> list[Callable[[], object]]:
    """The calls in turn, as often as it takes to have CALLS of them."""
    return [*calls] * -(-CALLS // len(calls))


METHOD = {
    "time": f"median of {REPLAYS} replays of a CUDA graph that holds each copy's call in turn, at least {CALLS} calls",
    "cold": f"copies of the weight exceed the L2 cache {COLD} times where they fit; x is warm for all",
    "output": "ours is preallocated, as is the workspace; F.linear allocates its own from the graph's pool",
}
"""How times are taken, for the report."""
