"""What genfast is made of and what it needs. The versions that `make` installs: constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

# Read as text: importing genfast would need PyTorch, which is not there yet.
version = re.search(r'__version__ = "(.+)"', (HERE / "genfast/__init__.py").read_text()).group(1)

# What genfast's message names where one is absent: genfast/training/errors.py.
train = ["pillow>=10.1", "scikit-learn", "tqdm"]
log = ["tensorboard"]
evaluate = ["onnxruntime", "torch-fidelity"]
export = ["onnx", "onnxscript", "safetensors"]
# pytest-benchmark 5.2.3, the newest, fails with pytest 9.2: it reads an attribute that is gone.
benchmark = [*train, "matplotlib", "pytest<9.2", "pytest-benchmark"]
test = [*benchmark, *export, "mypy", "onnxruntime", "pytest-xdist", "ruff", "setuptools>=77"]

setup(
    name="genfast",
    version=version,
    description="Fast training of GANs and VAEs: fused Triton kernels in drop-in PyTorch modules",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.10,<3.14",
    install_requires=["torch>=2.11", 'triton>=3.6; sys_platform == "linux"', "numpy"],
    extras_require={
        "train": train,
        "log": log,
        "evaluate": evaluate,
        "export": export,
        "benchmark": benchmark,
        "test": test,
    },
    entry_points={"console_scripts": ["genfast = genfast.__main__:main"]},
    # `kernels/` installs as genfast.kernels: another package owns the name `kernels`.
    packages=["genfast.kernels", *find_packages(include=["genfast", "genfast.*"])],
    package_dir={"genfast.kernels": "kernels"},
    package_data={"genfast.launch": ["tuned.csv"]},
)
