"""A run in several processes, or killed and resumed, is the run in one process that nothing
disturbed.
"""

import csv
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

SMALL_RUN = Path(__file__).parent / "small_run.py"
PLAIN = [sys.executable, SMALL_RUN]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", SMALL_RUN]


@pytest.fixture(scope="module")
def start(store, tokenizer, tmp_path_factory):
    """start(out, *flags) begins a run of 12 steps of 6 pairs; it evaluates and saves every 3 steps.
    """
    vocab = tmp_path_factory.mktemp("v") / "vocab.txt"
    vocab.write_text("".join(p + "\n" for p in tokenizer.pieces), encoding="utf-8")

    def begin(out, *flags, program=PLAIN):
        size = ["--batch", 6, "--epochs", 3, "--eval-every", 3, "--threads", 1]
        flags = ["--out", out, *size, *flags]
        command = [*program, store.folder, vocab, *flags]
        return subprocess.Popen([str(c) for c in command], text=True, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE)

    return begin


def finish(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out


def weights(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)["model"]


def column(out, name):
    return [row[name] for row in csv.DictReader(open(out / "metrics.csv"))]


def wait_for(path, lines):
    deadline = time.time() + 60
    while not path.exists() or len(path.read_text().splitlines()) < lines:
        assert time.time() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def undisturbed(start, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    finish(start(out, "--accum", 2))
    return out


SLOW = pytest.mark.slow
SIGNALS = [signal.SIGKILL, *(pytest.param(s, marks=SLOW) for s in (signal.SIGTERM, signal.SIGINT))]


@pytest.mark.parametrize("sign", SIGNALS)
def test_a_run_that_was_stopped_resumes_to_the_same_weights(start, undisturbed, tmp_path, sign):
    """Bit for bit. Killed where it stands; the other signals save first and exit with 0."""
    process = start(tmp_path, "--accum", 2)
    wait_for(tmp_path / "metrics.csv", 3)
    process.send_signal(sign)
    out, _ = process.communicate(timeout=60)
    if sign == signal.SIGKILL:
        assert process.returncode == -9
    else:
        assert process.returncode == 0 and ("stopped after step" in out or "done" in out)
    assert "resuming after step" in finish(start(tmp_path, "--accum", 2, "--resume"))
    expected, found = weights(undisturbed), weights(tmp_path)
    assert all(found[k].equal(expected[k]) for k in expected)
    for name in ("step", "mlm", "val_mlm", "val_itm"):
        assert column(tmp_path, name) == column(undisturbed, name)


PROGRAMS = [(TORCHRUN, []), pytest.param(PLAIN, ["--gpus", 2], marks=SLOW)]


@pytest.mark.parametrize("program, flags", PROGRAMS)
def test_two_processes_train_like_one(start, undisturbed, tmp_path, program, flags):
    """Each takes one of the two parts of a batch; noise belongs to the part, not to the process.

    A gradient that were a mean of means would differ: parts have other numbers of masked places.
    """
    finish(start(tmp_path, *flags, program=program))
    expected, found = weights(undisturbed), weights(tmp_path)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=2e-4)
    one, two = (list(map(float, column(out, "mlm"))) for out in (undisturbed, tmp_path))
    assert one == pytest.approx(two, rel=1e-3)
    evaluated = [list(map(float, column(out, "val_itm"))) for out in (undisturbed, tmp_path)]
    assert evaluated[0] == pytest.approx(evaluated[1], rel=1e-3)


@SLOW
def test_a_run_of_two_processes_is_resumed_by_one(start, undisturbed, tmp_path):
    """Also that --gpus 2 passes SIGTERM on, and that both processes stop after the same step."""
    process = start(tmp_path, "--gpus", 2)
    wait_for(tmp_path / "metrics.csv", 2)
    process.send_signal(signal.SIGTERM)
    assert "stopped after step" in finish(process)
    finish(start(tmp_path, "--accum", 2, "--resume"))
    expected, found = weights(undisturbed), weights(tmp_path)
    assert column(tmp_path, "step") == column(undisturbed, "step")
    one, two = (list(map(float, column(out, "mlm"))) for out in (undisturbed, tmp_path))
    assert one == pytest.approx(two, rel=1e-3)  # also of the interval in which it was stopped
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=2e-4)


@SLOW
def test_the_error_of_one_process_ends_the_job_and_is_shown(start, tmp_path):
    process = start(tmp_path, "--gpus", 2, "--batch", 5)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "error: --batch 5 cannot be cut into 2 processes x --accum 1 equal parts" in err
    assert "Traceback" not in err
