"""Files of formats whose layout has changed since: read as they were meant, or refused."""

import json
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import stoicc
from stoicc.formats._kept import KeptRuns
from stoicc.formats._kept_rows import KeptRows
from stoicc.formats.dense import Dense
from stoicc.formats.outlier import Outlier, _by_row, _undone
from stoicc.io import text_hash
from stoicc.ir.parser import parse
from stoicc.ir.planes import pool_name
from stoicc.ir.printer import print_module
from stoicc.ir.registry import REGISTRY
from stoicc.ir.types import Module
from stoicc.pools import describe, rehash


def rewrite(path, revisions, change=lambda pools: None):
    """The file with other revisions in it (None: as files were before there were any) and other pools."""
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
        pools = {name: file.get_tensor(name).clone() for name in file.keys()}
    change(pools)
    module = parse(metadata["stoicc.ir"])
    segments = []
    for index, segment in enumerate(module.tiles.segments):
        names = dict.fromkeys(pool.name for pool in segment.pools if pool.name in pools)
        names |= dict.fromkeys(name for name in pools if name.startswith(pool_name(index, "")))
        segments.append(replace(segment, pools=tuple(describe(name, pools[name]) for name in names)))
    module = replace(module, tiles=replace(module.tiles, segments=tuple(segments)))
    text = print_module(Module(rehash(module.tiles, pools), module.schedule), exact=True)
    metadata |= {"stoicc.ir": text, "stoicc.ir.hash": text_hash(text)}
    metadata.pop("stoicc.formats")
    save_file(pools, path, metadata if revisions is None else {**metadata, "stoicc.formats": json.dumps(revisions)})


@pytest.fixture
def outliers(tmp_path):
    """A kernel with several outliers in a row, and its file."""
    tile_map = [["outlier<share=0.03>", "dense"]]
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    kernel = stoicc.compile(stoicc.inspect(weight, tile=(64, 64), tile_map=tile_map, approximate=True), target="cpu")
    kernel.save(tmp_path / "w.safetensors")
    return kernel, tmp_path / "w.safetensors"


def row_by_row(pools):
    """Outliers as revision 1 had them."""
    index = next(name.removesuffix("_counts") for name in pools if name.endswith("_counts"))
    order = _by_row(pools[f"{index}_counts"])[0]
    for plane in ("columns", "outliers"):
        pools[f"{index}_{plane}"] = _undone(pools[f"{index}_{plane}"], order)


def test_a_file_names_the_revisions_of_its_formats(outliers):
    with safe_open(outliers[1], framework="pt") as file:
        assert json.loads(file.metadata()["stoicc.formats"]) == {"outlier": 2}


@pytest.mark.parametrize("written", [None, {}, {"outlier": 1}], ids=str)
def test_outliers_that_stood_row_by_row_are_put_in_order(outliers, written):
    kernel, path = outliers
    rewrite(path, written, row_by_row)
    loaded = stoicc.load(path)
    assert torch.equal(loaded.to_dense(), kernel.to_dense())
    assert loaded.ir == kernel.ir


def test_files_of_the_new_order_that_do_not_say_so_stay_as_they_are(outliers):
    kernel, path = outliers
    rewrite(path, None)
    assert torch.equal(stoicc.load(path).to_dense(), kernel.to_dense())


def test_outliers_whose_order_nobody_can_tell_are_refused():
    # of rows 0 and 1 the first has two: columns 3, 5, 9 are [[3, 9], [5]] now, and [[3, 5], [9]] were they of old
    planes = {
        "counts": torch.zeros(1, 16, dtype=torch.uint8)
        .index_fill_(1, torch.tensor([0]), 2)
        .index_fill_(1, torch.tensor([1]), 1),
        "columns": torch.tensor([3, 5, 9], dtype=torch.uint8),
        "outliers": torch.ones(3),
    }
    assert Outlier().migrate(planes, (16, 64), "f32", 1) is None


def test_a_layout_that_is_newer_is_refused(outliers):
    rewrite(outliers[1], {"outlier": 3})
    with pytest.raises(stoicc.InputError, match=r"outlier in revision 2, found revision 3.*compile the weight again"):
        stoicc.load(outliers[1])
    for name in ("dense", "int4"):  # int4 is inside outlier
        rewrite(outliers[1], {"outlier": 2, name: 2})
        with pytest.raises(stoicc.InputError, match=f"format {name} in revision 1, found revision 2"):
            stoicc.load(outliers[1])


@pytest.mark.parametrize("written", ["{", "[]", '{"outlier": "two"}'])
def test_revisions_that_are_none_are_refused(outliers, written):
    rewrite(outliers[1], None)
    with safe_open(outliers[1], framework="pt") as file:
        metadata, pools = dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}
    save_file(pools, outliers[1], {**metadata, "stoicc.formats": written})
    with pytest.raises(stoicc.InputError, match="expected revisions of formats by name"):
        stoicc.load(outliers[1])


def test_planes_that_were_changed_are_not_migrated(outliers):
    rewrite(outliers[1], None, row_by_row)
    with safe_open(outliers[1], framework="pt") as file:
        metadata, pools = dict(file.metadata()), {name: file.get_tensor(name).clone() for name in file.keys()}
    name = next(name for name in pools if name.endswith("_outliers"))
    pools[name][0] += 1
    save_file(pools, outliers[1], metadata)
    with pytest.raises(stoicc.VerifyError, match=f"{name}: expected it as it was saved"):
        stoicc.load(outliers[1])


