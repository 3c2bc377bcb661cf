"""A CPU whose kernels are chosen by shape and address, as those of real ones are, to the extreme.

Which kernel computes a product or a convolution depends on the CPU, on shapes, on the number of threads, and on where the
operands lie: weights mapped from a file start anywhere. Two kernels sum in two orders, so the same numbers come out with
other last bits. What a test asks to be equal to the last bit must therefore come from the same shapes at the same
addresses, modulo a vector register: two runs of one network, a run and its resumption; not one network and its copy from
a file, or one image alone and in a batch. Only what runs eagerly is rounded: compiling takes no such mode.
"""

import zlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode


aten = torch.ops.aten
SUMS = {
    aten.addmm.default,
    aten.baddbmm.default,
    aten.bmm.default,
    aten.mm.default,
    aten.convolution.default,
    aten.convolution_backward.default,
    aten.native_group_norm.default,
    aten.native_group_norm_backward.default,
    aten.native_layer_norm.default,
    aten.native_layer_norm_backward.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
}
REGISTER_BYTES = 64
# Not the types of 16 bits, whose sums are taken in float32: rounding hides nearly all of what another order changes.
ROUNDED = (torch.float32, torch.float64)


class OtherKernels(TorchDispatchMode):
    """Moves what a kernel of `SUMS` gives by a unit of rounding or not, the same for the same kind of call."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func not in SUMS:
            return result
        results = result if isinstance(result, tuple | list) else [result]
        tensors = [value for value in (*args, *results) if isinstance(value, torch.Tensor)]
        if all(type(value) in (torch.Tensor, torch.nn.Parameter) and value.is_cpu for value in tensors):
            kinds = [(tuple(value.shape), value.data_ptr() % REGISTER_BYTES) for value in tensors]
            units = zlib.crc32(repr((func, torch.get_num_threads(), kinds)).encode()) % 3 - 1
            for value in results:
                if isinstance(value, torch.Tensor) and value.dtype in ROUNDED:
                    value.mul_(1 + units * torch.finfo(value.dtype).eps)
        return result
