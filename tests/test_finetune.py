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

parametrize = pytest.mark.parametrize
EACH_TASK = parametrize("kind", [VQA, Retrieval, Refer])


# --- An example by hand: what is an answer worth? ---


def test_an_answer_that_three_of_ten_annotators_gave_is_worth_nine_tenths():
    """Each annotator is left out once. In seven rounds the nine others hold all three matches,
    worth min(1, 3/3) = 1; in three rounds they hold two, worth 2/3: (7 + 3 * 2/3) / 10 = .9.
    """
    answers = ["red"] * 3 + ["pink"] * 7
    assert answer_accuracy("red", answers) == pytest.approx(0.9)
    assert answer_accuracy("pink", answers) == 1
    assert answer_accuracy("blue", answers) == 0


def mean_over_left_out(prediction, answers):
    """The official accuracy as it is defined; all answers are single plain words."""
    scores = []
    for left_out in range(10):
        others = answers[:left_out] + answers[left_out + 1 :]
        scores.append(min(1, others.count(prediction) / 3))
    return np.mean(scores)


@parametrize("matches", range(11))
def test_an_answer_is_worth_the_mean_over_the_left_out_annotators(matches):
    answers = ["net"] * matches + list("abcdefghij")[matches:]
    expected = mean_over_left_out("net", answers)
    assert answer_accuracy("net", answers) == pytest.approx(expected)


@parametrize("prediction, answers, accuracy", [
    ("two", ["2"] * 10, 0),
    ("two", ["2"] * 9 + ["3"], 1),
    ("the net", ["Net"] * 2 + ["nets"] * 8, 0.6),
    ("the net ", ["the net"] * 9 + ["the\tnet\n"], 1),  # stripped, and then all agree
    ("net", ["the net"] * 9 + ["the net\n"], 0),
])
def test_answers_are_normalised_only_where_annotators_disagree(prediction, answers, accuracy):
    assert answer_accuracy(prediction, answers) == pytest.approx(accuracy)


@parametrize("prediction, answers, accuracy", [
    ("net", ["The Net"], 1),
    ("2", ["two", "2"], 1),
    ("net", ["dog", "dog", "dog"], 0),
    ("net", ["net", "dog", "dog"], 1 / 3),
    ("net", ["net", "net", "dog"], 2 / 3),
    ("net", ["net", "net", "net"], 1),
])
def test_of_other_numbers_than_ten_an_answer_is_worth_its_share(prediction, answers, accuracy):
    assert answer_accuracy(prediction, answers) == pytest.approx(accuracy)


@parametrize("answer, normalised", [
    ("None", "0"),
    ("12:30", "12:30"),
    ("an", ""),
    ("", ""),
    ("its", "its"),
    ("twas", "'twas"),
    ("Couldntve", "couldntve"),
    ("couldnt've", "couldn't've"),
    ("somebody'd", "somebodyd"),
    ("a man\n\tand the dog ", "man and dog"),
    ("what?no", "what no"),
    ("red /blue", "red blue"),
    ("mr. t", "mr t"),
    ("a.b", "ab"),
    (".5", ".5"),
    ("5.5.", "5.5"),
    ("1,000 red-blue", "1000 redblue"),  # a comma between digits: every sign vanishes
    ("red -blue-green", "red bluegreen"),  # and by a space
    ("red- blue-green", "red bluegreen"),
    ("." * 40, "." * 8),  # the count of re.UNICODE, 32
])
def test_normalisation_has_every_quirk_of_the_official_one(answer, normalised):
    assert normalise_answer(answer) == normalised


# --- Items ---


def question(image_id, k, text="what ?", answers=("net",) * 10, majority="net",
        question_type="what is"):
    return dict(image_id=image_id, text=text, question_id=1000 * int(image_id) + k,
        answers=list(answers), majority=majority, answer_type="other",
        question_type=question_type)


def vqa_splits():
    training = []
    for k in range(40):
        word = ("star", "blue", "2")[k % 3]
        training.append(question(k % 10, k, "a red ring", [word] * 10, word))
    val = [
        question(3, 1, answers=["blue"] * 3 + ["star"] * 7),
        question(99, 2, answers=["two"] * 9 + ["2"], question_type="how many"),
        question(4, 3, answers=["cat"] * 10),
    ]
    return {"train": training, "val": val}


def caption(image_id, text="a"):
    return dict(image_id=image_id, text=text)


def retrieval_splits():
    pairs = []
    for image in range(10):
        for text in ("a red ring", "a large blue circle", "left of the ring"):
            pairs.append(caption(f"COCO_val2014_{image:012d}.jpg", text))
    return {"train": pairs, "val": pairs[:9] + pairs[15:17]}


def refer_splits(store):
    def expression(image, region, kind="attribute", shift=0):
        """It means a region of the store, 20 pixels wide, but moved to the right."""
        box = store[image]["boxes"][region] + np.array([shift, 0, shift, 0])
        return dict(image_id=image, text="a ring", box=box.tolist(), kind=kind, ref_id=0,
            sent_id=0)

    training = [expression(image, image % (1 + image % 5)) for image in range(10)]
    val = [
        expression(3, 2),
        expression(3, 2, "relation", shift=5),
        expression(3, 2, "relation", shift=99),
        expression(4, 0),
    ]
    return {"train": training, "val": val}


def splits_of(kind, store):
    """Training items on images 0 to 9, and held-out ones; image 99 has no features."""
    if kind is VQA:
        return vqa_splits()
    if kind is Retrieval:
        return retrieval_splits()
    return refer_splits(store)


def with_splits(kind, store, others):
    """The splits of a task, some replaced by others; an empty one is none."""
    splits = splits_of(kind, store) | others
    return {name: items for name, items in splits.items() if items}


@pytest.fixture
def make(store, tokenizer):
    """make(kind, flags, **splits) -> that task, with its own splits or with others."""
    def task(kind, flags="", **splits):
        args, _ = finetune.parse_args([kind.name] + flags.split())
        return kind(store, tokenizer, with_splits(kind, store, splits), args)
    return task


@pytest.fixture
def config(tokenizer):
    return SwitchBertConfig.tiny(vocab_size=len(tokenizer))


@pytest.fixture
def weights(config):
    """Of a pretrained model whose pairs have other scores than their neighbours."""
    weights = SwitchBertForPretraining(config).state_dict()
    weights["itm_classifier.weight"] *= 1e4
    return weights


