"""What data.py promises, section by section: words, stores, masking, captions, published features,
toys, the machine room; and at the end what is refused.
"""

import argparse
import base64
import errno
import fcntl
import io
import json
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections import Counter, defaultdict
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import ImageColor

import data
from data import (COUNT, MATCH, MISMATCH, NATURAL, RATE, SHARE, SPECIALS, BadInput, FeatureStore,
    PretrainingDataset, Scene, StoreWriter, WordPiece, build_vocab, canonical_id, collate,
    import_features, mask_tokens, normalise_boxes, only_run_in, read_captions, read_json, reading,
    run, split_words, write_whole)

SLOW = pytest.mark.slow


def write(path, content):
    """Write a text, or anything else as JSON; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_bytes(text.encode())  # line ends stay as they are
    return path


# --- an example to check by hand ---


def test_two_captions_and_their_pictures_become_a_batch(tmp_path):
    """Picture "a", 100 x 50 pixels, has one region; picture "b", 10 x 10 pixels, has two."""
    tokenizer = WordPiece(SPECIALS + ["red", "##dish", "star", "ring", "a"])  # ids 5 to 9
    writer = FeatureStore.create(tmp_path, ["a", "b"], num_regions=2, feature_size=1)
    boxes_a = np.array([[0, 0, 50, 25]])
    boxes_b = np.array([[0, 0, 5, 10], [5, 0, 10, 10]])
    writer.write(0, np.array([[7]]), boxes_a, size=(100, 50))
    writer.write(1, np.array([[8], [9]]), boxes_b, size=(10, 10))
    pairs = [("a.jpg", "red star"), ("b.jpg", "A reddish ring")]
    store = writer.finish()
    dataset = PretrainingDataset(store, pairs, tokenizer, mismatch=0.0, masking=False)
    batch = collate([dataset[0], dataset[1]])
    assert batch["input_ids"].tolist() == [[2, 5, 7, 3, 0, 0], [2, 9, 5, 6, 8, 3]]
    assert batch["text_mask"].tolist() == [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]
    assert batch["region_features"].tolist() == [[[7], [0]], [[8], [9]]]
    assert batch["region_mask"].tolist() == [[1, 0], [1, 1]]
    # x1, y1, x2, y2 and the area, as shares of the picture.
    region, padding = batch["region_boxes"][0].tolist()
    assert region == [0, 0, 0.5, 0.5, 0.25]
    assert padding == [0, 0, 0, 0, 0]
    left_half, right_half = batch["region_boxes"][1].tolist()
    assert left_half == [0, 0, 0.5, 1, 0.5]
    assert right_half == [0.5, 0, 1, 1, 0.5]
    assert batch["itm_labels"].tolist() == [MATCH, MATCH]


# --- words ---

WORDS_OF = {  # text: its words
    "naïve Ångström": ["naive", "angstrom"],
    " \n ": [],
    "a\x00b\ufffdc\x07d\u200be": ["abcde"],  # control characters and category Cf vanish
    "one\ttwo\nthree\u00a0four\u3000five": ["one", "two", "three", "four", "five"],
    "我爱cats": ["我", "爱", "cats"],
    "ひらがな": ["ひらかな"],  # kana do not stand alone
    "$5+3=8^2~`|<>": list("$5+3=8^2~`|<>"),  # ASCII symbols count as punctuation
    "\u201cquoted\u201d\u2026": ["\u201c", "quoted", "\u201d", "\u2026"],
    "İ": ["i"]}


@pytest.mark.parametrize("text", WORDS_OF)
def test_words_are_split_as_bert_does(text):
    assert split_words(text) == WORDS_OF[text]


PIECES = SPECIALS + "un ##aff ##able ##a play ##ing ##s ! a affable".split()
PIECES_OF = {  # text: its pieces
    "Unaffable": ["un", "##aff", "##able"],
    "affable": ["affable"],
    "playing plays!": ["play", "##ing", "play", "##s", "!"],
    "playxing": ["[UNK]"],  # one part without a piece: the whole word
    "a" + 49 * "s": ["a"] + 49 * ["##s"],
    "a" + 99 * "s": ["a"] + 99 * ["##s"],
    "a" + 100 * "s": ["[UNK]"]}  # over 100 characters


@pytest.mark.parametrize("text", PIECES_OF)
def test_pieces_are_the_longest_matches_from_the_left(tmp_path, text):
    path = write(tmp_path / "vocab.txt", "".join(piece + "\r\n" for piece in PIECES))
    for tokenizer in (WordPiece(path), WordPiece(PIECES)):
        pieces = [tokenizer.pieces[i] for i in tokenizer.encode(text, 200)]
        assert pieces == ["[CLS]"] + PIECES_OF[text] + ["[SEP]"]


def test_a_text_is_cut_with_both_specials_counted():
    play = PIECES.index("play")
    ids = WordPiece(PIECES).encode("play play play play", 4)
    assert ids == [2, play, play, 3]


@pytest.mark.parametrize("pieces, settings", [
    (PIECES + ["Play"], {}),
    (PIECES, {"do_lower_case": False})])
def test_a_cased_vocabulary_is_refused(tmp_path, pieces, settings):
    path = write(tmp_path / "vocab.txt", "\n".join(pieces + ["<S>", "[unused1]"]))
    write(tmp_path / "tokenizer_config.json", settings)
    with pytest.raises(BadInput, match="vocab.txt: .*it is of a cased BERT"):
        WordPiece(path)


def test_markers_in_capitals_make_no_vocabulary_cased(tmp_path):
    path = write(tmp_path / "vocab.txt", "\n".join(PIECES + ["<S>", "[unused1]"]))
    assert len(WordPiece(path)) == len(PIECES) + 2


def test_a_built_vocabulary_is_specials_characters_and_frequent_words():
    texts = ["bb a dd", "bb a dd", "Dd!", "ca"]
    expected = SPECIALS + list("!abcd") + ["##!", "##a", "##b", "##c", "##d", "dd", "bb"]
    assert build_vocab(texts) == expected
    assert build_vocab(texts, size=16) == expected[:16]


# --- the feature store ---


def make_writer(folder, ids=("a", "b", "c"), num_regions=2, feature_size=3):
    return FeatureStore.create(folder, ids, num_regions, feature_size)


def fill(writer, rows=(0, 1, 2)):
    """Write these rows: two regions each, of features that are all the row's number."""
    for row in rows:
        features = np.full((2, 3), row)
        writer.write(row, features, np.full((2, 4), row), (10, 10))
    return writer


def test_a_store_is_made_with_numpys_integers_and_paths_too(tmp_path):
    about = dict(num_regions=np.int64(2), feature_size=np.int32(3), source=Path("a.tsv"))
    for _ in range(2):  # the second finds the first's store
        writer = FeatureStore.create(tmp_path, ["a"], **about)
    fill(writer, [0])
    assert writer.finish().meta["source"] == "a.tsv"


