r"""data.py: from a folder of files to a batch of tensors
======================================================

Where this stands

    extract_features.py --writes--> feature store --read by--> data.py --batches--> train.py

A batch begins as a caption and an image id, and everything in between happens here:

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
            mrc_positions (K',)  which of the B R regions are; mrc_targets (K', C)
            itm_positions (K",)  which of the B pairs are shown whole and matched instead;
                                 itm_labels (K"): MATCH or MISMATCH

Letters: B batch, T word pieces, R regions, F region feature, C region classes, K, K' and K" the
predicted pieces, regions and matches of a batch, (W, H) width and height of an image. Masks: 1 =
real, 0 = padding.

Map of the file (* = read these first)

    1. Small rules           ids, errors, whole files, flags, processes: shared by the scripts
    2. WordPiece             BERT's uncased tokenizer
    3. Feature store       * the contract between detector and model: one folder of .npy files
    4. Pretraining         * masking, mismatches, labels, batches
    5. Captions              the published caption files, recognised by their content
    6. Published features    a store from bottom-up-attention's TSV files
    7. Toy world             drawn scenes with captions, questions and referring expressions
    8. Command line          check, import

    $ python data.py check runs/world/features-3600
    runs/world/features-3600: a feature store of 4,000 images, 4,000 of them with regions

    $ python data.py import train2014_obj36.tsv val2014_obj36.tsv -o data/features

Every random choice depends on (seed, epoch, index) and on nothing else. So an example is the same
with 0 or 8 loading processes, on 1 or 8 GPUs, and in a run that was killed and resumed.

Where the paper is silent the code says ASSUMPTION An, where it departs from it DEVIATION Dn; the
README lists all of them. Here: A7 (masking rates, boxes, mismatches), A9 (the background class).
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
import unicodedata
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed.run
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch.distributed.elastic import multiprocessing
from torch.utils.data import DataLoader
from tqdm import tqdm

from switchbert import MATCH, MISMATCH

# --- 1. Small rules -------------------------------------------------------------------------------
#
# What all scripts but switchbert.py share. Skip this section on a first reading.

# Of several processes, torchrun numbers each one: data.start_processes, train.launch.
RANK = int(os.environ.get("RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
# A progress bar of the first process: how far, how fast, and how long still. Where nobody watches a
# terminal, it is a line a minute in the log.
pause = 0 if sys.stderr.isatty() else 60  # seconds
progress = functools.partial(tqdm, leave=pause > 0, disable=RANK > 0, delay=pause,
    mininterval=pause or 0.1, maxinterval=pause or 10)
# What asks a script to stop. A closed terminal, SIGHUP, does not. But where it closes on a torchrun
# that you have started, that passes the signal on, and ends its processes half a minute later.
STOPS = [signal.SIGTERM, signal.SIGINT]
if WORLD_SIZE > 1:
    STOPS.append(signal.SIGHUP)


class BadInput(ValueError):
    """The user's files or flags are wrong: one sentence says where, what and how to fix it."""


def run(main):
    """Call a script's `main()` and end the process as a user expects.

    BadInput, OSError (disks, permissions) and running out of memory print one sentence: status 1.
    Ctrl-C and SIGTERM: status 130, as in a shell. A closed terminal ends nothing. Any other
    exception is a bug and keeps its traceback.
    """
    if hasattr(signal, "SIGHUP"):  # Windows has none
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    on_stop()
    status = 1
    try:
        return main()
    except KeyboardInterrupt:
        if RANK > 0:
            sys.exit(130)  # torchrun has ended it; the first process says why
        message = "stopped; repeat the command to continue, a training with --resume"
        status = 130
    except (BadInput, OSError) as error:
        message = f"error: {error}"
    except RuntimeError as error:
        if re.search("by peer|remote process", str(error)):
            sys.exit(1)  # another process has failed, and says why
        if not re.search("DataLoader worker|out of memory", str(error)):
            raise
        message = (f"error: out of memory? Try fewer --workers, or --accum 2, which needs half the "
            f"memory; --resume continues ({str(error)[:150]})")
    # If several processes fail alike, only rank 0 prints: its exit ends the others meanwhile.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(5 * (RANK > 0))
    print(message, file=sys.stderr, flush=True)
    sys.exit(status)


def on_stop(handler=signal.default_int_handler):
    """What any request to stop calls from now on. The default, Ctrl-C's own, unwinds and cleans up.
    """
    for number in STOPS:
        signal.signal(number, handler)


def say(text):
    """Print from the first process only, and flush. A closed terminal hears nothing."""
    if RANK == 0:
        with contextlib.suppress(OSError):
            print(text, flush=True)


def load_ahead(examples, batches, collate, workers):
    """A DataLoader: batches (lists of keys) of examples, made in advance by so many processes.
    On Linux these are forked, and share the captions; elsewhere each has a copy.
    """
    context = "fork" if workers and sys.platform == "linux" else None
    return DataLoader(examples, batch_sampler=batches, collate_fn=collate, num_workers=workers,
        worker_init_fn=leave_group, pin_memory=torch.cuda.is_available(),
        multiprocessing_context=context)


def leave_group(_):
    """Move a loading process into a session of its own, where no signal to the training's group
    reaches it: the training saves and stops, and needs it until then. It ends with the training.
    """
    if hasattr(os, "setsid"):  # Windows has none
        os.setsid()


@contextlib.contextmanager
def reading(path, what, unit="entry"):
    """Turn every error inside this block into BadInput: the file being read is at fault.

        with reading("a.json", "a list of boxes") as at:
            for at.entry, box in enumerate(json.load(...)): ...

    A missing key, a wrong type or a broken header becomes BadInput("a.json: not a list of boxes
    (near entry 3: KeyError 'bbox')"). One net around the reader replaces a check per field.
    """
    at = argparse.Namespace(entry=None)
    try:
        yield at
    except BadInput:
        raise
    except Exception as error:
        near = "" if at.entry is None else f"near {unit} {at.entry}: "
        # Only the first sentence: torch's second one advises loading the file unsafely.
        reason = " ".join(str(error).split()).split(". ")[0][:200]
        if not isinstance(error, (ValueError, OSError)):
            reason = f"{type(error).__name__} {reason}"
        for file in (Path(path), *Path(path).glob("*.*")):
            if file.is_file() and open(file, "rb").read(24) == b"version https://git-lfs.":
                reason += f"; git-lfs has not fetched {file} yet: git lfs pull"
        raise BadInput(f"{path}: not {what} ({near}{reason})") from error


# The endings of pictures. Pillow cannot open all of these; such a picture fails by name.
PICTURES = r"\.(jpe?g|jpe|jfif|png|webp|bmp|gif|tiff?|avif|hei[cf])"
# What stands around a picture's name: folders; suffixes; the number of one of its captions, as in
# Flickr30k's '1000092795.jpg#0'.
AROUND_NAME = re.compile(
    rf"(?is)^.*[/\\]|({PICTURES}|\.(txt|json|np[yz]))+( *#\d+)?$| *#\d+$")
COCO_NAME = re.compile(r"(?i)(coco_\w+?_)?0*(\d+)\Z")


