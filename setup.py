"""Installation of rs-consistency. Tool settings live in pyproject.toml, everything else here."""

from pathlib import Path

from setuptools import find_packages, setup

_NOTEBOOKS = ["ipykernel>=6.29,<8", "nbclient>=0.10,<0.12", "nbformat>=5.10,<6"]
_TORCH = ["torch>=2.6,<3"]
_DOCS = ["furo>=2024.8", "myst-parser>=4,<6", "sphinx>=8,<10"]

setup(
    name="rs-consistency",
    version="0.1.0",
    description="Certified robustness in JAX: consistency regularization and randomized smoothing",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    # `configs`, too: the commands read its files, and users' own import from it.
    packages=find_packages(include=["rs_consistency", "rs_consistency.*", "configs"]),
    package_data={"rs_consistency.data": ["embedded/*"], "rs_consistency.report": ["*.jinja"]},
    entry_points={
        "console_scripts": [
            "rs-train = rs_consistency.cli.start:train",
            "rs-certify = rs_consistency.cli.start:certify",
            "rs-analyze = rs_consistency.cli.start:analyze",
            "rs-export-torch = rs_consistency.cli.start:export_torch",
            "rs-reproduce = rs_consistency.cli.start:reproduce",
        ]
    },
    install_requires=[
        "absl-py>=2.1,<3",
        "array-record>=0.8,<0.9",
        "flax>=0.12,<0.13",
        "grain>=0.2.18,<0.3",
        # TFDS needs it to read array_record on Python 3.11 and does not ask for it.
        "importlib-resources>=6.4,<8",
        "jax>=0.10,<0.13",
        "jinja2>=3.1,<4",
        "matplotlib>=3.9,<4",
        "ml-collections>=1.0,<2",
        "numpy>=2.0,<3",
        "optax>=0.2.5,<0.3",
        "orbax-checkpoint>=0.12,<0.13",
        "pillow>=10,<14",
        "requests>=2.31,<3",
        "scipy>=1.15,<2",
        "tensorboardX>=2.6.2,<3",
        "tensorflow-datasets>=4.9.9,<5",
        "tqdm>=4.66,<5",
    ],
    extras_require={
        # Only to download and prepare datasets; reading a prepared array_record folder needs none of it.
        "prepare": ["tensorflow-cpu>=2.18,<3"],
        # To write checkpoints of PyTorch; reading them needs nothing.
        "torch": _TORCH,
        # What benchmarks/ compares with.
        "benchmarks": _TORCH,
        # To run notebooks/ outside Colab.
        "notebooks": _NOTEBOOKS,
        # To build docs/.
        "docs": _DOCS,
        "dev": [
            "hypothesis>=6.100,<7",
            "import-linter>=2.5,<3",
            "pytest>=8,<10",
            "pytest-xdist>=3.6,<4",
            "ruff>=0.14,<0.18",
            "tensorboard>=2.18,<3",
            *_NOTEBOOKS,
            *_DOCS,
        ],
    },
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
