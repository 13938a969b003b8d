// float32 on the tensor cores of an NVIDIA GPU, behind `tensor_cores.cuh`.

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

// What becomes of a sum.
struct Finish {
  const float* bias;
  bool then_gelu;
  const float* residual;

  inline __device__ float operator()(float sum, int output, long long at) const {
    if (bias) {
      sum += bias[output];
    }
    if (then_gelu) {
      sum = sum * (1 + erff(sum * 0.7071067811865476f)) * 0.5f;
    }
    return residual ? residual[at] + sum : sum;
  }
};

// Windows of a sequence times a matrix.
//
// x:      (batch, time, channels)
// weight: (inputs, outputs), inputs being kernel * channels
// y:      (parts, batch, frames, outputs), a sum for each part of the inputs; finished if it
//         is one
__noinline__ __device__ void multiply(
    const float* x,
    int batch,
    int time,
    int channels,
    const float* weight,
    int inputs,
    int outputs,
    int kernel,
    int stride,
    int parts,
    const Finish& finish,
    float* y,
    float4* shared_memory) {
  // two by two warps of 64 rows and 32 outputs each, in pieces of 16 by 8
  constexpr int WARP_ROWS = BLOCK_ROWS / 2, WARP_OUTPUTS = BLOCK_OUTPUTS / 2;
  constexpr int PIECES_M = WARP_ROWS / 16, PIECES_N = WARP_OUTPUTS / 8;
  constexpr int EIGHTS = BLOCK_INPUTS / 8;
  constexpr int X_ROW = BLOCK_INPUTS + ROW_GAP, W_ROW = BLOCK_OUTPUTS + WEIGHT_GAP;
  constexpr int OF_X = BLOCK_ROWS * X_ROW, OF_W = BLOCK_INPUTS * W_ROW;
  float* const x_blocks = reinterpret_cast<float*>(shared_memory);
  float* const w_blocks = x_blocks + STAGES * OF_X;

  const int frames = (time - kernel) / stride + 1;
  const int rows = batch * frames;
  const bool aligned = (((unsigned long long)x | (unsigned long long)weight) & 15) == 0;
  const int across = outputs / BLOCK_OUTPUTS;
  const int part = blockIdx.x / across % parts;
  const int first_row = (blockIdx.x / across / parts) * BLOCK_ROWS;
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

  // this group's part of the inputs
  const int begin = inputs / BLOCK_INPUTS * part / parts;
  const int blocks = inputs / BLOCK_INPUTS * (part + 1) / parts;
  auto fetch = [&](int block) {
    if (block < blocks) {
      float* const x_block = x_to + (block % STAGES) * OF_X;
      float* const w_block = w_to + (block % STAGES) * OF_W;
      for (int i = 0; i < X_COPIES; i++) {
        const float* const from = x_from + x_offset[i] + block * BLOCK_INPUTS;
        copy(x_block + i * X_STEP * X_ROW, from, aligned);
      }
      for (int i = 0; i < W_COPIES; i++) {
        const long long input = block * BLOCK_INPUTS + i * W_STEP;
        copy(w_block + i * W_STEP * W_ROW, w_from + input * outputs, aligned);
      }
    }
    asm volatile("cp.async.commit_group;");
  };

  float sums[PIECES_M][PIECES_N][4] = {};
  for (int block = begin; block < begin + STAGES - 1; block++) {
    fetch(block);
  }
  for (int block = begin; block < blocks; block++) {
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
          const long long at = (long long)row * outputs + output;
          float2 pair = make_float2(sums[m][n][half * 2], sums[m][n][half * 2 + 1]);
          if (parts == 1) {
            pair.x = finish(pair.x, output, at);
            pair.y = finish(pair.y, output + 1, at + 1);
          }
          *reinterpret_cast<float2*>(y + (long long)part * rows * outputs + at) = pair;
        }
      }
    }
  }
}

