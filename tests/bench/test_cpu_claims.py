"""The CPU bench answers each claim from what was measured, on a record made by hand and one measured small."""

import io
import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from bench import cpu, cpu_bounds, cpu_pages, figures
from bench.cpu_bounds import Bounds, Host
from bench.cpu_gates import Gate, gates
from bench.cpu_kernels import copies_for, measured, rotated
from bench.cpu_peers import Peer, _checked
from bench.cpu_record import CODED, LINEAR, Facts, Group, Record, Skew
from bench.cpu_tables import claims_table, peers_table, weights_table
from bench.cpu_weights import KEPT, mixes, random_weight, skewed_pair
from stoicc.calibration_timing import torch_threads

MACHINE = {"cpu": "a CPU", "cores": 2, "threads": 2, "last_level_cache": "1K", "torch": "2", "commit": "c"}
FACTS = Facts(1000, 0, 500, 1500, 0, 1.0, {"1": "tiles", "4": "tiles", "64": "tiles", "256": "dense-once"}, True)
BOUNDS = Bounds(read=1e6, read_large=2e6, multiply_add=1e9, product=1e10)
"""1000 bytes take 1 ms."""


def group(dtype="bf16", threads=2, batch=1, ours=1.25e-3, linear=2e-3, alone=2e-3, **names):
    seconds = {LINEAR: linear} | dict.fromkeys(CODED, ours) | names
    executors = {name: spent for name, spent in seconds.items() if name != LINEAR}
    return Group(dtype, threads, batch, BOUNDS, seconds, executors, {"peer": 5e-3}, alone, 5)


def record(*groups, facts=FACTS, skew=()):
    by_name = {dtype: dict.fromkeys(CODED, facts) for dtype in dict.fromkeys(g.dtype for g in groups)}
    batches = sorted({g.batch for g in groups})
    absent = {dtype: {"other": "it | refuses"} for dtype in by_name}
    peer_of = {"peer": "nv24", "other": "nv24"}
    return Record(MACHINE, False, [10, 100], [1, 2], batches, list(groups), by_name, absent, peer_of, list(skew), 1.0)


def found(groups_record, words) -> Gate:
    (gate,) = [gate for gate in gates(groups_record) if all(word in gate.claim for word in words)]
    return gate


def test_the_byte_bound_at_batch_1():
    gate = found(record(group(ours=1.25e-3, nv24=1.1e-3)), ("batch 1,", "2 threads", "nv24,"))
    assert gate.figure == pytest.approx(1 / 1.1)
    assert gate.held is True
    gate = found(record(group(ours=1.25e-3)), ("batch 1,", "2 threads", "dense,"))
    assert gate.figure == pytest.approx(0.8)
    assert (gate.held, gate.worst) == (False, "dense, bf16, batch 1, 2 threads")


def test_what_was_not_measured_is_neither_held_nor_not():
    gate = found(record(group(threads=2)), ("batch 1,", "1 thread:", "dense,"))
    assert (gate.figure, gate.held) == (None, None)


def test_batch_4_to_16_is_held_to_the_smaller_bound():
    """1000 bytes allow 1 ms; 64 operations for each of 1000 weights allow 6.4 us at most, at 1e10 a second."""
    some = record(group(batch=4, ours=2e-3))
    assert found(some, ("4-16", "2 threads", "host")).figure == pytest.approx(0.5)
    slow = replace(BOUNDS, multiply_add=2e6)  # 8000 operations take 4 ms, those of a 2:4 weight 2 ms
    vector = record(replace(group(batch=4, ours=5e-3), bounds=slow))
    gate = found(vector, ("4-16", "2 threads", "vectors"))
    assert gate.figure == pytest.approx(0.4)
    assert gate.worst.split(",")[0] == "int4_nv24 g=128"
    assert found(vector, ("4-16", "2 threads", "host")).figure == pytest.approx(0.2)


def test_speed_over_linear_at_64_by_dtype():
    both = record(group(batch=64, linear=2e-3, nv24=1.5e-3), group("f32", batch=64, linear=2e-3, nv24=1.5e-3))
    assert found(both, ("batch 64:", "bf16")).held is True
    assert found(both, ("batch 64:", "f32")).held is False


