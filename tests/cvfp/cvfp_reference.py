"""CVFP once more: one token at a time, NumPy float64, gradients derived by hand, no autograd.

Slow and plain on purpose. Layer k of `parameters` is (W, b, context gain, context bias, token
gain, token bias). Nothing here is taken from the library.
"""

import numpy as np

EPS = 1e-5


def parameters_of(block):
    return [
        [
            p.detach().double().numpy().copy()
            for p in (
                layer.linear.weight, layer.linear.bias, layer.context_norm.weight,
                layer.context_norm.bias, layer.token_norm.weight, layer.token_norm.bias,
            )
        ]
        for layer in block.stack
    ]


def norm(x, gain, bias, mix):
    mean = sum(x) / len(x)
    variance = sum((v - mean) ** 2 for v in x) / len(x)
    standard = (x - mean) / np.sqrt(variance + EPS)
    return (1 - mix) * x + mix * (standard * gain + bias), (standard, np.sqrt(variance + EPS))


def norm_backward(dy, cache, gain, mix):
    standard, deviation = cache
    d = mix * dy * gain
    dx = (d - d.mean() - standard * (d * standard).mean()) / deviation
    return (1 - mix) * dy + dx, mix * dy * standard, mix * dy


def forward(parameters, mix, context, token):
    """New context, token output, and what the backward pass needs."""
    caches, split = [], len(context)
    for w, b, cg, cb, tg, tb in parameters:
        x = np.concatenate([context, token])
        h = w @ x + b
        y = x + np.where(h > 0, h, 0.0)
        context, c_cache = norm(y[:split], cg, cb, mix)
        token, t_cache = norm(y[split:], tg, tb, mix)
        caches.append((x, h, c_cache, t_cache))
    return context, token, caches


def backward(parameters, mix, caches, d_context, d_token, grads):
    """Add the parameters' gradients for one token to `grads`; returns d(context input)."""
    split = len(d_context)
    for k in reversed(range(len(parameters))):
        w, _, cg, _, tg, _ = parameters[k]
        x, h, c_cache, t_cache = caches[k]
        dc, d_cg, d_cb = norm_backward(d_context, c_cache, cg, mix)
        dt, d_tg, d_tb = norm_backward(d_token, t_cache, tg, mix)
        dy = np.concatenate([dc, dt])
        dh = np.where(h > 0, dy, 0.0)
        for total, part in zip(
            grads[k], (np.outer(dh, x), dh, d_cg, d_cb, d_tg, d_tb), strict=True
        ):
            total += part
        dx = dy + w.T @ dh
        d_context, d_token = dx[:split], dx[split:]
    return d_context


def zeros_like(parameters):
    return [[np.zeros_like(p) for p in layer] for layer in parameters]


def rollout(parameters, mix, tokens, start):
    contexts, context = [], start
    for token in tokens:
        context, _, _ = forward(parameters, mix, context, token)
        contexts.append(context)
    return np.array(contexts)


class Adam:
    """Kingma and Ba's algorithm 1 after clipping to a total norm."""

    def __init__(self, parameters, rate, clip):
        self.m, self.v, self.t = zeros_like(parameters), zeros_like(parameters), 0
        self.rate, self.clip = rate, clip

    def step(self, parameters, grads):
        self.t += 1
        total = np.sqrt(sum((g**2).sum() for layer in grads for g in layer))
        scale = min(1.0, self.clip / (total + 1e-6))
        for p, g, m, v in zip(parameters, grads, self.m, self.v, strict=True):
            for i in range(len(p)):
                clipped = g[i] * scale
                m[i] = 0.9 * m[i] + 0.1 * clipped
                v[i] = 0.999 * v[i] + 0.001 * clipped**2
                first, second = m[i] / (1 - 0.9**self.t), v[i] / (1 - 0.999**self.t)
                p[i] -= self.rate * first / (np.sqrt(second) + 1e-8)


