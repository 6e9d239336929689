"""Speed, as ratios of things measured in turn in one run: python tests/tools/benchmark.py [NAME ...]

A figure in seconds says more of the machine than of the code; a ratio of two that took turns within
a second of each other says something of the code on any machine. Let nothing else run beside it.

    count      operations of a training step and the bytes that they move, counted without running
               them: the same on every machine (half a minute)
    train      a training step with learned switches against frozen ones, a plain torch.nn BERT and
               the bare matrix products; growth, padding, loading, memory (10 minutes on 2 cores)
    loading    pairs per second of loading processes, alone and beside the steps of a fast GPU, and
               how many of them such steps need (a minute, .8 GB of disk)
    corpus     3.3 and 12.4 million captions: seconds and memory before the first step, and in
               loading processes (5 minutes, 3 GB of disk)
    store      reading a feature store against plain copies in memory, .npz files, pickled records
    extract    extraction from picture files against the bare network, at its real size
    gpu        all of it that a GPU can show, and the runs of the README, in ten minutes
    tiny       `count`, `train`, `corpus` and `gpu` at sizes that mean nothing: do they work?

--json FILE writes all figures.

The levers, each explained where it stands in the code, with a test that it equals the plain form.
Measured on two cores of an AMD EPYC, torch 2.14, fp32; "first code" is commit 6231a4c.

    switches as a bias, an       operations of a step: fp32 1,795 instead of 2,659 (frozen single
    average and a product        1,163, 1,226), bf16 2,346 instead of 3,356 (1,622, 1,739); GB
                                 outside matrix products, bf16, 256 pairs: 98 instead of 164 (76,
                                 86). Counted; `instead of` is commit 928b854
    fused attention              on a CPU, where it is not fused, forward and backward at base size
                                 (16 pairs, 75 tokens) 32.4 ms; as 928b854 wrote it 32.5; the
                                 explicit softmax 28.7. Measured on a slower machine, as below
    Switch-Input as a product    a layer of 12, forward and backward: 67 ms, a chain of addcmul 62;
                                 if the stack were kept 56, and 15 MB per pair more in all layers.
                                 A layer of 48: 258, 238 and 164
    batches of like length       captions of 12 pieces: 1.93 x the pairs per second of padding to
                                 38, 1.43 x in batches drawn at random; .7 % of the text is padding
    masked places as positions   no `nonzero` and no tensor of a Python list: nothing to wait for on
                                 a GPU; on a CPU no difference
    captions as numpy strings    3.3 million: 10 s and .63 GB before the first step (first code
                                 44 s, 1.7 GB with torch), 22 MB per loading process (a copy)
    words cut once               lru_cache of WordPiece: a batch of 64 in 6.2 ms instead of 7.5
    layers compiled one by one   12 layers of toy width in a minute on one core; the whole model was
                                 not ready after three. What it gains is for a GPU to show
    toy run                      92 and 95 s, first code 124 s (.75): batches of like length, 5 x 5
                                 bins in the detector, no blind run at its end, faster retrieval
    channels_last, fused AdamW   the toy detector: a fifth and a fourteenth

All of `train` at base size, frozen `single` = 1. Of 928b854, on the EPYC: learned 1.00,
attention .97, input .97, dual .96, late .97, intra .96, torch.nn.TransformerEncoder 1.13, bare
matrix products .82 (so learned is 1.23 of them). A layer of 48 costs 1.10 of a layer of 12. Now, on
the slower machine (two shared Xeon cores, one thread, not quiet): learned 1.09 (928b854 there
1.19), which is 1.51 of the bare products (1.57). Kept for the backward pass: 64 MB per pair (single
62).

`loading`, on the slower machine beside another program, a store of 1,601 classes: one process
loads 3,400 pairs per second (928b854: 490; medians of three runs in turn, 2,100 to 3,700 and 390 to
610; 3,900 when it was quieter). Steps of 25 ms per 256 pairs, 10,240 per second, need three or four
of them, on cores of their own: two processes on these two cores load 4,000. A batch of 256 costs
one of them 30 ms of examples, 15 of padding, and 28 of a copy to the memory that processes share.
The step of a CPU makes 4.3 pairs per second and never waits.
"""

import argparse
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
from switchbert import (FROZEN, SwitchBertConfig, SwitchBertForPretraining,  # noqa: E402
    SwitchBertOutput)

