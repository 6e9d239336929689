"""What finetune.py promises: the field's metrics to the letter, the real files, three tasks."""

import json
import pickle
import re
from collections import Counter
from dataclasses import asdict
from pathlib import Path

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
        training = [question(i % 10, i, "a red ring", [["star", "blue", "2"][i % 3]] * 10)
            for i in range(40)]
        return {"train": training, "val": [question(3, 1, answers=["blue"] * 3 + ["star"] * 7),
            question(99, 2, answers=["two"] * 9 + ["2"], kind="how many"),
            question(4, 3, answers=["cat"] * 10)]}
    if kind is Retrieval:
        pairs = [dict(image_id=f"COCO_val2014_{i:012d}.jpg", text=text) for i in range(10)
            for text in ("a red ring", "a large blue circle", "left of the ring")]
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
def pretrained(tokenizer):
    """(config, weights) of a pretrained model."""
    torch.manual_seed(0)
    config = SwitchBertConfig.tiny(vocab_size=len(tokenizer), hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0)
    return config, SwitchBertForPretraining(config).state_dict()


@pytest.fixture
def first_loss(pretrained):
    """first_loss(task, n) -> logits of its first n examples, their batch, the loss."""
    def compute(task, n):
        model = task.build_model(*pretrained).eval()
        batch = task.collate([task[0, i] for i in range(n)])
        logits = model(**{k: v for k, v in batch.items() if k != "targets"})[0]
        return logits, batch, task.sums(model, batch, None)[0]
    return compute


# --- VQA ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer, normalised", [
    ("yes!", "yes"), ("None", "0"), ("two, three", "2 3"), ("12:30", "12:30"), ("an", ""), ("", ""),
    ("Couldntve", "couldntve"), ("couldnt've", "couldn't've"), ("twas", "'twas"), ("its", "its"),
    ("somebody'd", "somebodyd"), ("a man\n\tand the dog ", "man and dog"), ("what?no", "what no"),
    ("red/blue", "red blue"), ("red /blue", "red blue"), ("mr. t", "mr t"), ("a.b", "ab"),
    (".5", ".5"), ("5.5.", "5.5"), ("ten o'clock", "10 o'clock"),
    ("1,000 red-blue", "1000 redblue"),  # a comma between digits: every sign vanishes
    ("red - blue-green", "red bluegreen"),  # a sign that stands apart once vanishes everywhere
    ("." * 40, "." * 8)])  # the count of re.UNICODE, 32
def test_normalisation_has_every_quirk_of_the_official_one(answer, normalised):
    assert normalise_answer(answer) == normalised


@pytest.mark.parametrize("n", range(11))
def test_accuracy_leaves_each_annotator_out_once(n):
    answers = ["net"] * n + [f"other {i}" for i in range(10 - n)]
    official = [min(1, sum(a == "net" for k, a in enumerate(answers) if k != left_out) / 3)
        for left_out in range(10)]
    assert finetune.answer_accuracy("net", answers) == pytest.approx(np.mean(official))


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


def test_the_loss_of_vqa_is_cross_entropy_added_up_over_answers(make, first_loss):
    logits, batch, loss = first_loss(make(VQA), 5)
    mean = F.binary_cross_entropy(logits.sigmoid(), batch["targets"])
    torch.testing.assert_close(loss, (mean * 15)[None])


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


def test_the_loss_of_retrieval_is_the_log_share_of_the_right_candidate(make, first_loss):
    logits, _, loss = first_loss(make(Retrieval), 3)
    shares = logits.view(3, 4).exp() / logits.view(3, 4).exp().sum(dim=1, keepdim=True)
    torch.testing.assert_close(loss, -shares[:, 0].log().sum()[None])


def test_recall_is_over_all_texts_and_images_in_blocks_and_blind_it_is_zero(make, pretrained):
    """Four images have 3, 3, 3 and 2 captions."""
    task, blind = make(Retrieval), make(Retrieval, "--blind")
    model, items = task.build_model(*pretrained), task.held_out["test"]
    texts, images = [i["text"] for i in items], [*dict.fromkeys(i["image_id"] for i in items)]
    scores = train.match_scores(model, task.store, task.tokenizer, texts, images)
    found, predictions, _ = task.evaluate_items(model, items)
    own = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3])
    assert found == train.recall_at(scores, own, (1, 5, 10))
    for place, prediction, row in zip(own, predictions, scores):
        assert prediction["image_id"] == images[place]
        assert prediction["found"][0] == images[row.argmax()]
    torch.testing.assert_close(task.score_matrix(model, texts, images, None, block=3), scores)
    assert not task.score_matrix(model, texts, images, 1.0).equal(scores)  # soft switches
    assert blind.evaluate_items(model, items)[0]["image R@1"] == 0  # a tie counts against it


