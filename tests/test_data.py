"""What data.py promises: words, stores, scenes, masking."""

import json
import multiprocessing
import pickle
import re
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import (COLOURS, IGNORE, MATCH, MISMATCH, SHAPES, BadInput, FeatureStore,
    PretrainingDataset, Scene, WordPiece, build_vocab, canonical_id, collate, mask_tokens,
    normalise_boxes, split_words, write_whole)

# --- ids and files ---


@pytest.mark.parametrize(
    "name, expected",
    [("COCO_val2014_000000391895.jpg", "391895"), ("coco_train2014_000000391895.npz", "391895"),
        (391895, "391895"), ("000000391895", "391895"), ("1000092795.jpg", "1000092795"),
        ("0", "0"), ("a/b/dog_1.jpg", "dog_1"), ("cat_1.jpg", "cat_1"),
        ("dog.jpg.png", "dog"),
        ("v1.2 final", "v1.2 final")],
)
def test_every_spelling_of_an_id_becomes_one(name, expected):
    assert canonical_id(name) == expected


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "x.txt"
    write_whole(path, lambda f: f.write("old"))
    with pytest.raises(ZeroDivisionError):
        write_whole(path, lambda f: (f.write("new"), 1 / 0))
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


# --- WordPiece ---


@pytest.mark.parametrize(
    "text, words",
    [
        ("Hello, World!", ["hello", ",", "world", "!"]),
        ("Café naïve Ångström", ["cafe", "naive", "angstrom"]),
        ("don't re-do", ["don", "'", "t", "re", "-", "do"]),
        ("a\x00b\ufffdc\x07d", ["abcd"]),  # control characters vanish
        ("one\ttwo\nthree\u00a0four\u3000five", ["one", "two", "three", "four", "five"]),
        ("zero\u200bwidth", ["zerowidth"]),  # category Cf
        ("我爱cats", ["我", "爱", "cats"]),  # Chinese characters stand alone
        ("ひらがな", ["ひらかな"]),  # kana do not; NFD drops the voicing mark
        ("$5+3=8^2~`|<>", list("$5+3=8^2~`|<>")),  # ASCII symbols count as punctuation
        ("\u201cquoted\u201d\u2026", ["\u201c", "quoted", "\u201d", "\u2026"]),
        ("İ", ["i"]),
        ("", []),
        ("  \n ", []),
    ],
)
def test_words_are_split_as_bert_does(text, words):
    assert split_words(text) == words


@pytest.fixture
def bert(tmp_path):
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "un", "##aff", "##able", "##a", "play",
        "##ing", "##s", "!", "a", "affable"]
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(pieces) + "\n")
    return WordPiece(path)


@pytest.mark.parametrize(
    "text, pieces",
    [
        ("Unaffable", ["un", "##aff", "##able"]),
        ("playing plays!", ["play", "##ing", "play", "##s", "!"]),
        ("una", ["un", "##a"]), ("as", ["a", "##s"]),
        ("playxing", ["[UNK]"]),  # one part without a piece: the whole word
        ("x " + "a" * 101 + " a", ["[UNK]", "[UNK]", "a"]),  # over 100 characters
        ("affable", ["affable"]),
    ],
)  # the longest match wins
def test_pieces_are_the_longest_matches_from_the_left(bert, text, pieces):
    ids = bert.encode(text, 50)
    assert [bert.pieces[i] for i in ids] == ["[CLS]", *pieces, "[SEP]"]


def test_encoding_is_cut_to_the_limit_with_both_specials(bert):
    assert bert.encode("play play play play", 4) == [2, 9, 9, 3]
    assert bert.encode("", 4) == [2, 3]


@pytest.mark.parametrize(
    "content, complaint", [(b"hello\nworld\n", r"\[PAD\]"), (b"\xff\xfe", "vocabulary")])
