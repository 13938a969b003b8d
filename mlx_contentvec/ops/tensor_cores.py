"""What the tensor cores of an NVIDIA GPU compute by a kernel of our own.

In float32 that is products and attention, as exact as float32. A tensor core multiplies numbers
of 11 significant bits (TF32) and adds the products up in float32. A float32 number is the sum
of two of them but for its last two or three bits, so three products, large by large and large
by small both ways, give what one float32 product gives (Ootomo and Yokota, "Recovering single
precision accuracy from Tensor Cores while surpassing the FP32 theoretical peak performance",
IJHPCA 36 (4), 2022; CUTLASS calls it 3xTF32). A tensor core cuts off what it adds instead of
rounding it, so 32 products at most are added up there, the small ones first, and these sums in
float32, a long one in parts.

Attention is one kernel, whose scores never leave a group of threads (Dao et al.,
"FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness", arXiv:2205.14135;
its softmax is that of Milakov and Gimelshein, "Online normalizer calculation for softmax",
arXiv:1805.02867). In half precision it is all that is computed here: MLX's own attention makes
a plan for every length, and its products are as fast as they get. What all of it is worth is in
docs/measurements.md.
"""

from __future__ import annotations

import functools
import importlib.resources
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..backend import mx, nn
from ..errors import is_out_of_memory

#: threads of a group
THREADS = 128
#: rows and outputs that one group computes of a product, inputs that it holds at a time: a
#: product of other than a multiple of so many outputs or inputs is left to MLX
BLOCK_ROWS, BLOCK_OUTPUTS, BLOCK_INPUTS = 128, 64, 32
#: blocks of inputs that are held or on the way
STAGES = 3
#: bytes behind each row of a block, and of a weight's, so that the rows of one load lie in
#: different banks of the shared memory
GAP, WEIGHT_GAP = 16, 32
#: inputs of a product above which they are added up in parts. The largest error, in 1e-7 of
#: the rms, is 11 to 13 with parts of at most so many, and in one 14 to 17 of 1,024 inputs, 20
#: to 22 of 1,536 and 25 to 27 of 3,072, in 4 to 8 % less time from 6,000 rows on (H200)
LONGEST_PART = 768
#: the fewest inputs of a part where more of them keep more of a GPU busy
FEWEST_INPUTS = 256
#: groups that an H100 or H200 has in work at once
GROUPS_AT_ONCE = 264
#: times four numbers that a thread adds up of each part
COPIES = 4
#: rows below which a linear layer is left to MLX, which then is as fast: 1 s has 49
FEW_ROWS = 128
#: width of the heads that attention is for: that of every HuBERT published but the largest
HEAD_WIDTH = 64
#: queries of a head, 16 for each warp, and keys that a group has in work
QUERIES, KEYS = 64, 64
#: compute capability from which on tensor cores take TF32 and bfloat16 (Ampere)
CAPABILITY = 8
#: largest difference of a trial from float64, in parts of the largest result. cuBLAS at
#: TF32 precision has 3e-4; half precision rounds results, and the weights before, to 11 or 8 bits
CLOSE = {mx.float32: 1e-6, mx.float16: 1e-3, mx.bfloat16: 8e-3}

#: what the kernel is to do, the first number of its geometry
_MULTIPLY, _ADD_UP, _ATTEND = range(3)

#: one kernel for all of a type: three take MLX two seconds more to compile, in every process
_SOURCE = "run(x, x_shape, weight, weight_shape, bias, residual, geometry, y);"


