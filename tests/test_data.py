"""What data.py promises: files, words, stores, masking, captions, published features, toys."""

import argparse
import base64
import contextlib
import errno
import fcntl
import io
import json
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import time
import zlib
from collections import Counter
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import ImageColor

import data
from data import (COUNT, MATCH, MISMATCH, NATURAL, RATE, SHARE, BadInput, FeatureStore,
    PretrainingDataset, Scene, StoreWriter, WordPiece, build_vocab, canonical_id, collate,
    import_features, mask_tokens, normalise_boxes, only_run_in, read_captions, read_json, run,
    split_words, write_whole)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_bytes(text.encode())  # line ends stay as they are
    return path


# --- small rules ---


@pytest.mark.parametrize("names, expected", [(("0", "000.jpg"), "0"),
    (("coco_train2014_000000391895.npz", "000391895.txt", 391895), "391895"),
    (("a/b/dog_1.jpg", "dog_1", "dog_1.JPEG.png"), "dog_1"), (["v1.2 final"], "v1.2 final"),
    (("a\\dog_1.jfif", " dog_1 ", "dog_1.jpg #3", "dog_1.jpg.txt"), "dog_1"),
    (["room#1.jpg"], "room#1"), (["room#1", "room.jpg"], "room"),  # a name; a caption's number
    (("cafe\u0301.HEIC", "caf\u00e9"), "caf\u00e9")])  # an accent in two characters and in one
def test_every_spelling_of_an_image_id_becomes_one(names, expected):
    assert {canonical_id(name) for name in names} == {expected}


@pytest.mark.parametrize("found, words", [("ab", "names: 2 of 2 found in here"),
    ("abcd", "names: 2 of 4 found in here"),
    ("abcde", "names: 2 of 5 found in here; those that did not meet: 'c' and 'x'"),
    ("c", None)])
def test_what_was_found_is_counted_and_shown_where_most_is_missing(capsys, found, words):
    """'a', 'b' and 'x' are there. Of nothing found, the same sentence is an error."""
    wanted, known = np.array([*found], "S"), np.array([*"abx"], "S")
    arguments = "names", wanted, np.isin(wanted, known), "here", known
    if words:
        data.say_found(*arguments)
        assert capsys.readouterr().out == words + "\n"
    else:
        with pytest.raises(BadInput, match="0 of 1 found in here; .*: 'c' and 'a'"):
            data.say_found(*arguments)


def test_a_file_that_git_lfs_has_not_fetched_is_named(tmp_path):
    path = write(tmp_path / "bert/vocab.txt", "version https://git-lfs.github.com/spec/v1\noid 1\n")
    for read in (lambda: WordPiece(path), lambda: FeatureStore(path.parent)):
        with pytest.raises(BadInput, match="git-lfs has not fetched .*bert/vocab.txt yet: git lfs"):
            read()


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = write(tmp_path / "x.txt", "old")

    def fill_the_disk(file):
        file.write("new")
        file.flush()
        assert path.read_text() == "old"  # also while the new one is written
        try:
            raise OSError(28, "No space left on device")
        finally:
            raise RuntimeError("unexpected pos")  # so torch.save words it

    with pytest.raises(OSError, match="No space left on device: .*x.txt"):
        write_whole(path, fill_the_disk)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    write_whole(path, lambda file: file.write("new"))
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("fault, status, words", [
    (BadInput("a.tsv: line 3"), 1, "error: a.tsv: line 3\n"),
    (OSError(28, "No space left on device", "x.npy"), 1, "error: [Errno 28] No space"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), 1, "fewer --workers"),
    (lambda: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(5)), 130, "stopped")])
def test_a_script_ends_with_a_sentence_and_a_bug_with_its_traceback(capsys, fault, status, words):
    with pytest.raises(SystemExit) as end:
        run(Mock(side_effect=fault))
    assert end.value.code == status and words in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="CUDA error"):
        run(Mock(side_effect=RuntimeError("CUDA error")))
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.mark.parametrize("kind, fits, refused", [(COUNT, "1", ["0", "1.5", "9" * 30]),
    (NATURAL, "0", ["-1"]), (RATE, "1e-4", ["0", "nan", "inf"]), (SHARE, "1", ["1.01", "x"])])
def test_flags_take_what_is_in_their_range_and_refuse_the_rest(kind, fits, refused):
    assert kind(fits) == float(fits)
    parser = argparse.ArgumentParser(exit_on_error=False)
    data.flag(parser, "--x", kind, None, "")
    assert f"--x {kind.__name__}" in parser.format_help()
    for text in refused:
        words = f"--x: invalid {kind.__name__} value: '{text}'"
        with pytest.raises(argparse.ArgumentError, match=re.escape(words)):
            parser.parse_args([f"--x={text}"])


