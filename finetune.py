"""finetune.py: from a pretrained checkpoint to answers, rankings and boxes
=========================================================================

Where this stands

    train.py --> runs/pretrain/checkpoint.pt --+
                                               |   python finetune.py vqa | retrieval | refer
    feature store, questions, captions,        v
    expressions ------------------>  SwitchBert --> pooled (B, P) --> answers (B, A)      VQA
                                               |              \\-> score of the pair (B,)  retrieval
                                               \\-> region_states (B, R, D) --> (B, R)    referring
                                                          |
        runs/vqa/  checkpoint.pt  result.json  predictions.json  switches.png  examples.png

    B batch, R regions, D hidden, P pooled, A answers

    python train.py                                    first: the checkpoint
    python finetune.py vqa                             answers to questions about scenes
    python finetune.py retrieval                       texts find images, images find texts
    python finetune.py refer                           phrases find regions
    python finetune.py ask picture.png "how many things are there ?"
    python finetune.py match "a red star" a.png b.png
    python finetune.py point picture.png "the red star"

With a folder data/vqa, data/retrieval or data/refer a task means the real files and the paper's
settings, without it the toy world. Every task is one class that says what its examples are, its
model, its loss and its metric; the loop, the processes, stopping and resuming are train.py's. A run
prints a line an evaluation, and at the end a table:

    step   100/202  lr 5.7e-04  tau 0.42  loss 0.573 | held-out 0.969 | 1430 expressions/s, 9 s
    val, detected boxes                         hard          soft  from scratch (202 steps)
      accuracy                                 0.990         0.990                     0.991

Map of the file

    1. Settings        flags, and what the toy run and the full run set them to
    2. Answers         the official normalisation and accuracy of VQA
    3. Tasks           what the three share; VQA, Retrieval, Refer
    4. The run         training, hard and soft evaluation, the files of a result
    5. Pictures        examples with answers, captions and boxes
    6. Your picture    ask, match, point

Departures from the paper: A8 (heads, losses), A11 (targets), D3 (sizes of the toy runs).
"""

import argparse
import copy
import json
import pickle
import re
import sys
import textwrap
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from data import (HELD_OUT_SCENES, TRAIN_SCENES, BadInput, FeatureStore, Scene, WordPiece,
    canonical_id, expecting, model_inputs, normalise_boxes, read_captions, read_json, region_inputs,
    write_whole)
from switchbert import (SwitchBertConfig, SwitchBertForReferring, SwitchBertForRetrieval,
    SwitchBertForVQA)
from train import (NUM_HELD_OUT, Parts, Run, add_run_flags, autocast_for, check_fits, complete,
    device, first_process_first, launch, learning_rate, load_checkpoint, make_optimizer,
    match_scores, num_switches, quiet, rank, recall_at, say, set_learning_rate, settle,
    switch_shares, switch_sums, switches_picture, to_device, total, toy_world, train_step,
    world_size)

# --- 1. Settings ----------------------------------------------------------------------------------

# What the data decide unless a flag does. FULL is the paper's [supp. 2]; the batches are VOLTA's.
# The toy runs (DEVIATION D3) take the pretraining's learning rate, and close their switches.
FULL = dict(epochs=20, batch=256, lr=1e-4, eval_every=1000, anneal=None)
TOY = dict(epochs=3, batch=64, lr=1e-3, eval_every=250, anneal=0.9)
FULL_OF = {"vqa": FULL, "retrieval": {**FULL, "batch": 64}, "refer": FULL}
# Pointing is learned in 100 steps, so it is looked at often: what pretraining gives is a start.
TOY_OF = {"vqa": TOY, "retrieval": {**TOY, "epochs": 1, "batch": 32},
    "refer": {**TOY, "epochs": 1, "eval_every": 25}}


