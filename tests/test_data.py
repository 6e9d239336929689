"""What data.py promises: files, words, stores, masking, captions, published features, toys."""

import argparse
import base64
import contextlib
import functools
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
import zlib
from collections import Counter
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import data
from data import (COUNT, MATCH, MISMATCH, NATURAL, RATE, SHARE, TSV_COLUMNS, BadInput,
    FeatureStore, PretrainingDataset, Scene, StoreWriter, WordPiece, build_vocab, canonical_id,
    collate, import_features, mask_tokens, normalise_boxes, only_run_in, read_captions, read_json,
    run, split_words, write_whole)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, (str, bytes)) else json.dumps(content)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# --- small rules ---


@pytest.mark.parametrize("names, expected", [(("0", "000.jpg"), "0"),
    (("coco_train2014_000000391895.npz", "000391895.txt", 391895), "391895"),
    (("a/b/dog_1.jpg", "dog_1", "dog_1.JPEG.png"), "dog_1"), (["v1.2 final"], "v1.2 final")])
def test_every_spelling_of_an_image_id_becomes_one(names, expected):
    assert {canonical_id(name) for name in names} == {expected}


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = write(tmp_path / "x.txt", "old")

    def half(file):
        file.write("new")
        file.flush()
        assert path.read_text() == "old"  # also while the new one is written
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_whole(path, half)
    disk = Mock(side_effect=RuntimeError("unexpected pos"))  # so says torch.save of a full disk
    disk.side_effect.__context__ = OSError(28, "No space left on device")
    with pytest.raises(OSError, match="No space left on device: .*x.txt"):
        write_whole(path, disk)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    write(tmp_path / ".x.txt.tmp", "what a killed process left")
    write_whole(path, lambda file: file.write("new"))
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("fault, status, words", [
    (BadInput("a.tsv: line 3"), 1, "error: a.tsv: line 3\n"),
    (OSError(28, "No space left on device", "x.npy"), 1, "error: [Errno 28] No space"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), 1, "fewer --workers"),
    (KeyboardInterrupt, 130, "stopped"),
    (lambda: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(5)), 130, "stopped")])
def test_a_script_ends_with_a_sentence_and_a_bug_with_its_traceback(
        request, capsys, fault, status, words):
    before = signal.getsignal(signal.SIGTERM)
    request.addfinalizer(lambda: signal.signal(signal.SIGTERM, before))
    with pytest.raises(SystemExit) as end:
        run(Mock(side_effect=fault))
    assert end.value.code == status and words in capsys.readouterr().err
    for bug in (ZeroDivisionError("x"), ValueError("x"), RuntimeError("CUDA error")):
        with pytest.raises(type(bug), match=str(bug)):
            run(Mock(side_effect=bug))


@pytest.mark.parametrize("kind, value, refused, why", [
    (COUNT, 1, ["0", "1.5", "9" * 30], "1...1e+09"), (NATURAL, 0, ["-1"], "0...1e+09"),
    (RATE, 1e-4, ["0", "nan", "inf"], "1e-12...10"), (SHARE, 1.0, ["1.01", "x"], "1e-06...1")])
def test_flags_take_what_is_in_their_range_and_refuse_the_rest(capsys, kind, value, refused, why):
    parser = argparse.ArgumentParser()
    data.flag(parser, "--n", kind, 7, "some number")
    assert parser.parse_args([]).n == 7 and parser.parse_args([f"--n={value}"]).n == value
    for text in refused:
        with pytest.raises(SystemExit):
            parser.parse_args([f"--n={text}"])
        assert re.search(f"argument --n: expected a .*{re.escape(why)}", capsys.readouterr().err)
    assert f"--n {why}" in parser.format_help()


ENV = {k: v for k, v in os.environ.items() if k != "RANK"} | {"CUDA_VISIBLE_DEVICES": "",
    "PYTHONPATH": str(Path(data.__file__).parent)}
HOLD = """
import data, os, time
with data.only_run_in(data.Path("run")):
    if os.fork() == 0:  # such as a loading process
        time.sleep(5)
        os._exit(0)
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_is_held_by_one_process_until_that_one_ends_even_by_sigkill(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD], cwd=tmp_path, env=ENV,
        stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(BadInput, match="run: another run is at work there"):
            only_run_in(tmp_path / "run").__enter__()
    finally:
        holder.kill()
        holder.wait()
    with only_run_in(tmp_path / "run"):
        pass


START = """
import os, signal, sys, time
rank = os.environ.get("RANK")
if rank is None:
    import data
    data.run(lambda: data.start_processes(2))
    sys.exit()
print(os.getpid(), rank, os.environ["LOCAL_RANK"], os.environ["WORLD_SIZE"], file=open(rank, "w"))
while not all(os.path.exists(r) and open(r).read() for r in "01"):  # none ends before both began
    time.sleep(0.01)
