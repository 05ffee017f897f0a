"""Features from addresses, with the maxima that somebody measured."""

from typing import TYPE_CHECKING

from safetensors import safe_open

from gemscope import hub, miniature
from gemscope.errors import InputError
from gemscope.hub import Given
from gemscope.sae import Dictionary

from ._parts import Feature, feature

if TYPE_CHECKING:
    from gemscope.features import Store


def maximum_of(address: str, index: int, store: "Store | None" = None) -> float | None:
    """The largest activation of a feature: as `store` has it, or the card of the bundled scope.

    None where nobody has measured it.
    """
    if store is not None:
        row = store.feature(address, index)
        return float(row["max"])
    with safe_open(miniature.MAXIMA, "np") as measured:
        if address not in measured.keys():  # noqa: SIM118
            return None
        return float(measured.get_tensor(address)[index])


def load_feature(
    name: str,
    *,
    store: "Store | None" = None,
    given: Given = Given(),
    known: dict[str, Dictionary] | None = None,
) -> Feature:
    """The feature `ADDRESS/INDEX`, with its maximum where somebody measured it.

    The dictionary is downloaded if it is not here, and of its weights only what the feature needs
    is read. Dictionaries already loaded may be in `known`, by address, where new ones are put.
    """
    known = {} if known is None else known
    address, index = hub.feature_of(name)
    if address not in known:
        entry = hub.obtain(hub.locate(address, given))
        known[address] = known.get(entry.address) or hub.build(entry)
    sae = known[address]
    if not 0 <= index < sae.d_sae:
        raise InputError(f"no feature {index}: {address} has 0 to {sae.d_sae - 1}")
    full = sae.origin.address or address
    highest = maximum_of(full, index, store)
    return feature(sae, index, maximum=highest, name=f"{full}/{index}")
