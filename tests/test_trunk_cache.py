import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from fastflag.model import ops
from fastflag.policy import trunk_cache
from fastflag.policy.trunk_cache import TrunkCache, TrunkFiles


def kilobyte(value):
    return torch.full((256,), float(value))


def test_the_least_recently_used_goes_first():
    cache = TrunkCache(3 * 1024)
    for key in [b"a", b"b", b"c"]:
        cache.put(key, kilobyte(ord(key)))
    assert torch.equal(cache.get(b"a")[0], kilobyte(ord(b"a")))
    cache.put(b"d", kilobyte(ord(b"d")))
    assert cache.get(b"b") is None
    assert [torch.equal(cache.get(key)[0], kilobyte(ord(key))) for key in [b"a", b"c", b"d"]] == [
        True
    ] * 3
    assert cache.used_bytes == 3 * 1024


def test_bytes_are_counted_by_element_size_and_over_all_tensors():
    cache = TrunkCache(10_000)
    cache.put(b"a", torch.zeros(100, dtype=torch.bfloat16), torch.zeros(3, 5))
    assert cache.used_bytes == 260
    cache.put(b"none")
    assert cache.get(b"none") == () and cache.used_bytes == 260


def test_one_large_entry_drives_out_several_but_never_exceeds_the_budget():
    cache = TrunkCache(3 * 1024)
    for key in [b"a", b"b", b"c"]:
        cache.put(key, kilobyte(1))
    cache.put(b"two", kilobyte(1), kilobyte(2))
    assert cache.get(b"a") is None and cache.get(b"b") is None
    assert cache.get(b"c") is not None and len(cache.get(b"two")) == 2
    cache.put(b"four", *[kilobyte(1)] * 4)
    assert cache.get(b"four") is None
    assert cache.get(b"c") is not None, "what can't be kept drives nothing out"
    assert cache.used_bytes == 3 * 1024


def test_a_key_that_is_there_stays_as_it_is():
    cache = TrunkCache(4096)
    cache.put(b"a", kilobyte(1))
    cache.put(b"a", kilobyte(2))
    assert torch.equal(cache.get(b"a")[0], kilobyte(1))
    assert cache.used_bytes == 1024


def test_without_a_budget_nothing_is_kept():
    cache = TrunkCache(0)
    cache.put(b"a", kilobyte(1))
    assert cache.get(b"a") is None and cache.used_bytes == 0


def test_a_cache_that_is_shrunk_keeps_a_quarter_and_stays_small(monkeypatch):
    monkeypatch.setattr(trunk_cache, "_LEAST_SHRUNK", 2048)
    cache = TrunkCache(10**6)
    for value in range(8):
        cache.put(b"key%d" % value, kilobyte(value))
    assert cache.shrink() == 6 * 1024
    assert [value for value in range(8) if cache.get(b"key%d" % value)] == [6, 7]
    cache.put(b"new", kilobyte(9))
    assert cache.get(b"key6") is None and cache.used_bytes == cache.budget_bytes == 2048
    assert cache.shrink() == 2048  # nothing fits into 512 bytes
    assert cache.shrink() == 0


# In files

CPU = torch.device("cpu")


def files(folder, fingerprint="ab12", budget=10**9):
    return TrunkFiles(folder, fingerprint, budget, CPU)


def filled(folder, values, **settings):
    """Files of their own for each of `values`."""
    kept = files(folder, **settings)
    for value in values:
        kept.put(b"key%d" % value, (kilobyte(value), torch.tensor([value], dtype=torch.bfloat16)))
        kept.flush()
    return kept


def holds(kept, value):
    found = kept.get(b"key%d" % value)
    if found is None:
        return False
    assert torch.equal(found[0], kilobyte(value)) and found[1].dtype == torch.bfloat16
    return True


def test_what_was_written_is_there_after_a_restart(tmp_path):
    filled(tmp_path / "new", [1, 2])
    again = files(tmp_path / "new")
    assert holds(again, 1) and holds(again, 2) and not holds(again, 3)
    assert not holds(files(tmp_path / "new", fingerprint="cd34"), 1), "of another trunk"


def test_what_waits_to_be_written_is_there(tmp_path):
    kept = files(tmp_path)
    kept.put(b"key1", (kilobyte(1), torch.tensor([1], dtype=torch.bfloat16)))
    assert holds(kept, 1) and not holds(files(tmp_path), 1)
    kept.flush()
    assert holds(kept, 1) and holds(files(tmp_path), 1)


def test_enough_entries_are_written_without_a_flush(tmp_path, monkeypatch):
    monkeypatch.setattr(trunk_cache, "_FILE_BYTES", 4096)
    cache = TrunkCache(0, files(tmp_path))
    for value in range(1, 12):
        cache.put(b"key%d" % value, kilobyte(value), torch.zeros(1, dtype=torch.bfloat16))
    assert len(list(tmp_path.iterdir())) == 2
    assert [holds(files(tmp_path), value) for value in range(1, 12)] == [True] * 8 + [False] * 3
    assert holds(cache, 11), "memory has no room, the file has"