def test_a_file_that_is_no_vocabulary_is_named(tmp_path, content, complaint):
    (tmp_path / "v.txt").write_bytes(content)
    with pytest.raises(BadInput, match=f"v.txt.*{complaint}"):
        WordPiece(tmp_path / "v.txt")


def test_a_built_vocabulary_covers_its_corpus_and_keeps_frequent_words_whole(tmp_path):
    texts = ["the red star"] * 50 + ["the blue star"] * 30 + ["a zebra"]
    pieces = build_vocab(texts)
    assert len(set(pieces)) == len(pieces) and pieces[:5] == list(data.SPECIALS)
    (tmp_path / "v.txt").write_text("\n".join(pieces) + "\n")
    tokenizer = WordPiece(tmp_path / "v.txt")
    for word in ("the", "red", "star", "blue"):
        assert tokenizer.split_word(word) == [word]
    assert len(tokenizer.split_word("zebra")) > 1  # seen once: in parts, but not [UNK]
    assert tokenizer.unk_id not in tokenizer.encode("zebra", 50)
    assert len(build_vocab(texts, size=20)) == 20


def test_merging_finds_the_most_frequent_pair_first():
    """Pairs of 'abab' x 10, 'abc' x 5, by hand: (a, ##b) is seen 15 times, (##b, ##a) and (##a,
    ##b) 10.
    """
    pieces = build_vocab(["abab"] * 10 + ["abc"] * 5)
    assert pieces[5:9] == ["##a", "##b", "##c", "a"] and pieces[9] == "ab"


# --- feature store ---


def test_a_store_gives_back_what_was_written(store):
    row = store.row("COCO_val2014_000000000003")
    record = store[row]
    assert row == 3 and record["size"] == (100, 80)
    assert record["features"].shape == (4, 12) and record["boxes"].shape == (4, 4)
    assert store.class_probs(row).sum(1) == pytest.approx(1, abs=2e-3)
    rng = np.random.default_rng(0)
    first = rng.random((1, 2)) * 50, rng.random((1, 7)), rng.normal(size=(1, 12))
    assert store[0]["boxes"][0, :2] == pytest.approx(first[0][0], rel=1e-6)
    assert store[0]["features"][0] == pytest.approx(first[2][0], rel=1e-3)  # float16


def test_an_id_that_is_not_in_the_store_has_no_row(store):
    assert store.row("99") is None and store.row("no such") is None and store.row("zzz") is None


def make_writer(folder, ids=("a", "b", "c"), **settings):
    return FeatureStore.create(
        folder, ids, **{**dict(num_regions=2, feature_size=3, detector="d"), **settings})


def fill(writer, rows):
    for row in rows:
        writer.write(row, np.full((2, 3), row), np.full((2, 4), row), (10, 10))


def test_a_half_written_store_is_refused_and_can_be_finished(tmp_path):
    fill(make_writer(tmp_path / "s"), [0, 2])
    assert not FeatureStore.is_complete(tmp_path / "s")
    with pytest.raises(BadInput, match=r"half-written .*2 of 3"):
        FeatureStore(tmp_path / "s")
    writer = make_writer(tmp_path / "s")
    assert writer.pending() == [1]
    with pytest.raises(BadInput, match="1 images are not written"):
        writer.finish()
    fill(writer, [1])
    assert writer.finish()[1]["features"].tolist() == [[1, 1, 1]] * 2


def test_a_failed_image_is_not_in_the_store(tmp_path):
    writer = make_writer(tmp_path / "s")
    fill(writer, [0, 2])
    writer.fail(1, "no\npicture")
    store = writer.finish()
    assert [store.row(i) for i in "abc"] == [0, None, 2]


def test_a_store_of_other_images_or_settings_is_not_overwritten(tmp_path):
    make_writer(tmp_path / "s")
    with pytest.raises(BadInput, match="feature_size"):
        make_writer(tmp_path / "s", feature_size=4)
    with pytest.raises(BadInput, match="ids"):
        make_writer(tmp_path / "s", ids=("a", "b", "x"))
    with pytest.raises(BadInput, match="'a'"):
        make_writer(tmp_path / "t", ids=("a", "a.jpg"))


