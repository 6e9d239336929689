"""What finetune.py promises: the field's metrics to the letter, the real files, three tasks."""

import pickle
import re
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageColor

import data
import extract_features
import finetune
import train
from data import BadInput, FeatureStore, Scene, read_json, write_json
from finetune import VQA, Refer, Retrieval, answer_accuracy, normalise_answer
from switchbert import SwitchBertConfig, SwitchBertForPretraining, SwitchBertForRetrieval

EACH_TASK = pytest.mark.parametrize("kind", [VQA, Retrieval, Refer])


def question(image_id, k, text="what ?", answers=("net",) * 10, majority="net", kind="what is"):
    return dict(image_id=image_id, text=text, question_id=1000 * int(image_id) + k,
        answers=list(answers), majority=majority, answer_type="other", question_type=kind)


def splits_of(kind, store):
    """Training items on images 0 to 9, and held-out ones; image 99 has no features."""
    if kind is VQA:
        training = [question(i % 10, i, "a red ring", [word] * 10, word)
            for i, word in enumerate((["star", "blue", "2"] * 14)[:40])]
        return {"train": training, "val": [question(3, 1, answers=["blue"] * 3 + ["star"] * 7),
            question(99, 2, answers=["two"] * 9 + ["2"], kind="how many"),
            question(4, 3, answers=["cat"] * 10)]}
    if kind is Retrieval:
        pairs = [dict(image_id=f"COCO_val2014_{i:012d}.jpg", text=text) for i in range(10)
            for text in ("a red ring", "a large blue circle", "left of the ring")]
        return {"train": pairs, "val": pairs[:9] + pairs[15:17]}

    def expression(i, region, kind="attribute", shift=0):
        """It means a region of the store, 20 pixels wide, but moved to the right."""
        box = store[i]["boxes"][region] + np.array([shift, 0, shift, 0])
        return dict(image_id=i, text="a ring", box=box.tolist(), kind=kind, ref_id=0, sent_id=0)

    return {"train": [expression(i, i % (1 + i % 5)) for i in range(10)], "val": [expression(3, 2),
        expression(3, 2, "relation", 5), expression(3, 2, "relation", 99), expression(4, 0)]}


def with_splits(kind, store, others):
    """The splits of a task, some replaced by others; an empty one is none."""
    splits = splits_of(kind, store) | others
    return {name: items for name, items in splits.items() if items}


@pytest.fixture
def make(store, tokenizer):
    """make(kind, *flags, **splits) -> that task, with its own splits or with others."""
    def task(kind, *flags, **splits):
        args, _ = finetune.parse_args([kind.name, *flags])
        return kind(store, tokenizer, with_splits(kind, store, splits), args)
    return task


@pytest.fixture
def pretrained(tokenizer):
    """(config, weights) of a pretrained model."""
    config = SwitchBertConfig.tiny(vocab_size=len(tokenizer))
    weights = SwitchBertForPretraining(config).state_dict()
    weights["itm_classifier.weight"] *= 1e4  # so that pairs have other scores than their neighbours
    return config, weights


# --- Questions, retrieval, referring expressions --------------------------------------------------


@pytest.mark.parametrize("answer, normalised", [
    ("None", "0"), ("12:30", "12:30"), ("an", ""), ("", ""), ("its", "its"), ("twas", "'twas"),
    ("Couldntve", "couldntve"), ("couldnt've", "couldn't've"), ("somebody'd", "somebodyd"),
    ("a man\n\tand the dog ", "man and dog"), ("what?no", "what no"), ("red /blue", "red blue"),
    ("mr. t", "mr t"), ("a.b", "ab"), (".5", ".5"), ("5.5.", "5.5"),
    ("1,000 red-blue", "1000 redblue"),  # a comma between digits: every sign vanishes
    ("red -blue-green", "red bluegreen"), ("red- blue-green", "red bluegreen"),  # and by a space
    ("." * 40, "." * 8)])  # the count of re.UNICODE, 32
def test_normalisation_has_every_quirk_of_the_official_one(answer, normalised):
    assert normalise_answer(answer) == normalised


@pytest.mark.parametrize("prediction, answers, accuracy", [
    ("two", ["2"] * 10, 0), ("two", ["2"] * 9 + ["3"], 1),
    ("the net", ["Net"] * 2 + ["nets"] * 8, 0.6),
    ("the net ", ["the net"] * 9 + ["the\tnet\n"], 1),  # stripped, and then all agree
    ("net", ["the net"] * 9 + ["the net\n"], 0),
    ("net", ["The Net"], 1), ("2", ["two", "2"], 1),  # of other numbers than ten a share
    *(("net", ["net"] * n + ["dog"] * (3 - n), n / 3) for n in range(4)),
    *(("net", ["net"] * n + [*"abcdefghij"][n:], min(1, 0.3 * n)) for n in range(11))])
