"""The rows of `bench.accuracy`: what is done to every linear layer, as recipes for `stoicc.compress`.

They are the table of SLiM's paper (Mozaffari et al. 2025, arXiv 2410.09615): a pattern of zeros, who chooses them, who
quantizes what is left, and which adapter answers for the error.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Steps = tuple[dict[str, dict[str, Any]], ...]

PATTERNS: dict[str, dict[str, Any]] = {"2:4": {"n": 2, "m": 4}, "50%": {"sparsity": 0.5}}
"""Patterns of zeros that every layer gets, as options of an operator."""
MOSAIC = "25%, mosaic"
"""2:4 and dense tiles of 64 x 64, half of each."""
SPARSER = "70%"
"""Unstructured; where OWL's paper (arXiv 2310.05175) shows what uneven layers gain."""
OWL = "OWL"
BY_OUTPUT = "by output"
ALL_PATTERNS = (*PATTERNS, MOSAIC)
GROUP = 128
"""Weights along K that share a scale in the rows of group quantization, as in SLiM's paper."""
ADAPTERS = {"": (), "Naive-LoRA": ("naive_lora",), "SLiM-LoRA": ("slim_lora",)}
DENSE_INPUTS = "dense inputs"
QUANTIZED_ADAPTER = "SLiM-LoRA, 4 bits"
AVERAGE = "3 bits on average"
ZERO_POINTS = "zero points"


@dataclass(frozen=True)
class Row:
    """One way to compress a model.

    Attributes:
        pattern: of zeros: "dense", or one of ALL_PATTERNS.
        pruning, quantization, adapter: methods as the table names them, "" where there is none.
        steps: operators of `stoicc.ops` in order.
        sequential: calibrated on what the compressed layers before it produce, not on what the dense ones do.
        budget: sparsity or bits that all layers have together; None where each has the same.
        keep: share of the neurons of every MLP that stay; None where all do.
    """

    pattern: str
    pruning: str
    quantization: str
    adapter: str
    steps: Steps
    sequential: bool = True
    budget: dict[str, Any] | None = None
    keep: float | None = None

    @property
    def name(self) -> str:
        """Unique, and short enough for a line of text."""
        dense = "" if self.sequential else DENSE_INPUTS
        return ", ".join(filter(None, [self.pattern, self.pruning, self.quantization, self.adapter, dense]))


def step(operator: str, **options: Any) -> Steps:
    """One operator as a recipe has it."""
    return ({operator: options},)


def adapter_steps(adapter: str) -> Steps:
    """The steps of an adapter of the default rank, a tenth of the layer's smaller side."""
    if adapter == QUANTIZED_ADAPTER:
        return step("slim_lora") + step("quantize_adapter", bits=4)
    return tuple({operator: {}} for operator in ADAPTERS[adapter])


def pruning_steps(pattern: str) -> dict[str, Steps]:
    """Who can choose the zeros of a pattern."""
    if pattern == MOSAIC:
        methods = ("magnitude", "Wanda", "SparseGPT")
        return {name: step("tile_mosaic", sparsity=0.25, method=name.lower()) for name in methods}
    options = PATTERNS[pattern]
    found = {"magnitude": step("nm_magnitude" if "n" in options else "magnitude", **options)}
    if "n" not in options:
        found["OBD"] = step("obd", **options)
    return found | {"Wanda": step("wanda", **options), "SparseGPT": step("sparsegpt", **options)}


QUANTIZERS = {
    "AbsMax": step("absmax", bits=4),
    "SLiM-Quant": step("slim_quant", bits=4),
    "SLiM-Quant-O": step("slim_quant", bits=4, activation_aware=True),
    "group AbsMax": step("group_absmax", bits=4, group_size=GROUP),
    "OPTQ": step("optq", bits=4, group_size=GROUP),
}


