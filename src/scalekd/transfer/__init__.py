"""The distilled backbone at work: probing, detection, segmentation."""
