"""Caption files in their published forms, data folders, and `python data.py check`."""

import json
import zlib

import numpy as np
import pytest
import torch
from test_bert import bert_weights, write_bert

import data
import train
from data import BadInput, FeatureStore, read_captions
from switchbert import SwitchBertConfig, SwitchBertForPretraining

URL = ("http://lh6.ggpht.com/-IvRtNLNcG8o/TpFyrudaT6I/AAAAAAAAM6o/_11MuAAKalQ/"
       "IMG_3422.JPG?imgmax=800")
ID = str(zlib.crc32(URL.encode()) & 0xFFFFFFFF)
COCO = {"info": {}, "licenses": [],
    "images": [{"id": 57870, "file_name": "COCO_train2014_000000057870.jpg", "height": 480}],
    "annotations": [{"image_id": 318556, "id": 48, "caption": "A very clean bathroom"},
                    {"image_id": 57870, "id": 49, "caption": "A restaurant"}]}
FLICKR = {"dataset": "flickr30k", "images": [
    {"sentids": [0, 1], "imgid": 0, "split": "train", "filename": "1000092795.jpg", "sentences": [
        {"tokens": ["two", "guys"], "raw": "Two young guys.", "imgid": 0, "sentid": 0},
        {"tokens": ["two", "men"], "raw": "Two men.", "imgid": 0, "sentid": 1}]},
    {"sentids": [2], "imgid": 1, "split": "test", "filename": "10002456.jpg", "sentences": [
        {"tokens": ["men"], "raw": "Several men.", "imgid": 1, "sentid": 2}]}]}
KARPATHY_COCO = {"dataset": "coco", "images": [
    {"filepath": "val2014", "filename": f"COCO_val2014_{i:012d}.jpg", "cocoid": i, "imgid": i,
     "sentids": [i], "split": split, "sentences": [{"tokens": [], "raw": f"{split} {i}"}]}
    for i, split in ((391895, "test"), (60623, "restval"), (9, "train"), (483108, "val"))]}


def write(path, content):
    text = content if isinstance(content, (str, bytes)) else json.dumps(content)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize("content, split, expected", [
    (f"a very typical bus station\t{URL}\n", None, [(ID, "a very typical bus station")]),
    (f"{URL}\ta very typical bus station\n", None, [(ID, "a very typical bus station")]),  # CC12M
    ("dog_1\ta dog\r\n000000000042\ttwo\r\n", None, [("dog_1", "a dog"), ("42", "two")]),
    ("\ufeffdog_1\ta dog", "train", [("dog_1", "a dog")]),  # a byte order mark
    ("dog_1\ta dog\n", "val", []),
    (COCO, None, [("318556", "A very clean bathroom"), ("57870", "A restaurant")]),
    (FLICKR, "train", [("1000092795", "Two young guys."), ("1000092795", "Two men.")]),
    (FLICKR, "test", [("10002456", "Several men.")]),
    (KARPATHY_COCO, "train", [("60623", "restval 60623"), ("9", "train 9")]),
    (KARPATHY_COCO, "val", [("483108", "val 483108")])])
def test_every_published_form_is_recognised_by_its_content(tmp_path, content, split, expected):
    assert read_captions(write(tmp_path / "any.name", content), split) == expected


@pytest.mark.parametrize("content, message", [
    ("just a sentence\n", "line 1: expected a JSON file or two columns"),
    ("a\tb\nc\td\te\n", r"line 2: expected 2 columns \(image id, caption\), found 3"),
    (f"a bus\t{URL}\nno link\n", r"line 2: expected 2 columns \(Conceptual C.*found 1"),
    (b"a\tb\nc\t\xff\xfe\n", "line 2: this is not UTF-8"),
    ('{"annotations": [', "not a whole JSON file .*line 1"),
    ({"questions": [], "info": {}}, "expected the key 'annotations'.* found 'questions', 'info'"),
    ({"annotations": [{"image_id": 1, "caption": "a"}, {"id": 3}]}, "annotation 1: .*image_id"),
    ({"images": [{"split": "train", "filename": "1.jpg"}]}, "image 0: .*'sentences'")])
def test_the_first_problem_is_located(tmp_path, content, message):
    with pytest.raises(BadInput, match=f"c.tsv: {message}"):
        read_captions(write(tmp_path / "c.tsv", content))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(BadInput, match="no.json: cannot be opened"):
        read_captions(tmp_path / "no.json")


# --- stores that a run could not use ---


