"""The training steps of the published code, rewritten in eager PyTorch: the rival of the training benchmark.

Images are `[B, C, H, W]`, noise `[M, B, C, H, W]`; every loss is a mean over the examples.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

# (model, images, labels, noise) -> loss
Loss = Callable[[nn.Module, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _copies(model: nn.Module, images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Return logits `[M, B, K]`, in one forward pass."""
    logits = model((images + noise).flatten(0, 1))
    return logits.unflatten(0, noise.shape[:2])


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.repeat(len(logits)))


def gaussian(config: Any) -> Loss:
    """Return the loss of Gaussian augmentation, with the consistency term if its weight is positive."""
    lbd, eta = config.consistency.lbd, config.consistency.eta

    def loss(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        logits = _copies(model, images, noise)
        total = _cross_entropy(logits, labels)
        if lbd > 0:
            log_probs = F.log_softmax(logits, dim=-1)
            mean = log_probs.exp().mean(0)
            log_mean = mean.clamp(min=1e-20).log()
            kl = (mean * (log_mean - log_probs)).sum(-1).mean()
            total = total + lbd * kl - eta * (mean * log_mean).sum(-1).mean()
        return total

    return loss


def smoothadv(config: Any) -> Loss:
    """Return the loss of SmoothAdv: PGD attacks the images with the same noise, with frozen parameters."""
    epsilon, num_steps = config.smoothadv.epsilon, config.smoothadv.num_steps

    def attack(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        attacked = images.clone()
        for _ in range(num_steps):
            attacked.requires_grad_()
            mean = F.softmax(_copies(model, attacked, noise), dim=-1).mean(0)
            objective = F.nll_loss(mean.clamp(min=1e-20).log(), labels, reduction="sum")
            (gradient,) = torch.autograd.grad(objective, attacked)
            norm = gradient.flatten(1).norm(dim=1)[:, None, None, None]
            direction = torch.where(norm > 0, gradient / norm, torch.randn_like(gradient))
            stepped = (attacked.detach() + 2 * epsilon / num_steps * direction).clamp(0, 1)
            attacked = images + (stepped - images).renorm(2, 0, epsilon)
        return attacked

    def loss(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        model.requires_grad_(False).eval()
        attacked = attack(model, images, labels, noise)
        model.requires_grad_(True).train()
        return _cross_entropy(_copies(model, attacked, noise), labels)

    return loss


def macer(config: Any) -> Loss:
    """Return the loss of MACER: the error of the smoothed classifier and the hinge on its certified radius."""
    settings, sigma = config.macer, config.sigma
    normal = torch.distributions.Normal(0.0, 1.0)

    def loss(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        logits = _copies(model, images, noise)
        classification = F.nll_loss((F.softmax(logits, dim=-1).mean(0) + 1e-10).log(), labels)
        top, classes = F.softmax(settings.beta * logits, dim=-1).mean(0).topk(2)
        right = classes[:, 0] == labels
        with torch.no_grad():
            gap = normal.icdf(top[:, 0]) - normal.icdf(top[:, 1])
            counted = right & gap.isfinite() & (gap <= settings.gamma)
        counted_top = top[counted]
        gaps = normal.icdf(counted_top[:, 0]) - normal.icdf(counted_top[:, 1])
        robustness = sigma / 2 * (settings.gamma - gaps).sum() / len(labels)
        return classification + settings.lbd * robustness

    return loss


LOSSES = {"gaussian": gaussian, "smoothadv": smoothadv, "macer": macer}


class Trainer:
    """Steps of SGD on examples that stay on the device."""

    steps_per_call = 1

    def __init__(self, config: Any, model: nn.Module, images: torch.Tensor, labels: torch.Tensor, device: str) -> None:
        """Take images `[N, C, H, W]` in [0, 1] and labels `[N]`."""
        self._model, self._loss, self._device = model.to(device).train(), LOSSES[config.method](config), device
        self._images, self._labels = images.to(device), labels.to(device)
        self._config, self._size = config, config.batch_size // config.num_noise
        self._optimizer = torch.optim.SGD(
            model.parameters(),
            lr=config.optimizer.lr,
            momentum=config.optimizer.momentum,
            weight_decay=config.optimizer.weight_decay,
        )
        self._order = torch.randperm(len(images))
        self._next = 0

    def step(self) -> float:
        """Take a step and return its loss on the host: the published loop averages it there."""
        chosen = self._order[self._next : self._next + self._size]
        self._next = (self._next + self._size) % (len(self._order) - self._size + 1)
        images, labels = self._images[chosen], self._labels[chosen]
        noise = torch.randn((self._config.num_noise, *images.shape), device=self._device) * self._config.sigma
        loss = self.gradients(images, labels, noise)
        self._optimizer.step()
        return loss

    def wait(self) -> None:
        """Do nothing: `step` has waited for the loss."""

    def gradient_norm(self) -> float:
        """Return the norm of the gradient that `gradients` left."""
        return math.sqrt(sum(float(p.grad.double().square().sum()) for p in self._model.parameters()))

    def gradients(self, images: torch.Tensor, labels: torch.Tensor, noise: torch.Tensor) -> float:
        """Return the loss, and leave its gradient in the parameters."""
        self._optimizer.zero_grad()
        loss = self._loss(self._model, images, labels, noise)
        loss.backward()
        if not math.isfinite(loss.item()):
            raise FloatingPointError("the rival's loss is not finite")
        return loss.item()
