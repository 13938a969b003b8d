"""float32 products on the tensor cores of an NVIDIA GPU, as exact as float32.

A tensor core multiplies numbers of 11 significant bits (TF32) and adds the products up in
float32. A float32 number is the sum of two of them but for its last two or three bits, so
three products, large by large and large by small both ways, give what one float32 product
gives (Ootomo and Yokota, "Recovering single precision accuracy from Tensor Cores while
surpassing the FP32 theoretical peak performance", IJHPCA 36 (4), 2022; CUTLASS calls it
3xTF32). A tensor core cuts off what it adds instead of rounding it, so 32 products at most are
added up there, the small ones first, and these sums in float32.

Error against float64 of a linear layer of 768 and 3,072 inputs, rms, in 1e-7 of the result:
1.2 and 1.6, where cuBLAS has 1.3 to 3.6 and 1.5 to 7.0 and OpenBLAS on a CPU 2.5 and 2.7; of
convolutions 1.7 and 1.8, where cuDNN has 5.7 and 7.0. From 249 rows on it takes 0.7 to 0.85 of
the time of MLX's products, and 0.3 to 0.6 of that of convolutions in parts (H200, random numbers).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..backend import mx, nn
from ..errors import is_out_of_memory

#: rows and outputs that one group of threads computes, inputs that it holds at a time: a product
#: of other than a multiple of so many outputs or inputs is left to MLX
BLOCK_ROWS, BLOCK_OUTPUTS, BLOCK_INPUTS = 128, 64, 32
#: blocks of inputs that are held or on the way
STAGES = 3
THREADS = 128
#: numbers behind each row of a block, so that the rows of one load lie in different banks of
#: the shared memory
ROW_GAP, WEIGHT_GAP = 4, 8
SHARED_MEMORY = 4 * STAGES * (BLOCK_ROWS * (BLOCK_INPUTS + ROW_GAP)) + 4 * STAGES * (
    BLOCK_INPUTS * (BLOCK_OUTPUTS + WEIGHT_GAP)
)
#: rows below which a linear layer is left to MLX, which then is as fast: 1 s has 49
FEW_ROWS = 128
#: compute capability from which on tensor cores take TF32 (Ampere)
CAPABILITY = 8
#: largest difference of the trial from float64, in parts of the largest result. cuBLAS at
#: TF32 precision has 3e-4
CLOSE = 1e-6

_HEADER = r"""
// A number as two of 11 significant bits. The large part is rounded; of the small one the
// tensor cores ignore the last bits themselves.
inline __device__ void split(unsigned bits, unsigned& large, unsigned& small) {
  large = (bits + 0x1000u) & 0xffffe000u;
  small = __float_as_uint(__uint_as_float(bits) - __uint_as_float(large));
}

