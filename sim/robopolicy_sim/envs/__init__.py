"""One file for each task, on top of ``base.MujocoTaskEnv``."""
