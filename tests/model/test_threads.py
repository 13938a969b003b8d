"""A loaded model belongs to no thread: load anywhere, call anywhere, several at once."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from mlx_contentvec import ContentvecModel, backend, features, first_release, memory, ops
from mlx_contentvec import model as model_module
from mlx_contentvec.backend import device_kind, mx, nn
from mlx_contentvec.errors import BackendError, WeightsError
from mlx_contentvec.ops.mlx import in_gemm_layout
from mlx_contentvec.rvc import Hubert
from mlx_contentvec.weights import is_weight
from tests import small_models
from tests.small_models import (
    CLOSE,
    assert_same,
    least_memory,
    noise,
    random_model,
    random_weights,
    random_weights_file,
)

#: with the heads of the first release, whose files do not say how many there are
DEEP = dataclasses.replace(small_models.DEEP, encoder_attention_heads=12)
WIDE = dataclasses.replace(small_models.QUANTISABLE, encoder_layers=12)
CLIP, OTHER, LONG = noise(6000), noise(9000, 1), noise(96000, 2)
Answer = TypeVar("Answer")


def in_a_thread(function: Callable[[], Answer]) -> Answer:
    """What ``function`` returns or raises in a new thread of its own."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def here(function: Callable[[], Answer]) -> Answer:
    return function()


THREADS = {"this thread": here, "another thread": in_a_thread}


# files -------------------------------------------------------------------------


def write_float16(path: Path) -> None:
    metadata = {"format": "mlx", "config": DEEP.to_json()}
    mx.save_safetensors(str(path), random_weights(DEEP, mx.float16), metadata)


def write_quantised(path: Path) -> None:
    model = random_model(WIDE)
    settings = {"group_size": 32, "bits": 8}
    nn.quantize(model.encoder, **settings)
    metadata = {"format": "mlx", "config": WIDE.to_json(), "quantization": json.dumps(settings)}
    mx.save_safetensors(str(path), dict(tree_flatten(model.parameters())), metadata)


def write_first_release(path: Path) -> None:
    weights = random_weights(dataclasses.replace(DEEP, final_dim=None))
    kernel = weights.pop("encoder.pos_conv.weight")
    weights[first_release.DIRECTION] = kernel
    weights[first_release.MAGNITUDE] = 2 * mx.sqrt((kernel * kernel).sum((0, 2), keepdims=True))
    weights[first_release.BIAS] = weights.pop("encoder.pos_conv.bias")
    mx.save_safetensors(str(path), weights)


FILES: dict[str, Callable[[Path], Any]] = {
    "float32": lambda path: random_weights_file(path, DEEP),
    "float16": write_float16,
    "quantised": write_quantised,
    "first release": write_first_release,
}


@pytest.fixture(scope="module")
def kind(file: Path) -> str:
    """What decides how close answers of a model from ``file`` must be on a GPU."""
    name = file.parent.name.rstrip("0123456789")
    return name if name in CLOSE else "float32"


@pytest.fixture(scope="module", params=FILES)
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param) / "weights.safetensors"
    FILES[request.param](path)
    return path


load = ContentvecModel.from_file


# calls -------------------------------------------------------------------------

CALLS: dict[str, Callable[[ContentvecModel], list[Any]]] = {
    "model()": lambda model: [model(CLIP[None], output_layer=9)["x"]],
    "extract": lambda model: [model.extract(CLIP, sample_rate=16000)],
    "extract_many": lambda model: list(
        model.extract_many([CLIP, OTHER], batch_seconds=2, sample_rate=16000)
    ),
    "streamed": lambda model: [
        model.extract(LONG, max_memory=least_memory(model, len(LONG)), sample_rate=16000)
    ],
    "fairseq": lambda model: list(Hubert(model).extract_features(CLIP[None], output_layer=9))[:1],
    "transformers": lambda model: list(
        Hubert(model)(CLIP[None], output_hidden_states=True).hidden_states
    ),
    "run_stage": lambda model: [
        model.run_stage("layer.3", np.ones((1, 20, model.config.encoder_embed_dim), np.float32))
    ],
}


def answer(model: ContentvecModel, call: str) -> list[np.ndarray]:
    """Arrays of numpy, computed in the thread that asks."""
    return [
        np.array(x.astype(mx.float32) if isinstance(x, mx.array) else x) for x in CALLS[call](model)
    ]


@pytest.fixture(scope="module")
def expected(file: Path) -> dict[str, list[np.ndarray]]:
    """What every call answers where nothing else happened: of a model loaded for it, here."""
    return {call: answer(load(file), call) for call in CALLS}