def test_damaged_stores_are_named(tmp_path):
    with pytest.raises(BadInput, match="store.json is missing"):
        FeatureStore(tmp_path)
    writer = make_writer(tmp_path / "s")
    fill(writer, range(3))
    writer.finish()
    np.save(tmp_path / "s" / "boxes.npy", np.zeros((3, 1, 4), np.float32))
    with pytest.raises(BadInput, match=r"boxes.npy: expected \(3, 2, 4\).*found \(3, 1, 4\)"):
        FeatureStore(tmp_path / "s")
    (tmp_path / "s" / "boxes.npy").write_bytes(b"nonsense")
    with pytest.raises(BadInput, match="boxes.npy: cannot be opened"):
        FeatureStore(tmp_path / "s")
    meta = json.loads((tmp_path / "s" / "store.json").read_text())
    (tmp_path / "s" / "store.json").write_text(json.dumps({**meta, "version": 99}))
    with pytest.raises(BadInput, match="version 1, found 99"):
        FeatureStore(tmp_path / "s")
    (tmp_path / "s" / "store.json").write_text("{")
    with pytest.raises(BadInput, match="store.json"):
        FeatureStore(tmp_path / "s")


def _sum_of_features(store, rows, queue):
    queue.put(sum(float(store[r]["features"].sum()) for r in rows))


def test_a_store_is_read_by_several_processes(store):
    """A pickled store carries its folder, not its arrays; spawned readers see the same."""
    assert len(pickle.dumps(store)) < 2000
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    parts = [context.Process(target=_sum_of_features, args=(store, rows, queue))
        for rows in (range(5), range(5, 10))]
    for p in parts:
        p.start()
    total = queue.get(timeout=60) + queue.get(timeout=60)
    for p in parts:
        p.join()
    assert total == pytest.approx(sum(float(store[r]["features"].sum()) for r in range(10)))


def test_boxes_are_normalised_by_hand():
    """In a picture 200 x 100: a box from (20, 10) to (120, 60) covers half of each side, a quarter
    of it.
    """
    assert normalise_boxes(np.array([[20, 10, 120, 60]], np.float32), (200, 100)).tolist() == [
        pytest.approx([0.1, 0.1, 0.6, 0.6, 0.25])]
    outside = normalise_boxes(np.array([[-5, 0, 300, 100]], np.float32), (200, 100))
    assert outside.tolist() == [[0, 0, 1, 1, 1]]


# --- toy world ---

SCENES = [Scene(n) for n in range(300)]


def test_a_scene_follows_from_its_number():
    a, b = Scene(7), Scene(7)
    assert a.things == b.things and a.captions() == b.captions() and a.questions() == b.questions()
    assert np.array_equal(np.asarray(a.draw()), np.asarray(b.draw()))
    a.captions(50)
    assert a.captions(4) == b.captions(4)
    assert Scene(8).things != a.things


def test_scenes_have_two_to_six_things_inside_and_apart():
    assert {len(s.things) for s in SCENES} == {2, 3, 4, 5, 6}
    for scene in SCENES:
        boxes = np.array([t.box for t in scene.things])
        assert boxes.min() >= 0 and boxes.max() <= 128
        for i, a in enumerate(boxes):
            for b in boxes[:i]:
                assert min(a[2], b[2]) <= max(a[0], b[0]) or min(a[3], b[3]) <= max(a[1], b[1])


def test_half_of_the_things_share_colour_or_shape_by_construction():
    """A copied word, or one that agrees by chance: the share must be above one half, and not near
    one.
    """
    later = [(t, s.things[:i]) for s in SCENES for i, t in enumerate(s.things) if i]
    share = np.mean(
        [any(t["colour"] == o["colour"] or t["shape"] == o["shape"] for o in before)
            for t, before in later]
    )
    assert 0.55 < share < 0.9


