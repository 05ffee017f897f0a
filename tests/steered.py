"""What steering is checked with: hooks of our own on the plain model, and formulas in float64.

What a site held before an edit and what it held after are both noted, by hooks on the modules that
run before and after those of the package.
"""

from contextlib import contextmanager

import torch

from gemscope.sae import CrossLayer, JumpReLU
from gemscope.steering import Change, Mode, Steering, Strength, Unit

TEXTS = [
    "class Reader:\n    def __init__(self, path):\n        self.path = path  # the lines\n",
    "import os\nfor name in os.listdir('.'):\n    print(name)\n",
]
UNIT = 2.0**-24
"""The rounding of float32, relative."""
PLACES = {
    "resid_pre": ("", "input"),
    "resid_post": ("", "output"),
    "attn_heads": (".self_attn.o_proj", "input"),
    "mlp_in": (".pre_feedforward_layernorm", "output"),
    "mlp_out": (".post_feedforward_layernorm", "output"),
}
DICTIONARIES = {
    "residual": "miniature/resid_post_all/layer_3_width_384_l0_big",
    "heads": "miniature/attn_out_all/layer_2_width_128_l0_big",
    "mlp": "miniature/mlp_out_all/layer_4_width_128_l0_big",
    "transcoder": "miniature/transcoder_all/layer_2_width_192_l0_big",
    "affine transcoder": "miniature/transcoder_all/layer_2_width_192_l0_big_affine",
    "crosscoder": "miniature/crosscoder/layer_1_2_3_4_width_384_l0_medium",
    "cross-layer": "miniature/clt/width_384_l0_medium_affine",
}
STRENGTHS = {
    Mode.ADD: 3.0, Mode.SET: 5.0, Mode.SET_IF_ACTIVE: 5.0, Mode.FLOOR: 2.5, Mode.CAP: 0.1,
    Mode.MULTIPLY: 2.5, Mode.ABLATE: None, Mode.OFFSET_IF_ACTIVE: -1.5,
    Mode.ABLATE_DIRECTION: None, Mode.SCALE_DIRECTION: 0.3, Mode.SET_PROJECTION: 4.0,
    Mode.NORM_RELATIVE: 0.1, Mode.MAX_RELATIVE: 2.0,
}  # fmt: skip
NEUTRAL = {
    Mode.ADD: 0.0, Mode.MULTIPLY: 1.0, Mode.OFFSET_IF_ACTIVE: 0.0, Mode.SCALE_DIRECTION: 1.0,
    Mode.NORM_RELATIVE: 0.0, Mode.MAX_RELATIVE: 0.0, Mode.FLOOR: 0.0, Mode.CAP: 1e9,
}  # fmt: skip
ON_DIRECTIONS = {
    Mode.ADD, Mode.ABLATE_DIRECTION, Mode.SCALE_DIRECTION, Mode.SET_PROJECTION, Mode.NORM_RELATIVE,
}  # fmt: skip
assert set(STRENGTHS) == set(Mode) - {Mode.REPLACE}


@contextmanager
def noted(model, sites):
    """`(before, after)`: what each site held before all edits of it and after them, by site."""
    before, after, hooks = {}, {}, []

    def hook_all(seen):
        for site in sites:
            path, end = PLACES[site.stream]
            module = model.stack.get_submodule(f"layers.{site.layer}{path}")

            def note(value, site=site):
                seen[site] = (value[0] if isinstance(value, tuple) else value).clone()

            if end == "output":
                hooks.append(module.register_forward_hook(lambda m, a, out, n=note: n(out)))
            else:
                hooks.append(module.register_forward_pre_hook(lambda m, a, n=note: n(a)))

    # When the model is called, the package's hooks are in place: what is added then runs later.
    hook_all(before)
    hooks.append(model.hf.register_forward_pre_hook(lambda m, a: hook_all(after)))
    try:
        yield before, after
    finally:
        for hook in hooks:
            hook.remove()


def run(model, changes, sites=(), texts=TEXTS, **more):
    """`(before, after, logits)` of a steered run."""
    with noted(model, sites) as (before, after):
        edits = [Steering(changes)] if changes else []
        logits = model.run(list(texts), edits=edits, logits=True, **more).logits
    return before, after, logits


def bits(x):
    kinds = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float64: torch.int64}
    return x.contiguous().view(kinds[x.dtype])


def change(what, mode=Mode.ADD, value=None, unit=Unit.ABSOLUTE, **more):
    strength = None if value is None else Strength(value, unit)
    return Change(what=what, mode=mode, strength=strength, **more)


