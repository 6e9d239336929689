r"""data.py: from a folder of files to a batch of tensors
======================================================

Where this stands

    extract_features.py --writes--> feature store --read by--> data.py --batches--> train.py

A batch begins as captions and the ids of their images. Everything in between happens here:

    caption "a small red star"                image id
        |  WordPiece                              |  FeatureStore (memory-mapped, float16)
        v                                         v
    [CLS] a small red star [SEP]              features (R, F)   boxes (R, 4)   classes (R, C)
        |  15% of the pieces -> [MASK]            |  15% of the regions are hidden
        v                                         v  boxes / (W, H), and their area
    input_ids   (B, T)                        region_features (B, R, F)   region_hidden (B, R)
    text_mask   (B, T)                        region_boxes    (B, R, 5)   region_mask   (B, R)
        |                                         |
        +-----------------> labels <--------------+
            mlm_positions (K,)   which of the B T pieces are predicted; mlm_labels (K,)
            mrc_positions (K',)  which of the B R regions are predicted; mrc_targets (K', C)
            itm_positions (K",)  which of the B pairs are shown whole: the model says whether
                                 they match; itm_labels (K"): MATCH or MISMATCH

Letters: B batch, T word pieces, R regions, F region feature, C region classes, K, K' and K"
the predicted pieces, regions and matches of a batch, (W, H) width and height of an image. In
a mask, 1 stands for what is real and 0 for padding.

Map of the file (* = read this first)

    1. WordPiece               BERT's uncased tokenizer
    2. Feature store           the contract between detector and model: a folder of .npy files
    3. Pretraining examples  * masking, mismatches, labels, batches
    4. Captions                the published caption files, recognised by their content
    5. Published features      a store from bottom-up attention's TSV files
    6. Toy world             * drawn scenes with captions, questions and referring expressions
    7. Machine room            ids, errors, whole files, flags, processes: what scripts share
    8. Command line            check, import

    $ python data.py check runs/world/features-3600
    runs/world/features-3600: a feature store of 4,000 images, 4,000 of them with regions

    $ python data.py import train2014_obj36.tsv val2014_obj36.tsv -o data/features

Three names from the machine room appear early. BadInput is the exception for a fault in the
user's files. `with reading(path, what)` turns any error in its block into BadInput. And
canonical_id(name) gives an image one id, however the files at hand spell it.

Every random choice in an example depends on (seed, epoch, index) alone. So an example is the
same with 0 or 8 loading processes, on 1 or 8 GPUs, and in a run that was killed and resumed.

Where the paper is silent, the code says ASSUMPTION An; where it departs from the paper, it
says DEVIATION Dn. The README lists all of them. Here: A7 (masking rates, boxes, mismatches)
and A9 (the background class).
"""

import argparse
import base64
import contextlib
import errno
import functools
import json
import logging
import math
import os
import re
import shutil
import signal
import string
import sys
import time
import types
import unicodedata
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

# Operators that Apple's GPU lacks run on the CPU instead. torch reads this on import, so the
# other scripts import data.py first.
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")

import numpy as np
import torch
import torch.distributed.run
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch.distributed.elastic import multiprocessing
from torch.utils.data import DataLoader
from tqdm import tqdm

from switchbert import MATCH, MISMATCH

# --- 1. WordPiece -------------------------------------------------------------------------
#
# BERT reads pieces of words. A text is cleaned and split into words (split_words), and each
# word into the longest pieces that a vocabulary has (WordPiece):
#
#     "Unaffable!"  ->  unaffable !  ->  un ##aff ##able !  ->  [CLS] un ##aff ##able ! [SEP]
#
# Thirty thousand pieces can thus spell any word. Both steps follow BERT's tokenization.py,
# but the longest word that is split is Hugging Face's.

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
# BERT makes a word of each Chinese character: of CJK ideographs, but not of Kana or Hangul.
CHINESE = re.compile("[\u4e00-\u9fff\u3400-\u4dbf\uf900-\ufaff\U00020000-\U0002a6df"
    "\U0002a700-\U0002ceaf\U0002f800-\U0002fa1f]")


def split_words(text):
    """BERT's basic tokenization, uncased. [Devlin et al. 2019, tokenization.py]

    NFD splits an accented letter into letter and accent, so that _spaced can drop the accent.
    >>> split_words("Café (42)!")
    ['cafe', '(', '42', ')', '!']
    """
    decomposed = unicodedata.normalize("NFD", text.lower())
    return "".join(map(_spaced, decomposed)).split()


@functools.cache
def _spaced(char):
    # A tab or a line's end becomes a space; split_words splits at any other space, too.
    # Invisible characters and accents vanish. A punctuation mark or a Chinese character
    # becomes a word.
    category = unicodedata.category(char)
    if char in "\t\n\r":
        return " "
    # U+FFFD stands for undecodable bytes; the categories are control, invisible, accent.
    if char == "\ufffd" or category in ("Cc", "Cf", "Mn"):
        return ""
    # Unicode counts $ + < = > ^ ` | ~ as symbols; BERT counts them as punctuation.
    punctuation = char in string.punctuation or category[0] == "P"
    return f" {char} " if punctuation or CHINESE.match(char) else char


class WordPiece:
    """BERT's uncased tokenizer: words, then the longest vocabulary pieces from left to right.

    vocab: a file, see read_vocab; or a list of pieces, as in a checkpoint. A piece that
    begins with '##' continues a word: with 'play', '##ing' and '!' in the vocabulary,
    'Playing!' becomes ['play', '##ing', '!'].
    """

    def __init__(self, vocab):
        self.pieces = vocab if isinstance(vocab, list) else read_vocab(Path(vocab))
        self.ids = {piece: index for index, piece in enumerate(self.pieces)}

    def __len__(self):
        return len(self.pieces)  # V, the model's vocab_size

    def encode(self, text, max_tokens):
        """Ids of '[CLS] text [SEP]', cut to at most max_tokens, both specials counted."""
        pieces = ["[CLS]"]
        for word in split_words(text):
            pieces += self.split_word(word)
        kept = pieces[: max_tokens - 1] + ["[SEP]"]
        return [self.ids[piece] for piece in kept]

    @functools.lru_cache(50_000)  # noqa: B019  words repeat; a run has one tokenizer
    def split_word(self, word):
        """The pieces of one word, longest match first; [UNK] alone if a part has no piece."""
        if len(word) > 100:  # Hugging Face's limit, in characters; BERT's own code has 200
            return ["[UNK]"]
        pieces = []
        prefix = ""
        while word:
            end = len(word)
            while end and prefix + word[:end] not in self.ids:
                end -= 1
            if not end:
                return ["[UNK]"]  # BERT drops the whole word, not only the unknown part
            pieces.append(prefix + word[:end])
            prefix = "##"
            word = word[end:]
        return pieces


def read_vocab(path):
    """The pieces of a vocab.txt, one per line; a piece's id is its line's number, from 0.

    Raises BadInput if one of SPECIALS is missing, and for the vocabulary of a cased BERT: its
    capitals would never be found.
    """
    with reading(path, f"BERT's vocabulary: one word piece per line, {SPECIALS} among them"):
        text = path.read_text("utf-8").removesuffix("\n")
        # Not splitlines(): a piece may be a character that Python counts as a line's end.
        pieces = text.split("\n")
        for special in SPECIALS:
            pieces.index(special)  # ValueError: '[PAD]' is not in list
        settings = path.with_name("tokenizer_config.json")
        cased = settings.exists() and read_json(settings).get("do_lower_case") is False
        # A capital anywhere in a line; but markers, such as [MASK] or <S>, may have them.
        if cased or re.search(r"^(?![<\[]).*[A-Z]", text, re.M):
            raise ValueError("it is of a cased BERT; expected an uncased one")
    return pieces


def build_vocab(texts, size=30522):
    """A vocabulary for a corpus that has none: specials, characters, then its frequent words.

    Words that occur at least twice become pieces, the most frequent first, until there are
    `size` pieces. All other words are spelled in characters, so no word of the corpus is
    [UNK]. Returns a list of pieces.
    """
    counts = Counter(word for text in texts for word in split_words(text))
    characters = sorted(set("".join(counts)))
    continued = ["##" + character for character in characters]
    frequent = [word for word, count in counts.most_common() if count > 1 and len(word) > 1]
    return (SPECIALS + characters + continued + frequent)[:size]