@pytest.mark.parametrize("fmt", ["masked<mask=nm, values=int4>", "masked<mask=nv24, values=int2<zero_points=true>>"])
def test_masked_rows_that_were_runs_are_laid_out_anew(fmt, tmp_path):
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight[3, :8] = 0  # a group that keeps nothing
    kernel = stoicc.compile(weight, tile=(32, 64), tile_map=[[fmt] * 2] * 2, approximate=True, target="cpu")
    kernel.save(tmp_path / "w.safetensors")

    def as_runs(pools):
        index, bits = next(iter(pools)).split("_")[0], 4 if "int4" in fmt else 2
        held = {name: pools.pop(f"{index}_{name}") for name in ("masks", "codes")}
        codes, _ = KeptRows(2, 8 if "nm" in fmt else 4, bits).unpack(held)
        kept = torch.stack([kernel.to_dense()[r : r + 32, c : c + 64] != 0 for r in (0, 32) for c in (0, 64)])
        pools |= {f"{index}_{name}": plane for name, plane in KeptRuns(bits).pack(codes, kept).items()}

    rewrite(tmp_path / "w.safetensors", {"masked": 1}, as_runs)
    loaded = stoicc.load(tmp_path / "w.safetensors")
    assert torch.equal(loaded.to_dense(), kernel.to_dense())
    assert loaded.ir == kernel.ir


def test_runs_are_as_they_were(tmp_path):
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    kernel = stoicc.compile(weight, tile=(32, 64), tile_map=[["masked"]] * 2, approximate=True, target="cpu")
    kernel.save(tmp_path / "w.safetensors")
    rewrite(tmp_path / "w.safetensors", None)
    assert stoicc.load(tmp_path / "w.safetensors").ir == kernel.ir


@dataclass(frozen=True)
class Turned(Dense):
    """A format whose second layout has another shape."""

    name: ClassVar[str] = "turned"
    by_default: ClassVar[bool] = False


@dataclass(frozen=True)
class TurnedAgain(Turned):
    """The class as a later version of its package has it: it cannot read what was."""

    revision: ClassVar[int] = 2


@pytest.fixture
def turned():
    stoicc.register_format(Turned())
    yield
    REGISTRY.unregister("turned")


def test_an_older_layout_without_a_way_is_refused_for_files_and_state_dicts(turned, tmp_path):
    weight = stoicc.inspect(torch.randn(16, 64), ["turned"])
    kernel = stoicc.compile(weight, target="cpu")
    kernel.save(tmp_path / "w.safetensors")
    state = kernel.state_dict()
    REGISTRY.unregister("turned")
    stoicc.register_format(TurnedAgain())
    sentence = "format turned in revision 2, found revision 1, which is laid out otherwise; load it with the version"
    with pytest.raises(stoicc.InputError, match=sentence):
        stoicc.load(tmp_path / "w.safetensors")
    with pytest.raises(stoicc.InputError, match="expected a state dict of the same tiles, formats and shape"):
        kernel.load_state_dict(state)
    REGISTRY.unregister("turned")
    stoicc.register_format(Turned())
    assert torch.equal(stoicc.load(tmp_path / "w.safetensors").to_dense(), kernel.to_dense())


def strip_by_strip(pools):
    """What is kept in the order that revision 1 of group_sparse had: by strip, column of groups and row."""
    index = next(name.removesuffix("_masks") for name in pools if name.endswith("_masks"))
    own = {name: pools.pop(f"{index}_{name}") for name in ("masks", "codes", "scales", "zeros")}
    bits = own["masks"][..., None].int() >> torch.arange(16) & 1
    kept = bits.bool()  # T, group, strip, row
    strips = kept.transpose(1, 2)

    def moved(plane, words=1):
        new = torch.zeros(*kept.shape[:2], words, *kept.shape[2:], dtype=plane.dtype)
        new[kept[:, :, None].expand(new.shape)] = plane
        old = new.permute(0, 3, 1, 2, 4)
        return old[strips[:, :, :, None].expand(old.shape)]

    counts = strips.sum((2, 3))
    pools |= {
        f"{index}_masks": own["masks"].transpose(1, 2).contiguous(),
        f"{index}_starts": (counts.cumsum(1) - counts).to(torch.int32),
        f"{index}_codes": moved(own["codes"], words=2),
        f"{index}_scales": moved(own["scales"]),
        f"{index}_zeros": moved(own["zeros"]),
    }


@pytest.fixture
def groups(tmp_path):
    """A kernel of groups that are kept or dropped, and its file."""
    fmt = "group_sparse<zero_points=true>"
    weight = torch.randn(128, 128, generator=torch.Generator().manual_seed(0))
    tiled = stoicc.inspect(weight, tile=(64, 64), tile_map=[[fmt, "dense"], [fmt, fmt]], approximate=True)
    kernel = stoicc.compile(tiled, target="cpu")
    kernel.save(tmp_path / "w.safetensors")
    return kernel, tmp_path / "w.safetensors"


def test_groups_that_stood_strip_by_strip_are_put_in_order(groups):
    kernel, path = groups
    rewrite(path, {"group_sparse": 1}, strip_by_strip)
    loaded = stoicc.load(path)
    assert torch.equal(loaded.to_dense(), kernel.to_dense())
    assert loaded.ir == kernel.ir


def more_kept(pools):
    """Masks that keep more than is stored."""
    strip_by_strip(pools)
    next(pool for name, pool in pools.items() if name.endswith("_masks")).fill_(-1)


@pytest.mark.parametrize("change", [lambda pools: None, more_kept], ids=["of today", "more kept than stored"])
def test_groups_that_are_not_what_they_are_said_to_be_are_refused(groups, change):
    rewrite(groups[1], {"group_sparse": 1}, change)
    with pytest.raises(stoicc.StoiccError, match="expected planes of format group_sparse in revision 2, found"):
        stoicc.load(groups[1])
