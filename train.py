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
    runs/pretrain/  checkpoint.pt  metrics.jsonl  config.json  switches.png  switches.gif
          |
          +--> finetune.py, whose tasks go through the same `fit`

Letters: B batch, T word pieces, R regions, F region feature, C region classes.

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
    python train.py show runs/pretrain  draw switches.png and switches.gif again
    torchrun --nnodes 2 --nproc-per-node 4 train.py      ... on two machines

Without data it draws scenes, trains a Faster R-CNN on them, extracts regions, pretrains, and
evaluates on held-out scenes. It prints one line per evaluation, here wrapped:

    step   450/900  lr 5.6e-04  tau 0.84  mlm 0.73 mrc 2.38 itm 0.41 | words 0.706  match 0.886
           | 1049 pairs/s, 29 s

tau is the temperature; mlm, mrc and itm are the mean training losses since the last line. `words`
is the share of masked word pieces that are predicted correctly, `match` the accuracy of image-text
matching (chance: .50), both on held-out pairs with hard switches.

A run is a function of its settings: the pairs of a batch, their masks, and the noise of dropout and
switches depend on (seed, epoch, step) and on no hidden state. That is why a killed run resumes bit
for bit, and why 1, 2 or 8 processes train on the same batches.

Assumptions and deviations: A5 (temperature by pairs), A7 (VOLTA's settings), A10 (slow gates), D2
(the toy run's sizes, learning rate and annealing).
"""

import argparse
import atexit
import contextlib
import functools
import json
import math
import os
import signal
import sys
import time
import zipfile
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

# Operators that Apple's GPU lacks run on the CPU instead. torch reads this on import.
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from data import (COUNT, HELD_OUT_SCENES, NATURAL, RANK, RATE, SHARE, TRAIN_SCENES, WORLD_SIZE,
    BadInput, Captions, FeatureStore, PretrainingDataset, Scene, WordPiece, build_vocab, collate,
    flag, model_inputs, only_run_in, progress, read_captions, reading, region_inputs, run, save_png,
    start_processes, write_json, write_whole)
from switchbert import (FROZEN, LEARNED, MODALITIES, SwitchBertConfig,
    SwitchBertForPretraining, SwitchBertForRetrieval, load_bert, temperature)

# --- 1. Settings ----------------------------------------------------------------------------------
#
# Two tables of defaults. FULL is the paper's [supp. 2] and, where it is silent, VOLTA's (A7). The
# toy run is DEVIATION D2. `anneal` is the share of the run after which the temperature reaches its
# floor, 0.2; None means the paper's rate, 1e-6 per pair (A5).

TOY = dict(model="small", epochs=4, batch=64, lr=1e-3, eval_every=225, anneal=0.9)
FULL = dict(model="base", epochs=10, batch=256, lr=1e-4, eval_every=1000, anneal=None)
# These settings define a run; a resumed run keeps them. All other flags say how it is computed.
FIXED = (*TOY, "switches", "seed", "limit", "blind", "scratch", "boxes")


def parse_args(argv):
    """(settings, the checkpoint to resume from or None) of a command line."""
    p = argparse.ArgumentParser(description="Pretrain Switch-BERT; `train.py show RUN ...` draws "
        "what the switches of runs chose.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--data", type=Path, default=Path("data") if Path("data").is_dir() else None,
        help="folder with features/ and captions; None: the toy world")
    p.add_argument("--switches", default="learned", help="learn both switches, or one of them: "
        f"{', '.join(LEARNED)}; or freeze them: {', '.join(FROZEN)}, or any path such as "
        "II,XX,JJ,IJ, text and vision per layer: I own modality, X the other, J both")
    p.add_argument("--model", choices=["base", "small"], help="12 layers x 768, or 4 x 128")
    p.add_argument("--bert", type=Path, help="Hugging Face BERT folder to start from; None: bert/ "
        "in the data folder, if it exists")
    add_run_flags(p, Path("runs/pretrain"))
    return parse_settings(p, argv, lambda args: FULL if args.data else TOY, "pretraining")


def add_run_flags(p, out):
    """Add the flags that all trainings share. parse_settings fills in those that are None."""
    bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    flag(p, "--out", Path, out, "folder of the results")
    flag(p, "--epochs", NATURAL, None, "passes over the training examples")
    flag(p, "--batch", COUNT, None, "examples per step, over all processes")
    flag(p, "--lr", RATE, None, "peak learning rate")
    flag(p, "--eval-every", COUNT, None, "steps between evaluations and checkpoints")
    flag(p, "--anneal", SHARE, None, "share of the run with tau above 0.2; None: 1e-6 per example")
    flag(p, "--limit", COUNT, None, "train on this many examples at most")
    flag(p, "--seed", NATURAL, 0, "seed of everything random")
    flag(p, "--gpus", COUNT, 1, "processes, one per GPU; without GPUs on the CPU")
    flag(p, "--accum", COUNT, 1, "parts per process and step: less memory, same result")
    flag(p, "--workers", NATURAL, 0, "loading processes per process")
    flag(p, "--threads", COUNT, None, "CPU threads per process; None: all cores. Use 1 on a busy "
        "machine: one thread without a core makes every operation wait")
    p.add_argument("--resume", action="store_true", help="continue from the checkpoint in --out")
    p.add_argument("--blind", action="store_true", help="no pictures: what do words alone give?")
    p.add_argument("--compile", action="store_true", help="torch.compile the model")
    p.add_argument("--precision", choices=["bf16", "fp32"], default="bf16" if bf16 else "fp32",
        help="of matrix products; softmax, losses and gates stay in fp32")


def parse_settings(parser, argv, defaults_of, task, subparser=None):
    """(settings, checkpoint) of a command line; checkpoint is None without --resume.

    defaults_of(args) -> dict: the defaults, which depend on --data. With --resume the run's FIXED
    settings replace them; a flag that contradicts one raises BadInput. A first parse, without
    --help, finds what the defaults depend on, so that --help shows those that apply.
    """
    plain = [word for word in argv if word not in ("-h", "--help")]
    owner, checkpoint, saved = subparser or parser, None, {}
    owner.set_defaults(**defaults_of(parser.parse_args(plain)))
    known = parser.parse_args(plain)
    if known.resume:
        checkpoint = load_checkpoint(known.out / "checkpoint.pt", task)
        saved = checkpoint["settings"]
        owner.set_defaults(**saved)
    args = parser.parse_args(argv)
    for key, value in saved.items():
        if getattr(args, key) != value:
            name = key.replace("_", "-")
            raise BadInput(f"--{name} {getattr(args, key)}: the run that is resumed has {value}; "
                "leave the flag out, or start a new run with another --out")
    return args, checkpoint


# --- 2. Pretraining -------------------------------------------------------------------------------
#
# The whole run, and the task that `fit` trains in it. The model predicts masked words, the classes
# of masked regions, and whether a caption belongs to its image. Often only the picture shows which
# word is masked: that teaches the switches to look there.


def pretrain(args, checkpoint=None):
    """A pretraining run from start to end. Returns its scores, or None if it was stopped.

    args, checkpoint: as parse_args returns them. Scores: held-out losses (mlm, mrc, itm) and shares
    from 0 to 1 (words, match, image R@1 ...).
    """
    started = time.time()
    say(f"training on {args.data or 'the toy world (no data/ here)'}")

    # 1. Regions, captions and words: made for the toy world, or read from the folder.
    data = load_data(args.data, args.limit)

    # 2. The task: its examples, model, losses and evaluation. Then training.
    task = Pretraining(args, data, checkpoint)
    scores = fit(args, task, checkpoint)
    if scores is None:
        return None

    # 3. What has it learned? Retrieval without training for it, on held-out images.
    if not args.blind:
        scores |= zero_shot(task)
        say(f"zero-shot among {scores['images']}: " + ", ".join(
            f"{k} {v:.2f}" for k, v in scores.items() if "R@" in k))
    say(f"{args.out}: " + ", ".join(name for name in RECORD if (args.out / name).exists()))
    say(f"done in {time.time() - started:.0f} s")
    return scores


class Pretraining:
    """Masked words, masked regions and matching, on captions: a task for `fit`. [supp. 1]

    data: a Data. checkpoint: the run to resume, or None for a new model, which starts from BERT if
    --bert or the data folder has one. Raises BadInput if data and checkpoint do not fit together.
    """

    name, unit, loss_names = "pretraining", "pairs", ("mlm", "mrc", "itm")
    clip, weight_decay, initial_temperature = 5.0, 0.01, 5.0  # A7, supp. 2
    gate_rate, evaluates_at_start = 0.1, False  # A10
    labels = None
    collate = staticmethod(collate)

    def __init__(self, args, data, checkpoint=None):
        self.store, self.tokenizer = data.store, data.tokenizer
        pairs = functools.partial(
            PretrainingDataset, data.store, tokenizer=data.tokenizer, blind=args.blind)
        self.examples = pairs(captions=data.captions, seed=args.seed)
        # Words and regions are evaluated on masked pairs, matching on unmasked ones.
        held_out = functools.partial(pairs, captions=data.held_out_captions, seed=args.seed + 1,
            name="held-out captions")
        self.masked, self.whole = held_out(), held_out(masking=False)
        for why, count in self.examples.skipped.items():
            if count:
                say(f"left out: {count} captions {why}")
        if not data.store.num_region_classes:
            say(f"{data.store.folder} has no class distributions: training without MRC")
        if checkpoint:
            check_fits(checkpoint, data.store, data.tokenizer, ("num_region_classes",))
            config = SwitchBertConfig(**checkpoint["config"])
        else:
            with reading(f"--switches {args.switches}", "a setting of the switches"):
                config = model_config(args.model, data.store, data.tokenizer, args.switches)
        torch.manual_seed(args.seed)
        self.model = SwitchBertForPretraining(config)
        bert = args.bert or (args.data and args.data / "bert")
        if bert and not checkpoint and (args.bert or bert.is_dir()):
            with reading(bert, "a Hugging Face BERT of this model's size"):
                missing, unused = load_bert(self.model, bert)  # A6
            say(f"started from {bert}; new in this model: {len(missing)} parameters; not used of "
                f"BERT: {', '.join(unused) or 'nothing'}")

    @staticmethod
    def counts(batch):
        """(3,): predicted words, predicted regions, pairs."""
        places = ("mlm_labels", "mrc_positions", "itm_labels")
        return torch.tensor([float(len(batch[name])) for name in places])

    @staticmethod
    def sums(model, batch, tau):
        """(3,): the three losses, summed; and the encoder's output."""
        out = model(**batch, temperature=tau)
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


def model_config(size, store, tokenizer, switches):
    """The configuration of a run: the paper's, or the toy run's, under a million parameters."""
    # initializer_range: BERT's .02 is for 768 inputs; for 128, .02 sqrt(768 / 128) = .05. With .02
    # matching was learned only after 450 steps, with .05 after 225.
    small = dict(hidden_size=128, num_hidden_layers=4, num_attention_heads=4, pooler_size=128,
        intermediate_size=256, max_position_embeddings=40, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, initializer_range=0.05)
    return SwitchBertConfig(vocab_size=len(tokenizer), switches=switches,
        region_feature_size=store.feature_size, num_region_classes=store.num_region_classes,
        **(small if size == "small" else {}))


# --- 3. The loop ----------------------------------------------------------------------------------
#
# `fit` does all training in this project. A task is a plain object:
#
#     name, unit, loss_names             its names in what is printed and recorded
#     examples, model, collate           a data set, a module, what makes a batch of examples;
#                                        examples.lengths (N,): their lengths, to sort by
#     counts(batch) -> (losses,)         the numbers of terms whose means the losses are
#     sums(model, batch, tau)            -> (losses,), the sums of the losses; the encoder's output
#     evaluate(model) -> scores, switches, two dicts; headline(scores) -> what is printed of them
#     clip, weight_decay, initial_temperature, gate_rate, evaluates_at_start
#     store, tokenizer, labels           for the checkpoint


def fit(args, task, checkpoint=None):
    """Train a task. Returns the scores of its last evaluation, or None if it was asked to stop.

    args: settings, as parse_settings returns them. checkpoint: the run to continue, or None. Raises
    BadInput if a batch cannot be made or split (number_of_steps), or if training diverges.
    """
    # 1. The model, AdamW, and the state of an earlier run.
    model = task.model.to(device())
    optimizer = make_optimizer(model, args.lr, task.weight_decay, task.gate_rate)
    first, interval = 0, torch.zeros(len(task.loss_names) + 1)  # sums of losses, and their number
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        first, interval = checkpoint["step"], checkpoint["interval"]

    # 2. Every process loads its share of each batch. DistributedDataParallel averages gradients.
    steps, started = number_of_steps(args, len(task.examples)), time.time()
    begin_record(args, task, first, steps)
    loader = load_parts(args, task, first, steps)
    if args.compile:
        compile_layers(model)
    trained = DistributedDataParallel(
        model, broadcast_buffers=False) if WORLD_SIZE > 1 else model
    rate = temperature_rate(args, steps, task.initial_temperature)
    if task.evaluates_at_start or first == steps:
        scores, switches = task.evaluate(model)
        if first == 0:
            record(args, step=0, scores=scores, switches=switches)
    timed_from, timed_since = first, time.time()

    with stop_signals() as stop_asked:
        for step in progress(range(first, steps), "training", initial=first, total=steps):
            # 3. Learning rate and temperature depend only on the step.
            done, lr = step + 1, learning_rate(step, steps, args.lr)
            for group in optimizer.param_groups:
                group["lr"] = group["scale"] * lr
            tau = temperature(step * args.batch, task.initial_temperature, rate=rate)

            # 4. Forward and backward: this process's sums over the counts of all processes.
            optimizer.zero_grad(set_to_none=True)
            batches = [next(loader) for _ in range(args.accum)]
            losses, mixture = forward_backward(args, task, trained, batches, step, tau)

            # 5. Clip the gradient; update the weights.
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), task.clip)
            check_finite(done, dict(zip(task.loss_names, losses), gradient=norm))
            optimizer.step()
            interval += torch.cat([losses, torch.ones(1)])
            if done % math.ceil(steps / 30) == 0:
                record(args, step=done, temperature=tau, mixture=mixture.shares())

            # 6. Every eval_every steps: evaluate, print a line, record it, draw the switches, save.
            if done % args.eval_every == 0 or done == steps:
                speed = (done - timed_from) * args.batch / (time.time() - timed_since)
                scores, switches = task.evaluate(model)
                means = dict(zip(task.loss_names, (interval[:-1] / interval[-1]).tolist()))
                # No loss here starts above 100: a thousand means that the weights have diverged.
                check_finite(done, {**means, **scores}, bound=1e3)
                report(args, task, steps, step=done, lr=lr, temperature=tau, per_second=speed,
                    losses=means, scores=scores, switches=switches, seconds=time.time() - started)
                interval.zero_()
                save_checkpoint(args, task, model, optimizer, done, interval)
                timed_from, timed_since = done, time.time()  # evaluation is not timed

            # 7. Was any process asked to stop? Then all stop, and --resume continues here.
            if done < steps and total(torch.tensor(float(stop_asked()))) > 0:
                save_checkpoint(args, task, model, optimizer, done, interval)
                say(f"stopped after step {done}; --resume continues from here")
                return None
    if RANK == 0:
        write_gif(args.out)
    return scores