"""


@pytest.mark.parametrize("child, status, words", [("", 0, ""),
    ("sys.exit(7) if rank == '1' else time.sleep(60)", 1, ""),
    ("os.kill(os.getpid(), 9) if rank == '1' else time.sleep(60)", 1, "error: a process was ended "
        "by signal 9; the same command goes on, a training with --resume\n"),
    ("signal.signal(15, lambda *_: sys.exit(3)); time.sleep(0.5)\n"
     "if rank == '0': os.kill(os.getppid(), 15)\ntime.sleep(60)", 0, "")],
    ids=["all end well", "one fails", "one is killed", "SIGTERM is passed on"])
def test_processes_know_their_rank_and_the_first_that_fails_ends_the_others(
        tmp_path, child, status, words):
    end = subprocess.run([sys.executable, "-c", START + child], cwd=tmp_path, env=ENV, timeout=60,
        text=True, capture_output=True)
    assert (end.returncode, end.stderr) == (status, words)
    for rank in "01":
        pid, *numbers = (tmp_path / rank).read_text().split()
        assert numbers == [rank, rank, "2"]
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


# --- words ---


@pytest.mark.parametrize("text, words", [("Hello, World!", ["hello", ",", "world", "!"]),
    ("naïve Ångström", ["naive", "angstrom"]), ("  \n ", []), ("don't", ["don", "'", "t"]),
    ("a\x00b\ufffdc\x07d\u200be", ["abcde"]),  # control characters and category Cf vanish
    ("one\ttwo\nthree\u00a0four\u3000five", ["one", "two", "three", "four", "five"]),
    ("我爱cats", ["我", "爱", "cats"]),  # Chinese characters stand alone
    ("ひらがな", ["ひらかな"]),  # kana do not; NFD drops the voicing mark
    ("$5+3=8^2~`|<>", list("$5+3=8^2~`|<>")),  # ASCII symbols count as punctuation
    ("\u201cquoted\u201d\u2026", ["\u201c", "quoted", "\u201d", "\u2026"]), ("İ", ["i"])])
def test_words_are_split_as_bert_does(text, words):
    assert split_words(text) == words


PIECES = [*data.SPECIALS, "un", "##aff", "##able", "##a", "play", "##ing", "##s", "!", "a",
    "affable"]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_pieces_are_the_longest_matches_from_the_left(tmp_path, end):
    expected = {"Unaffable": ["un", "##aff", "##able"], "una": ["un", "##a"], "as": ["a", "##s"],
        "playing plays!": ["play", "##ing", "play", "##s", "!"], "affable": ["affable"],
        "playxing": ["[UNK]"],  # one part without a piece: the whole word
        "a" + 49 * "s" + " a" + 100 * "s": ["a", *49 * ["##s"], "[UNK]"]}  # over 100 characters
    path = write(tmp_path / "vocab.txt", "".join(p + end for p in PIECES))
    for tokenizer in (WordPiece(path), WordPiece(PIECES)):
        for text, pieces in expected.items():
            ids = tokenizer.encode(text, 99)
            assert [tokenizer.pieces[i] for i in ids] == ["[CLS]", *pieces, "[SEP]"]
    assert tokenizer.encode("play play play play", 4) == [2, 9, 9, 3]  # cut, specials counted


def test_a_built_vocabulary_is_specials_characters_and_frequent_words():
    texts = ["bb a dd"] * 2 + ["Dd!", "ca"]
    expected = [*data.SPECIALS, *"!abcd", "##!", "##a", "##b", "##c", "##d", "dd", "bb"]
    assert build_vocab(texts) == expected and build_vocab(texts, size=16) == expected[:16]


# --- the feature store ---


def make_writer(folder, ids=("a", "b", "c"), **settings):
    return FeatureStore.create(
        folder, ids, **{**dict(num_regions=2, feature_size=3, detector="d"), **settings})


def fill(writer, rows=range(3)):
    for row in rows:
        writer.write(row, np.full((2, 3), row), np.full((2, 4), row), (10, 10))
    return writer


def test_a_store_gives_back_what_was_written(store):
    row, rng = store.row("COCO_val2014_000000000003"), np.random.default_rng(0)
    record = store[row]
    assert row == 3 and record["size"] == (100, 80)
    assert record["features"].shape == (4, 12) and record["boxes"].shape == (4, 4)
    corner, probs, features = rng.random((1, 2)) * 50, rng.random((1, 7)), rng.normal(size=(1, 12))
    assert store[0]["boxes"] == pytest.approx(np.hstack([corner, corner + 20]))
    assert store[0]["features"] == pytest.approx(features, rel=1e-3)  # float16
    assert store.class_probs(0) == pytest.approx(probs / probs.sum(), rel=1e-3)
    copy = pickle.dumps(store)  # it carries its folder, not its arrays
    assert len(copy) < 2000 and np.array_equal(pickle.loads(copy)[3]["boxes"], record["boxes"])


def test_rows_of_many_images_are_the_rows_of_each_and_failed_images_have_none(tmp_path):
    ids = ["zebra", "10", "9", "café", "b", "000000000200.jpg"]
    writer = fill(make_writer(tmp_path / "s", ids), [0, 1, 2, 3, 5])
    writer.fail(4, "no\npicture")
    store = writer.finish()
    assert (tmp_path / "s/failed.txt").read_text() == "b\tno picture\n"
    rows = {"9": 2, "COCO_val2014_000000000200.jpg": 5, "zzz": None, "b": None, "zebra": 0, 10: 1,
        "": None, "café": 3, "a": None, 9: 2}
    assert {i: store.row(i) for i in rows} == rows
    assert store.rows(rows).tolist() == [-1 if row is None else row for row in rows.values()]
    assert store.rows([]).tolist() == []


def test_a_half_written_store_is_refused_and_can_be_finished(tmp_path):
    """Also one of an earlier version of this code, with arrays of LXMERT's best classes."""
    folder, create = tmp_path / "s", functools.partial(make_writer, objects=True)
    fill(create(folder), [0, 2])
    np.save(folder / "objects.npy", np.zeros((3, 2)))
    with pytest.raises(BadInput, match="s: a half-written feature store; repeat"):
        FeatureStore(folder)
    writer = create(folder)
    assert writer.pending() == [1]
    with pytest.raises(BadInput, match="s: 1 images are not written"):
        writer.finish()
    store = fill(writer, [1]).finish()
    assert store[1]["features"].tolist() == [[1, 1, 1]] * 2 and store.class_probs(1) is None
    assert create(folder).pending() == []


