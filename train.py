"""train.py: pretraining, from pixels or from a feature store to a checkpoint
============================================================================

Where this stands

    toy world --extract_features.py--> feature store --data.py--> batches
                                                                    |
        AdamW, warm-up, temperature(pairs seen)  --->  SwitchBertForPretraining (switchbert.py)
                                                                    |
        runs/pretrain/  checkpoint.pt  metrics.csv  config.json  switches.png  --->  finetune.py

    B batch, T word pieces, R regions, F region feature, C region classes

    python train.py                     the whole toy run: 2 to 5 minutes on two CPU cores
    python train.py --gpus 4            the same on 4 GPUs; with a folder data/, the full run on it
    python train.py --resume            go on with a run that was stopped or killed
    torchrun --nnodes 2 --nproc-per-node 4 train.py      ... on two machines

Without data it draws scenes, trains a Faster R-CNN on them, extracts regions, pretrains, and
evaluates on scenes that nothing was trained on. What a run finds ready in runs/world/ it does not
make again. It prints one line an evaluation:

    step   450/900  lr 5.6e-04  tau 0.84  loss mlm 0.72 mrc 2.48 itm 0.50 | words ...  match ...

`words` is the share of masked word pieces that were predicted right, `match` the accuracy of
image-text matching (chance: .50), both on held-out pairs with hard switches. At the end: retrieval
among 100 images that the model never saw, and what every layer chose, as a picture.

A run is a function of its settings: which pairs make up a batch, what is masked in them, and the
noise of dropout and switches follow from (seed, epoch, step) and from no hidden state. That is why
a killed run resumes bit for bit, and why 1, 2 or 8 processes train on the same batches.

Map of the file

    1. Settings         flags, and what the toy run and the full run set them to
    2. Processes        one, several on this machine, or several machines
    3. Data             the toy world, or a folder of captions and features
    4. Optimisation     parameter groups, learning rate, the parts of a batch, one step
    5. Evaluation       losses and accuracies, zero-shot retrieval
    6. The record       checkpoint, metrics.csv, switches.png
    7. The run          all of it in order

Departures from the paper: A5 (temperature by pairs), A7 (VOLTA's settings), A10 (slow gates), D2
(the toy run's sizes, learning rate and annealing).
"""

import argparse
import atexit
import contextlib
import csv
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image, ImageDraw, ImageFont
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import (HELD_OUT_SCENES, IGNORE, TRAIN_SCENES, BadInput, FeatureStore, PretrainingDataset,
    Scene, WordPiece, build_vocab, collate, model_inputs, read_captions, region_inputs, write_whole)
from switchbert import (MATCH, SwitchBertConfig, SwitchBertForPretraining, SwitchBertForRetrieval,
    check_bert_config, load_bert, temperature)

# --- 1. Settings ----------------------------------------------------------------------------------

# What the data decide unless a flag of the same name does. FULL is the paper's [supp. 2] and, where
# it is silent, VOLTA's (A7). anneal: share of the run at which the temperature reaches 0.2; None is
# the paper's rate, 1e-6 a pair (A5).
TOY = dict(model="small", epochs=4, batch=64, lr=1e-3, eval_every=225, anneal=0.9)
FULL = dict(model="base", epochs=10, batch=256, lr=1e-4, eval_every=1000, anneal=None)