def hold(folder, held):
    with only_run_in(folder):
        multiprocessing.Process(target=time.sleep, args=(5,), daemon=True).start()  # a loader
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


@pytest.mark.parametrize("error, held", [(errno.EAGAIN, True), (errno.EACCES, True),
    (errno.EPERM, False), (errno.ENOLCK, False), (errno.ENOSYS, False), (errno.EOPNOTSUPP, False)])
def test_only_a_lock_that_is_held_means_a_second_run(tmp_path, monkeypatch, capsys, error, held):
    """Network disks have none: the run says so, and goes on. The lock lies in the folder: that may
    be all that is writable.
    """
    monkeypatch.setattr(fcntl, "lockf", Mock(side_effect=OSError(error, os.strerror(error))))
    with pytest.raises(BadInput, match="another run") if held else contextlib.nullcontext():
        with only_run_in(tmp_path / "run"):
            assert [path.name for path in tmp_path.rglob("*")] == ["run", ".lock"]
    assert held or "run: cannot be locked; start no second run" in capsys.readouterr().out


def test_off_a_terminal_progress_is_a_line_a_minute():
    """And nothing of what takes less. Here a minute is a tenth of a second."""
    log = io.StringIO()
    for _ in data.progress(range(3), "short", file=log):
        time.sleep(0.05)
    assert log.getvalue() == ""
    minute = dict(delay=0.1, mininterval=0.1, maxinterval=0.1)
    for _ in data.progress(range(4), "long", file=log, **minute):
        time.sleep(0.12)
    assert re.search(r"long: +75%.*3/4 \[.*it/s\].*\n$", log.getvalue(), re.S)


START = """
import os, sys, time
if "RANK" not in os.environ:
    import data
    sys.exit(data.run(lambda: data.start_processes(2)))
if os.environ["RANK"] == "0":
    time.sleep(60)
"""


SLOW = pytest.mark.slow


@pytest.mark.parametrize("event, status, words", [pytest.param("sys.exit(7)", 7, "", marks=SLOW),
    pytest.param("os.kill(os.getpid(), 9)", 1,
        "error: a process was ended by signal 9; .*--resume\n", marks=SLOW),
    ("time.sleep(1); os.kill(os.getppid(), 15); time.sleep(60)", 130, "")])
def test_a_process_that_fails_and_sigterm_end_all_processes(event, status, words):
    """`subprocess.run` waits for all that write to its pipes: they end before its timeout."""
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.path.dirname(data.__file__)}
    end = subprocess.run([sys.executable, "-c", START + event], env=env, timeout=50,
        text=True, capture_output=True)
    assert end.returncode == status and re.fullmatch(words, end.stderr)


# --- words ---


@pytest.mark.parametrize("text, words", [("naïve Ångström", ["naive", "angstrom"]), (" \n ", []),
    ("a\x00b\ufffdc\x07d\u200be", ["abcde"]),  # control characters and category Cf vanish
    ("one\ttwo\nthree\u00a0four\u3000five", ["one", "two", "three", "four", "five"]),
    ("我爱cats", ["我", "爱", "cats"]), ("ひらがな", ["ひらかな"]),  # kana do not stand alone
    ("$5+3=8^2~`|<>", list("$5+3=8^2~`|<>")),  # ASCII symbols count as punctuation
    ("\u201cquoted\u201d\u2026", ["\u201c", "quoted", "\u201d", "\u2026"]), ("İ", ["i"])])
def test_words_are_split_as_bert_does(text, words):
    assert split_words(text) == words


PIECES = [*data.SPECIALS, *"un ##aff ##able ##a play ##ing ##s ! a affable".split()]


def test_pieces_are_the_longest_matches_from_the_left(tmp_path):
    expected = {"Unaffable": ["un", "##aff", "##able"], "affable": ["affable"],
        "playing plays!": ["play", "##ing", "play", "##s", "!"],
        "playxing": ["[UNK]"],  # one part without a piece: the whole word
        "a" + 49 * "s" + " a" + 100 * "s": ["a", *49 * ["##s"], "[UNK]"]}  # over 100 characters
    path = write(tmp_path / "vocab.txt", "".join(p + "\r\n" for p in PIECES))
    for tokenizer in (WordPiece(path), WordPiece(PIECES)):
        for text, pieces in expected.items():
            ids = tokenizer.encode(text, 99)
            assert [tokenizer.pieces[i] for i in ids] == ["[CLS]", *pieces, "[SEP]"]
    assert tokenizer.encode("play play play play", 4) == [2, 9, 9, 3]  # cut, specials counted