@pytest.mark.parametrize("stored", [True, False])
def test_distributions_are_stored_or_follow_from_the_class_head(tmp_path, stored):
    rng = np.random.default_rng(0)
    weight, bias = rng.normal(size=(7, 12)), np.array([3.0, -1, 0, 1, 0, 1, 2])
    features = rng.normal(size=(4, 12)).astype(np.float16)
    expected = torch.tensor(features @ weight.T + bias).softmax(1).numpy()
    writer = FeatureStore.create(tmp_path, ["7"], 5, 12,
        **(dict(num_region_classes=7) if stored else dict(class_head=[weight, bias])))
    writer.write(0, features, np.ones((4, 4)), (10, 10), class_probs=expected)
    store, some = writer.finish(), np.array([True, False, True, False])
    assert store.num_region_classes == 7 and ("class_probs" in store.arrays) == stored
    assert store.class_probs(0) == pytest.approx(expected, abs=1e-3)
    assert store.class_probs(0, some) == pytest.approx(expected[some], abs=1e-3)


def test_what_lies_outside_a_picture_is_cut_off():
    """Of a picture 200 x 100, inside by hand: half of each side, so a quarter of the area."""
    boxes = np.float32([[20, 10, 120, 60], [-5, 0, 300, 100]])
    assert normalise_boxes(boxes, (200, 100)).tolist() == [
        pytest.approx([0.1, 0.1, 0.6, 0.6, 0.25]), [0, 0, 1, 1, 1]]


# --- pretraining examples ---

# Caption k has k + 1 words and belongs to image k // 2: its length tells which one it is.
CAPTIONS = [(f"COCO_train2014_{k // 2:012d}", "red " * (k + 1)) for k in range(20)]


def dataset(store, tokenizer, **settings):
    return PretrainingDataset(store, CAPTIONS, tokenizer, **settings)


def same(a, b):
    return all(np.array_equal(a[k], b[k]) for k in a)


def test_masking_rates_are_15_percent_and_80_10_10_and_specials_are_never_drawn(tokenizer):
    rng = np.random.default_rng(0)
    ids = np.array(tokenizer.encode("a small red star left of the ring " * 9999, 100_000))
    shown, places = mask_tokens(ids, tokenizer, rng)
    assert np.delete(shown, places).tolist() == np.delete(ids, places).tolist()
    assert len({*places}) / len(ids) == pytest.approx(0.15, abs=0.005)
    shown, ids = shown[places], ids[places]
    assert set(shown) == {*range(5, len(tokenizer)), tokenizer.mask_id}
    assert (shown == tokenizer.mask_id).mean() == pytest.approx(0.8, abs=0.01)
    # A random piece is the right one now and then: 10 % + 10 % / vocabulary.
    right = 0.1 + 0.1 / (len(tokenizer) - 5)
    assert (shown == ids).mean() == pytest.approx(right, abs=0.01)
    assert all(mask_tokens([2, 7, 3], tokenizer, rng)[1].tolist() == [1] for _ in range(50))


def test_regions_are_hidden_at_15_percent_and_at_least_one_is():
    rng = np.random.default_rng(0)
    rate = np.mean([data.choose(36, rng, 0.15).mean() for _ in range(5000)])
    # 0.15, plus the forced one in the 0.85^36 = 0.3 % of pictures where none was drawn
    assert rate == pytest.approx(0.15 + 0.85**36 / 36, abs=0.002)
    assert all(data.choose(2, rng, 0.15).any() for _ in range(100))
    assert not data.choose(9, rng, 0).any() and data.choose(0, rng, 0.15).tolist() == []


def test_half_of_the_pairs_are_mismatched_and_of_those_nothing_else_is_predicted(store, tokenizer):
    pairs, matches, masked, others = dataset(store, tokenizer), [], [], set()
    for epoch, index in np.ndindex(60, len(pairs)):
        example, row = pairs[epoch, index], index // 2
        words, places, hidden = (example[k] for k in ("input_ids", "mlm_positions",
            "region_hidden"))
        matches.append(example["itm_labels"] == MATCH)
        shown = [k for k in range(10)
            if np.array_equal(example["region_features"], store[k]["features"])]
        assert len(words) == index + 3  # the caption stays, whatever picture comes with it
        assert hidden.any()  # in either case: masks must not give the mismatch away
        if matches[-1]:
            assert shown == [row] and len(places)
            assert example["mrc_positions"].tolist() == np.flatnonzero(hidden).tolist()
            words[places] = example["mlm_labels"]
            assert words.tolist() == tokenizer.encode(CAPTIONS[index][1], 38)
        else:
            assert shown != [row] and example["itm_labels"] == MISMATCH
            others.update(shown)
            assert not len(places) and not len(example["mrc_positions"])
            masked.append(tokenizer.mask_id in words)
        assert np.array_equal(
            example["mrc_targets"], store.class_probs(row)[example["mrc_positions"]])
    assert np.mean(matches) == pytest.approx(0.5, abs=4 * 0.5 / len(matches) ** 0.5)
    assert np.mean(masked) > 0.5  # words, too, are masked in either case
    assert others == {*range(10)}


