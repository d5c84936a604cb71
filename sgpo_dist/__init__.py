"""SGPO as a distributed actor/learner system: one model writes, improves and learns from its own preference pairs."""
