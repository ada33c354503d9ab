import json
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import psutil
import pytest

from robopolicy.benchmarking.machine import instruction_sets, processor_name, this_machine


def test_describes_this_machine_in_plain_values():
    found = this_machine()
    assert 1 <= found.cores <= psutil.cpu_count()
    assert found.versions["torch"] == version("torch")
    assert json.loads(json.dumps(asdict(found)))["processor"] == processor_name()


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="only Linux has this table")
def test_instruction_sets_are_those_of_the_processor():
    words = Path("/proc/cpuinfo").read_text().split()
    assert set(instruction_sets()) <= set(words)
    assert ("avx2" in instruction_sets()) == ("avx2" in words)
    assert set(processor_name().split()) <= set(words)
