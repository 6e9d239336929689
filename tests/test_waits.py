"""A training step tells a GPU what to do and never waits for it. No GPU is needed to see that: fake
CUDA tensors have a shape and a device, and every operation on them passes by here with its name.
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


pytestmark = pytest.mark.skipif(not fake_cuda(), reason="this torch wants a driver, even for them")
# What they return has a size, or is a number of the host, that only the device knows.
WAITING = "_local_scalar_dense nonzero masked_select unique _unique2 is_nonzero equal".split()


class Waits(TorchDispatchMode):
    """Gathers what would make the host wait for a GPU, and counts the operations on it."""

    def __init__(self):
        super().__init__()
        self.names, self.operations = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function.__name__.split(".")[0]
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)]
        out = None
        if any(tensor.device.type == "cuda" for tensor in tensors):
            self.operations += 1
            chosen = tensors[1:] if "index" in name else []
            if name in WAITING or any(t.dtype is torch.bool or t.is_cpu for t in chosen):
                self.names.append(name)
        out = function(*args, **kwargs)
        if name in ("_to_copy", "copy_") and tensors[-1].device != out.device:
            asynchronous = kwargs.get("non_blocking", len(args) > 2 and args[2])
            if out.is_cpu or not asynchronous:
                self.names.append(f"{name} from {tensors[-1].device} to {out.device}")
        return out


class Look(Exception):
    """The end of what a run does without looking at its results."""


def look(_):
    raise Look


@pytest.fixture
def gpu(monkeypatch):
    """`with gpu(model)`: in this block all tensors are fake, the model's are on a GPU, and nothing
    must wait for it.
    """
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)

    @contextlib.contextmanager
    def fake(model):
        for script in (train, finetune):
            monkeypatch.setattr(script, "device", lambda: torch.device("cuda", 0))
        with FakeTensorMode(allow_non_fake_inputs=True):
            for module in model.modules():
                for tensors in (module._parameters, module._buffers):
                    for name, tensor in tensors.items():
                        there = torch.empty_like(tensor, device="cuda")
                        learned = isinstance(tensor, torch.nn.Parameter)
                        tensors[name] = torch.nn.Parameter(there) if learned else there
            # Autograd has a thread for each device that is there; what it makes are gradients.
            monkeypatch.setattr(torch.Tensor, "backward", lambda _: [
                setattr(p, "grad", torch.empty_like(p)) for p in model.parameters()])
            model.to = lambda _: model
            with Waits() as waits:
                yield
        assert waits.names == [] and waits.operations > 100

    return fake


@pytest.fixture
def args():
    """bf16: in fp32 a step is the same without the copies."""
    return SimpleNamespace(seed=0, accum=2, precision="bf16")


@pytest.fixture
def tiny(tokenizer):
    return SwitchBertConfig.tiny(vocab_size=len(tokenizer))


@pytest.fixture
def make_task(store, tokenizer, tiny):
    """make_task(kind) -> a task of finetuning and its model."""
    def task(kind):
        args, _ = finetune.parse_args([kind.name])
        made = kind(store, tokenizer, splits_of(kind, store), args)
        made.model = made.build_model(tiny, {})
        return made
    return task


def test_what_makes_the_host_wait_is_named():
    """Else the other tests here would prove nothing."""
    with FakeTensorMode(allow_non_fake_inputs=True), Waits() as waits:
        x, host = torch.ones(3, device="cuda"), torch.arange(3)
        for name, calls in {"_to_copy": (lambda: x.cpu(), lambda: host.to("cuda"),
                lambda: x.new_tensor([1.0]), lambda: x[[0, 1]]), "copy_": [lambda: x.copy_(host)],
                "index_put_": [lambda: x.__setitem__(host, x)], "index": [lambda: x[x > 0]],
                "_local_scalar_dense": (x.sum().item, x.tolist)}.items():
            for call in calls:
                with contextlib.suppress(DataDependentOutputException, DynamicOutputShapeException):
                    call()
                assert name in waits.names[0]
                waits.names.clear()
        x[host.to("cuda", non_blocking=True)] = x / 2.0
        torch.nn.utils.clip_grad_norm_([torch.nn.Parameter(x)], 1.0)
        assert waits.names == [] and waits.operations > 5


def step(args, task, batches):
    """One step up to the update of the weights, as in fit."""
    losses, mixture = train.forward_backward(args, task, task.model, batches, 0, 1.5)
    norm = torch.nn.utils.clip_grad_norm_(task.model.parameters(), task.clip)
    assert losses.device.type == norm.device.type == mixture.sums[0].device.type == "cuda"


@pytest.fixture
def with_class_head(store, monkeypatch):
    """The store, as if it held the detector's last layer in place of distributions."""
    monkeypatch.setitem(store.meta, "class_head", True)
    monkeypatch.delitem(store.arrays, "class_probs")
    monkeypatch.setattr(store, "_class_head", lambda device: [
        torch.zeros(7, 12, device=device), torch.zeros(7, device=device)])
    return store