def test_answers_are_normalised_only_where_annotators_disagree_and_each_is_left_out_once(
        prediction, answers, accuracy):
    assert answer_accuracy(prediction, answers) == pytest.approx(accuracy)


def test_the_vocabulary_has_the_answers_of_nine_questions_after_normalisation(capsys):
    """The most frequent first; among equals by the alphabet. Few questions need not be nine."""
    few = ["The Net"] * 5 + ["net"] * 4 + ["1,000"] * 10 + ["dog"] * 8 + [""] * 9  # 36
    asked = [question(1, k, majority=m) for k, m in enumerate(few + ["rare"] * 2)]
    others = [question(1, k, majority=f"once {k}") for k in range(8962)]
    assert finetune.answer_vocabulary(asked) == ["1000", "", "net", "dog", "rare"]
    assert "5 answers to choose from; for 100.0% of the training" in capsys.readouterr().out
    assert finetune.answer_vocabulary(asked + others) == ["1000", "", "net"]
    assert "3 answers to choose from; for 0.3% of the" in capsys.readouterr().out  # 28 of 9,000


def scored(task, choices):
    """(scores, None, predictions) of choices for the held-out items."""
    task.predict = lambda *_: (torch.tensor(choices), None)
    return task.evaluate_items(None, task.held_out["val"])


def test_vqa_is_scored_overall_by_type_and_against_the_best_possible(make):
    vqa = make(VQA)
    for item in vqa.held_out["val"]:  # a target is the accuracy that its answer would get
        assert [*vqa.targets(item)] == [answer_accuracy(a, item["answers"]) for a in vqa.labels]
    scores, _, predictions = scored(vqa, [vqa.labels.index(a) for a in ("blue", "2", "star")])
    assert scores == pytest.approx({"accuracy": (0.9 + 1 + 0) / 3, "other": (0.9 + 1 + 0) / 3,
        "what is": 0.45, "how many": 1, "ceiling": 2 / 3})
    assert predictions[1] == {"question_id": 99002, "answer": "2"}