# One feature, by its formula


def encoder_of(sae, index):
    """Site, column, bias and threshold of a feature, in float64."""
    if isinstance(sae, CrossLayer):
        place = sae.layer_of(index)
        layer, own = sae.layers[place], index - sae.firsts[place]
        return (sae.reads[place], layer.w_enc[:, own].double(), layer.b_enc[own].double(),
                layer.threshold[own].double())  # fmt: skip
    theta = sae.activation.threshold[index] if isinstance(sae.activation, JumpReLU) else 0.0
    return sae.reads, sae.w_enc[:, index].double(), sae.b_enc[index].double(), float(theta)


def activation(sae, index, x):
    """A feature's activations on `x` `[..., d_in]`, their rounding error in float32, and where it
    is beyond doubt whether it fires; float64.
    """
    _, column, bias, theta = encoder_of(sae, index)
    pre = x.double() @ column + bias
    error = (len(column) + 2) * UNIT * (x.double().abs() @ column.abs() + bias.abs())
    theta = max(float(theta), 0.0)
    f = torch.where(pre > theta, pre, 0.0)
    return f, error, (pre - theta).abs() > error


def coefficient(mode, value, f, along, norm, top):
    """What the row (or, of modes about directions, the unit row) is multiplied by, one a token."""
    on = (f > 0).double()
    match mode:
        case Mode.ADD:
            return value
        case Mode.SET:
            return value - f
        case Mode.SET_IF_ACTIVE:
            return on * (value - f)
        case Mode.FLOOR:
            return f.clamp_min(0).maximum(value) - f
        case Mode.CAP:
            return f.minimum(value) - f
        case Mode.MULTIPLY:
            return (value - 1) * f
        case Mode.ABLATE:
            return -f
        case Mode.OFFSET_IF_ACTIVE:
            return on * value
        case Mode.MAX_RELATIVE:
            return value * top
        case Mode.ABLATE_DIRECTION:
            return -along
        case Mode.SCALE_DIRECTION:
            return (value - 1) * along
        case Mode.SET_PROJECTION:
            return value - along
        case Mode.NORM_RELATIVE:
            return value * norm
    raise AssertionError(mode)


ABOUT_DIRECTIONS = ON_DIRECTIONS - {Mode.ADD}


def expected(mode, value, unit, maximum, f, row, x, counted):
    """The formula's change of `x` `[batch, seq, d]`, and a bound of its rounding, both float64."""
    x, row = x.double(), row.double()
    direction = row / row.norm() if mode in ABOUT_DIRECTIONS else row
    along, norm = x @ (row / row.norm()), x.norm(dim=-1)
    top = torch.where(counted, f, 0.0).amax(1, keepdim=True).expand_as(f)
    value = torch.as_tensor(0.0 if value is None else value).double()
    value = value[:, None] if value.ndim else value
    # In units of the stream's length, what is added is that long, whatever the row's length is.
    length = norm if mode in ABOUT_DIRECTIONS else norm / row.norm()
    one = torch.ones_like(f)
    scales = {Unit.ABSOLUTE: one, Unit.NORM: length, Unit.CURRENT: f}
    value = value * (one * maximum if unit is Unit.MAX else scales[unit])
    c = torch.where(counted, coefficient(mode, value, f, along, norm, top), 0.0)
    return c[..., None] * direction, c, direction


def bound(mode, value, f_error, x, c, direction, after):
    """Of the sums that give the coefficient, of its product with the row, and of the sum with
    the stream.
    """
    factor = 1.0 if value is None else 2.0 + float(torch.as_tensor(value).abs().max())
    sums = (x.shape[-1] + 8) * UNIT * x.double().norm(dim=-1)
    error = factor * ((f_error if mode not in ABOUT_DIRECTIONS else 0) + sums)
    return (error + 8 * UNIT * c.abs())[..., None] * direction.abs() + 2 * UNIT * after.abs()


def lively(model, sae):
    """A feature that fires on some tokens of the texts and not on others, most evenly; of several
    layers, one that is not read in the last.
    """
    batch = model.tokens(TEXTS)
    x = model.run(batch, read=[sae.reads])[sae.reads][batch.counts].float()
    share = (sae.encode(x).dense() > 0).double().mean(0)
    if isinstance(sae, CrossLayer):
        share[sae.firsts[-2] :] = 0
    return int((share - 0.4).abs().argmin())