# --- Scores ---


def score(task, choices):
    """(scores, predictions) of choices for the held-out items."""
    task.predict = lambda *_: (torch.tensor(choices), None)
    scores, _, predictions = task.evaluate_items(None, task.held_out["val"])
    return scores, predictions


def test_the_vocabulary_has_the_answers_of_nine_questions_after_normalisation(capsys):
    """The most frequent first; among equals by the alphabet."""
    frequent = ["The Net"] * 5 + ["net"] * 4 + [""] * 9 + ["1,000"] * 10
    rare = ["dog"] * 8 + [f"once {k}" for k in range(8964)]
    asked = [question(1, k, majority=answer) for k, answer in enumerate(rare + frequent)]
    assert len(asked) == 9000
    assert finetune.answer_vocabulary(asked) == ["1000", "", "net"]
    said = capsys.readouterr().out
    assert "3 answers to choose from; for 0.3% of the training" in said  # 28 of 9,000


def test_of_few_questions_the_vocabulary_has_every_answer(capsys):
    majorities = ["dog"] * 8 + ["rare"] * 2
    asked = [question(1, k, majority=answer) for k, answer in enumerate(majorities)]
    assert finetune.answer_vocabulary(asked) == ["dog", "rare"]
    said = capsys.readouterr().out
    assert "2 answers to choose from; for 100.0% of the training" in said


def test_a_target_of_vqa_is_the_accuracy_that_its_answer_would_get(make):
    vqa = make(VQA)
    for item in vqa.held_out["val"]:
        accuracies = [answer_accuracy(label, item["answers"]) for label in vqa.labels]
        assert vqa.targets(item).tolist() == accuracies


def test_vqa_is_scored_overall_by_type_and_against_the_best_possible(make):
    """Three of ten said blue, ten said two, none said star: .9, 1 and 0. The best labels are
    star for the first, 2 for the second, and none for the third, a cat.
    """
    vqa = make(VQA)
    choices = [vqa.labels.index(answer) for answer in ("blue", "2", "star")]
    scores, predictions = score(vqa, choices)
    assert scores == pytest.approx({
        "accuracy": (0.9 + 1 + 0) / 3,
        "other": (0.9 + 1 + 0) / 3,
        "what is": 0.45,
        "how many": 1,
        "ceiling": 2 / 3,
    })
    assert predictions[1] == {"question_id": 99002, "answer": "2"}


def nearest_by_mean(store):
    """For each image, the other one with the most similar mean feature, by cosine."""
    nearest = []
    means = [store[row]["features"].mean(axis=0, dtype=np.float32) for row in range(10)]
    means = [mean / np.linalg.norm(mean) for mean in means]
    for own in range(10):
        similarity = [mean @ means[own] for mean in means]
        similarity[own] = -1
        nearest.append(int(np.argmax(similarity)))
    return nearest


def test_four_candidates_right_wrong_text_other_image_and_nearest_image(make, store):
    """Each text begins with the number of its image."""
    items = []
    for image in range(10):
        items += [caption(str(image), f"{image} {word}") for word in "abc"]
    retrieval = make(Retrieval, train=items)
    nearest = nearest_by_mean(store)
    for index, item in enumerate(items):
        own = item["image_id"]
        for epoch in range(20):
            candidates = [example["item"] for example in retrieval[epoch, index]]
            assert candidates == [example["item"] for example in retrieval[epoch, index]]
            right, wrong_text, other_image, nearest_image = candidates
            assert right == item
            assert wrong_text["image_id"] == own
            assert wrong_text["text"].split()[0] != own
            assert other_image["text"] == item["text"]
            assert other_image["image_id"] != own
            assert nearest_image == caption(str(nearest[int(own)]), item["text"])


def test_all_other_images_become_candidates_in_time(make):
    retrieval = make(Retrieval, train=[caption(str(image)) for image in range(10)])
    drawn = set()
    for own in range(10):
        for epoch in range(60):
            other_image = retrieval[epoch, own][2]["item"]
            drawn.add((own, int(other_image["image_id"])))
    assert len(drawn) == 10 * 9
    assert all(own != other for own, other in drawn)


def test_a_picture_that_stands_twice_is_not_its_own_hard_negative(tokenizer, tmp_path):
    """Images 0 and 1 are one picture; 2 is more like it than 3 is."""
    features = [[1, 0, 0], [1, 0, 0], [2, 1, 0], [0, 0, 1]]
    writer = FeatureStore.create(tmp_path, range(4), 1, 3)
    for row, feature in enumerate(features):
        writer.write(row, np.float32([feature]), np.float32([[1, 1, 5, 5]]), (9, 9))
    splits = {"train": [caption(image) for image in range(4)]}
    args, _ = finetune.parse_args(["retrieval"])
    retrieval = Retrieval(writer.finish(), tokenizer, splits, args)
    assert retrieval.nearest[:3] == [2, 2, 0]


def test_where_all_pictures_are_alike_none_is_its_own_hard_negative(tokenizer, tmp_path):
    writer = FeatureStore.create(tmp_path, range(3), 1, 3)
    for row in range(3):
        writer.write(row, np.ones((1, 3)), np.float32([[1, 1, 5, 5]]), (9, 9))
    args, _ = finetune.parse_args(["retrieval"])
    splits = {"train": [caption(image) for image in range(3)]}
    nearest = Retrieval(writer.finish(), tokenizer, splits, args).nearest
    assert all(other != image for image, other in enumerate(nearest))


def test_a_picture_is_not_its_own_hard_negative_where_products_are_rounded(make, monkeypatch):
    """With TF32, its similarity to itself may be rounded to less than 1: here it is .81."""
    monkeypatch.setattr(F, "normalize", lambda means: 0.9 * means / means.norm(dim=1, keepdim=True))
    nearest = make(Retrieval).nearest
    assert len(nearest) == 10
    assert all(other != image for image, other in enumerate(nearest))


def test_retrieval_that_is_only_evaluated_looks_for_no_hard_negatives(make, monkeypatch):
    """It would read the features of all training images."""
    monkeypatch.setattr(Retrieval, "nearest_images", lambda _: pytest.fail("it looked"))
    make(Retrieval, "--epochs 0")


