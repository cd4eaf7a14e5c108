"""The trainer, its checkpoints and logs, and the job that runs a recipe."""