// The sum of some parts, finished: COPIES times four numbers for each thread, as only few
// threads of a kernel that needs so many registers are at work.
//
// sums: (parts, size)
// y:    (size,), rows of so many outputs
__noinline__ __device__ void add_up(
    const float* sums, int parts, long long size, int outputs, const Finish& finish, float* y) {
  const long long first = ((long long)blockIdx.x * COPIES * THREADS + threadIdx.x) * 4;
  float4 sum[COPIES] = {};
  for (int part = 0; part < parts; part++) {
#pragma unroll
    for (int i = 0; i < COPIES; i++) {
      const long long at = first + i * THREADS * 4;
      if (at < size) {
        const float4 next = *reinterpret_cast<const float4*>(sums + part * size + at);
        sum[i].x += next.x;
        sum[i].y += next.y;
        sum[i].z += next.z;
        sum[i].w += next.w;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < COPIES; i++) {
    const long long at = first + i * THREADS * 4;
    if (at < size) {
      const int output = at % outputs;
      sum[i].x = finish(sum[i].x, output, at);
      sum[i].y = finish(sum[i].y, output + 1, at + 1);
      sum[i].z = finish(sum[i].z, output + 2, at + 2);
      sum[i].w = finish(sum[i].w, output + 3, at + 3);
      *reinterpret_cast<float4*>(y + at) = sum[i];
    }
  }
}

// Scaled dot-product attention, of what `Head` is given.
__noinline__ __device__ void attend(
    const float* qkv,
    int frames,
    int row,
    const float* mask,
    float* y,
    float4* shared_memory) {
  constexpr int ROW = Head<float>::ROW, BLOCK = Head<float>::BLOCK;
  constexpr int EIGHTS = HEAD_WIDTH / 8, KEY_EIGHTS = KEYS / 8;
  // inputs, and keys, that are added up on the tensor cores, in eights
  constexpr int SHORT = 4;
  float* const key_blocks = reinterpret_cast<float*>(shared_memory);
  float* const value_blocks = key_blocks + 2 * BLOCK;

  const Head<float> head(qkv, frames, row, mask, y);
  const int lane = threadIdx.x % 32;
  head.fetch(key_blocks, value_blocks, 0);

  // this warp's 16 queries times 1 / sqrt(HEAD_WIDTH), a power of two
  static_assert(HEAD_WIDTH == 64 && EIGHTS == 2 * SHORT && KEY_EIGHTS % SHORT == 0);
  unsigned q_large[EIGHTS][4], q_small[EIGHTS][4];
#pragma unroll
  for (int k = 0; k < EIGHTS; k++) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int frame = min(head.first + (i % 2) * 8, frames - 1);
      const float q = head.queries[(long long)frame * row + k * 8 + (i / 2) * 4 + lane % 4];
      split(__float_as_uint(q * 0.125f), q_large[k][i], q_small[k][i]);
    }
  }

  // of two rows
  float highest[2] = {SMALLEST, SMALLEST}, total[2] = {};
  float mixed[EIGHTS][4] = {};
  for (int block = 0; block < head.blocks; block++) {
    asm volatile("cp.async.wait_group 0;");
    __syncthreads();
    head.fetch(key_blocks, value_blocks, block + 1);
    const float* const key_block =
        key_blocks + (block % 2) * BLOCK + (lane % 8) * ROW + (lane / 8) * 4;
    const float* const value_block =
        value_blocks + (block % 2) * BLOCK + (lane % 4) * 2 * ROW + lane / 4;

    float scores[KEY_EIGHTS][4];
#pragma unroll
    for (int n = 0; n < KEY_EIGHTS; n++) {
      float sums[EIGHTS / SHORT][4] = {};
#pragma unroll
      for (int part = 0; part < EIGHTS / SHORT; part++) {
        unsigned large[SHORT][2], small[SHORT][2];
#pragma unroll
        for (int k = 0; k < SHORT; k += 2) {
          unsigned bits[4];
          load_rows(bits, key_block + n * 8 * ROW + (part * SHORT + k) * 8);
#pragma unroll
          for (int i = 0; i < 4; i++) {
            split(bits[i], large[k + i / 2][i % 2], small[k + i / 2][i % 2]);
          }
        }
#pragma unroll
        for (int k = 0; k < SHORT; k++) {
          multiply_add(sums[part], q_small[part * SHORT + k], large[k]);
          multiply_add(sums[part], q_large[part * SHORT + k], small[k]);
        }
#pragma unroll
        for (int k = 0; k < SHORT; k++) {
          multiply_add(sums[part], q_large[part * SHORT + k], large[k]);
        }
      }
#pragma unroll
      for (int i = 0; i < 4; i++) {
        scores[n][i] = sums[0][i] + sums[1][i];
      }
    }

    head.weigh(scores, block, highest, total, mixed);

    // A thread has the scores of keys 2 j and 2 j + 1 of every eight where the product wants
    // those of j and j + 4: a sum may be taken in any order, if the values are in the same.
#pragma unroll
    for (int part = 0; part < KEY_EIGHTS / SHORT; part++) {
      unsigned p_large[SHORT][4], p_small[SHORT][4];
#pragma unroll
      for (int k = 0; k < SHORT; k++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const float p = scores[part * SHORT + k][(i % 2) * 2 + i / 2];
          split(__float_as_uint(p), p_large[k][i], p_small[k][i]);
        }
      }
#pragma unroll
      for (int n = 0; n < EIGHTS; n++) {
        unsigned large[SHORT][2], small[SHORT][2];
#pragma unroll
        for (int k = 0; k < SHORT; k++) {
#pragma unroll
          for (int i = 0; i < 2; i++) {
            const float v = value_block[((part * SHORT + k) * 8 + i) * ROW + n * 8];
            split(__float_as_uint(v), large[k][i], small[k][i]);
          }
        }
        float sums[4] = {};
#pragma unroll
        for (int k = 0; k < SHORT; k++) {
          multiply_add(sums, p_small[k], large[k]);
          multiply_add(sums, p_large[k], small[k]);
        }
#pragma unroll
        for (int k = 0; k < SHORT; k++) {
          multiply_add(sums, p_large[k], large[k]);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
          mixed[n][i] += sums[i];
        }
      }
    }
  }

  head.store(total, mixed);
}

// geometry: what to do, parts, kernel, stride, and whether there is a bias, a GELU and a
// residual; attention's mask is its bias
template <class Shape>
__device__ void run(
    const float* x,
    const Shape& x_shape,
    const float* weight,
    const Shape& weight_shape,
    const float* bias,
    const float* residual,
    const int* geometry,
    float* y) {
  extern __shared__ float4 shared_memory[];
  const int parts = geometry[1];
  const Finish finish{
      geometry[4] ? bias : nullptr, bool(geometry[5]), geometry[6] ? residual : nullptr};
  if (geometry[0] == MULTIPLY) {
    multiply(
        x, x_shape[0], x_shape[1], x_shape[2], weight, weight_shape[0], weight_shape[1],
        geometry[2], geometry[3], parts, finish, y, shared_memory);
  } else if (geometry[0] == ADD_UP) {
    const long long rows = (long long)x_shape[1] * x_shape[2];
    add_up(x, parts, rows * x_shape[3], x_shape[3], finish, y);
  } else {
    attend(x, x_shape[1], x_shape[2], geometry[4] ? bias : nullptr, y, shared_memory);
  }
}
