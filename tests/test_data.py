"""What data.py promises: files, words, stores, masking, captions, published features, toys."""

import argparse
import base64
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

import numpy as np
import pytest
import torch

import data
from data import (COUNT, IGNORE, MATCH, MISMATCH, NATURAL, RATE, SHARE, BadInput, FeatureStore,
    PretrainingDataset, Scene, WordPiece, build_vocab, canonical_id, collate, import_features,
    mask_tokens, normalise_boxes, only_run_in, read_captions, read_json, region_inputs, run,
    split_words, write_whole)

ROOT = Path(data.__file__).parent


def write(path, content):
    text = content if isinstance(content, (str, bytes)) else json.dumps(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# --- small rules ---


@pytest.mark.parametrize("name, expected", [("COCO_val2014_000000391895.jpg", "391895"),
    ("coco_train2014_000000391895.npz", "391895"), (391895, "391895"), ("000000391895", "391895"),
    ("1000092795.jpg", "1000092795"), ("0", "0"), ("a/b/dog_1.jpg", "dog_1"),
    ("cat_1.JPEG", "cat_1"), ("dog.jpg.png", "dog"), ("000000012.txt", "12"),
    ("v1.2 final", "v1.2 final")])
def test_every_spelling_of_an_image_id_becomes_one(name, expected):
    assert canonical_id(name) == expected


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "x.txt"
    write_whole(path, lambda f: f.write("old"))

    def half(file):
        file.write("new")
        file.flush()
        assert path.read_text() == "old"  # also while the new one is written
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_whole(path, half)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.fixture
def handlers():
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def raising(error):
    def main():
        raise error
    return main


@pytest.mark.parametrize("main, status, words", [
    (raising(BadInput("a.tsv: line 3")), 1, "error: a.tsv: line 3\n"),
    (raising(OSError(28, "No space left on device", "x.npy")), 1, "error: [Errno 28] No space"),
    (raising(RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")), 1,
        "fewer --workers"),
    (raising(KeyboardInterrupt()), 130, "stopped"),
    (lambda: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(5)), 130, "stopped")])
def test_a_script_ends_with_a_status_and_a_sentence(handlers, capsys, main, status, words):
    with pytest.raises(SystemExit) as end:
        run(main)
    assert end.value.code == status and words in capsys.readouterr().err
    for bug in (ZeroDivisionError(), ValueError("x"), RuntimeError("CUDA error")):
        with pytest.raises(type(bug)):  # a bug keeps its traceback
            run(raising(bug))
    assert run(lambda: 3) == 3


@pytest.mark.parametrize("kind, text, found", [(COUNT, "1", 1), (NATURAL, "0", 0),
    (RATE, "1e-4", 1e-4), (SHARE, "1", 1.0), (COUNT, "0", "1..."), (COUNT, "1.5", "1..."),
    (COUNT, "9" * 30, "1..."), (NATURAL, "-1", "0..."), (RATE, "0", "1e-12...10"),
    (RATE, "nan", "1e-12...10"), (RATE, "inf", "1e-12...10"), (SHARE, "1.01", "1e-06...1"),
    (SHARE, "x", "1e-06...1"), (data.folder_to_write, "new/deep", Path("new/deep")),
    (data.folder_to_write, "here.txt", "here.txt is a file"),
    (data.folder_to_write, "here.txt/deep", "here.txt is a file"),
    (data.file_to_write, "new/x.txt", Path("new/x.txt")), (data.file_to_write, ".", "is a folder"),
    (data.file_to_write, "here.txt/x", "here.txt is a file")])
def test_flags_take_what_is_in_their_range_and_refuse_the_rest(
        tmp_path, monkeypatch, capsys, kind, text, found):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "here.txt", "")
    parser = argparse.ArgumentParser()
    data.flag(parser, "--n", kind, 7, "some number")
    if not isinstance(found, str):
        assert parser.parse_args([f"--n={text}"]).n == found and parser.parse_args([]).n == 7
        return
    with pytest.raises(SystemExit) as end:
        parser.parse_args([f"--n={text}"])
    assert end.value.code == 2
    assert "argument --n: expected a " in (err := capsys.readouterr().err) and found in err
    assert kind not in (COUNT, NATURAL, RATE, SHARE) or f"--n {found}" in parser.format_help()


HOLD = """
import os, sys, time
sys.path.insert(0, sys.argv[2])
import data
with data.only_run_in(data.Path(sys.argv[1])):
    if os.fork() == 0:  # such as a loading process
        time.sleep(5)
        os._exit(0)
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_is_held_by_one_process_until_that_one_ends_even_by_sigkill(tmp_path):
    folder, holder = tmp_path / "run", None
    leftover, kept = write(folder / ".x.npy.77.tmp", "half"), write(folder / "x.npy", "whole")
    try:
        holder = subprocess.Popen([sys.executable, "-c", HOLD, folder, ROOT], text=True,
            stdout=subprocess.PIPE)
        assert holder.stdout.readline() == "held\n" and not leftover.exists() and kept.exists()
        write(leftover, "of the holder")
        with pytest.raises(BadInput, match=f"run: process {holder.pid} is at work there"):
            with only_run_in(folder):
                pass
        assert leftover.exists()
    finally:
        holder.kill()
        holder.wait()
    with only_run_in(folder):
        assert not leftover.exists() and kept.exists()


@pytest.mark.parametrize("child, status, words", [
    ("open(rank, 'w').write(' '.join(os.environ[k] for k in ('LOCAL_RANK', 'WORLD_SIZE')))", 0, ""),
    ("sys.exit(7) if rank == '1' else time.sleep(60)", 7, ""),
    ("os.kill(os.getpid(), 9) if rank == '1' else time.sleep(60)", 1,
        "error: process 1 was ended by SIGKILL; the same command goes on, a training with "
        "--resume\n"),
    ("signal.signal(15, lambda *_: sys.exit(3)); time.sleep(0.5)\n"
     "if rank == '0': os.kill(os.getppid(), 15)\ntime.sleep(60)", 3, "")],
    ids=["all end well", "one fails", "one is killed", "SIGTERM is passed on"])
def test_processes_know_their_rank_and_the_first_that_fails_ends_the_others(
        tmp_path, child, status, words):
    script = write(tmp_path / "s.py", f"""
