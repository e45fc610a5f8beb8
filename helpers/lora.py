"""LoRA from scratch: the layer, putting it into a model, counting its parameters.

It does what PEFT does with `LoraConfig(r, lora_alpha, target_modules, lora_dropout, use_rslora)` on
`nn.Linear` layers, and the tests hold it to that: same outputs, gradients, merged weights, targets
and counts.
"""

from __future__ import annotations

import copy
import math
from collections import Counter

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


class LoRALinear(nn.Module):
    """A frozen linear layer and its update: h = W_0 x + scaling * B A x (Hu et al. 2021, arXiv:2106.09685, eq. 3).

    Args:
        base: the pretrained nn.Linear, with or without bias. It is kept as `base_layer` and frozen.
        r: the rank of the update, at least 1.
        lora_alpha: the numerator of the scaling, above 0.
        lora_dropout: dropout on the input of A while training, in [0, 1).
        use_rslora: scale by alpha / sqrt(r).
    """

    def __init__(
        self, base: nn.Linear, r: int, lora_alpha: float, lora_dropout: float = 0.0, use_rslora: bool = False
    ) -> None:
        super().__init__()
        if not isinstance(base, nn.Linear):
            raise TypeError(f"base is a {type(base).__name__}; pass an nn.Linear, or use peft.get_peft_model")
        _check_rank(r)
        if lora_alpha <= 0:
            raise ValueError(f"lora_alpha={lora_alpha}: it scales the update; choose a number above 0, such as 2 * r")
        if not 0 <= lora_dropout < 1:
            raise ValueError(f"lora_dropout={lora_dropout}: it is a share of the inputs; choose 0 <= lora_dropout < 1")
        self.base_layer = base.requires_grad_(False)  # W_0: (out, in)
        self.r, self.lora_alpha = r, lora_alpha
        # alpha / r as in section 4.1 of the paper. With alpha / sqrt(r) the size of the update does
        # not shrink as r grows (rsLoRA, Kalajdzievski 2023, arXiv:2312.03732).
        self.scaling = lora_alpha / math.sqrt(r) if use_rslora else lora_alpha / r
        self.lora_dropout = nn.Dropout(lora_dropout)
        # float32 on a base of 16 bits or less, since small steps are lost in bfloat16 (PEFT:
        # autocast_adapter_dtype).
        dtype, device = torch.promote_types(base.weight.dtype, torch.float32), base.weight.device
        self.lora_A = nn.Parameter(torch.empty(r, base.in_features, dtype=dtype, device=device))  # (r, in)
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, dtype=dtype, device=device))  # (out, r)
        # B = 0: the layer starts out equal to its base. A: uniform in +-1/sqrt(in), as in loralib
        # and PEFT; the paper's text draws it from a Gaussian.
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.train(base.training)  # a new module is in training mode: its dropout would act in an eval-mode model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return W_0 x + scaling * B A dropout(x), (..., in) -> (..., out), in the dtype of the base's result."""
        result = self.base_layer(x)  # (..., out)
        x = self.lora_dropout(x.to(self.lora_A.dtype))
        down = F.linear(x, self.lora_A)  # A x: (..., in) -> (..., r)
        up = F.linear(down, self.lora_B)  # B A x: (..., r) -> (..., out)
        return (result + up * self.scaling).to(result.dtype)

    def delta_weight(self) -> torch.Tensor:
        """Return the update of the weight, scaling * B A, (out, in), in the adapter's dtype."""
        return self.lora_B @ self.lora_A * self.scaling

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """Return a new, frozen linear layer with the weight W_0 + scaling * B A; this layer stays as it is."""
        if not self.base_layer.weight.is_floating_point():  # bitsandbytes' Linear4bit is an nn.Linear too
            raise TypeError(f"cannot merge into {self.base_layer.weight.dtype} weights: merge into an unquantized base")
        merged = copy.deepcopy(self.base_layer)
        merged.weight += self.delta_weight()  # in the adapter's dtype, rounded once to the base's
        return merged

    def extra_repr(self) -> str:
        return f"r={self.r}, lora_alpha={self.lora_alpha}, scaling={self.scaling:g}"


