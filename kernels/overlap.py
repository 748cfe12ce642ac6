"""Programmatic dependent launch: a kernel gets ready while the one before it ends.

From sm_90 on, kernels that are launched so (see genfast/launch/start.py) may start before the one
before them has ended, and must not reach memory until then: what they read may not be written yet,
and what they write may still be read.
"""

import triton
import triton.language as tl


@triton.jit
def wait_for_previous():
    """Wait until the kernel before has ended and its memory is visible; then let the next one in.

    The first statement of every kernel. The next one starts once every program of this one has come
    here, of several waves too: so it takes no place that these need, and only waits there. Let in
    before the wait, it would let in its own next, and programs that wait would fill the GPU; after
    the main loop, a short kernel would hide no start. Before sm_90 there is nothing to do.
    """
    if tl.target_info.cuda_capability_geq(9, 0):
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


if triton.knobs.runtime.interpret:
    # Interpreted, the call of a kernel's function takes 0.8 ms, and there would be one a program.
    def wait_for_previous():
        """One program runs after the other: there is nothing to wait for."""