@pytest.mark.parametrize("pieces, settings", [([*PIECES, "Play"], {}),
    (PIECES, {"do_lower_case": False})])
def test_a_cased_vocabulary_is_refused(tmp_path, pieces, settings):
    path = write(tmp_path / "vocab.txt", "\n".join([*pieces, "<S>", "[unused1]"]))
    write(tmp_path / "tokenizer_config.json", settings)
    with pytest.raises(BadInput, match="vocab.txt: .*it is of a cased BERT"):
        WordPiece(path)


def test_a_built_vocabulary_is_specials_characters_and_frequent_words():
    texts = ["bb a dd"] * 2 + ["Dd!", "ca"]
    expected = [*data.SPECIALS, *"!abcd", "##!", "##a", "##b", "##c", "##d", "dd", "bb"]
    assert build_vocab(texts) == expected and build_vocab(texts, size=16) == expected[:16]


# --- the feature store ---


def make_writer(folder, ids=("a", "b", "c"), num_regions=2, feature_size=3):
    return FeatureStore.create(folder, ids, num_regions, feature_size)


def fill(writer, rows=range(3)):
    for row in rows:
        writer.write(row, np.full((2, 3), row), np.full((2, 4), row), (10, 10))
    return writer


def test_rows_of_many_images_are_the_rows_of_each_and_failed_images_have_none(tmp_path):
    ids = ["zebra", "10", "9", "café", "b", "000000000200.jpg"]
    writer = fill(make_writer(tmp_path / "s", ids), [0, 1, 2, 3, 5])
    writer.fail(4, "no\npicture")
    store = writer.finish()
    assert (tmp_path / "s/failed.txt").read_text() == "b\tno picture\n"
    rows = {"9": 2, "COCO_val2014_000000000200.jpg": 5, "zzz": -1, "b": -1, "zebra": 0, 10: 1,
        "": -1, "café": 3, "a": -1, 9: 2}
    assert store.rows(rows).tolist() == [*rows.values()]


def test_a_store_keeps_the_names_it_was_written_with_and_is_asked_in_any_spelling(tmp_path):
    """Earlier versions kept two-character accents, and suffixes that they did not know."""
    ids = ["xxxxxxxx", "yyyyyyyy", "room#1.jpg", "room#2.jpg"]
    folder = fill(make_writer(tmp_path, ids), range(4)).finish().folder
    written = np.array(["cafe\u0301".encode(), b"b.jfif", b"room#1", b"room#2"], "S8")
    np.save(folder / "ids.npy", written)
    store = FeatureStore(folder)
    assert store.rows(["caf\u00e9.jpg", "cafe\u0301", "b", "room#2.png"]).tolist() == [0, 0, 1, 3]
    assert np.array_equal(store.ids, written)


def test_distributions_over_classes_follow_from_the_detectors_last_layer(tmp_path):
    rng, some = np.random.default_rng(0), np.array([True, False, True, False])
    weight, bias = rng.normal(size=(7, 12)), np.array([3.0, -1, 0, 1, 0, 1, 2])
    features = rng.normal(size=(4, 12)).astype(np.float16)
    expected = torch.tensor(features @ weight.T + bias).softmax(1).numpy()
    writer = FeatureStore.create(tmp_path, ["7"], 5, 12, class_head=[weight, bias])
    writer.write(0, features, np.ones((4, 4)), (10, 10))
    store = writer.finish()
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
    right = 0.1 + 0.1 / (len(tokenizer) - 5)  # a random piece is the right one now and then
    assert (shown == ids).mean() == pytest.approx(right, abs=0.01)


def test_half_of_the_pairs_are_masked_and_half_of_the_others_mismatched(store, tokenizer):
    pairs, wholes, matches, others, shares = dataset(store, tokenizer), [], [], set(), []
    for epoch, index in np.ndindex(60, len(pairs)):
        example, row = pairs[epoch, index], index // 2
        words, places = example["input_ids"], example["mlm_positions"]
        hidden, classes = example["region_hidden"], example["mrc_positions"]
        assert len(words) == index + 3  # the caption stays, whatever picture comes with it
        shown = [k for k in range(10)
            if np.array_equal(example["region_features"], store[k]["features"])]
        wholes.append(example["itm_positions"].tolist() == [0])
        if not wholes[-1]:
            shares.append(hidden.mean())
            assert shown == [row] and not len(example["itm_labels"])
            assert 0 < min(places) <= max(places) <= index + 1  # no specials
            assert classes.tolist() == np.flatnonzero(hidden).tolist()
            assert np.array_equal(example["mrc_targets"], store.class_probs(row)[classes])
            words[places] = example["mlm_labels"]
            assert words.tolist() == tokenizer.encode(CAPTIONS[index][1], 38)
        else:
            matches.append(example["itm_labels"].tolist() == [MATCH])
            assert (shown == [row]) == matches[-1] and not len(places) and not len(classes)
            assert words.tolist() == tokenizer.encode(CAPTIONS[index][1], 38) and not hidden.any()
            others.update(shown)
    for halves in (wholes, matches):
        assert np.mean(halves) == pytest.approx(0.5, abs=4 * 0.5 / len(halves) ** 0.5)
    assert others == {*range(10)}
    # Of 1 to 5 regions 15 % are hidden; one, if none was drawn.
    expected = np.mean([0.15 + 0.85**n / n for n in range(1, 6)])
    assert min(shares) > 0
    assert np.mean(shares) == pytest.approx(expected, abs=0.03)


