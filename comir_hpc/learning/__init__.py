"""What training is made of: patches and their augmentation, the contrastive loss, and the engines that take a step."""
