"""The operators of DAT, usable alone: `from dat_deploy.plugins import deformable_attention`.

A folder an operator, with the same files in each; `reference.py` says what the operator means. Who calls torch.compile
on them sets `torch.compiler.config.cache_key_tag = dat_deploy.plugins.cache_key()` before.
"""

from dat_deploy.plugins.deformable_attention.torch_op import deformable_attention
from dat_deploy.plugins.deformable_sample.torch_op import deformable_sample
from dat_deploy.plugins.dispatch import cache_key
from dat_deploy.plugins.neighborhood_attention.torch_op import neighborhood_attention
from dat_deploy.plugins.window_attention.torch_op import window_attention

__all__ = ["cache_key", "deformable_attention", "deformable_sample", "neighborhood_attention", "window_attention"]