def test_pairs_may_be_shown_whole_or_without_pictures_or_have_no_classes(
        store, tokenizer, tmp_path):
    whole, blind = dataset(store, tokenizer, masking=False), dataset(store, tokenizer, blind=True)
    for index, (text, unseen) in enumerate(zip(whole, blind)):
        assert set(text["input_ids"][1:-1]) == {tokenizer.ids["red"]}
        assert not len(text["mlm_labels"]) and not text["region_hidden"].any()
        assert unseen["itm_labels"] == MATCH and len(unseen["input_ids"]) == index + 3
        assert len(unseen["mlm_labels"])
    assert {e["itm_labels"] for e in whole} == {MATCH, MISMATCH}
    batch = collate([blind[0], blind[1]])
    assert batch["region_mask"].tolist() == [[0], [0]] and not len(batch["mrc_positions"])
    assert batch["region_features"].shape == (2, 1, 12) and not len(batch["mrc_targets"])
    unclassified = fill(make_writer(tmp_path / "s")).finish()
    for e in PretrainingDataset(unclassified, [("a", "red"), ("b", "star")] * 5, tokenizer):
        assert e["region_hidden"].any() and not len(e["mrc_positions"])
        assert e["mrc_targets"] is None


def test_an_example_follows_from_seed_epoch_and_index_in_any_process(store, tokenizer):
    pairs, other = dataset(store, tokenizer), dataset(store, tokenizer, seed=4)
    assert same(pairs[7], pairs[0, 7]) and not same(pairs[19], pairs[1, 19])
    assert not same(pairs[19], other[19])
    loaded = torch.utils.data.DataLoader(pairs, 4, num_workers=2, collate_fn=collate)
    for n, batch in enumerate(loaded):
        assert same(batch, collate([pairs[i] for i in range(4 * n, 4 * n + 4)]))
    assert n == 4


def test_a_batch_is_padded_to_its_longest_and_no_further(store, tokenizer):
    pairs = dataset(store, tokenizer, mismatch=0.0)
    examples = pairs[0], pairs[7]  # of 1 and 8 words; images 0 and 3: 1 and 4 regions
    batch = collate(examples)
    assert batch["text_mask"].tolist() == [[1] * 3 + [0] * 7, [1] * 10]
    assert batch["region_mask"].tolist() == [[1, 0, 0, 0], [1, 1, 1, 1]]
    for name in ("input_ids", "region_features", "region_boxes", "region_hidden"):
        real = batch["text_mask" if name == "input_ids" else "region_mask"] == 1
        assert batch[name].shape[:2] == real.shape and (batch[name][~real] == 0).all()
        assert np.array_equal(batch[name][real], np.concatenate([e[name] for e in examples]))
    assert batch["mlm_positions"].tolist() == [10 * b + t
        for b, e in enumerate(examples) for t in e["mlm_positions"]]
    assert set(batch["mlm_labels"].tolist()) == {tokenizer.ids["red"]}
    hidden = batch["region_hidden"].nonzero().tolist()
    assert batch["mrc_positions"].tolist() == [4 * b + r for b, r in hidden]
    assert batch["mrc_targets"].tolist() == [
        store.class_probs(3 * b)[r].tolist() for b, r in hidden]
    assert np.array_equal(batch["region_boxes"][1], normalise_boxes(store[3]["boxes"], (100, 80)))


def test_captions_without_words_or_features_are_counted_and_left_out(store, tokenizer):
    pairs = PretrainingDataset(store, [("77", "a ring"), *CAPTIONS, ("3", "  ")], tokenizer)
    assert len(pairs) == 20 and pairs.skipped == {"without features": 1, "without words": 1}
    assert same(pairs[5], dataset(store, tokenizer)[5])
    assert pairs.lengths.tolist() == [*range(20)]  # in spaces


@pytest.mark.parametrize("count", [0, 1, 7, 100_003])
def test_captions_read_like_the_list_of_pairs_that_they_hold(count):
    pairs = [(f"d\xf6g_{i}" if i % 2 else i, f" caf\u00e9 \ud800 {'x ' * (i % 50)}")
        for i in range(count)]
    expected = [(str(name), text.strip().replace("\ud800", "?")) for name, text in pairs]
    captions, odd = data.Captions(iter(pairs)), np.arange(count) % 2 == 1
    for same in (captions, captions[:], pickle.loads(pickle.dumps(captions))):
        assert list(same) == expected and len(same) == count
    assert list(reversed(captions[3:9])) == expected[3:9][::-1]
    assert list(captions[odd]) == list(captions[np.flatnonzero(odd)]) == expected[1::2]


# --- captions ---

