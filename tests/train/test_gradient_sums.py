"""Gradients of micro-batches side by side: one sum, the same bits, no set of them kept."""

import threading
import time

import pytest
import torch
from torch import nn

from groundup.train.gradient_sums import CACHED_ELEMENTS, GradientSums, add_all
from groundup.train.lanes import Lanes

NAMES = ("a", "b", "unused")


class Subject:
    """Three weights in bf16, of which a micro-batch uses two; what was added, in its order."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.weights = {name: nn.Parameter(torch.randn(5, 3, generator=generator).bfloat16()) for name in NAMES}
        self.inputs = [torch.randn(5, 3, generator=generator).bfloat16() for _ in range(7)]
        self.added = {name: [] for name in NAMES}
        self.sums = GradientSums(self.weights, lambda name, gradients: self.added[name].append(list(gradients)))

    def compute(self, number, delay=0.0, uses=("a", "b"), is_alone=False):
        with self.sums.of_part(number, is_alone=is_alone):
            time.sleep(delay)
            loss = sum((self.weights[name] * self.inputs[number]).sum() for name in uses)
            return torch.autograd.grad(loss, list(self.weights.values()), allow_unused=True)


@pytest.mark.parametrize("num_parts", [1, 2, 7])
@pytest.mark.parametrize("num_lanes", [1, 2, 3])
def test_gradients_are_added_in_order_two_at_a_time(num_lanes, num_parts):
    subject = Subject()
    subject.sums.begin(num_parts)
    delays = [0.02 * (num_lanes - number % num_lanes) for number in range(num_parts)]  # the first is done last
    list(Lanes(num_lanes).map(lambda number: subject.compute(number, delays[number]), range(num_parts)))
    for name in ("a", "b"):
        calls = subject.added[name]
        assert [len(gradients) for gradients in calls] == [2] * (num_parts // 2) + [1] * (num_parts % 2)
        found = [gradient for gradients in calls for gradient in gradients]
        assert all(map(torch.equal, found, subject.inputs))
    assert not subject.added["unused"]


def test_gradients_of_a_micro_batch_alone_are_added_at_once():
    subject = Subject()
    subject.sums.begin(5)
    for number in range(5):
        subject.compute(number, is_alone=number == 0)
    assert [len(gradients) for gradients in subject.added["a"]] == [1, 2, 2]


def test_the_pass_keeps_no_gradient():
    subject = Subject()
    subject.sums.begin(1)
    a, b, unused = subject.compute(0)
    assert (a.untyped_storage().nbytes(), b.untyped_storage().nbytes(), unused) == (2, 2, None)
    assert all(weight.grad is None for weight in subject.weights.values())


def test_outside_of_a_part_gradients_are_as_ever():
    subject = Subject()
    (gradient,) = torch.autograd.grad((subject.weights["a"] * subject.inputs[0]).sum(), [subject.weights["a"]])
    assert torch.equal(gradient, subject.inputs[0]) and not subject.added["a"]


def test_a_micro_batch_without_a_weight_gives_up_its_turn():
    subject = Subject()
    subject.sums.begin(3)
    for number, uses in enumerate((("a", "b"), ("b",), ("a",))):
        subject.compute(number, uses=uses)
    assert [len(gradients) for gradients in subject.added["a"]] == [2]
    assert [len(gradients) for gradients in subject.added["b"]] == [2]


def test_a_gradient_that_waits_for_a_second_one_is_added_at_the_end_all_the_same():
    subject = Subject()
    subject.sums.begin(3)
    for number, uses in enumerate((("a",), ("a", "b"), ("b",))):
        subject.compute(number, uses=uses)
    assert [len(gradients) for gradients in subject.added["a"]] == [2]
    assert [len(gradients) for gradients in subject.added["b"]] == [2]
    subject.sums.begin(2)
    subject.compute(0, uses=("a",))
    subject.compute(1, uses=("b",))
    assert [len(gradients) for gradients in subject.added["a"]] == [2, 1]


def test_after_an_error_nobody_waits_and_nothing_is_added():
    subject = Subject()
    subject.sums.begin(3)
    waiting = threading.Thread(target=lambda: subject.compute(1), daemon=True)
    waiting.start()
    with pytest.raises(ZeroDivisionError), subject.sums.of_part(0):
        raise ZeroDivisionError
    waiting.join(10)
    assert not waiting.is_alive() and not any(subject.added.values())
    subject.sums.begin(1)
    subject.compute(0)
    assert len(subject.added["a"]) == 1, "the next step begins anew"


@pytest.mark.parametrize("shape", [(), (3,), (0, 4), (7, 50_000), (CACHED_ELEMENTS + 9,), (2, 3, 40_000)])
def test_one_pass_gives_the_bits_of_one_after_another(shape):
    generator = torch.Generator().manual_seed(1)
    total, *gradients = (torch.randn(shape, generator=generator) for _ in range(4))
    gradients = [gradient.bfloat16() for gradient in gradients]
    expected = total.clone()
    for gradient in gradients:
        expected += gradient
    add_all(total, gradients)
    assert torch.equal(total, expected)
