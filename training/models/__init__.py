"""The parts of vision-language models: image encoder, Q-Former, language models, tokenizers and their layers.

In: a section of the config and the weights that it names. Out: torch modules. Knows no training stage.
"""
