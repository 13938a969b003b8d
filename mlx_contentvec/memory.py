"""What fits into memory in one go, and how a longer clip is cut."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from .backend import (
    MEMORY_LIMIT_LOCK,
    address_space,
    address_space_left,
    device_kind,
    memory_limit,
    mx,
    require_no_fork,
)
from .config import ModelConfig
from .errors import MORE_MEMORY, BackendError, ConfigError
from .ops import kernels_numpy
from .ops.mlx import attends_on_tensor_cores, compute_dtype, convolves_on_tensor_cores


@dataclass(frozen=True)
class ChunkPlan:
    """How much of a clip is in work at once."""

    #: frames of the front end, and of whatever is computed frame by frame
    frames: int
    #: attention heads whose keys and values are held
    heads: int
    #: queries that are scored against all keys of a head
    queries: int


#: bytes beside model, waveform and the two buffers that a CPU is given where no cap is
#: set. A clip that needs no more is not streamed
CPU_ROOM = 256 << 20
#: a GPU is given a part of its memory, and no more than leaves a Mac of 16 GB usable: a
#: model in float32 (0.5 GB with what is prepared of it) and this stay below 4 GiB. On a
#: GPU it counts the freed buffers that MLX keeps as well (``bounded``)
GPU_ROOM = 3 << 30
GPU_PART = 1 / 4
#: on CUDA a pass that takes more than this part of its limit keeps few freed buffers: MLX
#: lets go of the oldest first, which is what the next pass asks for, and the driver, which
#: has them back, gives any size out of them. On tensor cores 60 s take 32.1 instead of 32.8 ms
#: and 12 clips of 5 s 24.3 instead of 26.1, but 30 s, which is less than the part, 16.9 instead
#: of 15.7. Half precision keeps all: 11.9 instead of 9.9 ms for 60 s, 11.4 instead of 9.0 for
#: the 12 clips. Batches of many lengths take as long either way (float32 and float16, H200)
KEEPS_ALL = 2 / 3
FEW_KEPT = 256 << 20
#: a GPU's memory where MLX does not tell
GPU_MEMORY = 8 << 30
#: sizes that a piece may have, the first being the least that works. A CPU is
#: fastest while its pieces stay in cache, a GPU wants them large
FRAMES = {
    "cpu": (32, 64, 128, 256),
    "metal": (32, 128, 512, 1024, 2048),
    "cuda": (32, 128, 512, 1024, 2048),
}
QUERIES = (16, 64, 256, 1024)
#: arrays as large as its largest that front end or feed-forward hold at their peak, and
#: copies of the scores that attention holds (measured; assumed for Metal). A CPU works
#: in tiles, so that most of its arrays are small. On a GPU the second convolution holds
#: its input, in a batch also the windows of it as a copy, the 12 parts of its sums at half
#: that size each, and their sum, while the next one is in work: 13.5 on an H100
COPIES = {"cpu": 3.0, "metal": 14.0, "cuda": 14.0}
SCORES = {"cpu": 0.0, "metal": 2.25, "cuda": 2.25}
#: the first of them where float32 convolutions run on tensor cores, which copy nothing: 5.3 of
#: stages that wait for each other. Shorter passes hold up to 11.5 where memory is not nearly
#: full (H200; ``ops.Pipeline``)
COPIES_ON_TENSOR_CORES = 6.5
#: numbers held of a row of stacked clips, by its width: queries, keys and values, what is
#: attended, the residual and the rows before and after it
STACKED_WIDTHS = 8
#: widths of a head for which Metal's attention is one kernel that never holds its scores,
#: in every type and with a mask. Source: mlx/backend/metal/scaled_dot_product_attention.cpp
FUSED_HEAD_WIDTHS = {"metal": (64, 80, 128)}


def whole_clip_bytes(
    config: ModelConfig, samples: int, batch: int = 1, stored: mx.Dtype | None = None
) -> int:
    """About what a forward pass over whole clips takes beside the model, in bytes.

    stored: what the weights are stored as; None for the most that it takes with any
    """
    frames = config.frames(samples)
    size, copies, scored = 4, COPIES[device_kind()], SCORES[device_kind()]
    if stored is not None:
        # a kernel may be tried
        require_no_fork()
        size = compute_dtype(stored).size
        # without memory for the trial the pass will not have it either, and say so
        with contextlib.suppress(RuntimeError, MemoryError):
            if convolves_on_tensor_cores(stored, config.conv_layers):
                copies = COPIES_ON_TENSOR_CORES
            if attends_on_tensor_cores(stored, config.head_width):
                scored = 0.0
    if _fused_attention(config):
        scored = 0.0
    scores = 4 * scored * config.encoder_attention_heads * frames * frames
    return batch * max(size * _values_at_once(config, frames, copies), int(scores))


def stacked_bytes(config: ModelConfig, samples: Sequence[int]) -> int:
    """About what ``stacking.stacked`` takes beside the model, in bytes.

    samples: of each clip
    """
    rows = sum(config.frames(count) for count in samples)
    return whole_clip_bytes(config, max(samples)) + 4 * rows * STACKED_WIDTHS * (
        config.encoder_embed_dim
    )


def _values_at_once(config: ModelConfig, frames: int, copies: float) -> int:
    """The most numbers held while ``frames`` frames go through front end or feed-forward."""
    channels, _, stride = config.conv_layers[0]
    front_end = frames * config.hop // stride * channels
    return int(copies * max(front_end, frames * config.encoder_ffn_embed_dim))


def streamed_bytes(config: ModelConfig, samples: int, plan: ChunkPlan) -> int:
    """About what ``streaming.streamed`` takes beside the model and the waveform, in bytes."""
    frames = config.frames(samples)
    head_width = config.head_width
    # keys and values, twice while their pieces are joined, and on a CPU rearranged
    keys_and_values = 4 * plan.heads * frames * head_width
    if device_kind() == "cpu":
        scored = 2 * min(kernels_numpy.SCORES_PER_THREAD, plan.queries * frames)
    elif _fused_attention(config):
        scored = 2 * plan.heads * plan.queries * head_width
    else:
        scored = 2 * plan.heads * frames * plan.queries
    attention = keys_and_values + scored
    front_end = _values_at_once(config, plan.frames, COPIES[device_kind()])
    return _buffers(config, frames) + 4 * max(front_end, attention)


def _fused_attention(config: ModelConfig) -> bool:
    return config.head_width in FUSED_HEAD_WIDTHS.get(device_kind(), ())


def _buffers(config: ModelConfig, frames: int) -> int:
    return 2 * 4 * frames * config.encoder_embed_dim


def plan_chunks(
    config: ModelConfig, samples: int, max_memory: int | None, stored: mx.Dtype | None = None
) -> ChunkPlan | None:
    """How to stream a clip of ``samples`` samples; None if it fits in one go.

    max_memory: bytes beside the model and the waveform; None for what suits the device
    stored:     as of ``whole_clip_bytes``

    Raises ConfigError if ``max_memory`` is less than the clip needs.
    """
    device = device_kind()
    limit = limit_of(max_memory)
    if whole_clip_bytes(config, samples, stored=stored) <= limit:
        return None
    plan = _least_plan()
    least = streamed_bytes(config, samples, plan)
    if max_memory is None:
        limit = max(least, limit + _buffers(config, config.frames(samples)))
    if least > limit:
        raise ConfigError(
            f"a clip of {samples / config.sample_rate:.1f} s does not fit the memory it is given",
            found=f"{limit / 2**20:.0f} MiB",
            expected=f"{least / 2**20:.0f} MiB or more",
            hint="give it more, or take windows, which changes the features around their seams",
        )
    heads = range(1, config.encoder_attention_heads + 1)
    choices = (("queries", QUERIES), ("frames", FRAMES[device]), ("heads", heads))
    for field, sizes in choices:
        for size in sizes:
            larger = replace(plan, **{field: size})
            if streamed_bytes(config, samples, larger) <= limit:
                plan = larger
    return plan


def _least_plan() -> ChunkPlan:
    return ChunkPlan(frames=FRAMES[device_kind()][0], heads=1, queries=QUERIES[0])


def plans_in_turn(
    config: ModelConfig, samples: int, max_memory: int | None, stored: mx.Dtype | None = None
) -> Iterator[tuple[ChunkPlan | None, int]]:
    """How to compute a clip, in turn, as long as the device has not enough for it.

    As ``plan_chunks`` has it, twice, since MLX lets go of its freed buffers after the first
    try; then with a quarter of what that needed; then in the smallest pieces that there are.

    Yields the plan, None for one go, and the bytes that it may take.
    """
    plan, limit = plan_chunks(config, samples, max_memory, stored), limit_of(max_memory)
    yield plan, limit
    yield plan, limit
    smallest = _least_plan()
    least = streamed_bytes(config, samples, smallest)
    whole = whole_clip_bytes(config, samples, stored=stored)
    quarter = max(least, min(limit, whole) // 4)
    yield plan_chunks(config, samples, quarter, stored) or smallest, quarter
    yield smallest, least


#: what a device's errors say where less at once, or fewer kept buffers, may be enough
_EXHAUSTED = (
    "out of memory",
    "insufficient memory",
    "unable to allocate",
    "maximum allowed buffer size",
    "alloc_failed",
    "cache thrashing",
    "gpu timeout",
    "gpu hang",
    "innocentvictim",
)


def is_exhausted(error: Exception) -> bool:
    """Whether an error says that a device has too little of something for work of this size.

    Memory, time for one command or peace from another program's (Metal), or room for
    plans of convolutions (CUDA).
    """
    said = str(error).lower()
    return isinstance(error, MemoryError) or any(phrase in said for phrase in _EXHAUSTED)


def release() -> None:
    """Give the freed buffers that MLX keeps back to the system."""
    mx.clear_cache()


def limit_of(max_memory: int | None) -> int:
    """``max_memory``, or the bytes that this device is given where no cap is set."""
    if max_memory is not None:
        return max_memory
    if device_kind() == "cpu":
        return CPU_ROOM
    return min(GPU_ROOM, int(gpu_memory() * GPU_PART))


def gpu_memory() -> int:
    """Bytes of memory that the GPU has; on a Mac those of the machine.

    Raises BackendError in a fork, as :func:`bounded` does: there the driver answers nothing.
    """
    require_no_fork()
    info = mx.device_info() if hasattr(mx, "device_info") else mx.metal.device_info()
    return int(info.get("memory_size") or info.get("total_memory") or GPU_MEMORY)


#: how many threads are within ``bounded``, and the limits that were set before the first
_within = _limit_before = 0
_kept_before: int | None = None
#: bytes that were live, and no leavings, at the start of the last work
_settled = 0
#: bytes more than those that are taken for leavings
_LEAVINGS = 1 << 20


@contextlib.contextmanager
def bounded(
    max_memory: int | None = None, needed: int = 0, stored: mx.Dtype = mx.float32
) -> Iterator[None]:
    """Have MLX hold at most ``max_memory`` bytes of a GPU above the live arrays of now.

    needed: bytes that the work takes, where that is known, of weights that are ``stored`` so
        (KEEPS_ALL)

    MLX keeps freed buffers and uses them again for arrays of about their size only: every
    new length of a clip adds some. 64 clips of 5 to 25 s left 72 GB of them on an 80 GB
    GPU. Its memory limit counts live arrays and kept buffers together: kept ones are let
    go before more is taken, and a graph waits for what is in work.

    The limits are the process's. They are lowered while work is in progress, never raised, and
    set again as they were at the end of the last of several threads. A CPU keeps no buffers.
    Source: mlx/backend/metal/allocator.cpp and mlx/backend/cuda/allocator.cpp, ``malloc``.
    """
    global _within, _limit_before, _kept_before, _settled
    if device_kind() == "cpu":
        yield
        return
    require_no_fork()
    with MEMORY_LIMIT_LOCK:
        if not _within:
            _limit_before = memory_limit()
        _within += 1
        limit = limit_of(max_memory)
        live = mx.get_active_memory()
        if _within == 1 and live > _settled + _LEAVINGS:
            # Results can be read before MLX's own thread has let go of what they were made from:
            # up to 31 MiB before one pass in a thousand (H200). To wait before each costs 10 %.
            mx.synchronize()
            live = _settled = mx.get_active_memory()
        _settled = min(_settled, live)
        mx.set_memory_limit(min(_limit_before, live + limit))
        keeps_few = device_kind() == "cuda" and stored == mx.float32
        if keeps_few and needed > KEEPS_ALL * limit and _kept_before is None:
            _kept_before = mx.set_cache_limit(FEW_KEPT)
            if _kept_before < FEW_KEPT:
                mx.set_cache_limit(_kept_before)
    try:
        yield
    finally:
        with MEMORY_LIMIT_LOCK:
            _within -= 1
            if not _within:
                mx.set_memory_limit(_limit_before)
                if _kept_before is not None:
                    mx.set_cache_limit(_kept_before)
                    _kept_before = None


def require_room(weights: int) -> None:
    """Raise BackendError if ``weights`` bytes cannot be loaded: MLX crashes without memory.

    Each is there twice while it is stored as the device reads it, and MLX's threads begin.
    """
    left, needed = address_space_left(), 2 * weights + (128 << 20)
    if left < needed:
        raise BackendError(
            "there is not enough memory to load the model",
            found=f"{max(left, 0) / 2**20:,.0f} MiB that this process may still take",
            expected=f"{needed / 2**20:,.0f} MiB",
            hint=MORE_MEMORY,
        )


def process_memory() -> int | None:
    """Bytes that this process may use at most; None where the system does not say."""
    try:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
    return int(min(there, address_space()))