def parse_args(argv=None):
    """The settings of a run."""
    p = argparse.ArgumentParser(
        description="Pretrain Switch-BERT.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    both = {k: f"toy world: {TOY[k]}, data folder: {FULL[k]}" for k in TOY}
    p.add_argument("--data", type=Path, help="folder with features/ and captions; default: data/ "
        "if there is one, otherwise the toy world")
    p.add_argument("--switches", choices=["learned", "intra", "single", "dual", "late"],
        default="learned", help="learn the switches, or freeze them")
    p.add_argument("--model", choices=["base", "small"], help="12 layers x 768, or the toy run's 4 "
        "x 128; " + both["model"])
    p.add_argument("--bert", type=Path, help="Hugging Face BERT folder to start from; default: "
        "bert/ in the data folder if it is there")
    add_run_flags(p, Path("runs/pretrain"), both)
    return p.parse_args(argv)


def add_run_flags(p, out, both):
    """The flags of every training; both: for each setting that the data decide, its values."""
    p.add_argument("--out", type=Path, default=out, help="folder of the results")
    p.add_argument("--limit", type=int, help="train on only so many examples")
    p.add_argument("--epochs", type=int, help=both["epochs"])
    p.add_argument("--batch", type=int,
        help="examples a step, over all processes; " + both["batch"])
    p.add_argument("--lr", type=float, help="highest learning rate; " + both["lr"])
    p.add_argument("--eval-every", type=int,
        help="steps between evaluations and checkpoints; " + both["eval_every"])
    p.add_argument("--anneal", type=float, help="share of the run at which the temperature reaches "
        "0.2; " + both["anneal"] + " (None: the paper's 1e-6 an example)")
    p.add_argument("--seed", type=int, default=0, help="all randomness follows from it")
    p.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    p.add_argument("--gpus", type=int, default=1, help="processes, one a GPU; without GPUs on CPU")
    p.add_argument("--accum", type=int, default=1, help="parts in which each process works off its "
        "share of a batch: more parts, less memory, same result")
    p.add_argument("--workers", type=int, default=0, help="loading processes for each process")
    p.add_argument("--precision", choices=["bf16", "fp32"], help="default: bf16 where a GPU has it")
    p.add_argument("--compile", action="store_true", help="torch.compile the model")
    p.add_argument("--threads", type=int, help="CPU threads of each process; default: all cores. "
        "On a machine that is busy with something else use 1: a second thread that must wait for a "
        "core makes every operation wait")


def available_cores():
    """Cores this process may use: containers and job schedulers allow fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --- 2. Processes ---------------------------------------------------------------------------------


def launch(work, args):
    """Run work(args) in args.gpus processes, or as the member of a job that torchrun started.

    A process that fails ends the others, and its error is the one that is shown.
    """
    if "RANK" in os.environ:  # torchrun has set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and _PORT
        return _member(int(os.environ["LOCAL_RANK"]), work, args, None)
    available = torch.cuda.device_count()
    if available and args.gpus > available:
        raise BadInput(f"--gpus {args.gpus}: this machine has {available}")
    if args.gpus <= 1:
        return _member(0, work, args, None)
    with socket.socket() as probe:  # a port that is free now, so that two runs do not meet
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.spawn(_member, (work, args, port), nprocs=args.gpus, join=False)
    # Ctrl-C reaches every process of the terminal by itself; SIGTERM reaches only this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: [p.terminate() for p in context.processes])
    try:
        while not context.join():
            pass
    except mp.ProcessExitedException as error:  # ended by a signal, or by sys.exit
        sys.exit(error.exit_code)
    except mp.ProcessRaisedException as error:
        last = str(error).strip().splitlines()[-1]
        if last.startswith("data.BadInput: "):
            raise BadInput(last.removeprefix("data.BadInput: ")) from None
        raise


def _member(local_rank, work, args, port):
    torch.set_num_threads(args.threads or max(1, available_cores() // args.gpus))
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local_rank)
    if port is not None:
        os.environ.update(RANK=str(local_rank), WORLD_SIZE=str(args.gpus), MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port))
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if cuda else "gloo")
    try:
        result = work(args)
    finally:
        grouped = dist.is_initialized()
        if grouped:
            dist.destroy_process_group()
    if grouped:
        # Gloo's threads live on; where one of them still works while the interpreter is taken down,
        # the process aborts after all is done. So it ends here, once what must be is tidied up.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    return result


def rank():
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """How many processes work together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def device():
    """Where this process computes."""
    return (torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available()
        else (torch.device("cpu")))


def total(tensor):
    """The sum of this tensor over all processes, for every one of them."""
    if dist.is_initialized():
        tensor = tensor.to(device())  # NCCL adds up nothing that lies on the CPU
        dist.all_reduce(tensor)
    return tensor


def say(*words):
    """Print once, not once a process, and at once."""
    if rank() == 0:
        print(*words, flush=True)


@contextlib.contextmanager
def first_process_first():
    """The first process does what follows alone; the others do it after it, and find it done."""
    if rank() > 0:
        dist.barrier()
    yield
    if rank() == 0 and dist.is_initialized():
        dist.barrier()


class Stop:
    """SIGTERM or Ctrl-C: finish the step, save, end. A second Ctrl-C ends at once."""

    def __init__(self):
        self.asked = False
        for sign in (signal.SIGTERM, signal.SIGINT):
            signal.signal(sign, self._ask)

    def _ask(self, number, frame):
        self.asked = True
        signal.signal(signal.SIGINT, signal.SIG_DFL)


# --- 3. Data --------------------------------------------------------------------------------------

NUM_HELD_OUT = 400  # scenes for the losses and accuracies; the first 100 of them for retrieval


def toy_world(folder=Path("runs/world"), num_scenes=3600):
    """(store, training captions, held-out captions, tokenizer) of the toy world, made where it is
    missing.

    Captions are (image id, text) pairs; a scene's id is its number.
    """
    numbers = [*range(TRAIN_SCENES, TRAIN_SCENES + num_scenes),
        *range(HELD_OUT_SCENES, HELD_OUT_SCENES + NUM_HELD_OUT)]
    store_folder, vocab_file = folder / f"features-{num_scenes}", folder / "vocab.txt"
    if not FeatureStore.is_complete(store_folder):
        # Only here: whoever has a store needs no torchvision.
        from extract_features import extract_scenes, toy_detector

        extract_scenes(
            toy_detector(folder / "detector.pt", numbers[:num_scenes]), numbers, store_folder)
    training = [(n, text) for n in numbers[:num_scenes] for text in Scene(n).captions(4)]
    held_out = [(n, text) for n in numbers[num_scenes:] for text in Scene(n).captions(2)]
    if not vocab_file.exists():
        pieces = build_vocab(toy_sentences())
        write_whole(vocab_file, lambda f: f.writelines(p + "\n" for p in pieces))
    return FeatureStore(store_folder), training, held_out, WordPiece(vocab_file)


def toy_sentences():
    """Everything that is said about some scenes: the vocabulary must serve finetuning too."""
    for scene in map(Scene, range(TRAIN_SCENES, TRAIN_SCENES + 1000)):
        yield from scene.captions()
        yield from (f"{question} {answer}" for question, answer, _ in scene.questions())
        yield from (expression for expression, _, _ in scene.expressions())


@dataclass
class Data:
    """What a run trains on: regions, pairs as (image id, text), and the words."""

    store: FeatureStore
    captions: list
    held_out_captions: list
    tokenizer: WordPiece
    toy: bool


def load_data(folder, out, limit=None):
    """The data of a folder, or of the toy world where it is None.

    A folder holds features/ (a store), caption files (*.tsv, *.json, any number), and a vocabulary,
    vocab.txt or that of bert/; where there is neither, one is built from the captions into `out`.
    """
    if folder is None:
        with first_process_first():
            store, training, held_out, tokenizer = toy_world()
        return Data(store, training[:limit], held_out, tokenizer, True)
    store = FeatureStore(folder / "features")
    training, held_out = split_captions(folder)
    if limit:
        training = training[:limit]
    places = (folder / "vocab.txt", folder / "bert" / "vocab.txt")
    vocab = next((p for p in places if p.exists()), None)
    if vocab is None:
        vocab = out / "vocab.txt"
        with first_process_first():
            if not vocab.exists():
                out.mkdir(parents=True, exist_ok=True)
                pieces = build_vocab(text for _, text in training)
                write_whole(vocab, lambda f: f.writelines(p + "\n" for p in pieces))
    return Data(store, training, held_out, WordPiece(vocab), False)


def split_captions(folder):
    """(training, held-out) pairs of all caption files of a folder.

    Held out are the `val` captions of files that have splits; if none has, those of 1 % of the
    images (5 at least): the ones with the smallest crc32, whatever the files and their order.
    At most 1,000 captions.
    """
    files = sorted(p for p in folder.iterdir() if p.suffix in (".tsv", ".json"))
    if not files:
        raise BadInput(f"{folder}: no caption file here; expected *.tsv or *.json beside features/")
    training = [pair for path in files for pair in read_captions(path, "train")]
    held_out = [pair for path in files for pair in read_captions(path, "val")]
    if not held_out:
        ids = sorted({i for i, _ in training}, key=lambda i: (zlib.crc32(i.encode()), i))
        chosen = set(ids[: max(5, len(ids) // 100)])
        held_out = [pair for pair in training if pair[0] in chosen]
        training = [pair for pair in training if pair[0] not in chosen]
    return training, held_out[:1000]


# --- 4. Optimisation ------------------------------------------------------------------------------


def learning_rate(step, total, peak, warmup=0.1):
    """Learning rate of a step, counted from 0: linear up over the first 10 % of steps, linear down
    to 0.

    of 1,000 steps, step  0     49   99   550  775   1,000
    rate / peak           0.01  0.5  1    0.5  0.25  0
    """
    rise = max(1, round(warmup * total))
    return peak * min((step + 1) / rise, (total - step) / max(1, total - rise))


def make_optimizer(model, lr, weight_decay=0.01, gate_rate=0.1):
    """AdamW with the paper's settings [supp. 2]; no decay on biases and LayerNorms (A7).

    Each group carries `scale`, its share of the learning rate: gates learn at a tenth of it (A10).
    A gate that moves fast settles on the mode that is best for a model that can do nothing yet.
    """
    groups = {}
    for name, parameter in model.named_parameters():
        decay = weight_decay if parameter.ndim > 1 else 0.0
        scale = gate_rate if "gate." in name else 1.0
        groups.setdefault((decay, scale), []).append(parameter)
    return torch.optim.AdamW(
        [dict(params=p, weight_decay=d, scale=s) for (d, s), p in groups.items()], lr=lr,
        betas=(0.9, 0.999), eps=1e-6, fused=True)


class Parts(torch.utils.data.Sampler):
    """Which pairs each process works on: the keys (epoch, index) of one part after the other.

    The pairs of step s are a slice of the epoch's permutation, which follows from (seed, epoch).
    The slice is cut into world_size x accum equal parts, and process r takes the r-th run of
    `accum` parts: so the batch of a step is the same for any number of processes.
    """

    def __init__(self, num_pairs, batch, epochs, seed, accum=1, first_step=0):
        self.num_pairs, self.batch, self.seed, self.accum = num_pairs, batch, seed, accum
        self.steps_per_epoch, self.first_step = num_pairs // batch, first_step
        self.steps, self._order = epochs * self.steps_per_epoch, (None, None)
        if self.steps_per_epoch == 0:
            raise BadInput(f"--batch {batch}: there are only {num_pairs} pairs")
        if batch % (world_size() * accum):
            raise BadInput(f"--batch {batch} cannot be cut into {world_size()} processes x "
                f"--accum {accum} equal parts")

    def numbers(self):
        """The numbers of this process's parts among all parts of a step."""
        return range(rank() * self.accum, (rank() + 1) * self.accum)

    def keys(self, step):
        """The parts of a step, each a list of (epoch, index)."""
        epoch, k = divmod(step, self.steps_per_epoch)
        if epoch != self._order[0]:
            rng = np.random.default_rng([self.seed, epoch])
            self._order = epoch, rng.permutation(self.num_pairs)
        order = self._order[1]
        size = self.batch // (world_size() * self.accum)
        start = [k * self.batch + n * size for n in self.numbers()]
        return [[(epoch, int(i)) for i in order[s : s + size]] for s in start]

    def __len__(self):
        return (self.steps - self.first_step) * self.accum

    def __iter__(self):
        for step in range(self.first_step, self.steps):
            yield from self.keys(step)


def to_device(batch):
    return {
        k: v.to(device(), non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}


def train_step(task, model, optimizer, batches, part_numbers, seed, step, tau, autocast):
    """One optimiser step on this process's parts of the batch; the mean losses.

    task: a Run, or its class, of which counts, sums and clip are used. The mean is over what is
    masked in the *whole* batch. Processes and parts hold different numbers of masked places, so a
    mean of their means would weigh places unequally, and differently for another number of
    processes: their sums are divided by the common count instead.
    """
    counts = total(sum(task.counts(b) for b in batches)).clamp(min=1)
    optimizer.zero_grad(set_to_none=True)
    sums = torch.zeros(len(counts), device=device())
    for i, (number, batch) in enumerate(zip(part_numbers, batches)):
        torch.manual_seed(int(np.random.default_rng([seed, step, number]).integers(2**63)))
        last = i == len(batches) - 1 or not isinstance(model, DistributedDataParallel)
        with contextlib.nullcontext() if last else model.no_sync(), autocast:
            part = task.sums(model, to_device(batch), tau)
            # DistributedDataParallel averages gradients over processes; the losses are to be added.
            (world_size() * (part / counts.to(part)).sum()).backward()
        sums += part.detach()
    losses = total(sums).cpu() / counts.cpu()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), task.clip)
    if not (losses.isfinite().all() and norm.isfinite()):
        raise FloatingPointError(losses)
    optimizer.step()
    return losses


# --- 5. Evaluation --------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model, dataset, batch_size=200, look=None):
    """Held-out losses and accuracies, and what the switches chose (hard): two dicts.

    look: a function that changes each batch before the model sees it, or None. Each process takes
    its share of the batches, and what is added up is counts, so that the shares need not be equal.
    """
    model.eval()
    found = torch.zeros(8 + num_switches(model.config), device=device())
    for start in range(rank() * batch_size, len(dataset), world_size() * batch_size):
        batch = collate([dataset[i] for i in range(start, min(start + batch_size, len(dataset)))])
        out = model(**to_device(look(batch) if look else batch))
        found += torch.cat([out.sums, out.counts, out.correct, switch_sums(out.encoder)])
    found = total(found).cpu()
    sums, counts, correct = found[:8].split([3, 3, 2])
    scores = dict(zip(("val_mlm", "val_mrc", "val_itm"), (sums / counts.clamp(min=1)).tolist()))
    words, matches = (correct / counts[[0, 2]].clamp(min=1)).tolist()
    return ({**scores, "mlm_accuracy": words, "itm_accuracy": matches},
        switch_shares(found[8:] / len(dataset), model.config))


def num_switches(config):
    """How many numbers say what all switches chose: 2 x 3 modes and 2 x (l + 1) depths a layer."""
    return sum(2 * 3 + 2 * (layer + 1) for layer in range(config.num_hidden_layers))


def switch_sums(out):
    """(num_switches,): what the switches chose, added up over a batch; out: SwitchBertOutput."""
    each = [out.modes.sum(dim=0), *(d.sum(dim=0) for d in out.depths)]  # (layers, 2, 3), (2, l+1)
    return torch.cat([x.flatten() for x in each])


def switch_shares(sums, config):
    """switch_sums as lists: {"modes": (layers, 2, 3), "depths": for each layer (2, l+1)}"""
    layers = config.num_hidden_layers
    modes, *depths = sums.split([6 * layers, *(2 * (layer + 1) for layer in range(layers))])
    return {"modes": modes.view(layers, 2, 3).tolist(),
        "depths": [d.view(2, -1).tolist() for d in depths]}


@torch.no_grad()
def match_scores(model, store, tokenizer, texts, image_ids, max_tokens=38, temperature=None):
    """(texts, images): how well text i and image j match, by a SwitchBertForRetrieval.

    Every pair goes through the whole model: one text with all of these images is a batch. The
    processes share the texts. temperature: as in the model, None for hard switches.
    """
    model.eval()
    none = np.zeros(0, dtype=np.int64)
    images = to_device(model_inputs([dict(region_inputs(store, i), input_ids=none)
        for i in image_ids]))
    scores = torch.zeros(len(texts), len(image_ids), device=device())
    for i in range(rank(), len(texts), world_size()):
        ids = torch.tensor(tokenizer.encode(texts[i], max_tokens), device=device())
        words = ids.expand(len(image_ids), -1)  # (images, T)
        batch = images | dict(input_ids=words, text_mask=torch.ones_like(words))
        scores[i] = model(**batch, temperature=temperature)[0].float()
    return total(scores).cpu()


def recall_at(scores, image_of_text, ks=(1, 5)):
    """Share of queries whose right answer is among the k best: {'image R@1': .., 'text R@1': ..}.

    scores (texts, images); image_of_text (texts,): the image of each text, of which an image may
    have any number. "image" finds the image for a text, "text" one of its texts for an image. Ties
    count against the model: one that scores all pairs alike has recall 0, not 1.
    """
    texts, images = scores.shape
    right = image_of_text[:, None] == torch.arange(images)  # (texts, images)
    own = scores[torch.arange(texts), image_of_text]  # (texts,)
    image_rank = ((scores >= own[:, None]) & ~right).sum(dim=1)  # 0 is best
    best = scores.masked_fill(~right, -math.inf).amax(dim=0)  # (images,)
    text_rank = ((scores >= best) & ~right).sum(dim=0)
    return {f"{name} R@{k}": (rank < k).float().mean().item()
        for name, rank in (("image", image_rank), ("text", text_rank)) for k in ks}


def without_pictures(batch):
    """The same batch for a model that sees only the words: one empty region a pair, nothing to
    predict.
    """
    b = len(batch["input_ids"])
    blank = dict(
        region_features=batch["region_features"].new_zeros(
            b, 1, batch["region_features"].shape[-1]),
        region_boxes=torch.zeros(b, 1, 5),
        region_mask=torch.zeros(b, 1, dtype=torch.long),
        mrc_mask=torch.zeros(b, 1, dtype=torch.bool),
        mrc_targets=None,
        itm_labels=torch.full((b,), MATCH),  # so that every sentence counts
    )
    return {**batch, **blank}


def text_only_accuracy(config, training, held_out, args, steps=150):
    """Masked-word accuracy of a model of the same size that never sees a picture: what words alone
    give. It learns the pattern of the sentences, which takes few steps (README: more do not help).
    """
    torch.manual_seed(args.seed)
    model = SwitchBertForPretraining(config).to(device())
    optimizer = make_optimizer(model, args.lr)
    parts = Parts(len(training), args.batch, args.epochs, args.seed, args.accum)
    for step in range(min(steps, parts.steps)):
        set_learning_rate(optimizer, learning_rate(step, steps, args.lr))
        batches = [
            without_pictures(collate([training[k] for k in part])) for part in parts.keys(step)]
        train_step(Pretraining, model.train(), optimizer, batches, parts.numbers(), args.seed, step,
            1.0, autocast_for(args))
    return evaluate(model, held_out, look=without_pictures)[0]["mlm_accuracy"]


# --- 6. The record --------------------------------------------------------------------------------


def quiet():
    """tqdm's `disable`: bars only from the first process, and only on a terminal."""
    return True if rank() else None


def save_checkpoint(path, checkpoint):
    """Write a checkpoint whole, and keep the one before it as *.previous.pt."""
    previous = path.with_suffix(".previous.pt")
    fresh = path.with_suffix(".new.pt")
    write_whole(fresh, lambda f: torch.save(checkpoint, f), mode="wb")
    if path.exists():
        os.replace(path, previous)
    os.replace(
        fresh, path)  # killed between these two lines, load_checkpoint finds the previous one


def load_checkpoint(path):
    """The newest readable checkpoint of this name: a dict of plain values and tensors.

    A file that is cut off or something else is said so, and the one before it used. Raises BadInput
    if there is none.
    """
    problems = []
    for candidate in (path, path.with_suffix(".previous.pt")):
        if not candidate.exists():
            problems.append(f"{candidate}: there is no such file")
            continue
        try:
            checkpoint = torch.load(candidate, map_location="cpu", weights_only=True)
            if checkpoint["format"] == CHECKPOINT_FORMAT:
                for problem in problems:
                    say(f"{problem}; going on from {candidate}")
                return checkpoint
            problems.append(f"{candidate}: a checkpoint of another version")
        except Exception as error:  # torch.load raises whatever its unpickler or zip reader meets
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            problems.append(f"{candidate}: not a whole checkpoint of train.py ({first[:80]})")
    raise BadInput("; ".join(problems))


CHECKPOINT_FORMAT = "switchbert-2"
# What a checkpoint says of the regions that it was trained on.
STORE_FACTS = ("feature_size", "detector", "num_region_classes", "class_names")


def check_fits(checkpoint, store, tokenizer):
    """Raise BadInput if a checkpoint was trained on other regions or words than these."""
    for key in STORE_FACTS:
        ours, theirs = checkpoint["store"][key], store.meta[key]
        if ours != theirs:
            if key == "class_names":  # 1,600 names fit no sentence: the first that differs
                at = next(i for i, pair in enumerate(zip_longest(ours, theirs)) if len({*pair}) > 1)
                key, ours, theirs = f"class {at}", *([*x, None][at] for x in (ours, theirs))
            raise BadInput(f"{store.folder}: its {key} is {theirs!r}, but the checkpoint was "
                f"trained with {ours!r}; use the store that it was trained on, or start anew")
    if checkpoint["vocab"] != tokenizer.pieces:
        raise BadInput(f"the vocabulary has {len(tokenizer)} pieces and is not the checkpoint's, "
            f"of {len(checkpoint['vocab'])}; use the vocabulary that it was trained with")


def keep_earlier_run(folder):
    """Another run's results in the folder of a new one move aside, to the first free name."""
    if (folder / "checkpoint.pt").exists():
        aside = next(p for n in range(1, 10**6) if not (p := Path(f"{folder}-{n}")).exists())
        folder.rename(aside)
        say(f"the run that was in {folder} is now in {aside}")
    else:
        (folder / "metrics.csv").unlink(missing_ok=True)  # of a run that never saved anything


def append_row(path, row):
    """Add a line to a CSV; the first one brings the header."""
    new = not path.exists()
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(row))
        if new:
            writer.writeheader()
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


def drop_rows_after(path, step):
    """Cut a CSV back to what was written up to this step: a resumed run writes the rest again."""
    if path.exists():
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))
        kept = rows[:1] + [r for r in rows[1:] if r and int(r[0]) <= step]
        write_whole(path, lambda f: csv.writer(f).writerows(kept))


