"""The ledger: nothing unaccounted for before writing, nothing unproven after it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest

from contentvec_convert.conversion import ledger_path
from contentvec_convert.ledger import account
from contentvec_convert.rules import Drop, Plan, Rule
from contentvec_convert.sources import plan_for
from mlx_contentvec.errors import MappingError
from tests.convert.test_rules import fairseq_checkpoint


def said(plan: Plan, checkpoint: object) -> str:
    with pytest.raises(MappingError) as caught:
        account(plan, checkpoint.tensors)
    return str(caught.value)


def test_a_tensor_that_nothing_uses_is_named() -> None:
    checkpoint = fairseq_checkpoint()
    plan = plan_for(checkpoint)
    checkpoint.tensors["surplus"] = checkpoint.tensors["mask_emb"]
    assert "1 not accounted for: surplus" in said(plan, checkpoint)


def test_a_tensor_that_is_missing_is_named() -> None:
    checkpoint = fairseq_checkpoint()
    plan = plan_for(checkpoint)
    del checkpoint.tensors["final_proj.bias"]
    assert "1 missing: final_proj.bias" in said(plan, checkpoint)


def test_a_drop_of_something_absent_is_an_error_as_well() -> None:
    checkpoint = fairseq_checkpoint()
    plan = plan_for(checkpoint)
    plan = dataclasses.replace(plan, drops=(*plan.drops, Drop("nowhere", "")))
    assert "1 missing: nowhere" in said(plan, checkpoint)


def test_a_tensor_of_the_wrong_shape_is_named_with_both_shapes() -> None:
    checkpoint = fairseq_checkpoint()
    checkpoint.tensors["layer_norm.bias"].shape = (511,)  # type: ignore[misc]
    text = said(plan_for(checkpoint), checkpoint)
    assert "layer_norm.bias (511,) for layer_norm.bias (512,)" in text


def test_a_transposed_linear_weight_is_of_the_wrong_shape() -> None:
    checkpoint = fairseq_checkpoint()
    checkpoint.tensors["post_extract_proj.weight"].shape = (512, 768)  # type: ignore[misc]
    assert "post_extract_proj.weight (512, 768)" in said(plan_for(checkpoint), checkpoint)


def test_a_weight_norm_over_the_wrong_axis_is_of_the_wrong_shape() -> None:
    checkpoint = fairseq_checkpoint()
    checkpoint.tensors["encoder.pos_conv.0.weight_g"].shape = (768, 1, 1)  # type: ignore[misc]
    assert "encoder.pos_conv.0.weight_g" in said(plan_for(checkpoint), checkpoint)


def test_a_tensor_of_integers_is_named() -> None:
    checkpoint = fairseq_checkpoint()
    checkpoint.tensors["layer_norm.bias"].dtype = "int64"  # type: ignore[misc]
    assert "layer_norm.bias is int64" in said(plan_for(checkpoint), checkpoint)


def test_a_source_used_twice_and_a_target_filled_twice_are_named() -> None:
    checkpoint = fairseq_checkpoint()
    plan = plan_for(checkpoint)
    again = Rule("layer_norm.bias", ("layer_norm.bias",), "move")
    text = said(dataclasses.replace(plan, rules=(*plan.rules, again)), checkpoint)
    assert "1 used more than once: layer_norm.bias" in text
    assert "1 parameters filled twice: layer_norm.bias" in text


def test_a_parameter_that_nothing_fills_or_the_model_lacks_is_named() -> None:
    checkpoint = fairseq_checkpoint()
    plan = plan_for(checkpoint)
    moved = tuple(
        dataclasses.replace(rule, target="elsewhere") if rule.target == "layer_norm.bias" else rule
        for rule in plan.rules
    )
    text = said(dataclasses.replace(plan, rules=moved), checkpoint)
    assert "1 parameters that nothing fills: layer_norm.bias" in text
    assert "1 parameters the model does not have: elsewhere" in text


def test_long_lists_stop_at_ten_names() -> None:
    checkpoint = fairseq_checkpoint()
    plan = plan_for(checkpoint)
    for i in range(24):
        checkpoint.tensors[f"surplus.{i}"] = checkpoint.tensors["mask_emb"]
    text = said(plan, checkpoint)
    assert "surplus.9 and 14 more" in text
    assert "surplus.10" not in text


# ---- the ledger that is written


def test_the_ledger_accounts_for_every_tensor_and_byte(
    converted_tiny: Path, tiny_checkpoint: Path
) -> None:
    ledger = json.loads(ledger_path(converted_tiny).read_text())
    data = converted_tiny.read_bytes()
    assert ledger["output"]["name"] == converted_tiny.name
    assert ledger["output"]["size"] == len(data)
    assert ledger["output"]["sha256"] == hashlib.sha256(data).hexdigest()
    assert ledger["source"]["md5"] == hashlib.md5(tiny_checkpoint.read_bytes()).hexdigest()

    head = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + head])
    assert set(header) - {"__metadata__"} == {row["target"] for row in ledger["tensors"]}
    for row in ledger["tensors"]:
        begin, end = header[row["target"]]["data_offsets"]
        assert header[row["target"]]["shape"] == row["shape"]
        assert header[row["target"]]["dtype"] == row["dtype"]
        stored = data[8 + head + begin : 8 + head + end]
        assert row["sha256"] == hashlib.sha256(stored).hexdigest(), row["target"]


def test_the_ledger_lists_every_source_with_its_shape_and_every_drop_with_its_reason(
    converted_tiny: Path, tiny_checkpoint: Path
) -> None:
    from contentvec_convert.checkpoint import open_checkpoint

    ledger = json.loads(ledger_path(converted_tiny).read_text())
    listed = [source for row in ledger["tensors"] for source in row["sources"]]
    listed += ledger["drops"]
    with open_checkpoint(tiny_checkpoint) as checkpoint:
        expected = {
            name: (tensor.dtype, list(tensor.shape)) for name, tensor in checkpoint.tensors.items()
        }
    assert {row["name"]: (row["dtype"], row["shape"]) for row in listed} == expected
    assert len(listed) == len(expected) == ledger["counts"]["source_tensors"]
    assert [row["name"] for row in ledger["drops"]] == ["mask_emb", "label_embs_concat"]
    assert all(row["reason"] for row in ledger["drops"])
    assert [row["target"] for row in ledger["tensors"] if not row["exact"]] == [
        "encoder.pos_conv.weight"
    ]


def test_the_ledger_tells_no_time_and_no_folder(converted_tiny: Path) -> None:
    text = ledger_path(converted_tiny).read_text()
    assert str(converted_tiny.parent) not in text
    assert "/" not in json.dumps(json.loads(text)["source"])