def parallel_loss(contexts, previous, w):
    """(loss, CVFP, diversity) and d loss / d contexts."""
    n, d = contexts.shape
    cvfp = sum(((c - p) ** 2).sum() for c, p in zip(contexts, previous, strict=True)) / (n * d)
    deviation = contexts - sum(contexts) / n
    length = np.sqrt((deviation**2).sum())
    grad = (1 - w) * 2 * (contexts - previous) / (n * d) - w * deviation / length / n
    return ((1 - w) * cvfp - w * length / n, cvfp, -length / n), grad


def token_loss(context, previous, mean, w):
    cvfp = ((context - previous) ** 2).mean()
    length = np.sqrt(((context - mean) ** 2).sum())
    grad = (1 - w) * 2 * (context - previous) / len(context) - w * (context - mean) / length
    return ((1 - w) * cvfp - w * length, cvfp, -length), grad


def parallel_step(parameters, mix, tokens, previous, w, adam):
    """One iteration of the parallel variant; changes `parameters`."""
    outputs = [
        forward(parameters, mix, previous[i - 1], token)  # i = 0 takes the last one
        for i, token in enumerate(tokens)
    ]
    contexts = np.array([context for context, _, _ in outputs])
    losses, grad = parallel_loss(contexts, previous, w)
    grads = zeros_like(parameters)
    for (_, token, caches), d in zip(outputs, grad, strict=True):
        backward(parameters, mix, caches, d, np.zeros_like(token), grads)
    adam.step(parameters, grads)
    return contexts, losses


def true_pass_step(parameters, mix, tokens, previous, w, adam):
    """One reading with frozen weights, then one step; changes `parameters`."""
    context, outputs = previous[-1], []
    for token in tokens:
        outputs.append(forward(parameters, mix, context, token))
        context = outputs[-1][0]
    contexts = np.array([context for context, _, _ in outputs])
    losses, grad = parallel_loss(contexts, previous, w)
    grads = zeros_like(parameters)
    for (_, token, caches), d in zip(outputs, grad, strict=True):
        backward(parameters, mix, caches, d, np.zeros_like(token), grads)  # d(before) is dropped
    adam.step(parameters, grads)
    return contexts, losses


def sequential_iteration(parameters, mix, tokens, previous, w, adam, mean, decay):
    """One iteration of the sequential variant; changes `parameters`; returns the new mean too."""
    context, contexts, losses = previous[-1], [], []
    for token, target in zip(tokens, previous, strict=True):
        context, out, caches = forward(parameters, mix, context, token)
        loss, grad = token_loss(context, target, mean, w)
        grads = zeros_like(parameters)
        backward(parameters, mix, caches, grad, np.zeros_like(out), grads)
        adam.step(parameters, grads)
        mean = decay * mean + (1 - decay) * context
        contexts.append(context)
        losses.append(loss)
    return np.array(contexts), np.mean(losses, axis=0), mean


def phase2_gradients(parameters, mix, head, bias, fixed, tokens, ids, version, context_weight):
    """Loss and gradients of (block, head weight, head bias) of the mean over n - 1 predictions."""
    n, split = len(ids) - 1, fixed.shape[1]
    grads, d_head, d_bias, total = (
        zeros_like(parameters), np.zeros_like(head), np.zeros_like(bias), 0.0
    )
    for i in range(n):
        before = fixed[i - 1] if i else np.zeros(split)
        context, token, caches = forward(parameters, mix, before, tokens[i])
        read = np.concatenate([fixed[i] if version == "v2.0" else context, token])
        logits = head @ read + bias
        p = np.exp(logits - logits.max())
        p /= p.sum()
        total += -np.log(p[ids[i + 1]]) / n
        p[ids[i + 1]] -= 1
        d_read = head.T @ p / n
        d_head += np.outer(p, read) / n
        d_bias += p / n
        d_context = np.zeros(split)
        if version == "v1.0":
            total += context_weight * ((context - fixed[i]) ** 2).mean() / n
            d_context = d_read[:split] + context_weight * 2 * (context - fixed[i]) / (split * n)
        backward(parameters, mix, caches, d_context, d_read[split:], grads)
    return total, grads, d_head, d_bias
