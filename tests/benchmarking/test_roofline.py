import pytest

from robopolicy.benchmarking.ceilings import Ceilings
from robopolicy.benchmarking.roofline import Bound, chunk_bound, stage_bound, working_sets
from robopolicy.benchmarking.work import ChunkWork, Work

KIB = 1024
CEILINGS = Ceilings("cpu", 1, bandwidth={KIB: 1e6, 1024 * KIB: 1e5}, flops={"fp32": 1e9, "bf16": 4e9}, gemv_flops=1e8)
"""A cache that gives 1 MB/s to arrays below 1 MiB, and a memory that gives a tenth of that."""


def test_the_longer_of_memory_and_compute_binds():
    assert Bound(2.0, 1.0).seconds == 2.0 and Bound(2.0, 1.0).binds == "memory"
    assert Bound(1.0, 2.0).seconds == 2.0 and Bound(1.0, 2.0).binds == "compute"


def test_a_network_that_fits_the_cache_reads_from_it():
    call = Work(flops=1000, weights=100 * KIB, activations=0)
    bound = stage_bound([call, call], [400 * KIB, 400 * KIB], CEILINGS, "fp32")
    assert bound.memory == pytest.approx(2 * 400 * KIB / 1e6)
    assert bound.compute == pytest.approx(2000 / 1e9)


def test_a_network_that_does_not_fit_reads_from_memory():
    call = Work(flops=0, weights=1024 * KIB, activations=0)
    assert stage_bound([call], [4096 * KIB], CEILINGS, "fp32").memory == pytest.approx(4096 * KIB / 1e5)


def test_activations_are_written_and_read_once_in_the_fastest_cache():
    call = Work(flops=0, weights=0, activations=1000)
    assert stage_bound([call], [4096 * KIB], CEILINGS, "fp32").memory == pytest.approx(8000 / 1e6)


def test_half_the_bytes_and_the_faster_products_of_bf16():
    call = Work(flops=8_000_000, weights=1024 * KIB, activations=0)
    bound = stage_bound([call], [2048 * KIB], CEILINGS, "bf16")
    assert (bound.memory, bound.compute) == pytest.approx((2048 * KIB / 1e5, 8e6 / 4e9))


def test_unmeasured_precisions_multiply_like_fp32():
    assert CEILINGS.flops_at("int8") == 1e9


def test_the_first_network_call_shares_the_caches_with_the_encoder():
    # 800 KiB each: alone in the cache, together not
    encode, call = Work(0, 200 * KIB, 0), Work(0, 200 * KIB, 0)
    work = ChunkWork(encode, (call, call, call))
    assert working_sets(work, "fp32") == (1600 * KIB, 800 * KIB)
    bound = chunk_bound(work, CEILINGS, "fp32")
    slow, fast = 800 * KIB / 1e5, 800 * KIB / 1e6
    assert bound.encode.memory == pytest.approx(slow)
    assert bound.denoise.memory == pytest.approx(slow + 2 * fast)
    assert bound.seconds == pytest.approx(2 * slow + 2 * fast) and bound.binds == "memory"


def test_stages_can_be_bound_by_different_things():
    bound = chunk_bound(ChunkWork(Work(10**9, 10, 0), (Work(10, KIB, 0),)), CEILINGS, "fp32")
    assert (bound.encode.binds, bound.denoise.binds, bound.binds) == ("compute", "memory", "compute")
