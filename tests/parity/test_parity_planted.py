"""Every mistake a port of this model is known to make, planted; parity must fail and name it.

The mistakes are planted in the MLX model, one stage at a time, by exchanging the
stage for one written out in float64 that takes the mistake as an option; without
an option it passes, so it is the mistake that is caught. Mistakes of the name
map are planted in the tensors of a converted file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from contentvec_parity.compare import tensors
from contentvec_parity.compare.candidate import MlxCandidate
from contentvec_parity.harness import assemble
from contentvec_parity.inputs import Clip, speech_like
from contentvec_parity.references import open_reference
from mlx_contentvec import inputs
from mlx_contentvec.backend import mx

torch = pytest.importorskip("torch", reason="scripts/test installs it")
functional = torch.nn.functional

Array = Any
Document = dict[str, Any]


def clips() -> list[Clip]:
    """Speech, the shortest clip, a quiet one, silence, and a padded batch; all short."""
    voice = speech_like(2800, 3)
    padded, mask = np.zeros((2, 2800), np.float32), np.zeros((2, 2800), bool)
    padded[0], padded[1, :1800], mask[1, 1800:] = voice, speech_like(1800, 4), True
    return [
        Clip("voice", voice[None], "speech-like"),
        Clip("min", speech_like(400, 5)[None], "one frame"),
        Clip("quiet", voice[None] * np.float32(1e-3), "a thousandth of the level"),
        Clip("silence", np.zeros((1, 1200), np.float32), "silence"),
        Clip("padded", padded, "two clips in one batch", {}, mask),
    ]


CLIPS = clips()


class Remembering:
    """A reference that computes each clip once: dozens of candidates are held against it."""

    def __init__(self, reference: Any) -> None:
        self._reference = reference
        self._found: dict[Any, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reference, name)

    def _once(self, key: Any, compute: Callable[[], Any]) -> Any:
        if key not in self._found:
            self._found[key] = compute()
        return self._found[key]

    def stages(self, clip: Clip) -> Any:
        return self._once(("stages", clip.name), lambda: self._reference.stages(clip))

    def truth(self, clip: Clip) -> Any:
        return self._once(("truth", clip.name), lambda: self._reference.truth(clip))

    def local_truth(self, clip: Clip, stage: str, given: Any) -> Any:
        return self._once(
            (stage, clip.name), lambda: self._reference.local_truth(clip, stage, given)
        )

    def tensors(self) -> Any:
        return self._once("tensors", self._reference.tensors)


@pytest.fixture(scope="module")
def base(fairseq: Any, tiny_checkpoint: Path) -> Remembering:
    return Remembering(open_reference("fairseq", tiny_checkpoint))


@pytest.fixture(scope="module")
def large(fairseq: Any, tiny_large_checkpoint: Path) -> Remembering:
    return Remembering(open_reference("fairseq", tiny_large_checkpoint))


# ---- a plain model, stage by stage, that can be wrong in every way we know -----------------


def exact_gelu(x: Array) -> Array:
    return functional.gelu(x)


def tanh_gelu(x: Array) -> Array:
    return functional.gelu(x, approximate="tanh")


def sigmoid_gelu(x: Array) -> Array:
    return x * functional.sigmoid(1.702 * x)


def from_mlx(array: Array) -> Array:
    return torch.from_numpy(np.array(mx.array(array).astype(mx.float32))).double()


class ChangedStages:
    """What computes a forward pass, with ``change(name, stage, x, padding)`` for each stage."""

    def __init__(self, walk: Any, change: Callable[..., Array]) -> None:
        self._walk, self._change = walk, change

    def __getattr__(self, name: str) -> Any:
        return getattr(self._walk, name)

    def stages(self, **conditions: Any) -> Iterator[tuple[str, Callable[[Array], Array]]]:
        padding = conditions.get("padding")
        for name, stage in self._walk.stages(**conditions):
            yield name, partial(self._changed, name, stage, padding)

    def _changed(self, name: str, stage: Any, padding: Array, x: Array) -> Array:
        return self._walk.waveform(mx.array(self._change(name, stage, x, padding)))


def change_stages(candidate: MlxCandidate, change: Callable[..., Array]) -> None:
    """Have the model's stages computed by ``change``, from the audio and by themselves."""
    own = candidate.model.walk
    candidate.model.walk = lambda *traceable: ChangedStages(own(*traceable), change)


