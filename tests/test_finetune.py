"""What finetune.py promises: the field's metrics to the letter, the real files, three tasks."""

import json
import pickle
from collections import Counter
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import finetune
import train
from data import BadInput, Scene
from finetune import VQA, Refer, Retrieval, normalise_answer
from switchbert import SwitchBertConfig, SwitchBertForPretraining

# --- VQA: the official evaluation -----------------------------------------------------------------


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
def test_normalisation_with_every_quirk(answer, normalised):
    assert normalise_answer(answer) == normalised


@pytest.mark.parametrize("n, accuracy", [*enumerate([0, 0.3, 0.6, 0.9, 1, 1, 1, 1, 1, 1, 1])])
def test_accuracy_is_leave_one_out(n, accuracy):
    """Against the table of the field, and against the official loops."""
    answers = ["net"] * n + [f"other {i}" for i in range(10 - n)]
    loops = []
    for left_out in range(10):
        others = answers[:left_out] + answers[left_out + 1 :]
        loops.append(min(1, sum(a == "net" for a in others) / 3))
    assert finetune.answer_accuracy("net", answers) == pytest.approx(accuracy)
    assert finetune.answer_accuracy("net", answers) == pytest.approx(np.mean(loops))


def test_answers_are_normalised_only_where_annotators_disagree():
    assert finetune.answer_accuracy("two", ["2"] * 10) == 0
    assert finetune.answer_accuracy("two", ["2"] * 9 + ["3"]) == 1
    assert finetune.answer_accuracy("the net", ["Net"] * 2 + ["nets"] * 8) == pytest.approx(0.6)


def question(image_id, k, text="what ?", answers=("net",) * 10, majority=None, kind="what is"):
    majority = Counter(answers).most_common(1)[0][0] if majority is None else majority
    return dict(image_id=image_id, text=text, question_id=1000 * int(image_id) + k,
        answers=list(answers), majority=majority,
        answer_type="other", question_type=kind)


def test_the_vocabulary_has_the_answers_of_nine_questions_after_normalisation():
    asked = [question(1, k, majority=m) for k, m in enumerate(
        ["The Net"] * 5 + ["net"] * 4 + ["1,000"] * 10 + ["dog"] * 8 + [""] * 9)]
    assert finetune.answer_vocabulary(asked) == ["1000", "", "net"]


@pytest.fixture
def vqa(store, tokenizer):
    train_questions = [question(i % 10, i, "a red ring", [a] * 10)
        for i in range(40) for a in (["star", "blue", "2"][i % 3],)]
    val = [question(3, 1, answers=["blue"] * 3 + ["star"] * 7),
        question(99, 2, answers=["two"] * 9 + ["2"], kind="how many"),
        question(4, 3, answers=["cat"] * 10)]
    return VQA(store, tokenizer, {"train": train_questions, "val": val})


def test_targets_are_the_accuracy_that_each_answer_would_get(vqa):
    for item in vqa.splits["val"]:
        targets = dict(vqa.targets(item))
        for index, answer in enumerate(vqa.labels):
            expected = finetune.answer_accuracy(answer, item["answers"])
            assert targets.get(index, 0) == pytest.approx(expected)


def test_vqa_is_judged_overall_by_type_and_against_the_best_possible(vqa):
    choices = torch.tensor([vqa.index[a] for a in ("blue", "2", "star")])
    assert vqa.judge(vqa.splits["val"], choices)[0] == pytest.approx(
        {"accuracy": (0.9 + 1 + 0) / 3, "other": (0.9 + 1 + 0) / 3, "what is": 0.45, "how many": 1,
            "ceiling": 2 / 3})


def test_the_loss_of_vqa_is_the_mean_cross_entropy_times_the_number_of_answers(vqa, tiny_state):
    config, _ = tiny_state
    model = vqa.head(config, None).eval()
    batch = vqa.collate([vqa.example(i) for i in vqa.items[:5]])
    loss = vqa.sums(model, batch, None) / 5
    logits = model(**{k: v for k, v in batch.items() if k != "targets"})[0]
    mean = F.binary_cross_entropy(logits.sigmoid(), batch["targets"])
    torch.testing.assert_close(loss, (mean * 3)[None])