def switch_columns(switches):
    """The shares of every switch for the CSV: {'layer2 text own': .., ...}"""
    row = {}
    for i, (modes, depths) in enumerate(zip(switches["modes"], switches["depths"]), 1):
        for m, modality in enumerate(("text", "vision")):
            names = ["own", "other", "both", *(f"depth{d}" for d in range(i))]
            row |= {f"layer{i} {modality} {n}": v for n, v in zip(names, modes[m] + depths[m])}
    return row


MODE_COLOURS = {"own kind only": (66, 114, 196), "other kind only": (237, 125, 49),
    "both together": (112, 173, 71)}


def switches_picture(switches, title):
    """A picture of what every layer chose: whom text and vision attend to, which depth they read.

    switches: {"modes": (layers, 2, 3), "depths": for each layer (2, l+1)}, shares of the samples,
    as lists.
    """
    layers = len(switches["modes"])
    cell, bar, left, top = 34, 260, 90, 120
    panel = left + bar + 40 + cell * layers + 50
    image = Image.new("RGB", (2 * panel, top + layers * (cell + 6) + 70), "white")
    draw, font, big = ImageDraw.Draw(image), ImageFont.load_default(13), ImageFont.load_default(18)
    draw.text((20, 12), title, "black", big)
    x = 20
    for name, colour in MODE_COLOURS.items():
        draw.rectangle([x, 46, x + 14, 60], fill=colour)
        draw.text((x + 20, 45), f"attends to {name}", "black", font)
        x += 200
    draw.text((x, 45),
        "squares: the darker, the more often this depth is read (0 = the embeddings)", "black",
        font)
    for modality, name in enumerate(("text", "vision")):
        _draw_panel(
            draw, (modality * panel, top, cell, bar, left), name, modality, switches, font, big)
    return image