def parse_args(argv=None):
    """The settings of a run, or of one question about one picture."""
    p = argparse.ArgumentParser(description="Finetune Switch-BERT, evaluate it, and ask it.")
    commands = p.add_subparsers(dest="command", required=True)
    for name, task in TASKS.items():
        c = commands.add_parser(name, help=task.__doc__,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        c.add_argument("--checkpoint", type=Path, default=Path("runs/pretrain/checkpoint.pt"),
            help="pretrained checkpoint to start from")
        c.add_argument("--data", type=Path, help=f"folder with {task.files}; default: data/{name} "
            "if there is one, otherwise the toy world")
        c.add_argument("--scratch", action="store_true", help="start from random weights of the "
            "checkpoint's sizes: what is pretraining worth?")
        c.add_argument("--boxes", choices=["detected", "gt"], default="detected",
            help="the store to use: features-detected/ or features-gt/ (true boxes)"
            if name == "refer" else argparse.SUPPRESS)
        toy, full = TOY_OF[name], FULL_OF[name]
        add_run_flags(c, Path("runs") / name,
            {k: f"toy world: {toy[k]}, data folder: {full[k]}" for k in toy})
    for name, (words, help, _) in OWN.items():
        c = commands.add_parser(name, help=help)
        for word in words.split():
            c.add_argument(word, nargs="+" if word == "images" else None)
        c.add_argument("--checkpoint", type=Path, help="of the finetuned model",
            default=Path("runs") / ASKS[name] / "checkpoint.pt")
        c.add_argument("--weights", type=Path, help="the detector's; default: the toy world's")
        c.add_argument("--out", type=Path, default=Path(f"{name}.png"), help="picture to write")
    return p.parse_args(argv)


# --- 2. Answers -----------------------------------------------------------------------------------
#
# The official evaluation of VQA v2 (visualqa.org), with its quirks, because numbers are only
# comparable with them.

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
DIGITS = {word: str(n) for n, word in enumerate(
    "zero one two three four five six seven eight nine ten".split())} | {"none": "0"}
CONTRACTED = """ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't
    hadn't've hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am
    mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't
    she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
    someone'd've someone'll someone's something'd something'd've something'll that's there'd
    there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've
    weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll
    who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've
    you'd you'd've you'll you're you've""".split()
# The official table maps each form with one apostrophe missing to the whole one, and does once the
# opposite. (It leaves out what is a word without its apostrophe: hell, ill, were, its.)
CONTRACTIONS = {word[:i] + word[i + 1 :]: word
    for word in CONTRACTED for i, c in enumerate(word) if c == "'"} | {"somebody'd": "somebodyd"}


def normalise_answer(answer):
    """An answer as the official evaluation compares it: 'The red-car!' -> 'red car', 'two' -> '2'.

    A sign becomes a space, but nothing if it touches a space anywhere in the answer, or if the
    answer has a comma between digits. A full stop stays before a digit only.
    """
    text = answer = answer.replace("\n", " ").replace("\t", " ").strip()
    thousands = re.search(r"\d,\d", answer)
    for sign in PUNCTUATION:
        apart = f"{sign} " in answer or f" {sign}" in answer
        text = text.replace(sign, "" if apart or thousands else " ")
    # The official pattern begins with (?!<=\d), a misspelt look-behind that is always true; and it
    # passes re.UNICODE, 32, where the number of replacements belongs.
    text = re.sub(r"\.(?!\d)", "", text, count=32)
    words = [DIGITS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(w, w) for w in words if w not in ("a", "an", "the"))


def accuracy_table(answers):
    """{answer: official accuracy} of every answer that scores above zero, and whether answers are
    compared as they are (True) or normalised (False: where the annotators do not all agree).

    answers: those of the annotators, ten as a rule. Officially each is left out once and a
    prediction scores min(1, matches among the others / 3); the mean over all. With n matches among
    N that is ((N - n) min(1, n/3) + n min(1, (n-1)/3)) / N, for N = 10: 0, .3, .6, .9, 1, 1, ...
    """
    exact, people = len(set(answers)) == 1, len(answers)
    counts = Counter(answers if exact else map(normalise_answer, answers))
    return {a: ((people - n) * min(1, n / 3) + n * min(1, (n - 1) / 3)) / people
        for a, n in counts.items()}, exact


def answer_accuracy(prediction, answers):
    """Official accuracy of a prediction, 0 to 1."""
    table, exact = accuracy_table(answers)
    return table.get(prediction if exact else normalise_answer(prediction), 0.0)


def answer_vocabulary(questions, least=9):
    """The answers that a model chooses from: each is the majority answer of `least` questions,
    normalised and without commas, the most frequent first. On VQA v2's train and val: 3,129.
    """
    counts = Counter(normalise_answer(q["majority"]).replace(",", "") for q in questions)
    return sorted((a for a, n in counts.items() if n >= least), key=lambda a: (-counts[a], a))


# --- 3. Tasks -------------------------------------------------------------------------------------


class Task(torch.utils.data.Dataset):
    """Texts about images: the training examples, the held-out splits, and what is made of them.

    An item is a dict with image_id, text, and what the task needs. splits: {name: items}, with
    "train" among them. Training items whose image has no features are left out; a held-out item
    without features is answered from its text alone, so that a result covers every question.

    Each task says: name, unit, files, model, max_tokens [supp. 2]; from_folder and from_scenes ->
    splits; collate; loss(logits, batch); judge_one and panel, of one item.
    """

    blind = False  # True: without pictures

    def __init__(self, store, tokenizer, splits, seed=0, limit=None, labels=None):
        self.store, self.tokenizer, self.seed, self.labels = store, tokenizer, seed, labels
        self.splits = {k: v for k, v in splits.items() if k != "train" and v}
        items = splits.get("train", [])
        found = [i for i in items if store.row(i["image_id"]) is not None]
        self.items = found[:limit]
        if len(found) < len(items):
            say(f"left out: {len(items) - len(found)} of {len(items)} training {self.unit}, whose "
                f"image is not in {store.folder}")
        if not self.items:
            raise BadInput(
                f"{store.folder}: none of {len(items)} training {self.unit} has its image here")

    def __len__(self):
        return len(self.items)

    def __getitem__(self, key):
        epoch, index = key
        return self.example(self.items[index])

    def example(self, item):
        """What the model reads of an item, and the item: numpy arrays."""
        regions = region_inputs(self.store, item["image_id"], blank=self.blind)
        ids = np.array(self.tokenizer.encode(item["text"], self.max_tokens))
        return dict(regions, input_ids=ids, item=item)

    @classmethod
    def new_model(cls, config, labels):
        """The task's model, new; labels: what it chooses from, None where that is no fixed list."""
        return cls.model(config) if labels is None else cls.model(config, len(labels))

    def head(self, config, weights):
        """The task's model: its encoder from these weights (None: new), its head new."""
        model = self.new_model(config, self.labels)
        if weights is not None:
            bert = {k: v for k, v in weights.items() if k.startswith("bert.")}
            model.load_state_dict(bert, strict=False)
        return model

    def sums(self, model, batch, tau):
        """(1,): the loss, added up over the examples of a batch."""
        inputs = {k: v for k, v in batch.items() if k != "targets"}
        logits, _ = model(**inputs, temperature=tau)
        return self.loss(logits.float(), batch)[None]

    @staticmethod
    def counts(batch):
        """(1,): examples; every loss here is a mean over them."""
        return torch.tensor([float(len(batch["targets"]))])

    @torch.no_grad()
    def predict(self, model, items, tau=None, batch_size=200):
        """(N,) the best answer or region of every item, and what the switches chose. (Retrieval has
        nothing to choose, one score an item: of its predictions only the switches are read.)

        The processes share the batches, whole ones, so that what a batch is padded to, and with it
        every rounding, is the same for any number of them.
        """
        model.eval()
        found = torch.zeros(len(items), dtype=torch.long, device=device())
        switches = torch.zeros(num_switches(model.config), device=device())
        starts = range(rank() * batch_size, len(items), world_size() * batch_size)
        for s in tqdm(starts, desc="evaluating", leave=False, disable=quiet()):
            part = [self.example(item) for item in items[s : s + batch_size]]
            logits, out = model(**to_device(model_inputs(part)), temperature=tau)
            found[s : s + len(part)] = logits.argmax(dim=-1)
            switches += switch_sums(out)
        shares = switch_shares(total(switches).cpu() / max(1, len(items)), model.config)
        return total(found).cpu(), shares

    def judge(self, items, choices):
        """(scores, predictions) of choices (N,): means over the items that have such a score, the
        task's result first; and what was chosen, a list of dicts for a file.
        """
        groups, predictions = defaultdict(list), []
        for item, choice in zip(items, choices.tolist()):
            prediction, scores = self.judge_one(item, choice)
            predictions.append(prediction)
            for name, score in scores.items():
                groups[name].append(score)
        return {name: float(np.mean(values)) for name, values in groups.items()}, predictions

    def evaluate(self, model, items, tau=None, keep=None):
        """(scores, predictions) of held-out items; keep: Retrieval's."""
        return self.judge(items, self.predict(model, items, tau)[0])

    def look(self, model, items):
        """Hard scores of some items, and what the switches chose: between steps of training."""
        choices, switches = self.predict(model, items)
        return self.judge(items, choices)[0], switches


class VQA(Task):
    """questions about pictures, answered from a vocabulary of answers [VQA v2]"""

    name, unit, max_tokens, model = "vqa", "questions", 23, SwitchBertForVQA
    files = "features/ and VQA v2's questions and annotations (*.json)"

    @staticmethod
    def from_folder(folder):
        """The splits of a folder with any of VQA v2's JSON files, recognised by what is in them."""
        files = {path: read_json(path, dict) for path in sorted(folder.glob("*.json"))}
        annotations, splits = {}, defaultdict(list)
        for path, content in files.items():
            if not content.keys() & {"questions", "annotations"}:
                raise BadInput(f"{path}: expected the key 'questions' or 'annotations', found "
                    + ", ".join(map(repr, list(content)[:5])))
            for number, a in enumerate(content.get("annotations", [])):
                with expecting("question_id", path, "annotation", number):
                    annotations[a["question_id"]] = a
        expected = "image_id, question, question_id, and annotations with answers and types"
        for path, content in files.items():
            subset = str(content.get("data_subtype", path.stem))
            split = next((s for s in ("train", "val", "test") if s in subset), subset)
            for q in content.get("questions", []):
                with expecting(expected, path, "question", q):
                    item = dict(image_id=q["image_id"], text=q["question"],
                        question_id=q["question_id"], answers=[])
                    if a := annotations.get(q["question_id"]):
                        item |= dict(answers=[given["answer"] for given in a["answers"]],
                            majority=a["multiple_choice_answer"], answer_type=a["answer_type"],
                            question_type=a["question_type"])
                # test-dev2015 is a part of test2015: each has its own submission.
                splits[split if item["answers"] else subset].append(item)
        if not splits.get("train"):
            raise BadInput(f"{folder}: no training questions with annotations here; expected "
                "v2_OpenEnded_mscoco_train2014_questions.json and "
                "v2_mscoco_train2014_annotations.json")
        return splits

    @staticmethod
    def from_scenes(training, held_out):
        """The toy world's questions, in the form of VQA v2's: ten annotators who agree."""
        def items(numbers, n):
            """n questions about each scene."""
            for number in numbers:
                for k, (text, answer, kind) in enumerate(Scene(number).questions(n)):
                    sort = "yes/no" if answer in ("yes", "no") else "other"
                    yield dict(image_id=number, text=text, question_id=1000 * number + k,
                        majority=answer, answers=[answer] * 10,
                        answer_type="number" if kind == "count" else sort, question_type=kind)
        return {"train": list(items(training, 8)), "val": list(items(held_out, 5))}

    def __init__(self, store, tokenizer, splits, seed=0, limit=None, labels=None):
        labels = labels or answer_vocabulary(splits["train"])
        super().__init__(store, tokenizer, splits, seed, limit, labels)
        self.index = {answer: i for i, answer in enumerate(labels)}

    def targets(self, item):
        """[(index, accuracy)] of the answers that would score.

        ASSUMPTION A11: a target is the accuracy that its answer would get, so looked up as the
        evaluation does. (hengyuan-hu's published targets, which most papers use, look the raw
        answers up; the two differ where annotators disagree in articles or contractions.)
        """
        table, _ = accuracy_table(item["answers"])
        return [(self.index[a], score) for a, score in table.items() if a in self.index]

    def collate(self, examples):
        """The encoder's inputs, and targets (B, A)."""
        targets = torch.zeros(len(examples), len(self.labels))
        for row, example in zip(targets, examples):
            for index, score in self.targets(example["item"]):
                row[index] = score
        return {**model_inputs(examples), "targets": targets}

    def loss(self, logits, batch):
        """Binary cross entropy, its mean over answers times their number: their sum."""
        return F.binary_cross_entropy_with_logits(logits, batch["targets"], reduction="sum")

    def judge_one(self, item, choice):
        """Official accuracy: overall, by type of answer and of question; and the best possible."""
        told = {"question_id": item["question_id"], "answer": self.labels[choice]}
        if not item["answers"]:
            return told, {}
        right = answer_accuracy(told["answer"], item["answers"])
        best = max((score for _, score in self.targets(item)), default=0.0)
        return told, {"accuracy": right, item["answer_type"]: right, item["question_type"]: right,
            "ceiling": best}

    def panel(self, item, told):
        """(image to show, boxes, lines, right) of an example."""
        right = answer_accuracy(told["answer"], item["answers"]) if item["answers"] else None
        truth = Counter(item["answers"] or ["?"]).most_common(1)[0][0]
        lines = [item["text"], f"answer: {told['answer']}", f"truth: {truth}"]
        return item["image_id"], [], lines, right


class Retrieval(Task):
    """texts that find their image, and images that find their texts [Karpathy's splits]"""

    name, unit, max_tokens, model = "retrieval", "captions", 30, SwitchBertForRetrieval
    files = "features/ and Karpathy's dataset_flickr30k.json or dataset_coco.json"

    @staticmethod
    def from_folder(folder):
        """The splits of the one caption file with splits in a folder."""
        files = sorted(folder.glob("*.json"))
        if len(files) != 1:
            raise BadInput(
                f"{folder}: expected one file of Karpathy's splits (*.json), found {len(files)}")
        return {split: [dict(image_id=i, text=t) for i, t in read_captions(files[0], split)]
            for split in ("train", "val", "test")}

    @staticmethod
    def from_scenes(training, held_out):
        """Captions of scenes: the first 100 held-out scenes are the test, the next 50 the val."""
        def items(numbers):
            return [dict(image_id=i, text=t) for i in numbers for t in Scene(i).captions(2)]
        return {"train": items(training), "val": items(held_out[100:150]),
            "test": items(held_out[:100])}

    def __init__(self, store, tokenizer, splits, seed=0, limit=None, labels=None):
        # Ids are compared below. Of a held-out image without features no pair can be scored.
        splits = {name: [{**i, "image_id": canonical_id(i["image_id"])} for i in items
            if name == "train" or store.row(i["image_id"]) is not None]
            for name, items in splits.items()}
        super().__init__(store, tokenizer, splits, seed, limit)
        self.images = list(dict.fromkeys(i["image_id"] for i in self.items))
        if len(self.images) < 3:
            raise BadInput(f"{store.folder}: captions of {len(self.images)} images; a caption is "
                "trained against other images', so three are needed at least")
        self.place = {image: k for k, image in enumerate(self.images)}
        self.nearest = None

    def prepare(self):
        """Find each image's nearest other one by its global feature: the hard negative."""
        n = len(self.images)
        means = torch.zeros(n, self.store.feature_size, device=device())
        mine = range(rank(), n, world_size())
        for k in tqdm(mine, desc="global features", leave=False, disable=quiet()):
            features = region_inputs(self.store, self.images[k])["region_features"]
            means[k] = torch.from_numpy(features.mean(axis=0, dtype=np.float32))
        means = F.normalize(total(means))
        nearest = torch.zeros(n, dtype=torch.long, device=device())
        for rows in torch.arange(n).split(1000)[rank() :: world_size()]:
            near = means[rows] @ means.T  # (1000, n) cosines
            near[torch.arange(len(rows)), rows] = -2  # not itself
            nearest[rows] = near.argmax(dim=1)
        self.nearest = total(nearest).tolist()

    def __getitem__(self, key):
        """The four candidates of a caption [ViLBERT]: its own image; its image with another image's
        caption; another image; the image most like its own. The first is right.
        """
        epoch, index = key
        rng = np.random.default_rng([self.seed, epoch, index])
        item = other = self.items[index]
        own = self.place[item["image_id"]]
        while other["image_id"] == item["image_id"]:
            other = self.items[rng.integers(len(self))]
        image = self.images[(own + 1 + rng.integers(len(self.images) - 1)) % len(self.images)]
        pairs = [item, {**item, "text": other["text"]}, {**item, "image_id": image},
            {**item, "image_id": self.images[self.nearest[own]]}]
        return [self.example(pair) for pair in pairs]

    def head(self, config, weights):
        """The task's model, its head too from these weights (None: all of it new)."""
        if weights is None:
            return super().head(config, None)
        return SwitchBertForRetrieval.from_pretraining(config, weights)

    def collate(self, examples):
        """The encoder's inputs of 4 B pairs, and targets (B,): which of four is right."""
        inputs = model_inputs([pair for four in examples for pair in four])
        return {**inputs, "targets": torch.zeros(len(examples), dtype=torch.long)}

    def loss(self, scores, batch):
        """Cross entropy over the four candidates."""
        return F.cross_entropy(scores.view(-1, 4), batch["targets"], reduction="sum")  # (B, 4)

    def look(self, model, items):
        """Recalls, and what the switches chose for texts and their own images."""
        return self.evaluate(model, items)[0], self.predict(model, items)[1]

    def evaluate(self, model, items, tau=None, keep=None):
        """Recalls over the full matrix of some texts and all of their images.

        keep: a file for the scores, or None. What is in it is not computed again.
        """
        images = list(dict.fromkeys(i["image_id"] for i in items))
        place = {image: k for k, image in enumerate(images)}
        own = torch.tensor([place[i["image_id"]] for i in items])
        scores = self.matrix(model, [i["text"] for i in items], images, tau, keep)
        found = recall_at(scores, own, ks=(1, 5, 10))
        if len(images) == 5000:  # COCO: the 1K protocol is the mean over five folds
            folds = []
            for k in range(0, 5000, 1000):
                texts = (own >= k) & (own < k + 1000)
                folds.append(recall_at(scores[texts, k : k + 1000], own[texts] - k, (1, 5, 10)))
            found |= {f"1K {name}": float(np.mean([f[name] for f in folds])) for name in found}
        best = scores.topk(min(10, len(images)), dim=1).indices.tolist()
        return found, [dict(image_id=item["image_id"], text=item["text"],
            found=[images[k] for k in ranked]) for item, ranked in zip(items, best)]

    def matrix(self, model, texts, images, tau, keep, block=100):
        """(texts, images) scores, by blocks of images; says how much that is and how long."""
        scores = torch.full((len(texts), len(images)), float("nan"))
        if keep and keep.exists():
            scores = torch.from_numpy(np.load(keep, allow_pickle=False))
        if len(images) > block:
            say(f"{len(texts)} texts x {len(images)} images = {scores.numel():,} pairs, of which "
                f"{int(scores.isnan().sum()):,} are to be scored")
        missing = [k for k in range(0, len(images), block)
            if scores[:, k : k + block].isnan().any()]
        start = time.time()
        for k in missing:
            part = images[k : k + block]
            scores[:, k : k + block] = match_scores(
                model, self.store, self.tokenizer, texts, part, self.max_tokens, tau)
            if keep and rank() == 0:
                write_whole(keep, lambda f: np.save(f, scores.numpy()), mode="wb")
            if k == missing[0] and len(images) > block:
                left = (time.time() - start) * (len(images) - k - len(part)) / len(part)
                say(f"after {len(part)} images: about {left / 60:.1f} minutes to go")
        return scores

    def panel(self, item, told):
        """(image to show, boxes, lines, right) of an example: the image that was found."""
        own, found = told["image_id"], told["found"]
        names = ["right" if i == own else f"image {i}" for i in found[:3]]
        return found[0], [], [item["text"], "found: " + ", ".join(names)], float(found[0] == own)


class Refer(Task):
    """phrases that mean one thing in a picture, and which box it is [RefCOCO+]"""

    name, unit, max_tokens, model = "refer", "expressions", 20, SwitchBertForReferring
    files = "features-detected/ or features-gt/, refs(unc).p and instances.json"

    @staticmethod
    def from_folder(folder):
        """The splits of RefCOCO+: train, val, testA (people), testB (all else)."""
        path, instances = next(folder.glob("refs*.p"), None), folder / "instances.json"
        if path is None:
            raise BadInput(f"{folder}: no refs(unc).p here")
        boxes, splits = {}, defaultdict(list)
        for number, a in enumerate(read_json(instances, dict).get("annotations", [])):
            with expecting("id and bbox, [x, y, width, height]", instances, "annotation", number):
                x, y, w, h = a["bbox"]
                boxes[a["id"]] = [x, y, x + w, y + h]
        for number, ref in enumerate(read_plain_pickle(path)):
            with expecting(f"ann_id (of {instances.name}), image_id, ref_id, split and sentences",
                    path, "entry", number):
                splits[ref["split"]] += [dict(image_id=ref["image_id"], text=s["sent"],
                    box=boxes[ref["ann_id"]], ref_id=ref["ref_id"], sent_id=s["sent_id"],
                    kind="expression") for s in ref["sentences"]]
        return splits

    @staticmethod
    def from_scenes(training, held_out):
        """The toy world's expressions; kind: attribute or relation, alike: things of its words."""
        def items(numbers, n):
            """n expressions about each scene."""
            for number in numbers:
                scene = Scene(number)
                for k, (text, index, kind) in enumerate(scene.expressions(n)):
                    thing = scene.things[index]
                    alike = len(scene.where(shape=thing["shape"])) if kind == "relation" else 1
                    yield dict(image_id=number, text=text, box=list(map(float, thing.box)),
                        ref_id=10 * number + k, sent_id=10 * number + k, kind=kind, alike=alike)
        return {"train": list(items(training, 8)), "val": list(items(held_out, 6))}

    def head(self, config, weights):
        """As every task's, without the pooler: this head reads region states, so no gradient
        reaches the pooler, and DistributedDataParallel would wait for one.
        """
        model = super().head(config, weights)
        model.bert.pooler.requires_grad_(False)
        return model

    def overlaps(self, item):
        """The item's regions, boxes (n, 4), and their IoU (n,) with the box that is meant."""
        row = self.store.row(item["image_id"])
        boxes = np.zeros((0, 4), np.float32) if row is None else self.store[row]["boxes"]
        return boxes, box_iou(boxes, np.array(item["box"], np.float32))

    def collate(self, examples):
        """The encoder's inputs, and targets (B, R): IoU, 0 for padding."""
        inputs = model_inputs(examples)
        targets = torch.zeros(inputs["region_mask"].shape)
        for row, example in zip(targets, examples):
            _, iou = self.overlaps(example["item"])
            row[: len(iou)] = torch.from_numpy(iou)
        return {**inputs, "targets": targets}

    def loss(self, logits, batch):
        """Binary cross entropy of every real region against its IoU with the box that is meant."""
        real = batch["region_mask"].bool()
        return F.binary_cross_entropy_with_logits(
            logits[real], batch["targets"][real], reduction="sum")

    def judge_one(self, item, choice):
        """Has the chosen region IoU >= .5, and has any (the oracle)? In the toy world by kind."""
        boxes, iou = self.overlaps(item)
        box, reached = (boxes[choice].tolist(), float(iou[choice])) if len(iou) else (None, 0.0)
        told = {"ref_id": item["ref_id"], "sent_id": item["sent_id"], "box": box, "iou": reached}
        right = float(reached >= 0.5)
        scores = {"accuracy": right, "oracle": float((iou >= 0.5).any())}
        if item["kind"] != "expression":
            scores[item["kind"]] = right
        if item["kind"] == "relation":  # whoever knows the words and not the places
            scores["relation by attributes alone"] = 1 / item["alike"]
        return told, scores

    def panel(self, item, told):
        """(image to show, boxes, lines, right) of an example: meant white, chosen magenta."""
        boxes = [(item["box"], "white")] + ([(told["box"], "magenta")] if told["box"] else [])
        lines = [item["text"], f"IoU {told['iou']:.2f}"]
        return item["image_id"], boxes, lines, float(told["iou"] >= 0.5)


TASKS = {task.name: task for task in (VQA, Retrieval, Refer)}


def box_iou(boxes, box):
    """(n, 4), (4,) corners -> (n,) intersection over union."""
    low, high = np.maximum(boxes[:, :2], box[:2]), np.minimum(boxes[:, 2:], box[2:])
    both = np.clip(high - low, 0, None).prod(axis=1)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) + (box[2:] - box[:2]).prod()
    return both / np.maximum(area - both, 1e-9)


