"""A training step tells a GPU what to do and never waits for it.

No GPU is needed to see that: fake CUDA tensors have a shape and a device, and every operation
on them passes by here with its name.
"""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from test_finetune import EACH_TASK, splits_of
from test_train import CAPTIONS
from torch._subclasses.fake_tensor import (DataDependentOutputException,
    DynamicOutputShapeException, FakeTensorMode)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import finetune
import train
from data import PretrainingDataset, collate
from switchbert import SwitchBertConfig, SwitchBertForPretraining, SwitchBertForRetrieval


def fake_cuda():
    """Does this torch make CUDA tensors without a card? 2.6 does not."""
    try:
        with FakeTensorMode():
            return bool(torch.ones(1, device="cuda").clone().fill_(1).uniform_().shape)
    except RuntimeError:
        return False


pytestmark = pytest.mark.skipif(not fake_cuda(), reason="this torch wants a driver for them")

# Their result has a size, or is a number on the host, that only the device knows.
WAITING = {"_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "unique",
    "_unique2", "equal"}


class Waits(TorchDispatchMode):
    """Gathers what would make the host wait for a GPU, and counts the operations on it."""

    def __init__(self):
        super().__init__()
        self.names = []
        self.operations = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.__name__.split(".")[0]
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)]
        if any(tensor.device.type == "cuda" for tensor in tensors):
            self.operations += 1
            if name in WAITING or ("index" in name and any(map(waits_as_index, tensors[1:]))):
                self.names.append(name)
        result = function(*args, **kwargs)
        if name in ("_to_copy", "copy_"):
            source = tensors[-1].device
            asynchronous = kwargs.get("non_blocking", len(args) > 2 and args[2])
            if source != result.device and (result.is_cpu or not asynchronous):
                self.names.append(f"{name} from {source} to {result.device}")
        return result


def waits_as_index(index):
    """A bool one must be counted first; one on the host must be copied."""
    return index.dtype is torch.bool or index.is_cpu


@pytest.fixture
def fake_tensors(monkeypatch):
    """Autocast asks the driver, which is not there either."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    return FakeTensorMode(allow_non_fake_inputs=True)


def host(x):
    return torch.arange(3)


WAITS = [  # (what is done with three numbers on the GPU, the operation's name)
    (lambda x: x.sum().item(), "_local_scalar_dense"),
    (lambda x: x.tolist(), "_local_scalar_dense"),
    (lambda x: x.cpu(), "_to_copy"),
    (lambda x: host(x).to("cuda"), "_to_copy"),
    (lambda x: x.new_tensor([1.0]), "_to_copy"),
    (lambda x: x[[0, 1]], "_to_copy"),
    (lambda x: x.copy_(host(x)), "copy_"),
    (lambda x: x[x > 0], "index"),
    (lambda x: x.__setitem__(host(x), x), "index_put_"),
]


@pytest.mark.parametrize("action, name", WAITS)
def test_what_makes_the_host_wait_is_named(action, name, fake_tensors):
    """Otherwise the other tests here would prove nothing."""
    with fake_tensors, Waits() as waits:
        x = torch.ones(3, device="cuda")
        with contextlib.suppress(DataDependentOutputException, DynamicOutputShapeException):
            action(x)
    assert name in waits.names[0]


def test_what_does_not_make_the_host_wait_is_only_counted(fake_tensors):
    with fake_tensors, Waits() as waits:
        x = torch.ones(3, device="cuda")
        places = torch.arange(3).to("cuda", non_blocking=True)
        x[places] = x / 2.0
        torch.nn.utils.clip_grad_norm_([torch.nn.Parameter(x)], 1.0)
    assert waits.names == []
    assert waits.operations > 5


# --- Training, evaluation, prediction ---


class Look(Exception):
    """The end of what a run does without looking at its results."""


def look(_):
    raise Look


def move_to_fake_gpu(model):
    for module in model.modules():
        for name, tensor in module._parameters.items():
            there = torch.empty_like(tensor, device="cuda")
            module._parameters[name] = torch.nn.Parameter(there)
        for name, tensor in module._buffers.items():
            module._buffers[name] = torch.empty_like(tensor, device="cuda")
    model.to = lambda _: model


@pytest.fixture
def gpu(fake_tensors, monkeypatch):
    """`with gpu(model)`: in this block all tensors are fake, the model's are on a GPU, and
    nothing may wait for it.
    """
    @contextlib.contextmanager
    def fake(model):
        def make_gradients(loss):
            for parameter in model.parameters():
                parameter.grad = torch.empty_like(parameter)

        # The real backward has a thread for each device that is there.
        monkeypatch.setattr(torch.Tensor, "backward", make_gradients)
        for script in (train, finetune):
            monkeypatch.setattr(script, "device", lambda: torch.device("cuda", 0))
        with fake_tensors:
            move_to_fake_gpu(model)
            with Waits() as waits:
                yield
        assert waits.names == []
        assert waits.operations > 100

    return fake


@pytest.fixture
def args():
    """In bf16; in fp32 a step is the same without the copies."""
    return SimpleNamespace(seed=0, accum=2, precision="bf16")


@pytest.fixture
def tiny(tokenizer):
    return SwitchBertConfig.tiny(vocab_size=len(tokenizer))


@pytest.fixture
def make_task(store, tokenizer, tiny):
    """make_task(kind) -> a task of finetuning and its model."""
    def make(kind):
        args, _ = finetune.parse_args([kind.name])
        task = kind(store, tokenizer, splits_of(kind, store), args)
        task.model = task.build_model(tiny, task.labels, {})
        return task
    return make


@pytest.fixture
def with_class_head(store, monkeypatch):
    """The store, as if it held the detector's last layer in place of distributions."""
    def class_head(device):
        return [torch.zeros(7, 12, device=device), torch.zeros(7, device=device)]

    monkeypatch.setitem(store.meta, "class_head", True)
    monkeypatch.delitem(store.arrays, "class_probs")
    monkeypatch.setattr(store, "_class_head", class_head)
    return store


