"""A checkpoint built like ``hubert_base.pt`` around synthetic weights.

:mod:`contentvec_parity.standin.with_torch` writes it with torch alone,
:mod:`contentvec_parity.standin.with_fairseq` with fairseq's trainer and saver; the
tests hold the two files against each other.
"""

from __future__ import annotations

from pathlib import Path

from mlx_contentvec.errors import ConfigError, OutputError
from mlx_contentvec.files import cannot_write, check_target
from mlx_contentvec.folders import Room

from .weights import DEFAULT_SEED, DTYPES, Progress
from .with_torch import save_without_fairseq, state_without_fairseq


def write_standin(
    output: str | Path,
    preset: str = "base",
    *,
    seed: int = DEFAULT_SEED,
    dtype: str = "float16",
    made_with: str = "torch",
    legacy: bool = False,
    optimizer_state: bool = False,
    force: bool = False,
    progress: Progress = lambda done, total: None,
) -> Path:
    """Write a stand-in checkpoint and return its path.

    preset:           a key of ``weights.PRESETS``; "base" is the full size, 189.5 MB
    made_with:        "torch", or "fairseq" for its own trainer and saver
    legacy:           torch's format from before 1.6, which is no zip file
    optimizer_state:  keep Adam's moments, as unpublished checkpoints do
    progress:         called with (tensors made, tensors in all)

    The file appears at ``output`` complete or not at all. Raises OutputError if
    it exists and ``force`` is not set, ConfigError for an unknown preset or
    dtype, MissingDependency without torch (or fairseq, if asked for).
    """
    output = Path(output)
    if dtype not in DTYPES:
        raise ConfigError(f"no stand-in dtype {dtype!r}", expected=", ".join(DTYPES))
    check_target(output, force=force)
    if made_with == "fairseq":
        from .with_fairseq import save_with_fairseq as save
        from .with_fairseq import state_from_fairseq as make_state
    else:
        make_state, save = state_without_fairseq, save_without_fairseq
    state = make_state(preset, seed, dtype, optimizer_state, progress)
    with Room(output) as room:
        unfinished = room.path / "checkpoint.pt"
        try:
            save(state, unfinished, legacy)
        except (OSError, RuntimeError) as error:
            # torch's writer complains of its own position when a disk is full
            cause = error if isinstance(error, OSError) else error.__context__
            if isinstance(cause, OSError):
                raise cannot_write(output, cause) from error
            raise OutputError(
                f"cannot write {output}", found=str(error).partition("\n")[0]
            ) from error
        room.publish(unfinished, force=force, may_replace=lambda: None)
    return output
