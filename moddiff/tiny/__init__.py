"""What do the tiny models learn from, and how are they judged? The world of small clips, its judge, and the training."""