def test_a_thing_is_drawn_in_its_colour_within_its_box():
    for scene in SCENES[:50]:
        pixels = np.asarray(scene.draw()).astype(int)
        for thing in scene.things:
            x1, y1, x2, y2 = thing.box
            of_colour = np.abs(pixels - COLOURS[thing["colour"]]).sum(-1) == 0
            inside = of_colour[y1:y2, x1:x2]
            assert inside.mean() > 0.2, thing
            # it touches all four sides of its box, to a pixel or two
            rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
            assert rows[0] <= 2 and columns[0] <= 2
            assert rows[-1] >= y2 - y1 - 5 and columns[-1] >= x2 - x1 - 3


def words_of(name):
    return {k: w for k, options in (("size", data.SIZES), ("colour", COLOURS), ("shape", SHAPES))
        for w in name.split() if w in options}


def holds(a, relation, b):
    (ax, ay), (bx, by) = a["centre"], b["centre"]
    return {"left of": ax < bx, "right of": ax > bx, "above": ay < by, "below": ay > by}[relation]


def split_relation(text):
    return next(((r, *text.split(f" {r} ")) for r in data.RELATIONS if f" {r} " in text), None)


def is_at(thing, text):
    x, y = (c / 64 - 1 for c in thing["centre"])  # from -1 to 1
    place = next((p for p in ("left", "right", "top", "bottom", "middle") if p in text), None)
    return {"left": -x >= max(abs(y), 0.25), "right": x >= max(abs(y), 0.25),
        "top": -y >= max(abs(x), 0.25), "bottom": y >= max(abs(x), 0.25),
        "middle": max(abs(x), abs(y)) < 0.25, None: True}[place]


def test_captions_are_true_of_their_picture():
    kinds = Counter()
    for scene in SCENES:
        for caption in scene.captions():
            kinds[split_relation(caption) is None] += 1
            if not split_relation(caption):
                for name in caption.split(" and "):
                    placed = [t for t in scene.where(**words_of(name)) if is_at(t, name)]
                    assert placed, caption
                continue
            relation, first, rest = split_relation(caption)
            second, *more = rest.split(" and ")
            pairs = [(a, b) for a in scene.where(**words_of(first))
                for b in scene.where(**words_of(second))]
            assert any(holds(a, relation, b) for a, b in pairs if a is not b), caption
            assert all(scene.where(**words_of(name)) for name in more), caption
    assert 0.45 < kinds[True] / kinds.total() < 0.55


def test_questions_have_the_answer_that_the_picture_gives():
    seen = Counter()
    for scene in SCENES:
        for question, answer, kind in scene.questions():
            seen[kind] += 1
            words = words_of(question.replace("crosses", "cross") .replace("rings", "ring")
                .replace("circles", "circle") .replace("squares", "square")
                .replace("triangles", "triangle") .replace("stars", "star"))
            if kind in ("colour", "shape"):
                assert [t[kind] for t in scene.where(**words)] == [answer], question
            elif kind == "count":
                assert str(len(scene.where(**words))) == answer, question
            elif question.startswith("what colour"):  # of the one that a relation finds
                relation, first, second = split_relation(question)
                (mark,) = scene.where(**words_of(second))
                found = [t for t in scene.where(**words_of(first)) if holds(t, relation, mark)]
                assert [t["colour"] for t in found] == [answer], question
            elif kind == "existence":
                assert bool(scene.where(**words)) == (answer == "yes"), question
            else:
                if " or " in question:  # 'left of or right of': put in the one that is the answer
                    chosen = f"{answer} of" if answer in ("left", "right") else answer
                    question = re.sub(r"(\w+ of|above|below) or \w+( of)?", chosen, question)
                    answer = "yes"
                relation, first, second = split_relation(question)
                (a,), (b,) = scene.where(**words_of(first)), scene.where(**words_of(second))
                assert holds(a, relation, b) == (answer == "yes"), question
    assert min(seen[k] for k in ("colour", "shape", "count", "existence", "relation")) > 200


