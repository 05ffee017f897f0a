"""circuit-tracer's attribution graphs of one model and its transcoders, as asked for line by line.

    .venv-circuits/bin/python benchmarks/peers/circuits.py FOLDER [--threads N]

FOLDER has `model` as transformers saves it, of Gemma 2's or Gemma 3's shape, and `layer_N`, each a
transcoder in Gemma Scope 2's layout. When both are loaded, one line of JSON says so. Then each line
of standard input is a JSON object, answered by a line:

    {"ids": [2, ...], "max_features": N, "nodes": 0.8, "edges": 0.98, "batch": N, "out": FILE}

`ids` are one prompt's, BOS first; `batch` is how many rows are made at once, 512 by default. FILE,
which may be left out, gets the graph: `adjacency [n, n]` (rows are targets),
`features [n_features, 3]` (layer, position, feature), `values`, `tokens` and `probabilities` of the
targets, the masks `nodes` and `edges` of what pruning keeps, `influence` and `scores`.

circuit-tracer is called as it is; only the loading of the model stands in for what it does by the
names of published models. Gemma 2 runs on its TransformerLens back-end, the default, with a
configuration of these sizes; Gemma 3 on its nnsight back-end, which it requires for that. Features
are read at `mlp.hook_in`, where Gemma Scope 2's transcoders are: after the norm, gain included.
"""

import argparse
import contextlib
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from memory import forget_peak, peak, resident
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


def load(folder: Path):
    """circuit-tracer's replacement model."""
    from circuit_tracer import ReplacementModel
    from circuit_tracer.transcoder.single_layer_transcoder import load_transcoder_set

    config = AutoConfig.from_pretrained(folder / "model")
    cpu = torch.device("cpu")
    transcoders = load_transcoder_set(
        {n: str(folder / f"layer_{n}" / "params.safetensors")
         for n in range(config.num_hidden_layers)},
        scan="random", feature_input_hook="mlp.hook_in", feature_output_hook="hook_mlp_out",
        device=cpu, dtype=torch.float32, special_load_fn="gemma-scope-2",
        lazy_encoder=False, lazy_decoder=False,
    )  # fmt: skip
    if config.model_type == "gemma2":
        return _in_transformer_lens(folder / "model", config, transcoders)
    return ReplacementModel.from_pretrained_and_transcoders(
        str(folder / "model"), transcoders, backend="nnsight", device=cpu, dtype=torch.float32
    )


def _in_transformer_lens(folder: Path, config, transcoders):
    """What `from_pretrained_and_transcoders` does, for sizes that no published model has."""
    from circuit_tracer.replacement_model.replacement_model_transformerlens import (
        TransformerLensReplacementModel,
    )
    from transformer_lens import HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions.gemma import convert_gemma_weights

    local = [kind == "sliding_attention" for kind in config.layer_types]
    cfg = HookedTransformerConfig(
        model_name="tiny-gemma-2", original_architecture="Gemma2ForCausalLM", device="cpu",
        d_model=config.hidden_size, d_head=config.head_dim, n_heads=config.num_attention_heads,
        n_key_value_heads=config.num_key_value_heads, d_mlp=config.intermediate_size,
        n_layers=config.num_hidden_layers, n_ctx=config.max_position_embeddings,
        d_vocab=config.vocab_size, eps=config.rms_norm_eps, act_fn=config.hidden_activation,
        normalization_type="RMS", final_rms=True, use_normalization_before_and_after=True,
        positional_embedding_type="rotary", rotary_base=config.rope_theta,
        rotary_dim=config.head_dim, gated_mlp=True,
        attn_scale=config.query_pre_attn_scalar**0.5, use_attn_scale=True,
        use_local_attn=True, window_size=config.sliding_window,
        attn_types=["local" if one else "global" for one in local],
        attn_scores_soft_cap=config.attn_logit_softcapping,
        output_logits_soft_cap=config.final_logit_softcapping, tokenizer_prepends_bos=True,
        default_prepend_bos=True, dtype=torch.float32,
    )  # fmt: skip
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = TransformerLensReplacementModel(cfg, tokenizer=AutoTokenizer.from_pretrained(folder))
    model.load_and_process_state_dict(
        convert_gemma_weights(plain, cfg), fold_ln=False, center_writing_weights=False,
        center_unembed=False,
    )  # fmt: skip
    model._configure_replacement_model(transcoders)
    return model


def graph_of(model, asked: dict) -> tuple[dict, dict]:
    """What is measured, and the graph as tensors."""
    from circuit_tracer import attribute
    from circuit_tracer.graph import compute_graph_scores, compute_node_influence, prune_graph

    forget_peak()
    before, began = resident(), time.perf_counter()
    graph = attribute(
        torch.tensor(asked["ids"]), model, batch_size=asked.get("batch", 512),
        max_feature_nodes=asked["max_features"],
    )  # fmt: skip
    attributed = time.perf_counter() - began
    kept = prune_graph(graph, asked["nodes"], asked["edges"])
    scores = compute_graph_scores(graph)
    told = {
        "seconds": time.perf_counter() - began, "attribution_seconds": attributed,
        "max_memory_bytes": peak(), "resident_before_bytes": before,
        "active": len(graph.active_features), "features": len(graph.selected_features),
        "targets": len(graph.logit_targets), "nodes": int(kept.node_mask.sum()),
        "edges": int(kept.edge_mask.sum()), "scores": scores,
    }  # fmt: skip
    if asked.get("out") is None:
        return told, {}
    weights = torch.zeros(len(graph.adjacency_matrix))
    weights[-len(graph.logit_targets) :] = graph.logit_probabilities
    chosen = graph.selected_features
    return told, {
        "adjacency": graph.adjacency_matrix, "features": graph.active_features[chosen],
        "values": graph.activation_values[chosen], "tokens": graph.logit_token_ids,
        "probabilities": graph.logit_probabilities, "nodes": kept.node_mask,
        "edges": kept.edge_mask, "scores": torch.tensor(scores, dtype=torch.float64),
        "influence": compute_node_influence(graph.adjacency_matrix, weights),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int)
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    answer, sys.stdout = sys.stdout, sys.stderr
    model = load(given.folder)
    versions = {name: version(name) for name in ("circuit-tracer", "transformers", "torch")}
    print(json.dumps({"versions": versions, "backend": model.backend}), file=answer, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        told, tensors = graph_of(model, asked)
        if tensors:
            from safetensors.torch import save_file

            save_file({n: t.contiguous() for n, t in tensors.items()}, asked["out"])
        print(json.dumps(told), file=answer, flush=True)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main()
