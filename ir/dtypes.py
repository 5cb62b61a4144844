"""The dtypes that the tile IR names, and what they are in torch.

The numbers table (weight dtype x input dtype -> output dtype) stands here once; every
backend and the kernel read it. All executors accumulate in fp32; float64 input runs on the
reference backend only, where it accumulates in float64.
"""

import torch

from stoicc.ir.errors import FormatError, InputError

TORCH_DTYPES: dict[str, torch.dtype] = {
    "f64": torch.float64,
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "u8": torch.uint8,
    "i8": torch.int8,
    "i16": torch.int16,
    "i32": torch.int32,
    "i64": torch.int64,
}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}

WEIGHT_DTYPES = ("f32", "f16", "bf16")
"""What a weight matrix may be stored in."""

BITS_VIEW: dict[torch.dtype, torch.dtype] = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}
"""The integer dtype to view a float as, where equality means equal bit patterns."""


def itemsize(dtype: str) -> int:
    """Bytes of one element of an IR dtype."""
    if dtype not in TORCH_DTYPES:
        raise FormatError(f"dtype: expected one of {', '.join(TORCH_DTYPES)}, found {dtype!r}; correct the plane")
    return TORCH_DTYPES[dtype].itemsize


def bits(values: torch.Tensor) -> torch.Tensor:
    """View floats as integers of the same width, so that -0.0 differs from 0.0."""
    return values.view(BITS_VIEW[values.dtype]) if values.dtype in BITS_VIEW else values


def output_dtype(weight: str, x: torch.dtype) -> torch.dtype:
    """The dtype of y for a weight dtype and an input dtype.

    | weight     | input       | accumulate | output      |
    | ---------- | ----------- | ---------- | ----------- |
    | bf16, f16  | the same    | fp32       | the same    |
    | bf16, f16  | f32         | fp32       | f32         |
    | f32        | f32         | fp32       | f32         |
    | any        | f64         | float64    | f64 (reference backend only) |

    Weights in codes mean (code - zero) * scale, rounded once to the weight's dtype. Executors that
    scale partial sums in fp32 (the C tiles) skip that one rounding; the others multiply the
    rounded weight. Floats are only ever put into codes where the two are the same.
    """
    if x in (torch.float32, torch.float64) or x == TORCH_DTYPES[weight]:
        return x
    wanted = "f32" if weight == "f32" else f"{weight} or f32"
    raise InputError(
        f"input of a {weight} kernel: expected dtype {wanted}, found {DTYPE_NAMES.get(x, x)}; cast it with x.to(...)"
    )
