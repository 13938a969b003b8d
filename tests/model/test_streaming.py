from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mlx_contentvec import memory, streaming
from mlx_contentvec.backend import mx
from mlx_contentvec.config import ModelConfig
from mlx_contentvec.errors import ConfigError
from mlx_contentvec.memory import ChunkPlan, plan_chunks, streamed_bytes, whole_clip_bytes
from mlx_contentvec.model import ContentvecModel
from mlx_contentvec.ops import cpu, kernels, kernels_numpy
from mlx_contentvec.ops.mlx import compute_dtype
from mlx_contentvec.streaming import streamed as streamed_by
from tests.small_models import CONFIGS, QUANTISABLE, TINY, in_one_go, noise, random_model

PLAN = ChunkPlan(frames=32, heads=3, queries=16)


def streamed(model: ContentvecModel, waveform: np.ndarray, *arguments: Any) -> np.ndarray:
    return streamed_by(model.walk(), model.config, waveform, *arguments)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("samples", [400, 719, 720, 32 * 320 + 79, 32 * 320 + 80, 47123])
def test_a_streamed_clip_is_the_clip_in_one_go(config: ModelConfig, samples: int) -> None:
    model = random_model(config)
    waveform = noise(samples)
    whole = in_one_go(model, waveform, output_layer=3)
    pieces = streamed(model, waveform, 3, False, PLAN)
    assert pieces.shape == whole.shape == (config.frames(samples), 96)
    np.testing.assert_allclose(pieces, whole, atol=2e-5, rtol=0)


