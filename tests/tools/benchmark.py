"""Speed, as ratios of things that took turns in one run: benchmark.py NAME ...

    python tests/tools/benchmark.py count loading

A figure in seconds says more about the machine than about the code. A ratio of two things that
took turns within a second of each other says something about the code, on any machine. Let
nothing else run beside it.

    count      operations of a training step and the bytes that they move, counted without
               running them: the same on every machine (half a minute)
    train      a training step with learned switches against frozen ones, a plain torch.nn BERT
               and the bare matrix products; growth, padding, loading, memory (10 minutes on 2
               cores)
    loading    pairs per second of loading processes, alone and beside the steps of a fast GPU,
               and how many of them such steps need (a minute, .8 GB of disk)
    corpus     3.3 and 12.4 million captions: seconds and memory before the first step, and in
               loading processes (5 minutes, 3 GB of disk)
    store      reading a feature store against plain copies in memory, .npz files, pickled
               records
    extract    extraction from picture files against the bare network, at its real size
    gpu        all of it that a GPU can show, and the runs of the README, in ten minutes
    tiny       `count`, `train`, `corpus` and `gpu` at sizes that mean nothing: do they work?

--json FILE writes all figures.

What made the code fast follows. Each lever is explained where it stands in the code, and a test
shows that it equals the plain form. Measured on two cores of an AMD EPYC, torch 2.14, fp32;
"first code" is commit 6231a4c.

    switches as a bias, an       operations of a step: fp32 1,831 instead of 2,659 (frozen single
    average and a product        1,176, 1,226), bf16 2,382 instead of 3,356 (1,635, 1,739); GB
                                 outside matrix products, bf16, 256 pairs: 98 instead of 164
                                 (76, 86). Counted; `instead of` is commit 928b854
    fused attention              on a CPU, where it is not fused, forward and backward at base
                                 size (16 pairs, 75 tokens) 32.4 ms; as 928b854 wrote it 32.5;
                                 the explicit softmax 28.7. On a slower machine, as below
    Switch-Input as a product    a layer of 12, forward and backward: 67 ms, a chain of addcmul
                                 62; if the stack were kept 56, and 15 MB per pair more in all
                                 layers. A layer of 48: 258, 238 and 164
    batches of like length       captions of 12 pieces: 1.93 x the pairs per second of padding
                                 to 38, 1.43 x in batches drawn at random; .7 % of the text is
                                 padding
    masked places as positions   no `nonzero` and no tensor of a Python list: nothing to wait
                                 for on a GPU; on a CPU no difference
    captions as numpy strings    3.3 million: 10 s and .63 GB before the first step (first code
                                 44 s, 1.7 GB with torch), 22 MB per loading process (a copy)
    words cut once               lru_cache of WordPiece: a batch of 64 in 6.2 ms instead of 7.5
    layers compiled one by one   12 layers of toy width in a minute on one core; the whole model
                                 was not ready after three. What it gains is for a GPU to show
    toy run                      92 and 95 s, first code 124 s (.75): batches of like length,
                                 5 x 5 bins in the detector, no blind run at its end, faster
                                 retrieval
    channels_last, fused AdamW   the toy detector: a fifth and a fourteenth

All of `train` at base size, frozen `single` = 1. Of 928b854, on the EPYC: learned 1.00,
attention .97, input .97, dual .96, late .97, intra .96, torch.nn.TransformerEncoder 1.13, bare
matrix products .82 (so learned is 1.23 of them). A layer of 48 costs 1.10 of a layer of 12. Now,
on the slower machine (two shared Xeon cores, one thread, not quiet): learned 1.09 (928b854 there
1.19), which is 1.51 of the bare products (1.57). Kept for the backward pass: 64 MB per pair
(single 62).

`loading`, on the slower machine beside another program, with a store of 1,601 classes: one
process loads 3,400 pairs per second (928b854: 490; medians of three runs in turn, 2,100 to 3,700
and 390 to 610; 3,900 when it was quieter). Steps of 25 ms per 256 pairs, 10,240 per second, need
three or four of them, on cores of their own: two processes on these two cores load 4,000. A
batch of 256 costs one of them 30 ms of examples, 15 of padding, and 28 of a copy to the memory
that processes share. The step of a CPU makes 4.3 pairs per second and never waits.
"""

import argparse
import functools
import json
import mmap
import pickle
import platform
import resource
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from statistics import median
from string import ascii_lowercase

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import extract_features  # noqa: E402
import train  # noqa: E402
from data import (MATCH, PICTURES, SPECIALS, FeatureStore, PretrainingDataset,  # noqa: E402
    WordPiece, class_targets, collate, files_below, pad)
