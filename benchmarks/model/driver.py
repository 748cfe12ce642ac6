"""Compiling for a GPU that is not here."""

from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class AbsentDriver(DriverBase):
    """Says which GPU to compile for, and can start nothing."""

    def __init__(self, architecture):
        self.architecture = architecture

    @classmethod
    def is_active(cls):
        return True

    def get_current_target(self):
        return TARGETS[self.architecture]

    def get_current_device(self):
        return self.architecture

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        raise NotImplementedError

    def get_benchmarker(self):
        raise NotImplementedError

    def map_python_to_cpp_type(self, ty):
        raise NotImplementedError