def test_five_folds_are_five_recalls_among_a_thousand(make, monkeypatch):
    """Scores that are right within each fold and wrong across folds."""
    scores, own = torch.randn(5000, 5000), torch.arange(1000)
    scores += 3 * torch.eye(5000)
    monkeypatch.setattr(Retrieval, "score_matrix", lambda *_: scores)
    monkeypatch.setattr(Retrieval, "predict", lambda *_: (None, None))
    items = [dict(image_id=i, text="a") for i in range(5000)]
    found, _, _ = make(Retrieval).evaluate_items(None, items)
    folds = [train.recall_at(scores[k : k + 1000, k : k + 1000], own, (1, 5, 10))
        for k in range(0, 5000, 1000)]
    for name in ("image R@1", "text R@5"):
        assert found[f"1K {name}"] == pytest.approx(np.mean([f[name] for f in folds]))
        assert found[name] < found[f"1K {name}"]


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


def test_targets_of_regions_are_overlaps_and_padding_counts_for_nothing(make, first_loss):
    refer = make(Refer)
    logits, batch, loss = first_loss(refer, 10)
    targets, real = batch["targets"], batch["region_mask"].bool()
    assert (targets.max(dim=1).values == 1).all() and (targets[~real] == 0).all()
    by_hand = F.binary_cross_entropy(logits[real].sigmoid(), targets[real], reduction="sum")
    torch.testing.assert_close(loss, by_hand[None])
    targets[~real] = 1e6
    assert refer.loss(logits, batch).equal(loss[0])


# --- Published files ------------------------------------------------------------------------------

REFS = [
    {"ref_id": 0, "ann_id": 11, "image_id": 3, "split": "train", "sentences": [
        {"sent_id": 0, "raw": "Red ring", "sent": "red ring"}, {"sent_id": 1, "sent": "a ring"}]},
    {"ref_id": 1, "ann_id": 12, "image_id": 4, "split": "testB", "sentences": [
        {"sent_id": 2, "raw": "Caf\xe9", "sent": "caf\xe9"}]}]
BOXES = {"images": [], "categories": [], "annotations": [
    {"id": 11, "image_id": 3, "category_id": 18, "bbox": [10, 20, 30, 40], "area": 1.0},
    {"id": 12, "image_id": 4, "category_id": 18, "bbox": [0, 0, 5, 5], "area": 25.0}]}


def write(folder, files):
    """Files of bytes, or of JSON."""
    for name, content in files.items():
        (folder / name).write_bytes(
            content if isinstance(content, bytes) else json.dumps(content).encode())


def python2_pickle(value):
    """As Python 2 writes it at protocol 0: strings as S'...' and not as V..."""
    return re.sub(rb"V(.*)\n", rb"S'\1'\n", pickle.dumps(value, protocol=0))


def vqa_files():
    """Questions and annotations as visualqa.org has them, on images 0 to 11."""
    files = {}
    for subset, n, annotated in (("train2014", 30, True), ("val2014", 7, True),
            ("test2015", 9, False), ("test-dev2015", 4, False)):
        files[f"v2_OpenEnded_mscoco_{subset}_questions.json"] = {
            "info": {}, "data_subtype": subset, "questions": [{"image_id": i % 12,
                "question": "a red ring", "question_id": 1000 * i + n} for i in range(n)]}
        if annotated:
            files[f"v2_mscoco_{subset}_annotations.json"] = {
                "info": {}, "data_subtype": subset, "annotations": [{"question_type": "what is",
                    "multiple_choice_answer": answer, "image_id": i % 12, "answer_type": "other",
                    "answers": [{"answer": answer, "answer_id": k + 1} for k in range(10)],
                    "question_id": 1000 * i + n}
                    for i in range(n) for answer in (["net", "ring"][i % 2],)]}
    return files


def karpathy(*splits):
    return {"dataset": "flickr30k", "images": [{"filename": f"{k}.jpg", "split": split,
        "sentences": [{"raw": f"{split} {k}"}]} for k, split in enumerate(splits)]}


