"""Private operations of torch that kernels need, under one name each."""

from __future__ import annotations

import torch

flash_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
"""``flash_forward(q, k, v, dropout, is_causal, attn_mask=, scale=) -> (out, logsumexp)``.

Of (B, N, T, H) tensors on the CPU, float64 among them; K may divide N; the mask is added to scores.
A row that sees nothing gets zeros, and 0 as its logsumexp.
"""
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
"""``flash_backward(grad_out, q, k, v, out, logsumexp, dropout, is_causal, attn_mask=, scale=)``,
whose `out` and `logsumexp` may be those over more keys than these.
"""