@pytest.mark.parametrize("place", [-1, 200, 4, 0])
def test_a_damaged_file_is_named_removed_and_made_anew(tmp_path, place, caplog):
    filled(tmp_path, [1])
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    kept = files(tmp_path)
    assert not holds(kept, 1)
    assert str(path) in caplog.text and len(caplog.records) == 1
    assert not path.exists()
    filled(tmp_path, [1])
    assert holds(files(tmp_path), 1)


@pytest.mark.parametrize("content", [b"", b"abc", b"\x10" + bytes(7) + b'{"a":[1,2,3]}   '])
def test_a_foreign_or_truncated_file_is_named_and_never_used(tmp_path, content, caplog):
    filled(tmp_path, [1])
    (tmp_path / "ab12-0.safetensors").write_bytes(content)
    other = filled(tmp_path / "other", [2], fingerprint="cd34")
    (moved,) = other.folder.iterdir()
    moved.rename(tmp_path / "ab12-1.safetensors")  # another trunk's, under this one's name
    kept = files(tmp_path)
    assert holds(kept, 1) and not holds(kept, 2)
    assert [name in caplog.text for name in ("ab12-0", "ab12-1")] == [True, True]


def test_a_file_cut_short_under_a_reader_is_named(tmp_path, caplog):
    filled(tmp_path, [1])
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-300])
    assert not holds(files(tmp_path), 1)
    assert str(path) in caplog.text


def test_the_file_used_least_recently_goes_first(tmp_path):
    kept = filled(tmp_path, [1, 2, 3])
    size = next(tmp_path.iterdir()).stat().st_size
    for age, value in ((300, 1), (200, 2), (100, 3)):
        path = kept._where[(b"key%d" % value).hex()][0]
        os.utime(path, (time.time() - age,) * 2)
    filled(tmp_path, [4], fingerprint="cd34", budget=3 * size + 100)
    again = files(tmp_path)
    assert [holds(again, value) for value in (1, 2, 3)] == [False, True, True]
    assert holds(kept, 1), "what a process has open it can still read"


def test_processes_share_a_folder(tmp_path):
    """Four write the same and other entries at once; what is read is always what was written."""
    here = Path(__file__).parent
    workers = [
        subprocess.Popen([sys.executable, "-c", SHARING, str(tmp_path), str(seed)], cwd=here)
        for seed in range(4)
    ]
    assert [worker.wait() for worker in workers] == [0] * 4
    kept = files(tmp_path)
    assert all(holds(kept, value) for value in range(40))
    assert not list(tmp_path.glob("*.tmp"))


SHARING = """
import random, sys
sys.path.insert(0, ".")
from pathlib import Path
from test_trunk_cache import filled, files, holds
values = list(range(40))
random.Random(int(sys.argv[2])).shuffle(values)
for start in range(0, 40, 10):
    filled(Path(sys.argv[1]), values[start : start + 10])
    again = files(Path(sys.argv[1]))
    assert all(holds(again, value) for value in values[: start + 10])
"""


def test_a_killed_writer_leaves_nothing_that_is_read(tmp_path, monkeypatch):
    def killed(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trunk_cache, "save_file", killed)
        with pytest.raises(KeyboardInterrupt):
            filled(tmp_path, [1])
    (left,) = tmp_path.iterdir()
    assert not holds(files(tmp_path), 1) and left.exists()
    os.utime(left, (time.time() - 10**5,) * 2)
    filled(tmp_path, [2])
    assert not left.exists(), "the next writer clears it away"


def test_a_full_disk_is_said_once_and_nothing_is_lost(tmp_path, monkeypatch, caplog):
    kept = filled(tmp_path, [1])

    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trunk_cache, "save_file", full)
    for value in (2, 3):
        kept.put(b"key%d" % value, (kilobyte(value),))
        kept.flush()
    assert holds(kept, 1) and not holds(kept, 2)
    assert caplog.text.count("No space left") == len(caplog.records) == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_can_not_be_made_is_said(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    filled(tmp_path / "file" / "folder", [1])
    assert "are not kept on disk" in caplog.text


@pytest.mark.parametrize(
    ("place", "name"),
    [
        (ops.linear, "_torchs"),
        (ops.causal_attention, "_torchs"),
        (functional, "scaled_dot_product_attention"),
    ],
    ids=["product", "causal", "masked"],
)
def test_a_cpu_of_other_bits_has_files_of_its_own(place, name, monkeypatch):
    """A last bit of a product or of attention is enough."""
    before, right = trunk_cache.bits_of_a_cpu("fp32"), getattr(place, name)
    assert trunk_cache.bits_of_a_cpu("fp32") == before

    def other(*arguments, **named):
        made = right(*arguments, **named)
        made.view(-1)[-1] = made.view(-1)[-1].nextafter(torch.tensor(torch.inf))
        return made

    for op in ops.OPS:
        monkeypatch.setattr(op, "_chosen", {})
    monkeypatch.setattr(place, name, other)
    assert trunk_cache.bits_of_a_cpu("fp32") != before
