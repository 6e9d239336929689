r"""train.py: pretraining, from pixels or from a feature store to a checkpoint
===========================================================================

Where this stands

    toy world --extract_features.py--> feature store --data.py--> batches (see its opening)
                                                                     |
      learning rate, temperature: functions of the step              v
          |                                          SwitchBertForPretraining (switchbert.py)
          v                                                          |
    +--------------------------- fit -----------------------+        |
    |  sums of losses / counts of all processes  <----------|--------+
    |  backward, clip, AdamW                                |
    |  now and then: evaluate, record, checkpoint           |
    +-------------------------------------------------------+
          |
    runs/pretrain/  checkpoint.pt  metrics.jsonl  curves.png  switches.png  result.json ...
          |
          +--> finetune.py, whose tasks go through the same `fit`

Letters: B batch, T word pieces, R regions, C region classes.

Map of the file (* = read these first)

    1. Settings         flags, and what the toy run and the full run set them to
    2. Pretraining    * what happens, in order, and the task that is trained
    3. The loop       * fit
    4. Optimisation   * learning rate, AdamW, parts of a batch, forward and backward
    5. Evaluation       losses, accuracies, what the switches chose, zero-shot retrieval
    6. Data of a run    the toy world, or a folder of captions and features
    7. Processes        one, several on this machine, or several machines
    8. The record       checkpoint, metrics.jsonl, pictures

    python train.py                     the whole toy run: 2 minutes on two CPU cores
    python train.py --gpus 4            the same on 4 GPUs; with a folder data/, the full run on it
    python train.py --resume            continue a run that was stopped or killed
    python train.py --blind --epochs 1 --out runs/blind      what do words alone give?
    python train.py show RUN RUN ...    compare runs: final scores, curves.png, switches.png
    torchrun --nnodes 2 --nproc-per-node 4 train.py      ... on two machines

Without data it draws scenes, trains a Faster R-CNN on them, extracts regions and pretrains. It
prints one line per evaluation, here wrapped:

    step   450/900  lr 5.6e-04  tau 0.84  mlm 0.73 mrc 2.38 itm 0.41 | words 0.706  match 0.886
           | 1049 pairs/s, 29 s

tau is the temperature; mlm, mrc and itm are mean training losses since the last line. `words` is
the share of masked word pieces predicted right, `match` the accuracy of image-text matching
(chance: .50), both on held-out pairs with hard switches.

A run is a function of its settings: the pairs of a batch, their masks, and the noise of dropout and
switches depend on (seed, epoch, step) and on no hidden state. That is why a killed run resumes bit
for bit, and why 1, 2 or 8 processes train on the same batches.

Assumptions: A5 (temperature by pairs), A7 (VOLTA's settings), A10 (slow gates). Deviation: D2.
"""

import argparse
import atexit
import contextlib
import functools
import json
import math
import os
import sys
import time
import zipfile
import zlib
from collections import defaultdict, namedtuple
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

# Operators that Apple's GPU lacks run on the CPU instead. torch reads this on import.
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from torch.nn.parallel import DistributedDataParallel

from data import (COUNT, HELD_OUT_SCENES, NATURAL, RANK, RATE, SHARE, TRAIN_SCENES, WORLD_SIZE,
    BadInput, Captions, FeatureStore, PretrainingDataset, Scene, WordPiece, build_vocab,
    caption_records, class_targets, collate, flag, load_ahead, model_inputs, on_stop, only_run_in,
    progress, read_json, reading, region_inputs, run, save_png, say, start_processes,
    write_json, write_whole)
from switchbert import (FINAL_TEMPERATURE, FROZEN, LEARNED, MODALITIES, MODES, SwitchBertConfig,
    SwitchBertForPretraining, SwitchBertForRetrieval, load_bert, temperature)

# --- 1. Settings ----------------------------------------------------------------------------------
#
# FULL holds the paper's defaults [supp. 2] and, where it is silent, VOLTA's (A7). The toy run is
# DEVIATION D2. `anneal` is the share of the run after which the temperature reaches its floor, 0.2;
# None means the paper's rate, 1e-6 per pair (A5): 3.2 million pairs.
#
# These settings define a run; a resumed run keeps them. All other flags say how it is computed.
# (Two are of finetune.py: scratch and boxes.)

TOY = dict(model="small", epochs=4, batch=64, lr=1e-3, eval_every=225, anneal=0.9,
    switches="learned", set=[], seed=0, limit=None, blind=False, scratch=False,
    boxes="detected")
FULL = TOY | dict(model="base", epochs=10, batch=256, lr=1e-4, eval_every=1000, anneal=None)


def parse_args(argv):
    """(settings, the checkpoint to resume from or None) of a command line."""
    p = argparse.ArgumentParser(
        description="Pretrain Switch-BERT; `train.py show RUN ...` compares runs.")
    add_run_flags(p, Path("data"), "features/ and captions", Path("runs/pretrain"))
    flag(p, "--switches", str, None, "learn both switches, or one of them: "
        f"{', '.join(LEARNED)}; or freeze them: {', '.join(FROZEN)}, or any path such as "
        "II,XX,JJ,IJ, text and vision per layer: I own modality, X the other, J both")
    p.add_argument("--model", choices=["base", "small"], help="12 layers x 768, or 4 x 128")
    p.add_argument("--set", nargs="+", metavar="FIELD=VALUE", help="change the model: any fields "
        "of SwitchBertConfig, such as num_hidden_layers=6 hidden_size=256")
    start = p.add_mutually_exclusive_group()
    flag(start, "--bert", Path, None,
        "Hugging Face BERT folder to start from; None: DATA/bert, if any")
    flag(start, "--init", Path, None, "pretrained run whose words and weights to start from")
    args, checkpoint = fill_settings(p, argv, TOY, FULL, "pretraining")
    if args.data and not args.bert and not args.init:
        args.bert = next(args.data.glob("bert"), None)
    return args, checkpoint


