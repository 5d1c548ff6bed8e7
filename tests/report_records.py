# SPDX-License-Identifier: Apache-2.0
"""Records as in report.json, and what reads a page again."""

import html.parser
import re
import xml.etree.ElementTree
from typing import Any

import numpy as np

SVG = "{http://www.w3.org/2000/svg}"


def synthetic(
    stacks=("encoder", "decoder"), sparse=15, experts=2048, matrices=("wi", "wo")
) -> dict[str, Any]:
    """A record of the size of a large model's, of plausible numbers."""
    rng = np.random.default_rng(0)
    layers = []
    for stack in stacks:
        for layer in range(sparse):
            layers.append(_layer(rng, stack, layer, experts, matrices))
    expert_weights = len(layers) * experts * 2 * 2080 * 6144
    return {
        "checkpoint": {
            "path": "gs://t5-data/pretrained_models/moe/switch_c_2048/checkpoint_550000",
            "format": "t5x",
            "step": 550000,
            "bytes": 6_284_000_000_000,
            "parameters": 1_571_000_000_000,
            "sparse_layers": len(layers),
            "experts": experts,
        },
        "settings": {
            "quantizer": {"method": "gptq", "bits": "ternary", "group_size": None},
            "text": {
                "sentencepiece_model_file": "sentencepiece.model",
                "files": [f"/data/c4/en/train.{n:05}.json.gz" for n in range(64)],
                "validation_files": "/data/c4/en/validation/*.json.gz",
                "extra_ids": None,
                "task_feature_lengths": {"inputs": 512, "targets": 114},
                "document_mode": "skip",
                "seed": 0,
            },
            "compute": {"activation_dtype": None, "read_budget": 4294967296},
            "codec": "qmoe",
            "store_dtype": "bfloat16",
            "activation_dtype": "bfloat16",
        },
        "samples": {
            "calibration": {
                "samples": 160_000,
                "encoder_tokens": 71_234_567,
                "decoder_tokens": 15_765_432,
                "counts": {"documents_read": 240_000, "too_long": 80_000, "too_short": 12},
                "fingerprint": "ece378df30fd467347f0e2abab44b995",
            }
        },
        "machine": {"device": "8 x NVIDIA H100", "jax": "0.10.2", "peak_host_bytes": 700 << 30},
        "layers": layers,
        "losses": {"original": 1.18, "round_to_nearest": 2.15, "compressed": 1.26},
        "standard_errors": {"original": 0.02, "round_to_nearest": 0.01, "compressed": 0.003},
        "totals": {
            "parameters": 1_571_000_000_000,
            "expert_weights": expert_weights,
            "zero_fraction": 0.875,
            "bits_per_expert_weight": 0.79,
            "entropy_per_expert_weight": 0.668,
            "bits_per_parameter": 0.8036,
            "expert_bytes": int(expert_weights * 0.79 / 8),
            "packed_bytes": 157_800_000_000,
            "bfloat16_bytes": 3_142_000_000_000,
            "expert_compression": 20.25,
            "compression": 19.91,
        },
        "seconds": {"solve": 60_123.4, "Hessians": 22_000.0, "dense part": 9000.5, "losses": 60.0},
    }


def _layer(rng, stack, layer, experts, matrices) -> dict[str, Any]:
    share = rng.dirichlet(np.full(experts, 0.5 + 0.1 * layer))
    tokens = rng.multinomial(1000 * experts, share)
    tokens[rng.random(experts) < 0.01] = 0
    weights = experts * 2080 * 6144
    return {
        "stack": stack,
        "layer": 2 * layer + 1,
        "tokens": tokens.tolist(),
        "hessian_tokens": np.minimum(tokens, 4000).tolist(),
        "fallbacks": {
            str(expert): "no calibration tokens" for expert in np.flatnonzero(tokens == 0)
        },
        "matrices": {
            name: {
                "error": np.clip(rng.normal(0.15 - 0.03 * n, 0.02, experts), 0, 1)
                .round(8)
                .tolist(),
                "level_counts": [0, 0, 0],
                "zeros": int(weights * (0.86 + 0.03 * n + 0.01 * np.sin(layer))),
                "weights": weights,
                "bits": int(weights * (0.84 - 0.1 * n - 0.03 * np.sin(layer))),
            }
            for n, name in enumerate(matrices)
        },
        "seconds": 3000.0 + layer,
    }


class Parsed(html.parser.HTMLParser):
    """A page's elements and text; raises where an element is not closed by its own end."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.attributes, self.words = [], [], [], []
        self.feed(page)
        self.close()
        assert not self.open
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "wbr"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, self.getpos()

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)


def plots(page) -> dict[str, Any]:
    """Each plot's label and its parsed tree."""
    found = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    trees = [xml.etree.ElementTree.fromstring(svg) for svg in found]
    assert all(tree.get("role") == "img" for tree in trees)
    return {str(tree.get("aria-label")): tree for tree in trees}


def row(page, first):
    """The cells of the first table row that begins with `first`."""
    found = re.search(rf'<tr><th scope="row">{re.escape(first)}</th>(.*?)</tr>', page)
    assert found, first
    return re.findall(r"<td>(.*?)</td>", found[1])
