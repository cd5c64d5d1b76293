"""Reinforcement learning of policies and judges: rewards to advantages to losses."""
