"""What a tile format promises about its storage: one function a promise, yielding what is broken."""

import dataclasses
from collections.abc import Callable
from keyword import iskeyword

import torch
from torch import Tensor

from stoicc.contract import TILES, Contract, Problems
from stoicc.inspector import inspect
from stoicc.ir.dtypes import TORCH_DTYPES, bits
from stoicc.ir.errors import FormatError
from stoicc.ir.format import Plane, PlaneKind, Planes, TileFormat
from stoicc.ir.registry import REGISTRY, Registry
from stoicc.ops.group_absmax import group_absmax
from stoicc.ops.nm_magnitude import nm_magnitude
from stoicc.tiling import from_tiles, to_tiles


def declared(c: Contract) -> Problems:
    names: set[str] = set()
    for plane in c.planes:
        if not plane.name.isidentifier() or iskeyword(plane.name):
            yield f"expected plane names that are identifiers (kernels name arguments by them), found {plane.name!r}"
        if plane.dtype not in TORCH_DTYPES:
            known = ", ".join(TORCH_DTYPES)
            yield f"plane {plane.name!r}: expected a dtype of {known}, found {plane.dtype!r}"
        if plane.span < 0:
            yield f"plane {plane.name!r}: expected a span of tiles, or 0 for the tile row, found {plane.span}"
        for name in _stored_names(plane):
            if name in names:
                yield f"expected planes of different names, found {name!r} twice"
            names.add(name)


def rejects(c: Contract) -> Problems:
    for tiles in c.samples().values():
        rejected = c.fmt.reject(tiles)
        if rejected.shape != (TILES,) or rejected.dtype != torch.bool:
            yield f"reject returns {rejected.dtype} {tuple(rejected.shape)}, not a bool per tile"
            return


def text(c: Contract) -> Problems:
    values = {field.name: getattr(c.fmt, field.name) for field in dataclasses.fields(c.fmt) if field.init}
    if hash(c.fmt) != hash(type(c.fmt)(**values)):
        yield "two instances with equal fields hash differently; use @dataclass(frozen=True)"
    back = _read_back(c)
    if type(back) is not type(c.fmt) or back != c.fmt:
        yield f"its text {c.fmt} reads back as {back!r}, not as {c.fmt!r}"


def _read_back(c: Contract) -> TileFormat:
    if c.registered:
        return REGISTRY.parse(str(c.fmt))
    if "<" not in str(c.fmt):
        return type(c.fmt).from_text({})
    alone = Registry()
    alone.register(type(c.fmt).from_text({}))
    return alone.parse(str(c.fmt))


def registered(c: Contract) -> Problems:
    if not c.registered:
        yield (
            f"the name {getattr(c.fmt, 'name', None)!r} does not stand for {type(c.fmt).__name__}, so nothing that "
            "needs a compiled program was checked; register it first: stoicc.register_format(...)"
        )


def encoded_as_declared(c: Contract) -> Problems:
    every = torch.arange(TILES)
    planes_of: dict[str, Callable[[Tensor], Planes]] = {
        "encode": c.fmt.encode,
        "encode_shared": lambda tiles: c.fmt.encode_shared(tiles, every[: len(tiles)]),
    }
    for method, call in planes_of.items():
        for tiles in c.accepted().values():
            yield from _compare(c, method, call(tiles), len(tiles))
    yield from _compare(c, "approximate", c.fmt.approximate(c.samples()["random"], every).planes, TILES)


def _compare(c: Contract, method: str, encoded: Planes, tiles: int) -> Problems:
    names = {name for plane in c.planes for name in _stored_names(plane)}
    for name in sorted(encoded.keys() - names):
        yield f"{method} returns the plane {name!r}, which planes() does not declare"
    for name in sorted(names - encoded.keys()):
        yield f"{method} does not return the plane {name!r} that planes() declares"
    for plane in c.planes:
        found = encoded.get(plane.name)
        if found is None:
            continue
        if found.dtype != TORCH_DTYPES[plane.dtype]:
            yield f"plane {plane.name!r} is declared {plane.dtype} but encoded as {found.dtype}"
        count = 0
        if plane.kind is PlaneKind.RAGGED and (ptr := encoded.get(f"{plane.name}_ptr")) is not None:
            if ptr.shape != (tiles + 1,) or ptr.dtype != torch.int64 or ptr[0] != 0 or ptr.diff().lt(0).any():
                yield f"{plane.name}_ptr of {tiles} tiles is not {tiles + 1} rising int64 offsets from 0"
            count = int(ptr[-1])
        shape = (count if plane.kind is PlaneKind.RAGGED else tiles, *plane.shape)
        if found.shape != shape:
            yield (
                f"plane {plane.name!r} is declared {plane.shape} per {_entry(plane)} but encoded as "
                f"{tuple(found.shape)} for {shape[0]} of them"
            )


