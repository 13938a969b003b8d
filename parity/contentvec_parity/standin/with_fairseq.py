"""The stand-in as fairseq's own code writes it: the truth about the file format.

The configuration goes through fairseq's ``add_defaults``; task, model, criterion,
optimizer and schedule are fairseq's; ``Trainer.state_dict`` arranges the file and
``torch_persistent_save`` writes it. Ours are the weights, the figures in the
metrics, and the edits that turned ContentVec's own checkpoint into the "legacy"
one that RVC ships.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_contentvec.errors import MissingDependency

from . import weights as standin
from .weights import PRESETS, Progress

#: What ContentVec's training run sets, by its contentvec.yaml and launch script;
#: fairseq's defaults fill in the rest.
TRAINING_RUN: dict[str, dict[str, Any]] = {
    "common": {
        "fp16": True,
        "log_format": "json",
        "log_interval": 200,
        "seed": 1337,
        "tensorboard_logdir": "tblog",
    },
    "checkpoint": {
        "save_interval_updates": 25000,
        "keep_interval_updates": 1,
        "no_epoch_checkpoints": True,
        "keep_best_checkpoints": 10,
        "no_save_optimizer_state": True,
    },
    "distributed_training": {
        "ddp_backend": "no_c10d",
        "distributed_backend": "nccl",
        "distributed_world_size": 1,
        "distributed_port": 29671,
        "nprocs_per_node": 1,
        "find_unused_parameters": True,
    },
    "task": {
        "_name": "hubert_pretraining",
        "data": "metadata",
        "label_dir": "label",
        "labels": ["km"],
        "label_rate": 50.0,
        "sample_rate": 16000,
        "max_sample_size": 250000,
        "min_sample_size": 32000,
        "pad_audio": False,
        "random_crop": True,
        "normalize": False,
    },
    "dataset": {
        "num_workers": 10,
        "max_tokens": 500000,
        "skip_invalid_size_inputs_valid_test": True,
        "validate_interval": 5,
        "validate_interval_updates": 10000,
        "train_subset": "train",
        "valid_subset": "valid",
    },
    "criterion": {
        "_name": "hubert",
        "pred_masked_weight": 1.0,
        "pred_nomask_weight": 0.0,
        "loss_weights": [10, 1e-5],
    },
    "optimization": {
        "max_update": standin.UPDATES,
        "lr": [0.0005],
        "clip_norm": 10.0,
        "update_freq": [1],
    },
    "optimizer": {
        "_name": "adam",
        "adam_betas": "(0.9,0.98)",
        "adam_eps": 1e-06,
        "weight_decay": 0.01,
    },
    "lr_scheduler": {
        "_name": "polynomial_decay",
        "warmup_updates": 8000,
        "total_num_update": standin.UPDATES,
    },
    "model": {
        "_name": "hubert",
        "label_rate": 50.0,
        "skip_masked": False,
        "skip_nomask": False,
        "mask_prob": 0.80,
        "extractor_mode": "default",
        "conv_feature_layers": "[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2",
        "final_dim": 256,
        "encoder_layerdrop": 0.05,
        "dropout_input": 0.1,
        "dropout_features": 0.1,
        "dropout": 0.1,
        "attention_dropout": 0.1,
        "feature_grad_mult": 0.1,
        "untie_final_proj": True,
        "activation_dropout": 0.0,
    },
}

#: What ContentVec's model class has and HubertConfig has not: it stays in the file.
CONTENTVEC_LEFTOVERS: dict[str, Any] = {
    "encoder_layers_1": 3,
    "ctr_layers": [-6],
    "logit_temp_ctr": 0.1,
    "num_negatives": 100,
    "cross_sample_negatives": 0,
}


def _require_fairseq() -> None:
    try:
        import fairseq  # noqa: F401
    except ImportError as error:
        raise MissingDependency(
            "fairseq is not installed",
            found=str(error),
            hint="scripts/quickstart installs it into .venv; without it, leave --with fairseq out",
        ) from None


def training_config(preset: str) -> Any:
    """The run's configuration as fairseq-hydra-train has it before it starts: a DictConfig."""
    from fairseq.dataclass.configs import FairseqConfig
    from fairseq.dataclass.initialize import add_defaults
    from fairseq.dataclass.utils import omegaconf_no_object_check
    from omegaconf import OmegaConf

    run = {group: dict(values) for group, values in TRAINING_RUN.items()}
    run["model"].update(PRESETS[preset].model)
    run["task"].update(PRESETS[preset].task)
    config = OmegaConf.merge(OmegaConf.structured(FairseqConfig), OmegaConf.create(run))
    add_defaults(config)
    # fairseq_cli/hydra_train.py flattens it the same way
    with omegaconf_no_object_check():
        config = OmegaConf.create(OmegaConf.to_container(config, resolve=True, enum_to_str=True))
    OmegaConf.set_struct(config, True)
    return config


