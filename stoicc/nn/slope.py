"""`SlopeLinear`: a linear layer that trains on its kept weights alone, and compiles to a kernel."""

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from stoicc.compiler import compile
from stoicc.ir.errors import InputError
from stoicc.kernel import Kernel
from stoicc.nn.kept import spread
from stoicc.nn.masks import MaskRule, check_structure, first_places, prune_again
from stoicc.nn.product import slope_linear
from stoicc.ops.graph import CompressedWeight, LowRank, Prune


class SlopeLinear(nn.Module):
    """y = x (W + L R)^T + b with n of every m weights of a row, chosen once (SLoPe: Mozaffari et al. 2025).

    There is no dense weight: `kept` is the parameter, so gradients and the state of any optimizer are those of the
    kept weights. The gradient of x uses W pruned again along its columns, so that this product could be sparse too.
    The adapter L R is a parameter from the start and joins when `adapting` is set, as `SlopeSchedule` does for the
    last steps; until then it has no gradient, and optimizers leave it alone.

    Attributes:
        kept: parameter `[out, in n / m]`, the kept weights of each row in order.
        places: buffer u8 of the same shape: where they stand, see `stoicc.nn.kept`.
        left, right: parameters `[out, rank]`, zero at the start, and `[rank, in]`; None with rank 0.
        adapting: whether the adapter is on; travels with the state dict.
    """

    places: Tensor
    left: nn.Parameter | None
    right: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        n: int = 2,
        m: int = 4,
        rank: int = 0,
        mask: MaskRule = "magnitude",
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """A layer that starts as `nn.Linear` does, pruned.

        Args:
            rank: of the adapter; 0 is none.
            mask: how weights are chosen: the largest of each group, or any.
            generator: for a random mask and the adapter.

        Raises:
            InputError: no n:m structure, or rows that are not made of whole groups.
        """
        super().__init__()
        dense = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        self._take(dense, n, m, rank, mask, generator)

    @staticmethod
    def of(
        linear: nn.Linear,
        n: int = 2,
        m: int = 4,
        rank: int = 0,
        mask: MaskRule = "magnitude",
        generator: torch.Generator | None = None,
    ) -> "SlopeLinear":
        """A layer that goes on from the weights of a dense one, which stays as it was; options as above."""
        layer = SlopeLinear.__new__(SlopeLinear)
        nn.Module.__init__(layer)
        layer._take(linear, n, m, rank, mask, generator)
        return layer.train(linear.training)

    def _take(
        self, linear: nn.Linear, n: int, m: int, rank: int, mask: MaskRule, generator: torch.Generator | None
    ) -> None:
        check_structure(n, m)
        weight = linear.weight.detach()
        self.out_features, self.in_features = weight.shape
        if self.in_features % m:
            raise InputError(
                f"slope: expected rows of whole groups of {m} weights, found {self.in_features} columns; leave the "
                "layer dense, or take another m"
            )
        if not weight.is_floating_point() or not isinstance(rank, int) or rank < 0:
            raise InputError(
                f"slope: expected floats and a rank of 0 or more, found {weight.dtype} and {rank!r}; correct them"
            )
        if mask not in ("magnitude", "random"):
            raise InputError(f"slope: expected mask 'magnitude' or 'random', found {mask!r}; name one of them")
        self.n, self.m, self.adapting = n, m, False
        places = first_places(weight, n, m, mask, generator)
        groups = places.long().view(self.out_features, -1, n)
        kept = weight.unflatten(1, (-1, m)).gather(2, groups).flatten(1)
        self.kept = nn.Parameter(kept)
        self.register_buffer("places", prune_again(kept, places, n, m))
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone())
        self.left = self.right = None
        if rank:
            drawn = torch.randn(rank, self.in_features, generator=generator) / math.sqrt(self.in_features)
            self.right = nn.Parameter(drawn.to(weight))
            self.left = nn.Parameter(weight.new_zeros(self.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`; dtypes as those of F.linear, under autocast too."""
        on = self.adapting and self.left is not None and self.right is not None
        adapter = (cast(Tensor, self.left), cast(Tensor, self.right)) if on else None
        y = slope_linear(x, self.kept, self.places, self.n, self.m, adapter)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    @torch.no_grad()
    def repack(self, part: int = 0, parts: int = 1) -> None:
        """Choose anew, among the kept weights, those that the backward product uses: the largest of each column group.

        Args:
            part, parts: do this part of the rows alone; all parts together are all rows.
        """
        groups = -(-self.out_features // self.m)
        rows = slice(part * groups // parts * self.m, (part + 1) * groups // parts * self.m)
        if rows.start < rows.stop:
            self.places[rows] = prune_again(self.kept[rows], self.places[rows], self.n, self.m)

    @torch.no_grad()
    def to_dense(self) -> Tensor:
        """W `[out, in]` without the adapter, as a new tensor."""
        return spread(self.kept, self.places, self.n, self.m)

    @torch.no_grad()
    def backward_dense(self) -> Tensor:
        """W^{R,C} `[out, in]`, which the gradient of x is multiplied by, as a new tensor."""
        return spread(self.kept, self.places, self.n, self.m, twice=True)

    @torch.no_grad()
    def compressed(self, dtype: torch.dtype | None = None) -> CompressedWeight:
        """The weight as an operator's result: its mask, and the adapter as a low-rank term where it is on."""
        weight = self.to_dense().to(dtype or self.kept.dtype).cpu()
        mask = spread(torch.ones_like(self.kept, dtype=torch.int16), self.places, self.n, self.m).bool().cpu()
        result = CompressedWeight.of(weight).then(Prune(mask, f"{self.n}:{self.m} from training"))
        if not self.adapting or self.left is None or self.right is None:
            return result
        left, right = (factor.to(weight.dtype).cpu() for factor in (self.left, self.right))
        return result.then(LowRank(left, right, f"lazy adapter of rank {left.shape[1]}"))

    def to_kernel(self, dtype: torch.dtype | None = None, **options: Any) -> Kernel:
        """The trained layer as a kernel on this layer's device, like any compiled weight.

        Args:
            dtype: of the kernel's weights; default: that of `kept`.
            options: of `stoicc.compile`; formats default to nv24 for 2:4, else to nm of this structure.
        """
        bias = None if self.bias is None else self.bias.detach().to(dtype or self.bias.dtype).cpu()
        structured = "nv24" if (self.n, self.m) == (2, 4) else f"nm<n={self.n}, m={self.m}>"
        options.setdefault("formats", [structured if options.get("tile", (64, 64))[1] % self.m == 0 else "bitmap"])
        return compile(self.compressed(dtype), bias=bias, **options).to(self.kept.device)

    def extra_repr(self) -> str:
        """Shape and structure."""
        rank = "" if self.left is None else f", rank={self.left.shape[1]}{'' if self.adapting else ' (waiting)'}"
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.n}:{self.m}{rank}"

    def get_extra_state(self) -> Tensor:
        """n, m and whether the adapter is on."""
        return torch.tensor([self.n, self.m, int(self.adapting)])

    def set_extra_state(self, state: Tensor) -> None:
        """Switch the adapter as the state says; its structure must be this layer's."""
        n, m, adapting = state.tolist()
        if (n, m) != (self.n, self.m):
            raise InputError(f"slope: expected a state of {self.n}:{self.m}, found {n}:{m}; make the layer alike")
        self.adapting = bool(adapting)
