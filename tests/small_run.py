"""train.py or finetune.py on a store of ten made-up images, as a program:

    small_run.py STORE VOCAB train [flags of train.py]
    small_run.py STORE VOCAB finetune vqa | retrieval | refer [flags of finetune.py]

The tests start it, kill it, and start it in several processes. What is replaced is where the data
come from; --gpus starts this same command again, so the replacement holds in every process.
"""

import functools
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402

if "ON_ACCELERATOR" not in os.environ:  # as conftest.py
    torch.accelerator.is_available = lambda: False
    torch._C._mps_is_available = lambda: False

import finetune  # noqa: E402
import train  # noqa: E402
from data import FeatureStore, WordPiece, run  # noqa: E402

CAPTIONS = [(str(i), f"a {word} ring") for i in range(10) for word in ("small", "red", "large")]


def load_data(*_):
    """The captions above, in the place of the toy world's."""
    store = FeatureStore(sys.argv[1])
    return train.Data(store, CAPTIONS, CAPTIONS, WordPiece(sys.argv[2]))


def load_task(kind, args):
    """The captions as expressions, questions or captions of the same images."""
    store = FeatureStore(sys.argv[1])
    items = [dict(image_id=i, text=text, box=store[store.row(i)]["boxes"][0].tolist(), ref_id=k,
        sent_id=k, kind="attribute", question_id=k, answers=[text.split()[1]] * 10,
        majority=text.split()[1], answer_type="other", question_type="what")
        for k, (i, text) in enumerate(CAPTIONS)]
    return store, {"train": items, "val": items}


def make_optimizer(*args):
    """AdamW with a large eps: else its steps would not depend on the gradient's size."""
    optimizer = MAKE_OPTIMIZER(*args)
    for group in optimizer.param_groups:
        group["eps"] = 1.0
    return optimizer


MAKE_OPTIMIZER = train.make_optimizer

if __name__ == "__main__":
    train.load_data, finetune.load_task = load_data, load_task
    train.make_optimizer = make_optimizer
    train.LOOK_EVERY = 2
    # In small batches, so that two processes share an evaluation.
    train.evaluate = functools.partial(train.evaluate, batch_size=7)
    script = {"train": train, "finetune": finetune}[sys.argv[3]]
    run(lambda: script.main(sys.argv[4:]))