class PlainStages:
    """The stages of a model, written out in float64, with options that make them wrong."""

    def __init__(self, model: Any, **mistake: Any) -> None:
        self.model = model
        self.gelu = mistake.get("gelu", exact_gelu)
        self.eps = mistake.get("eps", 1e-5)
        self.mistake = mistake

    def __call__(self, name: str, x: Array, *, padding_mask: Array | None = None) -> Array:
        kind, _, number = name.partition(".")
        mask = None if padding_mask is None else torch.from_numpy(np.array(padding_mask))
        result = getattr(self, kind)(from_mlx(x), int(number or 0), mask)
        result = self.mistake.get("after", lambda y: y)(result)
        return mx.array(result.float().contiguous().numpy())

    def norm(self, x: Array, module: Any) -> Array:
        weight, bias = from_mlx(module.weight), from_mlx(module.bias)
        return functional.layer_norm(x, weight.shape, weight, bias, self.eps)

    def linear(self, x: Array, module: Any) -> Array:
        return functional.linear(x, from_mlx(module.weight), from_mlx(module.bias))

    def conv(self, x: Array, i: int, _: Any) -> Array:
        block, config = self.model.feature_extractor.conv_layers[i], self.model.config
        x = x[:, None] if i == 0 else x.transpose(1, 2)
        kernel = from_mlx(block.conv.weight).transpose(1, 2)
        y = functional.conv1d(x, kernel, stride=config.conv_layers[i][2])
        if config.extractor_norm == "layer" or (i == 0 and self.mistake.get("over_channels")):
            y = self.norm(y.transpose(1, 2), block.norm).transpose(1, 2)
        elif i == 0:
            weights = from_mlx(block.norm.weight), from_mlx(block.norm.bias)
            groups = self.mistake.get("groups", y.shape[1])
            y = functional.group_norm(y, groups, *weights, self.eps)
        return self.gelu(y).transpose(1, 2)

    def projection(self, x: Array, *_: Any) -> Array:
        return self.linear(self.norm(x, self.model.layer_norm), self.model.post_extract_proj)

    def positional(self, x: Array, _: int, mask: Array | None) -> Array:
        encoder, config = self.model.encoder, self.model.config
        if mask is not None and not self.mistake.get("padding_stays"):
            x = x.masked_fill(mask[..., None], 0)
        y = functional.conv1d(
            x.transpose(1, 2),
            from_mlx(encoder.pos_conv.weight).transpose(1, 2),
            from_mlx(encoder.pos_conv.bias),
            padding=config.conv_pos // 2,
            groups=config.conv_pos_groups,
        )
        y = self.gelu(y[..., 1:] if self.mistake.get("trims_first") else y[..., :-1])
        y = y.transpose(1, 2)
        x = y if self.mistake.get("no_residual") else x + y
        if config.layer_norm_first != bool(self.mistake.get("norm_misplaced")):
            return x
        return self.norm(x, encoder.layer_norm)

    def layer(self, x: Array, number: int, mask: Array | None) -> Array:
        layer, config = self.model.encoder.layers[number - 1], self.model.config
        heads = self.mistake.get("heads", config.encoder_attention_heads)
        first, second = layer.self_attn_layer_norm, layer.final_layer_norm
        if self.mistake.get("norms_swapped"):
            first, second = second, first

        def attend(y: Array) -> Array:
            own = layer.self_attn
            q, k, v = (
                self.linear(y, module).reshape(*y.shape[:2], heads, -1).transpose(1, 2)
                for module in (own.q_proj, own.k_proj, own.v_proj)
            )
            scores = (q * self.mistake.get("scale", q.shape[-1] ** -0.5)) @ k.transpose(2, 3)
            if mask is not None and not self.mistake.get("attends_to_padding"):
                scores = scores.masked_fill(mask[:, None, None, :], -np.inf)
            mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(y.shape)
            return self.linear(mixed, own.out_proj)

        def feed(y: Array) -> Array:
            return self.linear(self.gelu(self.linear(y, layer.fc1)), layer.fc2)

        if config.layer_norm_first != bool(self.mistake.get("norms_elsewhere")):
            x = x + attend(self.norm(x, first))
            return x + feed(self.norm(x, second))
        x = self.norm(x + attend(x), first)
        return self.norm(x + feed(x), second)

    def final_norm(self, x: Array, *_: Any) -> Array:
        return self.norm(x, self.model.encoder.layer_norm)


