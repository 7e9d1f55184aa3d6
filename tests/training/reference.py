"""What the engines must equal: the toys trained by plain torch, in one process, on whole batches."""

import math

import torch
import toys
from torch import nn


def learning_rate(step: int, steps: int, peak: float) -> float:
    return peak * (1 + math.cos(math.pi * step / steps)) / 2


def adamw(module: nn.Module, lr: float, betas: tuple[float, float], decay: float) -> torch.optim.Optimizer:
    matrices = [parameter for parameter in module.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in module.parameters() if parameter.ndim < 2]
    return torch.optim.AdamW([{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}],
                             lr=lr, betas=betas, eps=1e-8, fused=False, foreach=False)


def move(module: nn.Module, optimizer: torch.optim.Optimizer, loss: torch.Tensor, lr: float, clip: float) -> None:
    gradients = torch.autograd.grad(loss, list(module.parameters()), allow_unused=True)
    gradients = [torch.zeros_like(parameter) if gradient is None else gradient
                 for parameter, gradient in zip(module.parameters(), gradients, strict=True)]
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
    scale = min(1.0, clip / (norm + 1e-6))
    for parameter, gradient in zip(module.parameters(), gradients, strict=True):
        parameter.grad = gradient * scale
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()


def autocast(bf16: bool) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=bf16)


def single(steps: int, bf16: bool = False) -> dict[str, nn.Module]:
    net = toys.seeded(lambda: toys.Block())
    optimizer = adamw(net, 1e-2, (0.9, 0.95), 0.1)
    for step in range(steps):
        x = toys.global_batch(step)
        with autocast(bf16):
            loss = (net(x).float() - x.mean(dim=1, keepdim=True)).square().mean()
        move(net, optimizer, loss, learning_rate(step, steps, 1e-2), clip=1.0)
    return {"net": net}


def statistics_of_rank_0(steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """BatchNorm's running mean and variance of what the first of two ranks sees."""
    mean, variance = torch.zeros(6), torch.ones(6)
    for step in range(steps):
        x = toys.global_batch(step)[::2]
        mean, variance = 0.9 * mean + 0.1 * x.mean(dim=0), 0.9 * variance + 0.1 * x.var(dim=0)
    return mean, variance


def gan(steps: int, bf16: bool = False) -> dict[str, nn.Module]:
    g, d = toys.seeded(lambda: toys.Block(out=6)), toys.seeded(lambda: toys.Block(out=1))
    half = toys.seeded(lambda: nn.Linear(6, 6))
    g_optimizer, d_optimizer = adamw(g, 1e-2, (0.5, 0.9), 0.01), adamw(d, 1e-2, (0.5, 0.9), 0.01)
    for step in range(steps):
        x, lr = toys.global_batch(step), learning_rate(step, steps, 1e-2)
        with autocast(bf16):
            noise = half(x).detach()
            loss = (1 - d(x)).relu().mean() + (1 + d(g(noise).detach())).relu().mean()
        move(d, d_optimizer, loss, lr, clip=0.7)
        if step % 2 == 0:
            real = x.clone().requires_grad_(True)
            with autocast(bf16):
                (gradient,) = torch.autograd.grad(d(real).sum(), real, create_graph=True)
                penalty = gradient.square().sum(dim=1).mean()
            move(d, d_optimizer, penalty, lr, clip=0.7)
        with autocast(bf16):
            loss = -d(g(noise)).mean()
        move(g, g_optimizer, loss, lr, clip=0.7)
    return {"g": g, "d": d}
