"""The models on a GPU that is not there, and what one training step costs, counted exactly.

Fake tensors have a device, a shape and a type, but no numbers. Torch dispatches an operation
on them as it would on their device. Where the host would have to wait for a number of the GPU
(`.item()`, `nonzero`, an index by bool), it raises an error, because there is no number.
"""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import (DataDependentOutputException,
    DynamicOutputShapeException, FakeTensorMode)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from switchbert import (SwitchBertConfig, SwitchBertForPretraining, SwitchBertForReferring,
    SwitchBertForRetrieval, SwitchBertForVQA)
from tests.tools import benchmark

parametrize = pytest.mark.parametrize
B = 4
T = 9
R = 5
HALF = torch.bfloat16


# --- What makes the host wait ---


class NothingOnTheHost(TorchDispatchMode):
    """Raises an error where numbers are made on the host or copied to it. A single one may be
    made: it is handed to the GPU with the operation that uses it.
    """

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = operation(*args, **kwargs)
        reads_gpu = any(is_on("cuda", value) for value in tree_leaves((args, kwargs)))
        for value in tree_leaves(result):
            if is_on("cpu", value) and (reads_gpu or value.dim() > 0):
                raise AssertionError(f"{operation} made a tensor on the host")
        return result


def is_on(device, value):
    return torch.is_tensor(value) and value.device.type == device


@pytest.fixture
def gpu(monkeypatch):
    """A fake GPU: all tensors that are made while it lasts are on it."""
    # Autocast asks the driver, which is not there either.
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda *args, **kwargs: True)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        try:
            torch.ones(1).clone().fill_(1).uniform_()
        except RuntimeError:
            pytest.skip("this torch (2.6 does) wants a driver, even for fake tensors")
        yield


REFUSALS = (AssertionError, DataDependentOutputException, DynamicOutputShapeException,
    RuntimeError)
WAITS = {  # each needs a number that only the GPU knows, or copies one
    "item": lambda numbers: numbers.sum().item(),
    "nonzero": lambda numbers: numbers.nonzero(),
    "bool index": lambda numbers: numbers[numbers > 0],
    "list": lambda numbers: numbers.new_tensor([1.0, 2.0]),
    "copy": lambda numbers: numbers.sum().cpu(),
    "two devices": lambda numbers: numbers + torch.ones(3, device="cpu"),
}


@parametrize("wait", WAITS)
def test_what_makes_the_host_wait_is_seen(gpu, wait):
    numbers = torch.ones(3)
    with NothingOnTheHost(), pytest.raises(REFUSALS):
        WAITS[wait](numbers)


def test_what_does_not_make_the_host_wait_is_allowed(gpu):
    numbers = torch.ones(3)
    with NothingOnTheHost():
        doubled = 2 * numbers
        chosen = doubled[torch.zeros(1).long()]
    assert chosen.shape == (1,)


# --- The models ---


def encoder_inputs(config):
    return {
        "input_ids": torch.zeros(B, T).long(),
        "text_mask": torch.ones(B, T).long(),
        "region_features": torch.ones(B, R, config.region_feature_size).half(),
        "region_boxes": torch.ones(B, R, 5),
        "region_mask": torch.ones(B, R).long(),
    }


def pretraining(config):
    """A model, and a function from a temperature to its loss."""
    model = SwitchBertForPretraining(config)
    places = torch.zeros(6).long()
    batch = encoder_inputs(config) | {
        "region_hidden": torch.zeros(B, R).bool(),
        "mlm_positions": places,
        "mlm_labels": places,
        "mrc_positions": places,
        "mrc_targets": torch.ones(6, config.num_region_classes).half(),
        "itm_positions": places,
        "itm_labels": places,
    }
    return model, lambda tau: model(**batch, temperature=tau).loss


def vqa(config):
    model = SwitchBertForVQA(config, 11)
    inputs = encoder_inputs(config)
    targets = torch.ones(B, 11)

    def loss(tau):
        logits, _ = model(**inputs, temperature=tau)
        return 11 * F.binary_cross_entropy_with_logits(logits.float(), targets)
    return model, loss


def retrieval(config):
    model = SwitchBertForRetrieval(config)
    inputs = encoder_inputs(config)
    right = torch.zeros(1).long()  # of four pairs, the first

    def loss(tau):
        scores, _ = model(**inputs, temperature=tau)
        return F.cross_entropy(scores.view(-1, 4).float(), right)
    return model, loss


def referring(config):
    model = SwitchBertForReferring(config)
    inputs = encoder_inputs(config)
    targets = torch.ones(B, R)

    def loss(tau):
        logits, _ = model(**inputs, temperature=tau)
        return F.binary_cross_entropy_with_logits(logits, targets)
    return model, loss


@parametrize("precision", ["fp32", "bf16"])
@parametrize("switches", ["learned", "dual"])
@parametrize("make", [pretraining, vqa, retrieval, referring])
def test_no_model_waits_for_a_gpu_or_leaves_it(gpu, make, switches, precision):
    """Neither in training, with soft switches, nor in evaluation, with hard ones."""
    model, loss = make(SwitchBertConfig.tiny(switches=switches))
    with NothingOnTheHost(), torch.autocast("cuda", HALF, enabled=precision == "bf16"):
        value = loss(1.0)
        model.eval()
        with torch.no_grad():
            loss(None)
    assert value.shape == ()
    assert value.dtype == torch.float32


# --- Counts ---
# Goals of the real run. They are of the base model, and hold on every machine.


def test_operations_and_bytes_of_a_sum_by_hand():
    """2 x, its product with w and the sum are three operations; a view is none, nor is a tensor
    without elements.

    The product 2 x reads 40 numbers and writes 40; the sum of a matrix of 10 x 5 reads 50 and
    writes 1. A number has 4 bytes. Of a matrix product no bytes are counted.
    """
    x = torch.ones(10, 4)
    w = torch.ones(4, 5)
    with benchmark.Count() as count:
        torch.empty(0)
        (2 * x.view(10, 4) @ w).sum()
    assert count.operations == 3
    assert count.bytes == 4 * (40 + 40) + 4 * (50 + 1)


def tiny_count(switches):
    """The number of operations depends on that of layers only: here as many as in base."""
    config = SwitchBertConfig.tiny(switches=switches, num_hidden_layers=12)
    batch = benchmark.make_batch(config, pairs=4, pieces=9, regions=5)
    model = SwitchBertForPretraining(config).train()
    return benchmark.count_step(model, batch)


def test_learned_switches_need_at_most_1_6_times_the_operations_of_frozen_ones():
    learned = tiny_count("learned").operations
    single = tiny_count("single").operations
    assert learned <= 1850
    assert learned <= 1.6 * single


def test_under_bf16_they_move_at_most_1_35_times_the_bytes_at_base_size():
    def count(switches):
        form = dict(pairs=256, pieces=38, regions=36)
        return benchmark.count_fake_step(SwitchBertConfig.base(switches=switches), form, HALF)

    learned = count("learned")
    single = count("single")
    assert learned.operations <= 2650
    assert learned.bytes <= 1.35 * single.bytes


def test_a_pair_of_75_tokens_keeps_at_most_68_megabytes_for_the_backward_pass():
    """38 pieces, the global region and 36 regions."""
    form = dict(pairs=2, pieces=38, regions=36)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model, batch = benchmark.fake_model_and_batch(SwitchBertConfig.base(), form)
        assert 50 < benchmark.saved_for_backward(model, batch) <= 68
