r"""finetune.py: from a pretrained checkpoint to answers, rankings and boxes
=========================================================================

Where this stands

    train.py --> runs/pretrain/checkpoint.pt --+
                                               |   python finetune.py vqa | retrieval | refer
    feature store, questions, captions,        v
    expressions -------------------> SwitchBert --> pooled (B, P) --> answers (B, A)      VQA
                                               |              \-> score of the pair (B,) retrieval
                                               \-> region_states (B, R, D) --> (B, R)    referring
                                                          |
        runs/vqa/  checkpoint.pt  metrics.jsonl  result.json  predictions.json  examples.png ...

Letters: B batch, T pieces, R regions, L = T + 1 + R, H heads, D hidden, P pooled, A answers.

Map of the file (* = read these first)

    1. Settings              what the toy run and the full run set the flags to
    2. The answers of VQA    the official accuracy, and the answers to choose from
    3. Three tasks         * what they share; VQA, Retrieval, Refer
    4. Run and result      * training, hard and soft evaluation, the files of a result
    5. Examples              a picture of right and wrong predictions
    6. Your own pictures     ask
    7. Machine room          the command line, pickle safety, drawing

    $ python finetune.py vqa                             answers to questions about scenes
    $ python finetune.py retrieval                       texts find images, images find texts
    $ python finetune.py refer                           phrases find regions
    $ python finetune.py ask runs/vqa "how many things are there ?" picture.png
    $ python finetune.py ask runs/retrieval "a red star" a.png b.png
    $ python finetune.py ask runs/pretrain texts.txt a.png b.png     which text fits which?

Run train.py first. With a folder data/vqa, data/retrieval or data/refer, a task uses the real
files and the paper's settings; without it, the toy world. Every task is a class that defines
its examples, model, loss and scores. train.fit does the rest: the loop, the processes, stopping
and resuming. A run prints one line per evaluation, and a table at the end:

    step   100/202  lr 5.7e-04  tau 0.42  loss 0.573 | val 0.969 | 1430 expressions/s, 9 s
    val                                         hard            soft
      accuracy                                 0.994           0.994

Assumptions and deviations: A8 (heads, losses), A11 (targets), D3 (settings of the toy runs).
"""

import argparse
import contextlib
import pickle
import re
import textwrap
from collections import Counter, defaultdict, namedtuple
from pathlib import Path

# Before torch: data.py sets a variable that torch reads on import.
from data import (COUNT, RANK, SCENE_PIXELS, BadInput, Captions, FeatureStore, Scene,
    WordPiece, canonical_id, canonical_split, column, device, files_below, flag, load_ahead,
    model_inputs, normalise_boxes, pad, picture_names, progress, read_json,
    reading, region_inputs, run, save_png, say, say_found, split_words, write_json)

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops, ImageDraw, ImageOps

import train
from train import (SwitchShares, add_run_flags, check_fits, fill_settings, fit, launch,
    load_checkpoint, match_scores, read_folder, recall_at, send, share_of, stack,
    switches_picture, sum_over_processes, to_device, toy_world)
from switchbert import (FINAL_TEMPERATURE, SwitchBertConfig, SwitchBertForReferring,
    SwitchBertForRetrieval, SwitchBertForVQA)

# --- 1. Settings --------------------------------------------------------------------------
#
# FULL holds the paper's settings [supp. 2], with VOLTA's batch sizes. TOY is DEVIATION D3: it has
# toy pretraining's learning rate, and its runs also end at the lowest temperature. Both differ
# from pretraining's settings only in how long a run is and how often it is evaluated. A task may
# override settings.

FULL = train.FULL | {"epochs": 20}
TOY = train.TOY | {"epochs": 3, "eval_every": 250}

# --- 2. The answers of VQA ----------------------------------------------------------------
#
# This is the official evaluation of VQA v2 (visualqa.org), quirks included: without them,
# numbers could not be compared. Ten people answered each question, and they often disagree.
# An answer that four or more of them gave counts fully, a rarer one in part. Accuracies run
# from 0 to 1; higher is better. They are also the targets of training.


def answer_accuracy(prediction, answers):
    """Official accuracy of a prediction, 0 to 1; answers: what the annotators said."""
    table, as_compared = accuracy_table(answers)
    return table[as_compared(prediction)]


def accuracy_table(answers):
    """{answer: official accuracy} of the annotators' answers (all others score 0), and how
    answers are compared: by strip_answer if all ten annotators agree, else by normalise_answer.

    Officially, each annotator is left out once. Against the other nine, a prediction scores
    min(1, matches / 3), and its accuracy is the mean of the ten scores. If n of the ten gave
    it, the mean is ((10 - n) min(1, n/3) + n min(1, (n-1)/3)) / 10: for n = 1, 2, 3 that is
    .3, .6, .9, and from 4 on it is 1. The rule is for ten annotators. If there are fewer or
    more, an answer's accuracy is the share of them who gave it, and answers are always normalised.
    >>> table, _ = accuracy_table(["red"] * 3 + ["a pink"] * 7)
    >>> dict(table)
    {'red': 0.9, 'pink': 1.0}
    """
    people = len(answers)
    agreed = len(set(map(strip_answer, answers))) == 1
    as_compared = strip_answer if agreed and people == 10 else normalise_answer
    table = Counter(map(as_compared, answers))
    for answer, n in table.items():
        table[answer] = min(10, 3 * n) / 10 if people == 10 else n / people
    return table, as_compared


def strip_answer(answer):
    """An answer as the official evaluation strips it, before any comparison."""
    return re.sub("[\n\t]", " ", answer).strip()


