"""Variants for one Hopper GPU: Triton kernels for what memory bounds, cuBLAS and cuDNN for what arithmetic bounds.

``engine.write`` copies these modules word for word into flat engines of the hopper schedule; so kernels use nothing but
torch, triton and each other, and FlashAttention-4 where a plan asks for it. All that is Triton's also runs on a CPU
under its interpreter (``TRITON_INTERPRET=1``), where the tests hold it against float64 formulas.

Shape letters: T tokens of a micro-batch (rows N times positions S), D hidden, F intermediate, H query heads, G
key/value heads, R = H / G, K head_dim, V vocabulary.
"""