def plant(candidate: MlxCandidate, stage: str, **mistake: Any) -> None:
    """Exchange ``stage`` of the model for the plain one with a mistake."""
    plain = PlainStages(candidate.model, **mistake)

    def change(name: str, own: Any, x: Array, padding: Array | None) -> Array:
        return plain(name, x, padding_mask=padding) if name == stage else own(x)

    change_stages(candidate, change)


def verdict_on(reference: Any, candidate: MlxCandidate) -> Document:
    verdict: Document = assemble(reference, candidate, CLIPS)["verdict"]
    return verdict


def blamed(verdict: Document) -> str:
    return str(verdict["blame"]["wrong"][0]["stage"])


@pytest.mark.parametrize("stage", ["conv.0", "conv.3", "projection", "positional", "layer.2"])
def test_the_plain_stages_pass_without_a_mistake(
    base: Any, converted_tiny: Path, stage: str
) -> None:
    candidate = MlxCandidate.open(converted_tiny)
    plant(candidate, stage)
    verdict = verdict_on(base, candidate)
    wrong = list(verdict["blame"]["wrong"]) if verdict["blame"] else []
    assert not wrong, verdict["reason"]


@pytest.mark.parametrize("stage", ["conv.0", "conv.4", "positional", "layer.3", "final_norm"])
def test_the_plain_stages_of_a_large_model_pass_without_a_mistake(
    large: Any, converted_tiny_large: Path, stage: str
) -> None:
    candidate = MlxCandidate.open(converted_tiny_large)
    plant(candidate, stage)
    verdict = verdict_on(large, candidate)
    wrong = list(verdict["blame"]["wrong"]) if verdict["blame"] else []
    assert not wrong, verdict["reason"]


ARITHMETIC: list[tuple[str, dict[str, Any]]] = [
    ("conv.0", {"gelu": tanh_gelu}),
    ("conv.0", {"gelu": sigmoid_gelu}),
    ("conv.0", {"gelu": lambda x: x}),
    ("conv.0", {"eps": 1e-6}),
    ("conv.0", {"eps": 1e-12}),
    ("conv.0", {"groups": 32}),
    ("conv.0", {"over_channels": True}),
    ("conv.3", {"gelu": tanh_gelu}),
    ("conv.6", {"gelu": sigmoid_gelu}),
    ("projection", {"eps": 1e-6}),
    ("positional", {"gelu": tanh_gelu}),
    ("positional", {"eps": 1e-6}),
    ("positional", {"trims_first": True}),
    ("positional", {"no_residual": True}),
    ("positional", {"norm_misplaced": True}),
    ("positional", {"padding_stays": True}),
    ("layer.1", {"gelu": tanh_gelu}),
    ("layer.2", {"gelu": sigmoid_gelu}),
    ("layer.1", {"eps": 1e-6}),
    ("layer.2", {"heads": 8}),
    ("layer.2", {"scale": 1.0}),
    ("layer.1", {"norms_elsewhere": True}),
    ("layer.3", {"norms_swapped": True}),
    ("layer.1", {"attends_to_padding": True}),
]


