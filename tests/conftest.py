import os
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("fastflag", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("fastflag")


@pytest.fixture(scope="session")
def investorbench() -> Path:
    """The folder of InvestorBench's JSON files; without it the tests that need it are skipped."""
    beside = Path(__file__).resolve().parents[1] / "../shared/data/investorbench"
    folder = Path(os.environ.get("FASTFLAG_INVESTORBENCH", beside))
    if not (folder / "msft.json").is_file():
        pytest.skip(f"no InvestorBench data in {folder}: set FASTFLAG_INVESTORBENCH to its folder")
    return folder
