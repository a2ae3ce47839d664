"""One engine for all that generates: processes, packed states, samplers, guidance. It knows fields
with rows for members or for groups of them, and nothing of what they mean."""
