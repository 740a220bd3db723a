"""Objects that keep everything but a few methods: their class is replaced by a subclass of the same name.

What a compiled module has compiled stays as it was, and so do ``isinstance``, names in saved configs and signatures;
hooks of accelerate and diffusers sit below. Nothing is written to the object itself. Copies and pickles are of the
original class.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any

Method = Callable[..., Any]
"""``method(self, original, *args, **kwargs)`` in the place of a method that is ``original(*args, **kwargs)``."""

Methods = Mapping[str, Method]

_lock = threading.RLock()
_users: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
HOOK = "fewstep_guidance"
HANDLE = "_fewstep_guidance"
"""Where a pipeline keeps its handle; copies and pickles do not."""


def swap(obj: Any, methods: Methods) -> None:
    """Give an object other methods; several users may do so with the same ones.

    A module whose class cannot be replaced gets a hook of diffusers around its forward instead, which then is part of
    what ``module.compile`` compiles.
    """
    with _lock:
        if not _users.get(obj):
            try:
                object.__setattr__(obj, "__class__", _subclass(type(obj), tuple(methods.items())))
            except TypeError:
                _register_hook(obj, methods["__call__"])
        _users[obj] = _users.get(obj, 0) + 1


def restore(obj: Any) -> None:
    """Undo one :func:`swap`; the last user's gives the object its own class again."""
    with _lock:
        _users[obj] -= 1
        if _users[obj]:
            return
        del _users[obj]
        base = type(obj).__dict__.get("_fewstep_base")
        if base is not None:
            object.__setattr__(obj, "__class__", base)
        else:
            obj._diffusers_hook.remove_hook(HOOK, recurse=False)


def swapped(obj: Any) -> bool:
    """Whether an object has other methods now."""
    return obj in _users


def original_class(obj: Any) -> type:
    """The class that an object has without us."""
    return type(obj).__dict__.get("_fewstep_base", type(obj))


@functools.cache
def _subclass(base: Any, methods: tuple[tuple[str, Method], ...]) -> type:
    body: dict[str, Any] = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_fewstep_base": base,
    }

    def reduce(self: Any, protocol: Any) -> Any:
        made: Any = base.__reduce_ex__(self, protocol)
        if isinstance(made, str):
            return made
        function, arguments, *rest = made
        if rest and isinstance(rest[0], dict) and HANDLE in rest[0]:
            rest[0] = {k: v for k, v in rest[0].items() if k != HANDLE}
        if (
            getattr(function, "__name__", "") == "__newobj__"
        ):  # pickle insists on the object's own class there
            function = _new
        return (function, tuple(base if a is type(self) else a for a in arguments), *rest)

    body["__reduce_ex__"] = reduce
    for name, method in methods:
        if hasattr(base, name):
            body[name] = _replaced(getattr(base, name), method)
    return type(base)(base.__name__, (base,), body)


def _new(cls: Any, *args: Any) -> Any:
    return cls.__new__(cls, *args)


def _replaced(original: Any, method: Method) -> Any:
    @functools.wraps(original)  # hosts look at signatures
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return method(self, functools.partial(original, self), *args, **kwargs)

    return call


def _register_hook(module: Any, method: Method) -> None:
    from diffusers.hooks.hooks import HookRegistry, ModelHook

    class Around(ModelHook):
        def new_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            return method(module, self.fn_ref.original_forward, *args, **kwargs)

    HookRegistry.check_if_exists_or_initialize(module).register_hook(Around(), HOOK)
