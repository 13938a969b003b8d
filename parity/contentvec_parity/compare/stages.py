"""One parity run: inputs through the original and through MLX, compared stage by stage."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_contentvec.config import ModelConfig, stage_input, stage_names
from mlx_contentvec.errors import ParityError

from ..inputs import Clip
from ..references import Reference
from ..references.original import valid_frames
from ..references.yardsticks import Errors, Yardstick
from .candidate import MlxCandidate
from .metrics import ESSENTIAL, Difference, difference, rounding_floor
from .naming import outputs

#: fields of the configuration in which the two sides must agree before anything is run
ARCHITECTURE = (
    "conv_layers",
    "conv_bias",
    "extractor_norm",
    "encoder_embed_dim",
    "encoder_ffn_embed_dim",
    "encoder_layers",
    "encoder_layers_1",
    "encoder_attention_heads",
    "layer_norm_first",
    "conv_pos",
    "conv_pos_groups",
    "conv_pos_batch_norm",
    "normalize",
    "normalize_eps",
    "sample_rate",
)

#: other ways to ask for the same features are tried on clips of at most this length
VARIANT_SECONDS = 1.0

#: called with a clip's name before it is run
Progress = Callable[[str], None]


def require_same_architecture(reference: ModelConfig, candidate: ModelConfig) -> None:
    """Raise ParityError, naming the fields, unless the two models are alike.

    ``final_dim`` is left to the tensor proof: a port without the original's
    ``final_proj`` is incomplete, not another model.
    """
    differing = [
        name for name in ARCHITECTURE if getattr(reference, name) != getattr(candidate, name)
    ]
    if differing:
        raise ParityError(
            "the checkpoint and the converted file hold different models",
            found="; ".join(f"{name} {getattr(candidate, name)!r}" for name in differing)
            + " in the converted file",
            expected="; ".join(f"{name} {getattr(reference, name)!r}" for name in differing)
            + " as in the checkpoint",
            hint="convert this checkpoint: mlx-contentvec convert CHECKPOINT",
        )


def measure(
    reference: Reference,
    candidate: MlxCandidate,
    clips: Sequence[Clip],
    *,
    yardsticks: Mapping[str, Yardstick] | None = None,
    staged: Collection[str] | None = None,
    progress: Progress | None = None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Every row of a report: (clips, stages).

    yardsticks: name -> the original elsewhere or in another format, which is measured too
    staged: names of the clips on which every stage is compared, from the audio and by
            itself, and not the features alone; all by default
    """
    clip_rows: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    for number, clip in enumerate(clips, 1):
        if progress is not None:
            progress(f"clip {clip.name}, {number} of {len(clips)}")
        with_stages = staged is None or clip.name in staged
        clip_row, found = _measure_clip(reference, candidate, clip, with_stages, yardsticks or {})
        clip_rows.append(clip_row)
        rows += found
    return clip_rows, rows