# --- 4. Optimisation ------------------------------------------------------------------------------
#
# The pieces of a step. All random draws depend on (seed, epoch, step, part) only, so that a step is
# the same in any number of processes and after any number of restarts.


def learning_rate(step, total, peak):
    """Learning rate of a step, counted from 0: linear warm-up over 10 %, then linear decay to 0.

    >>> [round(learning_rate(step, 1000, 1.0), 2) for step in (0, 49, 99, 550, 775, 1000)]
    [0.01, 0.5, 1.0, 0.5, 0.25, 0.0]
    """
    rise = max(1, round(0.1 * total))
    return peak * min((step + 1) / rise, (total - step) / max(1, total - rise))


def temperature_rate(args, steps, initial, final=0.2):
    """The temperature's decay rate r per example (A5): tau = max(0.2, initial exp(-r examples)).

    With --anneal a, tau reaches `final` at share a of the run: r = log(initial / final) / (a n),
    n = steps x batch. Without it, the paper's 1e-6: from 5 to 0.2 in 3.2 million examples.
    """
    if args.anneal is None:
        return 1e-6
    return math.log(initial / final) / (args.anneal * max(1, steps) * args.batch)


def make_optimizer(model, lr, weight_decay=0.01, gate_rate=0.1):
    """AdamW with the paper's settings [supp. 2]; no decay on biases and LayerNorms (A7).

    Each group has `scale`, a factor on the learning rate: .1 for gates in pretraining (A10). A gate
    that moves fast settles on the mode that is best for a still untrained model.
    """
    groups = {}  # (weight decay, scale) -> parameters
    for name, parameter in model.named_parameters():
        decay = weight_decay if parameter.ndim > 1 else 0.0
        scale = gate_rate if "gate." in name else 1.0
        groups.setdefault((decay, scale), []).append(parameter)
    groups = [dict(params=p, weight_decay=d, scale=s) for (d, s), p in groups.items()]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.999), eps=1e-6, fused=True)