def test_pairs_may_be_whole_or_without_pictures_or_classes(store, tokenizer, tmp_path):
    whole = collate([*dataset(store, tokenizer, masking=False)])
    assert not len(whole["mlm_labels"]) and not whole["region_hidden"].any()
    assert {*whole["itm_labels"].tolist()} == {MATCH, MISMATCH}
    blind = collate([*dataset(store, tokenizer, blind=True)])
    assert blind["region_mask"].tolist() == [[0]] * 20 and not len(blind["itm_labels"])
    assert len(blind["mlm_labels"]) >= 20 and not len(blind["mrc_positions"])
    pairs = [("a", "red"), ("b", "star")] * 5
    plain = collate([*PretrainingDataset(fill(make_writer(tmp_path)).finish(), pairs, tokenizer)])
    assert plain["region_hidden"].any() and not len(plain["mrc_positions"])
    assert plain["mrc_targets"] is None


def test_an_example_follows_from_seed_epoch_and_index_in_any_process(store, tokenizer):
    pairs, other = dataset(store, tokenizer), dataset(store, tokenizer, seed=4)
    assert same(pairs[7], pairs[0, 7]) and not same(pairs[19], pairs[1, 19])
    assert not same(pairs[19], other[19])
    assert same(pickle.loads(pickle.dumps(pairs))[7], pairs[7])
    assert len(pickle.dumps(store)) < 2000  # it carries its folder, not its arrays
    one, two = torch.utils.data.DataLoader(pairs, 10, num_workers=2, collate_fn=collate)
    assert same(one, collate([*pairs][:10])) and same(two, collate([*pairs][10:]))


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
    steps = dict(mlm_positions=10, mrc_positions=4, mlm_labels=0, mrc_targets=0)
    for name, step in steps.items():
        first, second = (e[name] for e in examples)
        assert np.array_equal(batch[name], [*first, *(step + second)])
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
        assert same.checksum == captions.checksum and same.checksum[0] == count
    for change in (lambda pair: (pair[0], pair[1] + "!"), lambda pair: (f"x{pair[0]}", pair[1])):
        changed = data.Captions([*map(change, expected[:1]), *expected[1:]])
        assert (changed.checksum == captions.checksum) == (count == 0)
    assert list(captions[odd]) == list(captions[np.flatnonzero(odd)]) == expected[1::2]


# --- captions and features as they are published ---

URL = "http://lh6.ggpht.com/-IvRtNLNcG8o/TpFyrudaT6I/IMG_3422.JPG?imgmax=800"
BUS = [(str(zlib.crc32(URL.encode())), "a bus")]
COCO = {"images": [{"id": 9, "file_name": "COCO_train2014_000000000009.jpg"}], "annotations": [
    {"image_id": 318556, "id": 48, "caption": "A bathroom"}, {"image_id": 9, "caption": "A bus"}]}
FLICKR = {"images": [{"split": "train", "filename": "1000092795.jpg",
    "sentences": [{"raw": "Two guys."}, {"raw": "Two men."}]}]}
KARPATHY = {"images": [{"cocoid": i, "imgid": 0, "filename": f"COCO_val2014_{i:012d}.jpg",
    "split": s, "sentences": [{"raw": s}]} for i, s in enumerate(["restval", "train", "val"])]}


# As annotation tools export it: images are counted from 1, only the file's name tells which it is.
COUNTED = {"images": [{"id": 1, "file_name": "a\\000000000003.png"}, {"id": "2"}],
    "annotations": [{"image_id": i, "caption": f"{i}"} for i in ("1", 1, 2)]}