def normalise_answer(answer):
    """An answer as the official evaluation compares it where annotators disagree. Punctuation
    becomes a space; but a mark vanishes if it touches a space anywhere in the answer, or if the
    answer has a comma between digits. A full stop stays only before a digit.
    >>> [normalise_answer(a) for a in ("The red-car!", "two", "1,000", "3.5", "dont")]
    ['red car', '2', '1000', '3.5', "don't"]
    """
    answer = strip_answer(answer)
    thousands = re.search(r"\d,\d", answer)
    text = answer
    for sign in PUNCTUATION:
        apart = f"{sign} " in answer or f" {sign}" in answer
        text = text.replace(sign, "" if apart or thousands else " ")
    # The official pattern begins with (?!<=\d), a mistyped lookbehind that is always true
    # here; and it passes re.UNICODE, which is 32, as the number of replacements.
    text = re.sub(r"\.(?!\d)", "", text, count=32)
    words = [word for word in text.lower().split() if word not in ("a", "an", "the")]
    return " ".join(REPLACED.get(word, word) for word in words)


PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
CONTRACTIONS = """ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't
    hadn't've hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll
    ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't
    'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll
    somebody's someone'd someone'd've someone'll someone's something'd something'd've
    something'll that's there'd there'd've there're there's they'd they'd've they'll they're
    they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd
    where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've""".split()
# The official table maps each form that lacks one apostrophe to the full form; once it does
# the opposite. (Contractions that are other words without their apostrophe are not in it:
# hell, ill, were, its.)
REPLACED = {word[:i] + word[i + 1 :]: word
    for word in CONTRACTIONS for i, character in enumerate(word) if character == "'"}
REPLACED |= {"none": "0", "somebody'd": "somebodyd"}
NUMBERS = "zero one two three four five six seven eight nine ten".split()
REPLACED |= {word: str(number) for number, word in enumerate(NUMBERS)}


def answer_vocabulary(questions):
    """The answers that a model chooses from, the most frequent first. Each is the majority's
    answer to at least nine questions, normalised (so it has no commas): on VQA v2's train and
    val that gives 3,129. If there are fewer than 9,000 questions, a thousandth of them is enough.
    Raises BadInput if there are no questions.
    """
    # Sorted first, because most_common keeps the order of equally frequent answers.
    counts = Counter(sorted(normalise_answer(q["majority"]) for q in questions))
    least = min(9, len(questions) / 1000)
    answers = [answer for answer, n in counts.most_common() if n >= least]
    if not answers:
        raise BadInput("no training questions, so no answers to choose from")
    covered = sum(counts[answer] for answer in answers) / len(questions)
    say(f"{len(answers):,} answers to choose from; for {covered:.1%} of the training "
        "questions the majority's is among them")
    return answers


# --- 3. Three tasks -----------------------------------------------------------------------
#
# train.Task lists what train.fit needs of a task. A task here consists of items: dicts with
# image_id, text, and what the task needs besides. `predict` chooses an answer or a region for
# each item; `evaluate_items` scores the choices, from 0 to 1, higher is better. The first score
# is the headline of the task. Read Task, then one of the three.


