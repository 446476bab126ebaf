"""Mask R-CNN and RetinaNet on COCO annotations."""
