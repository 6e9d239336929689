"""What finetune.py promises: the field's metrics to the letter, the real files, three tasks."""

import json
import pickle
import re
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import extract_features
import finetune
import train
from data import BadInput, Scene
from finetune import VQA, Refer, Retrieval, answer_accuracy, normalise_answer
from switchbert import SwitchBertConfig, SwitchBertForPretraining, SwitchBertForRetrieval

EACH_TASK = pytest.mark.parametrize("kind", [VQA, Retrieval, Refer])

# --- Tasks on the made-up store -------------------------------------------------------------------


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

    def expression(image_id, region, kind="attribute", shift=0.0):
        """It means a region of the store, its box moved by a share of its width."""
        box = store[store.row(image_id)]["boxes"][region].astype(float)
        box[[0, 2]] += shift * (box[2] - box[0])
        return dict(image_id=image_id, text="a red ring", box=box.tolist(), kind=kind, ref_id=0,
            sent_id=0)

    return {"train": [expression(i, i % (1 + i % 5)) for i in range(10)],
        "val": [expression(3, 2), expression(3, 2, "relation", 0.25),
            expression(3, 2, "relation", 9.0), expression(4, 0)]}


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


# --- Questions, retrieval, referring expressions --------------------------------------------------


@pytest.mark.parametrize("answer, normalised", [
    ("yes!", "yes"), ("None", "0"), ("two, three", "2 3"), ("12:30", "12:30"), ("an", ""), ("", ""),
    ("Couldntve", "couldntve"), ("couldnt've", "couldn't've"), ("twas", "'twas"), ("its", "its"),
    ("somebody'd", "somebodyd"), ("a man\n\tand the dog ", "man and dog"), ("what?no", "what no"),
    ("red /blue", "red blue"), ("mr. t", "mr t"), ("a.b", "ab"), (".5", ".5"), ("5.5.", "5.5"),
    ("1,000 red-blue", "1000 redblue"),  # a comma between digits: every sign vanishes
    # A sign that touches a space once vanishes everywhere.
    ("red -blue-green", "red bluegreen"), ("red- blue-green", "red bluegreen"),
    ("." * 40, "." * 8)])  # the count of re.UNICODE, 32
def test_normalisation_has_every_quirk_of_the_official_one(answer, normalised):
    assert normalise_answer(answer) == normalised


@pytest.mark.parametrize("prediction, answers, accuracy", [
    ("two", ["2"] * 10, 0), ("two", ["2"] * 9 + ["3"], 1),
    ("the net", ["Net"] * 2 + ["nets"] * 8, 0.6),
    ("the net ", ["the net"] * 9 + ["the\tnet\n"], 1),  # stripped, and then all agree
    ("net", ["the net"] * 9 + ["the net\n"], 0),
    *(("net", ["net"] * n + [*"abcdefghij"][n:], min(1, 0.3 * n)) for n in range(11))])
def test_answers_are_normalised_only_where_annotators_disagree_and_each_is_left_out_once(
        prediction, answers, accuracy):
    assert answer_accuracy(prediction, answers) == pytest.approx(accuracy)


def test_the_vocabulary_has_the_answers_of_nine_questions_after_normalisation():
    """The most frequent first; among equals by the alphabet."""
    asked = [question(1, k, majority=m) for k, m in enumerate(
        ["The Net"] * 5 + ["net"] * 4 + ["1,000"] * 10 + ["dog"] * 8 + [""] * 9)]
    assert finetune.answer_vocabulary(asked) == ["1000", "", "net"]


def scored(task, choices):
    """(scores, predictions) of choices for the held-out items."""
    task.predict = lambda *_: (torch.tensor(choices), None)
    scores, _, predictions = task.evaluate_items(None, task.held_out["val"])
    return scores, predictions