class Task(train.Task):
    """Texts about images: training examples, held-out splits, loss, predictions and scores.

    splits: {name: items}, "train" among them. labels: the answers of a checkpoint's head. A
    training item whose image has no features is left out; a held-out one is answered from its
    text alone, so that a result covers every question. `missing` counts both. Raises BadInput
    if no training item is left.

    A subclass defines, besides the attributes of VQA below:
        from_folder(folder, store)  the splits of a folder of published files
        scene_items(scene, n)       up to n items of a toy scene
        targets(item)               numbers from 0 to 1, one per answer or region
        score_item(item, choice)    a prediction (a dict for a file) and its {name: score}
        describe(item, prediction)  for a picture: lines of text, boxes {colour: corners in
                                    pixels}, and how right the prediction is, 0 to 1
    """

    full = FULL
    toy = TOY
    most_per_scene = 5  # items of val for a scene of the toy world
    looked_at = 1000  # items of val that are evaluated during training
    needs_features = False  # True: held-out items without features are left out

    def __init__(self, store, tokenizer, splits, args, labels=None):
        self.store = store
        self.tokenizer = tokenizer
        self.seed = args.seed
        self.blind = args.blind
        self.workers = args.workers
        self.examples = self  # the data set that fit reads
        self.missing = {}
        self.held_out = {}
        for split, items in splits.items():
            self.missing[split] = len(items)
            try:
                rows = store.find(column(items, "image_id"), f"{split}: {self.unit}")
            except BadInput as error:  # not one image has features
                say(f"{error}; {split} is left out")
                continue
            usable = [item for item, row in zip(items, rows) if row >= 0]
            self.missing[split] -= len(usable)
            self.held_out[split] = usable if split == "train" or self.needs_features else items
        self.items = self.held_out.pop("train", [])[: args.limit]
        if not self.items and (args.epochs or not self.held_out):
            raise BadInput(
                f"no training {self.unit} for {store.folder}; expected {self.files}")
        self.watched = "val"  # the split that is evaluated during training
        if "val" not in self.held_out:
            self.watched = "train" if self.items else next(iter(self.held_out))
        if not self.held_out:
            say(f"no held-out {self.unit}: scores are of the {self.unit} it is trained on")
        self.captions = Captions((item["image_id"], item["text"]) for item in self.items)
        self.lengths = lengths_of(self.items)
        self.labels = labels or self.vocabulary(splits.get("train", []))
        # With this index, the targets of a question take a third of the time.
        self.index = {label: i for i, label in enumerate(self.labels or [])}

    @staticmethod
    def vocabulary(items):
        """The answers that the model chooses from; None where none are fixed."""

    @classmethod
    def from_scenes(cls, training, held_out):
        """The splits of the toy world; training, held_out: numbers of scenes."""
        def items(numbers, n):
            return [item for number in numbers for item in cls.scene_items(Scene(number), n)]
        return {"train": items(training, 8), "val": items(held_out, cls.most_per_scene)}

    def __len__(self):
        return len(self.items)

    def __getitem__(self, key):
        _, index = key  # (epoch, index)
        return self.example(self.items[index])

    def example(self, item):
        """What the model reads of an item, as numpy arrays; and the item itself."""
        row = None if self.blind else self.store.row(item["image_id"])
        ids = np.array(self.tokenizer.encode(item["text"], self.max_tokens))
        return dict(region_inputs(self.store, row), input_ids=ids, item=item)

    def inputs(self, items):
        """The encoder's inputs for some items."""
        return model_inputs([self.example(item) for item in items])

    def collate(self, examples):
        """The encoder's inputs, and targets, 0 to 1, for answers (B, A) or regions (B, R)."""
        targets = [self.targets(example["item"]) for example in examples]
        return dict(model_inputs(examples), targets=pad(targets).float())

    @classmethod
    def build_model(cls, config, labels, weights):
        """The task's model. labels: its answers, None without any. weights: those of a model of
        this task, or pretrained ones, whose heads have other names; what they lack is random.
        """
        sizes = {"num_answers": len(labels)} if labels else {}
        model = cls.model_class(config, **sizes)
        model.load_state_dict(weights, strict=False)
        return model

    def loss(self, logits, targets):
        """Binary cross entropy, summed over answers or regions. At the lowest logit and target
        0, those of padding, both the loss and its gradient are exactly 0.
        """
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="sum")

    def sums(self, model, batch, tau):
        """(1,): the loss, summed over a batch; and the encoder's output."""
        inputs = dict(batch)
        targets = inputs.pop("targets")
        logits, out = model(**inputs, temperature=tau)
        return self.loss(logits, targets)[None], out

    def __getstate__(self):
        """A loading process may get a copy of the task, its data set, but not of the model."""
        return vars(self) | {"model": None}

    @torch.no_grad()
    def predict(self, model, items, tau=None, batch_size=200):
        """(N,) the best answer or region for every item, and what the switches chose. tau: of
        soft switches; None for hard ones. Retrieval has one score per item: it uses only
        what the switches chose.
        """
        model.eval()
        chosen = torch.zeros(len(items), dtype=torch.long, device=device())
        switches = SwitchShares(model.config)
        batches = share_of(lengths_of(items), batch_size)  # indices of items
        # To start loading processes takes as long as a few batches do.
        workers = min(self.workers, len(batches) // 10)
        loader = load_ahead(items, batches, self.inputs, workers)
        for indices, inputs in zip(progress(batches), loader):
            logits, out = model(**to_device(inputs), temperature=tau)
            chosen[send(torch.from_numpy(indices))] = logits.argmax(dim=-1)
            switches.add(out)
        model.train()
        return sum_over_processes(chosen), switches.shares()

    def evaluate_items(self, model, items, tau=None):
        """(scores, switches, predictions: dicts for a file); tau: None for hard switches. A
        score is the mean over the items that have it. The scores that most items have come first.
        """
        choices, switches = self.predict(model, items, tau)
        sums = Counter()
        counts = Counter()
        predictions = []
        for item, choice in zip(items, choices.tolist()):
            prediction, scores = self.score_item(item, choice)
            predictions.append(prediction)
            sums.update(scores)  # adds each score to its sum
            counts.update(scores.keys())
        means = {name: sums[name] / n for name, n in counts.most_common()}
        return means, switches, predictions

    def evaluate(self, model):
        """Hard scores and what the switches chose, on the split that is watched."""
        items = self.held_out.get(self.watched, self.items)[: self.looked_at]
        return self.evaluate_items(model, items)[:2]

    def headline(self, scores):
        """What the printed line says: the task's first score, and which split it is of."""
        return f"{self.watched} {next(iter(scores.values())):.3f}"


def lengths_of(items):
    """(N,) about the number of words in each text: batches hold texts of similar length."""
    return np.array([item["text"].count(" ") for item in items])


class VQA(Task):
    """Questions about pictures, answered from a vocabulary of answers [VQA v2].

    An item also has: question_id; answers, those of ten annotators ([]: unpublished); majority,
    the most frequent one; answer_type (yes/no, number, other); question_type ("how many", ...).
    """

    name = "vqa"
    unit = "questions"  # what items are called in print
    truth = "majority"  # the entry of an item that is to be predicted
    model_class = SwitchBertForVQA
    max_tokens = 23  # [supp. 2], and so in the other tasks
    files = "features/ and VQA v2's questions and annotations (*.json)"
    vocabulary = staticmethod(answer_vocabulary)

    @staticmethod
    def from_folder(folder, _):
        """The splits of a folder with any of VQA v2's JSON files, recognised by their content.
        train2014 becomes train. A test subset without annotations keeps its name, for a
        submission; other questions without annotations are left out.
        """
        questions, truths = read_vqa(folder)
        ids = np.array([number for _, number in questions], dtype=bytes)
        ids = np.unique(ids)  # test-dev2015 asks some of test2015's questions again
        known = np.array(list(truths), dtype=bytes)
        # The questions of a submission have no annotations.
        if not all(subset.startswith("test") for subset, _ in questions):
            say_found(f"{folder}: questions", ids, np.isin(ids, known), "the annotations", known)
        unusual = sum(len(truth["answers"]) not in (1, 10) for truth in truths.values())
        if unusual:
            say(f"{folder}: {unusual:,} questions have neither 1 answer nor 10: see accuracy_table")
        splits = defaultdict(list)
        with reading(folder, "questions of VQA v2"):
            for (subset, number), item in questions.items():
                if number in truths:
                    splits[canonical_split(subset)].append(item | truths[number])
                elif subset.startswith("test"):
                    splits[subset].append(item)
        return splits

    @staticmethod
    def scene_items(scene, n):
        """Up to n questions about a scene, in VQA v2's form: ten annotators who agree."""
        for k, (text, answer, question_type) in enumerate(scene.questions(n)):
            answer_type = "yes/no" if answer in ("yes", "no") else "other"
            if question_type == "count":
                answer_type = "number"
            yield dict(image_id=scene.number, text=text, question_id=1000 * scene.number + k,
                majority=answer, answers=[answer] * 10, question_type=question_type,
                answer_type=answer_type)

    def targets(self, item):
        """(A,) ASSUMPTION A11: a target is the official accuracy that its answer would get,
        normalisation included. (Most papers use hengyuan-hu's published targets, which look up
        raw answers. The two differ where annotators disagree in articles or contractions.)
        """
        table, _ = accuracy_table(item["answers"])
        targets = np.zeros(len(self.labels))
        for answer in table.keys() & self.index.keys():
            targets[self.index[answer]] = table[answer]
        return targets

    def score_item(self, item, choice):
        """(prediction, scores): accuracy, also by type; ceiling, that of the best label."""
        answer = self.labels[choice]
        prediction = {"question_id": item["question_id"], "answer": answer}
        if not item["answers"]:
            return prediction, {}
        accuracy = answer_accuracy(answer, item["answers"])
        return prediction, {"accuracy": accuracy, "ceiling": self.targets(item).max(),
            item["answer_type"]: accuracy, item["question_type"]: accuracy}

    @staticmethod
    def describe(item, prediction):
        """The answer and the annotators' majority."""
        answer = prediction["answer"]
        lines = [f"answer: {answer}", f"truth: {item['majority']}"]
        return lines, {}, answer_accuracy(answer, item["answers"])


def read_vqa(folder):
    """The questions {(subset, id): item} and truths {id: what annotators said} of VQA v2's files
    in a folder. An id, in the files a number or a text, is bytes here. Raises BadInput.
    """
    items = {}  # id -> item
    questions = {}
    truths = {}
    for path in sorted(folder.glob("[!.]*.json")):
        content = read_json(path)
        with reading(path, "questions or annotations of VQA v2") as at:
            if isinstance(content, list):  # such as VQA v2's complementary pairs
                content = {}
            picture_name = picture_names(content)
            records = content.get("questions", []) + content.get("annotations", [])
            for at.entry, record in enumerate(records):
                number = str(record["question_id"]).encode()
                if "answers" in record:
                    repeated = number in truths
                    truths[number] = dict(
                        answers=[text_of(answer, "answer") for answer in record["answers"]],
                        majority=text_of(record, "multiple_choice_answer"),
                        answer_type=text_of(record, "answer_type"),
                        question_type=text_of(record, "question_type"))
                else:
                    item = dict(image_id=picture_name(record["image_id"]), answers=[],
                        text=text_of(record, "question"), question_id=record["question_id"])
                    key = (content["data_subtype"].lower(), number)
                    # Two subsets may share a question. Two questions may not share an id.
                    repeated = key in questions or items.setdefault(number, item) != item
                    questions[key] = item
                if repeated:
                    raise ValueError(f"question_id {record['question_id']} comes twice")
            if not records:
                say(f"{path}: has no questions and no annotations, so it is not read")
    return questions, truths


def text_of(record, key):
    """record[key]. Raises TypeError if it is not a text."""
    if not isinstance(record[key], str):
        raise TypeError(f"{key!r}: expected a text, found {record[key]!r}")
    return record[key]


class Retrieval(Task):
    """Texts that find their image, and images that find their texts [Karpathy's splits].

    The model is trained to choose the right pair among four. It is evaluated on the full
    matrix of texts and images, and every pair goes through it: 5,000 x 1,000 on Flickr30k.
    """

    name = "retrieval"
    unit = "captions"
    truth = "image_id"
    model_class = SwitchBertForRetrieval
    max_tokens = 30
    files = "features/ and captions, such as Karpathy's dataset_flickr30k.json"
    full = FULL | {"batch": 64}
    toy = TOY | {"epochs": 1, "batch": 32}
    looked_at = 100
    needs_features = True  # a pair without an image cannot be ranked

    @staticmethod
    def from_folder(folder, store):
        """The splits of a folder's captions, any that pretraining reads. Raises BadInput."""
        captions, split_names = read_folder(folder, store)
        splits = defaultdict(list)
        for (image_id, text), split in zip(captions, split_names):
            if text:
                splits[split.decode()].append(dict(image_id=image_id, text=text))
        if empty := (captions.texts == "").sum():
            say(f"{folder}: left out: {empty:,} captions without words")
        splits.pop("", None)  # training captions of val's images: see train.hold_out
        return splits

    @staticmethod
    def from_scenes(training, held_out):
        """Captions of scenes: the first 100 held-out scenes are test, the next 50 val."""
        def items(numbers):
            return [dict(image_id=str(number), text=text)
                for number in numbers for text in Scene(number).captions(2)]
        return {"train": items(training), "val": items(held_out[100:150]),
            "test": items(held_out[:100])}

    def __init__(self, store, tokenizer, splits, args, labels=None):
        super().__init__(store, tokenizer, splits, args, labels)
        self.images, self.own = images_of(self.items)
        if args.epochs:  # else it is only evaluated
            self.nearest = self.nearest_images()

    def nearest_images(self):
        """For each image the index of its hard negative: the other image whose mean feature is
        most similar, by cosine. To tell two streets apart, a model must use a caption's details.
        """
        if len(self.images) < 3:
            raise BadInput(f"{self.store.folder}: captions of fewer than three images")
        means = [self.store[row]["features"].mean(axis=0, dtype=np.float32)
            for row in progress(self.store.rows(self.images), "features")]
        means = F.normalize(torch.tensor(np.stack(means), device=device()))
        nearest = []
        for number, block in enumerate(means.split(1000)):
            similarity = block @ means.T
            # Copies of the image under other names are no negatives, nor is the image itself,
            # whose similarity TF32 may round to less.
            similarity[similarity > 0.99999] = -1
            similarity[:, 1000 * number :].fill_diagonal_(-2)
            nearest += similarity.argmax(dim=1).tolist()
        return nearest

    def __getitem__(self, key):
        """The four candidates of a caption [ViLBERT]: its own image; its image with another
        image's caption; another image; the image most like its own. The first is right.
        """
        _, index = key  # (epoch, index)
        rng = np.random.default_rng([self.seed, *key])
        item = self.items[index]
        own = self.own[index]
        # The wrong text is drawn among captions: an image with more of them comes more often.
        other = index
        while self.own[other] == own:
            other = rng.integers(len(self))
        # All other images come equally often: 1 to number - 1 places after its own, in a circle.
        number = len(self.images)
        image = (own + 1 + rng.integers(number - 1)) % number
        nearest = self.nearest[own]
        pairs = [item, item | {"text": self.items[other]["text"]},
            item | {"image_id": self.images[image]}, item | {"image_id": self.images[nearest]}]
        return [self.example(pair) for pair in pairs]

    @classmethod
    def build_model(cls, config, labels, weights):
        """As in every task, but the head is pretraining's matching head, if there is one."""
        if "itm_classifier.weight" in weights:
            return SwitchBertForRetrieval.from_pretraining(config, weights)
        return super().build_model(config, labels, weights)

    def collate(self, examples):
        """The encoder's inputs for 4 B pairs; targets (B,): the right one of each four, 0."""
        pairs = sum(examples, [])
        return dict(model_inputs(pairs), targets=torch.zeros(len(examples)).long())

    def loss(self, scores, targets):
        """Cross entropy over the four candidates, summed over captions."""
        return F.cross_entropy(scores.view(-1, 4), targets, reduction="sum")  # (B, 4)

    def evaluate_items(self, model, items, tau=None):
        """(recalls, switches, predictions) over the matrix of some texts and their images."""
        images, own = images_of(items)
        own = torch.tensor(own)
        # No store has an image "": for a blind model it stands for every image.
        seen = [""] * len(images) if self.blind else images
        texts = column(items, "text")
        scores = match_scores(model, self.store, self.tokenizer, texts, seen, self.max_tokens, tau)
        ks = (1, 5, 10)
        recalls = recall_at(scores, own, ks)
        if len(images) == 5000:  # COCO's 1K protocol: the mean over five folds of its images
            folds = []
            for k, fold in enumerate(scores.split(1000, dim=1)):
                inside = own // 1000 == k
                folds.append(recall_at(fold[inside], own[inside] % 1000, ks))
            for name in folds[0]:
                recalls[f"1K {name}"] = np.mean([fold[name] for fold in folds])
        elif len(images) > 1000 and tau is None:
            say(f"{len(images):,} images: 1K recalls need all 5,000 of COCO's")
        predictions = [{"found": images[k]} for k in scores.argmax(dim=1).tolist()]
        _, switches = self.predict(model, items, tau)
        return recalls, switches, predictions

    @staticmethod
    def describe(item, prediction):
        """Nothing but whether the right image was found: draw_examples shows both."""
        return [], {}, prediction["found"] == item["image_id"]


def images_of(items):
    """(images, own): every image once, and for each item the index of its image."""
    index = {}
    own = [index.setdefault(item["image_id"], len(index)) for item in items]
    return list(index), own


class Refer(Task):
    """Phrases that mean one thing in a picture, and which box it is [RefCOCO+].

    An item also has: box, the one that is meant, corners x1, y1, x2, y2 in pixels; ref_id,
    sent_id; in the toy world kind, attribute or relation.
    """

    name = "refer"
    unit = "expressions"
    truth = "box"
    model_class = SwitchBertForReferring
    max_tokens = 20
    files = "features-detected/ or features-gt/, refs(unc).p and instances.json"
    most_per_scene = 6
    # The task is learned in 100 steps: evaluate often, to see what pretraining contributes.
    toy = TOY | {"epochs": 1, "eval_every": 25}

    @staticmethod
    def from_folder(folder, _):
        """The splits of RefCOCO+: train, val, testA (people), testB (all else), test (both).
        RefCOCOg's file has another name, and only test, no testA or testB.
        """
        path = folder / "instances.json"
        boxes = {}
        with reading(path, "RefCOCO's instances") as at:
            instances = read_json(path)
            picture_name = picture_names(instances)
            for at.entry, record in enumerate(instances["annotations"]):
                x, y, width, height = map(float, record["bbox"])
                box = [x, y, x + width, y + height]
                if boxes.setdefault(record["id"], box) != box:
                    raise ValueError(f"annotation {record['id']} comes twice")
        paths = list(folder.glob("refs*.p"))
        if len(paths) != 1:
            raise BadInput(f"{folder}: expected one file refs(unc).p, or (umd) or (google); found "
                f"{len(paths)}")
        path = paths[0]
        splits = defaultdict(list)
        with reading(path, "a pickle of RefCOCO's plain lists, dicts and strings") as at:
            with open(path, "rb") as file:
                refs = PlainUnpickler(file, encoding="latin1").load()  # Python 2 wrote it
            for at.entry, ref in enumerate(refs):
                meant = dict(image_id=picture_name(ref["image_id"]), box=boxes[ref["ann_id"]],
                    ref_id=ref["ref_id"])
                for sentence in ref["sentences"]:
                    phrase = dict(text=text_of(sentence, "sent"), sent_id=sentence["sent_id"])
                    splits[canonical_split(ref["split"])].append(meant | phrase)
        if "testA" in splits:
            splits["test"] += splits["testA"] + splits["testB"]
        return splits

    @staticmethod
    def scene_items(scene, n):
        """Up to n expressions for a scene."""
        for k, (text, thing, kind) in enumerate(scene.expressions(n)):
            yield dict(image_id=scene.number, text=text, box=scene.things[thing].box,
                ref_id=scene.number, sent_id=k, kind=kind)

    def overlaps(self, item):
        """The item's regions, boxes (n, 4), and their IoU (n,) with the box that is meant. An
        image without features has one region, of zeros, which overlaps nothing.
        """
        from torchvision.ops import box_iou  # the other tasks need no torchvision
        row = self.store.row(item["image_id"])
        boxes = np.zeros((1, 4), np.float32) if row is None else self.store[row]["boxes"]
        meant = torch.tensor([item["box"]]).float()
        iou = box_iou(torch.tensor(boxes), meant)  # (n, 1)
        return boxes, iou[:, 0].numpy()

    def targets(self, item):
        """(n,) IoU of every region with the box that is meant; 0 if the model sees none."""
        if self.blind:
            return np.zeros(1)
        _, iou = self.overlaps(item)
        return iou

    def score_item(self, item, choice):
        """(prediction, scores). accuracy, also by kind: has the chosen region IoU >= .5? oracle:
        has any region?
        """
        boxes, iou = self.overlaps(item)
        right = (iou >= 0.5).tolist()
        scores = {"accuracy": right[choice], "oracle": any(right)}
        if "kind" in item:
            scores[item["kind"]] = right[choice]
        prediction = dict(ref_id=item["ref_id"], sent_id=item["sent_id"],
            box=boxes[choice].tolist(), iou=float(iou[choice]))
        return prediction, scores

    @staticmethod
    def describe(item, prediction):
        """The box that is chosen, in magenta, and the one that is meant, in white."""
        boxes = {"white": item["box"], "magenta": prediction["box"]}
        iou = prediction["iou"]
        return [f"magenta: chosen, white: meant; IoU {iou:.2f}"], boxes, iou


TASKS = {task.name: task for task in (VQA, Retrieval, Refer)}


# --- 4. Run and result --------------------------------------------------------------------
#
# Everything is evaluated twice. Hard switches take the best mode and depth in each layer. Soft
# ones mix all of them, at temperature .2, the floor of training. Where both score alike, nothing
# is lost by choosing.


def finetune(args, checkpoint):
    """A task's run from start to end. Returns {split: {"hard": scores, "soft": scores}}, or None
    if it was stopped. Scores are {name: number}, empty for a split without answers. For args and
    checkpoint see parse_args.
    """
    task_class = TASKS[args.command]
    say(f"{task_class.name} on {args.data or 'the toy world'}")
    # 1. The start: the run's own checkpoint, a pretrained one, or another one of this task.
    source = checkpoint or load_checkpoint(args.checkpoint, "pretraining", task_class.name)
    if not checkpoint and args.checkpoint == args.out:
        raise BadInput(f"--checkpoint {args.out}: a new run would take its place; choose "
            "another --out, or continue it with --resume")
    # 2. The task and its model. Words come from the checkpoint; so do answers, if it has any.
    store, splits = load_task(task_class, args)
    check_fits(source, store)
    tokenizer = WordPiece(source["vocab"])
    task = task_class(store, tokenizer, splits, args, source["labels"])
    torch.manual_seed(args.seed)
    weights = {} if args.scratch or checkpoint else source["model"]
    config = SwitchBertConfig(**source["config"])
    task.model = task.build_model(config, task.labels, weights)
    # 3. Training, in the same loop as pretraining.
    if fit(args, task, checkpoint) is None:
        return None
    # 4. Every split.
    return evaluate_splits(args, task)


def load_task(task_class, args):
    """(store, splits) of a task's folder, or of the toy world."""
    if args.data is None:
        if task_class is Refer and args.boxes == "gt":
            raise BadInput("--boxes gt: the toy world has detected boxes only")
        store, training, held_out = toy_world()
        return store, task_class.from_scenes(training, held_out)
    name = f"features-{args.boxes}" if task_class is Refer else "features"
    store = FeatureStore(args.data / name)
    return store, task_class.from_folder(args.data, store)


def evaluate_splits(args, task):
    """Evaluate every split: print a table and write result.json (settings and scores),
    predictions.json (every text, the truth and the prediction) and examples.png (of val). A
    split without answers becomes a submission, in the form that the evaluation server takes.
    Without held-out splits, they are those of the first training examples.
    """
    results = {}
    lines = {}
    splits = task.held_out or {"train": task.items[: task.looked_at]}
    for split, items in splits.items():
        hard, _, predictions = task.evaluate_items(task.model, items)
        soft = {}
        if hard:
            soft, _, _ = task.evaluate_items(task.model, items, FINAL_TEMPERATURE)
        results[split] = {"hard": hard, "soft": soft}
        say(f"{split:32s}            hard            soft")
        for name in hard:
            say(f"  {name:30s}{hard[name]:16.3f}{soft[name]:16.3f}")
        if not hard:
            say(f"  no answers to compare with; the model's are in submission-{split}.json")
            if RANK == 0:
                write_json(args.out / f"submission-{split}.json", predictions)
        lines[split] = [{"image_id": item["image_id"], "text": item["text"],
            "truth": item.get(task.truth)} | prediction
            for item, prediction in zip(items, predictions)]
    if RANK == 0:
        write_json(args.out / "predictions.json", lines)
        write_json(args.out / "result.json",
            vars(args) | {"without_features": task.missing, "results": results})
        if "val" in lines:
            try:
                draw_examples(args, task, lines["val"])
            except Exception as error:  # a picture must not cost hours of training
                say(f"{args.out}/examples.png could not be drawn: {error!r}")
    say(f"the results are in {args.out}")
    return results


# --- 5. Examples --------------------------------------------------------------------------
#
# A score says how often a model is right. Its predictions show where it is wrong.


def draw_examples(args, task, predictions):
    """examples.png: the first four right and first four wrong of val, one per image."""
    panels = {"royalblue": [], "darkorange": []}  # right, wrong; everybody can tell them apart
    drawn = set()
    for item, prediction in zip(task.held_out["val"], predictions):
        lines, boxes, right = task.describe(item, prediction)
        frame = "royalblue" if right >= 0.5 else "darkorange"
        image_id = item["image_id"]
        if len(panels[frame]) < 4 and image_id not in drawn:
            drawn.add(image_id)
            image = picture_of(image_id, args.data)
            found = prediction.get("found", image_id)
            if found != image_id:
                lines += [f"left, found: {found}", f"right, meant: {image_id}"]
                image = ImageOps.expand(image, (4, 0, 0, 0), "white")  # a gap between them
                image = stack([picture_of(found, args.data), image], columns=2)
            panels[frame].append(panel(image, boxes, [item["text"]] + lines, frame))
    chosen = panels["royalblue"] + panels["darkorange"]
    save_png(args.out / "examples.png", stack(chosen, columns=4))


def picture_of(image_id, folder):
    """A picture of the data folder's images/, opened as extraction does; grey if there is none,
    or if it cannot be opened. folder None: the drawing of a scene.
    """
    from extract_features import open_picture
    if folder is None:
        return Scene(int(image_id)).draw()
    with contextlib.suppress(BadInput):
        for path in files_below(folder / "images"):
            if canonical_id(path) == canonical_id(image_id):
                return open_picture(path)
    return Image.new("RGB", (640, 640), "grey")


# --- 6. Your own pictures -----------------------------------------------------------------
#
# A model knows the regions of one detector. The features of another may have the same size but
# another meaning: every answer would be wrong, without an error. So a checkpoint records its
# detector. You can ask a pretrained model, too: do this text and this picture match?


def open_run(run):
    """(checkpoint, class of the task, tokenizer, model) of a run's folder, or of a checkpoint.
    Each forward pass leaves a layer's weights (B, H, L, L) in
    model.bert.layers[l].attention.weights. A pretrained model ranks: its score is the log odds of
    a match, as in zero-shot retrieval.
    """
    saved = load_checkpoint(Path(run), "pretraining", *TASKS)
    task = TASKS.get(saved["task"], Retrieval)
    config = SwitchBertConfig(**saved["config"])
    model = task.build_model(config, saved["labels"], saved["model"])
    for layer in model.bert.layers:
        layer.attention.keep_weights = True
    return saved, task, WordPiece(saved["vocab"]), model.eval()


def read(ids, features, boxes, size):
    """A model's inputs, B = 1, from the ids of a text's pieces, and features (n, F) and boxes
    (n, 4) in pixels of a picture of size (W, H).
    """
    example = dict(input_ids=np.array(ids), region_features=features,
        region_boxes=normalise_boxes(boxes, size))
    return model_inputs([example])


# What a model says of a text and a picture: its highest logit, lines of text, a panel to draw;
# and what it read: the model's inputs, and the picture (a PIL image) with its boxes (n, 4).
Reply = namedtuple("Reply", "logit lines panel inputs image boxes")


@torch.no_grad()
def ask(args):
    """Print and draw what a model says of each text and picture, the surest first. "Sure" is the
    accuracy or IoU that it expects, or the probability of a match. The scores of finetuned
    retrieval say nothing but their order.
    """
    saved, task, tokenizer, model = open_run(args.run)
    texts = [args.text]
    if args.text.lower().endswith(".txt"):
        with reading(args.text, "texts in UTF-8, one in each line"):
            content = Path(args.text).read_text(encoding="utf-8-sig")
            texts = [line for line in content.split("\n") if line.strip()]
            if not texts:
                raise ValueError("found none")
    for word in sorted(set(split_words(" ".join(texts)))):
        if word not in tokenizer.ids:
            print(f"note: {word!r} is read as {' '.join(tokenizer.split_word(word))}")
    # As many pieces as in training.
    most = 38 if saved["task"] == "pretraining" else task.max_tokens
    replies = []
    for picture, image, boxes, features in read_pictures(args, saved):
        for text in texts:
            ids = tokenizer.encode(text, most)
            inputs = read(ids, features, boxes, image.size)
            logits, _ = model(**inputs)  # (1, A) or (1, R); (1,) if it ranks
            choice = logits.argmax()
            lines = [f"{picture}: {text}"]
            marked = {}
            if task is VQA:
                lines.append(f"answer: {saved['labels'][choice]}")
            elif task is Refer:
                box = boxes[choice].tolist()
                lines.append(f"box: {[round(corner) for corner in box]}")
                marked["magenta"] = box
            if saved["task"] != "retrieval":
                lines.append(f"sure: {logits.max().sigmoid():.3g}")
            drawn = panel(image.copy(), marked, lines)
            replies.append(Reply(logits.max(), lines, drawn, inputs, image, boxes))
    replies.sort(key=lambda reply: reply.logit, reverse=True)
    for reply in replies:
        print("\n  ".join(reply.lines))
    save_png(args.out, replies_picture(replies, model, tokenizer, args.layer))
    print(args.out)


def read_pictures(args, saved):
    """Yield (name, image, boxes (n, 4) in pixels, features (n, F)) of each picture. Regions come
    from --store, or from the detector whose regions the checkpoint `saved` has learned.
    """
    # Here, not above: training needs no torchvision.
    from extract_features import build_detector, picture_regions, stored_picture
    about = saved["store"]
    # A store of picture files has a precision, also if the toy detector made it.
    of_scenes = about["detector"] == "toy" and "precision" not in about
    if not args.store:
        detector = build_detector(about["detector"], args.weights)
    for picture in args.pictures:
        if args.store:
            store, row, image = stored_picture(args.store, picture)
            check_fits(saved, store)
            features, boxes, size = store[row].values()
            image = image.resize(size)
        else:
            most = about["num_regions"]
            image, boxes, features, _ = picture_regions(detector, picture, most)
        if of_scenes and image.size != (SCENE_PIXELS, SCENE_PIXELS):
            print(f"note: {picture} is no scene of {SCENE_PIXELS} pixels, and this model knows "
                "nothing else")
        yield picture, image, boxes, features


# --- 7. Machine room ----------------------------------------------------------------------
#
# You need none of this to understand the sections above. First the command line.


def main(argv):
    """Finetune, or answer; argv: the command line without the script's name."""
    args, checkpoint = parse_args(argv)
    if args.command == "ask":
        return ask(args)
    return launch(args, lambda: finetune(args, checkpoint))


def parse_args(argv):
    """(settings, the checkpoint to resume from or None) of a command line."""
    p = argparse.ArgumentParser(description="Finetune Switch-BERT, evaluate it, ask it.")
    add = p.add_argument
    add("command", choices=list(TASKS) + ["ask"],
        help="COMMAND --help shows its flags")
    command = p.parse_args(argv[:1]).command
    if command == "ask":
        add("run", help="folder of a pretrained or finetuned run, or a checkpoint")
        add("text", help="a question, a caption or a phrase, as the run was trained "
            "on; or a .txt file with one in each line")
        add("pictures", nargs="+", help="picture files; with --store also ids")
        add("--store", help="feature store that has the regions of these pictures "
            "(default: the detector finds them)")
        add("--weights", default="runs/world/detector.pt",
            help="the detector's (default: %(default)s)")
        flag(p, "--layer", COUNT, "draw what words attend to in this layer, or in the "
            "last one before it in which they attend to vision (default: the last layer)")
        add("-o", "--out", default="answer.png", help="picture to write")
        return p.parse_args(argv), None
    task = TASKS[command]
    add_run_flags(p, f"data/{command}", task.files, f"runs/{command}")
    flag(p, "--checkpoint", Path, "pretrained run to start from, or one of this task: to go on "
        "from, or with --epochs 0 to evaluate (default: %(default)s)", "runs/pretrain")
    add("--scratch", action="store_true", default=None,
        help="start from random weights; size and words are still those of --checkpoint")
    if task is Refer:
        add("--boxes", choices=["detected", "gt"],
            help="the store to use: features-detected/ or features-gt/ (true boxes)")
    return fill_settings(p, argv, task.toy, task.full, command)


# --- Pickle safety ---

class PlainUnpickler(pickle.Unpickler):
    """Reads lists, dicts, strings and numbers. While a pickle is read, it can call any class or
    function that it names; here it can call none.
    """

    def find_class(self, module, name):
        """Refuse any class or function."""
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


# --- Drawing ---

def panel(image, boxes, lines, frame="white"):
    """A framed picture with boxes {colour: (x1, y1, x2, y2)} in its pixels, and text below."""
    edge = 1 + max(image.size) // 100
    for colour, box in boxes.items():
        outside = np.add(box, (-edge, -edge, edge, edge)).tolist()  # it hides nothing
        ImageDraw.Draw(image).rectangle(outside, outline=colour, width=edge)
    image = ImageOps.pad(image, (190, 190), color="white")
    image = ImageOps.expand(image, 5, frame)
    text = "\n".join(textwrap.fill(line, 30) for line in lines)
    below = 32 + 17 * text.count("\n")
    image = ImageOps.expand(image, (3, 5, 3, below), "white")
    ImageDraw.Draw(image).text((8, 209), text, "black", font_size=12)
    return image


def replies_picture(replies, model, tokenizer, layer):
    """A panel for each reply; for the first also one per word, and what switches chose."""
    first = replies[0]
    # The layers keep the weights of the last forward pass: now that of the first reply.
    _, out = model(**first.inputs)
    pieces = [tokenizer.pieces[i] for i in first.inputs["input_ids"][0]]
    panels = [reply.panel for reply in replies]
    panels += word_panels(model, pieces, first.image, first.boxes, layer)
    depths = [gate[0].tolist() for gate in out.depths]
    chosen = {"modes": out.modes[0].tolist(), "depths": depths}
    switches = switches_picture(chosen, "the surest text and picture")
    return stack([stack(panels, columns=4), switches])


def word_panels(model, pieces, image, boxes, most):
    """The picture once for each word piece that a model has just read. The more the piece attends
    to a region, in the mean over heads, the brighter the region; the largest weight is full
    brightness. The layer is the last one up to number `most` (None: all) in which text attends to
    vision.
    """
    words = len(pieces)
    of_layers = [layer.attention.weights[0].mean(dim=0)[:words, words:]  # (T, 1 + R)
        for layer in model.bert.layers[:most]]
    looking = [number for number, shares in enumerate(of_layers, 1) if shares.any()]
    number = max(looking, default=1)
    shares = of_layers[number - 1]
    brightest = shares[:, 1:].max().clamp(min=1e-9)  # 0 where no layer attends to vision
    panels = []
    for piece, weights in zip(pieces, shares.tolist()):
        regions = weights[1:]  # the first key is the global region
        light = Image.new("L", image.size, 50)
        for weight, box in sorted(zip(regions, boxes.tolist())):  # the brightest on top
            brightness = 50 + 205 * weight / brightest
            ImageDraw.Draw(light).rectangle(box, int(brightness))
        lit = ImageChops.multiply(image, light.convert("RGB"))
        panels.append(panel(lit, {}, [f"{piece} (layer {number})",
            f"regions {sum(regions):.0%}, whole {weights[0]:.0%}"]))
    return panels


if __name__ == "__main__":
    run(main)
