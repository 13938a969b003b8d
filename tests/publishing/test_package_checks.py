"""Papers that do not fit the weights they are about, each wrong in one place."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from contentvec_convert.known_files import CONTENTVEC
from contentvec_parity.publishing import checks
from contentvec_parity.publishing.evidence import Evidence
from contentvec_parity.references import recording
from contentvec_parity.report import document as report
from mlx_contentvec.errors import ConfigError, ContentvecError, HubError, ParityError

Json = dict[str, Any]
LEDGER, PARITY = Path("ledger.json"), Path("parity.json")


@pytest.fixture(scope="module")
def found(evidence_folder: Path) -> Evidence:
    weights = evidence_folder / "float32.safetensors"
    with safe_open(weights, framework="numpy") as file:
        metadata = file.metadata()
    return Evidence(
        "float32",
        weights,
        metadata,
        hashlib.sha256(weights.read_bytes()).hexdigest(),
        json.loads((evidence_folder / "float32.ledger.json").read_text()),
        report.read(evidence_folder / "float32.parity.json"),
    )


@pytest.fixture
def evidence(found: Evidence) -> Evidence:
    return replace(found, **{k: copy.deepcopy(getattr(found, k)) for k in ("ledger", "parity")})


def test_the_papers_as_they_were_written_fit(evidence: Evidence) -> None:
    checks.check_metadata(evidence.weights, evidence.metadata)
    checks.check_ledger(evidence, LEDGER)
    checks.check_ledger_rows(evidence, LEDGER)
    checks.check_parity(evidence, PARITY)


# ---- metadata


def known(**facts: Any) -> str:
    """A source that says it is the known file, with some of its facts exchanged."""
    row = CONTENTVEC
    source = {"size": row.size, "md5": row.md5, "sha256": row.sha256, "known_as": row.key}
    return json.dumps({**source, **facts})


METADATA: dict[str, tuple[dict[str, str | None], str]] = {
    "no config": ({"config": None}, "was not written by"),
    "no source": ({"source": None}, "was not written by"),
    "no dtype": ({"dtype": None}, "was not written by"),
    "of torch": ({"format": "pt"}, "was not written by"),
    "no format": ({"format": None}, "was not written by"),
    "a config that is no object": ({"config": "[]"}, "cannot be read"),
    "a quantization that is no object": ({"quantization": "7"}, "cannot be read"),
    "a source of no size": ({"source": '{"md5": "a", "sha256": "b"}'}, "what it was made from"),
    "a source of a size in text": (
        {"source": '{"size": "1", "md5": "a", "sha256": "b"}'},
        "what it was made from",
    ),
    "a known source of another size": ({"source": known(size=1)}, "not made from what it says"),
    "a known source of another hash": (
        {"source": known(sha256="0" * 64)},
        "not made from what it says",
    ),
    "a known source of no row": ({"source": known(known_as="other")}, "not made from what it"),
    "a known source of a number": ({"source": known(known_as=0)}, "not made from what it says"),
    "a format that there is not": ({"dtype": "q1"}, "in no known number format"),
}


@pytest.mark.parametrize("name", METADATA)
def test_metadata_that_convert_does_not_write_are_refused(evidence: Evidence, name: str) -> None:
    changes, said = METADATA[name]
    metadata = {**evidence.metadata, **changes}
    with pytest.raises(HubError) as refused:
        checks.check_metadata(
            evidence.weights, {key: value for key, value in metadata.items() if value is not None}
        )
    assert said in str(refused.value)


def test_metadata_of_others_are_named() -> None:
    for metadata, found in (({}, "metadata none"), ({"b": "", "a": ""}, "metadata a, b")):
        with pytest.raises(HubError) as refused:
            checks.check_metadata(Path("weights.safetensors"), metadata)
        assert refused.value.found == found


def test_an_impossible_configuration_is_refused(evidence: Evidence) -> None:
    config = {**json.loads(evidence.metadata["config"]), "encoder_layers": 10**9}
    with pytest.raises(ConfigError):
        checks.check_metadata(evidence.weights, {**evidence.metadata, "config": json.dumps(config)})


def test_metadata_of_a_known_source_are_taken(evidence: Evidence) -> None:
    metadata = {**evidence.metadata, "source": known(), "quantization": "{}"}
    checks.check_metadata(evidence.weights, metadata)


# ---- the ledger

LEDGERS: dict[str, tuple[Callable[[Json], Any], str]] = {
    "about nothing": (lambda d: d.update(output=None), "is not about"),
    "about another file": (lambda d: d["output"].update(sha256="0" * 64), "is not about"),
    "of a source without a name": (lambda d: d["source"].pop("name"), "does not fit"),
    "of a source of another name": (lambda d: d["source"].update(name=7), "does not fit"),
    "of another source": (lambda d: d["source"].update(size=1), "does not fit"),
    "of another configuration": (lambda d: d["config"].update(normalize=True), "does not fit"),
}
ROWS: dict[str, tuple[Callable[[Json], Any], str]] = {
    "no tensors": (lambda d: d.pop("tensors"), "no tensors, drops or counts"),
    "drops that are an object": (lambda d: d.update(drops={}), "no tensors, drops or counts"),
    "counts in a list": (lambda d: d.update(counts=[]), "no tensors, drops or counts"),
    "a row that is a text": (lambda d: d["tensors"].append("x"), "that is not described"),
    **{
        f"a row without {key}": (
            lambda d, key=key: d["tensors"][0].pop(key),  # type: ignore[misc]
            "that is not described",
        )
        for key in checks._ROW
    },
    "a source that is a text": (
        lambda d: d["tensors"][0].update(sources=["x"]),
        "a source tensor without a name",
    ),
    "a drop without a name": (
        lambda d: d["drops"][0].pop("name"),
        "a source tensor without a name",
    ),
    "a row less": (lambda d: d["tensors"].pop(), "66 tensors, 67 are in the file"),
    "a row twice": (lambda d: d["tensors"].append(d["tensors"][0]), "68 tensors, 67 are in"),
    "a row of another tensor": (
        lambda d: d["tensors"][0].update(target="other"),
        "67 tensors, 67 are in the file",
    ),
    "another dtype": (lambda d: d["tensors"][0].update(dtype="F16"), "is not as it says"),
    "another shape": (lambda d: d["tensors"][0].update(shape=[1]), "is not as it says"),
    "other bytes": (lambda d: d["tensors"][0].update(sha256="0" * 64), "is not as it says"),
    **{
        f"other counts of {key}": (
            lambda d, key=key: d["counts"].update({key: 1}),  # type: ignore[misc]
            "counts that its rows do not have",
        )
        for key in ("source_tensors", "dropped", "written", "exact")
    },
}


@pytest.mark.parametrize("name", LEDGERS)
def test_a_ledger_of_something_else_is_refused(evidence: Evidence, name: str) -> None:
    change, said = LEDGERS[name]
    assert isinstance(evidence.ledger, dict)
    change(evidence.ledger)
    with pytest.raises(ContentvecError) as refused:
        checks.check_ledger(evidence, LEDGER)
    assert said in str(refused.value)


@pytest.mark.parametrize("name", ROWS)
def test_a_ledger_that_does_not_account_for_a_tensor_is_refused(
    evidence: Evidence, name: str
) -> None:
    change, said = ROWS[name]
    assert isinstance(evidence.ledger, dict)
    change(evidence.ledger)
    with pytest.raises(HubError) as refused:
        checks.check_ledger_rows(evidence, LEDGER)
    assert said in str(refused.value)


# ---- the report

REPORTS: dict[str, tuple[Callable[[Json], Any], str]] = {
    "about another file": (lambda d: d["weights"].update(sha256="0" * 64), "is not about"),
    **{
        f"of a checkpoint of another {key}": (
            lambda d, key=key: d["source"].update({key: "other"}),  # type: ignore[misc]
            "compared with another checkpoint",
        )
        for key in ("sha256", "md5", "size", "known_as")
    },
    "of another format": (lambda d: d["weights"].update(precision="q8"), "another number format"),
    "of another model": (lambda d: d["config"].update(normalize=True), "another model"),
    "without tensors": (lambda d: d.update(tensors=None), "did not compare the tensors"),
    "of a recording": (
        lambda d: d["reference"].update(name="recording"),
        "did not compare the tensors",
    ),
    "without a clip": (lambda d: d["clips"].pop(), "lacks an input"),
    "of another length": (lambda d: d["clips"][0].update(samples=1), "lacks an input"),
    "of a failure": (
        lambda d: d["tensors"]["failures"].append({"name": "a", "what": "b", "stage": "conv.0"}),
        "has not passed parity",
    ),
}


@pytest.mark.parametrize("name", REPORTS)
def test_a_report_of_something_else_proves_nothing(evidence: Evidence, name: str) -> None:
    change, said = REPORTS[name]
    change(evidence.parity)
    with pytest.raises(HubError) as refused:
        checks.check_parity(evidence, PARITY)
    assert said in str(refused.value)


# ---- the recording


def test_a_recording_may_have_the_size_of_its_limit(
    evidence: Evidence, evidence_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = evidence_folder / "float32.recording.safetensors"
    size = path.stat().st_size
    assert checks.RECORDING_LIMIT == 10_000_000
    monkeypatch.setattr(checks, "RECORDING_LIMIT", size)
    checks.check_recording(path, [evidence])
    monkeypatch.setattr(checks, "RECORDING_LIMIT", size - 1)
    with pytest.raises(HubError, match="too large to ship"):
        checks.check_recording(path, [evidence])


def test_a_recording_is_held_against_the_weights_unless_they_were_proven(
    evidence: Evidence, evidence_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = evidence_folder / "float32.recording.safetensors"
    half = replace(evidence, dtype="float16", weights=evidence_folder / "float16.safetensors")
    checks.check_recording(path, [evidence, half])
    failed = {"failures": [{"name": "layer_norm.weight"}]}
    monkeypatch.setattr(checks.tensors, "prove_by_hash", lambda *_: failed)
    checks.check_recording(path, [evidence], proven=True)
    with pytest.raises(HubError, match="was recorded from other weights") as refused:
        checks.check_recording(path, [evidence])
    assert "layer_norm.weight" in str(refused.value)
    other = json.dumps({**json.loads(evidence.metadata["source"]), "sha256": "0" * 64})
    stranger = replace(evidence, metadata={**evidence.metadata, "source": other})
    with pytest.raises(HubError, match="was recorded from another checkpoint"):
        checks.check_recording(path, [stranger], proven=True)


def test_a_recording_that_lacks_a_clip_is_refused_whatever_was_proven(
    evidence: Evidence, evidence_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = evidence_folder / "float32.recording.safetensors"
    clips = recording.small()
    longer = replace(clips[0][0], name="another")
    monkeypatch.setattr(recording, "small", lambda: [*clips, (longer, clips[0][1])])
    with pytest.raises(ParityError, match="another"):
        checks.check_recording(path, [evidence], proven=True)


def test_a_recording_of_another_architecture_is_refused(
    evidence: Evidence, evidence_folder: Path
) -> None:
    config = json.loads(evidence.metadata["config"])
    # of as many numbers in the same tensors
    config["encoder_attention_heads"] *= 2
    other = replace(evidence, metadata={**evidence.metadata, "config": json.dumps(config)})
    with pytest.raises(ParityError, match="encoder_attention_heads"):
        checks.check_recording(evidence_folder / "float32.recording.safetensors", [other])


def test_parameters_in_bfloat16_are_widened(tmp_path: Path) -> None:
    from mlx_contentvec.backend import mx

    path = tmp_path / "weights.safetensors"
    values = mx.array([1.5, -2.0])
    mx.save_safetensors(
        str(path), {"b": values.astype(mx.bfloat16), "f": values.astype(mx.float16)}
    )
    parameters = checks._parameters(path)
    for name, dtype in (("b", "float32"), ("f", "float16")):
        assert parameters[name].values.dtype == dtype
        assert parameters[name].values.tolist() == [1.5, -2.0]