def test_the_words_of_a_question_do_not_give_its_answer_away():
    """The best guess from the question's type alone, and yes against no, stay near chance."""
    answers = {}
    for number in range(2000):
        for _, answer, kind in Scene(number).questions():
            answers.setdefault(kind, Counter())[answer] += 1

    def best(kind):
        return max(answers[kind].values()) / answers[kind].total()

    assert best("colour") < 0.2 and best("shape") < 0.25 and best("count") < 0.4
    assert best("existence") < 0.6 and best("relation") < 0.3


def test_expressions_mean_one_thing_and_relations_are_needed():
    seen = Counter()
    for scene in SCENES:
        for text, index, kind in scene.expressions():
            seen[kind] += 1
            if kind == "attribute":
                assert scene.where(**words_of(text)) == [scene.things[index]], text
                continue
            relation, first, second = split_relation(text)
            rivals, (mark,) = scene.where(**words_of(first)), scene.where(**words_of(second))
            assert len(rivals) > 1 and scene.things[index] in rivals, text
            assert [t for t in rivals if holds(t, relation, mark)] == [scene.things[index]], text
    assert min(seen.values()) > 100


def test_no_training_scene_is_a_held_out_scene():
    assert data.HELD_OUT_SCENES - data.TRAIN_SCENES >= 1_000_000
    assert Scene(data.TRAIN_SCENES).things != Scene(data.HELD_OUT_SCENES).things


def test_scenes_are_pictures_of_128_pixels():
    image = Scene(0).draw()
    assert isinstance(image, Image.Image) and image.size == (128, 128) and image.mode == "RGB"


# --- pretraining ---


def test_masking_rates_are_15_percent_and_80_10_10(tokenizer):
    rng = np.random.default_rng(0)
    ids = np.array(tokenizer.encode("a small red star left of the ring " * 50, 402))
    counts, total = Counter(), 0
    for _ in range(300):
        shown, labels = mask_tokens(ids, tokenizer, rng)
        places = labels != IGNORE
        assert (labels[places] == ids[places]).all() and (shown[~places] == ids[~places]).all()
        assert not places[[0, -1]].any()
        total += len(ids) - 2
        counts["masked"] += (shown[places] == tokenizer.mask_id).sum()
        counts["same"] += (shown[places] == ids[places]).sum()
        counts["all"] += places.sum()
    assert counts["all"] / total == pytest.approx(0.15, abs=0.005)
    assert counts["masked"] / counts["all"] == pytest.approx(0.8, abs=0.01)
    # A random piece is the right one now and then: 10 % + 10 % / vocabulary.
    assert counts["same"] / counts["all"] == pytest.approx(
        0.1 + 0.1 / (len(tokenizer) - 5), abs=0.01)


def test_random_pieces_are_never_special(tokenizer):
    rng = np.random.default_rng(0)
    ids = tokenizer.encode("a small red star", 20)
    shown = np.concatenate([mask_tokens(ids, tokenizer, rng)[0][1:-1] for _ in range(2000)])
    assert not set(shown) & {tokenizer.pad_id, tokenizer.unk_id, tokenizer.cls_id, tokenizer.sep_id}


CAPTIONS = [
    (f"COCO_train2014_{i:012d}", text)
    for i in range(10)
    for text in (("a small red star", "a large blue circle left of the ring")[i % 2],
        f"the ring a {'red ' * (i + 1)}")
]


def dataset(store, tokenizer, **settings):
    return PretrainingDataset(store, CAPTIONS, tokenizer, **settings)


