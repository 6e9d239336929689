"""The README and the code say the same."""

import re
import shlex
from pathlib import Path

import pytest

import finetune
import train

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = {p.name: p.read_text(encoding="utf-8") for p in sorted(ROOT.glob("*.py"))}


def test_assumptions_and_deviations_of_table_and_code_are_the_same():
    table = set(re.findall(r"^\| ([AD]\d+) \|", README, flags=re.M))
    code = re.findall(r"(?:ASSUMPTION|DEVIATION) ([AD]\d+)", "".join(SCRIPTS.values()))
    assert table == set(code)


def test_ids_that_scripts_mention_are_in_the_table():
    table = set(re.findall(r"^\| ([AD]\d+) \|", README, flags=re.M))
    for text in SCRIPTS.values():
        assert set(re.findall(r"\b([AD]\d{1,2})\b", text)) <= table


def test_line_counts_are_within_a_tenth():
    for name, lines in re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", README, flags=re.M):
        true = len(SCRIPTS[name].splitlines())
        assert abs(int(lines) - true) <= true / 10, f"{name} has {true} lines"


def test_every_script_is_in_the_table():
    rows = re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", README, flags=re.M)
    assert {name for name, _ in rows} == set(SCRIPTS)


@pytest.mark.parametrize("line", re.findall(r"python train\.py[^\n`#|)]*", README))
def test_commands_of_the_readme_are_understood(line):
    train.parse_args(shlex.split(line)[2:])


@pytest.mark.parametrize("line", re.findall(r"python finetune\.py[^\n`#|)]*", README))
def test_finetuning_commands_of_the_readme_are_understood(line):
    finetune.parse_args(shlex.split(line)[2:])