# --- 2. The feature store -----------------------------------------------------------------
#
# The feature store is a folder, and the only thing that detector and model share:
#
#     store.json          version, complete, num_images N, num_regions R, feature_size F,
#                         num_region_classes C, class_names, detector, ...
#     ids.npy             (N,)       bytes     canonical image ids, UTF-8
#     counts.npy          (N,)       int32     regions of the image; -1 not written, 0 failed
#     sizes.npy           (N, 2)     int32     image width, height in pixels
#     boxes.npy           (N, R, 4)  float32   x1, y1, x2, y2 in pixels of the original image
#     features.npy        (N, R, F)  float16   mean-pooled RoI feature
#     failed.txt                     text      id and reason of every failed image
#
# and, if C > 0, each region's distribution over classes, as either
#
#     class_weight.npy    (C, F)     float32   the detector's last layer, once for all images:
#     class_bias.npy      (C,)       float32   distribution = softmax(weight @ feature + bias)
# or
#     class_probs.npy     (N, R, C)  float16   the distributions themselves, as imported
#
# ASSUMPTION A9: class 0 is the background, as in UNITER, VOLTA and torchvision. (Ports of
# bottom-up attention to detectron2 put it last.)
#
# The last layer suffices because a detector's class logits are linear in the stored feature.
# For Visual Genome's 1,601 classes it takes 13 MB. The distributions would take 115 KB per
# image, or 380 GB for 3.3 million images.
#
# The rows beyond an image's count are zeros. float16 halves the disk space (36 x 2048 x 2
# bytes = 147 KB per image); its rounding error, 0.05 %, is far below a detector's noise. All
# arrays are opened as memory maps, so that nothing is loaded in advance and all loading
# processes share the system's page cache.

STORE_VERSION = 1