def test_int4_is_compared_up_to_32_only():
    slow = group(batch=64, **{"int4 g=128": 1.0})
    assert found(record(group(batch=4), slow), ("int4 over",)).held is True
    assert found(record(group(batch=4, **{"int4 g=128": 2.1e-3}), slow), ("int4 over",)).held is False


def test_large_batches_count_whatever_multiplies_them():
    mixed = record(group(batch=32, ours=1.0), group(batch=64, ours=2e-3, dense=2.2e-3))
    gate = found(mixed, ("from batch 64", "bf16"))
    assert gate.figure == pytest.approx(1 / 1.1)
    assert (gate.held, gate.worst[:5]) == (False, "dense")


def test_memory_threads_and_bits():
    facts = replace(FACTS, grown=3000, creep=20_000_000, same_bits=False)
    bad = record(group(alone=1e-3), facts=facts, skew=[Skew([1, 1], 1, 2, 9, 1.2, 1.9)])
    for words, figure in {
        ("resident",): 2.0,
        ("growth",): 20.0,
        ("skewed",): 1.2 / 1.9,
        ("same bits",): 0.0,
        ("alone",): 2.0,
    }.items():
        gate = found(bad, words)
        assert gate.figure == pytest.approx(figure), words
        assert gate.held is False, words
    good = record(group(), skew=[Skew([1, 1], 1, 2, 9, 1.9, 1.9)])
    assert all(found(good, words).held for words in (("resident",), ("growth",), ("skewed",), ("same bits",)))


def test_a_record_goes_through_json():
    made = record(group(), group("f32", 1, 4), skew=[Skew([1, 1], 1, 2, 9, 1.2, 1.9)])
    assert Record.from_json(json.loads(json.dumps(made.to_json()))) == made


def test_pages_show_the_figures_and_why_a_peer_is_absent():
    made = record(group(nv24=1.25e-3), group(threads=1), group(batch=256), skew=[Skew([1, 1], 1, 2, 9, 1.2, 1.9)])
    pages = {name: page(made) for name, page in cpu_pages.PAGE.items()}
    assert "| nv24 | 1.000 | 1.00 | 1.25 | 80% (80%) | 80% (80%) | 40% | 1.60 |" in pages["decode"]
    assert "| peer | nv24 | 4.00 | 4.00 |  |" in pages["peers"]
    assert "it \\| refuses" in pages["peers"]
    assert "1.60* |" in pages["large"]
    assert "**not held**" in pages["claims"]
    assert "| 1 x 1 | 1 | 0.0 | 1.20 | 1.90 |" in pages["threads"]
    assert "| nv24 | 1.00 | 80% / 80% | 1.60 | 1.60 |" in cpu_pages.readme(made)
    assert "bf16: nv24 over peer 4.00." in cpu_pages.readme(made)
    for text in pages.values():
        rows = [line for line in text.splitlines() if line.startswith("|")]
        assert rows
        assert all(line.endswith("|") for line in rows)


def test_documents_are_filled_between_their_markers(monkeypatch):
    monkeypatch.setattr(
        figures, "_rendered", lambda name, record: f"figures of {name}" + f" in {record}" * bool(record)
    )
    text = "a\n<!-- figures -->\nold\n<!-- /figures -->\nb\n<!-- figures: decode -->\n<!-- /figures -->\n"
    text += "<!-- figures: decode of cpu-other -->\n<!-- /figures -->\n"
    wanted = text.replace("old", "figures of None").replace("decode -->\n", "decode -->\nfigures of decode\n")
    wanted = wanted.replace("other -->\n", "other -->\nfigures of decode in cpu-other\n")
    assert figures.filled(text) == wanted
    assert figures.filled(wanted) == wanted


def test_one_visit_is_far_from_the_next():
    assert copies_for(1 << 20) == 2048
    assert copies_for(100 << 30) == 2
    seen = []
    call = rotated([lambda: seen.append(1), lambda: seen.append(2)])
    for _ in range(3):
        call()
    assert seen == [1, 2, 1]