def _measure_clip(
    reference: Reference,
    candidate: MlxCandidate,
    clip: Clip,
    with_stages: bool,
    yardsticks: Mapping[str, Yardstick],
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    config = reference.config
    mask = reference.frame_mask(clip)
    valid = None if mask is None else ~mask
    ours = reference.stages(clip)
    truth = reference.truth(clip)
    theirs = candidate.stages(clip) if with_stages else {}
    beside: dict[str, Errors] = {}
    failed = {}
    for name, yardstick in yardsticks.items():
        try:
            beside[name] = yardstick.errors(clip, reference, ours, truth, local=with_stages)
        except RuntimeError as error:
            # out of memory, or an operation that PyTorch lacks on this device or in this format
            failed[name] = str(error).partition("\n")[0][:200]

    def others(kind: str, stage: str) -> dict[str, dict[str, Any]]:
        return {
            name: errors[kind][stage] for name, errors in beside.items() if stage in errors[kind]
        }

    rows = []
    for stage in stage_names(config):
        if stage not in truth or stage not in theirs:
            # a recording may hold a part of the stages; a missing final_proj is a tensor failure
            continue
        counted = valid_frames(stage, mask)
        rows.append(
            _row(
                clip,
                "stage",
                stage,
                stage,
                theirs[stage],
                ours[stage],
                truth[stage],
                counted,
                others("stage", stage),
            )
        )
        before = stage_input(config, stage)
        if before is not None and before not in ours:
            continue
        given = reference.model_input(clip) if before is None else ours[before]
        rows.append(
            _row(
                clip,
                "local",
                stage,
                stage,
                candidate.run_stage(stage, given, mask),
                ours[stage],
                reference.local_truth(clip, stage, given),
                counted,
                others("local", stage),
            )
        )
    mask_agrees = None
    returned_by: dict[Any, tuple[NDArray[np.float32], NDArray[np.bool_] | None]] = {}
    for output in outputs(config):
        if output.stage not in truth or (output.variant and clip.seconds > VARIANT_SECONDS):
            continue
        if output.stage == "final_proj" and candidate.config.final_dim is None:
            continue
        if output.call not in returned_by:
            returned_by[output.call] = candidate.features(clip, dict(output.call))
        features, returned = returned_by[output.call]
        if output.projected:
            features = candidate.project(features)
        if mask is not None:
            mask_agrees = (
                mask_agrees is not False and returned is not None and np.array_equal(returned, mask)
            )
        row = _row(
            clip,
            "features",
            output.label,
            output.stage,
            features,
            ours[output.stage],
            truth[output.stage],
            valid,
            others("stage", output.stage),
        )
        row["variant"] = output.variant
        row["nearest"] = _nearest(features, truth, output.stage)
        rows.append(row)
    about = {
        "name": clip.name,
        "about": clip.about,
        "origin": clip.origin,
        "batch": clip.waveform.shape[0],
        "samples": clip.waveform.shape[1],
        "seconds": clip.waveform.shape[1] / config.sample_rate,
        "frames": int(truth[next(reversed(truth))].shape[1]),
        "padded": mask is not None,
        "mask_agrees": mask_agrees,
        "failed": failed,
    }
    return about, rows


def _row(
    clip: Clip,
    kind: str,
    name: str,
    stage: str,
    measured: NDArray[np.float32],
    original: NDArray[np.float32],
    truth: NDArray[np.float64],
    valid: NDArray[np.bool_] | None,
    others: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """What one stage of one clip measured: MLX and PyTorch, each against the truth.

    others: name of a further yardstick -> its metrics
    """
    metrics = None if kind == "features" else ESSENTIAL
    mine = difference(measured, truth, valid=valid, metrics=metrics)
    row: dict[str, Any] = {
        "kind": kind,
        "name": name,
        "stage": stage,
        "clip": clip.name,
        "comparable": mine.comparable,
        "shape": list(mine.shape),
        "expected_shape": list(mine.expected_shape),
        "values": mine.values,
    }
    if not mine.comparable:
        return row

    def plain(found: Difference) -> dict[str, Any]:
        return dict(found.metrics)

    row["candidate"] = plain(mine)
    row["reference"] = plain(difference(original, truth, valid=valid, metrics=metrics))
    row.update(others)
    row["floor"] = rounding_floor(truth if valid is None else truth[valid])
    if kind == "features":
        row["apart"] = plain(difference(measured, original, valid=valid))
    return row


def _nearest(
    features: NDArray[np.float32], truth: dict[str, NDArray[np.float64]], stage: str
) -> str | None:
    """The stage whose truth the features are nearest to, if it is not the one asked for."""
    distances = {
        name: float(np.square(features - exact).mean())
        for name, exact in truth.items()
        if exact.shape == features.shape
    }
    if not distances:
        return None
    nearest = min(distances, key=lambda name: distances[name])
    return None if nearest == stage else nearest