def _entry(plane: Plane) -> str:
    return "element" if plane.kind is PlaneKind.RAGGED else "tile"


def _stored_names(plane: Plane) -> tuple[str, ...]:
    return (plane.name, f"{plane.name}_ptr") if plane.kind is PlaneKind.RAGGED else (plane.name,)


def inputs_left_alone(c: Contract) -> Problems:
    random, held = c.samples()["random"], list(c.accepted().values())[-1:]
    slots = torch.arange(TILES)
    calls: list[tuple[str, Planes, Callable[[Planes], object]]] = [
        ("reject", {"tiles": random}, lambda given: c.fmt.reject(given["tiles"])),
        ("approximate", {"tiles": random}, lambda given: c.fmt.approximate(given["tiles"], slots)),
        ("tile_bytes", {"tiles": random}, lambda given: c.fmt.tile_bytes(given["tiles"], c.dtype)),
    ]
    for tiles in held:
        calls.append(("encode", {"tiles": tiles}, lambda given: c.fmt.encode(given["tiles"])))
        if c.planes:
            planes = c.fmt.encode(tiles.clone())
            calls.append(("decode", planes, lambda given: c.fmt.decode(given, c.tile, c.dtype)))
    for method, given, call in calls:
        given = {name: tensor.clone() for name, tensor in given.items()}
        before = {name: (tensor._version, tensor.clone()) for name, tensor in given.items()}
        call(dict(given))
        for name, (version, values) in before.items():
            if given[name]._version != version or not torch.equal(bits(given[name]), bits(values)):
                what = f"the plane {name!r}" if method == "decode" else "the tiles"
                yield f"{method} changes {what} that it was given; work on a copy"


def round_trip(c: Contract) -> Problems:
    for kind, tiles in c.accepted().items():
        back = c.back(tiles.clone())
        if back.shape != tiles.shape or back.dtype != tiles.dtype:
            yield f"decode returns {back.dtype} {tuple(back.shape)} for tiles of {tiles.dtype} {tuple(tiles.shape)}"
            return
        if not torch.equal(bits(back), bits(tiles)):
            yield f"{kind} tiles are accepted but come back with other bits"


def zeros(c: Contract) -> Problems:
    if c.fmt.reject(c.samples()["zero"]).any():
        yield "a tile of +0.0 is rejected; every format holds zeros, as tails are padded with them"


def more_than_zeros(c: Contract) -> Problems:
    if c.planes and not any(tiles.ne(0).any() for tiles in c.accepted().values()):
        yield (
            f"no sample but zeros is accepted (tried {', '.join(c.samples())}); accept at least what "
            "decode makes of the planes of approximate"
        )


def no_tiles(c: Contract) -> Problems:
    none = torch.zeros(0, *c.tile, dtype=TORCH_DTYPES[c.dtype])
    if c.fmt.reject(none).shape != (0,) or (c.planes and c.back(none).shape != none.shape):
        yield "a batch of no tiles does not come back as one"


def reasons(c: Contract) -> Problems:
    for kind, tiles in c.samples().items():
        for index in c.fmt.reject(tiles.clone()).nonzero().flatten()[:1].tolist():
            reason = c.fmt.why(tiles[index])
            if "expected" not in reason or "found" not in reason:
                yield f"why() of a {kind} tile should say what was expected and found, says {reason!r}"


def byte_counts(c: Contract) -> Problems:
    if c.of_kind(PlaneKind.RAGGED) and type(c.fmt).tile_bytes is TileFormat.tile_bytes:
        yield "tile_bytes is the default, which counts no RAGGED plane; override tile_bytes to count each tile's run"
        return
    for kind, tiles in c.accepted().items():
        planes = c.fmt.encode(tiles.clone())
        real = torch.zeros(len(tiles), dtype=torch.float64)
        for plane in c.planes:
            if plane.kind is PlaneKind.RAGGED:
                real += planes[f"{plane.name}_ptr"].diff() * plane.entry_bytes
            elif plane.kind is not PlaneKind.MATRIX:
                real += plane.entry_bytes / max(plane.span, 1)
        told = c.fmt.tile_bytes(tiles, c.dtype)
        if told.shape != real.shape:
            yield f"tile_bytes gives {tuple(told.shape)} for {len(tiles)} tiles, not one value per tile"
        elif not torch.allclose(told.double(), real):
            yield f"tile_bytes of {kind} tiles says {told.tolist()}, their planes take {real.tolist()}"


def shared_planes(c: Contract) -> Problems:
    """Tiles that reject_shared accepts together have one entry, and come back from it."""
    if not c.of_kind(PlaneKind.GROUP):
        return
    doubled = 2.0 ** torch.arange(TILES).view(-1, 1, 1)
    for kind, tiles in c.accepted().items():
        for how, given in (
            ("", tiles),
            (", doubled from tile to tile,", tiles * doubled[: len(tiles)].to(tiles.dtype)),
        ):
            held = given[~c.fmt.reject(given.clone())]
            problem = _one_entry(c, held)
            if problem:
                yield f"{kind} tiles{how} are accepted by reject_shared in one slot, {problem}; reject them together"
                return


