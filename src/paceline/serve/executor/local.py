"""The executor of one process: a whole model, one request after the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from paceline.decode.cache import ContiguousCache
from paceline.decode.sampler import sample
from paceline.decode.step import extend, num_own_tokens
from paceline.models.decoder import Decoder
from paceline.serve.executor.base import StepResult, Work


class LocalExecutor:
    """Computes on the device that the model is on, in the model's dtype.

    Args:
        model: with its weights.
    """

    def __init__(self, model: Decoder) -> None:
        self._model = model.eval()
        weight = model.embedding.weight
        self._dtype, self._device = weight.dtype, weight.device
        self._caches: dict[int, ContiguousCache] = {}

    def run(self, step: Sequence[Work]) -> StepResult:
        sampled = {work.request_id: self._compute(work) for work in step}
        return StepResult({key: token for key, token in sampled.items() if token is not None})

    def release(self, request_id: int) -> None:
        self._caches.pop(request_id, None)

    @torch.inference_mode()
    def _compute(self, work: Work) -> int | None:
        cache = self._caches.get(work.request_id)
        if cache is None:
            cache = ContiguousCache(self._model.spec, self._dtype, self._device)
            self._caches[work.request_id] = cache
        num_before = num_own_tokens(self._model, cache)
        assert num_before == work.start, "the cache and the request disagree"
        logits_11V = extend(self._model, torch.tensor([work.tokens], device=self._device), cache)
        if work.sampling is None:
            return None
        return sample(logits_11V[0, 0], work.sampling, work.start + len(work.tokens))