@contextlib.contextmanager
def _labels(config: Any, classes: int) -> Iterator[None]:
    """Point the task at a made dictionary of k-means classes, and put its path back afterwards."""
    from omegaconf import open_dict

    recorded = config.task.label_dir
    with tempfile.TemporaryDirectory() as folder:
        lines = "".join(f"{i} 1\n" for i in range(classes))
        (Path(folder) / "dict.km.txt").write_text(lines, encoding="utf-8")
        with open_dict(config):
            config.task.label_dir = folder
        try:
            yield
        finally:
            config.task.label_dir = recorded


def _log_metrics() -> None:
    """Leave behind what a run that logged one step leaves behind."""
    from fairseq.logging import metrics

    for aggregator in ("train", "train_inner", "valid"):
        with metrics.aggregate(aggregator, new_root=False):
            for name, value in standin.METRICS.items():
                metrics.log_scalar(name, value, weight=64, round=3)
            metrics.log_speed("wps", 1000.0, priority=900, round=1)
            metrics.log_scalar("lr", 5e-4, weight=0, priority=500)
            metrics.log_start_time("train_wall", priority=800, round=2)
            metrics.log_stop_time("train_wall")


#: meter -> the entry of its state that holds a clock reading
_CLOCKS = {"TimeMeter": "init", "StopwatchMeter": "sum"}


def state_from_fairseq(
    preset: str, seed: int, dtype: str, optimizer_state: bool, progress: Progress
) -> dict[str, Any]:
    """Everything that goes into the file, from fairseq's Trainer.

    The same dictionary as with_torch.state_without_fairseq gives, weights included.
    Raises MissingDependency without fairseq.
    """
    torch = standin.import_torch()
    _require_fairseq()
    from fairseq import tasks, utils
    from fairseq.logging import metrics
    from fairseq.trainer import Trainer
    from omegaconf import open_dict

    config = training_config(preset)
    config.checkpoint.no_save_optimizer_state = not optimizer_state
    # FP16Optimizer needs a GPU: train in float32, and say afterwards what the run said
    config.common.fp16 = False
    with _labels(config, PRESETS[preset].classes):
        task = tasks.setup_task(config.task)
        _ = task.dictionaries  # read now, while the folder exists
        model = task.build_model(config.model)
        criterion = task.build_criterion(config.criterion)
    with open_dict(task.cfg):
        task.cfg.label_dir = config.task.label_dir

    stored = {
        name: standin.as_stored(values, dtype)
        for name, values in standin.seeded_weights(preset, seed)
    }
    progress(0, len(stored))
    model.load_state_dict({name: tensor.float() for name, tensor in stored.items()}, strict=True)
    progress(len(stored), len(stored))

    metrics.reset()  # of whatever this process trained before
    trainer = Trainer(config, task, model, criterion)
    trainer.lr_scheduler  # noqa: B018 (builds the optimizer too)
    if optimizer_state:
        for parameter in model.parameters():
            parameter.grad = parameter.detach().clone()
        trainer.optimizer.step()
        trainer.consolidate_optimizer()  # as before every save
    trainer.set_num_updates(standin.UPDATES)
    _log_metrics()

    state: dict[str, Any] = utils.move_to_cpu(trainer.state_dict())
    # fairseq saves float32; whoever made the shipped file converted it afterwards
    for name, tensor in stored.items():
        state["model"][name] = tensor.clone(memory_format=torch.contiguous_format)
    state["cfg"]["common"]["fp16"] = True
    state["optimizer_history"][0]["optimizer_name"] = "FP16Optimizer"
    recorded = standin.checkpoint_config(preset)["model"]
    leftovers = {**state["cfg"]["model"], **CONTENTVEC_LEFTOVERS}
    state["cfg"]["model"] = {key: leftovers[key] for key in recorded}

    extra_state = state["extra_state"]
    for rows in extra_state["metrics"].values():
        for _, _, meter, values in rows:
            if meter in _CLOCKS:
                values[_CLOCKS[meter]] = 1.0
    extra_state["previous_training_time"] = standin.TRAINING_SECONDS
    extra_state["train_iterator"] = standin.TRAIN_ITERATOR
    extra_state.update(standin.VALIDATION)
    extra_state["stand_in"] = standin.marker(preset, seed)
    return state


def save_with_fairseq(state: dict[str, Any], path: Path, legacy: bool) -> None:
    """Write with fairseq's saver; the older format, which that no longer writes, with torch."""
    if legacy:
        torch = standin.import_torch()
        with path.open("wb") as file:
            torch.save(state, file, _use_new_zipfile_serialization=False)
    else:
        from fairseq.checkpoint_utils import torch_persistent_save

        torch_persistent_save(state, str(path))
