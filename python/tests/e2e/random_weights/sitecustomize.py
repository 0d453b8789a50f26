"""Read by every Python of a server whose model is a configuration alone: `--load-format dummy` gives it weights that show.

vLLM's own are so small that what attention reads changes no token. These are normal, the same in every process, and different
for each parameter.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import zlib

_LOADER = "vllm.model_executor.model_loader.dummy_loader"


def _spread(name, tensor):
    """Standard deviation of a weight, or None where all its elements are `_constant`."""
    import math

    if tensor.dim() < 2:
        return None
    scale = 16 if "embed" in name else 4 if "lm_head" in name else 2
    return scale / math.sqrt(tensor.shape[-1])


def _constant(name, module):
    """What norms multiply by; nothing is added anywhere."""
    if name.endswith("weight"):
        # Gemma's norms add one to it.
        return 0.0 if type(module).__name__.startswith("Gemma") else 1.0
    return 0.0


def _load_weights(self, model, model_config):
    import torch

    with torch.no_grad():
        for path, module in model.named_modules():
            for name, tensor in module.named_parameters(recurse=False):
                full = f"{path}.{name}"
                spread = _spread(full, tensor)
                if not torch.is_floating_point(tensor):
                    continue
                if spread is None:
                    tensor.fill_(_constant(name, module))
                    continue
                generator = torch.Generator().manual_seed(zlib.crc32(full.encode()))
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * spread)


class _Finder(importlib.abc.MetaPathFinder):
    """Has the module changed as soon as it is imported, and imports nothing by itself."""

    def find_spec(self, name, path=None, target=None):
        if name != _LOADER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            module.DummyModelLoader.load_weights = _load_weights

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _Finder())
