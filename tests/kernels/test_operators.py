"""``combine`` as an operator of torch: gradients, fake tensors, torch.compile, export."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import fewstep as fs
from fewstep.kernels import combine, operators
from fewstep.samplers import Stepper
from fewstep.samplers.uniform import UniformSteps
from fewstep.schedules import VP, make_grid

GRID = make_grid(VP.linear(), 6, "karras")


def numbers(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


CASES = {
    "numbers": ((2, 3), None),
    "for each sample": ((2, 3, 4), None),
    "a table": ((5, 2, 3), torch.tensor([3])),
    "a table for each sample": ((5, 2, 3, 4), torch.tensor([3])),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_inputs_and_coefficients(name):
    shape, counter = CASES[name]
    inputs = [numbers(4, 3 + i, 2)[:, :3].requires_grad_() for i in range(3)]
    coefs = numbers(*shape).requires_grad_()

    def f(coefs, *inputs):
        return tuple(operators.combine(list(inputs), coefs, counter))

    assert torch.autograd.gradcheck(f, (coefs, *inputs))


@pytest.mark.parametrize("name", CASES)
def test_the_operator_keeps_the_rules_of_torch(name):
    shape, counter = CASES[name]
    inputs = [numbers(4, 3, dtype=torch.float32).requires_grad_() for _ in range(3)]
    torch.library.opcheck(operators.combine, (inputs, numbers(*shape).requires_grad_(), counter))


def test_gradients_through_a_run():
    """Of the result in the start state and in the coefficients, against differences."""
    program = fs.compile("unipc:order=3", GRID, prediction="v")
    steps = UniformSteps(program)

    def run(x, table):
        steps.table, values = table, steps.start(x)
        for i in range(program.nfe):
            values = steps(values, torch.tanh(values[0]), i)
        return values[0]

    x, table = numbers(2, 2).requires_grad_(), steps.table.requires_grad_()
    assert torch.autograd.gradcheck(run, (x, table))
    stepper = Stepper(program, y := x.detach().requires_grad_())
    while not stepper.done:
        stepper.step(torch.tanh(stepper.x))
    torch.testing.assert_close(
        torch.autograd.grad(stepper.x.sum(), y)[0], torch.autograd.grad(run(x, table).sum(), x)[0]
    )


@pytest.mark.parametrize(
    "spec", ["euler", "dpmpp_2m", "unipc:order=3", "deis:order=3", "heun", "ghvb", "dpmpp_2m+heavy_ball"]
)
@pytest.mark.parametrize("prediction", ["epsilon", "flow"])
def test_uniform_steps_are_the_program(spec, prediction):
    program = fs.compile(spec, GRID, prediction=prediction)
    x = numbers(2, 5)
    stepper, steps = Stepper(program, x), UniformSteps(program)
    values, counter = steps.start(x), torch.tensor([0])
    while not stepper.done:
        torch.testing.assert_close(values[0], stepper.x, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(float(steps.times[counter]), stepper.node.t, rtol=1e-6, atol=0.0)
        stepper.step(torch.tanh(stepper.x))
        values = steps(values, torch.tanh(values[0]), counter)
        counter = counter + 1
    torch.testing.assert_close(values[0], stepper.x, rtol=1e-9, atol=1e-9)


def test_uniform_steps_say_what_they_cannot_do():
    with pytest.raises(ValueError, match="draws noise"):
        UniformSteps(fs.compile("euler_ancestral", GRID))


def test_one_compilation_for_all_steps():
    program = fs.compile("unipc:order=3", GRID, prediction="epsilon")
    steps, compiler = UniformSteps(program), CompileCounter()

    def body(values, counter):
        return steps(values, torch.tanh(values[0]), counter), counter + 1

    compiled = torch.compile(body, fullgraph=True, backend=compiler)
    x = numbers(2, 5, dtype=torch.float32)
    values, counter, plain = steps.start(x), torch.tensor([0]), steps.start(x)
    for i in range(program.nfe):
        values, counter = compiled(values, counter)
        plain = steps(plain, torch.tanh(plain[0]), i)
    assert compiler.frame_count == 1
    assert torch.equal(values[0], plain[0])  # a counter on the device gives the bits of a number on the host


def test_export():
    class Step(torch.nn.Module):
        def forward(self, x, e, table, counter):
            return combine([x, e], table, counter)[0]

    x, e, table = numbers(2, 5), numbers(2, 6)[:, :5], numbers(4, 1, 2)
    exported = torch.export.export(Step(), (x, e, table, torch.tensor([0])))
    for i in range(4):
        expected = table[i, 0, 0] * x + table[i, 0, 1] * e
        torch.testing.assert_close(exported.module()(x, e, table, torch.tensor([i])), expected)
