"""The training steps of the published code in float64 PyTorch, each written once, one batch at a time.

Images are `[B, H, W, C]`, noise `[M, B, H, W, C]`, logits `[M, B, K]`. A step gets a network, a batch and a
configuration of this library. It returns the loss, whose gradient is autograd's.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F


class Batch(NamedTuple):
    """A batch in float64, with every draw that a step needs."""

    images: torch.Tensor
    labels: torch.Tensor
    noise: torch.Tensor
    epoch: int
    shares: torch.Tensor  # [B], uniform in [0, 1/2]: the share of the adversarial image in SmoothMix
    uniforms: torch.Tensor  # [B, M], uniform in [0, 1]: a copy counts in CAT-RS where it is below the confidence
    smoothed: torch.Tensor  # [B, K], the predictions of CAT-RS's teacher


class Step(NamedTuple):
    """The loss of a batch, and for which examples or copies the step has a second case."""

    loss: torch.Tensor
    counted: torch.Tensor | None = None


class Network:
    """A network with the variables of a flax model, under their names and in their layout.

    `seen` holds the images of every call in training mode.
    """

    def __init__(self, variables):
        self.weights = {
            name: torch.tensor(value, requires_grad=True) for name, value in named(variables["params"]).items()
        }
        self.statistics = {name: torch.tensor(value) for name, value in named(variables.get("batch_stats", {})).items()}
        self.seen = []

    def __call__(self, images, *, train):
        if train:
            self.seen.append(images.detach())
        return self.forward(images.permute(0, 3, 1, 2), train)

    def conv(self, x, name, **settings):
        kernel = self.weights[f"{name}/kernel"].permute(3, 2, 0, 1)  # [kh, kw, C, F] -> [F, C, kh, kw]
        return F.conv2d(x, kernel, self.weights.get(f"{name}/bias"), **settings)

    def dense(self, x, name):
        return x @ self.weights[f"{name}/kernel"] + self.weights[f"{name}/bias"]

    def norm(self, x, name, train):
        """Batch normalization. The running variance is that of the batch itself, not PyTorch's n / (n - 1) of it."""
        mean, var = self.statistics[f"{name}/mean"], self.statistics[f"{name}/var"]
        affine = self.weights[f"{name}/scale"], self.weights[f"{name}/bias"]
        if not train:
            return F.batch_norm(x, mean, var, *affine, eps=1e-5)
        flat = x.detach().transpose(0, 1).flatten(1)
        self.statistics[f"{name}/mean"] = 0.9 * mean + 0.1 * flat.mean(1)
        self.statistics[f"{name}/var"] = 0.9 * var + 0.1 * flat.var(1, correction=0)
        return F.batch_norm(x, None, None, *affine, training=True, eps=1e-5)


class LeNet(Network):
    """LeNet, which has no layer that differs in training."""

    def forward(self, x, train):
        for name in ("Conv_0", "Conv_1"):
            x = F.max_pool2d(F.relu(self.conv(x, name)), 2)
        x = x.permute(0, 2, 3, 1).flatten(1)  # flax flattens [H, W, C]
        return self.dense(F.relu(self.dense(x, "Dense_0")), "Dense_1")


class Normalized(Network):
    """The model of tests/training/normalized.py: two convolutions with batch normalization."""

    def forward(self, x, train):
        for number in (1, 2):
            x = self.conv(x, f"conv{number}", stride=2, padding=1)
            x = F.relu(self.norm(x, f"bn{number}", train))
        return self.dense(x.mean((2, 3)), "fc")


def named(tree, prefix=""):
    """Return the leaves of nested dictionaries in float64, named as `Conv_0/kernel`."""
    leaves = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        leaves |= named(value, f"{name}/") if hasattr(value, "items") else {name: np.asarray(value, np.float64)}
    return leaves


def copies(network, images, noise, *, train):
    """Return the logits of all copies, which batch norm sees as one batch."""
    return torch.stack(network(torch.cat([images + draw for draw in noise]), train=train).chunk(len(noise)))


def cross_entropy(logits, labels):
    return F.cross_entropy(logits.flatten(0, 1), labels.repeat(len(logits)))


def divergences(target, logits):
    """Return KL(target || F_i), `[M, B]`."""
    return torch.stack([F.kl_div(copy, target, reduction="none").sum(1) for copy in F.log_softmax(logits, dim=-1)])