FOUND = {}  # what was measured: {benchmark: {name: number}}


def sync():
    """Wait until the GPU has done what it was asked for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def take_turns(functions, rounds):
    """{name: median seconds} of functions that are called in turn, after one call that warms up."""
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

    A view is no operation. A matrix product is one, but its bytes do not count: its time is that
    of its arithmetic. Elsewhere a GPU waits for its memory, so bytes are time; and its host needs
    some microseconds for an operation of any size. Fused attention counts as its parts, as on a
    CPU with dropout; on a GPU it is one operation.
    """

    def __init__(self):
        super().__init__()
        self.operations = 0
        self.bytes = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        name = operation.overloadpacket.__name__
        aliases = [value.alias_info for value in operation._schema.returns]
        is_view = any(alias and not alias.is_write for alias in aliases)
        if is_view or name == "_unsafe_view" or operation.namespace == "prim":
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
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            loss = model(**batch, temperature=1.0).loss
        loss.backward()
    return count


def fake_model_and_batch(config, form):
    """Of fake tensors, which have shapes but no numbers: for use within a FakeTensorMode."""
    batch = {}
    for name, of_a_pair in make_batch(config, **dict(form, pairs=1)).items():
        shape = (form["pairs"] * len(of_a_pair), *of_a_pair.shape[1:])
        batch[name] = torch.empty(shape, dtype=of_a_pair.dtype)
    return SwitchBertForPretraining(config).train(), batch