def add_run_flags(p, data, content, out):
    """Add the flags that all trainings share. Those of a setting are None where they are not given.

    data, out: the usual folders of data and results; content: what the folder of data holds.
    """
    gpu = torch.cuda.is_available()
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    flag(p, "--data", Path, data if data.is_dir() else None,
        f"folder with {content}; None: the toy world (default: %(default)s)")
    flag(p, "--out", Path, out, "folder of the results (default: %(default)s)")
    flag(p, "--epochs", NATURAL, None, "passes over the training examples")
    flag(p, "--batch", COUNT, None, "examples per step, over all processes")
    flag(p, "--lr", RATE, None, "peak learning rate")
    flag(p, "--eval-every", COUNT, None, "steps between evaluations and checkpoints")
    flag(p, "--anneal", SHARE, None, "share of the run with tau above 0.2; None: 1e-6 per example")
    flag(p, "--limit", COUNT, None, "train on this many examples at most")
    flag(p, "--seed", NATURAL, None, "seed of everything random")
    flag(p, "--gpus", COUNT, 1, "processes, one per GPU; without GPUs on the CPU (default: 1)")
    flag(p, "--accum", COUNT, 1,
        "parts per process and step: less memory, other noise (default: 1)")
    flag(p, "--workers", NATURAL, min(4, os.cpu_count()) if gpu else 0,
        "loading processes per process (default: %(default)s; on a CPU, which is busy, none)")
    flag(p, "--threads", COUNT, None, "CPU threads per process; None: all cores. Busy machine: 1")
    p.add_argument("--resume", action="store_true", help="continue from the checkpoint in --out")
    p.add_argument("--blind", action="store_true", default=None,
        help="no pictures: what do words alone give?")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=gpu,
        help="torch.compile the layers, if they are more than the small model's four")
    p.add_argument("--precision", default="bf16" if native else "fp32", choices=["bf16", "fp32"],
        help="of matrix products, fp32 with TF32 where a GPU has it; softmax, losses: fp32 "
        "(default: %(default)s)")


def fill_settings(parser, argv, toy, full, task):
    """(settings, checkpoint) of a command line; checkpoint is None without --resume.

    Settings that are not given are those of the checkpoint, else `full` with --data and `toy`
    without. Raises BadInput if a flag contradicts the checkpoint.
    """
    parser.epilog = f"Where these flags exist, the toy world's are: {toy}. With --data: {full}."
    args = parser.parse_args(argv)
    settings = full if args.data else toy
    checkpoint = None
    if args.resume:
        checkpoint = load_checkpoint(args.out, task)
        settings = settings | checkpoint["settings"]
    for key, value in settings.items():
        given = getattr(args, key, value)
        if given is None:
            setattr(args, key, value)
        elif checkpoint and given != value:
            raise BadInput(f"--{key.replace('_', '-')} {given}: the run that is resumed has "
                f"{value}; leave the flag out, or start a new run with another --out")
    return args, checkpoint


# --- 2. Pretraining -------------------------------------------------------------------------------
#
# The model predicts masked words, the classes of masked regions, and whether a caption belongs to
# its image. Often only the picture shows which word is masked: so the switches learn to look there.


def pretrain(args, checkpoint=None):
    """A pretraining run from start to end. Returns held-out losses (mlm, mrc, itm) and shares, 0 to
    1 (words, match, image R@1 ...), or None if it was stopped. For args, checkpoint see parse_args.
    """
    started = time.time()
    say(f"training on {args.data or 'the toy world (no data/ here)'}")

    # 1. The task: its regions, captions and words, its model, losses and evaluation.
    earlier = checkpoint
    if checkpoint:
        args.init = None  # it has done its work
    elif args.init:
        earlier = load_checkpoint(args.init, "pretraining")
    words = earlier and earlier["vocab"]
    task = Pretraining(args, load_data(args.data, args.bert, words), earlier)
    # 2. Training.
    scores = fit(args, task, checkpoint)
    if scores is None:
        return None
    # 3. What has it learned? Retrieval without training for it, on held-out images.
    if not args.blind:
        scores |= zero_shot(args, task)
        say(f"zero-shot among {scores['images']}: " + ", ".join(
            f"{k} {v:.2f}" for k, v in scores.items() if "R@" in k))
    if RANK == 0:
        # As in finetune.py: settings, and per split the scores with hard switches.
        results = {"val": {"hard": scores}}
        write_json(args.out / "result.json", vars(args) | {"results": results})
    say(f"{args.out}: {', '.join(sorted(path.name for path in args.out.glob('[!.]*')))}")
    say(f"done in {time.time() - started:.0f} s")
    return scores


class Task:
    """What `fit` trains: pretraining, and the three tasks of finetune.py.

    A subclass defines:
        name, unit             what the task and its examples are called in print and on disk
        examples               a data set with lengths (N,), to sort by, and captions, all its texts
        collate(examples)      makes a batch of some examples
        model                  a module with a config
        counts(batch)          (losses,): the number of terms that each loss is the mean of
        sums(model, batch, tau)
                               (losses,): the sums of these terms; and the encoder's output
        evaluate(model)        {name: score}, and what the switches chose
        headline(scores)       what the printed line says of these scores
        store, tokenizer       where regions and words come from: the checkpoint records both
        missing                {what: how many} examples were left out
    """

    loss_names = ("loss",)
    labels = None  # the answers that the model chooses from; None where none are fixed
    # These defaults are finetuning's: A7 and supp. 2.
    clip = 1.0  # the norm that a gradient is clipped to
    weight_decay = 1e-4
    initial_temperature = 1.0
    # Gates learn as fast as the rest: if each samples the wrong option once in ten times, a third
    # of the samples of a four-layer model are noise, until gates decide. (A10 is for pretraining.)
    gate_rate = 1.0
    evaluates_at_start = True  # before the first step: what does pretraining contribute?


class Pretraining(Task):
    """Masked words, masked regions and matching, on captions: a task for `fit` [supp. 1].
    earlier: the checkpoint that is resumed, or with --init the one to start from, or None.
    """

    name = "pretraining"
    unit = "pairs"
    loss_names = ("mlm", "mrc", "itm")
    clip = 5.0  # A7, supp. 2
    weight_decay = 0.01
    initial_temperature = 5.0
    gate_rate = 0.1  # A10
    evaluates_at_start = False
    collate = staticmethod(collate)

    def __init__(self, args, data, earlier=None):
        self.store, captions, held_out, self.tokenizer = data
        store = self.store
        pairs = functools.partial(PretrainingDataset, store, tokenizer=self.tokenizer,
            blind=args.blind)
        self.examples = pairs(captions[: args.limit], seed=args.seed)
        # Words and regions are evaluated on masked pairs, matching on unmasked ones.
        held_out_pairs = functools.partial(pairs, held_out, seed=args.seed + 1,
            name="held-out captions")
        self.masked = held_out_pairs()
        self.whole = held_out_pairs(masking=False)
        self.missing = self.examples.skipped
        for why, count in self.missing.items():
            if count:
                say(f"left out: {count} captions {why}")
        if not store.num_region_classes:
            say(f"{store.folder} has no class distributions: training without MRC")
        with reading(" ".join(["--switches", args.switches, "--set", *args.set]), "a model"):
            config = model_config(args.model, store, self.tokenizer, args.switches, args.set)
            torch.manual_seed(args.seed)
            self.model = SwitchBertForPretraining(config)
        if earlier and not args.init:
            check_fits(earlier, store, "num_region_classes")
        elif earlier:
            take_weights(self.model, earlier, args.init)
            theirs = earlier["store"]["detector"]
            if theirs != store.meta["detector"]:
                say(f"note: {args.init} has learned the regions of {theirs!r}, and {store.folder} "
                    f"has those of {store.meta['detector']!r}: what it knows of regions is lost")
        elif args.bert:
            with reading(args.bert, "a Hugging Face BERT of this model's size"):
                missing, unused = load_bert(self.model, args.bert)  # A6
            say_taken(args.bert, missing, unused)

    @staticmethod
    def counts(batch):
        """(3,): predicted words, predicted regions, pairs."""
        return torch.tensor([len(batch[k]) for k in ("mlm_labels", "mrc_positions", "itm_labels")])

    def sums(self, model, batch, tau):
        """(3,): the three losses, summed; and the encoder's output."""
        out = model(**class_targets(batch, self.store), temperature=tau)
        return out.sums, out.encoder

    def evaluate(self, model):
        """Held-out losses and accuracies with hard switches, and what the switches chose."""
        scores, switches = evaluate(model, self.masked)
        scores["match"] = evaluate(model, self.whole)[0]["match"]
        return scores, switches

    @staticmethod
    def headline(scores):
        """The scores of the printed line: shares of words and of pairs that are right, 0 to 1."""
        return f"words {scores['words']:.3f}  match {scores['match']:.3f}"