class PlainUnpickler(pickle.Unpickler):
    """Reads lists, dicts, strings and numbers. A pickle can name any class or function and call it
    while it is read; here there is none to be had.
    """

    def find_class(self, module, name):
        """Refuse what a pickle names."""
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_plain_pickle(path):
    """A pickle of plain values, of Python 2 or 3; Python 2's strings are read as Latin-1."""
    try:
        with open(path, "rb") as file:
            return PlainUnpickler(file, encoding="latin1").load()
    except Exception as error:  # whatever a broken pickle makes of its bytes
        raise BadInput(
            f"{path}: not a pickle of plain lists, dicts and strings ({error})") from error


# --- 4. The run -----------------------------------------------------------------------------------


def load_task(kind, folder, boxes):
    """(store, splits) of a task's folder, or of the toy world where it is None."""
    if folder is not None:
        features = f"features-{boxes}" if kind is Refer else "features"
        return FeatureStore(folder / features), kind.from_folder(folder)
    if boxes != "detected":
        raise BadInput("--boxes gt: the toy world has detected boxes only")
    with first_process_first():
        store = toy_world()[0]
    return store, kind.from_scenes(range(TRAIN_SCENES, TRAIN_SCENES + len(store) - NUM_HELD_OUT),
        range(HELD_OUT_SCENES, HELD_OUT_SCENES + NUM_HELD_OUT))