def count_fake_step(config, form, dtype=None):
    """The Count of a step at any size, in two seconds, because nothing is computed."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        return count_step(*fake_model_and_batch(config, form), dtype)


def benchmark_count(folder, size="base", pairs=256):
    """Operations, which do not depend on the number of pairs, and gigabytes."""
    make, form = SIZES[size]
    form = dict(form, pairs=pairs)
    for precision, dtype in (("fp32", None), ("bf16", torch.bfloat16)):
        counts = {name: count_fake_step(make(switches=name), form, dtype)
            for name in ("learned", "attention", "input", "single")}
        single = counts["single"]
        operations = {name: count.operations for name, count in counts.items()}
        operations["learned, single = 1"] = operations["learned"] / single.operations
        show(f"operations of a step, {size}, {precision}", "forward + backward", operations)
        gigabytes = {name: count.bytes / 1e9 for name, count in counts.items()}
        gigabytes["learned, single = 1"] = gigabytes["learned"] / gigabytes["single"]
        show(f"moved outside matrix products, {size}, {precision}", f"GB, {pairs} pairs",
            gigabytes)


# --- train ----------------------------------------------------------------------------------------

SIZES = {  # of the model; pairs, word pieces and regions of a batch without padding
    "base": (SwitchBertConfig.base, dict(pairs=16, pieces=38, regions=36)),
    "tiny": (SwitchBertConfig.tiny, dict(pairs=4, pieces=9, regions=5))}


def make_batch(config, pairs, pieces, regions):
    """A batch of made-up pairs, all of one length: 15 % of the words and regions are predicted."""
    rng, classes = np.random.default_rng(0), config.num_region_classes
    examples = []
    for _ in range(pairs):
        words = np.sort(rng.permutation(np.arange(1, pieces - 1))[: max(1, pieces * 15 // 100)])
        places = np.sort(rng.permutation(regions)[: max(1, regions * 15 // 100)])
        corner = rng.random((regions, 2), dtype=np.float32) / 2
        examples.append(dict(input_ids=rng.integers(5, config.vocab_size, pieces),
            region_features=rng.normal(size=(regions, config.region_feature_size)).astype("f2"),
            region_boxes=np.hstack([corner, corner + 0.5, np.full((regions, 1), 0.25, "f4")]),
            region_hidden=np.isin(np.arange(regions), places), mlm_positions=words,
            mlm_labels=rng.integers(5, config.vocab_size, len(words)), mrc_positions=places,
            mrc_targets=rng.dirichlet(np.ones(classes), len(places)).astype("f4"),
            itm_positions=np.array([0]), itm_labels=np.array([MATCH])))
    return train.to_device(collate(examples))


def build(config):
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
        ones = torch.ones_like(region_mask[:, :1])
        padding = torch.cat([text_mask, ones, region_mask], dim=1) == 0
        states = encoder(torch.cat([text, vision], dim=1), src_key_padding_mask=padding)
        n = text.shape[1]
        pooled = model.bert.pooler(states[:, 0], states[:, n])
        return SwitchBertOutput(states[:, :n], states[:, n + 1 :], pooled, None, None)

    model.bert.layers, model.bert.forward, model.plain = nn.ModuleList(), encode, encoder
    return model


def matrix_products(config, pairs, length, dtype=torch.float32):
    """The products of all layers, forward and twice as many backward, and nothing else."""
    d, wide, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    new = dict(device=train.device(), dtype=dtype)
    states, inner = (torch.randn(pairs * length, n, **new) for n in (d, wide))
    square, up = torch.randn(d, d, **new), torch.randn(d, wide, **new)
    q, scores = (torch.randn(pairs * heads, length, n, **new) for n in (d // heads, length))

    def run(turn):
        for _ in range(config.num_hidden_layers):
            for x, w in (*[(states, square)] * 4, (states, up), (inner, up.T)):
                y = x @ w  # and the gradients of x and of w
                y @ w.T, x.T @ y
            for a, b in ((q, q.transpose(1, 2)), (scores, q)):
                y = a @ b
                y @ b.transpose(1, 2), a.transpose(1, 2) @ y
    return run


def stepper(model, batch, tau=1.0, dtype=None):
    """A function that makes one forward and backward pass."""
    def run(turn):
        model.zero_grad(set_to_none=True)
        with torch.autocast(train.device().type, dtype, enabled=dtype is not None):
            loss = model(**batch, temperature=tau).loss
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
        blocks[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**batch, temperature=1.0).loss
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    del loss
    return sum(n for p, n in blocks.items() if p not in weights) / 1e6 / len(batch["itm_labels"])


def benchmark_train(folder, size="base", rounds=5):
    """Ratios of training steps; `folder` is for the store that loading reads."""
    make, form = SIZES[size]
    batch, length = make_batch(make(), **form), form["pieces"] + 1 + form["regions"]

    settings = ["learned", "attention", "input", *FROZEN]
    models = {name: build(make(switches=name)) for name in settings}
    steps = {name: stepper(model, batch) for name, model in models.items()}
    steps["torch.nn.TransformerEncoder"] = stepper(plain_bert(make(switches="intra")), batch)
    steps["bare matrix products"] = matrix_products(make(), form["pairs"], length)
    seconds = take_turns(steps, rounds)
    show(f"step, {size}", "frozen single = 1",
        {name: s / seconds["single"] for name, s in seconds.items()})
    show(f"pairs per second, {size}", "1/s",
        {name: form["pairs"] / s for name, s in seconds.items()})
    show(f"memory of a step, {size}", "MB per pair, kept for the backward pass",
        {name: saved_for_backward(models[name], batch) for name in ("learned", "single")})
    seconds = take_turns({name: inference(models[name], batch)
        for name in ("learned", "single")}, rounds)
    show(f"hard inference, {size}", "frozen single = 1",
        {"learned": seconds["learned"] / seconds["single"]})

    # One thing is doubled at a time, from a model of four layers.
    fewer = dict(form, pairs=max(2, form["pairs"] // 4))
    tall = {n: build(make(num_hidden_layers=n)) for n in (4, 12, 24, 48)}
    few = make_batch(make(), **fewer)
    grown = {f"{n} layers": stepper(model, few) for n, model in tall.items()}
    for name, value in fewer.items():
        grown[f"4 layers, {2 * value} {name}"] = stepper(
            tall[4], make_batch(make(), **dict(fewer, **{name: 2 * value})))
    seconds = take_turns(grown, max(1, rounds // 2))
    per_layer = (seconds["12 layers"] - seconds["4 layers"]) / 8  # embeddings and heads cancel
    show(f"growth, {size}", "a step of 4 layers = 1", {n: s / seconds["4 layers"]
        for n, s in seconds.items()} | {"a layer of 48, of 12 layers = 1":
            (seconds["48 layers"] - seconds["4 layers"]) / 44 / per_layer})
    benchmark_padding(models["learned"], form, max(1, rounds // 2))
    benchmark_loading(folder, size, pairs=256 if size == "base" else form["pairs"])


def caption_lengths(n, most=38):
    """Word pieces of n captions, about as Conceptual Captions has them: 5 to 38, 12 on average.

    With another `most` all of them are shorter in proportion, but for three pieces.
    """
    lengths = (5 + np.random.default_rng(1).gamma(2.0, 3.5, n)).clip(max=38).astype(int)
    return (lengths * most // 38).clip(min=3)


def benchmark_padding(model, form, rounds, batches=12):
    """Captions of real lengths: padded to 38, in batches drawn at random, and of like length."""
    size, most = form["pairs"], form["pieces"]
    lengths = caption_lengths(20_000, most)
    examples = type("Lengths", (), {"lengths": lengths, "__len__": lambda self: len(lengths)})()
    orders = {"of like length": train.epoch_batches(0, 0, size, examples)[:batches],
        "drawn at random": np.random.default_rng(0).integers(0, len(lengths), (batches, size))}
    seconds, padding = {}, {}
    full = stepper(model, make_batch(model.config, **form))
    for name, order in orders.items():
        each = [make_batch(model.config, size, int(lengths[b].max()), form["regions"])
            for b in order]
        steps = {f"{k}": stepper(model, batch) for k, batch in enumerate(each)}
        taken = take_turns({"full": full, **steps}, rounds)
        seconds[name] = taken.pop("full") * batches / sum(taken.values())
        padding[name] = 1 - sum(lengths[b].sum() for b in order) / sum(
            lengths[b].max() * size for b in order)
    padding["padded to the longest"] = 1 - lengths.mean() / most
    show("captions of real lengths", "pairs per second, padded to the longest = 1", seconds)
    show("padding among word pieces", "share", padding)


# --- loading --------------------------------------------------------------------------------------

STEP = 0.025 / 256  # seconds per pair of a fast GPU's step: an estimate, until `gpu` measures it


def write_store(folder, images, regions, config):
    """A store of made-up images, with a detector's last layer for the classes of their regions."""
    rng = np.random.default_rng(0)
    classes, size = config.num_region_classes, config.region_feature_size
    writer = FeatureStore.create(folder, range(images), regions, size,
        class_head=(rng.normal(size=(classes, size)), np.zeros(classes)))
    writer.arrays["features"][:] = rng.normal(size=(regions, size))
    for name, value in dict(sizes=10, boxes=[1, 1, 9, 9], counts=regions).items():
        writer.arrays[name][:] = value
    return writer.finish()