import os, signal, sys, time
rank = os.environ.get("RANK")
if rank is None:
    sys.path.insert(0, {str(ROOT)!r})
    import data
    data.run(lambda: data.start_processes(2))
    sys.exit()
open("pid" + rank, "w").write(str(os.getpid()))
""" + child)
    env = {k: v for k, v in os.environ.items() if k != "RANK"} | {"CUDA_VISIBLE_DEVICES": ""}
    end = subprocess.run([sys.executable, script], cwd=tmp_path, env=env, timeout=60, text=True,
        capture_output=True)
    assert (end.returncode, end.stderr) == (status, words)
    if not status:
        assert [(tmp_path / rank).read_text() for rank in "01"] == ["0 2", "1 2"]
    for rank in "01":
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / f"pid{rank}").read_text()), 0)


# --- words ---


@pytest.mark.parametrize("text, words", [("Hello, World!", ["hello", ",", "world", "!"]),
    ("Café naïve Ångström", ["cafe", "naive", "angstrom"]), ("", []), ("  \n ", []),
    ("don't re-do", ["don", "'", "t", "re", "-", "do"]),
    ("a\x00b\ufffdc\x07d", ["abcd"]),  # control characters vanish
    ("one\ttwo\nthree\u00a0four\u3000five", ["one", "two", "three", "four", "five"]),
    ("zero\u200bwidth", ["zerowidth"]),  # category Cf
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
    expected = [*data.SPECIALS, "!", "a", "b", "c", "d", "##!", "##a", "##b", "##c", "##d", "dd",
        "bb"]
    assert build_vocab(texts) == expected and build_vocab(texts, size=16) == expected[:16]
    assert build_vocab(texts, min_count=1) == [*expected, "ca"]
    tokenizer = WordPiece(expected)
    assert tokenizer.split_word("ca") == ["c", "##a"]  # seen once: in parts, but never [UNK]


# --- the feature store ---


def test_a_store_gives_back_what_was_written(store):
    row, rng = store.row("COCO_val2014_000000000003"), np.random.default_rng(0)
    record = store[row]
    assert row == 3 and record["size"] == (100, 80)
    assert record["features"].shape == (4, 12) and record["boxes"].shape == (4, 4)
    corner, probs, features = rng.random((1, 2)) * 50, rng.random((1, 7)), rng.normal(size=(1, 12))
    assert store[0]["boxes"].tolist() == [pytest.approx([*corner[0], *corner[0] + 20], rel=1e-6)]
    assert store[0]["features"] == pytest.approx(features, rel=1e-3)  # float16
    assert store.class_probs(0) == pytest.approx(probs / probs.sum(), rel=1e-3)
    copy = pickle.dumps(store)  # it carries its folder, not its arrays
    assert len(copy) < 2000 and np.array_equal(pickle.loads(copy)[3]["boxes"], record["boxes"])


def make_writer(folder, ids=("a", "b", "c"), **settings):
    return FeatureStore.create(
        folder, ids, **{**dict(num_regions=2, feature_size=3, detector="d"), **settings})


def fill(writer, rows):
    for row in rows:
        writer.write(row, np.full((2, 3), row), np.full((2, 4), row), (10, 10))


def test_rows_of_many_images_are_the_rows_of_each_and_failed_images_have_none(tmp_path):
    ids = ["zebra", "10", "9", "café", "b", "000000000200.jpg"]
    writer = make_writer(tmp_path / "s", ids)
    fill(writer, [0, 1, 2, 3, 5])
    writer.fail(4, "no\npicture")
    store = writer.finish()
    assert (tmp_path / "s/failed.txt").read_text() == "b\tno picture\n"
    asked = ["9", "COCO_val2014_000000000200.jpg", "zzz", "b", "zebra", 10, "", "café", "a", 9]
    expected = [2, 5, None, None, 0, 1, None, 3, None, 2]
    assert [store.row(i) for i in asked] == expected
    assert store.rows(asked).tolist() == [-1 if row is None else row for row in expected]
    assert store.rows([]).tolist() == []


def test_a_half_written_store_is_refused_and_can_be_finished(tmp_path):
    fill(make_writer(tmp_path / "s"), [0, 2])
    assert not FeatureStore.is_complete(tmp_path / "s")
    with pytest.raises(BadInput, match=r"s: a half-written feature store \(2 of 3 images\)"):
        FeatureStore(tmp_path / "s")
    writer = make_writer(tmp_path / "s")
    assert writer.pending() == [1]
    with pytest.raises(BadInput, match="s: 1 images are not written"):
        writer.finish()
    fill(writer, [1])
    assert writer.finish()[1]["features"].tolist() == [[1, 1, 1]] * 2
    assert FeatureStore.is_complete(tmp_path / "s") and make_writer(tmp_path / "s").pending() == []


def test_a_class_head_gives_the_distributions_that_stored_ones_give(tmp_path):
    rng = np.random.default_rng(0)
    weight, bias = (rng.normal(size=n).astype(np.float32) for n in ((7, 12), 7))
    sizes = dict(num_regions=4, feature_size=12)
    head = FeatureStore.create(tmp_path / "a", range(5), class_head=[weight, bias], **sizes)
    stored = FeatureStore.create(tmp_path / "b", range(5), num_region_classes=7, **sizes)
    for row in range(5):
        features = rng.normal(size=(1 + row % 4, 12)).astype(np.float16)
        probs = np.exp(features @ weight.T + bias)
        probs /= probs.sum(axis=1, keepdims=True)
        for writer in (head, stored):
            writer.write(row, features, np.tile([1.0, 1, 9, 9], (len(features), 1)), (10, 10),
                class_probs=probs)
    one, two = head.finish(), stored.finish()
    assert one.num_region_classes == 7 and not (tmp_path / "a/class_probs.npy").exists()
    for row in range(5):
        for some in (slice(None), np.arange(two.counts[row]) % 2 == 0):
            np.testing.assert_allclose(one.class_probs(row, some), two.class_probs(row, some),
                atol=1e-3)
        best, sure = one.best_classes(row)
        for p, k, confidence in zip(one.class_probs(row), best, sure):
            assert k > 0 and p[k] == confidence == max(p[1:])


def one_picture_store(folder, refused=False, **change):
    """A finished store of one picture of 100 x 80, of which numbers were changed after (or, for
    one that is refused, before) they were written.
    """
    values = dict(features=np.ones((2, 3)), boxes=np.array([[0, 0, 9, 9], [5, 5, 100, 80.0]]),
        class_probs=np.full((2, 2), 0.5))
    writer = FeatureStore.create(folder, ["7"], 2, 3, 2)
    if not refused:
        writer.write(0, **values, size=(100, 80))
    for name, (column, value) in change.items():
        values[name][1, column] = value
        with np.errstate(over="ignore"):
            writer.arrays[name][0, 1, column] = value
    if refused:
        writer.write(0, **values, size=(100, 80))
    return writer.finish().folder


def test_boxes_are_normalised_by_hand():
    """In a picture 200 x 100, (20, 10) to (120, 60) is half of each side: a quarter of it."""
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
    ids = np.array(tokenizer.encode("a small red star left of the ring " * 50, 402))
    counts, total, drawn = Counter(), 0, set()
    for _ in range(300):
        shown, labels = mask_tokens(ids, tokenizer, rng)
        places = labels != IGNORE
        assert (labels[places] == ids[places]).all() and (shown[~places] == ids[~places]).all()
        assert not places[[0, -1]].any()
        drawn |= set(shown[places])
        counts.update(all=places.sum(), masked=(shown[places] == tokenizer.mask_id).sum(),
            same=(shown[places] == ids[places]).sum())
        total += len(ids) - 2
    assert counts["all"] / total == pytest.approx(0.15, abs=0.005)
    assert counts["masked"] / counts["all"] == pytest.approx(0.8, abs=0.01)
    # A random piece is the right one now and then: 10 % + 10 % / vocabulary.
    same = 0.1 + 0.1 / (len(tokenizer) - 5)
    assert counts["same"] / counts["all"] == pytest.approx(same, abs=0.01)
    assert drawn == {*range(5, len(tokenizer)), tokenizer.mask_id}


def test_regions_are_hidden_at_15_percent_and_at_least_one_is():
    rng = np.random.default_rng(0)
    rate = np.mean([data.choose(36, rng, 0.15).mean() for _ in range(5000)])
    # 0.15, plus the forced one in the 0.85^36 = 0.3 % of pictures where none was drawn
    assert rate == pytest.approx(0.15 + 0.85**36 / 36, abs=0.002)
    assert all(data.choose(2, rng, 0.15).any() for _ in range(100))
    assert not data.choose(9, rng, 0).any() and data.choose(0, rng, 0.15).tolist() == []


def test_half_of_the_pairs_are_mismatched_and_of_those_nothing_else_is_predicted(store, tokenizer):
    pairs, matches, shown = dataset(store, tokenizer), [], Counter()
    for epoch, index in np.ndindex(60, len(pairs)):
        example, row = pairs[epoch, index], index // 2
        words, labels, hidden = (example[k] for k in ("input_ids", "mlm_labels", "region_hidden"))
        matches.append(example["itm_labels"] == MATCH)
        assert np.array_equal(example["region_features"], store[row]["features"])
        assert hidden.any()  # in either case: masks must not give the mismatch away
        if matches[-1]:
            assert np.where(labels == IGNORE, words, labels).tolist() == tokenizer.encode(
                CAPTIONS[index][1], 38)
            assert (labels != IGNORE).any() and np.array_equal(example["mrc_mask"], hidden)
        else:
            assert (len(words) - 3) // 2 != row and example["itm_labels"] == MISMATCH
            assert (labels == IGNORE).all() and not example["mrc_mask"].any()
            shown[tokenizer.mask_id in words] += 1
        assert np.array_equal(example["mrc_targets"], store.class_probs(row)[example["mrc_mask"]])
    assert np.mean(matches) == pytest.approx(0.5, abs=4 * 0.5 / len(matches) ** 0.5)
    assert shown[True] > shown[False]  # words, too, are masked in either case


def test_without_masking_all_is_shown_and_blind_shows_no_region_and_mismatches_none(
        store, tokenizer):
    whole, blind = (dataset(store, tokenizer, **{kind: value})
        for kind, value in (("masking", False), ("blind", True)))
    for index, (text, unseen) in enumerate(zip(whole, blind)):
        assert (text["input_ids"] == tokenizer.encode("red " * (len(text["input_ids"]) - 2), 38)
            ).all() and (text["mlm_labels"] == IGNORE).all()
        assert not text["region_hidden"].any() and not text["mrc_mask"].any()
        assert unseen["region_features"].shape == (0, 12) and not len(unseen["mrc_targets"])
        assert unseen["itm_labels"] == MATCH and len(unseen["input_ids"]) == index + 3
        assert (unseen["mlm_labels"] != IGNORE).any()
    assert {e["itm_labels"] for e in whole} == {MATCH, MISMATCH}
    batch = collate([blind[0], blind[1]])
    assert batch["region_mask"].tolist() == batch["mrc_mask"].tolist() == [[0], [0]]
    assert batch["region_features"].shape == (2, 1, 12) and not len(batch["mrc_targets"])


def test_a_store_without_classes_predicts_no_region_but_still_hides_some(tmp_path, tokenizer):
    fill(writer := make_writer(tmp_path / "s"), range(3))
    pairs = PretrainingDataset(writer.finish(), [("a", "red"), ("b", "star")], tokenizer)
    assert all(e["region_hidden"].any() and not e["mrc_mask"].any() and e["mrc_targets"] is None
        for e in (pairs[0], pairs[1]))


def test_an_example_follows_from_seed_epoch_and_index(store, tokenizer):
    a, b = dataset(store, tokenizer, seed=3), dataset(store, tokenizer, seed=3)
    a[5], a[6]
    assert same(a[7], b[7]) and same(a[3, 7], b[3, 7]) and same(a[7], b[0, 7])
    assert not all(same(a[0, i], a[1, i]) for i in range(20))
    other = dataset(store, tokenizer, seed=4)
    assert not all(same(a[i], other[i]) for i in range(20))


def test_batches_are_equal_for_0_and_2_loading_processes(store, tokenizer):
    pairs = dataset(store, tokenizer)
    runs = [list(torch.utils.data.DataLoader(pairs, 4, num_workers=n, collate_fn=collate))
        for n in (0, 2)]
    assert len(runs[0]) == 5
    for a, b in zip(*runs):
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_batch_is_padded_to_its_longest_and_no_further(store, tokenizer):
    pairs = dataset(store, tokenizer, mismatch=0.0)
    batch = collate([pairs[0], pairs[7]])  # of 1 and 8 words; images 0 and 3: 1 and 4 regions
    assert batch["text_mask"].tolist() == [[1] * 3 + [0] * 7, [1] * 10]
    assert batch["region_mask"].tolist() == [[1, 0, 0, 0], [1, 1, 1, 1]]
    assert batch["input_ids"].shape == (2, 10) and batch["region_features"].shape == (2, 4, 12)
    assert (batch["mlm_labels"][0, 3:] == IGNORE).all() and (batch["input_ids"][0, 3:] == 0).all()
    for r, row in enumerate((0, 3)):
        wanted = region_inputs(store, row)
        for name in ("region_features", "region_boxes"):
            found = batch[name][r].numpy()
            assert np.array_equal(found[: row + 1], wanted[name]) and not found[row + 1 :].any()
    assert not batch["region_hidden"][0, 1:].any() and not batch["mrc_mask"][0, 1:].any()
    places = batch["mrc_mask"].nonzero().tolist()
    assert batch["mrc_targets"].tolist() == [
        store.class_probs(3 * r)[c].tolist() for r, c in places]


def test_captions_without_words_or_features_are_counted_and_left_out(store, tokenizer):
    pairs = PretrainingDataset(store, [("77", "a ring"), *CAPTIONS, ("3", "  ")], tokenizer)
    assert len(pairs) == 20 and pairs.skipped == {"without features": 1, "without words": 1}
    assert same(pairs[5], dataset(store, tokenizer)[5])


# --- captions ---

URL = ("http://lh6.ggpht.com/-IvRtNLNcG8o/TpFyrudaT6I/AAAAAAAAM6o/_11MuAAKalQ/"
       "IMG_3422.JPG?imgmax=800")
ID = str(zlib.crc32(URL.encode()) & 0xFFFFFFFF)
COCO = {"images": [{"id": 57870, "file_name": "COCO_train2014_000000057870.jpg", "height": 480}],
    "annotations": [{"image_id": 318556, "id": 48, "caption": "A very clean bathroom"},
        {"image_id": 57870, "id": 49, "caption": "A restaurant"}]}
FLICKR = {"dataset": "flickr30k", "images": [
    {"split": "train", "filename": "1000092795.jpg", "sentences": [
        {"tokens": ["two", "guys"], "raw": "Two young guys."}, {"raw": "Two men."}]},
    {"split": "test", "filename": "10002456.jpg", "sentences": [{"raw": "Several men."}]}]}
KARPATHY_COCO = {"dataset": "coco", "images": [
    {"filepath": "val2014", "filename": f"COCO_val2014_{i:012d}.jpg", "cocoid": i, "imgid": 0,
     "sentids": [i], "split": split, "sentences": [{"tokens": [], "raw": f"{split} {i}"}]}
    for i, split in ((391895, "test"), (60623, "restval"), (9, "train"), (483108, "val"))]}


@pytest.mark.parametrize("content, split, expected", [
    (f"a very typical bus station\t{URL}\n", None, [(ID, "a very typical bus station")]),
    (f"{URL}\ta very typical bus station\n", None, [(ID, "a very typical bus station")]),  # CC12M
    ("dog_1\ta dog\r\n000000000042\ttwo\r\n", None, [("dog_1", "a dog"), ("42", "two")]),
    ("\ufeffdog_1\ta dog", "train", [("dog_1", "a dog")]),  # a byte order mark
    ("dog_1\ta dog\n", "val", []), ("", None, []),
    (COCO, None, [("318556", "A very clean bathroom"), ("57870", "A restaurant")]),
    (FLICKR, "train", [("1000092795", "Two young guys."), ("1000092795", "Two men.")]),
    (FLICKR, "test", [("10002456", "Several men.")]),
    (KARPATHY_COCO, "train", [("60623", "restval 60623"), ("9", "train 9")]),
    (KARPATHY_COCO, "val", [("483108", "val 483108")])])
def test_every_published_form_is_recognised_by_its_content(tmp_path, content, split, expected):
    assert read_captions(write(tmp_path / "any.name", content), split) == expected


def test_a_folder_of_img2dataset_is_a_caption_file(tmp_path):
    for name, text in (("00001/000010002.txt", "two\n"), ("00000/000000012.txt", " a ring "),
            ("00000/000000012.jpg", b"\xff"), ("00000/000000012.json", "{}")):
        write(tmp_path / name, text)
    assert read_captions(tmp_path) == [("12", "a ring"), ("10002", "two")]
    assert read_captions(tmp_path, "val") == []


# --- published feature files ---


def encoded(array, dtype, python3=False):
    text = base64.b64encode(np.asarray(array, dtype).tobytes()).decode()
    return f"b'{text}'" if python3 else text


def published(columns, python3=False):
    """(lines, records) of a file as its authors wrote it: 4 images of 640 x 480, 1 to 3 regions."""
    rng, lines, records = np.random.default_rng(columns), [], []
    for i in range(4):
        n = 1 + i % 3
        corner = rng.random((n, 2)) * 300
        boxes = np.hstack([corner, corner + 100]).astype(np.float32)
        features = rng.normal(size=(n, 16)).astype(np.float32)
        probs = rng.dirichlet(np.ones(9), size=n).astype(np.float32)
        best, sure = probs[:, 1:].argmax(1), probs[:, 1:].max(1)  # counted without background
        arrays = [encoded(boxes, "<f4", python3), encoded(features, "<f4", python3)]
        if columns == 6:
            cells = [9 + i, 640, 480, n, *arrays]
        else:
            tops = [encoded(a, t, python3) for a, t in ((best, "<i8"), (sure, "<f4"),
                (np.zeros(n), "<i8"), (np.zeros(n), "<f4"))]
            cells = [f"COCO_train2014_{9 + i:012d}", 480, 640, *tops, n, *arrays]
        if columns == 13:
            cells += [encoded(a, "<f4", python3) for a in (probs, np.zeros((n, 5)), probs)]
        lines.append("\t".join(map(str, cells)) + "\n")
        records.append((str(9 + i), boxes, features, probs))
    return lines, records


@pytest.mark.parametrize("columns, python3", [(6, False), (10, False), (10, True), (13, True)])
def test_published_features_are_read_as_they_are(tmp_path, columns, python3):
    lines, records = published(columns, python3)
    files = [write(tmp_path / "a.tsv", "".join(lines[:3])), write(tmp_path / "b.tsv", lines[3])]
    store = import_features(files, tmp_path / "store")
    assert (len(store), store.num_regions, store.feature_size) == (4, 3, 16)
    assert store.num_region_classes == (9 if columns == 13 else 0) and store.detector == "vg"
    for image_id, boxes, features, probs in records:
        row = store.row(image_id)
        store.check(row)
        assert store[row]["size"] == (640, 480) and np.array_equal(store[row]["boxes"], boxes)
        assert np.array_equal(store[row]["features"], features.astype(np.float16))
        if columns == 13:
            np.testing.assert_allclose(store.class_probs(row), probs, rtol=1e-3, atol=1e-6)
        if columns == 6:
            assert store.best_classes(row) is None
        else:
            best, sure = store.best_classes(row)
            assert best.tolist() == [1 + p[1:].argmax() for p in probs]
            np.testing.assert_allclose(sure, probs[:, 1:].max(axis=1), rtol=1e-3)


def test_an_import_that_was_stopped_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    real, seen = data.StoreWriter.write, []
    file = write(tmp_path / "a.tsv", "".join(published(13)[0]))
    import_features([file], tmp_path / "whole")

    def stopping(writer, row, **values):
        if seen == [0, 1]:
            seen.append("stopped")
            raise KeyboardInterrupt
        seen.append(row)
        real(writer, row, **values)

    monkeypatch.setattr(data.StoreWriter, "write", stopping)
    with pytest.raises(KeyboardInterrupt):
        import_features([file], tmp_path / "store")
    import_features([file], tmp_path / "store")
    assert seen == [0, 1, "stopped", 2, 3]  # what is there is not written again
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "store" / path.name).read_bytes() == path.read_bytes(), path


def test_an_image_that_comes_twice_counts_once_and_a_broken_one_not_at_all(tmp_path, capsys):
    lines, _ = published(6)
    cells = lines[1].split("\t")
    cells[5] = encoded(np.full((2, 16), np.nan), "<f4") + "\n"
    again = lines[0].replace("640\t480", "500\t500")
    file = write(tmp_path / "a.tsv", "".join([lines[0], "\t".join(cells), lines[2], again]))
    store = import_features([file], tmp_path / "store")
    assert "store: 1 of 3 images left out: see" in capsys.readouterr().out
    assert [store.row(i) for i in (9, 10, 11)] == [0, None, 2] and store[0]["size"] == (640, 480)
    assert (tmp_path / "store/failed.txt").read_text() == (
        "10\timage 10: features with NaN or infinity\n")


@pytest.mark.parametrize("missing", [1, 4, 8, 64, 128])
def test_a_file_that_is_cut_off_inside_its_last_column_is_an_error_that_names_the_line(
        tmp_path, missing):
    """Also where what is left of the base64 is whole numbers, or whole rows of them."""
    content = "".join(published(10)[0][:3]).rstrip()
    with pytest.raises(BadInput, match="a.tsv: not a feature TSV .*near line 3"):
        import_features([write(tmp_path / "a.tsv", content[:-missing])], tmp_path / "store")
    assert not (tmp_path / "store").exists()


# --- the toy world ---

SCENES = [Scene(n) for n in range(300)]


def words_of(name):
    """{'size': 'small', 'shape': 'star'} of 'the small stars'."""
    words = [w.removesuffix("s") if w != "cross" else w for w in name.replace("sses", "ss").split()]
    return {key: w for w in words for key, options in (("size", data.SIZES),
        ("colour", data.COLOURS), ("shape", data.SHAPES)) if w in options}


def relation_in(text):
    """('left of', what is left, of what), or None."""
    return next(((r, *text.split(f" {r} ")) for r in data.RELATIONS if f" {r} " in text), None)


def holds(a, relation, b):
    (ax, ay), (bx, by) = a.centre, b.centre
    return {"left of": ax < bx, "right of": ax > bx, "above": ay < by, "below": ay > by}[relation]


def is_at(thing, text):
    x, y = (c / 64 - 1 for c in thing.centre)  # from -1 to 1
    place = next((p for p in ("left", "right", "top", "bottom", "middle") if p in text), None)
    return {"left": -x >= max(abs(y), 0.25), "right": x >= max(abs(y), 0.25),
        "top": -y >= max(abs(x), 0.25), "bottom": y >= max(abs(x), 0.25),
        "middle": max(abs(x), abs(y)) < 0.25, None: True}[place]


def test_everything_about_a_scene_follows_from_its_number():
    a, b = Scene(7), Scene(7)
    a.captions(50)  # more captions change nothing else
    for what in ("draw", "captions", "questions", "expressions"):
        assert getattr(a, what)() == getattr(b, what)()
    assert a.things == b.things != Scene(8).things
    assert data.HELD_OUT_SCENES - data.TRAIN_SCENES >= 1_000_000


def test_scenes_have_two_to_six_things_apart_and_half_share_a_word_by_construction():
    assert {len(s.things) for s in SCENES} == {2, 3, 4, 5, 6}
    shared = []
    for scene in SCENES:
        boxes = np.array([t.box for t in scene.things])
        assert boxes.min() >= 0 and boxes.max() <= 128
        for i, a in enumerate(boxes):
            assert all(max(a[:2] - b[2:]) >= 0 or max(b[:2] - a[2:]) >= 0 for b in boxes[:i])
            shared += [any(scene.things[i].colour == t.colour or scene.things[i].shape == t.shape
                for t in scene.things[:i])] if i else []
    assert 0.55 < np.mean(shared) < 0.9  # a copied word, or one that agrees by chance


@pytest.mark.parametrize("scale", [1, 3])
def test_a_thing_is_drawn_in_its_colour_within_its_box(scale):
    for scene in SCENES[:50]:
        image = scene.draw(scale)
        assert image.mode == "RGB" and image.size == (128 * scale, 128 * scale)
        pixels = np.asarray(image).astype(int)
        for thing in scene.things:
            x1, y1, x2, y2 = (scale * c for c in thing.box)
            inside = (pixels[y1:y2, x1:x2] == data.COLOURS[thing.colour]).all(-1)
            assert inside.mean() > 0.2, thing
            # it touches all four sides of its box, to a pixel or two
            rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
            assert max(rows[0], columns[0]) <= 2 * scale, thing
            assert rows[-1] >= y2 - y1 - 5 * scale and columns[-1] >= x2 - x1 - 3 * scale, thing


def test_captions_are_true_of_their_picture():
    kinds = Counter()
    for scene in SCENES:
        for caption in scene.captions():
            found = relation_in(caption)
            kinds[bool(found)] += 1
            names = caption.split(" and ")
            if found:
                relation, first, rest = found
                second, *names = rest.split(" and ")
                assert any(holds(a, relation, b) for a in scene.where(**words_of(first))
                    for b in scene.where(**words_of(second)) if a is not b), caption
            for name in names:
                assert any(is_at(t, name) for t in scene.where(**words_of(name))), caption
    assert 0.45 < kinds[True] / kinds.total() < 0.55


def test_questions_have_the_answer_that_the_picture_gives_and_no_answer_is_easy_to_guess():
    answers = {}
    for scene in map(Scene, range(1500)):
        for question, answer, kind in scene.questions():
            words, found = words_of(question), relation_in(question)
            answers.setdefault((kind, question.split()[0]), Counter())[answer] += 1
            if kind in ("colour", "shape"):
                assert [getattr(t, kind) for t in scene.where(**words)] == [answer], question
            elif kind == "count":
                assert str(len(scene.where(**words))) == answer, question
            elif kind == "existence":
                assert bool(scene.where(**words)) == (answer == "yes"), question
            else:
                first, (mark,) = (scene.where(**words_of(name)) for name in found[1:])
                fits = [t for t in first if holds(t, found[0], mark)]
                if question.startswith("what colour is the "):
                    assert [t.colour for t in fits] == [answer], question
                else:
                    assert len(first) == 1 and bool(fits) == (answer == "yes"), question
    best = {kind: max(found.values()) / found.total() for kind, found in answers.items()}
    assert best.keys() == {("colour", "what"), ("shape", "what"), ("count", "how"),
        ("existence", "is"), ("relation", "what"), ("relation", "is")}
    assert max(best["colour", "what"], best["relation", "what"]) < 0.2
    assert best["shape", "what"] < 0.25 and best["count", "how"] < 0.4
    assert best["existence", "is"] < 0.6 and best["relation", "is"] < 0.55
    assert min(found.total() for found in answers.values()) > 300


def test_expressions_mean_one_thing_and_relations_are_needed():
    seen = Counter()
    for scene in SCENES:
        expressions = scene.expressions()
        assert len({text for text, _, _ in expressions}) == len(expressions) <= 3
        for text, index, kind in expressions:
            seen[kind], target = seen[kind] + 1, scene.things[index]
            if kind == "attribute":
                assert scene.where(**words_of(text)) == [target], text
            else:
                relation, first, second = relation_in(text)
                rivals, (mark,) = scene.where(**words_of(first)), scene.where(**words_of(second))
                assert len(rivals) > 1, text
                assert [t for t in rivals if holds(t, relation, mark)] == [target], text
    assert min(seen.values()) > 100


# --- python data.py ---


def command(capsys, *words):
    """(status, what it printed)"""
    try:
        data.main([str(word) for word in words])
    except SystemExit as end:
        return end.code, capsys.readouterr().out
    return 0, capsys.readouterr().out


def test_check_says_what_files_are_how_they_fit_and_whether_a_run_could_use_them(
        tmp_path, store, capsys):
    captions = write(tmp_path / "mine.tsv", "3\ta dog\n4\t\n99\tno features\n3\tagain\n")
    vocab = write(tmp_path / "v.txt", "\n".join(PIECES))
    status, printed = command(capsys, "check", captions, store.folder, vocab)
    for words in ("mine.tsv: image id, caption: 4 captions.* 1 .*empty.* 3 images.*'a dog",
            "detector: made up\n", "10 images .0 failed., up to 5 regions of 12",
            "num_region_classes: 7\n", "2 of 3 images have features", "15 word pieces"):
        assert re.search(words, printed)
    strangers = write(tmp_path / "others.tsv", "98\ta\n99\tb\n")
    broken = one_picture_store(tmp_path / "s", features=(2, np.nan))
    for paths, words in (([strangers, store.folder], "0 of 2 images have features"),
            ([write(tmp_path / "c.tsv", "a\tb\nc\n"), captions], "PROBLEM .*c.tsv: .*line 2"),
            ([broken], "PROBLEM .*s: image 7: features with NaN"),
            ([write(tmp_path / "w.txt", "a\nb\n")], r"PROBLEM .*w.txt: .*\[PAD\]")):
        failed, found = command(capsys, "check", *paths)
        assert (status, failed) == (0, 1) and re.search(words, found)


def test_import_writes_a_store_with_class_names(tmp_path, capsys):
    file = write(tmp_path / "a.tsv", "".join(published(13)[0]))
    names = write(tmp_path / "names.txt", "".join(f"thing {i}\n" for i in range(8)))
    status, printed = command(capsys, "import", file, "-o", tmp_path / "s", "--classes", names)
    assert status == 0 and "s: a feature store of 4 images (0 failed), up to 3 regions" in printed
    assert FeatureStore(tmp_path / "s").class_names == ["background", *names.read_text().split("\n")
        [:8]]
    write(names, "a\nb\n")
    with pytest.raises(BadInput, match="t: 2 class names, but the features have 8 classes"):
        import_features([file], tmp_path / "t", classes=names)


# --- what is refused, and where the fault lies ---


def importing(change, columns=6, then=None):
    """Import a file whose second line was changed, and another one of `then` columns."""
    def run(path):
        lines, _ = published(columns)
        lines[1] = "\t".join(change(lines[1].rstrip("\n").split("\t"))) + "\n"
        files = [write(path, "".join(lines))]
        files += [write(path.with_name("b.tsv"), "".join(published(then)[0]))] if then else []
        import_features(files, path.with_name("store"))
    return run


def damaging(name, content):
    """Open a finished store of which one file was exchanged."""
    def run(path):
        fill(writer := make_writer(path), range(3))
        writer.finish()
        if isinstance(content, np.ndarray):
            np.save(path / name, content)
        else:
            meta = content if isinstance(content, str) else {
                **json.loads((path / name).read_text()), **content}
            write(path / name, meta)
        FeatureStore(path)
    return run


def twice(**settings):
    return lambda path: (make_writer(path), make_writer(path, **settings))


def checking(**change):
    """Such numbers are not written; where they stand in a store, `check` finds them."""
    def run(path):
        with pytest.raises(BadInput, match="image 7: "):
            one_picture_store(path.with_name("new"), refused=True, **change)
        assert np.load(path.with_name("new") / "counts.npy").tolist() == [-1]
        FeatureStore(one_picture_store(path.with_name("sound"))).check(0)
        FeatureStore(one_picture_store(path, **change)).check(0)
    return run


NOT_FINITE, OUTSIDE = "image 7: {} with NaN or infinity", "image 7: a box outside .* 100 x 80 pix"
TABLE = "not a caption file of two columns"
TSV = "not a feature TSV of 6, 10 or 13 columns"
REFUSED = [  # (what is called, what lies at its path, words of the message behind the path)
    (read_json, '{"annotations": [', "not a whole JSON file .*line 1"),
    (lambda path: read_json(path, dict), "[1]", "expected a JSON dict, found a list"),
    (read_captions, None, r"not a caption file \(No such file or directory\)"),
    (read_captions, "just a sentence\n", rf"{TABLE} \(image id, caption\) \(near line 1: "),
    (read_captions, "a\tb\nc\td\te\n", rf"{TABLE} .*near line 2: too many values"),
    (read_captions, f"a bus\t{URL}\nno link\n", rf"{TABLE} \(Conceptual Captions\) \(near line 2"),
    (read_captions, b"a\tb\nc\t\xff\xfe\n", "not a caption file"),
    (read_captions, '{"annotations": [', "not a whole JSON file"),
    (read_captions, {"questions": [], "info": {}}, "the key 'annotations'.* found 'questions', 'i"),
    (read_captions, {"annotations": [{"image_id": 1, "caption": "a"}, {"id": 3}]},
        r"not COCO captions \(near .*1: KeyError 'image_id'"),
    (read_captions, {"annotations": [{"image_id": 1, "caption": None}]}, "near .*0: TypeError"),
    (read_captions, {"images": [{"split": "train", "filename": "1.jpg"}]},
        r"not Karpathy's splits \(near .*0: KeyError 'sentences'"),
    (WordPiece, "hello\nworld\n", r"not BERT's vocabulary: .*'\[PAD\]'"),
    (WordPiece, b"\xff\xfe", "not BERT's vocabulary: one word piece per line"),
    (lambda path: WordPiece([*PIECES[1:], str(path)]), None, r"^the checkpoint's .*'\[PAD\]'"),
    (FeatureStore, None, r"store.json: not a feature store; .*No such file"),
    (damaging("boxes.npy", np.zeros((3, 1, 4), np.float32)), None,
        r"boxes.npy: not an array .*expected \(3, 2, 4\).*found \(3, 1, 4\)"),
    (damaging("boxes.npy", np.zeros((3, 2, 4))), None, "boxes.npy: .*found .*float64"),
    (damaging("boxes.npy", "nonsense"), None, "boxes.npy: not an array of this store"),
    (damaging("store.json", {"version": 99}), None, "store.json: .*version 1, found 99"),
    (damaging("store.json", "{"), None, r"store.json: not a .*line 1"),
    (damaging("store.json", {"num_regions": "x"}), None, "not a|not an array"),
    (twice(ids=("a", "b", "x")), None, "other images or settings .*differs in ids"),
    (twice(detector="e"), None, "other images or settings .*differs in detector"),
    (twice(feature_size=4), None, "other images or settings .*differs in feature_size"),
    (lambda path: make_writer(path, ids=("a", "a.jpg")), None, "'a' is the id of two images"),
    (lambda path: make_writer(path, ids=("a", "")), None, "'' is the id of two images, or empty"),
    (lambda path: make_writer(write(path / "mine", "").parent), None, "holds 'mine' and no "),
    (lambda path: make_writer(path, ids=range(10), num_regions=10**12), None, "B are free; choose"),
    (checking(features=(2, np.nan)), None, NOT_FINITE.format("features")),
    (checking(features=(0, 70_000)), None, NOT_FINITE.format("features")),  # float16 ends at 65504
    (checking(class_probs=(1, np.nan)), None, NOT_FINITE.format("class_probs")),
    *((checking(boxes=change), None, OUTSIDE) for change in ((2, 140), (3, 90), (0, -3))),
    (checking(boxes=(2, 4)), None, "image 7: a box whose x2 < x1 or y2 < y1; extract it again"),
    (importing(lambda cells: cells[:3]), None, rf"{TSV} \(near line 2: KeyError 3\)"),
    (importing(lambda cells: [*cells[:3], "x", *cells[4:]]), None, rf"{TSV} \(near line 2: .*'x'"),
    (importing(lambda cells: [*cells[:3], "3", *cells[4:]]), None, rf"{TSV} \(near line 2: "),
    (importing(lambda cells: [*cells[:4], cells[5], cells[5]]), None, rf"{TSV} \(near line 2: "),
    (importing(lambda cells: [*cells[:5], cells[4]]), None, rf"{TSV} \(near line 2: numbers per r"),
    (importing(lambda cells: [*cells[:10], encoded(np.ones((2, 9)), "<f4"), *cells[11:]], 13), None,
        rf"{TSV} \(near line 2: cls_prob of a region does not add up to 1"),
    (importing(list, 13, then=6), None, rf"{TSV} \(near line 1: numbers per region"),
    (importing(lambda cells: cells, 6, then=13), None, rf"{TSV} \(near line 1: numbers per region"),
    (lambda path: import_features([path], path), "", "no image with a region")]


@pytest.mark.parametrize("call, content, words", REFUSED)
def test_the_first_fault_is_named_with_its_file_and_place(tmp_path, call, content, words):
    path = tmp_path / "given"
    if content is not None:
        write(path, content)
    with pytest.raises(BadInput, match=words) as error:
        call(path)
    assert words.startswith("^") or str(error.value).startswith(str(tmp_path))