TWICE = [{"id": 1, "file_name": "a/3.png"}, {"id": 2, "file_name": "b/3.png"}]
LISTED = [{"image": "coco/dog_1.jpg", "caption": "a dog"}, {"image": "2", "caption": ["b", "c"]}]
NAMED = {"images": [{"filename": s, "split": s, "sentences": [{"raw": s}]}
    for s in ("Training", "valid", "validation", "dev", "val2014", "testing")]}


@pytest.mark.parametrize("content, split, expected", [
    (f"a bus\t{URL}\n", None, BUS), (f"{URL}\ta bus\n", None, BUS),  # CC12M
    ("\ufeffdog_1\ta dog\r\n000000000042\ttwo\r\n", "train", [("dog_1", "a dog"), ("42", "two")]),
    ("dog_1\ta dog\n", "val", []), ("", None, []),
    ("dog_1 \ta dog\n\n \n", None, [("dog_1", "a dog")]),
    (COUNTED, None, [("3", "1"), ("3", "1"), ("2", "2")]),
    ("[so]\ta dog", None, [("[so]", "a dog")]),
    (LISTED, "train", [("dog_1", "a dog"), ("2", "b"), ("2", "c")]), ("\n [ ]", None, []),
    (NAMED, "val", [(name, name) for name in ("valid", "validation", "dev", "val2014")]),
    (COCO, None, [("318556", "A bathroom"), ("9", "A bus")]),
    (FLICKR, "train", [("1000092795", "Two guys."), ("1000092795", "Two men.")]),
    (KARPATHY, "val", [("2", "val")]),
    (KARPATHY, "train", [("0", "restval"), ("1", "train")])])
def test_every_published_form_is_recognised_by_its_content(tmp_path, content, split, expected):
    records = data.caption_records(write(tmp_path / "any.name", content))
    assert [(name, text) for name, text, its in records if split in (None, its)] == expected


def test_the_captions_of_a_folder_lie_beside_its_pictures(tmp_path, capsys):
    """A picture, or the JSON of img2dataset; in linked folders too. All else is counted."""
    home = tmp_path / "data"
    for name in ("00/000000012.jpg", "00/000000012.txt", "01/b.PNG", "01/b.png.txt", "2/c.json",
            "2/c.txt"):
        write(home / name, f" a ring in {name}\n")
    write(tmp_path / "elsewhere/d.gif", "")
    write(tmp_path / "elsewhere/d.txt", "\ufeffa dog")
    (home / "link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    for name in ("README.txt", "00/._000000012.txt", "00/.ipynb_checkpoints/000000012.txt",
            "labels/b.txt", "failed.txt"):
        write(home / name, "not a caption")
    write(home / "01/e.jpg", "")
    write(home / "01/e.txt", "0 0.5 9.5e-05 0.1 0.2")  # a box in YOLO's form
    write(home / "00000_stats.json", "{}")
    write(home / "features/store.json", "{}")
    write(home / "features/failed.txt", "7: no picture")
    (home / "00/loop").symlink_to(home, target_is_directory=True)
    expected = {"12": "00/000000012.txt", "b": "01/b.png.txt", "c": "2/c.txt"}
    assert dict(read_captions(home)) == {"d": "a dog"} | {
        name: f"a ring in {path}" for name, path in expected.items()}
    assert f"{home}: 4 of 8 .txt files are captions, beside 4 pictures" in capsys.readouterr().out
    write(tmp_path / "alone/x.txt", "a cat")
    write(tmp_path / "alone/info.json", "{}")
    assert list(read_captions(tmp_path / "alone")) == [("x", "a cat")]
    assert "1 of 1 .txt files are captions, beside 0 pictures" in capsys.readouterr().out
    (home / "link/d.txt").write_bytes(b"caf\xe9")
    with pytest.raises(BadInput, match="link/d.txt: not a caption in UTF-8"):
        list(read_captions(home))


# As their authors describe them; what '_' stands for is not used here.
COLUMNS = {6: "id w h n boxes features", 10: "id h w _ _ _ _ n boxes features",
    13: "id h w _ _ _ _ n boxes features probs _ _"}


def encoded(array):
    return base64.b64encode(array.astype("<f4").tobytes()).decode()


def published(columns):
    """(lines, records) of a file of pictures of 640 x 480, the third of which has no regions."""
    rng, lines, records = np.random.default_rng(columns), [], []
    for image_id, n in ((9, 1), (10, 2), (11, 0), (12, 3)):
        corners = np.sort(rng.random((n, 2, 2)) * 400, axis=1)
        arrays = dict(boxes=corners.reshape(n, 4), features=rng.normal(size=(n, 16)),
            probs=rng.dirichlet(np.ones(9), size=n))
        cells = dict(id=f"COCO_train2014_{image_id:012d}", w=640, h=480, n=n, _=encoded(np.ones(n)))
        cells |= {name: encoded(array) for name, array in arrays.items()}
        lines.append("\t".join(str(cells[name]) for name in COLUMNS[columns].split()) + "\n")
        records.append((image_id, arrays))
    return lines, records


