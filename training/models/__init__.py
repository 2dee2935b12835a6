"""The parts of a BLIP-2 model: frozen image encoder, Q-Former, frozen language model, and their tokenizers."""
