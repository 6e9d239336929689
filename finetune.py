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
    $ python finetune.py ask runs/vqa "how many things are there ?" picture.png
    $ python finetune.py ask runs/retrieval "a red star" a.png b.png

With a folder data/vqa, data/retrieval or data/refer a task uses the real files and the paper's
settings, without it the toy world. Every task is one class that defines its examples, model, loss
and scores; the loop, the processes, stopping and resuming are train.fit's. A run prints one line
per evaluation, and at the end a table:

    step   100/202  lr 5.7e-04  tau 0.42  loss 0.573 | held-out 0.969 | 1430 expressions/s, 9 s
    val                                         hard            soft
      accuracy                                 0.994           0.994

Map of the file (* = read these first)

    1. Settings            flags, and what the toy run and the full run set them to
    2. Answers             the official normalisation and accuracy of VQA
    3. Tasks             * what the three share; VQA, Retrieval, Refer
    4. The run           * training, hard and soft evaluation, the files of a result
    5. Pictures            examples with answers, captions and boxes
    6. Your own pictures   ask

Assumptions and deviations: A8 (heads, losses), A11 (targets), D3 (settings of the toy runs).
"""

import argparse
import os
import pickle
import re
import sys
import textwrap
from collections import Counter, defaultdict
from pathlib import Path

# Operators that Apple's GPU lacks run on the CPU instead. torch reads this on import.
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps

from data import (HELD_OUT_SCENES, RANK, SCENE_PIXELS, TRAIN_SCENES, BadInput, FeatureStore, Scene,
    WordPiece, canonical_id, flag, model_inputs, normalise_boxes, pad, progress, read_captions,
    read_json, reading, region_inputs, run, save_png, write_json, write_whole)
from switchbert import (SwitchBertConfig, SwitchBertForReferring, SwitchBertForRetrieval,
    SwitchBertForVQA)
from train import (NUM_HELD_OUT, SwitchShares, add_run_flags, check_fits, device,
    first_process_first, fit, launch, load_checkpoint, match_scores, parse_settings, recall_at, say,
    share_of, stack, to_device, total, toy_world)

# --- 1. Settings ----------------------------------------------------------------------------------
#
# FULL is the paper's [supp. 2]; the batches are VOLTA's. The toy runs (DEVIATION D3) take toy
# pretraining's learning rate, and close their switches. A task overrides these tables in its class,
# as `full` and `toy`. anneal: share of the run after which the temperature reaches its floor, .2;
# None means the paper's rate, 1e-6 per example.

FULL = dict(epochs=20, batch=256, lr=1e-4, eval_every=1000, anneal=None)
TOY = dict(epochs=3, batch=64, lr=1e-3, eval_every=250, anneal=0.9)


def parse_args(argv=None):
    """(settings, checkpoint to resume from or None) of a task; (settings, None) of `ask`.

    A task's defaults depend on --data: see train.parse_settings.
    """
    argv = sys.argv[1:] if argv is None else argv
    p = argparse.ArgumentParser(description="Finetune Switch-BERT, evaluate it, ask it.")
    commands = p.add_subparsers(dest="command", required=True)
    for name, task in TASKS.items():
        c = commands.add_parser(name, help=task.__doc__.split("\n")[0],
            formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        folder = Path("data", name)
        flag(c, "--checkpoint", Path, "runs/pretrain/checkpoint.pt", "checkpoint to start from")
        flag(c, "--data", Path, folder if folder.is_dir() else None,
            f"folder with {task.files}; None: the toy world")
        c.add_argument("--scratch", action="store_true", help="start from random weights in the "
            "checkpoint's sizes; use another --out: what is pretraining worth?")
        if task is Refer:
            c.add_argument("--boxes", choices=["detected", "gt"], default="detected",
                help="the store to use: features-detected/ or features-gt/ (true boxes)")
        add_run_flags(c, Path("runs", name))
    c = commands.add_parser("ask", help="ask a finetuned model about your own pictures")
    c.add_argument("run", type=Path, help="folder of a finetuned run, or a checkpoint")
    c.add_argument("text", help="a question, a caption or a phrase, as the run was trained on")
    c.add_argument("pictures", nargs="+")
    flag(c, "--weights", Path, None, "the detector's; default: the toy world's")
    c.add_argument("-o", "--out", type=Path, default="answer.png", help="picture to write")
    if argv and argv[0] in TASKS:
        task = TASKS[argv[0]]
        return parse_settings(p, argv, lambda args: task.full if args.data else task.toy,
            task.name, commands.choices[task.name])
    return p.parse_args(argv), None


# --- 2. Answers -----------------------------------------------------------------------------------
#
# The official evaluation of VQA v2 (visualqa.org), with its quirks: without them numbers are not
# comparable. Ten people answered each question, and they often disagree. An answer that four or
# more of them gave counts fully, a rarer one in part: accuracies are 0 to 1, higher is better.
# They are also the targets of training.

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
# The official table maps each form that lacks one apostrophe to the full one; once it does the
# opposite. (It omits contractions that are words without apostrophe: hell, ill, were, its.)
CONTRACTIONS = {word[:i] + word[i + 1 :]: word
    for word in CONTRACTED for i, c in enumerate(word) if c == "'"} | {"somebody'd": "somebodyd"}


def strip_answer(answer):
    """An answer as the official evaluation strips it, before any comparison."""
    return answer.replace("\n", " ").replace("\t", " ").strip()


def normalise_answer(answer):
    """An answer as the official evaluation compares it where annotators disagree.

    A punctuation mark becomes a space; it vanishes if it touches a space anywhere in the answer, or
    if the answer has a comma between digits. A full stop stays only before a digit.

    >>> [normalise_answer(a) for a in ("The red-car!", "two", "1,000", "3.5", "dont")]
    ['red car', '2', '1000', '3.5', "don't"]
    """
    text = answer = strip_answer(answer)
    thousands = re.search(r"\d,\d", answer)
    for sign in PUNCTUATION:
        apart = f"{sign} " in answer or f" {sign}" in answer
        text = text.replace(sign, "" if apart or thousands else " ")
    # The official pattern begins with (?!<=\d), a mistyped lookbehind that is always true here; and
    # it passes re.UNICODE, 32, as the number of replacements.
    text = re.sub(r"\.(?!\d)", "", text, count=32)
    words = [DIGITS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(w, w) for w in words if w not in ("a", "an", "the"))


def accuracy_table(answers):
    """{answer: official accuracy} of the annotators' answers (all others score 0), and whether
    answers are compared as they are (True: all annotators agree) or normalised (False).

    answers: the annotators', usually ten. Officially each is left out once, and a prediction scores
    min(1, matches among the others / 3); the result is the mean. With n matches among N that is
    ((N - n) min(1, n/3) + n min(1, (n-1)/3)) / N, for N = 10 and n = 0, 1, ...: 0, .3, .6, .9, 1.

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


