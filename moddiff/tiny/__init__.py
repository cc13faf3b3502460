"""What do the tiny models learn from, and how are they judged?  Small clips, a judge, training stages."""