def made_up_pairs(folder, images, form, config):
    """A PretrainingDataset of such a store: captions of real lengths, of words of real frequencies
    (the second is half as frequent as the first, the third a third).
    """
    store = write_store(folder, images, form["regions"], config)
    words = [f"word{i}" for i in range(config.vocab_size - len(SPECIALS))]
    rng, captions = np.random.default_rng(0), []
    for image, length in enumerate(caption_lengths(images, form["pieces"])):
        ranks = len(words) ** rng.random(length - 2)  # [CLS] and [SEP] are pieces, too
        captions.append((image, " ".join(words[int(rank) - 1] for rank in ranks)))
    return PretrainingDataset(store, captions, WordPiece([*SPECIALS, *words]))


def load(data, pairs, batches, workers, step):
    """Pairs per second of `batches` batches that are loaded, and of `step(batch)` for each."""
    args, _ = train.parse_args(["--batch", str(pairs), "--workers", str(workers), "--data", "."])
    early = 2 * workers + 1  # loaded while the processes start
    loader = train.load_parts(args, argparse.Namespace(examples=data, collate=collate), 0,
        early + batches)
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

    The step of a GPU is played by a sleep: meanwhile the host does nothing but load. A model's own
    steps are measured if one is given. An epoch sees each image once or twice, and so do these
    processes: no more of the store is mapped than they have read.
    """
    make, form = SIZES[size]
    data = made_up_pairs(folder / "loading", (batches + 5) * pairs, form, make())

    def nothing(batch):
        """Loading alone."""

    def sleep(batch):
        time.sleep(STEP * pairs)

    def model_step(batch):
        batch = class_targets(train.to_device(batch), data.store)
        stepper(model, batch, dtype=dtype)(0)

    ways = {"in the training process": (0, nothing), "1 process": (1, nothing),
        "2 processes": (2, nothing), "1 process beside steps of 25 ms per 256": (1, sleep),
        "2 processes beside steps of 25 ms per 256": (2, sleep)}
    if model:
        ways["2 processes beside the model's steps"] = 2, model_step
    found = {name: [] for name in ways}
    for _ in range(rounds):
        for name, (workers, step) in ways.items():
            found[name].append(load(data, pairs, batches, workers, step))
    rates = {name: median(each) for name, each in found.items()}
    if model:
        batch = collate([data[i] for i in range(pairs)])
        seconds = take_turns({"step": lambda turn: model_step(batch)}, rounds)["step"]
        rates["the model's steps on a batch in memory"] = pairs / seconds
    show("loading", "pairs per second", rates)
    show("loading for steps of 25 ms per 256 pairs", "processes",
        {"needed": 1 / STEP / rates["1 process"]})


# --- corpus ---------------------------------------------------------------------------------------


def write_corpus(folder, count):
    """A caption file and a store of as many tiny images, as large as Conceptual Captions'."""
    rng = np.random.default_rng(0)
    words = np.array(["".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), n))
        for n in rng.integers(2, 9, 3000)])
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join([*SPECIALS, *words]))
    codes = set()
    with open(folder / "captions.tsv", "w") as file:
        for i, length in enumerate(caption_lengths(count)):
            link = f"http://host{i % 977}.example.com/images/{i:09d}.jpg"
            file.write(" ".join(words[rng.integers(0, 3000, length)]) + f"\t{link}\n")
            codes.add(zlib.crc32(link.encode()))
    writer = FeatureStore.create(folder / "features", sorted(codes), 1, 2, detector="made up")
    for name, value in dict(sizes=10, boxes=[1, 1, 9, 9], counts=1).items():
        writer.arrays[name][:] = value
    writer.finish()