def answer_vocabulary(questions):
    """The answers that a model chooses from: each is the majority of at least nine questions,
    normalised (so without commas), the most frequent first. On VQA v2's train and val: 3,129.
    """
    counts = Counter(normalise_answer(q["majority"]) for q in questions)
    return sorted((a for a, n in counts.items() if n >= 9), key=lambda a: (-counts[a], a))


# --- 3. Tasks -------------------------------------------------------------------------------------
#
# A task is what train.fit takes: examples, model, collate, counts, sums, evaluate. It holds items:
# dicts with image_id, text, and what the task needs besides. `predict` chooses an answer or a
# region for each of them, `score` turns choices into scores: shares, 0 to 1, higher is better.
# The first score is the headline of the task. Read Task, then one of the three.


class Task(torch.utils.data.Dataset):
    """Texts about images: training examples, held-out splits, loss, predictions and scores.

    splits: {name: items}, with "train" among them. Training items whose image has no features are
    left out; a held-out one is answered from its text alone, so that a result covers every
    question. Both are counted in `missing`. Raises BadInput if no training item is left. labels:
    the answers that a checkpoint's head chooses from.

    A subclass defines: name, unit, files, model_class, max_tokens [supp. 2]; from_folder and
    from_scenes -> splits; for one item: targets, score_item, describe; and its reply to `ask`.
    Targets are shares, 0 to 1, and the loss is binary cross entropy; Retrieval replaces both.
    """

    full, toy = FULL, TOY
    clip, weight_decay, initial_temperature = 1.0, 1e-4, 1.0  # A7, supp. 2
    # Gates learn as fast as the rest: if each samples the wrong option once in ten times, a third
    # of the samples of a four-layer model are noise, until gates decide. (A10 is for pretraining.)
    gate_rate = 1.0
    loss_names = ("loss",)
    evaluates_at_start = True
    looked_at = 1000  # items of val that are evaluated during training
    needs_features = False  # True: held-out items without features are left out

    def __init__(self, store, tokenizer, splits, args, labels=None):
        self.store, self.tokenizer, self.labels = store, tokenizer, labels
        self.seed, self.blind = args.seed, args.blind
        self.examples = self  # as fit calls them
        self.missing, self.held_out = {}, {}
        for name, items in splits.items():
            rows = store.rows([item["image_id"] for item in items])
            found = [item for item, row in zip(items, rows) if row >= 0]
            self.missing[name] = len(items) - len(found)
            if self.missing[name]:
                say(f"{name}: {self.missing[name]} of {len(items)} {self.unit} have no features")
            if name == "train" or self.needs_features:
                items = found
            if items:
                self.held_out[name] = items
        self.items = self.held_out.pop("train", [])[: args.limit]
        if not self.items:
            raise BadInput(f"no training {self.unit} whose image is in {store.folder}; expected "
                f"{self.files}")
        self.lengths = lengths_of(self.items)

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
        """The task's model, new; labels: the answers it chooses from, None where none are fixed."""
        return cls.model_class(config) if labels is None else cls.model_class(config, len(labels))

    def build_model(self, config, weights):
        """The task's model: its encoder from pretrained weights ({}: new), its head new."""
        model = self.new_model(config, self.labels)
        model.load_state_dict(weights, strict=False)  # pretraining's heads have other names
        return model

    def collate(self, examples):
        """The encoder's inputs, and targets, 0 to 1, for answers (B, A) or regions (B, R)."""
        targets = [self.targets(example["item"]) for example in examples]
        return {**model_inputs(examples), "targets": pad(targets).float()}

    def loss(self, logits, batch):
        """Binary cross entropy, summed over answers or regions."""
        return F.binary_cross_entropy_with_logits(logits, batch["targets"], reduction="sum")

    @staticmethod
    def counts(batch):
        """(1,): examples; every loss here is a mean over them."""
        return torch.tensor([float(len(batch["targets"]))])

    def sums(self, model, batch, tau):
        """(1,): the loss, summed over a batch; and the encoder's output."""
        inputs = {k: v for k, v in batch.items() if k != "targets"}
        logits, out = model(**inputs, temperature=tau)
        return self.loss(logits.float(), batch)[None], out

    @torch.no_grad()
    def predict(self, model, items, tau=None, batch_size=200):
        """(N,) the best answer or region for every item, and what the switches chose.

        Retrieval has one score per item and nothing to choose: only its switches are used.
        """
        model.eval()
        chosen = torch.zeros(len(items), dtype=torch.long, device=device())
        switches = SwitchShares(model.config)
        parts = share_of(lengths_of(items), batch_size)
        for part in progress(parts):
            inputs = model_inputs([self.example(items[i]) for i in part])
            logits, out = model(**to_device(inputs), temperature=tau)
            chosen[part] = logits.argmax(dim=-1)
            switches.add(out)
        model.train()
        return total(chosen), switches.shares()

    def score(self, items, choices):
        """(scores, predictions) of choices (N,): each score is a mean over the items that have it,
        scores of most items first; predictions is a list of dicts for a file.
        """
        totals, numbers, predictions = Counter(), Counter(), []
        for item, choice in zip(items, choices.tolist()):
            prediction, scores = self.score_item(item, choice)
            predictions.append(prediction)
            totals.update(scores)  # adds each to its total
            numbers.update(scores.keys())
        return {name: totals[name] / n for name, n in numbers.most_common()}, predictions

    def evaluate_items(self, model, items, tau=None):
        """(scores, predictions, switches) of some items; tau: None for hard switches."""
        choices, switches = self.predict(model, items, tau)
        return *self.score(items, choices), switches

    def evaluate(self, model):
        """Hard scores and what the switches chose, on the split val, without one on train."""
        items = self.held_out.get("val", self.items)[: self.looked_at]
        scores, _, switches = self.evaluate_items(model, items)
        return scores, switches

    @staticmethod
    def headline(scores):
        """The score in the printed line: the task's first."""
        return f"held-out {next(iter(scores.values())):.3f}"