def test_vqa_is_scored_overall_by_type_and_against_the_best_possible(make):
    vqa = make(VQA)
    for item in vqa.held_out["val"]:  # a target is the accuracy that its answer would get
        for answer, target in zip(vqa.labels, vqa.targets(item), strict=True):
            assert target == answer_accuracy(answer, item["answers"])
    scores, predictions = scored(vqa, [vqa.labels.index(a) for a in ("blue", "2", "star")])
    assert scores == pytest.approx({"accuracy": (0.9 + 1 + 0) / 3, "other": (0.9 + 1 + 0) / 3,
        "what is": 0.45, "how many": 1, "ceiling": 2 / 3})
    assert vqa.headline(scores) == "held-out 0.633"  # what is printed while training
    assert predictions[1] == {"question_id": 99002, "answer": "2"}


def test_four_candidates_right_wrong_text_other_image_and_nearest_image(make, store):
    """The nearest by the cosine of its mean feature; all other images come up in time."""
    retrieval = make(Retrieval, train=[
        dict(image_id=str(i), text=f"{i} {word}") for i in range(10) for word in "abc"])
    means, others = [store[store.row(i)]["features"].mean(axis=0) for i in range(10)], set()
    for index in range(30):
        item, own = retrieval.items[index], index // 3
        cosines = [m @ means[own] / np.linalg.norm(m) if k != own else -np.inf
            for k, m in enumerate(means)]
        for epoch in range(20):
            four = [e["item"] for e in retrieval[epoch, index]]
            assert four[0] == item and four[1]["image_id"] == str(own) != four[1]["text"].split()[0]
            assert [four[k]["text"] for k in (2, 3)] == [item["text"]] * 2
            assert four[3]["image_id"] == str(np.argmax(cosines))
            others.add((own, int(four[2]["image_id"])))
        assert four == [e["item"] for e in retrieval[epoch, index]]
    assert others == {(a, b) for a in range(10) for b in range(10) if a != b}


def test_recall_is_over_all_texts_and_images_with_the_switches_asked_for(make, monkeypatch):
    task, asked, own = make(Retrieval), [], torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3])
    items, scores, task.predict = task.held_out["val"], torch.randn(11, 4), lambda *_: (0, "s")
    images = [items[k]["image_id"] for k in (0, 3, 6, 9)]
    monkeypatch.setattr(finetune, "match_scores", lambda *a: asked.append(a[3:]) or scores)
    for tau in (None, 1.0):
        found, switches, predictions = task.evaluate_items("model", items, tau)
        assert asked[-1] == ([i["text"] for i in items], images, 30, tau) and switches == "s"
    assert found == train.recall_at(scores, own, (1, 5, 10))
    assert predictions == [i | {"found": images[k]} for i, k in zip(items, scores.argmax(dim=1))]


def test_a_blind_task_sees_no_picture(make, pretrained):
    task, vqa, refer = (make(kind, "--blind") for kind in (Retrieval, VQA, Refer))
    recalls = task.evaluate_items(task.build_model(*pretrained), task.held_out["val"])[0]
    assert recalls["image R@1"] == 0  # all images are alike, and a tie counts against it
    assert not vqa[0, 0]["region_features"].any() and not refer.targets(refer.items[0]).any()


def test_five_folds_are_five_recalls_among_a_thousand(make, monkeypatch):
    scores, ks = torch.randn(5000, 5000) + 3 * torch.eye(5000), (1, 5, 10)
    monkeypatch.setattr(finetune, "match_scores", lambda *_: scores)
    monkeypatch.setattr(Retrieval, "predict", lambda *_: (None, None))
    items = [dict(image_id=i, text="a") for i in range(5000)]
    found = make(Retrieval).evaluate_items(None, items)[0]
    folds = [train.recall_at(scores[part, part], torch.arange(1000), ks)
        for part in map(slice, range(0, 5000, 1000), range(1000, 5001, 1000))]
    assert {name: found[f"1K {name}"] for name in folds[0]} == pytest.approx(
        {name: np.mean([fold[name] for fold in folds]) for name in folds[0]})