def load_checkpoint_of(task, path, user="this"):
    """The checkpoint of a file, or BadInput if it is of another task than its user needs."""
    checkpoint = load_checkpoint(path)
    if checkpoint["task"] != task:
        raise BadInput(
            f"{path}: a checkpoint of {checkpoint['task']}, but {user} needs one of {task}")
    return checkpoint


class Finetuning(Run):
    """A task trained from a pretrained checkpoint with train.py's loop. [supp. 2]"""

    clip, weight_decay, initial_temperature = 1.0, 1e-4, 1.0
    # Gates learn as fast as the rest: a pretrained gate that is right 9 times out of 10 makes one
    # sample in three of a four-layer model noise, until it decides (A10 speaks of the time before).
    gate_rate = 1.0
    loss_names, line = ("loss",), "{loss:.3f} | held-out {held_out:.3f}"
    kept = ("seed", "limit", "scratch", "boxes")  # settings that a resumed run takes over

    def __init__(self, args):
        self.started, kind = time.time(), TASKS[args.command]
        self.name, self.unit = kind.name, kind.unit
        default = Path("data") / kind.name
        self.folder = args.data or (default if default.is_dir() else None)  # None: the toy world
        path = args.out / "checkpoint.pt" if args.resume else args.checkpoint
        source = load_checkpoint_of(kind.name if args.resume else "pretraining", path)
        resumed = source if args.resume else None
        settle(args, (FULL_OF if self.folder else TOY_OF)[kind.name], resumed, self.kept)
        say(f"{kind.name} on {self.folder or 'the toy world'}, "
            + (f"{args.boxes} boxes, " if kind is Refer else "")
            + ("from random weights" if args.scratch else f"starting from {path}"))
        store, splits = load_task(kind, self.folder, args.boxes)
        tokenizer = WordPiece.of_pieces(source["vocab"])
        check_fits(source, store, tokenizer)
        if kind is Refer and store.detector == "coco":
            say("note: the detector of these features has seen the pictures that RefCOCO+ tests on")
        task = kind(store, tokenizer, splits, args.seed, args.limit, source.get("labels"))
        if kind is Retrieval:
            task.prepare()
        torch.manual_seed(args.seed)
        weights = None if args.scratch or args.resume else source["model"]
        model = task.head(SwitchBertConfig(**source["config"]), weights)
        super().__init__(args, model, store, task, resumed)
        self.collate, self.counts, self.sums = task.collate, task.counts, task.sums
        self.before = source.get("before")
        # While training, a part of the first held-out split is looked at.
        most = 100 if kind is Retrieval else 1000
        self.quick = next(iter(task.splits.values()), task.items)[:most]

    def facts(self):
        """What a resumed run, `ask` and a reader must know."""
        return {"task": self.name, "vocab": self.training.tokenizer.pieces,
            "labels": self.training.labels, "before": self.before,
            "num_regions": self.store.num_regions,
            "settings": {k: getattr(self.args, k) for k in (*TOY, *self.kept)}}

    def image_ids(self, indices):
        """The images of these examples."""
        return [str(self.training.items[i]["image_id"]) for i in indices]

    def begin(self):
        """As every run, after a look at the switches before anything is learned."""
        super().begin()
        if rank() == 0 and not self.args.resume:
            for path in self.args.out.glob("scores-*.npy"):  # of another model: never to be reused
                path.unlink()
        if self.before is None:
            self.before = self.training.predict(self.model, self.quick)[1]
        if self.parts.steps == 0:  # zero-shot: --resume finds what was scored, `match` the model
            self.save()

    def measure(self, tau):
        """Held-out scores with hard switches, and what the switches chose."""
        scores, switches = self.training.look(self.model, self.quick)
        return {"held_out": next(iter(scores.values()), float("nan")), **scores}, switches

    def draw(self, path):
        """switches.png: before and after."""
        title = f"{self.name}: what every layer chose"
        save_picture(path, stack([switches_picture(self.before, f"{title} before finetuning"),
            switches_picture(self.switches, f"{title} after {self.step} steps")]))

    def finish(self):
        """Evaluate every split with hard and soft switches; write and print what came out."""
        task, results, predictions = self.training, {}, {}
        for split, items in task.splits.items():
            keep = self.args.out / f"scores-{split}.npy"
            hard, predictions[split] = task.evaluate(self.model, items, keep=keep)
            soft = task.evaluate(self.model, items, 0.2)[0] if hard else {}
            results[split] = {"hard": hard, "soft": soft}
        if self.folder is None and self.name == "vqa":
            results["val"]["question only"] = question_only(self)
        if rank() == 0:
            self.write(results, predictions)
        say(f"done in {time.time() - self.started:.0f} s")
        return results

    def write(self, results, predictions):
        """The files of a result, and its table."""
        out, task = self.args.out, self.training
        for split, told in predictions.items():
            path = out / f"submission-{split}.json"
            if not results[split]["hard"]:
                write_json(path, told)
                say(f"{split}: no answers to compare with; all {len(told)} of this model's are in "
                    f"{path}")
        record = {"task": self.name, "data": str(self.folder or "toy world"),
            "boxes": self.args.boxes if self.name == "refer" else None, "steps": self.step,
            "scratch": self.args.scratch, "results": results}
        write_json(out / "result.json", record)
        write_json(out / "predictions.json", predictions)
        say_results(record, out)
        if task.splits:
            split, items = next(iter(task.splits.items()))
            draw_examples(out / "examples.png", task, items, predictions[split], self.folder)
        if self.folder is None:
            for number in range(HELD_OUT_SCENES, HELD_OUT_SCENES + 3):
                save_picture(out / f"scene-{number}.png", Scene(number).draw())
        say(f"{out}: checkpoint.pt, result.json, predictions.json, switches.png, examples.png")