class VQA(Task):
    """questions about pictures, answered from a vocabulary of answers [VQA v2]

    An item also has: question_id; answers, those of ten annotators ([]: unpublished); majority,
    the most frequent one; answer_type (yes/no, number, other); question_type ("how many", ...).
    """

    name, unit = "vqa", "questions"
    model_class = SwitchBertForVQA
    max_tokens = 23
    files = "features/ and VQA v2's questions and annotations (*.json)"

    @staticmethod
    def from_folder(folder):
        """The splits of a folder with any of VQA v2's JSON files, recognised by their content.

        The subset train2014 becomes the split train. Questions without annotations keep their
        subset's name: test-dev2015 is part of test2015, and each has its own submission. Raises
        BadInput: "" + entry is a TypeError unless the entry is text.
        """
        asked, truths, splits = [], {}, defaultdict(list)
        for path in sorted(folder.glob("*.json")):
            content = read_json(path, dict)
            with reading(path, "questions or annotations of VQA v2") as at:
                for at.entry, x in enumerate(content.get("questions", [])):
                    item = dict(image_id=x["image_id"], text="" + x["question"],
                        question_id=int(x["question_id"]), answers=[])
                    asked.append(("" + content["data_subtype"], item))
                for at.entry, x in enumerate(content.get("annotations", [])):
                    answers = ["" + given["answer"] for given in x["answers"]]
                    truths[int(x["question_id"])] = dict(answers=answers,
                        majority="" + x["multiple_choice_answer"],
                        answer_type="" + x["answer_type"], question_type="" + x["question_type"])
        for subset, item in asked:
            item |= truths.get(item["question_id"], {})
            splits[subset.rstrip("0123456789") if item["answers"] else subset].append(item)
        return splits

    @staticmethod
    def from_scenes(training, held_out):
        """The toy world's questions, in the form of VQA v2's: ten annotators who agree."""
        types = {"count": "number", "yes": "yes/no", "no": "yes/no"}

        def items(numbers, n):
            """Up to n questions about each of these scenes."""
            for i in numbers:
                for k, (text, answer, kind) in enumerate(Scene(i).questions(n)):
                    answer_type = types.get(kind) or types.get(answer, "other")
                    yield dict(image_id=i, text=text, question_id=1000 * i + k, majority=answer,
                        answers=[answer] * 10, question_type=kind, answer_type=answer_type)
        return {"train": [*items(training, 8)], "val": [*items(held_out, 5)]}

    def __init__(self, store, tokenizer, splits, args, labels=None):
        labels = labels or answer_vocabulary(splits["train"])
        super().__init__(store, tokenizer, splits, args, labels)
        if not labels:
            raise BadInput(f"{store.folder}: no answer of nine training questions to choose from")
        self.index = {answer: i for i, answer in enumerate(labels)}

    def targets(self, item):
        """(A,) the score of every answer.

        ASSUMPTION A11: a target is the official accuracy that its answer would get, normalisation
        included. (hengyuan-hu's published targets, which most papers use, look up raw answers; the
        two differ where annotators disagree in articles or contractions.)
        """
        targets = np.zeros(len(self.labels))
        table, _ = accuracy_table(item["answers"])
        for answer in table.keys() & self.index.keys():
            targets[self.index[answer]] = table[answer]
        return targets

    def score_item(self, item, choice):
        """(prediction, scores): official accuracy, overall and by type of answer and question; and
        the ceiling, the accuracy of the best answer in the vocabulary.
        """
        answer = self.labels[choice]
        prediction = {"question_id": item["question_id"], "answer": answer}
        if not item["answers"]:
            return prediction, {}
        accuracy = answer_accuracy(answer, item["answers"])
        return prediction, {"accuracy": accuracy, "ceiling": self.targets(item).max(),
            item["answer_type"]: accuracy, item["question_type"]: accuracy}

    def describe(self, item, prediction):
        """(image to show, boxes, lines, accuracy 0 to 1) of an example."""
        answer = prediction["answer"]
        lines = [item["text"], f"answer: {answer}", f"truth: {item['majority']}"]
        return item["image_id"], {}, lines, answer_accuracy(answer, item["answers"])

    @staticmethod
    def reply(logits, boxes, labels):
        """The five best answers, each with the accuracy that the model expects of it, 0 to 1.

        Several answers to a question can be right, so these numbers need not add up to 1.
        """
        best = logits.sigmoid().topk(min(5, len(labels)))
        return [f"{share:.2f}  {labels[i]}" for share, i in zip(*best)], {}


