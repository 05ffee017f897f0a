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