def canonical_id(name):
    r"""An image id as a string, spelled the same whichever file it came from.

    COCO's images are 'COCO_val2014_000000391895.jpg' in Karpathy's splits, 391895 in the caption
    JSON, 'coco_val2014_000000391895.npz' in UNITER's features. Any other name keeps its stem.
    Accents may be spelled as one character or two (macOS): NFC is one.
    >>> names = "COCO_val2014_000000391895.jpg", 391895, "dogs/dog_1.jpg", r"dogs\dog_1.JPG#0 "
    >>> [canonical_id(name) for name in names]
    ['391895', '391895', 'dog_1', 'dog_1']
    """
    name = str(name).strip()
    if name.isdecimal():  # most are, and there may be millions
        return name.lstrip("0") or "0"
    name = AROUND_NAME.sub("", unicodedata.normalize("NFC", name)).strip()
    numbered = COCO_NAME.match(name)
    return numbered[2] if numbered else name


def say_found(what, ids, found, where, known):
    """Say how many of some ids were found. Raises BadInput if none was.

    ids (n,) bytes: those that were looked for; found (n,) bool; known (m,) bytes: those that were
    there. If most are missing, one id of each side that did not meet is shown: then the reader sees
    how the spellings differ.
    """
    text = f"{what}: {found.sum():,} of {len(ids):,} found in {where}"
    if 2 * found.sum() < len(ids):
        lonely = ids[~found][:1].tolist() + np.setdiff1d(known, ids)[:1].tolist()
        text += f"; those that did not meet: {' and '.join(repr(i.decode()) for i in lonely)}"
    if not found.any():
        raise BadInput(text)
    say(text)


def files_below(folder, ending):
    """The files below a folder whose names have an ending, a regular expression; sorted.

    Links are followed, but no folder is visited twice. Hidden files and folders ('._a.jpg' of
    macOS, '.ipynb_checkpoints') and feature stores are left out.
    """
    found = []
    visited = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in visited or "store.json" in names:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if name[0] != ".")
        chosen = [name for name in names if re.fullmatch(f"(?is)[^.].*{ending}", name)]
        found += [Path(place, name) for name in chosen]
    return sorted(found)


def write_whole(path, write, mode="w"):
    """Call `write(file)`; afterwards `path` holds all of it, or is unchanged.

    The bytes go to a temporary file beside it, reach the disk (fsync), and only then take its name.
    A rename within a folder is atomic: a crash or a full disk costs the new version, never the old.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, mode) as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save hides the disk's error behind its own
        raise OSError(f"{error.__context__ or error}: {path}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, content):
    """Write a JSON file, whole; types that JSON lacks, such as Path, become strings."""
    write_whole(path, lambda file: json.dump(content, file, indent=1, default=str))


def read_json(path):
    """The content of a JSON file."""
    with reading(path, "a whole JSON file"):
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))


def save_png(path, image):
    """Write a PIL image as a PNG, whole; make its folder if needed."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda file: image.save(file, "PNG"), mode="wb")


# Opens a UTF-8 text file, with or without a byte order mark. Only LF ends a line.
open_text = functools.partial(open, encoding="utf-8-sig", newline="\n")


def number(kind, least, most):
    """The type of a numeric flag, int or float, from `least` to `most`; no range contains NaN."""
    def read(text):
        """The number. argparse prints errors as `argument --lr: invalid 1e-12...10 value: '0'`."""
        value = kind(text)
        if not least <= value <= most:
            raise ValueError
        return value

    read.__name__ = f"{least:g}...{most:g}"
    return read


# Rates and shares start just above 0: with 0 itself a run would learn nothing, or divide by 0.
COUNT = number(int, 1, 1e9)
NATURAL = number(int, 0, 1e9)
RATE = number(float, 1e-12, 10)
SHARE = number(float, 1e-6, 1)


def flag(parser, name, kind, default, text):
    """Add a flag whose --help shows its range."""
    parser.add_argument(name, type=kind, default=default, help=text, metavar=kind.__name__)