def norms(x):
    return x.flatten(1).norm(dim=1)[:, None, None, None]


def into_ball(x, center, radius):
    return center + (x - center).renorm(2, 0, radius)


def adversarial_gradient(network, images, labels, noise, reduction="mean"):
    """Return the gradient of -log of the mean softmax, clipped at 1e-20 if there are copies, in inference mode."""
    images = images.detach().requires_grad_()
    logits = copies(network, images, noise, train=False)
    if len(noise) == 1:
        loss = F.cross_entropy(logits[0], labels, reduction=reduction)
    else:
        loss = F.nll_loss(F.softmax(logits, dim=-1).mean(0).clamp(min=1e-20).log(), labels, reduction=reduction)
    return torch.autograd.grad(loss, images)[0]


def consistency(logits, settings):
    probs = F.softmax(logits, dim=-1)
    mean = probs.mean(0)
    divergence = divergences(mean, logits)
    entropy = -(mean * mean.clamp(min=1e-20).log()).sum(1)
    value = {
        "default": settings.lbd * divergence.mean(0) + settings.eta * entropy,
        "xent": settings.lbd * (divergence.mean(0) + entropy),
        "kl": settings.lbd * divergence.mean(0),
        "mse": settings.lbd * (probs[1] - probs[0]).square().sum(1),
    }
    return value[settings.form].mean()


def gaussian(network, batch, config):
    logits = copies(network, batch.images, batch.noise, train=True)
    loss = cross_entropy(logits, batch.labels)
    return Step(loss + consistency(logits, config.consistency) if config.consistency.lbd else loss)


def stability(network, batch, config):
    clean = network(batch.images, train=True)
    noisy = copies(network, batch.images, batch.noise, train=True)[0]
    agreement = -(F.softmax(clean, dim=1) * F.log_softmax(noisy, dim=1)).sum(1).mean()
    return Step(F.cross_entropy(clean, batch.labels) + config.stability.lbd * agreement)


def smoothadv(network, batch, config, clip_first=True):
    """Salman et al.: exactly normalized gradients, clipping, then projection."""
    epsilon = min(1, (batch.epoch + 1) / config.smoothadv.warmup_epochs) * config.smoothadv.epsilon
    attacked = batch.images
    for _ in range(config.smoothadv.num_steps):
        gradient = adversarial_gradient(network, attacked, batch.labels, batch.noise)
        attacked = attacked + 2 * epsilon / config.smoothadv.num_steps * gradient / norms(gradient)
        if clip_first:
            attacked = into_ball(attacked.clamp(0, 1), batch.images, epsilon)
        else:
            attacked = into_ball(attacked, batch.images, epsilon).clamp(0, 1)
    loss = cross_entropy(copies(network, attacked, batch.noise, train=True), batch.labels)
    return Step(loss)


def smoothadv_consistency(network, batch, config):
    """Jeong and Shin: normalized gradients, projection, then clipping; with the consistency term."""
    epsilon = min(1, (batch.epoch + 1) / config.smoothadv.warmup_epochs) * config.smoothadv.epsilon
    attacked = batch.images
    for _ in range(config.smoothadv.num_steps):
        gradient = adversarial_gradient(network, attacked, batch.labels, batch.noise)
        attacked = attacked + 2 * epsilon / config.smoothadv.num_steps * gradient / (norms(gradient) + 1e-8)
        attacked = into_ball(attacked, batch.images, epsilon).clamp(0, 1)
    logits = copies(network, attacked, batch.noise, train=True)
    return Step(cross_entropy(logits, batch.labels) + consistency(logits, config.consistency))


def macer(network, batch, config):
    settings, normal = config.macer, torch.distributions.Normal(0.0, 1.0)
    logits = copies(network, batch.images, batch.noise, train=True)
    classification = F.nll_loss((F.softmax(logits, dim=-1).mean(0) + 1e-10).log(), batch.labels)
    if settings.deferred and batch.epoch <= config.optimizer.lr_step_size:
        return Step(classification)
    (first, second), classes = (top.T for top in F.softmax(settings.beta * logits, dim=-1).mean(0).topk(2))
    gap = (normal.icdf(first) - normal.icdf(second)).detach()
    counted = (classes[0] == batch.labels) & gap.isfinite() & (gap <= settings.gamma)
    hinge = settings.gamma - (normal.icdf(first[counted]) - normal.icdf(second[counted]))
    return Step(classification + settings.lbd * config.sigma / 2 * hinge.sum() / len(batch.labels), counted=counted)


