"""One implementation in a process of its own, timed on request.

``python -m contentvec_parity.bench.worker JSON`` loads what the JSON names, then
answers one line of JSON on stdout for each line of JSON on stdin, until stdin ends.
The implementations cannot share a process: their thread pools and BLAS libraries
would meet, and whichever is imported first would look slower.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from .onnx_file import FEATURES, SOURCE

Waveform = NDArray[np.float32]
#: (batch, samples) in, (batch, frames, width) out, computed when it returns
Run = Callable[[Waveform], NDArray[np.float32]]


class ProcessMemory:
    """Memory of this process in bytes, as the system counts it; None where there is no /proc."""

    def held(self) -> int | None:
        """What is held now, after what is free was given back; the peak starts anew."""
        gc.collect()
        if sys.platform != "linux":
            return None
        try:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
        except (OSError, AttributeError):
            return None
        return _status("VmRSS")

    def peak(self) -> int | None:
        """The most that was held since."""
        return _status("VmHWM")


def _status(field: str) -> int | None:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    line = next(line for line in status.splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def _most() -> int:
    """The peak of this process so far in bytes.

    Linux hands the parent's peak down in ru_maxrss, but not in VmHWM.
    """
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class MlxMemory:
    """Memory that MLX has taken on its device."""

    def held(self) -> int | None:
        """What arrays hold now; the peak starts anew."""
        from mlx_contentvec.backend import mx

        # the cache of freed memory stays, as torch's does: both count what arrays hold
        mx.reset_peak_memory()
        return int(mx.get_active_memory())

    def peak(self) -> int | None:
        """The most that arrays held since."""
        from mlx_contentvec.backend import mx

        return int(mx.get_peak_memory())


class CudaMemory:
    """Memory that torch has taken on a CUDA device."""

    def held(self) -> int | None:
        """What tensors hold now; the peak starts anew."""
        import torch

        torch.cuda.reset_peak_memory_stats()
        return int(torch.cuda.memory_allocated())

    def peak(self) -> int | None:
        """The most that tensors held since."""
        import torch

        return int(torch.cuda.max_memory_allocated())


def _mlx_on(settings: dict[str, Any]) -> Any:
    """``mlx.core``, computing where it is told to."""
    from mlx_contentvec.backend import mx

    if settings["device"] == "cpu":
        mx.set_default_device(mx.cpu)
    return mx


def _mlx(path: str, settings: dict[str, Any]) -> Run:
    from mlx_contentvec.memory import bounded, limit_of, whole_clip_bytes
    from mlx_contentvec.model import ContentvecModel
    from mlx_contentvec.ops.host_copy import to_numpy

    mx = _mlx_on(settings)
    model = ContentvecModel.from_file(path)

    def run(source: Waveform) -> NDArray[np.float32]:
        batch, samples = source.shape
        # in one go whatever it takes, but without the freed buffers of other lengths
        stored = model.layer_norm.weight.dtype
        needed = whole_clip_bytes(model.config, samples, batch, stored)
        with bounded(max(limit_of(None), needed), needed, stored):
            features: Any = model(source)["x"]
            return to_numpy(features.astype(mx.float32))

    return run


def _extract(path: str, settings: dict[str, Any]) -> Run:
    """What a user calls: clips of any length, in pieces where they are long."""
    from mlx_contentvec.model import ContentvecModel

    _mlx_on(settings)
    model = ContentvecModel.from_file(path)

    def run(source: Waveform) -> NDArray[np.float32]:
        return np.stack(list(model.extract_many(source, sample_rate=model.config.sample_rate)))

    return run


def _live(path: str, settings: dict[str, Any]) -> Run:
    """The next block of a stream, at the settings of RVC's real-time window."""
    from mlx_contentvec.model import ContentvecModel

    _mlx_on(settings)
    model = ContentvecModel.from_file(path)
    stream = model.live(layer=model.config.encoder_layers)

    def run(source: Waveform) -> NDArray[np.float32]:
        return stream.push(source[0, -stream.window.block_samples :])[None]

    return run