@contextlib.contextmanager
def only_run_in(folder):
    """Lock a folder during a block. A second run is refused, and changes nothing. A folder in which
    nothing has been written, because the block failed, is removed.

    The lock (POSIX, on the file .lock in it) belongs to this process alone, not to its loading
    processes, and the system releases it however the process ends, even by SIGKILL.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / ".lock"
    with open(lock, "w") as file:
        try:
            import fcntl
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (ImportError, OSError) as error:
            if getattr(error, "errno", None) in (errno.EAGAIN, errno.EACCES):
                raise BadInput(f"{folder}: another run is at work there; wait for it, or choose "
                    "another --out") from None
            # Windows, and network disks without locks.
            say(f"{folder}: cannot be locked; start no second run there")
        try:
            yield
        finally:
            if [*folder.iterdir()] == [lock]:
                lock.unlink()
                os.removedirs(folder)


def start_processes(count):
    """Run this same command in `count` processes on this machine, by torchrun.

    Each finds its RANK and WORLD_SIZE in the environment. Returns when all have succeeded. When one
    fails it has printed the reason; torchrun ends the others, and this process exits with its
    status: 130 if it was asked to stop, or if this process was and torchrun passed that on.
    """
    if 0 < torch.cuda.device_count() < count:
        raise BadInput(f"--gpus {count}: this machine has {torch.cuda.device_count()}")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // count)))
    # Flags of newer torchruns: a closed terminal is no stop; and processes that are stopped have
    # ten minutes to end their step and to save, not half of one.
    os.environ.update(
        PET_SIGNALS_TO_HANDLE="SIGTERM,SIGINT,SIGQUIT", PET_SHUTDOWN_TIMEOUT="600")
    logging.disable()  # torchrun would explain every error again, in thirty lines
    try:
        torch.distributed.run.main(["--standalone", "--local-addr=127.0.0.1",
            f"--nproc-per-node={count}", "--no-python", *sys.orig_argv])
    except multiprocessing.SignalException:
        sys.exit(130)
    except multiprocessing.errors.ChildFailedError as error:
        status = error.get_first_failure()[1].exitcode
        if status < 0:
            raise BadInput(f"a process was ended by signal {-status}; the same command goes on, a "
                "training with --resume") from None
        sys.exit(status)


# --- 2. WordPiece ---------------------------------------------------------------------------------
#
# BERT reads pieces of words. A text is cleaned and split into words (split_words), and each word
# into the longest pieces of a vocabulary (WordPiece):
#
#     "Unaffable!"  ->  unaffable !  ->  un ##aff ##able !  ->  [CLS] un ##aff ##able ! [SEP]
#
# Thirty thousand pieces thus spell any word. Both steps follow BERT's tokenization.py exactly.

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# The CJK ideographs of Unicode, without Kana and Hangul: BERT splits those only into pieces.
CHINESE = re.compile("[\u4e00-\u9fff\u3400-\u4dbf\uf900-\ufaff\U00020000-\U0002a6df"
    "\U0002a700-\U0002ceaf\U0002f800-\U0002fa1f]")


@functools.cache
def _clean(char):
    # Whitespace becomes a space, invisible characters vanish, Chinese characters become words.
    category = unicodedata.category(char)
    if char in "\t\n\r" or category == "Zs":
        return " "
    if char == "\ufffd" or category in ("Cc", "Cf"):  # control characters, zero-width joiners
        return ""
    return f" {char} " if CHINESE.match(char) else char


@functools.cache
def _split(char):
    # Accents (category Mn, separated by NFD) vanish; punctuation marks become words. Unicode counts
    # $ + < = > ^ ` | ~ as symbols, BERT counts them as punctuation.
    category = unicodedata.category(char)
    if category == "Mn":
        return ""
    return f" {char} " if char in string.punctuation or category[0] == "P" else char


def split_words(text):
    """BERT's basic tokenization, uncased. [Devlin et al. 2019, tokenization.py]

    NFD splits an accented letter into letter and accent, so that _split can drop the accent.
    >>> split_words("Café (42)!")
    ['cafe', '(', '42', ')', '!']
    """
    plain = unicodedata.normalize("NFD", "".join(map(_clean, text)).lower())
    return "".join(map(_split, plain)).split()


class WordPiece:
    """BERT's uncased tokenizer: words, then the longest vocabulary pieces from left to right.

    vocab: a file, see read_vocab; or a list of pieces, as in a checkpoint. '##' marks a piece that
    continues a word: with 'play', '##ing' and '!', 'Playing!' is ['play', '##ing', '!'].
    """

    def __init__(self, vocab):
        self.pieces = vocab if isinstance(vocab, list) else read_vocab(Path(vocab))
        self.ids = {piece: number for number, piece in enumerate(self.pieces)}
        _, _, self.cls_id, self.sep_id, self.mask_id = (self.ids[s] for s in SPECIALS)

    def __len__(self):
        return len(self.pieces)  # V, the model's vocab_size

    @functools.lru_cache(50_000)  # noqa: B019  words repeat; a run has one tokenizer
    def split_word(self, word):
        """The pieces of one word, longest match first; [UNK] alone if any part has no piece."""
        if len(word) > 100:  # BERT's limit, in characters
            return ["[UNK]"]
        pieces = []
        prefix = ""
        while word:
            ends = [end for end in range(1, len(word) + 1) if prefix + word[:end] in self.ids]
            if not ends:
                return ["[UNK]"]  # BERT drops the whole word, not only the unknown part
            pieces.append(prefix + word[: ends[-1]])
            prefix = "##"
            word = word[ends[-1] :]
        return pieces

    def encode(self, text, max_tokens):
        """Ids of '[CLS] text [SEP]', cut to at most max_tokens (both specials counted)."""
        pieces = [piece for word in split_words(text) for piece in self.split_word(word)]
        return [self.cls_id, *(self.ids[p] for p in pieces[: max_tokens - 2]), self.sep_id]


def read_vocab(path):
    """The pieces of a vocab.txt, one per line; a piece's id is its line's number, from 0.

    Raises BadInput if one of SPECIALS is missing, and for the vocabulary of a cased BERT, whose
    capitals would never be found.
    """
    with reading(path, f"BERT's vocabulary: one word piece per line, {SPECIALS} among them"):
        text = path.read_text(encoding="utf-8").removesuffix("\n")
        # Not splitlines(): a piece may be a character that Python counts as a line end.
        pieces = text.split("\n")
        for special in SPECIALS:
            pieces.index(special)  # ValueError: '[PAD]' is not in list
        settings = path.with_name("tokenizer_config.json")
        cased = settings.exists() and read_json(settings).get("do_lower_case") is False
        # A capital at any place; but words in brackets, [MASK] or <S>, are markers.
        if cased or re.search(r"^(?![<\[]).*[A-Z]", text, re.M):
            raise ValueError("it is of a cased BERT; expected an uncased one")
    return pieces


def build_vocab(texts, size=30522):
    """A vocabulary for a corpus that has none: specials, characters, then its frequent words.

    Words seen at least twice become pieces, the most frequent first, until `size` is reached. All
    others are spelled in characters, so no word of the corpus is [UNK]. Returns a list of pieces.
    """
    words = Counter(word for text in texts for word in split_words(text))
    characters = sorted(set("".join(words)))
    frequent = [w for w, count in words.most_common() if count > 1 and len(w) > 1]
    return [*SPECIALS, *characters, *(f"##{c}" for c in characters), *frequent][:size]


# --- 3. The feature store -------------------------------------------------------------------------
#
# A folder, and the only thing that detector and model share:
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
# and, if C > 0, each region's distribution over classes, background first, as either
#
#     class_weight.npy    (C, F)     float32   the detector's last layer, once for all images:
#     class_bias.npy      (C,)       float32   distribution = softmax(weight @ feature + bias)
# or
#     class_probs.npy     (N, R, C)  float16   the distributions themselves, of imported features
#
# A detector's class logits are linear in the stored feature. So that layer, 13 MB for Visual
# Genome's 1,601 classes, replaces 115 KB per image, 380 GB for 3.3 million images. Rows beyond an
# image's count are zeros. float16 halves the disk (36 x 2048 x 2 = 147 KB per image); its rounding,
# 0.05 %, is far below a detector's noise. All are opened as memory maps: nothing is loaded, and all
# loading processes share the system's page cache.

STORE_VERSION = 1
# ASSUMPTION A9: region classes include the background, as class 0. UNITER, VOLTA and torchvision do
# so; detectron2's ports put it last.


def store_layout(meta):
    """{array: (dtype, shape)} of a store, from its store.json: the table above as code."""
    n = meta["num_images"]
    r = meta["num_regions"]
    f = meta["feature_size"]
    c = meta["num_region_classes"]
    layout = {"ids": (f"S{meta['id_bytes']}", (n,)), "counts": ("int32", (n,)),
        "sizes": ("int32", (n, 2)), "boxes": ("float32", (n, r, 4)),
        "features": ("float16", (n, r, f))}
    if meta.get("class_head"):
        layout.update(class_weight=("float32", (c, f)), class_bias=("float32", (c,)))
    elif c:
        layout.update(class_probs=("float16", (n, r, c)))
    return layout


def open_store(folder, mode="r"):
    """(store.json as a dict, {name: array mapped from disk}); BadInput unless they fit together."""
    arrays = {}
    what = "a feature store; extract_features.py writes one"
    with reading(folder, what, "array") as at:
        meta = json.loads((folder / "store.json").read_bytes())
        if meta["version"] != STORE_VERSION:
            raise ValueError(f"expected version {STORE_VERSION}, found {meta['version']}")
        for at.entry, (dtype, shape) in store_layout(meta).items():
            # asarray: a plain view of the mapped pages, which numpy slices ten times faster.
            path = folder / f"{at.entry}.npy"
            array = np.asarray(np.load(path, mmap_mode=mode, allow_pickle=False))
            if array.dtype != dtype or array.shape != shape:
                raise ValueError(f"expected {shape} {dtype}, found {array.shape} {array.dtype}")
            arrays[at.entry] = array
    return meta, arrays


def encode_ids(ids):
    """(n,) bytes: image ids of any spelling as a store keeps them; bytes stay as they are.

    Bytes of fixed width can be mapped and sorted. File names need not be UTF-8: the rest is '?'.
    """
    if isinstance(ids, np.ndarray) and ids.dtype.kind == "S":
        return ids
    return np.array([canonical_id(i).encode(errors="replace") for i in ids], dtype=bytes)


class FeatureStore:
    """Read a feature store. `FeatureStore.create` is the writer.

    store = FeatureStore("features/")      raises BadInput if it is missing or half-written
    store.row("COCO_val2014_000000391895") -> row number, or None if the image is not in it
    store.rows(many ids)                   -> (n,) row numbers, -1 for an image that is not in it
    store.find(many ids, what)             -> the same, and says how many were found
    store[row] -> dict of features (n, F) float16, boxes (n, 4) float32, size (W, H); the arrays
        are views of the mapped file, read-only: copy them before you change them
    store.class_probs(row) -> (n, C) distributions, or None if the store has no classes

    Attributes: num_regions R, feature_size F, num_region_classes C (0: no distributions),
    class_names, meta (all of store.json), ids, counts.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        self.meta, self.arrays = open_store(self.folder)
        with reading(folder, "a store with a whole store.json"):
            if not self.meta["complete"]:
                raise BadInput(f"{folder}: a half-written feature store; repeat the command that "
                    "was writing it to continue")
            self.num_region_classes = self.meta["num_region_classes"]
            self.class_names = self.meta["class_names"]
        self.num_regions, self.feature_size = self.arrays["features"].shape[1:]
        self.ids = self.arrays["ids"]
        self.counts = self.arrays["counts"]
        # Older versions kept some spellings that canonical_id no longer keeps. Each id was the name
        # of a file: with a suffix, a '#1' at its end is no caption's number.
        self._keys = self.ids
        if re.search(rb"[.\\\x80-\xff]", self.ids.tobytes()):
            self._keys = encode_ids(f"{name.decode()}.jpg" for name in self.ids)
        # Ids are looked up by binary search. A dict of 3 million strings would take half a gigabyte
        # in every loading process; this takes 8 bytes per image.
        self._order = np.argsort(self._keys)

    def __reduce__(self):
        return FeatureStore, (self.folder,)  # a loading process opens the maps anew

    def __len__(self):
        return len(self.ids)

    def rows(self, image_ids):
        """(n,) rows of images, their ids in any spelling; -1: absent, or extraction failed."""
        keys = encode_ids(image_ids)
        # Sorted keys hit neighbouring places in memory: several times faster.
        unique, inverse = np.unique(keys, return_inverse=True)
        place = np.searchsorted(self._keys, unique, sorter=self._order)[inverse]
        rows = self._order[place.clip(max=len(self) - 1)]
        return np.where((self._keys[rows] == keys) & (self.counts[rows] > 0), rows, -1)

    def find(self, image_ids, what):
        """As `rows`; says how many were found. BadInput if none was. what: names the ids."""
        ids = encode_ids(image_ids)
        rows = self.rows(ids)
        say_found(what, ids, rows >= 0, self.folder, self._keys[self.counts > 0])
        return rows

    def row(self, image_id):
        """The row of one image, or None."""
        row = int(self.rows([image_id])[0])
        return None if row < 0 else row

    def _of(self, name, row):
        # An array's entries for the image's n regions, without the zeros after them.
        return self.arrays[name][row, : self.counts[row]]

    def __getitem__(self, row):
        # Nothing is copied before a batch is built; nothing is checked, as `write` has done that.
        return dict(features=self._of("features", row), boxes=self._of("boxes", row),
            size=tuple(self.arrays["sizes"][row].tolist()))

    def class_probs(self, row, chosen=slice(None)):
        """(k, C) float32: distributions over classes, background first; None if there are none.

        chosen: a numpy index that selects k of the image's n regions.
        """
        if not self.num_region_classes:
            return None
        if "class_probs" in self.arrays:
            return self._of("class_probs", row)[chosen].astype(np.float32)
        return self.classify(torch.tensor(self._of("features", row)[chosen])).numpy()

    def classify(self, features):
        """(K, C) distributions of features (K, F), on their device: the detector's last layer."""
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

        ids: every image that will be written, in row order. class_head: (weight (C, F), bias (C,))
        of the detector's last layer, background first, in place of stored distributions. `more`,
        such as class_names and detector, goes into store.json. Raises BadInput if the folder holds
        another store.
        """
        fixed = {"ids": encode_ids(ids)}  # known from the start; the rest is written per row
        if class_head:
            fixed["class_weight"], fixed["class_bias"] = map(np.float32, class_head)
            num_region_classes = len(class_head[1])
        meta = dict(version=STORE_VERSION, complete=False, num_images=len(fixed["ids"]),
            num_regions=num_regions, feature_size=feature_size,
            num_region_classes=num_region_classes, class_names=[], class_head=bool(class_head),
            detector="", id_bytes=fixed["ids"].itemsize)
        meta.update(more)
        first = {}
        for image_id, image in zip(fixed["ids"].tolist(), ids):
            if image_id in first:
                raise BadInput(f"{folder}: {image_id.decode()!r} is the id of two images, "
                    f"{first[image_id]} and {image}; rename one")
            first[image_id] = image
        return StoreWriter(Path(folder), meta, fixed)


class StoreWriter:
    """Fill a store row by row, in any order, from any number of processes; kill it at any moment.

    for row in writer.pending(): writer.write(row, features, boxes, size)
    store = writer.finish()

    The arrays have their full size from the start, so each row has its place and no process waits
    for another; counts says which rows are written. fixed: {name: array known from the start}.
    """

    def __init__(self, folder, meta, fixed):
        self.folder = folder
        self.meta = meta
        if not (folder / "store.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            self._allocate(store_layout(meta), fixed | {"counts": -1})
        found, self.arrays = open_store(folder, mode="r+")
        # Weights may be renamed, and older versions recorded less; nothing else may differ.
        differs = [key for key, value in (meta | fixed).items()
            if key not in ("complete", "weights")
            and not np.array_equal((self.arrays | found).get(key, value), value)]
        if differs:
            raise BadInput(f"{folder}: holds a feature store of other images or settings (it "
                f"differs in {', '.join(differs)}); choose another folder, or remove this one")

    def _allocate(self, layout, start):
        # Mapped files take disk space as they fill; a full disk then kills the process silently.
        size = sum(np.dtype(dtype).itemsize * math.prod(shape) for dtype, shape in layout.values())
        if size > shutil.disk_usage(self.folder).free:
            raise BadInput(f"{self.folder}: expected {size / 1e9:,.2f} GB of free disk, found less")
        for name, form in layout.items():
            # 'w+' makes a sparse file: a row uses no disk until it is written.
            array = np.lib.format.open_memmap(self.folder / f"{name}.npy", "w+", *form)
            if name in start:
                array[:] = start[name]
        write_json(self.folder / "store.json", self.meta)  # last: now all arrays exist

    def pending(self):
        """Rows not yet written."""
        return np.flatnonzero(self.arrays["counts"] < 0).tolist()

    def write(self, row, features, boxes, size, class_probs=None):
        """Store one image: features (n, F), boxes (n, 4) in pixels, size (W, H); 1 <= n <= R.

        class_probs (n, C): for a store with this array. Raises BadInput, and leaves the row
        pending, if a number is unusable: a NaN in a store would show only as a NaN loss, thousands
        of images later. A box may leave the picture by a pixel: rounding.
        """
        values = dict(features=features, boxes=boxes, class_probs=class_probs)
        n = len(features)
        with reading(f"image {self.arrays['ids'][row].decode()}", "regions that can be stored"):
            if min(n, *size) < 1:
                raise ValueError(f"{n} regions in a picture of {size} pixels")
            if not (np.abs(features) <= 65504).all():  # the largest float16; False for NaN
                raise ValueError("features with NaN or infinity")
            low = boxes[:, :2]
            high = boxes[:, 2:]
            inside = (low >= -1) & (low <= high) & (high <= np.add(size, 1))
            if not inside.all():
                raise ValueError(f"a box outside its picture of {size} pixels, or with x2 < x1")
            for name in values.keys() & self.arrays.keys():
                value = values[name]
                place = self.arrays[name][row, :n]
                if value.shape != place.shape:  # numpy would broadcast a single row or column
                    raise ValueError(f"expected {name} {place.shape}, found {value.shape}")
                if name == "class_probs" and not np.allclose(value.sum(axis=1), 1, atol=0.02):
                    raise ValueError("class_probs that do not add up to 1")
                place[:] = value
        self.arrays["sizes"][row] = size
        self.arrays["counts"][row] = n  # last: marks the row as written

    def fail(self, row, reason):
        """Mark an image as failed: its row stays empty, and failed.txt says why."""
        with open(self.folder / "failed.txt", "a", encoding="utf-8", errors="replace") as file:
            file.write(f"{self.arrays['ids'][row].decode()}\t{' '.join(reason.split())}\n")
        self.arrays["counts"][row] = 0

    def finish(self):
        """Mark the store complete and return its reader; BadInput if a row is still pending."""
        if missing := len(self.pending()):
            raise BadInput(f"{self.folder}: {missing} images are not written yet")
        for view in self.arrays.values():
            view.base.flush()  # the memory map: to the disk, before store.json says complete
        write_json(self.folder / "store.json", dict(self.meta, complete=True))
        return FeatureStore(self.folder)


def normalise_boxes(boxes, size):
    """(n, 4) pixels -> (n, 5): x1/W, y1/H, x2/W, y2/H, area/(W H), all in [0, 1]. ASSUMPTION A7.

    y points down, as in all files here. Boxes are clipped to the picture.
    >>> normalise_boxes(np.float32([[20, 10, 120, 60]]), (200, 100)).round(2).tolist()[0][4]
    0.25
    """
    scaled = np.clip(boxes / np.tile(np.float32(size), 2), 0, 1).astype(np.float32)
    sides = scaled[:, 2:] - scaled[:, :2]
    return np.column_stack([scaled, sides.prod(axis=1)])


# --- 4. Pretraining examples ----------------------------------------------------------------------
#
# Pretraining and all tasks read the store by region_inputs and make batches by model_inputs. What
# is predicted is decided here, once, and passed on as lists of positions. A pair is of one of two
# kinds, which are equally frequent (ASSUMPTION A7):
#
#     pair      words and regions   picture               predicted
#     masked    15 % are hidden     its own               hidden words (MLM) and regions (MRC)
#     whole     all are seen        half: another one's   does it match? (ITM)
#
# So matching is learned on pairs as they are: zero-shot retrieval and finetuning show such pairs,
# too. (UNITER does it in this way. If every pair is masked, as in ViLBERT, whole ones are new to
# the model, and matching them may get worse while the loss falls: see tests/ABLATION.md.)


def region_inputs(store, row):
    """The encoder's inputs from an image: region_features (n, F) float16, region_boxes (n, 5).

    row None, for an image without features or a blind model: n = 0.
    """
    if row is None:
        return dict(region_features=np.zeros((0, store.feature_size), np.float16),
            region_boxes=np.zeros((0, 5), np.float32))
    image = store[row]
    return dict(region_features=image["features"],
        region_boxes=normalise_boxes(image["boxes"], image["size"]))


class PretrainingDataset(torch.utils.data.Dataset):
    """Image-caption pairs: half of them masked, half whole, to be matched. ASSUMPTION A7.

    store: a FeatureStore. captions: Captions, or a list of (image id, text). Captions that are
    empty or whose image is not in the store are left out and counted in `.skipped`; BadInput if
    fewer than two images are left. mismatch: share of whole pairs whose image is replaced.
    masking=False shows all pairs whole, to measure matching. blind=True masks all pairs, mismatches
    none and shows no regions: such a model learns what words alone give away.
    name: what messages call the captions. .captions, .rows (N,) and .lengths (N,): the kept pairs,
    their store rows, and their number of spaces, to sort by length.
    """

    def __init__(self, store, captions, tokenizer, max_tokens=38, seed=0, mismatch=0.5,
            masking=True, blind=False, name="captions"):
        self.store = store
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.seed = seed
        self.whole = 1.0  # the share of pairs that are shown whole
        if masking:
            self.whole = 0.0 if blind else 0.5
        self.blind = blind
        self.mismatch = 0.0 if blind else mismatch
        captions = captions if isinstance(captions, Captions) else Captions(captions)
        rows = store.rows(captions.ids)
        empty = captions.texts == ""
        kept = (rows >= 0) & ~empty
        self.rows = rows[kept]
        self.captions = captions[kept]
        self.lengths = np.strings.count(self.captions.texts, " ")
        self.skipped = {"without features": int((rows < 0).sum()),
            "without words": int(empty.sum())}
        if (self.rows == self.rows[:1]).all():
            raise BadInput(f"{store.folder}: expected captions of two of its images or more; of "
                f"{len(captions)} {name} these were left out: {self.skipped}")

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
                # Another image may fit the caption by chance; with many images that is rare.
                # Another caption would have another length: see train.epoch_batches.
                match = [MISMATCH]
                while row == self.rows[index]:
                    row = self.rows[rng.integers(len(self))]
        ids = self.tokenizer.encode(self.captions[index][1], self.max_tokens)
        input_ids, words = mask_tokens(ids, self.tokenizer, rng, rate)
        regions = region_inputs(self.store, None if self.blind else row)
        hidden = choose(len(regions["region_boxes"]), rng, rate)
        classes = np.flatnonzero(hidden & (self.store.num_region_classes > 0))
        stored = "class_probs" in self.store.arrays  # else see class_targets
        targets = self.store.class_probs(row, classes) if stored else None  # (k, C)
        return dict(regions, input_ids=input_ids, region_hidden=hidden, mlm_positions=words,
            mlm_labels=np.array(ids)[words], mrc_positions=classes, mrc_targets=targets,
            itm_positions=np.arange(len(match)), itm_labels=np.array(match, np.int64))


class Captions:
    """Pairs (image id, text) in little memory, used like a list: Captions(pairs)[0], len, for.

    ids (N,): canonical image ids as bytes. texts (N,): strings of variable width, which numpy keeps
    in one block. A list of 3.3 million tuples takes 0.8 GB; this takes 0.3, and loading processes
    share it. They would copy a list page by page: reading a string changes its reference count, and
    so writes to its page. A slice, or an array of indices or bools, selects Captions. checksum:
    (N, a number that depends on all ids and texts).
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
        some = Captions([])
        some.ids = self.ids[which]
        some.texts = self.texts[which]
        return some

    @functools.cached_property
    def checksum(self):
        code = 0
        for image_id, text in zip(self.ids, self.texts):
            code = zlib.crc32(b"%s %s\n" % (image_id, text.encode()), code)
        return len(self), code


