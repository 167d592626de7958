"""Trilemma: train, sample, score and honestly compare deep generative models on your own data."""
