"""`scalekd demo`: embedded images, an embedded teacher, and the demo."""