// sum += a b, of 16 rows, 8 inputs and 8 outputs.
inline __device__ void multiply_add(
    float (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The part of 16 rows and 8 inputs that belongs to this thread.
inline __device__ void load_rows(unsigned (&to)[4], const float* from) {
  const unsigned shared = (unsigned)__cvta_generic_to_shared(from);
  asm volatile(
      "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
      : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
      : "r"(shared));
}

// Four numbers on their way to the shared memory.
inline __device__ void copy_four(float* to, const float* from, bool aligned) {
  const unsigned shared = (unsigned)__cvta_generic_to_shared(to);
  if (aligned) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(from));
  } else {
    for (int i = 0; i < 4; i++) {
      asm volatile(
          "cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared + 4 * i), "l"(from + i));
    }
  }
}
"""

_SOURCE = r"""
  // two by two warps of 64 rows and 32 outputs each, in pieces of 16 by 8
  constexpr int WARP_ROWS = BLOCK_ROWS / 2, WARP_OUTPUTS = BLOCK_OUTPUTS / 2;
  constexpr int PIECES_M = WARP_ROWS / 16, PIECES_N = WARP_OUTPUTS / 8;
  constexpr int EIGHTS = BLOCK_INPUTS / 8;
  constexpr int X_ROW = BLOCK_INPUTS + ROW_GAP, W_ROW = BLOCK_OUTPUTS + WEIGHT_GAP;
  constexpr int OF_X = BLOCK_ROWS * X_ROW, OF_W = BLOCK_INPUTS * W_ROW;
  extern __shared__ float4 shared_memory[];
  float* const x_blocks = reinterpret_cast<float*>(shared_memory);
  float* const w_blocks = x_blocks + STAGES * OF_X;

  const int kernel = geometry[0], stride = geometry[1];
  const bool then_gelu = geometry[2];
  const int time = x_shape[1], channels = x_shape[2];
  const int frames = (time - kernel) / stride + 1;
  const int rows = x_shape[0] * frames;
  const int inputs = weight_shape[0], outputs = weight_shape[1];
  const bool with_bias = bias_shape[0] == outputs;
  const bool aligned = (((unsigned long long)x | (unsigned long long)weight) & 15) == 0;
  const int across = outputs / BLOCK_OUTPUTS;
  const int first_row = (blockIdx.x / across) * BLOCK_ROWS;
  const int first_output = (blockIdx.x % across) * BLOCK_OUTPUTS;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int warp_row = (warp / 2) * WARP_ROWS, warp_output = (warp % 2) * WARP_OUTPUTS;

  // this thread copies four numbers of every X_STEP-th row of x and W_STEP-th of the weight
  constexpr int X_ACROSS = BLOCK_INPUTS / 4, W_ACROSS = BLOCK_OUTPUTS / 4;
  constexpr int X_STEP = THREADS / X_ACROSS, W_STEP = THREADS / W_ACROSS;
  constexpr int X_COPIES = BLOCK_ROWS / X_STEP, W_COPIES = BLOCK_INPUTS / W_STEP;
  // rows behind the last one are not stored, but read: the last one again
  auto at = [&](int i) {
    const int row = min(first_row + thread / X_ACROSS + i * X_STEP, rows - 1);
    return ((long long)(row / frames) * time + (row % frames) * stride) * channels;
  };
  const float* const x_from = x + at(0) + (thread % X_ACROSS) * 4;
  int x_offset[X_COPIES];
  for (int i = 0; i < X_COPIES; i++) {
    x_offset[i] = at(i) - at(0);
  }
  const float* const w_from =
      weight + (long long)(thread / W_ACROSS) * outputs + first_output + (thread % W_ACROSS) * 4;
  float* const x_to = x_blocks + (thread / X_ACROSS) * X_ROW + (thread % X_ACROSS) * 4;
  float* const w_to = w_blocks + (thread / W_ACROSS) * W_ROW + (thread % W_ACROSS) * 4;

  const int blocks = inputs / BLOCK_INPUTS;
  auto fetch = [&](int block) {
    if (block < blocks) {
      float* const x_block = x_to + (block % STAGES) * OF_X;
      float* const w_block = w_to + (block % STAGES) * OF_W;
      for (int i = 0; i < X_COPIES; i++) {
        const float* const from = x_from + x_offset[i] + block * BLOCK_INPUTS;
        copy_four(x_block + i * X_STEP * X_ROW, from, aligned);
      }
      for (int i = 0; i < W_COPIES; i++) {
        const long long input = block * BLOCK_INPUTS + i * W_STEP;
        copy_four(w_block + i * W_STEP * W_ROW, w_from + input * outputs, aligned);
      }
    }
    asm volatile("cp.async.commit_group;");
  };

  float sums[PIECES_M][PIECES_N][4] = {};
  for (int block = 0; block < STAGES - 1; block++) {
    fetch(block);
  }
  for (int block = 0; block < blocks; block++) {
    asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2));
    __syncthreads();
    fetch(block + STAGES - 1);
    const float* const x_block =
        x_blocks + (block % STAGES) * OF_X + (warp_row + lane % 16) * X_ROW + (lane / 16) * 4;
    const float* const w_block =
        w_blocks + (block % STAGES) * OF_W + (lane % 4) * W_ROW + warp_output + lane / 4;
    unsigned w_large[EIGHTS][PIECES_N][2], w_small[EIGHTS][PIECES_N][2];
