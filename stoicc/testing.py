"""The contract that every tile format keeps, as one function: `check_format(fmt)`.

Built-in formats and a user's own go through the same checks. A failure is said in the terms of
whoever wrote the format: which promise, on which kind of tile, what came back.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from stoicc.compiler import compile
from stoicc.inspector import inspect
from stoicc.ir.dtypes import TORCH_DTYPES, bits
from stoicc.ir.errors import FormatError, StoiccError
from stoicc.ir.format import PlaneKind, Planes, TileFormat
from stoicc.ir.registry import find_format
from stoicc.ops.group_absmax import group_absmax
from stoicc.ops.nm_magnitude import nm_magnitude
from stoicc.targets import backend_named


@dataclass(frozen=True)
class Contract:
    """One format at one tile shape and dtype, with sample tiles to try it on."""

    fmt: TileFormat
    tile: tuple[int, int]
    dtype: str

    def samples(self) -> dict[str, Tensor]:
        """Tiles `[T, BM, BK]` of several kinds, by what they are."""
        generator = torch.Generator().manual_seed(0)
        dtype = TORCH_DTYPES[self.dtype]
        dense = torch.randn(3, *self.tile, generator=generator).to(dtype)
        keep = torch.rand(3, *self.tile, generator=generator)
        pruned = torch.stack([nm_magnitude(tile).dense() for tile in dense])
        kinds = {
            "zero": torch.zeros_like(dense),
            "random": dense,
            "2:4": pruned,
            "unstructured 90% sparse": dense.where(keep > 0.9, 0),
            "ternary": dense.sign() * 0.25,
            "ternary 2:4": pruned.sign() * 0.25,
            "4-bit codes": torch.stack([group_absmax(tile, 4, self.tile[1]).dense() for tile in dense]),
            "negative zero": torch.full_like(dense, -0.0),
        }
        slots = torch.arange(3)
        nearest = (
            self.fmt.decode(self.fmt.approximate(dense, slots).planes, self.tile, self.dtype) if self.stores else None
        )
        return kinds if nearest is None else {**kinds, "its own approximation of random": nearest}

    @property
    def stores(self) -> bool:
        return bool(self.fmt.planes(self.tile, self.dtype))

    def back(self, tiles: Tensor) -> Tensor:
        """Encode and decode."""
        if not self.stores:
            return torch.zeros_like(tiles)
        return self.fmt.decode(self.fmt.encode(tiles), self.tile, self.dtype)


def check_format(
    fmt: TileFormat | str, tile: tuple[int, int] = (64, 64), dtypes: tuple[str, ...] = ("f32", "f16", "bf16")
) -> tuple[str, ...]:
    """Run the whole contract on a format.

    Args:
        fmt: the format, or its text.
        tile: the tile shape to try it at.
        dtypes: weight dtypes that it should hold.

    Returns:
        The promises that were checked, in order.

    Raises:
        FormatError: lists every broken promise.
    """
    resolved = find_format(fmt)
    broken: list[str] = []
    checked: dict[str, None] = {}
    for dtype in dtypes:
        contract = Contract(resolved, tile, dtype)
        for name, check in CHECKS.items():
            checked[name] = None
            try:
                broken += [f"{name} ({dtype}): {problem}" for problem in check(contract)]
            except StoiccError as error:
                broken.append(f"{name} ({dtype}): {error}")
            except Exception as error:  # a user's code may raise anything; say which promise it broke
                broken.append(f"{name} ({dtype}): raised {type(error).__name__}: {error}")
    if broken:
        listed = "\n  ".join(broken)
        raise FormatError(f"format {resolved}: expected the contract of TileFormat, found broken promises:\n  {listed}")
    return tuple(checked)


def _text(c: Contract) -> Iterator[str]:
    if hash(c.fmt) != hash(type(c.fmt)(**vars(c.fmt))):
        yield "two instances with equal fields hash differently; use @dataclass(frozen=True)"
    back = type(c.fmt).from_text(_options(str(c.fmt)))
    if back != c.fmt:
        yield f"its text {c.fmt} reads back as {back}"


def _options(text: str) -> dict[str, str]:
    inside = text.partition("<")[2].rstrip(">")
    return dict(part.strip().split("=") for part in inside.split(",")) if inside else {}


def _planes(c: Contract) -> Iterator[str]:
    encoded = c.fmt.encode(c.samples()["zero"])
    for plane in c.fmt.planes(c.tile, c.dtype):
        found = encoded.get(plane.name)
        if found is None:
            yield f"encode does not return the plane {plane.name!r} that planes() declares"
        elif found.dtype != TORCH_DTYPES[plane.dtype]:
            yield f"plane {plane.name!r} is declared {plane.dtype} but encoded as {found.dtype}"
        elif plane.kind is not PlaneKind.RAGGED and found.shape != (3, *plane.shape):
            shape = tuple(found.shape)
            yield f"plane {plane.name!r} is declared {plane.shape} per tile but encoded as {shape} for 3 tiles"


def _round_trip(c: Contract) -> Iterator[str]:
    for kind, tiles in c.samples().items():
        rejected = c.fmt.reject(tiles)
        if rejected.shape != (tiles.shape[0],) or rejected.dtype != torch.bool:
            yield f"reject returns {rejected.dtype} {tuple(rejected.shape)}, not a bool per tile"
            return
        kept = tiles[~rejected]
        if len(kept) and not torch.equal(bits(c.back(kept)), bits(kept)):
            yield f"{kind} tiles are accepted but come back with other bits"


def _zero(c: Contract) -> Iterator[str]:
    if c.fmt.reject(c.samples()["zero"]).any():
        yield "a tile of +0.0 is rejected; every format holds zeros, as tails are padded with them"


def _no_tiles(c: Contract) -> Iterator[str]:
    none = torch.zeros(0, *c.tile, dtype=TORCH_DTYPES[c.dtype])
    if c.fmt.reject(none).shape != (0,) or (c.stores and c.back(none).shape != none.shape):
        yield "a batch of no tiles does not come back as one"


def _reasons(c: Contract) -> Iterator[str]:
    for kind, tiles in c.samples().items():
        for index in c.fmt.reject(tiles).nonzero().flatten()[:1].tolist():
            reason = c.fmt.why(tiles[index])
            if "expected" not in reason or "found" not in reason:
                yield f"why() of a {kind} tile should say what was expected and found, says {reason!r}"


def _bytes(c: Contract) -> Iterator[str]:
    tiles = c.samples()["zero"]
    planes: Planes = c.fmt.encode(tiles)
    for plane in c.fmt.planes(c.tile, c.dtype):
        found, declared = planes[plane.name].nbytes, 3 * plane.entry_bytes
        if plane.kind is PlaneKind.TILE and found != declared:
            yield f"plane {plane.name!r}: {found} bytes for 3 tiles, declared {declared}"
    if c.fmt.tile_bytes(tiles, c.dtype).shape != (3,):
        yield "tile_bytes does not give one value per tile"


def _tails(c: Contract) -> Iterator[str]:
    rows, columns = c.tile[0] + c.tile[0] // 2 - 1, 2 * c.tile[1] + 3
    weight = torch.zeros(rows, columns, dtype=TORCH_DTYPES[c.dtype])
    weight[:, ::4] = 0.5
    tiled = inspect(weight, [c.fmt, "dense"], c.tile)
    if not torch.equal(bits(tiled.to_dense()), bits(weight)):
        yield f"a {rows}x{columns} matrix (tails in both directions) does not decode to itself"


def _approximation(c: Contract) -> Iterator[str]:
    for kind, tiles in c.samples().items():
        if c.stores:
            planes, error = c.fmt.approximate(tiles, torch.arange(len(tiles)))
            back = c.fmt.decode(planes, c.tile, c.dtype).float()
            true = (back - tiles.float()).square().flatten(1).sum(1)
            if not back.isfinite().all() or not torch.allclose(error.float(), true, rtol=1e-2, atol=1e-6):
                yield f"approximate reports the error of {kind} tiles as {error.tolist()}, measured {true.tolist()}"


def _codes(c: Contract) -> Iterator[str]:
    if not c.fmt.planes_hold_codes:
        return
    weight = torch.randn(3 * c.tile[0], 3 * c.tile[1], generator=torch.Generator().manual_seed(1))
    values = weight.to(TORCH_DTYPES[c.dtype])
    bits_, size, zero_points = (getattr(c.fmt, name, None) for name in ("bits", "group_size", "zero_points"))
    if bits_ is None or size is None:
        yield "planes_hold_codes is True but there is no `bits` and `group_size` to quantize for"
        return
    for source in (values, nm_magnitude(values)):
        compressed = group_absmax(source, bits_, size, bool(zero_points))
        tiled = inspect(compressed, [c.fmt, "dense"], c.tile)
        if not torch.equal(bits(tiled.to_dense()), bits(compressed.dense())):
            yield "an operator's codes do not decode to the operator's own values"


def _cpu(c: Contract) -> Iterator[str]:
    """x = identity gives the decoded matrix; products are exact, so rounding once gives its bits."""
    if c.fmt.tile_mac(c.tile, c.dtype) is None or backend_named("cpu").available() is not None:
        return
    for kind, tiles in c.samples().items():
        if c.fmt.reject(tiles).any():
            continue
        weight = tiles.transpose(0, 1).reshape(c.tile[0], -1)
        kernel = compile(weight, [c.fmt, "dense"], c.tile, target="cpu")  # dense where shared planes disagree
        got = kernel(torch.eye(weight.shape[1])).T.to(weight.dtype)
        if not torch.equal(got, weight):
            yield f"the C multiply of {kind} tiles by the identity differs from decode"


CHECKS: dict[str, Callable[[Contract], Iterator[str]]] = {
    "text form reads back": _text,
    "planes as declared": _planes,
    "accepted tiles come back bit for bit": _round_trip,
    "zeros are held": _zero,
    "an empty batch": _no_tiles,
    "a reason for each rejection": _reasons,
    "bytes as declared": _bytes,
    "tails": _tails,
    "approximation tells its error": _approximation,
    "codes are held as they are": _codes,
    "C multiply equals decode": _cpu,
}