def _draw_panel(draw, place, name, modality, switches, font, big):
    x0, top, cell, bar, left = place
    layers, grid = len(switches["modes"]), x0 + left + bar + 40
    draw.text((x0 + left, top - 44), f"{name}: attention", "black", big)
    draw.text((grid, top - 44), "reads depth", "black", big)
    for depth in range(layers):
        draw.text((grid + depth * cell + 12, top - 18), str(depth), "black", font)
    for layer in range(layers):
        y, x = top + layer * (cell + 6), float(x0 + left)
        draw.text((x0 + 20, y + 9), f"layer {layer + 1}", "black", font)
        for share, colour in zip(switches["modes"][layer][modality], MODE_COLOURS.values()):
            draw.rectangle([x, y, x + share * bar, y + cell], fill=colour)
            if share > 0.15:
                draw.text((x + share * bar / 2 - 14, y + 9), f"{100 * share:.0f} %", "white", font)
            x += share * bar
        for depth, share in enumerate(switches["depths"][layer][modality]):
            shade, at = int(255 * (1 - share)), grid + depth * cell
            draw.rectangle(
                [at, y, at + cell - 3, y + cell], fill=(shade, shade, shade), outline="grey")
            if 0.005 < share:
                draw.text(
                    (at + 4, y + 9), f"{100 * share:.0f}", "white" if share > 0.5 else "black", font
                )


