"""timm models: created, checked, viewed in stages, exported."""
