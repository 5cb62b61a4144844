"""The kernel classes of the Gluon dialect that are executed in tests: a pairwise cover, written out as data."""

from dataclasses import dataclass

from tests.kernel_classes import KernelClass


@dataclass(frozen=True)
class Covered:
    """A class, the shape `[M, K]` of a weight of it, and the GPU that it is compiled for."""

    kernel: KernelClass
    shape: tuple[int, int]
    arch: str

    @property
    def name(self) -> str:
        return f"{self.kernel.name}-{self.shape[0]}x{self.shape[1]}-{self.arch}"

    def value(self, parameter: str) -> object:
        return getattr(self, parameter) if hasattr(self, parameter) else getattr(self.kernel, parameter)


PARAMETERS: dict[str, tuple[object, ...]] = {
    "formats": ("dense", "nv24", "int8", "int4", "int4_nv24", "rows", "wide_zeros", "mosaic"),
    "tile": ((64, 64), (64, 128), (64, 256), (128, 64), (128, 128), (128, 256)),
    "weight": ("bf16", "f16"),
    "beside": ("plain", "bias", "gelu", "output_scale", "rows", "low_rank", "most"),
    "split": (False, True),
    "block_n": (8, 16, 32, 64, 128),
    "shape": ((128, 128), (200, 456), (300, 72), (512, 1288)),
    "arch": ("sm_80", "sm_90"),
}
"""What occurs in pairs: shapes whole and with tails of rows and columns, short rows and long ones."""