def assert_all_same(
    answers: list[np.ndarray], expected: list[np.ndarray], kind: str = "float32"
) -> None:
    assert len(answers) == len(expected)
    for one, other in zip(answers, expected, strict=True):
        assert_same(one, other, kind)


@pytest.mark.parametrize("called", THREADS)
@pytest.mark.parametrize("loaded", THREADS)
def test_where_a_model_is_loaded_and_where_it_is_called_is_all_the_same(
    file: Path, kind: str, expected: dict[str, list[np.ndarray]], loaded: str, called: str
) -> None:
    for call in CALLS:
        # a fresh model for every call: an earlier one may have computed what it lacks
        model = THREADS[loaded](lambda: load(file))
        found = THREADS[called](lambda m=model, c=call: answer(m, c))
        assert_all_same(found, expected[call], kind)


@pytest.mark.parametrize("change", ["set_dtype", "update", "some layers"])
def test_a_model_that_was_changed_belongs_to_no_thread_either(change: str, tmp_path: Path) -> None:
    path = random_weights_file(tmp_path / "weights.safetensors", DEEP)

    def changed() -> ContentvecModel:
        model = load(path)
        if change == "set_dtype":
            model.set_dtype(mx.float16)
        elif change == "update":
            weight = model.encoder.layers[3].fc1.weight
            model.update({"encoder": {"layers": [{}, {}, {}, {"fc1": {"weight": weight * 0.5}}]}})
        else:
            model(CLIP[None], output_layer=2)
        return model

    for call in CALLS:
        expected = answer(changed(), call)
        kind = "float16" if change == "set_dtype" else "float32"
        assert_all_same(in_a_thread(lambda c=call: answer(in_a_thread(changed), c)), expected, kind)


def test_eight_threads_share_one_model(tmp_path: Path) -> None:
    model = load(random_weights_file(tmp_path / "weights.safetensors", DEEP))
    clips = [noise(3000 + 400 * i, i) for i in range(8)]
    expected = [model.extract(clip, sample_rate=16000) for clip in clips]
    end = time.monotonic() + 3
    together = threading.Barrier(8)

    def ask(i: int) -> int:
        together.wait()
        asked = 0
        while time.monotonic() < end or asked < 2:
            assert_all_same([model.extract(clips[i], sample_rate=16000)], [expected[i]])
            asked += 1
        return asked

    with ThreadPoolExecutor(8) as pool:
        assert min(pool.map(ask, range(8))) >= 2


def test_a_first_call_may_be_made_by_several_threads(tmp_path: Path) -> None:
    path = random_weights_file(tmp_path / "weights.safetensors", DEEP)
    expected = load(path).extract(CLIP, sample_rate=16000)
    for _ in range(5):
        model, together = load(path), threading.Barrier(4)

        def ask(_: int, model: Any = model, together: Any = together) -> Any:
            together.wait()
            return model.extract(CLIP, sample_rate=16000)

        with ThreadPoolExecutor(4) as pool:
            assert_all_same(list(pool.map(ask, range(4))), [expected] * 4)


def test_an_event_loop_may_send_calls_to_threads(tmp_path: Path) -> None:
    path = random_weights_file(tmp_path / "weights.safetensors", DEEP)

    async def serve() -> list[np.ndarray]:
        hubert = await asyncio.to_thread(Hubert.load, path)
        asked = [asyncio.to_thread(hubert, clip[None]) for clip in (CLIP, OTHER, CLIP)]
        return [output.last_hidden_state for output in await asyncio.gather(*asked)]

    hubert = Hubert.load(path)
    expected = [hubert(clip[None]).last_hidden_state for clip in (CLIP, OTHER, CLIP)]
    assert_all_same(asyncio.run(serve()), expected)


# other processes ---------------------------------------------------------------