def take_weights(model, checkpoint, source):
    """Load what fits of a checkpoint, by name and shape, and say what does not. Raises BadInput if
    layers do not fit. source: where it is from.
    """
    own = model.state_dict()
    fits = {name: tensor for name, tensor in checkpoint["model"].items()
        if name in own and own[name].shape == tensor.shape}
    if "bert.layers.0.attention.query.weight" not in fits:
        raise BadInput(f"{source}: its layers have another size than this model's; give the "
            "--model and --set that it was trained with")
    model.load_state_dict(fits, strict=False)
    say_taken(source, own.keys() - fits, checkpoint["model"].keys() - fits)


def say_taken(source, new, unused):
    """Say that a model starts from a source, which of its parameters are new, which are not used.
    """
    def some(names):
        """How many names there are, and the first five."""
        names = sorted(names)
        return f"{len(names)} parameters ({', '.join(names[:5])}{' ...' * (len(names) > 5)})"

    say(f"started from {source}; new in this model: {some(new)}; not used: {some(unused)}")


def model_config(size, store, tokenizer, switches, changes=()):
    """The configuration of a run: the paper's, or the toy run's, under a million parameters.
    changes: "field=value" of SwitchBertConfig. Raises AttributeError, TypeError, ValueError.
    """
    # initializer_range: BERT's .02 is for 768 inputs; for 128, .02 sqrt(768 / 128) = .05. With .02
    # matching was learned only after 450 steps, with .05 after 225. No dropout: a run
    # sees each pair only four times.
    sizes = {}
    if size == "small":
        sizes = dict(hidden_size=128, num_hidden_layers=4, num_attention_heads=4, pooler_size=128,
            intermediate_size=256, max_position_embeddings=40, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0, initializer_range=0.05)
    for change in changes:
        field, _, value = change.partition("=")
        read = type(getattr(SwitchBertConfig, field))  # int or float
        sizes[field] = read(value)
    return SwitchBertConfig(vocab_size=len(tokenizer), switches=switches, **sizes,
        region_feature_size=store.feature_size, num_region_classes=store.num_region_classes)


# --- 3. The loop ----------------------------------------------------------------------------------
#
# `fit` does all training in this project.

LOOK_EVERY = 10  # steps, after which a run asks itself: has it diverged, should it stop?


def fit(args, task, checkpoint=None):
    """Train a task; for args and checkpoint see fill_settings. Returns the scores of the last
    evaluation, or None if it was asked to stop. Raises BadInput if training diverges.
    """
    # 1. The model, AdamW, and the state of an earlier run.
    model = place(task.model, args)
    optimizer = make_optimizer(model, task.weight_decay, task.gate_rate)
    # interval: the sums of this process's losses since the last evaluation.
    first = 0
    interval = torch.zeros(len(task.loss_names), device=device())
    if checkpoint:
        checksum = task.examples.captions.checksum
        known = checkpoint.get("examples", checksum)  # older ones have none
        if known != checksum:
            raise BadInput(f"{task.store.folder.parent}: the run that is resumed had other "
                f"{task.unit}, {known[0]:,} of them, here are {len(task.examples):,}; give it "
                "its own, or start a new run with another --out")
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        first = checkpoint["step"]
        interval += send(checkpoint["interval"])[: len(interval)] / WORLD_SIZE

    # 2. Every process loads its share of each batch. DistributedDataParallel averages gradients.
    started = time.time()
    cut_batch(args, task)
    steps = args.epochs * (len(task.examples) // args.batch)
    begin_record(args, task, first, steps)
    loader = load_parts(args, task, first, steps)
    if args.compile and model.config.num_hidden_layers > 4:
        compile_layers(model)
    trained = model
    if WORLD_SIZE > 1:
        trained = DistributedDataParallel(model)
        trained.broadcast_buffers = False  # they are constants
    if task.evaluates_at_start or first >= steps:
        scores, switches = task.evaluate(model)
        if first == 0:
            record(args, step=0, scores=scores, switches=switches)
    looked = first
    timed_from = first
    timed_since = time.time()
    rate = anneal_rate(args, task, steps)

    with stop_signals() as stop_asked:
        for step in progress(range(first, steps), "training", initial=first, total=steps):
            # 3. Learning rate and temperature depend only on the step.
            done = step + 1
            lr = learning_rate(step, steps, args.lr)
            for group in optimizer.param_groups:
                group["lr"] = group["scale"] * lr
            tau = temperature(step * args.batch, task.initial_temperature, rate=rate)

            # 4. Forward and backward: this process's sums over the counts of all processes.
            optimizer.zero_grad()
            batches = [next(loader) for _ in range(args.accum)]
            losses, mixture = forward_backward(args, task, trained, batches, step, tau)

            # 5. Clip the gradient; update the weights.
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), task.clip)
            optimizer.step()
            # Infinity and NaN stay in a sum of losses; a gradient's norm passes them on.
            interval += losses + 0 * norm

            # 6. So far a GPU was only told what to do. To see a number the host must wait for it:
            # so it looks now and then.
            due = done % args.eval_every == 0 or done == steps
            look = done % LOOK_EVERY == 0
            recorded = done % math.ceil(steps / 30) == 0
            stop = stop_asked()
            if WORLD_SIZE > 1:  # if any process was asked, all stop after the same step
                stop = look and total(torch.tensor(int(stop))).item()
            if not (look or recorded or due or stop):
                continue
            means = total(interval) / ((done - 1) % args.eval_every + 1)
            means = dict(zip(task.loss_names, means.tolist()))
            check_sound(f"steps {looked + 1} to {done}", means)
            looked = done
            if recorded:
                record(args, step=done, lr=lr, temperature=tau, losses=means,
                    mixture=mixture.shares())

            # 7. Every eval_every steps: evaluate, print a line, record it, draw it, save.
            if due:
                speed = (done - timed_from) * args.batch / (time.time() - timed_since)
                scores, switches = task.evaluate(model)
                check_sound(f"step {done}", scores)
                report(args, task, steps, step=done, lr=lr, temperature=tau, per_second=speed,
                    losses=means, scores=scores, switches=switches, seconds=time.time() - started)
                interval.zero_()
                save_checkpoint(args, task, optimizer, done, interval)
                timed_from = done
                timed_since = time.time()  # evaluation is not timed

            # 8. Asked to stop? --resume continues here.
            if stop and done < steps:
                save_checkpoint(args, task, optimizer, done, total(interval))
                say(f"stopped after step {done}; --resume continues from here")
                return None
    return scores