def _kernel(dtype: mx.Dtype) -> Callable[..., list[mx.array]]:
    """The kernel for a type of CLOSE.

    RuntimeError in MLX without CUDA, AttributeError in one that knows no such kernels.
    """
    row_gap = GAP // dtype.size
    # two blocks of keys and two of values
    shared_memory = 4 * KEYS * (HEAD_WIDTH + row_gap) * dtype.size
    constants = {
        "THREADS": THREADS,
        "ROW_GAP": row_gap,
        "HEAD_WIDTH": HEAD_WIDTH,
        "QUERIES": QUERIES,
        "KEYS": KEYS,
    }
    if dtype == mx.float32:
        constants |= {
            "BLOCK_ROWS": BLOCK_ROWS,
            "BLOCK_OUTPUTS": BLOCK_OUTPUTS,
            "BLOCK_INPUTS": BLOCK_INPUTS,
            "STAGES": STAGES,
            "WEIGHT_GAP": WEIGHT_GAP // dtype.size,
            "COPIES": COPIES,
            "MULTIPLY": _MULTIPLY,
            "ADD_UP": _ADD_UP,
        }
        # STAGES blocks of both operands. Two groups fill all that an A100 has
        rows = BLOCK_ROWS * (4 * BLOCK_INPUTS + GAP)
        columns = BLOCK_INPUTS * (4 * BLOCK_OUTPUTS + WEIGHT_GAP)
        shared_memory = max(shared_memory, STAGES * (rows + columns))
    named = [f"constexpr int {name} = {value};" for name, value in constants.items()]
    own = "tensor_cores_single.cuh" if dtype == mx.float32 else "tensor_cores_half.cuh"
    folder = importlib.resources.files(__package__)
    text = "".join(folder.joinpath(file).read_text("utf-8") for file in ("tensor_cores.cuh", own))
    # MLX goes through all of it at each call: without comments and indents that is half
    lines = [line.partition("//")[0].strip() for line in text.splitlines()]
    kernel: Callable[..., list[mx.array]] = mx.fast.cuda_kernel(
        # MLX before 0.32.1 goes by the name alone: a kernel of the same one is the first of them
        name="contentvec_" + str(dtype).rpartition(".")[2],
        input_names=["x", "weight", "bias", "residual", "geometry"],
        output_names=["y"],
        header="\n".join([*named, *filter(None, lines), ""]),
        source=_SOURCE,
        shared_memory=shared_memory,
    )
    return kernel


def are_here() -> bool:
    """Whether this GPU has tensor cores that take TF32, as far as MLX tells (since 0.30.5)."""
    try:
        return int(mx.device_info()["compute_capability_major"]) >= CAPABILITY
    except (AttributeError, KeyError):
        return False


@functools.cache
def works(dtype: mx.Dtype) -> bool:
    """Whether this GPU has such tensor cores, and MLX can compile for them here.

    The answer is that of trials, which take the time of compiling that the first use would
    take. Where there is no memory for them, that is raised, and the next call tries again.
    """
    if dtype not in CLOSE or not are_here():
        return False
    try:
        return (dtype != mx.float32 or _multiplies()) and _attends(dtype)
    except (AttributeError, OSError, RuntimeError, TypeError, ValueError) as error:
        # MLX without such kernels, or without CUDA; no compiler, no headers of CUDA, or an
        # application that was packed without the .cuh files
        if is_out_of_memory(error):
            raise
        return False


def _is_close(y: mx.array, true: npt.NDArray[np.float64]) -> bool:
    error = np.abs(np.array(y.astype(mx.float32)) - true).max()
    return bool(error <= CLOSE[y.dtype] * np.abs(true).max())


def _multiplies() -> bool:
    # rows for both warps, the clips meeting within a block; more blocks of inputs than stages
    # in each part
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 210, 160)).astype(np.float32)
    weight = rng.standard_normal((800, BLOCK_OUTPUTS)).astype(np.float32)
    bias = rng.standard_normal(BLOCK_OUTPUTS).astype(np.float32)
    windows = [x[:, 3 * i : 3 * i + 5].reshape(2, 800) for i in range(69)]
    true = np.stack(windows, axis=1).astype(np.float64) @ weight + bias
    return _is_close(product(mx.array(x), mx.array(weight), mx.array(bias), 5, 3), true)


