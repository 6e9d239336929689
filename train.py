r"""train.py: pretraining, from pixels or from a feature store to a checkpoint
==========================================================================

Where this stands

    toy world --extract_features.py--> feature store --data.py--> batches (see its opening)
                                                                     |
      learning rate, temperature: functions of the step              v
          |                                          SwitchBertForPretraining (switchbert.py)
          v                                                          |
    +--------------------------- fit -----------------------+        |
    |  summed losses, divided by counts of all processes <--|--------+
    |  backward, clip, AdamW                                |
    |  now and then: evaluate, record, save a checkpoint    |
    +-------------------------------------------------------+
          |
    runs/pretrain/  checkpoint.pt  metrics.jsonl  curves.png  switches.png  result.json ...
          |
          +--> finetune.py, whose tasks are trained by the same `fit`

Letters: T word pieces, M options of a switch, l a layer's number from 0. A tensor of shape
(losses,) has one number for each loss of the task, (3,) in pretraining.

Map of the file (* = read these first)

    1. Settings         what defines a run: those of the toy world, and those of the paper
    2. Pretraining    * what happens, in order, and the task that is trained
    3. The loop       * fit, and the forward and backward passes of its steps
    4. Optimisation   * learning rate, AdamW, temperature, the batches of an epoch
    5. Evaluation       losses, accuracies, what the switches chose, zero-shot retrieval
    6. Data of a run    the toy world, or a folder of captions and features
    7. Machine room     flags, processes, the record of a run, checkpoints, pictures

    python train.py                     the whole toy run: 2 to 4 minutes on two CPU cores
    python train.py --gpus 4            the same on 4 GPUs
    python train.py --resume            continue a run that was stopped or killed
    python train.py --blind --epochs 1 --out runs/blind      what do words alone give?
    python train.py show RUN RUN ...    compare runs: final scores, curves.png, switches.png
    torchrun --nnodes 2 --nproc-per-node 4 train.py          on two machines

If there is a folder data/, each training uses it, with the paper's settings (FULL in section
1). Without, a run draws scenes, trains a Faster R-CNN on them, extracts their regions and
pretrains. It prints one line per evaluation, here wrapped:

    step   450/900  lr 5.6e-04  tau 0.84  mlm 0.76 mrc 2.34 itm 0.32 | words 0.710  match 0.894
           | 739 pairs/s, 41 s

tau is the temperature; mlm, mrc and itm are the mean training losses since the last line.
`words` is the share of masked word pieces that are predicted right, `match` the accuracy of
image-text matching (chance: .50). Both are measured on held-out pairs with hard switches.

A batch is cut into processes x --accum parts. A process runs its --accum parts one after
another and adds up their gradients. A run is a function of its settings, its data and the
number of parts; no state of a random generator is carried along. Batches, and the masks of
their pairs, depend on (seed, epoch, index) only, so any number of processes trains on the same
ones. The noise of dropout and switches depends on (seed, step, part), so another number of
parts draws other noise. On a CPU, a killed run resumes bit for bit.

Some names of data.py are used everywhere. BadInput is the exception for a fault in the user's
files or flags. `with reading(x, what)` turns any error in its block into BadInput("x: not
<what>"). `say` prints, from the first process only. RANK is this process's number, WORLD_SIZE
how many there are.

Assumptions: A5 (temperature by pairs), A6, A7 (VOLTA's settings), A10 (slow gates). Deviation: D2.
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
from datetime import timedelta
from pathlib import Path

# Before torch: data.py sets a variable that torch reads on import.
from data import (COUNT, HELD_OUT_SCENES, NATURAL, RANK, RATE, SHARE, WORLD_SIZE,
    BadInput, Captions, FeatureStore, PretrainingDataset, Scene, WordPiece,
    build_vocab, caption_records, class_targets, collate, device, flag, load_ahead,
    model_inputs, on_stop, only_run_in, progress, read_json, reading, region_inputs, run,
    save_png, say, start_processes, write_json, write_whole)

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from torch.nn.parallel import DistributedDataParallel

from switchbert import (FINAL_TEMPERATURE, MODALITIES, MODES, PATHS,
    SwitchBertConfig, SwitchBertForPretraining, SwitchBertForRetrieval, load_bert,
    temperature)

# --- 1. Settings --------------------------------------------------------------------------
#
# TOY and FULL hold the settings, which a resumed run keeps. All other flags say where files are,
# what the model starts from, and how it is computed. FULL has the paper's settings [supp. 2] and,
# where the paper is silent, VOLTA's (A7). The toy run is DEVIATION D2.
#
# anneal=0.9: the temperature reaches its floor, 0.2, after 90 % of the run. anneal=None: it falls
# at the paper's rate, 1e-6 per pair (A5). At that rate it needs 3.2 million pairs; a shorter run
# takes 0.9 instead (see anneal_rate). scratch and boxes are used by finetune.py only.

TOY = dict(model="small", epochs=4, batch=64, lr=1e-3, eval_every=225, anneal=0.9,
    switches="learned", set=[], seed=0, limit=None, blind=False, scratch=False,
    boxes="detected")
FULL = TOY | dict(model="base", epochs=10, batch=256, lr=1e-4, eval_every=1000, anneal=None)


def parse_args(argv):
    """(settings, the checkpoint to resume from or None) of a command line."""
    p = argparse.ArgumentParser(
        description="Pretrain Switch-BERT; `train.py show RUN ...` compares runs.")
    add_run_flags(p, "data", "features/ and captions", "runs/pretrain")
    flag(p, "--switches", str, f"one of {', '.join(PATHS)} (the first three learn "
        "switches: both, or one of them; the others freeze them), or any path such as "
        "II,XX,JJ,IJ, text and vision per layer: I own modality, X the other, J both")
    p.add_argument("--model", choices=["base", "small"], help="12 layers x 768, or 4 x 128")
    p.add_argument("--set", nargs="+", metavar="FIELD=VALUE", help="change the model: any "
        "fields of SwitchBertConfig, such as num_hidden_layers=6 hidden_size=256")
    start = p.add_mutually_exclusive_group()
    flag(start, "--bert", Path,
        "Hugging Face BERT folder to start from; None: DATA/bert, if any")
    flag(start, "--init", Path, "pretrained run whose words and weights to start from")
    args, checkpoint = fill_settings(p, argv, TOY, FULL, "pretraining")
    if args.data and not args.bert and not args.init:
        args.bert = next(args.data.glob("bert"), None)  # None if there is no such folder
    return args, checkpoint


# --- 2. Pretraining -----------------------------------------------------------------------
#
# The model predicts masked words, the classes of masked regions, and whether a caption
# belongs to its image. Often only the picture reveals what the masked word is, so the model must
# look there.


def pretrain(args, checkpoint=None):
    """Pretrain from start to end. args: the settings. checkpoint: what to resume from, or None.

    Returns {name: number}, the held-out losses (mlm, mrc, itm), shares from 0 to 1 (words, match,
    image R@1 ...) and the number of images that were ranked; or None if the run was stopped.
    """
    started = time.time()
    say(f"training on {args.data or 'the toy world (no data/ here)'}")

    # 1. The task: its regions, captions and words, its model, losses and evaluation.
    earlier = checkpoint
    if checkpoint:
        args.init = None  # it was used when the run began
    elif args.init:
        earlier = load_checkpoint(args.init, "pretraining")
    words = earlier["vocab"] if earlier else None
    task = Pretraining(args, load_data(args.data, args.bert, words), earlier)
    # 2. Training.
    scores = fit(args, task, checkpoint)
    if scores is None:
        return None
    # 3. What has it learned? Retrieval without training for it, on held-out images.
    if not args.blind:
        scores |= zero_shot(args, task)
        recalls = [f"{name} {v:.2f}" for name, v in scores.items() if "R@" in name]
        say(f"zero-shot among {scores['images']}: {', '.join(recalls)}")
    if RANK == 0:
        # As in finetune.py: the settings and, for each split, the scores with hard switches.
        result = vars(args) | {"results": {"val": {"hard": scores}}}
        write_json(args.out / "result.json", result)
    files = sorted(path.name for path in args.out.glob("[!.]*"))
    say(f"{args.out}: {', '.join(files)}")
    say(f"done in {time.time() - started:.0f} s")
    return scores


class Task:
    """What `fit` trains: pretraining, and the three tasks of finetune.py.

    A subclass defines:
        name, unit               what the task and its examples are called
        examples                 a data set with `lengths` (N,), to sort by, and `captions`
        collate(examples)        a batch of some examples
        model                    a module with a config
        sums(model, batch, tau)  a tensor (losses,): the sums of the terms; and the encoder's output
        evaluate(model)          {name: score}; and what the switches chose
        headline(scores)         what the printed line says of these scores
        store, tokenizer         where regions and words come from; checkpoints record both
        missing                  {reason, or split: number of examples without features or words}
    """

    # {loss: the entry of a batch that has one row for each term of which the loss is the mean}
    loss_terms = {"loss": "targets"}
    labels = None  # the answers that the model chooses from; None where none are fixed
    # The rest are finetuning's settings [supp. 2], A7.
    clip = 1.0  # the largest norm that a gradient may have
    weight_decay = 1e-4
    initial_temperature = 1.0
    # How fast gates learn, as a multiple of the learning rate. Pretraining makes them slow, so that
    # they do not settle while the model is still untrained (A10). In finetuning the model is
    # already trained, and gates learn as fast as the rest. They should decide soon: while a gate is
    # undecided, noise sends samples along paths that evaluation will not take. In long pretraining
    # such samples help; a short finetuning may not have the time to profit. (Not measured.)
    gate_rate = 1.0
    evaluates_at_start = True  # before the first step: what does pretraining contribute?

    def counts(self, batch):
        """A tensor (losses,): the number of terms of each loss in a batch."""
        return torch.tensor([len(batch[entry]) for entry in self.loss_terms.values()])


class Pretraining(Task):
    """Masked words, masked regions and matching, on captions. [supp. 1]

    data: a Data, see section 6. earlier: the checkpoint that is resumed, or the one that --init
    names, or None. Raises BadInput if it does not fit.
    """

    name = "pretraining"
    unit = "pairs"
    loss_terms = {"mlm": "mlm_labels", "mrc": "mrc_positions", "itm": "itm_labels"}
    clip = 5.0  # A7, supp. 2
    weight_decay = 0.01
    initial_temperature = 5.0
    gate_rate = 0.1  # A10
    evaluates_at_start = False
    collate = staticmethod(collate)

    def __init__(self, args, data, earlier=None):
        store = data.store
        held_out = data.held_out_captions
        self.store = store
        self.tokenizer = data.tokenizer
        common = dict(tokenizer=data.tokenizer, blind=args.blind)
        self.examples = PretrainingDataset(
            store, data.captions[: args.limit], seed=args.seed, **common)
        # `mixed` is half masked (losses of words and regions) and half whole (loss of matching),
        # as in training. `whole` is all whole: its `match` replaces that of `mixed`, because it
        # judges twice as many pairs.
        common.update(seed=args.seed + 1, name="held-out captions")
        self.mixed = PretrainingDataset(store, held_out, **common)
        self.whole = PretrainingDataset(store, held_out, masking=False, **common)
        self.missing = self.examples.skipped
        for name, pairs in (("captions", self.examples), ("held-out captions", self.whole)):
            for reason, count in pairs.skipped.items():
                if count:
                    say(f"left out: {count} {name} {reason}")
        if not store.num_region_classes:
            say(f"{store.folder} has no class distributions: training without MRC")
        flags = ["--switches", args.switches, "--set"] + args.set
        with reading(" ".join(flags), "a model"):
            config = model_config(args, store, self.tokenizer)
            torch.manual_seed(args.seed)
            self.model = SwitchBertForPretraining(config)
        if earlier and args.init:  # a new run that takes over weights
            take_weights(self.model, earlier, args.init, store)
        elif earlier:  # a resumed run, whose weights and optimizer `restore` will load
            check_fits(earlier, store, "num_region_classes")
        elif args.bert:
            with reading(args.bert, "a Hugging Face BERT of this model's size"):
                new, unused = load_bert(self.model, args.bert)  # A6
            say_taken(args.bert, new, unused)

    def sums(self, model, batch, tau):
        """(3,): the three losses, summed; and the encoder's output."""
        # The detector's classes of hidden regions are computed here, on the device of the batch.
        out = model(**class_targets(batch, self.store), temperature=tau)
        return out.sums[:3], out.encoder

    def evaluate(self, model):
        """Held-out losses and accuracies with hard switches, and what the switches chose."""
        scores, switches = evaluate(model, self.mixed)
        scores.pop("match", None)
        if not self.mixed.blind:  # a blind model learns no matching
            of_whole, _ = evaluate(model, self.whole)
            scores["match"] = of_whole["match"]
        return scores, switches

    @staticmethod
    def headline(scores):
        """The scores of the printed line: shares of words and of pairs that are right."""
        shown = [name for name in ("words", "match") if name in scores]
        return "  ".join(f"{name} {scores[name]:.3f}" for name in shown)