def pruned(pattern: str) -> Iterator[Row]:
    """Zeros alone, and adapters on those that Wanda chose."""
    chosen = pruning_steps(pattern)
    for pruning, steps in chosen.items():
        yield Row(pattern, pruning, "", "", steps)
    for adapter in ("Naive-LoRA", "SLiM-LoRA"):
        yield Row(pattern, "Wanda", "", adapter, chosen["Wanda"] + adapter_steps(adapter))
    if pattern == "2:4":
        for pruning in ("Wanda", "SparseGPT"):
            yield Row(pattern, pruning, "", "", chosen[pruning], sequential=False)
    if pattern == "50%":
        yield from uneven(pattern, 0.5)


def sparser() -> Iterator[Row]:
    """Even and uneven layers where most weights go."""
    for pruning in ("magnitude", "Wanda"):
        yield Row(SPARSER, pruning, "", "", step(pruning.lower(), sparsity=0.7))
    yield from uneven(SPARSER, 0.7)
    yield Row(SPARSER, "SparseGPT", "", "", step("sparsegpt", sparsity=0.7))


def uneven(pattern: str, sparsity: float) -> Iterator[Row]:
    """Wanda with sparsity by OWL's outlier ratios of blocks, and by what layers do to the model's output."""
    for way, options in ((OWL, {}), (BY_OUTPUT, {"per": "layer", "by": "output"})):
        yield Row(pattern, f"Wanda, {way}", "", "", step("wanda"), budget={"sparsity": sparsity, **options})


def narrow() -> Iterator[Row]:
    """Width pruning: neurons of the MLPs go."""
    for keep in (0.75, 0.5):
        yield Row(f"{1 - keep:.0%} of neurons", "Minitron", "", "", (), keep=keep)


def other_widths() -> Iterator[Row]:
    """Codes of 8, 3 and 2 bits in groups, and 3 bits on average."""
    yield Row("dense", "", "group AbsMax, 8 bits", "", step("group_absmax", bits=8, group_size=GROUP))
    for bits in (3, 2):
        for name in ("group AbsMax", "OPTQ"):
            steps = step(name.lower().replace(" ", "_"), bits=bits, group_size=GROUP)
            yield Row("dense", "", f"{name}, {bits} bits", "", steps)
    yield Row("dense", "", f"OPTQ, 2 bits, {ZERO_POINTS}", "", step("optq", bits=2, group_size=GROUP, zero_points=True))
    steps = step("group_absmax", group_size=GROUP)
    yield Row("dense", "", f"group AbsMax, {AVERAGE}", "", steps, budget={"bits": 3})


def quantized() -> Iterator[Row]:
    """Codes alone, and adapters on those of SLiM-Quant."""
    for quantization, steps in QUANTIZERS.items():
        yield Row("dense", "", quantization, "", steps)
    for adapter in ("Naive-LoRA", "SLiM-LoRA"):
        yield Row("dense", "", "SLiM-Quant", adapter, QUANTIZERS["SLiM-Quant"] + adapter_steps(adapter))


def pruned_and_quantized(pattern: str) -> Iterator[Row]:
    """Zeros and codes: the earlier methods with groups, and SLiM with its parts taken away."""
    chosen = pruning_steps(pattern)
    for pruning in ("magnitude", "Wanda"):
        yield Row(pattern, pruning, "group AbsMax", "", chosen[pruning] + QUANTIZERS["group AbsMax"])
    if pattern in PATTERNS:  # one sweep prunes and quantizes
        joint = step("sparsegpt", **PATTERNS[pattern], bits=4, group_size=GROUP)
    else:
        joint = chosen["SparseGPT"] + QUANTIZERS["OPTQ"]
    yield Row(pattern, "SparseGPT", "OPTQ", "", joint)
    for quantization in ("AbsMax", "SLiM-Quant"):
        yield Row(pattern, "Wanda", quantization, "", QUANTIZERS[quantization] + chosen["Wanda"])
    for adapter in ("Naive-LoRA", "SLiM-LoRA", QUANTIZED_ADAPTER):
        steps = QUANTIZERS["SLiM-Quant"] + chosen["Wanda"] + adapter_steps(adapter)
        yield Row(pattern, "Wanda", "SLiM-Quant", adapter, steps)
    steps = QUANTIZERS["SLiM-Quant-O"] + chosen["Wanda"] + adapter_steps("SLiM-LoRA")
    yield Row(pattern, "Wanda", "SLiM-Quant-O", "SLiM-LoRA", steps)