def choose(n, rng, rate):
    """(n,) bool, each True with probability `rate`; at least one is, unless rate or n is 0.

    An example without a target would teach nothing. In short captions this raises the share: of 5
    words, one is forced in 44 % of the cases, and 24 % are predicted instead of 15 %.
    """
    chosen = rng.random(n) < rate
    if n and rate and not chosen.any():
        chosen[rng.integers(n)] = True
    return chosen


def mask_tokens(ids, tokenizer, rng, rate=0.15):
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
            shown[place] = tokenizer.mask_id
        elif draw < 0.9:
            shown[place] = rng.integers(len(tokenizer))
            while tokenizer.pieces[shown[place]] in SPECIALS:
                shown[place] = rng.integers(len(tokenizer))
    return shown, positions


def pad(arrays):
    """Stack arrays that differ in length: a tensor (B, longest, ...), padded with zeros.

    longest is at least 1: attention over nothing would divide by zero.
    """
    longest = max(1, max(map(len, arrays)))
    out = np.zeros((len(arrays), longest, *arrays[0].shape[1:]), dtype=arrays[0].dtype)
    for row, values in zip(out, arrays):
        row[: len(values)] = values
    return torch.from_numpy(out)


def model_inputs(examples):
    """The encoder's inputs, padded to the longest of these examples and no further.

    input_ids, text_mask (B, T); region_features (B, R, F), region_boxes (B, R, 5), region_mask
    (B, R). Masks are int64, 1 = real. Words are padded with 0, the id of [PAD] in BERT's
    vocabularies; regions with zeros.
    """
    inputs = {name: pad([example[name] for example in examples])
        for name in ("input_ids", "region_boxes", "region_features")}
    for mask, name in (("text_mask", "input_ids"), ("region_mask", "region_boxes")):
        inputs[mask] = pad([np.ones(len(example[name]), np.int64) for example in examples])
    return inputs