URL = "http://lh6.ggpht.com/-IvRtNLNcG8o/TpFyrudaT6I/IMG_3422.JPG?imgmax=800"
BUS = [(str(zlib.crc32(URL.encode())), "a bus")]
COCO = {"images": [{"id": 9, "file_name": "COCO_train2014_000000000009.jpg"}], "annotations": [
    {"image_id": 318556, "id": 48, "caption": "A bathroom"}, {"image_id": 9, "caption": "A bus"}]}
FLICKR = {"dataset": "flickr30k", "images": [{"split": "train", "filename": "1000092795.jpg",
    "sentences": [{"tokens": ["two"], "raw": "Two guys."}, {"raw": "Two men."}]}]}
KARPATHY_COCO = {"images": [{"filename": f"COCO_val2014_{i:012d}.jpg", "cocoid": i, "imgid": 0,
    "split": split, "sentences": [{"raw": split}]}
    for i, split in ((391895, "test"), (60623, "restval"), (9, "train"), (483108, "val"))]}
FOLDER = {"00001/000010002.txt": "two\n", "00000/000000012.txt": " a ring ",
    "00000/000000012.jpg": "", "00000/000000012.json": "{}"}


@pytest.mark.parametrize("content, split, expected", [
    (f"a bus\t{URL}\n", None, BUS), (f"{URL}\ta bus\n", None, BUS),  # CC12M
    ("dog_1\ta dog\r\n000000000042\ttwo\r\n", None, [("dog_1", "a dog"), ("42", "two")]),
    ("\ufeffdog_1\ta dog", "train", [("dog_1", "a dog")]),  # a byte order mark
    ("dog_1\ta dog\n", "val", []), ("", None, []),
    (COCO, None, [("318556", "A bathroom"), ("9", "A bus")]),
    (FLICKR, "train", [("1000092795", "Two guys."), ("1000092795", "Two men.")]),
    (KARPATHY_COCO, "val", [("483108", "val")]),
    (KARPATHY_COCO, "train", [("60623", "restval"), ("9", "train")]),
    (FOLDER, None, [("12", "a ring"), ("10002", "two")]), (FOLDER, "val", [])])
def test_every_published_form_is_recognised_by_its_content(tmp_path, content, split, expected):
    path = tmp_path / "any.name"
    for name, part in content.items() if content is FOLDER else [("", content)]:
        write(path / name, part)
    assert list(read_captions(path, split)) == expected


# --- published feature files ---


def encoded(array, dtype="<f4"):
    return base64.b64encode(np.asarray(array, dtype).tobytes()).decode()


def published(columns):
    """(lines, records) of a file as its authors wrote it: 4 images of 640 x 480, 1 to 3 regions."""
    rng, lines, records = np.random.default_rng(columns), [], []
    for i in range(4):
        n = 1 + i % 3
        corner = rng.random((n, 2)) * 300
        boxes = np.hstack([corner, corner + 100]).astype(np.float32)
        features, probs = rng.normal(size=(n, 16)), rng.dirichlet(np.ones(9), size=n)
        best, sure = probs[:, 1:].argmax(1), probs[:, 1:].max(1)  # counted without background
        cells = [n, encoded(boxes), encoded(features)]
        if columns == 6:
            cells = [9 + i, 640, 480, *cells]
        else:
            cells = [f"COCO_train2014_{9 + i:012d}", 480, 640, encoded(best, "<i8"), encoded(sure),
                encoded(np.zeros(n), "<i8"), encoded(np.zeros(n)), *cells]
        if columns == 13:
            cells += [encoded(probs), encoded(np.zeros((n, 5))), encoded(probs)]
        lines.append("\t".join(map(str, cells)) + "\n")
        records.append((9 + i, boxes, features, probs))
    return lines, records


@pytest.mark.parametrize("columns, python3", [(6, False), (10, False), (10, True), (13, True)])
def test_published_features_are_read_as_they_are(tmp_path, columns, python3):
    lines, records = published(columns)
    if python3:  # which wrote bytes as b'...'
        lines = [re.sub(r"\t([^\t\n]{8,})", r"\tb'\1'", line) for line in lines]
    n = TSV_COLUMNS[columns].split().index("n")
    empty = ["9999", *lines[0].split("\t")[1:n], "0", *["" for _ in range(n + 1, columns)]]
    lines.insert(2 * python3, "\t".join(empty) + "\n")  # without regions: left out
    files = [write(tmp_path / name, "".join(part))
        for name, part in (("a.tsv", lines[:3]), ("b.tsv", lines[3:]))]
    store = import_features(files, tmp_path / "store")
    assert (len(store), store.num_regions, store.feature_size) == (4, 3, 16)
    assert store.num_region_classes == (9 if columns == 13 else 0)
    for image_id, boxes, features, probs in records:
        row = store.row(image_id)
        assert store[row]["size"] == (640, 480) and np.array_equal(store[row]["boxes"], boxes)
        assert store[row]["features"] == pytest.approx(features, rel=1e-3, abs=1e-6)
        if columns == 13:
            assert store.class_probs(row) == pytest.approx(probs, rel=1e-3, abs=1e-6)
        else:
            assert store.class_probs(row) is None