from switchbert import (PATHS, SwitchBertConfig, SwitchBertForPretraining,  # noqa: E402
    SwitchBertOutput)

FOUND = {}  # what was measured: {title: {name: number}}
HALF = torch.bfloat16
SIZES = {  # of the model; pairs, word pieces and regions of a batch without padding
    "base": (SwitchBertConfig.base, dict(pairs=16, pieces=38, regions=36)),
    "tiny": (SwitchBertConfig.tiny, dict(pairs=4, pieces=9, regions=5)),
}


def sync():
    """Wait until the GPU has done what it was asked for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def take_turns(functions, rounds):
    """{name: median seconds} of functions called in turn; the first round warms up."""
    seconds = {name: [] for name in functions}
    for turn in range(rounds + 1):
        for name, function in functions.items():
            sync()
            start = time.perf_counter()
            function(turn)
            sync()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: median(each) for name, each in seconds.items()}


def relative(numbers, base):
    """{name: number}, with that of `base` as 1."""
    return {name: number / numbers[base] for name, number in numbers.items()}


def rates(count, seconds):
    """{name: so many things per second}"""
    return {name: count / each for name, each in seconds.items()}


def show(title, unit, numbers):
    """Print a table of {name: number}, and keep it for the JSON file."""
    FOUND.setdefault(title, {}).update(numbers)
    print(f"\n{title} ({unit})")
    for name, number in numbers.items():
        print(f"    {name:45s}{number:12.3f}")


# --- count ----------------------------------------------------------------------------------------

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")


class Count(TorchDispatchMode):
    """Counts the operations that torch dispatches, and the bytes that they read and write.

    A view is no operation, nor is what returns a tensor without elements, as older versions of
    `checkpoint` make twice: neither asks the device for anything. A matrix product is one, but
    its bytes do not count, because its time is that of its arithmetic. Elsewhere a GPU waits for
    its memory, so bytes are time; and its host needs some microseconds for an operation of any
    size. Fused attention counts as its parts, as on a CPU with dropout; on a GPU it is one
    operation.
    """

    def __init__(self):
        super().__init__()
        self.operations = 0
        self.bytes = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = operation(*args, **kwargs)
        name = operation.overloadpacket.__name__
        aliases = [value.alias_info for value in operation._schema.returns]
        is_view = any(alias and not alias.is_write for alias in aliases)
        is_empty = torch.is_tensor(result) and result.numel() == 0
        if is_view or is_empty or name == "_unsafe_view" or operation.namespace == "prim":
            return result
        self.operations += 1
        if name not in PRODUCTS:
            for value in tree_leaves((args, kwargs, result)):
                if torch.is_tensor(value):
                    # Of a number that is expanded to many places, one is read.
                    self.bytes += min(value.nbytes, value.untyped_storage().nbytes())
        return result


def count_step(model, batch, dtype=None):
    """Count of a forward and backward pass on the CPU."""
    with Count() as count:
        with torch.autocast("cpu", dtype or HALF, enabled=dtype is not None):
            loss = model(**batch, temperature=1.0).loss
        loss.backward()
    return count


def fake_model_and_batch(config, form):
    """Of fake tensors, which have shapes but no numbers: for use within a FakeTensorMode."""
    batch = {}
    for name, of_a_pair in make_batch(config, **form | {"pairs": 1}).items():
        shape = (form["pairs"] * len(of_a_pair), *of_a_pair.shape[1:])
        batch[name] = torch.empty(shape, dtype=of_a_pair.dtype)
    return SwitchBertForPretraining(config).train(), batch


def count_fake_step(config, form, dtype=None):
    """The Count of a step at any size, in two seconds, because nothing is computed."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model, batch = fake_model_and_batch(config, form)
        return count_step(model, batch, dtype)


def benchmark_count(folder, size="base", pairs=256):
    """Operations, which do not depend on the number of pairs, and gigabytes."""
    make_config, form = SIZES[size]
    form = form | {"pairs": pairs}
    for precision, dtype in (("fp32", None), ("bf16", HALF)):
        operations = {}
        gigabytes = {}
        for name in ("learned", "attention", "input", "single"):
            count = count_fake_step(make_config(switches=name), form, dtype)
            operations[name] = count.operations
            gigabytes[name] = count.bytes / 1e9
        for numbers in (operations, gigabytes):
            numbers["learned, single = 1"] = numbers["learned"] / numbers["single"]
        where = f"{size}, {precision}"
        show(f"operations of a step, {where}", "forward + backward", operations)
        show(f"moved outside matrix products, {where}", f"GB, {pairs} pairs", gigabytes)


