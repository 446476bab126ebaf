"""Detection and segmentation with a distilled student, or any timm model, as the backbone."""