def _torch_device(settings: dict[str, Any]) -> Any:
    import torch

    torch.set_num_threads(settings["threads"])
    torch.set_grad_enabled(False)
    if settings["device"] == "cpu":
        return torch.device("cpu")
    # convolutions would use it unasked
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return torch.device("cuda" if torch.cuda.is_available() else "mps")


def _as_wanted(source: Waveform, settings: dict[str, Any]) -> Waveform:
    """Each clip as the original is given it, normalised if the model wants that."""
    eps = settings["normalize_eps"]
    if eps is None:
        return source
    centred = source - source.mean(axis=1, keepdims=True)
    deviation = np.sqrt((centred**2).mean(axis=1, keepdims=True) + np.float32(eps))
    normalized: Waveform = centred / deviation
    return normalized


def _on_torch(call: Callable[[Any], Any], settings: dict[str, Any], device: Any) -> Run:
    import torch

    dtype = getattr(torch, settings["dtype"])

    def run(source: Waveform) -> NDArray[np.float32]:
        given = torch.from_numpy(_as_wanted(source, settings))
        features: NDArray[np.float32] = call(given.to(device, dtype)).float().cpu().numpy()
        return features

    return run


def _transformers_model(path: str, settings: dict[str, Any], device: Any) -> Any:
    import torch
    from transformers import HubertModel

    model = HubertModel.from_pretrained(
        path,
        attn_implementation="sdpa",
        local_files_only=True,
        dtype=getattr(torch, settings["dtype"]),
    )
    return model.to(device).eval()


def _transformers(path: str, settings: dict[str, Any]) -> Run:
    device = _torch_device(settings)
    model = _transformers_model(path, settings, device)
    return _on_torch(lambda source: model(source).last_hidden_state, settings, device)


def _torch_compile(path: str, settings: dict[str, Any]) -> Run:
    """The transformers model compiled for each length: dynamic shapes run slower."""
    import torch

    device = _torch_device(settings)
    compiled = torch.compile(_transformers_model(path, settings, device), dynamic=False)
    shape = None

    def call(source: Any) -> Any:
        nonlocal shape
        if source.shape != shape:
            # after a number of shapes PyTorch would go on uncompiled
            torch.compiler.reset()
            shape = source.shape
        return compiled(source).last_hidden_state

    return _on_torch(call, settings, device)


def _onnxruntime(path: str, settings: dict[str, Any]) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = settings["threads"]
    provider = "CPUExecutionProvider" if settings["device"] == "cpu" else "CUDAExecutionProvider"
    if provider not in onnxruntime.get_available_providers():
        raise RuntimeError(f"this build of onnxruntime has no {provider}")
    # as shipped it would use TF32
    choices = [(provider, {} if settings["device"] == "cpu" else {"use_tf32": "0"})]
    session = onnxruntime.InferenceSession(path, options, providers=choices)

    def run(source: Waveform) -> NDArray[np.float32]:
        features: NDArray[np.float32]
        (features,) = session.run([FEATURES], {SOURCE: _as_wanted(source, settings)})
        return features

    return run


def _openvino(path: str, settings: dict[str, Any]) -> Run:
    import openvino

    if settings["device"] != "cpu":
        raise RuntimeError("openvino is measured on a CPU only")
    compiled = openvino.Core().compile_model(
        path,
        "CPU",
        {
            # bfloat16 is what it takes by itself where the processor has it
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": settings["threads"],
            "PERFORMANCE_HINT": "LATENCY",
        },
    )

    def run(source: Waveform) -> NDArray[np.float32]:
        return np.array(compiled(_as_wanted(source, settings))[FEATURES])

    return run


