"""The exported transformers model as an ONNX file, for the engines that read one.

``python -m contentvec_parity.bench.onnx_file FOLDER FILE`` writes it, in a process of its
own: what PyTorch's exporter prints and holds is of no concern to a benchmark.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from mlx_contentvec.errors import ParityError

#: names of its input, (batch, samples), and output, (batch, frames, width)
SOURCE, FEATURES = "source", "features"
#: samples of the clips that the exporter traces, which fixes no length
TRACED = (2, 16000)


def write_onnx(folder: Path, path: Path) -> Path:
    """Write the model in a Hugging Face folder, float32, for any batch and length.

    Raises ParityError if PyTorch cannot export it.
    """
    done = subprocess.run(
        [sys.executable, "-m", __name__, str(folder), str(path)], capture_output=True, text=True
    )
    if done.returncode or not path.is_file():
        said = done.stderr.strip().splitlines()
        raise ParityError(
            "PyTorch cannot export the model to ONNX",
            found=said[-1] if said else f"exit status {done.returncode}",
        )
    return path


def main(folder: str, path: str) -> None:
    """Trace the model and write what it computed."""
    import torch
    from transformers import HubertModel

    class Features(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = HubertModel.from_pretrained(
                folder, attn_implementation="sdpa", local_files_only=True, dtype=torch.float32
            )

        def forward(self, source: Any) -> Any:
            return self.model(source).last_hidden_state

    with torch.no_grad():
        # the tracing exporter takes a quarter of the other's time (14 s, 55) for a file that
        # runs as fast, and needs no onnxscript
        torch.onnx.export(
            Features().eval(),
            (torch.zeros(TRACED),),
            path,
            input_names=[SOURCE],
            output_names=[FEATURES],
            dynamic_axes={
                SOURCE: {0: "batch", 1: "samples"},
                FEATURES: {0: "batch", 1: "frames"},
            },
            opset_version=18,
            dynamo=False,
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
