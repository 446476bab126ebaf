"""Mask R-CNN on COCO annotations."""