class FeatureStore:
    """Read a feature store. `FeatureStore.create` is the writer.

    store = FeatureStore("features/")      raises BadInput if it is missing or half-written
    store.row("COCO_val2014_000000391895") -> row number, or None if the image is not in it
    store.rows(many ids)                   -> (n,) row numbers, -1 for an image not in it
    store.find(many ids, what)             -> the same, and says how many were found
    store[row] -> dict of features (n, F) float16, boxes (n, 4) float32, size (W, H); the
        arrays are read-only views of the mapped file: copy them before you change them
    store.class_probs(row) -> (n, C) distributions, or None if the store has no classes

    Attributes: num_regions R, feature_size F, num_region_classes C (0: no distributions),
    class_names, meta (all of store.json), ids, counts.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        self.meta, self.arrays = open_store(self.folder)
        with reading(folder, "a store with a whole store.json"):
            if not self.meta["complete"]:
                raise BadInput(f"{folder}: a half-written feature store; repeat the command "
                    "that was writing it to continue")
            self.num_region_classes = self.meta["num_region_classes"]
            self.class_names = self.meta["class_names"]
        _, self.num_regions, self.feature_size = self.arrays["features"].shape
        self.ids = self.arrays["ids"]
        self.counts = self.arrays["counts"]
        # Older versions of canonical_id kept some suffixes, backslashes and decomposed accents. If
        # an id has such a character, all ids are made canonical again.
        self._keys = self.ids
        if re.search(rb"[.\\\x80-\xff]", self.ids.tobytes()):
            self._keys = encode_ids(map(bytes.decode, self.ids))
        # Ids are looked up by binary search, which takes 8 bytes per image. A dict of 3
        # million strings would take half a gigabyte in every loading process.
        self._order = np.argsort(self._keys)

    def __reduce__(self):
        return FeatureStore, (self.folder,)  # a loading process opens the maps anew

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, row):
        # These are views: nothing is copied before a batch is built. Nothing is checked, because
        # `write` has checked it.
        size = self.arrays["sizes"][row].tolist()
        return dict(features=self._of("features", row), boxes=self._of("boxes", row),
            size=tuple(size))

    def _of(self, name, row):
        # An array's entries for the image's n regions, without the zeros after them.
        return self.arrays[name][row, : self.counts[row]]

    def rows(self, image_ids):
        """(n,) rows of images, by ids in any spelling; -1: absent, or extraction failed."""
        keys = encode_ids(image_ids)
        # A search for sorted keys visits neighbouring memory, and is several times faster.
        unique, inverse = np.unique(keys, return_inverse=True)
        ranks = np.searchsorted(self._keys, unique, sorter=self._order)[inverse]
        rows = self._order.take(ranks, mode="clip")
        found = (self._keys[rows] == keys) & (self.counts[rows] > 0)
        return np.where(found, rows, -1)

    def row(self, image_id):
        """The row of one image, or None."""
        row = int(self.rows([image_id])[0])
        return None if row < 0 else row

    def find(self, image_ids, what):
        """Like `rows`, but says how many were found; BadInput if none. what: what to call them."""
        ids = encode_ids(image_ids)
        rows = self.rows(ids)
        say_found(what, ids, rows >= 0, self.folder, self._keys[self.counts > 0])
        return rows

    def class_probs(self, row):
        """(n, C) float32: distributions, background first; None without classes."""
        if not self.num_region_classes:
            return None
        if "class_probs" in self.arrays:
            return self._of("class_probs", row).astype(np.float32)
        features = self._of("features", row)
        return self.classify(torch.tensor(features)).numpy()

    def classify(self, features):
        """(K, C) distributions of features (K, F), on their device, by the last layer."""
        weight, bias = self._class_head(features.device)
        return F.linear(features.float(), weight, bias).softmax(dim=-1)

    @functools.cache  # noqa: B019  a run has one store
    def _class_head(self, device):
        return [torch.tensor(self.arrays[name], device=device)
            for name in ("class_weight", "class_bias")]

    @staticmethod
    def create(folder, ids, num_regions, feature_size, num_region_classes=0, class_head=None,
            **more):
        """A StoreWriter for these images; it continues an interrupted one.

        ids: every image that will be written, in row order. class_head: (weight (C, F), bias
        (C,)) of the detector's last layer, background first, in place of stored
        distributions. `more`, such as class_names and detector, goes into store.json. Raises
        BadInput if the folder holds another store.
        """
        keys = encode_ids(ids)
        fixed = {"ids": keys}  # arrays known from the start; `write` fills the others
        if class_head:
            weight, bias = class_head
            fixed |= {"class_weight": np.float32(weight), "class_bias": np.float32(bias)}
            num_region_classes = len(bias)
        # int: numpy's integers could not be read back.
        meta = dict(version=STORE_VERSION, complete=False, num_images=len(keys),
            num_regions=int(num_regions), feature_size=int(feature_size),
            num_region_classes=int(num_region_classes), class_names=[],
            class_head=bool(class_head), detector="", id_bytes=keys.itemsize) | more
        images = {}
        for key, image in zip(keys.tolist(), ids):
            if key in images:
                raise BadInput(f"{folder}: {key.decode()!r} is the id of two images, "
                    f"{images[key]} and {image}; rename one")
            images[key] = image
        return StoreWriter(Path(folder), meta, fixed)


class StoreWriter:
    """Fill a store row by row, in any order, from any number of processes. One process creates it;
    when `create` has returned there, others may call it, too.

    for row in writer.pending(): writer.write(row, features, boxes, size)
    store = writer.finish()

    The arrays have their full size from the start. So each row has its place, and no process
    waits for another. `counts` says which rows are written: a writer may be killed at any
    moment. fixed: {name: array known from the start}.
    """

    def __init__(self, folder, meta, fixed):
        self.folder = folder
        meta = json.loads(json.dumps(meta, default=str))  # as it is read back: a Path is a text
        self.meta = meta
        if not (folder / "store.json").exists():
            allocate_store(folder, meta, fixed | {"counts": -1})
        stored, self.arrays = open_store(folder, mode="r+")
        self.counts = self.arrays["counts"]
        stored |= self.arrays
        asked = meta | fixed
        # Older versions recorded less, so only what both have is compared. The weights' file may
        # have been renamed.
        compared = asked.keys() & stored.keys() - {"complete", "weights"}
        differ = [key for key in compared if not np.array_equal(asked[key], stored[key])]
        if differ:
            raise BadInput(f"{folder}: holds a feature store of other images or settings (it "
                f"differs in {', '.join(sorted(differ))}); choose another folder, or remove "
                "this one")

    def pending(self):
        """Rows not yet written."""
        return np.flatnonzero(self.counts < 0).tolist()

    def write(self, row, features, boxes, size, class_probs=None):
        """Store one image: features (n, F), boxes (n, 4) in pixels, size (W, H); 1 <= n <= R.

        class_probs (n, C): for a store with this array. Raises BadInput, and leaves the row
        pending, if a number is unusable: a NaN in a store would show only as a NaN loss,
        thousands of images later. A box may leave the picture by a pixel, through rounding.
        """
        if shutil.disk_usage(self.folder).free < 1e7:  # it would kill the process
            raise OSError(errno.ENOSPC, "the disk is full", str(self.folder))
        n = len(features)
        values = dict(features=features, boxes=boxes)
        with reading(
                f"image {self.arrays['ids'][row].decode()}", "regions that can be stored"):
            if n < 1 or min(size) < 1:
                raise ValueError(f"{n} regions in a picture of {size} pixels")
            if not (abs(features) <= 65504).all():  # the largest float16; False for NaN
                raise ValueError("features with NaN or infinity")
            low, high = np.hsplit(boxes, 2)
            inside = (low >= -1) & (low <= high) & (high <= np.add(size, 1))
            if not inside.all():
                raise ValueError(
                    f"a box outside its picture of {size} pixels, or with x2 < x1")
            if "class_probs" in self.arrays:
                values["class_probs"] = class_probs
                if not np.allclose(class_probs.sum(axis=1), 1, atol=0.02):
                    raise ValueError("class_probs that do not add up to 1")
            for name, value in values.items():
                target = self.arrays[name][row, :n]
                if value.shape != target.shape:  # numpy would repeat a single row or column
                    raise ValueError(f"expected {name} {target.shape}, found {value.shape}")
                target[:] = value
        self.arrays["sizes"][row] = size
        self.counts[row] = n  # last: marks the row as written

    def fail(self, row, reason):
        """Mark an image as failed: its row stays empty, and failed.txt says why.

        reason: an error, or a text.
        """
        path = self.folder / "failed.txt"
        with open(path, "a", encoding="utf-8", errors="replace") as file:
            file.write(f"{self.arrays['ids'][row].decode()}\t{' '.join(str(reason).split())}\n")
        self.counts[row] = 0

    def retry(self):
        """Make failed rows pending again: what failed may have been the disk, not the picture."""
        self.counts[self.counts == 0] = -1
        self.folder.joinpath("failed.txt").unlink(missing_ok=True)

    def finish(self):
        """Mark the store complete and return its reader; BadInput if a row is pending."""
        if missing := len(self.pending()):
            raise BadInput(f"{self.folder}: {missing} images are not written yet")
        for view in self.arrays.values():
            view.base.flush()  # the map goes to the disk before store.json says complete
        write_json(self.folder / "store.json", self.meta | {"complete": True})
        return FeatureStore(self.folder)


def allocate_store(folder, meta, start):
    """Make the files of a new store. start: {name: what is in an array from the start}."""
    folder.mkdir(parents=True, exist_ok=True)
    # Mapped files take space as they fill: a full disk would kill the process silently.
    layout = store_layout(meta)
    size = sum(np.dtype(dtype).itemsize * math.prod(shape) for dtype, shape in layout.values())
    if size > shutil.disk_usage(folder).free:
        raise BadInput(f"{folder}: expected {size / 1e9:,.2f} GB of free disk, found less")
    for name, (dtype, shape) in layout.items():
        # 'w+' makes a sparse file: a row takes no disk space until it is written.
        array = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, shape)
        if name in start:
            array[:] = start[name]
    write_json(folder / "store.json", meta)  # last: now all arrays exist


def open_store(folder, mode="r"):
    """(store.json as a dict, {name: array mapped from disk}); BadInput unless they fit."""
    arrays = {}
    what = "a feature store; extract_features.py writes one"
    with reading(folder, what, "array") as at:
        meta = json.loads((folder / "store.json").read_bytes())
        if meta["version"] != STORE_VERSION:
            raise ValueError(f"expected version {STORE_VERSION}, found {meta['version']}")
        for at.entry, (dtype, shape) in store_layout(meta).items():
            path = folder / f"{at.entry}.npy"
            mapped = np.load(path, mmap_mode=mode, allow_pickle=False)
            array = np.asarray(mapped)  # a plain view, which numpy slices ten times faster
            if array.dtype != dtype or array.shape != shape:
                raise ValueError(
                    f"expected {shape} {dtype}, found {array.shape} {array.dtype}")
            arrays[at.entry] = array
    return meta, arrays


def store_layout(meta):
    """{array: (dtype, shape)} of a store, from its store.json: the table above as code."""
    n = meta["num_images"]
    r = meta["num_regions"]
    f = meta["feature_size"]
    c = meta["num_region_classes"]
    layout = {"ids": (f"S{meta['id_bytes']}", (n,)),
        "counts": ("int32", (n,)),
        "sizes": ("int32", (n, 2)),
        "boxes": ("float32", (n, r, 4)),
        "features": ("float16", (n, r, f))}
    if meta.get("class_head"):
        layout["class_weight"] = ("float32", (c, f))
        layout["class_bias"] = ("float32", (c,))
    elif c:
        layout["class_probs"] = ("float16", (n, r, c))
    return layout


def encode_ids(ids):
    """(n,) bytes: image ids of any spelling as a store keeps them; bytes stay as they are.

    Bytes of a fixed width can be mapped and sorted. A file's name need not be valid Unicode:
    what UTF-8 cannot encode becomes '?'.
    """
    if isinstance(ids, np.ndarray) and ids.dtype.kind == "S":
        return ids
    return np.array([canonical_id(i).encode(errors="replace") for i in ids], dtype=bytes)


# --- 3. Pretraining examples --------------------------------------------------------------
#
# What is predicted is decided here, once, and passed on as lists of positions. A pair is of
# one of two kinds, which are equally frequent (ASSUMPTION A7):
#
#     pair      words and regions   picture               predicted
#     masked    15 % are hidden     its own               hidden words (MLM), regions (MRC)
#     whole     all are seen        half: another image   does it match? (ITM)
#
# So matching is learned on pairs as they are: zero-shot retrieval and finetuning show such
# pairs, too. UNITER does the same. If every pair is masked, as in ViLBERT, whole ones
# are new to the model, and matching them may get worse while the loss falls: see
# tests/ABLATION.md.
#
# Pretraining and all tasks read the store by region_inputs and make batches by model_inputs.


class PretrainingDataset:
    """Image-caption pairs: half of them masked, half whole, to be matched. ASSUMPTION A7.

    store: a FeatureStore. captions: Captions, or a list of (image id, text). Captions that
    are empty or whose image is not in the store are left out and counted in `.skipped`;
    BadInput if fewer than two images are left. mismatch: the share of whole pairs whose image
    is replaced by another. masking=False shows all pairs whole, to measure matching.
    blind=True masks all pairs, mismatches none and shows no regions: such a model learns what
    words alone give away. name: what messages call the captions.

    Attributes of the N pairs that are kept: .captions, .rows (N,) in the store, and .lengths
    (N,), the number of spaces in each caption, to sort by length.
    """

    max_tokens = 38  # of a caption, as in VOLTA (A7)

    def __init__(self, store, captions, tokenizer, seed=0, mismatch=0.5, masking=True,
            blind=False, name="captions"):
        self.store = store
        self.tokenizer = tokenizer
        self.seed = seed
        self.whole = 1.0  # the share of pairs that are shown whole
        if masking:
            self.whole = 0.0 if blind else 0.5
        self.blind = blind
        self.mismatch = 0.0 if blind else mismatch
        if not isinstance(captions, Captions):
            captions = Captions(captions)
        rows = store.rows(captions.ids)
        absent = rows < 0
        empty = captions.texts == ""
        kept = ~(absent | empty)
        self.rows = rows[kept]
        self.captions = captions[kept]
        self.lengths = np.strings.count(self.captions.texts, " ")
        self.skipped = {"without features": int(absent.sum()),
            "without words": int((empty & ~absent).sum())}
        if len(np.unique(self.rows)) < 2:
            raise BadInput(f"{store.folder}: expected captions of two of its images or more; "
                f"of {len(captions)} {name} these were left out: {self.skipped}")

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, key):
        """One example: a dict of numpy arrays; `collate` stacks them.

        key: an index, or (epoch, index): every epoch draws new masks and mismatches.
        """
        epoch, index = key if isinstance(key, tuple) else (0, key)
        rng = np.random.default_rng([self.seed, epoch, index])
        row = self.rows[index]
        match = []
        rate = 0.15
        if rng.random() < self.whole:
            rate = 0.0
            match = [MATCH]
            if rng.random() < self.mismatch:
                # The image is replaced, not the caption: another caption would have another
                # length, and a batch holds captions of similar length (train.epoch_batches).
                # By chance the other image may fit, too; with many images that is rare.
                match = [MISMATCH]
                while row == self.rows[index]:
                    row = self.rows[rng.integers(len(self))]
        ids = self.tokenizer.encode(self.captions[index][1], self.max_tokens)
        input_ids, words = mask_tokens(ids, self.tokenizer, rng, rate)
        regions = region_inputs(self.store, None if self.blind else row)
        hidden = choose(len(regions["region_boxes"]), rng, rate)
        predicted = np.flatnonzero(hidden & (self.store.num_region_classes > 0))
        stored = self.store.arrays.get("class_probs")  # (N, R, C); None: see class_targets
        targets = None if stored is None else stored[row, predicted]  # (k, C)
        return dict(regions, input_ids=input_ids, region_hidden=hidden, mlm_positions=words,
            mlm_labels=np.array(ids)[words], mrc_positions=predicted, mrc_targets=targets,
            itm_positions=np.arange(len(match)), itm_labels=np.array(match, np.int64))


def choose(n, rng, rate):
    """(n,) bool, each True with probability `rate`; at least one is, unless rate or n is 0.

    An example without a target would teach nothing. In short captions this raises the share: of 5
    words, one is forced in 44 % of the cases, and 24 % are predicted instead of 15 %.
    """
    chosen = rng.random(n) < rate
    if n and rate and not chosen.any():
        chosen[rng.integers(n)] = True
    return chosen


def mask_tokens(ids, tokenizer, rng, rate):
    """BERT's masking of one sentence: (input_ids, positions to predict), int64.

    A share `rate` of the pieces is predicted. Of these 80% are shown as [MASK], 10% as a random
    piece and 10% unchanged: finetuning has no [MASK], so the states of ordinary pieces must be good
    too. [CLS] and [SEP] are never masked, and SPECIALS never drawn as a random piece.
    """
    shown = np.array(ids)
    positions = 1 + np.flatnonzero(choose(len(ids) - 2, rng, rate))  # between [CLS] and [SEP]
    for place in positions:
        draw = rng.random()
        if draw < 0.8:
            shown[place] = tokenizer.ids["[MASK]"]
        elif draw < 0.9:
            shown[place] = rng.integers(len(tokenizer))
            while tokenizer.pieces[shown[place]] in SPECIALS:
                shown[place] = rng.integers(len(tokenizer))
    return shown, positions


def region_inputs(store, row):
    """The encoder's inputs from an image: region_features (n, F), region_boxes (n, 5).

    Features are float16. row None, for an image without features or a blind model: n = 0.
    """
    if row is None:
        features = np.zeros((0, store.feature_size), np.float16)
        boxes = np.zeros((0, 5), np.float32)
    else:
        image = store[row]
        features = image["features"]
        boxes = normalise_boxes(image["boxes"], image["size"])
    return dict(region_features=features, region_boxes=boxes)


def normalise_boxes(boxes, size):
    """(n, 4) pixels -> (n, 5): x1/W, y1/H, x2/W, y2/H, area/(W H), in [0, 1].

    ASSUMPTION A7. y points down, as in all files here. Boxes are clipped to the picture.
    >>> normalise_boxes(np.float32([[20, 10, 120, 60]]), (200, 100)).round(2).tolist()[0][4]
    0.25
    """
    scaled = np.clip(boxes / (size + size), 0, 1).astype(np.float32)  # W, H, W, H
    sides = scaled[:, 2:] - scaled[:, :2]
    return np.column_stack([scaled, sides.prod(axis=1)])


def collate(examples):
    """A batch from examples of PretrainingDataset: what model_inputs gives, and

    region_hidden (B, R) bool, True = the model must not see this region's feature;
    mlm_positions (K,), b T + t for piece t of pair b, and mlm_labels (K,); mrc_positions
    (K',), b R + r for region r of pair b, and mrc_targets (K', C), or None where the store
    has no stored distributions: see class_targets; itm_positions (K"), b of the whole pairs,
    and itm_labels (K"), MATCH or MISMATCH.
    """
    batch = model_inputs(examples)
    num_pieces = batch["input_ids"].shape[1]  # T
    num_regions = batch["region_boxes"].shape[1]  # R
    batch["region_hidden"] = pad(column(examples, "region_hidden"))
    for name in ("mlm_labels", "itm_labels"):
        batch[name] = join(column(examples, name))
    widths = dict(mlm_positions=num_pieces, mrc_positions=num_regions, itm_positions=1)
    for name, width in widths.items():
        batch[name] = flat_positions(column(examples, name), width)
    targets = column(examples, "mrc_targets")
    batch["mrc_targets"] = None if targets[0] is None else join(targets)
    return batch


def flat_positions(positions, width):
    """Positions in the rows of a table (B, width) -> positions among all its B width cells.

    >>> flat_positions([np.array([1, 4]), np.array([2])], width=10).tolist()
    [1, 4, 12]
    """
    return join([row * width + columns for row, columns in enumerate(positions)])


def model_inputs(examples):
    """The encoder's inputs, padded to the longest of these examples and no further.

    input_ids, text_mask (B, T); region_features (B, R, F), region_boxes (B, R, 5),
    region_mask (B, R). Masks are int64, 1 = real. Words are padded with 0, the id of [PAD]
    in BERT's vocabularies; regions with zeros.
    """
    inputs = {name: pad(column(examples, name))
        for name in ("input_ids", "region_features", "region_boxes")}
    for mask, name in (("text_mask", "input_ids"), ("region_mask", "region_boxes")):
        entries = column(examples, name)
        inputs[mask] = pad([np.ones(len(entry), np.int64) for entry in entries])
    return inputs


def column(examples, name):
    """The entry `name` of each example, a list."""
    return [example[name] for example in examples]


def join(arrays):
    """One tensor of all entries of some arrays, one array after the other."""
    return torch.from_numpy(np.concatenate(arrays))


def pad(arrays):
    """Stack arrays that differ in length: a tensor (B, longest, ...), padded with zeros.

    longest is at least 1: attention over nothing would divide by zero.
    """
    # torch's pad_sequence takes three times as long.
    longest = max(1, max(map(len, arrays)))
    padded = np.zeros((len(arrays), longest, *arrays[0].shape[1:]), arrays[0].dtype)
    for row, values in zip(padded, arrays):
        row[: len(values)] = values
    return torch.from_numpy(padded)


def class_targets(batch, store):
    """Add mrc_targets (K', C) to a batch whose store has the detector's last layer.

    One product gives the targets of all masked regions, on the batch's device. Computed one
    by one in the loading processes, they took 85 % of the time there.
    """
    if store.meta.get("class_head"):
        features = batch["region_features"].flatten(0, 1)  # (B R, F)
        batch["mrc_targets"] = store.classify(features[batch["mrc_positions"]])
    return batch


# --- 4. Captions --------------------------------------------------------------------------
#
# Captions as they are published. A file's form is recognised by its content, not by its name:
#
#     Conceptual Captions   a very typical bus station <TAB> http://lh6.ggpht.com/-IvRtN...
#     CC12M                 the same two columns the other way round
#     own data              dog_1 <TAB> a dog on a sofa               (image id, caption)
#     COCO captions         {"annotations": [{"image_id": 318556, "caption": "A ..."}, ...]}
#     Karpathy's splits     {"images": [{"split": "train", "filename": "1000092795.jpg",
#                            "sentences": [{"raw": "Two young guys ..."}, ...]}, ...]}
#     a JSON list           [{"image": "dog_1.jpg", "caption": "a dog on a sofa"}, ...]
#     img2dataset           a folder: 00000/000000012.jpg with 00000/000000012.txt beside it
#
# A picture in the TSV of Conceptual Captions has only a link. Its id is crc32(link), as in
# VOLTA's files. Among 3.3 million links about 1,300 pairs collide; a store then holds the
# picture that came first.


class Captions:
    """Pairs (image id, text) in little memory, read like a list of tuples.

    ids (N,): canonical image ids as bytes. texts (N,): strings of variable width, which numpy
    keeps in one block. An index gives a pair; a slice, or an array of indices or bools, gives
    Captions. checksum: (N, a number that depends on all ids and texts).

    A list of 3.3 million tuples takes 0.8 GB. This takes 0.3 GB, and the loading processes
    share it. They would copy a list page by page: to read a string is to change its
    reference count, which writes to its page.
    """

    def __init__(self, pairs):
        ids = []

        def texts():
            """Yield the texts, so that no list of them is needed, and gather the ids."""
            for image_id, text in pairs:
                ids.append(image_id)
                # JSON may hold half a surrogate pair, which UTF-8 cannot encode.
                yield text.strip().encode(errors="replace").decode()

        self.texts = np.fromiter(texts(), np.dtypes.StringDType())
        self.ids = encode_ids(ids)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, which):
        if np.isscalar(which):
            return self.ids[which].decode(), self.texts[which]
        selected = Captions([])
        selected.ids = self.ids[which]
        selected.texts = self.texts[which]
        return selected

    @functools.cached_property
    def checksum(self):
        code = 0
        for image_id, text in zip(self.ids, self.texts):
            code = zlib.crc32(b"%s %s\n" % (image_id, text.encode()), code)
        return len(self), code


def read_captions(path):
    """The (image id, caption) pairs of a caption file or folder, of all splits."""
    return ((image_id, text) for image_id, text, _ in caption_records(path))


def caption_records(path):
    """Yield the (image id, caption, split) of a caption file or folder, in its order.

    split is one of SPLITS, "train" for all captions of a file without splits. Raises BadInput,
    which says near which caption the first problem is.
    """
    path = Path(path)
    what = ("a table of two columns, COCO's 'annotations', Karpathy's 'images', or a list of "
        "{'image', 'caption'}")
    with reading(path, what, "caption") as at:
        read = _folder_captions
        if not path.is_dir():
            with open_text(path) as file:
                # JSON is an object, or a list that is empty or of objects. Any other bracket
                # begins a caption.
                is_json = re.match(r"\s*(\{|\[\s*[]{])", file.read(1000))
            read = _json_captions if is_json else _tsv_captions
        at.entry = 1  # not by enumerate: an error occurs in `read`, before it yields the entry
        for image_id, text, split in read(path):
            yield canonical_id(image_id), text.strip(), split
            at.entry += 1


def _tsv_captions(path):
    # Yields (image id, caption, split), as the next two functions do.
    for image, text in read_table(path):
        if text.startswith("http") and not image.startswith("http"):
            image, text = text, image
        if image.startswith("http"):
            image = zlib.crc32(image.encode())
        yield image, text, "train"


def _json_captions(path):
    # In COCO's files and in lists a record is a caption, without a split. In Karpathy's it is
    # an image, with its split and its captions.
    content = read_json(path)
    if isinstance(content, list):
        for record in content:
            captions = record["caption"]  # a text, or a list of them
            if isinstance(captions, str):
                captions = [captions]
            for caption in captions:
                yield record["image"], caption, "train"
    elif "annotations" in content:
        name = picture_names(content)
        for record in content["annotations"]:
            yield name(record["image_id"]), record["caption"], "train"
    else:
        for record in content["images"]:
            split = canonical_split(record["split"])
            for sentence in record["sentences"]:
                yield record.get("cocoid", record["filename"]), sentence["raw"], split


def _folder_captions(folder):
    # A file's name, without its suffix, is the image's id. If the folder has pictures, or the
    # JSON files of img2dataset, a caption lies beside one of them; a README.txt or a detector's
    # labels/12.txt does not. And a caption is more than numbers.
    texts = files_below(folder, r"\.txt")
    pictures = {file.parent / canonical_id(file) for file in files_below(folder)}
    candidates = [file for file in texts
        if file.parent / canonical_id(file) in pictures or file.with_suffix(".json").exists()]
    of_task = any(folder.glob("features*"))  # then its texts are notes
    if not candidates and not pictures and not of_task:
        candidates = texts
    count = 0
    for file in candidates:
        with reading(file, "a caption in UTF-8"):
            text = file.read_text("utf-8-sig")
        if re.search(r"[^\W\d_e]", text):  # a letter other than the e in 5e-05
            count += 1
            yield file.name, text, "train"
    if texts:
        say(f"{folder}: {count:,} of {len(texts):,} .txt files are captions, beside "
            f"{len(pictures):,} pictures")


def picture_names(content):
    """A function from image_id to the picture's name, for a file of COCO's form.

    COCO's image_id is the number in file_name: then an id is its own name. Other tools count
    from 1: then only the list `images` tells the name. It is a ValueError if two of these images
    have the same id or name, and later a KeyError if an image is not listed.
    """
    images = content.get("images", [])
    names = {}
    for image in images:
        name = image.get("file_name", image["id"])
        names[canonical_id(image["id"])] = canonical_id(name)
    if list(names) == list(names.values()):
        return lambda image_id: image_id
    if len(set(names.values())) < len(images):
        raise ValueError("two of its images have the same id or file_name")
    return lambda image_id: names[canonical_id(image_id)]


SPLITS = {"train": "train training restval", "val": "val valid validation dev",
    "test": "test testing", "testA": "testa", "testB": "testb"}


def canonical_split(name):
    """One of SPLITS, for any of the names that are in use for it; ValueError for another.

    >>> [canonical_split(name) for name in ("restval", "validation", "val2014")]
    ['train', 'val', 'val']
    """
    plain = name.strip().lower().rstrip(string.digits)
    for split, names in SPLITS.items():
        if plain in names.split():
            return split
    raise ValueError(f"expected a split among {', '.join(SPLITS)}, found {name!r}")


def read_table(path):
    """Yield the cells of each line of a TSV file, as strings; blank lines are left out."""
    # Not the csv module: it would swallow lines after an unpaired quotation mark.
    with open_text(path) as file:
        for line in filter(str.strip, file):
            yield line.rstrip("\r\n").split("\t")


# --- 5. Published features ----------------------------------------------------------------
#
# The "bottom-up attention" files that most papers of the field used: a TSV without a header,
# one image per line, arrays as base64 of little-endian numbers. Three forms are in
# circulation. The number of columns distinguishes them, and determines whether width or
# height comes first:
#
#     6    Anderson et al.   image_id, image_w, image_h, num_boxes, boxes, features
#     10   LXMERT            img_id, img_h, img_w, objects_id, objects_conf, attrs_id,
#                            attrs_conf, num_boxes, boxes, features
#     13   VOLTA             the ten, then cls_prob, attrs, classes
#
# Boxes are float32 (n, 4), x1 y1 x2 y2 in pixels; features float32 (n, 2048); cls_prob
# float32 (n, 1601), background first. Only VOLTA's form allows masked region classification.

TSV_COLUMNS = {6: "id w h n boxes features",
    10: "id h w _ _ _ _ n boxes features",
    13: "id h w _ _ _ _ n boxes features class_probs _ _"}


def import_features(paths, folder):
    """Write a feature store from published TSV files; continues an interrupted import.

    Two passes with one line in memory at a time: the first counts, the second writes. A
    broken line ends the import; an image with unusable numbers fails alone. Returns the
    FeatureStore.
    """
    rows = {}  # image id -> row, of the images with a region
    counts = []  # regions of each line
    for image_id, record in read_tsv(paths):
        n = len(record["features"])
        if n:
            rows.setdefault(image_id, len(rows))
        counts.append(n)
    if not rows:
        raise BadInput(f"{paths[0]}: no image with a region")
    say(f"{len(counts):,} lines hold {len(rows):,} images; {len(counts) - len(rows):,} "
        "lines are left out: of an image that came before, or without regions")
    # All lines have the same widths, so those of the last one serve for all.
    writer = FeatureStore.create(folder, rows, max(counts), record["features"].shape[1],
        record["class_probs"].shape[1], detector="vg", source=[Path(p).name for p in paths])
    writer.retry()  # the file may have been mended
    pending = set(writer.pending())
    for image_id, record in read_tsv(paths):
        row = rows.get(image_id)
        if row in pending and len(record["features"]):
            pending.remove(row)  # only its first line counts
            try:
                writer.write(row, **record)
            except BadInput as error:
                writer.fail(row, error)
    return writer.finish()


def read_tsv(paths):
    """Yield (image id, keyword arguments of StoreWriter.write) of each line, n = 0 included.

    All lines of all files must have as many numbers per region as the first: a store has one
    shape per array. class_probs is (n, 0) where a file has none.
    """
    widths = {"boxes": 4}  # numbers per region
    for path in paths:
        what = "a feature TSV of 6, 10 or 13 columns, all lines alike"
        with reading(path, what, "line") as at:
            lines = progress(read_table(path), str(path))
            for at.entry, cells in enumerate(lines, 1):
                names = TSV_COLUMNS[len(cells)].split()
                line = dict(zip(names, cells))
                n = int(line["n"])
                record = {"size": (int(line["w"]), int(line["h"]))}
                for name in ("boxes", "features", "class_probs"):
                    # Python 3 wrote some files as b'...'.
                    text = line.get(name, "").removeprefix("b'").removesuffix("'")
                    numbers = np.frombuffer(base64.b64decode(text, validate=True), "<f4")
                    if n:
                        widths.setdefault(name, len(numbers) // n)
                    record[name] = numbers.reshape(n, widths.get(name, 0))
                yield canonical_id(line["id"]), record


# --- 6. The toy world ---------------------------------------------------------------------
#
# A scene is a number: the seed that determines its things, picture, captions, questions and
# referring expressions. So a data set is a range of numbers, and held-out scenes are another
# range. Each use has its own random stream: more captions do not change the picture. Every
# statement about a scene is computed from its things, so it is true without an annotator:
#
#     caption      a small red star left of a large blue ring and a small green cross
#     question     what colour is the large ring ?                           blue, colour
#     expression   the star left of the blue ring                            thing 0, relation

COLOURS = {"red": "#d72d2d", "green": "#2da53c", "blue": "#3255dc", "yellow": "#ebd732",
    "purple": "#963cb9", "orange": "#f08c1e", "white": "#f5f5f5", "black": "#141414"}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = {"small": (7, 9), "large": (14, 18)}  # half the width, in pixels: from, to
# Relation -> the opposite relation.
RELATIONS = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
QUESTION_TYPES = ("colour", "shape", "count", "existence", "relation")
TOY_CLASSES = ["background"] + [f"{c} {s}" for c in COLOURS for s in SHAPES]  # C = 1 + 48
SCENE_PIXELS = 128
HELD_OUT_SCENES = 1_000_000  # the number of the first held-out scene; training scenes are below


@dataclass
class Thing:
    """One object of a scene: three words, its centre and half its width in pixels."""

    size: str
    colour: str
    shape: str
    centre: tuple = (0, 0)
    half: int = 0

    @property
    def box(self):
        """x1, y1, x2, y2 in pixels."""
        x, y = self.centre
        return (x - self.half, y - self.half, x + self.half, y + self.half)

    @property
    def where(self):
        """Where in the picture it is, by the direction in which it is farthest from the middle.

        It is in the middle if it is less than 16 pixels from there, to each side.
        """
        right, down = np.subtract(self.centre, SCENE_PIXELS // 2)
        distance = {"in the middle": 15, "at the top": -down, "at the bottom": down,
            "on the left": -right, "on the right": right}
        return max(distance, key=distance.get)

    def named(self, words="size colour shape"):
        """'small red star'; with fewer words, 'red star'. An unnamed shape is a 'thing'."""
        name = " ".join(getattr(self, word) for word in words.split())
        return name if "shape" in words else f"{name} thing"

    def relations(self, other, margin=8):
        """The RELATIONS in which it stands to the other, each by more than `margin` pixels.

        In a scene there is always a relation: things do not touch, so along one axis their
        centres differ by more than 16 pixels.
        """
        right, down = np.subtract(self.centre, other.centre)
        distance = {"left of": -right, "right of": right, "above": -down, "below": down}
        return [relation for relation in distance if distance[relation] > margin]


class Scene:
    """2 to 6 things that do not touch, and what can be said of them: all by its number.

    things: list of Thing. .draw() -> PIL image; .captions(n), .questions(n), .expressions(n).
    """

    def __init__(self, number):
        self.number = number
        self.things = []
        rng = self._rng(0)
        wanted = rng.integers(2, 7)
        while len(self.things) < wanted:
            self._add_thing(rng)

    def _rng(self, stream):
        # 0 the things, 1 the noise, 2 captions, 3 questions, 4 referring expressions.
        return np.random.default_rng([self.number, stream])

    def _add_thing(self, rng):
        # Adds a thing that touches no other. If it fits in none of thirty random places, the
        # scene begins again.
        thing = Thing(_pick(rng, SIZES), _pick(rng, COLOURS), _pick(rng, SHAPES))
        # Half of the new things copy colour or shape from another. Otherwise a model could
        # match 'red star' to a scene by finding 'red' and 'star' anywhere, and never learn
        # to bind them.
        if self.things and rng.random() < 0.5:
            copied = _pick(rng, ("colour", "shape"))
            model = _pick(rng, self.things)
            setattr(thing, copied, getattr(model, copied))
        low, high = SIZES[thing.size]
        for _ in range(30):
            thing.half = int(rng.integers(low, high + 1))
            margin = thing.half + 2  # two pixels between boxes, and at the edge
            thing.centre = tuple(rng.integers(margin, SCENE_PIXELS - margin, size=2).tolist())
            # Boxes lie apart if along one axis the centres differ by more than both halves.
            if all(thing.relations(other, margin + other.half) for other in self.things):
                self.things.append(thing)
                return
        self.things.clear()

    def draw(self, scale=1):
        """The picture: a PIL image, RGB, things on grey noise, 128 * scale pixels wide.

        Detectors and models see scale 1; larger ones are for people.
        """
        noise = self._rng(1).integers(95, 160, (SCENE_PIXELS, SCENE_PIXELS), dtype=np.uint8)
        enlarged = noise.repeat(scale, 0).repeat(scale, 1)
        image = Image.fromarray(enlarged).convert("RGB")
        for thing in self.things:
            _draw_shape(ImageDraw.Draw(image), thing, scale)
        return image

    def captions(self, n=4):
        """n sentences that are true of this picture and of few others.

        Each names three things if there are three. Among 100 scenes, 2 % of such sentences
        are also true of another scene; with two things it would be 8 %. Half of the sentences
        say where two things are, the others how these two relate: from comparisons alone, no
        model learned anything about places.
        """
        rng = self._rng(2)
        sentences = []
        for _ in range(n):
            things = rng.permutation(self.things)[:3]
            names = ["a " + thing.named() for thing in things]
            if rng.random() < 0.5:
                start = f"{names[0]} {things[0].where} and {names[1]} {things[1].where}"
            else:
                relation = _pick(rng, things[0].relations(things[1]))
                start = f"{names[0]} {relation} {names[1]}"
            sentences.append(" and ".join([start] + names[2:]))
        return sentences

    def questions(self, n=5):
        """n (question, answer, type) triples; type is one of QUESTION_TYPES.

        Types alternate; one that has no fair question about this scene is left out. Yes and
        no are about equally frequent; a 'what ...' question has one answer. Numbers are
        digits, as in VQA.
        """
        rng = self._rng(3)
        triples = []
        for turn in range(self.number, self.number + n):
            question_type = QUESTION_TYPES[turn % 5]
            ask = getattr(self, f"_ask_{question_type}")
            if pair := ask(rng):
                triples.append(pair + (question_type,))
        return triples

    def _ask_colour(self, rng, asked="colour", given="shape"):
        # Asks only about a thing that its size and the given word identify. If two things
        # fitted, there might be two right answers.
        if unique := self._unique(f"size {given}"):
            name = _pick(rng, unique)
            return f"what {asked} is the {name} ?", getattr(unique[name], asked)

    _ask_shape = functools.partialmethod(_ask_colour, asked="shape", given="colour")

    def _ask_count(self, rng):
        # Counts all things, or those of a size, colour or shape in the picture: 1 to 6.
        counted = _pick(rng, ("all", "size", "colour", "shape"))
        if counted == "all":
            return "how many things are there ?", str(len(self.things))
        words = [getattr(thing, counted) for thing in self.things]
        word = _pick(rng, words)
        name = f"{word} things"
        if counted == "shape":
            name = "crosses" if word == "cross" else f"{word}s"
        return f"how many {name} are there ?", str(words.count(word))

    def _ask_existence(self, rng):
        # A 'no' names a colour and a shape that are both in the picture, on different
        # things: to answer it, a model must bind them.
        names = [thing.named("colour shape") for thing in self.things]
        if rng.random() < 0.5:
            return f"is there a {_pick(rng, names)} ?", "yes"
        mixed = [f"{a.colour} {b.shape}" for a in self.things for b in self.things]
        absent = [name for name in mixed if name not in names]
        if absent:
            return f"is there a {_pick(rng, absent)} ?", "no"

    def _ask_relation(self, rng):
        # Two forms, as in GQA: find a thing by its relation, or say whether a relation holds.
        # The first is a step towards the second: a model that has learned half of what the
        # second takes still answers no better than chance.
        if rng.random() < 0.5:
            if referred := self._refer_by_relation(rng):
                phrase, index, _ = referred
                return f"what colour is {phrase} ?", self.things[index].colour
            return None
        unique = self._unique("colour shape")
        if len(unique) > 1:
            first, second = rng.permutation(list(unique))[:2]
            true = _pick(rng, unique[first].relations(unique[second]))
            relation, answer = _pick(rng, ((true, "yes"), (RELATIONS[true], "no")))
            return f"is the {first} {relation} the {second} ?", answer

    def expressions(self, n=3):
        """Up to n different (expression, index of the thing, type); each fits one thing only.

        type is attribute, or relation: then its attributes alone fit two or more things.
        """
        rng = self._rng(4)
        triples = []
        for turn in range(self.number, self.number + n):
            refer = self._refer_by_relation if turn % 2 else self._refer_by_attribute
            triple = refer(rng)
            if triple and triple not in triples:
                triples.append(triple)
        return triples

    def _refer_by_attribute(self, rng):
        # The shortest name that fits this thing alone: a longer one would give redundant
        # hints. Two things that are alike in all three words have none.
        index = int(rng.integers(len(self.things)))
        for words in ("shape", "colour shape", "size colour shape"):
            name = self.things[index].named(words)
            if name in self._unique(words):
                return f"the {name}", index, "attribute"

    def _refer_by_relation(self, rng):
        # 'the star left of the red ring': no other star is left of it, not even by a pixel.
        fitting = []
        marks = self._unique("colour shape")
        for index, thing in enumerate(self.things):
            others = [t for t in self.things if t.shape == thing.shape and t is not thing]
            for name, mark in marks.items():
                if not others or mark.shape == thing.shape:
                    continue
                for relation in thing.relations(mark):
                    if not any(relation in t.relations(mark, 0) for t in others):
                        phrase = f"the {thing.shape} {relation} the {name}"
                        fitting.append((phrase, index, "relation"))
        return _pick(rng, fitting)

    def _unique(self, words):
        # {name: thing} of the names, made of these words, that fit exactly one thing.
        names = [thing.named(words) for thing in self.things]
        return {n: thing for n, thing in zip(names, self.things) if names.count(n) == 1}


def _pick(rng, options):
    # One of the options; None, without a draw, if there is none.
    options = list(options)
    return options[rng.integers(len(options))] if options else None


def _draw_shape(draw, thing, scale):
    # A box has 2 h columns, x - h to x + h - 1, and most shapes fill it. A triangle is a pixel
    # larger, and a star ends inside. An arm of a cross is a third of the box wide. A star's inner
    # points lie at .42 of the outer radius.
    x, y = np.multiply(scale, thing.centre)
    left, top, right, bottom = np.multiply(scale, thing.box)
    box = [left, top, right - 1, bottom - 1]
    h = scale * thing.half
    colour = COLOURS[thing.colour]
    if thing.shape == "circle":
        draw.ellipse(box, colour)
    elif thing.shape == "ring":
        draw.ellipse(box, outline=colour, width=max(3 * scale, h // 3))
    elif thing.shape == "square":
        draw.rectangle(box, colour)
    elif thing.shape == "triangle":
        draw.polygon([(x, top), (right, bottom), (left, bottom)], colour)
    elif thing.shape == "cross":
        third = h / 3
        draw.rectangle([x - third, top, x + third, bottom - 1], colour)
        draw.rectangle([left, y - third, right - 1, y + third], colour)
    else:  # star: ten points, alternately far and near, clockwise from the top
        points = []
        for k in range(10):
            radius = 0.42 * h if k % 2 else h
            angle = k * math.pi / 5
            points.append((x + radius * math.sin(angle), y - radius * math.cos(angle)))
        draw.polygon(points, colour)


# --- 7. Machine room ----------------------------------------------------------------------
#
# What all scripts but switchbert.py share. You need none of it to understand the sections
# above; look a name up when you want to know how it works.

# --- Image ids ---

# The endings of pictures. Pillow cannot open all of them; a picture that fails is recorded.
PICTURES = r"\.(jpe?g|jpe|jfif|png|webp|bmp|gif|tiff?|avif|hei[cf])"
# What stands around a picture's name: folders, suffixes, and behind a suffix the number of one
# of its captions, as in Flickr30k's '1000092795.jpg#0'. (In 'room#1' it belongs to the name.)
AROUND_NAME = re.compile(
    rf"(?is)^.*[/\\]|({PICTURES}|\.(txt|json|np[yz]))+( *#\d+)?$")
COCO_NAME = re.compile(r"(?i)(coco_\w+?_)?0*(\d+)\Z")


def canonical_id(name):
    r"""An image id as a string, spelled the same whichever file it came from.

    COCO's images are 'COCO_val2014_000000391895.jpg' in Karpathy's splits, 391895 in the
    caption JSON, 'coco_val2014_000000391895.npz' in UNITER's features. Any other name keeps
    its stem. A letter with its accent is one character or, on macOS, two: NFC makes it one.
    >>> names = "COCO_val2014_000000391895.jpg", 391895, "dogs/dog_1.jpg", r"a\dog_1.JPG#0 "
    >>> [canonical_id(name) for name in names]
    ['391895', '391895', 'dog_1', 'dog_1']
    """
    name = str(name).strip()
    if name.isdecimal():  # most are, and there may be millions
        return name.lstrip("0") or "0"
    composed = unicodedata.normalize("NFC", name)
    name = AROUND_NAME.sub("", composed).strip()
    numbered = COCO_NAME.match(name)
    return numbered[2] if numbered else name


def say_found(what, ids, found, where, known):
    """Say how many of some ids were found. Raises BadInput if none was.

    ids (n,) bytes: those that were looked for; found (n,) bool; known (m,) bytes: those that
    are there. If most are missing, it shows an id of each side that the other side lacks, so
    that the reader sees how the spellings differ.
    """
    text = f"{what}: {found.sum():,} of {len(ids):,} found in {where}"
    if 2 * found.sum() < len(ids):
        lonely = np.append(ids[~found][:1], np.setdiff1d(known, ids)[:1])
        text += f"; those that did not meet: {' and '.join(repr(i.decode()) for i in lonely)}"
    if not found.any():
        raise BadInput(text)
    say(text)


# --- Errors ---

class BadInput(ValueError):
    """The user's files or flags are wrong. One sentence says where, why and what to do."""


@contextlib.contextmanager
def reading(path, what, unit="entry"):
    """Turn any error inside this block into BadInput: the file being read is at fault.

        with reading("a.json", "a list of boxes") as at:
            for at.entry, box in enumerate(json.load(...)): ...

    A missing key, a wrong type or a broken header becomes BadInput("a.json: not a list of
    boxes (near entry 3: KeyError 'bbox')"). One net around a reader replaces a check of every
    field.
    """
    at = types.SimpleNamespace(entry=None)
    try:
        yield at
    except BadInput:
        raise
    except Exception as error:
        near = "" if at.entry is None else f"near {unit} {at.entry}: "
        # Only the first sentence: torch's second one advises loading the file unsafely.
        words = " ".join(str(error).split())
        reason = words.split(". ")[0][:200]
        if isinstance(error, FileNotFoundError):
            reason = f"{error.filename or path} is missing"
        elif not isinstance(error, (ValueError, OSError)):
            reason = f"{type(error).__name__} {reason}"
        with contextlib.suppress(OSError):  # this search must not hide the error itself
            for file in (Path(path), *Path(path).glob("*.*")):
                if file.is_file() and open(file, "rb").read(24) == b"version https://git-lfs.":
                    reason += f"; git-lfs has not fetched {file} yet: git lfs pull"
        raise BadInput(f"{path}: not {what} ({near}{reason})") from error


# --- Files ---

def files_below(folder, ending=PICTURES):
    """The files below a folder whose names have an ending, a regular expression; sorted.
    A file in place of the folder is returned alone, whatever its ending.

    Links are followed, but no folder is visited twice. A folder without permission is named and
    left out; any other error ends the search. Hidden files and folders ('._a.jpg' of
    macOS, '.ipynb_checkpoints') and feature stores are left out.
    """
    def stop(error):
        """os.walk would hide that a folder cannot be listed."""
        if isinstance(error, PermissionError):
            say(f"{error}: it is left out")
        elif not isinstance(error, FileNotFoundError):
            raise error

    if folder.is_file():
        return [folder]
    files = []
    visited = set()
    for parent, folders, names in os.walk(folder, onerror=stop, followlinks=True):
        real = os.path.realpath(parent)
        if real in visited or "store.json" in names:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = [name for name in folders if name[0] != "."]
        for name in names:
            if re.fullmatch(f"(?is)[^.].*{ending}", name):
                files.append(Path(parent, name))
    return sorted(files)


def write_whole(path, write, mode="wb"):
    """Call `write(file)`; afterwards `path` holds all that it wrote, or is unchanged. Its folder
    is made if there is none.

    The bytes go to a temporary file beside `path`. When they have reached the disk (fsync),
    that file takes the name. A rename within a folder is atomic: a crash or a full disk costs
    the new version, never the old one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, mode) as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save hides the disk's error in its own
        raise OSError(f"{error.__context__ or error}: {path}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, content):
    """Write a JSON file by write_whole; types that JSON lacks, like Path, become strings."""
    write_whole(path, lambda file: json.dump(content, file, indent=1, default=str), mode="w")


def read_json(path):
    """The content of a JSON file."""
    with reading(path, "a whole JSON file"):
        return json.loads(Path(path).read_bytes())


def save_png(path, image):
    """Write a PIL image as a PNG by write_whole."""
    write_whole(path, lambda file: image.save(file, "PNG"))


# Opens a text file in UTF-8, with or without a byte order mark. Only LF ends a line.
open_text = functools.partial(open, encoding="utf-8-sig", newline="\n")


@contextlib.contextmanager
def only_run_in(folder):
    """Lock a folder during a block. A second run is refused, and changes nothing. A folder in
    which nothing was written, because the block failed, is removed, and so are its parents that
    are then empty.

    The lock (POSIX, on the file .lock in it) belongs to this process alone, not to its
    loading processes, and the system releases it however the process ends, even by SIGKILL.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / ".lock"
    with open(lock, "w") as file:
        try:
            import fcntl
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (ImportError, OSError) as error:
            if getattr(error, "errno", None) in (errno.EAGAIN, errno.EACCES):
                raise BadInput(f"{folder}: another run is at work there; wait for it, or "
                    "choose another --out") from None
            # Windows, and network disks without locks, end here.
            say(f"{folder}: cannot be locked; start no second run there")
            file.close()  # Windows renames no folder that has an open file
        try:
            yield
        finally:
            if [*folder.iterdir()] == [lock]:
                with contextlib.suppress(OSError):  # such as a mount point, or "."
                    lock.unlink()
                    os.removedirs(folder)


# --- Flags ---

def number_type(convert, least, most):
    """The type of a numeric flag: an int or a float in a range. No range contains NaN.

    argparse shows a type by its __name__, here the range: `argument --lr: invalid 1e-12...10
    value: '0'`.
    """
    def parse(text):
        """The number in a text. Raises ValueError if it is not in the range."""
        number = convert(text)
        if not least <= number <= most:
            raise ValueError
        return number

    parse.__name__ = f"{least:g}...{most:g}"
    return parse


# Rates and shares start just above 0: with 0, a run would learn nothing or divide by zero.
COUNT = number_type(int, 1, 1e9)
NATURAL = number_type(int, 0, 1e9)
RATE = number_type(float, 1e-12, 10)
SHARE = number_type(float, 1e-6, 1)


def flag(parser, name, convert, text, default=None):
    """Add a flag. --help shows what it takes: the range of a number, or a type such as Path."""
    parser.add_argument(name, type=convert, default=default, help=text,
        metavar=convert.__name__)


# --- Processes ---

# torchrun numbers the processes that it starts: see start_processes and train.launch.
RANK = int(os.environ.get("RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))


def device():
    """Where this process computes: on its own GPU, on Apple's, or on the CPU.

    Several processes cannot share Apple's GPU, so they compute on the CPU.
    """
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if torch.accelerator.is_available() and WORLD_SIZE == 1:
        return torch.accelerator.current_accelerator()
    return torch.device("cpu")


def say(text):
    """Print from the first process only, and flush. A closed terminal hears nothing."""
    if RANK == 0:
        with contextlib.suppress(OSError):
            print(text, flush=True)


# The progress bar of the first process: how far it is, how fast, and how long it will take.
# Where nobody watches a terminal, it is a line a minute in the log.
pace = dict(delay=60, mininterval=60, maxinterval=60)
if sys.stderr.isatty():
    pace = dict(leave=False)
progress = functools.partial(tqdm, disable=RANK > 0, **pace)


def load_ahead(examples, batches, collate, workers):
    """A DataLoader of `batches`, lists of keys of `examples`, with `workers` loading processes.

    On Linux these are forked, and share the captions; elsewhere each has a copy.
    """
    context = "fork" if workers and sys.platform == "linux" else None
    return DataLoader(examples, batch_sampler=batches, collate_fn=collate,
        num_workers=workers, worker_init_fn=leave_group,
        pin_memory=torch.cuda.is_available(), multiprocessing_context=context)


def leave_group(_):
    """Move a loading process into a session of its own. It still ends with the training.

    No signal to the training's process group reaches it there. On such a signal the training
    takes a last step and saves, and until then it needs its loading processes. SLURM and systemd
    signal each process of a job: after SIGTERM, this one goes on for a minute.
    """
    if hasattr(os, "setsid"):  # Windows has none
        os.setsid()
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(60))


def start_processes(count):
    """Run this same command in `count` processes on this machine, by torchrun.

    Each finds its RANK and WORLD_SIZE in the environment. The function returns when all have
    succeeded. A process that fails prints the reason; then torchrun ends the others, and this
    process exits with the status of the one that failed. The status is 130 if that process, or
    this one, was asked to stop.
    """
    if 0 < torch.cuda.device_count() < count:
        raise BadInput(f"--gpus {count}: this machine has {torch.cuda.device_count()}")
    threads = max(1, torch.get_num_threads() // count)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    # torchrun takes defaults of its flags from variables PET_*; older versions ignore these two.
    # With them, a closed terminal is no request to stop; and after a request, processes have ten
    # minutes to end their step and to save, not half a minute.
    os.environ.update(
        PET_SIGNALS_TO_HANDLE="SIGTERM,SIGINT,SIGQUIT", PET_SHUTDOWN_TIMEOUT="600")
    logging.disable()  # torchrun would explain every error again, in thirty lines
    try:
        torch.distributed.run.main(["--standalone", "--local-addr=127.0.0.1",
            f"--nproc-per-node={count}", "--no-python"] + sys.orig_argv)
    except multiprocessing.SignalException:
        sys.exit(130)
    except multiprocessing.errors.ChildFailedError as error:
        _, failure = error.get_first_failure()
        if failure.exitcode < 0:
            raise BadInput(f"a process was ended by signal {-failure.exitcode}; the same "
                "command goes on, a training with --resume") from None
        sys.exit(failure.exitcode)


# --- Signals, and how a script ends ---

# These signals ask a script to stop. SIGHUP, of a closed terminal, does not: `run` ignores
# it. But a torchrun that you have started passes it on, and half a minute later ends its
# processes.
STOPS = [signal.SIGTERM, signal.SIGINT]
HANGUP = getattr(signal, "SIGHUP", None)  # Windows has none
if WORLD_SIZE > 1 and HANGUP:
    STOPS.append(HANGUP)


def on_stop(handler=signal.default_int_handler):
    """Call handler on any request to stop. The default is Ctrl-C's: unwind and clean up."""
    for number in STOPS:
        signal.signal(number, handler)


def run(main):
    """Call a script's main(argv) and end the process as a user expects.

    For BadInput, OSError (disks, permissions) and a lack of memory it prints one sentence, and
    the status is 1. After Ctrl-C or SIGTERM it is 130, a shell's status for Ctrl-C. A closed
    terminal ends nothing. Any other exception is a bug and keeps its traceback.
    """
    if HANGUP:
        signal.signal(HANGUP, signal.SIG_IGN)
    on_stop()
    sys.stdout.reconfigure(errors="backslashreplace")  # a log need not be able to spell a caption
    status = 1
    try:
        return main(sys.argv[1:])
    except KeyboardInterrupt:
        if RANK > 0:
            on_stop(signal.SIG_IGN)  # a second signal would interrupt the interpreter's end
            sys.exit(130)  # torchrun has ended it; the first process says why
        message = "stopped; repeat the command to continue, a training with --resume"
        status = 130
    except (BadInput, OSError) as error:
        message = f"error: {error}"
    except (MemoryError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {error}"
        if re.search("by peer|remote process", reason):
            on_stop(signal.SIG_IGN)
            sys.exit(1)  # another process has failed, and says why
        if not re.search("DataLoader worker|out of memory|allocate|MemoryError", reason):
            raise
        message = ("error: out of memory? Try fewer --workers; a training also --accum 2, which "
            f"needs half the memory, and --resume to continue ({reason[:150]})")
    # If several processes fail alike, only rank 0 prints: the others wait five seconds, and its
    # exit ends them.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if RANK > 0:
        time.sleep(5)
    print(message, file=sys.stderr, flush=True)
    sys.exit(status)


# --- 8. Command line ----------------------------------------------------------------------


def check(folder, *files):
    """Describe a feature store and caption files; BadInput if one is damaged or of no use.

    It prints store.json, which names the detector: never mix features of two detectors in a run.
    """
    store = FeatureStore(folder)
    usable = (store.counts > 0).sum()
    print(f"{folder}: a feature store of {len(store):,} images, "
        f"{usable:,} of them with regions")
    for key, value in store.meta.items():
        print(f"    {key}: {str(value)[:90]}")
    if not usable:
        raise BadInput(f"{folder}: no image could be used: see {folder}/failed.txt")
    for path in files:
        captions = Captions(read_captions(path))
        store.find(captions.ids, f"{path}: captions")
        print(f"    the first: {captions[0]}")


def main(argv):
    """Check or import; argv: the command line without the script's name."""
    parser = argparse.ArgumentParser(description="Check data before a run reads it.")
    parser.add_argument("command", choices=["check", "import"])
    parser.add_argument("paths", nargs="+", help="check: a feature store, then caption files "
        "or folders; import: bottom-up-attention TSVs of 6, 10 or 13 columns")
    parser.add_argument("-o", "--out", type=Path, default="data/features",
        help="import: the store to write (default: data/features)")
    args = parser.parse_args(argv)
    if args.command == "import":
        args.paths = [import_features(args.paths, args.out).folder]
    check(*args.paths)


if __name__ == "__main__":
    run(main)