def number_of_steps(args, num_examples):
    """Steps of a run; BadInput if examples are too few for a batch, or it has no equal parts."""
    if args.epochs and num_examples < args.batch:
        raise BadInput(f"--batch {args.batch}: there are only {num_examples} training examples")
    if args.batch % (WORLD_SIZE * args.accum):
        raise BadInput(f"--batch {args.batch} cannot be cut into {WORLD_SIZE} processes x "
            f"--accum {args.accum} equal parts")
    return args.epochs * (num_examples // args.batch)


@functools.lru_cache(1)  # called in every step
def epoch_batches(seed, epoch, size, examples, window=100):
    """(batches, size) indices: the examples of an epoch, batches of similar length.

    A batch is padded to its longest text. Captions have 12 word pieces on average and up to 38: in
    random batches most of the text would be padding. So the epoch's permutation is cut into windows
    of `window` batches, each window is sorted by length and cut into batches, and the batches are
    shuffled. All of it depends on (seed, epoch) only, and so is the same in every process and after
    every restart.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(examples))
    order = order[: len(order) // size * size]  # the rest is skipped in this epoch
    for start in range(0, len(order), window * size):
        part = order[start : start + window * size]
        part[:] = part[np.argsort(examples.lengths[part], kind="stable")]
    return rng.permutation(order.reshape(-1, size))  # shuffles batches, not within them


def load_parts(args, task, first, steps):
    """An iterator over this process's batches, `accum` per step, from step `first` on.

    The batch of a step is cut into world_size x accum equal parts; process r takes parts r accum to
    (r + 1) accum - 1, so the batch is the same for any number of processes. With --workers, other
    processes prepare them in advance. They hold no state that a resumed run would have to restore:
    all they need is a key, (epoch, index).
    """
    def keys():
        """Lists of (epoch, index), one per part, in the order in which this process needs them."""
        for step in range(first, steps):
            epoch, k = divmod(step, len(task.examples) // args.batch)
            batch = epoch_batches(args.seed, epoch, args.batch, task.examples)[k]
            for part in batch.reshape(WORLD_SIZE, args.accum, -1)[RANK]:
                yield [(epoch, int(i)) for i in part]

    return iter(DataLoader(task.examples, batch_sampler=keys(), collate_fn=task.collate,
        num_workers=args.workers, pin_memory=device().type == "cuda"))


def to_device(batch):
    """The dict with its tensors on this process's device; all else is unchanged."""
    where = device()
    return {k: v.to(where, non_blocking=True) if torch.is_tensor(v) else v
        for k, v in batch.items()}


def forward_backward(args, task, model, batches, step, tau):
    """Accumulate gradients; returns mean losses (losses,) and switch mixtures (SwitchShares).

    A mean is over all that is predicted in the *whole* batch. Processes and parts hold different
    numbers of masked places, so a mean of their means would weight places unequally, and depend on
    the number of processes: their sums are divided by the common count instead.
    """
    counts = total(sum(task.counts(batch) for batch in batches)).clamp(min=1)  # (losses,)
    sums, mixture = torch.zeros(len(counts), device=device()), SwitchShares(task.model.config)
    for number, batch in enumerate(batches, RANK * args.accum):
        # The noise of dropout and switches depends on the part, not on its process.
        seed = np.random.default_rng([args.seed, step, number]).integers(2**63)
        torch.manual_seed(int(seed))
        # Processes exchange gradients once per step, after their last part.
        wait = WORLD_SIZE > 1 and batch is not batches[-1]
        with (model.no_sync() if wait else contextlib.nullcontext(), torch.autocast(
                device().type, torch.bfloat16, enabled=args.precision == "bf16")):
            part, out = task.sums(model, to_device(batch), tau)
            # DistributedDataParallel averages gradients over processes; we need their sum.
            (WORLD_SIZE * (part / counts.to(part)).sum()).backward()
        sums += part.detach()
        mixture.add(out)
    return total(sums) / counts, mixture


def compile_layers(model):
    """Compile a model in place, layer by layer, and return it.

    The code of one layer serves all twelve and compiles in a minute; the whole model takes several.
    """
    for layer in model.bert.layers:
        layer.block = torch.compile(layer.block, dynamic=True)
    return model


def check_finite(step, numbers, bound=math.inf):
    """Raise BadInput unless each of {name: number} is below the bound in absolute value."""
    if not all(abs(number) < bound for number in numbers.values()):  # NaN is never below
        found = ", ".join(f"{name} {number:.4g}" for name, number in numbers.items())
        raise BadInput(f"step {step}: diverged ({found}); the last good checkpoint is kept; "
            "lower --lr, or check the data")


# --- 5. Evaluation --------------------------------------------------------------------------------
#
# Switches are hard unless a temperature is given: this measures the model that will be used,
# without noise. Processes share the work in whole batches, so the padding of a batch, and with it
# the rounding, is the same for any number of processes. Batches hold examples of similar length.


def share_of(lengths, batch_size=200):
    """The batches that this process evaluates: arrays of indices, by similar length."""
    order = np.argsort(lengths, kind="stable")
    starts = range(RANK * batch_size, len(order), WORLD_SIZE * batch_size)
    return [order[start : start + batch_size] for start in starts]


class SwitchShares:
    """What the switches chose, as shares of all samples: add outputs, then call shares()."""

    def __init__(self, config):
        layers = range(config.num_hidden_layers)
        modes, depths = torch.zeros(len(layers), 2, 3), [torch.zeros(2, l + 1) for l in layers]
        self.sums = [part.to(device()) for part in (modes, *depths)]

    def add(self, out):
        """out: a SwitchBertOutput: mixtures at a temperature, one-hot choices without one."""
        for kept, new in zip(self.sums, (out.modes, *out.depths)):
            kept += new.detach().sum(dim=0)

    def shares(self):
        """{"modes": (layers, 2, 3), "depths": for each layer (2, l+1)}, as lists. Text is first.

        Every process must call it: it sums over all of them.
        """
        sums = [total(part) for part in self.sums]  # a switch's options sum to the samples' number
        modes, *depths = [(part / part.sum(dim=-1, keepdim=True)).tolist() for part in sums]
        return {"modes": modes, "depths": depths}


@torch.no_grad()
def evaluate(model, dataset, batch_size=200):
    """Losses and accuracies on a PretrainingDataset, and what the switches chose: two dicts.

    A loss is a mean over predicted words, predicted regions, or pairs; words and match are the
    shares of words and of pairs predicted correctly. The model is left in training mode.
    """
    model.eval()
    found, switches = torch.zeros(8, device=device()), SwitchShares(model.config)
    for part in share_of(dataset.lengths, batch_size):
        out = model(**to_device(collate([dataset[i] for i in part])))
        # Eight numbers: three sums of losses, two counts of hits, and the three counts of places.
        found += torch.cat([out.sums, out.correct, found.new_tensor(out.counts)])
        switches.add(out.encoder)
    model.train()
    sums, counts = total(found).split([5, 3])
    # mlm and words are means over predicted words, mrc over regions, itm and match over pairs.
    means = sums / counts[[0, 1, 2, 0, 2]].clamp(min=1)
    return dict(zip(("mlm", "mrc", "itm", "words", "match"), means.tolist())), switches.shares()


def zero_shot(task, most=100):
    """Recalls with the pretrained matching head: one caption for each of `most` held-out images."""
    # Reversed, so that a dict keeps the first caption of each image.
    first = dict(reversed(task.whole.captions))
    ids, model = sorted(first)[:most], task.model
    ranker = SwitchBertForRetrieval.from_pretraining(model.config, model.state_dict()).to(device())
    texts = [first[image_id] for image_id in ids]
    scores = match_scores(ranker, task.store, task.tokenizer, texts, ids)
    return {"images": len(ids), **recall_at(scores, torch.arange(len(ids)))}


@torch.no_grad()
def match_scores(model, store, tokenizer, texts, image_ids, max_tokens=38, temperature=None):
    """(texts, images): how well text i and image j match, by a SwitchBertForRetrieval.

    Every pair goes through the model, by blocks of 100 images; a batch is some texts of similar
    length with all images of a block, up to 200 pairs. Images are padded and sent to the device
    once. The processes share the texts. temperature: as in the model, None for hard switches.
    """
    model.eval()
    no_words, no_regions = dict(input_ids=np.zeros(0, int)), region_inputs(store, None)
    words = [no_regions | dict(input_ids=np.array(tokenizer.encode(text, max_tokens)))
        for text in texts]
    columns = []
    for start in progress(range(0, len(image_ids), 100), "scoring"):
        images = [region_inputs(store, store.row(image_id)) | no_words
            for image_id in image_ids[start : start + 100]]
        n, regions = len(images), to_device(model_inputs(images))
        scores = torch.zeros(len(texts), n, device=device())
        for part in share_of([len(text["input_ids"]) for text in words], max(1, 200 // n)):
            inputs = to_device(model_inputs([words[i] for i in part]))
            for name in ("input_ids", "text_mask"):
                inputs[name] = inputs[name].repeat_interleave(n, dim=0)  # (k n, T)
            for name in ("region_features", "region_boxes", "region_mask"):
                inputs[name] = torch.cat([regions[name]] * len(part))  # (k n, R, ...)
            found, _ = model(**inputs, temperature=temperature)
            scores[part] = found.view(len(part), n)
        columns.append(total(scores))
    return torch.cat(columns, dim=1)


def recall_at(scores, image_of_text, ks=(1, 5)):
    """Share of queries whose right answer is among the k best: {'image R@1': .., 'text R@1': ..}.

    scores (texts, images); image_of_text (texts,): the index of each text's image; an image may
    have several texts. "image" finds the image of a text, "text" any text of an image. Ties count
    against the model: one that scores all pairs alike has recall 0, not 1.
    """
    wrong = image_of_text[:, None] != torch.arange(scores.shape[1])  # (texts, images)
    right, recalls = scores.masked_fill(wrong, -math.inf), {}
    for name, candidates in (("image", 1), ("text", 0)):  # the dimension that is searched
        best = right.amax(dim=candidates, keepdim=True)
        rank = ((scores >= best) & wrong).sum(dim=candidates)  # 0 is best
        for k in ks:
            recalls[f"{name} R@{k}"] = (rank < k).float().mean().item()
    return recalls


# --- 6. Data of a run -----------------------------------------------------------------------------
#
# Where pairs, regions and words come from. Captions are held out by image: were a held-out image in
# a training pair too, the model could recognise its picture.

NUM_HELD_OUT = 400  # scenes for the losses and accuracies; the first 100 of them for retrieval


@dataclass
class Data:
    """What a run trains on: regions, pairs as (image id, text), and the words."""

    store: FeatureStore
    captions: Captions
    held_out_captions: Captions
    tokenizer: WordPiece


def load_data(folder, limit=None):
    """The Data of a folder, or of the toy world if it is None; at most `limit` training captions.

    A folder holds features/ (a store), captions (*.tsv, *.json, or folders written by img2dataset,
    any number), and a vocabulary, vocab.txt or bert/vocab.txt. Without either, one is built from
    the captions: the same captions give the same words, so a run can be resumed.
    """
    if folder is None:
        with first_process_first():
            data = toy_world()
    else:
        store, (training, held_out) = FeatureStore(folder / "features"), split_captions(folder)
        files = [p for p in (folder / "vocab.txt", folder / "bert" / "vocab.txt") if p.exists()]
        words = files[0] if files else build_vocab(text for _, text in training)
        data = Data(store, training, held_out, WordPiece(words))
    data.captions = data.captions[:limit]
    return data


def split_captions(folder):
    """(training, held-out) captions of all files in a folder.

    Held out are the `val` captions of files with splits; without any, those of 1 % of the images
    (at least 5): the ones with the smallest crc32 of their ids, independent of the files and their
    order. At most 1,000 captions.
    """
    files = sorted(p for p in folder.iterdir() if p.suffix in (".tsv", ".json") or (
        p.is_dir() and p.name not in ("features", "bert") and any(p.rglob("*.txt"))))
    if not files:
        raise BadInput(f"{folder}: found no captions; expected *.tsv, *.json or a folder of "
            "pictures with *.txt, beside features/")
    training, held_out = (Captions(pair for path in files for pair in read_captions(path, split))
        for split in ("train", "val"))
    if not len(held_out):
        codes = np.fromiter(map(zlib.crc32, training.ids), np.uint32)
        images = np.unique(codes)
        chosen = np.isin(codes, images[: max(5, len(images) // 100)])
        training, held_out = training[~chosen], training[chosen]
    return training, held_out[:1000]


def toy_world(folder=Path("runs/world"), num_scenes=3600):
    """Data of the toy world; trains the detector and fills the feature store if they are missing.

    A scene's id is its number, which is also its seed; held-out scenes have other numbers than all
    scenes that the detector or the model is trained on.
    """
    training = range(TRAIN_SCENES, TRAIN_SCENES + num_scenes)
    held_out = range(HELD_OUT_SCENES, HELD_OUT_SCENES + NUM_HELD_OUT)
    features = folder / f"features-{num_scenes}"
    if not FeatureStore.is_complete(features):
        from extract_features import extract_scenes, toy_detector  # a store needs no torchvision

        detector = toy_detector(folder / "detector.pt", training)
        extract_scenes(detector, [*training, *held_out], features)
    # Finetuning uses these words too: so the vocabulary also covers questions and expressions.
    texts = []
    for scene in map(Scene, training[:1000]):
        texts += scene.captions()
        texts += [f"{question} {answer}" for question, answer, _ in scene.questions()]
        texts += [expression for expression, _, _ in scene.expressions()]

    def captions(numbers, count):
        return Captions((n, text) for n in numbers for text in Scene(n).captions(count))

    return Data(FeatureStore(features), captions(training, 4), captions(held_out, 2),
        WordPiece(build_vocab(texts)))


# --- 7. Processes ---------------------------------------------------------------------------------
#
# One process per GPU, all running the same code on their own parts of each batch. torchrun
# starts them, for --gpus as well, and sets RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and
# MASTER_PORT. Skip this section on a first reading.


def launch(args, work):
    """The result of work(), run in this process, or in --gpus processes, which exit in here."""
    if args.gpus > 1 and WORLD_SIZE == 1:
        return start_processes(args.gpus)
    if args.threads:
        torch.set_num_threads(args.threads)
    if WORLD_SIZE > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    with only_run_in(args.out) if RANK == 0 else contextlib.nullcontext():
        result = work()
    if WORLD_SIZE > 1:
        dist.destroy_process_group()
        # Gloo's threads live on; if one still runs while the interpreter shuts down, the process
        # aborts although all is done. So it exits here, after the usual cleanup.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(0)
    return result


def device():
    """Where this process computes: its own GPU (launch has chosen it), Apple's, or the CPU."""
    if torch.accelerator.is_available():
        return torch.accelerator.current_accelerator()
    return torch.device("cpu")


def total(tensor):
    """The sum of a tensor over all processes, on the CPU. It blocks until all have called it."""
    if dist.is_initialized():
        tensor = tensor.to(device())  # NCCL cannot reduce CPU tensors
        dist.all_reduce(tensor)
    return tensor.cpu()


def say(text):
    """Print from the first process only, and flush."""
    if RANK == 0:
        print(text, flush=True)


@contextlib.contextmanager
def first_process_first():
    """The first process runs the block, and writes its files; the others run it afterwards."""
    if RANK > 0:
        dist.barrier()
    yield
    if RANK == 0 and WORLD_SIZE > 1:
        dist.barrier()


@contextlib.contextmanager
def stop_signals():
    """In this block SIGTERM and Ctrl-C only ask to stop.

    Yields a function: was it asked? No step is interrupted, so that the saved state is that of an
    undisturbed run. If the process that started this one ends (a killed launcher), that asks too.
    """
    signalled, parent = [], os.getppid()
    before = {number: signal.signal(number, lambda *_: signalled.append(True))
        for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(signalled) or os.getppid() != parent
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- 8. The record --------------------------------------------------------------------------------
#
# metrics.jsonl has one JSON object per line, of two kinds. At most thirty per run hold the mixture
# of the switches in training at that step: the frames of switches.gif. One per evaluation holds
# losses, held-out scores, and what the switches chose: switches.png draws the last one.
#
#     {"step": 30, "temperature": 4.46, "mixture": {"modes": ..., "depths": ...}}
#     {"step": 450, "examples": 28800, "lr": 5.6e-4, "temperature": 0.84, "per_second": 872,
#         "losses": {"mlm": 0.72, ...}, "scores": {"words": 0.726, ...},
#         "switches": {"modes": ..., "depths": ...}, "seconds": 71}      as in SwitchShares.shares

RECORD = ("checkpoint.pt", "metrics.jsonl", "config.json", "switches.png", "switches.gif")
CHECKPOINT_FORMAT = "switchbert-4"


def save_checkpoint(args, task, model, optimizer, step, interval):
    """All that a resumed run, finetuning or a reader needs; torch.load(weights_only=True) reads it.

    model, optimizer, step and interval (losses since the last evaluation) are the run's state,
    settings (the FIXED ones) define how it continues, config, vocab and store what the model fits.
    No state of a random generator is needed: every step seeds its own.
    """
    if RANK == 0:
        content = {"format": CHECKPOINT_FORMAT, "task": task.name, "step": step,
            "settings": {k: v for k, v in vars(args).items() if k in FIXED},
            "config": asdict(model.config), "vocab": task.tokenizer.pieces,
            "store": task.store.meta, "model": model.state_dict(), "interval": interval,
            "optimizer": optimizer.state_dict(), "labels": task.labels}
        write_whole(args.out / "checkpoint.pt", lambda file: torch.save(content, file), mode="wb")


def load_checkpoint(path, *tasks):
    """A checkpoint of one of these tasks: a dict of plain values and tensors. Raises BadInput.

    torch does not verify the checksums of its file, so a flipped bit would load as another number;
    zipfile does. weights_only refuses any code that a pickle could run.
    """
    with reading(path, f"a whole checkpoint of {' or '.join(tasks)}"):
        with zipfile.ZipFile(path) as file:
            if broken := file.testzip():
                raise ValueError(f"{broken} is damaged")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if checkpoint["format"] != CHECKPOINT_FORMAT:
            raise ValueError(f"its format is {checkpoint['format']}, expected {CHECKPOINT_FORMAT}")
        if checkpoint["task"] not in tasks:
            raise ValueError(f"it is a checkpoint of {checkpoint['task']}")
    return checkpoint


def check_fits(checkpoint, store, tokenizer=None, more=()):
    """Raise BadInput if a checkpoint was trained on other regions or words than these.

    Another detector's features have another meaning, even at the same size. more: further entries
    of store.json that must be equal.
    """
    for key in ("feature_size", "detector", *more):
        ours, theirs = store.meta[key], checkpoint["store"][key]
        if ours != theirs:
            raise BadInput(f"{store.folder}: its {key} is {ours!r}, but the checkpoint was trained "
                f"with {theirs!r}; use the store that it was trained on, or start over")
    if tokenizer and tokenizer.pieces != checkpoint["vocab"]:
        raise BadInput("the vocabulary is not the checkpoint's; use the vocabulary or the captions "
            "that it was trained with")


def begin_record(args, task, first, steps):
    """Make a run's folder and print its opening line, in the first process only.

    A folder with another run's checkpoint is renamed, to the first free name. On resume, the lines
    of metrics.jsonl after step `first` are dropped: the run writes them again.
    """
    if RANK > 0:
        return
    out, kept = args.out, []
    if first > 0:
        kept = [line for line in read_metrics(out) if line["step"] <= first]
    elif (out / "checkpoint.pt").exists():
        n = 1
        while Path(f"{out}-{n}").exists():
            n += 1
        out.rename(f"{out}-{n}")
        say(f"the run that was in {out} is now in {out}-{n}")
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "metrics.jsonl",
        lambda file: file.writelines(json.dumps(line) + "\n" for line in kept))
    write_json(out / "config.json", {"settings": vars(args), "model": asdict(task.model.config),
        "data": task.store.folder, "examples": len(task.examples), "torch": torch.__version__})
    parameters = sum(p.numel() for p in task.model.parameters())
    say(f"{task.name}{' without pictures' * args.blind}: {len(task.examples)} {task.unit}, "
        f"{parameters:,} parameters, {steps} steps of {args.batch}, {args.precision}, on "
        f"{device().type}; processes: {WORLD_SIZE}, threads: {torch.get_num_threads()}"
        + f"; resuming after step {first}" * (first > 0))


def record(args, **line):
    """Add an object to metrics.jsonl."""
    if RANK == 0:
        with open(args.out / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def report(args, task, steps, **line):
    """Print an evaluation (without losses of 0, such as MRC in a blind run), record and draw it."""
    record(args, examples=line["step"] * args.batch, **line)
    losses = " ".join(f"{name} {loss:.2f}" for name, loss in line.pop("losses").items() if loss)
    say("step {step:5d}/{steps}  lr {lr:.1e}  tau {temperature:.2f}  {losses} | {headline} | "
        "{per_second:.0f} {unit}/s, {seconds:.0f} s".format(**line, steps=steps, losses=losses,
            headline=task.headline(line["scores"]), unit=task.unit))
    if RANK == 0:
        save_png(args.out / "switches.png", draw_switches([args.out]))


def read_metrics(folder):
    """The objects of a run's metrics.jsonl, in its order. Raises BadInput near a damaged line.

    A last line without a newline was cut off by a kill: it is left out; a resumed run rewrites it.
    """
    path = folder / "metrics.jsonl"
    with reading(path, "the metrics.jsonl of a run", "line") as at:
        whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
        return [json.loads(line) for at.entry, line in enumerate(whole.splitlines(), 1)]


def draw_switches(folders):
    """A picture of what every layer chose at the end of these runs, one below the other.

    A finetuned run shows its start too: what did the task change? Raises BadInput without data.
    """
    pictures = []
    for folder in folders:
        lines = [line for line in read_metrics(folder) if "switches" in line]
        if not lines:
            raise BadInput(f"{folder}: nothing to draw yet; this run has made no evaluation")
        for line in lines:
            if line["step"] == 0 or line is lines[-1]:
                title = f"{folder}: what every layer chose after {line['step']} steps"
                pictures.append(switches_picture(line["switches"], title))
    return stack(pictures)


def write_gif(folder):
    """switches.gif: how a run's switches closed as the temperature fell, in under 300 KB."""
    frames = []
    for line in read_metrics(folder):
        if "mixture" in line:
            title = f"{folder}: step {line['step']}, temperature {line['temperature']:.2f}"
            frames.append(switches_picture(line["mixture"], title))
            frames[-1].thumbnail((800, 800))
    if frames:
        # One palette, no dithering: pixels that do not change between frames compress to nothing.
        palette = frames[-1].quantize(16)
        frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
        durations = [150] * (len(frames) - 1) + [3000]  # milliseconds
        write_whole(folder / "switches.gif", lambda file: frames[0].save(file, "GIF", save_all=True,
            append_images=frames[1:], duration=durations, loop=0), mode="wb")


def stack(images, columns=1):
    """Some PIL images as one, `columns` per row; the largest width and height set the cells."""
    width, height = max(i.width for i in images), max(i.height for i in images)
    size = width * min(columns, len(images)), height * math.ceil(len(images) / columns)
    whole = Image.new("RGB", size, "white")
    for k, image in enumerate(images):
        whole.paste(image, (k % columns * width, k // columns * height))
    return whole


LEGEND = {"intra: attends to its own modality": (66, 114, 196),
    "inter: to the other one": (237, 125, 49), "joint: to both": (112, 173, 71),
    "squares: how often this depth is read (0: embeddings)": (0, 0, 0)}
CELL, ROW, BAR, LEFT, TOP = 34, 40, 260, 90, 110  # pixels


def switches_picture(switches, title):
    """What every layer chose, as a PIL image: bars for modes, squares for depths.

    switches: {"modes": (layers, 2, 3), "depths": for each layer (2, l+1)}, shares of the samples.
    """
    layers = len(switches["modes"])
    panel = LEFT + BAR + 90 + CELL * layers  # width of one modality's panel
    image = Image.new("RGB", (2 * panel, TOP + layers * ROW + 20), "white")
    draw = ImageDraw.Draw(image)
    draw.font = ImageFont.load_default(13)
    draw.text((20, 12), title, "black")
    for k, (text, colour) in enumerate(LEGEND.items()):
        draw.text((20 + 235 * k, 42), text, colour)
    for modality, name in enumerate(MODALITIES):
        left = modality * panel + LEFT
        squares = left + BAR + 40
        draw.text((left, TOP - 25), f"{name}: attention", "black")
        draw.text((squares, TOP - 25), "reads depth", "black")
        for layer in range(layers):
            x, y = left, TOP + layer * ROW
            draw.text((x - 70, y + 9), f"layer {layer + 1}", "black")
            for share, colour in zip(switches["modes"][layer][modality], LEGEND.values()):
                draw_share(draw, x, y, share * BAR, share, colour)
                x += share * BAR
            for depth, share in enumerate(switches["depths"][layer][modality]):
                shade = int(255 * (1 - share))  # black: all samples read this depth
                draw_share(draw, squares + depth * CELL, y, CELL - 3, share, (shade,) * 3)
    return image


def draw_share(draw, x, y, width, share, colour):
    """A box `width` pixels wide, with its share in percent if that is above 5."""
    draw.rectangle([x, y, x + width, y + CELL - 2], colour, "grey")
    if share > 0.05:
        ink = "white" if sum(colour) < 450 else "black"
        draw.text((x + width / 2, y + CELL / 2), f"{100 * share:.0f}", ink, anchor="mm")


def show(argv):
    """python train.py show RUN [RUN ...]: draw the switches of some runs again."""
    p = argparse.ArgumentParser("train.py show", description="Draw what the switches chose.")
    p.add_argument("runs", nargs="+", type=Path, help="folders of runs; each gets a switches.gif")
    p.add_argument("-o", "--out", type=Path, help="picture of all runs, one below the other; "
        "default: switches.png in the first folder")
    args = p.parse_args(argv)
    out = args.out or args.runs[0] / "switches.png"
    save_png(out, draw_switches(args.runs))
    for folder in args.runs:
        write_gif(folder)
    print(out)


def main(argv=None):
    """Pretrain, or show; argv: the command line without the script's name."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["show"]:
        return show(argv[1:])
    args, checkpoint = parse_args(argv)
    return launch(args, lambda: pretrain(args, checkpoint))


if __name__ == "__main__":
    run(main)
