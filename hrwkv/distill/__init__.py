"""Distillation of a teacher into a converted student: losses, stages, and the trainer that runs them."""
