"""What all tests share: the CPU, one thread, a fixed seed, a tiny model, a tiny store."""

import os

# Tests compute on the CPU, even on a machine with a GPU, and so do the programs that they start:
# there, what they compare with is exact. test_processes.py has one test of the accelerator.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

torch.accelerator.is_available = lambda: False  # nor is Apple's GPU used
torch._C._mps_is_available = lambda: False

from data import FeatureStore, WordPiece, build_vocab  # noqa: E402
from switchbert import SwitchBertConfig  # noqa: E402

# On tensors this small, two threads are many times slower than one beside a busy process.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def config():
    """Without dropout, so that only the noise of the switches sets training apart."""
    return SwitchBertConfig.tiny(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


@pytest.fixture
def inputs():
    """Encoder inputs: B = 3, T = 5, R = 4. The second sample has 3 words and 2 regions."""
    text_mask = torch.ones(3, 5).long()
    text_mask[1, 3:] = 0
    region_mask = torch.ones(3, 4).long()
    region_mask[1, 2:] = 0
    corner, size = torch.rand(2, 3, 4, 2) / 2  # shares of width and height
    area = size.prod(-1, keepdim=True)
    return {
        "input_ids": torch.randint(5, 60, (3, 5)),
        "text_mask": text_mask,
        "region_features": torch.randn(3, 4, 12),
        "region_boxes": torch.cat([corner, corner + size, area], dim=-1),
        "region_mask": region_mask,
    }


@pytest.fixture(scope="session")
def tokenizer():
    captions = ["a small red star", "a large blue circle", "left of the ring"]
    return WordPiece(build_vocab(captions * 2))


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """Ten images, ids 0 to 9, of one to five regions; F = 12, C = 7."""
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("store") / "features"
    writer = FeatureStore.create(folder, range(10), 5, 12, 7, detector="made up")
    for row in writer.pending():
        regions = 1 + row % 5
        corner = rng.random((regions, 2)) * 50
        boxes = np.hstack([corner, corner + 20])  # pixels of a picture of 100 x 80
        probs = rng.random((regions, 7))
        probs /= probs.sum(axis=1, keepdims=True)
        features = rng.normal(size=(regions, 12))
        writer.write(row, features, boxes, (100, 80), class_probs=probs)
    return writer.finish()
