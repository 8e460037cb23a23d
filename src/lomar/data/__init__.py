"""From files to batches of windows. Knows nothing of models or methods."""
