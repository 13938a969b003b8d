"""True float64 of a PyTorch model, which ``model.double()`` alone does not give."""

from __future__ import annotations

import copy
from typing import Any


def make_copyable(model: Any) -> None:
    """Let ``copy.deepcopy`` take ``model``: without gradients, weight norms included."""
    from torch.nn.utils.weight_norm import WeightNorm

    model.requires_grad_(False)
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, WeightNorm):
                # the kernel it computed while gradients were on cannot be copied
                hook(module, ())


def true_double(model: Any) -> Any:
    """A float64 copy of ``model`` in which nothing rounds through float32.

    fairseq's ``Fp32GroupNorm`` and ``Fp32LayerNorm`` cast their input to float32
    whatever it is, and so does its GELU; on the full model that leaves errors of
    5e-6 in what should be exact to 1e-13. They are exchanged for the torch
    operations they wrap.
    Sources: fairseq/modules/{fp32_group_norm,layer_norm,gelu}.py.
    """
    import torch
    from torch.nn import functional

    make_copyable(model)
    # the copy takes these in the parameters' place: float32 is not copied only to be widened
    widened = {
        id(parameter): torch.nn.Parameter(parameter.double(), requires_grad=False)
        for parameter in model.parameters()
    }
    double = copy.deepcopy(model, widened).double().eval()
    exact = {"Fp32GroupNorm": torch.nn.GroupNorm, "Fp32LayerNorm": torch.nn.LayerNorm}
    for module in double.modules():
        module.__class__ = exact.get(type(module).__name__, module.__class__)
        activation = getattr(module, "activation_fn", None)
        if getattr(activation, "__module__", None) == "fairseq.modules.gelu":
            module.activation_fn = functional.gelu
    return double