# --- 4. Optimisation ------------------------------------------------------------------------------
#
# All random draws depend on (seed, epoch, step, part) only, so a step is the same in any number of
# processes and after any number of restarts.


def learning_rate(step, total, peak):
    """Learning rate of a step, counted from 0: linear warm-up over 10 %, then linear decay to 0.

    >>> [round(learning_rate(step, 1000, 1.0), 2) for step in (0, 49, 99, 550, 775, 1000)]
    [0.01, 0.5, 1.0, 0.5, 0.25, 0.0]
    """
    rise = max(1, round(0.1 * total))
    return peak * min((step + 1) / rise, (total - step) / max(1, total - rise))


def make_optimizer(model, weight_decay=0.01, gate_rate=0.1):
    """AdamW [supp. 2]; no decay on biases and LayerNorms (A7). Gates have a tenth of the learning
    rate in pretraining (A10): fast ones settle on what is best for a still untrained model.
    """
    groups = {}
    for name, parameter in model.named_parameters():
        decay = weight_decay if parameter.ndim > 1 else 0.0
        scale = gate_rate if "gate." in name else 1.0
        new = dict(params=[], weight_decay=decay, scale=scale)
        group = groups.setdefault((decay, scale), new)
        group["params"].append(parameter)
    return torch.optim.AdamW(list(groups.values()), eps=1e-6, fused=True)  # betas: .9, .999


def cut_batch(args, task):
    """Make the batch no larger than the data. Raises BadInput if it has no equal parts."""
    parts = WORLD_SIZE * args.accum
    number = len(task.examples)
    if args.epochs and number < args.batch:
        say(f"--batch {args.batch} is cut: there are only {number} training {task.unit}")
        args.batch = number // parts * parts
    if args.batch % parts or args.batch == 0:
        raise BadInput(f"--batch {args.batch}: {number} {task.unit} cannot be cut into equal parts "
            f"for {WORLD_SIZE} processes x --accum {args.accum}")


def anneal_rate(args, task, steps):
    """The rate at which the temperature decays per example: the paper's, 1e-6 (A5). With --anneal,
    or if a run is too short for it, one that reaches the floor after a share of the run, .9 if none
    is given: what is used are closed switches, so a run must end with them.
    """
    decay = math.log(task.initial_temperature / FINAL_TEMPERATURE)
    examples = max(1, steps * args.batch)
    share = args.anneal
    if not share:
        if 1e-6 * examples >= decay:
            return 1e-6
        share = 0.9
        say(f"switches close after 90 % of the run: its {examples:,} {task.unit} are fewer than "
            f"the {1e6 * decay:,.0f} of the paper's rate")
    return decay / (share * examples)


@functools.lru_cache(1)  # called in every step
def epoch_batches(seed, epoch, size, examples):
    """(batches, size) indices: the examples of an epoch, batches of similar length. Captions have
    12 word pieces on average and up to 38: in random batches, padded to the longest, most of the
    text would be padding. So the epoch's permutation is cut into windows of 100 batches, each
    window is sorted by length, and all batches are shuffled. The result depends on (seed, epoch)
    only: it is the same in every process and after every restart.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(examples))
    order = order[: len(order) // size * size]  # the rest is skipped in this epoch
    for part in np.split(order, range(100 * size, len(order), 100 * size)):  # views
        part[:] = part[np.argsort(examples.lengths[part], kind="stable")]
    return rng.permutation(order.reshape(-1, size))  # shuffles batches, not within them


def load_parts(args, task, first, steps):
    """An iterator over this process's batches, `accum` per step, from step `first` on. A step's
    batch is the same for any number of processes: it is cut into world_size x accum equal parts.
    --workers load in advance; all they need is a key, (epoch, index), so nothing is lost by a kill.
    """
    def keys():
        """Lists of (epoch, index), one per part of this process."""
        for step in range(first, steps):
            epoch, k = divmod(step, len(task.examples) // args.batch)
            batch = epoch_batches(args.seed, epoch, args.batch, task.examples)[k]
            for part in batch.reshape(WORLD_SIZE, args.accum, -1)[RANK]:
                yield [(epoch, int(i)) for i in part]

    return iter(load_ahead(task.examples, keys(), task.collate, args.workers))


def place(model, args):
    """The model on this process's device. Wherever it is called, it computes in --precision: so do
    evaluation and ranking. Its backward pass, outside of this, takes each product's own precision.
    """
    lower = torch.autocast(device().type, torch.bfloat16, enabled=args.precision == "bf16")
    model.forward = lower(model.forward)
    return model.to(device())


def send(tensor):
    """The tensor on this process's device; the host does not wait for it."""
    # Apple's GPU would read a tensor that is gone already.
    return tensor.to(device(), non_blocking=device().type == "cuda")


def to_device(batch):
    """The dict with its tensors on this process's device; all else is unchanged."""
    return {k: send(v) if torch.is_tensor(v) else v for k, v in batch.items()}


def forward_backward(args, task, model, batches, step, tau):
    """Accumulate gradients; returns this process's share of the mean losses (losses,), which add up
    over processes, and switch mixtures (SwitchShares). A mean is over all that is predicted in the
    *whole* batch. Parts hold different numbers of masked places, so a mean of their means would
    weight places unequally, and depend on the number of processes: sums are divided by the common
    count instead.
    """
    counts = total(sum(task.counts(batch) for batch in batches)).clamp(min=1)  # (losses,)
    sums = torch.zeros(len(counts), device=device())
    mixture = SwitchShares(task.model.config)
    for number, batch in enumerate(batches, RANK * args.accum):
        # The noise of dropout and switches depends on the part, not on its process.
        seed = np.random.default_rng([args.seed, step, number]).integers(2**63)
        torch.manual_seed(int(seed))
        # DistributedDataParallel exchanges gradients once per step, after a process's last part.
        model.require_backward_grad_sync = batch is batches[-1]
        part, out = task.sums(model, to_device(batch), tau)
        # It averages them over processes; we need their sum.
        (WORLD_SIZE * (part / counts).sum()).backward()
        sums += part.detach()
        mixture.add(out)
    return sums / counts, mixture