@pytest.mark.parametrize(
    ("stage", "mistake"), ARITHMETIC, ids=[f"{s}-{next(iter(m))}" for s, m in ARITHMETIC]
)
def test_wrong_arithmetic_fails_and_the_stage_is_named(
    base: Any, converted_tiny: Path, stage: str, mistake: Mapping[str, Any]
) -> None:
    candidate = MlxCandidate.open(converted_tiny)
    plant(candidate, stage, **mistake)
    verdict = verdict_on(base, candidate)
    assert not verdict["passed"]
    assert blamed(verdict) == stage
    assert stage in verdict["reason"]
    # the tensors are right, and the verdict says that the arithmetic is not
    assert verdict["blame"]["wrong"][0]["differing_tensors"] == []


LARGE_ARITHMETIC: list[tuple[str, dict[str, Any]]] = [
    ("conv.5", {"eps": 1e-6}),
    ("conv.2", {"gelu": tanh_gelu}),
    ("positional", {"norm_misplaced": True}),
    ("layer.2", {"norms_elsewhere": True}),
    ("layer.3", {"eps": 1e-6}),
    ("final_norm", {"eps": 1e-6}),
]


@pytest.mark.parametrize(
    ("stage", "mistake"),
    LARGE_ARITHMETIC,
    ids=[f"{s}-{next(iter(m))}" for s, m in LARGE_ARITHMETIC],
)
def test_wrong_arithmetic_in_a_large_model_fails_and_the_stage_is_named(
    large: Any, converted_tiny_large: Path, stage: str, mistake: Mapping[str, Any]
) -> None:
    candidate = MlxCandidate.open(converted_tiny_large)
    plant(candidate, stage, **mistake)
    verdict = verdict_on(large, candidate)
    assert not verdict["passed"]
    assert blamed(verdict) == stage


def test_products_at_tf32_precision_are_noticed(base: Any, converted_tiny: Path) -> None:
    def ten_bits(x: Array) -> Array:
        bits = mx.array(x).view(mx.uint32)
        return (((bits + 0x1000) >> 13) << 13).view(mx.float32)

    candidate = MlxCandidate.open(converted_tiny)

    def change(name: str, own: Any, x: Array, _: Any) -> Array:
        return own(np.array(ten_bits(x)) if name.startswith("layer") else x)

    change_stages(candidate, change)
    verdict = verdict_on(base, candidate)
    assert not verdict["passed"]
    assert blamed(verdict) == "layer.1"


def test_an_extra_norm_after_the_last_layer_is_noticed(base: Any, converted_tiny: Path) -> None:
    candidate = MlxCandidate.open(converted_tiny)
    weight, bias = (from_mlx(candidate.model.encoder.layer_norm[p]) for p in ("weight", "bias"))
    again = lambda y: functional.layer_norm(y, weight.shape, weight, bias)  # noqa: E731
    plant(candidate, "layer.3", after=again)
    verdict = verdict_on(base, candidate)
    assert not verdict["passed"]
    assert blamed(verdict) == "layer.3"


def test_numbers_that_are_not_finite_fail(base: Any, converted_tiny: Path) -> None:
    candidate = MlxCandidate.open(converted_tiny)
    plant(candidate, "layer.2", after=lambda y: y.masked_fill(y > 2.5, np.nan))
    verdict = verdict_on(base, candidate)
    assert not verdict["passed"]
    assert blamed(verdict) == "layer.2"
    assert "not finite" in " ".join(failure["what"] for failure in verdict["failures"])


def test_a_frame_too_few_fails(base: Any, converted_tiny: Path) -> None:
    candidate = MlxCandidate.open(converted_tiny)
    change_stages(
        candidate,
        lambda name, own, x, _: own(x)[:, : -1 if name == "conv.6" and x.shape[1] > 2 else None],
    )
    candidate_verdict = assemble(base, candidate, CLIPS[:1])["verdict"]
    assert not candidate_verdict["passed"]
    assert blamed(candidate_verdict) == "conv.6"


