"""Weak branches in a pipeline: another network, or the pipeline's own with some of its layers disturbed."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from ...guidance import PAG, SEG, SLG, STG, Guidance, smooth_queries
from ...schedules import Node
from .arguments import Arguments, parameters_of, unwrapped
from .classes import original_class
from .outputs import tensors_of

DISTURBED = ("pag", "seg", "slg", "stg")
"""Branches that a pipeline's own network gives."""
_BLOCKS = ("transformer_blocks", "blocks", "layers", "single_transformer_blocks")
_layers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
_SKIPPED: ContextVar[frozenset[int]] = ContextVar("fewstep_skipped_blocks", default=frozenset())


def weak_prediction(network: Any, arguments: Arguments, x: torch.Tensor, node: Node) -> torch.Tensor:
    """The output of another network: a module is called as the pipeline calls its own, a function with (x, t)."""
    if isinstance(network, torch.nn.Module):
        return tensors_of(arguments.call(network))[0]
    t = torch.full((x.shape[0],), node.t, dtype=torch.float32, device=x.device)
    return tensors_of(network(x, t))[0]


@contextmanager
def disturbed(module: Any, guidance: Guidance, branch: str, shape: torch.Size) -> Iterator[None]:
    """Inside, a call of the module is that of a weak branch; for other branches it is a plain one.

    ``shape`` is that of the state, whose last two dimensions give the grid of tokens its proportions.
    """
    m = next((m for m in guidance.methods if m.name == branch), None)
    if isinstance(m, (SLG, STG)):
        token = _SKIPPED.set(frozenset(id(block) for block in chosen_blocks(module, m.layers)))
        try:
            yield
        finally:
            _SKIPPED.reset(token)
    elif isinstance(m, (PAG, SEG)):
        with Attention(m, m.layers or _middle(_layers.get(module, 0)), shape) as mode:
            yield
        if not mode.used:
            raise ValueError(
                f"guidance {branch!r} found no self-attention of layers {list(mode.layers)} in "
                f"{type(module).__name__}; name others, or use the native attention of PyTorch"
            )
    else:
        yield


class Attention(TorchFunctionMode):
    """Self-attention of some layers with its values as results (PAG), or with blurred queries (SEG).

    ``index`` counts the layers of a call, ``used`` says that one of the chosen ones was met.
    """

    def __init__(self, method: PAG | SEG | None, layers: tuple[int, ...], shape: torch.Size) -> None:
        super().__init__()
        self.method, self.layers, self.shape = method, layers, shape
        self.index = 0
        self.used = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        query, key, value = (
            args[i] if i < len(args) else kwargs[n] for i, n in enumerate(("query", "key", "value"))
        )
        if query.shape[-2] != key.shape[-2]:
            return func(*args, **kwargs)
        index, self.index = self.index, self.index + 1
        if index not in self.layers:
            return func(*args, **kwargs)
        self.used = True
        if isinstance(self.method, PAG):
            return value
        rest = {k: v for k, v in kwargs.items() if k not in ("query", "key", "value")}
        return func(self._blurred(query), key, value, *args[3:], **rest)

    def _blurred(self, query: torch.Tensor) -> torch.Tensor:
        tokens = query.shape[-2]
        if math.isinf(self.method.blur):  # type: ignore[union-attr]
            return smooth_queries(query, tokens, 1, math.inf)
        height, width = self.shape[-2:]
        rows = round(math.sqrt(tokens * height / width))
        return smooth_queries(query, rows, max(tokens // max(rows, 1), 1), self.method.blur)  # type: ignore[union-attr]


@contextmanager
def counted_attention(module: Any, guidance: Guidance) -> Iterator[None]:
    """Inside, a plain call of the module; its layers of self-attention are counted where a method has to choose."""
    choosing = any(isinstance(m, (PAG, SEG)) and not m.layers for m in guidance.methods)
    if not choosing or module in _layers:
        yield
        return
    with Attention(None, (), torch.Size()) as mode:
        yield
    _layers[module] = mode.index


def _middle(count: int) -> tuple[int, ...]:
    return tuple(sorted({(count - 1) // 2, count // 2})) if count else ()


def chosen_blocks(module: Any, layers: tuple[int, ...]) -> list[Any]:
    """The transformer blocks with these numbers; ValueError if there are none such."""
    inner = unwrapped(module)
    blocks = next((list(getattr(inner, name)) for name in _BLOCKS if hasattr(inner, name)), [])
    if not blocks:
        raise ValueError(
            f"{type(module).__name__} has no list of transformer blocks to skip; use fs.PAG or a network of its own: "
            "weak=module"
        )
    chosen = layers or _middle(len(blocks))
    if not all(0 <= i < len(blocks) for i in chosen):
        raise ValueError(
            f"layers {list(chosen)} are not blocks of {type(module).__name__}, which has {len(blocks)} (0 to "
            f"{len(blocks) - 1})"
        )
    return [blocks[i] for i in chosen]


_forms: weakref.WeakKeyDictionary[Any, tuple[str, ...]] = weakref.WeakKeyDictionary()
_TEXT_FIRST = ("Joint", "Flux", "QwenImage", "Chroma", "Bria")
"""Blocks that return the text's states before the image's, by the start of their class's name."""


def block_call(block: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A call of a block that may be skipped: its inputs then are what it returns, in the order of an earlier call."""
    names = parameters_of(original_class(block))
    values = {**dict(zip(names, args)), **kwargs}
    if id(block) in _SKIPPED.get():
        form = _forms[block]
        return values[form[0]] if len(form) == 1 else tuple(values.get(name) for name in form)
    output = original(*args, **kwargs)
    _forms[block] = _form(block, output, values, names[0])
    return output


def _form(block: Any, output: Any, values: dict[str, Any], image: str) -> tuple[str, ...]:
    """Names of the arguments that the outputs of a block replace."""
    text = "encoder_hidden_states"
    if isinstance(output, torch.Tensor):
        return (image,)
    first, a, b = output[0], values[image].shape, values[text].shape
    text_first = original_class(block).__name__.startswith(_TEXT_FIRST)
    if a != b:
        text_first = first is None or first.shape == b
    return ("none", image) if first is None else (text, image) if text_first else (image, text)
