"""Whether a model's weights are still those that it was started with: they can be changed in place.

vLLM tells a connector nothing of it (`reload_weights`, a trainer's updates, a worker's own extension), so the tensors are
looked at: 64 bytes of each parameter and buffer, before a step that sends or loads chunks. That takes a fraction of a
millisecond. A change that touches none of these bytes is not seen.
"""

from __future__ import annotations

import hashlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("vllm.pd_backend")

_SAMPLES = 64


class Weights:
    """What the weights of one worker are."""

    def __init__(self, identity: str, model: torch.nn.Module | None) -> None:
        """`identity`: of what was loaded. Without the `model` it is taken to stay so."""
        self._loaded = identity
        self._model = model
        #: `(where it is registered, its name there, the tensor, where its bytes are)`, to notice one that takes its place.
        self._tensors: list[tuple[dict[str, Any], str, torch.Tensor, int]] = []
        #: By device: parts of a model may be elsewhere.
        self._samples: dict[torch.device, list[torch.Tensor]] = {}
        self._first = self._sample = self._sampled()
        #: What they were when they were last looked at.
        self.last = identity

    def identity(self) -> str:
        """What they are now: equal where weights are, once they were changed only between servers of one kind."""
        sampled = self._sampled()
        if sampled != self._sample:
            self._sample = sampled
            self.last = self._loaded if sampled == self._first else f"changed {sampled}"
            logger.warning("the model's weights have changed in place: chunks of the former ones are not used any more")
        return self.last

    def _sampled(self) -> str:
        if self._model is None:
            return ""
        import torch

        if not self._tensors or any(
            owner.get(name) is not tensor or tensor.data_ptr() != at for owner, name, tensor, at in self._tensors
        ):
            self._register(self._model)
        with torch.inference_mode():
            by_device = [torch.cat(samples).cpu().numpy() for samples in self._samples.values()]
        return hashlib.blake2b(b"".join(sampled.tobytes() for sampled in by_device), digest_size=16).hexdigest()

    def _register(self, model: torch.nn.Module) -> None:
        import torch

        self._tensors, self._samples = [], {}
        with torch.inference_mode():
            for module in model.modules():
                for owner in (module._parameters, module._buffers):
                    for name, tensor in owner.items():
                        if tensor is not None and tensor.numel() and not tensor.is_meta:
                            self._tensors.append((owner, name, tensor, tensor.data_ptr()))
                            self._samples.setdefault(tensor.device, []).append(_samples_of(tensor.detach()))


def _samples_of(tensor: torch.Tensor) -> torch.Tensor:
    """Some bytes of a tensor, as a view of them."""
    import torch

    order = sorted(range(tensor.dim()), key=lambda dim: -tensor.stride(dim))
    tensor = tensor.permute(order)
    if not tensor.is_contiguous():  # One element from its middle.
        tensor = tensor[tuple(size // 2 for size in tensor.shape)].as_strided((1,), (1,))
    flat = tensor.view(-1).view(torch.uint8)
    # Odd, so that high and low bytes of an element have their turns.
    step = max(1, flat.numel() // _SAMPLES) | 1
    return flat[::step][:_SAMPLES]