def test_a_layer_off_by_one_is_found_in_the_call_not_in_a_stage(
    base: Any, converted_tiny: Path
) -> None:
    candidate = MlxCandidate.open(converted_tiny)
    own = candidate.features
    candidate.features = lambda clip, call: own(  # type: ignore[method-assign]
        clip, {**call, "output_layer": 2} if call.get("output_layer") == 3 else call
    )
    verdict = verdict_on(base, candidate)
    assert not verdict["passed"]
    assert verdict["blame"]["wrong"] == []
    assert verdict["blame"]["calls"][0]["looks_like"] == "layer.2"
    assert "layer.2" in verdict["reason"]


def test_a_projection_of_the_wrong_layer_is_found_in_the_call(
    base: Any, converted_tiny: Path
) -> None:
    candidate = MlxCandidate.open(converted_tiny)
    own = candidate.features

    def projecting_layer_2(clip: Clip, call: Mapping[str, Any]) -> Any:
        return own(clip, {**call, "output_layer": 2} if call.get("project") else call)

    candidate.features = projecting_layer_2  # type: ignore[method-assign]
    verdict = verdict_on(base, candidate)
    assert not verdict["passed"]
    assert [call["name"] for call in verdict["blame"]["calls"]] == [
        "layer 3 + projection by project=True"
    ]


def test_v1_features_that_are_a_slice_and_no_projection_fail(
    base: Any, converted_tiny: Path
) -> None:
    candidate = MlxCandidate.open(converted_tiny)
    candidate.project = lambda features: features[..., :32]  # type: ignore[method-assign]
    change_stages(
        candidate, lambda name, own, x, _: x[..., :32] if name == "final_proj" else own(x)
    )
    verdict = assemble(base, candidate, CLIPS)["verdict"]
    assert not verdict["passed"]
    assert blamed(verdict) == "final_proj"


