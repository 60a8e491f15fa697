"""Lever 2: concept vectors, the maps that carry them to other models, and edits of the residual stream."""
