"""train.py: pretraining, from pixels or from a feature store to a checkpoint
============================================================================

Where this stands

    toy world --extract_features.py--> feature store --data.py--> batches
                                                                    |
        AdamW, warm-up, temperature(pairs seen)  --->  SwitchBertForPretraining (switchbert.py)
                                                                    |
        runs/pretrain/  checkpoint.pt  metrics.csv  config.json  switches.png  --->  finetune.py

    B batch, T word pieces, R regions, F region feature, C region classes

    python train.py                     the whole toy run: about 5 minutes on two CPU cores

It draws scenes, trains a Faster R-CNN on them, extracts regions, pretrains, and evaluates on scenes
that nothing was trained on. What a run finds ready in runs/world/ it does not make again. It prints
one line an evaluation:

    step  300/1500  tau 2.68  loss mlm 1.21 mrc 0.93 itm 0.69 | words .52  match .50 | 41 s

`words` is the share of masked word pieces that were predicted right, `match` the accuracy of
image-text matching (chance: .50), both on held-out scenes with hard switches. At the end: retrieval
among 100 scenes that the model never saw, and what every layer chose, as a picture.

Map of the file

    1. The run          settings, devices, threads, seeds
    2. The toy world    from scene numbers to a feature store, captions and a vocabulary
    3. Optimisation     parameter groups, learning rate, temperature
    4. Evaluation       losses and accuracies, zero-shot retrieval
    5. The record       checkpoint, metrics.csv, switches.png
    6. Training         the loop

Departures from the paper: A5 (temperature by pairs), A7 (VOLTA's settings), A10 (slow gates), D2
(the toy run's sizes, learning rate and annealing).
"""

import argparse
import csv
import json
import math
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from data import (
    HELD_OUT_SCENES,
    TRAIN_SCENES,
    BadInput,
    FeatureStore,
    PretrainingDataset,
    Scene,
    WordPiece,
    build_vocab,
    collate,
    lengths_to_mask,
    normalise_boxes,
    pad,
    write_whole,
)
from switchbert import MATCH, SwitchBertConfig, SwitchBertForPretraining, temperature

# --- 1. The run -----------------------------------------------------------------------------------


def parse_args(argv=None):
    """The settings of a run. The defaults are the toy run's."""
    p = argparse.ArgumentParser(
        description="Pretrain Switch-BERT.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument(
        "--out", type=Path, default=Path("runs/pretrain"), help="folder of this run's results"
    )
    p.add_argument(
        "--world", type=Path, default=Path("runs/world"), help="folder of the toy regions"
    )
    p.add_argument("--scenes", type=int, default=4000, help="training scenes of the toy world")
    p.add_argument(
        "--switches",
        default="learned",
        choices=["learned", "intra", "single", "dual", "late"],
        help="learn the switches, or freeze them into a known architecture",
    )
    p.add_argument("--steps", type=int, default=1000, help="optimiser steps")
    p.add_argument("--batch", type=int, default=64, help="image-caption pairs a step")
    p.add_argument("--lr", type=float, default=1e-3, help="highest learning rate")
    p.add_argument("--seed", type=int, default=0, help="all randomness follows from it")
    p.add_argument("--eval-every", type=int, default=250, help="steps between evaluations")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument(
        "--threads",
        type=int,
        default=available_cores(),
        help="CPU threads. On a machine that is busy with something else use 1: a second thread "
        "that must wait for a core makes every operation wait",
    )
    return p.parse_args(argv)


