"""What fits into memory in one go, and how a longer clip is cut."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, replace

from .backend import device_kind, mx
from .config import ModelConfig
from .errors import ConfigError
from .ops import cpu


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
#: set; a GPU is given a part of its memory. A clip that needs no more is not streamed
CPU_ROOM = 256 << 20
GPU_PART = 1 / 4
#: a GPU's memory where MLX does not tell
GPU_MEMORY = 8 << 30
#: sizes that a piece may have, the first being the least that works. A CPU is
#: fastest while its pieces stay in cache, a GPU wants them large
FRAMES = {"cpu": (32, 64, 128, 256), "metal": (32, 128, 512, 2048), "cuda": (32, 128, 512, 2048)}
QUERIES = (16, 64, 256, 1024)
#: arrays as large as its largest that front end or feed-forward hold at their peak, and
#: copies of the scores that attention holds (measured; assumed for Metal). A CPU works
#: in tiles, so that most of its arrays are small. On a GPU the second convolution holds
#: its input, the 12 parts of its sums at half that size each, and their sum
COPIES = {"cpu": 3, "metal": 8, "cuda": 8}
SCORES = {"cpu": 0.0, "metal": 2.25, "cuda": 2.25}


def whole_clip_bytes(config: ModelConfig, samples: int, batch: int = 1) -> int:
    """About what a forward pass over whole clips takes beside the model, in bytes."""
    frames = config.frames(samples)
    scores = SCORES[device_kind()] * config.encoder_attention_heads * frames * frames
    return 4 * batch * max(_values_at_once(config, frames), int(scores))


def _values_at_once(config: ModelConfig, frames: int) -> int:
    """The most numbers held while ``frames`` frames go through front end or feed-forward."""
    channels, _, stride = config.conv_layers[0]
    front_end = frames * config.hop // stride * channels
    return COPIES[device_kind()] * max(front_end, frames * config.encoder_ffn_embed_dim)


def streamed_bytes(config: ModelConfig, samples: int, plan: ChunkPlan) -> int:
    """About what ``streaming.streamed`` takes beside the model and the waveform, in bytes."""
    frames = config.frames(samples)
    head_width = config.encoder_embed_dim // config.encoder_attention_heads
    # keys and values, twice while their pieces are joined, and on a CPU rearranged
    keys_and_values = 4 * plan.heads * frames * head_width
    if device_kind() == "cpu":
        scored = 2 * min(cpu.SCORES_PER_THREAD, plan.queries * frames)
    else:
        scored = 2 * plan.heads * frames * plan.queries
    attention = keys_and_values + scored
    return _buffers(config, frames) + 4 * max(_values_at_once(config, plan.frames), attention)


def _buffers(config: ModelConfig, frames: int) -> int:
    return 2 * 4 * frames * config.encoder_embed_dim


def plan_chunks(config: ModelConfig, samples: int, max_memory: int | None) -> ChunkPlan | None:
    """How to stream a clip of ``samples`` samples; None if it fits in one go.

    max_memory: bytes beside the model and the waveform; None for what suits the device

    Raises ConfigError if ``max_memory`` is less than the clip needs.
    """
    device = device_kind()
    limit = _default_limit() if max_memory is None else max_memory
    if whole_clip_bytes(config, samples) <= limit:
        return None
    plan = ChunkPlan(frames=FRAMES[device][0], heads=1, queries=QUERIES[0])
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


def _default_limit() -> int:
    if device_kind() == "cpu":
        return CPU_ROOM
    info = mx.device_info() if hasattr(mx, "device_info") else mx.metal.device_info()
    memory = info.get("memory_size") or info.get("total_memory") or GPU_MEMORY
    return int(memory * GPU_PART)


def process_memory() -> int | None:
    """Bytes that this process may use at most; None where the system does not say."""
    try:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
    with contextlib.suppress(ImportError):
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if limit != resource.RLIM_INFINITY:
            there = min(there, limit)
    return there