def model_config(args, store, tokenizer):
    """A model's configuration: the paper's, or the toy run's, under a million parameters; and
    what --set changes. Raises AttributeError, TypeError, ValueError.
    """
    # initializer_range: BERT's .02 is for 768 inputs; for 128, .02 sqrt(768 / 128) = .05. With
    # .02, matching was learned twice as late. There is no dropout, because a usual run sees
    # each pair only four times.
    fields = {}
    if args.model == "small":
        fields = dict(hidden_size=128, num_hidden_layers=4, num_attention_heads=4,
            pooler_size=128, intermediate_size=256, max_position_embeddings=40,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.05)
    for change in args.set:
        field, _, value = change.partition("=")
        convert = type(getattr(SwitchBertConfig, field))  # int or float
        fields[field] = convert(value)
    return SwitchBertConfig(vocab_size=len(tokenizer), switches=args.switches, **fields,
        region_feature_size=store.feature_size, num_region_classes=store.num_region_classes)


# --- 3. The loop --------------------------------------------------------------------------
#
# `fit` does all training of Switch-BERT; forward_backward is the heart of a step. What they call
# is in this section and the next two, or in section 7. The less obvious names of section 7:
#
#     place                  to the device; from now on, forward passes compute in --precision
#     wrap                   compiles the layers; averages gradients over the processes (DDP)
#     restore                takes up the state of a checkpoint, if there is one
#     sum_over_processes     an all-reduce; every process must call it
#     Watch                  a stopwatch: pairs per second, seconds since the start
#     begin_record, record   begins metrics.jsonl; appends a line to it
#     mean_losses            means since the last evaluation; BadInput if they have diverged
#     stop_signals           holds back Ctrl-C and SIGTERM until a step is complete; then
#                            stop_asked(step) is True, in all processes after the same step

# Has the run diverged? Was one of several processes asked to stop? fit looks after so many steps.
LOOK_EVERY = 10