@pytest.mark.parametrize("columns", [6, 10, 13])
def test_published_features_are_read_as_they_are(tmp_path, columns, capsys):
    lines, records = published(columns)
    if columns == 10:  # Python 3 wrote bytes as b'...'
        lines = [re.sub(r"\t([^\t\n]{8,})", r"\tb'\1'", line) for line in lines]
    files = [write(tmp_path / "a.tsv", lines[0]), write(tmp_path / "b.tsv", "".join(lines[1:]))]
    store = import_features(files, tmp_path / "store")
    assert len(store) == 3 and store.row(11) is None
    assert "4 lines hold 3 images; 1 lines are left out" in capsys.readouterr().out
    assert store.num_region_classes == (9 if columns == 13 else 0)
    for image_id, arrays in records[:2] + records[3:]:
        row = store.row(image_id)
        assert store[row]["size"] == (640, 480)
        assert store[row]["boxes"] == pytest.approx(arrays["boxes"])
        assert store[row]["features"] == pytest.approx(arrays["features"], rel=1e-3)  # float16
        if columns == 13:
            assert store.class_probs(row) == pytest.approx(arrays["probs"], rel=1e-3, abs=1e-6)


def test_lines_without_a_region_may_come_first_and_last(tmp_path):
    lines, records = published(13)
    file = write(tmp_path / "a.tsv", lines[2] + lines[0] + lines[2])
    store = import_features([file], tmp_path / "store")
    assert store.ids.tolist() == [b"9"] and store.num_region_classes == 9
    assert store[0]["features"] == pytest.approx(records[0][1]["features"], rel=1e-3)


def test_an_import_takes_each_image_once_and_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    """An image's first line counts. If its numbers are unusable, it fails alone."""
    lines, _ = published(13)
    lines[1] = lines[1].replace("480\t640", "90\t90")  # its boxes lie outside
    lines[2] = lines[0].replace("480\t640", "500\t500")
    file = write(tmp_path / "a.tsv", "".join(lines))
    store = import_features([file], tmp_path / "whole")
    assert [store.row(i) for i in (9, 10, 12)] == [0, None, 2] and store[0]["size"] == (640, 480)
    assert "10\timage 10: not regions" in (tmp_path / "whole/failed.txt").read_text()
    real, seen = StoreWriter.write, []

    def stopping(writer, row, **values):
        seen.append(row)
        if len(seen) == 3:
            raise KeyboardInterrupt
        real(writer, row, **values)

    monkeypatch.setattr(StoreWriter, "write", stopping)
    with pytest.raises(KeyboardInterrupt):
        import_features([file], tmp_path / "parts")
    import_features([file], tmp_path / "parts")
    assert seen == [0, 1, 2, 2]  # what is there is not written again
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "parts" / path.name).read_bytes() == path.read_bytes(), path


def test_check_says_what_a_store_and_captions_hold(tmp_path, store, capsys):
    captions = write(tmp_path / "mine.tsv", "3\ta dog\n4\t\n99\tno features\n3\tagain\n")
    data.main(["check", str(store.folder), str(captions)])
    printed = capsys.readouterr().out
    for words in ("10 images, 10 of them with regions\n", "detector: made up\n",
            r"mine.tsv: captions: 3 of 4 found in .*features\n    the first: \('3', 'a dog'\)"):
        assert re.search(words, printed), printed


# --- the toy world ---

SCENES = [Scene(n) for n in range(300)]
RELATION = re.compile(f"({'|'.join(data.RELATIONS)})")
WORDS = {*data.SIZES, *data.COLOURS, *data.SHAPES}
SINGULAR = {f"{shape}s": shape for shape in data.SHAPES} | {"crosses": "cross"}


def holds(a, relation, b):
    (ax, ay), (bx, by) = a.centre, b.centre
    return {"left of": ax < bx, "right of": ax > bx, "above": ay < by, "below": ay > by}[relation]


def is_at(thing, text):
    x, y = (c / 64 - 1 for c in thing.centre)  # from -1 to 1
    far = {"middle": 0.25, "left": -x, "right": x, "top": -y, "bottom": y}
    return all(far[place] == max(far.values()) for place in far if place in text)


