"""What networks return: tuples and objects of one or several tensors, or of lists of tensors."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils.outputs import BaseOutput


def tensors_of(output: Any, count: int = 1) -> list[torch.Tensor]:
    """The first ``count`` tensors of an output; a list of one tensor a row is stacked."""
    values = list(output.values()) if isinstance(output, dict) else output
    if isinstance(values, torch.Tensor):
        values = [values]
    return [torch.stack(v) if isinstance(v, list) else v for v in values[:count]]


class Template:
    """The form of a network's outputs, learned from the first, with other tensors in it."""

    def __init__(self) -> None:
        self.output: Any = None
        self.names: tuple[str, ...] = ()
        self.listed = False

    @property
    def learned(self) -> bool:
        """Whether the network has run."""
        return self.output is not None

    def learn(self, output: Any) -> None:
        """Keep the form, not the tensors."""
        if isinstance(output, dict):
            self.output = type(output)(**dict.fromkeys(output))
            self.names, self.listed = tuple(output), isinstance(next(iter(output.values())), list)
        else:
            first = output[0] if isinstance(output, tuple) else output
            self.output, self.listed = type(output), isinstance(first, list)

    def fill(self, tensors: list[torch.Tensor], return_dict: Any = True) -> Any:
        """An output of this form."""
        if self.output is None:  # nothing has run yet
            return Transformer2DModelOutput(sample=tensors[0]) if return_dict else tuple(tensors)
        values: list[Any] = [list(t.unbind(0)) for t in tensors] if self.listed else tensors
        if isinstance(self.output, BaseOutput):
            return type(self.output)(**dict(zip(self.names, values)))
        return tuple(values) if self.output is tuple else values[0]
