"""The list of kernel classes covers every pair of parameter values."""

from itertools import combinations

from tests.kernel_classes import KERNEL_CLASSES, PARAMETERS, allowed


def test_classes_cover_every_pair() -> None:
    names = list(PARAMETERS)
    missing = [
        ((a, u), (b, v))
        for a, b in combinations(names, 2)
        for u in PARAMETERS[a]
        for v in PARAMETERS[b]
        if allowed((a, u), (b, v))
        and not any(getattr(kernel, a) == u and getattr(kernel, b) == v for kernel in KERNEL_CLASSES)
    ]
    assert not missing


def test_classes_are_named_once_and_allowed() -> None:
    assert len({kernel.name for kernel in KERNEL_CLASSES}) == len(KERNEL_CLASSES) <= 64
    for kernel in KERNEL_CLASSES:
        values = [(name, getattr(kernel, name)) for name in PARAMETERS]
        assert all(allowed(a, b) for a, b in combinations(values, 2)), kernel.name