def test_referring_counts_boxes_that_overlap_by_half(make):
    """A box moved by a quarter of its width has IoU .75 / 1.25 = .6; by nine, 0."""
    task = make(Refer)
    scores, predictions = scored(task, [2, 2, 2, 1])
    assert scores == pytest.approx(
        {"accuracy": 0.5, "oracle": 0.75, "attribute": 0.5, "relation": 0.5})
    assert [p["iou"] for p in predictions[:3]] == pytest.approx([1, 0.6, 0])
    assert task.targets(task.held_out["val"][1])[2] == pytest.approx(0.6)
    assert task.overlaps({"image_id": 99, "box": (0, 0, 5, 5)})[1].tolist() == [0]


def test_examples_are_framed_green_or_red_one_per_image(make, tmp_path, monkeypatch):
    """Image 3, whose first expression is found, and image 4, whose only one is not."""
    task, args = make(Refer), SimpleNamespace(out=tmp_path, data=tmp_path)
    (tmp_path / "images").mkdir()
    for name, colour in (("3", "blue"), ("4", "yellow")):
        Image.new("RGB", (230, 230), colour).save(tmp_path / "images" / f"coco_val_00{name}.png")
    finetune.draw_examples(args, task, scored(task, [2, 2, 2, 1])[1])
    picture = Image.open(tmp_path / "examples.png")
    assert picture.getpixel((7, 7)) == (0, 128, 0) and picture.getpixel((257, 7)) == (255, 0, 0)
    right, wrong = ({colour for _, colour in picture.crop((x, 10, x + 230, 240)).getcolors()}
        for x in (10, 260))  # of the boxes, which are one, magenta is on top
    assert right == {(0, 0, 255), (255, 0, 255)}
    assert wrong == {(255, 255, 0), (255, 255, 255), (255, 0, 255)}
    shown = []
    monkeypatch.setattr(
        finetune, "picture_of", lambda i, _: shown.append(i) or Image.new("RGB", (9, 9)))
    finetune.draw_examples(args, make(Retrieval), [{"found": "4"}] * 2)
    assert shown == ["4"]


@EACH_TASK
def test_the_toy_worlds_items_say_what_is_true_of_their_scenes(kind):
    """Held-out splits share no scene. Expressions name a thing by its shape."""
    numbers, late = set(range(5)), set(range(1_000_000, 1_000_105))
    splits = kind.from_scenes(sorted(numbers), sorted(late))
    training, *held_out = ({int(i["image_id"]) for i in items} for items in splits.values())
    assert training <= numbers and set.union(*held_out) <= late
    assert len(set.union(*held_out)) == sum(map(len, held_out))
    for item in splits["val"]:
        scene = Scene(int(item["image_id"]))
        if kind is VQA:
            assert (item["text"], item["majority"], item["question_type"]) in scene.questions(5)
            assert item["answers"] == [item["majority"]] * 10
        elif kind is Retrieval:
            assert item["text"] in scene.captions(2)
        else:
            things = [t for t in scene.things if t.shape in item["text"].split()[:4]]
            assert item["box"] in [thing.box for thing in things]


# --- Published files ------------------------------------------------------------------------------

REFS = [
    {"ref_id": 0, "ann_id": 11, "image_id": 3, "split": "train", "sentences": [
        {"sent_id": 0, "raw": "Red ring", "sent": "red ring"}, {"sent_id": 1, "sent": "a ring"}]},
    {"ref_id": 1, "ann_id": 12, "image_id": 4, "split": "testB", "sentences": [
        {"sent_id": 2, "sent": "caf\xe9"}]}]
BOXES = {"images": [], "annotations": [
    {"id": 11, "image_id": 3, "bbox": [10, 20, 30, 40]}, {"id": 12, "bbox": [0, 0, 5, 5]}]}


def write(folder, files):
    for name, content in files.items():
        (folder / name).write_bytes(
            content if isinstance(content, bytes) else json.dumps(content).encode())