#pragma unroll
    for (int k = 0; k < EIGHTS; k++) {
#pragma unroll
      for (int n = 0; n < PIECES_N; n++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const unsigned bits = __float_as_uint(w_block[(k * 8 + i * 4) * W_ROW + n * 8]);
          split(bits, w_large[k][n][i], w_small[k][n][i]);
        }
      }
    }
#pragma unroll
    for (int m = 0; m < PIECES_M; m++) {
      unsigned x_large[EIGHTS][4], x_small[EIGHTS][4];
#pragma unroll
      for (int k = 0; k < EIGHTS; k++) {
        unsigned bits[4];
        load_rows(bits, x_block + m * 16 * X_ROW + k * 8);
#pragma unroll
        for (int i = 0; i < 4; i++) {
          split(bits[i], x_large[k][i], x_small[k][i]);
        }
      }
      float short_sums[PIECES_N][4] = {};
#pragma unroll
      for (int k = 0; k < EIGHTS; k++) {
#pragma unroll
        for (int n = 0; n < PIECES_N; n++) {
          multiply_add(short_sums[n], x_small[k], w_large[k][n]);
        }
#pragma unroll
        for (int n = 0; n < PIECES_N; n++) {
          multiply_add(short_sums[n], x_large[k], w_small[k][n]);
        }
      }
#pragma unroll
      for (int k = 0; k < EIGHTS; k++) {
#pragma unroll
        for (int n = 0; n < PIECES_N; n++) {
          multiply_add(short_sums[n], x_large[k], w_large[k][n]);
        }
      }
#pragma unroll
      for (int n = 0; n < PIECES_N; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
          sums[m][n][i] += short_sums[n][i];
        }
      }
    }
  }

#pragma unroll
  for (int m = 0; m < PIECES_M; m++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = first_row + warp_row + m * 16 + half * 8 + lane / 4;
      if (row < rows) {
#pragma unroll
        for (int n = 0; n < PIECES_N; n++) {
          const int output = first_output + warp_output + n * 8 + (lane % 4) * 2;
          float2 pair = make_float2(sums[m][n][half * 2], sums[m][n][half * 2 + 1]);
          if (with_bias) {
            pair.x += bias[output];
            pair.y += bias[output + 1];
          }
          if (then_gelu) {
            pair.x = pair.x * (1 + erff(pair.x * 0.7071067811865476f)) * 0.5f;
            pair.y = pair.y * (1 + erff(pair.y * 0.7071067811865476f)) * 0.5f;
          }
          *reinterpret_cast<float2*>(y + (long long)row * outputs + output) = pair;
        }
      }
    }
  }