def collate(examples):
    """A batch from examples of PretrainingDataset: what model_inputs gives, and

    region_hidden (B, R) bool, True = the model must not see this region's feature; mlm_positions
    (K,), b T + t for piece t of pair b, and mlm_labels (K,); mrc_positions (K',), b R + r, and
    mrc_targets (K', C), or None where the store has no stored distributions: see class_targets;
    itm_positions (K",), b, and itm_labels (K",), MATCH or MISMATCH.
    """
    batch = model_inputs(examples)
    batch["region_hidden"] = pad([example["region_hidden"] for example in examples])
    batch["mrc_targets"] = None
    # Positions count on from pair to pair, in steps of the padded length.
    steps = dict(mlm_positions=batch["text_mask"].shape[1], mlm_labels=0,
        mrc_positions=batch["region_mask"].shape[1], mrc_targets=0, itm_positions=1, itm_labels=0)
    for name, step in steps.items():
        if examples[0][name] is not None:
            parts = [example[name] + step * b for b, example in enumerate(examples)]
            batch[name] = torch.from_numpy(np.concatenate(parts))
    return batch


def class_targets(batch, store):
    """Add mrc_targets (K', C) to a batch whose store has the detector's last layer: one product for
    all masked regions, on the batch's device. In loading processes, one by one, this took 85 % of
    their time.
    """
    if store.meta.get("class_head"):
        features = batch["region_features"].flatten(0, 1)[batch["mrc_positions"]]  # (K', F)
        batch["mrc_targets"] = store.classify(features)
    return batch


