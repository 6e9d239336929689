"""train.py on a store of ten made-up images, as a program: small_run.py STORE VOCAB [flags of
train.py].

The tests start it, kill it, and start it with several processes. What is replaced is where the
data come from; spawned processes import this file again, so the replacement stands outside of
main.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import train  # noqa: E402
from data import FeatureStore, WordPiece  # noqa: E402

CAPTIONS = [(str(i), f"a {word} ring") for i in range(10) for word in ("small", "red", "large")]


def load_data(*_):
    store, vocab = FeatureStore(os.environ["STORE"]), WordPiece(os.environ["VOCAB"])
    return train.Data(store, CAPTIONS, CAPTIONS, vocab, True)


train.load_data = load_data
train.text_only_accuracy = lambda *_: 0.0  # no concern of these tests

if __name__ == "__main__":
    os.environ.update(STORE=sys.argv.pop(1), VOCAB=sys.argv.pop(1))
    train.main()
