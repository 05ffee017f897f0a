"""TransformerLens' names of sites: what other libraries' files call them."""

import re

from ._site import Site, Stream

_EMBED = "hook_embed"
# `blocks.N.hook_mlp_in` is not here: it is the residual stream before the norm there, and files
# that name it mean what comes after the norm.
_HOOKS = {
    Stream.RESID_PRE: "hook_resid_pre",
    Stream.RESID_MID: "hook_resid_mid",
    Stream.RESID_POST: "hook_resid_post",
    Stream.ATTN_HEADS: "attn.hook_z",
    Stream.ATTN_OUT: "hook_attn_out",
    Stream.MLP_IN: "mlp.hook_in",
    Stream.MLP_IN_UNSCALED: "ln2.hook_normalized",
    Stream.MLP_HIDDEN: "mlp.hook_post",
    Stream.MLP_OUT: "hook_mlp_out",
}


def site_of_transformer_lens(hook: str) -> Site | None:
    """The site that TransformerLens calls `hook`, such as `blocks.3.hook_resid_post`.

    None where the name is not one of those with a single meaning: `blocks.3.hook_mlp_in` is read
    before the norm by some and after it by others.
    """
    if hook == _EMBED:
        return Site(0, Stream.EMBED)
    match = re.fullmatch(r"blocks\.([0-9]{1,4})\.([\w.]+)", hook)
    if match is None:
        return None
    return next((Site(int(match[1]), s) for s, name in _HOOKS.items() if name == match[2]), None)


def transformer_lens_hook(site: Site) -> str:
    """`site` in TransformerLens' words, which `site_of_transformer_lens` reads back."""
    if site.stream is Stream.EMBED:
        return _EMBED
    return f"blocks.{site.layer}.{_HOOKS[site.stream]}"