def compile_layers(model):
    """Compile a model's layers, which share their code: a minute; the whole model takes several.
    One graph serves training at any length, and three evaluation: hard, soft, a single pair.
    """
    torch._dynamo.config.suppress_errors = True  # without a compiler, layers run as they are
    for layer in model.bert.layers:
        layer.block = torch.compile(layer.block, dynamic=True)


def check_sound(where, numbers):
    """Raise BadInput unless each of {name: number} is below a thousand in absolute value. No loss
    here starts above 100: so this means that the weights have diverged.
    """
    if not all(abs(number) < 1e3 for number in numbers.values()):  # NaN is never below
        found = ", ".join(f"{name} {number:.4g}" for name, number in numbers.items())
        raise BadInput(f"{where}: diverged ({found}); the last good checkpoint is kept; "
            "lower --lr, or check the data")


# --- 5. Evaluation --------------------------------------------------------------------------------
#
# Switches are hard unless a temperature is given: this measures the model that will be used,
# without noise. Processes share the work in whole batches of similar length, so the padding of a
# batch, and with it the rounding, is the same for any number of processes.


def share_of(lengths, batch_size=200):
    """The batches that this process evaluates: arrays of indices, by similar length."""
    order = np.argsort(lengths, kind="stable")
    return np.split(order, range(batch_size, len(order), batch_size))[RANK::WORLD_SIZE]


class SwitchShares:
    """What the switches chose, as shares of all samples: add outputs, then call shares()."""

    def __init__(self, config):
        layers = config.num_hidden_layers
        shapes = [(layers, 2, len(MODES))] + [(2, depths) for depths in range(1, layers + 1)]
        self.sums = [torch.zeros(shape, device=device()) for shape in shapes]

    def add(self, out):
        """out: a SwitchBertOutput: mixtures at a temperature, one-hot choices without one."""
        for kept, new in zip(self.sums, (out.modes, *out.depths)):
            kept += new.detach().sum(0)

    def shares(self):
        """{"modes": (layers, 2, M), "depths": per layer (2, l+1)}; every process must call it."""
        shares = []
        for part in self.sums:
            part = total(part)
            # The options of a switch sum to the number of samples.
            shares.append((part / part.sum(-1, keepdim=True)).tolist())
        return {"modes": shares[0], "depths": shares[1:]}


@torch.no_grad()
def evaluate(model, dataset, batch_size=200):
    """Losses and accuracies on a PretrainingDataset, and what the switches chose: two dicts."""
    model.eval()
    found = torch.zeros(5, device=device())
    counts = torch.zeros(3)
    switches = SwitchShares(model.config)
    for part in share_of(dataset.lengths, batch_size):
        batch = to_device(collate([dataset[i] for i in part]))
        out = model(**class_targets(batch, dataset.store))
        found += torch.cat([out.sums, out.correct])  # three losses, hits among words and pairs
        counts += torch.tensor(out.counts)
        switches.add(out.encoder)
    model.train()
    # mlm and words are means over masked words, mrc over masked regions, itm and match over pairs.
    means = total(found) / total(counts)[[0, 1, 2, 0, 2]].clamp(min=1)
    scores = dict(zip(("mlm", "mrc", "itm", "words", "match"), means.tolist()))
    return scores, switches.shares()


def zero_shot(args, task):
    """Recalls with the pretrained matching head: one caption for each of 100 held-out images."""
    # Reversed, so that a dict keeps the first caption of each image.
    first = dict(reversed(task.whole.captions))
    ids, texts = zip(*sorted(first.items())[:100])
    ranker = SwitchBertForRetrieval.from_pretraining(task.model.config, task.model.state_dict())
    scores = match_scores(place(ranker, args), task.store, task.tokenizer, texts, ids)
    return {"images": len(ids), **recall_at(scores, torch.arange(len(ids)))}