# --- 7. The run -----------------------------------------------------------------------------------


def model_config(size, store, tokenizer, switches):
    """The model of a run: the paper's, or the toy run's under a million parameters (DEVIATION D2).
    """
    known = dict(vocab_size=len(tokenizer), switches=switches,
        region_feature_size=store.feature_size, num_region_classes=store.num_region_classes)
    if size == "base":
        return SwitchBertConfig.base(**known)
    # BERT's std .02 at 768 inputs, kept at 128: .02 sqrt(768 / 128). With .02 matching was learned
    # only after 450 steps, with .05 after 225.
    return SwitchBertConfig(hidden_size=128, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=256, max_position_embeddings=40, pooler_size=128, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, initializer_range=0.05, **known)


def settle(args, defaults, checkpoint, fixed=("seed", "switches", "limit")):
    """Fill in what the user left open: from the checkpoint of a resumed run, or from the defaults.

    Settings that make the run what it is cannot change on the way; what only says how it is
    computed (--gpus, --accum, --workers, ...) can.
    """
    for key, value in defaults.items():
        given = getattr(args, key)
        saved = checkpoint["settings"][key] if checkpoint else value
        if checkpoint and given is not None and given != saved:
            flag = "--" + key.replace("_", "-")
            raise BadInput(f"{flag} {given}: the run that is resumed has {saved}; leave it out, or "
                "start a new run with another --out")
        setattr(
            args, key, value if given is None and not checkpoint else saved if checkpoint else given
        )
    if checkpoint:
        for key in fixed:
            setattr(args, key, checkpoint["settings"][key])
    if args.precision is None:
        bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        args.precision = "bf16" if bf16 else "fp32"