# --- 5. Captions ----------------------------------------------------------------------------------
#
# Captions as they are published. A file's form is recognised by its content, not by its name:
#
#     Conceptual Captions   a very typical bus station <TAB> http://lh6.ggpht.com/-IvRtNLNcG8o/...
#     CC12M                 the same two columns the other way round
#     own data              dog_1 <TAB> a dog on a sofa               (image id, caption)
#     COCO captions         {"annotations": [{"image_id": 318556, "caption": "A very ..."}, ...]}
#     Karpathy's splits     {"images": [{"split": "train", "filename": "1000092795.jpg",
#                            "sentences": [{"raw": "Two young guys ..."}, ...]}, ...]}
#     a JSON list           [{"image": "dog_1.jpg", "caption": "a dog on a sofa"}, ...]
#     img2dataset           a folder: 00000/000000012.jpg with 00000/000000012.txt beside it
#
# A picture in the TSV of Conceptual Captions has only a link: its id is crc32(link), as in VOLTA's
# files. Among 3.3 million links about 1,300 pairs collide; a store holds the first picture.


SPLITS = {"train": "train training restval", "val": "val valid validation dev",
    "test": "test testing", "testA": "testa", "testB": "testb"}


def canonical_split(name):
    """The name of a split, one of SPLITS, from the names in use. ValueError for any other.

    >>> [canonical_split(name) for name in ("restval", "validation", "val2014")]
    ['train', 'val', 'val']
    """
    for split, names in SPLITS.items():
        if name.strip().lower().rstrip(string.digits) in names.split():
            return split
    raise ValueError(f"expected a split among {', '.join(SPLITS)}, found {name!r}")


def read_captions(path, split=None):
    """Yield the (image id, caption) pairs of a caption file or folder, in its order; of one split,
    "train", "val" or "test", if it is given. Raises BadInput near the first problem.
    """
    for image_id, text, part in caption_records(path):
        if split in (None, part):
            yield image_id, text


def caption_records(path):
    """Yield (image id, caption, split) as read_captions does. A file without splits is all "train".
    """
    path = Path(path)
    what = ("a table of two columns, COCO's 'annotations', Karpathy's 'images', or a list of "
        "{'image', 'caption'}")
    with reading(path, what, "caption") as at:
        form = _folder_captions
        if not path.is_dir():
            with open_text(path) as file:
                is_json = re.match(r"\s*(\{|\[\s*[]{])", file.read(1000))
            form = _json_captions if is_json else _tsv_captions
        at.entry = 1
        for image_id, text, split in form(path):
            yield canonical_id(image_id), text.strip(), split
            at.entry += 1


def _folder_captions(folder):
    # Yields (image id, caption, split), as do the next two. The number in a name is the image's id.
    # A README.txt or a detector's labels/12.txt is no caption: a caption lies beside its picture,
    # or the JSON that img2dataset writes, if the folder has any; and it is more than numbers.
    texts = files_below(folder, r"\.txt")
    pictures = {file.parent / canonical_id(file) for file in files_below(folder, PICTURES)}
    beside = [file for file in texts if file.parent / canonical_id(file) in pictures
        or file.with_suffix(".json").exists()]
    count = 0
    for file in beside if beside or pictures else texts:
        with reading(file, "a caption in UTF-8"):
            text = file.read_text(encoding="utf-8-sig")
        if re.search(r"[^\W\d_e]", text):  # a letter, but for the e in 5e-05
            count += 1
            yield file.name, text, "train"
    if texts:
        say(f"{folder}: {count:,} of {len(texts):,} .txt files are captions, beside "
            f"{len(pictures):,} pictures")


def picture_names(content):
    """A function from image_id to the picture's name, for a file of COCO's form.

    COCO's image_id is the number in file_name. Other tools count from 1: then only `images` tells,
    so ValueError if two of them have one id or name, and KeyError for an image that is not listed.
    """
    images = content.get("images", [])
    names = {canonical_id(i["id"]): canonical_id(i.get("file_name", i["id"])) for i in images}
    if list(names) == list(names.values()):
        return lambda image_id: image_id
    if len(set(names.values())) < len(images):
        raise ValueError("two of its images have the same id or file_name")
    return lambda image_id: names[canonical_id(image_id)]


def _json_captions(path):
    # COCO and lists have one caption per record and no splits; Karpathy one image, with both.
    content = read_json(path)
    if isinstance(content, list):
        for record in content:
            captions = record["caption"]  # a text, or a list of them
            for caption in [captions] if isinstance(captions, str) else captions:
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


def _tsv_captions(path):
    for image, text in read_table(path):
        if text.startswith("http") and not image.startswith("http"):
            image, text = text, image
        if image.startswith("http"):
            image = zlib.crc32(image.encode())
        yield image, text, "train"


def read_table(path):
    """Yield the cells of each line of a TSV file, a list of strings; blank lines are left out."""
    # Not the csv module: it would swallow lines after an unpaired quotation mark.
    with open_text(path) as file:
        for line in filter(str.strip, file):
            yield line.rstrip("\r\n").split("\t")


