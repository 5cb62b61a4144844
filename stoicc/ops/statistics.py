"""Statistics of a layer's inputs: what operators know of X, collected once, without keeping X.

Everything is a plain sum over samples, so statistics of batches, processes and machines merge by
adding. `collect` runs a model once; `sequentially` goes layer by layer, so that a layer sees the
inputs that the layers before it produce after they were compressed.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from stoicc.ir.errors import InputError
from stoicc.ops._hooks import Same, groups_by_input, layer_names, run, watching
from stoicc.weights import non_finite


@dataclass(frozen=True, eq=False)
class Statistics:
    """Sums over the inputs X `[samples, K]` of one layer, in float32 or float64, on the CPU.

    Attributes:
        samples: rows of X.
        total: `[K]`, sum of x.
        absolute: `[K]`, sum of |x|.
        square: `[K]`, sum of x**2.
        gram: `[K, K]`, X^T X, or None where it was not collected.
    """

    samples: int
    total: Tensor
    absolute: Tensor
    square: Tensor
    gram: Tensor | None = None

    def __post_init__(self) -> None:
        shape = self.total.shape
        fits = len(shape) == 1 and self.absolute.shape == self.square.shape == shape
        if not fits or (self.gram is not None and self.gram.shape != (*shape, *shape)):
            found = [list(sums.shape) for sums in self._held().values()]
            raise InputError(f"statistics: expected sums [K] and a gram matrix [K, K], found shapes {found}")
        if self.samples < 1:
            raise InputError(f"statistics: expected at least one sample, found {self.samples}; run a batch first")
        for name, sums in self._held().items():
            if sums.numel() and not all(bool(end.isfinite()) for end in sums.aminmax()):
                raise InputError(
                    f"statistics: expected finite sums, found NaN or infinity in {name}; collect them again"
                )

    @staticmethod
    def of(x: Tensor, gram: bool = True, dtype: torch.dtype = torch.float32) -> "Statistics":
        """Statistics of one batch `[..., K]`; InputError where it holds NaN or infinity."""
        collector = Collector(gram=gram, dtype=dtype)
        collector.add(x)
        return collector.statistics()

    @property
    def columns(self) -> int:
        """K, the layer's input channels."""
        return self.total.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """float32 or float64."""
        return self.total.dtype

    @property
    def mean(self) -> Tensor:
        """`[K]`: mean of x_j."""
        return self.total / self.samples

    @property
    def mean_absolute(self) -> Tensor:
        """`[K]`: mean of |x_j|, SLiM's saliency of a channel."""
        return self.absolute / self.samples

    @property
    def mean_square(self) -> Tensor:
        """`[K]`: mean of x_j**2."""
        return self.square / self.samples

    @property
    def norm(self) -> Tensor:
        """`[K]`: ||X_j||_2, Wanda's factor of a channel."""
        return self.square.sqrt()

    @property
    def dead(self) -> Tensor:
        """Bool `[K]`: channels that were 0 in every sample."""
        return self.square == 0

    def hessian(self, damping: float = 0.01) -> Tensor:
        """`[K, K]`: X^T X + damping * mean(diagonal) * I, of the layer's squared output error.

        Its scale does not matter to any operator, so the factor 2 (and 1/samples) is left out.

        Raises:
            InputError: statistics that were collected without a gram matrix.
        """
        if self.gram is None:
            raise InputError("statistics: expected a gram matrix X^T X, found none; collect with gram=True")
        hessian = self.gram.clone()
        mean = hessian.diagonal().mean().item()
        hessian.diagonal().add_(damping * (mean if mean > 0 else 1.0))
        return hessian

    def merge(self, other: "Statistics") -> "Statistics":
        """Statistics of both sets of samples.

        Raises:
            InputError: other columns or dtype, or only one of them with a gram matrix.
        """
        for what, mine, theirs in (
            ("columns", self.columns, other.columns),
            ("dtype", self.dtype, other.dtype),
            ("gram", self.gram is not None, other.gram is not None),
        ):
            if mine != theirs:
                raise InputError(f"statistics: expected {what} {mine} in both to merge, found {theirs}")
        return Statistics(
            self.samples + other.samples,
            self.total + other.total,
            self.absolute + other.absolute,
            self.square + other.square,
            None if self.gram is None or other.gram is None else self.gram + other.gram,
        )

    def __add__(self, other: "Statistics") -> "Statistics":
        return self.merge(other)

    def select(self, columns: Tensor) -> "Statistics":
        """Statistics of X[:, columns]: a permutation, or a part, of the channels."""
        gram = None if self.gram is None else self.gram[columns][:, columns]
        return Statistics(self.samples, self.total[columns], self.absolute[columns], self.square[columns], gram)

    def scaled(self, scale: Tensor) -> "Statistics":
        """Statistics of X diag(scale); `scale [K]` is positive."""
        scale = scale.to(self.dtype)
        gram = None if self.gram is None else self.gram * scale[:, None] * scale
        return Statistics(self.samples, self.total * scale, self.absolute * scale, self.square * scale.square(), gram)

    def to_dict(self) -> dict[str, Tensor]:
        """Sums by field name, and samples as an int64 scalar."""
        return {"samples": torch.tensor(self.samples), **self._held()}

    @staticmethod
    def from_dict(tensors: Mapping[str, Tensor]) -> "Statistics":
        """The inverse of `to_dict`."""
        wanted = [field.name for field in fields(Statistics)]
        if not {"samples", "total", "absolute", "square"} <= set(tensors) <= set(wanted):
            raise InputError(f"statistics: expected tensors {', '.join(wanted)}, found {', '.join(sorted(tensors))}")
        sums = {name: value for name, value in tensors.items() if name != "samples"}
        return Statistics(int(tensors["samples"]), **sums)

    def _held(self) -> dict[str, Tensor]:
        sums = {"total": self.total, "absolute": self.absolute, "square": self.square}
        return sums if self.gram is None else {**sums, "gram": self.gram}


