"""Training losses in float64, dense and plain, with autograd: what the steps must equal.

Straight from the papers: rectangle windows for thresholds (2407.14435), quadratic L0 and frequency
penalties, nested prefixes, the auxiliary loss of 2406.04093. Nothing is shared with the package.
"""

import torch


class _Jump(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, theta, bandwidth):
        ctx.save_for_backward(z, theta)
        ctx.bandwidth = bandwidth
        fires = ((z > theta) & (z > 0)).to(z.dtype)
        return z * fires, fires

    @staticmethod
    def backward(ctx, of_f, of_fires):
        z, theta = ctx.saved_tensors
        eps = ctx.bandwidth
        near = ((z - theta).abs() < eps / 2) & (z > 0)
        fires = (z > theta) & (z > 0)
        dtheta = -((theta * of_f + of_fires) * near).sum(0) / eps
        return of_f * fires, dtheta, None


def largest(z, k, whole_batch):
    if whole_batch:
        chosen = z.reshape(-1).topk(k * len(z)).indices
        mask = torch.zeros(z.numel(), dtype=torch.bool)
        mask[chosen] = True
        return mask.reshape(z.shape) & (z > 0)
    return torch.zeros_like(z, dtype=torch.bool).scatter_(1, z.topk(k).indices, True) & (z > 0)


def gradients(config, weights, xs, y, *, step=0, aim=None, dead=None):
    """Gradients by name, and the loss, of `config` at `weights` on normalised `xs` and `y`."""
    p = {n: v.double().clone().requires_grad_() for n, v in weights.named().items()}
    n_layers, n = len(xs), len(y)
    d = y.shape[1] // n_layers
    xs, y = [x.double() for x in xs], y.double()
    s, a = config.sparsity, config
    features, fires, zs = [], [], []
    for i, x in enumerate(xs):
        centred = x - p["b_dec"][i * d : (i + 1) * d] if weights.pre_bias else x
        z = centred @ p[f"w_enc.{i}"].T + p[f"b_enc.{i}"]
        zs.append(z)
        if a.activation == "jumprelu":
            f, on = _Jump.apply(z, p[f"threshold.{i}"], s.bandwidth)
        elif a.activation == "relu":
            f, on = z.relu(), (z > 0).double()
        else:
            mask = largest(z.detach(), int(a.l0), a.activation == "batch-topk")
            f, on = z * mask, mask.double()
        features.append(f)
        fires.append(on)
    loss = 0
    for size, weight in a.levels:
        made = p["b_dec"].expand(n, -1)
        for i, f in enumerate(features):
            some = f if n_layers > 1 else f[:, :size]
            rows = p[f"w_dec.{i}"] if n_layers > 1 else p["w_dec.0"][:size]
            made = made + torch.nn.functional.pad(some @ rows, (i * d, 0))
            if a.affine:
                made = made + torch.nn.functional.pad(
                    xs[i] @ p[f"skip.{i}"], (i * d, (n_layers - 1 - i) * d)
                )
        missed = y - made
        loss = loss + weight * missed.square().sum(1).mean()
    warm = min(1.0, (step + 1) / max(s.warm_up, 1))
    on = torch.cat(fires, 1)
    if a.activation == "jumprelu":
        if s.penalty == "quadratic":
            over = on.sum(1) - (a.l0 if aim is None else aim)
            loss = loss + warm * s.coefficient * (2 / a.l0) * over.square().mean()
        elif s.penalty == "linear":
            loss = loss + warm * s.coefficient * on.sum(1).mean()
        loss = loss + warm * s.frequency * (on.mean(0).square() / s.frequency_scale).sum()
    elif s.penalty == "l1":
        loss = loss + warm * s.coefficient * torch.cat(features, 1).sum(1).mean()
    if dead is not None:
        z = zs[0][:, dead]
        mask = largest(z.detach(), min(a.auxk.features, len(dead)), False)
        left = missed.detach()
        again = (z * mask) @ p["w_dec.0"][dead]
        loss = loss + a.auxk.coefficient * (again - left).square().sum() / left.square().sum()
    loss.backward()
    grads = {n: v.grad if v.grad is not None else torch.zeros_like(v) for n, v in p.items()}
    for i in range(n_layers):  # what only lengthens a unit row is left out
        g, w = grads[f"w_dec.{i}"], p[f"w_dec.{i}"].detach()
        grads[f"w_dec.{i}"] = g - (g * w).sum(1, keepdim=True) * w
    return grads, float(loss.detach())