def meant(scene, text):
    """The things that 'a star left of a red ring', 'small crosses' or 'a ring at the top' fits."""
    first, *rest = RELATION.split(text)
    words = {SINGULAR.get(word, word) for word in first.split()} & WORDS
    things = [t for t in scene.things if words <= {t.size, t.colour, t.shape} and is_at(t, first)]
    if rest:
        relation, second = rest
        marks = meant(scene, second)
        assert len(marks) == 1 or second.startswith(" a "), text  # 'the red ring' is the only one
        things = [t for t in things if any(holds(t, relation, mark) for mark in marks)]
    return things


def test_scenes_follow_from_their_number_and_things_lie_apart_and_fill_their_boxes():
    a, b = Scene(7), Scene(7)
    a.captions(50)  # more captions change nothing else
    for what in ("draw", "captions", "questions", "expressions"):
        assert getattr(a, what)() == getattr(b, what)()
    assert data.HELD_OUT_SCENES - data.TRAIN_SCENES >= 1_000_000
    assert {len(s.things) for s in SCENES} == {2, 3, 4, 5, 6}
    shared = []
    for scene in SCENES:
        pixels, taken = np.asarray(scene.draw(scale=2)), np.zeros((256, 256), bool)
        for i, thing in enumerate(scene.things):
            x1, y1, x2, y2 = (2 * c for c in thing.box)
            box, before = np.s_[y1:y2, x1:x2], scene.things[:i]
            assert min(thing.box) >= 0 and max(thing.box) <= 128 and not taken[box].any()
            taken[box] = True
            painted = (pixels[box] == ImageColor.getrgb(data.COLOURS[thing.colour])).all(-1)
            extent = np.ptp(np.argwhere(painted), axis=0).min()  # a star ends above its box
            assert painted.mean() > 0.2 and extent >= x2 - x1 - 10, thing
            shared.append(any(thing.colour == t.colour or thing.shape == t.shape for t in before))
    assert 0.45 < np.mean(shared) < 0.7  # half copy a word; some agree by chance, the first never


def test_captions_are_true_of_their_picture_and_half_of_them_compare():
    captions = [(scene, caption) for scene in SCENES for caption in scene.captions()]
    for scene, caption in captions:
        assert all(meant(scene, part) for part in caption.split(" and ")), caption
    compared = [bool(RELATION.search(caption)) for _, caption in captions]
    assert 0.45 < np.mean(compared) < 0.55


def test_questions_have_the_answer_that_the_picture_gives_and_no_answer_is_easy_to_guess():
    answers = {}
    for scene in map(Scene, range(1500)):
        for question, answer, kind in scene.questions():
            things, form = meant(scene, question), question.split()[0]
            answers.setdefault((kind, form), []).append(answer)
            if form == "what":
                (thing,) = things
                true = thing.shape if kind == "shape" else thing.colour
            else:
                true = str(len(things)) if form == "how" else "yes" if things else "no"
            assert answer == true, question
            if question.startswith("is the "):
                assert len(meant(scene, RELATION.split(question)[0])) == 1, question
    most = {("colour", "what"): 0.2, ("relation", "what"): 0.2, ("shape", "what"): 0.25,
        ("count", "how"): 0.4, ("existence", "is"): 0.6, ("relation", "is"): 0.55}
    assert answers.keys() == most.keys() and min(map(len, answers.values())) > 300
    for kind, given in answers.items():
        assert max(Counter(given).values()) / len(given) < most[kind], kind


def test_expressions_mean_one_thing_and_relations_are_needed():
    seen = Counter()
    for scene in SCENES:
        for text, index, kind in scene.expressions():
            seen[kind] += 1
            assert meant(scene, text) == [scene.things[index]], text
            alone = meant(scene, RELATION.split(text)[0])  # without its relation, if it has one
            assert (len(alone) > 1) == (kind == "relation"), text
    assert min(seen.values()) > 100


# --- what is refused, and where the fault lies ---


def writing(box=(5, 5, 100, 80), **changes):
    """Write a record of two regions with other values for some; it stays unwritten."""
    def run(path):
        record = dict(features=np.ones((2, 3)), boxes=np.array([(0, 0, 9, 9), box]),
            size=(100, 80), class_probs=np.full((2, 2), 0.5))
        writer = FeatureStore.create(path, ["7"], 2, 3, 2)
        try:
            writer.write(0, **record | changes)
        finally:
            assert writer.pending() == [0]
    return run


def opening(**changes):
    """Open a finished store with other settings; one that is None was lost."""
    def run(path):
        meta = fill(make_writer(path)).finish().meta | changes
        write(path / "store.json", {k: v for k, v in meta.items() if v is not None})
        FeatureStore(path)
    return run


def importing(path, *more):
    import_features([path, *more], path.with_name("store"))