def test_vqa_files_and_karpathys_splits_are_read_as_they_are_published(tmp_path):
    write(tmp_path, vqa_files())
    splits = VQA.from_folder(tmp_path)
    assert {k: len(v) for k, v in splits.items()} == {
        "train": 30, "val": 7, "test2015": 9, "test-dev2015": 4}
    assert splits["val"][1] == dict(image_id=1, text="a red ring", question_id=1007,
        answers=["ring"] * 10, majority="ring", answer_type="other", question_type="what is")
    assert splits["test2015"][0]["answers"] == []
    (tmp_path / "retrieval").mkdir()
    write(tmp_path / "retrieval", {"d.json": karpathy("train", "test", "restval", "val")})
    found = Retrieval.from_folder(tmp_path / "retrieval")
    assert {k: [i["text"] for i in items] for k, items in found.items()} == {
        "train": ["train 0", "restval 2"], "val": ["val 3"], "test": ["test 1"]}


@pytest.mark.parametrize("dump", [python2_pickle, pickle.dumps])
def test_refcoco_files_are_read_as_they_are_published(tmp_path, dump):
    refs = dump([*REFS, {**REFS[0], "split": "testA", "ref_id": 2}])
    write(tmp_path, {"refs(unc).p": refs, "refs(google).p": b"", "instances.json": BOXES})
    splits = Refer.from_folder(tmp_path)
    assert {k: len(v) for k, v in splits.items()} == {"train": 2, "testB": 1, "testA": 2, "test": 3}
    assert splits["train"][0] == dict(image_id=3, text="red ring", box=[10, 20, 40, 60], ref_id=0,
        sent_id=0, kind="expression")
    assert splits["testB"][0]["text"] == "caf\xe9"
    assert splits["test"] == splits["testA"] + splits["testB"]


def changed(files, name, **change):
    """Files of which the last entry of one file has another value, or lacks it (None)."""
    content = json.loads(json.dumps(files[name]))
    entries = next(v for v in content.values() if isinstance(v, list) and v)
    entries[-1] = {k: v for k, v in {**entries[-1], **change}.items() if v is not None}
    return {**files, name: content}


VQA_FILES, REFER_FILES = vqa_files(), {"refs(unc).p": pickle.dumps(REFS), "instances.json": BOXES}
ANNOTATIONS = "v2_mscoco_val2014_annotations.json"
QUESTIONS = "v2_OpenEnded_mscoco_val2014_questions.json"
REFUSED = [
    (VQA, {}, "no training questions with annotations"),
    (VQA, {"q.json": {"images": []}}, "q.json: not questions of VQA v2"),
    (VQA, {"q.json": []}, "q.json: expected a JSON dict, found a list"),
    (VQA, changed(VQA_FILES, ANNOTATIONS, question_id=None),
        "val2014_annotations.json: not annotations .*near .*6: KeyError 'question_id'"),
    *((VQA, changed(VQA_FILES, QUESTIONS, **{key: value}),
        f"val2014_questions.json: not questions .*near .*6: {error}")
        for key, value, error in (("image_id", None, "KeyError"), ("question", 5, "TypeError"))),
    (Retrieval, {}, "expected one file of Karpathy's splits .*found 0"),
    (Retrieval, {"a.json": karpathy("train"), "b.json": karpathy("val")}, "found 2"),
    (Refer, {}, "instances.json: not a whole JSON file .No such file"),
    (Refer, {"refs(google).p": b"", "refs(umd).p": b"", "instances.json": BOXES},
        r"refs\(unc\).p: not a pickle of .*No such file"),
    (Refer, {**REFER_FILES, "refs(unc).p": pickle.dumps([Path()])},  # a class could do anything
        r"refs\(unc\).p: not a pickle of .*plain .*asks for pathlib"),
    (Refer, {**REFER_FILES, "refs(unc).p": pickle.dumps([REFS[0], {**REFS[1], "ann_id": 99}])},
        r"refs\(unc\).p: not a .*near .*1: KeyError 99"),
    *((Refer, changed(REFER_FILES, "instances.json", **change),
        "instances.json: not RefCOCO's instances .near .*1: ")
        for change in ({"id": None}, {"bbox": [1, 2, 3]}, {"bbox": "abcd"}))]


@pytest.mark.parametrize("kind, files, message", REFUSED)
def test_files_that_are_not_as_published_are_refused(tmp_path, kind, files, message):
    write(tmp_path, files)
    with pytest.raises(BadInput, match=message):
        kind.from_folder(tmp_path)


