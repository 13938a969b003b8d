"""What is written without torch is what torch reads."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from contentvec_convert.torch_writer import write_torch_file

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**80), 2**80)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), inner)
    ),
    max_leaves=12,
)


def _written(state: Any) -> io.BytesIO:
    stream = io.BytesIO()
    write_torch_file(stream, state)
    stream.seek(0)
    return stream


@given(value=PLAIN)
@settings(max_examples=60, deadline=None)
def test_plain_values_come_back(value: Any, torch: Any) -> None:
    assert torch.load(_written({"value": value}), weights_only=True) == {"value": value}


@given(
    array=arrays.arrays(
        st.sampled_from([np.float16, np.float32, np.float64, np.int64]),
        arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
    )
)
@settings(max_examples=60, deadline=None)
def test_every_array_comes_back(array: Any, torch: Any) -> None:
    tensor = torch.load(_written({"model": {"w": array.T}}), weights_only=True)["model"]["w"]
    assert tuple(tensor.shape) == array.T.shape
    assert tensor.numpy().dtype == array.dtype
    assert tensor.numpy().tobytes() == np.ascontiguousarray(array.T).tobytes()


def test_the_same_state_gives_the_same_bytes() -> None:
    state = {"model": {"w": np.arange(6, dtype=np.float32)}, "cfg": {"n": 3}}
    assert _written(state).getvalue() == _written(state).getvalue()


@pytest.mark.parametrize("value", [object(), {1, 2}, b"bytes", np.float32(1)])
def test_what_cannot_be_written_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="cannot be written"):
        write_torch_file(io.BytesIO(), {"value": value})