"""


def _kernel() -> Callable[..., list[mx.array]]:
    """The kernel; RuntimeError in MLX without CUDA, AttributeError in one that knows none."""
    kernel: Callable[..., list[mx.array]] = mx.fast.cuda_kernel(
        name="contentvec_product",
        input_names=["x", "weight", "bias", "geometry"],
        output_names=["y"],
        header=_HEADER,
        source=_SOURCE,
        shared_memory=SHARED_MEMORY,
    )
    return kernel


def is_block_product(inputs: int, outputs: int, channels: int) -> bool:
    """Whether a product of so many inputs and outputs is one of whole blocks.

    channels: numbers of one frame of what is multiplied, a window beginning with any of them
    """
    return inputs % BLOCK_INPUTS == 0 and outputs % BLOCK_OUTPUTS == 0 and channels % 4 == 0


def are_here() -> bool:
    """Whether this GPU has tensor cores that take TF32, as far as MLX tells (since 0.30.5)."""
    try:
        return int(mx.device_info()["compute_capability_major"]) >= CAPABILITY
    except (AttributeError, KeyError):
        return False


@functools.cache
def works() -> bool:
    """Whether this GPU has such tensor cores, and MLX can compile for them here.

    The answer is that of a trial, which takes the second or more of compiling that the first
    product would take. Where there is no memory for it, that is raised, and the next call tries
    again.
    """
    if not are_here():
        return False
    try:
        # rows for both warps, the clips meeting within a block; more blocks than stages
        rng = np.random.default_rng(0)
        x = rng.standard_normal((2, 210, 32)).astype(np.float32)
        weight = rng.standard_normal((160, BLOCK_OUTPUTS)).astype(np.float32)
        bias = rng.standard_normal(BLOCK_OUTPUTS).astype(np.float32)
        given = [mx.array(part) for part in (x, weight, bias)]
        y = np.array(product(given[0], given[1], given[2], 5, 3, then_gelu=False))
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        # MLX without such kernels, or without CUDA; no compiler or no headers of CUDA
        if is_out_of_memory(error):
            raise
        return False
    windows = [x[:, 3 * i : 3 * i + 5].reshape(2, 160) for i in range(69)]
    true = np.stack(windows, axis=1).astype(np.float64) @ weight + bias
    return bool(np.abs(y - true).max() <= CLOSE * np.abs(true).max())


def product(
    x: mx.array,
    weight: mx.array,
    bias: mx.array | None,
    kernel: int,
    stride: int,
    then_gelu: bool,
) -> mx.array:
    """Windows of a sequence times a matrix, plus a bias, and the exact GELU if asked.

    x:       (batch, time, channels), float32
    weight:  (kernel * channels, out), float32, of whole blocks (``is_block_product``)
    bias:    (out,) or None
    returns: (batch, (time - kernel) // stride + 1, out)

    An infinite number gives NaN. The gradient is that of MLX's own operations; there is no
    ``jvp`` and no ``vmap``.
    """
    function, no_bias = _prepared(kernel, stride, then_gelu)
    return function(x, weight, no_bias if bias is None else bias)


@functools.cache
def _prepared(kernel: int, stride: int, then_gelu: bool) -> tuple[Any, mx.array]:
    """The function that ``product`` calls for one kind of window, and its bias for None."""
    run = _kernel()
    geometry, no_bias = mx.array([kernel, stride, then_gelu], dtype=mx.int32), mx.zeros((1,))
    mx.eval(geometry, no_bias)
    template = [
        ("BLOCK_ROWS", BLOCK_ROWS),
        ("BLOCK_OUTPUTS", BLOCK_OUTPUTS),
        ("BLOCK_INPUTS", BLOCK_INPUTS),
        ("STAGES", STAGES),
        ("THREADS", THREADS),
        ("ROW_GAP", ROW_GAP),
        ("WEIGHT_GAP", WEIGHT_GAP),
    ]

    def on_tensor_cores(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
        batch, time, _ = x.shape
        frames, outputs = (time - kernel) // stride + 1, weight.shape[1]
        groups = outputs // BLOCK_OUTPUTS * math.ceil(batch * frames / BLOCK_ROWS)
        return run(
            inputs=[x, weight, bias, geometry],
            template=template,
            grid=(groups * THREADS, 1, 1),
            threadgroup=(THREADS, 1, 1),
            output_shapes=[(batch, frames, outputs)],
            output_dtypes=[mx.float32],
        )[0]

    def plain(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
        if kernel == 1:
            y = x[:, ::stride] @ weight + bias
        else:
            by_output = weight.reshape(kernel, x.shape[-1], -1).transpose(2, 0, 1)
            y = mx.conv1d(x, by_output, stride) + bias
        return nn.gelu(y) if then_gelu else y

    def vjp(primals: Sequence[mx.array], cotangent: mx.array, _: mx.array) -> tuple[mx.array, ...]:
        return tuple(mx.vjp(plain, list(primals), [cotangent])[1])

    function = mx.custom_function(on_tensor_cores)
    function.vjp(vjp)
    return function, no_bias