def autocast_for(args):
    """bf16 for matrix products; the model itself keeps softmax, losses and gates in float32."""
    return torch.autocast(device().type, torch.bfloat16, enabled=args.precision == "bf16")


def temperature_rate(args, steps, initial=5.0):
    """The temperature's decay per pair (A5)."""
    if args.anneal is None:
        return 1e-6
    return math.log(initial / 0.2) / (args.anneal * max(1, steps) * args.batch)


def bert_folder(args, data_folder):
    """The BERT to start from: --bert, or bert/ in the data folder, or None."""
    if args.bert is None and data_folder and (data_folder / "bert").is_dir():
        return data_folder / "bert"
    return args.bert


def in_a_sentence(function, *args):
    """function(*args); a ValueError or OSError of it is the user's to mend."""
    try:
        return function(*args)
    except (ValueError, OSError) as error:
        raise BadInput(str(error)) from error


def summary(names):
    """'bert.pooler (4), mrc_classifier (2)' for a list of parameter names."""
    counts = Counter(re.sub(r"\.\d+\.", ".*.", n).rsplit(".", 1)[0] for n in names)
    return ", ".join(f"{n} ({k})" for n, k in counts.items()) or "nothing"


def set_learning_rate(optimizer, rate):
    for group in optimizer.param_groups:
        group["lr"] = group["scale"] * rate


def about(args, store, examples, model):
    """Everything that config.json says of a run."""
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
        ).stdout.strip()
    except OSError:
        commit = ""
    versions = {"python": sys.version.split()[0], "torch": torch.__version__,
        "numpy": np.__version__}
    return {"settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "data": str(store.folder), "examples": examples, "model": asdict(model.config),
        "versions": versions, "git_commit": commit, "processes": world_size()}