def one_picture(**change):
    """What a store keeps of a picture of 100 x 80, with one value of its second region changed."""
    values = dict(features=np.ones((2, 3)), boxes=np.array([[0, 0, 9, 9], [5, 5, 100, 80.0]]),
        class_probs=np.full((2, 2), 0.5))
    for name, (column, value) in change.items():
        values[name][1, column] = value
    return dict(values, size=(100, 80))


def poisoned(folder, **change):
    """A store of that picture, of which the value was changed after it was written."""
    writer = FeatureStore.create(folder, ["7"], 2, 3, 2)
    writer.write(0, **one_picture())
    for name, (column, value) in change.items():
        writer.arrays[name][0, 1, column] = value
    return writer.finish()


@pytest.mark.parametrize("change, problem", [
    (dict(features=(2, np.nan)), "features with NaN or infinity"),
    (dict(features=(0, np.inf)), "features with NaN or infinity"),
    (dict(features=(0, 70_000)), "features with NaN or infinity"),  # float16 ends at 65,504
    (dict(class_probs=(1, np.nan)), "class_probs with NaN or infinity"),
    (dict(boxes=(2, 140)), "a box outside the picture of 100 x 80 pixels"),
    (dict(boxes=(3, 90)), "a box outside the picture of 100 x 80 pixels"),
    (dict(boxes=(0, -3)), "a box outside the picture of 100 x 80 pixels"),
    (dict(boxes=(2, 4)), "a box whose x2 < x1 or y2 < y1")])
def test_broken_records_are_not_written_and_are_found_where_they_lie(tmp_path, change, problem):
    writer = FeatureStore.create(tmp_path / "new", ["7"], 2, 3, 2)
    with pytest.raises(BadInput, match=f"image 7: {problem}"):
        writer.write(0, **one_picture(**change))
    assert writer.pending() == [0]
    with np.errstate(over="ignore"), pytest.raises(
            BadInput, match=f"features: image 7: {problem}; extract it again"):
        poisoned(tmp_path / "features", **change).check(0)


def test_a_picture_without_a_size_is_not_written(tmp_path):
    writer = FeatureStore.create(tmp_path / "new", ["7"], 2, 3, 2)
    with pytest.raises(BadInput, match="image 7: a size of 0 x 80 pixels"):
        writer.write(0, **{**one_picture(), "size": (0, 80)})


def test_a_sound_record_is_read(tmp_path):
    store = poisoned(tmp_path / "features")
    store.check(0)
    assert store[0]["boxes"].shape == (2, 4)


# --- python data.py ---


def status(*command):
    with pytest.raises(SystemExit) as end:
        data.main([str(c) for c in command])
    return end.value.code


def test_check_says_what_files_are_and_how_they_fit(tmp_path, store, capsys):
    captions = write(tmp_path / "mine.tsv", "3\ta dog\n4\t\n99\tno features\n3\tagain\n")
    assert status("check", captions, store.folder) == 0
    said = capsys.readouterr().out
    assert "image id, caption: 4 captions (4 train; 1 empty) of 3 images, the first: 'a dog" in said
    assert "10 images (0 failed), up to 5 regions of 12" in said
    assert "num_region_classes: 7\n" in said and "detector: made up\n" in said
    assert "2 of 3 images have features" in said


def test_check_exits_with_1_where_a_run_could_not_use_something(tmp_path, store, capsys):
    strangers = write(tmp_path / "others.tsv", "98\ta\n99\tb\n")
    assert status("check", strangers, store.folder) == 1
    assert "0 of 2 images have features" in capsys.readouterr().out
    assert status("check", write(tmp_path / "bad.tsv", "a\tb\nc\n")) == 1
    assert "PROBLEM" in (said := capsys.readouterr().out) and "bad.tsv: line 2" in said
    poisoned(tmp_path / "features", features=(2, np.nan))
    assert status("check", tmp_path / "features") == 1
    assert "image 7: features with NaN" in capsys.readouterr().out
    assert status("check", write(tmp_path / "vocab.txt", "a\nb\n")) == 1


def test_vocab_writes_a_vocabulary_of_the_captions(tmp_path, capsys):
    captions = write(tmp_path / "c.tsv", "1\ta dog barks\n2\ta dog sleeps\n")
    data.main(["vocab", str(captions), "-o", str(tmp_path / "vocab.txt"), "--size", "100"])
    tokenizer = data.WordPiece(tmp_path / "vocab.txt")
    assert tokenizer.split_word("dog") == ["dog"] and f"{len(tokenizer)} word pieces" in (
        capsys.readouterr().out)


# --- a data folder ---


