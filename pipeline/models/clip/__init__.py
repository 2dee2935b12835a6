"""CLIP's two towers and its tokenizer, on open_clip's weights."""
