"""Which rows of a weight are alike: a sparse similarity graph over row patterns, and an order from it.

A pattern says at which tile columns a row stores something. Comparing all pairs would take time and
memory that grow with the square of the rows, so candidates come from MinHash in bands: two patterns
become candidates where they have the same minimum under both of a band's two random permutations of the
columns, which happens with probability J^2 for a Jaccard similarity J, independently in each band.

Sources: Broder, "On the resemblance and containment of documents" (1997) for MinHash; Okanovic et al.,
"High Performance Unstructured SpMM Computation Using Tensor Cores" (SMaT, 2024) for permuting rows by
Jaccard similarity so that non-zeros gather in fewer blocks.
"""

import networkx as nx
import numpy as np
import scipy.sparse
from numpy.typing import NDArray

BANDS = 16
"""Of two hashes each: patterns of similarity 0.5 meet in one with probability 1 - (1 - 0.25)^16 = 0.99."""

LINKS = 2
"""Patterns after itself that a pattern is linked to within a bucket of equal hashes."""

DEGREE = 6
"""Edges that a pattern may choose; one that others chose stays too."""


def similarity_graph(patterns: NDArray[np.bool_]) -> "nx.Graph[int]":
    """A graph over distinct patterns `[P, columns]`; edges carry `weight`, the Jaccard similarity.

    The same for the same patterns, always. Edges are few: at most `DEGREE` a pattern on average.
    """
    graph: nx.Graph[int] = nx.Graph()
    graph.add_nodes_from(range(len(patterns)))
    first, second = _candidates(patterns)
    weights = _jaccard(patterns, first, second)
    kept = _strongest(first, second, weights)
    graph.add_weighted_edges_from(zip(first[kept].tolist(), second[kept].tolist(), weights[kept].tolist(), strict=True))
    return graph


def spanning_order(graph: "nx.Graph[int]") -> NDArray[np.int64]:
    """Nodes with like ones next to each other: the order in which Kruskal joins a maximum spanning forest.

    Joined parts stand behind each other, the larger one first: what is like little is joined last, and
    ends at the rim instead of amid others.
    """
    parts = {node: [node] for node in graph}
    joined = nx.utils.UnionFind(graph)
    for one, other in nx.maximum_spanning_edges(graph, algorithm="kruskal", data=False):
        a, b = joined[one], joined[other]
        large, small = sorted((a, b), key=lambda root: (-len(parts[root]), root))
        merged = parts.pop(large)
        merged.extend(parts.pop(small))
        joined.union(a, b)
        parts[joined[a]] = merged
    by_size = sorted(parts.values(), key=lambda part: (-len(part), min(part)))
    return np.array([node for part in by_size for node in part], dtype=np.int64)


def _candidates(patterns: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pairs (i < j), each once, that are in one bucket of some band; patterns of nothing are in none."""
    stored = np.nonzero(patterns.any(axis=1))[0]
    count, columns = patterns.shape
    if stored.size < 2:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    sparse = scipy.sparse.csr_array(patterns[stored])
    generator = np.random.default_rng(0)
    links = scipy.sparse.csr_array((count, count), dtype=np.int32)
    for _ in range(BANDS):
        key = np.zeros(stored.size, dtype=np.int64)
        for _ in range(2):
            place = generator.permutation(columns)
            key = key * columns + np.minimum.reduceat(place[sparse.indices], sparse.indptr[:-1])
        # stable: within a bucket patterns keep their order, in which neighbours have columns in common
        order = np.argsort(key, kind="stable")
        for step in range(1, LINKS + 1):
            same = key[order[:-step]] == key[order[step:]]
            i, j = stored[order[:-step][same]], stored[order[step:][same]]
            links = links + scipy.sparse.csr_array((np.ones(i.size, dtype=np.int32), (i, j)), shape=links.shape)
    found = scipy.sparse.triu(links + links.T, k=1, format="csr").tocoo()
    return found.row.astype(np.int64), found.col.astype(np.int64)


def _jaccard(patterns: NDArray[np.bool_], first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.float64]:
    """Columns in common over columns of either, for each pair."""
    sizes = patterns.sum(axis=1, dtype=np.int64)
    common = np.empty(first.size, dtype=np.int64)
    for begin in range(0, first.size, 1 << 14):  # so that what is gathered stays in cache
        some = slice(begin, begin + (1 << 14))
        common[some] = (patterns[first[some]] & patterns[second[some]]).sum(axis=1)
    similarity: NDArray[np.float64] = common / np.maximum(sizes[first] + sizes[second] - common, 1)
    return similarity


def _strongest(first: NDArray[np.int64], second: NDArray[np.int64], weights: NDArray[np.float64]) -> NDArray[np.int64]:
    """Indices of edges that are among the `DEGREE` strongest of either end."""
    ends, edges = np.concatenate([first, second]), np.tile(np.arange(first.size), 2)
    order = np.lexsort((edges, -weights[edges], ends))
    begins = np.concatenate([[True], np.diff(ends[order]) != 0]) if order.size else np.zeros(0, dtype=bool)
    starts = np.nonzero(begins)[0]
    rank = np.arange(order.size) - np.repeat(starts, np.diff([*starts, order.size]))
    return np.unique(edges[order[rank < DEGREE]])