def question_only(run, steps=150):
    """Scores of a model of the same size that sees the questions and no picture: what their words
    give away. It learns in few steps all that there is to learn.
    """
    args, task = run.args, copy.copy(run.training)
    task.blind, task.clip = True, run.clip
    torch.manual_seed(args.seed)
    model = task.head(run.model.config, None).to(device())
    optimizer = make_optimizer(model, args.lr)
    parts = Parts(len(task), args.batch, args.epochs, args.seed, args.accum)
    for step in range(min(steps, parts.steps)):
        set_learning_rate(optimizer, learning_rate(step, steps, args.lr))
        batches = [task.collate([task[k] for k in part]) for part in parts.keys(step)]
        train_step(task, model.train(), optimizer, batches, parts.numbers(), args.seed, step, 1.0,
            autocast_for(args))
    return task.evaluate(model, task.splits["val"])[0]


def say_results(record, out):
    """Print the scores of every split as a table; beside them, where it has been run, those of the
    same task from scratch, or of the pretrained one.
    """
    boxes = f", {record['boxes']} boxes" if record["boxes"] else ""
    other, what = out.with_name(f"{out.name}-scratch"), "from scratch"
    if record["scratch"]:
        other, what = out.with_name(out.name.removesuffix("-scratch")), "pretrained"
    path = other / "result.json"
    beside = read_json(path) if other != out and path.exists() else {"results": {}}
    for split, columns in record["results"].items():
        if not columns["hard"]:
            continue
        if split in beside["results"]:
            column = f"{what} ({beside['steps']} steps)"
            columns = {**columns, column: beside["results"][split]["hard"]}
        widths = {name: max(14, len(name) + 2) for name in columns}
        say(f"{split + boxes:34s}" + "".join(f"{c:>{n}s}" for c, n in widths.items()))
        for row in columns["hard"]:
            cells = [format(c[row], ".3f") if row in c else "" for c in columns.values()]
            say(f"  {row:32s}" + "".join(f"{c:>{n}s}" for c, n in zip(cells, widths.values())))


