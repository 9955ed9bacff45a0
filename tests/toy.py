"""Small stand-ins for real things: a tokenizer that is trained in milliseconds."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TOY_CORPUS = (
    '{"name": "Ada", "age": 36, "tags": ["a", "b"]}',
    "the quick brown fox jumps over the lazy dog, then the dog sleeps.",
    '{"ok": true, "items": [1, 2, 3], "none": null}',
)
TOY_EOS, TOY_END = "<eos>", "<end>"


def toy_tokenizer(vocab_size: int = 320) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: all 256 bytes, a few merges, ids 0 `<eos>` and 1 `<end>` special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[TOY_EOS, TOY_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TOY_CORPUS * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=TOY_EOS)
