"""How a person names one feature of an artefact."""

from gemscope.errors import InputError


def feature_of(text: str) -> tuple[str, int]:
    """The address and the number of `ADDRESS/INDEX`."""
    address, _, index = text.rpartition("/")
    if not address or not index.isdecimal() or len(index) > 9:
        raise InputError(
            f"{text!r} names no feature: write ADDRESS/INDEX, such as "
            "miniature/resid_post/layer_3_width_2k_l0_medium/17"
        )
    return address, int(index)
