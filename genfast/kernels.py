"""Lets `genfast.kernels` be imported from a checkout, where the kernels lie in `../kernels`.

An installed genfast contains that folder as `genfast/kernels/`, which Python prefers to this file.
"""

from pathlib import Path

# A module that has a `__path__` is a package: its submodules are looked for there.
__path__ = [str(Path(__file__).resolve().parents[1] / "kernels")]
