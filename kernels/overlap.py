"""Programmatic dependent launch: a kernel gets ready while the one before it ends.

From sm_90 on, kernels that are launched so (see genfast/launch/start.py) may start before the one
before them has ended, and must not reach memory until then: what they read may not be written yet,
and what they write may still be read.
"""

import triton
import triton.language as tl


@triton.jit
def wait_for_previous():
    """The first statement of every kernel: the kernel before has ended and its memory is visible.

    Then the next kernel is let in, as early as that: it starts once each program of this one has
    come here, so it takes no place that one of these needs, several waves of them or not, and all
    it does there is wait in its turn. Let in before the wait, its next would follow, and programs
    that only wait would fill the multiprocessors; after the main loop, short kernels would not hide
    a launch, and a kernel's end would need a second call. On other GPUs there is nothing to do.
    """
    if tl.target_info.cuda_capability_geq(9, 0):
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


if triton.knobs.runtime.interpret:
    # Interpreted, every program would ask for the GPU that is not there.
    def wait_for_previous():
        """One program runs after the other: there is nothing to wait for."""