# --- train ----------------------------------------------------------------------------------------


def make_example(rng, config, pieces, regions):
    """A made-up pair; 15 % of its words and regions are predicted."""
    classes = config.num_region_classes
    words = 1 + rng.permutation(pieces - 2)[: max(1, pieces * 15 // 100)]  # not [CLS], [SEP]
    places = rng.permutation(regions)[: max(1, regions * 15 // 100)]
    corner = rng.random((regions, 2), dtype=np.float32) / 2
    area = np.full((regions, 1), 0.25, np.float32)
    features = rng.normal(size=(regions, config.region_feature_size))
    return dict(
        input_ids=rng.integers(5, config.vocab_size, pieces),
        region_features=features.astype(np.float16),
        region_boxes=np.hstack([corner, corner + 0.5, area]),
        region_hidden=np.isin(np.arange(regions), places),
        mlm_positions=np.sort(words),
        mlm_labels=rng.integers(5, config.vocab_size, len(words)),
        mrc_positions=np.sort(places),
        mrc_targets=rng.dirichlet(np.ones(classes), len(places)).astype(np.float32),
        itm_positions=np.array([0]),
        itm_labels=np.array([MATCH]),
    )


def make_batch(config, pairs, pieces, regions):
    """A batch of made-up pairs, all of one length, on the device."""
    rng = np.random.default_rng(0)
    examples = [make_example(rng, config, pieces, regions) for _ in range(pairs)]
    return train.to_device(collate(examples))


def build(config):
    """A new model on the device, in training mode."""
    torch.manual_seed(0)
    return SwitchBertForPretraining(config).to(train.device()).train()


def plain_bert(config):
    """Embeddings and heads are the same; between them stands torch's own encoder."""
    model = build(config)
    layer = nn.TransformerEncoderLayer(config.hidden_size, config.num_attention_heads,
        config.intermediate_size, config.hidden_dropout_prob, "gelu", batch_first=True)
    encoder = nn.TransformerEncoder(layer, config.num_hidden_layers, enable_nested_tensor=False)
    encoder.to(train.device()).train()

    def encode(input_ids, text_mask, region_features, region_boxes, region_mask, temperature=None,
            region_hidden=None):
        text = model.bert.text_embeddings(input_ids)
        vision = model.bert.region_embeddings(
            region_features, region_boxes, region_mask, region_hidden)
        ones = torch.ones_like(region_mask[:, :1])  # the global region
        padding = torch.cat([text_mask, ones, region_mask], dim=1) == 0
        states = encoder(torch.cat([text, vision], dim=1), src_key_padding_mask=padding)
        n = text.shape[1]
        pooled = model.bert.pooler(states[:, 0], states[:, n])
        return SwitchBertOutput(states[:, :n], states[:, n + 1 :], pooled, None, None)

    model.bert.layers = nn.ModuleList()
    model.bert.forward = encode
    model.plain = encoder
    return model


def matrix_products(config, pairs, length, dtype=torch.float32):
    """A function: the products of all layers, forward and twice as many backward, no more."""
    random = functools.partial(torch.randn, device=train.device(), dtype=dtype)
    d = config.hidden_size
    wide = config.intermediate_size
    heads = config.num_attention_heads
    states = random(pairs * length, d)
    inner = random(pairs * length, wide)
    square = random(d, d)
    up = random(d, wide)
    queries = random(pairs * heads, length, d // heads)
    weights = random(pairs * heads, length, length)
    # Query, key, value and output; the two of the feed-forward part; the two of attention.
    products = [(states, square)] * 4 + [(states, up), (inner, up.mT)]
    products += [(queries, queries.mT), (weights, queries)]

    def run(turn):
        for _ in range(config.num_hidden_layers):
            for a, b in products:
                c = a @ b
                c @ b.mT  # the gradient of a
                a.mT @ c  # and of b
    return run


def stepper(model, batch, dtype=None):
    """A function that makes one forward and backward pass."""
    def run(turn):
        model.zero_grad(set_to_none=True)
        with torch.autocast(train.device().type, dtype, enabled=dtype is not None):
            loss = model(**batch, temperature=1.0).loss
        loss.backward()
    return run


def inference(model, batch):
    """A function that makes one forward pass with hard switches."""
    def run(turn):
        with torch.no_grad():
            model.eval()(**batch)
        model.train()
    return run


def saved_for_backward(model, batch):
    """Megabytes per pair that a step keeps for its backward pass: each memory block once."""
    blocks = {}

    def keep(tensor):
        block = tensor.untyped_storage()
        blocks[block._cdata] = block.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**batch, temperature=1.0).loss
    for parameter in model.parameters():
        blocks.pop(parameter.untyped_storage()._cdata, None)
    del loss  # until here it holds the blocks, so that no address comes twice
    return sum(blocks.values()) / 1e6 / len(batch["itm_labels"])


def benchmark_steps(size, rounds):
    """Training steps, hard inference and memory of all settings."""
    make_config, form = SIZES[size]
    pairs = form["pairs"]
    batch = make_batch(make_config(), **form)
    models = {}
    for name in PATHS:
        models[name] = build(make_config(switches=name))
    steps = {name: stepper(model, batch) for name, model in models.items()}
    plain = plain_bert(make_config(switches="intra"))
    steps["torch.nn.TransformerEncoder"] = stepper(plain, batch)
    length = form["pieces"] + 1 + form["regions"]
    steps["bare matrix products"] = matrix_products(make_config(), pairs, length)
    seconds = take_turns(steps, rounds)
    show(f"step, {size}", "frozen single = 1", relative(seconds, "single"))
    show(f"pairs per second, {size}", "1/s", rates(pairs, seconds))

    two = ("learned", "single")
    kept = {name: saved_for_backward(models[name], batch) for name in two}
    show(f"memory of a step, {size}", "MB per pair, kept for the backward pass", kept)
    seconds = take_turns({name: inference(models[name], batch) for name in two}, rounds)
    show(f"hard inference, {size}", "frozen single = 1", relative(seconds, "single"))


def benchmark_growth(size, rounds):
    """One thing is doubled at a time, from a model of four layers and a small batch."""
    make_config, form = SIZES[size]
    form = form | {"pairs": max(2, form["pairs"] // 4)}
    batch = make_batch(make_config(), **form)
    models = {}
    steps = {}
    for layers in (4, 12, 24, 48):
        models[layers] = build(make_config(num_hidden_layers=layers))
        steps[f"{layers} layers"] = stepper(models[layers], batch)
    for name, number in form.items():
        larger = make_batch(make_config(), **form | {name: 2 * number})
        steps[f"4 layers, {2 * number} {name}"] = stepper(models[4], larger)
    grown = relative(take_turns(steps, rounds), "4 layers")
    # Embeddings and heads cancel in a difference.
    layer_of_48 = (grown["48 layers"] - 1) / 44
    layer_of_12 = (grown["12 layers"] - 1) / 8
    grown["a layer of 48, of 12 layers = 1"] = layer_of_48 / layer_of_12
    show(f"growth, {size}", "a step of 4 layers = 1", grown)


def caption_lengths(n, most=38):
    """Word pieces of n captions, about as Conceptual Captions has them: 5 to 38, 12 on average.

    With another `most` all of them are shorter in proportion, but for three pieces.
    """
    lengths = 5 + np.random.default_rng(1).gamma(2.0, 3.5, n)
    lengths = lengths.clip(max=38).astype(int)
    return (lengths * most // 38).clip(min=3)


class Lengths:
    """What train.epoch_batches reads of a data set."""

    def __init__(self, lengths):
        self.lengths = lengths

    def __len__(self):
        return len(self.lengths)


def benchmark_padding(size, rounds, batches=12):
    """Captions of real lengths: padded to 38, in random batches, in batches of like length."""
    make_config, form = SIZES[size]
    model = build(make_config())
    pairs = form["pairs"]
    lengths = caption_lengths(20_000, form["pieces"])
    rng = np.random.default_rng(0)
    orders = {
        "of like length": train.epoch_batches(0, 0, pairs, Lengths(lengths))[:batches],
        "drawn at random": rng.integers(0, len(lengths), (batches, pairs)),
    }
    full = stepper(model, make_batch(model.config, **form))
    speeds = {}
    padding = {"padded to the longest": 1 - lengths.mean() / form["pieces"]}
    for name, order in orders.items():
        longest = lengths[order].max(axis=1)  # (batches,)
        steps = {"full": full}
        for number, pieces in enumerate(longest.tolist()):
            batch = make_batch(model.config, pairs, pieces, form["regions"])
            steps[number] = stepper(model, batch)
        seconds = take_turns(steps, rounds)
        of_full = seconds.pop("full")
        speeds[name] = batches * of_full / sum(seconds.values())
        padding[name] = 1 - lengths[order].sum() / (pairs * longest.sum())
    show("captions of real lengths", "pairs per second, padded to the longest = 1", speeds)
    show("padding among word pieces", "share", padding)


def benchmark_train(folder, size="base", rounds=5):
    """Ratios of training steps; `folder` is for the store that loading reads."""
    few = max(1, rounds // 2)
    benchmark_steps(size, rounds)
    benchmark_growth(size, few)
    benchmark_padding(size, few)
    _, form = SIZES[size]
    benchmark_loading(folder, size, pairs=256 if size == "base" else form["pairs"])


# --- loading --------------------------------------------------------------------------------------

# Seconds per pair of a fast GPU's step: an estimate, until `gpu` measures it.
STEP = 0.025 / 256


def fill(writer, **arrays):
    """Complete a store in which all images are alike."""
    for name, value in dict(arrays, sizes=10, boxes=[1, 1, 9, 9]).items():
        writer.arrays[name][:] = value
    return writer.finish()


def made_up_pairs(folder, images, form, config):
    """A PretrainingDataset of a made-up store, with a detector's last layer for region classes.

    Captions have real lengths and words of real frequencies: the second is half as frequent as
    the first, the third a third.
    """
    rng = np.random.default_rng(0)
    regions = form["regions"]
    classes = config.num_region_classes
    size = config.region_feature_size
    head = rng.normal(size=(classes, size)), np.zeros(classes)
    writer = FeatureStore.create(folder, range(images), regions, size, class_head=head)
    store = fill(writer, features=rng.normal(size=(regions, size)), counts=regions)
    words = [f"word{i}" for i in range(config.vocab_size - len(SPECIALS))]
    captions = []
    for image, length in enumerate(caption_lengths(images, form["pieces"])):
        ranks = len(words) ** rng.random(length - 2)  # [CLS] and [SEP] are pieces, too
        captions.append((image, " ".join(words[int(rank) - 1] for rank in ranks)))
    return PretrainingDataset(store, captions, WordPiece(list(SPECIALS) + words))


def loader_of(args, pairs, batches):
    """The batches that train.py would train on."""
    task = argparse.Namespace(examples=pairs, collate=collate)
    return train.load_parts(args, task, 0, batches)


def load(data, pairs, batches, workers, step):
    """Pairs per second of so many batches that are loaded, with step(batch) for each."""
    flags = ["--batch", str(pairs), "--workers", str(workers), "--data", "."]
    args, _ = train.parse_args(flags)
    early = 2 * workers + 1  # batches that are loaded while the processes start
    loader = loader_of(args, data, early + batches)
    for _ in range(early):
        step(next(loader))
    start = time.perf_counter()
    for batch in loader:
        step(batch)
    sync()
    return batches * pairs / (time.perf_counter() - start)


def benchmark_loading(folder, size="base", pairs=256, batches=16, rounds=3, model=None,
        dtype=None):
    """How fast batches come from a store in the page cache, alone and beside steps.

    The step of a GPU is played by a sleep: meanwhile the host does nothing but load. A model's
    own steps are measured if one is given. An epoch sees each image once or twice, and so do
    these processes: no more of the store is mapped than they have read.
    """
    make_config, form = SIZES[size]
    data = made_up_pairs(folder / "loading", (batches + 5) * pairs, form, make_config())

    def nothing(batch):
        """Loading alone."""

    def sleep(batch):
        time.sleep(STEP * pairs)

    def model_step(batch):
        batch = class_targets(train.to_device(batch), data.store)
        stepper(model, batch, dtype)(0)

    ways = {  # name -> loading processes, and what is done with a batch
        "in the training process": (0, nothing),
        "1 process": (1, nothing),
        "2 processes": (2, nothing),
        "1 process beside steps of 25 ms per 256": (1, sleep),
        "2 processes beside steps of 25 ms per 256": (2, sleep),
    }
    if model:
        ways["2 processes beside the model's steps"] = (2, model_step)
    found = {name: [] for name in ways}
    for _ in range(rounds):
        for name, (workers, step) in ways.items():
            found[name].append(load(data, pairs, batches, workers, step))
    speeds = {name: median(each) for name, each in found.items()}
    if model:
        batch = collate([data[i] for i in range(pairs)])
        seconds = take_turns({"step": lambda turn: model_step(batch)}, rounds)
        speeds["the model's steps on a batch in memory"] = pairs / seconds["step"]
    show("loading", "pairs per second", speeds)
    needed = 1 / STEP / speeds["1 process"]
    show("loading for steps of 25 ms per 256 pairs", "processes", {"needed": needed})


# --- corpus ---------------------------------------------------------------------------------------


def write_corpus(folder, count):
    """A caption file and a store of as many tiny images, as large as Conceptual Captions'."""
    rng = np.random.default_rng(0)
    letters = list(ascii_lowercase)
    words = np.array(["".join(rng.choice(letters, n)) for n in rng.integers(2, 9, 3000)])
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(SPECIALS) + "\n" + "\n".join(words))
    ids = set()
    with open(folder / "captions.tsv", "w") as file:
        for i, length in enumerate(caption_lengths(count)):
            link = f"http://host{i % 977}.example.com/images/{i:09d}.jpg"
            caption = " ".join(words[rng.integers(0, 3000, length)])
            file.write(f"{caption}\t{link}\n")
            ids.add(zlib.crc32(link.encode()))
    writer = FeatureStore.create(folder / "features", sorted(ids), 1, 2, detector="made up")
    fill(writer, counts=1)


def memory(pid="self"):
    """Megabytes that are a process's own, not shared with its parent or with files."""
    kilobytes = 0
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Private_"):
            kilobytes += int(line.split()[1])
    return kilobytes / 1e3


def corpus_child(folder, loaders=4, batches=200):
    """In a process of its own: read the corpus as train.py does, and load some pairs."""
    start = time.perf_counter()
    before = memory()
    data = train.load_data(folder)
    pairs = PretrainingDataset(data.store, data.captions, data.tokenizer)
    del data  # as train.pretrain does: captions that are left out need not be kept
    args, _ = train.parse_args(["--data", str(folder), "--workers", str(loaders)])
    train.epoch_batches(args.seed, 0, args.batch, pairs)
    found = {"captions": len(pairs), "seconds": time.perf_counter() - start}
    found["MB before any data"] = before
    found["MB of data"] = memory() - before
    found["MB at most"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3

    loader = loader_of(args, pairs, len(pairs) // args.batch)
    next(loader)
    first = sum(memory(worker.pid) for worker in loader._workers) / loaders
    start = time.perf_counter()
    for _ in range(batches):
        next(loader)
    seconds = time.perf_counter() - start
    later = sum(memory(worker.pid) for worker in loader._workers) / loaders
    found["MB per loading process"] = first
    found[f"MB more after {batches} batches"] = later - first
    found["pairs loaded per second"] = batches * args.batch / seconds
    print(json.dumps(found))


def benchmark_corpus(folder, counts=(3_300_000, 12_400_000)):
    """Each size in a fresh process."""
    for count in counts:
        corpus = folder / str(count)
        write_corpus(corpus, count)
        code = f"import benchmark as b; b.corpus_child(b.Path({str(corpus)!r}))"
        output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True,
            text=True, cwd=Path(__file__).parent).stdout
        show(f"corpus of {count:,}", "as named", json.loads(output.splitlines()[-1]))


# --- store and extract ----------------------------------------------------------------------------


def benchmark_store(folder, images=2000, batch=256, rounds=30):
    """Batches (256, 36, 2048) of random images; the store, 295 MB, is in the page cache."""
    rng = np.random.default_rng(0)
    ram = rng.normal(size=(images, 36, 2048)).astype(np.float16)
    boxes = np.tile(np.array([1, 1, 9, 9], np.float32), (36, 1))
    writer = FeatureStore.create(folder / "store", range(images), 36, 2048)
    (folder / "npz").mkdir()
    offsets = [0]
    with open(folder / "records", "wb") as records:
        for row in range(images):
            record = dict(features=ram[row], boxes=boxes, size=(10, 10))
            writer.write(row, **record)
            np.savez(folder / "npz" / f"{row}.npz", **record)
            records.write(pickle.dumps(record, protocol=5))
            offsets.append(records.tell())
    store = writer.finish()
    with open(folder / "records", "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    orders = rng.integers(images, size=(rounds + 1, batch))

    def from_npz(row):
        with np.load(folder / "npz" / f"{row}.npz", allow_pickle=False) as file:
            return {name: file[name] for name in file}

    def from_records(row):
        return pickle.loads(mapped[offsets[row] : offsets[row + 1]])

    def batches_of(read):
        """A function that makes a batch of the rows of a turn."""
        return lambda turn: pad([read(row)["features"] for row in orders[turn]])

    seconds = take_turns({
        "memory": lambda turn: np.stack([ram[row] for row in orders[turn]]),
        "store": batches_of(lambda row: store[row]),
        "npz": batches_of(from_npz),
        "pickle": batches_of(from_records),
    }, rounds)
    times = relative(seconds, "store")
    show("store", "random batches of 256", {
        "GB per second": batch * ram[0].nbytes / 1e9 / seconds["store"],
        "of plain copies in memory": times["memory"],
        "times as fast as .npz files": times["npz"],
        "times as fast as pickled records": times["pickle"],
    })


def random_vg():
    """Visual Genome's detector with random weights, made so that its boxes differ."""
    torch.manual_seed(0)
    model = extract_features.build_detector("vg")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    for name, buffer in model.named_buffers():
        if name.endswith("bn3.weight"):
            buffer.fill_(0.2)  # or what 33 blocks add grows beyond all numbers
    # With random weights and no anchors all boxes would be alike, and selection free.
    sizes = 2.0 ** torch.arange(4).repeat_interleave(3) * 20
    wide = torch.tensor([1.4, 1.0, 0.7]).repeat(4) * sizes
    high = sizes * sizes / wide
    anchors = torch.stack([-wide, -high, wide, high], dim=1)
    model.rpn.anchor_generator.cells.copy_(anchors)
    return model


def benchmark_extract(folder, pictures=2, rounds=3, precision="fp32"):
    """vg at 600 x 1000 with random weights: all of `extract` from JPEG files, against backbone,
    proposals, pooling and head alone on the prepared pictures.
    """
    model = random_vg()
    (folder / "images").mkdir(exist_ok=True)
    for i in range(pictures):
        noise = np.random.default_rng(i).integers(0, 256, (38, 63, 3), dtype=np.uint8)
        picture = Image.fromarray(noise).resize((1000, 600))
        picture.save(folder / "images" / f"{i}.jpg")
    files = files_below(folder / "images", PICTURES)
    where = next(model.parameters()).device
    prepared = []
    for path in files:
        pixels = extract_features.pil_to_tensor(extract_features.open_picture(path))
        images, _ = model.transform([(pixels / 255).to(where)])
        prepared.append(images)

    @torch.no_grad()
    def network(turn):
        with torch.autocast(where.type, HALF, enabled=precision == "bf16"):
            for images in prepared:
                maps = {"0": model.backbone(images.tensors)}
                boxes, _ = model.rpn(images, maps)
                pooled = model.roi_heads.box_roi_pool(maps, boxes, images.image_sizes)
                model.roi_heads.box_predictor.cls_score(model.roi_heads.box_head(pooled))

    def extraction(turn):
        store = folder / f"{precision}{turn}"
        writer = FeatureStore.create(store, files, 36, **model.about)
        extract_features.fill(writer, model, files, precision=precision,
            workers=4 if where.type == "cuda" else 0)

    seconds = take_turns({"network": network, "extraction": extraction}, rounds)
    show(f"extract, {precision}", f"600 x 1000 on {where.type}", {
        "pictures per second": pictures / seconds["extraction"],
        "of the network's time": seconds["extraction"] / seconds["network"],
    })


# --- gpu ------------------------------------------------------------------------------------------


def flops_of(model, batch):
    """Floating-point operations of forward and backward on a batch, without its padding.

    Every weight of the layers meets every token once forward and twice backward, with a product
    and a sum each time: 6 per weight and token. The two L x L products of attention add 12 L D
    per token and layer. Embeddings and heads, 3 % of the base model, are left out.
    """
    layers = model.bert.layers
    hidden = model.config.hidden_size
    tokens = 1 + batch["text_mask"].sum(dim=1) + batch["region_mask"].sum(dim=1)  # (B,), of L
    weights = sum(parameter.numel() for parameter in layers.parameters())
    attention = 12 * hidden * len(layers) * (tokens**2).sum()
    return (6 * weights * tokens.sum() + attention).item()


def matmul_rate(dtype):
    """Operations per second of a large matrix product on this device: what can be reached."""
    n, repeats = (8192, 20) if train.device().type == "cuda" else (1024, 3)
    a = torch.randn(n, n, device=train.device(), dtype=dtype)

    def products(turn):
        for _ in range(repeats):
            a @ a

    seconds = take_turns({"products": products}, 2)["products"]
    return 2 * n**3 * repeats / seconds


def benchmark_gpu_steps(size, pairs, rounds):
    """A step in fp32, bf16, and compiled, against a large matrix product in bf16."""
    make_config, form = SIZES[size]
    batch = make_batch(make_config(), **form | {"pairs": pairs})
    length = form["pieces"] + 1 + form["regions"]
    learned = build(make_config())
    single = build(make_config(switches="single"))
    compiled = build(make_config())
    train.compile_layers(compiled)
    seconds = take_turns({
        "fp32": stepper(learned, batch),
        "bf16": stepper(learned, batch, HALF),
        "bf16, frozen single": stepper(single, batch, HALF),
        "bf16, compiled": stepper(compiled, batch, HALF),
        "bare products in bf16": matrix_products(make_config(), pairs, length, HALF),
    }, rounds)
    speeds = rates(pairs, seconds)
    show("gpu: pairs per second", "1/s", speeds)
    rate = matmul_rate(HALF)
    shares = rates(flops_of(learned, batch) / rate, seconds)
    show("gpu: share of a large bf16 product's rate", f"of {rate / 1e12:.0f} TFLOP/s", shares)
    del speeds["bare products in bf16"]
    hours = {name: 33e6 / speed / 3600 for name, speed in speeds.items()}
    show("gpu: ten epochs of Conceptual Captions", "hours of one card", hours)


def benchmark_gpu_memory(size, pairs):
    """Gigabytes per pair, and the largest batch."""
    make_config, form = SIZES[size]
    model = build(make_config())
    all_memory = torch.cuda.get_device_properties(0).total_memory / 1e9
    few = pairs // 4

    def used(n, dtype):
        torch.cuda.reset_peak_memory_stats()
        batch = make_batch(make_config(), **form | {"pairs": n})
        stepper(model, batch, dtype)(0)
        return torch.cuda.max_memory_allocated() / 1e9

    found = {}
    for name, dtype in (("fp32", None), ("bf16", HALF)):
        of_few = used(few, dtype)
        per_pair = (used(2 * few, dtype) - of_few) / few
        found[f"{name}, GB per pair"] = per_pair
        found[f"{name}, largest batch"] = few + (all_memory - of_few) / per_pair
    show("gpu: memory", "as named", found)


def benchmark_gpu_precision(size, pairs, steps):
    """The same run in fp32 and bf16: how far apart are the losses?"""
    make_config, form = SIZES[size]
    batch = make_batch(make_config(), **form | {"pairs": pairs})
    ends = {}
    for name, dtype in (("fp32", None), ("bf16", HALF)):
        model = build(make_config())
        optimizer = train.make_optimizer(model, weight_decay=0.01, gate_rate=0.1)
        for group in optimizer.param_groups:
            group["lr"] = 1e-4
        for step in range(steps):
            torch.manual_seed(step)
            stepper(model, batch, dtype)(step)
            optimizer.step()
        with torch.no_grad():
            ends[name] = model.eval()(**batch).loss.item()
    show(f"gpu: loss after {steps} steps on one batch", "sum of the three", ends)


RUNS = ("train.py", "finetune.py vqa", "finetune.py retrieval", "finetune.py refer")


def benchmark_runs(commands):
    """The seconds of runs of the README, and the last lines that they print."""
    for command in commands:
        start = time.perf_counter()
        words = [sys.executable] + command.split()
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
        show("gpu: runs of the README", "seconds", {command: time.perf_counter() - start})
        lines = (done.stdout + done.stderr).splitlines()
        print("\n".join(lines[-8:]))


def benchmark_gpu(folder, size="base", pairs=256, rounds=5, steps=50, runs=RUNS, pictures=64):
    """All that the README says of a GPU, in one go; at small sizes it runs on a CPU."""
    make_config, _ = SIZES[size]
    has_gpu = torch.cuda.is_available()
    print(torch.cuda.get_device_name() if has_gpu else platform.processor(), train.device())
    benchmark_gpu_steps(size, pairs, rounds)
    if has_gpu:
        benchmark_gpu_memory(size, pairs)
    benchmark_gpu_precision(size, pairs, steps)
    benchmark_loading(folder, size, pairs, model=build(make_config()), dtype=HALF)
    if pictures:
        for precision in ("fp32", "bf16"):
            benchmark_extract(folder, pictures, 1, precision)
    benchmark_runs(runs)


def benchmark_tiny(folder):
    """Do `count`, `train`, `corpus` and `gpu` work?"""
    benchmark_count(folder, "tiny", pairs=4)
    benchmark_train(folder, "tiny", rounds=1)
    benchmark_corpus(folder, counts=[60_000])
    (folder / "gpu").mkdir()
    benchmark_gpu(folder / "gpu", "tiny", pairs=4, rounds=1, steps=2, runs=["train.py -h"],
        pictures=0)


BENCHMARKS = {
    "count": benchmark_count,
    "train": benchmark_train,
    "loading": benchmark_loading,
    "corpus": benchmark_corpus,
    "store": benchmark_store,
    "extract": benchmark_extract,
    "gpu": benchmark_gpu,
    "tiny": benchmark_tiny,
}


def main(argv=None):
    """Those that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("which", nargs="+", choices=BENCHMARKS)
    parser.add_argument("--json", type=Path, help="file for all figures")
    args = parser.parse_args(argv)
    for name in args.which:
        with tempfile.TemporaryDirectory() as folder:
            BENCHMARKS[name](Path(folder))
    if args.json:
        args.json.write_text(json.dumps(FOUND, indent=1))


if __name__ == "__main__":
    main()
