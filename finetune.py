r"""finetune.py: from a pretrained checkpoint to answers, rankings and boxes
=========================================================================

Where this stands

    train.py --> runs/pretrain/checkpoint.pt --+
                                               |   python finetune.py vqa | retrieval | refer
    feature store, questions, captions,        v
    expressions -------------------> SwitchBert --> pooled (B, P) --> answers (B, A)       VQA
                                               |              \-> score of the pair (B,)  retrieval
                                               \-> region_states (B, R, D) --> (B, R)     referring
                                                          |
        runs/vqa/  checkpoint.pt  metrics.jsonl  result.json  predictions.json  examples.png ...

Letters: B batch, R regions, D hidden, P pooled, A answers.

    $ python train.py                                    first: the checkpoint
    $ python finetune.py vqa                             answers to questions about scenes
    $ python finetune.py retrieval                       texts find images, images find texts
    $ python finetune.py refer                           phrases find regions
    $ python finetune.py ask picture.png "how many things are there ?"
    $ python finetune.py match "a red star" a.png b.png
    $ python finetune.py point picture.png "the red star"

With a folder data/vqa, data/retrieval or data/refer a task means the real files and the paper's
settings, without it the toy world. Every task is one class that says what its examples are, its
model, its loss and its scores; the loop, the processes, stopping and resuming are train.fit. A run
prints one line per evaluation, and at the end a table:

    step   100/202  lr 5.7e-04  tau 0.42  loss 0.573 | held-out 0.969 | 1430 expressions/s, 9 s
    val, detected boxes                         hard            soft
      accuracy                                 0.994           0.994

Map of the file (* = read these first)

    1. Settings            flags, and what the toy run and the full run set them to
    2. Answers             the official normalisation and accuracy of VQA
    3. Tasks             * what the three share; VQA, Retrieval, Refer
    4. The run           * training, hard and soft evaluation, the files of a result
    5. Pictures            examples with answers, captions and boxes
    6. Your own picture    ask, match, point

Departures from the paper: A8 (heads, losses), A11 (targets), D3 (sizes of the toy runs).
"""

import argparse
import os
import pickle
import re
import sys
import textwrap
import time
from collections import Counter, defaultdict
from pathlib import Path

# Operators that Apple's GPU lacks then run on the CPU. torch reads this when it is imported.
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

from data import (HELD_OUT_SCENES, SCENE_PIXELS, TRAIN_SCENES, BadInput, FeatureStore, Scene,
    WordPiece, canonical_id, file_to_write, model_inputs, normalise_boxes, read_captions, read_json,
    reading, region_inputs, run, save_png, write_json, write_whole)
from switchbert import (SwitchBertConfig, SwitchBertForReferring, SwitchBertForRetrieval,
    SwitchBertForVQA)
from train import (NUM_HELD_OUT, RECORD, SwitchShares, add_run_flags, check_fits,
    device, first_process_first, fit, launch, load_checkpoint, match_scores, parse_settings, quiet,
    rank, recall_at, say, share_of, stack, to_device, total, toy_world)

# --- 1. Settings ----------------------------------------------------------------------------------
#
# FULL is the paper's [supp. 2]; the batches are VOLTA's. The toy runs (DEVIATION D3) take the
# pretraining's learning rate, and close their switches. A task that departs from these tables does
# so in its class, as `full` and `toy`. anneal: share of the run at which the temperature reaches
# its floor, .2; None is the paper's rate.

FULL = dict(epochs=20, batch=256, lr=1e-4, eval_every=1000, anneal=None)
TOY = dict(epochs=3, batch=64, lr=1e-3, eval_every=250, anneal=0.9)