def test_an_import_that_was_stopped_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    real, seen = StoreWriter.write, []
    file = write(tmp_path / "a.tsv", "".join(published(13)[0]))
    import_features([file], tmp_path / "whole")

    def stopping(writer, row, **values):
        seen.append(row)
        if len(seen) == 3:
            raise KeyboardInterrupt
        real(writer, row, **values)

    monkeypatch.setattr(StoreWriter, "write", stopping)
    for _ in range(2):
        with contextlib.suppress(KeyboardInterrupt):
            import_features([file], tmp_path / "store")
    assert seen == [0, 1, 2, 2, 3]  # what is there is not written again
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "store" / path.name).read_bytes() == path.read_bytes(), path


def test_an_image_that_comes_twice_counts_once_and_a_broken_one_not_at_all(tmp_path):
    lines, _ = published(6)
    lines[1] = "\t".join([*lines[1].split("\t")[:5], encoded(np.full((2, 16), np.nan))]) + "\n"
    lines[3] = lines[0].replace("640\t480", "500\t500")
    store = import_features([write(tmp_path / "a.tsv", "".join(lines))], tmp_path / "store")
    assert [store.row(i) for i in (9, 10, 11)] == [0, None, 2] and store[0]["size"] == (640, 480)
    assert re.fullmatch(r"10\timage 10: .*features with NaN or infinity.*\n",
        (tmp_path / "store/failed.txt").read_text())


# --- the toy world ---

SCENES = [Scene(n) for n in range(300)]


def words_of(name):
    """{'size': 'small', 'shape': 'star'} of 'the small stars'."""
    words = [w if w == "cross" else w.removesuffix("s") for w in name.replace("sses", "ss").split()]
    return {key: w for w in words for key, options in (("size", data.SIZES),
        ("colour", data.COLOURS), ("shape", data.SHAPES)) if w in options}


def where(scene, **words):
    """The things with all of these words: where(scene, colour='red', shape='star')."""
    return [t for t in scene.things if all(getattr(t, k) == w for k, w in words.items())]


def relation_in(text):
    """('left of', what is left, of what), or None."""
    return next(((r, *text.split(f" {r} ")) for r in data.RELATIONS if f" {r} " in text), None)


def holds(a, relation, b):
    (ax, ay), (bx, by) = a.centre, b.centre
    return {"left of": ax < bx, "right of": ax > bx, "above": ay < by, "below": ay > by}[relation]


def is_at(thing, text):
    x, y = (c / 64 - 1 for c in thing.centre)  # from -1 to 1
    far = {"middle": 0.25, "left": -x, "right": x, "top": -y, "bottom": y}
    place = next((p for p in far if p in text), None)
    return place is None or far[place] == max(far.values())


def test_scenes_follow_from_their_number_and_their_things_lie_apart():
    a, b = Scene(7), Scene(7)
    a.captions(50)  # more captions change nothing else
    for what in ("draw", "captions", "questions", "expressions"):
        assert getattr(a, what)() == getattr(b, what)()
    assert data.HELD_OUT_SCENES - data.TRAIN_SCENES >= 1_000_000
    assert {len(s.things) for s in SCENES} == {2, 3, 4, 5, 6}
    shared = []
    for scene in SCENES:
        for i, thing in enumerate(scene.things):
            x1, y1, x2, y2 = thing.box
            assert min(thing.box) >= 0 and max(thing.box) <= 128
            before = scene.things[:i]
            assert all(x2 <= t.box[0] or t.box[2] <= x1 or y2 <= t.box[1] or t.box[3] <= y1
                for t in before)
            shared.append(any(thing.colour == t.colour or thing.shape == t.shape for t in before))
    assert 0.45 < np.mean(shared) < 0.7  # half copy a word; some agree by chance, the first never


@pytest.mark.parametrize("scale", [1, 3])
def test_a_thing_is_drawn_in_its_colour_within_its_box(scale):
    for scene in SCENES[:50]:
        image = scene.draw(scale)
        assert image.mode == "RGB" and image.size == (128 * scale, 128 * scale)
        pixels = np.asarray(image)
        for thing in scene.things:
            x1, y1, x2, y2 = (scale * c for c in thing.box)
            inside = (pixels[y1:y2, x1:x2] == data.COLOURS[thing.colour]).all(-1)
            assert inside.mean() > 0.2, thing
            # it touches all four sides of its box, to a pixel or two
            rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
            assert max(rows[0], columns[0]) <= 2 * scale, thing
            assert rows[-1] >= y2 - y1 - 5 * scale and columns[-1] >= x2 - x1 - 3 * scale, thing


def test_captions_are_true_of_their_picture():
    compared = []
    for scene in SCENES:
        for caption in scene.captions():
            names = caption.split(" and ")
            found = relation_in(names[0])
            compared.append(bool(found))
            if found:
                relation, *pair = found
                firsts, seconds = (where(scene, **words_of(name)) for name in pair)
                assert any(holds(a, relation, b) for a in firsts for b in seconds), caption
            for name in names[bool(found):]:
                assert any(is_at(t, name) for t in where(scene, **words_of(name))), caption
    assert 0.45 < np.mean(compared) < 0.55


