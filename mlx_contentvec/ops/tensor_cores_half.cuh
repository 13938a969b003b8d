// float16 and bfloat16 on the tensor cores of an NVIDIA GPU, behind `tensor_cores.cuh`.

// sum += a b, of 16 rows, 16 inputs and 8 outputs; the last argument says what the numbers are.
inline __device__ void multiply_add(
    float (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2], __half) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

inline __device__ void multiply_add(
    float (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2], __nv_bfloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// 16 keys of 16 numbers, the part that belongs to this thread where keys are what is summed over.
template <class T>
inline __device__ void load_keys(unsigned (&to)[4], const T* from) {
  const unsigned shared = (unsigned)__cvta_generic_to_shared(from);
  asm volatile(
      "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
      : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
      : "r"(shared));
}

// Two numbers as the tensor cores take them.
template <class T>
inline __device__ unsigned packed(T first, T second) {
  const Pair<T> pair{first, second};
  return *reinterpret_cast<const unsigned*>(&pair);
}

// Scaled dot-product attention, of what `Head` is given.
template <class T>
__noinline__ __device__ void attend(
    const T* qkv, int frames, int row, const T* mask, T* y, float4* shared_memory) {
  constexpr int ROW = Head<T>::ROW, BLOCK = Head<T>::BLOCK;
  constexpr int SIXTEENS = HEAD_WIDTH / 16, EIGHTS = HEAD_WIDTH / 8, KEY_EIGHTS = KEYS / 8;
  T* const key_blocks = reinterpret_cast<T*>(shared_memory);
  T* const value_blocks = key_blocks + 2 * BLOCK;

  const Head<T> head(qkv, frames, row, mask, y);
  const int lane = threadIdx.x % 32;
  head.fetch(key_blocks, value_blocks, 0);

  // this warp's 16 queries
  static_assert(HEAD_WIDTH == 64 && KEYS % 16 == 0);
  unsigned q[SIXTEENS][4];
#pragma unroll
  for (int k = 0; k < SIXTEENS; k++) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int frame = min(head.first + (i % 2) * 8, frames - 1);
      const T* const two =
          head.queries + (long long)frame * row + k * 16 + (i / 2) * 8 + (lane % 4) * 2;
      q[k][i] = packed(two[0], two[1]);
    }
  }

  // of two rows
  float highest[2] = {SMALLEST, SMALLEST}, total[2] = {};
  float mixed[EIGHTS][4] = {};
  for (int block = 0; block < head.blocks; block++) {
    asm volatile("cp.async.wait_group 0;");
    __syncthreads();
    head.fetch(key_blocks, value_blocks, block + 1);
    const T* const key_block =
        key_blocks + (block % 2) * BLOCK + (lane % 8) * ROW + (lane / 8) * 8;
    const T* const value_block =
        value_blocks + (block % 2) * BLOCK + (lane % 16) * ROW + (lane / 16) * 8;

    // times 1 / sqrt(HEAD_WIDTH)
    float scores[KEY_EIGHTS][4];
#pragma unroll
    for (int n = 0; n < KEY_EIGHTS; n++) {
      float sum[4] = {};
#pragma unroll
      for (int k = 0; k < SIXTEENS; k += 2) {
        unsigned bits[4];
        load_rows(bits, key_block + n * 8 * ROW + k * 16);
        multiply_add(sum, q[k], {bits[0], bits[1]}, T());
        multiply_add(sum, q[k + 1], {bits[2], bits[3]}, T());
      }
#pragma unroll
      for (int i = 0; i < 4; i++) {
        scores[n][i] = sum[i] * 0.125f;
      }
    }

    head.weigh(scores, block, highest, total, mixed);

    // the scores of keys are where the product wants them
#pragma unroll
    for (int k = 0; k < KEY_EIGHTS; k += 2) {
      const unsigned p[4] = {
          packed(T(scores[k][0]), T(scores[k][1])),
          packed(T(scores[k][2]), T(scores[k][3])),
          packed(T(scores[k + 1][0]), T(scores[k + 1][1])),
          packed(T(scores[k + 1][2]), T(scores[k + 1][3]))};
#pragma unroll
      for (int n = 0; n < EIGHTS; n += 2) {
        unsigned v[4];
        load_keys(v, value_block + k * 8 * ROW + n * 8);
        multiply_add(mixed[n], p, {v[0], v[1]}, T());
        multiply_add(mixed[n + 1], p, {v[2], v[3]}, T());
      }
    }
  }

  head.store(total, mixed);
}

// geometry: what to do, and five numbers behind it whether there is a mask, which is its bias
template <class T, class Shape>
__device__ void run(
    const T* x,
    const Shape& x_shape,
    const T*,
    const Shape&,
    const T* bias,
    const T*,
    const int* geometry,
    T* y) {
  extern __shared__ float4 shared_memory[];
  attend(x, x_shape[1], x_shape[2], geometry[4] ? bias : nullptr, y, shared_memory);
}