def all_rows() -> list[Row]:
    """Every row of the full table, the dense model first."""
    rows = [Row("dense", "", "", "", ())]
    rows += [row for pattern in ALL_PATTERNS for row in pruned(pattern)]
    rows += [*sparser(), *narrow(), *quantized(), *other_widths()]
    return rows + [row for pattern in ALL_PATTERNS for row in pruned_and_quantized(pattern)]


def quick_rows() -> list[Row]:
    """The fewest rows that show every published order once: at 2:4, and 4 bits without zeros."""
    names = {
        "dense",
        "2:4, magnitude",
        "2:4, Wanda",
        "2:4, SparseGPT",
        "dense, AbsMax",
        "dense, SLiM-Quant",
        "2:4, Wanda, SLiM-Quant",
        "2:4, Wanda, SLiM-Quant, Naive-LoRA",
        "2:4, Wanda, SLiM-Quant, SLiM-LoRA",
    }
    return [row for row in all_rows() if row.name in names]


@dataclass(frozen=True)
class Order:
    """A published order of error: `rows` by name, the least first."""

    claim: str
    where: str
    rows: tuple[str, ...]


def orders() -> list[Order]:
    """Every place in the full table where a published order speaks."""
    found = [Order("SLiM-Quant < AbsMax", "4 bits", ("dense, SLiM-Quant", "dense, AbsMax"))]
    adapters = ("SLiM-LoRA", "Naive-LoRA", "")
    weighed = "SLiM-LoRA < Naive-LoRA < none"
    found.append(Order("OPTQ < AbsMax", "4 bits, groups", ("dense, OPTQ", "dense, group AbsMax")))
    for bits in (3, 2):
        names = tuple(f"dense, {each}, {bits} bits" for each in ("OPTQ", "group AbsMax"))
        found.append(Order("OPTQ < AbsMax", f"{bits} bits, groups", names))
    even = "dense, group AbsMax, 3 bits"
    found.append(Order("uneven < even", "3 bits, groups", (f"dense, group AbsMax, {AVERAGE}", even)))
    for pattern in ("50%", SPARSER):
        for way in (OWL, BY_OUTPUT):
            found.append(Order(f"{way} < even", pattern, (_name(pattern, "Wanda", way), _name(pattern, "Wanda"))))
    found.append(Order(weighed, "4 bits", tuple(_name("dense", "", "SLiM-Quant", each) for each in adapters)))
    pruners = tuple(_name(SPARSER, each) for each in ("SparseGPT", "Wanda", "magnitude"))
    found.append(Order("SparseGPT < Wanda < magnitude", SPARSER, pruners))
    for pattern in ALL_PATTERNS:
        pruning = tuple(_name(pattern, each) for each in ("SparseGPT", "Wanda", "magnitude"))
        found.append(Order("SparseGPT < Wanda < magnitude", pattern, pruning))
        joint = (("SparseGPT", "OPTQ"), ("Wanda", "group AbsMax"), ("magnitude", "group AbsMax"))
        found.append(
            Order("SparseGPT < Wanda < magnitude", f"{pattern}, 4 bits", tuple(_name(pattern, *e) for e in joint))
        )
        found.append(Order(weighed, pattern, tuple(_name(pattern, "Wanda", "", each) for each in adapters)))
        slim = tuple(_name(pattern, "Wanda", "SLiM-Quant", each) for each in adapters)
        found.append(Order(weighed, f"{pattern}, 4 bits", slim))
        clips = tuple(_name(pattern, "Wanda", each) for each in ("SLiM-Quant", "AbsMax"))
        found.append(Order("SLiM-Quant < AbsMax", f"{pattern}, 4 bits", clips))
    return found


def _name(*parts: str) -> str:
    return ", ".join(filter(None, parts))