class Retrieval(Task):
    """texts that find their image, and images that find their texts [Karpathy's splits]

    Trained to choose the right pair among four; evaluated on the full matrix of texts and images,
    where every pair goes through the model: 5,000 x 1,000 on Flickr30k.
    """

    name, unit = "retrieval", "captions"
    model_class = SwitchBertForRetrieval
    max_tokens = 30
    files = "features/ and Karpathy's dataset_flickr30k.json or dataset_coco.json"
    full = FULL | {"batch": 64}
    toy = TOY | {"epochs": 1, "batch": 32}
    looked_at = 100
    needs_features = True  # a pair without an image cannot be ranked

    @staticmethod
    def from_folder(folder):
        """The splits of the caption files in a folder. Raises BadInput."""
        splits = defaultdict(list)
        for path in folder.glob("*.json"):
            for split in ("train", "val", "test"):
                splits[split] += [dict(image_id=i, text=t) for i, t in read_captions(path, split)]
        return splits

    @staticmethod
    def from_scenes(training, held_out):
        """Captions of scenes: the first 100 held-out scenes are test, the next 50 val."""
        def items(numbers):
            return [dict(image_id=str(i), text=t) for i in numbers for t in Scene(i).captions(2)]
        return {"train": items(training), "val": items(held_out[100:150]),
            "test": items(held_out[:100])}

    def __init__(self, *args):
        super().__init__(*args)
        self.images, self.own = images_of(self.items)
        if len(self.images) < 3:
            raise BadInput(f"{self.store.folder}: captions of fewer than three images here; a "
                "caption is trained against other images and their captions")
        self.nearest = self.nearest_images()

    def nearest_images(self):
        """For each image its hard negative, the most similar other one: a list of indices.

        Similarity is the cosine of global features, the means over an image's regions. Anything
        tells a street from a beach; only details of a caption tell it from another street.
        """
        rows = progress(self.store.rows(self.images), "features")
        means = [self.store[row]["features"].mean(axis=0, dtype=np.float32) for row in rows]
        means = F.normalize(torch.from_numpy(np.stack(means)).to(device()))
        nearest = []
        for block in means.split(1000):
            # The nearest is the image itself; the second is the nearest other one.
            nearest += (block @ means.T).topk(2).indices[:, 1].tolist()
        return nearest

    def __getitem__(self, key):
        """The four candidates of a caption [ViLBERT]: its own image; its image with another image's
        caption; another image; the image most like its own. The first is right.
        """
        epoch, index = key
        rng = np.random.default_rng([self.seed, epoch, index])
        item, own = self.items[index], self.own[index]
        other = index
        while self.own[other] == own:  # drawn among captions: an image with more comes more often
            other = rng.integers(len(self))
        # Among images each comes equally often: 1 to number - 1 places after the own one, round.
        number = len(self.images)
        image = self.images[(own + 1 + rng.integers(number - 1)) % number]
        hard = self.images[self.nearest[own]]
        pairs = (item, item | {"text": self.items[other]["text"]}, item | {"image_id": image},
            item | {"image_id": hard})
        return [self.example(pair) for pair in pairs]

    def build_model(self, config, weights):
        """The task's model, its head pretrained as well ({}: all of it new)."""
        if not weights:
            return SwitchBertForRetrieval(config)
        return SwitchBertForRetrieval.from_pretraining(config, weights)

    def collate(self, examples):
        """The encoder's inputs for 4 B pairs, and targets (B,): the right one of each four, 0."""
        inputs = model_inputs(sum(examples, []))
        return {**inputs, "targets": torch.zeros(len(examples), dtype=torch.long)}

    def loss(self, scores, batch):
        """Cross entropy over the four candidates."""
        return F.cross_entropy(scores.view(-1, 4), batch["targets"], reduction="sum")  # (B, 4)

    def evaluate_items(self, model, items, tau=None):
        """(recalls, predictions, switches) over the matrix of some texts and their images."""
        images, own = images_of(items)
        own = torch.tensor(own)
        ks = (1, 5, 10)
        # No store has an image "": for a blind model it stands for every image.
        shown = [""] * len(images) if self.blind else images
        self.scores = match_scores(model, self.store, self.tokenizer,
            [item["text"] for item in items], shown, self.max_tokens, tau)
        recalls = recall_at(self.scores, own, ks)
        if len(images) == 5000:  # COCO: the 1K protocol is the mean over five folds
            folds = []
            for k, fold in enumerate(self.scores.split(1000, dim=1)):
                texts = own // 1000 == k
                folds.append(recall_at(fold[texts], own[texts] % 1000, ks))
            recalls |= {f"1K {name}": np.mean([fold[name] for fold in folds]) for name in recalls}
        best = self.scores.argmax(dim=1).tolist()
        predictions = [item | {"found": images[k]} for item, k in zip(items, best)]
        return recalls, predictions, self.predict(model, items, tau)[1]

    def describe(self, item, prediction):
        """(image to show, boxes, lines, right) of an example; shows the image that was found."""
        own, found = item["image_id"], prediction["found"]
        lines = [item["text"], f"found {found}, right is {own}"]
        return found, {}, lines, found == own

    @staticmethod
    def reply(logits, boxes, labels):
        """The score. Training compares candidates: only differences count, zero means nothing."""
        return [f"{logits:+.2f}"], {}


