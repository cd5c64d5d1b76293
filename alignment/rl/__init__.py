"""Reinforcement learning of policies and judges, from rewards through advantages to losses."""
