"""What finetune.py promises: the field's metrics to the letter, the real files, three tasks."""

import json
import pickle
import re
from collections import Counter
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import extract_features
import finetune
import train
from data import BadInput
from finetune import VQA, Refer, Retrieval, normalise_answer
from switchbert import MATCH, MISMATCH, SwitchBertConfig, SwitchBertForPretraining

# --- Tasks on the made-up store -------------------------------------------------------------------


def question(image_id, k, text="what ?", answers=("net",) * 10, majority=None, kind="what is"):
    majority = Counter(answers).most_common(1)[0][0] if majority is None else majority
    return dict(image_id=image_id, text=text, question_id=1000 * int(image_id) + k,
        answers=list(answers), majority=majority, answer_type="other", question_type=kind)


def expression(store, image_id, region, kind="attribute", shift=0.0):
    """An expression that means a region of the store, its box moved by a share of its width."""
    box = store[store.row(image_id)]["boxes"][region].astype(float)
    box[[0, 2]] += shift * (box[2] - box[0])
    return dict(image_id=image_id, text="a red ring", box=box.tolist(), ref_id=image_id, sent_id=0,
        kind=kind, alike=2)


def splits_of(kind, store):
    """Training items on images 0 to 9, and held-out ones; image 99 has no features."""
    if kind is VQA:
        training = [question(i % 10, i, "a red ring", [a] * 10)
            for i in range(40) for a in (["star", "blue", "2"][i % 3],)]
        return {"train": training, "val": [question(3, 1, answers=["blue"] * 3 + ["star"] * 7),
            question(99, 2, answers=["two"] * 9 + ["2"], kind="how many"),
            question(4, 3, answers=["cat"] * 10)]}
    if kind is Retrieval:
        words = ["a red ring", "a large blue circle", "left of the ring"]
        pairs = [dict(image_id=f"COCO_val2014_{i:012d}.jpg", text=w) for i in range(10)
            for w in words]
        return {"train": pairs, "test": pairs[:9] + pairs[15:17]}
    return {"train": [expression(store, i, i % (1 + i % 5)) for i in range(10)],
        "val": [expression(store, 3, 2), expression(store, 3, 2, "relation", shift=0.25),
            expression(store, 3, 2, "relation", shift=9.0), expression(store, 4, 0)]}


@pytest.fixture
def make(store, tokenizer):
    """make(kind, *flags, **splits) -> that task, with its own splits or with others."""
    def task(kind, *flags, **splits):
        args, _ = finetune.parse_args([kind.name, *flags])
        return kind(store, tokenizer, {**splits_of(kind, store), **splits}, args)
    return task


@pytest.fixture(scope="module")
def pretrained(store, tokenizer):
    """(config, weights) of a pretrained model."""
    torch.manual_seed(0)
    config = SwitchBertConfig.tiny(vocab_size=len(tokenizer), hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0)
    return config, SwitchBertForPretraining(config).state_dict()


# --- VQA ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer, normalised", [
    ("The red-car", "red car"), ("yes!", "yes"), ("1,000", "1000"), ("3.5", "3.5"), ("None", "0"),
    ("two, three", "2 3"), ("12:30", "12:30"), ("dont", "don't"), ("Couldntve", "couldntve"),
    ("couldnt've", "couldn't've"), ("twas", "'twas"), ("somebody'd", "somebodyd"), ("its", "its"),
    ("a man\n\tand the dog ", "man and dog"), ("red/blue", "red blue"), ("red /blue", "red blue"),
    ("mr. t", "mr t"), ("a.b", "ab"), (".5", ".5"), ("5.", "5"), ("", ""), ("an", ""),
    ("1,000 red-blue", "1000 redblue"),  # a comma between digits: every sign vanishes
    ("red - blue-green", "red bluegreen"),  # a sign that stands apart once vanishes everywhere
    ("." * 40, "." * 8),  # the count of re.UNICODE, 32
    ("5.5.", "5.5"), ("what?no", "what no"), ("ten o'clock", "10 o'clock"), ("zero", "0")])
def test_normalisation_has_every_quirk_of_the_official_one(answer, normalised):
    assert normalise_answer(answer) == normalised


