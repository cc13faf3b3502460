"""Where does each part of a pipeline run?  In other processes, on other machines, through other frameworks.

mlx.py    the text encoder through mlx, for a Mac
"""