@parametrize("images, said", [
    (1000, []),
    (5000, []),
    (4999, ["4,999 images: 1K recalls need all 5,000 of COCO's"]),
])
def test_missing_1k_recalls_are_said_once(make, monkeypatch, capsys, images, said):
    task = make(Retrieval)
    task.predict = lambda *_: (None, None)
    monkeypatch.setattr(finetune, "match_scores", lambda *_: torch.eye(images))
    items = [caption(image) for image in range(images)]
    for tau in (None, 0.2):
        recalls, _, _ = task.evaluate_items(None, items, tau)
        assert ("1K image R@1" in recalls) == (images == 5000)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "1K" in line] == said


@pytest.fixture
def of_5000(make, monkeypatch):
    """A ranking of 5,001 texts, of which the first and the last belong to the first image."""
    own = torch.arange(5001) % 5000
    scores = torch.randn(5001, 5000)
    scores[range(5001), own] += 3
    asked = []

    def match_scores(model, store, tokenizer, *rest):
        asked.append(rest)
        return scores

    monkeypatch.setattr(finetune, "match_scores", match_scores)
    task = make(Retrieval)
    task.predict = lambda model, items, tau: (None, tau)
    items = [caption(image, f"a {image}") for image in own.tolist()]
    recalls, switches, predictions = task.evaluate_items(None, items, 0.3)
    return SimpleNamespace(own=own, scores=scores, items=items, asked=asked, recalls=recalls,
        switches=switches, predictions=predictions)


def test_recall_is_over_all_texts_and_images(of_5000):
    texts = [item["text"] for item in of_5000.items]
    assert of_5000.asked == [(texts, list(range(5000)), 30, 0.3)]
    assert of_5000.switches == 0.3
    expected = train.recall_at(of_5000.scores, of_5000.own, (1, 5, 10))
    assert of_5000.recalls.items() >= expected.items()
    best = of_5000.scores.argmax(dim=1).tolist()
    assert of_5000.predictions == [{"found": image} for image in best]


def test_of_5000_images_recall_is_also_the_mean_over_five_folds(of_5000):
    folds = []
    for start in range(0, 5000, 1000):
        inside = (of_5000.own >= start) & (of_5000.own < start + 1000)
        scores = of_5000.scores[inside][:, start : start + 1000]
        folds.append(train.recall_at(scores, of_5000.own[inside] - start, (1, 5, 10)))
    for name in folds[0]:
        mean = np.mean([fold[name] for fold in folds])
        assert of_5000.recalls[f"1K {name}"] == pytest.approx(mean)


def test_a_blind_task_sees_no_picture(make, config, weights):
    retrieval = make(Retrieval, "--blind")
    model = retrieval.build_model(config, None, weights)
    recalls, _, _ = retrieval.evaluate_items(model, retrieval.held_out["val"])
    assert recalls["image R@1"] == 0  # all images are alike, and a tie counts against it
    assert not make(VQA, "--blind")[0, 0]["region_features"].any()
    refer = make(Refer, "--blind")
    assert not refer.targets(refer.items[0]).any()


def test_referring_counts_boxes_that_overlap_by_half(make):
    """A box moved by 5 of its 20 pixels has IoU 15 / 25; by 99, 0."""
    refer = make(Refer)
    scores, predictions = score(refer, [2, 2, 2, 1])
    assert scores == {"accuracy": 0.5, "oracle": 0.75, "attribute": 0.5, "relation": 0.5}
    overlaps = [prediction["iou"] for prediction in predictions[:3]]
    assert overlaps == pytest.approx([1, 0.6, 0])
    assert refer.targets(refer.held_out["val"][1])[2] == pytest.approx(0.6)


def test_an_image_without_features_has_one_region_that_overlaps_nothing(make):
    _, iou = make(Refer).overlaps({"image_id": 99, "box": (0, 0, 5, 5)})
    assert iou.tolist() == [0]


def test_the_score_of_a_run_says_of_which_split_it_is(make, capsys):
    assert make(VQA).headline({"accuracy": 0.5}) == "val 0.500"
    without_val = make(VQA, val=[])
    assert without_val.headline({"accuracy": 0.5}) == "train 0.500"
    assert "no held-out questions: scores are of" in capsys.readouterr().out


# --- Examples ---


def test_examples_are_framed_blue_or_orange_one_per_image(make, tmp_path):
    """Of image 3 the first expression is found, of image 4 the only one is not."""
    task = make(Refer)
    _, predictions = score(task, [2, 2, 2, 1])
    args = SimpleNamespace(out=tmp_path, data=tmp_path)
    finetune.draw_examples(args, task, predictions)
    picture = Image.open(tmp_path / "examples.png")
    assert picture.getpixel((5, 7)) == ImageColor.getrgb("royalblue")
    assert picture.getpixel((211, 7)) == ImageColor.getrgb("darkorange")
    assert picture.width == 2 * 206


def test_a_wrong_image_stands_left_of_the_one_that_is_meant(make, tmp_path, monkeypatch):
    """Image 1 is red, all others are blue; the texts of images 0 and 1 are answered by 1."""
    def picture_of(image_id, folder):
        return Image.new("RGB", (90, 90), "red" if image_id == "1" else "blue")

    monkeypatch.setattr(finetune, "picture_of", picture_of)
    task = make(Retrieval, val=[caption("1"), caption("0")])
    args = SimpleNamespace(out=tmp_path, data=tmp_path)
    finetune.draw_examples(args, task, [{"found": "1"}, {"found": "1"}])
    picture = Image.open(tmp_path / "examples.png")
    middle = 105
    right_panel = [picture.getpixel((x, middle)) for x in (60, 103, 150)]
    wrong_panel = [picture.getpixel((206 + x, middle)) for x in (60, 103, 150)]
    red, blue, white = map(ImageColor.getrgb, ("red", "blue", "white"))
    assert right_panel == [red, red, red]
    assert wrong_panel == [red, white, blue]


def test_pictures_are_read_as_extraction_reads_them(tmp_path):
    """Turned upright; other files of that name, and what cannot be opened, are grey."""
    turned = Image.Exif()
    turned[0x0112] = 6
    images = tmp_path / "images"
    images.mkdir()
    (images / "3.json").write_text("{}")
    Image.new("RGB", (90, 60), "red").save(images / "3.png", exif=turned)
    (images / "4.png").write_text("no picture")
    picture = finetune.picture_of("COCO_val2014_000000000003.jpg", tmp_path)
    assert picture.size == (60, 90)
    for image_id in (4, 5):
        assert finetune.picture_of(image_id, tmp_path).getpixel((9, 9)) == (128, 128, 128)