def test_a_disk_that_has_become_full_is_said(tmp_path, monkeypatch):
    """Else the system would kill the process that writes to a mapped file."""
    writer = make_writer(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Mock(free=0))
    with pytest.raises(OSError, match="the disk is full"):
        fill(writer, [0])
    assert writer.pending() == [0, 1, 2]


ROW_OF = {"9": 2, 9: 2, 10: 1, "zebra": 0, "café": 3, "COCO_val2014_000000000200.jpg": 5,
    "b": -1, "zzz": -1, "a": -1, "": -1}  # "b" has failed; the others are not there


def test_rows_of_many_images_are_the_rows_of_each_and_failed_images_have_none(tmp_path):
    ids = ["zebra", "10", "9", "café", "b", "000000000200.jpg"]
    writer = make_writer(tmp_path, ids)
    fill(writer, [0, 1, 2, 3, 5])
    writer.fail(4, "no\npicture")
    store = writer.finish()
    assert (tmp_path / "failed.txt").read_text() == "b\tno picture\n"
    rows = store.rows(list(ROW_OF))
    assert rows.tolist() == list(ROW_OF.values())
    for image_id, row in ROW_OF.items():
        assert store.row(image_id) == (None if row == -1 else row)


def test_a_store_keeps_the_names_it_was_written_with_and_is_asked_in_any_spelling(tmp_path):
    """Earlier versions kept two-character accents, and suffixes that they did not know."""
    ids = ["xxxxxxxx", "yyyyyyyy", "room#1.jpg", "room#2.jpg"]
    fill(make_writer(tmp_path, ids), range(4)).finish()
    written = np.array(["cafe\u0301".encode(), b"b.jfif", b"room#1", b"room#2"], "S8")
    np.save(tmp_path / "ids.npy", written)
    store = FeatureStore(tmp_path)
    assert store.rows(["caf\u00e9.jpg", "cafe\u0301"]).tolist() == [0, 0]
    assert store.rows(["b", "room#2.png"]).tolist() == [1, 3]
    assert np.array_equal(store.ids, written)


def test_distributions_over_classes_follow_from_the_detectors_last_layer(tmp_path):
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(7, 12))
    bias = rng.normal(size=7)
    features = rng.normal(size=(4, 12)).astype(np.float16)
    logits = torch.tensor(features @ weight.T + bias)
    expected = logits.softmax(dim=1).numpy()
    writer = FeatureStore.create(tmp_path, ["7"], 5, 12, class_head=[weight, bias])
    writer.write(0, features, boxes=np.ones((4, 4)), size=(10, 10))
    probs = writer.finish().class_probs
    assert probs(0) == pytest.approx(expected, abs=1e-3)


def test_what_lies_outside_a_picture_is_cut_off():
    """Of a picture 200 x 100, inside by hand: half of each side, so a quarter of the area."""
    boxes = np.float32([[20, 10, 120, 60], [-5, 0, 300, 100]])
    inside, beyond = normalise_boxes(boxes, (200, 100)).tolist()
    assert inside == pytest.approx([0.1, 0.1, 0.6, 0.6, 0.25])
    assert beyond == [0, 0, 1, 1, 1]


# --- pretraining examples ---

# Caption k has k + 1 words and belongs to image k // 2: its length tells which one it is.
CAPTIONS = [(f"COCO_train2014_{k // 2:012d}", "red " * (k + 1)) for k in range(20)]
EPOCHS = 60


def pairs_of(store, tokenizer, **settings):
    return PretrainingDataset(store, CAPTIONS, tokenizer, **settings)


def same(a, b):
    """Do two examples or batches hold the same arrays?"""
    return all(np.array_equal(a[name], b[name]) for name in a)


def batch_of(pairs):
    return collate([pairs[index] for index in range(len(pairs))])


@pytest.fixture(scope="module")
def draws(store, tokenizer):
    """(index, example) of every pair in every epoch."""
    pairs = pairs_of(store, tokenizer)
    return [(index, pairs[epoch, index]) for epoch, index in np.ndindex(EPOCHS, len(pairs))]


def split_draws(draws):
    """The draws of masked pairs, and of whole ones."""
    masked = [draw for draw in draws if len(draw[1]["itm_positions"]) == 0]
    whole = [draw for draw in draws if draw[1]["itm_positions"].tolist() == [0]]
    assert len(masked) + len(whole) == len(draws)
    return masked, whole


def is_near_a_half(part, draws):
    """Within four standard errors, 4 x .5 / sqrt(n)."""
    return len(part) / len(draws) == pytest.approx(0.5, abs=2 / len(draws) ** 0.5)


def rows_shown(example, store):
    """The rows of the store whose features an example shows."""
    return [row for row in range(len(store))
        if np.array_equal(example["region_features"], store[row]["features"])]


def test_masking_rates_are_15_percent_and_80_10_10_and_specials_are_never_drawn(tokenizer):
    rng = np.random.default_rng(0)
    ids = np.array(tokenizer.encode("a small red star left of the ring " * 9999, 100_000))
    shown, positions = mask_tokens(ids, tokenizer, rng, rate=0.15)
    others = np.delete(np.arange(len(ids)), positions)
    assert np.array_equal(shown[others], ids[others])
    share = len(set(positions)) / len(ids)
    assert share == pytest.approx(0.15, abs=0.005)
    shown = shown[positions]
    ordinary = set(range(5, len(tokenizer)))
    mask = tokenizer.ids["[MASK]"]
    assert set(shown) == ordinary | {mask}
    masked = np.mean(shown == mask)
    assert masked == pytest.approx(0.8, abs=0.01)
    unchanged = np.mean(shown == ids[positions])
    expected = 0.1 + 0.1 / len(ordinary)  # a random piece is the right one now and then
    assert unchanged == pytest.approx(expected, abs=0.01)


