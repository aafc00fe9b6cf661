"""Classification: the task, its network, boxes and prediction."""