COVER: tuple[Covered, ...] = (
    Covered(KernelClass("dense", (64, 64), "f16", "same", "bias", False, 8), (300, 72), "sm_90"),
    Covered(KernelClass("dense", (64, 128), "f16", "same", "gelu", False, 32), (128, 128), "sm_80"),
    Covered(KernelClass("dense", (64, 256), "bf16", "same", "rows", True, 64), (200, 456), "sm_90"),
    Covered(KernelClass("dense", (128, 64), "bf16", "same", "plain", False, 16), (300, 72), "sm_80"),
    Covered(KernelClass("dense", (128, 128), "f16", "same", "low_rank", True, 64), (512, 1288), "sm_90"),
    Covered(KernelClass("dense", (128, 128), "f16", "same", "most", False, 128), (512, 1288), "sm_80"),
    Covered(KernelClass("dense", (128, 256), "f16", "same", "output_scale", False, 128), (200, 456), "sm_80"),
    Covered(KernelClass("nv24", (64, 64), "f16", "same", "output_scale", True, 32), (128, 128), "sm_90"),
    Covered(KernelClass("nv24", (64, 128), "bf16", "same", "low_rank", False, 32), (512, 1288), "sm_80"),
    Covered(KernelClass("nv24", (64, 256), "bf16", "same", "plain", True, 8), (300, 72), "sm_90"),
    Covered(KernelClass("nv24", (64, 256), "f16", "same", "most", True, 32), (200, 456), "sm_90"),
    Covered(KernelClass("nv24", (128, 64), "f16", "same", "rows", False, 128), (128, 128), "sm_80"),
    Covered(KernelClass("nv24", (128, 128), "bf16", "same", "bias", True, 16), (200, 456), "sm_80"),
    Covered(KernelClass("nv24", (128, 256), "bf16", "same", "gelu", True, 64), (512, 1288), "sm_90"),
    Covered(KernelClass("int8", (64, 64), "f16", "same", "bias", True, 128), (200, 456), "sm_90"),
    Covered(KernelClass("int8", (64, 128), "bf16", "same", "plain", True, 128), (512, 1288), "sm_80"),
    Covered(KernelClass("int8", (64, 256), "bf16", "same", "low_rank", True, 16), (128, 128), "sm_90"),
    Covered(KernelClass("int8", (64, 256), "f16", "same", "gelu", True, 32), (128, 128), "sm_90"),
    Covered(KernelClass("int8", (128, 64), "bf16", "same", "most", False, 64), (300, 72), "sm_80"),
    Covered(KernelClass("int8", (128, 128), "f16", "same", "rows", False, 8), (300, 72), "sm_90"),
    Covered(KernelClass("int8", (128, 256), "f16", "same", "output_scale", True, 32), (200, 456), "sm_80"),
    Covered(KernelClass("int4", (64, 64), "f16", "same", "plain", True, 64), (300, 72), "sm_80"),
    Covered(KernelClass("int4", (64, 128), "f16", "same", "output_scale", False, 16), (300, 72), "sm_80"),
    Covered(KernelClass("int4", (64, 128), "f16", "same", "low_rank", False, 8), (200, 456), "sm_90"),
    Covered(KernelClass("int4", (64, 128), "f16", "same", "most", True, 64), (128, 128), "sm_80"),
    Covered(KernelClass("int4", (64, 256), "bf16", "same", "bias", False, 32), (300, 72), "sm_80"),
    Covered(KernelClass("int4", (128, 64), "f16", "same", "rows", False, 8), (512, 1288), "sm_90"),
    Covered(KernelClass("int4", (128, 128), "f16", "same", "gelu", True, 128), (300, 72), "sm_90"),
    Covered(KernelClass("int4", (128, 256), "f16", "same", "output_scale", True, 64), (300, 72), "sm_90"),
    Covered(KernelClass("int4_nv24", (64, 64), "bf16", "same", "rows", False, 16), (512, 1288), "sm_80"),
    Covered(KernelClass("int4_nv24", (64, 128), "f16", "same", "bias", True, 32), (512, 1288), "sm_80"),
    Covered(KernelClass("int4_nv24", (64, 256), "f16", "same", "most", True, 32), (512, 1288), "sm_90"),
    Covered(KernelClass("int4_nv24", (128, 64), "bf16", "same", "gelu", False, 16), (200, 456), "sm_90"),
    Covered(KernelClass("int4_nv24", (128, 64), "bf16", "same", "output_scale", True, 8), (200, 456), "sm_80"),
    Covered(KernelClass("int4_nv24", (128, 128), "bf16", "same", "low_rank", False, 64), (300, 72), "sm_80"),
    Covered(KernelClass("int4_nv24", (128, 256), "bf16", "same", "rows", True, 128), (128, 128), "sm_90"),
    Covered(KernelClass("int4_nv24", (128, 256), "f16", "same", "plain", False, 32), (200, 456), "sm_90"),
    Covered(KernelClass("rows", (64, 64), "bf16", "same", "low_rank", True, 128), (200, 456), "sm_80"),
    Covered(KernelClass("rows", (64, 128), "bf16", "same", "rows", True, 32), (300, 72), "sm_80"),
    Covered(KernelClass("rows", (64, 256), "f16", "same", "most", True, 16), (300, 72), "sm_90"),
    Covered(KernelClass("rows", (128, 64), "bf16", "same", "plain", False, 64), (200, 456), "sm_80"),
    Covered(KernelClass("rows", (128, 64), "f16", "same", "gelu", False, 8), (512, 1288), "sm_90"),
    Covered(KernelClass("rows", (128, 128), "f16", "same", "output_scale", True, 64), (300, 72), "sm_90"),
    Covered(KernelClass("rows", (128, 256), "bf16", "same", "bias", True, 8), (128, 128), "sm_80"),
    Covered(KernelClass("wide_zeros", (64, 64), "bf16", "same", "gelu", True, 8), (200, 456), "sm_80"),
    Covered(KernelClass("wide_zeros", (64, 128), "bf16", "same", "rows", True, 16), (512, 1288), "sm_80"),
    Covered(KernelClass("wide_zeros", (64, 256), "bf16", "same", "output_scale", True, 128), (512, 1288), "sm_80"),
    Covered(KernelClass("wide_zeros", (128, 64), "f16", "same", "bias", False, 64), (300, 72), "sm_80"),
    Covered(KernelClass("wide_zeros", (128, 64), "f16", "same", "low_rank", True, 32), (200, 456), "sm_90"),
    Covered(KernelClass("wide_zeros", (128, 128), "bf16", "same", "plain", False, 32), (128, 128), "sm_90"),
    Covered(KernelClass("wide_zeros", (128, 256), "f16", "same", "most", False, 16), (200, 456), "sm_80"),
    Covered(KernelClass("mosaic", (64, 64), "bf16", "same", "most", False, 8), (128, 128), "sm_80"),
    Covered(KernelClass("mosaic", (64, 128), "f16", "same", "bias", True, 64), (512, 1288), "sm_90"),
    Covered(KernelClass("mosaic", (64, 256), "bf16", "same", "gelu", False, 16), (512, 1288), "sm_80"),
    Covered(KernelClass("mosaic", (128, 64), "f16", "same", "rows", True, 16), (512, 1288), "sm_90"),
    Covered(KernelClass("mosaic", (128, 128), "f16", "same", "output_scale", False, 128), (200, 456), "sm_90"),
    Covered(KernelClass("mosaic", (128, 256), "bf16", "same", "plain", False, 32), (200, 456), "sm_90"),
    Covered(KernelClass("mosaic", (128, 256), "bf16", "same", "low_rank", True, 16), (300, 72), "sm_90"),
)
"""The pairwise cover."""
