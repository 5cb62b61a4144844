"""The cost model of a GPU, with instructions counted in code that Triton compiles, on any machine."""

from dataclasses import replace

import torch

from stoicc.codegen.gluon.compile import compile_for
from stoicc.codegen.gluon.launch import GluonConfig, loops_of, unsupported
from stoicc.codegen.triton.compile_check import check_class
from stoicc.codegen.triton.emit import prologue_arguments
from stoicc.codegen.triton.launch import LaunchConfig
from stoicc.ir.dtypes import TORCH_DTYPES
from stoicc.ir.errors import InputError, StoiccError
from stoicc.ir.types import Module
from stoicc.passes.cost_gpu import GPUS, Gpu, GpuCostModel, KernelCode

DEFAULT = "H200"


def gpu_cost_model(device: str | None = None) -> GpuCostModel:
    """The model of a named GPU, of the one that is there, or else of an H200.

    Raises:
        InputError: no constants are known for the device.
    """
    return GpuCostModel(find_gpu(device or _present()), CompiledCode(device or _present()))


def find_gpu(name: str) -> Gpu:
    """The constants of a GPU by its name (`NVIDIA H100 80GB HBM3`) or a part of it that is known (`H100`)."""
    for known, gpu in GPUS.items():
        if known in name.upper().replace("-", " ").split():
            return gpu
    raise InputError(
        f"cost model: expected a GPU of {', '.join(GPUS)}, found {name!r}; name the one that is most like it"
    )


def _present() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else DEFAULT


class CompiledCode:
    """Compiles the kernel of a module's class for a GPU and reads its machine code; each class once."""

    def __init__(self, device: str) -> None:
        self._architecture = find_gpu(device).architecture
        self._known: dict[tuple[object, ...], KernelCode | None] = {}

    def __call__(self, module: Module, batch: int, x_dtype: str) -> KernelCode | None:
        """See `stoicc.passes.cost_gpu.Code`; None where Triton has no code for the class."""
        schedule, program = module.schedule, module.tiles
        assert schedule is not None
        dtype = TORCH_DTYPES[x_dtype]
        config = self._config(module, batch, dtype)
        formats = tuple(program.segments[csr.segment].format for csr in schedule.csrs)
        aligned = tuple(extent % 16 == 0 for extent in program.shape)
        fused, split = (schedule.prologue, schedule.epilogue), schedule.max_parts > 1
        beside = program.beside.low_rank is None, prologue_arguments(program.beside)
        key = (formats, program.tile, program.dtype, x_dtype, config, aligned, fused, split, beside)
        if key not in self._known:
            self._known[key] = self._compiled(module, x_dtype, config)
        return self._known[key]

    def _config(self, module: Module, batch: int, x_dtype: torch.dtype) -> LaunchConfig | GluonConfig:
        """Launch constants of the dialect that a GPU of this architecture would run."""
        assert module.schedule is not None
        launch, capability = dict(module.schedule.launch), int(self._architecture.removeprefix("sm_"))
        if launch.get("gluon") == 0 or unsupported(module, x_dtype, capability) is not None:
            return LaunchConfig.choose(batch, x_dtype, module.tiles.tile, launch)
        return GluonConfig.choose(batch, module, loops_of(module), capability, launch)

    def _compiled(self, module: Module, x_dtype: str, config: LaunchConfig | GluonConfig) -> KernelCode | None:
        dtype = TORCH_DTYPES[x_dtype]
        try:
            if isinstance(config, GluonConfig):
                machine = compile_for(module, dtype, 0, self._architecture, config).kernels[0].machine()
            else:
                machine = check_class(module, self._architecture, dtype, config)[0]
        except StoiccError:
            return None
        assert module.schedule is not None
        stored = [bool(self._planes(module, csr.segment)) for csr in module.schedule.csrs]
        if len(machine.loops) < sum(stored):
            return None  # loops are not told apart on this architecture
        # one loop per format that stores something, in the order of the csrs; those of the epilogue come after
        loops = iter(machine.warp_instructions)
        per_tile = tuple(float(next(loops)) if stores else 0.0 for stores in stored)
        inside = sum(loop.instructions for loop in machine.loops)
        code = KernelCode(machine.registers, machine.shared, machine.warps, config.block_n, per_tile)
        fixed = float(max(0, machine.instructions - inside) * machine.warps)
        if not isinstance(config, GluonConfig):
            return replace(code, fixed_instructions=fixed)
        before = 0 if config.prologue else len(prologue_arguments(module.tiles.beside))
        return replace(code, fixed_instructions=fixed, wgmma=config.wgmma, launches_before=before)

    @staticmethod
    def _planes(module: Module, segment: int) -> tuple[object, ...]:
        return module.tiles.segments[segment].resolve().planes(module.tiles.tile, module.tiles.dtype)