@pytest.mark.parametrize(
    "altered",
    [lambda x: x * 32768, lambda x: (x - x.mean()) / mx.sqrt(x.var() + 1e-5)],
    ids=["int16 scale", "normalised"],
)
def test_an_altered_waveform_is_found_between_the_audio_and_the_first_stage(
    base: Any,
    converted_tiny: Path,
    altered: Callable[[Array], Array],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    candidate = MlxCandidate.open(converted_tiny)
    own = inputs.check_waveform
    monkeypatch.setattr(inputs, "check_waveform", lambda *given: altered(own(*given)))
    verdict = verdict_on(base, candidate)
    assert not verdict["passed"]
    assert verdict["blame"]["wrong"] == []
    assert verdict["blame"]["stage_input"] == {"stage": "conv.0", "input": "the waveform"}


def test_a_large_model_that_is_not_given_normalised_audio_fails(
    large: Any, converted_tiny_large: Path
) -> None:
    import dataclasses

    candidate = MlxCandidate.open(converted_tiny_large)
    candidate.model.config = dataclasses.replace(candidate.model.config, normalize=False)
    verdict = verdict_on(large, candidate)
    assert not verdict["passed"]
    assert verdict["blame"]["stage_input"] == {"stage": "conv.0", "input": "the waveform"}


def test_a_padding_mask_that_is_not_the_originals_fails(
    base: Any, converted_tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    candidate = MlxCandidate.open(converted_tiny)
    own = inputs.padded_frames

    def by_length(source: Array, config: Any, padding_mask: Array | None, *rest: Any) -> Array:
        if padding_mask is None:
            return own(source, config, padding_mask, *rest)
        samples = (~mx.array(padding_mask)).sum(axis=1)
        frames = config.frames(source.shape[1])
        return mx.arange(frames)[None] >= ((samples - 400) // 320 + 1)[:, None]

    monkeypatch.setattr(inputs, "padded_frames", by_length)
    verdict = verdict_on(base, candidate)
    assert not verdict["passed"]
    assert any(failure["gate"] == "mask" for failure in verdict["failures"])


# ---- mistakes of the map ------------------------------------------------------------------

Tensors = dict[str, Array]
LAYER = "encoder.layers.{}."


def swapped(one: str, other: str) -> Callable[[Tensors], None]:
    def apply(weights: Tensors) -> None:
        for part in ("weight", "bias"):
            a, b = f"{one}.{part}", f"{other}.{part}"
            weights[a], weights[b] = weights[b], weights[a]

    return apply


def swapped_layers(weights: Tensors) -> None:
    for name in [name for name in weights if name.startswith(LAYER.format(0))]:
        other = LAYER.format(2) + name.removeprefix(LAYER.format(0))
        weights[name], weights[other] = weights[other], weights[name]


def changed(name: str, change: Callable[[Array], Array]) -> Callable[[Tensors], None]:
    def apply(weights: Tensors) -> None:
        weights[name] = mx.contiguous(change(weights[name]))

    return apply


def refolded(
    originals: Mapping[str, np.ndarray], how: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> Array:
    magnitude = originals["encoder.pos_conv.0.weight_g"].astype(np.float64)
    direction = originals["encoder.pos_conv.0.weight_v"].astype(np.float64)
    return mx.array(np.ascontiguousarray(how(magnitude, direction).transpose(0, 2, 1), np.float32))


FOLDS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "weight_g dropped": lambda g, v: v,
    "over dim 0": lambda g, v: g * v / np.sqrt((v * v).sum((1, 2), keepdims=True)),
    "over dim 1": lambda g, v: g * v / np.sqrt((v * v).sum((0, 2), keepdims=True)),
    "over everything": lambda g, v: g * v / np.sqrt((v * v).sum()),
    "stored as float16": lambda g, v: (
        (g * v / np.sqrt((v * v).sum((0, 1), keepdims=True))).astype(np.float16).astype(np.float64)
    ),
    "computed in float16": lambda g, v: (
        g.astype(np.float16) * (v.astype(np.float16) / np.float16(np.sqrt((v * v).sum((0, 1)))))
    ).astype(np.float64),
}

MAP_MISTAKES: dict[str, tuple[str, Callable[[Tensors], None]]] = {
    "q and k swapped": (
        "layer.2",
        swapped(LAYER.format(1) + "self_attn.q_proj", LAYER.format(1) + "self_attn.k_proj"),
    ),
    "k and v swapped": (
        "layer.3",
        swapped(LAYER.format(2) + "self_attn.k_proj", LAYER.format(2) + "self_attn.v_proj"),
    ),
    "layers swapped": ("layer.1", swapped_layers),
    "norms of a layer swapped": (
        "layer.2",
        swapped(LAYER.format(1) + "self_attn_layer_norm", LAYER.format(1) + "final_layer_norm"),
    ),
    "a square matrix transposed": (
        "layer.3",
        changed(LAYER.format(2) + "self_attn.out_proj.weight", lambda w: w.T),
    ),
    "a bias dropped": (
        "layer.1",
        changed(LAYER.format(0) + "fc1.bias", mx.zeros_like),
    ),
    "a convolution reversed in time": (
        "conv.2",
        changed("feature_extractor.conv_layers.2.conv.weight", lambda w: w[:, ::-1]),
    ),
    "channels of a convolution transposed": (
        "conv.4",
        changed("feature_extractor.conv_layers.4.conv.weight", lambda w: w.transpose(2, 1, 0)),
    ),
    "group norm's weight left at one": (
        "conv.0",
        changed("feature_extractor.conv_layers.0.norm.weight", mx.ones_like),
    ),
    "encoder norm and projection norm mixed": (
        "positional",
        changed("encoder.layer_norm.weight", lambda w: w[::-1]),
    ),
    "v1's projection transposed about its channels": (
        "final_proj",
        changed("final_proj.weight", lambda w: w[:, ::-1]),
    ),
    "one value in the last bit": (
        "layer.2",
        changed(
            LAYER.format(1) + "fc2.weight",
            lambda w: mx.concatenate([w[:1] * (1 + 2**-22), w[1:]], axis=0),
        ),
    ),
}


def edited(converted: Path, mistake: Callable[[Tensors], None]) -> MlxCandidate:
    """The converted file with a mistake in its tensors, loaded."""
    candidate = MlxCandidate.open(converted)
    from mlx.utils import tree_flatten

    weights = dict(tree_flatten(candidate.model.parameters()))
    mistake(weights)
    candidate.model.load_weights(list(weights.items()))
    return candidate


@pytest.mark.parametrize("name", MAP_MISTAKES)
def test_a_mistake_of_the_map_fails_and_its_stage_and_tensors_are_named(
    base: Any, converted_tiny: Path, name: str
) -> None:
    stage, mistake = MAP_MISTAKES[name]
    verdict = verdict_on(base, edited(converted_tiny, mistake))
    assert not verdict["passed"]
    assert blamed(verdict) == stage
    differing = verdict["blame"]["wrong"][0]["differing_tensors"]
    assert differing
    assert differing[0] in verdict["reason"]


@pytest.mark.parametrize("name", [n for n in MAP_MISTAKES if n != "one value in the last bit"])
def test_the_features_alone_show_a_mistake_of_the_map(
    base: Any, converted_tiny: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = {"failures": [], "parameters": 0, "sources": 0, "unread": []}
    monkeypatch.setattr(tensors, "prove", lambda *_: nothing)
    stage, mistake = MAP_MISTAKES[name]
    verdict = verdict_on(base, edited(converted_tiny, mistake))
    assert not verdict["passed"]
    assert blamed(verdict) == stage


@pytest.mark.parametrize("name", FOLDS)
@pytest.mark.parametrize("with_tensors", [True, False], ids=["tensors", "features alone"])
def test_a_positional_kernel_folded_wrongly_fails(
    base: Any,
    converted_tiny: Path,
    name: str,
    with_tensors: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not with_tensors:
        nothing = {"failures": [], "parameters": 0, "sources": 0, "unread": []}
        monkeypatch.setattr(tensors, "prove", lambda *_: nothing)
    kernel = refolded(base.tensors()[1], FOLDS[name])
    mistake = changed("encoder.pos_conv.weight", lambda _: kernel)
    verdict = verdict_on(base, edited(converted_tiny, mistake))
    assert not verdict["passed"]
    assert blamed(verdict) == "positional"


def test_an_altered_key_bias_moves_no_feature_and_fails_all_the_same(
    base: Any, converted_tiny: Path
) -> None:
    name = LAYER.format(1) + "self_attn.k_proj.bias"
    verdict = verdict_on(base, edited(converted_tiny, changed(name, lambda b: b + 0.5)))
    assert {failure["gate"] for failure in verdict["failures"]} == {"tensor"}
    assert blamed(verdict) == "layer.2"
    assert verdict["blame"]["wrong"][0]["differing_tensors"] == [name]


def test_a_tensor_of_the_original_that_nothing_reads_fails(base: Any, converted_tiny: Path) -> None:
    naming, originals = base.tensors()
    proof = tensors.prove(
        naming,
        {**originals, "encoder.layers.0.adapter.weight": np.ones(3, np.float32)},
        MlxCandidate.open(converted_tiny).parameters(),
        base.config,
    )
    assert [item["name"] for item in proof["failures"]] == ["encoder.layers.0.adapter.weight"]


def test_a_tensor_dropped_that_should_not_be_fails(base: Any, converted_tiny: Path) -> None:
    naming, originals = base.tensors()
    parameters = MlxCandidate.open(converted_tiny).parameters()
    kept = {name: value for name, value in parameters.items() if "final_proj" not in name}
    proof = tensors.prove(naming, originals, kept, base.config)
    assert {item["name"] for item in proof["failures"]} == {"final_proj.weight", "final_proj.bias"}
    assert {item["stage"] for item in proof["failures"]} == {"final_proj"}