def available_cores():
    """Cores this process may use: containers and job schedulers allow fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --- 2. The toy world -----------------------------------------------------------------------------

NUM_HELD_OUT = 400  # scenes for the losses and accuracies; the first 100 of them for retrieval


def toy_world(folder, num_scenes):
    """(store, training captions, held-out captions, tokenizer) of the toy world, made where it is
    missing.

    Captions are (image id, text) pairs; a scene's id is its number.
    """
    numbers = [
        *range(TRAIN_SCENES, TRAIN_SCENES + num_scenes),
        *range(HELD_OUT_SCENES, HELD_OUT_SCENES + NUM_HELD_OUT),
    ]
    store_folder, vocab_file = folder / f"features-{num_scenes}", folder / "vocab.txt"
    if not FeatureStore.is_complete(store_folder):
        # Only here: whoever has a store needs no torchvision.
        from extract_features import extract_scenes, toy_detector

        extract_scenes(
            toy_detector(folder / "detector.pt", numbers[:num_scenes]), numbers, store_folder
        )
    captions = [(n, text) for n in numbers for text in Scene(n).captions()]
    training, held_out = captions[: -4 * NUM_HELD_OUT], captions[-4 * NUM_HELD_OUT :]
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


# --- 3. Optimisation ------------------------------------------------------------------------------


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
        [dict(params=p, weight_decay=d, scale=s) for (d, s), p in groups.items()],
        lr=lr,
        betas=(0.9, 0.999),
        eps=1e-6,
        fused=True,
    )


# --- 4. Evaluation --------------------------------------------------------------------------------


def to_device(batch, device):
    return {
        k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()
    }


@torch.inference_mode()
def evaluate(model, dataset, device, batch_size=200, look=None):
    """Held-out losses and accuracies, and what the switches chose (hard): two dicts.

    look: a function that changes each batch before the model sees it, or None.
    """
    model.eval()
    sums, counts, correct, modes, depths = 0, 0, 0, 0, 0
    for start in range(0, len(dataset), batch_size):
        batch = collate([dataset[i] for i in range(start, min(start + batch_size, len(dataset)))])
        out = model(**to_device(look(batch) if look else batch, device))
        sums, counts, correct = sums + out.sums, counts + out.counts, correct + out.correct
        modes = modes + out.encoder.modes.sum(dim=0)  # (layers, 2, 3)
        layers = [d.sum(dim=0) for d in out.encoder.depths]  # (2, l+1) each
        depths = [a + b for a, b in zip(depths, layers)] if depths else layers
    losses, n = (sums / counts.clamp(min=1)).tolist(), len(dataset)
    return (
        dict(
            zip(("val_mlm", "val_mrc", "val_itm"), losses),
            mlm_accuracy=(correct[0] / counts[0]).item(),
            itm_accuracy=(correct[1] / counts[2]).item(),
        ),
        {"modes": (modes / n).tolist(), "depths": [(d / n).tolist() for d in depths]},
    )


@torch.inference_mode()
def match_scores(model, store, tokenizer, texts, image_ids, device, max_tokens=38, batch_size=500):
    """(texts, images): the log odds that text i and image j belong together, by the pretrained ITM
    head.
    """
    model.eval()
    rows = [store[store.row(i)] for i in image_ids]
    images = dict(
        region_features=pad([r["features"] for r in rows]),
        region_boxes=pad([normalise_boxes(r["boxes"], r["size"]) for r in rows]),
        region_mask=lengths_to_mask([r["boxes"] for r in rows]),
    )
    ids = [np.array(tokenizer.encode(text, max_tokens)) for text in texts]
    words = dict(input_ids=pad(ids), text_mask=lengths_to_mask(ids))
    pairs = torch.cartesian_prod(
        torch.arange(len(texts)), torch.arange(len(rows))
    )  # (texts x images, 2)
    scores = []
    for chunk in tqdm(pairs.split(batch_size), desc="scoring pairs", leave=False, disable=None):
        batch = {k: v[chunk[:, 0]] for k, v in words.items()} | {
            k: v[chunk[:, 1]] for k, v in images.items()
        }
        logits = model.itm_logits(model.bert(**to_device(batch, device)).pooled).float()
        scores.append((logits[:, MATCH] - logits[:, 1 - MATCH]).cpu())
    return torch.cat(scores).view(len(texts), len(rows))


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
    return {
        f"{name} R@{k}": (rank < k).float().mean().item()
        for name, rank in (("image", image_rank), ("text", text_rank))
        for k in ks
    }


def without_pictures(batch):
    """The same batch for a model that sees only the words: one empty region a pair, nothing to
    predict.
    """
    b = len(batch["input_ids"])
    blank = dict(
        region_features=batch["region_features"].new_zeros(
            b, 1, batch["region_features"].shape[-1]
        ),
        region_boxes=torch.zeros(b, 1, 5),
        region_mask=torch.zeros(b, 1, dtype=torch.long),
        mrc_mask=torch.zeros(b, 1, dtype=torch.bool),
        mrc_targets=None,
        itm_labels=torch.full((b,), MATCH),  # so that every sentence counts
    )
    return {**batch, **blank}


# --- 5. The record --------------------------------------------------------------------------------


def save_checkpoint(path, model, tokenizer, store, progress):
    """Everything that a later script needs, as plain values and tensors (torch.load's
    weights_only=True).
    """
    checkpoint = {
        "config": asdict(model.config),
        "model": model.state_dict(),
        "vocab": tokenizer.pieces,
        "store": {k: store.meta[k] for k in ("detector", "feature_size", "num_region_classes")},
        **progress,
    }
    write_whole(path, lambda f: torch.save(checkpoint, f), mode="wb")


def append_row(path, row):
    """Add a line to a CSV; the first one brings the header."""
    new = not path.exists()
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(row))
        if new:
            writer.writeheader()
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


MODE_COLOURS = {
    "own kind only": (66, 114, 196),
    "other kind only": (237, 125, 49),
    "both together": (112, 173, 71),
}


def draw_switches(path, switches, title):
    """A picture of what every layer chose: for text and vision, whom it attends to and which depth
    it reads.

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
    draw.text(
        (x, 45),
        "squares: the darker, the more often this depth is read (0 = the embeddings)",
        "black",
        font,
    )
    for modality, name in enumerate(("text", "vision")):
        _draw_panel(
            draw, (modality * panel, top, cell, bar, left), name, modality, switches, font, big
        )
    write_whole(path, lambda f: image.save(f, "PNG"), mode="wb")


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
                [at, y, at + cell - 3, y + cell], fill=(shade, shade, shade), outline="grey"
            )
            if 0.005 < share:
                draw.text(
                    (at + 4, y + 9), f"{100 * share:.0f}", "white" if share > 0.5 else "black", font
                )