class Refer(Task):
    """phrases that mean one thing in a picture, and which box it is [RefCOCO+]

    An item also has: box, the one that is meant, corners x1, y1, x2, y2 in pixels; ref_id, sent_id;
    kind. In the toy world kind is attribute or relation, and alike the number of things of its
    shape. Beware: torchvision's detector ("coco") was trained on RefCOCO+'s test pictures.
    """

    name, unit = "refer", "expressions"
    model_class = SwitchBertForReferring
    max_tokens = 20
    files = "features-detected/ or features-gt/, refs(unc).p and instances.json"
    # The task is learned in 100 steps: evaluate often, to see what pretraining contributes.
    toy = TOY | {"epochs": 1, "eval_every": 25}

    @staticmethod
    def from_folder(folder):
        """The splits of RefCOCO+: train, val, testA (people), testB (all else), test (both)."""
        boxes, splits = {}, defaultdict(list)
        path = folder / "instances.json"
        with reading(path, "RefCOCO's instances") as at:
            for at.entry, a in enumerate(read_json(path)["annotations"]):
                x, y, w, h = map(float, a["bbox"])
                boxes[a["id"]] = [x, y, x + w, y + h]
        path = folder / "refs(unc).p"
        with reading(path, "a pickle of RefCOCO's plain lists, dicts and strings") as at:
            with open(path, "rb") as file:
                refs = PlainUnpickler(file, encoding="latin1").load()  # Python 2 wrote it
            for at.entry, ref in enumerate(refs):
                for s in ref["sentences"]:
                    splits[ref["split"]].append(dict(image_id=ref["image_id"], text="" + s["sent"],
                        box=boxes[ref["ann_id"]], ref_id=ref["ref_id"], sent_id=s["sent_id"],
                        kind="expression"))
        splits["test"] = splits["testA"] + splits["testB"]
        return splits

    @staticmethod
    def from_scenes(training, held_out):
        """The toy world's expressions."""
        def items(numbers, n):
            """Up to n expressions for each of these scenes."""
            for scene in map(Scene, numbers):
                for k, (text, index, kind) in enumerate(scene.expressions(n)):
                    thing = scene.things[index]
                    alike = [other for other in scene.things if other.shape == thing.shape]
                    yield dict(image_id=scene.number, text=text, box=thing.box, kind=kind,
                        ref_id=scene.number, sent_id=k, alike=len(alike))
        return {"train": [*items(training, 8)], "val": [*items(held_out, 6)]}

    def build_model(self, config, weights):
        """As every task's, the pooler frozen: this head reads region states, so no gradient reaches
        the pooler, and DistributedDataParallel would wait for one.
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
        """(n,) the IoU of every region with the box that is meant; 0 if the model sees none."""
        return np.zeros(1) if self.blind else self.overlaps(item)[1]

    def loss(self, logits, batch):
        """As every task's, over real regions only: the logits of padding are not the model's."""
        real = batch["region_mask"].bool()
        return super().loss(logits[real], {"targets": batch["targets"][real]})

    def score_item(self, item, choice):
        """(prediction, scores): IoU >= .5 of the chosen region; of any (oracle); toy: by kind."""
        boxes, iou = self.overlaps(item)
        right = (iou >= 0.5).tolist()
        scores = {"accuracy": right[choice], "oracle": any(right)}
        if item["kind"] != "expression":
            scores[item["kind"]] = right[choice]
        if item["kind"] == "relation":  # the best guess from the words alone, without places
            scores["relation by attributes alone"] = 1 / item["alike"]
        return dict(ref_id=item["ref_id"], sent_id=item["sent_id"], box=boxes[choice].tolist(),
            iou=float(iou[choice])), scores

    def describe(self, item, prediction):
        """(image to show, boxes, lines, IoU) of an example: white is meant, magenta chosen."""
        boxes = {"white": item["box"], "magenta": prediction["box"]}
        iou = prediction["iou"]
        return item["image_id"], boxes, [item["text"], f"IoU {iou:.2f}"], iou

    @staticmethod
    def reply(logits, boxes, labels):
        """The box that the phrase means: the IoU that the model expects, and its corners."""
        best = logits.argmax()
        box = [round(corner) for corner in boxes[best].tolist()]
        return [f"{logits[best].sigmoid():.2f}  box {box}"], {"magenta": box}


TASKS = {task.name: task for task in (VQA, Retrieval, Refer)}


def lengths_of(items):
    """(N,): the spaces in each text, about its words: batches hold texts of similar length."""
    return np.array([item["text"].count(" ") for item in items])


def images_of(items):
    """The images of some items, each once, and for each item the index of its image: two lists."""
    places = {}
    own = [places.setdefault(item["image_id"], len(places)) for item in items]
    return list(places), own


def box_iou(boxes, box):
    """(n, 4), (4,) corners -> (n,) intersection over union, 0 to 1."""
    sides = np.minimum(boxes, box)[:, 2:] - np.maximum(boxes, box)[:, :2]
    both = sides.clip(0).prod(axis=1)  # 0 where the boxes do not meet
    each = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    return both / np.maximum(each + (box[2:] - box[:2]).prod() - both, 1e-9)


class PlainUnpickler(pickle.Unpickler):
    """Reads lists, dicts, strings and numbers only.

    A pickle can call any class or function that it names while it is read; this one admits none.
    """

    def find_class(self, module, name):
        """Refuse any class or function."""
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


# --- 4. The run -----------------------------------------------------------------------------------
#
# Everything is evaluated twice. Hard switches take the best mode and depth in each layer; soft ones
# mix all of them at temperature .2, the floor of training. If the two scores agree, closing the
# switches costs nothing: unused depths and modes can be dropped.


def finetune(args, checkpoint=None):
    """A task's run from start to end. Returns its results, or None if it was stopped.

    results: {split: {"hard": scores, "soft": scores}}, scores {name: number}, empty for a split
    without answers.
    """
    kind = TASKS[args.command]
    say(f"{kind.name} on {args.data or 'the toy world'}")

    # 1. The start: the run's own checkpoint, or the pretrained one.
    source = checkpoint or load_checkpoint(args.checkpoint, "pretraining")

    # 2. The task and its model. Words come from the checkpoint; so do answers when resuming.
    store, splits = load_task(kind, args)
    check_fits(source, store)
    task = kind(store, WordPiece(source["vocab"]), splits, args, source.get("labels"))
    torch.manual_seed(args.seed)
    weights = {} if args.scratch or checkpoint else source["model"]
    task.model = task.build_model(SwitchBertConfig(**source["config"]), weights)

    # 3. Training, in the same loop as pretraining.
    if fit(args, task, checkpoint) is None:
        return None

    # 4. Every split, with hard and with soft switches.
    results, predictions = {}, {}
    for split, items in task.held_out.items():
        hard, predictions[split], _ = task.evaluate_items(task.model, items)
        if kind is Retrieval and RANK == 0:
            write_whole(args.out / f"scores-{split}.npy",
                lambda file: np.save(file, task.scores.numpy()), "wb")
        soft = task.evaluate_items(task.model, items, 0.2)[0] if hard else {}
        results[split] = {"hard": hard, "soft": soft}
    if RANK == 0:
        write_results(args, task, results, predictions)
    return results


def load_task(kind, args):
    """(store, splits) of a task's folder, or of the toy world."""
    if args.data is None:
        if kind is Refer and args.boxes == "gt":
            raise BadInput("--boxes gt: the toy world has detected boxes only")
        with first_process_first():
            store = toy_world().store
        training = range(TRAIN_SCENES, TRAIN_SCENES + len(store) - NUM_HELD_OUT)
        held_out = range(HELD_OUT_SCENES, HELD_OUT_SCENES + NUM_HELD_OUT)
        return store, kind.from_scenes(training, held_out)
    features = f"features-{args.boxes}" if kind is Refer else "features"
    return FeatureStore(args.data / features), kind.from_folder(args.data)