@torch.no_grad()
def match_scores(model, store, tokenizer, texts, image_ids, max_tokens=38, temperature=None):
    """(texts, images): how well text i and image j match, by a SwitchBertForRetrieval. Every pair
    goes through the model. A block of 100 images is padded and sent to the device once; a batch is
    all of them with some texts of similar length, up to 200 pairs. The processes share the texts.
    An id that the store lacks is an image without regions, as a blind model sees it.
    """
    model.eval()
    words = [np.array(tokenizer.encode(text, max_tokens)) for text in texts]
    lengths = [len(ids) for ids in words]
    scores = torch.zeros(len(texts), len(image_ids), device=device())
    for start in progress(range(0, len(image_ids), 100), "scoring"):
        images = [dict(region_inputs(store, store.row(image_id)), input_ids=words[0])
            for image_id in image_ids[start : start + 100]]
        n = len(images)
        block = to_device(model_inputs(images))
        for part in share_of(lengths, max(1, 200 // n)):
            k = len(part)
            some = to_device(model_inputs([images[0] | {"input_ids": words[i]} for i in part]))
            # All images for the first text, all for the second ...: (k n, R, ...) and (k n, T).
            pairs = {name: torch.cat([tensor] * k) for name, tensor in block.items()}
            for name in ("input_ids", "text_mask"):
                pairs[name] = some[name].repeat_interleave(n, dim=0)
            found, _ = model(**pairs, temperature=temperature)
            scores[send(torch.from_numpy(part)), start : start + n] = found.view(k, n)
    return total(scores).cpu()


def recall_at(scores, image_of_text, ks=(1, 5)):
    """Share of queries whose right answer is among the k best: {'image R@1': .., 'text R@1': ..}.
    scores (texts, images); image_of_text (texts,): the index of each text's image. "image" finds
    the image of a text, "text" any text of an image. Ties count against the model: one that scores
    all pairs alike has recall 0, not 1.
    """
    wrong = image_of_text[:, None] != torch.arange(scores.shape[1])  # (texts, images)
    right = scores.masked_fill(wrong, -math.inf)
    recalls = {}
    for name, candidates in (("image", 1), ("text", 0)):  # the dimension that is searched
        best = right.amax(candidates, keepdim=True)
        rank = ((scores >= best) & wrong).sum(candidates)  # 0 is best
        for k in ks:
            recalls[f"{name} R@{k}"] = (rank < k).float().mean().item()
    return recalls


# --- 6. Data of a run -----------------------------------------------------------------------------
#
# Where pairs, regions and words come from. Captions are held out by image: were a held-out image in
# a training pair too, the model could recognise its picture.

NUM_HELD_OUT = 400  # scenes for the losses and accuracies; the first 100 of them for retrieval
# What a run trains on: regions (a FeatureStore), training and held-out pairs (image id, text) as
# Captions or a list, and words (a WordPiece).
Data = namedtuple("Data", "store captions held_out_captions tokenizer")


def load_data(folder, bert=None, words=None):
    """The Data of a folder, or of the toy world if it is None. A folder holds features/ (a store)
    and captions (*.tsv, *.json, or folders of pictures and texts, any number). Words are those of a
    resumed checkpoint (words: its pieces), or see find_words.
    """
    if folder is None:
        store, scenes, held_out_scenes = toy_world()
        training = [(n, text) for n in scenes for text in Scene(n).captions(4)]
        held_out = [(n, text) for n in held_out_scenes for text in Scene(n).captions(2)]
        texts = toy_texts(scenes[:1000])
    else:
        store = FeatureStore(folder / "features")
        training, held_out = split_captions(folder, store)
        texts = (text for _, text in training)
    tokenizer = WordPiece(words) if words else find_words(folder, bert, texts)
    return Data(store, training, held_out, tokenizer)


def find_words(folder, bert, texts):
    """The WordPiece of a new run: vocab.txt of the BERT that it starts from (bert: its folder, or
    None), whose weights know no other words; else of the data folder; else built from these texts,
    always to the same words.
    """
    places = [place for place in (bert, folder) if place]
    found = [WordPiece(file) for place in places for file in place.glob("vocab.txt")]
    if bert and not found:
        raise BadInput(f"{bert}: expected vocab.txt, the words of its weights")
    if not found:
        return WordPiece(build_vocab(texts))
    if found[0].pieces != found[-1].pieces:
        raise BadInput(f"vocab.txt differs in {bert} and {folder}; remove that of {folder}")
    return found[0]


def split_captions(folder, store):
    """(training, held-out) captions of all files in a folder: those of train, and 1,000 of val."""
    captions, splits = read_folder(folder, store)
    training = captions[splits == b"train"]
    held_out = captions[splits == b"val"][:1000]
    unused = len(captions) - len(training) - len(held_out)
    if unused:
        say(f"{folder}: {unused:,} captions are not used: test, val beyond 1,000, or training "
            "captions of its images")
    return training, held_out


def read_folder(folder, store):
    """(captions, splits (N,) bytes) of all files in a folder. Without any val, captions of the 1 %
    of images with features, at least 5, whose ids have the smallest crc32 become val: that does not
    depend on the order of files. Training captions of val's images are of no split, b"".
    """
    paths = sorted(path for path in folder.glob("[!.]*")
        if path.name not in ("features", "bert", "vocab.txt"))
    sources = []  # of every caption, its file's index in paths
    splits = []

    def pairs():
        """Yield (image id, caption) of all files."""
        for number, path in enumerate(paths):
            if path.is_dir() or path.suffix.lower() in (".tsv", ".json"):
                for image_id, text, split in caption_records(path):
                    sources.append(number)
                    splits.append(split)
                    yield image_id, text

    captions = Captions(pairs())
    sources = np.array(sources, np.uint32)
    splits = np.array(splits, "S5")
    read = np.unique(sources)
    unread = [path.name for number, path in enumerate(paths) if number not in read]
    if unread:
        say(f"{folder}: no captions are read from {', '.join(unread)}")
    if len(read) == 0:
        raise BadInput(f"{folder}: found no captions; expected *.tsv, *.json or a folder of "
            "pictures with *.txt, beside features/")
    check_names(captions.ids, sources, paths)
    found = np.zeros(len(captions), bool)
    for number in read:
        mine = sources == number
        found[mine] = store.find(captions.ids[mine], f"{paths[number]}: captions") >= 0

    in_training = splits == b"train"
    held_out = splits == b"val"
    if held_out.any():
        in_both = in_training & np.isin(captions.ids, captions.ids[held_out])  # of whichever file
        splits[in_both] = b""
    else:
        codes = np.fromiter(map(zlib.crc32, captions.ids), np.uint32)
        images = np.unique(codes[in_training & found])
        chosen = np.isin(codes, images[: max(5, len(images) // 100)])
        splits[in_training & chosen] = b"val"
    return captions, splits


def check_names(ids, sources, paths):
    """Raise BadInput if two captions that may be of different pictures have the same image id.

    A folder holds one caption per picture, so no id may come twice from folders. Their numbers are
    often counters (img2dataset): in a table or JSON file, the same number means another picture.
    Those files may well share images. ids, sources (N,): of each caption the image's id, and the
    index in paths of the file or folder that it is from.
    """
    from_folder = np.array([path.is_dir() for path in paths])[sources]
    if not from_folder.any():
        return
    names, times = np.unique(ids[from_folder], return_counts=True)
    elsewhere = np.isin(names, ids[~from_folder])
    clash = (times > 1) | elsewhere & np.strings.isdigit(names)
    for name in names[clash]:
        places = [paths[number] for number in sources[ids == name]]
        raise BadInput(f"{places[0]} and {places[-1]} both have a picture {name.decode()}; if "
            "these are two, rename one and extract its features anew")


def toy_world():
    """(store, numbers of training scenes, of held-out scenes) of the toy world; trains the detector
    and fills the store if they are missing. A scene's id is its number, which is also its seed. No
    model is trained on held-out scenes.
    """
    training = range(TRAIN_SCENES, TRAIN_SCENES + 3600)
    held_out = range(HELD_OUT_SCENES, HELD_OUT_SCENES + NUM_HELD_OUT)
    features = Path("runs/world/features-3600")
    if RANK > 0:
        dist.barrier()  # until the first process has made them
    try:
        store = FeatureStore(features)
    except BadInput:  # none, or a half-written one
        from extract_features import extract_scenes, toy_detector  # needs torchvision
        with only_run_in(features.parent):
            detector = toy_detector(features.with_name("detector.pt"), training)
            store = extract_scenes(detector, [*training, *held_out], features)
    if RANK == 0 and WORLD_SIZE > 1:
        dist.barrier()
    return store, training, held_out


def toy_texts(numbers):
    """Yield texts of scenes for a vocabulary; finetuning uses it too, so questions as well."""
    for scene in map(Scene, numbers):
        yield from scene.captions()
        for question, answer, _ in scene.questions():
            yield f"{question} {answer}"
        for expression, _, _ in scene.expressions():
            yield expression


# --- 7. Processes ---------------------------------------------------------------------------------
#
# One process per GPU, all running the same code on their own parts of each batch. torchrun starts
# them, for --gpus as well, and sets RANK, LOCAL_RANK and WORLD_SIZE. Skip this on a first reading.


def launch(args, work):
    """Run work() in this process, or in --gpus processes, and exit. Its result is None if the run
    was stopped: then the status is 130, so that no shell goes on with it.
    """
    if args.gpus > 1 and WORLD_SIZE == 1:
        return start_processes(args.gpus)
    if args.threads:
        torch.set_num_threads(args.threads)
    if torch.cuda.is_available() and args.precision == "fp32":
        torch.set_float32_matmul_precision("high")  # TF32
    if WORLD_SIZE > 1:
        card = None
        if torch.cuda.is_available():
            card = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(card)
        # In a ranking, hours may pass before the processes hear of each other again.
        dist.init_process_group("nccl" if card else "gloo", timeout=timedelta(days=1),
            device_id=card)
    with only_run_in(args.out) if RANK == 0 else contextlib.nullcontext():
        result = work()
    status = 130 if result is None else 0
    if WORLD_SIZE > 1:
        dist.barrier()  # torchrun ends the others at the first status that is not 0
        dist.destroy_process_group()
        # If one of Gloo's threads still runs while the interpreter shuts down, the process aborts
        # although all is done. So it exits here, after the usual cleanup.
        atexit._run_exitfuncs()
        os._exit(status)
    sys.exit(status)


def device():
    """Where this process computes: its own GPU (launch has chosen it), Apple's, or the CPU; several
    processes on the CPU of an Apple, whose GPU they cannot share.
    """
    if torch.accelerator.is_available() and (WORLD_SIZE == 1 or torch.cuda.is_available()):
        return torch.accelerator.current_accelerator()
    return torch.device("cpu")


def total(tensor):
    """The sum of a tensor over all processes, on the device. All must call it."""
    tensor = send(tensor)
    if dist.is_initialized():
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


@contextlib.contextmanager
def stop_signals():
    """In this block SIGTERM, Ctrl-C and the end of a torchrun that has started this process only
    ask to stop: no step is interrupted, so the saved state is that of an undisturbed run. Yields a
    function: was it asked?
    """
    asked = []
    parent = os.getppid()
    on_stop(lambda *_: asked.append(True))
    try:
        yield lambda: bool(asked) or WORLD_SIZE > 1 and os.getppid() != parent
    finally:
        on_stop()  # as `run` has set it


# --- 8. The record --------------------------------------------------------------------------------
#
# metrics.jsonl has two kinds of lines. At most thirty hold the mixture of the switches in
# training at that step: the frames of switches.gif. One per evaluation holds held-out scores,
# and what the switches chose: switches.png draws the last one. Both hold the mean losses since
# the last evaluation: curves.png draws these, the scores, lr and temperature.
#
#     {"step": 30, "lr": 3.3e-4, "temperature": 4.46, "losses": {"mlm": 3.97, ...},
#         "mixture": {"modes": ..., "depths": ...}}
#     {"step": 450, "examples": 28800, "lr": 5.6e-4, "temperature": 0.84, "per_second": 872,
#         "losses": {"mlm": 0.72, ...}, "scores": {"words": 0.726, ...},
#         "switches": {"modes": ..., "depths": ...}, "seconds": 71}      as in SwitchShares.shares

CHECKPOINT_FORMAT = "switchbert-4"


def save_checkpoint(args, task, optimizer, step, interval):
    """All that a resumed run, finetuning or a reader needs: the run's state (interval: the losses
    since the last evaluation), its settings, and what the model fits. No state of a random
    generator is needed: every step seeds its own.
    """
    if RANK == 0:
        content = {"format": CHECKPOINT_FORMAT, "task": task.name, "step": step,
            "settings": {key: vars(args)[key] for key in TOY if key in args},
            "config": asdict(task.model.config), "vocab": task.tokenizer.pieces,
            "labels": task.labels, "store": task.store.meta, "model": task.model.state_dict(),
            "examples": task.examples.captions.checksum, "interval": interval,
            "optimizer": optimizer.state_dict()}
        write_whole(args.out / "checkpoint.pt", lambda file: torch.save(content, file), mode="wb")


def load_checkpoint(path, *tasks):
    """A checkpoint of one of these tasks, or that of a run's folder: a dict of plain values and
    tensors. Raises BadInput.

    torch does not verify the checksums of its file, so a flipped bit would load as another number;
    zipfile does. weights_only refuses any code that a pickle could run.
    """
    if path.is_dir():
        path /= "checkpoint.pt"
    with reading(path, f"a whole checkpoint of {' or '.join(tasks)}"):
        with zipfile.ZipFile(path) as file:
            if broken := file.testzip():
                raise ValueError(f"{broken} is damaged")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if checkpoint["format"] != CHECKPOINT_FORMAT:
            raise ValueError(f"its format is {checkpoint['format']}, not {CHECKPOINT_FORMAT}")
        if checkpoint["task"] not in tasks:
            raise ValueError(f"it is one of {checkpoint['task']}")
    return checkpoint


def check_fits(checkpoint, store, *more):
    """Raise BadInput if a checkpoint's store differs in these entries, or `more`, of store.json:
    another detector's features have another meaning, even at the same size.
    """
    for key in ("feature_size", "detector", *more):
        if store.meta[key] != checkpoint["store"][key]:
            raise BadInput(f"{store.folder}: its {key} is {store.meta[key]!r}, but the checkpoint "
                f"was trained with {checkpoint['store'][key]!r}; use that store, or start over")


def begin_record(args, task, first, steps):
    """Make a run's folder, rename another run's to the first free name, print the opening line. On
    resume, lines of metrics.jsonl after step `first` are dropped: the run writes them again.
    """
    if RANK > 0:
        return
    out = args.out
    kept = []
    if first:
        kept = [json.dumps(line) + "\n" for line in read_metrics(out) if line["step"] <= first]
    elif (out / "checkpoint.pt").exists():
        n = 1
        while Path(f"{out}-{n}").exists():
            n += 1
        try:
            earlier = out.rename(f"{out}-{n}")
        except OSError as error:  # a mounted folder
            raise BadInput(f"{out} holds a run and cannot be renamed ({error}); continue it with "
                f"--resume, or begin a new one with --out {out}/new") from None
        say(f"the run that was in {out} is now in {earlier}")
        out.mkdir()
        for lock in earlier.glob(".lock"):  # this process holds it
            lock.replace(out / ".lock")
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "metrics.jsonl", lambda file: file.writelines(kept))
    write_json(out / "config.json", {"settings": vars(args), "model": asdict(task.model.config),
        "data": task.store.folder, "examples": len(task.examples), "left_out": task.missing,
        "torch": torch.__version__})
    say(f"{task.name}{' without pictures' * args.blind}: {len(task.examples)} {task.unit}, "
        f"{sum(p.numel() for p in task.model.parameters()):,} parameters, {steps} steps of "
        f"{args.batch}, {args.precision}, on {device().type}; processes: {WORLD_SIZE}, threads: "
        f"{torch.get_num_threads()}"
        f"{f'; resuming after step {first}' * (first > 0)}")


def record(args, **line):
    """Add an object to metrics.jsonl."""
    if RANK == 0:
        with open(args.out / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")


def report(args, task, steps, **line):
    """Print an evaluation (without losses of 0, such as MRC in a blind run), record and draw it."""
    record(args, examples=line["step"] * args.batch, **line)
    losses = " ".join(f"{name} {loss:.2f}" for name, loss in line["losses"].items() if loss)
    say(f"step {line['step']:5d}/{steps}  lr {line['lr']:.1e}  tau {line['temperature']:.2f}  "
        f"{losses} | {task.headline(line['scores'])} | {line['per_second']:.0f} {task.unit}/s, "
        f"{line['seconds']:.0f} s")
    if RANK == 0:
        save_png(args.out / "switches.png", draw_switches(args.out))
        save_png(args.out / "curves.png", draw_curves([args.out]))


def read_metrics(folder):
    """The objects of a run's metrics.jsonl. Raises BadInput near a damaged line, but leaves out a
    last one without newline: a kill has cut it off, and a resumed run rewrites it.
    """
    path = folder / "metrics.jsonl"
    with reading(path, "the metrics.jsonl of a run", "line") as at:
        lines = path.read_text().split("\n")[:-1]
        return [json.loads(line) for at.entry, line in enumerate(lines, 1)]


def draw_switches(folder):
    """Write a run's switches.gif, in under 300 KB: how they closed as the temperature fell. Returns
    a picture of what every layer chose at the end, and at the start of a finetuned run: what did
    the task change? Raises BadInput without data.
    """
    lines = read_metrics(folder)
    chosen = [line for line in lines if "switches" in line]
    if not chosen:
        raise BadInput(f"{folder}: nothing to draw yet; this run has made no evaluation")
    # In one fixed palette, pixels that do not change between frames compress to nothing.
    frames = [switches_picture(line["mixture"],
        f"{folder}, step {line['step']}, temperature {line['temperature']:.2f}"
        ).convert("P", dither=0) for line in lines if "mixture" in line]
    if frames:
        write_whole(folder / "switches.gif", lambda file: frames[0].save(file, "GIF", loop=0,
            save_all=True, append_images=frames[1:],
            duration=[150] * (len(frames) - 1) + [3000]), mode="wb")  # milliseconds
    return stack([switches_picture(line["switches"], f"{folder}, step {line['step']}")
        for line in chosen if line["step"] == 0 or line is chosen[-1]])


def stack(images, columns=1):
    """Some PIL images as one, `columns` per row: all as wide as the widest, a row as high as its
    highest.
    """
    rows = [images[k : k + columns] for k in range(0, len(images), columns)]
    heights = [max(image.height for image in row) for row in rows]
    width = max(image.width for image in images)
    whole = Image.new("RGB", (width * len(rows[0]), sum(heights)), "white")
    for k, row in enumerate(rows):
        for column, image in enumerate(row):
            whole.paste(image, (width * column, sum(heights[:k])))
    return whole


# Of modes and of runs. The colour-blind can tell these seven apart [Okabe and Ito]; then they
# come again.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000") * 9
WIDTH = 828  # pixels: what GitHub shows
BAR, ROW = 340, 24  # pixels: the width of a bar and of all depths, the height of a row


def canvas(width, height, title, names=()):
    """A PIL image with a title and, below, names in their colours; and what draws on it."""
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    draw.font = ImageFont.load_default(14)
    draw.text((10, 8), title, "black")
    for number, name in enumerate(names):
        draw.text((10, 28 + 20 * number), str(name), COLOURS[number])
    return image, draw


def switches_picture(switches, title):
    """What every layer chose, as a PIL image: bars for modes, cells for depths (black: always).

    switches: as SwitchShares.shares returns them.
    """
    layers = len(switches["modes"])
    top = 40 + 20 * len(MODES)
    image, draw = canvas(WIDTH, top + 20 + 2 * ROW * layers,
        f"{title}: how text and vision attend, and (black) which depth they read", MODES)
    for row, (modality, layer) in enumerate(np.ndindex(2, layers)):
        x = 120
        y = top + ROW * row + 10 * modality
        draw.text((10, y + 2), f"{MODALITIES[modality]}, layer {layer + 1}", "black")
        for share, colour in zip(switches["modes"][layer][modality], COLOURS):
            draw.rectangle([x, y, x + BAR * share, y + 20], colour)
            x += BAR * share
        for share in switches["depths"][layer][modality]:
            grey = round(255 - 255 * share)
            right = x + 10 + BAR / layers
            draw.rectangle([x + 14, y, right, y + 20], (grey, grey, grey), "grey")
            x += BAR / layers
    return image


def draw_curves(folders):
    """How runs went, as a PIL image: a panel per loss, rate and score, twelve at most."""
    curves = defaultdict(lambda: defaultdict(list))  # name -> (colour, width) -> points
    for folder, colour in zip(folders, COLOURS):
        for line in reversed(read_metrics(folder)):  # the last one has all names
            for width, kind in (2, "losses"), (5, "scores"):
                for name, value in (line.get(kind, {}) | line).items():
                    if isinstance(value, float):
                        curves[name][colour, width].append((line["step"], value))
    panels = []
    for name, lines in [*curves.items()][:12]:
        points = np.concatenate([*lines.values()])  # (points, 2): step and value
        low = points.min(axis=0) * (0, 1)  # steps count from 0
        high = points.max(axis=0)
        panel, draw = canvas(WIDTH // 3, 200,
            f"{name}: {low[1]:.4g} to {high[1]:.4g}\nsteps 0 to {high[0]:.0f}")
        draw.rectangle([10, 48, 266, 192], outline="lightgrey")
        for (colour, width), points in lines.items():
            places = (13, 188) + (points - low) / (high - low + 1e-9) * (250, -136)
            draw.line([*places.flat], colour, width)
            for place in places:  # there may be one alone
                draw.circle(place, width // 2, colour)
        panels.append(panel)
    panels = stack(panels, columns=3)
    top = 40 + 20 * len(folders)
    image, _ = canvas(WIDTH, top + panels.height, "thin: training, thick: held out", folders)
    image.paste(panels, (0, top))
    return image


def show(argv):
    """python train.py show RUN [RUN ...]: compare runs, in two pictures and a table."""
    p = argparse.ArgumentParser("train.py show",
        description="Draw how runs went and what switches chose; print final scores.")
    p.add_argument("runs", nargs="+", type=Path, help="folders of runs; each gets a switches.gif")
    p.add_argument("-o", "--out", type=Path,
        help="what all switches chose, beside it curves.png; None: first RUN/switches.png")
    args = p.parse_args(argv)
    out = args.out or args.runs[0] / "switches.png"
    save_png(out, stack([draw_switches(folder) for folder in args.runs]))
    save_png(out.with_name("curves.png"), draw_curves(args.runs))
    for folder in args.runs:
        scores = {}
        for line in read_metrics(folder):
            scores |= line.get("scores", {})
        for path in folder.glob("result.json"):
            scores |= read_json(path)["results"].get("val", {"hard": {}})["hard"]
        print(f"{folder!s:24}", *(f"{name} {value:.3f} " for name, value in scores.items()))
    print(out)


def main(argv):
    """Pretrain, or show; argv: the command line without the script's name."""
    if argv[:1] == ["show"]:
        return show(argv[1:])
    args, checkpoint = parse_args(argv)
    return launch(args, lambda: pretrain(args, checkpoint))


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