def test_vqas_files_are_read_as_they_are_published(tmp_path):
    for subset, n in (("train2014", 30), ("val2014", 7), ("test2015", 9), ("test-dev2015", 4)):
        asked = [dict(image_id=i % 12, question="what", question_id=1000 * i + n) for i in range(n)]
        write(tmp_path, {f"v2_OpenEnded_mscoco_{subset}_questions.json": {
            "info": {}, "data_subtype": subset, "questions": asked}})
        if "test" not in subset:
            write(tmp_path, {f"v2_mscoco_{subset}_annotations.json": {"info": {}, "annotations": [
                dict(question_id=q["question_id"], answers=[{"answer": "ring"}] * 10,
                    multiple_choice_answer="ring", answer_type="other", question_type="what is")
                for q in asked]}})
    splits = VQA.from_folder(tmp_path)
    assert {k: len(v) for k, v in splits.items()} == {
        "train": 30, "val": 7, "test2015": 9, "test-dev2015": 4}
    assert splits["val"][1] == question(1, 7, "what", ["ring"] * 10, "ring")
    assert splits["test2015"][0]["answers"] == []


def test_karpathys_splits_are_read_as_they_are_published(tmp_path):
    write(tmp_path, {"d.json": {"images": [
        dict(filename=f"{split}.jpg", split=split, sentences=[{"raw": split}])
        for split in ("train", "test", "restval", "val")]}})
    found = Retrieval.from_folder(tmp_path).items()
    assert [(split, [item["text"] for item in items]) for split, items in found] == [
        ("train", ["train", "restval"]), ("val", ["val"]), ("test", ["test"])]


@pytest.mark.parametrize("dump", [pickle.dumps,  # and Python 2's, with strings S'...', not V...
    lambda refs: re.sub(rb"V(.*)\n", rb"S'\1'\n", pickle.dumps(refs, protocol=0))])
def test_refcoco_files_are_read_as_they_are_published(tmp_path, dump):
    refs = dump([*REFS, {**REFS[0], "split": "testA", "ref_id": 2}])
    write(tmp_path, {"refs(unc).p": refs, "instances.json": BOXES})
    splits = Refer.from_folder(tmp_path)
    assert {k: len(v) for k, v in splits.items()} == {"train": 2, "testB": 1, "testA": 2, "test": 3}
    assert splits["train"][0] == dict(
        image_id=3, text="red ring", box=[10, 20, 40, 60], ref_id=0, sent_id=0)
    assert splits["testB"][0]["text"] == "caf\xe9"
    assert splits["test"] == splits["testA"] + splits["testB"]


@pytest.mark.parametrize("kind, files, message", [
    (VQA, {"q.json": {"data_subtype": "a", "questions": [dict(image_id=1, question=5)]}},
        "q.json: not questions or annotations .*near .*0: TypeError"),
    (VQA, {"a.json": {"annotations": [{"answers": []}]}},
        "a.json: not questions or annotations .*near .*0: KeyError 'multiple_choice_answer'"),
    (Refer, {"instances.json": {"annotations": [{"id": 1, "bbox": "abcd"}]}},
        "instances.json: not RefCOCO's instances .near .*0: "),
    (Refer, {"instances.json": BOXES, "refs(unc).p": pickle.dumps([Path()])},
        r"refs\(unc\).p: not a pickle of .*plain .*asks for pathlib"),  # a class could do anything
    (Refer, {"instances.json": BOXES, "refs(unc).p": pickle.dumps([{**REFS[1], "ann_id": 99}])},
        r"refs\(unc\).p: not a .*near .*0: KeyError 99")])
def test_files_that_are_not_as_published_are_refused(tmp_path, kind, files, message):
    write(tmp_path, files)
    with pytest.raises(BadInput, match=message):
        kind.from_folder(tmp_path)


# --- What the tasks share -------------------------------------------------------------------------


