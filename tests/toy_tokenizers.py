"""Tiny fast tokenizers, written to a folder as a model would carry them."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from actors.text.pieces import SPACE_MARK, byte_level_alphabet

CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('unknown role ' + m.role) }}{% endif %}"
    "<s>{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
SPECIALS = ("<s>", "</s>", "<pad>")
BOS, EOS, PAD = range(3)


def _save(folder: Path, backend: Tokenizer, template: str | None, end_ids: object) -> Path:
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIALS])
    hf = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=template
    )
    hf.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": end_ids}))
    return folder


def byte_level_folder(folder: Path, template: str | None = CHAT_TEMPLATE, end_ids: object = EOS) -> Path:
    """Byte-level BPE: ids 0-2 special, 256 bytes, then a few merges that cross word and character borders."""
    chars = {byte: char for char, byte in byte_level_alphabet().items()}

    def spell(data: bytes) -> str:
        return "".join(chars[b] for b in data)

    vocab = {token: i for i, token in enumerate(SPECIALS)}
    for byte in range(256):
        vocab[chars[byte]] = len(vocab)
    merges: list[tuple[str, str]] = []
    for left, right in (
        (b"e", b"n"),
        (b"en", b"d"),
        (b" ", b"t"),
        (b"\xf0", b"\x9f"),
        (b"\x82", b"\xac"),
        (b"o", b"k"),
        (b"d", b"!"),
        (b"end", b"!"),
    ):
        merges.append((spell(left), spell(right)))
        vocab[spell(left + right)] = len(vocab)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return _save(folder, backend, template, end_ids)


def byte_fallback_folder(folder: Path, metaspace: bool = False) -> Path:
    """SentencePiece style, as Llama 2 has it: pieces with a space mark, bytes as <0xNN>."""
    vocab = {token: i for i, token in enumerate(SPECIALS)}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    for piece in (
        SPACE_MARK,
        *"abcdefghijklmnopqrstuvwxyz.!é",
        "th",
        "the",
        SPACE_MARK + "the",
        SPACE_MARK * 2,
    ):
        vocab.setdefault(piece, len(vocab))
    merges = [("t", "h"), ("th", "e"), (SPACE_MARK, "the"), (SPACE_MARK, SPACE_MARK)]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token=None))
    if metaspace:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
        backend.decoder = decoders.Sequence(
            [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")]
        )
    else:
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend(SPACE_MARK), normalizers.Replace(" ", SPACE_MARK)]
        )
        backend.decoder = decoders.Sequence(
            [
                decoders.Replace(SPACE_MARK, " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
    return _save(folder, backend, None, [EOS, PAD])
