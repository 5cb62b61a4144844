"""The figures of README.md, rendered from `bench/results/`, so that each is one that a command printed.

python -m bench.figures     # rewrites the block between the markers; a test compares it
"""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- figures -->", "<!-- /figures -->"


def render() -> str:
    """The block of figures as markdown."""
    parts = [cpu(_read("cpu")), inspector(_read("inspector"))]
    parts += [gpu(json.loads(path.read_text())) for path in sorted(RESULTS.glob("gpu-*.json"))]
    return "\n\n".join(parts)


def cpu(found: dict[str, Any]) -> str:
    """Speed over F.linear bf16 by mix and batch."""
    result, machine = found["result"], found["machine"]
    batches = [str(batch) for batch in result["batches"]]
    shape = " x ".join(map(str, result["shape"]))
    lines = [
        f"Times faster than `F.linear` on the dense bf16 weight, {shape}, bf16 in and out, cold weights, "
        f"{machine['threads']} threads of an {machine['cpu']} ({machine['last_level_cache']} of shared cache, "
        f"{result['read_gb_s']:.1f} GB/s plain read); medians of interleaved runs, `python -m bench.cpu`:",
        "",
        f"| weight | bytes/weight | of the byte bound, batch 1 | {' | '.join(f'batch {batch}' for batch in batches)} |",
        f"| --- | {' | '.join('---:' for _ in range(len(batches) + 2))} |",
    ]
    for name, row in result["rows"].items():
        keys = ("bytes_per_weight", *batches)
        cells = [f"{row[key]:.2f}" if key in row else "" for key in keys]
        cells.insert(1, f"{row['bound']:.0%}" if "bound" in row else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def inspector(found: dict[str, Any]) -> str:
    """Time and peak memory of compiling a weight."""
    rows = [
        f"{name} {row['seconds']:.2f} s and {row['peak_over_weight']:.1f}x its bytes at the peak"
        for name, row in found["results"].items()
    ]
    return (
        f"`stoicc.compile` of a 4096 x 11008 bf16 weight on the same machine (`python -m bench.inspector`): "
        f"{'; '.join(rows)}."
    )


def gpu(found: dict[str, Any]) -> str:
    """Decode and prefill times of one GPU."""
    lines = [
        f"{found['device']}, torch {found['versions']['torch']}, triton {found['versions']['triton']} "
        f"(copy bandwidth {found['copy_bandwidth'] / 1e9:.0f} GB/s), `make gpu-check`:",
        "",
        "| shape | batch | format | executor | us | of the byte bound | x F.linear |",
        "| --- | ---: | --- | --- | ---: | ---: | ---: |",
    ]
    for t in found["times"]:
        shape = f"{t['shape'][0]} x {t['shape'][1]}"
        lines.append(
            f"| {shape} | {t['batch']} | {t['format']} | {t['executor']} | {t['time']:.1f} | {t['fraction']:.0%} "
            f"| {'none' if t['speedup'] is None else format(t['speedup'], '.2f')} |"
        )
    return "\n".join(lines)


def _read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def main() -> None:
    """Put the figures between the markers of README.md."""
    readme = ROOT / "README.md"
    text = readme.read_text()
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    readme.write_text(f"{before}{BEGIN}\n{render()}\n{END}{after}")


if __name__ == "__main__":
    main()
