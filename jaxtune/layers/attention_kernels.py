"""Attention kernels of accelerators."""

from __future__ import annotations


def cudnn_attention(q, k, v, q_segments, kv_segments, offset, scale):
    raise NotImplementedError


def splash_attention(q, k, v, q_segments, kv_segments, offset, scale):
    raise NotImplementedError
