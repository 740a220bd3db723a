"""Who owns the loop: the library itself, a diffusers pipeline."""
