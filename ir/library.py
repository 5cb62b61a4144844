"""Whether a whole matrix is what a vendor's library multiplies: cuBLAS a dense one, cuSPARSELt a 2:4 one."""

from stoicc.ir.types import TileProgram

SPARSE_STEP = (32, 64)
"""Rows and columns that a 2:4 matrix has a multiple of, for `torch.sparse.to_sparse_semi_structured`."""


def library_matrix(program: TileProgram) -> str | None:
    """ "dense" or "2:4", or None where `why_no_library` has a reason.

    Formats are asked what their tiles are to tensor cores (`TileFormat.fragment`): 16-bit values as they are.
    """
    return None if why_no_library(program) else "2:4" if _sparse(program) == {True} else "dense"


def library_copy(program: TileProgram) -> str | None:
    """What a library may keep of a matrix, whatever its tiles are: "2:4" where all are, else "dense", decoded.

    None where it would not be the matrix's own dtype of 16 bits, or has nothing to multiply.
    """
    if program.dtype not in ("f16", "bf16") or not any(s.pools for s in program.segments if s.count):
        return None
    return library_matrix(program) or "dense"


def why_no_library(program: TileProgram) -> str | None:
    """Why no library multiplies a matrix as it is, in one clause; None where one does."""
    if program.dtype not in ("f16", "bf16"):
        return f"weights are {program.dtype}, not f16 or bf16"
    for segment in program.segments:
        fmt = segment.resolve()
        if not fmt.planes(program.tile, program.dtype):
            continue
        fragment = fmt.fragment(program.tile, program.dtype)
        if fragment is None or fragment.decode is not None:
            return f"tiles of {fmt} are neither dense nor 2:4"
    kinds = _sparse(program)
    if not kinds:
        return "every tile is empty"
    if len(kinds) == 2:
        return "some tiles are dense and some 2:4"
    if kinds == {True} and any(extent % step for extent, step in zip(program.shape, SPARSE_STEP, strict=True)):
        shape, step = (f"{rows} x {columns}" for rows, columns in (program.shape, SPARSE_STEP))
        return f"{shape} is no multiple of {step}"
    if kinds == {False} and any(not segment.pools for segment in program.segments if segment.count):
        return "some tiles are empty, which a dense matrix would store"
    return None


def _sparse(program: TileProgram) -> set[bool]:
    """Whether tiles are 2:4, of every kind that stores something."""
    fragments = (segment.resolve().fragment(program.tile, program.dtype) for segment in program.segments)
    return {fragment.sparse for fragment in fragments if fragment is not None}