def test_a_drawing_that_fails_does_not_fail_its_run(run, monkeypatch, capsys):
    monkeypatch.setattr(finetune, "panel", lambda *_: 1 / 0)
    results = run("vqa")
    assert results["val"]["hard"]
    assert Path("vqa/result.json").exists()
    said = capsys.readouterr().out
    assert "vqa/examples.png could not be drawn: ZeroDivisionError" in said


# --- Training and prediction ---


@EACH_TASK
def test_no_two_splits_of_the_toy_world_share_a_scene(kind):
    splits = kind.from_scenes(range(5), range(1_000_000, 1_000_105))
    scenes = {}
    for name, items in splits.items():
        scenes[name] = {int(item["image_id"]) for item in items}
    training = scenes.pop("train")
    held_out = set.union(*scenes.values())
    assert max(training) < 5
    assert min(held_out) >= 1_000_000
    assert len(held_out) == sum(map(len, scenes.values()))


@EACH_TASK
def test_the_toy_worlds_items_are_true_of_their_scenes(kind):
    splits = kind.from_scenes(range(5), range(1_000_000, 1_000_105))
    for item in splits["val"]:
        scene = Scene(int(item["image_id"]))
        if kind is VQA:
            answer = item["answers"][9]
            triple = (item["text"], answer, item["question_type"])
            assert triple in scene.questions(5)
        elif kind is Retrieval:
            assert item["text"] in scene.captions(2)
        else:
            words = item["text"].split()[:4]  # before what it is related to
            named = [thing for thing in scene.things if thing.shape in words]
            assert item["box"] in [thing.box for thing in named]


@EACH_TASK
def test_training_starts_from_the_pretrained_encoder(make, kind, config, weights):
    task = make(kind)
    start = task.build_model(config, task.labels, weights).state_dict()
    for name, tensor in weights.items():
        if name.startswith("bert."):
            assert start[name].equal(tensor)


@pytest.fixture
def trained(make, config, weights):
    """trained(kind) -> a task, its model, and a batch of its first ten examples."""
    def of(kind):
        task = make(kind)
        model = task.build_model(config, task.labels, weights).eval()
        batch = task.collate([task[0, index] for index in range(10)])
        return task, model, batch
    return of


@EACH_TASK
def test_the_loss_is_cross_entropy(trained, kind):
    """Added up over answers, real regions, or four candidates of which the first is right."""
    task, model, batch = trained(kind)
    assert task.counts(batch).tolist() == [10]
    loss, _ = task.sums(model, batch, 0.5)
    targets = batch.pop("targets")
    logits, _ = model(**batch, temperature=0.5)
    if kind is Retrieval:
        probabilities = logits.view(10, 4).softmax(dim=1)
        expected = -probabilities[:, 0].log().sum()
    else:
        real = targets >= 0
        if kind is Refer:
            real = batch["region_mask"].bool()
        probabilities = logits[real].sigmoid()
        expected = F.binary_cross_entropy(probabilities, targets[real], reduction="sum")
        assert task.loss(logits * torch.nan, targets).isnan()  # so that fit sees it diverge
    torch.testing.assert_close(loss, expected[None])


@EACH_TASK
def test_the_loss_reaches_every_parameter_that_is_trained(trained, kind):
    """Several processes wait for each of them."""
    task, model, batch = trained(kind)
    loss, _ = task.sums(model, batch, 0.5)
    loss.sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_three_processes_in_turn_predict_what_one_does(trained, monkeypatch):
    task, model, _ = trained(Refer)
    whole, _ = task.predict(model, task.items, batch_size=2)
    monkeypatch.setattr(train, "WORLD_SIZE", 3)
    chosen = []
    for rank in range(3):
        monkeypatch.setattr(train, "RANK", rank)
        own, _ = task.predict(model, task.items, batch_size=2)
        assert own.count_nonzero() < len(task.items)
        chosen.append(own)
    assert sum(chosen).equal(whole)


def test_prediction_has_hard_switches_or_soft_ones_and_leaves_the_model_in_training(trained):
    task, model, _ = trained(Refer)
    _, hard = task.predict(model, task.items)
    _, soft = task.predict(model, task.items, tau=0.2)
    assert hard != soft
    assert model.training


def test_a_loading_process_prepares_predictions_if_there_are_many(trained, monkeypatch):
    started = []

    def load_ahead(items, batches, collate, workers):
        started.append(workers)
        return data.load_ahead(items, batches, collate, workers)

    monkeypatch.setattr(finetune, "load_ahead", load_ahead)
    task, model, _ = trained(Refer)
    whole, _ = task.predict(model, task.items)
    task.workers = 4
    one_by_one, _ = task.predict(model, task.items, batch_size=1)
    assert one_by_one.equal(whole)
    assert started == [0, 1]


def test_training_items_without_features_are_left_out(make):
    vqa = make(VQA, train=[question(image, 0) for image in range(12)])
    assert vqa.missing == {"train": 2, "val": 1}
    assert len(vqa) == 10


def test_questions_without_features_are_answered_but_images_without_them_not_ranked(make):
    assert len(make(VQA).held_out["val"]) == 3
    retrieval = make(Retrieval, val=[caption(image) for image in range(12)])
    assert retrieval.missing == {"train": 0, "val": 2}
    assert len(retrieval.held_out["val"]) == 10


@EACH_TASK
def test_loading_processes_that_are_not_forked_get_the_task_without_its_model(
        make, kind, config, weights):
    """Python 3.14 and macOS start them anew, with a pickled copy of the data set."""
    task = make(kind)
    task.model = task.build_model(config, task.labels, weights)
    copy = pickle.loads(pickle.dumps(task))
    assert copy.model is None
    assert copy.examples.model is None
    assert task.model
    batch = task.collate([task[1, 2]])
    torch.testing.assert_close(copy.collate([copy[1, 2]]), batch)


# --- Published files ---


def annotation(number, word, people=10):
    """What VQA v2's files say of one question."""
    return dict(question_id=number, answers=[{"answer": word}] * people, answer_type="other",
        multiple_choice_answer=word, question_type="what is")