class Run:
    """What every training has in common: the loop, stopping and resuming, and the record.

    Pretraining below and the tasks of finetune.py say the rest:
        name, unit, loss_names, clip, weight_decay, initial_temperature, gate_rate, line
        collate(examples) -> batch
        counts(batch) -> (losses,), what the losses of a batch are means of
        sums(model, batch, tau) -> (losses,), the sums of the losses
        measure(tau) -> held-out scores, and what the switches chose
        facts() -> what its checkpoint says beside the weights
        image_ids(indices) -> the images of some examples, for a message
        draw(path): switches.png
    """

    clip, weight_decay, initial_temperature = 5.0, 0.01, 5.0  # pretraining's (A7, supp. 2)
    gate_rate = 0.1  # A10

    def __init__(self, args, model, store, training, checkpoint):
        self.args, self.path = args, args.out / "checkpoint.pt"
        self.model, self.store, self.training = model.to(device()), store, training
        self.optimizer = make_optimizer(self.model, args.lr, self.weight_decay, self.gate_rate)
        self.step, self.losses, self.since = 0, torch.zeros(len(self.loss_names)), 0
        if checkpoint:
            self._restore(checkpoint)
        self.parts = Parts(
            len(training), args.batch, args.epochs, args.seed, args.accum, self.step)

    def _restore(self, checkpoint):
        self.model.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.step, self.since = checkpoint["step"], checkpoint["since"]
        self.losses = checkpoint["losses"]
        say(f"resuming after step {self.step}")
        if rank() == 0:
            drop_rows_after(self.args.out / "metrics.csv", self.step)

    def save(self):
        """Write the checkpoint: all that a resumed run, finetuning or a reader needs."""
        if rank() == 0:
            save_checkpoint(
                self.path,
                {"format": CHECKPOINT_FORMAT, "config": asdict(self.model.config),
                    "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                    "store": {k: self.store.meta[k] for k in STORE_FACTS},
                    "step": self.step, "pairs_seen": self.step * self.args.batch,
                    "since": self.since, "losses": self.losses.clone(), **self.facts()},
            )

    def begin(self):
        """Make the folder of the results, and say what will be done."""
        args, steps = self.args, self.parts.steps
        if rank() == 0:
            if not args.resume:
                keep_earlier_run(args.out)
            args.out.mkdir(parents=True, exist_ok=True)
            config = about(args, self.store, len(self.training), self.model)
            write_whole(args.out / "config.json", lambda f: json.dump(config, f, indent=1))
        parameters = sum(p.numel() for p in self.model.parameters())
        say(f"{self.name}: {len(self.training)} {self.unit}, {parameters:,} parameters, {steps} "
            f"steps of {args.batch} {self.unit}, {world_size()} process(es) on {device().type}, "
            f"{torch.get_num_threads()} threads, {args.precision}")

    def optimise(self):
        """Train to the end, or until somebody asks to stop. True if it came to the end."""
        args, stop, first = self.args, Stop(), self.initial_temperature
        rate = temperature_rate(args, self.parts.steps, first)
        model = torch.compile(self.model, dynamic=True) if args.compile else self.model
        if dist.is_initialized():
            model = DistributedDataParallel(model)
        self.resumed_at, self.done = time.time(), 0  # of this interval, for pairs per second
        loader = iter(
            DataLoader(self.training, batch_sampler=self.parts, collate_fn=self.collate,
                num_workers=args.workers, pin_memory=torch.cuda.is_available())
        )
        bar = tqdm(
            total=self.parts.steps, initial=self.step, desc="training", leave=False, disable=quiet()
        )
        while self.step < self.parts.steps:
            set_learning_rate(self.optimizer, learning_rate(self.step, self.parts.steps, args.lr))
            tau = temperature(self.step * args.batch, first, rate=rate)
            batches = [next(loader) for _ in range(args.accum)]
            self.losses += self._guarded_step(model.train(), batches, tau)
            self.step, self.since, self.done = self.step + 1, self.since + 1, self.done + 1
            bar.update()
            if self.step % args.eval_every == 0 or self.step == self.parts.steps:
                self.evaluate(tau)
                self.save()
            elif total(torch.tensor(float(stop.asked))) > 0:  # asked of any process, all stop here
                self.save()
                say(f"stopped after step {self.step}; --resume goes on from here")
                return False
        return True

    def _guarded_step(self, model, batches, tau):
        try:
            return train_step(self, model, self.optimizer, batches, self.parts.numbers(),
                self.args.seed, self.step, tau, autocast_for(self.args))
        except FloatingPointError as error:
            losses = ", ".join(f"{n} {x:.4g}" for n, x in zip(self.loss_names, error.args[0]))
            ids = self.image_ids([i for part in self.parts.keys(self.step) for _, i in part])
            raise BadInput(
                f"step {self.step + 1}: a loss or its gradient is not finite ({losses}); the "
                f"last good checkpoint is kept; images of this process: {' '.join(ids)}") from None
        except torch.cuda.OutOfMemoryError:
            raise BadInput(f"GPU out of memory with {self.args.batch} {self.unit} in "
                f"{world_size()} x {self.args.accum} parts: try --accum {2 * self.args.accum}, "
                "which gives the same result with half the memory") from None

    def evaluate(self, tau):
        """Measure; print one line and add one to metrics.csv."""
        args, trained = self.args, time.time() - self.resumed_at
        self.scores, self.switches = self.measure(tau)
        row = dict(step=self.step, pairs=self.step * args.batch, temperature=tau,
            lr=learning_rate(self.step - 1, self.parts.steps, args.lr),
            seconds=time.time() - self.started, pairs_per_second=self.done * args.batch / trained,
            **dict(zip(self.loss_names, (self.losses / self.since).tolist())), **self.scores)
        self.losses, self.since, self.done = torch.zeros_like(self.losses), 0, 0
        if rank() == 0:
            append_row(args.out / "metrics.csv", row | switch_columns(self.switches))
            self.draw(args.out / "switches.png")
        line = ("step {step:5d}/{steps}  lr {lr:.1e}  tau {temperature:.2f}  loss " + self.line
            + " | {pairs_per_second:.0f} {unit}/s, {seconds:.0f} s")
        say(line.format(**row, steps=self.parts.steps, unit=self.unit))
        self.resumed_at = time.time()


    def draw(self, path):
        """switches.png: what every layer chose, now."""
        image = switches_picture(self.switches,
            f"What every layer of this Switch-BERT chose, after {self.step} steps")
        write_whole(path, lambda f: image.save(f, "PNG"), mode="wb")


