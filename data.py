"""data.py: words, regions, scenes, and the batches that Switch-BERT is pretrained on
======================================================================================

Where this stands

    extract_features.py --writes--> feature store --read by--> data.py --batches--> train.py

This file knows numpy, torch and Pillow, and nothing of the model. It holds the four things that
stand between a folder of files and a batch of tensors:

    caption "a small red star"                 image id
          | WordPiece                              | FeatureStore (memory-mapped, float16)
          v                                        v
    [CLS] a small red star [SEP]            features (R, F)   boxes (R, 4)   class head (C, F)
          | 15% of pieces -> [MASK]                | 15% of regions -> zeros, boxes / (W, H) + area
          v                                        v
    input_ids (B, T)  mlm_labels (B, T)     region_features (B, R, F)  region_boxes (B, R, 5)
    text_mask (B, T)                        region_mask (B, R)  mrc_mask (B, R)  mrc_targets (K, C)
                         \\                  /
                          itm_labels (B,): 1 where caption and image belong together

    B batch, T word pieces, R regions, F region feature, C region classes, K masked regions of the
    batch

Map of the file

    1. Small rules     canonical ids, plain-sentence errors, files that appear whole or not at all
    2. WordPiece       BERT's uncased tokenizer, and a vocabulary builder for corpora without one
    3. Feature store   one folder format: the contract between detector and model
    4. Features        published feature files (bottom-up-attention's TSV) become a store
    5. Captions        the published caption files, recognised by what is in them
    6. Toy world       drawn scenes with captions, questions and referring expressions
    7. Pretraining     masking, mismatching, collate
    8. Command line    check, vocab, import

    python data.py check data/features data/captions.tsv
    python data.py vocab data/captions.tsv -o data/vocab.txt
    python data.py import train2014_obj36.tsv val2014_obj36.tsv -o data/features

Every random choice is drawn from (seed, epoch, index) and from nothing else. So an example looks
the same with 0 or 8 loading processes, on 1 or 8 GPUs, and in a run that was killed and resumed.

Departures from the paper are tagged ASSUMPTION (it is silent) or DEVIATION (on purpose) and listed
in the README. In this file: A7 (masking rates, boxes, mismatches), A9 (the region class
convention).
"""

import argparse
import base64
import contextlib
import heapq
import json
import math
import os
import re
import shutil
import sys
import unicodedata
import zlib
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

# --- 1. Small rules -------------------------------------------------------------------------------


class BadInput(ValueError):
    """The user's files or flags are wrong. The message is one sentence: where, expected, found,
    remedy.

    Every script prints it without a traceback, because a traceback says nothing to the person who
    can mend the file. A bug in this code is any *other* exception, and keeps its traceback.
    """


def canonical_id(name):
    """One spelling for an image id, whatever file it came from: a string.

    COCO's images are 'COCO_val2014_000000391895.jpg' in Karpathy's splits, 391895 in the caption
    JSON, 'COCO_val2014_000000391895' in LXMERT's TSV, 'coco_val2014_000000391895.npz' in UNITER's
    features. All become '391895'; Flickr30k's '1000092795.jpg' becomes '1000092795'. Any other name
    keeps its stem, so that 'dog_1.jpg' and 'cat_1.jpg' stay two images.
    """
    suffixes = r"(\.(jpe?g|png|webp|bmp|gif|tiff?|np[yz]))+$"
    stem = re.sub(suffixes, "", Path(str(name)).name, flags=re.I)
    numbered = re.fullmatch(r"(?:coco_\w+?_)?0*(\d+)", stem, flags=re.I)
    return numbered.group(1) if numbered else stem


def write_whole(path, write, mode="w"):
    """Create `path` by calling `write(file)`: afterwards it holds all of it, or is what it was
    before.

    The bytes go to a temporary neighbour, reach the disk (fsync), and only then take the name: a
    rename within one folder is atomic, so a crash or a full disk can cost the new version but never
    the old.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, mode, **({} if "b" in mode else {"encoding": "utf-8"})) as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path, kind=(dict, list)):
    """What a JSON file holds, an object (dict) or a list. Raises BadInput for anything else."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:  # bad UTF-8 is a ValueError too
        raise BadInput(f"{path}: not a whole JSON file ({error})") from error
    if not isinstance(content, kind):
        raise BadInput(f"{path}: expected a JSON object, found a {type(content).__name__}")
    return content