def fit(args, task, checkpoint=None):
    """Train a task. Returns the scores of its last evaluation, or None if it was stopped.
    args: the settings. checkpoint: the one to resume from. Raises BadInput if training diverges.
    """
    # 1. Model, AdamW, the number of steps done, and totals (losses,): this process's shares of the
    #    mean losses (see forward_backward), added up over the steps since the last evaluation.
    model = place(task.model, args)
    optimizer = make_optimizer(model, task.weight_decay, task.gate_rate)
    first, totals = restore(task, optimizer, checkpoint)
    watch = Watch(first)

    # 2. The length of the run, and this process's parts of each batch.
    steps = count_steps(args, task)
    begin_record(args, task, first, steps)
    rate_per_pair = anneal_rate(args, task, steps)
    loader = load_parts(args, task, first, steps)
    wrapped = wrap(model, args)
    # Evaluate before the first step of finetuning; also where no step is left, to return scores.
    if first >= steps or (first == 0 and task.evaluates_at_start):
        scores, switches = task.evaluate(model)
        if first == 0:
            record(args, step=0, scores=scores, switches=switches)
        watch.restart(first)

    with stop_signals() as stop_asked:
        for step in progress(range(first, steps), "training", initial=first, total=steps):
            # 3. Learning rate and temperature depend on the step alone.
            lr = learning_rate(step, steps, args.lr)
            for group in optimizer.param_groups:
                group["lr"] = group["scale"] * lr
            tau = temperature(step * args.batch, task.initial_temperature, rate=rate_per_pair)

            # 4. The gradient of the mean losses over the whole batch.
            optimizer.zero_grad()
            parts = [next(loader) for _ in range(args.accum)]
            losses, soft_switches = forward_backward(args, task, wrapped, parts, step, tau)

            # 5. Clip it, and update the weights.
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), task.clip)
            optimizer.step()
            totals += losses + 0 * norm  # 0 * inf is NaN, which mean_losses refuses

            # 6. To see a number, the host must wait for the GPU: it looks only now and then, and
            #    records up to thirty times a run (for curves.png and switches.gif).
            done = step + 1
            evaluates = done % args.eval_every == 0 or done == steps
            records = done % math.ceil(steps / 30) == 0
            stops = stop_asked(done)
            if not (evaluates or records or stops or done % LOOK_EVERY == 0):
                continue
            means = mean_losses(args, task, totals, done)  # BadInput if training has diverged
            line = dict(step=done, lr=lr, temperature=tau, losses=means)
            if records:
                record(args, **line, soft_switches=soft_switches.shares())
            if evaluates:
                scores = evaluate_and_report(args, task, steps, watch, line)
                totals.zero_()
            if evaluates or stops:
                save_checkpoint(args, task, optimizer, done, sum_over_processes(totals))
            if stops:
                break
        # Also for a request in the last step, or in its evaluation: what follows may take hours.
        if first < steps and stop_asked(0):  # 0: all processes ask now
            say(f"stopped after step {done}; --resume continues from here")
            return None
    return scores


def forward_backward(args, task, model, parts, step, tau):
    """Accumulate the gradients of a step. parts: this process's parts of the step's batch.

    Returns two things. First, this process's share of the mean losses (losses,): over all
    processes the shares add up to the means. Second, the mean weights that the switches gave their
    options (a SwitchShares), soft and noisy, as in training.

    A mean is over all that is predicted in the *whole* batch. Its parts hold different
    numbers of masked places, so a mean of their means would count some places more than
    others, and would depend on the number of parts. Instead each part's sum is divided by the
    count of the whole batch.
    """
    counts = sum(task.counts(part) for part in parts)
    counts = sum_over_processes(counts).clamp(min=1)  # (losses,), of all processes
    sums = 0
    soft_switches = SwitchShares(task.model.config)
    for number, part in enumerate(parts, RANK * args.accum):
        # The noise of dropout and switches depends on the part, not on its process.
        rng = np.random.default_rng([args.seed, step, number])
        torch.manual_seed(rng.integers(2**63))
        # DistributedDataParallel exchanges gradients only in the last part's backward pass, which
        # saves time. It averages them over processes, but we need their sum: hence WORLD_SIZE.
        model.require_backward_grad_sync = part is parts[-1]
        part_sums, output = task.sums(model, to_device(part), tau)
        loss = WORLD_SIZE * (part_sums / counts).sum()
        loss.backward()
        sums += part_sums.detach()
        soft_switches.add(output)
    return sums / counts, soft_switches


# --- 4. Optimisation ----------------------------------------------------------------------
#
# All random draws depend on seed, epoch, step, index and part only. So a step does not change
# after a restart, nor with the number of processes while processes x --accum stays the same.


def learning_rate(step, steps, peak):
    """The learning rate of step 0, 1, ...: linear warm-up over the first 10 %, then linear decay.

    >>> [round(learning_rate(step, 1000, 1.0), 2) for step in (0, 49, 99, 550, 775, 1000)]
    [0.01, 0.5, 1.0, 0.5, 0.25, 0.0]
    """
    warmup = max(1, round(0.1 * steps))
    rising = (step + 1) / warmup
    falling = (steps - step) / max(1, steps - warmup)
    return peak * min(rising, falling)


def make_optimizer(model, weight_decay, gate_rate):
    """AdamW [supp. 2], without decay on biases and LayerNorms (A7).

    In pretraining, gates have a tenth of the learning rate (A10): fast ones may settle on what
    is best for a model that is still untrained.
    """
    groups = defaultdict(list)
    for name, parameter in model.named_parameters():
        decay = weight_decay if parameter.ndim > 1 else 0.0
        scale = gate_rate if "gate." in name else 1.0
        groups[decay, scale].append(parameter)
    settings = [dict(params=parameters, weight_decay=decay, scale=scale)
        for (decay, scale), parameters in groups.items()]
    return torch.optim.AdamW(settings, eps=1e-6, fused=True)  # betas: .9, .999


def anneal_rate(args, task, steps):
    """The rate at which the temperature decays per example.

    Switches are used hard, so a run must end at the lowest temperature. With --anneal it gets
    there after that share of the run. Without, the rate is the paper's, 1e-6 (A5), or that of
    --anneal 0.9 if the run is too short for the paper's.
    """
    # initial * exp(-rate * n) = floor gives n = decay / rate, where decay = log(initial / floor).
    decay = math.log(task.initial_temperature / FINAL_TEMPERATURE)
    examples = max(1, steps * args.batch)
    share = args.anneal
    if not share:
        if steps == 0 or 1e-6 * examples >= decay:
            return 1e-6
        share = 0.9
        say(f"switches are hard after 90 % of the run: its {examples:,} {task.unit} are fewer "
            f"than the {1e6 * decay:,.0f} of the paper's rate")
    return decay / (share * examples)


