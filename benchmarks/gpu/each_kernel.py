"""Run every kernel on small, ragged tensors: python -m benchmarks.gpu.each_kernel.

Both operand loaders, a layer with few channels and one without a multiple of 16, statistics in two
groups, evaluation, group norm with and without a gate, joined images, updates, sampling and losses;
for tools that watch a GPU at work, and slow it down.
"""

import torch

from genfast import functional, losses, use_backend
from genfast.functional import importance_samples, reparameterize_with_kl
from genfast.geometry import ConvGeometry
from genfast.launch import adam, from_image
from genfast.nn import FusedSequential

# (transposed, c_in, c_out, input size, kernel, stride, padding), all with a batch of 6.
LAYERS = (
    (False, 64, 128, (16, 16), 4, 2, 1),
    (True, 128, 64, (8, 8), 4, 2, 1),
    (False, 3, 64, (16, 16), 4, 2, 1),
    (True, 64, 3, (8, 8), 4, 2, 1),
    (True, 100, 64, (1, 1), 4, 1, 0),
    (False, 64, 1, (4, 4), 4, 1, 0),
    (False, 37, 21, (9, 7), 3, 2, 1),
    (True, 21, 37, (5, 4), 3, 2, 1),
)


def main(device="cuda", layers=LAYERS, dtypes=(torch.bfloat16, torch.float32)):
    for dtype in dtypes:
        for transposed, c_in, c_out, size, kernel, stride, padding in layers:
            shape = (c_in, c_out) if transposed else (c_out, c_in)
            x = torch.randn(6, c_in, *size, device=device, dtype=dtype, requires_grad=True)
            weight = torch.randn(*shape, kernel, kernel, device=device, dtype=dtype)
            weight.requires_grad_()
            block = functional.conv_transpose_block if transposed else functional.conv_block
            mean, var = torch.zeros(c_out, device=device), torch.ones(c_out, device=device)
            counter = torch.tensor(0, device=device)
            for norm, activation in ((True, "leaky_relu"), (False, "tanh")):
                y = block(
                    x, weight, None, stride, padding, norm=norm, running_mean=mean,
                    running_var=var, num_batches_tracked=counter, activation=activation,
                    statistics_groups=2,
                )  # fmt: skip
                y.sum().backward()
            # Of the norm's own parameters alone, whose parts no other kernel adds up.
            gamma = torch.ones(c_out, device=device, requires_grad=True)
            block(
                x.detach(), weight.detach(), None, stride, padding, norm=True, norm_weight=gamma,
            ).sum().backward()  # fmt: skip
            with torch.no_grad():
                block(
                    x, weight, None, stride, padding, norm=True, running_mean=mean,
                    running_var=var, training=False, activation="relu",
                )  # fmt: skip
        images = torch.randn(6, 12, 5, 7, device=device, dtype=dtype, requires_grad=True)
        gamma = torch.ones(12, device=device, requires_grad=True)
        for activation in ("identity", "glu"):
            functional.norm_block(
                images, norm="group", norm_groups=3, norm_weight=gamma, activation=activation
            ).sum().backward()
        # Gradients of what lies beside images: where networks begin with them, and end in them.
        begins = torch.nn.Conv2d(3, 16, 4, 2, 1), torch.nn.Conv2d(16, 24, 4, 2, 1)
        ends = (
            torch.nn.ConvTranspose2d(3, 16, 4, 2, 1), torch.nn.BatchNorm2d(16), torch.nn.ReLU(),
            torch.nn.ConvTranspose2d(16, 3, 4, 2, 1),
        )  # fmt: skip
        images = torch.randn(6, 3, 4, 8, device=device, dtype=dtype)
        for network in (begins, ends):
            FusedSequential(*network).to(device, dtype)(images).sum().backward()
        mu, logvar = torch.randn(2, 5, 77, device=device, dtype=dtype)
        mu, logvar = mu.requires_grad_(), logvar.requires_grad_()
        z, kl = reparameterize_with_kl(mu, logvar)
        (z.sum() + kl.sum()).backward()
        z, kl = importance_samples(mu, logvar, 5)
        (z.sum() + kl.sum()).backward()
        logits = torch.randn(6, 999, device=device, dtype=dtype, requires_grad=True)
        loss = losses.discriminator_loss(logits)
        (
            loss + losses.reconstruction_loss(logits, logits.detach().sigmoid(), logits=True)
        ).backward()
        images = torch.randn(2, 6, 3, 16, 16, device=device, dtype=dtype)
        from_image.joined(*images, ConvGeometry.conv((16, 16), (4, 4), (2, 2), (1, 1)), dtype)
        p, m, v, gradient = torch.rand(4, 1024, device=device)
        counter = torch.ones((), device=device)
        weights = [adam.Weight(p, m, v, counter, gradient.to(dtype), None)]
        constants = dict(lr=1e-4, betas=(0.5, 0.9), eps=1e-8, weight_decay=0.0)
        adam.adam(adam.table(weights).to(device), weights, **constants)
    print("every kernel ran")


if __name__ == "__main__":
    with use_backend("triton"):
        main()
    torch.cuda.synchronize()