# --- 6. Training ----------------------------------------------------------------------------------


def toy_config(store, tokenizer, switches):
    """The toy run's model: 4 layers x 128, under a million parameters. DEVIATION D2."""
    return SwitchBertConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=40,
        pooler_size=128,
        switches=switches,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        region_feature_size=store.feature_size,
        num_region_classes=store.num_region_classes,
    )


def batches(dataset, steps, batch_size, seed):
    """`steps` batches; every epoch in another order, which follows from (seed, epoch) alone."""
    done = 0
    for epoch in range(steps):
        dataset.set_epoch(epoch)
        order = np.random.default_rng([seed, epoch]).permutation(len(dataset))
        for start in range(0, len(order) - batch_size + 1, batch_size):
            if done == steps:
                return
            yield collate([dataset[i] for i in order[start : start + batch_size]])
            done += 1


def train(model, dataset, args, look=None, on_step=None):
    """Optimise `model` for args.steps steps; on_step(step, output) after each."""
    optimizer = make_optimizer(model, args.lr)
    # The temperature reaches its floor, 5.0 / 0.2 = 25 times lower, at 90 % of the run (A5, D2).
    rate = math.log(25) / (0.9 * args.steps * args.batch)
    bar = tqdm(
        batches(dataset, args.steps, args.batch, args.seed),
        total=args.steps,
        leave=False,
        disable=None,
        desc="training",
    )
    for step, batch in enumerate(bar):
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = group["scale"] * learning_rate(step, args.steps, args.lr)
        tau = temperature(step * args.batch, rate=rate)
        out = model(**to_device(look(batch) if look else batch, args.device), temperature=tau)
        optimizer.zero_grad(set_to_none=True)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        if on_step:
            on_step(step + 1, tau, out)