def captions_of(path):
    return list(read_captions(path))


FIRST, SECOND = published(10)[0][:2]  # the second ends in two regions of 16 features
TSV = r"not a feature TSV of 6, 10 or 13 columns, all lines alike \("
RECORD = r"^image 7: not regions that can be stored \("
REFUSED = [  # (what is called, what lies at its path, words of the message behind the path)
    (read_json, '{"annotations": [', "not a whole JSON file .*line 1"),
    (captions_of, "a\tb\nc\td\te\n", "not a table of two columns, .*near caption 2: too many"),
    (captions_of, {"images": TWICE, "annotations": []}, "two of its images have the same id or fi"),
    (captions_of, {"images": TWICE[:1], "annotations": [{"image_id": 3, "caption": "a"}]},
        "near caption 1: KeyError '3'"),
    (captions_of, [{"image": "a", "caption": None}], "near caption 1: TypeError"),
    (captions_of, {"images": [{"split": "trein"}]}, "a split among train, val, .*, found 'trein'"),
    (captions_of, {"questions": []}, "near caption 1: KeyError 'images'"),
    (captions_of, {"annotations": [{"image_id": 1, "caption": None}]}, "near caption 1: Attrib"),
    (WordPiece, "hello\nworld\n", r"not BERT's vocabulary: .*'\[PAD\]'"),
    (FeatureStore, None, "not a feature store; extract_features.py .*store.json is missing"),
    (opening(num_regions=1), None, r"near array boxes: expected \(3, 1, 4\) .* found \(3, 2, 4\)"),
    (opening(id_bytes=9), None, r"near array ids: expected \(3,\) S9, found \(3,\) \|S1"),
    (opening(version=99), None, "expected version 1, found 99"),
    (opening(version=None), None, "KeyError 'version'"),
    (opening(complete=None), None, "KeyError 'complete'"),
    (lambda path: (make_writer(path), make_writer(path, ids="abx", feature_size=4)), None,
        "holds a feature store of other images or settings .*differs in feature_size, ids"),
    (lambda path: fill(make_writer(path), [0, 2]).finish(), None, "1 images are not written"),
    (lambda path: FeatureStore(make_writer(path).folder), None, "a half-written .*; repeat the"),
    (lambda path: make_writer(path, ids=("a", "a.jpg")), None,
        "'a' is the id of two images, a and a.jpg; rename one"),
    (lambda path: make_writer(path, num_regions=10**12), None, "expected .* GB of free disk"),
    (importing, "", "no image with a region"),
    (importing, f"{FIRST}a\tb\tc\n", f"{TSV}near line 2: KeyError 3"),
    (importing, FIRST + SECOND[:-45], f"{TSV}near line 2: cannot reshape"),  # a cut file
    (importing, FIRST + SECOND.replace("=", "?="), f"{TSV}near line 2: .*base64"),
    (lambda path: importing(path, write(path.with_name("b.tsv"), published(13)[0][0])), FIRST,
        f"b.tsv: {TSV}near line 1: cannot reshape"),
    (lambda path: data.main(["import", str(path), "-o", f"{path}.store"]),
        FIRST.replace("\t640\t", "\t0\t"), "no image could be used: see .*failed.txt"),
    (writing(features=np.full((2, 3), np.nan)), None, f"{RECORD}features with NaN or infinity"),
    (writing(features=np.full((2, 3), 7e4)), None, f"{RECORD}features with NaN"),  # > float16
    (writing(class_probs=np.ones((2, 2))), None, f"{RECORD}class_probs that do not add up to 1"),
    *((writing(box), None, rf"{RECORD}a box outside its picture of \(100, 80\) .*or with x2 < x1")
        for box in ((5, 5, 140, 9), (5, 5, 9, 90), (-3, 5, 9, 9), (5, 5, 4, 9), (5, 5, 9, np.nan))),
    (writing(features=np.ones((0, 3)), boxes=np.ones((0, 4))), None, f"{RECORD}0 regions in"),
    (writing(size=(0, 80), boxes=np.zeros((2, 4))), None, f"{RECORD}2 regions in a picture of"),
    (writing(boxes=np.ones((1, 4))), None, rf"{RECORD}.*boxes \(2, 4\), found \(1, 4\)")]


@pytest.mark.parametrize("call, content, words", REFUSED)
def test_the_first_fault_is_named_with_its_file_and_place(tmp_path, call, content, words):
    path = tmp_path / "given"
    if content is not None:
        write(path, content)
    with pytest.raises(BadInput, match=words) as error:
        call(path)
    assert words[0] == "^" or str(error.value).startswith(str(tmp_path))