@pytest.mark.parametrize("n, accuracy", [*enumerate([0, 0.3, 0.6, 0.9, 1, 1, 1, 1, 1, 1, 1])])
def test_accuracy_leaves_each_annotator_out_once(n, accuracy):
    """Against the table of the field, and against the official loops."""
    answers = ["net"] * n + [f"other {i}" for i in range(10 - n)]
    loops = []
    for left_out in range(10):
        others = answers[:left_out] + answers[left_out + 1 :]
        loops.append(min(1, sum(a == "net" for a in others) / 3))
    assert finetune.answer_accuracy("net", answers) == pytest.approx(accuracy)
    assert finetune.answer_accuracy("net", answers) == pytest.approx(np.mean(loops))


@pytest.mark.parametrize("prediction, answers, accuracy", [
    ("two", ["2"] * 10, 0), ("two", ["2"] * 9 + ["3"], 1),
    ("the net", ["Net"] * 2 + ["nets"] * 8, 0.6),
    ("the net ", ["the net"] * 9 + ["the\tnet\n"], 1),  # stripped, and then all agree
    ("net", ["the net"] * 9 + ["the net\n"], 0)])
def test_answers_are_normalised_only_where_annotators_disagree(prediction, answers, accuracy):
    assert finetune.answer_accuracy(prediction, answers) == pytest.approx(accuracy)


def test_the_vocabulary_has_the_answers_of_nine_questions_after_normalisation():
    asked = [question(1, k, majority=m) for k, m in enumerate(
        ["The Net"] * 5 + ["net"] * 4 + ["1,000"] * 10 + ["dog"] * 8 + [""] * 9)]
    assert finetune.answer_vocabulary(asked) == ["1000", "", "net"]


def test_vqa_is_scored_overall_by_type_and_against_the_best_possible(make):
    """A target is the accuracy that its answer would get."""
    vqa = make(VQA)
    for item in vqa.held_out["val"]:
        targets = dict(vqa.targets(item))
        for index, answer in enumerate(vqa.labels):
            expected = finetune.answer_accuracy(answer, item["answers"])
            assert targets.get(index, 0) == pytest.approx(expected)
    choices = torch.tensor([vqa.labels.index(a) for a in ("blue", "2", "star")])
    scores, predictions = vqa.score(vqa.held_out["val"], choices)
    assert scores == pytest.approx({"accuracy": (0.9 + 1 + 0) / 3, "other": (0.9 + 1 + 0) / 3,
        "what is": 0.45, "how many": 1, "ceiling": 2 / 3})
    assert next(iter(scores)) == "accuracy"  # what is printed while training
    assert predictions[1] == {"question_id": 99002, "answer": "2"}


def test_the_loss_of_vqa_is_cross_entropy_added_up_over_answers(make, pretrained):
    vqa = make(VQA)
    model = vqa.build_model(pretrained[0], None).eval()
    batch = vqa.collate([vqa.example(i) for i in vqa.items[:5]])
    logits = model(**{k: v for k, v in batch.items() if k != "targets"})[0]
    mean = F.binary_cross_entropy(logits.sigmoid(), batch["targets"])
    torch.testing.assert_close(vqa.sums(model, batch, None)[0] / 5, (mean * 3)[None])


# --- Retrieval ------------------------------------------------------------------------------------


def test_the_hard_negative_is_the_nearest_other_image_by_global_feature(make, store):
    retrieval = make(Retrieval)
    means = np.stack([store[store.row(i)]["features"].mean(axis=0) for i in range(10)])
    for i, mean in enumerate(means):
        cosines = [mean @ m / np.linalg.norm(m) if k != i else -np.inf for k, m in enumerate(means)]
        assert retrieval.nearest[i] == np.argmax(cosines)