class Pretraining(Run):
    """Masked words, masked regions and matching, on captions. [supp. 1]"""

    name, unit, loss_names = "pretraining", "pairs", ("mlm", "mrc", "itm")
    line = ("mlm {mlm:.2f} mrc {mrc:.2f} itm {itm:.2f} | words {mlm_accuracy:.3f}  match "
        "{itm_accuracy:.3f}")
    collate = staticmethod(collate)

    def __init__(self, args):
        self.started = time.time()
        folder = args.data or (Path("data") if Path("data").is_dir() else None)
        say(f"training on {folder or 'the toy world (no data/ here)'}")
        checkpoint = load_checkpoint(args.out / "checkpoint.pt") if args.resume else None
        if checkpoint:
            args.limit = checkpoint["settings"]["limit"]
        self.data = load_data(folder, args.out, args.limit)
        settle(args, TOY if self.data.toy else FULL, checkpoint)
        store, tokenizer = self.data.store, self.data.tokenizer
        if checkpoint:
            check_fits(checkpoint, store, tokenizer)
        config = (SwitchBertConfig(**checkpoint["config"]) if checkpoint
            else model_config(args.model, store, tokenizer, args.switches))
        bert = None if checkpoint else bert_folder(args, folder)
        if bert:
            in_a_sentence(check_bert_config, bert, config)  # before anything large is built
        training = PretrainingDataset(store, self.data.captions, tokenizer, seed=args.seed)
        self.held_out, self.whole = (
            PretrainingDataset(
                store, self.data.held_out_captions, tokenizer, seed=args.seed + 1, masking=masking)
            for masking in (True, False)
        )
        if not store.num_region_classes:
            say(f"{store.folder} has no class distributions: training without MRC")
        if any(training.skipped.values()):
            say("left out: " + ", ".join(f"{n} captions {k}" for k, n in training.skipped.items()))
        torch.manual_seed(args.seed)
        model = SwitchBertForPretraining(config)
        if bert:
            missing, unexpected = in_a_sentence(load_bert, model, bert)
            say(f"started from {bert}; new in this model: {summary(missing)}; not used of BERT: "
                f"{summary(unexpected)}")
        super().__init__(args, model, store, training, checkpoint)

    @staticmethod
    def counts(batch):
        """(3,): masked pieces and regions of matches, and pairs."""
        match, regions = batch["itm_labels"] == MATCH, 0
        if batch["mrc_targets"] is not None:
            regions = (batch["mrc_mask"] & match[:, None]).sum()
        pieces = ((batch["mlm_labels"] != IGNORE) & match[:, None]).sum()
        return torch.tensor([int(pieces), int(regions), len(match)], dtype=torch.float32)

    @staticmethod
    def sums(model, batch, tau):
        """(3,): the three losses, added up."""
        return model(**batch, temperature=tau).sums

    def facts(self):
        """What finetuning and a resumed run must know."""
        settings = {k: getattr(self.args, k) for k in (*TOY, "seed", "switches", "limit")}
        return {"task": "pretraining", "vocab": self.data.tokenizer.pieces, "settings": settings}

    def image_ids(self, indices):
        """The images of these pairs."""
        return [self.store.ids[self.training.rows[i]].decode() for i in indices]

    def measure(self, tau):
        """Held-out losses and accuracies with hard switches; `match` on words and regions unmasked.
        """
        scores, switches = evaluate(self.model, self.held_out)
        scores["itm_accuracy"] = evaluate(self.model, self.whole)[0]["itm_accuracy"]
        return scores, switches

    def finish(self):
        """Zero-shot retrieval, and in the toy world what words alone give."""
        first = {}  # the first held-out caption of each image
        for image_id, text in self.data.held_out_captions:
            if self.store.row(image_id) is not None:
                first.setdefault(image_id, text)
        ids = sorted(first, key=str)[:100]
        model = SwitchBertForRetrieval.from_pretraining(
            self.model.config, self.model.state_dict()).to(device())
        scores = match_scores(
            model, self.store, self.data.tokenizer, [first[i] for i in ids], ids)
        recall = recall_at(scores, torch.arange(len(ids)))
        say(f"zero-shot among {len(ids)}: " + ", ".join(f"{k} {v:.2f}" for k, v in recall.items()))
        if self.data.toy:
            blind = text_only_accuracy(self.model.config, self.training, self.held_out, self.args)
            say(f"masked words: {self.scores['mlm_accuracy']:.3f} with pictures, "
                f"{blind:.3f} without")
            recall["text_only_mlm_accuracy"] = blind
        say(f"{self.args.out}: checkpoint.pt, metrics.csv, config.json, switches.png")
        say(f"done in {time.time() - self.started:.0f} s")
        return {**self.scores, **recall}


def complete(run):
    """The whole of a run, in this process; its last measurements, or None if it was stopped."""
    run.begin()
    if run.step == run.parts.steps:  # resumed at its end: only the last lines are missing
        run.scores, run.switches = run.measure(0.2)
    return run.finish() if run.optimise() else None


def pretrain(args):
    """A pretraining run, from its flags."""
    return complete(Pretraining(args))


def main():
    """Run, and say in one sentence what is wrong with the input if something is."""
    try:
        launch(pretrain, parse_args())
    except BadInput as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
