import torch

from fastflag.policy.trunk_cache import TrunkCache


def kilobyte(value):
    return torch.full((256,), float(value))


def test_the_least_recently_used_goes_first():
    cache = TrunkCache(3 * 1024)
    for key in "abc":
        cache.put(key, kilobyte(ord(key)))
    assert torch.equal(cache.get("a")[0], kilobyte(ord("a")))
    cache.put("d", kilobyte(ord("d")))
    assert cache.get("b") is None
    assert [torch.equal(cache.get(key)[0], kilobyte(ord(key))) for key in "acd"] == [True] * 3
    assert cache.used_bytes == 3 * 1024


def test_bytes_are_counted_by_element_size_and_over_all_tensors():
    cache = TrunkCache(10_000)
    cache.put("a", torch.zeros(100, dtype=torch.bfloat16), torch.zeros(3, 5))
    assert cache.used_bytes == 260
    cache.put("none")
    assert cache.get("none") == () and cache.used_bytes == 260


def test_one_large_entry_drives_out_several_but_never_exceeds_the_budget():
    cache = TrunkCache(3 * 1024)
    for key in "abc":
        cache.put(key, kilobyte(1))
    cache.put("two", kilobyte(1), kilobyte(2))
    assert cache.get("a") is None and cache.get("b") is None
    assert cache.get("c") is not None and len(cache.get("two")) == 2
    cache.put("four", *[kilobyte(1)] * 4)
    assert cache.get("four") is None
    assert cache.get("c") is not None, "what can't be kept drives nothing out"
    assert cache.used_bytes == 3 * 1024


def test_a_key_that_is_there_stays_as_it_is():
    cache = TrunkCache(4096)
    cache.put("a", kilobyte(1))
    cache.put("a", kilobyte(2))
    assert torch.equal(cache.get("a")[0], kilobyte(1))
    assert cache.used_bytes == 1024


def test_without_a_budget_nothing_is_kept():
    cache = TrunkCache(0)
    cache.put("a", kilobyte(1))
    assert cache.get("a") is None and cache.used_bytes == 0