def test_four_candidates_of_which_the_first_is_right(make):
    retrieval = make(Retrieval, train=[
        dict(image_id=str(i), text=f"{i} {word}") for i in range(10) for word in "abc"])
    others = set()
    for index in range(30):
        for epoch in range(20):
            four = [e["item"] for e in retrieval[epoch, index]]
            item, own = retrieval.items[index], str(index // 3)
            assert four[0] == item and four[1]["image_id"] == own != four[1]["text"].split()[0]
            assert [four[k]["text"] for k in (2, 3)] == [item["text"]] * 2
            assert four[3]["image_id"] == str(retrieval.nearest[index // 3])
            others.add((own, four[2]["image_id"]))
        assert four == [e["item"] for e in retrieval[epoch, index]]
    assert others == {(str(a), str(b)) for a in range(10) for b in range(10) if a != b}


def test_the_loss_of_retrieval_is_the_log_share_of_the_right_candidate(make, pretrained):
    retrieval = make(Retrieval)
    model = retrieval.build_model(*pretrained).eval()
    batch = retrieval.collate([retrieval[0, i] for i in range(3)])
    scores = model(**{k: v for k, v in batch.items() if k != "targets"})[0]
    shares = scores.view(3, 4).exp() / scores.view(3, 4).exp().sum(dim=1, keepdim=True)
    torch.testing.assert_close(
        retrieval.sums(model, batch, None)[0], -shares[:, 0].log().sum()[None])


def test_recall_with_any_number_of_captions_is_counted_by_hand(make, pretrained, store, tokenizer):
    retrieval = make(Retrieval)
    model, items = retrieval.build_model(*pretrained), retrieval.held_out["test"]
    images = list(dict.fromkeys(item["image_id"] for item in items))
    scores = train.match_scores(model, store, tokenizer, [i["text"] for i in items], images).numpy()
    found, predictions, _ = retrieval.evaluate_items(model, items)
    own = [0] * 3 + [1] * 3 + [2] * 3 + [3] * 2
    for k in (1, 5, 10):
        image = [sum(scores[t] >= scores[t, o]) <= k for t, o in enumerate(own)]
        text = []
        for i in range(4):
            best = max(scores[t, i] for t in range(11) if own[t] == i)
            text.append(sum(scores[t, i] >= best for t in range(11) if own[t] != i) < k)
        assert found[f"image R@{k}"] == pytest.approx(np.mean(image))
        assert found[f"text R@{k}"] == pytest.approx(np.mean(text))
    for k, prediction in enumerate(predictions):
        assert prediction["image_id"] == images[own[k]]
        assert prediction["found"][0] == images[scores[k].argmax()]
    in_blocks = retrieval.score_matrix(model, [i["text"] for i in items], images, None, block=3)
    torch.testing.assert_close(in_blocks.numpy(), scores)
    soft = retrieval.score_matrix(model, [i["text"] for i in items], images, 1.0)
    assert (soft.numpy() != scores).any()


def test_five_folds_are_five_recalls_among_a_thousand(make, monkeypatch):
    """Scores that are right within each fold and wrong across folds."""
    retrieval = make(Retrieval)
    rng = np.random.default_rng(0)
    scores = torch.from_numpy(rng.normal(size=(5000, 5000)).astype(np.float32))
    scores[range(5000), range(5000)] += 3
    items = [dict(image_id=i, text="a") for i in range(5000)]
    monkeypatch.setattr(Retrieval, "score_matrix", lambda *_: scores)
    monkeypatch.setattr(Retrieval, "predict", lambda *_: (None, None))
    found, _, _ = retrieval.evaluate_items(None, items)
    folds = [train.recall_at(scores[k : k + 1000, k : k + 1000], torch.arange(1000), (1, 5, 10))
        for k in range(0, 5000, 1000)]
    for name in ("image R@1", "text R@5"):
        assert found[f"1K {name}"] == pytest.approx(np.mean([f[name] for f in folds]))
        assert found[name] < found[f"1K {name}"]


def test_blind_retrieval_cannot_tell_images_apart(make, pretrained):
    task = make(Retrieval, "--blind")
    scores, _, _ = task.evaluate_items(task.build_model(*pretrained), task.held_out["test"])
    assert scores["image R@1"] == 0  # all images have the same score, and ties count against it


# --- Referring expressions ------------------------------------------------------------------------


def test_iou_by_hand():
    boxes = np.array([[0, 0, 2, 2], [1, 1, 3, 3], [2, 0, 4, 2], [0, 0, 4, 4]], np.float32)
    found = finetune.box_iou(boxes, np.array([0, 0, 2, 2], np.float32))
    assert found == pytest.approx([1, 1 / 7, 0, 1 / 4])


def test_referring_counts_boxes_that_overlap_by_half(make):
    """A box moved by a quarter of its width has IoU .75 / 1.25 = .6; by nine, 0."""
    refer = make(Refer)
    scores, predictions = refer.score(refer.held_out["val"], torch.tensor([2, 2, 2, 1]))
    assert scores == pytest.approx({"accuracy": 0.5, "oracle": 0.75, "attribute": 0.5,
        "relation": 0.5, "relation by attributes alone": 0.5})
    assert [round(p["iou"], 2) for p in predictions[:3]] == [1, 0.6, 0]


def test_targets_of_regions_are_overlaps_and_padding_counts_for_nothing(make, pretrained):
    refer = make(Refer)
    model = refer.build_model(*pretrained).eval()
    batch = refer.collate([refer.example(i) for i in refer.items])
    assert (batch["targets"].max(dim=1).values == 1).all()
    assert (batch["targets"][batch["region_mask"] == 0] == 0).all()
    loss = refer.sums(model, batch, None)[0]
    logits = model(**{k: v for k, v in batch.items() if k != "targets"})[0]
    by_hand = sum(F.binary_cross_entropy(logits[i, :n].sigmoid(), batch["targets"][i, :n],
        reduction="sum") for i, n in enumerate(batch["region_mask"].sum(dim=1).tolist()))
    torch.testing.assert_close(loss, by_hand[None])
    batch["targets"][batch["region_mask"] == 0] = 1e6
    assert refer.sums(model, batch, None)[0].equal(loss)


# --- Published files ------------------------------------------------------------------------------

REFS = [{"ref_id": 0, "ann_id": 11, "category_id": 18, "image_id": 3, "split": "train",
    "file_name": "COCO_train2014_000000000003_16.jpg", "sent_ids": [0, 1],
    "sentences": [{"sent_id": 0, "raw": "Red ring", "sent": "red ring", "tokens": ["red", "ring"]},
        {"sent_id": 1, "raw": "a ring", "sent": "a ring", "tokens": ["a", "ring"]}]},
    {"ref_id": 1, "ann_id": 12, "category_id": 18, "image_id": 4, "split": "testB",
    "file_name": "x.jpg", "sent_ids": [2],
    "sentences": [{"sent_id": 2, "raw": "Caf\xe9", "sent": "caf\xe9", "tokens": ["caf\xe9"]}]}]
BOXES = {"images": [], "categories": [], "annotations": [
    {"id": 11, "image_id": 3, "category_id": 18, "bbox": [10, 20, 30, 40], "area": 1.0},
    {"id": 12, "image_id": 4, "category_id": 18, "bbox": [0, 0, 5, 5], "area": 25.0}]}


REFER_FILES = {"refs(unc).p": pickle.dumps(REFS, protocol=2), "instances.json": BOXES}


def write(path, content):
    """A file of bytes, or of JSON."""
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


def python2_pickle(value):
    """The bytes that Python 2's cPickle writes at protocol 0: strings as S'...', ints as I..."""
    if isinstance(value, str):
        return b"S" + repr(value.encode("latin1"))[1:].encode() + b"\n"
    if isinstance(value, int):
        return b"I%d\n" % value
    if isinstance(value, list):
        return b"(l" + b"".join(python2_pickle(v) + b"a" for v in value)
    return b"(d" + b"".join(python2_pickle(k) + python2_pickle(v) + b"s" for k, v in value.items())


def vqa_files():
    """Questions and annotations as visualqa.org has them, on images 0 to 11."""
    top, files = {"info": {}, "task_type": "Open-Ended", "data_type": "mscoco", "license": {}}, {}
    for subset, n, annotated in (("train2014", 30, True), ("val2014", 7, True),
            ("test2015", 9, False), ("test-dev2015", 4, False)):
        asked = [{"image_id": i % 12, "question": "a red ring", "question_id": 1000 * i + n}
            for i in range(n)]
        files[f"v2_OpenEnded_mscoco_{subset}_questions.json"] = {
            **top, "data_subtype": subset, "questions": asked}
        if annotated:
            marks = [{"question_type": "what is", "multiple_choice_answer": ["net", "ring"][i % 2],
                "answers": [{"answer": ["net", "ring"][i % 2], "answer_confidence": "yes",
                    "answer_id": k + 1} for k in range(10)],
                "image_id": i % 12, "answer_type": "other", "question_id": 1000 * i + n}
                for i in range(n)]
            files[f"v2_mscoco_{subset}_annotations.json"] = {
                **top, "data_subtype": subset, "annotations": marks}
    return files


def karpathy(*splits):
    return {"dataset": "flickr30k", "images": [{"filename": f"{k}.jpg", "split": split,
        "sentences": [{"raw": f"{split} {k}"}]} for k, split in enumerate(splits)]}


def test_vqa_files_and_karpathys_splits_are_read_as_they_are_published(tmp_path):
    for name, content in vqa_files().items():
        write(tmp_path / name, content)
    splits = VQA.from_folder(tmp_path)
    assert {k: len(v) for k, v in splits.items()} == {
        "train": 30, "val": 7, "test2015": 9, "test-dev2015": 4}
    assert splits["val"][1] == dict(image_id=1, text="a red ring", question_id=1007,
        answers=["ring"] * 10, majority="ring", answer_type="other", question_type="what is")
    assert splits["test2015"][0]["answers"] == []
    (tmp_path / "retrieval").mkdir()
    write(tmp_path / "retrieval" / "d.json", karpathy("train", "test", "restval", "val"))
    found = Retrieval.from_folder(tmp_path / "retrieval")
    assert {k: [i["text"] for i in items] for k, items in found.items()} == {
        "train": ["train 0", "restval 2"], "val": ["val 3"], "test": ["test 1"]}


@pytest.mark.parametrize("protocol", ["python 2", 0, 2, 4])
def test_refcoco_files_are_read_as_they_are_published(tmp_path, protocol):
    refs = [*REFS, {**REFS[0], "split": "testA", "ref_id": 2}]
    write(tmp_path / "refs(unc).p", python2_pickle(refs) + b"." if protocol == "python 2"
        else pickle.dumps(refs, protocol=protocol))
    write(tmp_path / "refs(google).p", b"not looked at")
    write(tmp_path / "instances.json", BOXES)
    splits = Refer.from_folder(tmp_path)
    assert {k: len(v) for k, v in splits.items()} == {"train": 2, "testB": 1, "testA": 2, "test": 3}
    assert splits["train"][0] == dict(image_id=3, text="red ring", box=[10, 20, 40, 60], ref_id=0,
        sent_id=0, kind="expression")
    assert splits["testB"][0]["text"] == "caf\xe9"
    assert splits["test"] == splits["testA"] + splits["testB"]


class Evil:
    """A pickle of it calls open."""

    def __reduce__(self):
        return open, ("owned", "w")


def changed(files, name, kind, number, **change):
    """Files of which one entry of one file has another value, or lacks it (None)."""
    content = json.loads(json.dumps(files[name]))
    entry = {**content[kind][number], **change}
    content[kind][number] = {k: v for k, v in entry.items() if v is not None}
    return {**files, name: content}


ANNOTATIONS = "v2_mscoco_val2014_annotations.json"
QUESTIONS = "v2_OpenEnded_mscoco_val2014_questions.json"
REFUSED = [
    (VQA, {}, "no training questions with annotations"),
    (VQA, {"q.json": {"images": []}}, "q.json: not questions of VQA v2"),
    (VQA, {"q.json": []}, "q.json: expected a JSON dict, found a list"),
    (VQA, changed(vqa_files(), ANNOTATIONS, "annotations", 2, question_id=None),
        "val2014_annotations.json: not annotations .*near .*2: KeyError 'question_id'"),
    (VQA, changed(vqa_files(), QUESTIONS, "questions", 3, image_id=None),
        "val2014_questions.json: not questions .*near .*3: KeyError 'image_id'"),
    (VQA, changed(vqa_files(), QUESTIONS, "questions", 3, question=5),
        "val2014_questions.json: not questions .*near .*3: TypeError"),
    (Retrieval, {}, "expected one file of Karpathy's splits .*found 0"),
    (Retrieval, {"a.json": karpathy("train"), "b.json": karpathy("val")}, "found 2"),
    (Refer, {}, "instances.json: not a whole JSON file .No such file"),
    (Refer, {"refs(google).p": b"", "refs(umd).p": b"", "instances.json": BOXES},
        r"refs\(unc\).p: not a pickle of .*No such file"),
    (Refer, {"refs(unc).p": pickle.dumps([{"ref_id": Evil()}]), "instances.json": BOXES},
        r"refs\(unc\).p: not a pickle of .*plain .*io.open"),
    (Refer, {"refs(unc).p": pickle.dumps([REFS[0], {**REFS[1], "ann_id": 99}]),
        "instances.json": BOXES}, r"refs\(unc\).p: not a .*near .*1: KeyError 99"),
    *((Refer, changed(REFER_FILES, "instances.json", "annotations", 1, **change),
        "instances.json: not RefCOCO's instances .near .*1: ")
        for change in ({"id": None}, {"bbox": None}, {"bbox": [1, 2, 3]}, {"bbox": "abcd"}))]


@pytest.mark.parametrize("kind, files, message", REFUSED)
def test_files_that_are_not_as_published_are_refused(tmp_path, kind, files, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, content in files.items():
        write(tmp_path / name, content)
    with pytest.raises(BadInput, match=message):
        kind.from_folder(tmp_path)
    assert not (tmp_path / "owned").exists()


# --- What the tasks share -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [VQA, Retrieval, Refer])
def test_steps_lower_the_loss_and_every_trained_parameter_gets_a_gradient(make, kind, pretrained):
    """Several processes wait for each of them."""
    task = make(kind)
    model, losses = task.build_model(*pretrained).train(), []
    batch = task.collate([task[0, i] for i in range(10)])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(30):
        torch.manual_seed(0)  # the switches' noise is the same in each step
        loss = task.sums(model, batch, 0.5)[0].sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


@pytest.mark.parametrize("kind", [VQA, Refer, Retrieval])
def test_an_encoder_starts_from_the_pretrained_one_or_from_random_weights(make, kind, pretrained):
    task, (config, weights) = make(kind), pretrained
    one, two = (task.build_model(config, w).state_dict() for w in (weights, None))
    encoder = [k for k in weights if k.startswith("bert.")]
    assert encoder and all(one[k].equal(weights[k]) for k in encoder)
    assert any(not two[k].equal(weights[k]) for k in encoder)
    if kind is Retrieval:  # the matching head's log odds: it ranks before it is finetuned
        rows = weights["itm_classifier.weight"]
        assert one["classifier.1.weight"].equal((rows[MATCH] - rows[MISMATCH])[None])


@pytest.mark.parametrize("kind", [VQA, Refer])
def test_evaluation_shared_by_processes_is_the_evaluation_of_one(
        make, kind, pretrained, monkeypatch):
    """Three processes in turn, and what they add up to: bit for bit."""
    task = make(kind)
    model, items, parts = task.build_model(*pretrained), task.items, []
    whole, hard = task.predict(model, items, batch_size=2)
    assert hard != task.predict(model, items, tau=0.2)[1]
    monkeypatch.setattr(train, "world_size", lambda: 3)
    for number in range(3):
        monkeypatch.setattr(train, "rank", lambda number=number: number)
        parts.append(task.predict(model, items, batch_size=2)[0])
    assert sum(parts).equal(whole) and all(p.count_nonzero() < len(items) for p in parts)


def test_images_without_features_leave_training_and_ranking_but_not_the_answers(make, capsys):
    """Image 99: a question about it is answered from its text; a pair with it has no score."""
    vqa = make(VQA, train=[*splits_of(VQA, None)["train"], question(99, 1), question(3, 9)])
    assert len(vqa) == 41 and vqa.missing == {"train": 1, "val": 1}
    assert len(vqa.held_out["val"]) == 3
    assert re.search("1 of 42 .*features.*1 of 3 ", capsys.readouterr().out, flags=re.S)
    pairs = [dict(image_id=i, text="a") for i in (1, 99, 2, 3)]
    ranked = make(Retrieval, val=pairs)
    assert [i["image_id"] for i in ranked.held_out["val"]] == [1, 2, 3]
    gone = make(Retrieval, val=[dict(image_id=98, text="a")])
    assert "val" not in gone.held_out and len(gone.shown) == 11


@pytest.mark.parametrize("kind, splits, message", [
    (VQA, {"train": [question(99, k) for k in range(20)]}, "no.* training questions"),
    (Retrieval, {"train": [dict(image_id=i, text="a") for i in (1, 2, 99)]}, "captions of 2 imag"),
    (VQA, {"train": [question(k, k) for k in range(8)]}, "answer")])
def test_training_sets_from_which_nothing_is_learned_are_refused(make, kind, splits, message):
    with pytest.raises(BadInput, match=message):
        make(kind, **splits)


# --- Runs -----------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(pretrained, store, tokenizer, tmp_path):
    path = tmp_path / "pretrained.pt"
    config, weights = pretrained
    torch.save({"format": train.CHECKPOINT_FORMAT, "task": "pretraining", "config": asdict(config),
        "model": weights, "vocab": tokenizer.pieces,
        # Another class head does not matter: finetuning does not use it.
        "store": {k: store.meta[k] for k in train.STORE_FACTS} | {"num_region_classes": 9}}, path)
    return path


@pytest.fixture
def run(checkpoint, store, tmp_path, monkeypatch):
    """run(task, *flags, **splits): a whole run of 4 to 6 steps on the made-up store."""
    extra = {}
    monkeypatch.setattr(
        finetune, "load_task", lambda kind, args: (store, {**splits_of(kind, store), **extra}))
    monkeypatch.setattr(
        finetune, "picture_of", lambda *_: (Image.new("RGB", (90, 60), "grey"), 1))

    def start(task, *flags, **splits):
        extra.update(splits)
        epochs = {"vqa": "1", "retrieval": "2", "refer": "6"}[task]
        size = ["--batch", "10", "--epochs", epochs, "--eval-every", "3", "--threads", "1"]
        standard = ["--checkpoint", str(checkpoint), "--out", str(tmp_path / task), *size]
        return finetune.finetune(*finetune.parse_args([task, *standard, *map(str, flags)]))

    return start


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("task, steps", [("vqa", 4), ("retrieval", 6), ("refer", 6)])
def test_a_run_leaves_its_record(run, task, steps, tmp_path, capsys, store, monkeypatch):
    predict, taus = finetune.Task.predict, set()
    monkeypatch.setattr(finetune.Task, "predict", lambda self, model, items, tau=None: (
        taus.add(tau) or predict(self, model, items, tau)))
    results, out = run(task), tmp_path / task
    assert taus == {None, 0.2}  # hard, and soft
    record, said = read(out / "result.json"), capsys.readouterr().out
    assert all((out / name).exists() for name in train.RECORD)
    assert (record["task"], record["steps"]) == (task, steps)
    assert record["results"] == json.loads(json.dumps(results))
    assert record["without_features"] == ({"val": 1} if task == "vqa" else {})
    (split, found), = record["results"].items()
    assert set(found["hard"]) == set(found["soft"])
    assert (task == "vqa") == ("question only" in found)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    scored = [line for line in lines if "scores" in line]
    assert [line["step"] for line in scored] == [0, 3, steps]
    assert scored[-1]["scores"] == found["hard"]
    items = splits_of(finetune.TASKS[task], store)[split]
    assert len(read(out / "predictions.json")[split]) == len(items)
    assert Image.open(out / "examples.png").width >= 250
    assert "hard" in said and "soft" in said and (", detected boxes" in said) == (task == "refer")
    saved = torch.load(out / "checkpoint.pt", weights_only=True)
    assert saved["task"] == task and saved["store"]["detector"] == "made up"
    assert saved["labels"] == (["star", "2", "blue"] if task == "vqa" else None)
    if task == "retrieval":
        assert np.load(out / f"scores-{split}.npy").shape == (11, 4)


def test_a_test_set_without_answers_gets_a_complete_submission(make, run, tmp_path, capsys):
    """And another split is evaluated while training, though this one comes first."""
    asked = [{**question(image_id, 7), "answers": []} for image_id in (1, 2, 99)]
    splits = {"test2015": asked, **splits_of(VQA, None)}
    task = make(VQA)
    args, _ = finetune.parse_args(["vqa"])
    resumed = VQA(task.store, task.tokenizer, splits, args, ["cat"])
    assert resumed.shown == splits["val"] and resumed.labels == ["cat"]
    run("vqa", test2015=asked)
    submission = read(tmp_path / "vqa" / "submission-test2015.json")
    assert [s["question_id"] for s in submission] == [q["question_id"] for q in asked]
    assert all(s.keys() == {"question_id", "answer"} and s["answer"] in task.labels
        for s in submission)
    assert "test2015: no answers to compare with; all 3" in capsys.readouterr().out


def test_a_stopped_run_goes_on_and_is_the_same_run(run, tmp_path, monkeypatch):
    run("refer")
    path, evaluate, calls = tmp_path / "refer" / "checkpoint.pt", Refer.evaluate, []
    whole = torch.load(path, weights_only=True)["model"]

    def interrupted(self, model):
        calls.append(1)
        return evaluate(self, model) if len(calls) != 3 else pytest.fail("stopped")

    monkeypatch.setattr(Refer, "evaluate", interrupted)
    with pytest.raises(BaseException, match="stopped"):
        run("refer")
    assert torch.load(path, weights_only=True)["step"] == 3
    run("refer", "--resume")
    again = torch.load(path, weights_only=True)["model"]
    assert all(w.equal(again[name]) for name, w in whole.items())


def test_no_step_is_zero_shot_also_with_fewer_examples_than_a_batch(
        run, make, pretrained, tmp_path, monkeypatch):
    found, task = run("retrieval", "--epochs", 0, "--limit", 9)["test"]["hard"], make(Retrieval)
    model = task.build_model(*pretrained)
    assert found == task.evaluate_items(model, task.held_out["test"])[0]
    build, given = VQA.build_model, []
    monkeypatch.setattr(VQA, "build_model",
        lambda self, config, weights: given.append(weights) or build(self, config, weights))
    assert run("vqa", "--epochs", 0, "--limit", 9, "--scratch")["val"]["hard"]
    assert given[0] is None
    assert read(tmp_path / "vqa" / "result.json")["scratch"] is True
    assert read(tmp_path / "vqa" / "config.json")["examples"] == 9
    assert finetune.parse_args(["vqa", "--scratch"])[0].out.name == "vqa-scratch"


def test_examples_show_each_image_once(make, tmp_path, monkeypatch):
    refer = make(Refer)
    shown = []
    monkeypatch.setattr(finetune, "picture_of",
        lambda image_id, *_: shown.append(image_id) or (Image.new("RGB", (9, 9)), 1))
    items = [expression(refer.store, i, 0) for i in (3, 3, 4, 3, 4)]
    predictions = refer.score(items, torch.zeros(5, dtype=torch.long))[1]
    finetune.draw_examples(tmp_path / "e.png", refer, items, predictions, None)
    assert shown == [3, 4]


@pytest.mark.parametrize("task, flags, store_facts, message", [
    ("vqa", ["--checkpoint", "OWN"], {}, "checkpoint.pt: .*it is a checkpoint of refer"),
    ("vqa", [], {"feature_size": 2048}, "feature_size is 12, .* trained with 2048"),
    ("vqa", [], {"detector": "vg"}, "detector is 'made up', .* trained with 'vg'"),
    ("refer", ["--resume", "--lr", 0.5], {}, "--lr 0.5: the run that is resumed has 0.001"),
    ("refer", ["--resume", "--scratch"], {}, "--scratch True: the run that is resumed has False"),
    ("refer", ["--resume", "--boxes", "gt"], {}, "--boxes gt: the run that is resumed has detec"),
    ("vqa", ["--batch", 64], {}, "there are only 40 training examples")])
def test_what_does_not_fit_is_refused(run, checkpoint, tmp_path, task, flags, store_facts, message):
    saved = torch.load(checkpoint, weights_only=True)
    run("refer")
    torch.save({**saved, "store": {**saved["store"], **store_facts}}, checkpoint)
    own = str(tmp_path / "refer" / "checkpoint.pt")
    with pytest.raises(BadInput, match=message):
        run(task, *[own if f == "OWN" else f for f in flags])


@pytest.mark.parametrize("argv", [["retrieval", "--boxes", "gt"], ["vqa", "--boxes", "gt"],
    ["refer", "--boxes", "true"], ["vqa", "--batch", "0"], ["ask", "a.png"]])
def test_flags_that_a_command_does_not_know_are_refused(argv):
    with pytest.raises(SystemExit, match="2"):
        finetune.parse_args(argv)


def test_ask_match_and_point_answer_about_a_picture(run, tmp_path, monkeypatch, capsys):
    for task in ("vqa", "retrieval", "refer"):
        run(task)
    Image.new("L", (90, 60), 128).save(tmp_path / "grey.png")
    boxes = np.array([[0, 0, 50, 50], [10, 10, 90, 60]], np.float32)
    monkeypatch.setattr(extract_features, "build_detector", lambda *_: None)
    monkeypatch.setattr(extract_features, "picture_regions", lambda model, path, most: (
        Image.open(path).convert("RGB"), boxes, np.ones((2, 12), np.float32), None))
    picture, found = str(tmp_path / "grey.png"), {}

    def ask(detector, command, *words):
        path = tmp_path / finetune.QUESTIONS[command][-1] / "checkpoint.pt"
        saved = torch.load(path, weights_only=True)
        torch.save({**saved, "store": {**saved["store"], "detector": detector}}, path)
        capsys.readouterr()
        finetune.main([command, *words, "--out", str(tmp_path / f"{command}.png"),
            "--checkpoint", str(path)])
        return capsys.readouterr().out.splitlines()

    for command, *words in (("ask", picture, "a red ring"), ("point", picture, "a red ring"),
            ("match", "a red ring", picture, picture)):
        found[command] = ask("made up", command, *words)
        assert Image.open(tmp_path / f"{command}.png").width >= 250
    lines = found["ask"][:3]
    assert sorted(line.split("  ")[1] for line in lines) == ["2", "blue", "star"]
    assert lines == sorted(lines, reverse=True) and len(found["match"]) == 3
    assert found["point"][0].split("box ")[1] in ("0 0 50 50", "10 10 90 60")
    assert "note" in ask("toy", "ask", picture, "a")[0]  # a photo is no scene
    with pytest.raises(BadInput, match="trained with the vg detector; give its weights with --w"):
        ask("vg", "ask", picture, "a")
    with pytest.raises(BadInput, match="it is a checkpoint of refer"):
        finetune.main(["ask", picture, "a", "--checkpoint",
            str(tmp_path / "refer" / "checkpoint.pt")])