def write_json(path, content):
    """A JSON file, whole."""
    write_whole(path, lambda f: json.dump(content, f, indent=1))


# --- 5. Pictures ----------------------------------------------------------------------------------

GREEN, RED, PANEL = (40, 150, 60), (200, 50, 50), 250


def picture_of(image_id, store, files):
    """The picture of an image: of files {id: path}, or its boxes on grey; None: a drawn scene."""
    if files is None:
        return Scene(int(image_id)).draw()
    if canonical_id(image_id) in files:
        return Image.open(files[canonical_id(image_id)]).convert("RGB")
    row = store.row(image_id)
    record = store[row] if row is not None else dict(size=(100, 100), boxes=[])
    image = Image.new("RGB", record["size"], "grey")
    for box in record["boxes"]:
        ImageDraw.Draw(image).rectangle(list(map(float, box)), outline="silver")
    return image


def panel(image, boxes, lines, right=None):
    """One picture with boxes and lines of text below, framed green if right, red if wrong.

    boxes: [(x1, y1, x2, y2), colour] in the picture's pixels. right: share, or None: no frame.
    """
    lines = [part for line in lines for part in textwrap.wrap(line, 40)]
    scale = (PANEL - 20) / max(image.size)
    image = image.resize([max(1, round(s * scale)) for s in image.size])
    for box, colour in boxes:
        ImageDraw.Draw(image).rectangle([c * scale for c in box], outline=colour, width=3)
    whole = Image.new("RGB", (PANEL, PANEL + 18 * len(lines)), "white")
    draw, font = ImageDraw.Draw(whole), ImageFont.load_default(11)
    frame = "white" if right is None else GREEN if right >= 0.5 else RED
    draw.rectangle([4, 4, PANEL - 5, PANEL - 5], outline=frame, width=4)
    whole.paste(image, ((PANEL - image.width) // 2, (PANEL - image.height) // 2))
    for i, line in enumerate(lines):
        draw.text((10, PANEL + 18 * i), line, "black", font)
    return whole


def stack(images, columns=1):
    """Some pictures as one, in rows of so many."""
    width, height = max(i.width for i in images), max(i.height for i in images)
    rows = -(-len(images) // columns)
    whole = Image.new("RGB", (width * min(columns, len(images)), height * rows), "white")
    for k, image in enumerate(images):
        whole.paste(image, (k % columns * width, k // columns * height))
    return whole


def save_picture(path, image):
    """A PNG, whole."""
    write_whole(path, lambda f: image.save(f, "PNG"), mode="wb")


def draw_examples(path, task, items, predictions, folder, most=4):
    """The first examples that were right and the first that were wrong; pictures from the data
    folder's images/, or of the toy world where it is None.
    """
    files = None if folder is None else {
        canonical_id(p.name): p for p in sorted((folder / "images").rglob("*.*"))}
    found = {True: [], False: []}
    for item, prediction in zip(items, predictions):
        image_id, *rest, right = task.panel(item, prediction)
        some = found[right is None or right >= 0.5]
        if len(some) < most:
            some.append(panel(picture_of(image_id, task.store, files), *rest, right))
    save_picture(path, stack(found[True] + found[False], columns=most))


# --- 6. Your picture ------------------------------------------------------------------------------


class Own:
    """A finetuned model and the detector that it was trained with, for pictures of one's own."""

    def __init__(self, args):
        from extract_features import build_detector  # only here: training needs no torchvision

        self.kind = TASKS[ASKS[args.command]]
        checkpoint = load_checkpoint_of(self.kind.name, args.checkpoint, args.command)
        name = checkpoint["store"]["detector"]
        weights = args.weights or (Path("runs/world/detector.pt") if name == "toy" else None)
        if name == "vg" and weights is None:
            raise BadInput(f"{args.checkpoint}: was trained with the vg detector; give its weights "
                "with --weights pytorch_model.bin")
        self.detector, self.most = build_detector(name, weights), checkpoint["num_regions"]
        self.tokenizer = WordPiece.of_pieces(checkpoint["vocab"])
        self.labels = checkpoint["labels"]
        model = self.kind.new_model(SwitchBertConfig(**checkpoint["config"]), self.labels)
        model.load_state_dict(checkpoint["model"])
        self.model = model.eval()

    @torch.no_grad()
    def __call__(self, path, text):
        """(picture, its boxes (R, 4) in pixels, the head's output for it)"""
        from extract_features import picture_regions

        image, boxes, features, _ = picture_regions(self.detector, path, self.most)
        inputs = dict(input_ids=np.array(self.tokenizer.encode(text, self.kind.max_tokens)),
            region_features=features, region_boxes=normalise_boxes(boxes, image.size))
        return image, boxes, self.model(**model_inputs([inputs]))[0][0]


def ask(own, args):
    """The five best answers."""
    image, _, logits = own(args.image, args.question)
    best = logits.sigmoid().topk(min(5, len(logits)))
    lines = [f"{p:.2f}  {own.labels[i]}" for p, i in zip(best.values, best.indices)]
    return lines, panel(image, [], [args.question, *lines])


def match(own, args):
    """The pictures, best first, each with its score."""
    found = [(*own(path, args.sentence), path) for path in args.images]
    found.sort(key=lambda f: -f[2])
    lines = [f"{score:+.2f}  {path}" for _, _, score, path in found]
    return lines, stack([panel(f[0], [], [line]) for f, line in zip(found, lines)], columns=4)


def point(own, args):
    """The box that the phrase means."""
    image, boxes, logits = own(args.image, args.phrase)
    best = int(logits.argmax())
    box = boxes[best].tolist()
    line = f"{logits[best].sigmoid():.2f}  box " + " ".join(f"{c:.0f}" for c in box)
    return [line], panel(image, [(box, "magenta")], [args.phrase, line])


# The words that each takes, what it is for, and who answers; and the task of its model.
OWN = {"ask": ("image question", "ask a question about a picture", ask),
    "match": ("sentence images", "rank pictures by how well a sentence fits them", match),
    "point": ("image phrase", "find what a phrase means in a picture", point)}
ASKS = {"ask": "vqa", "match": "retrieval", "point": "refer"}


def finetune(args):
    """A task's run, from its flags."""
    return complete(Finetuning(args))


def main(argv=None):
    """Run, and say in one sentence what is wrong with the input if something is."""
    args = parse_args(argv)
    try:
        if args.command in TASKS:
            if args.scratch and args.out == Path("runs") / args.command:
                args.out = Path("runs") / f"{args.command}-scratch"
            launch(finetune, args)
        else:
            lines, picture = OWN[args.command][-1](Own(args), args)
            save_picture(args.out, picture)
            print(*lines, args.out, sep="\n")
    except BadInput as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