def test_every_example_has_a_masked_piece_and_a_masked_region_shown_as_zeros(store, tokenizer):
    pairs = dataset(store, tokenizer)
    for index, example in enumerate(map(pairs.__getitem__, range(20))):
        assert (example["mlm_labels"] != IGNORE).any() and example["mrc_mask"].any()
        stored = store[pairs.rows[index]]["features"]
        expected = np.where(example["mrc_mask"][:, None], 0, stored)
        assert np.array_equal(example["region_features"], expected) and stored.any(axis=1).all()
        assert len(example["mrc_targets"]) == example["mrc_mask"].sum()


def test_regions_are_masked_at_15_percent(store, tokenizer):
    rng = np.random.default_rng(0)
    rate = np.mean([data.choose(36, rng, 0.15).mean() for _ in range(5000)])
    # 0.15, plus the forced one in the 0.85^36 = 0.3 % of pictures where none was drawn
    assert rate == pytest.approx(0.15 + 0.85**36 / 36, abs=0.002)


def test_half_of_the_captions_are_of_another_image(store, tokenizer, monkeypatch):
    monkeypatch.setattr(data, "mask_tokens", lambda ids, *_: (np.array(ids), np.array(ids)))
    pairs = dataset(store, tokenizer)
    caption_ids = {tuple(tokenizer.encode(t, 38)): set() for _, t in CAPTIONS}
    for image_id, text in CAPTIONS:
        caption_ids[tuple(tokenizer.encode(text, 38))].add(store.row(image_id))
    matches = []
    for epoch in range(60):
        for i in range(len(pairs)):
            example = pairs[epoch, i]
            matches.append(example["itm_labels"])
            if example["itm_labels"] == MATCH:
                assert store.row(CAPTIONS[i][0]) in caption_ids[tuple(example["input_ids"])]
    assert np.mean(matches) == pytest.approx(0.5, abs=4 * 0.5 / len(matches) ** 0.5)


def test_a_mismatched_caption_never_belongs_to_the_image(store, tokenizer):
    pairs = dataset(store, tokenizer)
    rng = np.random.default_rng(0)
    for index in range(len(pairs)):
        for _ in range(50):
            assert pairs.rows[pairs._other_image(index, rng)] != pairs.rows[index]


def same(a, b):
    return all(np.array_equal(a[k], b[k]) for k in a)


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
    words = [len(tokenizer.encode(CAPTIONS[i][1], 38)) for i in (0, 6)]
    batch = collate([pairs[0], pairs[6]])  # images 0 and 3: 1 and 4 regions
    assert (
        batch["input_ids"].shape == (2, max(words)) and batch["text_mask"].sum(1).tolist() == words)
    assert batch["region_features"].shape == (2, 4, 12)
    assert batch["region_mask"].tolist() == [[1, 0, 0, 0], [1, 1, 1, 1]]
    batch = collate([pairs[0], pairs[19]])
    assert (batch["mlm_labels"][0, words[0] :] == IGNORE).all() and (
        batch["input_ids"][0, words[0] :] == 0).all()
    rows, columns = batch["mrc_mask"].nonzero(as_tuple=True)
    expected = [
        store.class_probs(0 if r == 0 else 9)[c] for r, c in zip(rows.tolist(), columns.tolist())
    ]
    assert torch.equal(batch["mrc_targets"], torch.from_numpy(np.stack(expected)))


def test_captions_without_words_or_features_are_counted_and_left_out(store, tokenizer):
    pairs = PretrainingDataset(store, [*CAPTIONS, ("77", "a ring"), ("3", "  ")], tokenizer)
    assert len(pairs) == 20 and pairs.skipped == {"without features": 1, "without words": 1}
    with pytest.raises(BadInput, match="of 2 captions, 1 .* not in this store and 1 are empty"):
        PretrainingDataset(store, [("77", "a ring"), ("3", "")], tokenizer)


def test_labels_of_data_and_model_agree():
    import switchbert

    assert (data.MATCH, data.MISMATCH, data.IGNORE) == (switchbert.MATCH, switchbert.MISMATCH,
        switchbert.IGNORE)
    assert MISMATCH != MATCH