def write(path, content):
    path.write_text(json.dumps(content), encoding="utf-8")


def vqa_files(folder):
    """Questions and annotations as visualqa.org has them, on images 0 to 9 and an unknown one."""
    top = {"info": {}, "task_type": "Open-Ended", "data_type": "mscoco", "license": {}}
    for subset, n, annotated in (("train2014", 30, True), ("val2014", 7, True),
            ("test2015", 9, False), ("test-dev2015", 4, False)):
        asked = [{"image_id": i % 12, "question": "a red ring", "question_id": 1000 * i + n}
            for i in range(n)]
        write(folder / f"v2_OpenEnded_mscoco_{subset}_questions.json",
            {**top, "data_subtype": subset, "questions": asked})
        if annotated:
            marks = [{"question_type": "what is", "multiple_choice_answer": ["net", "ring"][i % 2],
                "answers": [{"answer": ["net", "ring"][i % 2], "answer_confidence": "yes",
                    "answer_id": k + 1} for k in range(10)],
                "image_id": i % 12, "answer_type": "other", "question_id": 1000 * i + n}
                for i in range(n)]
            write(folder / f"v2_mscoco_{subset}_annotations.json",
                {**top, "data_subtype": subset, "annotations": marks})


def test_vqa_files_are_read_as_they_are_published(tmp_path):
    vqa_files(tmp_path)
    splits = VQA.from_folder(tmp_path)
    assert {k: len(v) for k, v in splits.items()} == {
        "train": 30, "val": 7, "test2015": 9, "test-dev2015": 4}
    assert splits["val"][1] == dict(image_id=1, text="a red ring", question_id=1007,
        answers=["ring"] * 10, majority="ring", answer_type="other", question_type="what is")
    assert splits["test2015"][0]["answers"] == []


@pytest.mark.parametrize("content, message", [
    ({"images": []}, "q.json: expected the key 'questions' or 'annotations', found 'images'"),
    ({"questions": [{"image_id": 3}], "data_subtype": "train"}, "q.json: question .*image_id"),
    ([], "q.json: expected a JSON object, found a list")])
def test_other_files_beside_vqa_are_named(tmp_path, content, message):
    write(tmp_path / "q.json", content)
    with pytest.raises(BadInput, match=message):
        VQA.from_folder(tmp_path)


def test_an_annotation_of_vqa_without_its_question_is_named(tmp_path):
    vqa_files(tmp_path)
    path = tmp_path / "v2_mscoco_val2014_annotations.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    del content["annotations"][2]["question_id"]
    write(path, content)
    with pytest.raises(BadInput, match=r"val2014_annotations.json: annotation 2: expected "
            r"question_id \(KeyError"):
        VQA.from_folder(tmp_path)


# --- Retrieval ------------------------------------------------------------------------------------


@pytest.fixture
def retrieval(store, tokenizer):
    words = ["a red ring", "a large blue circle", "left of the ring"]
    pairs = [dict(image_id=f"COCO_val2014_{i:012d}.jpg", text=w) for i in range(10) for w in words]
    task = Retrieval(store, tokenizer, {"train": pairs, "test": pairs[:9] + pairs[15:17]})
    task.prepare()
    return task


def test_the_hard_negative_is_the_nearest_other_image_by_global_feature(retrieval, store):
    means = np.stack([store[store.row(i)]["features"].mean(axis=0) for i in range(10)])
    for i, mean in enumerate(means):
        cosines = [mean @ m / np.linalg.norm(m) if k != i else -np.inf for k, m in enumerate(means)]
        assert retrieval.nearest[i] == np.argmax(cosines)