def _one_entry(c: Contract, tiles: Tensor) -> str:
    """What is wrong with tiles that reject_shared accepts in one slot, or nothing."""
    left = torch.zeros(0, dtype=torch.bool)
    while len(left) != len(tiles):  # as the inspector does: ask again until those left agree
        left = torch.zeros(len(tiles), dtype=torch.int64)
        tiles = tiles[~c.fmt.reject_shared(tiles.clone(), left)]
    if not len(tiles):
        return ""
    planes = c.fmt.encode_shared(tiles.clone(), torch.zeros(len(tiles), dtype=torch.int64))
    for plane in c.of_kind(PlaneKind.GROUP):
        entries = planes[plane.name]
        if not torch.equal(bits(entries), bits(entries[:1].expand_as(entries))):
            return f"but their entries of the plane {plane.name!r} differ"
    back = c.fmt.decode(planes, c.tile, c.dtype)
    return "" if torch.equal(bits(back), bits(tiles)) else "but come back with other bits"


def matrix_planes(c: Contract) -> Problems:
    """The inspector encodes a large matrix in batches, and all of them have to say the same."""
    for plane in c.of_kind(PlaneKind.MATRIX):
        entries = torch.cat([c.fmt.encode(tiles)[plane.name] for tiles in c.accepted().values()])
        if not torch.equal(bits(entries), bits(entries[:1].expand_as(entries))):
            yield (
                f"the MATRIX plane {plane.name!r} differs from batch to batch of tiles; its entry serves the whole "
                "matrix, so make it of the format's fields alone"
            )


def tails(c: Contract) -> Problems:
    if not c.registered:
        return
    rows, columns = c.tile[0] + c.tile[0] // 2 - 1, 2 * c.tile[1] + 3
    for tiles in reversed(c.accepted().values()):  # from the format's own values to zeros, which always fit
        weight = tiles[0].repeat(2, 3)[:rows, :columns].contiguous()
        if c.fits(to_tiles(weight, c.tile), 3):
            tiled = inspect(weight, tile=c.tile, tile_map=c.tile_map(6, 3))
            assert [segment.format for segment in tiled.program.segments] == [str(c.fmt)]
            if not torch.equal(bits(tiled.to_dense()), bits(weight)):
                yield f"a {rows}x{columns} matrix (tails in both directions) does not decode to itself"
            if weight.any():
                return


def approximation(c: Contract) -> Problems:
    if not c.planes:
        return
    every = [torch.arange(TILES)]
    if c.of_kind(PlaneKind.GROUP):
        every.append(torch.zeros(TILES, dtype=torch.int64))
    for kind, tiles in c.samples().items():
        for slots in every:
            planes, error = c.fmt.approximate(tiles.clone(), slots)
            back = c.fmt.decode(planes, c.tile, c.dtype).float()
            true = (back - tiles.float()).square().flatten(1).sum(1)
            if not back.isfinite().all() or not torch.allclose(error.float(), true, rtol=1e-2, atol=1e-6):
                yield f"approximate reports the error of {kind} tiles as {error.tolist()}, measured {true.tolist()}"


def codes(c: Contract) -> Problems:
    if not c.fmt.planes_hold_codes or not c.registered:
        return
    weight = torch.randn(3 * c.tile[0], 3 * c.tile[1], generator=torch.Generator().manual_seed(1))
    values = weight.to(TORCH_DTYPES[c.dtype])
    width, size, zero_points = (getattr(c.fmt, name, None) for name in ("bits", "group_size", "zero_points"))
    if width is None or size is None:
        yield "planes_hold_codes is True but there is no `bits` and `group_size` to quantize for"
        return
    refusals = []
    tiles = to_tiles(values, c.tile)
    kept = c.fmt.keep(tiles.float().abs())
    own = () if kept is None else (from_tiles(tiles.where(kept, 0), (3 * c.tile[0], 3 * c.tile[1])),)
    for source in (values, nm_magnitude(values), *own):
        compressed = group_absmax(source, width, size, bool(zero_points))
        try:
            tiled = inspect(compressed, tile=c.tile, tile_map=c.tile_map(9, 3))
        except FormatError as error:  # formats of zeros refuse the first source
            refusals.append(str(error))
            continue
        if not torch.equal(bits(tiled.to_dense()), bits(compressed.dense())):
            yield "an operator's codes do not decode to the operator's own values"
    if len(refusals) == 2 + len(own):
        yield f"no codes of an operator are held, dense or 2:4: {refusals[1]}"