@EACH_TASK
def test_training_starts_pretrained_and_its_loss_is_cross_entropy(make, kind, pretrained):
    """Added up over answers, real regions, or four candidates of which the first is right."""
    task, (config, weights) = make(kind), pretrained
    model, batch = task.build_model(config, weights), task.collate([task[0, i] for i in range(10)])
    start, targets = model.eval().state_dict(), batch["targets"]
    assert all(start[k].equal(w) for k, w in weights.items() if k.startswith("bert."))
    inputs = {k: v for k, v in batch.items() if k != "targets"}
    logits, (loss, _) = model(**inputs, temperature=0.5)[0], task.sums(model, batch, 0.5)
    if kind is Retrieval:
        expected = -logits.view(10, 4).softmax(dim=1)[:, 0].log().sum()
    else:
        real = batch["region_mask"].bool() if kind is Refer else targets >= 0
        assert (targets.max(dim=1).values == 1).all() and (targets[~real] == 0).all()
        expected = F.binary_cross_entropy(logits[real].sigmoid(), targets[real], reduction="sum")
        assert task.loss(logits, targets.masked_fill(~real, 9)).equal(loss[0])
        assert task.loss(logits * torch.nan, targets).isnan()  # so that fit sees it diverge
    torch.testing.assert_close(loss, expected[None])
    assert task.counts(batch).tolist() == [10]
    loss.sum().backward()
    for name, parameter in model.named_parameters():  # several processes wait for each of them
        assert (parameter.grad is not None) == parameter.requires_grad, name


@pytest.mark.parametrize("kind", [VQA, Refer])
def test_three_processes_in_turn_predict_what_one_does(make, kind, pretrained, monkeypatch):
    task, parts = make(kind), []
    model, items = task.build_model(*pretrained), task.items
    whole, hard = task.predict(model, items, batch_size=2)
    assert hard != task.predict(model, items, tau=0.2)[1]
    monkeypatch.setattr(train, "WORLD_SIZE", 3)
    for number in range(3):
        monkeypatch.setattr(train, "RANK", number)
        parts.append(task.predict(model, items, batch_size=2)[0])
    assert sum(parts).equal(whole) and all(p.count_nonzero() < len(items) for p in parts)


def test_images_without_features_leave_training_and_ranking_but_not_the_answers(make, capsys):
    """Image 99: a question about it is answered from its text; a pair with it has no score."""
    vqa = make(VQA, train=[*splits_of(VQA, None)["train"], question(99, 1), question(3, 9)])
    assert (len(vqa), len(vqa.held_out["val"]), vqa.missing) == (41, 3, {"train": 1, "val": 1})
    assert re.search("1 of 42 .*features.*1 of 3 ", capsys.readouterr().out, flags=re.S)
    pairs = [dict(image_id=i, text="a") for i in (99, 1, 2)]
    ranked = make(Retrieval, val=pairs, dev=pairs[:1])
    assert ranked.held_out["val"] == pairs[1:] and "dev" not in ranked.held_out


# --- Runs -----------------------------------------------------------------------------------------


