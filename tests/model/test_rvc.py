from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_contentvec.backend import mx
from mlx_contentvec.errors import AudioError, ConfigError
from mlx_contentvec.rvc import Hubert
from tests.small_models import DEEP, in_one_go, noise, random_model, random_weights_file


@pytest.fixture(scope="module")
def hubert() -> Hubert:
    return Hubert(random_model(DEEP))


def rvc_v1(hubert: Any, feats: Any, padding_mask: Any) -> Any:
    """RVC's own lines for version v1, infer/modules/vc/pipeline.py."""
    logits = hubert.extract_features(source=feats, padding_mask=padding_mask, output_layer=9)
    return hubert.final_proj(logits[0])


def test_numpy_in_numpy_out(hubert: Hubert) -> None:
    clip = noise(16000)
    feats = rvc_v1(hubert, clip.reshape(1, -1), np.zeros((1, 16000), bool))
    assert isinstance(feats, np.ndarray) and feats.dtype == np.float32
    expected = in_one_go(hubert.model, clip, output_layer=9, project=True)
    np.testing.assert_allclose(feats[0], expected, atol=2e-5)


def test_torch_in_torch_out(torch: Any, hubert: Hubert) -> None:
    clip = noise(16000)
    feats = torch.from_numpy(clip).half().view(1, -1)
    mask = torch.BoolTensor(feats.shape).fill_(False)
    answer = rvc_v1(hubert.to("cpu").half().eval(), feats, mask)
    assert isinstance(answer, torch.Tensor) and answer.dtype == torch.float16
    heard = feats[0].float().numpy()
    expected = in_one_go(hubert.model, heard, output_layer=9, project=True)
    np.testing.assert_allclose(answer[0].float().numpy(), expected, atol=2e-2)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_mlx_in_mlx_out(hubert: Hubert, dtype: Any) -> None:
    feats, mask = hubert.extract_features(mx.array(noise(16000))[None].astype(dtype), None, 12)
    assert isinstance(feats, mx.array) and feats.dtype == dtype
    assert feats.shape == (1, 49, 96)
    assert mask is None


def test_a_long_clip_is_streamed(hubert: Hubert) -> None:
    clip = noise(16000 * 6)
    feats, _ = Hubert(hubert.model, max_memory=3 << 20).extract_features(clip[None], None, 12)
    np.testing.assert_allclose(feats[0], in_one_go(hubert.model, clip, output_layer=12), atol=3e-5)


def test_a_padded_batch_is_treated_as_fairseq_treats_it(hubert: Hubert) -> None:
    source = np.stack([noise(16000, seed) for seed in range(2)])
    padding_mask = np.zeros(source.shape, bool)
    padding_mask[1, 9000:] = True
    feats, mask = hubert.extract_features(source, padding_mask, 12)
    expected, expected_mask = hubert.model.extract_features(source, mx.array(padding_mask), 12)
    np.testing.assert_array_equal(feats, np.array(expected))
    np.testing.assert_array_equal(mask, np.array(expected_mask))
    assert mask.any()


def test_without_a_layer_the_last_one_is_given(hubert: Hubert) -> None:
    clip = noise(16000)[None]
    last, _ = hubert.extract_features(source=clip)
    np.testing.assert_allclose(last, hubert.extract_features(clip, None, 12)[0], atol=2e-5)


def test_what_cannot_be_answered_is_an_error(hubert: Hubert) -> None:
    with pytest.raises(ConfigError, match="no layer 13"):
        hubert.extract_features(noise(16000)[None], None, 13)
    with pytest.raises(AudioError, match="too short"):
        hubert.extract_features(noise(300)[None], None, 12)
    with pytest.raises(AudioError, match="divide by 32768"):
        hubert.extract_features(noise(16000)[None] * 32768, None, 12)


def test_it_loads_by_name(tmp_path: Path, hubert: Hubert) -> None:
    weights = random_weights_file(tmp_path / "deep.safetensors", DEEP)
    clip = noise(8000)[None]
    loaded = Hubert.load(weights).extract_features(clip, None, 12)[0]
    np.testing.assert_array_equal(loaded, hubert.extract_features(clip, None, 12)[0])