def inject_lora(
    model: nn.Module,
    target_modules: list[str] | str,
    r: int,
    lora_alpha: float,
    lora_dropout: float = 0.0,
    use_rslora: bool = False,
) -> nn.Module:
    """Freeze the model, replace its target layers by `LoRALinear` in place, and return it, as `get_peft_model` does.

    Args:
        model: any module with nn.Linear layers inside.
        target_modules: names, such as "q_proj" or "layers.0.mlp.up_proj", or "all-linear": every
            linear layer except the output embedding (lm_head) of a transformers model. PEFT has the
            same rules (see its `check_target_module_exists`), but also takes a regular expression,
            GPT-2's Conv1D, and experts that are one 3-D parameter: these are refused here.
        r, lora_alpha, lora_dropout, use_rslora: see `LoRALinear`.

    Raises:
        ValueError: a name matches nothing, or a module that is not an nn.Linear; a target's weight
            is shared with another module; or the model has LoRA layers already. The model is then
            unchanged. (PEFT accepts a name that matches nothing if another one matches.)
    """
    targets = _find_targets(model, target_modules)
    layers = {name: LoRALinear(linear, r, lora_alpha, lora_dropout, use_rslora) for name, linear in targets.items()}
    model.requires_grad_(False)
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    return model


def lora_parameter_count(model: nn.Module, target_modules: list[str] | str, r: int) -> int:
    """Return how many parameters `inject_lora` would train (|Theta| of Hu et al. 2021, section 5.1).

    The model is not changed and its weights are not read, so it can be on the meta device, where it
    takes no memory.
    """
    _check_rank(r)
    linears = _find_targets(model, target_modules).values()
    return sum(r * (linear.in_features + linear.out_features) for linear in linears)  # A: r * in, B: out * r


def _check_rank(r: int) -> None:
    if r < 1:
        raise ValueError(f"r={r}: the rank is the inner size of B A; choose r >= 1, such as 8")


def _find_targets(model: nn.Module, target_modules: list[str] | str) -> dict[str, nn.Linear]:
    """Return the layers that `target_modules` means, by full name in the model's order, or raise ValueError."""
    if hasattr(model, "peft_config") or any(isinstance(module, LoRALinear) for module in model.modules()):
        raise ValueError("model has LoRA layers already: merge them, or load the base model again")
    names = _matching_names(model, target_modules)
    if not names:
        raise ValueError(f"target_modules={target_modules!r}: nothing to adapt; name nn.Linear layers of the model")
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    targets = {name: module for name, module in model.named_modules() if name in names}
    for name, module in targets.items():
        if not isinstance(module, nn.Linear):
            kind = type(module).__name__
            raise ValueError(f"target_modules matches {name}, a {kind}: name nn.Linear layers, or use get_peft_model")
        if uses[id(module.weight)] > 1:
            raise ValueError(
                f"target_modules matches {name}, whose weight is tied to another module's: merging would untie them. "
                "Leave it out, or give it a weight of its own first"
            )
    return targets


def _matching_names(model: nn.Module, target_modules: list[str] | str) -> set[str]:
    modules = {name: module for name, module in model.named_modules() if name}
    if target_modules == "all-linear":
        experts = [name for name, p in model.named_parameters() if "experts" in name and p.dim() == 3]
        if experts:
            raise ValueError(
                f"{experts[0]} holds the matrices of several experts, which PEFT adapts too with all-linear, and this "
                "code does not; name nn.Linear layers, or use get_peft_model and count its trainable parameters"
            )
        head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
        # Conv1D (GPT-2) too, so that it is refused by name and not passed over.
        return {n for n, module in modules.items() if isinstance(module, nn.Linear | Conv1D) and module is not head}
    if isinstance(target_modules, str):
        raise ValueError(f'target_modules={target_modules!r}: pass a list, [{target_modules!r}], or "all-linear"')
    found: set[str] = set()
    for wanted in target_modules:  # the full name, or its end from a dot on
        matches = {name for name in modules if name == wanted or name.endswith(f".{wanted}")}
        if not matches:
            linear = {n.rpartition(".")[2] for n, module in modules.items() if isinstance(module, nn.Linear)}
            raise ValueError(
                f"target_modules: {wanted!r} matches no module; the linear layers end in "
                f"{', '.join(sorted(linear)) or 'nothing: there is none'}"
            )
        found |= matches
    return found