def write_questions(path, subset, numbers, **content):
    questions = [dict(image_id=3, question="what", question_id=number) for number in numbers]
    write_json(path, {"data_subtype": subset, "questions": questions} | content)


def test_vqas_files_are_read_as_they_are_published(tmp_path):
    """A question finds its answers by its number, whichever file comes first."""
    answered = {"annotations": [annotation(3001, "b"), annotation(3000, "a")]}
    write_json(tmp_path / "0b.json", answered)
    write_questions(tmp_path / "0.json", "train2014", [3000])
    write_questions(tmp_path / "1.json", "val2014", [3001])
    write_questions(tmp_path / "2.json", "test-dev2015", [3002])
    assert VQA.from_folder(tmp_path, None) == {
        "train": [question(3, 0, "what", ["a"] * 10, "a")],
        "val": [question(3, 1, "what", ["b"] * 10, "b")],
        "test-dev2015": [dict(image_id=3, text="what", question_id=3002, answers=[])],
    }


def test_questions_of_a_test_set_need_no_annotations_for_a_submission(tmp_path):
    write_questions(tmp_path / "1.json", "Test2015", [3002])
    assert VQA.from_folder(tmp_path, None).keys() == {"test2015"}
    write_questions(tmp_path / "2.json", "val2014", [3003])
    with pytest.raises(BadInput, match="questions: 0 of 2 found in the annotations"):
        VQA.from_folder(tmp_path, None)


@pytest.fixture
def six_files(tmp_path):
    """Two subsets with three answers to each question, three without any, and a strange file."""
    images = [{"id": 3, "file_name": "dog.jpg"}]
    write_questions(tmp_path / "a.json", "train2014", ["007"], images=images)
    write_questions(tmp_path / "b.json", "train2014", [7])
    write_questions(tmp_path / "c.json", "validation", [8])
    for name, number in (("a", "007"), ("b", 7), ("c", 8)):
        answered = {"annotations": [annotation(number, "a", people=3)]}
        write_json(tmp_path / f"{name}-annotations.json", answered)
    write_questions(tmp_path / "d.json", "train2014", [10])
    write_questions(tmp_path / "e.json", "test2015", [9])
    write_questions(tmp_path / "f.json", "test-dev2015", [9])
    write_json(tmp_path / "other.json", {})
    return tmp_path


def test_questions_are_joined_by_their_ids_as_they_are_written(six_files):
    """'007' is not 7, and images may be counted from 1: then a list has their names."""
    read = {}
    for split, items in VQA.from_folder(six_files, None).items():
        read[split] = [(item["question_id"], item["image_id"]) for item in items]
    assert read == {
        "train": [("007", "dog"), (7, 3)],
        "val": [(8, 3)],
        "test2015": [(9, 3)],
        "test-dev2015": [(9, 3)],
    }


def test_what_is_unusual_in_vqas_files_is_said(six_files, capsys):
    write_json(six_files / "complementary_pairs.json", [[7, 8]])  # VQA v2 has such a file
    VQA.from_folder(six_files, None)
    said = capsys.readouterr().out
    assert "questions: 3 of 5 found in the annotations" in said
    for name in ("other.json", "complementary_pairs.json"):
        assert f"{name}: has no questions and no annotations, so it is not read" in said
    assert "3 questions have neither 1 answer nor 10" in said


@parametrize("first, second, message", [
    ((7, "train2014"), (7, "train2015"), "annotations.json: .*question_id 7 comes twice"),
    ((7, "test2015"), ("7", "test-dev2015"), "1.json: .*question_id 7 comes twice"),
    ((7, "train2014"), (7, "train2014"), "question_id 7 comes twice"),
    ((7, "train2014"), (8, "rehearsal"), "a split among train, val, .* found 'rehearsal'"),
])
def test_repeated_ids_and_unknown_splits_are_refused(tmp_path, first, second, message):
    for name, (number, subset) in enumerate([first, second]):
        write_questions(tmp_path / f"{name}.json", subset, [number])
        if not subset.startswith("test"):
            answered = {"annotations": [annotation(number, "a")]}
            write_json(tmp_path / f"{name}-annotations.json", answered)
    with pytest.raises(BadInput, match=message):
        VQA.from_folder(tmp_path, None)


def test_karpathys_splits_are_read_as_they_are_published(tmp_path, store, capsys):
    """A caption without words, of any split, is left out, and said."""
    images = []
    for k, split in enumerate(("train", "test", "restval", "val")):
        sentences = [{"raw": " "}, {"raw": split}]
        images.append(dict(filename=f"{k}.jpg", split=split, sentences=sentences))
    write_json(tmp_path / "dataset_coco.json", {"images": images})
    texts = {}
    for split, items in Retrieval.from_folder(tmp_path, store).items():
        texts[split] = [item["text"] for item in items]
    assert texts == {"train": ["train", "restval"], "val": ["val"], "test": ["test"]}
    assert "left out: 4 captions without words" in capsys.readouterr().out


def test_retrieval_reads_the_captions_that_pretraining_reads(store, tmp_path):
    """Those of a table have no splits: five images are held out."""
    lines = [f"{image}\ta ring {image}\n" for image in range(10)]
    (tmp_path / "a.tsv").write_text("".join(lines))
    splits = Retrieval.from_folder(tmp_path, store)
    assert len(splits["train"]) == len(splits["val"]) == 5
    assert len(splits) == 2
    for item in splits["train"] + splits["val"]:
        assert item["text"] == f"a ring {item['image_id']}"


def reference(name, split, texts):
    """RefCOCO's entry for the box with the number 11, in image 3."""
    sentences = [{"sent_id": 5, "raw": "A", "sent": text} for text in texts]
    return dict(ref_id=name, ann_id=11, image_id=3, split=split, sentences=sentences)


def write_boxes(folder, **content):
    boxes = [{"id": 12, "bbox": [0, 0, 5, 5]}, {"id": 11, "bbox": [10, 20, 30, 40]}]
    write_json(folder / "instances.json", {"annotations": boxes} | content)


def dump_as_python_2(refs):
    """With strings S'...', where Python 3 writes V..."""
    return re.sub(rb"V(.*)\n", rb"S'\1'\n", pickle.dumps(refs, protocol=0))


