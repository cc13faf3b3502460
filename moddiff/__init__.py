"""moddiff: diffusion-transformer video models, small enough to read and exact enough to load."""
