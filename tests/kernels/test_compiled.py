"""The Triton kernels compiled for a GPU, which needs none: they are valid, and their accesses are 16 bytes wide."""

from __future__ import annotations

import os
import re
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="needs the package triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton is in interpreter mode", allow_module_level=True)

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from fewstep.kernels import triton_combine, triton_guidance  # noqa: E402

ALIGNED = [["tt.divisibility", 16]]


def ptx(
    kernel: Any, types: dict[str, Any], constants: dict[str, Any], aligned: tuple[str, ...], architecture: int
) -> str:
    """The code for an NVIDIA architecture such as 90; arguments in ``aligned`` are multiples of 16."""
    names = kernel.arg_names
    signature = {n: types.get(n, "constexpr") for n in names}
    attributes = {}
    for name in aligned:
        i = names.index(name)
        members = [(i, j) for j in range(len(types[name]))] if isinstance(types[name], tuple) else [(i,)]
        attributes |= dict.fromkeys(members, ALIGNED)
    constexprs = {(names.index(n),): value for n, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": 4})
    return compiled.asm["ptx"]


def accesses(code: str) -> tuple[list[str], list[str]]:
    """Loads and stores of global memory."""
    found = (re.findall(rf"{kind}\.global\S*", code) for kind in ("ld", "st"))
    return tuple(found)  # type: ignore[return-value]


def combine_ptx(element: str, architecture: int = 90, **changes: Any) -> str:
    pointers = (f"*{element}",)
    types: dict[str, Any] = {
        "inputs": pointers * 3,
        "outputs": pointers * 2,
        "coefs": ("fp32",) * 6,
        "sizes": (),
        "strides": ((),) * 5,
        "weights": (),
        "key": "i64",
        "numel": "i32",
        "per_row": "i32",
    }
    constants = {"table": None, "counter": None, "seeds": None}
    constants |= {"ROWS": 1, "WIDE": False, "ACC": tl.float32, "BLOCK": triton_combine.BLOCK}
    for name, value in changes.items():
        if name in ("ROWS", "WIDE", "ACC"):
            constants[name] = value
        else:
            types[name] = value
            constants.pop(name, None)
    return ptx(triton_combine.combine_kernel, types, constants, ("inputs", "outputs", "numel"), architecture)


@pytest.mark.parametrize(("element", "wide"), [("bf16", 1), ("fp16", 1), ("fp32", 2)])
@pytest.mark.parametrize("architecture", [80, 90])
def test_every_tensor_is_touched_once_and_16_bytes_at_a_time(element, wide, architecture):
    loads, stores = accesses(combine_ptx(element, architecture))
    assert loads == ["ld.global.v4.b32"] * 3 * wide and stores == ["st.global.v4.b32"] * 2 * wide


def test_variants_compile():
    """A table and a counter, numbers for each sample, strides, noise, float64, 64-bit offsets."""
    table = {"table": "*fp64", "counter": "*i64", "coefs": ()}
    assert accesses(combine_ptx("bf16", **table))[0].count("ld.global.v4.b32") == 3
    assert combine_ptx("bf16", **table, ROWS=4, WIDE=True)
    assert combine_ptx("fp64", table="*fp64", coefs=(), ACC=tl.float64)
    assert combine_ptx("fp32", seeds="*i64", weights=("fp32",) * 2)
    assert combine_ptx("fp16", sizes=("i32",) * 3, strides=(("i32",) * 3,) * 5)


def guidance_types(element: str) -> dict[str, Any]:
    return {
        "inputs": (f"*{element}",) * 3,
        "strides": ("i32",) * 3,
        "p": ("fp32",) * 3,
        "q": ("fp32",) * 3,
        "base": ("fp32",) * 3,
        "sums": "*fp32",
        **dict.fromkeys(("kept_stride", "output_stride", "per_row", "parts", "blocks"), "i32"),
        **dict.fromkeys(("gain", "eta", "cap", "phi"), "fp32"),
    }


@pytest.mark.parametrize("element", ["bf16", "fp16"])
def test_rules_of_guidance_compile(element):
    for kept in (True, False):
        types = guidance_types(element) | ({"kept": "*fp32"} if kept else {})
        constants = {"SHIFT": not kept, "BLOCK": triton_guidance.BLOCK} | ({} if kept else {"kept": None})
        aligned = ("inputs", "strides", "per_row", *(("kept", "kept_stride") if kept else ()))
        code = ptx(triton_guidance.reduce_kernel, types, constants, aligned, 90)
        assert accesses(code)[0].count("ld.global.v4.b32") == 3
    for rule in range(3):
        types = guidance_types(element) | {"output": f"*{element}"}
        constants = {"RULE": rule, "PARTS": triton_guidance.PARTS, "BLOCK": triton_guidance.BLOCK}
        aligned = ("inputs", "strides", "output", "output_stride", "per_row")
        loads, stores = accesses(ptx(triton_guidance.apply_kernel, types, constants, aligned, 90))
        assert loads.count("ld.global.v4.b32") == 3 and stores == ["st.global.v4.b32"]
