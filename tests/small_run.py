"""train.py or finetune.py on a store of ten made-up images, as a program:

    small_run.py STORE VOCAB train [flags of train.py]
    small_run.py STORE VOCAB finetune vqa | retrieval | refer [flags of finetune.py]

The tests start it, kill it, and start it in several processes. What differs from a real run is
replaced below. --gpus starts this same command again, so every process has the replacements.
"""

import functools
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402

if "ON_ACCELERATOR" not in os.environ:  # as in conftest.py
    torch.accelerator.is_available = lambda: False
    torch._C._mps_is_available = lambda: False

import finetune  # noqa: E402
import train  # noqa: E402
from data import FeatureStore, WordPiece, run  # noqa: E402

WORDS = ("small", "red", "large")
CAPTIONS = [(str(image_id), f"a {word} ring") for image_id in range(10) for word in WORDS]


def load_data(*_):
    """The captions above, in place of the toy world's."""
    store = FeatureStore(sys.argv[1])
    return train.Data(store, CAPTIONS, CAPTIONS, WordPiece(sys.argv[2]))


def load_task(kind, args):
    """Each caption as an expression for the first box and as a question for its adjective."""
    store = FeatureStore(sys.argv[1])
    items = []
    for number, (image_id, text) in enumerate(CAPTIONS):
        answer = text.split()[1]
        expression = dict(box=store[store.row(image_id)]["boxes"][0].tolist(), ref_id=number,
            sent_id=number, kind="attribute")
        question = dict(question_id=number, answers=[answer] * 10, majority=answer,
            answer_type="other", question_type="what")
        items.append(dict(image_id=image_id, text=text) | expression | question)
    return store, {"train": items, "val": items}


make_adamw = train.make_optimizer


def make_optimizer(model, weight_decay, gate_rate):
    """AdamW with a large eps: otherwise its steps would not depend on the gradient's size."""
    optimizer = make_adamw(model, weight_decay, gate_rate)
    for group in optimizer.param_groups:
        group["eps"] = 1.0
    return optimizer


if __name__ == "__main__":
    train.load_data = load_data
    finetune.load_task = load_task
    train.make_optimizer = make_optimizer
    train.LOOK_EVERY = 2
    # In small batches, so that two processes share an evaluation.
    train.evaluate = functools.partial(train.evaluate, batch_size=7)
    script = {"train": train, "finetune": finetune}[sys.argv[3]]
    run(lambda _: script.main(sys.argv[4:]))
