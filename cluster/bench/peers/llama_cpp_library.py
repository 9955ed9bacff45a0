"""The few calls of libllama that a scheduler needs, with numpy in and out."""

from __future__ import annotations

import ctypes

import llama_cpp
import numpy as np

Entry = tuple[int, int, int, bool]
"""A token of a batch: id, position, slot, whether its logits are wanted."""


class Library:
    """A model and a context for `slots` sequences of `tokens_per_slot` tokens. unified: one KV buffer for all
    sequences instead of one each."""

    def __init__(self, path: str, slots: int, tokens_per_slot: int, threads: int, unified: bool) -> None:
        llama_cpp.llama_backend_init()
        system_info = llama_cpp.llama_print_system_info().decode()
        model_params = llama_cpp.llama_model_default_params()
        # Of 0.3.36 the products of quantised weights on AMX end the process with an illegal instruction: a
        # thread uses tiles that it has not configured.
        model_params.use_extra_bufts = "AMX_INT8 = 1" not in system_info
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), model_params)
        if not self._model:
            raise SystemExit(f"llama.cpp cannot load {path}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = slots * -(-tokens_per_slot // 256) * 256
        params.n_seq_max = slots
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = unified
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise SystemExit(f"llama.cpp cannot allocate {slots} sequences of {tokens_per_slot} tokens")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self.vocab = llama_cpp.llama_model_get_vocab(self._model)
        self._width = llama_cpp.llama_vocab_n_tokens(self.vocab)
        self.batch_tokens = int(llama_cpp.llama_n_batch(self._context))
        self._batch = llama_cpp.llama_batch_init(self.batch_tokens, 0, 1)
        self.options = {
            "model": self._describe(),
            "slots": slots,
            "n_ctx_seq": int(llama_cpp.llama_n_ctx_seq(self._context)),
            "n_batch": self.batch_tokens,
            "n_ubatch": int(llama_cpp.llama_n_ubatch(self._context)),
            "threads": threads,
            "kv_unified": unified,
            "use_extra_bufts": bool(model_params.use_extra_bufts),
            "system_info": system_info,
        }

    def _describe(self) -> str:
        buffer = ctypes.create_string_buffer(256)
        llama_cpp.llama_model_desc(self._model, buffer, 256)
        return buffer.value.decode()

    def decode(self, entries: list[Entry]) -> np.ndarray:
        """The best token after each entry that wants logits, in the order of the entries, [wanted]."""
        batch = self._batch
        wanted = 0
        for index, (token, position, slot, logits) in enumerate(entries):
            batch.token[index] = token
            batch.pos[index] = position
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = slot
            batch.logits[index] = logits
            wanted += logits
        batch.n_tokens = len(entries)
        code = llama_cpp.llama_decode(self._context, batch)
        if code != 0:
            raise RuntimeError(f"llama_decode returned {code} for {len(entries)} tokens")
        if not wanted:
            return np.empty(0, np.int64)
        rows = np.ctypeslib.as_array(llama_cpp.llama_get_logits(self._context), (wanted, self._width))
        best: np.ndarray = rows.argmax(axis=1)
        return best

    def truncate(self, slot: int, length: int) -> bool:
        """Forget what lies behind. False for models that can only forget all: then nothing has changed."""
        return bool(llama_cpp.llama_memory_seq_rm(self._memory, slot, length, -1))

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(self._memory, False)

    def ends(self, token: int) -> bool:
        return bool(llama_cpp.llama_vocab_is_eog(self.vocab, token))
