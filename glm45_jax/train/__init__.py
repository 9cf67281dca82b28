"""Pretraining, mid-training and SFT: one loop around one pure `train_step`."""