# --- What the tasks share -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [VQA, Retrieval, Refer])
def test_training_starts_from_the_pretrained_encoder_and_lowers_the_loss(make, kind, pretrained):
    """Every trained parameter gets a gradient: several processes wait for each of them."""
    task, (config, weights) = make(kind), pretrained
    model, losses = task.build_model(config, weights).train(), []
    start, scratch = model.state_dict(), task.build_model(config, None).state_dict()
    assert all(start[k].equal(w) for k, w in weights.items() if k.startswith("bert."))
    assert any(not scratch[k].equal(w) for k, w in weights.items() if k.startswith("bert."))
    if kind is Retrieval:  # the matching head's log odds: it ranks before it is finetuned
        rows = weights["itm_classifier.weight"]
        assert start["classifier.1.weight"].equal((rows[MATCH] - rows[MISMATCH])[None])
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
    ranked = make(Retrieval, val=[dict(image_id=i, text="a") for i in (1, 99, 2, 3)],
        dev=[dict(image_id=98, text="a")])
    assert [i["image_id"] for i in ranked.held_out["val"]] == [1, 2, 3]
    assert "dev" not in ranked.held_out and len(ranked.shown) == 11


@pytest.mark.parametrize("kind, training, message", [
    (VQA, [question(99, k) for k in range(20)], "no.* training questions"),
    (VQA, [question(k, k) for k in range(8)], "no answer of nine"),
    (Retrieval, [dict(image_id=i, text="a") for i in (1, 2, 99)], "captions of 2 imag")])
def test_training_sets_from_which_nothing_is_learned_are_refused(make, kind, training, message):
    with pytest.raises(BadInput, match=message):
        make(kind, train=training)


# --- Runs -----------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(pretrained, store, tokenizer, tmp_path):
    """Of a store with other class heads and more regions: finetuning does not mind."""
    path, (config, weights) = tmp_path / "pretrained.pt", pretrained
    facts = {k: store.meta[k] for k in train.STORE_FACTS}
    torch.save({"format": train.CHECKPOINT_FORMAT, "task": "pretraining", "config": asdict(config),
        "model": weights, "vocab": tokenizer.pieces,
        "store": facts | {"num_region_classes": 9, "num_regions": 100}}, path)
    return path


@pytest.fixture
def run(checkpoint, store, tmp_path, monkeypatch):
    """run(task, *flags, **splits): a whole run of 4 to 6 steps on the made-up store."""
    def start(task, *flags, **splits):
        monkeypatch.setattr(
            finetune, "load_task", lambda kind, _: (store, {**splits_of(kind, store), **splits}))
        epochs = {"vqa": 1, "retrieval": 2, "refer": 6}[task]
        size = ["--batch", 10, "--epochs", epochs, "--eval-every", 3, "--threads", 1]
        standard = ["--checkpoint", checkpoint, "--out", tmp_path / task, *size]
        return finetune.finetune(*finetune.parse_args([task, *map(str, (*standard, *flags))]))

    monkeypatch.setattr(
        finetune, "picture_of", lambda *_: (Image.new("RGB", (90, 60), "grey"), 1))
    return start


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("task, steps, split", [
    ("vqa", 4, "val"), ("retrieval", 6, "test"), ("refer", 6, "val")])
def test_a_run_leaves_its_record(run, task, steps, split, tmp_path, capsys, store, monkeypatch):
    predict, taus = finetune.Task.predict, set()
    monkeypatch.setattr(finetune.Task, "predict", lambda self, model, items, tau=None: (
        taus.add(tau) or predict(self, model, items, tau)))
    results, out = run(task), tmp_path / task
    record, said, found = read(out / "result.json"), capsys.readouterr().out, results[split]
    assert taus == {None, 0.2}  # hard, and soft
    assert all((out / name).exists() for name in train.RECORD)
    assert (record["task"], record["steps"], record["results"]) == (task, steps, {split: found})
    assert record["without_features"] == ({"val": 1} if task == "vqa" else {})
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
    saved = train.load_checkpoint(out / "checkpoint.pt", task)
    assert saved["labels"] == (["star", "2", "blue"] if task == "vqa" else None)
    if task == "retrieval":
        assert np.load(out / f"scores-{split}.npy").shape == (11, 4)


def test_a_test_set_without_answers_gets_a_complete_submission(make, run, tmp_path, capsys):
    """And another split is evaluated while training, though this one comes first."""
    asked = [{**question(image_id, 7), "answers": []} for image_id in (1, 2, 99)]
    splits, task = {"test2015": asked, **splits_of(VQA, None)}, make(VQA)
    resumed = VQA(task.store, task.tokenizer, splits, finetune.parse_args(["vqa"])[0], ["cat"])
    assert resumed.shown == splits["val"] and resumed.labels == ["cat"]
    run("vqa", test2015=asked)
    submission = read(tmp_path / "vqa" / "submission-test2015.json")
    assert [s.pop("question_id") for s in submission] == [q["question_id"] for q in asked]
    assert all(s.keys() == {"answer"} and s["answer"] in task.labels for s in submission)
    assert "test2015: no answers to compare with; all 3" in capsys.readouterr().out


