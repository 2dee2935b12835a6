"""CLIP: `ranker` is the engine; `loader` reads open_clip's weights, `towers`, `blocks` and `tokenizer` compute on them.

In: prepared images and texts. Out: the cosine similarity of each image with each of its texts.
"""
