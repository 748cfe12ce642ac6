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
# The frameworks of docs/lightning.md: genfast needs neither, its page and tests/test_docs.py do.
docs = ["accelerate", "lightning"]
test = [
    *benchmark,
    *docs,
    *export,
    "mypy",
    "onnxruntime",
    "pytest-xdist",
    "ruff",
    "setuptools>=77",
]


def description() -> str:
    """The README for a package index, where its relative links and its picture lead nowhere.

    No address of the repository is known that they could be made absolute with. So a link becomes
    its words and the path, which the sdist has, and the picture is left out.
    """
    text = (HERE / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"^!\[[^]]*\]\([^)]*\)\n\n", "", text, flags=re.M)
    return re.sub(r"\[([^]]+)\]\((?!https?:)([^)#]+)[^)]*\)", r"\1 (`\2`)", text)


setup(
    name="genfast",
    version=version,
    description="Fast training of GANs and VAEs: fused Triton kernels in drop-in PyTorch modules",
    long_description=description(),
    long_description_content_type="text/markdown",
    python_requires=">=3.10,<3.14",
    install_requires=["torch>=2.11", 'triton>=3.6; sys_platform == "linux"', "numpy"],
    extras_require={
        "train": train,
        "log": log,
        "evaluate": evaluate,
        "export": export,
        "benchmark": benchmark,
        "docs": docs,
        "test": test,
    },
    entry_points={"console_scripts": ["genfast = genfast.__main__:main"]},
    # `kernels/` installs as genfast.kernels: another package owns the name `kernels`.
    packages=["genfast.kernels", *find_packages(include=["genfast", "genfast.*"])],
    package_dir={"genfast.kernels": "kernels"},
    package_data={"genfast.launch": ["tuned.csv"]},
)