def test_four_candidates_of_which_the_first_is_right(retrieval):
    for index in range(30):
        four = [e["item"] for e in retrieval[0, index]]
        item, own = retrieval.items[index], str(index // 3)
        assert four[0] == item and four[1]["image_id"] == item["image_id"]
        assert [four[k]["text"] for k in (2, 3)] == [item["text"]] * 2
        assert own not in (four[2]["image_id"], four[3]["image_id"])
        assert four[3]["image_id"] == str(retrieval.nearest[index // 3])
    images = {retrieval[epoch, 0][2]["item"]["image_id"] for epoch in range(60)}
    assert images == {str(i) for i in range(1, 10)}  # any other one
    again = [e["item"] for e in retrieval[3, 7]]
    assert again == [e["item"] for e in retrieval[3, 7]]


def test_recall_over_any_number_of_captions_is_a_ranking_by_hand(retrieval, tiny_state, tmp_path):
    model, items = retrieval.head(*tiny_state), retrieval.splits["test"]
    found, told = retrieval.evaluate(model, items, keep=tmp_path / "scores.npy")
    scores = np.load(tmp_path / "scores.npy")
    assert scores.shape == (11, 4)
    own = [0] * 3 + [1] * 3 + [2] * 3 + [3] * 2
    for k in (1, 5, 10):
        image = [sum(scores[t] >= scores[t, o]) <= k for t, o in enumerate(own)]
        text = []
        for i in range(4):
            best = max(scores[t, i] for t in range(11) if own[t] == i)
            text.append(sum(scores[t, i] >= best for t in range(11) if own[t] != i) < k)
        assert found[f"image R@{k}"] == pytest.approx(np.mean(image))
        assert found[f"text R@{k}"] == pytest.approx(np.mean(text))
    assert told[3]["image_id"] == "1" and told[3]["found"][0] == ["0", "1", "2", "5"][
        scores[3].argmax()]


def test_scores_that_were_kept_are_not_computed_again(retrieval, tiny_state, tmp_path, monkeypatch):
    model, texts = retrieval.head(*tiny_state), ["a red ring", "a star"]
    images, path = [str(i) for i in range(7)], tmp_path / "s.npy"
    whole = retrieval.matrix(model, texts, images, None, path, block=3)
    partly = whole.clone()
    partly[:, 3:6] = float("nan")
    np.save(path, partly.numpy())
    asked, scorer = [], finetune.match_scores
    monkeypatch.setattr(finetune, "match_scores",
        lambda *a, **k: asked.append(a[4]) or scorer(*a, **k))
    again = retrieval.matrix(model, texts, images, None, path, block=3)
    assert asked == [["3", "4", "5"]] and again.equal(whole)


def test_five_folds_are_five_recalls_among_a_thousand(retrieval, monkeypatch):
    """Scores that are right within each fold and wrong across folds."""
    rng = np.random.default_rng(0)
    scores = torch.from_numpy(rng.normal(size=(5000, 5000)).astype(np.float32))
    scores[range(5000), range(5000)] += 3
    items = [dict(image_id=i, text="a") for i in range(5000)]
    monkeypatch.setattr(Retrieval, "matrix", lambda *_: scores)
    found, _ = retrieval.evaluate(None, items)
    folds = [train.recall_at(scores[k : k + 1000, k : k + 1000], torch.arange(1000), (1, 5, 10))
        for k in range(0, 5000, 1000)]
    for name in ("image R@1", "text R@5"):
        assert found[f"1K {name}"] == pytest.approx(np.mean([f[name] for f in folds]))
        assert found[name] < found[f"1K {name}"]


def test_before_finetuning_retrieval_ranks_by_the_pretrained_head(retrieval, tiny_state):
    config, weights = tiny_state
    pretrained = SwitchBertForPretraining(config).eval()
    pretrained.load_state_dict(weights)
    batch = retrieval.collate([retrieval[0, 0]])
    inputs = {k: v for k, v in batch.items() if k != "targets"}
    scores = retrieval.head(config, weights).eval()(**inputs)[0]
    logits = pretrained.itm_logits(pretrained.bert(**inputs).pooled).log_softmax(dim=-1)
    torch.testing.assert_close(scores, logits[:, 1] - logits[:, 0])


# --- Referring expressions ------------------------------------------------------------------------


def test_iou_by_hand():
    boxes = np.array([[0, 0, 2, 2], [1, 1, 3, 3], [2, 0, 4, 2], [0, 0, 4, 4]], np.float32)
    found = finetune.box_iou(boxes, np.array([0, 0, 2, 2], np.float32))
    assert found == pytest.approx([1, 1 / 7, 0, 1 / 4])


REFS = [{"ref_id": 0, "ann_id": 11, "category_id": 18, "image_id": 3, "split": "train",
    "file_name": "COCO_train2014_000000000003_16.jpg", "sent_ids": [0, 1],
    "sentences": [{"sent_id": 0, "raw": "Red ring", "sent": "red ring", "tokens": ["red", "ring"]},
        {"sent_id": 1, "raw": "a ring", "sent": "a ring", "tokens": ["a", "ring"]}]},
    {"ref_id": 1, "ann_id": 12, "category_id": 18, "image_id": 4, "split": "testB",
    "file_name": "x.jpg", "sent_ids": [2],
    "sentences": [{"sent_id": 2, "raw": "Caf\xe9", "sent": "caf\xe9", "tokens": ["caf\xe9"]}]}]


def python2_pickle(value):
    """The bytes that Python 2's cPickle writes at protocol 0: strings as S'...', ints as I..."""
    if isinstance(value, str):
        return b"S" + repr(value.encode("latin1"))[1:].encode() + b"\n"
    if isinstance(value, int):
        return b"I%d\n" % value
    if isinstance(value, list):
        return b"(l" + b"".join(python2_pickle(v) + b"a" for v in value)
    return b"(d" + b"".join(python2_pickle(k) + python2_pickle(v) + b"s" for k, v in value.items())


def refer_files(folder, content=None):
    (folder / "refs(unc).p").write_bytes(content or python2_pickle(REFS) + b".")
    write(folder / "instances.json", {"images": [], "categories": [], "annotations": [
        {"id": 11, "image_id": 3, "category_id": 18, "bbox": [10, 20, 30, 40], "area": 1.0},
        {"id": 12, "image_id": 4, "category_id": 18, "bbox": [0, 0, 5, 5], "area": 25.0}]})


@pytest.mark.parametrize("protocol", ["python 2", 0, 2, 4])
def test_refcoco_files_are_read_as_they_are_published(tmp_path, protocol):
    refer_files(tmp_path,
        None if protocol == "python 2" else pickle.dumps(REFS, protocol=protocol))
    splits = Refer.from_folder(tmp_path)
    assert {k: len(v) for k, v in splits.items()} == {"train": 2, "testB": 1}
    assert splits["train"][0] == dict(image_id=3, text="red ring", box=[10, 20, 40, 60], ref_id=0,
        sent_id=0, kind="expression")
    assert splits["testB"][0]["text"] == "caf\xe9"


def test_a_pickle_that_would_run_something_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "owned"), "w")

    refer_files(tmp_path, pickle.dumps([{"ref_id": Evil()}]))
    with pytest.raises(BadInput, match=r"refs\(unc\).p: not a pickle of plain lists.*io.open"):
        Refer.from_folder(tmp_path)
    assert not (tmp_path / "owned").exists()


def test_an_entry_without_its_annotation_is_named(tmp_path):
    refer_files(tmp_path, pickle.dumps([REFS[0], {**REFS[1], "ann_id": 99}]))
    with pytest.raises(BadInput, match=r"refs\(unc\).p: entry 1: expected ann_id .*99"):
        Refer.from_folder(tmp_path)


@pytest.mark.parametrize("change", [{"id": None}, {"bbox": None}, {"bbox": [1, 2, 3]}])
def test_an_annotation_without_id_or_box_is_named(tmp_path, change):
    refer_files(tmp_path)
    path = tmp_path / "instances.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    entry = {**content["annotations"][1], **change}
    content["annotations"][1] = {k: v for k, v in entry.items() if v is not None}
    write(path, content)
    with pytest.raises(BadInput, match=r"instances.json: annotation 1: expected id and bbox"):
        Refer.from_folder(tmp_path)


def expression(store, image_id, region, kind="attribute", shift=0.0):
    """An expression that means a region of the store, its box moved by a share of its width."""
    box = store[store.row(image_id)]["boxes"][region].astype(float)
    box[[0, 2]] += shift * (box[2] - box[0])
    return dict(image_id=image_id, text="a red ring", box=box.tolist(), ref_id=image_id, sent_id=0,
        kind=kind, alike=2)


@pytest.fixture
def refer(store, tokenizer):
    items = [expression(store, i, i % (1 + i % 5)) for i in range(10)]
    val = [expression(store, 3, 2), expression(store, 3, 2, "relation", shift=0.25),
        expression(store, 3, 2, "relation", shift=9.0), expression(store, 4, 0)]
    return Refer(store, tokenizer, {"train": items, "val": val})


def test_referring_counts_boxes_that_overlap_by_half(refer):
    """A box moved by a quarter of its width has IoU .75 / 1.25 = .6; by nine, 0."""
    found, _ = refer.judge(refer.splits["val"], torch.tensor([2, 2, 2, 1]))
    assert found == pytest.approx({"accuracy": 0.5, "oracle": 0.75, "attribute": 0.5,
        "relation": 0.5, "relation by attributes alone": 0.5})


def test_targets_of_regions_are_overlaps_and_padding_counts_for_nothing(refer, tiny_state):
    model = refer.head(*tiny_state).eval()
    batch = refer.collate([refer.example(i) for i in refer.items])
    assert (batch["targets"].max(dim=1).values == 1).all()
    loss = refer.sums(model, batch, None)
    batch["targets"][batch["region_mask"] == 0] = 1e6
    assert refer.sums(model, batch, None).equal(loss)
    logits = model(**{k: v for k, v in batch.items() if k != "targets"})[0]
    by_hand = sum(F.binary_cross_entropy(logits[i, :n].sigmoid(), batch["targets"][i, :n],
        reduction="sum") for i, n in enumerate(batch["region_mask"].sum(dim=1).tolist()))
    torch.testing.assert_close(loss, by_hand[None])


# --- Runs -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_state(store, tokenizer):
    """(config, weights) of a pretrained model."""
    torch.manual_seed(0)
    config = SwitchBertConfig.tiny(vocab_size=len(tokenizer), hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0)
    return config, SwitchBertForPretraining(config).state_dict()


@pytest.fixture
def pretrained(tiny_state, store, tokenizer, tmp_path):
    path = tmp_path / "pretrained.pt"
    config, weights = tiny_state
    torch.save({"format": train.CHECKPOINT_FORMAT, "task": "pretraining", "config": asdict(config),
        "model": weights, "vocab": tokenizer.pieces,
        "store": {k: store.meta[k] for k in train.STORE_FACTS}}, path)
    return path


@pytest.fixture
def run(pretrained, vqa, retrieval, refer, store, tmp_path, monkeypatch):
    """run(task, *flags): a whole run of 6 steps on the made-up store."""
    tasks = {t.name: t for t in (vqa, retrieval, refer)}
    monkeypatch.setattr(finetune, "load_task", lambda kind, folder, boxes: (
        store, {"train": tasks[kind.name].items, **tasks[kind.name].splits}))
    monkeypatch.setattr(finetune, "Scene", lambda number: Scene(int(number)))

    def start(task, *flags):
        size = ["--batch", "10", "--epochs", str(60 // len(tasks[task].items)), "--eval-every", "3"]
        standard = ["--checkpoint", str(pretrained), "--out", str(tmp_path / task), *size]
        return finetune.finetune(finetune.parse_args([task, *standard, *flags]))

    return start


@pytest.mark.parametrize("task", ["vqa", "retrieval", "refer"])
def test_a_run_leaves_its_record(run, task, tmp_path, capsys):
    results = run(task)
    out = tmp_path / task
    for name in ("checkpoint.pt", "metrics.csv", "config.json", "predictions.json", "result.json"):
        assert (out / name).exists()
    record = json.loads((out / "result.json").read_text())
    assert record["task"] == task and record["results"] == json.loads(json.dumps(results))
    (split, found), = record["results"].items()
    assert set(found["hard"]) == set(found["soft"])
    assert len(json.loads((out / "predictions.json").read_text())[split]) >= 3
    assert Image.open(out / "switches.png").height > 400  # before and after
    assert Image.open(out / "examples.png").width >= 250
    said = capsys.readouterr().out
    assert "hard" in said and "soft" in said
    assert (", detected boxes" in said) == (task == "refer")
    saved = torch.load(out / "checkpoint.pt", weights_only=True)
    assert saved["task"] == task and saved["store"]["detector"] == "made up"
    assert saved["labels"] == (["star", "2", "blue"] if task == "vqa" else None)


@pytest.mark.parametrize("task", ["vqa", "retrieval", "refer"])
def test_steps_lower_the_loss(task, request, tiny_state):
    task = request.getfixturevalue(task)
    model = task.head(*tiny_state).train()
    batch = task.collate([task[0, i] for i in range(10)])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        torch.manual_seed(0)  # the switches' noise is the same in each step
        loss = task.sums(model, batch, 0.5).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_every_parameter_of_a_head_that_is_trained_gets_a_gradient(vqa, retrieval, refer,
        tiny_state):
    """DistributedDataParallel waits for each of them."""
    for task in (vqa, retrieval, refer):
        model = task.head(*tiny_state).train()
        task.sums(model, task.collate([task[0, i] for i in range(4)]), 1.0).sum().backward()
        for name, parameter in model.named_parameters():
            used = parameter.grad is not None
            assert used == parameter.requires_grad, (task.name, name)


@pytest.mark.parametrize("task", ["vqa", "refer"])
def test_evaluation_shared_by_processes_is_the_evaluation_of_one(task, request, tiny_state,
        monkeypatch):
    """Three processes in turn, and what they add up to: bit for bit."""
    task = request.getfixturevalue(task)
    model, items = task.head(*tiny_state), task.items
    whole, switches = task.predict(model, items, batch_size=2)
    monkeypatch.setattr(finetune, "world_size", lambda: 3)
    parts = []
    for number in range(3):
        monkeypatch.setattr(finetune, "rank", lambda number=number: number)
        parts.append(task.predict(model, items, batch_size=2)[0])
    assert sum(parts).equal(whole) and all(p.count_nonzero() < len(items) for p in parts)


def test_ranking_shared_by_processes_is_the_ranking_of_one(retrieval, tiny_state, monkeypatch):
    model, texts = retrieval.head(*tiny_state), [i["text"] for i in retrieval.items[:7]]
    given = (model, texts, ["1", "2", "3", "7"], None, None)
    whole = retrieval.matrix(*given)
    monkeypatch.setattr(train, "world_size", lambda: 3)
    parts = []
    for number in range(3):
        monkeypatch.setattr(train, "rank", lambda number=number: number)
        parts.append(retrieval.matrix(*given))
    assert sum(parts).equal(whole) and all((p == 0).any() for p in parts)


def test_a_test_set_without_answers_gets_a_complete_submission(run, vqa, tmp_path, capsys):
    asked = [{**question(image_id, 7), "answers": []} for image_id in (1, 2, 99)]
    vqa.splits["test2015"] = asked
    run("vqa")
    submission = json.loads((tmp_path / "vqa" / "submission-test2015.json").read_text())
    assert [s["question_id"] for s in submission] == [q["question_id"] for q in asked]
    assert all(s.keys() == {"question_id", "answer"} and s["answer"] in vqa.labels
        for s in submission)
    assert "test2015: no answers to compare with; all 3" in capsys.readouterr().out


def test_a_stopped_run_goes_on_and_is_the_same_run(run, tmp_path, monkeypatch):
    run("refer")
    whole = torch.load(tmp_path / "refer" / "checkpoint.pt", weights_only=True)
    save = train.Run.save

    def save_and_stop(self):
        save(self)
        if self.step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(train.Run, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        run("refer")
    monkeypatch.setattr(train.Run, "save", save)
    run("refer", "--resume")
    again = torch.load(tmp_path / "refer" / "checkpoint.pt", weights_only=True)
    assert all(w.equal(again["model"][name]) for name, w in whole["model"].items())
    assert whole["before"] == again["before"]


def test_no_step_is_zero_shot(run, retrieval, tiny_state):
    found = run("retrieval", "--epochs", "0")["test"]["hard"]
    model = retrieval.head(*tiny_state)
    assert found == retrieval.evaluate(model, retrieval.splits["test"])[0]


def test_scores_of_an_earlier_model_are_not_taken_for_this_ones(run, tmp_path):
    run("retrieval", "--epochs", "0")
    scores = np.load(tmp_path / "retrieval" / "scores-test.npy")
    np.save(tmp_path / "retrieval" / "scores-test.npy", scores * 0)
    run("retrieval", "--epochs", "0")
    assert (np.load(tmp_path / "retrieval" / "scores-test.npy") == scores).all()


def test_from_scratch_is_shown_beside(run, tmp_path, capsys):
    run("refer", "--scratch", "--out", str(tmp_path / "refer-scratch"))
    capsys.readouterr()
    run("refer")
    assert "from scratch" in capsys.readouterr().out


# --- What does not fit ----------------------------------------------------------------------------


def test_a_checkpoint_of_another_task_is_refused(run, tmp_path):
    run("refer")
    with pytest.raises(BadInput, match="a checkpoint of refer, but this needs one of pretraining"):
        run("vqa", "--checkpoint", str(tmp_path / "refer" / "checkpoint.pt"))


def test_a_checkpoint_of_other_regions_is_refused(run, pretrained):
    saved = torch.load(pretrained, weights_only=True)
    for key, value, message in (("feature_size", 2048, "feature_size is 12, .* trained with 2048"),
            ("detector", "vg", "detector is 'made up', .* trained with 'vg'"),
            ("class_names", ["background", "dog"], "class 0 is None, .* with 'background'")):
        torch.save({**saved, "store": {**saved["store"], key: value}}, pretrained)
        with pytest.raises(BadInput, match=message):
            run("vqa")


def test_a_detector_that_has_seen_the_test_pictures_is_named(
        run, refer, pretrained, capsys, monkeypatch):
    saved = torch.load(pretrained, weights_only=True)
    for detector in ("made up", "coco"):
        monkeypatch.setattr(refer.store, "detector", detector)
        monkeypatch.setitem(refer.store.meta, "detector", detector)
        torch.save({**saved, "store": {**saved["store"], "detector": detector}}, pretrained)
        run("refer")
        said = capsys.readouterr().out
        assert ("has seen the pictures that RefCOCO+ tests on" in said) == (detector == "coco")


def test_ask_match_and_point_answer_about_a_picture(run, tmp_path, monkeypatch, capsys):
    extract_features = pytest.importorskip("extract_features")
    for task in ("vqa", "retrieval", "refer"):
        run(task)
    Image.new("L", (90, 60), 128).save(tmp_path / "grey.png")
    monkeypatch.setattr(extract_features, "build_detector", lambda *_: None)
    boxes = np.array([[0, 0, 50, 50], [10, 10, 90, 60]], np.float32)
    monkeypatch.setattr(extract_features, "picture_regions", lambda model, path, most: (
        Image.open(path).convert("RGB"), boxes, np.ones((2, 12), np.float32), None))
    picture = str(tmp_path / "grey.png")
    capsys.readouterr()
    for command, words in (("ask", [picture, "a red ring"]), ("point", [picture, "a red ring"]),
            ("match", ["a red ring", picture, picture])):
        task = finetune.ASKS[command]
        finetune.main([command, *words, "--out", str(tmp_path / f"{command}.png"),
            "--checkpoint", str(tmp_path / task / "checkpoint.pt")])
        assert Image.open(tmp_path / f"{command}.png").width >= 250
    said = capsys.readouterr().out.splitlines()
    answers = [line.split("  ")[1] for line in said[:3]]
    assert sorted(answers) == ["2", "blue", "star"]
    assert said[:3] == sorted(said[:3], reverse=True)
    assert said[4].split("box ")[1] in ("0 0 50 50", "10 10 90 60")
    with pytest.raises(SystemExit, match="a checkpoint of refer, but ask needs one of vqa"):
        finetune.main(["ask", picture, "a", "--checkpoint",
            str(tmp_path / "refer" / "checkpoint.pt")])
    path = tmp_path / "vqa" / "checkpoint.pt"
    saved = torch.load(path, weights_only=True)
    torch.save({**saved, "store": {**saved["store"], "detector": "vg"}}, path)
    with pytest.raises(SystemExit, match="trained with the vg detector; give its weights with --w"):
        finetune.main(["ask", picture, "a", "--checkpoint", str(path)])
