"""The checkpoint as fairseq's Trainer arranges it, written by torch alone.

Container, entries, names, shapes, dtypes, configuration and pickled classes are
those that fairseq writes; fairseq itself is not needed.
"""

from __future__ import annotations

import pickle
import types
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .weights import (
    METRICS,
    PRESETS,
    TRAIN_ITERATOR,
    TRAINING_SECONDS,
    UPDATES,
    VALIDATION,
    Progress,
    as_stored,
    checkpoint_config,
    import_torch,
    layout,
    marker,
    seeded_weights,
)


def logged_metrics() -> OrderedDict[str, list[tuple[int, str, str, dict[str, Any]]]]:
    """``extra_state["metrics"]``: (priority, name, meter, state) per aggregator.

    Source: fairseq/logging/metrics.py state_dict, after one step was logged in
    each of three aggregators, all of which count into "default".
    """

    def average(value: float, total: float, count: int, digits: int | None) -> dict[str, Any]:
        return {"val": value, "sum": total, "count": count, "round": digits}

    def rows(aggregators: int) -> list[tuple[int, str, str, dict[str, Any]]]:
        logged: list[tuple[int, str, str, dict[str, Any]]] = []
        for name, value in METRICS.items():
            total = 0.0
            for _ in range(aggregators):
                total += value * 64
            logged.append((10, name, "AverageMeter", average(value, total, 64 * aggregators, 3)))
        return logged

    train_wall = (800, "train_wall", "StopwatchMeter", {"sum": 1.0, "n": 0.0, "round": 2})

    def speed(count: float) -> tuple[int, str, str, dict[str, Any]]:
        return (900, "wps", "TimeMeter", {"init": 1.0, "n": count, "round": 1})

    everything = [
        *rows(3),
        (200, "num_updates", "AverageMeter", average(UPDATES, 0, 0, None)),
        (300, "lr", "AverageMeter", average(0.0005, 0, 0, None)),
        (790, "wall", "StopwatchMeter", {"sum": 1.0, "n": 0, "round": 0}),
        train_wall,
        speed(2000.0),
    ]
    step = [
        *rows(1),
        (500, "lr", "AverageMeter", average(0.0005, 0, 0, None)),
        train_wall,
        speed(0),
    ]
    return OrderedDict(default=everything, train=step, train_inner=step, valid=step)


class LabelDictionary:
    """Stands for ``fairseq.data.dictionary.Dictionary``: pickled under that name, with its state.

    Source: fairseq/data/dictionary.py.
    """

    def __init__(self, classes: int) -> None:
        self.bos_word, self.unk_word, self.pad_word, self.eos_word = "<s>", "<unk>", "<pad>", "</s>"
        self.symbols = ["<s>", "<pad>", "</s>", "<unk>", *(str(i) for i in range(classes))]
        self.count = [1] * len(self.symbols)
        self.indices = {symbol: i for i, symbol in enumerate(self.symbols)}
        self.bos_index, self.pad_index, self.eos_index, self.unk_index = 0, 1, 2, 3
        self.nspecial = 4


_PythonPickler: Any = pickle._Pickler  # the stubs know little of it


class _Pickler(_PythonPickler):
    """Python's own pickler, which names LabelDictionary what fairseq calls it.

    The C pickler would import ``fairseq.data.dictionary`` to check the name.
    """

    def save_global(self, obj: Any, name: str | None = None) -> None:
        if obj is LabelDictionary:
            self.write(pickle.GLOBAL + b"fairseq.data.dictionary\nDictionary\n")
            self.memoize(obj)
        else:
            super().save_global(obj, name)


def adam_state(model: Mapping[str, Any]) -> dict[str, Any]:
    """``last_optimizer_state``: fairseq's Adam in float32 after one step on made-up gradients."""
    moments = {
        i: {"step": 1, "exp_avg": tensor.float() * 0.1, "exp_avg_sq": tensor.float() ** 2 * 0.02}
        for i, tensor in enumerate(model.values())
    }
    group = {
        "lr": 0.0,  # the schedule has run out
        "betas": (0.9, 0.98),
        "eps": 1e-06,
        "weight_decay": 0.01,
        "amsgrad": False,
        "params": list(range(len(moments))),
    }
    return {"state": moments, "param_groups": [group]}


def state_without_fairseq(
    preset: str, seed: int, dtype: str, optimizer_state: bool, progress: Progress
) -> dict[str, Any]:
    """Everything that goes into the file, arranged as fairseq's Trainer.state_dict does."""
    config = checkpoint_config(preset)
    state = layout(config["model"], PRESETS[preset].classes)

    model: Any = OrderedDict()
    for name, values in seeded_weights(preset, seed):
        model[name] = as_stored(values, dtype)
        progress(len(model), len(state.tensors))
    model._metadata = OrderedDict((name, {"version": 1}) for name in state.modules)

    config["checkpoint"]["no_save_optimizer_state"] = not optimizer_state
    everything = {
        "args": None,
        "cfg": config,
        "model": model,
        "criterion": None,
        "optimizer_history": [
            {
                "criterion_name": "HubertCriterion",
                "optimizer_name": "FP16Optimizer",
                "lr_scheduler_state": {"best": None},
                "num_updates": UPDATES,
            }
        ],
        "task_state": {"dictionaries": [LabelDictionary(PRESETS[preset].classes)]},
        "extra_state": {
            "metrics": logged_metrics(),
            "previous_training_time": TRAINING_SECONDS,
            "train_iterator": TRAIN_ITERATOR,
            **VALIDATION,
            "stand_in": marker(preset, seed),
        },
    }
    if optimizer_state:
        everything["last_optimizer_state"] = adam_state(model)
    return everything


def save_without_fairseq(state: dict[str, Any], path: Path, legacy: bool) -> None:
    """torch.save as fairseq calls it: through an open file, so the archive's root is "archive"."""
    torch = import_torch()
    pickler = types.SimpleNamespace(__name__="pickle", Pickler=_Pickler, dump=pickle.dump)
    with path.open("wb") as file:
        torch.save(state, file, pickle_module=pickler, _use_new_zipfile_serialization=not legacy)
