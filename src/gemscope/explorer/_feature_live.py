"""One feature on a text that a reader types: nothing but its own column is computed."""

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from gemscope.errors import InputError
from gemscope.features import token_pieces
from gemscope.steering import feature

from ._workbench import Workbench

if TYPE_CHECKING:
    from gemscope.steering import Feature

_KEPT = 64
"""Features whose columns stay at hand."""


class Live:
    """Runs texts for the pages of features. Its methods are for the model's thread."""

    def __init__(self, bench: Workbench):
        self._bench = bench
        self._parts: OrderedDict[tuple[str, int], Feature] = OrderedDict()

    def read(self, address: str, index: int, text: str, maximum: float) -> dict[str, Any]:
        """`{tokens, values, max, fires, maximum}`: the feature's activation on each token of
        `text`, BOS left out; `maximum` is that of the store, which gives colours their scale.
        """
        import torch

        part, model = self._part(address, index), self._bench.model_of([address])
        with torch.no_grad():
            batch = model.tokens(text)
            ids = batch.ids[0].tolist()
            begin = int(ids[0] == model.tokenizer.bos_token_id)
            if len(ids) - begin > self._bench.limits.tokens:
                raise InputError(
                    f"the text has {len(ids) - begin:,} tokens, and "
                    f"{self._bench.limits.tokens:,} are read at once; cut it"
                )
            run = model.run(batch, read=[part.reads])
            counts = batch.counts[0]
            values = part.to(model.device).values(run[part.reads][0]).float().cpu()
            values[~counts] = 0.0
        own = values.tolist()[begin:]
        return {
            "tokens": token_pieces(model.tokenizer, ids)[begin:],
            "values": own,
            "max": max(own, default=0.0),
            "fires": sum(v > 0 for v in own),
            "maximum": maximum,
        }

    def _part(self, address: str, index: int) -> "Feature":
        key = (address, index)
        if key not in self._parts:
            self._parts[key] = feature(self._bench.dictionary(address), index)
            while len(self._parts) > _KEPT:
                self._parts.popitem(last=False)
        self._parts.move_to_end(key)
        return self._parts[key]
