"""A run in several processes, and a run that is killed and resumed, end as the run in one
process that nothing disturbs.
"""

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from small_run import CAPTIONS
from test_train import metrics

import data
import finetune
import train

parametrize = pytest.mark.parametrize
close = torch.testing.assert_close
SLOW = pytest.mark.slow
SMALL_RUN = Path(__file__).parent / "small_run.py"
TWO = "--gpus 2 --accum 3"  # each process takes three of the six parts of a batch
ENDLESS = "--epochs 2000"


def slow(*case):
    return pytest.param(*case, marks=SLOW)


def begin_process(command):
    """In a process group of its own."""
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, text=True, stdout=pipe, stderr=pipe, start_new_session=True)


@pytest.fixture(scope="module")
def start(store, tokenizer, tmp_path_factory):
    """start(out, flags): a run of 15 steps with 6 pairs that evaluates and saves every 4 steps."""
    vocab = tmp_path_factory.mktemp("v") / "vocab.txt"
    vocab.write_text("".join(piece + "\n" for piece in tokenizer.pieces), encoding="utf-8")

    def start(out, flags="", task="train", checkpoint=None, begin=begin_process):
        command = [sys.executable, SMALL_RUN, store.folder, vocab]
        command += task.split()
        command += ["--out", out]
        command += "--batch 6 --epochs 3 --eval-every 4 --threads 1 --lr 1".split()
        command += flags.split()
        if checkpoint:
            command += ["--checkpoint", checkpoint]
        return begin(command)

    return start


def finish(process, status=0):
    """Wait for the end, with this status. -> What was printed, or the error for status 1."""
    out, err = process.communicate(timeout=100)
    assert process.returncode == status, out + err
    if status == 0:
        assert err == ""  # no warning of torch either
    return err if status == 1 else out


def load(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)


def weights(out):
    return load(out)["model"]


def steps_of_scores(out):
    return [line["step"] for line in metrics(out, "scores")]


def wait_for(path, text):
    deadline = time.time() + 60
    while not path.exists() or text not in path.read_text():
        assert time.time() < deadline
        time.sleep(0.01)


def wait_for_step(out, step):
    wait_for(out / "metrics.jsonl", f'"step": {step},')