# --- 6. Published features ------------------------------------------------------------------------
#
# The "bottom-up attention" files that most papers of the field used: a TSV without a header, one
# image per line, arrays as base64 of little-endian numbers. Three forms are in circulation. The
# number of columns distinguishes them, and determines whether width or height comes first:
#
#     6    Anderson et al.   image_id, image_w, image_h, num_boxes, boxes, features
#     10   LXMERT            img_id, img_h, img_w, objects_id, objects_conf, attrs_id, attrs_conf,
#                            num_boxes, boxes, features
#     13   VOLTA             the ten, then cls_prob, attrs, classes
#
# Boxes are float32 (n, 4), x1 y1 x2 y2 in pixels; features float32 (n, 2048); cls_prob float32
# (n, 1601), background first. Only VOLTA's form allows masked region classification.

TSV_COLUMNS = {6: "id w h n boxes features", 10: "id h w _ _ _ _ n boxes features",
    13: "id h w _ _ _ _ n boxes features class_probs _ _"}


def import_features(paths, folder):
    """Write a feature store from published TSV files; continues an interrupted import.

    Two passes with one line in memory at a time: the first counts, the second writes. A broken line
    ends the import; an image with unusable numbers fails alone. Returns the FeatureStore.
    """
    rows = {}
    counts = []
    for image_id, record in read_tsv(paths):
        n = len(record["features"])
        counts.append(n)
        if n:
            rows.setdefault(image_id, len(rows))
    if not rows:
        raise BadInput(f"{paths[0]}: no image with a region")
    say(f"{len(counts):,} lines hold {len(rows):,} images; {len(counts) - len(rows):,} lines are "
        "left out: of an image that came before, or without regions")
    writer = FeatureStore.create(folder, rows, max(counts), record["features"].shape[1],
        record["class_probs"].shape[1], detector="vg", source=[Path(p).name for p in paths])
    pending = set(writer.pending())
    for image_id, record in read_tsv(paths):
        n = len(record["features"])
        row = rows.pop(image_id, None) if n else None  # None: a duplicate, too
        if row in pending:
            try:
                writer.write(row, **record)
            except BadInput as error:
                writer.fail(row, str(error))
    return writer.finish()


