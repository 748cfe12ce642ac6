"""From PyTorch tensors to started kernels: one file a family, as in `kernels/`."""
