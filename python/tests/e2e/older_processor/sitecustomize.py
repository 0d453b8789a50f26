"""Read by every Python of a server under PD_E2E_ISA: hides instructions from vLLM, which goes by what torch says of them.
"""

import os

import torch.cpu

_HIDDEN = ["_is_avx512_bf16_supported", "_is_vnni_supported", "_is_amx_tile_supported", "_is_amx_fp16_supported"]
if os.environ["PD_E2E_ISA"] == "avx2":
    _HIDDEN.append("_is_avx512_supported")
for _name in _HIDDEN:
    setattr(torch.cpu, _name, lambda: False)