def batch_of(examples, collate, numbers):
    return collate([examples[0, number] for number in numbers])


def test_a_step_of_pretraining_does_not_wait(args, gpu, tiny, with_class_head, tokenizer):
    """Up to the update of the weights, as in fit."""
    pairs = PretrainingDataset(with_class_head, CAPTIONS, tokenizer)
    batches = [batch_of(pairs, collate, part) for part in ([0, 5, 10], [1, 2, 3])]
    model = SwitchBertForPretraining(tiny)
    task = object.__new__(train.Pretraining)  # without the rest of its data
    task.model = model
    task.store = with_class_head
    with gpu(model):
        train.place(model, args)
        losses, soft_switches = train.forward_backward(args, task, model, batches, 0, 1.5)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), train.Pretraining.clip)
    for result in (losses, norm, soft_switches.sums[0]):
        assert result.device.type == "cuda"


@EACH_TASK
def test_a_run_looks_at_its_numbers_only_every_few_steps(
        gpu, kind, make_task, monkeypatch, tmp_path):
    """The whole loop but the soft switches, which are recorded thirty times in a run."""
    task = make_task(kind)
    task.evaluates_at_start = False
    batches = [batch_of(task, task.collate, part) for part in ([0, 5], [1, 2])]
    steps = []
    sums = task.sums

    def counted_sums(model, batch, tau):
        steps.append(batch)
        return sums(model, batch, tau)

    def look_on_gpu(numbers):
        return train.send(numbers) if numbers.is_cpu else look(numbers)

    monkeypatch.setattr(train, "LOOK_EVERY", 2)
    monkeypatch.setattr(train, "sum_over_processes", look_on_gpu)
    monkeypatch.setattr(train, "record", lambda *_, **__: None)
    monkeypatch.setattr(train.SwitchShares, "shares", lambda self: None)
    monkeypatch.setattr(train, "load_parts", lambda *_: iter(batches))
    monkeypatch.setattr(task, "sums", counted_sums)
    flags = f"{kind.name} --batch 10 --epochs 99 --precision bf16 --out {tmp_path}/run"
    args, _ = finetune.parse_args(flags.split())
    with gpu(task.model), pytest.raises(Look):
        train.fit(args, task)
    assert len(steps) == 2


def test_evaluation_looks_at_its_numbers_only_at_the_end(
        args, gpu, tiny, with_class_head, tokenizer, monkeypatch):
    monkeypatch.setattr(train, "sum_over_processes", look)
    pairs = PretrainingDataset(with_class_head, CAPTIONS, tokenizer)
    model = SwitchBertForPretraining(tiny)
    with gpu(model), pytest.raises(Look):
        train.evaluate(train.place(model, args), pairs, batch_size=7)


def test_ranking_looks_at_its_numbers_only_at_the_end(
        args, gpu, tiny, store, tokenizer, monkeypatch):
    monkeypatch.setattr(train, "sum_over_processes", look)
    model = SwitchBertForRetrieval(tiny)
    texts = ["a red ring", "a"] * 9
    images = list("0123456789") * 12
    with gpu(model), pytest.raises(Look):
        train.match_scores(train.place(model, args), store, tokenizer, texts, images)


@EACH_TASK
def test_prediction_looks_at_its_numbers_only_at_the_end(
        args, gpu, kind, make_task, monkeypatch):
    def load_here(items, parts, collate, workers):
        """A DataLoader would draw a seed on the CPU, and there are no fake draws."""
        for part in parts:
            yield collate([items[i] for i in part])

    monkeypatch.setattr(finetune, "sum_over_processes", look)
    monkeypatch.setattr(finetune, "load_ahead", load_here)
    task = make_task(kind)
    with gpu(task.model), pytest.raises(Look):
        task.predict(train.place(task.model, args), task.items, batch_size=7)
