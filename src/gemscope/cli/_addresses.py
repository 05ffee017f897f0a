"""The addresses a command was given."""

from collections.abc import Sequence

from gemscope.errors import InputError


def each_address(addresses: Sequence[str]) -> list[str]:
    """The addresses, each once, with patterns replaced by the catalog addresses they match."""
    from fnmatch import fnmatchcase

    from gemscope import hub

    found: list[str] = []
    for address in addresses:
        if "*" not in address:
            found.append(address)
            continue
        matching = [e.address for e in hub.catalog() if fnmatchcase(e.address, address)]
        if not matching:
            raise InputError(
                f"no address of the catalog matches {address}; gemscope list shows them"
            )
        found += matching
    return list(dict.fromkeys(found))


def feature_of(text: str) -> tuple[str, int]:
    """The address and the feature of `ADDRESS/INDEX`."""
    address, _, index = text.rpartition("/")
    if not address or not index.isdecimal() or len(index) > 9:
        raise InputError(
            f"{text!r} names no feature: write ADDRESS/INDEX, such as "
            "miniature/resid_post/layer_3_width_2k_l0_medium/17"
        )
    return address, int(index)