def parse_args(argv=None):
    """(settings, checkpoint to resume from or None) of a task, or of a question about a picture.

    A task's defaults depend on other flags, so train.parse_settings parses twice.
    """
    argv = sys.argv[1:] if argv is None else argv
    p = argparse.ArgumentParser(description="Finetune Switch-BERT, evaluate it, and ask it.")
    commands = p.add_subparsers(dest="command", required=True)
    for name, task in TASKS.items():
        c = commands.add_parser(name, help=task.__doc__.split("\n")[0],
            formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        folder = Path("data") / name
        c.add_argument("--checkpoint", type=Path, default="runs/pretrain/checkpoint.pt",
            help="pretrained checkpoint to start from")
        c.add_argument("--data", type=Path, default=folder if folder.is_dir() else None,
            help=f"folder with {task.files}; None: the toy world")
        c.add_argument("--scratch", action="store_true",
            help="start from random weights of the checkpoint's sizes: what is pretraining worth?")
        if task is Refer:
            c.add_argument("--boxes", choices=["detected", "gt"], default="detected",
                help="the store to use: features-detected/ or features-gt/ (true boxes)")
        add_run_flags(c, Path("runs") / name)
    for name, (words, text, _, task) in QUESTIONS.items():
        c = commands.add_parser(name, help=text)
        for word in words.split():
            c.add_argument(word, nargs="+" if word == "images" else None)
        c.add_argument("--checkpoint", type=Path, default=f"runs/{task}/checkpoint.pt",
            help="the finetuned model")
        c.add_argument("--weights", type=Path, help="the detector's; default: the toy world's")
        c.add_argument("--out", type=file_to_write, default=f"{name}.png", help="picture to write")
    if argv and argv[0] in TASKS:
        return parse_settings(p, argv, task_defaults, argv[0], commands.choices[argv[0]])
    return p.parse_args(argv), None


def task_defaults(args):
    """The defaults that --data and --scratch decide; two runs to compare need two folders."""
    task, suffix = TASKS[args.command], "-scratch" if args.scratch else ""
    return {**(task.full if args.data else task.toy), "out": Path(f"runs/{task.name}{suffix}")}


# --- 2. Answers -----------------------------------------------------------------------------------
#
# The official evaluation of VQA v2 (visualqa.org), with its quirks, because numbers are only
# comparable with them. Ten people answered each question, and they often disagree. An answer that
# four or more of them gave counts fully, a rarer one in part: accuracies lie between 0 and 1, and
# higher is better. They are the targets of training, too.

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


def strip_answer(answer):
    """What the official evaluation does to every answer before it compares any."""
    return answer.replace("\n", " ").replace("\t", " ").strip()


def normalise_answer(answer):
    """An answer as the official evaluation compares it where annotators disagree.

    A sign becomes a space, but nothing if it touches a space anywhere in the answer, or if the
    answer has a comma between digits. A full stop stays before a digit only.

    >>> [normalise_answer(a) for a in ("The red-car!", "two", "1,000", "3.5", "dont")]
    ['red car', '2', '1000', '3.5', "don't"]
    """
    text = answer = strip_answer(answer)
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

    >>> accuracy_table(["red"] * 3 + ["a pink"] * 7)[0] == {"red": 0.9, "pink": 1.0}
    True
    """
    answers = [strip_answer(answer) for answer in answers]
    exact, people = len(set(answers)) == 1, len(answers)
    counts = Counter(answers if exact else map(normalise_answer, answers))
    table = {}
    for answer, n in counts.items():
        table[answer] = ((people - n) * min(1, n / 3) + n * min(1, (n - 1) / 3)) / people
    return table, exact


def answer_accuracy(prediction, answers):
    """Official accuracy of a prediction, 0 to 1."""
    table, exact = accuracy_table(answers)
    return table.get(strip_answer(prediction) if exact else normalise_answer(prediction), 0.0)


def answer_vocabulary(questions, least=9):
    """The answers that a model chooses from: each is the majority answer of `least` questions,
    normalised (so without commas), the most frequent first. On VQA v2's train and val: 3,129.
    """
    counts = Counter(normalise_answer(q["majority"]) for q in questions)
    return sorted((a for a, n in counts.items() if n >= least), key=lambda a: (-counts[a], a))


# --- 3. Tasks -------------------------------------------------------------------------------------
#
# A task is what train.fit takes: examples, model, collate, counts, sums, evaluate. It is made of
# items: dicts with image_id, text, and what the task needs besides. `predict` chooses an answer or
# a region for each of them, `score` turns choices into scores: shares, 0 to 1, higher is better.
# The first score is the result of the task. Read Task, then one of the three.


class Task(torch.utils.data.Dataset):
    """Texts about images: training examples, held-out splits, and what is made of them.

    splits: {name: items}, with "train" among them. Training items whose image has no features are
    left out; a held-out item without features is answered from its text alone, so that a result
    covers every question. Both are counted in `missing`. Raises BadInput if no training item is
    left. labels: the answers that a checkpoint's head chooses from.

    A subclass says: name, unit, files, model_class, max_tokens [supp. 2]; from_folder and
    from_scenes -> splits; and of one item: targets, score_item, describe. Targets are shares, 0 to
    1, and the loss is binary cross entropy; Retrieval, which ranks, replaces both.
    """

    full, toy = FULL, TOY
    clip, weight_decay, initial_temperature = 1.0, 1e-4, 1.0  # A7, supp. 2
    # Gates learn as fast as the rest: a pretrained gate that is right 9 times out of 10 makes one
    # sample in three of a four-layer model noise, until it decides (A10 speaks of the time before).
    gate_rate, evaluates_at_start = 1.0, True
    loss_names, looked_at = ("loss",), 1000  # held-out items that are evaluated while training
    needs_features = False  # True: held-out items without features are left out

    def __init__(self, store, tokenizer, splits, args, labels=None):
        self.store, self.tokenizer, self.labels = store, tokenizer, labels
        self.seed, self.blind, self.examples = args.seed, args.blind, self
        self.missing, self.held_out = {}, {}
        for name, items in splits.items():
            rows = store.rows([item["image_id"] for item in items])
            found = [item for item, row in zip(items, rows) if row >= 0]
            if len(found) < len(items):
                self.missing[name] = len(items) - len(found)
                say(f"{name}: {self.missing[name]} of {len(items)} {self.unit} have no features")
            kept = found if name == "train" or self.needs_features else items
            if kept:
                self.held_out[name] = kept
        self.items = self.held_out.pop("train", [])[: args.limit]
        if not self.items:
            raise BadInput(f"{store.folder}: no training {self.unit} whose image has features here")
        self.lengths = lengths_of(self.items)
        # Published test questions have no answers: an empty list. There is nothing to show of them.
        known = [items for items in self.held_out.values() if items[0].get("answers") != []]
        self.shown = [*known, self.items][0][: self.looked_at]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, key):
        return self.example(self.items[key[1]])  # (epoch, index)

    def example(self, item):
        """What the model reads of an item, and the item: numpy arrays."""
        row = None if self.blind else self.store.row(item["image_id"])
        ids = np.array(self.tokenizer.encode(item["text"], self.max_tokens))
        return dict(region_inputs(self.store, row), input_ids=ids, item=item)

    @classmethod
    def new_model(cls, config, labels):
        """The task's model, new; labels: what it chooses from, None where that is no fixed list."""
        return cls.model_class(config) if labels is None else cls.model_class(config, len(labels))

    def build_model(self, config, weights):
        """The task's model: its encoder from pretrained weights (None: new), its head new."""
        model = self.new_model(config, self.labels)
        bert = {k: v for k, v in (weights or {}).items() if k.startswith("bert.")}
        model.load_state_dict(bert, strict=False)
        return model

    def collate(self, examples):
        """The encoder's inputs, and targets, 0 to 1, of answers (B, A) or regions (B, R)."""
        inputs = model_inputs(examples)
        targets = torch.zeros(len(examples), len(self.labels or inputs["region_boxes"][0]))
        for row, example in zip(targets, examples):
            for index, value in self.targets(example["item"]):
                row[index] = value
        return {**inputs, "targets": targets}

    def loss(self, logits, batch):
        """Binary cross entropy of every answer or region, added up."""
        return F.binary_cross_entropy_with_logits(logits, batch["targets"], reduction="sum")

    @staticmethod
    def counts(batch):
        """(1,): examples; every loss here is a mean over them."""
        return torch.tensor([float(len(batch["targets"]))])

    def sums(self, model, batch, tau):
        """(1,): the loss, added up over a batch; and the encoder's output."""
        inputs = {k: v for k, v in batch.items() if k != "targets"}
        logits, out = model(**inputs, temperature=tau)
        return self.loss(logits.float(), batch)[None], out

    @torch.no_grad()
    def predict(self, model, items, tau=None, batch_size=200):
        """(N,) the best answer or region for every item, and what the switches chose.

        Retrieval has one score per item and nothing to choose: only its switches are read.
        """
        model.eval()
        chosen = torch.zeros(len(items), dtype=torch.long, device=device())
        switches = SwitchShares(model.config)
        parts = share_of(lengths_of(items), batch_size)
        for part in tqdm(parts, leave=False, disable=quiet()):
            inputs = model_inputs([self.example(items[i]) for i in part])
            logits, out = model(**to_device(inputs), temperature=tau)
            if not logits.isfinite().all():  # argmax of NaN gives an answer all the same
                raise BadInput("the model's weights have diverged; lower --lr")
            chosen[torch.from_numpy(part)] = logits.argmax(dim=-1)
            switches.add(out)
        model.train()
        return total(chosen), switches.shares()

    def score(self, items, choices):
        """(scores, predictions) of choices (N,): each score is a mean over the items that have it,
        by its place in the table and its name; predictions is a list of dicts for a file.
        """
        values, predictions = defaultdict(list), []
        for item, choice in zip(items, choices.tolist()):
            prediction, scores = self.score_item(item, choice)
            predictions.append(prediction)
            for place_and_name, score in scores.items():
                values[place_and_name].append(score)
        rows = {name: float(np.mean(values[place, name])) for place, name in sorted(values)}
        return rows, predictions

    def evaluate_items(self, model, items, tau=None):
        """(scores, predictions, switches) of some items; tau: None for hard switches."""
        choices, switches = self.predict(model, items, tau)
        return *self.score(items, choices), switches

    def evaluate(self, model):
        """Hard scores of some held-out items, and what the switches chose: while training."""
        scores, _, switches = self.evaluate_items(model, self.shown)
        return scores, switches

    @staticmethod
    def headline(scores):
        """The part of the printed line that says how good it is."""
        return f"held-out {next(iter(scores.values())):.3f}"

    def about(self):
        """What `ask` must know beside weights, vocabulary and regions."""
        return {"labels": self.labels}


class VQA(Task):
    """questions about pictures, answered from a vocabulary of answers [VQA v2]

    An item has also: question_id; answers, those of ten annotators ([]: unpublished); majority,
    the most frequent one; answer_type (yes/no, number, other); question_type ("how many", ...).
    """

    name, unit, max_tokens, model_class = "vqa", "questions", 23, SwitchBertForVQA
    files = "features/ and VQA v2's questions and annotations (*.json)"

    @staticmethod
    def from_folder(folder):
        """The splits of a folder with any of VQA v2's JSON files, recognised by what is in them.

        The subset train2014 is the split train. Questions without annotations keep their subset's
        name: test-dev2015 is a part of test2015, and each has its own submission. Raises BadInput,
        also for an entry that is no text: then "" + entry is a TypeError.
        """
        asked, truths, splits = [], {}, defaultdict(list)
        for path in sorted(folder.glob("*.json")):
            content = read_json(path, dict)
            kind = "annotations" if "annotations" in content else "questions"
            with reading(path, f"{kind} of VQA v2") as at:
                for at.entry, x in enumerate(content[kind]):
                    if kind == "questions":
                        question = dict(image_id=x["image_id"], text="" + x["question"],
                            question_id=int(x["question_id"]), answers=[])
                        asked.append(("" + content["data_subtype"], question))
                    else:
                        truths[int(x["question_id"])] = dict(
                            majority="" + x["multiple_choice_answer"],
                            answers=["" + given["answer"] for given in x["answers"]],
                            answer_type="" + x["answer_type"],
                            question_type="" + x["question_type"])
        for subset, item in asked:
            truth = truths.get(item["question_id"])
            splits[subset.rstrip("0123456789") if truth else subset].append(item | (truth or {}))
        if not any(item["answers"] for item in splits["train"]):
            raise BadInput(f"{folder}: no training questions with annotations here; expected VQA "
                "v2's ..._train2014_questions.json and ..._train2014_annotations.json")
        return splits

    @staticmethod
    def from_scenes(training, held_out):
        """The toy world's questions, in the form of VQA v2's: ten annotators who agree."""
        types = {"count": "number", "yes": "yes/no", "no": "yes/no"}

        def items(numbers, n):
            return [dict(image_id=i, text=text, question_id=1000 * i + k, majority=answer,
                answers=[answer] * 10, question_type=kind,
                answer_type=types.get(kind) or types.get(answer, "other"))
                for i in numbers for k, (text, answer, kind) in enumerate(Scene(i).questions(n))]
        return {"train": items(training, 8), "val": items(held_out, 5)}

    def __init__(self, store, tokenizer, splits, args, labels=None):
        labels = labels or answer_vocabulary(splits["train"])
        if not labels:
            raise BadInput(f"{store.folder}: no answer of nine training questions to choose from")
        super().__init__(store, tokenizer, splits, args, labels)
        self.index = {answer: i for i, answer in enumerate(labels)}

    def targets(self, item):
        """[(index, accuracy)] of the answers that would score.

        ASSUMPTION A11: a target is the accuracy that its answer would get, so looked up as the
        evaluation does. (hengyuan-hu's published targets, which most papers use, look the raw
        answers up; the two differ where annotators disagree in articles or contractions.)
        """
        table, _ = accuracy_table(item["answers"])
        return [(self.index[a], score) for a, score in table.items() if a in self.index]

    def score_item(self, item, choice):
        """Official accuracy, overall and by type of answer and of question; and the ceiling, what
        the best answer of the vocabulary would get.
        """
        prediction = {"question_id": item["question_id"], "answer": self.labels[choice]}
        if not item["answers"]:
            return prediction, {}
        accuracy = answer_accuracy(prediction["answer"], item["answers"])
        ceiling = max((score for _, score in self.targets(item)), default=0.0)
        return prediction, {(0, "accuracy"): accuracy, (1, item["answer_type"]): accuracy,
            (2, "ceiling"): ceiling, (3, item["question_type"]): accuracy}

    def describe(self, item, prediction):
        """(image to show, boxes, lines, share that is right) of an example."""
        answer = prediction["answer"]
        lines = [item["text"], f"answer: {answer}", f"truth: {item['majority']}"]
        return item["image_id"], [], lines, answer_accuracy(answer, item["answers"])


class Retrieval(Task):
    """texts that find their image, and images that find their texts [Karpathy's splits]

    Trained as a choice of one right pair among four; evaluated on the full matrix of texts and
    images, where every pair goes through the model: 5,000 x 1,000 on Flickr30k.
    """

    name, unit, max_tokens, model_class = "retrieval", "captions", 30, SwitchBertForRetrieval
    files = "features/ and Karpathy's dataset_flickr30k.json or dataset_coco.json"
    full, toy = {**FULL, "batch": 64}, {**TOY, "epochs": 1, "batch": 32}
    looked_at, needs_features = 100, True  # a pair without an image cannot be ranked

    @staticmethod
    def from_folder(folder):
        """The splits of the one caption file in a folder. Raises BadInput."""
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
            return [dict(image_id=str(i), text=t) for i in numbers for t in Scene(i).captions(2)]
        return {"train": items(training), "val": items(held_out[100:150]),
            "test": items(held_out[:100])}

    def __init__(self, store, tokenizer, splits, args, labels=None):
        super().__init__(store, tokenizer, splits, args)
        self.images, self.own = images_of(self.items)
        if len(self.images) < 3:
            raise BadInput(f"{store.folder}: captions of {len(self.images)} images; at least three "
                "are needed, since a caption is trained against other images'")
        self.nearest = self.nearest_images()

    def nearest_images(self):
        """For each image its hard negative, the most similar other one: a list of places in images.

        Similarity is the cosine of global features, the means over an image's regions. Nearly
        anything tells a street from a beach; only the details of a caption tell it from a street.
        """
        rows = tqdm(self.store.rows(self.images), "features", leave=False, disable=quiet())
        means = [self.store[row]["features"].mean(axis=0, dtype=np.float32) for row in rows]
        means, nearest = F.normalize(torch.from_numpy(np.stack(means)).to(device())), []
        for block in torch.arange(len(means)).split(1000):
            cosines = means[block] @ means.T  # (1000, images)
            cosines[torch.arange(len(block)), block] = -2  # not itself
            nearest += cosines.argmax(dim=1).tolist()
        return nearest

    def __getitem__(self, key):
        """The four candidates of a caption [ViLBERT]: its own image; its image with another image's
        caption; another image; the image most like its own. The first is right.
        """
        epoch, index = key
        rng = np.random.default_rng([self.seed, epoch, index])
        item, own, other = self.items[index], self.own[index], index
        while self.own[other] == own:
            other = rng.integers(len(self))
        image = self.images[(own + 1 + rng.integers(len(self.images) - 1)) % len(self.images)]
        hard = self.images[self.nearest[own]]
        pairs = (item, {**item, "text": self.items[other]["text"]},
            {**item, "image_id": image}, {**item, "image_id": hard})
        return [self.example(pair) for pair in pairs]

    def build_model(self, config, weights):
        """The task's model, its head too from pretrained weights (None: all of it new)."""
        if weights is None:
            return SwitchBertForRetrieval(config)
        return SwitchBertForRetrieval.from_pretraining(config, weights)

    def collate(self, examples):
        """The encoder's inputs of 4 B pairs, and targets (B,): which of four is right."""
        inputs = model_inputs([pair for four in examples for pair in four])
        return {**inputs, "targets": torch.zeros(len(examples), dtype=torch.long)}

    def loss(self, scores, batch):
        """Cross entropy over the four candidates."""
        return F.cross_entropy(scores.view(-1, 4), batch["targets"], reduction="sum")  # (B, 4)

    def evaluate_items(self, model, items, tau=None):
        """Recalls over the full matrix of some texts and all of their images."""
        images, own = images_of(items)
        own, ks = torch.tensor(own), (1, 5, 10)
        self.scores = self.score_matrix(model, [item["text"] for item in items], images, tau)
        recalls = recall_at(self.scores, own, ks)
        if len(images) == 5000:  # COCO: the 1K protocol is the mean over five folds
            folds = []
            for first in range(0, 5000, 1000):
                texts = own // 1000 == first // 1000
                fold = self.scores[texts, first : first + 1000]
                folds.append(recall_at(fold, own[texts] - first, ks))
            for name in list(recalls):
                recalls[f"1K {name}"] = float(np.mean([fold[name] for fold in folds]))
        best = self.scores.topk(min(10, len(images)), dim=1).indices.tolist()
        predictions = [{**item, "found": [images[k] for k in ranked]}
            for item, ranked in zip(items, best)]
        return recalls, predictions, self.predict(model, items, tau)[1]

    def score_matrix(self, model, texts, images, tau, block=100):
        """(texts, images) scores, by blocks of images: what one batch holds.

        No store has an image "": blind, it stands for every image.
        """
        images = [""] * len(images) if self.blind else images
        columns = []
        for k in tqdm(range(0, len(images), block), "scoring", leave=False, disable=quiet()):
            columns.append(match_scores(model, self.store, self.tokenizer, texts,
                images[k : k + block], self.max_tokens, tau))
        return torch.cat(columns, dim=1)

    def describe(self, item, prediction):
        """(image to show, boxes, lines, right) of an example: the image that was found."""
        own, found = item["image_id"], prediction["found"]
        names = ["right" if i == own else f"image {i}" for i in found[:3]]
        lines = [item["text"], "found: " + ", ".join(names)]
        return found[0], [], lines, found[0] == own


class Refer(Task):
    """phrases that mean one thing in a picture, and which box it is [RefCOCO+]

    An item has also: box, the one that is meant, corners x1, y1, x2, y2 in pixels; ref_id, sent_id;
    kind, in the toy world attribute or relation; and there alike, how many things have its shape.
    """

    name, unit, max_tokens, model_class = "refer", "expressions", 20, SwitchBertForReferring
    files = "features-detected/ or features-gt/, refs(unc).p and instances.json"
    # Pointing is learned in 100 steps, so it is evaluated often: what pretraining gives is a start.
    toy = {**TOY, "epochs": 1, "eval_every": 25}

    @staticmethod
    def from_folder(folder):
        """The splits of RefCOCO+: train, val, testA (people), testB (all else), test (both).

        The expressions are those of refs(unc).p, or of the only refs*.p. Raises BadInput.
        """
        boxes, splits, found = {}, defaultdict(list), list(folder.glob("refs*.p"))
        path = found[0] if len(found) == 1 else folder / "refs(unc).p"
        instances = folder / "instances.json"
        with reading(instances, "RefCOCO's instances") as at:
            for at.entry, a in enumerate(read_json(instances)["annotations"]):
                x, y, w, h = map(float, a["bbox"])
                boxes[a["id"]] = [x, y, x + w, y + h]
        with reading(path, "a pickle of RefCOCO's plain lists, dicts and strings") as at:
            with open(path, "rb") as file:
                refs = PlainUnpickler(file, encoding="latin1").load()  # Python 2 wrote it
            for at.entry, ref in enumerate(refs):
                splits[ref["split"]] += [dict(image_id=ref["image_id"], text="" + s["sent"],
                    box=boxes[ref["ann_id"]], ref_id=ref["ref_id"], sent_id=s["sent_id"],
                    kind="expression") for s in ref["sentences"]]
        if splits.keys() >= {"testA", "testB"}:
            splits["test"] = splits["testA"] + splits["testB"]
        return splits

    @staticmethod
    def from_scenes(training, held_out):
        """The toy world's expressions."""
        def items(numbers, n):
            for scene in map(Scene, numbers):
                for k, (text, index, kind) in enumerate(scene.expressions(n)):
                    thing, number = scene.things[index], 10 * scene.number + k
                    yield dict(image_id=scene.number, text=text, box=thing.box, ref_id=number,
                        sent_id=number, kind=kind, alike=len(scene.where(shape=thing.shape)))
        return {"train": list(items(training, 8)), "val": list(items(held_out, 6))}

    def build_model(self, config, weights):
        """As every task's, without the pooler: this head reads region states, so no gradient
        reaches the pooler, and DistributedDataParallel would wait for one.
        """
        model = super().build_model(config, weights)
        model.bert.pooler.requires_grad_(False)
        return model

    def overlaps(self, item):
        """The item's regions, boxes (n, 4), and their IoU (n,) with the box that is meant.

        An image without features has one region, of zeros: it overlaps nothing.
        """
        row = self.store.row(item["image_id"])
        boxes = np.zeros((1, 4), np.float32) if row is None else self.store[row]["boxes"]
        return boxes, box_iou(boxes, np.array(item["box"], np.float32))

    def targets(self, item):
        """[(region, its IoU with the box that is meant)]; none where the model sees no region."""
        return [] if self.blind else enumerate(self.overlaps(item)[1].tolist())

    def loss(self, logits, batch):
        """As every task's, of real regions only: the logits of padding are not the model's."""
        real = batch["region_mask"].bool()
        return super().loss(logits[real], {"targets": batch["targets"][real]})

    def score_item(self, item, choice):
        """Has the chosen region IoU >= .5, and has any (the oracle)? In the toy world by kind."""
        boxes, iou = self.overlaps(item)
        right = iou >= 0.5
        scores = {(0, "accuracy"): right[choice], (1, "oracle"): right.any()}
        if item["kind"] != "expression":
            scores[2, item["kind"]] = right[choice]
        if item["kind"] == "relation":  # the best guess from the words alone, without places
            scores[3, "relation by attributes alone"] = 1 / item["alike"]
        return dict(ref_id=item["ref_id"], sent_id=item["sent_id"], box=boxes[choice].tolist(),
            iou=float(iou[choice])), scores

    def describe(self, item, prediction):
        """(image to show, boxes, lines, IoU) of an example: meant white, chosen magenta."""
        boxes, iou = [(item["box"], "white"), (prediction["box"], "magenta")], prediction["iou"]
        return item["image_id"], boxes, [item["text"], f"IoU {iou:.2f}"], iou


TASKS = {task.name: task for task in (VQA, Retrieval, Refer)}


def lengths_of(items):
    """(N,): about how many words their texts have, to put like ones into a batch."""
    return np.array([item["text"].count(" ") for item in items])


def images_of(items):
    """The images of some items, each once, and for each item the place of its image: two lists."""
    places = {}
    own = [places.setdefault(item["image_id"], len(places)) for item in items]
    return list(places), own


def box_iou(boxes, box):
    """(n, 4), (4,) corners -> (n,) intersection over union, 0 to 1."""
    common = np.hstack([np.maximum(boxes, box)[:, :2], np.minimum(boxes, box)[:, 2:]])
    both, each, one = (np.clip(b[..., 2:] - b[..., :2], 0, None).prod(axis=-1)
        for b in (common, boxes, box))  # areas; 0 where boxes do not meet: high < low
    return both / np.maximum(each + one - both, 1e-9)


class PlainUnpickler(pickle.Unpickler):
    """Reads lists, dicts, strings and numbers only.

    A pickle can name any class or function and call it while it is read; this one admits none.
    """

    def find_class(self, module, name):
        """Refuse what a pickle names."""
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


# --- 4. The run -----------------------------------------------------------------------------------
#
# Everything is evaluated twice. Hard switches take the best mode and depth of each layer; soft ones
# mix all of them at temperature .2, the floor of training. If the two scores agree, the switches
# have closed, and a model without the unused branches would score the same.


def finetune(args, checkpoint=None):
    """A task's run in the order in which it happens. Its results, or None if it was stopped.

    results: {split: {"hard": scores, "soft": scores}}, scores {name: number}, empty for a split
    without answers.
    """
    started, kind = time.time(), TASKS[args.command]

    # 1. Where it starts: its own checkpoint, or the pretrained one.
    source = checkpoint or load_checkpoint(args.checkpoint, "pretraining")
    start = "random weights" if args.scratch else args.checkpoint
    say(f"{kind.name} on {args.data or 'the toy world'}, starting from {start}")

    # 2. The task, and its model. The vocabularies of words and answers are the checkpoint's.
    store, splits = load_task(kind, args)
    check_fits(source, store)
    task = kind(store, WordPiece(source["vocab"]), splits, args, source.get("labels"))
    torch.manual_seed(args.seed)
    weights = None if args.scratch or checkpoint else source["model"]
    task.model = task.build_model(SwitchBertConfig(**source["config"]), weights)

    # 3. Training, in the same loop as pretraining.
    if fit(args, task, checkpoint) is None:
        return None

    # 4. Every split, with hard and with soft switches.
    results, predictions = {}, {}
    for split, items in task.held_out.items():
        hard, predictions[split], _ = task.evaluate_items(task.model, items)
        if kind is Retrieval and rank() == 0:
            write_whole(args.out / f"scores-{split}.npy",
                lambda file: np.save(file, task.scores.numpy()), "wb")
        soft = task.evaluate_items(task.model, items, 0.2)[0] if hard else {}
        results[split] = {"hard": hard, "soft": soft}
    if rank() == 0:
        write_results(args, task, results, predictions)
    say(f"done in {time.time() - started:.0f} s")
    return results


def load_task(kind, args):
    """(store, splits) of a task's folder, or of the toy world."""
    if args.data is not None:
        features = f"features-{args.boxes}" if kind is Refer else "features"
        store = FeatureStore(args.data / features)
        if kind is Refer and store.detector == "coco":
            say("note: the detector of these features has seen the pictures that RefCOCO+ tests on")
        return store, kind.from_folder(args.data)
    if kind is Refer and args.boxes == "gt":
        raise BadInput("--boxes gt: the toy world has detected boxes only")
    with first_process_first():
        store = toy_world().store
    return store, kind.from_scenes(range(TRAIN_SCENES, TRAIN_SCENES + len(store) - NUM_HELD_OUT),
        range(HELD_OUT_SCENES, HELD_OUT_SCENES + NUM_HELD_OUT))


def write_results(args, task, results, predictions):
    """The files of a result, and its table. A split without answers becomes a submission.

    result.json holds scores and settings, predictions.json every answer, a submission the answers
    in the form that the evaluation server takes. examples.png shows the first split with answers.
    """
    out, boxes = args.out, getattr(args, "boxes", None)
    write_json(out / "predictions.json", predictions)
    write_json(out / "result.json", dict(task=task.name, data=str(args.data or "toy world"),
        boxes=boxes, steps=args.epochs * (len(task) // args.batch), scratch=args.scratch,
        without_features=task.missing, results=results))
    for split, columns in results.items():
        if columns["hard"]:
            title = f"{split}, {boxes} boxes" if boxes else split
            say(f"{title:32s}" + "".join(f"{name:>16s}" for name in columns))
            for row in columns["hard"]:
                cells = [f"{scores[row]:16.3f}" for scores in columns.values()]
                say(f"  {row:30s}" + "".join(cells))
        else:
            path = out / f"submission-{split}.json"
            write_json(path, predictions[split])
            say(f"{split}: no answers to compare with; all {len(predictions[split])} of this "
                f"model's are in {path}")
    answered = [split for split in results if results[split]["hard"]]
    for split in answered[:1]:
        items = task.held_out[split]
        draw_examples(out / "examples.png", task, items, predictions[split], args.data)
    if args.data is None:
        for number in range(HELD_OUT_SCENES, HELD_OUT_SCENES + 3):
            save_png(out / f"scene-{number}.png", Scene(number).draw())
    written = [name for name in RECORD if (out / name).exists()]  # --epochs 0 saves no model
    say(f"{out}: {', '.join(written)}, result.json, predictions.json, examples.png")


# --- 5. Pictures ----------------------------------------------------------------------------------
#
# A score says how often a model is right; its answers show where it is wrong. examples.png has four
# that are right and four that are wrong, if there are so many. ask, match and point draw with the
# same panel.

GREEN, RED, PANEL = (40, 150, 60), (200, 50, 50), 250  # frames of right and wrong; pixels


def picture_of(image_id, store, files):
    """(picture, its pixels per pixel of the image): of files {id: path}, or grey where there is
    none; files None: a drawn scene, larger than the detector sees it.
    """
    if files is None:
        return Scene(int(image_id)).draw(scale=4), 4
    if canonical_id(image_id) in files:
        return Image.open(files[canonical_id(image_id)]).convert("RGB"), 1
    row = store.row(image_id)
    return Image.new("RGB", (100, 100) if row is None else store[row]["size"], "grey"), 1


def panel(image, boxes, lines, frame="white", zoom=1):
    """One picture in a frame, with boxes, and lines of text below.

    boxes: [((x1, y1, x2, y2), colour)] in pixels of the image that the model saw. The picture has
    `zoom` pixels for each of those.
    """
    text = "\n".join(textwrap.fill(line, 40) for line in lines)
    scale = (PANEL - 20) / max(image.size)
    image = image.resize([max(1, round(s * scale)) for s in image.size])
    for box, colour in boxes:
        # Three pixels outside of the box: a small circle whose rim is covered looks like a square.
        corners = [c * zoom * scale + side for c, side in zip(box, (-3, -3, 3, 3))]
        ImageDraw.Draw(image).rectangle(corners, outline=colour, width=2)
    whole = Image.new("RGB", (PANEL, PANEL + 18 * (text.count("\n") + 1)), "white")
    whole.paste(ImageOps.expand(image, 5, frame), (5, (PANEL - image.height) // 2 - 5))
    font = ImageFont.load_default(11)
    ImageDraw.Draw(whole).multiline_text((10, PANEL), text, "black", font, spacing=5)
    return whole


def draw_examples(path, task, items, predictions, folder, most=4):
    """The first examples that were right and the first that were wrong, one per image; pictures
    from the data folder's images/, or of the toy world where it is None.
    """
    files = None if folder is None else {
        canonical_id(p.name): p for p in sorted((folder / "images").rglob("*.*"))}
    panels, shown = {True: [], False: []}, set()
    for item, prediction in zip(items, predictions):
        image_id, boxes, lines, right = task.describe(item, prediction)
        row = panels[right >= 0.5]
        if len(row) < most and image_id not in shown:
            shown.add(image_id)
            image, zoom = picture_of(image_id, task.store, files)
            row.append(panel(image, boxes, lines, GREEN if right >= 0.5 else RED, zoom))
    save_png(path, stack(panels[True] + panels[False], columns=most))


# --- 6. Your own picture --------------------------------------------------------------------------
#
# A model knows the regions of one detector. Features of another one can have the same size and mean
# something else: every answer would then be wrong, without an error. So a checkpoint records its
# detector, and that one finds the regions of your picture.


class Finetuned:
    """A finetuned model and the detector that it was trained with, for your own pictures."""

    def __init__(self, args):
        from extract_features import build_detector  # training needs no torchvision

        self.task = TASKS[QUESTIONS[args.command][-1]]
        saved = load_checkpoint(args.checkpoint, self.task.name)
        self.store, self.labels, weights = saved["store"], saved["labels"], args.weights
        self.toy = self.store["detector"] == "toy"
        if self.toy and weights is None:
            weights = Path("runs/world/detector.pt")
        if self.store["detector"] == "vg" and weights is None:
            raise BadInput(f"{args.checkpoint}: was trained with the vg detector; give its weights "
                "with --weights pytorch_model.bin")
        self.detector = build_detector(self.store["detector"], weights)
        self.tokenizer = WordPiece(saved["vocab"])
        self.model = self.task.new_model(SwitchBertConfig(**saved["config"]), self.labels).eval()
        self.model.load_state_dict(saved["model"])

    @torch.no_grad()
    def __call__(self, path, text):
        """(picture, its boxes (R, 4) in pixels, the head's output for it)"""
        from extract_features import picture_regions

        image, boxes, features, _ = picture_regions(self.detector, path, self.store["num_regions"])
        if self.toy and image.size != (SCENE_PIXELS, SCENE_PIXELS):
            print(f"note: {path} is no drawn scene of {SCENE_PIXELS} pixels, and this model has "
                "seen nothing else; what it says means little")
        ids = np.array(self.tokenizer.encode(text, self.task.max_tokens))
        places = normalise_boxes(boxes, image.size)
        inputs = dict(input_ids=ids, region_features=features, region_boxes=places)
        return image, boxes, self.model(**model_inputs([inputs]))[0][0]


def ask(model, args):
    """The five best answers, each with the accuracy that the model expects of it, 0 to 1.

    Several answers to a question can be right, so these numbers need not add up to 1.
    """
    image, _, logits = model(args.image, args.question)
    best = logits.sigmoid().topk(min(5, len(logits)))
    lines = [f"{p:.2f}  {model.labels[i]}" for p, i in zip(best.values, best.indices)]
    return lines, panel(image, [], [args.question, *lines])


def match(model, args):
    """The pictures, best first, each with its score; higher is better.

    Training compares scores of candidates only, so their differences count and their zero does not.
    """
    found = [(*model(path, args.sentence), path) for path in args.images]
    found.sort(key=lambda entry: -entry[2])
    lines = [f"{score:+.2f}  {path}" for _, _, score, path in found]
    panels = [panel(image, [], [line]) for (image, *_), line in zip(found, lines)]
    return lines, stack(panels, columns=4)


def point(model, args):
    """The box that the phrase means: the IoU that the model expects, and its corners in pixels."""
    image, boxes, logits = model(args.image, args.phrase)
    best = int(logits.argmax())
    box = boxes[best].tolist()
    line = f"{logits[best].sigmoid():.2f}  box " + " ".join(f"{c:.0f}" for c in box)
    return [line], panel(image, [(box, "magenta")], [args.phrase, line])


# Command: its words, what it is for, who answers, and the task of its model.
QUESTIONS = {"ask": ("image question", "ask a question about a picture", ask, "vqa"),
    "match": ("sentence images", "rank pictures by how well a sentence fits", match, "retrieval"),
    "point": ("image phrase", "find what a phrase means in a picture", point, "refer")}


def main(argv=None):
    """Finetune, or answer."""
    args, checkpoint = parse_args(argv)
    if args.command in TASKS:
        return launch(args, lambda: finetune(args, checkpoint))
    answer = QUESTIONS[args.command][2]
    lines, picture = answer(Finetuned(args), args)
    save_png(args.out, picture)
    print(*lines, args.out, sep="\n")


if __name__ == "__main__":
    run(main)