def read_tsv(paths):
    """Yield (image id, keyword arguments of StoreWriter.write) of each line, n = 0 included.

    All lines of all files must have as many numbers per region as the first: a store has one shape
    per array. class_probs is (n, 0) where a file has none.
    """
    widths = {"boxes": 4}
    for path in paths:
        what = "a feature TSV of 6, 10 or 13 columns, all lines alike"
        with reading(path, what, "line") as at:
            lines = progress(read_table(path), str(path))
            for at.entry, cells in enumerate(lines, 1):
                cells = dict(zip(TSV_COLUMNS[len(cells)].split(), cells))
                n = int(cells["n"])
                record = {"size": (int(cells["w"]), int(cells["h"]))}
                for name in ("boxes", "features", "class_probs"):
                    # Python 3 wrote some files as b'...'.
                    text = cells.get(name, "").removeprefix("b'").removesuffix("'")
                    numbers = np.frombuffer(base64.b64decode(text, validate=True), "<f4")
                    if n:
                        widths.setdefault(name, len(numbers) // n)
                    record[name] = numbers.reshape(n, widths.get(name, 0))
                yield canonical_id(cells["id"]), record


# --- 7. The toy world -----------------------------------------------------------------------------
#
# A scene is a number: a seed that determines its things, picture, captions, questions and referring
# expressions. So a data set is a range of numbers, and held-out scenes are another range. Each use
# has its own random stream: more captions do not change the picture. Every statement about a scene
# is computed from its things, so it is true without an annotator:
#
#     caption      a small red star left of a large blue ring and a small green cross
#     question     what colour is the large ring ?                               blue, colour
#     expression   the star left of the blue ring                                thing 0, relation

COLOURS = {"red": (215, 45, 45), "green": (45, 165, 60), "blue": (50, 85, 220),
    "yellow": (235, 215, 50), "purple": (150, 60, 185), "orange": (240, 140, 30),
    "white": (245, 245, 245), "black": (20, 20, 20)}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = {"small": (7, 9), "large": (14, 18)}  # half the width, in pixels: from, to
TOY_CLASSES = ["background"] + [f"{c} {s}" for c in COLOURS for s in SHAPES]  # C = 1 + 48
SCENE_PIXELS = 128
TRAIN_SCENES = 0  # the number of the first training scene
HELD_OUT_SCENES = 1_000_000  # of the first held-out one: the ranges never overlap
# Axis (0: x, to the right; 1: y, down), sign of the difference along it, opposite relation.
RELATIONS = {"left of": (0, -1, "right of"), "right of": (0, 1, "left of"),
    "above": (1, -1, "below"), "below": (1, 1, "above")}


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
    def place(self):
        """Its place in the picture, by the axis along which it is farther from the middle."""
        x, y = np.subtract(self.centre, SCENE_PIXELS // 2)
        if max(abs(x), abs(y)) < 16:
            return "in the middle"
        if abs(x) > abs(y):
            return "on the left" if x < 0 else "on the right"
        return "at the top" if y < 0 else "at the bottom"

    def named(self, *words):
        """'small red star' for named('size', 'colour', 'shape'); an unnamed shape is a 'thing'."""
        name = " ".join(getattr(self, word) for word in words)
        return name if "shape" in words else f"{name} thing"

    def relations(self, other, margin=8):
        """The relations that hold to the other: centres differ by more than `margin` pixels.

        Never empty: things do not touch, so along one axis centres differ by over 16 pixels.
        """
        return [relation for relation, (axis, sign, _) in RELATIONS.items()
            if sign * (self.centre[axis] - other.centre[axis]) > margin]


class Scene:
    """Scene number `number`: 2 to 6 things that do not touch; the number determines all of it.

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
        # One that touches no other. If thirty random places were taken, the scene begins again.
        thing = Thing(_pick(rng, SIZES), _pick(rng, COLOURS), _pick(rng, SHAPES))
        # Half of the new things copy colour or shape from another. Otherwise a model could match
        # 'red star' to a scene by finding 'red' and 'star' anywhere, and never learn to bind them.
        if self.things and rng.random() < 0.5:
            same = _pick(rng, ("colour", "shape"))
            setattr(thing, same, getattr(_pick(rng, self.things), same))
        low, high = SIZES[thing.size]
        for _ in range(30):
            thing.half = int(rng.integers(low, high + 1))
            free = thing.half + 2
            x, y = thing.centre = tuple(rng.integers(free, SCENE_PIXELS - free, size=2).tolist())
            if all(max(abs(x - t.centre[0]), abs(y - t.centre[1])) > free + t.half
                    for t in self.things):
                self.things.append(thing)
                return
        self.things.clear()

    def draw(self, scale=1):
        """The picture: a PIL image, RGB, things on grey noise, 128 * scale pixels wide.

        Detectors and models see scale 1; larger ones are for people.
        """
        noise = self._rng(1).integers(95, 160, (SCENE_PIXELS, SCENE_PIXELS), dtype=np.uint8)
        image = Image.fromarray(noise.repeat(scale, 0).repeat(scale, 1)).convert("RGB")
        for thing in self.things:
            _draw_shape(ImageDraw.Draw(image), thing, scale)
        return image

    def _unique(self, *words):
        # {name: thing} of the names, made of these words, that fit exactly one thing.
        names = [thing.named(*words) for thing in self.things]
        return {n: thing for n, thing in zip(names, self.things) if names.count(n) == 1}

    def captions(self, n=4):
        """n sentences that are true of this picture and of few others.

        Each names three things where there are three: 2 % are then also true of another of 100
        scenes; with two things, 8 %. Half of them say where two things are, the others how they
        relate: from comparisons alone no model learned anything about places.
        """
        rng = self._rng(2)
        sentences = []
        for _ in range(n):
            things = [self.things[i] for i in rng.permutation(len(self.things))[:3]]
            first, second, *rest = ("a " + t.named("size", "colour", "shape") for t in things)
            if rng.random() < 0.5:
                parts = [f"{first} {things[0].place}", f"{second} {things[1].place}"]
            else:
                parts = [f"{first} {_pick(rng, things[0].relations(things[1]))} {second}"]
            sentences.append(" and ".join(parts + rest))
        return sentences

    def questions(self, n=5):
        """n (question, answer, type) triples; type is colour, shape, count, existence or relation.

        Types alternate; one that has no fair question about this scene is left out. Yes and no are
        about equally frequent; a 'what ...' question has one answer. Numbers are digits, as in VQA.
        """
        rng = self._rng(3)
        found = []
        for turn in range(self.number, self.number + n):
            kind = ("colour", "shape", "count", "existence", "relation")[turn % 5]
            if question := getattr(self, f"_ask_{kind}")(rng):
                found.append((*question, kind))
        return found

    def _ask_colour(self, rng, asked="colour", given="shape"):
        # Only of a thing that its size and the given word identify: else two answers may be right.
        if unique := self._unique("size", given):
            name, thing = _pick(rng, unique.items())
            return f"what {asked} is the {name} ?", getattr(thing, asked)

    _ask_shape = functools.partialmethod(_ask_colour, asked="shape", given="colour")

    def _ask_count(self, rng):
        # All things, or those of a size, colour or shape in the picture: the answers are 1 to 6.
        key = _pick(rng, ("all", "size", "colour", "shape"))
        if key == "all":
            return "how many things are there ?", str(len(self.things))
        words = [getattr(thing, key) for thing in self.things]
        word = _pick(rng, words)
        name = f"{word} things"
        if key == "shape":
            name = "crosses" if word == "cross" else f"{word}s"
        return f"how many {name} are there ?", str(words.count(word))

    def _ask_existence(self, rng):
        # A 'no' names a colour and a shape that are both in the picture, on different things: to
        # answer it, a model must bind them.
        names = [thing.named("colour", "shape") for thing in self.things]
        if rng.random() < 0.5:
            return f"is there a {_pick(rng, names)} ?", "yes"
        mixed = (f"{a.colour} {b.shape}" for a in self.things for b in self.things)
        if absent := _pick(rng, [name for name in mixed if name not in names]):
            return f"is there a {absent} ?", "no"

    def _ask_relation(self, rng):
        # Two forms, as in GQA: find a thing by its relation, or say whether a relation holds. The
        # first is a step towards the second, where half of the skills gain nothing over chance.
        if rng.random() < 0.5:
            if found := self._refer_by_relation(rng):
                return f"what colour is {found[0]} ?", self.things[found[1]].colour
            return None
        unique = list(self._unique("colour", "shape").items())
        if len(unique) > 1:
            (name, a), (other, b) = (unique[i] for i in rng.permutation(len(unique))[:2])
            relation = _pick(rng, a.relations(b))
            asked, answer = _pick(rng, ((relation, "yes"), (RELATIONS[relation][2], "no")))
            return f"is the {name} {asked} the {other} ?", answer

    def expressions(self, n=3):
        """Up to n different (expression, index of the thing, type); each fits exactly one thing.

        type is attribute, or relation: then its attributes alone fit two or more things.
        """
        rng = self._rng(4)
        refer = (self._refer_by_attribute, self._refer_by_relation)
        found = [refer[turn % 2](rng) for turn in range(self.number, self.number + n)]
        return list(dict.fromkeys(filter(None, found)))

    def _refer_by_attribute(self, rng):
        # The shortest name that fits this thing alone: a longer one would give redundant hints.
        # Two things that are alike in all three words have none.
        index = int(rng.integers(len(self.things)))
        for words in (("shape",), ("colour", "shape"), ("size", "colour", "shape")):
            name = self.things[index].named(*words)
            if name in self._unique(*words):
                return f"the {name}", index, "attribute"

    def _refer_by_relation(self, rng):
        # 'the star left of the red ring': no other star is left of it, not even by a pixel.
        fits = []
        for index, thing in enumerate(self.things):
            others = [t for t in self.things if t.shape == thing.shape and t is not thing]
            for name, mark in self._unique("colour", "shape").items():
                for relation in thing.relations(mark):
                    alone = not any(relation in t.relations(mark, 0) for t in others)
                    if others and mark.shape != thing.shape and alone:
                        fits.append((f"the {thing.shape} {relation} the {name}", index, "relation"))
        return _pick(rng, fits)


def _pick(rng, options):
    # One of the options; None, without a draw, if there is none.
    options = list(options)
    return options[rng.integers(len(options))] if options else None


def _draw_shape(draw, thing, scale):
    # Each shape fills its box: x - h to x + h - 1, inclusive, are 2 h columns. The arms of a cross
    # are a third as wide, and a star's inner points lie at .42 of the outer radius.
    x, y = np.multiply(scale, thing.centre)
    left, top, right, bottom = np.multiply(scale, thing.box)
    h = scale * thing.half
    colour = COLOURS[thing.colour]
    third = h / 3
    box = [left, top, right - 1, bottom - 1]
    if thing.shape == "circle":
        draw.ellipse(box, colour)
    elif thing.shape == "ring":
        draw.ellipse(box, None, colour, max(3 * scale, h // 3))
    elif thing.shape == "square":
        draw.rectangle(box, colour)
    elif thing.shape == "triangle":
        draw.polygon([(x, top), (right, bottom), (left, bottom)], colour)
    elif thing.shape == "cross":
        draw.rectangle([x - third, top, x + third, bottom - 1], colour)
        draw.rectangle([left, y - third, right - 1, y + third], colour)
    else:  # star: ten points, alternately far and near, clockwise from the top
        polar = [(h * (1, 0.42)[k % 2], k * math.pi / 5) for k in range(10)]
        draw.polygon([(x + r * math.sin(a), y - r * math.cos(a)) for r, a in polar], colour)


# --- 8. Command line ------------------------------------------------------------------------------


def check(folder, *files):
    """Describe a feature store and caption files. BadInput if one is damaged, or the store empty.

    It prints store.json, which names the detector: never mix the features of two in one run.
    """
    store = FeatureStore(folder)
    usable = (store.counts > 0).sum()
    print(f"{folder}: a feature store of {len(store):,} images, {usable:,} of them with regions")
    for key, value in store.meta.items():
        print(f"    {key}: {str(value)[:90]}")
    if not usable:
        raise BadInput(f"{folder}: no image could be used: see {folder}/failed.txt")
    for path in files:
        captions = Captions(read_captions(path))
        store.find(captions.ids, f"{path}: captions")
        print(f"    the first: {captions[0]}")


def main(argv=None):
    """python data.py check | import"""
    parser = argparse.ArgumentParser(description="Check data before a run reads it.")
    parser.add_argument("command", choices=["check", "import"])
    parser.add_argument("paths", nargs="+", help="check: a feature store, then caption files or "
        "folders; import: bottom-up-attention TSVs of 6, 10 or 13 columns")
    parser.add_argument("-o", "--out", type=Path, default="data/features",
        help="import: the store to write (default: data/features)")
    args = parser.parse_args(argv)
    if args.command == "import":
        args.paths = [import_features(args.paths, args.out).folder]
    check(*args.paths)


if __name__ == "__main__":
    run(main)