def test_half_of_the_pairs_are_whole_and_only_matched(draws, store, tokenizer):
    """Half of them with a wrong picture; the caption stays, whatever picture comes with it."""
    _, whole = split_draws(draws)
    assert is_near_a_half(whole, draws)
    mismatched = [draw for draw in whole if draw[1]["itm_labels"].tolist() == [MISMATCH]]
    assert is_near_a_half(mismatched, whole)
    wrong_rows = set()
    for index, example in whole:
        assert len(example["mlm_positions"]) == 0
        assert len(example["mrc_positions"]) == 0
        assert not example["region_hidden"].any()
        assert example["input_ids"].tolist() == tokenizer.encode(CAPTIONS[index][1], 38)
        rows = rows_shown(example, store)
        match = MATCH if rows == [index // 2] else MISMATCH
        assert example["itm_labels"].tolist() == [match]
        if match == MISMATCH:
            wrong_rows.update(rows)
    assert wrong_rows == set(range(10))  # all of them are shown as wrong pictures


def test_the_other_half_match_and_their_masked_words_and_regions_are_predicted(
        draws, store, tokenizer):
    masked, _ = split_draws(draws)
    for index, example in masked:
        row = index // 2
        assert len(example["itm_labels"]) == 0
        assert rows_shown(example, store) == [row]
        positions = example["mlm_positions"]
        assert 0 < min(positions) <= max(positions) <= index + 1  # no specials
        restored = example["input_ids"].copy()
        restored[positions] = example["mlm_labels"]
        assert restored.tolist() == tokenizer.encode(CAPTIONS[index][1], 38)
        regions = example["mrc_positions"]
        assert regions.tolist() == np.flatnonzero(example["region_hidden"]).tolist()
        assert np.array_equal(example["mrc_targets"], store.class_probs(row)[regions])
    hidden = [example["region_hidden"].mean() for _, example in masked]
    assert min(hidden) > 0
    # Of 1 to 5 regions 15 % are hidden; one, if none was drawn.
    expected = np.mean([0.15 + 0.85**n / n for n in range(1, 6)])
    assert np.mean(hidden) == pytest.approx(expected, abs=0.03)


def test_pairs_may_be_whole(store, tokenizer):
    batch = batch_of(pairs_of(store, tokenizer, masking=False))
    assert len(batch["mlm_labels"]) == 0
    assert not batch["region_hidden"].any()
    assert set(batch["itm_labels"].tolist()) == {MATCH, MISMATCH}


def test_pairs_may_be_without_pictures(store, tokenizer):
    batch = batch_of(pairs_of(store, tokenizer, blind=True))
    assert batch["region_mask"].tolist() == [[0]] * 20
    assert len(batch["itm_labels"]) == 0
    assert len(batch["mlm_labels"]) >= 20
    assert len(batch["mrc_positions"]) == 0


def test_pairs_may_be_without_classes(tokenizer, tmp_path):
    store = fill(make_writer(tmp_path)).finish()
    captions = [("a", "red"), ("b", "star")] * 5
    batch = batch_of(PretrainingDataset(store, captions, tokenizer))
    assert batch["region_hidden"].any()
    assert len(batch["mrc_positions"]) == 0
    assert batch["mrc_targets"] is None


def test_an_example_follows_from_seed_epoch_and_index(store, tokenizer):
    pairs = pairs_of(store, tokenizer)
    other_seed = pairs_of(store, tokenizer, seed=4)
    assert same(pairs[7], pairs[0, 7])
    assert not same(pairs[19], pairs[1, 19])
    assert not same(pairs[19], other_seed[19])


def test_an_example_is_the_same_in_any_process(store, tokenizer):
    pairs = pairs_of(store, tokenizer)
    copy = pickle.loads(pickle.dumps(pairs))
    assert same(copy[7], pairs[7])
    assert len(pickle.dumps(store)) < 2000  # it carries its folder, not its arrays
    loader = torch.utils.data.DataLoader(pairs, 10, num_workers=2, collate_fn=collate)
    first, second = loader
    examples = [pairs[index] for index in range(20)]
    assert same(first, collate(examples[:10]))
    assert same(second, collate(examples[10:]))


@pytest.fixture
def two(store, tokenizer):
    """Two examples: 1 and 8 words, so 3 and 10 pieces; images 0 and 3, so 1 and 4 regions."""
    pairs = pairs_of(store, tokenizer, mismatch=0.0)
    return pairs[0], pairs[7]


def test_a_batch_is_padded_to_its_longest_and_no_further(two, store):
    batch = collate(two)
    assert batch["text_mask"].tolist() == [[1] * 3 + [0] * 7, [1] * 10]
    assert batch["region_mask"].tolist() == [[1, 0, 0, 0], [1, 1, 1, 1]]
    masks = {"input_ids": "text_mask", "region_features": "region_mask",
        "region_boxes": "region_mask", "region_hidden": "region_mask"}
    for name, mask in masks.items():
        real = batch[mask] == 1
        assert batch[name].shape[:2] == real.shape
        assert (batch[name][~real] == 0).all()
        entries = np.concatenate([example[name] for example in two])
        assert np.array_equal(batch[name][real], entries)
    boxes = normalise_boxes(store[3]["boxes"], (100, 80))
    assert np.array_equal(batch["region_boxes"][1], boxes)


def test_positions_count_on_from_pair_to_pair(two):
    """The second pair's pieces begin at 10, its regions at 4."""
    first, second = two
    batch = collate(two)
    for name, start in {"mlm_positions": 10, "mrc_positions": 4}.items():
        expected = np.append(first[name], start + second[name])
        assert batch[name].tolist() == expected.tolist()
    for name in ("mlm_labels", "mrc_targets"):
        expected = np.concatenate([first[name], second[name]])
        assert np.array_equal(batch[name], expected)


def test_captions_without_words_or_features_are_counted_and_left_out(store, tokenizer):
    """One that lacks both is counted once."""
    captions = [("77", "a ring"), ("77", "")] + CAPTIONS + [("3", "  ")]
    pairs = PretrainingDataset(store, captions, tokenizer)
    assert len(pairs) == 20
    assert pairs.skipped == {"without features": 2, "without words": 1}
    assert same(pairs[5], pairs_of(store, tokenizer)[5])
    assert pairs.lengths.tolist() == list(range(20))  # in spaces


# --- captions as they are published ---


def many_pairs(count):
    """Pairs of every kind: names and numbers, spaces, an accent, half a surrogate pair."""
    for i in range(count):
        yield f"d\xf6g_{i}" if i % 2 else i, f" caf\u00e9 \ud800 {'x ' * (i % 50)}"


@pytest.mark.parametrize("count", [0, 1, 7, 100_003])
def test_captions_read_like_the_list_of_pairs_that_they_hold(count):
    captions = data.Captions(many_pairs(count))
    expected = []
    for name, text in many_pairs(count):
        expected.append((str(name), text.strip().replace("\ud800", "?")))
    pickled = pickle.loads(pickle.dumps(captions))
    for copy in (captions, captions[:], pickled):
        assert len(copy) == count
        assert list(copy) == expected
        assert copy.checksum == captions.checksum
    odd = np.arange(count) % 2 == 1
    assert list(captions[odd]) == expected[1::2]
    assert list(captions[np.flatnonzero(odd)]) == expected[1::2]


@pytest.mark.parametrize("first", ["x0 a", "0 a!"])
def test_the_checksum_of_captions_depends_on_ids_texts_and_number(first):
    def checksum(lines):
        return data.Captions(line.split() for line in lines).checksum

    assert checksum(["0 a", "1 b"])[0] == 2
    assert checksum(["0 a", "1 b"]) != checksum([first, "1 b"])


URL = "http://lh6.ggpht.com/-IvRtNLNcG8o/TpFyrudaT6I/IMG_3422.JPG?imgmax=800"
URL_ID = str(zlib.crc32(URL.encode()))
COCO = {
    "images": [{"id": 9, "file_name": "COCO_train2014_000000000009.jpg"}],
    "annotations": [
        {"image_id": 318556, "id": 48, "caption": "A bathroom"},
        {"image_id": 9, "caption": "A bus"}]}
# As annotation tools export it: images are counted from 1, and only a file's name tells the image.
COUNTED = {
    "images": [{"id": 1, "file_name": "a\\000000000003.png"}, {"id": "2"}],
    "annotations": [
        {"image_id": "1", "caption": "first"},
        {"image_id": 1, "caption": "second"},
        {"image_id": 2, "caption": "third"}]}
TWICE = [{"id": 1, "file_name": "a/3.png"}, {"id": 2, "file_name": "b/3.png"}]
LISTED = [
    {"image": "coco/dog_1.jpg", "caption": "a dog"},
    {"image": "2", "caption": ["b", "c"]}]


def karpathy(filename, split, texts, **more):
    """An image of Karpathy's splits with its captions."""
    sentences = [{"raw": text} for text in texts]
    return {"filename": filename, "split": split, "sentences": sentences} | more


FLICKR = {"images": [karpathy("1000092795.jpg", "train", ["Two guys.", "Two men."])]}
KARPATHY = {"images": [
    karpathy("COCO_val2014_000000000000.jpg", "restval", ["zero"], cocoid=0, imgid=0),
    karpathy("COCO_val2014_000000000001.jpg", "train", ["one"], cocoid=1, imgid=0),
    karpathy("COCO_val2014_000000000002.jpg", "val", ["two"], cocoid=2, imgid=0)]}
NAMED = {"images": [karpathy(name, name, [name])
    for name in ("Training", "valid", "validation", "dev", "val2014", "testing")]}

PUBLISHED = [  # (content of a file, split or None for all, pairs)
    (f"a bus\t{URL}\n", None, [(URL_ID, "a bus")]),
    (f"{URL}\ta bus\n", None, [(URL_ID, "a bus")]),  # CC12M
    ("\ufeffdog_1\ta dog\r\n000000000042\ttwo\r\n", "train", [("dog_1", "a dog"), ("42", "two")]),
    ("dog_1\ta dog\n", "val", []),
    ("", None, []),
    ("dog_1 \ta dog\n\n \n", None, [("dog_1", "a dog")]),
    ("[so]\ta dog", None, [("[so]", "a dog")]),
    (COUNTED, None, [("3", "first"), ("3", "second"), ("2", "third")]),
    (LISTED, "train", [("dog_1", "a dog"), ("2", "b"), ("2", "c")]),
    ("\n [ ]", None, []),
    (NAMED, "val", [(name, name) for name in ("valid", "validation", "dev", "val2014")]),
    (COCO, None, [("318556", "A bathroom"), ("9", "A bus")]),
    (FLICKR, "train", [("1000092795", "Two guys."), ("1000092795", "Two men.")]),
    (KARPATHY, "val", [("2", "two")]),
    (KARPATHY, "train", [("0", "zero"), ("1", "one")]),
    (KARPATHY, None, [("0", "zero"), ("1", "one"), ("2", "two")])]


@pytest.mark.parametrize("content, split, expected", PUBLISHED)
def test_every_published_form_is_recognised_by_its_content(tmp_path, content, split, expected):
    path = write(tmp_path / "any.name", content)
    if split is None:
        assert list(read_captions(path)) == expected
    else:
        records = list(data.caption_records(path))
        assert [record[:2] for record in records if record[2] == split] == expected


@pytest.fixture
def folder(tmp_path):
    """A data set's folder: four captions, four pictures, and much that is neither."""
    home = tmp_path / "data"
    write(home / "00/000000012.jpg", "")
    write(home / "00/000000012.txt", " the twelfth\n")
    write(home / "01/b.PNG", "")
    write(home / "01/b.png.txt", "a ring")
    write(home / "2/c.json", "{}")  # of img2dataset
    write(home / "2/c.txt", "a star")
    write(tmp_path / "elsewhere/d.gif", "")
    write(tmp_path / "elsewhere/d.txt", "\ufeffa dog")
    (home / "link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (home / "00/loop").symlink_to(home, target_is_directory=True)
    write(home / "01/e.jpg", "")
    write(home / "01/e.txt", "0 0.5 9.5e-05 0.1 0.2")  # a box in YOLO's form
    write(home / "00000_stats.json", "{}")
    write(home / "features/store.json", "{}")
    write(home / "features/failed.txt", "7: no picture")
    for name in ("README.txt", "labels/b.txt", "failed.txt", "00/._000000012.txt",
            "00/.ipynb_checkpoints/000000012.txt"):
        write(home / name, "not a caption")
    return home


def test_the_captions_of_a_folder_lie_beside_its_pictures(folder, capsys):
    """A picture, or the JSON of img2dataset; in linked folders too. All else is counted."""
    expected = {"12": "the twelfth", "b": "a ring", "c": "a star", "d": "a dog"}
    assert dict(read_captions(folder)) == expected
    words = f"{folder}: 4 of 8 .txt files are captions, beside 4 pictures"
    assert words in capsys.readouterr().out


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
def test_a_folder_that_cannot_be_listed_is_not_lost_in_silence(
        tmp_path, monkeypatch, capsys, number):
    """One without permission is named; a disk that fails ends the search."""
    write(tmp_path / "a.jpg", "")
    write(tmp_path / "sub/b.jpg", "")
    scandir = os.scandir

    def list_folder(folder):
        if str(folder).endswith("sub"):
            raise OSError(number, os.strerror(number), str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", list_folder)
    if number == errno.EIO:
        with pytest.raises(OSError, match="sub"):
            data.files_below(tmp_path, data.PICTURES)
    else:
        assert data.files_below(tmp_path, data.PICTURES) == [tmp_path / "a.jpg"]
        assert "sub': it is left out" in capsys.readouterr().out


def test_the_notes_of_a_tasks_folder_are_no_captions(tmp_path):
    write(tmp_path / "readme.txt", "captions of Flickr30k")
    (tmp_path / "features").mkdir()
    assert list(read_captions(tmp_path)) == []


def test_a_folder_without_pictures_has_captions_alone(tmp_path, capsys):
    write(tmp_path / "x.txt", "a cat")
    write(tmp_path / "info.json", "{}")
    assert list(read_captions(tmp_path)) == [("x", "a cat")]
    assert "1 of 1 .txt files are captions, beside 0 pictures" in capsys.readouterr().out


def test_where_there_are_pictures_a_text_beside_none_is_no_caption(tmp_path):
    write(tmp_path / "a.jpg", "")
    write(tmp_path / "README.txt", "about these pictures")
    assert list(read_captions(tmp_path)) == []


def test_a_caption_that_is_not_utf_8_is_named(folder):
    (folder / "link/d.txt").write_bytes(b"caf\xe9")
    with pytest.raises(BadInput, match="link/d.txt: not a caption in UTF-8"):
        list(read_captions(folder))


# --- published features ---

# As their authors describe them; what '_' stands for is not used here.
COLUMNS = {6: "id w h n boxes features",
    10: "id h w _ _ _ _ n boxes features",
    13: "id h w _ _ _ _ n boxes features probs _ _"}
REGIONS_OF = {9: 1, 10: 2, 11: 0, 12: 3}  # image id: number of regions


def published_arrays(columns):
    """{image id: its arrays}, of F = 16 and C = 9."""
    rng = np.random.default_rng(columns)
    arrays = {}
    for image_id, n in REGIONS_OF.items():
        corners = np.sort(rng.random((n, 2, 2)) * 400, axis=1)  # x1 <= x2, y1 <= y2
        arrays[image_id] = {
            "boxes": corners.reshape(n, 4),
            "features": rng.normal(size=(n, 16)),
            "probs": rng.dirichlet(np.ones(9), size=n)}
    return arrays


def encoded(array):
    return base64.b64encode(array.astype("<f4").tobytes()).decode()


def published_lines(columns):
    """The lines of a file of these arrays; the pictures are 640 x 480."""
    lines = []
    for image_id, arrays in published_arrays(columns).items():
        n = REGIONS_OF[image_id]
        cells = {"id": f"COCO_train2014_{image_id:012d}", "w": 640, "h": 480, "n": n}
        cells["_"] = encoded(np.ones(n))
        for name, array in arrays.items():
            cells[name] = encoded(array)
        line = "\t".join(str(cells[name]) for name in COLUMNS[columns].split())
        lines.append(line + "\n")
    return lines


@pytest.mark.parametrize("columns", [6, 10, 13])
def test_published_features_are_read_as_they_are(tmp_path, columns, capsys):
    lines = published_lines(columns)
    if columns == 10:  # Python 3 wrote bytes as b'...'
        lines = [re.sub(r"\t([^\t\n]{8,})", r"\tb'\1'", line) for line in lines]
    first = write(tmp_path / "a.tsv", lines[0])
    others = write(tmp_path / "b.tsv", "".join(lines[1:]))
    store = import_features([first, others], tmp_path / "store")
    assert "4 lines hold 3 images; 1 lines are left out" in capsys.readouterr().out
    assert len(store) == 3
    assert store.row(11) is None
    assert store.num_region_classes == (9 if columns == 13 else 0)
    arrays = published_arrays(columns)
    for image_id in (9, 10, 12):
        row = store.row(image_id)
        image = store[row]
        expected = arrays[image_id]
        assert image["size"] == (640, 480)
        assert image["boxes"] == pytest.approx(expected["boxes"])
        assert image["features"] == pytest.approx(expected["features"], rel=1e-3)  # float16
        if columns == 13:
            probs = pytest.approx(expected["probs"], rel=1e-3, abs=1e-6)
            assert store.class_probs(row) == probs


def test_lines_without_a_region_may_come_first_and_last(tmp_path):
    """Also of an image that another line has regions of."""
    lines = published_lines(13)
    empty = lines[2]
    empty_9 = empty.replace(f"{11:012d}", f"{9:012d}")
    file = write(tmp_path / "a.tsv", empty + empty_9 + lines[0] + empty)
    store = import_features([file], tmp_path / "store")
    assert store.ids.tolist() == [b"9"]
    assert store.num_region_classes == 9
    features = published_arrays(13)[9]["features"]
    assert store[0]["features"] == pytest.approx(features, rel=1e-3)


@pytest.fixture
def twice(tmp_path):
    """A file whose third line has image 9 again, and whose image 10 has boxes outside."""
    lines = published_lines(13)
    lines[1] = lines[1].replace("480\t640", "90\t90")
    lines[2] = lines[0].replace("480\t640", "500\t500")
    return write(tmp_path / "a.tsv", "".join(lines))


def test_an_image_is_its_first_line_and_fails_alone_if_its_numbers_are_unusable(tmp_path, twice):
    store = import_features([twice], tmp_path / "store")
    assert store.rows([9, 10, 12]).tolist() == [0, -1, 2]
    assert store[0]["size"] == (640, 480)
    failed = (tmp_path / "store/failed.txt").read_text()
    assert "10\timage 10: not regions" in failed


def test_an_import_goes_on_where_it_was_stopped(tmp_path, twice, monkeypatch):
    write_row = StoreWriter.write
    seen = []

    def stopping(writer, row, **values):
        seen.append(row)
        if len(seen) == 3:
            raise KeyboardInterrupt
        write_row(writer, row, **values)

    import_features([twice], tmp_path / "whole")
    monkeypatch.setattr(StoreWriter, "write", stopping)
    with pytest.raises(KeyboardInterrupt):
        import_features([twice], tmp_path / "parts")
    import_features([twice], tmp_path / "parts")
    # What is there is not written again; image 10, which has failed, is tried again.
    assert seen == [0, 1, 2, 1, 2]
    for path in (tmp_path / "whole").iterdir():
        other = tmp_path / "parts" / path.name
        assert other.read_bytes() == path.read_bytes(), path


def test_check_says_what_a_store_and_captions_hold(tmp_path, store, capsys):
    captions = write(tmp_path / "mine.tsv", "3\ta dog\n4\t\n99\tno features\n3\tagain\n")
    data.main(["check", str(store.folder), str(captions)])
    printed = capsys.readouterr().out
    assert "10 images, 10 of them with regions\n" in printed
    assert "detector: made up\n" in printed
    found = r"mine.tsv: captions: 3 of 4 found in .*features\n"
    assert re.search(found + r"    the first: \('3', 'a dog'\)", printed), printed


# --- the toy world ---

SCENES = [Scene(number) for number in range(300)]
RELATION = re.compile(f"({'|'.join(data.RELATIONS)})")
WORDS = set(data.SIZES) | set(data.COLOURS) | set(data.SHAPES)
SINGULAR = {f"{shape}s": shape for shape in data.SHAPES} | {"crosses": "cross"}


def holds(thing, relation, other):
    x, y = np.subtract(thing.centre, other.centre)
    truth = {"left of": x < 0, "right of": x > 0, "above": y < 0, "below": y > 0}
    return truth[relation]


def is_at(thing, text):
    """Is the thing where the text says, if it says so?"""
    x, y = (pixels / 64 - 1 for pixels in thing.centre)  # from -1 to 1
    far = {"middle": 0.25, "left": -x, "right": x, "top": -y, "bottom": y}
    farthest = max(far.values())
    return all(far[word] == farthest for word in far if word in text)


def meant(scene, text):
    """The things that 'a star left of a red ring', 'small crosses' or 'a ring at the top' fits."""
    first, *rest = RELATION.split(text)
    words = {SINGULAR.get(word, word) for word in first.split()} & WORDS
    things = [thing for thing in scene.things
        if words <= {thing.size, thing.colour, thing.shape} and is_at(thing, first)]
    if rest:
        relation, second = rest
        marks = meant(scene, second)
        assert len(marks) == 1 or second.startswith(" a "), text  # 'the red ring' is the only one
        things = [thing for thing in things
            if any(holds(thing, relation, mark) for mark in marks)]
    return things


def meant_without_relation(scene, text):
    return meant(scene, RELATION.split(text)[0])


def test_a_scene_follows_from_its_number():
    scene = Scene(7)
    again = Scene(7)
    again.captions(50)  # more captions change nothing else
    assert scene.draw() == again.draw()
    assert scene.captions() == again.captions()
    assert scene.questions() == again.questions()
    assert scene.expressions() == again.expressions()


def test_scenes_have_two_to_six_things():
    assert {len(scene.things) for scene in SCENES} == set(range(2, 7))


def alike(thing, other):
    return thing.colour == other.colour or thing.shape == other.shape


def test_half_of_the_things_copy_a_word():
    """Some agree by chance, and the first has nothing to copy."""
    copied = []
    for scene in SCENES:
        for number, thing in enumerate(scene.things):
            before = scene.things[:number]
            copied.append(any(alike(thing, other) for other in before))
    assert 0.45 < np.mean(copied) < 0.7


def test_things_lie_apart_and_fill_their_boxes():
    for scene in SCENES:
        pixels = np.asarray(scene.draw(scale=2))
        taken = np.zeros((256, 256), bool)
        for thing in scene.things:
            assert min(thing.box) >= 0 and max(thing.box) <= 128
            x1, y1, x2, y2 = np.multiply(2, thing.box)
            box = np.s_[y1:y2, x1:x2]
            assert not taken[box].any()
            taken[box] = True
            colour = ImageColor.getrgb(data.COLOURS[thing.colour])
            painted = np.all(pixels[box] == colour, axis=-1)
            assert painted.mean() > 0.2, thing
            extent = np.ptp(np.argwhere(painted), axis=0).min()  # a star ends above its box
            assert extent >= x2 - x1 - 10, thing


def test_captions_are_true_of_their_picture_and_half_of_them_compare():
    compared = []
    for scene in SCENES:
        for caption in scene.captions():
            assert all(meant(scene, clause) for clause in caption.split(" and ")), caption
            compared.append(RELATION.search(caption) is not None)
    assert 0.45 < np.mean(compared) < 0.55


def true_answer(scene, question, question_type):
    """The answer by what the question's words mean, whatever the scene says."""
    things = meant(scene, question)
    form = question.split()[0]
    if form == "how":
        return str(len(things))
    if form == "is":
        return "yes" if things else "no"
    (thing,) = things  # a 'what' question is about one thing
    return thing.shape if question_type == "shape" else thing.colour


# A question's type and first word: the share that its most frequent answer stays below.
MOST = {("colour", "what"): 0.2, ("relation", "what"): 0.2, ("shape", "what"): 0.25,
    ("count", "how"): 0.4, ("existence", "is"): 0.6, ("relation", "is"): 0.55}


def test_questions_have_the_answer_that_the_picture_gives_and_no_answer_is_easy_to_guess():
    answers = defaultdict(list)
    for scene in map(Scene, range(1500)):
        for question, answer, question_type in scene.questions():
            form = question.split()[0]
            answers[question_type, form].append(answer)
            assert answer == true_answer(scene, question, question_type), question
            if question.startswith("is the "):
                assert len(meant_without_relation(scene, question)) == 1, question
    assert answers.keys() == MOST.keys()
    for form, given in answers.items():
        assert len(given) > 300
        most = max(Counter(given).values())
        assert most / len(given) < MOST[form], form


def test_expressions_mean_one_thing_and_relations_are_needed():
    seen = Counter()
    for scene in SCENES:
        for text, index, expression_type in scene.expressions():
            seen[expression_type] += 1
            assert meant(scene, text) == [scene.things[index]], text
            others_fit = len(meant_without_relation(scene, text)) > 1
            assert others_fit == (expression_type == "relation"), text
    assert min(seen.values()) > 100


# --- machine room: ids and files ---

SPELLINGS = {  # image id: names that mean it
    "0": ["0", "000.jpg"],
    "391895": ["coco_train2014_000000391895.npz", "000391895.txt", 391895],
    "dog_1": ["a/b/dog_1.jpg", "dog_1", "dog_1.JPEG.png", "a\\dog_1.jfif", " dog_1 ",
        "dog_1.jpg #3", "dog_1.jpg.txt"],
    "v1.2 final": ["v1.2 final"],
    "room#1": ["room#1.jpg", "room#1"],  # the number belongs to the name
    "room": ["room.jpg#1", "room.jpg"],  # the number of a caption
    "caf\u00e9": ["cafe\u0301.HEIC", "caf\u00e9"]}  # an accent in two characters and in one


@pytest.mark.parametrize("image_id", SPELLINGS)
def test_every_spelling_of_an_image_id_becomes_one(image_id):
    spellings = SPELLINGS[image_id] + [image_id]  # an id that is read again stays as it is
    assert {canonical_id(name) for name in spellings} == {image_id}


def look_for(letters):
    """Say which of these ids are found, where 'a', 'b' and 'x' are."""
    ids = np.array(list(letters), "S")
    known = np.array(["a", "b", "x"], "S")
    data.say_found("names", ids, np.isin(ids, known), "here", known)


@pytest.mark.parametrize("letters, words", [
    ("ab", "names: 2 of 2 found in here"),
    ("abcd", "names: 2 of 4 found in here"),
    ("abcde", "names: 2 of 5 found in here; those that did not meet: 'c' and 'x'")])
def test_what_was_found_is_counted_and_shown_where_most_is_missing(capsys, letters, words):
    look_for(letters)
    assert capsys.readouterr().out == words + "\n"


def test_if_nothing_is_found_the_same_sentence_is_an_error():
    with pytest.raises(BadInput, match="0 of 1 found in here; .*: 'c' and 'a'"):
        look_for("c")


def test_a_file_that_git_lfs_has_not_fetched_is_named(tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid 1\n"
    path = write(tmp_path / "bert/vocab.txt", pointer)
    words = "git-lfs has not fetched .*bert/vocab.txt yet: git lfs"
    with pytest.raises(BadInput, match=words):
        WordPiece(path)
    with pytest.raises(BadInput, match=words):
        FeatureStore(path.parent)


def test_an_error_is_not_hidden_by_what_cannot_be_the_name_of_a_file():
    """As --set with many fields: a name has at most 255 bytes."""
    with pytest.raises(BadInput, match="xxx: not a model .no such field"):
        with reading("x" * 300, "a model"):
            raise ValueError("no such field")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = write(tmp_path / "x.txt", "old")

    def fill_the_disk(file):
        file.write(b"new")
        file.flush()
        assert path.read_text() == "old"  # also while the new one is written
        try:
            raise OSError(28, "No space left on device")
        finally:
            raise RuntimeError("unexpected pos")  # so torch.save words it

    with pytest.raises(OSError, match="No space left on device: .*x.txt"):
        write_whole(path, fill_the_disk)
    assert path.read_text() == "old"
    with open(path) as reader:
        write_whole(path, lambda file: file.write(b"new"))
        assert reader.read() == "old"  # who has opened the old one reads it to its end
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def hold(folder, held):
    """What a run does: hold its folder, and have a loading process."""
    with only_run_in(folder):
        loader = multiprocessing.Process(target=time.sleep, args=(5,), daemon=True)
        loader.start()
        held.set()
        time.sleep(20)


def test_a_folder_is_held_by_one_process_until_that_one_ends_even_by_sigkill(tmp_path):
    held = multiprocessing.Event()
    holder = multiprocessing.Process(target=hold, args=(tmp_path / "run", held))
    holder.start()
    assert held.wait(timeout=60)
    with pytest.raises(BadInput, match="run: another run is at work there"):
        only_run_in(tmp_path / "run").__enter__()
    holder.kill()
    holder.join()
    with only_run_in(tmp_path / "run"):
        pass


def test_a_folder_that_cannot_be_removed_does_not_hide_why_a_run_failed(tmp_path, monkeypatch):
    """As the folder in which the run was started."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match="the reason"):
        with only_run_in(Path()):
            raise BadInput("the reason")


def make_locks_fail(monkeypatch, number):
    error = OSError(number, os.strerror(number))
    monkeypatch.setattr(fcntl, "lockf", Mock(side_effect=error))


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EACCES])
def test_a_lock_that_is_held_means_a_second_run(tmp_path, monkeypatch, number):
    make_locks_fail(monkeypatch, number)
    with pytest.raises(BadInput, match="another run"):
        only_run_in(tmp_path / "run").__enter__()


NO_LOCKS = [errno.EPERM, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP]


@pytest.mark.parametrize("number", NO_LOCKS)
def test_a_disk_without_locks_is_said_and_the_run_goes_on(tmp_path, monkeypatch, capsys, number):
    """The lock lies in the folder: that may be all that is writable."""
    make_locks_fail(monkeypatch, number)
    with only_run_in(tmp_path / "run"):
        assert [path.name for path in tmp_path.rglob("*")] == ["run", ".lock"]
    assert "run: cannot be locked; start no second run" in capsys.readouterr().out


# --- machine room: flags, processes, ends ---


def test_loading_processes_outlive_a_request_to_stop():
    """SLURM sends SIGTERM to every process, and the last step still needs its batches."""
    numbers = list(range(40))
    batches = [[number] for number in numbers]
    loaded = iter(data.load_ahead(numbers, batches, list, workers=2))
    found = [next(loaded), next(loaded)]  # one from each: both have begun
    for process in multiprocessing.active_children():
        os.kill(process.pid, signal.SIGTERM)
    found += loaded
    assert found == batches


@pytest.mark.parametrize("number, fits, refused", [
    (COUNT, "1", ["0", "1.5", "9" * 30]),
    (NATURAL, "0", ["-1"]),
    (RATE, "1e-4", ["0", "nan", "inf"]),
    (SHARE, "1", ["1.01", "x"])])
def test_flags_take_what_is_in_their_range_and_refuse_the_rest(number, fits, refused):
    assert number(fits) == float(fits)
    parser = argparse.ArgumentParser(exit_on_error=False)
    data.flag(parser, "--x", number, None, "")
    assert f"--x {number.__name__}" in parser.format_help()
    for text in refused:
        words = f"--x: invalid {number.__name__} value: '{text}'"
        with pytest.raises(argparse.ArgumentError, match=re.escape(words)):
            parser.parse_args([f"--x={text}"])


def test_off_a_terminal_progress_is_a_line_a_minute():
    """And nothing of what takes less. Here a minute is a tenth of a second."""
    log = io.StringIO()
    for _ in data.progress(range(3), "short", file=log):
        time.sleep(0.05)
    assert log.getvalue() == ""
    minute = {"delay": 0.1, "mininterval": 0.1, "maxinterval": 0.1}
    for _ in data.progress(range(4), "long", file=log, **minute):
        time.sleep(0.12)
    assert re.search(r"long: +75%.*3/4 \[.*it/s\].*\n$", log.getvalue(), re.S)


def be_stopped(_):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(5)


@pytest.fixture
def signals():
    """A test that asks for this leaves SIGTERM as it was."""
    yield
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.mark.parametrize("fault, status, words", [
    (BadInput("a.tsv: line 3"), 1, "error: a.tsv: line 3\n"),
    (OSError(28, "No space left on device", "x.npy"), 1, "error: [Errno 28] No space"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), 1, "fewer --workers"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "out of memory? Try"),
    (MemoryError(), 1, "out of memory? Try"),
    (be_stopped, 130, "stopped")])
def test_a_script_ends_with_a_sentence(capsys, signals, fault, status, words):
    with pytest.raises(SystemExit) as end:
        run(Mock(side_effect=fault))
    assert end.value.code == status
    assert words in capsys.readouterr().err


def test_a_log_that_cannot_spell_a_caption_gets_its_characters_by_number(signals, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    run(lambda _: print("caf\u00e9", flush=True))
    assert written.getvalue() == b"caf\\xe9\n"


def test_a_bug_ends_a_script_with_its_traceback(signals):
    with pytest.raises(RuntimeError, match="CUDA error"):
        run(Mock(side_effect=RuntimeError("CUDA error")))


START = """
import os, sys, time
if "RANK" not in os.environ:
    import data
    sys.exit(data.run(lambda _: data.start_processes(2)))
if os.environ["RANK"] == "0":
    time.sleep(60)
"""
KILLED = "error: a process was ended by signal 9; .*--resume\n"


@pytest.mark.parametrize("event, status, words", [
    pytest.param("sys.exit(7)", 7, "", marks=SLOW),
    pytest.param("os.kill(os.getpid(), 9)", 1, KILLED, marks=SLOW),
    ("time.sleep(1); os.kill(os.getppid(), 15); time.sleep(60)", 130, "")])
def test_a_process_that_fails_and_sigterm_end_all_processes(event, status, words):
    """`subprocess.run` waits for all that write to its pipes: they end before its timeout."""
    home = os.path.dirname(data.__file__)
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": home}
    end = subprocess.run([sys.executable, "-c", START + event], env=env, timeout=50,
        text=True, capture_output=True)
    assert end.returncode == status
    assert re.fullmatch(words, end.stderr)


# --- what is refused, and where the fault lies ---


def read_all(path):
    return list(read_captions(path))


def writing(**changes):
    """Write a record of two regions with other values for some; it stays unwritten."""
    record = {
        "features": np.ones((2, 3)),
        "boxes": np.array([[0, 0, 9, 9], [5, 5, 100, 80]]),
        "size": (100, 80),
        "class_probs": np.full((2, 2), 0.5)}

    def call(path):
        writer = FeatureStore.create(path, ["7"], 2, 3, 2)
        try:
            writer.write(0, **record | changes)
        finally:
            assert writer.pending() == [0]

    return call


def writing_box(x1, y1, x2, y2):
    boxes = [[0, 0, 9, 9], [x1, y1, x2, y2]]
    return writing(boxes=np.array(boxes))


def opening(**changes):
    """Open a finished store with other settings; one that is None was lost."""

    def call(path):
        meta = fill(make_writer(path)).finish().meta | changes
        kept = {key: value for key, value in meta.items() if value is not None}
        write(path / "store.json", kept)
        FeatureStore(path)

    return call


def creating(**settings):
    return lambda path: make_writer(path, **settings)


def creating_another(path):
    make_writer(path)
    make_writer(path, ids="abx", feature_size=4)


def finishing_early(path):
    fill(make_writer(path), [0, 2]).finish()


def opening_half_written(path):
    FeatureStore(make_writer(path).folder)


def importing(path):
    import_features([path], path.with_name("store"))


def importing_two_forms(path):
    other = write(path.with_name("b.tsv"), published_lines(13)[0])
    import_features([path, other], path.with_name("store"))


def importing_and_checking(path):
    data.main(["import", str(path), "-o", f"{path}.store"])


def content_of(images, annotations=()):
    return {"images": images, "annotations": list(annotations)}


LINES = published_lines(10)
FIRST = LINES[0]
SECOND = LINES[1]  # ends in two regions of 16 features
UNKNOWN = {"image_id": 3, "caption": "a"}
EMPTY = {"image_id": 1, "caption": None}
TSV = r"not a feature TSV of 6, 10 or 13 columns, all lines alike \("
RECORD = r"^image 7: not regions that can be stored \("
OUTSIDE = rf"{RECORD}a box outside its picture of \(100, 80\) .*or with x2 < x1"

REFUSED = [  # (what is called, what lies at its path, words of the message behind the path)
    (read_json, '{"annotations": [', "not a whole JSON file .*line 1"),
    (read_all, "a\tb\nc\td\te\n", "not a table of two columns, .*near caption 2: too many"),
    (read_all, content_of(TWICE), "two of its images have the same id or fi"),
    (read_all, content_of(TWICE[:1], [UNKNOWN]), "near caption 1: KeyError '3'"),
    (read_all, [{"image": "a", "caption": None}], "near caption 1: TypeError"),
    (read_all, {"images": [{"split": "trein"}]}, "a split among train, val, .*, found 'trein'"),
    (read_all, {"questions": []}, "near caption 1: KeyError 'images'"),
    (read_all, {"annotations": [EMPTY]}, "near caption 1: Attrib"),
    (WordPiece, "hello\nworld\n", r"not BERT's vocabulary: .*'\[PAD\]'"),
    (FeatureStore, None, "not a feature store; extract_features.py .*store.json is missing"),
    (opening(num_regions=1), None, r"near array boxes: expected \(3, 1, 4\) .* found \(3, 2, 4\)"),
    (opening(id_bytes=9), None, r"near array ids: expected \(3,\) S9, found \(3,\) \|S1"),
    (opening(version=99), None, "expected version 1, found 99"),
    (opening(version=None), None, "KeyError 'version'"),
    (opening(complete=None), None, "KeyError 'complete'"),
    (creating_another, None,
        "holds a feature store of other images or settings .*differs in feature_size, ids"),
    (finishing_early, None, "1 images are not written"),
    (opening_half_written, None, "a half-written .*; repeat the"),
    (creating(ids=("a", "a.jpg")), None, "'a' is the id of two images, a and a.jpg; rename one"),
    (creating(num_regions=10**12), None, "expected .* GB of free disk"),
    (importing, "", "no image with a region"),
    (importing, f"{FIRST}a\tb\tc\n", f"{TSV}near line 2: KeyError 3"),
    (importing, FIRST + SECOND[:-45], f"{TSV}near line 2: cannot reshape"),  # a cut file
    (importing, FIRST + SECOND.replace("=", "?="), f"{TSV}near line 2: .*base64"),
    (importing_two_forms, FIRST, f"b.tsv: {TSV}near line 1: cannot reshape"),
    (importing_and_checking, FIRST.replace("\t640\t", "\t0\t"),
        "no image could be used: see .*failed.txt"),
    (writing(features=np.full((2, 3), np.nan)), None, f"{RECORD}features with NaN or infinity"),
    (writing(features=np.full((2, 3), 7e4)), None, f"{RECORD}features with NaN"),  # > float16
    (writing(class_probs=np.ones((2, 2))), None, f"{RECORD}class_probs that do not add up to 1"),
    (writing(features=np.ones((0, 3)), boxes=np.ones((0, 4))), None, f"{RECORD}0 regions in"),
    (writing(size=(0, 80)), None, f"{RECORD}2 regions in a picture of"),
    (writing(boxes=np.ones((1, 4))), None, rf"{RECORD}.*boxes \(2, 4\), found \(1, 4\)"),
    (writing_box(5, 5, 101.5, 9), None, OUTSIDE),
    (writing_box(5, 5, 9, 81.5), None, OUTSIDE),
    (writing_box(-1.5, 5, 9, 9), None, OUTSIDE),
    (writing_box(5, 5, 4, 9), None, OUTSIDE),
    (writing_box(5, 5, 9, np.nan), None, OUTSIDE)]


@pytest.mark.parametrize("call, content, words", REFUSED)
def test_the_first_fault_is_named_with_its_file_and_place(tmp_path, call, content, words):
    path = tmp_path / "given"
    if content is not None:
        write(path, content)
    with pytest.raises(BadInput, match=words) as error:
        call(path)
    if not words.startswith("^"):
        assert str(error.value).startswith(str(tmp_path))
