"""Alignment: rollouts, reward models, preference losses, PPO and its relatives."""
