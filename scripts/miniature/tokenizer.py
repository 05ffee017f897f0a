"""The tokenizer of the miniature: byte-level BPE over the standard library.

python scripts/miniature/tokenizer.py --to build/miniature/model
"""

import argparse
import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from gemscope.miniature import documents

VOCABULARY = 4_096
SPECIAL = ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>")

# Words keep their leading space. A line break takes the indentation of the next line with it, all
# but the last space, which belongs to the word: one token per line of code for its layout.
WORDS = (
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+"
    r"|\s*[\r\n]+ *(?= \S)|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train(texts: list[str]) -> Tokenizer:
    """A tokenizer that round-trips any bytes and begins every encoding with `<bos>`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A",
        pair="<bos> $A <bos> $B",
        special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))],
    )
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", type=Path, required=True)
    folder = parser.parse_args().to
    if (folder / "tokenizer.json").is_file():
        print(f"{folder}/tokenizer.json is there already")
        return
    texts = [d.text for split in ("library", "tests") for d in documents(split)]
    folder.mkdir(parents=True, exist_ok=True)
    train(texts).save(str(folder / "tokenizer.json"))
    # Written by hand so that transformers 4 and 5 both read it.
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "eos_token": "<eos>",
        "bos_token": "<bos>",
        "additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"],
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    print(f"wrote {folder}/tokenizer.json")


if __name__ == "__main__":
    main()