@parametrize("dump", [pickle.dumps, dump_as_python_2])
def test_refcoco_files_are_read_as_they_are_published(tmp_path, dump):
    names = ("train", "testA", "testB")
    refs = [reference(name, name, ["caf\xe9", "caf\xe9"]) for name in names]
    (tmp_path / "refs(unc).p").write_bytes(dump(refs))
    write_boxes(tmp_path)
    expected = {}
    for name in names:
        item = dict(image_id=3, text="caf\xe9", box=[10, 20, 40, 60], ref_id=name, sent_id=5)
        expected[name] = [item, item]
    expected["test"] = expected["testA"] + expected["testB"]
    assert Refer.from_folder(tmp_path, None) == expected


def test_a_pickle_with_a_class_is_refused(tmp_path):
    """A class could do anything."""
    write_boxes(tmp_path)
    (tmp_path / "refs(unc).p").write_bytes(pickle.dumps([Path()]))
    with pytest.raises(BadInput, match="asks for pathlib"):
        Refer.from_folder(tmp_path, None)


@parametrize("name", ["refs(umd).p", "refs(unc).p"])
def test_refcocog_has_other_splits_and_another_name(tmp_path, name):
    """And images that are counted, where a file was made by hand."""
    splits = ("train", "validation", "test")
    refs = [reference(split, split, ["a"]) for split in splits]
    (tmp_path / name).write_bytes(pickle.dumps(refs))
    write_boxes(tmp_path, images=[{"id": 3, "file_name": "dog.jpg"}])
    read = {}
    for split, items in Refer.from_folder(tmp_path, None).items():
        read[split] = [(item["ref_id"], item["image_id"]) for item in items]
    assert read == {
        "train": [("train", "dog")],
        "val": [("validation", "dog")],
        "test": [("test", "dog")],
    }


def test_two_files_of_expressions_are_refused(tmp_path):
    write_boxes(tmp_path)
    (tmp_path / "refs(umd).p").touch()
    (tmp_path / "refs(google).p").touch()
    with pytest.raises(BadInput, match="expected one file refs.unc..p, .* found 2"):
        Refer.from_folder(tmp_path, None)


@parametrize("kind, content, message", [
    (VQA, {"data_subtype": "", "questions": [dict(image_id=1, question=5, question_id=1)]},
        "entry 0: TypeError"),
    (VQA, {"annotations": [dict(answers=[], question_id=1)]},
        "entry 0: KeyError 'multiple_choice_answer'"),
    (Refer, {"annotations": [{"id": 1, "bbox": "abcd"}]}, "not RefCOCO's instances"),
    (Refer, {"annotations": [{"id": 1, "bbox": [0, 0, 5, 5]}, {"id": 1, "bbox": [0, 0, 5, 6]}]},
        "entry 1: annotation 1 comes twice"),
])
def test_files_that_are_not_as_published_are_refused(tmp_path, kind, content, message):
    write_json(tmp_path / "instances.json", content)
    with pytest.raises(BadInput, match=f"instances.json: .*{message}"):
        kind.from_folder(tmp_path, None)


# --- Runs ---


@pytest.fixture
def checkpoints(config, weights, store, tokenizer, tmp_path, monkeypatch):
    """A folder with nothing but pretrained.pt, and other.pt, whose features are larger."""
    monkeypatch.chdir(tmp_path)
    for path, size in (("pretrained.pt", 12), ("other.pt", 2048)):
        about = store.meta | {"num_regions": 100, "feature_size": size}
        torch.save({
            "format": train.CHECKPOINT_FORMAT,
            "task": "pretraining",
            "model": weights,
            "config": asdict(config),
            "vocab": tokenizer.pieces,
            "labels": None,
            "store": about,
        }, path)


def change_checkpoint(path, **about):
    """Write pretrained.pt under another name, and of another store."""
    saved = torch.load("pretrained.pt")
    torch.save(saved | {"store": saved["store"] | about}, path)


@pytest.fixture
def run(checkpoints, store, monkeypatch):
    """run(task, flags, **splits) -> the results of a run in the folder `task`."""
    monkeypatch.setattr(finetune, "picture_of", lambda *_: Image.new("RGB", (90, 60)))

    def start(task, flags="", **splits):
        def load_task(kind, args):
            return store, with_splits(kind, store, splits)

        monkeypatch.setattr(finetune, "load_task", load_task)
        argv = f"{task} --checkpoint pretrained.pt --out {task} --batch 10 --epochs 2 {flags}"
        args, checkpoint = finetune.parse_args(argv.split())
        return finetune.finetune(args, checkpoint)

    return start


def test_without_held_out_items_the_result_is_of_the_training(run, store):
    results = run("refer", val=[])
    assert results.keys() == {"train"}
    assert results["train"]["hard"]["accuracy"] >= 0
    items = splits_of(Refer, store)["train"]
    assert len(read_json("refer/predictions.json")["train"]) == len(items)


@EACH_TASK
def test_a_run_leaves_its_record(run, kind):
    results = run(kind.name)
    out = Path(kind.name)
    record = read_json(out / "result.json")
    assert record["command"] == kind.name
    assert record["batch"] == 10
    assert record["results"] == results
    scores = results["val"]
    assert scores["hard"].keys() == scores["soft"].keys()
    assert train.read_metrics(out)[-1]["scores"] == scores["hard"]
    assert Image.open(out / "examples.png").width >= 200


@EACH_TASK
def test_a_resumed_run_gives_the_same_and_keeps_its_answers(run, kind, store):
    """It chooses from the answers of its checkpoint, whatever people answer now."""
    results = run(kind.name)
    training = splits_of(kind, store)["train"]
    other = [item | {"majority": "net"} for item in training]
    assert run(kind.name, "--resume", train=other) == results


@EACH_TASK
def test_a_run_is_evaluated_with_hard_switches_and_with_soft_ones(run, kind, monkeypatch):
    predict = finetune.Task.predict
    temperatures = set()

    def counted(self, model, items, tau=None):
        temperatures.add(tau)
        return predict(self, model, items, tau)

    monkeypatch.setattr(finetune.Task, "predict", counted)
    run(kind.name)
    assert temperatures == {None, 0.2}


def test_a_test_set_without_answers_gets_a_complete_submission_also_without_val(run):
    asked = [question(image, 7) | {"answers": []} for image in (1, 2, 99)]
    results = run("vqa", val=[], test2015=asked)
    assert results == {"test2015": {"hard": {}, "soft": {}}}
    submission = read_json("vqa/submission-test2015.json")
    assert [line["question_id"] for line in submission] == [1007, 2007, 99007]
    for line in submission:
        assert line.keys() == {"question_id", "answer"}
        assert line["answer"] in ("star", "blue", "2")


