"""Trainings of experiments, each in a process of its own, and what they have learnt."""