COPIES: dict[str, Callable[[ContentvecModel], ContentvecModel]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_of_a_model_is_the_model(
    file: Path, kind: str, expected: dict[str, list[np.ndarray]], how: str, used: bool
) -> None:
    model = load(file)
    if used:
        answer(model, "extract")
    twin = COPIES[how](model)
    assert type(twin) is ContentvecModel and twin.config == model.config
    assert_all_same(in_a_thread(lambda: answer(twin, "extract")), expected["extract"], kind)
    assert_all_same(answer(model, "extract"), expected["extract"], kind)


@pytest.mark.skipif(device_kind() == "metal", reason="Metal's products take any layout")
@pytest.mark.parametrize("made", ["pickle", "set_dtype"])
def test_weights_are_stored_as_loading_stores_them(file: Path, made: str) -> None:
    """Another layout may be another kernel of the BLAS, and other bits."""
    model = load(file)
    if made == "pickle":
        model = COPIES[made](model)
    else:
        model.set_dtype(mx.bfloat16)
        model.set_dtype(mx.float32)
    for name, weight in tree_flatten(model.parameters()):
        assert in_gemm_layout(weight) or not is_weight(name), name


def test_weights_given_by_rows_are_multiplied_as_those_of_a_file(tmp_path: Path) -> None:
    path = random_weights_file(tmp_path / "weights.safetensors", DEEP)
    model = load(path)
    by_rows = [(name, mx.contiguous(x)) for name, x in tree_flatten(model.parameters())]
    assert not all(in_gemm_layout(x) for _, x in by_rows) or device_kind() == "metal"
    model.update(tree_unflatten(by_rows))
    assert_all_same(answer(model, "extract"), answer(load(path), "extract"))


def other_projection(model: ContentvecModel) -> None:
    attention = model.encoder.layers[1].self_attn
    attention.k_proj = nn.Linear(*reversed(attention.k_proj.weight.shape))


def other_attention(model: ContentvecModel) -> None:
    model.encoder.layers[1].self_attn = random_model(DEEP).encoder.layers[1].self_attn


def other_layer(model: ContentvecModel) -> None:
    model.encoder.layers[1] = random_model(DEEP).encoder.layers[1]


def other_layers(model: ContentvecModel) -> None:
    model.encoder.layers = random_model(DEEP).encoder.layers


OTHER_QKV: dict[str, Callable[[ContentvecModel], Any]] = {
    "quantised": lambda model: nn.quantize(model, group_size=32, bits=8),
    "another projection": other_projection,
    "another attention": other_attention,
    "another layer": other_layer,
    "other layers": other_layers,
    "another weight": lambda model: model.update(
        {"encoder": {"layers": [{"self_attn": {"q_proj": {"bias": mx.ones(96)}}}]}}
    ),
}


@pytest.mark.parametrize("change", OTHER_QKV)
def test_a_gpu_multiplies_by_the_projections_that_a_model_has_now(
    change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading keeps queries, keys and values as one matrix, for a GPU."""
    model = random_model(DEEP)
    monkeypatch.setattr(ops, "device_kind", lambda: "cuda")
    assert model.walk()._qkv is not None
    OTHER_QKV[change](model)
    assert model.walk()._qkv is None


def test_weights_of_a_deep_copy_are_its_own() -> None:
    model = random_model(DEEP)
    expected = answer(model, "extract")
    twin = copy.deepcopy(model)
    twin.update({"layer_norm": {"bias": twin.layer_norm.bias + 1}})
    assert_all_same(answer(model, "extract"), expected)
    assert np.abs(answer(twin, "extract")[0] - expected[0]).max() > 1e-3


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_of_a_model_without_weights_has_none_either(how: str) -> None:
    arrays = random_weights(DEEP)
    del arrays["layer_norm.bias"]
    model = ContentvecModel(DEEP).load_weights(arrays.items(), strict=False)
    twin = COPIES[how](model)
    with pytest.raises(WeightsError, match=r"1 parameters never loaded: layer_norm\.bias"):
        twin(CLIP[None])


def test_a_model_goes_to_a_process_of_its_own(tmp_path: Path) -> None:
    model = load(random_weights_file(tmp_path / "weights.safetensors", DEEP))
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        sent = pool.submit(ContentvecModel.extract, model, CLIP, sample_rate=16000).result(
            timeout=60
        )
    assert_all_same([sent], answer(model, "extract"))


def test_a_layer_quantised_after_loading_belongs_to_no_thread(tmp_path: Path) -> None:
    def quantised() -> ContentvecModel:
        model = load(random_weights_file(tmp_path / "weights.safetensors", WIDE))
        nn.quantize(model, group_size=32, bits=8)
        return model

    expected = answer(quantised(), "extract")
    assert_all_same(answer(in_a_thread(quantised), "extract"), expected, "quantised")


FORKED = (
    "model.extract(clip, sample_rate=16000)",
    "model(clip[None])",
    "model.run_stage('layer.1', np.ones((1, 20, 96), np.float32))",
    "Hubert(model)(clip[None], output_hidden_states=True)",
    "model.live(context=0.1, block=0.1)",
    "model.stage_outputs(clip[None])",
    "ContentvecModel.from_file(path)",
    "pickle.loads(pickle.dumps(model))(clip[None])",
    "model.save(path + '.safetensors')",
)


def said_by(script: str) -> str:
    """What a new process prints that runs a script, and that ends well."""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=root
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system that forks")
def test_a_fork_of_a_process_that_computed_says_so_instead_of_hanging(tmp_path: Path) -> None:
    path = random_weights_file(tmp_path / "weights.safetensors", DEEP)
    script = f"""
import os, pickle, signal, numpy as np
from mlx_contentvec import ContentvecModel, ContentvecError
from mlx_contentvec.rvc import Hubert
path, clip = {str(path)!r}, np.ones(6000, np.float32)
model = ContentvecModel.from_file(path)
model.extract(clip, sample_rate=16000)
for call in {FORKED!r}:
    if os.fork() == 0:
        signal.alarm(10)
        try:
            eval(call)
            print(call, "returned", flush=True)
        except ContentvecError as error:
            print(error, flush=True)
        os._exit(0)
    assert os.wait()[1] == 0, call + " hangs"
"""
    said = said_by(script)
    assert "returned" not in said
    assert said.count("get_context('spawn')") == len(FORKED)


class _RefusingArray(type):
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, ARRAY)

    def __call__(cls, *_: Any, **__: Any) -> Any:
        raise RuntimeError("cudaMallocManaged(&data, size) failed: initialization error")


ARRAY = mx.array


class RefusingArray(metaclass=_RefusingArray):
    """What ``mx.array`` is in a fork on CUDA."""

    def __setstate__(self, _: object) -> None:
        RefusingArray()


@pytest.mark.parametrize(
    "call",
    [
        *(call for call in FORKED if "pickle" not in call and "from_file" not in call),
        "list(model.extract_many([clip, clip[:5000]], sample_rate=16000))",
        "list(model.extract_many([clip, clip[:5000]], sample_rate=16000, padding='fairseq'))",
        "model.extract(clip, sample_rate=16000, max_memory=1 << 30)",
        "model(clip[None], lengths=[5000])",
        "model(clip[None], padding_mask=clip[None] > 2)",
        "Hubert(model).extract_features(clip[None])",
        "Hubert(model).extract_features(np.stack([clip, clip]))",
        "Hubert(model).final_proj(np.ones((1, 20, 96), np.float32))",
        "pickle.dumps(model)",
        "pickle.loads(pickled)",
        "copy.deepcopy(model)",
    ],
)
def test_a_fork_is_noticed_before_the_device_is_asked_for_anything(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = random_weights_file(tmp_path / "weights.safetensors", DEEP)
    scope = {
        "model": load(path), "np": np, "Hubert": Hubert, "path": str(path),
        "clip": np.ones(6000, np.float32), "pickle": pickle, "copy": copy,
    }  # fmt: skip
    scope["pickled"] = pickle.dumps(scope["model"])
    monkeypatch.setattr(backend, "_computing", os.getpid() + 1)
    for module in (features, memory, model_module):
        monkeypatch.setattr(module, "device_kind", lambda: "cuda")
    for name in ("device_info", "get_active_memory", "get_memory_limit", "set_memory_limit"):
        monkeypatch.setattr(mx, name, RefusingArray, raising=False)
    monkeypatch.setattr(mx, "array", RefusingArray)
    with pytest.raises(BackendError, match="was forked"):
        eval(call, scope)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system that forks")
@pytest.mark.skipif(device_kind() == "cuda", reason="CUDA is initialised by importing MLX")
def test_a_fork_made_before_the_first_model_may_load_its_own(tmp_path: Path) -> None:
    path = random_weights_file(tmp_path / "weights.safetensors", DEEP)
    script = f"""
import os, signal, numpy as np
from mlx_contentvec import ContentvecModel
if os.fork() == 0:
    signal.alarm(20)
    model = ContentvecModel.from_file({str(path)!r})
    print(model.extract(np.ones(6000, np.float32), sample_rate=16000).shape)
else:
    assert os.wait()[1] == 0
"""
    said = said_by(script)
    assert said == "(18, 96)\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system that forks")
def test_on_cuda_a_fork_of_a_process_that_imported_mlx_says_so(tmp_path: Path) -> None:
    path = random_weights_file(tmp_path / "weights.safetensors", DEEP)
    script = f"""
import os, signal
import mlx.core as mx
mx.default_device = lambda: mx.Device(mx.gpu)  # what MLX for CUDA says
from mlx_contentvec import ContentvecModel, ContentvecError
ContentvecModel
if os.fork() == 0:
    signal.alarm(20)
    try:
        ContentvecModel.from_file({str(path)!r})
    except ContentvecError as error:
        print(error)
else:
    assert os.wait()[1] == 0
"""
    said = said_by(script)
    assert "forked from one that had imported MLX for CUDA" in said
    assert "or import mlx_contentvec after forking" in " ".join(said.split())