def test_a_step_of_pretraining_does_not_wait(args, gpu, tiny, with_class_head, tokenizer):
    examples = PretrainingDataset(with_class_head, CAPTIONS, tokenizer)
    batches = [collate([examples[0, i] for i in part]) for part in ((0, 5, 10), (1, 2, 3))]
    task = SimpleNamespace(model=SwitchBertForPretraining(tiny), clip=5.0,
        counts=train.Pretraining.counts,
        sums=lambda *a: train.Pretraining.sums(SimpleNamespace(store=with_class_head), *a))
    with gpu(task.model):
        train.place(task.model, args)
        step(args, task, batches)


@EACH_TASK
def test_a_run_looks_at_its_numbers_every_few_steps_only(
        gpu, kind, make_task, monkeypatch, tmp_path):
    """The whole loop, but for the switches' mixture, which is recorded thirty times in a run."""
    task, steps = make_task(kind), []
    monkeypatch.setattr(train, "LOOK_EVERY", 2)
    flags = f"{kind.name} --batch 10 --epochs 99 --precision bf16 --out {tmp_path}/run"
    batches = [task.collate([task[0, i] for i in part]) for part in ((0, 5), (1, 2))]
    real = finetune.Task.sums
    monkeypatch.setattr(train, "total", lambda x: train.send(x) if x.is_cpu else look(x))
    monkeypatch.setattr(train, "record", lambda *_, **__: None)
    monkeypatch.setattr(train.SwitchShares, "shares", lambda self: None)
    monkeypatch.setattr(train, "load_parts", lambda *_: iter(batches))
    monkeypatch.setattr(task, "sums", lambda *a: steps.append(1) or real(task, *a))
    task.evaluates_at_start = False
    args, _ = finetune.parse_args(flags.split())
    with gpu(task.model), pytest.raises(Look):
        train.fit(args, task)
    assert len(steps) == 2


def test_evaluation_looks_at_its_end(args, gpu, tiny, with_class_head, tokenizer, monkeypatch):
    monkeypatch.setattr(train, "total", look)
    pairs = PretrainingDataset(with_class_head, CAPTIONS, tokenizer)
    model = SwitchBertForPretraining(tiny)
    with gpu(model), pytest.raises(Look):
        train.evaluate(train.place(model, args), pairs, batch_size=7)


def test_ranking_looks_at_its_end(args, gpu, tiny, store, tokenizer, monkeypatch):
    monkeypatch.setattr(train, "total", look)
    model, texts = SwitchBertForRetrieval(tiny), ["a red ring", "a"] * 9
    with gpu(model), pytest.raises(Look):
        train.match_scores(train.place(model, args), store, tokenizer, texts, [*"0123456789"] * 12)


@EACH_TASK
def test_prediction_looks_at_its_end(args, gpu, kind, make_task, monkeypatch):
    monkeypatch.setattr(finetune, "total", look)
    # A DataLoader draws a seed for its processes, on the CPU; there are no fake draws.
    monkeypatch.setattr(finetune, "load_ahead", lambda items, parts, collate, _: (
        collate([items[i] for i in part]) for part in parts))
    task = make_task(kind)
    with gpu(task.model), pytest.raises(Look):
        task.predict(train.place(task.model, args), task.items, batch_size=7)