class Progress:
    """What a run says and writes while it trains: call it after each step.

    Every args.eval_every steps it evaluates, prints one line and adds one to metrics.csv.
    `switches` holds what the switches chose at the last evaluation.
    """

    def __init__(self, model, held_out, held_out_whole, args, started):
        self.model, self.held_out, self.held_out_whole = model, held_out, held_out_whole
        self.args, self.started, self.losses, self.steps = args, started, torch.zeros(3), 0
        (args.out / "metrics.csv").unlink(missing_ok=True)

    def __call__(self, step, tau, out):
        self.losses += out.losses.detach().cpu()
        self.steps += 1
        if step % self.args.eval_every and step != self.args.steps:
            return
        self.scores, self.switches = evaluate(self.model, self.held_out, self.args.device)
        whole, _ = evaluate(self.model, self.held_out_whole, self.args.device)
        self.scores["itm_accuracy"] = whole["itm_accuracy"]
        row = dict(
            step=step,
            pairs=step * self.args.batch,
            temperature=tau,
            seconds=time.time() - self.started,
            **dict(zip(("mlm", "mrc", "itm"), (self.losses / self.steps).tolist())),
            **self.scores,
        )
        self.losses, self.steps = torch.zeros(3), 0
        append_row(self.args.out / "metrics.csv", row)
        line = (
            "step {step:5d}/{steps}  tau {temperature:.2f}  loss mlm {mlm:.2f} mrc {mrc:.2f} "
            "itm {itm:.2f} | words {mlm_accuracy:.3f}  match {itm_accuracy:.3f} | {seconds:.0f} s"
        )
        print(line.format(**row, steps=self.args.steps), flush=True)


def text_only_accuracy(config, training, held_out, args, steps=150):
    """Masked-word accuracy of a model of the same size that never sees a picture: what words alone
    give. It learns the pattern of the sentences, which takes few steps (README: more do not help).
    """
    torch.manual_seed(args.seed)
    blind = SwitchBertForPretraining(config).to(args.device)
    settings = argparse.Namespace(**{**vars(args), "steps": steps})
    train(blind, training, settings, look=without_pictures)
    return evaluate(blind, held_out, args.device, look=without_pictures)[0]["mlm_accuracy"]


def zero_shot(model, store, tokenizer, captions, args):
    """Retrieval recalls of the pretrained matching head, one caption for each of these images."""
    ids, texts = zip(*captions)
    scores = match_scores(model, store, tokenizer, texts, ids, args.device)
    return recall_at(scores, torch.arange(len(ids)))


def run(args):
    """A whole toy run; returns its last measurements as a dict."""
    torch.set_num_threads(args.threads)
    started = time.time()
    args.out.mkdir(parents=True, exist_ok=True)
    store, captions, held_out_captions, tokenizer = toy_world(args.world, args.scenes)
    training = PretrainingDataset(store, captions, tokenizer, seed=args.seed)
    held_out, whole = (
        PretrainingDataset(store, held_out_captions, tokenizer, seed=args.seed + 1, masking=masking)
        for masking in (True, False)
    )
    torch.manual_seed(args.seed)  # here: whether the detector was trained just now or found ready
    model = SwitchBertForPretraining(toy_config(store, tokenizer, args.switches)).to(args.device)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    about = {"settings": settings, "model": asdict(model.config), "torch": torch.__version__}
    write_whole(args.out / "config.json", lambda f: json.dump(about, f, indent=1))
    num_parameters = sum(p.numel() for p in model.parameters())
    print(
        f"pretraining: {len(training)} pairs, {num_parameters:,} parameters, {args.steps} steps of "
        f"{args.batch} pairs on {args.device} with {args.threads} threads",
        flush=True,
    )
    progress = Progress(model, held_out, whole, args, started)
    train(model, training, args, on_step=progress)
    done = dict(step=args.steps, pairs_seen=args.steps * args.batch)
    save_checkpoint(args.out / "checkpoint.pt", model, tokenizer, store, done)
    title = "What every layer of this Switch-BERT chose"
    draw_switches(args.out / "switches.png", progress.switches, title)
    recall = zero_shot(model, store, tokenizer, held_out_captions[: 4 * 100 : 4], args)
    print("zero-shot among 100: " + ", ".join(f"{k} {v:.2f}" for k, v in recall.items()))
    blind = text_only_accuracy(model.config, training, held_out, args)
    print(f"masked words: {progress.scores['mlm_accuracy']:.3f} with pictures, {blind:.3f} without")
    print(f"{args.out}: checkpoint.pt, metrics.csv, config.json, switches.png")
    print(f"done in {time.time() - started:.0f} s", flush=True)
    return {**progress.scores, **recall, "text_only_mlm_accuracy": blind}


def main():
    """Run, and say in one sentence what is wrong with the input if something is."""
    try:
        run(parse_args())
    except BadInput as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