def memory(pid="self"):
    """Megabytes that are a process's own: what it shares with its parent or with files is not."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    sizes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return (sizes["Private_Clean"] + sizes["Private_Dirty"]) / 1e3


def corpus_child(folder, loaders=4, batches=200):
    """In a process of its own: read the corpus as train.py does, and load some thousand pairs."""
    start, before = time.perf_counter(), memory()
    data = train.load_data(folder)
    pairs = PretrainingDataset(data.store, data.captions, data.tokenizer)
    del data  # as train.pretrain does: captions that are left out need not be kept
    args, _ = train.parse_args(["--data", str(folder), "--workers", str(loaders)])
    train.epoch_batches(args.seed, 0, args.batch, pairs)
    seconds, after = time.perf_counter() - start, memory()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    task = argparse.Namespace(examples=pairs, collate=collate)
    iterator = train.load_parts(args, task, 0, len(pairs) // args.batch)
    own = lambda: sum(memory(worker.pid) for worker in iterator._workers) / loaders  # noqa: E731
    next(iterator)
    first, begun = own(), time.perf_counter()
    for _ in range(batches):
        next(iterator)
    print(json.dumps({"captions": len(pairs), "seconds": seconds, "MB before any data": before,
        "MB of data": after - before, "MB at most": peak, "MB per loading process": first,
        f"MB more after {batches} batches": own() - first,
        "pairs loaded per second": batches * args.batch / (time.perf_counter() - begun)}))


def benchmark_corpus(folder, counts=(3_300_000, 12_400_000)):
    """Each size in a fresh process."""
    for count in counts:
        write_corpus(folder / str(count), count)
        code = f"import benchmark as b; b.corpus_child(b.Path({str(folder / str(count))!r}))"
        found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True,
            text=True, cwd=Path(__file__).parent)
        show(f"corpus of {count:,}", "as named", json.loads(found.stdout.splitlines()[-1]))


# --- store and extract ----------------------------------------------------------------------------


def benchmark_store(folder, images=2000, batch=256, rounds=30):
    """Batches (256, 36, 2048) of random images of a store that is in the page cache (295 MB)."""
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

    def npz(row):
        with np.load(folder / "npz" / f"{row}.npz", allow_pickle=False) as file:
            return {name: file[name] for name in file}

    readers = {"store": lambda row: store[row], "npz": npz,
        "pickle": lambda row: pickle.loads(mapped[offsets[row] : offsets[row + 1]])}
    orders = [rng.integers(images, size=batch) for _ in range(rounds + 1)]
    seconds = take_turns({"memory": lambda turn: np.stack([ram[row] for row in orders[turn]]),
        **{name: lambda turn, read=read: pad([read(row)["features"] for row in orders[turn]])
            for name, read in readers.items()}}, rounds)
    size = batch * ram[0].nbytes / 1e9
    show("store", "random batches of 256", {"GB per second": size / seconds["store"],
        "of plain copies in memory": seconds["memory"] / seconds["store"],
        "times as fast as .npz files": seconds["npz"] / seconds["store"],
        "times as fast as pickled records": seconds["pickle"] / seconds["store"]})


def random_vg():
    """Visual Genome's detector with random weights, made so that its boxes differ."""
    torch.manual_seed(0)
    model = extract_features.build_detector("vg")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    for name, buffer in model.named_buffers():
        if name.endswith("bn3.weight"):
            buffer.fill_(0.2)  # or what 33 blocks add grows beyond all numbers
    # With random weights and no anchors all boxes would be alike, and selection would be free.
    sizes = 2.0 ** torch.arange(4).repeat_interleave(3) * 20
    wide = torch.tensor([1.4, 1.0, 0.7]).repeat(4) * sizes
    model.rpn.anchor_generator.cells.copy_(
        torch.stack([-wide, -sizes * sizes / wide, wide, sizes * sizes / wide], dim=1))
    return model