@pytest.fixture
def folder(tmp_path):
    """data/ with features of 40 images without class distributions, and two caption files."""
    home = tmp_path / "data"
    writer = FeatureStore.create(home / "features", range(40), 3, 12, detector="made up")
    rng = np.random.default_rng(0)
    for row in writer.pending():
        writer.write(row, rng.normal(size=(3, 12)), np.tile([1.0, 1, 9, 9], (3, 1)), (10, 10))
    writer.finish()
    lines = [f"{i}\ta small dog number {i}\n" for i in range(30)]
    write(home / "a.tsv", "".join(lines) + "77\tno features\n")
    cats = [{"image_id": i, "caption": "a cat"} for i in range(20)]
    write(home / "b.json", {"annotations": cats})
    return home


def flags(folder, tmp_path, *more):
    size = ["--model", "small", "--epochs", "1", "--batch", "8", "--eval-every", "3"]
    return train.parse_args(["--data", str(folder), "--out", str(tmp_path / "run"), *size, *more])


def test_a_data_folder_is_trained_on_as_it_lies(folder, tmp_path, capsys):
    scores = train.pretrain(flags(folder, tmp_path))
    said = capsys.readouterr().out
    assert said.startswith(f"training on {folder}\n")
    assert "no class distributions: training without MRC" in said
    assert "1 captions without features" in said and "text_only_mlm_accuracy" not in scores
    assert scores["val_mrc"] == 0
    vocab = (tmp_path / "run" / "vocab.txt").read_text().split()
    assert "dog" in vocab and vocab[:5] == list(data.SPECIALS)


def test_held_out_images_are_in_no_training_pair(folder):
    write(folder / "b.json", {"annotations": [
        {"image_id": i, "caption": "a"} for i in range(3000)]})
    training, held_out = train.split_captions(folder)
    assert not {i for i, _ in training} & {i for i, _ in held_out}
    assert 25 < len(held_out) < 62 and len(training) + len(held_out) == 3031
    write(folder / "b.json", KARPATHY_COCO)
    assert train.split_captions(folder)[1] == [("483108", "val 483108")]


def test_a_data_folder_means_the_base_model_and_the_papers_settings(folder, tmp_path, monkeypatch):
    args = train.parse_args(["--data", str(folder)])
    train.settle(args, train.FULL, None)
    assert (args.model, args.epochs, args.batch, args.lr) == ("base", 10, 256, 1e-4)
    assert train.temperature_rate(args, 12345) == 1e-6
    found = train.load_data(folder, tmp_path)
    config = train.model_config("base", found.store, found.tokenizer, "learned")
    sizes = config.hidden_size, config.num_hidden_layers, config.region_feature_size
    assert sizes == (768, 12, 12)


def test_a_limit_keeps_so_many_pairs(folder, tmp_path):
    assert len(train.load_data(folder, tmp_path, limit=9).captions) == 9


def test_a_run_starts_from_the_bert_of_its_folder(folder, tmp_path, capsys, monkeypatch):
    pieces = [*data.SPECIALS, *(chr(c) for c in range(97, 123)), *(f"##{i}" for i in range(29))]
    write_bert(folder / "bert", bert_weights())
    write(folder / "bert" / "vocab.txt", "".join(p + "\n" for p in pieces))
    with pytest.raises(BadInput, match="config.json: hidden_size is 16, but this model has 128"):
        train.Pretraining(flags(folder, tmp_path))
    tiny = SwitchBertConfig.tiny(num_region_classes=0)
    monkeypatch.setattr(train, "model_config", lambda *_: tiny)
    run = train.Pretraining(flags(folder, tmp_path))
    expected = bert_weights()["bert.encoder.layer.1.intermediate.dense.weight"]
    assert run.model.bert.layers[1].intermediate.weight.equal(expected)
    said = capsys.readouterr().out
    assert "bert.layers.*.mode_gate.linear (4)" in said
    assert "not used of BERT: bert.pooler.dense (2), cls.seq_relationship (1)" in said


def test_without_class_distributions_every_parameter_still_gets_a_gradient(folder, tmp_path):
    """DistributedDataParallel waits for each of them."""
    d = train.load_data(folder, tmp_path)
    model = SwitchBertForPretraining(train.model_config("small", d.store, d.tokenizer, "learned"))
    pairs = data.PretrainingDataset(d.store, d.captions, d.tokenizer)
    model(**data.collate([pairs[i] for i in range(8)]), temperature=1.0).loss.backward()
    unused = {n for n, p in model.named_parameters() if p.grad is None}
    assert not unused
    assert torch.isfinite(torch.stack([p.grad.norm() for p in model.parameters()])).all()