def _attends(dtype: mx.Dtype) -> bool:
    # more keys than a block, rows for all warps; the second clip is a frame shorter
    rng = np.random.default_rng(0)
    qkv = mx.array(rng.standard_normal((2, 70, 3 * 2 * HEAD_WIDTH)).astype(np.float32))
    qkv = qkv.astype(dtype)
    kept = np.ones((2, 70), bool)
    kept[1, 69] = False
    by_head = np.array(qkv.astype(mx.float32)).astype(np.float64).reshape(2, 70, 3, 2, HEAD_WIDTH)
    queries, keys, values = by_head.transpose(2, 0, 3, 1, 4)
    weights = np.exp(queries @ keys.swapaxes(-1, -2) / math.sqrt(HEAD_WIDTH))
    weights *= kept[:, None, None]
    mixed = weights / weights.sum(axis=-1, keepdims=True) @ values
    true = mixed.transpose(0, 2, 1, 3).reshape(2, 70, -1)
    return _is_close(attention(qkv, mx.array(kept)), true)


@functools.cache
def _nothing(dtype: mx.Dtype) -> mx.array:
    """What stands for an array that is not read: another type would be another kernel."""
    nothing = mx.zeros((1,), dtype)
    mx.eval(nothing)
    return nothing


@functools.cache
def _geometry(
    what: int,
    parts: int = 1,
    kernel: int = 1,
    stride: int = 1,
    with_bias: bool = False,
    then_gelu: bool = False,
    with_residual: bool = False,
) -> mx.array:
    """What the kernel reads beside its operands (``_SOURCE``)."""
    numbers = [what, parts, kernel, stride, with_bias, then_gelu, with_residual]
    geometry = mx.array(numbers, dtype=mx.int32)
    mx.eval(geometry)
    return geometry


def is_block_product(inputs: int, outputs: int, channels: int) -> bool:
    """Whether a product of so many inputs and outputs is one of whole blocks.

    channels: numbers of one frame of what is multiplied, a window beginning with any of them
    """
    return inputs % BLOCK_INPUTS == 0 and outputs % BLOCK_OUTPUTS == 0 and channels % 4 == 0


def _groups(rows: int, outputs: int) -> int:
    return outputs // BLOCK_OUTPUTS * math.ceil(rows / BLOCK_ROWS)