@contextlib.contextmanager
def expecting(what, path, kind, entry):
    """A key that is missing in this block, or a value of another form, becomes BadInput."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadInput(f"{path}: {kind} {entry}: expected {what} ({error!r})") from error


# --- 2. WordPiece ---------------------------------------------------------------------------------

PAD, UNK, CLS, SEP, MASK = SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class CharacterTable(dict):
    """A table for str.translate that asks `rule` once for each character and then remembers."""

    def __init__(self, rule):
        super().__init__()
        self.rule = rule

    def __missing__(self, code):
        self[code] = self.rule(chr(code))
        return self[code]


def _clean(char):
    """Whitespace becomes a space, invisible characters vanish, Chinese characters stand apart.

    Only the Unicode blocks of CJK ideographs count as Chinese: kana and Hangul are left to the
    pieces.
    """
    if char in "\t\n\r" or unicodedata.category(char) == "Zs":
        return " "
    if char in "\0\ufffd" or unicodedata.category(char) in ("Cc", "Cf"):
        return ""  # e.g. zero-width joiners
    c = ord(char)
    chinese = (0x4E00 <= c <= 0x9FFF or 0x3400 <= c <= 0x4DBF or 0xF900 <= c <= 0xFAFF
        or 0x20000 <= c <= 0x2A6DF or 0x2A700 <= c <= 0x2CEAF or 0x2F800 <= c <= 0x2FA1F)
    return f" {char} " if chinese else char


def _split(char):
    """Accents (category Mn, set free by NFD) vanish, and each punctuation sign stands apart.

    BERT counts every printable ASCII sign that is no letter or digit as punctuation, also $ + < = >
    ^ ` | ~ which Unicode calls symbols.
    """
    if unicodedata.category(char) == "Mn":
        return ""
    ascii_sign = "!" <= char <= "~" and not char.isalnum()
    return f" {char} " if ascii_sign or unicodedata.category(char).startswith("P") else char


CLEAN, SPLIT = CharacterTable(_clean), CharacterTable(_split)


def split_words(text):
    """BERT's basic tokenization, uncased: 'Café (42)!' -> ['cafe', '(', '42', ')', '!'].

    Control characters vanish, Chinese characters become words of their own, case and accents are
    dropped, and each punctuation sign stands alone. [Devlin et al. 2019, tokenization.py]
    """
    return unicodedata.normalize("NFD", text.translate(CLEAN).lower()).translate(SPLIT).split()


class WordPiece:
    """BERT's uncased tokenizer: words, then the longest vocabulary pieces from left to right.

    vocab_file: one piece a line, its line number (from 0) is its id; '##' marks a piece that
    continues a word. With 'play' and '##ing' in it, 'Playing!' is ['play', '##ing', '!'].
    """

    longest_word = 100  # characters; BERT gives up on longer words: [UNK]

    def __init__(self, vocab_file):
        try:
            lines = Path(vocab_file).read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(
                f"{vocab_file}: cannot be read as a vocabulary ({error}); expected a text file "
                "with one word piece a line") from error
        self._take([line.rstrip("\r") for line in lines[:-1] + ([lines[-1]] if lines[-1] else [])],
            vocab_file)

    @classmethod
    def of_pieces(cls, pieces, source="the checkpoint's vocabulary"):
        """A tokenizer from a list of pieces, such as a checkpoint holds."""
        self = cls.__new__(cls)
        self._take(pieces, source)
        return self

    def _take(self, pieces, source):
        self.pieces = pieces
        self.ids = {piece: i for i, piece in enumerate(self.pieces)}
        missing = [s for s in SPECIALS if s not in self.ids]
        if missing:
            raise BadInput(
                f"{source}: expected BERT's vocabulary with {' '.join(SPECIALS)}, found no "
                f"{' '.join(missing)} among its {len(self.pieces)} lines")
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = (
            self.ids[s] for s in SPECIALS)

    def __len__(self):
        return len(self.pieces)

    def split_word(self, word):
        """The pieces of one word, longest match first; [UNK] alone if any part has no piece."""
        if len(word) > self.longest_word:
            return [UNK]
        pieces, start = [], 0
        while start < len(word):
            for end in range(len(word), start, -1):
                piece = ("##" if start else "") + word[start:end]
                if piece in self.ids:
                    break
            else:
                return [UNK]  # BERT drops the whole word, not only the part without a piece
            pieces.append(piece)
            start = end
        return pieces

    def encode(self, text, max_tokens):
        """Ids of '[CLS] text [SEP]', cut to at most max_tokens (both specials counted)."""
        pieces = [p for word in split_words(text) for p in self.split_word(word)]
        return [self.cls_id] + [self.ids[p] for p in pieces[: max_tokens - 2]] + [self.sep_id]

    def decode(self, ids):
        """The text of these ids without specials, for people to read: spaces are a guess."""
        pieces = [self.pieces[i] for i in ids if self.pieces[i] not in SPECIALS]
        return " ".join(pieces).replace(" ##", "")


def build_vocab(texts, size=30522, min_count=2):
    """A word-piece vocabulary for a corpus that has none: specials, characters, then merged pieces.

    Byte-pair merging [Sennrich et al. 2016]: every word starts as its characters, and again and
    again the most frequent neighbouring pair becomes one piece, until `size` is reached or no pair
    is seen min_count times. Google never published BERT's own trainer; like it, this leaves
    frequent words whole and rare ones in a few parts. A heap finds the best pair; its entries go
    stale when a merge changes a count, and are then dropped when they surface instead of being
    searched for. Returns a list of pieces.
    """
    words = Counter(word for text in texts for word in split_words(text))
    split = {w: [w[0], *("##" + c for c in w[1:])] for w in words}
    pieces = list(SPECIALS) + sorted({p for parts in split.values() for p in parts})
    counts, where = Counter(), defaultdict(set)
    for word, parts in split.items():
        for pair in zip(parts, parts[1:]):
            counts[pair] += words[word]
            where[pair].add(word)
    heap = [(-n, pair) for pair, n in counts.items()]
    heapq.heapify(heap)
    known = set(pieces)
    while heap and len(pieces) < size:
        n, pair = heapq.heappop(heap)
        if counts[pair] != -n or -n < min_count:
            continue
        merged = pair[0] + pair[1][2:]
        if merged not in known:  # 'a'+'##bc' and 'ab'+'##c' meet in the same piece
            known.add(merged)
            pieces.append(merged)
        touched = set()
        for word in where.pop(pair):
            old, new = split[word], _merge(split[word], pair, merged)
            split[word] = new
            for p in zip(old, old[1:]):
                counts[p] -= words[word]
                touched.add(p)
            for p in zip(new, new[1:]):
                counts[p] += words[word]
                where[p].add(word)
                touched.add(p)
        for p in touched:
            if counts[p] > 0:
                heapq.heappush(heap, (-counts[p], p))
    return pieces


def _merge(parts, pair, merged):
    out, i = [], 0
    while i < len(parts):
        if tuple(parts[i : i + 2]) == pair:
            out.append(merged)
            i += 2
        else:
            out.append(parts[i])
            i += 1
    return out


# --- 3. The feature store -------------------------------------------------------------------------
#
# A folder, and the only thing that the detector's side and the model's side share:
#
#     store.json          version, complete, N, R, F, C, class_names, detector, ...
#     ids.npy             (N,)       bytes     canonical image ids, UTF-8
#     counts.npy          (N,)       int32     regions of the image; -1 not written, 0 failed
#     sizes.npy           (N, 2)     int32     image width, height in pixels
#     boxes.npy           (N, R, 4)  float32   x1, y1, x2, y2 in pixels of the original image
#     features.npy        (N, R, F)  float16   mean-pooled RoI feature
#     failed.txt                     text      id and reason of every image that could not be had
#
# and, if C > 0, what gives each region its distribution over classes, background first: either
#
#     class_weight.npy    (C, F)     float32   the detector's last layer, once for all images:
#     class_bias.npy      (C,)       float32   distribution = softmax(weight @ feature + bias)
# or
#     class_probs.npy     (N, R, C)  float16   the distributions themselves, of imported features
#
# A detector's class logits are linear in the very feature that is stored. So the layer, 13 MB for
# Visual Genome's 1,601 classes, says what 115 KB an image would: 380 GB for 3.3 million.
#
# Rows beyond an image's count are zeros. float16 halves the disk (36 x 2048 x 2 = 147 KB an image)
# and its rounding, 0.05 %, is far below a detector's noise. The arrays are ordinary .npy files
# opened as memory maps: nothing is loaded, the operating system's page cache is shared by all
# loading processes, and `np.load(folder + "/features.npy", mmap_mode="r")` reads them without this
# code.

STORE_VERSION = 1
STORE_KEYS = ("complete", "num_images", "num_regions", "feature_size", "num_region_classes",
    "class_names", "detector", "id_bytes")
# ASSUMPTION A9: region classes count the background, as class 0. UNITER, VOLTA and
# torchvision do so; detectron2 ports put it last.


class FeatureStore:
    """Read a feature store. `FeatureStore.create` is the writer.

    store = FeatureStore("features/")      raises BadInput if it is missing or half-written
    store.row("COCO_val2014_000000391895") -> row number, or None if the image is not in it
    store[row] -> dict of features (n, F) float16, boxes (n, 4) float32, size (W, H); the arrays
        are the mapped file itself and read-only: copy what is to be changed
    store.class_probs(row) -> (n, C) float32, or None if the store says nothing about classes

    Attributes: num_regions R, feature_size F, num_region_classes C (0: no distributions),
    class_names, detector, meta (all of store.json). Safe in several processes: they map the same
    pages, read-only.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        self.meta = _read_store_json(self.folder)
        if not self.meta["complete"]:
            done = int((np.load(self.folder / "counts.npy", mmap_mode="r") >= 0).sum())
            raise BadInput(
                f"{folder}: a half-written feature store ({done} of {self.meta['num_images']} "
                "images); run the command that was writing it again, and it will go on from there")
        self._open()

    @staticmethod
    def is_complete(folder):
        """True if a finished store lies there; False if nothing does, or a half-written one."""
        return (Path(folder) / "store.json").exists() and _read_store_json(folder)["complete"]

    def _open(self):
        m = self.meta
        self.num_regions, self.feature_size = m["num_regions"], m["feature_size"]
        self.num_region_classes, self.class_names = m["num_region_classes"], m["class_names"]
        self.detector = m["detector"]
        # asarray: a plain view of the mapped pages, which numpy slices ten times faster than a
        # memmap.
        self.arrays = {name: np.asarray(_open_array(self.folder, name, *form))
            for name, form in _layout(m).items()}
        self.ids, self.counts = self.arrays["ids"], self.arrays["counts"]
        # Ids are looked up by bisection in sorted order. A dict of 3 million strings would take
        # half a gigabyte in every loading process; this takes 8 bytes an image.
        self._order = np.argsort(self.ids, kind="stable")

    def __getstate__(self):
        return self.folder, self.meta  # a loading process opens the maps anew: no arrays travel

    def __setstate__(self, state):
        self.folder, self.meta = state
        self._open()

    def __len__(self):
        return len(self.ids)

    def row(self, image_id):
        """Row of an image under any spelling of its id, or None if it is absent or its extraction
        failed.
        """
        key = np.bytes_(canonical_id(image_id).encode())
        at = int(np.searchsorted(self.ids, key, sorter=self._order))
        row = int(self._order[at]) if at < len(self.ids) else -1
        return row if row >= 0 and self.ids[row] == key and self.counts[row] > 0 else None

    def __getitem__(self, row):
        # Nothing is copied before a batch is built, and nothing looked at: it was when written.
        n = int(self.counts[row])
        return {"features": self.arrays["features"][row, :n],
            "boxes": self.arrays["boxes"][row, :n],
            "size": tuple(self.arrays["sizes"][row].tolist())}

    def class_probs(self, row, chosen=slice(None)):
        """(k, C) float32: distributions over classes of an image's regions, background first; None
        if the store has none. chosen: which of its n regions, as an index of an array.
        """
        if not self.num_region_classes:
            return None
        n = int(self.counts[row])
        if "class_probs" in self.arrays:
            return self.arrays["class_probs"][row, :n][chosen].astype(np.float32)
        features = self.arrays["features"][row, :n][chosen].astype(np.float32)  # (k, F)
        logits = features @ self.arrays["class_weight"].T + self.arrays["class_bias"]  # (k, C)
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        return odds / odds.sum(axis=1, keepdims=True)

    def check(self, row):
        """Raise BadInput if this image's regions are none that a run could use."""
        problem = record_problem(**self[row], class_probs=self.class_probs(row))
        if problem:
            raise BadInput(f"{self.folder}: image {self.ids[row].decode()}: {problem}; "
                "extract it again")

    @staticmethod
    def create(folder, ids, num_regions, feature_size, num_region_classes=0, class_names=(),
            detector="", class_head=None, **more):
        """A StoreWriter for these images, new or where an interrupted one stopped.

        ids: every image that will be written, in row order. class_head: (weight (C, F), bias (C,))
        of the detector's last layer, background first, in place of stored distributions. `more`
        goes into store.json as it is. Raises BadInput if the folder holds a store of something
        else.
        """
        ids = [canonical_id(i) for i in ids]
        meta = dict(version=STORE_VERSION, complete=False, num_images=len(ids),
            num_regions=num_regions, feature_size=feature_size,
            num_region_classes=len(class_head[1]) if class_head else num_region_classes,
            class_names=list(class_names), class_head=bool(class_head), detector=detector, **more)
        return StoreWriter(Path(folder), ids, meta, class_head)


class StoreWriter:
    """Fill a store row by row, in any order, from any number of processes; kill it at any moment.

    for row in writer.pending(): writer.write(row, features, boxes, size)
    writer.finish()
    """

    def __init__(self, folder, ids, meta, class_head=None):
        self.folder, self.meta = folder, meta
        strange = next((i for i in ids if not i or not i.isprintable()), None)
        if strange is not None:
            raise BadInput(f"{folder}: the image id {strange!r} is empty or cannot be printed; "
                "give the image another name")
        if len(set(ids)) != len(ids):
            twice = next(i for i, n in Counter(ids).items() if n > 1)
            raise BadInput(
                f"{folder}: two images have the id {twice!r}; a store holds each id once")
        ids = np.array([i.encode() for i in ids], dtype=bytes)
        meta["id_bytes"] = max(ids.dtype.itemsize, 1)
        fixed = {"ids": ids}
        if class_head:
            fixed |= {name: np.asarray(value, np.float32)
                for name, value in zip(("class_weight", "class_bias"), class_head)}
        if (folder / "store.json").exists():
            self._check_same(_read_store_json(folder), fixed)
        else:
            self._allocate(fixed)
        self.arrays = {name: _open_array(folder, name, *form, mode="r+")
            for name, form in _layout(meta).items()}
        self._check_disk(len(self.pending()) / max(1, len(ids)))

    def _check_disk(self, share=1.0):
        # Mapped files take their disk as they are filled, and a full one kills without a word.
        forms = _layout(self.meta).values()
        size = share * sum(np.dtype(dtype).itemsize * math.prod(shape) for dtype, shape in forms)
        if size > (free := shutil.disk_usage(self.folder).free):
            raise BadInput(f"{self.folder}: {size / 1e9:.2f} GB are to be written, and there are "
                f"{free / 1e9:.2f} GB free; choose another disk")

    def _allocate(self, fixed):
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(f"{self.folder}: cannot be made ({error.strerror})") from error
        # What a run that was killed here has left may be overwritten; nothing else.
        ours = {f"{name}.npy" for name in _layout(self.meta)}
        others = [p.name for p in self.folder.iterdir() if p.name not in ours and p.name[0] != "."]
        if others:
            raise BadInput(f"{self.folder}: holds {others[0]!r} and no feature store; choose a "
                "folder that is empty or not there")
        self._check_disk()
        for name, (dtype, shape) in _layout(self.meta).items():
            # 'w+' makes a sparse file: no disk is used until a row is written.
            array = np.lib.format.open_memmap(self.folder / f"{name}.npy", "w+", dtype, shape)
            if name in fixed or name == "counts":
                array[:] = fixed.get(name, -1)
            array.flush()
        write_whole(self.folder / "store.json", lambda f: json.dump(self.meta, f, indent=1))

    def _check_same(self, found, fixed):
        # Another version of torch may finish what this one began, and the same weights may have
        # another name; nothing else may differ.
        different = [k for k in self.meta
            if k not in ("complete", "versions", "weights") and found.get(k) != self.meta[k]]
        different = different or [name for name, value in fixed.items() if not np.array_equal(
            _open_array(self.folder, name, *_layout(self.meta)[name]), value)]
        if different:
            raise BadInput(
                f"{self.folder}: holds a feature store of other images or settings (it differs in "
                f"{', '.join(different)}); choose another folder or remove this one")

    def pending(self):
        """Rows that are still to be written."""
        return np.flatnonzero(self.arrays["counts"] < 0).tolist()

    def write(self, row, features, boxes, size, class_probs=None):
        """Store one image: features (n, F), boxes (n, 4) pixels, size (W, H), class_probs (n, C); n
        <= R. Raises BadInput, and writes nothing, if a run could not use it.
        """
        n, values = len(features), dict(features=features, boxes=boxes, class_probs=class_probs)
        problem = None if n else "no region"
        for name in [name for name in values if n and name in self.arrays]:
            found, most, *rest = np.shape(values[name]), *self.arrays[name].shape[1:]
            if found != (n, *rest) or n > most:
                problem = f"{name} of shape {found}, expected {(n, *rest)} and n <= {most}"
        problem = problem or record_problem(size=size, **values)
        if problem:
            raise BadInput(f"image {self.arrays['ids'][row].decode()}: {problem}")
        for name, value in values.items():
            if name in self.arrays:
                self.arrays[name][row, :n] = value
        self.arrays["sizes"][row] = size
        self.arrays["counts"][row] = n  # last: a row counts as written only once all of it is there

    def fail(self, row, reason):
        """An image that cannot be had: its row stays empty, failed.txt says why."""
        with open(self.folder / "failed.txt", "a", encoding="utf-8") as file:
            file.write(f"{self.arrays['ids'][row].decode()}\t{' '.join(reason.split())}\n")
        self.arrays["counts"][row] = 0

    def finish(self):
        """Every row is written: say so in store.json, and return the reader."""
        if self.pending():
            raise BadInput(f"{self.folder}: {len(self.pending())} images are not written yet")
        self._sort_failures()
        for array in self.arrays.values():
            array.flush()
        self.meta["complete"] = True
        write_whole(self.folder / "store.json", lambda f: json.dump(self.meta, f, indent=1))
        return FeatureStore(self.folder)

    def _sort_failures(self):
        # In row order and once each, whoever came first and whoever was killed in between.
        path = self.folder / "failed.txt"
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines()
            reason = {line.split("\t")[0]: line for line in reversed(lines)}
            failed = self.arrays["ids"][self.arrays["counts"] == 0]
            write_whole(path, lambda f: f.writelines(reason[i.decode()] + "\n" for i in failed))


def _layout(meta):
    n, r = meta["num_images"], meta["num_regions"]
    layout = {"ids": (f"S{meta['id_bytes']}", (n,)), "counts": (np.int32, (n,)),
        "sizes": (np.int32, (n, 2)), "boxes": (np.float32, (n, r, 4)),
        "features": (np.float16, (n, r, meta["feature_size"]))}
    c, f = meta["num_region_classes"], meta["feature_size"]
    if meta.get("class_head"):
        layout |= {"class_weight": (np.float32, (c, f)), "class_bias": (np.float32, (c,))}
    elif c:
        layout["class_probs"] = (np.float16, (n, r, c))
    return layout


def _read_store_json(folder):
    path = Path(folder) / "store.json"
    if not path.exists():
        raise BadInput(f"{folder}: no feature store here (store.json is missing); "
            "extract_features.py writes one")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        version = meta["version"]
        _ = [meta[key] for key in STORE_KEYS]
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path}: not a feature store's description ({error!r})") from error
    if version != STORE_VERSION:
        raise BadInput(
            f"{path}: expected store version {STORE_VERSION}, found {version}; extract it again")
    return meta


def _open_array(folder, name, dtype, shape, mode="r"):
    path = Path(folder) / f"{name}.npy"
    try:
        array = np.load(path, mmap_mode=mode, allow_pickle=False)
    except PermissionError as error:
        raise BadInput(f"{path}: cannot be opened ({error.strerror})") from error
    except (OSError, ValueError) as error:
        raise BadInput(
            f"{path}: cannot be opened ({error}); the store is damaged, write it again") from error
    if array.shape != shape or array.dtype != np.dtype(dtype):
        raise BadInput(
            f"{path}: expected {shape} {np.dtype(dtype)} as store.json says, found {array.shape} "
            f"{array.dtype}; the store is damaged, write it again")
    return array


def record_problem(features, boxes, size, class_probs=None):
    """What is wrong with an image's regions, in words, or None. Looked at before they are stored: a
    NaN that gets into a batch shows only as a NaN loss, thousands of images later.
    """
    width, height = size
    if min(size) < 1:
        return f"a size of {width} x {height} pixels"
    with np.errstate(over="ignore"):  # float16 ends at 65504: beyond, infinity would be stored
        for name, values in dict(features=features, boxes=boxes, class_probs=class_probs).items():
            if values is not None and not np.isfinite(np.asarray(values, np.float16)).all():
                return f"{name} with NaN or infinity"
    if len(boxes) and (boxes.min() < -1 or (boxes.max(axis=0)[2:] > (width + 1, height + 1)).any()):
        return f"a box outside the picture of {width} x {height} pixels"
    if (boxes[:, 2:] < boxes[:, :2]).any():
        return "a box whose x2 < x1 or y2 < y1"
    return None


def normalise_boxes(boxes, size):
    """(n, 4) pixels -> (n, 5): x1/W, y1/H, x2/W, y2/H, area/(W*H), all in [0, 1]. ASSUMPTION A7."""
    width, height = size
    out = np.empty((len(boxes), 5), dtype=np.float32)
    out[:, :4] = np.clip(boxes / np.array([width, height, width, height], dtype=np.float32), 0, 1)
    out[:, 4] = (out[:, 2] - out[:, 0]) * (out[:, 3] - out[:, 1])
    return out


def region_inputs(store, image_id, blank=False):
    """What the encoder reads of an image: region_features (n, F) float16, as they are stored, and
    region_boxes (n, 5) float32, as numpy.

    Of an image without features, or if blank, none: n = 0, and the model has the words alone.
    """
    row = None if blank else store.row(image_id)
    if row is None:
        return dict(region_features=np.zeros((0, store.feature_size), np.float16),
            region_boxes=np.zeros((0, 5), np.float32))
    record = store[row]
    return dict(region_features=record["features"],
        region_boxes=normalise_boxes(record["boxes"], record["size"]))


# --- 4. Published features ------------------------------------------------------------------------
#
# The "bottom-up attention" files that most papers of the field used: a TSV without a header, one
# image a line, arrays as base64 of little-endian numbers. Three forms are in circulation. They are
# told apart by their number of columns, because that is what also says whether width or height
# comes first:
#
#     6    Anderson et al.   image_id, image_w, image_h, num_boxes, boxes, features
#     10   LXMERT            img_id, img_h, img_w, objects_id, objects_conf, attrs_id, attrs_conf,
#                            num_boxes, boxes, features
#     13   VOLTA             the ten, then cls_prob, attrs, classes
#
# Boxes are float32 (n, 4), x1 y1 x2 y2 in pixels; features float32 (n, 2048); cls_prob float32
# (n, 1601), background first. Only the last form has distributions: masked region classification
# needs them, and training does without it where a store has none.

TSV_WIDTH_HEIGHT_BOXES = {6: (1, 2, 3), 10: (2, 1, 7), 13: (2, 1, 7)}  # columns of W, H, num_boxes


def import_features(paths, folder, detector="vg", background="first", classes=None):
    """Write a feature store from published TSV files; one that was interrupted goes on.

    background: where cls_prob has it: "first" (VOLTA), "last" (detectron2's ports), or "none" (cut
    off; it is then what the others lack of 1). The store always has it first. classes: a file with
    a class name a line, without background, or None. Two passes, a line in memory at a time: the
    first counts the regions, the second writes. Raises BadInput with the line of the first problem
    of form; images whose numbers no run could use are left out, with the reason in failed.txt.
    """
    first, most, size, num_classes = tsv_sizes(paths, background)
    names = ["background", *read_class_names(classes)] if classes else []
    if names and num_classes and len(names) != num_classes:
        raise BadInput(f"{classes}: {len(names) - 1} names, but the features have "
            f"{num_classes - 1} classes beside the background")
    writer = FeatureStore.create(folder, first, most, size, num_classes, names, detector,
        background="first", box_format="x1 y1 x2 y2, pixels", dtype="float16",
        source=[Path(p).name for p in paths])
    row_of, pending = {place: row for row, place in enumerate(first.values())}, {*writer.pending()}
    twice = 0
    for path, number, cells in tsv_lines(paths, "importing"):
        row = row_of.get((path, number))
        twice += row is None
        if row in pending:
            try:
                writer.write(row, **tsv_record(path, number, cells, background))
            except BadInput as error:
                writer.fail(row, str(error))
    if twice:
        print(f"{twice:,} lines name an image that was there before; the first one counts")
    return writer.finish()


def tsv_sizes(paths, background):
    """({image id: (path, line) where it is first met}, most regions of an image, F, C or 0)"""
    first, most, example, columns = {}, 0, None, None
    for path, number, cells in tsv_lines(paths, "counting"):
        columns = columns or len(cells)
        if len(cells) != columns:
            raise BadInput(f"{path}: line {number}: {len(cells)} columns after lines of {columns}; "
                "import one form at a time")
        first.setdefault(canonical_id(cells[0]), (path, number))
        n = _whole_number(path, number, cells, 2)
        if n and not example:
            example = tsv_record(path, number, cells, background)
        most = max(most, n)
    if not example:
        raise BadInput(f"{', '.join(map(str, paths))}: no image with a region")
    probs = example["class_probs"]
    return first, most, example["features"].shape[1], 0 if probs is None else probs.shape[1]


def tsv_lines(paths, doing):
    """Yields (path, line number, cells) of some TSVs, one line in memory at a time."""
    for path in paths:
        with open_text(path) as file, tqdm(total=os.path.getsize(path), unit="B", unit_scale=True,
                desc=f"{doing} {Path(path).name}", leave=False, disable=None) as bar:
            for number, line in enumerate(file, 1):
                bar.update(len(line))
                cells = line.rstrip("\r\n").split("\t")
                if len(cells) not in TSV_WIDTH_HEIGHT_BOXES:
                    raise BadInput(f"{path}: line {number}: expected 6, 10 or 13 columns, found "
                        f"{len(cells)}; is the file cut off, or something else?")
                yield path, number, cells


def tsv_record(path, number, cells, background):
    """What StoreWriter.write takes, from the cells of a line."""
    width, height, n = (_whole_number(path, number, cells, i) for i in range(3))
    at = TSV_WIDTH_HEIGHT_BOXES[len(cells)][2] + 1
    boxes, features = (_decoded(path, number, cells[i], n, name)
        for i, name in ((at, "boxes"), (at + 1, "features")))
    probs = None
    if len(cells) == 13:
        probs = background_first(_decoded(path, number, cells[10], n, "cls_prob"), background)
        wrong = np.abs(probs.sum(axis=1) - 1) > 0.02
        if wrong.any() or probs.min(initial=0) < -0.02:
            raise BadInput(f"{path}: line {number}: cls_prob of a region adds up to "
                f"{probs[wrong].sum(axis=1)[:1]}, expected 1; are these probabilities?")
    if boxes.shape[1] != 4:
        raise BadInput(
            f"{path}: line {number}: boxes: expected {n} x 4 numbers, found {n} x {boxes.shape[1]}")
    return dict(features=features, boxes=boxes, size=(width, height), class_probs=probs)


def _whole_number(path, number, cells, which):
    cell = cells[TSV_WIDTH_HEIGHT_BOXES[len(cells)][which]]
    name, most = (("width", 100_000), ("height", 100_000), ("num_boxes", 1000))[which]
    if not cell.isdecimal() or int(cell) > most:
        raise BadInput(f"{path}: line {number}: {name}: expected a whole number up to {most}, "
            f"found {cell[:20]!r}")
    return int(cell)


def _decoded(path, number, cell, n, name):
    # Files that Python 3 wrote may say b'...' around the base64.
    try:
        values = np.frombuffer(base64.b64decode(re.sub(r"^b'(.*)'$", r"\1", cell)), "<f4")
        return values.reshape(n, -1 if n else 4)
    except ValueError as error:
        raise BadInput(
            f"{path}: line {number}: {name}: not base64 of {n} rows of float32 ({error})") from None


def background_first(probs, background):
    """(n, C) distributions with the background as class 0; background: where they have it now."""
    if background == "last":
        return np.roll(probs, 1, axis=1)
    if background == "none":
        return np.concatenate([1 - probs.sum(axis=1, keepdims=True), probs], axis=1)
    return probs


def read_class_names(path):
    """Names of a file with one a line, as Visual Genome's objects_vocab.txt."""
    with open_text(path) as file:
        return [line.strip() for line in file.read().splitlines() if line.strip()]


# --- 5. Captions ----------------------------------------------------------------------------------
#
# Caption files as they are published. They are told apart by what is in them, never by their name:
#
#     Conceptual Captions   a very typical bus station <TAB> http://lh6.ggpht.com/-IvRtNLNcG8o/...
#     CC12M                 the same two columns the other way round
#     own data              dog_1 <TAB> a dog on a sofa               (image id, caption)
#     COCO captions         {"annotations": [{"image_id": 318556, "caption": "A very ..."}, ...]}
#     Karpathy's splits     {"images": [{"split": "train", "filename": "1000092795.jpg",
#                            "sentences": [{"raw": "Two young guys ..."}, ...]}, ...]}
#
# A picture of Conceptual Captions has no id but its link: its id is crc32(url), as in VOLTA's
# files. Of 3.3 million links about 1,300 pairs share one: the second picture stays out of a store.


def read_captions(path, split=None):
    """(image id, caption) pairs of a caption file, in its order; its format is recognised.

    split: "train", "val" or "test" of a file that has splits (Karpathy's; `restval` joins train).
    A file without splits is given whole as its "train", and has nothing in the others. Raises
    BadInput with the line or key of the first problem.
    """
    kind, records = open_captions(path)
    return [(i, text) for i, text, s in records if split in (None, s)]


def open_captions(path):
    """(name of the format, iterator of (image id, caption, split)) of a caption file."""
    with open_text(path) as file:
        start = file.read(4096).lstrip()
    if start.startswith(("{", "[")):
        return _json_captions(path)
    first = start.split("\n")[0].rstrip("\r").split("\t")
    if len(first) != 2:
        raise BadInput(
            f"{path}: line 1: expected a JSON file or two columns with a tab between them (image "
            f"id and caption, or caption and link), found {len(first)} column(s)")
    links = [bool(re.match(r"https?://\S+$", cell)) for cell in first]
    kind = ("Conceptual Captions" if links[1] else "CC12M" if links[0] else "image id, caption")
    return kind, _tsv_captions(path, kind)


def open_text(path):
    """A text file, with or without a byte order mark. Raises BadInput if it cannot be opened."""
    try:
        return open(path, encoding="utf-8-sig", errors="surrogateescape", newline="\n")
    except OSError as error:
        raise BadInput(f"{path}: cannot be opened ({error.strerror})") from error


def _tsv_captions(path, kind):
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            cells = line.rstrip("\r\n").split("\t")
            if len(cells) != 2:
                raise BadInput(
                    f"{path}: line {number}: expected 2 columns ({kind}), found {len(cells)}")
            if any("\udc80" <= c <= "\udcff" for c in line):  # surrogateescape's mark of bad bytes
                raise BadInput(f"{path}: line {number}: this is not UTF-8; convert the file")
            if kind == "image id, caption":
                yield canonical_id(cells[0]), cells[1], "train"
            else:
                text, url = cells if kind == "Conceptual Captions" else cells[::-1]
                yield str(zlib.crc32(url.encode())), text, "train"


def _json_captions(path):
    content = read_json(path)
    keys = content if isinstance(content, dict) else {}
    if "annotations" in keys:
        return "COCO captions", _coco_captions(path, keys["annotations"])
    if "images" in keys:
        return "Karpathy's splits", _karpathy_captions(path, keys["images"])
    found = ", ".join(map(repr, list(keys)[:5])) or "no keys"
    raise BadInput(f"{path}: expected the key 'annotations' (COCO captions) or 'images' "
        f"(Karpathy's splits), found {found}")


def _coco_captions(path, annotations):
    for number, record in enumerate(annotations):
        with expecting("image_id and caption, of COCO's captions", path, "annotation", number):
            found = canonical_id(record["image_id"]), record["caption"], "train"
        yield found


def _karpathy_captions(path, images):
    for number, image in enumerate(images):
        with expecting("filename, split and sentences with raw", path, "image", number):
            split = "train" if image["split"] == "restval" else image["split"]
            image_id = canonical_id(image.get("cocoid", image["filename"]))
            found = [(image_id, sentence["raw"], split) for sentence in image["sentences"]]
        yield from found


# --- 6. The toy world -----------------------------------------------------------------------------
#
# A scene is a number. From it follow the objects, the picture, the captions, the questions and the
# referring expressions, so a data set is a range of numbers, and held-out scenes are another range.

COLOURS = {"red": (215, 45, 45), "green": (45, 165, 60), "blue": (50, 85, 220),
    "yellow": (235, 215, 50), "purple": (150, 60, 185), "orange": (240, 140, 30),
    "white": (245, 245, 245), "black": (20, 20, 20)}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = {"small": (7, 9), "large": (14, 18)}  # half the width, in pixels: from, to
TOY_CLASSES = ["background"] + [f"{c} {s}" for c in COLOURS for s in SHAPES]  # C = 1 + 48
SCENE_PIXELS = 128
TRAIN_SCENES, HELD_OUT_SCENES = (0,
    1_000_000)  # the first scene of each split; splits never come near
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1),
    "below": (1, 1)}  # axis, sign


class Thing(dict):
    """One object of a scene: size, colour, shape (words); centre, half width (pixels)."""

    @property
    def box(self):
        """x1, y1, x2, y2 in pixels."""
        (x, y), h = self["centre"], self["half"]
        return (x - h, y - h, x + h, y + h)

    @property
    def place(self):
        """Where in the picture it is, by the axis along which it is farther from the middle."""
        x, y = (c - SCENE_PIXELS // 2 for c in self["centre"])
        if max(abs(x), abs(y)) < 16:
            return "in the middle"
        if abs(x) > abs(y):
            return "on the left" if x < 0 else "on the right"
        return "at the top" if y < 0 else "at the bottom"

    def named(self, *words):
        """'small red star' for named('size', 'colour', 'shape'); an unnamed shape is a 'thing'."""
        return " ".join([self[w] for w in ("size", "colour") if w in words]
            + [self["shape"] if "shape" in words else "thing"])


class Scene:
    """Scene number `number`: 2 to 6 things that do not touch. Everything about it follows from the
    number.

    things: list of Thing; .draw() -> PIL image; .captions(n), .questions(n), .expressions(n)
    """

    def __init__(self, number):
        self.number = number
        rng = self._rng(0)
        wanted = int(rng.integers(2, 7))
        self.things = []
        while len(self.things) < wanted:
            thing = self._new_thing(rng)
            self.things = self.things + [thing] if thing else []  # no room left: begin again

    def _rng(self, stream):
        # One stream for each use: more captions must not change the picture.
        return np.random.default_rng([self.number, stream])

    def _new_thing(self, rng):
        thing = Thing(
            size=_pick(rng, list(SIZES)), colour=_pick(rng, list(COLOURS)), shape=_pick(rng, SHAPES)
        )
        # Half of the things share their colour or their shape with another one. Without them a
        # model could match 'red star' to a scene by finding 'red' and 'star' anywhere: nothing
        # would need binding.
        if self.things and rng.random() < 0.5:
            same = _pick(rng, ("colour", "shape"))
            thing[same] = _pick(rng, self.things)[same]
        for _ in range(30):
            half = int(rng.integers(SIZES[thing["size"]][0], SIZES[thing["size"]][1] + 1))
            centre = rng.integers(half + 2, SCENE_PIXELS - half - 2, size=2)
            thing.update(centre=(int(centre[0]), int(centre[1])), half=half)
            if all(max(abs(int(a) - b) for a, b in zip(centre, t["centre"])) > half + t["half"] + 2
                    for t in self.things):
                return thing

    def draw(self):
        """The picture: a PIL image, 128 x 128 RGB, things on grey noise."""
        noise = self._rng(1).integers(95, 160, (SCENE_PIXELS, SCENE_PIXELS, 1), dtype=np.uint8)
        image = Image.fromarray(np.repeat(noise, 3, axis=2))
        draw = ImageDraw.Draw(image)
        for thing in self.things:
            _draw_shape(draw, thing)
        return image

    def where(self, **words):
        """The things with all of these words: where(colour='red', shape='star')."""
        return [t for t in self.things if all(t[k] == v for k, v in words.items())]

    def captions(self, n=4):
        """n sentences that are true of this picture and of few others."""
        rng = self._rng(2)
        return [self._caption(rng) for _ in range(n)]

    def _caption(self, rng):
        # Three things where there are three: among 100 scenes 2 % of the captions are then true of
        # another one as well. With two things it would be 8 %.
        things = [self.things[i] for i in rng.permutation(len(self.things))[:3]]
        names = ["a " + t.named("size", "colour", "shape") for t in things]
        # Half of the captions say where two of the things are, the others how two lie to each
        # other. Where one thing is can be read from one region, and a model that reads places
        # learns later to compare them; from comparisons alone none learned anything of places.
        if rng.random() < 0.5:
            places = [f" {t.place}" for t in things[:2]] + [""]
            return " and ".join(n + p for n, p in zip(names, places))
        relation = _pick(rng, _true_relations(things[0], things[1]))
        return f"{names[0]} {relation} {names[1]}" + "".join(f" and {n}" for n in names[2:])

    def questions(self, n=5):
        """n (question, answer, type) triples; type is colour, shape, count, existence or relation.

        Kinds take turns, and a kind that this scene has no fair question for is left out. Yes and
        no are equally frequent by construction, and 'what ...' questions have one answer in the
        picture. Numbers are digits, as VQA's evaluation writes them.
        """
        rng = self._rng(3)
        kinds = [self._ask_colour, self._ask_shape, self._ask_count, self._ask_existence,
            self._ask_relation]
        asked = [kinds[(self.number + i) % len(kinds)](rng) for i in range(n)]
        return [q for q in asked if q]

    def _ask_colour(self, rng):
        unique = [t for t in self.things if len(self.where(size=t["size"], shape=t["shape"])) == 1]
        if unique:
            thing = _pick(rng, unique)
            return f"what colour is the {thing.named('size', 'shape')} ?", thing["colour"], "colour"

    def _ask_shape(self, rng):
        unique = [
            t for t in self.things if len(self.where(size=t["size"], colour=t["colour"])) == 1]
        if unique:
            thing = _pick(rng, unique)
            return f"what shape is the {thing.named('size', 'colour')} ?", thing["shape"], "shape"

    def _ask_count(self, rng):
        # Counting all things, those of a size, or of a colour or shape that is there: answers 1 to
        # 6.
        key = _pick(rng, ("all", "size", "colour", "shape"))
        if key == "all":
            return "how many things are there ?", str(len(self.things)), "count"
        word = _pick(rng, self.things)[key]
        name = f"{word}s" if key == "shape" else f"{word} things"
        name = name.replace("crosss", "crosses")
        return f"how many {name} are there ?", str(len(self.where(**{key: word}))), "count"

    def _ask_existence(self, rng):
        # A 'no' names a colour and a shape that are both in the picture, on different things: only
        # looking at how they go together answers it.
        if rng.random() < 0.5:
            thing = _pick(rng, self.things)
            return f"is there a {thing.named('colour', 'shape')} ?", "yes", "existence"
        absent = [(a["colour"], b["shape"]) for a in self.things for b in self.things
            if not self.where(colour=a["colour"], shape=b["shape"])]
        if absent:
            return f"is there a {' '.join(_pick(rng, absent))} ?", "no", "existence"

    def _ask_relation(self, rng):
        # Three forms, as in GQA: find a thing by its place, choose between places, say yes or no.
        # The first two are the way to the third, which gives no partial credit: half of what there
        # is to know answers it no better than chance.
        form = int(rng.integers(3))
        if form == 0:
            found = self._refer_by_relation(rng)
            return found and (f"what colour is {found[0]} ?",
                self.things[found[1]]["colour"], "relation")
        unique = [
            t for t in self.things if len(self.where(colour=t["colour"], shape=t["shape"])) == 1]
        if len(unique) < 2:
            return None
        a, b = (unique[i] for i in rng.permutation(len(unique))[:2])
        true = _pick(rng, _true_relations(a, b))
        opposite = next(r for r, (axis, sign) in RELATIONS.items()
            if axis == RELATIONS[true][0] and sign == -RELATIONS[true][1])
        names = [t.named("colour", "shape") for t in (a, b)]
        if form == 1:
            first, second = (true, opposite) if rng.random() < 0.5 else (opposite, true)
            answer = true.removesuffix(" of")
            return f"is the {names[0]} {first} or {second} the {names[1]} ?", answer, "relation"
        asked, answer = ((true, "yes"), (opposite, "no"))[int(rng.integers(2))]
        return f"is the {names[0]} {asked} the {names[1]} ?", answer, "relation"

    def expressions(self, n=3):
        """Up to n different (expression, index of the thing, type); type is attribute or relation.
        Each means one thing.

        A relation expression is one whose attributes alone fit two things or more.
        """
        rng = self._rng(4)
        found = [self._refer_by_attribute(rng) if i % 2 == self.number % 2
            else self._refer_by_relation(rng) for i in range(n)]
        return list(dict.fromkeys(e for e in found if e))

    def _refer_by_attribute(self, rng):
        index = int(rng.integers(len(self.things)))
        thing = self.things[index]
        for words in (("shape",), ("colour", "shape"), ("size", "colour", "shape")):
            if len(self.where(**{w: thing[w] for w in words})) == 1:
                return f"the {thing.named(*words)}", index, "attribute"

    def _refer_by_relation(self, rng):
        fits = []
        for i, thing in enumerate(self.things):
            rivals = [t for t in self.where(shape=thing["shape"]) if t is not thing]
            for mark in self.things:
                if (mark["shape"] == thing["shape"]
                        or len(self.where(**{k: mark[k] for k in ("colour", "shape")})) > 1):
                    continue  # the landmark itself must be beyond doubt
                fits += [
                    (f"the {thing['shape']} {r} the {mark.named('colour', 'shape')}", i, "relation")
                    for r in _true_relations(thing, mark)
                    if rivals and not any(_clearly(t, r, mark, 0) for t in rivals)]
        return _pick(rng, fits) if fits else None


def _pick(rng, options):
    return options[int(rng.integers(len(options)))]


def _clearly(a, relation, b, margin=8):
    """True if a's centre lies `margin` pixels or more on that side of b's."""
    axis, sign = RELATIONS[relation]
    return sign * (a["centre"][axis] - b["centre"][axis]) > margin


def _true_relations(a, b):
    # Things do not touch, so their centres differ by over 16 pixels along one axis at least: never
    # empty.
    return [r for r in RELATIONS if _clearly(a, r, b)]


def _draw_shape(draw, thing):
    (x, y), h = thing["centre"], thing["half"]
    colour, box = (COLOURS[thing["colour"]],
        [thing.box[0], thing.box[1], thing.box[2] - 1, thing.box[3] - 1])
    third = h / 3
    if thing["shape"] == "circle":
        draw.ellipse(box, fill=colour)
    elif thing["shape"] == "ring":
        draw.ellipse(box, outline=colour, width=max(3, h // 3))
    elif thing["shape"] == "square":
        draw.rectangle(box, fill=colour)
    elif thing["shape"] == "triangle":
        draw.polygon([(x, y - h), (x + h, y + h), (x - h, y + h)], fill=colour)
    elif thing["shape"] == "cross":
        draw.rectangle([x - third, y - h, x + third, y + h - 1], fill=colour)
        draw.rectangle([x - h, y - third, x + h - 1, y + third], fill=colour)
    else:  # star: ten points, far and near in turn
        draw.polygon(
            [(x + r * math.sin(k * math.pi / 5), y - r * math.cos(k * math.pi / 5))
                for k in range(10) for r in [h if k % 2 == 0 else 0.42 * h]],
            fill=colour,
        )


# --- 7. Pretraining -------------------------------------------------------------------------------

IGNORE = -100  # label of a word piece that is not predicted (torch's cross entropy skips it)
MISMATCH, MATCH = (0,
    1)  # itm_labels. ViLBERT and VOLTA have it the other way round: here 1 means match.


class PretrainingDataset(torch.utils.data.Dataset):
    """Image-caption pairs, masked and half of them mismatched. ASSUMPTION A7.

    store: a FeatureStore. captions: list of (image id, text). Captions that are empty or whose
    image is not in the store are left out and counted in `.skipped`; none left raises BadInput.
    mismatch: share of pairs whose caption is exchanged for another image's. masking=False shows
    words and regions whole, for measuring how well pairs are matched.
    """

    def __init__(
            self, store, captions, tokenizer, max_tokens=38, seed=0, mismatch=0.5, masking=True):
        self.store, self.tokenizer, self.max_tokens = store, tokenizer, max_tokens
        self.seed, self.mismatch, self.masking = seed, mismatch, masking
        rows = [store.row(image_id) for image_id, _ in captions]
        kept = [(r, t) for r, (_, t) in zip(rows, captions) if r is not None and t.strip()]
        self.skipped = {"without features": sum(row is None for row in rows),
            "without words": sum(not text.strip() for _, text in captions)}
        if len({row for row, _ in kept}) < 2:
            raise BadInput(
                f"{store.folder}: of {len(captions)} captions, {self.skipped['without features']} "
                f"name an image that is not in this store and {self.skipped['without words']} are "
                "empty; captions of at least two images are needed")
        self.rows = np.array([row for row, _ in kept])
        self.texts = [text for _, text in kept]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, key):
        """One example: a dict of numpy arrays; `collate` stacks them.

        key: an index, or (epoch, index): every epoch draws other masks and mismatches. The epoch
        is in the key, so that loading processes need not be told of it.
        """
        epoch, index = key if isinstance(key, tuple) else (0, key)
        rng = np.random.default_rng([self.seed, epoch, index])
        text, match = self.texts[index], MATCH
        if rng.random() < self.mismatch:
            text, match = self.texts[self._other_image(index, rng)], MISMATCH
        row, ids = self.rows[index], self.tokenizer.encode(text, self.max_tokens)
        record = self.store[row]
        features = record["features"].copy()
        rate = 0.15 if self.masking else 0.0
        input_ids, mlm_labels = mask_tokens(ids, self.tokenizer, rng, rate)
        mrc_mask = choose(len(record["boxes"]), rng, rate)
        features[mrc_mask] = 0
        return dict(
            input_ids=input_ids,
            mlm_labels=mlm_labels,
            region_features=features,
            region_boxes=normalise_boxes(record["boxes"], record["size"]),
            mrc_mask=mrc_mask,
            mrc_targets=self.store.class_probs(row, mrc_mask),  # (K, C) or None
            itm_labels=match,
        )

    def _other_image(self, index, rng):
        # Any caption of the corpus but those of this image: drawn again until it fits, seldom more
        # than once.
        while True:
            other = int(rng.integers(len(self)))
            if self.rows[other] != self.rows[index]:
                return other


def choose(n, rng, rate):
    """(n,) bool, each True with probability `rate`, and at least one unless rate is 0: an example
    without a target would teach nothing.
    """
    chosen = rng.random(n) < rate
    if n and rate and not chosen.any():
        chosen[rng.integers(n)] = True
    return chosen


def mask_tokens(ids, tokenizer, rng, rate=0.15):
    """BERT's masking of one sentence: (input_ids, mlm_labels), int64 arrays of the length of ids.

    `rate` of the pieces are to be predicted. Of these 80% are shown as [MASK], 10% as a random
    piece and 10% as themselves: at finetuning there is no [MASK], so the states of ordinary pieces
    must be good too. [CLS] and [SEP] are neither masked nor drawn as a random piece.
    """
    ids = np.array(ids)
    shown, labels = ids.copy(), np.full(len(ids), IGNORE)
    places = 1 + np.flatnonzero(choose(len(ids) - 2, rng, rate))  # between [CLS] and [SEP]
    labels[places] = ids[places]
    for place in places:
        draw = rng.random()
        if draw < 0.8:
            shown[place] = tokenizer.mask_id
        elif draw < 0.9:
            shown[place] = _random_piece(tokenizer, rng)
    return shown, labels


def _random_piece(tokenizer, rng):
    while True:
        piece = int(rng.integers(len(tokenizer)))
        if tokenizer.pieces[piece] not in SPECIALS:
            return piece


def pad(arrays, value=0):
    """Stack arrays that differ in length: (B, longest, ...) filled up with `value`. As a torch
    tensor.
    """
    longest = max(1, *(len(a) for a in arrays))
    out = np.zeros((len(arrays), longest, *arrays[0].shape[1:]), dtype=arrays[0].dtype)
    if value:  # zeros come from the system for nothing, where they are overwritten at once
        out += value
    for row, array in zip(out, arrays):
        row[: len(array)] = array
    return torch.from_numpy(out)


def lengths_to_mask(arrays):
    """(B, longest) int64: 1 = real, 0 = padding."""
    return pad([np.ones(len(a), dtype=np.int64) for a in arrays])


def model_inputs(examples):
    """What the encoder reads, padded to the longest of these examples: input_ids, text_mask (B, T);
    region_features (B, R, F), region_boxes (B, R, 5), region_mask (B, R).

    An example may have no region at all; a batch has at least one place for one.
    """
    ids, features, boxes = (
        [e[name] for e in examples] for name in ("input_ids", "region_features", "region_boxes"))
    return dict(
        input_ids=pad(ids),  # [PAD] is id 0 in every BERT vocabulary
        text_mask=lengths_to_mask(ids),
        region_features=pad(features),
        region_boxes=pad(boxes),
        region_mask=lengths_to_mask(boxes),
    )


def collate(examples):
    """A batch from examples of PretrainingDataset, padded to the longest of this batch, no further.

    input_ids, text_mask, mlm_labels (B, T); region_features (B, R, F), region_boxes (B, R, 5),
    region_mask (B, R) 1 = real, mrc_mask (B, R) bool True = masked; mrc_targets (K, C), the class
    distributions of the K masked regions in the order of mrc_mask.nonzero(), or None; itm_labels
    (B,).
    """
    columns = {name: [e[name] for e in examples] for name in examples[0]}
    targets = columns["mrc_targets"]
    return dict(
        **model_inputs(examples),
        mlm_labels=pad(columns["mlm_labels"], IGNORE),
        mrc_mask=pad(columns["mrc_mask"], False),
        mrc_targets=None if targets[0] is None else torch.from_numpy(np.concatenate(targets)),
        itm_labels=torch.tensor(columns["itm_labels"]),
    )


# --- 8. Command line ------------------------------------------------------------------------------


def check(paths):
    """Say what these stores, captions and vocabularies are; True if a run could use all of them."""
    stores, captions, good = [], {}, True
    for path in map(Path, paths):
        try:
            if path.is_dir():
                stores.append(check_store(path))
            elif path.suffix == ".txt":
                print(f"{path}: a vocabulary of {len(WordPiece(path))} word pieces")
            else:
                captions[path] = check_captions(path)
        except BadInput as error:
            print(f"PROBLEM {error}")
            good = False
    for path, ids in captions.items():
        for store in stores:
            found = sum(store.row(i) is not None for i in ids)
            print(f"{path}: {found:,} of {len(ids):,} images have features in {store.folder}")
            good &= found > 1
    return good


def check_store(folder):
    """Print what a store is and read all of it once. Raises BadInput at the first problem."""
    store = FeatureStore(folder)
    failed = int((store.counts == 0).sum())
    size = sum(array.nbytes for array in store.arrays.values())
    print(f"{folder}: a feature store of {len(store):,} images ({failed:,} failed), up to "
          f"{store.num_regions} regions of {store.feature_size}, {size / 1e9:.2f} GB")
    for key, value in store.meta.items():
        if isinstance(value, list):
            more = f", ... ({len(value):,})" if len(value) > 5 else ""
            value = ", ".join(map(str, value[:5])) + more
        print(f"    {key}: {value}")
    for row in tqdm(np.flatnonzero(store.counts > 0), desc="reading", leave=False, disable=None):
        store.check(row)
    return store


def check_captions(path):
    """Print what a caption file is; its image ids."""
    kind, records = open_captions(path)
    splits, ids, empty, example = Counter(), {}, 0, ""
    for image_id, text, split in records:
        splits[split] += 1
        ids[image_id] = None
        empty += not text.strip()
        example = example or text
    if not ids:
        raise BadInput(f"{path}: {kind} without a caption")
    counts = ", ".join(f"{n:,} {split}" for split, n in splits.items())
    print(f"{path}: {kind}: {splits.total():,} captions ({counts}; {empty} empty) of {len(ids):,} "
          f"images, the first: {example[:60]!r}")
    return list(ids)


def main(argv=None):
    """python data.py check | vocab | import"""
    parser = argparse.ArgumentParser(description="Look at data before a run does.")
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("check", help="say what files and stores are, and whether they fit")
    p.add_argument("paths", nargs="+", help="feature stores, caption files, vocabularies (.txt)")
    p = commands.add_parser("vocab", help="build a vocabulary from captions")
    p.add_argument("captions", nargs="+", help="caption files")
    p.add_argument("-o", "--out", required=True, help="the vocabulary to write, e.g. vocab.txt")
    p.add_argument("--size", type=int, default=30522, help="most pieces (default: BERT's 30522)")
    p = commands.add_parser("import", help="make a feature store of published TSV files")
    p.add_argument("files", nargs="+", help="bottom-up-attention TSVs of 6, 10 or 13 columns")
    p.add_argument("-o", "--out", required=True, help="the store to write")
    p.add_argument("--detector", default="vg", help="its name in the store (default: vg)")
    p.add_argument("--background", choices=["first", "last", "none"], default="first",
        help="where class distributions have the background (default: first, as VOLTA)")
    p.add_argument("--classes", help="class names, one a line, without background")
    args = parser.parse_args(argv)
    try:
        if args.command == "check":
            sys.exit(0 if check(args.paths) else 1)
        elif args.command == "import":
            import_features(args.files, args.out, args.detector, args.background, args.classes)
            check_store(args.out)
        else:
            texts = (text for path in args.captions for _, text in read_captions(path))
            pieces = build_vocab(texts, args.size)
            write_whole(args.out, lambda f: f.writelines(p + "\n" for p in pieces))
            print(f"{args.out}: {len(pieces)} word pieces")
    except (BadInput, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from here")


if __name__ == "__main__":
    main()