def parents():
    """{process: its parent} of all processes but zombies."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            after_name = path.read_text().rsplit(")", 1)[1]
            state, parent = after_name.split()[:2]
            if state != "Z":
                process = int(path.parent.name)
                found[process] = int(parent)
    return found


def children_of(process):
    return {child for child, parent in parents().items() if parent == process}


def descendants(process):
    """The children of a process, their children, and so on."""
    found = children_of(process)
    for child in children_of(process):
        found |= descendants(child)
    return found


def wait_for_end(processes, seconds):
    deadline = time.time() + seconds
    while alive := parents().keys() & processes:
        assert time.time() < deadline, alive
        time.sleep(0.05)


def assert_alike(out, expected):
    """The same run but for the order in which numbers were added up."""
    close(weights(out), weights(expected), rtol=1e-3, atol=2e-4)
    for a, b in zip(metrics(out, "scores"), metrics(expected, "scores"), strict=True):
        assert a["losses"] == pytest.approx(b["losses"], rel=1e-3)
        assert a["scores"]["itm"] == pytest.approx(b["scores"]["itm"], rel=1e-3)
    for a, b in zip(metrics(out, "soft_switches"), metrics(expected, "soft_switches"), strict=True):
        assert np.allclose(a["soft_switches"]["modes"], b["soft_switches"]["modes"], atol=1e-3)


@pytest.fixture(scope="module")
def begun(start, tmp_path_factory):
    """A run that nothing will disturb, as it begins, and its folder."""
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    return start(out, "--accum 6"), out


@pytest.fixture(scope="module")
def undisturbed(begun):
    """The folder of that run after its end."""
    process, out = begun
    finish(process)
    return out


# --- Killed and resumed ---


@parametrize("sign, status, after", [
    (signal.SIGKILL, -9, "4"),
    slow(signal.SIGINT, 130, r"\d+"),  # Ctrl-C lets it save first
])
def test_a_run_that_was_stopped_resumes_to_the_same_weights(
        start, begun, request, tmp_path, sign, status, after):
    """Bit for bit. Ten images with three captions each are 30 pairs, or 5 batches of 6: three
    epochs have 15 steps. So a run saves after steps 4, 8, 12 and 15, and a kill in step 7 takes
    it back to step 4.
    """
    process = start(tmp_path, "--accum 6")
    wait_for_step(tmp_path, 6)
    process.send_signal(sign)
    finish(process, status)
    said = finish(start(tmp_path, "--accum 6 --resume"))
    assert re.search(f"resuming after step {after}\n", said)
    undisturbed = request.getfixturevalue("undisturbed")  # which has run beside this one
    close(weights(tmp_path), weights(undisturbed), rtol=0, atol=0)
    assert metrics(tmp_path, "scores") == metrics(undisturbed, "scores")
    assert steps_of_scores(tmp_path) == [4, 8, 12, 15]


def one(process, sign):
    process.send_signal(sign)


def group(process, sign):
    os.killpg(process.pid, sign)


def rank(process, sign):
    """The second process of torchrun, which nobody else tells."""
    youngest = max(children_of(process.pid))
    os.kill(youngest, sign)


@parametrize("whom, sign, flags", [
    (group, signal.SIGTERM, "--workers 1"),
    slow(group, signal.SIGTERM, TWO),
    slow(group, signal.SIGINT, ""),
    slow(group, signal.SIGINT, "--workers 2"),
    slow(group, signal.SIGINT, f"{TWO} --workers 1"),
    slow(one, signal.SIGTERM, ""),
    slow(one, signal.SIGTERM, TWO),
    slow(one, signal.SIGTERM, f"{TWO} --workers 1"),
    slow(one, signal.SIGINT, "--workers 1"),
    slow(one, signal.SIGINT, TWO),
    slow(rank, signal.SIGTERM, f"{TWO} --workers 1"),
    slow(rank, signal.SIGHUP, TWO),
])
def test_a_stopped_run_saves_and_does_not_report_success(start, tmp_path, whom, sign, flags):
    """Nor does it leave a process behind. Signals to a group do not reach those that load."""
    process = start(tmp_path, f"{ENDLESS} {flags}")
    wait_for_step(tmp_path, 8)
    family = descendants(process.pid)
    whom(process, sign)
    said = finish(process, 130)
    stopped = re.search(r"stopped after step (\d+); --resume continues from here\n$", said)
    assert load(tmp_path)["step"] == int(stopped[1])
    wait_for_end(family, seconds=10)


@SLOW
@parametrize("flags", ["--workers 2", f"{TWO} --workers 1"])
def test_what_a_kill_leaves_behind_ends_by_itself(start, tmp_path, flags):
    """Loading processes look for their training every five seconds; torchrun's save first."""
    process = start(tmp_path, f"{ENDLESS} {flags}")
    wait_for_step(tmp_path, 8)
    family = descendants(process.pid)
    process.kill()
    said = finish(process, -9)
    if "--gpus" in flags:
        assert "stopped after step" in said
    wait_for_end(family, seconds=30)


@SLOW
@parametrize("flags", ["", f"{TWO} --workers 1"])
def test_a_run_outlives_its_terminal(start, tmp_path, flags):
    """When the terminal closes, its shell ends, the run gets SIGHUP and can print no more."""
    def begin_in_terminal(command):
        pid, terminal = pty.fork()
        if pid == 0:
            shell = ["sh", "-c", '"$@" & wait', "sh"]
            os.execvp("sh", shell + command)
        return pid, terminal

    shell, terminal = start(tmp_path, f"--accum 6 {flags}", begin=begin_in_terminal)
    wait_for_step(tmp_path, 1)
    os.close(terminal)
    os.waitpid(shell, 0)
    deadline = time.time() + 60
    with contextlib.suppress(ProcessLookupError):  # all have ended
        while time.time() < deadline:
            os.killpg(shell, 0)
            time.sleep(0.05)
    assert steps_of_scores(tmp_path) == [4, 8, 12, 15]
    assert load(tmp_path)["step"] == 15


@SLOW
def test_a_folder_holds_one_run_at_a_time(start, tmp_path):
    first = start(tmp_path, ENDLESS)
    wait_for_step(tmp_path, 4)
    error = finish(start(tmp_path), status=1)
    assert f"error: {tmp_path}: another run is at work there" in error
    first.terminate()
    finish(first, 130)


# --- Several processes, and a GPU ---


def test_two_processes_train_like_one(start, undisturbed, tmp_path):
    """Noise belongs to the part of a batch, not to the process. A mean of means would give
    another gradient: the parts differ in their number of masked places.
    """
    finish(start(tmp_path, TWO))
    assert_alike(tmp_path, undisturbed)