def _fairseq(path: str, settings: dict[str, Any]) -> Run:
    """As RVC loads it: infer/modules/vc/utils.py ``load_hubert``."""
    import torch
    from fairseq.checkpoint_utils import load_model_ensemble_and_task
    from fairseq.data.dictionary import Dictionary

    device = _torch_device(settings)
    with torch.serialization.safe_globals([Dictionary]):
        models, _, _ = load_model_ensemble_and_task([path], suffix="")
    model = models[0].to(device, getattr(torch, settings["dtype"])).eval()

    def call(source: Any) -> Any:
        mask = torch.zeros(source.shape, dtype=torch.bool, device=device)
        return model.extract_features(source=source, padding_mask=mask)[0]

    return _on_torch(call, settings, device)


#: rows, inner length and columns of the product whose speed stands for the machine's
PRODUCT = (1536, 768, 3072)
#: how many of it are timed together: a GPU would spend most of the time of one on starting it
PRODUCTS = {"cpu": 1, "gpu": 64}


def _floor(path: str, settings: dict[str, Any]) -> Run:
    """Reads the weights, and multiplies matrices of the model's widths: no forward pass."""
    mx = _mlx_on(settings)
    np.fromfile(path, np.uint8)
    rows, inner, columns = PRODUCT
    left, right = mx.random.normal((rows, inner)), mx.random.normal((inner, columns))
    mx.eval(left, right)

    def run(source: Waveform) -> NDArray[np.float32]:
        mx.eval([left @ right for _ in range(PRODUCTS[settings["device"]])])
        return np.zeros((1, 1, 1), np.float32)

    return run


#: name -> loads a path and gives the function to time
ENGINES: dict[str, Callable[[str, dict[str, Any]], Run]] = {
    "mlx": _mlx,
    "extract": _extract,
    "live": _live,
    "transformers": _transformers,
    "fairseq": _fairseq,
    "torch-compile": _torch_compile,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "floor": _floor,
}


def _memory(engine: str, device: str) -> ProcessMemory | MlxMemory | CudaMemory:
    """How to measure this engine's memory."""
    if device == "cpu" or engine == "onnxruntime":
        return ProcessMemory()
    if engine in ("mlx", "extract", "live", "floor"):
        return MlxMemory()
    import torch

    return CudaMemory() if torch.cuda.is_available() else ProcessMemory()


@functools.lru_cache(maxsize=1)
def _clips(seconds: float, batch: int) -> Waveform:
    from contentvec_parity.inputs import SAMPLE_RATE, speech_like

    return np.stack([speech_like(round(seconds * SAMPLE_RATE), 7 + row) for row in range(batch)])


def _answer(
    run: Run, memory: ProcessMemory | MlxMemory | CudaMemory, request: dict[str, Any]
) -> dict[str, Any]:
    source = _clips(request["seconds"], request["batch"])
    if request["twice"]:
        run(source)
    peak_before = _most()
    held = memory.held() if request["memory"] else None
    cpu, wall = time.process_time(), time.perf_counter()
    features = run(source)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = memory.peak()
    if request["save"]:
        np.save(request["save"], features)
    return {
        "wall": wall,
        "cpu": cpu,
        "memory": None if held is None or peak is None else peak - held,
        "process_peak": max(peak_before, _most()),
    }


def _serve(settings: dict[str, Any], requests: TextIO) -> Iterator[dict[str, Any]]:
    began = time.perf_counter()
    run = ENGINES[settings["engine"]](settings["path"], settings)
    yield {"load": time.perf_counter() - began}
    memory = _memory(settings["engine"], settings["device"])
    for line in requests:
        yield _answer(run, memory, json.loads(line))


def main() -> int:
    """Serve until stdin ends. What libraries print goes to stderr; so does why it failed, last."""
    settings = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        for answer in _serve(settings, sys.stdin):
            answers.write(json.dumps(answer) + "\n")
            answers.flush()
    except Exception as error:
        print(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
