"""Single-device maths: a decoder made of parts, and the ways its weights come and go.

Nothing here sees a mesh; parallelism is applied from outside (`paceline.parallel`).
Shapes: B batch, T query tokens, S key tokens, D model, N query heads, K key-value heads,
H head size, F feed-forward, V vocabulary (docs/shapes.md).
"""