@pytest.fixture
def run(pretrained, store, tokenizer, tmp_path, monkeypatch):
    """run(task, *flags, **splits): a whole run of 4 to 6 steps on the made-up store, from the
    checkpoint of a store with other class heads and more regions; other.pt has larger features.
    """
    config, weights = pretrained
    meta = {**store.meta, "num_region_classes": 9, "num_regions": 100}
    for name, changed in (("pretrained.pt", {}), ("other.pt", {"feature_size": 2048})):
        torch.save({"format": train.CHECKPOINT_FORMAT, "task": "pretraining", "model": weights,
            "config": asdict(config), "vocab": tokenizer.pieces, "store": meta | changed},
            tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(finetune, "picture_of", lambda *_: Image.new("RGB", (90, 60)))

    def start(task, *flags, **splits):
        monkeypatch.setattr(
            finetune, "load_task", lambda kind, _: (store, {**splits_of(kind, store), **splits}))
        epochs = {"vqa": 1, "retrieval": 2, "refer": 6}[task]
        standard = ["--checkpoint", "pretrained.pt", "--out", task, "--batch", 10,
            "--epochs", epochs, "--eval-every", 3, "--threads", 1]
        return finetune.finetune(*finetune.parse_args([task, *map(str, (*standard, *flags))]))

    return start


def read(path):
    return json.loads(path.read_text())


@pytest.mark.parametrize("task, steps, items", [
    ("vqa", 4, 3), ("retrieval", 6, 11), ("refer", 6, 4)])
def test_a_run_leaves_its_record_and_resumed_gives_the_same(
        run, task, steps, items, tmp_path, capsys, monkeypatch):
    predict, taus = finetune.Task.predict, set()
    monkeypatch.setattr(finetune.Task, "predict", lambda self, model, items, tau=None: (
        taus.add(tau) or predict(self, model, items, tau)))
    results, out, said = run(task), tmp_path / task, capsys.readouterr().out
    record, found = read(out / "result.json"), results["val"]
    assert (record["command"], record["batch"], record["results"]) == (task, 10, {"val": found})
    assert record.get("boxes") == ("detected" if task == "refer" else None)
    assert record["without_features"] == {"train": 0, "val": int(task == "vqa")}
    assert [*found] == ["hard", "soft"]
    assert found["hard"].keys() == found["soft"].keys() and taus == {None, 0.2}
    assert re.search(r"val +hard +soft\n  [\w @]+( +[01]\.\d{3}){2}\n", said)
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    scores = {line["step"]: line["scores"] for line in lines if "scores" in line}
    assert [*scores] == [0, 3, steps] and scores[steps] == found["hard"]
    assert len(read(out / "predictions.json")["val"]) == items
    assert Image.open(out / "examples.png").width >= 250
    # A resumed run has the answers of its checkpoint, whatever the training questions are now.
    other = {"train": [question(1, k) for k in range(40)]} if task == "vqa" else {}
    assert run(task, "--resume", **other) == results and not (tmp_path / f"{task}-1").exists()
    labels = train.load_checkpoint(out / "checkpoint.pt", task)["labels"]
    assert labels == (["star", "2", "blue"] if task == "vqa" else None)
    assert all((out / name).exists() for name in ("config.json", "switches.png", "switches.gif"))


def test_a_test_set_without_answers_gets_a_complete_submission(make, run, tmp_path, capsys):
    """And another split is evaluated while training, though this one comes first."""
    asked, task = [{**question(image_id, 7), "answers": []} for image_id in (1, 2, 99)], make(VQA)
    task.held_out = {"test2015": asked, **task.held_out}
    task.evaluate_items = lambda model, items: (items, "switches", "predictions")
    assert task.evaluate(None) == (task.held_out.pop("val"), "switches")
    assert task.evaluate(None)[0] == task.items
    run("vqa", test2015=asked)
    submission = read(tmp_path / "vqa" / "submission-test2015.json")
    assert [s.pop("question_id") for s in submission] == [1007, 2007, 99007]
    assert all(s.keys() == {"answer"} and s["answer"] in task.labels for s in submission)
    assert "no answers to compare with; the model's are in subm" in capsys.readouterr().out


def test_no_step_is_zero_shot_or_from_scratch_also_with_fewer_examples_than_a_batch(
        run, make, pretrained, tmp_path):
    task, out = make(Retrieval), tmp_path / "retrieval"
    zero_shot = SwitchBertForRetrieval.from_pretraining(*pretrained)
    expected = task.evaluate_items(zero_shot, task.held_out["val"])[2]
    for flags in ([], ["--scratch"]):
        run("retrieval", "--epochs", 0, "--limit", 9, *flags)
        assert (read(out / "predictions.json")["val"] == expected) == (not flags)
        assert read(out / "config.json")["examples"] == 9


@pytest.mark.parametrize("task, flags, splits, message", [
    ("vqa", "", dict(train=[]), "no training questions .*expected features/ and VQA v2's"),
    ("vqa", "", dict(train=[question(99, k) for k in range(20)]), "no training .* whose image is"),
    ("vqa", "", dict(train=[question(k, k) for k in range(8)]), "no answer of nine"),
    ("retrieval", "", dict(train=[dict(image_id=i, text="a") for i in (1, 2, 99)]), "fewer than t"),
    ("vqa", "--checkpoint refer/checkpoint.pt", {}, "checkpoint.pt: .*a checkpoint of refer"),
    ("vqa", "--checkpoint other.pt", {}, "feature_size is 12, .* trained with 2048"),
    ("refer", "--resume --scratch", {}, "--scratch True: the run that is resumed has False"),
    ("refer", "--resume --boxes gt", {}, "--boxes gt: the run that is resumed has detected")])
def test_what_nothing_is_learned_from_and_what_does_not_fit_is_refused(
        run, task, flags, splits, message):
    run("refer", "--epochs", 1)
    with pytest.raises(BadInput, match=message):
        run(task, "--epochs", 1, *flags.split(), **splits)


@pytest.mark.parametrize("argv", [
    "", "vqa --boxes gt", "refer --boxes true", "ask a.png", "--seed 1 vqa"])
def test_command_lines_that_are_not_understood_are_refused(argv):
    with pytest.raises(SystemExit, match="2"):
        finetune.parse_args(argv.split())


def test_true_boxes_are_in_a_store_of_their_own_and_the_toy_world_has_none(monkeypatch):
    monkeypatch.setattr(finetune, "FeatureStore", Path)
    monkeypatch.setattr(Refer, "from_folder", str)
    for boxes in ("detected", "gt"):
        args, _ = finetune.parse_args(["refer", "--data", "d", "--boxes", boxes])
        assert finetune.load_task(Refer, args) == (Path("d", f"features-{boxes}"), "d")
    with pytest.raises(BadInput, match="--boxes gt: the toy world"):
        finetune.load_task(Refer, finetune.parse_args(["refer", "--boxes", "gt"])[0])


def test_ask_answers_about_pictures_as_the_run_was_trained(run, tmp_path, monkeypatch, capsys):
    pictures, drawn = [str(tmp_path / f"{name}.png") for name in "ab"], tmp_path / "drawn.png"
    for path, brightness in zip(pictures, (128, 0)):
        Image.new("L", (90, 60), brightness).save(path)
    boxes = np.array([[0, 0, 50, 50], [10, 10, 90, 60]], np.float32)

    monkeypatch.setattr(extract_features, "build_detector", lambda *_: None)
    monkeypatch.setattr(extract_features, "picture_regions", lambda model, path, most: (
        Image.open(path).convert("RGB"), boxes, np.full((2, 12), Image.open(path).getpixel((0, 0)),
            np.float32), None))

    def ask(task, *words, detector="made up", scale=1, answer=None):
        """The printed lines; scale: a factor on the task's head; answer: one that it prefers."""
        path = tmp_path / task / "checkpoint.pt"
        saved = torch.load(path, weights_only=True)
        saved["store"]["detector"], saved["config"]["hidden_dropout_prob"] = detector, 0.5
        saved["model"]["classifier.1.weight"] *= scale
        if answer:
            saved["model"]["classifier.4.bias"][saved["labels"].index(answer)] += 4
        torch.save(saved, path)
        capsys.readouterr()
        finetune.main(["ask", str(tmp_path / task), *words, "--out", str(drawn)])
        assert Image.open(drawn).width == 250 * (len(words) - 1)
        return capsys.readouterr().out.splitlines()

    for task in ("vqa", "retrieval", "refer"):
        run(task, "--epochs", 1)
    lines = ask("vqa", "a red ring", *pictures, answer="2")
    assert {lines[0], lines[3]} == {f"{picture}: a red ring" for picture in pictures}
    assert lines[1] == lines[4] == "  answer: 2"
    assert all(re.fullmatch(r"  sure: 0\.\d+", line) for line in (lines[2], lines[5]))
    ranked = ask("retrieval", "a red ring", *pictures, scale=1e4)  # whatever their order
    assert ranked == ask("retrieval", "a red ring", *pictures[::-1]) and ranked[4] == str(drawn)
    assert float(ranked[1].split()[1]) > float(ranked[3].split()[1])
    found = ask("refer", "a ring", pictures[0])[1]
    assert found in ("  box: [0, 0, 50, 50]", "  box: [10, 10, 90, 60]")
    assert (255, 0, 255) in {colour for _, colour in Image.open(drawn).getcolors(10**6)}
    assert "note" in ask("vqa", "a", pictures[0], detector="toy")[0]  # a photo is no scene
    with pytest.raises(BadInput, match="trained with the vg detector; give its weights with --w"):
        ask("vqa", "a", pictures[0], detector="vg")
    with pytest.raises(BadInput, match="vqa or retrieval or refer .it is a checkpoint of pretra"):
        finetune.main(["ask", str(tmp_path / "pretrained.pt"), "a", pictures[0]])
