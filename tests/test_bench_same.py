"""Two runs compared: what differs is named, times are not."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from bench.same import differences, main

TENSORS = {"a": np.arange(6, dtype=np.float32), "b": np.zeros(2, dtype=np.float32)}


def run(folder, tensors=TENSORS, **changes):
    (folder / "checkpoint").mkdir(parents=True)
    save_file(tensors, folder / "checkpoint" / "00000002.safetensors")
    lines = [
        {"step": step, "return": 0.1, "seconds": {"update": len(str(folder))}} for step in (0, 1)
    ]
    lines[1] |= changes
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "backtest.json").write_text(json.dumps({"equity": [1.0, changes.get("last", 2.0)]}))
    policy = {"dtype": changes.get("dtype", "bf16")}
    (folder / "config.json").write_text(json.dumps({"policy": policy}))
    return folder


def test_runs_that_differ_in_times_alone_are_the_same(tmp_path):
    assert differences(run(tmp_path / "one"), run(tmp_path / "another")) == []


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        # Equal as numbers, not in their bits.
        ({"tensors": TENSORS | {"b": np.array([0.0, -0.0], np.float32)}}, "1 of 2 tensors, b"),
        ({"tensors": {"a": TENSORS["a"]}}, "tensors ['b']"),
        ({"return": 0.2}, "metrics.jsonl, document 2: return"),
        ({"dtype": "fp32"}, "config.json: dtype bf16, fp32 in the other: name one, --dtype"),
        ({"last": 3.0}, "backtest.json, document 1: equity"),
    ],
)
def test_what_differs_is_told(tmp_path, changes, told):
    found = differences(run(tmp_path / "one"), run(tmp_path / "other", **changes))
    assert any(told in line for line in found)


def test_runs_of_other_lengths_differ(tmp_path):
    one, other = run(tmp_path / "one"), run(tmp_path / "other")
    with (other / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2}\n')
    assert differences(one, other) == ["metrics.jsonl: 2 documents, 3 in the other"]


def test_without_another_checkout_it_says_how(capsys):
    assert main([]) == 2 and "OTHER_CHECKOUT" in capsys.readouterr().out
