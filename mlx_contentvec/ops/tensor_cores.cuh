// What `tensor_cores_single.cuh` and `tensor_cores_half.cuh` share, behind the constants that
// `tensor_cores.py` names: copies, and attention but for its products.

// The part of 16 rows, of 32 bytes each, that belongs to this thread.
template <class T>
inline __device__ void load_rows(unsigned (&to)[4], const T* from) {
  const unsigned shared = (unsigned)__cvta_generic_to_shared(from);
  asm volatile(
      "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
      : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
      : "r"(shared));
}

// 16 bytes on their way to the shared memory.
template <class T>
inline __device__ void copy(T* to, const T* from, bool aligned) {
  const unsigned shared = (unsigned)__cvta_generic_to_shared(to);
  if (aligned) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(from));
  } else {
    for (int i = 0; i < 16 / sizeof(T); i++) {
      if constexpr (sizeof(T) == 4) {
        asm volatile(
            "cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared + 4 * i), "l"(from + i));
      } else {
        to[i] = from[i];
      }
    }
  }
}

constexpr float SMALLEST = -3.402823466e38f;

// Two numbers beside each other.
template <class T>
struct alignas(2 * sizeof(T)) Pair {
  T first, second;
};

// One head of one clip: what attends, and to what.
//
// qkv:  (batch, frames, row), queries, keys and values, each of row / 3
// mask: (batch, frames), 0 where a key may not be attended to, or null
// y:    (batch, frames, row / 3)
template <class T>
struct Head {
  static constexpr int NUMBERS = 16 / sizeof(T), ACROSS = HEAD_WIDTH / NUMBERS;
  static constexpr int STEP = THREADS / ACROSS;
  static constexpr int ROW = HEAD_WIDTH + ROW_GAP, BLOCK = KEYS * ROW;
  static constexpr int EIGHTS = HEAD_WIDTH / 8, KEY_EIGHTS = KEYS / 8;
  int frames, row, blocks, first;
  bool aligned;
  const T *queries, *keys, *values, *kept;
  T* y;

  inline __device__ Head(const T* qkv, int frames, int row, const T* mask, T* y)
      : frames(frames), row(row), blocks((frames + KEYS - 1) / KEYS) {
    const int width = row / 3, heads = width / HEAD_WIDTH;
    const int across = (frames + QUERIES - 1) / QUERIES;
    const int head = blockIdx.x / across % heads, clip = blockIdx.x / across / heads;
    aligned = ((unsigned long long)qkv & 15) == 0;
    queries = qkv + (long long)clip * frames * row + head * HEAD_WIDTH;
    keys = queries + width;
    values = keys + width;
    kept = mask ? mask + (long long)clip * frames : nullptr;
    this->y = y + (long long)clip * frames * width + head * HEAD_WIDTH;
    // of this warp's 16 queries this thread has two: the eighth behind it is the other
    static_assert(QUERIES == THREADS / 32 * 16);
    first = (blockIdx.x % across) * QUERIES + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
  }

  // A block of keys and values. Those behind the last one are read, the last one again, and not
  // counted.
  inline __device__ void fetch(T* key_blocks, T* value_blocks, int block) const {
    if (block < blocks) {
      const int to =
          (block % 2) * BLOCK + (threadIdx.x / ACROSS) * ROW + (threadIdx.x % ACROSS) * NUMBERS;
#pragma unroll
      for (int i = 0; i < KEYS / STEP; i++) {
        const int frame = min(block * KEYS + (int)threadIdx.x / ACROSS + i * STEP, frames - 1);
        const long long from = (long long)frame * row + (threadIdx.x % ACROSS) * NUMBERS;
        copy(key_blocks + to + i * STEP * ROW, keys + from, aligned);
        copy(value_blocks + to + i * STEP * ROW, values + from, aligned);
      }
    }
    asm volatile("cp.async.commit_group;");
  }

  // The scores of a block become weights, beside those of the blocks before it.
  inline __device__ void weigh(
      float (&scores)[KEY_EIGHTS][4],
      int block,
      float (&highest)[2],
      float (&total)[2],
      float (&mixed)[EIGHTS][4]) const {
    if (kept || (block + 1) * KEYS > frames) {
#pragma unroll
      for (int n = 0; n < KEY_EIGHTS; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int key = block * KEYS + n * 8 + (threadIdx.x % 4) * 2 + i % 2;
          if (key >= frames) {
            scores[n][i] = -INFINITY;
          } else if (kept && static_cast<float>(kept[key]) == 0) {
            scores[n][i] = SMALLEST;
          }
        }
      }
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float top = highest[half];
#pragma unroll
      for (int n = 0; n < KEY_EIGHTS; n++) {
        top = fmaxf(top, fmaxf(scores[n][half * 2], scores[n][half * 2 + 1]));
      }
      top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, 1));
      top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, 2));
      const float shrunk = expf(highest[half] - top);
      highest[half] = top;
      float sum = 0;
#pragma unroll
      for (int n = 0; n < KEY_EIGHTS; n++) {
        float* const pair = &scores[n][half * 2];
        pair[0] = expf(pair[0] - top);
        pair[1] = expf(pair[1] - top);
        sum += pair[0] + pair[1];
      }
      total[half] = total[half] * shrunk + sum;
#pragma unroll
      for (int n = 0; n < EIGHTS; n++) {
        mixed[n][half * 2] *= shrunk;
        mixed[n][half * 2 + 1] *= shrunk;
      }
    }
  }

  inline __device__ void store(const float (&total)[2], const float (&mixed)[EIGHTS][4]) const {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float sum = total[half];
      sum += __shfl_xor_sync(0xffffffff, sum, 1);
      sum += __shfl_xor_sync(0xffffffff, sum, 2);
      const int frame = first + half * 8;
      if (frame < frames) {
        T* const to = y + (long long)frame * (row / 3) + (threadIdx.x % 4) * 2;
#pragma unroll
        for (int n = 0; n < EIGHTS; n++) {
          *reinterpret_cast<Pair<T>*>(to + n * 8) =
              Pair<T>{T(mixed[n][half * 2] / sum), T(mixed[n][half * 2 + 1] / sum)};
        }
      }
    }
  }
};