@EACH_TASK
def test_a_finished_run_is_evaluated_on_other_data_without_training(run, kind, store, capsys):
    """Also on data without a training split; a split without any picture is not scored."""
    items = splits_of(kind, store)["train"][:9]
    lost = [item | {"image_id": 99} for item in items]
    expected = run(kind.name, val=items)["val"]
    flags = f"--epochs 0 --checkpoint {kind.name} --out other"
    results = run(kind.name, flags, train=[], val=items, testA=lost)
    assert results == {"val": expected}
    assert f"testA: {kind.unit}: 0 of 9 found" in capsys.readouterr().out
    assert read_json("other/result.json")["without_features"] == {"val": 0, "testA": 9}


@parametrize("kind, truth, chosen", [
    (VQA, "majority", "answer"),
    (Retrieval, "image_id", "found"),
    (Refer, "box", "box"),
])
def test_predictions_stand_beside_their_questions_and_truths(run, store, kind, truth, chosen):
    run(kind.name)
    items = splits_of(kind, store)["val"]
    predictions = read_json(f"{kind.name}/predictions.json")["val"]
    for item, prediction in zip(items, predictions, strict=True):
        assert prediction["text"] == item["text"]
        assert prediction["truth"] == item[truth]
        assert chosen in prediction


@parametrize("flag, zero_shot", [("", True), ("--scratch", False)])
def test_no_step_is_zero_shot_or_from_scratch_also_below_a_batch(
        run, make, config, weights, flag, zero_shot):
    task = make(Retrieval)
    items = task.held_out["val"]
    model = SwitchBertForRetrieval.from_pretraining(config, weights)
    _, _, predictions = task.evaluate_items(model, items)
    run("retrieval", f"--epochs 0 --limit 9 {flag}")
    lines = read_json("retrieval/predictions.json")["val"]
    found = [line["found"] for line in lines]
    expected = [prediction["found"] for prediction in predictions]
    assert (found == expected) == zero_shot
    assert read_json("retrieval/config.json")["examples"] == 9


@parametrize("task, flags, splits, message", [
    ("vqa", "", {"train": [question(99, 1)]}, "no training questions for"),
    ("vqa", "--epochs 0", {"train": []}, "no training questions, so no answers"),
    ("retrieval", "", {"train": [caption(1), caption(2), caption(99)]}, "fewer than three"),
    ("vqa", "--checkpoint refer", {}, "checkpoint of pretraining or vqa, .* .it is one of refer"),
    ("refer", "--checkpoint refer", {}, "refer: a new run would take its place"),
    ("vqa", "--checkpoint other.pt", {}, "feature_size is 12, .* trained with 2048"),
    ("refer", "--resume --boxes gt", {}, "--boxes gt: the run that is resumed has detected"),
])
def test_nothing_to_learn_from_and_what_does_not_fit_is_refused(
        run, task, flags, splits, message):
    run("refer")
    with pytest.raises(BadInput, match=message):
        run(task, flags, **splits)


@parametrize("boxes", ["detected", "gt"])
def test_true_boxes_are_in_a_store_of_their_own(monkeypatch, boxes):
    monkeypatch.setattr(finetune, "FeatureStore", Path)
    monkeypatch.setattr(Refer, "from_folder", lambda folder, store: f"{folder} {store}")
    args, _ = finetune.parse_args(["refer", "--data", "d", "--boxes", boxes])
    store, splits = finetune.load_task(Refer, args)
    assert store == Path(f"d/features-{boxes}")
    assert splits == f"d d/features-{boxes}"


def test_the_toy_world_has_no_true_boxes():
    args, _ = finetune.parse_args(["refer", "--boxes", "gt"])
    with pytest.raises(BadInput, match="--boxes gt: the toy world"):
        finetune.load_task(Refer, args)


# --- Your own pictures ---


@pytest.fixture
def asked(checkpoints, store, monkeypatch, capsys):
    """asked(*flags) -> the lines that `ask` prints. The regions of a picture are those of the
    image in the store that has its name.
    """
    def regions(detector, path, most):
        image = store[store.row(path)]
        return Image.new("RGB", image["size"]), image["boxes"], image["features"], None

    def ask(*flags):
        capsys.readouterr()
        finetune.main(["ask"] + [str(flag) for flag in flags])
        return capsys.readouterr().out.splitlines()

    monkeypatch.setattr(extract_features, "build_detector", lambda *_: None)
    monkeypatch.setattr(extract_features, "picture_regions", regions)
    return ask


@parametrize("kind", [VQA, Refer])
def test_ask_says_of_a_picture_what_the_run_said_and_how_sure_it_is(run, asked, kind, store):
    items = splits_of(kind, store)["train"][:5]
    run(kind.name, val=items)
    predictions = read_json(f"{kind.name}/predictions.json")["val"]
    for item, prediction in zip(items, predictions, strict=True):
        expected = f"  answer: {prediction.get('answer')}"
        if kind is Refer:
            expected = f"  box: {[round(corner) for corner in prediction['box']]}"
        lines = asked(kind.name, item["text"], item["image_id"])
        assert lines[1] == expected
        assert lines[2].startswith("  sure: ")


def test_ask_names_the_picture_first_that_finetuned_retrieval_found(run, asked, store):
    """Whatever the order; and only the order counts, so it says nothing else."""
    items = splits_of(Retrieval, store)["train"][:5]
    run("retrieval", val=items)
    predictions = read_json("retrieval/predictions.json")["val"]
    pictures = sorted({item["image_id"] for item in items})
    for item, prediction in zip(items, predictions, strict=True):
        lines = asked("retrieval", item["text"], *pictures)
        assert lines[0] == f"{prediction['found']}: {item['text']}"
        assert not any("sure: " in line for line in lines)


@EACH_TASK
def test_ask_says_the_same_of_a_picture_and_of_its_row_in_a_store(run, asked, kind, store):
    run(kind.name)
    for item in splits_of(kind, store)["train"][:3]:
        words = [kind.name, item["text"], item["image_id"]]
        assert asked(*words, "--store", store.folder) == asked(*words)