def test_questions_have_the_answer_that_the_picture_gives_and_no_answer_is_easy_to_guess():
    answers = {}
    for scene in map(Scene, range(1500)):
        for question, answer, kind in scene.questions():
            form, things = question.split()[0], where(scene, **words_of(question))
            answers.setdefault((kind, form), []).append(answer)
            if kind == "relation":
                relation, *names = relation_in(question)
                things, (mark,) = (where(scene, **words_of(name)) for name in names)
                assert form == "what" or len(things) == 1, question
                things = [t for t in things if holds(t, relation, mark)]
            if form == "what":
                (thing,) = things
                true = thing.shape if kind == "shape" else thing.colour
            else:
                true = str(len(things)) if form == "how" else "yes" if things else "no"
            assert answer == true, question
    most = {("colour", "what"): 0.2, ("relation", "what"): 0.2, ("shape", "what"): 0.25,
        ("count", "how"): 0.4, ("existence", "is"): 0.6, ("relation", "is"): 0.55}
    assert answers.keys() == most.keys() and min(map(len, answers.values())) > 300
    for kind, given in answers.items():
        assert max(Counter(given).values()) / len(given) < most[kind], kind


def test_expressions_mean_one_thing_and_relations_are_needed():
    seen = Counter()
    for scene in SCENES:
        expressions = scene.expressions()
        assert len({text for text, _, _ in expressions}) == len(expressions) <= 3
        for text, index, kind in expressions:
            seen[kind] += 1
            relation, first, second = relation_in(text) or (None, text, "")
            rivals, (mark, *_) = where(scene, **words_of(first)), where(scene, **words_of(second))
            assert (kind == "relation") == bool(relation) == (len(rivals) > 1), text
            assert [t for t in rivals if not relation or holds(t, relation, mark)] == [
                scene.things[index]], text
    assert min(seen.values()) > 100


# --- python data.py ---


def test_check_says_what_a_store_and_captions_hold_and_import_fills_a_store(
        tmp_path, store, capsys):
    captions = write(tmp_path / "mine.tsv", "3\ta dog\n4\t\n99\tno features\n3\tagain\n")
    tsv = write(tmp_path / "a.tsv", "".join(published(13)[0]))
    data.main(["check", str(store.folder), str(captions)])
    data.main(["import", str(tsv), "-o", str(tmp_path / "new")])
    printed = capsys.readouterr().out
    for words in ("mine.tsv: 4 captions, 3 of them of images with features.*'3', 'a dog'",
            "detector: made up\n", "num_region_classes: 7\n", "10 images, 10 .*with regions",
            "new: a feature store of 4 images, 4 of them with regions", "detector: vg\n"):
        assert re.search(words, printed), printed
    with pytest.raises(SystemExit):
        data.main(["import", str(tsv)])
    assert "import needs -o STORE" in capsys.readouterr().err


# --- what is refused, and where the fault lies ---


def writing(size=(100, 80), **changes):
    """Write a record of two regions with other values for some; it stays unwritten."""
    def run(path):
        values = dict(features=np.ones((2, 3)), boxes=[[0, 0, 9, 9], [5, 5, 100, 80]],
            class_probs=np.full((2, 2), 0.5)) | changes
        writer = FeatureStore.create(path, ["7", "8"], 2, 3, 2)
        try:
            writer.write(0, size=size, **{k: np.array(v) for k, v in values.items()})
        finally:
            assert writer.pending() == [0, 1]
    return run


def importing(cell, change, columns=10, then=None):
    """Import a file with another value in a cell of its second line, and one of `then` columns."""
    def run(path):
        first, second = (line.rstrip().split("\t") for line in published(columns)[0][:2])
        second[cell] = change(second[cell]) if callable(change) else change
        files = [write(path, "\t".join(first) + "\n" + "\t".join(second))]
        files += [write(path.with_name("b.tsv"), published(then)[0][0])] if then else []
        import_features(files, path / "store")  # cannot be written: `path` is a file
    return run


def damaging(name, content):
    """Open a finished store of which one file was exchanged; a key that is None was lost."""
    def run(path):
        meta = fill(make_writer(path)).finish().meta
        if isinstance(content, np.ndarray):
            np.save(path / name, content)
        elif isinstance(content, dict):
            write(path / name, {k: v for k, v in (meta | content).items() if v is not None})
        else:
            write(path / name, content)
        FeatureStore(path)
    return run


def twice(**settings):
    return lambda path: (make_writer(path), make_writer(path, **settings))


TSV = "not a feature TSV of 6, 10 or 13 columns, all lines alike"
FORMS = "not a table of two columns, COCO's 'annotations' or Karpathy's 'images'"


def captions_of(path):
    return list(read_captions(path))


def check_failed(path):
    writer = make_writer(path, ids=["a"])
    writer.fail(0, "unreadable")
    data.check(writer.finish().folder)