def test_threads_are_given_back():
    before = torch.get_num_threads()
    with torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_the_host_reads_and_multiplies(monkeypatch):
    monkeypatch.setattr(cpu_bounds, "READ_BYTES", 1 << 24)
    monkeypatch.setattr(cpu_bounds, "ROUNDS", 1000)
    monkeypatch.setattr(cpu_bounds, "PRODUCT", (16, 16, 16))
    host = Host()
    words = torch.randint(0, 1 << 62, host._words.shape)
    host._words.copy_(words)
    host._large.copy_(words)
    wanted = 0
    for word in words.view(-1, 1 << 10).numpy().tolist():
        for each in word:
            wanted ^= each
    for read in ("bound: read", "bound: read, large pages"):
        assert host.calls(both_reads=False)[read]() == wanted  # every word is read, once
    times = {name: 0.5 for name in host.calls(both_reads=True)}
    assert host.bounds(times, 2).read == 2 * (1 << 24)
    assert host.bounds(times | {"bound: torch sum": 0.25}, 2).read == 4 * (1 << 24)
    assert host.bounds(times | {"bound: read, large pages": 0.25}, 2).read_large == 4 * (1 << 24)
    assert host._multiply_add() > 0


def test_mixes_have_the_formats_that_they_name():
    weight = random_weight((128, 256))
    made = mixes(weight)
    assert set(made) == set(KEPT)
    kernel, facts = measured(made["nv24"], 256, "f32", (1, 4), (1,))
    assert [entry.format for entry in kernel.stats().formats] == ["nv24"]
    assert (facts.payload, facts.same_bits) == (128 * 256 * 17 // 8, True)
    assert mixes(weight, ("dense",)) == {"dense": weight}


def test_skewed_and_uniform_hold_the_same_tiles():
    import stoicc

    kinds = {name: stoicc.compile(weight).stats().formats for name, weight in skewed_pair((256, 1024)).items()}
    assert kinds["skewed"] == kinds["uniform"]
    assert {entry.tiles for entry in kinds["skewed"]} >= {16, 6}


def test_a_peer_that_is_wrong_or_refuses_is_absent_with_the_reason():
    def wrong(matrix):
        return (lambda x: x @ matrix.T + 1), matrix

    def refuses(matrix):
        raise RuntimeError("not here\nsecond line")

    def right(matrix):
        return (lambda x: x @ matrix.T), matrix

    weight = random_weight((64, 64))
    assert _checked("a", "dense", weight, "f32", wrong).absent.startswith("wrong by")
    assert _checked("b", "dense", weight, "f32", refuses) == Peer("b", "dense", None, "not here")
    assert _checked("c", "dense", weight, "f32", right).product is not None


def test_a_small_run_measures_all_and_prints(monkeypatch, tmp_path):
    monkeypatch.setattr(cpu_bounds, "READ_BYTES", 1 << 22)
    monkeypatch.setattr(cpu_bounds, "ROUNDS", 1000)
    monkeypatch.setattr(cpu_bounds, "PRODUCT", (16, 16, 16))
    monkeypatch.setattr(cpu, "copies_for", lambda a_round: 2)
    monkeypatch.setattr(cpu, "ALONE_BYTES", 1)
    plan = replace(cpu.QUICK, shape=(128, 256), skew=(128, 512), budget=0.0, rounds=(1, 1), patience=10.0)
    names = {"bf16": ("dense", "nv24", "int8 g=128", "int4 g=128"), "f32": ("dense", "nv24")}
    plan = replace(plan, batches={"bf16": (1, 4), "f32": (1,)}, single={"bf16": (1,), "f32": ()}, mixes=names)
    made = cpu.run(plan, True, Console(quiet=True))
    cpu.write(made, tmp_path / "cpu.json")
    read = json.loads((tmp_path / "cpu.json").read_text())
    assert Record.from_json(read) == made
    assert {gate["held"] for gate in read["gates"]} <= {True, False, None}
    assert {"torch int4 weight-only g=128", "torch int8 weight-only (one scale a row)"} <= set(made.groups[0].peers)
    assert "CUDA" in made.absent["bf16"]["torch.sparse semi-structured"]
    assert all(facts.same_bits for by_name in made.facts.values() for facts in by_name.values())
    printed = io.StringIO()
    for table in (weights_table(made), peers_table(made), claims_table(made)):
        Console(width=200, file=printed).print(table)
    assert "int4 g=128" in printed.getvalue()
    assert "torch.sparse CSR" in printed.getvalue()
    assert "same bits" in printed.getvalue()