def write_results(args, task, results, predictions):
    """Write the files of a result; print its table. A split without answers becomes a submission.

    result.json holds settings and scores, predictions.json every answer, a submission the answers
    in the evaluation server's format. examples.png shows the split val.
    """
    out, held_out = args.out, task.held_out
    write_json(out / "predictions.json", predictions)
    write_json(out / "result.json",
        vars(args) | {"without_features": task.missing, "results": results})
    for split, found in results.items():
        say(f"{split:32s}            hard            soft")
        for name, hard in found["hard"].items():
            say(f"  {name:30s}{hard:16.3f}{found['soft'][name]:16.3f}")
        if not found["hard"]:
            write_json(out / f"submission-{split}.json", predictions[split])
            say(f"  no answers to compare with; the model's are in submission-{split}.json")
    if "val" in held_out:
        examples = zip(held_out["val"], predictions["val"])
        draw_examples(out / "examples.png", task, examples, args.data)
    if args.data is None:
        for number in range(HELD_OUT_SCENES, HELD_OUT_SCENES + 3):
            save_png(out / f"scene-{number}.png", Scene(number).draw())
    say(f"the results are in {out}")


# --- 5. Pictures ----------------------------------------------------------------------------------
#
# A score says how often a model is right; its answers show where it is wrong.