def test_a_stopped_run_goes_on_and_is_the_same_run(run, tmp_path, monkeypatch):
    run("refer")
    path, evaluations = tmp_path / "refer" / "checkpoint.pt", iter([Refer.evaluate] * 2)
    whole = torch.load(path, weights_only=True)["model"]
    with monkeypatch.context() as patch, pytest.raises(StopIteration):
        patch.setattr(Refer, "evaluate", lambda *a: next(evaluations)(*a))  # stops at the third
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
    assert given[0] is None and read(tmp_path / "vqa" / "result.json")["scratch"] is True
    assert read(tmp_path / "vqa" / "config.json")["examples"] == 9
    assert finetune.parse_args(["vqa", "--scratch"])[0].out.name == "vqa-scratch"


def test_examples_show_each_image_once(make, tmp_path, monkeypatch):
    refer, shown = make(Refer), []
    monkeypatch.setattr(finetune, "picture_of",
        lambda image_id, *_: shown.append(image_id) or (Image.new("RGB", (9, 9)), 1))
    items = [expression(refer.store, i, 0) for i in (3, 3, 4, 3, 4)]
    predictions = refer.score(items, torch.zeros(5, dtype=torch.long))[1]
    finetune.draw_examples(tmp_path / "e.png", refer, items, predictions, None)
    assert shown == [3, 4]


def test_what_does_not_fit_is_refused(run, checkpoint, tmp_path):
    run("refer", "--epochs", 1)
    saved = torch.load(checkpoint, weights_only=True)
    saved["store"]["feature_size"] = 2048
    torch.save(saved, checkpoint)
    own = tmp_path / "refer" / "checkpoint.pt"
    for task, flags, message in (
            ("vqa", ["--checkpoint", own], "checkpoint.pt: .*it is a checkpoint of refer"),
            ("vqa", [], "feature_size is 12, .* trained with 2048"),
            ("refer", ["--resume", "--epochs", 1, "--scratch"], "--scratch True: the run "),
            ("refer", ["--resume", "--epochs", 1, "--boxes", "gt"], "--boxes gt: the run ")):
        with pytest.raises(BadInput, match=message):
            run(task, *flags)


@pytest.mark.parametrize("argv", [["retrieval", "--boxes", "gt"], ["vqa", "--boxes", "gt"],
    ["refer", "--boxes", "true"], ["vqa", "--batch", "0"], ["ask", "a.png"]])
def test_flags_that_a_command_does_not_know_are_refused(argv):
    with pytest.raises(SystemExit, match="2"):
        finetune.parse_args(argv)


def test_ask_match_and_point_answer_about_a_picture(run, tmp_path, monkeypatch, capsys):
    Image.new("L", (90, 60), 128).save(tmp_path / "grey.png")
    boxes = np.array([[0, 0, 50, 50], [10, 10, 90, 60]], np.float32)
    monkeypatch.setattr(extract_features, "build_detector", lambda *_: None)
    monkeypatch.setattr(extract_features, "picture_regions", lambda model, path, most: (
        Image.open(path).convert("RGB"), boxes, np.ones((2, 12), np.float32), None))
    picture = str(tmp_path / "grey.png")

    def ask(detector, command, *words, task="vqa"):
        path, drawn = tmp_path / task / "checkpoint.pt", tmp_path / f"{command}.png"
        saved = torch.load(path, weights_only=True)
        torch.save({**saved, "store": {**saved["store"], "detector": detector}}, path)
        capsys.readouterr()
        finetune.main([command, *words, "--out", str(drawn), "--checkpoint", str(path)])
        assert Image.open(drawn).width >= 250
        return capsys.readouterr().out.splitlines()

    for task in ("vqa", "retrieval", "refer"):
        run(task, "--epochs", 1)
    lines = ask("made up", "ask", picture, "a red ring")[:3]
    assert sorted(line.split("  ")[1] for line in lines) == ["2", "blue", "star"]
    assert lines == sorted(lines, reverse=True)
    assert len(ask("made up", "match", "a red ring", picture, picture, task="retrieval")) == 3
    point = ask("made up", "point", picture, "a red ring", task="refer")
    assert point[0].split("box ")[1] in ("0 0 50 50", "10 10 90 60")
    assert "note" in ask("toy", "ask", picture, "a")[0]  # a photo is no scene
    with pytest.raises(BadInput, match="trained with the vg detector; give its weights with --w"):
        ask("vg", "ask", picture, "a")
    with pytest.raises(BadInput, match="it is a checkpoint of refer"):
        ask("made up", "ask", picture, "a", task="refer")
