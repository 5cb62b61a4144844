"""Content hashes of tensors, by which the IR names them."""

import hashlib

import torch
from torch import Tensor

from stoicc.ir.dtypes import DTYPE_NAMES


def digest(tensor: Tensor) -> str:
    """16 hex digits (blake2b, 8 bytes) over a tensor's dtype, shape and raw bytes.

    Bit patterns count: -0.0 and 0.0 differ, equal NaNs agree. A contiguous CPU tensor is read in place.
    """
    state = hashlib.blake2b(digest_size=8)
    state.update(f"{DTYPE_NAMES[tensor.dtype]}{list(tensor.shape)}".encode())
    if tensor.numel():
        flat = tensor.detach().cpu().contiguous()
        flat = flat.as_strided((flat.numel(),), (1,))  # one element may keep any stride, which `view` refuses
        state.update(flat.view(torch.uint8).numpy().data)
    return state.hexdigest()
