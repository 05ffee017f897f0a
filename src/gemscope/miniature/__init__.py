"""The bundled model, scope and text, and the text they were made from."""

from pathlib import Path

from ._stdlib import Document as Document
from ._stdlib import documents as documents

MODEL = Path(__file__).parent / "model"
"""The model, in the ordinary Hugging Face layout."""
SCOPE = Path(__file__).parent / "scope"
"""Its dictionaries, in Gemma Scope 2's layout."""
HELD_OUT = Path(__file__).parent / "text" / "heldout.jsonl"
"""The text that evaluation uses: one document a line, `{"path": ..., "text": ...}`."""
MAXIMA = Path(__file__).parent / "maxima.safetensors"
"""The largest activation of each feature, a tensor of each dictionary, and the text it was on."""
MODEL_NAME = "gemscope/miniature"
"""The model's name in the configs of its dictionaries."""
LICENCE = "Apache-2.0"