SIDE = 230  # pixels of a picture in its frame
ZOOM = 4  # scenes are drawn this many times larger


def picture_of(image_id, folder):
    """A picture from the data folder's images/, or grey without one; folder None: a drawn scene,
    ZOOM times as large as the model sees it: a circle of 14 pixels would look like a square.
    """
    if folder is None:
        return Scene(int(image_id)).draw(ZOOM)
    for path in (folder / "images").rglob("*.*"):
        if canonical_id(path.name) == canonical_id(image_id):
            return Image.open(path).convert("RGB")
    return Image.new("RGB", (640, 640), "grey")


def panel(image, boxes, lines, frame="white"):
    """A picture in a frame, with boxes {colour: (x1, y1, x2, y2)} in its pixels, and text below."""
    edge = 1 + max(image.size) // 150
    for colour, box in boxes.items():
        # Drawn outside the box: a small circle with its rim covered looks like a square.
        outside = np.add(box, (-edge, -edge, edge, edge)).tolist()
        ImageDraw.Draw(image).rectangle(outside, outline=colour, width=edge)
    image = ImageOps.expand(ImageOps.pad(image, (SIDE, SIDE), color="white"), 5, frame)
    text = "\n".join(textwrap.fill(line, 40) for line in lines)
    image = ImageOps.expand(image, (5, 5, 5, 30 + 18 * text.count("\n")), "white")
    font = ImageFont.load_default(11)
    ImageDraw.Draw(image).multiline_text((10, SIDE + 20), text, "black", font, spacing=5)
    return image