def smoothmix(network, batch, config):
    settings = config.smoothmix
    weight = min(1, (batch.epoch + 1) / settings.warmup_epochs)
    iterates = [batch.images]
    for _ in range(settings.num_steps):
        gradient = adversarial_gradient(network, iterates[-1], batch.labels, batch.noise, reduction="sum")
        iterates.append((iterates[-1] + settings.step_size * gradient / (norms(gradient) + 1e-8)).clamp(0, 1))
    clean, adversarial = iterates[settings.clean_step], iterates[-1]
    near = into_ball(clean, batch.images, settings.step_size * settings.clean_step * weight).clamp(0, 1)

    logits = copies(network, near, batch.noise, train=True)
    mean = F.softmax(logits, dim=-1).mean(0)
    along = batch.shares[:, None, None, None]
    mixed = (1 - along) * near + along * adversarial
    target = (1 - batch.shares)[:, None] * mean + batch.shares[:, None] / mean.shape[1]
    divergence = divergences(target, copies(network, mixed, batch.noise, train=True))
    right = mean.argmax(1) == batch.labels
    mixup = settings.eta * weight * (right * divergence).mean()
    return Step(cross_entropy(logits, batch.labels) + mixup, right)


def catrs(network, batch, config, standardize_last=False):
    """Jeong, Kim, Shin. With `standardize_last` the noise is standardized once, after the last step of the attack."""
    settings, num_noise = config.catrs, len(batch.noise)
    logits = copies(network, batch.images, batch.noise, train=True)
    entropies = torch.stack([F.cross_entropy(copy, batch.labels, reduction="none") for copy in logits], dim=1)
    confidence = (logits.argmax(-1) == batch.labels).double().mean(0)
    accepted = (batch.uniforms < confidence[:, None]).sum(1).clamp(min=1)
    low = (entropies.sort(dim=1)[0] * (torch.arange(num_noise) < accepted[:, None])).mean(1)

    start = batch.noise.flatten(0, 1)
    mean, size = start.mean((1, 2, 3), keepdim=True), start.square().mean((1, 2, 3), keepdim=True).sqrt()

    def standardized(noise):
        now = noise.square().mean((1, 2, 3), keepdim=True).sqrt()
        return mean + (noise - noise.mean((1, 2, 3), keepdim=True)) / now * size

    noise = start
    for _ in range(settings.num_steps):
        noise = noise.detach().requires_grad_()
        logits_now = copies(network, batch.images, noise.unflatten(0, batch.noise.shape[:2]), train=False)
        (gradient,) = torch.autograd.grad(divergences(batch.smoothed, logits_now).mean(0).sum(), noise)
        noise = noise.detach() + 2 * settings.epsilon / settings.num_steps * gradient / (norms(gradient) + 1e-8)
        noise = into_ball(noise, start, settings.epsilon)
        if not standardize_last:
            noise = standardized(noise)
    if standardize_last:
        noise = standardized(noise)
    noise = noise.unflatten(0, batch.noise.shape[:2])

    divergence = divergences(batch.smoothed, copies(network, batch.images, noise, train=True))
    high = settings.lbd * divergence.max(0)[0] * (accepted == num_noise)
    return Step((low + high).mean(), accepted == num_noise)


def sun(network, batch, config):
    """Sun et al.: each copy moves on the sphere of its noise until it is misclassified."""
    shape, settings = batch.noise.shape[:2], config.sun
    start, labels = batch.noise.flatten(0, 1), batch.labels.repeat(shape[0])
    noise, found = start, torch.zeros(len(start), dtype=torch.bool)
    for _ in range(settings.num_steps):
        noise = noise.detach().requires_grad_()
        logits = copies(network, batch.images, noise.unflatten(0, shape), train=False).flatten(0, 1)
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum") / shape[0], noise)
        found = found | (logits.argmax(1) != labels)
        moved = noise.detach() + settings.epsilon * gradient / (norms(gradient) + 1e-8)
        moved = moved / (norms(moved) + 1e-8) * norms(start)
        noise = torch.where(found[:, None, None, None], noise.detach(), moved)
    logits = copies(network, batch.images, noise.unflatten(0, shape), train=True)
    return Step(cross_entropy(logits, batch.labels), found)
