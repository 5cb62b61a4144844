"""The dependencies between passes, as a graph: an edge points from what comes first."""

from collections.abc import Iterable, Sequence

import networkx as nx

from stoicc.ir.errors import PassError, brief
from stoicc.passes.base import Pass, WeightPass
from stoicc.passes.catalogue import find_pass, pass_names


def dependency_graph(names: Iterable[str]) -> "nx.DiGraph[str]":
    """Passes of these names and all that they must follow; edges carry `hard` (requires).

    Passes on the weight come before all others.
    """
    graph: nx.DiGraph[str] = nx.DiGraph()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name in graph and graph.nodes[name].get("seen"):
            continue
        graph.add_node(name, seen=True)
        cls = find_pass(name)
        for first, hard in [*((n, False) for n in cls.after), *((n, True) for n in cls.requires)]:
            graph.add_edge(first, name, hard=hard)
            waiting.append(first)
    on_weight = [name for name in graph if issubclass(find_pass(name), WeightPass)]
    graph.add_edges_from(
        (first, name) for first in on_weight for name in list(graph) if name not in on_weight and name != first
    )
    if not nx.is_directed_acyclic_graph(graph):
        cycle = [edge[0] for edge in nx.find_cycle(graph)]
        raise PassError(
            f"passes {', '.join(cycle)}: expected dependencies without a cycle, found that each must come "
            "before the next; change `requires` or `after` of one of them"
        )
    return graph


def check_order(passes: Sequence[Pass], text: str) -> None:
    """Refuse a sequence in which a pass comes before one that it must follow."""
    graph = dependency_graph(p.name for p in passes)
    followers = {name: nx.descendants(graph, name) for name in graph}
    ran: dict[str, None] = {}
    for step in passes:
        for early in ran:
            if early in followers[step.name]:
                raise PassError(
                    f"pipeline {brief(repr(text))}: expected {step.name} before {early}, found it after; "
                    f"move {step.name} in front, or sort the passes with Pipeline.ordered"
                )
        ran[step.name] = None


def missing(step: Pass, ran: Iterable[str]) -> list[str]:
    """Names of the passes that `step` requires and that have not run."""
    return [name for name in step.requires if name not in set(ran)]


def sort_passes(passes: Sequence[Pass]) -> list[Pass]:
    """Passes sorted by their dependencies; where these leave a choice, by the catalogue's order."""
    graph = dependency_graph(p.name for p in passes)
    place = {name: index for index, name in enumerate(pass_names())}
    rank = {name: i for i, name in enumerate(nx.lexicographical_topological_sort(graph, key=lambda n: place[n]))}
    return sorted(passes, key=lambda p: rank[p.name])