def draw_examples(path, task, examples, folder):
    """Draw the first four right and first four wrong (item, prediction) pairs, one per image."""
    panels, shown = {"green": [], "red": []}, set()
    for item, prediction in examples:
        image_id, boxes, lines, right = task.describe(item, prediction)
        zoom = ZOOM if folder is None else 1
        boxes = {colour: np.multiply(box, zoom) for colour, box in boxes.items()}
        frame = "green" if right >= 0.5 else "red"
        if len(panels[frame]) < 4 and image_id not in shown:
            shown.add(image_id)
            panels[frame].append(panel(picture_of(image_id, folder), boxes, lines, frame))
    save_png(path, stack(panels["green"] + panels["red"], columns=4))


# --- 6. Your own pictures -------------------------------------------------------------------------
#
# A model knows the regions of one detector. Another's features can have the same size but another
# meaning: every answer would be wrong, without an error. So a checkpoint records its detector, and
# that one finds the regions of your pictures.


@torch.no_grad()
def ask(args):
    """Print and draw what a finetuned model says of a text and each picture, best score first."""
    from extract_features import build_detector, picture_regions  # training needs no torchvision

    path = args.run / "checkpoint.pt" if args.run.is_dir() else args.run
    saved = load_checkpoint(path, *TASKS)
    task, labels, store = TASKS[saved["task"]], saved.get("labels"), saved["store"]
    name, weights = store["detector"], args.weights
    if name == "toy":
        weights = weights or "runs/world/detector.pt"
    if name == "vg" and not weights:
        raise BadInput(f"{path}: was trained with the vg detector; give its weights with --weights "
            "pytorch_model.bin")
    detector = build_detector(name, weights)
    model = task.new_model(SwitchBertConfig(**saved["config"]), labels).eval()
    model.load_state_dict(saved["model"])
    ids = np.array(WordPiece(saved["vocab"]).encode(args.text, task.max_tokens))
    replies = []
    for picture in args.pictures:
        image, boxes, features, _ = picture_regions(detector, picture, store["num_regions"])
        if name == "toy" and image.size != (SCENE_PIXELS, SCENE_PIXELS):
            print(f"note: {picture} is no drawn scene of {SCENE_PIXELS} pixels, and this model has "
                "seen nothing else; what it says means little")
        places = normalise_boxes(boxes, image.size)
        example = dict(input_ids=ids, region_features=features, region_boxes=places)
        logits, _ = model(**model_inputs([example]))
        lines, found = task.reply(logits[0], boxes, labels)
        lines = [f"{picture}: {args.text}", *lines]
        replies.append((logits.max().item(), lines, panel(image, found, lines)))
    replies.sort(key=lambda reply: reply[0], reverse=True)
    for _, lines, _ in replies:
        print(*lines, sep="\n  ")
    save_png(args.out, stack([drawn for _, _, drawn in replies], columns=4))
    print(args.out)


def main(argv=None):
    """Finetune, or answer."""
    args, checkpoint = parse_args(argv)
    if args.command == "ask":
        return ask(args)
    return launch(args, lambda: finetune(args, checkpoint))


if __name__ == "__main__":
    run(main)
