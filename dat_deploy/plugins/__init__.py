"""The operators of DAT, usable alone: `from dat_deploy.plugins import deformable_attention`.

A folder an operator, with the same files in each; `reference.py` says what the operator means.
"""

from dat_deploy.plugins.deformable_attention.torch_op import deformable_attention
from dat_deploy.plugins.deformable_sample.torch_op import deformable_sample
from dat_deploy.plugins.neighborhood_attention.torch_op import neighborhood_attention
from dat_deploy.plugins.window_attention.torch_op import window_attention

__all__ = ["deformable_attention", "deformable_sample", "neighborhood_attention", "window_attention"]