def test_a_pretrained_checkpoint_matches_texts_of_a_file_with_pictures(
        asked, config, weights, store, tokenizer):
    """As zero-shot retrieval does: the log odds of a match, here as a probability."""
    texts = ["a small red star", "left of the ring", "a large blue circle", "a ring"]
    pictures = ["1", "2", "3", "4", "5"]
    Path("Texts.TXT").write_text("\n\n".join(texts) + "\n \n")  # empty lines are no texts
    lines = asked("pretrained.pt", "Texts.TXT", *pictures)[:-1]
    said = {}
    for line, sure in zip(lines[::2], lines[1::2], strict=True):
        said[line] = float(sure.removeprefix("  sure: "))
    assert list(said.values()) == sorted(said.values(), reverse=True)
    assert len(said) == 20

    model = SwitchBertForRetrieval.from_pretraining(config, weights)
    scores = train.match_scores(model, store, tokenizer, texts, pictures)
    for text, row in zip(texts, scores.sigmoid().tolist()):
        for picture, probability in zip(pictures, row):
            assert said[f"{picture}: {text}"] == pytest.approx(probability, rel=6e-3)


def test_ask_reads_as_much_of_a_text_as_training_did(run, asked, monkeypatch):
    read = data.WordPiece.encode
    limits = []

    def noted(self, text, max_tokens):
        limits.append(max_tokens)
        return read(self, text, max_tokens)

    run("retrieval")
    monkeypatch.setattr(data.WordPiece, "encode", noted)
    asked("pretrained.pt", "a ring", "1")
    asked("retrieval", "a ring", "1")
    assert limits == [38, 30]


def test_a_file_of_texts_must_be_utf_8(asked):
    Path("texts.txt").write_bytes("a café".encode("latin-1"))
    with pytest.raises(BadInput, match="texts.txt: not texts in UTF-8"):
        asked("pretrained.pt", "texts.txt", "1")
    Path("texts.txt").write_text("\n")
    with pytest.raises(BadInput, match="texts.txt: not texts in .*found none"):
        asked("pretrained.pt", "texts.txt", "1")


def test_words_that_the_vocabulary_lacks_are_named(asked):
    lines = asked("pretrained.pt", "a Ring, a red table", "3")
    assert lines[0] == "note: ',' is read as [UNK]"
    assert lines[1] == "note: 'table' is read as t ##a ##b ##l ##e"
    assert lines[2] == "3: a Ring, a red table"


def test_a_store_that_does_not_fit_or_lacks_the_image_is_refused(asked, store):
    with pytest.raises(BadInput, match="feature_size is 12, .* trained with 2048"):
        asked("other.pt", "a", "3", "--store", store.folder)
    with pytest.raises(BadInput, match="no features of an image '77'"):
        asked("pretrained.pt", "a", "77", "--store", store.folder)


@parametrize("about, notes", [
    ({"detector": "toy"}, 1),
    ({"detector": "vg"}, 0),
    ({"detector": "toy", "precision": "fp32"}, 0),  # the toy detector's, but of picture files
])
def test_only_a_model_of_scenes_says_that_a_picture_is_none(asked, about, notes):
    change_checkpoint("asked.pt", **about)
    lines = asked("asked.pt", "a", "3")
    assert sum("is no scene" in line for line in lines) == notes


def test_a_model_of_the_vg_detector_answers_only_with_its_weights(checkpoints):
    change_checkpoint("vg.pt", detector="vg")
    with pytest.raises(BadInput, match="detector.pt: not the weights of the vg detector"):
        finetune.main(["ask", "vg.pt", "what ?", "a.png"])


def layer_of(looks):
    """A layer in which words (T, 1 + R) look at vision like this, in the mean of two heads."""
    pieces = len(looks)
    heads = torch.zeros(2, 5, 5)
    # One head reads nothing of the first word, and both read the second one alike.
    heads[0, 1, 2:] = torch.tensor(looks[1])
    heads[1, 0, 2:] = 2 * torch.tensor(looks[0])
    heads[1, 1, 2:] = torch.tensor(looks[1])
    heads[:, pieces:, 2:] = 1.0  # vision's own weights are not drawn
    return SimpleNamespace(attention=SimpleNamespace(weights=heads[None]))


def brightness_of_regions(layers, most=None):
    """Of the left and the right half of a white picture, once for each of two words."""
    model = SimpleNamespace(bert=SimpleNamespace(layers=layers))
    white = Image.new("RGB", (100, 100), "white")
    halves = np.float32([[0, 0, 49, 99], [50, 0, 99, 99]])
    shades = []
    for panel in finetune.word_panels(model, ["a", "b"], white, halves, most):
        left, _, _ = panel.getpixel((50, 100))
        right, _, _ = panel.getpixel((150, 100))
        shades.append([left, right])
    return shades


# Of each word: the shares of the whole picture, of the left and of the right region.
LOOKS = layer_of([[0.1, 0.2, 0.4], [0.0, 0.8, 0.0]])
LOOKS_RIGHT = layer_of([[0.9, 0.0, 0.1], [0.0, 0.0, 0.05]])
BLIND = layer_of([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])


def test_a_region_is_as_bright_as_its_share():
    """From 50 to 255: .8 is the largest share, so .2 is 50 + 205 / 4 = 101, and .4 is 152."""
    assert brightness_of_regions([LOOKS]) == [[101, 152], [255, 50]]
    assert brightness_of_regions([LOOKS_RIGHT]) == [[50, 255], [50, 152]]
    assert brightness_of_regions([BLIND]) == [[50, 50], [50, 50]]


def test_the_last_layer_is_drawn_that_looks_at_vision():
    layers = [LOOKS, LOOKS_RIGHT, BLIND]
    assert brightness_of_regions(layers) == brightness_of_regions([LOOKS_RIGHT])
    assert brightness_of_regions(layers, most=1) == brightness_of_regions([LOOKS])


def test_the_answer_shows_words_and_what_the_switches_chose(asked):
    """The picture, [CLS] a red ring [SEP], and two layers: two rows of panels, one of switches."""
    asked("pretrained.pt", "a red ring", "3", "--layer", 1)
    picture = Image.open("answer.png")
    both = [[1, 0, 0], [1, 0, 0]]
    shares = {"modes": [both, both], "depths": [[[1], [1]], [[1, 0], [1, 0]]]}
    switches = train.switches_picture(shares, "")
    assert picture.width == switches.width
    assert picture.height > 2 * 230 + switches.height
