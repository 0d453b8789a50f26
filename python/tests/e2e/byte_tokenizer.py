"""A tokenizer for the tiny model, for those that ask in text: a byte is a token, so no file has to be fetched."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

#: As the model's config.json has them.
_SPECIAL = ("<pad>", "<s>", "</s>")


def write(folder: Path, vocabulary: int) -> None:
    """For a model of so many tokens. Those beyond bytes are only ever generated; each has a text of its own."""
    names = [*_SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    names += [f"<{number}>" for number in range(len(names), vocabulary)]
    tokenizer = Tokenizer(models.BPE(vocab={name: number for number, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": _SPECIAL[0], "bos_token": _SPECIAL[1], "eos_token": _SPECIAL[2],
        "chat_template": "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