RECORD = "^image 7: not regions that can be stored"
OUTSIDE = r"a box outside its picture of \(100, 80\) pixels, or with x2 < x1"
REFUSED = [  # (what is called, what lies at its path, words of the message behind the path)
    (read_json, '{"annotations": [', "not a whole JSON file .*line 1"),
    (captions_of, b"[1]", FORMS),
    (captions_of, None, rf"{FORMS} \(.*No such file"),
    (captions_of, "a\tb\nc\td\te\n", rf"{FORMS} \(near caption 2: too many values"),
    (captions_of, f"a bus\t{URL}\nno link\n", rf"{FORMS} \(near caption 2"),
    (captions_of, b"a\tb\nc\t\xff\xfe\n", FORMS),
    (captions_of, {"questions": [], "info": {}}, rf"{FORMS} \(near caption 1: KeyError 'images'"),
    (captions_of, {"annotations": [{"image_id": 1, "caption": "a"}, {"id": 3}]},
        rf"{FORMS} \(near caption 2: KeyError 'image_id'"),
    (captions_of, {"annotations": [{"image_id": 1, "caption": None}]}, "near caption 1: Attrib"),
    (captions_of, {"images": [{"split": "train", "filename": "1.jpg"}]},
        rf"{FORMS} \(near caption 1: KeyError 'sentences'"),
    (WordPiece, "hello\nworld\n", r"not BERT's vocabulary: .*'\[PAD\]'"),
    (WordPiece, b"\xff\xfe", "not BERT's vocabulary: one word piece per line"),
    (lambda path: WordPiece([*PIECES[1:], str(path)]), None, r"^the checkpoint's .*'\[PAD\]'"),
    (FeatureStore, None, r"not a feature store; extract_features.py .*No such file"),
    (damaging("boxes.npy", np.zeros((3, 1, 4), np.float32)), None,
        r"\(near array boxes: expected \(3, 2, 4\) float32, found \(3, 1, 4\) float32"),
    (damaging("boxes.npy", np.zeros((3, 2, 4))), None, "near array boxes: .*found .*float64"),
    (damaging("store.json", {"version": 99}), None, "expected version 1, found 99"),
    *((damaging("store.json", {key: None}), None, f"KeyError '{key}'")
        for key in ("version", "num_images", "complete", "class_names")),
    (damaging("store.json", "{"), None, "not a feature store; .*line 1"),
    (damaging("store.json", {"num_regions": "x"}), None, "near array boxes"),
    (twice(ids=("a", "b", "x")), None, "other images or settings .*differs in ids"),
    (twice(feature_size=4), None, "other images or settings .*differs in feature_size"),
    (lambda path: make_writer(path, ids=("a", "a.jpg")), None, "'a' is the id of two images"),
    (check_failed, None, "no image could be used: see .*failed.txt"),
    (lambda path: make_writer(path, ids=range(10), num_regions=10**12), None,
        r"expected [\d,]+\.\d\d GB of free disk"),
    *((importing(*change), None, rf"{TSV} \(near line 2: {words}") for words, change in (
        ("KeyError 3", (slice(3, None), [])), (".*'x'", (7, "x")), ("", (7, "3")),
        ("", (8, encoded(np.ones((2, 16))))), ("cannot reshape", (9, encoded(np.ones((2, 4))))))),
    # Cut off: also where what is left of the base64 is whole numbers, or whole rows of them.
    *((importing(9, lambda cell, n=n: cell[:-n]), None, rf"{TSV} \(near line 2: {words}")
        for n, words in ((1, ".*padding"), (4, ""), (44, "cannot reshape"), (172, ""))),
    *((importing(0, "1", a, then=b), None, rf"{TSV} \(near line 1: cannot reshape")
        for a, b in ((6, 13), (13, 6))),
    (lambda path: import_features([path], path), "", "no image with a region"),
    *((writing(**changes), None, rf"{RECORD} \(.*{words}") for words, changes in (
        ("features with NaN or infinity", dict(features=[[1, 1, 1], [1, 1, np.nan]])),
        ("features with NaN or infinity", dict(features=[[1, 1, 1], [70_000, 1, 1]])),  # > float16
        ("class_probs that do not add up to 1", dict(class_probs=[[0.5, 0.5], [0.5, np.nan]])),
        ("class_probs that do not add up to 1", dict(class_probs=[[0.5, 0.5], [0.5, 2]])),
        *((OUTSIDE, dict(boxes=[[0, 0, 9, 9], box])) for box in ((5, 5, 140, 80), (5, 5, 100, 90),
            (-3, 5, 100, 80), (5, 5, 4, 80), (5, np.nan, 100, 80), (5, 5, 100, np.inf))),
        ("0 regions in", dict(features=np.ones((0, 3)), boxes=np.ones((0, 4)))),
        ("in a picture of", dict(size=(0, 80), boxes=np.zeros((2, 4)))),
        (r"shape \(3,3\) into shape \(2,3\)", dict(features=np.ones((3, 3)),
            boxes=np.ones((3, 4)), class_probs=np.full((3, 2), 0.5))),
        (r"features \(2, 3\), found \(2, 4\)", dict(features=np.ones((2, 4)))),
        (r"found \(2, 1\)", dict(features=np.ones((2, 1)))), ("", dict(boxes=np.ones((2, 5)))),
        (r"boxes \(2, 4\), found \(1, 4\)", dict(boxes=np.ones((1, 4)))),
        ("", dict(class_probs=0.5)), (r"class_probs", dict(class_probs=np.full((2, 4), 0.25)))))]


@pytest.mark.parametrize("call, content, words", REFUSED)
def test_the_first_fault_is_named_with_its_file_and_place(tmp_path, call, content, words):
    path = tmp_path / "given"
    if content is not None:
        write(path, content)
    with pytest.raises(BadInput, match=words) as error:
        call(path)
    assert words[0] == "^" or str(error.value).startswith(str(tmp_path))