def count_steps(args, task):
    """The number of steps of a run. Makes --batch no larger than the data.

    Raises BadInput if a batch has no equal parts.
    """
    parts = WORLD_SIZE * args.accum
    number = len(task.examples)
    if args.epochs and number < args.batch:
        say(f"--batch {args.batch} is cut: there are only {number} training {task.unit}")
        args.batch = number // parts * parts
    if args.epochs and (args.batch % parts or args.batch == 0):
        raise BadInput(f"--batch {args.batch}, of {number} {task.unit}: expected a multiple of "
            f"{parts}, which is processes ({WORLD_SIZE}) x --accum ({args.accum})")
    return args.epochs * (number // args.batch)


@functools.lru_cache(1)  # called in every step
def epoch_batches(seed, epoch, size, examples):
    """(batches, size) indices: the examples of an epoch, in batches of similar length.

    Captions have 12 word pieces on average, and up to 38. In random batches, padded to their
    longest, most of the text would be padding. So the epoch's permutation is cut into windows
    of 100 batches, each window is sorted by length, and all batches are shuffled.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(examples))
    order = order[: len(order) // size * size]  # the rest is skipped in this epoch
    starts = range(100 * size, len(order), 100 * size)
    for window in np.split(order, starts):  # a view: to sort it is to sort that part of `order`
        by_length = np.argsort(examples.lengths[window], kind="stable")
        window[:] = window[by_length]
    return rng.permutation(order.reshape(-1, size))  # shuffles batches, not within them


def load_parts(args, task, first, steps):
    """An iterator over this process's parts of the batches, --accum per step, from `first` on.

    A step's batch is the same for any number of processes: it is cut into WORLD_SIZE x accum
    equal parts. Loading processes (--workers) prepare parts in advance. The keys (epoch, index)
    determine a part. So parts that were prepared but not used when a run stopped are no loss: the
    resumed run makes the same ones again.
    """
    per_epoch = len(task.examples) // args.batch

    def keys():
        """Lists of (epoch, index), one for each part of this process."""
        for step in range(first, steps):
            epoch, number = divmod(step, per_epoch)
            batches = epoch_batches(args.seed, epoch, args.batch, task.examples)
            parts = batches[number].reshape(WORLD_SIZE, args.accum, -1)
            for part in parts[RANK]:
                yield [(epoch, int(index)) for index in part]

    return iter(load_ahead(task.examples, keys(), task.collate, args.workers))


# --- 5. Evaluation ------------------------------------------------------------------------
#
# Switches are hard unless a temperature is given: this measures the model that will be used,
# without noise. Processes share the work in whole batches of similar length. So the padding
# of a batch, and with it the rounding, is the same for any number of processes.


def share_of(lengths, batch_size):
    """The batches that this process evaluates: arrays of indices, by similar length."""
    order = np.argsort(lengths, kind="stable")
    starts = range(batch_size, len(order), batch_size)
    return np.split(order, starts)[RANK::WORLD_SIZE]


class SwitchShares:
    """What the switches chose, as shares of all samples: add outputs, then call shares()."""

    def __init__(self, config):
        layers = config.num_hidden_layers
        shapes = [(layers, 2, len(MODES))]  # modes, then each layer's depths
        shapes += [(2, depths) for depths in range(1, layers + 1)]
        self.sums = [torch.zeros(shape, device=device()) for shape in shapes]

    def add(self, output):
        """output: a SwitchBertOutput, whose weights are soft or one-hot."""
        for kept, new in zip(self.sums, [output.modes] + output.depths):
            kept += new.detach().sum(dim=0)

    def shares(self):
        """{"modes": (layers, 2, M), "depths": per layer (2, l+1)}, as lists.

        Every process must call it.
        """
        shares = []
        for own in self.sums:
            sums = sum_over_processes(own)
            samples = sums.sum(dim=-1, keepdim=True)  # weights add up to 1 in each sample
            shares.append((sums / samples).tolist())
        return {"modes": shares[0], "depths": shares[1:]}


@torch.no_grad()
def evaluate(model, dataset, batch_size=200):
    """Losses and accuracies on a PretrainingDataset, and what the switches chose: two dicts."""
    model.eval()
    sums = torch.zeros(5, device=device())  # three losses; words and pairs that are right
    counts = torch.zeros(5)
    switches = SwitchShares(model.config)
    for indices in share_of(dataset.lengths, batch_size):
        batch = to_device(collate([dataset[index] for index in indices]))
        out = model(**class_targets(batch, dataset.store))
        sums += out.sums
        counts += torch.tensor(out.counts)
        switches.add(out.encoder)
    model.train()
    counts = sum_over_processes(counts)
    means = sum_over_processes(sums) / counts.clamp(min=1)
    names = ("mlm", "mrc", "itm", "words", "match")
    # What nothing was predicted of, such as regions without classes, has no score.
    scores = {name: mean for name, mean, count in zip(names, means.tolist(), counts) if count}
    return scores, switches.shares()


def zero_shot(args, task):
    """Recalls by the pretrained matching head: one caption for each of 100 held-out images."""
    first = dict(reversed(task.whole.captions))  # so that it keeps the first of each image
    ids = sorted(first)[:100]
    texts = [first[image_id] for image_id in ids]
    model = task.model
    ranker = SwitchBertForRetrieval.from_pretraining(model.config, model.state_dict())
    scores = match_scores(place(ranker, args), task.store, task.tokenizer, texts, ids)
    return {"images": len(ids)} | recall_at(scores, torch.arange(len(ids)))


@torch.no_grad()
def match_scores(model, store, tokenizer, texts, image_ids, max_tokens=38, temperature=None):
    """(texts, images): how well text i and image j match. model: a SwitchBertForRetrieval.

    Every pair goes through the model. A block of 100 images is padded and sent to the device
    once. A batch is all of them with some texts of similar length, up to 200 pairs. The
    processes share the texts. An id that the store lacks is an image without regions, as a
    blind model sees it.
    """
    model.eval()
    words = [np.array(tokenizer.encode(text, max_tokens)) for text in texts]
    lengths = [len(ids) for ids in words]
    scores = torch.zeros(len(texts), len(image_ids), device=device())
    for start in progress(range(0, len(image_ids), 100), "scoring"):
        store_rows = [store.row(image_id) for image_id in image_ids[start : start + 100]]
        # To make a batch, images need some text, and texts some image: the first one serves.
        images = [dict(region_inputs(store, row), input_ids=words[0]) for row in store_rows]
        n = len(images)
        block = to_device(model_inputs(images))
        for chosen in share_of(lengths, 200 // n):
            k = len(chosen)
            examples = [images[0] | {"input_ids": words[i]} for i in chosen]
            some = to_device(model_inputs(examples))
            # All images for the first text, then all for the second, and so on.
            pairs = {name: torch.cat([tensor] * k) for name, tensor in block.items()}
            for name in ("input_ids", "text_mask"):  # (k n, T)
                pairs[name] = some[name].repeat_interleave(n, dim=0)
            odds, _ = model(**pairs, temperature=temperature)  # (k n,)
            rows = send(torch.from_numpy(chosen))
            scores[rows, start : start + n] = odds.view(k, n)
    return sum_over_processes(scores).cpu()


def recall_at(scores, image_of_text, ks=(1, 5)):
    """Share of queries whose right answer is among the k best: {"image R@1": ..., ...}.

    scores (texts, images); image_of_text (texts,): the index of each text's image. "image"
    finds the image of a text, "text" finds any text of an image. Ties count against the
    model: if it scores all pairs alike, its recall is 0, not 1.
    """
    wrong = image_of_text[:, None] != torch.arange(scores.shape[1])  # (texts, images)
    right = scores.masked_fill(wrong, -math.inf)
    recalls = {}
    for name, candidates in (("image", 1), ("text", 0)):  # the dimension that is searched
        best = right.amax(candidates, keepdim=True)
        # 0 is the best rank. `not less` counts a NaN against the model, too.
        rank = (~(scores < best) & wrong).sum(candidates)
        for k in ks:
            recalls[f"{name} R@{k}"] = (rank < k).float().mean().item()
    return recalls


# --- 6. Data of a run ---------------------------------------------------------------------
#
# Where pairs, regions and words come from. Captions are held out by image: if a held-out
# image were in a training pair too, the model could recognise its picture.

# What a run trains on: regions (a FeatureStore), training and held-out pairs (image id, text)
# as Captions or a list, and words (a WordPiece).
Data = namedtuple("Data", "store captions held_out_captions tokenizer")


def load_data(folder, bert=None, words=None):
    """The Data of a folder, or of the toy world if it is None.

    A folder holds features/ (a store) and captions, any number of them: *.tsv, *.json, or
    folders of pictures and texts. words: the pieces of a checkpoint; None: see find_words.
    """
    if folder is None:
        store, scenes, held_out_scenes = toy_world()
        training = [(number, text) for number in scenes for text in Scene(number).captions()]
        held_out = [(number, text)
            for number in held_out_scenes for text in Scene(number).captions(2)]
        texts = toy_texts(scenes[:1000])
    else:
        store = FeatureStore(folder / "features")
        training, held_out = split_captions(folder, store)
        texts = training.texts
    tokenizer = WordPiece(words) if words else find_words(folder, bert, texts)
    return Data(store, training, held_out, tokenizer)


def find_words(folder, bert, texts):
    """The WordPiece of a new run. bert: the folder of the BERT that it starts from, or None.

    Words come from the BERT's vocab.txt, because its weights know no others; without a BERT
    from that of the data folder; without either they are built from texts, always the same.
    """
    folders = [path for path in (bert, folder) if path]
    known = [WordPiece(file) for path in folders for file in path.glob("vocab.txt")]
    if bert and not known:
        raise BadInput(f"{bert}: expected vocab.txt, the words of its weights")
    if not known:
        return WordPiece(build_vocab(texts))
    if known[0].pieces != known[-1].pieces:
        raise BadInput(f"vocab.txt differs in {bert} and {folder}; remove that of {folder}")
    return known[0]


def split_captions(folder, store):
    """(training, held-out) captions of all files in a folder: of train, and 1,000 of val."""
    captions, splits = read_folder(folder, store)
    training = captions[splits == b"train"]
    val = captions[splits == b"val"]
    order = np.argsort(store.rows(val.ids) < 0, kind="stable")  # those with features first
    held_out = val[order[:1000]]
    unused = len(captions) - len(training) - len(held_out)
    if unused:
        say(f"{folder}: {unused:,} captions are not used: test, val beyond 1,000, or "
            "training captions of val's images")
    return training, held_out


def read_folder(folder, store):
    """(captions, splits (N,) bytes) of all files in a folder; for splits see hold_out."""
    other = ("features", "bert", "vocab.txt")
    paths = sorted(path for path in folder.glob("[!.]*") if path.name not in other)
    sources = []  # of every caption, its file's index in paths
    splits = []

    def pairs():
        """Yield (image id, caption) of all files."""
        for number, path in enumerate(paths):
            has_captions = path.suffix.lower() in (".tsv", ".json")
            if path.is_dir():  # not a BERT, or a detector's vocabulary
                has_captions = not list(path.glob("*vocab.txt"))
            if has_captions:
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
    for number in read:
        store.find(captions.ids[sources == number], f"{paths[number]}: captions")
    return captions, hold_out(captions.ids, splits, store)


def hold_out(ids, splits, store):
    """The splits (N,) of captions, such that no image is in train and in val.

    Training captions of an image of val are of no split, b"". If there is no val, it becomes
    1 % of the training images that have features, at least 5, but at most half of them: those
    whose ids have the smallest crc32. That does not depend on the order of files.
    """
    training = splits == b"train"
    held_out = splits == b"val"
    if held_out.any():
        in_both = training & np.isin(ids, ids[held_out])  # of whichever file
        return np.where(in_both, b"", splits)
    codes = np.fromiter(map(zlib.crc32, ids), np.uint32)
    has_features = store.rows(ids) >= 0
    images = np.unique(codes[training & has_features])
    wanted = max(5, len(images) // 100)
    chosen = images[: min(wanted, len(images) // 2)]
    say(f"no file names val: {len(chosen):,} of {len(images):,} images are held out")
    return np.where(training & np.isin(codes, chosen), b"val", splits)


def check_names(ids, sources, paths):
    """Raise BadInput if two captions that may be of different pictures have the same id.

    A folder holds one caption per picture, so no id may come twice from folders. Their ids
    are often counters (img2dataset): in a table or JSON file, the same number means another
    picture. Those files may well share images with each other. ids, sources (N,): of each
    caption the image's id, and the index in paths of the file or folder that it is from.
    """
    from_folder = np.array([path.is_dir() for path in paths])[sources]
    if not from_folder.any():
        return
    names, times = np.unique(ids[from_folder], return_counts=True)
    elsewhere = np.isin(names, ids[~from_folder])
    clash = (times > 1) | elsewhere & np.strings.isdigit(names)
    for name in names[clash]:
        numbers = sources[ids == name]
        raise BadInput(f"{paths[numbers[0]]} and {paths[numbers[-1]]} both have a picture "
            f"{name.decode()}; if these are two, rename one and extract its features anew")


def toy_world():
    """(store, numbers of training scenes, of held-out scenes) of the toy world.

    If they are missing, it trains the detector and fills the store. A scene's id is its
    number, which is also its seed. No model is trained on held-out scenes.
    """
    training = range(3600)
    # 400 for losses and accuracies; the first 100 of them for retrieval.
    held_out = range(HELD_OUT_SCENES, HELD_OUT_SCENES + 400)
    features = Path("runs/world/features-3600")
    if RANK == 0:
        try:
            FeatureStore(features)
        except BadInput:  # none, or a half-written one
            from extract_features import extract_scenes, toy_detector  # needs torchvision
            with only_run_in(features.parent):
                detector = toy_detector(features.with_name("detector.pt"), training)
                scenes = list(training) + list(held_out)
                extract_scenes(detector, scenes, features)
    if WORLD_SIZE > 1:
        dist.barrier()  # the others wait for the first
    return FeatureStore(features), training, held_out


def toy_texts(numbers):
    """Yield texts of scenes for a vocabulary: also questions and expressions, for finetuning."""
    for scene in map(Scene, numbers):
        yield from scene.captions()
        for question, answer, _ in scene.questions():
            yield f"{question} {answer}"
        for expression, _, _ in scene.expressions():
            yield expression


# --- 7. Machine room ----------------------------------------------------------------------
#
# Of this, the sections above need only the few names that section 3 lists.

# --- Flags ---

def add_run_flags(p, data, content, out):
    """Add the flags that all trainings share. A setting is None where it is not given.

    data, out: the usual folders of data and results. content: what the data folder holds.
    """
    add = functools.partial(flag, p)
    gpu = torch.cuda.is_available()
    native = gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    add("--data", Path, f"folder with {content} (default: {data}, else the toy world)",
        data if Path(data).is_dir() else None)
    add("--out", Path, "folder of the results (default: %(default)s)", out)
    add("--epochs", NATURAL, "passes over the training examples")
    add("--batch", COUNT, "examples per step, over all processes")
    add("--lr", RATE, "peak learning rate")
    add("--eval-every", COUNT, "steps between evaluations and checkpoints")
    add("--anneal", SHARE, "share of the run with tau above 0.2; with --data, it falls by "
        "1e-6 per example, unless the run is too short for that")
    add("--limit", COUNT, "train on this many examples at most")
    add("--seed", NATURAL, "seed of everything random")
    add("--gpus", COUNT, "processes, one per GPU; without GPUs on the CPU (default: 1)", 1)
    add("--accum", COUNT,
        "parts per process and step: less memory, other noise (default: 1)", 1)
    add("--workers", NATURAL, "loading processes per process (default: %(default)s; on a CPU, "
        "which is busy, none)", min(4, os.cpu_count()) if gpu else 0)
    add("--threads", COUNT, "CPU threads per process; None: all cores. Busy machine: 1")
    p.add_argument("--resume", action="store_true", help="continue from the checkpoint in --out")
    p.add_argument("--blind", action="store_true", default=None,
        help="no pictures: what do words alone give?")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=gpu,
        help="torch.compile the layers, if they are more than the small model's four")
    p.add_argument("--precision", default="bf16" if native else "fp32",
        choices=["bf16", "fp32"], help="of matrix products, fp32 with TF32 where a GPU has "
        "it; softmax, losses: fp32 (default: %(default)s)")


def fill_settings(parser, argv, toy, full, task):
    """(settings, checkpoint) of a command line; checkpoint is None without --resume.

    Settings that are not given are those of the checkpoint, else `full` with --data and `toy`
    without. Raises BadInput if a flag contradicts the checkpoint.
    """
    parser.epilog = ("Where these flags exist, "
        f"the toy world's are: {toy}. With --data: {full}.")
    args = parser.parse_args(argv)
    settings = full if args.data else toy
    checkpoint = None
    if args.resume:
        checkpoint = load_checkpoint(args.out, task)
        settings = checkpoint["settings"]
    for name, value in settings.items():
        given = getattr(args, name, value)
        was_cut = checkpoint and name == "batch" and given and given > checkpoint["examples"][0]
        if given is None or was_cut:
            setattr(args, name, value)
        elif checkpoint and given != value:
            raise BadInput(f"--{name.replace('_', '-')} {given}: the run that is resumed has "
                f"{value}; leave the flag out, or start a new run with another --out")
    return args, checkpoint


# --- Processes and devices ---
#
# One process per GPU, all running the same code on their own parts of each batch. torchrun
# starts them, also for --gpus, and sets RANK, LOCAL_RANK and WORLD_SIZE.

def launch(args, work):
    """Run work() in this process, or in --gpus processes, and exit.

    The result of work() is None if the run was stopped. Then the status is 130, so that no
    shell goes on with its next command.
    """
    if args.gpus > 1 and WORLD_SIZE == 1:
        return start_processes(args.gpus)
    if args.threads:
        torch.set_num_threads(args.threads)
    gpu = torch.cuda.is_available()
    if gpu and args.precision == "fp32":
        torch.set_float32_matmul_precision("high")  # TF32
    if WORLD_SIZE > 1:
        card = None
        backend = "gloo"
        if gpu:
            card = device()
            torch.cuda.set_device(card)
            backend = "nccl"
        # In a ranking, hours may pass before the processes hear of each other again.
        dist.init_process_group(backend, timeout=timedelta(days=1), device_id=card)
    lock = only_run_in(args.out) if RANK == 0 else contextlib.nullcontext()
    with lock:
        result = work()
    status = 130 if result is None else 0
    if WORLD_SIZE > 1:
        dist.barrier()  # torchrun ends the others at the first status that is not 0
        dist.destroy_process_group()
        # If one of Gloo's threads still runs while the interpreter shuts down, the process
        # aborts although all is done. So it exits here, after the usual cleanup.
        atexit._run_exitfuncs()
        os._exit(status)
    sys.exit(status)


def place(model, args):
    """The model on this process's device. All its forward passes compute in --precision.

    That includes evaluation and ranking. A backward pass, which runs outside of autocast,
    takes each product's own precision.
    """
    bf16 = args.precision == "bf16"
    autocast = torch.autocast(device().type, torch.bfloat16, enabled=bf16)
    model.forward = autocast(model.forward)
    return model.to(device())


def send(tensor):
    """The tensor on this process's device; the host does not wait for it."""
    # Apple's GPU would read a tensor that is gone already.
    return tensor.to(device(), non_blocking=device().type == "cuda")


def to_device(batch):
    """The dict with its tensors on this process's device; all else is unchanged."""
    return {name: send(value) if torch.is_tensor(value) else value
        for name, value in batch.items()}


def sum_over_processes(tensor):
    """The sum of a tensor over all processes, on the device. All must call it."""
    tensor = send(tensor)
    if dist.is_initialized():
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def wrap(model, args):
    """The model as it is trained: compiled on request, its gradients averaged over processes."""
    if args.compile and model.config.num_hidden_layers > 4:
        compile_layers(model)
    if WORLD_SIZE == 1:
        return model
    model = DistributedDataParallel(model)
    model.broadcast_buffers = False  # they are constants
    return model


def compile_layers(model):
    """Compile a model's layers, which share their code, in a minute; the whole takes several.

    One graph serves training at any length, and three evaluation: hard, soft, a single pair.
    """
    torch._dynamo.config.suppress_errors = True  # without a compiler, layers run as they are
    # DistributedDataParallel would split a base layer, which is larger than its bucket of 25 MiB,
    # and then compile it for each temperature anew. Between layers it overlaps in any case.
    torch._dynamo.config.optimize_ddp = False
    for layer in model.bert.layers:
        with contextlib.suppress(RuntimeError):  # a Python that this torch does not know yet
            layer.block = torch.compile(layer.block, dynamic=True)


@contextlib.contextmanager
def stop_signals():
    """In this block, no request to stop interrupts a step: SIGTERM, Ctrl-C, torchrun's end.

    Thus the state that is saved is that of an undisturbed run. Yields stop_asked(step): should
    the run stop after this step? Several processes tell each other every LOOK_EVERY steps, and
    all stop after the same one.
    """
    requests = []
    parent = os.getppid()

    def stop_asked(step):
        """Should the run stop after this step?"""
        if WORLD_SIZE == 1:
            return len(requests) > 0
        if step % LOOK_EVERY:
            return False
        orphaned = os.getppid() != parent  # torchrun has ended
        return sum_over_processes(torch.tensor(len(requests) + orphaned)) > 0

    on_stop(lambda *_: requests.append(1))
    try:
        yield stop_asked
    finally:
        on_stop()  # as `run` has set it


# --- The record of a run ---
#
# metrics.jsonl has lines of two kinds. At most thirty hold the mean weights of the soft switches
# in that step's training: the frames of switches.gif. One per evaluation holds held-out scores
# and what hard switches chose: switches.png draws the last one. Both hold the mean losses
# since the last evaluation: curves.png draws these, scores, lr and temperature. A line of step 0,
# before any training, has scores and switches only.
#
#     {"step": 30, "lr": 3.3e-4, "temperature": 4.46, "losses": {"mlm": 4.12, ...},
#         "soft_switches": {"modes": ..., "depths": ...}}                as in SwitchShares.shares
#     {"examples": 28800, "step": 450, "lr": 5.6e-4, "temperature": 0.84,
#         "losses": {"mlm": 0.76, ...}, "scores": {"words": 0.710, ...},
#         "switches": {"modes": ..., "depths": ...}, "per_second": 739, "seconds": 41}

class Watch:
    """When a run began, and when and after which step it last evaluated."""

    def __init__(self, first):
        self.began = time.time()
        self.restart(first)

    def restart(self, step):
        """Measure the speed from the end of an evaluation, which does not count."""
        self.step = step
        self.since = time.time()


def mean_losses(args, task, totals, step):
    """{name: mean loss} since the last evaluation. All processes must call it.

    totals (losses,): this process's share of the mean losses, added up over these steps.

    Raises BadInput if training has diverged.
    """
    steps = (step - 1) % args.eval_every + 1  # since the last evaluation
    means = sum_over_processes(totals) / steps
    means = dict(zip(task.loss_terms, means.tolist()))
    check_sound(step, means)
    return means


def check_sound(step, numbers):
    """Raise BadInput unless each of {name: number} is below a thousand in absolute value.

    No loss here starts above 100. So one of a thousand means that the weights have diverged.
    """
    if not all(abs(number) < 1e3 for number in numbers.values()):  # NaN is never below
        listed = ", ".join(f"{name} {number:.4g}" for name, number in numbers.items())
        raise BadInput(f"by step {step}: diverged ({listed}), and this step is not saved; "
            "lower --lr, or check the data")


def begin_record(args, task, first, steps):
    """Make a run's folder and print its opening line; another run there is renamed.

    On resume, the lines of metrics.jsonl after step `first` are dropped: the run will write
    them again.
    """
    if RANK > 0:
        return
    out = args.out
    kept = []
    if first:
        kept = [json.dumps(line) + "\n" for line in read_metrics(out) if line["step"] <= first]
    elif (out / "checkpoint.pt").exists() or (out / "result.json").exists():
        move_aside(out)
    write_whole(out / "metrics.jsonl", lambda file: file.writelines(kept), mode="w")
    model = task.model
    number = len(task.examples)
    write_json(out / "config.json", dict(settings=vars(args), model=vars(model.config),
        data=task.store.folder, examples=number, missing=task.missing,
        torch=torch.__version__))
    blind = " without pictures" if args.blind else ""
    resuming = f"; resuming after step {first}" if first else ""
    parameters = sum(p.numel() for p in model.parameters())
    say(f"{task.name}{blind}: {number:,} {task.unit}, {parameters:,} parameters, "
        f"{steps} steps of {args.batch}, {args.precision}, on {device().type}; "
        f"processes: {WORLD_SIZE}, threads: {torch.get_num_threads()}{resuming}")


def move_aside(out):
    """Rename a run's folder to the first free name, and make a new one in its place."""
    number = 1
    while Path(f"{out}-{number}").exists():
        number += 1
    try:
        earlier = out.rename(f"{out}-{number}")
    except OSError as error:  # a mounted folder
        raise BadInput(f"{out} holds a run and cannot be renamed ({error}); continue it with "
            f"--resume, or begin a new one with --out {out}/new") from None
    say(f"the run that was in {out} is now in {earlier}")
    out.mkdir()
    for lock in earlier.glob(".lock"):  # this process holds it
        lock.replace(out / ".lock")


def record(args, **line):
    """Add an object to metrics.jsonl."""
    if RANK == 0:
        text = json.dumps(line)
        with open(args.out / "metrics.jsonl", "a") as file:
            print(text, file=file)


def evaluate_and_report(args, task, steps, watch, line):
    """Evaluate; print, record and draw the scores, and return them. line: what to record, too.

    Raises BadInput if training has diverged.
    """
    step = line["step"]
    speed = (step - watch.step) * args.batch / (time.time() - watch.since)
    scores, switches = task.evaluate(task.model)
    check_sound(step, scores)
    seconds = time.time() - watch.began
    record(args, examples=step * args.batch, **line, scores=scores, switches=switches,
        per_second=speed, seconds=seconds)
    # Without losses of 0, such as that of regions in a blind run.
    losses = [f"{name} {loss:.2f}" for name, loss in line["losses"].items() if loss]
    say(f"step {step:5d}/{steps}  lr {line['lr']:.1e}  tau {line['temperature']:.2f}  "
        f"{' '.join(losses)} | {task.headline(scores)} | {speed:.0f} {task.unit}/s, "
        f"{seconds:.0f} s")
    if RANK == 0:
        try:
            draw_runs([args.out], args.out / "switches.png")
        except Exception as error:  # a picture must not cost hours of training
            say(f"{args.out}: the pictures could not be drawn: {error!r}")
    watch.restart(step)
    return scores


def read_metrics(folder):
    """The objects of a run's metrics.jsonl. Raises BadInput, which names a damaged line.

    A last line without its newline is left out: a kill has cut it off, and a resumed run
    writes it again.
    """
    path = folder / "metrics.jsonl"
    with reading(path, "the metrics.jsonl of a run", "line") as at:
        lines = path.read_text().split("\n")[:-1]
        return [json.loads(line) for at.entry, line in enumerate(lines, 1)]


# --- Checkpoints ---

CHECKPOINT_FORMAT = "switchbert-7"  # in 6, a start did not depend on the number of layers


def save_checkpoint(args, task, optimizer, step, totals):
    """Save all that a resumed run, finetuning or a reader needs.

    That is the run's state, its settings, and what the model fits. totals: those of fit, of all
    processes. No state of a random generator is needed: every step seeds its own.
    """
    if RANK > 0:
        return
    model = task.model
    captions = task.examples.captions
    settings = {name: vars(args)[name] for name in TOY if name in args}
    content = dict(format=CHECKPOINT_FORMAT, task=task.name, step=step, settings=settings,
        config=vars(model.config), vocab=task.tokenizer.pieces, labels=task.labels,
        store=task.store.meta, model=model.state_dict(), examples=captions.checksum,
        interval=totals, optimizer=optimizer.state_dict())
    path = args.out / "checkpoint.pt"
    write_whole(path, lambda file: torch.save(content, file))


def load_checkpoint(path, *tasks):
    """A checkpoint of one of these tasks, a dict of plain values and tensors. Raises BadInput.

    path: the file, or a run's folder. torch does not verify the checksums in a file, so a
    flipped bit would load as another number; zipfile does. weights_only refuses any code that
    a pickle could run.
    """
    if path.is_dir():
        path /= "checkpoint.pt"
    with reading(path, f"a whole checkpoint of {' or '.join(tasks)}, which train.py or "
            "finetune.py writes"):
        with zipfile.ZipFile(path) as file:
            if broken := file.testzip():
                raise ValueError(f"{broken} is damaged")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if checkpoint["format"] != CHECKPOINT_FORMAT:
            raise ValueError(f"its format is {checkpoint['format']}, not {CHECKPOINT_FORMAT}")
        if checkpoint["task"] not in tasks:
            raise ValueError(f"it is one of {checkpoint['task']}")
    return checkpoint


def restore(task, optimizer, checkpoint):
    """Take up the state of a checkpoint; None: a new run.

    Returns the number of its steps, and the totals of fit, on the device. Raises BadInput if the
    run had other examples.
    """
    if checkpoint is None:
        return 0, torch.zeros(len(task.loss_terms), device=device())
    known = checkpoint["examples"]
    if known != task.examples.captions.checksum:
        raise BadInput(f"{task.store.folder.parent}: the run that is resumed had other "
            f"{task.unit}, {known[0]:,} of them, here are {len(task.examples):,}; give it "
            "its own, or start a new run with another --out")
    task.model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    # The totals were those of all processes. Equal shares add up to them again.
    return checkpoint["step"], send(checkpoint["interval"]) / WORLD_SIZE


def check_fits(checkpoint, store, *more):
    """Raise BadInput if a checkpoint is of another store: these entries of store.json differ.

    Another detector's features have another meaning, even if they are of the same size.
    """
    theirs = checkpoint["store"]
    for name in ("feature_size", "detector") + more:
        if store.meta[name] != theirs[name]:
            raise BadInput(f"{store.folder}: its {name} is {store.meta[name]!r}, but the "
                f"checkpoint was trained with {theirs[name]!r}; use that store, or start over")


def take_weights(model, checkpoint, source, store):
    """Load what fits of another run's checkpoint, by name and shape, and say what does not.

    source: where the checkpoint is from. Raises BadInput if its layers do not fit.
    """
    own = model.state_dict()
    theirs = checkpoint["model"]
    fits = {name: tensor for name, tensor in theirs.items()
        if name in own and own[name].shape == tensor.shape}
    if "bert.layers.0.attention.query.weight" not in fits:
        raise BadInput(f"{source}: its layers have another size than this model's; give the "
            "--model and --set that it was trained with")
    new, _ = model.load_state_dict(fits, strict=False)
    say_taken(source, new, theirs.keys() - fits)
    detector = checkpoint["store"]["detector"]
    if detector != store.meta["detector"]:
        say(f"note: {source} has learned the regions of {detector!r}, and {store.folder} has "
            f"those of {store.meta['detector']!r}: what it knows of regions is lost")


def say_taken(source, new, unused):
    """Say where a model starts from: parameters that are new in it, and the source's unused."""
    def some(names):
        more = " ..." if len(names) > 5 else ""
        first = ", ".join(sorted(names)[:5])
        return f"{len(names)} parameters ({first}{more})" if names else "nothing"

    say(f"started from {source}; new in this model: {some(new)}; not used: {some(unused)}")


# --- Pictures ---

# Of modes and of runs: seven that the colour-blind can tell apart [Okabe and Ito].
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000") * 9
WIDTH = 828  # pixels of a picture: what GitHub shows
ROW = 24  # the height of a layer's row
BAR = 340  # the width of a bar, and of all depths


def canvas(width, height, title, names=()):
    """A PIL image with a title and, below, names in their colours; and what draws on it."""
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    draw.font = ImageFont.load_default(14)
    draw.text((10, 8), title, "black")
    for number, name in enumerate(names):
        draw.text((10, 28 + 20 * number), str(name), COLOURS[number])
    return image, draw


def stack(images, columns=1):
    """PIL images as one, `columns` per row. Each row is as high as its highest image."""
    rows = [images[k : k + columns] for k in range(0, len(images), columns)]
    heights = [max(image.height for image in row) for row in rows]
    width = max(image.width for image in images)
    whole = Image.new("RGB", (width * len(rows[0]), sum(heights)), "white")
    y = 0
    for row, height in zip(rows, heights):
        for column, image in enumerate(row):
            whole.paste(image, (width * column, y))
        y += height
    return whole


def switches_picture(switches, title):
    """What every layer chose, a PIL image: bars for modes, cells for depths (black: always).

    switches: as SwitchShares.shares returns them.
    """
    modes = switches["modes"]
    depths = switches["depths"]
    layers = len(modes)
    top = 40 + 20 * len(MODES)
    image, draw = canvas(WIDTH, top + 20 + 2 * ROW * layers,
        f"{title}: how text and vision attend, and (black) which depth they read", MODES)
    cell = BAR / layers
    for row, (modality, layer) in enumerate(np.ndindex(2, layers)):
        y = top + ROW * row + 10 * modality
        draw.text((10, y + 2), f"{MODALITIES[modality]}, layer {layer + 1}", "black")
        x = 120
        for share, colour in zip(modes[layer][modality], COLOURS):
            draw.rectangle([x, y, x + BAR * share, y + 20], colour)
            x += BAR * share
        x += 14
        for share in depths[layer][modality]:
            shade = f"hsl(0, 0%, {1 - share:.3%})"  # black: always
            draw.rectangle([x, y, x + cell - 4, y + 20], shade, "grey")
            x += cell
    return image


def draw_runs(folders, path):
    """Draw what the switches of runs chose, into `path`, and how they went, into curves.png."""
    save_png(path, stack([draw_switches(folder) for folder in folders]))
    save_png(path.with_name("curves.png"), draw_curves(folders))


def draw_switches(folder):
    """Draw how a run's switches hardened as the temperature fell. Raises BadInput without data.

    It writes switches.gif, of under 300 KB, and returns a picture of what every layer chose at
    the end; of a finetuned run also at the start: what did the task change?
    """
    lines = read_metrics(folder)
    chosen = [line for line in lines if "switches" in line]
    if not chosen:
        raise BadInput(f"{folder}: nothing to draw yet; this run has made no evaluation")
    frames = []
    for line in lines:
        if "soft_switches" in line:
            picture = switches_picture(line["soft_switches"],
                f"{folder}, step {line['step']}, temperature {line['temperature']:.2f}")
            # In one fixed palette, pixels that do not change between frames take no space.
            frames.append(picture.convert("P", dither=0))
    if frames:
        milliseconds = [150] * (len(frames) - 1) + [3000]
        write_whole(folder / "switches.gif", lambda file: frames[0].save(file, "GIF", loop=0,
            save_all=True, append_images=frames[1:], duration=milliseconds))
    shown = [line for line in chosen if line["step"] == 0 or line is chosen[-1]]
    return stack([switches_picture(line["switches"], f"{folder}, step {line['step']}")
        for line in shown])


def draw_curves(folders):
    """How runs went, a PIL image: a panel per loss, rate and score, twelve at most."""
    curves = defaultdict(lambda: defaultdict(list))  # name -> (run, width) -> points
    for run_number, folder in enumerate(folders):
        for line in reversed(read_metrics(folder)):  # the last one has all names
            rates = {name: line[name] for name in ("lr", "temperature") if name in line}
            training = line.get("losses", {}) | rates
            held_out = line.get("scores", {})
            step = line["step"]
            for width, values in ((2, training), (5, held_out)):
                for name, value in values.items():
                    curves[name][run_number, width].append((step, value))
    image, _ = canvas(WIDTH, 40 + 20 * len(folders), "thin: training, thick: held out", folders)
    names = list(curves)[:12]
    rows = math.ceil(len(names) / 3)
    for row in np.array_split(names, rows) if names else []:
        panels = [curve_panel(name, curves[name], WIDTH // len(row)) for name in row]
        image = stack([image, stack(panels, columns=len(row))])
    return image


def curve_panel(name, lines, width):
    """A panel, so many pixels wide. lines: {(run's number, width): [(step, value), ...]}."""
    all_points = np.concatenate(list(lines.values()))  # (points, 2)
    low = all_points.min(0)  # of steps and of values
    low[0] = 0  # steps count from 0
    high = all_points.max(0)
    panel, draw = canvas(width, 200,
        f"{name}: {low[1]:.4g} to {high[1]:.4g}\nsteps 0 to {high[0]:.0f}")
    draw.rectangle([10, 48, width - 10, 192], outline="lightgrey")
    for (run_number, thickness), points in lines.items():
        colour = COLOURS[run_number]
        shares = (points - low) / (high - low + 1e-9)
        pixels = (13, 188) + shares * (width - 26, -136)
        draw.line(list(pixels.flat), colour, thickness)
        for pixel in pixels:  # there may be one alone
            draw.circle(pixel, thickness // 2, colour)
    return panel


def show_runs(argv):
    """python train.py show RUN [RUN ...]: compare runs, in two pictures and a table."""
    parser = argparse.ArgumentParser("train.py show",
        description="Draw how runs went and what switches chose; print final scores.")
    parser.add_argument("runs", nargs="+", type=Path,
        help="folders of runs; each gets a switches.gif")
    parser.add_argument("-o", "--out", type=Path,
        help="what all switches chose, beside it curves.png; None: first RUN/switches.png")
    args = parser.parse_args(argv)
    out = args.out or args.runs[0] / "switches.png"
    if out.name == "curves.png":
        parser.error("--out: curves.png is the name of the second picture; choose another")
    draw_runs(args.runs, out)
    for folder in args.runs:
        scores = {}
        for line in read_metrics(folder):
            scores |= line.get("scores", {})
        for path in folder.glob("result.json"):
            scores |= read_json(path)["results"].get("val", {"hard": {}})["hard"]
        scores.pop("images", None)  # a count, not a score
        numbers = [f"{name} {value:.3f} " for name, value in scores.items()]
        text = " ".join(numbers)
        print(f"{folder!s:24} {text}")
    print(out)


def main(argv):
    """Pretrain, or show; argv: the command line without the script's name."""
    if argv[:1] == ["show"]:
        return show_runs(argv[1:])
    args, checkpoint = parse_args(argv)
    return launch(args, lambda: pretrain(args, checkpoint))


if __name__ == "__main__":
    run(main)