class Collector:
    """Running sums of one layer's inputs; no input is kept.

    Args:
        gram: collect X^T X too, K x K numbers.
        dtype: of the sums, torch.float32 or torch.float64.
        name: of the layer, for messages.
    """

    def __init__(self, gram: bool = True, dtype: torch.dtype = torch.float32, name: str = "") -> None:
        if dtype not in (torch.float32, torch.float64):
            raise InputError(f"statistics: expected dtype float32 or float64 for the sums, found {dtype}")
        self.gram, self.dtype = gram, dtype
        self._where = f"calibration{f' of layer {name}' if name else ''}"
        self.samples = self._batches = 0
        self._sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Add a batch `[..., K]` of any float dtype, on any device.

        Raises:
            InputError: integers, another K than before, or a NaN or infinity, named by its place.
                The sums are as they were.
        """
        x = self._checked(x)
        with torch.autocast(x.device.type, enabled=False):  # a model's own would round the products
            x = x.to(self.dtype)
            if not self._sums:
                columns = x.shape[1]
                self._sums = {name: x.new_zeros(columns) for name in ("total", "absolute", "square")}
                if self.gram:
                    self._sums["gram"] = x.new_zeros(columns, columns)
            self._sums["total"] += x.sum(0)
            self._sums["absolute"] += x.abs().sum(0)
            if self.gram:
                self._sums["gram"].addmm_(x.T, x)
                self._sums["square"] = self._sums["gram"].diagonal().clone()
            else:
                self._sums["square"] += x.square().sum(0)
        self.samples += x.shape[0]
        self._batches += 1

    def statistics(self) -> Statistics:
        """The sums so far, on the CPU.

        Raises:
            InputError: no sample yet, or sums that left the range of their dtype.
        """
        if not self.samples:
            raise InputError(f"{self._where}: expected at least one sample, found none; run a batch that reaches it")
        # Every other sum is bounded by these: |g_ij| <= (g_ii + g_jj) / 2, and |x| <= 1 + x**2.
        if not bool(self._sums["square"].isfinite().all()):
            raise InputError(
                f"{self._where}: expected sums in the range of {self.dtype}, found some that overflow; "
                "collect with dtype=torch.float64"
            )
        return Statistics(self.samples, **{name: sums.cpu() for name, sums in self._sums.items()})

    def _checked(self, x: Tensor) -> Tensor:
        """`[samples, K]`, finite and of the K of earlier batches."""
        where = f"{self._where}, batch {self._batches}"
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 1:
            found = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise InputError(f"{where}: expected a float tensor of inputs [..., K], found {found}")
        if self._sums and x.shape[-1] != self._sums["total"].shape[0]:
            raise InputError(f"{where}: expected {self._sums['total'].shape[0]} channels, found {x.shape[-1]}")
        x = x.detach().reshape(-1, x.shape[-1])
        bad = non_finite(x) if x.numel() else None
        if bad is not None:
            raise InputError(
                f"{where}: expected finite inputs, found {bad[2]} at sample {bad[0]}, channel {bad[1]}; "
                "leave that batch out, or run the model in a wider dtype"
            )
        return x


def collect(
    model: nn.Module,
    batches: Iterable[Any],
    layers: Sequence[str] | None = None,
    gram: bool = True,
    dtype: torch.dtype = torch.float32,
    distributed: bool = False,
) -> dict[str, Statistics]:
    """Statistics of the inputs of many layers, from one pass over the batches.

    The model runs in eval mode without gradients and is left as it was, after an error too.

    Args:
        model: any module.
        batches: what the model is called with: a tensor, a tuple of arguments or a mapping of them.
        layers: names of modules as in `named_modules`; default: every `nn.Linear` that is called.
        gram: collect X^T X too: K x K numbers a layer, of all layers at once.
        dtype: of the sums, torch.float32 or torch.float64.
        distributed: sum over the processes of torch.distributed.

    Raises:
        InputError: a name that the model lacks, a named layer that no batch reaches, or inputs
            that are not finite, with layer, batch, sample and channel.
    """
    collectors = {name: Collector(gram, dtype, name) for name in layer_names(model, layers)}
    with watching(model, list(collectors), lambda name, x: collectors[name].add(x)):
        for batch in batches:
            run(model, batch)
    wanted = {name: each for name, each in collectors.items() if layers is not None or each.samples}
    found = {name: each.statistics() for name, each in wanted.items()}
    return all_reduce(found) if distributed else found


def sequentially(
    model: nn.Module,
    batches: Iterable[Any],
    layers: Sequence[str] | None = None,
    gram: bool = True,
    dtype: torch.dtype = torch.float32,
    distributed: bool = False,
) -> Iterator[dict[str, Statistics]]:
    """Statistics group by group, in the order in which layers are first called.

    A group is the layers that are called with the very same tensor (q, k and v); they share one
    `Statistics` object. Replace a group's layers in the model before asking for the next group,
    which then sees the inputs that they produce. The batches run once per group, and one gram
    matrix is held at a time.

    Args and errors are those of `collect`, and batches that can be run through only once are refused.
    """
    names = layer_names(model, layers)
    if iter(batches) is batches:
        raise InputError("calibration: expected batches to run through again and again, found an iterator; pass a list")
    queue = groups_by_input(model, batches, names)
    queue += [[name] for name in names if layers is not None and all(name not in group for group in queue)]
    while queue:
        group = queue.pop(0)
        statistics, strays = _of_group(model, batches, group, Collector(gram, dtype, group[0]))
        queue[:0] = [[name] for name in strays]
        shared = dict.fromkeys((name for name in group if name not in strays), statistics)
        yield all_reduce(shared) if distributed else shared


def _of_group(
    model: nn.Module, batches: Iterable[Any], group: list[str], collector: Collector
) -> tuple[Statistics, list[str]]:
    """Statistics of the first of a group, and the others that did not share all of its inputs after all."""
    first = group[0]
    calls = dict.fromkeys(group, 0)
    inputs: list[Same] = []

    def see(name: str, x: Tensor) -> None:
        if name == first:
            collector.add(x)
            inputs[:] = [Same(x)]
            calls[name] += 1
        elif inputs and inputs[0].holds(x):
            calls[name] += 1
        else:
            calls[name] = -1 << 62

    with watching(model, group, see):
        for batch in batches:
            run(model, batch)
    return collector.statistics(), [name for name in group if calls[name] != calls[first]]


def merge(*parts: Mapping[str, Statistics]) -> dict[str, Statistics]:
    """Statistics of several runs, layer by layer; a layer may be missing in some of them."""
    merged: dict[str, Statistics] = {}
    for part in parts:
        for name, statistics in part.items():
            merged[name] = merged[name] + statistics if name in merged else statistics
    return merged


def all_reduce(statistics: Mapping[str, Statistics]) -> dict[str, Statistics]:
    """Sum over the processes of torch.distributed; as given where that is not initialised.

    Every process must hold the same layers.

    Raises:
        InputError: processes that hold different layers.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return dict(statistics)
    names: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(names, sorted(statistics))
    if any(other != names[0] for other in names):
        raise InputError("statistics: expected the same layers in every process, found others; calibrate all of them")
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    reduced: dict[int, Statistics] = {}  # layers that share an input share its statistics, and one reduction
    result: dict[str, Statistics] = {}
    for name in names[0]:
        mine = statistics[name]
        if id(mine) not in reduced:
            tensors = {field: tensor.to(device, copy=True) for field, tensor in mine.to_dict().items()}
            for tensor in tensors.values():
                dist.all_reduce(tensor)
            reduced[id(mine)] = Statistics.from_dict({field: tensor.cpu() for field, tensor in tensors.items()})
        result[name] = reduced[id(mine)]
    return {name: result[name] for name in statistics}
