"""The benchmarks run: at sizes that mean nothing, in half a minute."""

import json

import benchmark
import pytest


def test_turns_are_taken_and_the_first_one_does_not_count():
    turns = []
    seconds = benchmark.take_turns({name: lambda turn, name=name: turns.append((name, turn))
        for name in "ab"}, rounds=2)
    assert turns == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert seconds.keys() == {"a", "b"} and all(s > 0 for s in seconds.values())


@pytest.mark.slow
def test_everything_that_is_measured_on_a_gpu_runs_on_a_cpu_at_small_sizes(tmp_path):
    benchmark.main(["tiny", "--json", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert {"step, tiny", "captions of real lengths", "loading", "corpus of 60,000",
        "gpu: pairs per second", "gpu: runs of the README"} <= found.keys()
    assert all(value >= 0 for numbers in found.values() for value in numbers.values())