@pytest.mark.skipif(memory.device_kind() != "cpu", reason="a CPU's way")
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_the_front_end_of_a_longer_clip_is_taken_in_pieces_on_a_cpu(
    config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model(config)
    waveforms = np.stack([noise(40 * 320 + 100), noise(40 * 320 + 100, 1)])
    calls: dict[str, Any] = {"whole": {}, "lengths": {"lengths": [40 * 320 + 100, 9000]}}
    expected = {name: model(waveforms, output_layer=3, **call) for name, call in calls.items()}
    monkeypatch.setattr(streaming, "WHOLE_FRONT_END", 16)
    monkeypatch.setattr(streaming, "FRONT_END_FRAMES", 7)
    longest = 0
    conv1d = cpu.conv1d

    def measured(x: Any, *arguments: Any) -> Any:
        nonlocal longest
        longest = max(longest, x.shape[1])
        return conv1d(x, *arguments)

    monkeypatch.setattr(cpu, "conv1d", measured)
    for name, call in calls.items():
        found = model(waveforms, output_layer=3, **call)
        valid = ~found["padding_mask"] if name == "lengths" else np.ones((2, 40), bool)
        apart = np.abs(np.asarray(found["x"]) - np.asarray(expected[name]["x"]))
        assert apart[np.asarray(valid)].max() < 2e-5
    # the whole clip would be 2,580 steps of the first convolution, or its samples
    assert 0 < longest <= 7 * 320 + 400


def test_the_projection_is_streamed_too() -> None:
    model = random_model(TINY)
    waveform = noise(40000)
    whole = in_one_go(model, waveform, output_layer=2, project=True)
    np.testing.assert_allclose(streamed(model, waveform, 2, True, PLAN), whole, atol=2e-5, rtol=0)


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("queries", [16, 256])
def test_the_size_of_the_pieces_changes_nothing(heads: int, queries: int) -> None:
    model = random_model(TINY)
    waveform = noise(50000)
    reference = streamed(model, waveform, 3, False, PLAN)
    pieces = ChunkPlan(frames=64, heads=heads, queries=queries)
    np.testing.assert_allclose(
        streamed(model, waveform, 3, False, pieces), reference, atol=2e-5, rtol=0
    )


def test_scoring_some_keys_at_a_time_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(TINY)
    waveform = noise(50000)
    monkeypatch.setattr(kernels, "chosen", kernels_numpy.NumpyKernels)
    reference = streamed(model, waveform, 3, False, PLAN)
    monkeypatch.setattr(kernels_numpy, "KEYS_PER_BLOCK", 37)
    parts = streamed(model, waveform, 3, False, PLAN)
    assert np.abs(parts - reference).max() > 0 or memory.device_kind() != "cpu"
    np.testing.assert_allclose(parts, reference, atol=2e-5, rtol=0)


def test_half_precision_weights_are_streamed_as_they_are_run_in_one_go() -> None:
    model = random_model(TINY, mx.float16)
    waveform = noise(40000)
    whole = in_one_go(model, waveform, output_layer=3)
    pieces = streamed(model, waveform, 3, False, PLAN)
    noise_floor = 2e-5 if compute_dtype(mx.float16) == mx.float32 else 3e-2
    np.testing.assert_allclose(pieces, whole, atol=noise_floor, rtol=0)


def test_quantised_weights_are_streamed() -> None:
    from mlx import nn

    model = random_model(QUANTISABLE)
    waveform = noise(40000)
    exact = in_one_go(model, waveform, output_layer=3)
    nn.quantize(model, group_size=32, bits=8, class_predicate=lambda _, m: isinstance(m, nn.Linear))
    whole = in_one_go(model, waveform, output_layer=3)
    # a quantised product on CUDA has another precision for another number of rows: what
    # that makes must stay below what quantising costs
    cost = np.abs(whole - exact).max()
    allowed = 2e-5 if memory.device_kind() == "cpu" else cost / 2
    assert cost > 1e-2
    pieces = streamed(model, waveform, 3, False, PLAN)
    np.testing.assert_allclose(pieces, whole, atol=allowed, rtol=0)


def test_progress_rises_to_the_end() -> None:
    heard: list[float] = []
    streamed(random_model(TINY), noise(40000), 3, False, PLAN, heard.append)
    assert heard == sorted(heard)
    assert 0 < heard[0] < 0.5
    assert heard[-1] == 1.0


def test_short_clips_go_in_one_go_and_long_ones_are_streamed() -> None:
    base = ModelConfig()
    assert plan_chunks(base, 16000, None) is None
    assert plan_chunks(base, 16000 * 1800, None) is not None


def test_without_a_cap_no_clip_is_too_long() -> None:
    assert plan_chunks(ModelConfig(), 16000 * 3600 * 24, None) is not None


def test_a_cap_on_memory_makes_pieces_smaller_until_it_cannot() -> None:
    base = ModelConfig()
    samples = 16000 * 300
    roomy = plan_chunks(base, samples, 2 << 30)
    tight = plan_chunks(base, samples, 256 << 20)
    assert roomy is not None and tight is not None
    assert roomy.frames > tight.frames or roomy.heads > tight.heads
    assert streamed_bytes(base, samples, tight) <= 256 << 20
    with pytest.raises(ConfigError, match="MiB or more"):
        plan_chunks(base, samples, 32 << 20)


@pytest.mark.parametrize("key", ["memory_size", "total_memory"])
def test_a_gpu_is_given_a_part_of_its_memory(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    base = ModelConfig()
    monkeypatch.setattr(memory, "device_kind", lambda: "metal")
    monkeypatch.setattr(memory.mx, "device_info", lambda: {key: 16 << 30}, raising=False)
    assert plan_chunks(base, 16000 * 30, None) is None
    long = plan_chunks(base, 16000 * 600, None)
    assert long is not None
    assert long.frames == memory.FRAMES["metal"][-2]
    assert streamed_bytes(base, 16000 * 600, long) < 5 << 30
    monkeypatch.setattr(memory.mx, "device_info", dict, raising=False)
    assert plan_chunks(base, 16000 * 20, None) is None


@pytest.mark.parametrize(("width", "fused"), [(64, True), (80, True), (96, False), (128, True)])
def test_metals_fused_attention_holds_no_scores(
    monkeypatch: pytest.MonkeyPatch, width: int, fused: bool
) -> None:
    config = ModelConfig(encoder_embed_dim=4 * width, encoder_attention_heads=4)
    minute = 16000 * 60
    monkeypatch.setattr(memory, "device_kind", lambda: "metal")
    monkeypatch.setattr(memory.mx, "device_info", lambda: {"memory_size": 64 << 30}, raising=False)
    # quadratic in the length only where scores are held
    growth = whole_clip_bytes(config, 60 * minute) / whole_clip_bytes(config, minute)
    assert (growth < 61) is fused
    plan = plan_chunks(config, 16 * minute, 1 << 30)
    assert plan is not None
    assert (plan.queries == memory.QUERIES[-1] and plan.heads == 4) is fused


@pytest.mark.parametrize(("device", "most"), [("cpu", 1.5e9), ("metal", 4e9), ("cuda", 4e9)])
def test_half_an_hour_is_planned_into_what_its_device_is_given(
    monkeypatch: pytest.MonkeyPatch, device: str, most: float
) -> None:
    monkeypatch.setattr(memory, "device_kind", lambda: device)
    monkeypatch.setattr(memory.mx, "device_info", lambda: {"memory_size": 16 << 30}, raising=False)
    base = ModelConfig()
    samples = 16000 * 1800
    pieces = plan_chunks(base, samples, None)
    assert pieces is not None
    assert streamed_bytes(base, samples, pieces) + 4 * samples < most
    assert whole_clip_bytes(base, samples) > 10e9
