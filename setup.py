"""Metadata and layout of the package; versions tested together stand in constraints.txt."""

import re
from pathlib import Path

from setuptools import setup

here = Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (here / "fastflag/__init__.py").read_text()).group(1)

setup(
    name="fastflag",
    version=version,
    description="Teach a language model to trade on one GPU by policy gradients, exactly and fast",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[
        "fastflag",
        "fastflag.config",
        "fastflag.market",
        "fastflag.market.compiled",
        "fastflag.market.tasks",
        "fastflag.prompt",
        "fastflag.model",
        "fastflag.model.proof",
        "fastflag.gym",
        "fastflag.policy",
        "fastflag.learn",
        "fastflag.evaluate",
        "fastflag.api",
        "fastflag.cli",
        "fastflag.kernels",
    ],
    package_data={
        "fastflag": ["py.typed", "__init__.pyi"],
        "fastflag.evaluate": ["report.html", "report.css", "report.js"],
    },
    # Installed under fastflag, because the import name `kernels` is Hugging Face's.
    package_dir={"fastflag.kernels": "kernels"},
    entry_points={"console_scripts": ["fastflag=fastflag.__main__:main"]},
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "bitsandbytes>=0.50",
        "safetensors>=0.5",
        "numba>=0.61",
        "numpy>=2.0",
        "pandas>=2.2",
        "pyarrow>=18",
        "tokenizers>=0.21",
        "huggingface-hub>=0.30",
        "gguf>=0.17",
        "tyro>=1.0",
        "rich>=13",
        "plotly>=6",
        "tensorboard>=2.18",
        "gymnasium>=1.4",
        "bokeh-sampledata==2026.1",
    ],
    extras_require={
        "flash": ["flash-attn>=2.8"],
        "study": ["skfolio>=1.12"],
        "dev": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "ruff>=0.12",
            "pyrefly>=1.5",
            "build>=1.2",
            "nbclient>=0.10",
            "nbformat>=5.10",
            "ipykernel>=6.29",
            "transformers>=5.0",
            "peft>=0.17",
            "empyrical-reloaded>=0.5.12",
            "stable-baselines3>=2.9",
            "sb3-contrib>=2.9",
        ],
    },
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
