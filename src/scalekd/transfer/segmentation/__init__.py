"""UPerNet on images with masks."""