def test_four_candidates_right_wrong_text_other_image_and_nearest_image(make, store):
    """The nearest by the cosine of its mean feature; all other images come up in time."""
    retrieval = make(Retrieval, train=[
        dict(image_id=str(i), text=f"{i} {word}") for i in range(10) for word in "abc"])
    means = np.stack([store[i]["features"].mean(axis=0, dtype=np.float32) for i in range(10)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    nearest, others = (means @ means.T - 9 * np.eye(10)).argmax(axis=1), set()
    for index, item in enumerate(retrieval.items):
        own = index // 3
        for epoch in range(20):
            right, text, image, near = (e["item"] for e in retrieval[epoch, index])
            assert right == item and text["image_id"] == str(own) != text["text"].split()[0]
            assert image["text"] == near["text"] == item["text"]
            assert near["image_id"] == str(nearest[own])
            others.add((own, int(image["image_id"])))
        assert [e["item"] for e in retrieval[epoch, index]] == [right, text, image, near]
    assert others == {(a, b) for a in range(10) for b in range(10) if a != b}


def test_a_picture_that_stands_twice_is_not_its_own_hard_negative(tokenizer, tmp_path):
    """Images 0 and 1 are one picture; 2 is more like it than 3 is."""
    writer = FeatureStore.create(tmp_path, range(4), 1, 3)
    for row, feature in enumerate(([1, 0, 0], [1, 0, 0], [2, 1, 0], [0, 0, 1])):
        writer.write(row, np.float32([feature]), np.float32([[1, 1, 5, 5]]), (9, 9))
    items = [dict(image_id=i, text="a") for i in range(4)]
    args, _ = finetune.parse_args(["retrieval"])
    assert Retrieval(writer.finish(), tokenizer, {"train": items}, args).nearest[:3] == [2, 2, 0]


@pytest.mark.parametrize("images, lines", [(1000, []), (5000, []),
    (4999, ["4,999 images: 1K recalls need all 5,000 of COCO's"])])
def test_missing_1k_recalls_are_said_once(make, monkeypatch, capsys, images, lines):
    task = make(Retrieval)
    task.predict = lambda *_: (None, None)
    monkeypatch.setattr(finetune, "match_scores", lambda *_: torch.eye(images))
    items = [dict(image_id=i, text="a") for i in range(images)]
    for tau in (None, 0.2):
        recalls, _, _ = task.evaluate_items(None, items, tau)
        assert ("1K image R@1" in recalls) == (images == 5000)
    said = [line for line in capsys.readouterr().out.splitlines() if "1K" in line]
    assert said == lines


def test_recall_is_over_all_texts_and_images_and_of_5000_also_over_five_folds(make, monkeypatch):
    """The last text belongs to the first image."""
    task, asked, ks, own = make(Retrieval), [], (1, 5, 10), torch.arange(5001) % 5000
    items, scores = [dict(image_id=i, text=f"a {i}") for i in own.tolist()], torch.randn(5001, 5000)
    scores[range(5001), own] += 3
    monkeypatch.setattr(finetune, "match_scores", lambda *a: asked.append(a[3:]) or scores)
    task.predict = lambda model, items, tau: (None, tau)
    found, switches, predictions = task.evaluate_items(None, items, 0.3)
    assert asked == [([i["text"] for i in items], [*range(5000)], 30, 0.3)] and switches == 0.3
    assert found.items() >= train.recall_at(scores, own, ks).items()
    folds = [train.recall_at(scores[own // 1000 == k, 1000 * k : 1000 * (k + 1)],
        own[own // 1000 == k] - 1000 * k, ks) for k in range(5)]
    for name in folds[0]:
        assert found[f"1K {name}"] == pytest.approx(np.mean([fold[name] for fold in folds]))
    assert predictions == [{"found": k} for k in scores.argmax(dim=1).tolist()]


def test_a_blind_task_sees_no_picture(make, pretrained):
    task, vqa, refer = (make(kind, "--blind") for kind in (Retrieval, VQA, Refer))
    recalls = task.evaluate_items(task.build_model(*pretrained), task.held_out["val"])[0]
    assert recalls["image R@1"] == 0  # all images are alike, and a tie counts against it
    assert not vqa[0, 0]["region_features"].any() and not refer.targets(refer.items[0]).any()


def test_referring_counts_boxes_that_overlap_by_half(make):
    """A box moved by 5 of its 20 pixels has IoU 15 / 25; by 99, 0."""
    task = make(Refer)
    scores, _, predictions = scored(task, [2, 2, 2, 1])
    assert scores == {"accuracy": 0.5, "oracle": 0.75, "attribute": 0.5, "relation": 0.5}
    assert [p["iou"] for p in predictions[:3]] == pytest.approx([1, 0.6, 0])
    assert task.targets(task.held_out["val"][1])[2] == pytest.approx(0.6)
    assert task.overlaps({"image_id": 99, "box": (0, 0, 5, 5)})[1].tolist() == [0]


def test_examples_are_framed_blue_or_orange_one_per_image(make, tmp_path):
    """Of image 3 the first expression is found, of image 4 the only one is not."""
    task, args = make(Refer), SimpleNamespace(out=tmp_path, data=tmp_path)
    finetune.draw_examples(args, task, scored(task, [2, 2, 2, 1])[2])
    picture = Image.open(tmp_path / "examples.png")
    frames = [picture.getpixel((x, 7)) for x in (5, 211)]
    assert frames == [ImageColor.getrgb(name) for name in ("royalblue", "darkorange")]


def test_examples_are_read_as_extraction_reads_and_never_end_a_run(run, tmp_path, monkeypatch):
    """Turned upright; other files of that name, and what cannot be opened, are grey."""
    monkeypatch.undo()
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "images").mkdir()
    (tmp_path / "images/3.json").write_text("{}")
    Image.new("RGB", (90, 60), "red").save(tmp_path / "images/3.png", exif=exif)
    (tmp_path / "images/4.png").write_text("no picture")
    assert finetune.picture_of("COCO_val2014_000000000003.jpg", tmp_path).size == (60, 90)
    for image_id in (4, 5):
        assert finetune.picture_of(image_id, tmp_path).getpixel((9, 9)) == (128, 128, 128)


def test_a_drawing_that_fails_does_not_fail_its_run(run, monkeypatch, capsys):
    monkeypatch.setattr(finetune, "panel", lambda *_: 1 / 0)
    assert run("vqa")["val"]["hard"] and Path("vqa/result.json").exists()
    assert "vqa/examples.png could not be drawn: ZeroDivisionError" in capsys.readouterr().out


@EACH_TASK
def test_the_toy_worlds_items_are_true_of_their_scenes_and_no_splits_share_one(kind):
    splits = kind.from_scenes(range(5), range(1_000_000, 1_000_105))
    training, *held_out = ({int(i["image_id"]) for i in items} for items in splits.values())
    assert max(training) < 5 and min(set.union(*held_out)) >= 1_000_000
    assert len(set.union(*held_out)) == sum(map(len, held_out))
    for item in splits["val"]:
        scene = Scene(int(item["image_id"]))
        if kind is VQA:
            assert (item["text"], item["answers"][9], item["question_type"]) in scene.questions(5)
        elif kind is Retrieval:
            assert item["text"] in scene.captions(2)
        else:
            shapes = item["text"].split()[:4]  # before what it is related to
            assert item["box"] in [thing.box for thing in scene.things if thing.shape in shapes]


@EACH_TASK
def test_training_starts_pretrained_and_its_loss_is_cross_entropy(make, kind, pretrained):
    """Added up over answers, real regions, or four candidates of which the first is right."""
    task, (config, weights) = make(kind), pretrained
    model, batch = task.build_model(config, weights), task.collate([task[0, i] for i in range(10)])
    start = model.eval().state_dict()
    assert all(start[k].equal(w) for k, w in weights.items() if k.startswith("bert."))
    assert task.counts(batch).tolist() == [10]
    (loss, _), targets = task.sums(model, batch, 0.5), batch.pop("targets")
    logits, _ = model(**batch, temperature=0.5)
    if kind is Retrieval:
        expected = -logits.view(10, 4).softmax(dim=1)[:, 0].log().sum()
    else:
        real = batch["region_mask"].bool() if kind is Refer else targets >= 0
        expected = F.binary_cross_entropy(logits[real].sigmoid(), targets[real], reduction="sum")
        assert task.loss(logits * torch.nan, targets).isnan()  # so that fit sees it diverge
    torch.testing.assert_close(loss, expected[None])
    loss.sum().backward()
    for name, parameter in model.named_parameters():  # several processes wait for each of them
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_three_processes_in_turn_predict_what_one_does(make, pretrained, monkeypatch):
    task, parts = make(Refer), []
    model, items = task.build_model(*pretrained), task.items
    whole, hard = task.predict(model, items, batch_size=2)
    assert hard != task.predict(model, items, tau=0.2)[1] and model.training  # again, after it
    monkeypatch.setattr(train, "WORLD_SIZE", 3)
    for number in range(3):
        monkeypatch.setattr(train, "RANK", number)
        parts.append(task.predict(model, items, batch_size=2)[0])
    assert sum(parts).equal(whole) and all(p.count_nonzero() < len(items) for p in parts)


def test_a_loading_process_prepares_predictions_if_there_are_many(make, pretrained, monkeypatch):
    task, started = make(Refer), []
    model, items = task.build_model(*pretrained), task.items
    monkeypatch.setattr(finetune, "load_ahead", lambda *args: started.append(args[-1]) or (
        data.load_ahead(*args)))
    whole = task.predict(model, items)[0]
    task.workers = 4
    assert task.predict(model, items, batch_size=1)[0].equal(whole) and started == [0, 1]


def test_images_without_features_leave_training_and_ranking_but_not_the_answers(make):
    vqa = make(VQA, train=[question(i, 0) for i in range(12)])
    retrieval = make(Retrieval, val=[dict(image_id=i, text="a") for i in range(12)])
    assert (vqa.missing, retrieval.missing) == ({"train": 2, "val": 1}, {"train": 0, "val": 2})
    assert (len(vqa), len(vqa.held_out["val"]), len(retrieval.held_out["val"])) == (10, 3, 10)


# --- Published files ------------------------------------------------------------------------------


def test_vqas_files_are_read_as_they_are_published(tmp_path):
    """A question finds its answers by its number, whichever file comes first."""
    truths = [dict(question_id=3000 + k, answers=[{"answer": word}] * 10, answer_type="other",
        multiple_choice_answer=word, question_type="what is") for k, word in ((1, "b"), (0, "a"))]
    write_json(tmp_path / "0b.json", {"annotations": truths})
    for k, subset in enumerate(("train2014", "val2014", "test-dev2015")):
        asked = dict(image_id=3, question="what", question_id=3000 + k)
        write_json(tmp_path / f"{k}.json", {"data_subtype": subset, "questions": [asked]})
    unanswered = dict(image_id=3, text="what", question_id=3002, answers=[])
    assert VQA.from_folder(tmp_path, None) == {"train": [question(3, 0, "what", ["a"] * 10, "a")],
        "val": [question(3, 1, "what", ["b"] * 10, "b")], "test-dev2015": [unanswered]}


def vqa_files(folder, name, number, subset="train2014", **content):
    """A file of one question, and one of its annotation."""
    write_json(folder / f"{name}-questions.json", {"data_subtype": subset, **content,
        "questions": [dict(image_id=3, question="what", question_id=number)]})
    write_json(folder / f"{name}-annotations.json", {"annotations": [dict(question_id=number,
        answers=[{"answer": "a"}] * 3, answer_type="other", multiple_choice_answer="a",
        question_type="what is")]})


def test_questions_are_joined_by_their_ids_as_they_are_written(tmp_path, capsys):
    """'007' is not 7; images may be counted; another number of answers than ten is said."""
    vqa_files(tmp_path, "a", "007", images=[{"id": 3, "file_name": "dog.jpg"}])
    vqa_files(tmp_path, "b", 7)
    vqa_files(tmp_path, "c", 8, "validation")
    for subset in ("train2014", "test2015", "test-dev2015"):  # without annotations
        asked = [dict(image_id=3, question="what", question_id=9 if "test" in subset else 10)]
        write_json(tmp_path / f"{subset}.json", {"data_subtype": subset, "questions": asked})
    write_json(tmp_path / "other.json", {})
    splits = VQA.from_folder(tmp_path, None)
    assert {k: [(i["question_id"], i["image_id"]) for i in items] for k, items in splits.items()
        } == {"train": [("007", "dog"), (7, 3)], "val": [(8, 3)], "test2015": [(9, 3)],
            "test-dev2015": [(9, 3)]}
    said = capsys.readouterr().out
    assert "questions: 3 of 5 found in the annotations" in said
    assert "other.json: has no questions and no annotations, so it is not read" in said
    assert "3 questions have neither 1 answer nor 10" in said


@pytest.mark.parametrize("files, message", [
    ([(7, "train2014"), (7, "train2015")], "annotations.json: .*question_id 7 comes twice"),
    ([(7, "test2015"), ("7", "test-dev2015")], "1-questions.json: .*question_id 7 comes twice"),
    ([(7, "train2014"), (7, "train2014")], "question_id 7 comes twice"),
    ([(7, "dress rehearsal")], "expected a split among train, val, .* found 'dress rehearsal'")])
def test_repeated_ids_and_unknown_splits_are_refused(tmp_path, files, message):
    for name, (number, subset) in enumerate(files):
        vqa_files(tmp_path, name, number, subset)
        if subset.startswith("test"):
            (tmp_path / f"{name}-annotations.json").unlink()
    with pytest.raises(BadInput, match=message):
        VQA.from_folder(tmp_path, None)


def test_the_score_of_a_run_says_of_which_split_it_is(make, capsys):
    vqa = make(VQA)
    assert vqa.headline({"accuracy": 0.5}) == "val 0.500"
    vqa = make(VQA, val=[])
    assert vqa.headline({"accuracy": 0.5}) == "train 0.500"
    assert "no held-out questions: scores are of" in capsys.readouterr().out


def test_karpathys_splits_are_read_as_they_are_published(tmp_path, store):
    published = {"images": [dict(filename=f"{k}.jpg", split=split, sentences=[{"raw": split}])
        for k, split in enumerate(("train", "test", "restval", "val"))]}
    write_json(tmp_path / "dataset_coco.json", published)
    found = Retrieval.from_folder(tmp_path, store).items()
    assert {split: [item["text"] for item in items] for split, items in found} == {
        "train": ["train", "restval"], "val": ["val"], "test": ["test"]}


@pytest.mark.parametrize("dump", [pickle.dumps,  # and Python 2's, with strings S'...', not V...
    lambda refs: re.sub(rb"V(.*)\n", rb"S'\1'\n", pickle.dumps(refs, protocol=0))])
def test_refcoco_files_are_read_as_they_are_published_but_no_class_in_them(tmp_path, dump):
    names, path = ("train", "testA", "testB"), tmp_path / "refs(unc).p"
    sentences = 2 * [{"sent_id": 5, "raw": "A", "sent": "caf\xe9"}]
    path.write_bytes(dump([dict(ref_id=name, ann_id=11, image_id=3, split=name,
        sentences=sentences) for name in names]))
    write_json(tmp_path / "instances.json", {"annotations": [
        {"id": 12, "bbox": [0, 0, 5, 5]}, {"id": 11, "bbox": [10, 20, 30, 40]}]})
    items = {name: 2 * [dict(image_id=3, text="caf\xe9", box=[10, 20, 40, 60], ref_id=name,
        sent_id=5)] for name in names}
    assert Refer.from_folder(tmp_path, None) == items | {"test": items["testA"] + items["testB"]}
    path.write_bytes(pickle.dumps([Path()]))  # a class could do anything
    with pytest.raises(BadInput, match="asks for pathlib"):
        Refer.from_folder(tmp_path, None)


@pytest.mark.parametrize("name", ["refs(umd).p", "refs(unc).p"])
def test_refcocog_has_other_splits_and_another_name(tmp_path, name):
    """And images that are counted, where a file was made by hand."""
    refs = [dict(ref_id=k, ann_id=11, image_id=3, split=split,
        sentences=[{"sent_id": k, "sent": "a"}])
        for k, split in enumerate(("train", "validation", "test"))]
    (tmp_path / name).write_bytes(pickle.dumps(refs))
    write_json(tmp_path / "instances.json", {"images": [{"id": 3, "file_name": "dog.jpg"}],
        "annotations": [{"id": 11, "bbox": [10, 20, 30, 40]}]})
    splits = Refer.from_folder(tmp_path, None)
    assert {split: [(i["sent_id"], i["image_id"]) for i in items] for split, items in splits.items()
        } == {"train": [(0, "dog")], "val": [(1, "dog")], "test": [(2, "dog")]}
    (tmp_path / "refs(google).p").touch()
    with pytest.raises(BadInput, match="expected one file refs.unc..p, .* found 2"):
        Refer.from_folder(tmp_path, None)


@pytest.mark.parametrize("kind, content, message", [
    (VQA, {"data_subtype": "", "questions": [dict(image_id=1, question=5, question_id=1)]},
        "entry 0: TypeError"),
    (VQA, {"annotations": [dict(answers=[], question_id=1)]},
        "entry 0: KeyError 'multiple_choice_answer'"),
    (Refer, {"annotations": [{"id": 1, "bbox": "abcd"}]}, "not RefCOCO's instances")])
def test_files_that_are_not_as_published_are_refused(tmp_path, kind, content, message):
    write_json(tmp_path / "instances.json", content)
    with pytest.raises(BadInput, match=f"instances.json: .*{message}"):
        kind.from_folder(tmp_path, None)


# --- Runs -----------------------------------------------------------------------------------------


@pytest.fixture
def run(pretrained, store, tokenizer, tmp_path, monkeypatch):
    """run(task, flags, **splits): a run in an empty folder. other.pt is of larger features."""
    config, weights = pretrained
    for name, size in (("pretrained.pt", 12), ("other.pt", 2048)):
        torch.save({"format": train.CHECKPOINT_FORMAT, "task": "pretraining", "model": weights,
            "config": asdict(config), "vocab": tokenizer.pieces, "labels": None,
            "store": {**store.meta, "num_regions": 100, "feature_size": size}}, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(finetune, "picture_of", lambda *_: Image.new("RGB", (90, 60)))

    def start(task, flags="", **splits):
        monkeypatch.setattr(
            finetune, "load_task", lambda kind, _: (store, with_splits(kind, store, splits)))
        argv = f"{task} --checkpoint pretrained.pt --out {task} --batch 10 --epochs 2 {flags}"
        return finetune.finetune(*finetune.parse_args(argv.split()))

    return start


@EACH_TASK
def test_a_run_leaves_its_record_and_resumed_gives_the_same(run, kind, store, monkeypatch):
    predict, taus = finetune.Task.predict, set()
    monkeypatch.setattr(finetune.Task, "predict", lambda self, model, items, tau=None: (
        taus.add(tau) or predict(self, model, items, tau)))
    results, out = run(kind.name), Path(kind.name)
    record, found = read_json(out / "result.json"), results["val"]
    assert (record["command"], record["batch"], record["results"]) == (kind.name, 10, results)
    assert found["hard"].keys() == found["soft"].keys() and taus == {None, 0.2}
    assert train.read_metrics(out)[-1]["scores"] == found["hard"]
    assert Image.open(out / "examples.png").width >= 200
    # A resumed run chooses from the answers of its checkpoint, whatever people answer now.
    other = [{**item, "majority": "net"} for item in splits_of(kind, store)["train"]]
    assert run(kind.name, "--resume", train=other) == results


def test_a_test_set_without_answers_gets_a_complete_submission_also_without_val(run):
    asked = [{**question(image_id, 7), "answers": []} for image_id in (1, 2, 99)]
    assert run("vqa", val=[], test2015=asked) == {"test2015": {"hard": {}, "soft": {}}}
    submission = read_json("vqa/submission-test2015.json")
    assert [s.pop("question_id") for s in submission] == [1007, 2007, 99007]
    assert all([*s] == ["answer"] and s["answer"] in ("star", "blue", "2") for s in submission)


@EACH_TASK
def test_a_finished_run_is_evaluated_on_other_data_without_training(run, kind, store, capsys):
    """Also on data without a training split; a split without any picture is not scored."""
    items = splits_of(kind, store)["train"][:9]
    expected = run(kind.name, val=items)["val"]
    lost = [item | {"image_id": 99} for item in items]
    found = run(kind.name, f"--epochs 0 --checkpoint {kind.name} --out other", train=[], val=items,
        testA=lost)
    assert found == {"val": expected}
    assert f"testA: {kind.unit}: 0 of 9 found" in capsys.readouterr().out
    assert read_json("other/result.json")["without_features"] == {"val": 0, "testA": 9}


def test_predictions_stand_beside_their_questions_and_truths(run, store):
    for kind, truth in ((VQA, "majority"), (Refer, "box"), (Retrieval, "image_id")):
        run(kind.name)
        items = splits_of(kind, store)["val"]
        for item, said in zip(items, read_json(f"{kind.name}/predictions.json")["val"], strict=True):
            assert (said["text"], said["truth"]) == (item["text"], item[truth])
            assert {"answer", "box", "found"} & said.keys()


def test_retrieval_reads_the_captions_that_pretraining_reads(store, tmp_path):
    """Those of a table have no splits: five images are held out."""
    (tmp_path / "a.tsv").write_text("".join(f"{i}\ta ring {i}\n" for i in range(10)))
    splits = Retrieval.from_folder(tmp_path, store)
    assert {split: len(items) for split, items in splits.items()} == {"train": 5, "val": 5}
    for item in splits["train"] + splits["val"]:
        assert item["text"] == f"a ring {item['image_id']}"


def test_no_step_is_zero_shot_or_from_scratch_also_below_a_batch(run, make, pretrained):
    task, out = make(Retrieval), Path("retrieval")
    zero_shot = SwitchBertForRetrieval.from_pretraining(*pretrained)
    items = task.held_out["val"]
    found = task.evaluate_items(zero_shot, items)[2]
    expected = [dict(image_id=i["image_id"], text=i["text"], truth=i["image_id"]) | f
        for i, f in zip(items, found)]
    for flag in ("", "--scratch"):
        run("retrieval", f"--epochs 0 --limit 9 {flag}")
        assert (read_json(out / "predictions.json")["val"] == expected) == (flag == "")
        assert read_json(out / "config.json")["examples"] == 9


@pytest.mark.parametrize("task, flags, splits, message", [
    ("vqa", "", dict(train=[question(99, k) for k in range(20)]), "no training questions for"),
    ("vqa", "--epochs 0", dict(train=[]), "no training questions, so no answers"),
    ("retrieval", "", dict(train=[dict(image_id=i, text="a") for i in (1, 2, 99)]), "fewer than t"),
    ("vqa", "--checkpoint refer", {}, "checkpoint of pretraining or vqa .it is one of refer"),
    ("refer", "--checkpoint refer", {}, "refer: a new run there would replace it"),
    ("vqa", "--checkpoint other.pt", {}, "feature_size is 12, .* trained with 2048"),
    ("refer", "--resume --boxes gt", {}, "--boxes gt: the run that is resumed has detected")])
def test_nothing_to_learn_from_and_what_does_not_fit_is_refused(run, task, flags, splits, message):
    run("refer")
    with pytest.raises(BadInput, match=message):
        run(task, flags, **splits)


def test_true_boxes_are_in_a_store_of_their_own_and_the_toy_world_has_none(monkeypatch):
    monkeypatch.setattr(finetune, "FeatureStore", Path)
    monkeypatch.setattr(Refer, "from_folder", lambda folder, store: f"{folder} {store}")
    for boxes in ("detected", "gt"):
        args, _ = finetune.parse_args(["refer", "--data", "d", "--boxes", boxes])
        assert finetune.load_task(Refer, args) == (
            Path(f"d/features-{boxes}"), f"d d/features-{boxes}")
    with pytest.raises(BadInput, match="--boxes gt: the toy world"):
        finetune.load_task(Refer, finetune.parse_args(["refer", "--boxes", "gt"])[0])


@pytest.fixture
def asked(run, store, monkeypatch, capsys):
    """asked(*flags) -> the lines that `ask` prints. A picture's regions are those of the image in
    the store that has its name.
    """
    def regions(detector, path, most):
        image = store[store.row(path)]
        return Image.new("RGB", image["size"]), image["boxes"], image["features"], None

    def ask(*flags):
        capsys.readouterr()
        finetune.main(["ask", *map(str, flags)])
        return capsys.readouterr().out.splitlines()

    monkeypatch.setattr(extract_features, "build_detector", lambda *_: None)
    monkeypatch.setattr(extract_features, "picture_regions", regions)
    return ask


@EACH_TASK
def test_ask_says_of_pictures_and_of_rows_of_a_store_what_the_run_said(run, asked, kind, store):
    """It is sure of an answer or a box; of finetuned retrieval only the order counts."""
    items = splits_of(kind, store)["train"][:10]
    run(kind.name, val=items)
    predictions = read_json(f"{kind.name}/predictions.json")["val"]
    pairs = list(zip(items, predictions, strict=True))
    for item, said in pairs:
        pictures = [str(item["image_id"])]
        if kind is VQA:
            expected = f"  answer: {said['answer']}"
        elif kind is Refer:
            expected = f"  box: {[round(corner) for corner in said['box']]}"
        else:  # the surest comes first, whatever the order
            pictures = sorted({other["image_id"] for other in items})
            expected = f"{said['found']}: {item['text']}"
        lines = asked(kind.name, item["text"], *pictures)
        assert expected in lines[:2]
        assert any("sure: " in line for line in lines) == (kind is not Retrieval)
        assert asked(kind.name, item["text"], *pictures, "--store", store.folder) == lines


def test_a_pretrained_checkpoint_matches_texts_of_a_file_with_pictures(asked, pretrained, store,
        tokenizer):
    """As zero-shot retrieval does: the log odds of a match, here as a probability."""
    texts = ["a small red star", "left of the ring", "a large blue circle", "a ring"]
    Path("texts.txt").write_text("\n".join(texts) + "\n")
    pictures = [*"12345"]
    model = SwitchBertForRetrieval.from_pretraining(*pretrained)
    scores = train.match_scores(model, store, tokenizer, texts, pictures).sigmoid()
    lines = asked("pretrained.pt", "texts.txt", *pictures)
    said = {line: float(sure.split()[1]) for line, sure in zip(lines[:-1:2], lines[1::2])}
    assert [*said.values()] == sorted(said.values(), reverse=True) and len(said) == 20
    for text, row in zip(texts, scores.tolist()):
        for picture, score in zip(pictures, row):
            assert said[f"{picture}: {text}"] == pytest.approx(score, rel=6e-3)


def test_words_that_the_vocabulary_lacks_are_named(asked):
    lines = asked("pretrained.pt", "a Ring, a red table", "3")
    assert lines[:2] == ["note: ',' is read as [UNK]", "note: 'table' is read as t ##a ##b ##l ##e"]
    assert lines[2] == "3: a Ring, a red table"


def test_a_store_that_does_not_fit_or_lacks_the_image_is_refused(asked, store):
    with pytest.raises(BadInput, match="feature_size is 12, .* trained with 2048"):
        asked("other.pt", "a", "3", "--store", store.folder)
    with pytest.raises(BadInput, match="no features of an image '77'"):
        asked("pretrained.pt", "a", "77", "--store", store.folder)


@pytest.mark.parametrize("about, notes", [({"detector": "toy"}, 1), ({"detector": "vg"}, 0),
    ({"detector": "toy", "precision": "fp32"}, 0)])  # the toy detector's, but of picture files
def test_only_a_model_of_scenes_says_that_a_picture_is_none(asked, about, notes):
    saved = torch.load("pretrained.pt")
    torch.save({**saved, "store": {"num_regions": 5, **about}}, "asked.pt")
    assert sum("is no scene" in line for line in asked("asked.pt", "a", "3")) == notes


def test_a_region_is_as_bright_as_its_share_in_the_last_layer_that_looks_at_vision():
    """Two words, the whole picture and two regions; weights are the mean of two heads, of which
    only one reads the first word."""
    boxes, pieces = np.float32([[0, 0, 49, 99], [50, 0, 99, 99]]), ["a", "b"]

    def layer(*looks):
        weights = torch.zeros(1, 2, 5, 5)
        weights[0, :, :2, 2:] = torch.tensor(looks) * torch.tensor([[0.0, 1], [2, 1]])[..., None]
        weights[0, :, 2:, 2:] = 1.0  # vision's own weights are not drawn
        return SimpleNamespace(attention=SimpleNamespace(weights=weights))

    def drawn(*layers, most=None):
        model = SimpleNamespace(bert=SimpleNamespace(layers=layers))
        white = Image.new("RGB", (100, 100), "white")
        panels = finetune.word_panels(model, pieces, white, boxes, most)
        return [[p.getpixel((x, 100))[0] for x in (50, 150)] for p in panels]

    first = layer([0.1, 0.2, 0.4], [0.0, 0.8, 0.0])
    second = layer([0.9, 0.0, 0.1], [0.0, 0.0, 0.05])
    blind = layer([0.0] * 3, [0.0] * 3)
    assert drawn(first) == [[101, 152], [255, 50]]
    assert drawn(first, second, blind) == drawn(second) == [[50, 255], [50, 152]]
    assert drawn(first, second, most=1) == drawn(first)
    assert drawn(blind) == [[50, 50], [50, 50]]


def test_the_answer_shows_words_and_what_the_switches_chose(asked):
    """The picture, [CLS] a red ring [SEP], and two layers: two rows of panels, one of switches."""
    asked("pretrained.pt", "a red ring", "3", "--layer", 1)
    picture = Image.open("answer.png")
    switches = train.switches_picture({"modes": [[[1, 0, 0]] * 2] * 2,
        "depths": [[[1]] * 2, [[1, 0]] * 2]}, "")
    assert picture.width == switches.width and picture.height > 2 * 230 + switches.height


def test_a_model_of_the_vg_detector_answers_only_with_its_weights(run):
    saved = torch.load("pretrained.pt")
    torch.save({**saved, "store": {**saved["store"], "detector": "vg"}}, "vg.pt")
    with pytest.raises(BadInput, match="detector.pt: not the weights of the vg detector"):
        finetune.main(["ask", "vg.pt", "what ?", "a.png"])


@EACH_TASK
def test_loading_processes_that_are_not_forked_get_the_task_without_its_model(
        make, kind, pretrained, monkeypatch):
    """Python 3.14 and macOS start them anew, with a pickled copy of the data set."""
    task = make(kind)
    task.model = task.build_model(*pretrained)
    copy = pickle.loads(pickle.dumps(task))
    assert copy.model is copy.examples.model is None and task.model
    torch.testing.assert_close(copy.collate([copy[1, 2]]), task.collate([task[1, 2]]))