@SLOW
def test_a_run_of_two_processes_is_stopped_as_one_and_resumed_by_one(
        start, undisturbed, tmp_path):
    """--gpus 2 passes SIGTERM on, and both processes stop after the same step."""
    process = start(tmp_path, TWO)
    wait_for_step(tmp_path, 6)
    process.send_signal(signal.SIGTERM)
    assert "stopped after step" in finish(process, 130)
    finish(start(tmp_path, "--accum 6 --resume"))
    assert_alike(tmp_path, undisturbed)


@SLOW
def test_pretraining_runs_blind_in_two_processes(start, tmp_path):
    """A parameter that no loss reaches would stop the second step."""
    process = start(tmp_path, "--blind --gpus 2")
    assert "processes: 2" in finish(process)


@SLOW
@parametrize("task", ["vqa", "retrieval", "refer"])
def test_every_task_runs_blind_in_two_processes(start, undisturbed, tmp_path, task):
    checkpoint = undisturbed / "checkpoint.pt"
    process = start(tmp_path, "--blind --gpus 2", f"finetune {task}", checkpoint)
    assert "processes: 2" in finish(process)


@SLOW
def test_finetuning_in_two_processes_is_finetuning_in_one(start, undisturbed, tmp_path):
    checkpoint = undisturbed / "checkpoint.pt"

    def results(out, flags):
        finish(start(out, flags, "finetune retrieval", checkpoint))
        return json.loads((out / "result.json").read_text())["results"]

    one = tmp_path / "one"
    two = tmp_path / "two"
    assert results(two, "--gpus 2") == results(one, "--accum 2")
    close(weights(two), weights(one), rtol=1e-3, atol=2e-4)


@SLOW
@parametrize("batch, message", [
    (5, "--batch 5, of 30 pairs: expected a multiple of 2, which is processes "),
    (6, "Is a directory: .*checkpoint.pt"),
], ids=["of all", "of the first alone, while it trains"])
def test_the_error_of_one_process_ends_all_and_is_one_sentence(
        start, tmp_path, batch, message):
    (tmp_path / ".checkpoint.pt.tmp").mkdir()  # so that no checkpoint can be written
    error = finish(start(tmp_path, f"--gpus 2 --batch {batch}"), status=1)
    assert re.search(f"^error: .*{message}.*\n$", error)
    assert error.count("\n") == 1


@SLOW
@parametrize("context", ["spawn", "forkserver"])
def test_batches_do_not_depend_on_how_loading_processes_start(
        store, tokenizer, context, monkeypatch):
    """Neither in pretraining nor in a task. A task is its own data set, but its model stays
    behind: here a lock, which cannot be pickled.
    """
    args, _ = train.parse_args("--batch 6 --accum 2".split())
    items = [dict(image_id=i, text=text, box=(0, 0, 9, 9)) for i, text in CAPTIONS]
    task = finetune.Refer(store, tokenizer, {"train": items}, args)
    task.model = threading.Lock()
    pairs = train.Pretraining(args, train.Data(store, CAPTIONS, CAPTIONS, tokenizer))

    def batches(dataset):
        return list(train.load_parts(args, dataset, 0, 3))

    real = data.DataLoader

    def in_context(*args, **settings):
        settings["multiprocessing_context"] = context
        return real(*args, **settings)

    for dataset in (pairs, task):
        args.workers = 0
        expected = batches(dataset)
        assert len(expected) == 6
        args.workers = 1
        with monkeypatch.context() as patch:
            patch.setattr(data, "DataLoader", in_context)
            close(batches(dataset), expected)


@SLOW
def test_an_accelerator_trains_like_the_cpu(start, undisturbed, tmp_path, monkeypatch):
    """A real run on whatever GPU there is, in the precision that is its default."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("ON_ACCELERATOR", "yes")
    ask = "from torch import accelerator as a; print(a.is_available() and a.current_accelerator())"
    answer = subprocess.check_output([sys.executable, "-c", ask], text=True)
    if answer.startswith("False"):
        pytest.skip("this machine has no accelerator")
    kind = answer.strip().split(":")[0]
    assert f"on {kind}" in finish(start(tmp_path, "--accum 6"))
    first_on_gpu = metrics(tmp_path, "scores")[0]
    first = metrics(undisturbed, "scores")[0]
    assert first_on_gpu["losses"] == pytest.approx(first["losses"], rel=0.2)