def parts_of(rows: int, inputs: int, outputs: int) -> int:
    """In how many parts the inputs of a product are added up, each by groups of its own.

    A long sum loses less in parts; and few rows are few groups, which leave most of a GPU
    idle.
    """
    least = math.ceil(inputs / LONGEST_PART)
    if least == 1:
        return 1
    return max(least, min(GROUPS_AT_ONCE // _groups(rows, outputs), inputs // FEWEST_INPUTS))


def product(
    x: mx.array,
    weight: mx.array,
    bias: mx.array | None,
    kernel: int = 1,
    stride: int = 1,
    *,
    then_gelu: bool = False,
    residual: mx.array | None = None,
) -> mx.array:
    """Windows of a sequence times a matrix, plus a bias, and the exact GELU if asked.

    x:        (batch, time, channels), float32
    weight:   (kernel * channels, out), float32, of whole blocks (``is_block_product``)
    bias:     (out,) or None
    residual: what is added at last, of the result's shape, or None
    returns:  (batch, (time - kernel) // stride + 1, out)

    An infinite number gives NaN. The gradient is that of MLX's own operations; there is no
    ``jvp`` and no ``vmap``.
    """
    multiply = _product(kernel, stride, bias is not None, then_gelu, residual is not None)
    nothing = _nothing(mx.float32)
    return multiply(
        x,
        weight,
        nothing if bias is None else bias,
        nothing if residual is None else residual,
    )


@functools.cache
def _product(
    kernel: int, stride: int, with_bias: bool, then_gelu: bool, with_residual: bool
) -> Callable[..., mx.array]:
    """The function that ``product`` calls for one kind of product."""
    run, nothing = _kernel(mx.float32), _nothing(mx.float32)

    def on_tensor_cores(
        x: mx.array, weight: mx.array, bias: mx.array, residual: mx.array
    ) -> mx.array:
        batch, time, _ = x.shape
        inputs, outputs = weight.shape
        frames = (time - kernel) // stride + 1
        parts = parts_of(batch * frames, inputs, outputs)
        shape = (batch, frames, outputs)
        form = (parts, kernel, stride, with_bias, then_gelu, with_residual)
        y = run(
            inputs=[x, weight, bias, residual, _geometry(_MULTIPLY, *form)],
            grid=(_groups(batch * frames, outputs) * parts * THREADS, 1, 1),
            threadgroup=(THREADS, 1, 1),
            output_shapes=[shape if parts == 1 else (parts, *shape)],
            output_dtypes=[mx.float32],
        )[0]
        if parts == 1:
            return y
        return run(
            inputs=[y, nothing, bias, residual, _geometry(_ADD_UP, *form)],
            grid=(math.ceil(batch * frames * outputs / (4 * COPIES * THREADS)) * THREADS, 1, 1),
            threadgroup=(THREADS, 1, 1),
            output_shapes=[shape],
            output_dtypes=[mx.float32],
        )[0]

    def plain(x: mx.array, weight: mx.array, bias: mx.array, residual: mx.array) -> mx.array:
        if kernel == 1:
            y = x[:, ::stride] @ weight + bias
        else:
            by_output = weight.reshape(kernel, x.shape[-1], -1).transpose(2, 0, 1)
            y = mx.conv1d(x, by_output, stride) + bias
        return (nn.gelu(y) if then_gelu else y) + residual

    return _with_gradient_of(plain, on_tensor_cores)


def attention(qkv: mx.array, mask: mx.array | None) -> mx.array:
    """Scaled dot-product attention of heads of HEAD_WIDTH.

    qkv:     (batch, frames, 3 * width), of a type in CLOSE: queries, keys and values beside
             each other, and in each the heads
    mask:    (batch, frames), true where a key may be attended to, or None
    returns: (batch, frames, width)

    The gradient is that of MLX's own operations; there is no ``jvp`` and no ``vmap``.
    """
    attend = _attention(qkv.dtype, mask is not None)
    # a kernel of other types than the product's would be compiled for itself
    return attend(qkv, _nothing(qkv.dtype) if mask is None else mask.astype(qkv.dtype))


@functools.cache
def _attention(dtype: mx.Dtype, with_mask: bool) -> Callable[..., mx.array]:
    """The function that ``attention`` calls with a mask, or without."""
    run, nothing = _kernel(dtype), _nothing(dtype)

    def on_tensor_cores(qkv: mx.array, mask: mx.array) -> mx.array:
        batch, frames, row = qkv.shape
        heads = row // 3 // HEAD_WIDTH
        return run(
            inputs=[qkv, nothing, mask, nothing, _geometry(_ATTEND, with_bias=with_mask)],
            grid=(batch * heads * math.ceil(frames / QUERIES) * THREADS, 1, 1),
            threadgroup=(THREADS, 1, 1),
            output_shapes=[(batch, frames, row // 3)],
            output_dtypes=[dtype],
        )[0]

    def plain(qkv: mx.array, mask: mx.array) -> mx.array:
        batch, frames, row = qkv.shape
        by_head = qkv.reshape(batch, frames, 3, -1, HEAD_WIDTH).transpose(2, 0, 3, 1, 4)
        kept = mask[:, None, None] != 0 if with_mask else None
        y = mx.fast.scaled_dot_product_attention(*by_head, scale=HEAD_WIDTH**-0.5, mask=kept)
        return y.transpose(0, 2, 1, 3).reshape(batch, frames, row // 3)

    return _with_gradient_of(plain, on_tensor_cores)


def _with_gradient_of(
    plain: Callable[..., mx.array], function: Callable[..., mx.array]
) -> Callable[..., mx.array]:
    """``function`` with the gradient of ``plain``, which computes the same."""

    def vjp(primals: Sequence[mx.array], cotangent: mx.array, _: mx.array) -> tuple[mx.array, ...]:
        return tuple(mx.vjp(plain, list(primals), [cotangent])[1])

    differentiable: Any = mx.custom_function(function)
    differentiable.vjp(vjp)
    return differentiable  # type: ignore[no-any-return]
