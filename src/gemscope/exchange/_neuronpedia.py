"""Neuronpedia's exports: names of sources, and rows with the fields and defaults of its tables.

`v1/{modelId}/{sourceId}/` holds `features/`, `activations/` and `explanations/`, each of
`batch-N.jsonl.gz`, beside `model.jsonl`, `release.jsonl`, `sourceset.jsonl` and `source.jsonl`.
`index` is a string there, and `layer` is the source's id, `{layer}-{setname}`.
"""

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from gemscope.hub import catalog

BATCH = 1024
"""Rows of a file; of activations, features of a file."""
CREATOR = "gemscope"
KINDS = ("features", "activations", "explanations")
TOP = -1.0
"""`binMin` and `binContains` of the strongest activations, which are of no interval."""

FEATURE: dict[str, Any] = {
    "modelId": "", "layer": "", "index": "", "creatorId": CREATOR, "createdAt": "",
    "maxActApprox": 0, "hasVector": False, "vector": [], "vectorLabel": None,
    "vectorDefaultSteerStrength": 10, "hookName": None, "topkCosSimIndices": [],
    "topkCosSimValues": [], "neuron_alignment_indices": [], "neuron_alignment_values": [],
    "neuron_alignment_l1": [], "correlated_neurons_indices": [], "correlated_neurons_pearson": [],
    "correlated_neurons_l1": [], "correlated_features_indices": [],
    "correlated_features_pearson": [], "correlated_features_l1": [], "neg_str": [],
    "neg_values": [], "pos_str": [], "pos_values": [], "frac_nonzero": 0,
    "freq_hist_data_bar_heights": [], "freq_hist_data_bar_values": [],
    "logits_hist_data_bar_heights": [], "logits_hist_data_bar_values": [],
    "decoder_weights_dist": [], "sourceSetName": "",
}  # fmt: skip
ACTIVATION: dict[str, Any] = {
    "id": "", "tokens": [], "index": "", "layer": "", "modelId": "", "maxValue": 0,
    "maxValueTokenIndex": 0, "minValue": 0, "values": [], "creatorId": CREATOR, "dataSource": "",
    "dataIndex": None, "dfaValues": [], "dfaTargetIndex": None, "dfaMaxValue": None,
    "createdAt": "", "lossValues": [], "logitContributions": None, "binMin": None, "binMax": None,
    "binContains": None, "qualifyingTokenIndex": None, "zIndices": [], "zValues": [],
}  # fmt: skip
EXPLANATION: dict[str, Any] = {
    "id": "", "modelId": "", "layer": "", "index": "", "description": "", "authorId": CREATOR,
    "embedding": [], "triggeredById": None, "typeName": None, "explanationModelName": None,
    "notes": None, "createdAt": "",
}  # fmt: skip
SOURCE: dict[str, Any] = {
    "id": "", "modelId": "", "setName": "", "creatorId": CREATOR, "hasDashboards": True,
    "inferenceEnabled": False, "inferenceHosts": [], "saelensConfig": None,
    "saelensRelease": None, "saelensSaeId": None, "hfRepoId": None, "hfFolderId": None,
    "visibility": "PUBLIC", "defaultOfModelId": None, "hasUmap": False,
    "hasUmapLogSparsity": False, "hasUmapClusters": False, "num_prompts": None,
    "num_tokens_in_prompt": None, "dataset": None, "notes": None, "createdAt": "",
}  # fmt: skip
SOURCE_SET: dict[str, Any] = {
    "modelId": "", "name": "", "creatorId": CREATOR, "hasDashboards": True,
    "visibility": "PRIVATE", "description": "", "type": "", "creatorName": CREATOR, "urls": [],
    "creatorEmail": None, "releaseName": "", "defaultOfModelId": None, "defaultRange": 1,
    "defaultShowBreaks": True, "showDfa": False, "showCorrelated": False,
    "showHeadAttribution": False, "showUmap": False, "createdAt": "",
}  # fmt: skip
RELEASE: dict[str, Any] = {
    "name": "", "description": "", "creatorName": CREATOR, "creatorId": CREATOR,
    "visibility": "PRIVATE", "isNewUi": False, "featured": False, "descriptionShort": None,
    "urls": [], "creatorEmail": None, "creatorNameShort": None, "defaultSourceSetName": None,
    "defaultSourceId": None, "defaultUmapSourceIds": [], "createdAt": "",
}  # fmt: skip
MODEL: dict[str, Any] = {
    "id": "", "instruct": False, "creatorId": CREATOR, "displayNameShort": "", "displayName": "",
    "tlensId": None, "dimension": None, "visibility": "PRIVATE", "defaultSourceSetName": None,
    "defaultSourceId": None, "inferenceEnabled": False, "layers": 0, "neuronsPerLayer": 0,
    "createdAt": "", "owner": "", "updatedAt": "", "website": None,
}  # fmt: skip


def source_of(dictionary: dict[str, Any], layer: int) -> tuple[str, str, str]:
    """Model, source and set of a layer of a dictionary, as Neuronpedia names them.

    Published ones have the names they have there; others are named by model and address.
    """
    address = str(dictionary["address"])
    if known := _published().get(address):
        model, source = known.split("/", 1)
        return model, source, source.split("-", 1)[-1]
    model = _slug(str(dictionary["model"]).rsplit("/", 1)[-1])
    return model, f"{layer}-{_slug(address)}", _slug(address)


def layer_of(source: str) -> int | None:
    """The layer that a source's id begins with."""
    match = re.match(r"(\d{1,4})-", source)
    return int(match[1]) if match else None


def address_of(name: str, dictionaries: Sequence[dict[str, Any]], layers: Sequence[int]) -> str:
    """The dictionary that `modelId/sourceId` names; empty if it is none of `dictionaries`."""
    for dictionary in dictionaries:
        for layer in layers:
            if "/".join(source_of(dictionary, layer)[:2]) == name:
                return str(dictionary["address"])
    return ""


@cache
def _published() -> dict[str, str]:
    return {entry.address: entry.neuronpedia for entry in catalog() if entry.neuronpedia}


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9._]+", "-", text.lower()).strip("-.") or "unnamed"