def benchmark_extract(folder, pictures=2, rounds=3, precision="fp32"):
    """vg at 600 x 1000 with random weights: all of `extract` from JPEG files, against backbone,
    proposals, pooling and head alone on the prepared pictures.
    """
    model = random_vg()
    (folder / "images").mkdir(exist_ok=True)
    for i in range(pictures):
        noise = np.random.default_rng(i).integers(0, 256, (38, 63, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((1000, 600)).save(folder / "images" / f"{i}.jpg")
    files = files_below(folder / "images", PICTURES)
    images = [extract_features.pil_to_tensor(extract_features.open_picture(p)) / 255
        for p in files]
    where = next(model.parameters()).device
    prepared = [model.transform([image.to(where)])[0] for image in images]

    @torch.no_grad()
    def network(turn):
        with torch.autocast(where.type, torch.bfloat16, enabled=precision == "bf16"):
            for image in prepared:
                maps = {"0": model.backbone(image.tensors)}
                boxes, _ = model.rpn(image, maps)
                pooled = model.roi_heads.box_roi_pool(maps, boxes, image.image_sizes)
                model.roi_heads.box_predictor.cls_score(model.roi_heads.box_head(pooled))

    def extraction(turn):
        writer = FeatureStore.create(folder / f"{precision}{turn}", files, 36, **model.about)
        extract_features.fill(writer, model, files, extract_features.load_picture, 1,
            precision=precision, workers=4 if where.type == "cuda" else 0)

    seconds = take_turns({"network": network, "extraction": extraction}, rounds)
    show(f"extract, {precision}", f"600 x 1000 on {where.type}", {
        "pictures per second": pictures / seconds["extraction"],
        "of the network's time": seconds["extraction"] / seconds["network"]})


# --- gpu ------------------------------------------------------------------------------------------


def flops_of(model, batch):
    """Floating-point operations of forward and backward on a batch, without its padding.

    Every weight of the layers meets every token once forward and twice backward, with a product
    and a sum each time: 6 per weight and token. The two L x L products of attention add 12 L D per
    token and layer. Embeddings and heads, 3 % of the base model, are left out.
    """
    layers, hidden = model.bert.layers, model.config.hidden_size
    tokens = 1 + batch["text_mask"].sum(dim=1) + batch["region_mask"].sum(dim=1)  # (B,), of L
    weights = sum(parameter.numel() for parameter in layers.parameters())
    attention = 12 * hidden * len(layers) * (tokens**2).sum()
    return (6 * weights * tokens.sum() + attention).item()


def matmul_rate(dtype):
    """Operations per second of a large matrix product on this device: what can be reached."""
    n, repeats = (8192, 20) if train.device().type == "cuda" else (1024, 3)
    a, seconds = torch.randn(n, n, device=train.device(), dtype=dtype), []
    for _ in range(3):  # the first time is warming up
        started = time.time()
        for _ in range(repeats):
            product = a @ a
        product[0, 0].item()  # waits for all of them
        seconds.append(time.time() - started)
    return 2 * n**3 * repeats / min(seconds)


def benchmark_gpu(folder, size="base", pairs=256, rounds=5, steps=50, runs=("train.py",
        "finetune.py vqa", "finetune.py retrieval", "finetune.py refer"), pictures=64):
    """Everything that the README says of a GPU, in one go; at small sizes it runs on a CPU."""
    where, (make, form) = train.device(), SIZES[size]
    form = dict(form, pairs=pairs)
    batch, length = make_batch(make(), **form), form["pieces"] + 1 + form["regions"]
    print(torch.cuda.get_device_name() if where.type == "cuda" else platform.processor(), where)

    # 1. A step in fp32, bf16, and compiled, against a large matrix product in bf16.
    models = {name: build(make(switches=name)) for name in ("learned", "single")}
    compiled = build(make())
    train.compile_layers(compiled)
    half, rate = torch.bfloat16, matmul_rate(torch.bfloat16)
    steps_of = {"fp32": stepper(models["learned"], batch),
        "bf16": stepper(models["learned"], batch, dtype=half),
        "bf16, frozen single": stepper(models["single"], batch, dtype=half),
        "bf16, compiled": stepper(compiled, batch, dtype=half),
        "bare products in bf16": matrix_products(make(), pairs, length, half)}
    seconds = take_turns(steps_of, rounds)
    flops = flops_of(models["learned"], {k: v.cpu() for k, v in batch.items()
        if torch.is_tensor(v)})
    show("gpu: pairs per second", "1/s", {n: pairs / s for n, s in seconds.items()})
    show("gpu: share of a large bf16 product's rate", f"of {rate / 1e12:.0f} TFLOP/s",
        {n: flops / s / rate for n, s in seconds.items()})
    hours = {n: 33e6 / (pairs / s) / 3600 for n, s in seconds.items() if "bare" not in n}
    show("gpu: ten epochs of Conceptual Captions", "hours of one card", hours)

    # 2. Memory per pair, and the largest batch.
    if where.type == "cuda":
        found = {}
        for name, dtype in (("fp32", None), ("bf16", half)):
            used = []
            for n in (pairs // 4, pairs // 2):
                torch.cuda.reset_peak_memory_stats()
                stepper(models["learned"], make_batch(make(), **dict(form, pairs=n)),
                    dtype=dtype)(0)
                used.append(torch.cuda.max_memory_allocated() / 1e9)
            found[f"{name}, GB per pair"] = (used[1] - used[0]) / (pairs // 4)
            free = torch.cuda.get_device_properties(0).total_memory / 1e9 - used[0]
            found[f"{name}, largest batch"] = pairs // 4 + free / found[f"{name}, GB per pair"]
        show("gpu: memory", "as named", found)

    # 3. The same run in fp32 and bf16: how far apart are the losses?
    ends = {}
    for name, dtype in (("fp32", None), ("bf16", half)):
        model = build(make())
        optimizer = train.make_optimizer(model)
        for group in optimizer.param_groups:
            group["lr"] = 1e-4
        for step in range(steps):
            torch.manual_seed(step)
            stepper(model, batch, dtype=dtype)(step)
            optimizer.step()
        with torch.no_grad():
            ends[name] = model.eval()(**batch).loss.item()
    show(f"gpu: loss after {steps} steps on one batch", "sum of the three", ends)

    # 4. Loading, extraction, and the runs themselves.
    benchmark_loading(folder, size, pairs, model=models["learned"], dtype=half)
    if pictures:
        for precision in ("fp32", "bf16"):
            benchmark_extract(folder, pictures, 1, precision)
    for command in runs:
        start = time.perf_counter()
        done = subprocess.run([sys.executable, *command.split()], cwd=ROOT, capture_output=True,
            text=True)
        show("gpu: runs of the README", "seconds", {command: time.perf_counter() - start})
        print("\n".join((done.stdout + done.stderr).splitlines()[-8:]))


def benchmark_tiny(folder):
    """Do `count`, `train`, `corpus` and `gpu` work?"""
    benchmark_count(folder, "tiny", pairs=4)
    benchmark_train(folder, "tiny", rounds=1)
    benchmark_corpus(folder, counts=[60_000])
    (folder / "gpu").mkdir()
    benchmark_gpu(folder / "gpu", "tiny", pairs=4, rounds=1, steps=2, runs=["train.py -h"],
        pictures=0)


BENCHMARKS = {"count": benchmark_count, "train": benchmark_train, "loading": benchmark_loading,
    "corpus": benchmark_corpus, "store": benchmark_store, "extract": benchmark_extract,
    "gpu": benchmark_gpu, "tiny": benchmark_tiny}


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
